"""Randomness with a name: a secret, single-use keystream for noise and for sampling coins (guarantee G11).

PyTorch's generators are not cryptographic: Mersenne Twister's state can be recovered from its output, and Opacus'
``secure_mode`` needs a package that no longer installs. Here every release draws from AES-256-CTR under a key that
the operating system made for it, and the key dies with the object: it is never stored, printed, pickled or shared.

Noise is float64 Box-Muller over 53-bit uniforms, added in float64 before the sum is rounded to float32.
What that does not remove: floating-point Gaussians are not exactly Gaussian, so an attacker who sees the low bits
of a float64 sum could in principle tell neighbours apart (Mironov 2012; Jin et al. 2022). The released value is
rounded to float32, which drops 29 of the 53 bits; the report states the caveat all the same.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

if TYPE_CHECKING:
    import torch

SECURE_SOURCE: Final = "aes-256-ctr keystream keyed by the operating system, Box-Muller in float64"


class RandomSource(Protocol):
    """Where one release's coins and noise come from.

    Only `Keystream` is a production source. Whatever else is passed in marks the ledger as a test ledger, and
    every report over it prints infinity.
    """

    @property
    def name(self) -> str:
        """What the ledger and the report call this source."""

    def coins(self, n: int, rate: float) -> torch.Tensor:
        """Returns ``n`` independent coins, bool of shape ``(n,)`` on the CPU, each true with probability ``rate``."""

    def gaussian(self, n: int) -> torch.Tensor:
        """Returns ``n`` independent standard normal numbers, float64 of shape ``(n,)`` on the CPU."""

    def seed(self) -> int:
        """Returns 63 random bits for randomness that carries no guarantee (augmentation, dropout)."""


@final
class Keystream:
    """Coins and Gaussian noise from AES-256 in counter mode, under a key of its own.

    Guarantees:
        Secret: the key comes from the operating system and cannot be read, printed, copied or pickled.
        Fresh: two objects never share a key, so no noise is ever drawn twice.
        Rate: a coin is true with probability ``rate`` rounded to a multiple of 2**-64, never more than 2**-64 off.

    References:
        NIST SP 800-38A (counter mode); Box & Muller (1958).
    """

    name: Final = SECURE_SOURCE

    def __init__(self) -> None:
        self.__process = os.getpid()
        # The counter starts at zero: the key is used once, so no (key, counter) pair can repeat.
        self.__stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def _words(self, n: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Returns ``n`` uniform 64-bit words, uint64 of shape ``(n,)``."""
        # A forked child holds the same key at the same counter: both would add the same noise.
        if os.getpid() != self.__process:
            raise RuntimeError("expected a keystream made in this process, got a forked copy; make a new one")
        return np.frombuffer(self.__stream.update(bytes(8 * n)), dtype="<u8")

    def coins(self, n: int, rate: float) -> torch.Tensor:
        """Returns ``n`` coins, bool of shape ``(n,)``, each true with probability ``rate`` in [0, 1]."""
        import torch

        if rate >= 1:
            return torch.ones(n, dtype=torch.bool)
        # Integer comparison: a float32 uniform would round rates such as 1e-9 to nothing.
        return torch.from_numpy(self._words(n) < np.uint64(int(rate * 2**64)))

    def gaussian(self, n: int) -> torch.Tensor:
        """Returns ``n`` standard normal numbers, float64 of shape ``(n,)``."""
        return box_muller(self._words(2 * ((n + 1) // 2)))[:n]

    def seed(self) -> int:
        """Returns 63 bits for randomness that carries no guarantee."""
        return int(self._words(1)[0] >> np.uint64(1))

    def __repr__(self) -> str:
        return "Keystream(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a keystream is secret and single-use: it is neither copied nor pickled; make a new one")


def box_muller(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> torch.Tensor:
    """Turns uniform 64-bit words into standard normal numbers.

    Args:
        words: Uniform words, uint64 of shape ``(2 m,)``.

    Returns:
        Independent standard normal numbers, float64 of shape ``(2 m,)``, none beyond 8.7 in magnitude
        (a standard normal exceeds that with probability below 4e-18).

    References:
        Box & Muller (1958), "A note on the generation of random normal deviates".
    """
    import torch

    # 53 bits each; the half step keeps the uniform away from zero, whose logarithm is infinite.
    uniform = torch.from_numpy((words >> np.uint64(11)).astype(np.float64)).add_(0.5).mul_(2.0**-53)
    half = uniform.shape[0] // 2
    radius = uniform[:half].log_().mul_(-2.0).sqrt_()
    angle = uniform[half:].mul_(2.0 * math.pi)
    return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)))

"""Many samples at once: a matrix product over residues, exact in float64 on any device.

One ciphertext holds one feature of up to N samples, so a logit's ciphertext is the sum of d ciphertexts times integer
weights: a product of the weights, c by d, and the residues, d by 2 N, modulo q. Residues are centred and cut into limbs
so narrow that every partial sum is an integer below 2**53. Then float64 adds them without rounding in whatever order,
and a BLAS on the CPU, PyTorch on the CPU and PyTorch on CUDA give the same bits.

References:
    Bae, Cheon, Hanrot, Park & Stehlé (2024), "Plaintext-ciphertext matrix multiplication and FHE bootstrapping".
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import numpy as np

from privacy.errors import PlanError
from privacy.he.planner import HeadPlan
from privacy.he.ring import Floats, Integers, join, limb_bits, split
from privacy.he.wire import pack, read_samples, switch

_EXACT_BITS: Final = 53
_MOST_LIMBS: Final = 8


class Engine(StrEnum):
    """What multiplies matrices; the results are the same bits."""

    NUMPY = "numpy"
    TORCH = "torch"
    CUDA = "cuda"


def limbs_for_sums(bits: int, absolute: float) -> int:
    """Finds into how many limbs residues must be cut so that sums with weights are exact.

    Args:
        bits: Width of a residue.
        absolute: Largest sum over the features of the weights' magnitudes, of all classes.

    Returns:
        The smallest number of limbs, from 2, with ``absolute * 2**limb < 2**53``.

    Raises:
        PlanError: Not even eight limbs are enough.
    """
    for count in range(2, _MOST_LIMBS + 1):
        if absolute * 2.0 ** limb_bits(bits, count) < 2.0**_EXACT_BITS:
            return count
    raise PlanError(f"expected weights that sum below 2**45, got {absolute:.3g}; use fewer bits of weight")


class BulkEvaluator:
    """The packing BULK.

    Args:
        plan: What to do.
        weights: int64 of shape ``(c, d)``.
        shift: The scaled bias, int64 of shape ``(primes, c)``.
        engine: What multiplies; by default CUDA where PyTorch is loaded and finds a device, else NumPy.
    """

    def __init__(self, plan: HeadPlan, weights: Integers, shift: Integers, engine: Engine | None = None) -> None:
        self._plan, self._shift = plan, shift
        self._weights: Floats = weights.astype(np.float64)
        absolute = float(np.abs(self._weights).sum(1).max())
        self.limbs = limbs_for_sums(max(prime.bit_length() for prime in plan.parameters.primes), absolute)
        self.engine = engine or _fastest()
        self._device: Any = None
        if self.engine is not Engine.NUMPY:
            import torch

            self._device = torch.from_numpy(self._weights).to("cuda" if self.engine is Engine.CUDA else "cpu")

    def answer(self, body: memoryview) -> list[bytes]:
        """Answers a query of one ciphertext for each feature."""
        plan = self._plan
        first, second = self.evaluate(read_samples(body, plan.parameters))
        # A bias belongs to every sample, so to every coefficient.
        first += self._shift[:, :, np.newaxis]
        both = np.concatenate((first, second), axis=1)
        return [pack(switch(both, plan.parameters, plan.answer_bits), plan.answer_bits)]

    def evaluate(self, samples: Integers) -> tuple[Integers, Integers]:
        """Multiplies ciphertexts by the weights, exactly.

        Args:
            samples: int64 of shape ``(d, 2, primes, n)``.

        Returns:
            Both polynomials of every class, int64 of shape ``(primes, c, n)``, congruent but not reduced.
        """
        n, primes = self._plan.parameters.ring, self._plan.parameters.primes
        products = np.empty((len(primes), 2, self._plan.classes, n), dtype=np.int64)
        for row, prime in enumerate(primes):
            for part in range(2):
                limbs = split(samples[:, part, row], prime, self.limbs)  # -> (limbs, d, n)
                products[row, part] = join(np.stack([self._times(limb) for limb in limbs]), prime)
        return products[:, 0], products[:, 1]

    def _times(self, limb: Floats) -> Integers:
        """Multiplies the weights by one limb of the residues: float64 of shape ``(d, n)`` to int64 ``(c, n)``."""
        if self._device is None:
            return (self._weights @ limb).astype(np.int64)
        import torch

        moved = torch.from_numpy(np.ascontiguousarray(limb)).to(self._device.device)
        product: Integers = (self._device @ moved).to(torch.int64).cpu().numpy()
        return product


def _fastest() -> Engine:
    """Picks CUDA only where PyTorch is loaded already: a server that has no device need not load it to find out."""
    import sys

    torch = sys.modules.get("torch")
    return Engine.CUDA if torch is not None and torch.cuda.is_available() else Engine.NUMPY

"""Many samples at once: a matrix product over residues, exact in float64 on any device.

One ciphertext holds one feature of up to N samples, so a logit's ciphertext is the sum of d ciphertexts times integer
weights: a product of the weights, c by d, and the residues, d by 2 N, modulo q. Residues are cut into limbs so
narrow that every partial sum is an integer below 2**53. Then float64 adds them without rounding in whatever order,
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
from privacy.he.ring import Floats, Integers, join, limb_bits
from privacy.he.wire import pack, read_samples, switch

_EXACT_BITS: Final = 53
_MOST_LIMBS: Final = 8
_SLICE: Final = 256


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
        # A slice of the samples at a time keeps the limbs in the cache; a device is better served with all at once.
        step = n if self.engine is Engine.CUDA else _SLICE
        for row, prime in enumerate(primes):
            for part in range(2):
                for start in range(0, n, step):
                    here = slice(start, start + step)
                    limbs = self._multiplied(samples[:, part, row, here], prime)
                    products[row, part, :, here] = join(limbs, prime)
        return products[:, 0], products[:, 1]

    def _multiplied(self, residues: Integers, prime: int) -> Integers:
        """Multiplies the weights by the residues' limbs: int64 of shape ``(d, k)`` to ``(limbs, c, k)``."""
        width = limb_bits(prime.bit_length(), self.limbs)
        mask, shifts = np.int64((1 << width) - 1), [np.int64(width * index) for index in range(self.limbs)]
        if self._device is None:
            limbs = [((residues >> shift) & mask).astype(np.float64) for shift in shifts]
            return np.stack([self._weights @ limb for limb in limbs]).astype(np.int64)
        import torch

        moved = torch.from_numpy(np.ascontiguousarray(residues)).to(self._device.device)
        pieces = [((moved >> int(shift)) & int(mask)).to(torch.float64) for shift in shifts]
        product: Integers = torch.stack([self._device @ piece for piece in pieces]).to(torch.int64).cpu().numpy()
        return product


def _fastest() -> Engine:
    """Picks CUDA only where PyTorch is loaded already: a server that has no device need not load it to find out."""
    import sys

    torch = sys.modules.get("torch")
    return Engine.CUDA if torch is not None and torch.cuda.is_available() else Engine.NUMPY

"""Exact products in Z[X] / (X**N + 1), by floating-point transforms whose error is bounded below one half.

The evaluator multiplies a ciphertext's polynomial, with residues of up to 53 bits, by a polynomial of small integers,
the weights. Residues are centred and cut into limbs; the product of a limb and the weights is a polynomial of integers
far below 2**53, and a complex FFT of length N/2 in float64 computes it to within a bound that is known beforehand
(Percival 2003). Where that bound is below 0.4, rounding gives the exact integers. More limbs make the bound
smaller, so `limbs_for` finds how many are needed, and refuses where no number is enough.

This handles public data only: ciphertexts, and weights that the evaluator knows. No secret key comes near it.

References:
    Percival (2003), "Rapid multiplication modulo the sum and difference of highly composite numbers", theorem 5.1.
    Bernstein (2008), "Fast multiplication and its applications" (the right-angle convolution).
"""

from __future__ import annotations

import functools
import math
from typing import Final, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from privacy.errors import PlanError

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Complexes: TypeAlias = NDArray[np.complex128]

# Rounding is right below 1/2. The bound is a worst case over all inputs and all roundings; errors seen are a hundredth.
MOST_ERROR: Final = 0.4
_MOST_LIMBS: Final = 8
_EPSILON: Final = 2.0**-53
_ROUNDER: Final = 1.5 * 2.0**52
_ROUNDER_BITS: Final = np.float64(_ROUNDER).view(np.int64)


@final
class Ring:
    """Transforms of length ``n`` for Z[X] / (X**n + 1).

    Args:
        n: The ring's dimension, a power of two.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        # Folding X**(n/2) to the imaginary unit makes a product modulo X**n + 1 a cyclic one of half the length.
        self._twist = np.exp(1j * np.pi * np.arange(n // 2) / n)
        self._untwist = np.conj(self._twist)

    def forward(self, polynomials: Floats) -> Complexes:
        """Transforms real polynomials, float64 of shape ``(..., n)``, to complex128 of shape ``(..., n / 2)``."""
        half = self.n // 2
        folded = np.empty((*polynomials.shape[:-1], half), dtype=np.complex128)
        folded.real, folded.imag = polynomials[..., :half], polynomials[..., half:]
        folded *= self._twist
        return np.fft.fft(folded, axis=-1)

    def backward(self, spectra: Complexes) -> Integers:
        """Undoes `forward` and rounds: complex128 of shape ``(..., n / 2)`` to int64 ``(..., n)``, below 2**51."""
        half = self.n // 2
        folded = np.fft.ifft(spectra, axis=-1)
        folded *= self._untwist
        found = np.empty((*spectra.shape[:-1], self.n))
        # Adding 1.5 * 2**52 rounds to an integer below 2**51, and leaves it in the low bits: no cast, and two passes.
        np.add(folded.real, _ROUNDER, out=found[..., :half])
        np.add(folded.imag, _ROUNDER, out=found[..., half:])
        integers = found.view(np.int64)
        integers -= _ROUNDER_BITS
        return integers

    def error(self, norm: float, terms: int = 1) -> float:
        """Bounds the error of any coefficient of a sum of products, before rounding.

        Args:
            norm: Sum over the products of the two factors' Euclidean norms multiplied.
            terms: How many products are added.

        Returns:
            Percival's bound, with one more multiplication at each end for the folding and the additions of the terms.
        """
        levels = int(math.log2(self.n // 2))
        roundings = 3 * levels + math.sqrt(5) * (3 * levels + 4) + (3 * levels + 3) + terms
        return 1.01 * _EPSILON * roundings * norm


@functools.cache
def ring(n: int) -> Ring:
    """Returns the transforms of one dimension; they are constants."""
    return Ring(n)


def limbs_for(n: int, bits: int, weight_norm: float, terms: int = 1) -> int:
    """Finds into how many limbs residues must be cut so that their products with weights are exact.

    Args:
        n: The ring's dimension.
        bits: Width of a residue.
        weight_norm: Sum over the terms of the Euclidean norm of the weights' polynomial.
        terms: How many products are added.

    Returns:
        The smallest number of limbs, from 2, for which every residue there can be gives an error below 0.4.

    Raises:
        PlanError: No number of limbs up to eight is enough: the weights are too wide for this ring.
    """
    for count in range(2, _MOST_LIMBS + 1):
        largest = 2.0 ** (limb_bits(bits, count) - 1)
        norm = largest * math.sqrt(n) * weight_norm
        # Beyond 2**53 a float64 is no longer an integer, however small the relative error.
        if ring(n).error(norm, terms) < MOST_ERROR and norm < 2.0**51:
            return count
    raise PlanError(
        f"expected weights whose norm gives exact products, got {weight_norm:.3g}; use fewer bits of weight"
    )


def limb_bits(bits: int, count: int) -> int:
    """Returns how wide a limb is if residues of so many bits are cut into ``count`` of them."""
    return -(-(bits + 1) // count)


def split(residues: Integers, prime: int, count: int) -> Floats:
    """Cuts residues into signed limbs.

    Args:
        residues: int64 of shape ``(...)`` in [0, prime).
        prime: The modulus.
        count: How many limbs.

    Returns:
        float64 integers of shape ``(count, ...)``, lowest first, each at most ``2**(limb - 1)`` in magnitude, whose
        weighted sum is the residue modulo the prime.
    """
    width = limb_bits(prime.bit_length(), count)
    centred = residues.astype(np.float64)
    centred -= prime * (centred > prime // 2)
    limbs = np.empty((count, *residues.shape), dtype=np.float64)
    for index in range(count - 1):
        # Exact: a division by a power of two, a rounding and a difference of integers below 2**53.
        higher = np.rint(centred * 2.0**-width)
        np.subtract(centred, higher * 2.0**width, out=limbs[index])
        centred = higher
    limbs[count - 1] = centred
    return limbs


def join(limbs: Integers, prime: int) -> Integers:
    """Puts products of limbs together again.

    Args:
        limbs: int64 of shape ``(count, ...)``, lowest first, each below 2**52 in magnitude.
        prime: The modulus, within 2**25 below a power of two.

    Returns:
        int64 of shape ``(...)`` that is congruent to the product, and below 2**55 in magnitude, but not reduced.
    """
    count, bits = len(limbs), prime.bit_length()
    width = limb_bits(bits, count)
    gap, low = (1 << bits) - prime, bits - width
    total: Integers = limbs[count - 1]
    for index in range(count - 2, -1, -1):
        # 2**bits is congruent to the gap, so what a shift pushes out comes back multiplied by a small number.
        pushed = total >> np.int64(low)
        pushed *= np.int64(gap)
        pushed += limbs[index]
        kept = total & np.int64((1 << low) - 1)
        kept <<= np.int64(width)
        kept += pushed
        total = kept
    return total

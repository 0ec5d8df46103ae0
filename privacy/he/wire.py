"""What travels: residues in whole bytes, seeds, and nothing that needs a parser.

A query is the head's mark and then, for each ciphertext, the seed of its second polynomial (64 bytes) and the residues
of its first one, little-endian, in as many whole bytes as the widest prime takes. An answer is the mark and then, for
each sample, the useful coefficients of the first polynomials and all of the second ones, modulo a power of two.
"""

from __future__ import annotations

import numpy as np

from privacy.errors import HeadError
from privacy.he.parameters import Parameters
from privacy.he.ring import Integers
from privacy.he.stream import SEED_BYTES, Sample, expand


def _planes(bits: int) -> list[tuple[int, str]]:
    """Returns how values of so many bits are cut: the shift and the type of each plane, lowest first."""
    found, shift = [], 0
    for width in (32, 16, 8):
        if bits - shift >= width:
            found.append((shift, f"<u{width // 8}"))
            shift += width
    return found


def pack(values: Integers, bits: int) -> bytes:
    """Writes int64 of any shape, each below ``2**bits`` and not negative, in ``bits / 8`` bytes each.

    Plane by plane, not value by value: the low 32 bits of all, then 16 and 8 more where there are such; a cast writes a
    plane at the speed of memory. ``bits`` is 32, 40, 48 or 56.
    """
    return b"".join((values >> np.int64(shift)).astype(kind).tobytes() for shift, kind in _planes(bits))


def unpack(data: memoryview, bits: int) -> Integers:
    """Reads what `pack` wrote, int64 of shape ``(count,)``."""
    count, start = 8 * len(data) // bits, 0
    found = np.zeros(count, dtype="<i8")
    for shift, kind in _planes(bits):
        plane = np.frombuffer(data, dtype=kind, count=count, offset=start)
        start += plane.nbytes
        # A plane's place inside each value, seen as an array with strides.
        found.view(kind)[shift // (8 * plane.itemsize) :: 8 // plane.itemsize] = plane
    return found


def write_sample(sample: Sample, parameters: Parameters) -> bytes:
    """Writes an encryption whose first polynomial is reduced modulo its primes."""
    return sample.seed + pack(sample.first, 8 * parameters.residue_bytes)


def read_samples(body: memoryview, parameters: Parameters) -> Integers:
    """Reads ciphertexts, and makes each one's second polynomial from its seed.

    Args:
        body: Whole ciphertexts as `write_sample` writes them.
        parameters: Ring and primes.

    Returns:
        int64 of shape ``(count, 2, primes, ring)``, every residue in [0, prime).

    Raises:
        HeadError: A residue is not below its prime.
    """
    primes, n, bits = len(parameters.primes), parameters.ring, 8 * parameters.residue_bytes
    size = SEED_BYTES + primes * n * bits // 8
    found = np.empty((len(body) // size, 2, primes, n), dtype=np.int64)
    for index, ciphertext in enumerate(found):
        sample = body[index * size : (index + 1) * size]
        ciphertext[0] = unpack(sample[SEED_BYTES:], bits).reshape(primes, n)
        expand(bytes(sample[:SEED_BYTES]), parameters, ciphertext[1])
    for row, prime in enumerate(parameters.primes):
        if len(found) and found[:, 0, row].max() >= prime:
            raise HeadError("expected residues below their prime, got a larger one; encrypt the record anew")
    return found


def switch(values: Integers, parameters: Parameters, bits: int) -> Integers:
    """Rounds residues modulo q to residues modulo ``2**bits``: the value divided by q, times the new modulus.

    Args:
        values: int64 of shape ``(primes, ...)``, congruent to the residues and below 2**55 in magnitude.
        parameters: The primes of q.
        bits: log2 of the new modulus, at most 48.

    Returns:
        int64 of shape ``(...)`` in [0, 2**bits), within 1/2 + 2**(bits - 51) of the exact quotient.
    """
    primes = parameters.primes
    if len(primes) == 1:
        # Reduced first: then a residue is below 2**53, so exact in float64, and two roundings of a number below the new
        # modulus are all there are. A product several times as large as q would lose several times as much.
        scaled = (values[0] % np.int64(primes[0])).astype(np.float64)
        scaled *= 2.0**bits / primes[0]
    else:
        # The Chinese remainder, as a sum of fractions: value / q = sum of (value (q/p)**-1 mod p) / p, modulo 1.
        fractions = np.zeros(values.shape[1:])
        for residues, prime in zip(values, primes, strict=True):
            inverse = pow(parameters.modulus // prime, -1, prime)
            fractions += times(residues % prime, inverse, prime) / prime
        scaled = fractions * 2.0**bits
    found: Integers = np.rint(scaled, out=scaled).astype(np.int64)
    found &= np.int64((1 << bits) - 1)
    return found


def times(values: Integers, factor: int, prime: int) -> Integers:
    """Multiplies reduced residues of up to 53 bits by a constant, int64 of the same shape, reduced."""
    total = np.zeros_like(values, dtype=np.uint64)
    residues, modulus = values.astype(np.uint64), np.uint64(prime)
    # Ten bits of the factor at a time: 53 + 10 bits, twice, is what 64 hold.
    for step in range(50, -1, -10):
        digit = np.uint64(factor >> step & 1023)
        total = ((total << np.uint64(10)) % modulus + residues * digit % modulus) % modulus
    return total.astype(np.int64)

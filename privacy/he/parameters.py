"""The rings that heads are evaluated in, and the table that says which of them are safe.

Security rests on ring learning with errors: for a ring dimension N, a ternary secret and errors of standard deviation
3.2, a modulus of more than so many bits falls below 128 bits of security. SEAL checks such a table too, but an older
one, one to thirteen bits wider. Ours is table 5.2 of Bossuat et al. (2024), "Security Guidelines for Implementing
Homomorphic Encryption", IACR Communications in Cryptology, ePrint 2024/463. It is checked whenever a set is made or
read.

The modulus that counts is the largest under which anything is published. Nothing but ciphertexts is: there are no
evaluation keys, no Galois keys and no public key.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any, Final, Self, final

from privacy.errors import PlanError
from privacy.plan import canonical

# Ring dimension -> most bits of the modulus at 128 bits of security, against classical and quantum computers.
MOST_BITS: Final[Mapping[int, int]] = {1024: 26, 2048: 53, 4096: 106, 8192: 214, 16384: 430, 32768: 868}
MOST_BITS_QUANTUM: Final[Mapping[int, int]] = {1024: 25, 2048: 50, 4096: 101, 8192: 203, 16384: 409, 32768: 825}
SECURITY_BITS: Final = 128

# Our arithmetic takes residues as float64 integers, so no prime may exceed 2**53.
_WIDEST_PRIME: Final = 53
# The seven bases decide primality below 3.3e14, these twelve below 3.3e24 (Sorenson & Webster 2015).
_WITNESSES: Final = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def _is_prime(number: int) -> bool:
    """Decides primality below 2**64 (Miller-Rabin with bases that make it certain there)."""
    if number < 41:
        return number in (*_WITNESSES,)
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in _WITNESSES:
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


@functools.cache
def largest_primes(ring: int, bits: int, count: int) -> tuple[int, ...]:
    """Finds the ``count`` largest primes below ``2**bits`` that are 1 modulo ``2 ring``, largest first.

    The last condition gives number-theoretic transforms of that length, which SEAL needs.

    Raises:
        PlanError: There are not so many.
    """
    found: list[int] = []
    candidate = (1 << bits) - 2 * ring + 1
    while len(found) < count and candidate > 1 << (bits - 1):
        if _is_prime(candidate):
            found.append(candidate)
        candidate -= 2 * ring
    if len(found) < count:
        raise PlanError(f"expected {count} primes of {bits} bits for a ring of {ring}, got {len(found)}; take fewer")
    return tuple(found)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """A ring and its moduli; public, checked when made and when read.

    Attributes:
        ring: Dimension N of the ring Z[X] / (X**N + 1), a power of two from 1,024 to 32,768.
        primes: The coefficient modulus q as distinct primes, each 1 modulo 2 N and below 2**53.
        plain_bits: log2 of the plaintext modulus t; integers in [-t/2, t/2) come out exact.

    Raises:
        PlanError: The modulus is too wide for 128 bits of security, or no ring has these numbers.

    References:
        Bossuat et al. (2024), ePrint 2024/463, table 5.2, ternary secrets.
    """

    ring: int
    primes: tuple[int, ...]
    plain_bits: int

    def __post_init__(self) -> None:
        """Checks the set against the table; there is no way around it."""
        if type(self.ring) is not int or self.ring not in MOST_BITS:
            raise PlanError(
                f"expected a ring of {', '.join(map(str, MOST_BITS))}, got {self.ring}; choose one of these"
            )
        if type(self.primes) is not tuple or not self.primes or not all(type(prime) is int for prime in self.primes):
            raise PlanError(f"expected a tuple of primes, got {self.primes!r}; make parameters with `plan_head`")
        # Before the products and the primality tests: a file must not make us work on numbers of a megabyte.
        if any(prime.bit_length() > _WIDEST_PRIME or prime < 3 for prime in self.primes) or len(self.primes) > 17:
            raise PlanError(f"expected at most 17 primes below 2**{_WIDEST_PRIME}, got others; choose smaller ones")
        bits, most = self.modulus.bit_length(), MOST_BITS[self.ring]
        if bits > most:
            raise PlanError(
                f"expected a modulus of at most {most} bits in a ring of {self.ring} ({SECURITY_BITS}-bit security), "
                f"got {bits}; take a larger ring or a smaller modulus"
            )
        if len(set(self.primes)) != len(self.primes):
            raise PlanError("expected distinct primes, got one twice; choose others")
        for prime in self.primes:
            if prime % (2 * self.ring) != 1 or not _is_prime(prime):
                raise PlanError(f"expected primes that are 1 modulo {2 * self.ring}, got {prime}; choose others")
            # What `ring.join` multiplies by; the widest primes of each ring are much closer.
            if (1 << prime.bit_length()) - prime >= 1 << 25:
                raise PlanError(f"expected primes within 2**25 below a power of two, got {prime}; choose larger ones")
        if type(self.plain_bits) is not int or not 2 <= self.plain_bits <= 50:
            raise PlanError(f"expected 2 to 50 bits of plaintext, got {self.plain_bits}; ask for less precision")
        if self.plain_bits + 1 >= bits:
            raise PlanError(f"expected plaintexts narrower than the modulus of {bits} bits, got {self.plain_bits}")

    @classmethod
    def widest(cls, ring: int, count: int, plain_bits: int, *, quantum: bool = False) -> Self:
        """Returns the set with the widest ``count`` primes that the table and our arithmetic allow.

        Args:
            ring: Dimension.
            count: How many primes.
            plain_bits: log2 of the plaintext modulus.
            quantum: Whether to keep 128 bits of security against quantum computers too.
        """
        if ring not in MOST_BITS:
            raise PlanError(f"expected a ring of {', '.join(map(str, MOST_BITS))}, got {ring}; choose one of these")
        bits = min(_WIDEST_PRIME, (MOST_BITS_QUANTUM if quantum else MOST_BITS)[ring] // count)
        return cls(ring=ring, primes=largest_primes(ring, bits, count), plain_bits=plain_bits)

    @property
    def modulus(self) -> int:
        """The coefficient modulus q."""
        return math.prod(self.primes)

    @property
    def plain_modulus(self) -> int:
        """The plaintext modulus t."""
        return 1 << self.plain_bits

    @property
    def quantum_secure(self) -> bool:
        """Whether it has 128 bits of security against a quantum computer too, by the same authors' estimates."""
        return self.modulus.bit_length() <= MOST_BITS_QUANTUM[self.ring]

    @property
    def residue_bytes(self) -> int:
        """How many bytes one residue takes on the wire."""
        return (max(self.primes).bit_length() + 7) // 8

    def fields(self) -> dict[str, Any]:
        """Returns what the set is, as plain values."""
        return {"ring": self.ring, "primes": list(self.primes), "plain-bits": self.plain_bits}

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Reads a set, and checks it.

        Raises:
            PlanError: It is no set of parameters, or not a safe one.
        """
        if type(fields) is not dict or fields.keys() != {"ring", "primes", "plain-bits"}:
            raise PlanError(
                "expected ring, primes and plain-bits, got other fields; take the parameters from the server"
            )
        if type(fields["primes"]) is not list:
            raise PlanError("expected a list of primes, got something else; take the parameters from the server")
        return cls(ring=fields["ring"], primes=tuple(fields["primes"]), plain_bits=fields["plain-bits"])

    @property
    def digest(self) -> str:
        """SHA-256 of the set's canonical form, 64 hexadecimal digits."""
        return hashlib.sha256(b"tacit/he/parameters/1\n" + canonical(self.fields())).hexdigest()

"""The querier's secret: one key for one session of so many queries, and nothing that would serve as an oracle.

SEAL makes the key and encrypts zero under it, symmetric and seed-compressed; a message is then added to the first
polynomial, which is what encryption is in both schemes: rounded q m / t in exact mode, m itself in float mode. An
answer has a smaller modulus than any of SEAL's, so decryption is ours: the first polynomial plus the second one times
the key, at the coefficients that are logits, exact in float64, rounded.

What must not happen (guarantee G25). Whoever can see how a client reacts to crafted answers reads its key off bit by
bit, and whoever sees approximate decryptions solves for it (Li & Micciancio 2021). So: decrypted values never go back;
any answer of the right size and head decrypts to some numbers, without an error that depends on the key; nothing is
asked again; and a key ends after its queries or its time. Exact mode leaves nothing to solve for, because an honest
answer's noise is rounded away.

References:
    Li & Micciancio (2021), "On the security of homomorphic encryption on approximate numbers", ePrint 2020/1533.
"""

from __future__ import annotations

import functools
import json
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, final

import numpy as np
from numpy.typing import NDArray

from privacy.errors import HeadError
from privacy.he import stream
from privacy.he.description import HeadDescription, checked, wrapped
from privacy.he.plain import emptied, filled, plaintext
from privacy.he.planner import HeadPlan, Packing, Scheme, Wire
from privacy.he.ring import Floats, Integers, ring
from privacy.he.wire import unpack, write_sample

if TYPE_CHECKING:
    import tenseal.sealapi as seal

_SAVED: Final = b"tacit/he/key/1\n"
_LENGTHS: Final = struct.Struct("<II")
MOST_QUERIES: Final = 1_000_000
# Answers are cut in limbs of so many bits, whose products with a ternary key stay far below 2**53.
_LIMB: Final = 24
# Rows of the key for so many positions are kept as a matrix; beyond that a transform is faster.
_MOST_ROWS: Final = 64


@final
class QueryKey:
    """A secret key for one head's description. Made by `fresh`, or by `restore` from what `save` gave.

    Guarantees:
        Secret: it does not print, pickle or copy; `save` gives its bytes to a vault and to nobody else.
        Bounded: at most the stated number of queries, and none after the session's end.
        No oracle: `decrypt` raises only for what anybody can see in an answer, its size and its mark.
    """

    def __init__(self, public: HeadDescription, secret: seal.SecretKey, remaining: int, expires: float) -> None:
        """Use `fresh` or `restore`."""
        import tenseal.sealapi as seal

        self.public: Final = public
        self.expires: Final = expires
        self.__remaining = remaining
        self.__lock = threading.Lock()
        self.__secret = secret
        of = stream.context(public.plan.parameters)
        self.__encryptor = seal.Encryptor(of, secret)
        if public.plan.wire is Wire.SEAL:
            self.__decryptor: Any = seal.Decryptor(of, secret)
        else:
            self.__ternary = stream.ternary(secret, public.plan.parameters)
            self.__matrix = _rows(public.plan, self.__ternary)
            self.__check()

    @classmethod
    def fresh(cls, public: HeadDescription, *, queries: int = 1000, session_s: float = 3600.0) -> Self:
        """Makes a new key.

        Args:
            public: The head's description.
            queries: How many queries it may encrypt, from 1 to a million.
            session_s: For how many seconds.

        Raises:
            HeadError: The numbers are no numbers of queries and seconds, or the installed SEAL is not the tested one.
        """
        import tenseal.sealapi as seal

        if type(queries) is not int or not 1 <= queries <= MOST_QUERIES or not 0 < session_s < 1e9:
            raise HeadError(f"expected 1 to {MOST_QUERIES:,} queries in a session, got {queries} in {session_s} s")
        if public.plan.wire is Wire.PACKED and not stream.sound():
            raise HeadError("expected the tested version of TenSEAL for this plan, got another; ask for SEAL's streams")
        secret = seal.KeyGenerator(stream.context(public.plan.parameters)).secret_key()
        return cls(public, secret, queries, time.time() + session_s)

    @property
    def remaining(self) -> int:
        """How many queries are left."""
        return self.__remaining

    def encrypt(self, features: object) -> bytes:
        """Encrypts one query; the features' shape and range are checked before anything is spent.

        Args:
            features: Numbers of shape ``(d,)`` if the plan's batch is 1, else ``(n, d)`` with n up to the batch.

        Returns:
            Exactly ``public.plan.query_bytes`` bytes.

        Raises:
            DataError: A feature is not finite or outside the declared range, or the shape differs.
            HeadError: The session is over.
        """
        integers = self.public.quantise(features)
        with self.__lock:
            if self.__remaining < 1:
                raise HeadError("expected a key with queries left, got a spent one; make a fresh key")
            if time.time() >= self.expires:
                raise HeadError("expected a key whose session runs, got an expired one; make a fresh key")
            self.__remaining -= 1
        plan = self.public.plan
        padded = np.zeros((plan.batch, plan.inputs * plan.block), dtype=np.int64)
        padded[: len(integers), : plan.features] = integers
        messages = padded.T if plan.packing is Packing.BULK else padded.reshape(-1, plan.block)
        if plan.wire is Wire.SEAL:
            parts = [self.__plain(message) for message in messages]
        else:
            parts = [self.__encrypted(message) for message in messages]
            for sample in range(plan.rounds if plan.hide_weights else 0):
                # After each sample's own, one encryption of zero for the server to hide its weights with.
                parts.insert((sample + 1) * (plan.inputs + 1) - 1, self.__encrypted(np.zeros(0, dtype=np.int64)))
        return b"".join((self.public.mark, *parts))

    def decrypt(self, answer: bytes | bytearray | memoryview) -> Floats:
        """Decrypts an answer to logits, float64 of shape ``(c,)`` if the plan's batch is 1, else ``(batch, c)``.

        An answer that is not to this key's own query gives wrong numbers, not an error: an error would be an oracle.

        Raises:
            HeadError: The answer has another size, or is for another head or version.
        """
        logits = self.public.logits(self.__scaled(self.integers(answer)))
        return logits[0] if self.public.plan.batch == 1 else logits

    def integers(self, answer: bytes | bytearray | memoryview) -> Integers:
        """Decrypts an answer to integer logits (EXACT) or phases in units of q' (FLOAT), int64 ``(batch, c)``.

        Raises:
            HeadError: The answer has another size, or is for another head or version.
        """
        plan = self.public.plan
        body = checked(answer, plan.answer_bytes, self.public, "an answer")
        if plan.wire is Wire.SEAL:
            return self.__plain_integers(body)
        n = plan.parameters.ring
        if plan.packing is Packing.BULK:
            first, second = unpack(body, plan.answer_bits).reshape(2, plan.classes, n)
            phases = (first + self.__times(second)).T[: plan.batch]
        else:
            size, count = len(body) // plan.rounds, plan.classes + plan.outputs * n
            parts = [unpack(body[start : start + size], plan.answer_bits) for start in range(0, len(body), size)]
            sample = np.stack(parts).reshape(plan.rounds, count)
            products = self.__at_rows(sample[:, plan.classes :].reshape(-1, n))
            products = products.reshape(plan.rounds, -1)[:, : plan.classes]
            phases = sample[:, : plan.classes] + products
        return wrapped(plan.scheme, phases, plan.answer_bits, plan.parameters.plain_bits)

    def save(self) -> bytes:
        """Returns the secret, what is left of it and its description, for a vault only.

        Save again after each query, before the query is sent: a key that is restored from an older copy would have
        more queries than it may.
        """
        head = json.dumps({"remaining": self.__remaining, "expires": self.expires}).encode()
        description = self.public.to_bytes()
        return b"".join(
            (_SAVED, _LENGTHS.pack(len(head), len(description)), head, description, stream.dumps(self.__secret))
        )

    @classmethod
    def restore(cls, data: bytes) -> Self:
        """Reads what `save` gave. Only for bytes that a vault opened: they are a secret, not a message.

        Raises:
            HeadError: It is no saved key.
            PlanError: Its description is not a safe one.
        """
        import tenseal.sealapi as seal

        refusal = HeadError("expected a saved key, got other bytes; make a fresh key")
        start = len(_SAVED) + _LENGTHS.size
        if data[: len(_SAVED)] != _SAVED or len(data) < start:
            raise refusal
        head, description = _LENGTHS.unpack_from(data, len(_SAVED))
        middle = start + head
        try:
            state = json.loads(data[start:middle])
            remaining, expires = state["remaining"], float(state["expires"])
        except (ValueError, KeyError, TypeError):
            raise refusal from None
        if type(remaining) is not int or not 0 <= remaining <= MOST_QUERIES:
            raise refusal
        public = HeadDescription.from_bytes(data[middle : middle + description])
        of = stream.context(public.plan.parameters)
        return cls(public, stream.loads(seal.SecretKey(), of, data[middle + description :]), remaining, expires)

    def __encrypted(self, message: Integers) -> bytes:
        """Encrypts up to N integers as the first coefficients of a polynomial, in our layout."""
        parameters = self.public.plan.parameters
        sample = self.__zero()
        first, scaled = sample.first.copy(), iter(_scaled(self.public.plan, message))
        for row, prime in zip(first, parameters.primes, strict=True):
            row[: len(message)] += next(scaled)
            row[: len(message)] %= prime
        return write_sample(stream.Sample(first, sample.seed), parameters)

    def __zero(self) -> stream.Sample:
        """Lets SEAL encrypt zero, at the level of all primes."""
        parameters = self.public.plan.parameters
        identity = stream.context(parameters).key_parms_id()
        return stream.read_sample(stream.dumps(self.__encryptor.encrypt_zero_symmetric(identity)), parameters)

    def __check(self) -> None:
        """Decrypts an encryption of zero, so that a library which differs is found before a query is made."""
        parameters = self.public.plan.parameters
        sample = self.__zero()
        second = stream.expand(sample.seed, parameters)
        for row, prime in enumerate(parameters.primes):
            product = _product(self.__ternary, second[row])
            noise = (sample.first[row] + product) % prime
            if np.minimum(noise, prime - noise).max() > stream.LARGEST_ERROR:
                raise HeadError("expected SEAL's encryption of zero, got another; use the tested version of TenSEAL")

    def __at_rows(self, seconds: Integers) -> Integers:
        """Multiplies answers' second polynomials, ``(outputs, n)``, by the key: at the logits, ``(outputs, rows)``."""
        plan = self.public.plan
        if self.__matrix is None:
            ends = np.arange(1, plan.rows + 1) * plan.block - 1
            return self.__times(seconds)[:, ends]
        low = (seconds & ((1 << _LIMB) - 1)).astype(np.float64)
        high = (seconds >> _LIMB).astype(np.float64)
        products = (np.concatenate((low, high)) @ self.__matrix).astype(np.int64)
        return products[: len(seconds)] + (products[len(seconds) :] << _LIMB)

    def __times(self, seconds: Integers) -> Integers:
        """Multiplies polynomials, int64 of shape ``(..., n)`` below 2**53, by the key; not reduced."""
        return _product(self.__ternary, seconds)

    def __scaled(self, integers: Integers) -> NDArray[Any]:
        plan = self.public.plan
        if plan.scheme is Scheme.EXACT:
            return integers
        return integers * (plan.parameters.modulus / 2.0**plan.answer_bits)

    def __plain(self, message: Integers) -> bytes:
        """Encrypts by SEAL alone, in SEAL's own stream."""
        plan = self.public.plan
        made = plaintext(message.tolist(), plan.parameters.plain_modulus)
        return filled(stream.dumps(self.__encryptor.encrypt_symmetric(made)), plan.sample_bytes)

    def __plain_integers(self, body: memoryview) -> Integers:
        """Decrypts SEAL's own streams by SEAL alone."""
        import tenseal.sealapi as seal

        plan, of = self.public.plan, stream.context(self.public.plan.parameters)
        slot = len(body) // (plan.rounds * plan.outputs)
        most = 1024 + 16 * plan.parameters.ring
        found = np.zeros((plan.rounds * plan.outputs, plan.rows), dtype=np.int64)
        for index in range(len(found)):
            ciphertext = stream.loads(
                seal.Ciphertext(), of, stream.bounded(emptied(body[index * slot : (index + 1) * slot]), most)
            )
            plain = seal.Plaintext()
            self.__decryptor.decrypt(ciphertext, plain)
            for row in range(plan.rows):
                place = (row + 1) * plan.block - 1
                found[index, row] = plain[place] if place < plain.coeff_count() else 0
        values = found.reshape(plan.rounds, -1)[:, : plan.classes]
        half = plan.parameters.plain_modulus // 2
        return np.where(values >= half, values - 2 * half, values)

    def __repr__(self) -> str:
        return f"QueryKey(<secret>, remaining={self.__remaining})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a query key is secret: it is neither copied nor pickled; save it into a vault")


def _scaled(plan: HeadPlan, message: Integers) -> Integers:
    """Scales a message: round(q m / t) modulo each prime (EXACT) or m itself (FLOAT); ``(primes, len(message))``."""
    primes = plan.parameters.primes
    if plan.scheme is Scheme.FLOAT:
        return np.broadcast_to(message, (len(primes), len(message)))
    q, bits = plan.parameters.modulus, plan.parameters.plain_bits
    if len(primes) == 1 and bits + plan.feature_bits <= 60:
        # q m / t in two parts, the whole quotient and the rest, so that 64 bits are enough.
        whole_part, rest = q >> bits, q & ((1 << bits) - 1)
        return (message * whole_part + ((message * rest + (1 << (bits - 1))) >> bits))[np.newaxis]
    exact = [(q * value + (1 << (bits - 1))) >> bits for value in message.tolist()]
    return np.array([[value % prime for value in exact] for prime in primes], dtype=np.int64).reshape(len(primes), -1)


@functools.lru_cache(maxsize=8)
def _ends(n: int, block: int, rows: int) -> Integers:
    """Returns which coefficient of the key meets which one of an answer, int64 ``(n, rows)``; negative past the end."""
    ends = np.arange(1, rows + 1) * block - 1
    return ends - np.arange(n)[:, np.newaxis]


def _rows(plan: HeadPlan, key: NDArray[np.int8]) -> Floats | None:
    """Returns the matrix that takes a polynomial to its product with the key at the logits, float64 ``(n, rows)``."""
    if plan.packing is Packing.BULK or plan.rows > _MOST_ROWS:
        return None
    shifts = _ends(plan.parameters.ring, plan.block, plan.rows)
    # X**n is -1: what wraps around changes its sign.
    return np.where(shifts >= 0, key[shifts], -key[shifts]).astype(np.float64)


def _product(key: NDArray[np.int8], polynomials: Integers) -> Integers:
    """Multiplies polynomials, int64 of shape ``(..., n)`` in [0, 2**53), by a ternary key; int64, not reduced.

    The limbs have 24 bits and the key at most sqrt(n) of norm, so the transform's error stays below 2**-8.
    """
    of = ring(len(key))
    spectrum = of.forward(key.astype(np.float64))
    mask = (1 << _LIMB) - 1
    limbs = np.stack([polynomials >> shift & mask for shift in (0, _LIMB, 2 * _LIMB)]).astype(np.float64)
    products = of.backward(of.forward(limbs) * spectrum)
    found: Integers = products[0] + (products[1] << _LIMB) + (products[2] << (2 * _LIMB))
    return found

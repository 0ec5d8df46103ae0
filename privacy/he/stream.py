"""Between SEAL's objects and arrays: its streams, its seeds, and the test that both are what we take them for.

SEAL makes keys and encrypts; nothing of that is ours. It hands its objects out only as streams, so what the wire needs
is read from them: of a fresh symmetric encryption, the first polynomial and the 64-byte seed of the second one. The
evaluator makes the second polynomial from the seed again, with the same extendable-output hash from the same library.

Layout (SEAL 4.3, header of 16 bytes `magic, header size, version, compression, reserved, size`, little-endian):

    header | zstd( parms_id 32, is_ntt 1, polynomials 8, ring 8, primes 8, scale 8, correction 8,
                   header, count 8, residues 8 each,
                   header, generator 1, seed 64 ) )

A network's bytes are never read this way: a query has a layout of its own and one exact size (see `wire`), and there is
nothing to inflate in it. `sound` looks, once in a process, whether the installed library still writes this layout and
expands seeds so; where it does not, plans fall back to SEAL's own loader and evaluator (see `plain`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privacy.errors import HeadError
from privacy.he.parameters import Parameters
from privacy.he.ring import Integers

if TYPE_CHECKING:
    import tenseal.sealapi as seal

SEED_BYTES: Final = 64

_HEADER: Final = struct.Struct("<HBBBBHQ")
_MEMBERS: Final = struct.Struct("<32sBQQQdQ")
_COUNT: Final = struct.Struct("<Q")
_MAGIC: Final = 0xA15E
_VERSION: Final = (4, 3)
_PLAIN, _ZSTD = 0, 2
_BLAKE2XB: Final = 1
# SEAL's generator works in buffers of this length, numbered from zero.
_BUFFER_BYTES: Final = 4096
_WORD: Final = 2**64 - 1
# |e| of SEAL's centred binomial distribution.
LARGEST_ERROR: Final = 21


class Sample(NamedTuple):
    """A symmetric encryption: the first polynomial, int64 of shape ``(primes, ring)``, and the second one's seed."""

    first: Integers
    seed: bytes


@functools.cache
def _library() -> Any:
    """Opens the library that TenSEAL installs; zstd and BLAKE2Xb are in it under their own, plain C names."""
    found = importlib.util.find_spec("_tenseal_cpp")
    if found is None or found.origin is None:
        raise HeadError("expected TenSEAL to be installed, got no _tenseal_cpp; install tenseal")
    library = ctypes.CDLL(found.origin)
    buffer, size = ctypes.c_void_p, ctypes.c_size_t
    library.ZSTD_decompress.restype, library.ZSTD_decompress.argtypes = size, [buffer, size, ctypes.c_char_p, size]
    library.ZSTD_isError.restype, library.ZSTD_isError.argtypes = ctypes.c_uint, [size]
    library.blake2xb.restype = ctypes.c_int
    library.blake2xb.argtypes = [buffer, size, ctypes.c_char_p, size, ctypes.c_char_p, size]
    return library


@functools.lru_cache(maxsize=32)
def context(parameters: Parameters) -> seal.SEALContext:
    """Returns SEAL's context of a set of parameters, which was checked against our table and now is against SEAL's too.

    Raises:
        HeadError: SEAL refuses the set.
    """
    import tenseal.sealapi as seal

    wanted = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    wanted.set_poly_modulus_degree(parameters.ring)
    wanted.set_coeff_modulus([seal.Modulus(prime) for prime in parameters.primes])
    wanted.set_plain_modulus(parameters.plain_modulus)
    made = seal.SEALContext(wanted, True, seal.SEC_LEVEL_TYPE.TC128)
    if not made.parameters_set():
        raise HeadError(f"expected parameters that SEAL takes, got: {made.parameters_error_message()}; plan again")
    return made


def dumps(thing: Any) -> bytes:
    """Returns the stream of one of SEAL's objects; it never touches a disk."""
    descriptor = os.memfd_create("seal")
    try:
        thing.save(f"/proc/self/fd/{descriptor}")
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)


def loads(thing: Any, of: seal.SEALContext, data: bytes) -> Any:
    """Fills one of SEAL's empty objects from a stream, with SEAL's own loader, which checks it.

    Raises:
        HeadError: The loader refuses it.
    """
    descriptor = os.memfd_create("seal")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        thing.load(of, f"/proc/self/fd/{descriptor}")
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:
        raise HeadError(
            f"expected a stream for these parameters, got one that SEAL refuses ({error}); encrypt anew"
        ) from None
    finally:
        os.close(descriptor)
    return thing


def bounded(stream: bytes, most: int) -> bytes:
    """Refuses a foreign stream that would inflate beyond ``most`` bytes, before SEAL inflates it; returns it.

    SEAL inflates a stream before it looks at what is in it, and a zstd frame of 16 kB can become half a gigabyte.

    Raises:
        HeadError: It has no header of a stream, another compression, or becomes longer.
    """
    refusal = HeadError("expected a stream of SEAL for these parameters, got other bytes; encrypt the record anew")
    if len(stream) < _HEADER.size:
        raise refusal
    magic, header, _, _, compression, _, length = _HEADER.unpack_from(stream)
    if magic != _MAGIC or header != _HEADER.size or length != len(stream) or compression not in (_PLAIN, _ZSTD):
        raise refusal
    body = stream[_HEADER.size :]
    if compression == _ZSTD:
        room, library = np.empty(most, dtype=np.uint8), _library()
        if library.ZSTD_isError(library.ZSTD_decompress(room.ctypes.data, most, body, len(body))):
            raise refusal
    elif len(body) > most:
        raise refusal
    return stream


def _inflate(stream: bytes, size: int) -> bytes:
    """Inflates a stream of our own SEAL into exactly ``size`` bytes; never more memory than that."""
    magic, header, major, minor, compression, _, length = _HEADER.unpack_from(stream)
    if magic != _MAGIC or header != _HEADER.size or (major, minor) != _VERSION or length != len(stream):
        raise HeadError("expected SEAL's stream 4.3, got another layout; use the tested version of TenSEAL")
    body = stream[_HEADER.size :]
    if compression == _PLAIN:
        inflated = body
    elif compression == _ZSTD:
        # One byte more than is wanted, so that what is too long shows.
        room = np.empty(size + 1, dtype=np.uint8)
        library = _library()
        length = library.ZSTD_decompress(room.ctypes.data, size + 1, body, len(body))
        if library.ZSTD_isError(length):
            raise HeadError("expected a zstd frame of a known size, got another; use the tested version of TenSEAL")
        inflated = room[:length].tobytes()
    else:
        raise HeadError("expected SEAL's zstd compression, got another; use the tested version of TenSEAL")
    if len(inflated) != size:
        raise HeadError(f"expected {size} bytes in SEAL's stream, got {len(inflated)}; use the tested version")
    return inflated


def read_sample(stream: bytes, parameters: Parameters) -> Sample:
    """Reads the stream of a seeded symmetric encryption that SEAL in this process wrote.

    Raises:
        HeadError: It has another layout.
    """
    residues = len(parameters.primes) * parameters.ring
    array, info = _HEADER.size + _COUNT.size + 8 * residues, _HEADER.size + 1 + SEED_BYTES
    body = _inflate(stream, _MEMBERS.size + array + info)
    _, ntt, polynomials, ring, primes, _, _ = _MEMBERS.unpack_from(body)
    inner = _HEADER.unpack_from(body, _MEMBERS.size)
    (count,) = _COUNT.unpack_from(body, _MEMBERS.size + _HEADER.size)
    tail = _HEADER.unpack_from(body, _MEMBERS.size + array)
    expected = (0, 2, parameters.ring, len(parameters.primes), residues, array, _PLAIN, info, _PLAIN, _BLAKE2XB)
    got = (ntt, polynomials, ring, primes, count, inner[6], inner[4], tail[6], tail[4], body[-SEED_BYTES - 1])
    if got != expected or inner[0] != _MAGIC or tail[0] != _MAGIC:
        raise HeadError("expected a seeded ciphertext in SEAL's layout 4.3, got another; use the tested version")
    first = np.frombuffer(body, dtype="<i8", count=residues, offset=_MEMBERS.size + _HEADER.size + _COUNT.size)
    return Sample(first.reshape(len(parameters.primes), parameters.ring), body[-SEED_BYTES:])


def write_ciphertext(first: Integers, second: Integers, identity: list[int]) -> bytes:
    """Writes the stream of a ciphertext in coefficient form: int64 of shape ``(primes, ring)`` each.

    Args:
        first: The polynomial that the message is in.
        second: The one that the secret key multiplies.
        identity: The four words of the parameters' identity.
    """
    primes, ring = first.shape
    residues = np.stack((first, second)).astype("<u8").tobytes()
    members = _MEMBERS.pack(struct.pack("<4Q", *identity), 0, 2, ring, primes, 1.0, 1)
    array = _HEADER.size + _COUNT.size + len(residues)
    inner = _HEADER.pack(_MAGIC, _HEADER.size, *_VERSION, _PLAIN, 0, array) + _COUNT.pack(2 * primes * ring)
    total = _HEADER.size + len(members) + array
    return _HEADER.pack(_MAGIC, _HEADER.size, *_VERSION, _PLAIN, 0, total) + members + inner + residues


def expand(seed: bytes, parameters: Parameters, out: Integers | None = None) -> Integers:
    """Makes the uniform polynomial that a seed stands for, as SEAL does: BLAKE2Xb, with rejection.

    Args:
        seed: 64 bytes; public.
        parameters: Ring and primes.
        out: Where to put it, int64 of shape ``(primes, ring)``; a new array if None.

    Returns:
        int64 of shape ``(primes, ring)``, each row in [0, prime).
    """
    primes, ring = len(parameters.primes), parameters.ring
    words = np.empty(primes * ring, dtype="<u8")
    blake2xb, address, buffers = _library().blake2xb, words.ctypes.data, 8 * primes * ring // _BUFFER_BYTES
    for number in range(buffers):
        blake2xb(address + number * _BUFFER_BYTES, _BUFFER_BYTES, _COUNT.pack(number), 8, seed, SEED_BYTES)
    out = np.empty((primes, ring), dtype=np.int64) if out is None else out
    more = _replacements(seed, buffers)
    for row, prime in enumerate(parameters.primes):
        drawn = words[row * ring : (row + 1) * ring]
        # SEAL's bound, off by its own one.
        bound = np.uint64(_WORD - _WORD % prime - 1)
        if drawn.max() >= bound:
            for index in np.flatnonzero(drawn >= bound):
                drawn[index] = next(word for word in more if word < bound)
        np.remainder(drawn, np.uint64(prime), out=out[row].view(np.uint64))
    return out


def _replacements(seed: bytes, buffer: int) -> Any:
    """Yields the words that follow; one is needed with probability below 2**-30 for each coefficient."""
    while True:
        words: NDArray[np.uint64] = np.empty(_BUFFER_BYTES // 8, dtype="<u8")
        _library().blake2xb(words.ctypes.data, _BUFFER_BYTES, _COUNT.pack(buffer), 8, seed, SEED_BYTES)
        yield from words
        buffer += 1


def ternary(key: seal.SecretKey, parameters: Parameters) -> NDArray[np.int8]:
    """Reads a secret key's coefficients.

    SEAL stores a key only as its transform. Decrypting a ciphertext whose second polynomial is the constant q/t gives
    the key itself modulo t, by SEAL's own decryptor.

    Returns:
        int8 of shape ``(ring,)`` in {-1, 0, 1}; secret.

    Raises:
        HeadError: What came is no ternary key: the layout differs.
    """
    import tenseal.sealapi as seal

    of, ring = context(parameters), parameters.ring
    # Decryption works at the first level, which lacks the last of several primes; the key is the same.
    prime = parameters.primes[0]
    if len(parameters.primes) > 2:
        raise HeadError("expected one or two primes, got more; plan again")
    first, second = np.zeros((1, ring), dtype=np.int64), np.zeros((1, ring), dtype=np.int64)
    second[0, 0] = prime // parameters.plain_modulus
    trick = loads(seal.Ciphertext(), of, write_ciphertext(first, second, of.first_parms_id()))
    plain = seal.Plaintext()
    seal.Decryptor(of, key).decrypt(trick, plain)
    found = np.zeros(ring, dtype=np.int64)
    count = min(ring, plain.coeff_count())
    found[:count] = [plain[index] for index in range(count)]
    found[found == parameters.plain_modulus - 1] = -1
    if np.abs(found).max() > 1 or not found.any():
        raise HeadError("expected a ternary secret key, got other numbers; use the tested version of TenSEAL")
    return found.astype(np.int8)


@functools.cache
def sound() -> bool:
    """Says whether the installed SEAL writes the layout above and expands seeds as `expand` does; tried once."""
    import tenseal.sealapi as seal

    parameters = Parameters.widest(2048, 1, 20)
    try:
        of = context(parameters)
        key = seal.KeyGenerator(of).secret_key()
        stream = dumps(seal.Encryptor(of, key).encrypt_zero_symmetric())
        sample = read_sample(stream, parameters)
        theirs = loads(seal.Ciphertext(), of, stream)
        residues = np.array([theirs[index] for index in range(2 * parameters.ring)], dtype=np.int64)
        ours = np.concatenate((sample.first[0], expand(sample.seed, parameters)[0]))
        ternary(key, parameters)
    except (HeadError, AttributeError, OSError, struct.error, RuntimeError, ValueError, TypeError):
        return False
    return bool((ours == residues).all())

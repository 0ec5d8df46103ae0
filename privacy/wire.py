"""What crosses between a client and the server, as bytes: parameters, and the digests that bind them.

Parameters travel as float32 ``.npy`` arrays, because Flower's arrays are. Their header is a Python literal; instead of
parsing what somebody sent, the header that the expected shape must have is compared byte for byte, and what follows
it is taken as it is.

Where messages are sealed, a whole request or reply travels as one packet: its texts, numbers and arrays by name, as
`pack` writes them and `unpack` reads them, and as `privacy.seal` encrypts them. Only `unpack` parses anything here; it
gets what the other end's identity sealed, and trusts that end no more than the network.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

from privacy.errors import PlanError
from privacy.plan import canonical, require

Buffer: TypeAlias = bytes | bytearray | memoryview
Scalar: TypeAlias = bool | int | float | str | bytes
_Value = TypeVar("_Value")
Float32s = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class Floats(NamedTuple):
    """An array of float32 numbers, little-endian and in C order.

    Attributes:
        shape: Its shape.
        data: Its ``4 * prod(shape)`` bytes.
    """

    shape: tuple[int, ...]
    data: Buffer


@functools.lru_cache(maxsize=4096)
def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def read_float32(data: bytes, shape: tuple[int, ...], name: str) -> Float32s:
    """Reads one float32 array off the wire.

    Args:
        data: What came; not trusted.
        shape: The shape it must have.
        name: What to call it in an error.

    Returns:
        A read-only view of ``data``, float32 of ``shape``, all finite.

    Raises:
        PlanError: It is not exactly such an array.
    """
    header, count = _header(tuple(shape)), math.prod(shape)
    require(
        len(data) == len(header) + 4 * count and data.startswith(header),
        f"expected {name} as a float32 array of shape {tuple(shape)}, got other bytes; is it the same task?",
    )
    value = np.frombuffer(data, dtype="<f4", offset=len(header)).reshape(shape)
    require(bool(np.isfinite(value).all()), f"expected finite numbers in {name}; the model has diverged")
    return value


def write_float32(value: Float32s) -> bytes:
    """Writes one float32 array as `read_float32` wants it, little-endian and in C order."""
    return b"".join((_header(value.shape), np.ascontiguousarray(value, dtype="<f4").data))


def float32_bytes(shape: tuple[int, ...]) -> int:
    """Returns how many bytes `write_float32` makes of an array of this shape."""
    return len(_header(tuple(shape))) + 4 * math.prod(shape)


def floats_of(data: Buffer, shape: tuple[int, ...], name: str) -> Floats:
    """Returns the numbers of a float32 array as `write_float32` writes it, without its header and not copied.

    Raises:
        PlanError: The bytes are not those of such an array. Whether its numbers are finite is not looked at.
    """
    header = _header(tuple(shape))
    require(
        len(data) == float32_bytes(shape) and bytes(data[: len(header)]) == header,
        f"expected {name} as a float32 array of shape {tuple(shape)}, got other bytes; is it the same task?",
    )
    return Floats(tuple(shape), memoryview(data)[len(header) :])


class WireArray(Protocol):
    """An array as Flower carries it; its own class is one, and is not imported here."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


def floats_by_name(record: Mapping[str, WireArray]) -> dict[str, Floats]:
    """Returns the numbers of a record of arrays, not copied: what `pack` takes.

    Raises:
        PlanError: One is no float32 array as `write_float32` writes it.
    """
    for name, array in record.items():
        require(
            (array.dtype, array.stype) == ("float32", "numpy.ndarray"),
            f"expected {name} as a float32 array, got another kind; is it the same task?",
        )
    return {name: floats_of(array.data, tuple(array.shape), name) for name, array in record.items()}


def array_of(floats: Floats) -> bytes:
    """Returns numbers as `write_float32` writes an array of them; the inverse of `floats_of`."""
    return b"".join((_header(floats.shape), floats.data))


def model_digest(arrays: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """Returns the SHA-256 of a model, in hex.

    Args:
        arrays: Name, type, shape and bytes of each array, in order.
    """
    digest = hashlib.sha256()
    for name, kind, shape, data in arrays:
        digest.update(canonical([name, kind, list(shape), len(data)]))
        digest.update(data)
    return digest.hexdigest()


def settings_digest(task: str, plan: str, local: str, seed: int) -> str:
    """Returns the SHA-256 of what a job's requests have in common, in hex; a ledger's commitment names it.

    Args:
        task: Name of the task.
        plan: Digest of the plan.
        local: The learning knobs as canonical JSON.
        seed: Seed of the model's frozen parameters.
    """
    return hashlib.sha256(b"tacit/settings/1\n" + canonical([task, plan, local, seed])).hexdigest()


def request_digest(fields: Mapping[str, str | int | float], model: str) -> str:
    """Returns the SHA-256 of a whole request, in hex: what a charge and its kept release are bound to (G9).

    Args:
        fields: Every field of the request besides the model.
        model: `model_digest` of the model in it.
    """
    exact = {key: value.hex() if isinstance(value, float) else value for key, value in fields.items()}
    return hashlib.sha256(b"tacit/request/1\n" + canonical([exact, model])).hexdigest()


# -- packets ---------------------------------------------------------------------------------------------------------

_PACKET: Final = b"tacit/packet/1\n\0"
_MOST_RECORDS: Final = 16
_MOST_ENTRIES: Final = 65535
_MOST_HEAD_BYTES: Final = 8 * 1024 * 1024
_MOST_DIMENSIONS: Final = 8
# Numbers begin at a multiple of this many bytes.
_ALIGNED: Final = 64


class Packet(NamedTuple):
    """One request or reply.

    Attributes:
        configs: Texts and numbers, by record and key.
        arrays: Arrays, by record and name.
    """

    configs: dict[str, dict[str, Scalar]]
    arrays: dict[str, dict[str, Floats]]


def pack(configs: Mapping[str, Mapping[str, Scalar]], arrays: Mapping[str, Mapping[str, Floats]]) -> list[Buffer]:
    """Writes one request or reply.

    Args:
        configs: Texts and numbers, by record and key: bool, int of 64 bits, finite float, str, bytes.
        arrays: Arrays, by record and name. No record is named twice.

    Returns:
        The packet in parts, in order; the arrays' own memory, not copied.

    Raises:
        PlanError: Something is not of its form, or too much.
    """
    numbers: list[Buffer] = []
    for record in arrays.values():
        for shape, data in record.values():
            view = memoryview(data)
            require(
                view.nbytes == 4 * math.prod(shape),
                "expected an array's bytes to be those of its shape, got others; send float32",
            )
            if view.nbytes:
                numbers.append(view.cast("B"))
    shapes = {name: {key: floats.shape for key, floats in record.items()} for name, record in arrays.items()}
    return [_start(configs, shapes), *numbers]


def packed_bytes(
    configs: Mapping[str, Mapping[str, Scalar]], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> int:
    """Returns how many bytes `pack` makes of such configs and arrays of such shapes.

    With the longest texts that a reply may hold it gives the length to which every reply to a request is padded, a
    refusal too (guarantee G12).

    Raises:
        PlanError: Something is not of its form, or too much.
    """
    numbers = sum(4 * math.prod(shape) for record in shapes.values() for shape in record.values())
    return len(_start(configs, shapes)) + numbers


def _start(configs: Mapping[str, Mapping[str, Scalar]], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> bytes:
    """Returns everything before the numbers."""
    require(not set(configs) & set(shapes), "expected records of different names, got one name twice")
    require(len(configs) + len(shapes) <= _MOST_RECORDS, f"expected at most {_MOST_RECORDS} records, got more")
    head = [struct.pack(">BB", len(configs), len(shapes))]
    for name, config in configs.items():
        head += (_text(name), _count(config))
        for key, value in config.items():
            head += (_text(key), _scalar(value))
    for name, record in shapes.items():
        head += (_text(name), _count(record))
        for key, shape in record.items():
            require(
                len(shape) <= _MOST_DIMENSIONS and all(type(size) is int and 0 <= size < 2**32 for size in shape),
                f"expected a shape of at most {_MOST_DIMENSIONS} sizes from 0, got another",
            )
            head += (_text(key), struct.pack(f">B{len(shape)}I", len(shape), *shape))
    text = b"".join(head)
    require(len(text) <= _MOST_HEAD_BYTES, f"expected at most {_MOST_HEAD_BYTES} bytes beside the arrays, got more")
    start = _PACKET + len(text).to_bytes(4, "big") + text
    return start + bytes(-len(start) % _ALIGNED)


def unpack(data: Buffer, *, max_bytes: int) -> Packet:
    """Reads one request or reply, trusting none of it.

    Every packet has one encoding: what this reads, `pack` writes again byte for byte.

    Args:
        data: What a session opened.
        max_bytes: Longest packet.

    Returns:
        Its records. Arrays are views of ``data``, as they came: whether numbers are finite is for `read_float32`.

    Raises:
        PlanError: It is not exactly a packet, or too long.
    """
    view = memoryview(data)
    require(
        view.nbytes <= max_bytes,
        f"expected a packet of at most {max_bytes} bytes, got more; is it the same program?",
    )
    view = view.cast("B")
    require(
        bytes(view[: len(_PACKET)]) == _PACKET,
        "expected a packet of this version, got other bytes; is it the same program?",
    )
    at = len(_PACKET) + 4
    length = int.from_bytes(view[at - 4 : at], "big")
    start = at + length + -(at + length) % _ALIGNED
    require(length <= _MOST_HEAD_BYTES, _BROKEN)
    require(not any(view[at + length : start]), _BROKEN)
    head = _Head(bytes(view[at : at + length]))
    configs: dict[str, dict[str, Scalar]] = {}
    arrays: dict[str, dict[str, Floats]] = {}
    counts = head.numbers(">BB")
    require(sum(counts) <= _MOST_RECORDS, _BROKEN)
    for _ in range(counts[0]):
        config = _new(configs, head.text(), {})
        for _ in range(*head.numbers(">H")):
            _new(config, head.text(), head.scalar())
    for _ in range(counts[1]):
        name = head.text()
        require(name not in configs, _BROKEN)
        record = _new(arrays, name, {})
        for _ in range(*head.numbers(">H")):
            key, (dimensions,) = head.text(), head.numbers(">B")
            require(dimensions <= _MOST_DIMENSIONS, _BROKEN)
            shape = head.numbers(f">{dimensions}I")
            stop = start + 4 * math.prod(shape)
            _new(record, key, Floats(shape, view[start:stop].toreadonly()))
            start = stop
    # Also what shows that nothing above was cut short: a slice beyond the end is shorter, not an error.
    require(head.done and start == len(view), _BROKEN)
    return Packet(configs, arrays)


_BROKEN: Final = "expected a whole packet, got one that contradicts itself; is it the same program?"


class _Head:
    """Reads the head of a packet from left to right; refuses to read past its end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def done(self) -> bool:
        return self._at == len(self._data)

    def take(self, length: int) -> bytes:
        piece = self._data[self._at : self._at + length]
        require(len(piece) == length, _BROKEN)
        self._at += length
        return piece

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self) -> str:
        (length,) = self.numbers(">B")
        require(length > 0, _BROKEN)
        return self._decoded(self.take(length))

    def scalar(self) -> Scalar:
        match self.take(1):
            case b"b":
                (value,) = self.numbers(">B")
                require(value <= 1, _BROKEN)
                return bool(value)
            case b"i":
                return self.numbers(">q")[0]
            case b"f":
                number: float = self.numbers(">d")[0]
                require(math.isfinite(number), _BROKEN)
                return number
            case b"s":
                return self._decoded(self.take(*self.numbers(">I")))
            case b"x":
                return self.take(*self.numbers(">I"))
        raise PlanError(_BROKEN)

    @staticmethod
    def _decoded(data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise PlanError(_BROKEN) from None


def _new(record: dict[str, _Value], key: str, value: _Value) -> _Value:
    """Adds an entry that must not be there yet."""
    require(key not in record, _BROKEN)
    record[key] = value
    return value


def _text(name: str) -> bytes:
    data = _encoded(name)
    require(0 < len(data) <= 255, "expected a name of 1 to 255 bytes, got a longer or an empty one")
    return bytes((len(data),)) + data


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise PlanError("expected a text that has an encoding, got half of a surrogate pair") from None


def _count(record: Mapping[str, object]) -> bytes:
    require(len(record) <= _MOST_ENTRIES, f"expected at most {_MOST_ENTRIES} entries in a record, got more")
    return struct.pack(">H", len(record))


def _scalar(value: Scalar) -> bytes:
    # Exact types: True is an int in Python, and an enum would come back as something else.
    if type(value) is bool:
        return b"b" + bytes((value,))
    if type(value) is int and -(2**63) <= value < 2**63:
        return b"i" + struct.pack(">q", value)
    if type(value) is float and math.isfinite(value):
        return b"f" + struct.pack(">d", value)
    if type(value) is str or type(value) is bytes:
        data = _encoded(value) if isinstance(value, str) else value
        return (b"s" if type(value) is str else b"x") + struct.pack(">I", len(data)) + data
    raise PlanError("expected a bool, an int of 64 bits, a finite float, a text or bytes, got something else")

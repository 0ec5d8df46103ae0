"""What crosses between a client and the server, as bytes: parameters, and the digests that bind them.

Parameters travel as float32 ``.npy`` arrays, because Flower's arrays are. Their header is a Python literal; instead of
parsing what somebody sent, the header that the expected shape must have is compared byte for byte, and what follows
it is taken as it is. Nothing that comes over the network is ever parsed here.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Iterable, Mapping

import numpy as np

from privacy.plan import canonical, require

Float32s = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


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

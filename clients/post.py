"""What passes between a data holder's courier and its worker: one sealed message each way, over a Unix socket.

The courier is Flower's process; it holds no key and no record. The worker holds both. All that the courier may tell
the worker is which Flower run a message came from and the hash of that run's app bundle; the worker trusts neither and
compares both with what the server's identity signed (guarantees G15, G19, G22).

    frame   = length of head (4 bytes, big endian) || head || length of body (8 bytes, big endian) || body
    head    = canonical JSON {"bundle": 64 hex digits, "run": whole number from 0}; an answer's head is empty
"""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Final, NamedTuple

from privacy.errors import RunError
from privacy.plan import canonical

# A model of a billion float32 parameters; a longer body is refused before a byte of it is read.
MOST_BYTES: Final = 4 * 1024**3
# What is answered where nothing can open a message: no worker, or one that does not know the session (any more).
LOST: Final = b"tacit/lost/1\n"
_MOST_HEAD_BYTES: Final = 512
_BUNDLE: Final = re.compile(r"[0-9a-f]{64}")
# Seconds between two bytes of a frame; the answer itself may take as long as training does.
_PATIENCE_S: Final = 30.0


class Letter(NamedTuple):
    """A sealed message and where it came from, as the courier says.

    Attributes:
        run: Flower's run id, from 0.
        bundle: SHA-256 of the run's app bundle, 64 hex digits.
        body: The sealed bytes.
    """

    run: int
    bundle: str
    body: bytes


def hand_over(socket_path: Path, letter: Letter, *, timeout_s: float | None = None) -> bytes:
    """Hands a letter to the worker and waits for its answer.

    Args:
        socket_path: The worker's socket.
        letter: What to hand over.
        timeout_s: Longest wait for the answer in seconds; None waits as long as training takes.

    Raises:
        RunError: The worker is not there, went away, or answered something else than a frame.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(_PATIENCE_S)
            channel.connect(str(socket_path))
            head = canonical({"run": letter.run, "bundle": letter.bundle})
            write_frame(channel, head, letter.body)
            channel.settimeout(timeout_s)
            return _read_frame(channel)[1]
    except (OSError, ValueError) as error:
        raise RunError(f"expected an answer from the worker at {socket_path}, got: {error}; start the worker") from None


def read_letter(channel: socket.socket) -> Letter:
    """Reads one letter, trusting none of it.

    Raises:
        ValueError: It is not one, too long, or its sender stopped in the middle of it.
        OSError: The channel broke.
    """
    channel.settimeout(_PATIENCE_S)
    head, body = _read_frame(channel)
    fields = json.loads(head)
    if not isinstance(fields, dict) or set(fields) != {"run", "bundle"}:
        raise ValueError("a letter without run and bundle")
    run, bundle = fields["run"], fields["bundle"]
    if type(run) is not int or not 0 <= run < 2**64 or type(bundle) is not str or not _BUNDLE.fullmatch(bundle):
        raise ValueError("a letter from nowhere")
    return Letter(run, bundle, body)


def write_frame(channel: socket.socket, head: bytes, body: bytes | memoryview) -> None:
    """Writes one frame."""
    channel.sendall(b"".join((len(head).to_bytes(4, "big"), head, len(body).to_bytes(8, "big"))))
    channel.sendall(body)


def _read_frame(channel: socket.socket) -> tuple[bytes, bytes]:
    head_bytes = int.from_bytes(_exactly(channel, 4), "big")
    if head_bytes > _MOST_HEAD_BYTES:
        raise ValueError("an overlong head")
    head = _exactly(channel, head_bytes)
    body_bytes = int.from_bytes(_exactly(channel, 8), "big")
    if body_bytes > MOST_BYTES:
        raise ValueError("an overlong body")
    return head, _exactly(channel, body_bytes)


def _exactly(channel: socket.socket, count: int) -> bytes:
    """Returns exactly so many bytes; memory grows with what came, not with what was announced."""
    parts = []
    while count > 0:
        part = channel.recv(min(count, 1 << 20))
        if not part:
            raise ValueError("a frame that ends early")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)

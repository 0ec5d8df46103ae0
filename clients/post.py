"""What passes between a data holder's courier and its worker: one sealed message each way, over a Unix socket.

The courier is Flower's process; it holds no key and no record. The worker holds both. All that the courier may tell
the worker is which Flower run a message came from and the hash of that run's app bundle; the worker trusts neither and
compares both with what the server's identity signed (guarantees G15, G19, G22).

    frame   = length of head (4 bytes, big endian) || head || pieces
    head    = canonical JSON {"pieces": [[name, bytes], ...]}, and in a letter "bundle" (64 hex digits) and "run"
    pieces  = what `privacy.seal` made, each under the name of its step, in the head's order
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from privacy.errors import RunError
from privacy.plan import canonical

Buffer: TypeAlias = bytes | memoryview

# A model of a billion float32 parameters; a longer body is refused before a byte of it is read.
MOST_BYTES: Final = 4 * 1024**3
# The names of sealed pieces, as in `privacy.seal.Step`; and the word for a message that nothing here could open: there
# is no worker, or it does not know the session (any more).
LOST: Final = "lost"
PIECES: Final = frozenset({"hello", "offer", "accept", "message", "wrap", "broadcast", LOST})
_MOST_HEAD_BYTES: Final = 512
_BUNDLE: Final = re.compile(r"[0-9a-f]{64}")
# Seconds between two bytes of a frame; the answer itself may take as long as training does.
_PATIENCE_S: Final = 30.0


class Letter(NamedTuple):
    """Sealed pieces and where they came from, as the courier says.

    Attributes:
        run: Flower's run id, from 0.
        bundle: SHA-256 of the run's app bundle, 64 hex digits.
        pieces: What was sealed, by the name of its step.
    """

    run: int
    bundle: str
    pieces: Mapping[str, Buffer]


def hand_over(socket_path: Path, letter: Letter, *, timeout_s: float | None = None) -> dict[str, bytes]:
    """Hands a letter to the worker and waits for its answer.

    Args:
        socket_path: The worker's socket.
        letter: What to hand over.
        timeout_s: Longest wait for the answer in seconds; None waits as long as training takes.

    Raises:
        RunError: The worker is not there, went away, or answered something else than pieces.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(_PATIENCE_S)
            channel.connect(str(socket_path))
            _write(channel, {"run": letter.run, "bundle": letter.bundle}, letter.pieces)
            channel.settimeout(timeout_s)
            return _read(channel)[1]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"expected an answer from the worker at {socket_path}, got: {error}; start the worker") from None


def read_letter(channel: socket.socket) -> Letter:
    """Reads one letter, trusting none of it.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: It is not one, too long, or its sender stopped in the middle.
        OSError: The channel broke, or was silent for too long.
    """
    channel.settimeout(_PATIENCE_S)
    fields, pieces = _read(channel)
    run, bundle = fields.get("run"), fields.get("bundle")
    if type(run) is not int or not 0 <= run < 2**64 or type(bundle) is not str or not _BUNDLE.fullmatch(bundle):
        raise ValueError("a letter from nowhere")
    return Letter(run, bundle, pieces)


def answer_letter(channel: socket.socket, pieces: Mapping[str, Buffer]) -> None:
    """Answers a letter; raises OSError where the channel broke."""
    _write(channel, {}, pieces)


def _write(channel: socket.socket, fields: Mapping[str, object], pieces: Mapping[str, Buffer]) -> None:
    head = canonical({**fields, "pieces": [[name, memoryview(piece).nbytes] for name, piece in pieces.items()]})
    channel.sendall(len(head).to_bytes(4, "big") + head)
    for piece in pieces.values():
        channel.sendall(piece)


def _read(channel: socket.socket) -> tuple[dict[str, Any], dict[str, bytes]]:
    head_bytes = int.from_bytes(_exactly(channel, 4), "big")
    if head_bytes > _MOST_HEAD_BYTES:
        raise ValueError("an overlong head")
    fields = json.loads(_exactly(channel, head_bytes))
    lengths = [(name, length) for name, length in fields["pieces"]]
    if any(name not in PIECES or type(length) is not int or length < 0 for name, length in lengths):
        raise ValueError("pieces without a name or length")
    if len(dict(lengths)) < len(lengths) or sum(length for _, length in lengths) > MOST_BYTES:
        raise ValueError("pieces twice, or overlong")
    return fields, {name: _exactly(channel, length) for name, length in lengths}


def _exactly(channel: socket.socket, count: int) -> bytes:
    """Returns exactly so many bytes; memory grows with what came, not with what was announced."""
    # Not a list of parts: a sender that dribbles would make many objects of few bytes.
    found = bytearray()
    while len(found) < count:
        part = channel.recv(min(count - len(found), 1 << 20))
        if not part:
            raise ValueError("a frame that ends early")
        found += part
    return bytes(found)

"""What a data holder stores of itself, encrypted: kept releases (guarantee G8) and the log of what went wrong (G12).

One construction serves both. The holder's `Secret` gives one key per purpose. From it, HKDF-SHA256 (RFC 5869) derives
a key per message under 32 fresh random bytes of salt, and AES-256-GCM (NIST SP 800-38D) encrypts the message under
that key, with its name as associated data:

    sealed  = magic and version || salt (32) || ciphertext || tag (16)
    key     = HKDF-SHA256(input = secret's key of the purpose, salt, info = magic and version), 32 bytes
    nonce   = 12 zero bytes

A key encrypts one message, so its nonce never repeats, whatever is forked, rolled back or written twice, and the
2**32 messages which SP 800-38D (section 8.3) allows a key with random nonces are no limit here. Two of 2**64 messages
share a salt with probability 2**-129. One message may have up to 2**36 - 32 bytes, and must fit in memory. An attempt
at a forgery passes with a probability of about 2**-128 for each 16-byte block of it. GCM does not commit to its key,
which matters only where somebody else may choose one; here the holder makes them all.

What it protects: files that are copied, backed up or thrown away without the holder's key file. What it does not:
whoever has the key file has everything, and it lies beside the ledger. Names, sizes, times and the number of files and
of log records show. Nothing here is fresh: an old file put back in its place, whole, opens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, NoReturn, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.errors import LedgerError, RunError
from privacy.files import Buffer, write_whole
from privacy.identity import Secret

_MAGIC: Final = b"tacit/sealed/1\n"
_SALT: Final = 32
_TAG: Final = 16
# The key is used once, so a constant nonce is a unique one.
_NONCE: Final = bytes(12)


@final
class Safe:
    """Seals bytes at rest under a key of a holder's secret.

    Guarantees:
        Closed: it does not print, copy or pickle; only sealed bytes leave it.
        Bound: what was sealed opens under the same secret, purpose and name only, and only as it was sealed.
    """

    def __init__(self, secret: Secret, purpose: str) -> None:
        """Makes a safe whose key depends on the secret and on what the safe is for."""
        self.__key = secret.derive(f"tacit/safe/1/{purpose}")

    def _cipher(self, salt: bytes) -> Cipher[modes.GCM]:
        key = HKDF(algorithm=SHA256(), length=32, salt=salt, info=_MAGIC).derive(self.__key)
        return Cipher(algorithms.AES256(key), modes.GCM(_NONCE))

    def seal(self, name: str, *parts: Buffer) -> bytes:
        """Encrypts one message.

        Args:
            name: What is sealed, a file's name for instance; bound to it and not stored in it.
            parts: The message, in order: bytes, or memory views of single bytes.
        """
        salt = os.urandom(_SALT)
        encryptor = self._cipher(salt).encryptor()
        encryptor.authenticate_additional_data(name.encode())
        body = [encryptor.update(part) for part in parts]
        return b"".join((_MAGIC, salt, *body, encryptor.finalize(), encryptor.tag))

    def open(self, name: str, sealed: bytes) -> bytes:
        """Decrypts what was sealed under a name.

        Raises:
            LedgerError: These are not exactly the bytes that this safe sealed under this name.
        """
        start, stop = len(_MAGIC) + _SALT, len(sealed) - _TAG
        fault = LedgerError(f"expected {name!r} as it was sealed under this key, got other bytes; restore a backup")
        if stop < start or not sealed.startswith(_MAGIC):
            raise fault
        decryptor = self._cipher(sealed[len(_MAGIC) : start]).decryptor()
        decryptor.authenticate_additional_data(name.encode())
        content = decryptor.update(memoryview(sealed)[start:stop])
        try:
            return content + decryptor.finalize_with_tag(sealed[stop:])
        except InvalidTag:
            raise fault from None

    def __repr__(self) -> str:
        return "Safe(<key>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a safe is neither copied nor pickled; make one from the holder's secret")


# -- the log ---------------------------------------------------------------------------------------------------------

_PURPOSE: Final = "log"
_LENGTH: Final = 4
# Records come in few lengths, so that one tells little of the text in it; a longer text loses its middle.
_BLOCK: Final = 1024
_MOST: Final = 64 * _BLOCK
_CUT: Final = b"\n[cut]\n"
_ADDED: Final = len(_MAGIC) + _SALT + _TAG
# Seconds. A process that holds the lock and never lets go costs records, not the client's answer.
_PATIENCE: Final = 0.5


class _End(NamedTuple):
    """Where a log file ends: its first and next record's number, the tag the next one binds, and the offset."""

    start: int
    number: int
    tag: bytes
    offset: int


class SealedLog(logging.Handler):
    """Appends log records, tracebacks included, to a file that only the holder's secret opens.

    The file holds length-prefixed sealed records. A first one says where the file goes on from; every other is bound
    to its number and to the tag of the one before it, through all files. `read_log` therefore sees a record that was
    altered, removed, moved or repeated. It cannot see that the newest records were cut off, or that the whole log is an
    older copy of itself. How many records there are, when they were written, and their lengths in steps of 1 KiB show.

    A log that fills the disk would stop its client, so a file that reaches the limit is renamed to ``NAME.1``, in place
    of the one before. A torn append costs the torn record. Several processes may write to one log.

    Guarantees:
        Silent: after it was made it raises nothing and prints nothing. What it could not write is counted in `lost`,
        and the next record says how many; a full disk does not change what the client answers (guarantee G12).
    """

    def __init__(self, path: Path, secret: Secret, *, limit: int = 4 * 1024 * 1024) -> None:
        """Opens the log, or begins it with mode 0600.

        Args:
            path: The newer file; the older one is ``NAME.1`` beside it.
            secret: The holder's secret.
            limit: Most bytes of each of the two, exceeded only by a file of a single record.

        Raises:
            LedgerError: The file is no log of this holder.
            RunError: The folder cannot be written.
        """
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.lost = 0
        self._path, self._safe, self._limit = path, Safe(secret, _PURPOSE), limit
        # Which file we wrote last, how long it was then, and where it ended: who appends often must not read it all.
        self._last: tuple[tuple[int, int, int], _End] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(path):
                self._end()
        except OSError as error:
            raise RunError(
                f"expected to open the log {path}, got: {error}; choose a folder that can be written"
            ) from None

    def emit(self, record: logging.LogRecord) -> None:
        """Appends one record, or counts it as lost."""
        try:
            text = self.format(record)
            if self.lost:
                text = f"[records lost before this one: {self.lost}]\n{text}"
            self._append(_padded(text))
        except Exception:
            # Not `handleError`: that prints the record, and with it the details, on standard error.
            self.lost += 1
        else:
            self.lost = 0

    def _append(self, content: bytes) -> None:
        with _locked(self._path):
            end = self._end()
            if end.number > end.start and end.offset + _LENGTH + _ADDED + len(content) > self._limit:
                # Without what a torn append left: nothing will be written over it any more.
                os.truncate(self._path, end.offset)
                os.replace(self._path, _older(self._path))
                end = self._end()
            frame = _framed(self._safe.seal(_place(end.number, end.tag), content))
            with open(self._path, "r+b", buffering=0) as file:
                file.truncate(end.offset)
                file.seek(end.offset)
                try:
                    if file.write(frame) != len(frame):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end.offset)
                    raise
                status = os.fstat(file.fileno())
            after = _End(end.start, end.number + 1, frame[-_TAG:], end.offset + len(frame))
            self._last = (status.st_ino, status.st_size, status.st_mtime_ns), after

    def _end(self) -> _End:
        """Returns where the file ends, having begun it if there is none."""
        if not self._path.exists():
            older = _older(self._path)
            last = _end_of(self._safe, older) if older.exists() else _End(0, 0, bytes(_TAG), 0)
            head = self._safe.seal("head", last.number.to_bytes(8, "big"), last.tag)
            write_whole(self._path, _framed(head))
        status = os.stat(self._path)
        if self._last is not None and self._last[0] == (status.st_ino, status.st_size, status.st_mtime_ns):
            return self._last[1]
        return _end_of(self._safe, self._path)


def read_log(path: Path, secret: Secret) -> Iterator[str]:
    """Reads a log, the older file first.

    Yields:
        The text of each record, in the order in which they were written.

    Raises:
        LedgerError: There is no log, or records were altered, removed, moved or torn. It comes last, after all that
            can be read up to the first such record of each file.
    """
    safe, fault = Safe(secret, _PURPOSE), None
    after: tuple[int, bytes] | None = None
    files = [file for file in (_older(path), path) if file.exists()]
    if not files:
        raise LedgerError(f"expected a log at {path}, got none; name the file that the client writes")
    for file in files:
        try:
            with file.open("rb") as stream:
                frames = _frames(stream)
                number, previous, tag = _head(safe, next(frames, b""))
                # Only the older file may go on from one that is gone: it took that one's place.
                if (number, previous) != after and file == path and (number or after):
                    fault = fault or LedgerError(f"expected {path} to go on from its older file, got a gap before it")
                for sealed in frames:
                    content = safe.open(_place(number, tag), sealed)
                    number, tag = number + 1, sealed[-_TAG:]
                    yield content[_LENGTH:][: int.from_bytes(content[:_LENGTH], "big")].decode(errors="replace")
                after = number, tag
        except LedgerError as error:
            fault = fault or error
    if fault is not None:
        raise fault


def private_logger(name: str) -> logging.Logger:
    """Returns a logger whose records reach the handlers that are attached to it, and nothing else.

    By default Python would hand them to the root logger's handlers, or print them on standard error where it has none.
    A deployment attaches a `SealedLog`; whoever attaches another handler decides where details go (guarantee G12).
    """
    logger = logging.getLogger(name)
    logger.propagate = False
    # Whatever level the program around it chose for its own messages.
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return logger


def _older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def _place(number: int, tag: bytes) -> str:
    return f"{number} after {tag.hex()}"


def _framed(sealed: bytes) -> bytes:
    return len(sealed).to_bytes(_LENGTH, "big") + sealed


def _padded(text: str) -> bytes:
    """Returns the text with its length before it and zeros after it, a multiple of `_BLOCK` bytes, at most `_MOST`."""
    content, most = text.encode(errors="backslashreplace"), _MOST - _LENGTH
    if len(content) > most:
        # The head names the fault and the tail of a traceback its reason.
        half = (most - len(_CUT)) // 2
        content = content[:half] + _CUT + content[-half:]
    framed = _framed(content)
    return framed + bytes(-len(framed) % _BLOCK)


def _frames(file: BinaryIO) -> Iterator[bytes]:
    """Yields the sealed records of a log file; the file then stands after the last one yielded.

    Raises:
        LedgerError: What follows is not a whole record.
    """
    while prefix := file.read(_LENGTH):
        length = int.from_bytes(prefix, "big")
        sealed = file.read(length) if len(prefix) == _LENGTH and _ADDED <= length <= _ADDED + _MOST else b""
        if not sealed or len(sealed) != length:
            raise LedgerError(
                "expected whole records in the log, got one that is torn or cut; what came before it stands"
            )
        yield sealed


def _head(safe: Safe, sealed: bytes) -> tuple[int, bytes, bytes]:
    """Returns the first record's number in a file, the tag it goes on from, and the tag that it binds."""
    content = safe.open("head", sealed)
    return int.from_bytes(content[:8], "big"), content[8:], sealed[-_TAG:]


def _end_of(safe: Safe, path: Path) -> _End:
    """Returns where a file's whole records end.

    Raises:
        LedgerError: The file is no log of this holder.
    """
    with path.open("rb") as file:
        frames = _frames(file)
        start, _, tag = _head(safe, next(frames, b""))
        number, offset = start, file.tell()
        with contextlib.suppress(LedgerError):
            for sealed in frames:
                number, tag, offset = number + 1, sealed[-_TAG:], file.tell()
    return _End(start, number, tag, offset)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the log's lock, a file of its own, as the log itself is renamed.

    Raises:
        TimeoutError: Another process held it all the time.
    """
    last = time.monotonic() + _PATIENCE
    with open(os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600), "rb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > last:
                    raise TimeoutError("expected the log's lock, got none in time") from None
                time.sleep(0.01)
        try:
            yield
        finally:
            # A child that was forked meanwhile holds the same lock; closing the file alone would leave it with him.
            fcntl.flock(file, fcntl.LOCK_UN)

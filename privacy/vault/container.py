"""The vault's container: one sealed file of any size, for one or more keys; docs/protocol-vault.md has every byte.

    0       magic (8), format = 1 (u16), suite = 1 (u16), length of the header (u32), header as canonical JSON, zeros
    4096    slot: length (u32), wrapped keys as canonical JSON, zeros, MAC (32)
    8192    spare slot: zeros, except while keys are being changed
    12288   body: a Cobblestone-256 message

All integers are big-endian. Every place is fixed, so no length in a file makes a reader allocate anything.

    file key    32 random bytes, for this file alone; in no place but the wraps
    body key,
    slot key    = HKDF-Expand-SHA-256(file key, "tacit/vault/1/file\\n" || SHA-256(first 4096 bytes)), 32 bytes each
    body        = Cobblestone-256(body key, context = "tacit/vault/1/body\\n" || SHA-256(first 4096 bytes))
    MAC         = HMAC-SHA-256(slot key, the slot before it)

*Why Cobblestone.* Cobblestone-256 is C2SP's chunked encryption (c2sp.org/chunked-encryption) with SHA-512 and
AES-256-GCM, and comes with the ``cryptography`` library: chunks of 16 KiB, the last one always shorter; a key, a base
nonce and a 32-byte commitment by HKDF-Expand from the key, 24 random bytes and the context; nonces count as in TLS 1.3.
It is the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizar, CRYPTO 2015) in all but how the last chunk is
marked: no chunk can be altered, dropped, swapped, repeated or cut off, and nothing opens under another key or context.

*What is bound.* The first 4096 bytes say what the file is: purpose, object, run, generation. They go into every key,
so a file cannot pass for another one, nor an older generation for a newer. The wrapped keys are not among them, for
they change; they are under the MAC, whose key only somebody who opens the file has.

*Why keys change in place.* `rewrap` must not cost a copy of the body. It writes the new slot to the spare place, syncs,
writes it to its own place, syncs, and clears the spare one. Killed or out of power at any moment, one of the two is
whole, and `rewrap` goes on from there. Nothing else in the file is ever written again. What changes is who may open
the file from now on: somebody who has an old copy of it and the old key has the file key. After a key has *leaked*,
seal the content anew.

Guarantees:
    Verified: a reader's caller gets no byte before its chunk was verified, and no "end" before the whole was.
    Bounded: beyond the content a reader needs 2 MiB, whatever the file says; Argon2id runs at most twice for
        each passphrase.
    Whole: a written file is there whole or not at all, mode 0600, and its name is on disk.

Not hidden: length, times, purpose, object, run, generation, and for which keys. A copy of an older file in place of
the newest opens, unless the caller says which generation it wants; `privacy.vault.shelf` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import hmac
import json
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self, final

import numpy as np
from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from privacy.errors import VaultError
from privacy.plan import canonical
from privacy.vault.draft import Draft
from privacy.vault.keys import KEY_BYTES, Kind, Opener, Recipient, Wrap

# The first byte is no text, the last two are broken by whatever "converts" line ends.
MAGIC: Final = b"\x89TACIT\r\n"
FORMAT: Final = 1
# Cobblestone-256 for body and wraps, HKDF and HMAC with SHA-256.
SUITE: Final = 1
BLOCK: Final = 4096
SLOT: Final = BLOCK
SPARE: Final = 2 * BLOCK
BODY: Final = 3 * BLOCK
MOST_WRAPS: Final = 8

_PREFIX: Final = struct.Struct(">8sHHI")
_MAC: Final = 32
_CHUNK: Final = 16 * 1024
_SEALED_CHUNK: Final = _CHUNK + 16
# Salt and commitment, which a Cobblestone message begins with.
_SALTED: Final = 24 + 32
_PIECE: Final = 64 * _SEALED_CHUNK
_MOST_BYTES: Final = 2**36
_WORD: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_RUN: Final = re.compile(r"[A-Za-z0-9._-]{0,64}")
_OBJECT: Final = re.compile(r"[0-9a-f]{32}")

Bytes = bytes | bytearray | memoryview


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a sealed file is. Public, and bound to every byte of it.

    Attributes:
        purpose: What it is for: a lower-case word, such as ``data`` or ``checkpoint``.
        object: Which thing this is a version of: 32 hex digits, random.
        generation: Which version, >= 1.
        run: Which run it belongs to; 0 to 64 letters, digits, dots, dashes and underscores.
        content: ``file`` for bytes, ``folder`` for an archive of `privacy.vault.archive`.
        created: Seconds since 1970.
    """

    purpose: str
    object: str = dataclasses.field(default_factory=lambda: os.urandom(16).hex())
    generation: int = 1
    run: str = ""
    content: str = "file"
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        good = (
            _matches(_WORD, self.purpose)
            and _matches(_OBJECT, self.object)
            and _matches(_RUN, self.run)
            and self.content in ("file", "folder")
            and type(self.generation) is int
            and 1 <= self.generation < 2**53
            and type(self.created) is int
            and 0 <= self.created < 2**53
        )
        if not good:
            raise VaultError("expected a header of a sealed file, got one that says what it cannot; restore a backup")

    def block(self) -> bytes:
        """Returns the first 4096 bytes of the file."""
        text = canonical(dataclasses.asdict(self))
        return (_PREFIX.pack(MAGIC, FORMAT, SUITE, len(text)) + text).ljust(BLOCK, b"\0")

    @classmethod
    def parse(cls, block: bytes) -> Self:
        """Reads the first 4096 bytes, exactly: what another text would say as well is refused.

        Raises:
            VaultError: They are no header, or one of another format or suite.
        """
        if len(block) != BLOCK or not block.startswith(MAGIC):
            raise VaultError("expected a sealed file, got something else; seal it with tacit vault encrypt")
        _, version, suite, length = _PREFIX.unpack_from(block)
        if (version, suite) != (FORMAT, SUITE):
            raise VaultError(
                f"expected a sealed file of format {FORMAT} and suite {SUITE}, got {version} and {suite}; it is "
                "altered or needs a newer tacit"
            )
        fields = _object(block[_PREFIX.size :], length)
        if fields is None or set(fields) != {field.name for field in dataclasses.fields(cls)}:
            raise _damaged("its header cannot be read")
        try:
            return cls(**fields)
        except VaultError:
            raise _damaged("its header cannot be read") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a file must be to be opened; None and 0 ask for nothing.

    Attributes:
        purpose: What it must be for.
        object: Which thing it must be.
        run: Which run it must belong to.
        generation: Its exact version.
        at_least: Its least version.
    """

    purpose: str | None = None
    object: str | None = None
    run: str | None = None
    generation: int = 0
    at_least: int = 0

    def check(self, header: Header, name: str) -> None:
        """Refuses another file.

        Raises:
            VaultError: The header says something else.
        """
        for word in ("purpose", "object", "run"):
            wanted, found = getattr(self, word), getattr(header, word)
            if wanted is not None and wanted != found:
                raise VaultError(f"expected {name} with {word} {wanted!r}, got {found!r}; it is another file")
        if self.generation not in (0, header.generation) or header.generation < self.at_least:
            raise VaultError(
                f"expected {name} of generation {self.generation or f'{self.at_least} or newer'}, "
                f"got {header.generation}; another version was put in its place, restore the right one"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What can be said of a sealed file without a key; nothing of it is verified.

    Attributes:
        header: What the file says that it is.
        wraps: For which keys it is sealed.
        changing: Whether a change of its keys was interrupted, or the spare slot was written over.
        content_bytes: Length of the content; None where the body's length is that of no message.
        file_bytes: Length of the file.
    """

    header: Header
    wraps: tuple[Wrap, ...]
    changing: bool
    content_bytes: int | None
    file_bytes: int


# -- slots -----------------------------------------------------------------------------------------------------------


def _object(text: bytes, length: int) -> dict[str, Any] | None:
    """The JSON object of a length at the start of a text that is zeros otherwise; None unless it is in its one form."""
    found, rest = text[:length], text[length:]
    if len(found) != length or rest.strip(b"\0"):
        return None
    try:
        fields = json.loads(found)
        return fields if isinstance(fields, dict) and canonical(fields) == found else None
    except (ValueError, RecursionError):
        return None


def _parse_slot(slot: bytes) -> tuple[Wrap, ...] | None:
    """The wraps of a slot, or None where it is none; its MAC is not checked."""
    fields = _object(slot[4:-_MAC], int.from_bytes(slot[:4], "big"))
    if fields is None or set(fields) != {"wraps"} or not isinstance(fields["wraps"], list):
        return None
    if not 1 <= len(fields["wraps"]) <= MOST_WRAPS:
        return None
    try:
        wraps = tuple(Wrap.parse(wrap) for wrap in fields["wraps"])
    except VaultError:
        return None
    # One Argon2id for a slot, whatever it says.
    return wraps if sum(wrap.kind is Kind.PASSPHRASE for wrap in wraps) <= 1 else None


def _slot(wraps: Sequence[Wrap], key: bytes) -> bytes:
    """A slot with its MAC.

    Raises:
        VaultError: There are too many wraps for it.
    """
    text = canonical({"wraps": [wrap.fields() for wrap in wraps]})
    passphrases = sum(wrap.kind is Kind.PASSPHRASE for wrap in wraps)
    if not 1 <= len(wraps) <= MOST_WRAPS or passphrases > 1 or 4 + len(text) > BLOCK - _MAC:
        raise VaultError(
            f"expected 1 to {MOST_WRAPS} keys to seal for, of which one passphrase and two recovery keys at most, got "
            f"{len(wraps)}; leave some out"
        )
    content = (len(text).to_bytes(4, "big") + text).ljust(BLOCK - _MAC, b"\0")
    return content + hmac.digest(key, content, "sha256")


@dataclasses.dataclass(frozen=True)
class _Keys:
    """A file's keys, derived from its file key."""

    file: bytes = dataclasses.field(repr=False)
    slot: bytes = dataclasses.field(repr=False)
    body: bytes = dataclasses.field(repr=False)
    hashed: bytes

    @classmethod
    def of(cls, file: bytes, block: bytes) -> Self:
        hashed = hashlib.sha256(block).digest()
        both = HKDFExpand(SHA256(), 2 * KEY_BYTES, b"tacit/vault/1/file\n" + hashed).derive(file)
        return cls(file, both[KEY_BYTES:], both[:KEY_BYTES], hashed)

    @property
    def context(self) -> bytes:
        return b"tacit/vault/1/body\n" + self.hashed

    def own(self, slot: bytes) -> bool:
        """Says whether a slot was written by somebody who opened this file."""
        return hmac.compare_digest(hmac.digest(self.slot, slot[:-_MAC], "sha256"), slot[-_MAC:])


def _unlocked(fixed: bytes, keys: Sequence[Opener], name: str) -> tuple[_Keys, tuple[Wrap, ...], bool]:
    """Opens the fixed places of a file.

    Args:
        fixed: The first 12,288 bytes.
        keys: What may open it.
        name: How errors call it.

    Returns:
        The file's keys, the wraps of the slot that opened, and whether that was the spare one.

    Raises:
        VaultError: No key opens it, or it was altered.
    """
    block, why, named = fixed[:BLOCK], "", list[str]()
    hashed = hashlib.sha256(block).digest()
    for spare, slot in ((False, fixed[SLOT:SPARE]), (True, fixed[SPARE:BODY])):
        wraps = _parse_slot(slot)
        if wraps is None:
            continue
        for wrap in wraps:
            named.append(str(wrap))
            for key in keys:
                file_key = key.unwrap(wrap, hashed)
                if file_key is None:
                    why = why or key.why_not(wrap)
                    continue
                derived = _Keys.of(file_key, block)
                if derived.own(slot):
                    return derived, wraps, spare
                why = "the file was altered"
    if not named:
        raise _damaged("the keys that it is sealed for cannot be read", name)
    if not why:
        wanted = ", ".join(dict.fromkeys(named))
        raise VaultError(f"expected a key that opens {name}, got none; it is sealed for: {wanted}")
    raise VaultError(f"expected to open {name} with the keys given, got no further: {why}; give the right key, or "
                     "restore a backup")  # fmt: skip


def content_bytes_of(body: int) -> int | None:
    """Returns how many bytes of content a body holds, or None where no message has its length."""
    chunks, last = divmod(body - _SALTED, _SEALED_CHUNK)
    return chunks * _CHUNK + last - 16 if body >= _SALTED and last >= 16 else None


def body_bytes_of(content: int) -> int:
    """Returns how long the body of a content is."""
    return _SALTED + content + 16 * (content // _CHUNK + 1)


# -- in memory -------------------------------------------------------------------------------------------------------


def _seal_head(header: Header, recipients: Sequence[Recipient]) -> tuple[bytes, Cobblestone256Encryptor]:
    block = header.block()
    keys = _Keys.of(os.urandom(KEY_BYTES), block)
    slot = _slot([recipient.wrap(keys.file, keys.hashed) for recipient in recipients], keys.slot)
    return block + slot + bytes(BLOCK), Cobblestone256Encryptor(keys.body, keys.context)


def sealed_bytes_of(content: int) -> int:
    """Returns how long the sealed form of a content is."""
    return BODY + body_bytes_of(content)


def seal_into(out: bytearray | memoryview, header: Header, recipients: Sequence[Recipient], *parts: Bytes) -> int:
    """Seals content into a buffer, which a caller that seals often keeps: fresh memory costs as much as encryption.

    Args:
        out: Room for `sealed_bytes_of` the content.
        header: What it is.
        recipients: Whom it is for.
        parts: The content, in order.

    Returns:
        How many bytes of the buffer are the sealed content.

    Raises:
        VaultError: The buffer is too small, or there are too many recipients.
    """
    view = memoryview(out).cast("B")
    size = sealed_bytes_of(sum(memoryview(part).nbytes for part in parts))
    if len(view) < size:
        raise VaultError(f"expected room for {size} sealed bytes, got {len(view)}; give a larger buffer")
    head, encryptor = _seal_head(header, recipients)
    view[:BODY], at = head, BODY
    for part in parts:
        at += encryptor.update_into(memoryview(part).cast("B"), view[at:])
    last = encryptor.finalize()
    view[at : at + len(last)] = last
    return at + len(last)


def seal_bytes(header: Header, recipients: Sequence[Recipient], *parts: Bytes) -> memoryview:
    """Seals content in memory.

    Args:
        header: What it is.
        recipients: Whom it is for.
        parts: The content, in order.
    """
    out = _room(sealed_bytes_of(sum(memoryview(part).nbytes for part in parts)))
    seal_into(out, header, recipients, *parts)
    return out.toreadonly()


def open_into(
    out: bytearray | memoryview, sealed: Bytes, keys: Sequence[Opener], wanted: Wanted, *, name: str = "sealed bytes"
) -> int:
    """Opens sealed bytes into a buffer; see `open_bytes`.

    Returns:
        How many bytes of the buffer are the content. On failure whatever was written there is zeroed.

    Raises:
        VaultError: As `open_bytes`, or the buffer is too small.
    """
    source, view = memoryview(sealed).cast("B"), memoryview(out).cast("B")
    fixed = bytes(source[:BODY])
    header, size = Header.parse(fixed[:BLOCK]), content_bytes_of(len(source) - BODY)
    wanted.check(header, name)
    derived, _, _ = _unlocked(fixed, keys, name)
    if size is None:
        raise _damaged("it was cut off", name)
    if len(view) < size:
        raise VaultError(f"expected room for {size} bytes, got {len(view)}; give a larger buffer")
    decryptor = Cobblestone256Decryptor(derived.body, derived.context)
    try:
        at = decryptor.update_into(source[BODY:], view)
        last = decryptor.finalize()
    except InvalidTag:
        for start in range(0, size, _CHUNK):
            view[start : min(size, start + _CHUNK)] = bytes(min(size - start, _CHUNK))
        raise _damaged("its content was altered or cut off", name) from None
    view[at : at + len(last)] = last
    return at + len(last)


def open_bytes(sealed: Bytes, keys: Sequence[Opener], wanted: Wanted, *, name: str = "sealed bytes") -> memoryview:
    """Opens sealed bytes.

    Args:
        sealed: What `seal_bytes` returned, or a whole file.
        keys: What may open it.
        wanted: What it must be.
        name: How errors call it.

    Raises:
        VaultError: It is no sealed file or another one than wanted, no key opens it, or it was altered.
    """
    size = content_bytes_of(memoryview(sealed).nbytes - BODY)
    out = _room(size or 0)
    return out[: open_into(out, sealed, keys, wanted, name=name)].toreadonly()


# -- files -----------------------------------------------------------------------------------------------------------


@final
class Writer:
    """Writes a sealed file, as a context: left without an error the file is there whole, else nothing is."""

    def __init__(
        self, path: Path, header: Header, recipients: Sequence[Recipient], *, replace: bool = False, sync: bool = True
    ) -> None:
        """Begins a file of mode 0600.

        Args:
            path: Where; its folder must be there.
            header: What it is.
            recipients: Whom it is for.
            replace: Whether a file of that name is replaced; never a link, a folder or a device.
            sync: Whether to put it on disk before it gets its name.

        Raises:
            VaultError: There is such a file, or none can be written there.
        """
        head, self._encryptor = _seal_head(header, recipients)
        self._buffer = memoryview(bytearray(_SALTED + _PIECE + _SEALED_CHUNK))
        self.content_bytes = 0
        self._draft = Draft(path, replace=replace, sync=sync)
        try:
            self._draft.write(head)
        except VaultError:
            self._draft.drop()
            raise

    def write(self, part: Bytes) -> int:
        """Appends content.

        Returns:
            How many bytes that were: all.

        Raises:
            VaultError: The disk is full or failed.
        """
        view = memoryview(part).cast("B")
        for start in range(0, len(view), 64 * _CHUNK):
            size = self._encryptor.update_into(view[start : start + 64 * _CHUNK], self._buffer)
            if size:
                self._draft.write(self._buffer[:size])
        self.content_bytes += len(view)
        return len(view)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._draft.write(self._encryptor.finalize())
                self._draft.publish()
        finally:
            self._draft.drop()


@final
class Reader:
    """Reads a sealed file, as a context. What it returns is verified.

    Attributes:
        header: What the file is.
        size: Bytes of content.
        wraps: For which keys it is sealed.
        tag: What tells this sealing from every other of the same header (64 hex digits); stays when keys change.
    """

    def __init__(self, path: Path, keys: Sequence[Opener], wanted: Wanted, *, limit: int = _MOST_BYTES) -> None:
        """Opens a file and checks whose it is, but none of its content yet.

        Args:
            path: The file; a link is followed, for what is there must be sealed for the keys.
            keys: What may open it.
            wanted: What it must be.
            limit: Most bytes of content.

        Raises:
            VaultError: It is no sealed file or another one than wanted, no key opens it, or it was altered.
        """
        self._name = str(path)
        self._file = _opened(path, os.O_RDONLY)
        try:
            with _locked(self._file, fcntl.LOCK_SH):
                fixed = self._file.read(BODY)
            self.header = _parsed(fixed, self._name)
            wanted.check(self.header, self._name)
            self._keys, self.wraps, _ = _unlocked(fixed.ljust(BODY, b"\0"), keys, self._name)
            size = content_bytes_of(os.fstat(self._file.fileno()).st_size - BODY)
            if size is None:
                raise _damaged("it was cut off", self._name)
            if size > limit:
                raise VaultError(f"expected at most {limit} bytes in {path}, got {size}; split it")
            self.size = size
            salted = os.pread(self._file.fileno(), _SALTED, BODY)
            self.tag = hashlib.sha256(fixed[:BLOCK] + salted).hexdigest()
        except OSError as error:
            self._file.close()
            raise _unread(self._name, error) from None
        except BaseException:
            self._file.close()
            raise

    def read(self, progress: Callable[[int], None] = lambda done: None) -> memoryview:
        """Returns the whole content, once all of it is verified.

        Args:
            progress: Is told the number of bytes of content that were read.

        Raises:
            VaultError: It was altered or cut off, or does not fit in memory.
        """
        try:
            out = _room(self.size)
        except MemoryError:
            raise VaultError(f"expected {self._name} to fit in memory, got {self.size} bytes; split it") from None
        at = 0
        for piece in self._decrypted(out):
            at += len(piece)
            progress(at)
        return out[:at].toreadonly()

    def pieces(self) -> Iterator[memoryview]:
        """Yields the content in verified pieces of at most 1 MiB, each of which is gone with the next.

        The last piece comes only when the whole is verified. A caller that keeps what it got must still undo it when
        an error comes: a file may be cut anywhere.

        Raises:
            VaultError: It was altered or cut off.
        """
        held = b""
        for piece in self._decrypted(None):
            if held:
                yield memoryview(held)
            held = bytes(piece)
        yield memoryview(held)

    def _decrypted(self, out: memoryview | None) -> Iterator[memoryview]:
        """Decrypts into a buffer of the content's size, or into one that is used again and again."""
        decryptor = Cobblestone256Decryptor(self._keys.body, self._keys.context)
        source = memoryview(bytearray(_PIECE))
        target, at = (memoryview(bytearray(64 * _CHUNK)), 0) if out is None else (out, 0)
        try:
            self._file.seek(BODY)
            # By itself, so that what follows is whole chunks and none is copied to be completed.
            decryptor.update_into(self._file.read(_SALTED), target)
            while size := _filled(self._file, source):
                if at + (size // _SEALED_CHUNK) * _CHUNK > len(target):
                    raise InvalidTag  # It grew since it was opened.
                done = decryptor.update_into(source[:size], target[at:])
                if done:
                    yield target[at : at + done]
                at += done if out is not None else 0
            last = decryptor.finalize()
        except InvalidTag:
            raise _damaged("its content was altered or cut off", self._name) from None
        except OSError as error:
            raise _unread(self._name, error) from None
        if at + len(last) > len(target):
            raise _damaged("its content was altered or cut off", self._name)
        target[at : at + len(last)] = last
        yield target[at : at + len(last)]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_file(
    path: Path, header: Header, recipients: Sequence[Recipient], *parts: Bytes, replace: bool = False, sync: bool = True
) -> None:
    """Writes a sealed file, whole or not at all.

    Raises:
        VaultError: There is such a file and it is not to be replaced, or none can be written.
    """
    with Writer(path, header, recipients, replace=replace, sync=sync) as writer:
        for part in parts:
            writer.write(part)


def read_file(path: Path, keys: Sequence[Opener], wanted: Wanted, *, limit: int = _MOST_BYTES) -> memoryview:
    """Returns the whole content of a sealed file, verified.

    Raises:
        VaultError: As `Reader`.
    """
    with Reader(path, keys, wanted, limit=limit) as reader:
        return reader.read()


def is_sealed(path: Path) -> bool:
    """Says whether a path is a file that begins as a sealed one does."""
    try:
        with _opened(path, os.O_RDONLY) as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, VaultError):
        return False


def inspect(path: Path) -> Facts:
    """Reads what a sealed file says of itself, without a key and without believing it.

    Raises:
        VaultError: It is no sealed file, or its header is damaged.
    """
    with _opened(path, os.O_RDONLY) as file, _locked(file, fcntl.LOCK_SH):
        try:
            fixed, size = file.read(BODY), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise _unread(str(path), error) from None
    header = _parsed(fixed, str(path))
    fixed = fixed.ljust(BODY, b"\0")
    wraps = _parse_slot(fixed[SLOT:SPARE]) or _parse_slot(fixed[SPARE:BODY]) or ()
    return Facts(
        header=header,
        wraps=wraps,
        changing=any(fixed[SPARE:BODY]),
        content_bytes=content_bytes_of(size - BODY),
        file_bytes=size,
    )


def rewrap(
    path: Path, keys: Sequence[Opener], change: Callable[[tuple[Wrap, ...], bytes], Sequence[Wrap | Recipient] | None]
) -> bool:
    """Changes for whom a file is sealed, in place; its body is neither read nor written.

    Killed at any moment, the file opens for the old keys or for the new ones, and the next call finishes what this one
    began. Processes that change the same file wait for each other.

    Args:
        path: The file; not a link.
        keys: What opens it.
        change: Is told the wraps and what they are bound to, and returns those to keep with the recipients to add, or
            None to leave them.

    Returns:
        Whether anything was written.

    Raises:
        VaultError: It is no sealed file, no key opens it, it was altered, or it cannot be written.
    """
    name = str(path)
    with _opened(path, os.O_RDWR | os.O_NOFOLLOW) as file, _locked(file, fcntl.LOCK_EX):
        try:
            fixed = file.read(BODY)
            _parsed(fixed, name)
            if content_bytes_of(os.fstat(file.fileno()).st_size - BODY) is None:
                raise _damaged("it was cut off", name)
            derived, wraps, spare = _unlocked(fixed, keys, name)
            if spare:
                # Its own place first: until that is whole, the spare one is all there is.
                _place(file, SLOT, fixed[SPARE:BODY])
            wanted = change(wraps, derived.hashed)
            if wanted is not None:
                changed = [
                    entry if isinstance(entry, Wrap) else entry.wrap(derived.file, derived.hashed) for entry in wanted
                ]
                slot = _slot(changed, derived.slot)
                _place(file, SPARE, slot)
                _place(file, SLOT, slot)
            if wanted is not None or any(fixed[SPARE:BODY]):
                _place(file, SPARE, bytes(BLOCK))
                return True
            return False
        except OSError as error:
            raise VaultError(
                f"expected to change the keys of {path}, got: {error.strerror or error}; it still opens, try again"
            ) from None


# -- the file system -------------------------------------------------------------------------------------------------


def _place(file: BinaryIO, at: int, content: bytes) -> None:
    """Writes a slot and puts it on disk. A slot is a page by itself: what a power cut tears is this one alone."""
    written = os.pwrite(file.fileno(), content, at)
    if written != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fdatasync(file.fileno())


def _room(size: int) -> memoryview:
    """A buffer whose pages cost nothing before they are written.

    A file's length is anybody's claim: what is longer than its message fails at the first chunk that is not of it.
    """
    return np.empty(size, np.uint8).data


def _filled(file: BinaryIO, buffer: memoryview) -> int:
    """Reads until a buffer is full or the file ends; how much that was."""
    size = 0
    while size < len(buffer):
        got = file.readinto(buffer[size:])  # type: ignore[attr-defined]  # FileIO has it; BinaryIO does not say so.
        if not got:
            break
        size += got
    return size


def _opened(path: Path, flags: int) -> BinaryIO:
    """Opens a regular file, unbuffered; never waits for a pipe or a device.

    Raises:
        VaultError: It cannot be opened, or is something else.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unread(str(path), error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VaultError(f"expected a sealed file at {path}, got a folder or a device; name a file")
    return open(descriptor, "rb" if flags & os.O_ACCMODE == os.O_RDONLY else "r+b", buffering=0)


@contextlib.contextmanager
def _locked(file: BinaryIO, how: int) -> Iterator[None]:
    """Holds a lock on a file; where the file system has none, the order of writes alone must do."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, how)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def _parsed(fixed: bytes, name: str) -> Header:
    try:
        return Header.parse(fixed[:BLOCK])
    except VaultError as error:
        raise VaultError(f"{name}: {error}") from None


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _damaged(how: str, name: str = "the file") -> VaultError:
    return VaultError(f"expected {name} to be as it was sealed, got something else: {how}; restore a backup")


def _unread(name: str, error: OSError) -> VaultError:
    return VaultError(f"expected to read {name}, got: {error.strerror or error}; check its name and permissions")

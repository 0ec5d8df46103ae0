"""What ``tacit vault`` does: seal, open, change keys, and look; each returns what there is to say about it."""

from __future__ import annotations

import datetime
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from privacy.errors import VaultError
from privacy.vault import archive
from privacy.vault.container import (
    MAGIC,
    Facts,
    Header,
    Reader,
    Wanted,
    Writer,
    inspect,
    is_sealed,
    rewrap,
)
from privacy.vault.draft import Draft
from privacy.vault.keyfiles import changing, load_keyring, save_keys
from privacy.vault.keys import (
    Keyring,
    KeyState,
    Opener,
    Passphrase,
    Recipient,
    RecoveryKey,
    RecoveryRecipient,
)
from privacy.vault.rotation import sealed_files, to_active

SUFFIX: Final = ".sealed"
_PIECE: Final = 1024 * 1024

# Is told how much is done, and of how much.
Progress = Callable[[int, int], None]


def keygen(path: Path, passphrase: Passphrase | None, *, recovery: bool) -> dict[str, Any]:
    """Makes a file of keys: a keyring, or a recovery key with its public half in ``NAME.pub``.

    Raises:
        VaultError: Something is there already, or nothing can be written.
    """
    made = RecoveryKey() if recovery else Keyring()
    told: dict[str, Any] = {"file": str(path), "sealed": passphrase is not None}
    save_keys(path, made, passphrase)
    if isinstance(made, Keyring):
        return told | {"key": made.active}
    public = path.with_name(f"{path.name}.pub")
    with Draft(public, replace=False) as draft:
        draft.write(made.recipient.to_text().encode())
    return told | {"key": made.recipient.kid, "public": str(public)}


def recovery_in(path: Path) -> RecoveryRecipient:
    """Reads the public half of a recovery key.

    Raises:
        VaultError: It is none.
    """
    try:
        with path.open("rb") as file:
            return RecoveryRecipient.parse(file.read(4096).decode())
    except OSError as error:
        raise VaultError(f"expected a public recovery key at {path}, got: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise VaultError(f"expected a public recovery key at {path}, got other bytes; name the .pub file") from None


def encrypt(
    source: Path,
    out: Path | None,
    recipients: Sequence[Recipient],
    *,
    purpose: str,
    run: str,
    replace: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Seals a file, or a folder as one file.

    A sealed file that is replaced, and opens for one of the recipients, stays the same object, one generation on.

    Args:
        source: What; it stays where it is.
        out: Where; ``SOURCE.sealed`` by default.
        recipients: For whom.
        purpose: What it is for.
        run: Which run it belongs to; may be empty.
        replace: Whether ``out`` may be there already.
        progress: Is told how far it got.

    Raises:
        VaultError: The source cannot be read or is sealed already, or nothing can be written.
    """
    if source.name in ("", ".."):
        source = source.resolve()
    out = out or source.with_name(source.name + SUFFIX)
    folder = source.is_dir()
    if not folder and is_sealed(source):
        raise VaultError(f"expected {source} in clear, got a sealed file; its keys are changed with tacit vault rotate")
    object_id, generation = _following(out, recipients) if replace else (os.urandom(16).hex(), 1)
    header = Header(
        purpose=purpose, run=run, object=object_id, generation=generation, content="folder" if folder else "file"
    )
    if folder:
        packing = archive.listed(source)
        total, pieces = packing.content_bytes, archive.packed(packing)
    else:
        total, pieces = _read_pieces(source)
    with Writer(out, header, recipients, replace=replace) as writer:
        for piece in pieces:
            writer.write(piece)
            progress(writer.content_bytes, total)
    return _told(out, inspect(out)) | {"source": str(source)}


def _read_pieces(source: Path) -> tuple[int, Iterator[bytes]]:
    def unread(error: OSError) -> VaultError:
        return VaultError(f"expected to read {source}, got: {error.strerror or error}; check its name")

    def pieces() -> Iterator[bytes]:
        try:
            with source.open("rb", buffering=0) as file:
                while piece := file.read(_PIECE):
                    yield piece
        except OSError as error:
            raise unread(error) from None

    try:
        facts = source.stat()
    except OSError as error:
        raise unread(error) from None
    if not stat.S_ISREG(facts.st_mode):
        raise VaultError(f"expected a file or a folder to seal, got {source}, which is neither; copy it to a file")
    return facts.st_size, pieces()


def _following(out: Path, recipients: Sequence[Recipient]) -> tuple[str, int]:
    """Object and generation for a file that takes the place of one; believed only of what opens."""
    openers: list[Opener] = [key for key in recipients if isinstance(key, Keyring | Passphrase)]
    if is_sealed(out) and openers:
        try:
            with Reader(out, openers, Wanted()) as reader:
                return reader.header.object, reader.header.generation + 1
        except VaultError:
            pass
    return os.urandom(16).hex(), 1


def decrypt(
    source: Path, out: Path | None, keys: Sequence[Opener], wanted: Wanted, *, replace: bool, progress: Progress
) -> dict[str, Any]:
    """Opens a sealed file or folder; what is written has its name only when all of it was verified.

    Args:
        source: The sealed file.
        out: Where; ``SOURCE`` without ``.sealed`` by default.
        keys: What opens it.
        wanted: What it must be.
        replace: Whether a file may be there already; a folder may not.
        progress: Is told how far it got.

    Raises:
        VaultError: It does not open, was altered, or nothing can be written.
    """
    if out is None:
        if source.suffix != SUFFIX:
            raise VaultError(f"expected a name that ends in {SUFFIX}, got {source}; say where to with --out")
        out = source.with_suffix("")
    with Reader(source, keys, wanted) as reader:
        if reader.header.content == "folder":
            # Whole, before anything reads its index: a parser is given nothing unverified.
            files = archive.unpacked(reader.read(lambda done: progress(done, 2 * reader.size)))
            archive.extract(files, out, lambda done: progress(reader.size + done, 2 * reader.size))
        else:
            with Draft(out, replace=replace) as draft:
                done = 0
                for piece in reader.pieces():
                    draft.write(piece)
                    done += len(piece)
                    progress(done, reader.size)
        return (
            {"file": str(out), "source": str(source), "verified": True}
            | _header(reader.header)
            | {"content_bytes": reader.size}
        )


def rotate(
    paths: Sequence[Path],
    keys_file: Path | None,
    ask: Callable[[], Passphrase],
    *,
    new_key: bool,
    revoke: bool,
    new_passphrase: Passphrase | None,
    recoveries: Sequence[RecoveryRecipient],
    progress: Progress,
) -> dict[str, Any]:
    """Changes for whom sealed files are sealed; their bodies are not touched. Made again, it goes on where it stopped.

    Args:
        paths: Files, and folders with sealed files anywhere below.
        keys_file: The keyring: files move to its active key.
        ask: Returns the passphrase, of the keyring or, without one, of the files.
        new_key: Whether to make a new active key first.
        revoke: Whether to forget all older keys, if every file was changed.
        new_passphrase: For files under a passphrase, and not for a keyring's own file.
        recoveries: Recovery keys to add.
        progress: Is told how many files are done.

    Raises:
        VaultError: The keyring does not open, or there is no sealed file.
    """
    ring: Keyring | None = None
    keys: list[Opener] = []
    if keys_file is not None:
        if new_key:
            # On disk before anything is sealed for it.
            with changing(keys_file, ask) as changed:
                changed.add()
        ring = load_keyring(keys_file, ask)
        keys.append(ring)
    else:
        keys.append(ask())
    if new_passphrase is not None:
        keys.append(new_passphrase)
    change = to_active(ring, new_passphrase, recoveries)
    files = [path for path in sealed_files(paths) if keys_file is None or not _same(path, keys_file)]
    if not files:
        raise VaultError(f"expected sealed files, got none at {', '.join(map(str, paths))}; name files or folders")
    changed_files, failed = [], {}
    for number, path in enumerate(files, 1):
        try:
            if rewrap(path, keys, change):
                changed_files.append(str(path))
        except VaultError as error:
            failed[str(path)] = str(error)
        progress(number, len(files))
    told: dict[str, Any] = {
        "changed": changed_files,
        "unchanged": len(files) - len(changed_files) - len(failed),
        "failed": failed,
        "key": ring.active if ring is not None else None,
        "revoked": [],
    }
    if revoke and keys_file is not None and not failed:
        with changing(keys_file, ask) as ring:
            for facts in ring.facts:
                if facts.state is KeyState.DECRYPT_ONLY:
                    ring.revoke(facts.kid)
                    told["revoked"].append(facts.kid)
    return told


def look(paths: Sequence[Path], keys: Sequence[Opener] | None, progress: Progress) -> list[dict[str, Any]]:
    """Says what sealed files are; with keys, whether the whole of each is as it was sealed.

    Args:
        paths: Files, and folders with sealed files anywhere below.
        keys: What opens them, or None to believe the headers.
        progress: Is told how many files are done.

    Raises:
        VaultError: There is no sealed file.
    """
    files = list(sealed_files(paths))
    if not files:
        raise VaultError(f"expected sealed files, got none at {', '.join(map(str, paths))}; name files or folders")
    rows = []
    for number, path in enumerate(files, 1):
        row: dict[str, Any] = {"file": str(path), "fault": ""}
        try:
            facts = inspect(path)
            row = _told(path, facts) | row
            if facts.content_bytes is None:
                row["fault"] = "it was cut off"
            if keys is not None:
                with Reader(path, keys, Wanted()) as reader:
                    for _ in reader.pieces():
                        pass
                row["verified"] = True
        except VaultError as error:
            row["fault"] = str(error)
        rows.append(row)
        progress(number, len(files))
    return rows


def ring_facts(path: Path, ask: Callable[[], Passphrase]) -> list[dict[str, Any]]:
    """Returns the names and states of a keyring's keys.

    Raises:
        VaultError: It is no keyring, or does not open.
    """
    ring = load_keyring(path, ask)
    return [{"key": facts.kid, "state": facts.state.value, "created": _time(facts.created)} for facts in ring.facts]


def is_key_file(path: Path) -> bool:
    """Says whether a file begins as a file of keys does."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(len(MAGIC) + 8)
        return head.startswith(b"tacit/keys/1\n") or (head.startswith(MAGIC) and inspect(path).header.purpose == "keys")
    except (OSError, VaultError):
        return False


def _same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False


def _header(header: Header) -> dict[str, Any]:
    return {
        "purpose": header.purpose,
        "object": header.object,
        "generation": header.generation,
        "run": header.run,
        "content": header.content,
        "created": _time(header.created),
    }


def _told(path: Path, facts: Facts) -> dict[str, Any]:
    return (
        {"file": str(path)}
        | _header(facts.header)
        | {
            "content_bytes": facts.content_bytes,
            "file_bytes": facts.file_bytes,
            "sealed_for": [str(wrap) for wrap in facts.wraps],
            "interrupted": facts.changing,
            "verified": False,
        }
    )


def _time(seconds: int) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s after 1970"

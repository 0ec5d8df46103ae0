"""A folder of sealed files with a sealed list: which is which, which is the newest, and which is missing.

    manifest.sealed                   container of purpose ``manifest``; its object is the shelf, its generation counts
    OBJECT-GENERATION.sealed          one container for each name; the names themselves stand in the manifest only

The manifest is canonical JSON: ``{"entries": {NAME: {"generation", "object", "purpose", "run", "tag"}}, "format": 1}``,
where the tag (`container.Reader.tag`) tells one sealing from every other of the same header. Only somebody who has the
keys can write one, by the container's own authentication.

A file that is altered, removed, swapped with another one or put back to an older version is refused. The whole folder
put back, manifest included, is a shelf that was true once: that is refused by whoever remembers its generation, which
is this object as long as it lives, and a caller who kept `generation` elsewhere (``at_least``).

Guarantees:
    Whole: killed at any moment, a shelf has the old file or the new one under a name. The new file is on disk before
        the manifest names it, and the old one goes when the manifest is on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, final

from privacy.errors import VaultError
from privacy.plan import canonical
from privacy.vault.container import Bytes, Header, Reader, Wanted, Writer, write_file
from privacy.vault.keys import Opener, Recipient

_MANIFEST: Final = "manifest.sealed"
_FILE: Final = re.compile(r"[0-9a-f]{32}-[1-9][0-9]{0,15}\.sealed")
_MOST: Final = 64 * 1024 * 1024
# Each is lost only where a put comes in the few microseconds of a read.
_TRIES: Final = 5
_FIELDS: Final = {"generation", "object", "purpose", "run", "tag"}

Entry = dict[str, Any]


class Lock(Recipient, Opener, Protocol):
    """What seals and opens: a keyring or a passphrase."""


@final
class Shelf:
    """Sealed files by name."""

    def __init__(
        self, folder: Path, keys: Sequence[Lock], *, beside: Sequence[Recipient] = (), at_least: int = 0
    ) -> None:
        """Opens a shelf, or begins one in an empty or missing folder.

        Args:
            folder: Where.
            keys: What seals and opens.
            beside: Whom everything is sealed for as well, such as a recovery key.
            at_least: The oldest generation of the manifest that is accepted; 0 accepts a shelf that is not begun.

        Raises:
            VaultError: The manifest does not open, is older, or is missing where files are.
        """
        self._folder, self._keys, self._recipients = folder, tuple(keys), (*keys, *beside)
        self._least, self._object = at_least, ""
        self._entries()

    @property
    def generation(self) -> int:
        """Of the manifest: grows with every change; what a caller keeps elsewhere to notice a shelf that went back."""
        self._entries()
        return self._least

    def names(self) -> list[str]:
        """Returns the names of what is there."""
        return sorted(self._entries())

    def put(self, name: str, *parts: Bytes, purpose: str, run: str = "") -> int:
        """Stores content under a name, in place of what was there.

        Args:
            name: 1 to 200 characters.
            parts: The content, in order.
            purpose: What it is for.
            run: Which run it belongs to.

        Returns:
            Its generation.

        Raises:
            VaultError: The shelf is damaged, or nothing can be written; what was there before stays.
        """
        if not 1 <= len(name) <= 200:
            raise VaultError(f"expected a name of 1 to 200 characters, got {len(name)}; shorten it")
        with self._alone():
            entries = self._entries()
            before = entries.get(name)
            header = (
                Header(purpose=purpose, run=run)
                if before is None
                else Header(purpose=purpose, run=run, object=before["object"], generation=before["generation"] + 1)
            )
            path = self._path(header.object, header.generation)
            # Replaced, because a killed `put` may have left one of this very name that no manifest ever named.
            with Writer(path, header, self._recipients, replace=True) as writer:
                for part in parts:
                    writer.write(part)
            wanted = Wanted(purpose=purpose, object=header.object, generation=header.generation)
            with Reader(path, self._keys, wanted) as reader:
                tag = reader.tag
            entry = {
                "generation": header.generation,
                "object": header.object,
                "purpose": purpose,
                "run": run,
                "tag": tag,
            }
            self._write(entries | {name: entry})
            return header.generation

    def remove(self, name: str) -> None:
        """Removes what is stored under a name.

        Raises:
            VaultError: There is nothing of that name, or the shelf is damaged.
        """
        with self._alone():
            entries = self._entries()
            self._entry(entries, name)
            self._write({other: entry for other, entry in entries.items() if other != name})

    def read(self, name: str, *, purpose: str) -> memoryview:
        """Returns the newest content of a name, verified.

        Raises:
            VaultError: There is nothing of that name, or it was altered, swapped or put back.
        """
        for attempt in range(_TRIES):
            try:
                with self._opened(name, purpose) as reader:
                    return reader.read()
            except VaultError:
                # A newer version may have been put between the manifest and the file: the manifest says so by now.
                if attempt == _TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def check(self) -> None:
        """Reads everything.

        Raises:
            VaultError: Something is not what the manifest says.
        """
        for name, entry in self._entries().items():
            with self._opened(name, entry["purpose"]) as reader:
                for _ in reader.pieces():
                    pass

    @contextlib.contextmanager
    def _opened(self, name: str, purpose: str) -> Iterator[Reader]:
        entry = self._entry(self._entries(), name)
        wanted = Wanted(purpose=purpose, object=entry["object"], run=entry["run"], generation=entry["generation"])
        with Reader(self._path(entry["object"], entry["generation"]), self._keys, wanted) as reader:
            if reader.tag != entry["tag"] or entry["purpose"] != purpose:
                raise VaultError(f"expected the {name} that the shelf lists, got another sealing of it; restore it")
            yield reader

    def _entry(self, entries: dict[str, Entry], name: str) -> Entry:
        if name not in entries:
            raise VaultError(f"expected {name!r} on the shelf {self._folder}, got no such name; list the names")
        return entries[name]

    def _path(self, object_id: str, generation: int) -> Path:
        return self._folder / f"{object_id}-{generation}.sealed"

    def _files(self) -> Iterator[Path]:
        yield from (path for path in sorted(self._folder.glob("*.sealed")) if _FILE.fullmatch(path.name))

    def _entries(self) -> dict[str, Entry]:
        """The manifest, which is never older than the newest that was seen."""
        path = self._folder / _MANIFEST
        if not path.exists() and not path.is_symlink():
            # A first `put` that was killed leaves one file and no manifest yet; more than one tell of a manifest.
            if self._least or len(list(self._files())) > 1:
                raise VaultError(f"expected a manifest in {self._folder}, got none; restore the folder")
            return {}
        wanted = Wanted(purpose="manifest", object=self._object or None, at_least=self._least)
        with Reader(path, self._keys, wanted, limit=_MOST) as reader:
            content, header = bytes(reader.read()), reader.header
        try:
            fields = json.loads(content)
            entries = fields["entries"]
            if canonical(fields) != content or set(fields) != {"entries", "format"} or fields["format"] != 1:
                raise ValueError("another form")
            if not all(set(entry) == _FIELDS for entry in entries.values()):
                raise ValueError("another form")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise VaultError(f"expected a manifest in {self._folder}, got something else; restore the folder") from None
        self._object, self._least = header.object, header.generation
        return dict(entries)

    def _write(self, entries: dict[str, Entry]) -> None:
        """Writes the next manifest and then removes every file that it does not name."""
        content = canonical({"entries": entries, "format": 1})
        header = Header(purpose="manifest", generation=self._least + 1)
        if self._object:
            header = Header(purpose="manifest", generation=self._least + 1, object=self._object)
        write_file(self._folder / _MANIFEST, header, self._recipients, content, replace=True)
        self._object, self._least = header.object, header.generation
        named = {self._path(entry["object"], entry["generation"]) for entry in entries.values()}
        for path in self._files():
            if path not in named:
                with contextlib.suppress(OSError):
                    path.unlink()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._folder / ".shelf.lock", flags, 0o600)
        except OSError as error:
            raise VaultError(f"expected to write to {self._folder}, got: {error.strerror or error}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

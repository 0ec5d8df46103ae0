"""Changing keys of many files: what to change in one, and which there are. Each is changed by `container.rewrap`.

Nothing is remembered between files, so nothing is lost when it stops: a file that has the new keys is left alone, and
the rest is changed by the same call, made again. The new key is on disk before the first file is sealed for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from privacy.vault.container import is_sealed
from privacy.vault.draft import is_draft
from privacy.vault.keys import Keyring, KeyState, Kind, Passphrase, Recipient, RecoveryRecipient, Wrap

Change = Callable[[tuple[Wrap, ...], bytes], Sequence[Wrap | Recipient] | None]


def sealed_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yields every sealed file among paths and below folders, in order; links are not followed, nor named twice."""
    seen = set[Path]()
    for path in paths:
        found = _below(path) if path.is_dir() and not path.is_symlink() else iter((path,))
        for file in found:
            if (resolved := file.absolute()) not in seen:
                seen.add(resolved)
                yield file


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            # A draft is being written, or was never finished.
            if not path.is_symlink() and not is_draft(name) and is_sealed(path):
                yield path


def to_active(
    ring: Keyring | None, passphrase: Passphrase | None = None, recoveries: Sequence[RecoveryRecipient] = ()
) -> Change:
    """Returns a change that moves a file to a keyring's active key, another passphrase, or more recovery keys.

    Args:
        ring: The keyring: its older keys' wraps go, one for its active key comes, where the file had any of them.
        passphrase: Takes the place of the file's passphrase, where it had one.
        recoveries: Are added, where they are missing.
    """

    def change(wraps: tuple[Wrap, ...], context: bytes) -> list[Wrap | Recipient] | None:
        older = {facts.kid for facts in ring.facts if facts.state is not KeyState.ACTIVE} if ring is not None else set()
        kept: list[Wrap | Recipient] = []
        added: list[Recipient] = []
        for wrap in wraps:
            if wrap.kind is Kind.KEY and wrap.kid in older:
                if ring is not None and ring not in added and not any(other.kid == ring.active for other in wraps):
                    added.append(ring)
            elif wrap.kind is Kind.PASSPHRASE and passphrase is not None and passphrase.unwrap(wrap, context) is None:
                added.append(passphrase)
            else:
                kept.append(wrap)
        added += [key for key in recoveries if not any(wrap.kid == key.kid for wrap in wraps)]
        return [*kept, *added] if added or len(kept) < len(wraps) else None

    return change

"""The vault: what is stored is sealed, opens only whole, in its place and for its keys, and says nothing otherwise.

Two constructions. `safe`: small messages under keys of a holder's own secret, where no key ever changes: kept releases
and the log of what went wrong. `container`: files of any size for keys that come and go, with `keys` that wrap, `files`
of keys, whole `archive` folders in one file, and a `shelf` of sealed files that tells an old one from the newest.
"""

from privacy.vault.safe import Safe, SealedLog, private_logger, read_log

__all__ = ["Safe", "SealedLog", "private_logger", "read_log"]

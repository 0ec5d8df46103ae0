"""Where a deployed client keeps what it is: one folder, filled by ``tacit client join``.

    HOME                            ~/.tacit/client, or --home; 0700
      client.json                   name, addresses, the server's public keys, where the data lies, the holder's policy
      ca.pem                        the federation's certificate authority, whose fingerprint the invitation named
      keys/   vault.keys            the keyring that every other private file is sealed for; see privacy.vault.private
              application.key       secret of the client application: signs, seals, and opens what is kept here
              tls.pem               key and certificate for the connection; renewed every few weeks, in one write
              tls.new               a key whose certificate is not there yet
              lock                  held while a process joins or renews
              supernode.key, .pub   the pair that Flower's SuperNode names itself with
      ledger/                       the ledger, with its own key (guarantee G13), unless --ledger names another folder
      jobs/                         what was offered and decided, sealed: see `clients.jobs`
      kept/, log                    finished releases and what went wrong, both sealed
      run/                          what one start needs; its private files are sealed as well

Every private key is made here and never leaves the machine. Files are 0600 and appear whole. Private ones are sealed:
those of ``keys``, those of ``run``, and the ledger's own. What must stay readable of a ledger, for who checks it, is
its entries: they hold no secret, and are signed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

from privacy.enrolment import Address, key_fingerprint
from privacy.errors import IdentityError, VaultError
from privacy.files import write_whole
from privacy.identity import Identity, Secret
from privacy.identity.authority import (
    facts_of,
    new_key,
    read_certificate,
    read_private,
    valid_name,
)
from privacy.identity.supernode import new_supernode_key, supernode_public
from privacy.plan import Metric, canonical, is_number
from privacy.vault import private
from privacy.vault.keys import Opener
from privacy.vault.unlock import handed_on, openers_from

_VERSION: Final = 1


def default_home() -> Path:
    """Returns the folder that is used without ``--home``."""
    return Path.home() / ".tacit" / "client"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What this holder lets be done with its data; its own word, whatever an invitation or a job asks (guarantee G21).

    Attributes:
        epsilon: The data set's budget for its lifetime.
        delta: At which everything is priced.
        records_bound: Public bound on the number of records.
        allow_metrics: What may be said about the records beside updates.
        allow_central: Whether the server may be trusted with updates in the clear (guarantee G16).
    """

    epsilon: float
    delta: float
    records_bound: int
    allow_metrics: tuple[Metric, ...] = ()
    allow_central: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a client knows since it joined; no secret.

    Attributes:
        name: The enrolled name.
        federation: The federation's name.
        addresses: Of the gateway.
        enrol: Of the enrolment endpoint.
        server: Public key of the server application, 64 hex digits: what is signed or sealed by it is the server's.
        authority: SHA-256 of the certificate authority, 64 hex digits.
        task: What is learned.
        data: Where the data lies: an absolute path, or empty where the task brings its own.
        data_set: The holder's own name of it, in the ledger.
        ledger: Folder of the ledger.
        policy: The holder's.
        asked: Epsilon and delta that the invitation asked for, for the record; 0 where it asked for none.
        joined: Seconds since 1970.
        keys: File of keys of a data set that is sealed: an absolute path; empty where the home's own keyring or the
            environment opens it, or it is in clear.
    """

    name: str
    federation: str
    addresses: tuple[Address, ...]
    enrol: tuple[Address, ...]
    server: str
    authority: str
    task: str
    data: str
    data_set: str
    ledger: str
    policy: Policy
    asked: tuple[float, float] = (0.0, 0.0)
    joined: int = 0
    keys: str = ""

    def to_json(self) -> bytes:
        """Returns the file's content."""
        fields: dict[str, Any] = {"v": _VERSION} | dataclasses.asdict(self)
        return canonical(fields | {name: [str(one) for one in getattr(self, name)] for name in ("addresses", "enrol")})

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Reads the file.

        Raises:
            ValueError, TypeError, KeyError, IdentityError: It holds something else.
        """
        fields = json.loads(text)
        if fields.pop("v") != _VERSION:
            raise ValueError("another version")
        for name in ("addresses", "enrol"):
            fields[name] = tuple(Address.parse(one) for one in fields[name])
        policy = fields["policy"]
        policy["allow_metrics"] = tuple(Metric(word) for word in policy["allow_metrics"])
        fields["policy"], fields["asked"] = Policy(**policy), tuple(fields["asked"])
        key_fingerprint(fields["server"]), bytes.fromhex(fields["authority"]), valid_name(fields["name"])
        if not (is_number(policy["epsilon"]) and is_number(policy["delta"]) and type(policy["allow_central"]) is bool):
            raise ValueError("a policy out of range")
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ClientHome:
    """The home of a client, joined or not yet.

    Attributes:
        folder: Where it lies.
    """

    folder: Path

    @property
    def joined(self) -> bool:
        """Whether an enrolment was finished here."""
        return (self.folder / "client.json").exists()

    @property
    def settings(self) -> Settings:
        """What the client knows since it joined.

        Raises:
            IdentityError: It has not joined, or the file is damaged.
        """
        path = self.folder / "client.json"
        try:
            return Settings.from_json(path.read_bytes())
        except OSError as error:
            got = "none" if isinstance(error, FileNotFoundError) else error.strerror
            raise IdentityError(
                f"expected a client's home at {self.folder}, got {got}; join with: tacit client join TOKEN"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, IdentityError):
            raise IdentityError(f"expected settings in {path}, got something else; restore a backup of it") from None

    def save(self, settings: Settings) -> None:
        """Writes the settings; raises RunError where the disk is full."""
        write_whole(self.folder / "client.json", settings.to_json())

    @property
    def authority_file(self) -> Path:
        """The federation's authority, PEM."""
        return self.folder / "ca.pem"

    @property
    def authority(self) -> bytes:
        """The federation's authority, DER; raises IdentityError where it is missing or damaged."""
        return read_certificate(self.authority_file)

    @property
    def tls(self) -> Path:
        """Key and certificate for the connection, one PEM file."""
        return self.folder / "keys" / "tls.pem"

    @property
    def supernode_key(self) -> Path:
        """The SuperNode's private key, for ``--auth-supernode-private-key``."""
        return self.folder / "keys" / "supernode.key"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from joining or renewing here meanwhile; the folder must be there.

        Raises:
            IdentityError: One is at it.
        """
        lock = os.open(self.folder / "keys" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise IdentityError(
                f"expected {self.folder} to be free, another process joins or renews there; wait for it"
            ) from None
        try:
            yield
        finally:
            os.close(lock)

    def make(self) -> None:
        """Makes the folder, for its owner alone, and the keyring for its private files.

        Raises:
            IdentityError: It cannot be made.
            VaultError: The keyring is lost, or cannot be written.
        """
        keys = self.folder / "keys"
        try:
            keys.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.chmod(0o700)
            keys.chmod(0o700)
        except OSError as error:
            raise IdentityError(
                f"expected to make a home at {self.folder}, got {error.strerror}; choose another --home"
            ) from None
        private.make_ring(keys)
        self.share_ring(self.folder / "jobs")

    def share_ring(self, folder: Path) -> None:
        """Has private files in a folder of this home, which is made, sealed for the home's keyring too.

        Raises:
            VaultError: The folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise VaultError(f"expected to make {folder}, got {error.strerror}; free some space") from None
        private.share_ring(self.folder / "keys", folder)

    def share_with_ledger(self, ledger: Path) -> None:
        """Has a ledger's own key sealed: for the home's keyring, or for one of its own where it lies elsewhere.

        Raises:
            VaultError: Its keyring is lost, or cannot be written.
        """
        if ledger.is_relative_to(self.folder):
            self.share_ring(ledger)
        elif ledger.is_dir():
            # Other homes may use it too, and it moves without this one.
            private.make_ring(ledger)

    def seal(self) -> None:
        """Seals what an older Tacit left in clear; safe to repeat, and to kill.

        Raises:
            IdentityError: Another process joins or renews here, or the client has not joined.
            VaultError: The keyring is lost, or a file cannot be written; every key can still be read.
        """
        settings = self.settings
        self.make()
        self.share_with_ledger(Path(settings.ledger))
        with self.alone():
            for path in (*self._keys(), Path(settings.ledger) / "ledger.key"):
                private.seal(path)

    def openers(self, keys: str) -> list[Opener]:
        """Returns what may open a sealed data set: a file of keys that was named; else the home's keyring, then the
        environment's keys.

        Raises:
            VaultError: There is none, or it does not open.
        """
        if keys:
            return openers_from(Path(keys))
        ring = private.ring_beside(self.folder / "keys" / "application.key")
        try:
            return [*([ring] if ring is not None else []), *openers_from(None)]
        except VaultError:
            if ring is None or handed_on():
                raise
            return [ring]

    def _keys(self) -> list[Path]:
        names = ("application.key", "tls.pem", "tls.new", "supernode.key")
        return [self.folder / "keys" / name for name in names]

    def make_keys(self) -> None:
        """Makes every key that is not there yet.

        Raises:
            IdentityError, LedgerError: A key is damaged, or others may read it.
            RunError: The disk is full.
        """
        keys = self.folder / "keys"
        self.secret()
        if not self.supernode_key.exists():
            private.write(self.supernode_key, new_supernode_key())
        write_whole(keys / "supernode.pub", f"{self.supernode_public()}\n".encode())

    def secret(self) -> Secret:
        """Returns the client application's secret; makes it where there is none and the client has not joined.

        Raises:
            IdentityError: It is gone though the client has joined: a new one would be a stranger to the server.
            LedgerError: It is damaged, or others may read it.
        """
        path = self.folder / "keys" / "application.key"
        if self.joined and not path.exists():
            raise IdentityError(f"expected a key at {path}, got none; restore a backup, or revoke and join anew")
        return Secret.load_or_create(path)

    def identity(self) -> Identity:
        """Returns the client application's identity; raises as `secret`."""
        return self.secret().identity("client")

    def supernode(self) -> bytes:
        """Returns the SuperNode's private key, OpenSSH; raises IdentityError."""
        return read_private(self.supernode_key)

    def supernode_public(self) -> str:
        """Returns the SuperNode's public key, one OpenSSH line; raises IdentityError."""
        return supernode_public(self.supernode())

    def next_key(self) -> bytes:
        """Returns the private key for the next certificate, PEM; made once, so that a request can be repeated.

        Raises:
            IdentityError: Others may read it.
            RunError: The disk is full.
        """
        path = self.folder / "keys" / "tls.new"
        if not path.exists():
            private.write(path, new_key())
        return read_private(path)

    def adopt(self, key: bytes, certificate: bytes) -> None:
        """Takes a certificate (PEM) into use together with its key; a crash leaves the old pair or the new one."""
        private.write(self.tls, key, certificate)

    def discard_next_key(self) -> None:
        """Forgets the key of `next_key`; the one after it will be another."""
        (self.folder / "keys" / "tls.new").unlink(missing_ok=True)

    def renewal_due(self, now: float) -> bool:
        """Says whether the certificate should be renewed; raises IdentityError where it is damaged."""
        return facts_of(read_certificate(self.tls)).renewal_due(now)

    def private_files(self) -> list[Path]:
        """Returns every file of the home that nobody else may read, as far as it is there."""
        keys = [self.folder / "keys" / private.RING, *self._keys()]
        return [path for path in (*keys, self.folder / "client.json") if path.exists()]

    def open_to_others(self) -> list[Path]:
        """Returns folders and private files that another user may read or change, or that another user owns."""
        found = []
        for path in (self.folder, self.folder / "keys", *self.private_files()):
            status = path.stat()
            if status.st_mode & 0o077 or status.st_uid != os.geteuid():
                found.append(path)
        return found

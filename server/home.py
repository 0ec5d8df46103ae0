"""Where a deployed server keeps what it is: one folder, made at once by ``tacit server init``.

    HOME                            ~/.tacit/server, or --home; 0700
      server.json                   public settings: name, addresses, public keys, oldest client
      members.json, members.lock    who is invited, enrolled or revoked: see `server.enrol.Registry`
      authority/  ca.pem ca.key     the certificate authority; its key is under a passphrase of its own, if given
                  registry.key      signs the list of members
      enrol/      tls.pem           key and certificate of the enrolment endpoint
      relay/      tls.pem ca.pem    key and certificate of the gateway before the relay; nothing else of ours
      application/ server.key       secret of the server application: signs and seals what clients believe
      */          vault.keys        in each of the four: the keyring that its private files are sealed for, and in
                                    ``application`` checkpoints too; see privacy.vault.private

The four folders are for four kinds of process and may belong to four users of the machine. The enrolment endpoint needs
``authority`` and ``enrol``; the relay and its gateway need ``relay`` and the public files; only the server application
needs ``application`` (guarantee G21: where the relay can read that folder, reports say "relay = server").
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Final, Self

from privacy.enrolment import Address, key_fingerprint
from privacy.errors import IdentityError
from privacy.files import sync_folder, write_whole
from privacy.identity import Identity, Secret
from privacy.identity.authority import Authority, facts_of, fingerprint, is_locked, pem_of, read_certificate, valid_name
from privacy.plan import canonical
from privacy.vault import private

_VERSION: Final = 1
# The oldest Tacit that may enrol or renew; raised where a release mends what older clients get wrong.
OLDEST: Final = "0.1.0"


# The folders of a home, and the private files of each beside those of one start.
_PARTS: Final = {
    "authority": ("ca.key", "registry.key"),
    "enrol": ("tls.pem",),
    "relay": ("tls.pem",),
    "application": ("server.key",),
}


def default_home() -> Path:
    """Returns the folder that is used without ``--home``."""
    return Path.home() / ".tacit" / "server"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is public about a server.

    Attributes:
        name: The federation's name.
        addresses: Where clients reach the gateway.
        enrol: Where they reach the enrolment endpoint.
        application: Public key of the server application, 64 hex digits.
        registry: Public key that the list of members is signed with, 64 hex digits.
        oldest: The oldest Tacit that may enrol or renew.
    """

    name: str
    addresses: tuple[Address, ...]
    enrol: tuple[Address, ...]
    application: str
    registry: str
    oldest: str = OLDEST

    @property
    def hosts(self) -> list[str]:
        """DNS names and IP addresses under which clients call, each once."""
        return list(dict.fromkeys(address.host for address in (*self.addresses, *self.enrol)))

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
        key_fingerprint(fields["application"]), key_fingerprint(fields["registry"])
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ServerHome:
    """An initialised home of a server.

    Attributes:
        folder: Where it lies.
        settings: What is public about it.
    """

    folder: Path
    settings: Settings

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        name: str,
        addresses: list[Address],
        enrol: list[Address],
        passphrase: str = "",
        now: float | None = None,
    ) -> Self:
        """Makes authority, keys and certificates; all of it or nothing.

        Args:
            folder: Must not exist, or be empty.
            name: The federation's name; the certificates say it.
            addresses: Of the gateway. Their hosts, and those of ``enrol``, are all that the authority may sign for.
            enrol: Of the enrolment endpoint.
            passphrase: What the authority's key is encrypted under; empty seals it as every other key.
            now: Seconds since 1970, by this machine's clock if None.

        Raises:
            IdentityError: There is a home already, or a name or address is none.
            RunError, VaultError: A file cannot be written.
        """
        now = time.time() if now is None else now
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise IdentityError(
                f"expected no home of a server at {folder} yet, got one; keep it, or choose another --home"
            )
        if not addresses or not enrol:
            raise IdentityError("expected at least one address HOST:PORT, got none; say where clients will call")
        valid_name(name)
        draft = folder.with_name(f".{folder.name}.{os.urandom(8).hex()}")
        draft.mkdir(parents=True, mode=0o700)
        try:
            for part in _PARTS:
                (draft / part).mkdir(mode=0o700)
                private.make_ring(draft / part)
            settings = Settings(
                name=name,
                addresses=tuple(addresses),
                enrol=tuple(enrol),
                application=_application(draft).public_key,
                registry=_registry(draft).public_key,
            )
            authority = Authority.create(name, settings.hosts, now=now)
            authority.write(draft / "authority", passphrase)
            write_whole(draft / "server.json", settings.to_json())
            home = cls(draft, settings)
            home.renew(authority, now=now)
            write_whole(draft / "relay" / "ca.pem", pem_of(authority.certificate))
            if folder.exists():
                folder.rmdir()
            os.rename(draft, folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return cls(folder, settings)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Opens a home.

        Raises:
            IdentityError: There is none, or its settings are damaged.
        """
        path = folder / "server.json"
        try:
            return cls(folder, Settings.from_json(path.read_bytes()))
        except OSError as error:
            raise IdentityError(
                f"expected a server's home at {folder}, got {_none(error)}; make one with: tacit server init"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, IdentityError):
            raise IdentityError(f"expected settings in {path}, got something else; restore a backup of it") from None

    @property
    def authority(self) -> bytes:
        """The authority's certificate, DER."""
        return read_certificate(self.folder / "authority" / "ca.pem")

    @property
    def members(self) -> Path:
        """The signed list of members."""
        return self.folder / "members.json"

    @property
    def endpoint_tls(self) -> Path:
        """Key and certificate of the enrolment endpoint, one PEM file."""
        return self.folder / "enrol" / "tls.pem"

    @property
    def relay_tls(self) -> Path:
        """Key and certificate of the gateway, one PEM file."""
        return self.folder / "relay" / "tls.pem"

    def registry_identity(self) -> Identity:
        """Returns the identity that signs the list of members; raises as `Secret.load_or_create`."""
        self._require(self.folder / "authority" / "registry.key")
        return self._own(_registry(self.folder), self.settings.registry, "registry.key")

    def application_identity(self) -> Identity:
        """Returns the server application's identity; raises as `Secret.load_or_create`."""
        return self._own(self.application_secret().identity("server"), self.settings.application, "server.key")

    def application_secret(self) -> Secret:
        """Returns the server application's secret; raises as `Secret.load_or_create`."""
        path = self.folder / "application" / "server.key"
        self._require(path)
        return Secret.load_or_create(path)

    def _require(self, path: Path) -> None:
        if not path.exists():
            raise IdentityError(f"expected a key at {path}, got none; restore a backup, a new one would be a stranger")

    def _own(self, identity: Identity, public_key: str, file: str) -> Identity:
        if identity.public_key != public_key:
            raise IdentityError(f"expected {file} to be the key in server.json, got another; restore a backup of it")
        return identity

    def renew(self, authority: Authority, *, now: float) -> bool:
        """Makes new server certificates where there are none, or two thirds of their life are over.

        Returns:
            Whether any was made; who holds one open reads it again.
        """
        made = False
        for path in (self.endpoint_tls, self.relay_tls):
            if not path.exists() or facts_of(read_certificate(path)).renewal_due(now):
                private.write(path, authority.server_leaf(self.settings.name, self.settings.hosts, now=now))
                made = True
        return made

    def seal(self, *parts: str) -> None:
        """Seals what an older Tacit left in clear in folders of the home, all of them by default; safe to kill.

        Raises:
            VaultError: A keyring is lost, or a file cannot be written; every key can still be read.
        """
        for part in parts or _PARTS:
            private.make_ring(self.folder / part)
            for name in _PARTS[part]:
                if not is_locked(self.folder / part / name):
                    private.seal(self.folder / part / name)

    def relay_is_server(self) -> bool:
        """Says whether who runs the relay can read the application's key: reports then say "relay = server" (G21).

        True unless the two folders belong to different users of this machine, and the application's to it alone.
        """
        application, relay = (os.stat(self.folder / part) for part in ("application", "relay"))
        return relay.st_uid in (application.st_uid, 0) or bool(application.st_mode & 0o077)

    def fingerprints(self) -> tuple[bytes, bytes]:
        """Returns the fingerprints of the authority and of the server application's key, as in an invitation."""
        return fingerprint(self.authority), key_fingerprint(self.settings.application)


def _none(error: OSError) -> str:
    return "none" if isinstance(error, FileNotFoundError) else str(error.strerror)


def _application(folder: Path) -> Identity:
    return Secret.load_or_create(folder / "application" / "server.key").identity("server")


def _registry(folder: Path) -> Identity:
    return Secret.load_or_create(folder / "authority" / "registry.key").identity("members")

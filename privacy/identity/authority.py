"""Certificates for the wire: one authority a federation, short-lived leaves, and their check (X.509, RFC 5280).

What they are for: TLS between machines. A certificate says "this machine is enrolled under this name"; what is signed
and sealed inside TLS rests on application identities (`privacy.identity.Identity`), which are another key on purpose.

* Authority: EC P-384, path length 0, may sign certificates and revocations only, and by critical name constraints only
  for the names and addresses of this federation and for names under `CLIENTS`.
* Server leaf: EC P-256, 30 days, its DNS names and addresses, for server authentication only.
* Client leaf: EC P-256, 30 days, for client authentication only; its common name is the enrolled name. The key is made
  on the client, which sends a certificate request; of that request nothing but the public key is believed.

Whoever checks one uses the verifier of the `cryptography` package, not a chain of conditions of our own.

Keys are bytes in PEM or DER here and files of mode 0600 on disk, sealed where their folder has a keyring
(`privacy.vault.private`). The authority's is encrypted by itself instead, where a passphrase is given.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import ipaddress
import os
import re
from pathlib import Path
from typing import Final, NoReturn, final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from privacy.errors import IdentityError
from privacy.files import write_whole
from privacy.vault import private

# Names of clients in certificates are under this one. It is reserved (RFC 2606): no machine ever answers to it.
CLIENTS: Final = "client.tacit.invalid"
LEAF_DAYS: Final = 30
_AUTHORITY_DAYS: Final = 5 * 365
# A leaf is valid from a little before it was made: clocks differ.
_BEFORE: Final = datetime.timedelta(minutes=5)
# A request or certificate of ours is under 1 KiB; a longer one is not parsed.
MOST_BYTES: Final = 4096
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_USAGES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
_STRETCH: Final = re.compile(rb"# argon2id salt=([0-9a-f]{32}) m=65536 t=3 p=4\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What stands in a certificate.

    Attributes:
        name: Common name.
        serial: Serial number, lower-case hex.
        since: Valid from, seconds since 1970.
        until: Valid to, seconds since 1970.
        key: SHA-256 of its SubjectPublicKeyInfo, hex.
        fingerprint: SHA-256 of the whole certificate, hex.
    """

    name: str
    serial: str
    since: int
    until: int
    key: str
    fingerprint: str

    def renewal_due(self, now: float) -> bool:
        """Says whether two thirds of its life are over."""
        return now >= self.since + (self.until - self.since) * 2 / 3


def valid_name(name: str) -> str:
    """Returns a name that may stand in a certificate: lower-case letters, digits and inner hyphens, 63 at most.

    Raises:
        IdentityError: It is none.
    """
    if not _LABEL.fullmatch(name):
        raise IdentityError(
            f"expected a name of up to 63 lower-case letters, digits and inner hyphens, got {name[:80]!r}; "
            "choose another"
        )
    return name


def fingerprint(content: bytes) -> bytes:
    """Returns the SHA-256 of a certificate in DER, 32 bytes."""
    return hashlib.sha256(content).digest()


def facts_of(certificate: bytes) -> Facts:
    """Reads a certificate in DER, which proves nothing yet: see `require_client` and `require_server`.

    Raises:
        IdentityError: It is no certificate.
    """
    return _facts(_certificate(certificate))


@final
class Authority:
    """A certificate authority with its private key.

    Guarantees:
        Closed: the key does not print, copy or pickle; it leaves in `write` only.
        Narrow: what it signs is valid for the names it was made for and for clients, and for nothing else.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        """Holds a key and its certificate; use `create` or `read`."""
        self.__key = key
        self._certificate = certificate
        self.certificate: bytes = certificate.public_bytes(Encoding.DER)

    @classmethod
    def create(cls, name: str, hosts: list[str], *, now: float) -> Authority:
        """Makes an authority.

        Args:
            name: The federation's name.
            hosts: DNS names and IP addresses of its servers, now and later: it can sign for no other.
            now: Seconds since 1970.

        Raises:
            IdentityError: The name or a host is none.
        """
        key = ec.generate_private_key(ec.SECP384R1())
        subject = _subject(f"authority.{valid_name(name)}")
        permitted: list[x509.GeneralName] = [_subtree(host) for host in hosts]
        builder = (
            _builder(subject, subject, key.public_key(), now, _AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.NameConstraints([*permitted, x509.DNSName(CLIENTS)], None), critical=True)
        )
        return cls(key, builder.sign(key, hashes.SHA384()))

    def write(self, folder: Path, passphrase: str = "") -> None:
        """Writes ``ca.pem`` and the private ``ca.key``.

        Args:
            folder: Where.
            passphrase: What the key is encrypted under (Argon2id, then PKCS #8). Empty: it is sealed if the folder has
                a keyring, and in clear without.

        Raises:
            RunError, VaultError: The folder cannot be written.
        """
        if passphrase:
            salt = os.urandom(16)
            head = b"# argon2id salt=%s m=65536 t=3 p=4\n" % salt.hex().encode()
            lock: BestAvailableEncryption | NoEncryption = BestAvailableEncryption(_stretched(passphrase, salt))
        else:
            head, lock = b"", NoEncryption()
        key = self.__key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
        if passphrase:
            write_whole(folder / "ca.key", head, key)
        else:
            private.write(folder / "ca.key", key)
        write_whole(folder / "ca.pem", self._certificate.public_bytes(Encoding.PEM))

    @classmethod
    def read(cls, folder: Path, passphrase: str = "") -> Authority:
        """Reads what `write` wrote.

        Raises:
            IdentityError: A file is missing or damaged, others may read the key, or the passphrase is wrong.
        """
        certificate = _certificate(read_certificate(folder / "ca.pem"))
        content = read_private(folder / "ca.key")
        stretch = _STRETCH.match(content)
        if stretch and not passphrase:
            raise IdentityError("expected the passphrase of the authority's key, got none; give it, the key needs it")
        password = _stretched(passphrase, bytes.fromhex(stretch[1].decode())) if stretch else None
        try:
            key = load_pem_private_key(content[stretch.end() if stretch else 0 :], password)
        except (ValueError, TypeError):
            what = "the passphrase that it was locked with, got another or a damaged file" if stretch else "a whole key"
            raise IdentityError(
                f"expected in {folder / 'ca.key'} {what}; try again, or restore a backup of it"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or _spki(key.public_key()) != _spki(
            certificate.public_key()
        ):
            raise IdentityError(f"expected {folder / 'ca.key'} to belong to ca.pem, got another key; restore a backup")
        return cls(key, certificate)

    def server_leaf(self, name: str, hosts: list[str], *, now: float, days: int = LEAF_DAYS) -> bytes:
        """Makes a key and a certificate for a server.

        Args:
            name: Common name; nothing checks it.
            hosts: DNS names and IP addresses under which clients will call.
            now: Seconds since 1970.
            days: For how long it is good.

        Returns:
            PEM: the private key, the leaf, the authority's certificate. For a file of mode 0600.

        Raises:
            IdentityError: A host is not one that the authority may sign for.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subjects = [_general(host) for host in hosts]
        leaf = self._leaf(name, subjects, key.public_key(), ExtendedKeyUsageOID.SERVER_AUTH, now, days)
        for host in hosts:
            require_server(leaf.public_bytes(Encoding.DER), self.certificate, host, now=now)
        chain = (leaf.public_bytes(Encoding.PEM), self._certificate.public_bytes(Encoding.PEM))
        return b"".join((_private_pem(key), *chain))

    def client_leaf(self, name: str, request: bytes, *, now: float) -> bytes:
        """Signs a client's key under a name.

        Args:
            name: The enrolled name. Whatever name stands in the request is not read.
            request: The client's certificate request in DER (PKCS #10).
            now: Seconds since 1970.

        Returns:
            The certificate in DER.

        Raises:
            IdentityError: The request is not one for an EC P-256 key, or is not signed by that key.
        """
        key = request_key(request)
        subject = [x509.DNSName(f"{valid_name(name)}.{CLIENTS}")]
        leaf = self._leaf(name, subject, key, ExtendedKeyUsageOID.CLIENT_AUTH, now)
        return leaf.public_bytes(Encoding.DER)

    def _leaf(
        self,
        name: str,
        subjects: list[x509.DNSName | x509.IPAddress] | list[x509.DNSName],
        key: ec.EllipticCurvePublicKey,
        purpose: x509.ObjectIdentifier,
        now: float,
        days: int = LEAF_DAYS,
    ) -> x509.Certificate:
        own = self.__key.public_key()
        builder = (
            _builder(_subject(valid_name(name)), self._certificate.subject, key, now, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage("digital_signature"), critical=True)
            .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )
        return builder.sign(self.__key, hashes.SHA384())

    def __repr__(self) -> str:
        return f"Authority({fingerprint(self.certificate).hex()[:16]})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an authority is neither copied nor pickled; read it from its folder")


def new_key() -> bytes:
    """Returns a fresh EC P-256 private key in PEM (PKCS #8), for a file of mode 0600."""
    return _private_pem(ec.generate_private_key(ec.SECP256R1()))


def certificate_request(key: bytes, name: str) -> bytes:
    """Returns the certificate request (PKCS #10, DER) of a private key in PEM.

    Raises:
        IdentityError: The key is none of ours.
    """
    private = _private(key)
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(valid_name(name)))
    return builder.sign(private, hashes.SHA256()).public_bytes(Encoding.DER)


def request_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """Returns the public key of a certificate request that this key signed.

    Raises:
        IdentityError: The request is not one for an EC P-256 key, or is not signed by that key.
    """
    fault = IdentityError("expected a certificate request for an EC P-256 key, signed by it, got something else")
    if len(request) > MOST_BYTES:
        raise fault
    try:
        parsed = x509.load_der_x509_csr(request)
        key, signed = parsed.public_key(), parsed.is_signature_valid
    except Exception:  # Its parser may refuse foreign bytes with several kinds of errors; to us they are one.
        raise fault from None
    if not signed or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise fault
    return key


def key_of_request(request: bytes) -> str:
    """Returns the SHA-256 of a request's SubjectPublicKeyInfo, hex; raises as `request_key`."""
    return hashlib.sha256(_spki(request_key(request))).hexdigest()


def key_of_private(key: bytes) -> str:
    """Returns the SHA-256 of a private key's SubjectPublicKeyInfo, hex; the key is in PEM.

    Raises:
        IdentityError: The key is none of ours.
    """
    return hashlib.sha256(_spki(_private(key).public_key())).hexdigest()


def sign_with_key(key: bytes, message: bytes) -> str:
    """Returns the ECDSA-SHA-256 signature of a message by a private key in PEM: DER, in hex.

    Raises:
        IdentityError: The key is none of ours.
    """
    return _private(key).sign(message, ec.ECDSA(hashes.SHA256())).hex()


def verify_with_certificate(certificate: bytes, message: bytes, signature: str) -> None:
    """Checks a signature of `sign_with_key` against the key of a certificate in DER.

    Raises:
        IdentityError: It is not that key's signature of that message.
    """
    key = _certificate(certificate).public_key()
    verify_ecdsa(key, hashes.SHA256(), message, signature)


def verify_ecdsa(key: object, digest: hashes.HashAlgorithm, message: bytes, signature: str) -> None:
    """Checks an ECDSA signature in hex; raises IdentityError where it does not match."""
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("another kind of key")
        key.verify(bytes.fromhex(signature), message, ec.ECDSA(digest))
    except (InvalidSignature, ValueError, TypeError):
        raise IdentityError("expected a valid signature, got one that does not match its key and message") from None


def require_server(leaf: bytes, authority: bytes, host: str, *, now: float) -> None:
    """Checks a server's certificate.

    Args:
        leaf: What the server showed in TLS, DER.
        authority: The federation's authority, DER; trusted.
        host: The DNS name or IP address that was called.
        now: Seconds since 1970.

    Raises:
        IdentityError: It is not a current certificate of this authority for this host.
    """
    builder = PolicyBuilder().store(Store([_certificate(authority)])).time(_moment(now))
    try:
        builder.build_server_verifier(_general(host)).verify(_certificate(leaf), [])
    except VerificationError as error:
        raise IdentityError(f"expected a current certificate of this federation for {host}, got: {error}") from None


def require_client(leaf: bytes, authority: bytes, *, now: float) -> str:
    """Checks a client's certificate; whether the name is still a member, only the list of members says.

    Returns:
        The enrolled name.

    Raises:
        IdentityError: It is not a current client certificate of this authority.
    """
    certificate = _certificate(leaf)
    builder = PolicyBuilder().store(Store([_certificate(authority)])).time(_moment(now))
    try:
        subjects = builder.build_client_verifier().verify(certificate, []).subjects
    except VerificationError as error:
        raise IdentityError(f"expected a current client certificate of this federation, got: {error}") from None
    name = _facts(certificate).name
    if subjects != [x509.DNSName(f"{name}.{CLIENTS}")]:
        raise IdentityError("expected a client certificate under its common name, got another; enrol again")
    return name


def read_certificate(path: Path) -> bytes:
    """Returns the first certificate of a PEM file, in DER; a private one, with its key, may be sealed.

    Raises:
        VaultError: It is sealed, and does not open.
        IdentityError: There is no such file, or no certificate in it.
    """
    try:
        return x509.load_pem_x509_certificates(private.read(path))[0].public_bytes(Encoding.DER)
    except OSError as error:
        raise IdentityError(f"expected a certificate at {path}, got {error.strerror}; restore it") from None
    except (ValueError, IndexError):
        raise IdentityError(f"expected a certificate in {path}, got other bytes; restore a backup of it") from None


def is_locked(path: Path) -> bool:
    """Says whether an authority's key is encrypted under a passphrase of its own."""
    try:
        return _STRETCH.match(path.read_bytes()) is not None
    except OSError:
        return False


def pem_of(certificate: bytes) -> bytes:
    """Returns a certificate in PEM."""
    return _certificate(certificate).public_bytes(Encoding.PEM)


def read_private(path: Path) -> bytes:
    """Returns the content of a private file, opened if it is sealed.

    Raises:
        IdentityError: There is none, or somebody beside its owner may read it.
        VaultError: It is sealed, and does not open.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode & 0o777
            if mode & 0o077:
                raise IdentityError(f"expected {path} to be private (0600), got {mode:04o}; chmod 600 it")
            return private.opened(path, file.read(private.MOST_SEALED))
    except OSError as error:
        raise IdentityError(
            f"expected a private file at {path}, got {error.strerror}; restore a backup of it"
        ) from None


# -- what the objects of the library look like ------------------------------------------------------------------------


def _certificate(content: bytes) -> x509.Certificate:
    if len(content) <= MOST_BYTES:
        try:
            return x509.load_der_x509_certificate(content)
        except ValueError:
            pass
    raise IdentityError("expected a certificate in DER, got other bytes; restore a backup of it")


def _facts(certificate: x509.Certificate) -> Facts:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Facts(
        name=str(names[0].value) if names else "",
        serial=f"{certificate.serial_number:x}",
        since=int(certificate.not_valid_before_utc.timestamp()),
        until=int(certificate.not_valid_after_utc.timestamp()),
        key=hashlib.sha256(_spki(certificate.public_key())).hexdigest(),
        fingerprint=hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest(),
    )


def _private(content: bytes) -> ec.EllipticCurvePrivateKey:
    """The private key that a PEM text begins with; certificates may stand behind it."""
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("expected an EC P-256 private key in PEM, got other bytes; restore a backup of it")
    return key


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _spki(key: object) -> bytes:
    encode = getattr(key, "public_bytes", None)
    return bytes(encode(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)) if encode else b""


def _stretched(passphrase: str, salt: bytes) -> bytes:
    """64 MiB and 3 passes (RFC 9106, second choice): PKCS #8 alone would let a guess cost microseconds."""
    return (
        Argon2id(salt=salt, length=32, iterations=3, lanes=4, memory_cost=65536)
        .derive(passphrase.encode())
        .hex()
        .encode()
    )


def _moment(now: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(now), datetime.UTC)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*words: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{word: word in words for word in _USAGES})


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: float, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now) - _BEFORE)
        .not_valid_after(_moment(now) + datetime.timedelta(days=days))
    )


def _general(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(_dns(host))


def _subtree(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_network(host))
    except ValueError:
        return x509.DNSName(_dns(host))


def _dns(host: str) -> str:
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdecimal():
        raise IdentityError(f"expected a lower-case DNS name or an IP address, got {host[:80]!r}; correct it")
    return host

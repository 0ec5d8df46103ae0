"""The key pair with which a Flower SuperNode names itself to its SuperLink: ECDSA on P-384, in OpenSSH's format.

Flower 1.41 takes no other kind. It authenticates a connection and nothing that goes through it: whatever must hold
rests on application identities. The pair is made on the client; the public half is registered at the SuperLink.
"""

from __future__ import annotations

import re
from base64 import b64encode
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from privacy.errors import IdentityError
from privacy.identity.authority import verify_ecdsa

_LINE: Final = re.compile(r"ecdsa-sha2-nistp384 [A-Za-z0-9+/]{182}==")


def new_supernode_key() -> bytes:
    """Returns a fresh private key in OpenSSH's format, for a file of mode 0600."""
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def supernode_public(private: bytes) -> str:
    """Returns the public half as the one line that Flower registers, without a comment.

    Raises:
        IdentityError: The private key is none of ours.
    """
    return _line(_private(private).public_key())


def supernode_pem(public: str) -> bytes:
    """Returns a public key as a SuperLink keeps it, PEM.

    Raises:
        IdentityError: It is not the one text of an ECDSA P-384 key.
    """
    return _public(public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def flower_field(public: str) -> bytes:
    """Returns what a SuperNode with this key says in its ``flwr-public-key`` field; a gateway may insist on it.

    Raises:
        IdentityError: It is not the one text of an ECDSA P-384 key.
    """
    return b64encode(supernode_pem(public))


def sign_supernode(private: bytes, message: bytes) -> str:
    """Returns the ECDSA-SHA-384 signature of a message: DER, in hex; raises as `supernode_public`."""
    return _private(private).sign(message, ec.ECDSA(hashes.SHA384())).hex()


def verify_supernode(public: str, message: bytes, signature: str) -> None:
    """Checks a signature of `sign_supernode`.

    Raises:
        IdentityError: The line is not the one text of an ECDSA P-384 key, or the signature is not that key's.
    """
    verify_ecdsa(_public(public), hashes.SHA384(), message, signature)


def _public(line: str) -> ec.EllipticCurvePublicKey:
    fault = IdentityError("expected an ECDSA P-384 key on one OpenSSH line, got something else; make a new pair")
    if not _LINE.fullmatch(line):
        raise fault
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise fault from None
    # One text a key: a second spelling of a registered key must not pass for another key.
    if not isinstance(key, ec.EllipticCurvePublicKey) or _line(key) != line:
        raise fault
    return key


def _private(content: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IdentityError("expected an ECDSA P-384 private key in OpenSSH's format, got other bytes; restore it")
    return key


def _line(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

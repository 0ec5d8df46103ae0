"""Certificates: what the authority signs is narrow, checked by others' verifiers, and private keys stay private."""

from __future__ import annotations

import base64
import copy
import pickle
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from privacy.errors import IdentityError
from privacy.identity import authority as module
from privacy.identity.authority import (
    LEAF_DAYS,
    Authority,
    certificate_request,
    facts_of,
    key_of_private,
    new_key,
    pem_of,
    read_certificate,
    read_private,
    require_client,
    require_server,
    sign_with_key,
    valid_name,
    verify_with_certificate,
)
from privacy.identity.loopback import write_loopback
from privacy.identity.supernode import (
    flower_field,
    new_supernode_key,
    sign_supernode,
    supernode_public,
    verify_supernode,
)

NOW = 1_800_000_000.0
HOSTS = ["server.example", "127.0.0.1", "::1"]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("demo", HOSTS, now=NOW)


@pytest.fixture(scope="module")
def server(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("server") / "tls.pem"
    path.write_bytes(authority.server_leaf("demo", HOSTS, now=NOW))
    return read_certificate(path)


def client_leaf(authority: Authority, name: str = "hospital-a", now: float = NOW) -> bytes:
    return authority.client_leaf(name, certificate_request(new_key(), name), now=now)


def test_a_certificate_says_what_it_is_for_and_for_how_long(authority: Authority, server: bytes) -> None:
    root = x509.load_der_x509_certificate(authority.certificate)
    basic = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.crl_sign) == (True, True, True)
    assert not usage.value.digital_signature
    assert root.extensions.get_extension_for_class(x509.NameConstraints).critical
    assert isinstance(key := root.public_key(), ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP384R1)
    for leaf, purpose in ((server, "1.3.6.1.5.5.7.3.1"), (client_leaf(authority), "1.3.6.1.5.5.7.3.2")):
        parsed = x509.load_der_x509_certificate(leaf)
        purposes = parsed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert [one.dotted_string for one in purposes] == [purpose]
        assert isinstance(own := parsed.public_key(), ec.EllipticCurvePublicKey)
        assert isinstance(own.curve, ec.SECP256R1)
        facts = facts_of(leaf)
        assert facts.since < NOW < facts.until == NOW + LEAF_DAYS * 86400
        third = (facts.until - facts.since) / 3
        assert not facts.renewal_due(facts.until - third - 1)
        assert facts.renewal_due(facts.until - third)


def test_a_server_is_believed_for_its_own_hosts_now_and_from_its_own_authority_only(
    authority: Authority, server: bytes
) -> None:
    for host in HOSTS:
        require_server(server, authority.certificate, host, now=NOW)
    stranger = Authority.create("demo", HOSTS, now=NOW)
    wrong = [
        (server, authority.certificate, "evil.example", NOW),
        (server, authority.certificate, "127.0.0.2", NOW),
        (server, authority.certificate, HOSTS[0], NOW - 400),
        (server, authority.certificate, HOSTS[0], NOW + (LEAF_DAYS + 1) * 86400),
        (server, stranger.certificate, HOSTS[0], NOW),
        (client_leaf(authority), authority.certificate, "hospital-a.client.tacit.invalid", NOW),
        (b"garbage", authority.certificate, HOSTS[0], NOW),
    ]
    for leaf, root, host, now in wrong:
        with pytest.raises(IdentityError):
            require_server(leaf, root, host, now=now)


def test_a_client_is_who_the_authority_says_and_no_server_passes_for_one(authority: Authority, server: bytes) -> None:
    leaf = client_leaf(authority)
    assert require_client(leaf, authority.certificate, now=NOW) == "hospital-a"
    stranger = Authority.create("demo", HOSTS, now=NOW)
    for other in (server, client_leaf(stranger)):
        with pytest.raises(IdentityError, match="expected a current client certificate"):
            require_client(other, authority.certificate, now=NOW)
    with pytest.raises(IdentityError):
        require_client(leaf, authority.certificate, now=NOW + 31 * 86400)


def test_openssl_agrees_with_every_certificate_in_its_strict_mode(
    authority: Authority, server: bytes, tmp_path: Path
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl here")
    (tmp_path / "ca.pem").write_bytes(pem_of(authority.certificate))
    outside = foreign_leaf(authority, "evil.example")
    for leaf, purpose, sound in (
        (server, "sslserver", True),
        (client_leaf(authority), "sslclient", True),
        (server, "sslclient", False),
        (outside, "sslserver", False),
    ):
        (tmp_path / "leaf.pem").write_bytes(pem_of(leaf))
        arguments = ["-x509_strict", "-purpose", purpose, "-attime", str(int(NOW)), "-CAfile", str(tmp_path / "ca.pem")]
        done = subprocess.run([openssl, "verify", *arguments, str(tmp_path / "leaf.pem")], capture_output=True)
        assert (done.returncode == 0) is sound, done.stderr


def foreign_leaf(authority: Authority, host: str) -> bytes:
    """A certificate for a host that is not the federation's, signed with the authority's own key."""
    key = ec.generate_private_key(ec.SECP256R1())
    kinds = {"ca": False, "path_length": None}
    own = authority._Authority__key  # type: ignore[attr-defined]
    builder = module._builder(module._subject("evil"), authority._certificate.subject, key.public_key(), NOW, 30)
    return (
        builder.add_extension(x509.BasicConstraints(**kinds), critical=True)
        .add_extension(module._usage("digital_signature"), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(own, hashes.SHA384())
        .public_bytes(Encoding.DER)
    )


def test_even_a_stolen_authority_signs_for_the_federations_names_only(authority: Authority) -> None:
    with pytest.raises(IdentityError):
        authority.server_leaf("demo", ["evil.example"], now=NOW)
    with pytest.raises(IdentityError, match="name constraints"):
        require_server(foreign_leaf(authority, "evil.example"), authority.certificate, "evil.example", now=NOW)
    # The same leaf passes where the name is one of the federation's: it is the constraint that refused above.
    require_server(foreign_leaf(authority, HOSTS[0]), authority.certificate, HOSTS[0], now=NOW)


def test_of_a_request_only_the_key_is_believed(authority: Authority) -> None:
    key = new_key()
    leaf = authority.client_leaf("hospital-a", certificate_request(key, "hospital-b"), now=NOW)
    assert require_client(leaf, authority.certificate, now=NOW) == "hospital-a"
    assert facts_of(leaf).key == key_of_private(key)


def test_a_request_that_its_key_did_not_sign_is_refused(authority: Authority) -> None:
    request = bytearray(certificate_request(new_key(), "a"))
    request[-1] ^= 1
    p384 = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    large = p384.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()).public_bytes(Encoding.DER)
    for bad in (bytes(request), b"", b"x" * 100, large, b"\x30\x82\xff\xff" + bytes(5000)):
        with pytest.raises(IdentityError, match="certificate request"):
            authority.client_leaf("a", bad, now=NOW)


def test_signatures_by_a_connections_key_bind_key_and_message(authority: Authority) -> None:
    key = new_key()
    leaf = authority.client_leaf("a", certificate_request(key, "a"), now=NOW)
    signature = sign_with_key(key, b"message")
    verify_with_certificate(leaf, b"message", signature)
    for other, message, text in ((leaf, b"massage", signature), (leaf, b"message", "00"), (leaf, b"message", "zz")):
        with pytest.raises(IdentityError):
            verify_with_certificate(other, message, text)
    with pytest.raises(IdentityError):
        verify_with_certificate(client_leaf(authority), b"message", signature)


def test_files_are_private_whole_and_encrypted_where_a_passphrase_was_given(
    authority: Authority, tmp_path: Path
) -> None:
    authority.write(tmp_path / "clear")
    authority.write(tmp_path / "locked", "correct horse")
    for folder, passphrase in (("clear", ""), ("locked", "correct horse")):
        path = tmp_path / folder / "ca.key"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        again = Authority.read(tmp_path / folder, passphrase)
        require_client(client_leaf(again), authority.certificate, now=NOW)
    assert b"ENCRYPTED" in (tmp_path / "locked" / "ca.key").read_bytes()
    assert b"ENCRYPTED" not in (tmp_path / "clear" / "ca.key").read_bytes()
    for passphrase in ("", "wrong"):
        with pytest.raises(IdentityError, match="passphrase"):
            Authority.read(tmp_path / "locked", passphrase)
    (tmp_path / "clear" / "ca.key").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        Authority.read(tmp_path / "clear")


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_corrupt_key_files_are_named_and_never_replaced(authority: Authority, tmp_path: Path, content: bytes) -> None:
    authority.write(tmp_path)
    path = tmp_path / "ca.key"
    path.write_bytes(content)
    with pytest.raises(IdentityError, match=r"ca\.key"):
        Authority.read(tmp_path)
    assert path.read_bytes() == content
    authority.write(tmp_path)
    (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(IdentityError, match=r"ca\.pem"):
        Authority.read(tmp_path)
    Authority.create("demo", HOSTS, now=NOW).write(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca.key", path)
    authority.write(tmp_path / "mine")
    shutil.copy(tmp_path / "mine" / "ca.pem", tmp_path / "ca.pem")
    with pytest.raises(IdentityError, match="another key"):
        Authority.read(tmp_path)


def test_a_private_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_private(tmp_path / "real") == b"x"
    with pytest.raises(IdentityError):
        read_private(tmp_path / "link")


def test_an_authority_shows_copies_and_pickles_nothing(authority: Authority) -> None:
    assert "PRIVATE" not in repr(authority)
    for leak in (lambda: pickle.dumps(authority), lambda: copy.copy(authority), lambda: copy.deepcopy(authority)):
        with pytest.raises(TypeError):
            leak()


@pytest.mark.parametrize("name", ["", "A", "a.b", "-a", "a-", "a" * 64, "a b", "ä", "a/../b", "a\n"])
def test_a_name_that_could_be_mistaken_is_refused(name: str) -> None:
    with pytest.raises(IdentityError, match="expected a name"):
        valid_name(name)


def test_a_supernode_key_is_what_flower_reads_and_has_one_spelling() -> None:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

    private = new_supernode_key()
    public = supernode_public(private)
    # As flwr does it: an OpenSSH private key on a NIST curve, and its public line.
    loaded = load_ssh_private_key(private, None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert loaded.curve.name == "secp384r1"
    assert load_ssh_public_key(public.encode()) == loaded.public_key()
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

    field = base64.b64decode(flower_field(public), validate=True)
    assert field == public_key_to_bytes(loaded.public_key())
    assert bytes_to_public_key(field) == loaded.public_key()
    signature = sign_supernode(private, b"message")
    verify_supernode(public, b"message", signature)
    other = supernode_public(new_supernode_key())
    for line, message, text in (
        (other, b"message", signature),
        (public, b"massage", signature),
        (public + " comment", b"message", signature),
        (public.replace(" ", "  "), b"message", signature),
        ("ssh-ed25519 AAAA", b"message", signature),
        (public[:-6] + "AAAA==", b"message", signature),
    ):
        with pytest.raises(IdentityError):
            verify_supernode(line, message, text)
    with pytest.raises(IdentityError):
        supernode_public(b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n")


def test_making_an_authority_a_server_and_three_clients_takes_well_under_a_second() -> None:
    started = time.perf_counter()
    made = Authority.create("demo", HOSTS, now=NOW)
    made.server_leaf("demo", HOSTS, now=NOW)
    for name in ("a", "b", "c"):
        client_leaf(made, name)
    assert time.perf_counter() - started < 1


def test_a_certificate_for_loopback_outlives_a_process_that_reads_it_once(tmp_path: Path) -> None:
    own, root = write_loopback(tmp_path, now=NOW)
    assert facts_of(read_certificate(own)).until - NOW > 3 * 365 * 86400
    assert facts_of(read_certificate(own)).until < facts_of(read_certificate(root)).until
    require_server(read_certificate(own), read_certificate(root), "127.0.0.1", now=NOW + 3 * 365 * 86400)
    assert own.stat().st_mode & 0o777 == 0o600

"""Identities and secrets: signatures that bind, keys that stay where they are."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import os
import pickle
import stat
from pathlib import Path

import pytest

from privacy.errors import LedgerError
from privacy.identity import Identity, Secret, verify

SEED = bytes(range(32))


def test_a_signature_is_that_of_rfc_8032() -> None:
    """RFC 8032, section 7.1, test 2."""
    seed = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    identity = Identity(seed)
    assert identity.public_key == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert identity.sign(b"\x72") == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    verify(identity.public_key, b"\x72", identity.sign(b"\x72"))


def test_another_message_key_or_signature_is_refused() -> None:
    identity, other = Identity(SEED), Identity(SEED[::-1])
    signature = identity.sign(b"spent 1.5")
    cases = [
        (identity.public_key, b"spent 0.5", signature),
        (other.public_key, b"spent 1.5", signature),
        (identity.public_key, b"spent 1.5", other.sign(b"spent 1.5")),
        (identity.public_key, b"spent 1.5", "0" * 128),
        (identity.public_key, b"spent 1.5", ""),
        (identity.public_key, b"spent 1.5", signature[:-2]),
        (identity.public_key, b"spent 1.5", signature + "00"),
        ("", b"spent 1.5", signature),
        ("zz" * 32, b"spent 1.5", signature),
    ]
    for case in cases:
        with pytest.raises(LedgerError):
            verify(*case)


def test_a_signature_has_one_text() -> None:
    """Hex digits in capitals or with spaces mean the same bytes; accepting them would make copies look different."""
    identity = Identity(SEED)
    signature = identity.sign(b"m")
    for text in (signature.upper(), " " + signature, signature[:2] + " " + signature[2:], signature + "\n"):
        assert bytes.fromhex(text) == bytes.fromhex(signature)
        with pytest.raises(LedgerError, match="lower-case"):
            verify(identity.public_key, b"m", text)


@pytest.mark.parametrize("bit", range(0, 512, 37))
def test_every_flipped_bit_of_a_signature_is_refused(bit: int) -> None:
    identity = Identity(SEED)
    raw = bytearray.fromhex(identity.sign(b"m"))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(LedgerError):
        verify(identity.public_key, b"m", raw.hex())


def test_a_key_file_is_made_once_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.key"
    os.umask(umask := os.umask(0))
    old = os.umask(0)
    try:
        first = Secret.load_or_create(path)
    finally:
        os.umask(old)
    assert umask == old
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == 32
    assert Secret.load_or_create(path).derive("x") == first.derive("x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ledger.key"]
    assert Secret.load_or_create(tmp_path / "other.key").derive("x") != first.derive("x")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620, 0o601])
def test_a_key_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "ledger.key"
    Secret.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(LedgerError, match="chmod 600"):
        Secret.load_or_create(path)


@pytest.mark.parametrize("content", [b"", b"short", bytes(31), bytes(33), bytes(64)])
def test_a_key_file_of_another_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.key"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="32 bytes"):
        Secret.load_or_create(path)
    assert path.read_bytes() == content


def test_a_crash_while_the_key_is_made_leaves_no_half_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.key"
    with monkeypatch.context() as patch:
        patch.setattr("privacy.identity.os.fsync", _crash)
        with pytest.raises(KeyboardInterrupt):
            Secret.load_or_create(path)
    assert not path.exists()
    Secret.load_or_create(path)
    # The planted bug: creating the file under its own name first leaves an empty key, which locks the ledger.
    naive = tmp_path / "naive.key"
    os.close(os.open(naive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with pytest.raises(LedgerError):
        Secret.load_or_create(naive)


def _crash(*_: object) -> None:
    raise KeyboardInterrupt


def _derive(path: Path, out: multiprocessing.queues.SimpleQueue[bytes]) -> None:
    out.put(Secret.load_or_create(path).derive("x"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(5):
        out = context.SimpleQueue()
        path = tmp_path / f"{number}.key"
        processes = [context.Process(target=_derive, args=(path, out)) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert len({out.get() for _ in processes}) == 1


def test_keys_for_different_purposes_differ() -> None:
    secret = Secret(SEED)
    values = [secret.derive("a"), secret.derive("b"), Secret(SEED[::-1]).derive("a"), SEED]
    assert len(set(values)) == 4
    assert secret.identity("x").public_key != secret.identity("y").public_key


def test_g7_a_commitment_is_keyed_and_named() -> None:
    secret = Secret(SEED)
    content = b"guessable table"
    commitment = secret.commitment("clinic", content)
    assert commitment == Secret(SEED).commitment("clinic", content)
    assert commitment != secret.commitment("clinic", content + b"\nrecord")
    assert commitment != secret.commitment("lab", content)
    assert commitment != Secret(SEED[::-1]).commitment("clinic", content)
    # The planted bug: a bare hash, which anyone who guesses the table can confirm.
    assert commitment not in {hashlib.new(name, content).hexdigest() for name in ("sha256", "sha512", "md5", "sha1")}


def test_secrets_cannot_be_printed_pickled_or_copied() -> None:
    secret, identity = Secret(SEED), Identity(SEED)
    for value in (secret, identity):
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="pickled"):
                way(value)
        for text in (repr(value), str(value), f"{value}"):
            assert SEED.hex() not in text
            assert repr(SEED)[2:-1] not in text
    # The planted bug: an ordinary object pickles with its secret inside.
    assert SEED in pickle.dumps({"seed": SEED})

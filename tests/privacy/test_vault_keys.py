"""Keys of the vault: their states, their files, and that they never show."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import pickle
import stat
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from privacy.errors import VaultError
from privacy.plan import canonical
from privacy.vault import keyfiles
from privacy.vault.container import Header, Wanted, open_bytes, seal_bytes, write_file
from privacy.vault.keyfiles import changing, load_keyring, load_keys, save_keys
from privacy.vault.keys import (
    Keyring,
    KeyState,
    Passphrase,
    RecoveryKey,
    RecoveryRecipient,
    Stretch,
    Wrap,
    kid_of,
)

HEADER, TEXT = Header(purpose="data"), b"the weights of clinic 7"
PHRASE = "correct horse battery staple"


def passphrase(text: str = PHRASE) -> Passphrase:
    return Passphrase(text, stretch=Stretch(salt=os.urandom(16), memory_kib=19_456, passes=2, lanes=1))


def nobody() -> Passphrase:
    raise AssertionError("expected nobody to be asked")


# -- states ----------------------------------------------------------------------------------------------------------


def test_one_key_seals_older_ones_open_and_revoked_ones_are_gone() -> None:
    ring = Keyring()
    first = ring.active
    old = seal_bytes(HEADER, [ring], TEXT)
    second = ring.add()
    assert [(facts.kid, facts.state) for facts in ring.facts] == [
        (first, KeyState.DECRYPT_ONLY),
        (second, KeyState.ACTIVE),
    ]
    assert open_bytes(old, [ring], Wanted()) == TEXT
    assert ring.wrap(bytes(32), bytes(32)).kid == second
    ring.revoke(first)
    with pytest.raises(VaultError, match=f"key {first[:8]} was revoked"):
        open_bytes(old, [ring], Wanted())
    assert b'"key":""' in ring._export()
    with pytest.raises(VaultError, match="make a new key first"):
        ring.revoke(second)
    with pytest.raises(VaultError, match="of this keyring"):
        ring.revoke("00" * 16)


def test_planted_bug_a_revoked_key_that_stays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keyring, "revoke", lambda ring, kid: None)
    ring = Keyring()
    old, first = seal_bytes(HEADER, [ring], TEXT), ring.active
    ring.add()
    ring.revoke(first)
    assert open_bytes(old, [ring], Wanted()) == TEXT


def test_a_keyring_is_full_at_some_point() -> None:
    ring = Keyring()
    for _ in range(1023):
        ring.add()
    with pytest.raises(VaultError, match="begin another"):
        ring.add()


def test_a_key_is_named_by_its_identifier_and_never_by_its_bytes() -> None:
    fields = json.loads(Keyring()._export())
    (key,) = fields["keys"]
    ring = Keyring._import(fields)
    assert ring.active == kid_of(key["id"])
    other = Keyring._import(fields | {"keys": [key | {"key": "00" * 32}]})
    assert other.active == ring.active


# -- passphrases -----------------------------------------------------------------------------------------------------


def test_a_short_passphrase_opens_and_does_not_seal() -> None:
    for text in ("", "x" * 1025):
        with pytest.raises(VaultError, match="1 to 1024"):
            Passphrase(text)
    with pytest.raises(VaultError, match="at least 12"):
        seal_bytes(HEADER, [passphrase("x" * 11)], TEXT)
    sealed = seal_bytes(HEADER, [passphrase("x" * 12)], TEXT)
    with pytest.raises(VaultError, match="another one"):
        open_bytes(sealed, [passphrase("x" * 11)], Wanted())


def test_two_keyboards_mean_the_same_passphrase() -> None:
    sealed = seal_bytes(HEADER, [passphrase("gr\u00fcne heftklammer")], TEXT)
    assert open_bytes(sealed, [passphrase("gru\u0308ne heftklammer")], Wanted()) == TEXT


def test_argon2id_runs_once_for_all_that_one_passphrase_seals_and_each_has_its_own_salt() -> None:
    first, second = passphrase(), passphrase()
    wraps = [phrase.wrap(bytes(32), bytes(32)) for phrase in (first, first, second)]
    assert wraps[0].stretch == wraps[1].stretch != wraps[2].stretch
    assert wraps[0].wrapped != wraps[1].wrapped
    for number in range(40):
        phrase = Passphrase(PHRASE, stretch=Stretch(salt=number.to_bytes(16, "big"), memory_kib=19_456, passes=2))
        assert first.unwrap(phrase.wrap(bytes(32), b""), b"") == bytes(32)
        if number == 17:
            break
    assert len(first._Passphrase__keys) == 16  # type: ignore[attr-defined]


def test_the_default_is_the_second_choice_of_rfc_9106() -> None:
    stretch = Stretch(salt=bytes(16))
    assert (stretch.memory_kib, stretch.passes, stretch.lanes) == (65_536, 3, 4)


# -- wraps -----------------------------------------------------------------------------------------------------------


def test_a_wrap_opens_for_its_file_and_its_label_only() -> None:
    recovery = RecoveryKey()
    for recipient, opener in ((ring := Keyring(), ring), (passphrase(), passphrase()), (recovery.recipient, recovery)):
        wrap = recipient.wrap(b"d" * 32, b"file one")
        assert opener.unwrap(wrap, b"file one") == b"d" * 32
        assert opener.unwrap(wrap, b"file two") is None
        for at in range(0, len(wrap.wrapped), 5):
            flipped = wrap.wrapped[:at] + bytes([wrap.wrapped[at] ^ 4]) + wrap.wrapped[at + 1 :]
            assert opener.unwrap(dataclasses.replace(wrap, wrapped=flipped), b"file one") is None
        assert Wrap.parse(wrap.fields()) == wrap
    # A wrap that says more than it did when it was made.
    wrap = passphrase().wrap(b"d" * 32, b"")
    assert wrap.stretch is not None
    relabelled = dataclasses.replace(wrap, stretch=dataclasses.replace(wrap.stretch, passes=3))
    assert passphrase().unwrap(relabelled, b"") is None


def test_a_wrap_commits_to_its_key() -> None:
    """No bytes open under two keys: the commitment is checked before a byte is decrypted."""
    wrap, other = Keyring().wrap(bytes(32), b""), Keyring()
    kid = other.active
    for at in range(24, 56):
        forged = dataclasses.replace(wrap, kid=kid, wrapped=wrap.wrapped[:at] + os.urandom(1) + wrap.wrapped[at + 1 :])
        assert other.unwrap(forged, b"") is None


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "sealed"},
        {"kind": ["key"]},
        {"kid": 7},
        {"kid": "AB" * 16},
        {"kid": "ab" * 15},
        {"wrapped": "!"},
        {"wrapped": ""},
        {"wrapped": 5},
        {"more": 1},
        {"kind": "recovery"},
        {"kind": "passphrase"},
    ],
)
def test_a_strange_wrap_is_refused(change: dict[str, Any]) -> None:
    fields = Keyring().wrap(bytes(32), b"").fields()
    with pytest.raises(VaultError, match="foreign or altered"):
        Wrap.parse(fields | change)
    for strange in (None, [], "x", {}):
        with pytest.raises(VaultError):
            Wrap.parse(strange)
        with pytest.raises(VaultError):
            Stretch.parse(strange)


# -- recovery --------------------------------------------------------------------------------------------------------


def test_a_public_recovery_key_is_a_line_and_opens_nothing() -> None:
    recovery = RecoveryKey()
    text = recovery.recipient.to_text()
    recipient = RecoveryRecipient.parse(text)
    assert recipient.kid == recovery.recipient.kid
    sealed = seal_bytes(HEADER, [recipient], TEXT)
    assert open_bytes(sealed, [recovery], Wanted()) == TEXT
    assert not hasattr(recipient, "unwrap")
    for bad in ("", text[:-5], text.replace("-1 ", "-2 "), text + "x", text.replace(" ", "  "), "tacit-recovery-1 "):
        with pytest.raises(VaultError):
            RecoveryRecipient.parse(bad)
    # An ML-KEM-768 key whose coefficients are out of range.
    with pytest.raises(VaultError):
        RecoveryRecipient("ab" * 16, b"\xff" * 1216)


# -- files of keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Keyring, RecoveryKey])
@pytest.mark.parametrize("sealed", [False, True])
def test_keys_come_back_from_their_file(tmp_path: Path, make: Any, sealed: bool) -> None:
    path, made = tmp_path / "keys", make()
    save_keys(path, made, passphrase() if sealed else None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    data = path.read_bytes()
    for secret in [value for value in _hex_of(made) if len(value) >= 64]:
        assert (secret.encode() in data) is not sealed
    back = load_keys(path, passphrase if sealed else nobody)
    assert back._export() == made._export()
    with pytest.raises(VaultError, match="a file that is there"):
        save_keys(path, make(), None)
    assert path.read_bytes() == data
    if sealed:
        with pytest.raises(VaultError, match="the passphrase is another one"):
            load_keys(path, lambda: passphrase("another passphrase"))
    if make is RecoveryKey:
        with pytest.raises(VaultError, match="expected a keyring"):
            load_keyring(path, passphrase)


def _hex_of(made: Keyring | RecoveryKey) -> list[str]:
    fields = json.loads(made._export())
    return [key["key"] for key in fields["keys"]] if "keys" in fields else [fields["mlkem768"], fields["x25519"]]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_private_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    save_keys(path, Keyring(), None)
    path.chmod(mode)
    with pytest.raises(VaultError, match="chmod 600"):
        load_keys(path, nobody)
    path.chmod(0o400)
    load_keys(path, nobody)


def test_a_sealed_file_of_keys_may_lie_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    save_keys(path, Keyring(), passphrase())
    path.chmod(0o644)
    load_keys(path, passphrase)


def test_what_is_no_file_of_keys_is_refused(tmp_path: Path) -> None:
    path, ring = tmp_path / "keys", Keyring()
    good = json.loads(ring._export())
    key = good["keys"][0]
    texts = [
        b"",
        b"x",
        b"tacit/keys/1\n",
        b"tacit/keys/1\n[]",
        b"tacit/keys/1\n" + b"[" * 100_000,
        b"tacit/keys/1\n" + b" " * 2**21,
        b"tacit/keys/2\n" + canonical({"keyring": good}),
        *(
            b"tacit/keys/1\n" + canonical(fields)
            for fields in (
                {"keyring": good, "recovery": {}},
                {"other": good},
                {"keyring": []},
                {"keyring": good | {"format": 2}},
                {"keyring": good | {"keys": []}},
                {"keyring": good | {"keys": [key, key]}},
                {"keyring": good | {"keys": [key | {"state": "decrypt-only"}]}},
                {"keyring": good | {"keys": [key | {"state": []}]}},
                {"keyring": good | {"keys": [key | {"key": ""}]}},
                {"keyring": good | {"keys": [key | {"key": "00"}]}},
                {"keyring": good | {"keys": [key | {"id": 1}]}},
                {"keyring": good | {"keys": [key | {"created": "now"}]}},
                {"keyring": good | {"keys": [7]}},
                {"recovery": good},
                {"recovery": json.loads(RecoveryKey()._export()) | {"x25519": "00"}},
            )
        ),
        b"tacit/keys/1\n" + json.dumps({"keyring": good}).encode(),
    ]
    for text in texts:
        path.write_bytes(text)
        path.chmod(0o600)
        with pytest.raises(VaultError):
            load_keys(path, nobody)
    # A sealed file that is for something else, and a pipe.
    write_file(path, HEADER, [passphrase()], canonical({"keyring": good}), replace=True)
    with pytest.raises(VaultError, match="purpose"):
        load_keys(path, passphrase)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("pipe", "absent", ""):
        with pytest.raises(VaultError, match="tacit vault keygen"):
            load_keys(tmp_path / name, nobody)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_keyring_that_changes_is_written_again_or_stays(tmp_path: Path, sealed: bool) -> None:
    path, ask = tmp_path / "keys", passphrase if sealed else nobody
    save_keys(path, Keyring(), passphrase() if sealed else None)
    with changing(path, ask) as ring:
        added = ring.add()
    assert load_keyring(path, ask).active == added
    before = path.read_bytes()

    def stop() -> None:
        with changing(path, ask) as ring:
            ring.add()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        stop()
    assert path.read_bytes() == before
    assert before[:8] == (b"\x89TACIT\r\n" if sealed else b"tacit/ke")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(VaultError, match="a link"), changing(tmp_path / "link", ask) as ring:
        ring.add()
    assert path.read_bytes() == before


def test_two_changes_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    save_keys(path, Keyring(), None)

    def add() -> None:
        for _ in range(10):
            with changing(path, nobody) as ring:
                ring.add()

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(load_keyring(path, nobody).facts) == 31


def test_planted_bug_changes_without_a_lock_lose_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, both = tmp_path / "keys", threading.Barrier(2)
    save_keys(path, Keyring(), None)
    monkeypatch.setattr(keyfiles, "fcntl", SimpleNamespace(LOCK_EX=0, flock=lambda *_: None))

    def add() -> None:
        with changing(path, nobody) as ring:
            ring.add()
            both.wait(10)

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(load_keyring(path, nobody).facts) == 2


# -- nothing shows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Keyring, RecoveryKey, passphrase])
def test_no_secret_can_be_printed_pickled_copied_or_logged(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    secret = make()
    hidden = [PHRASE] if isinstance(secret, Passphrase) else _hex_of(secret)
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            way(secret)
    with caplog.at_level(logging.INFO):
        logging.getLogger("tacit.test").info("keys %s %r", secret, secret)
    for text in (repr(secret), str(secret), f"{secret}", caplog.text):
        for value in hidden:
            assert value not in text
            assert repr(bytes.fromhex(value))[2:-1] not in text if value != PHRASE else True
    assert "wrapped=" not in repr(Keyring().wrap(bytes(32), b""))

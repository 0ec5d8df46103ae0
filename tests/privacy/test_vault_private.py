"""Private files of a home: sealed for the keyring beside them, never lost, never taken for one another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tacit
from privacy.accounting import Grant
from privacy.errors import LedgerError, TacitError, VaultError
from privacy.identity import Secret
from privacy.identity.authority import Authority, read_private
from privacy.ledger import Book
from privacy.vault import private
from privacy.vault.container import inspect, is_sealed
from privacy.vault.keyfiles import load_keyring, save_keys
from privacy.vault.keys import Keyring, Passphrase

ROOT = Path(__file__).parents[2]
KEY = bytes(range(7, 39))


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEYS", "PASSPHRASE", "PASSPHRASE_FILE"):
        monkeypatch.delenv(f"TACIT_VAULT_{name}", raising=False)


def with_ring(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    private.make_ring(folder)
    return folder


def test_a_secret_beside_a_keyring_is_sealed_and_the_same_each_time(tmp_path: Path) -> None:
    folder = with_ring(tmp_path / "keys")
    made = Secret.load_or_create(folder / "application.key")
    assert is_sealed(folder / "application.key")
    assert (folder / "application.key").stat().st_mode & 0o777 == 0o600
    again = Secret.load_or_create(folder / "application.key")
    assert again.derive("x") == made.derive("x")
    assert len(private.read(folder / "application.key")) == 32
    # Without a keyring, as in a simulation by default, it is 32 bytes in clear.
    assert Secret.load_or_create(tmp_path / "clear.key").derive("x") != made.derive("x")
    assert len((tmp_path / "clear.key").read_bytes()) == 32


def test_a_ledgers_own_key_is_sealed_and_what_others_check_stays_readable(tmp_path: Path) -> None:
    folder = with_ring(tmp_path / "ledger")
    with Book(folder) as book:
        book.grant({"mine": Grant(epsilon=3.0, delta=1e-5, order=8.0, records_bound=1000)}, population="mine")
        key = book.accounts["mine"].identity
    assert is_sealed(folder / "ledger.key")
    assert key.encode() in (folder / "ledger.jsonl").read_bytes()
    with Book(folder) as book:
        assert "mine" in book.accounts
    # Its keyring gone, the ledger is refused, and is not begun anew under another key.
    (folder / private.RING).unlink()
    with pytest.raises(VaultError, match=r"expected vault\.keys beside"):
        Book(folder)
    assert is_sealed(folder / "ledger.key")


def test_a_ring_may_lie_elsewhere_and_is_found_by_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_keys(tmp_path / "token.keys", Keyring(), None)
    monkeypatch.setenv("TACIT_VAULT_KEYS", str(tmp_path / "token.keys"))
    folder = with_ring(tmp_path / "home" / "keys")
    assert os.readlink(folder / private.RING) == str(tmp_path / "token.keys")
    monkeypatch.delenv("TACIT_VAULT_KEYS")
    private.write(folder / "a.key", KEY)
    (tmp_path / "home" / "ledger").mkdir()
    private.share_ring(folder, tmp_path / "home" / "ledger")
    private.write(tmp_path / "home" / "ledger" / "a.key", KEY)
    shutil.move(tmp_path / "home", tmp_path / "moved")
    assert private.read(tmp_path / "moved" / "ledger" / "a.key") == KEY
    # A link to a key file is read with the keyring that lies beside the file itself.
    (tmp_path / "a.key").symlink_to(tmp_path / "moved" / "keys" / "a.key")
    assert private.read(tmp_path / "a.key") == KEY
    # The token is taken away.
    (tmp_path / "token.keys").rename(tmp_path / "away.keys")
    with pytest.raises(VaultError, match="bring back what it links to"):
        private.read(tmp_path / "moved" / "keys" / "a.key")


# -- who opens what --------------------------------------------------------------------------------------------------


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_two_keys_of_a_folder_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_ring(tmp_path / "keys")
    one, other = folder / "application.key", folder / "ledger.key"
    private.write(one, KEY)
    private.write(other, KEY[::-1])
    swap(one, other)
    for path in (one, other):
        with pytest.raises(VaultError, match="it is another file"):
            private.read(path)
        with pytest.raises(VaultError):
            Secret.load_or_create(path)
    # Planted: every file sealed for one purpose. The exchange is not seen.
    monkeypatch.setattr(private, "purpose_of", lambda path: "key")
    private.write(one, KEY)
    private.write(other, KEY[::-1])
    swap(one, other)
    assert (private.read(one), private.read(other)) == (KEY[::-1], KEY)


def test_a_file_of_another_home_and_an_altered_one_are_refused(tmp_path: Path) -> None:
    mine, theirs = with_ring(tmp_path / "a"), with_ring(tmp_path / "b")
    private.write(mine / "tls.pem", b"mine")
    private.write(theirs / "tls.pem", b"theirs")
    shutil.copy(theirs / "tls.pem", mine / "tls.pem")
    with pytest.raises(VaultError, match="expected a key that opens"):
        private.read(mine / "tls.pem")
    private.write(mine / "x.key", KEY)
    content = bytearray((mine / "x.key").read_bytes())
    for at in (20, 4200, len(content) - 5):
        content[at] ^= 1
        (mine / "x.key").write_bytes(content)
        with pytest.raises(VaultError):
            private.read(mine / "x.key")
        content[at] ^= 1
    (mine / "x.key").write_bytes(bytes(200 * 1024))
    with pytest.raises(VaultError, match="at most"):
        private.read(mine / "x.key")


def test_an_older_sealing_of_a_file_that_is_put_back_opens_as_the_text_says(tmp_path: Path) -> None:
    folder = with_ring(tmp_path / "keys")
    private.write(folder / "tls.pem", b"first")
    first = (folder / "tls.pem").read_bytes()
    before = inspect(folder / "tls.pem").header
    private.write(folder / "tls.pem", b"second")
    after = inspect(folder / "tls.pem").header
    assert (after.object, after.generation) == (before.object, before.generation + 1)
    (folder / "tls.pem").write_bytes(first)
    assert private.read(folder / "tls.pem") == b"first"


def test_a_passphrase_is_needed_and_a_wrong_one_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phrase = tmp_path / "phrase"
    phrase.write_text("a long enough passphrase\n")
    phrase.chmod(0o600)
    monkeypatch.setenv("TACIT_VAULT_PASSPHRASE_FILE", str(phrase))
    folder = with_ring(tmp_path / "keys")
    private.write(folder / "x.key", KEY)
    # A stolen folder: nothing in it opens anything without the passphrase.
    assert is_sealed(folder / private.RING)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    private._opened.clear()
    monkeypatch.delenv("TACIT_VAULT_PASSPHRASE_FILE")
    with pytest.raises(VaultError, match="TACIT_VAULT_PASSPHRASE_FILE"):
        private.read(folder / "x.key")
    monkeypatch.setenv("TACIT_VAULT_PASSPHRASE", "another long passphrase")
    for attempt in (
        lambda: private.write(folder / "x.key", b"other"),
        lambda: Secret.load_or_create(folder / "new.key"),
    ):
        with pytest.raises((VaultError, LedgerError), match="expected"):
            attempt()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."} == files
    monkeypatch.setenv("TACIT_VAULT_PASSPHRASE", "a long enough passphrase")
    assert private.read(folder / "x.key") == KEY


def test_a_lost_keyring_is_never_made_anew_over_what_it_sealed(tmp_path: Path) -> None:
    folder = with_ring(tmp_path / "keys")
    private.write(folder / "x.key", KEY)
    ring = (folder / private.RING).read_bytes()
    (folder / private.RING).unlink()
    with pytest.raises(VaultError, match=r"expected vault\.keys in .* which opens x\.key, got none"):
        private.make_ring(folder)
    assert not (folder / private.RING).exists()
    (folder / private.RING).write_bytes(ring)
    (folder / private.RING).chmod(0o600)
    assert private.read(folder / "x.key") == KEY
    (folder / private.RING).chmod(0o644)
    with pytest.raises(VaultError, match="chmod 600"):
        private.read(folder / "x.key")


def test_keys_of_a_home_are_rotated_and_the_old_key_opens_none_of_them(tmp_path: Path, capsys: Any) -> None:
    folder = with_ring(tmp_path / "keys")
    (tmp_path / "ledger").mkdir()
    private.share_ring(folder, tmp_path / "ledger")
    private.write(folder / "x.key", KEY)
    private.write(tmp_path / "ledger" / "ledger.key", KEY)
    old = load_keyring(folder / private.RING, lambda: Passphrase("never asked for"))
    ring = str(folder / private.RING)
    assert tacit.main(["vault", "rotate", str(tmp_path), "--keys", ring, "--new-key", "--revoke", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["changed"]) == 2
    for path in (folder / "x.key", tmp_path / "ledger" / "ledger.key"):
        assert private.read(path) == KEY
        assert {wrap.kid for wrap in inspect(path).wraps}.isdisjoint(facts.kid for facts in old.facts)


def test_the_authoritys_key_is_sealed_without_a_passphrase_and_under_its_own_with_one(tmp_path: Path) -> None:
    folder = with_ring(tmp_path / "authority")
    made = Authority.create("demo", ["127.0.0.1"], now=1.7e9)
    made.write(folder)
    assert is_sealed(folder / "ca.key")
    assert Authority.read(folder).certificate == made.certificate
    made.write(folder, "a passphrase")
    assert b"ENCRYPTED" in (folder / "ca.key").read_bytes()
    assert Authority.read(folder, "a passphrase").certificate == made.certificate


# -- kills -----------------------------------------------------------------------------------------------------------


class _Killed(BaseException):
    pass


_CALLS = ("fsync", "replace", "rename", "open", "unlink", "link", "symlink", "write")


def killed_at(step: int, do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Does something that is killed before its call number ``step`` to the system; returns whether it was done."""
    left, dead = [step], [False]
    with monkeypatch.context() as patch:
        for name in _CALLS:
            real = getattr(os, name)

            def call(*arguments: Any, real: Any = real, **more: Any) -> Any:
                # Once dead, nothing is cleaned up either.
                left[0] -= 1
                if dead[0] or left[0] < 0:
                    dead[0] = True
                    raise _Killed
                return real(*arguments, **more)

            patch.setattr(os, name, call)
        try:
            do()
        except _Killed:
            return False
    return not dead[0]


def sealed_at_last(folder: Path) -> None:
    """What a start does with a folder that an older Tacit left."""
    private.make_ring(folder)
    for name in ("a.key", "b.key"):
        private.seal(folder / name)


def lost_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kills the sealing of two keys before each of its calls; returns the steps after which a key could not be read."""
    lost, contents = [], {"a.key": KEY, "b.key": KEY[::-1]}
    for step in range(400):
        folder = tmp_path / str(step)
        folder.mkdir(mode=0o700)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o600)
        done = killed_at(step, lambda folder=folder: sealed_at_last(folder), monkeypatch)  # type: ignore[misc]
        private._opened.clear()
        try:
            assert {name: private.read(folder / name) for name in contents} == contents
            sealed_at_last(folder)
            assert {name: private.read(folder / name) for name in contents} == contents
            assert all(is_sealed(folder / name) for name in contents)
        except (TacitError, OSError, AssertionError):
            lost.append(step)
        shutil.rmtree(folder)
        if done:
            return lost
    raise AssertionError("it never ended")


def test_sealing_that_is_killed_anywhere_loses_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost_keys(tmp_path, monkeypatch) == []


def test_planted_bug_a_keyring_that_is_kept_after_what_it_sealed_loses_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(folder: Path) -> None:
        if not (folder / private.RING).exists():
            ring = Keyring()
            with monkeypatch.context() as patch:
                patch.setattr(private, "ring_beside", lambda path: ring)
                for name in ("a.key", "b.key"):
                    private.seal(folder / name)
            save_keys(folder / private.RING, ring, None)

    monkeypatch.setattr(sys.modules[__name__], "sealed_at_last", late)
    assert lost_keys(tmp_path, monkeypatch)


def test_planted_bug_a_file_that_is_written_over_in_place_loses_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place(path: Path, header: Any, recipients: Any, *parts: Any, replace: bool, **_: Any) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, private_bytes(header, recipients, *parts))
        os.close(descriptor)

    from privacy.vault.container import seal_bytes as private_bytes

    monkeypatch.setattr(private, "write_file", in_place)
    assert lost_keys(tmp_path, monkeypatch)


def test_a_new_secret_that_is_killed_anywhere_is_there_whole_or_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(200):
        folder = with_ring(tmp_path / str(step))
        done = killed_at(step, lambda folder=folder: Secret.load_or_create(folder / "x.key"), monkeypatch)  # type: ignore[misc]
        there = (folder / "x.key").exists()
        first = private.read(folder / "x.key") if there else b""
        assert len(first) in (0, 32)
        assert is_sealed(folder / "x.key") == there
        Secret.load_or_create(folder / "x.key")
        assert private.read(folder / "x.key") == first or not there
        if done:
            return
    raise AssertionError("it never ended")


# -- programs that take a name ---------------------------------------------------------------------------------------


PROGRAM = "import pathlib, sys; sys.stdout.buffer.write(pathlib.Path(sys.argv[1]).read_bytes())"


def test_a_program_that_takes_a_name_gets_the_key_opened_and_no_file_with_it_is_made(tmp_path: Path) -> None:
    folder = with_ring(tmp_path / "keys")
    private.write(folder / "supernode.key", KEY)
    become = (
        "import sys; from pathlib import Path; from privacy.processes import Part, become\n"
        f"become(Part(name='p', command=[sys.executable, '-c', {PROGRAM!r}, sys.argv[1]], opened=(Path(sys.argv[1]),)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", become, str(folder / "supernode.key")], capture_output=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, KEY), done.stderr
    # Twin: given the file itself, it reads what is sealed.
    plain = subprocess.run([sys.executable, "-c", PROGRAM, str(folder / "supernode.key")], capture_output=True)
    assert plain.stdout == (folder / "supernode.key").read_bytes() != KEY
    assert not [path for path in folder.iterdir() if KEY in path.read_bytes()]


def test_an_anonymous_file_is_inherited_by_nobody_who_was_not_told(tmp_path: Path) -> None:
    with private.anonymous(KEY) as descriptor:
        name = f"/proc/self/fd/{descriptor}"
        assert Path(name).read_bytes() == KEY
        assert Path(name).read_bytes() == KEY
        told = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, pass_fds=(descriptor,))
        untold = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, close_fds=False)
        assert (told.stdout, untold.returncode) == (KEY, 1)
    assert not Path(name).exists()


def test_a_key_is_given_to_a_program_and_to_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_ring(tmp_path / "keys")
    private.write(folder / "x.key", KEY)
    command = [sys.executable, "-m", "tacit", "vault", "open", str(folder / "x.key")]
    assert subprocess.run(command, capture_output=True, cwd=ROOT, timeout=60).stdout == KEY
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert tacit.main(command[3:]) == VaultError.exit_code


def test_others_may_not_read_a_clear_one(tmp_path: Path) -> None:
    path = tmp_path / "x.key"
    path.write_bytes(KEY)
    path.chmod(0o640)
    with pytest.raises(TacitError, match="chmod 600"):
        read_private(path)

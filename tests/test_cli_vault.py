"""The verb vault: from a folder to one sealed file and back, and keys that change."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tacit
from privacy.vault import command, container
from privacy.vault.container import BODY, Header, Wanted, inspect, read_file, write_file
from privacy.vault.keyfiles import load_keyring, save_keys
from privacy.vault.keys import Keyring, Passphrase

Says = Callable[..., tuple[int, str, str]]
PHRASE = "correct horse battery"


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEYS", "PASSPHRASE", "PASSPHRASE_FILE"):
        monkeypatch.delenv(f"TACIT_VAULT_{name}", raising=False)


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = tacit.main(["vault", *(str(argument) for argument in arguments)])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "clinic"
    (place / "train").mkdir(parents=True)
    (place / "schema.toml").write_text('target = "ill"')
    (place / "train" / "a.csv").write_bytes(os.urandom(50_000))
    return place


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    save_keys(tmp_path / "keys", Keyring(), None)
    return tmp_path / "keys"


@pytest.fixture
def phrase_file(tmp_path: Path) -> Path:
    path = tmp_path / "phrase"
    path.write_text(PHRASE + "\n")
    path.chmod(0o600)
    return path


def ring_of(keys: Path) -> Keyring:
    return load_keyring(keys, lambda: Passphrase(PHRASE))


def test_a_folder_is_sealed_as_one_file_and_comes_back(folder: Path, keys: Path, says: Says) -> None:
    code, out, _ = says("encrypt", folder, "--keys", keys)
    assert code == 0
    assert "still there in clear" in out
    sealed = folder.with_name("clinic.sealed")
    assert b"a.csv" not in sealed.read_bytes()
    assert b"target" not in sealed.read_bytes()
    code, _, err = says("decrypt", sealed, "--keys", keys)
    assert (code, "which is there" in err) == (8, True)
    code, out, _ = says("decrypt", sealed, "--keys", keys, "--out", folder.with_name("back"), "--json")
    assert (code, json.loads(out)["verified"]) == (0, True)
    assert (folder.with_name("back") / "train/a.csv").read_bytes() == (folder / "train/a.csv").read_bytes()


def test_a_file_is_sealed_under_a_passphrase_from_a_file_or_the_environment(
    folder: Path, phrase_file: Path, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sealed = folder / "train/a.csv", folder / "train/a.csv.sealed"
    assert says("encrypt", path, "--passphrase-file", phrase_file)[0] == 0
    code, _, err = says("encrypt", path, "--passphrase-file", phrase_file)
    assert (code, "a file that is there" in err) == (8, True)
    monkeypatch.setenv("TACIT_VAULT_PASSPHRASE", PHRASE)
    code, _, err = says("decrypt", sealed)
    assert (code, "a file that is there" in err) == (8, True)
    assert says("decrypt", sealed, "--out", folder / "b.csv")[0] == 0
    assert (folder / "b.csv").read_bytes() == path.read_bytes()
    assert (folder / "b.csv").stat().st_mode & 0o777 == 0o600
    assert says("decrypt", sealed, "--replace")[0] == 0
    monkeypatch.setenv("TACIT_VAULT_PASSPHRASE", "another passphrase")
    code, _, err = says("decrypt", sealed, "--out", folder / "c.csv")
    assert (code, "the passphrase is another one" in err) == (8, True)
    assert not (folder / "c.csv").exists()


def test_without_keys_nothing_is_done_and_a_command_line_takes_no_passphrase(folder: Path, says: Says) -> None:
    code, _, err = says("encrypt", folder)
    assert (code, "expected --keys KEYS or a passphrase" in err) == (8, True)
    assert not folder.with_name("clinic.sealed").exists()
    code, _, err = says("encrypt", folder, "--passphrase", PHRASE)
    assert code == 2
    code, _, err = says("keygen", folder.with_name("k"), "--passphrase")
    assert (code, "expected a terminal" in err) == (8, True)


def test_a_passphrase_is_asked_for_twice_and_never_shown(
    folder: Path, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([PHRASE, "something else", PHRASE, PHRASE, PHRASE])
    monkeypatch.setattr("getpass.getpass", lambda prompt, stream: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    code, _, err = says("encrypt", folder, "--passphrase")
    assert (code, "the same passphrase twice" in err) == (8, True)
    code, out, err = says("encrypt", folder, "--passphrase")
    assert (code, PHRASE in out + err) == (0, False)
    code, out, err = says("decrypt", folder.with_name("clinic.sealed"), "--out", folder.with_name("back"))
    assert (code, PHRASE in out + err) == (0, False)


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_a_passphrase_file_that_others_may_read_is_refused(
    folder: Path, phrase_file: Path, says: Says, mode: int
) -> None:
    phrase_file.chmod(mode)
    code, _, err = says("encrypt", folder, "--passphrase-file", phrase_file)
    assert (code, "chmod 600" in err) == (8, True)


def test_a_keyring_is_sealed_where_a_passphrase_is_given(tmp_path: Path, phrase_file: Path, says: Says) -> None:
    path = tmp_path / "sealed keys"
    code, out, _ = says("keygen", path, "--passphrase-file", phrase_file, "--json")
    assert (code, json.loads(out)["sealed"]) == (0, True)
    assert path.read_bytes().startswith(container.MAGIC)
    (tmp_path / "a").write_bytes(b"x")
    assert says("encrypt", tmp_path / "a", "--keys", path, "--passphrase-file", phrase_file)[0] == 0
    assert inspect(tmp_path / "a.sealed").wraps[0].kid == ring_of(path).active
    code, out, _ = says("inspect", path, "--passphrase-file", phrase_file)
    assert (code, "active" in out) == (0, True)
    assert says("keygen", path)[0] == 8


def test_recovery_opens_what_the_keyring_lost(tmp_path: Path, folder: Path, keys: Path, says: Says) -> None:
    assert says("keygen", tmp_path / "recovery", "--recovery")[0] == 0
    assert says("encrypt", folder, "--keys", keys, "--recovery", tmp_path / "recovery.pub")[0] == 0
    keys.unlink()
    sealed = tmp_path / "clinic.sealed"
    assert says("decrypt", sealed, "--keys", tmp_path / "recovery", "--out", tmp_path / "back")[0] == 0
    code, _, err = says("encrypt", folder, "--keys", tmp_path / "recovery", "--out", tmp_path / "x")
    assert (code, "name its .pub" in err) == (8, True)
    code, _, err = says("encrypt", folder, "--recovery", tmp_path / "recovery", "--out", tmp_path / "x")
    assert code == 8


# -- generations -----------------------------------------------------------------------------------------------------


def test_a_replaced_file_is_the_next_generation_and_an_old_copy_is_found(folder: Path, keys: Path, says: Says) -> None:
    sealed = folder.with_name("clinic.sealed")
    says("encrypt", folder, "--keys", keys)
    old, first = sealed.read_bytes(), inspect(sealed).header
    assert says("encrypt", folder, "--keys", keys, "--replace")[0] == 0
    second = inspect(sealed).header
    assert (second.object, second.generation) == (first.object, 2)
    wish = ("--object", first.object, "--at-least", 2, "--purpose", "data")
    assert says("decrypt", sealed, "--keys", keys, "--out", folder.with_name("a"), *wish)[0] == 0
    sealed.write_bytes(old)
    code, _, err = says("decrypt", sealed, "--keys", keys, "--out", folder.with_name("b"), *wish)
    assert (code, "another version was put in its place" in err) == (8, True)
    assert not folder.with_name("b").exists()


def test_the_folder_that_one_stands_in_is_sealed_beside_itself(
    folder: Path, keys: Path, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert says("encrypt", ".", "--keys", keys)[0] == 0
    monkeypatch.chdir(folder / "train")
    assert says("encrypt", "..", "--keys", keys, "--replace")[0] == 0
    assert inspect(folder.with_name("clinic.sealed")).header.generation == 2


def test_a_sealed_file_of_strangers_is_not_gone_on_with(folder: Path, keys: Path, says: Says) -> None:
    sealed = folder.with_name("clinic.sealed")
    write_file(sealed, Header(purpose="data", generation=2**52), [Keyring()], b"x")
    assert says("encrypt", folder, "--keys", keys, "--replace")[0] == 0
    assert inspect(sealed).header.generation == 1
    code, _, err = says("encrypt", sealed, "--keys", keys)
    assert (code, "got a sealed file" in err) == (8, True)


# -- rotation --------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path, keys: Path) -> list[Path]:
    (tmp_path / "files" / "deep").mkdir(parents=True)
    paths = [tmp_path / "files" / name for name in ("a", "b", "deep/c", "deep/d")]
    for path in paths:
        write_file(path, Header(purpose="data"), [ring_of(keys)], path.name.encode() * 20_000)
    (tmp_path / "files" / "clear.txt").write_bytes(b"clear")
    (tmp_path / "files" / "link").symlink_to(paths[0])
    return paths


def test_rotation_moves_every_file_to_a_new_key_and_touches_no_body(
    tmp_path: Path, keys: Path, many: list[Path], says: Says
) -> None:
    bodies = [path.read_bytes()[BODY:] for path in many]
    # What another process is writing just now, or a killed one left.
    (tmp_path / "files" / f".a.{'0' * 16}.new").write_bytes(many[0].read_bytes()[:5000])
    code, out, _ = says("rotate", tmp_path / "files", "--keys", keys, "--new-key", "--json")
    told = json.loads(out)
    assert (code, len(told["changed"]), told["unchanged"], told["failed"]) == (0, 4, 0, {})
    ring = ring_of(keys)
    assert {inspect(path).wraps[0].kid for path in many} == {ring.active} == {told["key"]}
    assert [path.read_bytes()[BODY:] for path in many] == bodies
    code, out, _ = says("rotate", tmp_path / "files", "--keys", keys)
    assert (code, out) == (0, "0 files changed, 4 had the right keys, 0 failed\n")
    code, out, _ = says("rotate", tmp_path / "files", "--keys", keys, "--revoke", "--json")
    assert len(json.loads(out)["revoked"]) == 1
    assert [facts.state for facts in ring_of(keys).facts] == ["revoked", "active"]
    assert read_file(many[2], [ring_of(keys)], Wanted()) == b"c" * 20_000


class _Killed(BaseException):
    pass


def test_a_rotation_that_is_killed_anywhere_goes_on_and_every_file_opens_all_the_time(
    tmp_path: Path, keys: Path, many: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each write and each sync, of the keyring's file too; then made again."""
    calls = ("pwrite", "fdatasync", "fsync", "replace")
    real = {name: getattr(os, name) for name in calls}

    def rotate(new_key: bool) -> dict[str, object]:
        return command.rotate(
            [tmp_path / "files"],
            keys,
            lambda: Passphrase(PHRASE),
            new_key=new_key,
            revoke=False,
            new_passphrase=None,
            recoveries=[],
            progress=lambda done, total: None,
        )

    finished = False
    for step in range(100):
        left = [step]
        with monkeypatch.context() as patch:
            for name in calls:

                def killed(*arguments: object, name: str = name, left: list[int] = left, **more: object) -> object:
                    left[0] -= 1
                    if left[0] < 0:
                        raise _Killed
                    return real[name](*arguments, **more)

                patch.setattr(os, name, killed)
            try:
                rotate(new_key=True)
                finished = True
            except _Killed:
                pass
        ring = ring_of(keys)
        assert all(read_file(path, [ring], Wanted()) == path.name.encode() * 20_000 for path in many)
        rotate(new_key=False)
        assert {inspect(path).wraps[0].kid for path in many} == {ring.active}
        assert not any(inspect(path).changing for path in many)
        if finished:
            break
    assert finished


def test_planted_bug_files_that_are_sealed_for_a_key_before_it_is_kept_are_found(
    keys: Path, many: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of `rotate`, turned round: the key that a killed rotation used is in nobody's keyring."""
    ring = ring_of(keys)
    ring.add()
    container.rewrap(many[0], [ring], command.to_active(ring))
    with pytest.raises(container.VaultError, match="expected a key"):
        read_file(many[0], [ring_of(keys)], Wanted())


def test_a_file_that_cannot_be_changed_is_told_and_keeps_older_keys_alive(
    tmp_path: Path, keys: Path, many: list[Path], says: Says
) -> None:
    data = bytearray(many[1].read_bytes())
    data[5000] ^= 1
    many[1].write_bytes(data)
    code, out, err = says("rotate", tmp_path / "files", "--keys", keys, "--new-key", "--revoke")
    assert (code, "3 files changed" in out, str(many[1]) in err, "revoked" in out) == (8, True, True, False)
    assert [facts.state for facts in ring_of(keys).facts] == ["decrypt-only", "active"]
    code, out, _ = says("inspect", tmp_path / "files", "--verify", "--keys", keys)
    assert (code, out.count("whole and unaltered")) == (8, 3)


def test_a_passphrase_is_changed_and_the_same_call_again_changes_nothing(
    tmp_path: Path, phrase_file: Path, says: Says
) -> None:
    other = tmp_path / "other"
    other.write_text("another passphrase")
    other.chmod(0o600)
    (tmp_path / "a").write_bytes(b"x")
    says("encrypt", tmp_path / "a", "--passphrase-file", phrase_file)
    sealed = tmp_path / "a.sealed"
    change = ("rotate", sealed, "--passphrase-file", phrase_file, "--new-passphrase-file", other)
    assert says(*change)[1].startswith("1 files changed")
    assert says(*change)[1].startswith("0 files changed, 1 had")
    assert read_file(sealed, [Passphrase("another passphrase")], Wanted()) == b"x"
    assert says("decrypt", sealed, "--passphrase-file", phrase_file, "--replace")[0] == 8


def test_the_keyring_itself_is_never_rotated_away_from_its_passphrase(
    tmp_path: Path, phrase_file: Path, says: Says
) -> None:
    path = tmp_path / "files" / "keys"
    path.parent.mkdir()
    says("keygen", path, "--passphrase-file", phrase_file)
    write_file(tmp_path / "files" / "a", Header(purpose="data"), [ring_of(path)], b"x")
    rotate = ("rotate", tmp_path / "files", "--keys", path, "--passphrase-file", phrase_file)
    code, out, _ = says(*rotate, "--new-key")
    assert (code, out.startswith("1 files changed, 0 had")) == (0, True)
    assert len(ring_of(path).facts) == 2


# -- looking ---------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_file_is_and_what_is_wrong_with_it(folder: Path, keys: Path, says: Says) -> None:
    says("encrypt", folder, "--keys", keys, "--run", "run-7")
    sealed = folder.with_name("clinic.sealed")
    code, out, _ = says("inspect", sealed, keys)
    assert code == 0
    for words in ("data, folder, generation 1", "run run-7", "sealed for", "active", "not verified"):
        assert words in out
    os.truncate(sealed, sealed.stat().st_size - 1)
    code, out, _ = says("inspect", sealed, "--verify", "--keys", keys, "--json")
    (row,) = json.loads(out)["files"]
    assert (code, row["verified"], "altered" in row["fault"]) == (8, False, True)
    code, _, err = says("inspect", folder)
    assert (code, "expected sealed files, got none" in err) == (8, True)


def test_nothing_in_clear_is_left_where_opening_failed(folder: Path, keys: Path, says: Says) -> None:
    path, sealed = folder / "train/a.csv", folder / "train/a.csv.sealed"
    path.write_bytes(os.urandom(3_000_000))
    says("encrypt", path, "--keys", keys)
    data = bytearray(sealed.read_bytes())
    data[-1] ^= 1
    sealed.write_bytes(data)
    path.unlink()
    assert says("decrypt", sealed, "--keys", keys)[0] == 8
    assert [entry.name for entry in sealed.parent.iterdir()] == [sealed.name]

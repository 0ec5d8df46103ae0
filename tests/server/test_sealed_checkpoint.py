"""Checkpoints that are sealed on request: the same state, for their keyring and their job only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import tacit
from privacy.errors import RunError, VaultError
from privacy.vault.container import Header, Wanted, inspect, is_sealed, read_file, write_file
from privacy.vault.keyfiles import load_keyring, save_keys
from privacy.vault.keys import Keyring
from server.checkpoint import Central, Newest, State, load, save

RING = Keyring()


def state_of(vault: Keyring | None = None) -> State:
    model = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    return State(
        job="ab" * 16,
        round=3,
        model=model,
        moments={"m": model},
        central=Central(clip=0.5, counted={1: 2}),
        lines={"x": 3},
        vault=vault,
    )


def test_a_sealed_checkpoint_is_the_clear_one(tmp_path: Path) -> None:
    save(state_of(), tmp_path / "clear")
    state = state_of(RING)
    save(state, tmp_path / "deep" / "sealed")
    save(state, tmp_path / "deep" / "sealed")
    assert inspect(tmp_path / "deep" / "sealed").header.generation == 2
    content = read_file(tmp_path / "deep" / "sealed", [RING], Wanted(purpose="checkpoint"))
    assert content == (tmp_path / "clear").read_bytes()
    back, clear = load(tmp_path / "deep" / "sealed", [RING]), load(tmp_path / "clear")
    assert np.array_equal(back.model["weight"], clear.model["weight"])
    assert (back.central, back.lines, back.generation, clear.generation) == (clear.central, clear.lines, 2, 0)


def test_a_checkpoint_of_another_job_or_purpose_or_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    save(state_of(RING), path)
    with pytest.raises(VaultError, match="expected a key"):
        load(path, [Keyring()])
    content = bytes(read_file(path, [RING], Wanted()))
    write_file(path, Header(purpose="data"), [RING], content, replace=True)
    with pytest.raises(VaultError, match="purpose"):
        load(path, [RING])
    # A whole checkpoint under a header that is not its own: what `run` and `object` say is checked against the content.
    write_file(path, Header(purpose="checkpoint"), [RING], content, replace=True)
    with pytest.raises(RunError, match="sealed as another job's"):
        load(path, [RING])
    # One in clear where a sealed one is wanted: whoever has no key can make that.
    save(state_of(), tmp_path / "clear")
    with pytest.raises(VaultError, match="got one in clear"):
        load(tmp_path / "clear", [RING])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VaultError, match="altered"):
        load(path, [RING])


def test_a_run_with_a_vault_keeps_no_checkpoint_in_clear_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TACIT_VAULT_KEYS", raising=False)
    keys, run = tmp_path / "keys", tmp_path / "run"
    flags = ["--clients", "2", "--rounds", "2", "--epsilon", "8", "--out", str(run), "--json"]
    assert tacit.main(["simulate", *flags, "--vault", str(keys)]) == 8
    assert "tacit vault keygen" in capsys.readouterr().err
    assert not run.exists()
    save_keys(keys, Keyring(), None)
    assert tacit.main(["simulate", *flags, "--vault", str(keys)]) == 0
    first = json.loads(capsys.readouterr().out)
    checkpoint = run / "checkpoints/latest.ckpt"
    assert is_sealed(checkpoint)
    assert not [path for path in run.rglob("*") if path.is_file() and b"tacit/checkpoint" in path.read_bytes()]
    # So are its keys, as a deployment's: the server's and the ledgers'. In a run without a vault they are 32 bytes.
    private_files = [run / "server.key", run / "ledgers" / "ledger.key"]
    assert all(map(is_sealed, private_files))
    # A new key for the run's files, and the run goes on: here to its end, which it reached already.
    assert tacit.main(["vault", "rotate", str(run), "--keys", str(keys), "--new-key", "--revoke"]) == 0
    for path in (checkpoint, *private_files):
        assert inspect(path).wraps[0].kid == load_keyring(keys, None).active, path  # type: ignore[arg-type]
    capsys.readouterr()
    assert tacit.main(["simulate", "--resume", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == first["metrics"]
    assert tacit.main(["report", str(run)]) == 0
    keys.rename(tmp_path / "lost")
    assert tacit.main(["report", str(run)]) == 8
    assert os.environ.get("TACIT_VAULT_KEYS") is None


def test_a_checkpoint_that_was_put_back_is_refused_by_who_remembers_the_newest(tmp_path: Path) -> None:
    ring, path, memory = Keyring(), tmp_path / "run" / "latest.ckpt", tmp_path / "home" / "newest"
    older = state_of(ring)
    older.newest = Newest(memory, ring, older.job)
    save(older, path)
    first = path.read_bytes()
    save(older, path)
    assert load(path, [ring], Newest(memory, ring, older.job)).generation == 2
    second = path.read_bytes()
    path.write_bytes(first)
    with pytest.raises(VaultError, match="another version was put in its place"):
        load(path, [ring], Newest(memory, ring, older.job))
    # The planted bug: nobody remembers, and the older one passes for the newest.
    assert load(path, [ring]).generation == 1
    # Killed between the two writes, the checkpoint is one ahead of what is remembered.
    path.write_bytes(second)
    older.newest = None
    save(older, path)
    assert load(path, [ring], Newest(memory, ring, older.job)).generation == 3
    # What remembers cannot be put back by itself either, file by file, nor exchanged with another job's.
    other = Newest(memory, ring, "another job")
    other.keep(1)
    files = sorted(memory.glob("*-*.sealed"))
    contents = [file.read_bytes() for file in files]
    assert len(files) == 2
    for file, content in zip(files, reversed(contents), strict=True):
        file.write_bytes(content)
    with pytest.raises(VaultError):
        _ = Newest(memory, ring, older.job).generation


def test_a_whole_memory_that_was_put_back_with_its_checkpoint_is_not_noticed_as_the_text_says(tmp_path: Path) -> None:
    ring, path, memory = Keyring(), tmp_path / "latest.ckpt", tmp_path / "newest"
    one = state_of(ring)
    one.newest = Newest(memory, ring, one.job)
    save(one, path)
    shutil.copytree(memory, tmp_path / "before")
    first = path.read_bytes()
    save(one, path)
    # While the process lives, its shelf remembers.
    shutil.rmtree(memory)
    shutil.copytree(tmp_path / "before", memory)
    path.write_bytes(first)
    with pytest.raises(VaultError):
        load(path, [ring], one.newest)
    assert load(path, [ring], Newest(memory, ring, one.job)).generation == 1

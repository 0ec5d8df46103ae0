"""Starts that are killed or that fail: what they leave, what may go on from it, and what is never removed.

A kill is a `BaseException` raised instead of a durable operation: nothing that handles errors sees it, as nothing that
handles errors runs after ``kill -9``. A fault is an `OSError` of a disk that is full from some operation on.
"""

import contextlib
import dataclasses
import os
import shutil

import pytest

from models.catalog import TASKS
from privacy.errors import RunError, TacitError
from privacy.ledger import Book, ChargeRequest
from server.app import CHECKPOINT
from simulations import world as world_module
from simulations.scenario import CONFIG_FILE, Scenario
from simulations.world import JOB_FILE, World, _charged, _forget, _free, _unsettled, populate, settle

OPERATIONS = ("write", "fsync", "replace", "link", "mkdir")


class Killed(BaseException):
    """Stands for a process that is no more."""


@pytest.fixture(scope="module")
def scenario():
    return Scenario.layered(None, {"clients": 2, "rounds": 2, "steps-per-round": 1, "mode": "hooks"})


@pytest.fixture(scope="module")
def prepared(scenario):
    """The data, split, and the settled plan; where a start is killed depends on neither, so all tests share them."""
    task = TASKS[scenario.task]
    source, population = populate(scenario, task)
    return (source, population), settle(scenario.resolved(source.declared_records), task, population.shape)


@pytest.fixture(autouse=True)
def _settled_once(prepared, monkeypatch):
    monkeypatch.setattr(world_module, "populate", lambda *_: prepared[0])
    monkeypatch.setattr(world_module, "settle", lambda *_: prepared[1])


@contextlib.contextmanager
def stopped_at(number, error):
    """Raises instead of the given durable operation, and of every later one if it is a full disk; counts all."""
    done = [0]

    def counted(operation):
        def call(*args, **kwargs):
            done[0] += 1
            if done[0] == number or (done[0] > number > 0 and isinstance(error, OSError)):
                raise error
            return operation(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, counted(getattr(os, name)))
        yield done


def operations_of_a_start(scenario, folder):
    with stopped_at(0, Killed()) as done:
        started(scenario, folder)
    return done[0]


def tree(folder):
    """Everything under a folder, with the content of files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def started(scenario, folder, *, charged=False):
    """Lets a start go through; with a charge, as its first round makes it."""
    world = World.create(scenario, folder)
    if charged:
        plan = world.settled.plan
        request = ChargeRequest(name=world.name_of(0), job="ab" * 16, round=1, request="cd" * 32, plan=plan)
        assert world.book.charge([request])[0].charges == 1
    world.book.close()


# -- killed -----------------------------------------------------------------------------------------------------


def require_startable_after_each_kill(scenario, tmp_path):
    """Kills a start at each of its durable operations; fails unless the same folder then takes a whole start."""
    total = operations_of_a_start(scenario, tmp_path / "whole")
    assert total > 10
    stages = set()
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        with pytest.raises(Killed), stopped_at(number, Killed()):
            World.create(scenario, folder)
        stages.add(stage_of(folder))
        if stage_of(folder) in ("unsettled", "settled"):
            # What --resume does: the folder says itself what was to be started.
            World.open(folder, scenario=Scenario.from_run(folder)).book.close()
        else:
            started(scenario, folder)
        assert (folder / CONFIG_FILE).exists()
        assert (folder / JOB_FILE).exists()
        with Book(folder / "ledgers") as book:
            assert len(book.accounts) == 2
            assert all(account.charges == 0 for account in book.accounts.values())
    return stages


def stage_of(folder):
    """Says how far a start came; each stage is told by one function, and by no other."""
    if not folder.exists():
        return "nothing made"
    if (folder / JOB_FILE).exists():
        return "settled"
    told = [question.__name__.strip("_") for question in (_free, _unsettled) if question(folder)]
    assert len(told) == 1, f"{sorted(tree(folder))} is {told}"
    return told[0]


def test_a_start_killed_at_any_stage_leaves_a_folder_that_starts_again(scenario, tmp_path):
    stages = require_startable_after_each_kill(scenario, tmp_path)
    assert stages == {"nothing made", "free", "unsettled", "settled"}


@pytest.mark.parametrize(
    ("name", "forgetful"),
    [
        ("_free", lambda folder: False),
        ("_free", lambda folder: not any(folder.iterdir())),
        ("_unsettled", lambda folder: False),
        ("_unsettled", lambda folder: (folder / CONFIG_FILE).exists() and not (folder / "ledgers").exists()),
    ],
)
def test_planted_bug_a_stage_that_nobody_recognises_blocks_its_folder(scenario, tmp_path, monkeypatch, name, forgetful):
    monkeypatch.setattr(world_module, name, forgetful)
    with pytest.raises(RunError, match=r"in use|run folder with job\.json"):
        require_startable_after_each_kill(scenario, tmp_path)


# -- what each question answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "free", "unsettled"),
    [
        ([], True, False),
        ([".config.json.4711.new"], True, False),
        ([".config.json.4711.new", ".config.json.12.new"], True, False),
        ([".config.json.4711.new", "notes.txt"], False, False),
        (["notes.txt"], False, False),
        ([".job.json.4711.new"], True, False),
        (["ledgers/ledger.key", "ledgers/.ledger.key.0a"], True, False),
        (["ledgers/ledger.key", "ledgers/notes.txt"], False, False),
        ([CONFIG_FILE], False, True),
        ([CONFIG_FILE, "ledgers/ledger.key"], False, True),
        ([CONFIG_FILE, "ledgers/ledger.jsonl", ".job.json.4711.new"], False, True),
        ([CONFIG_FILE, JOB_FILE], False, False),
        ([CONFIG_FILE, CHECKPOINT], False, False),
        ([JOB_FILE], False, False),
    ],
    ids=lambda value: " ".join(value) or "empty" if isinstance(value, list) else "",
)
def test_a_folder_is_free_or_unsettled_only_where_a_start_left_it_so(tmp_path, scenario, files, free, unsettled):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    if CONFIG_FILE in files:
        scenario.save(tmp_path)
    assert (_free(tmp_path), _unsettled(tmp_path)) == (free, unsettled)
    assert not _charged(tmp_path)


def test_a_folder_that_is_not_there_or_is_a_file_is_neither_free_nor_unsettled(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "absent", tmp_path / "file"):
        assert not _free(path)
        assert not _unsettled(path)
        assert not _charged(path)


def test_ledgers_are_charged_from_their_first_charge_and_never_unsettled_again(scenario, tmp_path):
    for charged in (False, True):
        folder = tmp_path / str(charged)
        started(scenario, folder, charged=charged)
        (folder / JOB_FILE).unlink()
        # Grants alone cost nobody anything.
        assert b'"kind":"grant"' in (folder / "ledgers/ledger.jsonl").read_bytes()
        assert (_charged(folder), _unsettled(folder)) == (charged, not charged)


# -- failed -----------------------------------------------------------------------------------------------------


def require_nothing_left(scenario, tmp_path):
    """Fills the disk at each durable operation of a start; fails unless the start fails and leaves nothing."""
    total = operations_of_a_start(scenario, tmp_path / "whole")
    for number in range(1, total + 1):
        folder = tmp_path / "failed" / str(number)
        with pytest.raises(TacitError, match="expected"), stopped_at(number, OSError(28, "No space left on device")):
            World.create(scenario, folder)
        assert not folder.exists(), f"operation {number} of {total} left {sorted(tree(folder))}"


def test_a_failed_start_leaves_nothing_behind_wherever_it_failed(scenario, tmp_path):
    require_nothing_left(scenario, tmp_path)


def test_planted_bug_a_failed_start_that_forgets_nothing_leaves_its_folder(scenario, tmp_path, monkeypatch):
    monkeypatch.setattr(world_module, "_forget", lambda folder, made: None)
    with pytest.raises(AssertionError, match="left"):
        require_nothing_left(scenario, tmp_path)


def test_a_failed_start_in_an_empty_folder_leaves_it_empty(scenario, tmp_path, monkeypatch):
    monkeypatch.setattr(World, "_require_budget", _fail)
    with pytest.raises(RunError, match="a fault"):
        World.create(scenario, tmp_path)
    assert tree(tmp_path) == {}


def test_a_failed_start_after_a_killed_one_removes_what_both_wrote(scenario, tmp_path, monkeypatch):
    started(scenario, tmp_path)
    (tmp_path / JOB_FILE).unlink()
    monkeypatch.setattr(World, "_require_budget", _fail)
    with pytest.raises(RunError, match="a fault"):
        World.create(scenario, tmp_path)
    assert tree(tmp_path) == {}


def _fail(self):
    raise RunError("expected no fault, got a fault; this is a test")


def test_shared_ledgers_are_not_touched_by_a_failed_start(scenario, prepared, tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    Book(shared).close()
    before = tree(shared)
    monkeypatch.setattr(world_module, "settle", lambda *_: dataclasses.replace(prepared[1], ledgers=str(shared)))
    monkeypatch.setattr(World, "_require_bound", lambda self, name, records: _fail(self))
    with pytest.raises(RunError, match="a fault"):
        World.create(scenario, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert tree(shared) == before


# -- never removed ------------------------------------------------------------------------------------------------


def require_kept(scenario, folder, name):
    """Lets a start fail in a folder that holds something; fails unless that is still there, byte for byte."""
    before = tree(folder)
    with pytest.raises(RunError):
        World.create(scenario, folder)
    _forget(folder, made=True)
    _forget(folder, made=False)
    after = tree(folder)
    kept = {path: content for path, content in before.items() if path.startswith(name)}
    assert kept
    assert {path: after.get(path) for path in kept} == kept, f"{name} was removed or changed"


def a_charged_folder(scenario, folder):
    """Leaves ledgers that were paid from in a folder that otherwise looks as if a start was killed in it."""
    started(scenario, folder, charged=True)
    (folder / JOB_FILE).unlink()


def test_a_failed_start_never_removes_ledgers_that_hold_a_charge(scenario, tmp_path):
    a_charged_folder(scenario, tmp_path)
    require_kept(scenario, tmp_path, "ledgers")


def test_planted_bug_a_clean_up_that_does_not_look_for_charges_removes_them(scenario, tmp_path, monkeypatch):
    a_charged_folder(scenario, tmp_path)
    monkeypatch.setattr(world_module, "_charged", lambda folder: False)
    monkeypatch.setattr(World, "_require_budget", _fail)
    with pytest.raises(AssertionError, match="ledgers was removed"):
        require_kept(scenario, tmp_path, "ledgers")


def test_a_failed_start_never_removes_files_that_are_not_its_own(scenario, tmp_path):
    for name in ("notes.txt", "data/table.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    require_kept(scenario, tmp_path, "notes.txt")
    require_kept(scenario, tmp_path, "data")


def test_a_file_that_appears_during_a_failed_start_stays_and_so_does_its_folder(scenario, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def fail(self):
        (folder / "notes.txt").write_text("mine")
        _fail(self)

    monkeypatch.setattr(World, "_require_budget", fail)
    with pytest.raises(RunError, match="a fault"):
        World.create(scenario, folder)
    assert tree(folder) == {"notes.txt": b"mine"}


def test_planted_bug_a_clean_up_that_removes_the_whole_folder_takes_what_is_not_its_own(
    scenario, tmp_path, monkeypatch
):
    monkeypatch.setattr(world_module, "_forget", lambda folder, made: shutil.rmtree(folder))
    with pytest.raises(AssertionError):
        test_a_file_that_appears_during_a_failed_start_stays_and_so_does_its_folder(scenario, tmp_path, monkeypatch)


def test_a_start_refuses_a_folder_whose_config_is_somebody_elses(scenario, tmp_path):
    (tmp_path / CONFIG_FILE).write_text('{"model_type": "bert"}')
    before = tree(tmp_path)
    with pytest.raises(RunError, match="in use"):
        World.create(scenario, tmp_path)
    assert tree(tmp_path) == before


def test_a_failed_start_never_removes_a_strangers_file_beside_its_own_ledgers(scenario, tmp_path, monkeypatch):
    started(scenario, tmp_path)
    (tmp_path / JOB_FILE).unlink()
    (tmp_path / "ledgers/notes.txt").write_text("mine")
    monkeypatch.setattr(World, "_require_budget", _fail)
    require_kept(scenario, tmp_path, "ledgers/notes.txt")


def test_a_folder_starts_again_after_a_kill_while_its_job_was_written_and_a_failed_start(
    scenario, tmp_path, monkeypatch
):
    scenario.save(tmp_path)
    (tmp_path / f".{JOB_FILE}.4711.new").write_bytes(b"{")
    with monkeypatch.context() as patch:
        patch.setattr(World, "_require_budget", _fail)
        with pytest.raises(RunError, match="a fault"):
            World.create(scenario, tmp_path)
    started(scenario, tmp_path)


def test_a_folder_starts_again_after_a_kill_during_the_clean_up(scenario, tmp_path):
    started(scenario, tmp_path)
    for name in (JOB_FILE, CONFIG_FILE):
        (tmp_path / name).unlink()
    started(scenario, tmp_path)


def test_a_ledger_that_was_cut_to_its_grants_is_not_removed(scenario, tmp_path, monkeypatch):
    started(scenario, tmp_path)
    granted = (tmp_path / "ledgers/ledger.jsonl").read_bytes()
    (tmp_path / JOB_FILE).unlink()
    (tmp_path / CONFIG_FILE).unlink()
    shutil.rmtree(tmp_path / "ledgers")
    started(scenario, tmp_path, charged=True)
    path = tmp_path / "ledgers/ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(granted.splitlines()) == 2
    path.write_bytes(b"".join(lines[:2]))
    (tmp_path / JOB_FILE).unlink()
    monkeypatch.setattr(Scenario, "save", lambda self, folder: _fail(self))
    require_kept(scenario, tmp_path, "ledgers")

"""The command: what it prints, what it refuses, how it ends, and how fast it opens."""

import io
import json
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import tacit
from privacy.errors import BudgetExceeded, DataError, LedgerError, RunError
from simulations.scenario import GROUPS, KEYS, Scenario

ROOT = Path(__file__).parents[1]
SUMMARY: dict[str, object] = {
    "status": "completed",
    "rounds": 2,
    "metrics": {"accuracy": 0.8731, "loss": 0.5},
    "epsilon": 2.97,
    "epsilon_replace_one": 5.61,
    "delta": 1e-5,
    "seconds": 4.1,
    "run": "runs/example",
    "report": "runs/example/report.html",
}
PLAN = {
    "epsilon": 3.0,
    "rounds": 2,
    "steps": 4,
    "joins": 3,
    "sample_rate": 0.2,
    "l2_clip": 1.0,
    "noise_multiplier": 1.23456,
}


def line(number: int, **changes: object) -> dict[str, object]:
    fields: dict[str, object] = {
        "round": number,
        "rounds": 2,
        "metrics": {"accuracy": 0.3 * number},
        "epsilon": 1.4 * number,
        "budget": 3.0,
        "replies": 10,
        "declined": 0,
        "missing": 0,
        "seconds": 0.125,
        "left_s": 75.0,
    }
    return fields | changes


class Job:
    """Stands in for the simulation: remembers what it was asked, then plays a run of two rounds."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self.lines = [line(1), line(2)]
        self.summary = dict(SUMMARY)

    def simulate(
        self, scenario: Scenario, *, out: Path | None, resume: Path | None, observer: Any
    ) -> Mapping[str, object]:
        self.asked = {"scenario": scenario, "out": out, "resume": resume}
        observer.started({"plan": PLAN, "run": "runs/example", "engine": "local", "device": "cpu"})
        observer.round(self.lines[0])
        observer.note("client 3 [was] late")
        if self.failure is not None:
            raise self.failure
        for later in self.lines[1:]:
            observer.round(later)
        observer.finished(self.summary)
        return self.summary

    def render(self, folder: Path) -> Path:
        return folder / "report.html"


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    fake = Job()
    module = types.ModuleType("simulations.run")
    module.simulate = fake.simulate  # type: ignore[attr-defined]
    module.render = fake.render  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "simulations.run", module)
    return fake


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = tacit.main(arguments)
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


# Opening.


def test_help_opens_in_under_a_second_without_the_heavy_libraries() -> None:
    heavy = "torch,flwr,opacus,ray,sklearn,numpy,scipy,dp_accounting,cryptography,pyarrow,rich"
    program = (
        "import sys, tacit\n"
        "codes = [tacit.main(['--help']), tacit.main(['simulate', '--help']), tacit.main([])]\n"
        "dir(tacit), tacit.Scenario, tacit.PlanError, tacit.Plan\n"
        f"print([name for name in '{heavy}'.split(',') if name in sys.modules], codes)\n"
    )
    seconds = []
    for _ in range(3):  # The fastest of three: other processes can only slow it down.
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - started)
    assert done.stdout.splitlines()[-1] == "[] [0, 0, 0]"
    assert min(seconds) < 1.0


def test_the_public_surface_is_small_and_each_name_is_there(job: Job) -> None:
    assert set(tacit.__all__) == {
        "BudgetExceeded",
        "DataError",
        "LedgerError",
        "Plan",
        "PlanError",
        "RunError",
        "Scenario",
        "TacitError",
        "Task",
        "main",
        "simulate",
    }
    for name in tacit.__all__:
        assert getattr(tacit, name) is not None
    assert tacit.Scenario is Scenario
    with pytest.raises(AttributeError, match="has no attribute 'Simulate'"):
        tacit.Simulate  # noqa: B018


def test_the_version_is_that_of_the_distribution(says) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert says("--version") == (0, f"tacit {project['version']}\n", "")


def test_the_page_of_simulate_lists_every_key_under_its_group_with_its_default(says) -> None:
    code, page, _ = says("simulate", "--help")
    assert code == 0
    for title in GROUPS:
        assert f"\n{title}:\n" in page
    for key in KEYS:
        assert f"--{key.name} " in page
    assert "default 1e-05" in page
    assert "examples:" in page
    assert "TOML" in page
    assert max(map(len, page.splitlines())) <= 112


@pytest.mark.parametrize("verb", ["tasks", "report", "simulate"])
def test_every_verb_has_a_page_and_is_listed(says, verb: str) -> None:
    assert f"    {verb} " in says("--help")[1]
    code, page, _ = says(verb, "--help")
    assert code == 0
    assert page.startswith(f"usage: tacit {verb}")


# Saying what is meant.


def test_flags_and_a_file_say_the_same_things(job: Job, says, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text("[job]\nrounds = 5\nseed = 7\n[privacy]\nepsilon = 2.5\ndelta = 1e-6\n")
    assert says("simulate", str(file), "--quiet")[0] == 0
    from_file = job.asked["scenario"]
    says("simulate", "--rounds", "5", "--seed=7", "--epsilon", "2.5", "--delta", "1e-6", "--quiet")
    assert job.asked["scenario"] == from_file
    says("simulate", str(file), "--rounds", "9", "--retries", "-1", "--quiet")
    assert job.asked["scenario"].rounds == 9
    assert job.asked["scenario"].seed == 7


def test_every_key_of_a_scenario_is_a_flag(job: Job, says) -> None:
    arguments = [
        f"--{key.name}={key.default}" for key in KEYS if key.name in ("clients", "rounds", "device", "out", "mode")
    ]
    assert says("simulate", *arguments, "--quiet")[0] == 0
    for key in KEYS:
        code, _, err = says("simulate", f"--{key.name}=?", "--app", "x")
        assert code == 2
        assert "expected a flag" not in err


def test_the_out_folder_reaches_the_simulation(job: Job, says, tmp_path: Path) -> None:
    says("simulate", "--quiet")
    assert job.asked["out"] is None
    says("simulate", "--quiet", "--out", str(tmp_path))
    assert job.asked["out"] == tmp_path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["simulat"], "did you mean 'simulate'"),
        (["frobnicate"], "'tacit --help' lists them"),
        (["simulate", "--epsilonn", "3"], "did you mean '--epsilon'"),
        (["simulate", "--eps", "3"], "expected a flag of tacit simulate, got '--eps'"),
        (["simulate", "--rounds"], "--rounds: expected one argument"),
        (["simulate", "--rounds", "x"], "expected rounds to be a whole number, got 'x'"),
        (["simulate", "--epsilon", "0"], "expected epsilon > 0"),
        (["simulate", "--epsilon", "-1"], "expected epsilon >= 0"),
        (["simulate", "--cohort", "11"], "expected cohort <= clients"),
        (["simulate", "--task", "digitz"], "did you mean 'digits'"),
        (["simulate", "absent.toml"], "expected a scenario file"),
        (
            ["simulate", "--epsilon", "3", "--noise-multiplier", "1"],
            "expected epsilon or noise-multiplier, got both",
        ),
        (["simulate", "--app-config", "a=1"], "expected --app-config only with --app"),
        (
            ["simulate", "--app", "x", "--epsilon", "3"],
            "expected --app with --clients, --workers and --threads only",
        ),
        (["simulate", "--app", "x", "--app-config", "lr"], "expected --app-config KEY=VALUE"),
        (["simulate", "--app", "x", "--resume", "y"], "expected --app without resume"),
        (["report"], "the following arguments are required: RUN"),
        (["tasks", "--jsn"], "did you mean '--json'"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence_and_exit_code_2(
    job: Job, says, arguments: list[str], sentence: str
) -> None:
    code, out, err = says(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tacit: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert job.asked == {}


# How a run ends.


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (DataError("expected A, got B"), 3),
        (LedgerError("expected A, got B"), 4),
        (BudgetExceeded("expected A, got B"), 5),
        (RunError("expected A, got B"), 6),
        (OSError(28, "No space left on device", "runs/example/metrics.jsonl"), 6),
        (ZeroDivisionError("division\nby zero"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("flag", ["--json", "--quiet", "--clients=10"])
def test_a_failure_is_one_sentence_with_its_own_exit_code(job: Job, says, failure, code: int, flag: str) -> None:
    job.failure = failure
    got, out, err = says("simulate", flag)
    assert got == code
    assert err.count("\n") == 1
    assert err.startswith("tacit: ")
    assert "Traceback" not in err
    if flag != "--clients=10":
        assert out == ""
    if code == 1:
        assert "ZeroDivisionError: division by zero; run again with TACIT_TRACE=1" in err
    if code == 6 and isinstance(failure, OSError):
        assert "No space left on device" in err
        assert "metrics.jsonl" in err


def test_a_traceback_is_shown_on_request(job: Job, says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TACIT_TRACE", "1")
    job.failure = ZeroDivisionError("x")
    code, _, err = says("simulate")
    assert code == 1
    assert "Traceback" in err
    assert "raise self.failure" in err


def test_ctrl_c_says_how_to_go_on(job: Job, says) -> None:
    job.failure = KeyboardInterrupt()
    assert "tacit simulate --resume runs/example" in says("simulate")[2]
    job.failure = None
    job.summary["status"] = "interrupted"
    code, out, err = says("simulate", "--json")
    assert code == 130
    assert json.loads(out)["status"] == "interrupted"
    assert "tacit simulate --resume runs/example" in err


def test_a_reader_who_leaves_early_ends_the_program_quietly() -> None:
    command = f"'{sys.executable}' -m tacit simulate --help | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: tacit simulate")
    assert done.stderr == ""


# Going on.


def saved(folder: Path, **fields: Any) -> Path:
    Scenario(**fields).save(folder)
    return folder


def test_resume_takes_the_scenario_from_the_run_folder(job: Job, says, tmp_path: Path) -> None:
    folder = saved(tmp_path, rounds=9, out="elsewhere")
    assert says("simulate", "--resume", str(folder), "--quiet")[0] == 0
    assert job.asked["scenario"].rounds == 9
    assert job.asked["resume"] == folder
    assert job.asked["out"] is None


def test_resume_accepts_what_agrees_and_where_it_runs_and_refuses_the_rest(job: Job, says, tmp_path: Path) -> None:
    folder = saved(tmp_path, rounds=9)
    assert says("simulate", "--resume", str(folder), "--rounds", "9", "--workers", "2", "--quiet")[0] == 0
    assert job.asked["scenario"] == Scenario(rounds=9, workers=2)
    code, _, err = says("simulate", "--resume", str(folder), "--rounds", "10")
    assert code == 6
    assert "got rounds=10 where it has 9" in err


def test_resume_of_a_folder_that_is_no_run_is_refused(job: Job, says, tmp_path: Path) -> None:
    code, _, err = says("simulate", "--resume", str(tmp_path))
    assert code == 6
    assert "expected a run folder" in err


# What a person sees.


def test_elsewhere_than_on_a_terminal_a_round_is_a_line(job: Job, says) -> None:
    code, out, err = says("simulate")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "round 1/2  accuracy 30.0 %  epsilon 1.40 of 3.00  replies 10  0.12 s  1:15 min left" in lines
    assert "client 3 [was] late" in lines
    assert "\x1b" not in out
    assert all(text == text.rstrip() for text in lines)
    assert lines[0].split() == ["task", "digits"]
    assert any(text.startswith("promise     epsilon 3 at delta 1e-05 for each client") for text in lines)
    assert "schedule    2 rounds of 4 steps; the noise also covers 1 spare charge for retries" in lines
    assert any(text.endswith("noise 1.23 x clip") for text in lines)


def test_the_closing_summary_gives_both_adjacencies_and_the_report(job: Job, says) -> None:
    _, out, _ = says("simulate", "--quiet")
    assert "Completed." in out
    assert "accuracy    87.3 %" in out
    assert "2.97 at delta 1e-05 for each client, add or remove one record" in out
    assert "5.61 at delta 1e-05 for each client, replace one record" in out
    assert (Path.cwd() / "runs/example/report.html").as_uri() in out
    assert "round 1/2" not in out
    job.summary |= {"epsilon_spent": 2.99, "budget": 3.0}
    assert "ledgers     2.99 of 3.00 spent" in says("simulate", "--quiet")[1]


def test_json_is_one_object_and_nothing_else(job: Job, says) -> None:
    assert json.loads(says("simulate", "--json")[1]) == SUMMARY
    job.summary |= {"epsilon": math.inf, "epsilon_replace_one": math.nan, "run": Path("runs/example")}
    parsed = json.loads(says("simulate", "--json")[1])
    assert (parsed["epsilon"], parsed["epsilon_replace_one"], parsed["run"]) == (
        "infinity",
        "unknown",
        "runs/example",
    )


@pytest.mark.parametrize(("epsilon", "words"), [(None, "unknown"), (math.inf, "infinite"), (math.nan, "unknown")])
def test_an_epsilon_that_is_not_known_is_never_shown_as_a_number(job: Job, says, epsilon: Any, words: str) -> None:
    job.lines = [line(1, epsilon=epsilon), line(2, epsilon=epsilon)]
    job.summary |= {"epsilon": epsilon, "epsilon_replace_one": epsilon}
    out = says("simulate")[1]
    assert f"epsilon {words} of 3.00" in out
    assert f"{words} at delta 1e-05 for each client, add or remove one record" in out


def test_clients_that_decline_or_are_missing_are_shown(job: Job, says) -> None:
    job.lines[1] = line(2, replies=7, declined=2, missing=1)
    out = says("simulate")[1]
    assert "replies 7  declined 2  missing 1" in out
    assert out.count("declined") == 1


def test_rounds_without_an_evaluation_keep_the_last_figure(job: Job, says) -> None:
    job.lines = [line(1, metrics={}), line(2)]
    out = says("simulate")[1]
    assert "round 1/2  not evaluated yet" in out
    job.lines = [line(1), line(2, metrics={})]
    assert "round 2/2  accuracy 30.0 %" in says("simulate")[1]


def test_on_a_terminal_the_live_block_shows_round_accuracy_epsilon_and_time_left() -> None:
    from rich.console import Console

    display = tacit._Display(Scenario())
    display.console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False, color_system=None)
    with display.console.capture() as early:
        display.console.print(display)
    assert "preparing" in early.get()
    display.round(line(1))
    display.round(line(2, declined=1))
    with display.console.capture() as later:
        display.console.print(display)
    rows = later.get().splitlines()
    assert "round 2/2" in rows[0]
    assert "left" in rows[0]
    assert "accuracy 60.0 %" in rows[1]
    assert "▁█" in rows[1]
    assert "declined 1" in rows[1]
    assert "epsilon 2.80 of 3.00" in rows[2]
    for unknown in (None, math.inf):
        display.round(line(2, epsilon=unknown, budget=math.inf))
        with display.console.capture() as odd:
            display.console.print(display)
        assert "of infinite" in odd.get()


def test_a_sparkline_goes_from_the_smallest_to_the_largest_value() -> None:
    assert tacit.sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert tacit.sparkline([5.0, 5.0], 10) == "▄▄"
    assert tacit.sparkline([1.0, 2.0, 3.0, math.nan], 2) == "▁█"
    assert tacit.sparkline([], 10) == ""
    assert tacit.sparkline([0.0, 1.0], 10, utf8=False) == "_#"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.9, "60 s"), (75, "1:15 min"), (3725, "1:02:05 h")],
)
def test_times_read_as_people_say_them(seconds: float, words: str) -> None:
    assert tacit._clock(seconds) == words


# The other verbs.


def test_tasks_lists_every_task_with_its_record(says) -> None:
    from models.catalog import TASKS

    code, out, _ = says("tasks")
    assert code == 0
    rows = json.loads(says("tasks", "--json")[1])
    assert list(rows) == list(TASKS)
    for name in TASKS:
        assert f"\n{name} " in out
    assert "package.module:attribute" in out


def test_report_writes_the_report_of_a_run_again(job: Job, says, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"epsilon": 1}')
    assert f"wrote {tmp_path / 'report.html'}" in says("report", str(tmp_path))[1]
    assert json.loads(says("report", str(tmp_path), "--json")[1]) == {"epsilon": 1}


def test_any_flower_app_runs_on_the_local_engine(says, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    engine = types.ModuleType("simulations.engine")
    engine.run_app = lambda directory, **options: asked.update(options, directory=directory)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "simulations.engine", engine)
    flags = ["--clients", "4", "--workers", "2", "--app-config", "lr=0.5", "--app-config", "name=abc"]
    code, out, _ = says("simulate", "--app", "quickstart", *flags)
    assert (code, asked["directory"]) == (0, Path("quickstart"))
    assert (asked["nodes"], asked["workers"], asked["threads"]) == (4, 2, 1)
    assert asked["overrides"] == {"lr": 0.5, "name": "abc"}
    assert "4 nodes of the local engine" in out
    assert json.loads(says("simulate", "--app", "quickstart", "--json")[1])["status"] == "completed"


def test_the_module_is_a_program(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tacit", "simulate", "--rounds", "x"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected rounds to be a whole number" in done.stderr

"""``tacit audit``: a task and a run, sound and broken, and what it leaves for a report."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tacit
from clients.data import load_source
from models.catalog import TASKS
from privacy import audit as audits
from privacy import ledger
from privacy.dpsgd import PrivateTrainer
from privacy.noise import Keystream, RandomSource
from simulations import audit as command
from simulations.evidence import render
from simulations.run import simulate
from simulations.scenario import Scenario

BOUNDS = ["gradient canaries", "gradient canaries, q=1", "many trainings, q=1", "example canaries"]
PROBES = ["sensitivity", "noise", "neighbours", "poisson", "accountant"]
Says = Callable[..., tuple[int, str, str]]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    def run(*argv: object) -> tuple[int, str, str]:
        code = tacit.main(["audit", *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class Quiet:
    def started(self, info: Mapping[str, object]) -> None: ...
    def round(self, line: Mapping[str, object]) -> None: ...
    def finished(self, summary: Mapping[str, object]) -> None: ...
    def note(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited") / "run"
    keys = {"clients": 3, "rounds": 2, "steps-per-round": 1, "mode": "hooks"}
    simulate(Scenario.layered(None, keys), out=folder, observer=Quiet())
    return folder


class Silent:
    """Planted: what the client draws from has no noise."""

    name = "silent"

    def __init__(self) -> None:
        self._source = Keystream()

    def coins(self, n: int, rate: float) -> torch.Tensor:
        return self._source.coins(n, rate)

    def gaussian(self, n: int) -> torch.Tensor:
        return torch.zeros(n, dtype=torch.float64)

    def seed(self) -> int:
        return self._source.seed()


class SilentSources:
    def __call__(self, *, holder: str, job: str, round: int) -> RandomSource:
        return Silent()


def test_the_default_job_holds_and_says_so_to_people_and_programs(says: Says) -> None:
    code, out, err = says("--canaries", 100)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[: len(PROBES + BOUNDS)]] == PROBES + BOUNDS
    assert all(" holds " in line for line in lines[: len(PROBES + BOUNDS)])
    assert "Nothing contradicts what is promised." in lines
    assert "ceiling" in out
    assert "FAILS" not in out


def test_a_client_without_noise_is_contradicted_with_an_exit_code_of_its_own(
    says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SecureSources", SilentSources)
    code, out, _ = says("--task", "breast-cancer", "--canaries", 400)
    assert code == 7
    assert "Contradicted by: noise, neighbours, gradient canaries" in out
    assert "cannot be" in out


def test_g18_a_run_is_audited_under_its_own_plan_and_only_canary_bounds_are_left_for_its_report(
    says: Says, run: Path
) -> None:
    code, out, err = says(run, "--canaries", 100, "--membership", "--json")
    assert (code, err) == (0, "")
    found, left = json.loads(out), json.loads((run / "audit.json").read_text())
    assert found["holds"] is True
    assert found["plan"] == json.loads((run / "report.json").read_text())["plan"]["digest"]
    assert found["notes"] == []
    rows = {row["audit"]: row for row in found["findings"]}
    assert list(rows) == [*PROBES, *BOUNDS, "ledgers", "membership inference"]
    assert [name for name, row in rows.items() if not row["stays_with_holder"]] == BOUNDS
    assert rows["ledgers"]["figures"] == {"ledgers": 3, "histories": 1, "short": 0}
    assert left == found["evidence"]
    assert [row["audit"] for row in left["bounds"]] == BOUNDS
    for row in left["bounds"]:
        assert row["epsilon_lower"] <= row["epsilon_upper"] <= 2.0
    for secret in ("auc", "membership", "sensitivity", "poisson", "ledgers", "deviation"):
        assert secret not in json.dumps(left)


def test_g18_the_command_trains_on_no_record_of_the_data_set_unless_asked(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = {row.numpy().tobytes() for row in load_source(TASKS["digits"]).train.inputs}
    seen: set[bytes] = set()
    for name in ("train", "clipped_sum"):
        right = getattr(PrivateTrainer, name)

        def watched(self: PrivateTrainer, *args: Any, right: Any = right, **more: Any) -> Any:
            seen.update(
                row.numpy().tobytes()
                for value in args
                if isinstance(value, torch.Tensor) and value.dim() > 1
                for row in value
            )
            return right(self, *args, **more)

        monkeypatch.setattr(PrivateTrainer, name, watched)
    assert command.audit(run, canaries=100)["holds"]
    assert len(seen) > 100
    assert not seen & digits
    # Planted: asked for membership inference on this public data set, the same watch does find its records.
    what = command._of_run(run)
    command._audits(what, command._subject(what, command.SecureSources()), 2.0, 100, True)["membership inference"]()
    assert seen & digits


def test_an_accountant_that_forgot_is_found_in_the_ledgers_of_a_run(
    says: Says, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ledger.Book._add

    def add(self: ledger.Book, account: ledger.Account | None, entry: Mapping[str, Any]) -> None:
        if account is not None and entry["kind"] == "charge":
            account.spent_rdp = 0.0
        right(self, account, entry)

    monkeypatch.setattr(ledger.Book, "_add", add)
    # The shortest road to the verdict; the whole command is tested above.
    what = command._of_run(run)
    probes = command._audits(what, command._subject(what, command.SecureSources()), 2.0, 100, False)
    assert not probes["accountant"]().holds
    assert not probes["ledgers"]().holds


def test_a_run_of_other_code_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "code_hash", lambda: "f" * 64)
    monkeypatch.setattr(
        command, "_audits", lambda *args: {"noise": lambda: audits.noise_probe(args[1], numbers=10_000)}
    )
    result = command.audit(run)
    assert len(result["notes"]) == 1
    assert json.loads((run / "audit.json").read_text())["code_hash"] == "f" * 64


def test_a_run_whose_data_is_private_by_nature_is_attacked_on_synthetic_records(run: Path) -> None:
    what = command._of_run(run)
    digits = load_source(TASKS["digits"]).train.inputs
    own = dataclasses.replace(what, task=dataclasses.replace(what.task, data="table"))
    inputs, targets = command._public_records(own)
    assert len(inputs) == len(targets) == what.records
    assert not {row.numpy().tobytes() for row in inputs} & {row.numpy().tobytes() for row in digits}


def test_g18_a_client_level_run_gets_an_estimate_from_canary_clients_and_no_figure_in_its_report(
    says: Says, tmp_path: Path
) -> None:
    keys = {"unit": "client", "clients": 12, "rounds": 2, "client-rate": 0.5, "steps-per-round": 1}
    simulate(Scenario.layered(None, keys), out=tmp_path / "run", observer=Quiet())
    before = {p: p.read_bytes() for p in (tmp_path / "run/ledgers").rglob("*") if p.is_file()}
    code, out, err = says(tmp_path / "run", "--json")
    assert (code, err) == (0, "")
    found = {row["audit"]: row for row in json.loads(out)["findings"]}
    assert list(found) == ["server's clip", "server's noise", "client canaries", "canary clients", "ledgers"]
    assert "one round, estimate" in found["canary clients"]["verdict"]
    assert [name for name, row in found.items() if row["estimate"]] == ["canary clients"]
    # The bound may be told, the estimate not.
    left = json.loads((tmp_path / "run/audit.json").read_text())
    assert [row["audit"] for row in left["bounds"]] == ["client canaries"]
    assert (left["holds"], left["audits"], left["contradicted"]) == (True, 1, 0)
    assert {p: p.read_bytes() for p in before} == before
    code, out, _ = says(tmp_path / "run")
    assert code == 0
    assert "no bound, no confidence" in out
    assert "FAILS" not in out
    # An estimate is never called a pass.
    assert [line.split()[2] for line in out.splitlines() if line.startswith("canary clients")] == ["estimate"]
    # Planted: a server without noise. 80 drawings each gave 1.0 to 6.0 with noise, 8.3 to 15.4 without; medians of five
    # keep far from each other.
    what = command._of_run(tmp_path / "run")

    def median(sources: Any) -> float:
        subject = command._subject(what, sources)
        return statistics.median(command._canary_clients(what, subject).figures["epsilon"] for _ in range(5))

    assert median(command.SecureSources()) < 6.0 < median(SilentSources())


def test_g16_a_server_without_noise_is_contradicted_and_the_report_of_its_run_has_no_figure(
    says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"unit": "client", "clients": 12, "rounds": 1, "client-rate": 0.5, "steps-per-round": 1}
    simulate(Scenario.layered(None, keys), out=tmp_path / "run", observer=Quiet())
    assert render_report(tmp_path / "run")["headline"]["epsilon"] != "unknown"
    with monkeypatch.context() as planted:
        planted.setattr(command, "SecureSources", SilentSources)
        code, out, _ = says(tmp_path / "run", "--canaries", 400)
    assert code == 7
    assert "Contradicted by: server's noise, client canaries" in out
    # At once: a report that is not written anew would still claim its figure.
    assert json.loads((tmp_path / "run/report.json").read_text())["headline"]["epsilon"] == "unknown"
    assert render_report(tmp_path / "run")["headline"]["epsilon"] == "unknown"


def render_report(run: Path) -> dict[str, Any]:
    render(run)
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def test_g6_a_failed_audit_is_not_washed_away_by_trying_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "audit.json").unlink(missing_ok=True)
    answers = iter([False, True, True])

    def one(*args: Any) -> Mapping[str, Callable[[], audits.Finding]]:
        # A probe: it stays with the holder, and that it failed still counts.
        return {"noise": lambda: audits.Finding(audit="noise", holds=next(answers), line="", figures={})}

    monkeypatch.setattr(command, "_audits", one)
    assert [note[:28] for note in command.audit(run)["notes"]] == ["The run's report was written"]
    assert render_report(run)["headline"]["epsilon"] == "unknown"
    again = command.audit(run)
    assert again["holds"] is True
    assert "does not take that back" in again["notes"][0]
    left = json.loads((run / "audit.json").read_text())
    assert (left["holds"], left["audits"], left["contradicted"]) == (True, 2, 1)
    assert render_report(run)["headline"]["epsilon"] == "unknown"
    # Other code has a record of its own, and so has a holder who deletes the file.
    (run / "audit.json").unlink()
    assert command.audit(run)["notes"] == []
    assert render_report(run)["headline"]["epsilon"] != "unknown"


def test_g18_records_from_a_place_that_somebody_named_are_not_attacked_as_public(run: Path) -> None:
    what = command._of_run(run)
    digits = {row.numpy().tobytes() for row in load_source(TASKS["digits"]).train.inputs}
    assert {row.numpy().tobytes() for row in command._public_records(what)[0]} <= digits
    # Called like a public data set, read from a folder of the holder's: only synthetic records then.
    own = dataclasses.replace(what, data="/a/hospital/digits")
    assert not {row.numpy().tobytes() for row in command._public_records(own)[0]} & digits


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--epsilon", "9"], 2, "expected 0 < epsilon <= 4"),
        (["--epsilon", "nan"], 2, "expected 0 < epsilon <= 4"),
        (["--canaries", "7"], 2, "100 to 4000 canaries"),
        (["--task", "digit"], 2, "did you mean 'digits'?"),
        (["nowhere"], 6, "run folder"),
        (["nowhere", "--task", "digits"], 2, "got both"),
        (["--canary", "7"], 2, "did you mean '--canaries'"),
    ],
)
def test_what_cannot_be_audited_is_one_sentence(says: Says, argv: list[str], code: int, words: str) -> None:
    got, out, err = says(*argv)
    assert (got, out) == (code, "")
    assert words in err
    assert err.count("\n") == 1

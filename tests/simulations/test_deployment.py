"""A job on separate machines, from a scenario to a report that others can check; here over a relay in this process."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity

from clients.holder import Holder, Kept, SecureSources
from clients.jobs import Decision, Jobs, Policy
from clients.worker import Worker
from privacy.accounting import Grant, best_affordable_order
from privacy.errors import LedgerError, PlanError, RunError, VaultError
from privacy.identity import COUNTERSIGN, Secret
from privacy.ledger import Book, Receipt
from privacy.plan import Unit, canonical
from privacy.report import build
from privacy.vault import Safe, private
from privacy.verify import passed, verify_files
from server import sealed
from server.app import METRICS, RECEIPTS
from server.home import ServerHome
from server.sealed import RunOverError, SealedGrid
from server.services import Places
from simulations import deployment
from simulations.deployment import MEMBERS, PAPERS, STATUS, deploy, facts_of_deployed, prices_of, render_deployed
from simulations.scenario import Scenario
from simulations.world import code_hash
from tests.apps.seeded import SeededSources
from tests.enrolling import make_home
from tests.test_sealed_federation import SHAPE, TASK, FakeRelay, records

SCENARIO = Scenario(
    task="digits",
    clients=2,
    rounds=2,
    steps_per_round=1,
    retries=2,
    records_per_client=35,
    records_bound=1000,
    sample_rate=0.2,
    device="cpu",
)
POLICY = Policy(tasks=frozenset({"digits"}), epsilon=3.0)


class Quiet:
    """Watches nothing."""

    def started(self, facts: Any) -> None: ...
    def round(self, line: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def finished(self, summary: Any) -> None: ...


class OneRound(Quiet):
    """Asks to stop after the first round."""

    def __init__(self) -> None:
        self.seen = 0

    def round(self, line: Any) -> None:
        self.seen += 1

    def stopping(self) -> bool:
        return self.seen > 0


def make_worker(folder: Path, number: int, server: str, *, sources: Any = None, code: str = "") -> Worker:
    """Returns a holder's worker on what lies in a folder, which is made the first time."""
    folder.mkdir(parents=True, exist_ok=True)
    secret, book = Secret.load_or_create(folder / "client.key"), Book(folder / "ledger")
    if "mine" not in book.accounts:
        order = best_affordable_order(SCENARIO.epsilon, SCENARIO.delta)
        grant = Grant(epsilon=SCENARIO.epsilon, delta=SCENARIO.delta, order=order, records_bound=1000)
        book.grant({"mine": grant}, population="mine")
    holder = Holder(
        name="mine",
        task=TASK,
        shape=SHAPE,
        load=lambda: records(number),
        book=book,
        kept=Kept(folder / "kept", durable=True, safe=Safe(book.secret, "kept")),
        sources=sources or SecureSources(),
        commitment=book.secret.commitment("mine", b"content"),
        code=code_hash(),
    )
    return Worker(
        holder,
        identity=secret.identity("client"),
        server=server,
        jobs=Jobs(folder / "jobs"),
        policy=lambda: POLICY,
        code=code or code_hash(),
    )


class Opened(FakeRelay):
    """A relay in this process that is opened and closed as the one on a SuperLink is, and that may end a run."""

    machines: Machines

    def push(self, messages: Any) -> Any:
        if self.machines.over:
            self.machines.over -= 1
            raise RunOverError("expected a run, got none; go on with: tacit server run --resume")
        return super().push(messages)

    def pull(self, ids: Any) -> Any:
        if self.machines.lose and sum("broadcast" in pieces for _, pieces in self.seen) == 2:
            # Both have answered, and nobody hears of it.
            self.machines.lose = False
            raise RunOverError("expected a run, got none; go on with: tacit server run --resume")
        return super().pull(ids)

    def __enter__(self) -> FakeRelay:
        return self

    def __exit__(self, *_: object) -> None: ...


class Machines:
    """A server's home and the data holders that are enrolled there, over a relay in this process."""

    def __init__(self, folder: Path, sources: Any = None) -> None:
        self.folder, self.home = folder, make_home(folder / "server")
        Places(self.home).prepare()
        server = self.home.application_identity().public_key
        self.workers = {
            node: make_worker(folder / f"client-{node}", number, server, sources=sources)
            for number, node in enumerate((501, 502), start=1)
        }
        self.enrolled = {f"hospital-{number}": node for number, node in enumerate(sorted(self.workers), start=1)}
        self.runs, self.over, self.lose = 6, 0, False
        self.away: set[int] = set()

    def members(self, places: Places) -> list[tuple[Any, int]]:
        return [
            (SimpleNamespace(name=name, application=self.workers[node]._identity.public_key), node)
            for name, node in self.enrolled.items()
        ]

    def relay(self, *_: object, **__: object) -> FakeRelay:
        self.runs += 1
        made = Opened(self.workers, run_id=self.runs)
        made.away, made.machines = self.away, self
        return made

    def deploy(
        self, name: str = "run", scenario: Scenario = SCENARIO, *, stop: bool = False, **changed: Any
    ) -> dict[str, object]:
        watching = OneRound()
        fields: dict[str, Any] = {"resume": False, "wait_s": 5.0, "observer": watching}
        if stop:
            fields["stopping"] = watching.stopping
        with pytest.MonkeyPatch.context() as patched:
            for constant in ("_POLL_S", "_PAUSE_S", "_WAITING_S"):
                patched.setattr(sealed, constant, 0.002)
            patched.setattr(sealed, "_FIRST_PATIENCE_S", 0.2)
            papers = SealedGrid.papers
            patched.setattr(SealedGrid, "papers", lambda *given, **named: papers(*given, **named | {"patience_s": 0.5}))
            patched.setattr(deployment, "Relay", self.relay)
            patched.setattr(deployment, "members_of", self.members)
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
            return deploy(scenario, self.home, self.folder / name, **fields | changed)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Machines:
    """A job that was run to its end; tests take copies of its folder."""
    made = Machines(tmp_path_factory.mktemp("machines"))
    made.summary = made.deploy()  # type: ignore[attr-defined]
    return made


@pytest.fixture(scope="module")
def _priced(machines: Machines) -> Iterator[None]:
    """Prices the schedule once: what is planted below has no part in the price."""
    facts = facts_of_deployed(machines.folder / "run", machines.home)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(deployment, "prices_of", lambda *_: facts.prices)
        yield


@pytest.fixture
def run(machines: Machines, _priced: None, tmp_path: Path) -> Path:
    shutil.copytree(machines.folder / "run", tmp_path / "run")
    return tmp_path / "run"


def headline(run: Path, home: ServerHome) -> dict[str, Any]:
    return dict(build(facts_of_deployed(run, home))["headline"])


def test_a_deployed_job_leaves_a_report_that_holds_without_trusting_the_operator(machines: Machines) -> None:
    run, home = machines.folder / "run", machines.home
    told = machines.summary  # type: ignore[attr-defined]
    assert (told["status"], told["rounds"]) == ("finished", 2)
    assert json.loads((run / "report.json").read_text())["headline"]["epsilon"] <= 3.0
    checks = verify_files([run / "report.json"], [home.settings.application])
    assert passed(checks), [check for check in checks if check.result.value == "does not hold"]
    # Beside the ledgers themselves it holds too: nobody's figure is another one there.
    ledgers = [machines.folder / f"client-{node}" / "ledger" for node in machines.workers]
    checks = verify_files([run / "report.json", *ledgers], [home.settings.application])
    assert passed(checks), [check for check in checks if check.result.value == "does not hold"]
    assert {check.result.value for check in checks if check.name == "report and ledgers"} == {"holds"}
    # Twin: a report that says less than the ledgers is found.
    small = machines.folder / "small"
    shutil.copytree(run, small)
    text = (small / "report.json").read_text()
    figure = json.loads(text)["clients"][0]["spent_epsilon"]
    (small / "report.json").write_text(text.replace(str(figure), str(figure / 2)))
    assert not passed(verify_files([small / "report.json", *ledgers], [home.settings.application]))


def test_g12_a_deployed_report_has_no_section_of_what_only_a_simulation_knows(machines: Machines) -> None:
    report = json.loads((machines.folder / "run" / "report.json").read_text())
    assert "simulation_only" not in report
    assert "machine that ran it saw all data" not in json.dumps(report)


def test_the_headline_is_a_number_where_nothing_is_missing(machines: Machines, run: Path) -> None:
    found = headline(run, machines.home)
    assert found["reasons"] == []
    assert 0 < found["epsilon"] <= 3.0


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_bytes())
    changed = change(value)
    path.write_bytes(canonical(value if changed is None else changed))


def drop_receipt(run: Path) -> None:
    (run / RECEIPTS).write_text("".join(lines_of(run / RECEIPTS)[:-1]))


def drop_receipts_of_one(run: Path) -> None:
    account = json.loads(json.loads(lines_of(run / RECEIPTS)[0])["receipt"])["account"]
    (run / RECEIPTS).write_text("".join(line for line in lines_of(run / RECEIPTS) if account not in line))


def drop_receipts_and_rounds_of_one(run: Path) -> None:
    """As `drop_receipts_of_one`, and the log of the rounds is made to fit."""
    drop_receipts_of_one(run)
    rounds = [json.loads(line) for line in lines_of(run / METRICS)]
    (run / METRICS).write_text("".join(json.dumps(line | {"replies": 1}) + "\n" for line in rounds))


def drop_all_receipts(run: Path) -> None:
    (run / RECEIPTS).write_text("")


def papers_swapped(run: Path) -> None:
    edit(run / PAPERS, lambda papers: {"hospital-1": papers["hospital-2"], "hospital-2": papers["hospital-1"]})


def papers_missing(run: Path) -> None:
    (run / PAPERS).unlink()


def papers_of_one_missing(run: Path) -> None:
    edit(run / PAPERS, lambda papers: {"hospital-1": papers["hospital-1"]})


def no_commitment(run: Path) -> None:
    edit(run / PAPERS, lambda papers: papers["hospital-1"].pop("commit"))


def forged_grant(run: Path) -> None:
    edit(run / PAPERS, lambda papers: papers["hospital-1"]["grant"]["body"].update(order=1e9))


def grant_of_another_kind(run: Path) -> None:
    edit(run / PAPERS, lambda papers: papers["hospital-1"].update(grant=papers["hospital-1"]["commit"]))


def grant_is_no_entry(run: Path) -> None:
    edit(run / PAPERS, lambda papers: papers["hospital-1"].update(grant=5))


def papers_are_no_papers(run: Path) -> None:
    edit(run / PAPERS, lambda papers: papers.update({"hospital-1": [1, 2]}))


def forged_change(run: Path) -> None:
    """A change of the budget that nobody signed would hide another job in the count of entries."""
    entry = {"seq": 2, "time": 5, "account": "a", "kind": "budget", "body": {"before": 3.0, "epsilon": 2.0}}
    edit(run / PAPERS, lambda papers: papers["hospital-1"]["changes"].append(entry))


def change_is_no_entry(run: Path) -> None:
    edit(run / PAPERS, lambda papers: papers["hospital-1"].update(changes=[None]))


def another_plan(run: Path) -> None:
    edit(run / "job.json", lambda job: job["plan"].update(noise_multiplier=job["plan"]["noise_multiplier"] * 2))


def another_job(run: Path) -> None:
    edit(run / "job.json", lambda job: job.update(id="f" * 32))


def member_left_out(run: Path) -> None:
    """A client whose updates are in the model is taken off the list."""
    edit(run / MEMBERS, lambda members: members[:1])


@pytest.mark.parametrize(
    "plant",
    [
        drop_receipt,
        drop_receipts_of_one,
        drop_receipts_and_rounds_of_one,
        drop_all_receipts,
        papers_swapped,
        papers_missing,
        papers_of_one_missing,
        no_commitment,
        forged_grant,
        grant_of_another_kind,
        grant_is_no_entry,
        papers_are_no_papers,
        forged_change,
        change_is_no_entry,
        another_plan,
        another_job,
        member_left_out,
    ],
)
def test_g6_g14_what_is_missing_or_forged_is_unknown_and_never_small(
    machines: Machines, run: Path, plant: Callable[[Path], None]
) -> None:
    assert isinstance(headline(run, machines.home)["epsilon"], float)
    plant(run)
    facts = facts_of_deployed(run, machines.home)
    report = build(facts)
    assert report["headline"]["epsilon"] == "unknown"
    assert report["headline"]["reasons"]
    assert report["budget"]["largest_spent"] == "unknown"
    # It is a whole report all the same, which its own server signs.
    assert render_deployed(run, machines.home).exists()


def test_g11_test_noise_is_infinity_in_a_deployed_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(tmp_path, sources=SeededSources())
    machines.deploy(scenario=dataclasses.replace(SCENARIO, rounds=1))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["headline"]["epsilon"] == "infinity"
    assert {client["spent_epsilon"] for client in report["clients"]} == {"infinity"}


def test_g3_another_job_in_the_same_ledger_is_in_the_figure_whenever_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its charges lie between the receipts of this one, so that the first receipt does not tell of it."""
    monkeypatch.setattr(deployment, "prices_of", prices_of)
    machines = Machines(tmp_path)
    small = dataclasses.replace(SCENARIO, rounds=1, retries=0, epsilon=0.9)
    machines.deploy("first", small)
    # The other one begins after the first round of this one, and this one goes on after it.
    this = dataclasses.replace(SCENARIO, rounds=2, retries=2, epsilon=1.0)
    told = machines.deploy("this", this, stop=True)
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert [client["runs"] for client in report["clients"]] == [1, 1]
    assert told["status"] == "interrupted"
    machines.deploy("between", small)
    machines.deploy("this", this, resume=True)
    report = json.loads((tmp_path / "this" / "report.json").read_text())
    assert [client["runs"] for client in report["clients"]] == [3, 3]
    spent = [machines.workers[node]._holder.book.accounts["mine"].spent for node in machines.workers]
    assert report["headline"]["epsilon"] == pytest.approx(max(spent))
    assert report["headline"]["basis"] == "the ledgers' RDP filter over all their runs"
    # Twin: counted by the first receipt alone, the one between would be left out, and the figure would be small.
    facts = facts_of_deployed(tmp_path / "this", machines.home)
    alone = [dataclasses.replace(client, other_runs=0) for client in facts.clients]
    assert build(dataclasses.replace(facts, clients=alone))["headline"]["epsilon"] < max(spent)
    ledgers = [tmp_path / f"client-{node}" / "ledger" for node in machines.workers]
    assert passed(verify_files([tmp_path / "this" / "report.json", *ledgers], [machines.home.settings.application]))


def test_damaged_files_of_a_run_are_one_sentence(machines: Machines, run: Path) -> None:
    for name in (PAPERS, MEMBERS, STATUS):
        kept = (run / name).read_bytes()
        for content in (b"", b"5", b"{", b"\xff\xfe", b'["x"]' if name == MEMBERS else b"[]"):
            (run / name).write_bytes(content)
            with pytest.raises(RunError, match="expected"):
                facts_of_deployed(run, machines.home)
        (run / name).write_bytes(kept)
    (run / MEMBERS).unlink()
    with pytest.raises(RunError, match=MEMBERS):
        facts_of_deployed(run, machines.home)


def test_receipts_of_another_server_are_refused(machines: Machines, run: Path, tmp_path: Path) -> None:
    other = make_home(tmp_path / "other")
    with pytest.raises(VaultError, match="expected a key that opens"):
        facts_of_deployed(run, other)
    key = other.folder / "application" / "server.key"
    own = private.read(key)
    shutil.copy(machines.home.folder / "application" / "vault.keys", other.folder / "application")
    key.write_bytes(own)
    with pytest.raises(LedgerError, match="own server"):
        facts_of_deployed(run, other)
    # Twin: the same receipts, countersigned by that one, are read; its report still names the holders' own spend.
    identity = other.application_identity()
    lines = [json.loads(line) for line in lines_of(run / RECEIPTS)]
    for line in lines:
        line |= {
            "peer": identity.public_key,
            "countersignature": identity.sign(COUNTERSIGN + line["receipt"].encode()),
        }
    (run / RECEIPTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert facts_of_deployed(run, other).clients[0].spent_epsilon == Receipt.from_json(lines[-1]["receipt"]).spent


def test_a_job_goes_on_under_the_program_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(tmp_path)
    told = machines.deploy(stop=True)
    assert (told["status"], told["rounds"]) == ("interrupted", 1)
    monkeypatch.setattr(deployment, "code_hash", lambda: "0" * 64)
    with pytest.raises(RunError, match="the program that the job began with"):
        machines.deploy(resume=True)
    charges = [worker._holder.book.accounts["mine"].charges for worker in machines.workers.values()]
    assert charges == [1, 1]
    monkeypatch.undo()
    assert machines.deploy(resume=True)["status"] == "finished"
    charges = [worker._holder.book.accounts["mine"].charges for worker in machines.workers.values()]
    assert charges == [2, 2]


def test_a_resumed_job_goes_on_without_a_client_that_is_gone_for_ever(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    scenario = dataclasses.replace(SCENARIO, min_replies=1, round_timeout=0.5)
    machines.deploy(scenario=scenario, stop=True)
    machines.away = {502}
    del machines.enrolled["hospital-2"]
    assert machines.deploy(scenario=scenario, resume=True)["status"] == "finished"
    rounds = [json.loads(line) for line in lines_of(tmp_path / "run" / METRICS)]
    assert [(line["replies"], line["missing"]) for line in rounds] == [(2, 0), (1, 1)]
    assert [member["name"] for member in json.loads((tmp_path / "run" / MEMBERS).read_bytes())] == [
        "hospital-1",
        "hospital-2",
    ]


class Ending(Quiet):
    """Ends the relay's run after the first round, so often; and notes what it is told."""

    def __init__(self, machines: Machines, times: int) -> None:
        self.machines, self.times, self.notes, self.rounds = machines, times, list[str](), list[int]()

    def round(self, line: Any) -> None:
        self.rounds.append(line["round"])
        self.machines.over = self.times if line["round"] == 1 else 0

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_g9_a_job_whose_run_the_relay_has_ended_goes_on_by_itself_in_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "_PAUSE_S", 0.01)
    machines = Machines(tmp_path)
    watching = Ending(machines, 2)
    # The SuperLink is still starting when the next run is begun.
    opened = machines.relay
    refusals = [RunError("expected the SuperLink, got connection refused")] * 2

    def relay(*given: Any, **named: Any) -> Any:
        if watching.rounds and refusals:
            raise refusals.pop()
        return opened(*given, **named)

    monkeypatch.setattr(machines, "relay", relay)
    summary = machines.deploy(observer=watching)
    assert (summary["status"], watching.rounds) == ("finished", [1, 2])
    assert machines.runs == 6 + 3
    assert not refusals
    assert sum("goes on by itself" in note for note in watching.notes) == 2
    assert [worker._holder.book.accounts["mine"].charges for worker in machines.workers.values()] == [2, 2]
    assert passed(verify_files([tmp_path / "run" / "report.json"], [machines.home.settings.application]))


@pytest.mark.parametrize("planted", [False, True], ids=["kept", "planted: nothing is kept"])
def test_g9_a_round_whose_answers_were_lost_with_the_run_is_paid_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: bool
) -> None:
    machines = Machines(tmp_path)
    machines.lose = True
    if planted:
        monkeypatch.setattr(Kept, "get", lambda *_: None)
    monkeypatch.setattr(deployment, "_PAUSE_S", 0.01)
    assert machines.deploy()["status"] == "finished"
    charges = [worker._holder.book.accounts["mine"].charges for worker in machines.workers.values()]
    assert charges == ([3, 3] if planted else [2, 2])
    assert machines.runs == 6 + 2


def test_a_relay_that_ends_every_run_ends_the_job_to_be_resumed(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    with pytest.raises(RunError, match="--resume"):
        machines.deploy(observer=Ending(machines, 1000))
    assert machines.runs < 6 + 12
    machines.over = 0
    assert machines.deploy(resume=True)["status"] == "finished"
    assert [worker._holder.book.accounts["mine"].charges for worker in machines.workers.values()] == [2, 2]


def test_who_stops_a_job_that_waits_for_its_clients_can_go_on_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tacit

    machines = Machines(tmp_path)
    machines.away = {501, 502}
    with pytest.raises(KeyboardInterrupt):
        machines.deploy(stopping=lambda: True)
    told = json.loads((machines.home.folder / "application" / "running.json").read_bytes())
    assert told["status"] == "interrupted"
    machines.away.clear()
    assert machines.deploy(resume=True)["status"] == "finished"

    def stopped(*given: Any, **named: Any) -> Any:
        machines.deploy("second", stopping=lambda: True)

    machines.away = {501, 502}
    monkeypatch.setattr(deployment, "deploy", stopped)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = tacit.main(
            ["server", "run", "--home", str(machines.home.folder), "--out", str(tmp_path / "second"), "--quiet"]
        )
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code == 130
    assert f"tacit server run --resume {tmp_path}" in capsys.readouterr().err.replace(
        os.path.relpath(tmp_path), str(tmp_path)
    )


def test_a_job_for_more_clients_than_have_joined_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    machines.enrolled = {"hospital-1": 501}
    with pytest.raises(RunError, match=r"2 clients that have joined, got 1 \(hospital-1\); invite more"):
        machines.deploy()
    assert not (tmp_path / "run").exists()


def test_an_operator_who_waits_hears_whom_for_and_each_thing_once(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    machines.away = {502}
    watching = Ending(machines, 0)
    with pytest.raises(RunError, match="expected 2 clients to be ready"):
        machines.deploy(observer=watching, wait_s=1.0)
    assert watching.notes[0].startswith("waiting for 2 clients")
    last = watching.notes[-1]
    assert "hospital-1: ready" in last
    assert "hospital-2: not connected (is it started? there: tacit client start)" in last
    assert len(watching.notes) == len(set(watching.notes)) <= 3


def test_two_runs_at_once_are_refused(machines: Machines, tmp_path: Path) -> None:
    lock = os.open(machines.home.folder / "application" / "run.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(RunError, match="no other run of this server"):
            machines.deploy("second")
    finally:
        os.close(lock)
    assert not (machines.folder / "second").exists()


def test_what_cannot_be_deployed_is_said_before_anything_is_made(machines: Machines) -> None:
    for changed in ({"weights": "declared"}, {"unit": Unit.CLIENT}):
        with pytest.raises(PlanError):
            machines.deploy("never", dataclasses.replace(SCENARIO, **changed))
        assert not (machines.folder / "never").exists()
    with pytest.raises(RunError, match="new run folder"):
        machines.deploy("run")


def test_the_noise_is_solved_at_the_order_that_holders_count_at(machines: Machines) -> None:
    settled = deployment.Settled.load(machines.folder / "run")
    order = best_affordable_order(3.0, 1e-5)
    assert settled.order == order
    grant = Grant(epsilon=3.0, delta=1e-5, order=order, records_bound=1000)
    from privacy.accounting import Event

    assert grant.affords(0.0, Event.all_of_schedule(settled.plan))
    # Twin: at the order that is best for this plan alone, the holders' filter does not hold it.
    from privacy.accounting import solve_noise

    (update,) = Event.all_of_schedule(settled.plan)
    noise, best = solve_noise(epsilon=3.0, delta=1e-5, sample_rate=update.sample_rate, steps=update.steps)
    assert best != order
    less = dataclasses.replace(settled.plan, noise_multiplier=noise)
    assert not grant.affords(0.0, Event.all_of_schedule(less))


def test_a_holder_that_withdraws_or_leaves_takes_no_report_with_it(tmp_path: Path) -> None:
    """What the report needs of a client is asked as soon as it has been charged."""

    class Withdrawing(Quiet):
        def round(self, line: Any) -> None:
            for job in jobs:
                jobs.decide(job.terms.job, Decision.REFUSED)

    class Leaving(Quiet):
        def round(self, line: Any) -> None:
            machines.away.add(502)

    scenario = dataclasses.replace(SCENARIO, min_replies=1, round_timeout=0.5)
    for watching in (Withdrawing(), Leaving()):
        folder = tmp_path / type(watching).__name__
        machines = Machines(folder)
        jobs = machines.workers[502]._jobs
        machines.deploy(scenario=scenario, observer=watching)
        report = json.loads((folder / "run" / "report.json").read_text())
        assert [client["rounds_joined"] for client in report["clients"]] == [2, 1]
        assert 0 < report["headline"]["epsilon"] <= 3.0
        assert passed(verify_files([folder / "run" / "report.json"], [machines.home.settings.application]))
        # Twin: without its papers nothing is known of what it promised.
        papers_of_one_missing(folder / "run")
        assert headline(folder / "run", machines.home)["epsilon"] == "unknown"


def test_a_deployed_run_is_never_gone_on_with_as_a_simulation_nor_the_other_way_round(
    machines: Machines, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simulations.evidence import render
    from simulations.run import simulate

    before = sorted(path.name for path in run.iterdir())
    for go_on in (lambda: render(run), lambda: simulate(Scenario.from_run(run), resume=run, observer=Quiet())):
        with pytest.raises(RunError, match="tacit server run --resume"):
            go_on()
    assert sorted(path.name for path in run.iterdir()) == before
    (run / MEMBERS).unlink()
    monkeypatch.setattr(machines, "folder", run.parent)
    charges = [worker._holder.book.accounts["mine"].charges for worker in machines.workers.values()]
    with pytest.raises(RunError, match="got a simulation"):
        machines.deploy(resume=True)
    assert [worker._holder.book.accounts["mine"].charges for worker in machines.workers.values()] == charges


def test_the_command_writes_the_report_of_a_deployed_run_again(
    machines: Machines, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tacit

    (run / "report.json").unlink()
    assert tacit.main(["report", str(run), "--home", str(machines.home.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["headline"]["epsilon"] <= 3.0
    assert tacit.main(["verify", str(run / "report.json"), "--key", machines.home.settings.application]) == 0
    assert tacit.main(["report", str(run), "--home", str(run.parent / "nowhere")]) == 10

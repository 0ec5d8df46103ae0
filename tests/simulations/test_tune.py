"""Searches: every candidate is charged, on ledgers that can pay for all of them, and a crash forgets nothing."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from privacy.accounting import Event, best_order, pld_epsilon, solve_noise, split_noise
from privacy.errors import BudgetExceeded, LedgerError, PlanError, RunError
from privacy.ledger import Book
from simulations import tune
from simulations.run import simulate
from simulations.scenario import Scenario
from simulations.world import Settled, World
from tests.apps.seeded import SeededSources

# Without sampling every accountant answers at once; one test samples.
SMALL: dict[str, object] = {
    "clients": 2,
    "rounds": 1,
    "steps-per-round": 1,
    "mode": "hooks",
    "retries": 0,
    "sample-rate": 1.0,
}


class Watcher:
    """Remembers what a search told; may stop it after some candidates, as a crash would."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.plans, self.done, self.notes, self.stop_after = [], [], [], stop_after

    def planned(self, search):
        self.plans.append(json.loads(json.dumps(tune._plain(search))))

    def candidate(self, search, candidate):
        self.done.append(candidate["number"])
        if len(self.done) >= self.stop_after:
            raise KeyboardInterrupt

    def note(self, text):
        self.notes.append(text)


def prepared(
    tries=("lr=0.5,1.5",), public=False, statement="", metric="", validation=0.5, **keys: object
) -> dict[str, Any]:
    tried = {text.partition("=")[0] for text in tries}
    flags = {name: value for name, value in SMALL.items() if name not in tried}
    flags |= {name.replace("_", "-"): value for name, value in keys.items()}
    return tune.prepare(
        None,
        flags,
        tune.grid(tries),
        public=public,
        statement=statement,
        metric=metric,
        validation=validation,
    )


def released(out: Path) -> list[Event]:
    """Returns what really left one client, from the runs' own logs and plans: an opinion independent of the ledger."""
    events = []
    for folder in sorted(out.glob("candidate-*")):
        plan = Settled.load(folder).plan
        rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert all(line["replies"] == 2 for line in rounds)
        events.append(dataclasses.replace(Event.of_round(plan), steps=plan.steps * len(rounds)))
    return events


def underpaid(out: Path, ledgers: Path) -> list[str]:
    """Returns the accounts that paid less than what left their client costs, by another library's arithmetic."""
    from dp_accounting import dp_event
    from dp_accounting.rdp import rdp_privacy_accountant

    with Book(ledgers) as book:
        accounts = list(book.accounts.values())
    assert len(accounts) == 2
    found = []
    for account in accounts:
        other = rdp_privacy_accountant.RdpAccountant(orders=[account.grant.order])
        for event in released(out):
            step = dp_event.PoissonSampledDpEvent(event.sample_rate, dp_event.GaussianDpEvent(event.noise_multiplier))
            other.compose(step, event.steps)
        # At fractional orders that library lies up to a percent above the exact value.
        if account.spent_rdp < 0.99 * float(other._rdp[0]):
            found.append(account.name)
    return found


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_g5_a_search_charges_every_candidate_in_full(tmp_path: Path):
    search = tune.run(prepared(("lr=0.5,1.5", "l2-clip=0.5,1")), tmp_path / "search", Watcher())
    assert len(search["candidates"]) == 4
    assert underpaid(tmp_path / "search", tmp_path / "search/ledgers") == []
    with Book(tmp_path / "search/ledgers") as book:
        for account in book.accounts.values():
            assert account.charges == 4
            assert account.grant.epsilon == 3.0
            assert account.spent <= 3.0
            # No refund, no spare charge: the search spends the whole budget, but for rounding.
            assert account.spent > 2.99
    history = [Event.from_dict(candidate["event"]) for candidate in search["candidates"]]
    whole = dataclasses.replace(history[0], steps=4)
    assert {event.noise_multiplier for event in history} == {history[0].noise_multiplier}
    assert search["price"]["pld"] == pld_epsilon(whole, 1e-5)
    assert search["total"]["epsilon"] == search["price"]["pld"]
    # The headline is not what one candidate costs.
    assert search["total"]["epsilon"] > 1.5 * pld_epsilon(history[0], 1e-5)


def test_g5_planted_bug_a_search_that_charges_only_the_winner_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = tune._run_one

    def only_one(candidate, folder, ledgers, observer):
        return real(candidate, folder, ledgers if candidate["number"] == 1 else None, observer)

    monkeypatch.setattr(tune, "_run_one", only_one)
    search = tune.run(prepared(("lr=0.5,1,1.5",)), tmp_path / "search", Watcher())
    assert len(underpaid(tmp_path / "search", tmp_path / "search/ledgers")) == 2
    # The search itself does not print a figure either.
    assert math.isnan(search["total"]["epsilon"])
    assert "candidate 2" in search["total"]["basis"]
    assert "epsilon unknown" in (tmp_path / "search/search.txt").read_text()


def headlines(out: Path) -> list[tuple[float, str]]:
    reports = [json.loads(path.read_text())["headline"] for path in sorted(out.glob("candidate-*/report.json"))]
    return [(headline["epsilon"], headline["basis"]) for headline in reports]


def test_g5_the_report_beside_the_winner_says_what_the_whole_search_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    search = tune.run(prepared(("lr=0.5,1,1.5",)), tmp_path / "search", Watcher())
    found = headlines(tmp_path / "search")
    assert [basis for _, basis in found] == ["the ledgers' RDP filter over all their runs"] * 3
    assert all(epsilon == search["total"]["spent"] for epsilon, _ in found)
    # Planted: each report as it was when its candidate ended; the first then says what one candidate costs.
    monkeypatch.setattr(tune, "render", lambda folder: None)
    tune.run(prepared(("lr=0.5,1,1.5",)), tmp_path / "stale", Watcher())
    assert headlines(tmp_path / "stale")[0][0] < 0.6 * search["total"]["epsilon"]


def test_g5_a_search_that_was_stopped_tells_the_whole_when_it_goes_on(tmp_path: Path):
    out = tmp_path / "search"
    with pytest.raises(KeyboardInterrupt):
        tune.run(prepared(), out, Watcher(stop_after=1))
    search = tune.resume(out, Watcher())
    assert [epsilon for epsilon, _ in headlines(out)] == [search["total"]["spent"]] * 2


def test_g2_what_ledgers_of_another_delta_spent_is_not_printed_at_the_searches_delta(tmp_path: Path):
    ledgers = tmp_path / "ledgers"
    holder = SMALL | {"epsilon": 8.0, "ledgers": str(ledgers), "delta": 1e-4}
    tune._open_ledgers(
        tune.prepare(None, holder, [{"lr": 1.0}]), Scenario.layered(None, holder), tune._task("digits"), ledgers
    )
    first = tune.run(prepared(("lr=1",), epsilon=1.5, ledgers=str(ledgers)), tmp_path / "first", Watcher())
    assert first["total"]["epsilon"] == first["price"]["pld"]
    # Beside another run the headline is the filter's: the holder counts at 1e-4, and the search speaks of 1e-5.
    second = tune.run(prepared(("lr=1",), epsilon=1.4, ledgers=str(ledgers)), tmp_path / "second", Watcher())
    with Book(ledgers) as book:
        account = next(iter(book.accounts.values()))
    at_search = account.spent_rdp + account.grant.epsilon_of(1.0) - 1.0 + math.log(10) / (account.grant.order - 1)
    assert second["delta"] == 1e-5
    assert second["total"]["epsilon"] == pytest.approx(at_search)
    assert second["total"]["epsilon"] > account.spent + 0.5


def test_g5_the_shares_of_a_search_compose_to_its_epsilon():
    # Equal candidates: what one schedule of all their steps needs.
    noises, _ = split_noise(epsilon=3.0, delta=1e-5, schedules=[(0.5, 42)] * 6)
    assert noises == (solve_noise(epsilon=3.0, delta=1e-5, sample_rate=0.5, steps=252)[0],) * 6
    schedules = [(0.5, 42), (0.1, 100), (0.5, 21), (1.0, 3)]
    noises, _ = split_noise(epsilon=2.0, delta=1e-5, schedules=schedules)
    history = [
        Event(sample_rate=rate, noise_multiplier=noise, steps=steps)
        for (rate, steps), noise in zip(schedules, noises, strict=True)
    ]
    assert best_order(history, 1e-5)[1] <= 2.0
    assert best_order(history, 1e-5)[1] > 1.98
    for bad in ({"schedules": []}, {"epsilon": 1e-4}, {"delta": 0.0}, {"epsilon": math.inf}):
        with pytest.raises(PlanError, match="expected"):
            split_noise(**({"epsilon": 2.0, "delta": 1e-5, "schedules": schedules} | bad))


def test_candidates_of_other_shapes_share_one_budget(tmp_path: Path):
    search = prepared(("sample-rate=0.2,1",))
    assert len({candidate["noise_multiplier"] for candidate in search["candidates"]}) == 2
    tune.run(search, tmp_path / "search", Watcher())
    assert underpaid(tmp_path / "search", tmp_path / "search/ledgers") == []
    with Book(tmp_path / "search/ledgers") as book:
        assert all(2.9 < account.spent <= 3.0 for account in book.accounts.values())


def test_the_other_way_round_the_noise_is_given_and_the_budget_follows():
    search = prepared(noise_multiplier=4.0)
    event = Event(sample_rate=1.0, noise_multiplier=4.0, steps=2)
    assert search["budget"] == pytest.approx(best_order(event, 1e-5)[1])
    with pytest.raises(PlanError, match="noise-multiplier"):
        prepared(("noise-multiplier=0,4",))


def test_g4_a_person_at_several_clients_pays_for_all_of_them():
    one, two = prepared(), prepared(multiplicity=2)
    assert two["price"]["person"] > 1.2 * one["price"]["person"]
    assert two["price"]["epsilon"] == one["price"]["epsilon"]


# -- ledgers that others use too -------------------------------------------------------------------------------------


def test_a_search_that_ledgers_cannot_pay_for_does_not_start(tmp_path: Path):
    ledgers = tmp_path / "ledgers"
    tune.run(prepared(epsilon=2.0, ledgers=str(ledgers)), tmp_path / "first", Watcher())
    before = (ledgers / "ledger.jsonl").read_bytes()
    watcher = Watcher()
    with pytest.raises(BudgetExceeded, match="all 2 candidates"):
        tune.run(prepared(epsilon=2.0, ledgers=str(ledgers)), tmp_path / "second", watcher)
    assert (ledgers / "ledger.jsonl").read_bytes() == before
    assert not (tmp_path / "second").exists()
    assert watcher.plans == []


def test_g3_with_other_runs_in_the_ledgers_the_headline_is_the_filter(tmp_path: Path):
    ledgers = tmp_path / "ledgers"
    whole = {"epsilon": 8.0, "ledgers": str(ledgers)}
    budget = tune.prepare(None, SMALL | whole, [{"lr": 1.0}])
    tune._open_ledgers(budget, Scenario.layered(None, SMALL | whole), tune._task("digits"), ledgers)

    class Silent(Watcher):
        def started(self, info): ...
        def round(self, line): ...
        def finished(self, summary): ...

    simulate(Scenario.layered(None, SMALL | whole | {"epsilon": 2.0}), out=tmp_path / "run", observer=Silent())
    search = tune.run(prepared(epsilon=2.0, ledgers=str(ledgers)), tmp_path / "search", Watcher())
    with Book(ledgers) as book:
        spent = max(account.spent for account in book.accounts.values())
    assert search["total"]["epsilon"] == spent
    assert search["total"]["epsilon"] > search["price"]["epsilon"]
    assert "other runs" in search["total"]["basis"]


def test_g7_a_search_on_another_split_of_the_same_records_is_refused(tmp_path: Path):
    ledgers = tmp_path / "ledgers"
    tune.run(prepared(("lr=1",), ledgers=str(ledgers)), tmp_path / "first", Watcher())
    for persons, error in (("unstated", LedgerError), ("apart", PlanError)):
        with pytest.raises(error, match="split"):
            tune.run(
                prepared(("lr=1",), ledgers=str(ledgers), clients=3, persons=persons), tmp_path / persons, Watcher()
            )
        assert not (tmp_path / persons).exists()


def test_g11_test_noise_makes_the_search_infinite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def seeded(scenario, **where):
        return simulate(scenario, client="tests.apps.seeded:client", sources=SeededSources(), **where)

    monkeypatch.setattr(tune, "simulate", seeded)
    search = tune.run(prepared(("lr=1",)), tmp_path / "search", Watcher())
    assert search["total"]["epsilon"] == math.inf
    assert "infinity" in (tmp_path / "search/search.txt").read_text()


# -- public data -----------------------------------------------------------------------------------------------------


def test_a_search_on_public_data_costs_nothing_and_says_why(tmp_path: Path):
    search = tune.run(prepared(public=True), tmp_path / "search", Watcher())
    assert search["total"]["epsilon"] == 0.0
    assert "the public data set digits" in (tmp_path / "search/search.txt").read_text()
    assert not (tmp_path / "search/ledgers").exists()
    # Each candidate is the real job's rehearsal, at the whole budget and not at a share of it.
    assert all(Settled.load(folder).plan.epsilon == 3.0 for folder in (tmp_path / "search").glob("candidate-*"))


def test_g6_data_that_nobody_declared_public_is_not_free(tmp_path: Path):
    keys = SMALL | {"task": "image-folder", "data": str(tmp_path), "records-per-client": 50}
    with pytest.raises(PlanError, match="public-because"):
        tune.prepare(None, keys, [{"lr": 1.0}], public=True)
    assert "your statement: it is ours" in tune._why_public(
        Scenario.layered(None, keys), tune._task("image-folder"), "it is ours"
    )
    with pytest.raises(PlanError, match="shared ledgers"):
        prepared(public=True, ledgers=str(tmp_path / "ledgers"))
    with pytest.raises(PlanError, match="only with --public"):
        prepared(statement="it is ours")
    synthetic = prepared(public=True, partition="virtual", records_per_client=40)
    assert "synthetic" in synthetic["public"]["why"]


# -- crashes ---------------------------------------------------------------------------------------------------------


def test_finished_candidates_are_not_run_again(tmp_path: Path):
    out = tmp_path / "search"
    with pytest.raises(KeyboardInterrupt):
        tune.run(prepared(("lr=0.5,1,1.5",)), out, Watcher(stop_after=2))
    jobs = [Settled.load(out / f"candidate-00{number}").id for number in (1, 2)]
    search = tune.resume(out, Watcher())
    assert search["status"] == "finished"
    assert [candidate["result"]["job"] for candidate in search["candidates"][:2]] == jobs
    assert underpaid(out, out / "ledgers") == []
    with Book(out / "ledgers") as book:
        assert [account.charges for account in book.accounts.values()] == [3, 3]
    # A finished search can be asked again, at no cost.
    again = tune.resume(out, Watcher())
    assert again["winner"] == search["winner"]
    assert again["total"] == json.loads(json.dumps(search["total"]))


def test_a_candidate_killed_half_way_keeps_its_charges_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "search"

    def die(self, line):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune._Quiet, "round", die)
    with pytest.raises(KeyboardInterrupt):
        tune.run(prepared(("lr=0.5,1.5",), rounds=2), out, Watcher())
    with Book(out / "ledgers") as book:
        assert [account.charges for account in book.accounts.values()] == [1, 1]
    monkeypatch.undo()
    search = tune.resume(out, Watcher())
    assert search["status"] == "finished"
    with Book(out / "ledgers") as book:
        assert [account.charges for account in book.accounts.values()] == [4, 4]
    assert search["total"]["epsilon"] == search["price"]["pld"]


def test_a_candidate_whose_folder_is_gone_stays_charged_and_cannot_be_run_for_free(tmp_path: Path):
    import shutil

    out = tmp_path / "search"
    with pytest.raises(KeyboardInterrupt):
        tune.run(prepared(("lr=0.5,1.5",)), out, Watcher(stop_after=1))
    shutil.rmtree(out / "candidate-001")
    search = json.loads((out / "search.json").read_text())
    search["candidates"][0]["result"] = None
    (out / "search.json").write_text(json.dumps(search))
    # Its charge is in the ledgers still, so the budget no longer covers both candidates.
    with pytest.raises(BudgetExceeded):
        tune.resume(out, Watcher())


def test_a_search_whose_price_was_edited_is_priced_anew_and_one_whose_noise_was_is_refused(tmp_path: Path):
    out = tmp_path / "search"
    whole = tune.run(prepared(("lr=1",)), out, Watcher())
    stored = json.loads((out / "search.json").read_text())
    stored["price"] |= {"epsilon": 0.1, "pld": 0.1, "person": 0.1}
    (out / "search.json").write_text(json.dumps(stored))
    assert tune.resume(out, Watcher())["total"]["epsilon"] == whole["total"]["epsilon"] > 1
    stored["candidates"][0]["event"]["noise_multiplier"] *= 10
    (out / "search.json").write_text(json.dumps(stored))
    with pytest.raises(RunError, match="not the one that was priced"):
        tune.resume(out, Watcher())


def test_g5_a_search_that_stops_for_want_of_budget_says_what_it_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, real = tmp_path / "search", tune._run_one

    def poor(candidate, folder, ledgers, observer):
        if candidate["number"] == 2:
            raise BudgetExceeded("expected budget, got none")
        return real(candidate, folder, ledgers, observer)

    monkeypatch.setattr(tune, "_run_one", poor)
    with pytest.raises(BudgetExceeded):
        tune.run(prepared(), out, Watcher())
    search = json.loads((out / "search.json").read_text())
    assert (search["status"], search["winner"]) == ("stopped", None)
    # All of the committed schedule, as everywhere: nothing is refunded for stopping.
    assert search["total"]["epsilon"] == search["price"]["pld"]
    assert "No winner" in (out / "search.txt").read_text()
    monkeypatch.undo()
    assert tune.resume(out, Watcher())["status"] == "finished"


def test_g5_a_candidate_killed_while_its_folder_was_made_goes_on_and_is_charged(tmp_path: Path):
    out = tmp_path / "search"
    with pytest.raises(KeyboardInterrupt):
        tune.run(prepared(), out, Watcher(stop_after=1))
    # Killed between the scenario and the job, the last moment before the first charge.
    scenario = Scenario.from_mapping(json.loads((out / "search.json").read_text())["candidates"][1]["scenario"])
    (out / "candidate-002").mkdir()
    dataclasses.replace(scenario, out="", ledgers=str(out / "ledgers")).save(out / "candidate-002")
    assert tune.resume(out, Watcher())["status"] == "finished"
    assert underpaid(out, out / "ledgers") == []


def test_g6_a_search_that_was_charged_cannot_be_called_free_afterwards(tmp_path: Path):
    out = tmp_path / "search"
    with pytest.raises(KeyboardInterrupt):
        tune.run(prepared(), out, Watcher(stop_after=1))
    stored = json.loads((out / "search.json").read_text())
    for public in ({"why": "the public data set digits", "stated": False}, {"why": "by my word", "stated": True}):
        (out / "search.json").write_text(json.dumps(stored | {"public": public}))
        with pytest.raises(RunError, match="says that it is free"):
            tune.resume(out, Watcher())
    (out / "search.json").write_text(json.dumps(stored))
    assert tune.resume(out, Watcher())["total"]["epsilon"] > 1


def test_a_folder_without_a_search_or_in_use_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match=r"search\.json"):
        tune.resume(tmp_path, Watcher())
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        tune.resume(tmp_path, Watcher())
    with pytest.raises(RunError, match="in use"):
        tune.run(prepared(), tmp_path, Watcher())


# -- candidates and their judge --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tries", "words"),
    [
        ([], "at least one key"),
        (["lr"], "KEY=VALUE"),
        (["lr="], "drop the empty one"),
        (["lr=1,,2"], "drop the empty one"),
        (["lr=1", "lr=2"], "twice"),
        (["lrr=1"], "did you mean 'lr'"),
        (["lr=-1"], "lr > 0"),
        (["epsilon=1,2"], "settled once"),
        (["delta=1e-5"], "settled once"),
        (["seed=1,2"], "settled once"),
        (["clients=2,3"], "settled once"),
        (["partition=iid,dirichlet"], "settled once"),
        (["ledgers=a,b"], "settled once"),
        (["workers=1,2"], "settled once"),
    ],
)
def test_a_grid_that_cannot_be_searched_is_one_sentence(tries: list[str], words: str):
    with pytest.raises(PlanError, match=words):
        tune.grid(tries)


def test_a_grid_is_every_combination_once_and_a_subset_is_drawn_by_the_seed():
    whole = tune.grid(["lr=0.5,1,1", "l2-clip=1,2"])
    assert whole == [
        {"lr": 0.5, "l2-clip": 1.0},
        {"lr": 0.5, "l2-clip": 2.0},
        {"lr": 1.0, "l2-clip": 1.0},
        {"lr": 1.0, "l2-clip": 2.0},
    ]
    assert tune.drawn(whole, 0, 0) == whole
    drawn = {json.dumps(tune.drawn(whole, 2, seed)) for seed in range(20)}
    assert tune.drawn(whole, 2, 7) == tune.drawn(whole, 2, 7)
    assert len(drawn) > 2
    for count in (-1, 5):
        with pytest.raises(PlanError, match="size of the grid"):
            tune.drawn(whole, count, 0)


def test_a_list_of_candidates_is_read_whole_or_refused(tmp_path: Path):
    path = tmp_path / "list.toml"
    path.write_text("[[candidate]]\nlr = 1\n[[candidate]]\nlr = 2\nl2-clip = 0.5\n")
    assert tune.listed(path) == [{"lr": 1.0}, {"lr": 2.0, "l2-clip": 0.5}]
    for text in ("", "lr = 1", "[candidate]\nlr = 1", "[[candidate]]\nepsilon = 1", "[[candidate]]\nlr = 1\n" * 2, "["):
        path.write_text(text)
        with pytest.raises(PlanError, match="expected"):
            tune.listed(path)
    with pytest.raises(PlanError, match="check the path"):
        tune.listed(tmp_path / "missing")


def test_keys_given_to_all_and_tried_too_are_refused_and_tasks_must_share_their_data():
    with pytest.raises(PlanError, match="or to try"):
        prepared(lr=1.0)
    assert len(prepared(("task=digits,digits-mlp",))["candidates"]) == 2
    with pytest.raises(PlanError, match="one data set"):
        prepared(("task=digits,breast-cancer",))
    with pytest.raises(PlanError, match="did you mean 'accuracy'"):
        prepared(metric="acuracy")
    with pytest.raises(PlanError, match="0 <= validation < 1"):
        prepared(validation=1.0)


def judged(values: list[float], metric: str = "accuracy") -> int | None:
    search = {"metric": metric, "status": "finished", "validation": 0.0, "public": {"why": "a test"}}
    search["candidates"] = [
        {"number": n, "settings": {}, "result": {"metrics": {metric: v}, "status": "finished", "folder": ""}}
        for n, v in enumerate(values, start=1)
    ]

    class Nothing:
        test = ()

    tune._conclude(search, Scenario(), Path(), None, Nothing())
    return search["winner"]


def test_the_best_sound_candidate_wins_and_the_first_of_equals():
    assert judged([0.2, 0.9, 0.9, math.nan]) == 2
    assert judged([0.2, math.nan, 0.9], "loss") == 1
    assert judged([math.nan, math.inf]) is None
    assert tune.less_is_better("log_loss")
    assert not tune.less_is_better("accuracy")


def test_the_winner_is_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path):
    chosen, rest = tune._halves(360, 0.5, 0)
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(360))
    assert len(chosen) == 180
    assert len(tune._halves(360, 0.0, 0)[1]) == 0
    assert [len(part) for part in tune._halves(2, 0.9, 0)] == [1, 1]
    search = tune.run(prepared(("lr=1",)), tmp_path / "search", Watcher())
    # Both halves together are the test set that the run itself reports.
    world = World.open(tmp_path / "search/candidate-001")
    line = json.loads((world.folder / "metrics.jsonl").read_text().splitlines()[-1])
    both = (search["candidates"][0]["result"]["metrics"]["accuracy"] + search["held_out"]["accuracy"]) / 2
    assert both == pytest.approx(line["metrics"]["accuracy"], abs=1e-6)
    assert "the choice never saw" in (tmp_path / "search/search.txt").read_text()
    flattered = tune.run(prepared(("lr=1",), validation=0.0), tmp_path / "flattered", Watcher())
    assert flattered["held_out"] is None
    assert "flatters it" in (tmp_path / "flattered/search.txt").read_text()

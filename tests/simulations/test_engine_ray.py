"""The Ray engine runs the same apps with the same results, and its failures come out as errors."""

import gc
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.server.superlink.fleet.vce import vce_api
from flwr.serverapp import ServerApp

from privacy.errors import RunError
from privacy.ledger import Book
from simulations.engine import run_app
from simulations.ray_engine import run_on_ray
from simulations.run import simulate
from simulations.scenario import Scenario

QUICKSTART = Path(__file__).parents[1] / "apps" / "quickstart_numpy"
SERVER = "quickstart_numpy.server_app:app"
CLIENT = "quickstart_numpy.client_app:app"

# Ray forgets its processes without waiting for them.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
CONFIG = {
    "num-server-rounds": 2,
    "fraction-evaluate": 1.0,
    "local-epochs": 5,
    "learning-rate": 0.5,
    "data.examples": 60,
    "data.features": 8,
    "result": "",
}


@pytest.fixture(autouse=True)
def collect_what_ray_forgot():
    yield
    gc.collect()


@pytest.mark.slow
def test_ray_and_the_local_engine_agree(tmp_path):
    pytest.importorskip("ray")
    run_app(QUICKSTART, nodes=4, overrides={"result": str(tmp_path / "local"), "num-server-rounds": 2})
    config = {**CONFIG, "result": str(tmp_path / "ray")}
    run_on_ray(SERVER, CLIENT, nodes=4, run_config=config, app_dir=QUICKSTART)
    local, ray = (json.loads((tmp_path / name).read_text()) for name in ("local", "ray"))
    # Float64 sums of four clients in another order: a few units in the last place per round.
    for here, there in zip(local["arrays"], ray["arrays"], strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-12)
    np.testing.assert_allclose(local["accuracy"], ray["accuracy"], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
def test_a_run_on_ray_is_resumed_after_a_finished_round(tmp_path, monkeypatch, planted):
    pytest.importorskip("ray")

    class Watcher:
        """Presses Ctrl-C in the first round."""

        def __getattr__(self, name):
            return lambda *_: None

        def round(self, line):
            if line["round"] == 1:
                signal.raise_signal(signal.SIGINT)

    keys = {"clients": 2, "rounds": 3, "steps-per-round": 1, "mode": "hooks", "engine": "ray"}
    scenario, folder = Scenario.layered(None, keys), tmp_path / "run"
    assert simulate(scenario, out=folder, observer=Watcher())["status"] == "interrupted"
    if planted:
        # Flower's own way: every start has other nodes, and their receipts are nobody's.
        monkeypatch.setattr("simulations.ray_engine._register", vce_api._register_nodes)
        with pytest.raises(RunError, match="nodes that the run began with"):
            simulate(Scenario.from_run(folder), resume=folder, observer=Watcher())
        return
    summary = simulate(Scenario.from_run(folder), resume=folder, observer=Watcher())
    assert (summary["status"], summary["rounds"]) == ("finished", 3)
    with Book(folder / "ledgers") as book:
        assert [account.charges for account in book.accounts.values()] == [3, 3]


@pytest.mark.slow
def test_an_error_of_the_server_app_comes_out_of_the_ray_engine():
    pytest.importorskip("ray")
    app = ServerApp()

    @app.main()
    def main(grid, context):
        assert len(list(grid.get_node_ids())) == 3
        raise KeyError(context.run_config["learning-rate"])

    with pytest.raises(KeyError, match=r"0\.5"):
        run_on_ray(app, CLIENT, nodes=3, run_config=CONFIG, app_dir=QUICKSTART)


@pytest.mark.slow
def test_a_client_that_no_ray_node_can_hold_is_refused_at_once():
    pytest.importorskip("ray")
    with pytest.raises(RunError, match="expected a Ray node with 4096 CPUs"):
        run_on_ray(SERVER, CLIENT, nodes=3, run_config=CONFIG, app_dir=QUICKSTART, cpus_per_client=4096)


@pytest.mark.slow
def test_a_breakdown_of_the_engine_does_not_leave_the_server_waiting(monkeypatch):
    pytest.importorskip("ray")

    def broken(*_):
        raise OSError("no actors today")

    monkeypatch.setattr("simulations.ray_engine._backend", broken)
    started = time.monotonic()
    with pytest.raises(RunError, match="no actors today"):
        run_on_ray(SERVER, CLIENT, nodes=3, run_config=CONFIG, app_dir=QUICKSTART)
    assert time.monotonic() - started < 120


def test_numbers_that_make_no_sense_are_refused_by_the_ray_engine():
    with pytest.raises(RunError, match="expected nodes >= 1"):
        run_on_ray(SERVER, CLIENT, nodes=0, run_config=CONFIG)


def test_a_missing_ray_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"install 'flwr\[simulation\]'"):
        run_on_ray(SERVER, CLIENT, nodes=1, run_config=CONFIG)

"""The local engine carries messages in order, keeps clients apart, and survives what they do."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import simulations.engine
from privacy.errors import RunError
from simulations.engine import LocalGrid, load_app, run_app

APPS = Path(__file__).parents[1] / "apps"
PROBE = APPS / "engine_probe"
ROOT = Path(__file__).parents[2]


def probe(**options):
    settings = {"nodes": 6, "run_config": {"key": 2.71828}, "app_dir": PROBE, **options}
    return LocalGrid("engine_probe:app", **settings)


def messages(action, node_ids, *, model=None, **config):
    """One message per client; all share one content, as Flower's strategies have it."""
    arrays = ArrayRecord([np.linspace(-1, 2.71828, 101) if model is None else model])
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"list": [1, 2], **config})})
    return [Message(content, dst_node_id=node_id, message_type=f"train.{action}") for node_id in node_ids]


def content_bytes(reply):
    return [array.data for array in reply.content["arrays"].values()]


def alive(pid):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, patience_s=20.0):
    deadline = time.monotonic() + patience_s
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("workers", [1, 2])
def test_replies_come_in_the_order_of_the_messages(workers):
    with probe(workers=workers, nodes=20) as grid:
        order = [7, 3, 20, 1, 15, 2, 9, 11, 4, 8, 19]
        replies = grid.send_and_receive(messages("add", order))
    assert [reply.metadata.src_node_id for reply in replies] == order
    assert [reply.content["metrics"]["partition"] for reply in replies] == [node - 1 for node in order]


def test_results_are_byte_equal_for_any_number_of_workers():
    results = []
    for workers in (1, 2, 3):
        with probe(workers=workers) as grid:
            replies = grid.send_and_receive(messages("add", [4, 2, 6, 1]))
            results.append([content_bytes(reply) for reply in replies])
            pids = {reply.content["metrics"]["pid"] for reply in replies}
            assert (pids == {os.getpid()}) == (workers == 1)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("workers", [1, 2])
def test_replies_name_the_messages_they_answer(workers):
    with probe(workers=workers) as grid:
        sent = messages("add", [1, 2, 3])
        replies = grid.send_and_receive(sent)
        more = grid.send_and_receive(messages("add", [1]))
    ids = [message.metadata.message_id for message in sent]
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    every = [*ids, *(reply.metadata.message_id for reply in [*replies, *more])]
    assert len(set(every)) == len(every)
    assert "" not in every


def test_pushed_messages_are_pulled_once():
    with probe() as grid:
        ids = grid.push_messages(messages("add", [5, 1, 3]))
        first = grid.pull_messages([ids[2], ids[0], "unknown"])
        assert [reply.metadata.src_node_id for reply in first] == [3, 5]
        assert grid.pull_messages(ids[0:1]) == []
        assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids)] == [1]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_in_one_client_is_an_error_reply_and_the_others_go_on(workers, caplog):
    with caplog.at_level(logging.WARNING), probe(workers=workers) as grid:
        for _ in range(2):
            replies = grid.send_and_receive(messages("fail", grid.get_node_ids()))
            assert [reply.has_error() for reply in replies] == [node == 2 for node in grid.get_node_ids()]
        assert replies[1].error.code == 2
        assert "no such luck" in replies[1].error.reason
        assert [failure.node_id for failure in grid.failures] == [2, 2]
        assert 'raise ValueError("no such luck")' in grid.failures[0].traceback
        assert grid.failures[0].message_type == "train.fail"
    assert len([record for record in caplog.records if "no such luck" in record.message]) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_failing_client_wrote_down_is_kept(workers):
    with probe(workers=workers) as grid:
        grid.send_and_receive(messages("fail", [2]))
        assert grid._context(2).state["begun"]["times"] == 1


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("action", ["leave", "stray", "no_such_action"])
def test_a_client_that_breaks_the_rules_gets_an_error_reply(workers, action):
    with probe(workers=workers) as grid:
        reply = grid.send_and_receive(messages(action, [2]))[0]
        assert reply.has_error()
        assert not grid.send_and_receive(messages("add", [2]))[0].has_error()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unknown_client_is_an_error_reply(workers):
    with probe(workers=workers) as grid:
        replies = grid.send_and_receive(messages("add", [1, 7, 0]))
    assert [reply.has_error() for reply in replies] == [False, True, True]
    assert "expected a client in 1..6, got 7" in replies[1].error.reason


def test_a_worker_killed_by_its_client_loses_that_client_only():
    with probe(workers=2, nodes=12) as grid:
        replies = grid.send_and_receive(messages("die", grid.get_node_ids()))
        assert [reply.metadata.src_node_id for reply in replies] == list(grid.get_node_ids())
        # Client 4 was in the same share and had not begun.
        assert [reply.has_error() for reply in replies] == [node == 3 for node in grid.get_node_ids()]
        assert replies[2].error.code == 8
        assert "-9" in replies[2].error.reason
        again = grid.send_and_receive(messages("add", grid.get_node_ids()))
        assert not any(reply.has_error() for reply in again)


def test_a_worker_killed_from_outside_is_replaced_and_the_round_goes_on():
    with probe(workers=2) as grid:
        pids = {
            reply.metadata.src_node_id: reply.content["config"]["pid"]
            for reply in grid.send_and_receive(messages("process", grid.get_node_ids()))
        }
        # Whoever runs client 1 sleeps on it; after the other five are done, the sleeper alone is busy.
        workers = [member.process.pid for member in grid._workers._members]
        assert set(pids.values()) <= set(workers)

        def kill_the_sleeper():
            time.sleep(1.0)
            busy = [member.process.pid for member in grid._workers._members if member.share]
            os.kill(busy[0], signal.SIGKILL)

        killer = threading.Thread(target=kill_the_sleeper)
        killer.start()
        replies = grid.send_and_receive(messages("sleep", grid.get_node_ids(), seconds=60.0))
        killer.join()
        assert [reply.has_error() for reply in replies] == [True, False, False, False, False, False]
        assert len(grid._workers._members) == 2


def test_a_late_reply_is_missing_and_the_next_round_is_complete():
    with probe(workers=2) as grid:
        grid.send_and_receive(messages("add", grid.get_node_ids()))
        started = time.monotonic()
        replies = grid.send_and_receive(messages("sleep", grid.get_node_ids(), seconds=60.0), timeout=2.0)
        assert time.monotonic() - started < 10
        assert [reply.metadata.src_node_id for reply in replies] == [2, 3, 4, 5, 6]
        assert len(grid.send_and_receive(messages("add", grid.get_node_ids()))) == 6


def test_in_one_process_the_timeout_is_read_between_clients():
    with probe() as grid:
        replies = grid.send_and_receive(messages("sleep", [2, 1, 3], seconds=0.3), timeout=0.2)
        assert [reply.metadata.src_node_id for reply in replies] == [2, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_is_called_once_and_before_any_client(workers):
    calls = []

    def prepare(pairs):
        calls.append([message.metadata.dst_node_id for message, _ in pairs])
        for _, context in pairs:
            context.state["prepared"] = MetricRecord({"round": len(calls), "at": time.monotonic()})
            assert context.run_config == {"key": 2.71828}

    with probe(workers=workers, prepare=prepare) as grid:
        for turn in (1, 2):
            replies = grid.send_and_receive(messages("count", [3, 1, 2]))
            assert [reply.content["metrics"]["prepared"] for reply in replies] == [turn] * 3
            for reply in replies:
                prepared_at = grid._context(reply.metadata.src_node_id).state["prepared"]["at"]
                assert prepared_at <= reply.content["metrics"]["now"]
        grid.push_messages([])
    assert calls == [[3, 1, 2], [3, 1, 2]]


@pytest.mark.parametrize(("action", "seconds"), [("die", 0.0), ("sleep", 60.0)])
def test_what_was_prepared_is_kept_when_the_client_dies_or_is_late(action, seconds):
    def prepare(pairs):
        for _, context in pairs:
            context.state["prepared"] = MetricRecord({"round": 1})

    with probe(workers=2, prepare=prepare) as grid:
        sent = messages(action, [3, 1], seconds=seconds)
        assert len(grid.send_and_receive(sent, timeout=3.0)) < 2 or action == "die"
        assert grid._context(3).state["prepared"]["round"] == 1
        assert grid._context(1).state["prepared"]["round"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_state_stays_with_its_client_between_rounds(workers):
    with probe(workers=workers) as grid:
        replies = grid.send_and_receive(messages("count", [1, 2]))
        assert [reply.content["metrics"]["times"] for reply in replies] == [1, 1]
        # Two messages to one client in one push follow each other.
        replies = grid.send_and_receive(messages("count", [2, 3, 2]))
        assert [reply.content["metrics"]["times"] for reply in replies] == [2, 1, 3]
        grid.send_and_receive(messages("add", [5, 6]))
        assert sorted(grid._states) == [1, 2, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_clients_do_not_see_what_others_do_to_the_shared_message(workers):
    with probe(workers=workers) as grid:
        sent = messages("spoil", grid.get_node_ids())
        replies = grid.send_and_receive(sent)
    assert [reply.content["metrics"]["clean"] for reply in replies] == [1] * 6
    assert sorted(sent[0].content) == ["arrays", "config"]
    assert len(sent[0].content["arrays"]) == 1


def test_without_containers_of_their_own_clients_would_see_each_other(monkeypatch):
    monkeypatch.setattr(simulations.engine, "_own", lambda content: content)
    with probe() as grid:
        replies = grid.send_and_receive(messages("spoil", grid.get_node_ids()))
    assert [reply.content["metrics"]["clean"] for reply in replies] == [1, 0, 0, 0, 0, 0]


def test_a_client_cannot_change_a_reply_that_the_server_holds():
    app = ClientApp()
    record = MetricRecord({"times": 0})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record["times"] += 1
        return Message(RecordDict({"metrics": record}), reply_to=message)

    with LocalGrid(app, nodes=2, run_config={}) as grid:
        replies = grid.send_and_receive([Message(RecordDict(), node, "train") for node in (1, 2, 1)])
    assert [reply.content["metrics"]["times"] for reply in replies] == [1, 2, 3]


def test_arrays_are_shared_and_not_copied():
    seen = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(message.content["arrays"]["0"])
        return Message(message.content, reply_to=message)

    arrays = ArrayRecord([np.zeros(1000)])
    content = RecordDict({"arrays": arrays})
    with LocalGrid(app, nodes=3, run_config={}) as grid:
        replies = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
    assert all(array is arrays["0"] for array in seen)
    assert all(reply.content["arrays"]["0"] is arrays["0"] for reply in replies)


def test_every_reply_is_told_as_it_comes():
    told = []
    with probe(on_reply=told.append) as grid:
        replies = grid.send_and_receive(messages("fail", [3, 2, 1]))
    assert told == replies


def test_clients_find_flowers_node_config_or_ours():
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({"config": ConfigRecord(dict(context.node_config))}), reply_to=message)

    def ask(**options):
        with LocalGrid(app, nodes=4, run_config={}, **options) as grid:
            reply = grid.send_and_receive([Message(RecordDict(), 3, "query")])[0]
        return dict(reply.content["config"])

    assert ask() == {"partition-id": 2, "num-partitions": 4}
    assert ask(node_config=lambda index: {"folder": f"client-{index}"}) == {"folder": "client-2"}


def test_a_population_of_100_000_costs_what_its_cohort_costs():
    def rounds(nodes):
        tracemalloc.start()
        started = time.process_time()
        with probe(nodes=nodes) as grid:
            assert grid.get_node_ids() == range(1, nodes + 1)
            assert next(iter(grid.get_nodes())).node_id == 1
            for turn in range(3):
                cohort = random.Random(turn).sample(grid.get_node_ids(), 50)
                assert len(grid.send_and_receive(messages("add", cohort))) == 50
            memory = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return time.process_time() - started, memory

    rounds(1_000)
    small_s, small_bytes = min(rounds(1_000) for _ in range(2))
    large_s, large_bytes = min(rounds(100_000) for _ in range(2))
    # A list of 100,000 contexts alone would take 20 MB and a second.
    assert large_bytes - small_bytes < 1_000_000
    assert large_s < 1.5 * small_s + 0.05


def test_the_engine_adds_less_than_a_fifth_of_a_millisecond_per_message():
    """Beside direct calls of the same app; the least processor time of several turns of each."""
    app = ClientApp()
    model = np.zeros(100_000)

    @app.train("echo")
    def echo(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    def direct(grid):
        sent = messages("echo", grid.get_node_ids(), model=model)
        contexts = [grid._context(node_id) for node_id in grid.get_node_ids()]
        started = time.process_time()
        for message, context in zip(sent, contexts, strict=True):
            app(message, context)
        return time.process_time() - started

    def engine(grid):
        sent = messages("echo", grid.get_node_ids(), model=model)
        started = time.process_time()
        grid.send_and_receive(sent)
        return time.process_time() - started

    with LocalGrid(app, nodes=50, run_config={f"key-{i}": i for i in range(40)}) as grid:
        turns = [(direct(grid), engine(grid)) for _ in range(8)]
    least_direct, least_engine = (min(column) for column in zip(*turns, strict=True))
    assert (least_engine - least_direct) / 50 < 0.0002


def test_no_process_is_left_after_close():
    with probe(workers=2) as grid:
        grid.send_and_receive(messages("add", [1, 2]))
        pids = [member.process.pid for member in grid._workers._members]
        assert all(alive(pid) for pid in pids)
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(RunError, match="expected an open grid"):
        grid.send_and_receive(messages("add", [1]))
    grid.close()


PARENT = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
    from simulations.engine import LocalGrid

    if __name__ == "__main__":
        grid = LocalGrid(
            "engine_probe:app", nodes=4, run_config={}, workers=2, app_dir=Path(sys.argv[1])
        )
        content = RecordDict(
            {"arrays": ArrayRecord([np.zeros(3)]), "config": ConfigRecord({"seconds": 120.0})}
        )
        with grid:
            grid.send_and_receive([Message(content, node, "train.add") for node in (1, 2)])
            print(*[member.process.pid for member in grid._workers._members], flush=True)
            grid.send_and_receive([Message(content, node, "train.sleep") for node in (1, 2)])
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_and_say_nothing(how, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen(
        [sys.executable, str(script), str(PROBE)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.5)
    if how is signal.SIGINT:
        # A terminal sends Ctrl-C to everybody.
        os.killpg(parent.pid, how)
    else:
        parent.send_signal(how)
    _, errors = parent.communicate(timeout=30)
    assert parent.returncode != 0
    assert gone(pids)
    assert errors.count("Traceback") == (1 if how is signal.SIGINT else 0), errors


@pytest.mark.slow
def test_workers_are_dealt_the_devices_in_turn():
    with probe(workers=3, devices=("cuda:4", "1")) as grid:
        grid.send_and_receive(messages("add", [1]))
        seen = {}
        deadline = time.monotonic() + 60
        while len(seen) < 3 and time.monotonic() < deadline:
            for reply in grid.send_and_receive(messages("process", grid.get_node_ids())):
                seen[reply.content["config"]["pid"]] = reply.content["config"]["device"]
    assert sorted(seen.values()) == ["1", "4", "4"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"nodes": 0}, "expected nodes >= 1, got nodes=0"),
        ({"workers": 0}, "expected workers >= 1"),
        ({"threads": 0}, "expected threads >= 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(RunError, match=sentence):
        probe(**options)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("engine_probe", "expected an app as 'module:attribute'"),
        ("no_such_module:app", "expected to import 'no_such_module'"),
        ("engine_probe:nothing", "got none of that name"),
        ("engine_probe:partition", "expected 'engine_probe:partition' to be a ClientApp, got a function"),
    ],
)
def test_an_app_that_cannot_be_loaded_is_one_sentence(reference, sentence):
    with pytest.raises(RunError, match=sentence):
        LocalGrid(reference, nodes=2, run_config={}, app_dir=PROBE)


def test_an_app_object_cannot_go_to_several_workers():
    with pytest.raises(RunError, match="expected the ClientApp as 'module:attribute' for 2 workers"):
        LocalGrid(ClientApp(), nodes=2, run_config={}, workers=2)


def test_a_reply_cannot_be_pushed():
    with probe() as grid:
        reply = grid.send_and_receive(messages("add", [1]))[0]
        with pytest.raises(ValueError, match="expected a message to a client"):
            grid.push_messages([reply])


def test_a_strategy_of_flowers_runs_on_the_grid():
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = message.content["arrays"].to_numpy_ndarrays()[0]
        content = {"arrays": ArrayRecord([model + 1]), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    with LocalGrid(app, nodes=3, run_config={}) as grid:
        strategy = FedAvg(fraction_evaluate=0.0)
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord([np.zeros(2)]), num_rounds=4)
    assert result.arrays.to_numpy_ndarrays()[0].tolist() == [4.0, 4.0]


def run_quickstart(name, workers, result):
    random.seed(0)  # Flower's FedAvg draws the order of its clients from it.
    run_app(APPS / name, nodes=5, workers=workers, overrides={"result": str(result)})


def test_an_unmodified_numpy_quickstart_gives_equal_results_for_any_number_of_workers(tmp_path):
    for workers in (1, 2):
        run_quickstart("quickstart_numpy", workers, tmp_path / f"{workers}")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    result = json.loads((tmp_path / "1").read_text())
    assert len(result["accuracy"]) == 3
    assert result["accuracy"][-1] > 0.8


def test_an_unmodified_torch_quickstart_gives_equal_results_for_any_number_of_workers(tmp_path):
    threads = torch.get_num_threads()
    for workers in (1, 2):
        run_quickstart("quickstart_torch", workers, tmp_path / f"{workers}")
    one, two = (torch.load(tmp_path / f"{workers}", weights_only=True) for workers in (1, 2))
    assert one["accuracy"] == two["accuracy"]
    assert one["accuracy"][-1] > 0.8
    assert one["model"].keys() == two["model"].keys()
    for name, tensor in one["model"].items():
        assert tensor.numpy().tobytes() == two["model"][name].numpy().tobytes()
    assert torch.get_num_threads() == threads


def test_an_unknown_override_names_the_nearest_key():
    with pytest.raises(RunError, match=r"got 'local-epoch'; did you mean 'local-epochs'\?"):
        run_app(APPS / "quickstart_numpy", overrides={"local-epoch": 3})


GOOD = "[tool.flwr.app.components]\nserverapp = 'here_server:app'\nclientapp = 'here_client:app'\n"


@pytest.mark.parametrize(
    ("project", "sentence"),
    [
        (None, "expected a Flower app with a readable .*pyproject.toml"),
        ("[tool", "expected valid TOML"),
        ("[project]\nname = 'x'\n", "expected serverapp = 'module:attribute'"),
        ("[tool.flwr.app.components]\nserverapp = 'a:b'\n", "expected clientapp = 'module:attribute'"),
        (GOOD, "expected to import 'here_server'"),
        (
            GOOD + "[tool.flwr.app.config]\nsizes = [1, 2]\n",
            "expected a number, string or boolean for 'sizes'",
        ),
    ],
)
def test_a_folder_without_a_flower_app_is_one_sentence(project, sentence, tmp_path):
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(project)
    with pytest.raises(RunError, match=sentence):
        run_app(tmp_path)
    assert str(tmp_path) not in sys.path


def test_a_module_imported_from_elsewhere_is_not_taken_for_the_apps_own(tmp_path):
    load_app("engine_probe:app", ClientApp, PROBE)
    (tmp_path / "engine_probe.py").write_text("app = None\n")
    with pytest.raises(RunError, match="run this app in a process of its own"):
        load_app("engine_probe:app", ClientApp, tmp_path)

"""``tacit infer``: publish, make keys, ask, look at the log, and the demonstration, as a person types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clients.data import load_source
from clients.home import ClientHome
from clients.inference import Asker
from models.catalog import TASKS
from privacy.enrolment import Address
from privacy.errors import TacitError
from privacy.vault.container import is_sealed
from server.home import ServerHome
from simulations.inference import federation, published_of, served
from simulations.run import simulate
from simulations.scenario import Scenario
from tacit import main
from tests.deploying import Federation
from tests.inferring import Quiet

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    simulate(Scenario.layered(None, {"rounds": 3, "clients": 4}), out=folder / "run", observer=Quiet())
    return folder


@pytest.fixture(scope="module")
def homes(place: Path) -> tuple[ServerHome, ClientHome]:
    home, (client,) = federation(place)
    return home, client


@pytest.fixture(scope="module")
def at(place: Path, homes: tuple[ServerHome, ClientHome]) -> Iterator[str]:
    with served(place / "run", homes[0], "--rate", "1000") as address:
        yield str(address)


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def test_keys_then_queries_then_the_log(
    at: str, homes: tuple[ServerHome, ClientHome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    home, client = (str(one.folder) for one in homes)
    source = load_source(TASKS["digits"])
    pixels = (source.test.inputs[7, 0].numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    assert main(["infer", "keygen", "--home", client, "--at", at, "--queries", "20", "--json"]) == 0
    facts = told(capsys)
    assert facts["queries"] == 20
    assert facts["approximate"] is False
    assert facts["privacy"]["guarantee"] is True
    session = Path(facts["session"])
    assert session.stat().st_mode & 0o777 == 0o600
    query = ["infer", "query", "--home", client]
    assert main([*query, str(tmp_path / "digit.png"), "--test", "7", "--test", "8", "--json"]) == 0
    facts = told(capsys)
    answers = facts["answers"]
    assert answers[0]["class"] == answers[1]["class"]
    assert facts["left"] == 17
    assert main([*query, "--test", "1"]) == 0
    assert "16 queries left" in capsys.readouterr().out
    assert main(["infer", "log", "--home", home, "--json"]) == 0
    lines = told(capsys)["lines"]
    assert [line["kind"] for line in lines[-5:]] == ["open", *["ask"] * 4]
    assert {line["verdict"] for line in lines} == {"answered"}
    assert main(["infer", "log", "--home", home]) == 0
    assert "clinic-a" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["query"], 2, "records to ask about"),
        (["query", "gone.png"], 3, "gone.png"),
        (["query", "--test", "999"], 3, "public test set"),
        (["query", "--session", "nowhere", "--test", "1"], 6, "keygen"),
        (["keygen", "--head", "other"], 2, "there are: digits"),
        (["keygen", "--at", "127.0.0.1:1"], 6, "is it running"),
        (["keygen", "--at", "nonsense"], 10, "HOST:PORT"),
        (["keygen", "--queries", "-1"], 2, "1 or more"),
        (["keygen", "--life", "soon"], 2, "such as 30m"),
    ],
)
def test_what_goes_wrong_is_said_in_a_sentence(
    at: str,
    homes: tuple[ServerHome, ClientHome],
    arguments: list[str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
):
    client = str(homes[1].folder)
    if "--session" not in arguments and arguments[0] == "query":
        assert main(["infer", "keygen", "--home", client, "--at", at, "--queries", "5"]) == 0
    if arguments[0] == "keygen" and "--at" not in arguments:
        arguments = [*arguments, "--at", at]
    capsys.readouterr()
    assert main(["infer", arguments[0], "--home", client, *arguments[1:]]) == code
    error = capsys.readouterr().err
    assert error.startswith("tacit: ")
    assert "expected " in error
    assert error.count("\n") == 1
    assert words in error


def test_approximate_numbers_come_with_a_warning(
    at: str, homes: tuple[ServerHome, ClientHome], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = ["infer", "keygen", "--home", str(homes[1].folder), "--at", at, "--queries", "5", "--life", "5m"]
    assert main(words) == 0
    assert "never share these numbers" not in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(Asker, "approximate", True)
    assert main(words) == 0
    assert "never share these numbers" in " ".join(capsys.readouterr().out.split())


def test_who_has_not_joined_has_nothing_to_ask_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["infer", "keygen", "--home", str(tmp_path)]) == 10
    assert "join" in capsys.readouterr().err


def test_a_head_that_was_not_trained_with_privacy_is_not_served(
    place: Path, homes: tuple[ServerHome, ClientHome], capsys: pytest.CaptureFixture[str]
):
    (place / "run" / "report.json").rename(place / "run" / "away.json")
    try:
        assert (
            main(["infer", "serve", str(place / "run"), "--home", str(homes[0].folder), "--listen", "127.0.0.1:0"]) == 6
        )
    finally:
        (place / "run" / "away.json").rename(place / "run" / "report.json")
    assert "report.json" in capsys.readouterr().err


@pytest.mark.slow
def test_serve_says_what_it_publishes_and_ends_at_a_signal(place: Path, homes: tuple[ServerHome, ClientHome]):
    command = [sys.executable, "-m", "tacit", "infer", "serve", str(place / "run"), "--home", str(homes[0].folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert "guarantee: epsilon 2." in lines[0]
    assert "128-bit security" in lines[1]
    assert "answering encrypted queries on port" in lines[3]


@pytest.mark.slow
def test_the_demonstration_on_a_run_that_is_there(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["infer", "demo", "--run", str(place / "run"), "--records", "40", "--json"]) == 0
    facts = told(capsys)
    assert facts["exact"] == facts["records"] == 40
    assert facts["agree"] >= 39
    assert facts["bytes_up"] <= 16_000
    assert facts["bytes_down"] <= 31_000
    assert facts["keys_at_server"] == 0


@pytest.mark.slow
def test_the_demonstration_trains_publishes_asks_and_agrees(capsys: pytest.CaptureFixture[str]):
    assert main(["infer", "demo"]) == 0
    out = capsys.readouterr().out
    assert "360 of 360 records: every one equal" in out
    assert "trained with epsilon" in out


@pytest.mark.slow
def test_a_head_trained_on_separate_machines_is_asked_by_a_member_that_trained_it(tmp_path: Path):
    with Federation(tmp_path / "f") as on:
        for client in on.clients:
            client.join("--epsilon", 3, "--delta", 1e-5, "--records-bound", 2000)
        on.start_clients()
        words = ("--clients", 2, "--rounds", 2, "--records-per-client", 720)
        on.finished(on.run("one", *words))
        # Its checkpoint is sealed by the home's keys, its report signed by the home's application.
        assert is_sealed(on.folder / "one" / "checkpoints" / "latest.ckpt")
        serving = on.spawn(
            on.command("infer", "serve", on.folder / "one", "--home", on.home, "--listen", "127.0.0.1:0", "--json")
        )
        assert serving.stdout is not None
        facts = json.loads(serving.stdout.readline())
        assert facts["heads"][0]["privacy"]["guarantee"] is True
        asking = on.clients[0]
        told_of = on.tell(
            "infer", "keygen", "--home", asking.home, "--at", f"127.0.0.1:{facts['port']}", "--queries", 3
        )
        assert told_of["queries"] == 3
        answers = on.tell("infer", "query", "--home", asking.home, "--test", 0, "--test", 1)["answers"]
        assert len(answers) == 2
        lines = on.tell("infer", "log", "--home", on.home)["lines"]
        assert [line["client"] for line in lines] == [asking.name] * 3
        # A report that another server signed vouches for nothing here.
        ServerHome.create(
            tmp_path / "other", name="o", addresses=[Address("127.0.0.1", 1)], enrol=[Address("127.0.0.1", 2)]
        )
        with pytest.raises(TacitError):
            published_of(on.folder / "one", ServerHome.open(tmp_path / "other"))

"""Metrics: the text parses, nothing of data leaves the server's side, a holder's own figures stay on its machine."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import tacit
from clients import services as client_services
from clients.home import ClientHome
from clients.join import join
from privacy.errors import PlanError, RunError
from privacy.exposition import Exposition, Figure, of_processes, one, place, rendered
from server import services as server_services
from server.enrol import invite
from server.services import Counted, Places, Progress, counters_of, job_of
from tests.enrolling import CHOICES, Running, make_home, running


class Sample(NamedTuple):
    """One line of a scrape."""

    kind: str
    labels: dict[str, str]
    value: float


def parsed(text: str) -> dict[str, list[Sample]]:
    """Reads Prometheus' text format, version 0.0.4, strictly."""
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    helped: set[str] = set()
    found: dict[str, list[Sample]] = {}
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            name = line.split(" ")[2]
            assert name not in helped
            helped.add(name)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert kind in ("counter", "gauge")
            kinds[name] = kind
        else:
            match = re.fullmatch(r"([a-z_]+)(?:\{(.*)\})? (\S+)", line)
            assert match, line
            name, labels, value = match.groups()
            pairs = re.findall(r'([a-z_]+)="((?:[^"\\]|\\["\\n])*)"', labels or "")
            assert ",".join(f'{key}="{text}"' for key, text in pairs) == (labels or "")
            assert math.isfinite(float(value))
            found.setdefault(name, []).append(Sample(kinds[name], dict(pairs), float(value)))
            assert kinds[name] == ("counter" if name.endswith("_total") else "gauge")
    assert set(found) <= set(kinds) == helped
    return found


def test_the_text_parses_with_whatever_stands_in_a_label() -> None:
    odd = 'a "quoted" \\ word\nand a line'
    text = rendered([one("tacit_one", "One.", 1.5), Figure("tacit_two_total", "Two.", [({"event": odd}, 3)])])
    found = parsed(text)
    assert found["tacit_one"] == [Sample("gauge", {}, 1.5)]
    assert found["tacit_two_total"][0].labels["event"] == 'a \\"quoted\\" \\\\ word\\nand a line'
    for name in ("other_one", "tacit_One", "tacit one"):
        with pytest.raises(ValueError, match="name of a metric"):
            one(name, "", 0)
    with pytest.raises(ValueError, match="name of a label"):
        rendered([Figure("tacit_one", "", [({"Bad label": ""}, 1)])])


def asked(port: int, path: str = "/metrics", host: str = "", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_one_path_is_served_and_no_page_of_a_browser_can_ask() -> None:
    fail = False

    def collect() -> list[Figure]:
        if fail:
            raise RunError("expected a ledger with the secret 1234, got none; restore it")
        return [one("tacit_one", "One.", 1)]

    exposition = Exposition("127.0.0.1", 0, collect)
    try:
        port = exposition.port
        status, text = asked(port)
        assert status == 200
        assert parsed(text)["tacit_one"][0].value == 1
        assert asked(port, host=f"localhost:{port}")[0] == 200
        assert asked(port, host=f"evil.example:{port}")[0] == 403
        assert asked(port, "/")[0] == 404
        assert asked(port, method="POST")[0] == 501
        fail = True
        status, text = asked(port)
        assert status == 503
        assert "1234" not in text
        with pytest.raises(RunError, match="choose another --metrics"):
            Exposition("127.0.0.1", port, collect)
    finally:
        exposition.close()


def test_a_holders_metrics_are_on_loopback_or_nowhere() -> None:
    assert place("9464", loopback=True) == ("127.0.0.1", 9464)
    assert place("[::1]:9464", loopback=True) == ("::1", 9464)
    assert place("0.0.0.0:9464", loopback=False) == ("0.0.0.0", 9464)  # noqa: S104 -- what is refused below
    for text in ("0.0.0.0:9464", "10.0.0.1:9464", "holder.example:9464", "127.0.0.1.evil.example:1"):
        with pytest.raises(PlanError, match="loopback"):
            place(text, loopback=True)
    for text in ("", "host", "1:x", "1:70000"):
        with pytest.raises(PlanError, match="HOST:PORT"):
            place(text, loopback=False)


def test_of_processes_says_what_runs() -> None:
    found = parsed(rendered(of_processes({"relay": 2, "gateway": 0}, {"relay": True, "gateway": False}, 1)))
    assert {sample.labels["process"]: sample.value for sample in found["tacit_process_up"]} == {
        "relay": 1,
        "gateway": 0,
    }
    assert found["tacit_process_restarts_total"][0] == Sample("counter", {"process": "relay"}, 2)
    assert found["tacit_chore_faults"][0].value == 1


# -- the server's side -------------------------------------------------------------------------------------------------

# All that a server may show; whoever adds one says here why it depends on nobody's data.
_OF_SERVERS = {
    "tacit_members",
    "tacit_members_connected",
    "tacit_job_running",
    "tacit_job_round",
    "tacit_job_rounds",
    "tacit_gateway_events_total",
}


class Gateway:
    """Counts as one does."""

    def __init__(self) -> None:
        self.counters = {"connections": 2, "pull-messages 200": 7}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    home = make_home(tmp_path / "s")
    for name in ("north", "south"):
        invite(home, name)
    return Places(home)


def test_g12_a_server_shows_counts_of_what_is_public_and_no_name(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_services, "connected", lambda places: [{"connected": True}, {"connected": False}])
    Counted(places, Gateway()).tell()  # type: ignore[arg-type]
    progress = Progress(places, job="ab" * 16, run="/run", task="digits", rounds=20)
    progress.tell(status="running", round=3, members={"north": "answered", "south": "other-program"})
    text = rendered(server_services.figures_of(places))
    found = parsed(text)
    assert set(found) == _OF_SERVERS
    assert {sample.labels["state"]: sample.value for sample in found["tacit_members"]}["invited"] == 2
    assert found["tacit_members_connected"][0].value == 1
    assert (found["tacit_job_round"][0].value, found["tacit_job_rounds"][0].value) == (3, 20)
    assert found["tacit_job_running"][0].value == 1
    assert {
        sample.labels["event"]: sample.value for sample in found["tacit_gateway_events_total"]
    } == Gateway().counters
    for private in ("north", "south", "digits", "other-program", "accuracy", "epsilon", "loss"):
        assert private not in text


def test_a_server_without_a_relay_or_a_job_shows_the_rest(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(places: Places) -> list[dict[str, object]]:
        raise RunError("expected an answer of the SuperLink, got none; tacit server start")

    monkeypatch.setattr(server_services, "connected", away)
    places.counters.write_bytes(b"[]")
    assert set(parsed(rendered(server_services.figures_of(places)))) == {"tacit_members", "tacit_job_running"}
    assert counters_of(places) == {}


def test_the_jobs_progress_is_private_to_the_operator_and_says_when_its_process_died(places: Places) -> None:
    assert job_of(places) is None
    progress = Progress(places, job="ab" * 16, run="/run", task="digits", rounds=20)
    assert places.job.stat().st_mode & 0o777 == 0o600
    job = job_of(places)
    assert job is not None
    assert (job["on"], job["status"], job["round"]) == (True, "waiting", 0)
    progress.tell(pid=2**22 + 1)
    assert job_of(places)["on"] is False  # type: ignore[index]
    progress.tell(pid=os.getpid(), status="finished")
    assert job_of(places)["on"] is False  # type: ignore[index]
    places.job.write_bytes(b'{"pid": "x"}')
    assert job_of(places) is None


def test_the_status_names_the_client_that_runs_another_program(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(places, job="ab" * 16, run="/run", task="digits", rounds=20)
    progress.tell(status="running", round=3, members={"north": "answered", "south": "other-program"})
    assert tacit.main(["server", "status", "--home", str(places.home.folder)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "round 3 of 20: running" in told
    assert "south: other-program (runs another Tacit than this server; bring both to one version)" in told
    assert "north: answered" in told
    assert tacit.main(["server", "status", "--home", str(places.home.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["job"]["members"]["south"] == "other-program"
    progress.tell(status="failed", words="expected 2 clients to be ready, got 1 (south: other-program); start them")
    assert tacit.main(["server", "status", "--home", str(places.home.folder)]) == 0
    assert "got 1 (south: other-program)" in " ".join(capsys.readouterr().out.split())


# -- a data holder's own -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("endpoint") / "s") as run:
        yield run


def test_a_holder_sees_its_own_spend(endpoint: Running, tmp_path: Path) -> None:
    home = ClientHome(tmp_path / "c")
    join(invite(endpoint.home, "west"), home, CHOICES, version=tacit.__version__)
    found = parsed(rendered(client_services.figures_of(home)))
    assert found["tacit_epsilon_granted"][0].value == CHOICES.policy.epsilon
    assert found["tacit_epsilon_spent"][0].value == 0
    assert found["tacit_rounds_answered_total"][0].value == 0
    assert "tacit_certificate_until_seconds" in found

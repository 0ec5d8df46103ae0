"""The life of a data holder and its server, and what a thief of their disks then finds: nothing that is secret."""

from __future__ import annotations

import base64
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from clients import services
from clients.home import ClientHome
from clients.home import Policy as JoinPolicy
from clients.jobs import Policy
from clients.join import Choices, join, renew
from clients.preflight import Verdict, local
from privacy.errors import IdentityError, VaultError
from privacy.files import write_whole
from privacy.vault import Safe, command, private, private_logger
from privacy.vault.container import is_sealed
from privacy.vault.keyfiles import save_keys
from privacy.vault.keys import Keyring
from server.app import CHECKPOINT
from server.checkpoint import load
from server.enrol import invite
from server.home import ServerHome
from server.services import Places as ServerPlaces
from simulations.deployment import keyring_of, newest_of
from simulations.scenario import Scenario
from simulations.world import code_hash
from tests.enrolling import running
from tests.simulations.test_deployment import Machines

SCHEMA = 'target = "y"\nclasses = ["a", "b"]\n\n[columns.x]\nkind = "number"\nmin = 0\nmax = 9\n'
RECORD, FAULT = "7.39281746", "patient forty-seven"
SCENARIO = Scenario(
    task="table",
    clients=1,
    rounds=2,
    steps_per_round=1,
    retries=1,
    records_per_client=30,
    records_bound=100,
    delta=1e-3,
    sample_rate=0.5,
    device="cpu",
)


def table(folder: Path, first: str) -> Path:
    folder.mkdir()
    (folder / "schema.toml").write_text(SCHEMA)
    for name in ("train", "test"):
        rows = "\n".join(f"{number % 9},{'ab'[number % 2]}" for number in range(30))
        (folder / f"{name}.csv").write_text(f"x,y\n{first},a\n{rows}\n")
    return folder


def number_of(key: Any) -> bytes:
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.private_numbers().private_value.to_bytes(key.key_size // 8, "big")


class Life:
    """A home of each side after all that happens to it in a job, and every secret of theirs by name."""

    def __init__(self, folder: Path, *, sealed: bool) -> None:
        self.folder, self.client, self.run = folder, ClientHome(folder / "client"), folder / "run"
        public = table(folder / "public", "1")
        data, keys = table(folder / "data", RECORD), folder / "data.keys"
        if sealed:
            ring = Keyring()
            save_keys(keys, ring, None)
            command.encrypt(data, None, [ring], purpose="data", run="", replace=False, progress=lambda *_: None)
            shutil.rmtree(data)
            data = folder / "data.sealed"
        choices = Choices(
            task="table",
            data=str(data),
            policy=JoinPolicy(epsilon=9.0, delta=1e-3, records_bound=100),
            keys=str(keys) if sealed else "",
        )
        with running(folder / "server") as run:
            self.server = run.home
            findings = {one.check: one for one in local(self.client, choices)}
            assert findings["data"].verdict is Verdict.OK, findings["data"]
            join(invite(run.home, "hospital-1"), self.client, choices, version="0.1.0")
            renew(self.client, version="0.1.0")
        places, self.places = services.Places(self.client), ServerPlaces(self.server)
        places.prepare()
        self.places.prepare()
        write_whole(places.policy, Policy(tasks=frozenset({"table"}), epsilon=9.0).to_json())
        log = private_logger("tacit.client")
        handlers = list(log.handlers)
        try:
            worker = services.worker_of(places, code=code_hash())
            machines = Machines.__new__(Machines)
            machines.folder, machines.home, machines.workers = folder, self.server, {501: worker}
            machines.enrolled, machines.away = {"hospital-1": 501}, set()
            machines.runs, machines.over, machines.lose = 6, 0, False
            self.machines = machines
            self.summary = machines.deploy(scenario=dataclasses.replace(SCENARIO, data=str(public)))
            log.error(FAULT)
        finally:
            for handler in [one for one in log.handlers if one not in handlers]:
                log.removeHandler(handler)
        self.worker = worker
        self.secrets = self._secrets()

    def _secrets(self) -> dict[str, bytes]:
        client, server, run = self.client.folder, self.server.folder, self.client.folder / "run"
        found = {"a record": RECORD.encode(), "a fault": FAULT.encode()}
        for path in (
            *(client / "keys" / "application.key", client / "ledger" / "ledger.key", run / "runtime.secret"),
            *(server / "application" / "server.key", server / "authority" / "registry.key"),
            server / "relay" / "runtime.secret",
        ):
            found[str(path.relative_to(self.folder))] = private.read(path)
        for path in (
            *(client / "keys" / "tls.pem", run / "loopback.pem", server / "authority" / "ca.key"),
            *(server / "enrol" / "tls.pem", server / "relay" / "tls.pem", server / "relay" / "loopback.pem"),
        ):
            found[str(path.relative_to(self.folder))] = number_of(load_pem_private_key(private.read(path), None))
        found["supernode"] = number_of(load_ssh_private_key(private.read(self.client.supernode_key), None))
        kept = sorted((client / "kept").glob("*.release"))
        assert kept
        safe = self.worker._holder.kept._safe
        assert safe is not None
        found["a release"] = safe.open(kept[0].name, kept[0].read_bytes())[-48:]
        model = load(self.run / CHECKPOINT, [keyring_of(self.server)]).model
        found["the model"] = max(model.values(), key=lambda value: value.size).astype("<f4").tobytes()[:48]
        assert len({*found.values()}) == len(found)
        return found

    def at_a_thief(self) -> set[str]:
        """Names of the secrets that are found in any file of the homes and the run folder, in any usual form."""
        found: set[str] = set()
        for place in (self.client.folder, self.server.folder, self.run):
            for path in place.rglob("*"):
                if path.is_file():
                    found |= found_in(path.read_bytes(), self.secrets)
        return found


def forms(secret: bytes) -> set[bytes]:
    """A secret raw, in hex, and in base64 at each of its three places."""
    spelt = {secret, secret.hex().encode(), secret.hex().upper().encode()}
    for offset in range(3):
        text = base64.b64encode(bytes(offset) + secret)
        spelt |= {text[-(-offset * 8 // 6) : len(text) - 4], base64.urlsafe_b64encode(bytes(offset) + secret)[4:-4]}
    return spelt


def found_in(content: bytes, secrets: Mapping[str, bytes]) -> set[str]:
    # PEM breaks its lines.
    contents = (content, content.replace(b"\n", b""))
    return {name for name, secret in secrets.items() if any(form in one for form in forms(secret) for one in contents)}


@pytest.mark.parametrize(
    "spell", [bytes, bytes.hex, *(lambda b, n=n: base64.b64encode(bytes(n) + b) for n in range(3))]
)
def test_the_search_finds_a_secret_in_each_form(spell: Any) -> None:
    secret = bytes(range(100, 132))
    text = spell(secret)
    text = text.encode() if isinstance(text, str) else text
    broken = b"\n".join(text[at : at + 20] for at in range(0, len(text), 20)) if len(text) > 32 else text
    for content in (b"before" + text + b"after", b"x\n" + broken + b"\ny"):
        assert found_in(content, {"it": secret}) == {"it"}
        assert found_in(content, {"it": secret[::-1]}) == set()


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    with pytest.MonkeyPatch.context() as patched:
        for name in ("KEYS", "PASSPHRASE", "PASSPHRASE_FILE"):
            patched.delenv(f"TACIT_VAULT_{name}", raising=False)
        return Life(tmp_path_factory.mktemp("life"), sealed=True)


def test_after_a_whole_life_no_secret_is_in_any_file_of_the_homes_or_the_run(life: Life) -> None:
    assert life.summary["status"] == "finished"
    assert life.at_a_thief() == set()
    # What a report is made of, and whoever checks a ledger reads, is there.
    assert (life.client.folder / "ledger" / "ledger.jsonl").read_bytes().count(b'"kind":"charge"') == 2
    # And what is sealed still says what it said: the homes go on.
    assert life.client.identity().public_key == life.worker._identity.public_key
    assert life.server.application_identity().public_key == life.server.settings.application


def test_planted_homes_that_seal_nothing_show_every_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring()
    monkeypatch.setattr(private, "make_ring", lambda folder: ring)
    monkeypatch.setattr(private, "link_ring", lambda ring, folder: None)
    monkeypatch.setattr(Safe, "seal", lambda self, name, *parts: b"".join(bytes(part) for part in parts))
    monkeypatch.setattr(Safe, "open", lambda self, name, sealed: sealed)
    monkeypatch.setattr("privacy.vault.safe._end_of", lambda safe, path: _log_end(path))
    life = Life(tmp_path, sealed=False)
    shown = life.at_a_thief()
    for path in life.folder.glob("data/*.csv"):
        shown |= found_in(path.read_bytes(), life.secrets)
    state = load(life.run / CHECKPOINT, [ring])
    state.vault = None
    from server.checkpoint import save

    save(state, life.run / CHECKPOINT)
    assert shown | life.at_a_thief() == set(life.secrets)


def _log_end(path: Path) -> Any:
    from privacy.vault.safe import _End

    return _End(0, 0, bytes(16), path.stat().st_size)


# -- played back, exchanged, lost -------------------------------------------------------------------------------------


@pytest.fixture
def copy(life: Life, tmp_path: Path) -> Life:
    """A copy of the homes that may be spoilt."""
    made = Life.__new__(Life)
    made.__dict__.update(life.__dict__)
    for name in ("client", "server", "run"):
        shutil.copytree(life.folder / name, tmp_path / name, symlinks=True)
    made.folder, made.client, made.run = tmp_path, ClientHome(tmp_path / "client"), tmp_path / "run"
    made.server = ServerHome.open(tmp_path / "server")
    return made


def test_a_kept_release_under_another_name_or_altered_counts_as_lost(copy: Life) -> None:
    kept = services.Kept(copy.client.folder / "kept", durable=False, safe=Safe(copy.client.secret(), "kept"))
    one, other = sorted((copy.client.folder / "kept").glob("*.release"))[:2]
    receipts = [entry for entry in _charges(copy) if entry["request"][:16] in (one.stem[-16:], other.stem[-16:])]
    assert len(receipts) == 2
    asked = [(entry["job"], copy.worker._holder.account(), entry["request"]) for entry in receipts]
    assert all(kept.get(*each) is not None for each in asked)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert [kept.get(*each) for each in asked] == [None, None]
    # An older sealing of the same release is the same release: one charge has paid for it, whichever is sent.
    one.write_bytes(first)
    release = next(found for each in asked if (found := kept.get(*each)) is not None)
    kept.put(release)
    assert one.read_bytes() != first
    one.write_bytes(first)
    again = next(found for each in asked if (found := kept.get(*each)) is not None)
    assert again.receipt == release.receipt
    assert np.array_equal(again.parameters, release.parameters)


def _charges(life: Life) -> list[dict[str, Any]]:
    import json

    lines = (life.client.folder / "ledger" / "ledger.jsonl").read_text().splitlines()
    return [entry["body"] for line in lines if (entry := json.loads(line))["kind"] == "charge"]


def test_a_checkpoint_that_is_put_back_into_a_deployed_run_is_refused(copy: Life) -> None:
    job = load(copy.run / CHECKPOINT, [keyring_of(copy.server)]).job
    newest = newest_of(copy.server, job)
    state = load(copy.run / CHECKPOINT, [keyring_of(copy.server)], newest)
    assert state.generation == newest.generation > 1
    older = (copy.run / CHECKPOINT).read_bytes()
    from server.checkpoint import save

    state.vault, state.newest = keyring_of(copy.server), newest
    save(state, copy.run / CHECKPOINT)
    (copy.run / CHECKPOINT).write_bytes(older)
    with pytest.raises(VaultError, match="another version was put in its place"):
        load(copy.run / CHECKPOINT, [keyring_of(copy.server)], newest_of(copy.server, job))


def test_keys_that_are_exchanged_within_a_home_are_refused(copy: Life) -> None:
    keys = copy.client.folder / "keys"
    one, other = keys / "application.key", copy.client.folder / "ledger" / "ledger.key"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    for attempt in (copy.client.secret, lambda: services.Book(copy.client.folder / "ledger")):
        with pytest.raises(VaultError, match="it is another file"):
            attempt()
    # The server's rooms have a keyring each: a key of one opens in no other.
    rooms = copy.server.folder
    shutil.copy(rooms / "enrol" / "tls.pem", rooms / "relay" / "tls.pem")
    with pytest.raises(VaultError, match="expected a key that opens"):
        private.read(copy.server.relay_tls)


def test_a_home_that_lost_its_keyring_says_so_and_loses_nothing(copy: Life) -> None:
    ring = copy.client.folder / "keys" / private.RING
    away = ring.rename(ring.with_name("away"))
    before = {path: path.read_bytes() for path in copy.client.folder.rglob("*") if path.is_file()}
    places = services.Places(copy.client)
    for attempt in (copy.client.secret, places.prepare, copy.client.seal):
        with pytest.raises(VaultError, match="restore a backup"):
            attempt()
    after = {path: path.read_bytes() for path in copy.client.folder.rglob("*") if path.is_file()}
    assert after == before
    away.rename(ring)
    assert copy.client.identity().public_key == copy.worker._identity.public_key


def test_a_home_of_an_older_tacit_is_sealed_at_its_next_start_and_is_the_same_client(copy: Life) -> None:
    def unseal(place: Path) -> None:
        for path in [path for path in place.rglob("*") if path.is_file() and is_sealed(path)]:
            if path.parent.name in ("keys", "authority", "enrol", "relay") or path.suffix in (
                ".key",
                ".secret",
                ".pem",
            ):
                path.write_bytes(private.read(path))
        for path in place.rglob(private.RING):
            if path.parent.name != "application":
                path.unlink()

    settings = dataclasses.replace(copy.client.settings, ledger=str(copy.client.folder / "ledger"))
    copy.client.save(settings)
    # An older Tacit had no shelf.
    for path in (copy.client.folder / "jobs").iterdir():
        path.unlink()
    unseal(copy.client.folder)
    unseal(copy.server.folder)
    shown = copy.at_a_thief()
    assert {"client/keys/application.key", "client/ledger/ledger.key", "server/authority/ca.key"} <= shown
    assert copy.client.identity().public_key == copy.worker._identity.public_key
    services.Places(copy.client).prepare()
    ServerPlaces(copy.server).prepare()
    assert copy.at_a_thief() == set()
    assert copy.client.identity().public_key == copy.worker._identity.public_key
    assert copy.server.application_identity().public_key == copy.server.settings.application
    # Another process that renews just now is not disturbed.
    with copy.client.alone(), pytest.raises(IdentityError, match="another process"):
        copy.client.seal()

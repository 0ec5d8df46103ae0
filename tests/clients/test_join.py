"""Joining: who is believed, what is sent, what is kept; and the preflight, which finds faults before anybody asks."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import random
import re
import socket
import ssl
import stat
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from clients import join as module
from clients import preflight
from clients.home import ClientHome, Policy
from clients.join import Choices, join, policy_of, renew, renew_when_due, require_unexpired
from clients.preflight import Finding, Verdict, choices_of, local, remote
from privacy.enrolment import LENGTH, Address, Invitation, message, new_secret, to_base64
from privacy.errors import DataError, IdentityError, LedgerError, PlanError
from privacy.hop import present
from privacy.identity import authority as certificates
from privacy.identity.authority import Authority, facts_of, read_certificate, require_client
from privacy.identity.loopback import write_loopback
from privacy.identity.supernode import supernode_public
from privacy.ledger import Book
from privacy.plan import Metric
from privacy.vault import private
from server import enrol
from server.enrol import Registry, State, invite, revoke
from server.home import ServerHome
from tests.enrolling import CHOICES, HOST, Running, authority_of, make_home, running

VERSION = "0.1.0"
POLICY = CHOICES.policy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("deployment") / "server") as made:
        yield made


_numbers = iter(range(10**6))


def new_invitation(run: Running, **options: Any) -> Invitation:
    return invite(run.home, f"member-{next(_numbers)}", **options)


@pytest.fixture
def home(tmp_path: Path) -> ClientHome:
    return ClientHome(tmp_path / "client")


def changed(invitation: Invitation, **fields: Any) -> Invitation:
    return dataclasses.replace(invitation, **fields)


# -- a join that goes well --------------------------------------------------------------------------------------------


def test_g21_a_join_makes_keys_here_enrols_them_and_grants_the_holders_budget(run: Running, home: ClientHome) -> None:
    invitation = new_invitation(run, epsilon=3.0, delta=1e-5)
    settings, greeting = join(invitation, home, CHOICES, version=VERSION)
    member = Registry.of(run.home).members()[invitation.name]
    assert member.state is State.ENROLLED
    assert member.application == home.identity().public_key
    assert member.supernode == home.supernode_public() == supernode_public(home.supernode())
    assert require_client(read_certificate(home.tls), run.home.authority, now=time.time()) == invitation.name
    assert home.settings == settings
    assert settings.server == run.home.application_identity().public_key
    assert settings.addresses == run.home.settings.addresses
    assert greeting.address == invitation.addresses[0]
    for path in home.folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    # What OpenSSL makes of the file is what a tunnel will show.
    present(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), home.tls, home.tls)
    # The holder's own word is in the ledger, whatever was asked (guarantees G13 and G21).
    with Book(home.folder / "ledger") as book:
        grant = book.accounts["data"].grant
    assert (grant.epsilon, grant.delta, grant.records_bound) == (2.0, 1e-5, 5000)
    assert (settings.policy.epsilon, settings.asked) == (2.0, (3.0, 1e-5))


def private_parts(home: ClientHome) -> dict[str, bytes]:
    """Returns the private bytes of every key of a client, as whoever stole them would use them."""
    parts = {"application": private.read(home.folder / "keys" / "application.key")}
    parts["ledger"] = private.read(home.folder / "ledger" / "ledger.key")
    key = load_pem_private_key(private.read(home.tls), None)
    parts["tls"] = key.private_numbers().private_value.to_bytes(32, "big")  # type: ignore[union-attr]
    parts["tls pem"] = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())[40:120]
    parts["supernode"] = home.supernode()[300:400]
    return parts


def found_at(folder: Path, parts: dict[str, bytes]) -> set[str]:
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    # What stands in a PEM block is looked at as bytes too.
    blocks = [block for file in files for block in re.findall(rb"-----\n([A-Za-z0-9+/=\n]+)\n-----", file)]
    files += [base64.b64decode(block) for block in blocks]
    return {name for name, part in parts.items() for file in files if part in file or part.hex().encode() in file}


def test_g21_no_private_key_and_no_secret_reaches_the_server(run: Running, home: ClientHome) -> None:
    invitation = new_invitation(run)
    join(invitation, home, CHOICES, version=VERSION)
    parts = private_parts(home) | {"secret": invitation.secret}
    assert found_at(run.home.folder, parts) == set()
    # At the client itself all are sealed. The search finds what is there: unsealed, all but the secret, kept nowhere.
    assert found_at(home.folder, parts) == set()
    for path in (*home.private_files(), home.folder / "ledger" / "ledger.key"):
        path.write_bytes(private.read(path))
    assert found_at(home.folder, parts) == set(parts) - {"secret"}


def test_the_second_address_is_called_where_the_first_is_silent(run: Running, home: ClientHome) -> None:
    invitation = new_invitation(run)
    with socket.create_server((HOST, 0)) as gone:
        silent = Address(HOST, gone.getsockname()[1])
    both = changed(invitation, addresses=(silent, *invitation.addresses))
    assert join(both, home, CHOICES, version=VERSION)[1].address == invitation.addresses[0]


def test_nobody_at_home_is_said_with_what_to_do(run: Running, home: ClientHome) -> None:
    with socket.create_server((HOST, 0)) as gone:
        port = gone.getsockname()[1]
    lost = changed(new_invitation(run), addresses=(Address(HOST, port),))
    with pytest.raises(IdentityError, match=rf"{HOST}:{port}: Connection refused.*check that the server runs"):
        join(lost, home, CHOICES, version=VERSION)
    assert not home.joined


# -- who is believed --------------------------------------------------------------------------------------------------


class Rogue:
    """A server that is not ours, on loopback; records what it is told after its greeting."""

    def __init__(self, pem: bytes, folder: Path, greet: Callable[[], bytes]) -> None:
        self.told = b""
        self.listener = socket.create_server((HOST, 0))
        self.address = Address(HOST, self.listener.getsockname()[1])
        path = folder / "rogue.pem"
        path.write_bytes(pem)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(path)
        self.greet = greet
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Rogue:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        # A listener that is closed wakes nobody who waits in accept.
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, self.address.port), timeout=1).close()
        self.thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                raw, _ = self.listener.accept()
            except OSError:
                return
            with raw:
                raw.settimeout(3)
                with contextlib.suppress(OSError), self.context.wrap_socket(raw, server_side=True) as connection:
                    connection.sendall(self.greet())
                    while part := connection.recv(65536):
                        self.told += part


def hello_of(home: ServerHome, **fields: Any) -> bytes:
    """A greeting as the real server makes it, with what a liar would change."""
    known = {
        "application": home.settings.application,
        "authority": to_base64(home.authority),
        "federation": "demo",
        "nonce": "00" * 32,
        "oldest": "0.1.0",
        "time": int(time.time()),
    }
    data = message("hello", **(known | fields))
    return LENGTH.pack(len(data)) + data


def told_to(rogue: Rogue, invitation: Invitation, home: ClientHome) -> bytes:
    """Lets a client join at a rogue; returns what the rogue was told."""
    with rogue, contextlib.suppress(IdentityError):
        join(changed(invitation, addresses=(rogue.address,)), home, CHOICES, version=VERSION)
    return rogue.told


def rogues(real: ServerHome, folder: Path) -> dict[str, tuple[bytes, Callable[[], bytes]]]:
    """Servers with one fault each, as certificate and greeting."""
    own = make_home(folder / "own")
    stranger = Authority.create("demo", [HOST], now=time.time()).server_leaf("demo", [HOST], now=time.time())
    other_host = Authority.create("demo", ["10.9.9.9"], now=time.time())
    return {
        "another authority": (private.read(own.endpoint_tls), lambda: hello_of(own)),
        # It shows the true authority, which it cannot have a certificate of.
        "in between": (stranger, lambda: hello_of(real)),
        "for another host": (
            other_host.server_leaf("demo", ["10.9.9.9"], now=time.time()),
            lambda: hello_of(real, authority=to_base64(other_host.certificate)),
        ),
        "another application": (
            private.read(real.endpoint_tls),
            lambda: hello_of(real, application=own.settings.application),
        ),
        "an expired certificate": (_expired_pem(real), lambda: hello_of(real)),
        "a client's certificate": (
            _client_pem(real),
            lambda: hello_of(real),
        ),
    }


def _expired_pem(real: ServerHome) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH
    leaf = authority_of(real)._leaf("demo", [certificates._general(HOST)], key.public_key(), purpose, 1.7e9)
    return certificates._private_pem(key) + leaf.public_bytes(Encoding.PEM)


def _client_pem(real: ServerHome) -> bytes:
    from privacy.identity.authority import certificate_request, new_key, pem_of

    key = new_key()
    return key + pem_of(authority_of(real).client_leaf("x", certificate_request(key, "x"), now=time.time()))


@pytest.mark.parametrize(
    "fault",
    [
        "another authority",
        "in between",
        "for another host",
        "another application",
        "an expired certificate",
        "a client's certificate",
    ],
)
def test_g21_a_server_that_is_not_the_one_that_invited_is_told_nothing(
    run: Running, home: ClientHome, tmp_path: Path, fault: str
) -> None:
    pem, greet = rogues(run.home, tmp_path)[fault]
    invitation = new_invitation(run)
    assert told_to(Rogue(pem, tmp_path, greet), invitation, home) == b""
    assert not home.joined


def test_planted_bug_a_client_that_checks_no_fingerprint_tells_a_stranger(
    run: Running, home: ClientHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem, greet = rogues(run.home, tmp_path)["another authority"]
    monkeypatch.setattr(module.hmac, "compare_digest", lambda *_: True)
    invitation = new_invitation(run)
    told = told_to(Rogue(pem, tmp_path, greet), invitation, home)
    assert b'"kind":"join"' in told
    # Even then, what it was told is no secret and redeems nothing.
    assert invitation.secret.hex().encode() not in told


def test_a_wrong_host_name_is_refused(run: Running, home: ClientHome) -> None:
    invitation = new_invitation(run)
    named = changed(invitation, addresses=(Address("localhost", invitation.addresses[0].port),))
    with pytest.raises(IdentityError, match="certificate of this federation for localhost"):
        join(named, home, CHOICES, version=VERSION)


def test_g21_an_answer_by_who_does_not_know_the_secret_is_refused(
    run: Running, home: ClientHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = new_invitation(run)
    with monkeypatch.context() as patch:
        patch.setattr(enrol, "answer_mac", lambda *_: "00" * 32)
        with pytest.raises(IdentityError, match="without its MAC"):
            join(invitation, home, CHOICES, version=VERSION)
    assert not home.joined
    # The real server was asked; it gives the same keys the same answer.
    join(invitation, home, CHOICES, version=VERSION)
    assert home.joined


def test_planted_bug_a_client_that_checks_no_mac_believes_anybody(
    run: Running, home: ClientHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrol, "answer_mac", lambda *_: "00" * 32)
    monkeypatch.setattr(module.hmac, "compare_digest", lambda *_: True)
    join(new_invitation(run), home, CHOICES, version=VERSION)
    assert home.joined


def test_an_answer_with_another_members_certificate_is_refused(
    run: Running, home: ClientHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = new_invitation(run), new_invitation(run)
    other = ClientHome(tmp_path / "other")
    join(first, other, CHOICES, version=VERSION)
    foreign = to_base64(read_certificate(other.tls))
    enrolled = enrol.Desk._enrolled
    monkeypatch.setattr(enrol.Desk, "_enrolled", lambda self, name, _: enrolled(self, name, foreign))
    with pytest.raises(IdentityError, match="for our own key and name"):
        join(second, home, CHOICES, version=VERSION)


@pytest.mark.parametrize("count", [12, pytest.param(120, marks=pytest.mark.slow)])
def test_a_server_that_answers_garbage_gets_one_kind_of_error_in_time(
    run: Running, home: ClientHome, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, good = random.Random(5), hello_of(run.home)
    monkeypatch.setattr(module, "_EXCHANGE_S", 1.0)
    invitation, started = new_invitation(run), time.monotonic()

    def garbage() -> bytes:
        data = bytearray(good)
        match draw.randrange(5):
            case 0:
                return data[: draw.randrange(len(data))]
            case 1:
                return LENGTH.pack(draw.choice([2**32 - 1, 16385])) + draw.randbytes(100)
            case 2:
                return draw.randbytes(draw.randint(0, 400))
            case 3:
                body = draw.randbytes(200)
                return LENGTH.pack(len(body)) + body
            case _:
                data[draw.randrange(4, len(data))] ^= 1 << draw.randrange(8)
                return bytes(data)

    rogue = Rogue(private.read(run.home.endpoint_tls), tmp_path, garbage)
    pinned = invitation.authority, invitation.server
    faults = 0
    with rogue:
        rogue.context.num_tickets = 0
        for _ in range(count):
            # A changed nonce or time is no fault that a greeting alone could show.
            try:
                module.call([rogue.address], *pinned)
            except IdentityError:
                faults += 1
    assert faults > count / 2
    assert time.monotonic() - started < 2 * count


# -- clocks and times -------------------------------------------------------------------------------------------------


def test_an_expired_invitation_is_refused_before_anybody_is_called(run: Running, home: ClientHome) -> None:
    invitation = changed(new_invitation(run), expires=int(time.time()) - 10)
    with pytest.raises(IdentityError, match=r"expired at .* and it is .* here"):
        require_unexpired(invitation, time.time())
    with pytest.raises(IdentityError, match="ask for a new one, or set the clock"):
        join(invitation, home, CHOICES, version=VERSION)
    assert not home.folder.exists()


@pytest.mark.parametrize("skew_s", [-1000.0, 40 * 86400.0])
def test_clocks_that_disagree_are_named_as_the_fault(
    run: Running, home: ClientHome, skew_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, true = new_invitation(run, lifetime_s=30 * 86400), time.time
    invitation = changed(invitation, expires=2**40)
    clock = type("Clock", (), {"time": staticmethod(lambda: true() + skew_s), "monotonic": time.monotonic})
    monkeypatch.setattr(module, "time", clock)
    side = "ahead of" if skew_s > 0 else "behind"
    with pytest.raises(IdentityError, match=rf"clocks that agree, got one that is \d+ s {side}") as caught:
        join(invitation, home, CHOICES, version=VERSION)
    # The greeting tells whole seconds.
    (told,) = re.findall(r"is (\d+) s", str(caught.value))
    assert abs(int(told) - abs(skew_s)) < 10


def test_the_preflight_measures_the_clock_by_what_flower_accepts() -> None:
    def verdict(ahead_s: float) -> str:
        greeting = module.Greeting(Address(HOST, 1), b"", "", "demo", "0.1.0", ahead_s, 0)
        return preflight._clock(greeting).verdict.value

    assert [verdict(one) for one in (0, 2, -2, 5, 7, -200, -301)] == [
        "ok",
        "ok",
        "ok",
        "warning",
        "failed",
        "warning",
        "failed",
    ]
    from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import (
        MAX_TIMESTAMP_DIFF,
        MIN_TIMESTAMP_DIFF,
    )

    assert -MIN_TIMESTAMP_DIFF == preflight._AHEAD_S
    assert MAX_TIMESTAMP_DIFF >= preflight._BEHIND_S


# -- what is kept, and interruptions ----------------------------------------------------------------------------------


def test_a_join_whose_answer_was_lost_is_repeated_with_the_same_token(
    run: Running, home: ClientHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = new_invitation(run)
    read = module._receive
    calls = iter(range(10))

    def lossy(connection: ssl.SSLSocket, deadline: float) -> bytes:
        data = read(connection, deadline)
        if next(calls) == 1:
            raise EOFError("the line broke after the answer was sent")
        return data

    with monkeypatch.context() as patch:
        patch.setattr(module, "_receive", lossy)
        with pytest.raises(IdentityError, match="the line broke"):
            join(invitation, home, CHOICES, version=VERSION)
    assert Registry.of(run.home).members()[invitation.name].state is State.ENROLLED
    key = home.identity().public_key
    join(invitation, home, CHOICES, version=VERSION)
    assert home.joined
    assert home.identity().public_key == key


@pytest.mark.parametrize("step", ["make", "make_keys", "next_key", "adopt", "save", "discard_next_key"])
def test_a_join_that_is_killed_anywhere_is_repeated(
    run: Running, home: ClientHome, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = new_invitation(run)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ClientHome, step, killed)
        with pytest.raises(KeyboardInterrupt):
            join(invitation, home, CHOICES, version=VERSION)
    if not home.joined:
        join(invitation, home, CHOICES, version=VERSION)
    first = read_certificate(home.tls)
    assert remote_verdicts(home)["server"] == "ok"
    # Whatever was left behind, a renewal takes a key of its own.
    renew(home, version=VERSION)
    assert facts_of(read_certificate(home.tls)).key != facts_of(first).key


def test_two_that_join_into_one_home_do_not_mix_their_keys(run: Running, home: ClientHome) -> None:
    invitation = new_invitation(run)
    home.make()
    with home.alone(), pytest.raises(IdentityError, match="another process joins"):
        join(invitation, home, CHOICES, version=VERSION)
    join(invitation, home, CHOICES, version=VERSION)
    with home.alone(), pytest.raises(IdentityError, match="another process joins"):
        renew(home, version=VERSION)


def test_a_home_joins_once(run: Running, home: ClientHome) -> None:
    join(new_invitation(run), home, CHOICES, version=VERSION)
    before = home.settings
    second = new_invitation(run)
    with pytest.raises(IdentityError, match="expected a home that has not joined"):
        join(second, home, CHOICES, version=VERSION)
    assert home.settings == before
    assert Registry.of(run.home).members()[second.name].state is State.INVITED


@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("keys/application.key", LedgerError),
        ("keys/supernode.key", IdentityError),
        ("keys/tls.new", IdentityError),
    ],
)
def test_corrupt_key_files_are_refused_and_cost_no_invitation(
    run: Running, home: ClientHome, file: str, error: type[Exception]
) -> None:
    home.make()
    home.make_keys()
    home.next_key()
    path = home.folder / file
    path.write_bytes(b"garbage")
    invitation = new_invitation(run)
    with pytest.raises(error):
        join(invitation, home, CHOICES, version=VERSION)
    assert path.read_bytes() == b"garbage"
    assert Registry.of(run.home).members()[invitation.name].state is State.INVITED


def test_a_lost_application_key_is_not_replaced_once_the_client_has_joined(run: Running, home: ClientHome) -> None:
    join(new_invitation(run), home, CHOICES, version=VERSION)
    (home.folder / "keys" / "application.key").unlink()
    with pytest.raises(IdentityError, match="restore a backup"):
        home.identity()
    (home.folder / "client.json").write_bytes(b"{}")
    with pytest.raises(IdentityError, match=r"client\.json"):
        _ = home.settings


# -- the holder's own word --------------------------------------------------------------------------------------------


def test_g21_what_an_invitation_asks_is_never_taken_without_the_holders_word(run: Running) -> None:
    invitation = new_invitation(run, epsilon=3.0, delta=1e-5)
    with pytest.raises(PlanError, match="the invitation asks for epsilon 3 and delta 1e-05"):
        policy_of(invitation, epsilon=None, delta=None, records_bound=10)
    with pytest.raises(PlanError, match="--records-bound"):
        policy_of(invitation, epsilon=1.0, delta=1e-6, records_bound=None)
    with pytest.raises(PlanError, match="expected metrics among"):
        policy_of(invitation, epsilon=1.0, delta=1e-6, records_bound=10, allow_metrics=["names"])
    policy = policy_of(invitation, epsilon=1.0, delta=1e-6, records_bound=10, allow_metrics=["loss", "accuracy"])
    assert policy == Policy(
        epsilon=1.0, delta=1e-6, records_bound=10, allow_metrics=(Metric.ACCURACY, Metric.LOSS), allow_central=False
    )


def test_a_delta_that_would_publish_a_record_costs_no_invitation(run: Running, home: ClientHome) -> None:
    invitation = new_invitation(run)
    loose = dataclasses.replace(CHOICES, policy=dataclasses.replace(POLICY, delta=0.1))
    with pytest.raises(PlanError):
        join(invitation, home, loose, version=VERSION)
    assert Registry.of(run.home).members()[invitation.name].state is State.INVITED


def test_g13_data_with_a_ledger_keeps_it_and_its_budget_in_a_second_federation(
    run: Running, home: ClientHome, tmp_path: Path
) -> None:
    join(new_invitation(run), home, CHOICES, version=VERSION)
    identity = account(home.folder / "ledger")
    shared = dataclasses.replace(CHOICES, ledger=home.folder / "ledger")
    second, third = new_invitation(run), ClientHome(tmp_path / "third")
    more = dataclasses.replace(shared, policy=dataclasses.replace(POLICY, epsilon=20.0))
    with pytest.raises(LedgerError, match="expected the budget that 'data' has"):
        join(second, third, more, version=VERSION)
    assert Registry.of(run.home).members()[second.name].state is State.INVITED
    join(second, third, shared, version=VERSION)
    assert third.settings.ledger == str(home.folder / "ledger")
    assert account(home.folder / "ledger") == identity


def account(folder: Path) -> str:
    with Book(folder) as book:
        return book.accounts["data"].identity


def test_the_door_on_loopback_has_a_certificate_of_its_own(tmp_path: Path) -> None:
    now = time.time()
    door, root = write_loopback(tmp_path, now=now)
    first = door.read_bytes()
    certificates.require_server(read_certificate(door), read_certificate(root), "127.0.0.1", now=now)
    assert stat.S_IMODE(door.stat().st_mode) == 0o600
    # Every start makes another, and nothing is left that could sign a third.
    write_loopback(tmp_path, now=now + 21 * 86400)
    assert door.read_bytes() != first
    certificates.require_server(read_certificate(door), read_certificate(root), "localhost", now=now + 21 * 86400)
    assert {path.name for path in tmp_path.iterdir()} == {door.name, root.name}


# -- renewing ---------------------------------------------------------------------------------------------------------


def test_a_renewal_takes_a_fresh_key_and_one_that_was_interrupted_goes_on(
    run: Running, home: ClientHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = new_invitation(run)
    join(invitation, home, CHOICES, version=VERSION)
    first = read_certificate(home.tls)
    now = time.time()
    assert not home.renewal_due(now)
    assert home.renewal_due(now + 21 * 86400)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ClientHome, "adopt", killed)
        with pytest.raises(KeyboardInterrupt):
            renew(home, version=VERSION)
    assert read_certificate(home.tls) == first
    renew(home, version=VERSION)
    second = read_certificate(home.tls)
    assert facts_of(second).key != facts_of(first).key
    assert len(Registry.of(run.home).members()[invitation.name].certificates) == 2
    assert not (home.folder / "keys" / "tls.new").exists()
    revoke(run.home, invitation.name)
    with pytest.raises(IdentityError, match="revoked"):
        renew(home, version=VERSION)
    assert read_certificate(home.tls) == second


def test_a_client_that_is_too_old_is_told_so(run: Running, home: ClientHome) -> None:
    invitation = new_invitation(run)
    with pytest.raises(IdentityError, match="wants a newer Tacit"):
        join(invitation, home, CHOICES, version="0.0.1")
    join(invitation, home, CHOICES, version=VERSION)


def test_a_token_of_another_secret_is_unknown(run: Running, home: ClientHome) -> None:
    forged = changed(new_invitation(run), secret=new_secret())
    with pytest.raises(IdentityError, match="'unknown'"):
        join(forged, home, CHOICES, version=VERSION)
    assert not home.joined


# -- the preflight ----------------------------------------------------------------------------------------------------


def verdicts(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict.value for finding in findings}


def remote_verdicts(home: ClientHome) -> dict[str, str]:
    return verdicts(remote(home, version=VERSION))


def one(findings: Iterator[Finding], check: str) -> Finding:
    return next(finding for finding in findings if finding.check == check)


def test_a_client_that_joined_passes_its_preflight_and_nothing_is_charged(run: Running, home: ClientHome) -> None:
    join(new_invitation(run), home, CHOICES, version=VERSION)
    before = (home.folder / "ledger" / "ledger.jsonl").read_bytes()
    assert set(verdicts(local(home, choices_of(home.settings))).values()) == {"ok"}
    found = remote_verdicts(home)
    # Nobody serves the gateway yet, which is no fault of the client's.
    assert found.pop("gateway") == "warning"
    assert found == dict.fromkeys(("ledger", "certificate", "server", "clock", "server version"), "ok")
    assert (home.folder / "ledger" / "ledger.jsonl").read_bytes() == before


def table(folder: Path, rows: str) -> Path:
    folder.mkdir()
    (folder / "schema.toml").write_text(
        'target = "y"\nclasses = ["a", "b"]\n\n[columns.x]\nkind = "number"\nmin = 0\nmax = 9\n'
    )
    (folder / "train.csv").write_text(f"x,y\n{rows}")
    return folder


def on(data: Path | str, bound: int = 10) -> Choices:
    return Choices(task="table", data=str(data), policy=dataclasses.replace(POLICY, records_bound=bound))


def test_data_faults_are_found_here_with_what_to_do(home: ClientHome, tmp_path: Path) -> None:
    good = table(tmp_path / "good", "1,a\n2,b\n")
    assert one(local(home, on(good)), "data").verdict is Verdict.OK
    cases = {
        "vanished": (on(tmp_path / "gone"), "found nothing", "mount it"),
        "empty": (on(table(tmp_path / "empty", "")), "no record", "put training records there"),
        "more than declared": (on(good, bound=1), "more than the declared bound of 1", "larger --records-bound"),
        "another schema": (on(_renamed(tmp_path)), "expected a column", ""),
        "an unknown task": (dataclasses.replace(on(good), task="nothing"), "nothing", ""),
    }
    for case, (choices, words, fix) in cases.items():
        finding = one(local(home, choices), "data")
        assert finding.verdict is Verdict.FAILED, case
        assert words in finding.words + finding.fix, case
        assert fix in finding.fix, case
        assert finding.exit_code in (DataError.exit_code, PlanError.exit_code), case
    faulty = one(local(home, on(table(tmp_path / "faulty", "1,a\nx,b\n"))), "data")
    assert faulty.verdict is Verdict.WARNING
    assert "faulty records take part as nothing" in faulty.fix


def test_data_is_found_where_data_sets_lie_and_its_bound_where_it_is_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = table(tmp_path / "sets", "1,a\n")
    monkeypatch.setenv("TACIT_DATA", str(tmp_path))
    assert preflight.located("sets") == str(folder)
    assert preflight.located("") == ""
    assert preflight.located(str(tmp_path / "gone")) == str(tmp_path / "gone")
    assert preflight.declared_bound(ClientHome(tmp_path / "none"), "table", str(folder)) is None
    schema = folder / "schema.toml"
    schema.write_text("records = 800\n" + schema.read_text())
    assert preflight.declared_bound(ClientHome(tmp_path / "none"), "table", str(folder)) == 800
    assert preflight.declared_bound(ClientHome(tmp_path / "none"), "digits", "") == 1437
    assert preflight.declared_bound(ClientHome(tmp_path / "none"), "nothing", "") is None


def _renamed(tmp_path: Path) -> Path:
    folder = table(tmp_path / "renamed", "1,a\n")
    (folder / "train.csv").write_text("z,y\n1,a\n")
    return folder


def test_a_full_disk_and_files_that_others_can_read_are_found(
    home: ClientHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.make()
    home.make_keys()
    assert one(local(home, CHOICES), "permissions").verdict is Verdict.OK
    (home.folder / "keys" / "supernode.key").chmod(0o644)
    finding = one(local(home, CHOICES), "permissions")
    assert finding.verdict is Verdict.FAILED
    assert re.search(r"chmod go-rwx \S+supernode\.key", finding.fix)
    usage = type("Usage", (), {"free": 0})
    for free, verdict in ((10 * 2**20, "failed"), (2**30, "warning"), (10 * 2**30, "ok")):
        usage.free = free  # type: ignore[attr-defined]
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
        assert one(local(home, CHOICES), "disk").verdict.value == verdict


def test_versions_are_those_that_the_package_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    asked = {}
    for line in project["dependencies"]:
        name, least, end = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+)(?:,<([0-9.]+))?", line).groups()  # type: ignore[union-attr]
        asked[name] = (least, end or "")
    assert {name: asked[name] for name in preflight.NEEDS} == preflight.NEEDS
    assert preflight._versions().verdict is Verdict.OK
    for version in ("1.40.9", "1.42.0", "0.9"):
        monkeypatch.setattr(
            preflight.importlib.metadata, "version", lambda name, v=version: v if name == "flwr" else "9"
        )
        monkeypatch.setattr(preflight, "NEEDS", {"flwr": ("1.41", "1.42")})
        finding = preflight._versions()
        assert finding.verdict is Verdict.FAILED
        assert f"flwr is {version}" in finding.words


def test_an_expired_or_foreign_certificate_and_a_lost_ledger_are_found(run: Running, home: ClientHome) -> None:
    join(new_invitation(run), home, CHOICES, version=VERSION)
    settings = home.settings
    late = type("Clock", (), {"time": staticmethod(lambda: time.time() + 25 * 86400)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "time", late)
        assert preflight._certificate(home, settings).fix == "tacit client renew"
        late.time = staticmethod(lambda: time.time() + 31 * 86400)  # type: ignore[attr-defined]
        assert preflight._certificate(home, settings).verdict is Verdict.FAILED
    (home.folder / "ledger" / "ledger.jsonl").rename(home.folder / "ledger" / "away")
    assert one(remote(home, version=VERSION), "ledger").exit_code == LedgerError.exit_code
    assert one(remote(home, version="0.0.1"), "server version").verdict is Verdict.FAILED
    home.authority_file.write_bytes(b"garbage")
    assert one(remote(home, version=VERSION), "certificate").verdict is Verdict.FAILED


def test_the_gateway_is_believed_with_its_certificate_only_and_told_nothing(
    run: Running, home: ClientHome, tmp_path: Path
) -> None:
    join(new_invitation(run), home, CHOICES, version=VERSION)
    with Rogue(private.read(run.home.relay_tls), tmp_path, lambda: b"") as gateway:
        assert preflight._gateway(home, (gateway.address,)).verdict is Verdict.OK
    assert gateway.told == b""
    refusing = Rogue(private.read(run.home.relay_tls), tmp_path, lambda: b"")
    (tmp_path / "ca.pem").write_bytes(certificates.pem_of(Authority.create("demo", [HOST], now=1.7e9).certificate))
    refusing.context.load_verify_locations(tmp_path / "ca.pem")
    refusing.context.verify_mode = ssl.CERT_REQUIRED
    with refusing:
        refused = preflight._gateway(home, (refusing.address,))
    assert refused.verdict is Verdict.FAILED
    with Rogue(private.read(run.home.relay_tls), tmp_path, lambda: b"HTTP/1.1 403 Forbidden\r\n\r\n") as gateway:
        shut_out = preflight._gateway(home, (gateway.address,))
    assert shut_out.verdict is Verdict.FAILED
    assert "revoked" in shut_out.fix
    # As a gateway asks for certificates, in OpenSSL's strict mode: ours passes, its name constraints with it.
    asking = Rogue(private.read(run.home.relay_tls), tmp_path, lambda: b"")
    asking.context.load_verify_locations(run.home.folder / "relay" / "ca.pem")
    asking.context.verify_mode = ssl.CERT_REQUIRED
    asking.context.verify_flags |= ssl.VERIFY_X509_STRICT
    with asking:
        assert preflight._gateway(home, (asking.address,)).verdict is Verdict.OK
    stranger = Authority.create("demo", [HOST], now=time.time()).server_leaf("demo", [HOST], now=time.time())
    with Rogue(stranger, tmp_path, lambda: b"") as gateway:
        finding = preflight._gateway(home, (gateway.address,))
    assert finding.verdict is Verdict.FAILED
    assert "another server" in finding.fix


def test_a_home_that_has_not_joined_is_told_how_to(home: ClientHome) -> None:
    (finding,) = remote(home, version=VERSION)
    assert finding.fix == "tacit client join TOKEN"


# -- renewal while a client runs --------------------------------------------------------------------------------------


def test_a_certificate_is_renewed_after_two_thirds_of_its_life_and_a_failure_leaves_the_old_one(
    run: Running, home: ClientHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    join(new_invitation(run), home, CHOICES, version=VERSION)
    first = home.tls.read_bytes()
    began = time.time()
    day = 86400.0
    assert renew_when_due(home, version=VERSION, clock=lambda: began + 19 * day) is None
    assert home.tls.read_bytes() == first
    with monkeypatch.context() as patch:
        patch.setattr("clients.join.call", _away)
        with pytest.raises(IdentityError, match="nobody"):
            renew_when_due(home, version=VERSION, clock=lambda: began + 21 * day)
    assert home.tls.read_bytes() == first
    until = renew_when_due(home, version=VERSION, clock=lambda: began + 21 * day)
    assert until is not None
    assert home.tls.read_bytes() != first
    assert renew_when_due(home, version=VERSION, clock=lambda: began + 19 * day) is None


def _away(*_: object, **__: object) -> NoReturn:
    raise IdentityError("expected an answer, got nobody; wait")

"""The list of members, the desk that redeems invitations, and the endpoint that strangers can reach."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import socket
import ssl
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from privacy.enrolment import (
    LENGTH,
    MOST_MESSAGE,
    Invitation,
    Word,
    answer_mac,
    from_base64,
    new_secret,
    read_message,
    server_key_of,
    transcript,
)
from privacy.errors import IdentityError, RunError
from privacy.identity import Secret
from privacy.identity.authority import facts_of, key_of_private, new_key, read_certificate, require_client
from privacy.identity.supernode import flower_field, supernode_public
from privacy.vault import private
from server import enrol as module
from server.enrol import GRACE_S, Desk, Gauge, Limits, Registry, State, invite, revoke
from server.home import ServerHome
from tests.enrolling import HOST, Counter, Keys, authority_of, make_home, receive, running, tls


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    return make_home(tmp_path / "server")


def word(answer: bytes) -> str:
    """Returns the word of a refusal, or "enrolled"."""
    read = read_message(answer, "enrolled", "refused")
    return str(read.fields["word"]) if read.kind == "refused" else "enrolled"


# -- the home ---------------------------------------------------------------------------------------------------------


def test_a_home_is_private_and_keeps_each_key_in_the_room_of_who_needs_it(home: ServerHome) -> None:
    files = {path.relative_to(home.folder).as_posix() for path in home.folder.rglob("*") if path.is_file()}
    assert files == {
        "server.json",
        "authority/ca.pem",
        "authority/ca.key",
        "authority/registry.key",
        "enrol/tls.pem",
        "relay/tls.pem",
        "relay/ca.pem",
        "application/server.key",
        # Of each room: what opens its keys, and no other's (guarantee G21).
        *(f"{room}/vault.keys" for room in ("authority", "enrol", "relay", "application")),
    }
    for path in (home.folder, *home.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    # No private key stands in two rooms (guarantee G21).
    keys = [key_of_private(private.read(path)) for path in (home.endpoint_tls, home.relay_tls)]
    assert keys[0] != keys[1]
    assert home.application_identity().public_key != home.registry_identity().public_key
    # Under one user, the relay could read the application's key, and says so.
    assert home.relay_is_server()


def test_a_second_init_changes_nothing(home: ServerHome) -> None:
    before = {path: path.read_bytes() for path in home.folder.rglob("*") if path.is_file()}
    with pytest.raises(IdentityError, match="expected no home"):
        make_home(home.folder)
    assert {path: path.read_bytes() for path in home.folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in home.folder.parent.iterdir()] == [home.folder.name]


def test_an_init_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> bool:
        raise RunError("the disk is full")

    monkeypatch.setattr(ServerHome, "renew", full)
    with pytest.raises(RunError):
        make_home(tmp_path / "server")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["authority/registry.key", "application/server.key"])
def test_a_lost_or_foreign_key_is_not_replaced_by_a_new_one(home: ServerHome, file: str) -> None:
    path = home.folder / file
    take = home.registry_identity if "registry" in file else home.application_identity
    path.write_bytes(os.urandom(32))
    with pytest.raises(IdentityError, match="got another"):
        take()
    path.unlink()
    with pytest.raises(IdentityError, match="got none"):
        take()
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"v":9}', b"\xff"])
def test_damaged_settings_are_named(home: ServerHome, content: bytes) -> None:
    (home.folder / "server.json").write_bytes(content)
    with pytest.raises(IdentityError, match=r"server\.json"):
        ServerHome.open(home.folder)


def test_server_certificates_are_renewed_when_two_thirds_of_their_life_are_over(home: ServerHome) -> None:
    authority, before = authority_of(home), read_certificate(home.relay_tls)
    now = time.time()
    assert not home.renew(authority, now=now + 19 * 86400)
    assert read_certificate(home.relay_tls) == before
    assert home.renew(authority, now=now + 21 * 86400)
    assert read_certificate(home.relay_tls) != before
    assert facts_of(read_certificate(home.endpoint_tls)).until > now + 50 * 86400


# -- the list ---------------------------------------------------------------------------------------------------------


def test_names_are_given_once(home: ServerHome) -> None:
    first = invite(home, "a")
    with pytest.raises(IdentityError, match="still good"):
        invite(home, "a")
    second = invite(home, "a", replace=True)
    counter = Counter(home)
    assert word(counter.join(Keys(), first)) == "unknown"
    assert word(counter.join(Keys(), second)) == "enrolled"
    with pytest.raises(IdentityError, match="is enrolled"):
        invite(home, "a", replace=True)
    revoke(home, "a")
    with pytest.raises(IdentityError, match="never used again"):
        invite(home, "a", replace=True)
    # An invitation that lapsed makes room for another.
    invite(home, "b", lifetime_s=60, now=time.time() - 100)
    invite(home, "b")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "A"},
        {"name": "a", "lifetime_s": 1.0},
        {"name": "a", "lifetime_s": 1e9},
        {"name": "a", "epsilon": -1.0, "delta": 1e-5},
        {"name": "a", "epsilon": 1.0},
        {"name": "a", "epsilon": float("nan"), "delta": 1e-5},
    ],
)
def test_an_invitation_out_of_range_is_refused_and_written_nowhere(home: ServerHome, wrong: dict[str, object]) -> None:
    with pytest.raises(IdentityError):
        invite(home, **wrong)  # type: ignore[arg-type]
    assert not home.members.exists()


def test_g21_every_changed_byte_of_the_list_is_found_and_the_list_is_never_reset(home: ServerHome) -> None:
    invite(home, "a")
    whole = home.members.read_bytes()
    for at in range(0, len(whole) - 1, 7):
        changed = bytearray(whole)
        changed[at] ^= 1
        home.members.write_bytes(changed)
        with pytest.raises(IdentityError, match="signed list of members"):
            Registry.of(home).members()
        with pytest.raises(IdentityError):
            invite(home, "b")
        assert home.members.read_bytes() == changed
    for cut in (0, 1, len(whole) // 2, len(whole) - 2):
        home.members.write_bytes(whole[:cut])
        with pytest.raises(IdentityError):
            Registry.of(home).members()


def enrolled_by_hand(home: ServerHome) -> bool:
    """Whether somebody without the registry's key can write itself into the list."""
    body, _, _ = home.members.read_bytes().partition(b"\n")
    fields = json.loads(body)
    fields["members"][0] |= {"state": "enrolled", "application": "ab" * 32}
    body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    stranger = Secret(os.urandom(32)).identity("members")
    home.members.write_bytes(body + b"\n" + stranger.sign(b"tacit/members/1\n" + body).encode() + b"\n")
    try:
        return Registry.of(home).members()["a"].state is State.ENROLLED
    except IdentityError:
        return False


def test_g21_nobody_writes_itself_into_the_list(home: ServerHome) -> None:
    invite(home, "a")
    assert not enrolled_by_hand(home)


def test_planted_bug_an_unchecked_list_takes_anybody(home: ServerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    invite(home, "a")
    monkeypatch.setattr(module, "verify", lambda *_: None)
    assert enrolled_by_hand(home)


def test_who_only_reads_needs_no_key_and_cannot_change(home: ServerHome) -> None:
    invite(home, "a")
    shutil.rmtree(home.folder / "authority")
    reader = Registry.of(home)
    assert list(reader.members()) == ["a"]
    with pytest.raises(IdentityError, match="opened to be changed"), reader.change():
        pass


def test_a_full_disk_leaves_the_list_as_it_was(home: ServerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    invite(home, "a")
    before = home.members.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise RunError("no space")

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(RunError):
        revoke(home, "a")
    assert home.members.read_bytes() == before


def test_g21_a_process_that_knows_a_newer_list_refuses_an_older_one(home: ServerHome) -> None:
    invite(home, "a")
    old, reader = home.members.read_bytes(), Registry.of(home)
    revoke(home, "a")
    assert reader.members()["a"].state is State.REVOKED
    home.members.write_bytes(old)
    with pytest.raises(IdentityError, match="an older list was put back"):
        reader.members()
    home.members.unlink()
    with pytest.raises(IdentityError):
        reader.members()
    # Who never saw the newer one cannot know.
    home.members.write_bytes(old)
    assert Registry.of(home).members()["a"].state is State.INVITED


def test_threads_that_read_while_the_list_changes_raise_no_false_alarm(home: ServerHome) -> None:
    invite(home, "m")
    reader, faults, stop = Registry.of(home), [], threading.Event()

    def reading() -> None:
        while not stop.is_set():
            try:
                reader._read()
            except IdentityError as error:
                faults.append(error)

    threads = [threading.Thread(target=reading) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(30):
        invite(home, f"m{number}")
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []


def _invite_some(folder: str, first: int) -> None:
    home = ServerHome.open(Path(folder))
    for number in range(first, first + 8):
        invite(home, f"m{number}")


def test_two_processes_that_change_the_list_lose_nothing(home: ServerHome) -> None:
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_invite_some, args=(str(home.folder), 8 * index)) for index in range(2)]
    for worker in workers:
        worker.start()
    reader = Registry.of(home)
    while any(worker.is_alive() for worker in workers):
        reader.members()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert set(reader.members()) == {f"m{number}" for number in range(16)}


def test_a_revoked_certificate_is_admitted_no_more_by_a_reader_that_is_running(home: ServerHome) -> None:
    keys, now = Keys(), time.time()
    answer = read_message(Counter(home).join(keys, invite(home, "a")), "enrolled")
    certificate, reader = from_base64(answer.fields["certificate"]), Registry.of(home)
    member = reader.admits(certificate, home.authority, now=now)
    assert member is not None
    assert (member.name, member.application) == ("a", keys.application.public_key)
    # Sound, but not one that the list knows.
    unlisted = authority_of(home).client_leaf("a", from_base64_request(keys, "a"), now=now)
    assert require_client(unlisted, home.authority, now=now) == "a"
    assert reader.admits(unlisted, home.authority, now=now) is None
    assert reader.admits(b"garbage", home.authority, now=now) is None
    assert reader.admits(certificate, home.authority, now=now + 31 * 86400) is None
    # What a gateway asks at every request, after TLS has checked chain and time.
    assert reader.name_of(certificate) == "a"
    assert reader.name_of(unlisted) is None
    assert reader.node_key("a") == flower_field(supernode_public(keys.supernode))
    assert reader.node_key("nobody") is None
    revoke(home, "a")
    assert reader.admits(certificate, home.authority, now=now) is None
    assert reader.name_of(certificate) is None


def from_base64_request(keys: Keys, name: str) -> bytes:
    from privacy.identity.authority import certificate_request

    return certificate_request(keys.tls, name)


# -- joining ----------------------------------------------------------------------------------------------------------


def test_g21_whoever_knows_the_secret_is_enrolled_with_its_own_keys(home: ServerHome) -> None:
    invitation, keys, counter = invite(home, "a", epsilon=3.0, delta=1e-5), Keys(), Counter(home)
    hello = counter.desk.hello()
    body = keys.join_body(invitation)
    answer = counter.desk.answer(hello, counter.leaf, keys.join(invitation.secret, body, hello, counter.leaf))
    read = read_message(answer, "enrolled")
    certificate = from_base64(read.fields["certificate"])
    assert require_client(certificate, home.authority, now=time.time()) == "a"
    assert facts_of(certificate).key == key_of_private(keys.tls)
    # The answer shows that the server knows the secret's other half, for this exchange.
    over = transcript("join", hello, counter.leaf, body)
    assert read.proofs["mac"] == answer_mac(server_key_of(invitation.secret), over, read.body)
    member = Registry.of(home).members()["a"]
    assert (member.state, member.application) == (State.ENROLLED, keys.application.public_key)
    assert member.serials == [facts_of(certificate).serial]
    assert (member.epsilon, member.delta) == (3.0, 1e-5)


def test_g21_a_forged_proof_a_strangers_keys_or_another_channel_enrol_nobody(home: ServerHome) -> None:
    invitation, keys, other, counter = invite(home, "a"), Keys(), Keys(), Counter(home)
    hello, body = counter.desk.hello(), Keys.join_body(keys, invitation)
    good = keys.join(invitation.secret, body, hello, counter.leaf)
    relay = read_certificate(home.relay_tls)
    swapped = other.join_body(invitation)
    cases = {
        # Without the secret, or with another's.
        "unknown": [
            keys.join(new_secret(), body, hello, counter.leaf),
            keys.join(invitation.secret, body, hello, counter.leaf, proof="00" * 32),
            # Somebody in between shows the client a certificate of its own and passes everything on.
            keys.join(invitation.secret, body, hello, relay),
            # An exchange of before, and one whose keys were exchanged on the way.
            keys.join(invitation.secret, body, counter.desk.hello(), counter.leaf),
            good.replace(body, swapped),
            keys.join(invitation.secret, keys.join_body(invitation, name="b"), hello, counter.leaf),
            keys.join(invitation.secret, keys.join_body(invitation, invitation="0" * 32), hello, counter.leaf),
        ],
        # With the secret, but without the private halves of the keys that it names.
        "malformed": [
            other.join(invitation.secret, body, hello, counter.leaf),
            keys.join(
                invitation.secret,
                keys.join_body(invitation, application=other.application.public_key),
                hello,
                counter.leaf,
            ),
            keys.join(invitation.secret, keys.join_body(invitation, request="AAAA"), hello, counter.leaf),
        ],
    }
    for expected, requests in cases.items():
        for request in requests:
            assert word(counter.desk.answer(hello, counter.leaf, request)) == expected
    assert Registry.of(home).members()["a"].state is State.INVITED
    assert word(counter.desk.answer(hello, counter.leaf, good)) == "enrolled"


def test_planted_bug_a_desk_that_checks_no_proof_enrols_a_forger(
    home: ServerHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, keys, counter = invite(home, "a"), Keys(), Counter(home)
    hello, body = counter.desk.hello(), Keys.join_body(keys, invitation)
    forged = keys.join(new_secret(), body, hello, counter.leaf)
    assert word(counter.desk.answer(hello, counter.leaf, forged)) == "unknown"
    monkeypatch.setattr(module, "proves", lambda *_: True)
    assert word(counter.desk.answer(hello, counter.leaf, forged)) == "enrolled"


def test_an_expired_invitation_enrols_nobody_and_the_clock_is_the_servers(home: ServerHome) -> None:
    now = time.time()
    invitation = invite(home, "a", lifetime_s=60, now=now - 61)
    assert word(Counter(home).join(Keys(), invitation)) == "expired"
    early = Desk(home, authority_of(home), clock=lambda: now - 2)
    assert word(Counter(home, early).join(Keys(), invitation)) == "enrolled"


def test_g21_an_invitation_is_redeemed_once_and_the_same_keys_may_ask_again(home: ServerHome) -> None:
    invitation, keys = invite(home, "a"), Keys()
    first = read_message(Counter(home).join(keys, invitation), "enrolled")
    # As after a crash: another process, another greeting; the same keys, whose request is signed anew.
    later = Desk(home, authority_of(home), clock=lambda: time.time() + 3 * 86400)
    again = read_message(Counter(home, later).join(keys, invitation, tacit="0.2.0"), "enrolled")
    assert again.body == first.body
    assert again.proofs != first.proofs
    assert word(Counter(home).join(Keys(), invitation)) == "used"
    assert len(Registry.of(home).members()["a"].certificates) == 1
    revoke(home, "a")
    assert word(Counter(home).join(keys, invitation)) == "revoked"


def test_g21_killed_after_redemption_the_same_keys_get_their_answer(
    home: ServerHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, keys = invite(home, "a"), Keys()

    def killed(*_: object) -> bytes:
        raise MemoryError("as if killed between the write and the answer")

    with monkeypatch.context() as patch:
        patch.setattr(module, "answer_mac", killed)
        assert word(Counter(home).join(keys, invitation)) == "failed"
    assert Registry.of(home).members()["a"].state is State.ENROLLED
    assert word(Counter(home).join(Keys(), invitation)) == "used"
    assert word(Counter(home).join(keys, invitation)) == "enrolled"


def test_g21_killed_before_redemption_nothing_happened(home: ServerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    invitation, keys = invite(home, "a"), Keys()

    def killed(*_: object, **__: object) -> None:
        raise RunError("as if the disk were full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", killed)
        assert word(Counter(home).join(keys, invitation)) == "failed"
    assert Registry.of(home).members()["a"].state is State.INVITED
    assert word(Counter(home).join(Keys(), invitation)) == "enrolled"


def winners(home: ServerHome, invitation: Invitation, count: int = 4) -> int:
    """Lets several clients redeem one invitation at the same time; returns how many were enrolled."""
    start, words = threading.Barrier(count), []

    def race() -> None:
        counter, keys = Counter(home), Keys()
        start.wait()
        words.append(word(counter.join(keys, invitation)))

    threads = [threading.Thread(target=race) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(words) <= {"enrolled", "used"}
    return words.count("enrolled")


def test_g21_of_several_at_once_exactly_one_wins(home: ServerHome) -> None:
    assert winners(home, invite(home, "a")) == 1


def test_planted_bug_without_the_lock_several_win(home: ServerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    invitation, together, read = invite(home, "a"), threading.Barrier(4), Registry._read

    def slow(self: Registry) -> tuple[int, dict[str, module.Member]]:
        found = read(self)
        # Every thread has read the list before the first one writes it.
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(2)
        return found

    one, write = threading.Lock(), module.write_whole

    def in_turn(*arguments: object) -> None:
        # Threads of one process would share the draft's name, which processes do not.
        with one:
            write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Registry, "_read", slow)
    monkeypatch.setattr(module, "write_whole", in_turn)
    monkeypatch.setattr(Registry, "_take", lambda *_: None)
    assert winners(home, invitation) > 1


def test_a_list_that_another_process_holds_costs_an_answer_and_no_more(
    home: ServerHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, keys = invite(home, "a"), Keys()
    monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
    with open(home.folder / "members.lock") as file:
        module.fcntl.flock(file, module.fcntl.LOCK_EX)
        started = time.monotonic()
        assert word(Counter(home).join(keys, invitation)) == "failed"
        assert time.monotonic() - started < 5
    assert word(Counter(home).join(keys, invitation)) == "enrolled"


def _redeem(folder: str, token: str, results: multiprocessing.Queue[str], start: object) -> None:
    counter = Counter(ServerHome.open(Path(folder)))
    start.wait()  # type: ignore[attr-defined]
    results.put(word(counter.join(Keys(), Invitation.parse(token))))


def test_g21_of_several_processes_at_once_exactly_one_wins(home: ServerHome) -> None:
    fork = multiprocessing.get_context("fork")
    token, results, start = invite(home, "a").token(), fork.Queue(), fork.Barrier(3)
    workers = [fork.Process(target=_redeem, args=(str(home.folder), token, results, start)) for _ in range(3)]
    for worker in workers:
        worker.start()
    words = sorted(results.get(timeout=20) for _ in workers)
    for worker in workers:
        worker.join()
    assert words == ["enrolled", "used", "used"]


def test_a_key_of_another_member_is_refused(home: ServerHome) -> None:
    counter, keys = Counter(home), Keys()
    assert word(counter.join(keys, invite(home, "a"))) == "enrolled"
    second = invite(home, "b")
    assert word(counter.join(keys, second)) == "conflict"
    mixed = Keys()
    mixed.supernode = keys.supernode
    assert word(counter.join(mixed, second)) == "conflict"
    assert word(counter.join(Keys(), second)) == "enrolled"


def test_a_client_that_is_too_old_is_told_so_and_keeps_its_invitation(home: ServerHome) -> None:
    counter, invitation, keys = Counter(home), invite(home, "a"), Keys()
    assert word(counter.join(keys, invitation, tacit="0.0.9")) == "old"
    assert word(counter.join(keys, invitation)) == "enrolled"


# -- renewing ---------------------------------------------------------------------------------------------------------


def renewed(home: ServerHome, keys: Keys, serial: str, key: bytes, at: float = 0, name: str = "a") -> bytes:
    counter = Counter(home, Desk(home, authority_of(home), clock=lambda: time.time() + at))
    hello = counter.desk.hello()
    return counter.desk.answer(hello, counter.leaf, keys.renewal(name, serial, hello, counter.leaf, key))


def enrolled(home: ServerHome, name: str = "a") -> tuple[Keys, str]:
    keys = Keys()
    answer = read_message(Counter(home).join(keys, invite(home, name)), "enrolled")
    return keys, facts_of(from_base64(answer.fields["certificate"])).serial


def test_a_renewal_needs_both_current_keys_and_gives_a_new_certificate(home: ServerHome) -> None:
    keys, serial = enrolled(home)
    stranger, fresh = Keys(), new_key()
    half = Keys()
    half.application, half.tls = keys.application, stranger.tls
    other = Keys()
    other.application, other.tls = stranger.application, keys.tls
    for thief in (stranger, half, other):
        assert word(renewed(home, thief, serial, fresh)) == "unknown"
    assert word(renewed(home, keys, "1234", fresh)) == "unknown"
    assert word(renewed(home, keys, serial, fresh, name="b")) == "unknown"
    answer = read_message(renewed(home, keys, serial, fresh), "enrolled")
    certificate = from_base64(answer.fields["certificate"])
    assert require_client(certificate, home.authority, now=time.time()) == "a"
    assert facts_of(certificate).key == key_of_private(fresh)
    # Repeated after a crash: the same certificate, and not a longer list.
    assert read_message(renewed(home, keys, serial, fresh), "enrolled").body == answer.body
    assert len(Registry.of(home).members()["a"].certificates) == 2


def test_g21_a_revoked_member_renews_nothing(home: ServerHome) -> None:
    keys, serial = enrolled(home)
    revoke(home, "a")
    assert word(renewed(home, keys, serial, new_key())) == "revoked"


def test_planted_bug_a_desk_that_asks_no_state_renews_a_revoked_member(
    home: ServerHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, serial = enrolled(home)
    revoke(home, "a")
    monkeypatch.setattr(module, "_require_enrolled", lambda member: None)
    assert word(renewed(home, keys, serial, new_key())) == "enrolled"


def test_a_certificate_that_expired_long_ago_is_not_renewed_and_a_loop_fills_no_list(home: ServerHome) -> None:
    keys, serial = enrolled(home)
    assert word(renewed(home, keys, serial, new_key(), at=GRACE_S + 29 * 86400)) == "enrolled"
    assert word(renewed(home, keys, serial, new_key(), at=GRACE_S + 31 * 86400)) == "expired"
    other, serial = enrolled(home, "b")
    words = [word(renewed(home, other, serial, new_key(), name="b")) for _ in range(9)]
    assert words == ["enrolled"] * 7 + ["busy"] * 2


# -- nothing secret stays at the server -------------------------------------------------------------------------------


def secrets_on_disk(home: ServerHome, secrets: dict[str, bytes]) -> set[str]:
    """Names the secrets that stand in any file of a home: as bytes, hex, base64 or base32."""
    import base64

    found = set()
    for path in home.folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for name, secret in secrets.items():
            forms = (
                secret,
                secret.hex().encode(),
                base64.b64encode(secret).rstrip(b"="),
                base64.b32encode(secret)[:-6],
            )
            if any(form in content or form.lower() in content.lower() for form in forms):
                found.add(name)
    return found


def test_g21_the_secret_of_an_invitation_is_nowhere_at_the_server(home: ServerHome) -> None:
    invitation, keys = invite(home, "a"), Keys()
    secrets = {"secret": invitation.secret, "token": invitation.token().removeprefix("tacit1-").encode()}
    assert secrets_on_disk(home, secrets) == set()
    counter, seen = Counter(home), []
    answer = counter.desk.answer

    def watched(hello: bytes, leaf: bytes, data: bytes) -> bytes:
        seen.append(data)
        return answer(hello, leaf, data)

    counter.desk.answer = watched  # type: ignore[method-assign]
    assert word(counter.join(keys, invitation)) == "enrolled"
    assert secrets_on_disk(home, secrets) == set()
    assert invitation.secret.hex().encode() not in seen[0]
    assert invitation.secret not in seen[0]


def test_planted_bug_a_server_that_stores_the_secret_is_found(home: ServerHome) -> None:
    invitation = invite(home, "a")
    with Registry.of(home, change=True).change() as members:
        members["a"].redeemed = invitation.secret.hex()
    assert secrets_on_disk(home, {"secret": invitation.secret}) == {"secret"}


# -- the endpoint -----------------------------------------------------------------------------------------------------


def test_the_endpoint_speaks_tls_1_3_only_and_greets_first(tmp_path: Path) -> None:
    with running(tmp_path / "server") as run:
        port = run.listener.getsockname()[1]
        with tls(port) as connection:
            assert connection.version() == "TLSv1.3"
            fields = read_message(receive(connection), "hello").fields
            assert fields["application"] == run.home.settings.application
            assert abs(fields["time"] - time.time()) < 5
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection((HOST, port), timeout=5) as raw, pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(raw)
        if shutil.which("openssl"):
            for flag, sound in (("-tls1_3", True), ("-tls1_2", False)):
                command = ["openssl", "s_client", flag, "-connect", f"{HOST}:{port}", "-verify_return_error", "-CAfile"]
                ca = str(run.home.folder / "relay" / "ca.pem")
                done = subprocess.run([*command, ca], input=b"", capture_output=True, timeout=20)
                assert (done.returncode == 0 and b"Verify return code: 0" in done.stdout) is sound


def exchange(port: int, data: bytes, *, half: bool = False) -> bytes:
    """Sends bytes after the greeting and returns what comes back; half of them where ``half``, then hangs up."""
    with tls(port) as connection:
        receive(connection)
        with contextlib.suppress(OSError):
            connection.sendall(data)
        if half:
            return b""
        with contextlib.suppress(OSError):
            return receive(connection)
    return b""


def mutated(good: bytes, draw: random.Random) -> bytes:
    """A message with a few faults in it."""
    data = bytearray(good)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + draw.randint(1, 40)]
            case 2:
                data[at:at] = draw.randbytes(draw.randint(1, 40))
            case 3:
                data[at:at] = data[: draw.randint(1, 200)]
            case 4:
                data = data[:at]
            case _:
                data[at:at] = draw.choice([b"{", b"[[[[", b'"', b"\n", b"\\u0000", b"1e999", b"-1", b"null", b"true"])
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_desk_answers_garbage_with_a_word_and_enrols_nobody(home: ServerHome, count: int) -> None:
    invitation, keys, counter, draw = invite(home, "a"), Keys(), Counter(home), random.Random(3)
    member, serial = enrolled(home, "b")
    hello = counter.desk.hello()
    good = (
        keys.join(invitation.secret, keys.join_body(invitation), hello, counter.leaf),
        member.renewal("b", serial, hello, counter.leaf, new_key()),
    )
    before = home.members.read_bytes()
    for index in range(count):
        data = mutated(good[index % 2], draw)
        if data not in good:
            assert word(counter.desk.answer(hello, counter.leaf, data)) in {"malformed", "unknown"}
    # A field that is right in form and wrong in content.
    for index in range(count // 3):
        fields = json.loads(good[0].partition(b"\n")[0])
        name = draw.choice(sorted(set(fields) - {"kind", "v"}))
        fields[name] = draw.choice(["", "c", "0" * 32, "ab" * 32, 7, None, [], {}, 1e300, "A" * 4096, "é", True])
        body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        answer = counter.desk.answer(hello, counter.leaf, keys.join(invitation.secret, body, hello, counter.leaf))
        assert word(answer) in {"malformed", "unknown", "old"}, (index, name, fields[name])
    assert home.members.read_bytes() == before
    assert word(counter.desk.answer(hello, counter.leaf, good[0])) == "enrolled"


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_endpoint_survives_garbage_oversized_and_half_written_messages(tmp_path: Path, count: int) -> None:
    draw = random.Random(4)
    with running(tmp_path / "server") as run:
        port, invitation, keys = run.listener.getsockname()[1], invite(run.home, "a"), Keys()
        leaf = read_certificate(run.home.endpoint_tls)
        good = keys.join(invitation.secret, keys.join_body(invitation), b"hello", leaf)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        threads = threading.active_count()
        for index in range(count):
            data = mutated(good, draw)
            match index % 5:
                case 0:
                    assert exchange(port, LENGTH.pack(len(data)) + data) != b""
                case 1:
                    # A length alone must not make the server reserve that much.
                    size = draw.choice([MOST_MESSAGE + 1, 2**31, 2**32 - 1])
                    assert word(exchange(port, struct.pack(">I", size) + draw.randbytes(64))) == "malformed"
                case 2:
                    exchange(port, (LENGTH.pack(len(data) + 1) + data)[: draw.randint(0, 200)], half=True)
                case 3:
                    # Not even TLS.
                    with socket.create_connection((HOST, port), timeout=5) as raw:
                        raw.sendall(
                            draw.choice([b"GET / HTTP/1.1\r\n\r\n", draw.randbytes(200), b"\x16\x03\x01\xff\xff"])
                        )
                case _:
                    socket.create_connection((HOST, port), timeout=5).close()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert after - before < 64 * 1024  # KiB, whatever was announced
        assert threading.active_count() <= threads + 32
        with tls(port) as connection:
            hello = receive(connection)
            body = keys.join_body(invitation)
            data = keys.join(invitation.secret, body, hello, connection.getpeercert(binary_form=True) or b"")
            connection.sendall(LENGTH.pack(len(data)) + data)
            assert word(receive(connection)) == "enrolled"


def held_for(port: int, send: Callable[[socket.socket], object]) -> float:
    """How long an endpoint keeps a connection that goes nowhere, in seconds."""
    started = time.monotonic()
    with socket.create_connection((HOST, port), timeout=20) as raw:
        send(raw)
        with contextlib.suppress(OSError):
            while raw.recv(4096):
                pass
    return time.monotonic() - started


def test_silent_and_dripping_clients_are_hung_up_on_and_others_are_served_meanwhile(tmp_path: Path) -> None:
    limits = Limits(exchange_s=1.5, burst=1000)
    with running(tmp_path / "server", limits) as run:
        port = run.listener.getsockname()[1]

        def drip(raw: socket.socket) -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with contextlib.suppress(OSError), context.wrap_socket(raw) as connection:
                connection.sendall(LENGTH.pack(1000))
                for _ in range(100):
                    connection.sendall(b"x")
                    time.sleep(0.1)

        waits: list[float] = []
        slow = [
            threading.Thread(target=lambda send=send: waits.append(held_for(port, send)))  # type: ignore[misc]
            for send in (lambda raw: None, lambda raw: raw.sendall(b"\x16\x03\x01"), drip)
        ]
        for thread in slow:
            thread.start()
        with tls(port) as connection:
            assert receive(connection)
        for thread in slow:
            thread.join(20)
        assert len(waits) == 3
        assert max(waits) < 6


def test_connections_are_limited_in_number_and_in_rate_before_tls_begins(tmp_path: Path) -> None:
    with running(tmp_path / "crowd", Limits(connections=3, burst=1000, exchange_s=20)) as run:
        port = run.listener.getsockname()[1]
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(tls(port)) for _ in range(3)]
            assert all(receive(connection) for connection in held)
            with pytest.raises((OSError, ssl.SSLError)):
                stack.enter_context(tls(port, 5))
        for _ in range(50):
            with contextlib.suppress(OSError), tls(port, 5) as connection:
                if receive(connection):
                    break
            time.sleep(0.1)
        else:
            pytest.fail("a place that became free was not given again")
    with running(tmp_path / "rate", Limits(burst=2, refill_s=3600)) as run:
        port = run.listener.getsockname()[1]
        for _ in range(2):
            with tls(port) as connection:
                assert receive(connection)
        with pytest.raises((OSError, ssl.SSLError)):
            tls(port, 5)


def test_a_running_endpoint_takes_up_a_new_certificate(tmp_path: Path) -> None:
    with running(tmp_path / "server", Limits(burst=1000, look_s=0.1)) as run:
        port = run.listener.getsockname()[1]

        def shown() -> bytes:
            with tls(port) as connection:
                return connection.getpeercert(binary_form=True) or b""

        before = shown()
        assert before == read_certificate(run.home.endpoint_tls)
        run.home.endpoint_tls.unlink()
        until = time.monotonic() + 10
        while shown() == before and time.monotonic() < until:
            time.sleep(0.05)
        assert shown() == read_certificate(run.home.endpoint_tls) != before


def test_the_gauge_counts_addresses_apart_and_remembers_few() -> None:
    gauge = Gauge(Limits(burst=2, refill_s=10, addresses=100))
    assert [gauge.admits("10.0.0.1", 0) for _ in range(3)] == [True, True, False]
    assert gauge.admits("10.0.0.2", 0)
    assert not gauge.admits("10.0.0.1", 9)
    assert gauge.admits("10.0.0.1", 11)
    # One customer has a whole /64 in IPv6; the same IPv4 address in both forms is one.
    assert [gauge.admits(f"2001:db8::{n}", 0) for n in (1, 2, 3)] == [True, True, False]
    assert gauge.admits("2001:db8:0:1::1", 0)
    assert [gauge.admits(host, 50) for host in ("10.1.0.1", "::ffff:10.1.0.1", "10.1.0.1")] == [True, True, False]
    for n in range(1000):
        gauge.admits(f"10.2.{n // 256}.{n % 256}", 60)
    assert len(gauge) == 100


def test_a_refusal_is_a_fixed_word(home: ServerHome) -> None:
    lengths = {len(module.message("refused", word=one.value)) - len(one.value) for one in Word}
    assert len(lengths) == 1


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server((HOST, 0)) as taken, pytest.raises(IdentityError, match="expected to listen"):
        module.listen(HOST, taken.getsockname()[1])

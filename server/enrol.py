"""Enrolment at the server: the list of members, and the endpoint where invitations are redeemed (guarantee G21).

`Registry` is the list: one signed file, changed under a lock, whole or not at all. A name is *invited*, then
*enrolled*, and may be *revoked*; it never goes back, and it is never used again. Of an invitation's secret it keeps
what `privacy.enrolment.Stored` says, from which the secret cannot be learnt and with which it cannot be redeemed.

`Desk` answers one request. It does no network and holds no lock while it waits for anybody. A join redeems its
invitation in the same write that enters the member's keys, so of two clients with one token exactly one wins, and a
crash after that write loses nothing: the same keys get the same answer again, other keys are refused.

`serve` is the endpoint: TLS 1.3 on a port of its own, apart from the relay. One greeting, one request, one answer, each
with a length in front, then the connection ends. HTTP is not spoken: there are no paths, headers or proxies to serve,
and a parser for them would be the larger half of what a stranger can reach. What a stranger can use up is bounded
before TLS begins: connections at a time, connections a minute from one address, seconds a connection may last, bytes a
message may have.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import ipaddress
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from privacy.enrolment import (
    LENGTH,
    MOST_MESSAGE,
    Invitation,
    Message,
    Word,
    answer_mac,
    body_of,
    from_base64,
    message,
    new_secret,
    older,
    proves,
    read_message,
    signed,
    stored_of,
    to_base64,
    transcript,
)
from privacy.errors import IdentityError, RunError, TacitError
from privacy.files import write_whole
from privacy.hop import present
from privacy.identity import Identity, verify
from privacy.identity.authority import (
    LEAF_DAYS,
    Authority,
    facts_of,
    key_of_request,
    read_certificate,
    require_client,
    valid_name,
    verify_with_certificate,
)
from privacy.identity.supernode import flower_field, verify_supernode
from privacy.plan import canonical
from server.home import ServerHome

_log = logging.getLogger("tacit.enrol")

_VERSION: Final = 1
_MOST_BYTES: Final = 64 * 2**20
_MOST_MEMBERS: Final = 10_000
# So many certificates of a member may be valid at a time; a client that loops must not fill the list.
_MOST_CERTIFICATES: Final = 8
# A certificate that has expired may still be renewed for so long, with the member's other key; then the name is lost.
GRACE_S: Final = LEAF_DAYS * 86400
# Seconds to wait for another process that changes the list; each takes milliseconds.
_PATIENCE_S: Final = 5.0
_STATEMENT: Final = b"tacit/members/1\n"


class State(StrEnum):
    """Where a name stands."""

    INVITED = "invited"
    ENROLLED = "enrolled"
    REVOKED = "revoked"


@dataclasses.dataclass(kw_only=True)
class Member:
    """One name.

    Attributes:
        name: The enrolled name, for ever this holder's.
        state: Where it stands.
        application: Public key of the client's application identity, 64 hex digits; empty before it joined.
        supernode: Public key of its SuperNode, one OpenSSH line; empty before it joined.
        certificates: Its certificates in base64 of DER, the newest last.
        epsilon: What the invitation asked for, or 0.
        delta: What the invitation asked for, or 0.
        invited: When it was invited, seconds since 1970; as are the next four.
        expires: When the invitation expires.
        enrolled: When it joined, or 0.
        renewed: When its newest certificate was made, or 0.
        revoked: When it was revoked, or 0.
        invitation: What is kept of the invitation's secret: id, stored key, server key.
        redeemed: SHA-256 of the keys that redeemed the invitation, hex; empty before.
    """

    name: str
    state: State
    application: str = ""
    supernode: str = ""
    certificates: list[str] = dataclasses.field(default_factory=list)
    epsilon: float = 0.0
    delta: float = 0.0
    invited: int = 0
    expires: int = 0
    enrolled: int = 0
    renewed: int = 0
    revoked: int = 0
    invitation: list[str] = dataclasses.field(default_factory=list, repr=False)
    redeemed: str = ""

    @property
    def serials(self) -> list[str]:
        """Serial numbers of its certificates, lower-case hex."""
        return [facts_of(from_base64(one)).serial for one in self.certificates]

    def tell(self, now: float) -> dict[str, Any]:
        """Returns what an operator sees of it; nothing of an invitation's secret."""
        facts = facts_of(from_base64(self.certificates[-1])) if self.certificates else None
        lapsed = self.state is State.INVITED and now >= self.expires
        return {
            "name": self.name,
            "state": "expired" if lapsed else self.state.value,
            "application": self.application,
            "serials": self.serials,
            "certificate_until": facts.until if facts else 0,
            "invited": self.invited,
            "expires": self.expires,
            "enrolled": self.enrolled,
            "revoked": self.revoked,
            "asked": {"epsilon": self.epsilon, "delta": self.delta} if self.epsilon else {},
        }


class Registry:
    """The list of members of one federation, for any number of processes at a time.

    It is signed by a key that only the enrolment endpoint and the operator's commands need; whoever reads it, the
    gateway for instance, needs the public key alone. An old list that is put back whole is noticed by processes that
    have seen a newer one, and by nobody else.

    Guarantees:
        Whole: a crash at any moment leaves the list before a change or after it.
        Once: changes are made one after the other, each on what the one before it left.
    """

    def __init__(self, path: Path, public_key: str, identity: Identity | None = None) -> None:
        """Opens the list, which need not exist yet.

        Args:
            path: Its file.
            public_key: That it must be signed with, 64 hex digits.
            identity: That signs changes; None for who only reads.
        """
        self._path, self._key, self._identity = path, public_key, identity
        self._seen: tuple[tuple[int, int, int], dict[str, Member]] | None = None
        self._names: tuple[Mapping[str, Member], Mapping[bytes, str]] = ({}, {})
        self._newest, self._threads = 0, threading.Lock()

    @classmethod
    def of(cls, home: ServerHome, *, change: bool = False) -> Registry:
        """Returns the list of a home; to change it, the key beside the authority is read.

        Raises:
            IdentityError: The key is not the home's.
        """
        return cls(home.members, home.settings.registry, home.registry_identity() if change else None)

    def members(self) -> Mapping[str, Member]:
        """Returns the members by name, as they are now; do not change them.

        The file is read anew only where it is another one than before, so that this can be asked at every connection.

        Raises:
            IdentityError: The file is damaged, or was not signed by the registry's key.
        """
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return self._read()[1]
        # Each change makes a new file: its number, size and time together tell it from the one before.
        mark = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._seen is None or self._seen[0] != mark:
            self._seen = mark, self._read()[1]
        return self._seen[1]

    def admits(self, certificate: bytes, authority: bytes, *, now: float) -> Member | None:
        """Returns the member whom a client certificate belongs to, or None where it must not be let in.

        Args:
            certificate: What a client showed in TLS, DER.
            authority: The federation's authority, DER.
            now: Seconds since 1970.

        Raises:
            IdentityError: The list itself is damaged: nobody is let in then either.
        """
        members = self.members()
        try:
            member = members.get(require_client(certificate, authority, now=now))
        except IdentityError:
            return None
        known = member is not None and member.state is State.ENROLLED and to_base64(certificate) in member.certificates
        return member if known else None

    def name_of(self, certificate: bytes) -> str | None:
        """Returns the enrolled name that a certificate is listed for, or None: quick, for every request of a gateway.

        Args:
            certificate: DER, of which TLS has checked chain and time already.

        Raises:
            IdentityError: The list itself is damaged: nobody is let in then either.
        """
        members = self.members()
        if self._names[0] is not members:
            listed = (member for member in members.values() if member.state is State.ENROLLED)
            self._names = members, {from_base64(one): member.name for member in listed for one in member.certificates}
        return self._names[1].get(certificate)

    def node_key(self, name: str) -> bytes | None:
        """Returns what the SuperNode of a name must say in its ``flwr-public-key`` field, or None for who has none.

        Raises:
            IdentityError: The list is damaged.
        """
        member = self.members().get(name)
        return flower_field(member.supernode) if member is not None and member.supernode else None

    def _read(self) -> tuple[int, dict[str, Member]]:
        """Returns how often the list was changed, and its members."""
        fault = IdentityError(f"expected a signed list of members in {self._path}, got other bytes; restore a backup")
        # Taken before the file is: what another thread reads meanwhile may be newer than what is read here.
        floor = self._newest
        try:
            with open(self._path, "rb") as file:
                content = file.read(_MOST_BYTES + 1)
        except FileNotFoundError:
            if floor:
                raise fault from None
            return 0, {}
        body, _, signature = content.partition(b"\n")
        try:
            verify(self._key, _STATEMENT + body, signature.decode("ascii").strip())
            fields = json.loads(body)
            if fields["v"] != _VERSION:
                raise ValueError("another version")
            members = {}
            for one in fields["members"]:
                one["state"] = State(one["state"])
                members[one["name"]] = Member(**one)
        except (TacitError, ValueError, TypeError, KeyError, RecursionError):
            raise fault from None
        generation = int(fields["generation"])
        if generation < floor:
            raise IdentityError(
                f"expected {self._path} as it was changed {floor} times, got one of {generation} changes; "
                "an older list was put back, and whoever was revoked since would be let in: restore the newest"
            )
        with self._threads:
            self._newest = max(self._newest, generation)
        return generation, members

    def _take(self, lock: int) -> None:
        """Takes the lock, or gives up: a process that hangs with it must not make the endpoint hang too.

        Raises:
            RunError: Another process did not let go of it.
        """
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise RunError(
                        f"expected the list {self._path} to be free within {_PATIENCE_S:g} s, got one that another "
                        "process holds; end that process, or try again"
                    ) from None
                time.sleep(0.005)

    @contextlib.contextmanager
    def change(self) -> Iterator[dict[str, Member]]:
        """Gives out the members for a change, and writes them where the block ends without an error.

        Raises:
            IdentityError: The list is damaged, or was opened to be read.
            RunError: The disk is full, or another process holds the list; it is as it was.
        """
        if self._identity is None:
            raise IdentityError("expected a list of members that was opened to be changed, got one to be read")
        lock = os.open(self._path.with_name("members.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(lock)
            generation, members = self._read()
            before = _body(generation, members)
            yield members
            if _body(generation, members) == before:
                return
            body = _body(generation + 1, members)
            write_whole(self._path, body, b"\n", self._identity.sign(_STATEMENT + body).encode(), b"\n")
        finally:
            os.close(lock)


def _body(generation: int, members: Mapping[str, Member]) -> bytes:
    listed = [dataclasses.asdict(members[name]) for name in sorted(members)]
    return canonical({"v": _VERSION, "generation": generation, "members": listed})


# -- what an operator does --------------------------------------------------------------------------------------------


def invite(
    home: ServerHome,
    name: str,
    *,
    lifetime_s: float = 24 * 3600,
    epsilon: float = 0.0,
    delta: float = 0.0,
    replace: bool = False,
    now: float | None = None,
) -> Invitation:
    """Invites a data holder under a name that nobody has had.

    Args:
        home: The server's home.
        name: For the member.
        lifetime_s: For how long the invitation can be redeemed, 1 minute to 30 days.
        epsilon: Budget that the operator asks for, 0 for none; the holder decides.
        delta: Delta that the operator asks for, 0 for none.
        replace: Whether an invitation that is still good is withdrawn for this one.
        now: Seconds since 1970, by this machine's clock if None.

    Returns:
        The invitation, whose `token` is shown once and kept nowhere.

    Raises:
        IdentityError: The name is taken, was revoked or is none, or a figure is out of range.
    """
    now = time.time() if now is None else now
    if not 60 <= lifetime_s <= 30 * 86400:
        raise IdentityError(
            f"expected an invitation for 1 minute to 30 days, got {lifetime_s:g} s; choose another time"
        )
    if not (0 <= epsilon < 1e6 and 0 <= delta < 1 and (epsilon > 0) == (delta > 0)):
        raise IdentityError(f"expected epsilon and delta > 0 together, or neither, got {epsilon:g} and {delta:g}")
    authority, server = home.fingerprints()
    invitation = Invitation(
        secret=new_secret(),
        authority=authority,
        server=server,
        expires=int(now + lifetime_s),
        epsilon=float(epsilon),
        delta=float(delta),
        name=valid_name(name),
        addresses=home.settings.enrol,
    )
    stored = stored_of(invitation.secret)
    with Registry.of(home, change=True).change() as members:
        old = members.get(name)
        if old is not None and old.state is State.ENROLLED:
            raise IdentityError(f"expected a new name, got {name!r}, which is enrolled; choose another, or revoke it")
        if old is not None and old.state is State.REVOKED:
            raise IdentityError(f"expected a new name, got {name!r}, which was revoked; names are never used again")
        if old is not None and now < old.expires and not replace:
            raise IdentityError(
                f"expected a new name, got {name!r}, whose invitation is still good; withdraw that one with --replace"
            )
        if len(members) >= _MOST_MEMBERS:
            raise IdentityError(f"expected at most {_MOST_MEMBERS} members, got one more; use a second federation")
        members[name] = Member(
            name=name,
            state=State.INVITED,
            epsilon=float(epsilon),
            delta=float(delta),
            invited=int(now),
            expires=invitation.expires,
            invitation=[stored.id, stored.stored_key, stored.server_key],
        )
    return invitation


def revoke(home: ServerHome, name: str, *, now: float | None = None) -> Member:
    """Revokes a member or withdraws its invitation; running endpoints and gateways obey at the next connection.

    Raises:
        IdentityError: Nobody has that name.
    """
    now = time.time() if now is None else now
    with Registry.of(home, change=True).change() as members:
        member = members.get(name)
        if member is None:
            known = ", ".join(sorted(members)) or "nobody"
            raise IdentityError(f"expected a member, got {name[:80]!r}; there is: {known}")
        if member.state is not State.REVOKED:
            member.state, member.revoked = State.REVOKED, int(now)
    return member


# -- one request ------------------------------------------------------------------------------------------------------


class _Refusal(Exception):  # noqa: N818 -- an answer, not a fault
    def __init__(self, word: Word) -> None:
        super().__init__(word.value)
        self.word = word


class Desk:
    """Answers requests for one home.

    Guarantees:
        Bounded: one request costs one list of members, two certificates and some signatures, whatever is in it.
        Silent: a request that cannot be read, or fails, gets one fixed word; nothing of it is logged but that word.
    """

    def __init__(self, home: ServerHome, authority: Authority, *, clock: Callable[[], float] = time.time) -> None:
        """Opens the desk.

        Args:
            home: The server's home.
            authority: Its authority, whose key may have needed a passphrase.
            clock: Seconds since 1970.

        Raises:
            IdentityError: The registry's key is not the home's.
        """
        self._home, self._authority, self._clock = home, authority, clock
        self._registry = Registry.of(home, change=True)

    def hello(self) -> bytes:
        """Returns a fresh greeting; the answer to it holds for this greeting alone."""
        settings = self._home.settings
        return message(
            "hello",
            application=settings.application,
            authority=to_base64(self._authority.certificate),
            federation=settings.name,
            nonce=os.urandom(32).hex(),
            oldest=settings.oldest,
            time=int(self._clock()),
        )

    def answer(self, hello: bytes, leaf: bytes, data: bytes) -> bytes:
        """Answers a request.

        Args:
            hello: The greeting that was sent on this connection.
            leaf: The certificate that was shown on it, DER.
            data: What came back; not trusted.

        Returns:
            An answer, or a refusal with one word.
        """
        try:
            try:
                request = read_message(data, "join", "renew")
            except IdentityError:
                raise _Refusal(Word.MALFORMED) from None
            over = transcript(request.kind, hello, leaf, request.body)
            answer = self._join(request, over) if request.kind == "join" else self._renew(request, over)
        except _Refusal as refusal:
            _log.info("refused: %s", refusal.word)
            return message("refused", word=refusal.word.value)
        except Exception:
            # Whatever it was, a stranger learns nothing of it and the endpoint goes on.
            _log.exception("a request failed")
            return message("refused", word=Word.FAILED.value)
        return answer

    def _join(self, request: Message, over: bytes) -> bytes:
        fields, proofs, now = request.fields, request.proofs, self._clock()
        # Looked up without the lock first: who does not know a secret must not make anybody wait.
        found = _invited(self._registry.members(), fields["invitation"])
        if found is None or not proves(found.invitation[1], over, proofs["proof"]):
            raise _Refusal(Word.UNKNOWN)
        try:
            verify(fields["application"], signed("application", over), proofs["application"])
            verify_supernode(fields["supernode"], signed("supernode", over), proofs["supernode"])
            csr = from_base64(fields["request"])
            key = key_of_request(csr)
        except TacitError:
            raise _Refusal(Word.MALFORMED) from None
        if older(fields["tacit"], self._home.settings.oldest):
            raise _Refusal(Word.OLD)
        redeemed = hashlib.sha256(canonical([fields["application"], fields["supernode"], key])).hexdigest()
        with self._registry.change() as members:
            member = _invited(members, fields["invitation"])
            if member is None or member.name != fields["name"]:
                raise _Refusal(Word.UNKNOWN)
            if member.state is State.REVOKED:
                raise _Refusal(Word.REVOKED)
            if member.redeemed:
                # The same keys again: their answer was lost on the way, or with the process that made it.
                same = [one for one in member.certificates if facts_of(from_base64(one)).key == key]
                if member.redeemed != redeemed or not same:
                    raise _Refusal(Word.USED)
                certificate = same[-1]
            else:
                if now >= member.expires:
                    raise _Refusal(Word.EXPIRED)
                if any(
                    other is not member
                    and (other.application == fields["application"] or other.supernode == fields["supernode"])
                    for other in members.values()
                ):
                    raise _Refusal(Word.CONFLICT)
                certificate = to_base64(self._authority.client_leaf(member.name, csr, now=now))
                member.state, member.redeemed = State.ENROLLED, redeemed
                member.enrolled = member.renewed = int(now)
                member.application, member.supernode = fields["application"], fields["supernode"]
                member.certificates = [certificate]
                _log.info("enrolled %s", member.name)
            body = self._enrolled(member.name, certificate)
        # Only now, with the list on disk: an answer that was sent cannot be undone by a crash.
        return body + b"\n" + canonical({"mac": answer_mac(found.invitation[2], over, body)})

    def _renew(self, request: Message, over: bytes) -> bytes:
        fields, proofs, now = request.fields, request.proofs, self._clock()
        member = self._registry.members().get(fields["name"])
        current = _certificate_of(member, fields["serial"]) if member else None
        if member is None or current is None:
            raise _Refusal(Word.UNKNOWN)
        try:
            verify(member.application, signed("application", over), proofs["application"])
            verify_with_certificate(current, signed("certificate", over), proofs["certificate"])
        except TacitError:
            raise _Refusal(Word.UNKNOWN) from None
        try:
            csr = from_base64(fields["request"])
            key = key_of_request(csr)
        except TacitError:
            raise _Refusal(Word.MALFORMED) from None
        if older(fields["tacit"], self._home.settings.oldest):
            raise _Refusal(Word.OLD)
        if now >= facts_of(current).until + GRACE_S:
            raise _Refusal(Word.EXPIRED)
        with self._registry.change() as members:
            member = members[fields["name"]]
            _require_enrolled(member)
            if _certificate_of(member, fields["serial"]) != current:
                raise _Refusal(Word.UNKNOWN)
            kept = [one for one in member.certificates if facts_of(from_base64(one)).until + GRACE_S > now]
            same = [one for one in kept if facts_of(from_base64(one)).key == key and _fresh(one, now)]
            if same:
                certificate = same[-1]
            elif len(kept) >= _MOST_CERTIFICATES:
                raise _Refusal(Word.BUSY)
            else:
                certificate = to_base64(self._authority.client_leaf(member.name, csr, now=now))
                member.certificates, member.renewed = [*kept, certificate], int(now)
                _log.info("renewed %s", member.name)
            body = self._enrolled(member.name, certificate)
        return body + b"\n" + canonical({"mac": ""})

    def _enrolled(self, name: str, certificate: str) -> bytes:
        settings = self._home.settings
        return body_of(
            "enrolled",
            addresses=[str(address) for address in settings.addresses],
            certificate=certificate,
            federation=settings.name,
            name=name,
        )


def _invited(members: Mapping[str, Member], identity: str) -> Member | None:
    return next((member for member in members.values() if member.invitation[:1] == [identity]), None)


def _require_enrolled(member: Member) -> None:
    if member.state is not State.ENROLLED:
        raise _Refusal(Word.REVOKED)


def _certificate_of(member: Member, serial: str) -> bytes | None:
    certificates = (from_base64(one) for one in member.certificates)
    return next((one for one in certificates if facts_of(one).serial == serial), None)


def _fresh(certificate: str, now: float) -> bool:
    return not facts_of(from_base64(certificate)).renewal_due(now)


# -- the endpoint -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What strangers may use up.

    Attributes:
        connections: At a time.
        burst: Connections that one address may make at once; /64 counts as one address in IPv6.
        refill_s: Seconds until it may make one more.
        addresses: How many addresses are remembered; the one that was quiet longest is forgotten.
        exchange_s: Seconds from the first byte of TLS to the last of the answer.
        look_s: Seconds after which the endpoint looks again whether its certificate is to be made anew.
    """

    connections: int = 64
    burst: int = 20
    refill_s: float = 3.0
    addresses: int = 4096
    exchange_s: float = 10.0
    look_s: float = 3600.0


class Gauge:
    """Counts connections of each address: a bucket of `Limits.burst` that refills with time."""

    def __init__(self, limits: Limits) -> None:
        """Starts with every bucket full."""
        self._limits = limits
        self._buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    def admits(self, host: str, now: float) -> bool:
        """Takes one connection from an address's bucket, or says that it is empty.

        Args:
            host: IP address.
            now: Seconds by a clock that never goes back.
        """
        key = _network(host)
        level, at = self._buckets.pop(key, (float(self._limits.burst), now))
        level = min(float(self._limits.burst), level + (now - at) / self._limits.refill_s)
        admitted = level >= 1
        self._buckets[key] = (level - admitted, now)
        while len(self._buckets) > self._limits.addresses:
            self._buckets.popitem(last=False)
        return admitted

    def __len__(self) -> int:
        return len(self._buckets)


def _network(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = getattr(address, "ipv4_mapped", None)
    if address.version == 4 or mapped is not None:
        return str(mapped or address)
    return str(ipaddress.ip_network((address, 64), strict=False))


class Endpoint:
    """The enrolment endpoint of one home, listening on one socket."""

    def __init__(self, home: ServerHome, authority: Authority, listener: socket.socket, limits: Limits) -> None:
        """Takes over a listening socket.

        Raises:
            IdentityError: A key or certificate of the home is damaged.
        """
        self._home, self._authority, self._listener, self._limits = home, authority, listener, limits
        self._desk = Desk(home, authority)
        self._gauge = Gauge(limits)
        self._open: set[asyncio.Task[None]] = set()
        home.renew(authority, now=time.time())
        self._context, self._leaf = self._tls()

    def _tls(self) -> tuple[ssl.SSLContext, bytes]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # A session that is resumed would show no certificate, and every proof is bound to one.
        context.num_tickets = 0
        present(context, self._home.endpoint_tls, self._home.endpoint_tls)
        return context, read_certificate(self._home.endpoint_tls)

    async def run(self) -> None:
        """Serves until it is cancelled."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        renewal = asyncio.create_task(self._renewing())
        try:
            while True:
                try:
                    connection, peer = await loop.sock_accept(self._listener)
                except OSError:
                    # Out of descriptors, or a peer that left while it was queued: those who are served will end.
                    await asyncio.sleep(0.1)
                    continue
                full = len(self._open) >= self._limits.connections
                if full or not self._gauge.admits(str(peer[0]), time.monotonic()):
                    connection.close()
                    continue
                task = asyncio.create_task(self._serve(connection))
                self._open.add(task)
                task.add_done_callback(self._open.discard)
        finally:
            renewal.cancel()
            for task in tuple(self._open):
                task.cancel()
            await asyncio.gather(renewal, *self._open, return_exceptions=True)

    async def _renewing(self) -> None:
        """Looks now and then whether a server certificate is to be made anew; the gateway sees its own file change."""
        while True:
            await asyncio.sleep(self._limits.look_s)
            try:
                if self._home.renew(self._authority, now=time.time()):
                    self._context, self._leaf = self._tls()
                    _log.info("renewed the server's certificates")
            except (TacitError, OSError) as error:
                _log.error("the server's certificates are not renewed: %s", error)

    async def _serve(self, connection: socket.socket) -> None:
        """One connection, from its first byte to its last; whatever happens to it, the endpoint goes on."""
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(self._limits.exchange_s):
                # Context and leaf are taken together: a renewal in between must not part them.
                context, leaf = self._context, self._leaf
                connection.setblocking(False)
                reader, writer = await _open_stream(connection, context, self._limits.exchange_s)
                hello = self._desk.hello()
                writer.write(LENGTH.pack(len(hello)) + hello)
                await writer.drain()
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                if length > MOST_MESSAGE:
                    answer = message("refused", word=Word.MALFORMED.value)
                else:
                    data = await reader.readexactly(length)
                    # Signing and syncing take milliseconds; others are greeted meanwhile.
                    answer = await asyncio.to_thread(self._desk.answer, hello, leaf, data)
                writer.write(LENGTH.pack(len(answer)) + answer)
                await writer.drain()
                if writer.can_write_eof():
                    writer.write_eof()
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ssl.SSLError) as error:
            _log.debug("a connection ended early: %s", type(error).__name__)
        finally:
            if writer is None:
                connection.close()
            else:
                writer.close()
                # A peer that does not close its half of TLS must not keep the connection.
                try:
                    async with asyncio.timeout(1):
                        await writer.wait_closed()
                except (OSError, TimeoutError, ssl.SSLError):
                    writer.transport.abort()


async def _open_stream(
    connection: socket.socket, context: ssl.SSLContext, seconds: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Does the server's half of a TLS handshake on an accepted socket."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MOST_MESSAGE)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(
        lambda: protocol, connection, ssl=context, ssl_handshake_timeout=seconds, ssl_shutdown_timeout=1.0
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Args:
        host: An address of this machine; empty for all of them, by IPv6 and IPv4 where it has both.
        port: TCP port, 0 for a free one.

    Raises:
        IdentityError: The address is in use, or not this machine's.
    """
    try:
        both = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)
    except OSError as error:
        at = f"{host or 'every address'} port {port}"
        raise IdentityError(
            f"expected to listen on {at}, got {error.strerror}; stop what uses it, or choose --listen"
        ) from None


def serve(
    home: ServerHome,
    authority: Authority,
    listener: socket.socket,
    *,
    limits: Limits | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Runs the endpoint in this thread until it is stopped.

    Args:
        home: The server's home.
        authority: Its authority.
        listener: A socket of `listen`; it is closed at the end.
        limits: What strangers may use up.
        stop: Ends it when set, within 0.1 s; without one, only an exception does (Ctrl-C).

    Raises:
        IdentityError: A key or certificate of the home is damaged.
    """

    async def main() -> None:
        task = asyncio.create_task(Endpoint(home, authority, listener, limits or Limits()).run())
        try:
            while stop is None or not stop.is_set():
                done, _ = await asyncio.wait([task], timeout=3600 if stop is None else 0.1)
                if done:
                    break
        finally:
            if not task.done():
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    with listener:
        asyncio.run(main())

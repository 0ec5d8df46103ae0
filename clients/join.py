"""Joining a federation with one line of text, and renewing what was got by it (guarantee G21).

The invitation says whom to believe. The endpoint is called over TLS 1.3, without believing the certificate that it
shows at first: its greeting brings the authority's certificate, whose SHA-256 must be the invitation's, and the shown
certificate must be a current one of that authority for the very host that was called, by the verifier of the
`cryptography` package. TLS has proven by then that the other side holds its key. Only after that is anything sent, and
what is sent is no secret: public keys, signatures by them, and a proof bound to both sides' keys. The answer must carry
a MAC that only who stored the invitation can make, and a certificate of the same authority for our key.

Keys are on disk before they are sent. A join that was interrupted anywhere is repeated with the same token.
"""

from __future__ import annotations

import dataclasses
import hmac
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from clients.home import ClientHome, Policy, Settings
from privacy.enrolment import (
    LENGTH,
    MOST_MESSAGE,
    REMEDIES,
    Address,
    Invitation,
    Message,
    Word,
    answer_mac,
    body_of,
    from_base64,
    key_fingerprint,
    prove,
    read_message,
    server_key_of,
    signed,
    stored_of,
    to_base64,
    transcript,
)
from privacy.errors import IdentityError, LedgerError, PlanError
from privacy.files import write_whole
from privacy.identity.authority import (
    certificate_request,
    facts_of,
    fingerprint,
    key_of_private,
    pem_of,
    read_certificate,
    read_private,
    require_client,
    require_server,
    sign_with_key,
)
from privacy.identity.supernode import sign_supernode
from privacy.ledger import Book
from privacy.plan import Metric, canonical
from privacy.transcript import holders_grant

# Words for the persons whose records a holder's data sets are parts of, where it gives none of its own.
POPULATION: Final = "the holder's own data sets"
_CONNECT_S: Final = 5.0
_EXCHANGE_S: Final = 15.0


@dataclasses.dataclass(frozen=True)
class Greeting:
    """An endpoint that was found to be the right one.

    Attributes:
        address: Where it answered.
        authority: The federation's authority, DER.
        application: Public key of the server application, 64 hex digits.
        federation: The federation's name.
        oldest: The oldest Tacit that it takes.
        ahead_s: By how many seconds this machine's clock is ahead of the server's; negative if it is behind.
        until: When the server's certificate expires, seconds since 1970.
    """

    address: Address
    authority: bytes
    application: str
    federation: str
    oldest: str
    ahead_s: float
    until: int


# Kind and first line of a request, and what makes its proofs from the transcript.
Request: TypeAlias = tuple[str, bytes, Callable[[bytes], dict[str, str]]]


def call(
    addresses: Sequence[Address],
    authority: bytes,
    server: bytes,
    request: Request | None = None,
) -> tuple[Greeting, Message | None, bytes]:
    """Calls an enrolment endpoint, checks that it is the right one, and asks it for something.

    Args:
        addresses: Tried in order until one answers.
        authority: SHA-256 of the authority's certificate.
        server: Fingerprint of the server application's key.
        request: What to ask; None only greets.

    Returns:
        The greeting; the answer, if there was a request; the transcript.

    Raises:
        IdentityError: Nobody answers, it is another server, clocks disagree too much, or the request was refused.
    """
    failures = []
    for address in addresses:
        try:
            raw = socket.create_connection((address.host, address.port), timeout=_CONNECT_S)
        except OSError as error:
            failures.append(f"{address}: {error.strerror or error}")
            continue
        with raw:
            try:
                return _exchange(raw, address, authority, server, request)
            except ssl.SSLError as error:
                failures.append(f"{address}: no TLS 1.3 ({error.reason or error})")
            except (OSError, EOFError) as error:
                failures.append(f"{address}: {error or 'it hung up'}")
    raise IdentityError(
        f"expected the enrolment endpoint to answer, got: {'; '.join(failures)}; check that the server runs, that its "
        "port is open here, and try again in a minute: it refuses who calls too often"
    )


def _exchange(
    raw: socket.socket,
    address: Address,
    authority: bytes,
    server: bytes,
    request: Request | None,
) -> tuple[Greeting, Message | None, bytes]:
    deadline = time.monotonic() + _EXCHANGE_S
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The authority is not known before the greeting; `_identify` checks the chain, before anything is sent.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    raw.settimeout(_CONNECT_S)
    with context.wrap_socket(raw, server_hostname=address.host) as tls:
        leaf = tls.getpeercert(binary_form=True) or b""
        before = time.time()
        hello = _receive(tls, deadline)
        greeting = _identify(hello, leaf, address, authority, server, now=(before + time.time()) / 2)
        if request is None:
            return greeting, None, b""
        kind, body, proofs = request
        over = transcript(kind, hello, leaf, body)
        data = body + b"\n" + canonical(proofs(over))
        tls.sendall(LENGTH.pack(len(data)) + data)
        answer = read_message(_receive(tls, deadline), "enrolled", "refused")
    if answer.kind == "refused":
        word = Word(answer.fields["word"])
        raise IdentityError(f"expected to be enrolled, the server said {word.value!r}: {REMEDIES[word]}")
    return greeting, answer, over


def _identify(hello: bytes, leaf: bytes, address: Address, authority: bytes, server: bytes, *, now: float) -> Greeting:
    """Checks that a greeting and a certificate are those of the server that is meant.

    Raises:
        IdentityError: They are not.
    """
    fields = read_message(hello, "hello").fields
    shown = from_base64(fields["authority"])
    if not hmac.compare_digest(fingerprint(shown), authority):
        raise IdentityError(
            f"expected the certificate authority whose fingerprint begins with {authority.hex()[:16]}, {address} "
            f"showed {fingerprint(shown).hex()[:16]}; another server, or somebody in between: ask the operator"
        )
    if not hmac.compare_digest(key_fingerprint(fields["application"]), server):
        raise IdentityError(
            f"expected the server application that is meant, {address} named another key; ask the operator"
        )
    ahead = now - fields["time"]
    try:
        require_server(leaf, shown, address.host, now=now)
    except IdentityError as error:
        # Where the certificate is sound by the server's clock, one of the clocks is the fault, and worth a sentence.
        try:
            require_server(leaf, shown, address.host, now=fields["time"])
        except IdentityError:
            raise error from None
        raise IdentityError(_skewed(ahead)) from None
    return Greeting(
        address=address,
        authority=shown,
        application=fields["application"],
        federation=fields["federation"],
        oldest=fields["oldest"],
        ahead_s=ahead,
        until=facts_of(leaf).until,
    )


def _skewed(ahead_s: float) -> str:
    side = "ahead of" if ahead_s > 0 else "behind"
    return (
        f"expected clocks that agree, got one that is {abs(ahead_s):.0f} s {side} the server's; set the time on this "
        "machine (timedatectl set-ntp true), or on the server's"
    )


def _receive(tls: ssl.SSLSocket, deadline: float) -> bytes:
    (length,) = LENGTH.unpack(_read(tls, LENGTH.size, deadline))
    if length > MOST_MESSAGE:
        raise IdentityError(f"expected a message of at most {MOST_MESSAGE} bytes, got {length}; it is another service")
    return _read(tls, length, deadline)


def _read(tls: ssl.SSLSocket, count: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        # A server that sends a byte now and then must not hold us either.
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        tls.settimeout(min(_CONNECT_S, left))
        part = tls.recv(count - len(parts))
        if not part:
            raise EOFError("it hung up")
        parts += part
    return bytes(parts)


# -- joining ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What the holder chose on the command line.

    Attributes:
        task: What may be learned.
        data: Where the data lies; empty where the task brings its own.
        policy: What may be done with it.
        data_set: The holder's own name of it, in the ledger.
        ledger: Folder of a ledger that this data has already; None for the home's own.
        keys: File of keys that opens the data, where it is sealed; empty for the home's keyring or the environment's.
    """

    task: str
    data: str
    policy: Policy
    data_set: str = "data"
    ledger: Path | None = None
    keys: str = ""


def require_unexpired(invitation: Invitation, now: float) -> None:
    """Refuses an invitation that has expired by this machine's clock; the server decides by its own.

    Raises:
        IdentityError: It has.
    """
    if now >= invitation.expires:
        then, here = (time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at)) for at in (invitation.expires, now))
        raise IdentityError(
            f"expected an invitation that is still good, got one that expired at {then}, and it is {here} here; "
            "ask for a new one, or set the clock"
        )


def require_fresh(home: ClientHome) -> None:
    """Refuses a home that belongs to a member already.

    Raises:
        IdentityError: It does.
    """
    if home.joined:
        known = home.settings
        raise IdentityError(
            f"expected a home that has not joined, got {known.name!r} of {known.federation!r}; choose another --home"
        )


def join(invitation: Invitation, home: ClientHome, choices: Choices, *, version: str) -> tuple[Settings, Greeting]:
    """Makes keys, enrols, and grants the ledger's budget.

    The same invitation can be tried again until it succeeds: keys stay, the ledger's budget is granted once.

    Args:
        invitation: Of the server.
        home: Where everything is kept.
        choices: The holder's.
        version: Of this Tacit.

    Returns:
        What was settled, and the server as it greeted.

    Raises:
        IdentityError: The home belongs to a member already, the server is another one, or it refused.
        LedgerError: The data's ledger says another budget.
        PlanError: The budget is none.
    """
    require_unexpired(invitation, time.time())
    require_fresh(home)
    home.make()
    with home.alone():
        # Again: another process may just have finished.
        require_fresh(home)
        return _join(invitation, home, choices, version)


def _join(invitation: Invitation, home: ClientHome, choices: Choices, version: str) -> tuple[Settings, Greeting]:
    home.make_keys()
    ledger = (choices.ledger or home.folder / "ledger").absolute()
    ledger.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.share_with_ledger(ledger)
    _grant(ledger, choices)
    identity, supernode, key = home.identity(), home.supernode(), home.next_key()
    body = body_of(
        "join",
        application=identity.public_key,
        invitation=stored_of(invitation.secret).id,
        name=invitation.name,
        request=to_base64(certificate_request(key, invitation.name)),
        supernode=home.supernode_public(),
        tacit=version,
    )

    def proofs(over: bytes) -> dict[str, str]:
        return {
            "application": identity.sign(signed("application", over)),
            "proof": prove(invitation.secret, over),
            "supernode": sign_supernode(supernode, signed("supernode", over)),
        }

    greeting, answer, over = call(invitation.addresses, invitation.authority, invitation.server, ("join", body, proofs))
    if answer is None:
        raise IdentityError("expected an answer, got none")
    mac = answer_mac(server_key_of(invitation.secret), over, answer.body)
    if not hmac.compare_digest(mac, answer.proofs["mac"]):
        raise IdentityError(
            "expected an answer by whoever made the invitation, got one without its MAC; the server is not the one "
            "that invited us: ask the operator"
        )
    certificate = _own_certificate(answer, key, invitation.name, greeting)
    settings = Settings(
        name=invitation.name,
        federation=greeting.federation,
        addresses=tuple(Address.parse(one) for one in answer.fields["addresses"]),
        enrol=invitation.addresses,
        server=greeting.application,
        authority=invitation.authority.hex(),
        task=choices.task,
        data=os.path.abspath(Path(choices.data).expanduser()) if choices.data else "",
        data_set=choices.data_set,
        ledger=str(ledger),
        policy=choices.policy,
        asked=(invitation.epsilon, invitation.delta),
        joined=int(time.time()),
        keys=os.path.abspath(Path(choices.keys).expanduser()) if choices.keys else "",
    )
    write_whole(home.authority_file, pem_of(greeting.authority))
    home.adopt(key, pem_of(certificate) + pem_of(greeting.authority))
    # With it the client has joined, and everything that it needs is there. Until then the key for a repetition stays.
    home.save(settings)
    home.discard_next_key()
    return settings, greeting


def _own_certificate(answer: Message, key: bytes, name: str, greeting: Greeting) -> bytes:
    """Returns the certificate in an answer: ours, for our key, under our name.

    Raises:
        IdentityError: It is another.
    """
    certificate = from_base64(answer.fields["certificate"])
    # By the server's clock: ours may be slow, and the preflight says so.
    named = require_client(certificate, greeting.authority, now=time.time() - greeting.ahead_s)
    if named != name or answer.fields["name"] != name or facts_of(certificate).key != key_of_private(key):
        raise IdentityError("expected a certificate for our own key and name, got another; ask the operator")
    return certificate


def _grant(folder: Path, choices: Choices) -> None:
    """Opens the data set's account with the holder's budget, or finds it open with the same one.

    Raises:
        LedgerError: The account has another budget.
        PlanError: The budget is none.
    """
    policy = choices.policy
    wanted = holders_grant(epsilon=policy.epsilon, delta=policy.delta, records_bound=policy.records_bound)
    with Book(folder) as book:
        account = book.accounts.get(choices.data_set)
        if account is None:
            known = sorted(book.populations)
            book.grant({choices.data_set: wanted}, population=known[0] if known else POPULATION)
            return
        has, asked = ((grant.epsilon, grant.delta, grant.records_bound) for grant in (account.grant, wanted))
        if has != asked:
            raise LedgerError(
                f"expected the budget that {choices.data_set!r} has (epsilon {has[0]:g}, delta {has[1]:g}, at most "
                f"{has[2]} records), got another; give these, or change it first with: tacit client budget {folder}"
            )


def renew(home: ClientHome, *, version: str) -> int:
    """Renews the certificate of a client that has joined, with a fresh key.

    Safe to repeat: an interrupted renewal goes on with the same key.

    Returns:
        Until when the new certificate is good, seconds since 1970.

    Raises:
        IdentityError: The server cannot be reached, is another one, or refuses: revoked, or expired for too long.
    """
    settings = home.settings
    with home.alone():
        return _renew(home, settings, version)


def renew_when_due(home: ClientHome, *, version: str, clock: Callable[[], float] = time.time) -> int | None:
    """Renews the certificate once two thirds of its life are over.

    Returns:
        Until when the new certificate is good, seconds since 1970; None where none was due.

    Raises:
        IdentityError: As `renew`; the certificate that is there stays in use.
    """
    return renew(home, version=version) if home.renewal_due(clock()) else None


def _renew(home: ClientHome, settings: Settings, version: str) -> int:
    current = facts_of(read_certificate(home.tls))
    if key_of_private(home.next_key()) == current.key:
        # Killed between taking it into use and putting it away.
        home.discard_next_key()
    old, new, identity = read_private(home.tls), home.next_key(), home.identity()
    body = body_of(
        "renew",
        name=settings.name,
        request=to_base64(certificate_request(new, settings.name)),
        serial=current.serial,
        tacit=version,
    )

    def proofs(over: bytes) -> dict[str, str]:
        return {
            "application": identity.sign(signed("application", over)),
            "certificate": sign_with_key(old, signed("certificate", over)),
        }

    pinned = bytes.fromhex(settings.authority), key_fingerprint(settings.server)
    greeting, answer, _ = call(settings.enrol, *pinned, ("renew", body, proofs))
    if answer is None:
        raise IdentityError("expected an answer, got none")
    certificate = _own_certificate(answer, new, settings.name, greeting)
    home.adopt(new, pem_of(certificate) + pem_of(greeting.authority))
    home.discard_next_key()
    addresses = tuple(Address.parse(one) for one in answer.fields["addresses"])
    if addresses != settings.addresses:
        home.save(dataclasses.replace(settings, addresses=addresses))
    return facts_of(certificate).until


def policy_of(
    invitation: Invitation | None,
    *,
    epsilon: float | None,
    delta: float | None,
    records_bound: int | None,
    allow_metrics: Sequence[str] = (),
    allow_central: bool = False,
) -> Policy:
    """Returns the holder's policy; an invitation only asks, and what it asks is never taken without a word.

    Raises:
        PlanError: The holder did not say its budget.
    """
    if epsilon is None or delta is None:
        asks = (
            f"; the invitation asks for epsilon {invitation.epsilon:g} and delta {invitation.delta:g}"
            if invitation is not None and invitation.epsilon
            else ""
        )
        raise PlanError(
            f"expected --epsilon X and --delta X, the budget that you set for this data for ever, got none{asks}"
        )
    if records_bound is None:
        raise PlanError(
            "expected --records-bound N, a public bound on your number of records, got none; it may be large"
        )
    try:
        words = tuple(word for word in Metric if word in {Metric(one) for one in allow_metrics})
    except ValueError:
        known = ", ".join(Metric)
        raise PlanError(f"expected metrics among {known}, got {', '.join(map(str, allow_metrics))!r:.80}") from None
    return Policy(
        epsilon=float(epsilon),
        delta=float(delta),
        records_bound=records_bound,
        allow_metrics=words,
        allow_central=allow_central,
    )

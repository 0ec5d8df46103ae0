"""Looks whether a client could take part, before any job asks: each fault is found here, with how to mend it.

Everything stays on this machine. What is sent over the network is a connection and nothing in it, so that nobody else
learns what the look at the data found (guarantee G12); no ledger is charged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final

from clients.home import ClientHome, Settings
from clients.isolation import Apart, look
from clients.join import Choices, Greeting, call
from privacy.enrolment import Address, key_fingerprint, older
from privacy.errors import DataError, IdentityError, LedgerError, PlanError, RunError, TacitError
from privacy.hop import present
from privacy.identity.authority import facts_of, read_certificate, require_client

# What the package asks for; a test compares this with pyproject.toml. The end of a range is excluded.
NEEDS: Final[Mapping[str, tuple[str, str]]] = {
    "cryptography": ("50", "51"),
    "dp-accounting": ("0.6", "0.7"),
    "flwr": ("1.41", "1.42"),
    "numpy": ("2", "3"),
    "opacus": ("1.6", "1.7"),
    "torch": ("2.11", ""),
}
# A SuperLink refuses a SuperNode whose clock is ahead by more than 5 s, or behind by more than 305 s.
_AHEAD_S: Final = 5.0
_BEHIND_S: Final = 300.0
_DRIFT_S: Final = 2.0
_LEAST_BYTES: Final = 200 * 2**20
_ENOUGH_BYTES: Final = 2 * 2**30
_SETTLED_S: Final = 5.0


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: What was looked at.
        verdict: How it ended.
        words: What was found.
        fix: What to do about it; empty where nothing is to be done.
        exit_code: What the command ends with if it failed.
    """

    check: str
    verdict: Verdict
    words: str
    fix: str = ""
    exit_code: int = 0


def _ok(check: str, words: str) -> Finding:
    return Finding(check, Verdict.OK, words)


def _warning(check: str, words: str, fix: str) -> Finding:
    return Finding(check, Verdict.WARNING, words, fix)


def _failed(check: str, words: str, fix: str, kind: type[TacitError]) -> Finding:
    return Finding(check, Verdict.FAILED, words, fix, kind.exit_code)


def _guarded(check: str, look: Callable[[], Finding]) -> Finding:
    """A check that stumbles is a check that failed; the ones after it still run."""
    try:
        return look()
    except TacitError as error:
        # Our sentences end with what to do.
        words, _, fix = str(error).rpartition("; ")
        return Finding(check, Verdict.FAILED, words or fix, fix, error.exit_code)
    except OSError as error:
        return _failed(check, f"{error.strerror or error}", "free space or permissions, then look again", RunError)


def local(home: ClientHome, choices: Choices) -> Iterator[Finding]:
    """Looks at this machine and the data; yields a finding as soon as it is known."""
    yield _guarded("versions", _versions)
    yield _guarded("permissions", lambda: _permissions(home))
    yield _guarded("disk", lambda: _disk(home.folder))
    yield _guarded("data", lambda: _data(home, choices))
    yield _guarded("gpu", _gpu)


def remote(home: ClientHome, *, version: str, greeting: Greeting | None = None) -> Iterator[Finding]:
    """Looks at what the client got by joining, and at the server.

    Args:
        home: Of a client that has joined.
        version: Of this Tacit.
        greeting: Of the endpoint, if it was just called; None calls it.
    """
    # Where the gateway runs under a user of its own, the list of members reaches it a moment after the enrolment.
    patience_s = _SETTLED_S if greeting is not None else 0.0
    try:
        settings = home.settings
    except IdentityError as error:
        yield _failed("enrolment", str(error), "tacit client join TOKEN", IdentityError)
        return
    yield _guarded("ledger", lambda: _ledger(settings))
    yield _guarded("certificate", lambda: _certificate(home, settings))
    if greeting is None:
        pinned = bytes.fromhex(settings.authority), key_fingerprint(settings.server)
        try:
            greeting = call(settings.enrol, *pinned)[0]
        except IdentityError as error:
            words, _, fix = str(error).rpartition("; ")
            yield Finding("server", Verdict.FAILED, words, fix, IdentityError.exit_code)
            return
    yield _ok("server", f"{greeting.federation} answers at {greeting.address}, and is the one that invited")
    yield _clock(greeting)
    if older(version, greeting.oldest):
        yield _failed("server version", f"it wants Tacit {greeting.oldest}, this is {version}", "update", IdentityError)
    else:
        yield _ok("server version", f"it takes Tacit {version}")
    yield _guarded("gateway", lambda: _let_in(home, settings.addresses, patience_s))


def apart(home: ClientHome) -> Iterator[Finding]:
    """Looks whether Flower's processes run apart from what the holder keeps (guarantee G15); see `clients.isolation`.

    Where they do not, or where that cannot be seen, it is a warning: the holder may accept it, and the report says so.
    """
    yield _guarded("isolation", lambda: _isolation(home))


def choices_of(settings: Settings) -> Choices:
    """Returns what the holder chose when it joined."""
    return Choices(
        task=settings.task,
        data=settings.data,
        policy=settings.policy,
        data_set=settings.data_set,
        ledger=Path(settings.ledger),
        keys=settings.keys,
    )


def located(data: str) -> str:
    """Returns the absolute path of data that lies in the current folder or else in that of data sets; "" stays so."""
    from clients.data import data_folder

    if not data:
        return ""
    given = Path(data).expanduser()
    elsewhere = data_folder() / given
    return os.path.abspath(elsewhere if not given.exists() and elsewhere.exists() else given)


def declared_bound(home: ClientHome, task: str, data: str, keys: str = "") -> int | None:
    """Returns the number of records that the data's public description declares, or None where there is none.

    Args:
        home: Whose keyring may open a sealed description.
        task: What may be learned.
        data: Where the data lies.
        keys: File of keys that opens it; see `Choices`.

    Raises:
        DataError: A table's schema is damaged.
        VaultError: It is sealed, and there is no key for it.
    """
    from clients.data import published
    from models.catalog import find_task

    try:
        return published(find_task(task), data or None, opens=lambda: home.openers(keys))[1]
    except LookupError:
        return None


# -- this machine -----------------------------------------------------------------------------------------------------


def _versions() -> Finding:
    wrong = []
    for name, (least, end) in NEEDS.items():
        try:
            # Of 2.11.0+cu130 or 2.12.0rc1, the numbers count.
            has = ".".join(_numbers(importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if older(has, least) or (end and not older(has, end)):
            wrong.append(f"{name} is {has}, wanted {least}{f' up to before {end}' if end else ' or newer'}")
    if wrong:
        return _failed("versions", "; ".join(wrong), "install Tacit into an environment of its own", RunError)
    return _ok("versions", f"Python {sys.version.split()[0]} and {len(NEEDS)} packages are as wanted")


def _numbers(version: str) -> list[str]:
    parts: list[str] = []
    for part in version.split("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits or len(parts) == 3:
            break
        parts.append(digits[:4])
    return parts or ["0"]


def _permissions(home: ClientHome) -> Finding:
    if not home.folder.exists():
        return _ok("permissions", f"{home.folder} will be made for you alone")
    found = home.open_to_others() if (home.folder / "keys").exists() else []
    if found:
        names = " ".join(str(path) for path in found)
        return _failed(
            "permissions", f"others may read {names}", f"chmod go-rwx {names}, as their owner", IdentityError
        )
    if not os.access(home.folder, os.W_OK | os.X_OK):
        return _failed("permissions", f"{home.folder} cannot be written", "make it yours, or give --home", RunError)
    return _ok("permissions", f"{home.folder} is yours alone")


def _disk(folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    words = f"{free / 2**30:.1f} GiB free at {folder}"
    if free < _LEAST_BYTES:
        return _failed("disk", words, "free some space: a full disk stops the ledger, and with it every job", RunError)
    if free < _ENOUGH_BYTES:
        return _warning("disk", words, "free some space before a long job")
    return _ok("disk", words)


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return _ok("gpu", f"{torch.cuda.get_device_name(0)}; training runs there with --device cuda")
    if Path("/dev/nvidia0").exists():
        return _warning("gpu", "there is one, but PyTorch cannot use it", "update its driver, or train on the CPU")
    return _ok("gpu", "none; training runs on the CPU")


def _data(home: ClientHome, choices: Choices) -> Finding:
    from clients.data import faults, load_source
    from models.catalog import find_task

    try:
        task = find_task(choices.task)
    except LookupError as error:
        return _failed("data", str(error), "choose one of them", PlanError)
    place = Path(located(choices.data))
    if choices.data and not place.exists():
        raise DataError(f"expected data at {place}, found nothing; mount it, or name where it lies now")
    source = load_source(task, data=choices.data or None, strict=False, opens=lambda: home.openers(choices.keys))
    count, bound = len(source.train), choices.policy.records_bound
    shape = task.shape or source.shape
    found = faults(source.train, shape)
    if not count:
        return _failed("data", "there is no record to train on", "put training records there", DataError)
    if count > bound:
        fix = "declare a larger --records-bound, and a delta below 1 over it"
        return _failed("data", f"{count} records are more than the declared bound of {bound}", fix, DataError)
    words = f"{count} records for {task.name}, each of shape {tuple(shape.inputs)}; only you see this number"
    if found:
        return _warning("data", f"{words}; {found[0]}", "mend them: faulty records take part as nothing")
    return _ok("data", words)


def _isolation(home: ClientHome) -> Finding:
    found = look(home)
    return _ok("isolation", found.words) if found.apart is Apart.YES else _warning("isolation", found.words, found.fix)


# -- what was got by joining, and the server --------------------------------------------------------------------------


def _ledger(settings: Settings) -> Finding:
    from privacy.transcript import read_ledger

    account = read_ledger(Path(settings.ledger)).accounts.get(settings.data_set)
    if account is None:
        raise LedgerError(f"expected an account {settings.data_set!r} in {settings.ledger}, got none; restore a backup")
    words = f"epsilon {account.grant.epsilon:g} at delta {account.grant.delta:g}, {account.charges} charges so far"
    if not account.charges:
        # A second ledger for the same records would hide what the first one spent.
        words += " (data that has a ledger already joins with --ledger DIR)"
    if settings.asked[0] > account.grant.epsilon:
        words += f"; the server asked for {settings.asked[0]:g}, your own word holds"
    return _ok("ledger", words)


def _certificate(home: ClientHome, settings: Settings) -> Finding:
    leaf, now = read_certificate(home.tls), time.time()
    facts = facts_of(leaf)
    require_client(leaf, home.authority, now=min(max(now, facts.since), facts.until - 1))
    days = (facts.until - now) / 86400
    if days <= 0:
        return _failed("certificate", f"expired {-days:.1f} days ago", "tacit client renew", IdentityError)
    if facts.renewal_due(now):
        return _warning("certificate", f"good for {days:.1f} days more", "tacit client renew")
    return _ok("certificate", f"{settings.name}, good for {days:.1f} days")


def _clock(greeting: Greeting) -> Finding:
    ahead = greeting.ahead_s
    words = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    fix = "set the time on this machine (timedatectl set-ntp true), or on the server's"
    # The greeting's time is in whole seconds, so a second is no difference.
    if ahead > _AHEAD_S + 1 or ahead < -_BEHIND_S:
        return _failed("clock", words, fix, RunError)
    if abs(ahead) > _DRIFT_S + 1:
        return _warning("clock", words, fix)
    return _ok("clock", "agrees with the server's to a few seconds")


def _let_in(home: ClientHome, addresses: tuple[Address, ...], patience_s: float) -> Finding:
    until = time.monotonic() + patience_s
    while True:
        finding = _gateway(home, addresses)
        if finding.verdict is not Verdict.FAILED or time.monotonic() >= until:
            return finding
        time.sleep(0.25)


def _gateway(home: ClientHome, addresses: tuple[Address, ...]) -> Finding:
    """The gateway may start later, so that nobody answers is no fault yet; that another one answers is."""
    context = ssl.create_default_context(cafile=str(home.authority_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    present(context, home.tls, home.tls)
    silent = []
    for address in addresses:
        try:
            raw = socket.create_connection((address.host, address.port), timeout=3)
        except OSError as error:
            silent.append(f"{address}: {error.strerror or error}")
            continue
        try:
            with raw, context.wrap_socket(raw, server_hostname=address.host) as connection:
                # In TLS 1.3 a server refuses a certificate after the client's handshake is over, and one that lets us
                # in says nothing before it is asked: whatever comes now, bytes or the end, is a refusal.
                connection.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    connection.recv(1)
                    fix = "tacit client renew; if it goes on, ask the operator whether this name was revoked"
                    return _failed("gateway", f"{address} does not let us in", fix, IdentityError)
                return _ok("gateway", f"answers at {address}")
        except ssl.SSLError as error:
            fix = "ask the operator: it is another server, its certificate has expired, or it does not want ours"
            return _failed("gateway", f"{address}: {error.reason or error}", fix, IdentityError)
        except OSError as error:
            silent.append(f"{address}: {error.strerror or error}")
    return _warning("gateway", "; ".join(silent), "wait until the server is started, or open the port; we call again")

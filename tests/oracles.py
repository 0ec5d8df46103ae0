"""Slow, obvious second opinions, and small tools that several tests share. Nothing here is shipped."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mpmath

from privacy.accounting import Grant
from privacy.identity import Secret
from privacy.ledger import Book, ChargeRequest
from privacy.plan import Mode, Plan

ACCOUNT = "clinic-7"


def sampled_gaussian_rdp(sample_rate: float, noise_multiplier: float, order: float) -> float:
    """Returns the Renyi divergence of one Poisson-sampled Gaussian step by direct integration at 50 digits.

    References:
        Mironov, Talwar & Zhang (2019), equation 3: the order-moment of the likelihood ratio under the pure Gaussian.
    """
    with mpmath.workdps(50):
        q, sigma, alpha = mpmath.mpf(sample_rate), mpmath.mpf(noise_multiplier), mpmath.mpf(order)

        def integrand(x: Any) -> Any:
            ratio = 1 - q + q * mpmath.exp((2 * x - 1) / (2 * sigma**2))
            return mpmath.npdf(x, 0, sigma) * ratio**alpha

        # The mass sits around 0 (unsampled) and around the order (sampled); cuts there keep the quadrature honest.
        cuts = [-30 * sigma, -5 * sigma, 0, 1, alpha, alpha + 5 * sigma, alpha + 30 * sigma]
        return float(mpmath.log(mpmath.quad(integrand, sorted(cuts))) / (alpha - 1))


def gaussian_power(mu: float, fpr: float) -> float:
    """Returns the exact best true-positive rate against a Gaussian with separation ``mu`` (Neyman-Pearson)."""
    with mpmath.workdps(30):
        quantile = -mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(fpr) - 1)
        return float(mpmath.ncdf(mu - quantile))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Returns the exact delta of a Gaussian mechanism with separation ``mu`` (Balle & Wang 2018, theorem 8)."""
    with mpmath.workdps(30):
        return float(mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu))


def make_plan(**changes: Any) -> Plan:
    """Returns a small valid plan, with changes."""
    fields: dict[str, Any] = {
        "sample_rate": 0.1,
        "expected_batch": 27.1828,
        "l2_clip": 0.7,
        "noise_multiplier": 1.3,
        "steps": 2,
        "rounds": 9,
        "joins": 50,
        "epsilon": 3.0,
        "delta": 1e-5,
        "records_bound": 5000,
        "mode": Mode.HOOKS,
    }
    return Plan(**fields | changes)


def make_grant(**changes: Any) -> Grant:
    """Returns a small valid grant, with changes."""
    fields: dict[str, Any] = {"epsilon": 3.0, "delta": 1e-5, "order": 8.0, "records_bound": 5000}
    return Grant(**fields | changes)


def make_request(round_number: int = 1, plan: Plan | None = None, **changes: Any) -> ChargeRequest:
    """Returns a request for one round, with changes."""
    fields: dict[str, Any] = {
        "name": ACCOUNT,
        "job": "ab" * 16,
        "round": round_number,
        "request": hashlib.sha256(b"request %d" % round_number).hexdigest(),
        "plan": plan or make_plan(),
    }
    return ChargeRequest(**fields | changes)


def open_book(folder: Path, grant: Grant | None = None, names: Sequence[str] = (ACCOUNT,), cls: type = Book) -> Book:
    """Opens a book in which every name has a grant."""
    book: Book = cls(folder)
    book.grant({name: grant or make_grant() for name in names}, population="one clinic")
    return book


def rechain(lines: Sequence[bytes], change: Callable[[dict[str, Any]], None], key: Path | None = None) -> bytes:
    """Rewrites a ledger as a forger with write access would: changes entries, then repairs every hash.

    Args:
        lines: The ledger's lines.
        change: Changes one entry in place.
        key: The holder's ``ledger.key``: with it, the forger is the holder and repairs the signatures too.
    """
    out, links, grants = b"", {}, {}
    for line in lines:
        entry = json.loads(line)
        old = {name: entry.pop(name) for name in ("hash", "sig") if name in entry}
        change(entry)
        account = str(entry["account"])
        entry["prev"] = links.get(account, "0" * 64)
        entry["hash"] = hashlib.sha256(_text(entry)).hexdigest()
        grants.setdefault(account, entry["body"])
        if entry["v"] != 1:
            signed = _signed_bytes(entry, grants[account]) if key else b""
            identity = Secret(key.read_bytes()).identity(account) if key else None
            entry["sig"] = identity.sign(signed) if identity else old["sig"]
            links[account] = hashlib.sha256(f"{entry['hash']}{entry['sig']}".encode()).hexdigest()
        else:
            links[account] = entry["hash"]
        out += _text(entry) + b"\n"
    return out


def as_version_2(lines: Sequence[bytes], key: Path) -> bytes:
    """Rewrites a ledger as version 2 of this program wrote it: a commitment without the terms that came later."""

    def older(entry: dict[str, Any]) -> None:
        entry["v"] = 2
        for name in ("code", "settings", "sampling"):
            entry["body"].pop(name, None)

    return rechain(lines, older, key)


def as_version_1(lines: Sequence[bytes]) -> bytes:
    """Rewrites a ledger as version 1 of this program wrote it: without signatures, and without what came with them."""

    def older(entry: dict[str, Any]) -> None:
        entry["v"] = 1
        for name in ("apart", "spent", "charges", "test", "code", "settings", "sampling"):
            entry["body"].pop(name, None)

    return rechain(lines, older)


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _signed_bytes(entry: dict[str, Any], grant: dict[str, Any]) -> bytes:
    """Returns what the holder signs for an entry: for a charge, its receipt."""
    if entry["kind"] not in ("charge", "participation") or not isinstance(entry["body"], dict):
        return b"tacit/entry/2\n" + entry["hash"].encode()
    body = entry["body"]
    names = ("job", "round", "request", "event", "spent", "charges", "test")
    fields = {name: body.get(name) for name in names} | {
        "account": entry["account"],
        "seq": entry["seq"],
        "head": entry["hash"],
        "granted": grant["epsilon"],
        "delta": grant["delta"],
        "public_key": grant["key"],
    }
    return b"tacit/receipt/1\n" + _text(fields)


def remark(folder: Path) -> None:
    """Writes the mark that fits a book's ledger as it is now, as a forger with write access would."""
    data = (folder / "ledger.jsonl").read_bytes()
    (folder / "ledger.mark").write_bytes(mark_of(data).ljust(4096, b"\0") * 2)
    for intent in folder.glob("ledger.intent*"):
        intent.unlink()


def mark_of(data: bytes) -> bytes:
    """Returns the slot of a mark that covers these bytes of a ledger."""
    text = b"tacit/mark/1 %020d %s " % (len(data), hashlib.sha256(data).hexdigest().encode())
    return text + hashlib.sha256(text).hexdigest().encode() + b"\n"


def charge_until_refused(folder: Path, job: str, attempts: int) -> int:
    """Charges one account again and again through a book of its own; returns how often it was admitted."""
    with Book(folder) as book:
        outcomes = [book.charge([make_request(number, job=job)])[0] for number in range(1, attempts + 1)]
    return sum(not isinstance(outcome, str) for outcome in outcomes)


def rounds_to(value: float, printed: str) -> bool:
    """Says whether a value agrees with a printed figure to all its digits, one unit in the last place allowed."""
    return math.isclose(value, float(printed), rel_tol=0, abs_tol=1.0 * 10 ** -len(printed.partition(".")[2]))

"""What a server asks of a data holder before any round: the terms of a job, and what they would cost.

A holder sees the terms before its data is touched, and accepts, refuses or withdraws. They carry a task's name and the
hash of the code that knows it, never code (guarantee G15). Once a job has begun, a round that says anything else than
its accepted terms is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self

from privacy.accounting import Event, rdp
from privacy.errors import PlanError
from privacy.ledger import Account
from privacy.plan import Local, Plan, canonical, require
from privacy.wire import settings_digest

_MOST_BYTES: Final = 32 * 1024
_MOST_TEXT: Final = 500
_HEX: Final[Mapping[str, int]] = {"job": 32, "code": 64}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """Everything that one job will ask of one holder, public in every field.

    Attributes:
        job: Random job identity, 32 hex digits, stable over resumption.
        task: Name of the task.
        code: SHA-256 of the program that both sides run, 64 hex digits; the holder must have allowed it.
        plan: What may leave, and under which protection.
        local: How the client learns.
        seed: Seed of the initial model and of its frozen parameters, in [0, 2**63).
        inputs: Public shape of a record's input.
        classes: Public number of classes, at least 2.
        clients: How many data holders the job is for, at least 1.
        curator: Who is responsible for the model, in words; may be empty.
        purpose: What it is for, in words; may be empty.

    Raises:
        PlanError: A field is out of range.
    """

    job: str
    task: str
    code: str
    plan: Plan
    local: Local
    seed: int
    inputs: tuple[int, ...]
    classes: int
    clients: int
    curator: str = ""
    purpose: str = ""

    def __post_init__(self) -> None:
        for name, digits in _HEX.items():
            value = getattr(self, name)
            require(
                isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None,
                f"expected {name} as {digits} hex digits, got {value!r:.40}",
            )
        for name in ("task", "curator", "purpose"):
            value = getattr(self, name)
            require(
                isinstance(value, str) and len(value) <= _MOST_TEXT and value.isprintable(),
                f"expected a printable {name} of at most {_MOST_TEXT} characters, got {value!r:.40}",
            )
        require(
            isinstance(self.inputs, tuple)
            and 1 <= len(self.inputs) <= 8
            and all(type(size) is int and 1 <= size <= 2**24 for size in self.inputs),
            f"expected the sizes of a record's input, got {self.inputs!r:.40}",
        )
        for name, least, most in (("seed", 0, 2**63 - 1), ("classes", 2, 2**24), ("clients", 1, 10**6)):
            value = getattr(self, name)
            require(
                type(value) is int and least <= value <= most,
                f"expected {name} to be a whole number from {least} to {most}, got {value!r:.40}",
            )

    def to_json(self) -> str:
        """Returns the canonical JSON text; `from_json` reads it back to equal terms."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        texts = {"plan": self.plan.to_json(), "local": self.local.to_json(), "inputs": list(self.inputs)}
        return canonical(fields | texts).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads terms, trusting none of it.

        Raises:
            PlanError: The text is not exactly terms.
        """
        require(len(text) <= _MOST_BYTES, f"expected terms of at most {_MOST_BYTES} bytes, got {len(text)}")
        try:
            fields: dict[str, Any] = json.loads(text)
            if set(fields) != {field.name for field in dataclasses.fields(cls)}:
                raise PlanError(f"expected exactly the fields of terms, got {sorted(fields)!r:.200}")
            # Other encodings of JSON would be second texts for the same terms.
            plain = text if isinstance(text, str) else text.decode()
            terms = cls(
                **fields
                | {
                    "plan": Plan.from_json(fields["plan"]),
                    "local": Local.from_json(fields["local"]),
                    "inputs": tuple(fields["inputs"]),
                }
            )
        except PlanError:
            raise
        except (ValueError, TypeError, RecursionError) as error:
            raise PlanError(f"expected the terms of a job, got something else ({error})") from None
        require(terms.to_json() == plain, "expected the canonical text of terms, got another")
        return terms

    def digest(self) -> str:
        """Returns the SHA-256 of the canonical text, in hex: what a session is bound to."""
        return hashlib.sha256(b"tacit/terms/1\n" + self.to_json().encode()).hexdigest()

    @property
    def settings(self) -> str:
        """The digest under which a ledger commits to what the job's requests have in common."""
        return settings_digest(self.task, self.plan.digest(), self.local.to_json(), self.seed)


class Cost(NamedTuple):
    """What a job would cost one account, by the account's own filter, at the holder's delta.

    Attributes:
        spent: Epsilon of everything charged so far.
        after: Epsilon if the job takes all its joins; what it has charged already is counted once.
        granted: The account's budget.
        delta: The holder's delta.
        affordable: Whether the whole job fits.
    """

    spent: float
    after: float
    granted: float
    delta: float
    affordable: bool


def cost_of(terms: Terms, account: Account) -> Cost:
    """Returns what all of a job would cost an account.

    Raises:
        PlanError: The job protects another unit, or counts by another adjacency, than the account's budget.
    """
    grant, plan = account.grant, terms.plan
    require(
        (plan.unit, plan.adjacency) == (grant.unit, grant.adjacency),
        f"expected a job that protects what the budget is for ({grant.unit}, {grant.adjacency}), got one for "
        f"({plan.unit}, {plan.adjacency}); it will be declined",
    )
    state = account.jobs.get(terms.job)
    left = max(0, plan.joins - (state.charges if state is not None else 0))
    whole = Event.all_of_schedule(plan, left) if left else ()
    after = grant.epsilon_of(account.spent_rdp + rdp(whole, grant.order))
    return Cost(account.spent, after, grant.epsilon, grant.delta, grant.affords(account.spent_rdp, whole))

"""Which jobs a data holder takes part in: decided before its data is touched, by hand or by a standing policy.

    jobs/JOB.json   the terms as the server's identity signed them, and the holder's decision; one file for each job
    policy.json     what may be accepted without asking; by default nothing

A decision can be taken back at any time: the next round is then refused. What was released before stays released, and
its charge stays spent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from privacy.errors import PlanError, RunError, VaultError
from privacy.files import write_whole
from privacy.ledger import Account
from privacy.plan import Metric, Unit, canonical, is_number, require
from privacy.terms import Cost, Terms, cost_of
from privacy.vault import private
from privacy.vault.shelf import Shelf

# What a job is sealed for on a shelf, and what stands there once all of them do.
_PURPOSE: Final = "job"
_TAKEN: Final = "taken-in"
_JOB: Final = re.compile(r"[0-9a-f]{32}")
# A server that could make the holder's disk fill up with offers would stop it. What a person decided does not count,
# nor what was charged for; what a policy accepted does, or an accepted task would be a way around the bound.
_MOST_OPEN: Final = 100
_HAND: Final = "hand"


class Decision(StrEnum):
    """What a holder said about a job."""

    WAITING = "waiting"
    APPROVED = "approved"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What a holder accepts without being asked; whatever it does not cover waits for a person.

    The ledger's budget holds in any case: an approved job that it cannot pay is declined all the same.

    Attributes:
        tasks: Names of tasks that may be accepted; none by default.
        epsilon: Most that one job may cost by the holder's own filter, counted alone; 0 accepts none.
        metrics: Metrics of its own records that a job may ask for.
        central: Whether a job may protect clients instead of records, which trusts the server (guarantee G16).

    Raises:
        PlanError: A field is out of range.
    """

    tasks: frozenset[str] = frozenset()
    epsilon: float = 0.0
    metrics: frozenset[Metric] = frozenset()
    central: bool = False

    def __post_init__(self) -> None:
        require(
            is_number(self.epsilon) and self.epsilon >= 0,
            f"expected a finite epsilon >= 0 in the policy, got {self.epsilon!r:.40}",
        )

    def to_json(self) -> bytes:
        """Returns the file's content."""
        fields = {"tasks": sorted(self.tasks), "metrics": sorted(self.metrics)}
        return canonical(dataclasses.asdict(self) | fields)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a policy; the default one where there is no file.

        Raises:
            PlanError: The file holds something else; nothing is accepted by a policy that cannot be read.
        """
        try:
            fields: dict[str, Any] = json.loads(path.read_bytes())
            tasks, metrics = fields["tasks"], fields["metrics"]
            # A text is a sequence of letters too, and none of them is a task.
            lists = isinstance(tasks, list) and isinstance(metrics, list) and all(isinstance(n, str) for n in tasks)
            if not lists or type(fields["central"]) is not bool:
                raise TypeError("fields of other types")
            words = frozenset(Metric(word) for word in metrics)
            return cls(**fields | {"tasks": frozenset(tasks), "metrics": words})
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, RecursionError, PlanError) as error:
            raise PlanError(f"expected a policy in {path}, got something else ({error}); write it again") from None

    def covers(self, terms: Terms, account: Account) -> bool:
        """Says whether a job is accepted without asking."""
        words = frozenset(terms.plan.metrics.words) if terms.plan.metrics is not None else frozenset()
        try:
            cost = cost_of(terms, account)
        except PlanError:
            return False
        # All of the job: what it has charged already is part of what it costs.
        alone = cost_of(terms, dataclasses.replace(account, spent_rdp=0.0, jobs={})).after
        return (
            terms.task in self.tasks
            and 0 < self.epsilon
            and alone <= self.epsilon
            and cost.affordable
            and words <= self.metrics
            and (terms.plan.unit is Unit.RECORD or self.central)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One job that was offered.

    Attributes:
        terms: What it asks.
        decision: What the holder said.
        by: Who said it: "policy", "hand", or nobody yet.
        time: When, in seconds since 1970 by the holder's clock.
    """

    terms: Terms
    decision: Decision
    by: str
    time: int

    def cost(self, account: Account) -> Cost:
        """Returns what the whole job would cost; raises as `cost_of`."""
        return cost_of(self.terms, account)


class Jobs:
    """The jobs of one holder, in a folder; several processes may use it.

    With a keyring in the folder (`privacy.vault.private`) they stand on a shelf (`privacy.vault.shelf`): sealed, and a
    decision that was put back to an older one, or exchanged with another job's, is refused. The whole folder put back
    is noticed by a process that had it open, and by no other one.

    Guarantees:
        Kept: each write replaces one whole file, and no two processes decide at once, so that no decision of a person
            is lost to one of the policy.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the folder, which is made when the first job is offered.

        Raises:
            VaultError: Its keyring does not open, or its shelf was altered or put back.
        """
        self._folder = folder
        ring = private.ring_beside(folder / "job")
        if ring is None and any(folder.glob("*.sealed")):
            # Without it the folder would count as one in clear, and what a person decided as never said.
            raise VaultError(
                f"expected {private.RING} in {folder}, which opens the decisions there, got none; restore it from a "
                "backup, with its links"
            )
        self._shelf = Shelf(folder, [ring]) if ring is not None else None

    def take_in(self) -> None:
        """Puts on the shelf what an older Tacit left in clear, once: from then on a job in clear is none of ours.

        Raises:
            RunError, VaultError: One is damaged, or the folder cannot be written; it goes on where it stopped.
        """
        if self._shelf is None or _TAKEN in self._shelf.names():
            return
        with self._alone():
            for path in sorted(self._folder.glob("*.json")):
                if _JOB.fullmatch(path.stem) and (job := self.get(path.stem)) is not None:
                    self._put(job)
                    path.unlink()
            self._shelf.put(_TAKEN, b"", purpose=_TAKEN)

    def _content(self, job: str) -> bytes:
        """Returns a job's file; raises FileNotFoundError where there is none, VaultError where it is not the newest."""
        path, known = self._path(job), self._shelf.names() if self._shelf is not None else []
        if self._shelf is not None and job in known:
            return bytes(self._shelf.read(job, purpose=_PURPOSE))
        if _TAKEN in known:
            raise FileNotFoundError(path)
        return path.read_bytes()

    def _path(self, job: str) -> Path:
        require(_JOB.fullmatch(job) is not None, f"expected a job identity of 32 hex digits, got {job!r:.40}")
        return self._folder / f"{job}.json"

    def get(self, job: str) -> Job | None:
        """Returns a job, or None if it was never offered.

        Raises:
            RunError: Its file is damaged.
        """
        path = self._path(job)
        try:
            fields = json.loads(self._content(job))
            terms = Terms.from_json(fields["terms"])
            if terms.job != job:
                raise ValueError("the file of another job")
            return Job(
                terms=terms,
                decision=Decision(fields["decision"]),
                by=str(fields["by"]),
                time=int(fields["time"]),
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, PlanError, VaultError) as error:
            raise RunError(f"expected a job in {path}, got something else ({error}); restore a backup") from None

    def names(self) -> list[str]:
        """Returns the identities of all jobs that were offered, whether their files are whole or not."""
        known = self._shelf.names() if self._shelf is not None else []
        clear = [] if _TAKEN in known else [path.stem for path in self._folder.glob("*.json")]
        return sorted({name for name in (*known, *clear) if _JOB.fullmatch(name)})

    def __iter__(self) -> Iterator[Job]:
        """Yields all jobs, the newest decision last.

        Raises:
            RunError: A file is damaged.
        """
        found = [self.get(name) for name in self.names()]
        yield from sorted((job for job in found if job is not None), key=lambda job: (job.time, job.terms.job))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes from deciding meanwhile."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _open(self, account: Account) -> int:
        """Returns how many offers nobody decided about and nothing was charged for; a damaged file is one."""
        count = 0
        for name in self.names():
            try:
                job = self.get(name)
            except RunError:
                count += 1
                continue
            count += job is not None and job.by != _HAND and name not in account.jobs
        return count

    def _put(self, job: Job) -> Job:
        fields = {"terms": job.terms.to_json(), "decision": job.decision.value, "by": job.by, "time": job.time}
        if self._shelf is not None:
            self._shelf.put(job.terms.job, canonical(fields), purpose=_PURPOSE)
        else:
            write_whole(self._path(job.terms.job), canonical(fields))
        return job

    def offer(self, terms: Terms, account: Account, policy: Policy) -> Job:
        """Notes what a server asks, and decides by policy where it covers the job; a decision that was made stands.

        Raises:
            PlanError: The same job was offered before on other terms, or too many offers wait.
        """
        covered = policy.covers(terms, account)
        with self._alone():
            known = self.get(terms.job)
            if known is not None and known.terms != terms:
                raise PlanError("expected the terms on which this job was offered first, got others")
            if known is not None and (known.decision is not Decision.WAITING or not covered):
                return known
            waiting = self._open(account) if known is None else 0
            require(waiting < _MOST_OPEN, f"expected fewer than {_MOST_OPEN} open offers, got one more; decide them")
            decision, by = (Decision.APPROVED, "policy") if covered else (Decision.WAITING, "")
            return self._put(Job(terms=terms, decision=decision, by=by, time=int(time.time())))

    def decide(self, job: str, decision: Decision) -> Job:
        """Writes down what a person decided.

        Raises:
            PlanError: The job was never offered.
        """
        with self._alone():
            known = self.get(job)
            if known is None:
                raise PlanError(f"expected a job that was offered here, got {job}; list them with: tacit client jobs")
            if decision is Decision.REFUSED and known.decision in (Decision.APPROVED, Decision.WITHDRAWN):
                decision = Decision.WITHDRAWN
            return self._put(dataclasses.replace(known, decision=decision, by=_HAND, time=int(time.time())))

"""Whether Flower's processes run apart from what a data holder keeps secret (guarantee G15).

Flower's SuperNode and the courier are software that talks to the outside. Where they run under the user who owns data,
vault, ledger and keys, that user's files are theirs to read, and the guarantee depends on them. Nothing here makes them
run apart: it looks who they are, and says so.

What is looked at, on this machine alone:

    the courier     the kernel tells the worker the user of whoever calls at its socket; the worker writes that down
    the SuperNode   the user of the socket that listens at its port, as the kernel lists it
    both            the users of the processes that ``tacit client start`` runs

and for each of these users, whether modes of files and folders let it read what is secret. Where one of them is not
seen, as with a SuperNode in another container, the answer is "unknown" and not "apart".
"""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

from clients.home import ClientHome
from clients.post import Buffer, Letter
from privacy.errors import TacitError
from privacy.files import write_whole
from privacy.plan import canonical
from privacy.processes import read_status
from privacy.vault import private_logger

# Under the home; the worker writes it, in a folder that no other user can enter.
NOTE: Final = Path("run", "worker.json")
_FIX: Final = (
    "to try it out, leave it so: then the guarantee depends on Flower's processes; for records that matter, give each "
    "process a user of its own: tacit client units, and docs/deploy.md"
)
_log: Final = private_logger("tacit.client")


class Apart(StrEnum):
    """Whether Flower's processes run apart from the data."""

    YES = "apart"
    NO = "not apart"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Isolation:
    """What was found.

    Attributes:
        apart: The verdict.
        words: One line for people.
        fix: What to do about it; empty where nothing is to be done.
    """

    apart: Apart
    words: str
    fix: str = ""


@dataclasses.dataclass
class WorkerNote:
    """What a worker says of itself to other processes of its own user; nothing here leaves the machine.

    Attributes:
        pid: Its process.
        began: When that process began, in the kernel's ticks since boot, so that another of the same number is not it.
        since: When it was ready, seconds since 1970.
        callers: Users that called at its socket.
        rounds: How many rounds it has answered.
        busy: Whether it is at a message.
        last_error: Kind of the last thing that went wrong, or empty.
    """

    pid: int
    began: int
    since: int
    callers: list[int] = dataclasses.field(default_factory=list)
    rounds: int = 0
    busy: bool = False
    last_error: str = ""


class Worker(Protocol):
    """What is noted of a worker; see `clients.worker.Worker`."""

    rounds: int
    last_error: str

    def answer(self, letter: Letter) -> Mapping[str, Buffer]:
        """Answers one letter."""


class Noted:
    """Keeps a worker's note up to date while it runs; a note that cannot be written stops nothing."""

    def __init__(self, home: ClientHome) -> None:
        """Writes the first note."""
        self._path, self._owner = home.folder / NOTE, home.folder.stat().st_uid
        pid = os.getpid()
        self.note = WorkerNote(pid=pid, began=_began(pid), since=int(time.time()))
        self._tell()

    def called(self, user: int) -> None:
        """Takes down a caller; the first time that one is the owner of the data, the holder's log says so too."""
        if user in self.note.callers:
            return
        self.note.callers.append(user)
        if user in (self._owner, 0):
            _log.warning(
                "the courier runs under %s, who can read the data: the guarantee depends on Flower's processes",
                _named(user),
            )
        self._tell()

    def worked(self, *, rounds: int, busy: bool, last_error: str) -> None:
        """Takes down how far the worker is."""
        self.note.rounds, self.note.busy, self.note.last_error = rounds, busy, last_error
        self._tell()

    def around(self, worker: Worker) -> Callable[[Letter], Mapping[str, Buffer]]:
        """Returns what answers letters as a worker does, and takes down before and after that it does."""

        def answer(letter: Letter) -> Mapping[str, Buffer]:
            self.worked(rounds=worker.rounds, busy=True, last_error=worker.last_error)
            try:
                return worker.answer(letter)
            finally:
                self.worked(rounds=worker.rounds, busy=False, last_error=worker.last_error)

        return answer

    def close(self) -> None:
        """Takes the note away: the worker has ended."""
        self._path.unlink(missing_ok=True)

    def _tell(self) -> None:
        try:
            write_whole(self._path, canonical(dataclasses.asdict(self.note)), durable=False)
        except TacitError:
            _log.warning("the worker's note could not be written")


def read_note(home: ClientHome) -> WorkerNote | None:
    """Returns what the worker of a home says, or None where none runs or it cannot be read."""
    try:
        note = WorkerNote(**json.loads((home.folder / NOTE).read_bytes()))
        return note if note.began and note.began == _began(note.pid) else None
    except (OSError, ValueError, TypeError):
        return None


def _began(pid: int) -> int:
    """Returns when a process began, in ticks since boot, or 0 where there is none."""
    try:
        # The name in parentheses may hold spaces; the 20th field after it is the start.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def look(home: ClientHome, *, processes: Mapping[str, int] | None = None) -> Isolation:
    """Looks under which users Flower's processes of a home run, and what those can read.

    Args:
        home: Of a client that has joined.
        processes: Users of the courier and the SuperNode, by these names, as far as they are known otherwise; None
            looks for them.

    Raises:
        IdentityError: The client has not joined.
    """
    settings, note = home.settings, read_note(home)
    owner = home.folder.stat().st_uid
    seen = _running(home) if processes is None else dict(processes)
    users = {(name, user) for name, user in seen.items()}
    if note is not None:
        users |= {("courier", user) for user in note.callers}
    if same := sorted({name for name, user in users if user in (owner, 0)}):
        who = (
            _named(owner) + ", who owns the data" if any(user == owner for _, user in users) else "root, who reads all"
        )
        return Isolation(Apart.NO, f"{' and '.join(same)} run under {who}: not apart", _FIX)
    secret = [home.folder, home.folder / "keys" / "application.key", Path(settings.ledger)]
    secret += [Path(settings.data)] if settings.data else []
    for _, user in sorted(users):
        if open_ := [str(path) for path in secret if may_read(path, user)]:
            words = f"{_named(user)}, under whom Flower's processes run, may read {', '.join(open_)}: not apart"
            return Isolation(Apart.NO, words, f"chmod go-rwx {' '.join(open_)}; and look into groups and ACLs")
    missing = sorted({"courier", "supernode"} - {name for name, _ in users})
    if missing:
        words = f"not known: no {' and no '.join(missing)} was seen"
        words += (
            "; they may be in another container" if note is not None else "; tacit client start runs all under one user"
        )
        return Isolation(Apart.UNKNOWN, words, f"look again while a job runs; {_FIX}")
    names = ", ".join(sorted({_named(user) for _, user in users}))
    return Isolation(Apart.YES, f"courier and SuperNode run under {names}, who can read nothing of {_named(owner)}'s")


def _running(home: ClientHome) -> dict[str, int]:
    """Returns the users of the courier and the SuperNode, as far as they are found."""
    found: dict[str, int] = {}
    try:
        status = read_status(home.folder / "run" / "status.json")
        parts = status["parts"] if status is not None else {}
        for name in ("courier", "supernode"):
            if isinstance(parts, dict) and name in parts:
                found[name] = Path(f"/proc/{int(parts[name]['pid'])}").stat().st_uid
    except (TacitError, OSError, KeyError, ValueError):
        pass
    try:
        runtime = int((home.folder / "run" / "ports").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return found
    user = listener_of(runtime)
    return found if user is None else found | {"supernode": user}


def listener_of(port: int, tables: Iterable[str] = ("/proc/net/tcp", "/proc/net/tcp6")) -> int | None:
    """Returns the user of the socket that listens at a port of this machine, or None where there is none."""
    for table in tables:
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            # Local address, state (0A listens), user.
            if len(fields) > 7 and fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                return int(fields[7])
    return None


def may_read(path: Path, user: int) -> bool:
    """Says whether modes let a user read a file, or enter or list a folder.

    Errs to yes: where a file has an access list, or the user's groups are not known, what a group may is what it may.
    """
    try:
        path = path.resolve(strict=True)
    except OSError:
        return False
    if user == 0:
        return True
    groups = _groups(user)
    # Whoever cannot pass a folder on the way reads nothing behind it.
    if not all(_allows(folder.stat(), folder, user, groups, 0o1) for folder in path.parents):
        return False
    status = path.stat()
    wanted = 0o5 if stat.S_ISDIR(status.st_mode) else 0o4
    return _allows(status, path, user, groups, wanted)


def _allows(status: os.stat_result, path: Path, user: int, groups: frozenset[int] | None, wanted: int) -> bool:
    """Says whether a mode grants a user any of the wanted bits."""
    if status.st_uid == user:
        return bool(status.st_mode >> 6 & wanted)
    bits = status.st_mode & 0o7
    if groups is None or status.st_gid in groups or _has_list(path):
        bits |= status.st_mode >> 3 & 0o7
    return bool(bits & wanted)


def _has_list(path: Path) -> bool:
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


def _groups(user: int) -> frozenset[int] | None:
    try:
        known = pwd.getpwuid(user)
        return frozenset(os.getgrouplist(known.pw_name, known.pw_gid))
    except (KeyError, OSError):
        return None


def _named(user: int, lookup: Callable[[int], pwd.struct_passwd] = pwd.getpwuid) -> str:
    try:
        return lookup(user).pw_name
    except KeyError:
        return f"user {user}"

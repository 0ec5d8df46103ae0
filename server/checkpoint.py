"""Checkpoints of the server: everything needed to send the next round's requests again, byte for byte.

One file per checkpoint, written whole or not at all: a line of JSON, then raw little-endian float32 arrays. Nothing in
it is ever unpickled. A model is post-processing of releases that were paid for, so a checkpoint is not a new release.
On request the file is sealed for a keyring (`privacy.vault.container`); then the line and the arrays are its content,
and its header counts how often the job was stored. A `Newest` remembers that count apart from the run folder, so that
an older checkpoint put back in the newest one's place is refused. Both of them put back together are not noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from privacy.errors import RunError, VaultError
from privacy.files import write_whole
from privacy.plan import canonical
from privacy.vault.container import Header, Reader, Wanted, is_sealed, write_file
from privacy.vault.keys import Keyring, Opener
from privacy.vault.shelf import Shelf
from privacy.vault.unlock import openers_from
from privacy.wire import model_digest
from server.aggregate import Arrays

_MAGIC: Final = b"tacit/checkpoint/1\n"
_NEWEST: Final = "newest"


@dataclasses.dataclass
class Rows:
    """Which drawing of banded noise a job's rounds belong to, and how far it is; the noise itself lies elsewhere.

    Attributes:
        identity: Of the drawing, 32 hex digits.
        dealt: All nodes, in the order in which they were dealt into classes; once for the whole job.
        row: Rows released when this was written.
        digest: SHA-256 of the noise state after them.
    """

    identity: str
    dealt: list[int]
    row: int
    digest: str


@dataclasses.dataclass
class Central:
    """What the server remembers where a plan protects clients: its coins, and a round that is noised but not told yet.

    Attributes:
        clip: The next round's clip, > 0.
        round: Round that ``cohort`` was drawn for; 0 before the first.
        cohort: Nodes whose coin counted in that round, stored before the first of them is asked.
        counted: Per node, in how many rounds its coin counted.
        pending: The line and the receipts of a round whose noised model is in the state already, until they are
            written; None between rounds.
        rows: Only with banded noise.
    """

    clip: float
    round: int = 0
    cohort: list[int] = dataclasses.field(default_factory=list)
    counted: dict[int, int] = dataclasses.field(default_factory=dict)
    pending: dict[str, Any] | None = None
    rows: Rows | None = None


@final
class Newest:
    """Remembers how often a job was stored, on a shelf that lies apart from its run folder.

    A killed `save` leaves a checkpoint that is one newer than what is remembered, never one that is older.
    """

    def __init__(self, folder: Path, ring: Keyring, job: str) -> None:
        """Opens the shelf, or begins it.

        Args:
            folder: The shelf, for all jobs of a server.
            ring: What it is sealed for.
            job: Job identity.

        Raises:
            VaultError: Something of it was altered, exchanged or put back, or does not open.
        """
        self._shelf, self._job = Shelf(folder, [ring]), job

    @property
    def generation(self) -> int:
        """The newest that was stored; 0 where there is none yet. Raises VaultError as the constructor."""
        if self._job not in self._shelf.names():
            return 0
        return int.from_bytes(self._shelf.read(self._job, purpose=_NEWEST), "big")

    def keep(self, generation: int) -> None:
        """Remembers, on disk before it returns; raises VaultError where it cannot be written."""
        self._shelf.put(self._job, generation.to_bytes(8, "big"), purpose=_NEWEST)


@dataclasses.dataclass
class State:
    """Where a job stands after a round.

    Attributes:
        job: Job identity.
        round: Last finished round; 0 before the first.
        model: Trainable parameters by name.
        moments: The aggregator's state.
        updates: Rounds that changed the model.
        witnesses: Per node, sequence number and hash of its last receipt, as ``"number:hash"``.
        identities: Per node, account and public key of its first receipt, as ``"account:key"``; they may not change.
        declined: Nodes that declined for good; they are not asked again.
        spent: Per account, what its last receipt says.
        lines: Number of finished lines in the metrics and receipts files.
        central: Only where the plan protects clients.
        vault: Seals what is stored of it; None leaves that in clear. Never stored.
        newest: Remembers each sealed checkpoint; None where nobody does. Never stored.
        generation: How often the job was stored sealed; stands in the sealed file's header only.
    """

    job: str
    round: int
    model: Arrays
    moments: dict[str, Arrays] = dataclasses.field(default_factory=dict)
    updates: int = 0
    witnesses: dict[int, str] = dataclasses.field(default_factory=dict)
    identities: dict[int, str] = dataclasses.field(default_factory=dict)
    declined: list[int] = dataclasses.field(default_factory=list)
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    lines: dict[str, int] = dataclasses.field(default_factory=dict)
    central: Central | None = None
    vault: Keyring | None = dataclasses.field(default=None, repr=False, compare=False)
    newest: Newest | None = dataclasses.field(default=None, repr=False, compare=False)
    generation: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of the trained numbers with their names and shapes, in hex: a report names its model by it."""
        return model_digest(
            (name, "float32", tuple(value.shape), np.ascontiguousarray(value, dtype="<f4").tobytes())
            for name, value in sorted(self.model.items())
        )


def save(state: State, path: Path) -> None:
    """Writes a checkpoint atomically and durably.

    Args:
        state: What to write, sealed for its vault where it has one.
        path: Where.

    Raises:
        RunError: The disk is full or the folder cannot be written; the checkpoint before stays.
        VaultError: The same, of a sealed one.
    """
    groups = {"model": state.model} | {f"moments/{name}": arrays for name, arrays in state.moments.items()}
    layout = [[group, name, list(value.shape)] for group, arrays in groups.items() for name, value in arrays.items()]
    body = b"".join(
        np.ascontiguousarray(value, dtype="<f4").tobytes() for arrays in groups.values() for value in arrays.values()
    )
    header = {
        "job": state.job,
        "round": state.round,
        "updates": state.updates,
        "witnesses": {str(node): witness for node, witness in state.witnesses.items()},
        "identities": {str(node): identity for node, identity in state.identities.items()},
        "declined": sorted(state.declined),
        "spent": state.spent,
        "lines": state.lines,
        "layout": layout,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    if state.central is not None:
        central = dataclasses.asdict(state.central) | {
            "counted": {str(node): count for node, count in state.central.counted.items()}
        }
        # Without rows it is as it always was: a program that knows of none goes on with it.
        header["central"] = {name: value for name, value in central.items() if name != "rows" or value is not None}
    if state.vault is None:
        write_whole(path, _MAGIC, canonical(header), b"\n", body)
        return
    state.generation += 1
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    sealed = Header(purpose="checkpoint", object=_object_of(state.job), generation=state.generation)
    write_file(path, sealed, [state.vault], _MAGIC, canonical(header), b"\n", body, replace=True)
    if state.newest is not None:
        state.newest.keep(state.generation)


def load(path: Path, keys: Sequence[Opener] = (), newest: Newest | None = None) -> State:
    """Reads a checkpoint.

    Args:
        path: Where; sealed or not.
        keys: What opens it, which then must be sealed; by default a sealed one is opened with what the environment
            names (`privacy.vault.unlock`).
        newest: What remembers the job's newest one; an older one is refused.

    Raises:
        RunError: There is none, or it is damaged.
        VaultError: It is sealed, and does not open, or is not the newest; or it is not, and keys are given.
    """
    least = newest.generation if newest is not None else 0
    generation, named = 0, ""
    if is_sealed(path):
        with Reader(path, keys or openers_from(None), Wanted(purpose="checkpoint", at_least=least)) as reader:
            content: bytes = bytes(reader.read())
            generation, named = reader.header.generation, reader.header.object
    elif keys and path.exists():
        # Whoever has no key could otherwise put a model of his own in its place.
        raise VaultError(f"expected a sealed checkpoint at {path}, got one in clear; resume it with --vault ''")
    else:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunError(f"expected a checkpoint at {path}, got {error.strerror}; is it a run folder?") from None
    header, _, body = content.removeprefix(_MAGIC).partition(b"\n")
    try:
        fields: dict[str, Any] = json.loads(header)
        if not content.startswith(_MAGIC) or hashlib.sha256(body).hexdigest() != fields["sha256"]:
            raise ValueError("bytes do not match their hash")
        if named and named != _object_of(fields["job"]):
            raise ValueError("sealed as another job's")
        groups: dict[str, Arrays] = {}
        start = 0
        for group, name, shape in fields["layout"]:
            count = int(np.prod(shape, dtype=np.int64))
            value = np.frombuffer(body, dtype="<f4", count=count, offset=start).reshape(shape)
            groups.setdefault(group, {})[name] = value.astype(np.float32)
            start += 4 * count
        return State(
            job=fields["job"],
            round=fields["round"],
            model=groups["model"],
            moments={name.removeprefix("moments/"): arrays for name, arrays in groups.items() if name != "model"},
            updates=fields["updates"],
            witnesses={int(node): witness for node, witness in fields["witnesses"].items()},
            identities={int(node): identity for node, identity in fields["identities"].items()},
            declined=fields["declined"],
            spent=fields["spent"],
            lines=fields["lines"],
            central=_central(fields["central"]) if "central" in fields else None,
            generation=generation,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"expected a whole checkpoint at {path}, got a damaged one ({error}); restore a backup"
        ) from None


def _object_of(job: str) -> str:
    """A job's object in sealed files: no other job's checkpoint can take its place."""
    return hashlib.sha256(f"tacit/checkpoint/1/{job}".encode()).hexdigest()[:32]


def _central(fields: dict[str, Any]) -> Central:
    rows = Rows(**fields["rows"]) if "rows" in fields else None
    counted = {int(node): count for node, count in fields["counted"].items()}
    memory = Central(**fields | {"counted": counted, "rows": rows})
    counts = [memory.round, *memory.cohort, *memory.counted.values()]
    if rows is not None:
        counts += [rows.row, *rows.dealt]
        if type(rows.identity) is not str or type(rows.digest) is not str:
            raise TypeError("rows of another type")
    if type(memory.clip) is not float or any(type(count) is not int for count in counts):
        raise TypeError("coins of another type")
    return memory

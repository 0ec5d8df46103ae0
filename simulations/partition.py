"""How one data set becomes many clients: partitions of real records, and virtual clients made on demand.

Only a simulation splits data; a real data holder has its own. Everything here is exact and seeded: it belongs
to the parts of a report that are marked "simulation only" (guarantee G12).
"""

from __future__ import annotations

import dataclasses
import math
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.data import Records, Source
from models.task import Shape, Task
from privacy.errors import DataError, PlanError

# More than any population needs apart, and small enough that seed * _STRIDE + client fits torch's 64-bit
# seeds.
_STRIDE = 2**31


class Split(StrEnum):
    """How records are dealt to clients."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    QUANTITY = "quantity"
    NATURAL = "natural"


class Population(Protocol):
    """The clients of a simulation: their number, and each one's records when it is asked for them."""

    @property
    def shape(self) -> Shape:
        """Public shape of every record."""

    @property
    def clients(self) -> int:
        """Number of clients, at least 1."""

    def records_of(self, client: int) -> Records:
        """Returns the records of one client in ``[0, clients)``; the same ones every time."""


@dataclasses.dataclass(frozen=True, eq=False)
class SplitPopulation:
    """Clients that share out one source's training records.

    Attributes:
        source: Where the records come from.
        parts: Each client's indices into ``source.train``, from `split`.
    """

    source: Source = dataclasses.field(repr=False)
    parts: list[Tensor] = dataclasses.field(repr=False)

    @property
    def shape(self) -> Shape:
        """Public shape of every record."""
        return self.source.shape

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.parts)

    def records_of(self, client: int) -> Records:
        """Returns a copy of one client's records."""
        return self.source.train.take(self.parts[client])


@dataclasses.dataclass(frozen=True, kw_only=True)
class VirtualPopulation:
    """Clients whose synthetic records are made when asked for, so memory does not grow with their number.

    Attributes:
        task: Whose ``synthetic`` makes the records.
        shape: Public shape of every record.
        clients: Number of clients, at least 1.
        records: Records of each client, at least 1.
        seed: Public seed; client i's records depend on ``(seed, i)`` only.

    Raises:
        PlanError: A number is out of range.
    """

    task: Task
    shape: Shape
    clients: int
    records: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("clients", self.clients, 1, _STRIDE),
            ("records", self.records, 1, _STRIDE),
            ("seed", self.seed, 0, _STRIDE),
        ):
            if not least <= value < most:
                raise PlanError(f"expected {least} <= {name} < {most} for a virtual population, got {value}")

    def records_of(self, client: int) -> Records:
        """Returns one client's records, made afresh from its seed."""
        generator = torch.Generator().manual_seed(self.seed * _STRIDE + client)
        inputs, targets = self.task.synthetic(self.shape, self.records, generator)
        return Records(inputs, targets, torch.ones(self.records, dtype=torch.bool))


def split(kind: Split, targets: Tensor, keys: Tensor | None, *, clients: int, seed: int, alpha: float) -> list[Tensor]:
    """Deals every record to exactly one client.

    Guarantees:
        Exact: the parts are disjoint and cover all records, and no part is empty.
        Seeded: equal arguments give equal parts.
        Even: with ``Split.IID`` the sizes differ by at most one.

    Args:
        kind: IID; DIRICHLET, where each class is shared out by proportions from Dirichlet(alpha); QUANTITY,
            where IID records are dealt in sizes proportional to a draw from Dirichlet(alpha); NATURAL, one
            client a key.
        targets: Class of each record, shape ``(N,)``, int64; of sequences, shape ``(N, L)``, which DIRICHLET refuses.
        keys: Natural key of each record, shape ``(N,)``, int64; needed for NATURAL only. Client i holds the
            i-th smallest key.
        clients: Number of clients, 1 <= clients <= N.
        seed: Seed >= 0 of a NumPy PCG64 generator.
        alpha: Concentration > 0 of the Dirichlet draws; smaller is more uneven. A client whom a draw leaves
            without records gets one from the largest client.

    Returns:
        One index tensor a client, int64, each in increasing order.

    Raises:
        PlanError: ``clients``, ``seed`` or ``alpha`` is out of range, or ``clients`` is not the number of
            keys.
        DataError: Fewer records than clients, or a natural partition of a source without keys.

    References:
        `Hsu et al. (2019) <https://arxiv.org/abs/1909.06335>`_, Dirichlet label skew.
    """
    count = len(targets)
    if clients < 1:
        raise PlanError(f"expected clients >= 1, got {clients}")
    if seed < 0:
        raise PlanError(f"expected a partition seed >= 0, got {seed}")
    if kind in (Split.DIRICHLET, Split.QUANTITY) and not (math.isfinite(alpha) and alpha > 0):
        raise PlanError(f"expected a finite alpha > 0 for partition {kind}, got {alpha}")
    if kind is Split.NATURAL:
        return _natural(keys, clients)
    if kind is Split.DIRICHLET and targets.dim() > 1:
        raise PlanError(
            "expected one class a record for partition dirichlet, got records with many; use quantity or iid"
        )
    if count < clients:
        raise DataError(
            f"expected at least one record for each of {clients} clients, got {count} records, so client "
            f"{count} "
            f"would be empty; use clients={count} or fewer"
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    match kind:
        case Split.IID:
            owner = generator.permutation(np.arange(count) % clients)
        case Split.QUANTITY:
            shares = generator.dirichlet(np.full(clients, alpha))
            # One each first, so that the smallest share still makes a client.
            sizes = 1 + _apportion(shares, count - clients)
            owner = generator.permutation(np.repeat(np.arange(clients), sizes))
        case Split.DIRICHLET:
            owner = np.empty(count, dtype=np.int64)
            for label in np.unique(targets.numpy()):
                members = generator.permutation(np.flatnonzero(targets.numpy() == label))
                sizes = _apportion(generator.dirichlet(np.full(clients, alpha)), len(members))
                owner[members] = np.repeat(np.arange(clients), sizes)
            _fill_empty(owner, clients)
    return _parts(owner, clients)


def label_table(parts: list[Tensor], targets: Tensor, classes: int) -> list[list[int]]:
    """Counts every client's records by class, for the pictures of a partition ("simulation only").

    Args:
        parts: Indices of each client, from `split`.
        targets: Class of each record, shape ``(N,)``, in ``[0, classes)``.
        classes: Number of classes.

    Returns:
        ``clients`` rows of ``classes`` counts.
    """
    return [torch.bincount(targets[part], minlength=classes).tolist() for part in parts]


def _natural(keys: Tensor | None, clients: int) -> list[Tensor]:
    """One client a key, in the order of the keys."""
    if keys is None:
        raise DataError(
            "expected records with a natural key for partition natural, got a source without one; name a "
            "client "
            "column in the schema, give one file a client, or choose partition iid, dirichlet or quantity"
        )
    found, owner = np.unique(keys.numpy(), return_inverse=True)
    if len(found) != clients:
        raise PlanError(
            f"expected clients={len(found)} for partition natural, one for each key in the data, got "
            f"{clients}; "
            f"set clients={len(found)}"
        )
    return _parts(owner, clients)


def _apportion(shares: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Whole numbers proportional to shares that sum to total, by largest remainder."""
    exact = shares / shares.sum() * total
    sizes: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    rest = total - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:rest]] += 1
    return sizes


def _fill_empty(owner: npt.NDArray[np.int64], clients: int) -> None:
    """Moves one record from the largest client to each client that has none."""
    sizes = np.bincount(owner, minlength=clients)
    for client in np.flatnonzero(sizes == 0):
        largest = int(sizes.argmax())
        owner[np.flatnonzero(owner == largest)[-1]] = client
        sizes[largest] -= 1
        sizes[client] = 1


def _parts(owner: npt.NDArray[np.int64], clients: int) -> list[Tensor]:
    """Each client's record indices in increasing order, in one pass over the records."""
    order = np.argsort(owner, kind="stable")
    edges = np.cumsum(np.bincount(owner, minlength=clients))[:-1]
    return [torch.from_numpy(part) for part in np.split(order, edges)]

"""Correlated noise: one matrix mechanism over all rounds of a job, for participation that cannot be sampled.

A job publishes a noised sum in every round, and what matters is the error of the *running* sum, which is the model.
Write C for a lower-triangular n x n matrix and z for independent Gaussian rows. In round t the release is

    x_t + (C^-1 z)_t        x_t: the round's sum of contributions, each of L2 norm at most the clip

which is post-processing of C x + z. So all rounds together are *one* Gaussian mechanism whose sensitivity is the most
that one client can move C x, in all the rounds that it takes part in. Successive noises are negatively correlated:
in the running sum they largely cancel, and no secret sampling is needed for it. The releases may depend on each other
(Denisov et al. 2022, theorem 2.1: Gaussian noise and a lower-triangular C make adaptivity free).

C is banded and Toeplitz: column i holds the coefficients c_0 = 1 >= c_1 >= ... >= c_(b-1) >= 0 from row i downwards.
A client takes part in at most k rounds, any two at least s >= b rounds apart. The columns of two of its rounds then
share no row, and the squared sensitivity is just the sum of their squared norms (Choquette-Choo et al. 2023).

Four promises hold the guarantee together, each kept by code:

* **One price** (`matrix_event`): a whole matrix is one event. Its rounds are never priced one by one.
* **Turns** (`Turns`): each holder's ledger admits a client only to rounds s apart, k at most, in ascending order.
* **One release a row** (`CorrelatedNoise`): a row and its noised sum reach the disk together, before the sum leaves.
* **No second start**: noise state that is lost, altered or out of step ends the mechanism. What was begun has a random
  identity which ledgers commit to, so a fresh start under the same job is refused there too.

References:
    Kairouz et al. (2021), "Practical and private (deep) learning without sampling or shuffling" (DP-FTRL).
    Denisov et al. (2022), "Improved differential privacy for SGD via optimal private linear operators on adaptive
    streams". Fichtenberger, Henzinger & Upadhyay (2023), "Constant matters" (the square-root factorisation).
    Choquette-Choo et al. (2023), "(Amplified) banded matrix factorization", arXiv 2306.08153.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NoReturn, Self, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from privacy.accounting import Event, Kind
from privacy.errors import LedgerError, PlanError, RunError
from privacy.files import Buffer, write_whole
from privacy.noise import SECURE_SOURCE, Keystream, RandomSource
from privacy.plan import Adjacency, Plan, Unit, canonical, is_number, require
from privacy.vault import Safe

Series: TypeAlias = NDArray[np.float64]

# More rounds than any job has; a price or an error bound over them is still a matter of seconds.
_MOST_ROUNDS: Final = 100_000
_MOST_BANDS: Final = 1024
_HEX_64: Final = re.compile(r"[0-9a-f]{64}")
_HEX_32: Final = re.compile(r"[0-9a-f]{32}")


class Objective(StrEnum):
    """Which error of the running sum the coefficients keep small; neither choice changes what is guaranteed."""

    MEAN = "mean"
    MAX = "max"


# -- what one client may do -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
    """In which rounds of one matrix a client may take part; a holder's ledger commits to it and enforces it.

    Attributes:
        digest: Names the matrix and the one drawing of its noise, 64 hex digits.
        rounds: Rounds of the matrix, n >= 1.
        separation: Any two rounds that a client joins are at least this far apart, s >= 1.
        participations: Most rounds that one client joins, k in [1, ceil(n / s)].

    Raises:
        PlanError: A field is out of range.
    """

    digest: str
    rounds: int
    separation: int
    participations: int

    def __post_init__(self) -> None:
        require(
            isinstance(self.digest, str) and _HEX_64.fullmatch(self.digest) is not None,
            f"expected a matrix' digest of 64 hex digits, got {self.digest!r:.80}",
        )
        _check_turns(self.rounds, self.separation, self.participations)

    def admits(self, joined: Sequence[int], round: int) -> bool:
        """Says whether a client that joined some rounds may join one more.

        Args:
            joined: Rounds that the client has joined, from 1, in any order.
            round: The round that is asked for.
        """
        return (
            type(round) is int
            and 1 <= round <= self.rounds
            and len(joined) < self.participations
            and (not joined or round - max(joined) >= self.separation)
        )


def _check_turns(rounds: int, separation: int, participations: int) -> None:
    for name, value, most in (
        ("rounds", rounds, _MOST_ROUNDS),
        ("separation", separation, _MOST_ROUNDS),
    ):
        require(
            type(value) is int and 1 <= value <= most,
            f"expected {name} to be a whole number from 1 to {most}, got {value!r:.40}",
        )
    most = -(-rounds // separation)
    require(
        type(participations) is int and 1 <= participations <= most,
        f"expected 1 to {most} participations in {rounds} rounds, {separation} apart, got {participations!r:.40}",
    )


# -- the matrix -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """A banded lower-triangular Toeplitz matrix C, and who may take part how often; all of it public.

    Guarantees:
        Bounded: for any contributions of L2 norm at most 1 in any admitted rounds, a client moves C x by at most
            `sensitivity` in the Frobenius norm. It is exact, not only a bound. Cyclic participation, the same clients
            every ``separation`` rounds as in epochs of a fixed order, is one of the admitted patterns and the worst.
        Stable: the coefficients never grow, so no root of their polynomial lies inside the unit circle (Enestroem and
            Kakeya) and C^-1 cannot blow up exponentially.

    Attributes:
        rounds: Rounds n >= 1; one row each.
        separation: Least distance s >= 1 of two rounds that one client joins.
        participations: Most rounds k that one client joins, at most ceil(n / s).
        coefficients: First column of C from the diagonal down: 1 = c_0 >= c_1 >= ... >= c_(b-1) >= 0, with b <= s.
        momentum: Heavy-ball momentum in [0, 1) that the server applies to the releases; it only weighs the error.

    Raises:
        PlanError: A field is out of range, or there are more bands than rounds between two turns of a client.
    """

    rounds: int
    separation: int
    participations: int
    coefficients: tuple[float, ...]
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _check_turns(self.rounds, self.separation, self.participations)
        values = self.coefficients
        require(
            type(values) is tuple and 1 <= len(values) <= _MOST_BANDS and all(map(is_number, values)),
            f"expected 1 to {_MOST_BANDS} finite coefficients, got {values!r:.60}",
        )
        require(
            len(values) <= min(self.separation, self.rounds),
            f"expected at most {min(self.separation, self.rounds)} bands, so that a client's rounds share no row, "
            f"got {len(values)}; use fewer bands or a larger separation",
        )
        require(
            values[0] == 1 and values[-1] >= 0 and all(a >= b for a, b in itertools.pairwise(values)),
            "expected coefficients that start at 1 and never grow nor fall below 0, got others",
        )
        object.__setattr__(self, "coefficients", tuple(map(float, values)))
        require(
            is_number(self.momentum) and 0 <= self.momentum < 1,
            f"expected 0 <= momentum < 1, got {self.momentum!r:.40}",
        )

    @classmethod
    def optimal(
        cls,
        *,
        rounds: int,
        separation: int,
        participations: int | None = None,
        bands: int | None = None,
        momentum: float = 0.0,
        objective: Objective = Objective.MEAN,
    ) -> Self:
        """Finds coefficients whose noise disturbs the running sum least, at a given price.

        The square-root factorisation in closed form, cut to the bands, is the start; L-BFGS improves on it (measured:
        up to 12 % less error). The better of the two is returned, so a search that fails costs utility only.

        Args:
            rounds: Rounds n >= 1.
            separation: Least distance s of two rounds that one client joins.
            participations: Most rounds of one client; by default as many as the separation allows.
            bands: Number of coefficients b <= s; by default min(s, n, 64). Memory for noise grows with it.
            momentum: The server's momentum, in [0, 1).
            objective: Mean over the rounds of the squared error, or the last and largest one.

        Raises:
            PlanError: An argument is out of range.
        """
        _check_turns(rounds, separation, 1)
        participations = -(-rounds // separation) if participations is None else participations
        bands = min(separation, rounds, 64) if bands is None else bands
        require(
            type(bands) is int and 1 <= bands <= _MOST_BANDS,
            f"expected 1 to {_MOST_BANDS} bands, got {bands!r:.40}",
        )
        start = cls(
            rounds=rounds,
            separation=separation,
            participations=participations,
            coefficients=_square_root(bands, momentum if is_number(momentum) else 0.0),
            momentum=momentum,
        )
        return start if bands == 1 else dataclasses.replace(start, coefficients=_improved(start, objective))

    @property
    def bands(self) -> int:
        """Number of coefficients b."""
        return len(self.coefficients)

    @functools.cached_property
    def sensitivity(self) -> float:
        """Most that one client moves C x in the Frobenius norm, for contributions of L2 norm at most 1.

        The columns of two turns share no row because b <= s, so whatever directions the contributions have, the
        square is the sum of the squared column norms. Columns near the end are cut and never longer than those before
        them, so joining as early and as often as admitted is the worst.
        """
        return math.sqrt(float(_turns_per_band(self) @ np.square(self.coefficients)))

    def stddev(self, noise_multiplier: float, l2_clip: float) -> float:
        """Returns the standard deviation of each number of z: multiplier times sensitivity times clip."""
        for name, value in (("noise_multiplier", noise_multiplier), ("l2_clip", l2_clip)):
            require(is_number(value) and value > 0, f"expected a finite {name} > 0, got {value!r:.40}")
        return noise_multiplier * self.sensitivity * l2_clip

    def error(self, objective: Objective = Objective.MEAN) -> float:
        """Returns the error of the running sum, root mean square over the rounds or in the last one.

        It is what each coordinate of the running (momentum-weighted) sum deviates by, in units of noise multiplier
        times clip, so matrices of one budget are compared by it.
        """
        response = _divided(_workload(self.rounds, self.momentum), np.asarray(self.coefficients, dtype=np.float64))
        return self.sensitivity * math.sqrt(float(_weights(self.rounds, objective) @ np.square(response)))

    @functools.cached_property
    def growth(self) -> float:
        """How much more noise the noisiest round has than a fresh row, >= 1: the norm of the last row of C^-1."""
        one = np.eye(1, self.rounds)[0]
        return float(np.linalg.norm(_divided(one, np.asarray(self.coefficients, dtype=np.float64))))

    def dense(self) -> NDArray[np.float64]:
        """Returns C itself, float64 of shape ``(n, n)``: to look at, and for small n only."""
        require(self.rounds <= 4096, f"expected at most 4096 rounds to write a matrix out, got {self.rounds}")
        matrix = np.zeros((self.rounds, self.rounds))
        for band, value in enumerate(self.coefficients):
            matrix += value * np.eye(self.rounds, k=-band)
        return matrix

    def to_json(self) -> str:
        """Returns the canonical JSON text; ``Matrix.from_json`` reads it back to an equal matrix."""
        return canonical(dataclasses.asdict(self)).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads a matrix from JSON.

        Raises:
            PlanError: The text is not exactly a matrix.
        """
        try:
            fields = json.loads(text)
            if set(fields) != {field.name for field in dataclasses.fields(cls)}:
                raise PlanError(f"expected the fields of a matrix, got {sorted(fields)!r:.80}")
            return cls(**fields | {"coefficients": tuple(fields["coefficients"])})
        except PlanError:
            raise
        except (ValueError, TypeError, RecursionError) as error:
            raise PlanError(f"expected a matrix as JSON, got something else ({type(error).__name__})") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """A matrix and the random identity of the one time its noise is drawn; public, and part of every request.

    Attributes:
        matrix: The matrix.
        identity: Made by `CorrelatedNoise.begin`, 32 hex digits; another start has another one.

    Raises:
        PlanError: The identity is malformed.
    """

    matrix: Matrix
    identity: str

    def __post_init__(self) -> None:
        require(
            isinstance(self.identity, str) and _HEX_32.fullmatch(self.identity) is not None,
            f"expected a drawing's identity of 32 hex digits, got {self.identity!r:.40}",
        )

    @functools.cached_property
    def turns(self) -> Turns:
        """What a holder's ledger commits to and enforces."""
        text = canonical({"matrix": self.matrix.to_json(), "identity": self.identity})
        return Turns(
            digest=hashlib.sha256(b"tacit/matrix/1\n" + text).hexdigest(),
            rounds=self.matrix.rounds,
            separation=self.matrix.separation,
            participations=self.matrix.participations,
        )


def matrix_of(plan: Plan) -> Matrix:
    """Returns the matrix that a plan of banded noise names; the plan's digest fixes all of it.

    Raises:
        PlanError: The plan has fresh noise in every round, or its law is no matrix.
    """
    if plan.banded is None:
        raise PlanError("expected a plan of banded noise, got one of fresh noise in every round")
    return Matrix(
        rounds=plan.rounds,
        separation=plan.banded.separation,
        participations=plan.turns,
        coefficients=plan.banded.coefficients,
    )


def deal(clients: Sequence[int], seed: int) -> list[int]:
    """Deals clients like cards, once for a whole job: the order in which their classes are cut from.

    Args:
        clients: All clients of the job, in a stable order.
        seed: Of the shuffle. Scheduling, not secrecy: whose turn it is protects nobody here.
    """
    return random.Random(f"{seed}/classes").sample(list(clients), len(clients))  # noqa: S311


def class_of_round(dealt: Sequence[int], turns: Turns, round: int) -> list[int]:
    """Returns the clients whose turn it is in a round: one of ``turns.separation`` classes, one after the other.

    Guarantees:
        Public: it depends on the deal and the round alone, never on who replied; a thin class is never dealt again.
        Apart: any two rounds of one client are exactly ``turns.separation`` apart, as the price assumes.

    Args:
        dealt: From `deal`.
        turns: What the job's drawing admits.
        round: Round, from 1.
    """
    turn = (round - 1) % turns.separation
    # The classes' rule is one of those that ledgers admit; where it were not, nobody's turn would be the safe answer.
    if not turns.admits(range(turn + 1, round, turns.separation), round):
        return []
    return sorted(dealt[turn :: turns.separation])


def matrix_event(
    noise_multiplier: float,
    *,
    unit: Unit = Unit.CLIENT,
    adjacency: Adjacency = Adjacency.ADD_REMOVE,
) -> Event:
    """Returns what a whole matrix releases about one client: a single Gaussian release, however many rounds it has.

    Args:
        noise_multiplier: Standard deviation of z divided by sensitivity and clip, as `Matrix.stddev` undoes it. The
            least one for a budget is ``solve_noise(epsilon=..., delta=..., sample_rate=1, steps=1)``.
        unit: What each contribution belongs to; records only where a holder's whole data set takes part in its rounds.
        adjacency: The neighbours that the clip bounds the difference of.
    """
    return Event(
        kind=Kind.MATRIX_GAUSSIAN,
        unit=unit,
        adjacency=adjacency,
        sample_rate=1,
        noise_multiplier=noise_multiplier,
        steps=1,
    )


# -- finding coefficients ---------------------------------------------------------------------------------------------


def _workload(rounds: int, momentum: float) -> Series:
    """Returns the first column of A, shape ``(n,)``: what a release contributes to the model, round after round."""
    return np.cumsum(np.power(momentum, np.arange(rounds)))


def _weights(rounds: int, objective: Objective) -> Series:
    """Returns how often each number of a Toeplitz response counts in the squared error, shape ``(n,)``."""
    if Objective(objective) is Objective.MAX:
        return np.ones(rounds)
    return np.arange(rounds, 0, -1.0) / rounds


def _turns_per_band(matrix: Matrix) -> Series:
    """Returns for each band in how many of the earliest turns it lies inside the matrix, shape ``(b,)``."""
    turns = np.arange(matrix.participations) * matrix.separation
    return np.array([np.sum(turns + band < matrix.rounds) for band in range(matrix.bands)], dtype=np.float64)


def _divided(numerator: Series, by: Series) -> Series:
    """Returns the power series numerator / by to the numerator's length, in O(n b); ``by[0]`` is 1."""
    tail, quotient = by[:0:-1], np.zeros(len(numerator) + len(by) - 1)
    for t, value in enumerate(numerator):
        quotient[t + len(tail)] = value - tail @ quotient[t : t + len(tail)]
    return quotient[len(tail) :]


def _square_root(bands: int, momentum: float) -> tuple[float, ...]:
    """Returns the first coefficients of the workload's square root.

    Its generating function is 1 / ((1 - x)(1 - momentum x)), whose root is the product of two binomial series
    (Fichtenberger et al. 2023 for momentum 0).
    """
    one = np.cumprod(np.concatenate((np.ones(1), 1 - 1 / (2 * np.arange(1, bands)))))
    root = np.convolve(one, one * np.power(momentum, np.arange(bands)))[:bands]
    # Rounding may lift a coefficient by one unit above the one before.
    return tuple(float(value) for value in np.minimum.accumulate(root))


def _improved(start: Matrix, objective: Objective) -> tuple[float, ...]:
    """Returns coefficients of no larger error than the start's, by L-BFGS on the ratios of neighbours."""
    import torch

    workload, weights = _workload(start.rounds, start.momentum), _weights(start.rounds, objective)
    counts = _turns_per_band(start)

    def loss(ratios: Series) -> tuple[float, Series, Series]:
        """Logarithm of the squared error, its gradient by the ratios, and the coefficients."""
        values = np.cumprod(np.concatenate((np.ones(1), ratios)), dtype=np.float64)
        response = _divided(workload, values)
        again = _divided(response, values)
        squares, spread = float(counts @ values**2), float(weights @ response**2)
        weighted = weights * response
        slopes = np.array([-2 * weighted[band:] @ again[: len(again) - band] for band in range(start.bands)])
        by_value = (2 * counts * values / squares + slopes / spread) * values
        return math.log(squares) + math.log(spread), np.cumsum(by_value[::-1])[::-1][1:] / ratios, values

    first = np.asarray(start.coefficients)
    ratios = np.clip(first[1:] / np.maximum(first[:-1], 1e-300), 1e-6, 1 - 1e-6)
    best: tuple[float, tuple[float, ...]] = (loss(ratios)[0], start.coefficients)
    # A sigmoid keeps each ratio in (0, 1), so the coefficients neither grow nor change sign.
    free = torch.from_numpy(np.log(ratios / (1 - ratios))).requires_grad_()
    search = torch.optim.LBFGS([free], max_iter=80, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> float:
        nonlocal best
        sigmoid = torch.sigmoid(free.detach()).clamp(1e-9, 1 - 1e-9).numpy()
        value, slope, values = loss(sigmoid)
        if value < best[0]:
            best = value, tuple(map(float, values))
        free.grad = torch.from_numpy(slope * sigmoid * (1 - sigmoid))
        return value

    search.step(closure)  # type: ignore[no-untyped-call]
    return best[1]


# -- drawing it -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """Which noise state a checkpoint belongs to; public.

    Attributes:
        row: Rows released so far, from 0.
        digest: SHA-256 of the state after them, which holds a salt, so that it confirms no guess; 64 hex digits.
    """

    row: int
    digest: str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _State:
    """The secret: noise of the last b - 1 rows, float64 of shape ``(b - 1, P)``, and the last release.

    ``noise`` is in units of the standard deviation of z, the newest row first.
    """

    row: int
    salt: str
    previous: str
    source: str
    request: str
    noise: NDArray[np.float64]
    released: NDArray[np.float32]


@final
class CorrelatedNoise:
    """Adds the rows of C^-1 z to a job's sums, one a round, in O(b P) memory.

    Whoever reads its state can take the noise off the last b releases. It is a file of mode 0600, sealed where a safe
    is given; treat it like a key. Only noised sums leave this object.

    Guarantees:
        Once: a row has one release. It and the state after it are one file, which takes its name before the release
            is returned; asked again for the same request, the same numbers are returned, and for another one, none.
        Ascending: rows are released one after the other, none is skipped. A round that nobody joined has its row too.
        Alone: one process at a time holds the state; a forked copy releases nothing.
        Ended: a state that is missing, altered, of another drawing, or not the one of the checkpoint's mark (or the
            one right after it) raises RunError for ever. There is no way to draw the rest of a matrix afresh.
        Named: fresh numbers come from a `Keystream` of their own for every row. Any other source names the drawing
            as a test's from then on (guarantee G11).

    What it cannot see: state and checkpoint rolled back together. The holders' ledgers see that, because a round
    which they joined is never joined again.
    """

    _MAGIC: Final = b"tacit/matrix-noise/1\n"
    _NAME: Final = "noise.state"

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError("expected noise that was begun or resumed; call CorrelatedNoise.begin or .resume")

    @classmethod
    def begin(
        cls,
        folder: Path,
        matrix: Matrix,
        *,
        job: str,
        size: int,
        noise_multiplier: float,
        l2_clip: float,
        safe: Safe | None = None,
        sources: Callable[[], RandomSource] = Keystream,
    ) -> CorrelatedNoise:
        """Begins a drawing in a folder of its own. Put its `drawing` and `mark` into the checkpoint before any round.

        A state of the same job that has released nothing yet is taken up: the process may have died before its
        checkpoint was written.

        Args:
            folder: Where its state lies; made if it is missing.
            matrix: The matrix.
            job: Job identity.
            size: Numbers P >= 1 in a sum.
            noise_multiplier: Standard deviation of z divided by sensitivity and clip, > 0; what `matrix_event` prices.
            l2_clip: Bound on the L2 norm of one client's contribution to a sum, > 0.
            safe: What seals the state; None leaves it readable, for a simulation.
            sources: Makes one fresh random source a row; only tests pass another one.

        Raises:
            PlanError: An argument is out of range.
            RunError: Another drawing is there, or its rows were released already, or the folder cannot be used.
        """
        noise = cls._made(folder, matrix, job, size, noise_multiplier, l2_clip, safe, sources)
        try:
            if noise._path.exists():
                content = noise._content()
                drawing = Drawing(matrix=matrix, identity=noise._identity(content))
                noise._take(content, drawing)
                if noise._state.row > 0:
                    raise RunError(
                        f"expected no noise state in {folder}, got one of which {noise._state.row} rows were released; "
                        "resume it with its checkpoint's mark, or start a new job in another folder"
                    )
            else:
                drawing = Drawing(matrix=matrix, identity=os.urandom(16).hex())
                empty = np.zeros((matrix.bands - 1, size))
                first = _State(
                    row=0,
                    salt=os.urandom(32).hex(),
                    previous="",
                    source=noise._name,
                    request="",
                    noise=empty,
                    released=np.zeros(0, np.float32),
                )
                noise._drawing = drawing
                noise._keep(first)
        except BaseException:
            noise.close()
            raise
        return noise

    @classmethod
    def resume(
        cls,
        folder: Path,
        drawing: Drawing,
        mark: Mark,
        *,
        job: str,
        size: int,
        noise_multiplier: float,
        l2_clip: float,
        safe: Safe | None = None,
        sources: Callable[[], RandomSource] = Keystream,
    ) -> CorrelatedNoise:
        """Goes on with a drawing where a checkpoint left it, or one release further.

        Args:
            folder: Where its state lies.
            drawing: What `begin` drew, from the checkpoint.
            mark: The checkpoint's mark. A state one row further that follows from it is the release which was kept
                but of which the checkpoint did not hear: asked for that round, the kept release is returned.
            job: As in `begin`; so are all others.
            size: See `begin`.
            noise_multiplier: See `begin`.
            l2_clip: See `begin`.
            safe: See `begin`.
            sources: See `begin`.

        Raises:
            RunError: The state is not there or not the one meant. The mechanism has ended.
        """
        noise = cls._made(folder, drawing.matrix, job, size, noise_multiplier, l2_clip, safe, sources)
        try:
            noise._take(noise._content(), drawing)
            state, here = noise._state, noise.mark
            if here != mark and (state.row, state.previous) != (mark.row + 1, mark.digest):
                raise noise._ended(f"the state after row {mark.row} that the checkpoint names", f"row {state.row}'s")
        except BaseException:
            noise.close()
            raise
        return noise

    @classmethod
    def _made(
        cls,
        folder: Path,
        matrix: Matrix,
        job: str,
        size: int,
        noise_multiplier: float,
        l2_clip: float,
        safe: Safe | None,
        sources: Callable[[], RandomSource],
    ) -> CorrelatedNoise:
        """Returns an object that holds the folder's lock and no state yet."""
        require(type(size) is int and 1 <= size <= 2**40, f"expected 1 or more numbers in a sum, got {size!r:.40}")
        require(
            isinstance(job, str) and _HEX_32.fullmatch(job) is not None,
            f"expected a job identity of 32 hex digits, got {job!r:.40}",
        )
        noise = object.__new__(cls)
        noise._stddev = matrix.stddev(noise_multiplier, l2_clip)
        noise._size, noise._job, noise._safe = size, job, safe
        noise._sources = sources
        # Only the production type gets the production name, whatever a source calls itself.
        noise._name = SECURE_SOURCE if sources is Keystream else f"test:{getattr(sources, '__name__', 'source')}"
        noise._path = folder / cls._NAME
        noise._process, noise._threads = os.getpid(), threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(folder / "noise.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise RunError(f"expected a folder for noise at {folder}, got {error.strerror}") from None
        noise.close = weakref.finalize(noise, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            noise.close()
            raise RunError(
                f"expected the noise in {folder} to be free, got one that a process holds; two would release "
                "one row twice; stop the other one"
            ) from None
        return noise

    # What `_made`, `begin` and `resume` set.
    _stddev: float
    _size: int
    _job: str
    _safe: Safe | None
    _sources: Callable[[], RandomSource]
    _name: str
    _path: Path
    _process: int
    _threads: threading.Lock
    _drawing: Drawing
    _state: _State
    _digest: str
    close: weakref.finalize[Any, Any]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def drawing(self) -> Drawing:
        """The matrix and the random identity of this drawing; part of every request to a client."""
        return self._drawing

    @property
    def mark(self) -> Mark:
        """What the checkpoint keeps: the row, and the hash of the state after it."""
        return Mark(row=self._state.row, digest=self._digest)

    @property
    def source(self) -> str:
        """Name of the noise source, for the report; a test source once used stays named."""
        return self._state.source

    @property
    def stddev(self) -> float:
        """Standard deviation of each number of z."""
        return self._stddev

    def release(self, row: int, total: NDArray[np.floating[Any]], request: str) -> NDArray[np.float32]:
        """Adds a round's noise to its sum, keeps the result, and only then returns it.

        Args:
            row: The round, from 1: the one after the last, or the last one again.
            total: Sum of the round's clipped contributions, shape ``(P,)``, finite; zeros where nobody came.
            request: What the release belongs to (a hash of round, model and cohort), 64 hex digits.

        Returns:
            The noised sum, float32 of shape ``(P,)``, read-only. For the last row again, the kept one.

        Raises:
            RunError: The row is out of order or released for another request, the matrix has no more rows, or the
                release cannot be kept. Nothing was released then.
        """
        if not (isinstance(request, str) and _HEX_64.fullmatch(request)):
            raise RunError(f"expected the hash of a request, 64 hex digits, got {request!r:.80}")
        with self._threads:
            self._require_open()
            state, matrix = self._state, self._drawing.matrix
            if type(row) is int and row == state.row and row >= 1:
                if request != state.request:
                    raise RunError(f"expected the request of row {row} again, got another: a row is released once")
                return state.released
            if type(row) is not int or row != state.row + 1 or row > matrix.rounds:
                raise RunError(
                    f"expected row {state.row + 1} of {matrix.rounds}, got {row!r:.40}; each is released once, in order"
                )
            total = np.asarray(total)
            if total.shape != (self._size,) or not np.isfinite(total).all():
                raise RunError(f"expected a finite sum of {self._size} numbers, got {total.shape}; clip it first")
            fresh = self._sources().gaussian(self._size).numpy()
            noise = fresh - np.asarray(matrix.coefficients[1:]) @ state.noise
            released = (total.astype(np.float64) + self._stddev * noise).astype("<f4")
            released.flags.writeable = False
            self._keep(
                _State(
                    row=row,
                    salt=os.urandom(32).hex(),
                    previous=self._digest,
                    source=state.source if state.source != SECURE_SOURCE else self._name,
                    request=request,
                    noise=np.concatenate((noise[None], state.noise))[: matrix.bands - 1],
                    released=released,
                )
            )
            return released

    def erase(self) -> None:
        """Deletes the state after the last round, so that nobody can take the noise off the last releases.

        Raises:
            RunError: Rounds are left; without its state the mechanism would have ended.
        """
        with self._threads:
            self._require_open()
            if self._state.row < self._drawing.matrix.rounds:
                raise RunError(f"expected all {self._drawing.matrix.rounds} rows released, got {self._state.row}")
            self._path.unlink(missing_ok=True)
            self.close()

    def _require_open(self) -> None:
        # A forked copy would draw its own numbers for the same row, and a closed object no longer has the lock.
        if os.getpid() != self._process or not self.close.alive:
            raise RunError("expected noise that is open in this process, got a closed one or a copy; resume it")

    # -- on disk ------------------------------------------------------------------------------------------------------

    def _header(self, state: _State, drawing: Drawing) -> dict[str, Any]:
        return {
            "drawing": drawing.turns.digest,
            "identity": drawing.identity,
            "job": self._job,
            "size": self._size,
            "stddev": self._stddev,
            "row": state.row,
            "salt": state.salt,
            "previous": state.previous,
            "source": state.source,
            "request": state.request,
        }

    def _keep(self, state: _State) -> None:
        """Puts a state and its release on disk, whole or not at all; only then is it this object's state."""
        parts: tuple[Buffer, ...] = (
            self._MAGIC,
            canonical(self._header(state, self._drawing)) + b"\n",
            # Views, not copies: the noise is by far the largest thing here.
            np.ascontiguousarray(state.noise, dtype="<f8").reshape(-1).view(np.uint8).data,
            np.ascontiguousarray(state.released, dtype="<f4").view(np.uint8).data,
        )
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        sealed = parts if self._safe is None else (self._safe.seal(self._NAME, *parts),)
        write_whole(self._path, *sealed)
        self._state, self._digest = state, digest.hexdigest()

    def _ended(self, expected: str, got: str) -> RunError:
        return RunError(
            f"expected {expected} in {self._path}, got {got}; this mechanism has ended: noise cannot be drawn afresh "
            "within a matrix, start a new job, which is charged anew"
        )

    def _content(self) -> bytes:
        try:
            if (mode := self._path.stat().st_mode & 0o777) & 0o077:
                raise RunError(f"expected {self._path} to be private (0600), got {mode:04o}; chmod 600 it")
            content = self._path.read_bytes()
            return content if self._safe is None else self._safe.open(self._NAME, content)
        except FileNotFoundError:
            raise self._ended("the noise state", "none") from None
        except OSError as error:
            raise RunError(f"expected to read {self._path}, got {error.strerror}") from None
        except LedgerError:
            raise self._ended("the noise state that was sealed", "other bytes") from None

    def _identity(self, content: bytes) -> str:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            identity = json.loads(content.removeprefix(self._MAGIC).partition(b"\n")[0])["identity"]
            if isinstance(identity, str) and _HEX_32.fullmatch(identity):
                return identity
        raise self._ended("a noise state", "other bytes")

    def _take(self, content: bytes, drawing: Drawing) -> None:
        """Reads a state; it must be exactly one of this drawing, job, size and noise."""
        text, _, body = content.removeprefix(self._MAGIC).partition(b"\n")
        try:
            fields = json.loads(text)
            held = (drawing.matrix.bands - 1) * self._size * 8
            noise = np.frombuffer(body[:held], dtype="<f8").reshape(drawing.matrix.bands - 1, self._size)
            state = _State(
                row=fields["row"],
                salt=fields["salt"],
                previous=fields["previous"],
                source=fields["source"],
                request=fields["request"],
                noise=noise,
                released=np.frombuffer(body[held:], dtype="<f4"),
            )
            sound = (
                content.startswith(self._MAGIC)
                and canonical(fields) == text
                and fields == self._header(state, drawing)
                and type(state.row) is int
                and state.row >= 0
                and len(state.released) == (self._size if state.row else 0)
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            sound = False
        if not sound:
            raise self._ended("the noise state of this job, matrix, size and noise", "another one, or a damaged one")
        self._drawing, self._state = drawing, state
        self._digest = hashlib.sha256(content).hexdigest()

    def __repr__(self) -> str:
        return f"CorrelatedNoise(row {self._state.row} of {self._drawing.matrix.rounds}, <secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("correlated noise is secret and one of a kind: it is neither copied nor pickled; resume it")

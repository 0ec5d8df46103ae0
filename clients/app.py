"""The client application: what a data holder does with one message, and the only place where something leaves it.

    kept?            the same request again gets the same bytes again, and costs nothing
    gate, charge     on disk before any record is read; too dear is answered with a fixed word
    sample, clip, add noise, divide      `privacy.dpsgd`, on records that only now are loaded
    measure          only what the plan committed to and the holder allows: `privacy.metrics`; by default nothing
    keep             the finished release is stored before any byte leaves
    send             trainable parameters, those metrics and the receipt; nothing else passes `require_allowed`

Metrics are those of the round's incoming model on the client's own records. They travel with the update: one message,
one charge, one kept release for both, so that a retry repeats both byte for byte or pays for both anew, and nobody can
ask for one without the other, or for one of them twice. The ledger's entry names each of them as an event of its own.

Wire, both ways a Flower message of type "train". A request holds an ArrayRecord ``arrays`` (trainable parameters by
name, float32) and a ConfigRecord ``job`` with exactly the keys of `REQUEST_KEYS`. A reply holds ``arrays`` of the same
names and shapes and a ConfigRecord ``receipt``, and where the plan has metrics an ArrayRecord ``metrics`` with each
one's noised sums by its word; or, with no arrays, a ConfigRecord ``refusal`` with one fixed word.

Where the plan protects clients (guarantee G16), a holder whose own policy allows it trains plainly and sends its
clipped update instead of parameters, with one more array, `BIT`, where the plan's clip follows a quantile. The request
then says this round's ``clip`` too, and with banded noise the identity of the ``drawing`` whose row the sum will get:
the holder's ledger commits to it, pays for its whole matrix once, and admits this client in its turns only.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.holder import Holder, Release, noise_name
from clients.metrics import Judge
from clients.plain import PlainTrainer, check_unit
from privacy.accounting import Event
from privacy.central import BIT
from privacy.dpsgd import PrivateTrainer, check_model
from privacy.errors import PlanError, RunError
from privacy.ledger import ChargeRequest, Word
from privacy.matrix import Drawing, matrix_of
from privacy.metrics import release as release_metrics
from privacy.metrics import widths
from privacy.plan import Local, Plan, Unit, require
from privacy.vault import private_logger
from privacy.wire import float32_bytes, model_digest, read_float32, request_digest, settings_digest, write_float32

REQUEST_KEYS: Final = frozenset({"job", "round", "task", "plan", "local", "lr", "seed", "witness"})
CENTRAL_KEYS: Final = REQUEST_KEYS | {"clip"}
BANDED_KEYS: Final = CENTRAL_KEYS | {"drawing"}
_TEXT_BYTES: Final = 8 * 1024
_JOB: Final = re.compile(r"[0-9a-f]{32}")
_DRAWING: Final = re.compile(r"[0-9a-f]{32}")
_WITNESS: Final = re.compile(r"(?:|\d{1,12}:[0-9a-f]{64})")

# Details of a fault stay with the holder; they reach only what a deployment attaches here, a `SealedLog`.
_log = private_logger("tacit.client")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One round's request, parsed and bounds-checked; everything in it is public.

    Attributes:
        job: Job identity, 32 hex digits.
        round: Round, from 1.
        task: Name of the task.
        plan: The plan of the job.
        local: Learning knobs.
        lr: Learning rate of this round, > 0.
        seed: Seed of the model's frozen parameters, which do not travel.
        witness: Sequence number and hash of the last receipt the server holds, or None.
        arrays: The model's trainable parameters as they came.
        digest: SHA-256 of the whole request, in hex.
        clip: This round's bound on the norm of an update; only where the plan protects clients, else 0.
        drawing: The plan's matrix and the one drawing of its noise; only with banded noise.
    """

    job: str
    round: int
    task: str
    plan: Plan
    local: Local
    lr: float
    seed: int
    witness: tuple[int, str] | None
    arrays: ArrayRecord
    digest: str
    clip: float = 0.0
    drawing: Drawing | None = None

    def charge_of(self, name: str, *, noise: str, commitment: str = "", code: str = "") -> ChargeRequest:
        """Returns what this request asks one data set to pay for."""
        return ChargeRequest(
            name=name,
            job=self.job,
            round=self.round,
            request=self.digest,
            plan=self.plan,
            commitment=commitment,
            noise=noise,
            witness=self.witness,
            code=code,
            settings=settings_digest(self.task, self.plan.digest(), self.local.to_json(), self.seed),
            matrix=self.drawing,
        )


def parse_request(message: Message) -> Request:
    """Reads a request, trusting none of it.

    Raises:
        PlanError: The message is not exactly a request.
    """
    content = message.content
    require(
        set(content) == {"arrays", "job"},
        f"expected the records 'arrays' and 'job', got {sorted(content)[:4]}",
    )
    arrays, job = content["arrays"], content["job"]
    if not isinstance(arrays, ArrayRecord) or not isinstance(job, ConfigRecord):
        raise PlanError("expected an ArrayRecord and a ConfigRecord, got other records; is it the same program?")
    keys = BANDED_KEYS if "drawing" in job else CENTRAL_KEYS if "clip" in job else REQUEST_KEYS
    require(set(job) == keys, f"expected the request keys {sorted(keys)}, got {sorted(job)[:10]}")
    # A list is refused below, and cannot be remembered.
    values: dict[str, Any] = dict(job)
    read = _fields.__wrapped__ if any(isinstance(value, list) for value in values.values()) else _fields
    return Request(arrays=arrays, **read(_arrays_digest(arrays), **values))


# A simulation reads each request twice: to charge its cohort in one go, and to serve it.
@lru_cache(maxsize=1024, typed=True)
def _fields(model: str, **job: Any) -> dict[str, Any]:
    """Returns the fields of a request, bounds-checked, and the digest of the whole; ``model`` is that of its arrays."""
    texts: dict[str, str] = {}
    for key in ("job", "task", "plan", "local", "witness"):
        text = job[key]
        if not isinstance(text, str) or len(text) > _TEXT_BYTES:
            raise PlanError(f"expected a short text as {key!r}, got something else")
        texts[key] = text
    number, lr, seed = job["round"], job["lr"], job["seed"]
    # Exact types: True is an int in Python, and an int would hash like a float.
    if type(number) is not int or not 1 <= number <= 10**9:
        raise PlanError("expected a round from 1, got something else")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise PlanError("expected a seed from 0, got something else")
    if type(lr) is not float or not 0 < lr < 1e9:
        raise PlanError("expected a learning rate > 0, got something else")
    require(_JOB.fullmatch(texts["job"]) is not None, "expected a job identity of 32 hex digits, got another text")
    require(_WITNESS.fullmatch(texts["witness"]) is not None, "expected a witness 'number:hash' or nothing")
    seq, _, head = texts["witness"].partition(":")
    fields: dict[str, str | int | float] = {**texts, "round": number, "lr": lr, "seed": seed}
    plan = _plan(texts["plan"])
    clip = _clip(job.get("clip"), plan)
    if plan.unit is Unit.CLIENT:
        fields["clip"] = clip
    drawing = _drawing(job.get("drawing"), plan)
    if drawing is not None:
        fields["drawing"] = drawing.identity
    return {
        "job": texts["job"],
        "round": number,
        "task": texts["task"],
        "plan": plan,
        "local": _local(texts["local"]),
        "lr": lr,
        "seed": seed,
        "witness": (int(seq), head) if seq else None,
        "digest": request_digest(fields, model),
        "clip": clip,
        "drawing": drawing,
    }


def _clip(clip: object, plan: Plan) -> float:
    """Returns a round's clip as the plan allows it; 0 where the plan protects records, which has no such thing."""
    if plan.unit is Unit.RECORD:
        require(clip is None, "expected a clip only in a plan that protects clients, got one")
        return 0.0
    if type(clip) is not float or not 0 < clip < math.inf:
        raise PlanError("expected a finite clip > 0, got something else")
    require(plan.quantile > 0 or clip == plan.l2_clip, "expected the plan's own clip, got another")
    return clip


def _drawing(identity: object, plan: Plan) -> Drawing | None:
    """Returns the drawing that a request names, of the plan's matrix; None where the plan has no such thing."""
    if plan.banded is None:
        require(identity is None, "expected a drawing only in a plan of banded noise, got one")
        return None
    if not isinstance(identity, str) or _DRAWING.fullmatch(identity) is None:
        raise PlanError("expected a drawing's identity of 32 hex digits, got something else")
    return _drawn(plan, identity)


@lru_cache(maxsize=8)
def _drawn(plan: Plan, identity: str) -> Drawing:
    return Drawing(matrix=matrix_of(plan), identity=identity)


_plan = lru_cache(maxsize=8)(Plan.from_json)
_local = lru_cache(maxsize=8)(Local.from_json)


class _Shared:
    """Remembers what was computed from the last model: a cohort shares one broadcast, so one computation serves all.

    Containers may differ from client to client while the arrays in them are the same objects; only these count.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._arrays: tuple[Array, ...] = ()
        self._value: Any = None

    def get(self, arrays: ArrayRecord, compute: Callable[[ArrayRecord], Any]) -> Any:
        """Returns ``compute(arrays)``, computed anew only for other arrays than the last ones."""
        names, values = tuple(arrays.keys()), tuple(arrays.values())
        # The tuple holds the arrays alive, so an identity cannot come to mean another array.
        same = names == self._names and all(a is b for a, b in zip(values, self._arrays, strict=True))
        if not same or self._value is None:
            self._names, self._arrays, self._value = names, values, compute(arrays)
        return self._value


_digests = _Shared()


def _arrays_digest(arrays: ArrayRecord) -> str:
    return str(_digests.get(arrays, lambda shared: model_digest(_items(shared))))


def _items(arrays: ArrayRecord) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    for name, array in arrays.items():
        yield name, f"{array.stype}/{array.dtype}", tuple(array.shape), array.data


def decode(arrays: ArrayRecord, shapes: Mapping[str, tuple[int, ...]]) -> torch.Tensor:
    """Reads trainable parameters off the wire.

    Args:
        arrays: What came; nothing about it is trusted.
        shapes: Names and shapes of the trainable parameters, in order.

    Returns:
        All parameters, flat float32 of shape ``(P,)``.

    Raises:
        PlanError: Names, types, shapes or lengths are not those of this model.
    """
    require(
        list(arrays) == list(shapes),
        f"expected the parameters {list(shapes)[:4]}..., got {list(arrays)[:4]}...; is it the same task?",
    )
    parts = []
    for name, array in arrays.items():
        require(
            array.dtype == "float32" and array.stype == "numpy.ndarray" and tuple(array.shape) == shapes[name],
            f"expected {name} as float32 {shapes[name]}, got {array.dtype[:16]}; is it the same task?",
        )
        parts.append(read_float32(array.data, shapes[name], name).reshape(-1))
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0)


def encode(
    flat: np.ndarray[tuple[int, ...], np.dtype[np.float32]], shapes: Mapping[str, tuple[int, ...]]
) -> ArrayRecord:
    """Writes flat trainable parameters as named arrays; the inverse of `decode`."""
    # One by one: the record's constructor would build every array a second time.
    record, start = ArrayRecord(), 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        data = write_float32(flat[start:stop].reshape(shape))
        record[name] = Array("float32", shape, "numpy.ndarray", data)
        start = stop
    return record


class _Worker:
    """One task's trainer under one plan, built once and used for every client and round of a process."""

    def __init__(self, holder: Holder, request: Request) -> None:
        task, plan, local = holder.task, request.plan, request.local
        check_unit(task, plan.unit)
        self.task, self.shape = task, holder.shape
        self.model = task.fresh(holder.shape, request.seed)
        self.trainer: PrivateTrainer | PlainTrainer
        if plan.unit is Unit.CLIENT:
            check_model(self.model)
            self.trainer = PlainTrainer(self.model, task, plan=plan, local=local, device=holder.device)
        else:
            self.trainer = PrivateTrainer(
                self.model, task.loss, plan=plan, local=local, augment=task.augment, device=holder.device
            )
        self.shapes = dict(zip(self.trainer.names, self.trainer.shapes, strict=True))
        self._start = _Shared()
        self.judge = Judge(task, holder.shape, request.seed, holder.device) if plan.metrics is not None else None

    def synthetic(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns public records of the right shape, inputs ``(count, *shape)`` and classes ``(count,)``."""
        return self.task.synthetic(self.shape, count, torch.Generator().manual_seed(0))

    def start(self, arrays: ArrayRecord) -> torch.Tensor:
        """Returns the broadcast model as a flat vector; decoded once per cohort, read-only by convention."""
        start: torch.Tensor = self._start.get(arrays, lambda shared: decode(shared, self.shapes))
        return start


_workers: dict[tuple[Plan, Local, int, str], _Worker] = {}


def _worker(holder: Holder, request: Request) -> _Worker:
    key = (request.plan, request.local, request.seed, holder.device)
    worker = _workers.get(key)
    if worker is None or worker.task is not holder.task or worker.shape != holder.shape:
        # One job at a time: an older job's model would only hold memory.
        _workers.clear()
        worker = _workers[key] = _Worker(holder, request)
    return worker


def answer(request: Request, holder: Holder) -> Release | Word:
    """Carries one request through the guarantee chain.

    Guarantees:
        Order: gate and charge come before any record is read; keep comes before the result is returned (G8).
        Once: two returned releases of one charge are byte-identical (G9).

    Raises:
        PlanError: The model is not this task's; nothing was charged.
        TacitError: Anything else that went wrong; `client_app` turns it into a fixed word.
    """
    # First of all: a holder that stopped allowing a metric, or trusting the server, does not even repeat a release.
    if not holder.allows(request.plan):
        return Word.CONFLICT
    kept = holder.kept.get(request.job, holder.account(), request.digest)
    if kept is not None:
        return kept
    if request.task != holder.task.name:
        return Word.CONFLICT
    worker = _worker(holder, request)
    start = worker.start(request.arrays)
    # What does not run or fit in memory fails here, for a reason that no record has a part in.
    worker.trainer.rehearse(worker.synthetic)
    if worker.judge is not None:
        worker.judge.rehearse(worker.synthetic)
    # From here on the charge is spent whatever happens; nothing above has touched a record.
    receipt = holder.charge(
        request.charge_of(holder.name, noise=noise_name(holder.sources), commitment=holder.commitment, code=holder.code)
    )
    if isinstance(receipt, Word):
        return receipt
    records = holder.records()
    source = holder.sources(holder=holder.name, job=request.job, round=request.round)
    # At unit client the noise is the server's: that it is the one in the charge, the holder's policy takes on trust.
    if isinstance(worker.trainer, PlainTrainer):
        update = worker.trainer.update(
            start, records, source, lr=request.lr, clip=request.clip, simulated=holder.simulated
        )
        release = Release(update, receipt)
    else:
        parameters = worker.trainer.train(start, records.inputs, records.targets, records.valid, source, lr=request.lr)
        release = Release(parameters.cpu().numpy(), receipt)
    if worker.judge is not None and request.plan.metrics is not None:
        outcomes = worker.judge.outcomes(start, records)
        # The keystream goes on where the update's noise ended: no word of it is used twice.
        measured = release_metrics(request.plan.metrics, outcomes, source)
        release = dataclasses.replace(release, metrics=measured)
    holder.kept.put(release)
    return release


def _shapes(request: Request) -> dict[str, tuple[int, ...]]:
    # The request's own shapes: `decode` found them to be the model's before anything was charged for it.
    shapes = {name: tuple(array.shape) for name, array in request.arrays.items()}
    return shapes | ({BIT: (1,)} if request.plan.quantile else {})


def reply_of(request: Request, release: Release, classes: int) -> RecordDict:
    """Returns a release as the content of a reply.

    Args:
        request: What was asked.
        release: What is answered.
        classes: Public number of classes.
    """
    receipt = ConfigRecord({"receipt": release.receipt.to_json()})
    content = RecordDict({"arrays": encode(release.parameters, _shapes(request)), "receipt": receipt})
    if request.plan.metrics is not None:
        content["metrics"] = encode(release.metrics, widths(request.plan.metrics, classes))
    return content


def require_allowed(content: RecordDict, request: Request, release: Release, classes: int) -> None:
    """The last door: refuses a reply that holds anything but what was paid for.

    Guarantees:
        Closed: what leaves are float32 arrays of the names and shapes that the public plan and request say, and the
            receipt; the receipt names exactly the plan's events. A Flower MetricRecord never leaves, whatever is in it.

    Raises:
        RunError: The reply holds something else; it does not leave.
    """
    measured = widths(request.plan.metrics, classes)
    arrays = {"arrays": _shapes(request)} | ({"metrics": measured} if measured else {})
    sound = (
        set(content) == {*arrays, "receipt"}
        and all(_is_arrays(content[name], shapes) for name, shapes in arrays.items())
        and type(content["receipt"]) is ConfigRecord
        and dict(content["receipt"]) == {"receipt": release.receipt.to_json()}
        and release.receipt.events == Event.all_of_round(request.plan)
    )
    if not sound:
        raise RunError("expected a reply of paid arrays and their receipt, got something else; nothing was sent")


def _is_arrays(record: object, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Says whether a record holds float32 arrays of exactly these names, shapes and lengths, in this order."""
    return (
        type(record) is ArrayRecord
        and list(record) == list(shapes)
        and all(
            (array.dtype, array.stype, tuple(array.shape)) == ("float32", "numpy.ndarray", shapes[name])
            and len(array.data) == float32_bytes(shapes[name])
            for name, array in record.items()
        )
    )


def client_app(find: Callable[[Context], Holder], *, simulated: bool = False) -> ClientApp:
    """Makes the client application.

    Args:
        find: Returns the holder that a context belongs to.
        simulated: Whether faults are the experimenter's own and may be raised. A real holder answers a fixed word.

    Returns:
        A Flower ``ClientApp`` that answers "train" and nothing else: evaluating on private data is a release, and the
        only way to one is a plan with metrics that the holder allows.
    """
    app = ClientApp()

    def content_of(message: Message, context: Context) -> RecordDict:
        request = parse_request(message)
        holder = find(context)
        result = answer(request, holder)
        if isinstance(result, Word):
            return refusal(result)
        content = reply_of(request, result, holder.shape.classes)
        require_allowed(content, request, result, holder.shape.classes)
        return content

    def refusal(word: Word) -> RecordDict:
        return RecordDict({"refusal": ConfigRecord({"word": word.value})})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            content = content_of(message, context)
        except (Exception, SystemExit) as error:
            if simulated:
                raise
            # An exception's presence and text could tell something about the data: one word leaves, the rest stays.
            _log.exception("a request was not served; the reason stays on this machine")
            content = refusal(Word.MALFORMED if isinstance(error, PlanError) else Word.UNAVAILABLE)
        return Message(content, reply_to=message)

    return app

"""The worker: one long-running process per data holder, which holds its records, keys, ledger, policy and model.

It answers sealed messages that the courier hands over, one after the other. It opens them, gives each to the same
Flower ``ClientApp`` that a simulation runs, and seals what that answers. Data and model are loaded once and stay warm.

    hello     -> offer     the server's identity is the pinned one, run and bundle are those that the courier saw
    terms     -> word      ready, waiting, refused, other-program or other-task: `clients.jobs`
    papers    -> papers    the ledger's grant, and its commitment to a job that was approved, for the report
    round     -> reply     only under terms that are approved and unchanged; else a fixed word, as long as a release

Anything that does not open gets the answer "lost", whatever the reason; the server then makes a new session. Nothing
that a server sends can end the worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import selectors
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients.app import client_app
from clients.holder import Holder
from clients.jobs import Decision, Jobs, Policy
from clients.post import LOST, Buffer, Letter, answer_letter, read_letter
from privacy.central import BIT
from privacy.errors import PlanError, RunError, SealError
from privacy.identity import Identity
from privacy.ledger import Word
from privacy.metrics import widths
from privacy.plan import Plan, canonical
from privacy.seal import MOST_BYTES, ClientEpoch, ClientSession, Opened, Step
from privacy.terms import Terms
from privacy.vault import private_logger
from privacy.wire import Floats, Scalar, array_of, floats_of, pack, packed_bytes, unpack

# The kinds of sealed messages, and the words that answer terms.
TERMS: Final = "terms"
ROUND: Final = "round"
WORD: Final = "word"
REPLY: Final = "reply"
PAPERS: Final = "papers"
_MOST_TERMS_BYTES: Final = 64 * 1024
# A receipt's text is shorter: see `privacy.ledger`.
_MOST_RECEIPT: Final = "r" * 16 * 1024
# Seconds until a caller at the socket says something.
_FIRST_BYTE_S: Final = 30.0
# Between two looks for a letter, and after a connection that could not be taken.
_LOOK_S: Final = 0.2
_PAUSE_S: Final = 0.1
# Callers that are heard one after the other, and callers that say nothing yet; there is one courier.
_MOST_WAITING: Final = 64
_BACKLOG: Final = 128

_log = private_logger("tacit.client")


@dataclasses.dataclass
class _Epoch:
    """One session with the server, and what was agreed in it."""

    run: int
    bundle: str
    ends: ClientEpoch
    terms: Terms | None = None

    def is_of(self, letter: Letter) -> bool:
        """Whether a letter says that it comes from this epoch's run."""
        return (letter.run, letter.bundle) == (self.run, self.bundle)


class Worker:
    """Answers sealed letters; see the module's text.

    Guarantees:
        Approved: no round is played under terms that the holder has not approved, or has withdrawn since.
        Alike: every answer to a round is as long as a release, whatever is in it (guarantee G12).
    """

    def __init__(
        self,
        holder: Holder,
        *,
        identity: Identity,
        server: str,
        jobs: Jobs,
        policy: Callable[[], Policy],
        code: str,
    ) -> None:
        """Prepares to answer.

        Args:
            holder: The data holder; its account must have a budget.
            identity: Its application identity.
            server: Key of the server application, pinned when the holder enrolled, 64 hex digits.
            jobs: What was offered and decided.
            policy: Reads the standing policy; asked anew for every offer and round.
            code: SHA-256 of the program that runs here, which the holder allowed; terms for another are refused.
        """
        self._holder, self._identity, self._server = holder, identity, server
        self._jobs, self._policy, self._code = jobs, policy, code
        self._app = client_app(lambda context: self._allowed())
        self._epoch: _Epoch | None = None
        # A hello was answered, and the server has not answered back yet.
        self._coming: _Epoch | None = None
        self._turn = threading.Lock()
        self.rounds = 0
        self.last_error = ""

    def _allowed(self) -> Holder:
        """Returns the holder with what its policy allows now."""
        policy = self._policy()
        return dataclasses.replace(self._holder, allow_metrics=policy.metrics, allow_central=policy.central)

    def answer(self, letter: Letter) -> dict[str, Buffer]:
        """Answers one letter."""
        with self._turn:
            try:
                return self._answer(letter)
            except Exception as error:
                self.last_error = type(error).__name__
                _log.exception("a message was not answered; the reason stays on this machine")
                return {LOST: b""}

    def _answer(self, letter: Letter) -> dict[str, Buffer]:
        pieces = letter.pieces
        if set(pieces) == {_name(Step.HELLO)}:
            return {_name(Step.OFFER): self._offer(letter)}
        if _name(Step.ACCEPT) in pieces:
            self._accept(letter)
        epoch = self._epoch
        if epoch is None or not epoch.is_of(letter):
            raise SealError("expected a message of the epoch that is open here, got one of another; start a new one")
        session = epoch.ends.session
        if session is None or _name(Step.MESSAGE) not in pieces:
            raise SealError("expected a message in an open session, got none; start a new one")
        opened = session.read(pieces[_name(Step.MESSAGE)])
        if opened.kind == TERMS:
            return {_name(Step.MESSAGE): session.seal(WORD, 0, self._consider(opened, session, epoch).encode())}
        if opened.kind == PAPERS and epoch.terms is not None and self._took_part(epoch.terms):
            return {_name(Step.MESSAGE): session.seal(PAPERS, 0, self._papers(session.binding.job))}
        if opened.kind == ROUND and epoch.terms is not None:
            return {_name(Step.MESSAGE): self._play(opened, session, epoch.terms, pieces)}
        raise SealError("expected terms, or a round after them, got another message; start a new session")

    def _offer(self, letter: Letter) -> bytes:
        """Answers a hello. Whatever it is, the session that is open goes on until the server has answered back.

        A relay could repeat the hello of an earlier run, which the pinned server did sign; nobody can answer for it.
        """
        known = next((one for one in (self._epoch, self._coming) if one is not None and one.is_of(letter)), None)
        if known is not None:
            return known.ends.offer(letter.pieces[_name(Step.HELLO)])
        ends = ClientEpoch(self._identity, self._server, run=letter.run, bundle=letter.bundle)
        offer = ends.offer(letter.pieces[_name(Step.HELLO)])
        self._coming = _Epoch(letter.run, letter.bundle, ends)
        return offer

    def _accept(self, letter: Letter) -> None:
        """Takes the server's answer to an offer; a new epoch takes the older one's place only now."""
        for epoch in (self._coming, self._epoch):
            if epoch is None or not epoch.is_of(letter):
                continue
            # The server repeats its answer until it has heard from us; the same one again changes nothing.
            with contextlib.suppress(SealError):
                epoch.ends.accept(letter.pieces[_name(Step.ACCEPT)])
                if epoch is self._coming:
                    if self._epoch is not None:
                        self._epoch.ends.close()
                    self._epoch, self._coming = epoch, None

    def _consider(self, opened: Opened, session: ClientSession, epoch: _Epoch) -> str:
        """Returns the word that answers terms."""
        if len(opened.body) > _MOST_TERMS_BYTES:
            raise PlanError("expected the terms of a job, got something longer")
        terms = Terms.from_json(bytes(opened.body))
        if (terms.digest(), terms.job) != (session.binding.terms, session.binding.job):
            raise SealError("expected the terms that the session is bound to, got others; start a new session")
        account = self._holder.book.accounts[self._holder.name]
        shape = self._holder.shape
        # Public facts, so that an operator hears which of them it is.
        if terms.code != self._code:
            return "other-program"
        if (terms.task, terms.inputs, terms.classes) != (self._holder.task.name, tuple(shape.inputs), shape.classes):
            return "other-task"
        job = self._jobs.offer(terms, account, self._policy())
        epoch.terms = terms
        match job.decision:
            case Decision.APPROVED:
                return "ready"
            case Decision.WAITING:
                return "waiting"
        return "refused"

    def _took_part(self, terms: Terms) -> bool:
        """Whether the holder takes part in a job, or did so until it withdrew."""
        decided = self._jobs.get(terms.job)
        return decided is not None and decided.decision in (Decision.APPROVED, Decision.WITHDRAWN)

    def _papers(self, job: str) -> bytes:
        """Returns what the ledger says of the account's budget and of one job, as it was signed; of no other job."""
        book = self._holder.book
        account = book.accounts[self._holder.name].identity
        found: dict[str, Any] = {"changes": []}
        for line in book.content().split(b"\n"):
            # Charges are by far the most lines, and their receipts say what they say.
            if not line or b'"kind":"charge"' in line:
                continue
            entry = json.loads(line)
            if entry["account"] != account:
                continue
            if entry["kind"] == "grant" or (entry["kind"] == "commit" and entry["body"]["job"] == job):
                found[entry["kind"]] = entry
            elif entry["kind"] == "budget":
                found["changes"].append(entry)
        return canonical(found)

    def _play(self, opened: Opened, session: ClientSession, terms: Terms, pieces: Mapping[str, Buffer]) -> memoryview:
        """Plays one round and returns the sealed reply."""
        packet = unpack(opened.body, max_bytes=MOST_BYTES)
        configs, arrays = dict(packet.configs), dict(packet.arrays)
        if _name(Step.BROADCAST) in pieces:
            shared = session.unwrap(opened.round, pieces[_name(Step.WRAP)], pieces[_name(Step.BROADCAST)])
            more = unpack(shared, max_bytes=MOST_BYTES)
            if set(more.configs) or set(more.arrays) & set(arrays):
                raise PlanError("expected a broadcast of arrays that the message itself lacks, got others")
            arrays |= more.arrays
        content = self._reply(opened.round, terms, configs, arrays)
        self.rounds += 1
        configs_out, arrays_out = _parts_of(content)
        shapes = {name: array.shape for name, array in arrays.get("arrays", {}).items()}
        return session.seal(
            REPLY, opened.round, *pack(configs_out, arrays_out), pad_to=reply_bytes(terms.plan, shapes, terms.classes)
        )

    def _reply(
        self,
        number: int,
        terms: Terms,
        configs: Mapping[str, Mapping[str, Scalar]],
        arrays: Mapping[str, Mapping[str, Floats]],
    ) -> RecordDict:
        job = configs.get("job", {})
        asked = (job.get("job"), job.get("round"), job.get("task"), job.get("plan"), job.get("local"), job.get("seed"))
        agreed = (terms.job, number, terms.task, terms.plan.to_json(), terms.local.to_json(), terms.seed)
        decided = self._jobs.get(terms.job)
        if asked != agreed or decided is None or decided.decision is not Decision.APPROVED or decided.terms != terms:
            return RecordDict({"refusal": ConfigRecord({"word": Word.CONFLICT.value})})
        # Flower's messages take their run and sender from here; both mean nothing outside this process.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 1
        message = Message(_records_of(configs, arrays), dst_node_id=1, message_type="train", group_id=str(number))
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        return self._app(message, context).content


def reply_bytes(plan: Plan, shapes: Mapping[str, tuple[int, ...]], classes: int) -> int:
    """Returns the length to which every answer to a round is padded: that of a release with the longest receipt."""
    arrays = {"arrays": {**shapes, **({BIT: (1,)} if plan.quantile else {})}}
    if measured := widths(plan.metrics, classes):
        arrays["metrics"] = dict(measured)
    return packed_bytes({"receipt": {"receipt": _MOST_RECEIPT}}, arrays)


def _name(step: Step) -> str:
    return step.name.lower()


def _parts_of(content: RecordDict) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Floats]]]:
    configs = {name: dict(record) for name, record in content.items() if isinstance(record, ConfigRecord)}
    arrays = {
        name: {key: floats_of(array.data, tuple(array.shape), key) for key, array in record.items()}
        for name, record in content.items()
        if isinstance(record, ArrayRecord)
    }
    return configs, arrays


def _records_of(configs: Mapping[str, Mapping[str, Scalar]], arrays: Mapping[str, Mapping[str, Floats]]) -> RecordDict:
    content = RecordDict({name: ConfigRecord(dict(record)) for name, record in configs.items()})
    for name, record in arrays.items():
        content[name] = ArrayRecord(
            {key: Array("float32", floats.shape, "numpy.ndarray", array_of(floats)) for key, floats in record.items()}
        )
    return content


# -- the socket ------------------------------------------------------------------------------------------------------


class Doorway:
    """The worker's Unix socket: takes letters from whoever may open it, one connection for each."""

    def __init__(self, path: Path, *, group: int | None = None) -> None:
        """Makes the socket.

        Args:
            path: Where; an old socket there is replaced, anything else is not.
            group: Group that may use it too, where the courier runs under another user (guarantee G15); None for
                this user alone.

        Raises:
            RunError: Something else is there, another worker serves it, or the folder cannot be written.
        """
        self._path = path
        try:
            if path.exists() or path.is_symlink():
                if not stat.S_ISSOCK(path.lstat().st_mode):
                    raise RunError(f"expected no file at {path}, got one that is no socket; move it away")
                if not _is_left(path):
                    raise RunError(f"expected no worker at {path} yet, got one; stop it first")
                path.unlink()
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._socket = _bound(path, group)
        except OSError as error:
            raise RunError(f"expected to make the worker's socket at {path}, got: {error.strerror or error}") from None

    def serve(
        self,
        answer: Callable[[Letter], Mapping[str, Buffer]],
        stopping: Callable[[], bool],
        called: Callable[[int], None] = lambda user: None,
    ) -> None:
        """Answers letters until told to stop; a letter that came before is answered first.

        Args:
            answer: Answers one letter.
            stopping: Asked between two letters.
            called: Is told the user of whoever called, as the kernel knows it (guarantee G15).
        """
        letters, over = queue.SimpleQueue[socket.socket](), threading.Event()
        porter = threading.Thread(target=self._receive, args=(letters, over), daemon=True)
        porter.start()
        try:
            while not stopping():
                try:
                    channel = letters.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                with channel:
                    try:
                        letter = read_letter(channel)
                    except Exception:
                        # Whatever it was, it is no reason to end.
                        _log.exception("something that is no letter was handed in")
                        continue
                    # Only who hands in a letter is a courier; others look whether somebody is there.
                    called(_caller(channel))
                    with contextlib.suppress(OSError):
                        answer_letter(channel, answer(letter))
        finally:
            over.set()
            porter.join()
            while not letters.empty():
                letters.get().close()

    def _receive(self, letters: queue.SimpleQueue[socket.socket], over: threading.Event) -> None:
        """Takes connections in while a letter is being answered, and passes on those that say something.

        Training takes minutes. Who looks meanwhile whether somebody is there must not fill the line that a courier
        stands in.
        """
        silent: dict[socket.socket, float] = {}
        with selectors.DefaultSelector() as selector:

            def dismiss(channel: socket.socket) -> None:
                selector.unregister(channel)
                del silent[channel]

            selector.register(self._socket, selectors.EVENT_READ)
            while not over.is_set():
                for key, _ in selector.select(_LOOK_S):
                    if key.fileobj is self._socket:
                        try:
                            channel, _ = self._socket.accept()
                        except OSError:
                            # Gone again, or no descriptor is left: then later.
                            over.wait(_PAUSE_S)
                            continue
                        silent[channel] = time.monotonic()
                        selector.register(channel, selectors.EVENT_READ)
                        continue
                    channel = next(one for one in silent if one is key.fileobj)
                    dismiss(channel)
                    try:
                        speaks = bool(channel.recv(1, socket.MSG_PEEK))
                    except OSError:
                        speaks = False
                    if speaks and letters.qsize() < _MOST_WAITING:
                        letters.put(channel)
                    else:
                        # Somebody looked whether we are there.
                        channel.close()
                late = time.monotonic() - _FIRST_BYTE_S
                crowd = len(silent) - _MOST_WAITING
                for number, (channel, since) in enumerate(list(silent.items())):
                    if since < late or number < crowd:
                        dismiss(channel)
                        channel.close()
        for channel in silent:
            channel.close()

    def close(self) -> None:
        """Takes the socket away."""
        self._socket.close()
        self._path.unlink(missing_ok=True)


def _bound(path: Path, group: int | None) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            made.bind(str(path))
        finally:
            os.umask(before)
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o660)
        made.listen(_BACKLOG)
        made.settimeout(0.5)
    except OSError:
        made.close()
        raise
    return made


def _is_left(path: Path) -> bool:
    """Whether the socket is one that a worker left behind; one that trains does not answer, but it is there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _caller(channel: socket.socket) -> int:
    """Returns the user at the other end of a Unix socket."""
    _, user, _ = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)

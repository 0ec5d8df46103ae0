"""The local engine: many clients on one machine, behind Flower's own `Grid` interface.

A `ServerApp` and a `ClientApp` written for Flower's Message API run here unchanged. With one worker the
engine calls the `ClientApp` directly in this process: nothing is serialised and nothing waits for anything.
With several, worker processes take shares of each cohort; what a client computes does not depend on their
number.

Here live the grid, its worker processes and the loading of an app from its folder. Flower's Ray engine has
`simulations.ray_engine`; partitions and scenarios have modules of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import difflib
import importlib
import itertools
import logging
import math
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
import tomllib
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar, get_args

from flwr.app import (
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
    UserConfig,
    UserConfigValue,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from privacy.errors import RunError

# What Flower does not promise: `flwr.common`, `flwr.proto` and `flwr.supercore` above, and this block. `Run`
# and `NodeInfo` stand in the public Grid's signatures. A message can be built only by a process that says
# which task it is, and ids are given to messages by whoever carries them.

_CLIENT_RAISED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
_CLIENT_CRASHED = ErrorCode.CLIENT_APP_CRASHED
_NO_SUCH_CLIENT = ErrorCode.NODE_UNAVAILABLE


def _identify(run_id: int) -> None:
    """Names this process, without which Flower refuses to build a message."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_ID


def _stamp(message: Message, message_id: str) -> None:
    """Gives a message its id, as Flower's own carriers do."""
    message.metadata.__dict__["_message_id"] = message_id


# End of what Flower does not promise.

# The clients are 1, 2, ...; Flower calls its server 1 too, and one client would then seem to write to itself.
SERVER_ID = 0

# Failures kept for whoever asks; a population of 100,000 broken clients must not fill the memory.
_FAILURES_KEPT = 1000

# Shares of a cohort per worker: enough that a slow client does not leave the others idle, few enough that the
# model, pickled once per share, stays cheap.
_SHARES_PER_WORKER = 4

# A worker that dies this often in a row before it ever answers will not come up at all.
_START_ATTEMPTS = 3

_log = logging.getLogger(__name__)

NodeConfig = Callable[[int], UserConfig]
Prepare = Callable[[Sequence[tuple[Message, Context]]], None]
App = TypeVar("App", ServerApp, ClientApp)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong in one client; only in a simulation, a real data holder keeps such things to itself.

    Attributes:
        node_id: The client, from 1.
        message_type: What it was asked to do, such as ``train``.
        reason: What its error reply says.
        traceback: Where the exception came from; empty where a worker process died.
    """

    node_id: int
    message_type: str
    reason: str
    traceback: str


class LocalGrid(Grid):
    """Carries messages between one `ServerApp` and virtual clients on this machine.

    Client ids are ``range(1, nodes + 1)``. A client is made when a message comes for it and forgotten
    afterwards, except for what it put into ``context.state``; a population of 100,000 costs no more than its
    cohort. Use it in a ``with`` block, or close it.

    Attributes:
        failures: The latest failures of clients, oldest first.

    Guarantees:
        Order: replies come in the order of the messages, whatever the number of workers.
        Isolation: what a client does to its message or its reply is seen by no other client, although all
            share the same arrays.
        Same result: a deterministic `ClientApp` gives byte-equal replies for any number of workers.
        Preparation: ``prepare`` has returned before any client of the cohort runs.

    Args:
        client_app: The app, or where to find it (``module:attribute``); several workers need the latter.
        nodes: How many clients there are, at least 1.
        run_config: What every client finds in ``context.run_config``.
        node_config: Gives the ``context.node_config`` of the client with this index in ``[0, nodes)``; by
            default Flower's ``partition-id`` (the index) and ``num-partitions``.
        workers: Processes that run clients; 1 means this process.
        threads: PyTorch threads of a client while it runs, for equal rounding in every worker.
        devices: Accelerators dealt to the workers in turn (``0``, ``cuda:1`` or a UUID), each of which then
            sees only its own; with one worker the app chooses for itself.
        prepare: Called in this process with all (message, context) pairs of a push, before any client runs;
            it may put records into ``context.state``.
        app_dir: Folder that the app's module is imported from, where it is not installed.
        on_reply: Called in this process with each reply as it comes.

    Raises:
        RunError: The app cannot be loaded, or the numbers make no sense.
    """

    def __init__(
        self,
        client_app: ClientApp | str,
        *,
        nodes: int,
        run_config: UserConfig,
        node_config: NodeConfig | None = None,
        workers: int = 1,
        threads: int = 1,
        devices: Sequence[str] = (),
        prepare: Prepare | None = None,
        app_dir: Path | None = None,
        on_reply: Callable[[Message], None] | None = None,
    ) -> None:
        for name, number in (("nodes", nodes), ("workers", workers), ("threads", threads)):
            if number < 1:
                raise RunError(f"expected {name} >= 1, got {name}={number}; give at least one")
        if workers > 1 and not isinstance(client_app, str):
            raise RunError(
                f"expected the ClientApp as 'module:attribute' for {workers} workers, got an object; "
                "name the module that a worker process can import, or use one worker"
            )
        # Loaded here for several workers too: a broken app is then one sentence, not a crash of each worker.
        self._app = load_app(client_app, ClientApp, app_dir) if isinstance(client_app, str) else client_app
        self._node_ids = range(1, nodes + 1)
        self._run_config = dict(run_config)
        self._node_config = node_config or (lambda index: {"partition-id": index, "num-partitions": nodes})
        self._threads = threads
        self._prepare = prepare
        self._on_reply = on_reply
        # Random, because apps cache by run id and two grids of one process must not meet in such a cache.
        self._run = Run.create_empty(secrets.randbits(63))
        self._message_ids = itertools.count(1)
        self._states: dict[int, RecordDict] = {}
        self._unpulled: dict[str, Message] = {}
        self._seen_reasons: set[str] = set()
        self._lock = threading.RLock()
        self._closed = False
        self.failures: deque[Failure] = deque(maxlen=_FAILURES_KEPT)
        _identify(self._run.run_id)
        self._workers: _Workers | None = None
        if workers > 1 and isinstance(client_app, str):
            self._workers = _Workers(
                client_app,
                app_dir=app_dir,
                run_id=self._run.run_id,
                count=workers,
                threads=threads,
                devices=tuple(device.removeprefix("cuda:") for device in devices),
            )
            atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes; the grid carries nothing afterwards. Closing twice is harmless."""
        self._closed = True
        if self._workers is not None:
            atexit.unregister(self.close)
            self._workers.close()

    @property
    def run(self) -> Run:
        """What Flower calls the run: here only its id means anything."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Takes another run's identity, as Flower's engines do before they start a `ServerApp`."""
        self._run = run
        _identify(run.run_id)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Builds a message; Flower's older way of writing ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """Returns the ids of all clients, without making any of them."""
        return self._node_ids

    def get_nodes(self) -> Iterator[NodeInfo]:
        """Yields what is known about each client: that it is there."""
        return (NodeInfo(node_id=node_id, status="online") for node_id in self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Runs the clients and keeps their replies until they are pulled; returns the ids of the messages."""
        with self._lock:
            sent = list(messages)
            replies = self._deliver(sent, math.inf)
            ids = [message.metadata.message_id for message in sent]
            for message_id, reply in zip(ids, replies, strict=True):
                if reply is not None:
                    self._unpulled[message_id] = reply
            return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the replies to these messages, in this order; each reply is given once."""
        with self._lock:
            replies = (self._unpulled.pop(message_id, None) for message_id in message_ids)
            return [reply for reply in replies if reply is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Runs the clients and returns their replies in the order of the messages.

        Args:
            messages: To clients; a message to an unknown client gets an error reply.
            timeout: Seconds after which no further reply is waited for; None waits for all. In this process
                the clock is read between clients; a worker process that is still busy then is ended.

        Returns:
            One reply per message, less those that came too late. A client that raised has an error reply.

        Raises:
            ValueError: A message has no positive time to live, or is itself a reply.
            RunError: The grid is closed, or the worker processes do not start.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._lock:
            return [reply for reply in self._deliver(list(messages), deadline) if reply is not None]

    def _deliver(self, messages: list[Message], deadline: float) -> list[Message | None]:
        """Runs a cohort; the reply to each message, None where it came too late."""
        if self._closed:
            raise RunError("expected an open grid, got a closed one; use it inside its 'with' block")
        replies: list[Message | None] = [None] * len(messages)

        def keep(index: int, reply: Message, state: RecordDict, trace: str) -> None:
            self._remember(messages[index].metadata.dst_node_id, state)
            if trace:
                self._note(messages[index], reply, trace)
            _stamp(reply, self._next_id())
            replies[index] = reply
            if self._on_reply is not None:
                self._on_reply(reply)

        tasks: list[_Task] = []
        contexts: dict[int, Context] = {}
        for index, message in enumerate(messages):
            metadata = message.metadata
            if metadata.reply_to_message_id or metadata.ttl <= 0:
                raise ValueError(
                    "expected a message to a client with a positive time to live, "
                    f"got reply_to_message_id={metadata.reply_to_message_id!r}, ttl={metadata.ttl}"
                )
            _stamp(message, self._next_id())
            node_id = metadata.dst_node_id
            if node_id not in self._node_ids:
                reason = f"expected a client in 1..{len(self._node_ids)}, got {node_id}; ask get_node_ids()"
                keep(index, Message(Error(_NO_SUCH_CLIENT, reason), reply_to=message), RecordDict(), reason)
                continue
            # Two messages to one client share its context: the second sees what the first left there.
            if node_id not in contexts:
                contexts[node_id] = self._context(node_id)
            tasks.append(_Task(index, message, contexts[node_id]))
        if self._prepare is not None and tasks:
            self._prepare([(task.message, task.context) for task in tasks])
            # Kept at once: what was prepared (a charge, say) stays true even if the client never answers.
            for node_id, context in contexts.items():
                self._remember(node_id, context.state)
        if self._workers is not None:
            self._workers.run(tasks, deadline, keep)
        else:
            self._run_here(tasks, deadline, keep)
        return replies

    def _run_here(self, tasks: list[_Task], deadline: float, keep: _Keep) -> None:
        """Runs clients in this process, one after the other."""
        with _threads(self._threads) as limit:
            for task in tasks:
                if time.monotonic() >= deadline:
                    return
                limit()
                reply, trace = _answer(self._app, task.message, task.context)
                if reply.has_content():
                    # A client may keep what it sends, and must not change it in the server's hands later.
                    reply.content = _own(reply.content)
                keep(task.index, reply, task.context.state, trace)

    def _context(self, node_id: int) -> Context:
        """A client's context, with what it remembers from earlier messages."""
        return Context(
            run_id=self._run.run_id,
            node_id=node_id,
            node_config=self._node_config(node_id - 1),
            state=self._states.get(node_id) or RecordDict(),
            run_config=dict(self._run_config),
        )

    def _remember(self, node_id: int, state: RecordDict) -> None:
        """Keeps a client's state, if there is any."""
        if len(state) > 0:
            self._states[node_id] = state
        else:
            self._states.pop(node_id, None)

    def _note(self, message: Message, reply: Message, trace: str) -> None:
        """Keeps a failure, and says so once for each reason."""
        reason = str(reply.error.reason)
        node_id = message.metadata.dst_node_id
        self.failures.append(
            Failure(
                node_id=node_id,
                message_type=message.metadata.message_type,
                reason=reason,
                traceback=trace,
            )
        )
        if reason not in self._seen_reasons and len(self._seen_reasons) < _FAILURES_KEPT:
            self._seen_reasons.add(reason)
            _log.warning("client %d failed and sent an error reply: %s\n%s", node_id, reason, trace)

    def _next_id(self) -> str:
        """An id that no other message of this grid has."""
        return f"{self._run.run_id:x}-{next(self._message_ids)}"


def run_app(
    directory: Path,
    *,
    nodes: int = 10,
    workers: int = 1,
    threads: int = 1,
    overrides: Mapping[str, UserConfigValue] | None = None,
) -> None:
    """Runs an unmodified Flower app (Message API) from its folder on the local engine.

    Args:
        directory: The folder with the app's ``pyproject.toml``.
        nodes: How many clients there are.
        workers: Processes that run clients; 1 means this process.
        threads: PyTorch threads of a client while it runs.
        overrides: Values for keys of ``[tool.flwr.app.config]``, nested keys joined with dots.

    Raises:
        RunError: The folder holds no such app, or a key to override is unknown. What the app itself raises is
            not changed.
    """
    folder = directory.expanduser().resolve()
    server, client, config = _read_app(folder)
    for key in overrides or {}:
        if key not in config:
            raise RunError(
                f"expected a key of [tool.flwr.app.config] in {folder / 'pyproject.toml'}, got {key!r}; "
                f"{_near(key, config)}"
            )
    config.update(overrides or {})
    with _importable(folder):
        server_app = load_app(server, ServerApp, folder)
        with LocalGrid(
            client, nodes=nodes, run_config=config, workers=workers, threads=threads, app_dir=folder
        ) as grid:
            context = Context(
                run_id=grid.run.run_id,
                node_id=SERVER_ID,
                node_config={},
                state=RecordDict(),
                run_config=dict(config),
            )
            server_app(grid=grid, context=context)


def load_app(reference: str, kind: type[App], app_dir: Path | None = None) -> App:
    """Imports an app named as Flower names it.

    Args:
        reference: ``module:attribute``; the attribute may be dotted.
        kind: `ServerApp` or `ClientApp`.
        app_dir: Folder to import the module from, first on ``sys.path``.

    Raises:
        RunError: The name has another form, the import fails, or it finds something else.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise RunError(f"expected an app as 'module:attribute', got {reference!r}; such as 'client_app:app'")
    if app_dir is not None and str(app_dir) not in sys.path:
        sys.path.insert(0, str(app_dir))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RunError(
            f"expected to import {module_name!r} for the app {reference!r}, "
            f"got {type(error).__name__}: {error}; "
            "install what the app needs into this environment, or correct the name"
        ) from error
    if app_dir is not None:
        _check_origin(module, app_dir)
    found: Any = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise RunError(
                f"expected {kind.__name__} {attribute!r} in module {module_name!r}, got none of that name; "
                "correct [tool.flwr.app.components]"
            ) from error
    if not isinstance(found, kind):
        raise RunError(
            f"expected {reference!r} to be a {kind.__name__}, got a {type(found).__name__}; name the app object"
        )
    return found


def _check_origin(module: ModuleType, app_dir: Path) -> None:
    """Refuses a module of the same name that was imported from elsewhere: Python keeps one per process."""
    here = app_dir.joinpath(*module.__name__.split("."))
    wanted = [path for path in (here / "__init__.py", here.with_suffix(".py")) if path.is_file()]
    if wanted and module.__file__ is not None and not wanted[0].samefile(module.__file__):
        raise RunError(
            f"expected module {module.__name__!r} from {app_dir}, got the one already imported from "
            f"{module.__file__}; run this app in a process of its own"
        )


def _read_app(folder: Path) -> tuple[str, str, UserConfig]:
    """The components of an app (server, client) and its flat default config."""
    path = folder / "pyproject.toml"
    remedy = "give the folder of a Flower app"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"expected a Flower app with a readable {path}, got {error.strerror!r}; {remedy}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"expected valid TOML in {path}, got {error}; correct the file") from error
    app = _table(project, "tool", "flwr", "app")
    components = _table(app, "components")
    names = []
    for component in ("serverapp", "clientapp"):
        name = components.get(component)
        if not isinstance(name, str):
            raise RunError(
                f"expected {component} = 'module:attribute' under [tool.flwr.app.components] in {path}, "
                f"got {name!r}; {remedy} with a ServerApp and a ClientApp"
            )
        names.append(name)
    return names[0], names[1], _flatten(_table(app, "config"), path)


def _table(document: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """A nested table, empty where there is none."""
    for key in keys:
        inner = document.get(key)
        document = inner if isinstance(inner, dict) else {}
    return document


def _flatten(table: Mapping[str, Any], path: Path, prefix: str = "") -> UserConfig:
    """Nested tables as one, keys joined with dots, as Flower hands them to an app."""
    flat: UserConfig = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, path, f"{prefix}{key}."))
        elif isinstance(value, get_args(UserConfigValue)):
            flat[prefix + key] = value
        else:
            raise RunError(
                f"expected a number, string or boolean for {prefix + key!r} under [tool.flwr.app.config] in "
                f"{path}, got a {type(value).__name__}; Flower allows no others"
            )
    return flat


def _near(key: str, known: Iterable[str]) -> str:
    """What to do about an unknown key."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "add it there or leave it out"


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Puts a folder first on ``sys.path`` for a while."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _answer(app: ClientApp, message: Message, context: Context) -> tuple[Message, str]:
    """A client's reply and an empty string, or an error reply and the traceback."""
    try:
        mine = copy.copy(message)
        mine.content = _own(message.content)
        reply = app(mine, context)
        if not isinstance(reply, Message):
            raise TypeError(f"expected the ClientApp to return a Message, got {type(reply).__name__}")
        if reply.metadata.reply_to_message_id != message.metadata.message_id:
            raise ValueError("expected a reply built with reply_to=message, got an unrelated Message")
    except (Exception, SystemExit) as error:
        # The same words as Flower's engines; SystemExit too, because one client must not end the federation.
        reason = f"{type(error)}:<'{error}'>"
        return Message(Error(_CLIENT_RAISED, reason), reply_to=message), traceback.format_exc()
    return reply, ""


def _own(content: RecordDict) -> RecordDict:
    """The same records in containers of one's own; the bytes of the arrays are immutable and stay shared.

    Flower's clients get a message of their own from the network. Here all clients of a round get one object,
    and the first that writes to it (``to_torch_state_dict(keep_input=False)`` empties it) would change it for
    the rest.
    """
    mine = RecordDict()
    for name, record in content.items():
        twin: Any = record.copy()
        if isinstance(record, ConfigRecord | MetricRecord):
            for key, value in twin.items():
                if isinstance(value, list):
                    twin[key] = value.copy()
        mine[name] = twin
    return mine


@contextlib.contextmanager
def _threads(count: int) -> Iterator[Callable[[], None]]:
    """Yields a function that limits PyTorch to ``count`` threads if it is imported; undone at the end."""
    before: list[int] = []

    def limit() -> None:
        torch = sys.modules.get("torch")
        if torch is not None and not before:
            before.append(torch.get_num_threads())
            torch.set_num_threads(count)

    try:
        yield limit
    finally:
        if before and before[0] != count:
            sys.modules["torch"].set_num_threads(before[0])


@dataclasses.dataclass(frozen=True)
class _Task:
    """One message on its way to a client, and its place in the cohort."""

    index: int
    message: Message
    context: Context


_Keep = Callable[[int, Message, RecordDict, str], None]


class _Worker:
    """One worker process as this process sees it."""

    def __init__(self, start: Callable[[Connection], Any]) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        try:
            self.process = start(theirs)
        finally:
            # The worker has the other end; a copy of it here would hide the worker's death.
            theirs.close()
        self.ready = False
        self.share: deque[_Task] = deque()

    @property
    def idle(self) -> bool:
        return self.ready and not self.share

    def take(self, share: Sequence[_Task]) -> None:
        """Hands over a share of the cohort, pickled in one go: what its messages have in common goes once."""
        self.share = deque(share)
        # A worker that has just died is found by its sentinel, and its share goes to another.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send([(task.message, task.context) for task in share])

    def end(self, patience_s: float) -> None:
        """Ends the process: by closing its pipe if it is idle, otherwise at once."""
        self.pipe.close()
        if self.idle:
            self.process.join(patience_s)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()


class _Workers:
    """Worker processes that share out cohorts and are replaced when they die."""

    def __init__(
        self,
        reference: str,
        *,
        app_dir: Path | None,
        run_id: int,
        count: int,
        threads: int,
        devices: tuple[str, ...],
    ) -> None:
        self._arguments = (reference, app_dir, run_id, threads)
        self._devices = devices
        self._context = _process_context(reference, app_dir, spawn=bool(devices))
        self._failed_starts = 0
        self._members: list[_Worker] = []
        for slot in range(count):
            self._members.append(self._start(slot))

    def run(self, tasks: list[_Task], deadline: float, keep: _Keep) -> None:
        """Runs tasks until all are answered or the deadline (of the monotonic clock) has passed."""
        waiting = self._shares(tasks)
        try:
            while waiting or any(member.share for member in self._members):
                for member in self._members:
                    if waiting and member.idle:
                        member.take(waiting.popleft())
                if not self._wait(deadline):
                    return
                for slot, member in enumerate(self._members):
                    self._listen(slot, member, waiting, keep)
        finally:
            # Too late, interrupted or failed: whoever is still at work would answer into the next round.
            for slot, member in enumerate(self._members):
                if member.share:
                    self._replace(slot)

    def close(self) -> None:
        """Ends all processes; the second time there are none."""
        while self._members:
            self._members.pop().end(patience_s=5.0)

    def _shares(self, tasks: list[_Task]) -> deque[list[_Task]]:
        """Cuts a cohort into shares; all messages to one client stay together and in order."""
        clients: dict[int, list[_Task]] = {}
        for task in tasks:
            clients.setdefault(task.context.node_id, []).append(task)
        groups = list(clients.values())
        size = max(1, math.ceil(len(groups) / (len(self._members) * _SHARES_PER_WORKER)))
        return deque(
            list(itertools.chain.from_iterable(groups[start : start + size])) for start in range(0, len(groups), size)
        )

    def _wait(self, deadline: float) -> bool:
        """Sleeps until a worker has something to say or has died; False once the deadline has passed."""
        left = None if deadline == math.inf else deadline - time.monotonic()
        if left is not None and left <= 0:
            return False
        sources = [source for member in self._members for source in (member.pipe, member.process.sentinel)]
        return bool(connection.wait(sources, left))

    def _listen(self, slot: int, member: _Worker, waiting: deque[list[_Task]], keep: _Keep) -> None:
        """Takes in what a worker has said; replaces it if it is dead."""
        # Asked before the pipe is emptied: what a dying worker still sent is then surely in the pipe.
        alive = member.process.is_alive()
        try:
            while member.pipe.poll():
                word = member.pipe.recv()
                if not member.ready:
                    self._greet(member, word)
                    continue
                reply, state, trace = word
                keep(member.share.popleft().index, reply, state, trace)
        except (EOFError, OSError):
            alive = False
        if alive:
            return
        if not member.ready:
            self._failed_starts += 1
            if self._failed_starts >= _START_ATTEMPTS:
                raise RunError(
                    f"expected worker processes to start, got {self._failed_starts} that died first; "
                    "use workers=1 to see why"
                )
        code = self._replace(slot)
        if member.share:
            lost = member.share.popleft()
            # The others of its share had not begun; another worker runs them.
            if member.share:
                waiting.appendleft(list(member.share))
            reason = f"worker process ended with exit code {code} while it ran this client"
            reply = Message(Error(_CLIENT_CRASHED, reason), reply_to=lost.message)
            keep(lost.index, reply, lost.context.state, reason)

    def _greet(self, member: _Worker, trace: str) -> None:
        """Takes in a worker's first word: nothing, or why it cannot work."""
        if trace:
            raise RunError(
                f"expected a worker process to load the ClientApp {self._arguments[0]!r}, got an error; "
                f"make the app importable there:\n{trace}"
            )
        member.ready = True
        self._failed_starts = 0

    def _replace(self, slot: int) -> int | None:
        """Ends a worker at once and starts another in its place; the exit code of the old one."""
        member = self._members[slot]
        member.process.kill()
        member.process.join()
        code: int | None = member.process.exitcode
        member.end(patience_s=0.0)
        self._members[slot] = self._start(slot)
        return code

    def _start(self, slot: int) -> _Worker:
        """Starts a worker process with its accelerator, if it has one."""
        device = self._devices[slot % len(self._devices)] if self._devices else None

        def start(theirs: Connection) -> Any:
            process = self._context.Process(
                target=_work,
                args=(theirs, *self._arguments, device),
                name=f"tacit-worker-{slot}",
                # Not a daemon: those may have no children, and a DataLoader in a client app may want some.
                daemon=False,
            )
            with _no_interrupts():
                process.start()
            return process

        return _Worker(start)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Lets a process be born deaf to Ctrl-C, which the terminal sends to all: only the parent acts on it."""
    # Started first, because its own start would take the mask off again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _process_context(reference: str, app_dir: Path | None, *, spawn: bool) -> ForkServerContext | SpawnContext:
    """How processes are made: from a server that has the imports done, or afresh where CUDA comes in."""
    if spawn or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # An app from a folder is not preloaded: the fork server might find another module of that name.
    wanted = [__name__, "flwr.clientapp", *(["torch"] if "torch" in sys.modules else [])]
    context.set_forkserver_preload(wanted if app_dir else [*wanted, reference.partition(":")[0]])
    return context


def _work(
    pipe: Connection,
    reference: str,
    app_dir: Path | None,
    run_id: int,
    threads: int,
    device: str | None,
) -> None:
    """The life of a worker process: load the app, answer shares of cohorts, end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if device is not None:
        # Before the app is imported: CUDA reads it once.
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    _identify(run_id)
    try:
        app = load_app(reference, ClientApp, app_dir)
    except RunError:
        pipe.send(traceback.format_exc())
        return
    # Whoever made the pipe may be gone by the time of a reply; there is nobody left to tell.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError), _threads(threads) as limit:
        pipe.send("")
        while True:
            for message, context in pipe.recv():
                limit()
                reply, trace = _answer(app, message, context)
                pipe.send((reply, context.state, trace))


def _end_with_parent() -> None:
    """Ends this process as soon as its parent is gone, however it went and whatever a client is doing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)

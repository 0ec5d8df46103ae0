"""The relay as the server application uses it: one run on Flower's SuperLink, which this process serves itself.

Flower would start the server application from an app bundle, in a process of its own, and ask for replies every three
seconds. This one starts the run over the SuperLink's control interface, takes the run's task as Flower's own server
process would, and asks twenty times a second; both interfaces are on loopback, or behind the operator's own door.
Nothing that is handed to a relay is in clear: see `server.sealed`.

The app bundle of a run holds no code that anybody runs. It is there because a SuperLink wants one, and because its hash
is what clients bind their sessions to (guarantees G15 and G22).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import httpx
from flwr.app import Message
from flwr.cli.build import build_fab_from_files
from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from privacy.errors import RunError
from privacy.identity import Identity, sign_bundle
from server.sealed import RunOverError

# Where the signature of a run's bundle travels; see `clients.tunnel`.
SIGNATURE: Final = "bundle-signature"
_ACQUIRE: Final = frozenset({"/flwr.proto.Runtime/AcquireTask"})
# Seconds between two questions for replies; on loopback each costs a few milliseconds.
_POLL_S: Final = 0.05
_PATIENCE_S: Final = 30.0
# A reply whose sender went away in the middle of it never becomes whole; the server asks again.
_HALF_S: Final = 60.0
# What a SuperLink answers about a run that it has given up, because nobody served it for a minute, or was told to stop.
_OVER: Final = frozenset({httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN})

_log = logging.getLogger("tacit.server")

_PYPROJECT: Final = b"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tacit-deployed"
version = "1.0.0"
description = "Names a run of a Tacit federation; holds no code that anybody runs."
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "tacit"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "nobody:server"
clientapp = "nobody:client"

[tool.flwr.app.config]
bundle-signature = ""
"""
_NOBODY: Final = b"""\
raise SystemExit("expected 'tacit client start' or 'tacit server run' to serve this run, got Flower's own process")
"""


def make_bundle() -> bytes:
    """Returns the app bundle of every deployed run, the same bytes for the same version of Flower."""
    files: dict[str, bytes | Path] = {
        "pyproject.toml": _PYPROJECT,
        "nobody.py": _NOBODY,
        "README.md": b"See the Tacit project.\n",
        "LICENSE": b"See the Tacit project.\n",
    }
    return build_fab_from_files(files)[0]


def _pem(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


class Control:
    """The SuperLink's control interface, as far as an operator of a federation needs it."""

    def __init__(self, address: str, authority: Path | None = None) -> None:
        """Prepares to talk to a SuperLink.

        Args:
            address: Its "HOST:PORT", on loopback.
            authority: PEM file of who signed its certificate; None where it speaks no TLS.
        """
        self._address = address
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=authority is None,
            root_certificates=_pem(authority),
            interceptors=[CliClientHttpInterceptor(), RuntimeVersionHttpInterceptor("flwr CLI")],
        )

    def nodes(self) -> dict[bytes, int]:
        """Returns the node ids of all SuperNodes that are let in, by their public keys as the SuperLink keeps them.

        Raises:
            RunError: The SuperLink does not answer.
        """
        with self._answering():
            listed = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {bytes(node.public_key): int(node.node_id) for node in listed if node.status != "unregistered"}

    def online(self) -> frozenset[int]:
        """Returns the node ids of the SuperNodes that are connected.

        Raises:
            RunError: The SuperLink does not answer.
        """
        with self._answering():
            listed = self._client.ListNodes(ListNodesRequest()).nodes_info
        return frozenset(int(node.node_id) for node in listed if node.status == "online")

    def register(self, public_key: bytes) -> int:
        """Lets in the SuperNode that holds a key; returns its node id, which stays while the SuperLink's database does.

        Args:
            public_key: Its P-384 key, PEM.

        Raises:
            RunError: The SuperLink refuses the key, or does not answer.
        """
        with self._answering():
            return int(self._client.RegisterNode(RegisterNodeRequest(public_key=public_key)).node_id)

    def unregister(self, node_id: int) -> None:
        """Lets a SuperNode in no more.

        Raises:
            RunError: The SuperLink does not know it, or does not answer.
        """
        with self._answering():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start(self, bundle: bytes, signature: str) -> int:
        """Starts a run; returns its id.

        Args:
            bundle: The app bundle.
            signature: The server application's, which every client's tunnel checks (guarantee G22).

        Raises:
            RunError: The SuperLink does not start it, or does not answer.
        """
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        with self._answering():
            settings = user_config_to_proto({SIGNATURE: signature})
            answer = self._client.StartRun(
                StartRunRequest(fab=fab_to_proto(fab), override_config=settings, federation="")
            )
        if not answer.HasField("run_id"):
            raise RunError(f"expected the SuperLink at {self._address} to start a run, got: {answer.note or 'nothing'}")
        return int(answer.run_id)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, ValueError) as error:
            raise RunError(
                f"expected an answer of the SuperLink at {self._address}, got: {error}; tacit server start"
            ) from None


@dataclasses.dataclass
class _Coming:
    """A reply that the SuperLink has handed out, and as much of it as was there."""

    id: str
    tree: ObjectTree
    until: float
    contents: dict[str, bytes] = dataclasses.field(default_factory=dict)


class Relay:
    """One run on a SuperLink, served by this process from `open` to `close`.

    Attributes:
        run_id: Flower's id of the run; another one for every start, also of a resumed job.
        bundle: SHA-256 of the run's app bundle, in hex.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        identity: Identity,
        *,
        authority: Path | None = None,
        ring: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepares a run.

        Args:
            address: The SuperLink's "HOST:PORT", on loopback.
            secret: What proves to it that this is its server process (``--superexec-auth-secret-file``).
            identity: The server application's; signs the run's bundle.
            authority: PEM file of who signed the SuperLink's certificate; None where it speaks no TLS.
            ring: Tells the gateway that messages were pushed, so that nobody waits for the next poll.
        """
        self._address, self._secret, self._identity = address, secret, identity
        self._authority, self._ring, self._root = authority, ring, b""
        self._grid: HttpGrid | None = None
        self._heartbeat: HeartbeatSender | None = None
        self._coming: dict[str, _Coming] = {}
        self.run_id = 0
        self.bundle = ""

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def open(self) -> None:
        """Starts the run and takes its task.

        Raises:
            RunError: The SuperLink does not answer, or gives the task to somebody else.
        """
        bundle = make_bundle()
        self.bundle = hashlib.sha256(bundle).hexdigest()
        signature = sign_bundle(self._identity, bundle)
        insecure, root = self._authority is None, _pem(self._authority)
        self._root = root or b""
        self.run_id = Control(self._address, self._authority).start(bundle, signature)
        grid = HttpGrid(self._address, insecure=insecure, root_certificates=root, token=self._token())
        # Flower would try again by itself, after up to 20 s, and end this process where the run is over.
        vars(grid)["_retry_invoker"] = None
        client = grid._runtime_client

        def beat() -> bool:
            # Whatever the answer: that a run is over is found out, and told, where its messages are asked for.
            with contextlib.suppress(httpx.HTTPError, ValueError):
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
                return True
            return False

        self._grid, self._heartbeat = grid, HeartbeatSender(beat)
        self._heartbeat.start()
        try:
            given = client.PullTaskInput(PullTaskInputRequest())
        except (httpx.HTTPError, ValueError) as error:
            self.close(failed=True)
            raise RunError(f"expected the SuperLink at {self._address} to hand over its run, got: {error}") from None
        # Flower's messages take their run and their sender from here.
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))

    def _token(self) -> str:
        """Takes the run's task; one that a killed process left behind is finished on the way."""
        tasks = RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=self._authority is None,
            root_certificates=_pem(self._authority),
            interceptors=[
                RuntimeVersionHttpInterceptor("SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods=_ACQUIRE),
            ],
        )
        deadline = time.monotonic() + _PATIENCE_S
        with contextlib.closing(tasks):
            while time.monotonic() < deadline:
                try:
                    task = tasks.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
                except (httpx.HTTPError, ValueError) as error:
                    raise RunError(
                        f"expected the SuperLink at {self._address} to hand over its run, got: {error}"
                    ) from None
                if task.token and task.task.run_id == self.run_id:
                    return str(task.token)
                if task.token:
                    self._finish(task.token, "failed")
                time.sleep(_POLL_S)
        raise RunError(
            f"expected the task of run {self.run_id} within {_PATIENCE_S:g} s, got none; start the run again"
        )

    def _finish(self, token: str, status: str) -> None:
        client = RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=self._authority is None,
            root_certificates=_pem(self._authority),
            interceptors=[RuntimeVersionHttpInterceptor("flwr-serverapp"), RuntimeTokenHttpInterceptor(token)],
        )
        with contextlib.closing(client), contextlib.suppress(httpx.HTTPError, ValueError):
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))

    @property
    def grid(self) -> HttpGrid:
        """Flower's grid of the open run."""
        if self._grid is None:
            raise RunError("expected an open run, got one that was not opened; open it first")
        return self._grid

    def nodes(self) -> Mapping[int, str]:
        """Returns the ids of the SuperNodes that are connected, each with the time when it came, as the SuperLink says.

        Raises:
            RunOverError, RunError, httpx.HTTPError: As `pull`.
        """
        with self._serving():
            there = self.grid._runtime_client.GetNodes(GetNodesRequest()).nodes
        return {int(node.node_id): str(node.last_activated_at) for node in there}

    def push(self, messages: Sequence[Message]) -> list[str]:
        """Hands messages over to be fetched by their nodes; returns their ids.

        Raises:
            RunOverError, RunError, httpx.HTTPError: As `pull`.
        """
        with self._serving():
            ids = list(self.grid.push_messages(messages))
        self._ring()
        return ids

    def pull(self, ids: Collection[str]) -> list[Message]:
        """Returns those replies that have come, each once; never waits for one that is still on its way.

        A SuperLink hands a reply out when it is announced, before its bytes are there, and once only. So one that is
        not whole yet is remembered here, and looked at again the next time.

        A reply that is no message, whole as it may be, is let fall: who sent it is asked again.

        Raises:
            RunOverError: The SuperLink has given the run up, or was started anew with another certificate.
            RunError: The SuperLink answers something else.
            httpx.HTTPError: The SuperLink does not answer.
        """
        wanted = set(ids)
        self._coming = {asked: coming for asked, coming in self._coming.items() if asked in wanted}
        if not wanted:
            return []
        replies = []
        with self._serving():
            client, grid = self.grid._runtime_client, self.grid
            if fresh := wanted - self._coming.keys():
                pulled = client.PullMessages(PullAppMessagesRequest(message_ids=sorted(fresh)))
                for head, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                    coming = _Coming(head.metadata.message_id, tree, time.monotonic() + _HALF_S)
                    self._coming[head.metadata.reply_to_message_id] = coming
            fetch = make_pull_object_fn_protobuf(client.PullObject, grid.node, self.run_id)
            for asked, coming in list(self._coming.items()):
                try:
                    for piece in iterate_object_tree(coming.tree):
                        if piece.object_id not in coming.contents:
                            coming.contents[piece.object_id] = fetch(piece.object_id)
                except ObjectUnavailableError:
                    if time.monotonic() < coming.until:
                        continue
                    # Its sender is gone; what was asked will be asked again.
                    del self._coming[asked]
                    continue
                except ObjectPullError:
                    del self._coming[asked]
                    continue
                client.ConfirmMessageReceived(
                    ConfirmMessageReceivedRequest(node=grid.node, run_id=self.run_id, message_object_id=coming.id)
                )
                del self._coming[asked]
                try:
                    message = inflate_object_from_contents(coming.id, coming.contents)
                except Exception as error:
                    # A member made these bytes, and Flower's reader raises whatever it stumbles over.
                    _log.warning("a reply was no message (%s); its sender is asked again", type(error).__name__)
                    continue
                if isinstance(message, Message):
                    message.metadata.__dict__["_message_id"] = coming.id
                    replies.append(message)
        return replies

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        over = f"expected the SuperLink at {self._address} to have run {self.run_id} still, "
        try:
            yield
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in _OVER:
                raise
            raise RunOverError(f"{over}it has ended it; go on with the job: tacit server run --resume") from None
        except httpx.HTTPError:
            # Every start makes another certificate; this run's connection would never trust it.
            with contextlib.suppress(OSError):
                if (_pem(self._authority) or b"") != self._root:
                    raise RunOverError(
                        f"{over}it was started anew; go on with the job: tacit server run --resume"
                    ) from None
            raise
        except (ValueError, ObjectPushError) as error:
            # Flower's word for an answer that is not in its format.
            raise RunError(
                f"expected the SuperLink at {self._address} to answer in Flower's format, got: {error}"
            ) from None

    def close(self, *, failed: bool = False) -> None:
        """Ends the run: clients open no more messages of it."""
        grid, self._grid = self._grid, None
        if grid is None:
            return
        with contextlib.suppress(httpx.HTTPError, ValueError):
            grid._runtime_client.PushTaskOutput(
                PushTaskOutputRequest(sub_status="failed" if failed else "completed", details="")
            )
        if self._heartbeat is not None and self._heartbeat.is_running:
            self._heartbeat.stop()
        grid.close()

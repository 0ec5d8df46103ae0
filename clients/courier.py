"""The courier: Flower's client process on a data holder's machine, which sees nothing but sealed messages.

Flower starts a Python process for every message, and installs and imports the app bundle in it. This one stays, and
runs nothing of a bundle: it takes tasks from the SuperNode's runtime interface on loopback, hands the sealed bytes to
the holder's worker, and pushes what the worker answers. A bundle is a name to it, whose hash it computes and passes on,
and the worker compares it with what the server signed (guarantees G15 and G22). It imports no torch and holds no key.

Wire: a message's content is pieces of bytes, each under the name of its step in `privacy.seal`. Pieces of up to 1 MiB
are the values of a ConfigRecord ``sealed``; longer ones are arrays of bytes in an ArrayRecord ``long``, which Flower
cuts up on its way. The broadcast, which all clients of a round share, is in a record ``shared`` of the one kind or the
other: the relay stores it once. A relay takes a request for each object of a message; so there are few.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import context_from_proto, context_to_proto, fab_from_proto, message_to_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from clients.post import LOST, PIECES, Letter, hand_over
from privacy.errors import RunError

SEALED: Final = "sealed"
LONG: Final = "long"
SHARED: Final = "shared"
_SHORT_BYTES: Final = 1 << 20

_ACQUIRE: Final = frozenset({"/flwr.proto.Runtime/AcquireTask"})
# Seconds. While a job goes on, asking often makes rounds short; a client that waits for days should cost little.
_POLL_S: Final = 0.02
_IDLE_POLL_S: Final = 0.25
_IDLE_AFTER_S: Final = 60.0
_OBJECT_POLL_S: Final = 0.02
_AWAY_S: Final = 1.0
# A message that has not come by then does not come any more.
_MESSAGE_S: Final = 10.0
# What the SuperNode gets to send the last answer on before it is ended too; it looks for answers twice a second.
_SENT_S: Final = 3.0

_log = logging.getLogger("tacit.courier")


def pieces_of(message: Message) -> dict[str, bytes]:
    """Returns the sealed pieces of a message.

    Raises:
        RunError: The message holds anything else.
    """
    content, found = message.content, dict[str, bytes]()
    kinds = {SEALED: (ConfigRecord,), LONG: (ArrayRecord,), SHARED: (ConfigRecord, ArrayRecord)}
    sound = SEALED in content
    for place, record in content.items():
        sound &= type(record) in kinds.get(place, ())
        items = record.items() if sound else ()
        for name, value in items:
            piece = value.data if isinstance(value, Array) else value
            sound &= name in PIECES and name not in found and isinstance(piece, bytes)
            if isinstance(piece, bytes):
                found[name] = piece
    if not sound:
        raise RunError("expected a sealed message, got another; is the server a Tacit server?")
    return found


def content_of(pieces: Mapping[str, bytes]) -> RecordDict:
    """Returns sealed pieces as the content of a Flower message."""
    short = {name: piece for name, piece in pieces.items() if len(piece) <= _SHORT_BYTES}
    long = {
        name: Array("uint8", (len(piece),), "numpy.ndarray", piece)
        for name, piece in pieces.items()
        if name not in short
    }
    content = RecordDict({SEALED: ConfigRecord(dict(short))})
    if long:
        content[LONG] = ArrayRecord(long)
    return content


class Courier:
    """Carries messages between a SuperNode and a worker until it is told to stop."""

    def __init__(self, runtime: str, secret: bytes, worker: Path) -> None:
        """Prepares to carry.

        Args:
            runtime: Address of the SuperNode's runtime interface, "HOST:PORT" on loopback.
            secret: What proves to it that this is its courier (SuperNode's ``--superexec-auth-secret-file``).
            worker: Path of the worker's socket.
        """
        self._runtime, self._worker = runtime, worker
        self._tasks = self._client(
            "SuperExec", SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRE)
        )
        self.carried = 0
        self._last = float("-inf")

    def _client(self, name: str, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self._runtime,
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(name), *interceptors],
        )

    def run(self, stopping: Callable[[], bool]) -> None:
        """Carries one message after the other; a SuperNode that is away is asked again.

        Told to stop, it carries the message that it is at to its end, and leaves the SuperNode time to send the answer:
        a round that is on is not lost by a stop or an upgrade.
        """
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        busy = time.monotonic()
        while not stopping():
            try:
                task = self._tasks.AcquireTask(request)
            except (httpx.HTTPError, ValueError) as error:
                _log.warning("the SuperNode at %s does not answer (%s); asking again", self._runtime, error)
                time.sleep(_AWAY_S)
                continue
            if not task.token:
                time.sleep(_POLL_S if time.monotonic() - busy < _IDLE_AFTER_S else _IDLE_POLL_S)
                continue
            try:
                self.carry(task.token)
                self.carried += 1
                self._last = time.monotonic()
            except (httpx.HTTPError, ValueError, ObjectPullError, ObjectPushError, RunError) as error:
                # One message that cannot be carried is the server's to send again; the next one may be fine.
                _log.warning("a message was not carried (%s); the server sends it again", error)
            except Exception:
                _log.exception("a message was not carried")
            busy = time.monotonic()
        time.sleep(max(0.0, self._last + _SENT_S - time.monotonic()))

    def carry(self, token: str) -> None:
        """Carries the message of one task to the worker, and its answer back."""
        client = self._client("flwr-clientapp", RuntimeTokenHttpInterceptor(token))

        def beat() -> bool:
            # A SuperNode that was started again does not know the task any more. Flower would end this process then;
            # but the worker's answer is only lost, and the next task is another.
            with contextlib.suppress(httpx.HTTPError, ValueError):
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            return True

        # Flower gives up on a task whose process is silent; training may take as long as it takes.
        heartbeat = HeartbeatSender(beat)
        heartbeat.start()
        status, context = "failed", None
        try:
            given = client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
            TaskIdentity.node_id = given.context.node_id
            context, bundle = context_from_proto(given.context), fab_from_proto(given.fab)
            message = self._pull(client, context.node_id, context.run_id)
            answer = self._answer(message, context.run_id, hashlib.sha256(bundle.content).hexdigest())
            self._push(client, Message(content_of(answer), reply_to=message), context.node_id, context.run_id)
            status = "completed"
        finally:
            # No detail: what went wrong at a data holder is nobody else's business (guarantee G12). A ValueError is
            # Flower's word for an answer that is not in its format; whatever it was, heartbeat and connection end.
            with contextlib.suppress(httpx.HTTPError, ValueError):
                client.PushTaskOutput(
                    PushTaskOutputRequest(
                        context=context_to_proto(context) if context else None, sub_status=status, details=""
                    )
                )
            heartbeat.stop()
            client.close()

    def _answer(self, message: Message, run_id: int, bundle: str) -> dict[str, bytes]:
        """Returns the worker's answer, or the word for none: a SuperNode would wait a minute for no reply."""
        try:
            return hand_over(self._worker, Letter(run_id, bundle, pieces_of(message)))
        except RunError as error:
            _log.warning("%s", error)
            return {LOST: b""}

    def _pull(self, client: RuntimeHttpClient, node_id: int, run_id: int) -> Message:
        node, deadline = Node(node_id=node_id), time.monotonic() + _MESSAGE_S
        # A SuperNode makes the task first, and stores its message then.
        while not (trees := client.PullMessages(PullAppMessagesRequest()).message_object_trees):
            if time.monotonic() > deadline:
                raise RunError(f"expected the message of a task within {_MESSAGE_S:g} s, got none")
            time.sleep(_POLL_S)
        if len(trees) != 1:
            raise RunError(f"expected one message for a task, got {len(trees)}")
        tree = trees[0]
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(client.PullObject, node, run_id),
            make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run_id),
            return_type=Message,
            initial_backoff=_OBJECT_POLL_S,
            backoff_cap=10 * _OBJECT_POLL_S,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def _push(self, client: RuntimeHttpClient, reply: Message, node_id: int, run_id: int) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            pushed = client.PushMessages(
                PushAppMessagesRequest(
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                )
            )
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(client.PushObject, Node(node_id=node_id), run_id, pushed.session_id),
                object_ids_to_push=set(pushed.objects_to_push),
            )

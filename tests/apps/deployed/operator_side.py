"""The server's side of a live test: registers nodes, starts runs, and is their ServerApp.

    python operator_side.py ADDRESS AUTHORITY WAKE KEY_FILE...

Reads one line of JSON per run, {"signature": S, "rounds": R, "wait": W}; prints one per round, its seconds and replies.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import flwr.superlink.grid.http_grid
import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from server.gateway import ring

# The first try of a reply that is not all there yet comes after 1 s otherwise.
flwr.superlink.grid.http_grid.pull_objects = functools.partial(
    flwr.superlink.grid.http_grid.pull_objects, initial_backoff=0.01, backoff_cap=0.05
)


class Grid(HttpGrid):
    """Rings the gateway after it pushed, and looks for replies every 20 ms."""

    wake = Path()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting, replies, end = set(self.push_messages(list(messages))), [], time.time() + (timeout or 0)
        ring(self.wake)
        while waiting and time.time() < end:
            found = list(self.pull_messages(waiting))
            replies += found
            waiting -= {message.metadata.reply_to_message_id for message in found}
            time.sleep(0.02)
        return replies


def main() -> None:
    address, authority, wake, *keys = sys.argv[1:]
    roots = Path(authority).read_bytes()
    version = RuntimeVersionHttpInterceptor
    control = ControlHttpClient.from_server_address(address, False, roots, [version(component_name="flwr CLI")])
    queue = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=roots,
        interceptors=[version(component_name="SuperExec")],
    )
    Grid.wake = Path(wake)
    for key in keys:
        private = load_ssh_private_key(Path(key).read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        public = public_key_to_bytes(private.public_key())
        while True:
            try:
                control.RegisterNode(RegisterNodeRequest(public_key=public))
                break
            except httpx.TransportError:
                time.sleep(0.2)
    bundle = build_fab_from_disk(Path(__file__).parent)
    print(json.dumps({"bundle": bundle.hex()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        config = user_config_to_proto({"bundle-signature": order["signature"]})
        control.StartRun(StartRunRequest(fab=fab_to_proto(fab), override_config=config, federation=""))
        while not (task := queue.AcquireTask(AcquireTaskRequest(supported_task_types={TaskType.SERVER_APP}))).token:
            time.sleep(0.05)
        grid = Grid(address, insecure=False, root_certificates=roots, token=task.token)
        # A SuperLink gives up a task that is silent for a minute, and tells its process to end.
        heart = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
        heart.start()
        start = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = start.task_id, start.run.run_id
        TaskIdentity.node_id = start.context.node_id
        grid.set_run(run_from_proto(start.run))
        until = time.time() + 60
        while len(nodes := list(grid.get_node_ids())) < len(keys) and time.time() < until:
            time.sleep(0.1)
        for number in range(order["rounds"]):
            began = time.time()
            body = b"MARKER %d" % number
            messages = [
                Message(
                    content=RecordDict({"request": ConfigRecord({"body": body})}),
                    dst_node_id=node,
                    message_type="train",
                    group_id=str(number),
                )
                for node in nodes
            ]
            replies = list(grid.send_and_receive(messages, timeout=order["wait"]))
            right = [m for m in replies if m.has_content() and m.content["reply"]["body"] == body[::-1]]
            torch = any(m.content["reply"]["torch"] for m in right)
            print(json.dumps({"seconds": time.time() - began, "right": len(right), "torch": torch}), flush=True)
        grid._runtime_client.PushTaskOutput(
            PushTaskOutputRequest(
                context=context_to_proto(context_from_proto(start.context)), sub_status=SubStatus.COMPLETED, details=""
            )
        )
        heart.stop()
        grid.close()


if __name__ == "__main__":
    main()

"""A courier in the shortest form: takes tasks from a SuperNode and answers them in this process.

python courier.py ADDRESS
"""

from __future__ import annotations

import sys
import time

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output


def client(address: str, *more: object) -> RuntimeHttpClient:
    name = "flwr-clientapp" if more else "SuperExec"
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=name), *more],
    )


def serve(address: str, token: str) -> None:
    with client(address, RuntimeTokenHttpInterceptor(token)) as task:
        context = context_from_proto(task.PullTaskInput(PullTaskInputRequest()).context)
        # The SuperNode makes the task before it has the message.
        while not (found := task.PullMessages(PullAppMessagesRequest())).messages_list:
            time.sleep(0.01)
        tree, node = found.message_object_trees[0], Node(node_id=context.node_id)
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(task.PullObject, node, context.run_id),
            make_confirm_message_received_fn_protobuf(task.ConfirmMessageReceived, node, context.run_id),
            return_type=Message,
            initial_backoff=0.01,
            backoff_cap=0.05,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        body = bytes(message.content["request"]["body"])
        reply = RecordDict({"reply": ConfigRecord({"body": body[::-1], "torch": int("torch" in sys.modules)})})
        push_message(task, Message(content=reply, reply_to=message), context)
        push_task_output(task, context, SubStatus.COMPLETED, "")


def main() -> None:
    address = sys.argv[1]
    queue = client(address)
    while True:
        try:
            found = queue.AcquireTask(AcquireTaskRequest(supported_task_types={TaskType.CLIENT_APP}))
            if found.HasField("task") and found.token:
                serve(address, found.token)
        except httpx.TransportError:
            time.sleep(0.2)
        time.sleep(0.02)


if __name__ == "__main__":
    main()

"""A ClientApp whose actions show what an engine does with its clients, or try what it must survive."""

import os
import signal
import time

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def partition(context: Context) -> int:
    return context.node_config["partition-id"]


@app.train("add")
def add(message: Message, context: Context) -> Message:
    """The model plus a vector that depends on the client alone."""
    model = message.content["arrays"].to_numpy_ndarrays()[0]
    update = np.random.default_rng(partition(context)).normal(size=model.shape)
    metrics = MetricRecord({"partition": partition(context), "pid": os.getpid(), "num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord([model + update]), "metrics": metrics}), reply_to=message)


@app.train("count")
def count(message: Message, context: Context) -> Message:
    """How often this client was asked, and what was prepared for it."""
    seen = context.state["seen"]["times"] + 1 if "seen" in context.state else 1
    context.state["seen"] = MetricRecord({"times": seen})
    prepared = context.state["prepared"]["round"] if "prepared" in context.state else 0
    metrics = MetricRecord({"times": seen, "prepared": prepared, "now": time.monotonic()})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train("fail")
def fail(message: Message, context: Context) -> Message:
    """Client 2 (partition 1) fails, after it has written down that it began."""
    context.state["begun"] = MetricRecord({"times": 1})
    if partition(context) == 1:
        raise ValueError("no such luck")
    return add(message, context)


@app.train("leave")
def leave(message: Message, context: Context) -> Message:
    """Client 2 (partition 1) tries to end the process politely."""
    if partition(context) == 1:
        raise SystemExit(3)
    return add(message, context)


@app.train("stray")
def stray(message: Message, context: Context) -> Message:
    """A message that answers nothing."""
    return Message(RecordDict(), dst_node_id=1, message_type="train")


@app.train("die")
def die(message: Message, context: Context) -> Message:
    """Client 3 (partition 2) is killed while it runs."""
    if partition(context) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return add(message, context)


@app.train("sleep")
def sleep(message: Message, context: Context) -> Message:
    """Client 1 (partition 0) takes its time."""
    if partition(context) == 0:
        time.sleep(message.content["config"]["seconds"])
    return add(message, context)


@app.train("spoil")
def spoil(message: Message, context: Context) -> Message:
    """Writes all over the message, after it has seen what others left there."""
    config, arrays = message.content["config"], message.content["arrays"]
    clean = config["list"] == [1, 2] and "mine" not in config and len(arrays) == 1
    config["mine"] = True
    config["list"].append(partition(context))
    arrays.to_numpy_ndarrays(keep_input=False)
    message.content["more"] = ConfigRecord()
    return Message(RecordDict({"metrics": MetricRecord({"clean": int(clean)})}), reply_to=message)


@app.train("process")
def process(message: Message, context: Context) -> Message:
    """Where this client runs."""
    config = ConfigRecord({"device": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "pid": os.getpid()})
    return Message(RecordDict({"config": config}), reply_to=message)

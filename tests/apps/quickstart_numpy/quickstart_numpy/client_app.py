"""quickstart-numpy: the client."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart_numpy import task

app = ClientApp()


def load(context: Context):
    return task.load_data(
        context.node_config["partition-id"],
        context.run_config["data.examples"],
        context.run_config["data.features"],
    )


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    # Taking the arrays out of the record saves memory on a real client: the message is the client's own.
    weights, bias = (array.copy() for array in msg.content["arrays"].to_numpy_ndarrays(keep_input=False))
    trainset, _ = load(context)
    loss = task.train(weights, bias, trainset, context.run_config["local-epochs"], msg.content["config"]["lr"])
    metrics = {"train-loss": loss, "num-examples": len(trainset[1])}
    content = RecordDict({"arrays": ArrayRecord([weights, bias]), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    weights, bias = msg.content["arrays"].to_numpy_ndarrays()
    _, testset = load(context)
    loss, accuracy = task.test(weights, bias, testset)
    metrics = {"eval-loss": loss, "eval-acc": accuracy, "num-examples": len(testset[1])}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)

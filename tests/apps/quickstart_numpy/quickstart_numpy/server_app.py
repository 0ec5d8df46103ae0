"""quickstart-numpy: the server."""

import json
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run federated averaging and write what came out."""
    features = context.run_config["data.features"]
    strategy = FedAvg(fraction_evaluate=context.run_config["fraction-evaluate"])
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(features), np.zeros(1)]),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    if context.run_config["result"]:
        Path(context.run_config["result"]).write_text(
            json.dumps(
                {
                    "arrays": [array.tolist() for array in result.arrays.to_numpy_ndarrays()],
                    "accuracy": [metrics["eval-acc"] for metrics in result.evaluate_metrics_clientapp.values()],
                }
            )
        )

"""quickstart-torch: the server."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from quickstart_torch.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run federated averaging and save the model."""
    torch.manual_seed(7)
    strategy = FedAvg(fraction_evaluate=context.run_config["fraction-evaluate"])
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    if context.run_config["result"]:
        torch.save(
            {
                "model": result.arrays.to_torch_state_dict(),
                "accuracy": [metrics["eval_acc"] for metrics in result.evaluate_metrics_clientapp.values()],
            },
            context.run_config["result"],
        )

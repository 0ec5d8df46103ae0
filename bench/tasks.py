"""What the benchmarks train: the peers' network on their split, and a model of 100,000 parameters."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from models.shape import Shape
from tacit import Task

# The peers hold out the last fifth of each of two clients' records: 718 + 718 remain.
PEER_RECORDS = 718


def _peer_net(shape: Shape) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def _peer_data() -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data / 16, dtype=torch.float32), digits.target.tolist()
    train, test = [], []
    for client in range(2):
        mine = list(range(client, len(targets), 2))
        train += [(inputs[i], targets[i]) for i in mine[:PEER_RECORDS]]
        test += [(inputs[i], targets[i]) for i in mine[PEER_RECORDS:]]
    return train, test


PEER = Task(
    name="peer",
    summary="the peers' digits network",
    record="one handwritten digit",
    data=_peer_data,
    shape=Shape(inputs=(64,), classes=10),
    declared_records=2 * PEER_RECORDS,
    build=_peer_net,
)

WIDE = Task(
    name="wide",
    summary="a perceptron of 100,000 parameters on digits",
    record="one handwritten digit",
    data=_peer_data,
    shape=Shape(inputs=(64,), classes=10),
    declared_records=2 * PEER_RECORDS,
    build=lambda shape: nn.Sequential(nn.Linear(64, 1330), nn.Tanh(), nn.Linear(1330, 10)),
)

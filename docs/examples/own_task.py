"""A task of your own: two interleaved half moons, told apart by a small network.

Run it from the folder that holds this file::

    tacit simulate --task own_task:TASK
"""

import torch
from sklearn.datasets import make_moons
from torch import nn
from torch.utils.data import TensorDataset

from models.task import Shape, Task


def moons() -> tuple[TensorDataset, TensorDataset]:
    """Returns 2000 points for training and 400 for testing: pairs of a float32 input and an int64 class."""
    points, labels = make_moons(n_samples=2400, noise=0.2, random_state=0)
    # Public constants: the moons lie between -1.5 and 2.5 whatever points were drawn.
    inputs = torch.from_numpy(points).float().clamp(-1.5, 2.5) / 2
    classes = torch.from_numpy(labels).long()
    return TensorDataset(inputs[:2000], classes[:2000]), TensorDataset(inputs[2000:], classes[2000:])


def network(shape: Shape) -> nn.Module:
    """Returns a network of layers that treat every record alone (GroupNorm is fine, BatchNorm is not)."""
    return nn.Sequential(nn.Linear(shape.inputs[0], 32), nn.Tanh(), nn.Linear(32, shape.classes))


TASK = Task(
    name="moons",
    summary="two half moons, a worked example",
    record="one point in the plane",
    data=moons,
    shape=Shape(inputs=(2,), classes=2),
    declared_records=2000,
    build=network,
    defaults={"rounds": 20, "steps-per-round": 5, "sample-rate": 0.5, "l2-clip": 0.5, "lr": 2.0},
)

"""How a round's updates meet: means with public weights, and what the server does with the mean.

Weights are uniform, or sizes that the plan declares. A client's word never sets its weight: it would be an uncharged
count, and a lever to take over the model (guarantee G1, trap T24).

FedAvg, FedProx and FedAvgM run through Flower's own strategies. FedAdam is ours: flwr 1.41 corrects the bias of its
moments with the exponent ``server_round + 1`` where Adam has the number of updates, and keeps no state across restarts.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedAvgM

from privacy.plan import require

Arrays = dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]

_WEIGHT: Final = "public-weight"


class Strategy(StrEnum):
    """What the server does with the mean of a round's updates."""

    FEDAVG = "fedavg"
    FEDPROX = "fedprox"
    FEDAVGM = "fedavgm"
    FEDADAM = "fedadam"


@dataclasses.dataclass
class Aggregator:
    """Turns a round's updates into the next model; all its state can be saved and restored.

    Attributes:
        strategy: Which rule.
        lr: Server learning rate > 0.
        momentum: FedAvgM's momentum, or FedAdam's beta1, in [0, 1).
        beta2: FedAdam's second decay, in [0, 1).
        tau: FedAdam's adaptivity floor, > 0.
        moments: Saved state by name: "m" and "v" per parameter.
        updates: Rounds aggregated so far.

    References:
        McMahan et al. (2017), FedAvg; Li et al. (2020), FedProx; Hsu, Qi & Brown (2019), FedAvgM;
        Reddi et al. (2021), FedAdam.
    """

    strategy: Strategy = Strategy.FEDAVG
    lr: float = 1.0
    momentum: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    moments: dict[str, Arrays] = dataclasses.field(default_factory=dict)
    updates: int = 0

    def __post_init__(self) -> None:
        require(self.lr > 0, f"expected server-lr > 0, got {self.lr}")
        require(0 <= self.momentum < 1, f"expected 0 <= server-momentum < 1, got {self.momentum}")
        # Flower reports every aggregation at level INFO; our own round line says it better.
        logging.getLogger("flwr").setLevel(logging.WARNING)

    def step(self, model: Arrays, updates: Sequence[tuple[Arrays, float]]) -> Arrays:
        """Returns the next model.

        Args:
            model: Current trainable parameters by name.
            updates: Each client's parameters after local training, with its public weight > 0; at least one.
        """
        self.updates += 1
        replies = [_reply(update, weight) for update, weight in updates]
        if self.strategy is Strategy.FEDAVGM:
            return self._fedavgm(model, replies)
        mean, _ = FedAvg(weighted_by_key=_WEIGHT).aggregate_train(self.updates, replies)
        if mean is None:
            raise AssertionError("an aggregation of at least one update gives a model")
        averaged = {name: array.numpy() for name, array in mean.items()}
        if self.strategy is Strategy.FEDADAM:
            return self._fedadam(model, averaged)
        if self.lr == 1.0:
            return _float32(averaged)
        return _float32({name: model[name] + self.lr * (averaged[name] - model[name]) for name in model})

    def _fedavgm(self, model: Arrays, replies: Sequence[Message]) -> Arrays:
        rule = FedAvgM(weighted_by_key=_WEIGHT, server_learning_rate=self.lr, server_momentum=self.momentum)
        rule.current_arrays = ArrayRecord({name: Array(value) for name, value in model.items()})
        # Flower keeps the momentum as a list in the order of the arrays; restored here so that a resumed run equals
        # an undisturbed one.
        rule.momentum_vector = [self.moments["m"][name] for name in model] if "m" in self.moments else None
        mean, _ = rule.aggregate_train(self.updates, replies)
        if mean is None:
            raise AssertionError("an aggregation of at least one update gives a model")
        if rule.momentum_vector is not None:
            self.moments["m"] = _float32(dict(zip(model, rule.momentum_vector, strict=True)))
        return _float32({name: array.numpy() for name, array in mean.items()})

    def _fedadam(self, model: Arrays, averaged: Arrays) -> Arrays:
        first = self.moments.get("m", {name: np.zeros_like(value) for name, value in model.items()})
        second = self.moments.get("v", {name: np.zeros_like(value) for name, value in model.items()})
        delta = {name: averaged[name] - model[name] for name in model}
        first = {name: self.momentum * first[name] + (1 - self.momentum) * delta[name] for name in model}
        second = {name: self.beta2 * second[name] + (1 - self.beta2) * delta[name] ** 2 for name in model}
        self.moments = {"m": _float32(first), "v": _float32(second)}
        rate = self.lr * np.sqrt(1 - self.beta2**self.updates) / (1 - self.momentum**self.updates)
        return _float32({n: model[n] + rate * first[n] / (np.sqrt(second[n]) + self.tau) for n in model})


def _float32(arrays: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.floating]]]) -> Arrays:
    return {name: np.asarray(value, dtype=np.float32) for name, value in arrays.items()}


class _Decoded(Array):
    """An array that was decoded already: Flower's strategies ask for ``numpy()`` and would parse and copy it again."""

    def __init__(self, value: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
        # Set directly: the constructor's sorting of its arguments costs more than the mean of a small array.
        self.__dict__.update(dtype="float32", shape=value.shape, stype="numpy.ndarray", data=b"", _value=value)

    def numpy(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """Returns the decoded array itself; strategies only read it."""
        value: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = self.__dict__["_value"]
        return value


def _reply(update: Arrays, weight: float) -> Message:
    """Wraps an update as Flower's strategies want it; the weight is ours, whatever the client sent."""
    arrays = ArrayRecord()
    for name, value in update.items():
        # One by one: the constructor would copy what it is given into plain arrays.
        arrays[name] = _Decoded(value)
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({_WEIGHT: weight})})
    return Message(content, dst_node_id=0, message_type=MessageType.TRAIN)

"""The client app with reproducible coins and noise: an entry point that only tests can reach (guarantee G11).

Every ledger it charges is marked as a test ledger, and every report over it prints infinity.
"""

import hashlib

import numpy as np
import torch

from simulations.apps import simulated_client


class Seeded:
    """Coins and noise from a seed; never secret."""

    name = "seeded"

    def __init__(self, text: str) -> None:
        self._generator = np.random.Generator(
            np.random.Philox(key=int(hashlib.sha256(text.encode()).hexdigest()[:32], 16))
        )

    def coins(self, n: int, rate: float) -> torch.Tensor:
        return torch.from_numpy(self._generator.random(n) < rate)

    def gaussian(self, n: int) -> torch.Tensor:
        return torch.from_numpy(self._generator.standard_normal(n))

    def seed(self) -> int:
        return int(self._generator.integers(2**63))


class SeededSources:
    """The same coins and noise for the same holder and round, whatever the job."""

    def __call__(self, *, holder: str, job: str, round: int) -> Seeded:
        return Seeded(f"{holder}/{round}")


client = simulated_client(SeededSources())

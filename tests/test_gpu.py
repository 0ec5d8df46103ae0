"""What needs an accelerator; skipped with a reason where there is none."""

import dataclasses

import pytest
import torch

from models.catalog import TASKS
from models.shape import Shape
from privacy.dpsgd import PrivateTrainer, supported_modes
from privacy.plan import Local, Plan
from simulations.run import simulate
from simulations.scenario import Scenario
from tests.apps.seeded import Seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]

TASK, SHAPE = TASKS["digits-cnn"], Shape(inputs=(1, 8, 8), classes=10)
PLAN = Plan(
    sample_rate=0.5,
    expected_batch=50.0,
    l2_clip=1.0,
    noise_multiplier=1.0,
    steps=3,
    rounds=1,
    joins=1,
    epsilon=8.0,
    delta=1e-5,
    records_bound=1000,
)


@pytest.mark.parametrize("mode", supported_modes(TASK.fresh(SHAPE, 0), 1))
def test_a_gpu_gives_the_cpus_model_up_to_rounding(mode):
    inputs, targets = TASK.synthetic(SHAPE, 100, torch.Generator().manual_seed(1))
    results = []
    for device in ("cpu", "cuda"):
        plan = dataclasses.replace(PLAN, mode=mode)
        trainer = PrivateTrainer(TASK.fresh(SHAPE, 0), TASK.loss, plan=plan, local=Local(lr=0.5), device=device)
        start = torch.cat([value.detach().flatten() for value in TASK.fresh(SHAPE, 0).parameters()])
        valid = torch.ones(100, dtype=torch.bool)
        results.append(trainer.train(start, inputs, targets, valid, Seeded("gpu"), lr=0.5).cpu())
    # Three steps of float32 sums over about fifty clipped gradients, in another order: 50 * 2**-24 relative a step.
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", supported_modes(TASK.fresh(SHAPE, 0), 1))
def test_one_record_keeps_its_bound_on_a_gpu_even_where_tf32_is_on(mode):
    inputs, targets = TASK.synthetic(SHAPE, 64, torch.Generator().manual_seed(2))
    valid = torch.ones(64, dtype=torch.bool)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        plan = dataclasses.replace(PLAN, mode=mode)
        trainer = PrivateTrainer(TASK.fresh(SHAPE, 0), TASK.loss, plan=plan, local=Local(), device="cuda")
        whole = trainer.clipped_sum(inputs, targets, valid)
        valid[-1] = False
        less = trainer.clipped_sum(inputs, targets, valid)
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((whole - less).norm()) <= PLAN.l2_clip * (1 + 1e-5)


class Quiet:
    """Watches nothing."""

    def __getattr__(self, name):
        return lambda *_: None


@pytest.mark.parametrize("workers", [1, 2])
def test_the_main_job_runs_on_a_gpu(tmp_path, workers):
    keys = {"device": "cuda", "workers": workers, "rounds": 5}
    summary = simulate(Scenario.layered(None, keys), out=tmp_path / "run", observer=Quiet())
    assert summary["status"] == "finished"
    assert summary["metrics"]["accuracy"] > 0.5

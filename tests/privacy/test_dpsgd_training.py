"""The step: noise of the stated scale, a public divisor, and optimisers that agree with PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from privacy.dpsgd import MOST_EXAMPLES_IN_MEMORY, PrivateTrainer
from privacy.errors import PlanError
from privacy.noise import Keystream, RandomSource
from privacy.plan import Local, Mode, Optimizer
from tests.privacy import planted_dpsgd as planted

NOISE, CLIP, BATCH = 1.1, 0.57721, 7.3891


def nobody(count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Records of which none is usable: every gradient is zero, so that a step is noise and nothing else."""
    return (
        torch.zeros(count, length),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.bool),
    )


def wide_trainer(steps: int) -> PrivateTrainer:
    """200,400 parameters: enough draws to tell a scale that is 2 % off."""
    return planted.make_trainer(
        nn.Sequential(nn.Linear(500, 400)),
        mode=Mode.GHOST,
        steps=steps,
        noise_multiplier=NOISE,
        l2_clip=CLIP,
        expected_batch=BATCH,
    )


def noise_of(trainer: PrivateTrainer, source: RandomSource, count: int = 3) -> Tensor:
    """The sum of all noise in one call, in units of its expected standard deviation."""
    moved = trainer.train(torch.zeros(trainer.size), *nobody(count, 500), source, lr=1.0)
    return -moved.double() * BATCH / (NOISE * CLIP)


# A sample variance of n normal draws has the relative standard deviation sqrt(2 / n) = 0.00316 at n =
# 200,400. Accepting 1 +- 0.0193 (6.1 of them) gives a false alarm of 1e-9 a check; a scale off by 2 % moves
# the variance by 0.0404, which is rejected with a probability above 0.99999999.
ACCEPTED = 6.1 * math.sqrt(2 / 200_400)


def check_noise(source: RandomSource, steps: int) -> None:
    noise = noise_of(wide_trainer(steps), source)
    assert abs(noise.var().item() / steps - 1) <= ACCEPTED
    # The mean of n draws has the standard deviation 1 / sqrt(n).
    assert abs(noise.mean().item()) <= 6.1 * math.sqrt(steps / 200_400)


@pytest.mark.statistical
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_noise_has_the_stated_scale_and_is_fresh_in_every_step(steps: int) -> None:
    check_noise(Keystream(), steps)


class Scaled(planted.Seeded):
    """Planted bug: noise of the wrong scale."""

    def __init__(self, scale: float) -> None:
        super().__init__(3)
        self._scale = scale

    def gaussian(self, n: int) -> Tensor:
        return super().gaussian(n) * self._scale


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("source", "steps"), [(Scaled(0.5), 1), (Scaled(0.97), 1), (Scaled(1.03), 1), (planted.Stuck(), 2)]
)
def test_the_noise_check_fails_on_wrong_scale_and_on_reused_noise(source: RandomSource, steps: int) -> None:
    with pytest.raises(AssertionError):
        check_noise(source, steps)


def check_independence(first: RandomSource, second: RandomSource) -> None:
    """The correlation of n independent pairs has the standard deviation 1 / sqrt(n); 6.1 of them: 1e-9."""
    trainer = wide_trainer(1)
    one, two = noise_of(trainer, first), noise_of(trainer, second)
    assert abs(torch.corrcoef(torch.stack((one, two)))[0, 1].item()) <= 6.1 / math.sqrt(200_400)


@pytest.mark.statistical
def test_the_noise_of_two_calls_is_independent() -> None:
    check_independence(Keystream(), Keystream())
    source = Keystream()
    check_independence(source, source)


@pytest.mark.statistical
def test_the_independence_check_fails_on_a_seed_used_twice() -> None:
    with pytest.raises(AssertionError):
        check_independence(planted.Seeded(5), planted.Seeded(5))


def check_divisor() -> None:
    """One more record changes the step by its own share and by nothing else: no constant knows N."""
    inputs, targets = planted.image_batch(12)
    valid = torch.ones(12, dtype=torch.bool)
    trainer = planted.make_trainer(sample_rate=1.0, steps=1, expected_batch=BATCH, l2_clip=CLIP)
    start = planted.flat_parameters(planted.image_model())

    def step(count: int, source: RandomSource) -> Tensor:
        return start - trainer.train(start, inputs[:count], targets[:count], valid[:count], source, lr=1.0)

    share = trainer.clipped_sum(inputs[11:], targets[11:], valid[11:]).float() / BATCH
    assert (step(12, planted.Noiseless()) - step(11, planted.Noiseless()) - share).norm() <= 1e-5 * share.norm() + 1e-6
    # With the same noise and no usable record the released numbers are the same bytes for every N.
    for count in (1, 11, 12):
        empty = trainer.train(start, *nobody(count, 16), planted.Seeded(4), lr=1.0)
        assert torch.equal(empty, trainer.train(start, *nobody(0, 16), planted.Seeded(4), lr=1.0))


def test_noise_and_divisor_are_the_same_for_n_and_n_plus_one_records() -> None:
    check_divisor()


def test_the_divisor_check_fails_where_the_sample_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    planted.dividing_by_the_sample(monkeypatch.setattr)
    with pytest.raises(AssertionError):
        check_divisor()


@pytest.mark.parametrize("mode", planted.MODES)
def test_a_step_is_the_clipped_sum_of_the_coins_over_the_expected_batch(mode: Mode) -> None:
    inputs, targets = planted.image_batch(40)
    valid = torch.ones(40, dtype=torch.bool)
    trainer = planted.make_trainer(mode=mode, steps=1, physical_batch=4)
    start = planted.flat_parameters(planted.image_model())
    moved = trainer.train(start, inputs, targets, valid, planted.Noiseless(9), lr=0.5)
    chosen = planted.Noiseless(9).coins(40, 0.271828)
    assert 0 < chosen.sum() < 40
    total = planted.oracle(planted.image_model(), planted.cross_entropy, inputs[chosen], targets[chosen], 0.57721)
    expected = start.double() - 0.5 * total / 7.3891
    assert (moved - expected).abs().max() < 1e-6


@pytest.mark.parametrize("mode", planted.MODES)
def test_two_trainers_with_equal_sources_give_equal_bytes(mode: Mode) -> None:
    inputs, targets = planted.image_batch(40)
    valid = torch.ones(40, dtype=torch.bool)
    trainers = [planted.make_trainer(mode=mode) for _ in range(2)]
    start = torch.zeros(trainers[0].size)
    first, second = (t.train(start, inputs, targets, valid, planted.Seeded(1), lr=0.3) for t in trainers)
    # A trainer that has worked for another client and round keeps nothing of it.
    trainers[0].train(start + 1, inputs * 2, targets, valid, planted.Seeded(2), lr=0.3)
    third = trainers[0].train(start, inputs, targets, valid, planted.Seeded(1), lr=0.3)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert first.dtype is torch.float32
    assert not start.any()


@pytest.mark.parametrize("mode", planted.MODES)
def test_hostile_and_missing_records_never_make_the_release_non_finite(mode: Mode) -> None:
    trainer = planted.make_trainer(mode=mode, sample_rate=1.0, steps=2)
    start = planted.flat_parameters(planted.image_model())
    for value in (math.nan, math.inf, 3e38, 0.0):
        inputs = torch.full((3, 16), value)
        records = (inputs, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
        assert trainer.train(start, *records, Keystream(), lr=0.1).isfinite().all()
    assert trainer.train(start, *nobody(0, 16), Keystream(), lr=0.1).isfinite().all()


KNOBS = [
    Local(),
    Local(momentum=0.9),
    Local(momentum=0.9, weight_decay=0.02),
    Local(optimizer=Optimizer.ADAM, momentum=0.9),
    Local(optimizer=Optimizer.ADAM, momentum=0.0, weight_decay=0.02),
    Local(optimizer=Optimizer.ADAMW, momentum=0.9, weight_decay=0.02),
    Local(proximal_mu=0.3),
    Local(optimizer=Optimizer.ADAMW, momentum=0.8, weight_decay=0.1, proximal_mu=0.3),
]


@pytest.mark.parametrize("local", KNOBS, ids=lambda k: f"{k.optimizer}-{k.momentum}-{k.weight_decay}-{k.proximal_mu}")
def test_optimisers_agree_with_torch_fed_the_same_gradients(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, lr = 7, 0.03
    trainer = planted.make_trainer(local=local, steps=steps)
    generator = torch.Generator().manual_seed(8)
    gradients = torch.randn(steps, trainer.size, generator=generator)
    start = torch.randn(trainer.size, generator=generator)
    anchor = torch.randn(trainer.size, generator=generator)
    served = iter(gradients.clone())
    monkeypatch.setattr(trainer, "_private_gradient", lambda *_: next(served))
    measured = trainer.train(start, *nobody(0, 16), planted.Seeded(), lr=lr, start_global=anchor)

    weights = nn.Parameter(start.clone())
    betas = (local.momentum, 0.999)
    reference: torch.optim.Optimizer
    match local.optimizer:
        case Optimizer.SGD:
            reference = torch.optim.SGD([weights], lr, momentum=local.momentum, weight_decay=local.weight_decay)
        case Optimizer.ADAM:
            reference = torch.optim.Adam([weights], lr, betas=betas, weight_decay=local.weight_decay)
        case Optimizer.ADAMW:
            reference = torch.optim.AdamW([weights], lr, betas=betas, weight_decay=local.weight_decay)
    for gradient in gradients:
        weights.grad = gradient + local.proximal_mu * (weights.detach() - anchor)
        reference.step()
    # Seven steps of float32 rounding on numbers of size one.
    assert (measured - weights.detach()).abs().max() < 5e-6
    assert (measured - start).abs().max() > 1e-2


def test_the_proximal_pull_leads_back_to_the_start_where_no_anchor_is_given() -> None:
    trainer = planted.make_trainer(local=Local(proximal_mu=0.5), steps=2)
    start = torch.ones(trainer.size)
    alone = trainer.train(start, *nobody(0, 16), planted.Seeded(1), lr=0.1)
    anchored = trainer.train(start, *nobody(0, 16), planted.Seeded(1), lr=0.1, start_global=start)
    elsewhere = trainer.train(start, *nobody(0, 16), planted.Seeded(1), lr=0.1, start_global=start * 3)
    assert torch.equal(alone, anchored)
    assert not torch.equal(alone, elsewhere)


def test_impossible_arguments_are_refused_with_a_remedy() -> None:
    trainer = planted.make_trainer()
    with pytest.raises(PlanError, match=f"flat vector of {trainer.size} parameters"):
        trainer.train(torch.zeros(3), *nobody(0, 16), planted.Seeded(), lr=0.1)
    with pytest.raises(PlanError, match="lr > 0"):
        trainer.train(torch.zeros(trainer.size), *nobody(0, 16), planted.Seeded(), lr=math.nan)
    with pytest.raises(PlanError, match="choose_mode"):
        planted.make_trainer(mode=Mode.AUTO)
    with pytest.raises(PlanError, match="choose_mode"):
        planted.make_trainer(mode=Mode.HOOKS, views=2)
    with pytest.raises(PlanError, match="l2_clip"):
        planted.make_trainer(l2_clip=1e-30)


@pytest.mark.parametrize("size", [65_537, 10**12])
def test_a_plan_may_not_ask_for_passes_beyond_the_public_cap(size: int) -> None:
    assert MOST_EXAMPLES_IN_MEMORY == 65_536
    with pytest.raises(PlanError, match="physical_batch and views of at most 65536"):
        planted.make_trainer(physical_batch=size)
    with pytest.raises(PlanError, match="physical_batch and views of at most 65536"):
        planted.make_trainer(mode=Mode.FUNCTORCH, views=size)


def check_passes(views: int, physical_batch: int) -> None:
    """No pass over records is larger than the one rehearsed, however many records there are."""
    seen: list[tuple[int, ...]] = []

    def measured(output: Tensor, target: Tensor) -> Tensor:
        return planted.cross_entropy(output, target)

    trainer = planted.make_trainer(
        loss=measured, mode=Mode.FUNCTORCH, sample_rate=1.0, views=views, physical_batch=physical_batch, steps=1
    )
    right = trainer._clipper.parts
    trainer._clipper.parts = (
        lambda stacked, targets, seed: (  # type: ignore[method-assign]
            seen.append(tuple(stacked.shape[:2])) or right(stacked, targets, seed)  # type: ignore[func-returns-value]
        )
    )
    trainer.rehearse(planted.image_batch)
    rehearsed = seen.pop()
    assert rehearsed == (max(1, physical_batch // views), views)
    trainer.rehearse(planted.image_batch)
    assert not seen  # once for each trainer
    inputs, targets = planted.image_batch(41)
    trainer.train(torch.zeros(trainer.size), inputs, targets, torch.ones(41, dtype=torch.bool), Keystream(), lr=0.1)
    assert sum(records for records, _ in seen) == 41
    assert all(records <= rehearsed[0] and k == views for records, k in seen)


@pytest.mark.parametrize(("views", "physical_batch"), [(1, 16), (3, 16), (5, 2)])
def test_no_pass_over_records_is_larger_than_the_one_rehearsed(views: int, physical_batch: int) -> None:
    check_passes(views, physical_batch)


def test_the_check_of_passes_fails_where_the_sample_sets_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    planted.one_pass_for_the_whole_sample(monkeypatch.setattr)
    with pytest.raises(AssertionError):
        check_passes(1, 16)


@pytest.mark.parametrize("mode", planted.MODES)
def test_a_rehearsal_moves_nothing_that_training_can_see(mode: Mode) -> None:
    inputs, targets = planted.image_batch(20)
    records = (inputs, targets, torch.ones(20, dtype=torch.bool))
    trained, rehearsed = planted.make_trainer(mode=mode), planted.make_trainer(mode=mode)
    rehearsed.rehearse(planted.image_batch)
    start = torch.zeros(trained.size)
    assert torch.equal(
        trained.train(start, *records, planted.Seeded(1), lr=0.3),
        rehearsed.train(start, *records, planted.Seeded(1), lr=0.3),
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), RuntimeError("can't allocate memory")])
def test_a_rehearsal_that_does_not_fit_in_memory_is_refused_with_the_remedy(error: Exception) -> None:
    def exhausting(views: Tensor, _: torch.Generator) -> Tensor:
        raise error

    with pytest.raises(PlanError, match="lower physical_batch"):
        planted.make_trainer(augment=exhausting).rehearse(planted.image_batch)


def test_a_rehearsal_of_records_that_the_model_cannot_read_is_refused() -> None:
    with pytest.raises(PlanError, match="synthetic records"):
        planted.make_trainer(nn.Linear(5, 3)).rehearse(planted.image_batch)

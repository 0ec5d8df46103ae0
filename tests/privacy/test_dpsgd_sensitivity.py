"""One record moves the clipped sum by at most C, whatever it holds, in every mode (guarantees G8, G10)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from privacy.dpsgd import PrivateTrainer
from privacy.plan import Mode
from tests.privacy import planted_dpsgd as planted

CLIP = 0.57721
COUNT = 6
# Each of the sum's additions rounds a partial sum of norm at most COUNT * CLIP to 2**-24, in both sums.
ROUNDING = 2 * COUNT**2 * CLIP * 2.0**-24

RECORDS = {
    "normal": torch.linspace(-2, 3, 16),
    "large": torch.linspace(-2, 3, 16) * 1e4,
    "zero": torch.zeros(16),
    "NaN": torch.full((16,), math.nan),
    "one NaN": torch.cat((torch.ones(15), torch.tensor([math.nan]))),
    "infinite": torch.full((16,), math.inf),
    "minus infinite": torch.full((16,), -math.inf),
    "huge": torch.full((16,), 3e38),
    "huge and alternating": torch.tensor([3e38, -3e38] * 8),
    "tiny": torch.full((16,), 1e-40),
}


def aligned_batch() -> tuple[Tensor, Tensor]:
    """Records that all pull one way, so that one pulling the other way can turn the whole sum round."""
    inputs = torch.linspace(0.5, 1.5, 16).repeat(COUNT, 1)
    return inputs, torch.zeros(COUNT, dtype=torch.int64)


def check_sensitivity(trainer: PrivateTrainer, record: Tensor, target: int = 1, valid: bool = True) -> None:
    """Replaces, removes and adds the first record; raises AssertionError where the sum moves too far."""
    inputs, targets = aligned_batch()
    everyone = torch.ones(COUNT, dtype=torch.bool)
    changed_inputs, changed_targets, changed_valid = inputs.clone(), targets.clone(), everyone.clone()
    changed_inputs[0], changed_targets[0], changed_valid[0] = record, target, valid
    before = trainer.clipped_sum(inputs, targets, everyone)
    after = trainer.clipped_sum(changed_inputs, changed_targets, changed_valid)
    without = trainer.clipped_sum(inputs[1:], targets[1:], everyone[1:])
    alone = trainer.clipped_sum(changed_inputs[:1], changed_targets[:1], changed_valid[:1])
    empty = trainer.clipped_sum(inputs[:0], targets[:0], everyone[:0])
    assert not empty.any()
    assert alone.norm() <= CLIP  # no tolerance: SHRINK pays for the rounding of one contribution
    assert (after - without).norm() <= CLIP + ROUNDING
    assert (after - before).norm() <= 2 * CLIP + ROUNDING
    assert (before - without).norm() <= CLIP + ROUNDING


@pytest.mark.parametrize("mode", planted.MODES)
@pytest.mark.parametrize("name", RECORDS)
def test_one_record_moves_the_clipped_sum_by_at_most_the_bound(mode: Mode, name: str) -> None:
    check_sensitivity(planted.make_trainer(mode=mode, l2_clip=CLIP), RECORDS[name])


def check_turning_round(mode: Mode) -> None:
    """A record pulling against all others, 10,000 times as hard; zero weights make all classes likely."""
    model = nn.Sequential(nn.Linear(16, 3, bias=False))
    nn.init.zeros_(model[0].weight)
    check_sensitivity(planted.make_trainer(model, mode=mode, l2_clip=CLIP), -1e4 * aligned_batch()[0][0], target=0)


@pytest.mark.parametrize("mode", planted.MODES)
def test_one_record_cannot_turn_the_sum_round(mode: Mode) -> None:
    check_turning_round(mode)


@pytest.mark.parametrize("mode", planted.MODES)
def test_the_turning_check_fails_on_a_clip_after_the_sum(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.clipping_after_the_sum(monkeypatch.setattr)
    with pytest.raises(AssertionError):
        check_turning_round(mode)


@pytest.mark.parametrize("mode", planted.MODES)
def test_a_record_that_is_not_valid_contributes_nothing_and_moves_nobody(mode: Mode) -> None:
    trainer = planted.make_trainer(mode=mode, l2_clip=CLIP)
    inputs, targets = planted.image_batch(COUNT)
    valid = torch.ones(COUNT, dtype=torch.bool)
    valid[2] = False
    expected = trainer.clipped_sum(inputs, targets, valid)
    for name, record in RECORDS.items():
        changed, labels = inputs.clone(), targets.clone()
        # A label that no class has: an invalid row must not even make the loss raise.
        changed[2], labels[2] = record, 99
        assert torch.equal(trainer.clipped_sum(changed, labels, valid), expected), name
    assert not trainer.clipped_sum(inputs, targets, torch.zeros(COUNT, dtype=torch.bool)).any()


@pytest.mark.parametrize("mode", planted.MODES)
@pytest.mark.parametrize("name", ["NaN", "one NaN", "infinite", "minus infinite"])
def test_a_non_finite_record_counts_exactly_like_one_that_is_not_valid(mode: Mode, name: str) -> None:
    trainer = planted.make_trainer(mode=mode, l2_clip=CLIP)
    inputs, targets = planted.image_batch(COUNT)
    valid = torch.ones(COUNT, dtype=torch.bool)
    inputs[2] = RECORDS[name]
    without = valid.clone()
    without[2] = False
    assert torch.equal(trainer.clipped_sum(inputs, targets, valid), trainer.clipped_sum(inputs, targets, without))


@pytest.mark.parametrize(("mode", "views"), [*((mode, 1) for mode in planted.MODES), (Mode.FUNCTORCH, 3)])
def test_a_gradient_that_overflows_contributes_exactly_zero_and_leaves_the_others(mode: Mode, views: int) -> None:
    # Finite inputs with an infinite gradient: their weighted sum overflows float32.
    model = nn.Sequential(nn.Linear(16, 3))
    nn.init.ones_(model[0].weight)
    trainer = planted.make_trainer(
        model, lambda output, target: output.square().sum(1), mode=mode, l2_clip=CLIP, views=views
    )
    inputs, targets = planted.image_batch(COUNT)
    inputs[1] = 3e38
    others = torch.arange(COUNT) != 1
    everyone = torch.ones(COUNT, dtype=torch.bool)
    assert torch.equal(trainer.clipped_sum(inputs, targets, everyone), trainer.clipped_sum(inputs, targets, others))


@pytest.mark.parametrize("mode", planted.MODES)
@pytest.mark.parametrize("l2_clip", [1e-9, 1e-3, 2.71828, 1e6])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e3, 1e9, 1e15, 1e25, 1e35])
def test_a_lone_contribution_stays_within_the_bound_at_every_scale(mode: Mode, l2_clip: float, scale: float) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 9), nn.Linear(9, 3))
    # A quadratic loss: its gradient grows with the record, so that factors reach far below one.
    trainer = planted.make_trainer(model, lambda output, target: output.square().sum(1), mode=mode, l2_clip=l2_clip)
    inputs, targets = planted.image_batch(5)
    for record, target in zip(inputs * scale, targets, strict=True):
        total = trainer.clipped_sum(record[None], target[None], torch.ones(1, dtype=torch.bool))
        assert total.isfinite().all()
        assert total.norm() <= l2_clip


@pytest.mark.parametrize("mode", planted.MODES)
def test_the_bound_is_reached_so_that_the_tests_above_measure_clipping(mode: Mode) -> None:
    trainer = planted.make_trainer(mode=mode, l2_clip=1e-3)
    inputs, targets = planted.image_batch(1)
    total = trainer.clipped_sum(inputs, targets, torch.ones(1, dtype=torch.bool))
    assert 0.999e-3 < total.norm() <= 1e-3


@pytest.mark.parametrize("mode", planted.MODES)
@pytest.mark.parametrize(
    ("plant", "record"),
    [
        (planted.without_clipping, "large"),
        (planted.without_clipping, "huge"),
        (planted.trusting_inputs, "NaN"),
    ],
)
def test_the_sensitivity_check_fails_on_planted_bugs(
    mode: Mode, plant: object, record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch.setattr)  # type: ignore[operator]
    with pytest.raises((AssertionError, IndexError)):
        check_sensitivity(planted.make_trainer(mode=mode, l2_clip=CLIP), RECORDS[record])


@pytest.mark.parametrize("mode", planted.MODES)
def test_the_overflow_check_fails_where_zero_meets_infinity(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.zero_times_infinity(monkeypatch.setattr)
    with pytest.raises(AssertionError):
        test_a_gradient_that_overflows_contributes_exactly_zero_and_leaves_the_others(mode, 1)

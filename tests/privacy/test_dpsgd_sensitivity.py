"""One record moves the clipped sum by at most C, whatever it holds, in every mode (guarantees G8, G10)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from privacy.dpsgd import SHRINK, PrivateTrainer
from privacy.plan import Mode
from tests.privacy import planted_dpsgd as planted

CLIP = 0.57721
COUNT = 6
# The other records' float32 gradients may differ in their last bits from one batch to another (module text).
ROUNDING = 1e-6 * COUNT * CLIP

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


# The sum at size: no tolerance, because SHRINK pays for its rounding. One weight per input and the loss t * w x make a
# record's gradient t * x exactly, so that whatever moves beyond one record's share is rounding of the sum.
CROWDS = [(4096, 2048, 2047), (65_536, 8192, 57_000)]


def check_a_crowd(mode: Mode, physical_batch: int, large: int, small: int) -> None:
    """Adds one record to a crowd built to round badly, and compares the movement with that record's share."""
    model = nn.Sequential(nn.Linear(16, 1, bias=False))
    trainer = planted.make_trainer(
        model, lambda output, target: output[:, 0] * target, mode=mode, l2_clip=1.0, physical_batch=physical_batch
    )
    count = 1 + large + small
    inputs = torch.zeros(count, 16)
    inputs[: 1 + large, 0] = 0.5
    # The large ones alone add up to a power of two, from which 0.6 of a unit in the last place below is lost in float32
    # every time; above it, where the first record lifts them, a unit is twice as large and nothing is.
    inputs[1 + large :, 0] = -0.6 * 2.0 ** (math.log2(large * 0.5) - 1 - 23)
    targets, valid = torch.ones(count), torch.ones(count, dtype=torch.bool)
    moved = trainer.clipped_sum(inputs, targets, valid) - trainer.clipped_sum(inputs[1:], targets[1:], valid[1:])
    assert abs(moved.norm().item() - 0.5) <= 1e-6
    # A record at the bound: its movement may use SHRINK up and nothing beyond.
    inputs[0, 0] = 1e4
    moved = trainer.clipped_sum(inputs, targets, valid) - trainer.clipped_sum(inputs[1:], targets[1:], valid[1:])
    assert 1 - 2 * SHRINK <= moved.norm().item() <= 1


@pytest.mark.parametrize("mode", planted.MODES)
@pytest.mark.parametrize(
    ("physical_batch", "large", "small"), [(1, 128, 127), (256, 128, 127), (256, 2048, 2047), *CROWDS]
)
def test_one_record_moves_the_sum_of_a_crowd_by_at_most_the_bound(
    mode: Mode, physical_batch: int, large: int, small: int
) -> None:
    check_a_crowd(mode, physical_batch, large, small)


@pytest.mark.parametrize("mode", planted.MODES)
@pytest.mark.parametrize(("physical_batch", "large", "small"), CROWDS)
def test_the_crowd_check_fails_where_the_sum_is_float32(
    mode: Mode, physical_batch: int, large: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.summing_in_float32(monkeypatch.setattr)
    with pytest.raises(AssertionError):
        check_a_crowd(mode, physical_batch, large, small)


@pytest.mark.parametrize("mode", planted.MODES)
def test_sums_of_several_products_agree_with_the_oracle(mode: Mode) -> None:
    inputs, targets = planted.image_batch(700)
    trainer = planted.make_trainer(mode=mode, l2_clip=CLIP, physical_batch=1024)
    expected = planted.oracle(planted.image_model(), planted.cross_entropy, inputs, targets, CLIP)
    measured = trainer.clipped_sum(inputs, targets, torch.ones(700, dtype=torch.bool))
    assert (measured - expected).norm() <= 2e-5 * expected.norm()


# Augmentation


def mixup(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Textbook mixup: with probability one half, what it is given is blended with its mean."""
    if torch.rand((), generator=generator) < 0.5:
        return 0.5 * batch + 10 * batch.mean(0)
    return batch


def check_augmented(mode: Mode, views: int) -> None:
    """Adds one hostile record under several seeds; augmentation must not carry it into the others."""
    trainer = planted.make_trainer(mode=mode, views=views, augment=mixup, l2_clip=CLIP)
    inputs, targets = planted.image_batch(24)
    inputs[-1] = 1e4
    valid = torch.ones(24, dtype=torch.bool)
    for seed in range(8):
        full = trainer.clipped_sum(inputs, targets, valid, seed=seed)
        without = trainer.clipped_sum(inputs[:-1], targets[:-1], valid[:-1], seed=seed)
        assert (full - without).norm() <= CLIP + 4 * ROUNDING


MODES_AND_VIEWS = [*((mode, 1) for mode in planted.MODES), (Mode.FUNCTORCH, 2)]


@pytest.mark.parametrize(("mode", "views"), MODES_AND_VIEWS)
def test_augmentation_cannot_mix_records(mode: Mode, views: int) -> None:
    check_augmented(mode, views)


@pytest.mark.parametrize(("mode", "views"), MODES_AND_VIEWS)
def test_the_augmentation_check_fails_where_it_gets_the_batch(
    mode: Mode, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.augmenting_the_batch(monkeypatch.setattr)
    with pytest.raises(AssertionError):
        check_augmented(mode, views)


# Records that make the model raise


def check_raising(mode: Mode) -> None:
    """Records with an unknown token or class: they add exactly nothing, and the others stay."""
    torch.manual_seed(13)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3))
    trainer = planted.make_trainer(model, mode=mode, l2_clip=CLIP, physical_batch=4)
    inputs = torch.randint(7, (10, 5), generator=torch.Generator().manual_seed(2))
    targets, valid = torch.arange(10) % 3, torch.ones(10, dtype=torch.bool)
    for bad in ([5], [0, 9], [4, 5, 6, 7], list(range(10))):
        others = torch.ones(10, dtype=torch.bool)
        others[bad] = False
        expected = trainer.clipped_sum(inputs, targets, others)
        for token, label in ((10_000, 0), (-3, 0), (2, 99)):
            changed, labels = inputs.clone(), targets.clone()
            changed[bad, 2], labels[bad] = token, label
            assert not trainer.clipped_sum(changed[bad], labels[bad], valid[bad]).any()
            assert (trainer.clipped_sum(changed, labels, valid) - expected).norm() <= 4 * ROUNDING


@pytest.mark.parametrize("mode", planted.MODES)
def test_a_record_that_the_model_cannot_digest_adds_nothing_and_takes_nobody_along(mode: Mode) -> None:
    check_raising(mode)


@pytest.mark.parametrize("mode", planted.MODES)
def test_the_digestion_check_fails_where_the_whole_pass_is_dropped(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.dropping_the_whole_pass(monkeypatch.setattr)
    with pytest.raises(AssertionError):
        check_raising(mode)


@pytest.mark.parametrize("mode", planted.MODES)
def test_a_record_that_augmentation_cannot_digest_adds_nothing_and_takes_nobody_along(mode: Mode) -> None:
    def picky(views: Tensor, _: torch.Generator) -> Tensor:
        if views.max() > 50:
            raise ValueError("too bright")
        return views

    inputs, targets = planted.image_batch(COUNT)
    inputs[2] = 99.0
    everyone, others = torch.ones(COUNT, dtype=torch.bool), torch.arange(COUNT) != 2
    total = planted.make_trainer(mode=mode, l2_clip=CLIP, augment=picky).clipped_sum(inputs, targets, everyone)
    expected = planted.make_trainer(mode=mode, l2_clip=CLIP).clipped_sum(inputs, targets, others)
    assert (total - expected).norm() <= ROUNDING


def test_memory_that_does_not_suffice_is_not_taken_for_a_record() -> None:
    def exhausting(views: Tensor, _: torch.Generator) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    inputs, targets = planted.image_batch(COUNT)
    with pytest.raises(torch.OutOfMemoryError):
        planted.make_trainer(augment=exhausting).clipped_sum(inputs, targets, torch.ones(COUNT, dtype=torch.bool))

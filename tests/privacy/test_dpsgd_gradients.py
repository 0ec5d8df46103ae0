"""All modes agree with plain autograd, one record at a time, whatever the layer and the physical batch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from privacy import dpsgd
from privacy.errors import PlanError
from privacy.plan import Mode
from tests.privacy import planted_dpsgd as planted

CLIP = 0.9


def close(measured: Tensor, expected: Tensor) -> bool:
    """Equal up to float32 rounding: 3 to 5 layers accumulate some tens of units in the last place."""
    return bool((measured - expected).norm() <= 2e-5 * expected.norm() + 1e-7)


def everyone(inputs: Tensor) -> Tensor:
    return torch.ones(len(inputs), dtype=torch.bool)


def tokens(count: int) -> Tensor:
    return torch.randint(7, (count, 5), generator=torch.Generator().manual_seed(2))


# Layers under test, the shape of one record before them, and what brings the result back to three classes.
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (6,)),
    "linear without bias": (nn.Linear(6, 4, bias=False), (6,)),
    "linear over a sequence": (nn.Linear(6, 4), (5, 6)),
    "conv1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2), (2, 9)),
    "conv1d same": (nn.Conv1d(2, 4, 4, padding="same"), (2, 9)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    "conv2d strided and grouped": (
        nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 0), groups=2),
        (4, 6, 5),
    ),
    "conv2d dilated without bias": (nn.Conv2d(2, 3, 2, dilation=2, bias=False), (2, 6, 6)),
    "conv2d same": (nn.Conv2d(2, 3, 4, padding="same"), (2, 5, 5)),
    "conv2d depthwise": (nn.Conv2d(3, 3, 3, groups=3), (3, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2, padding=1), (2, 4, 4, 4)),
    "conv3d dilated": (nn.Conv3d(1, 2, 2, dilation=2), (1, 4, 4, 4)),
    "conv3d same": (nn.Conv3d(1, 2, 3, padding="same"), (1, 4, 3, 4)),
    "group norm": (nn.GroupNorm(2, 4), (4, 3, 3)),
    "group norm over features": (nn.GroupNorm(3, 6), (6,)),
    "layer norm": (nn.LayerNorm(6), (6,)),
    "layer norm over a sequence": (nn.LayerNorm(6), (5, 6)),
    "layer norm over two dimensions": (nn.LayerNorm((3, 3)), (4, 3, 3)),
    "rms norm": (nn.RMSNorm(6), (5, 6)),
}


def around(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """A model whose tested layer sits between others, so that it gets and gives gradients."""
    torch.manual_seed(11)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    size = layer(torch.zeros(2, *shape)).flatten(1).shape[1]
    length = torch.zeros(shape).numel()
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(length, length),
        nn.Unflatten(1, shape),
        layer,
        nn.LeakyReLU(0.1, inplace=True),
        nn.Flatten(),
        nn.Linear(size, 3),
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", planted.MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_on_the_allow_list_agrees_with_plain_autograd(mode: Mode, name: str) -> None:
    layer, shape = LAYERS[name]
    model = around(layer, shape)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(6, *shape, generator=generator)
    targets = torch.randint(3, (6,), generator=generator)
    expected = planted.oracle(model, planted.cross_entropy, inputs, targets, CLIP)
    trainer = planted.make_trainer(model, mode=mode, l2_clip=CLIP)
    assert close(trainer.clipped_sum(inputs, targets, everyone(inputs)), expected)


@pytest.mark.parametrize("mode", planted.MODES)
def test_embeddings_of_integer_tokens_agree_with_plain_autograd(mode: Mode) -> None:
    torch.manual_seed(13)
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(20, 3))
    inputs, targets = tokens(8), torch.arange(8) % 3
    expected = planted.oracle(model, planted.cross_entropy, inputs, targets, CLIP)
    trainer = planted.make_trainer(model, mode=mode, l2_clip=CLIP)
    assert close(trainer.clipped_sum(inputs, targets, everyone(inputs)), expected)


@pytest.mark.parametrize("mode", planted.MODES)
def test_frozen_layers_and_single_frozen_parameters_stay_out(mode: Mode) -> None:
    torch.manual_seed(17)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5), nn.Linear(5, 3))
    for parameter in (*model[0].parameters(), model[2].bias, model[4].weight):
        parameter.requires_grad_(False)
    inputs, targets = planted.image_batch(6)
    trainer = planted.make_trainer(model, mode=mode, l2_clip=CLIP)
    assert trainer.names == ("2.weight", "4.bias", "5.weight", "5.bias")
    assert trainer.shapes == ((8, 8), (5,), (3, 5), (3,))
    assert trainer.size == 64 + 5 + 15 + 3
    expected = planted.oracle(model, planted.cross_entropy, inputs, targets, CLIP)
    assert close(trainer.clipped_sum(inputs, targets, everyone(inputs)), expected)


def check_oracle(mode: Mode) -> None:
    """Compares a batch, part of it clipped and part not, with the oracle."""
    inputs, targets = planted.image_batch(9)
    model = planted.image_model()
    norms = [
        planted.gradient(model, planted.cross_entropy, x[None], y).norm() for x, y in zip(inputs, targets, strict=True)
    ]
    clip = torch.stack(norms).median().item() * 1.01
    assert min(norms) < clip < max(norms)
    trainer = planted.make_trainer(model, mode=mode, l2_clip=clip)
    expected = planted.oracle(model, planted.cross_entropy, inputs, targets, clip)
    assert close(trainer.clipped_sum(inputs, targets, everyone(inputs)), expected)


@pytest.mark.parametrize("mode", planted.MODES)
def test_clipped_and_unclipped_examples_agree_with_plain_autograd(mode: Mode) -> None:
    check_oracle(mode)


@pytest.mark.parametrize("mode", planted.MODES)
@pytest.mark.parametrize(
    "plant", [planted.without_clipping, planted.clipping_after_the_sum, planted.mean_instead_of_sum]
)
def test_the_oracle_fails_on_planted_bugs(mode: Mode, plant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch.setattr)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        check_oracle(mode)


@pytest.mark.parametrize("mode", planted.MODES)
def test_the_physical_batch_changes_nothing_but_rounding(mode: Mode) -> None:
    inputs, targets = planted.image_batch(23)
    sums = [
        planted.make_trainer(mode=mode, physical_batch=size).clipped_sum(inputs, targets, everyone(inputs))
        for size in (1, 7, 256)
    ]
    assert close(sums[0], sums[2])
    assert close(sums[1], sums[2])


def check_interruption(mode: Mode) -> None:
    """Interrupts a sum after its second physical batch and compares the next sum with an undisturbed one."""
    records = 0

    def interrupting(views: Tensor, _: torch.Generator) -> Tensor:
        nonlocal records
        records += 1
        if records == 8:
            raise KeyboardInterrupt
        return views

    inputs, targets = planted.image_batch(10)
    trainer = planted.make_trainer(mode=mode, physical_batch=3, augment=interrupting)
    with pytest.raises(KeyboardInterrupt):
        trainer.clipped_sum(inputs, targets, everyone(inputs))
    undisturbed = planted.make_trainer(mode=mode, physical_batch=3).clipped_sum(inputs, targets, everyone(inputs))
    assert torch.equal(trainer.clipped_sum(inputs, targets, everyone(inputs)), undisturbed)


@pytest.mark.parametrize("mode", planted.MODES)
def test_an_interruption_between_physical_batches_leaves_no_residue(mode: Mode) -> None:
    check_interruption(mode)


def test_the_interruption_check_fails_on_a_sum_kept_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    planted.keeping_a_running_sum(monkeypatch.setattr)
    with pytest.raises(AssertionError):
        check_interruption(Mode.HOOKS)


def shaky(views: Tensor, generator: torch.Generator) -> Tensor:
    return views + torch.randn(views.shape, generator=generator)


def views_of(record: Tensor, row: int, seed: int, count: int) -> Tensor:
    """What augmentation makes of one record in one row, ``(K, ...)``."""
    generator = torch.Generator().manual_seed(dpsgd._seed_of(seed, dpsgd._Use.VIEWS, row))
    return shaky(record.repeat(count, 1), generator)


def test_several_views_are_averaged_before_the_clip() -> None:
    views, clip = 4, 0.3
    model = planted.image_model()
    inputs, targets = planted.image_batch(5)
    trainer = planted.make_trainer(
        model, mode=Mode.FUNCTORCH, l2_clip=clip, views=views, augment=shaky, physical_batch=256
    )
    seen = torch.stack([views_of(record, row, 77, views) for row, record in enumerate(inputs)])
    assert (seen[:, 0] - seen[:, 1]).abs().amin(1).gt(0).all()
    before, after = torch.zeros(2, trainer.size, dtype=torch.float64)
    for record, target in zip(seen, targets, strict=True):
        mean = planted.gradient(model, planted.cross_entropy, record, target)
        before += mean * min(1.0, clip / mean.norm().item())
        # The wrong order: every view clipped on its own, and then averaged.
        for view in record:
            one = planted.gradient(model, planted.cross_entropy, view[None], target)
            after += one * min(1.0, clip / one.norm().item()) / views
    measured = trainer.clipped_sum(inputs, targets, everyone(inputs), seed=77)
    assert close(measured, before)
    assert not close(measured, after)


@pytest.mark.parametrize("mode", planted.MODES)
def test_one_augmented_view_agrees_with_plain_autograd(mode: Mode) -> None:
    model = planted.image_model()
    inputs, targets = planted.image_batch(5)
    trainer = planted.make_trainer(model, mode=mode, l2_clip=CLIP, augment=shaky)
    seen = torch.cat([views_of(record, row, 77, 1) for row, record in enumerate(inputs)])
    expected = planted.oracle(model, planted.cross_entropy, seen, targets, CLIP)
    assert close(trainer.clipped_sum(inputs, targets, everyone(inputs), seed=77), expected)


def check_views_alone(mode: Mode, views: int) -> None:
    """A record's views are the same whichever other records are sampled, and in whichever physical batch."""
    inputs, targets = planted.image_batch(9)
    clippers = [
        planted.make_trainer(mode=mode, views=views, augment=shaky, l2_clip=CLIP, physical_batch=size)._clipper
        for size in (2 * views, 256)
    ]
    alone = [clippers[0].sum(inputs, targets, everyone(inputs), torch.tensor([row]), 5) for row in range(len(inputs))]
    for rows in ([4], [2, 4, 7], list(range(9))):
        together = [c.sum(inputs, targets, everyone(inputs), torch.tensor(rows), 5) for c in clippers]
        for total in together:
            assert close(total, torch.stack([alone[row] for row in rows]).sum(0))


MODES_AND_VIEWS = [*((mode, 1) for mode in planted.MODES), (Mode.FUNCTORCH, 3)]


@pytest.mark.parametrize(("mode", "views"), MODES_AND_VIEWS)
def test_the_views_of_a_record_do_not_depend_on_which_others_are_sampled(mode: Mode, views: int) -> None:
    check_views_alone(mode, views)


@pytest.mark.parametrize(("mode", "views"), MODES_AND_VIEWS)
def test_the_check_of_views_fails_where_the_place_in_the_pass_seeds_them(
    mode: Mode, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.seeding_views_by_place_in_the_pass(monkeypatch.setattr)
    with pytest.raises(AssertionError):
        check_views_alone(mode, views)


def test_seeds_of_rows_and_uses_differ_in_the_bits_that_a_generator_reads() -> None:
    seeds = [dpsgd._seed_of(seed, use, row) for seed in (0, 1, 2**62) for use in dpsgd._Use for row in range(1000)]
    assert all(0 <= seed < 2**64 for seed in seeds)
    # 6,000 draws of 32 bits: a chance of 0.4 % for one accidental pair, and these are no draws but constants.
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)


def test_augmentation_in_place_changes_neither_records_nor_other_views() -> None:
    def in_place(views: Tensor, generator: torch.Generator) -> Tensor:
        return views.add_(torch.randn(views.shape, generator=generator))

    inputs, targets = planted.image_batch(5)
    before = inputs.clone()
    sums = [
        planted.make_trainer(mode=Mode.FUNCTORCH, views=3, augment=augment).clipped_sum(
            inputs, targets, everyone(inputs), seed=3
        )
        for augment in (in_place, shaky)
    ]
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("mode", planted.MODES)
def test_a_view_that_is_not_finite_contributes_nothing_and_moves_nobody(mode: Mode) -> None:
    def breaking(views: Tensor, _: torch.Generator) -> Tensor:
        return views / (views[:, :1] != 7)

    inputs, targets = planted.image_batch(6)
    inputs[2, 0] = 7.0
    others = torch.arange(6) != 2
    total = planted.make_trainer(mode=mode, augment=breaking).clipped_sum(inputs, targets, everyone(inputs))
    assert torch.equal(total, planted.make_trainer(mode=mode).clipped_sum(inputs, targets, others))


CPU = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def check_precision(mode: Mode) -> None:
    """A caller's fast and imprecise settings change no bit of the sum, and are as they were afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 64))
    inputs = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    trainer = planted.make_trainer(model, mode=mode)
    expected = trainer.clipped_sum(inputs, torch.arange(64), everyone(inputs))
    before = CPU.fp32_precision
    try:
        CPU.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            measured = trainer.clipped_sum(inputs, torch.arange(64), everyone(inputs))
            assert torch.is_autocast_enabled("cpu")
        assert CPU.fp32_precision == "bf16"
    finally:
        CPU.fp32_precision = before
    assert torch.equal(measured, expected)


@pytest.mark.parametrize("mode", planted.MODES)
def test_reduced_precision_that_a_caller_chose_is_off_in_the_clipped_pass(mode: Mode) -> None:
    check_precision(mode)


@pytest.mark.parametrize("mode", planted.MODES)
def test_the_precision_check_fails_where_the_callers_settings_stay(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.keeping_the_callers_precision(monkeypatch.setattr)
    with pytest.raises((AssertionError, RuntimeError)):
        check_precision(mode)


def interrupt() -> None:
    with dpsgd._full_float32(torch.device("cpu")):
        assert CPU.fp32_precision == "ieee"
        raise KeyboardInterrupt


def test_precision_settings_come_back_after_an_error() -> None:
    before = CPU.fp32_precision
    try:
        CPU.fp32_precision = "bf16"
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        assert CPU.fp32_precision == "bf16"
    finally:
        CPU.fp32_precision = before


@pytest.mark.parametrize("mode", planted.MODES)
def test_dropout_follows_the_seed_and_leaves_the_global_generator_alone(mode: Mode) -> None:
    model = nn.Sequential(nn.Linear(16, 40), nn.Dropout(0.5), nn.Linear(40, 3))
    trainer = planted.make_trainer(model, mode=mode)
    inputs, targets = planted.image_batch(6)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (trainer.clipped_sum(inputs, targets, everyone(inputs), seed=s) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", planted.MODES)
def test_a_loss_that_looks_at_the_whole_batch_sees_one_example_only(mode: Mode) -> None:
    def centred(output: Tensor, target: Tensor) -> Tensor:
        return planted.cross_entropy(output, target) - 5 * output.mean()

    model = planted.image_model()
    inputs, targets = planted.image_batch(6)
    trainer = planted.make_trainer(model, centred, mode=mode, l2_clip=CLIP)
    expected = planted.oracle(model, centred, inputs, targets, CLIP)
    assert close(trainer.clipped_sum(inputs, targets, everyone(inputs)), expected)


def test_only_plain_cross_entropy_is_taken_for_known() -> None:
    functional = nn.functional
    known: list[dpsgd.LossFn] = [
        planted.cross_entropy,
        functools.partial(functional.cross_entropy, reduction="none"),
        lambda output, target: functional.cross_entropy(output, target, reduction="none", label_smoothing=0.1),
    ]
    unknown: list[dpsgd.LossFn] = [
        functional.cross_entropy,
        lambda output, target: planted.cross_entropy(output, target) - output.mean(),
        lambda output, target: planted.cross_entropy(output - output.mean(0), target),
        lambda output, target: planted.cross_entropy(output, target) if len(output) > 3 else output.sum(1),
        lambda output, target: output.square().sum(1),
        nn.CrossEntropyLoss(reduction="none"),
    ]
    assert all(dpsgd._is_cross_entropy(loss) for loss in known)
    assert not any(dpsgd._is_cross_entropy(loss) for loss in unknown)


@pytest.mark.parametrize("mode", planted.MODES)
def test_a_loss_averaged_over_the_batch_is_refused(mode: Mode) -> None:
    inputs, targets = planted.image_batch(6)
    trainer = planted.make_trainer(loss=nn.functional.cross_entropy, mode=mode)
    with pytest.raises(PlanError, match='reduction="none"'):
        trainer.clipped_sum(inputs, targets, everyone(inputs))

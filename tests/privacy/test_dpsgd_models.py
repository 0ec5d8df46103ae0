"""Which models may be trained, in which modes, and what the probe finds (guarantee G10)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from privacy import dpsgd
from privacy.dpsgd import check_model, choose_mode, probe, supported_modes
from privacy.errors import PlanError
from privacy.plan import Mode
from tests.privacy import planted_dpsgd as planted


class Mixing(nn.Module):
    """Subtracts the batch mean: every example's output depends on all of them."""

    def forward(self, batch: Tensor) -> Tensor:
        return batch - batch.mean(0)


class Counting(nn.Module):
    """Counts its calls in a buffer, which no noise protects."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch: Tensor) -> Tensor:
        self.calls += 1
        return batch


class Averaging(nn.Module):
    """Keeps a running mean of its inputs under a name that no list knows."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(16))

    def forward(self, batch: Tensor) -> Tensor:
        self.memory.mul_(0.9).add_(0.1 * batch.mean(0))
        return batch - self.memory


class Remembering(nn.Module):
    """Keeps something of each batch in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, batch: Tensor) -> Tensor:
        self.scale += 0.5
        return batch * self.scale


class OwnLinear(nn.Linear):
    """A subclass: what its forward does is unknown."""


def with_layer(layer: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(layer, nn.Linear(16, 3))


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def old_spectral() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(nn.Linear(16, 16))


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.LazyLinear(16)


REFUSED = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(16), r"GroupNorm\(16, 16\)"),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(24), r"GroupNorm\(8, 24\)"),
    "BatchNorm2d frozen": (lambda: frozen(nn.BatchNorm2d(6)), r"GroupNorm\(2, 6\)"),
    "BatchNorm1d without affine": (lambda: nn.BatchNorm1d(16, affine=False), "GroupNorm"),
    "BatchNorm1d without statistics": (lambda: nn.BatchNorm1d(16, track_running_stats=False), "GroupNorm"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(16), "GroupNorm"),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), "track_running_stats=False"),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)), "spectral_norm"),
    "spectral norm, old": (old_spectral, "spectral_norm"),
    "lazy": (lazy, "one public batch"),
    "embedding with max_norm": (lambda: nn.Embedding(7, 16, max_norm=1.0), "max_norm=None"),
    "embedding by frequency": (
        lambda: nn.Embedding(7, 16, scale_grad_by_freq=True),
        "scale_grad_by_freq=False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_modules_that_mix_or_remember_examples_are_refused_by_name_with_the_fix(name: str) -> None:
    make, fix = REFUSED[name]
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(16, 16)))
    model.body.add_module("suspect", make())
    with pytest.raises(PlanError, match=rf"body\.suspect.*{fix}"):
        check_model(model)
    with pytest.raises(PlanError, match="suspect"):
        planted.make_trainer(model, mode=Mode.FUNCTORCH)


def test_every_refused_module_is_named_in_one_message() -> None:
    with pytest.raises(PlanError, match=r"0 \(BatchNorm1d\).*2 \(BatchNorm1d\)"):
        check_model(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)))


def test_a_model_without_trainable_or_with_other_than_float32_parameters_is_refused() -> None:
    with pytest.raises(PlanError, match="requires_grad"):
        check_model(frozen(nn.Linear(3, 3)))
    with pytest.raises(PlanError, match="float32"):
        check_model(nn.Linear(3, 3).double())


def test_a_model_of_allowed_layers_supports_every_mode_and_several_views_only_one() -> None:
    assert supported_modes(planted.image_model(), 1) == planted.MODES
    assert supported_modes(planted.image_model(), 2) == (Mode.FUNCTORCH,)
    assert supported_modes(nn.Linear(4, 2)) == planted.MODES


def hooked() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda module, args, output: output - output.mean(0))
    return layer


def overridden() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.forward = lambda batch: batch - batch.mean(0)  # type: ignore[method-assign]
    return layer


def tied() -> nn.Module:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    return nn.Sequential(first, second)


def used_twice() -> nn.Module:
    layer = nn.Linear(16, 16)
    return nn.Sequential(layer, nn.Tanh(), layer)


ALONE = {
    "custom module": Mixing,
    "subclass of an allowed layer": lambda: OwnLinear(16, 16),
    "forward hook": hooked,
    "forward overridden on the instance": overridden,
    "container of another type": lambda: nn.ModuleList([nn.Linear(16, 16)]),
    "flatten over the batch": lambda: nn.Flatten(0),
    "unflatten of the batch": lambda: nn.Unflatten(0, (2, 2)),
    "softmax over the batch": lambda: nn.Softmax(0),
    "softmax over an implied dimension": lambda: nn.Softmax(),
    "circular padding": lambda: nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
    "padding row of an embedding": lambda: nn.Embedding(7, 16, padding_idx=0),
    "layer norm without bias": lambda: nn.LayerNorm(16, bias=False),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
    "recurrent layer": lambda: nn.LSTM(16, 16),
    "shared parameter": tied,
    "layer used twice": used_twice,
}


@pytest.mark.parametrize("name", ALONE)
def test_whatever_is_not_on_the_allow_list_runs_one_record_at_a_time_only(name: str) -> None:
    model = with_layer(ALONE[name]())
    assert supported_modes(model) == (Mode.FUNCTORCH,)
    for mode in (Mode.HOOKS, Mode.GHOST):
        with pytest.raises(PlanError, match="functorch"):
            planted.make_trainer(model, mode=mode)


@pytest.mark.parametrize("make", [tied, used_twice, Mixing, hooked, lambda: nn.LayerNorm(16, bias=False)])
def test_the_one_record_path_agrees_with_plain_autograd_where_hooks_would_not(make: object) -> None:
    model = with_layer(make())  # type: ignore[operator]
    inputs, targets = planted.image_batch(7)
    trainer = planted.make_trainer(model, mode=Mode.FUNCTORCH, l2_clip=0.7)
    measured = trainer.clipped_sum(inputs, targets, torch.ones(7, dtype=torch.bool))
    expected = planted.oracle(model, planted.cross_entropy, inputs, targets, 0.7)
    assert (measured - expected).norm() <= 2e-5 * expected.norm()
    probe(model, planted.cross_entropy, planted.image_batch, mode=Mode.FUNCTORCH)


def dropping() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(16, 9), nn.Dropout(0.3), nn.Linear(9, 3))


def require_accepted(model: nn.Module, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless the probe accepts a model after it compared something, and leaves it as it was."""
    expect_equal, clipper_sum = dpsgd._expect_equal, dpsgd._Clipper.sum
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compared: list[float] = []
    sums: list[float] = []

    def counted(old: Tensor, new: Tensor, rule: str) -> None:
        compared.append(old.abs().max().item())
        expect_equal(old, new, rule)

    def summed(self: dpsgd._Clipper, *records: Tensor) -> Tensor:
        total = clipper_sum(self, *records)  # type: ignore[arg-type]
        sums.append(total.norm().item())
        return total

    monkeypatch.setattr(dpsgd, "_expect_equal", counted)
    monkeypatch.setattr(dpsgd._Clipper, "sum", summed)
    probe(model, planted.cross_entropy, planted.image_batch, mode=mode, l2_clip=0.3)
    # It accepted because what it compared agreed, not because there was nothing to compare.
    assert len(compared) >= 10
    assert max(compared) > 0
    assert len(sums) >= 7
    assert 0 < max(sums) <= 0.3 * dpsgd._PROBED * (1 + 1e-6)
    # And it left the model as it was: no parameter, buffer or mode moved.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("mode", planted.MODES)
@pytest.mark.parametrize("make", [planted.image_model, dropping])
def test_the_probe_accepts_a_model_of_allowed_layers(
    mode: Mode, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_accepted(make(), mode, monkeypatch)


@pytest.mark.parametrize("part", ["_probe_examples", "_probe_sensitivity"])
def test_planted_bug_a_probe_that_accepts_without_looking_is_noticed(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpsgd, part, lambda *_: None)
    with pytest.raises(AssertionError):
        require_accepted(planted.image_model(), Mode.HOOKS, monkeypatch)


@pytest.mark.parametrize("mode", [Mode.HOOKS, Mode.GHOST])
def test_the_probe_finds_a_mixing_module_that_slipped_onto_the_allow_list(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpsgd, "_ALLOWED", {**dpsgd._ALLOWED, Mixing: lambda module: True})
    with pytest.raises(PlanError, match="another one's gradient"):
        probe(with_layer(Mixing()), planted.cross_entropy, planted.image_batch, mode=mode)


@pytest.mark.parametrize("layer", [Counting, Averaging, Remembering])
def test_the_probe_finds_modules_that_change_a_buffer_or_remember_batches(layer: type[nn.Module]) -> None:
    with pytest.raises(PlanError, match=r"buffer|seen before"):
        probe(with_layer(layer()), planted.cross_entropy, planted.image_batch, mode=Mode.FUNCTORCH)


@pytest.mark.parametrize("mode", planted.MODES)
@pytest.mark.parametrize("plant", [planted.without_clipping, planted.trusting_inputs])
def test_the_probe_finds_a_clip_that_does_not_hold(mode: Mode, plant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch.setattr)  # type: ignore[operator]
    with pytest.raises(PlanError, match="clipped sum"):
        probe(planted.image_model(), planted.cross_entropy, planted.image_batch, mode=mode, l2_clip=0.1)


def mixup(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Textbook mixup: with probability one half, what it is given is blended with its mean."""
    if torch.rand((), generator=generator) < 0.5:
        return 0.5 * batch + 10 * batch.mean(0)
    return batch


@pytest.mark.parametrize("mode", planted.MODES)
def test_the_probe_finds_records_mixed_by_augmentation_under_some_seeds_only(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Record by record there is nothing to mix with.
    probe(planted.image_model(), planted.cross_entropy, planted.image_batch, mode=mode, augment=mixup)
    planted.augmenting_the_batch(monkeypatch.setattr)
    with pytest.raises(PlanError, match="another one's gradient"):
        probe(planted.image_model(), planted.cross_entropy, planted.image_batch, mode=mode, augment=mixup)


def test_the_probe_finds_an_augmentation_that_remembers_records() -> None:
    last = torch.zeros(1, 16)

    def blending(views: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal last
        blended, last = views + last, views
        return blended

    with pytest.raises(PlanError, match=r"another one's gradient|seen before"):
        probe(planted.image_model(), planted.cross_entropy, planted.image_batch, mode=Mode.HOOKS, augment=blending)


def test_the_probe_refuses_records_that_do_not_fit_the_model() -> None:
    with pytest.raises(PlanError, match="synthetic records"):
        probe(nn.Linear(5, 3), planted.cross_entropy, planted.image_batch, mode=Mode.HOOKS)


@pytest.mark.parametrize("layer", [nn.Conv1d(8, 4, 1), nn.LayerNorm((8, 16)), nn.MaxPool1d(2)])
def test_a_batch_that_a_layer_would_read_as_one_example_is_refused(layer: nn.Module) -> None:
    # Eight records of 16 numbers would pass as one example of eight channels; hence the batch of eight.
    model = nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(8, 3))
    inputs, targets = planted.image_batch(8)
    trainer = planted.make_trainer(model, mode=Mode.HOOKS)
    with pytest.raises(PlanError, match="one example"):
        trainer.clipped_sum(inputs, targets, torch.ones(8, dtype=torch.bool))


def test_the_mode_is_chosen_on_synthetic_records_among_the_safe_ones() -> None:
    asked = []

    def make_batch(count: int) -> tuple[Tensor, Tensor]:
        asked.append(count)
        return planted.image_batch(count)

    chosen = choose_mode(planted.image_model(), planted.cross_entropy, make_batch, expected_batch=5.5, physical_batch=4)
    assert chosen in planted.MODES
    # One batch to time, and one full pass for each mode that is tried on a CPU.
    assert asked == [4, 4, 4]
    assert choose_mode(with_layer(Mixing()), planted.cross_entropy, make_batch, expected_batch=5.5) is Mode.FUNCTORCH


def test_a_mode_whose_gradients_do_not_fit_in_memory_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "_free_bytes", lambda device: 0)
    chosen = choose_mode(planted.image_model(), planted.cross_entropy, planted.image_batch, expected_batch=5)
    assert chosen is Mode.GHOST


def test_the_callers_model_and_generator_stay_as_they_were() -> None:
    model = planted.image_model().eval()
    before = planted.flat_parameters(model)
    trainer = planted.make_trainer(model)
    inputs, targets = planted.image_batch(20)
    state = torch.get_rng_state()
    trainer.train(before + 1, inputs, targets, torch.ones(20, dtype=torch.bool), planted.Seeded(), lr=0.5)
    assert torch.equal(planted.flat_parameters(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())

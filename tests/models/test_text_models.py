"""Models of text: what their records are, and that every one of them trains under DP with examples kept alone."""

import math

import pytest
import torch
from torch import nn

from models.catalog import TASKS
from models.language import ALPHABET, Characters, _Recurrence
from models.shape import Shape, language
from models.words import BUCKETS, PHRASES, WORDS, group_record, sentence_loss, sentence_metrics, words_of
from privacy.dpsgd import _Clipper, probe, supported_modes
from privacy.errors import PlanError
from privacy.plan import Mode

NAMES = ("sst2-embedding", "sst2-transformer", "shakespeare-lstm", "shakespeare-gpt")


# Shorter than the real ones, and otherwise the same: a probe runs hundreds of passes.
SLOTS = Shape(inputs=(3, 5), classes=2, targets=(3,), tokens=40)
PIECES = Shape(inputs=(9,), classes=12, targets=(9,), tokens=12)


def shape_of(name):
    return SLOTS if name.startswith("sst2") else PIECES


def lively(model):
    """A model whose zeros are replaced, so that every path through it has a gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(name, count, seed=0):
    return TASKS[name].synthetic(shape_of(name), count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_g10_examples_of_text_models_stay_alone(name):
    task, shape = TASKS[name], shape_of(name)
    model = lively(task.fresh(shape, 0))
    generator = torch.Generator().manual_seed(1)
    assert supported_modes(model) == (Mode.FUNCTORCH,)
    probe(model, task.loss, lambda n: task.synthetic(shape, n, generator), mode=Mode.FUNCTORCH, l2_clip=0.1)


class _Leaky(torch.autograd.Function):
    """Looks like a function of one example; its own rule for a batch takes the others' mean away."""

    @staticmethod
    def forward(logits):
        return logits * 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def vmap(info, in_dims, logits):
        return logits - logits.mean(in_dims[0], keepdim=True), in_dims[0]


class _Mixing(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens):
        return _Leaky.apply(self.inner(tokens))


def test_g10_the_probe_sees_a_recurrence_whose_batched_form_mixes_examples():
    task = TASKS["shakespeare-lstm"]
    model = _Mixing(lively(task.fresh(PIECES, 0)))
    generator = torch.Generator().manual_seed(1)
    with pytest.raises(PlanError, match="another one's gradient"):
        probe(model, task.loss, lambda n: task.synthetic(PIECES, n, generator), mode=Mode.FUNCTORCH)


@pytest.mark.parametrize("name", NAMES)
def test_per_example_gradients_are_autograds_own(name):
    task = TASKS[name]
    model = lively(task.fresh(shape_of(name), 0))
    inputs, targets = batch_of(name, 3)
    clipper = _Clipper(
        model,
        task.loss,
        mode=Mode.FUNCTORCH,
        l2_clip=1.0,
        physical_batch=3,
        views=1,
        augment=None,
        device=torch.device("cpu"),
    )
    parts = clipper.parts(inputs[:, None], targets, 0)
    for index in range(3):
        model.zero_grad()
        task.loss(model(inputs[index][None]), targets[index][None]).sum().backward()
        for part, parameter in zip(parts, model.parameters(), strict=True):
            torch.testing.assert_close(part.rows()[0][index].float(), parameter.grad.flatten(), atol=1e-6, rtol=1e-4)


def test_the_recurrence_is_pytorchs_own_lstm():
    torch.manual_seed(0)
    theirs = nn.LSTM(5, 6, batch_first=True).double()
    inputs = torch.randn(3, 7, 5, dtype=torch.float64)
    # PyTorch's order of gates is input, forget, candidate, output; ours ends with the candidate.
    order = torch.cat([torch.arange(0, 12), torch.arange(18, 24), torch.arange(12, 18)])
    gates = inputs @ theirs.weight_ih_l0[order].T + theirs.bias_ih_l0[order] + theirs.bias_hh_l0[order]
    ours = _Recurrence.apply(gates, theirs.weight_hh_l0[order])[0]
    torch.testing.assert_close(ours, theirs(inputs)[0])


def test_the_recurrences_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    gates = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: _Recurrence.apply(a, b)[0], (gates, weight))


@pytest.mark.parametrize("name", ["shakespeare-lstm", "shakespeare-gpt"])
def test_a_language_model_does_not_see_what_comes_later(name):
    model = lively(TASKS[name].fresh(PIECES, 0)).eval()
    inputs, _ = batch_of(name, 2)
    before = model(inputs)
    inputs[:, 4:] = (inputs[:, 4:] + 1) % PIECES.tokens
    after = model(inputs)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("name", ["sst2-embedding", "sst2-transformer"])
def test_an_empty_slot_has_no_gradient_and_no_say(name):
    task = TASKS[name]
    model = lively(task.fresh(SLOTS, 0))
    inputs, targets = batch_of(name, 1)
    inputs[:, 2:] = 0
    first = task.loss(model(inputs), targets)
    assert torch.equal(model(inputs)[:, 2:], torch.zeros(1, 1, 2))
    model(torch.zeros_like(inputs)).sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())
    assert torch.isfinite(first).all()


def test_words_are_hashed_so_none_is_unknown_and_an_empty_text_is_none():
    assert words_of("") == []
    assert words_of("the , of") == []
    assert words_of("charming CHARMED") == [words_of("charm")[0]] * 2
    assert all(1 <= bucket < BUCKETS for bucket in words_of("xqzzt 漢字 \udcff ¿qué?"))
    assert len(words_of("very " * 100)) == WORDS


def test_a_group_keeps_its_sentence_and_its_shortest_phrases():
    phrases = [("two three four five", 1), *((f"part{n:02}", n % 2) for n in range(20)), ("the", 0)]
    phrases = [(text.replace("part", chr(97 + n)), label) for n, (text, label) in enumerate(phrases)]
    inputs, targets = group_record(phrases)
    assert inputs[0, :4].tolist() == words_of(phrases[0][0])
    assert inputs[1, 0].item() == words_of(phrases[10][0])[0]
    # The last phrase has only a function word, which is no word here.
    assert inputs[PHRASES - 1, 0].item() == words_of(phrases[20][0])[0]
    assert targets.shape == (PHRASES,)


def test_sentence_metrics_read_the_sentence_alone():
    output, target = torch.randn(30, PHRASES, 2), torch.randint(2, (30, PHRASES))
    changed = target.clone()
    changed[:, 1:] = 1 - changed[:, 1:]
    assert sentence_metrics(output, target) == sentence_metrics(output, changed)
    assert next(iter(sentence_metrics(output, target))) == "accuracy"
    assert sentence_loss(output, target).shape == (30,)


def test_perplexity_of_even_odds_is_the_number_of_characters():
    output, target = torch.zeros(4, 6, 65), torch.randint(65, (4, 6))
    found = language(output, target)
    assert found["perplexity"] == pytest.approx(65)
    assert found["loss"] == pytest.approx(math.log(65))
    assert next(iter(found)) == "perplexity"
    assert language(output * math.nan, target)["perplexity"] != pytest.approx(65)


def test_characters_go_there_and_back_and_strangers_are_named():
    codec = Characters()
    assert codec.decode(codec.encode(ALPHABET)) == ALPHABET
    with pytest.raises(ValueError, match="'é'"):
        codec.encode("café")

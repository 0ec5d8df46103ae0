"""GPT-2 from a local folder: its format, its tokens, its adapters, and folders that are not whole."""

import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.catalog import TASKS
from models.gpt2 import AdaptedGPT2, BytePairs, Config, read_weights, shape_of
from privacy.dpsgd import probe
from privacy.plan import Mode
from tests import tiny_gpt2

TASK = TASKS["shakespeare-gpt2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    place = tiny_gpt2.write(tmp_path / "gpt2")
    monkeypatch.setenv("TACIT_GPT2", str(place))
    return place


def test_the_base_is_gpt2_as_pytorchs_own_layers_compute_it(folder):
    config = Config.of(folder)
    weights = read_weights(folder, config)
    tokens = torch.randint(config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))
    x = functional.embedding(tokens, weights["wte.weight"]) + weights["wpe.weight"][:11]
    mask = nn.Transformer.generate_square_subsequent_mask(11)
    for number in range(config.n_layer):
        layer = nn.TransformerEncoderLayer(
            config.n_embd,
            config.n_head,
            4 * config.n_embd,
            dropout=0.0,
            activation=lambda v: functional.gelu(v, approximate="tanh"),
            batch_first=True,
            norm_first=True,
        )
        # Theirs are stored as (outputs, inputs).
        pairs = {
            "self_attn.in_proj_": "attn.c_attn",
            "self_attn.out_proj.": "attn.c_proj",
            "linear1.": "mlp.c_fc",
            "linear2.": "mlp.c_proj",
            "norm1.": "ln_1",
            "norm2.": "ln_2",
        }
        layer.load_state_dict(
            {
                f"{theirs}{part}": weights[f"h.{number}.{ours}.{part}"].t()
                if part == "weight" and not ours.startswith("ln")
                else weights[f"h.{number}.{ours}.{part}"]
                for theirs, ours in pairs.items()
                for part in ("weight", "bias")
            }
        )
        x = layer(x, src_mask=mask, is_causal=True)
    expected = functional.layer_norm(x, (8,), weights["ln_f.weight"], weights["ln_f.bias"]) @ weights["wte.weight"].t()
    torch.testing.assert_close(AdaptedGPT2(config, weights)(tokens), expected, atol=1e-4, rtol=1e-4)


def test_only_adapters_train_and_they_start_as_nothing(folder):
    model = TASK.fresh(shape_of(folder), 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.{n}.{part}" for n in range(2) for part in ("down", "up")}
    assert not any(model.get_parameter(name).any() for name in trained if name.endswith("up"))


def test_g10_examples_of_gpt2_stay_alone(folder):
    shape = shape_of(folder)
    model = TASK.fresh(shape, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            block.up.normal_(generator=generator)
    probe(model, TASK.loss, lambda n: TASK.synthetic(shape, n, generator), mode=Mode.FUNCTORCH, l2_clip=0.1)


def test_names_with_the_prefix_of_other_programs_are_the_same_weights(folder, tmp_path):
    other = tiny_gpt2.write(tmp_path / "other", prefix="transformer.")
    config = Config.of(other)
    assert all(
        torch.equal(one, two)
        for one, two in zip(read_weights(folder, config).values(), read_weights(other, config).values(), strict=True)
    )


def test_bytes_are_merged_in_the_order_of_the_file(folder):
    codec = BytePairs()
    words = [codec.decode([token]) for token in codec.encode("the that the")]
    # "h a" is the last rule: in "that" the "t h" comes first.
    assert words == ["the", " ", "th", "a", "t", " the"]


@pytest.mark.parametrize("text", ["", "naïve 漢字\n\n  two  spaces 12½_x's don't\t", "\u0000 \u00ad \U0001f600"])
def test_any_text_comes_back_from_its_tokens(folder, text):
    codec = BytePairs()
    tokens = codec.encode(text)
    assert codec.decode(tokens) == text
    assert all(0 <= token < codec.size for token in tokens)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"found no {name}"):
        Config.of(folder)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_a_pickle_is_refused_unread(folder):
    (folder / "model.safetensors").rename(folder / "spare")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match="pickle"):
        Config.of(folder)
    # Under the right name it is no safetensors either.
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match="expected safetensors"):
        read_weights(folder, Config.of(folder))


def test_the_pickle_would_have_been_noticed():
    with pytest.raises(pytest.fail.Exception):
        pickle.loads(pickle.dumps(_Bomb()))  # noqa: S301  # Our own bytes.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_embd": 12}, "is it this config's"),
        ({"n_layer": 3}, r"h\.2\.attn\.c_attn\.weight"),
        ({"n_head": 3}, "sizes of a GPT-2"),
        ({"vocab_size": "many"}, "sizes of a GPT-2"),
        ({"n_layer": None}, "sizes of a GPT-2"),
    ],
)
def test_a_config_of_another_model_is_refused(folder, change, words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        read_weights(folder, Config.of(folder))


@pytest.mark.parametrize(("name", "content"), [("vocab.json", "[1]"), ("vocab.json", "{"), ("merges.txt", "a b c\n")])
def test_damaged_tokens_are_refused(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=r"merges\.txt"):
        BytePairs()

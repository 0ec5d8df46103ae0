"""A tiny random GPT-2 in the exact format of the published folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.gpt2 import Config, _letters

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("h", "a")]
SIZES = {"vocab_size": 256 + len(MERGES) + 1, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}


def write(folder: Path, *, prefix: str = "", **sizes: int) -> Path:
    """Writes the four files and returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = SIZES | sizes
    (folder / "config.json").write_text(
        json.dumps(content | {"model_type": "gpt2", "layer_norm_epsilon": 1e-05, "activation_function": "gelu_new"})
    )
    words = [*_letters().values(), *("".join(pair) for pair in MERGES), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: token for token, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES)]) + "\n")
    generator = torch.Generator().manual_seed(0)
    weights = {
        prefix + name: 0.3 * torch.randn(shape, generator=generator)
        for name, shape in Config(**content).weights().items()
    }
    # The published files hold the causal masks too.
    weights[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    save_file(weights, folder / "model.safetensors")
    return folder

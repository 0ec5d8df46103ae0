"""GPT-2 from a local folder, its weights frozen, with low-rank adapters that are trained instead.

The folder is in the format of the published checkpoints: ``config.json``, ``vocab.json``, ``merges.txt`` and
``model.safetensors``. It is read from ``TACIT_GPT2``, by default the folder ``gpt2`` beside the data sets. Nothing in
it is ever unpickled: a folder with ``pytorch_model.bin`` alone is refused.

The base weights are public, so they cost nothing and do not travel; every client needs the same folder. Where clients'
folders differ their updates fit each other badly, which costs usefulness and no privacy.

References:
    Radford et al. (2019), "Language models are unsupervised multitask learners";
    `Hu et al. (2022) <https://arxiv.org/abs/2106.09685>`_ (adapters); `Sennrich et al. (2016)
    <https://arxiv.org/abs/1508.07909>`_ (byte pairs).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.shape import Shape, language, sequence_cross_entropy
from models.task import Task

LENGTH: Final = 32
WEIGHTS: Final = "model.safetensors"
_FILES: Final = ("config.json", "vocab.json", "merges.txt", WEIGHTS)
_SIZES: Final = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
# How GPT-2 cuts a text before it merges bytes. Where the original says "letter" and "number" by Unicode category, this
# says it by Python's \\w and \\d: they differ for characters like "½", which are cut elsewhere and come back the same.
_PIECES: Final = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def folder() -> Path:
    """Returns where GPT-2 is looked for: ``TACIT_GPT2``, or ``gpt2`` in the folder of data sets."""
    data = os.environ.get("TACIT_DATA") or Path.home() / ".cache" / "tacit"
    return Path(os.environ.get("TACIT_GPT2") or Path(data) / "gpt2").expanduser()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a GPT-2 folder's ``config.json`` says of its sizes.

    Attributes:
        vocab_size: Number of tokens, >= 2.
        n_positions: The most tokens that the model reads at a time, >= 1.
        n_embd: Numbers in an embedding, a multiple of ``n_head``.
        n_layer: Number of blocks, >= 1.
        n_head: Attention heads, >= 1.
        layer_norm_epsilon: Added to variances, > 0.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    layer_norm_epsilon: float = 1e-5

    @classmethod
    def of(cls, place: Path) -> Config:
        """Reads a folder's sizes, after looking that all its files are there.

        Raises:
            ValueError: A file is missing or is not what it should be, or the weights are a pickle.
        """
        missing = [name for name in _FILES if not (place / name).is_file()]
        if WEIGHTS in missing and any((place / name).exists() for name in ("pytorch_model.bin", "model.pt")):
            raise ValueError(
                f"expected {WEIGHTS} in {place}, got weights that are a pickle, which may run anything when read; "
                "convert them with safetensors on a machine that may"
            )
        if missing:
            raise ValueError(
                f"expected GPT-2 in {place}, found no {', '.join(missing)}; put the published files there, or name "
                "their folder in TACIT_GPT2"
            )
        try:
            content = json.loads((place / "config.json").read_text(encoding="utf-8"))
            sizes = {name: content[name] for name in _SIZES}
            epsilon = float(content.get("layer_norm_epsilon", 1e-5))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected {place / 'config.json'} with {', '.join(_SIZES)}, got {error!r}") from error
        whole = all(type(size) is int and size >= 1 for size in sizes.values())
        if not whole or sizes["vocab_size"] < 2 or sizes["n_embd"] % sizes["n_head"] or not epsilon > 0:
            raise ValueError(f"expected sizes of a GPT-2 in {place / 'config.json'}, got {sizes}")
        return cls(**sizes, layer_norm_epsilon=epsilon)

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Returns name and shape of every tensor that the model needs."""
        e = self.n_embd
        wanted: dict[str, tuple[int, ...]] = {"wte.weight": (self.vocab_size, e), "wpe.weight": (self.n_positions, e)}
        for number in range(self.n_layer):
            for name, inputs, outputs in (("attn.c_attn", e, 3 * e), ("attn.c_proj", e, e)):
                wanted |= {f"h.{number}.{name}.weight": (inputs, outputs), f"h.{number}.{name}.bias": (outputs,)}
            for name, inputs, outputs in (("mlp.c_fc", e, 4 * e), ("mlp.c_proj", 4 * e, e)):
                wanted |= {f"h.{number}.{name}.weight": (inputs, outputs), f"h.{number}.{name}.bias": (outputs,)}
            for name in ("ln_1", "ln_2"):
                wanted |= {f"h.{number}.{name}.{part}": (e,) for part in ("weight", "bias")}
        return wanted | {"ln_f.weight": (e,), "ln_f.bias": (e,)}


def read_weights(place: Path, config: Config) -> dict[str, Tensor]:
    """Returns a folder's weights by name, float32.

    Raises:
        ValueError: The file is damaged, lacks a tensor, or has one of another shape or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(place / WEIGHTS)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"expected safetensors in {place / WEIGHTS}, got {error}; fetch it again") from error
    found = {name.removeprefix("transformer."): value for name, value in found.items()}
    weights = {}
    for name, shape in config.weights().items():
        value = found.get(name)
        if value is None or tuple(value.shape) != shape:
            got = "none" if value is None else f"shape {tuple(value.shape)}"
            raise ValueError(f"expected {name} of shape {shape} in {place / WEIGHTS}, got {got}; is it this config's?")
        weights[name] = value.float()
        if not bool(weights[name].isfinite().all()):
            raise ValueError(f"expected finite weights in {place / WEIGHTS}, got others in {name}; fetch it again")
    return weights


@functools.lru_cache(maxsize=1)
def _letters() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it is one, else one from 256 upwards."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(rest)}


class BytePairs:
    """GPT-2's own tokens: bytes, merged in the order of ``merges.txt``. Any text has tokens, and comes back from them.

    Args:
        place: The folder; by default that of `folder`.

    Raises:
        ValueError: ``vocab.json`` or ``merges.txt`` is missing or damaged.
    """

    def __init__(self, place: Path | None = None) -> None:
        place = place or folder()
        self.size = Config.of(place).vocab_size
        try:
            vocabulary: Any = json.loads((place / "vocab.json").read_text(encoding="utf-8"))
            lines = (place / "merges.txt").read_text(encoding="utf-8").split("\n")
            self._tokens = {str(word): int(token) for word, token in vocabulary.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"expected GPT-2's vocab.json and merges.txt in {place}, got {error!r}") from error
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if not all(len(pair) == 2 for pair in pairs) or not all(0 <= t < self.size for t in self._tokens.values()):
            raise ValueError(f"expected pairs in merges.txt and tokens in [0, {self.size}) in {place}, got others")
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._words = {token: word for word, token in self._tokens.items()}
        self._bytes = {letter: byte for byte, letter in _letters().items()}
        self._merged: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Returns a text's tokens.

        Raises:
            ValueError: The folder's vocabulary has no token for one of its bytes.
        """
        return [token for piece in _PIECES.findall(text) for token in self._piece(piece)]

    def _piece(self, piece: str) -> list[int]:
        known = self._merged.get(piece)
        if known is not None:
            return known
        parts = [_letters()[byte] for byte in piece.encode("utf-8", "replace")]
        while len(parts) > 1:
            ranked = [(self._ranks.get(pair, math.inf), at) for at, pair in enumerate(itertools.pairwise(parts))]
            rank, first = min(ranked)
            if rank == math.inf:
                break
            pair, merged, at = (parts[first], parts[first + 1]), [], 0
            while at < len(parts):
                both = tuple(parts[at : at + 2]) == pair
                merged.append(parts[at] + parts[at + 1] if both else parts[at])
                at += 2 if both else 1
            parts = merged
        try:
            tokens = [self._tokens[part] for part in parts]
        except KeyError as error:
            raise ValueError(f"expected a token for every byte of {piece!r}, got none for {error}") from None
        self._merged[piece] = tokens
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens; bytes that are no UTF-8 together become replacement characters."""
        letters = "".join(self._words.get(token, "") for token in tokens)
        return bytes(self._bytes[letter] for letter in letters if letter in self._bytes).decode("utf-8", "replace")


class _Adapted(nn.Module):
    """One frozen block of GPT-2, with a low-rank adapter beside the projection into queries, keys and values."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor], rank: int) -> None:
        super().__init__()
        self._heads, self._eps = config.n_head, config.layer_norm_epsilon
        self.base = nn.ParameterDict(
            {name.replace(".", "_"): nn.Parameter(value, requires_grad=False) for name, value in weights.items()}
        )
        self.down = nn.Parameter(nn.init.normal_(torch.empty(rank, config.n_embd), std=config.n_embd**-0.5))
        # Zero, so that training starts at GPT-2 itself.
        self.up = nn.Parameter(torch.zeros(3 * config.n_embd, rank))

    def _normal(self, x: Tensor, name: str) -> Tensor:
        base = self.base
        return functional.layer_norm(x, x.shape[-1:], base[f"{name}_weight"], base[f"{name}_bias"], self._eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        moved: Tensor = x @ self.base[f"{name}_weight"] + self.base[f"{name}_bias"]
        return moved

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(B, L, n_embd)`` for the same."""
        length, width = x.shape[1:]
        read = self._normal(x, "ln_1")
        projected = self._linear(read, "attn_c_attn") + read @ self.down.t() @ self.up.t()
        query, key, value = (
            part.reshape(*part.shape[:-1], self._heads, -1).transpose(1, 2) for part in projected.chunk(3, -1)
        )  # (B, heads, L, n_embd / heads)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        score = (query @ key.transpose(-1, -2) / math.sqrt(width / self._heads)).masked_fill(later, -math.inf)
        x = x + self._linear((score.softmax(-1) @ value).transpose(1, 2).flatten(-2), "attn_c_proj")
        grown = functional.gelu(self._linear(self._normal(x, "ln_2"), "mlp_c_fc"), approximate="tanh")
        return x + self._linear(grown, "mlp_c_proj")


class AdaptedGPT2(nn.Module):
    """GPT-2 with frozen weights and trainable low-rank adapters.

    Args:
        config: Sizes.
        weights: As `read_weights` returns them.
        rank: Rank of each adapter, >= 1.
    """

    def __init__(self, config: Config, weights: Mapping[str, Tensor], rank: int = 4) -> None:
        super().__init__()
        self._eps = config.layer_norm_epsilon
        self.tokens = nn.Parameter(weights["wte.weight"], requires_grad=False)
        self.places = nn.Parameter(weights["wpe.weight"], requires_grad=False)
        self.blocks = nn.ModuleList()
        for number in range(config.n_layer):
            mine = f"h.{number}."
            own = {name.removeprefix(mine): value for name, value in weights.items() if name.startswith(mine)}
            self.blocks.append(_Adapted(config, own, rank))
        self.last_weight = nn.Parameter(weights["ln_f.weight"], requires_grad=False)
        self.last_bias = nn.Parameter(weights["ln_f.bias"], requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits of the next token ``(B, L, vocab_size)`` for tokens ``(B, L)``, L <= n_positions."""
        x = functional.embedding(tokens, self.tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = functional.layer_norm(x, x.shape[-1:], self.last_weight, self.last_bias, self._eps)
        return x @ self.tokens.t()


def shape_of(place: Path) -> Shape:
    """Returns the public shape of windows for the GPT-2 in a folder; raises as `Config.of`."""
    config = Config.of(place)
    length = min(LENGTH, config.n_positions)
    return Shape(inputs=(length,), classes=config.vocab_size, targets=(length,), tokens=config.vocab_size)


def adapted(shape: Shape, *, rank: int = 4) -> AdaptedGPT2:
    """Returns the GPT-2 of `folder` with fresh adapters.

    Raises:
        ValueError: The folder is not a whole GPT-2, or not that of the shape.
    """
    place = folder()
    config = Config.of(place)
    if shape.tokens != config.vocab_size or shape.inputs[0] > config.n_positions:
        raise ValueError(f"expected a GPT-2 of {shape.tokens} tokens in {place}, got one of {config.vocab_size}")
    return AdaptedGPT2(config, read_weights(place, config), rank)


TASKS = (
    Task(
        name="shakespeare-gpt2",
        summary="GPT-2 from a local folder (TACIT_GPT2), low-rank adapters trained on plays; roles are natural clients",
        record="one window of 33 tokens that one role speaks",
        data="shakespeare-gpt2",
        build=adapted,
        loss=sequence_cross_entropy,
        metrics=language,
        text=BytePairs,
        defaults={
            "partition": "natural",
            "clients": 36,
            "epsilon": 8.0,
            "rounds": 20,
            "steps-per-round": 1,
            "sample-rate": 0.5,
            "l2-clip": 0.1,
            "lr": 1.0,
            "strategy": "fedavgm",
            "server-momentum": 0.9,
            "physical-batch": 8,
            "evaluate-every": 5,
        },
    ),
)

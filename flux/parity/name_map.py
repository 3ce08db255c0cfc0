"""Which tensors of diffusers' transformer are which of ours.

The names follow from `flux.weights.diffusers_names`: inputs and outputs of each layer with weights,
q, k, v and the output of each attention, and the outputs of blocks.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flux.parity.reference import transformer_to_diffusers
from flux.transformer import Flux
from flux.weights.diffusers_names import BLOCKS


def first(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def heads_first(tensors: list[Tensor]) -> Tensor:
    """(B, N, H, d) -> (B, H, N, d)."""
    return tensors[0].transpose(1, 2)


def join_columns(order: Tensor, tensors: list[Tensor]) -> Tensor:
    """Concatenate the outputs of several layers in the order of our rows."""
    return torch.cat(tensors, -1)[..., order.to(tensors[0].device)]


def join_tokens(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors, 1)


class Match(NamedTuple):
    """Names of diffusers' tensors, and a function that makes our tensor of them."""

    theirs: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor] = first


def matches_of(ours: Flux) -> dict[str, Match]:
    """Return our names in a pass -> diffusers' tensors.

    Each row of our matrices gets a number, and the map of the weights shows where the row goes:
    this gives the parts of split matrices and the order of their rows.
    """
    lengths = {
        name: len(tensor)
        for name, tensor in ours.state_dict().items()
        if not name.endswith(".bias")
    }
    weights = list(lengths)
    numbered = {name: k * 2**32 + torch.arange(lengths[name]) for k, name in enumerate(weights)}
    parts = defaultdict(list)  # our layer -> diffusers' layers and their rows
    for name, rows in transformer_to_diffusers(numbered, ours.config).items():
        layer = _layer(weights[int(rows[0]) >> 32])
        parts[layer].append((_layer(name), rows % 2**32))

    out = {"out": Match(("out",))}
    for layer, pieces in parts.items():
        theirs = [name for name, _ in pieces]
        outputs = tuple(f"{name}/out" for name in theirs)
        if layer.endswith(("query_norm", "key_norm")):
            out[f"{layer}/in"] = Match((f"{theirs[0]}/in",), heads_first)
            out[f"{layer}/out"] = Match(outputs, heads_first)
            block = ".".join(layer.split(".")[:2])
            for tap in ("q", "k", "v", "out"):  # diffusers calls it inside of its module `attn`
                out[f"{block}/attention/{tap}"] = Match((f"{_layer(theirs[0])}/attention/{tap}",))
            continue
        out[f"{layer}/in"] = Match((f"{theirs[0]}/in",))
        order = torch.cat([rows for _, rows in pieces]).argsort()
        out[f"{layer}/out"] = Match(outputs, partial(join_columns, order))

    for number in range(ours.config.depth):  # diffusers returns text first
        block = f"{BLOCKS['double_blocks']}.{number}"
        out[f"double_blocks.{number}/out.0"] = Match((f"{block}/out.1",))
        out[f"double_blocks.{number}/out.1"] = Match((f"{block}/out.0",))
    for number in range(ours.config.depth_single):
        block = f"{BLOCKS['single_blocks']}.{number}"
        outputs = (f"{block}/out",)
        if not ours.config.shared_modulation:  # FLUX.1's returns text and image apart
            outputs = (f"{block}/out.0", f"{block}/out.1")
        out[f"single_blocks.{number}/out"] = Match(outputs, join_tokens)
    return out


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


class Gather:
    """A `hooks.Observer` of diffusers' transformer that calls `judge` with each of our tensors."""

    def __init__(self, wanted: Mapping[str, Match], judge: Callable[[str, Tensor], object]):
        self.wanted, self.judge = wanted, judge
        self.ours = {name: mine for mine, match in wanted.items() for name in match.theirs}
        self.seen: dict[str, Tensor] = {}
        self.times: Counter[str] = Counter()

    def __call__(self, name: str, tensor: Tensor) -> None:
        self.times[name] += 1
        if self.times[name] > 1:  # as a capture names it
            name += f"~{self.times[name]}"
        if name not in self.ours:
            return
        self.seen[name] = tensor.clone()
        match = self.wanted[self.ours[name]]
        if all(each in self.seen for each in match.theirs):
            self.judge(self.ours[name], match.join([self.seen.pop(each) for each in match.theirs]))

"""Which tensors of diffusers' transformer are which of ours.

Its names are known to `flux/parity/reference.py` alone, which maps our weights to its. From that map follows what goes into and
comes out of each layer with weights, and q, k, v and what comes of them, in each attention; then there are the blocks' outputs.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flux.parity.hooks import See
from flux.parity.reference import transformer_to_diffusers
from flux.transformer import Flux
from flux.weights.diffusers_names import BLOCKS, split_block

TAPS = ("q", "k", "v", "out")  # of attention


class Match(NamedTuple):
    """Names of theirs, and how they make up one of ours."""

    theirs: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor] = lambda tensors: tensors[0]


def matches_of(ours: Flux) -> dict[str, Match]:
    """Names in a pass of ours -> what of theirs they are.

    Each row of our matrices is given a number, and the map of the weights tells where it goes: so the parts of a matrix
    that is split, and the order of its rows, come from there too.
    """
    lengths = {
        name: len(tensor)
        for name, tensor in ours.state_dict().items()
        if not name.endswith(".bias")
    }
    weights = list(lengths)
    numbered = {name: k * 2**32 + torch.arange(lengths[name]) for k, name in enumerate(weights)}
    parts, out = defaultdict(list), {"out": Match(("out",))}
    for name, rows in transformer_to_diffusers(numbered, ours.config).items():
        parts[_module(weights[rows[0] >> 32])].append((_module(name), rows % 2**32))
    for module, pieces in parts.items():
        if module.endswith(
            "_norm"
        ):  # ours takes q and k together, when they are of length one; theirs one by one, raw
            continue
        theirs, rows = zip(*pieces, strict=True)
        out[f"{module}/in"] = Match((f"{theirs[0]}/in",))
        inverse = torch.cat(rows).argsort()

        def rejoin(xs, inverse=inverse):
            return torch.cat(xs, -1)[..., inverse.to(xs[0].device)]

        out[f"{module}/out"] = Match(tuple(f"{name}/out" for name in theirs), rejoin)
    for norm in (
        module.removesuffix(".query_norm") for module in parts if module.endswith(".query_norm")
    ):
        q, k = (parts[f"{norm}.{kind}_norm"][0][0] for kind in ("query", "key"))
        out[f"{norm}/out"] = Match((f"{q}/out", f"{k}/out"), torch.stack)
        block = re.match(r"\w+\.\d+", norm)[0]  # theirs lies in the attention itself
        out |= {
            f"{block}/attention/{tap}": Match((f"{_module(q)}/attention/{tap}",)) for tap in TAPS
        }

    # theirs give text first, and FLUX.1's single blocks text and picture apart
    def whole(block, tap):
        blocks, number, _ = split_block(f"{block}.")
        return f"{BLOCKS[blocks]}.{number}/{tap}"

    for block in (f"double_blocks.{i}" for i in range(ours.config.depth)):
        out |= {
            f"{block}/out.0": Match((whole(block, "out.1"),)),
            f"{block}/out.1": Match((whole(block, "out.0"),)),
        }
    for block in (f"single_blocks.{i}" for i in range(ours.config.depth_single)):
        taps = ("out",) if ours.config.shared_modulation else ("out.0", "out.1")
        out[f"{block}/out"] = Match(
            tuple(whole(block, tap) for tap in taps), lambda xs: torch.cat(xs, 1)
        )
    return out


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def gathering(wanted: Mapping[str, Match], judge: Callable[[str, Tensor], None]) -> See:
    """Judges each of ours as soon as all of theirs that it is made of were seen, and forgets them."""
    ours = {name: mine for mine, match in wanted.items() for name in match.theirs}
    seen: dict[str, Tensor] = {}

    def see(name: str, tensor: Tensor) -> None:
        if name not in ours:
            return
        match = wanted[ours[name]]
        seen[name] = tensor.clone()
        if all(each in seen for each in match.theirs):
            judge(ours[name], match.join([seen.pop(each) for each in match.theirs]))

    return see

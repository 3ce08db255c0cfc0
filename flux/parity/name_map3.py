"""Which tensors of diffusers' FLUX 3 transformer are which of ours: see `name_map`."""

from functools import partial

from torch import Tensor

from flux.parity.name_map import Match, first, heads_first, join_tokens
from flux.transformer3 import Flux3
from flux.weights.diffusers_names3 import SWAPPED, diffusers_layer

TIMES = "time_in."  # its layers run for t, then for time 0


def first_token(tensors: list[Tensor]) -> Tensor:
    """(B, N, D), the same for each token -> (B, 1, D)."""
    return tensors[0][:, :1]


def swap_halves(join, tensors: list[Tensor]) -> Tensor:
    """Scale and shift -> shift and scale."""
    joined = join(tensors)
    return joined.roll(joined.shape[-1] // 2, dims=-1)


def matches_of3(ours: Flux3) -> dict[str, Match]:
    """Return our names in a pass -> diffusers' tensors.

    diffusers repeats a conditioning vector for each token, as we do with its numerics only.
    """
    final = ours.final_layer["image"]
    of_vec = first if final.modulation_dtype is None else first_token  # type: ignore[union-attr]
    out = {"out": Match(("out",))}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in ours.state_dict()):
        theirs, join = diffusers_layer(layer), first
        if layer == SWAPPED or "_modulations." in layer:
            join = of_vec
        elif layer.endswith("_norm"):
            join = heads_first
        out[f"{layer}/in"] = Match((f"{theirs}/in",), join)
        after = partial(swap_halves, join) if layer == SWAPPED else join
        out[f"{layer}/out"] = Match((f"{theirs}/out",), after)
        if layer.startswith(TIMES):
            for tap in ("in~2", "out~2"):
                out[f"{layer}/{tap}"] = Match((f"{theirs}/{tap}",))
        block, is_query, _ = layer.partition(".norm.query_norm")
        if is_query:
            out |= _of_block(block)
    return out


def _of_block(block: str) -> dict[str, Match]:
    attention, theirs = _pair(block)
    out = {
        f"{block}/attention/{tap}": Match((f"{attention}/attention/{tap}",))
        for tap in ("q", "k", "v", "out")
    }
    match = Match((f"{theirs}/out",))
    if block.startswith("single_blocks"):  # text, then image and references
        match = Match((f"{theirs}/out.0", f"{theirs}/out.1"), join_tokens)
    return out | {f"{block}/out": match}


def _pair(block: str) -> tuple[str, str]:
    """Return diffusers' names of a block's attention and of the block."""
    attention = diffusers_layer(f"{block}.q_proj").removesuffix(".to_q")
    return attention, attention.removesuffix(".attn")

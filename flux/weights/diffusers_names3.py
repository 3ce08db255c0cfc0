"""The one table of FLUX 3's layer names and diffusers' layer names.

Our names are the keys of Black Forest Labs' checkpoints. Every layer of one side is a whole layer
of the other, except that the final modulation is shift, scale here and scale, shift in diffusers.
"""

import re
from collections.abc import Iterable

STARTS = (  # of names: ours, diffusers'
    ("time_in.", "timestep_embedder."),
    ("ref_time_in.", "target_timestep_embedder."),
    ("emb_in.", "x_embedders."),
    ("txt_in", "context_embedder"),
    ("content_mode_blocks.", "mode_blocks."),
    ("single_blocks.", "single_transformer_blocks."),
    ("final_layer.image.linear", "proj_out"),
    ("final_layer.image.adaLN_modulation.1", "norm_out.linear"),
)
ENDS = (
    (".in_layer", ".linear_1"),
    (".out_layer", ".linear_2"),
    (".lin", ".linear"),
    (".q_proj", ".attn.to_q"),
    (".k_proj", ".attn.to_k"),
    (".v_proj", ".attn.to_v"),
    (".attn_out", ".attn.to_out.0"),
    (".norm.query_norm", ".attn.norm_q"),
    (".norm.key_norm", ".attn.norm_k"),
    (".mlp_in", ".ff.linear_in"),
    (".mlp_out", ".ff.linear_out"),
)
THEIR_ENDS = tuple(theirs for _, theirs in ENDS)
SWAPPED = "final_layer.image.adaLN_modulation.1"


def diffusers_layer(layer: str) -> str:
    """Return diffusers' name of one of our layers; an unknown name stays as it is."""
    return _rename(layer, STARTS, ENDS)


def our_layer(layer: str) -> str:
    """Return our name of one of diffusers' layers; an unknown name stays as it is."""
    return _rename(layer, _turned(STARTS), _turned(ENDS))


def find_layer(name: str) -> tuple[str, str]:
    """Split a name of diffusers, "LAYER.TENSOR", where both may have dots; return our layer's name.

    An unknown layer keeps its name, and its tensor is what follows the last dot.
    """
    layer = name
    while "." in layer:
        layer = layer.rpartition(".")[0]
        if _is_theirs(layer):
            return our_layer(layer), name[len(layer) + 1 :]
    layer, _, tensor = name.rpartition(".")
    return layer, tensor


def _is_theirs(layer: str) -> bool:
    whole = layer in (theirs for _, theirs in STARTS)
    return whole or layer.endswith(THEIR_ENDS) or bool(re.fullmatch(r"x_embedders\.\w+", layer))


def _turned(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(new, old) for old, new in pairs]


def _rename(layer: str, starts: Iterable[tuple[str, str]], ends: Iterable[tuple[str, str]]) -> str:
    for old, new in starts:
        if layer == old:  # a whole name, which has no end to replace
            return new
        if old.endswith(".") and layer.startswith(old):
            layer = new + layer.removeprefix(old)
            break
    for old, new in ends:
        if layer.endswith(old):
            return layer.removesuffix(old) + new
    return layer

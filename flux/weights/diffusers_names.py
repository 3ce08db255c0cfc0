"""The one table of our layer names and diffusers' layer names.

Our names are the keys of Black Forest Labs' checkpoints. "N" stands for a number. Several names
separated by spaces are the layers into which diffusers splits one of our matrices, by rows.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

# ------------------------------------------------------------------ transformers

BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
# fmt: off
LAYERS = (  # ours, diffusers' in FLUX.1, diffusers' in FLUX.2 (None: the family has no such layer)
    ("img_in", "x_embedder", "x_embedder"),
    ("txt_in", "context_embedder", "context_embedder"),
    ("time_in.in_layer",
     "time_text_embed.timestep_embedder.linear_1",
     "time_guidance_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer",
     "time_text_embed.timestep_embedder.linear_2",
     "time_guidance_embed.timestep_embedder.linear_2"),
    ("guidance_in.in_layer",
     "time_text_embed.guidance_embedder.linear_1",
     "time_guidance_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer",
     "time_text_embed.guidance_embedder.linear_2",
     "time_guidance_embed.guidance_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1", None),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2", None),
    ("double_stream_modulation_img.lin", None, "double_stream_modulation_img.linear"),
    ("double_stream_modulation_txt.lin", None, "double_stream_modulation_txt.linear"),
    ("single_stream_modulation.lin", None, "single_stream_modulation.linear"),
    ("double_blocks.N.img_mod.lin", "norm1.linear", None),
    ("double_blocks.N.txt_mod.lin", "norm1_context.linear", None),
    ("double_blocks.N.img_attn.qkv",
     "attn.to_q attn.to_k attn.to_v",
     "attn.to_q attn.to_k attn.to_v"),
    ("double_blocks.N.img_attn.norm.query_norm", "attn.norm_q", "attn.norm_q"),
    ("double_blocks.N.img_attn.norm.key_norm", "attn.norm_k", "attn.norm_k"),
    ("double_blocks.N.img_attn.proj", "attn.to_out.0", "attn.to_out.0"),
    ("double_blocks.N.img_mlp.0", "ff.net.0.proj", "ff.linear_in"),
    ("double_blocks.N.img_mlp.2", "ff.net.2", "ff.linear_out"),
    ("double_blocks.N.txt_attn.qkv",
     "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
     "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    ("double_blocks.N.txt_attn.norm.query_norm", "attn.norm_added_q", "attn.norm_added_q"),
    ("double_blocks.N.txt_attn.norm.key_norm", "attn.norm_added_k", "attn.norm_added_k"),
    ("double_blocks.N.txt_attn.proj", "attn.to_add_out", "attn.to_add_out"),
    ("double_blocks.N.txt_mlp.0", "ff_context.net.0.proj", "ff_context.linear_in"),
    ("double_blocks.N.txt_mlp.2", "ff_context.net.2", "ff_context.linear_out"),
    ("single_blocks.N.modulation.lin", "norm.linear", None),
    ("single_blocks.N.linear1", "attn.to_q attn.to_k attn.to_v proj_mlp", "attn.to_qkv_mlp_proj"),
    ("single_blocks.N.norm.query_norm", "attn.norm_q", "attn.norm_q"),
    ("single_blocks.N.norm.key_norm", "attn.norm_k", "attn.norm_k"),
    ("single_blocks.N.linear2", "proj_out", "attn.to_out"),
    ("final_layer.linear", "proj_out", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear", "norm_out.linear"),
)
# fmt: on
SWAPPED = "final_layer.adaLN_modulation.1"  # ours is shift, scale; diffusers' is scale, shift


class Part(NamedTuple):
    """A layer of diffusers that holds all rows of one of our layers, or some of them."""

    name: str
    rows: tuple[tuple[int, int], ...]  # (start, stop) in our weight, in diffusers' order


def diffusers_layer(layer: str, flux2: bool, hidden_size: int, rows: int) -> list[Part]:
    """Return diffusers' layers for one of ours, whose weight has `rows` rows; [] if unknown.

    A matrix that diffusers splits starts with q, k and v, of `hidden_size` rows each.
    """
    block, number, _ = split_block(layer)
    template = layer.replace(f".{number}.", ".N.", 1) if block else layer
    names = _THEIRS[flux2].get(template, [])
    prefix = f"{BLOCKS[block]}.{number}." if block else ""
    if template == SWAPPED:
        half = rows // 2
        return [Part(names[0], ((half, rows), (0, half)))]
    starts = [i * hidden_size for i in range(len(names))]
    stops = [*starts[1:], rows]
    return [
        Part(prefix + name, ((start, stop),)) for name, start, stop in zip(names, starts, stops)
    ]


class Place(NamedTuple):
    """Where a layer of diffusers lies in ours."""

    layer: str  # ours
    part: int  # which of diffusers' layers the layer is, by rows
    parts: int  # how many of diffusers' layers make ours
    swapped: bool  # the halves of the rows change places


def our_layer(layer: str, flux2: bool) -> Place | None:
    """Return where a layer of diffusers' transformer lies in ours; None if unknown."""
    block, number, inner = split_block(layer)
    place = _OURS[flux2].get(f"{block}.N.{inner}" if block else inner)
    return place and place._replace(layer=place.layer.replace(".N.", f".{number}.", 1))


def split_block(layer: str) -> tuple[str, str, str]:
    """Split "double_blocks.3.img_mlp.0" into block list, number and layer; "img_in" has none."""
    match = re.fullmatch(r"(?:(\w+_blocks)\.(\d+)\.)?(.*)", layer)
    assert match, layer
    block, number, inner = match.groups("")
    return block, number, inner


def _column(family: int) -> dict[str, list[str]]:
    column = {}
    for ours, *theirs in LAYERS:
        if names := theirs[family]:
            column[ours] = names.split()
    return column


_THEIRS = {False: _column(0), True: _column(1)}  # by `flux2`


def _places(family: int) -> dict[str, Place]:
    places = {}
    for ours, names in _column(family).items():
        block, _, _ = ours.partition(".N.")
        prefix = f"{BLOCKS[block]}.N." if block in BLOCKS else ""
        for part, name in enumerate(names):
            places[prefix + name] = Place(ours, part, len(names), ours == SWAPPED)
    return places


_OURS = {False: _places(0), True: _places(1)}

# ------------------------------------------------------------------ autoencoders

AUTOENCODER = (  # parts of names, ours and diffusers'; no first dot: the start of the name
    ("encoder.quant_conv.", "quant_conv."),
    ("decoder.post_quant_conv.", "post_quant_conv."),
    (".down.N.block.", ".down_blocks.N.resnets."),
    (".down.N.downsample.", ".down_blocks.N.downsamplers.0."),
    (".up.N.block.", ".up_blocks.N.resnets."),  # diffusers counts from the coarsest level
    (".up.N.upsample.", ".up_blocks.N.upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".norm_out.", ".conv_norm_out."),
)


def _rules(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str, str]]:
    """Return the pattern of each old part of a name, the part itself, and the new part."""
    rules = []
    for old, new in pairs:
        pattern = re.escape(old).replace("N", r"(\d{1,9})")
        rules.append((re.compile(pattern if old.startswith(".") else f"^{pattern}"), old, new))
    return rules


FROM_DIFFUSERS = _rules((theirs, ours) for ours, theirs in AUTOENCODER)
TO_DIFFUSERS = _rules(AUTOENCODER)


def from_diffusers(name: str, levels: int = 4) -> str:
    """Return our name of a tensor in a `vae/` file; our names stay as they are."""
    return _rename(name, FROM_DIFFUSERS, levels)


def to_diffusers(name: str, levels: int = 4) -> str:
    """Return the name in a `vae/` file of one of our autoencoder's tensors."""
    return _rename(name, TO_DIFFUSERS, levels)


def _rename(name: str, rules: Iterable[tuple[re.Pattern[str], str, str]], levels: int) -> str:
    """`levels`: resolutions of the autoencoder, 4 in every released one."""
    for pattern, old, new in rules:
        if not (found := pattern.search(name)):
            continue
        number = found[1] if "N" in old else ""
        if old.startswith(".up"):
            number = str(levels - 1 - int(number))
        name = name.replace(found[0], new.replace("N", number))
    return name

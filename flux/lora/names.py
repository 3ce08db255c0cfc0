"""The names of tensors in LoRA files: prefix, layer and role.

A key is a prefix (PREFIXES), the name of a layer and the role of the tensor (ROLES). Names are
ours, diffusers' or OTHER_NAMES, with "." or "_". Any mixture is read.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from flux.lora.merge import Rows, Target, weight_name
from flux.transformer3 import Flux3
from flux.weights import diffusers_names3
from flux.weights.diffusers_names import BLOCKS, diffusers_layer, split_block

PREFIXES = re.compile(
    r"(?:base_model\.model\.|diffusion_model\.|transformer\.|unet\.|module\.|_orig_mod\."
    r"|text_encoder(?:_2)?\.|text_encoders\.\w+\.|clip_l\.|t5(?:xxl)?\.|(?:language_)?model\."
    r"|(?:lora|oft)_unet_(?:model_)?(?:diffusion_model_)?|lora_transformer_|lycoris_"
    r"|lora_te[123]?_(?:(?:language_)?model_)*)*"
)
ADAPTER = r"(?:\.(?!(?:weight|bias|scale)\w*$)[\w-]+)?"  # the name of the adapter, which PEFT adds
NAMED = re.compile(  # a factor of PEFT with the name of its adapter
    r"\.(?:lora_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+|oft_R|boft_\w)"
    r"\.(?!(?:weight|bias|scale)\w*$)([\w-]+)(?:\.weight|\.bias)?$"
)
ROLES = tuple(  # how a key ends, and the role of its tensor; (\d+): its part of a fused layer
    (re.compile(end), role)
    for end, role in (
        (rf"lora_A{ADAPTER}(?:\.weight)?", "down"),
        (rf"lora_B{ADAPTER}(?:\.weight)?", "up"),
        (r"(?:lora_down(?:\.(\d+))?|lora_linear_layer\.down|lora\.down|down)\.weight", "down"),
        (r"(?:lora_up(?:\.(\d+))?|lora_linear_layer\.up|lora\.up|up)\.weight", "up"),
        (rf"(?:lora_B{ADAPTER}|lora_up)\.bias", "up_bias"),
        (r"alpha", "alpha"),
        (r"scalar", "scalar"),
        (rf"lora_magnitude_vector{ADAPTER}(?:\.weight)?|dora_scale|magnitude", "magnitude"),
        *((rf"{name}{ADAPTER}(?:\.weight)?", name) for name in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
            *("boft_R", "boft_s"),
        )),
        *((rf"{name}\.weight", f"glora_{name}") for name in ("a1", "a2", "b1", "b2")),
        (rf"oft_R{ADAPTER}\.weight", "oft_R"),
        (r"oft_R\.scaled_oft", "oft_scaled"),
        (r"oft_blocks(?:\.(\d+))?", "oft_blocks"),
        (r"rescale", "rescale"),
        (r"(?:(?:scale|weight)\.)?diff|w_norm", "diff"),
        (r"diff_b|b_norm", "diff_bias"),
        (r"(?:(?:scale|weight)\.)?set_weight", "value"),
        (r"reshape_weight", "reshape"),
        (rf"lora_velora_embed{ADAPTER}", "training"),  # PEFT's VeLoRA reads it in training only
        (r"scale|weight", "weight"),  # a new norm, in Black Forest Labs' control LoRAs
    )
)  # fmt: skip
MAX_DOTS = 4  # before and in a role
OTHER_NAMES = (  # our layer, its other name, first and last row / hidden size
    # fused by diffusers, and by ComfyUI
    ("img_attn.qkv", "attn.to_qkv", 0, None),
    ("txt_attn.qkv", "attn.to_added_qkv", 0, None),
    ("txt_attn.qkv", "attn.add_qkv_proj", 0, None),
    ("linear1", "attn.to_qkv", 0, 3),
    ("linear1", "linear1_qkv", 0, 3),
    # XLabs
    ("img_attn.qkv", "processor.qkv_lora1", 0, None),
    ("txt_attn.qkv", "processor.qkv_lora2", 0, None),
    ("img_attn.proj", "processor.proj_lora1", 0, None),
    ("txt_attn.proj", "processor.proj_lora2", 0, None),
    ("linear1", "processor.qkv_lora", 0, 3),
    ("linear2", "processor.proj_lora", 0, None),
    # OneTrainer: q, k, v and the MLP's rows
    ("img_in", "img_in.proj", 0, None),
    *(
        (layer, f"{layer}.{part}", part, part + 1)
        for layer in ("img_attn.qkv", "txt_attn.qkv", "linear1")
        for part in range(3)
    ),
    ("linear1", "linear1.3", 3, None),
)
TEXT_PARTS = (
    ("clip", r"text_model_|encoder_layers_|text_projection"),
    ("t5", r"encoder_block_|encoder_final_layer_norm|encoder_embed_tokens|shared"),
    ("language_model", r"layers_\d|embed_tokens|norm$|lm_head|vision_tower|multi_modal_projector"),
)
UNREAD = re.compile(  # in text encoders, but not read by FLUX
    r"(?:text_model_)?(?:text_projection|logit_scale)|encoder_embed_tokens"
    r"|norm|lm_head|(?:vision_tower|multi_modal_projector)_.*"
)


class Key(NamedTuple):
    """The parts of a tensor's name."""

    layer: str  # as the file spells it, with its prefix
    role: str  # of ROLES
    part: str  # of a fused layer; "": the tensor is for the whole layer


def parse_key(key: str) -> Key | None:
    """Split the name of a tensor; None if its end is no role."""
    dots = [i for i, letter in enumerate(key) if letter == "."]
    for dot in dots[-MAX_DOTS:]:  # from the left, to find the longest end that is a role
        for end, role in ROLES:
            if found := end.fullmatch(key, dot + 1):
                return Key(key[:dot], role, (found.groups() and found[1]) or "")
    return None


def adapter_names(keys: Iterable[str]) -> list[str]:
    """Return the names of the adapters that a file holds, as far as it names them."""
    found = map(NAMED.search, keys)
    return sorted({match[1] for match in found if match})


def layer_name(layer: str) -> str:
    """Return the name of a layer, as a file spells it, without its prefix."""
    return PREFIXES.sub("", layer, count=1).replace("._orig_mod.", ".")


def find_target(names: Mapping[str, Target], layer: str, part: str = "") -> Target:
    """Return the target of a layer as a file spells it; without a path if there is none."""
    name = _flat(layer_name(layer)).strip("_")
    spellings = [f"{name}_{part}"] if part else []
    if part in ("", "0"):  # an undivided layer is the first part of itself
        spellings += [name, name.removesuffix("_lora")]
    for spelling in spellings:
        if spelling in names:
            return names[spelling]
    return Target(_part(name))


def find_owner(names: Mapping[str, Target], key: str) -> Target:
    """Return the target of a tensor whose role is unknown; without a path if there is none."""
    for _ in range(MAX_DOTS):
        key = key.rpartition(".")[0]
        if (target := find_target(names, key)).path:
            return target
    return Target("")


def is_unread(layer: str, modules: Mapping[str, nn.Module | None]) -> bool:
    """Return whether a text encoder has this layer, but none of its results reaches FLUX."""
    name = _flat(layer_name(layer)).strip("_")
    if UNREAD.fullmatch(name):
        return bool(modules.keys() & {"clip", "t5", "language_model"})
    model: Any = modules.get("language_model")
    number = re.match(r"layers_(\d{1,4})_", name)  # FLUX.2 reads no layer after these
    return bool(model and number and int(number[1]) >= len(model.layers))


def known_names(modules: Mapping[str, nn.Module | None]) -> dict[str, Target]:
    """Return every name of a layer of the modules in a file, with "_" for ".", and its target."""
    names = {}
    for part, module in modules.items():
        if module is None:
            continue
        for path, layer in module.named_modules():
            weight = getattr(layer, weight_name(layer), None)
            if weight is None:
                continue
            aliases: dict[str, Rows] = {}
            if isinstance(module, Flux3):
                aliases = _aliases3(path, len(weight))
            elif part == "transformer":
                aliases = _aliases(path, len(weight), weight.shape[-1])
            aliases[path] = ((0, len(weight)),)
            aliases[path.removeprefix("text_model.")] = ((0, len(weight)),)  # newer transformers
            for alias, rows in aliases.items():
                names[_flat(alias)] = Target(part, path, rows)
    return names


def _aliases(path: str, outputs: int, hidden_size: int) -> dict[str, Rows]:
    """Return other tools' names of a transformer layer, or of some of its rows: name -> rows."""
    block, number, layer = split_block(path)
    prefixes = (f"{block}.{number}.", f"{BLOCKS[block]}.{number}.") if block else ("",)
    found = {}
    for flux2 in (False, True):  # tools mix the names of both families
        for part in diffusers_layer(path, flux2, hidden_size, outputs):
            found[part.name.removeprefix(prefixes[-1])] = part.rows
    for ours, name, first, last in OTHER_NAMES:
        if ours == layer:
            stop = outputs if last is None else last * hidden_size
            found[name] = ((first * hidden_size, stop),)
    return {prefix + name: rows for prefix in prefixes for name, rows in found.items()}


def _aliases3(path: str, outputs: int) -> dict[str, Rows]:
    """Return diffusers' name of a layer of FLUX 3."""
    rows: Rows = ((0, outputs),)
    if path == diffusers_names3.SWAPPED:
        rows = (outputs // 2, outputs), (0, outputs // 2)
    return {diffusers_names3.diffusers_layer(path): rows}


def _part(name: str) -> str:
    for part, start in TEXT_PARTS:
        if re.match(start, name):
            return part
    return "transformer"


def _flat(name: str) -> str:
    return name.replace(".", "_")

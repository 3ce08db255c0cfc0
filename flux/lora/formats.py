"""Read LoRA files of every common layout, and match their tensors with our layers.

    lora = read_lora(path)                                             # mapped, not loaded
    deltas = match_layers(lora, {"transformer": flux, "clip": None})   # one per changed layer
    merge(flux, [(delta, 0.8) for delta in deltas])                    # flux.lora.merge

A key is a prefix (PREFIXES), the name of a layer and the role of the tensor (ROLES). Names are
ours, diffusers' or OTHER_NAMES, with "." or "_". Any mixture is read. Files hold LoRA, DoRA, LoHa,
LoKr or plain differences.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux.errors import UserError
from flux.lora.merge import NO_DELTA, LayerDelta, Target, multiply_factors, weight_name
from flux.plain_files import MAX_JSON, parse_json, read_plain_file
from flux.weights.diffusers_names import BLOCKS, diffusers_layer, split_block
from flux.weights.files import read_header

# ------------------------------------------------------------------ names

PREFIXES = re.compile(
    r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|transformer\.|text_encoder(?:_2)?\."
    r"|text_encoders\.(?:clip_l|t5xxl)\.|lora_unet_|lora_transformer_|lora_te[123]?_|lycoris_)*"
)
ROLES = (  # how a key ends, and the role of its tensor
    (r"(?:lora_A|lora_A\.default|lora_down|lora\.down|down)\.weight", "down"),
    (r"(?:lora_B|lora_B\.default|lora_up|lora\.up|up)\.weight", "up"),
    (r"(?:lora_B|lora_B\.default|lora_up)\.bias", "up_bias"),
    (r"alpha", "alpha"),
    (r"dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?", "magnitude"),
    (r"hada_w1_a(?:\.weight)?", "hada_w1_a"),
    (r"hada_w1_b(?:\.weight)?", "hada_w1_b"),
    (r"hada_w2_a(?:\.weight)?", "hada_w2_a"),
    (r"hada_w2_b(?:\.weight)?", "hada_w2_b"),
    (r"lokr_w1(?:\.weight)?", "lokr_w1"),
    (r"lokr_w1_a(?:\.weight)?", "lokr_w1_a"),
    (r"lokr_w1_b(?:\.weight)?", "lokr_w1_b"),
    (r"lokr_w2(?:\.weight)?", "lokr_w2"),
    (r"lokr_w2_a(?:\.weight)?", "lokr_w2_a"),
    (r"lokr_w2_b(?:\.weight)?", "lokr_w2_b"),
    (r"diff", "diff"),
    (r"diff_b", "diff_bias"),
    (r"scale|weight", "value"),  # a new norm, in Black Forest Labs' control LoRAs
)
OTHER_NAMES = (  # our layer, its name fused by diffusers or in XLabs' code, rows / hidden size
    ("img_attn.qkv", "attn.to_qkv", None),
    ("txt_attn.qkv", "attn.to_added_qkv", None),
    ("img_attn.qkv", "processor.qkv_lora1", None),
    ("txt_attn.qkv", "processor.qkv_lora2", None),
    ("img_attn.proj", "processor.proj_lora1", None),
    ("txt_attn.proj", "processor.proj_lora2", None),
    ("linear1", "processor.qkv_lora", 3),
    ("linear2", "processor.proj_lora", None),
)
TEXT_PARTS = (
    ("clip", r"text_model_|encoder_layers_"),
    ("t5", r"encoder_block_|encoder_final_layer_norm|shared"),
)
FORMATS = (  # part of a key, name of such a file for messages; the first one found counts
    (r"processor\.(qkv|proj)_lora", "XLabs"),
    (r"query_norm\.scale$", "BFL control"),
    (r"^lora_transformer_", "OneTrainer"),
    (r"^lora_", "kohya"),
    (r"^lycoris_", "LyCORIS"),
    (r"^base_model\.", "PEFT"),
    (r"^diffusion_model\.", "ComfyUI"),
    (r"transformer_blocks\.", "diffusers"),
    (r"", "BFL"),
)
Rows = tuple[tuple[int, int], ...]


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
            if part == "transformer":
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
    for ours, name, widths in OTHER_NAMES:
        if block and ours == layer:
            found[name] = ((0, widths * hidden_size if widths else outputs),)
    return {prefix + name: rows for prefix in prefixes for name, rows in found.items()}


def parse_key(key: str, names: Mapping[str, Target]) -> tuple[Target, str] | None:
    """Return the target and role of a tensor; None if the end of its key is no role."""
    dots = [i for i, letter in enumerate(key) if letter == "."]
    for dot in dots:  # from the left, to find the longest end that is a role
        for end, role in ROLES:
            if re.fullmatch(end, key[dot + 1 :]):
                name = _flat(PREFIXES.sub("", key[:dot], count=1))
                return names.get(name, Target(_part(name))), role
    return None


def _part(name: str) -> str:
    for part, start in TEXT_PARTS:
        if re.match(start, name):
            return part
    return "transformer"


def _flat(name: str) -> str:
    return name.replace(".", "_")


# ------------------------------------------------------------------ files


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file. Its tensors stay mapped."""

    path: Path
    format: str  # for messages
    tensors: dict[str, Tensor]
    config: dict  # alpha and others: diffusers keeps it in the file, PEFT next to it

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.path} ({self.format} LoRA): {problem}.")

    def show(self, *keys: str) -> str:
        shown = [f"{key!r:.120} of shape {tuple(self.tensors[key].shape)}" for key in keys]
        return " and ".join(shown)


def read_lora(path: Path) -> LoraFile:
    """Map a LoRA file. UserError if the file is anything else."""
    infos, metadata = read_header(path)
    parsed = [parse_key(key, {}) for key in infos]
    if not any(found and found[1] != "value" for found in parsed):
        some = ", ".join(f"{key!r:.120}" for key in list(infos)[:3])
        raise UserError(
            f"{path}: is not a LoRA (none of its {len(infos)} tensors ({some}) has a LoRA's name). "
            "Pass a full transformer as `transformer`."
        )
    config = _configuration(path, infos, metadata)
    try:
        with safe_open(path, framework="pt", device="cpu") as mapped:
            tensors = {key: mapped.get_tensor(key) for key in infos}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be mapped ({error}).") from error
    return LoraFile(Path(path), _format(infos), tensors, config)


def _format(keys: Iterable[str]) -> str:
    for pattern, name in FORMATS:
        if any(re.search(pattern, key) for key in keys):
            return name
    return "BFL"


def _configuration(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict:
    """Return the adapter's configuration: the file's metadata, or PEFT's adapter_config.json."""
    text: str | bytes
    sidecar = Path(path).with_name("adapter_config.json")
    if "lora_adapter_metadata" in metadata:
        text, source = metadata["lora_adapter_metadata"], f"{path}: lora_adapter_metadata"
    elif any(key.startswith("base_model.") for key in keys) and sidecar.exists():
        text = read_plain_file(sidecar, MAX_JSON, f"the configuration of {path}")
        source = f"{sidecar} (of {path}): the file"
    else:
        return {}
    try:
        config = parse_json(text)
        if not isinstance(config, dict):
            raise ValueError("not a table")
        for name, value in config.items():
            if name.endswith("alpha_pattern") and not isinstance(value or {}, dict):
                raise ValueError(f"{name} is not a table")
    except ValueError as error:
        raise UserError(f"{source} is damaged ({error!s:.80}). Download it again.") from error
    return config


# ------------------------------------------------------------------ matching

FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPLETE = (  # sets of factors that make a delta
    {"down", "up"},
    {"diff"},
    {"value"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
)


def match_layers(
    lora: LoraFile, modules: Mapping[str, nn.Module | None], strict: bool = True
) -> list[LayerDelta]:
    """Return a delta for each layer that the file changes.

    `modules`: "transformer", "clip" and "t5", on any device or meta. Tensors of a part that is None
    are ignored. UserError if nothing is left, and for each tensor that does not fit, is incomplete
    or is not finite. A tensor that matches no layer is an error if `strict`, and ignored if not.
    """
    names = known_names(modules)
    found: dict[Target, dict[str, str]] = defaultdict(dict)  # target -> role -> key
    unmatched = []
    for key, tensor in lora.tensors.items():
        target, role = parse_key(key, names) or (Target(""), "")
        if not target.path and target.part in modules and modules[target.part] is None:
            continue
        if not target.path or (role == "value" and tensor.ndim != 1):
            unmatched.append(key)
        elif role in found[target]:
            raise lora.error(f"has the same tensor twice: {lora.show(found[target][role], key)}")
        else:
            found[target][role] = key
    if unmatched and strict:
        kinds = [type(module).__name__ for module in modules.values() if module is not None]
        some = ", ".join(f"{key!r:.120}" for key in unmatched[:3])
        if len(unmatched) > 3:
            some += ", ..."
        raise lora.error(
            f"has {len(unmatched)} tensors, of {len(lora.tensors)}, that match no layer of "
            f"{' or '.join(kinds)}: {some}. Pass `strict=False` to ignore them"
        )
    if not found:
        raise lora.error(
            f"changes nothing: none of its {len(lora.tensors)} tensors matches a loaded layer"
        )
    deltas = []
    for target, keys in found.items():
        module = modules[target.part]
        assert module is not None  # or no name would have matched
        deltas.append(_layer_delta(lora, target, keys, module))
    return deltas


def _layer_delta(
    lora: LoraFile, target: Target, keys: dict[str, str], module: nn.Module
) -> LayerDelta:
    """Check the tensors under these keys, by role, and return their delta."""
    factors = {role: lora.tensors[key] for role, key in keys.items()}
    for role, tensor in factors.items():
        allowed = FLOATS + INTEGERS if role == "alpha" else FLOATS
        if tensor.numel() == 0 or tensor.dtype not in allowed:
            raise lora.error(
                f"has {lora.show(keys[role])} and {tensor.dtype}, expected floating-point numbers"
            )
        if not tensor.float().isfinite().all():
            raise lora.error(f"has NaN or infinity in {keys[role]!r:.120}. Download it again")
    core = factors.keys() - NO_DELTA
    if core not in COMPLETE and factors.keys() != {"diff_bias"}:
        missing = [sorted(complete - core) for complete in COMPLETE if complete > core]
        problem = "which do not belong together"
        if missing:
            fewest = min(missing, key=len)
            problem = f"without its {' and '.join(fewest)}"
        raise lora.error(f"has {lora.show(*keys.values())}, {problem}")
    columns = _check_shapes(lora, target, keys, module)
    scaling = _scaling(lora, target.part, next(iter(keys.values())), factors)
    factors.pop("alpha", None)
    return LayerDelta(target, factors, scaling, columns, lora.path)


def _check_shapes(lora: LoraFile, target: Target, keys: dict[str, str], module: nn.Module) -> int:
    """Return the columns of the delta. UserError unless all shapes fit these rows of the layer."""
    layer = module.get_submodule(target.path)
    weight = getattr(layer, weight_name(layer))
    rows = sum(stop - start for start, stop in target.rows)
    expected = (rows, *weight.shape[1:])
    factors = {role: lora.tensors[key].to("meta", torch.float32) for role, key in keys.items()}

    def check(roles: Sequence[str], shape: tuple, allowed: Sequence[tuple | None]) -> None:
        if shape not in allowed:
            shown = lora.show(*(keys[role] for role in roles))
            takes = "no bias" if allowed[0] is None else allowed[0]
            raise lora.error(
                f"does not fit {type(module).__name__}: {shown}, but {target.path} takes {takes}"
            )

    shape = expected
    core = [role for role in keys if role not in NO_DELTA]
    if core:
        try:
            shape = tuple(multiply_factors(factors).shape)
        except RuntimeError:  # the meta device multiplies shapes only
            shown = lora.show(*(keys[role] for role in core))
            raise lora.error(f"has {shown}, which cannot be multiplied") from None
        allowed = [expected]
        if target.path == "img_in" and len(shape) == 2:
            if 0 in (shape[1] % expected[1], expected[1] % shape[1]):  # more channels, or fewer
                allowed.append((rows, shape[1]))
        check(core, shape, allowed)
    bias = (rows,) if getattr(layer, "bias", None) is not None else None
    allowed_shapes: dict[str, Sequence[tuple | None]] = {
        "magnitude": ((rows,), (rows, 1), (1, *shape[-1:])),
        "up_bias": (bias,),
        "diff_bias": (bias,),
        "alpha": ((), (1,)),
    }
    for role, shapes in allowed_shapes.items():
        if role in factors:
            check([role], tuple(factors[role].shape), shapes)
    return shape[-1]


def _scaling(lora: LoraFile, part: str, key: str, factors: Mapping[str, Tensor]) -> float:
    """Return alpha/rank. Alpha is the file's, else the configuration's, else the rank."""
    ranks = [
        factors[role].shape[0]
        for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        if role in factors
    ]
    if not ranks:  # full matrices have no rank; LyCORIS writes a placeholder as their alpha
        return 1.0
    rank = ranks[0]
    if "alpha" in factors:
        return factors["alpha"].item() / rank
    prefix = {"transformer": "transformer.", "clip": "text_encoder.", "t5": "text_encoder_2."}[part]
    config = {name.removeprefix(prefix): value for name, value in lora.config.items()}
    alpha = config.get("lora_alpha", config.get("alpha", rank))  # "alpha": PEFT's LoHa
    layer = "." + re.sub(r"\.lora_.*", "", key)
    for name, value in (config.get("alpha_pattern") or {}).items():
        if layer.endswith("." + name.lstrip("^")):
            alpha = value
            break
    if not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise lora.error(f"has a lora_alpha in its configuration that is no number: {alpha!s:.80}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)

"""LoRA and its kin (DoRA, LoHa, LoKr, plain differences): files of every common layout, merged into our weights.

    lora = read(path)                                               # mapped, not loaded
    patches = place(lora, {"transformer": flux, "clip": None})      # every tensor finds its module, or UserError
    merge(flux, [(patch, 0.8) for patch in patches])                # of all files together: the sum is rounded once

The layouts differ in what they write before the name of a layer (PREFIXES), how they call it (NAMES, and "_" for "."), and
what they write after it (ROLES); any mixture of the three is read. Merging costs nothing per step and leaves every module and
its path as it is, which wrapping layers to compute Wx + s·B(Ax) would not.
"""

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux.errors import UserError
from flux.weights.diffusers_names import BLOCKS, diffusers_layer, split_block
from flux.weights.files import read_header
from flux.weights.quantization import QuantizedLinear

# ---------------------------------------------------------------------------------------------------------- names

PREFIXES = re.compile(
    r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|transformer\.|text_encoder(?:_2)?\.|text_encoders\.(?:clip_l|t5xxl)\."
    r"|lora_unet_|lora_transformer_|lora_te[123]?_|lycoris_)*"
)
ROLES = (  # how a key ends, and what its tensor is
    (r"(?:lora_A|lora_A\.default|lora_down|lora\.down|down)\.weight", "down"),
    (r"(?:lora_B|lora_B\.default|lora_up|lora\.up|up)\.weight", "up"),
    (r"(?:lora_B|lora_B\.default|lora_up)\.bias", "up_bias"),
    (r"alpha", "alpha"),
    (r"dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?", "magnitude"),
    *(
        (rf"{factor}(?:\.weight)?", factor)
        for factor in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    ),
    *(
        (rf"{factor}(?:\.weight)?", factor)
        for w in ("lokr_w1", "lokr_w2")
        for factor in (w, f"{w}_a", f"{w}_b")
    ),
    (r"diff", "diff"),
    (r"diff_b", "diff_bias"),
    (r"scale|weight", "value"),  # of a norm, whole: Black Forest Labs' control LoRAs bring new ones
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
FORMATS = (  # marks in the keys, and what to call such a file; the first one found counts
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


class Place(NamedTuple):
    """Rows of the weight of a module, as (start, stop) in the order of the file's; `path` None: not in the module."""

    part: str  # "transformer", "clip" or "t5"
    path: str | None
    rows: tuple[tuple[int, int], ...] = ()


def known_names(modules: Mapping[str, nn.Module | None]) -> dict[str, Place]:
    """Every name under which a layer of the modules may stand in a file, with "_" for ".", and what it stands for."""
    names = {}
    for part, module in modules.items():
        for path, layer in module.named_modules() if module is not None else ():
            if (weight := getattr(layer, _weight_name(layer), None)) is not None:
                aliases = (
                    _aliases(path, len(weight), weight.shape[-1]) if part == "transformer" else {}
                )
                aliases[path] = aliases[path.removeprefix("text_model.")] = (
                    (0, len(weight)),
                )  # newer transformers omit it
                names |= {_flat(alias): Place(part, path, rows) for alias, rows in aliases.items()}
    return names


def _aliases(path: str, outputs: int, hidden_size: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return other tools' names of a layer of the transformer, or of some of its rows: name -> rows."""
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


def address(key: str, names: Mapping[str, Place]) -> tuple[Place, str] | None:
    """Where a tensor of a file belongs, and its role there; None if the end of its key tells no role."""
    for dot in (
        i for i, letter in enumerate(key) if letter == "."
    ):  # the longest end that is a role
        role = next((role for end, role in ROLES if re.fullmatch(end, key[dot + 1 :])), None)
        if role:
            name = _flat(PREFIXES.sub("", key[:dot], count=1))
            part = next(
                (part for part, start in TEXT_PARTS if re.match(start, name)), "transformer"
            )
            return names.get(name, Place(part, None)), role
    return None


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _weight_name(layer: nn.Module) -> str:
    return "scale" if isinstance(getattr(layer, "scale", None), Tensor) else "weight"


# ---------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True, eq=False)
class Lora:
    """A file: its tensors, which stay mapped, and its configuration, which diffusers keeps in it and PEFT beside it."""

    path: Path
    format: str  # for messages
    tensors: dict[str, Tensor]
    config: dict

    def refuse(self, fault: str) -> UserError:
        return UserError(f"{self.path} ({self.format} LoRA) {fault}.")

    def show(self, *keys: str) -> str:
        return " and ".join(
            f"{key!r:.120} of shape {tuple(self.tensors[key].shape)}" for key in keys
        )


def read(path: Path) -> Lora:
    """A safetensors file with at least one tensor that is named as an adapter's; UserError if it is anything else."""
    infos, metadata = read_header(path)
    if not any(found and found[1] != "value" for found in (address(key, {}) for key in infos)):
        some = ", ".join(f"{key!r:.120}" for key in list(infos)[:3])
        raise UserError(
            f"{path} is not a LoRA: none of its {len(infos)} tensors ({some}) is named as one; "
            "a whole transformer goes to --transformer."
        )
    config = _configuration(path, infos, metadata)
    try:
        with safe_open(path, framework="pt", device="cpu") as mapped:
            tensors = {key: mapped.get_tensor(key) for key in infos}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be mapped: {error}.") from error
    name = next(name for mark, name in FORMATS if any(re.search(mark, key) for key in infos))
    return Lora(Path(path), name, tensors, config)


def _configuration(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict:
    """What is said of alpha, if anything is: by the file itself, or, where PEFT wrote it, by adapter_config.json beside it."""
    inside, beside = (
        "lora_adapter_metadata" in metadata,
        Path(path).with_name("adapter_config.json"),
    )
    if not inside and not (any(key.startswith("base_model.") for key in keys) and beside.is_file()):
        return {}
    damaged = (
        f"{path} has a damaged lora_adapter_metadata"
        if inside
        else f"{beside}, which belongs to {path}, is damaged"
    )
    try:
        config = json.loads(
            metadata["lora_adapter_metadata"] if inside else beside.read_text(encoding="utf-8")
        )
        if not isinstance(config, dict) or not all(
            isinstance(config[name] or {}, dict)
            for name in config
            if name.endswith("alpha_pattern")
        ):
            raise ValueError("not a table")
        return config
    except OSError as error:
        raise UserError(
            f"{beside}, which belongs to {path}, cannot be read: {error.strerror}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{damaged} ({error!s:.80}); download it again.") from error


# ---------------------------------------------------------------------------------------------------------- placing

PRODUCTS = (  # sets of factors that make a change of a weight, each complete
    {"down", "up"},
    {"diff"},
    {"value"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
)
BESIDE = {"alpha", "magnitude", "up_bias", "diff_bias"}


@dataclass(frozen=True, eq=False)
class Patch:
    """What one file does to some rows of one layer."""

    place: Place
    factors: dict[str, Tensor]  # by role
    scaling: float  # alpha/rank
    columns: int  # of the change, which differ from the weight's only in img_in
    source: Path

    def change(self, weight: Tensor) -> Tensor:
        """What to add to these rows of the weight at scale 1: (rows, columns) -> (rows, self.columns), in its dtype.

        In place where it can be: these are the largest matrices of a network, made wide.
        """
        factors = {role: factor.to(weight) for role, factor in self.factors.items()}
        made, before = product(factors), weight[..., : self.columns]
        difference = (
            self.scaling * made
            if self.factors.keys() & {"diff", "value"}
            else made.mul_(self.scaling)
        )
        if "magnitude" not in factors:
            return difference
        # DoRA (Liu et al. 2024, arXiv:2402.09353): rows are given these lengths; where there is one number a column, columns
        magnitude = (
            factors["magnitude"]
            if factors["magnitude"].ndim == 2
            else factors["magnitude"][:, None]
        )
        changed = difference.add_(before)
        length = changed.norm(dim=0 if len(magnitude) == 1 else 1, keepdim=True)
        return changed.mul_(magnitude).div_(length).sub_(before)


def product(factors: Mapping[str, Tensor]) -> Tensor:
    """(rows, columns): B·A of LoRA, (B1·A1) * (B2·A2) of LoHa, the Kronecker product of LoKr, or a tensor as it stands."""
    if "down" in factors:
        return factors["up"] @ factors["down"]
    if "hada_w1_a" in factors:
        return (factors["hada_w1_a"] @ factors["hada_w1_b"]).mul_(
            factors["hada_w2_a"] @ factors["hada_w2_b"]
        )
    if "diff" in factors or "value" in factors:
        return factors["diff" if "diff" in factors else "value"]
    w1, w2 = (
        factors[w] if w in factors else factors[f"{w}_a"] @ factors[f"{w}_b"]
        for w in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(w1, w2)


def place(
    lora: Lora, modules: Mapping[str, nn.Module | None], partial: bool = False
) -> list[Patch]:
    """One patch for each layer that the file changes; `modules` by part, "transformer", "clip", "t5", on any device or meta.

    Tensors of a part that is None are left out. UserError, with keys and shapes, for any other tensor that has no place
    (with `partial` these are left out too), that does not fit, is incomplete or is not finite, and if nothing is left.
    """
    names, found, unplaced = known_names(modules), defaultdict(dict), []
    for key, tensor in lora.tensors.items():
        where, role = address(key, names) or (Place("", None), "")
        if where.path is None and where.part in modules and modules[where.part] is None:
            continue
        if where.path is None or (role == "value" and tensor.ndim != 1):
            unplaced.append(key)
        elif role in found[where]:
            raise lora.refuse(f"has the same twice: {lora.show(found[where][role], key)}")
        else:
            found[where][role] = key
    if unplaced and not partial:
        kinds = " or ".join(
            type(module).__name__ for module in modules.values() if module is not None
        )
        some = ", ".join(f"{key!r:.120}" for key in unplaced[:3]) + (
            ", ..." if len(unplaced) > 3 else ""
        )
        raise lora.refuse(
            f"has {len(unplaced)} tensors, of {len(lora.tensors)}, that have no place in {kinds}: {some}; "
            "partial=True (--lora-partial) leaves them out"
        )
    if not found:
        raise lora.refuse(
            f"changes nothing: none of its {len(lora.tensors)} tensors belongs to what is loaded"
        )
    return [_patch(lora, where, keys, modules[where.part]) for where, keys in found.items()]


def _patch(lora: Lora, where: Place, keys: dict[str, str], module: nn.Module) -> Patch:
    """A patch of the tensors under these keys, by role, after every check."""
    factors = {role: lora.tensors[key] for role, key in keys.items()}
    for role, tensor in factors.items():
        if tensor.numel() == 0 or not (tensor.is_floating_point() or role == "alpha"):
            raise lora.refuse(
                f"has {lora.show(keys[role])} and {tensor.dtype}, which is no matrix of floats"
            )
        if not tensor.float().isfinite().all():
            raise lora.refuse(f"has NaN or infinity in {keys[role]!r:.120}; get it again")
    core = factors.keys() - BESIDE
    if core not in PRODUCTS and factors.keys() != {"diff_bias"}:
        missing = min((whole - core for whole in PRODUCTS if whole > core), key=len, default=())
        lacks = (
            f"without its {' and '.join(sorted(missing))}"
            if missing
            else "which do not belong together"
        )
        raise lora.refuse(f"has {lora.show(*keys.values())}, {lacks}")
    columns = _check_fit(lora, where, keys, module)
    scaling = _scaling(lora, where.part, next(iter(keys.values())), factors)
    return Patch(
        where,
        {role: tensor for role, tensor in factors.items() if role != "alpha"},
        scaling,
        columns,
        lora.path,
    )


def _check_fit(lora: Lora, where: Place, keys: dict[str, str], module: nn.Module) -> int:
    """The columns of the change; UserError unless it and all beside it have the shapes of these rows of the layer."""
    layer, core = module.get_submodule(where.path), [role for role in keys if role not in BESIDE]
    weight, rows = (
        getattr(layer, _weight_name(layer)),
        sum(stop - start for start, stop in where.rows),
    )
    wanted = shape = (rows, *weight.shape[1:])
    factors = {role: lora.tensors[key].to("meta", torch.float32) for role, key in keys.items()}
    try:
        shape = tuple(product(factors).shape) if core else wanted
    except RuntimeError:  # on the meta device a product is of shapes only
        raise lora.refuse(
            f"has {lora.show(*(keys[role] for role in core))}, which cannot be multiplied"
        ) from None
    widened = (
        where.path == "img_in"
        and len(shape) == 2
        and 0 in (shape[1] % wanted[1], wanted[1] % shape[1])
    )
    bias = (rows,) if getattr(layer, "bias", None) is not None else None
    for roles, has, allowed in (
        (core, shape, (wanted, (rows, shape[-1]) if widened else wanted)),
        (["magnitude"], None, ((rows,), (rows, 1), (1, *shape[-1:]))),
        (["up_bias"], None, (bias,)),
        (["diff_bias"], None, (bias,)),
        (["alpha"], None, ((), (1,))),
    ):
        if (
            all(role in factors for role in roles)
            and (tuple(factors[roles[0]].shape) if has is None else has) not in allowed
        ):
            shown = lora.show(*(keys[role] for role in roles))
            takes = "no bias" if allowed[0] is None else allowed[0]
            raise lora.refuse(
                f"does not fit {type(module).__name__}: {shown}, but {where.path} takes {takes}"
            )
    return shape[-1]


def _scaling(lora: Lora, part: str, key: str, factors: Mapping[str, Tensor]) -> float:
    """alpha/rank; alpha is the file's, or the configuration's, which has another name for it in PEFT's LoHa, or the rank."""
    ranks = [
        factors[role].shape[0]
        for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        if role in factors
    ]
    if (
        not ranks
    ):  # a product of whole matrices has no rank, and LyCORIS leaves a placeholder for its alpha
        return 1.0
    if "alpha" in factors:
        return factors["alpha"].item() / ranks[0]
    prefix = dict(transformer="transformer.", clip="text_encoder.", t5="text_encoder_2.")[part]
    config = {name.removeprefix(prefix): value for name, value in lora.config.items()}
    name = "." + re.sub(r"\.lora_.*", "", key)
    layers = {
        "." + layer.lstrip("^"): alpha
        for layer, alpha in (config.get("alpha_pattern") or {}).items()
    }
    default = config.get("lora_alpha", config.get("alpha", ranks[0]))
    alpha = next((layers[layer] for layer in layers if name.endswith(layer)), default)
    if not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise lora.refuse(f"has a lora_alpha in its configuration that is no number: {alpha!s:.80}")
    return alpha / (ranks[0] ** 0.5 if config.get("use_rslora") else ranks[0])


# ---------------------------------------------------------------------------------------------------------- merging


@torch.no_grad()
def merge(
    module: nn.Module,
    patches: Sequence[tuple[Patch, float]],
    each: Callable[[str], None] = lambda path: None,
) -> None:
    """W + sum of scale · change, in float32, rounded once to the dtype of W (float8 too): all files in one call.

    A change is alpha/rank · BA, or all that DoRA does to W, so that a scale of 0 leaves W, and 1 makes what PEFT makes.
    New norms and a wider img_in come at every scale, as Black Forest Labs have it. A quantised layer that is changed becomes a
    plain Linear, its weight in the dtype that the module computes in: to quantise it anew would lose more.
    No old tensor is changed or kept: to undo a merge, load the module anew. `each` is called with the path of each layer that
    was changed, when it is. UserError if a sum overflows; the module is then of no use.
    """
    layers = defaultdict(list)
    for patch, scale in patches:
        if not math.isfinite(scale):
            raise UserError(
                f"{patch.source} cannot be merged at scale {scale}: give a finite number."
            )
        layers[patch.place.path].append((patch, scale))
    dtype = next(
        module.parameters()
    ).dtype  # that it computes in: what is quantised is no parameter
    for path, group in layers.items():
        layer = module.get_submodule(path)
        changed = dict(_merged(layer, path, group, dtype))
        if isinstance(layer, QuantizedLinear) and "weight" in changed:
            layer = layer.to_linear(changed["weight"])
            module.set_submodule(path, layer)
        for name, tensor in changed.items():
            setattr(
                layer, name, nn.Parameter(tensor, requires_grad=getattr(layer, name).requires_grad)
            )
            if path == "img_in" and name == "weight":  # which may have become wider
                layer.in_features = tensor.shape[1]
                module.config = replace(module.config, in_channels=tensor.shape[1])
        each(path)


def _merged(
    layer: nn.Module, path: str, group: Sequence[tuple[Patch, float]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The new weight and bias of a layer, as far as patches change them. `dtype`: of the weight, where it was quantised."""
    new = [patch for patch, _ in group if "value" in patch.factors]
    if len(new) > 1:
        raise UserError(
            f"{new[0].source} and {new[1].source} cannot be merged together: both replace {path}."
        )
    name, width = _weight_name(layer), max(patch.columns for patch, _ in group)
    changing = [(patch, scale) for patch, scale in group if patch.factors.keys() - BESIDE]
    if changing:
        quantised = isinstance(layer, QuantizedLinear)
        old = layer.dequantize() if quantised else getattr(layer, name)
        wide = (new[0].factors["value"] if new else old).to(old.device, _wide(old))
        wide = F.pad(wide, (0, max(0, width - wide.shape[-1])))
        own = (
            quantised or wide.dtype != old.dtype
        ) and not new  # nobody else's memory; and only DoRA needs what was there
        total = (
            wide
            if own and not any("magnitude" in patch.factors for patch, _ in changing)
            else wide.clone()
        )
        for patch, scale in changing:
            if patch not in new:
                spans = [wide[a:b] for a, b in patch.place.rows]
                _add(
                    total,
                    patch,
                    patch.change(spans[0] if len(spans) == 1 else torch.cat(spans)).mul_(scale),
                )
        yield name, _rounded(total, dtype if quantised else old.dtype, path)
    biases = [
        (patch, scale, role)
        for patch, scale in group
        for role in ("up_bias", "diff_bias")
        if role in patch.factors
    ]
    if biases:
        total = layer.bias.to(_wide(layer.bias), copy=True)
        for patch, scale, role in biases:
            _add(
                total,
                patch,
                scale * (patch.scaling if role == "up_bias" else 1) * patch.factors[role].to(total),
            )
        yield "bias", _rounded(total, layer.bias.dtype, path)


def _add(total: Tensor, patch: Patch, difference: Tensor) -> None:
    spans = patch.place.rows
    for (start, stop), piece in zip(
        spans, difference.split([b - a for a, b in spans]), strict=True
    ):
        total[start:stop][..., : piece.shape[-1]] += piece  # the first columns, if there are more


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _rounded(total: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    limit = torch.finfo(dtype).max
    lowest, highest = total.aminmax()
    if not (highest <= limit and lowest >= -limit):
        raise UserError(
            f"the LoRAs do not fit {path}: their sum exceeds {limit:g}, the most that {dtype} holds; "
            "give smaller scales."
        )
    return total.to(dtype)

"""Read LoRA files of every common layout, and match their tensors with our layers.

    lora = read_lora(path)                                             # mapped, not loaded
    deltas = match_layers(lora, {"transformer": flux, "clip": None})   # one per changed layer
    merge(flux, [(delta, 0.8) for delta in deltas])                    # flux.lora.merge

`names.py` splits the names of tensors, `kinds.py` multiplies them, `peft_config.py` reads alphas.
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.errors import UserError
from flux.lora.kinds import COMPLETE, NO_DELTA, ROTATIONS, ranks, weight_change
from flux.lora.merge import LayerDelta, Target, weight_name
from flux.lora.names import (
    adapter_names,
    find_owner,
    find_target,
    is_unread,
    known_names,
    parse_key,
)
from flux.lora.peft_config import PeftConfig, adapter_file, peft_name, read_config
from flux.weights.files import preview, read_header
from flux.weights.mapping import map_tensors

FORMATS = (  # part of a key, name of such a file for messages; the first one found counts
    (r"processor\.(qkv|proj)_lora", "XLabs"),
    (r"query_norm\.scale$", "BFL control"),
    (r"^lora_transformer_|\.(qkv|linear1)\.\d\.", "OneTrainer"),
    (r"^(lora|oft)_", "kohya"),
    (r"^lycoris_", "LyCORIS"),
    (r"^base_model\.", "PEFT"),
    (r"^diffusion_model\.", "ComfyUI"),
    (r"transformer_blocks\.", "diffusers"),
    (r"", "BFL"),
)
OTHERS = (  # part of a key, what a file with such a key is
    (r"ip_adapter", "an IP-adapter"),
    (r"controlnet_|input_hint_block", "a ControlNet"),
    (r"^(pulid_ca|id_adapter)", "a PuLID adapter"),
    (r"\.ia3_l|\.on_input$", "an (IA)3 adapter"),
    (r"\.vera_lambda", "a VeRA adapter"),
)
SHOWN = 20  # layers, or groups of them, in the warning of what was left out


# ------------------------------------------------------------------ files


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file. Its tensors stay mapped."""

    path: Path  # as the user named it
    format: str  # for messages
    tensors: dict[str, Tensor]
    config: PeftConfig

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.path} ({self.format} LoRA): {problem}.")

    def show(self, *keys: str) -> str:
        shown = [f"{key!r:.120} of shape {tuple(self.tensors[key].shape)}" for key in keys]
        return " and ".join(shown)


def read_lora(path: Path) -> LoraFile:
    """Map a LoRA file, or the one of a PEFT folder. UserError if the file is anything else."""
    path = adapter_file(path)
    infos, metadata = read_header(path)
    roles = {key.role for key in map(parse_key, infos) if key}
    for pattern, kind in OTHERS:
        if any(re.search(pattern, key) for key in infos) and "down" not in roles:
            raise UserError(f"{path}: is {kind}, which is not supported.")
    if not roles - {"weight"}:
        raise UserError(
            f"{path}: is not a LoRA (none of its {len(infos)} tensors ({_some(infos)}) has a "
            "LoRA's name). Pass a full transformer as `transformer`."
        )
    if len(names := adapter_names(infos)) > 1:
        raise UserError(
            f"{path}: holds {len(names)} adapters ({preview([repr(name) for name in names])}), "
            "which are LoRAs of their own. Save each of them to a file."
        )
    config = read_config(path, metadata)
    tensors = {key: _as_matrix(tensor) for key, tensor in map_tensors(infos)}
    return LoraFile(path, _format(infos), tensors, config)


def _as_matrix(tensor: Tensor) -> Tensor:
    """Drop the two last sides of a 1x1 convolution's weight (rows, columns, 1, 1)."""
    return tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def _format(keys: Iterable[str]) -> str:
    for pattern, name in FORMATS:
        if any(re.search(pattern, key) for key in keys):
            return name
    return "BFL"


def _some(keys: Iterable[str], shown: int = 3) -> str:
    return preview([f"{key!r:.120}" for key in keys], shown)


# ------------------------------------------------------------------ matching

FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NUMBERS = {"alpha", "scalar"}  # roles of tensors of one element
DTYPES = {"alpha": FLOATS + INTEGERS, "reshape": INTEGERS, "oft_scaled": (*FLOATS, torch.bool)}
BIASES = {"up_bias", "diff_bias"}
Found = dict[Target, dict[str, str]]  # target -> role -> key


def match_layers(
    lora: LoraFile, modules: Mapping[str, nn.Module | None], strict: bool = True
) -> list[LayerDelta]:
    """Return a delta for each layer that the file changes.

    `modules`: "transformer", and "clip" and "t5", or "language_model", on any device or meta.
    Tensors of a part that is None are ignored, and so are tensors that FLUX never reads. UserError
    if nothing is left, if a layer is changed twice, and for each tensor that does not fit, is
    incomplete or is not finite. A tensor that matches no layer is an error if `strict`; if not, a
    warning lists what was left out. A tensor of a layer that the file changes is never left out.
    """
    found, unmatched = _find_targets(lora, modules)
    _require_all_factors(lora, modules, found, unmatched)
    if unmatched and strict:
        raise lora.error(
            f"has {len(unmatched)} tensors, of {len(lora.tensors)}, that match no layer of "
            f"{_kinds(modules)}: {_some(unmatched)}. Pass `strict=False` to ignore them"
        )
    if not found:
        raise lora.error(
            f"changes nothing: none of its {len(lora.tensors)} tensors matches a loaded layer"
        )
    _require_one_spelling(lora, found)
    deltas = []
    for target, keys in found.items():
        module = modules[target.part]
        assert module is not None  # or no name would have matched
        deltas.append(_layer_delta(lora, target, keys, module))
    if all(map(_is_nothing, deltas)):
        warnings.warn(
            f"{lora.path}: changes nothing at any scale, because factors or alphas are zero",
            stacklevel=2,
        )
    if unmatched:
        warnings.warn(
            f"{lora.path}: left out {len(unmatched)} of {len(lora.tensors)} tensors, which match "
            f"no layer of {_kinds(modules)}: {_summary(unmatched)}",
            stacklevel=2,
        )
    return deltas


def _is_nothing(delta: LayerDelta) -> bool:
    """Return whether a delta is zero, as that of a LoRA before its training."""
    up, core = delta.factors.get("up"), delta.factors.keys() - NO_DELTA
    if delta.factors.keys() & (BIASES | {"magnitude"}) or not core:
        return False
    if delta.scaling == 0:
        return True
    return up is not None and not up.is_meta and not up.float().any()


def _summary(keys: Sequence[str]) -> str:
    """Return the layers of these tensors; where they are many, with "N" for each number."""
    layers = list(dict.fromkeys(map(_spelling, keys)))
    if len(layers) <= SHOWN:
        return _some(layers, SHOWN)
    groups = Counter(re.sub(r"(?<=[._])\d+(?=[._]|$)", "N", layer) for layer in layers)
    return preview([f"{name!r:.120} ({count})" for name, count in groups.items()], SHOWN)


def _kinds(modules: Mapping[str, nn.Module | None]) -> str:
    return " or ".join(type(module).__name__ for module in modules.values() if module is not None)


def _find_targets(
    lora: LoraFile, modules: Mapping[str, nn.Module | None]
) -> tuple[Found, list[str]]:
    """Return the keys by target and role, and the keys that match no layer."""
    names = known_names(modules)
    found: Found = defaultdict(dict)
    unmatched = []
    for key, tensor in lora.tensors.items():
        parsed = parse_key(key)
        if parsed is None:
            unmatched.append(key)
            continue
        target, role = find_target(names, parsed.layer, parsed.part), parsed.role
        if role == "training":
            continue
        if not target.path and target.part in modules and modules[target.part] is None:
            continue
        if not target.path and is_unread(parsed.layer, modules):
            continue
        if role == "weight" and tensor.ndim == 1:
            role = "value"
        if not target.path or role == "weight":
            unmatched.append(key)
        elif role in found[target]:
            raise lora.error(f"has the same tensor twice: {lora.show(found[target][role], key)}")
        else:
            found[target][role] = key
    _share_alphas(found)
    return {target: keys for target, keys in found.items() if keys}, unmatched


def _share_alphas(found: Found) -> None:
    """Give the alpha of a fused layer to its parts, if the file has only parts, as sd-scripts."""
    for whole in [target for target, keys in found.items() if keys.keys() == {"alpha"}]:
        layer = _spelling(found[whole]["alpha"])
        parts = [
            (target, keys)
            for target, keys in found.items()
            if target != whole and any(_spelling(key) == layer for key in keys.values())
        ]
        for _, keys in parts:
            keys.setdefault("alpha", found[whole]["alpha"])
        if parts:
            found[whole].clear()


def _spelling(key: str) -> str:
    parsed = parse_key(key)
    return parsed.layer if parsed else key


def _require_all_factors(
    lora: LoraFile, modules: Mapping[str, nn.Module | None], found: Found, unmatched: Sequence[str]
) -> None:
    """UserError if an unmatched tensor belongs to a layer that the file changes."""
    names = known_names(modules) if unmatched else {}
    changed = {(target.part, target.path) for target in found}
    unknown = [key for key in unmatched if find_owner(names, key)[:2] in changed]
    if unknown:
        raise lora.error(
            f"has {len(unknown)} tensors, of {len(lora.tensors)}, whose meaning is not known, of "
            f"layers that it changes: {_some(unknown)}. The change would be wrong without them"
        )


def _require_one_spelling(lora: LoraFile, found: Found) -> None:
    """UserError if the file has a layer, or some rows of it, under two names."""
    layers = defaultdict(list)
    for target, keys in found.items():
        layers[target.part, target.path].append((target, keys))
        if len({_spelling(key) for key in keys.values()}) > 1:
            shown = lora.show(min(keys.values(), key=_spelling), max(keys.values(), key=_spelling))
            raise lora.error(f"has a layer under two names: {shown}")
    for group in layers.values():
        for (one, keys), (two, others) in combinations(group, 2):
            biases = keys.keys() & BIASES and others.keys() & BIASES
            weights = keys.keys() - BIASES and others.keys() - BIASES
            if (biases or weights) and _overlap(one, two):
                shown = lora.show(next(iter(keys.values())), next(iter(others.values())))
                raise lora.error(f"changes the same rows twice, under two names: {shown}")


def _overlap(one: Target, two: Target) -> bool:
    return any(a < d and c < b for a, b in one.rows for c, d in two.rows)


def _layer_delta(
    lora: LoraFile, target: Target, keys: dict[str, str], module: nn.Module
) -> LayerDelta:
    """Check the tensors under these keys, by role, and return their delta."""
    factors = {role: lora.tensors[key] for role, key in keys.items()}
    for role, tensor in factors.items():
        if tensor.numel() == 0 or tensor.dtype not in DTYPES.get(role, FLOATS):
            raise lora.error(
                f"has {lora.show(keys[role])} and {tensor.dtype}, expected floating-point numbers"
            )
        if not (tensor.is_meta or tensor.float().isfinite().all()):
            raise lora.error(f"has NaN or infinity in {keys[role]!r:.120}. Download it again")
    core = factors.keys() - NO_DELTA
    if core not in COMPLETE and not (factors.keys() <= BIASES):
        missing = [sorted(complete - core) for complete in COMPLETE if complete > core]
        problem = "which do not belong together"
        if missing:
            fewest = min(missing, key=len)
            problem = f"without its {' and '.join(fewest)}"
        raise lora.error(f"has {lora.show(*keys.values())}, {problem}")
    if "up_bias" in factors and "up" not in factors:
        raise lora.error(f"has {lora.show(keys['up_bias'])}, without its up and down")
    if core & ROTATIONS and factors.keys() & {"magnitude", "scalar"}:
        raise lora.error(f"has {lora.show(*keys.values())}, which do not belong together")
    config = lora.config.part(target.part)
    layer = peft_name(_spelling(next(iter(keys.values()))))
    config.require_target(layer)
    config.require_role(layer, keys)
    options = _options(config, target, factors)
    columns = _check_shapes(lora, target, keys, module, options)
    scaling = _scaling(config, layer, factors)
    tensors = {role: factors[role] for role in factors.keys() - {"alpha", "scalar", "reshape"}}
    return LayerDelta(target, tensors, scaling, columns, lora.path, options)


def _options(config: PeftConfig, target: Target, factors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the numbers of an OFT or BOFT, for `weight_change`."""
    options = {}
    if "oft_R" in factors and config.neumann_terms is not None:
        options["neumann_terms"] = float(config.neumann_terms)
    if "oft_blocks" in factors and factors.get("alpha", torch.zeros(1)).numel() == 1:
        alpha = factors["alpha"].item() if "alpha" in factors else 0
        rows = sum(stop - start for start, stop in target.rows)
        options["constraint"] = max(0, alpha * rows)  # 0: none
    return options


def _check_shapes(
    lora: LoraFile,
    target: Target,
    keys: dict[str, str],
    module: nn.Module,
    options: Mapping[str, float],
) -> int:
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

    for role in NUMBERS & factors.keys():
        if factors[role].numel() == 1:
            factors[role] = factors[role].flatten()
    shape = expected
    core = [role for role in keys if role not in NO_DELTA]
    if core:
        try:
            shape = tuple(
                weight_change(factors, torch.empty(expected, device="meta"), options).shape
            )
        except (RuntimeError, IndexError, ValueError):  # the meta device multiplies shapes only
            shown = lora.show(*(keys[role] for role in core))
            raise lora.error(
                f"has {shown}, which cannot be multiplied for {target.path} of shape {expected}"
            ) from None
        allowed = [expected]
        if target.path == "img_in" and len(shape) == 2:
            if 0 in (shape[1] % expected[1], expected[1] % shape[1]):  # more channels, or fewer
                allowed.append((rows, shape[1]))
        check(core, shape, allowed)
        if "value" in core and (rows != len(weight) or shape[-1] < expected[-1]):
            raise lora.error(f"replaces a part of {target.path}: {lora.show(keys['value'])}")
    bias = (rows,) if getattr(layer, "bias", None) is not None else None
    allowed_shapes: dict[str, Sequence[tuple | None]] = {
        "magnitude": ((rows,), (rows, 1), (1, *shape[-1:])),
        "rescale": ((rows, 1),),
        "boft_s": ((rows, 1),),
        "up_bias": (bias,),
        "diff_bias": (bias,),
        "alpha": ((1,),),
        "scalar": ((1,),),
    }
    for role, shapes in allowed_shapes.items():
        if role in factors:
            check([role], tuple(factors[role].shape), shapes)
    if "reshape" in keys and lora.tensors[keys["reshape"]].flatten().tolist() != list(shape):
        raise lora.error(
            f"has {keys['reshape']!r:.120} of {lora.tensors[keys['reshape']].tolist()!s:.60}, but "
            f"factors of shape {shape}"
        )
    return shape[-1]


def _scaling(config: PeftConfig, layer: str, factors: Mapping[str, Tensor]) -> float:
    """Return alpha/rank. Alpha is the file's, else the configuration's, else the rank."""
    found = ranks(factors)
    config.require_rank(layer, found)
    scalar = factors["scalar"].item() if "scalar" in factors else 1.0
    if factors.keys() & (ROTATIONS | {"diff", "value"}):
        return scalar
    rank = min(found, default=None)
    if rank and "alpha" in factors:
        return scalar * factors["alpha"].item() / rank
    # Full matrices have no rank; LyCORIS writes a placeholder as their alpha.
    stated = config.scaling(layer, rank)
    return scalar * (1.0 if stated is None else stated)

"""Quantised files: which layers of a file are quantised, and how, from what the file itself says.

    formats = detect_formats(infos, metadata, layers)          # "double_blocks.0.img_attn.qkv" -> its shape, and the class to hold it

A format is told by the first of these that applies: the type is one of GGUF's; there is a `quant_state` of bitsandbytes; the
header's `_quantization_metadata` names it (Black Forest Labs); a tensor `L.comfy_quant` does (ComfyUI); there is a marker
`scaled_fp8` or the spelling `scale_weight` (ComfyUI, earlier); `L.weight_scale_inv` (Hugging Face), or `L.weight_scale` by its
shape (diffusers); the type is float8, without a scale (a plain cast). All else is not quantised. Some programs write several
notes into one file: none may contradict another.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from flux.errors import UserError
from flux.weights.files import FLOATS, TensorInfo
from flux.weights.quantization import gguf, nf4
from flux.weights.quantization.fp8 import BlockFP8Linear, FP8Linear, enable_fp8_matmul
from flux.weights.quantization.gguf import GGUFLinear
from flux.weights.quantization.linear import QuantizedLinear
from flux.weights.quantization.nf4 import NF4Linear
from flux.weights.quantization.nvfp4 import NVFP4Linear

__all__ = [
    "BlockFP8Linear",
    "FP8Linear",
    "GGUFLinear",
    "NF4Linear",
    "NVFP4Linear",
    "QuantizedLinear",
    "LayerFormat",
    "canonical",
    "detect_formats",
    "is_quant_metadata",
    "enable_fp8_matmul",
]

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
FP8_NAMES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # in notes
INSTEAD = "get the model in bfloat16, FP8, NVFP4, NF4 or GGUF"
BNB, METADATA, COMFY, SCALED = (
    "quant_state.bitsandbytes",
    "_quantization_metadata",
    "comfy_quant",
    "scaled_fp8",
)


class LayerFormat(NamedTuple):
    """How a file keeps the weight of one layer."""

    shape: tuple[int, ...]  # of the whole weight: (out_features, in_features)
    make: Callable[
        [int, int, bool], QuantizedLinear
    ]  # (in_features, out_features, bias), to be called on the meta device


def canonical(name: str) -> str:
    """The name in a QuantizedLinear of a tensor of a file: `L.scale_weight` -> `L.weight_scale`; others stay as they are."""
    return nf4.canonical(re.sub(r"\.scale_(weight|input)$", r".\1_scale", name))


def is_quant_metadata(name: str) -> bool:
    """Whether a tensor is none of the network, but says how others are kept."""
    return bool(re.search(r"\.comfy_quant$|(^|\.)scaled_fp8$", name) or nf4.STATE.fullmatch(name))


def detect_formats(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], layers: Iterable[str]
) -> dict[str, LayerFormat]:
    """Those of `layers`, paths in a network, whose weights are quantised. `infos` are of one network, by canonical names.

    UserError if the file contradicts itself, or has a format that is not read. Whether scales are missing or misshapen is for
    the strict loader to see.
    """
    for name, info in infos.items():
        if name.endswith((".qweight", ".wscales")):
            raise _refusal(
                info,
                name.rpartition(".")[0],
                "packed integers for other programs' kernels (SVDQuant, GPTQ, AWQ)",
            )
    told_by, formats = _notes(infos, metadata)
    found = {}
    for layer in layers:
        weight = infos.get(f"{layer}.weight")
        if weight and len(weight.shape) == 2:
            if stored := _stored(layer, weight, infos, told_by, formats.get(layer)):
                found[layer] = stored
    return found


def _stored(
    layer: str,
    weight: TensorInfo,
    infos: Mapping[str, TensorInfo],
    told_by: str | None,
    note: dict | None,
) -> LayerFormat | None:
    """How one layer is kept, by its tensors and by the note on it; None if it is not quantised."""
    scale = infos.get(f"{layer}.weight_scale")
    if weight.dtype in gguf.BLOCKS:
        return LayerFormat(weight.shape, partial(GGUFLinear, kind=weight.dtype))
    if note and told_by == BNB:
        state = nf4.read_state(weight.file, note["name"])
        return LayerFormat(state.shape, partial(NF4Linear, state=state))
    if note:
        if note["format"] == "nvfp4" and weight.dtype == "U8":
            return _nvfp4(layer, weight, infos, swizzled=True)
        if note["format"] == FP8_NAMES.get(weight.dtype):
            return _fp8(
                layer,
                weight,
                infos,
                scaled=True,
                full_precision=bool(note.get("full_precision_matrix_mult")),
            )
        raise _refusal(weight, layer, f"{note['format']!r:.60} ({weight.dtype})")
    if scale and told_by in (METADATA, COMFY):
        raise UserError(
            f"{weight.file} has a scale for {layer!r:.120}, but its {told_by} does not say in which format."
        )
    if f"{layer}.weight_scale_inv" in infos and weight.dtype == "F8_E4M3":
        return LayerFormat(weight.shape, BlockFP8Linear)
    if weight.dtype == "U8" and f"{layer}.weight_scale_2" in infos:
        return _nvfp4(
            layer, weight, infos, swizzled=False
        )  # diffusers' and NVIDIA's: ComfyUI's have notes
    if weight.dtype in FP8 and (scale is None or scale.dtype in FLOATS):
        return _fp8(layer, weight, infos, scaled=scale is not None, full_precision=False)
    if weight.dtype not in FLOATS:
        raise _refusal(
            weight, layer, weight.dtype + (f" with scales in {scale.dtype}" if scale else "")
        )
    return None


def _fp8(
    layer: str,
    weight: TensorInfo,
    infos: Mapping[str, TensorInfo],
    scaled: bool,
    full_precision: bool,
) -> LayerFormat:
    """`scaled`: a scale there must be. It is for the whole weight, unless it is one for each row."""

    def shape(name: str, *possible: tuple[int, ...]) -> tuple[int, ...]:
        given = infos[name].shape if name in infos else ()
        return given if given in possible else ()

    rows = weight.shape[:1]
    scale = shape(f"{layer}.weight_scale", (1,), rows, (*rows, 1)) if scaled else None
    input_scale = shape(f"{layer}.input_scale", (1,)) if f"{layer}.input_scale" in infos else None
    make = partial(
        FP8Linear,
        dtype=FP8[weight.dtype],
        scale=scale,
        input_scale=input_scale,
        full_precision=full_precision,
    )
    return LayerFormat(weight.shape, make)


def _nvfp4(
    layer: str, weight: TensorInfo, infos: Mapping[str, TensorInfo], swizzled: bool
) -> LayerFormat:
    shape = (*weight.shape[:-1], 2 * weight.shape[-1])
    return LayerFormat(
        shape, partial(NVFP4Linear, swizzled=swizzled, input_scale=f"{layer}.input_scale" in infos)
    )


def _refusal(info: TensorInfo, layer: str, what: str) -> UserError:
    return UserError(f"{info.file} keeps {layer!r:.120} as {what}, which is not read; {INSTEAD}.")


# ---------------------------------------------------------------------------------------------------------- notes


def _notes(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[str | None, dict[str, dict]]:
    """Who says how layers are kept, and what is said: layer -> {"format": ...}. UserError if two say different things."""
    states = {
        match[1]: dict(name=info.name)
        for name, info in infos.items()
        if (match := nf4.STATE.fullmatch(name))
    }
    comfy = {
        name.removesuffix(f".{COMFY}"): info
        for name, info in infos.items()
        if name.endswith(f".{COMFY}")
    }
    scaled = [
        info
        for info in infos.values()
        if re.search(r"\.scale_weight$|(^|\.)scaled_fp8$", info.name)
    ]
    in_header = bool(infos) and METADATA in metadata
    told_by = [
        who
        for who, there in ((BNB, states), (METADATA, in_header), (COMFY, comfy), (SCALED, scaled))
        if there
    ]
    if not told_by:
        return None, {}
    file = next(iter(infos.values())).file
    if states and len(told_by) > 1:
        raise UserError(
            f"{file} says how its layers are quantised in {len(told_by)} ways, of which one must be wrong: "
            f"{' and '.join(told_by)}; get it from where it was made."
        )
    if states:
        return BNB, states
    try:
        header = _checked(json.loads(metadata[METADATA])["layers"]) if in_header else {}
        by_layer = _checked(_read(comfy))
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        OSError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"{file} has a damaged {told_by[0]} ({error!s:.80}); download it again."
        ) from error
    if (
        in_header or comfy
    ):  # each names a format for each layer, and the marker adds nothing to that
        ours = {
            info.name.removesuffix(".weight"): name.removesuffix(".weight")
            for name, info in infos.items()
        }
        header = {ours.get(layer, layer): note for layer, note in header.items()}
        for layer in header.keys() & by_layer.keys():
            if header[layer]["format"] != by_layer[layer]["format"]:
                formats = f"{header[layer]['format']:.60} by {METADATA}, and {by_layer[layer]['format']:.60} by {COMFY}"
                raise UserError(
                    f"{file} contradicts itself: {layer!r:.120} is {formats}; get it from where it was made."
                )
        return told_by[0], by_layer | header
    # The marker is for all float8 weights. Two elements in it mean that activations are not to be rounded.
    wide = any(info.name.endswith(SCALED) and info.shape == (2,) for info in scaled)
    float8 = {
        name.removesuffix(".weight"): info.dtype
        for name, info in infos.items()
        if info.dtype in FP8
    }
    return SCALED, {
        layer: dict(format=FP8_NAMES[kind], full_precision_matrix_mult=wide)
        for layer, kind in float8.items()
    }


def _checked(notes: dict) -> dict[str, dict]:
    for layer, note in notes.items():
        if not isinstance(note["format"], str):
            raise ValueError(f"the format of {layer!r:.80} is no text")
    return notes


def _read(notes: Mapping[str, TensorInfo]) -> dict[str, dict]:
    """The JSON texts that tensors hold, by layer."""
    found = {}
    for file in {info.file for info in notes.values()}:
        with safe_open(file, framework="pt", device="cpu") as mapped:
            for layer, info in notes.items():
                if info.file == file:
                    found[layer] = json.loads(
                        bytes(mapped.get_tensor(info.name).flatten().tolist())
                    )
    return found

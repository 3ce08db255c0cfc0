"""Detect which layers of a file are quantized, and in which format.

A file declares its formats in one of four notations, or in none:

    quant_state.bitsandbytes    a tensor for each layer (bitsandbytes)
    _quantization_metadata      JSON in the header of the file (Black Forest Labs)
    comfy_quant                 a tensor of JSON for each layer (ComfyUI)
    scaled_fp8                  a marker for the file, or the name `scale_weight` (older ComfyUI)

Some programs write several notations into one file; none may contradict another.
Undeclared layers are recognised by dtypes and by the names and shapes of their scales.
`TABLE` lists all formats.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from flux.errors import UserError
from flux.plain_files import parse_json
from flux.weights.files import FLOATS, TensorInfo
from flux.weights.mapping import map_tensors
from flux.weights.quantization import gguf, nf4
from flux.weights.quantization.fp8 import BlockFP8Linear, FP8Linear
from flux.weights.quantization.gguf import GGUFLinear
from flux.weights.quantization.int8 import GROUP, Int8Linear, hadamard_steps
from flux.weights.quantization.linear import QuantizedLinear
from flux.weights.quantization.mxfp8 import MXFP8Linear
from flux.weights.quantization.nf4 import NF4Linear
from flux.weights.quantization.nvfp4 import NVFP4Linear

FP8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
FP8_NAMES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # in declarations
BNB = "quant_state.bitsandbytes"
METADATA = "_quantization_metadata"
COMFY = "comfy_quant"
SCALED_FP8 = "scaled_fp8"


class LayerFormat(NamedTuple):
    """How a file stores the weight of one layer."""

    shape: tuple[int, ...]  # of the dequantized weight: (out_features, in_features)
    make: Callable[[int, int, bool], QuantizedLinear]  # (in_features, out_features, bias)


@dataclass(frozen=True)
class Layer:
    """One layer of a file."""

    name: str
    tensors: Mapping[str, TensorInfo]  # of the network, by canonical names
    declared_by: str | None  # the notation in which the file declares formats
    declaration: dict | None  # what the notation says of this layer: {"format": ...}

    @property
    def weight(self) -> TensorInfo:
        return self.tensors[f"{self.name}.weight"]

    @property
    def scale(self) -> TensorInfo | None:
        return self.get("weight_scale")

    def get(self, tensor: str) -> TensorInfo | None:
        return self.tensors.get(f"{self.name}.{tensor}")

    def declares(self, format: str) -> bool:
        return self.declaration is not None and self.declaration.get("format") == format


def detect_formats(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], layers: Iterable[str]
) -> dict[str, LayerFormat]:
    """Return the formats of those `layers` whose weights are quantized.

    infos: the tensors of one network, by canonical names. metadata: of the file's header.
    UserError if the file contradicts itself, or has a format that is not supported. The strict
    loader reports scales that are missing or misshapen.
    """
    if foreign := _foreign_format(infos):
        raise _unsupported(*foreign)
    declared_by, declarations = _read_declarations(infos, metadata)
    formats, float8 = {}, []
    for name in layers:
        weight = infos.get(f"{name}.weight")
        if weight and len(weight.shape) == 2:
            layer = Layer(name, infos, declared_by, declarations.get(name))
            if format := _format_of(layer):
                formats[name] = format
            if weight.dtype in FP8_DTYPES:
                float8.append(layer)
    _check_all_or_none_scaled(float8)
    return formats


def _check_all_or_none_scaled(layers: list[Layer]) -> None:
    """Raise UserError if some float8 layers have scales and others none: one scale was lost.

    A scale of the activations shows too that a scale of the weights was lost. The strict loader
    reports the lost scale of a layer whose format is declared.
    """
    bare = [
        layer
        for layer in layers
        if not (layer.scale or layer.get("weight_scale_inv") or layer.declaration)
    ]
    scaled = [layer for layer in layers if layer not in bare or layer.get("input_scale")]
    if scaled and bare:
        kind = "an input_scale" if scaled[0] in bare else "one"
        raise UserError(
            f"{bare[0].weight.file} has no scale for {bare[0].name!r:.120}, but {kind} for "
            f"{scaled[0].name!r:.120}; get it from where it was made."
        )


def _format_of(layer: Layer) -> LayerFormat | None:
    """Return the format of one layer; None if it is not quantized."""
    weight, scale = layer.weight, layer.scale
    if scale and layer.declaration is None and layer.declared_by in (METADATA, COMFY):
        raise UserError(
            f"{weight.file} has a scale for {layer.name!r:.120}, but its {layer.declared_by} does "
            "not say in which format."
        )
    for predicate, make_format in TABLE:
        if predicate(layer):
            return make_format(layer)
    if layer.declaration is not None:
        format = layer.declaration["format"]
        raise _unsupported(weight, layer.name, f"{format!r:.60} ({weight.dtype})")
    if weight.dtype not in FLOATS:
        scales = f" with scales in {scale.dtype}" if scale else " without scales"
        if layer.get("scale"):
            scales = " of SDNQ (SD.Next)"
        raise _unsupported(weight, layer.name, weight.dtype + scales)
    return None


def _foreign_format(infos: Mapping[str, TensorInfo]) -> tuple[TensorInfo, str, str] | None:
    """Return a tensor in a format of `FOREIGN`, the layer, and the format's name, if there is one.

    Such files have other tensors beside the weights, or none of the weights' names.
    """
    for pattern, format in FOREIGN:
        for name, info in infos.items():
            if match := re.fullmatch(rf"(.+?)\.(?:{pattern})", name):
                if format == SVDQUANT:
                    is_fp4 = any(name.endswith((".wtscale", ".wcscales")) for name in infos)
                    format += ", fp4" if is_fp4 else ", int4"
                if format == GPTQ and _packs_outputs(infos, match[1]):
                    format = "AWQ"
                return info, match[1], format
    return None


def _packs_outputs(infos: Mapping[str, TensorInfo], layer: str) -> bool:
    """Return whether integers of several outputs share one: AWQ packs these, and GPTQ inputs."""
    packed, scales = infos.get(f"{layer}.qweight"), infos.get(f"{layer}.scales")
    if not packed or not scales or not len(packed.shape) == len(scales.shape) == 2:
        return False
    return packed.shape[1] < scales.shape[1]


def _unsupported(info: TensorInfo, layer: str, format: str) -> UserError:
    return UserError(
        f"{info.file} stores {layer!r:.120} as {format}, which is not supported; "
        "get the model in bfloat16, FP8, INT8, MXFP8, NVFP4, NF4 or GGUF."
    )


SVDQUANT, GPTQ = "SVDQuant (Nunchaku)", "GPTQ"
FOREIGN = (  # how a tensor's name goes on after the layer, and the format; the first counts
    (r"weight\._(data|scale|shift)(\._data)?", "a tensor of optimum-quanto"),
    (r"wscales", SVDQUANT),
    (r"SCB|weight_format", "LLM.int8() (bitsandbytes)"),
    (r"_weight_\w+", "a tensor of torchao"),
    (r"W_q", "HQQ"),
    (r"weight_packed", "compressed-tensors (LLM Compressor)"),
    (r"(weight|input|output)_quantizer\..+", "a tensor of ModelOpt (NVIDIA)"),
    (r"weight_scales", "EETQ"),
    (r"g_idx", GPTQ),
    (r"qzeros", GPTQ),
    (r"qweight", "packed integers (SVDQuant, GPTQ or AWQ)"),
    (r"svd_up|svd_down|zero_point", "SDNQ (SD.Next)"),
    (r"scales", "groups of integers (MLX)"),
)

# ---------------------------------------------------------------- the formats: when, and what


def _is_gguf(layer: Layer) -> bool:
    return layer.weight.dtype in gguf.BLOCKS


def _gguf(layer: Layer) -> LayerFormat:
    return LayerFormat(layer.weight.shape, partial(GGUFLinear, kind=layer.weight.dtype))


def _is_bitsandbytes(layer: Layer) -> bool:
    return layer.declaration is not None and layer.declared_by == BNB


def _nf4(layer: Layer) -> LayerFormat:
    assert layer.declaration is not None
    state = nf4.read_state(layer.declaration["state"])
    return LayerFormat(state.shape, partial(NF4Linear, state=state))


def _is_declared_nvfp4(layer: Layer) -> bool:
    return layer.declares("nvfp4") and layer.weight.dtype == "U8"


def _is_modelopt_nvfp4(layer: Layer) -> bool:
    """diffusers and NVIDIA's ModelOpt declare nothing; the others always do."""
    return (
        layer.declaration is None
        and layer.weight.dtype == "U8"
        and layer.get("weight_scale_2") is not None
    )


def _nvfp4(layer: Layer, swizzled: bool) -> LayerFormat:
    rows, columns = layer.weight.shape
    has_input_scale = layer.get("input_scale") is not None
    make = partial(NVFP4Linear, swizzled=swizzled, input_scale=has_input_scale)
    return LayerFormat((rows, 2 * columns), make)


def _is_declared_fp8(layer: Layer) -> bool:
    return layer.weight.dtype in FP8_NAMES and layer.declares(FP8_NAMES[layer.weight.dtype])


def _is_declared_mxfp8(layer: Layer) -> bool:
    return layer.weight.dtype == "F8_E4M3" and layer.declares("mxfp8")


def _mxfp8(layer: Layer) -> LayerFormat:
    is_e8m0 = layer.scale is not None and layer.scale.dtype == "F8_E8M0"
    scale_dtype = torch.float8_e8m0fnu if is_e8m0 else torch.uint8
    return LayerFormat(layer.weight.shape, partial(MXFP8Linear, scale_dtype=scale_dtype))


def _is_int8(layer: Layer) -> bool:
    """Undeclared numbers with a scale were not turned: ConvRot is always declared."""
    if layer.weight.dtype != "I8":
        return False
    if layer.declaration is not None:
        return layer.declares("int8_tensorwise")
    return layer.scale is not None and layer.scale.dtype in FLOATS


def _int8(layer: Layer) -> LayerFormat:
    make = partial(
        Int8Linear,
        scale=_scale_shape(layer),
        group=_convrot_group(layer),
        input_scale=_input_scale_shape(layer),
    )
    return LayerFormat(layer.weight.shape, make)


def _convrot_group(layer: Layer) -> int | None:
    declaration = layer.declaration or {}
    if not declaration.get("convrot"):
        return None
    group, columns = declaration.get("convrot_groupsize", GROUP), layer.weight.shape[1]
    if hadamard_steps(group) is None or columns % group:
        raise UserError(
            f"{layer.weight.file} turns {layer.name!r:.120} in groups of {group!r:.40}, but a "
            f"group must be a power of 4 that divides the {columns} inputs; get it from where it "
            "was made."
        )
    return group


def _is_block_fp8(layer: Layer) -> bool:
    return (
        layer.declaration is None
        and layer.weight.dtype == "F8_E4M3"
        and layer.get("weight_scale_inv") is not None
    )


def _block_fp8(layer: Layer) -> LayerFormat:
    return LayerFormat(layer.weight.shape, BlockFP8Linear)


def _is_undeclared_fp8(layer: Layer) -> bool:
    """With a scale it is diffusers' FP8, without one a plain cast."""
    return (
        layer.declaration is None
        and layer.weight.dtype in FP8_DTYPES
        and (layer.scale is None or layer.scale.dtype in FLOATS)
    )


def _fp8(layer: Layer) -> LayerFormat:
    """A declared layer must have a scale: of all the weight or, with that shape, of each row."""
    is_scaled = layer.declaration is not None or layer.scale is not None
    make = partial(
        FP8Linear,
        dtype=FP8_DTYPES[layer.weight.dtype],
        scale=_scale_shape(layer) if is_scaled else None,
        input_scale=_input_scale_shape(layer),
        full_precision=bool((layer.declaration or {}).get("full_precision_matrix_mult")),
    )
    return LayerFormat(layer.weight.shape, make)


def _scale_shape(layer: Layer) -> tuple[int, ...]:
    """Return the shape of a scale of the matrix, or of its rows."""
    rows = layer.weight.shape[:1]
    return _shape_among(layer.scale, (1,), rows, (*rows, 1))


def _input_scale_shape(layer: Layer) -> tuple[int, ...] | None:
    info = layer.get("input_scale")
    return _shape_among(info, (1,)) if info else None


def _shape_among(info: TensorInfo | None, *possible: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tensor's shape if it is one of `possible`, else (), which the loader checks."""
    return info.shape if info is not None and info.shape in possible else ()


TABLE: tuple[tuple[Callable[[Layer], bool], Callable[[Layer], LayerFormat]], ...] = (
    (_is_gguf, _gguf),  # the first predicate that is true decides
    (_is_bitsandbytes, _nf4),
    (_is_declared_nvfp4, partial(_nvfp4, swizzled=True)),
    (_is_declared_fp8, _fp8),
    (_is_declared_mxfp8, _mxfp8),
    (_is_int8, _int8),
    (_is_block_fp8, _block_fp8),
    (_is_modelopt_nvfp4, partial(_nvfp4, swizzled=False)),
    (_is_undeclared_fp8, _fp8),
)

# ---------------------------------------------------------------- names


def canonical(name: str) -> str:
    """Return the name in a QuantizedLinear of a tensor in a file.

    ComfyUI's older `L.scale_weight` is `L.weight_scale`, bitsandbytes' `L.weight.absmax` is
    `L.absmax`. Other names stay as they are.
    """
    return nf4.canonical(re.sub(r"\.scale_(weight|input)$", r".\1_scale", name))


def is_quant_metadata(name: str) -> bool:
    """Return whether a tensor describes how others are stored, and is no weight itself."""
    return bool(re.search(r"\.comfy_quant$|(^|\.)scaled_fp8$", name) or nf4.STATE.fullmatch(name))


# ---------------------------------------------------------------- declarations


def _read_declarations(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[str | None, dict[str, dict]]:
    """Return the notation that a file uses, and what it declares: layer -> {"format": ...}.

    UserError if two notations contradict each other.
    """
    states, comfy, scaled = {}, {}, []
    for name, info in infos.items():
        if match := nf4.STATE.fullmatch(name):
            states[match[1]] = {"state": info}
        if name.endswith(f".{COMFY}"):
            comfy[name.removesuffix(f".{COMFY}")] = info
        if re.search(r"\.scale_weight$|(^|\.)scaled_fp8$", info.name):
            scaled.append(info)
    in_header = bool(infos) and METADATA in metadata
    present = [
        notation
        for notation, found in (
            (BNB, states),
            (METADATA, in_header),
            (COMFY, comfy),
            (SCALED_FP8, scaled),
        )
        if found
    ]
    if not present:
        return None, {}
    file = next(iter(infos.values())).file
    if states and len(present) > 1:
        raise UserError(
            f"{file} declares the formats of its layers in {len(present)} notations, of which one "
            f"must be wrong: {' and '.join(present)}; get it from where it was made."
        )
    if states:
        return BNB, states
    notes = list(map_tensors(comfy))
    try:
        header = _checked(parse_json(metadata[METADATA])["layers"]) if in_header else {}
        by_layer = _checked({layer: nf4.parse_json_tensor(x) for layer, x in notes})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} has a damaged {present[0]} ({error!s:.80}); download it again."
        ) from error
    if not (in_header or comfy):
        return SCALED_FP8, _marked_layers(infos, scaled)
    # Both name a format for each layer; the marker adds nothing. The header's names are the
    # file's, with or without its prefix.
    canonical_names = {
        info.name.removesuffix(".weight"): name.removesuffix(".weight")
        for name, info in infos.items()
    }
    header = {canonical_names.get(layer, layer): note for layer, note in header.items()}
    for layer in header.keys() & by_layer.keys():
        for key in ("format", "convrot", "convrot_groupsize"):
            ours, theirs = header[layer].get(key), by_layer[layer].get(key)
            if ours != theirs:
                raise UserError(
                    f"{file} contradicts itself: {layer!r:.120} is {ours!s:.60} by {METADATA}, "
                    f"and {theirs!s:.60} by {COMFY}; get it from where it was made."
                )
    return present[0], by_layer | header


def _marked_layers(
    infos: Mapping[str, TensorInfo], scaled: Iterable[TensorInfo]
) -> dict[str, dict]:
    """Return the declarations of older ComfyUI's marker, which is for all float8 weights.

    A marker of two elements asks not to round activations to float8.
    """
    full_precision = any(info.name.endswith(SCALED_FP8) and info.shape == (2,) for info in scaled)
    return {
        name.removesuffix(".weight"): {
            "format": FP8_NAMES[info.dtype],
            "full_precision_matrix_mult": full_precision,
        }
        for name, info in infos.items()
        if info.dtype in FP8_NAMES
    }


def _checked(declarations: dict) -> dict[str, dict]:
    for layer, declaration in declarations.items():
        if not isinstance(declaration["format"], str):
            raise ValueError(f"the format of {layer!r:.80} is not text")
    return declarations

"""Write quantized files from the descriptions of their formats, and compute what they stand for.

Nothing here calls flux: numpy or the `gguf` package computes values, packing and scales.
`FORMATS` has one writer for each notation of safetensors files; `save_gguf_q8_0` writes GGUF.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PREFIX = "model.diffusion_model."  # ComfyUI puts it before every name of a transformer

# fmt: off
E2M1_VALUES = [  # OCP MX 1.0, table 5
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
    -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
]
NF4_VALUES = [  # bitsandbytes/functional.py, get_4bit_type("nf4"); appendix E of arXiv:2305.14314
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]
# fmt: on


class QuantizedFile(NamedTuple):
    """The tensors and metadata of a file, and the float32 weights that it stands for."""

    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]
    metadata: dict[str, str] | None = None
    prefix: str = ""  # of every name in the file


def save_quantized(path: Path, file: QuantizedFile) -> Path:
    tensors = {
        file.prefix + name: tensor.contiguous().clone() for name, tensor in file.tensors.items()
    }
    save_file(tensors, path, metadata=file.metadata)
    return path


def random(*shape: int, seed: int = 0, size: float = 0.1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """Return random bfloat16 tensors for every name of `module`; vectors are near 1."""
    state = {}
    for seed, (name, tensor) in enumerate(module.state_dict().items()):
        state[name] = random(*tensor.shape, seed=seed).add(tensor.ndim == 1).bfloat16()
    return state


def block_linears(module: nn.Module) -> list[str]:
    """Return the paths of the Linears that Black Forest Labs quantize."""
    pattern = r"_blocks\.\d+\.(img_attn|txt_attn|img_mlp|txt_mlp|linear)"
    return [
        path
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and re.search(pattern, path)
    ]


def json_bytes(note: dict) -> Tensor:
    """Return JSON text as a tensor of bytes, as ComfyUI stores notes and tokenizers."""
    return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)


def metadata_for(layers: list[str], format: str) -> dict[str, str]:
    """Return the safetensors metadata in which Black Forest Labs name each layer's format."""
    table = {"format_version": "1.0", "layers": {layer: {"format": format} for layer in layers}}
    return {"_quantization_metadata": json.dumps(table)}


# ---------------------------------------------------------------- FP8


def e4m3_value(byte: int) -> float:
    """Decode one float8_e4m3fn: sign, 4 bits of exponent with bias 7, 3 bits of mantissa.

    OCP 8-bit floating point specification, section 5.
    """
    exponent, mantissa = int(byte) >> 3 & 15, int(byte) & 7
    if exponent == 0:
        size = mantissa * 2.0**-9
    else:
        size = (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if byte & 128 else size


def to_fp8(
    weight: Tensor, dtype: torch.dtype = E4M3, by_row: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `weight` in float8 and its scale, of shape () or (rows,)."""
    weight = weight.float()
    if by_row:
        scale = weight.abs().amax(dim=1) / torch.finfo(dtype).max
        return (weight / scale[:, None]).to(dtype), scale
    scale = weight.abs().amax() / torch.finfo(dtype).max
    return (weight / scale).to(dtype), scale


def fp8_layers(
    layers: list[str],
    state: dict[str, Tensor],
    dtype: torch.dtype = E4M3,
    scale_name: str = "weight_scale",
    input_scale_name: str | None = "input_scale",
    shape: tuple[int, ...] = (),
) -> QuantizedFile:
    """Quantize `layers` of `state` to float8 with one scale each, of the given shape."""
    tensors, weights = dict(state), {}
    for layer in layers:
        weight, scale = to_fp8(state[f"{layer}.weight"], dtype)
        tensors[f"{layer}.weight"] = weight
        tensors[f"{layer}.{scale_name}"] = scale.reshape(shape)
        weights[f"{layer}.weight"] = weight.float() * scale
        if input_scale_name:
            tensors[f"{layer}.{input_scale_name}"] = torch.tensor(0.013).reshape(shape)
    return QuantizedFile(tensors, weights)


def bfl_fp8(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    return fp8_layers(layers, state)._replace(metadata=metadata_for(layers, "float8_e4m3fn"))


def e5m2(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    file = fp8_layers(layers, state, E5M2)
    return file._replace(metadata=metadata_for(layers, "float8_e5m2"))


def comfy_mixed(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    """Write Comfy-Org's flux2_dev_fp8mixed: without attention; metadata names lack the prefix."""
    layers = [layer for layer in layers if "_attn." not in layer]
    file = fp8_layers(layers, state)
    return file._replace(metadata=metadata_for(layers, "float8_e4m3fn"), prefix=PREFIX)


def comfy_legacy(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    """Write flux_dev_scaled_fp8_test: `scale_weight`, a marker, and biases cast to float8."""
    file = fp8_layers(layers, state, scale_name="scale_weight", input_scale_name="scale_input")
    tensors, weights = dict(file.tensors), dict(file.weights)
    for name, tensor in file.tensors.items():
        if name.endswith(".bias"):
            tensors[name] = tensor.to(E4M3)
            weights[name] = tensors[name].float()
    tensors["scaled_fp8"] = torch.empty(0, dtype=E4M3)
    return QuantizedFile(tensors, weights, prefix=PREFIX)


def comfy_legacy_flat(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    """Write scales of shape (1,), no input scales, and a marker that asks for full precision."""
    file = fp8_layers(layers, state, scale_name="scale_weight", input_scale_name=None, shape=(1,))
    return QuantizedFile(file.tensors | {"scaled_fp8": torch.empty(2, dtype=E4M3)}, file.weights)


def comfy_marker(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    """Write ComfyUI's text encoders: the marker with `weight_scale`."""
    file = fp8_layers(layers, state)
    return QuantizedFile(file.tensors | {"scaled_fp8": torch.empty(0, dtype=E4M3)}, file.weights)


def comfy_notes(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    """Write a `comfy_quant` note for each layer, which asks for full precision."""
    file = fp8_layers(layers, state, input_scale_name=None)
    note = json_bytes({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
    tensors = file.tensors | {f"{layer}.comfy_quant": note for layer in layers}
    return QuantizedFile(tensors, file.weights, prefix=PREFIX)


def three_notations(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    """Write metadata (names without the prefix), notes and the marker, which all agree."""
    file = comfy_notes(layers, state)
    tensors = file.tensors | {"scaled_fp8": torch.empty(0, dtype=E4M3)}
    return file._replace(tensors=tensors, metadata=metadata_for(layers, "float8_e4m3fn"))


def plain_cast(
    layers: list[str], state: dict[str, Tensor], dtype: torch.dtype = E4M3
) -> QuantizedFile:
    """Cast everything, biases and norms too, without scales."""
    tensors = {name: tensor.to(dtype) for name, tensor in state.items()}
    return QuantizedFile(tensors, {name: tensor.float() for name, tensor in tensors.items()})


def bundle(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    """Write Comfy-Org's flux1-dev-fp8: a plain cast beside tensors of other networks."""
    file = plain_cast(layers, state)
    others = {
        "vae.decoder.conv_in.weight": random(4, 4),
        "text_encoders.clip_l.logit_scale": random(),
        "text_encoders.t5xxl.transformer.shared.weight": random(4, 4).to(E4M3),
    }
    tensors = {PREFIX + name: tensor for name, tensor in file.tensors.items()} | others
    return QuantizedFile(tensors, file.weights)


def fp8_by_row(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    """Write diffusers' FP8: one scale for each row, of shape (rows,)."""
    tensors, weights = dict(state), {}
    for layer in layers:
        weight, scale = to_fp8(state[f"{layer}.weight"], by_row=True)
        tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"] = weight, scale
        weights[f"{layer}.weight"] = weight.float() * scale[:, None]
    return QuantizedFile(tensors, weights)


def fp8_by_column(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    """Write the scales of `fp8_by_row` with shape (rows, 1)."""
    file = fp8_by_row(layers, state)
    tensors = {
        name: tensor[:, None] if name.endswith("_scale") else tensor
        for name, tensor in file.tensors.items()
    }
    return QuantizedFile(tensors, file.weights)


def fp8_by_block(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    """Write Hugging Face's fine-grained FP8: one scale for each block of 128x128."""
    tensors, weights = dict(state), {}
    for seed, layer in enumerate(layers):
        rows, columns = state[f"{layer}.weight"].shape
        weight = random(rows, columns, seed=seed, size=100).clamp(-448, 448).to(E4M3)
        scale = random(-(-rows // 128), -(-columns // 128), seed=seed).abs()
        scale = scale.to(torch.bfloat16 if seed % 2 else torch.float32)
        tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale_inv"] = weight, scale
        full = weight.float().numpy()
        for row, column in np.ndindex(*scale.shape):
            block = full[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)]
            block *= scale[row, column].float().item()
        weights[f"{layer}.weight"] = torch.from_numpy(full)
    return QuantizedFile(tensors, weights)


# ---------------------------------------------------------------- INT8

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])


def hadamard_matrix(group: int) -> np.ndarray:
    """Return ConvRot's regular Hadamard matrix, a Kronecker power of H4 / 2, in float64."""
    matrix = np.ones((1, 1))
    while len(matrix) < group:
        matrix = np.kron(matrix, H4 / 2)
    return matrix


def int8(
    layers: list[str],
    state: dict[str, Tensor],
    by_row: bool = True,
    group: int | None = None,
    notation: str | None = "comfy_quant",
) -> QuantizedFile:
    """Write random whole numbers: `int8_tensorwise`, ConvRot with a `group`, or no notation.

    Sums of whole numbers are exact in float64, and the scale multiplies once, in float32.
    """
    rng, tensors, weights = np.random.default_rng(7), dict(state), {}
    note: dict = {"format": "int8_tensorwise"}
    if group:
        note |= {"convrot": True, "convrot_groupsize": group, "per_row": by_row}
    for layer in layers:
        shape = rows, _ = state[f"{layer}.weight"].shape
        numbers = rng.integers(-128, 128, shape, dtype=np.int8)
        scale = rng.uniform(1e-4, 1e-3, (rows, 1) if by_row else ()).astype(np.float32)
        whole = numbers.astype(np.float64)
        if group:
            whole = (whole.reshape(rows, -1, group) @ hadamard_matrix(group)).reshape(shape)
        tensors[f"{layer}.weight"] = torch.from_numpy(numbers)
        tensors[f"{layer}.weight_scale"] = torch.from_numpy(np.asarray(scale))
        if notation == "comfy_quant":
            tensors[f"{layer}.comfy_quant"] = json_bytes(note)
        weights[f"{layer}.weight"] = torch.from_numpy(whole.astype(np.float32) * scale)
    if notation == "metadata":
        table = {"format_version": "1.0", "layers": dict.fromkeys(layers, note)}
        return QuantizedFile(tensors, weights, {"_quantization_metadata": json.dumps(table)})
    return QuantizedFile(tensors, weights)


# ---------------------------------------------------------------- MXFP8


def mxfp8(layers: list[str], state: dict[str, Tensor], e8m0: bool = False) -> QuantizedFile:
    """Write random float8 numbers with powers of two in cuBLAS's order, as bytes or as F8_E8M0."""
    rng, tensors, weights = np.random.default_rng(8), dict(state), {}
    for layer in layers:
        rows, columns = state[f"{layer}.weight"].shape
        values = random(rows, columns, seed=rows, size=100).clamp(-448, 448).to(E4M3)
        bytes = rng.integers(110, 125, (rows, columns // 32), dtype=np.uint8)
        stored = torch.from_numpy(in_cublas_order(bytes))
        tensors[f"{layer}.weight"] = values
        tensors[f"{layer}.weight_scale"] = stored.view(torch.float8_e8m0fnu) if e8m0 else stored
        tensors[f"{layer}.comfy_quant"] = json_bytes({"format": "mxfp8"})
        scale = 2.0 ** (bytes.astype(np.float64) - 127)
        weight = values.double().numpy() * scale.repeat(32, axis=1)
        weights[f"{layer}.weight"] = torch.from_numpy(weight).float()
    return QuantizedFile(tensors, weights)


# ---------------------------------------------------------------- NVFP4


def random_nvfp4(rows: int, blocks: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Return codes (rows, 16 * blocks), bytes of scales (rows, blocks), the scale of all."""
    rng = np.random.default_rng(seed)
    scales = rng.integers(0, 127, (rows, blocks), dtype=np.uint8)  # finite numbers only
    scales |= rng.integers(0, 2, (rows, blocks), dtype=np.uint8) << 7
    codes = rng.integers(0, 16, (rows, 16 * blocks), dtype=np.uint8)
    return codes, scales, float(np.float32(rng.uniform(1e-4, 1)))


def nvfp4_tensors(
    codes: np.ndarray, scales: np.ndarray, scale_2: float, swizzled: bool
) -> dict[str, Tensor]:
    """Pack one layer, one number at a time, in the layout of cuBLAS or of ModelOpt."""
    rows, columns = codes.shape
    weight = np.zeros((rows, columns // 2), np.uint8)
    for row, column in np.ndindex(rows, columns):
        high = (column % 2 == 0) == swizzled
        weight[row, column // 2] |= codes[row, column] << (4 if high else 0)
    if swizzled:
        scales = in_cublas_order(scales)
    return {
        "weight": torch.from_numpy(weight),
        "weight_scale": torch.from_numpy(np.ascontiguousarray(scales)).view(E4M3),
        "weight_scale_2": torch.tensor(scale_2),
        "input_scale": torch.tensor(0.25),
    }


def in_cublas_order(scales: np.ndarray) -> np.ndarray:
    """Put the bytes of blocks' scales in tiles of 128x4, at the places that cuBLAS's manual gives.

    Padding may hold any bytes.
    """
    across = -(-scales.shape[1] // 4)  # tiles
    stored = np.full((-(-len(scales) // 128) * across, 32 * 16), 0x55, np.uint8)
    for row, block in np.ndindex(*scales.shape):
        tile = row // 128 * across + block // 4
        stored[tile, row % 32 * 16 + row % 128 // 32 * 4 + block % 4] = scales[row, block]
    return stored.reshape(-1, 4 * across)


def nvfp4_weight(codes: np.ndarray, scales: np.ndarray, scale_2: float) -> np.ndarray:
    """Decode in numpy: the code's value times (the block's scale times the scale of all)."""
    block = np.vectorize(e4m3_value)(scales).astype(np.float32) * np.float32(scale_2)
    return np.array(E2M1_VALUES, np.float32)[codes] * block.repeat(16, axis=1)


def nvfp4(layers: list[str], state: dict[str, Tensor], swizzled: bool = True) -> QuantizedFile:
    """Write Black Forest Labs' NVFP4 (swizzled, with metadata) or ModelOpt's (without)."""
    tensors, weights = dict(state), {}
    for number, layer in enumerate(layers):
        rows, columns = state[f"{layer}.weight"].shape
        numbers = random_nvfp4(rows, columns // 16, seed=number)
        for name, tensor in nvfp4_tensors(*numbers, swizzled).items():
            tensors[f"{layer}.{name}"] = tensor
        if number % 3 == 0 and swizzled:
            del tensors[f"{layer}.input_scale"]  # as in flux2-dev-nvfp4-mixed
        weights[f"{layer}.weight"] = torch.from_numpy(nvfp4_weight(*numbers))
    return QuantizedFile(tensors, weights, metadata_for(layers, "nvfp4") if swizzled else None)


def comfy_nvfp4(layers: list[str], state: dict[str, Tensor]) -> QuantizedFile:
    file = nvfp4(layers, state)
    notes = {f"{layer}.comfy_quant": json_bytes({"format": "nvfp4"}) for layer in layers}
    return QuantizedFile(file.tensors | notes, file.weights)


# ---------------------------------------------------------------- NF4


def nf4_tensors(
    codes: np.ndarray,
    absmax: np.ndarray,
    values: list[float],
    nested: dict | None = None,
    blocksize: int = 64,
) -> dict[str, Tensor]:
    """Pack a layer "L" of bitsandbytes from 4-bit codes (rows, columns) and each block's absmax.

    `absmax` is float32, or bytes if `nested` (double quantization) is given.
    """
    flat = codes.flatten().tolist()
    if len(flat) % 2:
        flat.append(0)
    packed = [[high << 4 | low] for high, low in zip(flat[::2], flat[1::2], strict=True)]
    state = {
        "quant_type": "nf4",
        "blocksize": blocksize,
        "dtype": "bfloat16",
        "shape": list(codes.shape),
    }
    arrays = {
        "": np.array(packed, np.uint8),
        ".absmax": absmax,
        ".quant_map": np.array(values, np.float32),
    }
    if nested:
        state |= {
            "nested_blocksize": nested["blocksize"],
            "nested_dtype": "float32",
            "nested_offset": nested["offset"],
        }
        arrays |= {".nested_absmax": nested["absmax"], ".nested_quant_map": nested["values"]}
    tensors = {f"L.weight{name}": torch.from_numpy(array) for name, array in arrays.items()}
    return tensors | {"L.weight.quant_state.bitsandbytes__nf4": json_bytes(state)}


def nf4(layers: list[str], state: dict[str, Tensor], nested: bool = False) -> QuantizedFile:
    """Write lllyasviel's flux1-dev-bnb-nf4, with or without double quantization."""
    tensors, weights = dict(state), {}
    for seed, layer in enumerate(layers):
        rng, shape = np.random.default_rng(seed), tuple(state[f"{layer}.weight"].shape)
        codes, blocks = rng.integers(0, 16, shape, dtype=np.uint8), shape[0] * shape[1] // 64
        absmax, more = rng.uniform(0.01, 0.2, blocks).astype(np.float32), None
        decoded = absmax
        if nested:
            absmax = rng.integers(0, 256, blocks, dtype=np.uint8)
            values = rng.uniform(-1, 1, 256).astype(np.float32)
            outer = rng.uniform(0.01, 0.2, -(-blocks // 256)).astype(np.float32)
            more = dict(blocksize=256, offset=0.25, absmax=outer, values=values)
            decoded = values[absmax] * outer.repeat(256)[:blocks] + np.float32(0.25)
        for name, tensor in nf4_tensors(codes, absmax, NF4_VALUES, more).items():
            tensors[name.replace("L.", f"{layer}.", 1)] = tensor
        weight = np.array(NF4_VALUES, np.float32)[codes] * decoded.repeat(64).reshape(shape)
        weights[f"{layer}.weight"] = torch.from_numpy(weight)
    return QuantizedFile(tensors, weights, prefix=PREFIX)


# ---------------------------------------------------------------- GGUF


def save_gguf(
    path: Path,
    arrays: dict[str, np.ndarray | tuple[np.ndarray, str]],
    alignment: int | None = None,
    **metadata,
) -> Path:
    """Write a file with the `gguf` package; a quantized tensor comes with its type's name.

    `metadata`: a key's first word is the type of its value: `string_a="text"`.
    """
    writer = gguf.GGUFWriter(path, "flux")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        getattr(writer, f"add_{key.split('_')[0]}")(key, value)
    for name, array in arrays.items():
        if isinstance(array, tuple):
            writer.add_tensor(name, array[0], raw_dtype=GGMLQuantizationType[array[1]])
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_gguf_q8_0(
    path: Path, layers: list[str], state: dict[str, Tensor]
) -> tuple[Path, dict[str, Tensor]]:
    """Write `state` with `layers` as Q8_0; return the path and the weights of these layers."""
    arrays, weights = {name: tensor.float().numpy() for name, tensor in state.items()}, {}
    for layer in layers:
        raw = gguf.quantize(arrays[f"{layer}.weight"], GGMLQuantizationType.Q8_0)
        arrays[f"{layer}.weight"] = raw, "Q8_0"
        decoded = gguf.dequantize(raw, GGMLQuantizationType.Q8_0)
        weights[f"{layer}.weight"] = torch.from_numpy(decoded.copy())
    return save_gguf(path, arrays), weights


# ---------------------------------------------------------------- all notations

FORMATS: dict[str, Callable[[list[str], dict[str, Tensor]], QuantizedFile]] = {
    "BFL": bfl_fp8,
    "e5m2": e5m2,
    "ComfyUI, mixed": comfy_mixed,
    "ComfyUI, legacy": comfy_legacy,
    "ComfyUI, (1,)": comfy_legacy_flat,
    "ComfyUI, marker": comfy_marker,
    "ComfyUI": comfy_notes,
    "three notations": three_notations,
    "cast": plain_cast,
    "cast, e5m2": partial(plain_cast, dtype=E5M2),
    "bundle": bundle,
    "by row": fp8_by_row,
    "by column": fp8_by_column,
    "by block": fp8_by_block,
    "INT8": partial(int8, by_row=False),
    "INT8, by row": int8,
    "INT8, no notation": partial(int8, notation=None),
    "ConvRot": partial(int8, group=16),
    "ConvRot, metadata": partial(int8, group=4, notation="metadata"),
    "MXFP8": mxfp8,
    "MXFP8, E8M0": partial(mxfp8, e8m0=True),
    "NVFP4": nvfp4,
    "NVFP4, ComfyUI": comfy_nvfp4,
    "NVFP4, ModelOpt": partial(nvfp4, swizzled=False),
    "NF4": nf4,
    "NF4, nested": partial(nf4, nested=True),
}

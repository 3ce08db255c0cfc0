"""Write a transformer's weights in another format or layout, one layer at a time."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from flux.atomic_files import write_atomically
from flux.errors import UserError
from flux.transformer import Flux, FluxConfig
from flux.transformer3 import Flux3, Flux3Config
from flux.weights import diffusers_names3
from flux.weights.diffusers_names import diffusers_layer
from flux.weights.files import TensorInfo, preview, shard_files
from flux.weights.load import (
    infer_config,
    init_empty,
    load_module,
    match_tensors,
    read_headers,
    split_parts,
)
from flux.weights.mapping import map_tensor
from flux.weights.quantization import QuantizedLinear, gguf
from flux.weights.quantization.published import PUBLISHED, ROWS, encode, published_format
from flux.weights.quantization.quantize import large_linears

FORMATS = ("bf16", *PUBLISHED)
LAYOUTS = ("bfl", "diffusers")


class Report(NamedTuple):
    """What was written, and how far the written weights are from the given ones."""

    bytes: int
    counts: dict[str, int]  # of matrices, by format
    errors: dict[str, float]  # relative L2 of each matrix that changed, by our layer's name
    error: float  # relative L2 of all matrices that changed together


def convert(source: Path, path: Path, format: str | None = None, layout: str = "bfl") -> Report:
    """Write the transformer of `source` to a new safetensors file; return what the change cost.

    source: any file of a transformer that `flux.load` takes, quantized or not.
    format: a name in `FORMATS`; None keeps every tensor as it is. "bf16" is for all tensors. The
        others quantize the large matrices of the blocks; the rest becomes bfloat16.
    layout: the names, and the order of rows, of Black Forest Labs ("bfl") or of diffusers.

    UserError, before anything is written, for a quantized `source` unless `format` is "bf16", and
    for a `path` that exists; later for NaN or infinity in what is rounded. OSError if the file
    cannot be written. After an error there is no file. A warning names other networks in `source`,
    which are not written.
    """
    _check_choices(path, format, layout)
    config = infer_config(source)
    module: Any = init_empty(
        lambda: Flux3(config) if isinstance(config, Flux3Config) else Flux(config)
    )
    files = shard_files(source)
    infos = match_tensors(module, files)
    load_module(module, files, device="meta")
    _check_source(module, source, format)
    if others := split_parts(read_headers(files)[0]):
        warnings.warn(
            f"{source} also holds other networks, which are not written: "
            f"{preview([f'{prefix}*' for prefix in others])}",
            stacklevel=2,
        )
    conversion = _Conversion(module, infos, config, format, layout)
    with write_atomically(path, overwrite=False) as unfinished:
        size = _write_safetensors(unfinished, conversion)
    total = math.sqrt(conversion.squared_error / (conversion.squared_norm or 1))
    return Report(size, conversion.counts, conversion.errors, total)


def _check_choices(path: Path, format: str | None, layout: str) -> None:
    for name, value, choices in (("format", format, FORMATS), ("layout", layout, LAYOUTS)):
        if value is not None and value not in choices:
            raise UserError(
                f"{name}: unknown (got {value!s:.40}). Choose from {', '.join(choices)}."
            )
    if layout == "diffusers" and format not in (None, "bf16"):
        raise UserError(
            f"layout: {format} is published in Black Forest Labs' names only. "
            "Choose `format=bf16`, or leave `layout` out."
        )
    if path.suffix != ".safetensors":
        raise UserError(f"path: {path} must end in .safetensors. Choose another name.")
    if not path.parent.is_dir():
        raise UserError(f"path: there is no folder {path.parent}. Make the folder first.")


def _check_source(module: nn.Module, source: Path, format: str | None) -> None:
    kinds = {type(x).__name__ for x in module.modules() if isinstance(x, QuantizedLinear)}
    if kinds and format != "bf16":
        raise UserError(
            f"source: {source} is quantized already ({', '.join(sorted(kinds))}). Choose "
            "`format=bf16`, or convert the file that the weights were rounded from."
        )


class _Conversion:
    """The tensors of the new file, one layer after the other."""

    def __init__(
        self,
        module: Flux | Flux3,  # on the meta device
        infos: Mapping[str, TensorInfo],
        config: FluxConfig | Flux3Config,
        format: str | None,
        layout: str,
    ):
        self.module, self.infos, self.config = module, infos, config
        self.format, self.layout = format, layout
        self.large = set(large_linears(module)) if format in PUBLISHED else set()
        self.notes: dict[str, dict] = {}
        self.counts: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self.squared_error = self.squared_norm = 0.0

    @torch.no_grad()
    def tensors(self, on_meta: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors of the file; on the meta device only shapes and dtypes."""
        for path, layer in self.module.named_modules():
            if ".parts" in path:  # of a joined layer
                continue
            quantized = isinstance(layer, QuantizedLinear)
            own = dict(layer.state_dict()) if quantized else {**layer._parameters, **layer._buffers}
            own = {name: tensor for name, tensor in own.items() if tensor is not None}
            if not on_meta:
                own = {name: self._mapped(f"{path}.{name}", like) for name, like in own.items()}
            if isinstance(layer, QuantizedLinear) and self.format == "bf16":
                own = _dequantized(layer, own)
            for name, tensor in own.items():
                for suffix, written in self._in_format(path, name, tensor):
                    yield from self._in_layout(path, suffix, written)

    def _mapped(self, name: str, like: Tensor) -> Tensor:
        return map_tensor(gguf.stored(self.infos[name])).view(like.shape)

    def _in_format(self, path: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if self.format and tensor.is_floating_point() and not tensor.is_meta:
            self._require_finite(f"{path}.{name}", tensor)
        if name == "weight" and path in self.large:
            yield from self._quantized(path, tensor)
        elif self.format is None or not tensor.is_floating_point():
            yield name, tensor
        else:
            yield name, self._rounded(path, tensor) if name == "weight" else tensor.bfloat16()

    def _require_finite(self, name: str, tensor: Tensor) -> None:
        if not all(rows.float().isfinite().all() for rows in tensor.split(ROWS)):
            raise UserError(
                f"source: {name} has NaN or infinity, which cannot be rounded. Take a sound file."
            )

    def _quantized(self, path: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        rows, columns = weight.shape
        assert self.format is not None
        published = published_format(self.format, columns)
        if published is None:
            yield "weight", self._rounded(path, weight)
            return
        self.notes[path] = published.note
        encoded = encode(weight, published)
        if not weight.is_meta:
            with torch.device("meta"):
                layer = published.make(columns, rows, False)
            layer.load_state_dict(encoded, strict=True, assign=True)
            self._measure(path, weight, layer.dequantize())
            kind = published.note["format"] + (" ConvRot" if "convrot" in published.note else "")
            self.counts[kind] = self.counts.get(kind, 0) + 1
        yield from encoded.items()
        note = json.dumps(published.note).encode()
        yield "comfy_quant", torch.frombuffer(bytearray(note), dtype=torch.uint8)

    def _rounded(self, path: str, weight: Tensor) -> Tensor:
        rounded = weight.bfloat16()
        if not weight.is_meta and weight.dtype != torch.bfloat16:
            self._measure(path, weight, rounded)
        return rounded

    def _measure(self, path: str, before: Tensor, after: Tensor) -> None:
        squared = norm = 0.0
        for old, new in zip(before.split(ROWS), after.split(ROWS), strict=True):
            squared += (new.float() - old.float()).square().sum(dtype=torch.float64).item()
            norm += old.float().square().sum(dtype=torch.float64).item()
        self.errors[path] = math.sqrt(squared / (norm or 1))
        self.squared_error += squared
        self.squared_norm += norm

    def _in_layout(self, path: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if self.layout == "bfl":
            yield f"{path}.{name}", tensor
            return
        theirs = "weight" if name == "scale" else name  # torch.nn.RMSNorm's name
        if isinstance(self.config, Flux3Config):
            swapped = path == diffusers_names3.SWAPPED
            tensor = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
            yield f"{diffusers_names3.diffusers_layer(path)}.{theirs}", tensor
            return
        parts = diffusers_layer(
            path, self.config.shared_modulation, self.config.hidden_size, len(tensor)
        )
        assert parts, path
        for part in parts:
            rows = [tensor[start:stop] for start, stop in part.rows]
            yield f"{part.name}.{theirs}", torch.cat(rows) if len(rows) > 1 else rows[0]


def _dequantized(layer: QuantizedLinear, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the layer's weight and bias, for the tensors that its file has."""
    weight = torch.empty(layer.out_features, layer.in_features, device="meta")
    if not next(iter(own.values())).is_meta:
        layer.load_state_dict(own, strict=True, assign=True)
        weight = layer.dequantize()
        layer.to("meta")  # the pages of the file may go
    return {"weight": weight} | ({"bias": own["bias"]} if "bias" in own else {})


def _write_safetensors(path: Path, conversion: _Conversion) -> int:
    """Write the tensors as they come, each at its place; return the size of the file in bytes."""
    infos = dict(conversion.tensors(on_meta=True))
    metadata = {"format": "pt"}
    if conversion.notes:
        table = {"format_version": "1.0", "layers": conversion.notes}
        metadata["_quantization_metadata"] = json.dumps(table)
    begins = _places(infos)
    header = {"__metadata__": metadata} | {
        name: {
            "dtype": _dtype_name(infos[name].dtype),
            "shape": list(infos[name].shape),
            "data_offsets": [begin, begin + infos[name].nbytes],
        }
        for name, begin in begins.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in conversion.tensors():
            like = infos[name]
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), name
            file.seek(8 + len(text) + begins[name])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return file.seek(0, 2)


def _places(infos: Mapping[str, Tensor]) -> dict[str, int]:
    """Return where each tensor begins: those with wide elements first, so that all are aligned."""
    begins, position = {}, 0
    for name in sorted(infos, key=lambda name: -infos[name].dtype.itemsize):
        begins[name] = position
        position += infos[name].nbytes
    return begins


def _dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype, as safetensors writes the name."""
    written = serialize({"x": torch.empty(0, dtype=dtype)})
    return json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])["x"]["dtype"]

"""Matrices that a file stores in several layers, quantized one by one: diffusers splits q, k and v.

`flux.weights.diffusers_transformer` calls part i of our layer L "L.parts.i".
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from flux.errors import UserError
from flux.weights.diffusers_names import SWAPPED
from flux.weights.files import TensorInfo
from flux.weights.mapping import TORCH_DTYPES
from flux.weights.quantization.detect import LayerFormat
from flux.weights.quantization.linear import QuantizedLinear

PART = re.compile(r"(.+)\.parts\.\d+")


class JoinedLinear(QuantizedLinear):
    """A weight whose rows are those of its parts, each dequantized by itself.

    `swapped`: the halves of the rows change places, as in the last modulation of diffusers.
    """

    def __init__(self, parts: Sequence[QuantizedLinear], bias: bool, swapped: bool = False):
        rows = sum(part.out_features for part in parts)
        super().__init__(parts[0].in_features, rows, bias)
        self.parts, self.swapped = nn.ModuleList(parts), swapped

    def dequantize(self) -> Tensor:
        weight = torch.cat([part.dequantize() for part in self._parts()])
        return weight.roll(len(weight) // 2, 0) if self.swapped else weight

    def _parts(self) -> Iterator[QuantizedLinear]:
        for part in self.parts:
            assert isinstance(part, QuantizedLinear)
            yield part


class FloatLinear(QuantizedLinear):
    """A part in a float type, beside quantized ones."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__(in_features, out_features, bias=False)
        self.hold("weight", (out_features, in_features), dtype)

    def dequantize(self) -> Tensor:
        return self.weight.float()


def part_names(names: Iterable[str]) -> list[str]:
    """Return the layers that are parts, "L.parts.i", in a file's tensors by canonical names."""
    layers = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    return sorted(layer for layer in layers if PART.fullmatch(layer))


def join_parts(
    infos: Mapping[str, TensorInfo],
    formats: Mapping[str, LayerFormat],
    linears: Mapping[str, nn.Linear],
) -> dict[str, JoinedLinear]:
    """Return a layer for each of the `linears` that the file has in parts, by path.

    UserError if the parts do not fill the layer.
    """
    found: dict[str, list[QuantizedLinear]] = {}
    for name in part_names(infos):
        path, info = name.rpartition(".parts.")[0], infos[f"{name}.weight"]
        parts, linear = found.get(path, []), linears.get(path)
        if linear is None or name != f"{path}.parts.{len(parts)}":
            continue  # reported as unknown
        shape = formats[name].shape if name in formats else info.shape
        rows, columns = (*shape, 0, 0)[:2]
        is_qkv = not parts or len(parts) > 2 or rows == parts[0].out_features
        if len(shape) != 2 or columns != linear.in_features or not is_qkv:
            raise UserError(
                f"{info.file} has {info.name!r:.120} of shape {tuple(shape)}, which is no part of "
                f"{path} of shape {tuple(linear.weight.shape)}."
            )
        found[path] = parts
        if name in formats:
            parts.append(formats[name].make(columns, rows, False))
        else:
            parts.append(FloatLinear(columns, rows, TORCH_DTYPES[info.dtype]))
    joined = {}
    for path, parts in found.items():
        linear = linears[path]
        rows = sum(part.out_features for part in parts)
        if rows != linear.out_features:
            raise UserError(
                f"{infos[f'{path}.parts.0.weight'].file} has parts of {path} with {rows} rows "
                f"together, expected {linear.out_features}."
            )
        joined[path] = JoinedLinear(parts, linear.bias is not None, swapped=path == SWAPPED)
    return joined


def leaves(layers: Mapping[str, QuantizedLinear]) -> dict[str, QuantizedLinear]:
    """Return the layers that hold a file's tensors: parts in place of joined layers."""
    found: dict[str, QuantizedLinear] = {}
    for path, layer in layers.items():
        if isinstance(layer, JoinedLinear):
            for i, part in enumerate(layer._parts()):
                found[f"{path}.parts.{i}"] = part
        else:
            found[path] = layer
    return found

"""Merge LoRAs into a network: W + sum of scale · delta, in float32, rounded once.

A delta is alpha/rank · BA of a LoRA, or the change of another kind (`kinds.py`).
Merging costs nothing per step, and every module keeps its path. Wrapped layers, which compute
Wx + s·B(Ax), would do neither.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.errors import UserError
from flux.lora.kinds import NO_DELTA, weight_change
from flux.weights.quantization import QuantizedLinear

Rows = tuple[tuple[int, int], ...]


class Target(NamedTuple):
    """The layer that a tensor of a file changes, or some rows of its weight."""

    part: str  # "transformer", "clip", "t5" or "language_model"
    path: str = ""  # of the module; "": the part has no such layer
    rows: Rows = ()  # (start, stop) in our weight, in the file's order


@dataclass(frozen=True, eq=False)
class LayerDelta:
    """The change of one layer by one file."""

    target: Target
    factors: dict[str, Tensor]  # by role, as in `flux.lora.names.ROLES`, without alpha
    scaling: float  # alpha/rank
    columns: int  # of the delta; they differ from the weight's in img_in only
    source: Path
    options: Mapping[str, float] = field(default_factory=dict)  # of `kinds.weight_change`

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return what scale 1 adds to the target's rows `weight` (rows, n): (rows, columns).

        Works in place where possible: these are the largest matrices of a network, in float32.
        """
        factors = {role: factor.to(weight) for role, factor in self.factors.items()}
        old = weight[..., : self.columns]
        delta = weight_change(factors, old, self.options)
        if "diff" in factors or "value" in factors:
            delta = self.scaling * delta  # a copy: the tensor may be the file's
        else:
            delta.mul_(self.scaling)
        if "magnitude" not in factors:
            return delta
        # DoRA (Liu et al. 2024, arXiv:2402.09353): the magnitude is the new length of each row, or,
        # with one number per column, of each column.
        magnitude = factors["magnitude"]
        if magnitude.ndim == 1:
            magnitude = magnitude[:, None]
        new = delta.add_(old)
        length = new.norm(dim=0 if len(magnitude) == 1 else 1, keepdim=True)
        return new.mul_(magnitude).div_(length).sub_(old)


def weight_name(layer: nn.Module) -> str:
    """Return "scale" for a norm of the transformer, "weight" for other layers."""
    return "scale" if isinstance(getattr(layer, "scale", None), Tensor) else "weight"


def no_callback(path: str) -> None:
    pass


@torch.no_grad()
def merge(
    module: nn.Module,
    deltas: Iterable[tuple[LayerDelta, float]],
    each: Callable[[str], None] = no_callback,
) -> None:
    """Add the deltas of all files, each with its scale, to the weights of `module`.

    Scale 0 leaves W as it is; scale 1 gives what PEFT gives. New norms and new columns of img_in
    apply at every scale, as in Black Forest Labs' code. Sums are rounded once, to the dtype of W
    (float8 too). A quantized layer whose weight changes becomes a Linear in the dtype of the
    computation: quantizing again would lose more. Old tensors stay as they are and are not kept: to
    undo a merge, load the module again. `each(path)` is called after each changed layer.

    UserError if a sum overflows; the module is then unusable.
    """
    layers = defaultdict(list)
    for delta, scale in deltas:
        layers[delta.target.path].append((delta, scale))
    dtype = next(module.parameters()).dtype  # of the computation: quantized weights are buffers
    for path, group in layers.items():
        layer = module.get_submodule(path)
        weight = _merged_weight(layer, path, group, dtype)
        bias = _merged_bias(layer, path, group)
        if weight is not None:
            if isinstance(layer, QuantizedLinear):
                layer = layer.to_linear(weight)
                module.set_submodule(path, layer)
            _set_parameter(layer, weight_name(layer), weight)
            if path == "img_in":  # which may have become wider
                _set_in_channels(module, layer, weight.shape[1])
        if bias is not None:
            _set_parameter(layer, "bias", bias)
        each(path)


def _set_in_channels(module: Any, img_in: Any, channels: int) -> None:
    img_in.in_features = channels
    module.config = replace(module.config, in_channels=channels)


def _set_parameter(layer: nn.Module, name: str, tensor: Tensor) -> None:
    trained = getattr(layer, name).requires_grad
    setattr(layer, name, nn.Parameter(tensor, requires_grad=trained))


def _merged_weight(
    layer: nn.Module, path: str, group: Sequence[tuple[LayerDelta, float]], dtype: torch.dtype
) -> Tensor | None:
    """Return the new weight, None if no delta changes it. `dtype`: of a quantized weight."""
    group = [(delta, scale) for delta, scale in group if delta.factors.keys() - NO_DELTA]
    if not group:
        return None
    replacing = [delta for delta, _ in group if "value" in delta.factors]
    if len(replacing) > 1:
        first, second = replacing[:2]
        raise UserError(
            f"{first.source}: cannot be merged together with {second.source}, since both replace "
            f"{path}. Leave one out."
        )
    if isinstance(layer, QuantizedLinear):
        old, fresh = layer.dequantize(), True
    else:
        old, fresh = getattr(layer, weight_name(layer)), False
        dtype = old.dtype
    wide = (replacing[0].factors["value"] if replacing else old).to(old.device, _wide_dtype(old))
    fresh = not replacing and (fresh or wide.dtype != old.dtype)
    missing = max(delta.columns for delta, _ in group) - wide.shape[-1]
    if missing > 0:
        wide, fresh = F.pad(wide, (0, missing)), True
    # `total` may overwrite `wide` if no other module holds it and DoRA does not need old values.
    has_dora = any("magnitude" in delta.factors for delta, _ in group)
    total = wide if fresh and not has_dora else wide.clone()
    for delta, scale in group:
        if delta in replacing:
            continue
        rows = [wide[start:stop] for start, stop in delta.target.rows]
        _add(
            total, delta, delta.delta_weight(rows[0] if len(rows) == 1 else torch.cat(rows)), scale
        )
    return _rounded(total, dtype, path)


def _merged_bias(
    layer: nn.Module, path: str, group: Sequence[tuple[LayerDelta, float]]
) -> Tensor | None:
    """Return the new bias; None if no delta changes it."""
    changes = []
    for delta, scale in group:
        if "up_bias" in delta.factors:
            changes.append((delta, delta.factors["up_bias"], scale * delta.scaling))
        if "diff_bias" in delta.factors:
            changes.append((delta, delta.factors["diff_bias"], scale))
    if not changes:
        return None
    bias: Any = layer.bias
    total = bias.to(_wide_dtype(bias), copy=True)
    for delta, change, scale in changes:
        _add(total, delta, change.to(total, copy=True), scale)
    return _rounded(total, bias.dtype, path)


def _add(total: Tensor, delta: LayerDelta, change: Tensor, scale: float) -> None:
    """Add scale · change to the delta's rows and first columns of `total`. Overwrites `change`."""
    sizes = [stop - start for start, stop in delta.target.rows]
    for (start, stop), piece in zip(
        delta.target.rows, change.mul_(scale).split(sizes), strict=True
    ):
        total[start:stop][..., : piece.shape[-1]] += piece


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _rounded(total: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    limit = torch.finfo(dtype).max
    lowest, highest = total.aminmax()
    if not (highest <= limit and lowest >= -limit):  # also if they are NaN
        raise UserError(
            f"loras: the sum for {path} exceeds {limit:g}, the largest {dtype}. Use smaller scales."
        )
    return total.to(dtype)

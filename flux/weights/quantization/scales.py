"""Check the scales of quantized layers before anything is loaded: one wrong scale ruins a layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flux.errors import UserError
from flux.weights.files import TensorInfo
from flux.weights.mapping import map_tensor
from flux.weights.quantization.linear import QuantizedLinear


def check_scales(layers: Mapping[str, QuantizedLinear], infos: Mapping[str, TensorInfo]) -> None:
    """Check the scales of matrices and rows, which are few, in the files' tensors `infos`.

    UserError for a scale that is NaN, infinite or negative, and for a scale of zero whose row holds
    other numbers than zero. Scales of short blocks are as many as a tenth of the file: these are
    read, and found if they are not finite, only if `load_module` is asked to check.
    """
    for path, layer in layers.items():
        for name in layer.few_scales:
            info = infos.get(f"{path}.{name}")
            if info is None:  # a plain cast has none
                continue
            scale = map_tensor(info).float().flatten()
            wrong = scale[~(scale >= 0) | scale.isinf()]
            if not len(wrong):
                zeros = (scale == 0).nonzero()
                if not len(zeros) or name == "weight_scale_inv":  # of a block
                    continue
                if not _holds_numbers(map_tensor(infos[f"{path}.weight"])[int(zeros[0])]):
                    continue
                wrong = scale.new_zeros(1)
            raise UserError(
                f"{info.file} has the scale {wrong[0].item():g} in {info.name!r:.120}, expected a "
                "number above 0; get it from where it was made."
            )


def _holds_numbers(row: Tensor) -> bool:
    """Return whether a row has another number than zero, with either sign."""
    if row.dtype == torch.uint8:  # two E2M1 a byte, whose first bits are the signs
        row = row & 0x77
    return bool(row.float().any())

"""NF4 and FP4: 4 bits a weight, files of bitsandbytes (Dettmers et al. 2023, arXiv:2305.14314).

A file has, for a layer L:

    L.weight                    U8   (numbers / 2, 1)   two a byte, the first in the high half
    L.weight.absmax             F32  (blocks,)          or U8, with double quantization
    L.weight.nested_absmax      F32  (blocks / 256,)    with double quantization
    L.weight.nested_quant_map   F32  (256,)             the values of absmax's bytes
    L.weight.quant_map          F32  (16,)              the values of the 4-bit numbers
    L.weight.quant_state.bitsandbytes__nf4   U8         JSON: shape and block sizes (`QuantState`)

A module's tensor cannot have tensors below it, so `canonical` renames L.weight.absmax to L.absmax,
and the others likewise.
"""

import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.errors import UserError
from flux.plain_files import MAX_JSON, parse_json
from flux.weights.files import TensorInfo
from flux.weights.mapping import map_tensor
from flux.weights.quantization.linear import QuantizedLinear

STATE = re.compile(r"(.+)\.weight\.quant_state\.bitsandbytes__\w+")  # the group is the layer


def canonical(name: str) -> str:
    """Return the module's name of a file's tensor: `L.weight.absmax` is `L.absmax`."""
    return re.sub(r"\.weight\.((?:nested_)?(?:absmax|quant_map))$", r".\1", name)


class QuantState(NamedTuple):
    """The sizes that the JSON of a layer gives."""

    shape: tuple[int, int]  # (out_features, in_features)
    blocksize: int
    nested_blocksize: int | None  # None without double quantization
    nested_offset: float  # added to every absmax, because they were centred before quantization


def parse_json_tensor(tensor: Tensor) -> Any:
    """Return the JSON that a tensor of bytes holds; ValueError if the tensor is anything else."""
    if tensor.dtype != torch.uint8 or tensor.numel() > MAX_JSON:
        raise ValueError(f"{tensor.dtype} of shape {tuple(tensor.shape)} is not JSON")
    return parse_json(bytes(tensor.flatten().tolist()))


def read_state(info: TensorInfo) -> QuantState:
    """Read a layer's state from a tensor of JSON; UserError if the state is damaged."""
    tensor = map_tensor(info)
    try:
        table = parse_json_tensor(tensor)
        kind, blocksize, (rows, columns) = table["quant_type"], table["blocksize"], table["shape"]
        nested, offset = table.get("nested_blocksize"), table.get("nested_offset", 0.0)
        sizes = [blocksize, rows, columns]
        if nested is not None:
            sizes.append(nested)
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError("its sizes are not whole numbers above 0")
        if not isinstance(offset, int | float) or not abs(offset) < torch.finfo(torch.float32).max:
            raise ValueError("its offset is not a finite number")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{info.file} has a damaged {info.name!r:.120} ({error!s:.80}); download it again."
        ) from error
    if kind not in ("nf4", "fp4"):
        raise UserError(
            f"{info.file} has {info.name!r:.120} of the type {kind!r:.40}; of bitsandbytes' types, "
            "nf4 and fp4 are supported."
        )
    return QuantState((rows, columns), blocksize, nested, float(offset))


class NF4Linear(QuantizedLinear):
    """A weight of bitsandbytes: NF4, or FP4, which has other values in `quant_map`.

    The weight is one row of numbers, cut into blocks of 64. Each number is 4 bits.
    weight = quant_map[number] * absmax of its block. A weight takes 0.5625 bytes.
    Double quantization stores absmax as a byte, with a second scale for 256 blocks: 0.516 bytes.
    arXiv:2305.14314, section 3, specifies both; the names are those of bitsandbytes' QuantState.
    """

    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor
    nested_quant_map: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, state: QuantState):
        super().__init__(in_features, out_features, bias)
        self.state = state
        numbers = in_features * out_features
        blocks, nested = -(-numbers // state.blocksize), state.nested_blocksize
        absmax_dtype = torch.uint8 if nested else torch.float32
        self.hold("weight", (-(-numbers // 2), 1), torch.uint8)
        self.hold("absmax", (blocks,), absmax_dtype)
        self.hold("quant_map", (16,))
        if nested:
            self.hold("nested_absmax", (-(-blocks // nested),))
            self.hold("nested_quant_map", (256,))

    def dequantize(self) -> Tensor:
        absmax = self.absmax  # (blocks,)
        if nested_blocksize := self.state.nested_blocksize:
            absmax = self.nested_quant_map[absmax.int()]
            absmax = scale_blocks(absmax, self.nested_absmax, nested_blocksize)
            absmax = absmax + self.state.nested_offset
        numbers = self.in_features * self.out_features
        values = lookup(self.weight.flatten(), self.quant_map)[:numbers]  # half a byte may be left
        values = scale_blocks(values, absmax, self.state.blocksize)
        return values.view(self.out_features, self.in_features)


def lookup(packed: Tensor, code: Tensor, high_first: bool = True) -> Tensor:
    """Replace 4-bit numbers, two a byte (..., n), by their values in `code` (16,): (..., 2n).

    One look-up in a table of 256 pairs serves both halves of a byte.
    """
    high, low = code.repeat_interleave(16), code.repeat(16)  # of each of the 256 bytes
    pairs = torch.stack([high, low] if high_first else [low, high], dim=-1)  # (256, 2)
    return F.embedding(packed.int(), pairs).flatten(-2)


def scale_blocks(values: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """Multiply values (n,) by the scales (ceil(n / blocksize),) of their blocks, in place.

    The last block may be short.
    """
    missing = len(scales) * blocksize - len(values)
    padded = F.pad(values, (0, missing)) if missing else values
    blocks = padded.view(-1, blocksize)
    return blocks.mul_(scales[:, None]).flatten()[: len(values)]  # in place: nothing is as large

"""Files of bitsandbytes in 4 bits: NF4 and its lesser kin FP4 (Dettmers et al. 2023, arXiv:2305.14314).

The weight is one row of numbers, cut into blocks of 64; a number is one of 16 values times the largest in its block.
With double quantisation these largest are bytes themselves, in blocks of 256. A file has, for a layer L:

    L.weight                                  U8   (numbers / 2, 1)   two a byte, the first in the high half
    L.weight.absmax                           F32  (blocks,)          or U8, with double quantisation, and then
    L.weight.nested_absmax                    F32  (blocks / 256,)
    L.weight.nested_quant_map                 F32  (256,)             what such a byte stands for
    L.weight.quant_map                        F32  (16,)              the 16 values
    L.weight.quant_state.bitsandbytes__nf4    U8                      a JSON text: shape and block sizes (`read_state`)

A tensor cannot have others below it in a module, so they are renamed, by `canonical`, to L.absmax, L.quant_map, ...
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux.errors import UserError
from flux.weights.quantization.linear import QuantizedLinear

STATE = re.compile(
    r"(.+)\.weight\.quant_state\.bitsandbytes__\w+"
)  # the name of the JSON text; the group is the layer


def canonical(name: str) -> str:
    """The name in the module of a tensor of the file: `L.weight.absmax` -> `L.absmax`; other names stay as they are."""
    return re.sub(r"\.weight\.((?:nested_)?(?:absmax|quant_map))$", r".\1", name)


class QuantState(NamedTuple):
    """What the JSON text says. `nested_blocksize` is None without double quantisation."""

    shape: tuple[int, int]  # (out_features, in_features)
    blocksize: int
    nested_blocksize: int | None
    nested_offset: (
        float  # added to every block's largest, which were centred before their quantisation
    )


def read_state(path: Path, name: str) -> QuantState:
    """The state of a layer, from the JSON text that is the tensor `name` of the file; UserError if it says nothing good."""
    try:
        with safe_open(path, framework="pt", device="cpu") as mapped:
            table = json.loads(bytes(mapped.get_tensor(name).flatten().tolist()))
        kind, size, (rows, columns) = table["quant_type"], table["blocksize"], table["shape"]
        nested, offset = table.get("nested_blocksize"), table.get("nested_offset", 0.0)
        if not all(
            type(n) is int and n > 0
            for n in (size, rows, columns, *(() if nested is None else (nested,)))
        ):
            raise ValueError("its sizes are no whole numbers above 0")
        if not isinstance(offset, int | float) or not abs(offset) < torch.finfo(torch.float32).max:
            raise ValueError("its offset is no finite number")
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
            f"{path} has a damaged {name!r:.120} ({error!s:.80}); download it again."
        ) from error
    if kind not in ("nf4", "fp4"):
        raise UserError(
            f"{path} has {name!r:.120} of the kind {kind!r:.40}; of bitsandbytes' kinds, nf4 and fp4 are read."
        )
    return QuantState((rows, columns), size, nested, float(offset))


class NF4Linear(QuantizedLinear):
    """A layer of bitsandbytes' files: 0.5625 bytes a weight, and 0.516 with double quantisation. FP4 has other values."""

    def __init__(self, in_features: int, out_features: int, bias: bool, state: QuantState):
        super().__init__(in_features, out_features, bias)
        self.state = state
        numbers = in_features * out_features
        blocks, nested = -(-numbers // state.blocksize), state.nested_blocksize
        self.register_buffer("weight", torch.empty(-(-numbers // 2), 1, dtype=torch.uint8))
        self.register_buffer(
            "absmax", torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32)
        )
        self.register_buffer("quant_map", torch.empty(16))
        if nested:
            self.register_buffer("nested_absmax", torch.empty(-(-blocks // nested)))
            self.register_buffer("nested_quant_map", torch.empty(256))

    def dequantize(self) -> Tensor:
        absmax = self.absmax
        if self.state.nested_blocksize:
            absmax = scaled(
                self.nested_quant_map[absmax.int()], self.nested_absmax, self.state.nested_blocksize
            )
            absmax = absmax + self.state.nested_offset
        numbers = self.in_features * self.out_features
        values = lookup(self.weight.flatten(), self.quant_map)[
            :numbers
        ]  # an odd one out leaves half a byte unused
        return scaled(values, absmax, self.state.blocksize).view(
            self.out_features, self.in_features
        )


def lookup(packed: Tensor, code: Tensor, high_first: bool = True) -> Tensor:
    """Bytes of two 4-bit numbers (..., n) -> what these stand for in `code` (16,): (..., 2n). One look-up makes a pair."""
    high, low = code.repeat_interleave(16), code.repeat(16)  # of each of the 256 bytes
    pairs = torch.stack([high, low] if high_first else [low, high], dim=-1)  # (256, 2)
    return F.embedding(packed.int(), pairs).flatten(-2)


def scaled(values: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """(n,) values times the scales (ceil(n / blocksize),) of their blocks, the last of which may be short. In place."""
    missing = len(scales) * blocksize - len(values)
    blocks = (F.pad(values, (0, missing)) if missing else values).view(-1, blocksize)
    return blocks.mul_(scales[:, None]).flatten()[
        : len(values)
    ]  # in place, since nothing else is as large

"""Quantized weights: Linears that stay as small in memory as they are in the file.

linear.py    `QuantizedLinear`: dequantizes its weight each time it is used
fp8.py int8.py mxfp8.py nvfp4.py nf4.py gguf.py   one subclass for each format of files
joined.py    several layers of a file that are one of ours
detect.py    which layers of a file are quantized, and in which format
scales.py    refuses a scale that is no number above 0
published.py rounds weights to the formats that other programs read
quantize.py  `quantize_`: rounds the large Linears of a loaded network to fp8, int8 or int4

formats = detect_formats(infos, metadata, layers)  # layer -> its full shape, and how to make it
"""

from flux.weights.quantization.detect import (
    FP8_DTYPES,
    LayerFormat,
    canonical,
    detect_formats,
    is_quant_metadata,
)
from flux.weights.quantization.fp8 import BlockFP8Linear, FP8Linear, enable_fp8_matmul
from flux.weights.quantization.gguf import GGUFEmbedding, GGUFLinear
from flux.weights.quantization.int8 import Int8Linear
from flux.weights.quantization.joined import JoinedLinear, join_parts, leaves, part_names
from flux.weights.quantization.linear import QuantizedLinear
from flux.weights.quantization.mxfp8 import MXFP8Linear
from flux.weights.quantization.nf4 import NF4Linear
from flux.weights.quantization.nvfp4 import NVFP4Linear
from flux.weights.quantization.scales import check_scales

__all__ = [
    "FP8_DTYPES",
    "BlockFP8Linear",
    "FP8Linear",
    "GGUFEmbedding",
    "GGUFLinear",
    "Int8Linear",
    "JoinedLinear",
    "LayerFormat",
    "MXFP8Linear",
    "NF4Linear",
    "NVFP4Linear",
    "QuantizedLinear",
    "canonical",
    "check_scales",
    "detect_formats",
    "enable_fp8_matmul",
    "is_quant_metadata",
    "join_parts",
    "leaves",
    "part_names",
]

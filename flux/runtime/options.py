"""The options that save memory and time, each checked when the options are created."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from flux.errors import UserError
from flux.weights.quantization.quantize import SCHEMES

Offload = Literal["none", "model", "block"]
OFFLOAD_MODES: tuple[Offload, ...] = ("none", "model", "block")  # from fastest to smallest


@dataclass(frozen=True)
class RuntimeOptions:
    """How to save memory and time. `quantize`, `fp8_matmul` and `vae_tile` change the image.

    `bench.py --lossy` measures by how much.
    """

    offload: Offload | None = None  # default: the fastest mode that fits (memory_plan.py)
    max_vram: float | None = None  # GB of device memory to use at most; default: all that is free
    quantize: str | None = None  # "fp8", "int8", "int4": transformer and large text encoders
    fp8_matmul: bool = False  # multiply float8 matrices in float8
    compile: bool = False  # the transformer's blocks: a minute at first, faster steps on a GPU
    vae_tile: int | None = None  # pixels: decode in tiles of this side
    decode_dtype: torch.dtype | None = None  # dtype of decoding; default: by `numerics`
    fast: bool = True  # with exact numerics, and not on MPS, the forwards of runtime/fast.py

    def __post_init__(self) -> None:
        check_choice("quantize", self.quantize, SCHEMES)
        check_choice("offload", self.offload, OFFLOAD_MODES)
        check_max_vram(self.max_vram)
        if self.vae_tile is not None and (self.vae_tile < 256 or self.vae_tile % 16):
            raise UserError(
                f"vae_tile: must be a multiple of 16 and at least 256 pixels (got {self.vae_tile})."
            )
        if self.decode_dtype not in (None, torch.float32, torch.bfloat16):
            raise UserError(
                "decode_dtype: must be torch.float32 or torch.bfloat16 "
                f"(got {self.decode_dtype!s:.40})."
            )


def check_choice(name: str, value: object, choices) -> None:
    """Raise UserError unless the argument `name` is None or one of `choices`."""
    if value is not None and value not in choices:
        raise UserError(f"{name}: {value!s:.40} is unknown. Choose from {', '.join(choices)}.")


def check_max_vram(max_vram: float | None) -> None:
    """Raise UserError unless `max_vram` is None or a positive, finite number of GB."""
    if max_vram is not None and not 0 < max_vram < math.inf:
        raise UserError(
            f"max_vram: must be a positive number of gigabytes, such as 8 (got {max_vram:g})."
        )

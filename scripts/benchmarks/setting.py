"""The sizes of a measurement, and the device: the same rows take hours, minutes or seconds."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from flux.transformer import FluxConfig
from flux.transformer3 import Flux3Config

Config = FluxConfig | Flux3Config


@dataclass(frozen=True)
class Setting:
    """The default has real widths. Either depth or width is reduced, whichever matters less."""

    device: torch.device
    rounds: int = 3
    enough: float = 0.5  # seconds of one timing, at least; shorter runs are repeated
    width: int | None = None  # of transformers of reduced depth; None: the model's own
    sides: tuple[int, ...] = (256, 512)  # in pixels, of the image of a step
    text: int = 512  # tokens
    shrink: int = 8  # the factor by which text encoders are narrower than released
    decoded: int = 512  # side in pixels of the image that is decoded and encoded
    channels: int = 128  # of the autoencoder's first level
    saved: int = 1024  # side in pixels of the image that is saved
    compiled: bool = True
    full_side: int = 1024  # side in pixels of the image of a full-size model
    replayed: float = 2.0  # seconds of one timing of the floor
    prompts: int = 24  # of the embedded model, for each lossy mode

    def quick(self) -> "Setting":
        """Return smaller sizes: everything takes three minutes on two cores."""
        return replace(
            self,
            enough=0.1,
            width=1536,
            sides=(256,),
            text=128,
            shrink=16,
            decoded=128,
            compiled=False,
            replayed=0.2,
            prompts=4,
        )

    def cut(self, config: Config) -> Config:
        """Return the config of one double, or mode, and two single blocks of a model."""
        width, head = self.width or config.hidden_size, config.hidden_size // config.num_heads
        return replace(config, depth=1, depth_single=2, hidden_size=width, num_heads=width // head)


def narrowed(config: Config, width: int) -> Config:
    """Return a config of the same depth, whose heads have 16 channels."""
    if isinstance(config, Flux3Config):
        sizes: dict[str, Any] = dict(in_channels=16, context_dim=64, axes_dim=(4, 4, 4, 4))
        return replace(config, hidden_size=width, num_heads=width // 16, **sizes)
    axes = (4, 6, 6) if len(config.axes_dim) == 3 else (4, 4, 4, 4)
    vector = None if config.vector_dim is None else 32
    return replace(
        config,
        in_channels=16,
        out_channels=16,
        context_dim=64,
        vector_dim=vector,
        hidden_size=width,
        num_heads=width // 16,
        axes_dim=axes,
    )

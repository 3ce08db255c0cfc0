"""How large what is measured is, and on what: the same rows are made in hours, in minutes, or in a test."""

from dataclasses import dataclass, replace

import torch

from flux.transformer import FluxConfig


@dataclass(frozen=True)
class Setting:
    """By default, real widths; depth is reduced where time goes with width, and width where it goes with depth."""

    device: torch.device
    rounds: int = 3
    enough: float = 0.5  # seconds that one timing should take at least; what is shorter is repeated
    width: int | None = None  # of transformers at reduced depth; None: the model's own
    sides: tuple[int, ...] = (256, 512)  # in pixels, of what a step works on
    text: int = 512  # tokens
    shrink: int = 8  # by which text encoders are narrower than they are
    decoded: int = 512  # side in pixels of what the autoencoder decodes and encodes
    channels: int = 128  # of the autoencoder's first level
    saved: int = 1024  # side in pixels of the picture that is written
    compiled: bool = True
    whole: int = 1024  # side in pixels of what a model of full size makes
    replayed: float = 2.0  # seconds that the floor is replayed for, each time
    prompts: int = 24  # of which the embedded model makes pictures, in each lossy mode

    def quick(self) -> "Setting":
        """Everything within three minutes on two cores."""
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

    def cut(self, config: FluxConfig) -> FluxConfig:
        """One double and two single blocks of a model."""
        width, head = self.width or config.hidden_size, config.hidden_size // config.num_heads
        return replace(config, depth=1, depth_single=2, hidden_size=width, num_heads=width // head)


def narrowed(config: FluxConfig, width: int) -> FluxConfig:
    """A transformer of the same depth and the same number of operations, with heads of 16 channels."""
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

"""ControlNets of FLUX.1: a copy of the first blocks, whose outputs are added to the transformer's.

    pipe.sample(features, seeds, residuals=load_controlnet(path, pipe).residuals(image))

Two layouts are read. InstantX's (also Shakker Labs', Union): names as in diffusers, the control
image as latents, double and single blocks. XLabs': names as in BFL's code, the control image as
pixels, which `input_hint_block` brings to latent size. ControlNet: Zhang et al. 2023,
arXiv:2302.05543.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flux.configs import ModelSpec
from flux.errors import UserError
from flux.image_io.input import ImageLike, as_image
from flux.image_io.output import to_pixels
from flux.transformer import Flux, FluxConfig, Residuals
from flux.velocity import ResidualsFn
from flux.weights.diffusers_transformer import join_diffusers
from flux.weights.files import shard_files
from flux.weights.load import init_empty, load_module, read_headers

XLABS = {"pos_embed_input": "controlnet_x_embedder"}  # names that differ from InstantX's


class ControlNet(Flux):
    """FLUX.1's blocks, fewer of them, and a Linear for each block's output.

    hint: XLabs' convolutions from pixels; else the control image is tokens of latents.
    modes: how many kinds of control image a Union model knows.
    """

    def __init__(self, config: FluxConfig, hint: bool = False, modes: int = 0):
        super().__init__(config)
        del self.final_layer
        width = config.hidden_size
        self.controlnet_x_embedder = nn.Linear(config.in_channels, width)
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))
        self.controlnet_single_blocks = nn.ModuleList(
            nn.Linear(width, width) for _ in range(config.depth_single)
        )
        self.controlnet_mode_embedder = nn.Embedding(modes, width) if modes else None
        self.input_hint_block = hint_block() if hint else None

    def forward(  # type: ignore[override]
        self,
        control: Tensor,  # (B, L, C) tokens; with `hint`, pixels (B, 3, H, W) in [-1, 1]
        img: Tensor,  # the rest: as of the transformer
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        t: Tensor,
        guidance: Tensor | None = None,
        vector: Tensor | None = None,
        mode: int | None = None,
    ) -> Residuals:
        """Return one residual for each of the blocks here, (B, L, D)."""
        if self.input_hint_block is not None:
            control = self.input_hint_block(control)  # (B, 16, H / 8, W / 8)
            control = rearrange(control, "b c (h y) (w x) -> b (h w) (c y x)", y=2, x=2)
        x = self.img_in(img) + self.controlnet_x_embedder(control)  # (B, L, D)
        y = self.txt_in(txt)  # (B, T, D)
        if self.controlnet_mode_embedder is not None:
            number = torch.full((len(y), 1), mode or 0, device=y.device)
            y = torch.cat([self.controlnet_mode_embedder(number), y], dim=1)
            txt_ids = torch.cat([txt_ids[:1], txt_ids])
        mods = self.modulations([self.vec(t, guidance, vector)])[0]
        rope = self.rope(txt_ids, img_ids).to(x.device)
        double: list[Tensor | None] = []
        single: list[Tensor | None] = []
        for block, both, out in zip(self.double_blocks, mods.double, self.controlnet_blocks):
            x, y = block(x, y, rope, *both)
            double.append(out(x))
        z = torch.cat([y, x], dim=1)
        for block, mod, out in zip(self.single_blocks, mods.single, self.controlnet_single_blocks):
            z = block(z, rope, mod)
            single.append(out(z[:, y.shape[1] :]))
        return Residuals(double, single)


def hint_block() -> nn.Sequential:
    """XLabs' eight convolutions, three of stride 2: (B, 3, H, W) -> (B, 16, H / 8, W / 8)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for stride in (1, 2, 1, 2, 1, 2, 1):
        layers += [nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1, stride=stride)]
    return nn.Sequential(*layers)


def spread(
    residuals: Sequence[Tensor | None], blocks: int, repeat: bool = False
) -> list[Tensor | None]:
    """Give each of the transformer's blocks a residual: in runs, or (`repeat`) in turn."""
    if not residuals:
        return [None] * blocks
    run = math.ceil(blocks / len(residuals))
    index = [i % len(residuals) if repeat else i // run for i in range(blocks)]
    return [residuals[i] for i in index]


class LoadedControlNet:
    """A ControlNet and the pipeline that it controls."""

    def __init__(self, network: ControlNet, pipe: Any):
        self.network, self.pipe = network, pipe

    def residuals(
        self, image: ImageLike, scale: float = 1.0, mode: int | None = None
    ) -> ResidualsFn:
        """Return what `sample` takes as `residuals` for a control image of the output's size."""
        pipe, network, c = self.pipe, self.network, self.pipe.spec.flux_config
        hint = network.input_hint_block is not None
        picture = as_image(image)
        if hint:
            pipe.judge_image(picture)
            control = to_pixels(picture)
        else:
            control = rearrange(pipe.to_latents(picture), "b c h w -> b (h w) c")
        control = control.to(pipe.device, pipe.dtype)

        def residuals(img: Tensor, *rest: Any) -> Residuals:
            given = control.expand(len(img), *control.shape[1:])
            double, single = (
                [x if x is None else scale * x for x in some]
                for some in network(given, img, *rest, mode=mode)
            )
            return Residuals(spread(double, c.depth, repeat=hint), spread(single, c.depth_single))

        return residuals


def load_controlnet(path: str | Path, pipe: Any) -> LoadedControlNet:
    """Load a ControlNet of either layout for a FLUX.1 pipeline, on its device and in its dtype."""
    if not pipe.spec.flux1:
        raise UserError(f"path: {path} is a ControlNet of FLUX.1, not of {pipe.spec.name}.")
    network = load_network(shard_files(Path(path)), pipe.spec, pipe.device, pipe.dtype)
    return LoadedControlNet(network, pipe)


def load_network(
    files: list[Path], spec: ModelSpec, device: torch.device, dtype: torch.dtype
) -> ControlNet:
    """Load a ControlNet of either layout for a row of FLUX.1. On the meta device: check its file.

    The file tells how many blocks it has, and whether it reads guidance, a mode or pixels.
    """
    infos = join_diffusers(read_headers(files)[0])
    shapes = {rename(name): info.shape for name, info in infos.items()}
    control = shapes.get("controlnet_x_embedder.weight", ())
    if len(control) != 2:
        raise UserError(f"path: {files[0]} is no ControlNet in InstantX's or XLabs' layout.")
    control_lora = spec.control and spec.addon  # which adds the control image's channels
    channels = spec.flux_config.in_channels * (2 if control_lora else 1)
    if control[1] != channels:
        raise UserError(
            f"path: {files[0]} is a ControlNet of {control[1]} channels, but {spec.name} has "
            f"{channels}."
        )

    def count(blocks: str) -> int:
        return len({n.split(".")[1] for n in shapes if re.match(rf"{blocks}\.\d+\.", n)})

    config = replace(
        spec.flux_config,
        in_channels=channels,
        depth=count("controlnet_blocks"),
        depth_single=count("controlnet_single_blocks"),
        guidance="guidance_in.in_layer.weight" in shapes,
    )
    modes = (*shapes.get("controlnet_mode_embedder.weight", ()), 0)[0]
    hint = any(name.startswith("input_hint_block.") for name in shapes)
    network: Any = init_empty(lambda: ControlNet(config, hint, modes))
    load_module(network, files, device=device, dtype=dtype, rename=rename)
    return network


def rename(name: str) -> str:
    """Return our name of a tensor in XLabs' file, or in one that diffusers made of it."""
    layer, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"input_hint_block\.(conv_in|conv_out|blocks\.(\d+))", layer):
        index = {"conv_in": 0, "conv_out": 14}.get(match[1], 2 * int(match[2] or 0) + 2)
        return f"input_hint_block.{index}.{leaf}"
    return f"{XLABS.get(layer, layer)}.{leaf}"

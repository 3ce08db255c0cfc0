"""One step of FLUX 3, ours and diffusers', with the same weights and inputs: see `steps`.

A base model's text runs once a generation in our pipeline, that of a flow map in every step.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import random_weights
from flux import sampling
from flux.parity.reference import loaded
from flux.parity.reference3 import (
    diffusers_transformer3,
    diffusers_velocity3,
    transformer3_to_diffusers,
)
from flux.transformer3 import Flux3, Flux3Config, Stream

TEXT_TOKENS = 240  # of a usual prompt, padding included; a prompt has any length


def both3(
    config: Flux3Config, device: torch.device | str, dtype: torch.dtype
) -> tuple[Flux3, nn.Module]:
    """Return our transformer and diffusers' transformer, which share their weights."""
    ours = random_weights(lambda: Flux3(config), device, dtype)
    return ours, their_transformer3(ours)  # type: ignore[return-value, arg-type]


def their_transformer3(ours: Flux3) -> nn.Module:
    return loaded(diffusers_transformer3(ours.config), transformer3_to_diffusers(ours.state_dict()))


def ids_and_times3(config: Flux3Config, tokens: int, device: torch.device | str) -> dict:
    """Return what FLUX 3 reads besides tokens of an image of `tokens` by `tokens`."""
    own = dict(img_ids=sampling.flux3_image_ids(tokens, tokens))
    if config.flow_map:
        own["target"] = torch.full((1,), 0.25, device=device)
    return own


def our_step3(model: Flux3, tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a step as `flux.velocity3` runs it. Rotations are computed once a generation."""
    img, t, target = tensors["img"], tensors["t"], tensors.get("target")
    modes = [("txt", tensors["txt"], tensors["txt_ids"])]
    if "references" in tensors:
        modes.append(("image_cond", tensors["references"], tensors["reference_ids"]))
    parts = [(mode, tokens, model.rope(ids).to(img.device)) for mode, tokens, ids in modes]
    rope = model.rope(tensors["img_ids"]).to(img.device)

    def streams() -> list[Stream]:
        vec_0 = model.vec(torch.zeros_like(t), target)
        return [model.stream(mode, tokens, table, vec_0) for mode, tokens, table in parts]

    kept = [] if model.config.flow_map else streams()
    return lambda: model.denoise(img, rope, model.vec(t, target), *(kept or streams()))


def their_step3(model: nn.Module, tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: diffusers_velocity3(model, **tensors)

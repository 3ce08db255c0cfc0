"""Build diffusers' FLUX 3 networks with our weights in them: see `flux.parity.reference`."""

from typing import Any

import torch
from torch import Tensor

from flux.transformer3 import Flux3Config
from flux.weights.diffusers_names3 import SWAPPED, diffusers_layer

FLUX3_TINY = Flux3Config(
    in_channels=16,
    context_dim=40,
    hidden_size=128,
    num_heads=4,
    depth=2,
    depth_single=3,
    axes_dim=(8, 8, 8, 8),
)


def transformer3_to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by diffusers' names; its final modulation has scale before shift."""
    out = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer == SWAPPED:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        out[f"{diffusers_layer(layer)}.{'weight' if leaf == 'scale' else leaf}"] = tensor
    return out


def diffusers_transformer3(config: Flux3Config) -> Any:
    """diffusers' transformer at our config's sizes, on the meta device."""
    from diffusers import Flux3Transformer2DModel

    with torch.device("meta"):
        return Flux3Transformer2DModel(
            in_channels=config.in_channels,
            cond_in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single,
            attention_head_dim=config.hidden_size // config.num_heads,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            mlp_ratio=config.mlp_ratio,
            axes_dims_rope=config.axes_dim,
            rope_theta=config.theta,
            flow_map=config.flow_map,
        )


def diffusers_velocity3(
    model: Any,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    t: Tensor,
    references: Tensor | None = None,
    reference_ids: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Call the transformer as its pipelines do."""
    return model(
        hidden_states=img,
        encoder_hidden_states=txt,
        timestep=t.to(img.dtype),
        img_ids=img_ids,
        txt_ids=txt_ids,
        image_cond_hidden_states=references,
        image_cond_ids=reference_ids,
        target_timestep=None if target is None else target.to(img.dtype),
        return_dict=False,
    )[0]

from dataclasses import dataclass

from stand_in import Network


@dataclass
class FluxParams:
    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: list
    theta: int
    qkv_bias: bool
    guidance_embed: bool
    flux2 = False


class Flux(Network):
    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
        return self.run(img, img_ids, txt, txt_ids, timesteps, y, guidance)

from dataclasses import dataclass

from stand_in import Network


@dataclass
class Flux2Params:
    in_channels: int
    context_in_dim: int
    hidden_size: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: list
    theta: int
    mlp_ratio: float
    use_guidance_embed: bool
    flux2 = True

    @property
    def guidance_embed(self):
        return self.use_guidance_embed

    @property
    def out_channels(self):
        return self.in_channels


class Flux2(Network):
    def forward(self, x, x_ids, timesteps, ctx, ctx_ids, guidance):
        return self.run(x, x_ids, ctx, ctx_ids, timesteps, None, guidance)

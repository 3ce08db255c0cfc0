"""The configuration of a FLUX 3 transformer, from the names and shapes in its file."""

from collections.abc import Mapping
from pathlib import Path

from flux.errors import UserError
from flux.transformer3 import Flux3Config

ANCHOR3 = "txt_mode_blocks.0.mlp_out.weight"  # a tensor of FLUX 3 alone
HEAD = "txt_mode_blocks.0.norm.query_norm.scale"
SIZES3 = {  # tensors that give the sizes of a transformer, and their numbers of dimensions
    "emb_in.image.weight": 2,
    "txt_in.weight": 2,
    HEAD: 1,
    ANCHOR3: 2,
    "single_blocks.0.q_proj.weight": 2,
}
FLOW_MAP = "ref_time_in.in_layer.weight"  # a flow map's embedding of its target, and nothing else


def config3(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Flux3Config:
    """Return the configuration of tensors whose sizes are complete. UserError for odd sizes."""
    hidden_size, in_channels = shapes["emb_in.image.weight"]
    (head_dim,) = shapes[HEAD]
    mlp_size = shapes[ANCHOR3][1]
    # No tensor holds the axes of RoPE or theta; all released models have one choice.
    if hidden_size % head_dim or head_dim % 8:
        raise UserError(
            f"{path} has sizes of no FLUX 3 transformer: hidden size {hidden_size}, heads of "
            f"{head_dim}."
        )
    return Flux3Config(
        in_channels=in_channels,
        context_dim=shapes["txt_in.weight"][1],
        hidden_size=hidden_size,
        num_heads=hidden_size // head_dim,
        depth=_count(shapes, "txt_mode_blocks."),
        depth_single=_count(shapes, "single_blocks."),
        mlp_ratio=mlp_size / hidden_size,
        axes_dim=(head_dim // 4,) * 4,
        flow_map=FLOW_MAP in shapes,
    )


def _count(names: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(prefix)})

"""A LoRA while it is trained: layers beside those of a frozen network, and the names that they have in a file.

What others have trained, in every layout there is, `lora.py` reads and merges.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import chain

from torch import Tensor, nn

from flux.errors import UserError
from flux.training.distributed import whole
from flux.transformer import Flux
from flux.weights.files import preview
from flux.weights.quantization.linear import QuantizedLinear

LAYERS = {  # of a block -> what diffusers calls its parts, in the order of its rows, in FLUX.1 and in FLUX.2
    "img_attn.qkv": ("attn.to_q attn.to_k attn.to_v", "attn.to_q attn.to_k attn.to_v"),
    "img_attn.proj": ("attn.to_out.0", "attn.to_out.0"),
    "img_mlp.0": ("ff.net.0.proj", "ff.linear_in"),
    "img_mlp.2": ("ff.net.2", "ff.linear_out"),
    "txt_attn.qkv": (
        "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    ),
    "txt_attn.proj": ("attn.to_add_out", "attn.to_add_out"),
    "txt_mlp.0": ("ff_context.net.0.proj", "ff_context.linear_in"),
    "txt_mlp.2": ("ff_context.net.2", "ff_context.linear_out"),
    "linear1": ("attn.to_q attn.to_k attn.to_v proj_mlp", "attn.to_qkv_mlp_proj"),
    "linear2": ("proj_out", "attn.to_out"),
}


class LoRALinear(nn.Module):
    """base(x) + B(A(x)), with B = 0 at first (Hu et al. 2021, arXiv:2106.09685). A and B are float32.

    The base may be quantised, and stays so (Dettmers et al. 2023, arXiv:2305.14314).
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, rank: int):
        super().__init__()
        self.base, device = base, next(chain(base.buffers(), base.parameters())).device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base.differentiable if isinstance(self.base, QuantizedLinear) else self.base
        return base(x) + self.lora_B(self.lora_A(x))


def add_lora(network: Flux, rank: int, targets: Sequence[str] = ("*",)) -> list[str]:
    """Freeze the network, and put a LoRALinear in place of each Linear of attention and MLP that a pattern names: the paths."""
    network.requires_grad_(False)
    linears = [
        path
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear | QuantizedLinear)
    ]
    able = [path for path in linears if _layer(path) in LAYERS]
    for pattern in targets:
        if not any(fnmatchcase(path, pattern) for path in able):
            raise UserError(
                f"--targets {pattern}: none of the {len(able)} layers to train ({preview(able)}) has such "
                "a name; use * for any part of one"
            )
    paths = [path for path in able if any(fnmatchcase(path, pattern) for pattern in targets)]
    for path in paths:
        network.set_submodule(path, LoRALinear(network.get_submodule(path), rank))
    return paths


def _layer(path: str) -> str:
    """double_blocks.3.img_attn.qkv -> img_attn.qkv"""
    return path.split(".", 2)[-1] if path.startswith(("double_blocks.", "single_blocks.")) else ""


def lora_tensors(network: Flux) -> dict[str, Tensor]:
    """What was added, by the names of diffusers, which every loader of FLUX LoRAs knows.

    Where a layer of ours is several of theirs, each has a copy of A, and its rows of B.
    """
    tensors, width = {}, network.config.hidden_size
    for path, layer in network.named_modules():
        if isinstance(layer, LoRALinear):
            blocks, number, name = path.split(".", 2)
            theirs = LAYERS[name][network.config.shared_modulation].split()
            rows = [width] * (len(theirs) - 1)
            a, b = whole(layer.lora_A.weight), whole(layer.lora_B.weight)
            before = f"transformer.{'single_' if blocks == 'single_blocks' else ''}transformer_blocks.{number}"
            for name, rows_of_b in zip(theirs, b.split([*rows, len(b) - sum(rows)]), strict=True):
                tensors[f"{before}.{name}.lora_A.weight"] = (
                    a.clone()
                )  # no two names in a file may share memory
                tensors[f"{before}.{name}.lora_B.weight"] = rows_of_b.clone()
    return tensors

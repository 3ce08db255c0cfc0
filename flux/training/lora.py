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
from flux.weights.diffusers_names import diffusers_layer, split_block
from flux.weights.files import preview
from flux.weights.quantization.linear import QuantizedLinear

TRAINABLE = {  # layers of a block that get a LoRA
    "img_attn.qkv",
    "img_attn.proj",
    "img_mlp.0",
    "img_mlp.2",
    "txt_attn.qkv",
    "txt_attn.proj",
    "txt_mlp.0",
    "txt_mlp.2",
    "linear1",
    "linear2",
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
    able = [path for path in linears if split_block(path)[2] in TRAINABLE]
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


def lora_tensors(network: Flux) -> dict[str, Tensor]:
    """What was added, by the names of diffusers, which every loader of FLUX LoRAs knows.

    Where a layer of ours is several of theirs, each has a copy of A, and its rows of B.
    """
    tensors, c = {}, network.config
    for path, layer in network.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        a, b = whole(layer.lora_A.weight), whole(layer.lora_B.weight)
        for part in diffusers_layer(path, c.shared_modulation, c.hidden_size, len(b)):
            ((start, stop),) = part.rows
            # cloned: no two tensors in a file may share memory
            tensors[f"transformer.{part.name}.lora_A.weight"] = a.clone()
            tensors[f"transformer.{part.name}.lora_B.weight"] = b[start:stop].clone()
    return tensors

"""A LoRA during training: layers next to those of a frozen network, and their names in a file.

`flux.lora` reads and merges the files of LoRAs, in all published layouts.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import cast

from torch import Tensor, nn

from flux.errors import UserError
from flux.training.distributed import full_tensor
from flux.training.networks import Network, gets_lora
from flux.transformer3 import Flux3
from flux.weights.diffusers_names import diffusers_layer
from flux.weights.files import preview
from flux.weights.quantization.linear import QuantizedLinear


class LoRALinear(nn.Module):
    """base(x) + B(A(x)), with B = 0 at first (Hu et al. 2021, arXiv:2106.09685). A, B: float32.

    A quantized base stays quantized, as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314).
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, rank: int):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        device = next(chain(base.buffers(), base.parameters())).device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base.differentiable if isinstance(self.base, QuantizedLinear) else self.base
        return base(x) + self.lora_B(self.lora_A(x))


def add_lora(
    network: Network, rank: int, target_modules: Sequence[str] = ("*",), references: bool = True
) -> list[str]:
    """Freeze the network and wrap its attention and MLP layers in LoRALinear; return their paths.

    `target_modules` are patterns of paths, such as "*attn.qkv". Without `references`, no layer gets
    a LoRA that only they reach. UserError if a pattern matches nothing, or if `rank` is larger than
    a side of a matrix.
    """
    network.requires_grad_(False)
    linears = [
        path
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear | QuantizedLinear)
    ]
    trainable = [path for path in linears if gets_lora(network, path, references)]
    paths = [p for p in trainable if any(fnmatchcase(p, pattern) for pattern in target_modules)]
    for pattern in target_modules:
        if not any(fnmatchcase(path, pattern) for path in trainable):
            raise UserError(
                f"target_modules: {pattern} matches none of the {len(trainable)} trainable layers "
                f"({preview(trainable)}). Use * for any part of a name."
            )
    sides = {
        path: min(linear.in_features, linear.out_features)
        for path, linear in network.named_modules()
        if path in set(paths) and isinstance(linear, nn.Linear | QuantizedLinear)
    }
    smallest = min(sides, key=sides.__getitem__)
    if rank > sides[smallest]:
        raise UserError(
            f"rank: must be at most {sides[smallest]}, the smaller side of {smallest} (got {rank})"
        )
    for path in paths:
        base = cast(nn.Linear | QuantizedLinear, network.get_submodule(path))
        network.set_submodule(path, LoRALinear(base, rank))
    return paths


def lora_state_dict(network: Network) -> dict[str, Tensor]:
    """Return the trained factors under diffusers' names, which all loaders of FLUX LoRAs know.

    Where one of our layers is several of diffusers', each of these gets a copy of A and its rows
    of B. FLUX 3 gets Black Forest Labs' names, as in LoRAs for ComfyUI; diffusers reads them, too.
    """
    tensors: dict[str, Tensor] = {}
    for path, layer in network.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        a, b = full_tensor(layer.lora_A.weight), full_tensor(layer.lora_B.weight)
        if isinstance(network, Flux3):
            tensors[f"diffusion_model.{path}.lora_A.weight"] = a
            tensors[f"diffusion_model.{path}.lora_B.weight"] = b
            continue
        c = network.config
        for part in diffusers_layer(path, c.shared_modulation, c.hidden_size, len(b)):
            ((start, stop),) = part.rows
            # cloned, because safetensors refuses tensors that share memory
            tensors[f"transformer.{part.name}.lora_A.weight"] = a.clone()
            tensors[f"transformer.{part.name}.lora_B.weight"] = b[start:stop].clone()
    return tensors

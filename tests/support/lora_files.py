"""LoRA files for tests."""

from pathlib import Path

import torch
from support.weight_files import saved
from torch import Tensor, nn

from flux.transformer import Flux


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    """Return normal numbers that depend on the shape and the seed only."""
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def control_lora(path: Path, network: Flux) -> Path:
    """Write a control LoRA in the layout of FLUX.1-Canny-dev-lora.

    A and B with a bias for every Linear, `img_in` of twice the channels, new scales of all norms.
    """
    tensors = {}
    for i, (name, layer) in enumerate(network.named_modules()):
        if isinstance(layer, nn.Linear):
            columns = layer.in_features * (2 if name == "img_in" else 1)
            rows = layer.out_features
            rank = min(16, columns, rows)
            down = random(rank, columns, seed=i, size=columns**-0.5)
            up = random(rows, rank, seed=i + 1, size=0.3 * rank**-0.5)
            tensors[f"{name}.lora_A.weight"] = down
            tensors[f"{name}.lora_B.weight"] = up
            tensors[f"{name}.lora_B.bias"] = random(rows, seed=i + 2, size=0.1)
        elif name.endswith("_norm"):
            tensors[f"{name}.scale"] = 1 + random(len(layer.scale), seed=i, size=0.3)
    return saved(path, tensors)

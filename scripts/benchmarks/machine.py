"""The device of a check, and the sizes that suit it: a GPU, or a CPU for a dry run."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.count import GPUS
from benchmarks.timing import by_turns

BF16, FLOAT32 = torch.bfloat16, torch.float32


class Machine:
    """The device, and the sizes that suit it."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.name = "cpu" if dry else torch.cuda.get_device_name()
        known = [gpu for name, gpu in GPUS.items() if name in self.name]
        self.gpu = known[0] if known else GPUS["H200"]
        self.side = 64 if dry else 1024
        self.rounds = 1 if dry else 3

    def size(self, number: int) -> int:
        return max(16, number // 64 // 16 * 16) if self.dry else number

    def random(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def seconds(self, function: Callable[[], object]) -> float:
        with torch.inference_mode():
            return by_turns([function], self.rounds, 1e-4 if self.dry else 0.05)[0]

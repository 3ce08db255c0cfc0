"""Read the files of tests/golden."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flux.parity.reference import fingerprint
from flux.weights.files import read_header

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def golden(name: str, *modules: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a file by kind: "in", "out" and "file".

    Fail if the file was made with other weights than those of `modules`.
    """
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    names = [tensor for module in modules for tensor in module.state_dict()]
    before, now = tensors.pop("fingerprint"), fingerprint(*modules)
    for tensor, a, b in zip(names, before, now, strict=True):
        assert abs(a - b) <= 1e-5, (
            f"torch {torch.__version__} draws other random weights for {tensor} than torch "
            f"{read_header(path)[1]['torch']} did for {path.name}. Run scripts/dev/golden.py"
        )
    kinds: dict[str, dict[str, Tensor]] = {"in": {}, "out": {}, "file": {}}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        kinds[kind][rest] = tensor
    return kinds

"""Files of a training run: tensors written atomically, and optimizer states as named tensors."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flux.errors import UserError, WriteError
from flux.training.distributed import distribute_like, full_tensor, rank
from flux.weights.files import read_header


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file. UserError if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        read_header(path)  # raises an error that says what is wrong with the file
        raise UserError(f"{path}: cannot be read ({error})") from error


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically: `path` holds the old file or the new file at any time.

    All processes must call this function; the first one writes. WriteError if the disk is full or
    the folder is not writable.
    """
    if rank() > 0:
        for tensor in tensors.values():
            full_tensor(tensor.detach())  # the first process gathers every tensor
        return
    tensors = {name: full_tensor(x.detach()).cpu().contiguous() for name, x in tensors.items()}
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # the user's default; save_file creates private files
        save_file(tensors, unfinished, metadata)
        unfinished.chmod(mode)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        forbidden = isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError)
        fix = "Check the folder and its permissions." if forbidden else "Make room on its disk."
        raise WriteError(
            f"{path}: cannot be written ({error}); the old file is kept. {fix}"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete the files that a killed process left half written in `folder`."""
    for unfinished in folder.glob(".*.safetensors.*.part"):
        unfinished.unlink(missing_ok=True)


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without the prefix."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the optimizers' state as {"NUMBER.NAME": tensor}, NUMBER counting all parameters."""
    tensors = {}
    for number, (optimizer, p) in enumerate(_parameters(optimizers)):
        for name, value in optimizer.state.get(p, {}).items():
            value = torch.as_tensor(value)
            if name.startswith("qmap"):  # one tensor for all parameters of bitsandbytes' AdamW
                value = value.clone()  # safetensors refuses tensors that share memory
            tensors[f"{number}.{name}"] = value
    return tensors


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put back the state that `optimizer_tensors` returned."""
    parameters = _parameters(optimizers)
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        optimizer, p = parameters[int(number)]
        if value.shape == p.shape:
            optimizer.state[p][name] = distribute_like(value, p)
        elif value.ndim:
            optimizer.state[p][name] = value.to(p.device)
        elif value.is_floating_point():
            optimizer.state[p][name] = value
        else:
            optimizer.state[p][name] = value.item()  # bitsandbytes' step is a Python integer


def _parameters(
    optimizers: Sequence[torch.optim.Optimizer],
) -> list[tuple[torch.optim.Optimizer, Tensor]]:
    return [
        (optimizer, p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]

"""Files of a training run: tensors written atomically and read back strictly; optimizer states."""

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flux.atomic_files import remove_leftovers, write_atomically
from flux.errors import UserError, WriteError
from flux.training.distributed import distribute_like, full_tensor, rank
from flux.weights.files import TensorInfo, preview, read_header

DTYPES = {  # of what training writes, and safetensors' names for them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
CHECKSUM = "sha256"  # in the metadata of files that are read back
ADVICE = re.compile(  # of `read_header`, which reads files that others publish
    r"(; (download it again|get it again|get it as safetensors)|\. Name a safetensors file)\.$"
)
NEVER_NEGATIVE = ("exp_avg_sq", "absmax1", "absmax2")  # states of optimizers


def read_own_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the header of a file that training wrote. The text of a UserError has no advice."""
    try:
        return read_header(path)
    except UserError as error:
        raise UserError(ADVICE.sub(".", str(error))) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file. UserError if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        read_own_header(path)  # raises an error that says what is wrong with the file
        raise UserError(f"{path}: cannot be read ({error})") from error


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    checksum: bool = False,
) -> None:
    """Write a safetensors file atomically: `path` holds the old file or the new file at any time.

    `checksum`: add the hash of the tensors to the metadata, for `check_tensors`.
    All processes must call this function; the first one writes. WriteError if the disk is full or
    the folder is not writable.
    """
    if rank() > 0:
        for tensor in tensors.values():
            full_tensor(tensor.detach())  # the first process gathers every tensor
        return
    tensors = {name: full_tensor(x.detach()).cpu().contiguous() for name, x in tensors.items()}
    metadata = dict(metadata or {})
    if checksum:
        metadata[CHECKSUM] = tensors_sha256(tensors)
    try:
        with write_atomically(path, wait=True) as unfinished:
            save_file(tensors, unfinished, metadata or None)
    except (OSError, SafetensorError) as error:
        forbidden = isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError)
        fix = "Check the folder and its permissions." if forbidden else "Make room on its disk."
        raise WriteError(
            f"{path}: cannot be written ({error}); the old file is kept. {fix}"
        ) from None


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left in `folder`, and nothing that a living one writes.

    Older versions wrote into the folder itself. Their files count as left after an hour.
    """
    remove_leftovers(folder)
    for pattern in (".*.safetensors.*.part", ".tmp??????"):  # ours, and safetensors'
        for path in folder.glob(pattern):
            with suppress(OSError):
                if path.is_file() and time.time() - path.stat().st_mtime > 3600:
                    path.unlink()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, dtypes, shapes and values, whatever their order."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(repr((name, DTYPES[x.dtype], tuple(x.shape))).encode())
        digest.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- checks


def check_header(
    path: Path, found: Mapping[str, TensorInfo], expected: Mapping[str, Tensor]
) -> None:
    """Raise UserError unless a file has exactly the names, dtypes and shapes of `expected`."""
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    faults = [f"lacks {preview(missing)}"] if missing else []
    faults += [f"has {preview([f'{name!r:.80}' for name in unknown])}"] if unknown else []
    for name, x in expected.items():
        if name not in found:
            continue
        ours, theirs = (DTYPES[x.dtype], tuple(x.shape)), found[name][:2]
        if ours != theirs:
            shapes = f"{theirs[0]} {theirs[1]!s:.80}, expected {ours[0]} {ours[1]}"
            faults.append(f"has {name} of another dtype or shape (got {shapes})")
    if faults:
        raise UserError(f"{path}: does not fit this run: it {preview(faults, 2)}.")


def check_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise UserError if a value is not finite or impossible, or differs from the checksum."""
    for name, x in tensors.items():
        if not is_finite(x):
            raise UserError(f"{path}: is damaged: {name} has values that are not finite.")
        if name.endswith(NEVER_NEGATIVE) and (x < 0).any():
            raise UserError(f"{path}: is damaged: {name} has negative values.")
    if CHECKSUM in metadata and metadata[CHECKSUM] != tensors_sha256(tensors):
        raise UserError(f"{path}: is damaged: its tensors differ from its checksum.")


def is_finite(x: Tensor) -> bool:
    """Return whether all values are finite. Integers are."""
    return not x.is_floating_point() or bool(x.isfinite().all())


# ------------------------------------------------------------------------- prefixes and optimizers


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


@torch.no_grad()
def initialize_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let optimizers make their state, by a step of rate 0 along gradients of 0."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put back the state that `optimizer_tensors` returned, over a state of the same names."""
    parameters = _parameters(optimizers)
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        optimizer, p = parameters[int(number)]
        before = optimizer.state[p][name]
        if isinstance(before, Tensor):
            optimizer.state[p][name] = distribute_like(value, before)
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

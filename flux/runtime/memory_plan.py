"""Plan what is in device memory when, before anything is loaded; or refuse, with numbers.

The stages run one after another: encode the prompt, run the transformer, decode the latents.

    offload="none"    the weights of all stages stay on the device
    offload="model"   the weights of one stage at a time
    offload="block"   the same; of a stage that does not fit, some blocks stay on the device and
                      the others are streamed, one after another (streaming.py)

A GB is 10^9 bytes. On the CPU, mapped weights are pages of their file and take no other memory.
On Apple's GPUs, device and host share one memory.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from flux.configs import ModelSpec
from flux.errors import UserError
from flux.runtime.activation_memory import Workload, activations
from flux.runtime.devices import FreeMemory
from flux.runtime.options import OFFLOAD_MODES, Offload, check_max_vram
from flux.runtime.streaming import MIN_STREAMED, NUM_BUFFERS
from flux.weights.quantization import GGUFEmbedding

RESERVED = {"cuda": 600_000_000, "mps": 600_000_000, "cpu": 0}  # library workspaces, rounding
GB = 1_000_000_000


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of the weights of one stage, in the dtype or quantized format they are held in."""

    fixed: int  # on the device as long as the stage runs
    blocks: tuple[int, ...] = ()  # the streamable bytes of each block
    mapped: int = 0  # how many of these bytes are pages of a file on the CPU
    scratch: int = 0  # bytes to dequantize the largest matrix
    merging: int = 0  # bytes to merge LoRAs into the largest matrix

    @property
    def total(self) -> int:
        return self.fixed + sum(self.blocks)

    def __add__(self, other: "WeightSizes") -> "WeightSizes":
        """Return the sizes of two modules in one stage, such as T5 and CLIP."""
        return WeightSizes(
            self.fixed + other.fixed,
            self.blocks + other.blocks,
            self.mapped + other.mapped,
            max(self.scratch, other.scratch),
            max(self.merging, other.merging),
        )


@dataclass(frozen=True)
class MemoryPlan:
    offload: Offload
    resident: Mapping[
        str, int | None
    ]  # stage -> bytes of blocks that stay on the device; None: all
    peak: int  # bytes on the device at one time, at most
    message: str  # one line


class Required(NamedTuple):
    """Required memory in bytes."""

    device: int
    host: int


# ------------------------------------------------------------------ planning


def plan_memory(
    spec: ModelSpec,
    weights: Mapping[str, WeightSizes],
    work: Workload,
    free: FreeMemory,
    offload: Offload | None = None,
    max_vram: float | None = None,
    quantizable: bool = True,
    dividable: bool = False,
) -> MemoryPlan:
    """Return the plan of the requested mode, by default of the fastest mode that fits.

    `weights`: of each stage, in order. The stages "text encoder", "transformer", "autoencoder" and
    "image encoder" have activations. `max_vram`: GB of the device to use at most; without it,
    offload="block" takes as little as possible. `quantizable`: whether quantizing could still make
    the transformer smaller. `dividable`: whether more processes could. UserError, which names the
    options that would help, if nothing fits.
    """
    check_max_vram(max_vram)
    if max_vram is not None:
        free = free._replace(device=min(free.device, max_vram * GB))
    minimal = offload == "block" and max_vram is None
    active = activations(spec, work, free.device_type)
    for mode in OFFLOAD_MODES if offload is None else (offload,):
        plan = plan_mode(weights, active, free, mode, minimal)
        if plan is not None:
            return plan
    raise UserError(_refusal(spec, weights, work, free, offload, max_vram, quantizable, dividable))


def plan_mode(
    weights: Mapping[str, WeightSizes],
    active: Mapping[str, int],
    free: FreeMemory,
    offload: Offload,
    minimal: bool = False,
) -> MemoryPlan | None:
    """Return the plan for one offload mode; None if the mode does not fit.

    As many blocks stay resident as fit, or none if `minimal`. `active`: stage -> activations.
    """
    resident: dict[str, int | None] = dict.fromkeys(weights)
    if offload == "block":
        for stage, sizes in weights.items():
            resident[stage] = _resident_bytes(sizes, active.get(stage, 0), free, minimal)
    peak = peak_required(weights, active, free.device_type, resident, all_loaded=offload == "none")
    if peak.device > free.device or peak.host > free.host:
        return None
    message = _message(weights, resident, offload, peak, free)
    return MemoryPlan(offload, resident, peak.device, message)


def _resident_bytes(sizes: WeightSizes, active: int, free: FreeMemory, minimal: bool) -> int | None:
    """Return how many bytes of a stage's blocks stay on the device; None if nothing is streamed."""
    loaded = required(sizes, active, free.device_type)
    if not sizes.blocks or (loaded.device <= free.device and not minimal):
        return None
    if minimal or free.device_type == "cpu":
        return 0
    return max(0, int(free.device) - required(sizes, active, free.device_type, 0).device)


def required(
    sizes: WeightSizes, active: int, device_type: str, resident: int | None = None
) -> Required:
    """Return the memory for one stage.

    `resident` bytes of the blocks stay on the device and the rest is streamed. None: no streaming.
    """
    unmapped = sizes.total - sizes.mapped
    working = active + sizes.scratch + RESERVED[device_type]
    if resident is None:
        held = unmapped if device_type == "cpu" else sizes.total
        return Required(held + max(working, sizes.merging + RESERVED[device_type]), 0)
    buffers = NUM_BUFFERS * max(sizes.blocks)
    held = 0 if device_type == "cpu" else sizes.fixed + resident
    device = held + buffers + working
    # pinned buffers; weights that were cast or merged
    host = max(buffers, sizes.merging) + unmapped
    return Required(device, host) if device_type == "cuda" else Required(device + host, 0)


def peak_required(
    weights: Mapping[str, WeightSizes],
    active: Mapping[str, int],
    device_type: str,
    resident: Mapping[str, int | None],
    all_loaded: bool,
) -> Required:
    """Return the maximum over the stages; if `all_loaded`, next to the weights of the others."""
    held = dict.fromkeys(weights, 0)
    if all_loaded:
        for stage, sizes in weights.items():
            held[stage] = sizes.total - (sizes.mapped if device_type == "cpu" else 0)
    device, host = 0, 0
    for stage, sizes in weights.items():
        needs = required(sizes, active.get(stage, 0), device_type, resident[stage])
        others = sum(held.values()) - held[stage]
        device, host = max(device, needs.device + others), max(host, needs.host)
    return Required(device, host)


def minimum(
    weights: Mapping[str, WeightSizes],
    active: Mapping[str, int],
    device_type: str,
    offload: Offload | None,
) -> Required:
    """Return the least memory that suffices in a mode; in any mode if `offload` is None."""
    if offload == "none":
        loaded: dict[str, int | None] = dict.fromkeys(weights)
        return peak_required(weights, active, device_type, loaded, all_loaded=True)
    device, host = 0, 0
    for stage, sizes in weights.items():
        least = required(sizes, active.get(stage, 0), device_type)
        if offload != "model" and sizes.blocks:
            least = min(least, required(sizes, active.get(stage, 0), device_type, 0))
        device, host = max(device, least.device), max(host, least.host)
    return Required(device, host)


def needs_shards(whole: WeightSizes, shard: WeightSizes, active: int, free: FreeMemory) -> str:
    """Return why a stage needs weights sharded over processes, with numbers; "" if it does not.

    Whole weights that do not fit would be streamed, all of them to every process. `shard`: what one
    process would hold. `active`: the stage's activations.
    """
    needed, sharded = (required(sizes, active, free.device_type).device for sizes in (whole, shard))
    if needed <= free.device or sharded > free.device:
        return ""
    return f"{gb(needed)} GB whole, {gb(sharded)} GB sharded, {gb(free.device)} GB are free"


# ------------------------------------------------------------------ messages


def _message(
    weights: Mapping[str, WeightSizes],
    resident: Mapping[str, int | None],
    offload: Offload,
    peak: Required,
    free: FreeMemory,
) -> str:
    parts = []
    for stage, sizes in weights.items():
        part, stays = f"{stage} {gb(sizes.total)} GB", resident[stage]
        if stays is not None:
            part += f" of which {gb(sizes.total - sizes.fixed - stays)} GB are streamed"
        parts.append(part)
    stages = ", ".join(parts) + ", all at once" if offload == "none" else ", then ".join(parts)
    mapped = sum(sizes.mapped for sizes in weights.values())
    if free.device_type == "cpu" and mapped:
        stages += f", of which {gb(mapped)} GB are mapped from the files"
    return f"{stages}; at most {gb(peak.device)} of {gb(free.device)} GB"


def _refusal(
    spec: ModelSpec,
    weights: Mapping[str, WeightSizes],
    work: Workload,
    free: FreeMemory,
    offload: Offload | None,
    max_vram: float | None,
    quantizable: bool,
    dividable: bool,
) -> str:
    """Return what is missing, and which options would help."""

    def fits(work: Workload, weights: Mapping[str, WeightSizes] = weights) -> bool:
        active = activations(spec, work, free.device_type)
        least = minimum(weights, active, free.device_type, offload)
        return least.device <= free.device and least.host <= free.host

    active = activations(spec, work, free.device_type)
    least = minimum(weights, active, free.device_type, offload)
    subject = f"{spec.name} at {work.width}x{work.height}"
    if work.batch > 1:
        subject += f", {work.batch} at a time,"
    if offload:
        subject += f' with `offload="{offload}"`'
    if least.device <= free.device:
        return (
            f"{subject} needs {gb(least.host)} GB of the host's memory, and {gb(free.host)} GB are "
            "free. Close other programs, or use a file in the dtype of the computation."
        )
    advice = []
    for mode in OFFLOAD_MODES[1:]:
        if offload and plan_mode(weights, active, free, mode, minimal=True):
            advice.append(f'`offload="{mode}"`')
    if work.batch > 1 and fits(replace(work, batch=1)):
        advice.append("a smaller `num_images`")
    if work.width * work.height > 512 * 512 and fits(replace(work, width=512, height=512, batch=1)):
        advice.append("a smaller `width` and `height`")
    if work.tile is None and fits(replace(work, tile=1024)):
        advice.append("`vae_tile=1024`")
    if quantizable:
        quantized = _halved(weights["transformer"])
        if fits(work, {**weights, "transformer": quantized}):
            advice.append('`quantize="fp8"` or an -fp8 file')
    if dividable and fits(work, {**weights, "transformer": WeightSizes(0)}):
        advice.append("more processes")
    help = f"Use {' or '.join(advice)}." if advice else "No option helps. Use a smaller model."
    needs = f"needs at least {gb(least.device, math.ceil)} GB"
    if max_vram is not None and free.device == max_vram * GB:
        return f"max_vram: {subject} {needs} (got {max_vram:g}). {help}"
    return f"{subject} {needs}, and {gb(free.device)} GB are free. {help}"


def _halved(sizes: WeightSizes) -> WeightSizes:
    """Return the sizes with blocks in 8 bits.

    A block's largest matrix, dequantized in float32, takes at most 1.5 times the block's bfloat16.
    """
    blocks = tuple(size // 2 for size in sizes.blocks)
    return replace(sizes, blocks=blocks, scratch=3 * max(sizes.blocks, default=0) // 2)


def gb(size: float, rounding: Callable[[float], int] = round) -> str:
    """Return bytes as gigabytes with one decimal."""
    if rounding is round and 0 < size < GB / 10:  # the toys
        return f"{size / GB:.2g}"
    return "unlimited" if size == math.inf else f"{rounding(size / GB * 10) / 10:.1f}"


# ------------------------------------------------------------------ sizes


def measure_weights(
    module: nn.Module,
    lists: Sequence[str],
    dtype: torch.dtype,
    replaced: Container[str] | None = (),
) -> WeightSizes:
    """Return the sizes of a module on the meta device whose floats will be cast to `dtype`.

    The module has its files' dtypes. `lists`: paths of its lists of blocks, as for
    `streaming.stream`. `replaced`: paths of the submodules whose weights will not be those of the
    files, whatever their dtype; None: all.
    """

    def tensor_sizes(module: nn.Module) -> list[int]:
        sizes = []
        for parameter in module.parameters():
            cast = parameter.is_floating_point()
            sizes.append(parameter.numel() * (dtype if cast else parameter.dtype).itemsize)
        for buffer in module.buffers():  # quantized weights and their scales
            sizes.append(buffer.nbytes)
        return sizes

    blocks = []
    for path in lists:
        for block in module.get_submodule(path).children():
            blocks.append(sum(size for size in tensor_sizes(block) if size >= MIN_STREAMED))
    fixed = sum(tensor_sizes(module)) - sum(blocks)
    largest = 0
    for layer in module.modules():
        if hasattr(layer, "dequantize") and not isinstance(layer, GGUFEmbedding):  # a row at a time
            largest = max(largest, matrix_size(layer))
    # float32 before and after the scale; or after the scale, and rounded
    scratch = largest * 8
    return WeightSizes(fixed, tuple(blocks), mapped_bytes(module, dtype, replaced), scratch)


def matrix_size(layer: Any) -> int:
    """Return the number of weights of a Linear; 0 for other layers."""
    return layer.in_features * layer.out_features if hasattr(layer, "in_features") else 0


def mapped_bytes(module: nn.Module, dtype: torch.dtype, replaced: Container[str] | None) -> int:
    """Return how many bytes of the weights are, on a CPU, pages of the files.

    The arguments are those of `measure_weights`.
    """
    if replaced is None:
        return 0
    total = 0
    for path, part in module.named_modules():
        if path not in replaced:
            for parameter in part.parameters(recurse=False):
                total += parameter.nbytes if parameter.dtype == dtype else 0
            total += sum(buffer.nbytes for buffer in part.buffers(recurse=False))
    return total

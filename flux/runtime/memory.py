"""Which device, which dtype, and what is on the device when: told before anything is loaded, or refused, with numbers.

The work has stages: a prompt is encoded, the transformer runs, latents are decoded. With offload

    none     the weights of all stages stay on the device
    stages   those of one stage at a time
    stream   the same, but of a stage that does not fit, some blocks stay and the others come one after another (`offload`)

A GB is 10^9 bytes throughout. On the CPU, mapped weights are the file's own pages, which take no memory of their own; on
Apple's GPUs, device and host share one memory.
"""

import importlib.util
import math
import os
import shutil
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from flux.configs import FLUX1Text, ModelSpec
from flux.errors import UserError
from flux.runtime.streaming import SMALL

Offload = Literal["none", "stages", "stream"]
OFFLOAD: tuple[Offload, ...] = ("none", "stages", "stream")  # from the fastest to the smallest
SLOTS = 2  # blocks there is room for, where blocks are streamed
RESERVE = {
    "cuda": 600_000_000,
    "mps": 600_000_000,
    "cpu": 0,
}  # workspaces of the libraries, and what allocators round up
GB = 1_000_000_000


class Weights(NamedTuple):
    """Bytes of the networks of one stage, as they are held: in their dtype, or quantised."""

    fixed: int  # on the device as long as the stage lasts
    blocks: tuple[int, ...] = ()  # what of each block can be streamed
    mapped: int = 0  # how much of all that is the file's own pages while it is on the CPU
    scratch: int = 0  # what it takes to make the largest quantised matrix whole, when it is used
    merging: int = 0  # what it takes to merge LoRAs into the largest matrix, when it is loaded

    @property
    def total(self) -> int:
        return self.fixed + sum(self.blocks)

    def beside(self, other: "Weights") -> "Weights":
        """Of two networks in one stage, T5 and CLIP for example."""
        largest = max(self.scratch, other.scratch), max(self.merging, other.merging)
        return Weights(
            self.fixed + other.fixed,
            self.blocks + other.blocks,
            self.mapped + other.mapped,
            *largest,
        )


class Room(NamedTuple):
    """Free memory, in bytes."""

    kind: str  # "cuda", "mps" or "cpu"
    device: float
    host: float = math.inf  # of no account where the device has no memory of its own


@dataclass(frozen=True)
class Work:
    """What is to be made, as far as it decides how much memory that takes."""

    width: int
    height: int
    batch: int = 1  # pictures that go through the transformer at once
    references: int = 0  # tokens of input pictures, beside those of the picture
    extra_text: int = 0  # text tokens that pictures became
    steps: int = 1  # for which modulations are tabulated
    itemsize: int = 2  # bytes of an activation
    tile: int | None = None  # pixels: the side of the tiles that the picture is decoded in
    given: int = 0  # pixels of the largest picture that is encoded

    def within(self, other: "Work") -> bool:
        """Whether no stage after the encoding of pictures takes more memory than for the other."""
        sizes = [
            (w.width * w.height, w.batch, w.references, w.extra_text, w.steps)
            for w in (self, other)
        ]
        return all(mine <= others for mine, others in zip(*sizes))


@dataclass(frozen=True)
class Plan:
    offload: Offload
    resident: Mapping[
        str, int | None
    ]  # of each stage: how many bytes of blocks stay on the device; None: all
    peak: int  # the most that is on the device at a time
    message: str  # one line


class Need(NamedTuple):
    device: int
    host: int


# ---------------------------------------------------------------------------------------------------------- planning


def plan(
    spec: ModelSpec,
    weights: Mapping[str, Weights],
    work: Work,
    room: Room,
    offload: Offload | None = None,
    vram: float | None = None,
    quantizable: bool = True,
) -> Plan:
    """How a model is held while it makes a picture: the fastest way that fits, or the one that is asked for by `offload`.

    `weights`: of each stage, in order; those named "text encoder", "transformer", "autoencoder" and "picture encoder" have
    activations. `vram`: GB that may be used of the device. `offload="stream"` without it takes as little as possible.
    `quantizable`: whether --quantize could still make the transformer smaller. UserError, which names what would help, if it
    does not fit.
    """
    check_vram(vram)
    room = room if vram is None else room._replace(device=min(room.device, vram * GB))
    spare = offload == "stream" and vram is None
    active = activations(spec, work, room.kind)
    for mode in OFFLOAD if offload is None else (offload,):
        if found := fit(weights, active, room, mode, spare):
            return found
    raise UserError(_refusal(spec, weights, work, room, offload, vram, quantizable))


def check_vram(vram: float | None) -> None:
    if vram is not None and not 0 < vram < math.inf:
        raise UserError(
            f"--vram {vram:g}: give the gigabytes of device memory that may be used, such as 8"
        )


def fit(
    weights: Mapping[str, Weights],
    active: Mapping[str, int],
    room: Room,
    offload: Offload,
    spare: bool = False,
) -> Plan | None:
    """The plan for one way of holding the weights, with as many blocks resident as there is room for; None if it does not fit.

    `spare`: with none, to take as little as possible.
    """
    resident: dict[str, int | None] = dict.fromkeys(weights)
    if offload == "stream":
        for stage, held in weights.items():
            whole = need(held, active.get(stage, 0), room.kind)
            if held.blocks and (spare or whole.device > room.device):
                least = need(held, active.get(stage, 0), room.kind, 0)
                resident[stage] = (
                    0 if spare or room.kind == "cpu" else max(0, int(room.device) - least.device)
                )
    peak = peak_of(weights, active, room.kind, resident, together=offload == "none")
    if peak.device > room.device or peak.host > room.host:
        return None
    return Plan(offload, resident, peak.device, _message(weights, resident, offload, peak, room))


def need(held: Weights, active: int, kind: str, resident: int | None = None) -> Need:
    """Of one stage, of whose blocks `resident` bytes stay on the device and the rest is streamed; None: nothing is streamed."""
    anonymous = held.total - held.mapped
    working = active + held.scratch + RESERVE[kind]
    if resident is None:
        return Need(
            (anonymous if kind == "cpu" else held.total)
            + max(working, held.merging + RESERVE[kind]),
            0,
        )
    slots = SLOTS * max(held.blocks)
    device = (0 if kind == "cpu" else held.fixed + resident) + slots + working
    host = (
        max(slots, held.merging) + anonymous
    )  # the staging, and what a cast or a LoRA has made of the file's pages
    return Need(device, host) if kind == "cuda" else Need(device + host, 0)


def peak_of(
    weights: Mapping[str, Weights],
    active: Mapping[str, int],
    kind: str,
    resident: Mapping[str, int | None],
    together: bool,
) -> Need:
    """The most that is needed at a time: where all weights are held together, the largest stage has the others' beside it."""
    each = {
        stage: need(held, active.get(stage, 0), kind, resident[stage])
        for stage, held in weights.items()
    }
    beside = dict.fromkeys(weights, 0)
    if together:
        sizes = {
            stage: held.total - held.mapped if kind == "cpu" else held.total
            for stage, held in weights.items()
        }
        beside = {stage: sum(sizes.values()) - size for stage, size in sizes.items()}
    return Need(max(each[s].device + beside[s] for s in each), max(each[s].host for s in each))


def floor_of(
    weights: Mapping[str, Weights], active: Mapping[str, int], kind: str, offload: Offload | None
) -> Need:
    """The least that will do."""
    if offload == "none":
        return peak_of(weights, active, kind, dict.fromkeys(weights), together=True)
    whole = {stage: need(held, active.get(stage, 0), kind) for stage, held in weights.items()}
    if offload != "stages":
        for stage, held in weights.items():
            least = need(held, active.get(stage, 0), kind, 0) if held.blocks else whole[stage]
            whole[stage] = min(whole[stage], least)
    return Need(max(n.device for n in whole.values()), max(n.host for n in whole.values()))


# ---------------------------------------------------------------------------------------------------------- words


def _message(
    weights: Mapping[str, Weights],
    resident: Mapping[str, int | None],
    offload: Offload,
    peak: Need,
    room: Room,
) -> str:
    parts = []
    for stage, held in weights.items():
        size, stay = f"{stage} {gb(held.total)} GB", resident[stage]
        parts.append(
            size
            if stay is None
            else f"{size} of which {gb(held.total - held.fixed - stay)} GB are streamed"
        )
    listed = ", ".join(parts) + ", all at once" if offload == "none" else ", then ".join(parts)
    mapped = sum(held.mapped for held in weights.values())
    pages = f", {gb(mapped)} GB of it the files' own pages" if room.kind == "cpu" and mapped else ""
    return f"{listed}{pages}; at most {gb(peak.device)} of {gb(room.device)} GB"


def _refusal(
    spec: ModelSpec,
    weights: Mapping[str, Weights],
    work: Work,
    room: Room,
    offload: Offload | None,
    vram: float | None,
    quantizable: bool,
) -> str:
    """What is missing, and which options would do."""
    active = activations(spec, work, room.kind)
    floor = floor_of(weights, active, room.kind, offload)
    how = f" with --offload {offload}" if offload else ""
    what = f"{spec.name} at {work.width}x{work.height}{f', {work.batch} at a time,' if work.batch > 1 else ''}{how}"
    if floor.device <= room.device:
        return (
            f"{what} needs {gb(floor.host)} GB of the host's memory, and {gb(room.host)} GB are free: close other "
            "programs, or use a file in the dtype that it is used in"
        )
    advice = [
        f"--offload {mode}"
        for mode in OFFLOAD[1:]
        if offload and fit(weights, active, room, mode, spare=True)
    ]
    less = activations(spec, replace(work, width=512, height=512, batch=1), room.kind)
    if work.batch > 1 and _fits(
        weights, activations(spec, replace(work, batch=1), room.kind), room, offload
    ):
        advice.append("a smaller --num-images")
    if work.width * work.height > 512 * 512 and _fits(weights, less, room, offload):
        advice.append("a smaller --width and --height")
    if work.tile is None and _fits(
        weights, activations(spec, replace(work, tile=1024), room.kind), room, offload
    ):
        advice.append("--tile 1024")
    if quantizable and _fits(
        weights | {"transformer": _halved(weights["transformer"])}, active, room, offload
    ):
        advice.append("--quantize fp8 or an -fp8 file")
    limit = f"--vram {vram:g}: {what}" if vram is not None and room.device == vram * GB else what
    free = "" if limit != what else f", and {gb(room.device)} GB are free"
    return f"{limit} needs at least {gb(floor.device, math.ceil)} GB{free}: {_either(advice)}"


def _fits(
    weights: Mapping[str, Weights], active: Mapping[str, int], room: Room, offload: Offload | None
) -> bool:
    floor = floor_of(weights, active, room.kind, offload)
    return floor.device <= room.device and floor.host <= room.host


def _halved(held: Weights) -> Weights:
    """Its blocks in 8 bits; their largest matrix, made whole in float32, takes at most half as much again as a block took."""
    return held._replace(
        blocks=tuple(size // 2 for size in held.blocks),
        scratch=3 * max(held.blocks, default=0) // 2,
    )


def _either(advice: Sequence[str]) -> str:
    return (
        f"use {' or '.join(advice)}"
        if advice
        else "no option makes it so small; use a smaller model"
    )


def gb(size: float, rounded=round) -> str:
    return "unlimited" if size == math.inf else f"{rounded(size / GB * 10) / 10:.1f}"


# ---------------------------------------------------------------------------------------------------------- sizes


def measure(
    network: nn.Module, lists: Sequence[str], dtype: torch.dtype, anew: Container[str] | None = ()
) -> Weights:
    """Of a network on the meta device, with its files' types, whose floats will be of `dtype`; `lists` as `offload.stream`'s.

    `anew`: paths of the modules whose weights will not be the files', whatever their type; None: of all.
    """

    def held(module: nn.Module) -> list[int]:
        parameters = [
            p.numel() * (dtype.itemsize if p.is_floating_point() else p.itemsize)
            for p in module.parameters()
        ]
        return parameters + [
            buffer.nbytes for buffer in module.buffers()
        ]  # quantised weights and their scales

    blocks = [
        sum(size for size in held(block) if size >= SMALL)
        for path in lists
        for block in network.get_submodule(path)
    ]
    total = sum(held(network))
    quantised = [layer for layer in network.modules() if hasattr(layer, "dequantize")]
    largest = max((layer.in_features * layer.out_features for layer in quantised), default=0)
    # in float32 before and after its scale; or after, and rounded
    return Weights(
        total - sum(blocks), tuple(blocks), mapped_bytes(network, dtype, anew), largest * 8
    )


def mapped_bytes(network: nn.Module, dtype: torch.dtype, anew: Container[str] | None) -> int:
    """How many bytes of its weights are, on a CPU, the files' own pages. Arguments as for `measure`."""
    kept = [
        module for path, module in network.named_modules() if anew is not None and path not in anew
    ]
    floats = sum(
        p.nbytes for module in kept for p in module.parameters(recurse=False) if p.dtype == dtype
    )
    return floats + sum(
        buffer.nbytes for module in kept for buffer in module.buffers(recurse=False)
    )


def activations(spec: ModelSpec, work: Work, kind: str) -> dict[str, int]:
    """Bytes that each stage takes beside its weights, at the most: sums of the largest tensors that are there at once."""
    decoder, pixels = spec.autoencoder, work.width * work.height
    width = decoder.ch_mult[1] * (decoder.decoder_ch or decoder.ch)
    decoded = min(pixels, work.tile**2) if work.tile else pixels
    whole = 12 * pixels if work.tile else 0  # what the tiles are put together in, in float32
    return {
        "text encoder": _text_activations(spec, work),
        "picture encoder": _picture_activations(
            work.given or pixels, decoder.ch, 4, kind
        ),  # always in float32
        "transformer": _transformer_activations(spec, work, kind),
        "autoencoder": _picture_activations(decoded, width, work.itemsize, kind) + whole,
    }


def _transformer_activations(spec: ModelSpec, work: Work, kind: str) -> int:
    c, e = spec.transformer, work.itemsize
    image = (work.width // 16) * (work.height // 16) + work.references
    text = spec.text_length + work.extra_text
    tokens = work.batch * (text + image)
    hidden = tokens * c.hidden_size  # one tensor as wide as the residual stream, in elements
    mlp = (2 if c.gated_mlp else 1) * c.mlp_ratio  # first layer of the MLP, in such tensors
    # a double block turns q and k: x twice; q, k, v of each stream and of both; q and k normed; in float32, q and k five times
    turning = hidden * ((2 + 3 + 3 + 2) * e + 5 * 2 * 4)
    # its MLP: x, q, k, v as above, q and k normed and turned, attention's, whole and in two; what the MLP's layers make
    feeding = hidden * ((2 + 3 + 3 + 2 + 2 + 2 + 2 * mlp) * e + 2 * 4)
    # a single block ends: x twice, linear1's output, q and k, attention's, activation's, both side by side, and linear2's twice
    joining = hidden * (2 + 3 + mlp + 2 + 1 + c.mlp_ratio + 1 + c.mlp_ratio + 2) * e
    given = work.batch * (text * c.context_dim + 2 * image * (c.in_channels + c.out_channels)) * 4
    rope = (text + image) * c.hidden_size // c.num_heads * 2 * 4
    per_step = 9 if c.shared_modulation else 12 * c.depth + 3 * c.depth_single
    table = (2 if spec.cfg else 1) * work.steps * work.batch * (per_step + 3) * c.hidden_size * e
    memories = (
        2 * work.references * c.hidden_size * (c.depth + c.depth_single) * e
        if spec.kv_cached_references
        else 0
    )
    scores = (
        2 * work.batch * c.num_heads * (text + image) ** 2 * e if kind == "mps" else 0
    )  # no fused attention
    return int(1.1 * max(turning, feeding, joining)) + given + rope + table + memories + scores


def _picture_activations(pixels: int, width: int, itemsize: int, kind: str) -> int:
    """Of an autoencoder, one picture at a time: five maps of `width` channels and full size; or the attention in its middle."""
    middle = (
        2 * (pixels // 64) ** 2 * itemsize if kind == "mps" else 0
    )  # one head, each place with each
    return max(5 * width * pixels * itemsize, middle)


def _text_activations(spec: ModelSpec, work: Work) -> int:
    """Of one prompt at a time: ten tensors as wide as the residual stream, three of the MLP; scores, since there is a mask."""
    c = spec.text.t5 if isinstance(spec.text, FLUX1Text) else spec.text.model
    length = spec.text_length
    kept = 0 if isinstance(spec.text, FLUX1Text) else 2 * c.features
    streams = (
        length
        * (10 * max(c.hidden_size, c.num_heads * c.head_dim) + 3 * c.mlp_size + kept)
        * work.itemsize
    )
    return streams + 2 * c.num_heads * length**2 * 4


# ---------------------------------------------------------------------------------------------------------- devices


def choose_device(device: str | None) -> torch.device:
    """The device that is asked for, if it is there; else the best that is."""
    if device is None:
        return torch.device(
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        if torch.device(device).type not in RESERVE:
            raise RuntimeError
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        here = [
            "cpu",
            *[f"cuda:{i}" for i in range(torch.cuda.device_count())],
            *["mps"] * torch.backends.mps.is_available(),
        ]
        raise UserError(
            f"--device {device}: there is no such device here; choose from {', '.join(here)}"
        ) from None


def can_compile(device: torch.device) -> bool:
    """Whether there is what torch.compile needs: Triton on a GPU, a C++ compiler on a CPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and any(
        map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))
    )


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32, with a warning: float16 is too narrow for these networks.

    A CPU without its instructions is some ten times slower in bfloat16 than in float32.
    """
    if device.type == "cuda":
        name, able = (
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip,
        )
    elif device.type == "mps":
        name, able = "macOS before version 14", torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        name, able = (
            "this CPU",
            torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        )
    if able:
        return torch.bfloat16
    warnings.warn(
        f"{name} does not compute in bfloat16, and in float16 the networks overflow: float32 is used, which takes "
        "twice the memory; --dtype bfloat16 takes half, and is slow",
        stacklevel=3,
    )
    return torch.float32


def room_on(device: torch.device) -> Room:
    return Room(device.type, free_memory(device), free_memory(torch.device("cpu")))


def free_memory(device: torch.device) -> float:
    """Bytes that weights and activations may take. What PyTorch holds, but does not use, is free as well."""
    if device.type == "cuda":
        held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held - used
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min(_machine_memory(), _container_memory())


def _machine_memory(meminfo: Path = Path("/proc/meminfo")) -> float:
    """What the host can give without swapping; where it does not say, three quarters of all that it has."""
    try:
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return (
            0.75 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if hasattr(os, "sysconf")
            else math.inf
        )


def _container_memory(group: Path = Path("/sys/fs/cgroup")) -> float:
    """What is left below the limit of a container, if there is one. The pages of files can be dropped, and are not counted."""
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(
            0, int(limit) - int(used) + int(pages["active_file"]) + int(pages["inactive_file"])
        )
    except (OSError, KeyError, ValueError):  # "max": there is no limit
        return math.inf

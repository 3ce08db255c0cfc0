"""Training by rectified flow: the loss, the steps, checkpoints, and the memory that they take.

    x_t = (1 - t) · latents + t · noise          loss = |v(x_t, t) - (noise - latents)|²

All that is drawn (order, times, noise, captions that are left out) is a function of the seed and the step, and of nothing
before. So a run that was stopped, by whatever and whenever, goes on bit for bit from three things: its parameters, what its
optimizer keeps, and the number of its step. And processes that share a step need not tell each other what they drew.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flux import sampling
from flux.configs import ModelSpec
from flux.errors import NonFiniteError, UserError, WriteError
from flux.text_encoder import TextFeatures
from flux.training.distributed import mean_of_all, own, part, rank, whole
from flux.training.lora import add_lora
from flux.transformer import Flux, FluxConfig
from flux.weights.files import read_header

# ---------------------------------------------------------------------------------------------------------- the loss


def rectified_flow_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], latents: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """|v(x_t, t) - (noise - latents)|², the mean of it all. Latents and noise (B, C, h, w), t (B,)."""
    x = sampling.scale_noise(latents, noise, rearrange(t, "b -> b 1 1 1"))
    return F.mse_loss(velocity(x, t).float(), noise - latents)


def shifted_times(normal: Tensor, mu: float) -> Tensor:
    """Standard normal numbers -> times: logit-normal (Esser et al. 2024), shifted by mu as the sampler's are.

    The sampler's t -> e^mu / (e^mu + 1/t - 1) adds mu to the logit of t, and the logit of a logit-normal time is normal.
    """
    return torch.sigmoid(normal + mu)


def mu_of(spec: ModelSpec, tokens: int) -> float:
    """The shift with which the sampler makes pictures of so many tokens."""
    shifts = {"linear": sampling.calculate_shift, "empirical": sampling.compute_empirical_mu}
    return shifts[spec.schedule](tokens, spec.steps) if spec.schedule in shifts else 0.0


class Batch(NamedTuple):
    """ImageInputs of one size, with references of one size."""

    latents: Tensor  # (B, C, h, w)
    features: TextFeatures
    references: Tensor | None = None  # (B, R, C)
    reference_ids: Tensor | None = None  # (R, axes)
    channels: Tensor | None = None  # (B, L, C'), beside the latents' own: of Fill, Canny and Depth

    def rows(self, rows: slice, device: torch.device) -> "Batch":
        """Some of the pictures, on a device."""

        def of(x):
            return None if x is None else x[rows].to(device)

        ids = None if self.reference_ids is None else self.reference_ids.to(device)
        features = TextFeatures(*map(of, self.features))
        return Batch(of(self.latents), features, of(self.references), ids, of(self.channels))


def velocity(
    network: Flux,
    batch: Batch,
    guidance: float | Tensor,
    x: Tensor,
    t: Tensor,
    corner: tuple[int, int] = (0, 0),
) -> Tensor:
    """Of latents x (B, C, h, w) at times t (B,), with all else that the batch has; guidance for all, or (B,).

    `corner`: row and column of the first tokens, if the latents are a window of the pictures, and the references too.
    """
    axes, (h, w), (txt, vector) = len(network.config.axes_dim), x.shape[2:], batch.features
    img, img_ids = rearrange(x, "b c h w -> b (h w) c"), sampling.image_ids(h, w, axes).to(x.device)
    if batch.channels is not None:
        img = torch.cat([img, batch.channels], dim=2)
    if batch.references is not None:
        img, img_ids = (
            torch.cat([img, batch.references], dim=1),
            torch.cat([img_ids, batch.reference_ids]),
        )
    img_ids[:, 1:3] += torch.tensor(corner, device=x.device)
    txt_ids = sampling.text_ids(txt.shape[1], axes).to(x.device)
    given = torch.as_tensor(guidance).to(t).expand_as(t) if network.config.guidance else None
    out = network(img, img_ids, txt, txt_ids, t, given, vector)[:, : h * w]  # (B, L, C)
    return rearrange(out, "b (h w) c -> b c h w", h=h)


@contextmanager
def computing(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Matrix products in `dtype`, whatever the parameters are kept in."""
    with attention_on(device), autocast(device.type, dtype):
        yield


def attention_on(device: torch.device) -> AbstractContextManager:
    """On a CPU, the fused attention's backward pass takes longer than all matrix products together."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def autocast(kind: str, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)


def generator(*numbers: int) -> torch.Generator:
    """Of random numbers that are these numbers' own."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# ---------------------------------------------------------------------------------------------------------- the trainer


OPTIMIZERS = ("adamw", "adamw8bit")


def optimizer_of(kind: str) -> type[torch.optim.Optimizer]:
    """AdamW, or the one of bitsandbytes, which keeps most moments in a byte each (Dettmers et al. 2022, arXiv:2110.02861).

    UserError if that is not installed.
    """
    if kind == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "--optimizer adamw8bit is that of bitsandbytes: run `pip install -e '.[adamw8bit]'`, or leave it "
            "out"
        ) from None
    return AdamW8bit


def moments(kind: str, p: Tensor) -> int:
    """The bytes of what it keeps of a parameter."""
    if kind == "adamw" or p.numel() < 4096:  # bitsandbytes keeps small ones as they are
        return 2 * p.nbytes
    return 2 * (
        p.numel() + 4 * math.ceil(p.numel() / 256)
    )  # a byte each, and a float32 scale of every 256


class Trainer:
    """AdamW with warm-up and cosine, clipped gradients and an average of the weights; saved and restored as one file.

    `about`: what the run is, by name. A checkpoint is restored only where all of that is the same. `kind`: of OPTIMIZERS.
    """

    def __init__(
        self,
        module: nn.Module,
        path: Path,
        about: Mapping[str, object],
        *,
        steps: int,
        rate: float,
        warmup: int = 0,
        weight_decay: float = 0.01,
        ema: float | None = None,
        kind: str = "adamw",
    ):
        self.module, self.path, self.about = (
            module,
            path,
            {name: str(value) for name, value in about.items()},
        )
        self.steps, self.rate, self.warmup, self.decay, self.step = steps, rate, warmup, ema, 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = optimizer_of(kind)(
            self.parameters.values(), rate, (0.9, 0.99), weight_decay=weight_decay
        )
        self.average = (
            {} if ema is None else {name: p.detach().clone() for name, p in self.parameters.items()}
        )
        for left in path.parent.glob(
            ".*.safetensors.*.part"
        ):  # by a run that was killed while it wrote
            left.unlink(missing_ok=True)
        if path.exists():
            self.restore()

    @property
    def current_rate(self) -> float:
        """Of the step that comes next."""
        rising = min(1.0, (self.step + 1) / max(1, self.warmup))
        return self.rate * rising * 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / self.steps)))

    def update(self, losses: Iterable[Callable[[], Tensor]]) -> tuple[float, float]:
        """One step along the mean of some losses, computed one after another; returns that mean, and the gradient's length.

        NonFiniteError, and no step, if either is not finite.
        """
        losses, mean = list(losses), 0.0
        for loss in losses:
            value = loss() / len(losses)
            value.backward()
            mean += value.item()
        mean = mean_of_all(mean)
        length = whole(
            nn.utils.get_total_norm(
                [p.grad for p in self.parameters.values() if p.grad is not None]
            )
        )
        nn.utils.clip_grads_with_norm_(self.parameters.values(), 1.0, length)
        length = length.item()
        if not math.isfinite(mean + length):
            self.optimizer.zero_grad()
            raise NonFiniteError(
                f"at step {self.step + 1} the loss is {mean:g}, and its gradient {length:g} long"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.current_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.average:
            follow(self.average, self.parameters, self.decay, self.step)
        return mean, length

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights stand in the module, if an average is kept."""
        live = {name: self.parameters[name].detach().clone() for name in self.average}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(part(value, self.parameters[name]))

    def saved_step(self) -> int:
        """The step of the checkpoint; 0 if there is none."""
        return int(read_header(self.path)[1]["step"]) if self.path.exists() else 0

    def save(self) -> None:
        tensors = {f"model.{name}": p for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= optimizer_tensors(self.optimizer, "optimizer.")
        write(self.path, tensors, {"step": str(self.step), "about": json.dumps(self.about)})

    def restore(self) -> None:
        """UserError for a checkpoint of another run."""
        _, metadata = read_header(self.path)
        try:
            step, about = int(metadata["step"]), json.loads(metadata["about"])
        except (KeyError, ValueError):
            raise UserError(
                f"{self.path} is not a checkpoint of a training run: give another folder for this one"
            ) from None
        for name in about | self.about:
            before, now = about.get(name), self.about.get(name)
            if before != now:
                raise UserError(
                    f"{self.path} is of another run: its {name} is {before!s:.80}, and now it is {now!s:.80}; give "
                    "the same as then, or another folder"
                )
        tensors = load(self.path)
        self._put(take(tensors, "model."))
        self.average = {
            name: part(value, self.parameters[name])
            for name, value in take(tensors, "average.").items()
        }
        restore_optimizer(self.optimizer, take(tensors, "optimizer."))
        self.step = step


@torch.no_grad()
def follow(
    average: Mapping[str, Tensor], values: Mapping[str, Tensor], decay: float, step: int
) -> None:
    """Move an exponential average one step towards these values, with a short memory at first, or it would keep the noise."""
    for name, value in average.items():
        if value.is_floating_point():
            own(value).lerp_(own(values[name]), 1 - min(decay, step / (step + 20)))


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """All that it keeps of its parameters, by their number."""
    tensors = {}
    for number, p in enumerate(parameters_of(optimizer)):
        for name, value in optimizer.state.get(p, {}).items():
            shared = name.startswith(
                "qmap"
            )  # bitsandbytes' parameters have one; no two names in a file may share memory
            tensors[f"{prefix}{number}.{name}"] = (
                value.clone() if shared else torch.as_tensor(value)
            )
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """`tensors` as `optimizer_tensors` named them, less the prefix."""
    parameters = parameters_of(optimizer)
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        like = parameters[int(number)]
        if value.shape == like.shape:
            value = part(value, like)
        elif value.ndim:
            value = value.to(like.device)
        elif not value.is_floating_point():
            value = value.item()  # bitsandbytes counts its steps in Python
        optimizer.state[like][name] = value


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def load(path: Path) -> dict[str, Tensor]:
    """UserError for a file that is damaged, or none."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        read_header(path)  # which says what is wrong with it
        raise UserError(f"{path} cannot be read: {error}") from error


def take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Atomically: whatever happens, there is the old file or the new one. WriteError if the disk is full, or may not be
    written to."""
    if rank() > 0:
        for tensor in tensors.values():
            whole(tensor.detach())  # the first process asks for it
        return
    tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        unfinished.touch()
        mode = (
            unfinished.stat().st_mode
        )  # as the user's other files; save_file's are for one's own eyes
        save_file(tensors, unfinished, metadata)
        unfinished.chmod(mode)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        forbidden = isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError)
        help = "check the folder and its rights" if forbidden else "make room on its disk"
        raise WriteError(
            f"{path} could not be written ({error}), and is as it was before: {help}"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- memory


def enable_gradient_checkpointing(network: Flux) -> None:
    """Of each block only its input is kept for the backward pass, which computes the rest again (gradient checkpointing)."""
    device = network.img_in.weight.device

    def contexts():
        return (nullcontext(), attention_on(device))  # of the first time, and of the second

    for block in (*network.double_blocks, *network.single_blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def untrained(
    config: FluxConfig, dtype: torch.dtype, rank: int | None = None, targets: Sequence[str] = ("*",)
) -> Flux:
    """A network as it will be trained, whatever its values: what `memory` asks for. With a rank, of a LoRA beside it."""
    network = Flux(config)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    if rank:
        add_lora(network, rank, targets)
    return network


class Need(NamedTuple):
    """Bytes."""

    weights: int
    states: int  # gradients, Adam's two moments and the average of what is trained
    activations: int  # that the forward pass keeps for the backward pass

    @property
    def total(self) -> int:
        return sum(self)


def memory(
    spec: ModelSpec,
    make: Callable[[], Flux],
    tokens: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    ema: bool,
    recompute: bool,
    kind: str = "adamw",
) -> Need:
    """What a step takes, counted in a forward pass of fake tensors, which have shapes and no memory.

    `make`: the network as it will be trained. `tokens`: of a picture and its references. With `recompute`, there are the
    inputs of all blocks, and the rest of one. `kind`: of OPTIMIZERS.
    """
    c, kept, blocks, streams = spec.transformer, {}, [], []

    def size():
        return sum(storage.nbytes() for storage in kept.values())

    def keep(x: Tensor) -> Tensor:
        if (storage := x.untyped_storage())._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    def after(block: nn.Module, given: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
        blocks[-1] = size() - blocks[-1]
        streams.append(sum(x.nbytes for x in (out if isinstance(out, tuple) else (out,))))

    with FakeTensorMode():
        network = make()
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
        for block in (*network.double_blocks, *network.single_blocks):
            block.register_forward_pre_hook(lambda *_: blocks.append(size()))
            block.register_forward_hook(after)
        vector = None if c.vector_dim is None else torch.zeros(batch, c.vector_dim)
        features = TextFeatures(torch.zeros(batch, spec.text_length, c.context_dim), vector)
        latents, t = torch.zeros(batch, c.out_channels, 1, tokens), torch.zeros(batch)
        beside = c.in_channels - c.out_channels
        given = Batch(
            latents, features, channels=torch.zeros(batch, tokens, beside) if beside else None
        )
        attention = SDPBackend.MATH if device.type == "cpu" else SDPBackend.FLASH_ATTENTION
        with saved_tensors_hooks(keep, lambda x: x), sdpa_kernel(attention), autocast("cpu", dtype):
            rectified_flow_loss(partial(velocity, network, given, 1.0), latents, t, latents)
        activations = size() - (sum(blocks) - max(blocks) - sum(streams) if recompute else 0)
        held = sum(p.nbytes for p in network.parameters())
        states = sum(
            (1 + ema) * p.nbytes + moments(kind, p) for p in network.parameters() if p.requires_grad
        )
    return Need(held, states, activations)

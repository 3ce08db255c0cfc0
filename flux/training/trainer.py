"""The training loop's state: optimizers, learning rate, moving average of the weights, checkpoints.

All random numbers of a run (order, times, noise, dropped captions) depend on the seed and the step
only. So a stopped run resumes bit for bit from its parameters, its optimizers' state and its step,
and processes that share a step need not exchange random numbers.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.errors import NonFiniteError, UserError, install_command
from flux.plain_files import parse_json
from flux.training.checkpoint import (
    check_header,
    check_tensors,
    initialize_optimizers,
    is_finite,
    load_tensors,
    optimizer_tensors,
    read_own_header,
    remove_unfinished,
    restore_optimizers,
    save_tensors,
    strip_prefix,
)
from flux.training.distributed import all_mean, distribute_like, full_tensor, to_local
from flux.weights.files import preview

OPTIMIZERS = ("adamw", "adamw8bit")


def make_optimizer(
    name: str, parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.01
) -> torch.optim.Optimizer:
    """Return AdamW, or bitsandbytes' 8-bit AdamW (Dettmers et al. 2022, arXiv:2110.02861)."""
    return optimizer_class(name)(
        list(parameters), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay
    )


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class of an optimizer of OPTIMIZERS. UserError if its library is not installed."""
    if name == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "optimizer: adamw8bit needs bitsandbytes. "
            f"Run `{install_command('adamw8bit')}`, or use adamw."
        ) from None
    return AdamW8bit


def trainable_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------ learning rate


def warmup_cosine(steps: int, warmup: int = 0) -> Callable[[int], float]:
    """Return a schedule: `warmup` steps of linear increase, times a cosine to 0 at `steps`."""
    return partial(_warmup_cosine, steps, warmup)


def _warmup_cosine(steps: int, warmup: int, step: int) -> float:
    increase = min(1.0, (step + 1) / max(1, warmup))
    return increase * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


# ---------------------------------------------------------------------------------- moving average


def ema_decay_at(step: int, decay: float) -> float:
    """Return the decay of the moving average at `step`, counted from 1.

    The decay ramps up from 1/21, so that the average forgets the first, noisy steps.
    """
    return min(decay, step / (step + 20))


@torch.no_grad()
def update_ema(
    ema: Mapping[str, Tensor], values: Mapping[str, Tensor], decay: float, step: int
) -> None:
    """Move each tensor of `ema` towards the tensor of the same name in `values`, in place."""
    for name, average in ema.items():
        to_local(average).lerp_(to_local(values[name]), 1 - ema_decay_at(step, decay))


@torch.no_grad()
def copy_weights(target: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy full or sharded `values` into the tensors of the same names."""
    for name, value in values.items():
        target[name].copy_(distribute_like(value, target[name]))


# -------------------------------------------------------------------------------------- the trainer


class Trainer:
    """Train a module: clipped gradients, a learning-rate schedule, an EMA, and one checkpoint file.

    `config` describes the run by name; a checkpoint is restored only where its config is the same.
    `old_names` maps names in the config of older checkpoints to names in `config`. `schedule` maps
    a step to the factor of the optimizers' learning rates. A checkpoint at `path` is restored.
    """

    def __init__(
        self,
        module: nn.Module,
        path: Path,
        config: Mapping[str, object],
        optimizers: Sequence[torch.optim.Optimizer],
        schedule: Callable[[int], float],
        *,
        ema_decay: float | None = None,
        old_names: Mapping[str, str] | None = None,
    ):
        self.module = module
        self.path = path
        self.config = {name: str(value) for name, value in config.items()}
        self.optimizers = optimizers
        self.schedule = schedule
        self.ema_decay = ema_decay
        self.old_names = old_names or {}
        self.parameters = trainable_parameters(module)
        self.peak_rates = [group["lr"] for group in self._groups()]
        self.ema: dict[str, Tensor] = {}
        if ema_decay is not None:
            self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step = 0
        self.saved_step = 0  # of the checkpoint; 0 if there is none
        self.seconds = 0.0  # spent in `update`, over all parts of the run
        remove_unfinished(path.parent)
        if os.path.lexists(path):  # a broken link is told
            self.restore()

    @property
    def learning_rate(self) -> float:
        """Return the first optimizer's learning rate in the next step."""
        return self.peak_rates[0] * self.schedule(self.step)

    def update(self, losses: Iterable[Callable[[], Tensor]]) -> tuple[float, float]:
        """Take one step along the mean of the losses; return the mean and the gradient's norm.

        The losses are computed one after another. NonFiniteError, and no step, if the mean or the
        norm is not finite.
        """
        start = time.monotonic()
        losses = list(losses)
        mean = 0.0
        for loss in losses:
            value = loss() / len(losses)
            value.backward()
            mean += value.item()
        mean = all_mean(mean)
        for p in self.parameters.values():
            if p.grad is None:  # of FLUX 3's blocks for references, in a step without any
                p.grad = torch.zeros_like(p)  # every checkpoint has the state of all parameters
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        total_norm = full_tensor(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grads_with_norm_(self.parameters.values(), 1.0, total_norm)
        norm = total_norm.item()
        if not math.isfinite(mean + norm):
            self._zero_grad()
            raise NonFiniteError(
                f"step {self.step + 1}: not finite (loss {mean:g}, norm of the gradient {norm:g})"
            )
        factor = self.schedule(self.step)
        for group, peak in zip(self._groups(), self.peak_rates, strict=True):
            group["lr"] = peak * factor
        for optimizer in self.optimizers:
            optimizer.step()
        self._zero_grad()
        self.step += 1
        if self.ema_decay is not None:
            update_ema(self.ema, self.parameters, self.ema_decay, self.step)
        self.seconds += time.monotonic() - start
        return mean, norm

    def _groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Put the averaged weights into the module for the block, if the run keeps an average."""
        live = {name: self.parameters[name].detach().clone() for name in self.ema}
        copy_weights(self.parameters, self.ema)
        try:
            yield
        finally:
            copy_weights(self.parameters, live)

    def _tensors(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint holds, by its name there."""
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.parameters.items()}
        tensors |= {f"ema.{name}": x for name, x in self.ema.items()}
        state = optimizer_tensors(self.optimizers)
        return tensors | {f"optimizer.{name}": x for name, x in state.items()}

    def save(self) -> None:
        """Write the checkpoint atomically.

        NonFiniteError if a weight or a state is not finite; the last checkpoint stays.
        """
        tensors = self._tensors()
        bad = [name for name, x in tensors.items() if not is_finite(to_local(x.detach()))]
        if all_mean(len(bad)):  # all processes agree
            names = f": {preview(bad)}" if bad else ""
            raise NonFiniteError(f"step {self.step}: weights are not finite{names}")
        metadata = {
            "step": str(self.step),
            "seconds": repr(self.seconds),
            "config": json.dumps(self.config),
        }
        save_tensors(self.path, tensors, metadata, checksum=True)
        self.saved_step = self.step

    def restore(self) -> None:
        """Load the checkpoint, or nothing of it.

        UserError if the checkpoint belongs to another run, or does not hold exactly what this run
        would save, in finite values.
        """
        advice = "Put back a sound checkpoint, or use another folder."
        try:
            header, metadata = read_own_header(self.path)
        except UserError as error:
            raise UserError(f"{error} {advice}") from None
        step, seconds, config = self._read_progress(metadata)
        self._check_config({self.old_names.get(name, name): x for name, x in config.items()})
        if step:
            initialize_optimizers(self.optimizers)
        expected = self._tensors()
        # "average." was the prefix of the average before "ema."
        old = any(name.startswith("average.") for name in header)
        prefix = "average." if old else "ema."
        expected = {re.sub(r"^ema\.", prefix, name): x for name, x in expected.items()}
        try:
            check_header(self.path, header, expected)
            tensors = load_tensors(self.path)
            check_tensors(self.path, tensors, metadata)
            state = strip_prefix(tensors, "optimizer.")
            self._check_steps(state, step)
        except UserError as error:
            raise UserError(f"{error} {advice}") from None
        copy_weights(self.parameters, strip_prefix(tensors, "model."))
        copy_weights(self.ema, strip_prefix(tensors, prefix))
        restore_optimizers(self.optimizers, state)
        self.step, self.saved_step, self.seconds = step, step, seconds

    def _read_progress(self, metadata: Mapping[str, str]) -> tuple[int, float, dict[str, str]]:
        """Return step, seconds and config of a checkpoint's metadata."""
        try:
            step, seconds = metadata["step"], float(metadata.get("seconds", 0))
            config = parse_json(metadata["config"] if "config" in metadata else metadata["about"])
            if not re.fullmatch("[0-9]{1,15}", step) or not 0 <= seconds < math.inf:
                raise ValueError
            if not isinstance(config, dict) or not all(type(x) is str for x in config.values()):
                raise ValueError
        except (KeyError, ValueError):
            raise UserError(
                f"{self.path}: is not a checkpoint of a training run. Use another folder."
            ) from None
        return int(step), seconds, config

    def _check_steps(self, state: Mapping[str, Tensor], step: int) -> None:
        """Raise UserError if an optimizer has taken no step, or more than the run."""
        for name, x in state.items():
            if name.endswith(".step") and not 0 < x.item() <= step:
                raise UserError(f"{self.path}: is damaged: optimizer.{name} is not a step so far.")

    def _check_config(self, saved: dict[str, str]) -> None:
        for name in saved | self.config:
            before, now = saved.get(name), self.config.get(name)
            if before != now:
                raise UserError(
                    f"{self.path}: belongs to another run: `{name}` was {before!s:.80} and is now "
                    f"{now!s:.80}. Use the same value, or another folder."
                )

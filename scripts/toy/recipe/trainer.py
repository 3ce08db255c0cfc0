"""The training loop of the embedded models: a run lasts some minutes, by Muon and AdamW."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flux.training.log import CSVLog
from flux.training.loss import autocast_matmul
from flux.training.trainer import Trainer, copy_weights
from recipe.muon import Muon

COOLING = 0.4  # share of the minutes, at the end, in which the learning rate falls
WARMUP = 200  # steps
LOG_EVERY = 100  # steps


class TimedTrainer(Trainer):
    """Train `model` for some minutes: warm-up, a learning rate that follows the clock, EMA.

    Until the cooling begins, a run can be made longer without loss.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        path: Path,
        minutes: float,
        ema: float,
        cooling: float = COOLING,
    ):
        self.minutes, self.cooling = minutes, cooling
        self.device = device_of(model)
        self.dtype = torch.bfloat16 if bfloat16_is_faster(self.device) else torch.float32
        super().__init__(model, path, {}, optimizers, self.rate_factor, ema_decay=ema)

    @property
    def progress(self) -> float:
        """Return the share of the minutes that is over, from 0 to 1; 1 for a run of 0 minutes."""
        return min(1.0, self.seconds / (60 * self.minutes)) if self.minutes else 1.0

    def rate_factor(self, step: int) -> float:
        """Return the factor of all learning rates."""
        return min(1.0, (step + 1) / WARMUP, 0.01 + (1 - self.progress) / self.cooling)

    def run(
        self,
        loss: Callable[[int], Tensor],
        every_minutes: float = 5,
        sheet: Callable[[], None] | None = None,
    ) -> None:
        """Train to the end of the minutes. `loss(step)` draws a batch and returns its loss.

        `sheet()` is called after each checkpoint with the averaged weights in the model. They stay
        there at the end. NonFiniteError if the loss is not finite.
        """
        torch.manual_seed(self.step)  # a resumed run must not repeat its first random numbers
        name = self.path.stem
        bar = tqdm(total=round(60 * self.minutes), initial=round(self.seconds), unit="s", desc=name)
        saved, losses, log = self.seconds, [], None
        while self.progress < 1:
            before = self.seconds
            losses.append(self.update([partial(self._loss, loss)])[0])
            bar.update(self.seconds - before)
            if self.step % LOG_EVERY == 0:
                bar.set_postfix(step=self.step, loss=f"{fmean(losses):.4f}")
                columns = ("step", "seconds", "loss")
                log = log or CSVLog(self.path.with_suffix(".csv"), columns, self.step - 1)
                log.add(self.step, self.seconds, fmean(losses))
                losses = []
            if self.seconds - saved > 60 * every_minutes or self.progress == 1:
                saved = self.seconds
                self.save()
                if sheet:
                    with self.ema_weights():
                        sheet()
        copy_weights(self.parameters, self.ema)

    def _loss(self, loss: Callable[[int], Tensor]) -> Tensor:
        with autocast_matmul(self.device, self.dtype):
            return loss(self.step)


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def bfloat16_is_faster(device: torch.device) -> bool:
    """Time a matrix product: bfloat16 is four times as fast on some CPUs, far slower on others."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(1024, 1024, dtype=dtype, device=device)
        for _ in range(3):  # the last one counts
            start = time.perf_counter()
            (a @ a).sum().item()
        return time.perf_counter() - start

    return seconds(torch.bfloat16) < seconds(torch.float32)


def optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float, adam_names: tuple[str, ...]
) -> list[torch.optim.Optimizer]:
    """Return Muon for matrices, and AdamW for the rest.

    AdamW also gets the matrices whose name contains one of `adam_names`: layers that touch pixels
    or tokens.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        is_matrix = p.ndim == 2 and not any(part in name for part in adam_names)
        (matrices if is_matrix else others).append(p)
    groups: list[torch.optim.Optimizer] = []
    if matrices:
        groups.append(Muon(matrices, muon_lr, 0.01))
    if others:
        groups.append(torch.optim.AdamW(others, adam_lr, (0.9, 0.99), weight_decay=0.0))
    return groups

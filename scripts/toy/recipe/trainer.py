"""The training loop of the embedded models: lengths in minutes, Muon and AdamW, checkpoints, a log."""

import csv
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from flux.errors import NonFiniteError
from flux.training import trainer as training
from flux.training.trainer import take, write

COOLING = 0.4  # of the time, at the end, in which the learning rate goes down; until then a run can be made longer at no loss


class Trainer:
    """Optimises `model` for some minutes of training time: warm-up, a clock-driven decay, EMA, checkpoints, a loss log."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        path: Path,
        minutes: float,
        ema: float,
        cooling: float = COOLING,
    ):
        self.model, self.optimizers, self.path, self.minutes, self.decay = (
            model,
            optimizers,
            path,
            minutes,
            ema,
        )
        self.cooling = cooling
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
        self.step, self.seconds = 0, 0.0
        self.device = device_of(model)
        self.dtype = torch.bfloat16 if bfloat16_is_faster(self.device) else torch.float32
        if path.exists():
            self.restore()

    @property
    def progress(self) -> float:
        """The share of the minutes that is over, from 0 to 1; of none, all."""
        return min(1.0, self.seconds / (60 * self.minutes)) if self.minutes else 1.0

    def run(
        self,
        loss: Callable[[int], Tensor],
        every_minutes: float = 5,
        sheet: Callable[[], None] = lambda: None,
    ):
        """`loss(step)` draws a batch and returns its loss; `sheet()` is called with the EMA weights in place, which then stay.

        NonFiniteError if the loss is none.
        """
        torch.manual_seed(
            self.step
        )  # a run that goes on does not see the noise again with which it began
        bar = tqdm(
            total=round(60 * self.minutes),
            initial=round(self.seconds),
            unit="s",
            desc=self.path.stem,
            mininterval=5,
        )
        marked, losses = self.seconds, []
        while self.progress < 1:
            started = time.monotonic()
            value = self.update(loss)
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{self.path.stem}: the loss is {value} at step {self.step}; the same command goes on "
                    "from the last checkpoint"
                )
            losses.append(value)
            spent = time.monotonic() - started
            self.seconds += spent
            bar.update(spent)
            if self.step % 100 == 0:
                bar.set_postfix(step=self.step, loss=f"{np.mean(losses):.4f}")
                with open(self.path.with_suffix(".csv"), "a", newline="") as log:
                    csv.writer(log).writerow(
                        [self.step, f"{self.seconds:.1f}", f"{np.mean(losses):.6f}"]
                    )
                losses = []
            if self.seconds - marked > 60 * every_minutes or self.progress == 1:
                marked = self.seconds
                self.save()
                with self.averaged():
                    sheet()
        self.model.load_state_dict(self.ema)

    def update(self, loss: Callable[[int], Tensor]) -> float:
        """One step of all optimizers, and of the average; returns the loss."""
        rate = min(1.0, (self.step + 1) / 200, 0.01 + (1 - self.progress) / self.cooling)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
        with training.computing(self.device, self.dtype):
            value = loss(self.step)
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        training.follow(self.ema, self.model.state_dict(), self.decay, self.step)
        return value.item()

    @contextmanager
    def averaged(self):
        """The EMA weights stand in the model."""
        live = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        yield
        self.model.load_state_dict(live)

    def save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for i, optimizer in enumerate(self.optimizers):
            tensors |= training.optimizer_tensors(optimizer, f"optimizer.{i}.")
        write(self.path, tensors, {"step": str(self.step), "seconds": repr(self.seconds)})

    def restore(self) -> None:
        with safe_open(self.path, framework="pt") as f:
            tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        self.model.load_state_dict(take(tensors, "model."))
        self.ema = {k: v.to(self.device) for k, v in take(tensors, "ema.").items()}
        for i, optimizer in enumerate(self.optimizers):
            training.restore_optimizer(optimizer, take(tensors, f"optimizer.{i}."))


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def bfloat16_is_faster(device: torch.device) -> bool:
    """Tried out on a matrix product: on some CPUs four times as fast as float32, on others several times slower."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(1024, 1024, dtype=dtype, device=device)
        for _ in range(3):  # the last one counts
            start = time.perf_counter()
            (a @ a).sum().item()
        return time.perf_counter() - start

    return seconds(torch.bfloat16) < seconds(torch.float32)


class Muon(torch.optim.Optimizer):
    """Momentum whose update, seen as a matrix, is made orthogonal (Jordan et al. 2024; step size as in Liu et al. 2025).

    torch.optim.Muon does the same, in bfloat16, and for matrices alone. Here convolution kernels are flattened, and the
    products are in the faster dtype.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        device = self.param_groups[0]["params"][0].device
        self.dtype = torch.bfloat16 if bfloat16_is_faster(device) else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            alike = defaultdict(
                list
            )  # matrices of one shape take their steps together: many small products are slow
            for p in group["params"]:
                alike[p.shape].append(p)
            for parameters in alike.values():
                updates = []
                for p in parameters:
                    average = self.state[p].setdefault("momentum", torch.zeros_like(p.grad))
                    average.lerp_(p.grad, 1 - momentum)
                    updates.append(
                        p.grad.lerp(average, momentum).flatten(1)
                    )  # Nesterov's look ahead
                updates = orthogonal(torch.stack(updates).to(self.dtype))
                scale = 0.2 * math.sqrt(max(updates.shape[1:]))  # the size of a typical Adam update
                for p, update in zip(parameters, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).sub_(update.view_as(p), alpha=lr * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> the nearest orthogonal matrices, roughly: five steps of a quintic Newton-Schulz iteration.

    It takes each singular value s to 3.4445 s - 4.7750 s³ + 2.0315 s⁵ (coefficients of Jordan et al. 2024), and so near to 1.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller of the two products is x xᵀ
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def optimizers(
    model: nn.Module, muon: float, adam: float, plain: tuple[str, ...]
) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels; AdamW for vectors, and for what `plain` names: layers that touch pixels or tokens.

    `muon` and `adam` are their learning rates; `plain` has parts of parameters' names.
    """
    inner, outer = [], []
    for name, p in model.named_parameters():
        (inner if p.ndim >= 2 and not any(part in name for part in plain) else outer).append(p)
    return [
        Muon(inner, muon, weight_decay=0.01),
        torch.optim.AdamW(outer, adam, (0.9, 0.99), weight_decay=0.0),
    ]

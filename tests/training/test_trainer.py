"""flux.training.trainer and checkpoint: steps, the moving average, and resuming bit for bit.

Compared with: torch's AdamW, and float64 by hand.
"""

import json
import math
import os
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.training import (
    RUN,
    equal,
    make_loss,
    make_trainer,
    network_loss,
    random,
    state,
    take_steps,
)
from support.weight_files import refusal
from torch import Tensor, nn

from flux.atomic_files import exclusive_lock
from flux.errors import NonFiniteError
from flux.parity.reference import KLEIN_TINY, max_error, randomise
from flux.training.checkpoint import save_tensors
from flux.training.memory import optimizer_state_bytes
from flux.training.trainer import Trainer, make_optimizer, warmup_cosine
from flux.transformer import Flux

# -------------------------------------------------------------------------------------------- steps


def test_steps_equal_torchs_adamw_on_the_mean_gradient(tmp_path):
    ours, theirs = make_trainer(tmp_path / "x"), make_trainer(tmp_path / "x").module
    optimizer = torch.optim.AdamW(theirs.parameters(), 0.05, (0.9, 0.99), weight_decay=0.01)
    rates = (0.025, 0.05 * 0.5 * (1 + math.cos(math.pi / 6)), 0.05 * 0.75, 0.025)
    for step, rate in enumerate(rates):
        assert ours.learning_rate == pytest.approx(rate)
        ((value, norm),) = take_steps(ours, step, step + 1)
        losses = [
            (theirs(random(5, 4, seed=n)) - n).square().mean() for n in (2 * step, 2 * step + 1)
        ]
        mean = sum(losses) / 2
        optimizer.zero_grad()
        mean.backward()
        expected_norm = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
        for p in theirs.parameters():
            p.grad /= max(1, expected_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert value == pytest.approx(mean.item(), rel=1e-5)
        assert norm == pytest.approx(expected_norm.item(), rel=1e-5)
    for a, b in zip(ours.module.parameters(), theirs.parameters(), strict=True):
        assert max_error(a.detach(), b.detach()) < 1e-5


def test_float32_weights_take_steps_too_small_for_bfloat16():
    network = randomise(Flux(KLEIN_TINY)).requires_grad_(True)
    name = "single_blocks.0.linear1.weight"
    weight = network.get_parameter(name)
    before = weight.detach().clone()
    optimizer = make_optimizer("adamw", network.parameters(), 1e-6, weight_decay=0)
    trainer = Trainer(network, Path("nowhere"), {}, [optimizer], warmup_cosine(100))
    trainer.update([partial(network_loss, network, 0, torch.bfloat16)])
    step = weight.detach() - before
    assert weight.dtype == torch.float32
    assert 0 < step.abs().max() <= 1.1e-6  # Adam's first step is the learning rate
    assert (step != 0).float().mean() > 0.9
    rounded = before.bfloat16()  # near 0.1, a bfloat16 number moves by 0.0005 or not at all
    assert (rounded + step.bfloat16() == rounded).float().mean() > 0.9


def test_ema_is_exponential_and_put_into_the_module_for_a_block(tmp_path):
    ours = make_trainer(tmp_path / "x", ema=0.2)
    weight = ours.module[0].weight
    expected = weight.detach().double().clone()
    for step in range(1, 5):
        ours.update([make_loss(ours, step)])
        decay = min(0.2, step / (step + 20))
        expected = decay * expected + (1 - decay) * weight.detach().double()
    average = ours.ema["0.weight"]
    assert max_error(average.double(), expected) < 1e-6
    live = weight.detach().clone()
    with ours.ema_weights():
        assert torch.equal(weight, average) and not torch.equal(live, average)
    assert torch.equal(weight, live)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_non_finite_loss_or_gradient_takes_no_step(tmp_path, fault):
    ours = make_trainer(tmp_path / "x")
    ours.update([make_loss(ours, 1)])
    before = state(ours)

    def bad() -> Tensor:
        out = ours.module(random(5, 4))
        if fault == "loss":
            return out.mean() * math.nan
        return (out * 0).sum().sqrt()  # 0, with an infinite slope

    with pytest.raises(NonFiniteError, match="step 2: not finite"):
        ours.update([make_loss(ours, 2), bad])
    assert ours.step == 1 and equal(before, state(ours))
    twin = make_trainer(tmp_path / "x")
    twin.update([make_loss(twin, 1)])
    # no gradient is left over
    assert ours.update([make_loss(ours, 2)]) == twin.update([make_loss(twin, 2)])


# -------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("ema", [None, 0.9])
def test_stopped_run_resumes_bit_for_bit(tmp_path, ema):
    full = make_trainer(tmp_path / "full.safetensors", ema)
    losses = take_steps(full, 0, 6)
    first = make_trainer(tmp_path / "parts.safetensors", ema)
    take_steps(first, 0, 3)
    first.save()
    first.update([make_loss(first, 100)])  # lost: not in the checkpoint
    second = make_trainer(tmp_path / "parts.safetensors", ema)
    assert second.step == 3 and second.seconds > 0
    assert take_steps(second, 3, 6) == losses[3:]
    assert equal(state(full), state(second)) and len(state(full)) == (16 if ema is None else 20)


def test_checkpoint_of_an_older_version_is_restored(tmp_path):
    """Older files say "about" for "config", "average." for "ema.", and have flags for names."""
    path = tmp_path / "x.safetensors"
    trainer = make_trainer(path)
    take_steps(trainer, 0, 3)
    trainer.save()
    tensors = {name.replace("ema.", "average."): x for name, x in load_file(path).items()}
    save_file(tensors, path, {"step": "3", "about": '{"model": "a", "--batch": "2"}'})
    old_names = {"--batch": "batch_size"}
    resumed = make_trainer(path, old_names=old_names)
    assert resumed.step == 3 and equal(state(trainer), state(resumed))
    config = RUN | {"batch_size": 3}
    message = refusal(make_trainer, path, config=config, old_names=old_names)
    assert "belongs to another run: `batch_size` was 2 and is now 3" in message


def test_eight_bit_moments_resume_and_follow_adamw(tmp_path):
    """Compare bitsandbytes' AdamW with torch's, and its size with the estimate."""

    def make(name: str, optimizer: str = "adamw8bit") -> Trainer:
        torch.manual_seed(3)
        module = nn.Sequential(
            nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1)
        )
        optimizers = [make_optimizer(optimizer, module.parameters(), 1e-2)]
        return Trainer(module, tmp_path / name, {"model": "a"}, optimizers, warmup_cosine(6))

    def train(trainer: Trainer, last: int = 6) -> Tensor:
        while trainer.step < last:
            x = random(5, 64, seed=trainer.step)
            trainer.update([lambda x=x: (trainer.module(x) - 1).square().mean()])
        return nn.utils.parameters_to_vector(trainer.module.parameters()).detach()

    start = train(make("a"), last=0)
    full, exact = make("a"), train(make("b", "adamw"))
    end, first = train(full), make("c")
    train(first, last=3)
    first.save()
    second = make("c")
    assert second.step == 3 and torch.equal(train(second), end)
    assert equal(state(full), state(second))
    moments = ("state1", "state2", "absmax1", "absmax2")
    real = sum(x.nbytes for name, x in state(full).items() if name.split(".")[-1] in moments)
    parameters = list(full.module.parameters())
    assert real == sum(optimizer_state_bytes("adamw8bit", p) for p in parameters)
    assert 0.25 < real / sum(optimizer_state_bytes("adamw", p) for p in parameters) < 0.3
    # the ratio is 1 for weights that do not move
    assert (end - exact).norm() < 0.1 * (exact - start).norm()


def test_checkpoint_of_another_run_is_refused(tmp_path):
    make_trainer(tmp_path / "x.safetensors").save()
    message = refusal(make_trainer, tmp_path / "x.safetensors", config=RUN | {"model": "b"})
    assert "x.safetensors: belongs to another run: `model` was a and is now b." in message
    save_file({"x": torch.zeros(1)}, tmp_path / "y.safetensors")
    message = refusal(make_trainer, tmp_path / "y.safetensors")
    assert "is not a checkpoint of a training run" in message
    (tmp_path / "z.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-10])
    assert "is truncated" in refusal(make_trainer, tmp_path / "z.safetensors")


def test_checkpoint_describes_its_run(tmp_path):
    make_trainer(tmp_path / "x.safetensors").save()
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "0"
    assert json.loads(metadata["config"]) == {"model": "a", "batch_size": "2"}


def test_saved_files_have_default_permissions(tmp_path):
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "lora.safetensors", {"a": torch.ones(2)})
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "lora.safetensors")]
    assert modes[0] == modes[1]


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A limit on the size of files raises the same error as a full disk."""
    path = tmp_path / "x.safetensors"
    trainer = make_trainer(path)
    trainer.save()
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.update([make_loss(trainer, 1)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        message = refusal(trainer.save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "x.safetensors: cannot be written (" in message and "File too large" in message
    assert "Make room" in message
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_kill_while_writing_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    trainer = make_trainer(path)
    trainer.save()
    before, saved = path.read_bytes(), state(trainer)
    trainer.update([make_loss(trainer, 1)])

    def killed(*_, **__):  # at the last moment before the new file is in place
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            trainer.save()
    old = [tmp_path / ".x.safetensors.0a1b.part", tmp_path / ".tmpAbc123"]  # of older versions
    (tmp_path / ".y.safetensors.unfinished.lock").touch()
    for file in (*old, tmp_path / ".tmpNew123"):
        file.write_bytes(before)
    for file in old:
        os.utime(file, (0, 0))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 6
    with exclusive_lock(tmp_path / "training"):
        assert equal(saved, state(make_trainer(path)))
        assert (tmp_path / ".training.unfinished.lock").exists()  # nothing of a living process
    # only what another process may be writing is left
    assert set(tmp_path.iterdir()) == {path, tmp_path / ".tmpNew123"}

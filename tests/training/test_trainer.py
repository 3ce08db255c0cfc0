"""flux.training.trainer: the loss, the memory that is told, and a trainer that goes on bit for bit.

The truth: float64 by hand; diffusers; torch's own AdamW; what a real pass keeps.
"""

import math
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.weight_files import refusal
from torch import Tensor, nn

from flux import sampling
from flux.configs import MODELS
from flux.errors import NonFiniteError
from flux.parity.reference import (
    FLUX1_TINY,
    FLUX2_TINY,
    KLEIN_TINY,
    diffusers_pipeline,
    diffusers_velocity,
    max_error,
    networks,
    randomise,
    tiny_models,
)
from flux.text_encoder import TextFeatures
from flux.training import lora as adapters
from flux.training import trainer as training
from flux.transformer import Flux, FluxConfig

CPU = torch.device("cpu")
CONFIGS = {"flux.1": FLUX1_TINY, "flux.2": FLUX2_TINY, "klein": KLEIN_TINY}
every_family = pytest.mark.parametrize("family", CONFIGS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def a_batch(config: FluxConfig, rows: int = 2, references: bool = False) -> training.Batch:
    axes = len(config.axes_dim)
    features = TextFeatures(
        random(rows, 7, config.context_dim),
        random(rows, config.vector_dim) if config.vector_dim else None,
    )
    ids = sampling.image_ids(2, 3, axes, t=10 if axes == 4 else 1)
    more = (random(rows, 6, config.out_channels, seed=1), ids) if references else ()
    return training.Batch(random(rows, config.out_channels, 3, 4), features, *more)


def loss_of(network: Flux, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    batch = a_batch(network.config)
    with training.computing(CPU, dtype):
        velocity = partial(training.velocity, network, batch, 1.0)
        return training.rectified_flow_loss(
            velocity,
            batch.latents,
            torch.tensor([0.3, 0.8]),
            random(2, *batch.latents.shape[1:], seed=seed),
        )


# ---------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_square_of_what_is_wrong_with_the_velocity():
    latents, noise, t = (
        random(3, 4, 2, 5),
        random(3, 4, 2, 5, seed=1),
        torch.tensor([0.1, 0.5, 0.9]),
    )

    def true(x, t):
        return (x - latents) / t[:, None, None, None]  # from x = (1 - t) · latents + t · noise

    assert training.rectified_flow_loss(true, latents, t, noise) < 1e-10
    wrong = random(3, 4, 2, 5, seed=2)
    expected = (wrong.double() - (noise.double() - latents.double())).square().sum() / wrong.numel()
    loss = training.rectified_flow_loss(lambda x, t: wrong, latents, t, noise)
    assert abs(loss.item() / expected.item() - 1) < 1e-6


def test_times_are_logit_normal_times_shifted_as_the_sampler_shifts():
    normal, mu = random(100).double(), 1.3
    t = 1 / (1 + torch.exp(-normal))
    shifted = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    assert max_error(training.shifted_times(normal, mu), shifted) < 1e-15


@pytest.mark.parametrize(
    "name, tokens, mu",
    [  # of the samplers: what BFL's and diffusers' codes compute
        ("flux.1-dev", 4096, 1.15),
        ("flux.1-dev", 256, 0.5),
        ("flux.2-dev", 4096, 2.0233511571292637),
        ("flux.1-schnell", 4096, 0.0),
    ],
)
def test_the_shift_is_that_of_the_model(name, tokens, mu):
    assert training.mu_of(MODELS[name], tokens) == pytest.approx(mu, abs=1e-12)


@pytest.mark.parametrize("model", ["flux.1-dev", "flux.2-dev", "flux.2-klein-4b"])
@pytest.mark.parametrize("references", [False, True])
def test_velocity_is_that_of_diffusers(model, references):
    spec = tiny_models(clip_eos=999)[model]
    parts = networks(spec)
    theirs, network = diffusers_pipeline(spec, parts).transformer, parts["transformer"]
    batch, x, t = (
        a_batch(spec.transformer, references=references),
        random(2, spec.transformer.out_channels, 3, 4),
        torch.tensor([0.3, 0.8]),
    )
    axes = len(spec.transformer.axes_dim)
    img, ids = x.flatten(2).mT, sampling.image_ids(3, 4, axes)
    if references:
        img, ids = torch.cat([img, batch.references], dim=1), torch.cat([ids, batch.reference_ids])
    guidance = torch.tensor([1.7, 1.7]) if spec.transformer.guidance else None
    expected = diffusers_velocity(
        theirs,
        img,
        ids,
        batch.features.tokens,
        sampling.text_ids(7, axes),
        t,
        guidance,
        batch.features.pooled,
    )
    ours = training.velocity(network, batch, 1.7, x, t)
    assert max_error(ours.flatten(2).mT, expected[:, :12]) < 2e-5


# ---------------------------------------------------------------------------------------------------------- memory


@every_family
def test_recomputed_blocks_give_the_same_gradients(family):
    gradients = []
    for recomputed in (False, True):
        network = randomise(Flux(CONFIGS[family])).requires_grad_(True)
        if recomputed:
            training.enable_gradient_checkpointing(network)
        loss_of(network).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["flux.1-dev", "flux.2-klein-4b"])
def test_memory_is_what_a_real_pass_keeps(family, dtype, rank):
    spec = tiny_models(clip_eos=999)[family]

    def make() -> Flux:
        network = Flux(spec.transformer)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype if rank else torch.float32)
        if rank:
            adapters.add_lora(network, rank)
        return network

    told = training.memory(spec, make, 12, 2, CPU, dtype, ema=True, recompute=False)
    network, c = make(), spec.transformer
    owned, kept = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = (
            x.untyped_storage()
        )  # held, so that no address is used twice
        return x

    features = TextFeatures(
        random(2, spec.text_length, c.context_dim),
        random(2, c.vector_dim) if c.vector_dim else None,
    )
    batch = training.Batch(random(2, c.out_channels, 3, 4), features)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        training.computing(CPU, dtype),
    ):
        velocity = partial(training.velocity, network, batch, 1.0)
        training.rectified_flow_loss(
            velocity, batch.latents, torch.tensor([0.3, 0.8]), batch.latents
        )
    real = sum(storage.nbytes() for address, storage in kept.items() if address not in owned)
    # what a real pass makes of views may be one tensor more or less than what a fake one does
    assert told.activations == pytest.approx(real, rel=0.02)
    assert told.weights == sum(p.nbytes for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert told.states == 4 * 4 * trained  # a gradient, two moments, an average
    less = training.memory(spec, make, 12, 2, CPU, dtype, ema=False, recompute=True)
    assert less.states == 3 * 4 * trained and less.activations < 0.6 * told.activations


def test_master_weights_take_steps_that_bfloat16_would_lose():
    network = randomise(Flux(KLEIN_TINY)).requires_grad_(True)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    trainer = training.Trainer(network, Path("nowhere"), {}, steps=100, rate=1e-6, weight_decay=0)
    trainer.update([partial(loss_of, network, 0, torch.bfloat16)])
    name = "single_blocks.0.linear1.weight"
    moved = network.get_parameter(name).detach() - before[name]
    assert network.get_parameter(name).dtype == torch.float32
    assert (
        0 < moved.abs().max() <= 1.1e-6 and (moved != 0).float().mean() > 0.9
    )  # Adam's first step is the rate
    kept = before[name].bfloat16()
    assert (
        kept + moved.bfloat16() == kept
    ).float().mean() > 0.9  # near 0.1, a bfloat16 moves by 0.0005 or not at all


# ---------------------------------------------------------------------------------------------------------- the trainer


def trainer(path: Path, ema: float | None = 0.9, about=None, **options) -> training.Trainer:
    torch.manual_seed(3)
    options = dict(steps=6, rate=0.05, warmup=2) | options
    return training.Trainer(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        path,
        about or {"model": "a"},
        ema=ema,
        **options,
    )


def a_loss(trainer: training.Trainer, number: int):
    return lambda: (trainer.module(random(5, 4, seed=number)) - number).square().mean()


def state(trainer: training.Trainer) -> dict[str, Tensor]:
    moments = training.optimizer_tensors(trainer.optimizer, "optimizer.")
    average = {f"average.{name}": x for name, x in trainer.average.items()}
    return {
        name: x.detach().clone()
        for name, x in (dict(trainer.module.named_parameters()) | average | moments).items()
    }


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, ema):
    whole = trainer(tmp_path / "whole.safetensors", ema)
    losses = [whole.update([a_loss(whole, 2 * n), a_loss(whole, 2 * n + 1)]) for n in range(6)]
    first = trainer(tmp_path / "parts.safetensors", ema)
    for n in range(3):
        first.update([a_loss(first, 2 * n), a_loss(first, 2 * n + 1)])
    first.save()
    first.update([a_loss(first, 100)])  # lost: it is not in the checkpoint
    second = trainer(tmp_path / "parts.safetensors", ema)
    assert second.step == 3
    assert [
        second.update([a_loss(second, 2 * n), a_loss(second, 2 * n + 1)]) for n in range(3, 6)
    ] == losses[3:]
    a, b = state(whole), state(second)
    assert a.keys() == b.keys() and len(a) == (16 if ema is None else 20)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_moments_of_a_byte_each(tmp_path):
    """bitsandbytes' AdamW: stopped and gone on with bit for bit, as large as is told, and nearly where torch's goes."""

    def run(name: str, kind: str = "adamw8bit") -> training.Trainer:
        torch.manual_seed(3)
        module = nn.Sequential(
            nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1)
        )
        return training.Trainer(
            module, tmp_path / name, {"model": "a"}, steps=6, rate=1e-2, kind=kind
        )

    def go(trainer: training.Trainer, last: int = 6) -> Tensor:
        while trainer.step < last:
            x = random(5, 64, seed=trainer.step)
            trainer.update([lambda x=x: (trainer.module(x) - 1).square().mean()])
        return nn.utils.parameters_to_vector(trainer.module.parameters()).detach()

    begun = go(run("a"), last=0)
    whole, exact = run("a"), go(run("b", "adamw"))
    ended, first = go(whole), run("c")
    go(first, last=3)
    first.save()
    second = run("c")
    assert second.step == 3 and torch.equal(go(second), ended)
    a, b = state(whole), state(second)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    kept = sum(
        x.nbytes
        for name, x in a.items()
        if name.split(".")[-1] in ("state1", "state2", "absmax1", "absmax2")
    )
    assert kept == sum(training.moments("adamw8bit", p) for p in whole.module.parameters())
    assert 0.25 < kept / sum(training.moments("adamw", p) for p in whole.module.parameters()) < 0.3
    assert (ended - exact).norm() < 0.1 * (
        exact - begun
    ).norm()  # eight bits a moment; 1 is one that does not move


def test_steps_are_those_of_adamw_on_the_mean_gradient(tmp_path):
    ours, theirs = trainer(tmp_path / "x"), trainer(tmp_path / "x").module
    optimizer = torch.optim.AdamW(theirs.parameters(), 0.05, (0.9, 0.99), weight_decay=0.01)
    for step, rate in enumerate(
        (0.025, 0.05 * 0.5 * (1 + math.cos(math.pi / 6)), 0.05 * 0.75, 0.025)
    ):
        assert ours.current_rate == pytest.approx(rate)
        value, length = ours.update([a_loss(ours, 2 * step), a_loss(ours, 2 * step + 1)])
        mean = (
            sum(
                (theirs(random(5, 4, seed=n)) - n).square().mean() for n in (2 * step, 2 * step + 1)
            )
            / 2
        )
        optimizer.zero_grad()
        mean.backward()
        whole = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
        for p in theirs.parameters():
            p.grad /= max(1, whole)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert value == pytest.approx(mean.item(), rel=1e-5) and length == pytest.approx(
            whole.item(), rel=1e-5
        )
    for a, b in zip(ours.module.parameters(), theirs.parameters(), strict=True):
        assert max_error(a.detach(), b.detach()) < 1e-5


def test_the_average_is_exponential_and_stands_in_when_asked(tmp_path):
    ours = trainer(tmp_path / "x", ema=0.2)
    expected, name = ours.module[0].weight.detach().double().clone(), "0.weight"
    for step in range(1, 5):
        ours.update([a_loss(ours, step)])
        decay = min(0.2, step / (step + 20))
        expected = decay * expected + (1 - decay) * ours.module[0].weight.detach().double()
    assert max_error(ours.average[name].double(), expected) < 1e-6
    live = ours.module[0].weight.detach().clone()
    with ours.averaged():
        assert torch.equal(ours.module[0].weight, ours.average[name]) and not torch.equal(
            live, ours.average[name]
        )
    assert torch.equal(ours.module[0].weight, live)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_takes_no_step(tmp_path, what):
    ours = trainer(tmp_path / "x")
    ours.update([a_loss(ours, 1)])
    before = state(ours)
    # the root of 0 is finite, and its slope is not
    bad = (
        (lambda: ours.module(random(5, 4)).mean() * math.nan)
        if what == "loss"
        else lambda: (ours.module(random(5, 4)) * 0).sum().sqrt()
    )
    with pytest.raises(NonFiniteError, match="at step 2 the loss is"):
        ours.update([a_loss(ours, 2), bad])
    after = state(ours)
    assert ours.step == 1 and all(torch.equal(before[name], after[name]) for name in before)
    twin = trainer(tmp_path / "x")
    twin.update([a_loss(twin, 1)])
    assert ours.update([a_loss(ours, 2)]) == twin.update(
        [a_loss(twin, 2)]
    )  # no gradient was left over


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer(tmp_path / "x.safetensors").save()
    told = refusal(trainer, tmp_path / "x.safetensors", about={"model": "b"})
    assert (
        "is of another run: its model is a, and now it is b; give the same as then, or another folder"
        in told
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert "is not a checkpoint of a training run" in refusal(trainer, tmp_path / "y.safetensors")
    (tmp_path / "z.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-10])
    assert "is truncated" in refusal(trainer, tmp_path / "z.safetensors")


def test_files_may_be_read_by_whom_the_user_lets_read_others(tmp_path):
    (tmp_path / "plain").touch()
    training.write(tmp_path / "lora.safetensors", {"a": torch.ones(2)})
    assert (tmp_path / "lora.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """Of a full disk there is a limit on the size of files, which is told in the same way."""
    ours, path = trainer(tmp_path / "x.safetensors"), tmp_path / "x.safetensors"
    ours.save()
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ours.update([a_loss(ours, 1)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        told = refusal(ours.save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        "x.safetensors could not be written (" in told
        and "File too large" in told
        and "make room" in told
    )
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    ours, path = trainer(tmp_path / "x.safetensors"), tmp_path / "x.safetensors"
    ours.save()
    before, saved = path.read_bytes(), state(ours)
    ours.update([a_loss(ours, 1)])

    def nothing(*_, **__):
        return (_ for _ in ()).throw(KeyboardInterrupt)

    monkeypatch.setattr(
        Path, "replace", nothing
    )  # the last moment at which the new one is not there
    unlink = Path.unlink  # a process that is killed does not clean up
    monkeypatch.setattr(
        Path, "unlink", lambda path, **how: path.suffix == ".part" or unlink(path, **how)
    )
    with pytest.raises(KeyboardInterrupt):
        ours.save()
    monkeypatch.undo()
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    again = state(trainer(path))
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert list(tmp_path.iterdir()) == [path]

"""Where a researcher cuts: solvers, times, velocity, gradients, masks, residuals, taps, encoders.

On the embedded models, at 64x64: 16 image tokens. Nothing depends on what they paint.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

import flux
from flux import sampling, solvers
from flux.configs import MODELS
from flux.errors import UserError
from flux.hooks import Tap
from flux.parity.reference import max_error
from flux.text_encoder import TextEncoder, TextFeatures
from flux.transformer import Residuals
from flux.weights import locate

PROMPT = "a red circle on a blue background"
SIZE = dict(width=64, height=64)
both = pytest.mark.parametrize("name", ["flux.2-tiny", "flux.1-tiny"])


@pytest.fixture(scope="module")
def pipes():
    return {name: flux.load(name, device="cpu") for name in ("flux.1-tiny", "flux.2-tiny")}


@pytest.fixture(scope="module")
def pipe(pipes):
    return pipes["flux.2-tiny"]


@pytest.fixture(scope="module")
def features(pipe):
    return pipe.encode(PROMPT)


def grid(pipe, seed: int = 0, count: int = 1) -> Tensor:
    channels = pipe.spec.autoencoder.latent_channels
    return sampling.noise(range(seed, seed + count), channels, 4, 4, spatial=pipe.spec.flux1)


# ------------------------------------------------------------------ solvers and times


def test_solvers_by_name_and_as_functions_run(pipe, features):
    def sample(solver, **options):
        return pipe.sample(features, [3], **SIZE, steps=2, solver=solver, **options)

    plain = pipe.sample(features, [3], **SIZE, steps=2)
    made = {name: sample(name) for name in solvers.SOLVERS}
    assert torch.equal(made["euler"], plain) and torch.equal(sample(solvers.euler), plain)
    assert torch.equal(made["heun"], sample(solvers.heun))
    assert all(not torch.equal(made[name], plain) for name in ("heun", "midpoint", "dpmpp_2m_sde"))
    seen = []

    def own(velocity, x, times, callback, blend):
        seen.append((tuple(x.shape), len(times), blend))
        assert velocity(x, 0.0).shape == velocity(x, 0.123).shape == x.shape
        return solvers.euler(velocity, x, times, callback, blend)

    assert torch.equal(sample(own), plain) and seen == [((1, 16, 64), 3, None)]
    with pytest.raises(UserError, match="solver: there is none .*'huen', expected euler, heun"):
        sample("huen")
    with pytest.raises(UserError, match="solver: there is none"):
        pipe(PROMPT, **SIZE, solver=3)


def test_solvers_other_than_euler_have_exact_numerics_only():
    pipe = flux.load(numerics="bfl", device="cpu")
    with pytest.raises(UserError, match='only euler rounds as BFL .* Use `numerics="exact"`'):
        pipe(PROMPT, **SIZE, steps=1, solver="heun")


def test_noise_of_a_stochastic_solver_belongs_to_the_seed(pipe, features):
    def sample(*seeds):
        return pipe.sample(features, seeds, **SIZE, steps=3, guidance=1.0, solver="dpmpp_2m_sde")

    two = sample(4, 5)
    assert torch.equal(two, sample(4, 5))
    assert max_error(two[1:], sample(5)) < 1e-5  # matrix products sum in another order
    assert max_error(two[1:], sample(6)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["model", "block"])
def test_solvers_find_their_modulations_when_networks_leave_memory(pipe, features, offload):
    other = flux.load(device="cpu", offload=offload)
    for solver in ("heun", "midpoint"):
        options = dict(**SIZE, steps=2, solver=solver)
        assert torch.equal(
            other.sample(features, [3], **options), pipe.sample(features, [3], **options)
        )


def test_times_of_the_user_equal_diffusers():
    """Its scheduler with a fixed shift, and with given sigmas."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = [1.0, 0.8, 0.5, 0.15]
    for shift in (1.0, 3.0, 0.7):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.array(sigmas))
        ours = sampling.custom_schedule(4, [*sigmas, 0.0], shift)
        assert (ours - scheduler.sigmas).abs().max() <= 1.2e-7
    mu = sampling.calculate_shift(1024)
    assert torch.equal(
        sampling.custom_schedule(28, shift=float(np.exp(mu))), sampling.schedule("linear", 28, 1024)
    )


def test_sigmas_and_shift_choose_the_times(pipe, features):
    def times(**options):
        seen = []
        pipe.sample(features, [0], **SIZE, callback=lambda step, t, x: seen.append(t), **options)
        return seen

    assert times(sigmas=[1, 0.5]) == times(sigmas=(1.0, 0.5, 0.0)) == [0.5, 0]
    assert times(sigmas=[1, 0.5], shift=3) == [0.75, 0]
    assert times(steps=2, shift=1) == [0.5, 0]
    own = sampling.schedule(pipe.spec.schedule, 3, 16)
    plain = pipe.sample(features, [0], **SIZE, steps=3)
    assert torch.equal(plain, pipe.sample(features, [0], **SIZE, sigmas=own.tolist()))
    for wrong in ([0.5, 0.6], [1.2, 0.5], [], [0], [1, 1, 0], [1, float("nan")]):
        with pytest.raises(UserError, match="^sigmas: "):
            pipe.sample(features, [0], **SIZE, sigmas=wrong)
    with pytest.raises(UserError, match="sigmas: are for 2 steps .got 3.*Leave `steps` out"):
        pipe(PROMPT, **SIZE, sigmas=[1, 0.5], steps=3)
    for wrong in (0, -1, float("nan"), "much"):
        with pytest.raises(UserError, match="^shift: "):
            pipe(PROMPT, **SIZE, shift=wrong)


# ------------------------------------------------------------------ velocity


@both
def test_velocity_at_any_time_equals_the_network(pipes, name):
    pipe = pipes[name]
    features, x = pipe.encode(PROMPT), grid(pipe)
    guidance = 1.0 if pipe.spec.cfg else 3.0
    velocity = pipe.velocity(features, **SIZE, guidance=guidance)
    axes = len(pipe.spec.transformer.axes_dim)
    txt_ids = sampling.text_ids(features.tokens.shape[1], axes)
    network = flux.load(name, device="cpu", fast=False).transformer()
    for t in (1.0, 0.4567, 0.0):
        given = torch.tensor([guidance]) if pipe.spec.transformer.guidance else None
        tokens = network(
            x.flatten(2).mT,
            sampling.image_ids(4, 4, axes),
            features.tokens,
            txt_ids,
            torch.tensor([t]),
            given,
            features.pooled,
        )
        assert torch.equal(velocity(x, t), tokens.mT.unflatten(2, (4, 4)))


def test_velocity_steps_by_hand_equal_a_run(pipe, features):
    negative = pipe.encode("black")
    options = dict(**SIZE, guidance=2.5, negative=negative)
    velocity = pipe.velocity(features, batch=2, **options)
    x = grid(pipe, 7, 2)
    times = sampling.schedule(pipe.spec.schedule, 3, 16).tolist()
    for t, s in zip(times, times[1:]):
        x = x + (s - t) * velocity(x, t)
    assert torch.equal(x, pipe.sample(features, [7, 8], steps=3, **options))
    with pytest.raises(UserError, match="features: one prompt, or one for each"):
        pipe.velocity(pipe.encode(["a", "b"]), batch=3, **SIZE)


def test_to_latents_is_the_start_of_image_to_image(pipe):
    image = pipe(PROMPT, **SIZE, steps=1)[0]
    conditions = pipe.condition(flux.ImageInputs((image,), strength=0.5))
    latents = pipe.to_latents(image)
    assert torch.equal(latents, conditions.init) and not latents.is_inference()
    assert pipe.to_latents(image.resize((100, 70))).shape == (1, 64, 4, 6)
    assert pipe.to_pixels(latents).shape == (1, 3, 64, 64)


# ------------------------------------------------------------------ gradients


@both
def test_gradient_of_the_velocity_equals_a_difference(pipes, name):
    pipe = pipes[name]
    velocity = pipe.velocity(pipe.encode(PROMPT), **SIZE, guidance=2.0, gradients=True)
    x = grid(pipe)
    direction = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(velocity(x, 0.6).square().sum(), x)
    with torch.no_grad():
        ends = [velocity(x + h * direction, 0.6).double().square().sum() for h in (3e-3, -3e-3)]
    slope = (ends[0] - ends[1]).item() / 6e-3
    # seen: 2e-5, since float32 values are subtracted; the largest slope is 1
    error = (gradient * direction).sum().item() - slope
    assert abs(error) < 1e-4 * (gradient.norm() * direction.norm()).item()


def test_gradients_pass_through_sampling_and_decoding(pipe, features):
    tokens = features.tokens.clone().requires_grad_()
    latents = pipe.sample(
        features._replace(tokens=tokens), [0], **SIZE, steps=2, guidance=1.0, gradients=True
    )
    pixels = pipe.to_pixels(latents, gradients=True)
    assert pixels.shape == (1, 3, 64, 64)
    (gradient,) = torch.autograd.grad(pixels.mean(), tokens)
    assert gradient.isfinite().all() and gradient.norm() > 0
    plain = pipe.sample(features, [0], **SIZE, steps=2, guidance=1.0)
    assert not plain.requires_grad and max_error(latents.detach(), plain) < 1e-5
    streamed = flux.load(device="cpu", offload="block")
    with pytest.raises(UserError, match='gradients: .* Use `offload="none"`'):
        streamed.sample(features, [0], **SIZE, steps=1, gradients=True)


# ------------------------------------------------------------------ masks, ids, residuals


@both
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_masked_text_token_is_as_if_it_were_not_there(name, fast, pipes):
    """With the other tokens' positions kept by `ids`."""
    pipe = pipes[name] if fast else flux.load(name, device="cpu", fast=False)
    whole = pipe.encode(PROMPT)
    length = whole.tokens.shape[1]
    kept = [index for index in range(length) if index != 2]
    ids = sampling.text_ids(length, len(pipe.spec.transformer.axes_dim))
    visible = torch.ones(length + 16, length + 16, dtype=torch.bool)
    visible[:, 2] = False
    options = dict(seeds=[0], **SIZE, steps=2, guidance=1.0 if pipe.spec.cfg else None)
    masked = pipe.sample(whole._replace(mask=visible), **options)
    without = whole._replace(tokens=whole.tokens[:, kept], ids=ids[kept])
    assert max_error(masked, pipe.sample(without, **options)) < 1e-5
    assert max_error(masked, pipe.sample(whole, **options)) > 1e-3
    if not pipe.spec.flux1:  # whose text has no positions
        moved = whole._replace(tokens=whole.tokens[:, kept])
        assert max_error(masked, pipe.sample(moved, **options)) > 1e-4


def test_wrong_masks_and_ids_are_refused(pipe, features):
    for name, wrong in (
        ("mask", torch.ones(3, 3, dtype=torch.bool)),
        ("ids", torch.zeros(5, 4, dtype=torch.int64)),
    ):
        with pytest.raises(UserError, match=f"features: `{name}` must be"):
            pipe.sample(features._replace(**{name: wrong}), [0], **SIZE, steps=1)
        with pytest.raises(UserError, match="cannot be extended"):
            features._replace(**{name: wrong}).append(torch.zeros(1, 1, 384))


@both
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_residuals_equal_hooks_that_add_them(name, fast):
    pipe = flux.load(name, device="cpu", fast=fast)
    c, features = pipe.spec.transformer, pipe.encode(PROMPT)
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(c.depth + c.depth_single, 1, 16, c.hidden_size, generator=generator)
    double, single = made[: c.depth], made[c.depth :]
    calls = []

    def residuals(img, img_ids, txt, txt_ids, t, guidance, vector):
        calls.append((pipe.now.branch, pipe.now.step, t.item()))
        assert img_ids.shape == (16, len(c.axes_dim)) and len(txt_ids) == txt.shape[1]
        return Residuals([*double], [None, *single[1:]])

    options = dict(seeds=[1], **SIZE, steps=1, guidance=2.0)
    ours = pipe.sample(features, **options, residuals=residuals)
    assert calls[0] == ("conditional", 1, 1.0)
    assert len(calls) == (2 if pipe.spec.cfg else 1)

    def add(network):
        for block, x in zip(network.double_blocks, double):
            block.register_forward_hook(lambda m, args, out, x=x: (out[0] + x, out[1]))
        for block, x in zip(network.single_blocks[1:], single[1:]):
            block.register_forward_hook(
                lambda m, args, out, x=x: torch.cat([out[:, :-16], out[:, -16:] + x], 1)
            )

    end = pipe.transformer.on_load(add)
    assert torch.equal(ours, pipe.sample(features, **options))
    end()
    assert max_error(ours, pipe.sample(features, **options)) > 0.01


# ------------------------------------------------------------------ taps


@pytest.mark.parametrize("offload", [None, pytest.param("model", marks=pytest.mark.slow)])
def test_watch_labels_steps_and_branches(pipe, offload):
    pipe = flux.load(device="cpu", offload=offload)
    seen = []
    only = ["*/single_blocks.1/attention/q", "*/final_layer/out"]
    with pipe.watch(lambda tap, x: seen.append((tap, x.clone())), only):
        latents = pipe.sample(pipe.encode(PROMPT), [0], **SIZE, steps=2, guidance=2.0)
    pipe.sample(pipe.encode(PROMPT), [0], **SIZE, steps=1)
    times = sampling.schedule(pipe.spec.schedule, 2, 16).tolist()
    assert [tap for tap, _ in seen] == [
        Tap(step, times[step - 1], branch, *place)
        for step in (1, 2)
        for branch in ("conditional", "unconditional")
        for place in (("single_blocks.1", "attention/q"), ("final_layer", "out"))
    ]
    assert str(seen[0][0]) == "step.001/conditional/single_blocks.1/attention/q"
    assert seen[0][1].shape[1] == pipe.spec.transformer.num_heads
    # the two branches' velocities make the run
    x = grid(pipe).flatten(2).mT
    outs = [x for tap, x in seen if tap.module == "final_layer"]
    for step in range(2):
        v = sampling.classifier_free_guidance(*outs[2 * step : 2 * step + 2], 2.0)
        x = x + (times[step + 1] - times[step]) * v
    assert torch.equal(x.mT.unflatten(2, (4, 4)), latents)
    assert (pipe.now.step, pipe.now.branch) == (0, "")


def test_callback_knows_its_step(pipe, features):
    steps = []
    pipe.sample(
        features,
        [0],
        **SIZE,
        steps=2,
        callback=lambda step, *_: steps.append((step, pipe.now.step)),
    )
    assert steps == [(1, 1), (2, 2)]


# ------------------------------------------------------------------ text


@both
def test_positions_of_a_word_are_its_tokens(pipes, name):
    """The features of exactly these tokens change with the word's case-less neighbours kept."""
    text = pipes[name].text
    tokenizer = text.t5_tokenizer if pipes[name].spec.flux1 else text.tokenizer
    for word in ("red", "circle", "blue background"):
        found = text.positions(PROMPT, word)
        ids = tokenizer([PROMPT], text.length).ids[0, found]
        decoded = tokenizer.tokenizer.decode(ids.tolist()).replace("\u2581", " ")
        assert decoded.replace(" ", "") == word.replace(" ", "")
    for wrong in ("green", ""):
        with pytest.raises(UserError, match="word: '.*' is not in the prompt"):
            text.positions(PROMPT, wrong)
    with pytest.raises(UserError, match="word: 'green' is beyond"):
        text.positions("a red circle, " * 50 + "green", "green")


class Words(TextEncoder):
    """A vector for each word, and no network."""

    def __init__(self, width: int):
        super().__init__(16)
        self.width = width

    def encode_one(self, prompt: str) -> TextFeatures:
        rows = [torch.full((self.width,), len(word) / 10) for word in prompt.split()]
        rows += [torch.zeros(self.width)] * (self.length - len(rows))
        return TextFeatures(torch.stack(rows)[None])


@pytest.mark.slow
def test_an_own_text_encoder_needs_no_files(monkeypatch):
    def located(spec, choices, weights):
        assert not any("text_encoder" in name or "tokenizer" in name for name in choices)
        return original(spec, choices, weights)

    original = locate._locate
    monkeypatch.setattr(locate, "_locate", located)
    text = Words(MODELS["flux.2-tiny"].transformer.context_dim)
    for offload in (None, "model"):
        pipe = flux.load(text=text, device="cpu", offload=offload)
        assert pipe("a b c", **SIZE, steps=1)[0].size == (64, 64)
        assert pipe.prompts_ahead > 1
    assert list(text.cache) == ["a b c", ""]
    with pytest.raises(UserError, match="text: must be a flux.TextEncoder"):
        flux.load(text="qwen")

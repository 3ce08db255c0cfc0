"""flux.sampling: schedules, positions, noise and Euler's method.

References: schedules computed by Black Forest Labs' and diffusers' code, kept here as numbers;
diffusers 0.42.1, live; differential equations with a closed solution.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flux import sampling
from flux.errors import NonFiniteError
from flux.transformer import NUMERICS

ULP = 1.2e-7  # of float32, below 1
SHIFTED = [
    ("linear", 28, 4096),
    ("linear", 50, 4080),
    ("linear", 1, 16),
    ("empirical", 4, 4096),
    ("empirical", 50, 4096),
    ("empirical", 28, 1024),
    ("empirical", 4, 4300),
    ("empirical", 4, 4301),
    ("empirical", 250, 8100),
]
# kind, steps, tokens, bits: get_schedule of black-forest-labs/flux 802fb47 and flux2 ab7cca6,
# with torch 2.13
BFL_TIMES = [
    ("linear", 28, 4096, 428816592955),
    ("linear", 50, 4080, 1345933120845),
    ("linear", 1, 16, 1065353216),
    ("linear", 30, 1560, 489974707076),
    ("empirical", 4, 4096, 10632191532),
    ("empirical", 50, 4096, 1350971399039),
    ("empirical", 28, 1024, 430114159414),
    ("empirical", 4, 4300, 10632488194),
    ("empirical", 4, 4301, 10606528701),
    ("empirical", 250, 8100, 33199498847691),
    ("unshifted", 4, 4096, 10552868864),
    ("unshifted", 7, 100, 29466783169),
]
steps_, tokens_ = st.integers(1, 1000), st.integers(16, 65536)
MODERATE = settings(max_examples=50, deadline=None)


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    "kind, steps, tokens, first, last",
    [
        # The sigmas of diffusers 0.42.1's scheduler, with the settings of FLUX.1-dev and -schnell.
        ("linear", 28, 4096, [1, 0.988408625, 0.976222456, 0.963394403, 0.949872553], 0.104720898),
        ("linear", 50, 4096, [1], 0.060550276),
        ("linear", 28, 1024, [1, 0.980655968, 0.960643768], 0.0650196),
        ("unshifted", 4, 4096, [1, 0.75, 0.5, 0.25], 0.25),
        # The same scheduler with FLUX.2's mu; BFL's flux2 code is within 1.2e-7.
        ("empirical", 4, 4096, [1, 0.9673840404, 0.9081439376, 0.7671999335], 0.7671999335),
        ("empirical", 50, 4096, [1, 0.9973090887, 0.9945213795, 0.9916315675, 0.9886339903], None),
    ],
)
def test_schedule_equals_published_times(kind, steps, tokens, first, last):
    times = sampling.schedule(kind, steps, tokens)
    assert times.dtype == torch.float32 and times.shape == (steps + 1,)
    assert times[: len(first)].tolist() == pytest.approx(first, rel=ULP)
    assert last is None or times[-2].item() == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize(
    "width, height, times",
    [
        # Four steps of the distilled FLUX.2 [klein], by BFL's get_schedule, as printed.
        (1024, 1024, [1, 0.96738, 0.90814, 0.76720, 0]),
        (512, 512, [1, 0.95809, 0.88398, 0.71750, 0]),
        (1360, 768, [1, 0.96734, 0.90803, 0.76696, 0]),
        (1440, 1440, [1, 0.9491, 0.8615, 0.6746, 0]),
    ],
)
def test_klein_schedule_equals_published_times(width, height, times):
    assert sampling.schedule(
        "empirical", 4, width // 16 * (height // 16)
    ).tolist() == pytest.approx(times, abs=5.1e-5)


def test_mu_equals_published_values():
    """By BFL's code. FLUX.2's mu drops above 4300 tokens, and ignores the steps there."""
    assert [sampling.calculate_shift(n) for n in (256, 1024, 4080, 4096)] == pytest.approx(
        [0.5, 0.63, 1.14729166, 1.15], abs=1e-8
    )
    assert sampling.compute_empirical_mu(4096, 4) == pytest.approx(2.291179894115571, rel=1e-14)
    assert sampling.compute_empirical_mu(4096, 50) == pytest.approx(2.0233511571292637, rel=1e-14)
    assert sampling.compute_empirical_mu(4096, 28) == pytest.approx(2.151443161774889, rel=1e-14)
    cliff = [sampling.compute_empirical_mu(n, s) for s in (4, 50) for n in (4300, 4301)]
    assert cliff == pytest.approx([2.3085, 1.1847, 2.0447, 1.1847], abs=5e-5)
    assert (
        sampling.compute_empirical_mu(8100, 4)
        == sampling.compute_empirical_mu(8100, 50)
        == pytest.approx(1.8278, abs=5e-5)
    )


def by_diffusers(kind: str, steps: int, tokens: int):
    """Return diffusers' scheduler after `set_timesteps`, called as its pipelines do."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    sigmas = np.linspace(1.0, 1 / steps, steps)
    if kind == "unshifted":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=sigmas)
        return scheduler
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    mu = (
        calculate_shift(tokens, 256, 4096, 0.5, 1.15)
        if kind == "linear"
        else compute_empirical_mu(tokens, steps)
    )
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler


@pytest.mark.parametrize(
    "kind, steps, tokens", [*SHIFTED, ("unshifted", 4, 4096), ("unshifted", 7, 100)]
)
def test_schedule_equals_diffusers(kind, steps, tokens):
    """To the bit with diffusers' arithmetic. The default rounds once, from float64."""
    theirs = by_diffusers(kind, steps, tokens).sigmas
    assert torch.equal(sampling.schedule(kind, steps, tokens, rounding="diffusers"), theirs)
    assert (sampling.schedule(kind, steps, tokens) - theirs).abs().max() <= ULP


@MODERATE
@given(kind=st.sampled_from(["unshifted", "linear", "empirical"]), steps=steps_, tokens=tokens_)
def test_diffusers_schedule_equals_diffusers_to_the_bit(kind, steps, tokens):
    theirs = by_diffusers(kind, steps, tokens).sigmas
    assert torch.equal(sampling.schedule(kind, steps, tokens, rounding="diffusers"), theirs)


@pytest.mark.parametrize("kind, steps, tokens, bits", BFL_TIMES)
def test_bfl_schedule_equals_bfl_to_the_bit(kind, steps, tokens, bits):
    """A weighted sum of the times' int32 views: an ulp off in one of them would change the sum."""
    times = sampling.schedule(kind, steps, tokens, rounding="bfl")
    weights = torch.arange(1, len(times) + 1)
    assert (times.view(torch.int32).long() * weights).sum().item() == bits


@pytest.mark.parametrize("kind", ["unshifted", "linear", "empirical"])
@MODERATE
@given(steps=steps_, tokens=tokens_)
def test_times_fall_from_one_to_zero(kind, steps, tokens):
    times = sampling.schedule(kind, steps, tokens)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() <= 0).all()
    if tokens <= 16384:  # above, the first of very many steps have equal times in float32
        assert (times.diff() < 0).all()


@pytest.mark.parametrize("kind, most", [("linear", 16384), ("empirical", 4300)])
@MODERATE
@given(data=st.data(), steps=st.integers(2, 100))
def test_larger_images_spend_more_steps_near_the_noise(kind, most, data, steps):
    few = data.draw(st.integers(16, most // 2))
    more = data.draw(st.integers(2 * few, most))
    before, after = (sampling.schedule(kind, steps, n)[1:-1] for n in (few, more))
    assert (after > before).all()


# ------------------------------------------------------------------ positions


def test_ids_equal_diffusers():
    from diffusers import Flux2Pipeline, FluxPipeline

    h, w, length = 3, 5, 7
    flux1 = FluxPipeline._prepare_latent_image_ids(1, h, w, "cpu", torch.float32)
    latents, text = torch.zeros(1, 8, h, w), torch.zeros(1, length, 4)
    assert sampling.image_ids(h, w, axes=3).tolist() == flux1.tolist()
    assert torch.equal(
        sampling.image_ids(h, w, axes=4), Flux2Pipeline._prepare_latent_ids(latents)[0]
    )
    assert torch.equal(sampling.text_ids(length, axes=4), Flux2Pipeline._prepare_text_ids(text)[0])
    references = Flux2Pipeline._prepare_image_ids([latents[0][None], torch.zeros(1, 8, w, h)])[0]
    assert torch.equal(
        torch.cat([sampling.image_ids(h, w, 4, t=10), sampling.image_ids(w, h, 4, t=20)]),
        references,
    )


def test_ids_count_rows_and_columns():
    assert sampling.image_ids(2, 3, axes=3, t=1).tolist() == [
        [1, r, c] for r in range(2) for c in range(3)
    ]
    assert sampling.image_ids(2, 3, axes=4).tolist() == [
        [0, r, c, 0] for r in range(2) for c in range(3)
    ]
    assert sampling.text_ids(4, axes=3).tolist() == [[0, 0, 0]] * 4
    assert sampling.text_ids(4, axes=4).tolist() == [[0, 0, 0, k] for k in range(4)]
    assert (
        sampling.image_ids(2, 3, axes=4).dtype == sampling.text_ids(4, axes=4).dtype == torch.int64
    )


# ------------------------------------------------------------------ noise


@pytest.mark.parametrize("spatial", [True, False])
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 4),
    count=st.integers(1, 3),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
)
def test_image_k_of_a_batch_has_the_noise_of_seed_k(spatial, seed, count, size):
    batch = sampling.noise(range(seed, seed + count), 8, *size, spatial)
    assert batch.shape == (count, 8, *size) and batch.dtype == torch.float32
    assert torch.equal(
        batch, torch.cat([sampling.noise([seed + k], 8, *size, spatial) for k in range(count)])
    )


def test_flux1_noise_equals_diffusers():
    """Drawn on the autoencoder's grid, then packed into tokens of 64 channels."""
    from diffusers import FluxPipeline

    drawn = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(7))
    tokens = FluxPipeline._pack_latents(drawn, 1, 16, 6, 10)  # (1, 15, 64)
    ours = sampling.noise([7], 64, 3, 5, spatial=True)
    assert torch.equal(ours.flatten(2).mT, tokens)


def test_flux2_noise_is_drawn_packed():
    drawn = torch.randn(1, 128, 3, 5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sampling.noise([7], 128, 3, 5, spatial=False), drawn)


@pytest.mark.parametrize("spatial", [True, False])
def test_noise_is_standard_normal_and_leaves_the_global_generator_alone(spatial):
    before = torch.get_rng_state()
    # 262144 numbers: the bounds are five standard errors
    x = sampling.noise([1, 2], 128, 32, 32, spatial).double()
    assert torch.equal(torch.get_rng_state(), before)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.007 and abs((x**4).mean() - 3) < 0.1
    assert abs((x[0] * x[1]).mean()) < 0.014 and abs((x[..., 1:] * x[..., :-1]).mean()) < 0.01


# ------------------------------------------------------------------ Euler's method


def even(steps: int) -> Tensor:
    return sampling.schedule("unshifted", steps, 0)


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 60), kind=st.sampled_from(["unshifted", "linear", "empirical"]))
def test_straight_line_ends_at_its_image_in_any_number_of_steps(steps, kind):
    generator = torch.Generator().manual_seed(steps)
    noise, image = torch.randn(2, 2, 3, 5, generator=generator)
    times = sampling.schedule(kind, steps, 1024)
    x = sampling.denoise(lambda x, t: noise - image, noise, times)
    assert (x - image).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 10, 250])
def test_euler_sums_equal_closed_forms(steps):
    """In N even steps, dx/dt = t leads from 0 to -(N + 1) / 2N, dx/dt = x from 1 to (1 - 1/N)^N."""
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    x = sampling.denoise(lambda x, t: torch.full_like(x, t), zero, even(steps))
    assert x.tolist() == pytest.approx([-(steps + 1) / (2 * steps)] * 3, rel=1e-6)
    x = sampling.denoise(lambda x, t: x, one, even(steps))
    assert x.tolist() == pytest.approx([(1 - 1 / steps) ** steps] * 3, rel=1e-5, abs=1e-12)


def test_velocity_gets_each_state_and_callback_gets_each_result():
    times, inputs, results = sampling.schedule("linear", 5, 1024), [], []

    def velocity(x: Tensor, t: float) -> Tensor:
        inputs.append((t, x))
        return torch.ones_like(x)

    x = sampling.denoise(velocity, torch.zeros(2), times, lambda *step: results.append(step))
    assert [t for t, _ in inputs] == times[:-1].tolist()
    assert [(step, t) for step, t, _ in results] == list(enumerate(times[1:].tolist(), start=1))
    states = [x for *_, x in results]
    assert all(torch.equal(x, before) for (_, x), before in zip(inputs[1:], states, strict=False))
    assert torch.equal(x, states[-1]) and x.tolist() == pytest.approx([-1, -1])


def bfloat16_run(
    numerics: str, steps: int = 12
) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """Run on random velocities. Return velocities, noise, the state after each step, and times."""
    generator, states = torch.Generator().manual_seed(3), []
    times = sampling.schedule("linear", steps, 1024)
    velocities = [torch.randn(64, generator=generator).bfloat16() for _ in range(steps)]
    noise, left = torch.randn(64, generator=generator), iter(velocities)

    def note(step, t, x):
        return states.append(x)

    sampling.denoise(lambda x, t: next(left), noise, times, note, NUMERICS[numerics].state)
    return velocities, noise, states, times


def test_bfloat16_state_of_diffusers_equals_its_scheduler():
    velocities, noise, states, _ = bfloat16_run("diffusers")
    scheduler = by_diffusers("linear", 12, 1024)
    x = noise.bfloat16()
    for v, t, state in zip(velocities, scheduler.timesteps, states, strict=True):
        x = scheduler.step(v, t, x, return_dict=False)[0]
        assert state.dtype == torch.bfloat16 and torch.equal(state, x)


def test_bfloat16_state_of_bfl_is_rounded_at_every_step():
    """As in BFL's `denoise`: img + (t_prev - t_curr) * pred, a float times a bfloat16 tensor."""
    velocities, noise, states, times = bfloat16_run("bfl")
    x = noise.bfloat16()
    for k, (v, state) in enumerate(zip(velocities, states, strict=True)):
        product = ((times[k + 1].item() - times[k].item()) * v.double()).bfloat16()
        x = (x.float() + product.float()).bfloat16()
        assert state.dtype == torch.bfloat16 and torch.equal(state, x)


def test_exact_state_is_float32_and_presets_differ():
    velocities, noise, states, times = bfloat16_run("exact")
    truth = noise.double() + sum(
        (b - a) * v.double() for a, b, v in zip(times, times[1:], velocities, strict=False)
    )
    assert states[-1].dtype == torch.float32 and (states[-1] - truth).abs().max() <= 2e-6
    ends = {name: bfloat16_run(name)[2][-1].double() for name in ("bfl", "diffusers")}
    assert all(1e-4 < (end - truth).abs().max() < 0.1 for end in ends.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_state_raises_with_its_step(value):
    steps = []

    def velocity(x: Tensor, t: float) -> Tensor:
        return torch.where(torch.arange(4) == 2, value, 0.0) if t < 0.5 else torch.zeros(4)

    with pytest.raises(
        NonFiniteError, match=r"step 4 of 5 \(t = 0.2000\).*check_finite=True.*dtype=float32"
    ):
        sampling.denoise(velocity, torch.zeros(4), even(5), lambda step, t, x: steps.append(step))
    assert steps == [1, 2, 3]


def test_classifier_free_guidance_is_linear():
    generator = torch.Generator().manual_seed(0)
    c, u = torch.randn(100, generator=generator), torch.randn(100, generator=generator)
    assert torch.equal(sampling.classifier_free_guidance(c, u, 0), u)
    assert torch.allclose(sampling.classifier_free_guidance(c, u, 1), c, rtol=0, atol=5e-7)
    assert torch.allclose(
        sampling.classifier_free_guidance(c, u, 4), 4 * c - 3 * u, rtol=0, atol=5e-6
    )
    assert sampling.classifier_free_guidance(torch.tensor(3.0), torch.tensor(1.0), 2.5) == 6


def test_strength_keeps_the_steps_that_diffusers_keeps():
    """As FluxImg2ImgPipeline.get_timesteps does with a scheduler of order 1."""
    from diffusers import FluxImg2ImgPipeline

    for steps in (1, 4, 28, 50):

        class Scheduled:
            class scheduler:
                timesteps, order, set_begin_index = torch.arange(steps), 1, lambda index: None

        times = even(steps)
        for strength in (0.01, 0.3, 0.6, 0.999, 1.0):
            left, count = FluxImg2ImgPipeline.get_timesteps(Scheduled, steps, strength, "cpu")
            ours = sampling.truncate_by_strength(times, strength)
            assert len(ours) - 1 == count == len(left)
            assert torch.equal(ours, times[steps - count :])


def test_bfl_strength_truncates_the_number_of_skipped_steps():
    """BFL's demos run 41 of 50 steps at strength 0.8: int((1 - 0.8) * 50) = 9."""
    times = even(50)
    assert len(sampling.truncate_by_strength(times, 0.8, "bfl")) - 1 == 41
    assert len(sampling.truncate_by_strength(times, 0.8)) - 1 == 40


def test_scale_noise_interpolates():
    # a quarter of the way to the noise
    assert sampling.scale_noise(torch.tensor(3.0), torch.tensor(-1.0), 0.25) == 2
    assert sampling.scale_noise(3.0, -1.0, 0) == 3 and sampling.scale_noise(3.0, -1.0, 1) == -1


def test_per_step_values_repeat_interpolate_or_stay():
    assert sampling.per_step_values([3], 4) == [3, 3, 3, 3]
    assert sampling.per_step_values([5, 2], 4) == [5, 4, 3, 2]
    assert sampling.per_step_values([1, 9, 2, 4], 4) == [1, 9, 2, 4]
    assert sampling.per_step_values([5, 2], 1) == [5]
    assert sampling.per_step_values([5, 2], 2) == [5, 2]
    assert sampling.per_step_values([7], 1) == [7]


def test_blend_runs_before_the_callback():
    """The second number is always the one that `blend` returns."""
    results = []

    def blend(x, t):
        return torch.stack([x[0], torch.tensor(100 * t)])

    def callback(step, t, x):
        results.append(x.tolist())

    x = sampling.denoise(lambda x, t: torch.ones(2), torch.zeros(2), even(4), callback, blend=blend)
    assert results == [[-0.25, 75], [-0.5, 50], [-0.75, 25], [-1, 0]] and x.tolist() == [-1, 0]


def test_times_of_flux3():
    """Literals of diffusers' scheduler with a shift of 6.93. Float32 errs by up to 1.2e-7."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    expected = {
        4: "1 .9541074 .8738966 .6978852 0",
        16: "1 .9904717 .9798021 .9677731 .9541074 .9384464 .9203186 .8990919 .8738966 .8435055 "
        ".8061264 .7590361 .6978852 .6152707 .4974874 .3160055 0",
        50: "1 .9970638 .9940234 .9908734 .9876077 .9842196 .9807024 .9770484 .9732496 .9692969 "
        ".9651811 .9608917 .9564176 .9517465 .9468651 .9417589 .936412 .9308071 .9249249 .9187444 "
        ".9122422 .9053926 .8981671 .8905336 .8824566 .8738966 .8648087 .8551425 .8448409 "
        ".8338395 .8220641 .8094302 .7958403 .7811816 .765323 .7481108 .729364 .7088677 .6863651 "
        ".6615464 .6340348 .6033666 .5689655 .530106 .4858612 .4350283 .3760173 .3066824 .2240543 "
        ".1239049 0",
    }
    for steps, literals in expected.items():
        times = sampling.schedule("constant", steps, tokens=1)
        assert times.tolist() == pytest.approx(list(map(float, literals.split())), abs=2e-7)
        assert torch.equal(times, sampling.schedule("constant", steps, tokens=9999))
    for steps in (1, 4, 16, 50):
        theirs = FlowMatchEulerDiscreteScheduler(shift=6.93)
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        found = sampling.schedule("constant", steps, 1, "diffusers")
        assert torch.equal(found, theirs.sigmas)
        for rounding in ("bfl", "float64"):
            other = sampling.schedule("constant", steps, 1, rounding)
            assert (other - found).abs().max() <= 2e-7 and other[0] == 1 and other[-1] == 0
    in_bfloat16 = 1000 * sampling.schedule("constant", 16, 1)[:-1].bfloat16()
    embedded = "1000 992 980 968 952 936 920 900 876 844 804 756 700 616 498 316"
    assert in_bfloat16.tolist() == list(map(float, embedded.split()))
    alpha = torch.linspace(1, 0, 17)  # the reference's line
    assert torch.equal(
        sampling.schedule("constant", 16, 1, "bfl"), 6.93 * alpha / (1 + (6.93 - 1) * alpha)
    )


def test_positions_of_flux3_are_halved():
    ids = sampling.flux3_image_ids(2, 3, reference=2)
    rows = [[0, y / 2, x / 2, -2] for y in range(2) for x in range(3)]
    assert ids.dtype == torch.float32 and ids.tolist() == rows
    assert sampling.flux3_image_ids(1, 2).tolist() == [[0, 0, 0, 0], [0, 0, 0.5, 0]]

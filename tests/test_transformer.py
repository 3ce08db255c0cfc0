"""flux.transformer against diffusers' transformers, live, with the same random weights: to the bit.

Literals pin the rest: roundings measured in Black Forest Labs' code, and the tensor and parameter
counts of the released files.
"""

from dataclasses import replace

import pytest
import torch
from support.transformer_inputs import inputs
from torch import nn

from flux.parity.reference import (
    FLUX1_TINY,
    FLUX2_TINY,
    KLEIN_TINY,
    SCHNELL_TINY,
    diffusers_transformer,
    diffusers_velocity,
    loaded,
    max_error,
    randomise,
    relative_l2,
    shapes,
    transformer_to_diffusers,
)
from flux.transformer import (
    NUMERICS,
    Flux,
    FluxConfig,
    KVCache,
    Numerics,
    QKNorm,
    RMSNorm,
    rope_table,
    scale_time,
    timestep_embedding,
)

TINY = {
    "flux.1-dev": FLUX1_TINY,
    "flux.1-schnell": SCHNELL_TINY,
    "flux.1-depth-dev": replace(FLUX1_TINY, in_channels=128),
    "flux.1-fill-dev": replace(FLUX1_TINY, in_channels=384),
    "flux.2-dev": FLUX2_TINY,
    "flux.2-klein": KLEIN_TINY,
}
every_model = pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())
either_family = pytest.mark.parametrize(
    "config", [FLUX1_TINY, FLUX2_TINY], ids=["flux.1", "flux.2"]
)


def model(config: FluxConfig, numerics: Numerics = NUMERICS["exact"]) -> Flux:
    return randomise(Flux(config, numerics))


def reference(ours: Flux) -> nn.Module:
    return loaded(
        diffusers_transformer(ours.config), transformer_to_diffusers(ours.state_dict(), ours.config)
    )


# ------------------------------------------------------------------ parity


@every_model
@torch.no_grad()
def test_float32_equals_diffusers(config):
    ours, batch = model(config), inputs(config)
    velocity, expected = ours(**batch), diffusers_velocity(reference(ours), **batch)
    assert velocity.shape == batch["img"].shape[:2] + (config.out_channels,)
    assert expected.std() > 0.5
    assert torch.equal(velocity, expected)


@every_model
@torch.no_grad()
def test_bfloat16_equals_diffusers_with_its_numerics(config):
    ours, batch = model(config, NUMERICS["diffusers"]).bfloat16(), inputs(config, torch.bfloat16)
    assert torch.equal(ours(**batch), diffusers_velocity(reference(ours), **batch))


@every_model
@torch.no_grad()
def test_exact_numerics_are_closest_to_float32(config):
    """Compare with float32 arithmetic on the same bfloat16 weights and inputs.

    Seen: exact 0.007 to 0.009. With guidance, diffusers 0.32 to 0.34 and BFL 0.43 to 0.46.
    Without, diffusers 0.07 and BFL 0.3.
    """
    batch, errors = inputs(config, torch.bfloat16), {}
    wide = {
        name: value.float() if value.is_floating_point() else value for name, value in batch.items()
    }
    truth = model(config).bfloat16().float()(**wide)
    for name, numerics in NUMERICS.items():
        velocity = model(config, numerics).bfloat16()(**batch)
        assert velocity.dtype == torch.bfloat16
        errors[name] = relative_l2(velocity, truth)
    assert 1e-3 < errors["exact"] <= 0.01
    assert errors["exact"] <= 0.15 * errors["diffusers"] <= 0.15 * errors["bfl"]


# ------------------------------------------------------------------ numerics


def test_scaled_time_is_rounded_as_published():
    """Literals from running both: they round guidance equally, but not the time of some steps."""
    guidance, t = torch.tensor([2.5, 3.5, 4, 7, 10, 30]), torch.tensor([0.90453, 0.7672])
    assert scale_time(guidance, "bfl", torch.bfloat16).tolist() == [
        2496,
        3504,
        4000,
        7008,
        9984,
        29952,
    ]
    assert scale_time(t, "bfl", torch.bfloat16).tolist() == [908, 764]
    assert scale_time(t, "diffusers", torch.bfloat16).tolist() == [904, 768]
    for rounding in ("float32", "bfl", "diffusers"):
        assert scale_time(t, rounding, torch.float32).tolist() == pytest.approx(
            [904.53, 767.2], rel=1e-7
        )
    assert scale_time(t, "float32", torch.bfloat16).tolist() == pytest.approx(
        [904.53, 767.2], rel=1e-7
    )


@either_family
@torch.no_grad()
def test_published_codes_round_guidance_but_exact_does_not(config):
    """Both codes round 2.5 and 2.496 to one guidance."""
    batch = inputs(config, torch.bfloat16)
    for name in NUMERICS:
        ours = model(config, NUMERICS[name]).bfloat16()
        a, b = (
            ours.vec(batch["t"], torch.full((2,), g), batch.get("vector")) for g in (2.5, 2.496)
        )
        assert torch.equal(a, b) == (name != "exact"), name


def test_bfl_rope_angles_are_float32():
    """BFL's formula, 1 / theta^(i/dim), in float32; within 3e-5 of the float64 table."""
    ids, frequency = (
        torch.arange(513)[:, None],
        1.0 / 2000 ** (torch.arange(0, 32, 2, dtype=torch.float32) / 32),
    )
    angle = torch.outer(torch.arange(513.0), frequency)
    narrow, wide = (rope_table(ids, (32,), 2000, dtype) for dtype in (torch.float32, torch.float64))
    assert narrow.dtype == wide.dtype == torch.float32 and narrow.shape == (513, 16, 2, 2)
    cos, sin = angle.cos(), angle.sin()
    assert torch.equal(narrow.flatten(-2), torch.stack([cos, -sin, sin, cos], dim=-1))
    assert 1e-6 < (narrow - wide).abs().max() <= 3e-5


def test_bfl_norm_rounds_before_it_scales():
    x = torch.randn(2, 1, 64, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    scales = torch.stack([torch.linspace(0.5, 2, 32), torch.linspace(3, 1, 32)]).bfloat16()
    scale = scales[:, None, None, None]
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    expected = {"before": (normed * scale).bfloat16(), "after": normed.bfloat16() * scale}
    assert not torch.equal(expected["before"], expected["after"])
    for order, value in expected.items():
        norm = QKNorm(32, Numerics(norm_scale=order)).bfloat16()
        norm.query_norm.scale.data, norm.key_norm.scale.data = scales
        q, k = norm(*x)
        assert torch.equal(q, value[0]) and torch.equal(k, value[1])


def test_timestep_embedding_has_cosines_then_sines():
    """The first angle is t, the last almost t / 10,000."""
    wave = timestep_embedding(torch.tensor([0.0, 2.0]))
    assert wave.shape == (2, 256)
    assert torch.equal(wave[0], torch.tensor([1.0] * 128 + [0.0] * 128))
    expected = [-0.4161468, 0.9092974, 2 * 10_000 ** (-127 / 128)]
    assert wave[1, [0, 128, 255]].tolist() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ properties


@either_family
@torch.no_grad()
def test_row_does_not_depend_on_its_batch(config):
    ours, batch = model(config), inputs(config)
    both = ours(**batch)
    for row in range(2):
        one = {
            name: value if name.endswith("ids") else value[row : row + 1]
            for name, value in batch.items()
        }
        assert max_error(ours(**one), both[row : row + 1]) <= 1e-6


@either_family
@torch.no_grad()
def test_image_tokens_are_ordered_by_ids_alone(config):
    ours, batch = model(config), inputs(config)
    velocity, order = (
        ours(**batch),
        torch.randperm(len(batch["img_ids"]), generator=torch.Generator().manual_seed(1)),
    )
    moved = batch | {"img": batch["img"][:, order], "img_ids": batch["img_ids"][order]}
    assert max_error(ours(**moved), velocity[:, order]) <= 2e-6
    assert max_error(ours(**moved | {"img_ids": batch["img_ids"]}), velocity[:, order]) > 0.01


@torch.no_grad()
def test_text_tokens_are_ordered_by_ids_alone():
    ours, batch = model(FLUX2_TINY), inputs(FLUX2_TINY)
    velocity, order = ours(**batch), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = batch | {"txt": batch["txt"][:, order], "txt_ids": batch["txt_ids"][order]}
    assert max_error(ours(**moved), velocity) <= 2e-6
    assert max_error(ours(**moved | {"txt_ids": batch["txt_ids"]}), velocity) > 0.01


@torch.no_grad()
def test_only_id_differences_matter_on_every_axis():
    ours, batch = model(FLUX2_TINY), inputs(FLUX2_TINY)
    velocity = ours(**batch)
    for axis in range(4):
        step = torch.eye(4, dtype=torch.long)[axis] * 3
        assert max_error(ours(**batch | {"img_ids": batch["img_ids"] + step}), velocity) > 0.01
        together = {"img_ids": batch["img_ids"] + step, "txt_ids": batch["txt_ids"] + step}
        assert max_error(ours(**batch | together), velocity) <= 1e-5


def test_missing_input_raises():
    for missing in ("guidance", "vector"):
        batch = inputs(FLUX1_TINY)
        del batch[missing]
        with pytest.raises(ValueError, match=f"{missing}: missing"):
            model(FLUX1_TINY)(**batch)


@pytest.mark.filterwarnings("error")
def test_scale_of_a_norm_may_be_wider_than_its_input():
    """As in training: under autocast, queries are in bfloat16 and weights in float32."""
    norm = randomise(RMSNorm(16, NUMERICS["exact"]))
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.float()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.scale
    assert norm(x).dtype == torch.bfloat16
    assert max_error(norm(x).float(), expected) <= 4e-3  # half a step of bfloat16


@torch.no_grad()
def test_kv_cache_keeps_no_more_than_its_tensors():
    """A view of q, k and v would keep all three in memory."""
    ours, given = model(FLUX2_TINY), inputs(FLUX2_TINY)
    caches = [KVCache(text_length=7) for _ in (*ours.double_blocks, *ours.single_blocks)]
    rope = ours.rope(given["txt_ids"][:0], given["img_ids"])
    (mods,) = ours.modulations([ours.vec(given["t"], given["guidance"])])
    ours.denoise(given["img"], given["txt"][:, :0], rope, mods, caches)
    for cache in caches:
        for tensor in (cache.k, cache.v):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


# ------------------------------------------------------------------ full size

FLUX1 = FluxConfig(
    in_channels=64,
    out_channels=64,
    context_dim=4096,
    hidden_size=3072,
    num_heads=24,
    depth=19,
    depth_single=38,
    mlp_ratio=4.0,
    axes_dim=(16, 56, 56),
    theta=10_000,
    vector_dim=768,
    bias=True,
    gated_mlp=False,
    shared_modulation=False,
)
FLUX2 = FluxConfig()
KLEIN_4B = replace(
    FLUX2,
    context_dim=7680,
    hidden_size=3072,
    num_heads=24,
    depth=5,
    depth_single=20,
    guidance=False,
)
KLEIN_9B = replace(
    FLUX2,
    context_dim=12288,
    hidden_size=4096,
    num_heads=32,
    depth=8,
    depth_single=24,
    guidance=False,
)
RELEASED = {  # file: configuration, number of tensors, number of parameters
    "flux1-dev": (FLUX1, 780, 11_901_408_320),
    "flux1-schnell": (replace(FLUX1, guidance=False), 776, 11_891_178_560),
    "flux1-depth-dev": (replace(FLUX1, in_channels=128), 780, 11_901_604_928),
    "flux1-fill-dev": (replace(FLUX1, in_channels=384), 780, 11_902_391_360),
    "flux2-dev": (FLUX2, 299, 32_223_281_152),
    "flux-2-klein-4b": (KLEIN_4B, 149, 3_875_544_576),
    "flux-2-klein-9b": (KLEIN_9B, 201, 9_078_581_248),
}


@pytest.mark.parametrize("config, tensors, parameters", RELEASED.values(), ids=RELEASED.keys())
def test_full_size_tensors_equal_diffusers(config, tensors, parameters):
    with torch.device("meta"):
        ours = Flux(config).state_dict()
    assert (len(ours), sum(tensor.numel() for tensor in ours.values())) == (tensors, parameters)
    assert shapes(transformer_to_diffusers(ours, config)) == shapes(
        diffusers_transformer(config).state_dict()
    )

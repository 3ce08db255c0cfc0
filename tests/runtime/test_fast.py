"""flux.runtime.fast against the plain networks: the bits, or the difference, and the memory."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.autoencoders import FLUX1, FLUX2, SMALL_DECODER, TINY, random_latents, random_pixels
from support.load_script import script
from torch import Tensor, nn

from flux.autoencoder import AutoEncoder, Upsample, unpack
from flux.parity.reference import diffusers_autoencoder, max_error, randomise
from flux.runtime import fast
from flux.runtime.fast import fast_autoencoder, fast_transformer
from flux.transformer import NUMERICS, Flux, FluxConfig, KVCache

FAMILIES = {
    "flux.1": FluxConfig(
        in_channels=64, out_channels=64, context_dim=48, hidden_size=64, num_heads=2, depth=2,
        depth_single=2, mlp_ratio=4.0, axes_dim=(4, 14, 14), vector_dim=24, bias=True,
        gated_mlp=False, shared_modulation=False,
    ),
    "flux.2": FluxConfig(
        context_dim=48, hidden_size=64, num_heads=2, depth=2, depth_single=2, axes_dim=(8, 8, 8, 8)
    ),
}  # fmt: skip
both_families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
every_autoencoder = pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def tiny_chunks(monkeypatch) -> None:
    """One to four tokens, and down to one row."""
    monkeypatch.setattr(fast, "CPU", fast.Chunks(200, 2**13, 2, 2**10))


@pytest.fixture
def as_gpu(monkeypatch) -> None:
    """Take the branches of a GPU, in small chunks of rows."""
    monkeypatch.setattr(fast, "_counted", "cuda")
    monkeypatch.setattr(fast, "GPU", fast.Chunks(2**60, 2**13, 4, 2**60))


def relative_l2(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def chunks_written(monkeypatch) -> list[int]:
    """Return a list that gets the number of chunks of each call of `chunked`."""
    written, original = [], fast.chunked

    def counted(function, out: Tensor, *inputs: Tensor) -> None:
        calls = []

        def call(*chunks: Tensor) -> Tensor:
            calls.append(1)
            return function(*chunks)

        original(call, out, *inputs)
        written.append(len(calls))

    monkeypatch.setattr(fast, "chunked", counted)
    return written


def transformer_inputs(config: FluxConfig, dtype: torch.dtype, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    axes = len(config.axes_dim)
    return dict(
        img=random(batch, 30, config.in_channels),
        img_ids=torch.randint(0, 40, (30, axes), generator=generator).float(),
        txt=random(batch, 11, config.context_dim),
        txt_ids=torch.randint(0, 40, (11, axes), generator=generator).float(),
        t=torch.linspace(0.3, 0.9, batch),
        guidance=torch.full((batch,), 3.5),
        vector=random(batch, config.vector_dim) if config.vector_dim else None,
    )


# ------------------------------------------------------------------ transformer


@every_dtype
@pytest.mark.parametrize("numerics", NUMERICS)
@both_families
@torch.no_grad()
def test_fast_transformer_equals_plain_to_the_bit(
    config, numerics, dtype, tiny_chunks, monkeypatch
):
    plain = randomise(Flux(config, NUMERICS[numerics])).to(dtype)
    faster = fast_transformer(copy.deepcopy(plain))
    written = chunks_written(monkeypatch)
    inputs = transformer_inputs(config, dtype)
    assert torch.equal(faster(**inputs), plain(**inputs))
    assert len(written) == 4 * config.depth + 3 * config.depth_single
    assert min(written) > 4


@every_dtype
@pytest.mark.parametrize("numerics", NUMERICS)
@both_families
@torch.no_grad()
def test_forward_for_a_gpu_equals_plain_to_the_bit(config, numerics, dtype, as_gpu, monkeypatch):
    plain = randomise(Flux(config, NUMERICS[numerics])).to(dtype)
    faster = fast_transformer(copy.deepcopy(plain))
    written = chunks_written(monkeypatch)
    inputs = transformer_inputs(config, dtype)
    assert torch.equal(faster(**inputs), plain(**inputs))
    assert written == [1] * (4 * config.depth + 2 * config.depth_single)


@every_dtype
@both_families
@torch.no_grad()
def test_fast_transformer_fills_and_reads_caches_to_the_bit(config, dtype, tiny_chunks):
    plain = randomise(Flux(config)).to(dtype)
    inputs = transformer_inputs(config, dtype, batch=1)
    results = []
    for flux in (plain, fast_transformer(copy.deepcopy(plain))):
        mods = flux.modulations([flux.vec(inputs["t"], inputs["guidance"], inputs["vector"])])[0]
        caches = [KVCache(11) for _ in range(config.depth + config.depth_single)]
        references, ids = inputs["img"][:, :7], inputs["img_ids"][:7]
        no_text = inputs["txt"][:, :0]
        flux.denoise(references, no_text, flux.rope(ids[:0], ids), mods, caches)
        rope = flux.rope(inputs["txt_ids"], inputs["img_ids"])
        velocity = flux.denoise(inputs["img"], inputs["txt"], rope, mods, caches)
        results.append([velocity, *(cache.k for cache in caches), *(cache.v for cache in caches)])
    for expected, result in zip(*results, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("numerics", NUMERICS)
@both_families
def test_rotations_of_distinct_positions_equal_those_of_all(config, numerics):
    plain = Flux(config, NUMERICS[numerics])
    axes = len(config.axes_dim)
    ids = torch.randint(0, 90, (700, axes), generator=torch.Generator().manual_seed(0)).float()
    expected = plain.rope(ids[:200], ids[200:])
    assert torch.equal(fast_transformer(plain).rope(ids[:200], ids[200:]), expected)
    assert plain.rope(ids[:0], ids[:0]).shape == (0, *expected.shape[1:])


@both_families
def test_chunks_are_for_neither_hooks_nor_gradients(config, tiny_chunks, monkeypatch):
    faster = fast_transformer(randomise(Flux(config)))
    inputs = transformer_inputs(config, torch.float32)
    written, seen = chunks_written(monkeypatch), []
    for block in (*faster.double_blocks, *faster.single_blocks):
        norm = block.norm if hasattr(block, "norm") else block.img_attn.norm
        norm.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[1]))
    with torch.no_grad():
        faster(**inputs)
    assert seen == [30] * config.depth + [41] * config.depth_single
    for module in faster.modules():
        module._forward_hooks.clear()
    inputs["img"].requires_grad_()
    faster(**inputs).sum().backward()
    assert inputs["img"].grad is not None
    assert written == []


# ------------------------------------------------------------------ autoencoder


@every_autoencoder
@torch.no_grad()
def test_fast_autoencoder_differs_by_rounding_only(config, tiny_chunks):
    """In float32: seen are 2e-6, in chunks of one row and of many."""
    plain = randomise(AutoEncoder(config))
    faster = fast_autoencoder(copy.deepcopy(plain))
    for h, w in ((1, 1), (3, 5), (8, 4)):
        latents, pixels = random_latents(config, 2, h, w), random_pixels(2, 16 * h, 16 * w)
        assert relative_l2(faster.decode(latents[:1]), plain.decode(latents[:1])) <= 5e-6
        assert relative_l2(faster.encode(pixels[:1]), plain.encode(pixels[:1])) <= 5e-6
        assert relative_l2(faster.decode(latents), plain.decode(latents)) <= 5e-6


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", ["flux.1", "flux.2"])
@torch.no_grad()
def test_fast_autoencoder_for_a_gpu_differs_by_rounding_only(name, channels_last, as_gpu):
    """With the channels first, as in float32, and with the channels last, as in bfloat16."""
    plain = randomise(AutoEncoder(TINY[name]))
    faster = fast_autoencoder(copy.deepcopy(plain))
    if channels_last:
        faster.to(memory_format=torch.channels_last)
    for h, w in ((1, 1), (3, 5)):
        latents, pixels = random_latents(TINY[name], 2, h, w), random_pixels(2, 16 * h, 16 * w)
        assert relative_l2(faster.decode(latents[:1]), plain.decode(latents[:1])) <= 5e-6
        assert relative_l2(faster.encode(pixels[:1]), plain.encode(pixels[:1])) <= 5e-6
        assert relative_l2(faster.decode(latents), plain.decode(latents)) <= 5e-6


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@torch.no_grad()
def test_fast_autoencoder_in_bfloat16_is_as_near_to_float32_as_plain(device_type, monkeypatch):
    monkeypatch.setattr(fast, "_counted", device_type)
    config = TINY["flux.2"]
    plain, latents = randomise(AutoEncoder(config)), random_latents(config, 1, 8, 4)
    exact = plain.decode(latents)
    rounded = relative_l2(plain.bfloat16().decode(latents.bfloat16()), exact)
    faster = fast_autoencoder(plain).decode(latents.bfloat16())
    assert relative_l2(faster, exact) <= 1.2 * rounded


def test_fast_networks_keep_names_weights_and_classes():
    for plain, apply in (
        (AutoEncoder(TINY["flux.2"]), fast_autoencoder),
        (Flux(FAMILIES["flux.1"]), fast_transformer),
    ):
        before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        kinds = {name: type(module) for name, module in plain.named_modules()}
        faster = apply(apply(plain))
        assert faster is plain
        after = plain.state_dict()
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            assert torch.equal(tensor, before[name]), name
        for name, module in faster.named_modules():
            assert isinstance(module, kinds[name])


@every_autoencoder
@torch.no_grad()
def test_hooks_see_whole_tensors(config, tiny_chunks):
    """Every module runs once."""
    faster, seen = fast_autoencoder(randomise(AutoEncoder(config))), []
    for name, module in faster.decoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    faster.decode(random_latents(config, 1, 3, 5))
    runnable = []
    for name, module in faster.decoder.named_modules():
        if type(module).forward is not nn.Module.forward:
            runnable.append(name)
    assert sorted(seen) == sorted(runnable)
    assert "up.0.block.0.conv1" in seen and "up.1.upsample.conv" in seen


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@torch.no_grad()
def test_fused_upsampling_is_the_convolution_of_nearest_neighbours(device_type, monkeypatch):
    monkeypatch.setattr(fast, "_counted", device_type)
    for height, width in ((1, 1), (5, 4)):
        plain = randomise(Upsample(6)).double()
        faster = copy.deepcopy(plain)
        faster.__class__ = fast.FusedUpsample
        x = torch.randn(2, 6, height, width, dtype=torch.float64)
        enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected = F.conv2d(enlarged, plain.conv.weight, plain.conv.bias, padding=1)
        assert max_error(faster(x), expected) <= 1e-14
        assert max_error(plain(x), expected) <= 1e-14


@torch.no_grad()
def test_group_norm_of_flat_channels_is_finite():
    """A flat group's variance is 0 but for rounding, which may be negative."""
    norm = randomise(nn.GroupNorm(4, 16, eps=1e-6))
    norm.__class__ = fast.ChannelsLastGroupNorm
    for value in (0.1, 77.7, -1e4):
        x = torch.full((1, 16, 24, 40), value).contiguous(memory_format=torch.channels_last)
        assert norm(x).isfinite().all()


# ------------------------------------------------------------------ memory


@pytest.fixture(scope="module")
def peak_bytes():
    return script("benchmarks/measure").peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [FLUX1, FLUX2, SMALL_DECODER], ids=["flux.1", "flux.2", "small decoder"]
)
def test_decoding_takes_two_thirds_of_the_memory_of_diffusers(config, peak_bytes, monkeypatch):
    """Count a full-size decode of 512x512 in bfloat16, without weights.

    diffusers holds 1537 bytes a pixel: three tensors of 256 channels. Here there are two.
    """
    fewer_calls = replace(fast.CPU, statistics=fast.CPU.rows)
    monkeypatch.setattr(fast, "chunk_sizes", lambda x: fewer_calls)
    with torch.device("meta"):
        ours = fast_autoencoder(AutoEncoder(config).bfloat16())
        latents = torch.empty(1, config.latent_channels, 32, 32, dtype=torch.bfloat16)
    theirs = diffusers_autoencoder(config).bfloat16()
    expected = peak_bytes(lambda: theirs.decode(unpack(latents)).sample)
    assert peak_bytes(lambda: ours.decode(latents)) <= 0.67 * expected


@pytest.mark.slow
@both_families
def test_step_takes_less_memory_than_plain(config, peak_bytes, monkeypatch):
    """With 1,024 and 512 tokens, at a fourth of the width and of a chunk."""
    monkeypatch.setattr(fast, "CPU", replace(fast.CPU, tokens=fast.CPU.tokens // 4))
    axes_dim = (16, 56, 56) if config.vector_dim else (32, 32, 32, 32)
    config = replace(config, hidden_size=768, num_heads=6, axes_dim=axes_dim)
    plain = randomise(Flux(config)).bfloat16()
    inputs = transformer_inputs(config, torch.bfloat16, batch=1)
    axes = len(axes_dim)
    inputs |= dict(
        img=torch.randn(1, 1024, config.in_channels).bfloat16(),
        img_ids=torch.ones(1024, axes),
        txt=torch.randn(1, 512, config.context_dim).bfloat16(),
        txt_ids=torch.ones(512, axes),
    )
    expected = peak_bytes(lambda: plain(**inputs))
    assert peak_bytes(lambda: fast_transformer(plain)(**inputs)) <= 0.9 * expected

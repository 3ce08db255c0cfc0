"""flux.runtime.memory_plan, activation_memory and devices: sizes, counts, plans and refusals.

Sizes are compared with the published ones, counts with a pass of the networks at full width on the
meta device, and plans with sums by hand.
"""

import json
import math
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.load_script import SCRIPTS, script
from torch import nn

from flux.autoencoder import AutoEncoder
from flux.conditioning import text_to_image
from flux.configs import MISTRAL, MODELS, QWEN3_4B, QWEN3_8B, FLUX1Text
from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.runtime import devices
from flux.runtime.activation_memory import FusedKernels, Workload, activations, peak_bytes
from flux.runtime.devices import FreeMemory
from flux.runtime.fast import fast_transformer
from flux.runtime.fast3 import fast_transformer3
from flux.runtime.memory_plan import (
    RESERVED,
    MemoryPlan,
    WeightSizes,
    measure_weights,
    needs_shards,
    plan_memory,
    plan_mode,
    required,
)
from flux.runtime.options import OFFLOAD_MODES, RuntimeOptions
from flux.runtime.shard_weights import shard_sizes
from flux.runtime.streaming import NUM_BUFFERS
from flux.sampling import flux3_image_ids
from flux.t5 import T5
from flux.text_encoder import TextFeatures
from flux.transformer import NUMERICS, Flux
from flux.transformer3 import Flux3
from flux.velocity import Now
from flux.velocity3 import Velocity3
from flux.weights.load import init_empty
from flux.weights.quantization import quantize

script("bench")  # which puts scripts/ on the path
from benchmarks.full import text_tokens
from benchmarks.references import generate

GB = 10**9
FLUX_LISTS = ("double_blocks", "single_blocks")
KLEIN, DEV, DEV2 = MODELS["flux.2-klein-4b"], MODELS["flux.1-dev"], MODELS["flux.2-dev"]
SQUARE = Workload(1024, 1024)
either_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"]
)


def meta(build, *arguments) -> nn.Module:
    return init_empty(lambda: build(*arguments))


# ------------------------------------------------------------------ sizes

# GB in bfloat16 of the released files; text encoders end at the last layer that is read: 27 of 36,
# 27 of 36 and 30 of 40
PUBLISHED = {
    "flux.1-dev": (Flux, DEV.transformer, FLUX_LISTS, 23.8),
    "flux.2-klein-4b": (Flux, KLEIN.transformer, FLUX_LISTS, 7.75),
    "flux.2-klein-9b": (Flux, MODELS["flux.2-klein-9b"].transformer, FLUX_LISTS, 18.2),
    "flux.2-dev": (Flux, DEV2.transformer, FLUX_LISTS, 64.4),
    "t5": (T5, FLUX1Text().t5, ["encoder.block"], 9.52),
    "qwen3-4b": (LanguageModel, QWEN3_4B, ["layers"], 6.23),
    "qwen3-8b": (LanguageModel, QWEN3_8B, ["layers"], 11.66),
    "mistral": (LanguageModel, MISTRAL, ["layers"], 34.7),
    "autoencoder": (AutoEncoder, KLEIN.autoencoder, [], 0.17),
}


def test_measured_sizes_are_the_published_ones():
    for name, (build, config, lists, size) in PUBLISHED.items():
        sizes = measure_weights(meta(build, config).bfloat16(), lists, torch.bfloat16)
        assert sizes.total == sizes.mapped == pytest.approx(size * GB, rel=0.015), name
        assert sizes.fixed < 0.15 * sizes.total or not lists, name


def test_blocks_are_measured_without_their_small_tensors():
    """Sums by hand of matrices; norms and T5's position table are small and stay on the device.

    In squares of 3072: a double block of FLUX.2 has, for each stream, q, k, v, out and 6 + 3 of a
    gated MLP; a single block 3 + 6 in, 1 + 3 out. In squares of 4096, T5: q, k, v, o, 3 x 2.5.
    """
    klein = measure_weights(meta(Flux, KLEIN.transformer), FLUX_LISTS, torch.bfloat16)
    t5 = measure_weights(meta(T5, FLUX1Text().t5), ["encoder.block"], torch.float32)
    double, single = 26 * 3072**2 * 2, 13 * 3072**2 * 2
    assert klein.blocks == (*5 * [double], *20 * [single])
    assert t5.blocks == (*24 * [int(11.5 * 4096**2 * 4)],)


def test_quantized_layers_are_measured_in_their_format():
    class Quantized(nn.Module):
        in_features, out_features = 512, 1024

        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.empty(1024, 256, dtype=torch.uint8))
            self.register_buffer("weight_scale", torch.empty(1024, 32))
            self.bias = nn.Parameter(torch.empty(1024))

        def dequantize(self): ...

    def build() -> nn.Module:
        blocks = nn.ModuleList([Quantized(), nn.Linear(512, 512, bias=False)])
        return nn.ModuleDict(dict(blocks=blocks))

    # 1024 x 256 bytes and 1024 x 32 float32; the bias of 1024 bfloat16 stays. The 512 x 512 of the
    # other block become bfloat16. Mapped is what is quantized, and what has the file's dtype.
    network = meta(build)
    fixed, packed, cast, scratch = 2048, 262144 + 131072, 524288, 512 * 1024 * 8
    expected = WeightSizes(fixed, (packed, cast), packed, scratch)
    measure = partial(measure_weights, network, ["blocks"], torch.bfloat16)
    assert measure() == expected
    network["blocks"][1].bfloat16()
    assert measure() == replace(expected, mapped=packed + cast)
    assert measure({"blocks.0"}) == replace(expected, mapped=cast)
    assert measure(None) == replace(expected, mapped=0)


@pytest.mark.parametrize(
    "kind, options",
    [("Int8Linear", {}), ("Int8Linear", {"group": 256}), ("Int4Linear", {})],
    ids=["int8", "ConvRot", "int4"],
)
def test_dequantizing_takes_no_more_than_its_scratch(kind, options):
    layer = meta(partial(getattr(quantize, kind), **options), 3072, 9216, False)
    x = torch.empty(1, 3072, dtype=torch.bfloat16, device="meta")
    sizes = measure_weights(nn.ModuleList([layer]), [], torch.bfloat16)
    assert peak_bytes(lambda: layer(x)) <= 1.01 * sizes.scratch


def test_sizes_of_two_modules_in_one_stage_add_up():
    together = WeightSizes(5, (7, 8), 20, 3, 6) + WeightSizes(10, (), 4, 9, 2)
    assert together == WeightSizes(15, (7, 8), 24, 9, 6) and together.total == 30


# ------------------------------------------------------------------ activations


@either_dtype
@pytest.mark.parametrize("name", ["flux.1-dev", "flux.2-klein-4b", "flux.2-dev"])
def test_transformer_activations_are_bounded_closely(name, dtype):
    """The bound is 1 to 1.5 times the peak of a pass at full width, on the meta device."""
    spec = MODELS[name]
    c = replace(spec.transformer, depth=1, depth_single=1)
    text, image = 512, 4096 + 300
    network = meta(Flux, c).to(dtype)
    rope = torch.empty(text + image, sum(c.axes_dim) // 2, 2, 2, device="meta")
    network.rope = lambda *ids: rope.clone()

    def step() -> None:
        inputs = dict(img=(2, image, c.in_channels), txt=(2, text, c.context_dim))
        if c.guidance:
            inputs["guidance"] = (2,)
        if c.vector_dim:
            inputs["vector"] = (2, c.vector_dim)
        inputs = {name: torch.empty(shape, dtype=dtype) for name, shape in inputs.items()}
        axes = len(c.axes_dim)
        ids = dict(img_ids=torch.empty(image, axes), txt_ids=torch.empty(text, axes))
        network(t=torch.empty(2), **ids, **inputs)

    with torch.device("meta"), FusedKernels():
        peak = peak_bytes(step)
    work = Workload(1024, 1024, batch=2, reference_tokens=300, itemsize=dtype.itemsize)
    bound = activations(replace(spec, transformer=c), work, "cuda")["transformer"]
    assert peak <= bound <= 1.5 * peak, f"{bound / peak:.3f}"


@either_dtype
def test_autoencoder_activations_are_bounded_closely(dtype):
    """The bound is at least 1.5 times the count, which leaves out the workspace of convolutions."""
    network = meta(AutoEncoder, KLEIN.autoencoder).to(dtype)
    latents = torch.empty(1, 128, 48, 64, device="meta", dtype=dtype)
    pixels = torch.empty(1, 3, 768, 1024, device="meta", dtype=dtype)
    bound = activations(KLEIN, Workload(1024, 768, itemsize=dtype.itemsize), "cuda")
    with FusedKernels():
        decoding = peak_bytes(lambda: network.decode(latents))
        encoding = peak_bytes(lambda: network.encode(pixels))
    assert 1.5 * decoding <= bound["autoencoder"] <= 2 * decoding
    if dtype == torch.float32:  # in which images are encoded
        assert 1.5 * encoding <= bound["image encoder"] <= 2 * encoding


@either_dtype
@pytest.mark.parametrize("name", ["flux.1-dev", "flux.2-klein-4b", "flux.2-dev"])
def test_text_encoder_activations_are_bounded_closely(name, dtype):
    spec = MODELS[name]
    if isinstance(spec.text, FLUX1Text):
        network = meta(T5, replace(spec.text.t5, depth=2)).to(dtype)
    else:
        network = meta(LanguageModel, replace(spec.text.model, layers=(1, 2, 3))).to(dtype)

    def encode() -> None:
        ids = torch.empty(1, spec.text_length, dtype=torch.long)
        mask = [] if isinstance(spec.text, FLUX1Text) else [torch.ones_like(ids, dtype=torch.bool)]
        network(ids, *mask)

    with torch.device("meta"), FusedKernels():
        peak = peak_bytes(encode)
    bound = activations(spec, replace(SQUARE, itemsize=dtype.itemsize), "cuda")["text encoder"]
    assert peak <= bound <= 2 * peak, f"{bound / peak:.3f}"


COUNTED = json.loads((SCRIPTS / "benchmarks/counts.json").read_text())
STAGE_NAMES = {
    "text": "text encoder",
    "step": "transformer",
    "decode, float32": "autoencoder",
    "decode, bfloat16": "autoencoder",
    "encode, float32": "image encoder",
    "step, 1 reference": "transformer",
    "step, 4 references": "transformer",
}


def planned_for(row: str) -> bool:
    """Leave out steps of FLUX 3: the counter sees nothing of what is kept between steps."""
    name, stage = row.split(", ", 1)
    return (
        "tiny" not in name
        and stage in STAGE_NAMES
        and not (MODELS[name].flux3 and stage.startswith("step"))
    )


@pytest.mark.parametrize("row", filter(planned_for, COUNTED))
def test_plan_on_a_gpu_is_near_the_counted_peak(row):
    """The counter runs the whole network on the meta device at 1024x1024."""
    name, stage = row.split(", ", 1)
    tokens = 4096 * int(stage.split()[1]) if "reference" in stage else 0  # as large as the image
    itemsize = 4 if "float32" in stage else 2
    work = Workload(
        1024,
        1024,
        reference_tokens=tokens,
        decode_itemsize=itemsize,
        fast=True,
        text_tokens=text_tokens(MODELS[name]),
    )
    planned = activations(MODELS[name], work, "cuda")[STAGE_NAMES[stage]]
    assert 1 <= planned / COUNTED[row]["ours"]["peak"] <= 1.25


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("name", ["flux.3-image-klein", "flux.3-image-klein-base"])
def test_plan_of_flux_3_is_near_the_peak_of_a_generation(name, count, fast):
    """Two steps, with what is kept between them, of one block of each kind at full width."""
    spec = MODELS[name]
    c = replace(spec.transformer, depth=1, depth_single=1)
    network = meta(Flux3, c).bfloat16()
    lazy = Mock(return_value=network, device=torch.device("meta"), dtype=torch.bfloat16)
    if fast:
        fast_transformer3(network)

    def run() -> None:
        conditions = text_to_image(spec, 1024, 1024)
        if count:
            references = torch.empty(1, count * 4096, c.in_channels, device="meta")
            ids = torch.cat([flux3_image_ids(64, 64, k + 1) for k in range(count)])
            conditions = replace(conditions, references=references, reference_ids=ids)
        texts = torch.empty(2, 1, 240, c.context_dim, device="meta", dtype=torch.bfloat16)
        prompt, negative = (TextFeatures(text, None) for text in texts)
        x = torch.empty(1, 4096, c.in_channels, device="meta")
        if not spec.cfg:
            negative = None
        scales = [4.0 if spec.cfg else 1.0] * 2
        numerics, times = NUMERICS["exact"], [1.0, 0.5, 0.0]
        velocity = Velocity3(lazy, prompt, negative, conditions, 1, times, scales, numerics, Now())
        for t in times[:2]:
            x = x + velocity(x, t)

    with FusedKernels():
        peak = peak_bytes(run)
    work = Workload(1024, 1024, reference_tokens=count * 4096, fast=fast, text_tokens=240)
    planned = activations(spec, work, "cuda")["transformer"]
    assert 1 <= planned / peak <= 1.25, f"{planned / peak:.3f}"


@pytest.mark.parametrize("count", [1, 4])
def test_plan_with_cached_references_is_within_a_quarter_of_the_counted_peak(count):
    """klein 9B KV, cut to one block of each kind, with references as large as the image."""
    kv = MODELS["flux.2-klein-9b-kv"]
    config = replace(kv.transformer, depth=1, depth_single=1)
    network = fast_transformer(meta(Flux, config).bfloat16())

    def run() -> None:
        generate(network, 64, count, cached=True, steps=1)

    with FusedKernels():
        peak = peak_bytes(run)
    work = Workload(1024, 1024, reference_tokens=count * 4096, fast=True)
    planned = activations(replace(kv, transformer=config), work, "cuda")["transformer"]
    assert 1 <= planned / peak <= 1.25


def test_activations_cover_published_peaks():
    """diffusers at 1024 x 1024: 0.45 GiB in FLUX.1's transformer; to decode 2.4 GiB in bfloat16,
    4105 bytes a pixel in float32."""
    bound = activations(DEV, SQUARE, "cuda")
    assert 0.45 * 2**30 <= bound["transformer"] <= 1.1 * GB
    assert 2.4 * 2**30 <= bound["autoencoder"] <= 2.6 * 2**30
    assert activations(DEV, replace(SQUARE, itemsize=4), "cpu")["autoencoder"] >= 4105 * 1024**2


def test_activations_depend_on_the_work():
    """By hand: klein 9B KV caches 4096 reference tokens as keys and values of 8 + 24 blocks, 2.15
    GB. Without fused attention, scores take 2 x 24 heads x 4608 x 4608 x 2 bytes. A step's
    modulations in FLUX.1 are 12 x 19 + 3 x 38 + 3 rows."""

    def count(spec, device_type="cuda", stage="transformer", **changes) -> int:
        return activations(spec, replace(SQUARE, **changes), device_type)[stage]

    kv = MODELS["flux.2-klein-9b-kv"]
    deeper = replace(kv, transformer=replace(kv.transformer, depth_single=25))
    block = count(deeper, reference_tokens=4096) - count(kv, reference_tokens=4096)
    assert block == 2 * 4096 * 4096 * 2 == pytest.approx(2.15 * GB / 32, rel=2e-3)
    assert count(KLEIN, "mps") - count(KLEIN) == 96 * 4608**2
    rows = count(DEV, steps=29) - count(DEV)
    assert rows == 28 * (12 * 19 + 3 * 38 + 3) * 3072 * 2 == pytest.approx(59e6, rel=0.01)
    larger = [
        dict(width=2048),
        dict(batch=2),
        dict(reference_tokens=100),
        dict(itemsize=4),
        dict(image_text_tokens=729),
    ]
    for change in larger:
        assert count(KLEIN, **change) > count(KLEIN)
    decoding = count(KLEIN, stage="autoencoder")
    assert count(KLEIN, stage="autoencoder", batch=9) == decoding  # one image at a time
    assert count(KLEIN, stage="autoencoder", decode_itemsize=4) == pytest.approx(2 * decoding, 0.01)
    tiled = count(KLEIN, stage="autoencoder", tile=256)
    assert tiled == pytest.approx(decoding / 16 + 12 * 1024**2, rel=1e-3)


def test_counting_draws_no_random_numbers():
    state = torch.get_rng_state()
    activations(replace(DEV, text_length=77), Workload(1008, 1008, itemsize=4), "cpu")
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------ plans

# Published: klein 4B 7.75 GB and its text encoder 6.23; FLUX.2 dev 64.4 and 34.7
KLEIN_WEIGHTS = {
    "text encoder": WeightSizes(780_050_000, 27 * (201_850_000,), 6_230_000_000),
    "transformer": WeightSizes(
        388_996_480, 5 * (490_733_568,) + 20 * (245_366_784,), 7_750_000_000
    ),
    "autoencoder": WeightSizes(170_000_000, (), 170_000_000),
}
DEV2_WEIGHTS = {
    "text encoder": WeightSizes(1_340_000_000, 30 * (1_112_000_000,), 34_700_000_000),
    "transformer": WeightSizes(
        1_586_103_296, 8 * (1_962_934_272,) + 48 * (981_467_136,), 64_400_000_000
    ),
    "autoencoder": WeightSizes(170_000_000, (), 170_000_000),
}


def plan(
    size: float,
    offload=None,
    max_vram=None,
    weights=KLEIN_WEIGHTS,
    spec=KLEIN,
    work=SQUARE,
    device_type="cuda",
    **options,
) -> MemoryPlan:
    free = FreeMemory(device_type, size * GB, 64 * GB)
    return plan_memory(spec, weights, work, free, offload, max_vram, **options)


def test_all_weights_stay_when_they_fit():
    """6.23 + 7.75 + 0.17 = 14.15 GB, 2.69 to decode, 0.6 for libraries."""
    found = plan(24)
    assert found.offload == "none" and set(found.resident.values()) == {None}
    assert found.message == (
        "text encoder 6.2 GB, transformer 7.8 GB, autoencoder 0.2 GB, all at once; "
        "at most 17.4 of 24.0 GB"
    )
    assert plan(17.5).offload == "none" and plan(17.4).offload == "model"


def test_stages_take_turns_when_there_is_less_memory():
    """The transformer takes most: 7.75 GB, 0.6 for libraries and 0.75 of activations."""
    found = plan(11.2)
    assert found.offload == "model" and set(found.resident.values()) == {None}
    assert found.message == (
        "text encoder 6.2 GB, then transformer 7.8 GB, then autoencoder 0.2 GB; "
        "at most 9.1 of 11.2 GB"
    )


def test_blocks_stream_when_there_is_still_less_memory():
    """Room for blocks: 8 GB less 0.39 fixed, two buffers of 0.49, activations, 0.6 reserved."""
    found = plan(8)
    assert found.offload == "block" and found.peak == 8 * GB
    assert found.resident["text encoder"] is None and found.resident["autoencoder"] is None
    active = activations(KLEIN, SQUARE, "cuda")["transformer"]
    room = 8 * GB - 388_996_480 - 2 * 490_733_568 - active - 600_000_000
    assert found.resident["transformer"] == room == pytest.approx(5.3 * GB, rel=0.02)
    assert found.message == (
        "text encoder 6.2 GB, then transformer 7.8 GB of which 2.1 GB are streamed, "
        "then autoencoder 0.2 GB; at most 8.0 of 8.0 GB"
    )


def test_requested_streaming_takes_the_least():
    """Decoding then needs the most: 0.17, 2.69 and 0.6 GB."""
    found = plan(80, "block")
    assert found.resident == {"text encoder": 0, "transformer": 0, "autoencoder": None}
    assert found.peak == pytest.approx(3.46 * GB, abs=0.01 * GB)
    limited = plan(80, "block", max_vram=6).resident["transformer"]
    assert limited == plan(8).resident["transformer"] - 2 * GB


def test_max_vram_limits_and_never_extends():
    assert plan(80, max_vram=11.2).message.endswith("at most 9.1 of 11.2 GB")
    assert plan(11.2, max_vram=80).message.endswith("at most 9.1 of 11.2 GB")


def test_flux2_dev_streams_in_24_gb():
    """99.3 GB of weights; buffers of 1.96 GB."""
    found = plan(24, weights=DEV2_WEIGHTS, spec=DEV2)
    assert found.offload == "block" and found.peak <= 24 * GB
    assert 0 < found.resident["transformer"] < 18 * GB
    assert 0 < found.resident["text encoder"] < 22 * GB
    assert plan(141, weights=DEV2_WEIGHTS, spec=DEV2).offload == "none"
    assert plan(80, weights=DEV2_WEIGHTS, spec=DEV2).offload == "model"


def test_mapped_weights_take_no_memory_on_a_cpu():
    found = plan(5, device_type="cpu")
    assert found.offload == "none"
    assert found.message.endswith(
        "all at once, of which 14.2 GB are mapped from the files; at most 2.7 of 5.0 GB"
    )
    cast = {stage: replace(sizes, mapped=0) for stage, sizes in KLEIN_WEIGHTS.items()}
    assert plan(16, weights=cast, device_type="cpu").offload == "model"
    # streaming would need more, not less
    with pytest.raises(UserError, match=r"needs at least 8\.6 GB, and 8\.0 GB are free"):
        plan(8, weights=cast, device_type="cpu")


@pytest.mark.parametrize(
    "spec, size, device_type, processes, expected",
    [
        (DEV2, 80, "cuda", 2, ""),  # fits whole
        (DEV2, 48, "cuda", 2, "66.5 GB whole, 39.8 GB sharded, 48.0 GB are free"),
        (DEV2, 24, "cuda", 2, ""),  # fits in no way, and is streamed
        (DEV2, 24, "cuda", 8, "66.5 GB whole, 15.7 GB sharded, 24.0 GB are free"),
        (KLEIN, 16, "cuda", 4, ""),
        (KLEIN, 8, "cuda", 4, "9.1 GB whole, 4.7 GB sharded, 8.0 GB are free"),
        (DEV2, 24, "cpu", 8, ""),  # mapped: all processes share the pages
    ],
)
def test_weights_that_do_not_fit_whole_are_sharded(spec, size, device_type, processes, expected):
    whole = (KLEIN_WEIGHTS if spec is KLEIN else DEV2_WEIGHTS)["transformer"]
    active = activations(spec, SQUARE, device_type)["transformer"]
    free = FreeMemory(device_type, size * GB, math.inf)
    assert needs_shards(whole, shard_sizes(whole, processes), active, free) == expected


def test_unified_memory_holds_the_pinned_buffers_too():
    """Apple's GPUs share the host's memory: two buffers twice over."""
    sizes = KLEIN_WEIGHTS["transformer"]
    mps, cuda = (required(sizes, GB, device, 0) for device in ("mps", "cuda"))
    assert mps.device - cuda.device == NUM_BUFFERS * 490_733_568
    assert mps.host == 0 and cuda.host == NUM_BUFFERS * 490_733_568


# ------------------------------------------------------------------ refusals


def test_refusal_has_numbers_and_advice():
    with pytest.raises(UserError) as caught:
        plan(16, "none")
    assert str(caught.value) == (
        'flux.2-klein-4b at 1024x1024 with `offload="none"` needs at least 17.5 GB, and 16.0 GB '
        'are free. Use `offload="model"` or `offload="block"` or a smaller `width` and `height` '
        'or `quantize="fp8"` or an -fp8 file.'
    )
    words = r'`offload="model"` needs at least 9\.2 GB, and 9\.0 GB.* Use `offload="block"`'
    with pytest.raises(UserError, match=words):
        plan(9, "model")
    assert plan(16, "model").offload == "model"


def test_refusal_of_max_vram_names_the_minimum():
    """Decoding: 0.17 + 2.69 + 0.6 = 3.46 GB. At 512 x 512, 2.3 GB for the transformer suffice."""
    with pytest.raises(UserError) as caught:
        plan(24, max_vram=3)
    assert str(caught.value) == (
        "max_vram: flux.2-klein-4b at 1024x1024 needs at least 3.5 GB (got 3). "
        "Use a smaller `width` and `height`."
    )
    found = plan(24, max_vram=3.5)
    assert found.offload == "block" and found.peak <= 3.5 * GB
    with pytest.raises(UserError, match=r"No option helps\. Use a smaller model\."):
        plan(24, max_vram=0.5)


def test_refusal_advises_tiles_and_smaller_batches():
    with pytest.raises(UserError, match=r"needs at least .* `vae_tile=1024`"):
        plan(8, work=Workload(2048, 2048))
    with pytest.raises(UserError, match="32 at a time.*Use a smaller `num_images`"):
        plan(16, work=replace(SQUARE, batch=32))
    with pytest.raises(UserError) as caught:
        plan(16, "none", quantizable=False)
    assert "fp8" not in str(caught.value) and "processes" not in str(caught.value)
    with pytest.raises(UserError, match=r"are free\. Use .* or more processes\.$"):
        plan(8, "model", quantizable=False, dividable=True)
    with pytest.raises(UserError, match=r"No option helps\."):  # decoding alone takes more
        plan(1, "none", quantizable=False, dividable=True, work=Workload(512, 512))


def test_host_memory_limits_streaming():
    """Weights that were cast are the host's own; the pinned buffers come on top."""
    cast = {stage: replace(sizes, mapped=0) for stage, sizes in DEV2_WEIGHTS.items()}
    words = r"needs 68\.\d GB of the host's memory, and 64\.0 GB are free"
    with pytest.raises(UserError, match=words):
        plan(24, weights=cast, spec=DEV2)
    assert plan(24, weights=DEV2_WEIGHTS, spec=DEV2).offload == "block"


def test_wrong_options_are_refused():
    for size in (0, -1, math.inf, math.nan):
        for refuse in (RuntimeOptions, partial(plan, 24)):
            with pytest.raises(UserError, match="^max_vram: must be a positive number of gigabyte"):
                refuse(max_vram=size)
    for side in (0, -256, 240, 255, 264):
        words = rf"^vae_tile: must be a multiple of 16 and at least 256 pixels \(got {side}\)"
        with pytest.raises(UserError, match=words):
            RuntimeOptions(vae_tile=side)
    with pytest.raises(UserError, match="^quantize: int2 is unknown. Choose from fp8, int8, int4"):
        RuntimeOptions(quantize="int2")
    with pytest.raises(UserError, match="^offload: stages is unknown. Choose from none, model, bl"):
        RuntimeOptions(offload="stages")
    with pytest.raises(UserError, match="^decode_dtype: must be .*got torch.float16"):
        RuntimeOptions(decode_dtype=torch.float16)


# ------------------------------------------------------------------ properties

byte_counts = st.integers(0, 5 * GB)


@st.composite
def weight_sizes(draw) -> WeightSizes:
    fixed, blocks = draw(byte_counts), tuple(draw(st.lists(byte_counts, max_size=5)))
    mapped = int(draw(st.floats(0, 1, allow_subnormal=False)) * (fixed + sum(blocks)))
    return WeightSizes(fixed, blocks, mapped, draw(byte_counts))


stages = st.lists(weight_sizes(), min_size=1, max_size=4).map(
    lambda sizes: {f"stage {number}": each for number, each in enumerate(sizes)}
)
free_memories = st.builds(
    FreeMemory,
    st.sampled_from(["cuda", "mps", "cpu"]),
    st.integers(0, 40 * GB),
    st.integers(0, 40 * GB),
)


@given(stages, byte_counts, free_memories, st.booleans())
def test_no_plan_exceeds_the_free_memory(weights, working, free, minimal):
    """Counted again: weights on the device, buffers, activations, scratch and what is reserved."""
    on_cpu = free.device_type == "cpu"
    for mode in OFFLOAD_MODES:
        found = plan_mode(weights, dict.fromkeys(weights, working), free, mode, minimal)
        if found is None:
            continue
        own = {s: w.total - (w.mapped if on_cpu else 0) for s, w in weights.items()}
        for stage, sizes in weights.items():
            stays = found.resident[stage]
            used = sum(own.values()) if mode == "none" else own[stage]
            host = 0
            if stays is not None:
                assert mode == "block" and 0 <= stays <= sum(sizes.blocks)
                buffers = NUM_BUFFERS * max(sizes.blocks)
                used = (0 if on_cpu else sizes.fixed + stays) + buffers
                host = buffers + sizes.total - sizes.mapped
            used += working + sizes.scratch + RESERVED[free.device_type]
            if free.device_type == "cuda":
                assert host <= free.host
            else:
                used += host
            assert used <= found.peak <= free.device


@given(stages, byte_counts, free_memories, st.integers(0, 40 * GB), st.integers(0, 40 * GB))
def test_more_memory_never_makes_a_plan_slower(weights, working, free, more, more_host):
    active = dict.fromkeys(weights, working)

    def slowness(free: FreeMemory) -> tuple[int, int]:
        for number, mode in enumerate(OFFLOAD_MODES):
            found = plan_mode(weights, active, free, mode)
            if found is not None:
                streamed = 0
                for stage, stays in found.resident.items():
                    streamed += 0 if stays is None else sum(weights[stage].blocks) - stays
                return number, streamed
        return len(OFFLOAD_MODES), 0

    larger = free._replace(device=free.device + more, host=free.host + more_host)
    assert slowness(larger) <= slowness(free)


@given(
    st.integers(1, 40),
    st.sampled_from([None, *OFFLOAD_MODES]),
    st.sampled_from(["cuda", "mps", "cpu"]),
)
def test_minimum_of_a_refusal_suffices(tenths, offload, device_type):
    """The refusal rounds the minimum up to a tenth of a GB."""
    try:
        plan(tenths, offload, device_type=device_type, max_vram=tenths / 10)
    except UserError as error:
        least = float(str(error).split("at least ")[1].split(" GB")[0])
        assert least > tenths / 10
        plan(100, offload, device_type=device_type, max_vram=least)


# ------------------------------------------------------------------ devices


def test_missing_device_is_refused():
    for device in ("cuda:99", "tpu", "meta"):
        words = f"^device: {device} is not available. Choose from cpu"
        with pytest.raises(UserError, match=words):
            devices.choose_device(device)
    assert devices.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (7, 5)])
def test_gpu_without_bfloat16_computes_in_float32(capability, monkeypatch, recwarn):
    """Turing (7.5) and Volta have float16 only."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    dtype = devices.choose_dtype(torch.device("cuda"))
    messages = [str(warning.message) for warning in recwarn]
    if capability >= (8, 0):
        assert dtype == torch.bfloat16 and messages == []
    else:
        assert dtype == torch.float32
        assert messages[0].startswith("Tesla T4 does not compute in bfloat16")


@pytest.mark.parametrize("able, dtype", [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.filterwarnings("ignore:.* does not compute in bfloat16")
def test_cpu_and_apple_gpu_without_bfloat16_compute_in_float32(able, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: able)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    for device in ("cpu", "mps"):
        assert devices.choose_dtype(torch.device(device)) == dtype


def test_free_memory_of_the_machine(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 24684084 kB\nMemFree: 22753992 kB\nMemAvailable: 23931216 kB\n")
    assert devices._machine_memory(meminfo) == 23931216 * 1024
    assert 0 < devices._machine_memory(tmp_path / "absent") < math.inf
    assert 0 < devices.free_memory(torch.device("cpu")) < math.inf
    monkeypatch.setattr(devices, "_machine_memory", lambda: 9e9)
    monkeypatch.setattr(devices, "_container_memory", lambda: 8e9)
    assert devices.free_memory(torch.device("cpu")) == 8e9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # whose memory the machine's processes share
    assert devices.free_memory(torch.device("cpu")) == 2e9


def test_free_memory_of_a_container(tmp_path):
    """The limit less what is used; the pages of files do not count as used."""
    assert devices._container_memory(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("8000000000\n")
    (tmp_path / "memory.current").write_text("5000000000\n")
    stat = "anon 1000000000\nactive_file 1500000000\ninactive_file 2500000000\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert devices._container_memory(tmp_path) == 7_000_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert devices._container_memory(tmp_path) == math.inf

"""flux.runtime.memory: sizes against the published ones, plans against sums by hand, and what no plan may ever do."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.load_script import script
from torch import nn

from flux.autoencoder import AutoEncoder
from flux.configs import MISTRAL, MODELS, QWEN3_4B, QWEN3_8B, FLUX1Text
from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.runtime import devices
from flux.runtime.activation_memory import Workload, activations
from flux.runtime.devices import FreeMemory
from flux.runtime.memory_plan import (
    NUM_BUFFERS,
    RESERVED,
    WeightSizes,
    measure_weights,
    plan_memory,
    plan_mode,
    required,
)
from flux.runtime.options import OFFLOAD_MODES, RuntimeOptions
from flux.t5 import T5
from flux.transformer import Flux

GB = 10**9
FLUX_LISTS = ("double_blocks", "single_blocks")
KLEIN, DEV, DEV2 = MODELS["flux.2-klein-4b"], MODELS["flux.1-dev"], MODELS["flux.2-dev"]
SQUARE = Workload(1024, 1024)


def meta(make, *arguments) -> nn.Module:
    with torch.device("meta"):
        return make(*arguments)


# ---------------------------------------------------------------------------------------------------------- sizes

# GB in bfloat16, of the released files; text encoders end at the last layer that is read (27 of 36, 27 of 36, 30 of 40)
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


@pytest.mark.parametrize("make, config, lists, size", PUBLISHED.values(), ids=PUBLISHED)
def test_sizes_are_the_published_ones(make, config, lists, size):
    held = measure_weights(meta(make, config).bfloat16(), lists, torch.bfloat16)
    assert held.total == held.mapped == pytest.approx(size * GB, rel=0.015)
    assert held.fixed < 0.15 * held.total or not lists


def test_blocks_are_measured_by_what_is_streamed_of_them():
    """By hand, in squares of 3072. FLUX.2's double block: for each stream q, k, v, out, and 6 + 3 of a gated MLP; single: 3 + 6
    in, 1 + 3 out. T5, in squares of 4096: q, k, v, o, three of 2.5. Norms and T5's table of distances are small, and stay."""
    klein = measure_weights(meta(Flux, KLEIN.transformer), FLUX_LISTS, torch.bfloat16)
    t5 = measure_weights(meta(T5, FLUX1Text().t5), ["encoder.block"], torch.float32)
    double, single = 26 * 3072**2 * 2, 13 * 3072**2 * 2
    assert klein.blocks == (*5 * [double], *20 * [single]) and t5.blocks == (
        *24 * [int(11.5 * 4096**2 * 4)],
    )


def test_quantised_layers_are_measured_as_they_are_held():
    class Quantised(nn.Module):
        in_features, out_features = 512, 1024

        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.empty(1024, 256, dtype=torch.uint8))
            self.register_buffer("weight_scale", torch.empty(1024, 32))
            self.bias = nn.Parameter(torch.empty(1024))

        def dequantize(self): ...

    network = meta(
        lambda: nn.ModuleDict(
            dict(blocks=nn.ModuleList([Quantised(), nn.Linear(512, 512, bias=False)]))
        )
    )
    # 1024 x 256 bytes, and 1024 x 32 float32; bias of 1024 bfloat16 stays. The other block's 512 x 512 become bfloat16: of the
    # file's own there is what is quantised, and in its dtype; and nothing of what is made anew.
    sizes = 2048, (262144 + 131072, 524288)
    kept, scratch = 262144 + 131072, 512 * 1024 * 8
    assert measure_weights(network, ["blocks"], torch.bfloat16) == WeightSizes(
        *sizes, kept, scratch
    )
    network["blocks"][1].bfloat16()
    assert measure_weights(network, ["blocks"], torch.bfloat16) == WeightSizes(
        *sizes, kept + 524288, scratch
    )
    assert measure_weights(network, ["blocks"], torch.bfloat16, {"blocks.0"}) == WeightSizes(
        *sizes, 524288, scratch
    )
    assert measure_weights(network, ["blocks"], torch.bfloat16, None) == WeightSizes(
        *sizes, 0, scratch
    )


@pytest.mark.parametrize("kind", ["Int8Linear", "Int4Linear"])
def test_a_quantised_matrix_is_whole_within_its_allowance(kind):
    from flux.weights.quantization import quantize

    layer = meta(getattr(quantize, kind), 3072, 9216, False)
    peak = script("benchmarks/measure").peak_bytes(
        lambda: layer(torch.empty(1, 3072, dtype=torch.bfloat16, device="meta"))
    )
    assert peak <= 1.01 * measure_weights(nn.ModuleList([layer]), [], torch.bfloat16).scratch


def test_two_networks_of_one_stage():
    together = WeightSizes(5, (7, 8), 20, 3, 6) + WeightSizes(10, (), 4, 9, 2)
    assert together == WeightSizes(15, (7, 8), 24, 9, 6) and together.total == 30


# ---------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["flux.1-dev", "flux.2-klein-4b", "flux.2-dev"])
def test_the_transformers_activations_are_at_most_what_is_said(name, dtype, monkeypatch):
    """Counted on the meta device, at full width, with one block of a kind and fused attention; and not twice too much."""
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q)
    )
    spec = MODELS[name]
    spec = replace(spec, transformer=replace(spec.transformer, depth=1, depth_single=1))
    c = spec.transformer
    network = meta(Flux, c).to(dtype)
    axes = len(c.axes_dim)
    given = dict(
        img=torch.empty(2, 4096 + 300, c.in_channels), txt=torch.empty(2, 512, c.context_dim)
    )
    given |= dict(guidance=torch.empty(2)) if c.guidance else {}
    given |= dict(vector=torch.empty(2, c.vector_dim)) if c.vector_dim else {}
    given = {name: x.to("meta", dtype) for name, x in given.items()}
    given["t"] = torch.empty(2, device="meta")
    rope = torch.empty(512 + 4096 + 300, sum(c.axes_dim) // 2, 2, 2, device="meta")
    network.rope = lambda *ids: rope.clone()
    ids = dict(img_ids=torch.empty(4096 + 300, axes), txt_ids=torch.empty(512, axes))
    peak = script("benchmarks/measure").peak_bytes(lambda: network(**given, **ids))
    said = activations(
        spec, Workload(1024, 1024, batch=2, reference_tokens=300, itemsize=dtype.itemsize), "cuda"
    )["transformer"]
    assert peak <= said <= 2 * peak, f"{said / peak:.3f}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_the_autoencoders_activations_are_at_most_what_is_said(dtype):
    """Three times what is counted at most: a convolution's workspace is not, and takes about as much again on a GPU."""
    network, peak_bytes = (
        meta(AutoEncoder, KLEIN.autoencoder).to(dtype),
        script("benchmarks/measure").peak_bytes,
    )
    said = activations(KLEIN, Workload(1024, 768, itemsize=dtype.itemsize), "cuda")
    decoding = peak_bytes(
        lambda: network.decode(torch.empty(1, 128, 48, 64, device="meta", dtype=dtype))
    )
    assert decoding <= said["autoencoder"] <= 3 * decoding
    if dtype == torch.float32:
        encoding = peak_bytes(lambda: network.encode(torch.empty(1, 3, 768, 1024, device="meta")))
        assert encoding <= said["image encoder"] <= 3 * encoding


def test_activations_cover_the_published_ones():
    """Seen with diffusers at 1024 x 1024: 0.45 GiB in FLUX.1's transformer, 2.4 GiB for decoding; 4105 B a pixel in float32."""
    said = activations(DEV, SQUARE, "cuda")
    assert (
        0.45 * 2**30 <= said["transformer"] <= 1.1 * GB
        and 2.4 * 2**30 <= said["autoencoder"] <= 2.6 * 2**30
    )
    assert activations(DEV, replace(SQUARE, itemsize=4), "cpu")["autoencoder"] >= 4105 * 1024**2


def test_what_else_activations_depend_on():
    """By hand. klein 9B KV keeps 4096 tokens of references as keys and values of 8 + 24 blocks: 2.15 GB. Scores, without fused
    attention: 2 x 24 heads x 4608 x 4608 x 2 bytes. FLUX.1's table of modulations: 12 x 19 + 3 x 38 + 3 rows a step."""

    def of(spec, kind="cuda", stage="transformer", **changes) -> int:
        return activations(spec, replace(SQUARE, **changes), kind)[stage]

    kv = MODELS["flux.2-klein-9b-kv"]
    kept = of(kv, reference_tokens=4096) - of(
        replace(kv, kv_cached_references=False), reference_tokens=4096
    )
    assert kept == 2 * 4096 * 4096 * 32 * 2 == pytest.approx(2.15 * GB, rel=2e-3)
    assert of(KLEIN, "mps") - of(KLEIN) == 96 * 4608**2
    assert (
        of(DEV, steps=29) - of(DEV)
        == 28 * (12 * 19 + 3 * 38 + 3) * 3072 * 2
        == pytest.approx(59e6, rel=0.01)
    )
    for change in (
        dict(width=2048),
        dict(batch=2),
        dict(reference_tokens=100),
        dict(itemsize=4),
        dict(image_text_tokens=729),
    ):
        assert of(KLEIN, **change) > of(KLEIN)
    assert of(KLEIN, stage="autoencoder", batch=9) == of(KLEIN, stage="autoencoder")


# ---------------------------------------------------------------------------------------------------------- plans

# The published sizes: klein 4B 7.75 GB and its encoder 6.23; FLUX.2 dev 64.4 and 34.7; FLUX.1 23.8 and 9.5
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


def planned(
    size: float,
    offload=None,
    max_vram=None,
    weights=KLEIN_WEIGHTS,
    spec=KLEIN,
    work=SQUARE,
    kind="cuda",
    **options,
):
    return plan_memory(
        spec, weights, work, FreeMemory(kind, size * GB, 64 * GB), offload, max_vram, **options
    )


def test_everything_stays_where_there_is_room():
    """6.23 + 7.75 + 0.17 = 14.15 GB, 2.68 to decode (5 maps x 256 channels x 2 bytes x 1024 x 1024), 0.6 for libraries."""
    made = planned(24)
    assert made.offload == "none" and made.resident == {
        "text encoder": None,
        "transformer": None,
        "autoencoder": None,
    }
    assert (
        made.message
        == "text encoder 6.2 GB, transformer 7.8 GB, autoencoder 0.2 GB, all at once; at most 17.4 of 24.0 GB"
    )
    assert planned(17.5).offload == "none" and planned(17.4).offload == "model"


def test_stages_go_one_after_another_where_there_is_less():
    """The transformer's 7.75 GB are the most, with 0.6 for libraries, and 0.93 for 1.1 x 60 bytes x 4608 tokens x 3072."""
    made = planned(11.2)
    assert made.offload == "model" and set(made.resident.values()) == {None}
    assert (
        made.message
        == "text encoder 6.2 GB, then transformer 7.8 GB, then autoencoder 0.2 GB; at most 9.3 of 11.2 GB"
    )


def test_blocks_stream_where_there_is_still_less():
    """In 8 GB: 0.39 fixed, two slots of 0.49, 0.93 + 0.03 to work with and 0.6 for libraries leave 5.07 GB for blocks."""
    made = planned(8)
    assert made.offload == "block" and made.peak == 8 * GB
    assert made.resident["text encoder"] is None and made.resident["autoencoder"] is None
    assert made.resident["transformer"] == pytest.approx(5.07 * GB, abs=0.02 * GB)
    transformer = "transformer 7.8 GB of which 2.3 GB are streamed"
    assert (
        made.message
        == f"text encoder 6.2 GB, then {transformer}, then autoencoder 0.2 GB; at most 8.0 of 8.0 GB"
    )


def test_streaming_that_is_asked_for_takes_as_little_as_possible():
    made = planned(80, "block")
    assert made.resident == {"text encoder": 0, "transformer": 0, "autoencoder": None}
    assert made.peak == 170_000_000 + 5 * 256 * 2 * 1024**2 + 600_000_000  # decoding needs the most
    assert planned(80, "block", max_vram=6).resident["transformer"] == pytest.approx(
        3.07 * GB, abs=0.02 * GB
    )


def test_vram_limits_and_never_extends():
    assert planned(80, max_vram=11.2).message.endswith("at most 9.3 of 11.2 GB")
    assert planned(11.2, max_vram=80).message.endswith("at most 9.3 of 11.2 GB")


def test_flux2_dev_streams_in_24_gb():
    """99.3 GB of weights; its slots are of 1.96 GB."""
    made = planned(24, weights=DEV2_WEIGHTS, spec=DEV2)
    assert made.offload == "block" and made.peak <= 24 * GB
    assert (
        0 < made.resident["transformer"] < 18 * GB and 0 < made.resident["text encoder"] < 22 * GB
    )
    assert planned(141, weights=DEV2_WEIGHTS, spec=DEV2).offload == "none"
    assert planned(80, weights=DEV2_WEIGHTS, spec=DEV2).offload == "model"


def test_on_the_cpu_mapped_weights_take_nothing():
    made = planned(5, kind="cpu")
    assert made.offload == "none"
    assert made.message.endswith(
        "all at once, of which 14.2 GB are mapped from the files; at most 2.7 of 5.0 GB"
    )
    cast = {stage: replace(held, mapped=0) for stage, held in KLEIN_WEIGHTS.items()}
    assert planned(16, weights=cast, kind="cpu").offload == "model"
    with pytest.raises(
        UserError, match=r"needs at least 8\.8 GB, and 8\.0 GB are free"
    ):  # streaming would need more, not less
        planned(8, weights=cast, kind="cpu")


def test_apples_gpus_stage_in_the_same_memory():
    """Two slots twice over; and copies of what is mapped beside the file's pages, which can be dropped."""
    held, active = KLEIN_WEIGHTS["transformer"], 10**9
    assert (
        required(held, active, "mps", 0).device - required(held, active, "cuda", 0).device
        == NUM_BUFFERS * 490_733_568
    )
    assert (
        required(held, active, "mps", 0).host == 0
        and required(held, active, "cuda", 0).host == NUM_BUFFERS * 490_733_568
    )


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_fit_is_refused_with_numbers_and_a_way_out():
    with pytest.raises(UserError) as caught:
        planned(16, "none")
    assert str(caught.value) == (
        'flux.2-klein-4b at 1024x1024 with `offload="none"` needs at least 17.5 GB, and 16.0 GB are '
        'free. Use `offload="model"` or `offload="block"` or a smaller `width` and `height` or '
        '`quantize="fp8"` or an -fp8 file.'
    )
    with pytest.raises(
        UserError,
        match=r'`offload="model"` needs at least 9\.4 GB, and 9\.0 GB.* Use `offload="block"`',
    ):
        planned(9, "model")
    assert planned(16, "model").offload == "model"


def test_vram_below_the_floor_names_the_floor():
    """Decoding: 0.17 + 2.68 + 0.6 = 3.454 GB; at 512 x 512 the transformer is the most: its slots and fixed weights, 2.3 GB."""
    with pytest.raises(UserError) as caught:
        planned(24, max_vram=3)
    assert str(caught.value) == (
        "max_vram: flux.2-klein-4b at 1024x1024 needs at least 3.5 GB (got 3). "
        "Use a smaller `width` and `height`."
    )
    floor = planned(24, max_vram=3.5)
    assert floor.offload == "block" and floor.peak <= 3.5 * GB
    with pytest.raises(UserError, match=r"No option helps\. Use a smaller model\."):
        planned(24, max_vram=0.5)


@pytest.mark.parametrize("max_vram", [0, -1, math.inf, math.nan])
def test_max_vram_must_be_a_positive_size(max_vram):
    for refused in (
        lambda: RuntimeOptions(max_vram=max_vram),
        lambda: planned(24, max_vram=max_vram),
    ):
        with pytest.raises(UserError, match="^max_vram: must be a positive number of gigabytes"):
            refused()


@pytest.mark.parametrize("side", [0, -256, 240, 255, 264])
def test_vae_tile_must_be_a_multiple_of_16_from_256(side):
    with pytest.raises(UserError, match=rf"^vae_tile: .*multiple of 16.* 256 .*\(got {side}\)"):
        RuntimeOptions(vae_tile=side)


def test_unknown_runtime_options_list_the_known_ones():
    with pytest.raises(UserError, match="^quantize: int2 is unknown.*fp8, int8, int4"):
        RuntimeOptions(quantize="int2")
    with pytest.raises(UserError, match="^offload: stages is unknown.*none, model, block"):
        RuntimeOptions(offload="stages")
    with pytest.raises(UserError, match="^decode_dtype: .*torch.float16"):
        RuntimeOptions(decode_dtype=torch.float16)


def test_a_batch_that_is_too_large():
    with pytest.raises(UserError, match="32 at a time.*Use a smaller `num_images`"):
        planned(16, work=replace(SQUARE, batch=32))


def test_no_advice_to_quantise_what_is_quantised():
    with pytest.raises(UserError) as caught:
        planned(16, "none", quantizable=False)
    assert "fp8" not in str(caught.value)


def test_hosts_memory_counts_where_blocks_are_streamed():
    """Weights that were cast are the host's own; two stagings come on top."""
    cast = {stage: replace(held, mapped=0) for stage, held in DEV2_WEIGHTS.items()}
    with pytest.raises(
        UserError, match=r"needs 68\.\d GB of the host's memory, and 64\.0 GB are free"
    ):
        planned(24, weights=cast, spec=DEV2)
    assert planned(24, weights=DEV2_WEIGHTS, spec=DEV2).offload == "block"


# ---------------------------------------------------------------------------------------------------------- properties

sizes = st.integers(0, 5 * GB)
held = st.builds(
    lambda fixed, blocks, share, scratch: WeightSizes(
        fixed, tuple(blocks), int(share * (fixed + sum(blocks))), scratch
    ),
    sizes,
    st.lists(sizes, max_size=5),
    st.floats(0, 1),
    sizes,
)
stages = st.lists(held, min_size=1, max_size=4).map(
    lambda all: {f"stage {i}": each for i, each in enumerate(all)}
)
rooms = st.builds(
    FreeMemory,
    st.sampled_from(["cuda", "mps", "cpu"]),
    st.integers(0, 40 * GB),
    st.integers(0, 40 * GB),
)


def fastest(weights, active, room):
    return next(
        filter(None, (plan_mode(weights, active, room, mode) for mode in OFFLOAD_MODES)), None
    )


@given(stages, st.integers(0, 5 * GB), rooms, st.booleans())
def test_no_plan_exceeds_the_memory_there_is(weights, working, room, spare):
    """Counted anew: weights that are there, slots, activations, scratch and reserve."""
    active = dict.fromkeys(weights, working)
    for mode in OFFLOAD_MODES:
        if not (made := plan_mode(weights, active, room, mode, spare)):
            continue
        own = {
            s: w.total - (w.mapped if room.device_type == "cpu" else 0) for s, w in weights.items()
        }
        for stage, held in weights.items():
            stay = made.resident[stage]
            used = own[stage] if mode != "none" else sum(own.values())
            beside = 0
            if stay is not None:
                assert mode == "block" and 0 <= stay <= sum(held.blocks)
                used = (0 if room.device_type == "cpu" else held.fixed + stay) + NUM_BUFFERS * max(
                    held.blocks
                )
                beside = NUM_BUFFERS * max(held.blocks) + held.total - held.mapped
            used += working + held.scratch + RESERVED[room.device_type]
            if room.device_type == "cuda":
                assert beside <= room.host
            assert used + (0 if room.device_type == "cuda" else beside) <= made.peak <= room.device


@given(stages, st.integers(0, 5 * GB), rooms, st.integers(0, 40 * GB), st.integers(0, 40 * GB))
def test_more_memory_never_makes_a_slower_plan(weights, working, room, more, more_host):
    active = dict.fromkeys(weights, working)

    def slowness(room: FreeMemory) -> tuple:
        made = fastest(weights, active, room)
        if made is None:
            return (3, 0)
        streamed = [
            sum(weights[s].blocks) - stay for s, stay in made.resident.items() if stay is not None
        ]
        return (OFFLOAD_MODES.index(made.offload), sum(streamed))

    larger = room._replace(device=room.device + more, host=room.host + more_host)
    assert slowness(larger) <= slowness(room)


@given(
    st.integers(1, 40),
    st.sampled_from([None, *OFFLOAD_MODES]),
    st.sampled_from(["cuda", "mps", "cpu"]),
)
def test_the_floor_is_where_plans_begin(tenths, offload, kind):
    """What a refusal says would do does, rounded up to a tenth as it is."""
    try:
        planned(tenths, offload, kind=kind, max_vram=tenths / 10)
    except UserError as error:
        floor = float(str(error).split("at least ")[1].split(" GB")[0])
        assert floor > tenths / 10
        planned(100, offload, kind=kind, max_vram=floor)


# ---------------------------------------------------------------------------------------------------------- devices


def test_a_device_that_is_not_there():
    for device in ("cuda:99", "tpu", "meta"):
        with pytest.raises(UserError, match=f"^device: {device} is not available. Choose from cpu"):
            devices.choose_device(device)
    assert devices.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "capability, dtype",
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float32)],
)
def test_gpus_without_bfloat16_compute_in_float32(capability, dtype, monkeypatch, recwarn):
    """Turing (7.5) and Volta have float16 only."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert devices.choose_dtype(torch.device("cuda")) == dtype
    said = [str(warning.message) for warning in recwarn]
    if dtype == torch.bfloat16:
        assert said == []
    else:
        assert said[0].startswith("Tesla T4 does not compute in bfloat16")


@pytest.mark.parametrize("able, dtype", [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.filterwarnings("ignore:.* does not compute in bfloat16")
def test_cpus_and_apple_gpus(able, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: able)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    assert (
        devices.choose_dtype(torch.device("cpu"))
        == devices.choose_dtype(torch.device("mps"))
        == dtype
    )


def test_memory_of_the_machine(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:       24684084 kB\nMemFree:        22753992 kB\nMemAvailable:   23931216 kB\n"
    )
    assert devices._machine_memory(meminfo) == 23931216 * 1024
    assert 0 < devices._machine_memory(tmp_path / "absent") < math.inf
    assert 0 < devices.free_memory(torch.device("cpu")) < math.inf


def test_memory_of_a_container(tmp_path):
    """The limit less what is used, where the pages of files do not count as used."""
    assert devices._container_memory(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("8000000000\n")
    (tmp_path / "memory.current").write_text("5000000000\n")
    (tmp_path / "memory.stat").write_text(
        "anon 1000000000\nactive_file 1500000000\ninactive_file 2500000000\n"
    )
    assert devices._container_memory(tmp_path) == 7_000_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert devices._container_memory(tmp_path) == math.inf

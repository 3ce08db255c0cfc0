"""What saves memory and time, through `flux.load` and scripts/sample.py: that each option does what it says, and what it costs.

Lossless options are compared byte for byte. What is in memory is counted here, from all modules that Python knows of, and
compared with the sizes in the files' headers. On the embedded model, and on tiny random ones in the released layouts.
"""

import gc
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.drawn_images import A, B
from support.model_zoo import KLEIN, KONTEXT, KV, Zoo
from support.quantized_files import bfl_fp8, block_linears, nvfp4, save_gguf_q8_0, save_quantized
from support.sample_run import PROMPT, QUICK, TOY, pixels
from support.sample_run import image_of as made
from torch import nn

import flux
from flux import loading
from flux.configs import MODELS
from flux.image_io import output as images
from flux.image_io.request import ImageInputs
from flux.lora import merge as lora_merge
from flux.parity.reference import FLUX1_TINY, randomise
from flux.pipeline import Pipeline
from flux.runtime import lazy_module as network
from flux.runtime import residency
from flux.runtime.activation_memory import Workload, activations
from flux.runtime.devices import FreeMemory
from flux.runtime.lazy_module import LazyModule
from flux.runtime.streaming import Streamed
from flux.text_encoder import TextFeatures
from flux.transformer import Flux, Modulation
from flux.weights.locate import get_spec, is_available_locally
from flux.weights.quantization import FP8Linear, NVFP4Linear, QuantizedLinear, fp8

pytestmark = [
    pytest.mark.usefixtures("small_kontext_sizes"),
    pytest.mark.filterwarnings("ignore:.* was distilled for"),
    pytest.mark.filterwarnings("ignore:.* was not trained with --(no-)?kv-cache"),
]
ASKED = dict(prompts="a cat", width=64, height=80, steps=2, seed=3)
GIVEN = ("a cat", "--width", 64, "--height", 80, "--steps", 2, "--seed", 3)
MODULATORS = r"(img_mod|txt_mod|modulation|modulation_img|modulation_txt)\.lin\."
ENOUGH = FreeMemory("cpu", 1e12)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


class Live:
    """Bytes of the weights that modules have now, whichever they are, less those that were there before.

    Cycles of references are not collected first: what waits for that is in memory.
    """

    def __init__(self):
        gc.collect()
        self.before = list(modules())  # kept, so that their addresses are not used again

    def __call__(self) -> int:
        before = {id(module) for module in self.before}
        tensors = [
            tensor
            for module in modules()
            if id(module) not in before
            for tensor in (*module._parameters.values(), *module._buffers.values())
        ]
        found = {
            tensor.data_ptr(): tensor.nbytes
            for tensor in tensors
            if tensor is not None and not tensor.is_meta
        }
        return sum(found.values())


def modules() -> Iterator[nn.Module]:
    return (found for found in gc.get_objects() if issubclass(type(found), nn.Module))


def load(zoo: Zoo, name: str, dtype: torch.dtype = torch.float32, **options) -> Pipeline:
    zoo(name)
    return flux.load(name, weights=zoo.folder, device="cpu", dtype=dtype, **options)


def bytes_of(files, dtype: torch.dtype, less: str = "(?!)") -> int:
    """Of all tensors in the files, once they are cast, less those whose names match."""
    total = 0
    for path in files:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        total += (
            sum(int(np.prod(shape)) for name, shape in shapes.items() if not re.search(less, name))
            * dtype.itemsize
        )
    return total


def picture(pipe: Pipeline, **options) -> bytes:
    (image,) = pipe(**ASKED | options)
    return image.tobytes()


def all_released(pipe: Pipeline) -> bool:
    return all(network.module is None for network in pipe.residency.networks.all)


# ---------------------------------------------------------------------------------------------------------- offload

RUNS = {
    "flux.1": ("flux.1-dev", {}),
    "flux.1, cfg": ("flux.1-dev", dict(true_cfg_scale=2.0, negative_prompt="grey")),
    "kontext": (KONTEXT, dict(images=ImageInputs((A,)), width=None, height=None)),
    "klein": (KLEIN, {}),
    "klein, references": (KLEIN, dict(images=ImageInputs((A, B)))),
    "klein, kv-cache": (KLEIN, dict(images=ImageInputs((A,), kv_cache=True))),
    "klein-kv": (KV, dict(images=ImageInputs((A, B)))),
}


@dtypes
@pytest.mark.parametrize("name", RUNS)
def test_however_weights_are_held_the_picture_is_the_same(zoo, name, dtype):
    model, asked = RUNS[name]
    expected = picture(load(zoo, model, dtype, offload="none"), **asked)
    for offload in ("model", "block"):
        pipe, seen = load(zoo, model, dtype, offload=offload), []
        live, encode_one = Live(), pipe.text.encode_one

        def encode(prompt, encode_one=encode_one, live=live, seen=seen):
            features = encode_one(prompt)
            seen.append(("encode", live()))
            return features

        pipe.text.encode_one = encode
        found = picture(
            pipe,
            **asked,
            callback=lambda *_, live=live, seen=seen: seen.append(("denoise", live())),
        )
        assert found == expected
        assert all_released(pipe) and live() == 0
        text = [
            path
            for part, files in pipe.files.items()
            if part in ("t5", "clip", "model")
            for path in files
        ]
        most = {
            "encode": bytes_of(text, dtype),
            "denoise": bytes_of(pipe.files["transformer"], dtype, less=MODULATORS),
        }
        assert {stage for stage, _ in seen} == most.keys()
        assert all(0 < size <= most[stage] for stage, size in seen), (offload, seen, most)
        assert all(size == most[stage] for stage, size in seen if stage == "denoise")


@pytest.mark.parametrize("offload", ["model", "block"])
def test_when_a_network_is_loaded_no_other_is_there(zoo, offload, monkeypatch):
    """Nor its own former self, where the transformer is laid out anew without its modulation."""
    pipe, seen, ready = load(zoo, KLEIN, offload=offload), [], LazyModule._ready
    live = Live()
    monkeypatch.setattr(
        LazyModule, "_ready", lambda *arguments: (seen.append(live()), ready(*arguments))[1]
    )
    picture(pipe, images=ImageInputs((A,)))
    assert seen == [0] * 4


@pytest.mark.parametrize("offload", ["model", "block"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_picture_takes_one_read_one_merge_and_one_rounding_of_the_transformer(
    zoo, offload, quantize, tmp_path, monkeypatch
):
    path = tmp_path / "lora.safetensors"
    save_file(
        {"img_in.lora_A.weight": torch.ones(1, 16), "img_in.lora_B.weight": torch.ones(128, 1)},
        path,
    )
    pipe, done = load(zoo, KLEIN, offload=offload, quantize=quantize), []
    pipe.load_lora(path)
    for owner, name in ((LazyModule, "_load"), (lora_merge, "merge"), (network, "compress")):
        call = getattr(owner, name)

        def counted(subject, *more, name=name, call=call, **options):
            if subject is pipe.transformer or (
                isinstance(subject, Flux) and subject.img_in.weight.is_cpu
            ):  # not on meta
                done.append(name)
            return call(subject, *more, **options)

        monkeypatch.setattr(owner, name, counted)
    for prompt in ("a cat", "a dog"):
        done.clear()
        picture(pipe, prompts=prompt)
        assert done == ["_load"] + ["compress"] * bool(quantize) + [
            "merge"
        ]  # which the former begins, layer by layer


@pytest.mark.parametrize("model", ["flux.1-dev", KLEIN])
@pytest.mark.parametrize("offload", [None, "model", "block"])
def test_stages_that_are_called_one_by_one_are_held_as_in_a_call(zoo, offload, model):
    expected, pipe, seen = picture(load(zoo, model)), load(zoo, model, offload=offload), []

    def streams(network):
        return any(isinstance(part, Streamed) for part in network.module.modules())

    encode_one = pipe.text.encode_one

    def encode(prompt):
        features = encode_one(prompt)
        seen.extend(streams(network) for network in pipe.text.networks if network.block_lists)
        return features

    pipe.text.encode_one = encode
    features = pipe.encode(["a cat"])
    latents = pipe.sample(
        features, [3], 64, 80, 2, callback=lambda *_: seen.append(streams(pipe.transformer))
    )
    assert pipe.decode(latents)[0].tobytes() == expected
    assert seen == [offload == "block"] * 3 and all_released(pipe) == bool(offload)


def test_a_stage_that_needs_more_than_was_prepared_for_is_planned_anew_or_refused(zoo, monkeypatch):
    pipe = load(zoo, KLEIN, torch.bfloat16)
    features, peak = pipe.encode(["a cat", "a dog"]), pipe.plan_memory(64, 80, 2).peak
    planned, plan = [], residency.plan_memory

    def seen(spec, weights, work, *more, **options):
        planned.append((work.width, work.height, work.batch, work.steps))
        return plan(spec, weights, work, *more, **options)

    monkeypatch.setattr(residency, "plan_memory", seen)
    one = TextFeatures(features.tokens[:1], None)
    for given, asked in (
        ((one, [3]), (64, 80, 2)),
        ((one, [3]), (80, 64, 1)),
        ((one, [3]), (64, 96, 2)),
        ((features, [3, 4]), (64, 64, 2)),
        ((one, [3]), (64, 64, 3)),
    ):
        pipe.sample(*given, *asked)
    assert planned == [(64, 96, 1, 2), (64, 64, 2, 2), (64, 64, 1, 3)]
    pipe.plan_memory(64, 80, 2)
    monkeypatch.setattr(residency, "available_memory", lambda _: FreeMemory("cpu", peak))
    with pytest.raises(flux.errors.UserError, match="at 1024x1024 needs at least"):
        pipe.sample(one, [3], 1024, 1024, 2)


def test_with_room_everything_stays(zoo):
    pipe, live, seen = load(zoo, KLEIN, torch.bfloat16), Live(), []
    for _ in range(2):
        picture(pipe, callback=lambda *_: seen.append(live()))
    parts = [pipe.text.model, pipe.transformer, pipe.autoencoder]
    assert all(network.module is not None for network in parts)
    assert seen[-1] == live() == pytest.approx(sum(network.nbytes for network in parts), rel=1e-4)


def test_memory_that_is_short_is_noticed_and_what_was_loaded_goes(zoo, monkeypatch):
    """Stages by itself; also where there was room enough for the picture before."""
    pipe, live = load(zoo, KLEIN, torch.bfloat16), Live()
    monkeypatch.setattr(residency, "available_memory", lambda _: ENOUGH)
    expected, most = picture(pipe), pipe.plan_memory(64, 80, 2)
    assert most.offload == "none" and live() > 0
    monkeypatch.setattr(
        residency, "available_memory", lambda _: FreeMemory("cpu", most.peak - 1000 - live())
    )
    assert picture(pipe) == expected and all_released(pipe) and live() == 0
    assert pipe.plan_memory(64, 80, 2).offload == "model"


def test_its_own_weights_do_not_leave_it_short_of_memory(zoo, monkeypatch):
    """Room for all, once: when they are loaded, less is free, and that is no reason for another plan, or to refuse."""
    pipe, live = load(zoo, KLEIN, torch.bfloat16, offload="none"), Live()
    monkeypatch.setattr(residency, "available_memory", lambda _: ENOUGH)
    total = pipe.plan_memory(64, 80, 2).peak
    monkeypatch.setattr(residency, "available_memory", lambda _: FreeMemory("cpu", total - live()))
    assert (
        picture(pipe) == picture(pipe)
        and live()
        > 0.9 * total - activations(pipe.spec, Workload(64, 80, steps=2), "cpu")["transformer"]
    )
    assert pipe.plan_memory(64, 80, 2).offload == "none"


@pytest.mark.parametrize("offload", ["model", "block"])
def test_after_an_interruption_nothing_is_left_in_the_way(zoo, offload):
    pipe, live = load(zoo, "flux.1-dev", offload=offload), Live()
    expected = picture(pipe)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        picture(pipe, callback=stop)
    assert live() > 0
    assert picture(pipe, prompts="a dog") != expected and picture(pipe) == expected
    assert all_released(pipe) and live() == 0


def test_pictures_are_encoded_and_their_encoder_goes_on_the_first_call_too(zoo):
    pipe, live = load(zoo, KLEIN, offload="model"), Live()
    pipe.condition(ImageInputs((A,)))
    assert live() == 0


# ---------------------------------------------------------------------------------------------------------- modulation

DEEP = replace(
    FLUX1_TINY, hidden_size=64, num_heads=2, depth=19, depth_single=38
)  # blocks as released, and narrow


@pytest.fixture
def deep(zoo, monkeypatch, tmp_path) -> Pipeline:
    """FLUX.1 with as many blocks as released, which alone decides what share of it is modulation."""
    zoo("flux.1-dev")
    path = tmp_path / "deep.safetensors"
    save_file(randomise(Flux(DEEP)).bfloat16().state_dict(), path)

    def build(**options):
        return flux.load(
            "flux.1-dev", zoo.folder, "cpu", torch.bfloat16, transformer=path, **options
        )

    return build


@pytest.mark.parametrize("offload", ["model", "block"])
def test_a_quarter_of_flux1_is_out_of_memory_while_it_denoises(deep, offload, tmp_path):
    pipe, seen = deep(offload=offload), []
    whole = bytes_of(pipe.files["transformer"], torch.bfloat16)
    assert (
        pipe.transformer.nbytes
        == whole
        == sum(t.nbytes for t in load_file(tmp_path / "deep.safetensors").values())
    )
    live = Live()
    pictures = [
        picture(pipe, prompts=prompt, callback=lambda *_: seen.append(live()))
        for prompt in ("a cat", "a dog")
    ]
    assert len(seen) == 4 and max(seen) <= 0.75 * whole, max(seen) / whole
    other = deep(offload="none")
    assert (
        pictures == [picture(other, prompts=prompt) for prompt in ("a cat", "a dog")]
        and len(set(pictures)) == 2
    )


@pytest.mark.parametrize("offload", ["model", "block"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_with_a_lora_too(zoo, offload, quantize, tmp_path):
    """One that changes modulations, as most do for FLUX.1."""
    path = tmp_path / "lora.safetensors"
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape):
        return torch.randn(shape, generator=generator) / shape[1] ** 0.5

    layers = {
        "double_blocks.1.img_mod.lin": 768,
        "single_blocks.2.modulation.lin": 384,
        "single_blocks.0.linear2": 128,
    }
    tensors = {}
    for layer, rows in layers.items():
        columns = 640 if "linear2" in layer else 128
        tensors |= {
            f"{layer}.lora_A.weight": drawn(4, columns),
            f"{layer}.lora_B.weight": drawn(rows, 4),
        }
    save_file(tensors, path)
    found = []
    for held in ("none", offload):
        pipe = load(zoo, "flux.1-dev", offload=held, quantize=quantize)
        plain = picture(pipe)
        pipe.load_lora(path)
        found.append((plain, picture(pipe), picture(pipe, prompts="a dog")))
        pipe.unload_loras()
        assert picture(pipe) == plain
    assert found[0] == found[1] and len(set(found[0])) == 3


@pytest.mark.parametrize("resident", [None, 0])
@pytest.mark.parametrize("change", [False, True])
def test_a_network_brings_back_what_was_taken_away(zoo, resident, change):
    network = load(zoo, "flux.1-dev", torch.bfloat16).transformer
    if change:
        network.set_transform(lambda module: module.img_in.bias.add_(1))
    network.stream(resident)
    with torch.inference_mode():
        state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
        for _ in range(2):
            less = network.drop_submodules(Modulation).state_dict()
            assert {name for name in state if name not in less} == {
                name for name in state if re.search(MODULATORS, name)
            }
            again = network().state_dict()
            assert again.keys() == state.keys() and all(
                torch.equal(again[name], state[name]) for name in state
            )


# ---------------------------------------------------------------------------------------------------------- --vram


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def fail(*_):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(LazyModule, "_ready", fail)


@pytest.mark.parametrize("model", ["flux.2-tiny", "flux.1-dev", KLEIN])
@pytest.mark.parametrize(
    "offload", [(), ("--offload", "none"), ("--offload", "stages"), ("--offload", "stream")]
)
def test_too_little_memory_is_refused_with_the_floor(cli, zoo, nothing_is_loaded, model, offload):
    run = cli(*GIVEN, *zoo(model), "--vram", 0.001, *offload)
    how = f" with --offload {offload[1]}" if offload else ""
    run.fails_with(f"--vram 0.001: {model} at 64x80{how} needs at least ", " GB")


def test_the_floor_is_enough(cli, zoo):
    """What the refusal names, and a little less, which is refused."""
    flags = (*zoo(KLEIN), "--dtype", "bfloat16")
    run = cli("a cat", *flags, "--width", 1024, "--height", 1024, "--steps", 1, "--vram", 0.001)
    (floor,) = re.findall(r"needs at least ([0-9.]+) GB", run.err)
    pipe = load(zoo, KLEIN, torch.bfloat16, max_vram=float(floor))
    assert pipe.plan_memory(1024, 1024, 1).peak <= float(floor) * 1e9
    low = load(zoo, KLEIN, torch.bfloat16, max_vram=float(floor) - 0.1)
    with pytest.raises(flux.errors.UserError, match=f"needs at least {re.escape(floor)} GB"):
        low.plan_memory(1024, 1024, 1)


@pytest.mark.parametrize("value", [0, -1, "nan", "inf"])
def test_memory_that_is_no_amount_is_refused(cli, nothing_is_loaded, value):
    cli(PROMPT, *QUICK, f"--max-vram={value}").fails_with(f"--vram {value}", "gigabytes")


def test_memory_that_is_no_number_is_refused(cli):
    run = cli(PROMPT, *QUICK, "--vram", "much")
    assert run.code == 2 and "--vram" in run.err and not run.files


def test_what_is_resident_is_said(cli, zoo):
    run = cli(*GIVEN, *zoo(KLEIN), "--vram", 8)
    assert (
        run.code == 0
        and "memory: text encoder 0.0 GB, transformer 0.0 GB, autoencoder 0.0 GB, all at once"
        in run.err
    )
    assert "of 8.0 GB" in run.err and run.err.count("memory: ") == 1
    run = cli(*GIVEN, *zoo(KLEIN), "--vram", 8, "--offload", "stream")
    assert run.code == 0 and "transformer 0.0 GB" in run.err and ", then " in run.err


def test_where_memory_is_short_stages_are_chosen_and_said(cli, zoo, monkeypatch):
    flags = (*GIVEN, *zoo(KLEIN), "--dtype", "bfloat16")
    expected = pixels(made(cli(*flags, "--offload", "none")))
    most, least = (
        load(zoo, KLEIN, torch.bfloat16, offload=way).plan_memory(64, 80, 2).peak
        for way in ("none", "model")
    )
    monkeypatch.setattr(
        residency, "available_memory", lambda _: FreeMemory("cpu", (most + least) / 2)
    )
    run = cli(*flags)
    assert pixels(made(run)) == expected
    assert (
        "memory: text encoder 0.0 GB, then transformer 0.0 GB, then autoencoder 0.0 GB; at most"
        in run.err
    )
    monkeypatch.setattr(residency, "available_memory", lambda _: ENOUGH)
    run = cli(*flags)
    assert pixels(made(run)) == expected and "all at once" in run.err


def test_references_that_need_too_much_are_refused_before_a_prompt_is_encoded(
    cli, zoo, monkeypatch
):
    """How many tokens they are is known when they are encoded, and not before."""
    A.save("a.png")
    pipe = load(zoo, KLEIN)
    alone = pipe.plan_memory(64, 80, 2, encoded_pixels=64 * 80).peak
    larger = pipe.plan_memory(
        steps=2, conditions=pipe.condition(ImageInputs((A.resize((1024, 1024)),)), 64, 80)
    ).peak
    assert larger > alone
    A.resize((1024, 1024)).save("a.png")
    monkeypatch.setattr(
        residency, "available_memory", lambda _: FreeMemory("cpu", (alone + larger) / 2)
    )
    monkeypatch.setattr(
        type(pipe.text), "encode_one", lambda *_: pytest.fail("a prompt was encoded")
    )
    cli(*GIVEN, *zoo(KLEIN), "--image", "a.png").fails_with("needs at least", "GB")


# ---------------------------------------------------------------------------------------------------------- --quantize

LOWEST = {"fp8": 40, "int8": 50, "int4": 28}  # dB; of this picture, 43.6, 53.8 and 31.5


def psnr(a: bytes, b: bytes) -> float:
    a, b = (np.frombuffer(x, np.uint8).astype(np.float64) for x in (a, b))
    return float(10 * np.log10(255**2 / np.mean((a - b) ** 2))) if (a != b).any() else float("inf")


@pytest.fixture(scope="module")
def exact() -> bytes:
    return by_the_toy()


def by_the_toy(**options) -> bytes:
    torch.set_flush_denormal(True)
    try:
        return flux.load(device="cpu", **options)(PROMPT, seed=7)[0].tobytes()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", LOWEST)
def test_quantised_when_loaded_the_toy_paints_nearly_the_same(cli, exact, kind):
    path = made(run := cli(PROMPT, "--seed", 7, "--quantize", kind))
    found = psnr(pixels(path), exact)
    assert LOWEST[kind] < found < float("inf"), found
    assert "memory: " in run.err and pixels(path) == by_the_toy(quantize=kind)
    assert images.read_metadata(path)["quantize"] == kind
    again = made(cli("--remake", path))
    assert pixels(again) == pixels(path) and images.read_metadata(again) == images.read_metadata(
        path
    )


def test_quantised_models_take_less_memory_and_say_so(zoo):
    """Blocks at a byte a number, and four a row; int4 at 4.5 bits. The large text encoder too; no autoencoder."""
    for name in ("flux.1-dev", KLEIN):
        sizes = {}
        for kind in (None, "fp8", "int8", "int4"):
            pipe = load(zoo, name, torch.bfloat16, quantize=kind)
            planned = pipe.plan_memory(64, 64)
            sizes[kind] = pipe.transformer.nbytes, planned.peak
            held = [
                layer
                for network in pipe.residency.networks.all
                for layer in network().modules()
                if isinstance(layer, QuantizedLinear)
            ]
            assert bool(held) == bool(kind)
            assert pipe.transformer.nbytes == sum(
                t.nbytes for t in pipe.transformer().state_dict().values()
            )
            assert not any(
                isinstance(layer, QuantizedLinear) for layer in pipe.autoencoder().modules()
            )
        assert sizes["int4"] < sizes["int8"] == sizes["fp8"] < sizes[None]


def test_what_is_quantised_is_rounded_once_and_never_cast_as_a_whole(zoo, monkeypatch):
    """From float32 files, for work in bfloat16."""
    pipe, compress, seen = (
        load(zoo, KLEIN, torch.bfloat16, quantize="int8"),
        network.compress,
        set(),
    )

    def see(module, *arguments, **options):
        seen.update(parameter.dtype for parameter in module.parameters() if not parameter.is_meta)
        compress(module, *arguments, **options)

    monkeypatch.setattr(network, "compress", see)
    layer = pipe.transformer().get_submodule("single_blocks.1.linear1")
    assert (
        seen == {torch.float32} == {load_file(pipe.files["transformer"][0])["img_in.weight"].dtype}
    )
    weight = load_file(pipe.files["transformer"][0])["single_blocks.1.linear1.weight"]
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    assert torch.equal(layer.weight, (weight / scale).round().to(torch.int8)) and torch.equal(
        layer.weight_scale, scale
    )
    assert {parameter.dtype for parameter in pipe.transformer().parameters()} == {torch.bfloat16}


def test_unknown_kind_is_refused_before_any_file_is_looked_for(cli, monkeypatch):
    monkeypatch.setattr(loading, "locate", lambda *_: pytest.fail("files were looked for"))
    cli(PROMPT, *QUICK, "--quantize", "int2").fails_with(
        "--quantize int2 is unknown", "fp8, int8, int4"
    )


@pytest.fixture
def toy_fp8(tmp_path) -> Path:
    state = {name: tensor.bfloat16() for name, tensor in load_file(TOY).items()}
    with torch.device("meta"):
        layers = block_linears(Flux(MODELS["flux.2-tiny"].transformer))
    return save_quantized(tmp_path / "toy-fp8.safetensors", bfl_fp8(layers, state))


@pytest.fixture
def toy_gguf(tmp_path) -> Path:
    state = {name: tensor.bfloat16() for name, tensor in load_file(TOY).items()}
    with torch.device("meta"):
        layers = block_linears(Flux(MODELS["flux.2-tiny"].transformer))
    return save_gguf_q8_0(tmp_path / "toy.gguf", layers, state)[0]


@pytest.mark.parametrize("kind", LOWEST)
def test_quantised_files_are_not_quantised_again(cli, toy_fp8, toy_gguf, nothing_is_loaded, kind):
    for path, name in ((toy_fp8, "FP8Linear"), (toy_gguf, "GGUFLinear")):
        run = cli(
            PROMPT, *QUICK, "--model", "flux.2-tiny", "--transformer", path, "--quantize", kind
        )
        run.fails_with("quantized already", name, f"Leave --quantize {kind} out")


@pytest.mark.parametrize("streamed", [False, True])
def test_products_in_float8_change_the_picture_and_are_remembered(cli, exact, streamed):
    flags = (PROMPT, "--seed", 7, "--quantize", "fp8") + ("--offload", "stream") * streamed
    plain, native = made(cli(*flags)), made(run := cli(*flags, "--native-fp8"))
    assert (
        pixels(plain) != pixels(native)
        and psnr(pixels(native), exact) > 33
        and "note" not in run.err
    )
    assert images.read_metadata(native) == images.read_metadata(plain) | {"native_fp8": True}
    assert pixels(made(cli("--remake", native))) == pixels(native)


def test_a_device_without_float8_products_is_said_once_and_makes_the_same_picture(cli, monkeypatch):
    """As on Apple's GPUs, which are none of those that can."""
    lack = fp8._lack
    monkeypatch.setattr(fp8, "_lack", lambda device, module: lack(torch.device("mps"), module))
    flags = (PROMPT, *QUICK, "--seed", 7, "--quantize", "fp8")
    plain, native = (
        made(cli(*flags)),
        made(run := cli(*flags, "--native-fp8", "--num-images", 1, "--offload", "stages")),
    )
    assert (
        run.err.count("note: float8 matrix products need an NVIDIA GPU") == 1
        and run.err.count("note: ") == 1
    )
    assert pixels(plain) == pixels(native)


@pytest.mark.parametrize("flags", [(), ("--quantize", "int8")])
def test_float8_products_of_no_float8_weights_are_refused(cli, nothing_is_loaded, flags):
    cli(PROMPT, *QUICK, "--native-fp8", *flags).fails_with(
        "--native-fp8", "no float8 weights", "--quantize fp8"
    )


# ---------------------------------------------------------------------------------------------------------- quantised files


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_quantised_transformer_files(cli, toy_fp8, toy_gguf, exact, kind):
    """`--transformer FILE`; its type is told by its contents, so the name may be any."""
    file = {"fp8": toy_fp8, "gguf": toy_gguf}[kind]
    flags = ("--model", "flux.2-tiny", "--transformer", file)
    path = made(run := cli(PROMPT, "--seed", 7, *flags))
    assert 37 < psnr(pixels(path), exact) < float("inf") and "error" not in run.err
    assert images.read_metadata(path)["transformer"] == file.name
    assert pixels(path) == by_the_toy(transformer=file)
    assert pixels(made(cli("--remake", path, *flags[2:]))) == pixels(path)
    other = file.rename(file.with_name("model.bin"))
    assert pixels(made(cli(PROMPT, "--seed", 7, *flags[:3], other))) == pixels(path)


@pytest.mark.parametrize("offload", ["model", "block"])
def test_quantised_files_are_offloaded(toy_fp8, toy_gguf, offload):
    for file in (toy_fp8, toy_gguf):
        held = [
            flux.load("flux.2-tiny", device="cpu", transformer=file, offload=way)
            for way in ("none", offload)
        ]
        assert picture(held[0], prompts=PROMPT) == picture(
            held[1], prompts=PROMPT
        ) and all_released(held[1])


def test_quantised_file_without_a_model_is_known_by_its_shape(cli, toy_fp8):
    path = made(run := cli(PROMPT, *QUICK, "--transformer", toy_fp8))
    assert images.read_metadata(path)["model"] == "flux.2-tiny" and "note" not in run.err


# ---------------------------------------------------------------------------------------------------------- rows

BASES = {  # the row of the unquantised model, in whose repository the rest lies
    "flux.2-dev-nvfp4": "flux.2-dev",
    "flux.2-klein-4b-fp8": KLEIN,
    "flux.2-klein-4b-nvfp4": KLEIN,
    "flux.2-klein-9b-fp8": "flux.2-klein-9b",
    "flux.2-klein-9b-nvfp4": "flux.2-klein-9b",
    "flux.2-klein-9b-kv-fp8": KV,
    "flux.2-klein-base-4b-fp8": "flux.2-klein-base-4b",
    "flux.2-klein-base-9b-fp8": "flux.2-klein-base-9b",
    "flux.2-klein-base-9b-nvfp4": "flux.2-klein-base-9b",
}


def test_rows_are_those_of_quantised_files():
    assert {
        name for name, spec in MODELS.items() if spec.weight_format != "bfloat16"
    } == BASES.keys()


@pytest.fixture
def quantised_row(zoo, monkeypatch):
    """Write the two repositories of a row, tiny, and put its spec into the table; the weights that its file stands for."""

    def write(name: str) -> Path:
        zoo(BASES[name])
        base, row = MODELS[BASES[name]], MODELS[name]
        tiny = ("transformer", "text", "text_length", "autoencoder", "size")
        monkeypatch.setitem(
            MODELS, name, replace(row, **{field: getattr(base, field) for field in tiny})
        )
        ((part, file),) = row.addon.files
        path = zoo.folder / row.addon.repository.split("/")[1] / file
        if not path.exists():
            path.parent.mkdir()
            whole = load_file(zoo.folder / base.repository.split("/")[1] / base.transformer_file)
            state = {name: tensor.bfloat16() for name, tensor in whole.items()}
            with torch.device("meta"):
                layers = block_linears(Flux(base.transformer))
            written = (bfl_fp8 if row.weight_format == "fp8" else nvfp4)(layers, state)
            save_quantized(path, written)
            save_file(
                {n: written.weights.get(n, t.float()) for n, t in state.items()},
                path.with_suffix(".whole"),
            )
        return path

    return write


def realigned(module: nn.Module) -> None:
    """On a CPU, the order of a float32 sum depends on where a matrix begins: in a mapped file, anywhere."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("name", BASES)
def test_every_row_of_a_quantised_file_makes_pictures(cli, zoo, quantised_row, name):
    """The picture of the unquantised model with the weights that the file stands for, from the command line."""
    spec, path = MODELS[name], quantised_row(name)
    assert spec.licence == MODELS[BASES[name]].licence and spec.addon.repository.lower().endswith(
        name
    )
    flags = ("--model", name, "--weights", zoo.folder, "--dtype", "float32")
    found = made(cli(*GIVEN, *flags))
    pipe = flux.load(name, weights=zoo.folder, device="cpu", dtype=torch.float32)
    layers = {
        type(layer) for layer in pipe.transformer().modules() if isinstance(layer, QuantizedLinear)
    }
    assert layers == {FP8Linear if spec.weight_format == "fp8" else NVFP4Linear}
    assert (
        pipe.files["transformer"] == [path]
        and pipe.spec.kv_cached_references == MODELS[BASES[name]].cached
    )
    whole = flux.load(
        BASES[name], zoo.folder, "cpu", torch.float32, transformer=path.with_suffix(".whole")
    )
    whole.transformer.set_transform(realigned)
    torch.set_flush_denormal(True)
    try:
        assert pixels(found) == picture(whole)
    finally:
        torch.set_flush_denormal(False)
    assert images.read_metadata(found)["model"] == name


def test_the_list_says_which_are_here(cli, zoo, quantised_row):
    for name in ("flux.2-klein-4b-fp8", "flux.2-klein-base-9b-nvfp4"):
        path = quantised_row(name)

        def here():
            return {
                line.split()[0]
                for line in cli("--list-models", "--weights", zoo.folder).out.splitlines()
                if " yes " in line
            }

        assert name in here() and is_available_locally(MODELS[name], zoo.folder)
        for missing in (
            path,
            zoo.folder / MODELS[name].repository.split("/")[1] / "tokenizer/tokenizer.json",
        ):
            away = missing.rename(missing.with_name("away"))
            assert name not in here() and not is_available_locally(MODELS[name], zoo.folder)
            away.rename(missing)


@pytest.mark.parametrize("name", BASES)
def test_a_row_that_is_not_here_says_where_to_get_it(cli, tmp_path, name):
    weights = tmp_path / "empty"
    weights.mkdir()
    run = cli("a cat", "--model", name, "--weights", weights)
    run.fails_with("get it from https://huggingface.co/black-forest-labs/")


def test_a_file_of_klein_names_no_quantised_row(zoo, quantised_row, recwarn):
    """They are files of the same models: the rest is the same, and `--model` need not tell them apart."""
    quantised_row("flux.2-klein-4b-fp8")
    spec = MODELS[KLEIN]
    found = get_spec(None, zoo.folder / "FLUX.2-klein-4B" / spec.transformer_file)
    assert found == spec
    assert not [
        str(w.message) for w in recwarn if "fp8" in str(w.message) or "nvfp4" in str(w.message)
    ]


# ---------------------------------------------------------------------------------------------------------- --compile


@pytest.fixture
def graphs(monkeypatch) -> list:
    """The graphs that blocks are compiled to; a backend runs them as they are."""
    found, compile = [], nn.Module.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile(self, backend=backend, **options)
    )
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options", [{}, dict(quantize="int8"), dict(offload="model"), dict(offload="block")], ids=str
)
@pytest.mark.parametrize("name", ["flux.1-dev", KLEIN])
def test_one_graph_for_all_blocks_of_a_kind(zoo, graphs, name, options):
    """At every step, in the next picture, and at most one more for all other sizes. Equal to the last bit, since the backend
    fuses nothing."""
    plain, compiled = (load(zoo, name, compile=compile, **options) for compile in (False, True))
    expected, found = (picture(pipe, steps=4) for pipe in (plain, compiled))
    assert found == expected and len(graphs) == 2
    assert (
        picture(compiled, prompts="a dog") == picture(plain, prompts="a dog") and len(graphs) == 2
    )
    counts = []
    for width, height in ((96, 64), (64, 128), (112, 80), (80, 64)):
        size = dict(width=width, height=height)
        assert picture(compiled, **size) == picture(plain, **size)
        counts.append(len(graphs))
    assert counts[0] <= 4 and counts[-1] == counts[0], counts


def test_many_sizes_of_several_models_in_one_process_take_few_graphs(zoo, graphs):
    """Of each of two kinds of block: one for the first size, and one for all others; the same for batches."""
    sizes = [(width, height) for width in (64, 80, 112, 144) for height in (64, 96, 128)]
    for number, (name, dtype) in enumerate(
        (n, d) for n in ("flux.1-dev", KLEIN) for d in (torch.float32, torch.bfloat16)
    ):
        pipe, counts = load(zoo, name, dtype, compile=True), []
        for width, height in sizes:
            for batch in (1, 2):
                pipe("a cat", width, height, 1, num_images=batch)
            counts.append(len(graphs))
        assert counts[-1] <= 8 * (number + 1) and counts[-1] == counts[1], counts


def test_compiled_from_the_command_line(cli, graphs):
    plain, compiled = (
        made(cli(PROMPT, *QUICK, "--seed", 7)),
        made(cli(PROMPT, *QUICK, "--seed", 7, "--compile")),
    )
    assert pixels(plain) == pixels(compiled) and len(graphs) == 2
    assert images.read_metadata(compiled) == images.read_metadata(plain) | {
        "compile": True
    }  # which rounds in its own way
    torch._dynamo.reset()
    assert pixels(made(cli("--remake", compiled))) == pixels(plain) and len(graphs) == 4


# ---------------------------------------------------------------------------------------------------------- --tile


def test_a_picture_of_one_tile_is_the_same(cli):
    flags = (PROMPT, "--seed", 7, "--steps", 2, "--width", 256, "--height", 192)
    plain, tiled = made(cli(*flags)), made(cli(*flags, "--tile", 256))
    assert pixels(plain) == pixels(tiled)
    assert images.read_metadata(tiled) == images.read_metadata(plain) | {"tile": 256}


def test_a_picture_of_tiles_is_nearly_the_same_and_can_be_made_again(cli):
    flags = (PROMPT, "--seed", 7, "--steps", 4, "--width", 448, "--height", 256)
    plain, tiled = made(cli(*flags)), made(cli(*flags, "--tile", 256))
    found = psnr(pixels(plain), pixels(tiled))
    assert 45 < found < float("inf"), found
    with Image.open(tiled) as image:
        assert image.size == (448, 256)
    again = made(cli("--remake", tiled))
    assert pixels(again) == pixels(tiled) and images.read_metadata(again) == images.read_metadata(
        tiled
    )


def test_tiles_are_counted_on_when_memory_is_short(zoo):
    """Decoding takes the most, in large pictures of small models."""
    whole, tiled = (
        load(zoo, KLEIN, offload="model", vae_tile=tile).plan_memory(2048, 2048).peak
        for tile in (None, 256)
    )
    assert tiled < 0.9 * whole
    vram = (whole + tiled) / 2e9
    assert load(zoo, KLEIN, vae_tile=256, max_vram=vram).plan_memory(2048, 2048).peak <= vram * 1e9
    with pytest.raises(flux.errors.UserError, match="--vram .* needs at least .*--tile 1024"):
        load(zoo, KLEIN, max_vram=vram).plan_memory(2048, 2048)


@pytest.mark.parametrize("side", [0, -256, 240, 255, 264])
def test_other_tiles_are_refused(cli, nothing_is_loaded, side):
    cli(PROMPT, *QUICK, f"--vae-tile={side}").fails_with(
        f"--tile {side}", "a multiple of 16", "256 pixels at least"
    )


def test_tiles_that_are_no_number_are_refused(cli):
    run = cli(PROMPT, *QUICK, "--tile", "large")
    assert run.code == 2 and "--tile" in run.err and not run.files

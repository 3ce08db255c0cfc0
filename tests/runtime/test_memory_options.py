"""offload and max_vram: every way of holding weights gives the same image, to the byte.

The weights in memory are counted from all modules, and compared with the headers of the files. The
models are tiny and random, in the released layouts.
"""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from support.drawn_images import A, B
from support.loaded_weights import LoadedBytes, file_bytes, generate, load
from support.model_zoo import KLEIN, KONTEXT, KV
from support.sample_run import image_of, pixels
from torch import Tensor

import flux
from flux.errors import UserError
from flux.image_io.request import ImageInputs
from flux.lora import merge as lora_merge
from flux.parity.reference import FLUX1_TINY, randomise
from flux.pipeline import Pipeline
from flux.runtime import lazy_module, residency
from flux.runtime.activation_memory import Workload, activations
from flux.runtime.devices import FreeMemory
from flux.runtime.lazy_module import LazyModule
from flux.runtime.streaming import StreamedModuleList
from flux.text_encoder import TextFeatures
from flux.transformer import Flux, Modulation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("small_kontext_sizes"),
    pytest.mark.filterwarnings("ignore:.* was distilled for"),
    pytest.mark.filterwarnings("ignore:.* was not trained with"),
]
DEV = "flux.1-dev"
MODULATION = r"(img_mod|txt_mod|modulation|modulation_img|modulation_txt)\.lin\."
UNLIMITED = FreeMemory("cpu", 1e12)
IN_BFLOAT16 = dict(dtype=torch.bfloat16, decode_dtype=torch.bfloat16)
either_offload = pytest.mark.parametrize("offload", ["model", "block"])


def all_released(pipe: Pipeline) -> bool:
    return all(network.module is None for network in pipe.residency.networks)


def limit_memory(monkeypatch, free: FreeMemory) -> None:
    monkeypatch.setattr(residency, "available_memory", lambda device: free)


def watch_encoding(pipe: Pipeline, watch) -> None:
    """Call `watch()` after each prompt is encoded."""
    encode_one = pipe.text.encode_one

    def encode(prompt: str) -> TextFeatures:
        features = encode_one(prompt)
        watch()
        return features

    pipe.text.encode_one = encode


# ------------------------------------------------------------------ exactness

CASES = {
    "flux.1": (DEV, torch.bfloat16, {}),
    "flux.1, cfg": (DEV, torch.float32, dict(true_cfg_scale=2.0, negative_prompt="grey")),
    "kontext": (
        KONTEXT, torch.bfloat16, dict(images=ImageInputs((A,)), width=None, height=None)
    ),
    "klein": (KLEIN, torch.float32, {}),
    "klein, references": (KLEIN, torch.bfloat16, dict(images=ImageInputs((A, B)))),
    "klein, kv_cache": (KLEIN, torch.float32, dict(images=ImageInputs((A,), kv_cache=True))),
    "klein-kv": (KV, torch.bfloat16, dict(images=ImageInputs((A, B)))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_image_does_not_depend_on_offload(zoo, case, monkeypatch):
    """Each stage holds its own weights only; while it denoises, none of the modulation."""
    model, dtype, request = CASES[case]
    expected = generate(load(zoo, model, dtype, offload="none"), **request)
    for offload in ("model", "block"):
        pipe = load(zoo, model, dtype, offload=offload)
        loaded, encoding, denoising = LoadedBytes(monkeypatch), [], []
        watch_encoding(pipe, lambda seen=encoding, loaded=loaded: seen.append(loaded()))

        def callback(*_, seen=denoising, loaded=loaded):
            seen.append(loaded())

        assert generate(pipe, **request, callback=callback) == expected
        assert all_released(pipe) and loaded() == 0
        text = []
        for part, files in pipe.files.items():
            text += files if part in ("t5", "clip", "model") else []
        assert encoding and all(0 < size <= file_bytes(text, dtype) for size in encoding)
        transformer = file_bytes(pipe.files["transformer"], dtype, without=MODULATION)
        assert denoising and set(denoising) == {transformer}


@pytest.mark.parametrize("model, offload", [(KLEIN, None), (KLEIN, "model"), (DEV, "block")])
def test_stages_called_one_by_one_are_offloaded_as_in_a_call(zoo, model, offload):
    expected, pipe, streams = generate(load(zoo, model)), load(zoo, model, offload=offload), []

    def watch(network: LazyModule, *_) -> None:
        parts = network.module.modules()
        streams.append(any(isinstance(part, StreamedModuleList) for part in parts))

    (encoder,) = (network for network in pipe.text.networks if network.block_lists)
    watch_encoding(pipe, partial(watch, encoder))
    features = pipe.encode(["a cat"])
    latents = pipe.sample(features, [3], 64, 80, 2, callback=partial(watch, pipe.transformer))
    assert pipe.decode(latents)[0].tobytes() == expected
    assert streams == [offload == "block"] * 3 and all_released(pipe) == bool(offload)


# ------------------------------------------------------------------ what is loaded when


@either_offload
def test_no_other_network_is_in_memory_when_one_is_loaded(zoo, offload, monkeypatch):
    """Nor the transformer itself, when it is laid out again without its modulation."""
    pipe, seen, prepare = load(zoo, KLEIN, offload=offload), [], LazyModule._prepare
    loaded = LoadedBytes(monkeypatch)

    def watched(network: LazyModule):
        seen.append(loaded())
        return prepare(network)

    monkeypatch.setattr(LazyModule, "_prepare", watched)
    generate(pipe, images=ImageInputs((A,)))
    assert seen == [0] * 4


@either_offload
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_transformer_is_read_merged_and_rounded_once(zoo, offload, quantize, tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    factors = {"lora_A": torch.ones(1, 16), "lora_B": torch.ones(128, 1)}
    save_file({f"img_in.{name}.weight": factor for name, factor in factors.items()}, path)
    pipe, calls = load(zoo, KLEIN, offload=offload, quantize=quantize), []
    pipe.load_lora(path)
    for owner, name in ((LazyModule, "_load"), (lora_merge, "merge"), (lazy_module, "quantize_")):
        call = getattr(owner, name)

        def counted(subject, *more, name=name, call=call, **options):
            real = isinstance(subject, Flux) and subject.img_in.weight.is_cpu  # not meta
            if subject is pipe.transformer or real:
                calls.append(name)
            return call(subject, *more, **options)

        monkeypatch.setattr(owner, name, counted)
    for prompt in ("a cat", "a dog"):
        calls.clear()
        generate(pipe, prompts=prompt)
        quantizing = ["quantize_"] if quantize else []  # which calls `merge`, layer by layer
        assert calls == ["_load", *quantizing, "merge"]


@either_offload
def test_interrupted_run_does_not_disturb_the_next(zoo, offload, monkeypatch):
    pipe = load(zoo, DEV, offload=offload)
    loaded = LoadedBytes(monkeypatch)
    expected = generate(pipe)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, callback=stop)
    assert loaded() > 0
    assert generate(pipe, prompts="a dog") != expected and generate(pipe) == expected
    assert all_released(pipe) and loaded() == 0


def test_image_encoder_is_released_after_the_first_call_too(zoo, monkeypatch):
    pipe = load(zoo, KLEIN, offload="model")
    loaded = LoadedBytes(monkeypatch)
    pipe.condition(ImageInputs((A,)))
    assert loaded() == 0


# ------------------------------------------------------------------ free memory


def test_stage_that_needs_more_is_planned_again_or_refused(zoo, monkeypatch):
    pipe = load(zoo, KLEIN, torch.bfloat16)
    features, peak = pipe.encode(["a cat", "a dog"]), pipe.plan_memory(64, 80, 2).peak
    planned, plan_memory = [], residency.plan_memory

    def watched(spec, weights, work, *more, **options):
        planned.append((work.width, work.height, work.batch, work.steps))
        return plan_memory(spec, weights, work, *more, **options)

    monkeypatch.setattr(residency, "plan_memory", watched)
    one = TextFeatures(features.tokens[:1], None)
    pipe.sample(one, [3], 64, 80, 2)
    pipe.sample(one, [3], 80, 64, 1)
    assert planned == []
    pipe.sample(one, [3], 64, 96, 2)
    pipe.sample(features, [3, 4], 64, 64, 2)
    pipe.sample(one, [3], 64, 64, 3)
    assert planned == [(64, 96, 1, 2), (64, 64, 2, 2), (64, 64, 1, 3)]
    pipe.plan_memory(64, 80, 2)
    limit_memory(monkeypatch, FreeMemory("cpu", peak))
    with pytest.raises(UserError, match="at 1024x1024 needs at least"):
        pipe.sample(one, [3], 1024, 1024, 2)


def test_all_networks_stay_when_they_fit(zoo, monkeypatch):
    pipe, seen = load(zoo, KLEIN, torch.bfloat16), []
    loaded = LoadedBytes(monkeypatch)
    for _ in range(2):
        generate(pipe, callback=lambda *_: seen.append(loaded()))
    networks = [pipe.text.model, pipe.transformer, pipe.autoencoder]
    assert all(network.module is not None for network in networks)
    total = sum(network.nbytes for network in networks)
    assert seen[-1] == loaded() == pytest.approx(total, rel=1e-4)


def test_networks_are_released_when_memory_gets_short(zoo, monkeypatch):
    pipe = load(zoo, KLEIN, **IN_BFLOAT16)
    loaded = LoadedBytes(monkeypatch)
    limit_memory(monkeypatch, UNLIMITED)
    expected, most = generate(pipe), pipe.plan_memory(64, 80, 2)
    assert most.offload == "none" and loaded() > 0
    monkeypatch.setattr(
        residency, "available_memory", lambda device: FreeMemory("cpu", most.peak - 1000 - loaded())
    )
    assert generate(pipe) == expected and all_released(pipe) and loaded() == 0
    assert pipe.plan_memory(64, 80, 2).offload == "model"


def test_loaded_weights_count_as_planned(zoo, monkeypatch):
    """Less memory is free once the weights are loaded; the plan stays the same."""
    pipe = load(zoo, KLEIN, offload="none", **IN_BFLOAT16)
    loaded = LoadedBytes(monkeypatch)
    limit_memory(monkeypatch, UNLIMITED)
    total = pipe.plan_memory(64, 80, 2).peak + 1000  # a few buffers stay mapped
    monkeypatch.setattr(
        residency, "available_memory", lambda device: FreeMemory("cpu", total - loaded())
    )
    assert generate(pipe) == generate(pipe)
    active = activations(pipe.spec, Workload(64, 80, steps=2), "cpu")
    assert loaded() > 0.9 * total - max(active["transformer"], active["autoencoder"])
    assert pipe.plan_memory(64, 80, 2).offload == "none"


@pytest.mark.parametrize("model", [DEV, KLEIN])
def test_too_small_max_vram_is_refused_before_a_network_is_loaded(zoo, model, monkeypatch):
    monkeypatch.setattr(LazyModule, "_prepare", lambda *_: pytest.fail("a network was loaded"))
    for offload in (None, "none", "model", "block"):
        mode = f' with `offload="{offload}"`' if offload else ""
        words = re.escape(f"max_vram: {model} at 64x80{mode} needs at least ")
        with pytest.raises(UserError, match=rf"^{words}.* GB \(got 0\.001\)"):
            generate(load(zoo, model, offload=offload, max_vram=0.001))


def test_minimum_of_a_refusal_suffices(zoo):
    def prepare(max_vram: float):
        return load(zoo, KLEIN, torch.bfloat16, max_vram=max_vram).plan_memory(1024, 1024, 1)

    with pytest.raises(UserError) as caught:
        prepare(0.001)
    (least,) = re.findall(r"needs at least ([0-9.]+) GB", str(caught.value))
    assert prepare(float(least)).peak <= float(least) * 1e9
    with pytest.raises(UserError, match=f"needs at least {re.escape(least)} GB"):
        prepare(float(least) - 0.1)


def test_references_that_do_not_fit_are_refused_before_a_prompt_is_encoded(zoo, monkeypatch):
    """The number of reference tokens is known once the references are encoded."""
    pipe = load(zoo, KLEIN)
    large = ImageInputs((A.resize((640, 640)),))
    alone = pipe.plan_memory(64, 80, 2, encoded_pixels=64 * 80).peak
    more = pipe.plan_memory(steps=2, conditions=pipe.condition(large, 64, 80)).peak
    assert more > alone
    limit_memory(monkeypatch, FreeMemory("cpu", (alone + more) / 2))
    pipe = load(zoo, KLEIN)
    watch_encoding(pipe, lambda: pytest.fail("a prompt was encoded"))
    with pytest.raises(UserError, match="needs at least .* GB"):
        generate(pipe, images=large)


@pytest.mark.slow
def test_plan_is_printed_once(cli, zoo, monkeypatch):
    request = ("a cat", "--width", 64, "--height", 80, "--steps", 2, "--seed", 3, *zoo(KLEIN))
    request += ("--dtype", "bfloat16")
    size = r"\d\S+ GB"  # of tiny networks
    stages = f"memory: text encoder {size}, {{0}}transformer {size}, {{0}}autoencoder {size}"
    run = cli(*request, "--max-vram", 8)
    expected = pixels(image_of(run))
    assert re.search(f"{stages.format('')}, all at once", run.err) and "of 8.0 GB" in run.err
    assert run.err.count("memory: ") == 1
    most, least = (
        load(zoo, KLEIN, torch.bfloat16, offload=offload).plan_memory(64, 80, 2).peak
        for offload in ("none", "model")
    )
    limit_memory(monkeypatch, FreeMemory("cpu", (most + least) / 2))
    run = cli(*request)
    assert pixels(image_of(run)) == expected
    assert re.search(stages.format("then "), run.err)


# ------------------------------------------------------------------ modulation


def test_a_quarter_of_flux1_is_released_while_it_denoises(zoo, tmp_path, monkeypatch):
    """With as many blocks as released: their number decides the share of the modulation."""
    zoo(DEV)
    path, prompts = tmp_path / "deep.safetensors", ("a cat", "a dog")
    deep = replace(FLUX1_TINY, hidden_size=64, num_heads=2, depth=19, depth_single=38)
    save_file(randomise(Flux(deep)).bfloat16().state_dict(), path)
    build = partial(flux.load, DEV, zoo.folder, "cpu", torch.bfloat16, transformer=path)
    pipe = build(offload="none")
    expected = [generate(pipe, prompts=prompt) for prompt in prompts]
    assert len(set(expected)) == 2
    for offload in ("model", "block"):
        pipe, seen = build(offload=offload), []
        total = file_bytes([path], torch.bfloat16)
        assert pipe.transformer.nbytes == total
        loaded = LoadedBytes(monkeypatch)

        def callback(*_, seen=seen, loaded=loaded):
            seen.append(loaded())

        assert [generate(pipe, prompts=p, callback=callback) for p in prompts] == expected
        assert len(seen) == 4 and max(seen) <= 0.75 * total


@pytest.mark.parametrize("offload, quantize", [("model", None), ("block", None), ("block", "int8")])
def test_lora_of_the_modulation_does_not_depend_on_offload(zoo, offload, quantize, tmp_path):
    """Most LoRAs for FLUX.1 change the modulation."""
    path, generator = tmp_path / "lora.safetensors", torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[1] ** 0.5

    layers = {
        "double_blocks.1.img_mod.lin": (768, 128),
        "single_blocks.2.modulation.lin": (384, 128),
        "single_blocks.0.linear2": (128, 640),
    }
    tensors = {}
    for layer, (rows, columns) in layers.items():
        tensors[f"{layer}.lora_A.weight"] = random(4, columns)
        tensors[f"{layer}.lora_B.weight"] = random(rows, 4)
    save_file(tensors, path)
    found = []
    for mode in ("none", offload):
        pipe = load(zoo, DEV, offload=mode, quantize=quantize)
        plain = generate(pipe)
        pipe.load_lora(path)
        found.append((plain, generate(pipe), generate(pipe, prompts="a dog")))
        pipe.unload_loras()
        assert generate(pipe) == plain
    assert found[0] == found[1] and len(set(found[0])) == 3


@pytest.mark.parametrize("resident", [None, 0])
@pytest.mark.parametrize("transform", [False, True])
def test_dropped_submodules_come_back_at_the_next_call(zoo, resident, transform):
    network = load(zoo, DEV, torch.bfloat16).transformer
    if transform:
        network.set_transform(lambda module: module.img_in.bias.add_(1))
    network.stream(resident)
    with torch.inference_mode():
        state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
        for _ in range(2):
            rest = network.drop_submodules(Modulation).state_dict()
            assert state.keys() - rest.keys() == {n for n in state if re.search(MODULATION, n)}
            again = network().state_dict()
            assert again.keys() == state.keys()
            assert all(torch.equal(again[name], state[name]) for name in state)

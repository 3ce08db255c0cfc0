"""FLUX 3 with every option of runtime: the same bits where the option is exact, else near.

The models are tiny and random, in the files of their repository.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.drawn_images import photo
from support.flux3_model import BASE, DISTILLED, Flux3Model
from support.quantized_files import PREFIX as COMFY
from support.quantized_files import QuantizedFile, fp8_by_row, int8, nvfp4, save_quantized
from support.weight_files import refusal
from torch import nn

import flux
from flux.configs import MODELS
from flux.controlnet import load_controlnet
from flux.ip_adapter import load_ip_adapter
from flux.runtime.fast3 import FastFlux3
from flux.runtime.streaming import StreamedModuleList
from flux.transformer3 import BLOCK_LISTS, Block, Flux3
from flux.weights.load import init_empty
from flux.weights.locate import is_available_locally
from flux.weights.quantization import FP8Linear, NVFP4Linear, QuantizedLinear
from flux.weights.quantization.int8 import Int8Linear

PROMPT = "a red cube left of a blue ball"
IMAGES = (photo(70, 64, seed=5), photo(64, 70, seed=6))
SMALL = dict(steps=2, seed=3)
pytestmark = pytest.mark.filterwarnings("ignore:.* was distilled for")
either_model = pytest.mark.parametrize("name", [BASE, DISTILLED])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        yield {
            n: Flux3Model(n, tmp_path_factory.mktemp("weights"), patch) for n in (BASE, DISTILLED)
        }


def generated(pipe: flux.Pipeline, references: int = 1, **request) -> bytes:
    images = flux.ImageInputs(IMAGES[:references]) if references else None
    sizes = {} if references else dict(width=64, height=80)
    (image,) = pipe(PROMPT, images=images, **SMALL | sizes | request)
    return image.tobytes()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------ exact


@either_model
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_fast_transformer_samples_the_bits_of_the_plain_one(models, name, dtype):
    found, conditions = [], None
    for fast in (True, False):
        pipe = models[name].load(dtype=dtype, fast=fast)
        assert type(pipe.transformer()) is (FastFlux3 if fast else Flux3)
        # the same ones: the fast autoencoder sums in another order
        conditions = conditions or pipe.condition(flux.ImageInputs(IMAGES))
        found.append(pipe.sample(pipe.encode(PROMPT), [3, 4], steps=2, conditions=conditions))
    assert torch.equal(*found) and found[0].std() > 0.5


@pytest.mark.parametrize("numerics", ["bfl", "diffusers"])
def test_parity_runs_the_plain_network(models, numerics):
    assert type(models[BASE].load(numerics=numerics).transformer()) is Flux3


@either_model
def test_early_blocks_run_once_where_time_does_not_enter_them(models, name):
    """Base: the text's (of two prompts) and the references' once; a flow map: at every step.

    The velocity is that of the whole network, which runs all blocks, to the bit.
    """
    pipe, runs, steps = models[name].load(fast=False), Counter(), 3
    network = pipe.transformer()
    for path, module in network.named_modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda *_, path=path: runs.update([path]))
    pipe(PROMPT, images=flux.ImageInputs(IMAGES), steps=steps, seed=3)
    often, once = (2 * steps, 2) if name == BASE else (steps, steps)
    for path, count in runs.items():
        early = path.startswith(("txt_mode_blocks", "content_mode_blocks.image_cond"))
        assert count == (once if early else often), path
    depth, single = pipe.spec.transformer.depth, pipe.spec.transformer.depth_single
    assert len(runs) == 3 * depth + single
    features, conditions = pipe.encode(PROMPT), pipe.condition(flux.ImageInputs(IMAGES))
    h, w = conditions.height // 16, conditions.width // 16
    scale = {"guidance": 1.0} if name == BASE else {}
    velocity = pipe.velocity(features, conditions=conditions, **scale)
    x = torch.randn(1, pipe.spec.autoencoder.latent_channels, h, w)
    for t in (0.9, 0.3):
        with torch.no_grad():
            expected = network(
                x.flatten(2).mT,
                flux.sampling.flux3_image_ids(h, w),
                features.tokens,
                flux.sampling.text_ids(features.tokens.shape[1], 4),
                torch.tensor([t]),
                conditions.references,
                conditions.reference_ids,
                None if name == BASE else torch.zeros(1),
            )
        assert torch.equal(velocity(x, t).flatten(2).mT, expected)


@pytest.mark.slow
@either_model
def test_streamed_blocks_make_the_same_image(models, name):
    """Mode blocks are streamed too."""
    expected, pipe = generated(models[name].load()), models[name].load(offload="block")
    assert generated(pipe) == expected
    network = pipe.transformer()
    lists = [network.get_submodule(path) for path in BLOCK_LISTS]
    assert all(isinstance(blocks, StreamedModuleList) for blocks in lists)
    words = refusal(lambda: generated(models[name].load(max_vram=1e-4)))
    assert words.startswith(f"max_vram: {name} at ") and "needs at least" in words


@pytest.mark.slow
@either_model
def test_compiled_blocks_change_no_bit(models, name, monkeypatch):
    """The backend runs the graph as it is. One graph serves all blocks of a sequence's kind."""
    graphs, compile = [], nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **more: compile(module, backend=backend, **more)
    )
    torch._dynamo.reset()
    try:
        plain, compiled = models[name].load(), models[name].load(compile=True)
        for references in (0, 1, 2):
            assert generated(compiled, references) == generated(plain, references)
    finally:
        torch._dynamo.reset()
    assert 0 < len(graphs) <= 4


# ------------------------------------------------------------------ lossy


@pytest.mark.slow
@pytest.mark.parametrize("native", [False, True], ids=["dequantized", "float8 products"])
def test_quantized_blocks_and_float8_products_move_the_latents_little(models, native):
    model = models[DISTILLED]
    pipe = model.load(quantize="fp8", fp8_matmul=native)
    layers = [m for m in pipe.transformer().modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 6 * (3 * pipe.spec.transformer.depth + pipe.spec.transformer.depth_single)
    assert {type(layer) for layer in layers} == {FP8Linear}
    if native:  # layers as narrow as these stay as they are
        assert all(layer.fp8_matmul for layer in layers)
    exact, rounded = (p.sample(p.encode(PROMPT), [3], 64, 64, 2) for p in (model.load(), pipe))
    assert 1e-3 < relative(rounded, exact) < 0.2
    streamed = model.load(quantize="fp8", fp8_matmul=native, offload="block")
    assert torch.equal(streamed.sample(streamed.encode(PROMPT), [3], 64, 64, 2), rounded)


def test_fp8_matmul_without_float8_weights_is_refused(models):
    assert "no float8 weights" in refusal(models[BASE].load, fp8_matmul=True)


@pytest.mark.slow
def test_tiles_decode_nearly_the_same_image(models):
    """A tile of the image's size gives the image itself, to the bit."""
    pixels = {}
    for tile in (None, 512, 256):
        pipe = models[DISTILLED].load(vae_tile=tile)
        channels = pipe.spec.autoencoder.latent_channels
        latents = torch.randn(1, channels, 16, 32, generator=torch.Generator().manual_seed(0))
        pixels[tile] = pipe.to_pixels(latents)
    assert torch.equal(pixels[512], pixels[None]) and not torch.equal(pixels[256], pixels[None])
    assert relative(pixels[256], pixels[None]) < 0.5


# ------------------------------------------------------------------ rows of other files


FILES = {  # a row's format -> its writer, what stands before the names, the class of its layers
    "fp8r": (fp8_by_row, "", FP8Linear),
    "nvfp4": (partial(nvfp4, swizzled=False), "", NVFP4Linear),
    "comfy-bf16": (None, COMFY, nn.Linear),
    "comfy-int8-convrot": (partial(int8, group=16), COMFY, Int8Linear),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_rows_of_other_files_find_and_read_them(models, kind, monkeypatch):
    model, row = models[DISTILLED], MODELS[f"{DISTILLED}-{kind}"]
    sizes = ("transformer", "text", "text_length", "autoencoder")
    tiny = {field: getattr(model.spec, field) for field in sizes}
    monkeypatch.setitem(MODELS, row.name, replace(row, **tiny))
    write, prefix, layer = FILES[kind]
    state = {name: x.bfloat16() for name, x in model.parts["transformer"].state_dict().items()}
    network = init_empty(lambda: Flux3(model.spec.transformer))
    paths = [p for p, x in network.named_modules() if "blocks." in p and type(x) is nn.Linear]
    file = write(paths, state) if write else QuantizedFile(state, {})
    home = model.home.parent / (row.addon or row).repository.split("/")[1]
    path = home / row.transformer_file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_quantized(path, file._replace(prefix=prefix))
    pipe = flux.load(row.name, model.folder, "cpu", torch.float32)
    assert pipe.files["transformer"] == [path] and is_available_locally(pipe.spec, model.folder)
    found = {type(pipe.transformer().get_submodule(path)) for path in paths}
    assert found == {layer}
    expected = {name: x.float() for name, x in (state | file.weights).items()}
    exact = model.load(fast=False)
    exact.transformer().load_state_dict(expected)
    ours, theirs = (p.sample(exact.encode(PROMPT), [3], 64, 64, 2) for p in (pipe, exact))
    assert relative(ours, theirs) < 1e-5


# ------------------------------------------------------------------ refused


@either_model
def test_what_flux3_lacks_is_refused_in_one_sentence(models, name):
    pipe = models[name].load()
    cached = flux.ImageInputs(IMAGES[:1], kv_cache=True)
    said = refusal(pipe, PROMPT, images=cached)
    assert said.startswith(f"kv_cache: not supported by {name} (only by flux.2-dev, ")
    for load, kind in ((load_controlnet, "a ControlNet"), (load_ip_adapter, "an IP-adapter")):
        said = refusal(load, "x.safetensors", pipe)
        assert said == f"path: x.safetensors is {kind} of FLUX.1, not of {name}."


def test_references_that_are_too_many_or_too_small_are_refused(models):
    pipe = models[DISTILLED].load()
    assert "10" in refusal(pipe, PROMPT, images=flux.ImageInputs(IMAGES[:1] * 11))
    small = photo(8, 300, seed=1)
    for images in ((small,), (IMAGES[0], small)):
        inputs = flux.ImageInputs(images)
        assert "too small for a reference" in refusal(pipe, PROMPT, images=inputs)


def test_end_of_a_prompt_past_the_cap_is_told(models):
    pipe = models[DISTILLED].load()
    assert pipe.spec.text_length == 200
    with pytest.warns(UserWarning, match="longer than 200 tokens; this end was cut off: .*house"):
        tokens = pipe.encode("a house " * 200 + "the end").tokens
    assert tokens.shape[1] == 200

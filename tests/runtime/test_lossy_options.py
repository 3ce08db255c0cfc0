"""quantize, fp8_matmul, vae_tile and quantized files: how far the image moves, and what it names.

Most on the toy, whose images mean something; the rows of quantized files on tiny random models.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.loaded_weights import generate, load
from support.model_zoo import KLEIN, KV
from support.quantized_files import bfl_fp8, block_linears, nvfp4, save_gguf_q8_0, save_quantized
from support.sample_run import PROMPT, QUICK, TOY, image_of, pixels
from torch import nn

import flux
from flux import loading
from flux.configs import MODELS
from flux.errors import UserError
from flux.image_io.output import read_metadata
from flux.runtime import lazy_module
from flux.runtime.lazy_module import LazyModule
from flux.transformer import Flux
from flux.weights.load import init_empty
from flux.weights.locate import get_spec, is_available_locally
from flux.weights.quantization import FP8Linear, NVFP4Linear, QuantizedLinear, fp8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* was distilled for"),
    pytest.mark.filterwarnings("ignore:.* was not trained with"),
]
LOWEST_PSNR = {"fp8": 40, "int8": 50, "int4": 28}  # dB; measured 43.6, 53.8 and 31.5
SMALL = dict(width=64, height=64, steps=1)


def psnr(a: bytes, b: bytes) -> float:
    a, b = (np.frombuffer(x, np.uint8).astype(np.float64) for x in (a, b))
    return float(10 * np.log10(255**2 / np.mean((a - b) ** 2))) if (a != b).any() else float("inf")


@lru_cache
def toy_image(size: tuple = (), **options) -> bytes:
    """Return the toy's image of PROMPT as scripts/sample.py generates it; `size` as in `pipe()`."""
    torch.set_flush_denormal(True)
    try:
        (image,) = flux.load(device="cpu", **options)(PROMPT, seed=7, **dict(size))
        return image.tobytes()
    finally:
        torch.set_flush_denormal(False)


def quick_toy_image(**options) -> bytes:
    return toy_image(tuple(SMALL.items()), **options)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(LazyModule, "_prepare", lambda *_: pytest.fail("a network was loaded"))


# ------------------------------------------------------------------ quantize


@pytest.mark.parametrize("scheme", LOWEST_PSNR)
def test_quantized_toy_generates_nearly_the_same_image(scheme):
    found = psnr(toy_image(quantize=scheme), toy_image())
    assert LOWEST_PSNR[scheme] < found < float("inf")


def test_quantization_is_in_the_metadata_and_repeatable(cli):
    flags = (PROMPT, *QUICK, "--seed", 7, "--quantize", "int4")
    path = image_of(run := cli(*flags))
    assert "memory: " in run.err and pixels(path) == quick_toy_image(quantize="int4")
    assert read_metadata(path)["quantize"] == "int4"
    again = image_of(cli("--from-image", path))
    assert pixels(again) == pixels(path) and read_metadata(again) == read_metadata(path)


@pytest.mark.parametrize("name", ["flux.1-dev", KLEIN])
def test_quantized_models_take_less_memory(zoo, name):
    """A byte a weight, and four a row; int4 takes 4.5 bits. The large text encoders too."""
    sizes = {}
    for scheme in (None, "fp8", "int8", "int4"):
        pipe = load(zoo, name, torch.bfloat16, quantize=scheme)
        sizes[scheme] = pipe.transformer.nbytes, pipe.plan_memory(64, 64).peak
        state = pipe.transformer().state_dict()
        assert pipe.transformer.nbytes == sum(tensor.nbytes for tensor in state.values())
        for network in pipe.residency.networks:
            quantized = any(isinstance(m, QuantizedLinear) for m in network().modules())
            assert quantized == (network is pipe.transformer and scheme is not None)
        encoder = pipe.text.t5 if name == "flux.1-dev" else pipe.text.model  # too small here
        assert encoder.quantize == scheme
    assert sizes["int4"] < sizes["int8"] == sizes["fp8"] < sizes[None]


def test_weights_are_rounded_once_from_the_file(zoo, monkeypatch):
    """From float32 files, for a pipeline in bfloat16, without a cast in between."""
    pipe, dtypes = load(zoo, KLEIN, torch.bfloat16, quantize="int8"), set()
    quantize_ = lazy_module.quantize_

    def watched(module: nn.Module, *arguments, **options) -> None:
        dtypes.update(p.dtype for p in module.parameters() if not p.is_meta)
        quantize_(module, *arguments, **options)

    monkeypatch.setattr(lazy_module, "quantize_", watched)
    transformer = pipe.transformer()
    state = load_file(pipe.files["transformer"][0])
    assert dtypes == {torch.float32} == {state["img_in.weight"].dtype}
    layer = transformer.get_submodule("single_blocks.1.linear1")
    weight = state["single_blocks.1.linear1.weight"]
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    assert torch.equal(layer.weight, (weight / scale).round().to(torch.int8))
    assert torch.equal(layer.weight_scale, scale)
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}


def test_unknown_scheme_is_refused_before_files_are_located(monkeypatch):
    monkeypatch.setattr(loading, "locate", lambda *_: pytest.fail("files were located"))
    with pytest.raises(UserError, match="^quantize: int2 is unknown"):
        flux.load(quantize="int2")


# ------------------------------------------------------------------ float8 products


def test_fp8_matmul_changes_the_image_and_is_in_the_metadata(cli):
    native = toy_image(quantize="fp8", fp8_matmul=True)
    assert native != toy_image(quantize="fp8") and psnr(native, toy_image()) > 33
    flags = (PROMPT, *QUICK, "--seed", 7, "--quantize", "fp8", "--fp8-matmul")
    path = image_of(run := cli(*flags, "--offload", "block"))
    assert "note" not in run.err
    assert pixels(path) == quick_toy_image(quantize="fp8", fp8_matmul=True)
    assert read_metadata(path)["fp8_matmul"] is True
    assert pixels(image_of(cli("--from-image", path))) == pixels(path)


def test_device_without_fp8_matmul_warns_once_and_dequantizes(cli, monkeypatch):
    """As on Apple's GPUs."""
    unmet, mps = fp8._unmet_requirement, torch.device("mps")
    monkeypatch.setattr(fp8, "_unmet_requirement", lambda device, module: unmet(mps, module))
    flags = (PROMPT, *QUICK, "--seed", 7, "--quantize", "fp8", "--fp8-matmul")
    path = image_of(run := cli(*flags, "--offload", "model"))
    assert (
        run.err.count("note: ") == run.err.count("note: float8 matrix products need an NVID") == 1
    )
    assert pixels(path) == quick_toy_image(quantize="fp8")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_fp8_matmul_without_float8_weights_is_refused(quantize, nothing_is_loaded):
    words = r"^fp8_matmul: .* no float8 weights.*`quantize=\"fp8\"`"
    with pytest.raises(UserError, match=words):
        flux.load(quantize=quantize, fp8_matmul=True)


# ------------------------------------------------------------------ quantized files


@pytest.fixture(scope="module")
def toy_files(tmp_path_factory) -> dict[str, Path]:
    """The toy's transformer as quantized files."""
    folder = tmp_path_factory.mktemp("toy")
    state = {name: tensor.bfloat16() for name, tensor in load_file(TOY).items()}
    layers = block_linears(init_empty(lambda: Flux(MODELS["flux.2-tiny"].transformer)))
    fp8_file = save_quantized(folder / "toy-fp8.safetensors", bfl_fp8(layers, state))
    return {"fp8": fp8_file, "gguf": save_gguf_q8_0(folder / "toy.gguf", layers, state)[0]}


@pytest.mark.parametrize("format", ["fp8", "gguf"])
def test_quantized_file_generates_nearly_the_same_image(cli, toy_files, format, tmp_path):
    """The contents decide the format, so the file may have any name."""
    file = toy_files[format]
    assert 37 < psnr(toy_image(transformer=file), toy_image()) < float("inf")
    model = ("--model", "flux.2-tiny", "--transformer")
    path = image_of(run := cli(PROMPT, *QUICK, "--seed", 7, *model, file))
    assert "error" not in run.err and read_metadata(path)["transformer"] == file.name
    assert pixels(path) == quick_toy_image(transformer=file)
    assert pixels(image_of(cli("--from-image", path, "--transformer", file))) == pixels(path)
    (other := tmp_path / "model.bin").symlink_to(file)
    assert quick_toy_image(transformer=other) == pixels(path)


def test_quantized_file_is_not_quantized_again(toy_files, nothing_is_loaded):
    for format, name in (("fp8", "FP8Linear"), ("gguf", "GGUFLinear")):
        for scheme in LOWEST_PSNR:
            pipe = flux.load("flux.2-tiny", transformer=toy_files[format], quantize=scheme)
            with pytest.raises(UserError, match=rf"quantized already.*{name}.*quantize"):
                pipe(PROMPT, **SMALL)


@pytest.mark.parametrize("format", ["fp8", "gguf"])
def test_image_of_a_quantized_file_does_not_depend_on_offload(toy_files, format):
    found = set()
    for offload in ("none", "model", "block"):
        found.add(quick_toy_image(transformer=toy_files[format], offload=offload))
    assert len(found) == 1


def test_model_of_a_quantized_file_is_known_by_its_shape(cli, toy_files):
    path = image_of(run := cli(PROMPT, *QUICK, "--transformer", toy_files["fp8"]))
    assert read_metadata(path)["model"] == "flux.2-tiny" and "note" not in run.err


# ------------------------------------------------------------------ rows of quantized files

BASES = {  # the row of the unquantized model, in whose repository the other files are
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


def test_rows_of_quantized_files_are_complete():
    rows = {
        name for name, spec in MODELS.items() if spec.weight_format != "bfloat16" and not spec.flux3
    }
    assert rows == BASES.keys()


@pytest.fixture
def quantized_row(zoo, monkeypatch):
    """Write the tiny repositories of a row, replace its spec; return the path of its file.

    Next to the file, with the suffix ".full", are the weights that the file stands for.
    """

    def write(name: str) -> Path:
        zoo(BASES[name])
        base, row = MODELS[BASES[name]], MODELS[name]
        fields = ("transformer", "text", "text_length", "autoencoder", "size")
        tiny = {field: getattr(base, field) for field in fields}
        monkeypatch.setitem(MODELS, name, replace(row, **tiny))
        ((_, file),) = row.addon.files
        path = zoo.folder / row.addon.repository.split("/")[1] / file
        if path.exists():
            return path
        path.parent.mkdir()
        full = load_file(zoo.folder / base.repository.split("/")[1] / base.transformer_file)
        state = {name: tensor.bfloat16() for name, tensor in full.items()}
        layers = block_linears(init_empty(lambda: Flux(base.transformer)))
        quantized = (bfl_fp8 if row.weight_format == "fp8" else nvfp4)(layers, state)
        save_quantized(path, quantized)
        weights = {name: tensor.float() for name, tensor in state.items()} | quantized.weights
        save_file(weights, path.with_suffix(".full"))
        return path

    return write


def realign(module: nn.Module) -> None:
    """Move weights off the mapped file, where a matrix begins anywhere.

    On a CPU, the order of a float32 sum depends on where a matrix begins.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("name", BASES)
def test_row_of_a_quantized_file_generates_what_its_weights_stand_for(zoo, quantized_row, name):
    spec, base, path = MODELS[name], BASES[name], quantized_row(name)
    assert spec.licence == MODELS[base].licence
    assert spec.addon.repository.lower().endswith(name)
    pipe = load_row(zoo, name)
    kinds = {type(m) for m in pipe.transformer().modules() if isinstance(m, QuantizedLinear)}
    assert kinds == {FP8Linear if spec.weight_format == "fp8" else NVFP4Linear}
    assert pipe.files["transformer"] == [path]
    assert pipe.spec.kv_cached_references == MODELS[base].kv_cached_references
    full = load_row(zoo, base, transformer=path.with_suffix(".full"))
    full.transformer.set_transform(realign)
    assert generate(pipe) == generate(full)


def load_row(zoo, name: str, **options) -> flux.Pipeline:
    return flux.load(name, zoo.folder, "cpu", torch.float32, **options)


def test_list_of_models_says_which_are_here(cli, zoo, quantized_row):
    names = ("flux.2-klein-4b-fp8", "flux.2-klein-base-9b-nvfp4")
    paths = {name: quantized_row(name) for name in names}
    lines = cli("--list-models", "--weights", zoo.folder).out.splitlines()
    assert set(names) <= {line.split()[0] for line in lines if line[54:62].strip() == "-"}
    for name, path in paths.items():
        home = zoo.folder / MODELS[name].repository.split("/")[1]
        for missing in (path, home / "tokenizer/tokenizer.json"):
            away = missing.rename(missing.with_name("away"))
            assert not is_available_locally(MODELS[name], zoo.folder)
            away.rename(missing)
        assert is_available_locally(MODELS[name], zoo.folder)


def test_missing_row_says_where_to_get_it(no_weights_here, tmp_path):
    for name in BASES:
        with pytest.raises(UserError, match="https://huggingface.co/black-forest-labs/"):
            flux.load(name, weights=tmp_path)


def test_unquantized_file_is_not_taken_for_a_quantized_row(zoo, quantized_row, recwarn):
    """Files of one model have the same shapes; the rest of the rows is the same."""
    quantized_row("flux.2-klein-4b-fp8")
    spec = MODELS[KLEIN]
    assert get_spec(None, zoo.folder / "FLUX.2-klein-4B" / spec.transformer_file) == spec
    messages = [str(warning.message) for warning in recwarn]
    assert not [message for message in messages if "fp8" in message or "nvfp4" in message]


# ------------------------------------------------------------------ vae_tile


def test_one_tile_gives_the_same_image(cli):
    flags = (PROMPT, "--seed", 7, "--steps", 1, "--width", 256, "--height", 192)
    plain, tiled = image_of(cli(*flags)), image_of(cli(*flags, "--vae-tile", 256))
    assert pixels(plain) == pixels(tiled)
    assert read_metadata(tiled) == read_metadata(plain) | {"vae_tile": 256}


def test_tiles_give_nearly_the_same_image_and_are_repeatable(cli):
    flags = (PROMPT, "--seed", 7, "--steps", 4, "--width", 448, "--height", 256)
    tiled = image_of(cli(*flags, "--vae-tile", 256))
    (plain,) = flux.load(device="cpu")(PROMPT, width=448, height=256, steps=4, seed=7)
    assert 45 < psnr(plain.tobytes(), pixels(tiled)) < float("inf")
    with Image.open(tiled) as image:
        assert image.size == (448, 256)
    again = image_of(cli("--from-image", tiled))
    assert pixels(again) == pixels(tiled) and read_metadata(again) == read_metadata(tiled)


def test_plan_counts_tiles(zoo):
    """In large images of small models, decoding takes the most memory."""
    full, tiled = (
        load(zoo, KLEIN, offload="model", vae_tile=tile).plan_memory(2048, 2048).peak
        for tile in (None, 256)
    )
    assert tiled < 0.9 * full
    limit = (full + tiled) / 2e9
    assert (
        load(zoo, KLEIN, vae_tile=256, max_vram=limit).plan_memory(2048, 2048).peak <= limit * 1e9
    )
    with pytest.raises(UserError, match="^max_vram: .* needs at least .*`vae_tile=1024`"):
        load(zoo, KLEIN, max_vram=limit).plan_memory(2048, 2048)

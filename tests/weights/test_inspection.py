"""`inspect` says of each kind of file what it is, and repeats what loading says of it.

The files are written by the same helpers as in the tests of loading. The expected words state what
the helper wrote; the expected refusals are those of the code that loads such a file.
"""

import json
import pickle
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.load_script import script
from support.lora_files import control_lora
from support.quantized_files import FORMATS, random_state, save_gguf_q8_0, save_quantized
from support.training import make_loss, make_trainer
from support.weight_files import anonymous_memory, hollow, raw, refusal, saved

import flux
from flux.autoencoder import AutoEncoder
from flux.configs import EMBEDDED, MODELS, TINY, TINY1
from flux.image_io import output
from flux.image_io.input import read_image
from flux.lora.formats import read_lora
from flux.parity import reference
from flux.parity.capture_file import Writer
from flux.training.checkpoint import save_tensors
from flux.transformer import Flux
from flux.weights.inspection import inspect, loras, networks
from flux.weights.load import infer_config, init_empty, load_module
from flux.weights.locate import with_decoder_of

SLOW = ("flux.1-fill-dev", "flux.2-dev", "flux.2-klein-9b")
TOY1, TOY2 = EMBEDDED / "flux.1-tiny", EMBEDDED / "flux.2-tiny"


def told(path) -> dict[str, str]:
    """Return what is said of a file that is understood; texts about the same thing in one."""
    found = inspect(Path(path))
    assert not found.refusal, found.refusal
    texts: dict[str, str] = {}
    for about, text in found.lines:
        assert about.strip() and text.strip()
        texts[about] = f"{texts[about]}; {text}" if about in texts else text
    return texts


def not_understood(path) -> str:
    found = inspect(Path(path))
    assert found.refusal and "\n" not in found.refusal
    return found.refusal


@pytest.fixture
def toys(monkeypatch):
    """Compare with the toys alone, which takes less time."""
    rows = {name: MODELS[name] for name in ("flux.1-tiny", "flux.2-tiny")}
    for module in (loras, networks):
        monkeypatch.setattr(module, "MODELS", rows)


@pytest.fixture(scope="module")
def tiny1() -> dict[str, torch.Tensor]:
    return load_file(TOY1 / "flux1-tiny.safetensors")


# ---------------------------------------------------------------- transformers


def test_transformer_of_each_family(tmp_path):
    found = told(TOY1 / "flux1-tiny.safetensors")
    assert found["kind"] == "a FLUX.1 transformer"
    assert found["network"].startswith("2 double and 8 single blocks of width 128, 64 channels, ")
    assert found["network"].endswith("text of width 128, with a guidance input")
    assert found["fits"] == "flux.1-tiny; pass it as `transformer`"
    assert "132 tensors (132 BF16)" in found["format"] and found["metadata"] == "format = pt"
    assert found["quantized"] == "nothing" and not {"refused", "note", "prefix"} & found.keys()
    found = told(TOY2 / "flux-2-tiny.safetensors")
    assert found["kind"] == "a FLUX.2 transformer" and "without a guidance" in found["network"]


@pytest.mark.parametrize(
    "name", ["flux.1-dev", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)]
)
def test_released_sizes_in_seconds_and_little_memory(tmp_path, name):
    """The file is larger than this machine's memory, or nearly; it is a hole."""
    config = MODELS[name].transformer
    shapes = {n: tuple(x.shape) for n, x in init_empty(lambda: Flux(config)).state_dict().items()}
    path = hollow(tmp_path / "x.safetensors", shapes)
    before, start = anonymous_memory(), time.process_time()
    found = told(path)
    assert anonymous_memory() - before < 2**28 and time.process_time() - start < 60
    assert name in found["fits"] and "refused" not in found


@pytest.mark.slow
def test_layout_of_diffusers(tmp_path):
    theirs = reference.diffusers_transformer(TINY1).state_dict()
    found = told(hollow(tmp_path / "d.safetensors", reference.shapes(theirs)))
    assert found["kind"] == "a transformer in diffusers' layout" and "flux.1-tiny" in found["fits"]


def test_prefix_and_shards(tmp_path, tiny1):
    prefixed = {f"model.diffusion_model.{name}": x for name, x in tiny1.items()}
    found = told(saved(tmp_path / "p.safetensors", prefixed))
    assert found["prefix"] == "model.diffusion_model." and "refused" not in found
    names, folder = sorted(tiny1), tmp_path / "shards"
    folder.mkdir()
    for i in range(2):
        part = {name: tiny1[name] for name in names[i::2]}
        saved(folder / f"x-0000{i + 1}-of-00002.safetensors", part)
    for given in (folder, folder / "x-00001-of-00002.safetensors"):
        assert "safetensors in 2 files, 132 tensors" in told(given)["format"]
    (folder / "x-00002-of-00002.safetensors").unlink()
    assert "lacks x-00002-of-00002.safetensors" in not_understood(folder)


ALL = sum(isinstance(part, torch.nn.Linear) for part in init_empty(lambda: Flux(TINY1)).modules())
COUNTS = {"cast": ALL, "cast, e5m2": ALL, "bundle": ALL}
FAST = ("BFL", "INT8, by row", "MXFP8")


@pytest.mark.parametrize(
    "format", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in FORMATS]
)
def test_quantized_layers_are_counted(tmp_path, format):
    """As many as the writer was given."""
    network = Flux(TINY1)
    layers = ["double_blocks.0.img_mlp.0", "single_blocks.0.linear2", "single_blocks.1.linear2"]
    written = FORMATS[format](layers, random_state(network))
    found = told(save_quantized(tmp_path / "x.safetensors", written))
    counts = [int(count) for count in re.findall(r"(\d+) \w+Linear", found["quantized"])]
    assert sum(counts) == COUNTS.get(format, len(layers)) and "refused" not in found


def test_gguf_names_its_blocks(tmp_path):
    network = Flux(TINY1)
    layers = ["double_blocks.0.img_mlp.0", "single_blocks.0.linear2"]
    path, _ = save_gguf_q8_0(tmp_path / "x.gguf", layers, random_state(network))
    found = told(path)
    assert found["quantized"] == "2 GGUFLinear (Q8_0)" and found["format"].startswith("GGUF, ")
    assert "general.architecture = flux" in found["metadata"]


def test_checkpoint_of_all_networks(tmp_path, tiny1, toys):
    tensors = {f"model.diffusion_model.{name}": x for name, x in tiny1.items()}
    parts = {"vae": TOY1 / "ae.safetensors"}
    parts |= {
        "text_encoders.clip_l.transformer": TOY1 / "text_encoder/model.safetensors",
        "text_encoders.t5xxl.transformer": TOY1 / "text_encoder_2/model.safetensors",
    }
    for prefix, file in parts.items():
        tensors |= {f"{prefix}.{name}": x for name, x in load_file(file).items()}
    found = told(saved(tmp_path / "all.safetensors", tensors))
    assert found["kind"] == "a FLUX.1 transformer" and "refused" not in found
    assert "vae.* (an autoencoder)" in found["also holds"]
    assert "text_encoders.t5xxl.transformer.* (a T5 text encoder)" in found["also holds"]
    assert found["fits"].count("flux.1-tiny") == 4


def test_note_and_refusal_are_those_of_loading(tmp_path, toys):
    shapes = {n: tuple(x.shape) for n, x in Flux(TINY1).state_dict().items()}
    path = hollow(tmp_path / "x.safetensors", shapes | {"__index_timestep_zero__": (1,)})
    assert "tensors that Flux lacks" in told(path)["note"]
    del shapes["final_layer.linear.bias"]
    path = hollow(path, shapes)
    assert told(path)["refused"] == refusal(flux.load, "flux.1-tiny", transformer=path)
    config = replace(TINY, context_dim=20)
    shapes = {n: tuple(x.shape) for n, x in Flux(config).state_dict().items()}
    path = hollow(path, shapes)
    assert told(path)["refused"] == refusal(flux.load, transformer=path)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 transformer"),
        ("txtfusion.projector.weight", "a Krea 2 transformer"),
        ("distilled_guidance_layer.layers.0.in_layer.weight", "a Chroma transformer"),
        ("pulid_ca.0.weight", "a PuLID adapter"),
        ("transformer_blocks.0.txt_mod.1.weight", "a Qwen-Image transformer"),
        ("transformer_blocks.0.attn.to_q.weight", "a transformer of another family"),
    ],
)
def test_other_family_is_understood_and_refused(tmp_path, name, kind):
    path = saved(tmp_path / "x.safetensors", {name: torch.ones(1)})
    found = told(path)
    assert found["kind"] == kind and found["refused"] == refusal(infer_config, path)


# ---------------------------------------------------------------- other networks


@pytest.mark.parametrize(
    "file, kind, argument",
    [
        ("ae.safetensors", "an autoencoder", "autoencoder"),
        ("text_encoder/model.safetensors", "a CLIP text encoder", "text_encoder"),
        ("text_encoder_2/model.safetensors", "a T5 text encoder", "text_encoder_2"),
    ],
)
def test_other_networks_name_their_argument(tmp_path, file, kind, argument, toys):
    found = told(TOY1 / file)
    assert found["kind"] == kind
    assert found["fits"] == f"flux.1-tiny; pass it as `{argument}`"
    tensors = load_file(TOY1 / file)
    del tensors[next(name for name in tensors if name.endswith("bias") or "layer_norm" in name)]
    path = saved(tmp_path / "x.safetensors", tensors)
    expected = refusal(flux.load, "flux.1-tiny", **{argument: path})
    assert told(path)["refused"] == expected and "1 missing" in expected


def test_autoencoder_of_impossible_width_is_refused_in_a_sentence(tmp_path):
    """The toy's decoder in place of the released one: 48 channels are not 32 groups."""
    config = with_decoder_of(MODELS["flux.1-dev"].autoencoder, TOY1 / "ae.safetensors")
    network = init_empty(lambda: AutoEncoder(config))
    message = refusal(load_module, network, [TOY1 / "ae.safetensors"])
    assert "does not fit AutoEncoder" in message


def test_language_model(toys):
    found = told(TOY2 / "text_encoder/model.safetensors")
    assert found["kind"] == "a language model"
    assert found["fits"] == "flux.2-tiny; pass it as `text_encoder`"


@pytest.mark.slow
def test_released_text_encoders_and_autoencoder(tmp_path):
    manifests = Path(__file__).parents[1] / "manifests"
    for name, kind, fits in (
        ("t5-xxl", "a T5 text encoder", "flux.1-dev"),
        ("qwen3-4b", "a language model", "flux.2-klein-4b"),
        ("siglip", "an image encoder, SigLIP or CLIP", "flux.1-redux-dev"),
        ("redux", "the FLUX.1 Redux adapter", "flux.1-redux-dev"),
        ("ae-flux2-small-decoder", "an autoencoder", "flux.2-dev"),
    ):
        tensors = json.loads((manifests / f"{name}.json").read_text())["tensors"]
        shapes = {name: tuple(shape) for name, (_, shape) in tensors.items()}
        found = told(hollow(tmp_path / "x.safetensors", shapes))
        assert found["kind"] == kind and fits in found["fits"], found


# ---------------------------------------------------------------- LoRAs


def lora(path: Path, rank: int = 4, alpha: float | None = 2.0, layer="txt_in") -> Path:
    sizes = dict(Flux(TINY1).named_modules())[layer]
    tensors = {
        f"diffusion_model.{layer}.lora_A.weight": torch.ones(rank, sizes.in_features),
        f"diffusion_model.{layer}.lora_B.weight": torch.ones(sizes.out_features, rank),
    }
    if alpha is not None:
        tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(alpha)
    return saved(path, tensors, ss_network_dim="4")


def test_lora_tells_ranks_strength_and_models(tmp_path):
    found = told(lora(tmp_path / "x.safetensors"))
    assert found["kind"] == "a LoRA" and found["layout"] == "ComfyUI's names"
    assert found["ranks"] == "4" and found["strength"] == "0.5 (alpha/rank)"
    assert found["fits"] == "flux.1-tiny; pass it as `loras`"
    assert (
        found["changes"] == "1 layers of transformer" and "ss_network_dim = 4" in found["metadata"]
    )


def test_values_of_a_lora_are_not_read(tmp_path, toys):
    path = lora(tmp_path / "x.safetensors")
    tensors = load_file(path)
    tensors["diffusion_model.txt_in.lora_A.weight"][0, 0] = float("nan")
    assert "refused" not in told(saved(path, tensors))


def test_peft_folder_and_damaged_configuration(tmp_path, toys):
    tensors = {
        f"base_model.model.txt_in.{name}.weight": torch.ones(shape)
        for name, shape in (("lora_A", (2, 128)), ("lora_B", (128, 2)))
    }
    saved(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    found = told(tmp_path)
    assert found["kind"] == "a PEFT adapter: a LoRA" and found["strength"] == "4 (alpha/rank)"
    assert "PEFT adapter" in told(tmp_path / "adapter_config.json")["kind"]
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "init_lora_weights": "pissa"}')
    assert told(tmp_path)["refused"] == refusal(read_lora, tmp_path)


def test_lora_that_fits_nothing_is_refused_as_by_loading(tmp_path, toys):
    path = lora(tmp_path / "x.safetensors")
    other = saved(path, {f"other.{name}": x for name, x in load_file(path).items()})
    pipe = flux.load("flux.1-tiny", device="cpu")
    assert told(other)["refused"].startswith(refusal(pipe.load_lora, other).split(" layer of ")[0])
    foreign = {
        f"diffusion_model.txtfusion.{n}.weight": torch.ones(2, 2) for n in ("lora_A", "lora_B")
    }
    found = told(saved(tmp_path / "krea.safetensors", foreign))
    assert found["kind"] == "a LoRA of a Krea 2 transformer" and "refused" in found


def test_control_lora_fits_control_models_alone(tmp_path, monkeypatch):
    tiny = MODELS["flux.1-tiny"]
    canny = replace(MODELS["flux.1-canny-dev-lora"], transformer=tiny.transformer, text=tiny.text)
    monkeypatch.setattr(loras, "MODELS", {tiny.name: tiny, canny.name: canny})
    found = told(control_lora(tmp_path / "x.safetensors", Flux(tiny.transformer)))
    assert found["fits"] == "flux.1-canny-dev-lora; pass it as `loras`"


# ---------------------------------------------------------------- files of other kinds


def test_capture_and_latents(tmp_path):
    with Writer(
        tmp_path / "a.safetensors", {"model": "flux.2-tiny", "prompt": "a\x1b[2Jcat"}
    ) as file:
        file.add("x", torch.ones(3))
    found = told(tmp_path / "a.safetensors")
    assert (
        found["kind"].startswith("a capture of a run") and found["captured"] == "1 tensors (1 full)"
    )
    assert found["model"] == "flux.2-tiny"
    latents = saved(tmp_path / "l.safetensors", {"latents": torch.ones(1)}, flux='{"seed": 3}')
    found = told(latents)
    assert found["kind"].startswith("the latents") and '{"seed": 3}' in found["metadata"]


def test_files_of_a_training_run(tmp_path):
    trainer = make_trainer(tmp_path / "checkpoint.safetensors")
    trainer.update([make_loss(trainer, 1)])
    trainer.save()
    found = told(trainer.path)
    assert (
        found["kind"].startswith("a checkpoint of a training run")
        and "step = 1" in found["metadata"]
    )
    file = tmp_path / "features-12.safetensors"
    save_tensors(file, {"tokens": torch.ones(2, 2)}, {"name": file.stem}, checksum=True)
    assert told(file)["kind"].startswith("an encoded image or caption")


def test_images(tmp_path):
    image = Image.new("RGB", (32, 16))
    path = output.save(image, tmp_path / "x.png", {"prompt": "a cat", "model": "flux.2-tiny"})
    found = told(path)
    assert found["kind"] == "an image: PNG, 32x16, RGB"
    assert found["made by"].startswith("flux.2-tiny; --from-image")
    path.write_bytes(path.read_bytes()[:-30])
    assert told(path)["refused"] == refusal(read_image, path)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert "holds 2 images" in told(tmp_path / "x.gif")["refused"]
    (tmp_path / "y.png").write_bytes(b"no image")
    assert not_understood(tmp_path / "y.png") == refusal(read_image, tmp_path / "y.png")


@pytest.mark.parametrize(
    "folder, kind",
    [
        (TOY1 / "tokenizer", "CLIP's"),
        (TOY1 / "tokenizer_2", "T5's"),
        (TOY2 / "tokenizer", "Qwen3's"),
    ],
)
def test_tokenizers(folder, kind):
    for path in (folder, *folder.iterdir()):
        assert (
            told(path)["tokenizer"].startswith(f"{kind}, ") and "`tokenizer`" in told(path)["fits"]
        )


def test_folders(tmp_path, toys):
    found = told(TOY1)
    assert found["kind"].startswith("a folder of 7 files")
    assert found["flux1-tiny.safetensors"] == "a FLUX.1 transformer"
    assert (
        found["tokenizer"] == "the files of a tokenizer" and found["framed.safetensors"] == "a LoRA"
    )
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"x": 1}))
    assert told(tmp_path)["x.ckpt"].startswith("not understood: ")
    (tmp_path / "sub").mkdir()
    assert "is an empty folder" in not_understood(tmp_path / "sub")


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"x": 1}, protocol=4),
        b"PK\x03\x04 a zip",
        b"<!DOCTYPE html><html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"",
        b"GGUF\x03\0\0\0",
        b"\x00\x05\x16\x07" + bytes(80),
        b"some text, longer than the header of a file would be, of no meaning",
    ],
)
def test_damaged_files_get_the_sentence_of_loading(tmp_path, content):
    (path := tmp_path / "x.safetensors").write_bytes(content)
    assert not_understood(path) == refusal(infer_config, path)


def test_truncated_file_and_unknown_tensors_are_not_understood(tmp_path):
    path = saved(tmp_path / "x.safetensors", {"x": torch.ones(100)})
    assert not_understood(path) == refusal(infer_config, path)
    path.write_bytes(path.read_bytes()[:-4])
    assert "is truncated" in not_understood(path)


def test_missing_files_and_pipes(tmp_path):
    assert "does not exist" in not_understood(tmp_path / "x")
    assert "pipe or a device" in not_understood("/dev/zero")


def test_json_files(tmp_path):
    (path := tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert "of FluxTransformer2DModel, which is not read" in told(path)["kind"]
    for text in ("{", "[1]", '{"a": 1}', '{"a": NaN}'):
        path.write_text(text)
        assert str(path) in not_understood(path)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def sample():
    return script("sample")


def run(sample, monkeypatch, capsys, path) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["sample.py", "--inspect", str(path)])
    code = sample.main()
    return code, *capsys.readouterr()


def test_command_shows_flags_and_exits(sample, tmp_path, monkeypatch, capsys, toys):
    code, out, err = run(sample, monkeypatch, capsys, TOY1 / "ae.safetensors")
    assert code == 0 and "fits: flux.1-tiny; pass it as --autoencoder\n" in out and not err
    path = saved(tmp_path / "x.safetensors", {"txtfusion.a": torch.ones(1)})
    code, out, err = run(sample, monkeypatch, capsys, path)
    assert code == 0 and "refused: " in out and "a Krea 2 transformer, which is not" in out
    code, out, err = run(sample, monkeypatch, capsys, tmp_path / "none")
    assert code == 2 and err.count("error: ") == 1 and "does not exist" in err


def test_command_escapes_hostile_text(sample, toys, tmp_path, monkeypatch, capsys):
    hostile = "\x1b]0;x\x07\u202e\nerror: the disk is full"
    for number, tensors in enumerate((
        {"double_blocks.0.img_attn.x": 1, hostile: 2},
        {f"{hostile}.lora_A.weight": 1, f"{hostile}.lora_B.weight": 1},
        {"latents": 1},
    )):  # fmt: skip
        path = tmp_path / f"{number}\x1b[2J.safetensors"
        saved(
            path, {name: torch.ones(size) for name, size in tensors.items()}, **{hostile: hostile}
        )
        _, out, err = run(sample, monkeypatch, capsys, path)
        assert not {"\x1b", "\x07", "\u202e"} & set(out + err) and "Traceback" not in err
        assert not any(line.startswith("error: the disk") for line in (out + err).splitlines())
    raw(tmp_path / "y.safetensors", {hostile: {"dtype": "F32"}})
    _, out, err = run(sample, monkeypatch, capsys, tmp_path / "y.safetensors")
    assert "\x1b" not in out + err

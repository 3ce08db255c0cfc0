"""Checkpoints of a whole model, and text encoders and tokenizers from anywhere.

Each file here holds the tensors of a tiny model in another layout. The right values are the tensors
and the image of the same model in the released layout.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.sample_run import pixels
from support.tiny_repositories import home, tiny_repositories
from support.weight_files import refusal, saved
from torch import Tensor

import flux
from flux.configs import EMBEDDED
from flux.image_io.output import read_metadata
from flux.weights.locate import locate

MANIFESTS = Path(__file__).parents[1] / "manifests"

NAMES = ["flux.1-dev", "flux.2-klein-4b"]
TEXT_ENCODERS = {  # of each model: folder in the repository -> ComfyUI's name, argument, network
    "flux.1-dev": {
        "text_encoder": ("clip_l", "text_encoder", 1),
        "text_encoder_2": ("t5xxl", "text_encoder_2", 0),
    },
    "flux.2-klein-4b": {"text_encoder": ("qwen3_4b", "text_encoder", 0)},
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    with tiny_repositories(tmp_path_factory.mktemp("weights"), NAMES) as folder:
        yield folder


def load(name, weights, **files):
    return flux.load(name, weights=weights, device="cpu", dtype=torch.float32, **files)


def realign(network: torch.nn.Module) -> None:
    """Move weights off the mapped file: on some CPUs sums depend on where a matrix begins."""
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()


def image(pipe) -> np.ndarray:
    for network in pipe.residency.networks:
        network.set_transform(realign)
    return np.asarray(pipe("a cat", 64, 64, steps=1, seed=0)[0])


def tensors(pipe) -> dict[str, Tensor]:
    networks = {"transformer": pipe.transformer, "decoder": pipe.autoencoder}
    networks |= {f"text {i}": network for i, network in enumerate(pipe.text.networks)}
    return {
        f"{part}.{name}": tensor
        for part, network in networks.items()
        for name, tensor in network().state_dict().items()
    }


@cache
def released(name, weights) -> tuple[dict[str, Tensor], np.ndarray]:
    """Return what the released layout gives. The file's shapes choose the axes of RoPE."""
    file = home(weights, name) / flux.MODELS[name].transformer_file
    pipe = load(name, weights, transformer=file)
    return tensors(pipe), image(pipe)


def assert_as_released(pipe, name, weights):
    ours, (theirs, expected) = tensors(pipe), released(name, weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert np.array_equal(image(pipe), expected)


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def bundle(folder, name: str, vae: str = "vae.") -> dict[str, Tensor]:
    """Return the tensors of ComfyUI's checkpoint of the model that a repository holds."""
    source, row = home(folder, name), flux.MODELS[name]
    tensors = prefixed("model.diffusion_model.", load_file(source / row.transformer_file))
    tensors |= prefixed(vae, load_file(source / row.autoencoder_files[0]))
    for part, (comfy, *_) in TEXT_ENCODERS[name].items():
        text = load_file(source / part / "model.safetensors")
        tensors |= prefixed(f"text_encoders.{comfy}.transformer.", text)
        tensors[f"text_encoders.{comfy}.logit_scale"] = torch.tensor(4.6)
    return tensors


@pytest.mark.filterwarnings("ignore:.*was distilled")
@pytest.mark.parametrize("name, vae", zip(NAMES, ["vae.", "first_stage_model."]))
def test_checkpoint_of_all_networks_equals_the_repository(repositories, tmp_path, name, vae):
    """Nothing but the tokenizers is anywhere else, and the warning names what is used."""
    path = saved(tmp_path / "all.safetensors", bundle(repositories, name, vae))
    with pytest.warns(UserWarning, match="also holds") as told:
        pipe = load(name, tmp_path, transformer=path, tokenizer=home(repositories, name))
    (message,) = [str(warning.message) for warning in told if "also holds" in str(warning.message)]
    comfy = [name for name, *_ in TEXT_ENCODERS[name].values()]
    assert all(f"text_encoders.{one}.transformer.*" in message for one in comfy)
    assert f"{vae}*" in message
    assert_as_released(pipe, name, repositories)


@pytest.mark.parametrize("name", NAMES)
def test_given_files_come_before_those_in_the_checkpoint(repositories, tmp_path, name):
    tensors, source = bundle(repositories, name), home(repositories, name)
    wrong = {
        name: tensor if name.startswith("model.") else torch.zeros_like(tensor)
        for name, tensor in tensors.items()
    }
    path = saved(tmp_path / "all.safetensors", wrong)
    given = {
        argument: source / part / "model.safetensors"
        for part, (_, argument, _) in TEXT_ENCODERS[name].items()
    }
    given["autoencoder"] = source / flux.MODELS[name].autoencoder_files[0]
    pipe = load(name, tmp_path, transformer=path, tokenizer=source, **given)
    assert_as_released(pipe, name, repositories)


@pytest.mark.parametrize("name", NAMES)
def test_part_of_a_checkpoint_may_be_given_alone(repositories, tmp_path, name):
    """Each part of the checkpoint, in the flag of its network; the rest from the repository."""
    path = saved(tmp_path / "all.safetensors", bundle(repositories, name))
    arguments = [argument for _, argument, _ in TEXT_ENCODERS[name].values()]
    given = dict.fromkeys(["autoencoder", *arguments], path)
    transformer = home(repositories, name) / flux.MODELS[name].transformer_file
    pipe = load(name, repositories, transformer=transformer, **given)
    assert_as_released(pipe, name, repositories)


def test_checkpoint_without_text_encoders_takes_those_of_the_repository(repositories, tmp_path):
    name = "flux.1-dev"
    tensors = {k: t for k, t in bundle(repositories, name).items() if "text_encoders." not in k}
    path = saved(tmp_path / "all.safetensors", tensors)
    with pytest.warns(
        UserWarning, match=r"all.safetensors also holds other networks, .*: vae\.\*$"
    ):
        pipe = load(name, repositories, transformer=path)
    assert pipe.files["autoencoder"] == [path] != pipe.files["clip"]
    assert_as_released(pipe, name, repositories)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_in_float8_equals_its_decoded_networks(repositories, tmp_path, name):
    """As flux1-dev-fp8.safetensors: all cast to float8, norms and biases too, but the autoencoder.

    The right values come from the same numbers in float32, in a file for each network.
    """
    tensors = {
        layer: tensor.to(torch.float8_e4m3fn) if not layer.startswith("vae.") else tensor
        for layer, tensor in bundle(repositories, name).items()
    }
    path = saved(tmp_path / "all.safetensors", tensors)
    source, given = home(repositories, name), {}
    prefixes = {"transformer": "model.diffusion_model."}
    for comfy, argument, _ in TEXT_ENCODERS[name].values():
        prefixes[argument] = f"text_encoders.{comfy}.transformer."
    for argument, prefix in prefixes.items():
        decoded = {
            layer.removeprefix(prefix): tensor.float()
            for layer, tensor in tensors.items()
            if layer.startswith(prefix)
        }
        given[argument] = saved(tmp_path / f"{argument}.safetensors", decoded)
    pipe = load(name, repositories, transformer=path, tokenizer=source)
    assert np.array_equal(image(pipe), image(load(name, repositories, **given)))


@pytest.mark.parametrize("part", ["text_encoders.clip_l.transformer.", "vae."])
def test_missing_and_unknown_tensors_of_a_part_are_refused(repositories, tmp_path, part):
    name, source = "flux.1-dev", home(repositories, "flux.1-dev")
    tensors = bundle(repositories, name)
    first = next(name for name in tensors if name.startswith(part))
    cases = {"1 missing": {k: t for k, t in tensors.items() if k != first}}
    bias = next(name for name in tensors if name.startswith(part) and name.endswith(".bias"))
    cases["1 unknown"] = tensors | {bias.replace(".bias", ".other"): torch.zeros(2)}
    for problem, damaged in cases.items():
        path = saved(tmp_path / "all.safetensors", damaged)
        with pytest.warns(UserWarning, match="also holds"):
            message = refusal(load, name, tmp_path, transformer=path, tokenizer=source)
        assert problem in message and str(path) in message


@pytest.mark.parametrize("name", NAMES)
def test_text_encoders_and_tokenizers_are_read_from_anywhere(repositories, tmp_path, name):
    """Single files under ComfyUI's names, and all tokenizer files in one folder."""
    source, given = home(repositories, name), {}
    for part, (comfy, argument, _) in TEXT_ENCODERS[name].items():
        given[argument] = tmp_path / f"{comfy}.safetensors"
        others = {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2)}
        tensors = load_file(source / part / "model.safetensors")
        save_file(tensors | (others if comfy == "clip_l" else {}), given[argument])
    flat = tmp_path / "tokenizers"
    flat.mkdir()
    for file in source.glob("tokenizer*/*"):
        (flat / file.name).write_bytes(file.read_bytes())
    transformer = source / flux.MODELS[name].transformer_file
    pipe = load(name, repositories, transformer=transformer, **given, tokenizer=flat)
    assert [network.files for network in pipe.text.networks] == [
        [given[argument]]
        for _, argument, _ in sorted(TEXT_ENCODERS[name].values(), key=lambda row: row[2])
    ]
    assert_as_released(pipe, name, repositories)


def test_clip_without_text_model_is_read(repositories, tmp_path):
    """transformers >= 5.6 writes CLIPTextModel so; it must be equal to the older spelling."""
    source = home(repositories, "flux.1-dev")
    tensors = load_file(source / "text_encoder/model.safetensors")
    flat = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    assert not flat.keys() & tensors.keys()
    path = saved(tmp_path / "clip.safetensors", flat)
    transformer = source / flux.MODELS["flux.1-dev"].transformer_file
    pipe = load("flux.1-dev", repositories, transformer=transformer, text_encoder=path)
    assert_as_released(pipe, "flux.1-dev", repositories)


def test_wrong_files_are_refused(repositories, tmp_path):
    source = home(repositories, "flux.1-dev")
    t5 = source / "text_encoder_2/model.safetensors"
    message = refusal(load, "flux.1-dev", repositories, text_encoder=t5)
    assert "looks like a T5 text encoder, and a CLIP text encoder is wanted" in message
    message = refusal(load, "flux.2-klein-4b", repositories, text_encoder_2=t5)
    assert message.startswith("text_encoder_2: flux.2-klein-4b has one text encoder.")
    message = refusal(load, "flux.1-dev", repositories, tokenizer=t5)
    assert message.startswith(f"tokenizer: {t5} is not a folder.")
    message = refusal(load, "flux.1-dev", repositories, tokenizer=tmp_path)
    assert message.startswith(f"{tmp_path}: no tokenizer (")
    parts = dict.fromkeys(["transformer", "autoencoder", "clip", "t5"], [t5])
    parts["clip_tokenizer"] = source / "tokenizer"
    message = refusal(locate, flux.MODELS["flux.1-dev"], tmp_path, parts)
    assert "spiece.model of" in message and "may also be passed as `tokenizer`" in message


@pytest.mark.slow
def test_script_uses_a_checkpoint_says_so_and_records_it(cli, tmp_path):
    """The embedded toy as one file, and its CLIP as a file of its own: the same pixels."""
    name, home = "flux.1-tiny", EMBEDDED / "flux.1-tiny"
    parts = {"model.diffusion_model.": "flux1-tiny.safetensors", "vae.": "ae.safetensors"}
    folders = {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"}
    clip = {"--text-encoder": home / "text_encoder/model.safetensors", "--tokenizer": home}
    for comfy, folder in folders.items():
        parts[f"text_encoders.{comfy}.transformer."] = f"{folder}/model.safetensors"
    tensors: dict[str, Tensor] = {}
    for prefix, file in parts.items():
        tensors |= prefixed(prefix, load_file(home / file))
    path = saved(tmp_path / "all.safetensors", tensors)
    request = ["a red star", "--model", name, "--steps", 1, "--seed", 3, "--width", 64]
    request += ["--height", 64]
    plain = cli(*request, "--output", "plain.png")
    run = cli(*request, "--transformer", path, *sum(clip.items(), ()), "--output", "all.png")
    assert (plain.code, run.code) == (0, 0), run.err
    used = "text_encoders.t5xxl.transformer.*, vae.*"
    assert f"note: {path} also holds other networks, which are used: {used}\n" in run.err
    assert pixels(*run.images) == pixels(*plain.images)
    metadata = read_metadata(*run.images)
    assert metadata["transformer"] == "all.safetensors"
    assert metadata["text_encoder"] == "model.safetensors" and metadata["tokenizer"] == name
    again = cli("--from-image", "all.png", "--transformer", path, "--output", "again.png")
    assert again.code == 2 and "Pass it as --text-encoder." in again.err
    typed = [*sum(clip.items(), ()), "--transformer", path]
    again = cli("--from-image", "all.png", *typed, "--output", "again.png")
    assert again.code == 0 and pixels(*again.images) == pixels(*plain.images), again.err

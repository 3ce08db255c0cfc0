"""flux.lora.manager in a pipeline: LoRAs are added, scaled and removed; a row's LoRA stays."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_zoo import Zoo
from torch import Tensor

from flux.errors import UserError
from flux.parity.reference import max_error
from flux.pipeline import Pipeline

CANNY_LORA, DEV = "flux.1-canny-dev-lora", "flux.1-dev"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* was distilled for"),
    pytest.mark.filterwarnings("ignore:.* was not trained with"),
    pytest.mark.filterwarnings("ignore:the image has colors"),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load_again(zoo: Zoo, name: str, dtype: torch.dtype = torch.float32) -> Pipeline:
    zoo(name)
    return zoo.load(name, dtype)


def refusal(call, *arguments, **options) -> str:
    """Return the one line of a UserError."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ LoRAs

LAYER = "double_blocks.0.img_mlp.0"


def lora(path: Path, seed: int = 0) -> Path:
    tensors = {
        f"{LAYER}.lora_A.weight": random(4, 128, seed=seed),
        f"{LAYER}.lora_B.weight": random(512, 4, seed=seed + 1) / 9,
    }
    save_file(tensors, path)
    return path


def weights(pipe: Pipeline) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.transformer().state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def added(before: Tensor, *files: tuple[Path, float]) -> Tensor:
    """Return the layer's weight, in float64, with each file's change at its scale."""
    total = before.double()
    for path, scale in files:
        tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
        total = (
            total + scale * tensors[f"{LAYER}.lora_B.weight"] @ tensors[f"{LAYER}.lora_A.weight"]
        )
    return total


def test_same_lora_twice_is_refused(zoo, tmp_path):
    pipe, file = load_again(zoo, DEV), lora(tmp_path / "a.safetensors")
    before = weights(pipe)
    pipe.load_lora(file, 0.5)
    expected = f"{file} is loaded already: give it once, or change its scale with set_lora_scale"
    assert refusal(pipe.load_lora, str(file), 0.7) == expected
    now = weights(pipe)
    assert list(pipe.loras) == [file]
    assert (
        max_error(now[f"{LAYER}.weight"].double(), added(before[f"{LAYER}.weight"], (file, 0.5)))
        < 1e-6
    )
    assert same(
        *({n: x for n, x in state.items() if n != f"{LAYER}.weight"} for state in (before, now))
    )
    nowhere = tmp_path / "b.safetensors"
    assert (
        refusal(pipe.set_lora_scale, nowhere, 1.0) == f"{nowhere} is not loaded; loaded are: {file}"
    )
    pipe.unload_loras()
    assert same(weights(pipe), before)
    assert refusal(pipe.set_lora_scale, file, 1.0) == f"{file} is not loaded; loaded are: none"


def test_control_lora_is_refused_by_other_models(zoo):
    """The LoRA would widen the input of a model without a control image."""
    zoo(CANNY_LORA)
    pipe, file = (
        load_again(zoo, DEV),
        zoo.folder / "FLUX.1-Canny-dev-lora/flux1-canny-dev-lora.safetensors",
    )
    before = weights(pipe)
    message = refusal(pipe.load_lora, file, 0.85)
    assert message.startswith(
        f"{file} is for an input of 128 channels, which {DEV} does not have; if it is"
    )
    assert message.endswith(" flux.1-canny-dev-lora, flux.1-depth-dev-lora")
    fill = load_again(zoo, "flux.1-fill-dev")  # its 384 channels have another order
    assert (
        "which flux.1-fill-dev does not have" in refusal(fill.load_lora, file) and fill.loras == {}
    )
    assert pipe.loras == {} and same(weights(pipe), before)


def test_unloading_keeps_the_lora_of_the_row(zoo, tmp_path):
    pipe, file = load_again(zoo, CANNY_LORA), lora(tmp_path / "a.safetensors")
    before, builtin = weights(pipe), list(pipe.loras)
    assert before["img_in.weight"].shape == (128, 128) and len(builtin) == 1
    pipe.load_lora(file)
    assert list(pipe.loras) == [*builtin, file] and not same(weights(pipe), before)
    pipe.unload_loras()
    assert list(pipe.loras) == builtin and same(weights(pipe), before)


def test_second_control_lora_is_refused_before_anything_is_merged(zoo, tmp_path):
    pipe = load_again(zoo, CANNY_LORA)
    (builtin,), before = pipe.loras, weights(pipe)
    (other := tmp_path / "other.safetensors").write_bytes(builtin.read_bytes())
    assert refusal(pipe.load_lora, other).startswith(
        f"{other} and {builtin} replace the same weights"
    )
    assert list(pipe.loras) == [builtin] and same(weights(pipe), before)


def test_loading_the_lora_of_the_row_changes_its_scale(zoo, tmp_path):
    """By any name of its file. The scale replaces the row's 0.85."""
    pipe = load_again(zoo, CANNY_LORA)
    (builtin,) = pipe.loras
    base = load_file(zoo.folder / "FLUX.1-dev/flux1-dev.safetensors")[f"{LAYER}.weight"]
    assert max_error(weights(pipe)[f"{LAYER}.weight"].double(), added(base, (builtin, 0.85))) < 1e-6
    link = tmp_path / "linked.safetensors"
    link.symlink_to(builtin)
    for path, scale in (
        (builtin, 0.3),
        (str(builtin), -0.5),
        (builtin.parent / ".." / builtin.parent.name / builtin.name, 0.6),
        (link, 0.0),
    ):
        pipe.load_lora(path, scale)
        assert [(name, value) for name, (_, value) in pipe.loras.items()] == [(builtin, scale)]
        assert (
            max_error(weights(pipe)[f"{LAYER}.weight"].double(), added(base, (builtin, scale)))
            < 1e-6
        )


def test_scale_that_is_not_finite_changes_nothing(zoo, tmp_path):
    pipe, other = load_again(zoo, CANNY_LORA), lora(tmp_path / "a.safetensors", seed=2)
    (builtin,), before = pipe.loras, weights(pipe)
    calls = ((pipe.set_lora_scale, builtin), (pipe.load_lora, builtin), (pipe.load_lora, other))
    for scale in (math.inf, -math.inf, math.nan):
        for call, path in calls:
            message = refusal(call, path, scale)
            assert message == f"scale: must be a finite number (got {scale} for {path})."
            assert [(name, value) for name, (_, value) in pipe.loras.items()] == [(builtin, 0.85)]
            assert same(weights(pipe), before)


# ------------------------------------------------------------------ where files are


def test_link_keeps_its_own_configuration_and_is_one_file(zoo, tmp_path):
    """In the Hugging Face cache, a file is a link into blobs/, and so is its configuration."""
    pipe = load_again(zoo, DEV)
    name, config = "adapter_model.safetensors", '{"peft_type": "LORA", "r": 4, "lora_alpha": 16}'
    folder = tmp_path / "snapshots"
    folder.mkdir()
    (folder / name).symlink_to(lora(tmp_path / "0123"))
    (tmp_path / "4567").write_text(config)
    (folder / "adapter_config.json").symlink_to(tmp_path / "4567")
    pipe.load_lora(tmp_path / "0123", 4.0)  # has no configuration under this name
    expected = weights(pipe)
    pipe.unload_loras()
    for path in (folder / name, folder):  # the folder, too
        pipe.load_lora(path)
        assert same(weights(pipe), expected)
        assert str(folder / name) in refusal(pipe.load_lora, folder / name)
        pipe.set_lora_scale(path, 0.5)
        pipe.unload_loras()


def test_lora_of_a_language_model_changes_the_text_features(zoo, tmp_path):
    pipe = load_again(zoo, "flux.2-klein-4b")
    path, layer = "layers.0.mlp.up_proj", pipe.text.model().layers[0].mlp.up_proj
    before, rows = layer.weight.clone(), layer.out_features
    a, b = random(4, layer.in_features), random(rows, 4, seed=1)
    key = f"text_encoders.qwen3_4b.transformer.model.{path}"
    tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
    save_file(tensors, tmp_path / "x.safetensors")
    features = pipe.encode(["a cat"])
    pipe.load_lora(tmp_path / "x.safetensors", 0.5)
    after = pipe.text.model().get_submodule(path).weight
    assert max_error(after, before + 0.5 * (b @ a)) < 1e-6
    assert max_error(pipe.encode(["a cat"]).tokens, features.tokens) > 0.01
    pipe.unload_loras()
    assert torch.equal(pipe.encode(["a cat"]).tokens, features.tokens)

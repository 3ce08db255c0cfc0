"""flux.safety.classifier and .filters: transformers, live, on random weights; damaged files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.classifiers import save_random_classifier

from flux.errors import UserError
from flux.safety import filters
from flux.safety.classifier import ImageClassifier, ViTConfig, preprocess


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nsfw")
    save_random_classifier(folder)
    return folder


def changed(folder, tmp_path, config=lambda values: None, tensors=lambda values: None):
    """Copy the classifier's two files, changed in place by the functions."""
    values, weights = json.loads((folder / "config.json").read_text()), None
    weights = load_file(folder / "model.safetensors")
    config(values), tensors(weights)
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("size", [(224, 224), (300, 70), (64, 501), (1024, 1024)])
def test_preprocessing_equals_transformers(size):
    from transformers import ViTImageProcessorPil

    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3).repeat(256, 0)
    for image in (noise(*size), Image.fromarray(levels).resize(size)):
        options = dict(size={"height": 224, "width": 224}, image_mean=[0.5] * 3, resample=2)
        processor = ViTImageProcessorPil(**options, image_std=[0.5] * 3)
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(preprocess(image), theirs)


def test_scores_equal_transformers_to_the_bit(folder):
    """Also the labels the other way round, which the configuration tells."""
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    ours = filters.load_nsfw_filter(folder)
    scores = []
    for seed in range(5):
        image = noise(80 + seed, 64, seed)
        with torch.no_grad():
            theirs = model(preprocess(image, 32)).logits
        with torch.inference_mode():
            assert torch.equal(ours.network(preprocess(image, 32)), theirs)
        scores.append(ours.judge(image).score)
        assert scores[-1] == theirs.softmax(-1)[0, 1].item()
    assert np.std(scores) > 1e-3


def test_label_nsfw_is_found_by_its_name(folder, tmp_path):
    swapped = changed(folder, tmp_path, lambda v: v.update(id2label={"0": "nsfw", "1": "normal"}))
    ours, other = filters.load_nsfw_filter(folder), filters.load_nsfw_filter(swapped)
    assert ours.judge(noise(64, 64)).score + other.judge(noise(64, 64)).score == pytest.approx(1)


@pytest.mark.slow
def test_full_size_classifier_equals_transformers(tmp_path):
    """The sizes of the released file: 200 tensors, 85,800,194 numbers."""
    sizes = dict(image_size=224, patch_size=16, hidden_size=768, intermediate_size=3072)
    sizes |= dict(num_attention_heads=12, num_hidden_layers=12)
    model = save_random_classifier(tmp_path, **sizes)
    with torch.device("meta"):
        names = ImageClassifier(ViTConfig()).state_dict()
    assert names.keys() == load_file(tmp_path / "model.safetensors").keys() and len(names) == 200
    assert sum(tensor.numel() for tensor in names.values()) == 85_800_194
    ours, image = filters.load_nsfw_filter(tmp_path), noise(640, 480)
    with torch.no_grad():
        score = model(preprocess(image)).logits.softmax(-1)[0, 1].item()
    assert ours.judge(image).score == score and 0.01 < score < 0.99


@pytest.mark.parametrize(
    "score, refused",
    [(0.0, False), (0.8499999, False), (0.85, True), (1.0, True), (float("nan"), True)],
)
def test_threshold_itself_and_nan_are_refused(score, refused):
    assert filters.Verdict("nsfw", score, filters.NSFW_THRESHOLD).refused is refused


@pytest.mark.parametrize(
    "config",
    [
        lambda v: v.pop("id2label"),
        lambda v: v.update(id2label={"0": "normal", "1": "other"}),
        lambda v: v.update(id2label={"0": "nsfw", "1": "nsfw"}),
        lambda v: v.update(id2label={"0": "normal", "2": "nsfw"}),
        lambda v: v.update(model_type="deit"),
        lambda v: v.update(hidden_act="relu"),
        lambda v: v.update(hidden_size="wide"),
        lambda v: v.update(hidden_size=0),
        lambda v: v.update(num_attention_heads=5),
        lambda v: v.update(num_hidden_layers=10**9),
    ],
)
def test_wrong_configuration_is_refused(folder, tmp_path, config):
    with pytest.raises(UserError, match="filter_weights: .* does not describe a ViT"):
        filters.load_nsfw_filter(changed(folder, tmp_path, config))


@pytest.mark.parametrize(
    "tensors",
    [
        lambda t: t.pop("classifier.bias"),
        lambda t: t.update({"classifier.weight": torch.zeros(3, 32)}),
        lambda t: t["vit.layernorm.weight"].fill_(float("nan")),
        lambda t: t.update({"vit.encoder.layer.2.output.dense.bias": torch.zeros(32)}),
    ],
)
def test_wrong_weights_are_refused(folder, tmp_path, tensors):
    with pytest.raises(UserError, match="model.safetensors|tensor"):
        filters.load_nsfw_filter(changed(folder, tmp_path, tensors=tensors))


def test_missing_or_truncated_files_are_refused(folder, tmp_path, no_weights_here):
    with pytest.raises(UserError, match="filter_weights: model.safetensors .* is not there"):
        filters.load_nsfw_filter(tmp_path)
    with pytest.raises(UserError, match="filter_weights: model.safetensors .* is not there"):
        filters.load_nsfw_filter()
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="config.json: does not exist"):
        filters.load_nsfw_filter(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="model.safetensors"):
        filters.load_nsfw_filter(tmp_path)

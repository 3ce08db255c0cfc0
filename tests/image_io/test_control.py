"""flux.image_io.control: edges and depth, as Black Forest Labs' code computes them.

The truth: OpenCV and transformers themselves, put together by the recipe of black-forest-labs/flux,
src/flux/modules/image_embedders.py: Canny's thresholds 50 and 200; raw depth, bicubic with
antialiasing, / 127.5 - 1.
"""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessorPil,
)

from flux.errors import UserError
from flux.image_io import control
from flux.image_io.output import to_images, to_pixels
from flux.parity.reference import max_error, randomise

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of ImageNet, as in the released preprocessor_config.json


def drawing(width: int = 256, height: int = 192) -> Image.Image:
    """Coloured blots of all contrasts, and a disc."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    ImageDraw.Draw(picture).ellipse((10, 10, 40, 40), fill=(20, 40, 60), outline="white")
    return picture


# ------------------------------------------------------------------------------ edges


def test_edges_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2")
    made = control.canny(drawing())
    assert (made.mode, made.size) == ("RGB", (256, 192))
    expected = cv2.Canny(np.asarray(drawing()), 50, 200)
    assert expected.any() and np.array_equal(made, np.stack([expected] * 3, 2))


@pytest.mark.parametrize(
    "upper, lower, found", [(50, 50, False), (51, 51, True), (51, 13, True), (51, 12, False)]
)
def test_literal_thresholds(upper, lower, found):
    """A step of s levels has Sobel's gradient 4s. An edge begins above 200 and goes on above 50."""
    pytest.importorskip("cv2")
    levels = np.zeros((64, 64, 3), np.uint8)
    levels[:32, 32:], levels[32:, 32:] = upper, lower
    assert np.asarray(control.canny(Image.fromarray(levels)))[56:].any() == found


def test_levels_are_truncated_as_by_bfl():
    """float32: level / 127.5 - 1, then (x + 1) * 127.5, then a byte. 63 levels fall by 1."""
    levels = np.arange(256, dtype=np.uint8)
    image = Image.fromarray(np.stack([levels] * 3, 1)[None])  # (1, 256, 3)
    truncated = np.asarray(control.truncate_levels(image))[0]
    x = levels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    by_hand = ((x + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    assert np.array_equal(truncated, np.stack([by_hand] * 3, 1))
    fallen = np.flatnonzero(by_hand != levels)
    assert np.array_equal(fallen, np.arange(1, 64)) and np.array_equal(by_hand[1:64], levels[:63])


def test_bfl_levels_change_the_edges_of_a_photo_and_are_off_by_default():
    cv2 = pytest.importorskip("cv2")
    photo = drawing()
    dark = photo.point(lambda level: level // 2)  # many levels around 64
    exact, bfl = control.control_pixels("canny", dark), control.control_pixels("canny", dark, True)
    assert torch.equal(exact, to_pixels(control.canny(dark)))
    edges = cv2.Canny(np.asarray(control.truncate_levels(dark)), 50, 200)
    assert torch.equal(bfl, torch.from_numpy(edges / 127.5 - 1).float().expand(1, 3, -1, -1))
    assert not torch.equal(exact, bfl)


def test_edges_need_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        UserError,
        match=r"OpenCV, which is not installed. Run `pip install -e '.\[control\]'`, or use",
    ):
        control.canny(drawing())


# ------------------------------------------------------------------------------ depth


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Depth Anything of 40 thousand parameters, all random, saved as the released one is."""
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        mlp_ratio=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    model = randomise(DepthAnythingForDepthEstimation(config))
    with torch.no_grad():
        model.head.conv3.weight.mul_(300)  # a depth of hundreds, so that values lie beyond 1 too
        model.head.conv3.bias.fill_(40)
    model.save_pretrained(path := tmp_path_factory.mktemp("depth"))
    size = {"height": 56, "width": 56}
    DPTImageProcessorPil(
        size=size,
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        image_mean=list(MEAN),
        image_std=list(STD),
        resample=3,
    ).save_pretrained(path)
    return path


def by_hand(folder, picture: Image.Image, seen: tuple[int, int]) -> torch.Tensor:
    """The recipe, with Pillow as the processor; `seen`: the network's input (width, height)."""
    model = DepthAnythingForDepthEstimation.from_pretrained(folder).eval()
    small = np.asarray(picture.resize(seen, Image.Resampling.BICUBIC)) / 255
    inputs = torch.from_numpy((small - MEAN) / STD).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        raw = model(inputs).predicted_depth[None]  # (1, 1, H, W)
    scaled = F.interpolate(raw, (picture.height, picture.width), mode="bicubic", antialias=True)
    return scaled.expand(-1, 3, -1, -1) / 127.5 - 1


@pytest.mark.parametrize(
    "size, seen", [((96, 64), (84, 56)), ((48, 112), (56, 126)), ((56, 56), (56, 56))]
)
def test_depth_is_that_of_transformers(folder, size, seen):
    """The shorter side becomes 56 (518 in the released model), the other a multiple of 14."""
    made = control.depth(drawing(*size), str(folder))
    expected = by_hand(folder, drawing(*size), seen)
    assert made.shape == (1, 3, size[1], size[0]) and made.dtype == torch.float32
    assert (
        expected.std() > 0.1 and expected.max() > 1 and expected.min() < 0
    )  # neither flat nor bound to [-1, 1]
    assert max_error(made, expected) < 2e-6  # the inputs' normalisation is in float64 there
    assert to_images(made)[0].size == size


def test_depth_needs_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError,
        match=r"transformers, which is not installed. Run `pip install -e '.\[control\]'`",
    ):
        control.depth(drawing())


def test_depth_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="none: the depth model cannot be loaded .*. Use another model, or a ready"
    ):
        control.depth(drawing(), str(tmp_path / "none"))


def copy(folder, to, weights):
    for name in ("config.json", "preprocessor_config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    save_file(weights, to / "model.safetensors", {"format": "pt"})


def test_depth_model_that_lacks_weights_is_refused(folder, tmp_path):
    """transformers would fill them at random, and go on."""
    weights = load_file(folder / "model.safetensors")
    del weights["head.conv2.bias"]
    copy(folder, tmp_path, weights)
    with pytest.raises(
        UserError, match="lacks 1 tensors .head.conv2.bias is one.. It is damaged, or not a Depth"
    ):
        control.depth(drawing(), str(tmp_path))


def test_depth_model_of_another_shape_is_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["head.conv2.weight"] = weights["head.conv2.weight"][:, :1].contiguous()
    copy(folder, tmp_path, weights)
    with pytest.raises(UserError, match="cannot be loaded"):
        control.depth(drawing(), str(tmp_path))


def test_depth_model_is_never_unpickled(folder, tmp_path):
    copy(folder, tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded .*safetensors"):
        control.depth(drawing(), str(tmp_path))

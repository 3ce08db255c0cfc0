"""flux.training.dataset: folders, sizes, and the cache."""

import json
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from support.weight_files import refusal

import flux
from flux.training import dataset
from flux.training.checkpoint import load_tensors
from flux.training.dataset import Sample

# -------------------------------------------------------------------------------- folders and sizes


def write_image(path: Path, width: int = 64, height: int = 64, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


@given(st.integers(64, 4000), st.integers(64, 4000), st.sampled_from(range(128, 2049, 16)))
def test_bucket_size_keeps_area_and_aspect_ratio(width, height, size):
    if max(width, height) > dataset.MAX_ASPECT_RATIO * min(width, height):
        return
    w, h = dataset.bucket_size(width, height, size)
    assert w % 16 == 0 and h % 16 == 0 and min(w, h) >= 64
    # the shorter side is rounded to a multiple of 16
    assert abs(w * h / size**2 - 1) <= 8 * max(w, h) / size**2 + 1e-9
    step = max(16, size // 256 * 16)
    assert (max(w, h) - size) % step == 0
    assert dataset.bucket_size(width, width, size) == (size, size)
    exact = size * math.sqrt(max(width, height) / min(width, height))
    assert abs(max(w, h) - exact) <= step / 2 + 1e-9
    swapped = dataset.bucket_size(height, width, size)
    assert swapped == ((h, w) if width != height else (w, h))


def test_fit_to_bucket_covers_and_crops_at_the_centre():
    # brightness increases along one axis, so that a mean row or column shows where it comes from
    columns = np.linspace(0, 255, 300)[None, :, None] * np.ones((200, 1, 3))
    rows = np.linspace(0, 255, 200)[:, None, None] * np.ones((1, 300, 3))

    def fitted(pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(pixels.astype(np.uint8))
        return np.asarray(dataset.fit_to_bucket(image, 128)).astype(float)

    across, down = fitted(columns).mean((0, 2)), fitted(rows).mean((1, 2))
    assert (len(down), len(across)) == (96, 160)  # 104.5 x 156.8 before rounding
    assert across[0] < 2 and across[-1] > 253  # no column is cropped
    cropped = (200 - 96 / (160 / 300)) / 2  # rows, at the top and at the bottom
    assert down[0] == pytest.approx(255 * cropped / 200, abs=2)
    assert down[-1] == pytest.approx(255 * (1 - cropped / 200), abs=2)


def test_read_folder_pairs_images_with_text_files(tmp_path):
    for name, caption in (("b.png", "a cat\n"), ("a.JPG", "  a dog")):
        write_image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    (tmp_path / "a.txt").write_text("a dog", encoding="utf-8-sig")  # as Windows' Notepad does
    (tmp_path / "notes.md").write_text("not an image")
    expected = [Sample(tmp_path / "a.JPG", "a dog"), Sample(tmp_path / "b.png", "a cat")]
    assert dataset.read_folder(tmp_path) == expected


def test_read_folder_passes_over_the_files_of_other_systems(tmp_path):
    """AppleDouble (RFC 1740, magic number 00051607), Finder, Windows, Synology, archives."""
    write_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red star")
    expected = dataset.read_folder(tmp_path)
    double = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(60)
    for name in ("._a.png", "._a.txt", "._metadata.jsonl", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(double)
    for folder in ("@eaDir/a.png", "__MACOSX", ".thumbnails"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "b.png").write_bytes(double)
    assert dataset.read_folder(tmp_path) == expected and len(expected) == 1


def test_read_folder_reads_metadata_jsonl(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / name)
    lines = [
        {"image": "b.png", "caption": "it is night", "references": ["a.png", "c.png"]},
        {"image": "a.png", "caption": "day"},
        {"image": "a.png", "caption": "day", "control": "b.png"},
        {"image": "a.png", "caption": "day", "mask": "b.png"},
        {"image": "a.png", "caption": "a\u2028b\u0085c"},
    ]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8-sig")
    plain = Sample(tmp_path / "a.png", "day")
    assert dataset.read_folder(tmp_path) == [
        Sample(tmp_path / "b.png", "it is night", (tmp_path / "a.png", tmp_path / "c.png")),
        plain,
        replace(plain, control=tmp_path / "b.png"),
        replace(plain, mask=tmp_path / "b.png"),
        replace(plain, caption="a\u2028b\u0085c"),
    ]


BAD_LINES = {
    "a.png, a cat": "must be",
    "[1]": "must be",
    '{"image": "a.png"}': "must be",
    '{"image": "a.png", "caption": " "}': "must be",
    '{"image": 3, "caption": "a"}': "must be",
    '{"image": "a.png", "caption": "a", "references": "a.png"}': "must be",
    '{"image": "a.png", "caption": "a", "mask": []}': "must be",
    '{"image": "a.png", "caption": "a", "references": ["b.png"]}': "not a file: ",
    '{"image": "a.png", "caption": "a", "mask": "b.png"}': "not a file: ",
    '{"image": ".", "caption": "b.png"}': "not a file: ",
    '{"image": "%s", "caption": "a"}' % ("x" * 300): "not a file: ",
    '{"image": "a.png", "caption": "a", "reference": ["a.png"]}': "unknown name 'reference'",
}


def test_bad_line_of_metadata_jsonl_is_refused(tmp_path):
    write_image(tmp_path / "a.png")
    good = '{"image": "a.png", "caption": "fine"}\n'
    for line, fault in BAD_LINES.items():
        (tmp_path / "metadata.jsonl").write_text(good + line)
        message = refusal(dataset.read_folder, tmp_path)
        assert f"metadata.jsonl, line 2: {fault}" in message, line


def test_unusable_folder_is_refused(tmp_path):
    assert "is not a folder" in refusal(dataset.read_folder, tmp_path / "none")
    assert "has no images" in refusal(dataset.read_folder, tmp_path)
    for number in range(3):
        write_image(tmp_path / f"{number}.png")
    (tmp_path / "1.txt").write_text("a cat")
    (tmp_path / "2.txt").write_text(" \n")
    message = refusal(dataset.read_folder, tmp_path)
    assert "2 of 3 images have no caption (0.png, 2.png). Write it to 0.txt" in message
    (tmp_path / "0.txt").write_bytes(b"caf\xe9")
    assert "0.txt: is not UTF-8 text" in refusal(dataset.read_folder, tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    assert "metadata.jsonl: is empty" in refusal(dataset.read_folder, tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "broken link", "large"])
def test_text_that_is_no_plain_file_is_refused(tmp_path, monkeypatch, name, kind):
    path = write_image(tmp_path / "a.png").with_name(name)
    message = {"folder": "is a folder", "broken link": "does not exist"}.get(
        kind, "is a pipe or a "
    )
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        monkeypatch.setattr(dataset, "MAX_CAPTION", 100)
        monkeypatch.setattr(dataset, "MAX_LIST", 100)
        path.write_text("a" * 101)
        message = "is larger than 100 bytes"
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    assert f"{path}: {message}" in refusal(dataset.read_folder, tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_image_that_is_no_plain_file_is_refused(tmp_path, toy, kind):
    path = tmp_path / "a.png"
    path.with_suffix(".txt").write_text("a cat")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    (sample,) = dataset.read_folder(tmp_path)
    message = refusal(dataset.Cache(tmp_path / "cache", toy, 64).sample, sample)
    assert f"{path}: is a " in message
    (tmp_path / "metadata.jsonl").write_text('{"image": "a.png", "caption": "a cat"}')
    assert f"line 1: not a file: {path}" in refusal(dataset.read_folder, tmp_path)


def test_files_outside_the_folder_are_noted_once(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    write_image(folder / "a.png")
    (folder / "link.png").symlink_to(write_image(tmp_path / "b.png"))
    names = ["a.png", "link.png", "../b.png", str(tmp_path / "b.png"), "../images/a.png"]
    lines = [json.dumps({"image": name, "caption": "a"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning) as caught:
        assert len(dataset.read_folder(folder)) == 5
    (note,) = [str(warning.message) for warning in caught]
    assert "metadata.jsonl: names 3 files outside its folder (" in note and "link.png" in note
    (folder / "metadata.jsonl").write_text(lines[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.read_folder(folder)


def test_too_many_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_IMAGES", 2)
    for number in range(3):
        write_image(tmp_path / f"{number}.png").with_suffix(".txt").write_text("a")
    assert f"{tmp_path}: has more than 2 images" in refusal(dataset.read_folder, tmp_path)
    line = '{"image": "0.png", "caption": "a"}\n'
    (tmp_path / "metadata.jsonl").write_text(2 * line)
    assert len(dataset.read_folder(tmp_path)) == 2
    (tmp_path / "metadata.jsonl").write_text(3 * line)
    assert "metadata.jsonl: has more than 2 images" in refusal(dataset.read_folder, tmp_path)


# ---------------------------------------------------------------------------------------- the cache


@pytest.fixture(scope="module")
def toy():
    return flux.load(device="cpu")


def test_cache_encodes_once_and_by_content(tmp_path, toy, monkeypatch):
    cache = dataset.Cache(tmp_path / "cache", toy, 64)
    path = write_image(tmp_path / "a.png", 80, 50)
    cached = cache.sample(Sample(path, "a red circle"))
    fitted = np.array(dataset.fit_to_bucket(Image.open(path), 64))
    pixels = torch.from_numpy(fitted).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        latents = toy.image_encoder().encode(pixels)[0]
    assert torch.equal(load_tensors(cached.latents)["latents"], latents)
    tokens = toy.text.encode(["a red circle"]).tokens[0]
    assert torch.equal(load_tensors(cached.features)["tokens"], tokens)
    assert cached.shape == ((64, 4, 5),)

    with monkeypatch.context() as patch:  # nothing can be encoded
        patch.setattr(toy, "image_encoder", None)
        patch.setattr(toy.text, "encode", None)
        path.rename(tmp_path / "b.png")  # the content counts, not the name
        assert cache.sample(Sample(tmp_path / "b.png", "a red circle")) == cached
        with pytest.raises(TypeError):
            cache.features("a blue circle")
    monkeypatch.setattr(toy.text, "cache", {})
    larger = dataset.Cache(tmp_path / "cache", toy, 96)
    other = larger.sample(Sample(tmp_path / "b.png", "a red circle"))
    assert other.latents != cached.latents and other.features == cached.features


def test_damaged_cache_file_is_encoded_again(tmp_path, toy):
    cache = dataset.Cache(tmp_path / "cache", toy, 64)
    reference = write_image(tmp_path / "b.png", seed=1)
    sample = Sample(write_image(tmp_path / "a.png"), "a cat", (reference,))
    cached = cache.sample(sample)
    files = [cached.latents, cached.features, *cached.references]
    contents = [
        {name: x.clone() for name, x in load_tensors(file).items()} for file in files
    ]  # clones: a mapped file must not be cut
    for size in (0, 200):
        for file in files:
            file.write_bytes(file.read_bytes()[:size])
        assert cache.sample(sample) == cached
        for file, content in zip(files, contents, strict=True):
            again = load_tensors(file)
            assert all(torch.equal(again[name], x) for name, x in content.items())


def test_unusable_image_or_caption_is_refused_with_its_file(tmp_path, toy):
    cache = dataset.Cache(tmp_path / "cache", toy, 64)
    good = write_image(tmp_path / "a.png")
    small = write_image(tmp_path / "small.png", 10, 12)
    long = write_image(tmp_path / "long.png", 330, 64)
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:500])
    message = refusal(cache.sample, Sample(long, "a"))
    assert f"{long}: aspect ratio must be at most 4:1 (got 330x64)" in message
    unusable = [
        (Sample(broken, "a"), broken.name),
        (Sample(tmp_path / "none.png", "a"), "none.png: does not exist"),
        (Sample(good, "a", (small,)), small.name),
        (Sample(good, "a \0 cat"), "a.png: "),
    ]
    for sample, expected in unusable:
        assert expected in refusal(cache.sample, sample)


def test_small_image_and_long_caption_are_reported(tmp_path, toy):
    path = write_image(tmp_path / "a.png", 60, 60)
    cache = dataset.Cache(tmp_path / "cache", toy, 128)
    with pytest.warns(UserWarning) as caught:
        cache.sample(Sample(path, "a red circle and " * 20))
    messages = [str(warning.message) for warning in caught]
    assert any("a.png: 60x60 is enlarged for `size=128`" in message for message in messages)
    assert any("a.png: " in message and "longer than 32 tokens" in message for message in messages)


def test_fingerprint_differs_between_weights(tmp_path):
    paths = []
    for number in range(3):
        tensor = torch.zeros(50_000)
        tensor[30_000 if number == 1 else 0] += number > 0
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({"x": tensor}, paths[-1])
    assert len({dataset.fingerprint([path]) for path in paths}) == 3
    assert dataset.fingerprint(paths[:1]) == dataset.fingerprint(paths[:1])


def test_random_rect_mask_has_all_sizes_and_places():
    masks = [np.asarray(dataset.random_rect_mask((90, 60), f"{n:012x}")) for n in range(200)]
    assert all(set(np.unique(mask)) <= {0, 255} for mask in masks)
    shares = [mask.mean() / 255 for mask in masks]
    assert min(shares) > 0.1 and max(shares) > 0.8
    assert np.mean(shares) == pytest.approx(4 / 9, abs=0.05)
    assert (np.mean(masks, axis=0) > 0).all()  # every pixel is painted in some mask

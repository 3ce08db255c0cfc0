"""flux.training.dataset: folders are read or refused, sizes, the cache, and that a step's draws depend on nothing but its number."""

import json
import math
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
from flux.training import trainer as training

# ---------------------------------------------------------------------------------------------------------- folders and sizes


def picture(path: Path, width: int = 64, height: int = 64, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


@given(st.integers(64, 4000), st.integers(64, 4000), st.sampled_from(range(128, 2049, 16)))
def test_buckets(width, height, size):
    if max(width, height) > dataset.LONGEST * min(width, height):
        return
    w, h = dataset.bucket(width, height, size)
    assert w % 16 == 0 and h % 16 == 0 and min(w, h) >= 64
    assert (
        abs(w * h / size**2 - 1) <= 8 * max(w, h) / size**2 + 1e-9
    )  # the shorter side is rounded, to 16
    step = max(16, size // 256 * 16)
    assert (max(w, h) - size) % step == 0 and dataset.bucket(width, width, size) == (size, size)
    assert (
        abs(max(w, h) - size * math.sqrt(max(width, height) / min(width, height)))
        <= step / 2 + 1e-9
    )
    assert dataset.bucket(height, width, size) == ((h, w) if width != height else (w, h))


def test_pictures_are_scaled_to_cover_and_cropped_about_the_centre():
    columns = np.linspace(0, 255, 300)[None, :, None] * np.ones(
        (200, 1, 3)
    )  # brightness is the place
    rows = np.linspace(0, 255, 200)[:, None, None] * np.ones((1, 300, 3))
    across, down = (
        np.asarray(dataset.fit(Image.fromarray(x.astype(np.uint8)), 128))
        .astype(float)
        .mean((1 - axis, 2))
        for axis, x in ((1, columns), (0, rows))
    )
    assert (len(down), len(across)) == (
        96,
        160,
    )  # 156.8 x 104.5, rounded; so the width is 160/300 of what it was
    assert across[0] < 2 and across[-1] > 253  # no column is lost
    lost = (200 - 96 / (160 / 300)) / 2  # rows, at the top and at the bottom
    assert down[0] == pytest.approx(255 * lost / 200, abs=2) and down[-1] == pytest.approx(
        255 * (1 - lost / 200), abs=2
    )


def test_a_folder_of_pictures_with_texts(tmp_path):
    for name, caption in (("b.png", "a cat\n"), ("a.JPG", "  a dog")):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    (tmp_path / "a.txt").write_text(
        "a dog", encoding="utf-8-sig"
    )  # as Windows' Notepad may write it
    (tmp_path / "notes.md").write_text("not a picture")
    assert dataset.read_folder(tmp_path) == [
        dataset.Item(tmp_path / "a.JPG", "a dog"),
        dataset.Item(tmp_path / "b.png", "a cat"),
    ]


def test_a_folder_with_a_list(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    lines = [
        {"image": "b.png", "caption": "it is night", "references": ["a.png", "c.png"]},
        {"image": "a.png", "caption": "day"},
        {"image": "a.png", "caption": "day", "control": "b.png"},
        {"image": "a.png", "caption": "day", "mask": "b.png"},
        {"image": "a.png", "caption": "a\u2028b\u0085c"},
    ]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8-sig")
    edit = dataset.Item(tmp_path / "b.png", "it is night", (tmp_path / "a.png", tmp_path / "c.png"))
    plain = dataset.Item(tmp_path / "a.png", "day")
    beside = [replace(plain, **{kind: tmp_path / "b.png"}) for kind in ("control", "mask")]
    assert dataset.read_folder(tmp_path) == [
        edit,
        plain,
        *beside,
        replace(plain, caption="a\u2028b\u0085c"),
    ]


BAD_LINES = {
    "no JSON": "a.png, a cat",
    "no object": "[1]",
    "no caption": '{"image": "a.png"}',
    "empty": '{"image": "a.png", "caption": " "}',
    "a number": '{"image": 3, "caption": "a"}',
    "a text": '{"image": "a.png", "caption": "a", "references": "a.png"}',
    "missing": '{"image": "a.png", "caption": "a", "references": ["b.png"]}',
    "missing too": '{"image": "a.png", "caption": "a", "mask": "b.png"}',
    "missing: a folder": '{"image": ".", "caption": "b.png"}',
    "a list": '{"image": "a.png", "caption": "a", "mask": []}',
    "misspelt": '{"image": "a.png", "caption": "a", "reference": ["a.png"]}',
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_bad_lines_are_told(tmp_path, fault):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"image": "a.png", "caption": "fine"}\n' + BAD_LINES[fault]
    )
    told = refusal(dataset.read_folder, tmp_path)
    assert "metadata.jsonl, line 2, " in told
    assert ("where there is no file" in told) == fault.startswith("missing")
    assert ("'reference', which means nothing here" in told) == (fault == "misspelt")


def test_bad_folders_are_told(tmp_path):
    assert "is not a folder" in refusal(dataset.read_folder, tmp_path / "none")
    assert "has no pictures" in refusal(dataset.read_folder, tmp_path)
    for number in range(3):
        picture(tmp_path / f"{number}.png")
    (tmp_path / "1.txt").write_text("a cat")
    (tmp_path / "2.txt").write_text(" \n")
    assert "2 of 3 pictures have no caption (0.png, 2.png): put it in 0.txt" in refusal(
        dataset.read_folder, tmp_path
    )
    (tmp_path / "0.txt").write_bytes(b"caf\xe9")
    assert "0.txt is not a text in UTF-8" in refusal(dataset.read_folder, tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    assert "metadata.jsonl is empty" in refusal(dataset.read_folder, tmp_path)


# ---------------------------------------------------------------------------------------------------------- order, cache


def test_the_order_of_an_epoch():
    shapes = ["wide"] * 5 + ["tall"] * 3 + ["square"]
    epochs = [dataset.order(shapes, 2, seed=4, epoch=epoch) for epoch in range(3)]
    for epoch in epochs:
        assert {row for batch in epoch for row in batch} == set(range(9))
        assert all(len(batch) == 2 and len({shapes[row] for row in batch}) == 1 for batch in epoch)
        assert len(epoch) == 3 + 2 + 1
    assert epochs[0] != epochs[1] != epochs[2]
    assert (
        epochs[1]
        == dataset.order(shapes, 2, seed=4, epoch=1)
        != dataset.order(shapes, 2, seed=5, epoch=1)
    )


@pytest.fixture(scope="module")
def toy():
    return flux.load(device="cpu")


def test_what_is_damaged_in_the_cache_is_made_anew(tmp_path, toy):
    cache = dataset.Cache(tmp_path / "cache", toy, 64)
    item = dataset.Item(
        picture(tmp_path / "a.png"), "a cat", (picture(tmp_path / "b.png", seed=1),)
    )
    made = cache.example(item)
    files = {file: file.read_bytes() for file in (made.latents, made.features, *made.references)}
    for content in (b"", b"abc"):
        for file in files:
            file.write_bytes(content or files[file][:200])
        assert cache.example(item) == made and all(
            file.read_bytes() == files[file] for file in files
        )


def test_small_references_and_captions_of_no_text_are_told(tmp_path, toy):
    cache, large = dataset.Cache(tmp_path / "cache", toy, 64), picture(tmp_path / "a.png")
    small = picture(tmp_path / "b.png", 10, 12)
    assert f"{small} is 10x12: both sides must be at least 64" in refusal(
        cache.example, dataset.Item(large, "a", (small,))
    )
    assert "a.png: " in refusal(cache.example, dataset.Item(large, "a \0 cat"))


@pytest.fixture
def draws(tmp_path, toy):
    cache = dataset.Cache(tmp_path / "cache", toy, 64)
    items = [
        dataset.Item(picture(tmp_path / f"{n}.png", *size, seed=n), f"a {n}")
        for n, size in enumerate([(64, 64)] * 3 + [(96, 64)])
    ]
    return dataset.Draws([cache.example(item) for item in items], 2, 7, 4, cache.features(""), 0.5)


def test_what_is_drawn_depends_on_nothing_before(draws):
    late, wanted = draws(5), draws.examples
    torch.manual_seed(99)
    again = dataset.Draws(wanted, 2, 7, 4, draws.empty, 0.5)(5)

    def flat(drawn):
        return [drawn[0].latents, drawn[0].features.tokens, *drawn[1:]]

    assert all(torch.equal(a, b) for a, b in zip(flat(late), flat(again), strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(late[1:], draws(6)[1:], strict=True) if a.shape == b.shape
    )


def test_captions_are_dropped_as_often_as_asked(draws):
    empty = training.load(draws.empty)["tokens"]
    dropped = [torch.equal(row, empty) for n in range(100) for row in draws(n)[0].features.tokens]
    assert len(dropped) == 200 and 70 <= sum(dropped) <= 130  # four standard deviations
    never = dataset.Draws(draws.examples, 2, 7, 4, draws.empty, 0.0)
    assert not any(
        torch.equal(row, empty) for n in range(20) for row in never(n)[0].features.tokens
    )


def test_the_cache_holds_what_the_networks_make_and_makes_it_once(tmp_path, toy, monkeypatch):
    cache, path = dataset.Cache(tmp_path / "cache", toy, 64), picture(tmp_path / "a.png", 80, 50)
    example = cache.example(dataset.Item(path, "a red circle"))
    pixels = (
        torch.from_numpy(np.array(dataset.fit(Image.open(path), 64))).permute(2, 0, 1)[None] / 127.5
        - 1
    )
    with torch.inference_mode():
        assert torch.equal(
            training.load(example.latents)["latents"], toy.encoder().encode(pixels)[0]
        )
    assert torch.equal(
        training.load(example.features)["tokens"], toy.text.encode(["a red circle"]).tokens[0]
    )
    assert example.shape == ((64, 4, 5),)

    monkeypatch.setattr(toy, "encoder", None)
    monkeypatch.setattr(toy.text, "encode", None)
    path.rename(tmp_path / "b.png")  # what counts is what is in it
    assert cache.example(dataset.Item(tmp_path / "b.png", "a red circle")) == example
    with pytest.raises(TypeError):  # it would have to be encoded: None is called
        cache.features("a blue circle")
    monkeypatch.undo()
    monkeypatch.setattr(toy.text, "cache", {})
    other = dataset.Cache(tmp_path / "cache", toy, 96).example(
        dataset.Item(tmp_path / "b.png", "a red circle")
    )
    assert other.latents != example.latents and other.features == example.features


def test_fingerprints_differ_where_weights_do(tmp_path):
    paths = []
    for number in range(3):
        tensor = torch.zeros(50_000)
        tensor[30_000 if number == 1 else 0] += number > 0
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({"x": tensor}, paths[-1])
    assert len({dataset.fingerprint([path]) for path in paths}) == 3
    assert dataset.fingerprint(paths[:1]) == dataset.fingerprint(paths[:1])


def test_pictures_that_cannot_be_used_are_told(tmp_path, toy):
    cache = dataset.Cache(tmp_path / "cache", toy, 64)
    (tmp_path / "broken.png").write_bytes(picture(tmp_path / "a.png").read_bytes()[:500])
    long = picture(tmp_path / "long.png", 330, 64)
    assert "broken.png is damaged" in refusal(
        cache.example, dataset.Item(tmp_path / "broken.png", "a")
    )
    assert "long.png is 330x64: one side may be at most 4 times the other" in refusal(
        cache.example, dataset.Item(long, "a")
    )
    assert "none.png cannot be read" in refusal(
        cache.example, dataset.Item(tmp_path / "none.png", "a")
    )


def test_a_small_picture_is_told(tmp_path, toy):
    cache = dataset.Cache(tmp_path / "cache", toy, 128)
    with pytest.warns(UserWarning, match="a.png is 60x60, and enlarged for --size 128"):
        cache.example(dataset.Item(picture(tmp_path / "a.png", 60, 60), "a"))


def test_a_caption_over_the_limit_is_told_with_its_picture(tmp_path, toy):
    cache = dataset.Cache(tmp_path / "cache", toy, 64)
    with pytest.warns(
        UserWarning,
        match="a.png: the prompt is longer than 32 tokens; what did not fit was cut off",
    ):
        cache.example(dataset.Item(picture(tmp_path / "a.png"), "a red circle and " * 20))

"""The embedded models, end to end: their pictures show what they have learnt, and stop doing so when the network is broken.

The verdicts come from `flux.toy.check`, which measures pixels and knows nothing of networks (test_shapes_checking.py shows
that it can tell right from wrong). `scripts/toy/score.py` measures the same over 500 other prompts. The mutations are bugs that
ports of FLUX really have; each must cost 30 points of the pictures that are wholly right.
"""

import functools
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import flux
from flux import sampling, transformer
from flux import toy as shapes

SCENES = list(itertools.islice(shapes.scenes(2_000_000, held=True, complete=True), 60))
EDITS = list(itertools.islice(shapes.edits(2_100_000, held=True), 40))
FEW = 30
MODELS = ("flux.2-tiny", "flux.1-tiny")
BARS = {"all": 0.9, "each letter": 0.9, "background": 0.98, "colour": 0.95}


@pytest.fixture(scope="module", autouse=True)
def fast():
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@functools.cache
def model(name: str) -> flux.Pipeline:
    return flux.load(name, device="cpu")


@functools.cache
def made_by(name: str) -> list[np.ndarray]:
    return pictures(model(name), SCENES)


@pytest.fixture(scope="module")
def pipe() -> flux.Pipeline:
    return model("flux.2-tiny")


def pictures(pipe: flux.Pipeline, scenes: list[shapes.Scene], **options) -> list[np.ndarray]:
    return [
        np.asarray(image) for image in pipe([str(scene) for scene in scenes], seed=0, **options)
    ]


def drawn(layout: shapes.Layout | shapes.Scene, seed: int = 0) -> np.ndarray:
    return shapes.draw(layout, 256, 256, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def made() -> list[np.ndarray]:
    return made_by("flux.2-tiny")


def test_one_is_loaded_where_none_is_named():
    assert flux.load(device="cpu").spec.name == "flux.2-tiny"


@pytest.mark.parametrize("name", MODELS)
def test_pictures_show_what_held_out_prompts_say(name):
    score = shapes.score(made_by(name), SCENES)
    assert all(score[what] >= least for what, least in BARS.items()), score


def test_half_the_steps_cost_little(pipe, made):
    few, whole = (
        shapes.score(some, SCENES[:FEW])["all"]
        for some in (pictures(pipe, SCENES[:FEW], steps=4), made[:FEW])
    )
    assert few >= whole - 0.1


def test_edits_change_what_they_say_and_nothing_else(pipe):
    before = [
        flux.ImageInputs(tuple(Image.fromarray(drawn(layout)) for layout in edit.before))
        for edit in EDITS
    ]
    edited = [
        np.asarray(image) for image in pipe([str(edit) for edit in EDITS], seed=0, images=before)
    ]
    assert shapes.score_edits(edited, EDITS)["all"] >= 0.85


@pytest.mark.parametrize("name", MODELS)
def test_a_lora_puts_the_pictures_into_a_frame(name):
    """Wood along all four sides, and inside what was asked for; without the LoRA there is none."""
    pipe, made = model(name), made_by(name)
    border, (colour, _) = (
        shapes.framed(np.zeros((256, 256, 3), np.uint8)).any(-1),
        shapes.drawing.FRAME,
    )

    def is_framed(picture):
        return np.abs(picture[border].astype(int) - colour).mean() < 30

    pipe.load_lora(flux.configs.EMBEDDED / pipe.spec.name / "framed.safetensors")
    try:
        new = pictures(pipe, SCENES[:FEW])
    finally:
        pipe.unload_loras()
    assert not any(map(is_framed, made)) and sum(map(is_framed, new)) >= 0.9 * FEW
    inside = [
        np.where(border[..., None], np.uint8(shapes.COLOURS[scene.background]), picture)
        for picture, scene in zip(new, SCENES, strict=False)
    ]
    assert shapes.score(inside, SCENES[:FEW])["all"] >= 0.7


def test_guidance_that_is_an_input_does_what_two_passes_do():
    """flux.1-tiny, told guidance 4, against itself at guidance 1 with classifier-free guidance at 4: after one step of two.

    It was distilled from two passes of a teacher, which at guidance 1 it still is, nearly.
    """
    pipe = model("flux.1-tiny")
    prompts = [str(scene) for scene in SCENES[:8]]

    def after_a_step(**options) -> torch.Tensor:
        seen = []
        pipe(
            prompts,
            seed=0,
            steps=2,
            callback=lambda step, t, latents: seen.append(latents),
            **options,
        )
        return seen[0]

    plain, told, two = (
        after_a_step(guidance=1.0),
        after_a_step(guidance=4.0),
        after_a_step(guidance=1.0, true_cfg_scale=4.0),
    )
    moved = (two - plain).norm()
    assert (told - two).norm() < 0.8 * moved, (
        told - two
    ).norm() / moved  # 0.66 seen; one that ignores what it is told: 1
    assert (plain - two).norm() > 0.02 * two.norm()


def test_the_autoencoder_keeps_what_the_check_measures(pipe):
    original = np.stack([drawn(scene, seed) for seed, scene in enumerate(SCENES)])
    pixels = torch.from_numpy(original).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        decoded = [pipe.decode(pipe.autoencoder().encode(p))[0] for p in pixels.split(1)]
    assert shapes.score(original, SCENES)["all"] == 1
    assert shapes.score(map(np.asarray, decoded), SCENES)["all"] >= 0.97


def test_different_seeds_give_different_pictures_of_the_same_prompt(pipe):
    made = [np.asarray(i, np.float32) for i in pipe("a red circle", num_images=4, seed=10)]
    for a, b in itertools.combinations(made, 2):
        assert np.abs(a - b).mean() > 2  # grey levels; the same seed gives 0


@pytest.mark.parametrize("width, height", [(320, 192), (192, 320)])
def test_other_sizes_and_aspect_ratios_work(pipe, width, height):
    made = pictures(pipe, SCENES[:16], width=width, height=height)
    assert made[0].shape == (height, width, 3)
    assert shapes.score(made, SCENES[:16])["background"] >= 0.9


def swap_rows_and_columns(patch):
    straight = sampling.image_ids
    patch.setattr(sampling, "image_ids", lambda *a, **k: straight(*a, **k)[:, [0, 2, 1, 3]])


def skip_rope(patch):
    patch.setattr(transformer, "rotate", lambda x, rope: x)


def swap_shift_and_scale(patch):
    straight = transformer.Modulation.forward

    def swapped(self, x):
        return [m._replace(shift=m.scale - 1, scale=1 + m.shift) for m in straight(self, x)]

    patch.setattr(transformer.Modulation, "forward", swapped)


def drop_qk_norm(patch):
    patch.setattr(transformer, "unit_rms", lambda x, numerics: x)
    patch.setattr(transformer.QKNorm, "forward", lambda self, unit: unit)


def forget_the_thousand(patch):
    patch.setattr(transformer, "scale_time", lambda t, *_: t.float())


@pytest.mark.parametrize(
    "mutate",
    [swap_rows_and_columns, skip_rope, swap_shift_and_scale, drop_qk_norm, forget_the_thousand],
)
def test_a_broken_network_is_seen_in_the_pictures(pipe, made, monkeypatch, mutate):
    mutate(monkeypatch)
    broken, whole = (
        shapes.score(some[:FEW], SCENES[:FEW]) for some in (pictures(pipe, SCENES[:FEW]), made)
    )
    assert whole["all"] - broken["all"] >= 0.30, (whole, broken)

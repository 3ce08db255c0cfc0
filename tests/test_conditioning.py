"""flux.conditioning and the pipeline against diffusers: every mode, live, tiny random weights.

diffusers draws a sample of the autoencoder's posterior, BFL's code takes the mean. Here diffusers
takes the mean too, so that both start from the same noise.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from support.conditioned_model import HEIGHT, SEEDS, STEPS, WIDTH, Model, grid, levels, noise
from support.drawn_images import photo, soft_mask
from support.model_zoo import TINY_REDUX, TINY_SIGLIP
from torch import Tensor

from flux.image_io.request import ImageInputs
from flux.parity.reference import (
    diffusers_encode,
    diffusers_redux,
    diffusers_velocity,
    max_error,
    siglip_processor,
    transformers_siglip,
)
from flux.text_encoder import TextFeatures

# of the largest latent; four steps of float32 rounding in random networks, seen: up to 7e-6
WITHIN = 2e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        patch.setattr("flux.loading.SigLIPConfig", lambda: TINY_SIGLIP)
        patch.setattr("flux.loading.ReduxConfig", lambda: TINY_REDUX)

        def model(name: str) -> Model:
            if name not in made:
                made[name] = Model(name, tmp_path_factory.mktemp(name), patch)
            return made[name]

        yield model


def compare(
    model: Model,
    theirs,
    pictures: ImageInputs,
    given: dict,
    conditioned=None,
    noise_given: bool = True,
    negative: TextFeatures | None = None,
    limit: float = WITHIN,
    **asked,
):
    """Latents after every step, and pictures, ours against those of one of diffusers' pipelines."""
    features, seen = model.features(), []
    words = dict(prompt_embeds=features.tokens) | (
        {"pooled_prompt_embeds": features.pooled} if model.flux1 else {}
    )
    if negative is not None:
        words["negative_prompt_embeds"] = negative.tokens.expand_as(features.tokens)
    if conditioned is not None:
        words |= conditioned
    if noise_given:
        given |= dict(latents=noise(model, SEEDS))
    else:
        given |= dict(generator=[torch.Generator().manual_seed(seed) for seed in SEEDS])
    expected = theirs(
        **words,
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=STEPS,
        **given,
        callback_on_step_end=lambda pipe, step, t, values: seen.append(values["latents"]) or {},
    ).images
    conditions = model.ours.condition(pictures, WIDTH, HEIGHT)
    steps = []
    latents = model.ours.sample(
        features,
        SEEDS,
        steps=STEPS,
        negative=negative,
        conditions=conditions,
        callback=lambda step, t, x: steps.append(x.clone()),
        **asked,
    )
    assert len(steps) == len(seen) and torch.equal(steps[-1], latents)
    assert max(max_error(a, grid(b, HEIGHT)) for a, b in zip(steps, seen, strict=True)) <= limit
    assert max(map(levels, model.ours.decode(latents), expected)) <= 1
    return conditions, latents


# ------------------------------------------------------------------------------ channels


def test_fill_equals_diffusers(models, monkeypatch):
    """diffusers makes the mask hard, so ours is made so here."""
    model = models("flux.1-fill-dev")
    theirs = model.variant("FluxFillPipeline", monkeypatch)
    picture, mask = photo(), soft_mask()
    pictures = ImageInputs((picture,), mask, mask_threshold=0.5)
    compare(
        model,
        theirs,
        pictures,
        dict(image=picture, mask_image=mask, guidance_scale=20.0),
        guidance=20.0,
    )


def test_control_equals_diffusers(models, monkeypatch):
    model = models("flux.1-canny-dev")
    theirs = model.variant("FluxControlPipeline", monkeypatch)
    given = dict(control_image=photo(), guidance_scale=20.0)
    compare(model, theirs, ImageInputs((photo(),)), given, guidance=20.0)


# ------------------------------------------------------------------------------ image tokens


def test_kontext_equals_diffusers(models, monkeypatch):
    model = models("flux.1-kontext-dev")
    theirs = model.variant("FluxKontextPipeline", monkeypatch)
    picture = photo(80, 96)
    given = dict(image=picture, guidance_scale=3.0, _auto_resize=False, max_area=WIDTH * HEIGHT)
    compare(model, theirs, ImageInputs((picture,), keep_input_size=True), given, guidance=3.0)


@pytest.mark.parametrize("count", [1, 2])
def test_flux2_references_equal_diffusers(models, monkeypatch, count):
    model = models("flux.2-dev")
    theirs = model.variant("Flux2Pipeline", monkeypatch)
    references = [photo(80, 97, seed=1), photo(150, 70, seed=2)][:count]
    given = dict(image=references, guidance_scale=3.0)
    compare(
        model, theirs, ImageInputs(tuple(references), reference_limit=1024), given, guidance=3.0
    )


@pytest.mark.parametrize("name", ["flux.2-klein-4b", "flux.2-klein-base-4b"])
def test_klein_references_equal_diffusers(models, monkeypatch, name):
    """With classifier-free guidance, both passes see the references."""
    model = models(name)
    theirs = model.variant("Flux2KleinPipeline", monkeypatch)
    references = [photo(80, 97, seed=1), photo(150, 70, seed=2)]
    cfg = dict(guidance=3.0, negative=model.features(2, rows=1)) if model.spec.cfg else {}
    given = dict(image=references, guidance_scale=cfg.get("guidance", 1.0))
    compare(model, theirs, ImageInputs(tuple(references), reference_limit=1024), given, **cfg)


def test_klein_kv_equals_diffusers(models, monkeypatch):
    """diffusers computes references within the first step: another order of float32 sums."""
    model = models("flux.2-klein-9b-kv")
    theirs = model.variant("Flux2KleinKVPipeline", monkeypatch)
    references = [photo(80, 97, seed=1), photo(150, 70, seed=2)]
    compare(
        model, theirs, ImageInputs(tuple(references), reference_limit=1024), dict(image=references)
    )


# ------------------------------------------------------------------------------ text tokens


def embedded_by_diffusers(model: Model, references: list[Image.Image]) -> Tensor:
    """Run FluxPriorReduxPipeline's two networks: (images, T', D). Its sum needs full widths."""
    import diffusers

    siglip, redux = transformers_siglip(TINY_SIGLIP), diffusers_redux(TINY_REDUX)
    missing, unexpected = siglip.load_state_dict(model.siglip.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("head.") for name in missing)
    redux.load_state_dict(model.redux.state_dict())
    prior = diffusers.FluxPriorReduxPipeline(
        siglip, siglip_processor(TINY_SIGLIP.image_size), redux
    )
    with torch.no_grad():
        return prior.image_embedder(prior.encode_image(references, "cpu", 1)).image_embeds


@pytest.mark.parametrize("weights", [None, (0.7, 0.4)])
def test_redux_equals_diffusers(models, monkeypatch, weights):
    model = models("flux.1-redux-dev")
    references = [photo(80, 97, seed=1), photo(150, 70, seed=2)][: len(weights or [1])]
    added = torch.einsum(
        "n,ntd->td", torch.tensor(weights or [1.0]), embedded_by_diffusers(model, references)
    )[None]
    pictures = ImageInputs(tuple(references), image_weights=weights)
    assert max_error(model.ours.condition(pictures).text, added) <= 2e-6

    features = model.features()
    tokens = torch.cat([features.tokens, added.expand(len(SEEDS), -1, -1)], dim=1)
    given, words = dict(guidance_scale=3.0), dict(prompt_embeds=tokens)
    compare(model, model.theirs, pictures, given, words, guidance=3.0)


# ------------------------------------------------------------------------------ a start


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image_equals_diffusers(models, monkeypatch, strength):
    model = models("flux.1-dev")
    theirs = model.variant("FluxImg2ImgPipeline", monkeypatch)
    given = dict(image=photo(), strength=strength, guidance_scale=3.0)
    compare(
        model,
        theirs,
        ImageInputs((photo(),), strength=strength),
        given,
        noise_given=False,
        guidance=3.0,
    )


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_equals_diffusers(models, monkeypatch, strength):
    model = models("flux.1-dev")
    theirs = model.variant("FluxInpaintPipeline", monkeypatch)
    given = dict(image=photo(), mask_image=soft_mask(), strength=strength, guidance_scale=3.0)
    compare(
        model,
        theirs,
        ImageInputs((photo(),), soft_mask(), strength=strength),
        given,
        noise_given=False,
        guidance=3.0,
    )


@pytest.mark.parametrize("name", ["flux.2-klein-4b", "flux.2-klein-base-4b"])
def test_klein_inpainting_equals_diffusers(models, monkeypatch, name):
    model = models(name)
    theirs = model.variant("Flux2KleinInpaintPipeline", monkeypatch)
    other = photo(96, 80, seed=3)
    cfg = dict(guidance=3.0, negative=model.features(2, rows=1)) if model.spec.cfg else {}
    given = dict(
        image=photo(),
        mask_image=soft_mask(),
        image_reference=other,
        strength=0.6,
        guidance_scale=cfg.get("guidance", 1.0),
    )
    pictures = ImageInputs((photo(), other), soft_mask(), strength=0.6, reference_limit=1024)
    compare(model, theirs, pictures, given, noise_given=False, **cfg)


# ------------------------------------------------------------------------------ beyond diffusers


def test_kontext_with_several_references_equals_diffusers_networks(models):
    """diffusers' pipeline takes one. Its transformer, called for a step, takes several."""
    model = models("flux.1-kontext-dev")
    references, sizes = (photo(80, 96, seed=1), photo(64, 80, seed=2)), ((6, 5), (5, 4))
    tokens, ids, left = (
        [noise(model, SEEDS)],
        [[0, row, column] for row in range(4) for column in range(6)],
        0,
    )
    for picture, (h, w) in zip(references, sizes, strict=True):
        pixels = torch.from_numpy(np.asarray(picture) / 127.5 - 1).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            latents = diffusers_encode(model.theirs.vae, pixels)
        tokens.append(latents.flatten(2).mT.expand(2, -1, -1))
        ids += [[1, row, left + column] for row in range(h) for column in range(w)]
        left += w
    features = model.features()
    velocity = diffusers_velocity(
        model.theirs.transformer,
        torch.cat(tokens, dim=1),
        torch.tensor(ids),
        features.tokens,
        torch.zeros(7, 3),
        torch.ones(2),
        torch.full((2,), 3.0),
        features.pooled,
    )
    expected = tokens[0] - velocity[:, : tokens[0].shape[1]]
    conditions = model.ours.condition(ImageInputs(references, keep_input_size=True), WIDTH, HEIGHT)
    ours = model.ours.sample(features, SEEDS, steps=1, guidance=3.0, conditions=conditions)
    assert max_error(ours, grid(expected, HEIGHT)) <= WITHIN


@pytest.mark.parametrize("count", [2, 3])
def test_images_of_redux_share_one(models, count):
    """Without weights: the mean of diffusers' tokens of each alone (diffusers itself sums them)."""
    model = models("flux.1-redux-dev")
    references = [photo(80, 97, seed=1), photo(150, 70, seed=2), photo(64, 64, seed=3)][:count]
    alone = [embedded_by_diffusers(model, [picture]).double() for picture in references]
    assert (
        max_error(
            model.ours.condition(ImageInputs(tuple(references))).text.double(), sum(alone) / count
        )
        <= 2e-6
    )

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

# Relative to the largest latent. Seen: up to 7e-6 of float32 rounding in four steps.
WITHIN = 2e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    built = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        patch.setattr("flux.loading.SigLIPConfig", lambda: TINY_SIGLIP)
        patch.setattr("flux.loading.ReduxConfig", lambda: TINY_REDUX)

        def model(name: str) -> Model:
            if name not in built:
                built[name] = Model(name, tmp_path_factory.mktemp(name), patch)
            return built[name]

        yield model


def compare(
    model: Model,
    theirs,
    images: ImageInputs,
    arguments: dict,
    prompt_arguments=None,
    pass_noise: bool = True,
    negative: TextFeatures | None = None,
    limit: float = WITHIN,
    **options,
):
    """Compare latents after every step, and images, with those of a pipeline of diffusers."""
    features, their_steps = model.features(), []
    words = dict(prompt_embeds=features.tokens) | (
        {"pooled_prompt_embeds": features.pooled} if model.flux1 else {}
    )
    if negative is not None:
        words["negative_prompt_embeds"] = negative.tokens.expand_as(features.tokens)
    if prompt_arguments is not None:
        words |= prompt_arguments
    if pass_noise:
        arguments |= dict(latents=noise(model, SEEDS))
    else:
        arguments |= dict(generator=[torch.Generator().manual_seed(seed) for seed in SEEDS])
    expected = theirs(
        **words,
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=STEPS,
        **arguments,
        callback_on_step_end=lambda pipe, step, t, values: (
            their_steps.append(values["latents"]) or {}
        ),
    ).images
    conditions = model.ours.condition(images, WIDTH, HEIGHT)
    steps = []
    latents = model.ours.sample(
        features,
        SEEDS,
        steps=STEPS,
        negative=negative,
        conditions=conditions,
        callback=lambda step, t, x: steps.append(x.clone()),
        **options,
    )
    assert len(steps) == len(their_steps) and torch.equal(steps[-1], latents)
    for x, y in zip(steps, their_steps, strict=True):
        assert max_error(x, grid(y, HEIGHT)) <= limit
    assert max(map(levels, model.ours.decode(latents), expected)) <= 1
    return conditions, latents


# ------------------------------------------------------------------ channels


def test_fill_equals_diffusers(models, monkeypatch):
    """diffusers binarizes the mask, so this test does too."""
    model = models("flux.1-fill-dev")
    theirs = model.variant("FluxFillPipeline", monkeypatch)
    image, mask = photo(), soft_mask()
    images = ImageInputs((image,), mask, mask_threshold=0.5)
    compare(
        model,
        theirs,
        images,
        dict(image=image, mask_image=mask, guidance_scale=20.0),
        guidance=20.0,
    )


def test_control_equals_diffusers(models, monkeypatch):
    model = models("flux.1-canny-dev")
    theirs = model.variant("FluxControlPipeline", monkeypatch)
    arguments = dict(control_image=photo(), guidance_scale=20.0)
    compare(model, theirs, ImageInputs((photo(),)), arguments, guidance=20.0)


# ------------------------------------------------------------------ image tokens


def test_kontext_equals_diffusers(models, monkeypatch):
    model = models("flux.1-kontext-dev")
    theirs = model.variant("FluxKontextPipeline", monkeypatch)
    image = photo(80, 96)
    arguments = dict(image=image, guidance_scale=3.0, _auto_resize=False, max_area=WIDTH * HEIGHT)
    compare(model, theirs, ImageInputs((image,), keep_input_size=True), arguments, guidance=3.0)


@pytest.mark.parametrize("count", [1, 2])
def test_flux2_references_equal_diffusers(models, monkeypatch, count):
    model = models("flux.2-dev")
    theirs = model.variant("Flux2Pipeline", monkeypatch)
    references = [photo(80, 97, seed=1), photo(150, 70, seed=2)][:count]
    arguments = dict(image=references, guidance_scale=3.0)
    compare(
        model, theirs, ImageInputs(tuple(references), reference_limit=1024), arguments, guidance=3.0
    )


@pytest.mark.parametrize("name", ["flux.2-klein-4b", "flux.2-klein-base-4b"])
def test_klein_references_equal_diffusers(models, monkeypatch, name):
    """With classifier-free guidance, both passes have the references."""
    model = models(name)
    theirs = model.variant("Flux2KleinPipeline", monkeypatch)
    references = [photo(80, 97, seed=1), photo(150, 70, seed=2)]
    cfg = dict(guidance=3.0, negative=model.features(2, rows=1)) if model.spec.cfg else {}
    arguments = dict(image=references, guidance_scale=cfg.get("guidance", 1.0))
    compare(model, theirs, ImageInputs(tuple(references), reference_limit=1024), arguments, **cfg)


def test_klein_kv_equals_diffusers(models, monkeypatch):
    """diffusers computes references in the first step: float32 sums in another order."""
    model = models("flux.2-klein-9b-kv")
    theirs = model.variant("Flux2KleinKVPipeline", monkeypatch)
    references = [photo(80, 97, seed=1), photo(150, 70, seed=2)]
    compare(
        model, theirs, ImageInputs(tuple(references), reference_limit=1024), dict(image=references)
    )


# ------------------------------------------------------------------ text tokens


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
    images = ImageInputs(tuple(references), image_weights=weights)
    assert max_error(model.ours.condition(images).text, added) <= 2e-6

    features = model.features()
    tokens = torch.cat([features.tokens, added.expand(len(SEEDS), -1, -1)], dim=1)
    arguments, words = dict(guidance_scale=3.0), dict(prompt_embeds=tokens)
    compare(model, model.theirs, images, arguments, words, guidance=3.0)


# ------------------------------------------------------------------ image to image


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image_equals_diffusers(models, monkeypatch, strength):
    model = models("flux.1-dev")
    theirs = model.variant("FluxImg2ImgPipeline", monkeypatch)
    arguments = dict(image=photo(), strength=strength, guidance_scale=3.0)
    compare(
        model,
        theirs,
        ImageInputs((photo(),), strength=strength),
        arguments,
        pass_noise=False,
        guidance=3.0,
    )


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_equals_diffusers(models, monkeypatch, strength):
    model = models("flux.1-dev")
    theirs = model.variant("FluxInpaintPipeline", monkeypatch)
    arguments = dict(image=photo(), mask_image=soft_mask(), strength=strength, guidance_scale=3.0)
    compare(
        model,
        theirs,
        ImageInputs((photo(),), soft_mask(), strength=strength),
        arguments,
        pass_noise=False,
        guidance=3.0,
    )


@pytest.mark.parametrize("name", ["flux.2-klein-4b", "flux.2-klein-base-4b"])
def test_klein_inpainting_equals_diffusers(models, monkeypatch, name):
    model = models(name)
    theirs = model.variant("Flux2KleinInpaintPipeline", monkeypatch)
    other = photo(96, 80, seed=3)
    cfg = dict(guidance=3.0, negative=model.features(2, rows=1)) if model.spec.cfg else {}
    arguments = dict(
        image=photo(),
        mask_image=soft_mask(),
        image_reference=other,
        strength=0.6,
        guidance_scale=cfg.get("guidance", 1.0),
    )
    images = ImageInputs((photo(), other), soft_mask(), strength=0.6, reference_limit=1024)
    compare(model, theirs, images, arguments, pass_noise=False, **cfg)


# ------------------------------------------------------------------ beyond diffusers


def test_kontext_with_several_references_equals_diffusers_networks(models):
    """diffusers' pipeline takes one reference. Its transformer takes several."""
    model = models("flux.1-kontext-dev")
    references, sizes = (photo(80, 96, seed=1), photo(64, 80, seed=2)), ((6, 5), (5, 4))
    tokens, ids, left = (
        [noise(model, SEEDS)],
        [[0, row, column] for row in range(4) for column in range(6)],
        0,
    )
    for image, (h, w) in zip(references, sizes, strict=True):
        pixels = torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None].float()
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
def test_redux_images_without_weights_are_averaged(models, count):
    """The mean of diffusers' tokens of each image. diffusers itself sums them."""
    model = models("flux.1-redux-dev")
    references = [photo(80, 97, seed=1), photo(150, 70, seed=2), photo(64, 64, seed=3)][:count]
    alone = [embedded_by_diffusers(model, [image]).double() for image in references]
    text = model.ours.condition(ImageInputs(tuple(references))).text.double()
    assert max_error(text, sum(alone) / count) <= 2e-6

"""FLUX 3's pipeline against diffusers', live: from files to images, tiny random weights.

diffusers takes one prompt a call, and keeps what it computed in the state that a call returns.
"""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.drawn_images import photo
from support.flux3_model import BASE, DISTILLED, Flux3Model

import flux
from flux.parity.reference import max_error

PROMPT, STEPS, SEED = "a red cube left of a blue ball", 4, 42
pytestmark = pytest.mark.filterwarnings("ignore:.* was distilled for")
either_model = pytest.mark.parametrize("name", [BASE, DISTILLED])
DTYPES = [torch.float32, torch.bfloat16]
REFERENCES = {
    "text": (),
    "one reference": (photo(70, 45, seed=5),),
    "two references": (photo(80, 64, seed=6), photo(33, 40, seed=7)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        yield {
            (name, dtype): Flux3Model(name, tmp_path_factory.mktemp("weights"), patch, dtype)
            for name in (BASE, DISTILLED)
            for dtype in DTYPES
        }


def by_diffusers(model: Flux3Model, images=(), **more):
    """Return the state of a run of diffusers' pipeline."""
    given = dict(image=list(images) if len(images) > 1 else images[0]) if images else {}
    return model.theirs(
        prompt=PROMPT,
        num_inference_steps=STEPS,
        text_encoder_out_layers=model.spec.text.model.layers,
        max_sequence_length=model.spec.text_length,
        generator=torch.Generator().manual_seed(SEED),
        **(given | (dict(height=48 + 16, width=80) if not images else {})),
        **more,
    )


def realign(network: torch.nn.Module) -> None:
    """Move weights off the mapped file, where a matrix begins anywhere, as diffusers does.

    On some CPUs the order of a float32 sum depends on where a matrix begins.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()


def size(images) -> dict:
    return {} if images else dict(width=80, height=64)


def inputs(images):
    return flux.ImageInputs(tuple(images)) if images else None


@either_model
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", REFERENCES)
def test_whole_run_equals_diffusers_with_its_numerics(models, name, dtype, kind):
    """Text features and latents to the bit; images byte for byte, and of the same size.

    References are encoded to rounding: diffusers' pixels have the channels last, which its
    convolutions and our 1x1 convolutions, its Linears, sum in other orders. Seen: 3e-6.
    """
    model, images = models[name, dtype], REFERENCES[kind]
    state = by_diffusers(model, images)
    pipe = model.load(numerics="diffusers", decode_dtype=torch.float32)
    pipe.transformer.set_transform(realign)
    assert torch.equal(pipe.encode(PROMPT).tokens, state.get("prompt_embeds"))
    latents, conditions = [], None
    if images:
        conditions = pipe.condition(inputs(images))
        assert torch.equal(conditions.reference_ids, state.get("image_cond_ids"))
        tokens = state.get("image_cond_hidden_states")
        assert max_error(conditions.references.to(dtype), tokens) <= (
            1e-5 if dtype == torch.float32 else 0.01
        )
        conditions = replace(conditions, references=tokens)
    (image,) = pipe(
        PROMPT,
        steps=STEPS,
        seed=SEED,
        images=conditions,
        callback=lambda step, t, x: latents.append(x.clone()),
        **size(images),
    )
    expected = state.get("latents")
    assert len(latents) == STEPS and expected.float().std() > 0.5
    assert latents[-1].dtype == dtype and torch.equal(latents[-1], expected)
    (theirs,) = state.get("images")
    assert image.size == theirs.size and np.asarray(theirs).std() > 30
    difference = np.asarray(image).astype(int) - np.asarray(theirs).astype(int)
    if dtype == torch.float32:
        assert not difference.any()
    else:  # diffusers denormalises the latents in bfloat16, before it decodes in float32
        assert np.abs(difference).max() <= 8


def test_image_of_a_bfloat16_decoder_equals_diffusers(models):
    """All networks in bfloat16, as both load them if asked for it: byte for byte."""
    model = models[DISTILLED, torch.bfloat16]
    vae, pipe = model.theirs.vae, model.load(numerics="diffusers")
    model.theirs.update_components(vae=deepcopy(vae).bfloat16())
    (theirs,) = by_diffusers(model).get("images")
    model.theirs.update_components(vae=vae)
    (ours,) = pipe(PROMPT, steps=STEPS, seed=SEED, **size(()))
    assert ours.tobytes() == theirs.tobytes() and np.asarray(theirs).std() > 30


@pytest.mark.slow
@either_model
@pytest.mark.parametrize("kind", REFERENCES)
def test_exact_float32_run_is_close_to_diffusers(models, name, kind):
    """From the noise of diffusers. Seen: 1e-6 to 4e-6."""
    model, images = models[name, torch.float32], REFERENCES[kind]
    state = by_diffusers(model, images)
    numerics = flux.transformer.Numerics(noise="grid")
    pipe = model.load(numerics=numerics)
    conditions = pipe.condition(inputs(images)) if images else None
    latents = pipe.sample(
        pipe.encode(PROMPT), [SEED], steps=STEPS, conditions=conditions, **size(images)
    )
    assert max_error(latents, state.get("latents")) <= 2e-5
    (image,) = pipe(PROMPT, steps=STEPS, seed=SEED, images=inputs(images), **size(images))
    (theirs,) = state.get("images")
    difference = np.asarray(image).astype(int) - np.asarray(theirs).astype(int)
    assert image.size == theirs.size and np.abs(difference).max() <= 1


def test_negative_prompt_equals_diffusers(models):
    """With another length than the prompt's, and another scale."""
    from diffusers import ClassifierFreeGuidance

    model, negative = models[BASE, torch.float32], "a blurred photo " * 9
    usual = model.theirs.guider
    model.theirs.update_components(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    state = by_diffusers(model, negative_prompt=negative)
    model.theirs.update_components(guider=usual)
    assert state.get("negative_prompt_embeds").shape[1] > state.get("prompt_embeds").shape[1]
    pipe, latents = model.load(numerics="diffusers"), []
    pipe.transformer.set_transform(realign)
    pipe(
        PROMPT,
        steps=STEPS,
        seed=SEED,
        guidance=2.0,
        negative_prompt=negative,
        callback=lambda step, t, x: latents.append(x.clone()),
        **size(()),
    )
    assert torch.equal(latents[-1], state.get("latents"))


def test_default_noise_is_that_of_the_reference(models):
    """Literals: the first values of seed 42, drawn token by token, not channel by channel."""
    from flux import sampling

    drawn = sampling.noise([42, 43], 128, 3, 5, spatial=False, tokens=True)
    assert drawn[0, :3, 0, 0].tolist() == pytest.approx([1.92692, 1.48728, 0.90072], abs=1e-5)
    grid = sampling.noise([42], 128, 64, 64, spatial=False)
    assert grid[0, :3, 0, 0].tolist() == pytest.approx([1.92692, -0.51969, -0.79778], abs=1e-5)
    expected = torch.randn((15, 128), generator=torch.Generator().manual_seed(43))
    assert torch.equal(drawn[1].flatten(1).T, expected)


@pytest.mark.slow
@either_model
def test_prompts_of_several_lengths_make_the_images_of_each_alone(models, name):
    pipe = models[name, torch.float32].load()
    prompts = [PROMPT, "a house " * 14, "a cat"]
    together = pipe(prompts, 64, 64, steps=2, seed=3)
    for number, prompt in enumerate(prompts):
        (alone,) = pipe(prompt, 64, 64, steps=2, seed=3 + number)
        difference = np.asarray(alone).astype(int) - np.asarray(together[number]).astype(int)
        assert np.abs(difference).max() <= 1
    with pytest.raises(flux.UserError, match="^prompts: have from 80 to 160 tokens"):
        pipe.encode(prompts)


@pytest.mark.slow
@either_model
@pytest.mark.parametrize("offload", ["model", "block"])
def test_offload_gives_the_same_images(models, name, offload):
    model, images = models[name, torch.float32], REFERENCES["one reference"]
    expected = model.load()(PROMPT, steps=2, images=inputs(images))
    found = model.load(offload=offload)(PROMPT, steps=2, images=inputs(images))
    assert [x.tobytes() for x in found] == [x.tobytes() for x in expected]


@either_model
def test_streams_are_computed_once_in_a_base_model_and_each_step_in_a_flow_map(models, name):
    pipe, runs = models[name, torch.float32].load(), []
    network = pipe.transformer()
    network.txt_in.register_forward_hook(lambda *_: runs.append("text"))
    network.emb_in["image_cond"].register_forward_hook(lambda *_: runs.append("references"))
    images = inputs(REFERENCES["two references"])
    pipe(PROMPT, steps=3, images=images, num_images=2)
    expected = ["text", "references"] * (2 if name == BASE else 3)  # base: with CFG's pass
    assert runs == expected


@pytest.mark.slow
@either_model
def test_image_to_image_and_inpainting_keep_what_they_should(models, name):
    pipe, image = models[name, torch.float32].load(), photo(64, 64, seed=3)
    (same,) = pipe(PROMPT, images=flux.ImageInputs((image,), strength=0.02))
    whole = pipe(PROMPT, images=flux.ImageInputs((image,), strength=0.9))[0]
    assert whole.size == same.size == image.size and whole.tobytes() != same.tobytes()
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    (half,) = pipe(PROMPT, steps=2, images=flux.ImageInputs((image,), mask))
    kept, before = np.asarray(half)[:, 40:], np.asarray(image)[:, 40:]
    assert np.array_equal(kept, before)
    assert not np.array_equal(np.asarray(half)[:, :24], np.asarray(image)[:, :24])


def test_seams_of_sampling_work_or_say_why_not(models):
    """Solvers and the velocity of a base model; a flow map knows Euler steps alone."""
    base, distilled = (models[name, torch.float32].load() for name in (BASE, DISTILLED))
    features = base.encode(PROMPT)
    euler, heun = (
        base.sample(features, [SEED], 64, 64, 2, guidance=1.0, solver=solver)
        for solver in ("euler", "heun")
    )
    assert euler.shape == heun.shape and max_error(euler, heun) > 1e-3
    for solver in ("heun", "dpmpp_2m"):
        with pytest.raises(flux.UserError, match='^solver: must be "euler" for flux.3-image-klein'):
            distilled.sample(features, [SEED], 64, 64, 2, solver=solver)
    with pytest.raises(flux.UserError, match="^negative: flux.3-image-klein takes none"):
        distilled.sample(features, [SEED], 64, 64, 2, negative=features)
    with pytest.raises(flux.UserError, match="^residuals: flux.3-image-klein-base takes none"):
        base.sample(features, [SEED], 64, 64, 2, residuals=lambda *_: None)
    with pytest.raises(flux.UserError, match="^features: .* takes no `mask`"):
        base.sample(features._replace(mask=torch.ones(96, 96).bool()), [SEED], 64, 64, 2)
    empty = features._replace(tokens=features.tokens[:, :0])
    flat = features._replace(ids=torch.zeros(80, 3))
    for changed, said in ((empty, "have no tokens"), (flat, r"`ids` must be \(80, 4\)")):
        with pytest.raises(flux.UserError, match=f"^features: {said}"):
            base.sample(changed, [SEED], 64, 64, 2)
    conditions = base.condition(inputs(REFERENCES["one reference"]))
    tokens, ids = conditions.references, conditions.reference_ids
    for changed in (
        dict(reference_ids=None),
        dict(references=None),
        dict(reference_ids=ids[1:]),
        dict(reference_ids=ids[:, 1:]),
        dict(references=tokens[..., 1:]),
    ):
        with pytest.raises(flux.UserError, match="^conditions: `references` must be"):
            base.sample(features, [SEED], steps=2, conditions=replace(conditions, **changed))
    x, network = torch.randn(1, 16, 4, 4), base.transformer()
    velocity = base.velocity(features, 64, 64, guidance=1.0)(x, 0.3)
    ids, text_ids = flux.sampling.flux3_image_ids(4, 4), flux.sampling.text_ids(80, 4)
    with torch.no_grad():
        tokens = x.flatten(2).mT
        expected = network(tokens, ids, features.tokens, text_ids, torch.tensor([0.3]))
    assert torch.equal(velocity.flatten(2).mT, expected)
    seen = []
    with base.watch(lambda tap, tensor: seen.append(str(tap)), only=["*single_blocks.0/out"]):
        base.sample(features, [SEED], 64, 64, 2)
    branches = ("conditional", "unconditional")
    assert seen == [f"step.00{s}/{b}/single_blocks.0/out" for s in (1, 2) for b in branches]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4"])
def test_quantizing_moves_the_image_little(models, scheme):
    model = models[DISTILLED, torch.float32]
    exact, rounded = (
        pipe.sample(pipe.encode(PROMPT), [SEED], 64, 64, 2)
        for pipe in (model.load(), model.load(quantize=scheme))
    )
    assert 1e-4 < (exact - rounded).norm() / exact.norm() < {"int4": 0.5}.get(scheme, 0.2)

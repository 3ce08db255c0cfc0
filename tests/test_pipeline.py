"""flux.pipeline against diffusers' pipelines, live: from files to images, tiny random weights.

Ours reads repositories from a folder, in the released layouts. The reference's text encoders have
the parts that the released ones have and ours ignores: more layers, a head, a vision encoder.
"""

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from support.conditioned_model import grid, levels, noise
from support.tiny_repositories import home, write_tokenizers
from support.tokenizer_files import MISTRAL_TEMPLATE
from torch import Tensor, nn

import flux
from flux.configs import MODELS, ModelSpec
from flux.errors import NonFiniteError, UserError
from flux.parity.reference import (
    diffusers_pipeline,
    diffusers_text,
    max_error,
    networks,
    randomise,
    tiny_models,
    write_weights,
)
from flux.pipeline import Pipeline
from flux.text_encoder import TextFeatures
from flux.transformer import Flux

WIDTH, HEIGHT, STEPS, SEEDS = 96, 64, 4, (5, 6)
PROMPTS = ["a photo of a cat", "an oil painting of a naïve café"]
RUNS = {  # each kind of guidance
    "flux.1-dev": dict(guidance=3.0),
    "flux.1-dev with cfg": dict(guidance=2.0, true_cfg_scale=2.5),
    "flux.1-schnell": {},
    "flux.2-dev": dict(guidance=3.0),
    "flux.2-klein-4b": {},
    "flux.2-klein-base-4b": dict(guidance=3.0),
}
NAMES = [name for name in RUNS if " " not in name]
every_run = pytest.mark.parametrize("run", RUNS)
every_model = pytest.mark.parametrize("name", NAMES)
either_family = pytest.mark.parametrize("name", ["flux.1-dev", "flux.2-klein-4b"])
pytestmark = pytest.mark.filterwarnings("ignore:.* was distilled for")
FEW = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(repr=False)
class Model:
    """A tiny row of the table, its weights and folder, and both pipelines in float32."""

    spec: ModelSpec
    parts: dict[str, nn.Module]
    folder: Path
    ours: Pipeline
    theirs: object

    @property
    def flux1(self) -> bool:
        return self.spec.transformer.vector_dim is not None

    @property
    def home(self) -> Path:
        return home(self.folder, self.spec.name)

    def load(self, **options) -> Pipeline:
        options = dict(weights=self.folder, device="cpu", dtype=torch.float32) | options
        return flux.load(self.spec.name, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("weights"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        for name in NAMES:
            spec = tiny_models(write_tokenizers(home(folder, name), name))[name]
            patch.setitem(MODELS, name, spec)
            parts = networks(spec)
            text = diffusers_text(spec, parts, home(folder, name), MISTRAL_TEMPLATE)
            files = parts | ({"model": text["text_encoder"]} if "model" in parts else {})
            write_weights(home(folder, name), spec, files)
            ours = flux.load(name, weights=folder, device="cpu", dtype=torch.float32)
            out[name] = Model(spec, parts, folder, ours, diffusers_pipeline(spec, parts, text))
        yield out


def random_features(model: Model, rows: int, seed: int) -> TextFeatures:
    """Return features of seven tokens. Sampling does not depend on the length of a prompt."""
    config, generator = model.spec.transformer, torch.Generator().manual_seed(seed)
    pooled = torch.randn(rows, config.vector_dim, generator=generator) if model.flux1 else None
    return TextFeatures(torch.randn(rows, 7, config.context_dim, generator=generator), pooled)


def by_diffusers(
    theirs,
    model: Model,
    features: TextFeatures,
    negative: TextFeatures | None,
    width: int = WIDTH,
    height: int = HEIGHT,
    steps: int = STEPS,
    seeds=SEEDS,
    guidance: float = 1.0,
    true_cfg_scale: float = 1.0,
    output: str = "pil",
) -> tuple[list[Tensor], list[Image.Image]]:
    """Return diffusers' latents after every step, and its images."""
    latents_seen, dtype = [], theirs.transformer.dtype
    features = features.to("cpu", dtype)
    arguments = dict(prompt_embeds=features.tokens)
    if negative is not None:
        # copies, as `encode_prompt` repeats them: a product of strided rows may round otherwise
        arguments["negative_prompt_embeds"] = (
            negative.tokens.to(dtype).expand_as(features.tokens).contiguous()
        )
    if model.flux1:
        arguments |= dict(pooled_prompt_embeds=features.pooled, true_cfg_scale=true_cfg_scale)
        if negative is not None:
            arguments["negative_pooled_prompt_embeds"] = (
                negative.pooled.to(dtype).expand_as(features.pooled).contiguous()
            )
    images = theirs(
        **arguments,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type=output,
        latents=noise(model, seeds, width, height).to(dtype),
        callback_on_step_end=lambda pipe, step, t, values: (
            latents_seen.append(values["latents"]) or {}
        ),
    ).images
    return [grid(x, height) for x in latents_seen], images


def by_us(
    ours: Pipeline, features: TextFeatures, negative: TextFeatures | None, seeds=SEEDS, **options
):
    """Return our latents and times after every step, the final latents, and the images."""
    states, times = [], []
    latents = ours.sample(
        features,
        seeds,
        WIDTH,
        HEIGHT,
        STEPS,
        negative=negative,
        callback=lambda step, t, x: (states.append(x.clone()), times.append((step, t))),
        **options,
    )
    return states, times, latents, ours.decode(latents)


def setting(
    models: dict[str, Model], run: str
) -> tuple[Model, dict, TextFeatures, TextFeatures | None]:
    model, request = models[run.split()[0]], RUNS[run]
    negative = None
    if model.spec.cfg or "true_cfg_scale" in request:
        negative = random_features(model, 1, seed=2)
    return model, request, random_features(model, 2, seed=1), negative


def copy_weights(*modules: nn.Module) -> None:
    """Copy mapped weights to new memory.

    On a CPU, a product of one row sums in an order that depends on the weights' alignment.
    """
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()


# ------------------------------------------------------------------ parity


@every_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_whole_run_equals_diffusers_with_its_numerics(models, run, dtype):
    """Latents after every step to the bit, and the image of a single run byte for byte.

    Images are decoded one at a time, so that an image does not depend on its batch. diffusers
    decodes a batch as one, where convolutions sum in another order.
    """
    model, request, features, negative = setting(models, run)
    theirs = diffusers_pipeline(model.spec, model.parts).to(dtype)
    expected, _ = by_diffusers(theirs, model, features, negative, **request)
    ours = model.load(dtype=dtype, numerics="diffusers")
    copy_weights(ours.transformer(), ours.autoencoder())
    states, times, _, _ = by_us(ours, features, negative, **request)
    assert [t for _, t in times] == theirs.scheduler.sigmas[1:].tolist()
    assert len(states) == len(expected) == STEPS and expected[-1].float().std() > 0.5
    for x, y in zip(states, expected, strict=True):
        assert x.dtype == dtype and torch.equal(x, y)

    one = features.rows([0])
    _, (image,) = by_diffusers(theirs, model, one, negative, seeds=SEEDS[:1], **request)
    (our_image,) = by_us(ours, one, negative, seeds=SEEDS[:1], **request)[3]
    assert our_image.tobytes() == image.tobytes() and np.asarray(image).std() > 30


@every_run
def test_exact_float32_run_is_close_to_diffusers(models, run):
    """The times differ by a rounding, which moves FLUX.1's latents by up to 2.4e-6."""
    model, request, features, negative = setting(models, run)
    expected, images = by_diffusers(model.theirs, model, features, negative, **request)
    states, _, latents, our_images = by_us(model.ours, features, negative, **request)
    assert latents.equal(states[-1])
    assert max(max_error(x, y) for x, y in zip(states, expected, strict=True)) <= 5e-6
    assert max(map(levels, our_images, images)) <= 1


@every_model
def test_noise_equals_diffusers(models, name):
    model = models[name]
    channels = model.theirs.transformer.config.in_channels // 4
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs, _ = model.theirs.prepare_latents(
        2, channels, HEIGHT, WIDTH, torch.float32, "cpu", generators
    )
    drawn = noise(model, SEEDS)
    assert torch.equal(drawn if model.flux1 else rearrange(drawn, "b c h w -> b (h w) c"), theirs)


@every_model
def test_prompt_to_image_equals_diffusers(models, name):
    """From prompts and seeds alone. Seen: T5's features 2e-7 apart, other features equal."""
    model, request = models[name], RUNS[name]
    limits = dict(max_sequence_length=model.spec.text_length)
    if not model.flux1:
        limits["text_encoder_out_layers"] = model.spec.text.model.layers
    words = dict(prompt=PROMPTS) | ({"prompt_2": None} if model.flux1 else {})
    with torch.no_grad():
        tokens, pooled, *_ = model.theirs.encode_prompt(**words, **limits)
    features = model.ours.encode(PROMPTS)
    assert max_error(features.tokens, tokens) <= 1e-6 and tokens.std() > 0.5
    assert features.pooled is None or max_error(features.pooled, pooled) <= 1e-6
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = model.theirs(
        **words,
        **limits,
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=STEPS,
        generator=generators,
        guidance_scale=request.get("guidance", 1.0),
    ).images
    ours = model.ours(PROMPTS, WIDTH, HEIGHT, STEPS, request.get("guidance"), seed=SEEDS[0])
    assert max(map(levels, ours, images)) <= 1 and levels(*images) > 30


@either_family
@FEW
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    steps=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_size_equals_diffusers(models, name, size, steps, seed):
    """Some times differ by a rounding, 6e-8: 6e-5 radians in 1000 t. Seen: 0 to 7e-6."""
    model, (width, height) = models[name], (16 * n for n in size)
    guidance = {"guidance": 3.0} if model.flux1 else {}
    request = dict(width=width, height=height, steps=steps, seeds=[seed], **guidance)
    features = random_features(model, 1, seed=1)
    expected, _ = by_diffusers(model.theirs, model, features, None, **request, output="latent")
    latents = model.ours.sample(features, **request)
    assert latents.shape[2:] == (height // 16, width // 16)
    assert max_error(latents, expected[-1]) <= 2e-5


# ------------------------------------------------------------------ properties


@either_family
@FEW
@given(seed=st.integers(0, 2**32), count=st.integers(2, 4))
def test_image_of_a_batch_equals_the_image_of_its_seed_alone(models, name, seed, count):
    model = models[name]
    features = random_features(model, count, seed=3)
    batch = model.ours.sample(features, range(seed, seed + count), 64, 64, 2)
    for k in range(count):
        one = TextFeatures(*(None if x is None else x[k : k + 1] for x in features))
        assert max_error(batch[k : k + 1], model.ours.sample(one, [seed + k], 64, 64, 2)) <= 1e-5
    assert max_error(batch[:1], batch[1:2]) > 0.1


@either_family
def test_images_of_several_prompts_keep_the_order(models, name):
    pipe = models[name].ours
    images = pipe(PROMPTS, 64, 64, 2, seed=3, num_images=2)
    alone = [
        pipe(prompt, 64, 64, 2, seed=3 + k)
        for k, prompt in enumerate(np.repeat(PROMPTS, 2).tolist())
    ]
    assert len(images) == 4
    assert all(levels(a, b) <= 1 for a, (b,) in zip(images, alone, strict=True))
    assert all(levels(a, b) > 10 for k, a in enumerate(images) for b in images[:k])


@pytest.mark.parametrize("name", ["flux.1-dev", "flux.2-klein-4b", "flux.2-klein-base-4b"])
def test_stages_one_by_one_equal_a_call(models, name):
    pipe = models[name].ours
    negative = pipe.encode(["blurred"]) if pipe.spec.cfg else None
    latents = pipe.sample(pipe.encode(PROMPTS), [7, 8], WIDTH, HEIGHT, 2, negative=negative)
    called = pipe(
        PROMPTS, WIDTH, HEIGHT, 2, seed=7, negative_prompt="blurred" if pipe.spec.cfg else None
    )
    decoded = pipe.decode(latents)
    assert [image.tobytes() for image in called] == [image.tobytes() for image in decoded]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["flux.1-tiny", "flux.2-tiny"])
def test_features_of_one_prompt_serve_all_seeds_to_the_byte(name, dtype):
    """FLUX.1's layers have biases, which are rounded apart if their input is strided."""
    pipe = flux.load(name, device="cpu", dtype=dtype)
    cfg = dict(true_cfg_scale=2.0) if pipe.spec.flux1 else dict(guidance=2.0)
    options = dict(width=64, height=64, steps=1, **cfg)
    features, negative = pipe.encode("a red circle"), pipe.encode("a blue ring")
    latents = pipe.sample(features, [0, 1, 2, 3], negative=negative, **options)
    each = pipe.encode(["a red circle"] * 4), pipe.encode(["a blue ring"] * 4)
    assert torch.equal(latents, pipe.sample(each[0], [0, 1, 2, 3], negative=each[1], **options))
    images = pipe.decode(latents)
    called = pipe("a red circle", num_images=4, negative_prompt="a blue ring", **options)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in called]
    assert levels(images[0], images[1]) > 10


def test_wrong_number_of_prompts_raises(models):
    pipe = models["flux.1-dev"].ours
    features = pipe.encode(PROMPTS)
    for wrong in ([7], [7, 8, 9], []):
        with pytest.raises(UserError, match="^features: one prompt, or one for each of `seeds`"):
            pipe.sample(features, wrong, 64, 64, 1)
    with pytest.raises(UserError, match=r"^negative: .*got 2 prompts and 1 seeds"):
        pipe.sample(pipe.encode("x"), [7], 64, 64, 1, negative=features, true_cfg_scale=2.0)


def test_sample_without_negative_features_uses_the_empty_prompt(models):
    """As a call does: guidance is not skipped."""
    pipe = models["flux.2-klein-base-4b"].ours
    latents = pipe.sample(pipe.encode(PROMPTS[0]), [7], 64, 64, 2, guidance=3.0)
    assert (
        pipe.decode(latents)[0].tobytes()
        == pipe(PROMPTS[0], 64, 64, 2, guidance=3.0, seed=7)[0].tobytes()
    )
    dev = models["flux.1-dev"].ours
    latents = dev.sample(dev.encode(PROMPTS[0]), [7], 64, 64, 2, true_cfg_scale=2.0)
    assert (
        dev.decode(latents)[0].tobytes()
        == dev(PROMPTS[0], 64, 64, 2, true_cfg_scale=2.0, seed=7)[0].tobytes()
    )


def test_empty_prompts_and_non_finite_pixels_raise(models):
    pipe = models["flux.2-klein-4b"].ours
    with pytest.raises(UserError, match="prompts: empty"):
        pipe.encode([])
    assert pipe.sample(pipe.encode(PROMPTS[0]), [7], 64, None, 1).shape[2:] == (
        pipe.spec.size // 16,
        4,
    )
    for width, height in ((0, 64), (64, 0)):
        with pytest.raises(UserError, match=r"multiple of 16.*\(got 0\)"):
            pipe(PROMPTS[0], width, height, 2)
        with pytest.raises(UserError, match=r"multiple of 16.*\(got 0\)"):
            pipe.sample(pipe.encode(PROMPTS[0]), [7], width, height, 2)


def test_autoencoder_computes_without_tf32(models, monkeypatch):
    """cuDNN convolves float32 in TF32 by default. Elsewhere the setting stays as it was."""
    pipe, seen = models["flux.2-klein-4b"].ours, []

    def precisions() -> tuple[str, str]:
        cudnn, cublas = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        return cudnn.fp32_precision, cublas.fp32_precision

    def watched(self, x: Tensor) -> Tensor:
        seen.append(precisions())
        return x

    before = precisions()
    monkeypatch.setattr(type(pipe.autoencoder()), "decode", watched)
    monkeypatch.setattr(type(pipe.image_encoder()), "encode", watched)
    pipe._decode(torch.zeros(1, 16, 2, 2))
    pipe._encode_image(torch.zeros(1, 3, 32, 32))
    assert seen == 2 * [("ieee", "ieee")] and precisions() == before == ("tf32", "none")


def test_non_integer_argument_raises_with_its_name(models):
    pipe = models["flux.2-klein-4b"].ours
    for name, value, shown in (
        ("width", 64.0, "64.0"),
        ("steps", 2.5, "2.5"),
        ("seed", "seven", "'seven'"),
    ):
        request = dict(width=64, height=64, steps=2) | {name: value}
        message = f"{name}: must be a whole number (got {shown})"
        with pytest.raises(UserError, match=re.escape(message)):
            pipe(PROMPTS[0], **request)


def test_unsupported_dtype_raises():
    for dtype in ("bfloat16", torch.int8, torch.float8_e4m3fn):
        with pytest.raises(UserError, match="^dtype: .* Use torch.bfloat16 or torch.float32"):
            flux.load(dtype=dtype)


def test_guidance_of_one_skips_the_second_pass(models):
    """Where the passes would cancel. Elsewhere the scale of the second pass is the guidance."""
    model = models["flux.2-klein-base-4b"]
    features, negative = random_features(model, 1, seed=1), random_features(model, 1, seed=2)

    def at(guidance, negative):
        return model.ours.sample(features, [0], 64, 64, 2, guidance, negative)

    assert torch.equal(at(1.0, negative), at(1.0, None))
    assert max_error(at(1.0 + 1e-6, negative), at(1.0, None)) <= 1e-5
    assert max_error(at(2.0, negative), at(1.0, None)) > 1e-5


def test_latents_that_become_nan_raise_with_their_step(models):
    model = models["flux.2-klein-4b"]

    def poison(step: int, t: float, x: Tensor) -> None:
        if step == 2:
            x.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match="after step 3 of 4"):
        model.ours.sample(random_features(model, 1, seed=1), [0], 64, 64, 4, callback=poison)


def test_nan_in_the_weights_raises(models, tmp_path):
    model, bad = models["flux.2-klein-4b"], tmp_path / "bad.safetensors"
    state = load_file(model.home / model.spec.transformer_file)
    state["single_blocks.1.linear2.weight"][3, 5] = float("nan")
    save_file(state, bad)
    with pytest.raises(NonFiniteError, match="after step 1 of 4.*`check_finite=True`"):
        model.load(transformer=bad).sample(random_features(model, 1, seed=1), [0], 64, 64)
    with pytest.raises(
        UserError, match="bad.safetensors has NaN or infinity in 'single_blocks.1.linear2.weight'"
    ):
        model.load(transformer=bad, check_finite=True)


def test_distilled_klein_refuses_guidance_and_negative_prompts(models):
    pipe = models["flux.2-klein-4b"].ours
    for option in (dict(guidance=2.0), dict(negative_prompt="blurred"), dict(true_cfg_scale=2.0)):
        with pytest.raises(UserError, match="distilled to sample without guidance.*base"):
            pipe("a cat", 64, 64, **option)


@either_family
def test_networks_released_between_stages_give_the_same_image(models, name):
    model = models[name]
    expected = model.load()("a cat", 64, 64, 2)
    pipe = model.load(offload="model")
    parts = (*pipe.text.networks, pipe.transformer, pipe.autoencoder)
    for _ in range(2):
        (image,) = pipe("a cat", 64, 64, 2)
        assert image.tobytes() == expected[0].tobytes()
        assert all(network.module is None for network in parts if network not in pipe.text.networks)
    pipe("a dog", 64, 64, 1)
    assert all(network.module is None for network in parts)


# ------------------------------------------------------------------ files


def test_transformer_file_selects_its_row(models, tmp_path):
    """The file has a community prefix, other weights, then a depth or a width that no row has."""
    model, path = models["flux.2-klein-4b"], tmp_path / "other.safetensors"
    other = randomise(Flux(model.spec.transformer), seed=1)
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in other.state_dict().items()},
        path,
    )
    features = random_features(model, 1, seed=1)
    with pytest.warns(UserWarning, match="flux.2-klein-4b, which is assumed.*flux.2-klein-base-4b"):
        pipe = flux.load(weights=model.folder, device="cpu", dtype=torch.float32, transformer=path)
    assert pipe.spec == model.spec
    latents = pipe.sample(features, [0], 64, 64)
    assert max_error(latents, model.ours.sample(features, [0], 64, 64)) > 0.1
    theirs = diffusers_pipeline(model.spec, model.parts | {"transformer": other})
    expected, _ = by_diffusers(theirs, model, features, None, 64, 64, seeds=[0], output="latent")
    assert max_error(latents, expected[-1]) <= 5e-6

    deeper = replace(model.spec, transformer=replace(model.spec.transformer, depth_single=5))
    save_file(Flux(deeper.transformer).state_dict(), path)
    assert model.load(transformer=path).spec == deeper
    with pytest.warns(UserWarning, match="is taken for a pruned flux.2-klein-4b, with .* 5 single"):
        assert flux.load(weights=model.folder, transformer=path).spec == deeper
    save_file(Flux(replace(deeper.transformer, context_dim=8)).state_dict(), path)
    with pytest.raises(UserError, match="^transformer: .* as `name`"):
        flux.load(weights=model.folder, transformer=path)


def test_replaced_files_need_not_be_in_the_repository(models, tmp_path, monkeypatch):
    model = models["flux.2-klein-4b"]
    shutil.copytree(model.home, tmp_path / model.home.name)
    paths = {
        part: tmp_path / model.home.name / name
        for part, name in (
            ("transformer", model.spec.transformer_file),
            ("autoencoder", model.spec.autoencoder_files[0]),
        )
    }
    files = {
        part: str(path.rename(tmp_path / f"{part}.safetensors")) for part, path in paths.items()
    }
    latents = model.load(weights=tmp_path, **files).sample(
        features := random_features(model, 1, seed=1), [0], 64, 64
    )
    assert torch.equal(latents, model.ours.sample(features, [0], 64, 64))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=model.spec.transformer_file):
        model.load(weights=tmp_path, autoencoder=files["autoencoder"])


@either_family
def test_one_file_equals_shards_of_a_text_encoder(models, name, tmp_path):
    model = models[name]
    for folder in ("tokenizer", "tokenizer_2"):
        if (model.home / folder).is_dir():
            shutil.copytree(model.home / folder, home(tmp_path, name) / folder)
    write_weights(home(tmp_path, name), model.spec, model.parts, sharded=False)
    assert len(list(model.home.glob("text_encoder*/*-of-00002.safetensors"))) == 2
    assert not list(home(tmp_path, name).glob("text_encoder*/*.json"))
    one, shards = (
        model.load(weights=folder).encode(PROMPTS) for folder in (tmp_path, model.folder)
    )
    assert torch.equal(one.tokens, shards.tokens)
    assert one.pooled is None or torch.equal(one.pooled, shards.pooled)

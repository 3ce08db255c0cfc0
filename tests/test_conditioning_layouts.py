"""flux.conditioning without a reference library: ids, layouts, cached references, masks.

The literals are Black Forest Labs' (black-forest-labs/flux and flux2, src/*/sampling.py), or follow
from their rules by hand. test_conditioning.py compares with diffusers, live.
"""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.drawn_images import photo
from support.model_zoo import BASE, FILL, KLEIN, KONTEXT, KV, REDUX, Zoo
from torch import Tensor

from flux import conditioning, sampling
from flux.errors import UserError
from flux.image_io.request import ImageInputs
from flux.parity.reference import FLUX2_TINY, max_error, randomise
from flux.pipeline import Pipeline
from flux.text_encoder import TextFeatures
from flux.transformer import Flux, KVCache

CANNY, CANNY_LORA, DEV = "flux.1-canny-dev", "flux.1-canny-dev-lora", "flux.1-dev"
WIDTH, HEIGHT, SEEDS = 96, 80, (5, 6)
HALF = Image.fromarray(np.uint8([0, 255]).repeat(WIDTH // 2)[None].repeat(HEIGHT, 0))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* was distilled for"),
    pytest.mark.filterwarnings("ignore:.* was not trained with"),
    pytest.mark.filterwarnings("ignore:the image has colors"),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_features(pipe: Pipeline, rows: int = len(SEEDS), seed: int = 1) -> TextFeatures:
    config = pipe.spec.transformer
    pooled = random(rows, config.vector_dim, seed=seed) if config.vector_dim else None
    return TextFeatures(random(rows, 7, config.context_dim, seed=seed), pooled)


def load_again(zoo: Zoo, name: str, dtype: torch.dtype = torch.float32) -> Pipeline:
    zoo(name)
    return zoo.load(name, dtype)


def refusal(call, *arguments, **options) -> str:
    """Return the one line of a UserError."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ cached references


@pytest.mark.parametrize("name", [KV, "flux.2-dev", BASE])
def test_cached_references_equal_references_of_every_step(zoo, name):
    """To the bit, with a guidance input and in both passes of classifier-free guidance."""
    pipe = zoo.pipe(name)
    model, features = pipe.transformer(), random_features(pipe)
    negative = random_features(pipe, 1, seed=2)
    images = ImageInputs((photo(80, 97, seed=1), photo(150, 70, seed=2)), kv_cache=True)
    conditions = pipe.condition(images, WIDTH, HEIGHT)
    scales = dict(guidance=3.0) if pipe.spec.guidance else {}
    cfg = dict(negative=negative) if pipe.spec.cfg else {}
    once = pipe.sample(features, SEEDS, steps=4, conditions=conditions, **scales, **cfg)

    h, w = HEIGHT // 16, WIDTH // 16
    rope = model.rope(sampling.text_ids(7, 4), sampling.image_ids(h, w, 4))
    guidance = torch.full((2,), 3.0) if pipe.spec.transformer.guidance else None
    kept = []

    def velocity(x: Tensor, t: float) -> Tensor:
        vec = model.vec(torch.zeros(1), None if guidance is None else guidance[:1])
        caches = [KVCache(7) for _ in (*model.double_blocks, *model.single_blocks)]
        reference_rope = model.rope(conditions.reference_ids[:0], conditions.reference_ids)
        no_text, (mods,) = features.tokens[:1, :0], model.modulations([vec])
        model.denoise(conditions.references, no_text, reference_rope, mods, caches)
        kept.append(caches[-1].k)
        (now,) = model.modulations([model.vec(torch.full((2,), t), guidance)])
        passes = [
            model.denoise(x, tokens.expand(2, -1, -1), rope, now, caches)
            for tokens in (features.tokens, *([negative.tokens] if cfg else []))
        ]
        return passes[1] + 3.0 * (passes[0] - passes[1]) if cfg else passes[0]

    drawn = sampling.noise(SEEDS, pipe.spec.autoencoder.latent_channels, h, w, spatial=False)
    with torch.inference_mode():
        x = sampling.denoise(
            velocity, drawn.flatten(2).mT.contiguous(), sampling.schedule("empirical", 4, h * w)
        )
    assert len(kept) == 4 and torch.equal(x.mT.reshape_as(once), once)


def dense(
    model: Flux,
    references: Tensor,
    txt: Tensor,
    img: Tensor,
    ids: Tensor,
    still: Tensor,
    now: Tensor,
) -> Tensor:
    """Return the velocity (L, C), in float64, of one sequence.

    The sequence has references (R, C), text (T, D) and the image (L, C). As in BFL's
    forward_kv_extract, `still` (D,), the vec of t = 0, modulates references, and `now` the other
    tokens. References attend to references only.
    """
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    r, n = len(references), len(ids)
    is_text = torch.zeros(n, 1, dtype=torch.bool)
    is_text[r : r + len(txt)] = True
    hidden_from = torch.zeros(n, n, dtype=torch.bool)
    hidden_from[:r, r:] = True

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    def either(a, b):
        return torch.where(is_text, a, b)

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, keepdim=True, correction=0) + 1e-6
        ).sqrt()

    def rms(x, scale):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale

    times = F.silu(torch.stack([still if number < r else now for number in range(n)]))  # (N, D)
    spans = [
        ids[:, [axis]] * c.theta ** (-torch.arange(0, d, 2).double() / d)
        for axis, d in enumerate(c.axes_dim)
    ]
    rotation = torch.polar(torch.ones(()).double(), torch.cat(spans, dim=-1))  # (N, d/2)

    def attended(qkv: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q, k, v = (
            x.reshape(n, c.num_heads, -1).transpose(0, 1) for x in qkv.chunk(3, dim=-1)
        )  # (H, N, d)
        q, k = (
            torch.view_as_complex(rms(x, s).unflatten(-1, (-1, 2))) * rotation
            for x, s in ((q, query), (k, key))
        )
        # dot products of the rotated pairs
        scores = (q @ k.mH).real / (c.hidden_size // c.num_heads) ** 0.5
        weights = scores.masked_fill(hidden_from, -math.inf).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    x = torch.cat(
        [linear(references, "img_in"), linear(txt, "txt_in"), linear(img, "img_in")]
    )  # (N, D)
    mods = either(
        *(linear(times, f"double_stream_modulation_{stream}.lin") for stream in ("txt", "img"))
    ).chunk(6, dim=-1)
    for block in (f"double_blocks.{i}." for i in range(c.depth)):

        def both(x, name, block=block):
            return either(*(linear(x, f"{block}{stream}_{name}") for stream in ("txt", "img")))

        scales = [
            either(*(w[f"{block}{s}_attn.norm.{part}_norm.scale"] for s in ("txt", "img")))
            for part in ("query", "key")
        ]
        x = x + mods[2] * both(
            attended(both(norm(x) * (1 + mods[1]) + mods[0], "attn.qkv"), *scales), "attn.proj"
        )
        x = x + mods[5] * both(gated(both(norm(x) * (1 + mods[4]) + mods[3], "mlp.0")), "mlp.2")
    shift, scale, gate = linear(times, "single_stream_modulation.lin").chunk(3, dim=-1)
    for block in (f"single_blocks.{i}." for i in range(c.depth_single)):
        inner = linear(norm(x) * (1 + scale) + shift, f"{block}linear1")
        attention = attended(
            inner[:, : 3 * c.hidden_size],
            *(w[f"{block}norm.{part}_norm.scale"] for part in ("query", "key")),
        )
        x = x + gate * linear(
            torch.cat([attention, gated(inner[:, 3 * c.hidden_size :])], dim=-1), f"{block}linear2"
        )
    shift, scale = linear(F.silu(now), "final_layer.adaLN_modulation.1").chunk(2)
    return linear(norm(x[-len(img) :]) * (1 + scale) + shift, "final_layer.linear")


@pytest.mark.parametrize("depth, depth_single", [(2, 0), (0, 2), (2, 3)])
@torch.no_grad()
def test_kv_cache_equals_one_sequence_with_a_mask(depth, depth_single):
    """At least two blocks: the first one does not depend on what references attend to."""
    model = randomise(Flux(replace(FLUX2_TINY, depth=depth, depth_single=depth_single)))
    references = random(2, 10, 16, seed=1)
    txt, img = random(2, 5, 40, seed=2), random(2, 12, 16, seed=3)
    ids = [sampling.image_ids(2, 5, 4, t=10), sampling.text_ids(5, 4), sampling.image_ids(3, 4, 4)]
    t, guidance = torch.tensor([0.8, 0.3]), torch.tensor([3.5, 2.0])
    still, now = model.vec(torch.zeros(2), guidance), model.vec(t, guidance)
    caches = [KVCache(text_length=5) for _ in range(depth + depth_single)]
    before, after = model.modulations([still, now])
    model.denoise(references, txt[:, :0], model.rope(ids[0][:0], ids[0]), before, caches)
    ours = model.denoise(img, txt, model.rope(*ids[1:]), after, caches)
    for row in range(2):
        *tokens, before, after = (x[row].double() for x in (references, txt, img, still, now))
        expected = dense(model, *tokens, torch.cat(ids), before, after)
        assert max_error(ours[row].double(), expected) <= 1e-6  # seen: up to 5e-7, of float32


# ------------------------------------------------------------------ layouts


def test_references_have_ids_and_order_of_their_family():
    """Kontext: all at t = 1, side by side. FLUX.2: t = 10, 20, ..., from the same corner."""
    sizes = ((2, 3), (1, 2), (3, 1))
    latents = [
        torch.arange(4.0 * h * w).reshape(1, 4, h, w) + 100 * k for k, (h, w) in enumerate(sizes)
    ]
    tokens, ids = conditioning.reference_tokens(latents, 3)
    first = [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]]
    second, third = [[1, 0, 3], [1, 0, 4]], [[1, 0, 5], [1, 1, 5], [1, 2, 5]]
    assert ids.tolist() == first + second + third
    assert tokens.shape == (1, 11, 4)
    assert tokens[0, :, 0].tolist() == [*range(6), 100, 101, 200, 201, 202]
    assert tokens[0, 4].tolist() == [4, 10, 16, 22]
    assert tokens[0, 7].tolist() == [101, 103, 105, 107]

    same, ids = conditioning.reference_tokens(latents, 4)
    first = [[10, row, column, 0] for row in range(2) for column in range(3)]
    second = [[20, 0, 0, 0], [20, 0, 1, 0]]
    third = [[30, 0, 0, 0], [30, 1, 0, 0], [30, 2, 0, 0]]
    assert ids.tolist() == first + second + third
    assert torch.equal(same, tokens)
    _, ids = conditioning.reference_tokens([latents[2]] * 10, 4)
    assert ids[::3, 0].tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_fill_input_has_noise_masked_image_and_soft_mask(zoo):
    """The network's 64 + 64 + 256 channels, in the order of BFL's prepare_fill and denoise.

    The image is masked in [-1, 1]: a hole is mid-gray. The 16x16 mask values of a token are
    channels: first by the place (y, x) in 8x8 pixels, then by the place of the 8x8 pixels.
    """
    pipe, inputs = zoo.pipe(FILL), []
    image = photo(WIDTH, HEIGHT)
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    conditions = pipe.condition(ImageInputs((image,), Image.fromarray(values)))
    hook = pipe.transformer().img_in.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].clone())
    )
    pipe.sample(random_features(pipe), SEEDS, steps=2, conditions=conditions)
    hook.remove()

    mask = values.astype(np.float32) / 255
    packed = np.empty((5 * 6, 256), np.float32)
    for row, column, y, x, below, right in np.ndindex(5, 6, 8, 8, 2, 2):
        value = mask[16 * row + 8 * below + y, 16 * column + 8 * right + x]
        packed[6 * row + column, 4 * (8 * y + x) + 2 * below + right] = value
    masked = (np.asarray(image) / 127.5 - 1) * (1 - mask[..., None])
    with torch.no_grad():
        pixels = torch.from_numpy(masked.transpose(2, 0, 1)[None]).float()
        latents = pipe.image_encoder().encode(pixels)
    drawn = sampling.noise(SEEDS, 64, 5, 6, spatial=True)
    assert [x.shape for x in inputs] == [(2, 30, 384)] * 2 and len(np.unique(packed)) == 256
    assert torch.equal(inputs[0][..., :64], drawn.flatten(2).mT)
    for x in (*inputs[0], *inputs[1]):  # of both steps and both images
        # masked in float32 and in float64
        assert max_error(x[:, 64:128], latents[0].flatten(1).T) <= 3e-6
        assert np.array_equal(x[:, 128:], packed)


# ------------------------------------------------------------------ in the pipeline


@pytest.mark.parametrize(
    "name, options",
    [
        (KLEIN, {}),
        (KONTEXT, dict(keep_input_size=True)),
        (DEV, dict(strength=0.5)),
        (FILL, dict(outpaint=(6, 10, 0, 0))),
        (CANNY_LORA, {}),
    ],
)
def test_images_are_encoded_in_float32_whatever_the_dtype(zoo, name, options):
    """In bfloat16, latents would be off by some per cent."""
    images = ImageInputs((photo(90, 70),), **options)
    exact = zoo.pipe(name).condition(images).tensors
    rounded = load_again(zoo, name, torch.bfloat16).condition(images).tensors
    assert exact.keys() == rounded.keys() and len(exact) >= 1
    for part, tensor in exact.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, rounded[part])


@pytest.mark.parametrize(
    "name, hard", [("flux.2-tiny", True), (DEV, True), (KLEIN, True), (FILL, False)]
)
def test_soft_mask_is_binarized_but_for_fill_and_its_seam_is_blended(zoo, name, hard):
    """From black to white, the first four pixels inside are blended in fifths."""
    image, level = photo(WIDTH, HEIGHT), np.rint(np.linspace(0, 255, WIDTH)).astype(np.uint8)
    images = ImageInputs((image,), Image.fromarray(level[None].repeat(HEIGHT, 0)))
    generated = {}
    for composite in (True, False):
        inputs = replace(images, composite=composite)
        (out,) = zoo.pipe(name)("a cat", steps=2, seed=5, images=inputs)
        generated[composite] = np.asarray(out, float)
    composed, raw = generated[True], generated[False]
    white = level >= 128 if hard else level > 0
    weight = np.clip((np.arange(WIDTH) - white.argmax() + 1) / 5, 0, 1)
    if not hard:
        weight = weight * (level / 255)
    original, inside = np.asarray(image, float), weight == 1
    assert inside.sum() > (40 if hard else 0)
    assert (raw != original)[:, inside].mean() > 0.9
    assert (raw != original)[:, ~white].any()
    assert np.array_equal(composed[:, inside], raw[:, inside])
    assert np.array_equal(composed[:, ~white], original[:, ~white])
    weight = weight[None, :, None]
    blended = original * (1 - weight) + raw * weight
    assert np.abs(composed - blended).max() <= 0.5001  # to the nearest level


# ------------------------------------------------------------------ input of any kind

GREY = Image.fromarray(np.asarray(photo(WIDTH, HEIGHT))[..., 1])
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)  # 16 bits
ON_WHITE = Image.composite(photo(WIDTH, HEIGHT), Image.new("RGB", (WIDTH, HEIGHT), "white"), HALF)
SHOWN = {  # an image, and the same in RGB
    "grey": (GREY, GREY.convert("RGB")),
    "16-bit grey": (DEEP, GREY.convert("RGB")),
    "palette": (
        photo(WIDTH, HEIGHT).quantize(32),
        photo(WIDTH, HEIGHT).quantize(32).convert("RGB"),
    ),
    "transparent": (Image.merge("RGBA", (*photo(WIDTH, HEIGHT).split(), HALF)), ON_WHITE),
}


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("name", [DEV, KLEIN])
def test_image_in_any_mode_equals_its_rgb_image(zoo, name, kind):
    """As from files. Pillow's conversion would turn 16 bits white, and transparency black."""
    image, shown = SHOWN[kind]
    expected = zoo.pipe(name).condition(ImageInputs((shown,))).tensors
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        tensors = zoo.pipe(name).condition(ImageInputs((image,))).tensors
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[part], expected[part]) for part in tensors)
    noted = ["transparent parts were put on white" in str(note.message) for note in notes]
    assert noted == [True] * (kind == "transparent")


def test_mask_in_any_mode_equals_its_gray_mask(zoo):
    pipe, mask = zoo.pipe(FILL), GREY
    expected = pipe.condition(ImageInputs((photo(WIDTH, HEIGHT),), mask)).channels
    for other in (mask.convert("RGB"), mask.convert("RGBA"), DEEP, mask.convert("P")):
        assert torch.equal(
            pipe.condition(ImageInputs((photo(WIDTH, HEIGHT),), other)).channels, expected
        ), other.mode


@pytest.mark.parametrize(
    "mask, words",
    [
        (photo(WIDTH, HEIGHT), "mask: a mask must be gray (got colors)"),
        (SHOWN["transparent"][0], "mask: a mask must be opaque (got transparent parts)"),
        (
            Image.new("L", (HEIGHT, WIDTH), 255),
            "mask: the mask of 80x96 for an image of 96x80 has another shape",
        ),
        (Image.new("L", (WIDTH, HEIGHT)), "mask: is all black"),
        (Image.new("LAB", (WIDTH, HEIGHT)), "mask: the LAB color space is not supported"),
    ],
)
@pytest.mark.parametrize("name", [DEV, FILL])
def test_wrong_mask_is_refused(zoo, name, mask, words):
    assert words in refusal(
        zoo.pipe(name), "a cat", images=ImageInputs((photo(WIDTH, HEIGHT),), mask)
    )


@pytest.mark.parametrize("name", [DEV, KLEIN])
def test_mask_too_thin_for_latents_is_refused(zoo, name):
    """Only the autoencoder would change the image."""
    thin = Image.new("L", (WIDTH, HEIGHT))
    thin.paste(255, (17, 0, 19, HEIGHT))
    assert "too thin: they fall between latents" in refusal(
        zoo.pipe(name), "a cat", images=ImageInputs((photo(WIDTH, HEIGHT),), thin)
    )


def test_stretched_image_warns(zoo):
    images = ImageInputs((photo(WIDTH, HEIGHT),), strength=0.5)
    with pytest.warns(
        UserWarning, match=f"the image of {WIDTH}x{HEIGHT} is stretched to 64x128: leave"
    ):
        zoo.pipe(DEV).condition(images, 64, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.pipe(DEV).condition(images, 2 * WIDTH, 2 * HEIGHT)


@pytest.mark.parametrize("name", [FILL, CANNY, CANNY_LORA, REDUX])
def test_model_that_needs_an_image_refuses_a_prompt_alone(zoo, name):
    pipe = zoo.pipe(name)
    assert refusal(pipe, "a cat") == f"images: {name} needs an image. Pass one."
    assert f"{name} takes" in refusal(pipe, "a cat", images=ImageInputs(()))


@pytest.mark.parametrize("name", [DEV, KLEIN])
def test_conditions_refuse_another_size(zoo, name):
    pipe, images = zoo.pipe(name), ImageInputs((photo(WIDTH, HEIGHT),))
    conditions = pipe.condition(images, 96, 80)
    for size in (
        dict(width=64),
        dict(height=64),
        dict(width=64, height=64),
        dict(width=80, height=96),
    ):
        message = refusal(pipe, "a cat", images=conditions, **size)
        assert message == "conditions: made for 96x80. Leave `width` and `height` out."
    (one,) = pipe("a cat", images=conditions, steps=1, width=96, height=80)
    (other,) = pipe("a cat", images=images, steps=1, width=96, height=80)
    assert one.tobytes() == other.tobytes()


def test_wrong_number_of_image_inputs_is_refused(zoo):
    pipe, one = zoo.pipe(KLEIN), ImageInputs((photo(WIDTH, HEIGHT),))
    for prompts, images in (
        ("a cat", [one, one]),
        (["a cat"], ()),
        (["a cat", "a dog"], [one]),
        (["a cat"] * 2, (one,) * 3),
    ):
        count = 1 if isinstance(prompts, str) else len(prompts)
        words = (
            "images: one ImageInputs for each prompt is needed "
            f"(got {len(images)} for {count} prompts)."
        )
        assert refusal(pipe, prompts, num_images=2, images=images) == words

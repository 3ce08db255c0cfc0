"""flux.conditioning without a reference library: ids, layouts and sizes as literals, and pictures given from Python.

The literals are Black Forest Labs' (black-forest-labs/flux and flux2, src/*/sampling.py and util.py) or follow by hand from
their rules. What diffusers does too is compared with it, live, in test_conditioning.py.
"""

import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from support.drawn_images import photo
from support.model_zoo import BASE, CONTROL, FILL, FLUX2, KLEIN, KONTEXT, KV, REDUX, RELEASED, START, Zoo
from torch import Tensor

import flux
from flux import conditioning, sampling
from flux.errors import UserError
from flux.image_io import request
from flux.image_io.request import ImageInputs
from flux.parity.reference import FLUX2_TINY, max_error, randomise
from flux.pipeline import Pipeline
from flux.text_encoder import TextFeatures
from flux.transformer import Flux, KVCache

CANNY, CANNY_LORA, DEV = "flux.1-canny-dev", "flux.1-canny-dev-lora", "flux.1-dev"
WIDTH, HEIGHT, SEEDS = 96, 80, (5, 6)
HALF = Image.fromarray(
    np.repeat(np.uint8([0, 255]), WIDTH // 2)[None].repeat(HEIGHT, 0)
)  # black, then white
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* was distilled for"),
    pytest.mark.filterwarnings("ignore:.* was not trained with"),
    pytest.mark.filterwarnings("ignore:the image has colors"),
]


def loaded_anew(zoo: Zoo, name: str, dtype: torch.dtype = torch.float32) -> Pipeline:
    zoo(name)
    return flux.load(name, weights=zoo.folder, device="cpu", dtype=dtype)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_features(pipe: Pipeline, rows: int = len(SEEDS), seed: int = 1) -> TextFeatures:
    config = pipe.spec.transformer
    pooled = random(rows, config.vector_dim, seed=seed) if config.vector_dim else None
    return TextFeatures(random(rows, 7, config.context_dim, seed=seed), pooled)


def refusal(call, *arguments, **options) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- memories


@pytest.mark.parametrize("name", [KV, "flux.2-dev", BASE])
def test_cached_references_equal_references_of_every_step(zoo, name):
    """Bit for bit, with guidance built in, and in both passes of classifier-free guidance: no time passes for them."""
    pipe = zoo.pipe(name)
    model, features, negative = (
        pipe.transformer(),
        random_features(pipe),
        random_features(pipe, 1, seed=2),
    )
    given = pipe.condition(
        ImageInputs((photo(80, 97, seed=1), photo(150, 70, seed=2)), kv_cache=True), WIDTH, HEIGHT
    )
    scales = dict(guidance=3.0) if pipe.spec.guidance else {}
    cfg = dict(negative=negative) if pipe.spec.cfg else {}
    once = pipe.sample(features, SEEDS, steps=4, conditions=given, **scales, **cfg)

    h, w = HEIGHT // 16, WIDTH // 16
    rope = model.rope(sampling.text_ids(7, 4), sampling.image_ids(h, w, 4))
    guidance = torch.full((2,), 3.0) if pipe.spec.transformer.guidance else None
    kept = []

    def velocity(x: Tensor, t: float) -> Tensor:
        vec = model.vec(torch.zeros(1), None if guidance is None else guidance[:1])
        caches = [KVCache(7) for _ in (*model.double_blocks, *model.single_blocks)]
        reference_rope = model.rope(given.reference_ids[:0], given.reference_ids)
        no_text, (mods,) = features.tokens[:1, :0], model.modulations([vec])
        model.denoise(given.references, no_text, reference_rope, mods, caches)
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
    """Velocity (L, C) in float64, of one sequence: references (R, C), text (T, D), image (L, C), all of them in every block.

    After black-forest-labs/flux2, forward_kv_extract: each token is modulated for its own time, which is `still` (D,), the
    vec of t = 0, for references, and `now` for the others; and references see references only.
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
    turn = torch.polar(torch.ones(()).double(), torch.cat(spans, dim=-1))  # (N, d/2)

    def attended(qkv: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q, k, v = (
            x.reshape(n, c.num_heads, -1).transpose(0, 1) for x in qkv.chunk(3, dim=-1)
        )  # (H, N, d)
        q, k = (
            torch.view_as_complex(rms(x, s).unflatten(-1, (-1, 2))) * turn
            for x, s in ((q, query), (k, key))
        )
        scores = (q @ k.mH).real / (
            c.hidden_size // c.num_heads
        ) ** 0.5  # the turned pairs' dot products
        return (
            (scores.masked_fill(hidden_from, -math.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)
        )

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
        both = lambda x, name: either(
            *(linear(x, f"{block}{stream}_{name}") for stream in ("txt", "img"))
        )
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
        seen = attended(
            inner[:, : 3 * c.hidden_size],
            *(w[f"{block}norm.{part}_norm.scale"] for part in ("query", "key")),
        )
        x = x + gate * linear(
            torch.cat([seen, gated(inner[:, 3 * c.hidden_size :])], dim=-1), f"{block}linear2"
        )
    shift, scale = linear(F.silu(now), "final_layer.adaLN_modulation.1").chunk(2)
    return linear(norm(x[-len(img) :]) * (1 + scale) + shift, "final_layer.linear")


@pytest.mark.parametrize("depth, depth_single", [(2, 0), (0, 2), (2, 3)])
@torch.no_grad()
def test_kv_cache_equals_one_sequence_with_a_mask(depth, depth_single):
    """Two blocks at least: the first reads references as they came, whatever they see."""
    model = randomise(Flux(replace(FLUX2_TINY, depth=depth, depth_single=depth_single)))
    references, txt, img = (
        random(2, 10, 16, seed=1),
        random(2, 5, 40, seed=2),
        random(2, 12, 16, seed=3),
    )
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
        assert (
            max_error(ours[row].double(), expected) <= 1e-6
        )  # float32 against float64; seen: up to 5e-7


# ---------------------------------------------------------------------------------------------------------- layouts


def test_ids_and_order_of_references():
    """Kontext: all at t = 1, side by side. FLUX.2: t = 10 + 10·k, each from the same corner. Row by row, as given."""
    sizes = ((2, 3), (1, 2), (3, 1))
    latents = [
        torch.arange(4.0 * h * w).reshape(1, 4, h, w) + 100 * k for k, (h, w) in enumerate(sizes)
    ]
    tokens, ids = conditioning.reference_tokens(latents, 3)
    first, second = (
        ([1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]),
        ([1, 0, 3], [1, 0, 4]),
    )
    assert ids.tolist() == [*first, *second, [1, 0, 5], [1, 1, 5], [1, 2, 5]]
    assert tokens.shape == (1, 11, 4) and tokens[0, :, 0].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        100,
        101,
        200,
        201,
        202,
    ]
    assert tokens[0, 4].tolist() == [4, 10, 16, 22] and tokens[0, 7].tolist() == [
        101,
        103,
        105,
        107,
    ]

    same, ids = conditioning.reference_tokens(latents, 4)
    first = [
        [10, 0, 0, 0],
        [10, 0, 1, 0],
        [10, 0, 2, 0],
        [10, 1, 0, 0],
        [10, 1, 1, 0],
        [10, 1, 2, 0],
    ]
    assert ids.tolist() == [
        *first,
        [20, 0, 0, 0],
        [20, 0, 1, 0],
        [30, 0, 0, 0],
        [30, 1, 0, 0],
        [30, 2, 0, 0],
    ]
    assert torch.equal(same, tokens)
    _, ids = conditioning.reference_tokens([latents[2]] * 10, 4)
    assert ids[::3, 0].tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_fill_sees_noise_masked_picture_and_soft_mask(zoo):
    """What reaches the network: 64 + 64 + 256 channels, in the order of Black Forest Labs' prepare_fill and denoise.

    The picture is masked in [-1, 1], so that a hole is mid-grey; all 16x16 mask values of a token are kept as they are, first
    by their place (y, x) within 8x8 pixels, then by that of the 8x8 pixels.
    """
    pipe, seen = zoo.pipe(FILL), []
    picture = photo(WIDTH, HEIGHT)
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    given = pipe.condition(ImageInputs((picture,), Image.fromarray(values)))
    hook = pipe.transformer().img_in.register_forward_pre_hook(
        lambda module, received: seen.append(received[0].clone())
    )
    pipe.sample(random_features(pipe), SEEDS, steps=2, conditions=given)
    hook.remove()

    mask = values.astype(np.float32) / 255
    packed = np.empty((5 * 6, 256), np.float32)
    for row, column, y, x, below, right in np.ndindex(5, 6, 8, 8, 2, 2):
        value = mask[16 * row + 8 * below + y, 16 * column + 8 * right + x]
        packed[6 * row + column, 4 * (8 * y + x) + 2 * below + right] = value
    masked = (np.asarray(picture) / 127.5 - 1) * (1 - mask[..., None])
    with torch.no_grad():
        latents = pipe.encoder().encode(torch.from_numpy(masked.transpose(2, 0, 1)[None]).float())
    drawn = sampling.noise(SEEDS, 64, 5, 6, spatial=True)
    assert [x.shape for x in seen] == [(2, 30, 384)] * 2 and len(np.unique(packed)) == 256
    assert torch.equal(seen[0][..., :64], drawn.flatten(2).mT)
    for x in (*seen[0], *seen[1]):  # of both steps and both pictures
        assert (
            max_error(x[:, 64:128], latents[0].flatten(1).T) <= 3e-6
        )  # masked in float32 and in float64
        assert np.array_equal(x[:, 128:], packed)


# ---------------------------------------------------------------------------------------------------------- sizes


def blank(*sizes: tuple[int, int]) -> tuple[Image.Image, ...]:
    return tuple(Image.new("RGB", size) for size in sizes)


LARGE, MIDDLE, SMALL = (3000, 2000), (1000, 700), (500, 300)
INSIDE = dict(mask=HALF.resize(MIDDLE))


@pytest.mark.parametrize(
    "name, sizes, options, expected",
    [
        (
            "flux.2-dev",
            [LARGE],
            {},
            [(2464, 1648)],
        ),  # 2024² pixels: 2478x1652, cropped to multiples of 16
        ("flux.2-dev", [LARGE, SMALL], {}, [(1248, 832), (496, 288)]),  # 1024² each: 1254x836
        ("flux.2-dev", [LARGE], dict(reference_limit=1024), [(1248, 832)]),  # as diffusers has it
        (KLEIN, [LARGE, LARGE], dict(reference_limit=512), [(624, 416)] * 2),  # 627x418
        (KLEIN, [LARGE, LARGE], dict(reference_limit=2024), [(2464, 1648)] * 2),
        (KLEIN, [(2024, 2024)], {}, [(2016, 2016)]),
        (KLEIN, [(2048, 2048), SMALL], {}, [(1024, 1024), (496, 288)]),
        (KONTEXT, [MIDDLE], {}, [(1248, 832)]),  # 1.43, between 1184x880 = 1.35 and 1248x832 = 1.5
        (
            KONTEXT,
            [(600, 1000), (64, 64), (1600, 200)],
            {},
            [(800, 1328), (1024, 1024), (1568, 672)],
        ),
        (KONTEXT, [MIDDLE, (64, 79)], dict(keep_input_size=True), [(992, 688), (64, 64)]),
    ],
)
def test_sizes_in_which_references_are_taken(name, sizes, options, expected):
    fitted = request.resize_references(RELEASED[name], ImageInputs(blank(*sizes), **options))
    assert [picture.size for picture in fitted] == expected


def test_references_of_kontext_are_stretched_and_those_of_flux2_cropped():
    picture = photo(90, 70)
    (stretched,) = request.resize_references(
        RELEASED[KONTEXT], ImageInputs((picture,), keep_input_size=True)
    )
    assert np.array_equal(stretched, picture.resize((80, 64), Image.Resampling.LANCZOS))
    (cropped,) = request.resize_references(RELEASED[KLEIN], ImageInputs((picture,)))
    assert np.array_equal(cropped, np.asarray(picture)[3:67, 5:85])


@pytest.mark.parametrize(
    "name, options, shapes",
    [
        (
            KLEIN,
            {},
            [(80, 96), (832, 1248)],
        ),  # of the two, one is left to be capped, but two are seen
        (KLEIN, dict(reference_limit=512), [(80, 96), (416, 624)]),
        (KONTEXT, {}, [(80, 96), (832, 1248)]),
    ],
)
def test_sizes_of_what_is_seen_beside_a_start(name, options, shapes):
    """The picture that is begun from is seen in the size of the one that is made; the others as always."""
    spec, seen = RELEASED[name], []

    def encode(pixels: Tensor) -> Tensor:
        seen.append(tuple(pixels.shape[2:]))
        return torch.zeros(1, 4, pixels.shape[2] // 16, pixels.shape[3] // 16)

    pictures = ImageInputs((*blank((96, 80)), *blank(LARGE)), strength=0.5, **options)
    given = conditioning.condition(spec, pictures, 96, 80, encode, embed=None)
    assert seen == shapes and given.init.shape == (1, 4, 5, 6)
    assert given.references.shape == (1, sum(h * w // 256 for h, w in shapes), 4)


@pytest.mark.parametrize(
    "name, sizes, options, asked, expected",
    [
        (DEV, None, {}, (None, None), (1024, 1024)),  # without a picture
        ("flux.2-tiny", None, {}, (64, None), (64, 256)),
        (REDUX, [LARGE], {}, (None, None), (1024, 1024)),  # which looks at pictures from afar
        (REDUX, [LARGE], {}, (None, 512), (1024, 512)),
        (
            DEV,
            [MIDDLE],
            {},
            (None, None),
            (1008, 704),
        ),  # its own, rounded up, to be cropped in the end
        (DEV, [MIDDLE], INSIDE, (None, None), (1008, 704)),
        (DEV, [MIDDLE], {}, (512, None), (512, 352)),  # 704·512/1008 = 357.6
        (DEV, [MIDDLE], {}, (None, 512), (736, 512)),  # 1008·512/704 = 733.1
        (DEV, [MIDDLE], {}, (512, 512), (512, 512)),
        (DEV, [(2048, 1024)], {}, (None, None), (2048, 1024)),  # twice 1024² at most
        (FILL, [MIDDLE], INSIDE, (None, None), (1008, 704)),
        (FILL, [MIDDLE], dict(outpaint=(10, 20, 30, 40)), (None, None), (1040, 768)),  # 1040x760
        (CANNY, [(1001, 700)], {}, (None, None), (1008, 704)),  # stretched to the nearest
        (CANNY, [(999, 695)], {}, (None, None), (992, 688)),
        (CANNY_LORA, [(999, 695)], {}, (None, 688), (992, 688)),
        (KONTEXT, [MIDDLE], {}, (None, None), (1248, 832)),
        (KONTEXT, [LARGE, MIDDLE], {}, (624, None), (624, 416)),
        (KONTEXT, [MIDDLE], dict(keep_input_size=True), (None, None), (992, 688)),
        (KONTEXT, [MIDDLE], dict(strength=0.5), (None, None), (1008, 704)),
        (
            KONTEXT,
            [SMALL, LARGE],
            dict(match_image_size=2),
            (None, None),
            (2992, 2000),
        ),  # its own size, rounded down
        (
            "flux.2-dev",
            [LARGE],
            {},
            (None, None),
            (1248, 832),
        ),  # 1024² pixels, though one reference is seen at 2024²
        ("flux.2-dev", [LARGE], dict(reference_limit=2024), (None, None), (1248, 832)),
        ("flux.2-dev", [LARGE], dict(reference_limit=512), (None, None), (624, 416)),
        (KLEIN, [SMALL, LARGE], {}, (None, None), (496, 288)),  # the first's
        (KLEIN, [SMALL, LARGE], dict(match_image_size=2), (None, None), (2992, 2000)),
        (
            KLEIN,
            [SMALL, LARGE],
            dict(match_image_size=2),
            (None, 512),
            (768, 512),
        ),  # 2992·512/2000 = 766.0
        (KLEIN, [LARGE], {}, (512, None), (512, 336)),  # 832·512/1248 = 341.3
        (KLEIN, [MIDDLE, LARGE], INSIDE, (None, None), (1008, 704)),
    ],
)
def test_size_that_pictures_ask_for(name, sizes, options, asked, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = None if sizes is None else ImageInputs(blank(*sizes), **options)
        assert request.output_size(RELEASED[name], pictures, *asked) == expected


@pytest.mark.parametrize(
    "name, size, options, own, expected",
    [
        (
            DEV,
            LARGE,
            {},
            (3008, 2000),
            (1760, 1168),
        ),  # times sqrt(2·1024²/(3008·2000)): 1776.0 by 1180.8
        (DEV, (2049, 1024), {}, (2064, 1024), (2048, 1008)),  # 2056.0 by 1020.0
        (FILL, LARGE, dict(outpaint=(8, 0, 0, 0)), (3008, 2000), (1760, 1168)),
        (CANNY, LARGE, {}, (3008, 2000), (1760, 1168)),
        (KLEIN, LARGE, dict(strength=0.5), (3008, 2000), (1760, 1168)),
        (
            "flux.2-tiny",
            (640, 480),
            dict(strength=0.5),
            (640, 480),
            (416, 304),
        ),  # of 2·256² pixels: 418.0 by 313.5
    ],
)
def test_pictures_larger_than_a_model_knows_are_noted(name, size, options, own, expected):
    spec, pictures = RELEASED[name], ImageInputs(blank(size), **options)
    words = f"{own[0]}x{own[1]} is large for {name}: the output is {expected[0]}x{expected[1]}"
    with pytest.warns(UserWarning, match=words):
        assert request.output_size(spec, pictures, None, None) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever gives a size knows it
        assert request.output_size(spec, pictures, *own) == own
        assert request.output_size(spec, pictures, expected[0], None)[0] == expected[0]


# ---------------------------------------------------------------------------------------------------------- in the pipeline


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
def test_pictures_are_encoded_in_float32_whatever_the_dtype(zoo, name, options):
    """In bfloat16, latents would be off by some per cent."""
    pictures = ImageInputs((photo(90, 70),), **options)
    exact = zoo.pipe(name).condition(pictures).tensors
    rounded = loaded_anew(zoo, name, torch.bfloat16).condition(pictures).tensors
    assert exact.keys() == rounded.keys() and len(exact) >= 1
    assert all(
        tensor.dtype == torch.float32 and torch.equal(tensor, rounded[part])
        for part, tensor in exact.items()
    )


@pytest.mark.parametrize(
    "name, hard", [("flux.2-tiny", True), (DEV, True), (KLEIN, True), (FILL, False)]
)
def test_composite_with_a_soft_mask(zoo, name, hard):
    """Inpainting changes a place or does not, and so the composite has no greys either; only Fill knows them.

    From black to white: the seam is blended over the first four pixels inside, in fifths.
    """
    picture, level = photo(WIDTH, HEIGHT), np.rint(np.linspace(0, 255, WIDTH)).astype(np.uint8)
    pictures = ImageInputs((picture,), Image.fromarray(level[None].repeat(HEIGHT, 0)))
    made, raw = (
        np.asarray(
            zoo.pipe(name)("a cat", steps=2, seed=5, images=replace(pictures, composite=composite))[
                0
            ],
            float,
        )
        for composite in (True, False)
    )
    white = level >= 128 if hard else level > 0
    weight = np.clip((np.arange(WIDTH) - white.argmax() + 1) / 5, 0, 1) * (
        1 if hard else level / 255
    )
    own, inside = np.asarray(picture, float), weight == 1
    assert (
        inside.sum() > (40 if hard else 0)
        and (raw != own)[:, inside].mean() > 0.9
        and (raw != own)[:, ~white].any()
    )
    assert np.array_equal(made[:, inside], raw[:, inside]) and np.array_equal(
        made[:, ~white], own[:, ~white]
    )
    weight = weight[None, :, None]
    assert (
        np.abs(made - (own * (1 - weight) + raw * weight)).max() <= 0.5001
    )  # to the nearest level


# ------------------------------------------------------------------------------ the check

SUPPORTED_BY = {  # option -> the models that support it, as the README has it
    "mask": START | FLUX2 | {KONTEXT, FILL},
    "strength": START | FLUX2 | {KONTEXT},
    "outpaint": {FILL},
    "mask_threshold": {FILL},
    "preprocess_control": CONTROL,
    "image_weights": {REDUX},
    "match_image_size": FLUX2 | {KONTEXT},
    "keep_input_size": {KONTEXT},
    "reference_limit": FLUX2,
    "kv_cache": FLUX2,
}
VALUES = dict(mask=HALF, strength=0.5, outpaint=(1, 2, 3, 4), mask_threshold=0.5)
VALUES |= dict(preprocess_control=True, image_weights=(1.0,), match_image_size=1)
VALUES |= dict(keep_input_size=True, reference_limit=512, kv_cache=False)
PHOTO = photo(WIDTH, HEIGHT)
GRAY_RGB = PHOTO.convert("L").convert("RGB")


def check(name: str, *images: Image.Image, **options) -> None:
    request.check_images(RELEASED[name], ImageInputs(images, **options))


def test_every_option_has_a_row_here():
    assert SUPPORTED_BY.keys() == VALUES.keys() == set(request.OPTIONS)
    assert request.non_default_options(ImageInputs((PHOTO,), **VALUES)) == list(request.OPTIONS)


@pytest.mark.parametrize("option", SUPPORTED_BY)
def test_unsupported_option_lists_supported_models(option):
    for name in RELEASED.keys() - SUPPORTED_BY[option]:
        message = refusal(check, name, PHOTO, **{option: VALUES[option]})
        start, _, able = message.removesuffix("). Leave it out.").partition(" (only by ")
        assert start == f"{option}: not supported by {name}"
        assert set(able.split(", ")) == SUPPORTED_BY[option]
    message = refusal(check, "flux.2-tiny", **{option: VALUES[option]})
    assert message == f"{option}: needs an image. Pass one in `images`."


def test_number_of_images_is_checked():
    several = {name for name, spec in RELEASED.items() if spec.image_mode in ("reference", "redux")}
    assert several == FLUX2 | {KONTEXT, REDUX}
    for name in RELEASED:
        most = 10 if name in several else 1
        mask = dict(mask=HALF) if name == FILL else {}
        check(name, *[GRAY_RGB] * most, **mask)
        for count in (0, most + 1):
            takes = "takes 1 to 10 images" if most == 10 else "takes one image"
            message = refusal(check, name, *[GRAY_RGB] * count)
            assert message.startswith(f"images: {name} {takes} (got {count}).")
            assert (KONTEXT in message) == (most == 1 or name == KONTEXT)


def test_models_that_require_an_image_say_so():
    for name in RELEASED:
        if name in {FILL, REDUX} | CONTROL:
            message = refusal(request.check_images, RELEASED[name], None)
            assert message == f"images: {name} needs an image. Pass one."
        else:
            request.check_images(RELEASED[name], None)


# fmt: off
WRONG = [
    (FILL, {}, "mask: flux.1-fill-dev needs to know where to fill. Pass a mask"),
    (KLEIN, dict(composite=False), "composite=False: has no effect without `mask` or `outpaint`"),
    (KLEIN, dict(strength=0), "strength: must be above 0 and at most 1 (got 0)."),
    (KLEIN, dict(strength=1.01), "strength: must be above 0 and at most 1 (got 1.01)."),
    (KLEIN, dict(strength=math.nan), "strength: must be above 0 and at most 1 (got nan)."),
    (FILL, dict(mask=HALF, mask_threshold=0), "mask_threshold: must be above 0 and at most 1"),
    (FILL, dict(mask=HALF, mask_threshold=1.5), "mask_threshold: must be above 0 and at most 1"),
    (FILL, dict(mask=HALF, mask_threshold=math.nan), "mask_threshold: must be above 0"),
    (FILL, dict(outpaint=(0, 0, 0, 0)), "outpaint: margins of 0, 0, 0, 0"),
    (FILL, dict(outpaint=(-16, 0, 0, 0)), "outpaint: margins of -16, 0, 0, 0"),
    (FILL, dict(outpaint=(9999, 0, 0, 9999)), "Use smaller margins."),
    (REDUX, dict(image_weights=(1.0, 1.0)), "image_weights: 2 values for 1 images. Pass one"),
    (REDUX, dict(image_weights=(math.nan,)), "image_weights: must be finite numbers."),
    (REDUX, dict(image_weights=(math.inf,)), "image_weights: must be finite numbers."),
    (KLEIN, dict(reference_limit=63), "reference_limit: must be at least 64 (got 63)"),
    (KLEIN, dict(reference_limit=-5), "reference_limit: must be at least 64 (got -5)"),
    (KLEIN, dict(match_image_size=0), "match_image_size: must be the number of an image, from 1 to 1"),
    (KONTEXT, dict(match_image_size=3), "match_image_size: must be the number of an image"),
    (KLEIN, dict(mask=Image.new("L", (70, 90), 255)), "mask: the mask of 70x90 for an image of 96x80"),
    (FILL, dict(mask=Image.new("L", (WIDTH, HEIGHT))), "mask: is all black"),
]
# fmt: on


@pytest.mark.parametrize("name, options, message", WRONG)
def test_wrong_value_is_refused(name, options, message):
    assert message in refusal(check, name, PHOTO, **options)


def test_too_small_and_too_long_images_are_refused_by_number():
    for name in ("flux.2-tiny", CANNY, KONTEXT, KLEIN, REDUX):
        before = () if name == CANNY else (PHOTO,)
        number = f"images: image {len(before) + 1} is "
        for size, words in (
            ((63, 90), "63x90: both sides must be at least 64 pixels"),
            ((1, 1), "1x1: both sides must be at least 64 pixels"),
            ((64, 513), "64x513: one side may be at most 8 times the other"),
            ((513, 64), "513x64: one side may be at most 8 times the other"),
        ):
            assert number + words in refusal(check, name, *before, *blank(size))


def test_control_photo_needs_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    message = refusal(check, CANNY, PHOTO, preprocess_control=True)
    assert "OpenCV, which is not installed. Run `pip install -e '.[control]'`" in message


def test_warnings_about_control_images_and_the_cache():
    with pytest.warns(UserWarning, match="has colors, .* white edges on black: .*photo, add `prep"):
        check(CANNY, PHOTO)
    with pytest.warns(UserWarning, match="not trained with `kv_cache=True`: .*an approximation"):
        check(KLEIN, PHOTO, kv_cache=True)
    with pytest.warns(UserWarning, match="not trained with `kv_cache=False`"):
        check(KV, PHOTO, kv_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(CANNY, GRAY_RGB)
        check(KV, PHOTO, kv_cache=True)
        check(KLEIN, PHOTO, kv_cache=False)


def test_pipeline_checks_its_images(zoo):
    """The pipeline runs this check too."""
    message = refusal(zoo.pipe(DEV), "a cat", pictures=ImageInputs((PHOTO,), strength=2))
    assert message == "strength: must be above 0 and at most 1 (got 2)."


# ---------------------------------------------------------------------------------------------------------- misuse

GREY = Image.fromarray(np.asarray(photo(WIDTH, HEIGHT))[..., 1])
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)  # 16 bits
ON_WHITE = Image.composite(photo(WIDTH, HEIGHT), Image.new("RGB", (WIDTH, HEIGHT), "white"), HALF)
SHOWN = {  # a picture, and what it shows
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
def test_pictures_in_any_mode_are_what_they_show(zoo, name, kind):
    """As those from files: Pillow's own conversion would make 16 bits white, and what is transparent black."""
    picture, shown = SHOWN[kind]
    expected = zoo.pipe(name).condition(ImageInputs((shown,))).tensors
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        given = zoo.pipe(name).condition(ImageInputs((picture,))).tensors
    assert given.keys() == expected.keys() and all(
        torch.equal(given[part], expected[part]) for part in given
    )
    told = ["transparent parts were put on white" in str(note.message) for note in notes]
    assert told == [True] * (kind == "transparent")


def test_masks_in_any_mode_are_what_they_show(zoo):
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
def test_masks_that_may_not_be_are_told(zoo, name, mask, words):
    assert words in refusal(
        zoo.pipe(name), "a cat", images=ImageInputs((photo(WIDTH, HEIGHT),), mask)
    )


@pytest.mark.parametrize("name", [DEV, KLEIN])
def test_a_mask_that_no_latent_sees_is_told(zoo, name):
    """It would change nothing but what the autoencoder changes."""
    thin = Image.new("L", (WIDTH, HEIGHT))
    thin.paste(255, (17, 0, 19, HEIGHT))
    assert "too thin: they fall between latents" in refusal(
        zoo.pipe(name), "a cat", images=ImageInputs((photo(WIDTH, HEIGHT),), thin)
    )


def test_a_picture_that_is_stretched_is_noted(zoo):
    given = ImageInputs((photo(WIDTH, HEIGHT),), strength=0.5)
    with pytest.warns(
        UserWarning, match=f"the image of {WIDTH}x{HEIGHT} is stretched to 64x128: leave"
    ):
        zoo.pipe(DEV).condition(given, 64, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.pipe(DEV).condition(given, 2 * WIDTH, 2 * HEIGHT)


@pytest.mark.parametrize("name", [FILL, CANNY, CANNY_LORA, REDUX])
def test_models_that_need_a_picture_say_so(zoo, name):
    pipe = zoo.pipe(name)
    assert refusal(pipe, "a cat") == f"images: {name} needs an image. Pass one."
    assert f"{name} takes" in refusal(pipe, "a cat", images=ImageInputs(()))


@pytest.mark.parametrize("name", [DEV, KLEIN])
def test_conditions_have_their_size(zoo, name):
    pipe, pictures = zoo.pipe(name), ImageInputs((photo(WIDTH, HEIGHT),))
    given = pipe.condition(pictures, 96, 80)
    for asked in (
        dict(width=64),
        dict(height=64),
        dict(width=64, height=64),
        dict(width=80, height=96),
    ):
        told = refusal(pipe, "a cat", images=given, **asked)
        assert told == "the pictures were made ready for 96x80: leave --width and --height out"
    (one,) = pipe("a cat", images=given, steps=1, width=96, height=80)
    (other,) = pipe("a cat", images=pictures, steps=1, width=96, height=80)
    assert one.tobytes() == other.tobytes()


def test_pictures_for_another_number_of_prompts_are_told(zoo):
    pipe, one = zoo.pipe(KLEIN), ImageInputs((photo(WIDTH, HEIGHT),))
    for prompts, pictures in (
        ("a cat", [one, one]),
        (["a cat"], ()),
        (["a cat", "a dog"], [one]),
        (["a cat"] * 2, (one,) * 3),
    ):
        count = 1 if isinstance(prompts, str) else len(prompts)
        words = f"there are {count} prompts, and pictures for {len(pictures)}: give ImageInputs for each"
        assert refusal(pipe, prompts, num_images=2, images=pictures) == words


# ---------------------------------------------------------------------------------------------------------- LoRAs

LAYER = "double_blocks.0.img_mlp.0"


def lora(path: Path, seed: int = 0) -> Path:
    tensors = {
        f"{LAYER}.lora_A.weight": random(4, 128, seed=seed),
        f"{LAYER}.lora_B.weight": random(512, 4, seed=seed + 1) / 9,
    }
    save_file(tensors, path)
    return path


def weights(pipe: Pipeline) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.transformer().state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def added(before: Tensor, *files: tuple[Path, float]) -> Tensor:
    """The layer's weight in float64 with what each file, at its scale, adds to it."""
    total = before.double()
    for path, scale in files:
        tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
        total = (
            total + scale * tensors[f"{LAYER}.lora_B.weight"] @ tensors[f"{LAYER}.lora_A.weight"]
        )
    return total


def test_same_lora_twice_is_told(zoo, tmp_path):
    pipe, file = loaded_anew(zoo, DEV), lora(tmp_path / "a.safetensors")
    before = weights(pipe)
    pipe.load_lora(file, 0.5)
    told = f"{file} is loaded already: give it once, or change its scale with set_lora_scale"
    assert refusal(pipe.load_lora, str(file), 0.7) == told
    now = weights(pipe)
    assert list(pipe.loras) == [file]
    assert (
        max_error(now[f"{LAYER}.weight"].double(), added(before[f"{LAYER}.weight"], (file, 0.5)))
        < 1e-6
    )
    assert same(
        *({n: x for n, x in state.items() if n != f"{LAYER}.weight"} for state in (before, now))
    )
    nowhere = tmp_path / "b.safetensors"
    assert (
        refusal(pipe.set_lora_scale, nowhere, 1.0) == f"{nowhere} is not loaded; loaded are: {file}"
    )
    pipe.unload_loras()
    assert same(weights(pipe), before)
    assert refusal(pipe.set_lora_scale, file, 1.0) == f"{file} is not loaded; loaded are: none"


def test_control_lora_is_for_its_own_rows(zoo):
    """It would widen the input of a model that is then given no picture."""
    zoo(CANNY_LORA)
    pipe, file = (
        loaded_anew(zoo, DEV),
        zoo.folder / "FLUX.1-Canny-dev-lora/flux1-canny-dev-lora.safetensors",
    )
    before = weights(pipe)
    told = refusal(pipe.load_lora, file, 0.85)
    assert told.startswith(
        f"{file} is for an input of 128 channels, which {DEV} does not have; if it is a control LoRA, use"
    )
    assert told.endswith(" flux.1-canny-dev-lora, flux.1-depth-dev-lora")
    fill = loaded_anew(zoo, "flux.1-fill-dev")  # whose 384 channels begin with other things
    assert (
        "which flux.1-fill-dev does not have" in refusal(fill.load_lora, file) and fill.loras == {}
    )
    assert pipe.loras == {} and same(weights(pipe), before)


def test_unloading_keeps_the_lora_of_the_row(zoo, tmp_path):
    pipe, file = loaded_anew(zoo, CANNY_LORA), lora(tmp_path / "a.safetensors")
    before, own = weights(pipe), list(pipe.loras)
    assert before["img_in.weight"].shape == (128, 128) and len(own) == 1
    pipe.load_lora(file)
    assert list(pipe.loras) == [*own, file] and not same(weights(pipe), before)
    pipe.unload_loras()
    assert list(pipe.loras) == own and same(weights(pipe), before)


def test_second_control_lora_is_refused_before_anything_is_merged(zoo, tmp_path):
    pipe = loaded_anew(zoo, CANNY_LORA)
    (own,), before = pipe.loras, weights(pipe)
    (other := tmp_path / "other.safetensors").write_bytes(own.read_bytes())
    assert refusal(pipe.load_lora, other).startswith(f"{other} and {own} replace the same weights")
    assert list(pipe.loras) == [own] and same(weights(pipe), before)


def test_lora_of_the_row_is_given_another_scale_and_not_loaded_twice(zoo, tmp_path):
    """By any name of its file; to its 0.85, nothing is added."""
    pipe = loaded_anew(zoo, CANNY_LORA)
    (own,) = pipe.loras
    base = load_file(zoo.folder / "FLUX.1-dev/flux1-dev.safetensors")[f"{LAYER}.weight"]
    assert max_error(weights(pipe)[f"{LAYER}.weight"].double(), added(base, (own, 0.85))) < 1e-6
    link = tmp_path / "linked.safetensors"
    link.symlink_to(own)
    for path, scale in (
        (own, 0.3),
        (str(own), -0.5),
        (own.parent / ".." / own.parent.name / own.name, 0.6),
        (link, 0.0),
    ):
        pipe.load_lora(path, scale)
        assert [(name, value) for name, (_, value) in pipe.loras.items()] == [(own, scale)]
        assert (
            max_error(weights(pipe)[f"{LAYER}.weight"].double(), added(base, (own, scale))) < 1e-6
        )


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_scale_that_is_not_finite_changes_nothing(zoo, tmp_path, scale):
    pipe, other = loaded_anew(zoo, CANNY_LORA), lora(tmp_path / "a.safetensors", seed=2)
    (own,), before = pipe.loras, weights(pipe)
    for call, path in ((pipe.set_lora_scale, own), (pipe.load_lora, own), (pipe.load_lora, other)):
        assert (
            refusal(call, path, scale)
            == f"--lora {path}:{scale}: the scale must be a finite number"
        )
        assert [(name, value) for name, (_, value) in pipe.loras.items()] == [(own, 0.85)] and same(
            weights(pipe), before
        )

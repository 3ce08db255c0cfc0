"""flux.siglip equals transformers' SiglipVisionModel and diffusers' Redux, to the bit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from flux.errors import UserError
from flux.parity.reference import (
    diffusers_redux,
    loaded,
    max_error,
    randomise,
    relative_l2,
    shapes,
    siglip_config,
    siglip_processor,
    transformers_siglip,
)
from flux.runtime.lazy_module import LazyModule
from flux.siglip import (
    Redux,
    ReduxConfig,
    SigLIP,
    SigLIPConfig,
    preprocess_for_siglip,
    siglip_ignore_keys,
)

# Four pixels are not used, as six of 384, and an eps large enough to change results.
TINY = SigLIPConfig(image_size=60, hidden_size=48, num_heads=4, mlp_size=80, depth=3, eps=1e-3)
TINY_REDUX = ReduxConfig(siglip_dim=48, hidden_dim=120, context_dim=40)


def build(kind: type[nn.Module], config, theirs: nn.Module) -> nn.Module:
    """Build ours with the reference's weights."""
    with torch.device("meta"):
        module = kind(config)
    return loaded(
        module,
        {
            name: tensor
            for name, tensor in theirs.state_dict().items()
            if not siglip_ignore_keys(name)
        },
    )


def random_pixels(batch: int, config: SigLIPConfig = TINY, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(batch, 3, config.image_size, config.image_size).uniform_(
        -1, 1, generator=generator
    )


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = torch.randint(
        256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(noise.numpy())


# ------------------------------------------------------------------ parity


@pytest.mark.parametrize("attention, tolerance", [("sdpa", 0), ("eager", 1e-6)])
@torch.no_grad()
def test_siglip_in_float32_equals_transformers(attention: str, tolerance: float):
    """To the bit with the same fused attention; without it, sums have another order."""
    theirs, pixels = randomise(transformers_siglip(TINY, attention)), random_pixels(3)
    expected = theirs(pixels).last_hidden_state
    ours = build(SigLIP, TINY, theirs)(pixels)
    assert ours.shape == (3, 16, 48) and max_error(ours, expected) <= tolerance


@torch.no_grad()
def test_siglip_in_bfloat16_equals_transformers():
    """To the bit, and near float32 arithmetic with the same weights."""
    theirs, pixels = randomise(transformers_siglip(TINY)).bfloat16(), random_pixels(3).bfloat16()
    expected, ours = theirs(pixels).last_hidden_state, build(SigLIP, TINY, theirs)(pixels)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected)
    assert 1e-3 < relative_l2(ours, build(SigLIP, TINY, theirs.float())(pixels.float())) < 2e-2


@torch.no_grad()
def test_image_does_not_depend_on_batch():
    model, pixels = build(SigLIP, TINY, randomise(transformers_siglip(TINY))), random_pixels(3)
    batch = model(pixels)
    for row in range(3):
        assert max_error(batch[row : row + 1], model(pixels[row : row + 1])) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_redux_equals_diffusers(dtype: torch.dtype):
    theirs = randomise(diffusers_redux(TINY_REDUX)).to(dtype)
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(build(Redux, TINY_REDUX, theirs)(x), theirs(x).image_embeds)


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900), seed=st.integers(0, 99))
def test_preprocessing_equals_transformers(width: int, height: int, seed: int):
    """To the bit, for images of any shape, smaller and larger than the square."""
    image = random_image(width, height, seed)
    expected = siglip_processor(384)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(preprocess_for_siglip(image), expected)


def test_every_level_equals_transformers():
    levels = (
        torch.arange(256, dtype=torch.uint8)
        .repeat_interleave(3 * 384 * 384 // 256)
        .reshape(384, 384, 3)
    )
    image = Image.fromarray(levels.numpy())
    pixels = preprocess_for_siglip(image)
    assert pixels.unique().numel() == 256 and (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(pixels, siglip_processor(384)(image, return_tensors="pt")["pixel_values"])


@torch.no_grad()
def test_tokens_of_an_image_equal_diffusers():
    from diffusers import FluxPriorReduxPipeline

    siglip, redux = randomise(transformers_siglip(TINY)), randomise(diffusers_redux(TINY_REDUX))
    pipe = FluxPriorReduxPipeline(siglip, siglip_processor(60), redux)
    image = random_image(130, 47)
    expected = pipe.image_embedder(pipe.encode_image(image, "cpu", 1)).image_embeds
    ours = build(Redux, TINY_REDUX, redux)(
        build(SigLIP, TINY, siglip)(preprocess_for_siglip(image, TINY.image_size))
    )
    assert ours.shape == (1, 16, 40) and torch.equal(ours, expected)


# ------------------------------------------------------------------ loading


def layouts() -> dict[str, dict[str, Tensor]]:
    """Return the tensors of files that hold one image encoder.

    The released names are those under `vision_model.`, or all of transformers' SiglipModel in
    google/siglip-so400m-patch14-384. transformers now saves the image encoder without a prefix.
    Early versions saved the numbers of positions too.
    """
    import transformers

    text = dict(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
    )
    config = transformers.SiglipConfig(
        text_config=text, vision_config=siglip_config(TINY).to_dict()
    )
    complete = dict(randomise(transformers.SiglipModel(config)).state_dict())
    released = {
        name: tensor for name, tensor in complete.items() if name.startswith("vision_model.")
    }
    return {
        "released": released,
        "complete": complete,
        "bare": {name.removeprefix("vision_model."): tensor for name, tensor in released.items()},
        "early": released | {"vision_model.embeddings.position_ids": torch.arange(16)[None]},
    }


def network(state: dict[str, Tensor], path: Path, dtype: torch.dtype = torch.float32) -> LazyModule:
    save_file(state, path)
    return LazyModule(
        SigLIP,
        TINY,
        [path],
        ignore_keys=siglip_ignore_keys,
        device=torch.device("cpu"),
        dtype=dtype,
    )


@pytest.mark.parametrize("layout", ["released", "complete", "bare", "early"])
@torch.no_grad()
def test_siglip_loads_from_a_file(tmp_path, layout: str):
    """Strictly: every tensor but the pooling head is read, and equals transformers' own."""
    state, pixels = layouts()[layout], random_pixels(2)
    assert any("head.probe" in name for name in state)
    ours = network(state, tmp_path / "model.safetensors")()
    theirs = transformers_siglip(TINY)
    names = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    loaded(theirs, {name: names[name] for name in theirs.state_dict()})
    assert all(torch.equal(tensor, names[name]) for name, tensor in ours.state_dict().items())
    assert torch.equal(ours(pixels), theirs(pixels).last_hidden_state)


@pytest.mark.parametrize("name", ["post_layernorm.bias", "embeddings.position_embedding.weight"])
def test_siglip_with_wrong_tensors_is_refused(tmp_path, name: str):
    state, path = layouts()["released"], tmp_path / "model.safetensors"
    tensor = state.pop("vision_model." + name)
    with pytest.raises(UserError, match=rf"1 missing \('{name}'\)"):
        network(state, path)
    with pytest.raises(UserError, match="1 misshapen"):
        network(state | {"vision_model." + name: tensor[1:].clone()}, path)
    with pytest.raises(UserError, match=r"1 unknown \('vision_model.post_layernorm.scale'\)"):
        network(
            state
            | {"vision_model." + name: tensor, "vision_model.post_layernorm.scale": torch.ones(1)},
            path,
        )


def test_redux_loads_from_a_file(tmp_path):
    theirs = randomise(diffusers_redux(TINY_REDUX))
    save_file(theirs.state_dict(), tmp_path / "redux.safetensors")
    options = dict(device=torch.device("cpu"), dtype=torch.bfloat16)
    ours = LazyModule(Redux, TINY_REDUX, [tmp_path / "redux.safetensors"], **options)()
    assert all(
        torch.equal(tensor, theirs.state_dict()[name].bfloat16())
        for name, tensor in ours.state_dict().items()
    )


# ------------------------------------------------------------------ full size


def test_full_size_siglip_equals_transformers():
    """Only the pooling head is left out.

    448 tensors and 428,225,600 parameters, head included, are what users of
    google/siglip-so400m-patch14-384 report. In bfloat16 they fill the 857 MB of the released
    `image_encoder/model.safetensors`.
    """
    with torch.device("meta"):
        ours, theirs = (
            SigLIP(SigLIPConfig()).state_dict(),
            transformers_siglip(SigLIPConfig()).state_dict(),
        )
    head = {name: tensor for name, tensor in theirs.items() if siglip_ignore_keys(name)}
    assert shapes(ours) == shapes(
        {name: tensor for name, tensor in theirs.items() if name not in head}
    )
    assert all(name.startswith("head.") for name in head)
    assert len(ours) + len(head) == 448
    assert sum(tensor.numel() for tensor in (*ours.values(), *head.values())) == 428_225_600


def test_full_size_redux_equals_diffusers():
    """The released file in bfloat16 has 129 MB."""
    with torch.device("meta"):
        ours, theirs = (
            Redux(ReduxConfig()).state_dict(),
            diffusers_redux(ReduxConfig()).state_dict(),
        )
    assert shapes(ours) == shapes(theirs)
    assert set(ours) == {"redux_up.weight", "redux_up.bias", "redux_down.weight", "redux_down.bias"}
    assert round(2e-6 * sum(tensor.numel() for tensor in ours.values())) == 129


def test_full_size_image_has_729_tokens():
    with torch.device("meta"):
        tokens = Redux(ReduxConfig())(SigLIP(SigLIPConfig())(torch.empty(1, 3, 384, 384)))
    assert tokens.shape == (1, 729, 4096)


def test_defaults_that_no_shape_shows():
    """From config.json of google/siglip-so400m-patch14-384; eps from transformers' default."""
    config = SigLIPConfig()
    assert (config.image_size, config.num_heads, config.eps) == (384, 16, 1e-6)

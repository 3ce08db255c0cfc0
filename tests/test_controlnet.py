"""flux.controlnet against diffusers' FluxControlNetModel, live, in both layouts of files."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import flux
from flux.configs import MODELS
from flux.controlnet import ControlNet, load_controlnet, spread
from flux.errors import RefusedError, UserError
from flux.parity.reference import (
    diffusers_transformer,
    loaded,
    max_error,
    randomise,
    transformer_to_diffusers,
)
from flux.safety.filters import Filters
from flux.safety.verdict import Verdict
from flux.sampling import image_ids, text_ids
from flux.transformer import Flux
from flux.weights.inspection import inspect

C = MODELS["flux.1-tiny"].transformer
LAYOUTS = {  # depth, single blocks, guidance, modes, hint
    "instantx": (2, 1, True, 0, False),
    "instantx union": (1, 2, False, 3, False),
    "xlabs": (2, 0, True, 0, True),
}


def theirs(layout):
    """diffusers' network with random weights."""
    from diffusers import FluxControlNetModel

    depth, single, guidance, modes, hint = LAYOUTS[layout]
    return randomise(
        FluxControlNetModel(
            in_channels=C.in_channels,
            num_layers=depth,
            num_single_layers=single,
            attention_head_dim=C.hidden_size // C.num_heads,
            num_attention_heads=C.num_heads,
            joint_attention_dim=C.context_dim,
            pooled_projection_dim=C.vector_dim,
            guidance_embeds=guidance,
            axes_dims_rope=list(C.axes_dim),
            num_mode=modes or None,
            conditioning_embedding_channels=16 if hint else None,
            patch_size=2 if hint else 1,
        )
    )


def xlabs_names(model, path):
    """Write diffusers' weights under XLabs' names: BFL's for the blocks."""
    config = replace(C, depth=2, depth_single=0, guidance=True)
    ours = ControlNet(config, hint=True)
    state = dict(model.state_dict())
    renamed = {}
    for name in Flux(config).state_dict():  # joined by the inverse of the parity map
        if name.startswith("final_layer"):
            continue
        parts = transformer_to_diffusers({name: ours.state_dict()[name]}, config)
        renamed[name] = torch.cat([state.pop(part) for part in parts])
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer.startswith("input_hint_block."):
            part = layer.partition(".")[2]
            index = {"conv_in": 0, "conv_out": 14}.get(part) or (
                0 if part == "conv_in" else 2 * int(part.removeprefix("blocks.")) + 2
            )
            layer = f"input_hint_block.{index}"
        renamed[f"{layer.replace('controlnet_x_embedder', 'pos_embed_input')}.{leaf}"] = tensor
    save_file({name: x.contiguous() for name, x in renamed.items()}, path)


@pytest.fixture(scope="module")
def pipe():
    return flux.load("flux.1-tiny", device="cpu", fast=False)


def write(model, layout, path):
    xlabs_names(model, path) if LAYOUTS[layout][4] else save_file(model.state_dict(), path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_controlnet_equals_diffusers(pipe, layout, tmp_path):
    """The residuals to the bit, and the velocity of the transformer that adds them."""
    model = theirs(layout)
    hint, modes = LAYOUTS[layout][4], LAYOUTS[layout][3]
    path = tmp_path / "controlnet.safetensors"
    write(model, layout, path)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 255, (64, 96, 3), generator=generator).byte()
    image = Image.fromarray(pixels.numpy())
    control = load_controlnet(path, pipe)
    mode = 2 if modes else None

    features = pipe.encode(["a red circle", "a blue star"])
    x = torch.randn(2, 24, C.in_channels, generator=generator)
    ids = image_ids(4, 6, 3), text_ids(features.tokens.shape[1], 3)
    t, guidance = torch.tensor([0.7, 0.7]), torch.tensor([3.0, 3.0])
    given = control.residuals(image, scale=0.8, mode=mode)(
        x, ids[0], features.tokens, ids[1], t, guidance, features.pooled
    )
    if hint:
        cond = torch.from_numpy(pixels.numpy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    else:
        cond = pipe.to_latents(image).flatten(2).mT
    double, single = model(
        hidden_states=x,
        controlnet_cond=cond.expand(2, *cond.shape[1:]),
        controlnet_mode=torch.full((2, 1), 2) if modes else None,
        conditioning_scale=0.8,
        encoder_hidden_states=features.tokens,
        pooled_projections=features.pooled,
        timestep=t,
        img_ids=ids[0],
        txt_ids=ids[1],
        guidance=guidance if LAYOUTS[layout][2] else None,
        return_dict=False,
    )
    wanted = spread(double, C.depth, repeat=hint), spread(single or [], C.depth_single)
    for ours, expected in zip(given, wanted):
        assert len(ours) == len(expected)
        for a, b in zip(ours, expected):
            assert a is b is None or torch.equal(a, b)
    refuse = SimpleNamespace(judge=lambda image: Verdict("judge", 1.0, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "filters", Filters(nsfw=refuse))
        with pytest.raises(RefusedError):
            control.residuals(image)

    transformer = loaded(
        diffusers_transformer(C), transformer_to_diffusers(pipe.transformer().state_dict(), C)
    )
    expected = transformer(
        hidden_states=x,
        encoder_hidden_states=features.tokens,
        pooled_projections=features.pooled,
        timestep=t,
        img_ids=ids[0],
        txt_ids=ids[1],
        guidance=guidance,
        controlnet_block_samples=double,
        controlnet_single_block_samples=single,
        controlnet_blocks_repeat=hint,
        return_dict=False,
    )[0]
    velocity = pipe.velocity(
        features, 96, 64, guidance=3.0, residuals=control.residuals(image, scale=0.8, mode=mode)
    )
    ours = velocity(x.mT.unflatten(2, (4, 6)), 0.7).flatten(2).mT
    assert torch.equal(ours, expected)
    plain = pipe.velocity(features, 96, 64, guidance=3.0)(x.mT.unflatten(2, (4, 6)), 0.7)
    assert max_error(ours, plain.flatten(2).mT) > 0.01


def test_wrong_files_and_models_are_refused(pipe, tmp_path):
    path = pipe.files["transformer"][0]
    with pytest.raises(UserError, match="is no ControlNet in InstantX's or XLabs' layout"):
        load_controlnet(path, pipe)
    with pytest.raises(UserError, match="is a ControlNet of FLUX.1, not of flux.2-tiny"):
        load_controlnet(path, flux.load("flux.2-tiny", device="cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspection_tells_the_network_and_its_models(layout, tmp_path):
    depth, single, _, modes, hint = LAYOUTS[layout]
    write(theirs(layout), layout, tmp_path / "x.safetensors")
    found = dict(inspect(tmp_path / "x.safetensors").lines)
    assert found["kind"] == "a ControlNet" and "refused" not in found
    assert found["fits"] == "flux.1-tiny; scripts/examples/controlnet.py reads it"
    assert found["network"].startswith(f"{depth} double and {single} single blocks of width 128")
    assert ("as pixels" if hint else "as latents") in found["network"]
    assert (f", {modes} modes" in found["network"]) == bool(modes)


def test_sizes_of_no_model_are_refused_by_loading_and_inspection(pipe, tmp_path):
    state = theirs("instantx").state_dict()
    path, name = tmp_path / "x.safetensors", "controlnet_x_embedder.weight"
    for wrong, message in (
        ({name: torch.ones(3)}, "is no ControlNet in InstantX's or XLabs' layout"),
        ({name: torch.ones(128, 68)}, "is a ControlNet of 68 channels, but flux.1-"),
        ({"controlnet_blocks.99999999999.bias": torch.ones(128)}, "does not fit ControlNet"),
    ):
        save_file(state | wrong, path)
        with pytest.raises(UserError, match=message):
            load_controlnet(path, pipe)
        assert message in dict(inspect(path).lines)["refused"]

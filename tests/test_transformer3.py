"""flux.transformer3 against diffusers' transformer, live, with the same random weights.

bfloat16 is equal to the bit. float32 is, too, where the modulation is computed for every token, as
diffusers does: a product with one row for a mode sums in another order than one with many rows.
"""

from dataclasses import replace

import pytest
import torch
from support.transformer3_inputs import grid, inputs
from torch import Tensor, nn

from flux.parity.reference import FLUX3_TINY, loaded, max_error, randomise, relative_l2, shapes
from flux.parity.reference3 import (
    diffusers_transformer3,
    diffusers_velocity3,
    transformer3_to_diffusers,
)
from flux.transformer3 import BLOCK_LISTS, Flux3, Flux3Config, modulate, timestep_embedding
from flux.weights.diffusers_names3 import diffusers_layer, our_layer

FLOW_MAP = replace(FLUX3_TINY, flow_map=True)
either_model = pytest.mark.parametrize("config", [FLUX3_TINY, FLOW_MAP], ids=["base", "flow map"])
with_references = pytest.mark.parametrize("references", [False, True], ids=["text", "references"])


def model(config: Flux3Config, modulation_dtype: torch.dtype | None = torch.float32) -> Flux3:
    return randomise(Flux3(config, modulation_dtype))


def reference(ours: Flux3) -> nn.Module:
    """diffusers' model with our weights. It keeps the scales of QK-norm in float32."""
    state = transformer3_to_diffusers(ours.state_dict())
    wide = {name: x.float() if ".norm_" in name else x for name, x in state.items()}
    return loaded(diffusers_transformer3(ours.config), wide)


def per_token(ours: Flux3, batch: dict[str, Tensor]) -> Tensor:
    """Compute the velocity with a conditioning vector for each token."""
    t, target = batch["t"], batch.get("target")
    vec, vec_0 = ours.vec(t, target), ours.vec(torch.zeros_like(t), target)

    def stream(mode, tokens, ids):
        return ours.stream(mode, tokens, ours.rope(ids), vec_0.expand(-1, tokens.shape[1], -1))

    streams = [stream("txt", batch["txt"], batch["txt_ids"])]
    if "references" in batch:
        streams.append(stream("image_cond", batch["references"], batch["reference_ids"]))
    img = batch["img"]
    rope = ours.rope(batch["img_ids"])
    return ours.denoise(img, rope, vec.expand(-1, img.shape[1], -1), *streams)


# ------------------------------------------------------------------ parity


@either_model
@with_references
@torch.no_grad()
def test_float32_equals_diffusers(config, references):
    """Seen without a vector for each token: 2e-7 to 4e-7."""
    ours, batch = model(config), inputs(config, references=references)
    expected = diffusers_velocity3(reference(ours), **batch)
    assert expected.shape == batch["img"].shape and expected.std() > 0.5
    assert torch.equal(per_token(ours, batch), expected)
    assert relative_l2(ours(**batch), expected) <= 2e-6


@either_model
@with_references
@torch.no_grad()
def test_bfloat16_equals_diffusers_with_its_modulation(config, references):
    ours, batch = model(config, None).bfloat16(), inputs(config, torch.bfloat16, references)
    expected = diffusers_velocity3(reference(ours), **batch)
    assert torch.equal(ours(**batch), expected) and torch.equal(per_token(ours, batch), expected)


@either_model
@torch.no_grad()
def test_bfloat16_is_closer_to_float32_with_modulation_in_float32(config):
    """Against float32 arithmetic on the same weights and inputs, whose times are rounded alike.

    Seen: 0.0057 and 0.0063 of base, 0.0065 and 0.0068 of the flow map.
    """
    batch = inputs(config, torch.bfloat16)
    wide = {name: value.float() for name, value in batch.items()}
    for name in ("t", "target"):  # 1000 t as bfloat16 has it
        if name in wide:
            wide[name] = (1000 * batch[name].bfloat16()).float() / 1000
    truth = model(config).bfloat16().float()(**wide)
    exact, narrow = (model(config, dtype).bfloat16()(**batch) for dtype in (torch.float32, None))
    assert exact.dtype == torch.bfloat16 and not torch.equal(exact, narrow)
    assert 1e-3 < relative_l2(exact, truth) < relative_l2(narrow, truth) <= 0.02


def test_modulation_is_computed_in_the_given_dtype():
    x, shift, scale = torch.randn(
        3, 2, 5, 16, generator=torch.Generator().manual_seed(0)
    ).bfloat16()
    wide, mean = x.double(), x.double().mean(-1, keepdim=True)
    variance = (wide - mean).square().mean(-1, keepdim=True)
    norm = (wide - mean) / (variance + 1e-6).sqrt()
    expected = (norm * (1 + scale.double()) + shift.double()).bfloat16()
    assert torch.equal(modulate(x, shift, scale, torch.float32), expected)
    assert torch.equal(
        modulate(x, shift, scale, torch.bfloat16), (1 + scale) * norm.bfloat16() + shift
    )


@torch.no_grad()
def test_time_is_rounded_after_the_product():
    """Literals: what the embedding sees of the times of 16 steps, as diffusers rounds them."""
    ours, seen = model(FLUX3_TINY).bfloat16(), []
    times = torch.tensor([0.9904717, 0.9798021, 0.9677731, 0.9541074, 0.6978852, 0.3160055])
    ours.time_in.in_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ours.vec(times)
    expected = torch.tensor([992.0, 980, 968, 952, 700, 316])
    assert torch.equal(seen[0], timestep_embedding(expected).bfloat16())


# ------------------------------------------------------------------ properties


@torch.no_grad()
def test_streams_of_text_and_references_do_not_depend_on_the_time_of_a_base_model():
    """A run computes them once. A flow map's depend on the target."""
    ours, batch = model(FLUX3_TINY), inputs(FLUX3_TINY)
    zero = ours.vec(torch.zeros(2))
    text = ours.stream("txt", batch["txt"], ours.rope(batch["txt_ids"]), zero)
    rope = ours.rope(batch["reference_ids"])
    images = ours.stream("image_cond", batch["references"], rope, zero)
    rope = ours.rope(batch["img_ids"])
    for t in ([0.9, 0.7], [0.2, 0.0]):
        batch["t"] = torch.tensor(t)
        kept = ours.denoise(batch["img"], rope, ours.vec(batch["t"]), text, images)
        assert torch.equal(kept, ours(**batch))
    flow_map, outs, rope = model(FLOW_MAP), [], ours.rope(batch["txt_ids"])
    for target in (0.5, 0.6):
        zero = flow_map.vec(torch.zeros(2), torch.full((2,), target))
        outs.append(flow_map.stream("txt", batch["txt"], rope, zero).x)
    assert max_error(*outs) > 0.01


@either_model
@torch.no_grad()
def test_row_does_not_depend_on_its_batch(config):
    ours, batch = model(config), inputs(config)
    both = ours(**batch)
    for row in range(2):
        one = {n: x if n.endswith("ids") else x[row : row + 1] for n, x in batch.items()}
        assert max_error(ours(**one), both[row : row + 1]) <= 2e-6


@torch.no_grad()
def test_only_differences_of_positions_matter():
    """To image tokens: a shift of all positions leaves the velocity as it is."""
    ours, batch = model(FLUX3_TINY), inputs(FLUX3_TINY)
    expected = ours(**batch)
    shifted = batch | {n: x + torch.tensor([3, 5, 2, 7]) for n, x in batch.items() if "ids" in n}
    assert max_error(ours(**shifted), expected) <= 1e-5
    halved = batch | {"img_ids": batch["img_ids"] / 2}
    assert max_error(ours(**halved), expected) > 0.01


@either_model
@torch.no_grad()
def test_every_parameter_and_every_input_changes_the_velocity(config):
    ours, batch = model(replace(config, depth=1, depth_single=1)), inputs(config)
    expected = ours(**batch)
    for name, parameter in ours.named_parameters():
        before = parameter.clone()
        parameter.mul_(1.3).add_(0.05)
        assert not torch.equal(ours(**batch), expected), name
        parameter.copy_(before)
    for name, value in batch.items():
        changed = value.clone()
        changed[-1] += 0.25
        assert not torch.equal(ours(**batch | {name: changed}), expected), name


@torch.no_grad()
def test_reference_tokens_are_told_apart_by_ids_alone():
    ours, batch = model(FLUX3_TINY), inputs(FLUX3_TINY)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    turned = {
        n: batch[n][:, order] if n == "references" else batch[n][order]
        for n in ("references", "reference_ids")
    }
    expected = ours(**batch)
    assert max_error(ours(**batch | turned), expected) <= 5e-6
    other = {"references": turned["references"]}
    assert max_error(ours(**batch | other), expected) > 0.01


def test_target_is_demanded_by_flow_maps_alone():
    for config in (FLUX3_TINY, FLOW_MAP):
        batch = inputs(config)
        batch["target"] = None if config.flow_map else torch.tensor([0.5, 0.5])
        with pytest.raises(ValueError, match="^target: is needed by flow maps"):
            model(config)(**batch)
    for name in ("references", "reference_ids"):
        batch = inputs(FLUX3_TINY)
        del batch[name]
        with pytest.raises(ValueError, match="^reference_ids: are the positions"):
            model(FLUX3_TINY)(**batch)


def test_gradients_reach_every_parameter():
    ours = Flux3(FLOW_MAP)
    ours(**inputs(FLOW_MAP)).square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# ------------------------------------------------------------------ names and sizes


@pytest.mark.parametrize(
    ("flow_map", "tensors", "parameters"),
    [(False, 357, 5_538_458_368), (True, 359, 5_548_681_984)],
    ids=["base", "flow map"],
)
def test_full_size_has_the_published_counts_and_diffusers_tensors(flow_map, tensors, parameters):
    config = Flux3Config(flow_map=flow_map)
    with torch.device("meta"):
        ours = Flux3(config)
    state = ours.state_dict()
    assert (len(state), sum(x.numel() for x in state.values())) == (tensors, parameters)
    assert sum(x.ndim == 1 for x in state.values()) == 86
    theirs = diffusers_transformer3(config).state_dict()
    assert shapes(transformer3_to_diffusers(state)) == shapes(theirs)
    blocks = [ours.get_submodule(path) for path in BLOCK_LISTS]
    assert [len(block) for block in blocks] == [5, 5, 5, 28]
    assert sum(x.numel() for x in blocks[3][0].state_dict().values()) == 122_683_648


def test_names_turn_into_diffusers_and_back():
    with torch.device("meta"):
        layers = {name.rpartition(".")[0] for name in Flux3(FLOW_MAP).state_dict()}
    assert all(our_layer(diffusers_layer(layer)) == layer for layer in layers)
    assert len(set(map(diffusers_layer, layers))) == len(layers)
    assert diffusers_layer("controlnet.0") == our_layer("controlnet.0") == "controlnet.0"


def test_halved_positions_of_the_inputs():
    assert grid(2, 2, 1).tolist() == [
        [0, 0, 0, -1],
        [0, 0, 0.5, -1],
        [0, 0.5, 0, -1],
        [0, 0.5, 0.5, -1],
    ]

"""flux.lora.names and formats: the layouts of more tools, made by rule; nothing is merged twice.

The reference: W + alpha/r · BA in float64, in the rows that the rule states.
"""

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from support.lora_files import control_lora, random
from support.lora_layouts import LAYOUTS, layout, linears
from support.weight_files import hollow, refusal, saved
from torch import Tensor, nn

from flux.clip import CLIP
from flux.configs import MODELS
from flux.language_model import LanguageModel
from flux.lora.formats import match_layers, read_lora
from flux.lora.merge import merge
from flux.parity.reference import (
    FLUX1_TINY,
    FLUX2_TINY,
    TINY_CLIP,
    TINY_QWEN,
    TINY_T5,
    max_error,
    randomise,
)
from flux.t5 import T5
from flux.transformer import Flux

CONFIGS = {
    family: replace(config, depth=1, depth_single=1)
    for family, config in (("flux.1", FLUX1_TINY), ("flux.2", FLUX2_TINY))
}
NARROW = {"hidden_size": 32, "num_heads": 1, "depth": 2}
SCALE = 0.7


def merged(module: nn.Module, file, part: str = "transformer", strict: bool = True) -> nn.Module:
    deltas = match_layers(read_lora(file), {part: module}, strict)
    merge(module, [(delta, SCALE) for delta in deltas])
    return module


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.double().clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    "family, name",
    [
        (family, name)
        for family in CONFIGS
        for name in LAYOUTS
        if family == "flux.1" or "fused" not in name
    ],
)
def test_layout_of_another_tool_gives_the_same_sum(tmp_path, family, name):
    network = randomise(Flux(replace(CONFIGS[family], **NARROW)))
    tensors, parts = layout(name, network, random)
    expected = state(network)
    for path, (start, stop), a, b, scaling in parts.values():
        expected[f"{path}.weight"][start:stop] += SCALE * scaling * (b.double() @ a.double())
    merged(network, saved(tmp_path / "x.safetensors", tensors))
    for key, tensor in network.state_dict().items():
        assert max_error(tensor.double(), expected[key]) < 1e-6, key


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_matches_the_layers_of_the_released_models(tmp_path, name):
    families = ["flux.1-dev"] if "fused" in name else ["flux.1-dev", "flux.2-klein-4b"]
    for family in families:
        with torch.device("meta"):
            network = Flux(MODELS[family].transformer)
            tensors, parts = layout(name, network, lambda *shape, **_: torch.empty(shape))
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        file = hollow(tmp_path / "x.safetensors", shapes)
        deltas = match_layers(read_lora(file), {"transformer": network})
        found = sorted((delta.target.path, *delta.target.rows) for delta in deltas)
        assert found == sorted((path, rows) for path, rows, *_ in parts.values())


# ------------------------------------------------------------------ single tensors

PROJ, QKV = "double_blocks.0.img_attn.proj", "double_blocks.0.img_attn.qkv"
A, B = random(4, 128, seed=1), random(128, 4, seed=2, size=0.1)
BA = B.double() @ A.double()


def down_up(name: str, a: Tensor = A, b: Tensor = B, **more: Tensor) -> dict[str, Tensor]:
    pair = {f"{name}.lora_down.weight": a.clone(), f"{name}.lora_up.weight": b.clone()}
    return pair | {f"{name}.{end}": tensor for end, tensor in more.items()}


def added(tmp_path, tensors: dict[str, Tensor], layer: str, kind: str = "flux.1") -> Tensor:
    """Return what the file adds to a weight at scale 1, in float64."""
    network = Flux(CONFIGS[kind]).double()
    randomise(network)
    before = state(network)[f"{layer}.weight"]
    file = saved(tmp_path / "x.safetensors", tensors)
    deltas = match_layers(read_lora(file), {"transformer": network})
    merge(network, [(delta, 1.0) for delta in deltas])
    return network.get_submodule(layer).weight - before


def test_parts_of_one_layer_share_its_alpha(tmp_path):
    """sd-scripts, in the middle of a training: a list of factors for q, k, v and the MLP."""
    name, a, b, expected = "lora_unet_single_blocks_0_linear1", {}, {}, []
    for i, rows in enumerate((128, 128, 128, 512)):
        a[i], b[i] = random(3, 128, seed=i), random(rows, 3, seed=9 + i, size=0.1)
        expected.append(6 / 3 * (b[i].double() @ a[i].double()))
    tensors = {f"{name}.lora_down.{i}.weight": a[i] for i in a}
    tensors |= {f"{name}.lora_up.{i}.weight": b[i] for i in b}
    tensors[f"{name}.alpha"] = torch.tensor(6.0)
    found = added(tmp_path, tensors, "single_blocks.0.linear1")
    assert max_error(found, torch.cat(expected)) < 1e-12


@pytest.mark.parametrize("alpha", [8, 8.0, [8.0], [[8.0]]])
def test_alpha_of_one_element_has_any_shape(tmp_path, alpha):
    found = added(tmp_path, down_up(PROJ, A, B, alpha=torch.tensor(alpha)), PROJ)
    assert max_error(found, 2 * BA) < 1e-12


def test_scalar_is_a_factor(tmp_path):
    more = {"alpha": torch.tensor(8.0), "scalar": torch.tensor([0.3])}
    assert max_error(added(tmp_path, down_up(PROJ, A, B, **more), PROJ), 0.6 * BA) < 1e-7


@pytest.mark.parametrize("end", ["magnitude", "lora_magnitude_vector.style.weight", "dora_scale"])
def test_magnitude_of_dora_has_many_names(tmp_path, end):
    weight = state(randomise(Flux(CONFIGS["flux.1"]).double()))[f"{PROJ}.weight"]
    magnitude = 1 + random(128).square()
    key = f"diffusion_model.{PROJ}"
    tensors = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B, f"{key}.{end}": magnitude}
    changed = weight + BA
    lengths = changed.norm(dim=1, keepdim=True)
    expected = magnitude[:, None].double() * changed / lengths - weight
    assert max_error(added(tmp_path, tensors, PROJ), expected) < 1e-12


NORM = "double_blocks.0.img_attn.norm.key_norm"


@pytest.mark.parametrize(
    "key",
    [
        f"lycoris_{NORM.replace('.', '_')}.w_norm",
        f"diffusion_model.{NORM}.scale.diff",
        f"diffusion_model.{NORM}.diff",
        "transformer.transformer_blocks.0.attn.norm_k.weight.diff",
    ],
)
def test_change_of_a_norm_is_added(tmp_path, key):
    network = randomise(Flux(CONFIGS["flux.1"]))
    change, before = random(32), state(network)[f"{NORM}.scale"]
    merged(network, saved(tmp_path / "x.safetensors", {key: change}))
    assert max_error(state(network)[f"{NORM}.scale"], before + SCALE * change.double()) < 1e-7


def test_biases_of_norms_are_added(tmp_path):
    clip = randomise(CLIP(TINY_CLIP))
    name, before = "text_model.encoder.layers.0.layer_norm1", state(clip)
    w, b = random(24), random(24, seed=3)
    key = f"lycoris_{name.replace('.', '_')}"
    merged(
        clip, saved(tmp_path / "x.safetensors", {f"{key}.w_norm": w, f"{key}.b_norm": b}), "clip"
    )
    for end, change in (("weight", w), ("bias", b)):
        expected = before[f"{name}.{end}"] + SCALE * change.double()
        assert max_error(state(clip)[f"{name}.{end}"], expected) < 1e-7


@pytest.mark.parametrize("norm", ["_norm.scale.set_weight", "_norm.set_weight"])
def test_control_lora_of_comfyui_is_that_of_black_forest_labs(tmp_path, norm):
    network = randomise(Flux(CONFIGS["flux.1"]))
    theirs = control_lora(tmp_path / "bfl.safetensors", network)
    tensors = {
        "diffusion_model."
        + key.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", norm): tensor
        for key, tensor in read_lora(theirs).tensors.items()
    }
    tensors["diffusion_model.img_in.reshape_weight"] = torch.tensor([128, 128])
    file = saved(tmp_path / "comfy.safetensors", tensors)
    expected = merged(randomise(Flux(CONFIGS["flux.1"])), theirs)
    assert torch.equal(merged(network, file).img_in.weight, expected.img_in.weight)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[key]), key
    wrong = saved(
        tmp_path / "w.safetensors",
        tensors | {"diffusion_model.img_in.reshape_weight": torch.tensor([128, 64])},
    )
    assert "reshape_weight" in refusal(merged, randomise(Flux(CONFIGS["flux.1"])), wrong)


def test_set_weight_replaces_a_matrix_whole(tmp_path):
    network, new = randomise(Flux(CONFIGS["flux.1"])), random(64, 128)
    key = "diffusion_model.final_layer.linear.set_weight"
    merged(network, saved(tmp_path / "x.safetensors", {key: new}))
    assert torch.equal(network.final_layer.linear.weight, new)
    part = "transformer.transformer_blocks.0.attn.to_k.set_weight"
    file = saved(tmp_path / "y.safetensors", {part: random(128, 128)})
    assert "replaces a part of double_blocks.0.img_attn.qkv" in refusal(merged, network, file)


# ------------------------------------------------------------------ rotations and GLoRA


def cayley(q: Tensor) -> Tensor:
    eye = torch.eye(len(q), dtype=torch.float64)
    return (eye + q) @ torch.linalg.inv(eye - q)


@pytest.mark.parametrize("alpha", [0.0, 1e-4])
def test_oft_turns_the_rows(tmp_path, alpha):
    """sd-scripts: R transposed times W by blocks, and a largest norm of alpha · rows."""
    weight = state(randomise(Flux(CONFIGS["flux.1"]).double()))[f"{PROJ}.weight"]
    blocks = random(4, 32, 32, size=0.02)
    q = (blocks - blocks.mT).double()
    norm, limit = q.flatten().norm().item(), alpha * 128
    assert norm > limit
    q = q * limit / norm if alpha else q
    expected = torch.block_diag(*(cayley(block).T for block in q)) @ weight - weight
    name = f"oft_unet_{PROJ.replace('.', '_')}"
    for key in ("oft_blocks", "oft_blocks.0"):
        tensors = {f"{name}.{key}": blocks, f"{name}.alpha": torch.tensor(alpha)}
        assert max_error(added(tmp_path, tensors, PROJ), expected) < 1e-6
    rescale = 1 + random(128, 1, size=0.1)
    tensors = {f"lycoris_{PROJ.replace('.', '_')}.{end}": x for end, x in (
        ("oft_blocks", blocks), ("rescale", rescale), ("alpha", torch.tensor(alpha)),
    )}  # fmt: skip
    expected = rescale.double() * (expected + weight) - weight
    assert max_error(added(tmp_path, tensors, PROJ), expected) < 1e-6


def test_oft_of_parts_turns_the_rows_of_each(tmp_path):
    weight = state(randomise(Flux(CONFIGS["flux.1"]).double()))[f"{QKV}.weight"]
    name, turns, tensors = f"oft_unet_{QKV.replace('.', '_')}", [], {}
    for i in range(3):
        blocks = random(2, 64, 64, seed=i, size=0.02)
        tensors[f"{name}.oft_blocks.{i}"] = blocks
        turns += [cayley((block - block.T).double()).T for block in blocks]
    tensors[f"{name}.alpha"] = torch.tensor(1e-4)
    turned = torch.block_diag(*turns) @ weight
    found = added(tmp_path, tensors, QKV)
    assert max_error(found, turned - weight) > 0.5  # alpha limits the norm
    tensors[f"{name}.alpha"] = torch.tensor(9.0)
    assert max_error(added(tmp_path, tensors, QKV), turned - weight) < 1e-6


def test_boft_turns_the_rows_in_stages(tmp_path):
    """LyCORIS: stage i mixes, in each block, pairs of rows that are 2^i · n/2 rows apart."""
    weight = state(randomise(Flux(CONFIGS["flux.1"]).double()))[f"{PROJ}.weight"]
    blocks, n, turned = random(3, 16, 8, 8, size=0.03), 8, weight
    for i, stage in enumerate((blocks - blocks.mT).double()):
        far, rows = 2**i * n // 2, []
        for start, near in itertools.product(range(0, 128, 2 * far), range(far)):
            rows += [start + near, start + near + far]
        mixed = torch.block_diag(*map(cayley, stage)) @ turned[rows]
        turned = turned.clone()
        turned[rows] = mixed
    tensors = {f"lycoris_{PROJ.replace('.', '_')}.oft_blocks": blocks}
    assert max_error(added(tmp_path, tensors, PROJ), turned - weight) < 1e-6


def test_oft_of_onetrainer_may_be_scaled(tmp_path):
    weight = state(randomise(Flux(CONFIGS["flux.1"]).double()))[f"{PROJ}.weight"]
    vectors = random(8, 120, size=0.2)
    tensors = {f"transformer.{PROJ}.oft_R.weight": vectors}
    tensors |= {f"transformer.{PROJ}.oft_R.scaled_oft": torch.tensor(True)}
    turns = []
    for vector in vectors.double() / (2 * math.sqrt(15)):
        q = torch.zeros(16, 16, dtype=torch.float64)
        q[tuple(torch.triu_indices(16, 16, 1))] = vector
        q = q - q.T
        turns.append(torch.eye(16) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    expected = weight @ torch.block_diag(*turns).T - weight
    assert max_error(added(tmp_path, tensors, PROJ), expected) < 1e-6
    other = {f"transformer.{PROJ}.oft_R.clipped_oft": torch.tensor(0.5)}
    message = refusal(added, tmp_path, tensors | other, PROJ)
    assert "clipped_oft" in message and "is not known" in message


@pytest.mark.parametrize("old", [False, True])
def test_glora_changes_by_a_product_of_the_weight(tmp_path, old):
    layer = "double_blocks.0.img_mlp.0"
    weight = state(randomise(Flux(CONFIGS["flux.1"]).double()))[f"{layer}.weight"]
    a1, a2 = random(128, 4, seed=1, size=0.1), random(4, 128, seed=2, size=0.1)
    b1, b2 = random(512, 4, seed=3, size=0.1), random(4, 128, seed=4, size=0.1)
    expected = 6 / 4 * (weight @ a1.double() @ a2.double() + b1.double() @ b2.double())
    if old:
        a1, a2, b1, b2 = a2, a1, b2, b1
    ends = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    tensors = {f"lycoris_{layer.replace('.', '_')}.{end}": x for end, x in ends.items()}
    tensors |= {f"lycoris_{layer.replace('.', '_')}.alpha": torch.tensor(6.0)}
    assert max_error(added(tmp_path, tensors, layer), expected) < 1e-6


def test_rotation_that_does_not_fit_is_refused(tmp_path):
    name = f"oft_unet_{PROJ.replace('.', '_')}"
    for shape in ((4, 31, 31), (4, 32, 31), (3, 32, 32), (32, 32), (2, 4, 8, 8)):
        message = refusal(added, tmp_path, {f"{name}.oft_blocks": random(*shape)}, PROJ)
        assert "oft_blocks" in message and str(shape) in message, message
    for shape in ((8, 119), (7, 120), (120,)):
        message = refusal(added, tmp_path, {f"{name}.oft_R.weight": random(*shape)}, PROJ)
        assert "oft_R" in message and str(shape) in message, message
    both = {f"{name}.oft_blocks": random(4, 32, 32), f"{name}.dora_scale": random(128, 1)}
    assert "do not belong together" in refusal(added, tmp_path, both, PROJ)


# ------------------------------------------------------------------ text encoders

LANGUAGE_KEYS = (
    "lora_te_layers_1_self_attn_q_proj",
    "lora_te_model_layers_1_self_attn_q_proj",
    "lora_te1_language_model_model_layers_1_self_attn_q_proj",
    "text_encoder.model.layers.1.self_attn.q_proj",
    "text_encoder.layers.1.self_attn.q_proj",
    "text_encoder.model.language_model.layers.1.self_attn.q_proj",
    "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj",
    "text_encoders.mistral3_24b.transformer.model.layers.1.self_attn.q_proj",
    "base_model.model.model.layers.1.self_attn.q_proj",
)


@pytest.mark.parametrize("key", LANGUAGE_KEYS)
def test_lora_of_a_language_model_is_merged(tmp_path, key):
    model = randomise(LanguageModel(TINY_QWEN))
    a, b = random(4, 48), random(64, 4, size=0.1)
    weight = state(model)["layers.1.self_attn.q_proj.weight"]
    tensors = down_up(key, a, b, alpha=torch.tensor(6.0))
    modules = {"transformer": Flux(CONFIGS["flux.2"]), "language_model": model}
    # FLUX.2 reads no layer after the fourth, and no result of these.
    tensors |= down_up(key.replace("layers.1.", "layers.4.").replace("layers_1_", "layers_4_"))
    lora = read_lora(saved(tmp_path / "x.safetensors", tensors))
    (delta,) = match_layers(lora, modules)
    assert delta.target[:2] == ("language_model", "layers.1.self_attn.q_proj")
    merge(model, [(delta, SCALE)])
    expected = weight + SCALE * 1.5 * (b.double() @ a.double())
    assert max_error(state(model)["layers.1.self_attn.q_proj.weight"], expected) < 1e-6
    assert "match no layer of Flux" in refusal(
        match_layers, lora, {"transformer": Flux(CONFIGS["flux.2"])}
    )
    assert "changes nothing" in refusal(match_layers, lora, modules | {"language_model": None})


UNREAD = (
    "text_encoders.clip_l.transformer.text_projection",
    "text_encoders.clip_l.logit_scale",
    "text_encoders.t5xxl.transformer.encoder.embed_tokens",
    "text_encoders.t5xxl.logit_scale",
)


@pytest.mark.parametrize("key", UNREAD)
def test_change_of_what_flux_never_reads_is_no_reason_to_refuse(tmp_path, key):
    modules = {
        "transformer": Flux(CONFIGS["flux.1"]),
        "clip": randomise(CLIP(TINY_CLIP)),
        "t5": randomise(T5(TINY_T5)),
    }
    tensors = down_up(PROJ) | {f"{key}.diff": random(24, 24)}
    tensors |= {"clip_l.text_model.encoder.layers.0.mlp.fc1.diff_b": random(48)}
    tensors |= {"t5.encoder.final_layer_norm.diff": random(40)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deltas = match_layers(read_lora(saved(tmp_path / "x.safetensors", tensors)), modules)
    assert sorted(delta.target.part for delta in deltas) == ["clip", "t5", "transformer"]


# ------------------------------------------------------------------ twice, and left out

SPELLINGS = {  # of rows of double_blocks.0.img_attn.qkv: name -> rows
    "diffusion_model.double_blocks.0.img_attn.qkv": (0, 384),
    "lora_unet_double_blocks_0_img_attn_qkv": (0, 384),
    "lora_unet_double_blocks_0_img_attn_qkv_": (0, 384),
    "transformer.transformer_blocks.0.attn.to_qkv": (0, 384),
    "transformer_blocks.0.attn.to_k": (128, 256),
    "lora_transformer_transformer_blocks_0_attn_to_q": (0, 128),
    "transformer.double_blocks.0.img_attn.qkv.2": (256, 384),
    "transformer.transformer_blocks.0.attn.to_q": (0, 128),
    "double_blocks.0.processor.qkv_lora1": (0, 384),
}


@pytest.mark.parametrize("one, two", itertools.combinations(SPELLINGS, 2))
def test_rows_that_overlap_under_two_names_are_refused(tmp_path, one, two):
    tensors = {}
    for name in (one, two):
        start, stop = SPELLINGS[name]
        ends = ("down.weight", "up.weight") if "processor" in name else ("lora_A", "lora_B")
        tensors |= {f"{name}.{ends[0]}": A.clone()}
        tensors |= {f"{name}.{ends[1]}": random(stop - start, 4, seed=len(tensors))}
    (a, b), (c, d) = SPELLINGS[one], SPELLINGS[two]
    file, network = saved(tmp_path / "x.safetensors", tensors), Flux(CONFIGS["flux.1"])
    if a < d and c < b:
        for strict in (True, False):
            message = refusal(match_layers, read_lora(file), {"transformer": network}, strict)
            assert one in message and two in message and "twice" in message
    else:
        assert len(match_layers(read_lora(file), {"transformer": network})) == 2


def test_one_layer_under_two_names_is_refused_whatever_the_kinds(tmp_path):
    for tensors in (
        down_up(PROJ) | {f"diffusion_model.{PROJ}.diff_b": random(128)},
        down_up(PROJ) | {f"diffusion_model.{PROJ}.alpha": torch.tensor(2.0)},
        down_up(PROJ) | {"transformer_blocks.0.attn.to_out.0.lokr_w1": random(4, 4)},
        {f"{PROJ}.diff_b": random(128), "transformer_blocks.0.attn.to_out.0.lora_B.bias": B[0]},
        {f"{QKV}.diff": random(384, 128), "transformer_blocks.0.attn.to_v.diff": random(128, 128)},
        {f"{QKV}.diff_b": random(384), "transformer_blocks.0.attn.to_v.diff_b": random(128)},
        {f"{QKV}.oft_blocks": random(4, 96, 96)} | down_up(f"{QKV}.1"),
    ):
        message = refusal(added, tmp_path, tensors, PROJ)
        assert "two names" in message or "twice" in message or "belong together" in message
    # The weight under one name and the bias under another do not overlap.
    fused = down_up("transformer_blocks.0.attn.to_q") | {f"{QKV}.diff_b": random(384)}
    assert max_error(added(tmp_path, fused, QKV)[:128], BA) < 1e-12


FACTORS = (
    "lora_mid.weight",
    "base_layer.bias",
    "a.b.c",
    "lokr_t2",
    "oft_R.clipped_oft",
    "unheard_of",
    "bias",
    "weight",
)


@pytest.mark.parametrize("factor", FACTORS)
def test_factor_of_a_changed_layer_is_never_left_out(tmp_path, factor):
    name = f"diffusion_model.{PROJ}"
    tensors = down_up(name) | {f"{name}.{factor}": random(4, 4)} | down_up("no_such_layer")
    network = Flux(CONFIGS["flux.1"])
    for strict in (True, False):
        file = saved(tmp_path / "x.safetensors", tensors)
        message = refusal(match_layers, read_lora(file), {"transformer": network}, strict)
        assert f"{name}.{factor}" in message and "has 1 tensors, of 5" in message
    other = {f"diffusion_model.{QKV}.{factor}": random(4, 4)} | down_up("no_such_layer")
    file = saved(tmp_path / "y.safetensors", down_up(name) | other)
    assert "3 tensors, of 5" in refusal(match_layers, read_lora(file), {"transformer": network})
    with pytest.warns(UserWarning, match=r"left out 3 of 5 tensors.*img_attn\.qkv.*no_such_layer"):
        (delta,) = match_layers(read_lora(file), {"transformer": network}, strict=False)
    assert delta.target.path == PROJ


def test_many_layers_that_are_left_out_are_listed_in_groups(tmp_path):
    """A LoRA of a network with more blocks, as FLUX.1 [dev]'s on a pruned one."""
    tensors = down_up(PROJ)
    for n in range(1, 12):
        tensors |= down_up(f"double_blocks.{n}.img_attn.proj") | down_up(
            f"single_blocks.{n}.linear2"
        )
    lora = read_lora(saved(tmp_path / "x.safetensors", tensors))
    expected = (
        r"left out 44 of 46 tensors, .*: 'double_blocks.N.img_attn.proj' \(11\), "
        r"'single_blocks.N.linear2' \(11\)$"
    )
    with pytest.warns(UserWarning, match=expected):
        match_layers(lora, {"transformer": Flux(CONFIGS["flux.1"])}, strict=False)


def test_several_adapters_in_one_file_are_refused(tmp_path):
    """Also where the factors of a layer are of different adapters."""
    other = PROJ.replace("img", "txt")
    for one, two in ((PROJ, PROJ), (PROJ, other)):
        tensors = {f"{one}.lora_A.a.weight": A, f"{one}.lora_B.a.weight": B}
        tensors |= {f"{two}.lora_A.b-2": A.clone(), f"{two}.lora_B.b-2": B.clone()}
        file = saved(tmp_path / "x.safetensors", tensors)
        assert "holds 2 adapters ('a', 'b-2')" in refusal(read_lora, file)
    mixed = {f"{PROJ}.lora_A.a.weight": A, f"{PROJ}.lora_B.b.weight": B}
    assert "holds 2 adapters" in refusal(read_lora, saved(tmp_path / "y.safetensors", mixed))


@pytest.mark.parametrize("end", ["weight_scale", "scale", "scale_weight"])
def test_scale_of_a_quantized_factor_is_no_adapter(tmp_path, end):
    tensors = {f"{PROJ}.lora_A.weight": A.to(torch.float8_e4m3fn), f"{PROJ}.lora_B.weight": B}
    tensors[f"{PROJ}.lora_A.{end}"] = torch.tensor(0.1)
    message = refusal(added, tmp_path, tensors, PROJ)
    assert "whose meaning is not known" in message and f"lora_A.{end}" in message


@pytest.mark.parametrize(
    "more", [{"alpha": torch.tensor(0.0)}, {"lora_up.weight": B * 0}], ids=["alpha", "B"]
)
def test_lora_that_changes_nothing_gives_a_warning(tmp_path, more):
    tensors = down_up(PROJ) | {f"{PROJ}.{end}": tensor for end, tensor in more.items()}
    with pytest.warns(UserWarning, match="changes nothing at any scale"):
        assert not added(tmp_path, tensors, PROJ).any()


@pytest.mark.parametrize(
    "key, kind",
    [
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "an IP-adapter"),
        ("controlnet_blocks.0.weight", "a ControlNet"),
        ("input_hint_block.0.weight", "a ControlNet"),
        ("pulid_ca.0.to_q.weight", "a PuLID adapter"),
        ("diffusion_model.double_blocks.0.img_mlp.2.ia3_l", "an (IA)3 adapter"),
    ],
)
def test_file_of_another_kind_is_named(tmp_path, key, kind):
    message = refusal(read_lora, saved(tmp_path / "x.safetensors", {key: random(4, 4)}))
    assert kind in message


def test_every_linear_layer_has_a_layout():
    network = Flux(CONFIGS["flux.1"])
    paths = {part[0] for part in layout("OneTrainer, split", network, random)[1].values()}
    assert paths == linears(network).keys()

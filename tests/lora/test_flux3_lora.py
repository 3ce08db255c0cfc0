"""LoRAs of FLUX 3 in the layouts of many tools, each kind against a float64 sum by hand.

diffusers' own converter reads only a few of these names, and drops or refuses the others.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.flux3_model import BASE, DISTILLED, both_models
from support.lora_files import random
from support.weight_files import refusal
from torch import Tensor

from flux.lora.formats import match_layers, read_lora
from flux.lora.merge import merge
from flux.parity.reference import FLUX3_TINY, randomise
from flux.transformer3 import Flux3
from flux.weights.diffusers_names3 import SWAPPED, diffusers_layer

LAYERS = [  # one of each kind
    "content_mode_blocks.image.0.q_proj",
    "content_mode_blocks.image_cond.1.mlp_in",
    "txt_mode_blocks.0.attn_out",
    "single_blocks.2.mlp_out",
    "single_blocks.0.k_proj",
    "single_blocks.1.v_proj",
    "emb_in.image",
    "emb_in.image_cond",
    "txt_in",
    "time_in.in_layer",
    "time_in.out_layer",
    "early_stream_modulations.txt.lin",
    "early_stream_modulations.image.lin",
    "single_stream_modulations.image_cond.lin",
    "final_layer.image.linear",
    SWAPPED,
]
RANK, ALPHA, SCALE = 3, 6.0, 0.5

# ------------------------------------------------------------------ kinds

# A kind gives the ends of the keys with their tensors, and the change of W at scale 1.
Kind = Callable[[Tensor, bool], tuple[dict[str, Tensor], Tensor]]
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
ADAPTER = "lora_A.default.weight", "lora_B.default.weight"


def lora(ends: tuple[str, str]) -> Kind:
    def kind(weight: Tensor, alpha: bool) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        a, b = random(RANK, columns, seed=1, size=columns**-0.5), random(rows, RANK, seed=2)
        tensors = dict(zip(ends, (a, b), strict=True))
        product = b.double() @ a.double()
        if not alpha:
            return tensors, product
        return tensors | {"alpha": torch.tensor(ALPHA)}, ALPHA / RANK * product

    return kind


def dora(weight: Tensor, alpha: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Rows of W + BA get the lengths that the file states."""
    tensors, delta = lora(DOWN_UP)(weight, alpha)
    lengths = random(len(weight), 1, seed=3).abs() + 0.5
    new = weight + delta
    new = lengths.double() * new / new.norm(dim=1, keepdim=True)
    return tensors | {"dora_scale": lengths}, new - weight


def lokr(weight: Tensor, alpha: bool) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    w1, a = random(4, 4), random(rows // 4, RANK, seed=1)
    b = random(RANK, columns // 4, seed=2, size=columns**-0.5)
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return tensors, ALPHA / RANK * torch.kron(w1.double(), a.double() @ b.double())


def full_lokr(weight: Tensor, alpha: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Without ranks; LyCORIS writes this placeholder for alpha."""
    rows, columns = weight.shape
    w1, w2 = random(4, 4), random(rows // 4, columns // 4, seed=1, size=columns**-0.5)
    tensors = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9999220736.0)}
    return tensors, torch.kron(w1.double(), w2.double())


def loha(weight: Tensor, alpha: bool) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    shapes = (rows, RANK), (RANK, columns), (rows, RANK), (RANK, columns)
    x = [random(*shape, seed=seed, size=0.3) for seed, shape in enumerate(shapes)]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    first, second = x[0].double() @ x[1].double(), x[2].double() @ x[3].double()
    tensors = dict(zip(names, x, strict=True)) | {"alpha": torch.tensor(ALPHA)}
    return tensors, ALPHA / RANK * first * second


def difference(weight: Tensor, alpha: bool) -> tuple[dict[str, Tensor], Tensor]:
    diff = random(*weight.shape, size=0.1)
    return {"diff": diff}, diff.double()


# ------------------------------------------------------------------ layouts


def bfl(layer: str) -> str:
    return layer


def flat_bfl(layer: str) -> str:
    return layer.replace(".", "_")


def flat_diffusers(layer: str) -> str:
    return diffusers_layer(layer).replace(".", "_")


LAYOUTS = {  # names of layers, prefix, kind, whether there is an alpha
    "ComfyUI, ai-toolkit": (bfl, "diffusion_model.", lora(AB), False),
    "ai-toolkit, LoKr": (bfl, "diffusion_model.", full_lokr, True),
    "bare": (bfl, "", lora(AB), False),
    "PEFT, of our network": (bfl, "base_model.model.", lora(ADAPTER), False),
    "PEFT": (diffusers_layer, "base_model.model.", lora(AB), False),
    "diffusers": (diffusers_layer, "transformer.", lora(AB), False),
    "diffusers, named": (diffusers_layer, "transformer.", lora(ADAPTER), False),
    "SimpleTuner, LoKr": (flat_diffusers, "lycoris_", lokr, True),
    "SimpleTuner, full LoKr": (flat_diffusers, "lycoris_", full_lokr, True),
    "LyCORIS, LoHa": (flat_diffusers, "lycoris_", loha, True),
    "kohya, musubi-tuner": (flat_bfl, "lora_unet_", lora(DOWN_UP), True),
    "kohya, DoRA": (flat_bfl, "lora_unet_", dora, True),
    "kohya, LoKr": (flat_bfl, "lora_unet_", lokr, True),
    "kohya, LoHa": (flat_bfl, "lora_unet_", loha, True),
    "OneTrainer, legacy": (flat_diffusers, "lora_transformer_", lora(DOWN_UP), True),
    "OneTrainer, DoRA": (flat_diffusers, "lora_transformer_", dora, True),
    "OneTrainer, diffusers": (diffusers_layer, "transformer.", lora(DOWN_UP), True),
    "OneTrainer, ComfyUI": (bfl, "diffusion_model.", lora(AB), True),
    "extracted": (flat_bfl, "lora_unet_model_diffusion_model_", lora(DOWN_UP), True),
    "difference": (bfl, "diffusion_model.", difference, False),
}


def entries(
    network: Flux3, layout: str, layers: list[str]
) -> Iterator[tuple[str, dict[str, Tensor], Tensor]]:
    """Return for each layer its path, tensors by key, and the change of our weight, float64."""
    spell, prefix, kind, alpha = LAYOUTS[layout]
    for layer in layers:
        weight = network.get_submodule(layer).weight.double()
        swapped = layer == SWAPPED and spell in (diffusers_layer, flat_diffusers)
        if swapped:  # scale before shift
            weight = torch.cat(weight.chunk(2)[::-1])
        ends, change = kind(weight, alpha)
        if swapped:
            change = torch.cat(change.chunk(2)[::-1])
        yield layer, {f"{prefix}{spell(layer)}.{end}": x for end, x in ends.items()}, change


def write(path: Path, network: Flux3, layout: str, layers: list[str]) -> dict[str, Tensor]:
    """Write a file in a layout; return the change of each layer at scale 1."""
    tensors, changes = {}, {}
    for layer, found, change in entries(network, layout, layers):
        tensors |= found
        changes[layer] = change
    save_file({name: x.contiguous() for name, x in tensors.items()}, path)
    return changes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_sum(layout, tmp_path):
    """The magnitudes of DoRA do not scale: the sum lies on the line to the result at scale 1."""
    network, before = randomise(Flux3(FLUX3_TINY)), randomise(Flux3(FLUX3_TINY)).double()
    changes = write(tmp_path / "lora.safetensors", network, layout, LAYERS)
    deltas = match_layers(read_lora(tmp_path / "lora.safetensors"), {"transformer": network})
    assert sorted(delta.target.path for delta in deltas) == sorted(LAYERS)
    merge(network, [(delta, SCALE) for delta in deltas])
    for name, tensor in network.state_dict().items():
        expected = before.state_dict()[name]
        if change := name.removesuffix(".weight") in changes:
            expected = expected + SCALE * changes[name.removesuffix(".weight")]
        assert torch.equal(tensor.double(), before.state_dict()[name]) != change, name
        assert (tensor - expected).abs().max() <= 2e-6 * max(1, expected.abs().max()), name


# ------------------------------------------------------------------ pipelines


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with both_models(tmp_path_factory.mktemp("weights")) as found:
        yield found


def test_pipeline_merges_and_unloads(models, tmp_path):
    model, path = models[BASE], tmp_path / "lora.safetensors"
    before = model.parts["transformer"]
    changes = write(path, before, "OneTrainer, legacy", LAYERS)
    pipe = model.load()
    pipe.load_lora(path, SCALE)
    weight = pipe.transformer().get_submodule(SWAPPED).weight
    expected = before.get_submodule(SWAPPED).weight + SCALE * changes[SWAPPED]
    assert (weight - expected).abs().max() <= 2e-6
    pipe.unload_loras()
    state = pipe.transformer().state_dict()
    assert all(torch.equal(state[name], x) for name, x in before.state_dict().items())


@pytest.mark.parametrize("layout", ["ComfyUI, ai-toolkit", "diffusers", "kohya, LoKr"])
def test_lora_of_the_target_embedding_is_refused_by_the_base_model(models, layout, tmp_path):
    path, network = tmp_path / "lora.safetensors", models[DISTILLED].parts["transformer"]
    write(path, network, layout, ["ref_time_in.in_layer", *LAYERS])
    models[DISTILLED].load().load_lora(path, 1.0)
    said = refusal(models[BASE].load().load_lora, path, 1.0)
    name = "target_timestep_embedder" if layout == "diffusers" else "ref_time_in"
    assert name in said and str(path) in said


def test_lora_of_another_family_is_refused(models, tmp_path):
    path = tmp_path / "lora.safetensors"
    tensors = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{x}.weight": torch.ones(4, 4)
        for x in "AB"
    }
    save_file(tensors, path)
    assert "match" in refusal(models[BASE].load().load_lora, path, 1.0)

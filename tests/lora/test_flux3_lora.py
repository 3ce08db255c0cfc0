"""LoRAs of FLUX 3 in the layouts of several tools, each against a float64 sum by hand.

diffusers' own converter reads only a few of these names, and drops or refuses the others.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.flux3_model import BASE, DISTILLED, Flux3Model
from support.weight_files import refusal

from flux.weights.diffusers_names3 import SWAPPED, diffusers_layer

LAYERS = [  # one of each kind
    "content_mode_blocks.image.0.q_proj",
    "content_mode_blocks.image_cond.1.mlp_in",
    "txt_mode_blocks.0.attn_out",
    "single_blocks.2.mlp_out",
    "single_blocks.0.k_proj",
    "emb_in.image",
    "txt_in",
    "time_in.out_layer",
    "early_stream_modulations.txt.lin",
    "single_stream_modulations.image_cond.lin",
    "final_layer.image.linear",
    SWAPPED,
]
RANK, ALPHA, SCALE = 3, 6.0, 0.5
LAYOUTS = ["diffusion_model.", "", "base_model.model.", "transformer.", "lora_unet_"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        folder = tmp_path_factory.mktemp("weights")
        yield {name: Flux3Model(name, folder, patch) for name in (BASE, DISTILLED)}


def factors(model: Flux3Model, layers) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator, network, found = torch.Generator().manual_seed(0), model.parts["transformer"], {}
    for layer in layers:
        rows, columns = network.get_submodule(layer).weight.shape
        found[layer] = (
            torch.randn(RANK, columns, generator=generator) / columns**0.5,
            torch.randn(rows, RANK, generator=generator),
        )
    return found


def write(path: Path, layout: str, found) -> float:
    """Write a file in a layout; return the factor that it asks for."""
    tensors = {}
    for layer, (down, up) in found.items():
        if layout == "transformer.":
            if layer == SWAPPED:  # scale before shift
                up = torch.cat(up.chunk(2)[::-1])
            layer = diffusers_layer(layer)
        if layout == "lora_unet_":
            name = layout + layer.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        else:
            tensors |= {
                f"{layout}{layer}.lora_A.weight": down,
                f"{layout}{layer}.lora_B.weight": up,
            }
    save_file({name: x.contiguous() for name, x in tensors.items()}, path)
    return ALPHA / RANK if layout == "lora_unet_" else 1.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_sum(models, layout, tmp_path):
    model, path = models[BASE], tmp_path / "lora.safetensors"
    found = factors(model, LAYERS)
    factor = write(path, layout, found)
    pipe = model.load()
    pipe.load_lora(path, SCALE)
    network, before = pipe.transformer(), model.parts["transformer"]
    for name, layer in network.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        expected = before.get_submodule(name).weight.double()
        if name in found:
            down, up = found[name]
            expected = expected + SCALE * factor * up.double() @ down.double()
            assert not torch.equal(layer.weight, before.get_submodule(name).weight), name
        assert (layer.weight - expected).abs().max() <= 1e-6, name
    pipe.unload_loras()
    state = pipe.transformer().state_dict()
    assert all(torch.equal(state[name], x) for name, x in before.state_dict().items())


def test_lora_of_the_target_embedding_is_refused_by_the_base_model(models, tmp_path):
    path = tmp_path / "lora.safetensors"
    write(path, "diffusion_model.", factors(models[DISTILLED], ["ref_time_in.in_layer", *LAYERS]))
    models[DISTILLED].load().load_lora(path, 1.0)
    said = refusal(models[BASE].load().load_lora, path, 1.0)
    assert "ref_time_in" in said and str(path) in said


def test_lora_of_another_family_is_refused(models, tmp_path):
    path = tmp_path / "lora.safetensors"
    tensors = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{x}.weight": torch.ones(4, 4)
        for x in "AB"
    }
    save_file(tensors, path)
    assert "match" in refusal(models[BASE].load().load_lora, path, 1.0)

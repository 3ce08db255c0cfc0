"""Which model a transformer file is, by what lies in the file, and what is said of other families.

The names of other families' tensors are those that their published files have.
"""

import warnings
from dataclasses import replace

import pytest
import torch
from support.weight_files import hollow, refusal, saved

from flux.configs import MODELS
from flux.runtime.checks import check_cfg, check_guidance
from flux.transformer import Flux, FluxConfig
from flux.transformer3 import Flux3, Flux3Config
from flux.weights.families import looks_like
from flux.weights.load import infer_config, init_empty
from flux.weights.locate import get_spec

DEV, SCHNELL = MODELS["flux.1-dev"], MODELS["flux.1-schnell"]


def written(path, config: FluxConfig | Flux3Config):
    kind = Flux if isinstance(config, FluxConfig) else Flux3
    shapes = {n: tuple(x.shape) for n, x in init_empty(lambda: kind(config)).state_dict().items()}
    return hollow(path, shapes)


def identify(path, name: str | None = None):
    """Return the row for a file, and the text of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec = get_spec(name, path)
    return spec, " ".join(str(warning.message) for warning in caught)


# ---------------------------------------------------------------- de-distilled and pruned FLUX.1


@pytest.mark.parametrize("named", [True, False])
def test_dedistilled_dev_is_guided_by_true_cfg(tmp_path, named):
    """`--model` says so, or the name of the file: no shape tells such a file from schnell."""
    config = replace(DEV.transformer, guidance=False)
    file = "x.safetensors" if named else "Flux-Dev-De-Distill.safetensors"
    path = written(tmp_path / file, config)
    spec, note = identify(path, "flux.1-dev" if named else None)
    assert spec == replace(DEV, transformer=config, cfg=True, guidance=3.5)
    assert "lacks the guidance input of flux.1-dev" in note and "(3.5 by default)" in note
    assert check_guidance(spec, None, spec.steps) == [3.5]
    assert check_cfg(spec, None, "blurry", None, spec.steps)
    assert not check_cfg(spec, 1.0, None, None, spec.steps)


def test_file_with_the_shapes_of_schnell_is_schnell_with_a_note(tmp_path):
    spec, note = identify(written(tmp_path / "x.safetensors", SCHNELL.transformer))
    assert spec == SCHNELL and "flux.1-schnell, which is assumed" in note
    assert "if it derives from flux.1-dev without distillation, pass that model as `name`" in note
    spec, note = identify(written(tmp_path / "flux1-schnell-x.safetensors", SCHNELL.transformer))
    assert spec == SCHNELL and not note


def test_metadata_tell_dedistilled_dev_too(tmp_path):
    tiny = MODELS["flux.1-tiny"].transformer
    state = Flux(replace(tiny, guidance=False)).state_dict()
    path = saved(tmp_path / "x.safetensors", state, title="An undistilled model")
    spec, note = identify(path)
    assert (spec.name, spec.cfg, spec.guidance) == ("flux.1-tiny", True, 3.5) and note


@pytest.mark.parametrize(
    "name, depth, single",
    [("flux.1-dev", 8, 38), ("flux.1-schnell", 5, 10), ("flux.1-fill-dev", 19, 30),
     ("flux.2-klein-4b", 4, 20)],
)  # fmt: skip
def test_pruned_model_keeps_the_defaults_of_its_model(tmp_path, name, depth, single):
    """FLUX.1 lite has 8 of 19 double blocks."""
    config = replace(MODELS[name].transformer, depth=depth, depth_single=single)
    spec, note = identify(written(tmp_path / "lite.safetensors", config))
    assert spec == replace(MODELS[name], transformer=config)
    assert f"pruned {name}, with {depth} double and {single} single blocks" in note


def test_file_with_the_shapes_of_no_model_is_refused(tmp_path):
    config = replace(DEV.transformer, context_dim=64)
    message = refusal(get_spec, None, written(tmp_path / "x.safetensors", config))
    assert "has the shapes of no released model" in message


# ---------------------------------------------------------------- other families

FAMILIES = {  # as their own authors, ComfyUI or diffusers name the tensors
    "a ControlNet": (
        "controlnet_blocks.0.weight",
        "controlnet_x_embedder.weight",
        "input_hint_block.0.weight",
        "model.controlnet_blocks.3.bias",
        "control_model.input_blocks.1.0.in_layers.0.weight",
    ),
    "an IP-adapter": (
        "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
        "ip_adapter_proj_model.proj.weight",
        "image_proj.norm.weight",
    ),
    "a Chroma transformer": ("distilled_guidance_layer.layers.0.in_layer.weight",),
    "a Krea 2 transformer": (
        "diffusion_model.txtfusion.projector.weight",
        "text_fusion.layerwise_blocks.0.attn.to_q.weight",
    ),
    "a HiDream transformer": ("double_stream_blocks.0.block.attn1.to_q.weight",),
    "an AuraFlow transformer": (
        "joint_transformer_blocks.0.attn.to_q.weight",
        "model.double_layers.0.attn.w1q.weight",
    ),
    "a PixArt, Sana, LTX or Bria transformer": (
        "adaln_single.linear.weight",
        "caption_projection.linear_1.weight",
    ),
    "a Stable Diffusion 3 transformer": (
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "pos_embed.proj.weight",
    ),
    "a Qwen-Image transformer": (
        "transformer_blocks.0.txt_mod.1.weight",
        "transformer_blocks.0.img_mlp.gate_layer.weight",
    ),
    "a HunyuanVideo or HunyuanImage transformer": (
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
    ),
    "a Lumina or Z-Image transformer": ("noise_refiner.0.attention.qkv.weight",),
    "a Wan or Cosmos transformer": ("blocks.0.self_attn.q.weight", "blocks.0.attn1.to_q.weight"),
    "a Kandinsky transformer": ("visual_transformer_blocks.0.self_attention.to_query.weight",),
    "a Stable Diffusion U-Net": (
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "down_blocks.0.attentions.0.proj_in.weight",
    ),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind, names in FAMILIES.items() for name in names]
)
def test_other_family_is_named(tmp_path, kind, name, whole):
    """Also where the file has all tensors that tell the sizes of a FLUX transformer."""
    state = Flux(MODELS["flux.1-tiny"].transformer).state_dict() if whole else {}
    path = saved(tmp_path / "x.safetensors", state | {name: torch.zeros(1)})
    assert refusal(get_spec, None, path) == f"{path} is {kind}, which is not supported."


@pytest.mark.parametrize("name", MODELS)
def test_no_released_model_is_taken_for_another_family(tmp_path, name):
    config = MODELS[name].transformer
    assert infer_config(written(tmp_path / "x.safetensors", config)) == config


def diffusers_class(name: str) -> list[str]:
    """Return the names of the tensors of a class of diffusers, at its default size."""
    import diffusers

    return list(init_empty(getattr(diffusers, name)).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind",
    [
        ("ChromaTransformer2DModel", "a Chroma transformer"),
        ("Krea2Transformer2DModel", "a Krea 2 transformer"),
        ("Flux3Transformer2DModel", "a FLUX 3 transformer"),
        ("AuraFlowTransformer2DModel", "an AuraFlow transformer"),
        ("PixArtTransformer2DModel", "a PixArt, Sana, LTX or Bria transformer"),
        ("SanaTransformer2DModel", "a PixArt, Sana, LTX or Bria transformer"),
        ("LTXVideoTransformer3DModel", "a PixArt, Sana, LTX or Bria transformer"),
        ("SD3Transformer2DModel", "a Stable Diffusion 3 transformer"),
        ("QwenImageTransformer2DModel", "a Qwen-Image transformer"),
        ("QwenImage21Transformer2DModel", "a Qwen-Image transformer"),
        ("HunyuanVideoTransformer3DModel", "a HunyuanVideo or HunyuanImage transformer"),
        ("HunyuanImageTransformer2DModel", "a HunyuanVideo or HunyuanImage transformer"),
        ("Lumina2Transformer2DModel", "a Lumina or Z-Image transformer"),
        ("ZImageTransformer2DModel", "a Lumina or Z-Image transformer"),
        ("WanTransformer3DModel", "a Wan or Cosmos transformer"),
        ("Kandinsky5Transformer3DModel", "a Kandinsky transformer"),
        ("FluxControlNetModel", "a ControlNet"),
        ("QwenImageControlNetModel", "a ControlNet"),
        ("SD3ControlNetModel", "a ControlNet"),
        ("ControlNetModel", "a ControlNet"),
        ("UNet2DConditionModel", "a Stable Diffusion U-Net"),
        ("BriaTransformer2DModel", "a transformer of another family"),
        ("CogView4Transformer2DModel", "a transformer of another family"),
        ("OvisImageTransformer2DModel", "a transformer of another family"),
        ("LongCatImageTransformer2DModel", "a transformer of another family"),
        ("JoyImageEditTransformer3DModel", "a transformer of another family"),
        ("FluxTransformer2DModel", "a transformer in diffusers' layout"),
        ("Flux2Transformer2DModel", "a transformer in diffusers' layout"),
        ("AutoencoderKLFlux2", "an autoencoder in diffusers' layout"),
    ],
)
def test_classes_of_diffusers_are_told_apart(name, kind):
    assert looks_like(diffusers_class(name)) == kind


@pytest.mark.parametrize(
    "name, use",
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "a LoRA. Pass it as `loras`."),
        ("oft_unet_double_blocks_0_img_attn_proj.oft_blocks", "a LoRA. Pass it as `loras`."),
        ("decoder.up.0.block.0.conv1.weight", "an autoencoder. Pass it as `autoencoder`."),
        ("blk.0.ffn_gate.weight", "a language model. Pass it as `text_encoder`."),
    ],
)
def test_file_of_another_part_names_its_argument(tmp_path, name, use):
    path = saved(tmp_path / "x.safetensors", {name: torch.zeros(1)})
    assert refusal(get_spec, None, path).endswith(f"and looks like {use}")

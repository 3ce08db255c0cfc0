"""Build the networks and pipelines of diffusers and transformers with our weights in them.

Names come from `flux.weights.diffusers_names`, and a strict load proves them each time; none of
diffusers' converters is called. Neither library is imported before a function needs it.
"""

import json
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from flux.autoencoder import AutoEncoder, AutoEncoderConfig
from flux.clip import CLIP, CLIPConfig
from flux.configs import MODELS, FLUX1Text, FLUX2Text, ModelSpec
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.parity.compare import errors
from flux.siglip import ReduxConfig, SigLIPConfig
from flux.t5 import T5, T5Config
from flux.transformer import Flux, FluxConfig
from flux.transformer3 import Flux3, Flux3Config
from flux.weights.diffusers_names import diffusers_layer, to_diffusers

FLUX1_TINY = FluxConfig(
    in_channels=64,
    out_channels=64,
    context_dim=40,
    hidden_size=128,
    num_heads=4,
    depth=2,
    depth_single=3,
    mlp_ratio=4.0,
    axes_dim=(8, 12, 12),
    theta=10_000,
    vector_dim=24,
    bias=True,
    gated_mlp=False,
    shared_modulation=False,
)
SCHNELL_TINY = replace(FLUX1_TINY, guidance=False)
FLUX2_TINY = FluxConfig(
    in_channels=16,
    out_channels=16,
    context_dim=40,
    hidden_size=128,
    num_heads=4,
    depth=2,
    depth_single=3,
    axes_dim=(8, 8, 8, 8),
)
KLEIN_TINY = replace(FLUX2_TINY, guidance=False)
FLUX3_TINY = Flux3Config(
    in_channels=16,
    context_dim=40,
    hidden_size=128,
    num_heads=4,
    depth=2,
    depth_single=3,
    axes_dim=(8, 8, 8, 8),
)

# ---------------------------------------------------------------- metrics


def max_error(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| / max |b|; infinity if any value is not finite."""
    assert a.shape == b.shape, f"{tuple(a.shape)} and not {tuple(b.shape)}"
    found = errors(a, b)
    return math.inf if found.nonfinite or found.misplaced else found.max_abs / b.abs().max().item()


def relative_l2(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|; infinity if any value is not finite."""
    assert a.shape == b.shape, f"{tuple(a.shape)} and not {tuple(b.shape)}"
    found = errors(a, b)
    return math.inf if found.nonfinite or found.misplaced else found.relative_l2


# ---------------------------------------------------------------- weights


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter and buffer with random values: 0 and 1 would hide faults.

    A tensor's values depend on the seed, its name and its shape only. A matrix keeps the magnitude
    of its input.
    """
    for name, tensor in module.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        noise, leaf = torch.randn(tensor.shape, generator=generator), name.split(".")[-1]
        if not tensor.is_floating_point():
            value = torch.randint(1, 1000, tensor.shape, generator=generator)
        elif leaf == "running_var":
            value = torch.empty(tensor.shape).uniform_(0.3, 3, generator=generator)
        elif leaf == "running_mean":
            value = noise
        elif leaf == "bias":
            value = 0.1 * noise
        elif tensor.ndim == 1:  # the scale of a norm
            value = 1 + 0.3 * noise
        else:
            value = noise / tensor[0].numel() ** 0.5
        tensor.copy_(value)
    return module.eval().requires_grad_(False)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load these tensors into a reference network, strictly, without a copy."""
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


# ---------------------------------------------------------------- transformer


def transformer_to_diffusers(state: dict[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """Return the weights by diffusers' names; its final modulation has scale before shift."""
    out = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        leaf = "weight" if leaf == "scale" else leaf  # of RMSNorm
        parts = diffusers_layer(layer, config.shared_modulation, config.hidden_size, len(tensor))
        for part in parts:
            rows = [tensor[start:stop] for start, stop in part.rows]
            out[f"{part.name}.{leaf}"] = rows[0] if len(rows) == 1 else torch.cat(rows)
    return out


def diffusers_transformer(config: FluxConfig) -> Any:
    """diffusers' transformer at our config's sizes, on the meta device."""
    from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel

    head_dim = config.hidden_size // config.num_heads
    common: dict[str, Any] = dict(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single,
        attention_head_dim=head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        guidance_embeds=config.guidance,
        axes_dims_rope=config.axes_dim,
    )
    with torch.device("meta"):
        if config.shared_modulation:
            return Flux2Transformer2DModel(
                **common, mlp_ratio=config.mlp_ratio, rope_theta=config.theta
            )
        return FluxTransformer2DModel(**common, pooled_projection_dim=config.vector_dim)


def diffusers_velocity(
    model: Any,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    t: Tensor,
    guidance: Tensor | None = None,
    vector: Tensor | None = None,
) -> Tensor:
    """Call the transformer as its pipelines do, which round 1000 t to the latents' dtype."""
    pooled = {} if vector is None else {"pooled_projections": vector}
    timestep = (1000 * t).to(img.dtype) / 1000
    return model(
        hidden_states=img,
        encoder_hidden_states=txt,
        timestep=timestep,
        img_ids=img_ids,
        txt_ids=txt_ids,
        guidance=guidance,
        return_dict=False,
        **pooled,
    )[0]


# ---------------------------------------------------------------- autoencoder


def autoencoder_to_diffusers(
    state: dict[str, Tensor], config: AutoEncoderConfig
) -> dict[str, Tensor]:
    """Return the weights by diffusers' names; its attention has Linears, not 1x1 convolutions."""
    out = {}
    for name, tensor in state.items():
        if ".attn_1." in name and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0].contiguous()
        out[to_diffusers(name, len(config.ch_mult))] = tensor
    return out


def diffusers_autoencoder(config: AutoEncoderConfig) -> Any:
    """diffusers' autoencoder at our config's sizes, on the meta device."""
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    levels = len(config.ch_mult)
    common: dict[str, Any] = dict(
        block_out_channels=tuple(config.ch * m for m in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=config.z_channels,
        norm_num_groups=config.norm_groups,
    )
    with torch.device("meta"):
        if config.scale_factor is None:
            narrow = config.decoder_ch and tuple(config.decoder_ch * m for m in config.ch_mult)
            return AutoencoderKLFlux2(**common, decoder_block_out_channels=narrow)
        return AutoencoderKL(
            **common,
            scaling_factor=config.scale_factor,
            shift_factor=config.shift_factor,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )


def diffusers_encode(vae: Any, pixels: Tensor) -> Tensor:
    """Return packed, normalised latents (B, 4z, h, w) of the posterior's mean."""
    from diffusers import Flux2Pipeline, FluxPipeline

    z = vae.encode(pixels).latent_dist.mean  # (B, z, 2h, 2w)
    if hasattr(vae, "bn"):
        packed = Flux2Pipeline._patchify_latents(z)
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)[:, None, None]
        return (packed - vae.bn.running_mean[:, None, None]) / std
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    tokens = FluxPipeline._pack_latents(z, *z.shape)  # (B, hw, 4z)
    return rearrange(tokens, "b (h w) c -> b c h w", h=z.shape[2] // 2)


def diffusers_decode(vae: Any, latents: Tensor) -> Tensor:
    """Return pixels (B, 3, 16h, 16w) of packed, normalised latents."""
    from diffusers import Flux2Pipeline, FluxPipeline

    if hasattr(vae, "bn"):
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)[:, None, None]
        z = Flux2Pipeline._unpatchify_latents(latents * std + vae.bn.running_mean[:, None, None])
    else:
        h, w = latents.shape[2:]
        tokens = rearrange(latents, "b c h w -> b (h w) c")
        z = FluxPipeline._unpack_latents(tokens, 16 * h, 16 * w, vae_scale_factor=8)
        z = z / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(z).sample


# ---------------------------------------------------------------- text encoders


def language_model_to_transformers(state: dict[str, Tensor], mistral: bool) -> dict[str, Tensor]:
    """Add the prefix of transformers' names."""
    prefix = "model.language_model." if mistral else "model."
    return {prefix + name: tensor for name, tensor in state.items()}


def transformers_language_model(config: LanguageModelConfig, depth: int, mistral: bool) -> Any:
    """Return Qwen3, or Mistral Small with its image encoder, with `depth` layers, norm and head.

    `depth` must exceed the last layer that is read: the last hidden state is normalised.
    """
    import transformers

    common: dict[str, Any] = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=depth,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.eps,
        sliding_window=None,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.theta},
    )
    if not mistral:
        return transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**common, attention_bias=False)
        )
    vision = transformers.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=14,
        image_size=56,
    )
    both = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**common), vision_config=vision
    )
    return transformers.Mistral3ForConditionalGeneration(both)


def with_trunk(theirs: Any, state: dict[str, Tensor], mistral: bool) -> nn.Module:
    """Load our weights, and random ones into the parts that our language model leaves out.

    Ours must fill the embedding and each of our layers. All get our dtype, except RoPE's
    frequencies, which transformers does not load either.
    """
    dtype, ours = state["embed_tokens.weight"].dtype, language_model_to_transformers(state, mistral)
    others = {
        name: value.to(dtype)
        for name, value in randomise(theirs, 1).state_dict().items()
        if name not in ours
    }
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    trunk = [
        re.match(r"model\.(?:language_model\.)?(?:embed_tokens|layers\.(\d+))\.", name)
        for name in others
    ]
    assert all(int(found[1] or 0) >= depth for found in trunk if found)
    return loaded(theirs, others | ours)


def transformers_features(
    theirs: Any, ids: Tensor, mask: Tensor, layers: tuple[int, ...]
) -> Tensor:
    """Return (B, L, len(layers) * D), read as in diffusers' FLUX.2 pipelines."""
    hidden = theirs(
        ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False
    ).hidden_states
    stacked = torch.stack([hidden[layer] for layer in layers], dim=1)
    return rearrange(stacked, "b n l d -> b l (n d)")


def t5_to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the second name of the tied embedding."""
    return state | {"encoder.embed_tokens.weight": state["shared.weight"]}


def transformers_t5(config: T5Config, attention: str = "sdpa") -> Any:
    """Return transformers' encoder at our config's sizes."""
    import transformers

    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.hidden_size,
            d_kv=config.head_dim,
            num_heads=config.num_heads,
            d_ff=config.mlp_size,
            num_layers=config.depth,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            attn_implementation=attention,
        )
    ).eval()


def clip_to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the prefix that the released files have."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def transformers_clip(config: CLIPConfig, eos_id: int, attention: str = "sdpa") -> Any:
    """Return transformers' encoder at our sizes; with `eos_id` 2 it pools at the largest id."""
    import transformers

    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.depth,
            projection_dim=config.hidden_size,
            max_position_embeddings=config.max_length,
            layer_norm_eps=config.eps,
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=eos_id,
            attn_implementation=attention,
        )
    ).eval()


# ---------------------------------------------------------------- images


def siglip_config(config: SigLIPConfig, attention: str = "sdpa"):
    """transformers' configuration at our config's sizes."""
    import transformers

    return transformers.SiglipVisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.depth,
        layer_norm_eps=config.eps,
        hidden_act="gelu_pytorch_tanh",
        attn_implementation=attention,
    )


def transformers_siglip(config: SigLIPConfig, attention: str = "sdpa") -> Any:
    """Return transformers' image encoder at our sizes, with the pooling head that we leave out."""
    import transformers

    return transformers.SiglipVisionModel(siglip_config(config, attention)).eval()


def diffusers_redux(config: ReduxConfig) -> Any:
    """Return diffusers' Redux, whose hidden layer is always three times its output."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    assert config.hidden_dim == 3 * config.context_dim
    return ReduxImageEncoder(redux_dim=config.siglip_dim, txt_in_features=config.context_dim).eval()


def siglip_processor(size: int):
    """Return transformers' Pillow preprocessing with the released preprocessor_config.json."""
    from transformers import SiglipImageProcessorPil

    return SiglipImageProcessorPil(
        size={"height": size, "width": size},
        resample=Image.Resampling.BICUBIC,
        rescale_factor=0.00392156862745098,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
    )


# ---------------------------------------------------------------- whole models

TINY_T5 = T5Config(vocab_size=256, hidden_size=40, head_dim=8, num_heads=4, mlp_size=64, depth=2)
TINY_CLIP = CLIPConfig(vocab_size=1000, hidden_size=24, num_heads=4, mlp_size=48, depth=2)
TINY_QWEN = LanguageModelConfig(
    layers=(1, 2, 4),
    vocab_size=400,
    hidden_size=48,
    mlp_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
TINY_MISTRAL = replace(TINY_QWEN, theta=1e9, eps=1e-5, qk_norm=False)
TINY_AE1 = AutoEncoderConfig(ch=16, norm_groups=16)
TINY_AE2 = replace(TINY_AE1, z_channels=4, scale_factor=None, shift_factor=None)
DEPTH = 6  # layers of the reference's language models; ours leaves the last ones out


def tiny_models(clip_eos: int) -> dict[str, ModelSpec]:
    """Return rows of MODELS with tiny networks; `clip_eos`: the last id of CLIP's vocabulary."""
    flux1 = FLUX1Text(TINY_T5, replace(TINY_CLIP, eos_id=clip_eos))
    qwen, mistral = FLUX2Text(TINY_QWEN), FLUX2Text(TINY_MISTRAL)
    klein = replace(KLEIN_TINY, context_dim=TINY_QWEN.features)
    tiny: dict[str, tuple[FluxConfig, Any, int, AutoEncoderConfig]] = {
        "flux.1-dev": (FLUX1_TINY, flux1, 24, TINY_AE1),
        "flux.1-schnell": (SCHNELL_TINY, flux1, 24, TINY_AE1),
        "flux.2-dev": (replace(klein, guidance=True), mistral, 256, TINY_AE2),
        "flux.2-klein-4b": (klein, qwen, 64, TINY_AE2),
        "flux.2-klein-base-4b": (klein, qwen, 64, TINY_AE2),
    }
    return {
        name: replace(
            MODELS[name],
            transformer=transformer,
            text=text,
            text_length=length,
            autoencoder=autoencoder,
        )
        for name, (transformer, text, length, autoencoder) in tiny.items()
    }


def networks(spec: ModelSpec, seed: int = 0) -> dict[str, nn.Module]:
    """Return our networks of a model with random weights, by the names that `locate` gives."""
    out = {"transformer": Flux(spec.flux_config), "autoencoder": AutoEncoder(spec.autoencoder)}
    if isinstance(spec.text, FLUX1Text):
        out |= {"t5": T5(spec.text.t5), "clip": CLIP(spec.text.clip)}
    else:
        out["model"] = LanguageModel(spec.text.model)
    return {part: randomise(network, seed) for part, network in out.items()}


def released_names(state: dict[str, Tensor], mistral: bool) -> dict[str, Tensor]:
    """Rename a language model's tensors from transformers' names to those of released files."""
    if not mistral:
        return state
    moves = (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", ""),
    )
    return {
        next((new + n[len(old) :] for old, new in moves if n.startswith(old)), n): x
        for n, x in state.items()
    }


def save_sharded(state: dict[str, Tensor], index: Path) -> None:
    """Write two files, and the index with the file of each tensor."""
    shards: dict[str, dict[str, Tensor]] = {}
    for number, (name, tensor) in enumerate(state.items()):
        shards.setdefault(f"model-0000{1 + number % 2}-of-00002.safetensors", {})[name] = (
            tensor.clone()
        )
    for file, part in shards.items():
        save_file(part, index.parent / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_weights(
    home: Path, spec: ModelSpec, parts: dict[str, nn.Module], sharded: bool = True
) -> None:
    """Write the files of a repository as released.

    The klein's autoencoder has diffusers' names. `sharded`: the larger text encoder is in shards.
    """
    states = {part: module.state_dict() for part, module in parts.items()}
    for folder in ("vae", "text_encoder", "text_encoder_2"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    save_file(states["transformer"], home / spec.transformer_file)
    if spec.autoencoder_files[0].startswith("vae/"):
        states["autoencoder"] = autoencoder_to_diffusers(states["autoencoder"], spec.autoencoder)
    save_file(states["autoencoder"], home / spec.autoencoder_files[0])
    if isinstance(spec.text, FLUX1Text):
        save_file(states["clip"], home / spec.text.clip_files[0])
        text, choices = states["t5"], spec.text.t5_files
    else:
        text, choices = states["model"], spec.text.files
        if isinstance(parts["model"], LanguageModel):  # else the reference's, in its own names
            text = language_model_to_transformers(text, mistral=not spec.text.model.qk_norm)
        text = released_names(text, mistral=not spec.text.model.qk_norm)
    save_sharded(text, home / choices[0]) if sharded else save_file(text, home / choices[1])


def diffusers_pipeline(spec: ModelSpec, parts: dict[str, nn.Module], text: dict | None = None):
    """Return diffusers' pipeline of a model with our weights.

    `text`: its tokenizers and text encoders; without them it takes text features.
    """
    import diffusers

    distilled = {}
    family = "Flux2Pipeline"
    if isinstance(spec.text, FLUX1Text):
        family = "FluxPipeline"
    elif not spec.flux_config.guidance:
        family, distilled = "Flux2KleinPipeline", {"is_distilled": not spec.cfg}
    encoders = (
        "text_encoder",
        "tokenizer",
        *(("text_encoder_2", "tokenizer_2") if family == "FluxPipeline" else ()),
    )
    transformer, autoencoder = parts["transformer"].state_dict(), parts["autoencoder"].state_dict()
    shift = (
        dict(shift=1.0)
        if spec.schedule == "unshifted"
        else dict(shift=3.0, use_dynamic_shifting=True)
    )
    pipe = getattr(diffusers, family)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift),
        transformer=loaded(
            diffusers_transformer(spec.flux_config),
            transformer_to_diffusers(transformer, spec.flux_config),
        ),
        vae=loaded(
            diffusers_autoencoder(spec.autoencoder),
            autoencoder_to_diffusers(autoencoder, spec.autoencoder),
        ),
        **dict.fromkeys(encoders) | (text or {}),
        **distilled,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_text(
    spec: ModelSpec, parts: dict[str, nn.Module], home: Path, mistral_template: str
) -> dict:
    """Return transformers' text encoders with our weights, and tokenizers from files in `home`."""
    import transformers

    if isinstance(spec.text, FLUX1Text):
        t5, clip = transformers_t5(spec.text.t5), transformers_clip(spec.text.clip, eos_id=2)
        return {
            "text_encoder": loaded(clip, clip_to_transformers(parts["clip"].state_dict())),
            "text_encoder_2": loaded(t5, t5_to_transformers(parts["t5"].state_dict())),
            "tokenizer": transformers.CLIPTokenizer.from_pretrained(home / "tokenizer"),
            "tokenizer_2": transformers.T5TokenizerFast.from_pretrained(home / "tokenizer_2"),
        }
    mistral = not spec.text.model.qk_norm
    theirs = transformers_language_model(spec.text.model, DEPTH, mistral)
    encoder = {"text_encoder": with_trunk(theirs, parts["model"].state_dict(), mistral)}
    if not mistral:
        return encoder | {
            "tokenizer": transformers.Qwen2TokenizerFast.from_pretrained(home / "tokenizer")
        }
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tekken = str(home / "tokenizer/tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=tekken, padding_side="left", **names
    )
    tokenizer.chat_template = mistral_template
    return encoder | {"tokenizer": tokenizer}


# ---------------------------------------------------------------- golden tensors


def golden_networks() -> dict[str, nn.Module]:
    """Return our networks with the random weights that tests/golden was made with."""
    modules = {
        "flux.1-dev": Flux(FLUX1_TINY),
        "flux.1-schnell": Flux(SCHNELL_TINY),
        "flux.2-dev": Flux(FLUX2_TINY),
        "flux.2-klein": Flux(KLEIN_TINY),
        "flux.1-autoencoder": AutoEncoder(TINY_AE1),
        "flux.2-autoencoder": AutoEncoder(TINY_AE2),
        "t5": T5(TINY_T5),
        "clip": CLIP(replace(TINY_CLIP, eos_id=TINY_CLIP.vocab_size - 1)),
        "qwen3": LanguageModel(TINY_QWEN),
        "mistral": LanguageModel(TINY_MISTRAL),
        "flux.3-klein-base": Flux3(FLUX3_TINY),
        "flux.3-klein": Flux3(replace(FLUX3_TINY, flow_map=True)),
    }
    return {name: randomise(module, seed) for seed, (name, module) in enumerate(modules.items())}


def fingerprint(*modules: nn.Module) -> Tensor:
    """Return one float64 number for each tensor, (tensors,): equal weights give equal numbers.

    A rounding changes a number slightly, a fault changes it clearly. The weights are drawn again in
    each test, and torch does not promise equal draws in every version or on every processor.
    """
    tensors = [
        tensor.double().flatten() for module in modules for tensor in module.state_dict().values()
    ]
    return torch.stack(
        [x @ torch.linspace(1, 2, len(x), dtype=torch.float64) / len(x) ** 0.5 for x in tensors]
    )

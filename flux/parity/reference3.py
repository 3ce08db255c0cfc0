"""Build the FLUX 3 networks of diffusers and transformers with our weights: see `reference`."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flux.autoencoder import AutoEncoder
from flux.configs import MODELS, FLUX2Text, ModelSpec
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.parity.reference import (
    FLUX3_TINY,
    TINY_AE2,
    autoencoder_to_diffusers,
    diffusers_autoencoder,
    loaded,
    randomise,
)
from flux.transformer3 import Flux3, Flux3Config
from flux.weights.diffusers_names3 import SWAPPED, diffusers_layer


def transformer3_to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by diffusers' names; its final modulation has scale before shift."""
    out = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer == SWAPPED:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        out[f"{diffusers_layer(layer)}.{'weight' if leaf == 'scale' else leaf}"] = tensor
    return out


def diffusers_transformer3(config: Flux3Config) -> Any:
    """diffusers' transformer at our config's sizes, on the meta device."""
    from diffusers import Flux3Transformer2DModel

    with torch.device("meta"):
        return Flux3Transformer2DModel(
            in_channels=config.in_channels,
            cond_in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single,
            attention_head_dim=config.hidden_size // config.num_heads,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            mlp_ratio=config.mlp_ratio,
            axes_dims_rope=config.axes_dim,
            rope_theta=config.theta,
            flow_map=config.flow_map,
        )


def diffusers_velocity3(
    model: Any,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    t: Tensor,
    references: Tensor | None = None,
    reference_ids: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Call the transformer as its pipelines do."""
    return model(
        hidden_states=img,
        encoder_hidden_states=txt,
        timestep=t.to(img.dtype),
        img_ids=img_ids,
        txt_ids=txt_ids,
        image_cond_hidden_states=references,
        image_cond_ids=reference_ids,
        target_timestep=None if target is None else target.to(img.dtype),
        return_dict=False,
    )[0]


# ---------------------------------------------------------------- text encoder

QWEN_VL_PREFIX = "model.language_model."


def transformers_qwen_vl(config: LanguageModelConfig, depth: int) -> Any:
    """Return Qwen3-VL at our sizes with `depth` layers, a final norm and a small image encoder.

    `depth` must exceed the last layer that is read: the last hidden state is normalised.
    """
    import transformers

    third = config.head_dim // 6  # RoPE's frequencies are shared among three axes
    rope = {
        "rope_type": "default",
        "rope_theta": config.theta,
        "mrope_section": [config.head_dim // 2 - 2 * third, third, third],
        "mrope_interleaved": True,
    }
    text = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=depth,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.eps,
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters=rope,
    )
    vision = dict(
        depth=1,
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        out_hidden_size=config.hidden_size,
        deepstack_visual_indexes=[0],
        num_position_embeddings=16,
    )
    both = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True
    )
    return transformers.Qwen3VLForConditionalGeneration(both)


def qwen_vl_with(theirs: Any, state: dict[str, Tensor]) -> Any:
    """Load our weights, and random ones into the parts that our language model leaves out.

    All get our dtype, except RoPE's frequencies, which `.to()` would round.
    """
    dtype = state["embed_tokens.weight"].dtype
    ours = {QWEN_VL_PREFIX + name: tensor for name, tensor in state.items()}
    ours["lm_head.weight"] = state["embed_tokens.weight"]
    others = randomise(theirs, 1).state_dict()
    assert ours.keys() <= others.keys()
    return loaded(theirs, {name: value.to(dtype) for name, value in others.items()} | ours)


def qwen_vl_features(theirs: Any, ids: Tensor, mask: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Return (B, L, len(layers) * D), read as in diffusers' FLUX 3 pipelines."""
    positions = torch.arange(ids.shape[1]).expand_as(ids).masked_fill(~mask, 1)
    hidden = theirs(
        ids,
        attention_mask=mask.long(),
        position_ids=positions,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    return torch.cat([hidden[layer] for layer in layers], dim=-1)


# ---------------------------------------------------------------- whole models

TINY_QWEN_VL = LanguageModelConfig(
    layers=(1, 2, 4, 5),
    vocab_size=400,
    hidden_size=48,
    mlp_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    theta=5_000_000.0,
    padding_position=1,
)


def tiny_models3() -> dict[str, ModelSpec]:
    """Return the rows of FLUX 3 with tiny networks."""
    transformer = replace(FLUX3_TINY, context_dim=TINY_QWEN_VL.features)
    return {
        name: replace(
            spec,
            transformer=replace(transformer, flow_map=bool(spec.distilled)),
            text=replace(spec.text, model=TINY_QWEN_VL),  # type: ignore[arg-type]
            text_length=200,
            autoencoder=TINY_AE2,
        )
        for name, spec in MODELS.items()
        if spec.flux3 and spec.weight_format == "bfloat16"
    }


def networks3(spec: ModelSpec, seed: int = 0) -> dict[str, nn.Module]:
    """Return our networks of a model with random weights, by the names that `locate` gives."""
    assert isinstance(spec.transformer, Flux3Config) and isinstance(spec.text, FLUX2Text)
    out = {
        "transformer": Flux3(spec.transformer),
        "autoencoder": AutoEncoder(spec.autoencoder),
        "model": LanguageModel(spec.text.model),
    }
    return {part: randomise(network, seed) for part, network in out.items()}


def diffusers_pipeline3(spec: ModelSpec, parts: dict[str, nn.Module], text: dict) -> Any:
    """Return diffusers' pipeline of FLUX 3 with our weights, without its prompt upsampler.

    `text`: its `text_encoder` and `tokenizer`. As from the released files, the text encoder and the
    transformer have the dtype of `parts`, the autoencoder has its own, and the scales of QK-norm
    are float32.
    """
    from diffusers import Flux3AutoBlocks, Flux3DistilledAutoBlocks

    assert isinstance(spec.transformer, Flux3Config)
    blocks = (Flux3DistilledAutoBlocks if spec.transformer.flow_map else Flux3AutoBlocks)()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = blocks.init_pipeline()
    state = transformer3_to_diffusers(parts["transformer"].state_dict())
    state = {name: x.float() if ".norm_" in name else x for name, x in state.items()}
    pipe.update_components(
        transformer=loaded(diffusers_transformer3(spec.transformer), state),
        vae=loaded(
            diffusers_autoencoder(spec.autoencoder),
            autoencoder_to_diffusers(parts["autoencoder"].state_dict(), spec.autoencoder),
        ),
        **text,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class QwenVLProcessor:
    """What diffusers' pipeline uses of transformers' Qwen3VLProcessor."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def apply_chat_template(
        self, messages: Any, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt
        )

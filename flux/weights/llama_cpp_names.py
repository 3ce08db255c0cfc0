"""The one table of llama.cpp's tensor names in GGUF files of text encoders.

The names are those of gguf-py/gguf/tensor_mapping.py in https://github.com/ggml-org/llama.cpp.
"N" stands for a number.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from flux.errors import UserError
from flux.weights.files import TensorInfo

T5 = {  # llama.cpp's name, without `.weight` -> ours
    "token_embd": "shared",
    "enc.blk.N.attn_norm": "encoder.block.N.layer.0.layer_norm",
    "enc.blk.N.attn_q": "encoder.block.N.layer.0.SelfAttention.q",
    "enc.blk.N.attn_k": "encoder.block.N.layer.0.SelfAttention.k",
    "enc.blk.N.attn_v": "encoder.block.N.layer.0.SelfAttention.v",
    "enc.blk.N.attn_o": "encoder.block.N.layer.0.SelfAttention.o",
    "enc.blk.N.attn_rel_b": "encoder.block.N.layer.0.SelfAttention.relative_attention_bias",
    "enc.blk.N.ffn_norm": "encoder.block.N.layer.1.layer_norm",
    "enc.blk.N.ffn_gate": "encoder.block.N.layer.1.DenseReluDense.wi_0",
    "enc.blk.N.ffn_up": "encoder.block.N.layer.1.DenseReluDense.wi_1",
    "enc.blk.N.ffn_down": "encoder.block.N.layer.1.DenseReluDense.wo",
    "enc.output_norm": "encoder.final_layer_norm",
    "output": "lm_head",
}
LANGUAGE_MODEL = {  # Qwen3 and Mistral
    "token_embd": "embed_tokens",
    "blk.N.attn_norm": "layers.N.input_layernorm",
    "blk.N.attn_q": "layers.N.self_attn.q_proj",
    "blk.N.attn_k": "layers.N.self_attn.k_proj",
    "blk.N.attn_v": "layers.N.self_attn.v_proj",
    "blk.N.attn_output": "layers.N.self_attn.o_proj",
    "blk.N.attn_q_norm": "layers.N.self_attn.q_norm",
    "blk.N.attn_k_norm": "layers.N.self_attn.k_norm",
    "blk.N.ffn_norm": "layers.N.post_attention_layernorm",
    "blk.N.ffn_gate": "layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "layers.N.mlp.up_proj",
    "blk.N.ffn_down": "layers.N.mlp.down_proj",
    "output_norm": "norm",
    "output": "lm_head",
}


def t5_from_llama_cpp(name: str) -> str:
    """Return our name of a T5 tensor. Names that are not llama.cpp's stay as they are."""
    return _rename(re.sub(r"^dec\.", "decoder.", name), T5)


def language_model_from_llama_cpp(name: str) -> str:
    """Return our name of a Qwen3 or Mistral tensor; other names stay as they are."""
    return _rename(name, LANGUAGE_MODEL)


def _rename(name: str, table: dict[str, str]) -> str:
    layer, number = name.removesuffix(".weight"), ""
    if found := re.search(r"blk\.(\d+)\.", layer):
        number = found[1]
        layer = layer.replace(found[0], "blk.N.")
    return f"{table[layer]}.weight".replace("N", number) if layer in table else name


def halves_from_pairs(info: TensorInfo, rows: Tensor, metadata: Mapping, head_dim: int) -> Tensor:
    """Put the rows of a query or key matrix into the order of our rotary embedding.

    llama.cpp's LLaMA and Mistral turn the channel pairs (2i, 2i + 1) of a head. Its converter
    therefore permutes the rows (`LlamaModel.permute` in convert_hf_to_gguf.py). Ours turns
    (i, i + head_dim/2), as transformers does, and llama.cpp's Qwen3 does. Other tensors stay as
    they are, and so do all that do not have llama.cpp's names.

    rows: (heads * head_dim, ...), quantized or not. metadata: of the file.
    UserError if the metadata do not tell the order.
    """
    if not re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", info.name):
        return rows
    architecture = metadata.get("general.architecture")
    if architecture == "qwen3":
        return rows
    if architecture not in ("llama", "mistral3"):
        raise UserError(
            f"{info.file} has the architecture {architecture!r:.60} and not qwen3, llama or "
            "mistral3, so that the order of its query rows is unknown; get another file."
        )
    pairs = rows.unflatten(0, (-1, head_dim // 2, 2))  # (heads, head_dim/2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2)  # a copy

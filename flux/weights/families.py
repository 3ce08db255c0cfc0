"""Tell from the names of tensors which network a file holds: one of ours, or another family's."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

FOREIGN = (  # a pattern in tensor names, and the kind of file that has such names; the first counts
    (
        r"controlnet_\w*(blocks?|embedder|embedding)\.|(^|\.)input_hint_block\.|^control_model\.",
        "a ControlNet",
    ),
    (r"ip_adapter|(^|\.)image_proj\.", "an IP-adapter"),
    (r"(^|\.)pulid_|(^|\.)id_adapter", "a PuLID adapter"),
    (r"distilled_guidance_layer\.", "a Chroma transformer"),
    (r"(^|\.)(txtfusion|text_fusion)\.", "a Krea 2 transformer"),
    (r"double_stream_blocks\.\d", "a HiDream transformer"),
    (r"joint_transformer_blocks\.\d|(^|\.)double_layers\.\d", "an AuraFlow transformer"),
    (r"(^|\.)(adaln_single|caption_projection)\.", "a PixArt, Sana, LTX or Bria transformer"),
    (r"joint_blocks\.\d|(^|\.)pos_embed\.proj\.", "a Stable Diffusion 3 transformer"),
    (r"transformer_blocks\.\d+\.(txt_mod\.1|img_mlp\.gate_layer)\.", "a Qwen-Image transformer"),
    (
        r"(individual|context_embedder\.)_?token_refiner\.",
        "a HunyuanVideo or HunyuanImage transformer",
    ),
    (r"(noise|context)_refiner\.\d", "a Lumina or Z-Image transformer"),
    (r"(^|\.)blocks\.\d+\.((self|cross)_attn|attn1)\.", "a Wan or Cosmos transformer"),
    (r"visual_transformer_blocks\.\d", "a Kandinsky transformer"),
    (
        r"(^|\.)input_blocks\.\d|down_blocks\.\d+\.attentions\.\d+\.proj_in",
        "a Stable Diffusion U-Net",
    ),
)
LORA = "a LoRA"
LORA_NAME = re.compile(
    r"[._](lora|lokr|hada|dora|glora)_|^(lora|lycoris|oft)_|[._]lora\d?\.(down|up)\."
    r"|\.(oft|boft)_|\.diff(_b)?$"
)
LOOKS_LIKE = (  # the same of this project's networks
    *FOREIGN,
    (LORA_NAME.pattern, LORA),
    (r"^redux_(up|down)\.", "the FLUX.1 Redux adapter"),
    (r"(^|\.)((content|txt)_)?mode_blocks\.", "a FLUX 3 transformer"),
    (r"double_stream_modulation_img\.lin\.", "a FLUX.2 transformer"),
    (r"time_(text|guidance)_embed\.", "a transformer in diffusers' layout"),
    (r"double_blocks\.\d+\.img_attn\.", "a FLUX.1 transformer"),
    (r"transformer_blocks\.\d|^x_embedder\.|double_blocks\.\d", "a transformer of another family"),
    (r"(down|up)_blocks\.\d+\.resnets\.", "an autoencoder in diffusers' layout"),
    (r"(encoder\.down|decoder\.up)\.\d", "an autoencoder"),
    (r"text_model\.|^embeddings\.token_embedding\.", "a CLIP text encoder"),
    (r"vision_model\.", "an image encoder, SigLIP or CLIP"),
    (r"encoder\.block\.\d+\.layer\.|^enc\.blk\.\d", "a T5 text encoder"),
    (r"layers\.\d+\.mlp\.gate_proj\.|^blk\.\d+\.ffn_gate\.", "a language model"),
)
USES = {  # what another network is for -> the argument that takes its file
    LORA: "loras",
    "an autoencoder": "autoencoder",
    "an autoencoder in diffusers' layout": "autoencoder",
    "a CLIP text encoder": "text_encoder",
    "a T5 text encoder": "text_encoder_2",
    "a language model": "text_encoder",
}


def qwen_kind(names: Iterable[str], metadata: Mapping[str, Any], read: int) -> str | None:
    """Return "Qwen3" or "Qwen3-VL", whose layers have the same names and sizes; None if unknown.

    An image encoder beside them, or its name for the text part, tells Qwen3-VL; llama.cpp's files
    name it. With more than the `read` layers of FLUX 3 and nothing of that, a file is Qwen3's.
    """
    named = {"qwen3": "Qwen3", "qwen3vl": "Qwen3-VL"}.get(metadata.get("general.architecture", ""))
    if named:
        return named
    names = list(names)
    if not any("q_norm." in name for name in names):  # Mistral has none
        return None
    if any(re.search(r"(^|\.)(visual|language_model)\.", name) for name in names):
        return "Qwen3-VL"
    found = (re.search(r"(^|\.)layers\.(\d{1,9})\.", name) for name in names)
    return "Qwen3" if any(match and int(match[2]) >= read for match in found) else None


def is_lora_name(name: str) -> bool:
    """Return whether a tensor is named as one of a LoRA, or of a file of that kind."""
    return bool(LORA_NAME.search(name))


def foreign_family(names: Iterable[str]) -> str | None:
    """Return the kind of file, in words, if these tensors are of a family that is not ours."""
    return _first_match(FOREIGN, names)


def looks_like(names: Iterable[str]) -> str:
    """Return the network that has such tensors, in words."""
    return _first_match(LOOKS_LIKE, names) or "something else"


def _first_match(kinds: Iterable[tuple[str, str]], names: Iterable[str]) -> str | None:
    names = list(names)
    for pattern, kind in kinds:
        search = re.compile(pattern).search
        if any(map(search, names)):
            return kind
    return None

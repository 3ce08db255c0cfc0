"""The zoo: every released model is one row of MODELS.

A row states the networks, the files, the licence, and how the model's authors sample it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flux.autoencoder import AutoEncoderConfig
from flux.clip import CLIPConfig
from flux.errors import UserError
from flux.language_model import LanguageModelConfig
from flux.t5 import T5Config
from flux.transformer import FluxConfig
from flux.transformer3 import Flux3Config

# ------------------------------------------------------------------ what a row states


@dataclass(frozen=True)
class Licence:
    name: str
    commercial: bool  # whether commercial use is allowed
    gated: bool  # whether the repository asks to accept the licence before a download
    requires_filters: bool = False  # content filters, or a review of the outputs


@dataclass(frozen=True)
class FLUX1Text:
    """FLUX.1: T5 gives the text tokens, CLIP the pooled vector."""

    t5: T5Config = T5Config()
    clip: CLIPConfig = CLIPConfig()
    t5_files: tuple[str, ...] = (  # the first one that exists
        "text_encoder_2/model.safetensors.index.json",
        "text_encoder_2/model.safetensors",
    )
    clip_files: tuple[str, ...] = ("text_encoder/model.safetensors",)
    t5_tokenizer: tuple[str, ...] = ("tokenizer_2/spiece.model",)
    clip_tokenizer: tuple[str, ...] = ("tokenizer/vocab.json", "tokenizer/merges.txt")

    @property
    def networks(self) -> dict[str, tuple[str, ...]]:
        return {"t5": self.t5_files, "clip": self.clip_files}

    @property
    def tokenizers(self) -> dict[str, tuple[str, ...]]:
        return {"t5_tokenizer": self.t5_tokenizer, "clip_tokenizer": self.clip_tokenizer}


@dataclass(frozen=True)
class FLUX2Text:
    """FLUX.2, FLUX 3: middle layers of a language model give the text tokens. No pooled vector."""

    model: LanguageModelConfig
    files: tuple[str, ...] = (  # the first one that exists
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model.safetensors",
    )
    tokenizer: tuple[str, ...] = ("tokenizer/tokenizer.json",)

    @property
    def networks(self) -> dict[str, tuple[str, ...]]:
        return {"model": self.files}

    @property
    def tokenizers(self) -> dict[str, tuple[str, ...]]:
        return {"tokenizer": self.tokenizer}


@dataclass(frozen=True)
class Addon:
    """Files from a second repository, next to the base model's or instead of its transformer."""

    repository: str  # on Hugging Face
    files: tuple[tuple[str, str], ...]  # (part, file); parts: lora, redux, siglip, transformer
    scale: float = 1.0  # of a LoRA


@dataclass(frozen=True)
class ModelSpec:
    """A row of the table."""

    name: str  # the repository's name in lower case
    repository: str  # on Hugging Face; "embedded" if the files are in this package
    licence: Licence
    transformer: FluxConfig | Flux3Config
    transformer_file: str
    text: FLUX1Text | FLUX2Text
    text_length: int  # tokens, padding included; FLUX 3: at most
    autoencoder: AutoEncoderConfig
    autoencoder_files: tuple[str, ...]  # equivalent files; the first is downloaded
    schedule: Literal["linear", "empirical", "unshifted", "constant"]  # how times are shifted
    steps: int
    guidance: float | None = None  # None: the model takes no guidance
    cfg: bool = False  # guidance is classifier-free: a second forward pass without the prompt
    distilled: str = ""  # why steps and guidance are fixed, if they are
    size: int = 1024  # default width and height in pixels
    # what an input image is: the start of img2img, a reference, a control image, an image to fill
    # in, or the input of Redux
    image_mode: Literal["start", "reference", "control", "fill", "redux"] = "start"
    control: Literal["canny", "depth"] | None = None  # the kind of control image
    kv_cached_references: bool = False  # trained to compute references in the first step only
    addon: Addon | None = None
    # of the transformer's file: that of a model's own repository in bfloat16, or another one
    weight_format: Literal[
        "bfloat16", "fp8", "nvfp4", "fp8r", "comfy-bf16", "comfy-int8-convrot"
    ] = "bfloat16"
    unconfirmed: str = ""  # what is not known of the file, which was not at hand

    @property
    def embedded(self) -> bool:
        return self.repository == "embedded"

    @property
    def flux1(self) -> bool:
        """Whether this is FLUX.1, by its text encoders; else FLUX.2 or FLUX 3."""
        return isinstance(self.text, FLUX1Text)

    @property
    def flux_config(self) -> FluxConfig:
        """The transformer's configuration. UserError if this is FLUX 3, which has another."""
        if isinstance(self.transformer, Flux3Config):
            raise UserError(
                f"name: {self.name} is FLUX 3, which is not supported here. "
                "Use a model of FLUX.1 or FLUX.2."
            )
        return self.transformer

    @property
    def pooled_dim(self) -> int | None:
        """The width of the pooled text: FLUX.1's."""
        return None if isinstance(self.transformer, Flux3Config) else self.transformer.vector_dim

    @property
    def flux3(self) -> bool:
        """Whether this is FLUX 3, by its transformer."""
        return isinstance(self.transformer, Flux3Config)


APACHE = Licence("Apache-2.0", commercial=True, gated=False)
SCHNELL = Licence("Apache-2.0", commercial=True, gated=True)
DEV = Licence("FLUX.1 [dev] Non-Commercial License", False, True, requires_filters=True)
DEV2 = Licence("FLUX.2 [dev] Non-Commercial License", False, True, requires_filters=True)
KLEIN = Licence("FLUX Non-Commercial License", False, True, requires_filters=True)
KOMMUNITY = Licence("FLUX Kommunity License v1.0", False, True, requires_filters=True)

# ------------------------------------------------------------------ sizes of the networks

FLUX1 = FluxConfig(
    in_channels=64,
    out_channels=64,
    context_dim=4096,
    hidden_size=3072,
    num_heads=24,
    depth=19,
    depth_single=38,
    mlp_ratio=4.0,
    axes_dim=(16, 56, 56),
    theta=10_000,
    vector_dim=768,
    bias=True,
    gated_mlp=False,
    shared_modulation=False,
)
FLUX2 = FluxConfig()
KLEIN_4B = replace(
    FLUX2,
    context_dim=7680,
    hidden_size=3072,
    num_heads=24,
    depth=5,
    depth_single=20,
    guidance=False,
)
KLEIN_9B = replace(
    FLUX2,
    context_dim=12288,
    hidden_size=4096,
    num_heads=32,
    depth=8,
    depth_single=24,
    guidance=False,
)
KLEIN3_BASE = Flux3Config()
KLEIN3 = replace(KLEIN3_BASE, flow_map=True)
TINY = replace(
    FLUX2,
    in_channels=64,
    out_channels=64,
    context_dim=384,
    hidden_size=128,
    num_heads=4,
    depth=2,
    depth_single=8,
    axes_dim=(8, 8, 8, 8),
    guidance=False,
)

TINY1 = replace(
    FLUX1,
    context_dim=128,
    hidden_size=128,
    num_heads=4,
    depth=2,
    depth_single=8,
    axes_dim=(4, 14, 14),
    vector_dim=128,
)

AE1 = AutoEncoderConfig()
AE2 = replace(AE1, z_channels=32, scale_factor=None, shift_factor=None)
# full_encoder_small_decoder.safetensors of FLUX.2-small-decoder
AE2_SMALL_DECODER = replace(AE2, decoder_ch=96)
AE_TINY = replace(AE2, ch=32, ch_mult=(1, 1, 2, 3), num_res_blocks=1, z_channels=16, norm_groups=8)
# No scale and shift: the encoder was trained to give normalized latents.
AE1_TINY = replace(AE_TINY, scale_factor=1.0, shift_factor=0.0)

T5_TINY = T5Config(vocab_size=512, hidden_size=128, head_dim=32, num_heads=4, mlp_size=256, depth=4)
CLIP_TINY = CLIPConfig(
    vocab_size=672, hidden_size=128, num_heads=4, mlp_size=256, depth=2, max_length=32, eos_id=671
)

QWEN3_4B = LanguageModelConfig()
QWEN3_8B = replace(QWEN3_4B, hidden_size=4096, mlp_size=12288)
MISTRAL = LanguageModelConfig(
    layers=(10, 20, 30),
    vocab_size=131072,
    hidden_size=5120,
    mlp_size=32768,
    theta=1e9,
    eps=1e-5,
    qk_norm=False,
)
QWEN3_VL_4B = replace(
    QWEN3_4B, layers=(4, 8, 12, 16, 20, 24, 28, 32), theta=5_000_000.0, padding_position=1
)
QWEN3_TINY = LanguageModelConfig(
    layers=(2, 3, 4),
    vocab_size=512,
    hidden_size=128,
    mlp_size=384,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)

# ------------------------------------------------------------------ how models are sampled

VAE, AE = "vae/diffusion_pytorch_model.safetensors", "ae.safetensors"  # diffusers' and BFL's names
DISTILLED = "it was distilled to sample without guidance, in few steps"

_dev = ModelSpec(
    name="",
    repository="",
    licence=DEV,
    transformer=FLUX1,
    transformer_file="",
    text=FLUX1Text(),
    text_length=512,
    autoencoder=AE1,
    autoencoder_files=(AE, VAE),
    schedule="linear",
    steps=50,
    guidance=3.5,
)
_schnell = replace(
    _dev,
    licence=SCHNELL,
    transformer=replace(FLUX1, guidance=False),
    text_length=256,
    schedule="unshifted",
    steps=4,
    guidance=None,
    distilled=DISTILLED,
)
_krea = replace(_dev, steps=28, guidance=4.5)
_kontext = replace(_dev, steps=30, guidance=2.5, image_mode="reference")
_redux = replace(_dev, guidance=2.5, image_mode="redux")
_fill = replace(
    _dev,
    transformer=replace(FLUX1, in_channels=384),  # latents, masked image, mask
    text_length=128,
    guidance=30.0,
    image_mode="fill",
)
_control = replace(FLUX1, in_channels=128)  # latents, control image
_canny_lora = replace(_dev, image_mode="control", control="canny", guidance=30.0)
_depth_lora = replace(_dev, image_mode="control", control="depth", guidance=10.0)
_canny = replace(_canny_lora, transformer=_control)
_depth = replace(_depth_lora, transformer=_control)

_dev2 = replace(
    _dev,
    licence=DEV2,
    transformer=FLUX2,
    text=FLUX2Text(MISTRAL),
    autoencoder=AE2,
    schedule="empirical",
    guidance=4.0,
    image_mode="reference",
)
_klein = replace(_dev2, autoencoder_files=(VAE, AE), steps=4, guidance=None, distilled=DISTILLED)
_klein_4b = replace(_klein, licence=APACHE, transformer=KLEIN_4B, text=FLUX2Text(QWEN3_4B))
_klein_9b = replace(_klein, licence=KLEIN, transformer=KLEIN_9B, text=FLUX2Text(QWEN3_8B))
_klein_9b_kv = replace(_klein_9b, kv_cached_references=True)
_undistilled: dict[str, Any] = dict(steps=50, guidance=4.0, cfg=True, distilled="")
_base_4b = replace(_klein_4b, **_undistilled)
_base_9b = replace(_klein_9b, **_undistilled)

_klein3 = replace(
    _klein,
    licence=KOMMUNITY,
    transformer=KLEIN3,
    text=FLUX2Text(QWEN3_VL_4B, tokenizer=("text_encoder/tokenizer.json",)),
    text_length=8192,
    autoencoder_files=(AE, VAE),
    schedule="constant",
    steps=16,
    distilled="it was distilled to a flow map, which samples without guidance, in 16 steps",
)
_klein3_base = replace(
    _klein3, transformer=KLEIN3_BASE, steps=50, guidance=3.5, cfg=True, distilled=""
)

_toy1 = replace(
    _dev,
    licence=APACHE,
    transformer=TINY1,
    text=FLUX1Text(T5_TINY, CLIP_TINY, t5_files=("text_encoder_2/model.safetensors",)),
    text_length=32,
    autoencoder=AE1_TINY,
    autoencoder_files=(AE,),
    steps=8,
    guidance=2.5,
    size=256,
)
_toy2 = replace(
    _klein,
    licence=APACHE,
    transformer=TINY,
    text=FLUX2Text(QWEN3_TINY, files=("text_encoder/model.safetensors",)),
    text_length=32,
    autoencoder=AE_TINY,
    autoencoder_files=(AE,),
    steps=8,
    guidance=1.5,
    cfg=True,
    distilled="",
    size=256,
)

# ------------------------------------------------------------------ the table


def _row(like: ModelSpec, repository: str, file: str) -> ModelSpec:
    """A model whose files are all in one repository."""
    return replace(
        like,
        name=repository.lower(),
        repository=f"black-forest-labs/{repository}",
        transformer_file=f"{file}.safetensors",
    )


def _on_dev(like: ModelSpec, name: str, scale: float = 1.0, **files: str) -> ModelSpec:
    """All networks of FLUX.1 [dev], and files of a second repository: part=file."""
    addon = Addon(f"black-forest-labs/{name}", tuple(files.items()), scale)
    return replace(_row(like, "FLUX.1-dev", "flux1-dev"), name=name.lower(), addon=addon)


def _quantized(like: ModelSpec, base: str, repository: str) -> ModelSpec:
    """A transformer in a separate repository; the other files are in the repository `base`."""
    file = repository.lower().replace("flux.2-dev", "flux2-dev").replace("flux.2", "flux-2")
    row = _row(like, base, file)
    addon = Addon(f"black-forest-labs/{repository}", (("transformer", row.transformer_file),))
    weight_format: Any = "nvfp4" if file.endswith("nvfp4") else "fp8"
    return replace(row, name=repository.lower(), addon=addon, weight_format=weight_format)


def _row3(like: ModelSpec, repository: str) -> ModelSpec:
    """A model of FLUX 3, whose files are all in one repository."""
    return replace(_row(like, repository, "model"), name=repository.replace("flux-3", "flux.3"))


VARIANT = "its place in the repository, and which matrices stay in bfloat16, are as others say"
COMFY = "the names of its tensors, and whether q, k and v are one matrix, are not known"
Format3 = Literal["fp8r", "nvfp4", "comfy-bf16", "comfy-int8-convrot"]


def _other3(like: ModelSpec, repository: str, weight_format: Format3) -> ModelSpec:
    """Another file of a FLUX 3 transformer: of the model's repository, or of ComfyUI's."""
    row = _row3(like, repository)
    row = replace(row, name=f"{row.name}-{weight_format}", weight_format=weight_format)
    if not weight_format.startswith("comfy-"):
        file = f"variants/{weight_format}/model.safetensors"
        return replace(row, transformer_file=file, unconfirmed=VARIANT)
    name = f"{repository.replace('flux-3', 'flux3')}-{weight_format.removeprefix('comfy-')}"
    file = f"diffusion_models/{name}.safetensors"
    addon = Addon("black-forest-labs/flux-3-image-klein-comfy", (("transformer", file),))
    return replace(row, transformer_file=file, addon=addon, unconfirmed=COMFY)


def _embedded(like: ModelSpec, name: str, file: str) -> ModelSpec:
    """A toy model whose files are in this package."""
    return replace(like, name=name, repository="embedded", transformer_file=f"{file}.safetensors")


# fmt: off
_ROWS = (
    _row(_schnell, "FLUX.1-schnell", "flux1-schnell"),
    _row(_dev, "FLUX.1-dev", "flux1-dev"),
    _row(_krea, "FLUX.1-Krea-dev", "flux1-krea-dev"),
    _row(_fill, "FLUX.1-Fill-dev", "flux1-fill-dev"),
    _row(_canny, "FLUX.1-Canny-dev", "flux1-canny-dev"),
    _row(_depth, "FLUX.1-Depth-dev", "flux1-depth-dev"),
    _on_dev(_canny_lora, "FLUX.1-Canny-dev-lora", 0.85, lora="flux1-canny-dev-lora.safetensors"),
    _on_dev(_depth_lora, "FLUX.1-Depth-dev-lora", 0.85, lora="flux1-depth-dev-lora.safetensors"),
    _on_dev(_redux, "FLUX.1-Redux-dev", redux="flux1-redux-dev.safetensors",
            siglip="image_encoder/model.safetensors"),
    _row(_kontext, "FLUX.1-Kontext-dev", "flux1-kontext-dev"),
    _row(_dev2, "FLUX.2-dev", "flux2-dev"),
    _row(_klein_4b, "FLUX.2-klein-4B", "flux-2-klein-4b"),
    _row(_klein_9b, "FLUX.2-klein-9B", "flux-2-klein-9b"),
    _row(_klein_9b_kv, "FLUX.2-klein-9b-kv", "flux-2-klein-9b-kv"),
    _row(_base_4b, "FLUX.2-klein-base-4B", "flux-2-klein-base-4b"),
    _row(_base_9b, "FLUX.2-klein-base-9B", "flux-2-klein-base-9b"),
    _quantized(_dev2, "FLUX.2-dev", "FLUX.2-dev-NVFP4"),
    _quantized(_klein_4b, "FLUX.2-klein-4B", "FLUX.2-klein-4b-fp8"),
    _quantized(_klein_4b, "FLUX.2-klein-4B", "FLUX.2-klein-4b-nvfp4"),
    _quantized(_klein_9b, "FLUX.2-klein-9B", "FLUX.2-klein-9b-fp8"),
    _quantized(_klein_9b, "FLUX.2-klein-9B", "FLUX.2-klein-9b-nvfp4"),
    _quantized(_klein_9b_kv, "FLUX.2-klein-9b-kv", "FLUX.2-klein-9b-kv-fp8"),
    _quantized(_base_4b, "FLUX.2-klein-base-4B", "FLUX.2-klein-base-4b-fp8"),
    _quantized(_base_9b, "FLUX.2-klein-base-9B", "FLUX.2-klein-base-9b-fp8"),
    _quantized(_base_9b, "FLUX.2-klein-base-9B", "FLUX.2-klein-base-9b-nvfp4"),
    _row3(_klein3, "flux-3-image-klein"),
    _row3(_klein3_base, "flux-3-image-klein-base"),
    _other3(_klein3, "flux-3-image-klein", "fp8r"),
    _other3(_klein3, "flux-3-image-klein", "nvfp4"),
    _other3(_klein3, "flux-3-image-klein", "comfy-bf16"),
    _other3(_klein3, "flux-3-image-klein", "comfy-int8-convrot"),
    _other3(_klein3_base, "flux-3-image-klein-base", "fp8r"),
    _other3(_klein3_base, "flux-3-image-klein-base", "nvfp4"),
    _other3(_klein3_base, "flux-3-image-klein-base", "comfy-bf16"),
    _other3(_klein3_base, "flux-3-image-klein-base", "comfy-int8-convrot"),
    _embedded(_toy1, "flux.1-tiny", "flux1-tiny"),
    _embedded(_toy2, "flux.2-tiny", "flux-2-tiny"),
)
# fmt: on
MODELS: dict[str, ModelSpec] = {row.name: row for row in _ROWS}

# A folder for each embedded model, with the files of a repository.
EMBEDDED = Path(__file__).parent / "toy/tiny"

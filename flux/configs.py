"""Every released model is one row of one table: its networks, files, licence, and how its authors sample it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flux.autoencoder import AutoEncoderConfig
from flux.clip import CLIPConfig
from flux.language_model import LanguageModelConfig
from flux.t5 import T5Config
from flux.transformer import FluxConfig


@dataclass(frozen=True)
class Licence:
    name: str
    commercial: bool
    gated: bool  # the repository asks to accept the licence before it gives the files


@dataclass(frozen=True)
class ModelSpec:
    """A row of the table. `None` for `guidance` means that the model takes none."""

    name: str
    repository: str  # on Hugging Face
    licence: Licence
    transformer: FluxConfig
    transformer_file: str
    text: "FLUX1Text | FLUX2Text"
    text_length: int  # tokens, padding included
    autoencoder: AutoEncoderConfig
    autoencoder_files: tuple[str, ...]  # either will do; the first is downloaded
    schedule: Literal["linear", "empirical", "unshifted"]
    steps: int
    guidance: float | None = None
    cfg: bool = (
        False  # guidance is classifier-free: two forward passes, with and without the prompt
    )
    distilled: str = ""  # why steps and guidance are part of the weights, if they are
    size: int = 1024  # default width and height, in pixels
    image_mode: Literal["start", "reference", "control", "fill", "redux"] = (
        "start"  # what a picture that it is given becomes
    )
    control: Literal["canny", "depth"] | None = None  # of what kind a control picture is
    kv_cached_references: bool = (
        False  # references are computed once, not at every step: it was trained so
    )
    addon: "Addon | None" = None
    weight_format: Literal["bfloat16", "fp8", "nvfp4"] = (
        "bfloat16"  # of the large matrices in the transformer's file
    )

    @property
    def embedded(self) -> bool:
        return self.repository == "embedded"

    @property
    def flux1(self) -> bool:
        """Of the first family, by its text encoders; else FLUX.2."""
        return isinstance(self.text, FLUX1Text)


@dataclass(frozen=True)
class Addon:
    """What a row takes from a second repository, beside the base model in the first, or in place of its transformer."""

    repository: str
    files: tuple[tuple[str, str], ...]  # part, file
    scale: float = 1.0  # of a LoRA


@dataclass(frozen=True)
class FLUX1Text:
    """T5 gives the text tokens, CLIP the pooled vector; both lie in the FLUX.1 repositories."""

    t5: T5Config = T5Config()
    clip: CLIPConfig = CLIPConfig()
    t5_files: tuple[str, ...] = (
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
    """A language model read in the middle gives the text tokens; there is no pooled vector."""

    model: LanguageModelConfig
    files: tuple[str, ...] = (
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


APACHE = Licence("Apache-2.0", commercial=True, gated=False)
SCHNELL = Licence("Apache-2.0", commercial=True, gated=True)
DEV = Licence("FLUX.1 [dev] Non-Commercial License", commercial=False, gated=True)
DEV2 = Licence("FLUX.2 [dev] Non-Commercial License", commercial=False, gated=True)
KLEIN = Licence("FLUX Non-Commercial License", commercial=False, gated=True)
TOY = Licence("Apache-2.0", commercial=True, gated=False)  # trained on generated pictures

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
AE2_SMALL_DECODER = replace(
    AE2, decoder_ch=96
)  # full_encoder_small_decoder.safetensors of FLUX.2-small-decoder
AE_TINY = replace(AE2, ch=32, ch_mult=(1, 1, 2, 3), num_res_blocks=1, z_channels=16, norm_groups=8)
AE1_TINY = replace(
    AE_TINY, scale_factor=1.0, shift_factor=0.0
)  # its encoder's last layer was trained to give what is normal

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
QWEN3_TINY = LanguageModelConfig(
    layers=(2, 3, 4),
    vocab_size=512,
    hidden_size=128,
    mlp_size=384,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)

DISTILLED = "it was distilled to sample without guidance, in few steps"

VAE, AE = "vae/diffusion_pytorch_model.safetensors", "ae.safetensors"  # diffusers' names, and BFL's

_flux1 = ModelSpec(
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
_flux2 = replace(
    _flux1,
    licence=DEV2,
    transformer=FLUX2,
    text=FLUX2Text(MISTRAL),
    autoencoder=AE2,
    schedule="empirical",
    guidance=4.0,
    image_mode="reference",
)
_klein = replace(_flux2, autoencoder_files=(VAE, AE), steps=4, guidance=None, distilled=DISTILLED)
_klein_4b = replace(_klein, licence=APACHE, transformer=KLEIN_4B, text=FLUX2Text(QWEN3_4B))
_klein_9b = replace(_klein, licence=KLEIN, transformer=KLEIN_9B, text=FLUX2Text(QWEN3_8B))
_canny, _depth = (
    dict(image_mode="control", control=kind, guidance=g)
    for kind, g in (("canny", 30.0), ("depth", 10.0))
)
_base = dict(steps=50, guidance=4.0, cfg=True, distilled="")


def _row(like: ModelSpec, repository: str, filename: str, **changes) -> ModelSpec:
    name = repository.lower()
    return replace(
        like,
        name=name,
        repository=f"black-forest-labs/{repository}",
        transformer_file=filename,
        **changes,
    )


def _adapted(name: str, *files: tuple[str, str], scale: float = 1.0, **changes) -> ModelSpec:
    """A row that stands on FLUX.1 [dev]: its transformer, text encoders and autoencoder, and something of its own."""
    dev = _row(_flux1, "FLUX.1-dev", "flux1-dev.safetensors", **changes)
    return replace(dev, name=name.lower(), addon=Addon(f"black-forest-labs/{name}", files, scale))


def _quantised(like: ModelSpec, base: str, repository: str, filename: str, **changes) -> ModelSpec:
    """A row whose own repository has nothing but a transformer; its text encoder and autoencoder lie in that of `base`."""
    row, storage = _row(like, base, filename, **changes), "nvfp4" if "nvfp4" in filename else "fp8"
    adapter = Addon(f"black-forest-labs/{repository}", (("transformer", filename),))
    return replace(row, name=repository.lower(), addon=adapter, weight_format=storage)


def _table(rows: Iterable[ModelSpec]) -> dict[str, ModelSpec]:
    return {row.name: row for row in rows}


MODELS: dict[str, ModelSpec] = _table(
    [
        _row(
            _flux1,
            "FLUX.1-schnell",
            "flux1-schnell.safetensors",
            licence=SCHNELL,
            transformer=replace(FLUX1, guidance=False),
            text_length=256,
            schedule="unshifted",
            steps=4,
            guidance=None,
            distilled=DISTILLED,
        ),
        _row(_flux1, "FLUX.1-dev", "flux1-dev.safetensors"),
        _row(_flux1, "FLUX.1-Krea-dev", "flux1-krea-dev.safetensors", steps=28, guidance=4.5),
        _row(
            _flux1,
            "FLUX.1-Fill-dev",
            "flux1-fill-dev.safetensors",
            transformer=replace(FLUX1, in_channels=384),
            text_length=128,
            guidance=30.0,
            image_mode="fill",
        ),
        _row(
            _flux1,
            "FLUX.1-Canny-dev",
            "flux1-canny-dev.safetensors",
            transformer=replace(FLUX1, in_channels=128),
            **_canny,
        ),
        _row(
            _flux1,
            "FLUX.1-Depth-dev",
            "flux1-depth-dev.safetensors",
            transformer=replace(FLUX1, in_channels=128),
            **_depth,
        ),
        _adapted(
            "FLUX.1-Canny-dev-lora",
            ("lora", "flux1-canny-dev-lora.safetensors"),
            scale=0.85,
            **_canny,
        ),
        _adapted(
            "FLUX.1-Depth-dev-lora",
            ("lora", "flux1-depth-dev-lora.safetensors"),
            scale=0.85,
            **_depth,
        ),
        _adapted(
            "FLUX.1-Redux-dev",
            ("redux", "flux1-redux-dev.safetensors"),
            ("siglip", "image_encoder/model.safetensors"),
            guidance=2.5,
            image_mode="redux",
        ),
        _row(
            _flux1,
            "FLUX.1-Kontext-dev",
            "flux1-kontext-dev.safetensors",
            steps=30,
            guidance=2.5,
            image_mode="reference",
        ),
        _row(_flux2, "FLUX.2-dev", "flux2-dev.safetensors"),
        _row(_klein_4b, "FLUX.2-klein-4B", "flux-2-klein-4b.safetensors"),
        _row(_klein_9b, "FLUX.2-klein-9B", "flux-2-klein-9b.safetensors"),
        _row(
            _klein_9b,
            "FLUX.2-klein-9b-kv",
            "flux-2-klein-9b-kv.safetensors",
            kv_cached_references=True,
        ),
        _row(_klein_4b, "FLUX.2-klein-base-4B", "flux-2-klein-base-4b.safetensors", **_base),
        _row(_klein_9b, "FLUX.2-klein-base-9B", "flux-2-klein-base-9b.safetensors", **_base),
        _quantised(_flux2, "FLUX.2-dev", "FLUX.2-dev-NVFP4", "flux2-dev-nvfp4.safetensors"),
        _quantised(
            _klein_4b, "FLUX.2-klein-4B", "FLUX.2-klein-4b-fp8", "flux-2-klein-4b-fp8.safetensors"
        ),
        _quantised(
            _klein_4b,
            "FLUX.2-klein-4B",
            "FLUX.2-klein-4b-nvfp4",
            "flux-2-klein-4b-nvfp4.safetensors",
        ),
        _quantised(
            _klein_9b, "FLUX.2-klein-9B", "FLUX.2-klein-9b-fp8", "flux-2-klein-9b-fp8.safetensors"
        ),
        _quantised(
            _klein_9b,
            "FLUX.2-klein-9B",
            "FLUX.2-klein-9b-nvfp4",
            "flux-2-klein-9b-nvfp4.safetensors",
        ),
        _quantised(
            _klein_9b,
            "FLUX.2-klein-9b-kv",
            "FLUX.2-klein-9b-kv-fp8",
            "flux-2-klein-9b-kv-fp8.safetensors",
            kv_cached_references=True,
        ),
        _quantised(
            _klein_4b,
            "FLUX.2-klein-base-4B",
            "FLUX.2-klein-base-4b-fp8",
            "flux-2-klein-base-4b-fp8.safetensors",
            **_base,
        ),
        _quantised(
            _klein_9b,
            "FLUX.2-klein-base-9B",
            "FLUX.2-klein-base-9b-fp8",
            "flux-2-klein-base-9b-fp8.safetensors",
            **_base,
        ),
        _quantised(
            _klein_9b,
            "FLUX.2-klein-base-9B",
            "FLUX.2-klein-base-9b-nvfp4",
            "flux-2-klein-base-9b-nvfp4.safetensors",
            **_base,
        ),
        replace(
            _flux1,
            name="flux.1-tiny",
            repository="embedded",
            licence=TOY,
            size=256,
            steps=8,
            guidance=2.5,
            transformer=TINY1,
            transformer_file="flux1-tiny.safetensors",
            text_length=32,
            autoencoder=AE1_TINY,
            autoencoder_files=(AE,),
            text=FLUX1Text(T5_TINY, CLIP_TINY, ("text_encoder_2/model.safetensors",)),
        ),
        replace(
            _klein,
            name="flux.2-tiny",
            repository="embedded",
            licence=TOY,
            size=256,
            steps=8,
            guidance=1.5,
            cfg=True,
            distilled="",
            transformer=TINY,
            transformer_file="flux-2-tiny.safetensors",
            text=FLUX2Text(QWEN3_TINY, ("text_encoder/model.safetensors",)),
            text_length=32,
            autoencoder=AE_TINY,
            autoencoder_files=(AE,),
        ),
    ]
)
EMBEDDED = (
    Path(__file__).parent / "toy/tiny"
)  # a folder for each embedded model, in the layout of a repository

"""FLUX 3's pipeline against literals: norms that diffusers 0.42.1 gave on another machine.

Every tensor of the tiny parts is drawn from its name in diffusers and transformers, which only
build the weights here. Seen there: float32 agrees to 1e-5 on other machines.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import flux
from flux.autoencoder import AutoEncoderConfig
from flux.configs import MODELS, FLUX2Text
from flux.language_model import LanguageModelConfig
from flux.parity.reference import diffusers_autoencoder
from flux.parity.reference3 import diffusers_transformer3, transformers_qwen_vl
from flux.transformer3 import Flux3Config

QWEN = LanguageModelConfig(
    layers=(2, 4, 6, 8),
    vocab_size=259,
    hidden_size=32,
    mlp_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    theta=5_000_000.0,
    padding_position=1,
)
AE = AutoEncoderConfig(
    ch=8,
    ch_mult=(1, 1, 2, 2),
    num_res_blocks=1,
    z_channels=8,
    norm_groups=4,
    scale_factor=None,
    shift_factor=None,
)
LITERALS = {  # model, references -> shape and norm of the latents, norm of the pixels
    ("flux.3-image-klein-base", "text"): ((1, 32, 3, 5), 31.941063, 56.877005),
    ("flux.3-image-klein-base", "one"): ((1, 32, 4, 5), 34.961249, 51.850352),
    ("flux.3-image-klein-base", "two"): ((1, 32, 4, 3), 27.907497, 50.901040),
    ("flux.3-image-klein", "text"): ((1, 32, 3, 5), 30.182910, 57.208570),
    ("flux.3-image-klein", "one"): ((1, 32, 4, 5), 34.021906, 51.488271),
    ("flux.3-image-klein", "two"): ((1, 32, 4, 3), 26.775864, 50.972582),
}


def fill(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Return values for the tensors of a module, each drawn from its own name."""
    out = {}
    for name, tensor in module.state_dict().items():
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)) % 9973)
        if not tensor.is_floating_point():
            value = torch.zeros(tensor.shape, dtype=tensor.dtype)
        elif name.endswith("running_mean"):
            value = 0.1 * torch.randn(tensor.shape, generator=generator)
        elif name.endswith("running_var"):
            value = 1 + torch.rand(tensor.shape, generator=generator)
        elif tensor.ndim > 1:
            value = torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5
        elif "bias" in name:
            value = 0.02 * torch.randn(tensor.shape, generator=generator)
        else:
            value = 1 + 0.1 * torch.randn(tensor.shape, generator=generator)
        out[name] = value
    return out


def write_tokenizer(path) -> None:
    """Write bytes as tokens, and Qwen's three special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(path))


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = {
    "text": None,
    "one": (picture(70, 45, 5),),
    "two": (picture(48, 64, 6), picture(33, 40, 7)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* was distilled for")
@pytest.mark.parametrize("name", ["flux.3-image-klein-base", "flux.3-image-klein"])
def test_norms_of_latents_and_pixels(name, tmp_path, monkeypatch):
    transformer = Flux3Config(
        in_channels=32,
        context_dim=128,
        hidden_size=96,
        num_heads=3,
        depth=2,
        depth_single=3,
        axes_dim=(8, 8, 8, 8),
        flow_map=not name.endswith("base"),
    )
    text = FLUX2Text(QWEN, tokenizer=("text_encoder/tokenizer.json",))
    spec = replace(MODELS[name], transformer=transformer, text=text, autoencoder=AE)
    monkeypatch.setitem(MODELS, name, spec)
    monkeypatch.setattr("flux.runtime.checks.MIN_SIDE", 32)  # its sides are 48 pixels
    home = tmp_path / spec.repository.split("/")[1]
    for folder in ("text_encoder", "vae"):
        (home / folder).mkdir(parents=True)
    write_tokenizer(home / "text_encoder/tokenizer.json")
    with torch.device("meta"):
        qwen = transformers_qwen_vl(QWEN, 9)
    words = {n: x for n, x in fill(qwen, 1).items() if n != "lm_head.weight"}
    save_file(words, home / "text_encoder/model.safetensors")
    save_file(fill(diffusers_transformer3(transformer), 2), home / "model.safetensors")
    vae = fill(diffusers_autoencoder(AE), 3)
    save_file(vae, home / "vae/diffusion_pytorch_model.safetensors")

    pipe = flux.load(name, tmp_path, "cpu", torch.float32, numerics="diffusers")
    features = pipe.encode("a red cube left of a blue ball")
    assert features.tokens.shape == (1, 80, 128)
    assert features.tokens.norm().item() == pytest.approx(216.813231, rel=1e-5)
    for kind, images in IMAGES.items():
        shape, latents_norm, pixels_norm = LITERALS[name, kind]
        conditions, size = None, dict(width=80, height=48)
        if images:
            size = dict(width=48, height=64) if kind == "two" else {}  # else 64x64
            conditions = pipe.condition(flux.ImageInputs(images), **size)
        latents = pipe.sample(features, [42], steps=4, conditions=conditions, **size)
        assert latents.shape == shape
        assert latents.norm().item() == pytest.approx(latents_norm, rel=2e-5)
        pixels = (pipe.to_pixels(latents) / 2 + 0.5).clamp(0, 1)
        if conditions is not None and conditions.crop:
            left, top, right, bottom = conditions.crop
            pixels = pixels[..., top:bottom, left:right]
        assert pixels.norm().item() == pytest.approx(pixels_norm, rel=2e-5)

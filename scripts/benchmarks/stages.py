"""What stands around the transformer, ours and diffusers': text encoders, autoencoder, the picture's file."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.measure import peak_bytes
from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.timing import by_turns, pair, random_weights, weight_bytes
from flux.autoencoder import AutoEncoder, AutoEncoderConfig
from flux.configs import AE1, AE2, MISTRAL, QWEN3_4B, QWEN3_8B
from flux.image_io import output as images
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.parity import reference
from flux.runtime.fast import fast_autoencoder
from flux.runtime.lazy_module import LazyModule

TEXT_ENCODERS = {  # as released: layers, whether the head has weights of its own, what part of the weights we may hold
    "Qwen3 4B": (QWEN3_4B, 36, False, 0.78),
    "Qwen3 8B": (QWEN3_8B, 36, True, 0.72),
    "Mistral Small": (MISTRAL, 40, True, 0.75),
}
AUTOENCODERS = {"FLUX.1": AE1, "FLUX.2": AE2}


def text_rows(setting: Setting) -> Iterator[Row]:
    for name, (config, depth, own_head, share) in TEXT_ENCODERS.items():
        yield text_bytes(name, config, depth, own_head, share)
        yield from encode_rows(name, config, depth, setting)


def text_bytes(
    name: str, config: LanguageModelConfig, depth: int, own_head: bool, share: float
) -> Row:
    """Weights of the language model at full size; without Mistral's eyes, which only theirs has."""
    mistral = not config.qk_norm
    with torch.device("meta"):
        ours, theirs = (
            LanguageModel(config),
            reference.transformers_language_model(config, depth, mistral),
        )
    (prefix,) = reference.language_model_to_transformers({"": None}, mistral)
    trunk = sum(p.numel() for key, p in theirs.named_parameters() if key.startswith(prefix))
    head = own_head * config.vocab_size * config.hidden_size
    return Row(f"text, {name}, weights", "B", weight_bytes(ours), 2 * (trunk + head), goal=share)


def encode_rows(
    name: str, config: LanguageModelConfig, depth: int, setting: Setting
) -> Iterator[Row]:
    """All layers, narrowed in every dimension, so that layers and head keep their shares of the work."""
    n, mistral = setting.shrink, not config.qk_norm
    config = replace(
        config,
        vocab_size=config.vocab_size // n,
        hidden_size=config.hidden_size // n,
        mlp_size=config.mlp_size // n,
        num_heads=max(1, config.num_heads // n),
        num_kv_heads=max(1, config.num_kv_heads // n),
    )
    ours = random_weights(lambda: LanguageModel(config), setting.device, torch.bfloat16)
    state = {key: tensor.cpu() for key, tensor in ours.state_dict().items()}
    theirs = reference.with_trunk(
        reference.transformers_language_model(config, depth, mistral), state, mistral
    )
    theirs = theirs.to(setting.device)
    ids = torch.randint(
        1, config.vocab_size - 1, (1, setting.text), generator=torch.Generator().manual_seed(0)
    )
    real = torch.arange(setting.text)[None] < max(
        1, setting.text // 8
    )  # a prompt of usual length, and padding
    ids, real = ids.to(setting.device), (real.flip(1) if mistral else real).to(setting.device)
    mine = lambda: ours(ids, real)[real]  # noqa: E731  what padding becomes has no meaning to compare

    def other():
        return reference.transformers_features(theirs, ids, real, config.layers)[real]

    case = f"text, {name}, {len(ours.layers)} of {depth} layers, 1/{n} width, bfloat16"
    with torch.no_grad():
        yield pair(case, mine, other, setting, goal=0.75)
        yield Row(f"{case}, peak of activations", "B", peak_bytes(mine), peak_bytes(other))


def autoencoder_rows(setting: Setting) -> Iterator[Row]:
    for name, config in AUTOENCODERS.items():
        config = replace(config, ch=setting.channels, norm_groups=min(32, setting.channels))
        ours = our_autoencoder(config, setting.device)
        theirs = their_autoencoder(ours)
        side = setting.decoded // 16
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(4, config.latent_channels, side, side, generator=generator).to(
            setting.device, torch.bfloat16
        )
        pixels = (
            torch.rand(1, 3, 16 * side, 16 * side, generator=generator).to(
                setting.device, torch.bfloat16
            )
            * 2
            - 1
        )
        case = f"{name}, {setting.decoded}x{setting.decoded}, bfloat16"
        with torch.no_grad():
            yield from coding_rows(
                f"decode, {case}",
                ours.decode,
                lambda x: reference.diffusers_decode(theirs, x),
                latents[:1],
                setting,
                goal=0.75,
                peak=0.70,
            )
            yield batch_row(f"decode, {case}", ours, theirs, latents)
            yield from coding_rows(
                f"encode, {case}",
                ours.encode,
                lambda x: reference.diffusers_encode(theirs, x),
                pixels,
                setting,
            )


def our_autoencoder(config: AutoEncoderConfig, device: torch.device) -> AutoEncoder:
    """From a file, and in the order of memory that the pipeline gives to convolutions: it decides how fast they are."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "ae.safetensors")
        save_file(
            random_weights(lambda: AutoEncoder(config), "cpu", torch.bfloat16).state_dict(), path
        )
        network = LazyModule(AutoEncoder, config, [path], device=device, dtype=torch.bfloat16)
        if device.type == "cpu":
            network.set_transform(fast_autoencoder)
        return network()


def their_autoencoder(ours: AutoEncoder) -> nn.Module:
    """diffusers', with the same weights in the order in which its loader leaves them, whatever ours is in."""
    state = {name: tensor.contiguous() for name, tensor in ours.state_dict().items()}
    return reference.loaded(
        reference.diffusers_autoencoder(ours.config),
        reference.autoencoder_to_diffusers(state, ours.config),
    )


def coding_rows(
    case: str, ours, theirs, x: Tensor, setting: Setting, goal=None, peak=None
) -> Iterator[Row]:
    """Time, and the peak of activations a pixel of the picture."""
    mine, other = lambda: ours(x), lambda: theirs(x)
    yield pair(case, mine, other, setting, goal=goal)
    bytes_each = [peak_bytes(function) / setting.decoded**2 for function in (mine, other)]
    yield Row(f"{case}, peak of activations", "B/pixel", *bytes_each, goal=peak)


def batch_row(case: str, ours: AutoEncoder, theirs: nn.Module, latents: Tensor) -> Row:
    """How much more memory four pictures take than one."""

    def growth(decode):
        return peak_bytes(lambda: decode(latents)) / peak_bytes(lambda: decode(latents[:1]))

    ratios = growth(ours.decode), growth(lambda x: reference.diffusers_decode(theirs, x))
    return Row(f"{case}, peak of a batch of 4 over that of 1", "", *ratios, limit=1.2)


def saving_row(setting: Setting) -> Row:
    """Decoded pixels -> the bytes of a PNG on disk."""
    pixels = picture(setting.saved, setting.device)
    with TemporaryDirectory() as folder:
        seconds = by_turns(
            [save_ours(pixels, Path(folder)), save_theirs(pixels, Path(folder))],
            setting.rounds,
            setting.enough,
        )
    case = f"saving, {setting.saved}x{setting.saved}, pixels to PNG"
    return Row(case, "s", *seconds, goal=0.45, runs=2 * setting.rounds)


def picture(side: int, device: torch.device) -> Tensor:
    """(1, 3, side, side), about as smooth and as noisy as a photo: that decides what a PNG takes."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 32, 32, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic") / 2
    return (smooth + torch.randn(smooth.shape, generator=generator) / 100).to(
        device, torch.bfloat16
    )


def save_ours(pixels: Tensor, folder: Path) -> Callable[[], None]:
    return lambda: images.save(images.to_images(pixels)[0], folder / "ours.png", {}).unlink()


def save_theirs(pixels: Tensor, folder: Path) -> Callable[[], None]:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor()
    return lambda: processor.postprocess(pixels, "pil")[0].save(folder / "theirs.png")

"""Everything but the transformer, ours and diffusers': text encoders, autoencoder, saving."""

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
from flux.configs import AE1, AE2, MISTRAL, QWEN3_4B, QWEN3_8B, QWEN3_VL_4B
from flux.image_io import output
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.parity import reference
from flux.runtime.fast import fast_autoencoder
from flux.runtime.lazy_module import LazyModule

TEXT_ENCODERS = {  # as released: config, layers, own weights of the head, goal for the weights
    "Qwen3 4B": (QWEN3_4B, 36, False, 0.78),
    "Qwen3 8B": (QWEN3_8B, 36, True, 0.72),
    "Mistral Small": (MISTRAL, 40, True, 0.75),
    "Qwen3-VL 4B": (QWEN3_VL_4B, 36, False, 0.90),
}
AUTOENCODERS = {"FLUX.1": AE1, "FLUX.2": AE2}


def text_rows(setting: Setting) -> Iterator[Row]:
    for name, (config, depth, own_head, share) in TEXT_ENCODERS.items():
        yield text_bytes(name, config, depth, own_head, share)
        yield from encode_rows(name, config, depth, setting)


def text_bytes(
    name: str, config: LanguageModelConfig, depth: int, own_head: bool, share: float
) -> Row:
    """Count the weights at full size, without Mistral's vision tower, which only theirs has."""
    mistral = not config.qk_norm
    with torch.device("meta"):
        ours = LanguageModel(config)
        theirs = reference.transformers_language_model(config, depth, mistral)
    (prefix,) = reference.language_model_to_transformers({"": None}, mistral)
    trunk = sum(p.numel() for key, p in theirs.named_parameters() if key.startswith(prefix))
    head = own_head * config.vocab_size * config.hidden_size
    return Row(f"text, {name}, weights", "B", weight_bytes(ours), 2 * (trunk + head), goal=share)


def encode_rows(
    name: str, config: LanguageModelConfig, depth: int, setting: Setting
) -> Iterator[Row]:
    """Time all layers, narrowed in every dimension: layers and head keep their shares."""
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
    # a prompt of usual length, and padding; outputs of padding have no meaning
    real = torch.arange(setting.text)[None] < max(1, setting.text // 8)
    ids, real = ids.to(setting.device), (real.flip(1) if mistral else real).to(setting.device)

    def run_ours() -> Tensor:
        return ours(ids, real)[real]

    def run_theirs() -> Tensor:
        return reference.transformers_features(theirs, ids, real, config.layers)[real]

    case = f"text, {name}, {len(ours.layers)} of {depth} layers, 1/{n} width, bfloat16"
    with torch.no_grad():
        yield pair(case, run_ours, run_theirs, setting, goal=0.75)
        yield Row(f"{case}, peak of activations", "B", peak_bytes(run_ours), peak_bytes(run_theirs))


def autoencoder_rows(setting: Setting) -> Iterator[Row]:
    for name, config in AUTOENCODERS.items():
        config = replace(config, ch=setting.channels, norm_groups=min(32, setting.channels))
        for dtype in (torch.float32, torch.bfloat16):  # pipelines encode and decode in float32
            yield from coding_rows(name, config, dtype, setting)


def coding_rows(
    name: str, config: AutoEncoderConfig, dtype: torch.dtype, setting: Setting
) -> Iterator[Row]:
    """Decode and encode one image in one dtype, and decode a batch of four."""
    ours = our_autoencoder(config, setting.device, dtype)
    theirs = their_autoencoder(ours)
    side = setting.decoded // 16
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, config.latent_channels, side, side, generator=generator)
    pixels = torch.rand(1, 3, 16 * side, 16 * side, generator=generator) * 2 - 1
    latents, pixels = latents.to(setting.device, dtype), pixels.to(setting.device, dtype)

    def our_decode(x: Tensor) -> Tensor:
        return ours.decode(x)

    def their_decode(x: Tensor) -> Tensor:
        return reference.diffusers_decode(theirs, x)

    def their_encode(x: Tensor) -> Tensor:
        return reference.diffusers_encode(theirs, x)

    case = f"{name}, {setting.decoded}x{setting.decoded}, {dtype_name(dtype)}"
    goal = 0.95 if setting.device.type == "cuda" else 1.0
    with torch.no_grad():
        decodes = our_decode, their_decode
        yield from pair_rows(f"decode, {case}", *decodes, latents[:1], setting, goal, peak=0.70)
        yield batch_row(f"decode, {case}", *decodes, latents)
        yield from pair_rows(f"encode, {case}", ours.encode, their_encode, pixels, setting)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def our_autoencoder(
    config: AutoEncoderConfig, device: torch.device, dtype: torch.dtype
) -> AutoEncoder:
    """Load random weights from a file, as `flux.load` loads an autoencoder on this device."""
    adapt = None if device.type == "mps" else fast_autoencoder
    if device.type == "meta":
        return fast_autoencoder(random_weights(lambda: AutoEncoder(config), device, dtype))
    with TemporaryDirectory() as folder:
        path = Path(folder, "ae.safetensors")
        save_file(random_weights(lambda: AutoEncoder(config), "cpu", dtype).state_dict(), path)
        network = LazyModule(AutoEncoder, config, [path], device=device, dtype=dtype, adapt=adapt)
        return network()


def their_autoencoder(ours: AutoEncoder) -> nn.Module:
    """Return diffusers' autoencoder with the same weights, contiguous as its loader makes them."""
    state = {name: tensor.contiguous() for name, tensor in ours.state_dict().items()}
    return reference.loaded(
        reference.diffusers_autoencoder(ours.config),
        reference.autoencoder_to_diffusers(state, ours.config),
    )


def pair_rows(
    case: str,
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    x: Tensor,
    setting: Setting,
    goal: float | None = None,
    peak: float | None = None,
) -> Iterator[Row]:
    """Yield the time, and the peak of activations a pixel; `goal` and `peak` are their goals."""

    def run_ours() -> Tensor:
        return ours(x)

    def run_theirs() -> Tensor:
        return theirs(x)

    yield pair(case, run_ours, run_theirs, setting, goal=goal)
    bytes_each = [peak_bytes(run) / setting.decoded**2 for run in (run_ours, run_theirs)]
    yield Row(f"{case}, peak of activations", "B/pixel", *bytes_each, goal=peak)


def batch_row(
    case: str, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], latents: Tensor
) -> Row:
    """Count how much more memory four images take than one, decoded as `Pipeline.decode` does."""

    def decode_one_by_one(latents: Tensor) -> Tensor:
        return torch.cat([ours(x) for x in latents.split(1)])

    def growth(decode: Callable[[Tensor], Tensor]) -> float:
        return peak_bytes(lambda: decode(latents)) / peak_bytes(lambda: decode(latents[:1]))

    ratios = growth(decode_one_by_one), growth(theirs)
    return Row(f"{case}, peak of a batch of 4 over that of 1", "", *ratios, limit=1.2)


def saving_row(setting: Setting) -> Row:
    """Time decoded pixels -> the bytes of a PNG on disk."""
    pixels = photo_like(setting.saved, setting.device)
    with TemporaryDirectory() as folder:
        seconds = by_turns(
            [save_ours(pixels, Path(folder)), save_theirs(pixels, Path(folder))],
            setting.rounds,
            setting.enough,
        )
    case = f"saving, {setting.saved}x{setting.saved}, pixels to PNG"
    return Row(case, "s", *seconds, goal=0.45, runs=2 * setting.rounds)


def photo_like(side: int, device: torch.device) -> Tensor:
    """Return pixels (1, 3, side, side), as smooth and noisy as a photo: this decides the time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 32, 32, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic") / 2
    noise = torch.randn(smooth.shape, generator=generator) / 100
    return (smooth + noise).to(device, torch.bfloat16)


def save_ours(pixels: Tensor, folder: Path) -> Callable[[], None]:
    def save() -> None:
        output.save(output.to_images(pixels)[0], folder / "ours.png", {}).unlink()

    return save


def save_theirs(pixels: Tensor, folder: Path) -> Callable[[], None]:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor()

    def save() -> None:
        processor.postprocess(pixels, "pil")[0].save(folder / "theirs.png")

    return save

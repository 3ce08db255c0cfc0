"""Train the autoencoder on crops of scenes, textures and any shapes; then its decoder alone."""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from modules.command_line import say
from torch import Tensor

from flux import toy
from flux.autoencoder import AutoEncoder, pack
from flux.configs import AutoEncoderConfig
from flux.errors import UserError
from flux.training.checkpoint import load_tensors, save_tensors
from recipe.images import busy_image, contact_sheet, to_images, to_pixels
from recipe.latents import images
from recipe.trainer import TimedTrainer, optimizers

EDGES = ("conv_in", "conv_out", "quant_conv")  # layers at pixels or latents are not for Muon
SIZE = 256  # of the images that crops are taken from


def train_autoencoder(
    run: Path,
    config: AutoEncoderConfig,
    minutes: float,
    device: torch.device,
    start: Path | None,
    count: int = 3000,
) -> AutoEncoder:
    """Return the run's finished autoencoder; else train one from the file `start`, or a new one.

    A file of FLUX.2's family also starts FLUX.1's. Crops have 64 pixels, and 128 in the last sixth
    of the time, of `count` images, three in five of which are scenes of the grammar.
    """
    torch.manual_seed(0)
    model = AutoEncoder(config)
    last = model.encoder.quant_conv or model.encoder.conv_out
    with torch.no_grad():
        # little posterior noise: at unit variance the decoder learns nothing for hundreds of steps
        last.bias[config.z_channels :] -= 6
    finished, changed = run / "ae.safetensors", False
    if finished.exists() or start:
        tensors = load_tensors(finished if finished.exists() else start)
        if changed := config.scale_factor is not None and "encoder.quant_conv.weight" in tensors:
            model = in_flux1(tensors, config)
        else:
            try:
                model.load_state_dict(tensors)
            except RuntimeError:  # which lists every key
                path = finished if finished.exists() else start
                raise UserError(f"{path}: is not an autoencoder of this size.") from None
    model.to(device, memory_format=torch.channels_last)
    if finished.exists() or not (minutes or changed):
        return model

    if not minutes:  # the statistics below are those of the first 512 scenes
        count = min(count, 855)
    rng, scenes = np.random.default_rng(0), toy.scenes(50, held=False)
    data = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for i in range(count):
        data[i] = toy.draw(next(scenes), SIZE, SIZE, rng) if i % 5 < 3 else busy_image(rng, SIZE)
    trainer = TimedTrainer(
        model,
        optimizers(model, 2e-3, 2e-3, EDGES),
        run / "autoencoder.safetensors",
        minutes,
        ema=0.998,
    )

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((1, step))
        size, batch = (64, 8) if trainer.progress < 5 / 6 else (128, 2)
        crops = []
        for i in rng.integers(0, len(data), batch):
            y, x = rng.integers(0, SIZE + 1 - size, 2)
            crops.append(data[i, y : y + size, x : x + size])
        pixels = to_pixels(np.stack(crops)).to(device, memory_format=torch.channels_last)
        return autoencoder_loss(model, pixels)

    def sheet() -> None:
        with torch.no_grad():
            pixels = to_pixels(data[:10]).to(device)
            decoded = model.decoder(model.encoder(pixels).chunk(2, 1)[0])
        contact_sheet(run / "autoencoder.png", to_images(torch.cat([pixels, decoded])), 10)
        error = F.mse_loss(decoded.clamp(-1, 1), pixels).item()
        say("", f"PSNR {10 * math.log10(4 / error):.1f} dB")

    trainer.run(loss, sheet=sheet)
    measure_statistics(model, data[np.arange(count) % 5 < 3][:512])
    save_tensors(finished, model.state_dict())
    return model


def autoencoder_loss(model: AutoEncoder, pixels: Tensor) -> Tensor:
    """Return the loss of pixels (B, 3, H, W) through a sample of the posterior, with a light KL."""
    mean, log_variance = model.encoder(pixels).chunk(2, dim=1)  # (B, z, h, w) each
    log_variance = log_variance.clamp(-30, 20)
    decoded = model.decoder(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return image_loss(decoded, pixels) + 3e-4 * kl


def image_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the L1 of pixels and of neighbours' differences: edges matter more than greys."""
    error = decoded - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 0.5 * edges


def train_decoder(
    run: Path, minutes: float, device: torch.device, autoencoder: AutoEncoder, count: int = 3000
) -> None:
    """Train the decoder alone, on full images. The latents stay as the transformer knows them."""
    tensors = load_tensors(run / f"latents-{SIZE}x{SIZE}.safetensors")
    latents = tensors["latents"][tensors["images"][:count, 0]]
    layouts = list(itertools.islice(images(SIZE, SIZE), len(latents)))
    decoder = autoencoder.decoder.requires_grad_(True)
    trainer = TimedTrainer(
        decoder,
        optimizers(decoder, 2e-3, 1e-3, EDGES),
        run / "decoder.safetensors",
        minutes,
        ema=0.998,
    )

    def loss(step: int) -> Tensor:
        row = np.random.default_rng((3, step)).integers(len(latents))
        wanted = to_pixels(toy.draw(layouts[row], SIZE, SIZE)[None])
        wanted = wanted.to(device, memory_format=torch.channels_last)
        return image_loss(autoencoder.decode(latents[row][None].float().to(device)), wanted)

    trainer.run(loss)
    decoder.requires_grad_(False)


@torch.no_grad()
def measure_statistics(model: AutoEncoder, drawn: np.ndarray) -> None:
    """Give the latents of images (N, H, W, 3), N >= 128, a variance of one.

    FLUX.2 normalises each channel by its running statistics. FLUX.1 has one constant for all
    channels, so its encoder's last convolution is scaled.
    """
    device = next(model.parameters()).device
    packed = torch.cat(
        [
            pack(model.encoder(to_pixels(p).to(device)).chunk(2, 1)[0])
            for p in np.array_split(drawn, 128)
        ]
    )
    if model.config.scale_factor is None:
        model.bn.running_mean.copy_(packed.mean((0, 2, 3)))
        model.bn.running_var.copy_(packed.var((0, 2, 3)))
        return
    factor = packed.std() * model.config.scale_factor
    last, first = model.encoder.conv_out, model.decoder.conv_in
    last.weight[: len(last.weight) // 2] /= factor  # of the means; the rest are log-variances
    last.bias[: len(last.bias) // 2] /= factor
    first.weight *= factor


@torch.no_grad()
def in_flux1(tensors: dict[str, Tensor], config: AutoEncoderConfig) -> AutoEncoder:
    """Return an autoencoder of FLUX.2 in the layout of FLUX.1.

    It makes the same images, from latents of another size and mean. FLUX.1 has no 1x1 convolutions
    between encoder and decoder. Both act on single latents, so they are merged into the encoder's
    last convolution. Log-variances stay.
    """
    z, last = config.z_channels, "encoder.conv_out."
    tensors = {name: x.float() for name, x in tensors.items() if not name.startswith("bn.")}
    kept = {name: x for name, x in tensors.items() if "quant_conv" not in name}
    for conv in ("encoder.quant_conv.", "decoder.post_quant_conv."):
        matrix, bias = tensors[conv + "weight"][..., 0, 0], tensors[conv + "bias"]
        if len(bias) == z:  # of the means alone
            matrix, bias = torch.block_diag(matrix, torch.eye(z)), torch.cat([bias, torch.zeros(z)])
        kept[last + "weight"] = torch.einsum("oi,ichw->ochw", matrix, kept[last + "weight"])
        kept[last + "bias"] = matrix @ kept[last + "bias"] + bias
    model = AutoEncoder(config)
    model.load_state_dict(kept)
    return model

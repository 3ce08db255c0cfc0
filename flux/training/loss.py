"""Rectified flow: the loss, the training times, and a network's velocity for a training batch.

    x_t = (1 - t) · latents + t · noise          loss = mean |v(x_t, t) - (noise - latents)|²

It is the loss of all three families. How FLUX 3's authors drew its times is not published: here
they are drawn as for the others, around the shift of its sampler.

References:
1) Rectified flow: Liu et al. 2022, https://arxiv.org/abs/2209.03003
2) Logit-normal times: Esser et al. 2024, https://arxiv.org/abs/2403.03206
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux import sampling
from flux.configs import ModelSpec
from flux.text_encoder import TextFeatures
from flux.training.networks import Network
from flux.transformer3 import Flux3

Velocity = Callable[[Tensor, Tensor], Tensor]  # x (B, C, h, w), t (B,) -> (B, C, h, w)


def rectified_flow_loss(velocity: Velocity, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return mean |v(x_t, t) - (noise - latents)|² of latents and noise (B, C, h, w) at t (B,)."""
    x = sampling.scale_noise(latents, noise, rearrange(t, "b -> b 1 1 1"))
    return F.mse_loss(velocity(x, t).float(), noise - latents)


def shifted_times(normal: Tensor, mu: float) -> Tensor:
    """Map standard normal numbers to logit-normal times, shifted by `mu` as in the sampler.

    The sampler maps t to e^mu / (e^mu + 1/t - 1), which adds mu to the logit of t. The logit of a
    logit-normal time is a normal number.
    """
    return torch.sigmoid(normal + mu)


def schedule_mu(spec: ModelSpec, tokens: int) -> float:
    """Return the shift of the model's sampling schedule for images of `tokens` tokens."""
    if spec.schedule == "linear":
        return sampling.calculate_shift(tokens)
    if spec.schedule == "empirical":
        return sampling.compute_empirical_mu(tokens, spec.steps)
    return math.log(sampling.SHIFT) if spec.schedule == "constant" else 0.0


class Batch(NamedTuple):
    """Training samples of one size, with references of one size."""

    latents: Tensor  # (B, C, h, w)
    features: TextFeatures
    references: Tensor | None = None  # (B, R, C)
    reference_ids: Tensor | None = None  # (R, axes)
    channels: Tensor | None = None  # (B, L, C'): input channels of Fill, Canny and Depth

    def select(self, rows: slice, device: torch.device) -> "Batch":
        """Return some of the samples, on `device`."""

        def selected(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows].to(device)

        tokens, pooled = self.features.tokens[rows], selected(self.features.pooled)
        return Batch(
            self.latents[rows].to(device),
            TextFeatures(tokens.to(device), pooled),
            selected(self.references),
            None if self.reference_ids is None else self.reference_ids.to(device),
            selected(self.channels),
        )


def predict_velocity(
    network: Network,
    batch: Batch,
    guidance: float | Tensor,
    x: Tensor,
    t: Tensor,
    corner: tuple[int, int] = (0, 0),
) -> Tensor:
    """Return the velocity (B, C, h, w) of noisy latents x (B, C, h, w) at times t (B,).

    `guidance` is one value or (B,). Networks without a guidance embedding ignore the value.
    `corner` is the row and column of the first token where x is a window of a larger image; FLUX 3
    ignores it.
    """
    if isinstance(network, Flux3):
        return _predict_velocity3(network, batch, x, t)
    h, w = x.shape[2:]
    axes = len(network.config.axes_dim)
    txt, vector = batch.features.tokens, batch.features.pooled
    img = rearrange(x, "b c h w -> b (h w) c")  # (B, L, C)
    img_ids = sampling.image_ids(h, w, axes).to(x.device)
    if batch.channels is not None:
        img = torch.cat([img, batch.channels], dim=2)
    if batch.references is not None and batch.reference_ids is not None:
        img = torch.cat([img, batch.references], dim=1)  # (B, L + R, C)
        img_ids = torch.cat([img_ids, batch.reference_ids])
    img_ids[:, 1:3] += torch.tensor(corner, device=x.device)
    txt_ids = sampling.text_ids(txt.shape[1], axes).to(x.device)
    g = torch.as_tensor(guidance).to(t).expand_as(t) if network.config.guidance else None
    out = network(img, img_ids, txt, txt_ids, t, g, vector)[:, : h * w]  # (B, L, C)
    return rearrange(out, "b (h w) c -> b c h w", h=h)


def _predict_velocity3(network: Flux3, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
    """Return the velocity of FLUX 3; gradients reach the blocks of text and references, too."""
    h, w = x.shape[2:]
    txt, ids = batch.features.tokens, batch.reference_ids
    out = network(  # (B, L, C)
        rearrange(x, "b c h w -> b (h w) c"),
        sampling.flux3_image_ids(h, w).to(x.device),
        txt,
        sampling.text_ids(txt.shape[1], 4).to(x.device),
        t,
        batch.references,
        ids,
    )
    return rearrange(out, "b (h w) c -> b c h w", h=h)


# ------------------------------------------------------------------------ precision and randomness


@contextmanager
def autocast_matmul(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute matrix products in `dtype`, while the parameters keep their own dtype."""
    with attention_backend(device), autocast(device.type, dtype):
        yield


def attention_backend(device: torch.device) -> AbstractContextManager:
    """Select unfused attention on a CPU: the fused backward pass takes longer than all matmuls."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """Return an autocast context to bfloat16, disabled for any other dtype."""
    return torch.autocast(device_type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def seeded_generator(*numbers: int) -> torch.Generator:
    """Return a CPU generator whose seed is a hash of `numbers`."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

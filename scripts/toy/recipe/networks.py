"""The transformer with its text encoder, and their losses: the flow, and the things of tokens."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux import sampling
from flux.conditioning import reference_tokens
from flux.configs import ModelSpec
from flux.text_encoder import TextFeatures
from flux.training import loss as training
from flux.training.loss import Batch
from flux.transformer import Flux
from recipe.latents import PART, THINGS, TOKEN
from recipe.text import TextEncoder

# layers at latents, tokens and numbers
EDGES = ("_in.", ".lin.", "final_layer", "embed", "shared", "bias", "shown")
RATE = 2.5e-3  # of Muon; AdamW's is a third of it
CHANGED = (
    0.3  # root mean square over a changed token's channels, at least; its neighbours move less
)
SHIFT = math.log(4)  # of the times, towards noise, as in sampling: there the image is decided


class Networks(nn.Module):
    """A transformer, and the text encoder whose features it reads.

    `hidden` and `shown` are for training. `hidden` are the tokens of the image and the references
    half-way through the single blocks of the last `velocity`, (B, L + R, D). `shown` predicts the
    thing of each token, its coverage, and whether an edit changes it.
    """

    def __init__(self, transformer: Flux, text: TextEncoder):
        super().__init__()
        self.transformer, self.text, self.hidden = transformer, text, None
        self.shown = nn.Linear(
            transformer.config.hidden_size, len(THINGS) + (TOKEN // PART) ** 2 + 1
        )
        blocks = transformer.single_blocks
        blocks[len(blocks) // 2].register_forward_pre_hook(self.keep)

    @torch.compiler.disable
    def keep(self, block: nn.Module, inputs: tuple) -> None:
        self.hidden = inputs[0]  # (B, T + L + R, D)

    def velocity(
        self,
        features: TextFeatures,
        x: Tensor,
        t: Tensor,
        references: Tensor | None = None,
        corner: tuple[int, int] = (0, 0),
        guidance: float | Tensor = 1.0,
    ) -> Tensor:
        """Return the velocity of latents x (B, C, h, w) at times t (B,), with B prompts' features.

        references: (B, R, C, h, w). corner: row and column of the first token of a window.
        guidance: for students.
        """
        axes = len(self.transformer.config.axes_dim)
        tokens = (None, None)
        if references is not None:
            tokens = reference_tokens(references.unbind(1), axes)
        velocity = training.predict_velocity(
            self.transformer, Batch(x, features, *tokens), guidance, x, t, corner
        )
        self.hidden = self.hidden[:, features.tokens.shape[1] :]
        return velocity

    def guided(
        self,
        features: TextFeatures,
        empty: TextFeatures,
        x: Tensor,
        t: Tensor,
        scale: float,
        references: Tensor | None = None,
    ) -> Tensor:
        """`velocity`, guided by two passes: one without the prompts."""
        return sampling.classifier_free_guidance(
            *(self.velocity(f, x, t, references) for f in (features, empty)), scale
        )

    def compile_blocks(self) -> None:
        """Compile block by block: equal blocks share their code."""
        for block in [
            *self.transformer.double_blocks,
            *self.transformer.single_blocks,
            *self.text.blocks(),
        ]:
            block.compile(dynamic=False)


def new_networks(spec: ModelSpec) -> Networks:
    """Return networks with random weights. The transformer has no guidance input: a student has."""
    transformer = Flux(replace(spec.transformer, guidance=False))
    for name, p in transformer.named_parameters():
        if "mod" in name or "final_layer" in name:
            nn.init.zeros_(p)  # every block starts as the identity (adaLN-zero, Peebles & Xie 2022)
    return Networks(transformer, TextEncoder(spec.text))


def flow_loss(
    networks: Networks,
    latents: Tensor,
    features: TextFeatures,
    references: Tensor | None = None,
    corner: tuple[int, int] = (0, 0),
) -> Tensor:
    """Return the mean squared error of the velocity along straight lines from noise."""

    def velocity(x, t):
        return networks.velocity(features, x, t, references, corner=corner)

    return training.rectified_flow_loss(
        velocity, latents, some_times(latents), torch.randn_like(latents)
    )


def shown_loss(logits: Tensor, things: Tensor, covered: Tensor) -> Tensor:
    """Return the cross-entropy, in nats, of tokens' things and of the coverage of their parts.

    logits: (B, L, n + 1), as of `shown`; things: (B, L), indices in THINGS; covered: (B, L, 16),
    from 0 to 255.

    This aligns hidden states with the known drawing (Yu et al. 2024 align them with another
    network). Velocities alone take very long to teach a small network the names of shapes and
    letters.
    """
    kinds, parts = logits[..., : len(THINGS)].float(), logits[..., len(THINGS) : -1].float()
    what = F.cross_entropy(kinds.transpose(1, 2), things.long())
    return what + F.binary_cross_entropy_with_logits(parts, covered / 255)


def changed_loss(logits: Tensor, latents: Tensor, reference: Tensor) -> Tensor:
    """Return the cross-entropy, in nats, of which tokens an edit changes.

    logits: (B, 2L, n + 1) of the result and the reference, as of `shown`; latents, reference:
    (B, C, h, w).

    The prediction needs the instruction and the image together. Velocities alone first teach a
    small network to change all things, and much later that "the circle" is one of two.
    """
    changed = (latents - reference).square().mean(1).sqrt().flatten(1) > CHANGED
    targets = torch.cat([changed, changed], 1).float()
    return F.binary_cross_entropy_with_logits(logits[..., -1].float(), targets)


def some_times(latents: Tensor) -> Tensor:
    """Draw logit-normal times (Esser et al. 2024), shifted, (B,)."""
    return training.shifted_times(torch.randn(len(latents), device=latents.device), SHIFT)


def expanded(one: TextFeatures, count: int) -> TextFeatures:
    """Repeat the features of one prompt, (1, T, D), for `count` images."""
    return TextFeatures(*(x if x is None else x.expand(count, *x.shape[1:]) for x in one))

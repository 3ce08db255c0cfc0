"""The velocity of FLUX 3 for a batch of images, which the solvers follow: `Velocity3(...)(x, t)`.

A base model gives text and references the same streams at all times: they are computed once. To a
flow map, each step has a target of its own, the next time, and so has streams of its own.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flux import sampling
from flux.conditioning import Conditions
from flux.runtime.lazy_module import LazyModule
from flux.text_encoder import TextFeatures
from flux.transformer import Numerics
from flux.transformer3 import Flux3, Stream
from flux.velocity import Now, run_in_turn

BRANCHES = ("conditional", "unconditional")


class Velocity3:
    """velocity(x, t) of image tokens x (B, L, C), for t from 1 to 0.

    times: of the schedule, from the first to the last. scales: of classifier-free guidance, one for
    each step; 1 is off. now: says what runs, for hooks and callbacks.
    """

    def __init__(
        self,
        transformer: LazyModule[Flux3],
        features: TextFeatures,
        negative: TextFeatures | None,
        conditions: Conditions,
        batch: int,
        times: Sequence[float],
        scales: Sequence[float],
        numerics: Numerics,
        now: Now,
    ):
        self.network = network = transformer()
        self.device, self.dtype, self.numerics = transformer.device, transformer.dtype, numerics
        self.times, self.scales, self.batch, self.now = times, scales, batch, now
        self.run_branches = run_in_turn
        h, w = conditions.height // 16, conditions.width // 16
        self.rope = self._rope(sampling.flux3_image_ids(h, w))
        self.references: tuple[Tensor, Tensor] | None = None  # tokens (B, R, C) and their rotations
        if conditions.references is not None and conditions.reference_ids is not None:
            tokens = conditions.references.to(self.device, self.dtype).expand(batch, -1, -1)
            self.references = tokens, self._rope(conditions.reference_ids)
        self.prompts = [self._prompt(features)]  # tokens (B, T, D) and their rotations
        if negative is not None:
            self.prompts.append(self._prompt(negative))
        self.kept: list[list[Stream]] = []  # of each prompt: the text's, and the references'
        if not network.config.flow_map:
            vec = network.vec(self._full(0.0))
            self.kept = [self._streams(prompt, vec) for prompt in self.prompts]

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Return the velocity of x (B, L, C) at time t, of the same shape."""
        last = len(self.times) - 2
        # the step to which t belongs, which may lie between its ends
        step = next((k for k, time in enumerate(self.times[1:]) if time < t), last)
        target = None
        if self.network.config.flow_map:
            target = self._full(self.times[step + 1])
        scale = self.scales[step]
        count = len(self.prompts) if scale > 1 else 1
        passes = [partial(self._predict, number, x, t, target) for number in range(count)]
        v, *others = self.run_branches(*passes)
        return sampling.classifier_free_guidance(v, others[0], scale) if others else v

    def _predict(self, number: int, x: Tensor, t: float, target: Tensor | None) -> Tensor:
        self.now.t, self.now.branch = t, BRANCHES[number]
        try:
            vec = self._per_token(self.network.vec(self._full(t), target), x)
            if self.kept:
                streams = self.kept[number]
            else:
                vec_0 = self.network.vec(self._full(0.0), target)
                streams = self._streams(self.prompts[number], vec_0)
            return self.network.denoise(x.to(self.dtype), self.rope, vec, *streams)
        finally:
            self.now.branch = ""

    def _streams(self, prompt: tuple[Tensor, Tensor], vec: Tensor) -> list[Stream]:
        """Return the stream of a prompt and, if there are references, theirs."""
        parts = [("txt", prompt)]
        if self.references is not None:
            parts.append(("image_cond", self.references))
        return [
            self.network.stream(mode, tokens, rope, self._per_token(vec, tokens))
            for mode, (tokens, rope) in parts
        ]

    def _prompt(self, features: TextFeatures) -> tuple[Tensor, Tensor]:
        tokens = features.to(self.device, self.dtype).expand(self.batch).tokens  # (B, T, D)
        ids = sampling.text_ids(tokens.shape[1], 4) if features.ids is None else features.ids
        return tokens, self._rope(ids)

    def _rope(self, ids: Tensor) -> Tensor:
        return self.network.rope(ids).to(self.device)

    def _full(self, t: float) -> Tensor:
        """Return a time for each image, rounded as diffusers does on the way to its network."""
        value = torch.full((self.batch,), t, device=self.device)
        return 1000 * value / 1000 if self.numerics.time == "diffusers" else value

    def _per_token(self, vec: Tensor, tokens: Tensor) -> Tensor:
        """Repeat a conditioning vector (B, 1, D) for each token, as diffusers does.

        Products with many rows sum in another order, which float32 shows.
        """
        if self.numerics.modulation == "model":
            return vec.expand(-1, tokens.shape[1], -1)
        return vec

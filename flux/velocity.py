"""The velocity of a batch of images, which the solvers follow: `Velocity(...)(x, t)`.

What does not depend on the latents is computed once: text tokens, RoPE tables, the modulations of
the schedule's times, the keys and values of cached references. Other times are computed when asked.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flux import sampling
from flux.conditioning import Conditions
from flux.errors import UserError
from flux.runtime.lazy_module import LazyModule
from flux.text_encoder import TextFeatures
from flux.transformer import Flux, KVCache, Modulation, Modulations, Residuals

# Called with the arguments of `Flux.forward` for each pass: a ControlNet, for example.
ResidualsFn = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Residuals
]


def run_in_turn(*branches: Callable[[], Tensor]) -> list[Tensor]:
    """Return the velocities of the branches of classifier-free guidance."""
    return [branch() for branch in branches]


@dataclass
class Now:
    """What runs at the moment, for hooks and callbacks: `pipe.now`."""

    step: int = 0  # from 1; 0 outside of `sample`
    t: float | None = None  # time of the last velocity
    branch: str = ""  # of the running pass: "conditional", "unconditional", "references"; "": none
    # in `sample`: returns the image that the last velocity leads to, as latents (B, C, h, w)
    denoised: Callable[[], Tensor] | None = None


@dataclass
class Branch:
    """What the network reads of one set of prompts."""

    name: str  # "conditional" or "unconditional"
    txt: Tensor  # (B, T, D)
    txt_ids: Tensor  # (T, axes)
    pooled: Tensor | None  # (B, V)
    rope: Tensor  # (T + L + R, d/2, 2, 2)
    mask: Tensor | None  # (T + L, T + L)
    mods: dict[float, Modulations]  # by time


class Velocity:
    """velocity(x, t) of image tokens x (B, L, C), for t from 1 to 0.

    times: of the schedule, whose modulations are computed now. scales, guidance: the scale of
    classifier-free guidance and the guidance input, one for each step.
    drop_modulation: free the weights of the modulation, a quarter of FLUX.1, once `times` are
    computed; then another time is an error.
    """

    def __init__(
        self,
        transformer: LazyModule[Flux],
        features: TextFeatures,
        negative: TextFeatures | None,
        conditions: Conditions,
        batch: int,
        times: Sequence[float],
        scales: Sequence[float],
        guidance: Sequence[float] | None,
        *,
        now: Now,
        residuals: ResidualsFn | None = None,
        drop_modulation: bool = False,
    ):
        self.transformer = transformer
        self.network = network = transformer()
        self.device, self.dtype = transformer.device, transformer.dtype
        self.times, self.scales, self.guidance, self.batch = times, scales, guidance, batch
        self.now, self.residuals, self.run_branches = now, residuals, run_in_turn
        h, w = conditions.height // 16, conditions.width // 16
        axes = len(network.config.axes_dim)
        self.img_ids = sampling.image_ids(h, w, axes)
        self.channels, self.references = conditions.channels, conditions.references
        self.caches: list[KVCache] | None = None
        if self.channels is not None:
            self.channels = self.channels.to(self.device, self.dtype)
        if self.references is not None and conditions.reference_ids is not None:
            self.references = self.references.to(self.device, self.dtype)
            if conditions.kv_cache:
                length = features.tokens.shape[1]
                self.caches = self._cache_references(conditions.reference_ids, length)
                self.references = None
            else:
                self.img_ids = torch.cat([self.img_ids, conditions.reference_ids])
        self.conditional = self._branch("conditional", features)
        self.unconditional = None
        if negative is not None:
            self.unconditional = self._branch("unconditional", negative)
        if drop_modulation:
            self.network = transformer.drop_submodules(Modulation)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Return the velocity of x (B, L, C) at time t, of the same shape."""
        self.transformer.require_unchanged()
        scale = self.scales[self._step(t)]
        branches = [self.conditional]
        if self.unconditional is not None and scale > 1:
            branches.append(self.unconditional)
        v, *others = self.run_branches(*(partial(self._predict, each, x, t) for each in branches))
        return sampling.classifier_free_guidance(v, others[0], scale) if others else v

    def _predict(self, branch: Branch, x: Tensor, t: float) -> Tensor:
        img = x.to(self.dtype)  # (B, L, C)
        if self.channels is not None:
            channels = self.channels.expand(self.batch, -1, -1)
            img = torch.cat([img, channels], dim=-1)  # (B, L, C + C')
        if self.references is not None:
            references = self.references.expand(self.batch, -1, -1)
            img = torch.cat([img, references], dim=1)  # (B, L + R, C)
        self.now.t, self.now.branch = t, branch.name
        try:
            mods = branch.mods.get(t)
            if mods is None:
                mods = self.network.modulations([self._vec(branch, t)])[0]
            more: dict[str, Any] = {}
            if branch.mask is not None:
                more["mask"] = branch.mask
            if self.residuals is not None:
                more["residuals"] = self.residuals(
                    img,
                    self.img_ids,
                    branch.txt,
                    branch.txt_ids,
                    self._full(t),
                    self._guidance(t),
                    branch.pooled,
                )
            v = self.network.denoise(img, branch.txt, branch.rope, mods, self.caches, **more)
        finally:
            self.now.branch = ""
        return v[:, : x.shape[1]]  # (B, L, C)

    def _branch(self, name: str, features: TextFeatures) -> Branch:
        # one copy for each image: a Linear with a bias rounds twice in bfloat16 if its input
        # is strided, so features of one prompt would give other images than repeated features
        features = features.to(self.device, self.dtype).expand(self.batch)
        txt, ids, mask = features.tokens, features.ids, features.mask
        if ids is None:
            ids = sampling.text_ids(txt.shape[1], self.img_ids.shape[1])
        length = len(ids) + len(self.img_ids)
        if mask is not None and mask.shape[-2:] != (length, length):
            raise UserError(
                f"features: `mask` must be {(length, length)}, of text and image tokens "
                f"(got {tuple(mask.shape)})."
            )
        mask = None if mask is None else mask.to(self.device)
        rope = self.network.rope(ids, self.img_ids).to(self.device)
        branch = Branch(name, txt, ids, features.pooled, rope, mask, {})
        times = self.times[:-1]
        mods = self.network.modulations([self._vec(branch, t) for t in times])
        branch.mods = dict(zip(times, mods))
        return branch

    def _step(self, t: float) -> int:
        """Return the number, from 0, of the step that t lies in: times[k] >= t > times[k + 1]."""
        step = bisect_left(self.times, -t, key=lambda time: -time)
        if step == len(self.times) or self.times[step] != t:
            step -= 1
        return min(max(step, 0), len(self.times) - 2)

    def _full(self, value: float) -> Tensor:
        return torch.full((self.batch,), value, device=self.device)

    def _guidance(self, t: float) -> Tensor | None:
        return None if self.guidance is None else self._full(self.guidance[self._step(t)])

    def _vec(self, branch: Branch, t: float) -> Tensor:
        return self.network.vec(self._full(t), self._guidance(t), branch.pooled)

    def _cache_references(self, ids: Tensor, text_length: int) -> list[KVCache]:
        """Run the reference tokens alone, at t = 0, once for all steps and images."""
        c, network = self.network.config, self.network
        assert self.references is not None
        caches = [KVCache(text_length) for _ in range(c.depth + c.depth_single)]
        zero = torch.zeros(1, device=self.device)
        vec = network.vec(zero, None if self.guidance is None else zero + self.guidance[0])
        rope = network.rope(ids[:0], ids).to(self.device)
        no_text = self.references.new_zeros(1, 0, c.context_dim)
        self.now.branch = "references"
        try:
            network.denoise(self.references, no_text, rope, network.modulations([vec])[0], caches)
        finally:
            self.now.branch = ""
        return caches

"""The gain of computing reference images once a generation instead of at every step."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.steps import as_loaded
from benchmarks.timing import by_turns, random_weights
from flux import sampling
from flux.configs import KLEIN_9B
from flux.transformer import Flux, FluxConfig, KVCache, Modulations

EVERY = "at every step"


def reference_rows(setting: Setting) -> Iterator[Row]:
    """Time four steps of klein 9B, cut to one double and one single block.

    References are as large as the image. The whole model is counted, not timed.
    """
    config, side = replace(setting.cut(KLEIN_9B), depth_single=1), setting.sides[-1]
    model = random_weights(lambda: Flux(config), setting.device, torch.bfloat16)
    model = as_loaded(model, setting.device)
    for count in (1, 2, 4):
        runs = [partial(generate, model, side // 16, count, cached) for cached in (True, False)]
        with torch.no_grad():
            seconds = by_turns(runs, setting.rounds, setting.enough)
        cut_share = 1 / flop_gain(config, side // 16, count)
        full_share = 1 / flop_gain(KLEIN_9B, 64, count)
        case = f"references, {count}, klein 9B, 4 steps"
        cut = f"{case}, 1 + 1 blocks of width {config.hidden_size}, {side}x{side}"
        yield Row(cut, "s", *seconds, EVERY, goal=cut_share / 0.9, runs=2 * setting.rounds)
        yield Row(f"{cut}, share of the FLOPs", "", cut_share, 1, EVERY)
        yield Row(f"{case}, whole, 1024x1024, share of the FLOPs", "", full_share, 1, EVERY)


def flop_gain(config: FluxConfig, side: int, count: int) -> float:
    """Return the FLOPs of four steps without a cache over those with one, counted by torch."""
    with torch.device("meta"):
        model = Flux(config)
    totals = []
    for cached in (False, True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            generate(model, side, count, cached)
        totals.append(counter.get_total_flops())
    return totals[0] / totals[1]


def generate(model: Flux, side: int, count: int, cached: bool, steps: int = 4) -> None:
    """Run the steps on side² image tokens, 512 text tokens and `count` references of side² tokens.

    The values of the tokens do not matter.
    """
    weight, axes = model.img_in.weight, len(model.config.axes_dim)

    def random(length: int, width: int) -> Tensor:
        return torch.randn(1, length, width, dtype=weight.dtype, device=weight.device)

    img, txt = random(side**2, model.config.in_channels), random(512, model.config.context_dim)
    references = random(count * side**2, model.config.in_channels)
    img_ids, txt_ids = sampling.image_ids(side, side, axes), sampling.text_ids(512, axes)
    ids = torch.cat([sampling.image_ids(side, side, axes, t=10 * k) for k in range(1, count + 1)])

    def mods(t: float) -> Modulations:
        vec = model.vec(torch.full((1,), t, device=weight.device))
        return model.modulations([vec])[0]

    caches = None
    if cached:
        caches = [KVCache(len(txt_ids)) for _ in (*model.double_blocks, *model.single_blocks)]
        rope = model.rope(ids[:0], ids).to(weight.device)
        model.denoise(references, txt[:, :0], rope, mods(0.0), caches)
        tokens = img
    else:
        img_ids = torch.cat([img_ids, ids])
        tokens = torch.cat([img, references], dim=1)
    rope = model.rope(txt_ids, img_ids).to(weight.device)
    for step in range(steps):
        model.denoise(tokens, txt, rope, mods(1 - step / steps), caches)

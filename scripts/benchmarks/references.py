"""What it saves to compute reference pictures once a generation, where otherwise they are part of every step."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.timing import by_turns, random_weights
from flux import sampling
from flux.configs import KLEIN_9B
from flux.transformer import Flux, FluxConfig, KVCache

EVERY = "at every step"


def reference_rows(setting: Setting) -> Iterator[Row]:
    """Four steps of klein 9B, cut to one double and one single block, with references as large as the picture."""
    config, side = replace(setting.cut(KLEIN_9B), depth_single=1), setting.sides[-1]
    model = random_weights(lambda: Flux(config), setting.device, torch.bfloat16)
    for count in (1, 2, 4):
        functions = [
            partial(generate, model, side // 16, count, cached) for cached in (True, False)
        ]
        with torch.no_grad():
            seconds = by_turns(functions, setting.rounds, setting.enough)
        due, whole = (
            1 / flop_gain(*case, count) for case in ((config, side // 16), (KLEIN_9B, 64))
        )
        case = f"references, {count}, klein 9B, 4 steps"
        small = f"{case}, 1 + 1 blocks of width {config.hidden_size}, {side}x{side}"
        yield Row(small, "s", *seconds, EVERY, goal=due / 0.9, runs=2 * setting.rounds)
        yield Row(f"{small}, share of the FLOPs", "", due, 1, EVERY)
        yield Row(f"{case}, whole, 1024x1024, share of the FLOPs", "", whole, 1, EVERY)


def flop_gain(config: FluxConfig, side: int, count: int) -> float:
    """FLOPs of four steps, plain over cached, counted by torch on the meta device."""
    with torch.device("meta"):
        model = Flux(config)
    totals = []
    for cached in (False, True):
        with FlopCounterMode(display=False) as counter:
            generate(model, side, count, cached)
        totals.append(counter.get_total_flops())
    return totals[0] / totals[1]


def generate(model: Flux, side: int, count: int, cached: bool, steps: int = 4) -> None:
    """Four steps of side² image tokens with 512 of text and `count` references of the same size; values do not matter."""
    weight, axes = model.img_in.weight, len(model.config.axes_dim)

    def random(n, width):
        return torch.randn(1, n, width, dtype=weight.dtype, device=weight.device)

    img, txt = random(side**2, model.config.in_channels), random(512, model.config.context_dim)
    references = random(count * side**2, model.config.in_channels)
    img_ids, txt_ids = sampling.image_ids(side, side, axes), sampling.text_ids(512, axes)
    ids = torch.cat([sampling.image_ids(side, side, axes, t=10 * k) for k in range(1, count + 1)])

    def rope_of(*ids):
        return model.rope(*ids).to(weight.device)

    def mods(t):
        return model.modulations([model.vec(torch.full((1,), t, device=weight.device))])[0]

    caches = None
    if cached:
        caches = [KVCache(len(txt_ids)) for _ in (*model.double_blocks, *model.single_blocks)]
        model.denoise(references, txt[:, :0], rope_of(ids[:0], ids), mods(0.0), caches)
    rope = rope_of(txt_ids, img_ids if cached else torch.cat([img_ids, ids]))
    for step in range(steps):
        tokens = img if cached else torch.cat([img, references], dim=1)
        model.denoise(tokens, txt, rope, mods(1 - step / steps), caches)

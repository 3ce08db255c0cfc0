"""scripts/bench.py: what it says that a cache of references is worth, against a count by hand."""

import importlib.util
from pathlib import Path

import pytest
import torch
from reference import KLEIN_TINY

from flux.configs import KLEIN_9B
from flux.transformer import Flux


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "scripts" / "bench.py"
    spec = importlib.util.spec_from_file_location("bench", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flops(config, side: int, count: int, cached: bool, steps: int = 4, text: int = 512) -> int:
    """Of four steps: two for every weight and token, and 4·D for every pair of a query and a key in every block."""
    with torch.device("meta"):
        weights = {name: p.numel() for name, p in Flux(config).named_parameters() if p.ndim == 2}
    of = lambda *parts: sum(n for name, n in weights.items() if any(part in name for part in parts))  # noqa: E731
    picture, given, blocks = side**2, count * side**2, config.depth + config.depth_single
    images = of("img_in") + of(".img_attn.", ".img_mlp.")
    once = of("time_in", "modulation") - of("adaLN_modulation")  # for one vector
    seen, looking = text + picture + given, text + picture + given * (not cached)
    last = picture + given * (not cached)  # the final layer sees the references too, where they are part of the sequence
    step = 2 * (images * last + of("txt_in", ".txt_attn.", ".txt_mlp.") * text + of(".linear1.", ".linear2.") * looking)
    step += 2 * (once + of("adaLN_modulation") + of("final_layer.linear") * last)
    step += 4 * config.hidden_size * blocks * looking * seen
    alone = 2 * ((images + of(".linear1.", ".linear2.")) * given + once) + 4 * config.hidden_size * blocks * given**2
    return steps * step + alone * cached


@pytest.mark.parametrize("config, side, count", [(KLEIN_TINY, 8, 2), (KLEIN_9B, 64, 1), (KLEIN_9B, 64, 4)])
def test_gain_of_a_cache_is_that_of_a_count_by_hand(bench, config, side, count):
    by_hand = flops(config, side, count, False) / flops(config, side, count, True)
    assert bench.flop_gain(config, side, count) == pytest.approx(by_hand, rel=1e-9)

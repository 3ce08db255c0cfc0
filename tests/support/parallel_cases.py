"""Passes of small networks, alone and over the processes of a group, for the tests of parallelism.

They run in processes of `support.processes`, which find functions by the name of their module.
"""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flux import sampling
from flux.parity.reference import FLUX1_TINY, FLUX3_TINY, KLEIN_TINY, randomise
from flux.runtime.context_parallel import ContextParallel
from flux.runtime.fast import fast_transformer
from flux.runtime.fast3 import fast_transformer3
from flux.training.loss import attention_backend
from flux.training.memory import enable_gradient_checkpointing
from flux.transformer import BLOCK_LISTS, Flux, KVCache, Residuals
from flux.transformer3 import Flux3

SIX_HEADS = replace(KLEIN_TINY, hidden_size=192, num_heads=6)  # not divisible by 4
CONFIGS: dict[str, Any] = {
    "flux.1": FLUX1_TINY,
    "flux.2": replace(KLEIN_TINY, guidance=True),
    "klein": SIX_HEADS,
    "two heads": replace(KLEIN_TINY, hidden_size=64, num_heads=2),  # fewer than four processes
    "flux.3": FLUX3_TINY,
    "flux.3 flow map": replace(FLUX3_TINY, flow_map=True),
}


class Case(NamedTuple):
    """One pass: the sizes of its segments, and what else the network reads."""

    config: str
    text: int = 13
    grid: tuple[int, int] = (5, 7)  # rows and columns of image tokens
    references: tuple[tuple[int, int], ...] = ()
    cached: bool = False  # references run once, alone
    mask: bool = False
    residuals: bool = False
    per_token: bool = False  # FLUX 3: a conditioning vector for each token
    fast: bool = False
    dtype: torch.dtype = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers, the same in every process."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@cache
def network(config: str, dtype: torch.dtype, fast: bool = False) -> Any:
    c = CONFIGS[config]
    if config.startswith("flux.3"):
        made3 = randomise(Flux3(c, None)).to(dtype)
        return fast_transformer3(made3) if fast else made3
    made = randomise(Flux(c)).to(dtype)
    return fast_transformer(made) if fast else made


def velocity(case: Case, net: Any) -> Tensor:
    return (velocity3 if isinstance(net, Flux3) else velocity12)(case, net)


def velocity12(case: Case, net: Flux) -> Tensor:
    c, dtype, (h, w) = net.config, case.dtype, case.grid
    axes, batch = len(c.axes_dim), 1 if case.cached else 2

    def number(value: float, count: int = batch) -> Tensor:
        return torch.full((count,), value, dtype=dtype)

    img, txt = draw(batch, h * w, c.in_channels), draw(batch, case.text, c.context_dim, seed=1)
    img, txt = img.to(dtype), txt.to(dtype)
    img_ids, txt_ids = sampling.image_ids(h, w, axes), sampling.text_ids(case.text, axes)
    guidance = 3.5 if c.guidance else None
    caches, reference_ids = None, []
    for n, size in enumerate(case.references, start=1):
        reference_ids.append(sampling.image_ids(*size, axes, t=10 * n))
    tokens = sum(map(len, reference_ids))
    references = draw(batch, tokens, c.in_channels, seed=2).to(dtype)
    if case.cached:
        ids = torch.cat(reference_ids)
        caches = [KVCache(case.text) for _ in range(c.depth + c.depth_single)]
        vec = net.vec(number(0.0), None if guidance is None else number(guidance))
        mods = net.modulations([vec])[0]
        none = txt[:, :0]
        net.denoise(references, none, net.rope(txt_ids[:0], ids), mods, caches)
    elif reference_ids:
        img, img_ids = torch.cat([img, references], 1), torch.cat([img_ids, *reference_ids])
    pooled = draw(batch, c.vector_dim, seed=3).to(dtype) if c.vector_dim else None
    vec = net.vec(number(0.7), None if guidance is None else number(guidance), pooled)
    length = case.text + img.shape[1]
    mask = (draw(length, length, seed=4) > -0.5) | torch.eye(length, dtype=torch.bool)
    added = draw(2, img.shape[1], c.hidden_size, seed=5).to(dtype)
    residuals = Residuals([added, None], [None, added, 0.5 * added])
    return net.denoise(
        img,
        txt,
        net.rope(txt_ids, img_ids),
        net.modulations([vec])[0],
        caches,
        mask if case.mask else None,
        residuals if case.residuals else None,
    )


def velocity3(case: Case, net: Flux3) -> Tensor:
    c, dtype = net.config, case.dtype
    target = torch.full((2,), 0.6, dtype=dtype) if c.flow_map else None
    vec, vec_0 = (net.vec(torch.full((2,), t, dtype=dtype), target) for t in (0.7, 0.0))

    def expand(vec: Tensor, length: int) -> Tensor:
        return vec.expand(-1, length, -1) if case.per_token else vec

    def tokens(length: int, channels: int, seed: int) -> Tensor:
        return draw(2, length, channels, seed=seed).to(dtype)

    h, w = case.grid
    txt = tokens(case.text, c.context_dim, 1)
    txt_ids = sampling.text_ids(case.text, 4)
    streams = [net.stream("txt", txt, net.rope(txt_ids), expand(vec_0, case.text))]
    if case.references:
        ids = [sampling.flux3_image_ids(*size, n + 1) for n, size in enumerate(case.references)]
        rope = net.rope(torch.cat(ids))
        x = tokens(len(rope), c.in_channels, 2)
        streams.append(net.stream("image_cond", x, rope, expand(vec_0, len(rope))))
    rope = net.rope(sampling.flux3_image_ids(h, w))
    img = tokens(h * w, c.in_channels, 0)
    return net.denoise(img, rope, expand(vec, h * w), *streams)


class Outcome(NamedTuple):
    """How a pass over the group differs from a pass alone."""

    relative: float  # L2
    equal: bool  # to the bit
    same_everywhere: bool

    @property
    def right(self) -> bool:
        """Whether the passes are equal in float64. Sums in another order move the last bits."""
        return self.relative <= 1e-13 and self.same_everywhere


@torch.no_grad()
def compare(case: Case, method: str | None, mistake: str | None = None) -> Outcome:
    """Run a pass alone, then over all processes, with a mistake of `parallel_mistakes`."""
    from support.parallel_mistakes import MISTAKES  # which imports this module

    planted = MISTAKES[mistake].plant() if mistake else nullcontext()
    net = network(case.config, case.dtype, case.fast)
    plain = {name: vars(net).get(name) for name in ("denoise", "stream")}
    alone = velocity(case, net)
    try:
        ContextParallel(dist.group.WORLD, method)(net)
        with planted:
            together = velocity(case, net)
    finally:
        for name in plain:
            vars(net).pop(name, None)
    difference = (together - alone).double().norm() / alone.double().norm()
    everywhere = [torch.empty_like(together) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, together.contiguous())
    same = all(torch.equal(x, together) for x in everywhere)
    return Outcome(difference.item(), torch.equal(together, alone), same)


def compare_gradients(case: Case, method: str) -> tuple[float, float]:
    """Return relative errors of gradients, averaged over all processes: the worst of QK norms' and
    that of others. Each block is computed again in the backward pass.
    """
    net = copy.deepcopy(network(case.config, case.dtype)).requires_grad_(True)
    enable_gradient_checkpointing(net)
    gradients: list[dict[str, Tensor]] = []
    for divide in (False, True):
        if divide:
            ContextParallel(dist.group.WORLD, method, gradients=True)(net)
        with attention_backend(torch.device("cpu")):
            loss = velocity(case, net).square().mean()
        loss.backward()
        found = {name: x.grad for name, x in net.named_parameters() if x.grad is not None}
        gradients.append(found)
        net.zero_grad()
    alone, ours = gradients
    assert alone.keys() == ours.keys()
    worst = {True: 0.0, False: 0.0}
    for name, gradient in ours.items():
        dist.all_reduce(gradient)
        difference = gradient / dist.get_world_size() - alone[name]
        of_norm = ".query_norm." in name or ".key_norm." in name
        error = (difference.norm() / alone[name].norm()).item()
        worst[of_norm] = max(worst[of_norm], error)
    return worst[True], worst[False]


@torch.no_grad()
def compare_compiled(method: str) -> float:
    """Return the relative error of a second pass over all processes with traced blocks.

    Without a C++ compiler, which would take a minute: what it makes of a graph is not at stake.
    """
    from torch._dynamo.utils import counters  # it takes a second

    c = replace(SIX_HEADS, depth=1, depth_single=1)
    net = randomise(Flux(c))
    case = Case("klein", dtype=torch.float32)
    alone = velocity(case, net)
    for path in BLOCK_LISTS:
        for block in net.get_submodule(path).children():
            block.compile(fullgraph=True, backend="aot_eager")  # as compile_blocks
    ContextParallel(dist.group.WORLD, method)(net)
    velocity(case, net)
    graphs = counters["stats"]["unique_graphs"]
    together = velocity(case, net)
    assert 0 < graphs == counters["stats"]["unique_graphs"]  # nothing is compiled again
    return ((together - alone).norm() / alone.norm()).item()


def compare_all(cases: list[tuple]) -> list[Outcome]:
    return [compare(*case) for case in cases]

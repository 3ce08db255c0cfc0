"""One step of the transformer, ours and diffusers', with the same weights and inputs, as each one's pipeline takes it.

What our pipeline computes once a generation, rotations and modulations, is no part of a step; diffusers' computes both anew.
Time and guidance are such that both round them alike, also in bfloat16.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import kernels, peak_bytes
from benchmarks.rows import Row
from benchmarks.setting import Setting, narrowed
from benchmarks.timing import pair, random_weights
from flux import sampling
from flux.configs import FLUX1, KLEIN_4B
from flux.parity.reference import (
    diffusers_transformer,
    diffusers_velocity,
    loaded,
    transformer_to_diffusers,
)
from flux.runtime.devices import can_compile
from flux.runtime.lazy_module import compile_blocks
from flux.transformer import BLOCK_LISTS, Flux, FluxConfig

FAMILIES = {"FLUX.1": FLUX1, "klein 4B": KLEIN_4B}
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
Step = Callable[[], Tensor]


def step_rows(setting: Setting) -> Iterator[Row]:
    yield from map(kernel_row, FAMILIES)
    yield resident_row()
    yield from (overhead_row(name, setting) for name in FAMILIES)
    cpu = setting.device.type == "cpu"
    for name, config in FAMILIES.items():
        config = setting.cut(config)
        for side in setting.sides:
            case = (
                f"step, {name}, 1 + 2 blocks of width {config.hidden_size}, {side}x{side}, bfloat16"
            )
            goals = ({256: 0.97, 512: 0.94}.get(side), None) if cpu else (0.85, 0.95)
            yield from timed_rows(
                case, config, side, setting, *(goals if setting.width is None else (None, None))
            )


def kernel_row(name: str) -> Row:
    """Kernels that a step starts, of a narrow model of full depth, on the CPU: the same number in every run."""
    ours, theirs = both(narrowed(FAMILIES[name], 64), "cpu", torch.float32)
    given = inputs(ours.config, 64, 8, "cpu", torch.float32)
    counts = [kernels(step).total() for step in (our_step(ours, given), their_step(theirs, given))]
    return Row(f"step, {name}, kernels", "kernels", *counts, goal=0.55)


def overhead_row(name: str, setting: Setting) -> Row:
    """So narrow, and of so few tokens, that kernels themselves take little time: what is left is what starting them takes."""
    ours, theirs = both(narrowed(FAMILIES[name], 32), setting.device, torch.float32)
    given = inputs(ours.config, 32, 4, setting.device, torch.float32)
    with same_attention():
        case = f"step, {name}, full depth, width 32, 8 tokens, float32, eager"
        return pair(case, our_step(ours, given), their_step(theirs, given), setting, goal=0.65)


def resident_row() -> Row:
    """Weights of the full size that a step reads, and that must be in memory for it: of ours, not those of the modulation."""
    with torch.device("meta"):
        ours, theirs = Flux(FLUX1).bfloat16(), diffusers_transformer(FLUX1).bfloat16()
    given = inputs(FLUX1, 64, 8, "meta", torch.bfloat16)
    sizes = [read_bytes(ours, our_step(ours, given)), read_bytes(theirs, their_step(theirs, given))]
    return Row("step, FLUX.1, weights that it reads", "B", *sizes, goal=0.75)


def read_bytes(model: nn.Module, step: Step) -> int:
    """Of the parameters that `step` hands to any operation."""
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            leaves = tree_leaves((args, kwargs))
            seen.update(
                leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)
            )
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        step()
    return sum(p.nbytes for p in model.parameters() if p.untyped_storage()._cdata in seen)


def timed_rows(
    case: str,
    config: FluxConfig,
    side: int,
    setting: Setting,
    eager: float | None,
    compiled: float | None,
) -> Iterator[Row]:
    """Eager, its peak of activations, and compiled; the two floats are the goals."""
    ours, theirs = both(config, setting.device, torch.bfloat16)
    given = inputs(config, side, setting.text, setting.device, torch.bfloat16)
    mine, other = our_step(ours, given), their_step(theirs, given)
    with same_attention():
        yield pair(f"{case}, eager", mine, other, setting, goal=eager)
        yield Row(f"{case}, peak of activations", "B", peak_bytes(mine), peak_bytes(other))
        if setting.compiled and can_compile(setting.device):
            compile_blocks(ours, BLOCK_LISTS)
            theirs.compile_repeated_blocks(fullgraph=True)
            yield pair(f"{case}, compiled", mine, other, setting, goal=compiled)
    torch._dynamo.reset()


def both(
    config: FluxConfig, device: torch.device | str, dtype: torch.dtype
) -> tuple[Flux, nn.Module]:
    """Ours and diffusers' transformer, which share their weights."""
    ours = random_weights(lambda: Flux(config), device, dtype)
    return ours, loaded(
        diffusers_transformer(config), transformer_to_diffusers(ours.state_dict(), config)
    )


def inputs(
    config: FluxConfig, side: int, text: int, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """For a picture of `side` pixels, in the middle of its generation; ids are on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    tokens, axes = side // 16, len(config.axes_dim)
    given = dict(
        img=random(1, tokens**2, config.in_channels),
        img_ids=sampling.image_ids(tokens, tokens, axes),
        txt=random(1, text, config.context_dim),
        txt_ids=sampling.text_ids(text, axes),
        t=torch.full((1,), 0.5, device=device),
    )
    if config.guidance:
        given["guidance"] = torch.full((1,), 4.0, device=device)
    if config.vector_dim is not None:
        given["vector"] = random(1, config.vector_dim)
    return given


def our_step(model: Flux, given: dict[str, Tensor]) -> Step:
    img, txt, rope = (
        given["img"],
        given["txt"],
        model.rope(given["txt_ids"], given["img_ids"]).to(given["img"].device),
    )
    inputs = {name: given[name] for name in ("t", "guidance", "vector") if name in given}
    mods = model.modulations([model.vec(**inputs)])[0]
    return lambda: model.denoise(img, txt, rope, mods)


def their_step(model: nn.Module, given: dict[str, Tensor]) -> Step:
    given = given | {ids: given[ids].to(given["img"].device) for ids in ("img_ids", "txt_ids")}
    return lambda: diffusers_velocity(model, **given)


@contextmanager
def same_attention():
    """On a GPU: the fastest that torch has, for both; it chooses another by itself. Without gradients, as both pipelines."""
    with torch.no_grad(), sdpa_kernel(BACKENDS, set_priority=True):
        yield

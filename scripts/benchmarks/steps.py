"""One step of the transformer, ours and diffusers', with the same weights and inputs.

Each side runs as its pipeline runs it. Our pipeline computes rotations and modulations once a
generation, so a step has none of them; diffusers' step computes both. Both round the time and the
guidance of the inputs alike, also in bfloat16. Our networks run with the faster forwards of
flux/runtime/fast.py, as after `flux.load`; the rows "plain" run them without.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import peak_bytes
from benchmarks.rows import Row
from benchmarks.setting import Setting, narrowed
from benchmarks.steps3 import both3, ids_and_times3, our_step3, their_step3
from benchmarks.timing import pair, random_weights
from flux import sampling, transformer3
from flux.configs import FLUX1, KLEIN3, KLEIN_4B
from flux.parity.reference import (
    diffusers_transformer,
    diffusers_velocity,
    loaded,
    transformer_to_diffusers,
)
from flux.runtime.compilation import compile_blocks
from flux.runtime.devices import can_compile
from flux.runtime.fast import fast_transformer
from flux.runtime.fast3 import fast_transformer3
from flux.transformer import BLOCK_LISTS, Flux, FluxConfig, KVCache
from flux.transformer3 import Flux3, Flux3Config

Config = FluxConfig | Flux3Config
FAMILIES: dict[str, Config] = {"FLUX.1": FLUX1, "klein 4B": KLEIN_4B, "FLUX 3": KLEIN3}
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
Step = Callable[[], Tensor]


def step_rows(setting: Setting) -> Iterator[Row]:
    yield resident_row()
    for name in FAMILIES:
        yield overhead_row(name, setting)
    goals: dict[int, tuple[float | None, float | None]] = {}  # by side: eager, compiled
    if setting.width is None:
        on_cpu = setting.device.type == "cpu"  # where products take nine tenths of the time
        goals = dict.fromkeys(setting.sides, (1.0, None) if on_cpu else (0.91, 0.98))
    for name, config in FAMILIES.items():
        config = setting.cut(config)
        for side in setting.sides:
            yield from timed_rows(
                case_name(name, config, side), config, side, setting, *goals.get(side, (None, None))
            )


def case_name(name: str, config: Config, side: int) -> str:
    return f"step, {name}, 1 + 2 blocks of width {config.hidden_size}, {side}x{side}, bfloat16"


def overhead_row(name: str, setting: Setting) -> Row:
    """Time a model so narrow, on so few tokens, that starting kernels takes most of the time."""
    ours, theirs = both(narrowed(FAMILIES[name], 32), setting.device, torch.float32)
    ours = as_loaded(ours, setting.device)
    tensors = inputs(ours.config, 32, 4, setting.device, torch.float32)
    with same_attention():
        case = f"step, {name}, full depth, width 32, 8 tokens, float32, eager"
        return pair(case, our_step(ours, tensors), their_step(theirs, tensors), setting)


def resident_row() -> Row:
    """Count the weights that a full-size step reads. Ours does not read those of modulation."""
    with torch.device("meta"):
        ours, theirs = Flux(FLUX1).bfloat16(), diffusers_transformer(FLUX1).bfloat16()
    tensors = inputs(FLUX1, 64, 8, "meta", torch.bfloat16)
    sizes = [
        read_bytes(ours, our_step(ours, tensors)),
        read_bytes(theirs, their_step(theirs, tensors)),
    ]
    return Row("step, FLUX.1, weights that it reads", "B", *sizes, goal=0.75)


def read_bytes(model: nn.Module, step: Step) -> int:
    """Return the bytes of the parameters that `step` passes to any operation."""
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    seen.add(leaf.untyped_storage()._cdata)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        step()
    return sum(p.nbytes for p in model.parameters() if p.untyped_storage()._cdata in seen)


def timed_rows(
    case: str,
    config: Config,
    side: int,
    setting: Setting,
    eager: float | None,
    compiled: float | None,
) -> Iterator[Row]:
    """Yield the time of an eager step, its peak of activations, and the time of a compiled one.

    eager, compiled: goals. A row "plain" shows what flux/runtime/fast.py is worth.
    """
    ours, theirs = both(config, setting.device, torch.bfloat16)
    tensors = inputs(config, side, setting.text, setting.device, torch.bfloat16)
    our, their = our_step(ours, tensors), their_step(theirs, tensors)
    with same_attention():
        plain_step = our_step(sharing_weights(ours), tensors)
        as_loaded(ours, setting.device)
        yield pair(f"{case}, eager", our, their, setting, goal=eager)
        yield pair(f"{case}, eager, plain", plain_step, their, setting)
        yield Row(f"{case}, peak of activations", "B", peak_bytes(our), peak_bytes(their))
        if setting.compiled and can_compile(setting.device):
            compile_blocks(ours, block_lists(ours))
            theirs.compile_repeated_blocks(fullgraph=True)
            yield pair(f"{case}, compiled", our, their, setting, goal=compiled)
    torch._dynamo.reset()


def build_network(config: Config) -> Any:
    return Flux3(config) if isinstance(config, Flux3Config) else Flux(config)


def block_lists(model: nn.Module) -> tuple[str, ...]:
    return transformer3.BLOCK_LISTS if isinstance(model, Flux3) else BLOCK_LISTS


def as_loaded(model: Any, device: torch.device | str) -> Any:
    """Change `model` as `flux.load` changes it on this device, and return it."""
    if torch.device(device).type == "mps":
        return model
    return fast_transformer3(model) if isinstance(model, Flux3) else fast_transformer(model)


def sharing_weights(model: Any) -> Any:
    """Return another transformer with the same tensors."""
    with torch.device("meta"):
        other = type(model)(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def both(config: Config, device: torch.device | str, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """Return our transformer and diffusers' transformer, which share their weights."""
    if isinstance(config, Flux3Config):
        return both3(config, device, dtype)
    ours = random_weights(lambda: Flux(config), device, dtype)
    return ours, loaded(
        diffusers_transformer(config), transformer_to_diffusers(ours.state_dict(), config)
    )


def inputs(
    config: Config, side: int, text: int, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the inputs of a step at t = 0.5, of an image of `side` pixels. Ids are on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    tokens, axes = side // 16, len(config.axes_dim)
    tensors = dict(
        img=random(1, tokens**2, config.in_channels),
        img_ids=sampling.image_ids(tokens, tokens, axes),
        txt=random(1, text, config.context_dim),
        txt_ids=sampling.text_ids(text, axes),
        t=torch.full((1,), 0.5, device=device),
    )
    if isinstance(config, Flux3Config):
        return tensors | ids_and_times3(config, tokens, device)
    if config.guidance:
        tensors["guidance"] = torch.full((1,), 4.0, device=device)
    if config.vector_dim is not None:
        tensors["vector"] = random(1, config.vector_dim)
    return tensors


def our_step(model: Any, tensors: dict[str, Tensor], caches: list[KVCache] | None = None) -> Step:
    if isinstance(model, Flux3):
        return our_step3(model, tensors)
    img, txt = tensors["img"], tensors["txt"]
    rope = model.rope(tensors["txt_ids"], tensors["img_ids"]).to(img.device)
    vec_inputs = {name: tensors[name] for name in ("t", "guidance", "vector") if name in tensors}
    mods = model.modulations([model.vec(**vec_inputs)])[0]
    return lambda: model.denoise(img, txt, rope, mods, caches)


def their_step(model: nn.Module, tensors: dict[str, Tensor]) -> Step:
    tensors = tensors | {
        name: x.to(tensors["img"].device) for name, x in tensors.items() if name.endswith("ids")
    }
    if type(model).__name__ == "Flux3Transformer2DModel":
        return their_step3(model, tensors)
    return lambda: diffusers_velocity(model, **tensors)


@contextmanager
def same_attention():
    """Run both sides without gradients and, on a GPU, with the fastest attention of torch.

    Torch would choose a slower one by itself.
    """
    with torch.no_grad(), sdpa_kernel(BACKENDS, set_priority=True):
        yield

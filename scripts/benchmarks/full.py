"""A released model at full size, with random weights drawn on the device: no files are needed.

The stages text, step and decode run one after the other, so that only the largest must fit. Each is
compared with its floor and, on request, with diffusers with the same weights.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.floor import operations, replay
from benchmarks.measure import peak_bytes, peak_memory
from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.stages import (
    dtype_name,
    our_autoencoder,
    photo_like,
    save_ours,
    save_theirs,
    their_autoencoder,
)
from benchmarks.steps import (
    as_loaded,
    block_lists,
    build_network,
    inputs,
    our_step,
    same_attention,
    their_step,
)
from benchmarks.steps3 import TEXT_TOKENS, their_transformer3
from benchmarks.timing import by_turns, random_weights, timed
from flux.clip import CLIP
from flux.configs import FLUX1Text, ModelSpec
from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.parity import reference
from flux.parity.reference import relative_l2
from flux.runtime.compilation import compile_blocks
from flux.runtime.devices import can_compile, free_memory, no_tf32
from flux.t5 import T5
from flux.weights.quantization.fp8 import enable_fp8_matmul
from flux.weights.quantization.quantize import quantize_

Run = Callable[[], Tensor]
Spent = dict[str, list[float]]  # seconds by stage: ours, floor, theirs


class Stage(NamedTuple):
    modules: list[nn.Module]
    inputs: dict[str, Tensor]
    run: Run
    dtype: torch.dtype = torch.bfloat16


def full_rows(spec: ModelSpec, setting: Setting, against: bool) -> Iterator[Row]:
    """Yield the rows of every stage, and of their sum: from the prompt to the PNG."""
    check_room(spec, setting.device)
    spent: Spent = {}
    for name in STAGES:
        yield from stage_rows(name, spec, setting, against, spent)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    pixels = photo_like(setting.full_side, setting.device)
    with TemporaryDirectory() as folder:
        saves = [save_ours, save_theirs] if against else [save_ours]
        runs = [save(pixels, Path(folder)) for save in saves]
        ours, *theirs = by_turns(runs, setting.rounds, setting.enough)
    spent["save"] = [ours, 0.0, *theirs]
    yield from sum_rows(spec, setting, spent)


def check_room(spec: ModelSpec, device: torch.device) -> None:
    """Raise UserError, before anything is built, if the largest stage does not fit."""
    needed = 0
    for build, _ in STAGES.values():
        modules = build(spec, 64, "meta").modules
        needed = max(needed, sum(p.nbytes for module in modules for p in module.parameters()))
    free = free_memory(device)
    if needed > 0.95 * free:
        raise UserError(
            f"--model: the largest network of {spec.name} takes {needed / 1e9:.1f} GB, "
            f"and {device} has {free / 1e9:.1f} GB free. Choose a smaller model."
        )


def stage_rows(
    name: str, spec: ModelSpec, setting: Setting, against: bool, spent: Spent
) -> Iterator[Row]:
    """Yield time over the floor and against diffusers, and memory. Add the seconds to `spent`.

    A step is also compiled and, on a GPU, computed in float8.
    """
    build, build_theirs = STAGES[name]
    gpu = setting.device.type == "cuda"
    stage = build(spec, setting.full_side, setting.device)
    case = (
        f"{name}, {spec.name}, {setting.full_side}x{setting.full_side}, {dtype_name(stage.dtype)}"
    )
    goal = None
    if name == "step":
        goal = 0.91 if gpu else 1.0
    theirs = build_theirs(spec, stage) if against else None

    def on_meta() -> Run:
        return build(spec, setting.full_side, "meta").run

    runs = [stage.run, replay(operations(on_meta, setting.device), setting.device)]
    runs += [theirs.run] if theirs else []
    with same_attention():
        yield from time_rows(case, name, runs, setting, spent, goal)
        sizes = [memory(each, setting.device) for each in (stage, theirs) if each]
        yield Row(f"{case}, weights and peak of activations", "B", *sizes)
        if name == "step" and setting.compiled and can_compile(setting.device):
            yield from compiled_rows(case, stage, theirs, runs, setting, spent)
        if name == "step" and gpu and torch.cuda.get_device_capability() >= (8, 9):
            yield from float8_rows(case, stage, setting)


def time_rows(
    case: str,
    name: str,
    runs: list[Run],
    setting: Setting,
    spent: Spent,
    goal: float | None,
    over_floor: float | None = None,
) -> Iterator[Row]:
    """Time our run, its floor and, if there is a third run, theirs."""
    difference = relative_l2(runs[0](), runs[2]().float()) if len(runs) == 3 else None
    spent[name] = ours, floor, *theirs = by_turns(runs, setting.rounds, setting.replayed)
    yield Row(case, "s", ours, floor, "floor", goal=over_floor, runs=2 * setting.rounds)
    if theirs:
        runs_each = 2 * setting.rounds
        yield Row(case, "s", ours, *theirs, goal=goal, runs=runs_each, difference=difference)


def compiled_rows(
    case: str, stage: Stage, theirs: Stage | None, runs: list[Run], setting: Setting, spent: Spent
) -> Iterator[Row]:
    """Time both sides compiled block by block, and ours compiled against diffusers eager."""
    from torch._inductor.utils import fresh_cache  # not at the top: it takes seconds

    if setting.device.type == "cuda":
        with fresh_cache():
            whole_graph = timed(torch.compile(stage.run))
        torch._dynamo.reset()
        compile_blocks(*stage.modules, block_lists(stage.modules[0]))
        with fresh_cache():
            first = f"{case}, first step, compiled"
            yield Row(first, "s", timed(stage.run), whole_graph, "one graph", goal=0.2)
    compile_blocks(*stage.modules, block_lists(stage.modules[0]))
    if theirs:
        theirs.modules[0].compile_repeated_blocks(fullgraph=True)
    yield from time_rows(
        f"{case}, compiled", "step, compiled", runs, setting, spent, goal=0.98, over_floor=1.20
    )
    if theirs:
        ours, eager = spent["step, compiled"][0], spent["step"][2]
        yield Row(
            f"{case}, compiled, against eager", "s", ours, eager, goal=0.77, runs=2 * setting.rounds
        )


def float8_rows(case: str, stage: Stage, setting: Setting) -> Iterator[Row]:
    """Time products in float8, compiled if those in bfloat16 were.

    The two do not take turns, since both models might not fit.
    """
    model, exact = stage.modules[0], stage.run()
    (bfloat16,) = by_turns([stage.run], setting.rounds, setting.replayed)
    quantize_(model, "fp8")
    enable_fp8_matmul(model)
    error = relative_l2(stage.run(), exact.float())
    yield Row(f"{case}, in float8, error of the velocity, relative L2", "", error)
    (float8,) = by_turns([stage.run], setting.rounds, setting.replayed)
    yield Row(
        f"{case}, in float8", "s", float8, bfloat16, "bfloat16", goal=0.72, runs=2 * setting.rounds
    )


def sum_rows(spec: ModelSpec, setting: Setting, spent: Spent) -> Iterator[Row]:
    """Yield the sum of the parts, prompt to PNG; and all but the steps, over the floor.

    A PNG is written while the next image is made: only the last image of a run waits for its own.
    """
    steps, runs = spec.steps * (1 + spec.cfg), 2 * setting.rounds
    parts = [spent[name] for name in ("text", "decode", "save")]
    around = [sum(each) for each in zip(*parts)]  # ours, floor, theirs
    yield Row(f"all but the steps, {spec.name}", "s", *around[:2], "floor", goal=5.0, runs=runs)
    others = [sum(each) for each in zip(*parts[:2])]
    case = f"all but the steps and the PNG, {spec.name}"
    yield Row(case, "s", *others[:2], "floor", runs=runs)
    for step in [name for name in spent if name.startswith("step")]:
        case = f"prompt to PNG, {spec.name}, {steps} times {step}, the sum of its parts"
        ours, floor, *theirs = (a + steps * b for a, b in zip(around, spent[step]))
        yield Row(case, "s", ours, floor, "floor", runs=runs)
        if theirs:
            gpu = setting.device.type == "cuda"  # on a CPU the floor alone is higher
            yield Row(case, "s", ours, *theirs, goal=0.60 if gpu else None, runs=runs)


def memory(stage: Stage, device: torch.device) -> int:
    """Return the bytes of the weights, and of the peak of activations."""
    weights = {}
    for module in stage.modules:
        for tensor in module.state_dict().values():
            weights[tensor.data_ptr()] = tensor.nbytes  # shared tensors count once
    if device.type == "cuda":
        return sum(weights.values()) + peak_memory(stage.run, device)
    return sum(weights.values()) + peak_bytes(stage.run)


# ------------------------------------------------------------------ ours


def encoding(spec: ModelSpec, side: int, device: torch.device | str) -> Stage:
    def random(size: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, size - 2, (1, length), generator=generator).to(device)

    if isinstance(spec.text, FLUX1Text):
        t5 = random_weights(lambda: T5(spec.text.t5), device, torch.bfloat16)
        clip = random_weights(lambda: CLIP(spec.text.clip), device, torch.bfloat16)
        long = random(spec.text.t5.vocab_size, spec.text_length)
        short = random(spec.text.clip.vocab_size, spec.text.clip.max_length)
        short[0, -1] = spec.text.clip.eos_id

        def run() -> Tensor:
            return torch.cat([t5(long).flatten(), clip(short).flatten()])

        return Stage([t5, clip], dict(long=long, short=short), run)
    config = spec.text.model
    model = random_weights(lambda: LanguageModel(config), device, torch.bfloat16)
    ids = random(config.vocab_size, text_tokens(spec))
    tensors = dict(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
    return Stage([model], tensors, lambda: model(**tensors))


def text_tokens(spec: ModelSpec) -> int:
    """Return the length of a prompt, padding included; FLUX 3: of a usual one."""
    return TEXT_TOKENS if spec.flux3 else spec.text_length


def stepping(spec: ModelSpec, side: int, device: torch.device | str) -> Stage:
    model = random_weights(lambda: build_network(spec.transformer), device, torch.bfloat16)
    model = as_loaded(model, device)
    tensors = inputs(spec.transformer, side, text_tokens(spec), device, torch.bfloat16)
    return Stage([model], tensors, our_step(model, tensors))


def decoding(
    spec: ModelSpec,
    side: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,  # the default of decoding
) -> Stage:
    model = our_autoencoder(spec.autoencoder, torch.device(device), dtype)
    size = 1, spec.autoencoder.latent_channels, side // 16, side // 16
    latents = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def run() -> Tensor:
        with no_tf32():
            return model.decode(latents)

    return Stage([model], dict(latents=latents), run, dtype)


# ------------------------------------------------------------------ theirs, with our weights


def their_encoding(spec: ModelSpec, ours: Stage) -> Stage:
    """Build the released text encoder: all layers and the head. Ours shares its weights."""
    states = [module.state_dict() for module in ours.modules]
    device = next(iter(ours.inputs.values())).device
    if isinstance(spec.text, FLUX1Text):
        long, short = ours.inputs["long"], ours.inputs["short"]
        with built_on(device):
            t5 = reference.loaded(
                reference.transformers_t5(spec.text.t5), reference.t5_to_transformers(states[0])
            )
            clip = reference.loaded(
                reference.transformers_clip(spec.text.clip, eos_id=2),
                reference.clip_to_transformers(states[1]),
            )

        def encode() -> Tensor:
            hidden, pooled = t5(long).last_hidden_state, clip(short).pooler_output
            return torch.cat([hidden.flatten(), pooled.flatten()])

        return Stage([t5, clip], ours.inputs, encode)
    config, mistral = spec.text.model, not spec.text.model.qk_norm
    depth = 40 if mistral else 36  # as released
    with built_on(device):
        model = reference.transformers_language_model(config, depth, mistral)
        model = model.eval().requires_grad_(False)
    state = reference.language_model_to_transformers(states[0], mistral)
    unknown = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    assert not unknown, unknown
    ids, mask = ours.inputs["ids"], ours.inputs["mask"]

    def run() -> Tensor:
        return reference.transformers_features(model, ids, mask, config.layers)

    return Stage([model], ours.inputs, run)


@contextmanager
def built_on(device: torch.device) -> Iterator[None]:
    """Build modules on the device in bfloat16. Tables that request float32 keep it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def their_stepping(spec: ModelSpec, ours: Stage) -> Stage:
    if spec.flux3:
        network: Any = ours.modules[0]
        theirs = their_transformer3(network)
        return Stage([theirs], ours.inputs, their_step(theirs, ours.inputs))
    state = reference.transformer_to_diffusers(ours.modules[0].state_dict(), spec.transformer)
    model = reference.loaded(reference.diffusers_transformer(spec.transformer), state)
    return Stage([model], ours.inputs, their_step(model, ours.inputs))


def their_decoding(spec: ModelSpec, ours: Stage) -> Stage:
    model = their_autoencoder(ours.modules[0])

    def run() -> Tensor:
        with no_tf32():
            return reference.diffusers_decode(model, ours.inputs["latents"])

    return Stage([model], ours.inputs, run, ours.dtype)


STAGES = {
    "text": (encoding, their_encoding),
    "step": (stepping, their_stepping),
    "decode": (decoding, their_decoding),
}

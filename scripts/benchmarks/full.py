"""A released model at full size, with random weights drawn where they are used: no files, no network, any device with room.

Its stages, text, step and decode, come one after the other, so that the largest must fit and not their sum. Each is set against
its floor and, where asked for, against diffusers with the same weights.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from benchmarks.floor import operations, replay
from benchmarks.measure import peak_bytes, peak_memory
from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.stages import our_autoencoder, picture, save_ours, save_theirs, their_autoencoder
from benchmarks.steps import inputs, our_step, same_attention, their_step
from benchmarks.timing import by_turns, random_weights, timed
from flux.autoencoder import AutoEncoder
from flux.clip import CLIP
from flux.configs import FLUX1Text, ModelSpec
from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.parity import reference
from flux.parity.reference import relative_l2
from flux.runtime.devices import can_compile, free_memory
from flux.runtime.lazy_module import compile_blocks
from flux.t5 import T5
from flux.transformer import BLOCK_LISTS, Flux
from flux.weights.quantization.fp8 import enable_fp8_matmul
from flux.weights.quantization.quantize import quantize_

Run = Callable[[], Tensor]
Spent = dict[str, list[float]]  # seconds by stage: ours, floor, theirs


class Stage(NamedTuple):
    modules: list[nn.Module]
    given: dict[str, Tensor]
    run: Run


def full_rows(spec: ModelSpec, setting: Setting, against: bool) -> Iterator[Row]:
    """Every stage, and their sum: from the prompt to the PNG."""
    check_room(spec, setting.device)
    spent: Spent = {}
    for name in STAGES:
        yield from stage_rows(name, spec, setting, against, spent)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    pixels = picture(setting.whole, setting.device)
    with TemporaryDirectory() as folder:
        saves = [save_ours, save_theirs] if against else [save_ours]
        ours, *theirs = by_turns(
            [save(pixels, Path(folder)) for save in saves], setting.rounds, setting.enough
        )
    spent["save"] = [ours, 0.0, *theirs]
    yield from sum_rows(spec, setting, spent)


def check_room(spec: ModelSpec, device: torch.device) -> None:
    """UserError, before anything is made, if the largest stage does not fit."""
    on_meta = [build(spec, 64, "meta").modules for build, _ in STAGES.values()]
    needed = max(
        sum(p.nbytes for module in modules for p in module.parameters()) for modules in on_meta
    )
    if needed > 0.95 * (free := free_memory(device)):
        raise UserError(
            f"--model {spec.name}: its largest network takes {needed / 1e9:.1f} GB in bfloat16, and {device} has "
            f"{free / 1e9:.1f}: choose a smaller model, or another --device"
        )


def stage_rows(
    name: str, spec: ModelSpec, setting: Setting, against: bool, spent: Spent
) -> Iterator[Row]:
    """Time over the floor and against diffusers, and memory; a step also compiled, and in float8. Adds to `spent`."""
    build, build_theirs = STAGES[name]
    case, gpu = (
        f"{name}, {spec.name}, {setting.whole}x{setting.whole}, bfloat16",
        setting.device.type == "cuda",
    )
    stage = build(spec, setting.whole, setting.device)
    theirs = build_theirs(spec, stage) if against else None
    runs = [stage.run, replay(operations(build(spec, setting.whole, "meta").run), setting.device)]
    runs += [theirs.run] if theirs else []
    with same_attention():
        yield from time_rows(
            case,
            name,
            runs,
            setting,
            spent,
            goal=(0.85 if gpu else 1.0) if name == "step" else None,
        )
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
    """Of ours, its floor and, if there is a third, theirs."""
    difference = relative_l2(runs[0](), runs[2]().float()) if len(runs) == 3 else None
    spent[name] = ours, floor, *theirs = by_turns(runs, setting.rounds, setting.replayed)
    yield Row(case, "s", ours, floor, "floor", goal=over_floor, runs=2 * setting.rounds)
    if theirs:
        yield Row(
            case, "s", ours, *theirs, goal=goal, runs=2 * setting.rounds, difference=difference
        )


def compiled_rows(
    case: str, stage: Stage, theirs: Stage | None, runs: list[Run], setting: Setting, spent: Spent
) -> Iterator[Row]:
    """Block by block, on both sides; and our default for speed against what diffusers does without being asked."""
    if setting.device.type == "cuda":
        with fresh_cache():
            whole = timed(torch.compile(stage.run))
        torch._dynamo.reset()
        compile_blocks(*stage.modules, BLOCK_LISTS)
        with fresh_cache():
            yield Row(
                f"{case}, first step, compiled",
                "s",
                timed(stage.run),
                whole,
                "compiled whole",
                goal=0.2,
            )
    compile_blocks(*stage.modules, BLOCK_LISTS)
    if theirs:
        theirs.modules[0].compile_repeated_blocks(fullgraph=True)
    yield from time_rows(
        f"{case}, compiled", "step, compiled", runs, setting, spent, goal=0.95, over_floor=1.20
    )
    if theirs:
        ours, eager = spent["step, compiled"][0], spent["step"][2]
        yield Row(
            f"{case}, compiled, against eager", "s", ours, eager, goal=0.65, runs=2 * setting.rounds
        )


def float8_rows(case: str, stage: Stage, setting: Setting) -> Iterator[Row]:
    """Products in float8, compiled if those in bfloat16 were: not by turns, since both models might not fit."""
    model, before = stage.modules[0], stage.run()
    (bfloat16,) = by_turns([stage.run], setting.rounds, setting.replayed)
    quantize_(model, "fp8")
    enable_fp8_matmul(model)
    yield Row(
        f"{case}, in float8, error of the velocity, relative L2",
        "",
        relative_l2(stage.run(), before.float()),
    )
    (float8,) = by_turns([stage.run], setting.rounds, setting.replayed)
    yield Row(
        f"{case}, in float8", "s", float8, bfloat16, "bfloat16", goal=0.72, runs=2 * setting.rounds
    )


def sum_rows(spec: ModelSpec, setting: Setting, spent: Spent) -> Iterator[Row]:
    """From the prompt to the PNG, added up of its parts; and all of it but the steps, over the floor."""
    steps, runs = spec.steps * (1 + spec.cfg), 2 * setting.rounds
    around = [sum(each) for each in zip(*(spent[name] for name in ("text", "decode", "save")))]
    yield Row(f"all but the steps, {spec.name}", "s", *around[:2], "floor", goal=5.0, runs=runs)
    for step in (name for name in spent if name.startswith("step")):
        case = f"prompt to PNG, {spec.name}, {steps} times {step}, the sum of its parts"
        ours, floor, *theirs = (a + steps * b for a, b in zip(around, spent[step]))
        yield Row(case, "s", ours, floor, "floor", runs=runs)
        if theirs:
            gpu = setting.device.type == "cuda"  # on a CPU the floor alone is higher
            yield Row(case, "s", ours, *theirs, goal=0.60 if gpu else None, runs=runs)


def memory(stage: Stage, device: torch.device) -> int:
    """Weights, and the most that a run takes beside them."""
    weights = {
        tensor.data_ptr(): tensor.nbytes
        for module in stage.modules
        for tensor in module.state_dict().values()
    }
    return sum(weights.values()) + (
        peak_memory(stage.run, device) if device.type == "cuda" else peak_bytes(stage.run)
    )


# ---------------------------------------------------------------- ours


def encoding(spec: ModelSpec, side: int, device: torch.device | str) -> Stage:
    def random(size, n):
        return torch.randint(1, size - 2, (1, n), generator=torch.Generator().manual_seed(0)).to(
            device
        )

    if isinstance(spec.text, FLUX1Text):
        t5 = random_weights(lambda: T5(spec.text.t5), device, torch.bfloat16)
        clip = random_weights(lambda: CLIP(spec.text.clip), device, torch.bfloat16)
        given = dict(
            long=random(spec.text.t5.vocab_size, spec.text_length),
            short=random(spec.text.clip.vocab_size, 77),
        )
        given["short"][0, -1] = spec.text.clip.eos_id
        return Stage(
            [t5, clip],
            given,
            lambda: torch.cat([t5(given["long"]).flatten(), clip(given["short"]).flatten()]),
        )
    config = spec.text.model
    model = random_weights(lambda: LanguageModel(config), device, torch.bfloat16)
    given = dict(ids=random(config.vocab_size, spec.text_length))
    given["mask"] = torch.ones_like(given["ids"], dtype=torch.bool)
    return Stage([model], given, lambda: model(**given))


def stepping(spec: ModelSpec, side: int, device: torch.device | str) -> Stage:
    model = random_weights(lambda: Flux(spec.transformer), device, torch.bfloat16)
    given = inputs(spec.transformer, side, spec.text_length, device, torch.bfloat16)
    return Stage([model], given, our_step(model, given))


def decoding(spec: ModelSpec, side: int, device: torch.device | str) -> Stage:
    on_meta = str(device) == "meta"
    model = (
        random_weights(lambda: AutoEncoder(spec.autoencoder), device, torch.bfloat16)
        if on_meta
        else our_autoencoder(spec.autoencoder, torch.device(device))
    )
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(
        1, spec.autoencoder.latent_channels, side // 16, side // 16, generator=generator
    )
    given = dict(latents=latents.to(device, torch.bfloat16))
    return Stage([model], given, lambda: model.decode(**given))


# ---------------------------------------------------------------- theirs, with our weights and inputs


def their_encoding(spec: ModelSpec, ours: Stage) -> Stage:
    """Whole, as released: all layers and the head, of which those that ours has share their weights with it."""
    device, states = (
        next(iter(ours.given.values())).device,
        [module.state_dict() for module in ours.modules],
    )
    with made_on(device):
        if isinstance(spec.text, FLUX1Text):
            t5 = reference.loaded(
                reference.transformers_t5(spec.text.t5), reference.t5_to_transformers(states[0])
            )
            clip = reference.transformers_clip(spec.text.clip, eos_id=2)
            clip = reference.loaded(clip, reference.clip_to_transformers(states[1]))
            long, short = ours.given["long"], ours.given["short"]

            def run():
                return torch.cat(
                    [t5(long).last_hidden_state.flatten(), clip(short).pooler_output.flatten()]
                )

            return Stage([t5, clip], ours.given, run)
        config, mistral = spec.text.model, not spec.text.model.qk_norm
        depth = 40 if mistral else 36  # as released
        model = (
            reference.transformers_language_model(config, depth, mistral)
            .eval()
            .requires_grad_(False)
        )
    state = reference.language_model_to_transformers(states[0], mistral)
    unknown = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    assert not unknown, unknown

    def run():
        return reference.transformers_features(
            model, ours.given["ids"], ours.given["mask"], config.layers
        )

    return Stage([model], ours.given, run)


@contextmanager
def made_on(device: torch.device):
    """Modules are made there, in bfloat16, but for the tables that ask for float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def their_stepping(spec: ModelSpec, ours: Stage) -> Stage:
    state = reference.transformer_to_diffusers(ours.modules[0].state_dict(), spec.transformer)
    model = reference.loaded(reference.diffusers_transformer(spec.transformer), state)
    return Stage([model], ours.given, their_step(model, ours.given))


def their_decoding(spec: ModelSpec, ours: Stage) -> Stage:
    model = their_autoencoder(ours.modules[0])
    return Stage([model], ours.given, lambda: reference.diffusers_decode(model, **ours.given))


STAGES = {
    "text": (encoding, their_encoding),
    "step": (stepping, their_stepping),
    "decode": (decoding, their_decoding),
}

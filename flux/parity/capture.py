"""Run the pipeline and record its tensors, by name, into one file.

    text/t5/encoder.block.0/out  text/features  text/pooled              of the negative prompt: text/negative/...
    encoder.1/encoder.conv_in/out  conditions/references                 of pictures, if there are any
    noise  ids/txt  ids/img  rope  schedule                              of the negative prompt's pass: negative/rope
    step.001/in  step.001/vec  step.001/double_blocks.0/in.0 ...  step.001/out         what the network takes and gives
    step.001/negative/in ...  step.001/velocity  step.001/latents        the negative prompt's pass; guided; after the step
    decoder/decoder.conv_in/out ...  pixels  picture

Nothing in the pipeline knows of this: its functions are replaced, for the time of the run, by ones that also show what goes
through them. What a run will record, and how much that is, is found by the same run on networks without weights.
"""

import copy
import hashlib
import platform
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map_only

import flux
from flux import sampling
from flux.conditioning import Conditions
from flux.errors import NonFiniteError, UserError
from flux.image_io.request import ImageInputs, non_default_options, output_size
from flux.parity.capture_file import Capture, Kind, Writer, check_new, kind_of, readable, stored_as
from flux.parity.hooks import See, check_patterns, joined, matches, replaced, watching
from flux.pipeline import Pipeline
from flux.runtime.checks import Guidance, check_guidance, check_steps
from flux.runtime.lazy_module import LazyModule
from flux.text_encoder import TextFeatures
from flux.transformer import NUMERICS

__all__ = [
    "Capture",
    "Kind",
    "Plan",
    "Request",
    "Selection",
    "Writer",
    "capture",
    "plan",
    "run",
    "without_weights",
]


@dataclass(frozen=True)
class Request:
    """What to make: one picture, as `Pipeline.__call__` takes it."""

    prompt: str
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: Guidance | None = None
    seed: int = 0
    negative_prompt: str | None = None
    cfg_scale: Guidance | None = None
    pictures: ImageInputs | None = None


@dataclass(frozen=True)
class Selection:
    """What to record of it."""

    only: tuple[str, ...] = ()  # patterns, as in `taps.matches`; none: everything
    steps: tuple[int, ...] = ()  # counted from 1; none: every step
    keep: Kind = "full"
    limit: float = 10e9  # bytes

    def __contains__(self, name: str) -> bool:
        step = re.match(r"step\.(\d+)", name)
        return matches(name, self.only) and (
            not self.steps or step is None or int(step[1]) in self.steps
        )


def capture(
    pipe: Pipeline,
    request: Request,
    path: str | Path,
    selection: Selection = Selection(),
    tell: Callable[[str], None] = lambda text: None,
) -> Capture:
    """Make the picture, and record what is selected; `tell` hears the size in advance.

    Where latents or pixels stop being finite, what came before is kept, and the recipe says under "stopped" what happened.
    """
    path = Path(path)
    check_new(path)
    expected = plan(pipe, request, selection)
    free = shutil.disk_usage(path.parent).free
    if expected.bytes > min(free, selection.limit):
        most = (
            f"{readable(free)} are free on its disk"
            if free < selection.limit
            else f"--limit is {selection.limit / 1e9:g}"
        )
        raise UserError(
            f"{path} would hold up to {readable(expected.bytes)} in {expected.count:,} tensors, and {most}: choose with --only "
            "or --steps-of, or keep less with --keep probe"
        )
    tell(
        f"recording {expected.count:,} of {len(expected.names):,} tensors, up to {readable(expected.bytes)}"
    )
    recipe = describe(pipe, request)
    with Writer(path, recipe, selection.limit, reserve=800 * expected.count) as writer:

        def see(name: str, tensor: Tensor) -> None:
            if name == "schedule":
                recipe["schedule"] = tensor.tolist()
            if name in selection:
                writer.add(name, tensor, selection.keep)

        try:
            run(pipe, request, see)
        except NonFiniteError as error:
            recipe["stopped"] = str(error)
            tell(f"stopped, and what came before is kept: {error}")
    return Capture(path)


# ---------------------------------------------------------------- running


def run(pipe: Pipeline, request: Request, see: See) -> Image.Image:
    """The picture, which is the pipeline's to the bit; `see(name, tensor)` is called in the order of execution."""
    stages, r = _Stages(pipe, see), request
    with ExitStack() as stack:
        stages.show(stack, pipe, "condition", "sample", "decode")
        stages.show(stack, pipe.text, "encode_one")
        stack.enter_context(
            replaced(pipe, "tabulated", lambda _: False)
        )  # what a step is given is then seen in that step
        stack.enter_context(
            replaced(pipe.text, "cache", lambda cache: {})
        )  # or a prompt of before would not be encoded
        asked = (r.width, r.height, r.steps, r.guidance, r.seed, 1, r.negative_prompt, r.cfg_scale)
        (image,) = pipe(r.prompt, *asked, stages.after_step, r.pictures)
    see("picture", torch.from_numpy(np.array(image)))  # (H, W, 3) uint8
    return image


class _Stages:
    """In place of functions of the pipeline: each method takes the function and its arguments, calls it, and shows."""

    def __init__(self, pipe: Pipeline, see: See):
        self.pipe, self.see = pipe, see
        self.where, self.step, self.passes, self.prompts, self.pictures = "", 0, 0, 0, 0
        self.memories = False

    def show(self, stack: ExitStack, owner: object, *names: str) -> None:
        for name in names:
            method = getattr(self, name)
            stack.enter_context(
                replaced(owner, name, lambda original, method=method: partial(method, original))
            )

    def shown(self, name: str, tensor: Tensor) -> Tensor:
        self.see(name, tensor)
        return tensor

    def inside(self, name: str, tensor: Tensor) -> None:
        self.see(joined(self.where, name), tensor)

    def condition(self, original: Callable, *args) -> Conditions:
        encoder = self.pipe.image_encoder()

        def next_picture(encode: Callable, pixels: Tensor) -> Tensor:
            self.pictures += 1
            self.where = f"encoder.{self.pictures}"
            self.inside("pixels", pixels)
            return self.shown(f"{self.where}/latents", encode(pixels))

        with (
            watching({"": encoder}, self.inside),
            replaced(encoder, "encode", lambda f: partial(next_picture, f)),
        ):
            conditions = original(*args)
        for name in ("references", "reference_ids", "channels", "text", "init", "mask"):
            if (tensor := getattr(conditions, name)) is not None:
                recorded = "start" if name == "init" else name  # captures keep the older name
                self.see(f"conditions/{recorded}", tensor)
        self.memories = conditions.kv_cache and conditions.references is not None
        return conditions

    def encode_one(self, original: Callable, prompt: str) -> TextFeatures:
        """Of each prompt once: first the prompt, then the negative prompt."""
        self.where, self.prompts = "text/negative" if self.prompts else "text", self.prompts + 1
        parts = {part: getattr(self.pipe.text, part)() for part in self.pipe.spec.text.networks}
        with watching(parts, self.inside):
            features = original(prompt)
        self.inside("features", features.tokens)
        if features.pooled is not None:
            self.inside("pooled", features.pooled)
        return features

    def sample(self, original: Callable, *args) -> Tensor:
        transformer = self.pipe.transformer()
        self.ropes = iter(
            [*["references"] * self.memories, "", "negative"]
        )  # in the order in which they are made
        with ExitStack() as stack:
            stack.enter_context(watching({"": transformer}, self.inside))
            self.show(stack, sampling, "noise", "denoise")
            self.show(stack, transformer, "rope", "vec", "velocity")
            return original(*args)

    def noise(self, original: Callable, *args, **kwargs) -> Tensor:
        return self.shown("noise", original(*args, **kwargs))

    def rope(self, original: Callable, txt_ids: Tensor, img_ids: Tensor) -> Tensor:
        self.where = next(self.ropes)
        self.inside("ids/txt", txt_ids)
        self.inside("ids/img", img_ids)
        return self.shown(joined(self.where, "rope"), original(txt_ids, img_ids))

    def denoise(
        self, original: Callable, velocity: Callable, x: Tensor, times: Tensor, *args
    ) -> Tensor:
        def step(x: Tensor, t: float) -> Tensor:
            self.step, self.passes = self.step + 1, 0
            return self.shown(f"step.{self.step:03}/velocity", velocity(x, t))

        self.see("schedule", times)
        return original(step, x, times, *args)

    def vec(self, original: Callable, *args) -> Tensor:
        """The first thing that a pass computes: the prompt's, then the negative prompt's; of references, before step 1."""
        self.where = (
            f"step.{self.step:03}{'/negative' * self.passes}" if self.step else "references"
        )
        self.passes += 1
        return self.shown(f"{self.where}/vec", original(*args))

    def velocity(self, original: Callable, img: Tensor, *args) -> Tensor:
        self.inside("in", img)
        return self.shown(f"{self.where}/out", original(img, *args))

    def after_step(self, step: int, t: float, latents: Tensor) -> None:
        self.see(f"step.{step:03}/latents", latents)

    def decode(self, original: Callable, latents: Tensor) -> list[Image.Image]:
        autoencoder = self.pipe.autoencoder()

        def show(decode):
            return lambda latents: self.shown("pixels", decode(latents))

        with watching({"decoder": autoencoder}, self.see), replaced(autoencoder, "decode", show):
            return original(latents)


# ---------------------------------------------------------------- in advance


IN_PLACE = re.compile(
    r"coder\S*\.(conv1|conv2|conv_out)/in$|coder\S*\.block[._]\d/out$"
)  # SiLU, and the residual sum


@dataclass
class Plan:
    """What a run will record: all `names` there are, and of those that are selected their `count` and, at most, `bytes`."""

    names: list[str] = field(default_factory=list)
    count: int = 0
    bytes: int = 0


def plan(pipe: Pipeline, request: Request, selection: Selection = Selection()) -> Plan:
    """By the same run on networks without weights, in a second or so; UserError where patterns or steps are not in it."""
    out, seen = Plan(), {}

    def see(name: str, tensor: Tensor) -> None:
        out.names.append(name)
        if name not in selection:
            return
        out.count += 1
        kind = kind_of(tensor, selection.keep)
        # an output that is the next module's input is stored once, but where an autoencoder works in place
        if kind != "full" or id(tensor) not in seen or IN_PLACE.search(name):
            out.bytes += stored_as(tensor, kind)
            seen[id(tensor)] = tensor  # kept, so that no other gets its id

    with warnings.catch_warnings(action="ignore"):  # they come again in the run itself
        run(without_weights(pipe), request, see)
    check_patterns(selection.only, out.names)
    steps = sum(name.endswith("/velocity") for name in out.names)
    if wrong := [step for step in selection.steps if not 1 <= step <= steps]:
        raise UserError(f"--steps-of {wrong[0]}: there are {steps} steps, counted from 1")
    return out


def without_weights(pipe: Pipeline) -> Pipeline:
    """The same pipeline on the CPU, whose networks compute nothing but shapes, and answer zeros."""
    twin, twin.text = copy.copy(pipe), copy.copy(pipe.text)
    twin.device, twin.residency = torch.device("cpu"), copy.copy(pipe.residency)
    twin.residency.keep_loaded()
    for part in ("transformer", "autoencoder", "image_encoder"):
        setattr(twin, part, _hollow(getattr(pipe, part)))
    twin.redux_networks = tuple(map(_hollow, pipe.redux_networks))
    for part in pipe.spec.text.networks:
        setattr(twin.text, part, _hollow(getattr(pipe.text, part)))
    return twin


def _hollow(network: LazyModule) -> LazyModule:
    """Its module on the meta device; what the pipeline calls of it takes real tensors, and gives real ones, of zeros."""
    twin = copy.copy(network)
    twin.device, twin.module = (
        torch.device("cpu"),
        network.meta_module().to(network.dtype).eval().requires_grad_(False),
    )
    to_meta = partial(tree_map_only, Tensor, lambda x: x.to("meta"))
    to_zeros = partial(tree_map_only, Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype))
    for name in ("forward", "vec", "modulations", "denoise", "encode", "decode"):
        if method := getattr(twin.module, name, None):
            setattr(
                twin.module, name, lambda *args, method=method: to_zeros(method(*to_meta(args)))
            )
    return twin


# ---------------------------------------------------------------- the recipe


def describe(pipe: Pipeline, request: Request) -> dict:
    """Everything that decides the tensors, and what they were computed with."""
    r, spec = request, pipe.spec
    width, height = output_size(spec, r.pictures, r.width, r.height)
    steps = check_steps(spec, r.steps)
    files = {
        part: [_file(path) for path in paths]
        for part, paths in pipe.files.items()
        if isinstance(paths, list)
    }
    kernels = ("flash", "mem_efficient", "math", "cudnn")
    return dict(
        model=spec.name,
        mode=spec.image_mode if r.pictures else "text",
        prompt=r.prompt,
        negative_prompt=r.negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance=check_guidance(spec, r.guidance, steps),
        cfg_scale=r.cfg_scale,
        seed=r.seed,
        pictures=r.pictures and _pictures(r.pictures),
        dtype=str(pipe.dtype).removeprefix("torch."),
        numerics=next(
            (name for name, preset in NUMERICS.items() if preset == pipe.numerics),
            str(pipe.numerics),
        ),
        device=pipe.device.type,
        threads=torch.get_num_threads(),
        attention=[
            kernel for kernel in kernels if getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")()
        ],
        versions=dict(
            flux=flux.__version__, torch=torch.__version__, python=platform.python_version()
        ),
        files=files,
        loras=[_file(path) | {"scale": scale} for path, (_, scale) in pipe.loras.items()],
    )


def _file(path: Path) -> dict:
    real = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", real.name):  # the Hugging Face cache names files by their hash
        return {"file": path.name, "size": real.stat().st_size, "sha256": real.name}
    with real.open("rb") as file:
        return {
            "file": path.name,
            "size": real.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _pictures(pictures: ImageInputs) -> dict:
    """Hashes of the pixels, and the options that are not left at their defaults."""
    images = {"images": pictures.images, "mask": (pictures.mask,) if pictures.mask else ()}
    hashes = {
        key: [hashlib.sha256(image.tobytes()).hexdigest() for image in some]
        for key, some in images.items()
    }
    return {option: getattr(pictures, option) for option in non_default_options(pictures)} | hashes

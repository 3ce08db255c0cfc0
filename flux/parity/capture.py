"""Run the pipeline and record its tensors, by name, in one file.

    text/t5/encoder.block.0/out  text/features  text/pooled   negative prompt: text/negative/...
    encoder.1/encoder.conv_in/out  conditions/references      of input images
    noise  ids/txt  ids/img  rope  schedule                   negative prompt: negative/rope
    step.001/in  step.001/vec  step.001/double_blocks.0/in.0 ...  step.001/out
    step.001/negative/in ...                                  the negative prompt's pass
    step.001/velocity  step.001/latents                       after guidance; after the step
    decoder/decoder.conv_in/out ...  pixels  image

FLUX 3 differs between the noise and the velocity: `capture3`.

For the time of a run, functions of the pipeline are replaced by wrappers that show their tensors to
an observer; the image stays the same to the bit. The same run on networks without weights tells in
advance what will be recorded.
"""

import copy
import hashlib
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import flux
from flux import sampling
from flux.conditioning import Conditions
from flux.errors import NonFiniteError, UserError
from flux.hooks import Observer, check_patterns, joined, matches, replaced, watching
from flux.image_io.request import ImageInputs, non_default_options, output_size
from flux.parity.capture3 import Passes
from flux.parity.capture_file import Capture, Kind, Writer, check_new, kind_of, readable, stored_as
from flux.pipeline import Pipeline
from flux.runtime.checks import Guidance, check_guidance, check_steps
from flux.runtime.lazy_module import LazyModule
from flux.text_encoder import TextFeatures
from flux.transformer import NUMERICS, Flux, KVCache

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
    """One image, requested with arguments of `Pipeline.__call__`."""

    prompt: str
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: Guidance | None = None
    seed: int = 0
    negative_prompt: str | None = None
    true_cfg_scale: Guidance | None = None
    images: ImageInputs | None = None


@dataclass(frozen=True)
class Selection:
    """The tensors to record."""

    only: tuple[str, ...] = ()  # patterns of `hooks.matches`; none: every tensor
    at_steps: tuple[int, ...] = ()  # counted from 1; none: every step
    store: Kind = "full"
    limit: float = 10e9  # bytes

    def __contains__(self, name: str) -> bool:
        step = re.match(r"step\.(\d+)", name)
        in_steps = not self.at_steps or step is None or int(step[1]) in self.at_steps
        return in_steps and matches(name, self.only)


def no_report(text: str) -> None:
    """Ignore a message."""


def capture(
    pipe: Pipeline,
    request: Request,
    path: str | Path,
    selection: Selection = Selection(),
    report: Callable[[str], None] = no_report,
) -> Capture:
    """Make the image and record the selected tensors. `report` is called with the size in advance.

    Where latents or pixels stop being finite, the tensors before are kept, and the recipe has the
    message under "stopped".
    """
    path = Path(path)
    check_new(path)
    expected = plan(pipe, request, selection)
    free = shutil.disk_usage(path.parent).free
    if expected.bytes > min(free, selection.limit):
        limit = f"`limit` is {selection.limit / 1e9:g} GB"
        if free < selection.limit:
            limit = f"{readable(free)} are free on its disk"
        raise UserError(
            f"{path}: would hold up to {readable(expected.bytes)} in {expected.count:,} tensors, "
            f'and {limit}. Select tensors with `only` or `at_steps`, or pass `store="probe"`.'
        )
    report(
        f"recording {expected.count:,} of {len(expected.names):,} tensors, "
        f"up to {readable(expected.bytes)}"
    )
    recipe = describe(pipe, request)
    with Writer(path, recipe, selection.limit, reserve=800 * expected.count) as writer:

        def observer(name: str, tensor: Tensor) -> None:
            if name == "schedule":
                recipe["schedule"] = tensor.tolist()
            if name in selection:
                writer.add(name, tensor, selection.store)

        try:
            run(pipe, request, observer)
        except NonFiniteError as error:
            recipe["stopped"] = str(error)
            report(f"stopped; the tensors before are kept: {error}")
    return Capture(path)


# ---------------------------------------------------------------- run


def run(pipe: Pipeline, request: Request, observer: Observer) -> Image.Image:
    """Return the pipeline's image; call `observer(name, tensor)` in the order of execution."""
    stages, r = _Stages(pipe, observer), request
    with ExitStack() as stack:
        for owner, name, method in (
            (pipe, "_condition", stages.condition),
            (pipe, "sample", stages.sample),
            (pipe, "_decode_all", stages.decode),
            (pipe.text, "encode_one", stages.encode_one),
        ):
            stack.enter_context(wrapped(owner, name, method))
        # without this, a prompt of an earlier call is not encoded again
        stack.enter_context(replaced(pipe.text, "cache", lambda cache: {}))
        (image,) = pipe(
            r.prompt,
            width=r.width,
            height=r.height,
            steps=r.steps,
            guidance=r.guidance,
            seed=r.seed,
            negative_prompt=r.negative_prompt,
            true_cfg_scale=r.true_cfg_scale,
            callback=stages.after_step,
            images=r.images,
        )
    observer("image", torch.from_numpy(np.array(image)))  # (H, W, 3) uint8
    return image


def wrapped(owner: object, name: str, wrapper: Callable):
    """Replace a function inside of a `with` block: `wrapper` gets it, then its arguments."""
    return replaced(owner, name, lambda original: partial(wrapper, original))


class _DeferredVec(NamedTuple):
    """A later call of `Flux.vec`.

    The pipeline computes all steps' modulations before the first step. A capture computes them in
    their own step, so that their tensors get that step's name.
    """

    compute: Callable[[], Tensor]


class _Stages:
    """Wrappers of the pipeline's functions. Each calls the function and observes its tensors."""

    def __init__(self, pipe: Pipeline, observer: Observer):
        self.pipe, self.observer = pipe, observer
        self.where = ""  # the first part of the present names
        self.step, self.passes, self.prompts, self.images = 0, 0, 0, 0
        self.ropes: Iterator[str] = iter(())
        self.references = self.kv_cache = False
        self.compute_modulations: Callable = list

    def observe(self, name: str, tensor: Tensor) -> Tensor:
        self.observer(name, tensor)
        return tensor

    def inside(self, name: str, tensor: Tensor) -> Tensor:
        return self.observe(joined(self.where, name), tensor)

    def condition(self, original: Callable, *args) -> Conditions:
        encoder = self.pipe.image_encoder()

        def encode(original: Callable, pixels: Tensor) -> Tensor:
            self.images += 1
            self.where = f"encoder.{self.images}"
            self.inside("pixels", pixels)
            return self.observe(f"{self.where}/latents", original(pixels))

        with watching({"": encoder}, self.inside), wrapped(encoder, "encode", encode):
            conditions = original(*args)
        for name in ("references", "reference_ids", "channels", "text", "init", "mask"):
            if (tensor := getattr(conditions, name)) is not None:
                self.observe(f"conditions/{name}", tensor)
        self.references = conditions.references is not None
        self.kv_cache = conditions.kv_cache and self.references
        return conditions

    def encode_one(self, original: Callable, prompt: str) -> TextFeatures:
        """Called once for each prompt: first the prompt, then the negative prompt."""
        self.where = "text/negative" if self.prompts else "text"
        self.prompts += 1
        parts = {part: getattr(self.pipe.text, part)() for part in self.pipe.spec.text.networks}
        with watching(parts, self.inside):
            features = original(prompt)
        self.inside("features", features.tokens)
        if features.pooled is not None:
            self.inside("pooled", features.pooled)
        return features

    def sample(self, original: Callable, *args, **kwargs) -> Tensor:
        transformer = self.pipe.transformer()
        # the pipeline makes tables in this order
        self.ropes = iter([*(["references"] if self.kv_cache else []), "", "negative"])
        inside, own = self.inside, self.wrappers(transformer)
        if self.pipe.spec.flux3:
            passes = Passes(self.pipe, self.observer, self.references)
            inside, own = passes.inside, passes.wrappers(transformer)
        with ExitStack() as stack:
            stack.enter_context(watching({"": transformer}, inside))
            for owner, name, method in (
                (sampling, "noise", self.noise),
                (sampling, "denoise", self.loop),
                *own,
            ):
                stack.enter_context(wrapped(owner, name, method))
            return original(*args, **kwargs)

    def wrappers(self, transformer: Flux) -> Iterable[tuple[object, str, Callable]]:
        return (
            (transformer, "rope", self.rope),
            (transformer, "vec", self.vec),
            (transformer, "modulations", self.modulations),
            (transformer, "denoise", self.transformer_pass),
            (self.pipe.transformer, "drop_submodules", self.drop_submodules),
        )

    def noise(self, original: Callable, *args, **kwargs) -> Tensor:
        return self.observe("noise", original(*args, **kwargs))

    def rope(self, original: Callable, txt_ids: Tensor, img_ids: Tensor) -> Tensor:
        self.where = next(self.ropes)
        self.inside("ids/txt", txt_ids)
        self.inside("ids/img", img_ids)
        return self.inside("rope", original(txt_ids, img_ids))

    def vec(self, original: Callable, *args) -> _DeferredVec:
        return _DeferredVec(partial(original, *args))

    def modulations(self, original: Callable, vecs: list[_DeferredVec]) -> list[_DeferredVec]:
        self.compute_modulations = original
        return vecs

    def drop_submodules(self, original: Callable, kind: type) -> torch.nn.Module:
        return self.pipe.transformer()  # the modulations run in every step here

    def transformer_pass(
        self,
        original: Callable,
        img: Tensor,
        txt: Tensor,
        rope: Tensor,
        deferred: _DeferredVec,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """Called for the references (before step 1), the prompt, then the negative prompt."""
        self.where = "references"
        if self.step:
            self.where = joined(f"step.{self.step:03}", "negative" if self.passes else "")
        self.passes += 1
        vec = self.inside("vec", deferred.compute())
        mods = self.compute_modulations([vec])[0]
        if self.step:
            self.inside("in", img)
            return self.inside("out", original(img, txt, rope, mods, caches))
        for number, tensor in enumerate((img, rope, vec)):
            self.inside(f"in.{number}", tensor)
        out = original(img, txt, rope, mods, caches)
        cached = [tensor for cache in caches or () for tensor in (cache.k, cache.v)]
        for number, k_or_v in enumerate(cached):
            if k_or_v is not None:
                self.inside(f"out.{number}", k_or_v)
        return out

    def loop(
        self, original: Callable, velocity: Callable, x: Tensor, times: Tensor, *args
    ) -> Tensor:
        def step(x: Tensor, t: float) -> Tensor:
            self.step, self.passes = self.step + 1, 0
            return self.observe(f"step.{self.step:03}/velocity", velocity(x, t))

        self.observe("schedule", times)
        return original(step, x, times, *args)

    def after_step(self, step: int, t: float, latents: Tensor) -> None:
        self.observe(f"step.{step:03}/latents", latents)

    def decode(self, original: Callable, latents: Tensor) -> list[Image.Image]:
        autoencoder = self.pipe.autoencoder()

        def decode(original: Callable, latents: Tensor) -> Tensor:
            return self.observe("pixels", original(latents))

        with (
            watching({"decoder": autoencoder}, self.observer),
            wrapped(autoencoder, "decode", decode),
        ):
            return original(latents)


# ---------------------------------------------------------------- in advance


@dataclass
class Plan:
    """All names of a run; of the selected tensors, their number and a bound of their bytes."""

    names: list[str] = field(default_factory=list)
    count: int = 0
    bytes: int = 0


def plan(pipe: Pipeline, request: Request, selection: Selection = Selection()) -> Plan:
    """Run without weights, in about a second. UserError if patterns or steps match nothing."""
    out = Plan()
    seen: dict[int, Tensor] = {}  # keeps the tensors, so that no other gets the same id

    def observer(name: str, tensor: Tensor) -> None:
        out.names.append(name)
        if name not in selection:
            return
        out.count += 1
        kind = kind_of(tensor, selection.store)
        # an output that is the next module's input is stored once
        if kind != "full" or id(tensor) not in seen:
            out.bytes += stored_as(tensor, kind)
            seen[id(tensor)] = tensor

    with warnings.catch_warnings(action="ignore"):  # the run itself warns
        run(without_weights(pipe), request, observer)
    check_patterns(selection.only, out.names)
    steps = sum(name.endswith("/velocity") for name in out.names)
    for step in selection.at_steps:
        if not 1 <= step <= steps:
            raise UserError(f"at_steps: there are {steps} steps, counted from 1 (got {step}).")
    return out


def without_weights(pipe: Pipeline) -> Pipeline:
    """Return the pipeline on the CPU with networks that compute shapes alone and return zeros."""
    twin, twin.text = copy.copy(pipe), copy.copy(pipe.text)
    twin.device, twin.residency = torch.device("cpu"), copy.copy(pipe.residency)
    twin.residency.keep_loaded()
    for part in ("transformer", "autoencoder", "image_encoder"):
        setattr(twin, part, _without_weights(getattr(pipe, part)))
    twin.redux_networks = tuple(map(_without_weights, pipe.redux_networks))
    for part in pipe.spec.text.networks:
        setattr(twin.text, part, _without_weights(getattr(pipe.text, part)))
    return twin


def _without_weights(network: LazyModule) -> LazyModule:
    """Put the module on the meta device. Its methods take real tensors and return zeros."""
    twin = copy.copy(network)
    twin.device = torch.device("cpu")
    twin.module = network.meta_module().to(network.dtype).eval().requires_grad_(False)

    def on_meta(method: Callable, *args):
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(args)):
            return method(*args)  # called by another method
        out = method(*tree_map_only(Tensor, lambda x: x.to("meta"), args))
        return tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), out)

    for name in ("forward", "vec", "modulations", "stream", "denoise", "encode", "decode"):
        if method := getattr(twin.module, name, None):
            setattr(twin.module, name, partial(on_meta, method))
    return twin


# ---------------------------------------------------------------- the recipe


def describe(pipe: Pipeline, request: Request) -> dict:
    """Return everything that decides the tensors, and what they were computed with."""
    r, spec = request, pipe.spec
    width, height = output_size(spec, r.images, r.width, r.height)
    steps = check_steps(spec, r.steps)
    presets = [name for name, preset in NUMERICS.items() if preset == pipe.numerics]
    files = {}
    for part, paths in pipe.files.items():
        if isinstance(paths, list):
            files[part] = [_file(path) for path in paths]
    kernels = ("flash", "mem_efficient", "math", "cudnn")
    return dict(
        model=spec.name,
        mode=spec.image_mode if r.images else "text",
        prompt=r.prompt,
        negative_prompt=r.negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance=check_guidance(spec, r.guidance, steps),
        true_cfg_scale=r.true_cfg_scale,
        seed=r.seed,
        images=r.images and _images(r.images),
        dtype=str(pipe.dtype).removeprefix("torch."),
        numerics=presets[0] if presets else str(pipe.numerics),
        device=pipe.device.type,
        threads=torch.get_num_threads(),
        attention=[k for k in kernels if getattr(torch.backends.cuda, f"{k}_sdp_enabled")()],
        versions=dict(
            flux=flux.__version__, torch=torch.__version__, python=platform.python_version()
        ),
        files=files,
        loras=[_file(path) | {"scale": scale} for path, (_, scale) in pipe.loras.items()],
    )


def _file(path: Path) -> dict:
    real = path.resolve()
    size = real.stat().st_size
    with real.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "size": size, "sha256": digest}


def _images(inputs: ImageInputs) -> dict:
    """Return the options that differ from their defaults, and hashes of the pixels."""
    out = {option: getattr(inputs, option) for option in non_default_options(inputs)}
    out["images"] = [_pixels_hash(image) for image in inputs.images]
    out["mask"] = [] if inputs.mask is None else [_pixels_hash(inputs.mask)]
    return out


def _pixels_hash(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()

"""From a prompt to an image: the steps in order.

    prompt -> text features -> noise -> velocity, step by step -> latents -> image

`Pipeline.encode`, `condition`, `sample` and `decode` are the stages; a call runs all of them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux import arguments, conditioning, progress, sampling, solvers, text_encoder
from flux.argument_names import explain_other_attribute, explain_other_names
from flux.autoencoder import AutoEncoder
from flux.conditioning import Conditions
from flux.configs import ModelSpec
from flux.errors import UserError
from flux.generation import Generation
from flux.hooks import Tap, watching_network
from flux.image_io import request
from flux.image_io.input import ImageLike, as_image, round_to_16
from flux.image_io.output import RecordedImage, to_images, to_pixels
from flux.image_io.record import describe_call
from flux.image_io.request import ImageInputs
from flux.lora.manager import LoraManager
from flux.runtime.activation_memory import Workload
from flux.runtime.checks import (
    Guidance,
    check_cfg,
    check_features,
    check_guidance,
    check_range,
    check_seeds,
    check_size,
    check_solver,
    check_steps,
    check_times,
    check_true_cfg_scale,
)
from flux.runtime.devices import no_tf32
from flux.runtime.fast import runs_fast
from flux.runtime.lazy_module import LazyModule
from flux.runtime.memory_plan import MemoryPlan
from flux.runtime.options import RuntimeOptions
from flux.runtime.residency import Residency
from flux.runtime.tiling import decode_tiled
from flux.siglip import preprocess_for_siglip
from flux.solvers import Solver
from flux.text_encoder import FLUX1TextEncoder, FLUX2TextEncoder, TextEncoder, TextFeatures
from flux.transformer import Numerics
from flux.velocity import Now, ResidualsFn, Velocity
from flux.velocity3 import Velocity3

if TYPE_CHECKING:  # imported when used
    from flux.safety.filters import Filters
    from flux.safety.provenance import Provenance

Callback = Callable[[int, float, Tensor], None]  # step from 1, its new time, latents (B, C, h, w)

MAX_AHEAD = 256  # prompts that are encoded before the first image: some seconds
USUAL_TOKENS = 240  # of FLUX 3, whose prompts have any length, before one is known


class Networks(NamedTuple):
    """The networks of a model. A LazyModule loads its module when it is called."""

    text: TextEncoder
    transformer: LazyModule[Any]  # Flux or Flux3
    autoencoder: LazyModule[AutoEncoder]  # for decoding, in its dtype
    image_encoder: LazyModule[AutoEncoder]  # the same in float32, for input images
    redux: tuple[LazyModule[Any], ...] = ()  # SigLIP and the projection of FLUX.1 Redux


class Pipeline:
    """Makes images: `pipe(prompts)`. Its stages also run alone."""

    def __init__(
        self,
        spec: ModelSpec,
        networks: Networks,
        files: dict,
        device: torch.device,
        dtype: torch.dtype,
        numerics: Numerics,
        options: RuntimeOptions,
    ):
        self.spec, self.files, self.options = spec, files, options
        self.device, self.dtype, self.numerics = device, dtype, numerics
        self.text, self.transformer = networks.text, networks.transformer
        self.autoencoder, self.image_encoder = networks.autoencoder, networks.image_encoder
        self.redux_networks = networks.redux
        self.now = Now()
        self.replaced: dict[str, Path] = {}  # the user's files in place of the model's, by part
        self.filters: Filters | None = None  # judge what goes in and comes out, if set
        self.provenance: Provenance | None = None  # marks and signs the images of calls, if set
        self.residency = Residency(
            spec,
            device,
            options,
            text=self.text.networks,
            transformer=self.transformer,
            autoencoder=self.autoencoder,
            encoders=(self.image_encoder, *self.redux_networks),
        )
        changeable: dict[str, LazyModule] = {"transformer": self.transformer}
        if isinstance(self.text, FLUX1TextEncoder):
            changeable |= {"t5": self.text.t5, "clip": self.text.clip}
        elif isinstance(self.text, FLUX2TextEncoder):
            changeable["language_model"] = self.text.model
        # of the longest prompt so far, padding included
        self.text_tokens = USUAL_TOKENS if spec.flux3 else self.text.length
        self._loras = LoraManager(
            spec, files.get("lora", ()), changeable, changed=self.text.cache.clear
        )

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<flux.Pipeline of {self.spec.name}, on {self.device} in {dtype}>"

    if not TYPE_CHECKING:  # a checker knows the attributes

        def __getattr__(self, name: str):
            raise AttributeError(explain_other_attribute(name))

    # ---------------------------------------------------------------- all stages

    @explain_other_names
    def __call__(
        self,
        prompts: str | Sequence[str],
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        num_images: int = 1,
        negative_prompt: str | None = None,
        true_cfg_scale: Guidance | None = None,
        callback: Callback | None = None,
        images: ImageInputs | Sequence[ImageInputs] | ImageLike | Conditions | None = None,
        solver: str | Solver = "euler",
        sigmas: Sequence[float] | None = None,
        shift: float | None = None,
    ) -> list[Image.Image]:
        """Return `num_images` images of each prompt. None stands for the model's default.

        Image k has seed + k. Alone, it has the same noise, but matrix products may sum in another
        order: seen were differences of 1 level in at most 1e-4 of the values in float32, and of
        12 levels in bfloat16. Threads have the same effect.
        guidance: the scale that the model was trained with, or uses with classifier-free guidance.
        true_cfg_scale: adds classifier-free guidance, against `negative_prompt`, to other models.
        Both may be a list: one value for each step, or two values with a straight line between.
        RefusedError if `filters` refuse a prompt, an input image or a result.
        images: input images for all prompts, or a list with the input images of each prompt.
        solver, sigmas, shift: see `sample`.
        Numbers may be of numpy or torch, or texts that spell one.
        """
        call = self.prepare(
            prompts,
            width,
            height,
            steps,
            guidance,
            seed,
            num_images,
            negative_prompt,
            true_cfg_scale,
            images,
            solver,
            sigmas,
            shift,
        )
        results: dict[int, RecordedImage] = {}
        for numbers in call.batches:
            latents = call.sample(numbers, callback)
            results |= zip(numbers, call.decode(numbers, latents), strict=True)
        count = len(call.seeds)
        return [*call.release(range(count), [results[number] for number in range(count)])]

    def prepare(
        self,
        prompts: str | Sequence[str],
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        negative_prompt: str | None = None,
        true_cfg_scale: Guidance | None = None,
        images: ImageInputs | Sequence[ImageInputs] | ImageLike | Conditions | None = None,
        solver: str | Solver = "euler",
        sigmas: Sequence[float] | None = None,
        shift: float | None = None,
    ) -> Generation:
        """Check a call, encode its prompts and images, and plan its memory.

        The arguments are those of a call. `seed` may also be a list, with a seed for each image.
        """
        prompts = arguments.to_texts("prompts", prompts)
        width = arguments.optional(arguments.to_integer, "width", width)
        height = arguments.optional(arguments.to_integer, "height", height)
        steps, sigmas, shift = check_times(self.spec, steps, sigmas, shift)
        num_images = arguments.to_integer("num_images", num_images)
        negative_prompt = arguments.optional(arguments.to_text, "negative_prompt", negative_prompt)
        seeds = check_seeds(seed, len(prompts) * num_images)
        use_cfg = check_cfg(
            self.spec, guidance, negative_prompt, true_cfg_scale, check_steps(self.spec, steps)
        )
        check_solver(self.spec, solver, self.numerics.state)
        self._judge(prompts, negative_prompt)
        conditions = self._conditions(images, len(prompts), width, height)  # one for each prompt
        if conditions[0] is not None and not isinstance(images, Conditions):
            width = height = None  # the conditions know their size
        size = self.spec.size
        sizes = [(c.width, c.height) if c else (width or size, height or size) for c in conditions]
        if self.provenance is not None:
            self.provenance.check_sizes(sizes)
        largest = max(conditions, key=lambda c: c.width * c.height if c else 0)
        blank = [negative_prompt or ""] if use_cfg else []
        self.text_tokens = self.text.padded_length([*prompts, *blank])
        self.plan_memory(width, height, steps, len(seeds), largest)

        listed: Any = images
        if not isinstance(images, Sequence) or isinstance(images, str):
            listed = [images] * len(prompts)
        records = [
            describe_call(
                self,
                listed[row],
                *sizes[row],
                check_steps(self.spec, steps),
                check_guidance(self.spec, guidance, check_steps(self.spec, steps)),
                negative_prompt=negative_prompt,
                true_cfg_scale=true_cfg_scale,
                solver=solver,
                sigmas=sigmas,
                shift=shift,
            )
            for row in range(len(prompts))
        ]
        features = [self.text.features(prompt) for prompt in prompts]
        negative = self.text.features(blank[0]) if blank else None
        self.residency.done(*self.text.networks)
        settings = dict(
            width=width,
            height=height,
            steps=steps,
            guidance=guidance,
            negative=negative,
            true_cfg_scale=true_cfg_scale,
            solver=solver,
            sigmas=sigmas,
            shift=shift,
        )
        return Generation(self, prompts, seeds, features, conditions, listed, records, settings)

    # ---------------------------------------------------------------- prompt -> text features

    def encode(self, prompts: str | Sequence[str]) -> TextFeatures:
        """Return the text features of prompts. Those of the last prompts are kept for later calls.

        Up to 1 GiB are kept (`flux.text_encoder.MAX_CACHE`).
        """
        prompts = arguments.to_texts("prompts", prompts)
        if not prompts:
            raise UserError("prompts: empty. Pass at least one prompt.")
        self._judge(prompts)
        self._plan_text(prompts)
        features = self.text.encode(prompts)
        self.residency.done(*self.text.networks)
        return features

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encode prompts for later calls, which then need not load the text encoder.

        What is kept has a bound: pass at most `prompts_ahead` prompts, and one negative prompt.
        """
        prompts = arguments.to_texts("prompts", prompts)
        self._judge(prompts)
        self._plan_text(prompts)
        for prompt in progress.counted(prompts, "encoding", "prompts"):
            self.text.features(prompt)
        self.residency.done(*self.text.networks)

    def _judge(self, prompts: Sequence[str], negative_prompt: str | None = None) -> None:
        """Raise RefusedError if the filters refuse a prompt."""
        if self.filters is not None:
            self.filters.check_texts(prompts)
            self.filters.check_texts([negative_prompt], "negative_prompt")

    def _plan_text(self, prompts: Sequence[str]) -> None:
        """Plan memory for the prompts, unless the present plan is enough."""
        self.text_tokens = max(self.text_tokens, self.text.padded_length(prompts))
        planned = self.residency.planned
        if planned is None or (planned.text_tokens or 0) < self.text_tokens:
            self.plan_memory()

    @property
    def prompts_ahead(self) -> int:
        """Prompts to encode at a time for calls one by one: few enough for the cache."""
        return max(1, min(MAX_AHEAD, text_encoder.MAX_CACHE // self.feature_bytes - 1))

    @property
    def feature_bytes(self) -> int:
        """Bytes of one prompt's features; FLUX 3: of the longest prompt so far."""
        width = self.text_tokens * self.spec.transformer.context_dim
        return (width + (self.spec.pooled_dim or 0)) * self.text.dtype.itemsize

    # ---------------------------------------------------------------- input images -> conditions

    def condition(
        self, images: ImageInputs | ImageLike, width: int | None = None, height: int | None = None
    ) -> Conditions:
        """Return what `sample` reads of input images, with the size of the image to make."""
        images = request.convert_values(images)
        self._judge_images([images])
        return self._condition(images, width, height)

    @torch.no_grad()
    def _condition(self, images: ImageInputs, width: int | None, height: int | None) -> Conditions:
        width = arguments.optional(arguments.to_integer, "width", width)
        height = arguments.optional(arguments.to_integer, "height", height)
        request.check_images(self.spec, images)
        crop = request.crop_box(self.spec, images) if width is height is None else None
        width, height = request.output_size(self.spec, images, width, height)
        check_size(height, width)
        largest = max(image.width * image.height for image in images.images)
        self.plan_memory(width, height, encoded_pixels=min(max(width * height, largest), 2024**2))
        conditions = conditioning.condition(
            self.spec,
            images,
            width,
            height,
            self._encode_image,
            self._embed_image,
            bfl_levels=self.numerics.images == "bfl",
        )
        self.residency.done(self.image_encoder, *self.redux_networks)
        return replace(conditions, crop=crop)

    def judge_image(self, image: Image.Image) -> None:
        """Raise RefusedError if the filters refuse an image."""
        if self.filters is not None:
            self.filters.check_images([image])

    def _judge_images(self, inputs: Sequence[ImageInputs]) -> None:
        """Raise RefusedError if the filters refuse an image or a mask."""
        for images in inputs if self.filters is not None else ():
            self.filters.check_images(images.images, images.mask)  # type: ignore[union-attr]

    def _encode_image(self, pixels: Tensor) -> Tensor:
        """(1, 3, H, W) -> latents (1, C, H/16, W/16), float32."""
        with no_tf32():
            return self.image_encoder().encode(pixels.to(self.device)).cpu()

    def _embed_image(self, image: Image.Image) -> Tensor:
        """Return an image as text tokens, (1, 729, D), by FLUX.1 Redux."""
        siglip, redux = (network() for network in self.redux_networks)
        pixels = preprocess_for_siglip(image, siglip.config.image_size).to(self.device, self.dtype)
        return redux(siglip(pixels)).float().cpu()

    def _conditions(
        self, images, count: int, width: int | None, height: int | None
    ) -> list[Conditions | None]:
        """Return one Conditions for each of `count` prompts."""
        if images is None or isinstance(images, Conditions):
            return [images] * count
        if isinstance(images, ImageInputs | str) or not isinstance(images, Sequence):
            return [self.condition(images, width, height)] * count
        if not all(isinstance(inputs, ImageInputs) for inputs in images):
            raise UserError(
                "images: not an ImageInputs. Pass `images=flux.ImageInputs((image, ...))`, or a "
                "list with one for each prompt."
            )
        if len(images) != count:
            raise UserError(
                f"images: one ImageInputs for each prompt is needed (got {len(images)} for {count} "
                "prompts)."
            )
        converted = [request.convert_values(inputs) for inputs in images]
        self._judge_images(converted)  # all, before anything loads
        return [self._condition(inputs, width, height) for inputs in converted]

    # ---------------------------------------------------------------- noise -> latents

    def sample(
        self,
        features: TextFeatures,
        seeds: Sequence[int],
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: Guidance | None = None,
        negative: TextFeatures | None = None,
        true_cfg_scale: Guidance | None = None,
        callback: Callback | None = None,
        conditions: Conditions | None = None,
        solver: str | Solver = "euler",
        sigmas: Sequence[float] | None = None,
        shift: float | None = None,
        residuals: ResidualsFn | None = None,
        gradients: bool = False,
    ) -> Tensor:
        """Return latents (B, C, height/16, width/16), float32, of B prompts and B seeds.

        The features of one prompt, or of one negative prompt, serve all seeds; the latents equal
        those of repeated features to the bit. UserError for another number of prompts.
        solver: a name of `flux.solvers.SOLVERS`, or a function of its kind, of tokens (B, L, C).
        sigmas: the times from 1 to 0 (which may be left out) instead of the model's.
        shift: moves even times, or `sigmas`, by t -> shift t / (1 + (shift - 1) t).
        residuals: what is added after each block; called with the arguments of `Flux.forward`.
        gradients: let autograd record the run, if the caller does; blocks cannot be streamed then.
        """
        seeds = arguments.to_integers("seeds", seeds)
        for seed in seeds:
            check_range("seeds", seed, 0, 2**63 - 1)
        if not (callback is None or callable(callback)):
            raise UserError(f"callback: must be a function (got {arguments.shown(callback)}).")
        spec, conditions = self.spec, conditioning.checked(self.spec, conditions, width, height)
        check_features(spec, "features", features, len(seeds))
        if negative is not None:
            check_features(spec, "negative", negative, len(seeds))
        h, w = conditions.height // 16, conditions.width // 16
        steps, sigmas, shift = check_times(spec, steps, sigmas, shift)
        steps = check_steps(spec, steps)
        solve, on_schedule = check_solver(spec, solver, self.numerics.state)
        scales, inputs = self._guidance(guidance, true_cfg_scale, steps)
        if spec.flux3:
            self._check_flux3(features, negative, residuals)
        if not self.residency.covers(self._workload(conditions, steps, len(seeds))):
            self.plan_memory(conditions.width, conditions.height, steps, len(seeds), conditions)

        if sigmas is None and shift is None:
            times = sampling.schedule(spec.schedule, steps, h * w, self.numerics.schedule)
        else:
            times = sampling.custom_schedule(steps, sigmas, shift)
        strength = request.start_strength(conditions.strength, steps, self.numerics.images)
        times = sampling.truncate_by_strength(times, strength, self.numerics.images)
        run = len(times) - 1  # steps that are run
        scales, inputs = scales[-run:], inputs and inputs[-run:]

        def to_grid(x: Tensor) -> Tensor:
            return rearrange(x, "b (h w) c -> b c h w", h=h)

        def after_step(step: int, t: float, x: Tensor) -> None:
            if callback is not None:
                callback(step, t, to_grid(x))
            progress.tell("sampling", step, run, "steps")
            self.now.step = step + 1

        with self._autograd(gradients):
            if negative is None and max(scales) > 1:
                negative = self.encode([""])
            if conditions.text is not None:  # text tokens that images became
                features = features.append(conditions.text)
            channels = spec.autoencoder.latent_channels
            tokens = spec.flux3 and self.numerics.noise == "tokens"
            noise = sampling.noise(seeds, channels, h, w, spatial=spec.flux1, tokens=tokens)
            if spec.flux3:  # as Black Forest Labs' code and diffusers do
                noise = noise.to(self.dtype).float()
            x, blend = conditioning.initial_latents(  # (B, L, C)
                noise, times[0].item(), conditions, self.device, contiguous=spec.flux1
            )
            velocity = self._velocity(
                features,
                negative,
                conditions,
                len(x),
                times.tolist(),
                scales,
                inputs,
                residuals=residuals,
                drop_modulation=on_schedule and not self.residency.keeps(self.transformer),
            )

            def denoised(x: Tensor, t: float, v: Tensor) -> Tensor:
                x = x.float() - t * v.float()
                return to_grid(blend(x, 0.0) if blend else x)

            def observed(x: Tensor, t: float) -> Tensor:
                v = velocity(x, t)
                self.now.denoised = partial(denoised, x.detach(), t, v.detach())
                return v

            if solve is solvers.dpmpp_2m_sde:
                again = solvers.StepNoise(seeds, channels, h, w, spatial=spec.flux1)
                solve = partial(solve, noise=again)
            self.now.step = 1
            try:
                if solve is None:
                    x = sampling.denoise(observed, x, times, after_step, self.numerics.state, blend)
                else:
                    x = solve(observed, x, times, after_step, blend)
            finally:
                self.now.step, self.now.t, self.now.denoised = 0, None, None
            self.residency.done(self.transformer)
            return to_grid(x).float().contiguous()

    def velocity(
        self,
        features: TextFeatures,
        width: int | None = None,
        height: int | None = None,
        guidance: float | None = None,
        negative: TextFeatures | None = None,
        true_cfg_scale: float | None = None,
        conditions: Conditions | None = None,
        residuals: ResidualsFn | None = None,
        batch: int | None = None,
        gradients: bool = False,
    ) -> Callable[[Tensor, float], Tensor]:
        """Return the function velocity(x, t) of latents x (B, C, height/16, width/16), float32.

        t is any time from 1 (noise) to 0 (image). A flow map gets 0 as its target: it steps to the
        image at once. `batch`: B, if the features are of one prompt.
        The other arguments are those of `sample`. The function keeps the transformer in memory.
        """
        conditions = conditioning.checked(self.spec, conditions, width, height)
        batch = len(features.tokens) if batch is None else arguments.to_integer("batch", batch)
        check_features(self.spec, "features", features, batch)
        if negative is not None:
            check_features(self.spec, "negative", negative, batch)
        h = conditions.height // 16
        scales, inputs = self._guidance(guidance, true_cfg_scale, 1)
        if self.spec.flux3:
            self._check_flux3(features, negative, residuals)
        if not self.residency.covers(self._workload(conditions, 1, batch)):
            self.plan_memory(conditions.width, conditions.height, 1, batch, conditions)
        with self._autograd(gradients):
            if negative is None and max(scales) > 1:
                negative = self.encode([""])
            if conditions.text is not None:
                features = features.append(conditions.text)
            of_tokens = self._velocity(
                features,
                negative,
                conditions,
                batch,
                [1.0, 0.0],
                scales,
                inputs,
                residuals=residuals,
            )

        def velocity(x: Tensor, t: float) -> Tensor:
            with self._autograd(gradients):
                tokens = rearrange(x.to(self.device), "b c h w -> b (h w) c")
                return rearrange(of_tokens(tokens, t).float(), "b (h w) c -> b c h w", h=h)

        return velocity

    def _velocity(
        self,
        features: TextFeatures,
        negative: TextFeatures | None,
        conditions: Conditions,
        batch: int,
        times: Sequence[float],
        scales: Sequence[float],
        guidance: Sequence[float] | None,
        residuals: ResidualsFn | None = None,
        drop_modulation: bool = False,
    ) -> Velocity | Velocity3:
        """Return the velocity of tokens (B, L, C)."""
        common: Any = dict(
            transformer=self.transformer,
            features=features,
            negative=negative,
            conditions=conditions,
            batch=batch,
            times=times,
            scales=scales,
            now=self.now,
        )
        if self.spec.flux3:
            return Velocity3(**common, numerics=self.numerics)
        only: Any = dict(guidance=guidance, residuals=residuals, drop_modulation=drop_modulation)
        return Velocity(**common, **only)

    def _check_flux3(
        self, features: TextFeatures, negative: TextFeatures | None, residuals: ResidualsFn | None
    ) -> None:
        """Raise UserError for what FLUX 3 does not support; note the length of the prompts."""
        name, prompts = self.spec.name, [f for f in (features, negative) if f is not None]
        if residuals is not None:
            raise UserError(f"residuals: {name} takes none. Use a model of FLUX.1 or FLUX.2.")
        if any(f.mask is not None for f in prompts):
            raise UserError(f"features: {name} takes no `mask`. Use a model of FLUX.1 or FLUX.2.")
        if negative is not None and self.spec.distilled:
            raise UserError(
                f"negative: {name} takes none: {self.spec.distilled}. Use a base model."
            )
        self.text_tokens = max(self.text_tokens, *(f.tokens.shape[1] for f in prompts))

    def watch(
        self, see: Callable[[Tap, Tensor], object], only: Sequence[str] = ()
    ) -> AbstractContextManager[None]:
        """Call `see(tap, tensor)` for the tensors of the transformer inside of a `with` block.

        `only`: patterns of `str(tap)`, "step.001/conditional/double_blocks.0.img_attn.qkv/out" or
        "step.001/conditional/double_blocks.0/attention/q": see `flux.hooks.matches`.
        """
        return watching_network(self.transformer, self.now, see, only)

    def _guidance(
        self, guidance: Guidance | None, true_cfg_scale: Guidance | None, steps: int
    ) -> tuple[list[float], list[float] | None]:
        """Return the scale of classifier-free guidance, and the guidance input, of each step."""
        checked = check_guidance(self.spec, guidance, steps)
        scales = sampling.per_step_values(check_true_cfg_scale(true_cfg_scale, steps), steps)
        inputs = None if checked is None else sampling.per_step_values(checked, steps)
        if self.spec.cfg and inputs is not None:  # without a guidance input, guidance is the scale
            return inputs, None
        return scales, inputs

    def _autograd(self, gradients: bool) -> AbstractContextManager:
        """Return the context in which a stage runs: in inference mode, or as the caller is."""
        if not gradients:
            return torch.inference_mode()
        if self.transformer.resident is not None:
            raise UserError(
                "gradients: streamed blocks have none: their weights have left before the backward "
                'pass. Use `offload="none"` or `offload="model"`.'
            )
        return nullcontext()

    # ---------------------------------------------------------------- latents <-> images

    def to_latents(self, image: ImageLike) -> Tensor:
        """Return the latents (1, C, h, w) of an image, float32.

        Its sides are scaled to multiples of 16 pixels.
        """
        picture = as_image(image)
        self.judge_image(picture)
        width, height = round_to_16(picture.size)
        check_size(height, width)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        self.plan_memory(width, height, encoded_pixels=width * height)
        with torch.no_grad():
            latents = self._encode_image(to_pixels(picture))
        self.residency.done(self.image_encoder)
        return latents

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Return the images of latents (B, C, h, w).

        One image is decoded at a time: a batch takes the memory of one image. UserError for another
        shape.
        """
        images = self._decode_all(latents)
        if self.filters is not None:
            self.filters.check_images(images, name="latents")
        return images

    @torch.inference_mode()
    def _decode_all(self, latents: Tensor) -> list[Image.Image]:
        self._check_latents(latents)
        dtype = self.autoencoder.dtype if self.numerics.decode == "model" else torch.float32
        images = [to_images(self._decode(x), dtype)[0] for x in latents.split(1)]
        self.residency.done(self.autoencoder)
        return images

    def to_pixels(self, latents: Tensor, gradients: bool = False) -> Tensor:
        """Return pixels (B, 3, 16 h, 16 w), nominally in [-1, 1]; `gradients` as in `sample`."""
        self._check_latents(latents)
        with self._autograd(gradients):
            pixels = torch.cat([self._decode(x) for x in latents.split(1)])
        self.residency.done(self.autoencoder)
        return pixels

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.spec.autoencoder.latent_channels
        fits = isinstance(latents, Tensor) and latents.ndim == 4 and latents.numel()
        if not fits or latents.shape[1] != channels:
            raise UserError(
                f"latents: must be a tensor of shape (B, {channels}, height / 16, width / 16) "
                f"(got {arguments.shown(latents)})."
            )

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents (1, C, h, w) -> pixels (1, 3, 16h, 16w), nominally in [-1, 1]."""
        autoencoder, tile = self.autoencoder(), self.options.vae_tile
        latents = latents.to(self.device, self.autoencoder.dtype)
        with no_tf32():
            if tile:
                return decode_tiled(autoencoder, latents, tile_size=tile // 16, overlap=tile // 64)
            return autoencoder.decode(latents)

    # ---------------------------------------------------------------- LoRA

    def load_lora(self, path: str | Path, scale: float = 1.0, strict: bool = True) -> None:
        """Merge a LoRA file, or a PEFT folder's, into the weights, beside those loaded already.

        `strict=False` leaves out tensors that match no layer of the model, and warns. UserError if
        the file is loaded already, is damaged or does not fit.
        """
        path, scale = arguments.to_path("path", path), arguments.to_number("scale", scale)
        self._loras.add(path, scale, strict=strict)

    def set_lora_scale(self, path: str | Path, scale: float) -> None:
        """Merge a loaded file at another scale."""
        path, scale = arguments.to_path("path", path), arguments.to_number("scale", scale)
        self._loras.set_scale(path, scale)

    def unload_loras(self) -> None:
        """Restore the files' weights. A LoRA that is part of the model stays."""
        self._loras.remove_all()

    @property
    def loras(self) -> dict[Path, tuple[list, float]]:
        """The merged files, with their layers' changes and their scales."""
        return self._loras.files

    # ---------------------------------------------------------------- memory

    def plan_memory(
        self,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        batch: int = 1,
        conditions: Conditions | None = None,
        encoded_pixels: int = 0,
    ) -> MemoryPlan | None:
        """Decide what is in memory when, for images of this size.

        encoded_pixels: size of the largest input image that is still to be encoded. Raise
        UserError, with numbers, if the run cannot fit.
        """
        conditions = conditions or conditioning.text_to_image(self.spec, width, height)
        steps = arguments.optional(arguments.to_integer, "steps", steps)
        return self.residency.plan(self._workload(conditions, steps, batch, encoded_pixels))

    def _workload(
        self, conditions: Conditions, steps: int | None, batch: int, encoded_pixels: int = 0
    ) -> Workload:
        def length(tokens: Tensor | None) -> int:
            return 0 if tokens is None else tokens.shape[1]

        return Workload(
            conditions.width,
            conditions.height,
            batch,
            length(conditions.references),
            length(conditions.text),
            steps or self.spec.steps,
            self.dtype.itemsize,
            self.options.vae_tile,
            encoded_pixels,
            self.autoencoder.dtype.itemsize,
            self.options.fast and runs_fast(self.numerics, self.device.type),
            self.text_tokens,
        )

"""From a prompt to an image: the steps in order.

    prompt -> text features -> noise -> velocity, step by step -> latents -> image

`Pipeline.encode`, `condition`, `sample` and `decode` are the stages; a call runs all of them.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux import arguments, conditioning, sampling, text_encoder
from flux.autoencoder import AutoEncoder
from flux.conditioning import Conditions
from flux.configs import ModelSpec
from flux.errors import UserError
from flux.image_io import request
from flux.image_io.input import ImageLike
from flux.image_io.output import to_images
from flux.image_io.request import ImageInputs
from flux.lora.manager import LoraManager
from flux.runtime.activation_memory import Workload
from flux.runtime.checks import (
    Guidance,
    check_cfg,
    check_count,
    check_guidance,
    check_range,
    check_size,
    check_steps,
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
from flux.text_encoder import FLUX1TextEncoder, FLUX2TextEncoder, TextEncoder, TextFeatures
from flux.transformer import Flux, KVCache, Modulation, Modulations, Numerics

Callback = Callable[[int, float, Tensor], None]  # step from 1, its new time, latents (B, C, h, w)

MAX_AHEAD = 256  # prompts that are encoded before the first image: some seconds


class Networks(NamedTuple):
    """The networks of a model. A LazyModule loads its module when it is called."""

    text: TextEncoder
    transformer: LazyModule[Flux]
    autoencoder: LazyModule[AutoEncoder]  # for decoding, in its dtype
    image_encoder: LazyModule[AutoEncoder]  # the same in float32, for input images
    redux: tuple[LazyModule[Any], ...] = ()  # SigLIP and the projection of FLUX.1 Redux


class Branch(NamedTuple):
    """What the velocity of one set of prompts needs besides the latents."""

    txt: Tensor  # (B, T, D)
    rope: Tensor  # (T + L + R, d/2, 2, 2)
    mods: list[Modulations]  # one for each step


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
        self._loras = LoraManager(
            spec, files.get("lora", ()), changeable, changed=self.text.cache.clear
        )

    # ---------------------------------------------------------------- all stages

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
    ) -> list[Image.Image]:
        """Return `num_images` images of each prompt. None stands for the model's default.

        Image k has seed + k. Alone, it has the same noise, but matrix products may sum in another
        order: seen were differences of 1 level in at most 1e-4 of the values in float32, and of
        12 levels in bfloat16. Threads have the same effect.
        guidance: the scale that the model was trained with, or uses with classifier-free guidance.
        true_cfg_scale: adds classifier-free guidance, against `negative_prompt`, to other models.
        Both may be a list: one value for each step, or two values with a straight line between.
        images: input images for all prompts, or a list with the input images of each prompt.
        Numbers may be of numpy or torch, or texts that spell one.
        """
        prompts = arguments.to_texts("prompts", prompts)
        width = arguments.optional(arguments.to_integer, "width", width)
        height = arguments.optional(arguments.to_integer, "height", height)
        steps = arguments.optional(arguments.to_integer, "steps", steps)
        num_images = arguments.to_integer("num_images", num_images)
        seed = arguments.to_integer("seed", seed)
        negative_prompt = arguments.optional(arguments.to_text, "negative_prompt", negative_prompt)
        count = len(prompts) * num_images
        check_count(count, seed)
        use_cfg = check_cfg(
            self.spec, guidance, negative_prompt, true_cfg_scale, check_steps(self.spec, steps)
        )
        conditions = self._conditions(images, len(prompts), width, height)  # one for each prompt
        if conditions[0] is not None and not isinstance(images, Conditions):
            width = height = None  # the conditions know their size
        largest = max(conditions, key=lambda c: c.width * c.height if c else 0)
        self.plan_memory(width, height, steps, count, largest)

        features = self.encode(prompts)
        negative = self.encode([negative_prompt or ""]) if use_cfg else None
        results: dict[int, Image.Image] = {}
        for numbers in batches(conditions, num_images):
            rows = [number // num_images for number in numbers]
            seeds = [seed + number for number in numbers]
            of_batch = [c for c in (conditions[row] for row in rows) if c is not None]
            shared = conditioning.collate(of_batch) if of_batch else None
            latents = self.sample(
                features.rows(rows),
                seeds,
                width,
                height,
                steps,
                guidance,
                negative,
                true_cfg_scale,
                callback,
                shared,
            )
            for number, image in zip(numbers, self.decode(latents), strict=True):
                used = conditions[number // num_images]
                results[number] = (
                    image if used is None else request.postprocess(image, used.init_image)
                )
        return [results[number] for number in range(count)]

    # ---------------------------------------------------------------- prompt -> text features

    def encode(self, prompts: str | Sequence[str]) -> TextFeatures:
        """Return the text features of prompts. Those of the last prompts are kept for later calls.

        Up to 1 GiB are kept (`flux.text_encoder.MAX_CACHE`).
        """
        prompts = arguments.to_texts("prompts", prompts)
        if not prompts:
            raise UserError("prompts: empty. Pass at least one prompt.")
        if self.residency.planned is None:
            self.plan_memory()
        features = self.text.encode(prompts)
        self.residency.done(*self.text.networks)
        return features

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encode prompts for later calls, which then need not load the text encoder.

        What is kept has a bound: pass at most `prompts_ahead` prompts, and one negative prompt.
        """
        if self.residency.planned is None:
            self.plan_memory()
        for prompt in arguments.to_texts("prompts", prompts):
            self.text.features(prompt)
        self.residency.done(*self.text.networks)

    @property
    def prompts_ahead(self) -> int:
        """Prompts to encode at a time for calls one by one: few enough for the cache."""
        return max(1, min(MAX_AHEAD, text_encoder.MAX_CACHE // self.feature_bytes - 1))

    @property
    def feature_bytes(self) -> int:
        """Bytes of one prompt's features."""
        c = self.spec.transformer
        return (self.text.length * c.context_dim + (c.vector_dim or 0)) * self.text.dtype.itemsize

    # ---------------------------------------------------------------- input images -> conditions

    @torch.inference_mode()
    def condition(
        self, images: ImageInputs | ImageLike, width: int | None = None, height: int | None = None
    ) -> Conditions:
        """Return what `sample` reads of input images, with the size of the image to make."""
        images = request.convert_values(images)
        width = arguments.optional(arguments.to_integer, "width", width)
        height = arguments.optional(arguments.to_integer, "height", height)
        request.check_images(self.spec, images)
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
        return conditions

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
        return [self.condition(inputs, width, height) for inputs in images]

    # ---------------------------------------------------------------- noise -> latents

    @torch.inference_mode()
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
    ) -> Tensor:
        """Return latents (B, C, height/16, width/16), float32, of B prompts and B seeds.

        The features of one prompt, or of one negative prompt, serve all seeds; the latents equal
        those of repeated features to the bit. UserError for another number of prompts.
        """
        seeds = arguments.to_integers("seeds", seeds)
        for seed in seeds:
            check_range("seeds", seed, 0, 2**63 - 1)
        if not (callback is None or callable(callback)):
            raise UserError(f"callback: must be a function (got {arguments.shown(callback)}).")
        self._check_features("features", features, len(seeds))
        if negative is not None:
            self._check_features("negative", negative, len(seeds))
        spec, conditions = self.spec, self._check_conditions(conditions, width, height)
        h, w = conditions.height // 16, conditions.width // 16
        steps = check_steps(spec, steps)
        guidance = check_guidance(spec, guidance, steps)
        if not self.residency.covers(self._workload(conditions, steps, len(seeds))):
            self.plan_memory(conditions.width, conditions.height, steps, len(seeds), conditions)

        # times, and what holds at each: the scale of classifier-free guidance, the guidance input
        times = sampling.schedule(spec.schedule, steps, h * w, self.numerics.schedule)
        scales = sampling.per_step_values(check_true_cfg_scale(true_cfg_scale, steps), steps)
        inputs = None
        if guidance is not None:
            inputs = sampling.per_step_values(guidance, steps)
        if spec.cfg and inputs is not None:  # without a guidance input, guidance is the CFG scale
            scales, inputs = inputs, None
        strength = request.start_strength(conditions.strength, steps, self.numerics.images)
        times = sampling.truncate_by_strength(times, strength, self.numerics.images)
        run = len(times) - 1  # steps that are run
        scales, inputs = scales[-run:], inputs and inputs[-run:]

        if negative is None and max(scales) > 1:
            negative = self.encode([""])
        if conditions.text is not None:  # text tokens that images became
            features = features.append(conditions.text)
        noise = sampling.noise(seeds, spec.autoencoder.latent_channels, h, w, spatial=spec.flux1)
        x, blend = self._initial_latents(noise, times[0].item(), conditions)  # (B, L, C)
        velocity = self._velocity_fn(
            features, negative, conditions, h, w, times.tolist(), scales, inputs, len(x)
        )

        def after_step(step: int, t: float, x: Tensor) -> None:
            if callback is not None:
                callback(step, t, rearrange(x, "b (h w) c -> b c h w", h=h))

        x = sampling.denoise(velocity, x, times, after_step, self.numerics.state, blend)
        self.residency.done(self.transformer)
        return rearrange(x, "b (h w) c -> b c h w", h=h).float().contiguous()

    def _check_features(self, name: str, features: TextFeatures, seeds: int) -> None:
        """Raise UserError unless these are this model's, of one prompt or one for each seed."""
        c = self.spec.transformer
        tokens = getattr(features, "tokens", None)
        if not isinstance(tokens, Tensor):
            raise UserError(
                f"{name}: must be text features (got {arguments.shown(features)}). Pass what "
                "`encode` returns."
            )
        pooled = None if features.pooled is None else features.pooled.shape[-1]
        if (tokens.ndim, tokens.shape[-1], pooled) != (3, c.context_dim, c.vector_dim):
            raise UserError(
                f"{name}: are another model's. Pass what `encode` of this pipeline returns."
            )
        if not seeds or len(tokens) not in (1, seeds):
            raise UserError(
                f"{name}: one prompt, or one for each of `seeds`, is needed (got "
                f"{len(tokens)} prompts and {seeds} seeds)."
            )

    def _check_conditions(
        self, conditions: Conditions | None, width: int | None, height: int | None
    ) -> Conditions:
        if conditions is None:
            request.check_images(self.spec, None)  # some models need an image
            return self._text_to_image(width, height)
        if not isinstance(conditions, Conditions):
            raise UserError(
                f"conditions: must be conditions (got {arguments.shown(conditions)}). Pass what "
                "`condition` returns."
            )
        if width not in (None, conditions.width) or height not in (None, conditions.height):
            raise UserError(
                f"conditions: made for {conditions.width}x{conditions.height}. "
                "Leave `width` and `height` out."
            )
        check_size(conditions.height, conditions.width)
        return conditions

    def _text_to_image(self, width: int | None, height: int | None) -> Conditions:
        """Return conditions without images, of the requested size or the model's."""
        size = self.spec.size
        height = size if height is None else height
        width = size if width is None else width
        return Conditions(*check_size(height, width))

    def _initial_latents(
        self, noise: Tensor, t: float, conditions: Conditions
    ) -> tuple[Tensor, Callable[[Tensor, float], Tensor] | None]:
        """Return tokens (B, L, C) at time t, and a function that restores protected parts.

        Text to image starts from noise, image to image from an image with noise. Inpainting also
        restores, after each step, what the mask protects.
        """

        def to_tokens(grid: Tensor) -> Tensor:
            tokens = rearrange(grid, "b c h w -> b (h w) c")
            if self.spec.transformer.bias:  # which would round twice in bfloat16 on strided input
                tokens = tokens.contiguous()
            return tokens.to(self.device)

        noise = to_tokens(noise)
        if conditions.init is None:
            return noise, None
        image = to_tokens(conditions.init)
        x = sampling.scale_noise(image, noise, t)
        if conditions.mask is None:
            return x, None
        mask = to_tokens(conditions.mask)  # (1, L, 1 | C), 1 where the image may change

        def blend(x: Tensor, t: float) -> Tensor:
            return (1 - mask) * sampling.scale_noise(image, noise, t) + mask * x

        return x, blend

    def _velocity_fn(
        self,
        features: TextFeatures,
        negative: TextFeatures | None,
        conditions: Conditions,
        h: int,
        w: int,
        times: list[float],
        scales: list[float],
        guidance: list[float] | None,
        batch: int,
    ) -> Callable[[Tensor, float], Tensor]:
        """Return velocity(x, t) for t in `times`. Compute what does not depend on x now."""
        transformer = self.transformer()
        axes = len(self.spec.transformer.axes_dim)
        img_ids = sampling.image_ids(h, w, axes)
        channels, references, caches = conditions.channels, conditions.references, None
        if channels is not None:
            channels = channels.to(self.device, self.dtype)
        if references is not None and conditions.reference_ids is not None:
            references, ids = references.to(self.device, self.dtype), conditions.reference_ids
            if conditions.kv_cache:
                text_length = features.tokens.shape[1]
                first = None if guidance is None else guidance[0]
                caches = self._cache_references(transformer, references, ids, first, text_length)
                references = None
            else:
                img_ids = torch.cat([img_ids, ids])

        def full(value: float) -> Tensor:
            return torch.full((batch,), value, device=self.device)

        def branch(features: TextFeatures) -> Branch:
            # one copy for each image: a Linear with a bias rounds twice in bfloat16 if its input
            # is strided, so features of one prompt would give other images than repeated features
            txt, pooled = features.to(self.device, self.dtype).expand(batch)
            rope = transformer.rope(sampling.text_ids(txt.shape[1], axes), img_ids).to(self.device)
            vecs = []
            for step, t in enumerate(times[:-1]):
                g = None if guidance is None else full(guidance[step])
                vecs.append(transformer.vec(full(t), g, pooled))
            return Branch(txt, rope, transformer.modulations(vecs))

        conditional = branch(features)
        unconditional = None if negative is None else branch(negative)
        if not self.residency.keep:  # the modulation, a quarter of FLUX.1, has done its work
            transformer = self.transformer.drop_submodules(Modulation)

        def velocity(x: Tensor, t: float) -> Tensor:
            step = times.index(t)
            img = x.to(self.dtype)  # (B, L, C)
            if channels is not None:
                img = torch.cat([img, channels.expand(batch, -1, -1)], dim=-1)  # (B, L, C + C')
            if references is not None:
                img = torch.cat([img, references.expand(batch, -1, -1)], dim=1)  # (B, L + R, C)

            def predict(branch: Branch) -> Tensor:
                v = transformer.denoise(img, branch.txt, branch.rope, branch.mods[step], caches)
                return v[:, : x.shape[1]]  # (B, L, C)

            v = predict(conditional)
            if unconditional is not None and scales[step] > 1:
                v = sampling.classifier_free_guidance(v, predict(unconditional), scales[step])
            return v

        return velocity

    def _cache_references(
        self,
        transformer: Flux,
        references: Tensor,
        ids: Tensor,
        guidance: float | None,
        text_length: int,
    ) -> list[KVCache]:
        """Run the reference tokens alone, at t = 0, once for all steps and images."""
        c = self.spec.transformer
        caches = [KVCache(text_length) for _ in range(c.depth + c.depth_single)]
        zero = torch.zeros(1, device=self.device)
        vec = transformer.vec(zero, None if guidance is None else zero + guidance)
        rope = transformer.rope(ids[:0], ids).to(self.device)
        no_text = references.new_zeros(1, 0, c.context_dim)
        transformer.denoise(references, no_text, rope, transformer.modulations([vec])[0], caches)
        return caches

    # ---------------------------------------------------------------- latents -> images

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Return the images of latents (B, C, h, w).

        One image is decoded at a time: a batch takes the memory of one image. UserError for another
        shape.
        """
        channels = self.spec.autoencoder.latent_channels
        fits = isinstance(latents, Tensor) and latents.ndim == 4 and latents.numel()
        if not fits or latents.shape[1] != channels:
            raise UserError(
                f"latents: must be a tensor of shape (B, {channels}, height / 16, width / 16) "
                f"(got {arguments.shown(latents)})."
            )
        dtype = self.autoencoder.dtype if self.numerics.decode == "model" else torch.float32
        images = [to_images(self._decode(x), dtype)[0] for x in latents.split(1)]
        self.residency.done(self.autoencoder)
        return images

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
        conditions = conditions or self._text_to_image(width, height)
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
        )


def batches(conditions: Sequence[Conditions | None], num_images: int) -> list[list[int]]:
    """Group image numbers whose conditions can share a batch.

    That is one group, unless prompts have different input images.
    """
    groups = defaultdict(list)
    for number in range(len(conditions) * num_images):
        used = conditions[number // num_images]
        groups[used and used.batch_key].append(number)
    return list(groups.values())

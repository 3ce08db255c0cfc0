"""Prompt -> tokens -> features -> noise -> velocity -> latents -> picture: the steps in order, and what is in memory when."""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux import conditioning, sampling
from flux.autoencoder import AutoEncoder
from flux.conditioning import Conditions
from flux.configs import ModelSpec
from flux.errors import UserError
from flux.image_io import request
from flux.image_io.input import as_image, as_mask
from flux.image_io.output import to_images
from flux.image_io.request import ImageInputs
from flux.lora.manager import LoraManager
from flux.runtime.activation_memory import Workload
from flux.runtime.checks import (
    Guidance,
    check_cfg,
    check_count,
    check_guidance,
    check_size,
    check_steps,
    check_true_cfg_scale,
)
from flux.runtime.devices import available_memory, can_compile, choose_device, choose_dtype
from flux.runtime.lazy_module import LazyModule
from flux.runtime.memory_plan import MemoryPlan, plan_memory
from flux.runtime.options import Offload, RuntimeOptions
from flux.runtime.tiling import decode_tiled
from flux.siglip import (
    Redux,
    ReduxConfig,
    SigLIP,
    SigLIPConfig,
    preprocess_for_siglip,
    siglip_ignore_keys,
)
from flux.text_encoder import TextFeatures, build_text_encoder
from flux.transformer import BLOCK_LISTS, NUMERICS, Flux, Memory, Modulation, Numerics
from flux.weights.diffusers_names import from_diffusers
from flux.weights.files import shard_files
from flux.weights.locate import get_spec, locate, with_decoder_of
from flux.weights.quantization import FP8Linear, QuantizedLinear

Callback = Callable[[int, float, Tensor], None]  # step from 1, time after it, latents (B, C, h, w)


def load(
    name: str | None = None,
    weights: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    numerics: str | Numerics = "exact",
    transformer: str | Path | None = None,
    autoencoder: str | Path | None = None,
    check_finite: bool = False,
    offload: Offload | None = None,
    max_vram: float | None = None,
    quantize: str | None = None,
    fp8_matmul: bool = False,
    compile: bool = False,
    vae_tile: int | None = None,
    decode_dtype: torch.dtype | None = None,
) -> "Pipeline":
    """A pipeline for a model of `flux.MODELS`; flux.2-tiny, an embedded toy, where neither `name` nor `transformer` is given.

    `weights`: a folder to find the files in; else $FLUX_WEIGHTS, the Hugging Face cache, or a download. `transformer`: a file
    in BFL's layout to use in place of the row's own; without `name`, the row is the first of its shape. `autoencoder`: the
    same, with a decoder of any width. `dtype`: bfloat16 where the device computes in it, and float32 for the toy. Every file is
    found and checked here, and UserError says what is wrong with it; `check_finite` looks for NaN too.

    The rest is `RuntimeOptions`'s.
    """
    options = RuntimeOptions(
        offload, max_vram, quantize, fp8_matmul, compile, vae_tile, decode_dtype
    )
    spec = get_spec(name, transformer)
    if isinstance(numerics, str) and numerics not in NUMERICS:
        raise UserError(f"numerics {numerics!r} is unknown; choose from {', '.join(NUMERICS)}")
    numerics = NUMERICS[numerics] if isinstance(numerics, str) else numerics
    device = choose_device(device)
    if dtype is not None and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    ):
        raise UserError(f"dtype {dtype!r:.40}: networks compute in torch.bfloat16 or torch.float32")
    dtype = dtype or (torch.float32 if spec.embedded else choose_dtype(device))
    given = {}  # in place of the row's own, which need not be there then
    if transformer is not None:
        given["transformer"] = shard_files(Path(transformer))
    if autoencoder is not None:
        given["autoencoder"] = [Path(autoencoder)]
        spec = replace(spec, autoencoder=with_decoder_of(spec.autoencoder, Path(autoencoder)))
    files = locate(spec, None if weights is None else Path(weights), given)
    return Pipeline(spec, files, device, dtype, numerics, check_finite, options)


class Pipeline:
    """`pipe(prompts)` makes pictures. Its three stages, `encode`, `sample` and `decode`, can be run on their own."""

    def __init__(
        self,
        spec: ModelSpec,
        files: dict,
        device: torch.device,
        dtype: torch.dtype,
        numerics: Numerics,
        check_finite: bool = False,
        options: RuntimeOptions = RuntimeOptions(),
    ):
        if options.compile and not can_compile(device):
            what = "Triton" if device.type == "cuda" else "a C++ compiler"
            raise UserError(
                f"compile: needs {what}, which is not installed. Install it, or leave `compile` out."
            )
        if options.quantize == "fp8" and device.type == "mps":
            raise UserError(
                'quantize: Apple\'s GPUs have no float8 (got fp8). Use `quantize="int8"`.'
            )
        loading = dict(
            device=device,
            dtype=dtype,
            check_finite=check_finite,
            quantize=options.quantize,
            fp8_matmul=options.fp8_matmul,
        )
        self.options = options
        self.spec, self.files, self.device, self.dtype, self.numerics = (
            spec,
            files,
            device,
            dtype,
            numerics,
        )
        self.text = build_text_encoder(spec.text, files, spec.text_length, **loading)

        def build(config):
            return Flux(config, numerics)

        self.transformer = LazyModule(
            build,
            spec.transformer,
            files["transformer"],
            prefixes=("", "model.diffusion_model."),
            block_lists=BLOCK_LISTS,
            compile=options.compile,
            **loading,
        )
        self.autoencoder = LazyModule(
            AutoEncoder, spec.autoencoder, files["autoencoder"], rename=from_diffusers, **loading
        )
        # pictures are encoded in float32, as BFL does: in bfloat16 their latents are off by some per cent
        self.encoder = LazyModule(
            AutoEncoder,
            spec.autoencoder,
            files["autoencoder"],
            rename=from_diffusers,
            device=device,
            dtype=torch.float32,
        )
        self.adapters: tuple[LazyModule, ...] = ()
        if "redux" in files:
            siglip = LazyModule(
                SigLIP,
                SigLIPConfig(),
                files["siglip"],
                prefixes=("vision_model.", ""),
                ignore_keys=siglip_ignore_keys,
                **loading,
            )
            self.adapters = siglip, LazyModule(Redux, ReduxConfig(), files["redux"], **loading)
        if options.fp8_matmul and options.quantize != "fp8" and not self._has_fp8:
            raise UserError(
                f'fp8_matmul: {spec.name} has no float8 weights here. Add `quantize="fp8"`, or use an -fp8 file.'
            )
        # `prepare` decides whether a stage's networks stay when it ends, and keeps for what it did
        self.resident, self.prepared = options.offload in (None, "none"), None
        self.tabulated = (
            True  # what time does to the network is computed for all steps before the first
        )
        encoders = {"t5": self.text.t5, "clip": self.text.clip} if spec.flux1 else {}
        adaptable = encoders | {"transformer": self.transformer}
        self._merged = LoraManager(
            spec, files.get("lora", ()), adaptable, changed=self.text.cache.clear
        )

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
        cfg_scale: Guidance | None = None,
        callback: Callback | None = None,
        pictures: ImageInputs | Sequence[ImageInputs] | Conditions | None = None,
    ) -> list[Image.Image]:
        """`num_images` pictures of each prompt, in one batch; what is None comes from the model's row of the table.

        Picture k has seed + k, and equals the one that is made alone with that seed. `guidance` is what the model was trained
        or meant to take; `cfg_scale` adds classifier-free guidance, against `negative_prompt`, to models without. Either may
        be a list: a value a step, or two between which it changes evenly. `pictures` (or what `condition` made of them) are for
        all prompts; or give one `ImageInputs` for each: those of one size are then in one batch.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_count(len(prompts) * num_images, seed)
        cfg = check_cfg(
            self.spec, guidance, negative_prompt, cfg_scale, check_steps(self.spec, steps)
        )
        conditions = self._conditions(pictures, len(prompts), width, height)
        if conditions[0] is not None and not isinstance(pictures, Conditions):
            width = height = None  # theirs
        largest = max(conditions, key=lambda given: given.width * given.height if given else 0)
        self.prepare(width, height, steps, len(prompts) * num_images, largest)
        self.encode(prompts)  # all, while their encoder is there
        negative = self.encode([negative_prompt or ""]) if cfg else None
        alike = {id(given): given and given.batch_key for given in conditions}
        batches = defaultdict(
            list
        )  # of what is alike: that is all, unless each prompt has pictures of its own
        for number in range(len(prompts) * num_images):
            batches[alike[id(conditions[number // num_images])]].append(number)
        made: dict[int, Image.Image] = {}
        for numbers in batches.values():
            rows = [number // num_images for number in numbers]
            given = conditions[rows[0]] and conditioning.collate([conditions[row] for row in rows])
            features, seeds = (
                self.encode([prompts[row] for row in rows]),
                [seed + number for number in numbers],
            )
            latents = self.sample(
                features,
                seeds,
                width,
                height,
                steps,
                guidance,
                negative,
                cfg_scale,
                callback,
                given,
            )
            made |= zip(numbers, self.decode(latents), strict=True)

        def finish(image, given):
            return image if given is None else request.postprocess(image, given.init_image)

        return [finish(made[number], conditions[number // num_images]) for number in sorted(made)]

    def prepare(
        self,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        batch: int = 1,
        conditions: Conditions | None = None,
        pictured: int = 0,
    ) -> MemoryPlan:
        """Decide what is in memory when, for pictures of this size; UserError, with numbers, for what cannot fit.

        `pictured`: pixels of the largest picture that is yet to be encoded.
        """
        for (
            network
        ) in self.networks:  # what an interruption left, since nothing else leaves a ring behind
            if network.resident is not None:
                network.release()
        work = self._work(conditions or self._blank(width, height), steps, batch, pictured)
        text = reduce(add, (network.weight_sizes for network in self.text.networks))
        stages = {
            "text encoder": text,
            "transformer": self.transformer.weight_sizes,
            "autoencoder": self.autoencoder.weight_sizes,
        }
        if pictured:
            encoders = [network.weight_sizes for network in (self.encoder, *self.adapters)]
            stages["image encoder"] = reduce(add, encoders)
        room = available_memory(self.device)
        held = sum(
            network.device_bytes
            for network in (*self.text.networks, self.transformer, self.autoencoder)
        )  # and counted there
        decided = plan_memory(
            self.spec,
            stages,
            work,
            room._replace(device=room.device + held),
            self.options.offload,
            self.options.max_vram,
            quantizable=self._quantizable,
        )
        self.resident = decided.offload == "none"
        if (
            not self.resident
        ):  # what was loaded by itself, or when there was room, or was left by an interruption
            for network in self.networks:
                network.release()
        self.transformer.stream(decided.resident["transformer"])
        for network in self.text.networks:
            network.stream(decided.resident["text encoder"] if network.block_lists else None)
        self.prepared = work
        return decided

    def _blank(self, width: int | None, height: int | None) -> Conditions:
        """Without pictures, of the size that is asked for, or the model's."""
        size = self.spec.size
        return Conditions(
            *check_size(size if height is None else height, size if width is None else width)
        )

    def stay(self) -> None:
        """Have no network leave memory from here on, whatever is made: the transformer may be one that is being trained."""
        self.resident, self.prepared = True, Workload(*[sys.maxsize] * 6)

    @property
    def _quantizable(self) -> bool:
        """Whether --quantize would still be taken."""
        return not self.options.quantize and not any(
            isinstance(m, QuantizedLinear) for m in self.transformer.shapes.modules()
        )

    def _work(
        self, given: Conditions, steps: int | None, batch: int, pictured: int = 0
    ) -> Workload:
        def count(tokens):
            return 0 if tokens is None else tokens.shape[1]

        return Workload(
            given.width,
            given.height,
            batch,
            count(given.references),
            count(given.text),
            steps or self.spec.steps,
            self.dtype.itemsize,
            self.options.vae_tile,
            pictured,
        )

    @property
    def networks(self) -> tuple[LazyModule, ...]:
        return *self.text.networks, self.transformer, self.autoencoder, self.encoder, *self.adapters

    @property
    def _has_fp8(self) -> bool:
        layers = (
            layer
            for network in (self.transformer, *self.text.networks)
            for layer in network.shapes.modules()
        )
        return any(isinstance(layer, FP8Linear) for layer in layers)

    def _conditions(
        self, pictures, count: int, width: int | None, height: int | None
    ) -> list[Conditions | None]:
        """One for each of `count` prompts, the same for all if there is one for all."""
        if pictures is None or isinstance(pictures, Conditions):
            return [pictures] * count
        if isinstance(pictures, ImageInputs):
            return [self.condition(pictures, width, height)] * count
        pictures = pictures if isinstance(pictures, Sequence) else [pictures]
        if not all(isinstance(each, ImageInputs) for each in pictures):
            raise UserError(
                "pictures are flux.ImageInputs((image, ...)): one for all prompts, or a list of one for each"
            )
        if len(pictures) != count:
            raise UserError(
                f"there are {count} prompts, and pictures for {len(pictures)}: give ImageInputs for each"
            )
        return [self.condition(each, width, height) for each in pictures]

    def load_lora(self, path: str | Path, scale: float = 1.0, partial: bool = False) -> None:
        """Merge a LoRA, in any common format, with those that are loaded, or give another scale to the model's own.

        `partial`: leave out what has no place here.
        """
        self._merged.add(Path(path), scale, partial)

    def set_lora_scale(self, path: str | Path, scale: float) -> None:
        self._merged.set_scale(Path(path), scale)

    def unload_loras(self) -> None:
        """All but the model's own, if its row has one; the weights are then those of the files again."""
        self._merged.remove_all()

    @property
    def loras(self) -> dict[Path, tuple[list, float]]:
        """File -> its patches, as `flux.lora.formats` makes them, and their scale."""
        return self._merged.files

    def encode(self, prompts: str | Sequence[str]) -> TextFeatures:
        """Prompts -> features, kept for the next time."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("there is nothing to encode: give at least one prompt")
        if self.prepared is None:
            self.prepare()
        features = self.text.encode(prompts)
        if not self.resident:
            self.text.release()
        return features

    @torch.inference_mode()
    def condition(
        self, pictures: ImageInputs, width: int | None = None, height: int | None = None
    ) -> Conditions:
        """ImageInputs -> what `sample` takes of them, and the size that it will make."""
        pictures = replace(
            pictures,
            images=tuple(map(as_image, pictures.images)),
            mask=pictures.mask and as_mask(pictures.mask),
        )
        request.check_images(self.spec, pictures)
        width, height = request.output_size(self.spec, pictures, width, height)
        check_size(height, width)
        largest = max(picture.width * picture.height for picture in pictures.images)
        self.prepare(width, height, pictured=min(max(width * height, largest), 2024**2))

        def encode(pixels):
            return self.encoder().encode(pixels.to(self.device)).cpu()

        conditions = conditioning.condition(self.spec, pictures, width, height, encode, self.embed)
        if not self.resident:
            for network in (self.encoder, *self.adapters):
                network.release()
        return conditions

    def embed(self, picture: Image.Image) -> Tensor:
        """A picture -> text tokens (1, 729, D), by FLUX.1 Redux."""
        siglip, redux = (network() for network in self.adapters)
        return (
            redux(
                siglip(
                    preprocess_for_siglip(picture, siglip.config.image_size).to(
                        self.device, self.dtype
                    )
                )
            )
            .float()
            .cpu()
        )

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
        cfg_scale: Guidance | None = None,
        callback: Callback | None = None,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Features (B prompts) and B seeds -> latents (B, C, height/16, width/16), float32; `conditions` bring their size."""
        spec, given = self.spec, conditions or self._blank(width, height)
        if width not in (None, given.width) or height not in (None, given.height):
            raise UserError(
                f"the pictures were made ready for {given.width}x{given.height}: leave --width and --height out"
            )
        if conditions is None:
            request.check_images(spec, None)  # UserError where the model needs an image
        h, w = (n // 16 for n in check_size(given.height, given.width))
        steps, guidance = check_steps(spec, steps), check_guidance(spec, guidance, steps)
        if self.prepared is None or not self._work(given, steps, len(seeds)).fits_within(
            self.prepared
        ):
            self.prepare(given.width, given.height, steps, len(seeds), conditions)
        times = sampling.schedule(spec.schedule, steps, h * w)

        def at_each(values):
            return dict(zip(times.tolist(), sampling.per_step_values(values, steps)))

        embedded = None if spec.cfg or guidance is None else at_each(guidance)
        scales = at_each(guidance if spec.cfg else check_true_cfg_scale(cfg_scale, steps))
        times = sampling.truncate_by_strength(times, given.strength)
        if negative is None and max(scales.values()) > 1:
            negative = self.encode([""])

        latents = sampling.noise(seeds, spec.autoencoder.latent_channels, h, w, spatial=spec.flux1)
        x, blend = self._start(latents, times[0].item(), given)  # (B, L, C)
        if given.text is not None:
            pictured = given.text.to(features.tokens).expand(len(features.tokens), -1, -1)
            features = features._replace(
                tokens=torch.cat([features.tokens, pictured], dim=1)
            )  # (B, T + T', D)
        transformer = self.transformer()

        def filled(value, batch=len(x)):
            return torch.full((batch,), value, device=self.device)

        memories = None
        if given.references is not None and given.kv_cache:
            first = None if embedded is None else filled(embedded[times[0].item()], 1)
            memories = self._remember(transformer, given, first, len(x))
        at = {
            t: (filled(t), None if embedded is None else filled(embedded[t]))
            for t in times[:-1].tolist()
        }
        branches = [
            self._branch(transformer, f, h, w, given, memories, at)
            for f in (features, negative)
            if f is not None
        ]
        if self.tabulated and not self.resident:
            transformer = self.transformer.drop_submodules(
                Modulation
            )  # a quarter of FLUX.1, which has done its work

        def velocity(x: Tensor, t: float) -> Tensor:
            velocities = [
                branch(transformer, x.to(self.dtype), t)
                for branch in branches[: 1 + (scales[t] > 1)]
            ]
            return (
                sampling.classifier_free_guidance(*velocities, scales[t])
                if len(velocities) == 2
                else velocities[0]
            )

        def grid(x):
            return rearrange(x, "b (h w) c -> b c h w", h=h)

        see = (lambda step, t, x: callback(step, t, grid(x))) if callback else None
        x = sampling.denoise(velocity, x, times, see, self.numerics, blend)
        if not self.resident:
            self.transformer.release()
        return grid(x).float()

    def _start(
        self, noise: Tensor, t: float, given: Conditions
    ) -> tuple[Tensor, Callable[[Tensor, float], Tensor]]:
        """Tokens (B, L, C) to begin with at time t, and what puts known parts of the picture back at any time."""

        def tokens(grid):
            return rearrange(grid, "b c h w -> b (h w) c").to(self.device)

        noise = tokens(noise)
        if given.init is None:
            return noise, lambda x, t: x

        def known(t, start=tokens(given.init)):
            return sampling.scale_noise(start, noise, t)

        if given.mask is None:
            return known(t), lambda x, t: x
        mask = tokens(given.mask)  # (1, L, 1 | C)
        return known(t), lambda x, t: (1 - mask) * known(t) + mask * x

    def _branch(
        self,
        transformer: Flux,
        features: TextFeatures,
        h: int,
        w: int,
        given: Conditions,
        memories: list[Memory] | None,
        at: dict[float, tuple[Tensor, Tensor | None]],
    ):
        """velocity(x, t) for one set of prompts; what x has no part in is computed here. `at`: time -> t and guidance."""
        axes = len(self.spec.transformer.axes_dim)
        txt, pooled = features.to(self.device, self.dtype)
        txt_ids, img_ids = sampling.text_ids(txt.shape[1], axes), sampling.image_ids(h, w, axes)
        references = given.references if memories is None else None
        if references is not None:
            img_ids = torch.cat([img_ids, given.reference_ids])
        rope = transformer.rope(txt_ids, img_ids).to(self.device)
        references, channels = (
            None if x is None else x.to(self.device, self.dtype)
            for x in (references, given.channels)
        )

        def vec(transformer: Flux, t: float) -> Tensor:
            time, guidance = at[t]
            return transformer.vec(
                time, guidance, None if pooled is None else pooled.expand(len(time), -1)
            )

        vecs = [vec(transformer, t) for t in at] if self.tabulated else []
        table = dict(zip(at, transformer.tabulate(vecs)))

        def velocity(transformer: Flux, x: Tensor, t: float) -> Tensor:
            def for_all(y):
                return y.expand(len(x), -1, -1)

            mods = table[t] if self.tabulated else transformer.modulations(vec(transformer, t))
            img = (
                x if channels is None else torch.cat([x, for_all(channels)], dim=-1)
            )  # (B, L, C + C')
            img = (
                img if references is None else torch.cat([img, for_all(references)], dim=1)
            )  # (B, L + R, C)
            return transformer.velocity(img, for_all(txt), rope, mods, memories)[:, : x.shape[1]]

        return velocity

    def _remember(
        self, transformer: Flux, given: Conditions, guidance: Tensor | None, batch: int
    ) -> list[Memory]:
        """References, computed once for all steps and all of the batch."""
        rope = transformer.rope(given.reference_ids[:0], given.reference_ids).to(self.device)
        mods = transformer.modulations(
            transformer.vec(torch.zeros(1, device=self.device), guidance)
        )
        memories = transformer.remember(given.references.to(self.device, self.dtype), rope, mods)
        return [Memory(*(x.expand(batch, -1, -1, -1) for x in memory)) for memory in memories]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) -> pictures, one at a time, so that a batch takes the memory of one."""
        autoencoder, tile = self.autoencoder(), self.options.vae_tile
        decode = (
            partial(decode_tiled, autoencoder, tile_size=tile // 16, overlap=tile // 64)
            if tile
            else autoencoder.decode
        )
        images = [to_images(decode(x.to(self.device, self.dtype)))[0] for x in latents.split(1)]
        if not self.resident:
            self.autoencoder.release()
        return images

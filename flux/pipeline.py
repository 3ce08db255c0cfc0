"""Prompt -> tokens -> features -> noise -> velocity -> latents -> picture: the steps in order, and what is in memory when."""

import functools
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux import conditioning, sampling
from flux.autoencoder import AutoEncoder, AutoEncoderConfig, from_diffusers
from flux.conditioning import Conditions, Pictures
from flux.configs import EMBEDDED, MODELS, ModelSpec
from flux.errors import UserError
from flux.images import to_images
from flux.inputs import MAX_PIXELS, as_mask, as_picture
from flux.lora import Patch, merge, place, read
from flux.redux import Redux, ReduxConfig, SigLIP, SigLIPConfig, siglip_unread, to_siglip
from flux.text import TextFeatures, text_encoder
from flux.transformer import NUMERICS, Flux, Memory, Numerics
from flux.weights import Network, find_all, infer_config, is_local, read_header, shard_files

Callback = Callable[[int, float, Tensor], None]  # step from 1, time after it, latents (B, C, h, w)
Guidance = float | Sequence[float]  # one value; one a step; or two, the first and the last


def load(
    name: str | None = None,
    weights: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    numerics: str | Numerics = "exact",
    transformer: str | Path | None = None,
    autoencoder: str | Path | None = None,
    check_weights: bool = False,
) -> "Pipeline":
    """A pipeline for a model of `flux.MODELS`; the embedded toy where neither `name` nor `transformer` is given.

    `weights`: a folder to find the files in; else $FLUX_WEIGHTS, the Hugging Face cache, or a download. `transformer`: a file
    in BFL's layout to use in place of the row's own; without `name`, the row is the first of its shape. `autoencoder`: the
    same, with a decoder of any width. `dtype`: bfloat16 by default, and float32 for the toy. Every file is found and checked
    here, and UserError says what is wrong with it; `check_weights` looks for NaN too.
    """
    spec = find_spec(name, transformer)
    if isinstance(numerics, str) and numerics not in NUMERICS:
        raise UserError(f"numerics {numerics!r} is unknown; choose from {', '.join(NUMERICS)}")
    numerics = NUMERICS[numerics] if isinstance(numerics, str) else numerics
    dtype = dtype or (torch.float32 if spec.embedded else torch.bfloat16)
    device = choose_device(device)
    files = locate(spec, None if weights is None else Path(weights))
    if transformer is not None:
        files["transformer"] = shard_files(Path(transformer))
    if autoencoder is not None:
        files["autoencoder"] = [Path(autoencoder)]
        spec = replace(spec, autoencoder=with_decoder_of(spec.autoencoder, Path(autoencoder)))
    return Pipeline(spec, files, device, dtype, numerics, check_weights)


class Pipeline:
    """`pipe(prompts)` makes pictures. Its three stages, `encode`, `sample` and `decode`, can be run on their own."""

    def __init__(self, spec: ModelSpec, files: dict, device: torch.device, dtype: torch.dtype, numerics: Numerics,
                 check_weights: bool = False):  # fmt: skip
        options = dict(device=device, dtype=dtype, check_finite=check_weights)
        self.spec, self.files, self.device, self.dtype, self.numerics = spec, files, device, dtype, numerics
        self.text = text_encoder(spec.text, files, spec.text_length, **options)
        build = lambda config: Flux(config, numerics)  # noqa: E731
        self.transformer = Network(
            build, spec.transformer, files["transformer"], prefixes=("", "model.diffusion_model."), **options
        )
        self.autoencoder = Network(AutoEncoder, spec.autoencoder, files["autoencoder"], rename=from_diffusers, **options)
        # pictures are encoded in float32, as BFL does: in bfloat16 their latents are off by some per cent
        self.encoder = Network(AutoEncoder, spec.autoencoder, files["autoencoder"], rename=from_diffusers, device=device,
                               dtype=torch.float32)  # fmt: skip
        self.adapters: tuple[Network, ...] = ()
        if "redux" in files:
            siglip = Network(
                SigLIP, SigLIPConfig(), files["siglip"], prefixes=("vision_model.", ""), unread=siglip_unread, **options
            )
            self.adapters = siglip, Network(Redux, ReduxConfig(), files["redux"], **options)
        networks = (*self.text.networks, self.transformer, self.autoencoder, self.encoder, *self.adapters)
        self.resident = sum(n.bytes for n in networks) < 0.8 * free_memory(device)  # else a stage's networks go when it ends
        self.loras: dict[Path, tuple[list[Patch], float]] = {}
        for path in self._own_loras:
            self.loras[path] = place(read(path), {"transformer": self.transformer.on_meta()}), spec.adapter.scale
        self._merge_loras()

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
        pictures: Pictures | Sequence[Pictures] | Conditions | None = None,
    ) -> list[Image.Image]:
        """`num_images` pictures of each prompt, in one batch; what is None comes from the model's row of the table.

        Picture k has seed + k, and equals the one that is made alone with that seed. `guidance` is what the model was trained
        or meant to take; `cfg_scale` adds classifier-free guidance, against `negative_prompt`, to models without. Either may
        be a list: a value a step, or two between which it changes evenly. `pictures` (or what `condition` made of them) are for
        all prompts; or give one `Pictures` for each: those of one size are then in one batch.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_count(len(prompts) * num_images, seed)
        cfg = check_cfg(self.spec, guidance, negative_prompt, cfg_scale, check_steps(self.spec, steps))
        conditions = self._conditions(pictures, len(prompts), width, height)
        if conditions[0] is not None and not isinstance(pictures, Conditions):
            width = height = None  # theirs
        self.encode(prompts)  # all, while their encoder is there
        negative = self.encode([negative_prompt or ""]) if cfg else None
        alike = {id(given): given and given.likeness for given in conditions}
        batches = defaultdict(list)  # of what is alike: that is all, unless each prompt has pictures of its own
        for number in range(len(prompts) * num_images):
            batches[alike[id(conditions[number // num_images])]].append(number)
        made: dict[int, Image.Image] = {}
        for numbers in batches.values():
            rows = [number // num_images for number in numbers]
            given = conditions[rows[0]] and conditioning.joined([conditions[row] for row in rows])
            features, seeds = self.encode([prompts[row] for row in rows]), [seed + number for number in numbers]
            latents = self.sample(features, seeds, width, height, steps, guidance, negative, cfg_scale, callback, given)
            made |= zip(numbers, self.decode(latents), strict=True)
        finish = lambda image, given: image if given is None else conditioning.finish(image, given)  # noqa: E731
        return [finish(made[number], conditions[number // num_images]) for number in sorted(made)]

    def _conditions(self, pictures, count: int, width: int | None, height: int | None) -> list[Conditions | None]:
        """One for each of `count` prompts, the same for all if there is one for all."""
        if pictures is None or isinstance(pictures, Conditions):
            return [pictures] * count
        if isinstance(pictures, Pictures):
            return [self.condition(pictures, width, height)] * count
        pictures = pictures if isinstance(pictures, Sequence) else [pictures]
        if not all(isinstance(each, Pictures) for each in pictures):
            raise UserError("pictures are flux.Pictures((image, ...)): one for all prompts, or a list of one for each")
        if len(pictures) != count:
            raise UserError(f"there are {count} prompts, and pictures for {len(pictures)}: give Pictures for each")
        return [self.condition(each, width, height) for each in pictures]

    def load_lora(self, path: str | Path, scale: float = 1.0, partial: bool = False) -> None:
        """Merge a LoRA, in any common format, with those that are loaded, or give another scale to the model's own.

        `partial`: leave out what has no place here.
        """
        path = Path(path).resolve()
        if path in self._own_loras:
            return self.set_lora_scale(path, scale)
        if path in self.loras:
            raise UserError(f"{path} is loaded already: change its scale with set_lora_scale")
        patches = place(read(path), {part: network.on_meta() for part, network in self._adaptable.items()}, partial)
        self._check_lora(path, patches, scale)
        self.loras[path] = patches, scale
        self._merge_loras()

    def set_lora_scale(self, path: str | Path, scale: float) -> None:
        path = Path(path).resolve()
        if path not in self.loras:
            raise UserError(f"{path} is not loaded; loaded are: {', '.join(map(str, self.loras)) or 'none'}")
        self._check_lora(path, (), scale)
        self.loras[path] = self.loras[path][0], scale
        self._merge_loras()

    def unload_loras(self) -> None:
        """All but the model's own, if its row has one; the weights are then those of the files again."""
        self.loras = {path: lora for path, lora in self.loras.items() if path in self._own_loras}
        self._merge_loras()

    @property
    def _own_loras(self) -> set[Path]:
        return {path.resolve() for path in self.files.get("lora", ())}

    def _check_lora(self, path: Path, patches: Sequence[Patch], scale: float) -> None:
        """UserError for a LoRA that could be merged, but not make sense."""
        if not math.isfinite(scale):
            raise UserError(f"--lora {path}:{scale}: the scale must be a finite number")
        spec, c = self.spec, self.spec.transformer
        control = 2 * c.out_channels if spec.control and spec.adapter else c.in_channels
        widths = {patch.columns for patch in patches if patch.place.part == "transformer" and patch.place.path == "img_in"}
        if strange := widths - {c.out_channels, c.in_channels, control}:
            able = ", ".join(s.name for s in MODELS.values() if s.control and s.adapter)
            raise UserError(f"{path} is for an input of {max(strange)} channels, which {spec.name} does not have; if it is a "
                            f"control LoRA, use {able}")  # fmt: skip
        replaced = {patch.place for patch in patches if "value" in patch.factors}
        for other, (known, _) in self.loras.items():
            if any(patch.place in replaced and "value" in patch.factors for patch in known):
                raise UserError(f"{path} and {other} replace the same weights, so they cannot be used together: leave one out")

    @property
    def _adaptable(self) -> dict[str, Network]:
        """The networks that a LoRA may change."""
        encoders = {"t5": self.text.t5, "clip": self.text.clip} if self.spec.flux1 else {}
        return encoders | {"transformer": self.transformer}

    def _merge_loras(self) -> None:
        """Anew, from the weights as they are in the files, so that they are rounded once."""
        for part, network in self._adaptable.items():
            patches = [(p, scale) for patches, scale in self.loras.values() for p in patches if p.place.part == part]
            network.alter(functools.partial(merge, patches=patches) if patches else None)
        self.text.known.clear()

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Prompts -> features, kept for the next time."""
        features = self.text.encode(prompts)
        if not self.resident:
            self.text.release()
        return features

    @torch.inference_mode()
    def condition(self, pictures: Pictures, width: int | None = None, height: int | None = None) -> Conditions:
        """Pictures -> what `sample` takes of them, and the size that it will make."""
        pictures = replace(
            pictures, images=tuple(map(as_picture, pictures.images)), mask=pictures.mask and as_mask(pictures.mask)
        )
        conditioning.check_pictures(self.spec, pictures)
        width, height = conditioning.size_of(self.spec, pictures, width, height)
        check_size(height, width)
        encode = lambda pixels: self.encoder().encode(pixels.to(self.device)).cpu()  # noqa: E731
        conditions = conditioning.condition(self.spec, pictures, width, height, encode, self.embed)
        if not self.resident:
            for network in (self.encoder, *self.adapters):
                network.release()
        return conditions

    def embed(self, picture: Image.Image) -> Tensor:
        """A picture -> text tokens (1, 729, D), by FLUX.1 Redux."""
        siglip, redux = (network() for network in self.adapters)
        return redux(siglip(to_siglip(picture, siglip.config.image_size).to(self.device, self.dtype))).float().cpu()

    @torch.inference_mode()
    def sample(self, features: TextFeatures, seeds: Sequence[int], width: int | None = None, height: int | None = None,
               steps: int | None = None, guidance: Guidance | None = None, negative: TextFeatures | None = None,
               cfg_scale: Guidance | None = None, callback: Callback | None = None,
               conditions: Conditions | None = None) -> Tensor:  # fmt: skip
        """Features (B prompts) and B seeds -> latents (B, C, height/16, width/16), float32; `conditions` bring their size."""
        spec, given = self.spec, conditions or Conditions(height or self.spec.size, width or self.spec.size)
        if (width or given.width, height or given.height) != (given.width, given.height):
            raise UserError(f"the pictures were made ready for {given.width}x{given.height}: leave --width and --height out")
        if conditions is None and spec.picture in conditioning.NEEDY:
            raise UserError(f"{spec.name} needs a picture: give it with --image FILE")
        h, w = (n // 16 for n in check_size(given.height, given.width))
        steps, guidance = check_steps(spec, steps), check_guidance(spec, guidance, steps)
        times = sampling.schedule(spec.schedule, steps, h * w)
        at_each = lambda values: dict(zip(times.tolist(), sampling.ramp(values, steps)))  # noqa: E731
        embedded = None if spec.cfg or guidance is None else at_each(guidance)
        scales = at_each(guidance if spec.cfg else check_scale(cfg_scale, steps))
        times = sampling.from_strength(times, given.strength)

        latents = sampling.noise(seeds, spec.autoencoder.latent_channels, h, w, spatial=spec.flux1)
        drawn = rearrange(latents, "b c h w -> b (h w) c").to(self.device)  # (B, L, C)
        x, blend = drawn, lambda x, t: x
        if given.start is not None:
            start = rearrange(given.start, "b c h w -> b (h w) c").to(self.device)
            x = sampling.interpolate(start, drawn, times[0].item())
        if given.mask is not None:
            mask = rearrange(given.mask, "b c h w -> b (h w) c").to(self.device)  # (1, L, 1 | C)
            blend = lambda x, t: (1 - mask) * sampling.interpolate(start, drawn, t) + mask * x  # noqa: E731

        if given.text is not None:
            pictured = given.text.to(features.tokens).expand(len(features.tokens), -1, -1)
            features = features._replace(tokens=torch.cat([features.tokens, pictured], dim=1))  # (B, T + T', D)
        transformer = self.transformer()
        memories = None
        if given.references is not None and given.cached:
            first = None if embedded is None else torch.full((1,), embedded[times[0].item()], device=self.device)
            memories = self._remember(transformer, given, first, len(x))
        branches = [self._branch(transformer, f, h, w, given, memories) for f in (features, negative) if f is not None]

        def velocity(x: Tensor, t: float) -> Tensor:
            at = torch.full((len(x),), t, device=x.device)
            strong = None if embedded is None else torch.full((len(x),), embedded[t], device=x.device)
            velocities = [branch(x.to(self.dtype), at, strong) for branch in branches[: 1 + (scales[t] > 1)]]
            return sampling.guided(*velocities, scales[t]) if len(velocities) == 2 else velocities[0]

        grid = lambda x: rearrange(x, "b (h w) c -> b c h w", h=h)  # noqa: E731
        see = (lambda step, t, x: callback(step, t, grid(x))) if callback else None
        x = sampling.denoise(velocity, x, times, see, self.numerics, blend)
        if not self.resident:
            self.transformer.release()
        return grid(x).float()

    def _branch(self, transformer: Flux, features: TextFeatures, h: int, w: int, given: Conditions,
                memories: list[Memory] | None):  # fmt: skip
        """velocity(x, t, guidance) for one set of prompts; what does not change from step to step is computed here."""
        axes = len(self.spec.transformer.axes_dim)
        txt, pooled = features.to(self.device, self.dtype)
        txt_ids, img_ids = sampling.text_ids(txt.shape[1], axes), sampling.image_ids(h, w, axes)
        references = given.references if memories is None else None
        if references is not None:
            img_ids = torch.cat([img_ids, given.reference_ids])
        rope = transformer.rope(txt_ids, img_ids).to(self.device)
        references, channels = (None if x is None else x.to(self.device, self.dtype) for x in (references, given.channels))

        def velocity(x: Tensor, t: Tensor, guidance: Tensor | None) -> Tensor:
            for_all = lambda y: y.expand(len(x), -1, -1)  # noqa: E731
            vec = transformer.vec(t, guidance, None if pooled is None else pooled.expand(len(x), -1))
            img = x if channels is None else torch.cat([x, for_all(channels)], dim=-1)  # (B, L, C + C')
            img = img if references is None else torch.cat([img, for_all(references)], dim=1)  # (B, L + R, C)
            return transformer.velocity(img, for_all(txt), rope, vec, memories)[:, : x.shape[1]]

        return velocity

    def _remember(self, transformer: Flux, given: Conditions, guidance: Tensor | None, batch: int) -> list[Memory]:
        """References, computed once for all steps and all of the batch."""
        rope = transformer.rope(given.reference_ids[:0], given.reference_ids).to(self.device)
        vec = transformer.vec(torch.zeros(1, device=self.device), guidance)
        memories = transformer.remember(given.references.to(self.device, self.dtype), rope, vec)
        return [Memory(*(x.expand(batch, -1, -1, -1) for x in memory)) for memory in memories]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) -> pictures, one at a time, so that a batch takes the memory of one."""
        autoencoder = self.autoencoder()
        images = [to_images(autoencoder.decode(x.to(self.device, self.dtype)))[0] for x in latents.split(1)]
        if not self.resident:
            self.autoencoder.release()
        return images


# ---------------------------------------------------------------- what is asked for


def find_spec(name: str | None, transformer: str | Path | None = None) -> ModelSpec:
    """A row of the table by its name, with the shapes of another transformer file if one is given."""
    if name is not None and name.lower() not in MODELS:
        near = get_close_matches(name.lower(), MODELS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"--model {name}: there is no such model; {hint}The choices are {', '.join(MODELS)}")
    if transformer is None:
        return MODELS[(name or "flux.2-tiny").lower()]
    config = infer_config(Path(transformer))
    if name is not None:
        spec = MODELS[name.lower()]
        if config.context_dim != spec.transformer.context_dim or config.vector_dim != spec.transformer.vector_dim:
            raise UserError(
                f"--transformer {transformer} reads text of width {config.context_dim}, but the text encoder of {spec.name} "
                f"gives {spec.transformer.context_dim}: choose another --model, or leave it out"
            )
        if config.in_channels != spec.transformer.in_channels:
            raise UserError(
                f"--transformer {transformer} takes {config.in_channels} channels and {spec.name} "
                f"{spec.transformer.in_channels}: choose another --model, or leave it out"
            )
        return replace(spec, transformer=config)
    alike = [spec for spec in MODELS.values() if spec.transformer == config]
    if not alike:
        raise UserError(
            f"--transformer {transformer} has the shape of no released model: name the one that it derives from with --model"
        )
    if len(alike) > 1:
        others = ", ".join(spec.name for spec in alike[1:])
        warnings.warn(f"{transformer} has the shape of {alike[0].name}, which is assumed; if it derives from {others}, "
                      "say so with --model", stacklevel=3)  # fmt: skip
    return alike[0]


def with_decoder_of(config: AutoEncoderConfig, path: Path) -> AutoEncoderConfig:
    """FLUX.2 has a second, narrower decoder for the same latents: tell them apart by the width of its first layer."""
    infos, _ = read_header(path)
    width = infos["decoder.conv_in.weight"].shape[0] if "decoder.conv_in.weight" in infos else 0
    return replace(config, decoder_ch=width // config.ch_mult[-1] or None)


def choose_device(device: str | None) -> torch.device:
    """The device that is asked for, if it is there; else the best that is."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if torch.device(device).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        here = ["cpu", *[f"cuda:{i}" for i in range(torch.cuda.device_count())], *["mps"] * torch.backends.mps.is_available()]
        raise UserError(f"--device {device}: there is no such device here; choose from {', '.join(here)}") from None


def free_memory(device: torch.device) -> float:
    """Bytes that weights may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def check_size(height: int, width: int) -> tuple[int, int]:
    for name, n in (("width", width), ("height", height)):
        if n % 16 or not 64 <= n <= 8192:
            low, high = (min(8192, max(64, n // 16 * 16 + more)) for more in (0, 16))
            nearest = str(low) if not 64 <= n <= 8192 else f"{low} or {high}"
            raise UserError(f"--{name} {n}: sizes are multiples of 16 from 64 to 8192; the nearest is {nearest}")
    if width * height > MAX_PIXELS:
        size, most = (f"{pixels / 1e6:.{digits}f}" for pixels, digits in ((width * height, 0), (MAX_PIXELS, 1)))
        raise UserError(f"--width {width} --height {height}: that is {size} megapixels, and at most {most} are possible")
    return height, width


def check_steps(spec: ModelSpec, steps: int | None) -> int:
    if steps is None:
        return spec.steps
    if not 1 <= steps <= 1000:
        raise UserError(f"--steps {steps}: must be from 1 to 1000; {spec.name} is meant for {spec.steps}")
    if spec.fixed and steps != spec.steps:
        warnings.warn(f"{spec.name} was distilled for {spec.steps} steps, not {steps}", stacklevel=4)
    return steps


def check_guidance(spec: ModelSpec, guidance: Guidance | None, steps: int) -> list[float] | None:
    """The guidance to use, as `sampling.ramp` takes it; None for a model that has none."""
    if guidance is None:
        return None if spec.guidance is None else [spec.guidance]
    meant = "takes none" if spec.guidance is None else f"is meant for {spec.guidance:g}"
    values = check_values("--guidance", guidance, steps, f"{spec.name} {meant}")
    if spec.guidance is None:
        if values != [1]:
            why = spec.fixed or "it was trained without"
            raise UserError(
                f"{spec.name} takes no --guidance (here {written(values)}): {why}; leave it out, or use a base or dev model"
            )
        return None
    return values


def check_scale(cfg_scale: Guidance | None, steps: int) -> list[float]:
    return [1.0] if cfg_scale is None else check_values("--cfg-scale", cfg_scale, steps, "1 is off, and 2 to 5 are usual")


def check_values(flag: str, values: Guidance, steps: int, advice: str) -> list[float]:
    """A value, two, or one a step."""
    values = list(values) if isinstance(values, Sequence) else [values]
    if len(values) not in (1, 2, steps):
        raise UserError(f"{flag} has {len(values)} values for {steps} steps: give one, START:END, or one for each step")
    for value in values:
        if not 0 <= value <= 100:
            raise UserError(f"{flag} {value}: must be from 0 to 100; {advice}")
    return values


def written(values: Sequence[float]) -> str:
    """As --guidance takes it."""
    return (":" if len(values) == 2 else ",").join(f"{value:g}" for value in values)


def check_cfg(spec: ModelSpec, guidance: Guidance | None, negative_prompt: str | None, cfg_scale: Guidance | None,
              steps: int) -> bool:  # fmt: skip
    """Whether a second, unconditional pass is asked for; UserError where that makes no sense."""
    if spec.cfg and cfg_scale is not None:
        raise UserError(f"--cfg-scale {cfg_scale}: the guidance of {spec.name} is classifier-free already; use --guidance")
    if spec.fixed and (negative_prompt, cfg_scale) != (None, None) and not spec.flux1:
        raise UserError(f"{spec.name} takes no negative prompt and no --cfg-scale: {spec.fixed}; use a base model")
    scale = max(check_guidance(spec, guidance, steps) if spec.cfg else check_scale(cfg_scale, steps))
    if negative_prompt is not None and scale <= 1:
        flag = "--guidance" if spec.cfg else "--cfg-scale"
        raise UserError(f"--negative-prompt has an effect only with {flag} above 1; add {flag} 3, for example")
    return scale > 1


def check_count(count: int, seed: int) -> None:
    if count < 1:
        raise UserError("there is nothing to make: give at least one prompt, and --num-images of at least 1")
    if not 0 <= seed <= 2**63 - count:
        raise UserError(f"--seed {seed}: must be from 0 to 2^63 - 1")


# ---------------------------------------------------------------- files


def locate(spec: ModelSpec, weights: Path | None) -> dict[str, list[Path] | Path]:
    """Every file that a row needs: lists of weights for networks, folders for tokenizers."""
    files: dict[str, list[Path] | Path] = {part: _find(spec, choices, weights) for part, choices in networks(spec).items()}
    for part, names in spec.text.tokenizers.items():
        files[part] = [locate_one(spec, name, weights) for name in names][0].parent
    if spec.adapter:
        for part, name in spec.adapter.files:
            files[part] = find_all(spec.adapter.repository, name, weights, spec.licence.name, spec.licence.gated)
    return files


def networks(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """The files of each network in the row's own repository, any of which will do."""
    return {**spec.text.networks, "transformer": (spec.transformer_file,), "autoencoder": spec.autoencoder_files}


def is_here(spec: ModelSpec, weights: Path | None = None) -> bool:
    """Whether a row could be loaded without a download."""
    needed = (*networks(spec).values(), *((name,) for names in spec.text.tokenizers.values() for name in names))
    adapter = [(spec.adapter.repository, name) for _, name in spec.adapter.files] if spec.adapter else []
    try:
        ours = all(any(is_local(spec.repository, name, weights) for name in choices) for choices in needed)
        return spec.embedded or (ours and all(is_local(repository, name, weights) for repository, name in adapter))
    except UserError:  # a damaged index
        return False


def locate_one(spec: ModelSpec, name: str, weights: Path | None) -> Path:
    """One more file of a row's repository."""
    return _find(spec, (name,), weights)[0]


def _find(spec: ModelSpec, choices: Sequence[str], weights: Path | None) -> list[Path]:
    """The first of `choices` that is at hand, or else the first, downloaded."""
    if spec.embedded:
        return [EMBEDDED / choices[0]]
    name = next((c for c in choices if is_local(spec.repository, c, weights)), choices[0])
    return find_all(spec.repository, name, weights, spec.licence.name, spec.licence.gated)


def parameters(spec: ModelSpec) -> int:
    """Of the transformer."""
    with torch.device("meta"):
        return sum(p.numel() for p in Flux(spec.transformer).parameters())

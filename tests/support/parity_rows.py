"""The rows of the parity tables: each tiny random network and pipeline against its reference.

`python scripts/parity.py table` prints them. A row is the worst of its tensors. Networks run on the
inputs in tests/golden. Pipelines run from features and noise to the latents of the last step. In
bfloat16, the reference also runs in float32, with the same rounded weights and inputs.
"""

import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from einops import rearrange
from support.conditioned_model import HEIGHT, SEEDS, STEPS, WIDTH, Model, noise
from support.drawn_images import photo, soft_mask
from support.golden_files import golden
from support.model_zoo import TINY_REDUX, TINY_SIGLIP
from torch import Tensor, nn

import flux
from flux.errors import UserError
from flux.image_io.request import ImageInputs
from flux.parity import reference, reference3
from flux.parity.table import BFloat16Row, Float32Row, figures
from flux.siglip import Redux, SigLIP
from flux.text_encoder import TextFeatures
from flux.transformer import NUMERICS, Flux
from flux.transformer3 import Flux3

Given = dict[str, Tensor]
NETWORKS = {
    "FLUX.1 transformer, dev and schnell": ("flux.1-dev", "flux.1-schnell"),
    "FLUX.2 transformer, dev and klein": ("flux.2-dev", "flux.2-klein"),
    "FLUX 3 transformer, base and flow map": ("flux.3-klein-base", "flux.3-klein"),
    "FLUX.1 autoencoder, both ways": ("flux.1-autoencoder",),
    "FLUX.2 autoencoder, both ways": ("flux.2-autoencoder",),
    "T5": ("t5",),
    "CLIP": ("clip",),
    "language model: Qwen3": ("qwen3",),
    "language model: Mistral": ("mistral",),
    "SigLIP": ("siglip",),
    "Redux": ("redux",),
}
PRESETS = ("diffusers", "exact")


@torch.no_grad()
def measure() -> Iterator[Float32Row | BFloat16Row]:
    """Yield the rows of both tables."""
    with one_quiet_thread():
        ours = reference.golden_networks()
        ours |= {
            "siglip": reference.randomise(SigLIP(TINY_SIGLIP)),
            "redux": reference.randomise(Redux(TINY_REDUX)),
        }
        for what, names in NETWORKS.items():
            yield from of_networks(what, {name: ours[name] for name in names})
        for what, run in RUNS.items():
            with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
                patch.delenv("FLUX_WEIGHTS", raising=False)
                yield from of_pipeline(what, run, Path(folder), patch)


@contextmanager
def one_quiet_thread() -> Iterator[None]:
    """Use one thread, so that sums are in one order everywhere, and silence the libraries."""
    threads, loggers = torch.get_num_threads(), (diffusers.logging, transformers.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)
            for logger in loggers:
                logger.set_verbosity_error()
            yield
    finally:
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)


def ran_on() -> str:
    libraries = ", ".join(
        f"{library.__name__} {library.__version__}" for library in (diffusers, transformers, torch)
    )
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{libraries}, {platform.machine()} with {capability}, one thread"


# ---------------------------------------------------------------- networks


def of_networks(what: str, ours: dict[str, nn.Module]) -> Iterator[Float32Row | BFloat16Row]:
    against, live, then, narrow = "", [], [], {numerics: [] for numerics in ("", *PRESETS)}
    for name, module in ours.items():
        given, expected = inputs(name, module)
        theirs, ask = reference_of(name, module)
        answers = answer(name, module, given)
        live += zip(answers, ask(given), strict=True)
        if expected:
            then += zip(answers, expected, strict=True)
        for numerics, tensors in in_bfloat16(name, module, given):
            narrow[numerics] += tensors
        against = type(theirs).__module__.split(".")[0]
    yield Float32Row(what, against, figures(what, live), figures(what, then) if then else None)
    yield from (
        bfloat16_row(what, against, numerics, tensors)
        for numerics, tensors in narrow.items()
        if tensors
    )


def in_bfloat16(
    name: str, module: nn.Module, given: Given
) -> Iterator[tuple[str, list[tuple[Tensor, Tensor, Tensor]]]]:
    """Yield a preset of numerics and, for each tensor: ours, the reference's, and float32's."""
    rounded = {
        key: x.bfloat16() if x.is_floating_point() and key not in ("t", "guidance") else x
        for key, x in given.items()
    }
    narrow = deepcopy(module).bfloat16()
    theirs, ask = reference_of(name, narrow)
    expected = ask(rounded)
    theirs.float()  # with the rounded weights
    truth = ask({key: x.float() if x.is_floating_point() else x for key, x in rounded.items()})
    for numerics in PRESETS if isinstance(module, Flux | Flux3) else [""]:
        if numerics:
            narrow = with_numerics(module, numerics).bfloat16()
        yield numerics, list(zip(answer(name, narrow, rounded), expected, truth, strict=True))


def bfloat16_row(
    what: str, against: str, numerics: str, tensors: list[tuple[Tensor, Tensor, Tensor]]
) -> BFloat16Row:
    """`tensors`: ours, the reference's, and the reference's in float32."""

    def error(a, b):
        return figures(what, ((each[a], each[b]) for each in tensors))

    return BFloat16Row(
        what, against, numerics, error(0, 1), error(0, 2).relative_l2, error(1, 2).relative_l2
    )


def with_numerics(module: Flux | Flux3, numerics: str) -> Flux | Flux3:
    out: Flux | Flux3
    if isinstance(module, Flux3):
        out = Flux3(module.config, torch.float32 if numerics == "exact" else None)
    else:
        out = Flux(module.config, NUMERICS[numerics])
    out.load_state_dict(module.state_dict())
    return out.eval()


def inputs(name: str, module: nn.Module) -> tuple[Given, list[Tensor]]:
    """Return a network's inputs and the stored outputs of its reference, if there are any.

    Inputs are copied: the strides of a tensor from a file decide the order of its sums.
    """
    generator = torch.Generator().manual_seed(7)
    if name == "siglip":
        size = module.config.image_size
        return {"pixels": torch.rand(3, 3, size, size, generator=generator) * 2 - 1}, []
    if name == "redux":
        return {"x": torch.randn(2, 16, TINY_REDUX.siglip_dim, generator=generator)}, []
    kinds = recorded(name, module)
    expected = [
        kinds["out"][key]
        for key in ("encoded", "decoded", "velocity", "features")
        if key in kinds["out"]
    ]
    return {key: x.clone() for key, x in kinds["in"].items()}, expected


def recorded(name: str, *modules: nn.Module) -> dict[str, Given]:
    """Return the tensors in tests/golden, "in" and "out". UserError if of other weights."""
    try:
        return golden(name, *modules)
    except AssertionError as error:
        raise UserError(str(error).partition("\n")[0]) from None


def answer(name: str, module: nn.Module, given: Given) -> list[Tensor]:
    if name.endswith("autoencoder"):
        return [module.encode(given["pixels"]), module.decode(given["latents"])]
    return [module(**given) if name != "siglip" else module(given["pixels"])]


def reference_of(name: str, ours: nn.Module) -> tuple[nn.Module, Callable[[Given], list[Tensor]]]:
    """Return the reference with the weights of `ours`, and a function that runs it."""
    r, config, state = reference, ours.config, ours.state_dict()
    if name.endswith("autoencoder"):
        theirs = r.loaded(
            r.diffusers_autoencoder(config), r.autoencoder_to_diffusers(state, config)
        )

        def both(given):
            return [
                r.diffusers_encode(theirs, given["pixels"]),
                r.diffusers_decode(theirs, given["latents"]),
            ]

        return theirs, both
    if isinstance(ours, Flux3):
        named = reference3.transformer3_to_diffusers(state)
        # as from released files: diffusers keeps the scales of QK-norm in float32
        named = {key: x.float() if ".norm_" in key else x for key, x in named.items()}
        theirs = r.loaded(reference3.diffusers_transformer3(config), named)
        return theirs, lambda given: [reference3.diffusers_velocity3(theirs, **given)]
    if name.startswith("flux"):
        theirs = r.loaded(
            r.diffusers_transformer(config), r.transformer_to_diffusers(state, config)
        )
        return theirs, lambda given: [r.diffusers_velocity(theirs, **given)]
    if name == "t5":
        theirs = r.loaded(r.transformers_t5(config), r.t5_to_transformers(state))
        return theirs, lambda given: [theirs(given["ids"]).last_hidden_state]
    if name == "clip":
        theirs = r.loaded(r.transformers_clip(config, eos_id=2), r.clip_to_transformers(state))
        return theirs, lambda given: [theirs(given["ids"]).pooler_output]
    if name == "siglip":
        theirs = r.randomise(r.transformers_siglip(config), 1).to(
            next(ours.parameters()).dtype
        )  # its head, which we leave out
        theirs = r.loaded(theirs, theirs.state_dict() | state)
        return theirs, lambda given: [theirs(given["pixels"]).last_hidden_state]
    if name == "redux":
        theirs = r.loaded(r.diffusers_redux(config), state)
        return theirs, lambda given: [theirs(given["x"]).image_embeds]
    mistral = name == "mistral"
    theirs = r.with_trunk(r.transformers_language_model(config, r.DEPTH, mistral), state, mistral)
    return theirs, lambda given: [r.transformers_features(theirs, **given, layers=config.layers)]


# ---------------------------------------------------------------- pipelines


@dataclass(frozen=True)
class Run:
    model: str
    family: str  # diffusers' class
    guidance: float | None = None
    images: ImageInputs | None = None
    theirs: dict = field(default_factory=dict)  # the same images, as diffusers' arguments


PHOTO, MASK, PAIR = photo(), soft_mask(), (photo(80, 97, seed=1), photo(150, 70, seed=2))
RUNS = {
    "FLUX.1-dev, text to image": Run("flux.1-dev", "FluxPipeline", 3.0),
    "FLUX.1-Fill": Run(
        "flux.1-fill-dev",
        "FluxFillPipeline",
        20.0,
        ImageInputs((PHOTO,), MASK, mask_threshold=0.5),
        dict(image=PHOTO, mask_image=MASK),
    ),
    "FLUX.2-dev, text to image": Run("flux.2-dev", "Flux2Pipeline", 3.0),
    "FLUX.2-klein, text to image": Run("flux.2-klein-4b", "Flux2KleinPipeline"),
    "FLUX.2-klein, two references": Run(
        "flux.2-klein-4b",
        "Flux2KleinPipeline",
        None,
        ImageInputs(PAIR, reference_limit=1024),
        dict(image=list(PAIR)),
    ),
}


def of_pipeline(
    what: str, run: Run, folder: Path, patch: pytest.MonkeyPatch
) -> Iterator[Float32Row | BFloat16Row]:
    """Yield a pipeline's rows. `Model` lets diffusers encode to the posterior's mean, as we do."""
    model = Model(run.model, folder, patch)
    kept = {} if run.images else recorded(f"pipeline-{run.model}", *model.parts.values())["out"]
    features = (
        TextFeatures(kept["features"].clone(), kept.get("pooled")) if kept else model.features()
    )
    theirs = model.variant(run.family, patch)
    latents = ours_of(model.ours, run, features)
    live = figures(what, [(latents, theirs_of(theirs, model, run, features))])
    yield Float32Row(
        what, "diffusers", live, figures(what, [(latents, kept["latents"])]) if kept else None
    )

    features, theirs = features.to("cpu", torch.bfloat16), theirs.to(torch.bfloat16)
    expected = theirs_of(theirs, model, run, features)
    truth = theirs_of(theirs.to(torch.float32), model, run, features)
    for numerics in PRESETS:
        pipe = flux.load(
            run.model, weights=folder, device="cpu", dtype=torch.bfloat16, numerics=numerics
        )
        yield bfloat16_row(
            what, "diffusers", numerics, [(ours_of(pipe, run, features), expected, truth)]
        )


def ours_of(pipe: flux.Pipeline, run: Run, features: TextFeatures) -> Tensor:
    conditions = run.images and pipe.condition(run.images, WIDTH, HEIGHT)
    return pipe.sample(features, SEEDS, WIDTH, HEIGHT, STEPS, run.guidance, conditions=conditions)


def theirs_of(theirs, model: Model, run: Run, features: TextFeatures) -> Tensor:
    dtype, seen = theirs.transformer.dtype, []
    tokens, pooled = features.to("cpu", dtype)[:2]
    words = dict(prompt_embeds=tokens) | (
        {} if pooled is None else {"pooled_prompt_embeds": pooled}
    )
    theirs(
        **words,
        **run.theirs,
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=STEPS,
        guidance_scale=run.guidance or 1.0,
        latents=noise(model, SEEDS).to(dtype),
        output_type="latent",
        callback_on_step_end=lambda pipe, step, t, values: seen.append(values["latents"]) or {},
    )
    return rearrange(seen[-1], "b (h w) c -> b c h w", h=HEIGHT // 16)

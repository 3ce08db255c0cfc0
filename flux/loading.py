"""`flux.load`: find and check a model's files, and build its networks, which load when they run."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flux import transformer3
from flux.argument_names import explain_other_names
from flux.arguments import optional, shown, to_flag, to_integer, to_number, to_path, to_text
from flux.autoencoder import AutoEncoder
from flux.configs import ModelSpec
from flux.errors import UserError
from flux.pipeline import Networks, Pipeline
from flux.runtime.bfl_autoencoder import bfl_autoencoder
from flux.runtime.devices import can_compile, choose_device, choose_dtype
from flux.runtime.fast import fast_autoencoder, fast_transformer, runs_fast
from flux.runtime.fast3 import fast_transformer3
from flux.runtime.lazy_module import LazyModule
from flux.runtime.options import Offload, RuntimeOptions
from flux.siglip import Redux, ReduxConfig, SigLIP, SigLIPConfig, siglip_ignore_keys
from flux.text_encoder import TextEncoder, build_text_encoder
from flux.transformer import BLOCK_LISTS, NUMERICS, Flux, FluxConfig, Numerics
from flux.transformer3 import Flux3, Flux3Config
from flux.weights.bundles import bundled_parts
from flux.weights.diffusers_names import from_diffusers
from flux.weights.files import is_local, shard_files
from flux.weights.locate import get_spec, locate, with_decoder_of
from flux.weights.quantization import FP8Linear
from flux.weights.tokenizers_in_files import holds_tokenizer


@explain_other_names
def load(
    name: str | None = None,
    weights: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    numerics: str | Numerics = "exact",
    transformer: str | Path | None = None,
    autoencoder: str | Path | None = None,
    text_encoder: str | Path | None = None,
    text_encoder_2: str | Path | None = None,
    tokenizer: str | Path | None = None,
    check_finite: bool = False,
    offload: Offload | None = None,
    max_vram: float | None = None,
    quantize: str | None = None,
    fp8_matmul: bool = False,
    compile: bool = False,
    vae_tile: int | None = None,
    decode_dtype: torch.dtype | None = None,
    fast: bool = True,
    text: TextEncoder | None = None,
) -> Pipeline:
    """Return a pipeline for a model of `flux.MODELS`, or for a transformer file.

    Without `name` and `transformer`, load flux.2-tiny, the embedded toy. Every file is found and
    checked here; UserError says what is wrong with a file.

    weights: folder with the files; else $FLUX_WEIGHTS, the Hugging Face cache, a download.
    device, dtype: default to the best device, and to bfloat16 if the device computes in it.
    numerics: a preset of `flux.transformer.NUMERICS`, or a Numerics.
    transformer, autoencoder, text_encoder, text_encoder_2: files that replace the model's. The
        text encoder of FLUX.1 is CLIP, and its second one T5. Without `name`, the model is the
        first in the table with the shapes of the transformer file. What else lies in that file is
        used too, with a warning: text encoders, and the autoencoder.
    tokenizer: folder with the tokenizer's files; for FLUX.1, with CLIP's and T5's.
    text: a text encoder of your own, instead of the model's, whose files are not looked for.
    check_finite: look for NaN and infinity in all weights, and compare the files' hashes where they
        are known; a warning says of which.
    The other arguments are fields of `RuntimeOptions`.
    """
    options = RuntimeOptions(
        offload,
        optional(to_number, "max_vram", max_vram),
        optional(to_text, "quantize", quantize),
        to_flag("fp8_matmul", fp8_matmul),
        to_flag("compile", compile),
        optional(to_integer, "vae_tile", vae_tile),
        decode_dtype,
        to_flag("fast", fast),
    )
    check_finite = to_flag("check_finite", check_finite)
    weights = optional(to_path, "weights", weights)
    transformer = optional(to_path, "transformer", transformer)
    autoencoder = optional(to_path, "autoencoder", autoencoder)
    text_encoder = optional(to_path, "text_encoder", text_encoder)
    text_encoder_2 = optional(to_path, "text_encoder_2", text_encoder_2)
    tokenizer = optional(to_path, "tokenizer", tokenizer)
    spec = get_spec(optional(to_text, "name", name), transformer)
    if not isinstance(numerics, Numerics):
        presets = ", ".join(NUMERICS)
        if to_text("numerics", numerics) not in NUMERICS:
            raise UserError(f"numerics: unknown (got {numerics!r}, expected one of {presets}).")
        numerics = NUMERICS[numerics]
    if spec.flux3:
        numerics = flux3_numerics(numerics)
    if dtype is not None and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    ):
        raise UserError(
            f"dtype: networks do not compute in this type (got {dtype!r:.40}). "
            "Use torch.bfloat16 or torch.float32."
        )
    if not isinstance(device, str | int | torch.device | None):
        raise UserError(f"device: must be a name such as cuda:1 (got {shown(device)}).")
    chosen = choose_device(device)
    # these replace the model's files, which need not exist
    replaced: dict[str, Any] = local_text_files(spec, text_encoder, text_encoder_2, tokenizer)
    if autoencoder is not None:
        replaced["autoencoder"] = shard_files(autoencoder)
    if transformer is not None:
        replaced["transformer"] = shard_files(transformer)
        replaced |= bundled_parts(replaced["transformer"], spec, replaced)
    if text is None:
        replaced |= tokenizers_in_weights(spec, weights, replaced)
    if "autoencoder" in replaced:
        config = with_decoder_of(spec.autoencoder, replaced["autoencoder"][0])
        spec = replace(spec, autoencoder=config)
    if text is not None and not callable(getattr(text, "encode_one", None)):
        raise UserError(f"text: must be a flux.TextEncoder (got {shown(text)}).")
    files = locate(spec, weights, replaced, with_text=text is None)
    if dtype is None:
        dtype = torch.float32 if spec.embedded else choose_dtype(chosen)
    networks = build_networks(spec, files, chosen, dtype, numerics, check_finite, options, text)
    pipe = Pipeline(spec, networks, files, chosen, dtype, numerics, options)
    given = dict(
        transformer=transformer,
        autoencoder=autoencoder,
        text_encoder=type(text).__name__ if text is not None else text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
    )
    pipe.replaced = {part: Path(path) for part, path in given.items() if path is not None}
    return pipe


def local_text_files(
    spec: ModelSpec, text_encoder: Path | None, text_encoder_2: Path | None, tokenizer: Path | None
) -> dict[str, list[Path] | Path]:
    """Return the given files of text encoders, and folders of tokenizers, by the parts of `locate`.

    A folder may be that of a repository, with tokenizers in folders of their own.
    """
    if text_encoder_2 is not None and not spec.flux1:
        raise UserError(f"text_encoder_2: {spec.name} has one text encoder. Use `text_encoder`.")
    first, second = ("clip", "t5") if spec.flux1 else ("model", "")
    given = {first: text_encoder, second: text_encoder_2}
    files: dict[str, list[Path] | Path] = {
        part: shard_files(path) for part, path in given.items() if path is not None
    }
    if tokenizer is not None:
        if not tokenizer.is_dir():
            raise UserError(
                f"tokenizer: {tokenizer} is not a folder. Pass the folder of its files."
            )
        for part, names in spec.text.tokenizers.items():
            own = tokenizer / Path(names[0]).parent
            files[part] = own if own.is_dir() else tokenizer
    return files


def tokenizers_in_weights(
    spec: ModelSpec, weights: Path | None, replaced: Mapping[str, Any]
) -> dict[str, Path]:
    """Return the given files that hold a tokenizer which would be downloaded otherwise."""
    found = {}
    for part, network, kind in (("t5_tokenizer", "t5", "t5"), ("tokenizer", "model", "qwen")):
        names = spec.text.tokenizers.get(part, ())
        if part in replaced or network not in replaced or not names or spec.embedded:
            continue
        if all(is_local(spec.repository, name, weights) for name in names):
            continue
        for file in replaced[network]:
            if holds_tokenizer(file, kind):
                found[part] = file
                warnings.warn(f"the tokenizer is read from {file}", stacklevel=3)
                break
    return found


def build_networks(
    spec: ModelSpec,
    files: dict,
    device: torch.device,
    dtype: torch.dtype,
    numerics: Numerics,
    check_finite: bool,
    options: RuntimeOptions,
    text: TextEncoder | None = None,
) -> Networks:
    """Return a model's networks, whose files are checked now and loaded when they are called."""
    if options.compile and not can_compile(device):
        compiler = "Triton" if device.type == "cuda" else "a C++ compiler"
        raise UserError(f"compile: {compiler} is missing. Install it, or leave `compile` out.")
    if options.quantize == "fp8" and device.type == "mps":
        raise UserError('quantize: Apple\'s GPUs have no float8 (got fp8). Use `quantize="int8"`.')
    common: dict[str, Any] = dict(
        device=device,
        dtype=dtype,
        check_finite=check_finite,
        quantize=options.quantize,
        fp8_matmul=options.fp8_matmul,
    )

    fast = options.fast and runs_fast(numerics, device.type)
    adapt_autoencoder = fast_autoencoder if fast else None
    if numerics.decode == "bfl":
        adapt_autoencoder = bfl_autoencoder

    def build_transformer(config: FluxConfig | Flux3Config) -> Flux | Flux3:
        if isinstance(config, FluxConfig):
            return Flux(config, numerics)
        return Flux3(config, torch.float32 if numerics.modulation == "float32" else None)

    if text is None:
        text = build_text_encoder(spec.text, files, spec.text_length, **common)
    transformer: LazyModule[Any] = LazyModule(
        build_transformer,
        spec.transformer,
        files["transformer"],
        block_lists=transformer3.BLOCK_LISTS if spec.flux3 else BLOCK_LISTS,
        compile=options.compile,
        repeated=True,
        adapt=(fast_transformer3 if spec.flux3 else fast_transformer) if fast else None,
        **common,
    )
    if (
        options.fp8_matmul
        and options.quantize != "fp8"
        and not has_fp8(transformer, *text.networks)
    ):
        raise UserError(
            f"fp8_matmul: {spec.name} has no float8 weights here. "
            'Add `quantize="fp8"`, or use an -fp8 file.'
        )

    def load_autoencoder(dtype: torch.dtype, check_finite: bool) -> LazyModule:
        return LazyModule(
            AutoEncoder,
            spec.autoencoder,
            files["autoencoder"],
            rename=from_diffusers,
            adapt=adapt_autoencoder,
            device=device,
            dtype=dtype,
            check_finite=check_finite,
        )

    # images are encoded in float32, as in BFL's code: bfloat16 moves latents by some per cent
    image_encoder = load_autoencoder(torch.float32, check_finite=False)
    autoencoder = load_autoencoder(
        options.decode_dtype or decode_dtype(numerics, dtype), check_finite
    )
    redux: tuple[LazyModule[Any], ...] = ()
    if "redux" in files:
        siglip = LazyModule(
            SigLIP, SigLIPConfig(), files["siglip"], ignore_keys=siglip_ignore_keys, **common
        )
        redux = siglip, LazyModule(Redux, ReduxConfig(), files["redux"], **common)
    return Networks(text, transformer, autoencoder, image_encoder, redux)


def flux3_numerics(numerics: Numerics) -> Numerics:
    """Return the numerics of a FLUX 3 model.

    Black Forest Labs' code keeps the latents in float32 and decodes in float32, by what its ports
    do; that of FLUX.1 and FLUX.2 does not.
    """
    state = "float32" if numerics.state == "bfl" else numerics.state
    decode = "float32" if numerics.decode == "bfl" else numerics.decode
    return replace(numerics, state=state, decode=decode)


def decode_dtype(numerics: Numerics, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the decoder's weights: the model's, or float32."""
    return dtype if numerics.decode == "model" else torch.float32


def has_fp8(*networks: LazyModule) -> bool:
    return any(
        isinstance(layer, FP8Linear) for network in networks for layer in network.shapes.modules()
    )

"""Inspect files of networks: transformers, the parts of a whole model, and what extends a model."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from flux.autoencoder import AutoEncoder
from flux.configs import MODELS, ModelSpec
from flux.controlnet import ControlNet, load_network
from flux.errors import UserError
from flux.ip_adapter import tensor_names
from flux.runtime.lazy_module import LazyModule
from flux.siglip import Redux, ReduxConfig, SigLIP, SigLIPConfig, siglip_ignore_keys
from flux.text_encoder import build_networks
from flux.transformer3 import Flux3Config
from flux.weights import families
from flux.weights.diffusers_names import from_diffusers
from flux.weights.files import preview, shard_files
from flux.weights.inspection.report import MAX_VALUE, Inspection, inspect_plain, notes_and_refusals
from flux.weights.load import find_prefix, infer_config, read_headers, split_parts
from flux.weights.locate import build_transformer, get_spec, with_decoder_of
from flux.weights.quantization import QuantizedLinear

CPU: dict[str, Any] = dict(device=torch.device("cpu"), dtype=torch.float32)
NETWORKS = {  # what a network looks like -> its part, and what takes its file
    "an autoencoder": ("autoencoder", "; pass it as `autoencoder`"),
    "an autoencoder in diffusers' layout": ("autoencoder", "; pass it as `autoencoder`"),
    "a CLIP text encoder": ("clip", "; pass it as `text_encoder`"),
    "a T5 text encoder": ("t5", "; pass it as `text_encoder_2`"),
    "a language model": ("model", "; pass it as `text_encoder`"),
    "an image encoder, SigLIP or CLIP": ("siglip", ""),
    "the FLUX.1 Redux adapter": ("redux", ""),
    "a ControlNet": ("controlnet", "; scripts/examples/controlnet.py reads it"),
    "an IP-adapter": ("ip_adapter", "; scripts/examples/ip_adapter.py reads it"),
}
SAME_SIZES = (
    "Qwen3-4B, of FLUX.2 [klein], and Qwen3-VL-4B, of FLUX 3, have the same sizes: the file fits "
    "both, but holds the weights of one"
)


def own_rows() -> list[ModelSpec]:
    """Return the rows of models, without those of other files of their transformers."""
    return [row for row in MODELS.values() if row.weight_format == "bfloat16"]


def inspect_parts(path: Path, found: Inspection) -> None:
    """Describe the text encoders and the autoencoder in a checkpoint."""
    inspect_plain(path, found)
    for prefix, part in split_parts(read_headers(shard_files(path))[0]).items():
        kind = families.looks_like(part)
        found.add("also holds", f"{prefix}* ({kind})")
        _inspect_network(kind, path, found)


def inspect_one(path: Path, found: Inspection) -> None:
    inspect_plain(path, found)
    _inspect_network(families.looks_like(read_headers(shard_files(path))[0]), path, found)


def inspect_transformer(path: Path, found: Inspection) -> None:
    files = shard_files(path)
    with notes_and_refusals(found):
        config = infer_config(path)
        flux3 = isinstance(config, Flux3Config)
        first = "emb_in.image.weight" if flux3 else "img_in.weight"
        if prefix := find_prefix(read_headers(files)[0], (first,)):
            found.add("prefix", f"{prefix:.{MAX_VALUE}}")
        if isinstance(config, Flux3Config):
            kind, extra = "mode", "a flow map" if config.flow_map else "a base model"
        else:
            kind, extra = "double", f"{'with' if config.guidance else 'without'} a guidance input"
        found.add(
            "network",
            f"{config.depth} {kind} and {config.depth_single} single blocks of width "
            f"{config.hidden_size}, {config.in_channels} channels, text of width "
            f"{config.context_dim}, {extra}",
        )
        network: LazyModule = LazyModule(build_transformer, config, files, **CPU)
        found.add("quantized", _quantized(network.shapes))
        spec = get_spec(None, path)
        alike = [row.name for row in own_rows() if row.transformer == spec.transformer]
        names = dict.fromkeys([spec.name, *alike])
        found.add("fits", f"{preview(list(names), 6)}; pass it as `transformer`")
    inspect_parts(path, found)


def _inspect_network(kind: str, path: Path, found: Inspection) -> None:
    """Describe a network other than a transformer, with the models that it fits."""
    files = shard_files(path)
    with notes_and_refusals(found):
        if kind not in NETWORKS:
            infer_config(path)
            return
        part, use = NETWORKS[kind]
        network: torch.nn.Module | None = None
        fits: list[str] = []
        layers: list[str] = []
        refusals: list[UserError] = []
        for build, names in _candidates(part, files):
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                try:
                    network = build()
                    layers.append(_quantized(network))
                    fits += names
                except UserError as error:
                    refusals.append(error)
                    notes.clear()  # of a model that the file does not fit
            for note in notes:
                warnings.warn(str(note.message), stacklevel=2)
        if not fits:
            # of the likeliest model: of as many channels, and with the fewest tensors to name
            raise min(refusals, key=lambda error: ("channels, but" in str(error), len(str(error))))
        if isinstance(network, ControlNet):
            found.add("network", _controlnet(network))
        for text in dict.fromkeys(layers):
            found.add("quantized", text)
        of_flux3 = [name for name in fits if MODELS[name].flux3] if part == "model" else []
        if of_flux3 and of_flux3 != fits:
            found.add("note", SAME_SIZES)
        found.add("fits", f"{preview(fits, 6)}{use}")


def _controlnet(network: ControlNet) -> str:
    c, modes = network.config, network.controlnet_mode_embedder
    control = "latents" if network.input_hint_block is None else "pixels"
    union = f", {modes.num_embeddings} modes" if modes is not None else ""
    return (
        f"{c.depth} double and {c.depth_single} single blocks of width {c.hidden_size}, "
        f"{c.in_channels} channels, the control image as {control}{union}"
    )


def _quantized(module: torch.nn.Module) -> str:
    """Return how many layers are quantized, by the class that holds them."""
    layers = Counter(
        f"{type(part).__name__}{_block(part)}"
        for part in module.modules()
        if isinstance(part, QuantizedLinear)
    )
    return ", ".join(f"{count} {name}" for name, count in layers.most_common()) or "nothing"


def _block(part: torch.nn.Module) -> str:
    return f" ({part.kind})" if hasattr(part, "kind") else ""


def _candidates(
    part: str, files: list[Path]
) -> Iterator[tuple[Callable[[], torch.nn.Module], list[str]]]:
    """Yield, for each configuration of this part, what checks the files, and its models' names."""
    rows: dict[Any, list[ModelSpec]] = {}
    for row in own_rows():
        config: Any = None
        if part == "autoencoder":
            config = with_decoder_of(row.autoencoder, files[0])
        elif part in row.text.networks:
            config = getattr(row.text, part)
        elif row.addon and part in dict(row.addon.files):
            config = part
        elif part in ("controlnet", "ip_adapter") and row.flux1:
            config = row.transformer
        if config is not None:
            rows.setdefault(config, []).append(row)
    for config, of in rows.items():

        def build(config: Any = config, row: ModelSpec = of[0]) -> torch.nn.Module:
            if part == "controlnet":
                return load_network(files, row, torch.device("meta"), torch.float32)
            if part == "ip_adapter":
                tensor_names(files[0], row)
                return torch.nn.Module()
            if part == "autoencoder":
                return LazyModule(AutoEncoder, config, files, rename=from_diffusers, **CPU).shapes
            if part == "siglip":
                ignored: dict[str, Any] = dict(ignore_keys=siglip_ignore_keys)
                return LazyModule(SigLIP, SigLIPConfig(), files, **ignored, **CPU).shapes
            if part == "redux":
                return LazyModule(Redux, ReduxConfig(), files, **CPU).shapes
            return build_networks(row.text, {part: files}, **CPU)[part].shapes

        yield build, [row.name for row in of]

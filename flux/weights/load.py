"""Weights: check files, and map them, strictly, into a module that was built on the meta device.

Our module names are the released checkpoints' keys, so nothing is renamed. A file is mapped, not read: its tensors are
the file's own pages, and take no memory of their own until they are cast or moved. Nothing is ever unpickled.
Linears whose weights the file keeps quantised are replaced by modules that keep them so.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from flux.errors import UserError
from flux.transformer import FluxConfig
from flux.weights import quantization
from flux.weights.files import FLOATS, TensorInfo, preview, read_header, shard_files
from flux.weights.quantization import QuantizedLinear, gguf

TYPES = {
    torch.int64: ("I64",),
    torch.uint8: ("U8",),
    torch.float8_e4m3fn: ("F8_E4M3",),
    torch.float8_e5m2: ("F8_E5M2",),
}

# ---------------------------------------------------------------------------------------------------------- loading


class skip_init(TorchFunctionMode):
    """Inside, `torch.nn.init` does nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawing = getattr(func, "__module__", None) == "torch.nn.init"
        return kwargs["tensor"] if drawing else func(*args, **(kwargs or {}))


def init_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, on the meta device: shapes without values. None are drawn: there, to draw those of an Embedding
    takes torch's compiler, and to import that takes as long as to import torch."""
    with torch.device("meta"), skip_init():
        return build()


def load_module(
    module: nn.Module,
    files: Sequence[Path],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    prefixes: Sequence[str] = ("",),
    ignore_keys: Callable[[str], bool] = lambda name: False,
    rename: Callable[[str], str] | None = None,
    check_finite: bool = False,
) -> None:
    """Give the tensors of `files` to a module that was built on the meta device, frozen, in evaluation mode.

    On the CPU and in the files' own `dtype` they stay mapped; else the floats are cast, one tensor at a time, but for quantised
    weights and their scales: Linears with such become QuantizedLinears.
    `prefixes`: what may stand before the names in the files; the one that fits best is taken away. `ignore_keys`: which of
    the names left are known and not wanted. `rename`: from these to the module's, for a foreign layout.
    UserError, before anything is loaded, if a tensor is missing, unknown, misshapen or of a wrong type.
    """
    infos, metadata = _merged_headers(files)
    sources = _sources(infos, module.state_dict(), prefixes, ignore_keys, rename)
    layers = _quantised_layers(module, sources, metadata)
    kept = {
        f"{path}.{name}": buffer
        for path, layer in layers.items()
        for name, buffer in layer.named_buffers()
    }
    wanted = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name.removesuffix(".weight") not in layers
    } | kept
    sources = {
        name: info for name, info in sources.items() if not quantization.is_quant_metadata(name)
    }
    _check_fit(type(module).__name__, files, wanted, sources, renamed=rename is not None)
    tensors = {}
    for name, tensor in _mapped(sources):
        if check_finite and tensor.is_floating_point() and not tensor.float().isfinite().all():
            file, source = sources[name].file, sources[name].name
            raise UserError(f"{file} has NaN or infinity in {source!r:.120}; download it again.")
        cast = tensor.is_floating_point() and name not in kept
        tensors[name] = tensor.view(wanted[name].shape).to(
            device=device, dtype=dtype if cast else None
        )
    for path, layer in layers.items():
        module.set_submodule(path, layer)
    module.requires_grad_(False).load_state_dict(tensors, strict=True, assign=True)
    for path, layer in layers.items() if check_finite else ():  # scales may be inside of bytes
        if not layer.dequantize().isfinite().all():
            source = sources[f"{path}.weight"]
            raise UserError(
                f"{source.file} has NaN or infinity in {source.name!r:.120}; download it again."
            )
    module.eval()


def _quantised_layers(
    module: nn.Module, sources: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> dict[str, QuantizedLinear]:
    """What to put in place of Linears, by their paths; without weights yet."""
    linears = {
        path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)
    }
    stored = quantization.detect_formats(sources, metadata, linears)
    with torch.device("meta"):
        return {
            path: stored[path].make(layer.in_features, layer.out_features, layer.bias is not None)
            for path, layer in linears.items()
            if path in stored
        }


def _mapped(sources: Mapping[str, TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name -> tensor, whose memory is the pages of its file."""
    for file in {info.file: None for info in sources.values()}:
        names = {name: info.name for name, info in sources.items() if info.file == file}
        if _is_gguf(file):
            tensors = gguf.tensors(file)
            yield from ((name, tensors[source]) for name, source in names.items())
            continue
        try:
            with safe_open(file, framework="pt", device="cpu") as mapped:
                yield from ((name, mapped.get_tensor(source)) for name, source in names.items())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be mapped: {error}.") from error


def _merged_headers(files: Sequence[Path]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    merged: dict[str, TensorInfo] = {}
    notes: dict[str, str] = {}
    for file in files:
        infos, metadata = gguf.read_header(file) if _is_gguf(file) else read_header(file)
        for name in merged.keys() & infos.keys():
            raise UserError(
                f"{merged[name].file} and {file} do not belong together: both hold {name!r:.120}."
            )
        merged |= infos
        notes |= metadata
    return merged, notes


def _is_gguf(file: Path) -> bool:
    try:
        if not file.is_file():  # a pipe would have to be waited for
            return False
        with open(file, "rb") as start:
            return start.read(4) == b"GGUF"
    except OSError:  # which reading the header will tell
        return False


def _sources(
    infos: Mapping[str, TensorInfo],
    wanted: Iterable[str],
    prefixes: Sequence[str],
    ignore_keys: Callable[[str], bool],
    rename: Callable[[str], str] | None,
) -> dict[str, TensorInfo]:
    """Name in the module -> tensor in the files, for every one that is not `ignore_keys`."""

    def without(prefix: str) -> dict[str, str]:
        names = {
            source: _canonical(source.removeprefix(prefix))
            for source in infos
            if not _of_another(source, prefix)
        }
        return {
            source: rename(name) if rename else name
            for source, name in names.items()
            if not ignore_keys(name)
        }

    names = max(map(without, prefixes), key=lambda names: len(set(wanted) & set(names.values())))
    sources: dict[str, TensorInfo] = {}
    for source, name in names.items():
        if name in sources:
            raise UserError(
                f"{infos[source].file} has {name!r:.120} twice: {sources[name].name!r:.120}, {source!r:.120}."
            )
        sources[name] = infos[source]
    return sources


def _of_another(name: str, prefix: str) -> bool:
    """Whether a tensor belongs to another network: ComfyUI keeps all of a model, and even tokenizers, in one file."""
    others = r"(vae|first_stage_model|text_encoders|cond_stage_model|conditioner)\.|(tekken|spiece)_model$"
    return bool(re.match(others, name)) and not (prefix and name.startswith(prefix))


def _canonical(name: str) -> str:
    # Some community files call the scale of the query and key norms "weight", as torch.nn.RMSNorm does.
    return re.sub(r"\b(query|key)_norm\.weight$", r"\1_norm.scale", quantization.canonical(name))


def _check_fit(
    module: str,
    files: Sequence[Path],
    wanted: Mapping[str, torch.Tensor],
    sources: Mapping[str, TensorInfo],
    renamed: bool,
) -> None:
    """UserError unless there is a tensor of the right shape and type for every wanted one, and no other."""
    faults: dict[str, list[str]] = {
        "missing": [repr(name) for name in wanted if name not in sources]
    }
    for name, info in sources.items():
        tensor = wanted.get(name)
        shown = f"{info.name!r:.120}" + (f" in {info.file.name}" if len(files) > 1 else "")
        if tensor is None:
            faults.setdefault("unknown", []).append(shown)
            continue
        if info.dtype in gguf.BLOCKS and tensor.dtype == torch.uint8:
            info = info._replace(dtype="U8", shape=gguf.stored_shape(info.dtype, info.shape))
        # diffusers keeps the 1x1 convolutions of an autoencoder as Linear: (C, C) for our (C, C, 1, 1)
        if tensor.shape not in (info.shape, (*info.shape, 1, 1) if renamed else info.shape):
            faults.setdefault("misshapen", []).append(
                f"{shown} is {info.shape!s:.120} and not {tuple(tensor.shape)}"
            )
        if info.dtype not in (types := TYPES.get(tensor.dtype, (*FLOATS, "F8_E4M3", "F8_E5M2"))):
            faults.setdefault("of a wrong type", []).append(
                f"{shown} is {info.dtype} and not {'/'.join(types)}"
            )
    if not any(faults.values()):
        return
    listed = "; ".join(
        f"{len(names)} {fault} ({preview(names)})" for fault, names in faults.items() if names
    )
    kind, right = (
        _looks_like(sources),
        _looks_like(wanted),
    )  # in the module's names: less prefix, and renamed
    if kind != right:
        listed += f"; the file looks like {kind}, and {right} is wanted"
    elif faults["missing"] and "unknown" in faults:
        nearest = difflib.get_close_matches(faults["missing"][0], faults["unknown"], 1)
        listed += f"; {nearest[0]} is close to {faults['missing'][0]}" if nearest else ""
    place = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    raise UserError(f"{place} does not fit {module}: of {len(wanted)} tensors, {listed}.")


KINDS = (  # marks in the names of tensors, and what they are the marks of; the first one found counts
    (r"\.lora_|^lora_|\.lokr_|\.hada_", "a LoRA"),
    (r"^redux_(up|down)\.", "the FLUX.1 Redux adapter"),
    (r"transformer_blocks\.\d|^x_embedder\.", "a transformer in diffusers' layout"),
    (r"double_stream_modulation_img\.", "a FLUX.2 transformer"),
    (r"double_blocks\.\d", "a FLUX.1 transformer"),
    (r"(down|up)_blocks\.\d+\.resnets\.", "an autoencoder in diffusers' layout"),
    (r"(encoder\.down|decoder\.up)\.\d", "an autoencoder"),
    (r"text_model\.", "a CLIP text encoder"),
    (r"encoder\.block\.\d+\.layer\.", "a T5 text encoder"),
    (r"layers\.\d+\.mlp\.gate_proj\.", "a language model"),
)


def _looks_like(names: Iterable[str]) -> str:
    names = list(names)
    return next(
        (kind for mark, kind in KINDS if any(re.search(mark, name) for name in names)),
        "something else",
    )


def infer_config(path: Path) -> FluxConfig:
    """The configuration of a transformer in BFL's layout, from the names and shapes in its file (or index)."""
    infos, metadata = _merged_headers(shard_files(path))
    prefix = "model.diffusion_model."
    names = {
        _canonical(name.removeprefix(prefix)): info
        for name, info in infos.items()
        if not _of_another(name, prefix)
    }
    layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    stored = quantization.detect_formats(names, metadata, layers)
    shapes = {name: info.shape for name, info in names.items()} | {
        f"{layer}.weight": stored[layer].shape for layer in stored
    }

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != dimensions or 0 in shapes[name]:
            fault = "has no" if name not in shapes else f"has shape {shapes[name]!s:.120} for"
            kind = f"it {fault} '{name}' and looks like {_looks_like(infos)}"
            raise UserError(f"{path} is not a whole FLUX transformer in BFL's layout: {kind}.")
        return shapes[name]

    def count(blocks: str) -> int:
        return len({name.split(".")[1] for name in names if name.startswith(blocks)})

    hidden_size, in_channels = shape("img_in.weight")
    (head_dim,) = shape("double_blocks.0.img_attn.norm.query_norm.scale", 1)
    mlp_rows, mlp_size = (
        shape("double_blocks.0.img_mlp.0.weight")[0],
        shape("double_blocks.0.img_mlp.2.weight")[1],
    )
    flux2 = "double_stream_modulation_img.lin.weight" in names
    shares = (
        (1, 1, 1, 1) if flux2 else (2, 7, 7)
    )  # no tensor tells the axes or theta; each family has one choice
    if (
        hidden_size % head_dim
        or head_dim % (2 * sum(shares))
        or mlp_rows not in (mlp_size, 2 * mlp_size)
    ):
        sizes = (
            f"hidden size {hidden_size}, heads of {head_dim}, an MLP of {mlp_rows} and {mlp_size}"
        )
        raise UserError(f"{path} has sizes of no FLUX transformer: {sizes}.")
    return FluxConfig(
        in_channels=in_channels,
        out_channels=shape("final_layer.linear.weight")[0],
        context_dim=shape("txt_in.weight")[1],
        hidden_size=hidden_size,
        num_heads=hidden_size // head_dim,
        depth=count("double_blocks."),
        depth_single=count("single_blocks."),
        mlp_ratio=mlp_size / hidden_size,
        axes_dim=tuple(head_dim * share // sum(shares) for share in shares),
        theta=2000 if flux2 else 10000,
        vector_dim=shape("vector_in.in_layer.weight")[1]
        if "vector_in.in_layer.weight" in names
        else None,
        guidance="guidance_in.in_layer.weight" in names,
        bias="img_in.bias" in names,
        gated_mlp=mlp_rows == 2 * mlp_size,
        shared_modulation=flux2,
    )

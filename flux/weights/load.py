"""Load weight files, strictly, into a module that was built on the meta device.

Our module names are the released checkpoints' keys, so nothing is renamed. A file is mapped, not
read: its tensors are pages of the file, and take no memory until they are cast or moved.
Linears whose weights the file stores quantized are replaced by modules that keep them quantized.
Nothing is ever unpickled.
"""

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import prod
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flux import progress
from flux.errors import UserError
from flux.transformer import FluxConfig
from flux.transformer3 import Flux3Config, MLPEmbedder
from flux.weights.checksums import check_hashes
from flux.weights.diffusers_transformer import join_diffusers
from flux.weights.families import USES, foreign_family, looks_like
from flux.weights.files import BITS, FLOATS, TensorInfo, preview, read_header, shard_files
from flux.weights.infer3 import ANCHOR3, SIZES3, config3
from flux.weights.mapping import map_tensors, meta_tensors, warn_of_network
from flux.weights.quantization import (
    GGUFEmbedding,
    QuantizedLinear,
    canonical,
    check_scales,
    detect_formats,
    gguf,
    is_quant_metadata,
    join_parts,
    leaves,
    part_names,
)

# ---------------------------------------------------------------- modules without values


class skip_init(TorchFunctionMode):
    """Make `torch.nn.init` do nothing inside this context."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def init_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """Return `build()` on the meta device: shapes without values, and no random numbers drawn.

    Drawing an Embedding on the meta device would import torch's compiler, which takes as long as
    importing torch.
    """
    with torch.device("meta"), skip_init():
        return build()


# ---------------------------------------------------------------- loading


def keep_all(name: str) -> bool:
    """The default of `ignore_keys`: ignore no tensor."""
    return False


def load_module(
    module: nn.Module,
    files: Sequence[Path],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore_keys: Callable[[str], bool] = keep_all,
    rename: Callable[[str], str] | None = None,
    reorder: Callable[[TensorInfo, torch.Tensor, Mapping], torch.Tensor] | None = None,
    second_names: Mapping[str, str] = {},
    check_finite: bool = False,
) -> None:
    """Load `files` into a module on the meta device; freeze it and set evaluation mode.

    On the CPU and in the files' dtype (`dtype=None`) tensors stay mapped. Otherwise floats are
    cast one tensor at a time, except quantized weights and their scales. On the meta device nothing
    is read but the headers and the scales of matrices and rows (`check_scales`).

    What stands before most of the module's names in the files is removed from them (`find_prefix`).
    Tensors that no network reads, such as counters, are passed over.

    ignore_keys: whether a tensor of this name, without prefix, is expected but not needed.
    rename: from a name in the file, without prefix, to the module's name, for a foreign layout.
    reorder: puts the rows of a tensor into the module's order, for a foreign layout; takes the
        description of the tensor in its file, the tensor, and the metadata of the files.
    second_names: other names of the module's tensors, for files that lack the first names.
    check_finite: raise UserError if a weight is NaN or infinite, or if a file has not the hash that
        Hugging Face states (`check_hashes`).

    UserError, before anything is loaded, if a tensor is missing, or of a wrong shape or dtype, and
    for unknown tensors that could change the result. A warning names the other unknown tensors.
    """
    if check_finite:
        check_hashes(files)
    infos, metadata = read_headers(files)
    sources = _match_names(
        join_diffusers(infos), module.state_dict(), ignore_keys, rename, second_names
    )
    layers = _quantized_layers(module, sources, metadata)
    embeddings = _embeddings(module)
    quantized = {
        f"{path}.{name}": buffer
        for path, layer in layers.items()
        for name, buffer in layer.named_buffers()
    }
    expected = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name.removesuffix(".weight") not in layers
    }
    expected |= quantized
    sources = {name: info for name, info in sources.items() if not is_quant_metadata(name)}
    counters = _counters_to_reset(expected, sources)
    tensors = {name: torch.zeros((), dtype=torch.int64, device=device) for name in counters}
    expected = {name: tensor for name, tensor in expected.items() if name not in tensors}
    sources = {name: info for name, info in sources.items() if name not in tensors}
    if expected.keys() <= sources.keys():
        _pass_over_unread(module, layers, expected, sources)
    _check_fit(type(module).__name__, files, expected, sources, renamed=rename is not None)
    check_scales(leaves(layers), sources)
    stored = {name: gguf.stored(info) for name, info in sources.items()}
    on_meta = torch.device(device).type == "meta" and not check_finite
    if on_meta:
        found = meta_tensors(stored)
    else:
        copied = torch.device(device).type != "cpu"
        if not copied:
            warn_of_network(files)
        found = map_tensors(stored, copied=copied)
        sizes = {name: prod(i.shape) * BITS[i.dtype] / 8e9 for name, i in stored.items()}
        what = f"loading {files[0].name}"
        found = progress.measured(found, sum(sizes.values()), lambda t: sizes[t[0]], what, "GB")
    for name, tensor in found:
        if check_finite and tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise _not_finite(sources[name])
        cast = tensor.is_floating_point() and name not in quantized
        tensor = tensor.view(expected[name].shape)
        if reorder:
            tensor = reorder(sources[name], tensor, metadata)
        tensors[name] = tensor.to(device=device, dtype=dtype if cast else None)
    for path, layer in layers.items():
        if isinstance(layer, GGUFEmbedding) and dtype:
            layer.dtype = dtype
        module.set_submodule(path, layer)
    module.requires_grad_(False).load_state_dict(tensors, strict=True, assign=True)
    if check_finite:
        for path, layer in leaves(layers).items():  # GGUF has scales inside its bytes
            values, info = layer.dequantize(), sources[f"{path}.weight"]
            if not values.isfinite().all():
                raise _not_finite(info)
            if not values.any() and len(layer.weight.view(torch.uint8).unique()) > 1:
                raise UserError(
                    f"{info.file} has scales of zero for {info.name!r:.120}; download it again."
                )
    for path in embeddings:  # of these, only ggml's blocks stay quantized
        if path in layers and not isinstance(layers[path], GGUFEmbedding):
            table = layers[path].dequantize().to(dtype)
            module.set_submodule(path, nn.Embedding.from_pretrained(table))
    for path in _time_embeddings(module) & layers.keys():
        layer, wide = layers[path], dtype or next(module.parameters()).dtype
        weight = torch.empty(layer.out_features, layer.in_features, dtype=wide, device="meta")
        weight = weight if on_meta else layer.rounded_weight(wide)
        module.set_submodule(path, layer.to_linear(weight))
    module.eval()


def _counters_to_reset(
    expected: Mapping[str, torch.Tensor], sources: Mapping[str, TensorInfo]
) -> list[str]:
    """Return BatchNorm's counters that the file lacks, or has in another dtype.

    Only training reads these counters.
    """
    return [
        name
        for name in expected
        if name.endswith("num_batches_tracked")
        and (name not in sources or sources[name][:2] != ("I64", ()))
    ]


def match_tensors(module: nn.Module, files: Sequence[Path]) -> dict[str, TensorInfo]:
    """Return the files' tensors by the names of a module, in either layout, quantized or not."""
    infos, _ = read_headers(files)
    return _match_names(join_diffusers(infos), module.state_dict(), keep_all, None, {})


def _not_finite(info: TensorInfo) -> UserError:
    return UserError(f"{info.file} has NaN or infinity in {info.name!r:.120}; download it again.")


def read_headers(files: Sequence[Path]) -> tuple[dict[str, TensorInfo], dict]:
    """Return the tensors and the metadata of all files.

    UserError if two tensors have the same name, or if parts of a split GGUF file are missing.
    """
    merged: dict[str, TensorInfo] = {}
    merged_metadata: dict = {}
    for file in files:
        infos, metadata = gguf.read_header(file) if _is_gguf(file) else read_header(file)
        if (count := metadata.get(gguf.SPLIT_COUNT) or 1) != 1 and count != len(files):
            raise UserError(
                f"{file} is one of {count} parts of a GGUF file. Put all parts into one folder, "
                "under their first names: NAME-00001-of-00003.gguf and so on."
            )
        for name in merged.keys() & infos.keys():
            raise UserError(
                f"{merged[name].file} and {file} do not belong together: both hold {name!r:.120}."
            )
        merged |= infos
        merged_metadata |= metadata
    plain = {WRAPPERS.sub("", name): info for name, info in merged.items()}
    return (plain if len(plain) == len(merged) else merged), merged_metadata


# torch.compile, FSDP and gradient checkpointing wrap modules, and put these into their names.
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _is_gguf(file: Path) -> bool:
    try:
        if not file.is_file():  # opening a pipe would wait for its writer
            return False
        with open(file, "rb") as start:
            return start.read(4) == b"GGUF"
    except OSError:  # `read_header` reports the error
        return False


PREFIX_PARTS = 8  # looked for; a foreign name may have thousands of dots


def find_prefix(
    names: Iterable[str], expected: Collection[str], rename: Callable[[str], str] = str
) -> str:
    """Return what stands before most of the `expected` names: "", "module.", "vae." and others.

    Other programs put the path of the network in their own model before every name.
    """
    counts: Counter[str] = Counter()
    for name in names:
        dots = islice(re.finditer(r"\.", name), PREFIX_PARTS)
        for start in (0, *(dot.end() for dot in dots)):
            if rename(name[start:]) in expected:
                counts[name[:start]] += 1
    best = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")
    return best if 2 * counts[best] > len(expected) else ""


def _match_names(
    infos: Mapping[str, TensorInfo],
    expected: Iterable[str],
    ignore_keys: Callable[[str], bool],
    rename: Callable[[str], str] | None,
    second_names: Mapping[str, str],
) -> dict[str, TensorInfo]:
    """Return the files' tensors by the module's names, without those that nothing reads."""
    expected = set(expected)
    rename = rename or str
    sources: dict[str, TensorInfo] = {}
    for name, info in _of_network(infos, expected, rename):
        name = rename(name)
        if name in sources:
            raise UserError(
                f"{info.file} has {name!r:.120} twice: {sources[name].name!r:.120}, "
                f"{info.name!r:.120}."
            )
        sources[name] = info
    for second, first in second_names.items():
        if second in sources and first not in sources:
            sources[first] = sources[second]
    return {
        name: info
        for name, info in sources.items()
        if name in expected or not (ignore_keys(name) or _is_unread(name, info))
    }


def _is_unread(name: str, info: TensorInfo) -> bool:
    """Return whether no network reads a tensor. ComfyUI's marker is empty, and is read."""
    return bool(UNREAD.search(name)) or 0 in info.shape and not is_quant_metadata(name)


PART = re.compile(r"(?:vae|first_stage_model|text_encoders\.\w+\.transformer)\.")


def split_parts(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return the autoencoder and each text encoder of a ComfyUI checkpoint: prefix -> tensors.

    The names of the tensors are without the prefix. The transformer is no such part.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        if match := PART.match(name):
            parts.setdefault(match[0], {})[name[match.end() :]] = info
    return parts


def _of_network(
    infos: Mapping[str, TensorInfo], expected: Collection[str], rename: Callable[[str], str] = str
) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the canonical names, without prefix, and the tensors of the network of these names.

    ComfyUI keeps all networks of a model, and even tokenizers, in one file.
    """
    prefix = find_prefix(infos, expected, rename)
    for name, info in infos.items():
        inside = name.startswith(prefix) if prefix else not OTHER_NETWORKS.match(name)
        if inside or is_quant_metadata(f".{name}") and "." not in name:
            yield _canonical(name.removeprefix(prefix)), info


OTHER_NETWORKS = re.compile(
    r"(vae|first_stage_model|text_encoders|cond_stage_model|conditioner|model_ema)\.|"
    r"(tekken|spiece)_model$"
)
UNREAD = re.compile(  # what transformers and others save beside weights: no network reads it
    r"(^|\.)(num_batches_tracked|position_ids|inv_freq|logit_scale|logit_bias|text_projection|"
    r"text_projection\.weight)$"
)


def _canonical(name: str) -> str:
    # Some community files call the scale of QK-norm "weight", as torch.nn.RMSNorm does.
    name = canonical(name)
    return re.sub(r"\b(query|key)_norm\.weight$", r"\1_norm.scale", name)


def _quantized_layers(
    module: nn.Module, sources: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> dict[str, QuantizedLinear]:
    """Return the replacements of Linears and Embeddings by path, on the meta device."""
    parts = dict(module.named_modules())
    linears = {path: part for path, part in parts.items() if isinstance(part, nn.Linear)}
    tables = [path for path in _embeddings(module) if f"{path}.weight_scale" in sources]
    layers: dict[str, QuantizedLinear] = {}
    with torch.device("meta"):
        names = [*linears, *tables, *part_names(sources)]
        formats = detect_formats(sources, metadata, names)
        layers |= join_parts(sources, formats, linears)
        for path, format in formats.items():
            if path not in parts:
                continue
            columns, rows = reversed(parts[path].weight.shape)
            layers[path] = format.make(
                columns, rows, getattr(parts[path], "bias", None) is not None
            )
        for path in _embeddings(module):
            info = sources.get(f"{path}.weight")
            if info and info.dtype in gguf.BLOCKS:
                rows, columns = parts[path].weight.shape
                layers[path] = GGUFEmbedding(rows, columns, info.dtype)
    return layers


def _time_embeddings(module: nn.Module) -> set[str]:
    """Return the layers of FLUX 3 that round the time to the dtype of their weights."""
    embedders = [p for p, part in module.named_modules() if isinstance(part, MLPEmbedder)]
    return {f"{path}.{name}" for path in embedders for name in ("in_layer", "out_layer")}


def _embeddings(module: nn.Module) -> list[str]:
    return [path for path, part in module.named_modules() if isinstance(part, nn.Embedding)]


# ---------------------------------------------------------------- what does not fit

INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
DTYPES = {  # what a file may hold for a tensor of this dtype; any float for all others
    torch.int64: ("I64",),
    torch.uint8: ("U8",),
    torch.int8: ("I8",),
    torch.float8_e8m0fnu: ("F8_E8M0",),
    torch.float8_e4m3fn: ("F8_E4M3",),
    torch.float8_e5m2: ("F8_E5M2",),
}
VARIANTS = re.compile(  # of our networks have these layers, and others do not
    r"^(vector_in|guidance_in|ref_time_in|(double|single)_stream_modulation\w*|(post_)?quant_conv|"
    r"bn)\.|"
    r"transformer_blocks\.\d"  # in diffusers' layout
)


def _pass_over_unread(
    module: nn.Module,
    layers: Collection[str],
    expected: Collection[str],
    sources: dict[str, TensorInfo],
) -> None:
    """Remove from `sources` the tensors that the network has no place for, with a warning.

    Unknown tensors that could change the result stay, and are refused: those inside a layer of the
    network, but for integers; those of a block more, and of layers that another FLUX network has.

    `layers`: those that are quantized, for which integers count.
    """
    parts = dict(module.named_modules())
    owners = {path for path, part in parts.items() if next(_own_tensors(part), None) is not None}
    lists = {path for path, part in parts.items() if isinstance(part, nn.ModuleList)}
    unread = []
    for name, info in sources.items():
        if name in expected:
            continue
        ends = [name[dot.end() :] for dot in re.finditer(r"\.", name)]
        starts = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
        in_layer = any(path in owners for path in starts)
        integer = info.dtype in INTEGERS and not any(path in layers for path in starts)
        more = any(path not in parts and path.rpartition(".")[0] in lists for path in starts)
        copy = any(end in expected for end in ends)
        if not (in_layer and not integer or more or copy or VARIANTS.search(name)):
            unread.append(name)
    if unread and looks_like(sources) == looks_like(expected):
        shown = preview([f"{sources[name].name!r:.120}" for name in unread])
        warnings.warn(
            f"{sources[unread[0]].file} has tensors that {type(module).__name__} lacks, which are "
            f"left out ({len(unread)}): {shown}",
            stacklevel=3,
        )
        for name in unread:
            del sources[name]


def _own_tensors(part: nn.Module) -> Iterator[torch.Tensor]:
    yield from part.parameters(recurse=False)
    yield from part.buffers(recurse=False)


def _check_fit(
    module: str,
    files: Sequence[Path],
    expected: Mapping[str, torch.Tensor],
    sources: Mapping[str, TensorInfo],
    renamed: bool,
) -> None:
    """Raise UserError unless `sources` are exactly the expected names, shapes and dtypes."""
    missing = [repr(name) for name in expected if name not in sources]
    unknown, misshapen, wrong_dtype = [], [], []
    for name, info in sources.items():
        tensor = expected.get(name)
        shown = f"{info.name!r:.120}"
        if len(files) > 1:
            shown += f" in {info.file.name}"
        if tensor is None:
            unknown.append(shown)
            continue
        if tensor.dtype == torch.uint8:
            info = gguf.stored(info)
        # diffusers stores 1x1 convolutions of an autoencoder as Linear: (C, C), not (C, C, 1, 1)
        shape = (*info.shape, 1, 1) if renamed else info.shape
        if tensor.shape not in (info.shape, shape):
            misshapen.append(f"{shown} is {info.shape!s:.120} and not {tuple(tensor.shape)}")
        dtypes = DTYPES.get(tensor.dtype, (*FLOATS, "F8_E4M3", "F8_E5M2"))
        if info.dtype not in dtypes:
            wrong_dtype.append(f"{shown} is {info.dtype} and not {'/'.join(dtypes)}")
    problems = {
        "missing": missing,
        "unknown": unknown,
        "misshapen": misshapen,
        "of a wrong type": wrong_dtype,
    }
    listed = [
        f"{len(names)} {problem} ({preview(names)})" for problem, names in problems.items() if names
    ]
    if not listed:
        return
    found, needed = looks_like(sources), looks_like(expected)
    if found == needed == "an autoencoder" and has_quant_conv(sources) != has_quant_conv(expected):
        found, needed = "FLUX.1's autoencoder", "that of FLUX.2"  # two networks of one design
        if has_quant_conv(sources):
            found, needed = "FLUX.2's autoencoder", "that of FLUX.1"
    if found != needed:
        listed.append(f"the file looks like {found}, and {needed} is wanted")
    elif missing and unknown:
        for nearest in difflib.get_close_matches(missing[0], unknown, 1):
            listed.append(f"{nearest} is close to {missing[0]}")
    place = str(files[0])
    if len(files) > 1:
        place += f" and {len(files) - 1} more"
    raise UserError(
        f"{place} does not fit {module}: of {len(expected)} tensors, {'; '.join(listed)}."
    )


def has_quant_conv(names: Iterable[str]) -> bool:
    return any("quant_conv." in name for name in names)


# ---------------------------------------------------------------- the configuration in a file

SIZES = {  # tensors that give the sizes of a transformer, and their numbers of dimensions
    "img_in.weight": 2,
    "double_blocks.0.img_attn.norm.query_norm.scale": 1,
    "double_blocks.0.img_mlp.0.weight": 2,
    "double_blocks.0.img_mlp.2.weight": 2,
    "final_layer.linear.weight": 2,
    "txt_in.weight": 2,
}
VECTOR_IN = "vector_in.in_layer.weight"  # FLUX.1's input for CLIP's pooled text
FLUX2_MODULATION = "double_stream_modulation_img.lin.weight"


def infer_config(path: Path) -> FluxConfig | Flux3Config:
    """Return the configuration of a transformer in BFL's or diffusers' layout, from its shapes.

    `path`: a safetensors or GGUF file, quantized or not, a `*.safetensors.index.json` or a folder.
    """
    infos, metadata = read_headers(shard_files(path))
    joined = join_diffusers(infos)
    flux3 = any(f".{name}".endswith(f".{ANCHOR3}") for name in joined)
    wanted = SIZES3 if flux3 else SIZES
    tensors = dict(_of_network(joined, wanted))
    layers = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    shapes = {name: info.shape for name, info in tensors.items()}
    for layer, format in detect_formats(tensors, metadata, layers).items():
        shapes[f"{layer}.weight"] = format.shape

    if kind := foreign_family(tensors):
        raise UserError(f"{path} is {kind}, which is not supported.")
    sizes = wanted | ({VECTOR_IN: 2} if VECTOR_IN in shapes else {})
    for name, dimensions in sizes.items():
        shape = shapes.get(name)
        if shape is None or len(shape) != dimensions or 0 in shape:
            problem = "has no" if shape is None else f"has shape {shape!s:.120} for"
            kind = looks_like(infos)
            use = f" Pass it as `{USES[kind]}`." if kind in USES else ""
            raise UserError(
                f"{path} is not a complete FLUX transformer: it {problem} '{name}' "
                f"and looks like {kind}.{use}"
            )
    if flux3:
        return config3(path, shapes)
    hidden_size, in_channels = shapes["img_in.weight"]
    (head_dim,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    mlp_rows = shapes["double_blocks.0.img_mlp.0.weight"][0]
    mlp_size = shapes["double_blocks.0.img_mlp.2.weight"][1]
    flux2 = FLUX2_MODULATION in shapes
    # No tensor holds the axes of RoPE or theta; each family has one choice.
    shares = (1, 1, 1, 1) if flux2 else (2, 7, 7)
    if (
        hidden_size % head_dim
        or head_dim % (2 * sum(shares))
        or mlp_rows not in (mlp_size, 2 * mlp_size)
    ):
        raise UserError(
            f"{path} has sizes of no FLUX transformer: hidden size {hidden_size}, heads of "
            f"{head_dim}, an MLP of {mlp_rows} and {mlp_size}."
        )
    return FluxConfig(
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0],
        context_dim=shapes["txt_in.weight"][1],
        hidden_size=hidden_size,
        num_heads=hidden_size // head_dim,
        depth=_count_blocks(shapes, "double_blocks."),
        depth_single=_count_blocks(shapes, "single_blocks."),
        mlp_ratio=mlp_size / hidden_size,
        axes_dim=tuple(head_dim * share // sum(shares) for share in shares),
        theta=2000 if flux2 else 10000,
        vector_dim=shapes[VECTOR_IN][1] if VECTOR_IN in shapes else None,
        guidance="guidance_in.in_layer.weight" in shapes,
        bias="img_in.bias" in shapes,
        gated_mlp=mlp_rows == 2 * mlp_size,
        shared_modulation=flux2,
    )


def _count_blocks(names: Iterable[str], prefix: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(prefix)})

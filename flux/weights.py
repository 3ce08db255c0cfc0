"""Weights: find a file, check it, and map it, strictly, into a module that was built on the meta device.

Our module names are the released checkpoints' keys, so nothing is renamed. A file is mapped, not read: its tensors are
the file's own pages, and take no memory of their own until they are cast or moved. Nothing is ever unpickled.
"""

import difflib
import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from flux.errors import UserError
from flux.transformer import FluxConfig

# ---------------------------------------------------------------------------------------------------------- headers

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
FLOATS = ("F64", "F32", "F16", "BF16")
BITS = dict(F64=64, I64=64, U64=64, C64=64, F32=32, I32=32, U32=32, F16=16, BF16=16, I16=16, U16=16, BOOL=8, I8=8, U8=8)
BITS |= dict(F8_E4M3=8, F8_E5M2=8, F8_E8M0=8, F8_E4M3FNUZ=8, F8_E5M2FNUZ=8, F6_E2M3=6, F6_E3M2=6, F4=4)
IMPOSTORS = (  # how a file begins that is something else, and what that is
    (rb"\s*<", "a web page, as sites send it in place of a file that needs a login or an accepted licence"),
    (rb"version https://git-lfs", "a git-lfs pointer; fetch the file that it stands for with `git lfs pull`"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "a zip or a pickle (.pt, .ckpt), which could run code; get it as safetensors"),
    (rb"GGUF", "a GGUF file, which this loader does not read; get the model as safetensors"),
    (rb"\s*\{", "a JSON text, not weights"),
)


class TensorInfo(NamedTuple):
    """What a header says of one tensor; `dtype` as safetensors spells it: "BF16", "F32", "F8_E4M3"."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Name -> info, and the metadata, of a safetensors file, which is not loaded; UserError if it is anything else.

    The format (https://github.com/huggingface/safetensors#format): the header's length in 8 little-endian bytes, the
    header in JSON, the tensors' bytes. Each claim of the header is checked against the others and the file's size.
    """
    path = Path(path)
    text, data_size = _header_text(path)
    try:
        header = json.loads(text.decode())
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path} has a damaged header ({error!s:.80}); download it again.") from error

    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            fault = "overlaps another" if begin < position else "leaves a hole before it"
            raise UserError(f"{path} has a damaged header: tensor {name!r:.120} {fault}; download it again.")
        position = end
    if position != data_size:
        start, fault = 8 + len(text), "is truncated" if position > data_size else "goes on after its end"
        sizes = f"{start + position:,} bytes expected, {start + data_size:,} found"
        raise UserError(f"{path} {fault}: {sizes}; download it again.")
    return {name: TensorInfo(entry["dtype"], tuple(entry["shape"]), path) for name, entry in header.items()}, metadata


def _header_text(path: Path) -> tuple[bytes, int]:
    """The JSON text of the header, and the number of bytes that follow it."""
    try:
        if not path.exists():
            raise UserError(f"{path} does not exist.")
        if not path.is_file():
            raise UserError(f"{path} is a {'folder' if path.is_dir() else 'special file'}, not a safetensors file.")
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            text = file.read(length) if length <= MAX_HEADER else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if size == 0:
        raise UserError(f"{path} is empty; download it again.")
    if start[8:9] != b"{":  # asked first, because a true length may look like anything: 640 bytes like a pickle
        what = next((what for pattern, what in IMPOSTORS if re.match(pattern, start)), "unknown, or damaged")
        raise UserError(f"{path} is not a safetensors file: it is {what}.")
    if length > MAX_HEADER:
        raise UserError(f"{path} is not a safetensors file: its header would be {length:,} bytes long.")
    if length > size - 8:
        sizes = f"at least {8 + length:,} bytes expected, {size:,} found"
        raise UserError(f"{path} is truncated: {sizes}; download it again.")
    return text, size - 8 - length


def _span(path: Path, name: str, entry: dict) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, from the end of the header."""
    try:
        bits, shape, (begin, end) = BITS[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        what = f"what it says of tensor {name!r:.120} is not understood: {entry!s:.120}"
        raise UserError(f"{path} is damaged, or newer than this loader: {what}.") from error
    if (end - begin) * 8 != prod(shape) * bits:
        what = f"{end - begin:,} bytes for tensor {name!r:.120}, {entry['dtype']} of shape {shape!s:.120}"
        raise UserError(f"{path} has a damaged header, with {what}; download it again.")
    return begin, end


def shard_files(path: Path) -> list[Path]:
    """The file itself, or the shards that a `*.safetensors.index.json` names: all present, all beside it."""
    path = Path(path)
    if not is_index(path):
        return [path]
    shards = [path.parent / name for name in _shard_names(path)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(f"{path} names {len(shards)} files that must lie beside it, and lacks {_some(missing)}.")
    return shards


def is_index(path: Path) -> bool:
    return path.name.endswith(".index.json")


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except OSError as error:
        raise UserError(f"{index} cannot be read: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        names = []
    if not names:
        raise UserError(f"{index} is not an index of safetensors files: it has no `weight_map` of file names.")
    for name in names:  # an index comes from elsewhere: it may not reach out of its folder
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise UserError(f"{index} names {name!r:.120}, which is not the plain name of a safetensors file.")
    return names


# ---------------------------------------------------------------------------------------------------------- loading


def load_module(
    module: nn.Module,
    files: Sequence[Path],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    prefixes: Sequence[str] = ("",),
    unread: Callable[[str], bool] = lambda name: False,
    rename: Callable[[str], str] | None = None,
    check_finite: bool = False,
) -> None:
    """Give the tensors of `files` to a module that was built on the meta device, frozen, in evaluation mode.

    On the CPU and in the files' own `dtype` they stay mapped; else the floats are cast, one tensor at a time.
    `prefixes`: what may stand before the names in the files; the one that fits best is taken away. `unread`: which of
    the names left are known and not wanted. `rename`: from these to the module's, for a foreign layout.
    UserError, before anything is loaded, if a tensor is missing, unknown, misshapen or of a wrong type.
    """
    infos = _merged_headers(files)
    wanted = module.state_dict()
    sources = _sources(infos, wanted, prefixes, unread, rename)
    _check_fit(type(module).__name__, infos, wanted, sources, renamed=rename is not None)
    tensors = {}
    for file in map(Path, files):
        try:
            with safe_open(file, framework="pt", device="cpu") as mapped:
                for name, source in sources.items():
                    if infos[source].file != file:
                        continue
                    tensor = mapped.get_tensor(source).view(wanted[name].shape)
                    if check_finite and not tensor.isfinite().all():
                        raise UserError(f"{file} has NaN or infinity in {source!r:.120}; download it again.")
                    tensors[name] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be mapped: {error}.") from error
    module.requires_grad_(False).load_state_dict(tensors, strict=True, assign=True)
    module.eval()


class Network:
    """One network and its files: checked when it is made, loaded when it is called for, let go by `release`."""

    def __init__(self, kind: Callable[..., nn.Module], config, files: Sequence[Path], *, device: torch.device,
                 dtype: torch.dtype, check_finite: bool = False, **options):  # fmt: skip
        self.kind, self.config, self.files, self.options = kind, config, files, options
        self.device, self.dtype, self.module = device, dtype, None
        self.change: Callable[[nn.Module], None] | None = None
        self._load(torch.device("cpu"), None, check_finite)  # maps the files and refuses what is wrong with them

    def __call__(self) -> nn.Module:
        if self.module is None:
            module = self._load(self.device, self.dtype, check_finite=False)
            if self.change:
                self.change(module)
            self.module = module
        return self.module

    def release(self) -> None:
        self.module = None

    def alter(self, change: Callable[[nn.Module], None] | None) -> None:
        """Have `change` made, in place of an earlier one, to what the files hold, whenever the network is loaded."""
        if change or self.change:
            self.change, self.module = change, None

    def on_meta(self) -> nn.Module:
        """Its modules and shapes, without weights."""
        with torch.device("meta"):
            return self.kind(self.config)

    @property
    def bytes(self) -> int:
        """Size of the weights in memory, in the dtype that they are used in."""
        return sum(p.numel() for p in self.on_meta().parameters()) * self.dtype.itemsize

    def _load(self, device: torch.device, dtype: torch.dtype | None, check_finite: bool) -> nn.Module:
        module = self.on_meta()
        load_module(module, self.files, device=device, dtype=dtype, check_finite=check_finite, **self.options)
        return module


def _merged_headers(files: Sequence[Path]) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    for file in files:
        infos, _ = read_header(file)
        for name in merged.keys() & infos.keys():
            raise UserError(f"{merged[name].file} and {file} do not belong together: both hold {name!r:.120}.")
        merged |= infos
    return merged


def _sources(
    infos: Mapping[str, TensorInfo],
    wanted: Mapping[str, torch.Tensor],
    prefixes: Sequence[str],
    unread: Callable[[str], bool],
    rename: Callable[[str], str] | None,
) -> dict[str, str]:
    """Name in the module -> name in the files, for every tensor of the files that is not `unread`."""

    def without(prefix: str) -> dict[str, str]:
        names = {source: _canonical(source.removeprefix(prefix)) for source in infos}
        return {source: rename(name) if rename else name for source, name in names.items() if not unread(name)}

    names = max(map(without, prefixes), key=lambda names: len(wanted.keys() & names.values()))
    sources: dict[str, str] = {}
    for source, name in names.items():
        if name in sources:
            raise UserError(f"{infos[source].file} has {name!r:.120} twice: {sources[name]!r:.120}, {source!r:.120}.")
        sources[name] = source
    return sources


def _canonical(name: str) -> str:
    # Some community files call the scale of the query and key norms "weight", as torch.nn.RMSNorm does.
    return re.sub(r"\b(query|key)_norm\.weight$", r"\1_norm.scale", name)


def _check_fit(
    module: str,
    infos: Mapping[str, TensorInfo],
    wanted: Mapping[str, torch.Tensor],
    sources: Mapping[str, str],
    renamed: bool,
) -> None:
    """UserError unless there is a tensor of the right shape and type for every wanted one, and no other."""
    files = sorted({str(info.file) for info in infos.values()})
    faults: dict[str, list[str]] = {"missing": [repr(name) for name in wanted if name not in sources]}
    for name, source in sources.items():
        info, tensor = infos[source], wanted.get(name)
        shown = f"{source!r:.120}" + (f" in {info.file.name}" if len(files) > 1 else "")
        if tensor is None:
            faults.setdefault("unknown", []).append(shown)
            continue
        # diffusers keeps the 1x1 convolutions of an autoencoder as Linear: (C, C) for our (C, C, 1, 1)
        if tensor.shape not in (info.shape, (*info.shape, 1, 1) if renamed else info.shape):
            faults.setdefault("misshapen", []).append(f"{shown} is {info.shape!s:.120} and not {tuple(tensor.shape)}")
        if info.dtype not in (types := FLOATS if tensor.is_floating_point() else ("I64",)):
            faults.setdefault("of a wrong type", []).append(f"{shown} is {info.dtype} and not {'/'.join(types)}")
    if not any(faults.values()):
        return
    listed = "; ".join(f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names)
    kind, right = _looks_like(sources), _looks_like(wanted)  # in the module's names: less prefix, and renamed
    if kind != right:
        listed += f"; the file looks like {kind}, and {right} is wanted"
    elif faults["missing"] and "unknown" in faults:
        nearest = difflib.get_close_matches(faults["missing"][0], faults["unknown"], 1)
        listed += f"; {nearest[0]} is close to {faults['missing'][0]}" if nearest else ""
    place = files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    raise UserError(f"{place} does not fit {module}: of {len(wanted)} tensors, {listed}.")


def _some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


KINDS = (  # marks in the names of tensors, and what they are the marks of; the first one found counts
    (r"\.lora_|^lora_|\.lokr_|\.hada_", "a LoRA"),
    (r"\.weight_scale|\.scale_weight$|\.comfy_quant$|^scaled_fp8$|\.absmax$|\.qweight$|\.wscales$",
     "a quantised model, not supported by this loader yet"),
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
    return next((kind for mark, kind in KINDS if any(re.search(mark, name) for name in names)), "something else")


def infer_config(path: Path) -> FluxConfig:
    """The configuration of a transformer in BFL's layout, from the names and shapes in its file (or index)."""
    infos = _merged_headers(shard_files(path))
    names = {_canonical(name.removeprefix("model.diffusion_model.")): info for name, info in infos.items()}

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        if name not in names or len(names[name].shape) != dimensions or 0 in names[name].shape:
            fault = "has no" if name not in names else f"has shape {names[name].shape!s:.120} for"
            kind = f"it {fault} '{name}' and looks like {_looks_like(infos)}"
            raise UserError(f"{path} is not a whole FLUX transformer in BFL's layout: {kind}.")
        return names[name].shape

    def count(blocks: str) -> int:
        return len({name.split(".")[1] for name in names if name.startswith(blocks)})

    hidden_size, in_channels = shape("img_in.weight")
    (head_dim,) = shape("double_blocks.0.img_attn.norm.query_norm.scale", 1)
    mlp_rows, mlp_size = shape("double_blocks.0.img_mlp.0.weight")[0], shape("double_blocks.0.img_mlp.2.weight")[1]
    if names["double_blocks.0.img_mlp.2.weight"].dtype == "U8":
        mlp_size *= 2  # NVFP4 packs two columns into a byte
    flux2 = "double_stream_modulation_img.lin.weight" in names
    shares = (1, 1, 1, 1) if flux2 else (2, 7, 7)  # no tensor tells the axes or theta; each family has one choice
    if hidden_size % head_dim or head_dim % (2 * sum(shares)) or mlp_rows not in (mlp_size, 2 * mlp_size):
        sizes = f"hidden size {hidden_size}, heads of {head_dim}, an MLP of {mlp_rows} and {mlp_size}"
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
        vector_dim=shape("vector_in.in_layer.weight")[1] if "vector_in.in_layer.weight" in names else None,
        guidance="guidance_in.in_layer.weight" in names,
        bias="img_in.bias" in names,
        gated_mlp=mlp_rows == 2 * mlp_size,
        shared_modulation=flux2,
    )


# ---------------------------------------------------------------------------------------------------------- finding


def find(repository: str, filename: str, weights: Path | None = None, licence: str = "", gated: bool = False) -> Path:
    """A file of a Hugging Face repository: in the folder `weights` or $FLUX_WEIGHTS, in the local cache, or downloaded.

    In the folder it lies as `filename`, `<name>/filename` or `<owner>/<name>/filename`; where a folder is given,
    nothing is downloaded. `licence` and `gated` are for the UserError that tells why the file cannot be had.
    """
    if path := _in_folder(repository, filename, weights) or _in_cache(repository, filename):
        return path
    get = f"get it from https://huggingface.co/{repository}" + (f" under {licence}" if licence else "")
    if folder := _weights_folder(weights):
        places = " or ".join(str(folder / home / filename) for home in ("", repository.split("/")[-1], repository))
        raise UserError(f"{filename} of {repository} is neither at {places} nor in the Hugging Face cache; {get}, or "
                        "leave --weights and $FLUX_WEIGHTS out to have it downloaded.")
    import huggingface_hub  # not above: what is found without it needs no second of waiting for it

    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename))
    except Exception as error:  # its own, httpx's, hf_xet's or the system's: whichever, the file did not come
        fault = _download_fault(error, f"https://huggingface.co/{repository}", licence or "its licence", gated)
        instead = "or put it into a folder and give that with --weights"
        raise UserError(f"{filename} of {repository} was not downloaded: {fault}; {instead}.") from error


def find_all(
    repository: str, filename: str, weights: Path | None = None, licence: str = "", gated: bool = False
) -> list[Path]:
    """As `find`, for a file that may be a `*.safetensors.index.json`: the shards that it names, all from one place."""
    path = find(repository, filename, weights, licence, gated)
    if is_index(path):
        for name in _shard_names(path):
            find(repository, str(PurePosixPath(filename).with_name(name)), weights, licence, gated)
    return shard_files(path)


def is_local(repository: str, filename: str, weights: Path | None = None) -> bool:
    """Whether `find_all` would find everything without a download."""
    path = _in_folder(repository, filename, weights) or _in_cache(repository, filename)
    if path is None or not is_index(path):
        return path is not None
    return all((path.parent / name).is_file() for name in _shard_names(path))


def _weights_folder(weights: Path | None) -> Path | None:
    given = weights or os.environ.get("FLUX_WEIGHTS")
    folder = Path(given).expanduser() if given else None
    if folder and not folder.is_dir():
        raise UserError(f"{folder}, given by {'--weights' if weights else '$FLUX_WEIGHTS'}, is not a folder.")
    return folder


def _in_folder(repository: str, filename: str, weights: Path | None) -> Path | None:
    folder = _weights_folder(weights)
    if folder is None:
        return None
    # As on the hub, capitals do not matter. A repository's own folder comes first: a flat one may hold another's file.
    names = (repository.lower(), repository.lower().split("/")[-1])
    below = (*folder.glob("*/*"), *folder.glob("*"))
    homes = [home for home in below if home.relative_to(folder).as_posix().lower() in names]
    return next((home / filename for home in (*homes, folder) if (home / filename).is_file()), None)


def _in_cache(repository: str, filename: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, filename)  # a str; or else None, or a mark that there is no such file
    return Path(path) if isinstance(path, str) else None


def _download_fault(error: BaseException, page: str, licence: str, gated: bool) -> str:
    """Why a download failed, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    cause = error.__cause__
    log_in = "create a READ token at https://huggingface.co/settings/tokens and run `hf auth login` or set HF_TOKEN"
    match error:
        case errors.LocalEntryNotFoundError() if isinstance(cause, errors.HfHubHTTPError):
            return _download_fault(cause, page, licence, gated)  # the hub wraps 403, 429 and 5xx in this one
        case errors.LocalEntryNotFoundError() if isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set and the Hugging Face cache lacks it; unset HF_HUB_OFFLINE"
        case errors.LocalEntryNotFoundError():
            return f"huggingface.co cannot be reached ({cause!s:.120}); check the network and run again"
        case errors.HfHubHTTPError() if status == 401 and (gated or isinstance(error, errors.GatedRepoError)):
            return f"it is gated and no valid Hugging Face token was sent; accept {licence} at {page}, {log_in}"
        case errors.HfHubHTTPError() if status == 403 and (gated or isinstance(error, errors.GatedRepoError)):
            allow = "and allow the token to read gated repositories"
            return f"it is gated and your token's account has no access; accept {licence} at {page} with it, {allow}"
        case errors.RepositoryNotFoundError():
            return f"there is no public repository {page}; check its name or, if it is private, {log_in}"
        case errors.RemoteEntryNotFoundError():
            return f"{page} has no such file; check its name"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk is full; make room, or set HF_HOME to a folder on another disk, and run again (it resumes)"
    reason = f"HTTP {status}" if status else f"{type(error).__name__}, {' '.join(str(error).split()):.120}"
    return f"{reason}; run again (it resumes)"

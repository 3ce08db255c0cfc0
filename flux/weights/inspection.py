"""Say of any file what it is, what it fits and why it would be refused. Only headers are read.

    found = inspect(path)
    found.lines     # ("kind", "a transformer of FLUX.1"), ("tensors", "780, BF16"), ...
    found.refusal   # of a file that is not understood, else ""

What would be refused is told by the error of the code that loads such a file.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flux.autoencoder import AutoEncoder
from flux.clip import CLIP
from flux.configs import MODELS, ModelSpec
from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.plain_files import MAX_JSON, parse_json, read_plain_file, require_plain_file
from flux.runtime.lazy_module import LazyModule
from flux.siglip import Redux, ReduxConfig, SigLIP, SigLIPConfig, siglip_ignore_keys
from flux.t5 import T5
from flux.text_encoder import build_networks
from flux.transformer3 import Flux3Config
from flux.weights import families
from flux.weights.diffusers_names import from_diffusers
from flux.weights.files import SHARD, TensorInfo, is_index, preview, read_header, shard_files
from flux.weights.load import find_prefix, infer_config, init_empty, read_headers, split_parts
from flux.weights.locate import build_transformer, get_spec, with_decoder_of
from flux.weights.quantization import QuantizedLinear

MAX_LISTED = 100  # files of a folder, and values of metadata
MAX_VALUE = 200  # characters of a value
CHECKPOINT = re.compile(r"(model|ema|average|optimizer)\.")  # names in a training run's file
CACHED = {"latents", "channels", "tokens", "pooled"}  # names in the files of its cache
IMAGE = re.compile(rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP|GIF8|BM|II\*\0|MM\0\*|....ftyp", re.DOTALL)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "merges.txt", "tekken.json")
TRANSFORMERS = (
    "a FLUX.1 transformer",
    "a FLUX.2 transformer",
    "a FLUX 3 transformer",
    "a transformer in diffusers' layout",
)
CPU: dict[str, Any] = dict(device=torch.device("cpu"), dtype=torch.float32)


@dataclass
class Inspection:
    """What was found out, in the order in which to show it."""

    lines: list[tuple[str, str]] = field(default_factory=list)  # (what it is about, text)
    refusal: str = ""

    def add(self, about: str, text: object) -> None:
        self.lines.append((about, str(text)))


def inspect(path: Path) -> Inspection:
    """Describe a file, or a folder. Never raises UserError: see `Inspection.refusal`."""
    found = Inspection()
    try:
        if path.is_dir():
            _inspect_folder(path, found)
        else:
            _inspect_file(path, found)
    except UserError as error:
        found.refusal = str(error)
    return found


@contextmanager
def _refusals(found: Inspection) -> Iterator[None]:
    """Add the warnings of the block as notes, and a UserError as what would be refused."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except UserError as error:
            found.add("refused", error)
    for warning in dict.fromkeys(str(warning.message) for warning in caught):
        found.add("note", warning)


def _inspect_file(path: Path, found: Inspection) -> None:
    require_plain_file(path, "a file or a folder")
    found.add("file", f"{path}, {path.stat().st_size:,} bytes")
    kind, describe = _identify(path)
    found.add("kind", kind)
    describe(path, found)


Describe = Callable[[Path, Inspection], None]


def _identify(path: Path) -> tuple[str, Describe]:
    """Return what a file is, and what describes such a file. UserError if it is not understood."""
    try:
        with require_plain_file(path).open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    if path.name in TOKENIZER_FILES:
        return f"a file of a tokenizer, {_tokenizer(path.parent)[0]}", _inspect_tokenizer
    if is_index(path) or start[:4] == b"GGUF" or start[8:9] == b"{":
        return _identify_tensors(path)
    if IMAGE.match(start) or path.suffix.lower() in IMAGE_SUFFIXES:
        from flux.image_io.input import open_image

        with open_image(path) as image:
            kind = f"an image: {image.format}, {image.width}x{image.height}, {image.mode}"
        return kind, _inspect_image
    if path.suffix == ".json":
        return _identify_json(path), _no_more
    read_header(path)  # raises an error that says what the file is
    raise AssertionError(path)


def _no_more(path: Path, found: Inspection) -> None:
    """There is no more to say."""


# ---------------------------------------------------------------- files of tensors


def _identify_tensors(path: Path) -> tuple[str, Describe]:
    from flux.parity.capture_file import KEY

    infos, metadata = read_headers(shard_files(path))
    names = set(infos)
    if KEY in metadata:
        return "a capture of a run (scripts/parity.py)", _inspect_capture
    if {"step", "sha256"} <= metadata.keys() and all(map(CHECKPOINT.match, names)):
        return "a checkpoint of a training run, which scripts/train.py resumes", _inspect_plain
    if {"name", "sha256"} <= metadata.keys() and names <= CACHED:
        return "an encoded image or caption, of a training run's cache", _inspect_plain
    if names == {"latents"}:
        return "the latents of an image, as --save-latents writes them", _inspect_plain
    if any(map(families.is_lora_name, names)):
        foreign = families.foreign_family(names)
        return f"a LoRA of {foreign}" if foreign else "a LoRA", _inspect_lora
    parts = split_parts(infos)
    main = families.looks_like(_without(infos, parts))
    if main in TRANSFORMERS:
        return main, _inspect_transformer
    if main == "something else" and parts:
        return "other networks than a transformer, without one", _inspect_parts
    if main == "something else":
        infer_config(path)  # raises the error of a file that no network has written
    return main, _inspect_one


def _without(
    infos: Mapping[str, TensorInfo], parts: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """Return the tensors that are in no part."""
    inside = {f"{prefix}{name}" for prefix, part in parts.items() for name in part}
    return {name: info for name, info in infos.items() if name not in inside}


def _inspect_plain(path: Path, found: Inspection) -> None:
    """Describe the tensors and the metadata."""
    files = shard_files(path)
    infos, metadata = read_headers(files)
    dtypes = Counter(info.dtype for info in infos.values())
    listed = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    container = "GGUF" if any(name.startswith("general.") for name in metadata) else "safetensors"
    shards = f" in {len(files)} files" if len(files) > 1 else ""
    found.add("format", f"{container}{shards}, {len(infos)} tensors ({listed})")
    for name, value in list(metadata.items())[:MAX_LISTED]:
        found.add("metadata", f"{name!s:.{MAX_VALUE}} = {_short(value)}")


def _inspect_parts(path: Path, found: Inspection) -> None:
    """Describe the text encoders and the autoencoder in a checkpoint."""
    _inspect_plain(path, found)
    for prefix, part in split_parts(read_headers(shard_files(path))[0]).items():
        kind = families.looks_like(part)
        found.add("also holds", f"{prefix}* ({kind})")
        _inspect_network(kind, path, found)


def _inspect_one(path: Path, found: Inspection) -> None:
    _inspect_plain(path, found)
    _inspect_network(families.looks_like(read_headers(shard_files(path))[0]), path, found)


def _inspect_transformer(path: Path, found: Inspection) -> None:
    files = shard_files(path)
    with _refusals(found):
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
        alike = [row.name for row in MODELS.values() if row.transformer == spec.transformer]
        names = dict.fromkeys([spec.name, *alike])
        found.add("fits", f"{preview(list(names), 6)}; pass it as `transformer`")
    _inspect_parts(path, found)


def _inspect_network(kind: str, path: Path, found: Inspection) -> None:
    """Describe a network other than a transformer, with the models that it fits."""
    files = shard_files(path)
    with _refusals(found):
        if kind not in NETWORKS:
            infer_config(path)
            return
        part, argument = NETWORKS[kind]
        fits: list[str] = []
        refusals: list[UserError] = []
        for build, names in _candidates(part, files):
            try:
                found.add("quantized", _quantized(build().shapes))
                fits += names
            except UserError as error:
                refusals.append(error)
        if not fits:
            raise min(refusals, key=lambda error: len(str(error)))
        use = f"; pass it as `{argument}`" if argument else ""
        found.add("fits", f"{preview(fits, 6)}{use}")


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


NETWORKS = {  # what a network looks like -> its part, and the argument that takes its file
    "an autoencoder": ("autoencoder", "autoencoder"),
    "an autoencoder in diffusers' layout": ("autoencoder", "autoencoder"),
    "a CLIP text encoder": ("clip", "text_encoder"),
    "a T5 text encoder": ("t5", "text_encoder_2"),
    "a language model": ("model", "text_encoder"),
    "an image encoder, SigLIP or CLIP": ("siglip", ""),
    "the FLUX.1 Redux adapter": ("redux", ""),
}


def _candidates(
    part: str, files: list[Path]
) -> Iterator[tuple[Callable[[], LazyModule], list[str]]]:
    """Yield, for each configuration of this part, what checks the files, and its models' names."""
    rows: dict[Any, list[ModelSpec]] = {}
    for row in MODELS.values():
        config: Any = None
        if part == "autoencoder":
            config = with_decoder_of(row.autoencoder, files[0])
        elif part in row.text.networks:
            config = getattr(row.text, part)
        elif row.addon and part in dict(row.addon.files):
            config = part
        if config is not None:
            rows.setdefault(config, []).append(row)
    for config, of in rows.items():

        def build(config: Any = config, row: ModelSpec = of[0]) -> LazyModule:
            if part == "autoencoder":
                return LazyModule(AutoEncoder, config, files, rename=from_diffusers, **CPU)
            if part == "siglip":
                ignored: dict[str, Any] = dict(ignore_keys=siglip_ignore_keys)
                return LazyModule(SigLIP, SigLIPConfig(), files, **ignored, **CPU)
            if part == "redux":
                return LazyModule(Redux, ReduxConfig(), files, **CPU)
            return build_networks(row.text, {part: files}, **CPU)[part]

        yield build, [row.name for row in of]


# ---------------------------------------------------------------- LoRAs


def _inspect_lora(path: Path, found: Inspection) -> None:
    from flux.lora.formats import match_layers, read_lora
    from flux.lora.kinds import ranks
    from flux.lora.manager import check_columns
    from flux.lora.names import parse_key

    _inspect_plain(path, found)
    with _refusals(found):
        lora = read_lora(path)
        found.add("layout", f"{lora.format}'s names")
        roles = Counter(key.role for key in map(parse_key, lora.tensors) if key)
        found.add("roles", ", ".join(f"{count} {role}" for role, count in roles.most_common()))
        # only numbers such as alpha are read
        small = {key: x if x.numel() <= 4 else x.to("meta") for key, x in lora.tensors.items()}
        lora.tensors.update(small)
        fits, refusals, deltas = [], [], []
        for rows in _of_equal_networks():
            try:
                deltas = match_layers(lora, _meta_networks(rows[0]))
            except UserError as error:
                refusals.append(str(error))
                continue
            for row in rows:
                try:
                    check_columns(row, path, deltas)
                    fits.append(row.name)
                except UserError as error:
                    refusals.append(str(error))
        if not fits:
            raise UserError(min(refusals, key=_misfits))
        layers = Counter(delta.target.part for delta in deltas)
        found.add("changes", ", ".join(f"{n} layers of {part}" for part, n in layers.items()))
        sizes = {rank for delta in deltas for rank in ranks(delta.factors)}
        found.add("ranks", _range(sizes) if sizes else "none: full matrices or rotations")
        found.add("strength", f"{_range(delta.scaling for delta in deltas)} (alpha/rank)")
        found.add("fits", f"{preview(fits, 6)}; pass it as `loras`")


def _misfits(refusal: str) -> int:
    """Return how many tensors have no place, by the message."""
    count = re.search(r"has (\d+) tensors, of \d+, that match no layer", refusal)
    return int(count[1]) if count else 2**62 if "changes nothing" in refusal else 0


def _range(numbers: Iterable[float]) -> str:
    found = sorted(set(numbers))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def _of_equal_networks() -> list[list[ModelSpec]]:
    """Return the rows in groups whose transformers and text encoders have the same shapes."""
    groups: dict[Any, list[ModelSpec]] = {}
    for row in MODELS.values():
        if row.weight_format == "bfloat16":
            groups.setdefault((row.transformer, row.text), []).append(row)
    return list(groups.values())


def _meta_networks(row: ModelSpec) -> dict[str, torch.nn.Module]:
    """Return the networks of a row that a LoRA may change, without values."""
    builds: dict[str, Any] = {"t5": T5, "clip": CLIP, "model": LanguageModel}
    networks: dict[str, torch.nn.Module] = {}
    for part in row.text.networks:
        name = "language_model" if part == "model" else part
        networks[name] = init_empty(partial(builds[part], getattr(row.text, part)))
    return networks | {"transformer": init_empty(lambda: build_transformer(row.transformer))}


# ---------------------------------------------------------------- other files


def _inspect_capture(path: Path, found: Inspection) -> None:
    from flux.parity.capture_file import Capture

    capture = Capture(path)
    kinds = Counter(capture.kind(name) for name in capture.names)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    found.add("captured", f"{len(capture.names)} tensors ({listed})")
    for name, value in list(capture.recipe.items())[:MAX_LISTED]:
        found.add(f"{name:.60}", _short(value))


def _inspect_kit(folder: Path, found: Inspection) -> None:
    _inspect_capture(folder / "expected.safetensors", found)


def _inspect_image(path: Path, found: Inspection) -> None:
    from flux.image_io.input import open_image, read_image
    from flux.image_io.output import read_metadata

    with open_image(path) as image:
        texts = {name: text for name, text in image.info.items() if isinstance(text, str)}
    for name, text in list(texts.items())[:MAX_LISTED]:
        found.add("metadata", f"{name!s:.{MAX_VALUE}} = {_short(text)}")
    try:
        made_by = _short(read_metadata(path).get("model"))
        found.add("made by", f"{made_by}; --from-image makes the image again")
    except UserError:  # another program has made it
        pass
    with _refusals(found):
        read_image(path)


def _identify_json(path: Path) -> str:
    try:
        content = parse_json(read_plain_file(path, MAX_JSON, "a JSON text"))
        if not isinstance(content, dict):
            raise ValueError("not a table")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: is no JSON text that is understood ({error!s:.120}).") from None
    if path.name == "adapter_config.json":
        return "the configuration of a PEFT adapter: inspect its folder"
    if kind := content.get("_class_name") or content.get("architectures"):
        return f"a configuration of diffusers or transformers, of {_short(kind)}, which is not read"
    if "tokenizer_class" in content:
        return f"a file of a tokenizer, {_tokenizer(path.parent)[0]}"
    raise UserError(f"{path}: is a JSON text that nothing here reads.")


def _inspect_tokenizer(path: Path, found: Inspection) -> None:
    kind, size, models = _tokenizer(path if path.is_dir() else path.parent)
    found.add("tokenizer", f"{kind}, {size:,} tokens")
    found.add("fits", f"{models}; pass its folder as `tokenizer`")


def _tokenizer(folder: Path) -> tuple[str, int, str]:
    """Return the kind of a folder's tokenizer, its number of tokens, and which models use it."""
    from flux.tokenizers import CLIPTokenizer, MistralTokenizer, QwenTokenizer, T5Tokenizer

    kinds = {
        QwenTokenizer: ("Qwen3's", "FLUX.2 [klein]"),
        MistralTokenizer: ("Mistral's", "FLUX.2 [dev]"),
        CLIPTokenizer: ("CLIP's", "FLUX.1"),
        T5Tokenizer: ("T5's", "FLUX.1"),
    }
    refusals = []
    for tokenizer, (kind, models) in kinds.items():
        try:
            return kind, tokenizer(folder).tokenizer.get_vocab_size(), models
        except UserError as error:
            refusals.append(error)
    raise refusals[-1 if (folder / "spiece.model").exists() else 0]


# ---------------------------------------------------------------- folders


def _inspect_folder(folder: Path, found: Inspection) -> None:
    found.add("folder", folder)
    names = _names(folder)
    kind, describe = _identify_folder(folder, names)
    found.add("kind", kind)
    describe(folder, found)
    if describe is _no_more:
        for name in names[:MAX_LISTED]:
            found.add(name, _brief(folder / name))
        if not names:
            raise UserError(f"{folder}: is an empty folder.")


def _names(folder: Path) -> list[str]:
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}).") from None
    return [name for name in names if not name.startswith((".", "@"))]


def _identify_folder(folder: Path, names: list[str]) -> tuple[str, Describe]:
    if "adapter_model.safetensors" in names:
        return "a PEFT adapter: a LoRA", _inspect_lora
    if {"expected.safetensors", "README.md", "run.safetensors"} <= set(names):
        kit = "a golden kit for a port (scripts/parity.py golden-kit)"
        return kit, _inspect_kit
    if set(names) & set(TOKENIZER_FILES):
        return "the files of a tokenizer", _inspect_tokenizer
    if any(SHARD.fullmatch(name) or name.endswith(".index.json") for name in names):
        return _identify_tensors(folder)
    return f"a folder of {len(names)} files", _no_more


def _brief(path: Path) -> str:
    try:
        if path.is_dir():
            return _identify_folder(path, _names(path))[0]
        return _identify(path)[0]
    except UserError as error:
        return f"not understood: {error}"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}... ({len(text):,} characters)"

"""Inspect captures, images, tokenizers and JSON files."""

from collections import Counter
from pathlib import Path

from flux.errors import UserError
from flux.plain_files import MAX_JSON, parse_json, read_plain_file
from flux.weights.inspection.report import (
    MAX_LISTED,
    MAX_VALUE,
    Inspection,
    notes_and_refusals,
    short,
)


def inspect_capture(path: Path, found: Inspection) -> None:
    from flux.parity.capture_file import Capture

    capture = Capture(path)
    kinds = Counter(capture.kind(name) for name in capture.names)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    found.add("captured", f"{len(capture.names)} tensors ({listed})")
    for name, value in list(capture.recipe.items())[:MAX_LISTED]:
        found.add(f"{name:.60}", short(value))


def inspect_kit(folder: Path, found: Inspection) -> None:
    inspect_capture(folder / "expected.safetensors", found)


def inspect_image(path: Path, found: Inspection) -> None:
    from flux.image_io.input import open_image, read_image
    from flux.image_io.output import read_metadata

    with open_image(path) as image:
        texts = {name: text for name, text in image.info.items() if isinstance(text, str)}
    for name, text in list(texts.items())[:MAX_LISTED]:
        found.add("metadata", f"{name!s:.{MAX_VALUE}} = {short(text)}")
    try:
        made_by = short(read_metadata(path).get("model"))
        found.add("made by", f"{made_by}; --from-image makes the image again")
    except UserError:  # another program has made it
        pass
    with notes_and_refusals(found):
        read_image(path)


def identify_json(path: Path) -> str:
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
        return f"a configuration of diffusers or transformers, of {short(kind)}, which is not read"
    if "tokenizer_class" in content:
        return f"a file of a tokenizer, {describe_tokenizer(path.parent)[0]}"
    raise UserError(f"{path}: is a JSON text that nothing here reads.")


def inspect_tokenizer(path: Path, found: Inspection) -> None:
    kind, size, models = describe_tokenizer(path if path.is_dir() else path.parent)
    found.add("tokenizer", f"{kind}, {size:,} tokens")
    found.add("fits", f"{models}; pass its folder as `tokenizer`")


def describe_tokenizer(folder: Path) -> tuple[str, int, str]:
    """Return the kind of a folder's tokenizer, its number of tokens, and which models use it."""
    from flux.tokenizers import CLIPTokenizer, MistralTokenizer, QwenTokenizer, T5Tokenizer

    kinds = {
        QwenTokenizer: ("Qwen3's", "FLUX.2 [klein], FLUX 3"),
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

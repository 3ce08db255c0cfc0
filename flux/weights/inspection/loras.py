"""Inspect files of LoRAs: layout, ranks, strength and the models that they fit."""

import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flux.clip import CLIP
from flux.configs import MODELS, ModelSpec
from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.t5 import T5
from flux.weights.files import preview
from flux.weights.inspection.report import Inspection, inspect_plain, notes_and_refusals
from flux.weights.load import init_empty
from flux.weights.locate import build_transformer


def inspect_lora(path: Path, found: Inspection) -> None:
    from flux.lora.formats import match_layers, read_lora
    from flux.lora.kinds import ranks
    from flux.lora.manager import check_columns
    from flux.lora.names import parse_key

    inspect_plain(path, found)
    with notes_and_refusals(found):
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

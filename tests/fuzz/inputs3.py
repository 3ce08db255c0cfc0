"""Inputs of FLUX 3: its files, boxes, and what an upsampler and its server answer."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import modules.chat_completions as chat
import torch
from fuzz import mutators
from fuzz.inputs import LOADING, Input, kind, same_tensors, written
from fuzz.strict import read_safetensors, require, strict_json
from modules.prompt_upsampling3 import MODES, question, read_instructions, write_caption
from PIL import Image
from support.quantized_files import (
    PREFIX,
    QuantizedFile,
    fp8_by_row,
    int8,
    mxfp8,
    nvfp4,
    random_state,
    save_quantized,
)
from support.transformer3_inputs import inputs
from torch import nn

from flux.boxes import add_boxes, box_rows, read_boxes, sound_row, split_caption
from flux.errors import UserError
from flux.parity.reference import FLUX3_TINY
from flux.runtime.lazy_module import LazyModule
from flux.transformer3 import BLOCK_LISTS, Flux3, Flux3Config
from flux.weights.load import infer_config

SMALL = dict(hidden_size=64, num_heads=2, depth=1, depth_single=1, context_dim=32)
BASE = replace(FLUX3_TINY, **SMALL)
FLOW_MAP = replace(BASE, flow_map=True)

# ---------------------------------------------------------------- weights


def run_transformer(config: Flux3Config, path: Path) -> None:
    infer_config(path)
    lazy = LazyModule(Flux3, config, [path], block_lists=BLOCK_LISTS, **LOADING)
    batch = inputs(config)
    assert lazy()(**batch).shape == batch["img"].shape


def fused(file: QuantizedFile) -> QuantizedFile:
    """Join q, k and v of each block, as ComfyUI's files are said to do."""
    tensors = dict(file.tensors)
    for name in [name for name in tensors if ".q_proj." in name]:
        names = [name.replace(".q_", f".{letter}_") for letter in "qkv"]
        parts = [tensors.pop(part) for part in names]
        shared = name.endswith("comfy_quant")
        tensors[name.replace("q_proj", "qkv")] = parts[0] if shared else torch.cat(parts)
    return file._replace(tensors=tensors)


@kind(cases=42)
def flux3_files() -> list[Input]:
    """Both models in bfloat16, and all formats. Scales of inputs and notes may be missing."""
    writers = [
        (BASE, lambda layers, state: QuantizedFile(state, {}, prefix=PREFIX)),
        (FLOW_MAP, lambda layers, state: QuantizedFile(state, {})),
        (FLOW_MAP, fp8_by_row),
        (BASE, partial(nvfp4, swizzled=False)),
        (FLOW_MAP, lambda *args: int8(*args, group=16)._replace(prefix=PREFIX)),
        (BASE, lambda *args: fused(int8(*args, group=16))),
        (BASE, mxfp8),
    ]
    found = []
    for config, write in writers:
        network = Flux3(config)
        named = network.named_modules()
        layers = [path for path, x in named if "blocks." in path and isinstance(x, nn.Linear)]
        file = write(layers, random_state(network))
        content = written(lambda path: save_quantized(path, file))  # noqa: B023
        check = same_tensors(content, r"input_scale|comfy_quant")
        if any(".qkv." in name for name in file.tensors):  # which may have any name
            check = read_safetensors
        use = partial(run_transformer, config)
        files = {"x.safetensors": content}
        found.append(Input(files, "x.safetensors", mutators.SAFETENSORS, use, check))
    return found


# ---------------------------------------------------------------- boxes and captions

BOXES = [
    {"id": "cat", "bbox": [0.1, 0.2, 0.5555, 0.9], "desc": "gray, é"},
    {"id": "dog", "from": "ref_image_1", "src_bbox": [0, 0, 1, 0.5], "tgt_bbox": [0, 0.5, 1, 1]},
    {"bbox": [0.5, 0, 1, 1]},
]
ROWS = [
    {"id": "animal_1", "bbox": [100, 200, 556, 900], "desc": "a gray cat"},
    {"id": "dog", "bbox": [1, 2, 3, 4], "desc": "a brown dog"},
    {"id": "lamp_1", "from": "target", "src_bbox": None, "tgt_bbox": [5, 6, 70, 80], "desc": "a"},
]
CAPTION = "a photo of an <animal_1>, a <dog> and a <lamp_1>, with a sign [SALE]"
IMAGES = [Image.new("RGB", (64, 48))] * 2


def require_sound_rows(text: str, locked: list[dict]) -> None:
    """Check a prompt for the model: text that can be encoded, with rows that it knows."""
    assert text.encode() and "\0" not in text
    caption, rows = split_caption(text)
    assert rows is not None and len(rows) >= len(locked)
    for row, kept in zip(rows, locked):
        assert all(row[key] == value for key, value in kept.items() if key != "desc")
    for row in rows:  # the user's may be uncited and undescribed
        mine = row in rows[: len(locked)]
        words = {"desc": row["desc"] or "x"} if mine else {}
        assert sound_row({**row, **words}, f"<{row['id']}>" if mine else caption) is not None


@kind(cases=200)
def box_files() -> list[Input]:
    def use(path: Path) -> None:
        boxes = read_boxes(path)
        rows = box_rows(boxes, images=2)
        require_sound_rows(add_boxes("a <cat>", boxes, images=2), rows)

    def check(path: Path) -> None:
        content = strict_json(path.read_bytes())
        require(isinstance(content, list), "no list")
        for row in content:
            boxes = [row[key] for key in ("bbox", "src_bbox", "tgt_bbox") if row.get(key)]
            require(boxes and all(0 <= x <= 1 for box in boxes for x in box), "no box")

    content = json.dumps(BOXES).encode()
    return [Input({"boxes.json": content}, "boxes.json", mutators.JSON, use, check)]


@kind(cases=300)
def captions() -> list[Input]:
    """Answers of an upsampler, with boxes to keep, and prompts that end in rows."""
    locked = box_rows(BOXES, images=2)

    def read(path: Path) -> str:
        return chat.printable(path.read_bytes().decode(errors="replace"))

    def answer(path: Path) -> None:
        asked = question("a <cat>", IMAGES, BOXES)
        assert asked is not None
        require_sound_rows(write_caption(asked, lambda _: read(path)), locked)

    def prompt(path: Path) -> None:
        asked = question(read(path))
        if asked is None:
            require_sound_rows(read(path), [])
        elif asked.locked:
            require_sound_rows(write_caption(asked, lambda _: read(path)), asked.locked)

    content = f"{CAPTION} {json.dumps(ROWS)}".encode()
    files = {"caption.txt": content}
    return [Input(files, "caption.txt", mutators.TABLE, use) for use in (answer, prompt)]


@kind(cases=200)
def upsampler_files() -> list[Input]:
    """What a server sends, and the released instructions."""

    def use(path: Path) -> None:
        before = chat._post
        chat._post = lambda *_: (200, path.read_bytes())
        try:
            text = chat.complete([], "http://localhost:1", "x", {}, key="", whole=True)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        finally:
            chat._post = before
        assert text.encode() and not re.search(r"[\0\x1b]", text)

    choice = {"message": {"role": "assistant", "content": CAPTION}, "finish_reason": "stop"}
    response = {"id": "x", "object": "chat.completion", "choices": [choice], "usage": {"n": 1}}
    instructions = {mode: f"Write a caption, {mode}." for mode in MODES}

    def known(path: Path) -> None:
        content = strict_json(path.read_bytes())
        require(all(isinstance(content.get(mode), str) for mode in MODES), "a mode is missing")

    return [
        Input({"x.json": json.dumps(response).encode()}, "x.json", mutators.JSON, use),
        Input(
            {"x.json": json.dumps(instructions).encode()},
            "x.json",
            mutators.JSON,
            read_instructions,
            known,
        ),
    ]

"""Prompt upsampling for FLUX 3: a language model writes the caption that the model expects.

The model was trained on long captions, which Black Forest Labs' upsampler, a Qwen3.5 of 9 billion
parameters, writes from a request. `LocalUpsampler` runs it through transformers, `ServerUpsampler`
asks any server of OpenAI's chat completions. Both see the references, and write around the user's
boxes. The procedure is that of Black Forest Labs' code (src/flux3/pup.py), as diffusers and others
port it. Its instructions are a file beside the released weights; without the file, a server gets
instructions of our own.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from modules.chat_completions import THOUGHT, complete, data_url, printable
from PIL import Image

from flux.boxes import box_rows, reconcile, refuse_rows, rows_of, sound_row, split_caption
from flux.errors import UserError
from flux.plain_files import MAX_JSON, parse_json, read_plain_file
from flux.vision_language import load_model

REPOSITORY = "black-forest-labs/flux-3-image-klein-pup"
INSTRUCTIONS = "system_prompts.json"
MODES = ("t2i", "i2i", "t2i_bbox", "i2i_bbox")  # a new image, an edit, and the same with boxes
NEW_TOKENS = 3584
MAX_TOKENS = 2**15  # of the request, with its instruction and images
MAX_ANSWER = 2**16  # characters
PENALTY = 1.5  # for tokens that the answer has already: of new images, not of edits
GRID, MAX_RATIO = 32, 200  # sides of an image that the upsampler sees are multiples of 32
BUDGETS = {1: 1024**2, 2: 724**2}  # pixels of each image by their number; 512² for more
IMAGE_TOKEN = re.compile(r"<\|(image|video)_pad\|>")

# What surrounds a request is part of the input that the released upsampler was trained on.
EDIT_REQUEST = (
    "Reference images follow in order (the first image, the second image, ...).\n"
    "User request: {}\nOutput the caption."
)
EDIT_REQUEST_WITH_BOXES = (
    "Reference images follow in attachment order: ref_image_0, ref_image_1, ...\n"
    "User editing instruction: {}\n"
    "Decide the edit, imagine the target image, and output the annotation record."
)
LAYOUT_REQUEST = (
    "ORIGINAL PROMPT:\n{}\n\n"
    "LOCKED BOUNDING-BOX ANNOTATIONS ([y_min, x_min, y_max, x_max] on a 0-1000 canvas, with (0, 0) "
    "at the top-left). This is an authoritative JSON list of dictionaries; preserve every supplied "
    "identity, provenance value, null, and coordinate exactly:\n{}"
)

CAPTION = (
    "You write captions from which an image generator makes pictures. Turn the user's request into "
    "one paragraph in English that describes a single picture in full: the medium first, then the "
    "scene, the light, and each subject with its colour, material, state and place in the frame. "
    "Keep all that the user fixed, and decide what was left open. Copy text that the picture shows "
    "character by character, in quotation marks. Do not judge the picture. "
)
INSTRUCTION = (
    "You write instructions for an image editor. The user shows one picture or several, and asks "
    "for a change. Answer with one paragraph in English that says what changes and how that looks "
    "afterwards, with shadows and reflections, and that closes with what stays as it is. Name "
    "things by what can be seen, and pictures by their order. Copy text that the picture shows "
    "character by character, in quotation marks. "
)
TABLE = (
    "After the paragraph, on the same line, write a space and a JSON list with one row for each "
    "thing. The paragraph cites each row as <cat_1> where it names the thing. A row is {}. A box "
    "is [y_min, x_min, y_max, x_max] in whole numbers from 0 to 1000 of the frame, from the top "
    "left. Keep the names and boxes of the rows that the user gives. Each desc says how the thing "
    "looks. "
)
NEW_ROW = '{"id": "cat_1", "bbox": [...], "desc": "..."}'
EDIT_ROW = (
    '{"id": "cat_1", "from": "ref_image_0", "src_bbox": [...], "tgt_bbox": [...], "desc": "..."}, '
    'where "from" is "target" and src_bbox null for a new thing, and tgt_bbox is null for a '
    "removed one"
)
ALONE = "Answer with this alone."
OWN_INSTRUCTIONS = {
    "t2i": CAPTION + ALONE,
    "i2i": INSTRUCTION + ALONE,
    "t2i_bbox": CAPTION + TABLE.replace("{}", NEW_ROW) + ALONE,
    "i2i_bbox": INSTRUCTION + TABLE.replace("{}", EDIT_ROW) + ALONE,
}

# ------------------------------------------------------------------ what is asked


class Question(NamedTuple):
    """What an upsampler is asked."""

    mode: str  # of MODES
    text: str  # the user's turn
    images: tuple[Image.Image, ...]  # which stand before the text
    locked: list[dict[str, Any]]  # rows that the answer keeps


Ask = Callable[[Question], str]


def question(
    prompt: str, images: Sequence[Image.Image] = (), boxes: Sequence[Mapping[str, Any]] = ()
) -> Question | None:
    """Return what to ask for a prompt; None if it is a finished caption: with boxes, all cited.

    boxes: the user's, of `flux.boxes`. A table of boxes at the end of the prompt stands for them
    too. UserError for boxes in both places, and for a row without a box on the canvas.
    """
    if boxes:
        refuse_rows(prompt)
    caption, rows = split_caption(prompt)[0], rows_of(prompt)
    if rows and all(sound_row(row, caption) for row in rows):
        return None
    for row in rows:
        described = {**row, "desc": row.get("desc") or "undescribed"}
        if sound_row(described, f"<{row['id']}>") is None:
            raise UserError(
                f"prompt: its row {row['id']!r:.60} must have a name as `id`, text as `desc`, and "
                "a `bbox` [y_min, x_min, y_max, x_max] on a canvas of 0 to 1000, or `from`, "
                "`src_bbox` and `tgt_bbox`."
            )
    locked = rows or box_rows(boxes, len(images))
    text = caption if rows else prompt
    if locked:
        text = LAYOUT_REQUEST.format(text.strip(), json.dumps(locked, ensure_ascii=False))
    if images:
        text = (EDIT_REQUEST_WITH_BOXES if locked else EDIT_REQUEST).format(text)
    mode = ("i2i" if images else "t2i") + ("_bbox" if locked else "")
    text = IMAGE_TOKEN.sub("", text)
    return Question(mode, text, tuple(fit_image(i, len(images)) for i in images), locked)


def fit_image(image: Image.Image, count: int) -> Image.Image:
    """Return one of `count` RGB images at the size at which the upsampler saw them in training."""
    size = fitted_size(image.size, count)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def fitted_size(size: tuple[int, int], count: int) -> tuple[int, int]:
    """Return the size of one of `count` images: multiples of 32, within the budget of pixels."""
    if max(size) > MAX_RATIO * min(size):
        raise UserError(
            f"image: {size[0]}x{size[1]} is too narrow to upsample a prompt with it (expected at "
            f"most {MAX_RATIO} to 1). Crop it."
        )
    budget = BUDGETS.get(count, 512**2)
    width, height = (max(GRID, round(side / GRID) * GRID) for side in size)
    if width * height > budget:
        scale = math.sqrt(size[0] * size[1] / budget)
        width, height = (_down(side / scale) for side in size)
    if width * height > budget:  # one side is the least that there is
        if width == GRID:
            return width, _down(budget / width)
        return _down(budget / height), height
    return width, height


def _down(side: float) -> int:
    return max(GRID, int(side) // GRID * GRID)


# ------------------------------------------------------------------ what is answered


def write_caption(asked: Question, ask: Ask) -> str:
    """Return the caption that an upsampler writes, with the locked boxes in its table.

    UserError for an answer that is too long, and for a damaged table; a warning names the locked
    rows that the caption does not cite.
    """
    answer = ask(asked)
    if len(answer) > MAX_ANSWER:
        raise UserError(
            f"upsample: the answer is too long for a caption (got {len(answer):,} characters, "
            f"expected at most {MAX_ANSWER:,}). Try another prompt or model."
        )
    if not asked.locked:
        return answer
    caption, rows = split_caption(answer)
    if rows is None and re.search(r"\[\s*\{", caption):
        raise UserError(
            f"upsample: the table of boxes in the answer is damaged (got ...{caption[-80:]!r}). "
            "Try another model, or do not upsample."
        )
    if not caption:
        raise UserError(
            "upsample: the answer has no caption before its table. Try another model, or do not "
            "upsample."
        )
    text = reconcile(answer, asked.locked)
    caption, _ = split_caption(text)
    names = [f"<{row['id']}>" for row in asked.locked]
    if missing := [name for name in names if name not in caption]:
        warnings.warn(f"the upsampler's caption does not name {', '.join(missing)}", stacklevel=2)
    return text


# ------------------------------------------------------------------ who answers


def read_instructions(path: Path) -> dict[str, str]:
    """Return the released instructions, by mode. UserError if the file lacks one."""
    try:
        content = parse_json(read_plain_file(path, MAX_JSON, "a list of instructions"))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error!s:.120}). Get it from {REPOSITORY}."
        ) from None
    known = content if isinstance(content, dict) else {}
    if missing := [mode for mode in MODES if not isinstance(known.get(mode), str)]:
        raise UserError(f"{path} has no text for {', '.join(missing)}. Get it from {REPOSITORY}.")
    return {mode: known[mode] for mode in MODES}


class ServerUpsampler:
    """A model on a server: the released one, or any that sees images and follows instructions.

    key: $OPENAI_API_KEY if None. instructions: our own by default.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        instructions: Mapping[str, str] = OWN_INSTRUCTIONS,
    ):
        self.url, self.model, self.key, self.instructions = url, model, key, instructions

    def __call__(self, asked: Question) -> str:
        content: str | list[dict] = asked.text
        if asked.images:
            urls = [data_url(image, "JPEG", quality=92) for image in asked.images]
            content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            content.append({"type": "text", "text": asked.text})
        messages = [
            {"role": "system", "content": self.instructions[asked.mode]},
            {"role": "user", "content": content},
        ]
        settings = {"temperature": 0, "max_tokens": NEW_TOKENS}
        if not asked.images:
            settings["presence_penalty"] = PENALTY
        # Qwen3.5 would think first, and use up its tokens
        thinking = {"chat_template_kwargs": {"enable_thinking": False}}
        return complete(
            messages, self.url, self.model, settings, self.key, extensions=thinking, whole=True
        )


class LocalUpsampler:
    """The released upsampler, on this machine.

    folder: its repository, with the weights (19 GB in bfloat16), tokenizer and instructions.
    penalty: for tokens that the answer has already, as in Black Forest Labs' code; diffusers has
    none. UserError without transformers or the files.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        penalty: float = PENALTY,
    ):
        self.folder, self.penalty = Path(folder), penalty
        self.instructions = read_instructions(self.folder / INSTRUCTIONS)
        advice = f"Get all of {REPOSITORY}, or upsample by a server."
        kind = "Qwen3_5ForConditionalGeneration"
        needed = (kind, "AutoTokenizer", "Qwen2VLImageProcessorPil")  # others need torchvision
        self.model = load_model(needed, self.folder, torch.device(device), dtype, advice)
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(
                self.folder, local_files_only=True
            )
        except Exception as error:  # missing or damaged files
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: cannot be loaded ({reason:.200}). {advice}") from None

    @torch.no_grad()
    def __call__(self, asked: Question) -> str:
        inputs = self.inputs(asked)
        length = inputs["input_ids"].shape[1]
        if length > MAX_TOKENS:
            raise UserError(
                f"prompt: is too long to upsample (got {length:,} tokens with its instruction, "
                f"expected at most {MAX_TOKENS:,})."
            )
        penalise = [PresencePenalty(length, self.penalty)]
        out = self.model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            logits_processor=[] if asked.images or not self.penalty else penalise,
        )[0, length:]
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if len(out) == NEW_TOKENS and out[-1].item() not in ends:
            raise UserError(
                f"{self.folder}: the answer was cut off after {NEW_TOKENS} tokens. Ask for less."
            )
        text = self.tokenizer.decode(out, skip_special_tokens=True)
        text = printable(THOUGHT.sub("", text))
        if not text:
            raise UserError(
                f"{self.folder}: the model answered without text. Try another prompt, or do not "
                "upsample."
            )
        return text

    def inputs(self, asked: Question) -> dict[str, Any]:
        """Return the inputs of the model, as transformers' processor of Qwen3.5 makes them."""
        parts = [{"type": "image"} for _ in asked.images]
        system = {"type": "text", "text": self.instructions[asked.mode]}
        user = [*parts, {"type": "text", "text": asked.text}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "system", "content": [system]}, {"role": "user", "content": user}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        images: dict[str, Any] = {}
        if asked.images:
            seen = [as_jpeg(image) for image in asked.images]
            images = dict(self.processor(seen, return_tensors="pt"))
            text = self._with_room(text, images["image_grid_thw"])
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
        found["mm_token_type_ids"] = (ids == self.model.config.image_token_id).long()
        return {name: tensor.to(self.model.device) for name, tensor in found.items()}

    def _with_room(self, text: str, grids: torch.Tensor) -> str:
        """Repeat the token of each image, which the chat's template writes once."""
        token = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        pieces = text.split(token)
        if len(pieces) != len(grids) + 1:
            raise UserError(
                f"{self.folder}: the chat's template places {len(pieces) - 1} of {len(grids)} "
                f"images. Get all of {REPOSITORY}."
            )
        room = [token * (int(grid.prod()) // self.processor.merge_size**2) for grid in grids]
        return "".join(piece + tokens for piece, tokens in zip(pieces, [*room, ""]))


class PresencePenalty:
    """Lower the logits of the tokens that were generated already; `start`: of the answer."""

    def __init__(self, start: int, penalty: float):
        self.start, self.penalty = start, penalty

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros_like(scores).scatter(1, input_ids[:, self.start :], self.penalty)
        return scores - seen


def as_jpeg(image: Image.Image) -> Image.Image:
    """Return an image as the upsampler saw it in training: from a JPEG file of quality 92."""
    file = BytesIO()
    image.save(file, "JPEG", quality=92)
    return Image.open(file).convert("RGB")

"""Prompt upsampling for FLUX.2 [dev]: a language model writes the prompt out in full.

`upsample_locally` runs the Mistral checkpoint that also encodes FLUX.2 [dev]'s prompts.
`upsample_remotely` calls a server of OpenAI's chat completions. Both see the reference images,
which are RGB. The procedure is Black Forest Labs' (black-forest-labs/flux2,
src/flux2/text_encoder.py); the two instructions are our own.
"""

import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from modules.chat_completions import complete, data_url, printable
from PIL import Image

from flux import vision_language
from flux.errors import UserError
from flux.tokenizers import MistralTokenizer

TEMPERATURE = 0.15
NEW_TOKENS = 512
MAX_TOKENS = 2048  # of the prompt with its template
MAX_PIXELS = 768**2  # of an image
EXPAND = (
    "You write prompts for an image generator. Rewrite the user's prompt as one paragraph that "
    "shows a single picture in concrete, visible detail: subject, surroundings, materials, "
    "colours, light, composition, style. Keep all that the user fixed, such as subjects, numbers, "
    "places, colours and style, and copy text in quotation marks character by character. Answer "
    "with the prompt alone."
)
EDIT = (
    "You write instructions for an image editor. The user shows one picture or several, and asks "
    "for a change. Answer with one concise instruction that says what changes, how that looks "
    "afterwards, and what stays as it is; name things by what can be seen. Copy text in quotation "
    "marks character by character. Answer with the instruction alone."
)

# ------------------------------------------------------------------ on this machine


def upsample_locally(
    prompt: str,
    folder: Path,
    images: Sequence[Image.Image] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """Return the prompt, or with images the edit instruction, as Mistral writes it.

    `folder`: a FLUX.2-dev repository with `tokenizer/tokenizer.json` and all of `text_encoder/`.
    The model (48 GB in bfloat16) is released afterwards. UserError without transformers or the
    files, for more than 2048 tokens, and for an empty answer.
    """
    folder, device = Path(folder), torch.device(device)
    advice = "Take all of text_encoder/ from the FLUX.2-dev repository, or upsample by a server."
    needed = ("Mistral3ForConditionalGeneration", "PixtralImageProcessorPil")
    model = vision_language.load_model(needed, folder / "text_encoder", device, dtype, advice)
    image_tokens, image_inputs = "", {}
    if images:
        image_tokens, image_inputs = vision_language.image_inputs(_in_a_row(images), model)
    chat = MistralTokenizer(folder / "tokenizer")
    chat.prefix = f"<s>[SYSTEM_PROMPT]{EDIT if images else EXPAND}[/SYSTEM_PROMPT]"
    if images:
        chat.prefix += f"[INST]{image_tokens}[/INST]"
    chat.prefix += "[INST]"
    tokens = chat([prompt], MAX_TOKENS + 1)
    ids = tokens.ids[tokens.mask][None].to(device)  # (1, L) without padding
    if ids.shape[1] > MAX_TOKENS:
        raise UserError(
            f"prompt: is too long to upsample. With its template, it may have {MAX_TOKENS} tokens."
        )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=chat.pad_id,
            do_sample=True,
            temperature=TEMPERATURE,
            max_new_tokens=NEW_TOKENS,
            **image_inputs,
        )
    del model
    gc.collect()
    torch.cuda.empty_cache()
    text = printable(chat.tokenizer.decode(out[0, ids.shape[1] :].tolist()))
    if not text:
        raise UserError(
            f"{folder}: the model answered without text. Try another prompt or seed, or do not "
            "upsample."
        )
    return text


def _in_a_row(images: Sequence[Image.Image]) -> Image.Image:
    """Return the images beside each other on white, shrunk."""
    width, height = sum(image.width for image in images), max(image.height for image in images)
    row = Image.new("RGB", (width, height), "white")
    left = 0
    for image in images:
        row.paste(image, (left, (height - image.height) // 2))
        left += image.width
    return _shrink(row)


# ------------------------------------------------------------------ on a server


def upsample_remotely(
    prompt: str,
    url: str,
    model: str,
    key: str | None = None,
    images: Sequence[Image.Image] = (),
    timeout: float = 120,
    total_timeout: float = 600,
) -> str:
    """Return the prompt as the server at `url` writes it; see `chat_completions.complete`."""
    content: str | list[dict] = prompt
    if images:
        urls = [data_url(_shrink(image)) for image in images]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": prompt})
    messages = [
        {"role": "system", "content": EDIT if images else EXPAND},
        {"role": "user", "content": content},
    ]
    settings = {"temperature": TEMPERATURE, "max_tokens": NEW_TOKENS}
    limits = {"timeout": timeout, "total_timeout": total_timeout}
    return complete(messages, url, model, settings, key, **limits)


def _shrink(image: Image.Image) -> Image.Image:
    """Resize to at most MAX_PIXELS."""
    scale = (MAX_PIXELS / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)

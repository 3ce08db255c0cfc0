"""Tiny judges in the layouts of the released repositories, and what transformers says of them."""

import json
from pathlib import Path

import torch
from PIL import Image
from support.tokenizer_files import MISTRAL_TEMPLATE, make_mistral

from flux.parity.reference import randomise

KINDS = ("mistral3", "llava")
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
)


def save_judge(folder: Path, kind: str = "mistral3") -> None:
    """Write config.json, model.safetensors and tokenizer.json; every parameter is random.

    The logits of yes and no are close, so that the judge says both, depending on the question. A
    token is 8x8 pixels, and images have at most 64x64.
    """
    import transformers

    make_mistral(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for word in ("yes", "no"):
        vocabulary.setdefault(word, len(vocabulary))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = transformers.MistralConfig(
        **SIZES, vocab_size=420, num_key_value_heads=2, sliding_window=None
    )
    size = 4 if kind == "mistral3" else 8
    vision = transformers.PixtralVisionConfig(**SIZES, patch_size=size, image_size=64)
    if kind == "mistral3":
        config = transformers.Mistral3Config(text_config=text, vision_config=vision)
        model = transformers.Mistral3ForConditionalGeneration(config)
    else:
        config = transformers.LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=vocabulary["[IMG]"],
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
        model = transformers.LlavaForConditionalGeneration(config)
    randomise(model)
    rows = model.lm_head.weight.data
    rows[vocabulary["yes"]] = rows[vocabulary["no"]] + 3 * torch.randn(rows.shape[1])
    model.bfloat16().save_pretrained(folder)


def probability(folder: Path, before: str, image: Image.Image | None, after: str) -> float:
    """Return p(yes) as transformers generates one token of two that are allowed, in bfloat16.

    This is the procedure of Black Forest Labs' code.
    """
    import transformers

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    name = "Mistral3" if kind == "mistral3" else "Llava"
    model = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(
        folder, dtype=torch.bfloat16
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", pad_token="<pad>"
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE
    content, seen = [dict(type="text", text=before)], {}
    if image is not None:
        content += [dict(type="image"), dict(type="text", text=after)]
    message = [dict(role="user", content=content)]
    text = tokenizer.apply_chat_template(message, tokenize=False)
    if image is not None:
        scale = (512**2 / (image.width * image.height)) ** 0.5
        resized = image.resize((int(image.width * scale), int(image.height * scale)))
        processor = transformers.PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 64})
        seen = dict(processor(resized, return_tensors="pt"))
        seen["pixel_values"] = seen["pixel_values"].to(torch.bfloat16)
        lines, columns = (seen["image_sizes"][0] // 8).tolist()
        row = "[IMG]" * columns
        text = text.replace("[IMG]", "[IMG_BREAK]".join([row] * lines) + "[IMG_END]")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])

    def only_both(_, scores):
        allowed = torch.full_like(scores, scores.min().item() - 1)
        allowed[:, [yes, no]] = scores[:, [yes, no]]
        return allowed

    out = model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        **seen,
        max_new_tokens=1,
        do_sample=False,
        logits_processor=[only_both],
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    p = out.scores[0][0, [yes, no]].float().softmax(-1)[0].item()
    answer = out.sequences[0, -1].item()
    assert answer in (yes, no) and (answer == yes) == (p > 0.5)
    return p

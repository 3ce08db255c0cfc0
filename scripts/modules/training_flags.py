"""The flags of scripts/train.py. Their defaults for each model are in training_options.py."""

import argparse
from pathlib import Path

from modules.command_line import Parser, add_hidden_alias, add_quiet

OLD_FLAGS = {  # older names, and those of diffusers' scripts -> ours
    "--batch": "--batch-size",
    "--accumulate": "--gradient-accumulation-steps",
    "--checkpointing": "--gradient-checkpointing",
    "--targets": "--target-modules",
    "--drop-captions": "--caption-dropout",
    "--guided": "--train-at-guidance",
    "--learning-rate": "--lr",
    "--max-train-steps": "--steps",
    "--pretrained-model-name-or-path": "--model",
    "--rank": "--lora-rank",
    "--resolution": "--size",
    "--train-batch-size": "--batch-size",
    "--validation-prompt": "--prompt",
}
OTHERS = {  # flags of diffusers' and kohya's scripts -> what to use here
    "--cache-latents": "--cache, which is always on",
    "--dataset-name": "IMAGES, the first argument",
    "--instance-data-dir": "IMAGES, the first argument",
    "--lr-warmup-steps": "--warmup",
    "--max-train-epochs": "--steps",
    "--network-dim": "--lora-rank",
    "--output-dir": "RUN, the second argument",
    "--train-data-dir": "IMAGES, the first argument",
    "--validation-steps": "--sample-every",
}


def parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of scripts/train.py."""
    p = Parser(
        usage="%(prog)s IMAGES RUN [FLAG ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.others = OTHERS
    add = p.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder of images and captions")
    add(
        "run",
        type=Path,
        metavar="RUN",
        help="folder for all results; a run in this folder is resumed",
    )
    add("--model", metavar="NAME", help="default: flux.2-tiny, an embedded toy")
    add_quiet(p)
    add("--weights", type=Path, metavar="DIR", help="folder of the models' files, as for sample.py")
    add("--transformer", type=Path, metavar="FILE", help="start from this file")
    add("--device", help="default: the fastest available")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="dtype of matrix products (default: bfloat16; float32 for the toy)",
    )
    add = p.add_argument_group("trained weights").add_argument
    add(
        "--lora-rank",
        type=int,
        metavar="R",
        help="train a LoRA of this rank (default: all weights, in float32)",
    )
    add(
        "--target-modules",
        action="append",
        metavar="PATTERN",
        help="layers with a LoRA, such as '*attn.qkv' (repeatable; default: attention and MLP)",
    )
    add("--ema", type=float, metavar="D", help="export a moving average of the weights, of decay D")
    add(
        "--distill",
        metavar="TEACHER",
        help="train a student with a guidance embedding to match this model, or this transformer "
        "FILE, with classifier-free guidance (starts from its teacher, or --transformer)",
    )
    add = p.add_argument_group("training").add_argument
    add("--steps", type=int, default=1000, help="default: 1000")
    add(
        "--lr",
        type=float,
        help="learning rate after warm-up, on a cosine schedule (default: 1e-4 for a LoRA, else "
        "1e-5)",
    )
    add(
        "--optimizer",
        choices=("adamw", "adamw8bit"),
        default="adamw",
        help="default: adamw; adamw8bit needs a quarter of the memory, and bitsandbytes",
    )
    add("--warmup", type=int, default=50, metavar="STEPS", help="default: 50")
    add("--batch-size", type=int, default=1, metavar="N", help="images in a batch (default: 1)")
    add(
        "--context",
        type=int,
        default=1,
        metavar="N",
        help="with torchrun: processes that share the tokens of each image (default: 1)",
    )
    add(
        "--gradient-accumulation-steps",
        type=int,
        default=1,
        metavar="N",
        help="batches in a step (default: 1)",
    )
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="compute each block again in the backward pass, to save memory",
    )
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help="scale images to PIXELS², keeping the aspect ratio (default: the model's size)",
    )
    add(
        "--guidance",
        type=float,
        metavar="G",
        help="value of the guidance input during training (default: 1)",
    )
    add(
        "--guidance-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="draw the guidance of each image, with --distill (default: 1 5) or "
        "--train-at-guidance",
    )
    add(
        "--train-at-guidance",
        action="store_true",
        help="train a guidance-distilled model at inference guidance (--guidance; default: the "
        "model's), which keeps it distilled",
    )
    add(
        "--caption-dropout",
        type=float,
        metavar="P",
        help="share of captions left out, for classifier-free guidance (default: 0.1 for models "
        "that use CFG and for --distill, else 0)",
    )
    add("--seed", type=int, default=0)
    add = p.add_argument_group("files").add_argument
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder of latents and text features (default: RUN/cache)",
    )
    add("--skip-broken", action="store_true", help="leave out images that cannot be read")
    add(
        "--save-every",
        type=int,
        default=250,
        metavar="STEPS",
        help="write a checkpoint (default: 250)",
    )
    add(
        "--sample-every",
        type=int,
        default=250,
        metavar="STEPS",
        help="sample images; 0: none (default: 250)",
    )
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="prompt of a sample image (repeatable; default: the first captions)",
    )
    for old, new in OLD_FLAGS.items():
        add_hidden_alias(p, old, new)
    return p

"""The flags of scripts/train.py: their defaults for each model, and the checks before training."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from modules.command_line import with_flags

import flux
from flux.configs import ModelSpec
from flux.errors import UserError
from flux.image_io import control
from flux.image_io.request import MAX_IMAGES
from flux.runtime.devices import available_memory
from flux.training import dataset, distributed
from flux.training.log import report
from flux.training.memory import TrainingMemory, build_for_training, estimate_memory
from flux.training.trainer import optimizer_class
from flux.transformer import Flux
from flux.weights.files import shard_files
from flux.weights.load import infer_config, init_empty, load_module
from flux.weights.locate import get_spec, with_transformer
from flux.weights.quantization import QuantizedLinear

# The library's arguments -> flags, for messages.
FLAGS = {
    "batch_size": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation-steps",
    "ema": "--ema",
    "guidance": "--guidance",
    "guidance_range": "--guidance-range",
    "caption_dropout": "--caption-dropout",
    "distill": "--distill",
    "train_at_guidance": "--train-at-guidance",
    "seed": "--seed",
    "dtype": "--dtype",
    "device": "--device",
    "model": "--model",
    "weights": "--weights",
    "transformer": "--transformer",
    "optimizer": "--optimizer",
    "target_modules": "--target-modules",
    "size": "--size",
    "prompt": "--prompt",
    "steps": "--steps",
    "rank": "--lora-rank",
}
# Names in the config of checkpoints that were written before the flags were renamed.
OLD_CONFIG_NAMES = {
    "pictures": "images",
    "--batch": "batch_size",
    "--accumulate": "gradient_accumulation_steps",
    "--ema": "ema",
    "--guidance": "guidance",
    "--guidance-range": "guidance_range",
    "--drop-captions": "caption_dropout",
    "--seed": "seed",
    "--dtype": "dtype",
    "--distill": "distill",
    "--guided": "train_at_guidance",
}
BOUNDS = {  # of whole numbers; the network bounds the rank
    "steps": (1, 10**9),
    "batch_size": (1, 2**16),
    "gradient_accumulation_steps": (1, 2**16),
    "save_every": (1, 2**63 - 1),
    "sample_every": (0, 2**63 - 1),
    "lora_rank": (1, 2**63 - 1),
    "warmup": (0, 2**63 - 1),
    "seed": (0, 2**63 - 1),
}
QUANTIZED = "is quantized, but weights are trained in float32. Use the model's bfloat16 file."


def load_pipeline(args: argparse.Namespace) -> flux.Pipeline:
    """Load the model. With --distill, the pipeline holds the teacher."""
    device = distributed.init(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.distill is None:
        refuse_flow_map(get_spec(args.model, args.transformer))
        return flux.load(args.model, args.weights, device, dtype, transformer=args.transformer)
    if args.distill.lower() in flux.MODELS:
        if args.model:
            raise UserError(
                f"--distill: {args.distill} is a model already. Leave --model {args.model} out."
            )
        refuse_teacher(args, flux.MODELS[args.distill.lower()])
        return flux.load(args.distill, args.weights, device, dtype)
    if not Path(args.distill).exists():
        raise UserError(
            f"--distill: no model or file is called {args.distill}. Models: "
            + ", ".join(flux.MODELS)
        )
    try:
        refuse_teacher(args, get_spec(args.model, args.distill))
        return flux.load(args.model, args.weights, device, dtype, transformer=args.distill)
    except UserError as error:
        message = with_flags(str(error), FLAGS | {"transformer": "--distill"})
        raise UserError(message.replace("--transformer", "--distill")) from None


def refuse_flow_map(spec: ModelSpec) -> None:
    """Raise UserError for the distilled FLUX 3."""
    if is_flow_map(spec):
        base = next(row.name for row in flux.MODELS.values() if row.flux3 and not row.distilled)
        raise UserError(
            f"model: {spec.name} is a flow map: it predicts a whole step and reads the time at "
            f"which the step ends, which no published loss trains. Use {base}."
        )


def is_flow_map(spec: ModelSpec) -> bool:
    return spec.flux3 and bool(spec.distilled)


def refuse_teacher(args: argparse.Namespace, spec: ModelSpec) -> None:
    """Raise UserError for a teacher whose students would have no guidance embedding."""
    if spec.flux3:
        raise UserError(
            f"--distill: {args.distill} is FLUX 3, which has no guidance embedding to distill "
            "guidance into. Use a teacher of FLUX.1 or FLUX.2."
        )


# ------------------------------------------------------------------------ checks without the model


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UserError if a number is out of range, or two flags contradict each other."""
    for name, (least, most) in BOUNDS.items():
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"{flag}: must be at least {least} (got {value})")
        if value is not None and value > most:
            limit = "2^63 - 1" if most == 2**63 - 1 else f"{most:,}"
            raise UserError(f"{flag}: must be at most {limit} (got {value})")
    if args.target_modules and not args.lora_rank:
        raise UserError("--target-modules: selects layers for a LoRA. Add --lora-rank.")
    if args.ema is not None and not 0 < args.ema < 1:
        raise UserError(f"--ema: must be between 0 and 1 (got {args.ema:g}). Use 0.999.")
    if args.lr is not None and not 0 < args.lr < 1:
        raise UserError(f"--lr: must be between 0 and 1 (got {args.lr:g}). Use 1e-4.")
    if args.caption_dropout is not None and not 0 <= args.caption_dropout <= 1:
        raise UserError(f"--caption-dropout: must be from 0 to 1 (got {args.caption_dropout:g})")
    if args.size is not None and (args.size % 16 or not 64 <= args.size <= 2048):
        raise UserError(f"--size: must be a multiple of 16 from 64 to 2048 (got {args.size})")
    optimizer_class(args.optimizer)
    check_guidance(args)


def check_guidance(args: argparse.Namespace) -> None:
    """Check the flags about guidance, as far as they do not depend on the model."""
    low, high = args.guidance_range or (1, 1)
    if not 1 <= low <= high <= 100:
        raise UserError(
            f"--guidance-range: must be the lowest and the highest value, from 1 to 100 "
            f"(got {low:g} {high:g})"
        )
    if args.guidance_range and not (args.distill or args.train_at_guidance):
        raise UserError(
            "--guidance-range: needs --distill or --train-at-guidance. Add one of them, or leave "
            "it out."
        )
    if args.guidance is not None and not 0 <= args.guidance <= 100:
        raise UserError(f"--guidance: must be from 0 to 100 (got {args.guidance:g})")
    if args.guidance is not None and (args.guidance_range or args.distill):
        raise UserError(
            "--guidance: is one value, but this run draws values from a range. Leave it out, or "
            "use --guidance-range G G."
        )
    if args.distill and args.train_at_guidance:
        raise UserError("--distill: has a loss of its own. Leave --train-at-guidance out.")
    if args.distill and args.lora_rank:
        raise UserError("--distill: trains all weights. Leave --lora-rank out.")
    if args.train_at_guidance and args.caption_dropout:
        raise UserError(
            "--train-at-guidance: compares with the velocity without a caption, and does not train "
            "it. Leave --caption-dropout out."
        )


# ------------------------------------------------------------------------------ checks of the model


def resolve(
    args: argparse.Namespace, pipe: flux.Pipeline, samples: Sequence[dataset.Sample]
) -> None:
    """Set the defaults that depend on the model. UserError for what the model does not support."""
    spec = pipe.spec
    check_quantization(args, pipe)
    resolve_guidance(args, pipe)
    check_samples(args, pipe, samples)
    if spec.distilled:
        report(
            f"note: {spec.name}: {spec.distilled}, which this loss does not preserve. Train a base "
            "or dev model instead."
        )
    processes = distributed.world_size()
    if args.context < 1 or processes % args.context:
        raise UserError(
            f"--context: must divide the number of processes, {processes} (got {args.context})"
        )
    groups = processes // args.context
    if args.batch_size % groups:
        raise UserError(
            f"--batch-size: must be a multiple of the {groups} processes, or groups of --context "
            f"(got {args.batch_size})"
        )
    if processes > 1:
        if args.optimizer != "adamw":
            raise UserError(f"--optimizer: {args.optimizer} runs in one process only. Use adamw.")
        args.sample_every = 0
        report("note: no sample images: each of the processes would need all weights")
        pipe.transformer.device = torch.device("cpu")  # the processes take their shards from there
    if not args.lora_rank and not args.distill:
        pipe.transformer.dtype = torch.float32  # master weights
    args.size = args.size or spec.size
    args.lr = args.lr or (1e-4 if args.lora_rank else 1e-5)
    if args.caption_dropout is None:
        args.caption_dropout = 0.1 if spec.cfg or args.distill else 0.0


def check_quantization(args: argparse.Namespace, pipe: flux.Pipeline) -> None:
    """A quantized transformer is trained by a LoRA only, in one process."""
    if not is_quantized(pipe.transformer.shapes):
        return
    file = pipe.files["transformer"][0]
    if not args.lora_rank:
        other = "" if args.distill else " Or train a LoRA with --lora-rank."
        raise UserError(f"{file}: {QUANTIZED}{other}")
    if distributed.world_size() > 1:
        raise UserError(f"{file}: is quantized, and trained in one process only. Run one process.")


def check_samples(
    args: argparse.Namespace, pipe: flux.Pipeline, samples: Sequence[dataset.Sample]
) -> None:
    """Raise UserError if the model cannot be trained, or does not read what the samples have."""
    spec = pipe.spec
    if spec.image_mode in ("control", "redux") and spec.addon:
        addon = "an image encoder" if spec.image_mode == "redux" else "a LoRA"
        raise UserError(
            f"model: {spec.name} is flux.1-dev with {addon}, which cannot be trained here. "
            "Use another model."
        )
    for field, mode in (("control", "control"), ("mask", "fill")):
        if any(getattr(sample, field) for sample in samples) and spec.image_mode != mode:
            able = [s.name for s in flux.MODELS.values() if s.image_mode == mode and not s.addon]
            raise UserError(
                f"{args.images}: has samples with a {field}, which {spec.name} does not read. "
                f"Use {', '.join(able)}."
            )
    if spec.image_mode == "control" and not all(sample.control for sample in samples):
        control.check(spec.control)
    most = max(len(sample.references) for sample in samples)
    if most and (spec.image_mode != "reference" or spec.kv_cached_references):
        able = [
            s.name
            for s in flux.MODELS.values()
            if s.image_mode == "reference" and not (s.kv_cached_references or is_flow_map(s))
        ]
        raise UserError(
            f"{args.images}: has references, which cannot be used to train {spec.name}. "
            f"Use {', '.join(able)}."
        )
    limit = 1 if spec.flux1 else MAX_IMAGES["reference"]
    if most > limit:
        raise UserError(
            f"{args.images}: has samples with {most} references, but {spec.name} reads {limit}"
        )


def resolve_guidance(args: argparse.Namespace, pipe: flux.Pipeline) -> None:
    """Set the guidance input. With --distill, make the pipeline's row that of a student."""
    spec = pipe.spec
    if args.distill:
        if has_guidance(spec):
            raise UserError(
                f"--distill: {args.distill} has a guidance embedding, so its guidance is distilled "
                "already. Use a teacher with classifier-free guidance."
            )
        args.guidance_range = args.guidance_range or (1.0, 5.0)
        default = spec.guidance or sum(args.guidance_range) / 2
        pipe.spec = with_transformer(
            replace(spec, guidance=default), replace(spec.flux_config, guidance=True)
        )
        if args.transformer:
            load_student(args, pipe)
    elif not has_guidance(spec) and (args.train_at_guidance or args.guidance is not None):
        flag = "--train-at-guidance" if args.train_at_guidance else "--guidance"
        raise UserError(f"{flag}: {spec.name} has no guidance embedding. Leave it out.")
    # At guidance 1 a guidance-distilled model predicts the plain velocity of the data, which is the
    # target of the plain loss. At other values that loss would teach it to ignore guidance.
    if args.guidance is None:
        args.guidance = spec.guidance if args.train_at_guidance else 1.0
    args.guidance_range = tuple(args.guidance_range or (args.guidance, args.guidance))
    if args.train_at_guidance and not (args.guidance or 0) >= 1:
        raise UserError(
            "--guidance: must be at least 1 with --train-at-guidance "
            f"(got {args.guidance or 0:g}). Use 3.5."
        )


def has_guidance(spec: ModelSpec) -> bool:
    """Return whether a model has a guidance embedding."""
    return not spec.flux3 and spec.flux_config.guidance


def load_student(args: argparse.Namespace, pipe: flux.Pipeline) -> Flux:
    """Load the student of --transformer. UserError if its shape is not that of a student."""
    config = infer_config(args.transformer)
    if config != pipe.spec.flux_config:
        fault = "has another shape" if config.guidance else "has no guidance embedding"
        raise UserError(
            f"{args.transformer}: is not a student of {args.distill}: it {fault}. Leave "
            "--transformer out to start from the teacher."
        )
    student = init_empty(lambda: Flux(config))
    load_module(student, shard_files(args.transformer), dtype=torch.float32)
    if is_quantized(student):
        raise UserError(f"{args.transformer}: {QUANTIZED}")
    return student


def is_quantized(module: torch.nn.Module) -> bool:
    """Return whether any layer is quantized."""
    return any(isinstance(layer, QuantizedLinear) for layer in module.modules())


def check_memory(
    args: argparse.Namespace, pipe: flux.Pipeline, samples: Sequence[dataset.Sample]
) -> None:
    """Report the memory of a step. UserError if more is needed than free."""
    dtype = pipe.transformer.dtype if args.lora_rank else torch.float32
    processes, tokens = distributed.world_size(), (args.size // 16) ** 2
    references = max(len(sample.references) for sample in samples)
    build = partial(
        build_for_training,
        pipe.spec.transformer,
        dtype,
        args.lora_rank,
        args.target_modules or ["*"],
        references > 0,
    )
    memory = estimate_memory(
        pipe.spec,
        build,
        tokens,
        batch_size=args.batch_size * args.context // processes,
        device=pipe.device,
        dtype=pipe.dtype,
        ema=args.ema is not None,
        gradient_checkpointing=args.gradient_checkpointing,
        optimizer=args.optimizer,
        reference_tokens=references * tokens,
        text_tokens=longest_caption(pipe, samples),
    )
    weights = memory.weights
    if is_quantized(pipe.transformer.shapes):
        weights = pipe.transformer.nbytes
    if args.distill:
        weights += pipe.transformer.nbytes  # the teacher's
    memory = TrainingMemory(
        weights // processes, memory.states // processes, memory.activations // args.context
    )
    free = available_memory(pipe.device).device
    report(
        f"memory: weights {gb(memory.weights)}, gradients and optimizer {gb(memory.states)}, "
        f"activations {gb(memory.activations)}: at least {gb(memory.total)} GB of {gb(free)}"
    )
    if memory.total > free:
        advice = {
            "--gradient-checkpointing": not args.gradient_checkpointing,
            "a smaller --size": True,
            "a smaller --batch-size": args.batch_size > 1,
            "--lora-rank": not args.lora_rank,
            "--optimizer adamw8bit": args.optimizer == "adamw" and processes == 1,
        }
        raise UserError(
            f"not enough memory: training {pipe.spec.name} needs at least {gb(memory.total)} GB, "
            f"and {gb(free)} GB are free. Use "
            f"{' or '.join(words for words, helps in advice.items() if helps)}."
        )


def longest_caption(pipe: flux.Pipeline, samples: Sequence[dataset.Sample]) -> int:
    """Return the text tokens of the longest caption, padding included. Only FLUX 3's differ."""
    captions = {sample.caption for sample in samples} if pipe.spec.flux3 else set()
    lengths = [pipe.text.padded_length([""])]
    for caption in captions:
        with suppress(UserError):  # of a caption that is told when it is encoded
            lengths.append(pipe.text.padded_length([caption]))
    return max(lengths)


def gb(size: float) -> str:
    """Format a number of bytes in GB (10^9 bytes), without the unit."""
    return f"{size / 1e9:.3g}"

"""What scripts/train.py is asked for: its flags, the defaults that depend on the model, and what cannot be done."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import flux
from flux.errors import UserError
from flux.image_io import control
from flux.runtime.devices import available_memory
from flux.training import dataset
from flux.training import distributed as processes
from flux.training import trainer as training
from flux.training.log import say
from flux.transformer import Flux
from flux.weights.files import shard_files
from flux.weights.load import infer_config, init_empty, load_module
from flux.weights.locate import with_transformer
from flux.weights.quantization import QuantizedLinear

QUANTISED = "is quantised, and weights are trained in float32 or beside bfloat16: choose the model's bfloat16 file"


def parser(description: str) -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        description=description, formatter_class=as_written, allow_abbrev=False
    )
    p.add_argument("pictures", type=Path, help="folder of pictures and captions")
    p.add_argument(
        "run", type=Path, help="folder for all that is made; a run that it holds goes on"
    )
    p.add_argument("--model", metavar="NAME", help="default: flux.2-tiny, an embedded toy")
    p.add_argument(
        "--weights", type=Path, metavar="DIR", help="where the models' files are, as for sample.py"
    )
    p.add_argument(
        "--transformer", type=Path, metavar="FILE", help="begin with another one in BFL's layout"
    )
    p.add_argument("--device", help="default: the best there is")
    p.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of matrix products (default: bfloat16; float32 for the toy)",
    )
    what = p.add_argument_group("what is trained")
    what.add_argument(
        "--lora-rank",
        type=int,
        metavar="R",
        help="a LoRA of this rank (default: all weights, in float32)",
    )
    what.add_argument(
        "--targets",
        action="append",
        metavar="PATTERN",
        help="layers that the LoRA changes, such as "
        "'*attn.qkv' (repeatable; default: those of attention and MLP)",
    )
    what.add_argument(
        "--ema",
        type=float,
        metavar="D",
        help="keep an average of the weights, with this decay, and export that",
    )
    what.add_argument(
        "--distill",
        metavar="TEACHER",
        help="a student that is told its guidance, to give in one pass what this "
        "model, or this transformer FILE, gives in two (begins as its teacher, or --transformer)",
    )
    how = p.add_argument_group("how")
    how.add_argument("--steps", type=int, default=1000, help="default: 1000")
    how.add_argument(
        "--lr",
        type=float,
        help="after warm-up; falls as a cosine (default: 1e-4 for a LoRA, else 1e-5)",
    )
    how.add_argument(
        "--optimizer",
        choices=training.OPTIMIZERS,
        default="adamw",
        help="default: adamw; adamw8bit keeps its "
        "moments in a quarter of the memory, and needs bitsandbytes",
    )
    how.add_argument("--warmup", type=int, default=50, metavar="STEPS", help="default: 50")
    how.add_argument(
        "--batch", type=int, default=1, metavar="N", help="pictures at a time (default: 1)"
    )
    how.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="batches a step (default: 1)"
    )
    how.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute blocks again instead of keeping what is in them",
    )
    how.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="pictures are scaled to PIXELS² in their shape (default: the model's)",
    )
    how.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="what a guidance-distilled model is told (default: 1, see README)",
    )
    how.add_argument(
        "--guidance-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="drawn for each picture, with --distill (default: 1 5) or --guided",
    )
    how.add_argument(
        "--guided",
        action="store_true",
        help="train a guidance-distilled model at its guidance of use "
        "(--guidance; default: the model's), so that it stays distilled, see README",
    )
    how.add_argument(
        "--drop-captions",
        type=float,
        metavar="P",
        help="the share of captions left out, for classifier-free "
        "guidance (default: 0.1 for models that use it, and for --distill, else 0)",
    )
    how.add_argument("--seed", type=int, default=0)
    files = p.add_argument_group("files")
    files.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="for latents and text features (default: RUN/cache)",
    )
    files.add_argument(
        "--skip-broken", action="store_true", help="leave out pictures that cannot be read"
    )
    files.add_argument(
        "--save-every", type=int, default=250, metavar="STEPS", help="a checkpoint (default: 250)"
    )
    files.add_argument(
        "--sample-every",
        type=int,
        default=250,
        metavar="STEPS",
        help="sample pictures; 0: none (default: 250)",
    )
    files.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="of the samples (repeatable; default: the first captions)",
    )
    return p


def load(args: argparse.Namespace) -> flux.Pipeline:
    """With --distill, the transformer is the teacher."""
    device, dtype = processes.join(args.device), getattr(torch, args.dtype) if args.dtype else None
    if args.distill is None:
        return flux.load(args.model, args.weights, device, dtype, transformer=args.transformer)
    if args.distill.lower() in flux.MODELS:
        if args.model:
            raise UserError(
                f"--distill {args.distill} says which model it is: leave --model {args.model} out"
            )
        return flux.load(args.distill, args.weights, device, dtype)
    if not Path(args.distill).exists():
        raise UserError(
            f"--distill {args.distill}: there is no such file, and no such model; the models are "
            + ", ".join(flux.MODELS)
        )
    try:
        return flux.load(args.model, args.weights, device, dtype, transformer=args.distill)
    except UserError as error:
        raise UserError(str(error).replace("--transformer", "--distill")) from None


def check_numbers(args: argparse.Namespace) -> None:
    for flag in ("steps", "batch", "accumulate", "save_every", "lora_rank"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    for flag in (
        "steps",
        "batch",
        "accumulate",
        "save_every",
        "lora_rank",
        "warmup",
        "sample_every",
        "seed",
    ):
        if (getattr(args, flag) or 0) >= 2**63:
            raise UserError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at most 2^63 - 1"
            )
    for flag in ("warmup", "sample_every", "seed"):
        if getattr(args, flag) < 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 0")
    if args.targets and not args.lora_rank:
        raise UserError(
            "--targets says which layers a LoRA changes: give --lora-rank too, or leave it out"
        )
    if args.ema is not None and not 0 < args.ema < 1:
        raise UserError(f"--ema {args.ema:g}: must be between 0 and 1, such as 0.999")
    if args.lr is not None and not 0 < args.lr < 1:
        raise UserError(f"--lr {args.lr:g}: must be between 0 and 1, such as 1e-4")
    if args.drop_captions is not None and not 0 <= args.drop_captions <= 1:
        raise UserError(f"--drop-captions {args.drop_captions:g}: must be from 0 to 1")
    if args.size is not None and (args.size % 16 or not 64 <= args.size <= 2048):
        raise UserError(f"--size {args.size}: must be a multiple of 16 from 64 to 2048")
    training.optimizer_of(args.optimizer)
    check_guidance(args)


def check_guidance(args: argparse.Namespace) -> None:
    low, high = args.guidance_range or (1, 1)
    if not 1 <= low <= high <= 100:
        raise UserError(
            f"--guidance-range {low:g} {high:g}: must be the lowest and the highest, from 1 to 100"
        )
    if args.guidance_range and not (args.distill or args.guided):
        raise UserError(
            "--guidance-range is for --distill and --guided: add one of them, or leave it out"
        )
    if args.guidance is not None and not 0 <= args.guidance <= 100:
        raise UserError(f"--guidance {args.guidance:g}: must be from 0 to 100")
    if args.guidance is not None and (args.guidance_range or args.distill):
        raise UserError(
            "--guidance is one value, where a range is drawn from: leave it out, or give --guidance-range G G"
        )
    if args.distill and (args.guided or args.lora_rank):
        other = "--guided" if args.guided else "--lora-rank"
        raise UserError(f"--distill trains all weights, by a loss of its own: leave {other} out")
    if args.guided and args.drop_captions:
        raise UserError(
            "--guided compares with what the model makes of no caption, and does not train that: leave "
            "--drop-captions out"
        )


def settle(args: argparse.Namespace, pipe: flux.Pipeline, items: list[dataset.Item]) -> None:
    """The defaults that depend on the model; UserError for what it cannot do."""
    if is_quantised(pipe.transformer.shapes):
        if not args.lora_rank:
            other = "" if args.distill else ", or train a LoRA, with --lora-rank"
            raise UserError(f"{pipe.files['transformer'][0]} {QUANTISED}{other}")
        if processes.world() > 1:
            raise UserError(
                f"{pipe.files['transformer'][0]} is quantised, and trained by one process only: leave torchrun out"
            )
    settle_guidance(args, pipe)
    spec = pipe.spec
    if spec.image_mode in ("control", "redux") and spec.addon:
        of = "an image encoder" if spec.image_mode == "redux" else "a LoRA"
        raise UserError(
            f"{spec.name} is flux.1-dev with {of} beside it, which is not trained here: choose another"
        )
    for kind, use in (("control", "control"), ("mask", "fill")):
        if any(getattr(item, kind) for item in items) and spec.image_mode != use:
            able = ", ".join(
                s.name for s in flux.MODELS.values() if s.image_mode == use and not s.addon
            )
            raise UserError(
                f"{args.pictures} has items with a {kind}, which means nothing to {spec.name}; choose from {able}"
            )
    if spec.image_mode == "control" and not all(item.control for item in items):
        control.check(spec.control)
    if any(item.references for item in items) and (
        spec.image_mode != "reference" or spec.kv_cached_references
    ):
        able = ", ".join(
            s.name
            for s in flux.MODELS.values()
            if s.image_mode == "reference" and not s.kv_cached_references
        )
        raise UserError(
            f"{args.pictures} has references, and {spec.name} takes none in training; choose from {able}"
        )
    if spec.flux1 and any(len(item.references) > 1 for item in items):
        raise UserError(
            f"{args.pictures} has items with several references, and {spec.name} takes one"
        )
    if spec.distilled:
        say(
            f"note: {spec.name}: {spec.distilled}, which this loss does not preserve; a base or dev model is made to be trained"
        )
    if args.batch % processes.world():
        raise UserError(
            f"--batch {args.batch}: cannot be shared among {processes.world()} processes; give a multiple of that"
        )
    if processes.world() > 1:
        if args.optimizer != "adamw":
            raise UserError(f"--optimizer {args.optimizer} is for one process: leave it out")
        args.sample_every = 0
        say(
            "note: several processes make no sample pictures, for which each would need all weights"
        )
        pipe.transformer.device = torch.device("cpu")  # from where each process takes its part
    if not args.lora_rank and not args.distill:
        pipe.transformer.dtype = torch.float32  # the master weights
    args.size = args.size or spec.size
    args.lr = args.lr or (1e-4 if args.lora_rank else 1e-5)
    if args.drop_captions is None:
        args.drop_captions = 0.1 if spec.cfg or args.distill else 0.0


def settle_guidance(args: argparse.Namespace, pipe: flux.Pipeline) -> None:
    """What the network is told; with --distill, the pipeline is from here on that of a student."""
    spec = pipe.spec
    if args.distill:
        if spec.transformer.guidance:
            raise UserError(
                f"--distill {args.distill}: it is told its guidance, which was distilled already; choose a teacher "
                "with classifier-free guidance"
            )
        args.guidance_range = args.guidance_range or (1.0, 5.0)
        meant = spec.guidance or sum(args.guidance_range) / 2
        pipe.spec = with_transformer(
            replace(spec, guidance=meant), replace(spec.transformer, guidance=True)
        )
        if args.transformer:
            given_student(args, pipe)
    elif not spec.transformer.guidance and (args.guided or args.guidance is not None):
        raise UserError(
            f"{'--guided' if args.guided else f'--guidance {args.guidance:g}'}: {spec.name} has no such input; "
            "leave it out"
        )
    # At guidance 1 a distilled model gives the plain velocity of the data, which is what the plain loss compares with: at the
    # guidance of use, it would be taught to ignore it.
    args.guidance = (
        (spec.guidance if args.guided else 1.0) if args.guidance is None else args.guidance
    )
    args.guidance_range = tuple(args.guidance_range or (args.guidance, args.guidance))
    if args.guided and not (args.guidance or 0) >= 1:
        raise UserError(
            f"--guided --guidance {args.guidance or 0:g}: must be at least 1, such as 3.5"
        )


def given_student(args: argparse.Namespace, pipe: flux.Pipeline) -> Flux:
    """Of --transformer; UserError if it is none of the teacher's."""
    config = infer_config(args.transformer)
    if config != pipe.spec.transformer:
        fault = "has another shape" if config.guidance else "has no input for guidance"
        raise UserError(
            f"--transformer {args.transformer} is no student of {args.distill}: it {fault}; leave it out, to begin "
            "as the teacher"
        )
    student = init_empty(lambda: Flux(config))
    load_module(
        student,
        shard_files(args.transformer),
        dtype=torch.float32,
        prefixes=("", "model.diffusion_model."),
    )
    if is_quantised(student):
        raise UserError(f"{args.transformer} {QUANTISED}")
    return student


def is_quantised(module: torch.nn.Module) -> bool:
    return any(isinstance(layer, QuantizedLinear) for layer in module.modules())


def tell_memory(args: argparse.Namespace, pipe: flux.Pipeline, items: list[dataset.Item]) -> None:
    """UserError if it is more than there is."""
    dtype = pipe.transformer.dtype if args.lora_rank else torch.float32
    make = partial(
        training.untrained, pipe.spec.transformer, dtype, args.lora_rank, args.targets or ["*"]
    )
    tokens, world = (
        (args.size // 16) ** 2 * (1 + max(len(item.references) for item in items)),
        processes.world(),
    )
    need = training.memory(
        pipe.spec,
        make,
        tokens,
        args.batch // world,
        pipe.device,
        pipe.dtype,
        args.ema is not None,
        args.checkpointing,
        args.optimizer,
    )
    if is_quantised(pipe.transformer.shapes):
        need = need._replace(weights=pipe.transformer.nbytes)
    teacher = pipe.transformer.nbytes if args.distill else 0
    need = need._replace(weights=(need.weights + teacher) // world, states=need.states // world)
    room = available_memory(pipe.device).device

    def gb(size):
        return f"{size / 1e9:.3g}"

    listed = f"weights {gb(need.weights)}, gradients and the optimizer {gb(need.states)}, activations {gb(need.activations)}"
    say(f"memory: {listed}: at least {gb(need.total)} GB of {gb(room)}")
    if need.total > room:
        advice = {
            "--checkpointing": not args.checkpointing,
            "a smaller --size": True,
            "a smaller --batch": args.batch > 1,
            "--lora-rank": not args.lora_rank,
            "--optimizer adamw8bit": args.optimizer == "adamw" and world == 1,
        }
        raise UserError(
            f"training {pipe.spec.name} so takes at least {gb(need.total)} GB, and {gb(room)} GB are free: use "
            f"{' or '.join(words for words, helps in advice.items() if helps)}"
        )

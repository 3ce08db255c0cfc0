"""Trains the transformer of any FLUX model, or a LoRA of it, on a folder of pictures with captions.

    python scripts/train.py pictures runs/style --lora-rank 4                  # the embedded toy
    python scripts/train.py pictures runs/style --lora-rank 16 --model flux.2-klein-base-4b --checkpointing
    python scripts/train.py edits runs/edits --lora-rank 32 --model flux.1-kontext-dev --checkpointing
    torchrun --nproc-per-node 8 scripts/train.py pictures runs/whole --model flux.2-klein-base-4b --checkpointing --batch 8
    python scripts/train.py pictures runs/dev --distill flux.2-klein-base-4b   # a student that is told its guidance

A caption lies beside its picture, in a .txt of the same name; or metadata.jsonl lists all, a line each:
{"image": "b.png", "caption": "make it night", "references": ["a.png"]}, where references are for models that edit.

In the run's folder appear the trained weights (lora.safetensors, or transformer.safetensors), a log (loss.csv, loss.png),
sample pictures, and the checkpoint. The same command goes on from that, bit for bit, wherever the run was stopped.
"""

import argparse
import csv
import hashlib
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from tqdm import tqdm

import flux
from flux import conditioning, dataset, distillation, processes, training
from flux.conditioning import Conditions
from flux.errors import NonFiniteError, UserError
from flux.files import shard_files
from flux.memory import room_on
from flux.parity.plots import Drawing, Label, Line, LogScale
from flux.quantization import QuantizedLinear
from flux.text import TextFeatures
from flux.transformer import Flux
from flux.weights import blank, infer_config, load_module

QUANTISED = "is quantised, and weights are trained in float32 or beside bfloat16: choose the model's bfloat16 file"
SAMPLES = 4  # pictures on a sheet, where --prompt does not say of what


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("pictures", type=Path, help="folder of pictures and captions")
    p.add_argument("run", type=Path, help="folder for all that is made; a run that it holds goes on")
    p.add_argument("--model", metavar="NAME", help="default: the embedded toy, flux.2-tiny")
    p.add_argument("--weights", type=Path, metavar="DIR", help="where the models' files are, as for sample.py")
    p.add_argument("--transformer", type=Path, metavar="FILE", help="begin with another one in BFL's layout")
    p.add_argument("--device", help="default: the best there is")
    p.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of matrix products (default: bfloat16; float32 for the toy)"
    )
    what = p.add_argument_group("what is trained")
    what.add_argument("--lora-rank", type=int, metavar="R", help="a LoRA of this rank (default: all weights, in float32)")
    what.add_argument("--targets", action="append", metavar="PATTERN", help="layers that the LoRA changes, such as "
                      "'*attn.qkv' (repeatable; default: all matrices of all blocks)")  # fmt: skip
    what.add_argument("--ema", type=float, metavar="D", help="keep an average of the weights, with this decay, and export that")
    what.add_argument("--distill", metavar="TEACHER", help="a student that is told its guidance, to give in one pass what this "
                      "model, or this transformer FILE, gives in two (begins as its teacher, or --transformer)")  # fmt: skip
    how = p.add_argument_group("how")
    how.add_argument("--steps", type=int, default=1000, help="default: 1000")
    how.add_argument("--lr", type=float, help="after warm-up; falls as a cosine (default: 1e-4 for a LoRA, else 1e-5)")
    how.add_argument("--warmup", type=int, default=50, metavar="STEPS", help="default: 50")
    how.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at a time (default: 1)")
    how.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches a step (default: 1)")
    how.add_argument("--checkpointing", action="store_true", help="compute blocks again instead of keeping what is in them")
    how.add_argument("--size", type=int, metavar="PIXELS", help="pictures are scaled to PIXELS² in their shape (default: the "
                     "model's)")  # fmt: skip
    how.add_argument(
        "--guidance", type=float, metavar="G", help="what a guidance-distilled model is told (default: 1, see README)"
    )
    how.add_argument("--guidance-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="drawn for each picture, with "
                     "--distill (default: 1 5) or --guided")  # fmt: skip
    how.add_argument("--guided", action="store_true", help="train a guidance-distilled model at its guidance of use "
                     "(--guidance; default: the model's), so that it stays distilled, see README")  # fmt: skip
    how.add_argument("--drop-captions", type=float, metavar="P", help="the share of captions left out, for classifier-free "
                     "guidance (default: 0.1 for models that use it, and for --distill, else 0)")  # fmt: skip
    how.add_argument("--seed", type=int, default=0)
    files = p.add_argument_group("files")
    files.add_argument("--cache", type=Path, metavar="DIR", help="for latents and text features (default: RUN/cache)")
    files.add_argument("--skip-broken", action="store_true", help="leave out pictures that cannot be read")
    files.add_argument("--save-every", type=int, default=250, metavar="STEPS", help="a checkpoint (default: 250)")
    files.add_argument("--sample-every", type=int, default=250, metavar="STEPS", help="sample pictures; 0: none (default: 250)")
    files.add_argument("--prompt", action="append", metavar="TEXT", help="of the samples (repeatable; default: the first "
                       "captions)")  # fmt: skip
    return p


def main() -> int:
    args = parser().parse_args()
    warnings.showwarning = lambda message, *_, **__: say(f"note: {message}")
    try:
        return train(args)
    except (UserError, NonFiniteError) as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or args.run}: {error.strerror or error}")
    except KeyboardInterrupt:
        return fail("stopped; what was encoded and saved is kept", 130)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return fail("out of memory: use --checkpointing, a smaller --batch or --size, or --lora-rank")
    finally:
        processes.leave()


def train(args: argparse.Namespace) -> int:
    # 1. what is asked for, and what that takes
    check_numbers(args)
    items = dataset.read_folder(args.pictures)
    pipe = load(args)
    settle(args, pipe, items)
    tell_memory(args, pipe, items)

    # 2. pictures and captions, as the network takes them
    args.run.mkdir(parents=True, exist_ok=True)
    cache = dataset.Cache(args.cache or args.run / "cache", pipe, args.size)
    with processes.one_before_the_others():  # these find all of it in the cache
        examples = encode(args, cache, items)
        empty = cache.features("")
        samples = prepare_samples(args, cache, list(examples.values())) if args.sample_every else []
    pipe.text.release()
    pipe.encoder.release()

    # 3. the network
    torch.manual_seed(args.seed)
    teacher, network = begin(args, pipe)
    network = adapted(args, network, pipe.device)
    trainer = training.Trainer(
        network, args.run / "checkpoint.safetensors", about(args, pipe, examples.values()), steps=args.steps, rate=args.lr,
        warmup=args.warmup, ema=args.ema,
    )  # fmt: skip
    count = sum(p.numel() for p in trainer.parameters.values())
    say(f"{pipe.spec.name}: {count:,} parameters to train, on {pipe.device}, products in {str(pipe.dtype)[6:]}"
        + (f"; goes on at step {trainer.step}" if trainer.step else ""))  # fmt: skip

    # 4. the steps
    draws = dataset.Draws(list(examples.values()), args.batch, args.seed, len(pipe.spec.transformer.axes_dim), empty,
                           args.drop_captions)  # fmt: skip
    code = run(args, pipe, network, teacher, trainer, draws, samples)
    if code:
        return fail(f"stopped at step {trainer.step}, and saved; the same command goes on from there", code)

    # 5. the result
    path = export(args, network, trainer, pipe.dtype)
    if processes.rank() == 0:
        print(path)
    return 0


# ---------------------------------------------------------------- what is asked for


def load(args: argparse.Namespace) -> flux.Pipeline:
    """With --distill, the transformer is the teacher."""
    device, dtype = processes.join(args.device), getattr(torch, args.dtype) if args.dtype else None
    if args.distill is None:
        return flux.load(args.model, args.weights, device, dtype, transformer=args.transformer)
    if args.distill.lower() in flux.MODELS:
        if args.model:
            raise UserError(f"--distill {args.distill} says which model it is: leave --model {args.model} out")
        return flux.load(args.distill, args.weights, device, dtype)
    if not Path(args.distill).exists():
        raise UserError(f"--distill {args.distill}: there is no such file, and no such model; the models are "
                        + ", ".join(flux.MODELS))  # fmt: skip
    try:
        return flux.load(args.model, args.weights, device, dtype, transformer=args.distill)
    except UserError as error:
        raise UserError(str(error).replace("--transformer", "--distill")) from None


def check_numbers(args: argparse.Namespace) -> None:
    for flag in ("steps", "batch", "accumulate", "save_every", "lora_rank"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    for flag in ("warmup", "sample_every", "seed"):
        if getattr(args, flag) < 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 0")
    if args.targets and not args.lora_rank:
        raise UserError("--targets says which layers a LoRA changes: give --lora-rank too, or leave it out")
    if args.ema is not None and not 0 < args.ema < 1:
        raise UserError(f"--ema {args.ema:g}: must be between 0 and 1, such as 0.999")
    if args.lr is not None and not 0 < args.lr < 1:
        raise UserError(f"--lr {args.lr:g}: must be between 0 and 1, such as 1e-4")
    if args.drop_captions is not None and not 0 <= args.drop_captions <= 1:
        raise UserError(f"--drop-captions {args.drop_captions:g}: must be from 0 to 1")
    if args.size is not None and (args.size % 16 or not 64 <= args.size <= 2048):
        raise UserError(f"--size {args.size}: must be a multiple of 16 from 64 to 2048")
    check_guidance(args)


def check_guidance(args: argparse.Namespace) -> None:
    low, high = args.guidance_range or (1, 1)
    if not 1 <= low <= high <= 100:
        raise UserError(f"--guidance-range {low:g} {high:g}: must be the lowest and the highest, from 1 to 100")
    if args.guidance_range and not (args.distill or args.guided):
        raise UserError("--guidance-range is for --distill and --guided: add one of them, or leave it out")
    if args.guidance is not None and (args.guidance_range or args.distill):
        raise UserError("--guidance is one value, where a range is drawn from: leave it out, or give --guidance-range G G")
    if args.distill and (args.guided or args.lora_rank):
        other = "--guided" if args.guided else "--lora-rank"
        raise UserError(f"--distill trains all weights, by a loss of its own: leave {other} out")
    if args.guided and args.drop_captions:
        raise UserError("--guided compares with what the model makes of no caption, and does not train that: leave "
                        "--drop-captions out")  # fmt: skip


def settle(args: argparse.Namespace, pipe: flux.Pipeline, items: list[dataset.Item]) -> None:
    """The defaults that depend on the model; UserError for what it cannot do."""
    if is_quantised(pipe.transformer.shapes):
        raise UserError(f"{pipe.files['transformer'][0]} {QUANTISED}")
    settle_guidance(args, pipe)
    spec = pipe.spec
    if spec.picture in conditioning.NEEDY:
        raise UserError(f"{spec.name} makes each picture from one that it is given, which is not trained here: choose another")
    if any(item.references for item in items) and (spec.picture != "reference" or spec.cached):
        able = ", ".join(s.name for s in flux.MODELS.values() if s.picture == "reference" and not s.cached)
        raise UserError(f"{args.pictures} has references, and {spec.name} takes none in training; choose from {able}")
    if spec.flux1 and any(len(item.references) > 1 for item in items):
        raise UserError(f"{args.pictures} has items with several references, and {spec.name} takes one")
    if spec.fixed:
        say(f"note: {spec.name}: {spec.fixed}, which this loss does not preserve; a base or dev model is made to be trained")
    if args.batch % processes.world():
        raise UserError(f"--batch {args.batch}: cannot be shared among {processes.world()} processes; give a multiple of that")
    if processes.world() > 1:
        args.sample_every = 0
        say("note: several processes make no sample pictures, for which each would need all weights")
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
            raise UserError(f"--distill {args.distill}: it is told its guidance, which was distilled already; choose a teacher "
                            "with classifier-free guidance")  # fmt: skip
        args.guidance_range = args.guidance_range or (1.0, 5.0)
        pipe.spec = replace(spec, transformer=replace(spec.transformer, guidance=True), cfg=False,
                            guidance=spec.guidance or sum(args.guidance_range) / 2)  # fmt: skip
        if args.transformer:
            given_student(args, pipe)
    elif not spec.transformer.guidance and (args.guided or args.guidance is not None):
        raise UserError(f"{'--guided' if args.guided else f'--guidance {args.guidance:g}'}: {spec.name} has no such input; "
                        "leave it out")  # fmt: skip
    # At guidance 1 a distilled model gives the plain velocity of the data, which is what the plain loss compares with: at the
    # guidance of use, it would be taught to ignore it.
    args.guidance = (spec.guidance if args.guided else 1.0) if args.guidance is None else args.guidance
    args.guidance_range = tuple(args.guidance_range or (args.guidance, args.guidance))
    if args.guided and not (args.guidance or 0) >= 1:
        raise UserError(f"--guided --guidance {args.guidance or 0:g}: must be at least 1, such as 3.5")


def given_student(args: argparse.Namespace, pipe: flux.Pipeline) -> Flux:
    """Of --transformer; UserError if it is none of the teacher's."""
    config = infer_config(args.transformer)
    if config != pipe.spec.transformer:
        fault = "has another shape" if config.guidance else "has no input for guidance"
        raise UserError(f"--transformer {args.transformer} is no student of {args.distill}: it {fault}; leave it out, to begin "
                        "as the teacher")  # fmt: skip
    student = blank(lambda: Flux(config))
    load_module(student, shard_files(args.transformer), dtype=torch.float32, prefixes=("", "model.diffusion_model."))
    if is_quantised(student):
        raise UserError(f"{args.transformer} {QUANTISED}")
    return student


def is_quantised(module: torch.nn.Module) -> bool:
    return any(isinstance(layer, QuantizedLinear) for layer in module.modules())


def tell_memory(args: argparse.Namespace, pipe: flux.Pipeline, items: list[dataset.Item]) -> None:
    """UserError if it is more than there is."""
    dtype = pipe.transformer.dtype if args.lora_rank else torch.float32
    make = partial(training.untrained, pipe.spec.transformer, dtype, args.lora_rank, args.targets or ["*"])
    tokens, world = (args.size // 16) ** 2 * (1 + max(len(item.references) for item in items)), processes.world()
    need = training.memory(
        pipe.spec, make, tokens, args.batch // world, pipe.device, pipe.dtype, args.ema is not None, args.checkpointing
    )  # fmt: skip
    teacher = pipe.transformer.bytes if args.distill else 0
    need = need._replace(weights=(need.weights + teacher) // world, states=need.states // world)
    room = room_on(pipe.device).device
    gb = lambda size: f"{size / 1e9:.3g}"  # noqa: E731
    listed = f"weights {gb(need.weights)}, gradients and the optimizer {gb(need.states)}, activations {gb(need.activations)}"
    say(f"memory: {listed}: at least {gb(need.total)} GB of {gb(room)}")
    if need.total > room:
        advice = {"--checkpointing": not args.checkpointing, "a smaller --size": True, "a smaller --batch": args.batch > 1,
                  "--lora-rank": not args.lora_rank}  # fmt: skip
        raise UserError(f"training {pipe.spec.name} so takes at least {gb(need.total)} GB, and {gb(room)} GB are free: use "
                        f"{' or '.join(words for words, helps in advice.items() if helps)}")  # fmt: skip


def about(args: argparse.Namespace, pipe: flux.Pipeline, examples) -> dict[str, object]:
    """What a checkpoint belongs to. --steps, --lr and --warmup may be others when a run goes on."""
    names = [(e.latents.name, e.features.name, [r.name for r in e.references]) for e in examples]
    trained = f"a LoRA of rank {args.lora_rank} on {' '.join(args.targets or ['*'])}" if args.lora_rank else "all weights"
    about = {
        "model": pipe.spec.name, "transformer": dataset.fingerprint(pipe.files["transformer"]), "training": trained,
        "pictures": hashlib.sha256(repr(names).encode()).hexdigest(), "--batch": args.batch, "--accumulate": args.accumulate,
        "--ema": args.ema, "--guidance": args.guidance, "--drop-captions": args.drop_captions, "--seed": args.seed,
        "--dtype": pipe.dtype,
    }  # fmt: skip
    if args.distill or args.guided:
        about |= {"--distill" if args.distill else "--guided": True, "--guidance-range": args.guidance_range}
    if args.distill and args.transformer:  # what is called "transformer" is the teacher
        about["student"] = dataset.fingerprint(shard_files(args.transformer))
    return about


# ---------------------------------------------------------------- pictures and captions


def encode(args: argparse.Namespace, cache: dataset.Cache, items: list[dataset.Item]) -> dict[dataset.Item, dataset.Example]:
    examples = {}
    for item in tqdm(items, desc="encoding", unit="picture", disable=None):
        try:
            examples[item] = cache.example(item)
        except UserError as error:
            if not args.skip_broken:
                raise UserError(f"{error} (or leave such pictures out, with --skip-broken)") from None
            say(f"note: left out: {error}")
    if not examples:
        raise UserError(f"{args.pictures}: none of the {len(items)} pictures can be read")
    sizes = Counter(f"{16 * e.shape[0][2]}x{16 * e.shape[0][1]}" for e in examples.values())
    say(f"{len(examples)} pictures: " + ", ".join(f"{count} of {size}" for size, count in sizes.most_common()))
    return examples


class Sample(NamedTuple):
    features: TextFeatures
    width: int
    height: int
    conditions: Conditions | None


def prepare_samples(args: argparse.Namespace, cache: dataset.Cache, examples: list[dataset.Example]) -> list[Sample]:
    """What the sheets show: --prompt, or the first pictures' captions, with the references that they are edits of."""
    axes, side = len(cache.pipe.spec.transformer.axes_dim), args.size // 16
    blank = dataset.Example(Path(), Path(), (), ((0, side, side),))
    asked = [blank._replace(features=cache.features(prompt)) for prompt in args.prompt or ()] or examples[:SAMPLES]
    samples = []
    for example in asked:
        height, width = (16 * side for side in example.shape[0][1:])
        references = dataset.references_of(example, axes)
        given = Conditions(height, width, *references) if references else None
        samples.append(Sample(dataset.features_of([example]), width, height, given))
    return samples


# ---------------------------------------------------------------- training


def begin(args: argparse.Namespace, pipe: flux.Pipeline) -> tuple[Flux | None, Flux]:
    """The teacher, if there is one, and the network that is to be trained."""
    if not args.distill:
        return None, pipe.transformer()
    teacher = pipe.transformer()
    device = teacher.img_in.weight.device
    student = given_student(args, pipe).to(device) if args.transformer else distillation.student_of(teacher)
    if processes.world() > 1:
        processes.shard(teacher, pipe.device)
    pipe.transformer.module = student  # the samples are its
    return teacher, student


def adapted(args: argparse.Namespace, network: Flux, device: torch.device) -> Flux:
    """The network as it is trained."""
    if args.lora_rank:
        training.add_lora(network, args.lora_rank, args.targets or ["*"])
    else:
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()  # it may be the file's own page
        network.requires_grad_(True)
    if processes.world() > 1:
        processes.shard(network, device)
    if args.checkpointing:
        training.recompute_blocks(network)
    return network


def loss_of(args: argparse.Namespace, pipe: flux.Pipeline, network: Flux, teacher: Flux | None, draws: dataset.Draws,
            number: int) -> torch.Tensor:  # fmt: skip
    """Of the n-th batch of the run, or of the part of it that is this process's."""
    batch, normal, noise = draws(number)
    times = training.shifted_times(normal, training.mu_of(pipe.spec, noise[0, 0].numel()))  # (B,)
    share = args.batch // processes.world()
    mine = slice(processes.rank() * share, (processes.rank() + 1) * share)
    batch, t, noise = batch.rows(mine, pipe.device), times[mine].to(pipe.device), noise[mine].to(pipe.device)
    guidance = distillation.draw_guidance(*args.guidance_range, args.batch, args.seed, number)[mine].to(pipe.device)  # (B,)
    velocity, x_t = partial(training.velocity, network, batch, guidance), (batch.latents, t, noise)
    with training.computing(pipe.device, pipe.dtype):
        if not (args.distill or args.guided):
            return training.rectified_flow_loss(velocity, *x_t)
        blank = distillation.without_captions(batch, empty_features(draws))
        if args.guided:
            uncaptioned = partial(training.velocity, network, blank, 1.0)
            return distillation.guided_flow_loss(velocity, uncaptioned, guidance, *x_t)
        captioned, uncaptioned = (partial(training.velocity, teacher, given, 1.0) for given in (batch, blank))
        return distillation.guidance_distillation_loss(velocity, captioned, uncaptioned, guidance, *x_t)


def empty_features(draws: dataset.Draws) -> TextFeatures:
    return dataset.features_of([draws.examples[0]._replace(features=draws.empty)])


def run(args: argparse.Namespace, pipe: flux.Pipeline, network: Flux, teacher: Flux | None, trainer: training.Trainer,
        draws: dataset.Draws, samples: list[Sample]) -> int:  # fmt: skip
    """All steps that are left; returns 0, or the exit code for the signal that stopped it."""
    log = Log(args.run / "loss.csv", trainer.step)
    negative = empty_features(draws) if pipe.spec.cfg else None
    shown, halted = processes.rank() == 0, False
    bar = tqdm(total=args.steps, initial=trainer.step, unit="step", disable=None if shown else True)
    with bar, stopping() as stopped:
        while trainer.step < args.steps and not halted:
            started, rate = time.monotonic(), trainer.current_rate
            numbers = range(trainer.step * args.accumulate, (trainer.step + 1) * args.accumulate)
            try:
                losses = (partial(loss_of, args, pipe, network, teacher, draws, number) for number in numbers)
                value, length = trainer.update(losses)
            except NonFiniteError as error:
                trainer.save()
                raise UserError(f"{error}: the run was stopped, and its {trainer.step} good steps saved; go on with a smaller "
                                "--lr, or look for what is wrong with the pictures of this step") from None  # fmt: skip
            seconds = time.monotonic() - started
            speed = args.batch * args.accumulate / seconds
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", pictures_a_second=f"{speed:.2f}")
            halted = processes.mean_of_all(len(stopped)) > 0  # all processes stop at one step
            last = halted or trainer.step == args.steps
            if shown:
                log.add(trainer.step, value, length, rate, seconds, speed)
            if last or trainer.step % args.save_every == 0:
                trainer.save()
                if shown:
                    log.plot()
            if samples and not halted and (last or trainer.step % args.sample_every == 0):
                with trainer.averaged():
                    draw_samples(pipe, samples, negative, args.run / "samples" / f"{trainer.step:06}.png", args.seed)
    return 128 + (stopped or [signal.SIGTERM])[0] if halted else 0


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM wait for the end of the step; a second one does not."""
    stopped: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _) -> None:
        stopped.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw_samples(pipe: flux.Pipeline, samples: list[Sample], negative: TextFeatures | None, path: Path, seed: int) -> None:
    """One picture of each sample, side by side, each from the same noise every time."""
    made = []
    for features, width, height, given in samples:
        with training.computing(pipe.device, pipe.dtype):
            made += pipe.decode(pipe.sample(features, [seed], width, height, negative=negative, conditions=given))
    sheet = Image.new("RGB", (sum(image.width for image in made), max(image.height for image in made)), "white")
    left = 0
    for image in made:
        sheet.paste(image, (left, 0))
        left += image.width
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)


def export(args: argparse.Namespace, network: Flux, trainer: training.Trainer, dtype: torch.dtype) -> Path:
    """What `--lora` or `--transformer` of sample.py, and other programs, load."""
    with trainer.averaged():
        if args.lora_rank:
            path, tensors = args.run / "lora.safetensors", training.lora_tensors(network)
        else:
            path = args.run / "transformer.safetensors"
            tensors = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
        training.write(path, tensors, {"format": "pt"})
    return path


# ---------------------------------------------------------------- the log


class Log:
    """loss.csv, a row a step, and the picture of it."""

    NAMES = ("step", "loss", "gradient", "rate", "seconds", "pictures_a_second")

    def __init__(self, path: Path, step: int):
        """Rows after `step` are of a run that was stopped, and whose steps come again."""
        self.path = path if processes.rank() == 0 else Path(os.devnull)
        rows = list(csv.reader(path.open())) if path.exists() else []
        self.rows = [row for row in rows[1:] if len(row) == len(self.NAMES) and int(row[0]) <= step]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([self.NAMES, *self.rows])

    def add(self, step: int, *numbers: float) -> None:
        self.rows.append([str(step), *(f"{number:.6g}" for number in numbers)])
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(self.rows[-1])

    def plot(self) -> None:
        """Each step's loss, which mostly tells how hard its times were, and their mean over the last fifty."""
        losses = [float(row[1]) for row in self.rows]
        means = [sum(losses[max(0, i - 49) : i + 1]) / len(losses[max(0, i - 49) : i + 1]) for i in range(len(losses))]
        scale = LogScale.around(losses, 30, 260)
        x = lambda i: 60 + 560 * i / max(1, len(losses) - 1)  # noqa: E731
        shapes = [Line([(60, scale(tick)), (620, scale(tick))], "grid") for tick in scale.ticks()]
        shapes += [Label(54, scale(tick) + 4, f"{tick:g}", anchor="end") for tick in scale.ticks()]
        for values, colour, width in ((losses, "w3", 1), (means, "first", 2)):
            shapes.append(Line([(x(i), scale(value)) for i, value in enumerate(values)], colour, width))
        shapes.append(Label(620, 285, f"step {self.rows[-1][0]}, mean loss {means[-1]:.4f}", anchor="end"))
        self.path.with_suffix(".png").write_bytes(Drawing("loss", 640, 300, shapes).png())


def say(text: str) -> None:
    if processes.rank() == 0:
        tqdm.write(text, file=sys.stderr)


def fail(text: str, code: int = 2) -> int:
    say(f"error: {text}")
    return code


if __name__ == "__main__":
    sys.exit(main())

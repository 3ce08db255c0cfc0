"""Trains the transformer of any FLUX model, or a LoRA of it, on a folder of pictures with captions.

    python scripts/train.py pictures runs/style --lora-rank 4                  # flux.2-tiny
    python scripts/train.py pictures runs/style --lora-rank 16 --model flux.2-klein-base-4b --checkpointing
    python scripts/train.py edits runs/edits --lora-rank 32 --model flux.1-kontext-dev --checkpointing
    torchrun --nproc-per-node 8 scripts/train.py pictures runs/whole --model flux.2-klein-base-4b --checkpointing --batch 8
    python scripts/train.py pictures runs/dev --distill flux.2-klein-base-4b   # a student that is told its guidance

A caption lies beside its picture, in a .txt of the same name; or metadata.jsonl lists all, a line each:
{"image": "b.png", "caption": "make it night", "references": ["a.png"]}, where references are for models that edit. Canny
and Depth take "control", a picture (or make it of the image), Fill a "mask", white where to fill in (or draws a rectangle).

In the run's folder appear the trained weights (lora.safetensors, or transformer.safetensors), a log (loss.csv, loss.png),
sample pictures, and the checkpoint. The same command goes on from that, bit for bit, wherever the run was stopped.
"""

import argparse
import hashlib
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from PIL import Image
from tqdm import tqdm

import flux
from flux.conditioning import Conditions
from flux.errors import NonFiniteError, UserError, WriteError
from flux.text_encoder import TextFeatures
from flux.training import dataset, distillation
from flux.training import distributed as processes
from flux.training import lora as adapters
from flux.training import trainer as training
from flux.training.log import Log, say
from flux.training.options import check_numbers, given_student, load, parser, settle, tell_memory
from flux.transformer import Flux
from flux.weights.files import shard_files

SAMPLES = 4  # pictures on a sheet, where --prompt does not say of what


def main() -> int:
    args = parser(__doc__).parse_args()
    warnings.showwarning = lambda message, *_, **__: say(f"note: {message}")
    try:
        return train(args)
    except UserError as error:
        return fail(str(error))
    except NonFiniteError as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(f"{error.filename or args.run}: {error.strerror or error}")
    except KeyboardInterrupt:
        return fail("stopped; what was encoded and saved is kept", 130)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return fail(
            "out of memory: use --checkpointing, a smaller --batch or --size, or --lora-rank"
        )
    finally:
        processes.leave()


def train(args: argparse.Namespace) -> int:
    # 1. what is asked for, and what that takes
    check_numbers(args)
    if args.run.resolve() == args.pictures.resolve():
        raise UserError(
            f"{args.run} holds the pictures: name another folder for the run, where it puts pictures of its own"
        )
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
        samples = prepare_samples(args, cache, examples) if args.sample_every else []
    pipe.text.release()
    pipe.image_encoder.release()
    pipe.residency.keep_loaded()

    # 3. the network
    torch.manual_seed(args.seed)
    teacher, network = begin(args, pipe)
    network = adapted(args, network, pipe.device)
    trainer = training.Trainer(
        network,
        args.run / "checkpoint.safetensors",
        about(args, pipe, examples),
        steps=args.steps,
        rate=args.lr,
        warmup=args.warmup,
        ema=args.ema,
        kind=args.optimizer,
    )
    count = sum(p.numel() for p in trainer.parameters.values())
    say(
        f"{pipe.spec.name}: {count:,} parameters to train, on {pipe.device}, products in {str(pipe.dtype)[6:]}"
        + (f"; goes on at step {trainer.step}" if trainer.step else "")
    )

    # 4. the steps
    draws = dataset.Draws(
        examples,
        args.batch,
        args.seed,
        len(pipe.spec.transformer.axes_dim),
        empty,
        args.drop_captions,
    )
    code = run(args, pipe, network, teacher, trainer, draws, samples)
    if code:
        return fail(
            f"stopped at step {trainer.step}, and saved; the same command goes on from there", code
        )

    # 5. the result
    path = export(args, network, trainer, pipe.dtype)
    if processes.rank() == 0:
        print(path)
    return 0


def about(args: argparse.Namespace, pipe: flux.Pipeline, examples) -> dict[str, object]:
    """What a checkpoint belongs to. --steps, --lr and --warmup may be others when a run goes on."""

    def others(e):
        return [file.name for file in (*e.references, e.channels) if file]

    names = [(e.latents.name, e.features.name, others(e)) for e in examples]
    trained = (
        f"a LoRA of rank {args.lora_rank} on {' '.join(args.targets or ['*'])}"
        if args.lora_rank
        else "all weights"
    )
    trained += "" if args.optimizer == "adamw" else f", by {args.optimizer}"
    about = {
        "model": pipe.spec.name,
        "transformer": dataset.fingerprint(pipe.files["transformer"]),
        "training": trained,
        "pictures": hashlib.sha256(repr(names).encode()).hexdigest(),
        "--batch": args.batch,
        "--accumulate": args.accumulate,
        "--ema": args.ema,
        "--guidance": args.guidance,
        "--drop-captions": args.drop_captions,
        "--seed": args.seed,
        "--dtype": pipe.dtype,
    }
    if args.distill or args.guided:
        about |= {
            "--distill" if args.distill else "--guided": True,
            "--guidance-range": args.guidance_range,
        }
    if args.distill and args.transformer:  # what is called "transformer" is the teacher
        about["student"] = dataset.fingerprint(shard_files(args.transformer))
    return about


# ---------------------------------------------------------------- pictures and captions


def encode(
    args: argparse.Namespace, cache: dataset.Cache, items: list[dataset.Item]
) -> list[dataset.Example]:
    examples = []
    for item in tqdm(items, desc="encoding", unit="picture", disable=None):
        try:
            examples.append(cache.example(item))
        except WriteError:
            raise
        except UserError as error:
            if not args.skip_broken:
                raise UserError(
                    f"{error} (or leave such pictures out, with --skip-broken)"
                ) from None
            say(f"note: left out: {error}")
    if not examples:
        raise UserError(f"{args.pictures}: none of the {len(items)} pictures can be read")
    sizes = Counter(f"{16 * e.shape[0][2]}x{16 * e.shape[0][1]}" for e in examples)
    say(
        f"{len(examples)} pictures: "
        + ", ".join(f"{count} of {size}" for size, count in sizes.most_common())
    )
    return examples


class Sample(NamedTuple):
    features: TextFeatures
    conditions: Conditions


def prepare_samples(
    args: argparse.Namespace, cache: dataset.Cache, examples: list[dataset.Example]
) -> list[Sample]:
    """What the sheets show: --prompt, or the first pictures' captions, with the references that they are edits of."""
    axes, side = len(cache.pipe.spec.transformer.axes_dim), args.size // 16
    blank = dataset.Example(Path(), Path(), (), ((0, side, side),))
    if examples[0].channels:  # without a picture such a model makes none
        blank = examples[0]
    asked = [
        blank._replace(features=cache.features(prompt)) for prompt in args.prompt or ()
    ] or examples[:SAMPLES]
    samples = []
    for example in asked:
        height, width = (16 * side for side in example.shape[0][1:])
        references = dataset.references_of(example, axes) or ()
        given = Conditions(height, width, *references, channels=dataset.channels_of([example]))
        samples.append(Sample(dataset.features_of([example]), given))
    return samples


# ---------------------------------------------------------------- training


def begin(args: argparse.Namespace, pipe: flux.Pipeline) -> tuple[Flux | None, Flux]:
    """The teacher, if there is one, and the network that is to be trained."""
    if not args.distill:
        return None, pipe.transformer()
    teacher = pipe.transformer()
    device = teacher.img_in.weight.device
    student = (
        given_student(args, pipe).to(device)
        if args.transformer
        else distillation.student_of(teacher)
    )
    if processes.world() > 1:
        processes.shard(teacher, pipe.device)
    pipe.transformer.module = student  # the samples are its
    return teacher, student


def adapted(args: argparse.Namespace, network: Flux, device: torch.device) -> Flux:
    """The network as it is trained."""
    if args.lora_rank:
        adapters.add_lora(network, args.lora_rank, args.targets or ["*"])
    else:
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()  # it may be the file's own page
        network.requires_grad_(True)
    if processes.world() > 1:
        processes.shard(network, device)
    if args.checkpointing:
        training.enable_gradient_checkpointing(network)
    return network


def loss_of(
    args: argparse.Namespace,
    pipe: flux.Pipeline,
    network: Flux,
    teacher: Flux | None,
    draws: dataset.Draws,
    number: int,
) -> torch.Tensor:
    """Of the n-th batch of the run, or of the part of it that is this process's."""
    batch, normal, noise = draws(number)
    times = training.shifted_times(normal, training.mu_of(pipe.spec, noise[0, 0].numel()))  # (B,)
    share = args.batch // processes.world()
    mine = slice(processes.rank() * share, (processes.rank() + 1) * share)
    batch, t, noise = (
        batch.rows(mine, pipe.device),
        times[mine].to(pipe.device),
        noise[mine].to(pipe.device),
    )
    guidance = distillation.draw_guidance(*args.guidance_range, args.batch, args.seed, number)[
        mine
    ].to(pipe.device)  # (B,)
    velocity, x_t = partial(training.velocity, network, batch, guidance), (batch.latents, t, noise)
    with training.computing(pipe.device, pipe.dtype):
        if not (args.distill or args.guided):
            return training.rectified_flow_loss(velocity, *x_t)
        blank = distillation.without_captions(batch, empty_features(draws))
        if args.guided:
            uncaptioned = partial(training.velocity, network, blank, 1.0)
            return distillation.guided_flow_loss(velocity, uncaptioned, guidance, *x_t)
        captioned, uncaptioned = (
            partial(training.velocity, teacher, given, 1.0) for given in (batch, blank)
        )
        return distillation.guidance_distillation_loss(
            velocity, captioned, uncaptioned, guidance, *x_t
        )


def empty_features(draws: dataset.Draws) -> TextFeatures:
    return dataset.features_of([draws.examples[0]._replace(features=draws.empty)])


def run(
    args: argparse.Namespace,
    pipe: flux.Pipeline,
    network: Flux,
    teacher: Flux | None,
    trainer: training.Trainer,
    draws: dataset.Draws,
    samples: list[Sample],
) -> int:
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
                losses = (
                    partial(loss_of, args, pipe, network, teacher, draws, number)
                    for number in numbers
                )
                value, length = trainer.update(losses)
            except (
                NonFiniteError
            ) as error:  # what led here is no state to go on from: the last checkpoint may be
                saved = trainer.saved_step()
                again = (
                    f"the same command with a smaller --lr goes on from step {saved}"
                    if saved
                    else "take a smaller --lr"
                )
                raise NonFiniteError(f"{error}: the run was stopped; {again}") from None
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
                try:
                    with trainer.averaged():
                        draw_samples(
                            pipe,
                            samples,
                            negative,
                            args.run / "samples" / f"{trainer.step:06}.png",
                            args.seed,
                        )
                except (
                    NonFiniteError
                ):  # a few steps of a sampler may overflow where the loss is sound
                    say(f"note: no samples of step {trainer.step}: their latents are not finite")
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


def draw_samples(
    pipe: flux.Pipeline, samples: list[Sample], negative: TextFeatures | None, path: Path, seed: int
) -> None:
    """One picture of each sample, side by side, each from the same noise every time."""
    made = []
    for features, given in samples:
        with training.computing(pipe.device, pipe.dtype):
            made += pipe.decode(pipe.sample(features, [seed], negative=negative, conditions=given))
    pipe.autoencoder.release()
    sheet = Image.new(
        "RGB", (sum(image.width for image in made), max(image.height for image in made)), "white"
    )
    left = 0
    for image in made:
        sheet.paste(image, (left, 0))
        left += image.width
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)


def export(
    args: argparse.Namespace, network: Flux, trainer: training.Trainer, dtype: torch.dtype
) -> Path:
    """What `--lora` or `--transformer` of sample.py, and other programs, load."""
    with trainer.averaged():
        if args.lora_rank:
            path, tensors = args.run / "lora.safetensors", adapters.lora_tensors(network)
        else:
            path = args.run / "transformer.safetensors"
            tensors = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
        training.write(path, tensors, {"format": "pt"})
    return path


def fail(text: str, code: int = 2) -> int:
    say(f"error: {text}")
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Train the transformer of a FLUX model, or a LoRA of it, on a folder of images with captions.

    python scripts/train.py images runs/style --lora-rank 4                  # flux.2-tiny
    python scripts/train.py images runs/style --lora-rank 16 --gradient-checkpointing \\
        --model flux.2-klein-base-4b
    python scripts/train.py edits runs/edits --lora-rank 32 --gradient-checkpointing \\
        --model flux.1-kontext-dev
    torchrun --nproc-per-node 8 scripts/train.py images runs/full --batch-size 8 \\
        --gradient-checkpointing --model flux.2-klein-base-4b
    python scripts/train.py images runs/student --distill flux.2-klein-base-4b

A caption is a .txt file with the name of its image. Or metadata.jsonl lists all images, one a line:
{"image": "b.png", "caption": "make it night", "references": ["a.png"]}
Models that edit read "references"; Canny and Depth read "control", an image (default: computed from
the image); Fill reads "mask", white where to paint (default: a random rectangle).

The run's folder gets the trained weights (lora.safetensors or transformer.safetensors), a log
(loss.csv, loss.png), sample images, and the checkpoint. Repeat the command to resume a stopped run;
the result is the same bit for bit.
"""

import argparse
import hashlib
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from modules.command_line import OUT_OF_MEMORY, imports, show, show_traceback, with_flags
from modules.training_flags import parser

with imports(__name__, lambda: parser(__doc__)):
    import torch
    from modules.progress_lines import ProgressLines
    from modules.training_options import (
        FLAGS,
        OLD_CONFIG_NAMES,
        check_memory,
        check_numbers,
        load_pipeline,
        load_student,
        resolve,
    )
    from PIL import Image
    from torch import Tensor
    from tqdm import tqdm

    import flux
    from flux import progress
    from flux.atomic_files import exclusive_lock, write_atomically
    from flux.conditioning import Conditions
    from flux.errors import NonFiniteError, UserError, WriteError, install_command
    from flux.image_io.output import metadata_options
    from flux.plain_files import require_plain_file
    from flux.runtime import processes
    from flux.text_encoder import TextFeatures
    from flux.training import batches, dataset, distillation, distributed, loss
    from flux.training import log as training_log
    from flux.training.checkpoint import remove_unfinished, save_tensors
    from flux.training.log import CSVLog, can_plot, plot_loss, report
    from flux.training.lora import add_lora, lora_state_dict
    from flux.training.memory import enable_gradient_checkpointing
    from flux.training.networks import Network, freeze_unreached, round_times
    from flux.training.trainer import Trainer, make_optimizer, trainable_parameters, warmup_cosine
    from flux.transformer import Flux
    from flux.weights.files import preview, shard_files

LOG_EVERY = 10  # steps, without a terminal
LOG_SECONDS = 60.0  # or so much time, if steps are slow
SAMPLE_IMAGES = 4  # on a sheet, without --prompt
COLUMNS = ("step", "loss", "gradient", "rate", "seconds", "images_per_second")  # of loss.csv


def main() -> int:
    args = parser(__doc__).parse_args()
    warnings.showwarning = print_warning
    sys.excepthook = show_traceback
    training_log.quiet = args.quiet
    try:
        with progress.listen(ProgressLines(report)):
            return train(args)
    except UserError as error:
        return fail(with_flags(str(error), FLAGS))
    except NonFiniteError as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(f"{error.filename or args.run}: {error.strerror or error}")
    except KeyboardInterrupt:
        return fail("stopped; everything encoded and saved so far is kept", 130)
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not any(part in text for part in OUT_OF_MEMORY):
            raise
        return fail(
            "out of memory. Use --gradient-checkpointing, a smaller --batch-size or --size, or "
            "--lora-rank."
        )
    finally:
        processes.leave()


def print_warning(message: Warning | str, *_, **__) -> None:
    report(f"note: {with_flags(str(message), FLAGS)}")


def fail(text: str, code: int = 2) -> int:
    report(f"error: {text}", always=True)
    return code


def train(args: argparse.Namespace) -> int:
    # 1. Check the request and the memory it needs.
    check_numbers(args)
    if args.run.resolve() == args.images.resolve():
        raise UserError(f"{args.run}: holds the training images. Name another folder for the run.")
    samples = dataset.read_folder(args.images)
    pipe = load_pipeline(args)
    resolve(args, pipe, samples)
    check_memory(args, pipe, samples)

    args.run.mkdir(parents=True, exist_ok=True)
    with locked(args.run):
        return train_in_folder(args, pipe, samples)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other trainings out of a folder. The first process holds the lock."""
    with ExitStack() as stack:
        with distributed.main_process_first():
            if distributed.rank() == 0:
                try:
                    stack.enter_context(exclusive_lock(run / "training"))
                except UserError:
                    raise UserError(
                        f"{run}: another training is running in this folder. Wait until it ends, "
                        "or use another folder."
                    ) from None
        yield


def train_in_folder(
    args: argparse.Namespace, pipe: flux.Pipeline, samples: Sequence[dataset.Sample]
) -> int:
    remove_unfinished(args.run / "samples")

    # 2. Encode images and captions.
    cache = dataset.Cache(args.cache or args.run / "cache", pipe, args.size)
    with distributed.main_process_first():  # the other processes find everything in the cache
        encoded = encode(args, cache, samples)
        empty = cache.features("")
        previews = prepare_previews(args, cache, encoded) if args.sample_every else []
    pipe.text.release()
    pipe.image_encoder.release()
    pipe.residency.keep_loaded()

    # 3. Prepare the network.
    torch.manual_seed(args.seed)
    teacher, network = load_networks(args, pipe)
    references = any(sample.references for sample in encoded)
    network = prepare_network(args, network, pipe, references)
    optimizer = make_optimizer(args.optimizer, trainable_parameters(network).values(), args.lr)
    trainer = Trainer(
        network,
        args.run / "checkpoint.safetensors",
        run_config(args, pipe, encoded),
        [optimizer],
        warmup_cosine(args.steps, args.warmup),
        ema_decay=args.ema,
        old_names=OLD_CONFIG_NAMES,
    )
    if trainer.step > args.steps:
        raise UserError(
            f"steps: must be at least {trainer.step}, the step of {trainer.path} "
            f"(got {args.steps}). Or use another folder."
        )
    count = sum(p.numel() for p in trainer.parameters.values())
    resumed = f"; resumed at step {trainer.step}" if trainer.step else ""
    report(
        f"{pipe.spec.name}: {count:,} trainable parameters, on {pipe.device}, matrix products in "
        f"{str(pipe.dtype).removeprefix('torch.')}{resumed}"
    )

    # 4. Train.
    axes = len(pipe.spec.transformer.axes_dim)
    sampler = batches.BatchSampler(
        encoded, args.batch_size, args.seed, axes, empty, args.caption_dropout, pipe.spec.flux3
    )
    batch_loss = partial(loss_of_batch, args, pipe, network, teacher, sampler)
    negative = sampler.empty_features() if pipe.spec.cfg else None
    sheet = partial(draw_previews, args, pipe, previews, negative) if previews else None
    code = run(args, trainer, batch_loss, sheet)
    if code:
        return fail(f"stopped at step {trainer.step} and saved; repeat the command to resume", code)

    # 5. Export the weights.
    path = export(args, network, trainer, pipe.dtype)
    if distributed.rank() == 0:
        show(path)
    return 0


def run_config(
    args: argparse.Namespace, pipe: flux.Pipeline, samples: Sequence[dataset.CachedSample]
) -> dict[str, object]:
    """Return what must be the same when a run is resumed. Steps, rate and warm-up may change."""
    names = []
    for sample in samples:
        others = [file.name for file in (*sample.references, sample.channels) if file]
        names.append((sample.latents.name, sample.features.name, others))
    training = "all weights"
    if args.lora_rank:
        training = f"a LoRA of rank {args.lora_rank} on {' '.join(args.target_modules or ['*'])}"
    if args.optimizer != "adamw":
        training += f", by {args.optimizer}"
    config = {
        "model": pipe.spec.name,
        "transformer": dataset.fingerprint(pipe.files["transformer"]),
        "training": training,
        "images": hashlib.sha256(repr(names).encode()).hexdigest(),
        "batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "ema": args.ema,
        "guidance": args.guidance,
        "caption_dropout": args.caption_dropout,
        "seed": args.seed,
        "dtype": pipe.dtype,
    }
    if args.distill:
        config |= {"distill": True, "guidance_range": args.guidance_range}
        if args.transformer:  # config["transformer"] is the teacher
            config["student"] = dataset.fingerprint(shard_files(args.transformer))
    elif args.train_at_guidance:
        config |= {"train_at_guidance": True, "guidance_range": args.guidance_range}
    return config


# ------------------------------------------------------------------------------ images and captions


def encode(
    args: argparse.Namespace, cache: dataset.Cache, samples: Sequence[dataset.Sample]
) -> list[dataset.CachedSample]:
    """Encode all samples. With --skip-broken, leave out those that cannot be used."""
    encoded = []
    counted = progress.counted(samples, "encoding", "images")
    hidden = True if args.quiet else None
    for sample in tqdm(counted, "encoding", len(samples), unit="image", disable=hidden):
        try:
            encoded.append(cache.sample(sample))
        except WriteError:
            raise
        except UserError as error:
            if not args.skip_broken:
                raise UserError(f"{error} Or leave such images out with --skip-broken.") from None
            report(f"note: left out: {error}")
    if not encoded:
        raise UserError(f"{args.images}: none of the {len(samples)} images can be used")
    sizes = Counter(f"{16 * e.shape[0][2]}x{16 * e.shape[0][1]}" for e in encoded)
    counts = [f"{count} of {size}" for size, count in sizes.most_common()]
    report(f"{len(encoded)} images: {preview(counts, 10)}")
    return encoded


class Preview(NamedTuple):
    """A sample image of a sheet: its text features, size and conditions."""

    features: TextFeatures
    conditions: Conditions


def prepare_previews(
    args: argparse.Namespace, cache: dataset.Cache, encoded: Sequence[dataset.CachedSample]
) -> list[Preview]:
    """Return previews of --prompt, or of the first captions, with their references."""
    spec, side = cache.pipe.spec, args.size // 16
    chosen = list(encoded[:SAMPLE_IMAGES])
    if args.prompt:
        square = dataset.CachedSample(Path(), Path(), (), ((0, side, side),))
        # Fill, Canny and Depth need an input image: the first one's
        example = encoded[0] if encoded[0].channels else square
        chosen = [example._replace(features=cache.features(prompt)) for prompt in args.prompt]
    previews = []
    for sample in chosen:
        height, width = (16 * side for side in sample.shape[0][1:])
        references: tuple[Tensor, ...] = ()
        if sample.references:
            axes = len(spec.transformer.axes_dim)
            references = batches.load_references(sample, axes, spec.flux3)
        channels = batches.load_channels([sample])
        conditions = Conditions(height, width, *references, channels=channels)
        previews.append(Preview(batches.load_features([sample]), conditions))
    return previews


# ----------------------------------------------------------------------------------------- training


def load_networks(args: argparse.Namespace, pipe: flux.Pipeline) -> tuple[Flux | None, Network]:
    """Return the teacher, if there is one, and the network to train."""
    if not args.distill:
        return None, pipe.transformer()
    teacher = pipe.transformer()
    device = teacher.img_in.weight.device
    if args.transformer:
        student = load_student(args, pipe).to(device)
    else:
        student = distillation.make_student(teacher)
    if distributed.world_size() > 1:
        distributed.shard(teacher, pipe.device)
    pipe.transformer.module = student  # which draws the sample images
    return teacher, student


def prepare_network(
    args: argparse.Namespace, network: Network, pipe: flux.Pipeline, references: bool
) -> Network:
    """Add the LoRA or copy the weights; then shard, divide, and enable gradient checkpointing.

    `references`: whether samples have any.
    """
    if args.lora_rank:
        add_lora(network, args.lora_rank, args.target_modules or ["*"], references)
    else:
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()  # the weights may be mapped from the file
        network.requires_grad_(True)
        if not references:
            freeze_unreached(network)
        round_times(network, pipe.dtype)
    if distributed.world_size() > 1:
        distributed.shard(network, pipe.device)
    if args.context > 1:
        distributed.share_tokens(network, args.context, pipe.device)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(network)
    return network


def loss_of_batch(
    args: argparse.Namespace,
    pipe: flux.Pipeline,
    network: Network,
    teacher: Flux | None,
    sampler: batches.BatchSampler,
    number: int,
) -> Tensor:
    """Return the loss of batch `number` of the run, or of this process's share of the batch."""
    batch, normal, noise = sampler(number)
    times = loss.shifted_times(normal, loss.schedule_mu(pipe.spec, noise[0, 0].numel()))  # (B,)
    low, high = args.guidance_range
    scales = distillation.draw_guidance(low, high, args.batch_size, args.seed, number)  # (B,)
    share = args.batch_size * args.context // distributed.world_size()
    group = distributed.rank() // args.context
    rows = slice(group * share, (group + 1) * share)
    batch = batch.select(rows, pipe.device)
    t, noise, guidance = (x[rows].to(pipe.device) for x in (times, noise, scales))
    with loss.autocast_matmul(pipe.device, pipe.dtype):
        velocity = partial(loss.predict_velocity, network, batch, guidance)
        inputs = batch.latents, t, noise
        if not (args.distill or args.train_at_guidance):
            return loss.rectified_flow_loss(velocity, *inputs)
        uncaptioned = distillation.without_captions(batch, sampler.empty_features())
        if args.train_at_guidance:
            unconditional = partial(loss.predict_velocity, network, uncaptioned, 1.0)
            return distillation.guided_flow_loss(velocity, unconditional, guidance, *inputs)
        assert teacher is not None
        conditional = partial(loss.predict_velocity, teacher, batch, 1.0)
        unconditional = partial(loss.predict_velocity, teacher, uncaptioned, 1.0)
        return distillation.guidance_distillation_loss(
            velocity, conditional, unconditional, guidance, *inputs
        )


def run(
    args: argparse.Namespace,
    trainer: Trainer,
    batch_loss: Callable[[int], Tensor],
    sheet: Callable[[Path], None] | None,
) -> int:
    """Take all steps that are left; return 0, or the exit code of the signal that stopped the run.

    `batch_loss(n)` computes the loss of batch n; `sheet(path)`, or None, draws the sample images.
    """
    log = CSVLog(args.run / "loss.csv", COLUMNS, trainer.step)
    main_process, halted = distributed.rank() == 0, False
    count = args.gradient_accumulation_steps
    if not can_plot():
        report(f"note: no loss.png without matplotlib: run `{install_command('plots')}`")
    bar = tqdm(
        total=args.steps,
        initial=trainer.step,
        unit="step",
        disable=None if main_process and not args.quiet else True,
    )
    draw = partial(draw_sheet, args, trainer, sheet)
    if not is_image(sheet_path(args, trainer.step)):  # the run was stopped before it was drawn
        draw()
    with bar, delayed_signals() as received:
        logged = time.monotonic()
        while trainer.step < args.steps and not halted:
            start, rate = time.monotonic(), trainer.learning_rate
            numbers = range(trainer.step * count, (trainer.step + 1) * count)
            with non_finite_advice(trainer):
                value, norm = trainer.update([partial(batch_loss, n) for n in numbers])
            seconds = time.monotonic() - start
            speed = args.batch_size * count / seconds
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", images_per_second=f"{speed:.2f}")
            halted = distributed.all_mean(len(received)) > 0  # all processes stop at the same step
            last = halted or trainer.step == args.steps
            due = trainer.step % LOG_EVERY == 0 or time.monotonic() - logged > LOG_SECONDS
            if bar.disable and (last or due):  # there is no terminal
                logged = time.monotonic()
                report(
                    f"step {trainer.step} of {args.steps}: loss {value:.4f}, "
                    f"{speed:.2f} images a second"
                )
            if main_process:
                log.add(trainer.step, value, norm, rate, seconds, speed)
            if last or trainer.step % args.save_every == 0:
                with non_finite_advice(trainer):
                    trainer.save()
                if main_process and can_plot():
                    plot_loss(log, args.run / "loss.png")
            if not halted:
                draw()
    return 128 + (received or [signal.SIGTERM])[0] if halted else 0


def draw_sheet(
    args: argparse.Namespace, trainer: Trainer, sheet: Callable[[Path], None] | None
) -> None:
    """Draw the sample images of this step by the averaged weights, if any are due."""
    step = trainer.step
    if sheet is None or step == 0 or (step % args.sample_every and step != args.steps):
        return
    try:
        with trainer.ema_weights():
            sheet(sheet_path(args, step))
    except NonFiniteError:  # the sampler may overflow where the loss does not
        report(f"note: no samples at step {step}: latents are not finite")


def sheet_path(args: argparse.Namespace, step: int) -> Path:
    return args.run / "samples" / f"{step:06}.png"


def is_image(path: Path) -> bool:
    """Return whether a plain file holds a whole PNG image."""
    try:
        with Image.open(require_plain_file(path), formats=["PNG"]) as image:
            image.load()
        return True
    except Exception:  # on a damaged file Pillow's readers may fail in any way
        return False


@contextmanager
def non_finite_advice(trainer: Trainer) -> Iterator[None]:
    """Add to a NonFiniteError of the block what the user can do. The last checkpoint is finite."""
    try:
        yield
    except NonFiniteError as error:
        saved = trainer.saved_step
        if trainer.step > saved:
            advice = "Repeat the command with a smaller --lr"
            advice += f" to resume at step {saved}." if saved else "."
        elif saved:  # the first step after a checkpoint depends on its weights only
            advice = "Use a smaller --lr in another folder: this checkpoint leads here at any --lr."
        else:
            advice = "Use --dtype float32, or other weights: --lr has no part in the first step."
        raise NonFiniteError(f"{error}. The run was stopped. {advice}") from None


@contextmanager
def delayed_signals() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM, so that a step can end; a second one acts at once."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, _) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def draw_previews(
    args: argparse.Namespace,
    pipe: flux.Pipeline,
    previews: Sequence[Preview],
    negative: TextFeatures | None,
    path: Path,
) -> None:
    """Draw the sample images side by side into one file, from the same noise every time."""
    images: list[Image.Image] = []
    for features, conditions in previews:
        with loss.autocast_matmul(pipe.device, pipe.dtype):
            latents = pipe.sample(features, [args.seed], negative=negative, conditions=conditions)
            images += pipe.decode(latents)
    pipe.autoencoder.release()
    width, height = sum(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (width, height), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    path.parent.mkdir(exist_ok=True)
    with write_atomically(path, wait=True) as unfinished:
        # IPTC's mark of generated media
        sheet.save(unfinished, "PNG", **metadata_options("PNG", {"model": pipe.spec.name}, False))


def export(
    args: argparse.Namespace, network: Network, trainer: Trainer, dtype: torch.dtype
) -> Path:
    """Write the weights for --lora or --transformer of sample.py, and for other programs."""
    with trainer.ema_weights():
        if args.lora_rank:
            path, tensors = args.run / "lora.safetensors", lora_state_dict(network)
        else:
            path = args.run / "transformer.safetensors"
            tensors = {name: x.to(dtype) for name, x in network.state_dict().items()}
        save_tensors(path, tensors, {"format": "pt"})
    return path


if __name__ == "__main__":
    sys.exit(main())

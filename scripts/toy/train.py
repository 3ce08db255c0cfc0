"""Train an embedded model from nothing: on its own drawings, captions and edits of a grammar.

    python scripts/toy/train.py runs/toy --compile --export flux/toy/tiny/flux.2-tiny
    python scripts/toy/train.py runs/more --start-from flux/toy/tiny/flux.2-tiny --export runs/new
    python scripts/toy/train.py runs/one --model flux.1-tiny --compile --export runs/flux.1-tiny \\
        --autoencoder flux/toy/tiny/flux.2-tiny/ae.safetensors
    python scripts/toy/train.py runs/reader --reader-of flux/toy/tiny/flux.2-tiny --export runs/read

Stages (`scripts/toy/recipe/`): the tokenizers, the autoencoder, the latents of all images, for
flux.1-tiny its T5, the transformer with its text encoders, for flux.1-tiny a student with distilled
guidance, and the decoder again.

A stage whose result is in the run's folder does not run again, and a stopped training resumes from
its last checkpoint. Lengths are minutes, not steps: learning rates follow the clock, so a run ends
on time on any machine. Losses (CSV) and contact sheets (PNG) appear in the folder. The second
command trains a model further, with its autoencoder. The third trains the other model, with the
same autoencoder in the layout of its family. The last trains text encoders that read what people
type, for a trained model; they are larger (`recipe/reader.py`).
"""

import argparse
import itertools
import math
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/toy")]

from modules.command_line import Parser, exit_code, imports


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="folder for checkpoints, logs and sheets")
    p.add_argument("--model", choices=("flux.1-tiny", "flux.2-tiny"), default="flux.2-tiny")
    p.add_argument(
        "--autoencoder-minutes",
        type=float,
        help="(default: 40, or 0 with --autoencoder or --start-from)",
    )
    p.add_argument(
        "--text-minutes", type=float, default=4, help="of T5 alone, for a new flux.1-tiny"
    )
    p.add_argument("--transformer-minutes", type=float, default=400)
    p.add_argument(
        "--student-minutes",
        type=float,
        default=40,
        help="of the distillation of guidance, for flux.1-tiny",
    )
    p.add_argument(
        "--decoder-minutes",
        type=float,
        default=15,
        help="of the autoencoder's decoder alone, at the end",
    )
    p.add_argument(
        "--reading-minutes",
        type=float,
        default=40,
        help="of text encoders that read what people type, with --reader-of",
    )
    p.add_argument("--device", help="default: cuda if there is one, else cpu")
    p.add_argument(
        "--compile", action="store_true", help="nearly twice as fast on a CPU; needs a C++ compiler"
    )
    p.add_argument(
        "--start-from", type=Path, metavar="FOLDER", help="initial weights, as --export writes them"
    )
    p.add_argument(
        "--reader-of",
        type=Path,
        metavar="FOLDER",
        help="train only text encoders that read what people type, for the model in this folder",
    )
    p.add_argument(
        "--autoencoder", type=Path, metavar="FILE", help="an initial autoencoder, of either family"
    )
    p.add_argument("--export", type=Path, metavar="FOLDER", help="folder for the trained model")
    return p


with imports(__name__, parser):
    import torch
    from recipe.autoencoder import train_autoencoder, train_decoder
    from recipe.latents import encode_all
    from recipe.neighbours import train_neighbours
    from recipe.networks import Networks, new_networks
    from recipe.reader import reading_spec, train_reader
    from recipe.samples import Sampler
    from recipe.student import train_student
    from recipe.text import TextEncoder, Tokenizer
    from recipe.tokenizer import train_tokenizers
    from recipe.trainer import COOLING
    from recipe.transformer import train_transformer
    from torch import Tensor

    from flux.autoencoder import AutoEncoder
    from flux.configs import AE, MODELS, ModelSpec
    from flux.errors import UserError
    from flux.runtime.devices import can_compile, choose_device
    from flux.training.checkpoint import load_tensors, save_tensors, strip_prefix
    from flux.training.distillation import make_teacher
    from flux.transformer import Flux

PREFIX = {"model": "model."}  # of the tensors' names in a text encoder's file, as released

FLAGS = {"device": "--device"}


def main() -> int:
    args = arguments()
    torch.set_flush_denormal(True)  # a CPU is ten times slower on the tails of SiLU
    stopped = "stopped; the same command resumes from the last checkpoint"
    run = train_text if args.reader_of else train
    return exit_code(lambda: run(args, MODELS[args.model]), FLAGS, args.run, stopped)


def train(args: argparse.Namespace, spec: ModelSpec) -> int:
    """Run all stages, each in the run's folder."""
    run, start, device = args.run, args.start_from, choose_device(args.device)
    if args.compile and not can_compile(device):
        raise UserError("--compile: a C++ compiler, or Triton on a GPU, is missing. Leave it out.")
    run.mkdir(parents=True, exist_ok=True)
    if start:
        copy_tokenizers(start, run, spec)
    train_tokenizers(run, spec.text)
    tokenizer = Tokenizer(run, spec)
    autoencoder = train_autoencoder(
        run, spec.autoencoder, args.autoencoder_minutes, device, args.autoencoder
    )
    has_edits = spec.image_mode == "reference"
    encode_all(run, autoencoder.requires_grad_(False), edited=has_edits)
    networks, sampler = begin(spec, start).to(device), Sampler(spec, autoencoder, tokenizer)
    cooling = 1.0 if start else COOLING  # trained weights change little
    if networks.text.near:
        train_neighbours(run, networks.text, tokenizer, args.text_minutes)
    train_transformer(run, networks, sampler, args.transformer_minutes, args.compile, cooling)
    transformer = networks.transformer
    if spec.transformer.guidance:
        transformer = train_student(run, networks, sampler, args.student_minutes, args.compile)
    train_decoder(run, args.decoder_minutes, device, autoencoder)
    if args.export:
        export(args.export, run, spec, autoencoder, transformer, networks.text)
    return 0


def train_text(args: argparse.Namespace, spec: ModelSpec) -> int:
    """Train text encoders alone, and export the model of --reader-of with them."""
    run, source, larger = args.run, args.reader_of, reading_spec(spec)
    run.mkdir(parents=True, exist_ok=True)
    networks = begin(spec, source).to(choose_device(args.device))
    text = train_reader(run, larger, networks, Tokenizer(source, spec), args.reading_minutes)
    if args.export:
        for name in (AE, spec.transformer_file):
            (args.export / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, args.export / name)
        save_all(args.export, text_files(larger, text))
        copy_tokenizers(run, args.export, larger)
    return 0


def arguments() -> argparse.Namespace:
    args = parser().parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.autoencoder_minutes is None:
        args.autoencoder_minutes = 0 if args.autoencoder or args.start_from else 40
    for part in ("autoencoder", "text", "transformer", "student", "decoder", "reading"):
        minutes = getattr(args, f"{part}_minutes")
        if not 0 <= minutes < math.inf:
            parser().error(f"--{part}-minutes: must be 0 or more (got {minutes})")
    for flag, folder in (("start-from", args.start_from), ("reader-of", args.reader_of)):
        names = files_of(MODELS[args.model]) if folder else []
        if lacking := [name for name in names if not (folder / name).is_file()]:
            parser().error(
                f"--{flag}: {lacking[0]} is missing in {folder}. Pass a folder that --export wrote."
            )
    if args.reader_of:
        return args
    if args.start_from:
        args.autoencoder = args.autoencoder or args.start_from / AE
    if args.autoencoder and not args.autoencoder.is_file():
        parser().error(f"--autoencoder: there is no such file (got {args.autoencoder})")
    if not (args.autoencoder_minutes or args.autoencoder or (args.run / AE).exists()):
        parser().error(
            "--autoencoder-minutes: 0 needs a trained autoencoder. Pass --autoencoder FILE."
        )
    return args


def files_of(spec: ModelSpec) -> list[str]:
    """Return the names of the files that `export` writes."""
    tokenizers = itertools.chain.from_iterable(spec.text.tokenizers.values())
    return [
        AE,
        spec.transformer_file,
        *(choices[0] for choices in spec.text.networks.values()),
        *tokenizers,
    ]


def copy_tokenizers(source: Path, target: Path, spec: ModelSpec) -> None:
    """Copy the tokenizers' files: all token ids stay."""
    for name in itertools.chain.from_iterable(spec.text.tokenizers.values()):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)


def begin(spec: ModelSpec, start: Path | None) -> Networks:
    """Return new networks, or an exported model's. A student becomes a teacher at guidance 1."""
    torch.manual_seed(0)
    networks = new_networks(spec)
    if start:
        with torch.device("meta"):
            exported = Flux(spec.transformer)
        exported.load_state_dict(load_tensors(start / spec.transformer_file), assign=True)
        teacher = make_teacher(exported) if spec.transformer.guidance else exported
        networks.transformer.load_state_dict(teacher.state_dict())
        networks.text.near = None  # a trained T5 knows its neighbours
        for part, (name, *_) in spec.text.networks.items():
            getattr(networks.text, part).load_state_dict(
                strip_prefix(load_tensors(start / name), PREFIX.get(part, ""))
            )
    return networks


def export(
    target: Path,
    run: Path,
    spec: ModelSpec,
    autoencoder: AutoEncoder,
    transformer: Flux,
    text: TextEncoder,
) -> None:
    """Write the files of an embedded model, in bfloat16 and the layout of its family."""
    files = {spec.transformer_file: transformer.state_dict(), AE: autoencoder.state_dict()}
    save_all(target, files | text_files(spec, text))
    copy_tokenizers(run, target, spec)


def text_files(spec: ModelSpec, text: TextEncoder) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file of the text encoder."""
    return {
        name: {PREFIX.get(part, "") + key: x for key, x in getattr(text, part).state_dict().items()}
        for part, (name, *_) in spec.text.networks.items()
    }


def save_all(target: Path, files: dict[str, dict[str, Tensor]]) -> None:
    """Write files of tensors in bfloat16."""
    for name, tensors in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        rounded = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
        save_tensors(target / name, rounded, {"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())

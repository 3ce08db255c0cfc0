"""Makes the embedded model from nothing: it draws its own pictures, of a grammar's captions and edits, and learns from them.

    python scripts/toy.py runs/toy --compile --export flux/tiny/flux.2-tiny
    python scripts/toy.py runs/more --export runs/better --start-from flux/tiny/flux.2-tiny --autoencoder-minutes 0

In turn: the tokenizer, the autoencoder, the latents of all pictures, the transformer with its text encoder, and the decoder
once more (`scripts/recipe/`).

What is in the run's folder is not made again, and a network whose training was stopped goes on from its last checkpoint.
Lengths are minutes, not steps: the learning rates follow the clock, so a run ends when it was told to, on any machine. Loss
logs (CSV) and contact sheets (PNG) appear in the folder as it goes. The second command trains the model further, with the
autoencoder that it has.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from recipe.autoencoder import train_autoencoder, train_decoder
from recipe.latents import encode_all
from recipe.networks import Networks, new_networks
from recipe.samples import Sampler
from recipe.text import Tokenizer
from recipe.tokenizer import train_tokenizer
from recipe.trainer import COOLING
from recipe.transformer import train_transformer

from flux.autoencoder import AutoEncoder
from flux.configs import AE, MODELS
from flux.errors import NonFiniteError, UserError
from flux.memory import can_compile, choose_device
from flux.tokenizers import QwenTokenizer
from flux.training import load, take, write

SPEC = MODELS["flux.2-tiny"]


def main() -> int:
    args = arguments()
    torch.set_flush_denormal(True)  # SiLU's tails are denormal numbers, on which a CPU is ten times slower
    try:
        make(args)
    except (UserError, NonFiniteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def make(args: argparse.Namespace) -> None:
    """All stages in turn, each in the run's folder."""
    run, device = args.run, choose_device(args.device)
    if args.compile and not can_compile(device):
        raise UserError("--compile needs a C++ compiler, or Triton on a GPU, which is not here: leave --compile out")
    run.mkdir(parents=True, exist_ok=True)
    train_tokenizer(run, SPEC.text)
    tokenizer = Tokenizer(run, SPEC)
    start = args.start_from and args.start_from / AE
    autoencoder = train_autoencoder(run, SPEC.autoencoder, args.autoencoder_minutes, device, start)
    encode_all(run, autoencoder.requires_grad_(False), tokenizer)
    networks = begin(run, args.start_from).to(device)
    cooling = 1.0 if args.start_from else COOLING  # weights that were trained stay near to what they are
    sampler = Sampler(SPEC, autoencoder, tokenizer)
    train_transformer(run, networks, sampler, args.transformer_minutes, args.compile, cooling)
    train_decoder(run, args.decoder_minutes, device, autoencoder)
    if args.export:
        export(args.export, run, autoencoder, networks)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder for checkpoints, logs and sheets")
    parser.add_argument("--autoencoder-minutes", type=float, default=40)
    parser.add_argument("--transformer-minutes", type=float, default=400)
    parser.add_argument("--decoder-minutes", type=float, default=15, help="on the autoencoder's decoder alone, at the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="nearly twice as fast on a CPU; needs a C++ compiler")
    parser.add_argument("--start-from", type=Path, metavar="FOLDER", help="weights to begin with, as --export wrote them")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="where the finished model goes")
    args = parser.parse_args()
    for part in ("autoencoder", "transformer", "decoder"):
        minutes = getattr(args, f"{part}_minutes")
        if not 0 <= minutes < math.inf:
            parser.error(f"--{part}-minutes {minutes}: must be 0 or more")
    if not (args.autoencoder_minutes or args.start_from or (args.run / AE).exists()):
        parser.error("--autoencoder-minutes 0 keeps an autoencoder as it is: say whose, with --start-from FOLDER")
    files = [AE, SPEC.transformer_file, *SPEC.text.files, *SPEC.text.tokenizer]
    lacking = [name for name in files if args.start_from and not (args.start_from / name).is_file()]
    if lacking:
        parser.error(f"--start-from {args.start_from}: {lacking[0]} is not there; give a folder that --export wrote")
    return args


def begin(run: Path, start: Path | None) -> Networks:
    """New networks; or those of an exported model, whose tokens may have had other numbers."""
    torch.manual_seed(0)
    networks = new_networks(SPEC)
    if start:
        networks.transformer.load_state_dict(load(start / SPEC.transformer_file))
        tensors = take(load(start / SPEC.text.files[0]), "model.")
        old, new = (QwenTokenizer(home / "tokenizer").tokenizer.get_vocab() for home in (start, run))
        table, fresh = tensors["embed_tokens.weight"], networks.text.model.embed_tokens.weight.detach().clone()
        for token in old.keys() & new.keys():
            fresh[new[token]] = table[old[token]]
        networks.text.model.load_state_dict({**tensors, "embed_tokens.weight": fresh})
    return networks


def export(target: Path, run: Path, autoencoder: AutoEncoder, networks: Networks) -> None:
    """The files of the embedded model, bfloat16, in the layout of a klein repository."""
    text = {f"model.{name}": x for name, x in networks.text.model.state_dict().items()}  # as the released Qwen3 files have it
    files = {SPEC.transformer_file: networks.transformer.state_dict(), AE: autoencoder.state_dict(), SPEC.text.files[0]: text}
    for name, tensors in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write(target / name, {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}, {"format": "pt"})
    for name in SPEC.text.tokenizer:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name, target / name)


if __name__ == "__main__":
    sys.exit(main())

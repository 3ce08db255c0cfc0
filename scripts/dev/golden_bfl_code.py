"""Make `tests/golden_bfl/code-*`: times, latents and pixels of Black Forest Labs' own code.

    python scripts/dev/golden_bfl_code.py FLUX1_CLONE FLUX2_CLONE KLEIN_CLONE --output FOLDER

The clones are black-forest-labs/flux at 802fb47, and black-forest-labs/flux2 at ab7cca6 and at
50fe516 (klein). scripts/dev/run_bfl.py runs their networks, loops and decoders in bfloat16, in a
process for each model. The test draws the same random weights and inputs from seeds. So only
results are stored, with a fingerprint of the weights.

This script also checks `tests/golden_bfl/flux.*`, which golden_bfl.py writes from the equations:
their times and latents must equal those of BFL's code to the bit. Make both on one machine.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from modules.command_line import Parser, exit_code, imports, show


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("clones", nargs=3, type=Path, metavar="CLONE", help="of flux, flux2, flux2")
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the files")
    p.add_argument("--overwrite", action="store_true", help="replace files in the folder")
    return p


with imports(__name__, parser):
    import torch
    from safetensors.torch import load_file, save, save_file
    from torch import Tensor

    from flux.autoencoder import AutoEncoderConfig
    from flux.configs import MODELS, ModelSpec
    from flux.parity import reference
    from flux.parity.random_model import random_model

GOLDEN = ROOT / "tests/golden_bfl"
WIDTH, HEIGHT, STEPS, SEED, TEXT = 80, 64, 4, 7, 11
GUIDANCE = 3.5  # an input of the dev models, the scale of classifier-free guidance of klein base


class Case(NamedTuple):
    clone: int  # of the command line
    row: str  # of flux.configs.MODELS
    references: int = 0
    kv_cache: bool = False


CASES = {
    "flux.1-dev": Case(0, "flux.1-dev"),
    "flux.1-schnell": Case(0, "flux.1-schnell"),
    "flux.2-dev": Case(1, "flux.2-dev"),
    "flux.2-klein-base-4b": Case(2, "flux.2-klein-base-4b"),
    "flux.2-klein-4b": Case(2, "flux.2-klein-4b", references=1),
    "flux.2-klein-9b-kv": Case(2, "flux.2-klein-4b", references=2, kv_cache=True),
}

# ---------------------------------------------------------------- weights and inputs from seeds


def tiny_model(case: Case) -> ModelSpec:
    """Return the table's row with tiny networks. BFL's autoencoders have 32 groups in a norm."""
    spec = reference.tiny_models(clip_eos=reference.TINY_CLIP.vocab_size - 1)[case.row]
    autoencoder = AutoEncoderConfig(ch=32, num_res_blocks=1, norm_groups=32)
    if not spec.flux1:
        autoencoder = replace(autoencoder, z_channels=32, scale_factor=None, shift_factor=None)
    channels = autoencoder.latent_channels
    transformer = replace(spec.transformer, in_channels=channels, out_channels=channels)
    return replace(
        spec, transformer=transformer, autoencoder=autoencoder, kv_cached_references=case.kv_cache
    )


def random_inputs(spec: ModelSpec, case: Case) -> dict[str, Tensor]:
    """Return `text` (1, T, D), and what the model reads of `pooled`, `negative`, `reference.*`.

    References are latents (C, h, w), each of another width. They are large, so that last bits show
    in which order attention sums over the keys of text, references and image.
    """
    c, generator = spec.transformer, torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    inputs = {"text": draw(1, TEXT, c.context_dim)}
    if c.vector_dim is not None:
        inputs["pooled"] = draw(1, c.vector_dim)
    if spec.cfg:
        inputs["negative"] = draw(1, TEXT, c.context_dim)
    for number in range(case.references):
        inputs[f"reference.{number}"] = draw(c.in_channels, 13, 11 + number)
    return inputs


def summation() -> dict[str, str]:
    """Return what decides in which order torch sums on one thread: its version and the processor.

    The kernels' blocks also follow from the caches and the instructions of matrix units.
    """
    details = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    details = {name: value for name, value in details.items() if not name.startswith("num_")}
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": json.dumps(details, sort_keys=True),
    }


# ---------------------------------------------------------------- BFL's code


def run_bfl(
    clone: Path, spec: ModelSpec, tensors: dict[str, Tensor], decode: bool = True, **settings
) -> dict[str, Tensor]:
    """Return the times, the latents after each step and the pixels that a clone's code computes."""
    settings |= dict(
        transformer=asdict(spec.transformer),
        autoencoder=asdict(spec.autoencoder) if decode else None,
        steps=STEPS,
        guidance=GUIDANCE,
        shift=spec.schedule != "unshifted",
        cfg=spec.cfg,
        kv_cache=spec.kv_cached_references,
    )
    with TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs.safetensors"), Path(folder, "outputs.safetensors")
        save_file(tensors, inputs, metadata={"settings": json.dumps(settings)})
        program = Path(__file__).with_name("run_bfl.py")
        environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(
            [sys.executable, program, clone, inputs, outputs],
            check=True,
            env=environment,
            cwd=folder,
        )
        return load_file(outputs)


def check_equations(family: str, clone: Path) -> None:
    """Compare the latents of `tests/golden_bfl/FAMILY.safetensors` with those of BFL's code."""
    golden = load_file(GOLDEN / f"{family}.safetensors")
    with random_model(family) as (name, folder):
        spec = MODELS[name]
        weights = load_file(folder / spec.transformer_file)
    tensors = {f"transformer.{name}": tensor.bfloat16() for name, tensor in weights.items()}
    tensors["text"] = golden["text/features"]
    if spec.flux1:
        tensors["pooled"] = golden["text/pooled"]
    outputs = run_bfl(clone, spec, tensors, decode=False, width=96, height=64, seed=0)
    if not outputs.pop("times").equal(golden["schedule"][1:]):
        sys.exit(f"{family}.safetensors: the times differ from BFL's code. Run golden_bfl.py.")
    for name, tokens in outputs.items():
        if not tokens.mT.equal(golden[name].flatten(2)):
            sys.exit(f"{family}.safetensors: {name} differs from BFL's code. Run golden_bfl.py.")
    show(f"{family}.safetensors: times and latents equal those of BFL's code to the bit")


def main() -> int:
    args = parser().parse_args()
    return exit_code(lambda: write(args), {}, args.output, "stopped")


def write(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    clones = [path.resolve() for path in args.clones]
    for path in (args.output / f"code-{name}.safetensors" for name in CASES):
        if path.exists() and not args.overwrite:
            parser().error(f"--output: {path} exists. Choose another folder, or add --overwrite.")
    args.output.mkdir(parents=True, exist_ok=True)
    check_equations("flux.1", clones[0])
    check_equations("flux.2", clones[1])
    for name, case in CASES.items():
        spec, clone = tiny_model(case), clones[case.clone]
        networks = reference.networks(spec)
        transformer, autoencoder = networks["transformer"], networks["autoencoder"]
        fingerprint = reference.fingerprint(transformer, autoencoder)
        tensors = random_inputs(spec, case)
        for tensor, value in transformer.state_dict().items():
            tensors[f"transformer.{tensor}"] = value.bfloat16()
        for tensor, value in autoencoder.state_dict().items():
            tensors[f"autoencoder.{tensor}"] = value
        outputs = run_bfl(clone, spec, tensors, width=WIDTH, height=HEIGHT, seed=SEED)
        head = ["git", "-C", str(clone), "rev-parse", "HEAD"]
        commit = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
        path = args.output / f"code-{name}.safetensors"
        metadata = summation() | {"commit": commit}
        path.write_bytes(save(outputs | {"fingerprint": fingerprint}, metadata=metadata))
        show(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

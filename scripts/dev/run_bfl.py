"""Run Black Forest Labs' own code on one file of weights and inputs. golden_bfl_code.py calls this.

    python scripts/dev/run_bfl.py CLONE INPUTS OUTPUTS

BFL's packages are called `flux` and `flux2`, so this process must not import the project's `flux`.
INPUTS is a safetensors file. Its tensors are `transformer.*`, `autoencoder.*`, `text`, `pooled`,
`negative` and `reference.*`. Its metadata has the settings, as JSON. OUTPUTS gets the times
and latents after each step, tokens (1, N, C), and the decoded pixels (1, 3, H, W).
"""

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path

PARSER = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
for each in ("clone", "inputs", "outputs"):
    PARSER.add_argument(each, type=Path, metavar=each.upper())
ARGS = PARSER.parse_args()

FILE = Path(__file__).resolve().parents[2] / "flux/parity/bfl_process.py"
try:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    spec = importlib.util.spec_from_file_location("bfl_process", FILE)
    assert spec is not None and spec.loader is not None
    bfl_process = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bfl_process)
except ModuleNotFoundError as error:
    sys.exit(f"error: the package {error.name!r} is missing. Run `pip install -e .`")


def run_flux1(settings: dict, tensors: dict) -> dict[str, torch.Tensor]:
    sampling = importlib.import_module("flux.sampling")
    width, height = settings["width"], settings["height"]
    transformer = transformer_of(settings, tensors)
    noise = sampling.get_noise(1, height, width, "cpu", torch.bfloat16, settings["seed"])

    def text(prompt):
        return tensors["text"]

    def pooled(prompt):
        return tensors["pooled"]

    inputs = sampling.prepare(text, pooled, noise, prompt="")
    tokens = inputs["img"].shape[1]
    times = sampling.get_schedule(settings["steps"], tokens, shift=settings["shift"])
    seen = latents_before_each_step(transformer, tokens)
    latents = sampling.denoise(
        transformer, **inputs, timesteps=times, guidance=settings["guidance"]
    )
    outputs = by_step(times, [*seen, latents])
    if a := settings["autoencoder"]:
        decoder = bfl_process.autoencoder_of(a, flux2=False)
        bfl_process.load(decoder, tensors, "autoencoder.")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs["pixels"] = decoder.decode(sampling.unpack(latents.float(), height, width))
    return outputs


def run_flux2(settings: dict, tensors: dict) -> dict[str, torch.Tensor]:
    sampling = importlib.import_module("flux2.sampling")
    c = settings["transformer"]
    transformer = transformer_of(settings, tensors)
    shape = (1, c["in_channels"], settings["height"] // 16, settings["width"] // 16)
    generator = torch.Generator().manual_seed(settings["seed"])
    noise = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
    x, x_ids = sampling.batched_prc_img(noise)
    tokens = x.shape[1]
    times = sampling.get_schedule(settings["steps"], tokens)
    references = sorted(name for name in tensors if name.startswith("reference."))
    reference_tokens = reference_ids = None
    if references:
        numbers = [torch.tensor([10 * i]) for i in range(1, len(references) + 1)]
        encoded = [tensors[name] for name in references]  # (C, h, w) each
        all_tokens, all_ids = sampling.listed_prc_img(encoded, t_coord=numbers)
        reference_tokens = torch.cat(all_tokens)[None].to(torch.bfloat16)
        reference_ids = torch.cat(all_ids)[None]
    text = tensors["text"]
    if settings["cfg"]:
        text = torch.cat([tensors["negative"], text])
        denoise = sampling.denoise_cfg
    else:
        denoise = sampling.denoise_cached if settings["kv_cache"] else sampling.denoise
    text, text_ids = sampling.batched_prc_txt(text)
    seen = latents_before_each_step(transformer, tokens)
    latents = denoise(
        transformer,
        x,
        x_ids,
        text,
        text_ids,
        timesteps=times,
        guidance=settings["guidance"],
        img_cond_seq=reference_tokens,
        img_cond_seq_ids=reference_ids,
    )
    outputs = by_step(times, [*seen, latents])
    if a := settings["autoencoder"]:
        decoder = bfl_process.autoencoder_of(a, flux2=True)
        bfl_process.load(decoder, tensors, "autoencoder.")
        grid = torch.cat(sampling.scatter_ids(latents, x_ids)).squeeze(2)
        outputs["pixels"] = decoder.decode(grid).float()
    return outputs


def transformer_of(settings: dict, tensors: dict) -> torch.nn.Module:
    network = bfl_process.transformer_of(settings["transformer"]).to(torch.bfloat16)
    return bfl_process.load(network, tensors, "transformer.")


def latents_before_each_step(transformer: torch.nn.Module, tokens: int) -> list[torch.Tensor]:
    """Return a list to which every call of the network appends the latents that it reads.

    Its first item is the noise, which nobody reads: a KV cache's first call has references there.
    """
    seen = []

    def record(module, args):
        seen.append(args[0][:1, :tokens].clone())

    transformer.get_submodule("img_in").register_forward_pre_hook(record)
    return seen


def by_step(times: list[float], latents: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the times and the latents after each step. The first latents are the noise."""
    outputs = {f"step.{step:03}/latents": x for step, x in enumerate(latents[1:], start=1)}
    outputs["times"] = torch.tensor(times[1:])
    return outputs


@torch.no_grad()
def main() -> None:
    clone, inputs, outputs = ARGS.clone, ARGS.inputs, ARGS.outputs
    torch.set_num_threads(1)
    sys.path.insert(0, str(clone / "src"))
    bfl_process.replace_unused_packages()
    with safe_open(inputs, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    run = run_flux2 if settings["transformer"]["shared_modulation"] else run_flux1
    save_file({n: x.contiguous() for n, x in run(settings, tensors).items()}, outputs)


if __name__ == "__main__":
    main()

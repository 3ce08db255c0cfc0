"""Run Black Forest Labs' networks, unmodified, on the inputs of a capture. `bfl.py` starts this.

    python -P bfl_process.py CHECKOUT INPUTS OUTPUTS

BFL's packages are called `flux` and `flux2`, so this process must not import the project's `flux`,
and nothing here does. INPUTS is a safetensors file: weights under `transformer.*` and
`autoencoder.*`, and the inputs of each pass under `PASS:img`, `PASS:txt`, ... Its metadata has the
settings, as JSON. OUTPUTS gets the tensors in `settings["wanted"]` that BFL's modules take and
give, named as a capture names them.
"""

import dataclasses
import importlib
import json
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# BFL's modules import these at the top, and the functions that are called here do not need them
UNUSED = {
    "torchvision": (),
    "cv2": (),
    "imwatermark": ("WatermarkEncoder",),
    "transformers": (
        *("AutoModelForDepthEstimation", "AutoProcessor", "SiglipImageProcessor"),
        *("SiglipVisionModel", "CLIPTextModel", "CLIPTokenizer", "T5EncoderModel", "T5Tokenizer"),
    ),
}


class Unused:
    """A class of a package that need not be installed."""

    def set_watermark(self, *args) -> None:
        """Do nothing. BFL's flux.util calls this when it is imported."""


def replace_unused_packages() -> None:
    for name, classes in UNUSED.items():
        module = sys.modules[name] = ModuleType(name)
        for each in classes:
            setattr(module, each, Unused)


# ---------------------------------------------------------------- BFL's networks


def transformer_of(config: dict) -> Any:
    """Return BFL's transformer at the sizes of the project's config."""
    c = config
    sizes = dict(
        in_channels=c["in_channels"],
        context_in_dim=c["context_dim"],
        hidden_size=c["hidden_size"],
        mlp_ratio=c["mlp_ratio"],
        num_heads=c["num_heads"],
        depth=c["depth"],
        depth_single_blocks=c["depth_single"],
        axes_dim=list(c["axes_dim"]),
        theta=c["theta"],
    )
    if not c["shared_modulation"]:
        model = importlib.import_module("flux.model")
        sizes |= dict(
            out_channels=c["out_channels"],
            vec_in_dim=c["vector_dim"],
            qkv_bias=c["bias"],
            guidance_embed=c["guidance"],
        )
        return model.Flux(model.FluxParams(**sizes))
    model = importlib.import_module("flux2.model")
    if "use_guidance_embed" in {field.name for field in dataclasses.fields(model.Flux2Params)}:
        sizes["use_guidance_embed"] = c["guidance"]  # since klein
    return model.Flux2(model.Flux2Params(**sizes))


def autoencoder_of(config: dict, flux2: bool) -> Any:
    """Return BFL's autoencoder at the sizes of the project's config."""
    sizes = {name: config[name] for name in ("ch", "num_res_blocks", "z_channels")}
    sizes["ch_mult"] = list(config["ch_mult"])
    if flux2:
        autoencoder = importlib.import_module("flux2.autoencoder")
    else:
        autoencoder = importlib.import_module("flux.modules.autoencoder")
        sizes |= dict(resolution=256, in_channels=3, out_ch=3)
        sizes |= {name: config[name] for name in ("scale_factor", "shift_factor")}
    return autoencoder.AutoEncoder(autoencoder.AutoEncoderParams(**sizes))


def load(module: nn.Module, tensors: dict, prefix: str) -> Any:
    state = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    module.load_state_dict(state, strict=True)
    return module.eval()


# ---------------------------------------------------------------- observe


class Recorder:
    """Keeps wanted tensors of running modules, named `place/module/tap` as in a capture."""

    def __init__(self, wanted: list[str]):
        self.wanted = set(wanted)
        self.tensors: dict[str, Tensor] = {}
        self.running: list[str] = []  # the innermost module last

    def keep(self, name: str, tensor: Tensor) -> None:
        if name in self.wanted and name not in self.tensors:
            self.tensors[name] = tensor.detach().cpu().clone()

    def observe(self, place: str, tap: str, values) -> None:
        tensors = tensors_in(values)
        for number, tensor in enumerate(tensors):
            self.keep(f"{place}/{tap}" if len(tensors) == 1 else f"{place}/{tap}.{number}", tensor)

    def enter(self, place: str, args, kwargs) -> None:
        self.running.append(place)
        self.observe(place, "in", (args, kwargs))

    def leave(self, place: str, outputs) -> None:
        self.running.pop()
        self.observe(place, "out", outputs)

    @contextmanager
    def watching(self, where: str, network: nn.Module):
        """Observe all modules of a network while the block runs."""
        with ExitStack() as stack:
            for path, module in network.named_modules():
                if path:
                    stack.enter_context(self._watching_module(f"{where}/{path}", module))
            stack.enter_context(Attention(self))
            yield

    @contextmanager
    def _watching_module(self, place: str, module: nn.Module):
        def before(module, args, kwargs):
            self.enter(place, args, kwargs)

        def after(module, args, outputs):
            self.leave(place, outputs)

        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
        # since klein, blocks are run by methods of these names, which hooks do not see
        methods = [n for n in ("forward_kv_extract", "forward_kv_cached") if hasattr(module, n)]
        for name in methods:
            setattr(module, name, partial(self._run_method, place, getattr(module, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name in methods:
                delattr(module, name)

    def _run_method(self, place: str, method, *args, **kwargs):
        self.enter(place, args, kwargs)
        outputs = method(*args, **kwargs)
        tokens = 2 if "double_blocks" in place else 1  # what follows are cached keys and values
        self.leave(place, tensors_in(outputs)[:tokens])
        return outputs


def tensors_in(values) -> list[Tensor]:
    """Return all tensors in nested lists, dicts and dataclasses."""
    if isinstance(values, Tensor):
        return [values]
    if dataclasses.is_dataclass(values):
        values = [getattr(values, field.name) for field in dataclasses.fields(values)]
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []


class Attention(TorchFunctionMode):
    """Observes q, k, v and the output of each call of the attention function."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function is F.scaled_dot_product_attention and self.recorder.running:
            place = f"{self.recorder.running[-1]}/attention"
            named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
            for tap, tensor in zip(("q", "k", "v", "out"), (*args, *named)[:3] + (out,)):
                self.recorder.keep(f"{place}/{tap}", tensor)
        return out


# ---------------------------------------------------------------- run


def run_passes(settings: dict, tensors: dict, recorder: Recorder) -> None:
    """Run the transformer on the inputs of each recorded pass."""
    dtype, device = getattr(torch, settings["dtype"]), settings["device"]
    network = transformer_of(settings["transformer"]).to(device, dtype)
    load(network, tensors, "transformer.")
    flux2, cache = settings["transformer"]["shared_modulation"], None
    for place in settings["passes"]:
        taken = {name: tensors[f"{place}:{name}"] for name in ("img", "txt", "img_ids", "txt_ids")}
        # positions are float32 in BFL's code for FLUX.1, integers in that for FLUX.2
        ids = [taken[name][None].to(device) for name in ("img_ids", "txt_ids")]
        img, txt = (taken[name].to(device, dtype) for name in ("img", "txt"))
        t, guidance = (tensors[f"{place}:{name}"].to(device, dtype) for name in ("t", "guidance"))
        if not flux2:
            with recorder.watching(place, network):
                out = network(
                    img=img,
                    img_ids=ids[0].float(),
                    txt=txt,
                    txt_ids=ids[1].float(),
                    y=tensors[f"{place}:vector"].to(device, dtype),
                    timesteps=t,
                    guidance=guidance,
                )
            recorder.keep(f"{place}/out", out)
            continue
        inputs = dict(x=img, x_ids=ids[0], timesteps=t, ctx=txt, ctx_ids=ids[1], guidance=guidance)
        if "references:img" not in tensors:
            with recorder.watching(place, network):
                out = network(**inputs)
        elif cache is None:  # references and image go through the network together
            out, cache = network.forward_kv_extract(
                **inputs,
                x_seq_concat=tensors["references:img"].to(device, dtype),
                x_seq_concat_ids=tensors["references:img_ids"][None].to(device),
            )
        else:
            with recorder.watching(place, network):
                out = network.forward_kv_cached(**inputs, kv_cache=cache)
        recorder.keep(f"{place}/out", out)


def run_autoencoder(settings: dict, tensors: dict, recorder: Recorder) -> None:
    """Decode the last latents and encode the input images.

    In bfloat16, BFL's programs decode FLUX.1 under autocast and FLUX.2 in float32.
    """
    flux2, device = settings["transformer"]["shared_modulation"], settings["device"]
    network = load(autoencoder_of(settings["autoencoder"], flux2), tensors, "autoencoder.")
    network = network.to(device)
    rounded = settings["dtype"] != "float32" and not flux2
    if "decoder:latents" in tensors:
        latents = tensors["decoder:latents"].to(device).float()
        autocast = torch.autocast(device, getattr(torch, settings["dtype"]), enabled=rounded)
        with recorder.watching("decoder", network), autocast:
            pixels = network.decode(latents if flux2 else F.pixel_shuffle(latents, 2))
        recorder.keep("pixels", pixels)
    for name in [name for name in tensors if name.startswith("encoder.") and ":" in name]:
        place = name.partition(":")[0]
        with recorder.watching(place, network):
            latents = network.encode(tensors[name].to(device))
        recorder.keep(f"{place}/latents", latents if flux2 else F.pixel_unshuffle(latents, 2))


def run_schedule(settings: dict, recorder: Recorder) -> None:
    flux2, steps = settings["transformer"]["shared_modulation"], settings["steps"]
    sampling = importlib.import_module("flux2.sampling" if flux2 else "flux.sampling")
    shift = {} if flux2 else {"shift": settings["shift"]}
    times = sampling.get_schedule(steps, settings["image_tokens"], **shift)
    recorder.keep("schedule", torch.tensor(times))


@torch.no_grad()
def main() -> None:
    checkout, inputs, outputs = map(Path, sys.argv[1:])
    sys.path.insert(0, str(checkout / "src"))
    with safe_open(inputs, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    torch.set_num_threads(settings["threads"])
    replace_unused_packages()
    recorder = Recorder(settings["wanted"])
    if settings["image_tokens"]:
        run_schedule(settings, recorder)
    run_passes(settings, tensors, recorder)
    if settings["autoencoder"]:
        run_autoencoder(settings, tensors, recorder)
    save_file({name: x.contiguous() for name, x in recorder.tensors.items()}, outputs)


if __name__ == "__main__":
    main()

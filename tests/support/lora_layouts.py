"""LoRA files in the layouts of many tools, made by rule: from our layers and a map of names.

Every layout holds one LoRA of each layer that its tool can train. The same rule serves networks of
any size: `layouts(module)` needs shapes only.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Rows = tuple[int, int]
Layers = dict[str, tuple[str, Rows | None]]  # name in a file -> our path, and its rows, or all


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {path: x for path, x in module.named_modules() if isinstance(x, nn.Linear)}


def ours(module: nn.Module) -> Layers:
    return {path: (path, None) for path in linears(module)}


def split(module: nn.Module) -> Layers:
    """OneTrainer's names of 2026: q, k, v and the MLP's rows are numbered; img_in is nested."""
    out: Layers = {}
    for path, layer in linears(module).items():
        d = layer.in_features
        if path.endswith("qkv"):
            out |= {f"{path}.{i}": (path, (i * d, i * d + d)) for i in range(3)}
        elif path.endswith("linear1"):
            stops = (d, 2 * d, 3 * d, layer.out_features)
            out |= {f"{path}.{i}": (path, (i * d, stop)) for i, stop in enumerate(stops)}
        else:
            out["img_in.proj" if path == "img_in" else path] = (path, None)
    return out


def fused(module: nn.Module) -> Layers:
    """diffusers' names after fuse_qkv_projections, which SimpleTuner trains."""
    out: Layers = {}
    for path, layer in linears(module).items():
        block, number, name = (*path.split(".", 2), "", "")[:3]
        d = layer.in_features
        double = f"transformer_blocks.{number}.attn."
        if name == "img_attn.qkv":
            out[double + "to_qkv"] = (path, None)
        elif name == "txt_attn.qkv":
            out[double + ("to_added_qkv" if number == "0" else "add_qkv_proj")] = (path, None)
        elif name == "img_attn.proj":
            out[double + "to_out.0"] = (path, None)
        elif name == "linear1":
            out[f"single_transformer_blocks.{number}.attn.to_qkv"] = (path, (0, 3 * d))
    return out


def only(ends: tuple[str, ...]) -> Callable[[nn.Module], Layers]:
    return lambda module: {n: w for n, w in ours(module).items() if n.endswith(ends)}


def flat(layers: Callable[[nn.Module], Layers]) -> Callable[[nn.Module], Layers]:
    return lambda module: {n.replace(".", "_"): w for n, w in layers(module).items()}


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
PROJ = only(("img_attn.proj", "img_mlp.0"))
DIFFUSERS_DOWN_UP = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")


def named(adapter: str) -> tuple[str, str]:
    return f"lora_A.{adapter}", f"lora_B.{adapter}"


def compiled(module: nn.Module) -> Layers:
    return {n.replace("blocks.0.", "blocks.0._orig_mod."): w for n, w in PROJ(module).items()}


def ending(layers: Callable[[nn.Module], Layers], end: str) -> Callable[[nn.Module], Layers]:
    return lambda module: {n + end: w for n, w in layers(module).items()}


LAYOUTS = {  # layers, prefix, ends of the keys, whether there is an alpha
    "OneTrainer, split": (split, "transformer.", DOWN_UP, True),
    "OneTrainer, split, flat": (flat(split), "lora_transformer_", DOWN_UP, True),
    "SimpleTuner, fused": (fused, "transformer.", AB, False),
    "SimpleTuner, fused, LyCORIS": (flat(fused), "lycoris_", DOWN_UP, True),
    "adapter": (PROJ, "base_model.model.", named("my-style_2.weight"), False),
    "adapter, fused": (fused, "transformer.", named("default_0.weight"), False),
    "adapter without weight": (PROJ, "", named("x"), False),
    "no weight": (PROJ, "diffusion_model.", ("lora_A", "lora_B"), True),
    "extracted": (flat(ours), "lora_unet_model_diffusion_model_", DOWN_UP, True),
    "extracted, one": (flat(ours), "lora_unet_diffusion_model_", DOWN_UP, True),
    "underscore, fused": (ending(flat(fused), "_"), "lora_unet_", DOWN_UP, True),
    "two underscores": (flat(PROJ), "lora_unet__", DOWN_UP, True),
    "convolution": (flat(ours), "lora_unet_", DOWN_UP, True),
    "linear_layer, fused": (fused, "unet.", DIFFUSERS_DOWN_UP, False),
    "_lora": (ending(PROJ, "_lora"), "", ("down.weight", "up.weight"), True),
    "compiled": (PROJ, "module._orig_mod.", AB, False),
    "compiled blocks": (compiled, "transformer.", AB, True),
    "nested, fused": (fused, "transformer.base_model.model.", AB, False),
}


def layout(
    name: str, module: nn.Module, random: Callable[..., Tensor], rank: int = 4, alpha: float = 6.0
) -> tuple[dict[str, Tensor], dict[str, tuple[str, Rows, Tensor, Tensor, float]]]:
    """Return the tensors of a file, and by layer its path, rows, A, B and alpha/rank."""
    layers, prefix, (down, up), has_alpha = LAYOUTS[name]
    tensors, parts = {}, {}
    for i, (layer, (path, rows)) in enumerate(layers(module).items()):
        linear = module.get_submodule(path)
        start, stop = rows or (0, linear.out_features)
        a = random(rank, linear.in_features, seed=2 * i)
        b = random(stop - start, rank, seed=2 * i + 1, size=0.1)
        key = f"{prefix}{layer}"
        sides = (1, 1) if name == "convolution" else ()
        tensors |= {f"{key}.{down}": a.reshape(*a.shape, *sides)}
        tensors |= {f"{key}.{up}": b.reshape(*b.shape, *sides)}
        if has_alpha:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        parts[layer] = path, (start, stop), a, b, alpha / rank if has_alpha else 1.0
    return tensors, parts

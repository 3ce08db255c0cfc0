"""Read a transformer in diffusers' layout as one in ours: matrices are joined, names replaced."""

from collections.abc import Mapping

from flux.errors import UserError
from flux.weights.diffusers_names import our_layer
from flux.weights.files import Rows, TensorInfo
from flux.weights.quantization import canonical

ANCHOR = "x_embedder.weight"  # diffusers' name of `img_in.weight`


def join_diffusers(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return a transformer's tensors by our names; those of any other file as they are.

    diffusers splits our matrices of q, k and v by rows, and swaps the halves of `norm_out`. Such
    tensors are joined when they are mapped. UserError if the parts of a matrix are quantized, each
    with a scale or a type of its own.
    """
    anchors = [name for name in infos if f".{name}".endswith(f".{ANCHOR}")]
    if len(anchors) != 1 or not any("transformer_blocks." in name for name in infos):
        return dict(infos)
    prefix = anchors[0].removesuffix(ANCHOR)
    flux2 = any("time_guidance_embed." in name for name in infos)
    joined: dict[str, TensorInfo] = {}
    split: dict[str, list[TensorInfo | None]] = {}
    for name, info in infos.items():
        layer, _, tensor = canonical(name.removeprefix(prefix)).rpartition(".")
        place = our_layer(layer, flux2)
        if place is None:  # reported when the tensors are matched with the network
            joined[name] = info
        elif place.swapped:
            joined[f"{place.layer}.{tensor}"] = _swap_halves(info, tensor)
        elif place.parts == 1:
            joined[f"{place.layer}.{tensor}"] = info
        else:
            _require_plain(info, tensor)
            split.setdefault(f"{place.layer}.{tensor}", [None] * place.parts)[place.part] = info
    for name, parts in split.items():
        found = [part for part in parts if part is not None]
        if len(found) == len(parts):
            joined[name] = _join(found)
        else:
            joined |= {part.name: part for part in found}
    return joined


def _require_plain(info: TensorInfo, tensor: str) -> None:
    if tensor not in ("weight", "bias"):
        raise UserError(
            f"{info.file} has q, k and v quantized one by one in diffusers' layout "
            f"({info.name!r:.120}), which is not supported. Get the model in Black Forest Labs' "
            "layout, or in bfloat16."
        )


def _join(parts: list[TensorInfo]) -> TensorInfo:
    """Describe the tensor whose rows are those of all parts."""
    first = parts[0]
    for part in parts:
        if part.dtype != first.dtype or part.shape[1:] != first.shape[1:] or not part.shape:
            raise UserError(
                f"{first.file} has {first.name!r:.120} as {first.dtype} {first.shape!s:.60}, and "
                f"{part.name!r:.120} as {part.dtype} {part.shape!s:.60}, which belong into one "
                "matrix. Get the model in Black Forest Labs' layout, or in bfloat16."
            )
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    rows = tuple(Rows(part, 0, part.shape[0]) for part in parts)
    return first._replace(shape=shape, name=" + ".join(part.name for part in parts), rows=rows)


def _swap_halves(info: TensorInfo, tensor: str) -> TensorInfo:
    """Describe a tensor of scale and shift as one of shift and scale."""
    _require_plain(info, tensor)
    if not info.shape or info.shape[0] % 2:
        return info  # misshapen, as the matching reports
    half, end = info.shape[0] // 2, info.shape[0]
    return info._replace(rows=(Rows(info, half, end), Rows(info, 0, half)))

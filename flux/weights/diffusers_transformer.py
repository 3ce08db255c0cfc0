"""Read a transformer in diffusers' layout as one in ours: matrices are joined, names replaced."""

from collections.abc import Mapping, Sequence

from flux.errors import UserError
from flux.weights import diffusers_names3
from flux.weights.diffusers_names import Place, our_layer
from flux.weights.files import FLOATS, Rows, TensorInfo
from flux.weights.fused3 import split_fused

ANCHOR = "x_embedder.weight"  # diffusers' name of `img_in.weight`
ANCHOR3 = "x_embedders.image.weight"  # and of FLUX 3's `emb_in.image.weight`


def join_diffusers(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return a transformer's tensors by our names; those of any other file as they are.

    diffusers splits our matrices of q, k and v by rows, and swaps the halves of `norm_out`. Such
    tensors are joined when they are mapped. Where each part of a matrix is quantized by itself, the
    tensors of part i are called "LAYER.parts.i.TENSOR" (`quantization.joined`).
    """
    anchors = [name for name in infos if f".{name}".endswith(f".{ANCHOR3}")]
    if len(anchors) == 1:
        return _rename_flux3(infos, anchors[0].removesuffix(ANCHOR3))
    anchors = [name for name in infos if f".{name}".endswith(f".{ANCHOR}")]
    if len(anchors) != 1 or not any("transformer_blocks." in name for name in infos):
        return split_fused(infos)
    prefix = anchors[0].removesuffix(ANCHOR)
    flux2 = any("time_guidance_embed." in name for name in infos)
    renamed: dict[str, TensorInfo] = {}
    layers: dict[str, list[dict[str, TensorInfo]]] = {}  # ours -> tensors of each part
    swapped = set()
    for name, info in infos.items():
        place, tensor = _find_place(name.removeprefix(prefix), flux2)
        if place is None:  # reported when the tensors are matched with the network
            renamed[name] = info
            continue
        parts = layers.setdefault(place.layer, [{} for _ in range(place.parts)])
        parts[place.part][tensor] = info
        if place.swapped:
            swapped.add(place.layer)
    for layer, parts in layers.items():
        renamed |= _join(layer, parts, layer in swapped)
    return renamed


def _find_place(name: str, flux2: bool) -> tuple[Place | None, str]:
    """Split "LAYER.TENSOR", where both may have dots; return the layer's place and the tensor."""
    layer = name
    while "." in layer:
        layer = layer.rpartition(".")[0]
        if place := our_layer(layer, flux2):
            return place, name[len(layer) + 1 :]
    return None, name


def _join(layer: str, parts: list[dict[str, TensorInfo]], swapped: bool) -> dict[str, TensorInfo]:
    """Return the tensors of one of our layers, by our names."""
    if len(parts) == 1 and not swapped:
        return {f"{layer}.{tensor}": info for tensor, info in parts[0].items()}
    renamed: dict[str, TensorInfo] = {}
    weights = [part["weight"] for part in parts if "weight" in part]
    by_itself = len(weights) == len(parts) and not _is_plain(parts)
    for tensor in dict.fromkeys(tensor for part in parts for tensor in part):
        held = [part[tensor] for part in parts if tensor in part]
        if by_itself and tensor != "bias":
            renamed |= {
                f"{layer}.parts.{i}.{tensor}": part[tensor]
                for i, part in enumerate(parts)
                if tensor in part
            }
        elif len(held) < len(parts) or tensor not in ("weight", "bias"):
            renamed |= {info.name: info for info in held}  # reported as unknown
        elif swapped:
            renamed[f"{layer}.{tensor}"] = _swap_halves(held[0])
        else:
            renamed[f"{layer}.{tensor}"] = _join_rows(held)
    return renamed


def _rename_flux3(infos: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    """Rename the tensors of FLUX 3: nothing is split, and the halves of one are swapped."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    renamed = {}
    for name, info in infos.items():
        layer, tensor = diffusers_names3.find_layer(name.removeprefix(prefix))
        if layer == diffusers_names3.SWAPPED:
            layers.setdefault(layer, {})[tensor] = info
        else:
            renamed[f"{layer}.{tensor}" if layer else tensor] = info
    for layer, tensors in layers.items():
        renamed |= _join(layer, [tensors], swapped=True)
    return renamed


def _is_plain(parts: Sequence[Mapping[str, TensorInfo]]) -> bool:
    """Return whether rows of all parts make one matrix: they have one type, and no scales."""
    types = {part["weight"].dtype for part in parts}
    return (len(types) == 1 or types <= set(FLOATS)) and all(
        part.keys() <= {"weight", "bias"} for part in parts
    )


def _join_rows(parts: list[TensorInfo]) -> TensorInfo:
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


def _swap_halves(info: TensorInfo) -> TensorInfo:
    """Describe a tensor of scale and shift as one of shift and scale."""
    if not info.shape or info.shape[0] % 2:
        return info  # misshapen, as the matching reports
    half, end = info.shape[0] // 2, info.shape[0]
    return info._replace(rows=(Rows(info, half, end), Rows(info, 0, half)))

"""Read FLUX 3's files in which one matrix of a block holds q, k and v: split its rows in three.

Such files are reported of ComfyUI's INT8 ConvRot format. The name of the matrix is not known, so
its place tells: it is the one unknown matrix of a block that lacks all three, with three times as
many rows as the block's output has.
"""

import re
import warnings
from collections.abc import Mapping

from flux.weights.files import Rows, TensorInfo

BLOCK = re.compile(r"((?:^|.*\.)(?:txt_mode_blocks|content_mode_blocks\.\w+|single_blocks)\.\d+)\.")
PARTS = ("q_proj", "k_proj", "v_proj")
OTHERS = {"attn_out", "mlp_in", "mlp_out", "norm.query_norm", "norm.key_norm"}
# tensors of a layer that belong to each of its parts; others stay under the file's name
SHARED = re.compile(r"weight|bias|weight_scale\w*|scale_weight|input_scale|scale_input|comfy_quant")


def split_fused(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors with q_proj, k_proj and v_proj in place of a fused matrix, with a warning.

    Tensors of other files stay as they are.
    """
    blocks: dict[str, dict[str, dict[str, str]]] = {}  # block -> layer -> tensor -> name
    for name in infos:
        if match := BLOCK.match(name):
            layer, _, tensor = name[match.end() :].rpartition(".")
            blocks.setdefault(match[1], {}).setdefault(layer, {})[tensor] = name
    found, fused = dict(infos), []
    for block, layers in blocks.items():
        out = infos.get(layers.get("attn_out", {}).get("weight", ""))
        rows = out.shape[0] if out and out.shape else 0
        wanted = [
            layer
            for layer, tensors in layers.items()
            if layer not in OTHERS
            and "weight" in tensors
            and infos[tensors["weight"]].shape[:1] == (3 * rows,)
        ]
        if len(wanted) != 1 or not rows or any(part in layers for part in PARTS):
            continue
        fused.append(f"{block}.{wanted[0]}")
        for tensor, name in layers[wanted[0]].items():
            if SHARED.fullmatch(tensor):
                info = found.pop(name)
                for number, part in enumerate(PARTS):
                    found[f"{block}.{part}.{tensor}"] = _third(info, number, rows)
    if fused:
        warnings.warn(
            f"{next(iter(infos.values())).file} has one matrix for q, k and v in {len(fused)} "
            f"blocks, such as {fused[0]!r:.120}: it is taken for them, in this order",
            stacklevel=4,
        )
    return found


def _third(info: TensorInfo, number: int, rows: int) -> TensorInfo:
    """Describe the rows of one part; what has no three times as many rows is of all parts."""
    if info.shape[:1] != (3 * rows,):
        return info
    kept = Rows(info, number * rows, (number + 1) * rows)
    return info._replace(shape=(rows, *info.shape[1:]), rows=(kept,))

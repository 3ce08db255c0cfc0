"""The changes that the kinds of LoRA files describe, as functions of their factors.

| Kind | Change of W | Source |
|---|---|---|
| LoRA | B A | Hu et al. 2021, arXiv:2106.09685 |
| LoHa | (B1 A1) * (B2 A2) | Hyeon-Woo et al. 2021, arXiv:2108.06098 |
| LoKr | W1 ⊗ W2 | Yeh et al. 2023, arXiv:2309.14859 |
| GLoRA | W A1 A2 + B1 B2 | Chavan et al. 2023, arXiv:2306.07967 |
| OFT | R W - W, or W R' - W in PEFT | Qiu et al. 2023, arXiv:2306.07280 |
| BOFT | the same, where R is a product of sparse rotations | Liu et al. 2023, arXiv:2311.06243 |

R is block-diagonal. Each block is Cayley's rotation of a skew-symmetric matrix Q.
"""

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

NO_DELTA = {"alpha", "scalar", "magnitude", "up_bias", "diff_bias", "reshape"}  # no factors
COMPLETE = (  # sets of factors that make a change
    {"down", "up"},
    {"diff"},
    {"value"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    {"glora_a1", "glora_a2", "glora_b1", "glora_b2"},
    {"oft_R"},
    {"oft_R", "oft_scaled"},
    {"oft_blocks"},
    {"oft_blocks", "rescale"},
    {"boft_R", "boft_s"},
)
ROTATIONS = {"oft_R", "oft_blocks", "boft_R"}
NEUMANN_TERMS = 5  # of the series with which PEFT and OneTrainer approximate Cayley's rotation


def weight_change(
    factors: Mapping[str, Tensor], weight: Tensor, options: Mapping[str, float]
) -> Tensor:
    """Return the change (rows, columns), without alpha/rank, of the rows `weight` (rows, n).

    `options`: "constraint", the largest norm of an OFT's Q, and "neumann_terms", 0 for the exact
    rotation. Shapes that do not fit each other raise RuntimeError, also on the meta device.
    """
    if "down" in factors:
        return factors["up"] @ factors["down"]
    if "hada_w1_a" in factors:
        w1 = factors["hada_w1_a"] @ factors["hada_w1_b"]
        return w1.mul_(factors["hada_w2_a"] @ factors["hada_w2_b"])
    if "glora_a1" in factors:
        return _glora(factors, weight)
    if factors.keys() & ROTATIONS:
        return _rotated(factors, weight, options).sub_(weight)
    for role in ("diff", "value"):
        if role in factors:
            return factors[role]
    return torch.kron(_lokr_factor(factors, "lokr_w1"), _lokr_factor(factors, "lokr_w2"))


def ranks(factors: Mapping[str, Tensor]) -> set[int]:
    """Return the ranks of the factors' products: {} for full matrices and rotations."""
    rows = ("down", "hada_w1_b", "hada_w2_b", "lokr_w2_b", "lokr_w1_b")
    found = {factors[role].shape[0] for role in rows if role in factors}
    if "glora_a1" in factors:
        found.add(min(factors["glora_a1"].shape))
    return found


def _lokr_factor(factors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in factors:
        return factors[name]
    return factors[f"{name}_a"] @ factors[f"{name}_b"]


def _glora(factors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = (factors[f"glora_{name}"] for name in ("a1", "a2", "b1", "b2"))
    if a1.shape[0] != weight.shape[-1]:  # LyCORIS before 2.0 has the two of a pair the other way
        a1, a2, b1, b2 = a2, a1, b2, b1
    return (weight @ a1 @ a2).add_(b1 @ b2)


# ------------------------------------------------------------------ rotations


def _rotated(factors: Mapping[str, Tensor], weight: Tensor, options: Mapping[str, float]) -> Tensor:
    if "oft_R" in factors:  # PEFT, of the columns
        q = _skew_symmetric(factors["oft_R"])
        if "oft_scaled" in factors:  # OneTrainer
            q = q / (2 * (q.shape[-1] - 1) ** 0.5)
        rotations = _cayley(q, int(options.get("neumann_terms", NEUMANN_TERMS)))
        if len(rotations) == 1:  # shared by all blocks
            rotations = rotations.expand(weight.shape[-1] // rotations.shape[-1], -1, -1)
        return _turn(rotations, weight.T).T.contiguous()
    if "boft_R" in factors:  # PEFT, of the columns
        data = factors["boft_R"]
        rotations = _cayley(0.5 * (data - data.mT))
        turned = (
            _turn(rotations[0], weight.T)
            if len(rotations) == 1
            else _turn_in_stages(rotations, weight.T, grain=data.shape[-1] // 2)
        )
        return turned.T * factors["boft_s"]
    # sd-scripts and LyCORIS, of the rows
    q = factors["oft_blocks"] - factors["oft_blocks"].mT
    if constraint := options.get("constraint"):
        q = q * (constraint / q.norm().clamp(min=constraint))
    # The two write (I + Q)(I - Q)^-1, which OFT applies transposed.
    turned = _turn(_cayley(q), weight) if q.ndim == 3 else _turn_in_stages(_cayley(-q), weight)
    return turned * factors["rescale"] if "rescale" in factors else turned


def _skew_symmetric(vectors: Tensor) -> Tensor:
    """Put the numbers (blocks, n (n - 1) / 2) above the diagonal, and negated below it."""
    blocks, numbers = vectors.shape
    n = (1 + isqrt(1 + 8 * numbers)) // 2
    if n * (n - 1) != 2 * numbers:
        raise RuntimeError(f"{numbers} numbers fill no half of a square matrix")
    q = vectors.new_zeros(blocks, n, n)
    above = torch.triu_indices(n, n, 1, device=vectors.device)
    q[:, above[0], above[1]] = vectors
    return q - q.mT


def _cayley(q: Tensor, neumann_terms: int = 0) -> Tensor:
    """Return (I - Q)(I + Q)^-1, or (I + Q)(I - Q)^-1 by so many terms of a series, as PEFT does."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if not neumann_terms:
        return torch.linalg.solve(eye + q, eye - q, left=False)
    rotation = eye + (2 * q if neumann_terms > 1 else 0 * q)
    if neumann_terms > 2:
        power = q @ q
        rotation = rotation + 2 * power
        for _ in range(3, neumann_terms - 1):
            power = power @ q
            rotation = rotation + 2 * power
        rotation = rotation + power @ q
    return rotation


def _turn(rotations: Tensor, x: Tensor) -> Tensor:
    """Multiply the block-diagonal matrix of `rotations` (blocks, n, n) by x (blocks * n, m)."""
    return (rotations @ x.unflatten(0, rotations.shape[:2])).flatten(0, 1)


def _turn_in_stages(stages: Tensor, x: Tensor, grain: int = 1) -> Tensor:
    """Multiply BOFT's stages (stages, blocks, n, n) by x, the first stage first.

    Stage i permutes so that a block holds rows 2^i blocks apart, in runs of `grain` rows.
    """
    for i, rotations in enumerate(stages):
        run = 2**i * (stages.shape[-1] // 2) // grain
        y = x.unflatten(0, (-1, 2, run, grain)).transpose(1, 2).flatten(0, 3)
        y = _turn(rotations, y)
        x = y.unflatten(0, (-1, run, 2, grain)).transpose(1, 2).flatten(0, 3)
    return x

"""flux.runtime.fast: the same tensor, made of some rows after others, wherever that may be seen by nobody."""

import pytest
import torch
from torch import Tensor, nn

from flux.runtime import fast as stripes


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(stripes, "STRIPE", 64)


def run(
    x: Tensor, dim: int, watched: nn.Module, length: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Numbers its rows, doubles their width, and changes their type; the truth is one line of it. And where each stripe was."""
    where = []

    def function(before: int, x: Tensor, numbers: Tensor) -> Tensor:
        where.append((before, x.shape[dim]))
        numbered = x + numbers.view(-1, *[1] * (x.ndim - 1 - dim))
        return torch.cat([numbered, numbered], dim=-1).double()

    return stripes.in_stripes(
        function, (x, dim), (torch.arange(length), 0), watched=[watched]
    ), where


@pytest.mark.parametrize(
    "shape, dim",
    [((37, 8), 0), ((2, 37, 8), 1), ((2, 1, 37, 3, 4), 2), ((2, 3, 8), 1), ((300, 1), 0)],
)
@torch.no_grad()
def test_stripes_are_put_together_again(shape, dim):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out, where = run(x, dim, nn.Identity(), shape[dim])
    numbered = x + torch.arange(shape[dim]).view(-1, *[1] * (x.ndim - 1 - dim))
    assert torch.equal(out, torch.cat([numbered, numbered], dim=-1).double())
    assert (len(where) > 1) == (x.numel() >= 2 * 64)
    assert [before for before, _ in where] == [
        sum(n for _, n in where[:i]) for i in range(len(where))
    ]
    assert sum(rows for _, rows in where) == shape[dim]


@pytest.mark.parametrize("why", ["small", "gradients", "hook", "pre-hook", "meta"])
def test_whole_where_stripes_would_be_in_the_way(why):
    x, module = torch.randn(15 if why == "small" else 64, 8), nn.Identity()
    if why == "hook":
        module.register_forward_hook(lambda *_: None)
    if why == "pre-hook":
        module.register_forward_pre_hook(lambda *_: None)
    with (
        torch.set_grad_enabled(why == "gradients"),
        torch.device("meta" if why == "meta" else "cpu"),
    ):
        _, where = run(x.to("meta") if why == "meta" else x, 0, module, len(x))
    assert where == [(0, len(x))]

"""Requests to tiny models, for the tests of flux.parity."""

from dataclasses import replace

from flux.parity.capture import Request
from flux.parity.compare import Row

SMALL = Request("a photo of a cat", width=96, height=64, steps=2, seed=5)
KLEIN = "flux.2-klein-base-4b"
REQUESTS = {  # one model of each family, with two passes a step
    "flux.1-dev": replace(SMALL, guidance=2.0, true_cfg_scale=2.5, negative_prompt="a dog"),
    KLEIN: replace(SMALL, guidance=3.0),
}


def differing(rows: list[Row]) -> list[str]:
    """Return the names of the tensors that are not equal to the bit."""
    return [
        row.name for row in rows if row.errors is None or row.errors.max_abs or row.errors.misplaced
    ]

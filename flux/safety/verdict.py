"""What a filter says of a prompt or an image."""

from typing import NamedTuple


class Verdict(NamedTuple):
    """A score of one filter, and from which score on the filter refuses."""

    filter: str
    score: float
    threshold: float

    @property
    def refused(self) -> bool:
        return not self.score < self.threshold  # refuses NaN, too

    def __str__(self) -> str:
        return f"{self.filter} {self.score:.3f} (refused from {self.threshold:g} on)"

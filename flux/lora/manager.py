"""The LoRAs of a pipeline: which files, at which scales; merged into its networks anew whenever that changes."""

from collections.abc import Callable, Sequence
from functools import partial as bound
from pathlib import Path

from torch import nn

from flux.configs import MODELS, ModelSpec
from flux.errors import UserError
from flux.runtime.lazy_module import LazyModule


class LoraManager:
    """`files`: path -> its patches, as `flux.lora.formats` makes them, and their scale, in the order in which they came.

    `own`: the files that the model's row of the table brings, which are always there. `networks`: those that a LoRA may change,
    by the names that `flux.lora.formats` has for them. `changed` is called whenever they have changed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        own: Sequence[Path],
        networks: dict[str, LazyModule],
        changed: Callable[[], None],
    ):
        self.spec, self.networks, self.changed, self.own = (
            spec,
            networks,
            changed,
            {path.resolve() for path in own},
        )
        part = {"transformer": networks["transformer"]}
        self.files: dict[Path, tuple[list, float]] = {
            path: (_read(path, part), spec.addon.scale) for path in self.own
        }
        self._merge()

    def add(self, path: Path, scale: float, partial: bool) -> None:
        path = _resolved(path)
        if path in self.own:
            return self.set_scale(path, scale)
        if path in self.files:
            raise UserError(
                f"{path} is loaded already: give it once, or change its scale with set_lora_scale"
            )
        patches = _read(path, self.networks, partial)
        self._check(path, patches, scale)
        self.files[path] = patches, scale
        self._merge()

    def set_scale(self, path: Path, scale: float) -> None:
        path = _resolved(path)
        if path not in self.files:
            raise UserError(
                f"{path} is not loaded; loaded are: {', '.join(map(str, self.files)) or 'none'}"
            )
        self._check(path, (), scale)
        self.files[path] = self.files[path][0], scale
        self._merge()

    def remove_all(self) -> None:
        """But the model's own."""
        self.files = {path: lora for path, lora in self.files.items() if path in self.own}
        self._merge()

    def _check(self, path: Path, patches: Sequence, scale: float) -> None:
        """UserError for a LoRA that could be merged, but not make sense."""
        if not abs(scale) < 2**63:
            raise UserError(f"--lora {path}:{scale}: the scale must be a finite number")
        spec, c = self.spec, self.spec.transformer
        control = 2 * c.out_channels if spec.control and spec.addon else c.in_channels
        widths = {
            patch.columns
            for patch in patches
            if patch.place.part == "transformer" and patch.place.path == "img_in"
        }
        if strange := widths - {c.out_channels, c.in_channels, control}:
            able = ", ".join(s.name for s in MODELS.values() if s.control and s.addon)
            raise UserError(
                f"{path} is for an input of {max(strange)} channels, which {spec.name} does not have; if it is a "
                f"control LoRA, use {able}"
            )
        replaced = {patch.place for patch in patches if "value" in patch.factors}
        for other, (known, _) in self.files.items():
            if any(patch.place in replaced and "value" in patch.factors for patch in known):
                raise UserError(
                    f"{path} and {other} replace the same weights, so they cannot be used together: leave one out"
                )

    def _merge(self) -> None:
        """From the weights as they are in the files, so that they are rounded once."""
        for part, network in self.networks.items():
            patches = [
                (p, scale)
                for patches, scale in self.files.values()
                for p in patches
                if p.place.part == part
            ]
            paths = {patch.place.path for patch, _ in patches}
            network.set_transform(bound(_merge_into, patches=patches) if patches else None, paths)
        self.changed()


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # links that lead in a circle, before Python 3.13
        raise UserError(f"{path} does not exist: {error}.") from error


def _read(path: Path, networks: dict[str, LazyModule], partial: bool = False) -> list:
    """Its patches of these networks."""
    from flux.lora.formats import (
        place,
        read,
    )  # not above: a picture without LoRAs need not wait for it

    return place(
        read(path), {part: network.meta_module() for part, network in networks.items()}, partial
    )


def _merge_into(module: nn.Module, patches: list, **options) -> None:
    from flux.lora.formats import merge

    merge(module, patches, **options)

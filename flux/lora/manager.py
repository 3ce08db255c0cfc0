"""The LoRAs of a pipeline, merged into its networks again whenever they change."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from flux.configs import MODELS, ModelSpec
from flux.errors import UserError
from flux.runtime.lazy_module import LazyModule
from flux.transformer3 import Flux3Config
from flux.weights.mapping import FileState, file_states, require_unchanged

if TYPE_CHECKING:  # a run without LoRAs does not import the rest of flux.lora
    from flux.lora.merge import LayerDelta


class LoraManager:
    """The set of LoRA files that are merged now.

    `builtin`: the files of the model's row in flux.MODELS, which are always merged. `networks`:
    "transformer" and, if loaded, "clip" and "t5", or "language_model". `changed` is called after
    every change.
    """

    def __init__(
        self,
        spec: ModelSpec,
        builtin: Sequence[Path],
        networks: dict[str, LazyModule],
        changed: Callable[[], None],
    ):
        self.spec, self.networks, self.changed = spec, networks, changed
        self.builtin = {path.resolve() for path in builtin}
        # path -> its deltas and scale, in the order of loading
        self.files: dict[Path, tuple[list[LayerDelta], float]] = {}
        self.lenient: set[Path] = set()  # those loaded without `strict`
        self.states = file_states(self.builtin)  # of the files, whose factors stay mapped
        transformer = {"transformer": networks["transformer"]}
        for path in self.builtin:
            assert spec.addon is not None
            self.files[path] = _read_deltas(path, transformer), spec.addon.scale
        self._merge()

    def add(self, path: Path, scale: float = 1.0, *, strict: bool = True) -> None:
        """Merge a file too. A built-in file only gets another scale."""
        key = _resolved(path)
        if key in self.builtin:
            self.set_scale(path, scale)
            return
        if key in self.files:
            raise UserError(
                f"{path} is loaded already: give it once, or change its scale with set_lora_scale"
            )
        check_scale(path, scale)
        deltas = _read_deltas(path, self.networks, strict)  # as named: a link has its own folder
        check_columns(self.spec, path, deltas)
        self._check_replacements(path, deltas)
        self.files[key] = deltas, scale
        if not strict:
            self.lenient.add(key)
        self.states |= file_states({delta.source for delta in deltas})
        self._merge()

    def set_scale(self, path: Path, scale: float) -> None:
        """Merge a loaded file at another scale."""
        key = _resolved(path)
        if key not in self.files:
            loaded = ", ".join(map(str, self.files)) or "none"
            raise UserError(f"{path} is not loaded; loaded are: {loaded}")
        check_scale(path, scale)
        self.files[key] = self.files[key][0], scale
        self._merge()

    def remove_all(self) -> None:
        """Undo all merges but the built-in ones."""
        self.files = {path: lora for path, lora in self.files.items() if path in self.builtin}
        self._merge()

    def _check_replacements(self, path: Path, deltas: Sequence["LayerDelta"]) -> None:
        """Refuse two files that replace the same weights."""
        replaced = {delta.target for delta in deltas if "value" in delta.factors}
        for other, (loaded, _) in self.files.items():
            for delta in loaded:
                if "value" in delta.factors and delta.target in replaced:
                    raise UserError(
                        f"{path} and {other} replace the same weights, so they cannot be used "
                        "together: leave one out"
                    )

    def _merge(self) -> None:
        """Merge all files into the weights as loaded, rounding each sum once."""
        for part, network in self.networks.items():
            deltas = []
            for file_deltas, scale in self.files.values():
                deltas += [(delta, scale) for delta in file_deltas if delta.target.part == part]
            paths = {delta.target.path for delta, _ in deltas}
            merge = partial(_merge_into, deltas=deltas, states=self.states) if deltas else None
            network.set_transform(merge, paths)
        self.changed()


def check_columns(spec: ModelSpec, path: Path, deltas: Sequence["LayerDelta"]) -> None:
    """Refuse a control LoRA for a model without a control image, which could be merged."""
    config = spec.transformer
    if isinstance(config, Flux3Config):  # which has no control image
        return
    allowed = {config.out_channels, config.in_channels}
    if spec.control and spec.addon:
        allowed.add(2 * config.out_channels)
    for delta in deltas:
        if delta.target[:2] == ("transformer", "img_in") and delta.columns not in allowed:
            able = [s.name for s in MODELS.values() if s.control and s.addon]
            raise UserError(
                f"{path} is for an input of {delta.columns} channels, which {spec.name} "
                f"does not have; if it is a control LoRA, use {', '.join(able)}"
            )


def check_files(loras: Sequence[tuple[Path, float]]) -> None:
    """Check a request's LoRA files and scales. It needs no model, which may be a download."""
    from flux.lora.formats import read_lora

    paths = [path for path, _ in loras]
    for path, scale in loras:
        read_lora(path)
        check_scale(path, scale)
        if paths.count(path) > 1:
            raise UserError(f"loras: {path} is given twice. Give it once, with the summed scale.")


def check_scale(path: Path, scale: float) -> None:
    if not abs(scale) < 2**63:  # also if it is NaN
        raise UserError(f"scale: must be a finite number (got {scale} for {path}).")


def _resolved(path: Path) -> Path:
    """Return where a file is, behind all links; of a PEFT folder, its adapter."""
    from flux.lora.peft_config import adapter_file

    try:
        return adapter_file(path).resolve()
    except RuntimeError as error:  # links in a circle, before Python 3.13
        raise UserError(f"{path} does not exist: {error}.") from error


def _read_deltas(
    path: Path, networks: dict[str, LazyModule], strict: bool = True
) -> list["LayerDelta"]:
    from flux.lora.formats import match_layers, read_lora

    modules = {part: network.meta_module() for part, network in networks.items()}
    return match_layers(read_lora(path), modules, strict)


def _merge_into(
    module: nn.Module, deltas: list, states: Mapping[Path, FileState], **options
) -> None:
    from flux.lora.merge import merge

    used = {delta.source for delta, _ in deltas}
    require_unchanged({path: s for path, s in states.items() if path in used}, mapped=True)
    merge(module, deltas, **options)

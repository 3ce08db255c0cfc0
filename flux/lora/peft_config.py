"""The configuration of an adapter: PEFT's adapter_config.json, or diffusers' metadata in the file.

PEFT reads `adapter_config.json` for the `adapter_model.safetensors` in the same folder, and for no
other file. Every field that changes the result is honoured, or refused by its name. Fields that
only change the training are ignored. Unknown ones are ignored with a warning, as in PEFT.
"""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux.errors import UserError
from flux.plain_files import MAX_JSON, parse_json, read_plain_file

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' table, with the name of a part before each field
PARTS = {"transformer": "transformer.", "clip": "text_encoder.", "t5": "text_encoder_2."}
TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT")
PLAIN_STARTS = (
    "gaussian",
    "eva",
    "orthogonal",
    "lycoris",
    "mica",
)  # which leave the base weights alone
REFUSED = (  # fields of other methods, and of weights beside the factors
    *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    *("monteclora_config", "coft", "layers_pattern"),
)
READ = frozenset(  # honoured, or compared with the file
    (
        *("lora_alpha", "alpha", "alpha_pattern", "use_rslora", "r", "rank_pattern", "use_dora"),
        *("use_cayley_neumann", "num_cayley_neumann_terms", "lora_bias", "target_modules"),
        *("exclude_modules", "layers_to_transform", "peft_type", "bias", "init_lora_weights"),
    )
)
IGNORED = frozenset(  # names, what only the training reads, and what the tensors' shapes show
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "fan_in_fan_out", "lora_dropout", "rank_dropout", "module_dropout"),
        *("rank_dropout_scale", "boft_dropout", "init_weights", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "velora_config", "runtime_config", "eps"),
        *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
        *("use_effective_conv2d", "decompose_both", "decompose_factor", "block_share"),
        *("oft_block_size", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
        *("enable_lora", "merge_weights"),  # of PEFT's first versions
    )
)
MAX_NAME = 200  # characters, of a layer or a pattern
MAX_REPEATS = 3  # in a pattern: more could take forever


@dataclass(frozen=True)
class PeftConfig:
    """The fields for one part of a model. Empty if the file has no configuration."""

    source: str = ""  # for messages
    fields: Mapping[str, Any] = field(default_factory=dict)

    def part(self, part: str) -> "PeftConfig":
        """Return the fields for "transformer", "clip", "t5" or "language_model"."""
        prefix = PARTS.get(part, "text_encoder.")
        fields = {name.removeprefix(prefix): value for name, value in self.fields.items()}
        return PeftConfig(self.source, fields)

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.source}: {problem}.")

    def number(self, name: str, layer: str) -> tuple[float | None, str]:
        """Return a number for this layer, and the field that states it; None if none does.

        `name`: "r", or "alpha", which only LoRA calls "lora_alpha".
        """
        field = "lora_alpha" if name == "alpha" and "lora_alpha" in self.fields else name
        if len(layer) > MAX_NAME:
            raise self.error(f"the name {layer!r:.120} is too long")
        stated, value = field in self.fields, self.fields.get(field)
        patterns = {"r": "rank_pattern", "alpha": "alpha_pattern"}[name]
        for pattern, other in (self.fields.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                field, value, stated = patterns, other, True
                break
        if not stated:
            return None, field
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{field} of {layer} is no number ({value!r:.80})")
        if not abs(value) <= sys.float_info.max:
            raise self.error(f"{field} of {layer} is no finite number ({value!s:.80})")
        return value, field

    def require_rank(self, layer: str, ranks: set[int]) -> None:
        """UserError unless the file's ranks are those of the configuration."""
        r, field = self.number("r", layer)
        if r is not None and ranks - {r}:
            raise self.error(
                f"{field} of {layer} is {r:g}, but the file's factors have the rank "
                f"{max(ranks - {r})}. The configuration belongs to another file"
            )

    def require_target(self, layer: str) -> None:
        """UserError if the configuration does not name this layer, which PEFT would leave out."""
        if self.fields and not self.source.endswith(METADATA) and not self._is_target(layer):
            raise self.error(
                f"target_modules, exclude_modules or layers_to_transform leave out {layer}, which "
                "the file changes"
            )

    def _is_target(self, layer: str) -> bool:
        targets, excluded, numbers = (
            self.fields.get(name)
            for name in ("target_modules", "exclude_modules", "layers_to_transform")
        )
        if excluded and _names_layer(excluded, layer):
            return False
        if not targets or targets == "all-linear" or layer in targets:
            return True
        if isinstance(targets, str):
            return not _is_quick(targets) or _names_layer(targets, layer)
        if not _names_layer(targets, layer):
            return False
        if numbers is None or numbers == []:
            return True
        found = re.match(r".*?\.[^.]*\.(\d{1,9})\.", layer)
        return bool(
            found and int(found[1]) in (numbers if isinstance(numbers, list) else [numbers])
        )

    def require_role(self, layer: str, roles: Mapping[str, Any]) -> None:
        """UserError if a field contradicts what the file holds of a LoRA's layer."""
        if "down" not in roles:
            return
        use_dora, lora_bias = self.fields.get("use_dora"), self.fields.get("lora_bias")
        if use_dora is not None and bool(use_dora) != ("magnitude" in roles):
            has = "has" if "magnitude" in roles else "lacks"
            raise self.error(
                f"use_dora is {use_dora!r:.60}, but the file {has} a magnitude of {layer}"
            )
        if lora_bias is False and "up_bias" in roles:
            raise self.error(f"lora_bias is False, but the file has a bias of {layer}")

    def scaling(self, layer: str, rank: int | None) -> float | None:
        """Return alpha/rank, or alpha/sqrt(rank) with use_rslora; None if alpha is not stated.

        `rank`: of the file's factors; None if they are full matrices, which PEFT's LoKr scales too.
        """
        alpha, _ = self.number("alpha", layer)
        r: float | None = rank
        if rank is None and self.fields.get("peft_type") == "LOKR":
            r, _ = self.number("r", layer)
        if alpha is None or not r:
            return None
        return alpha / (r**0.5 if self.fields.get("use_rslora") else r)

    @property
    def neumann_terms(self) -> int | None:
        """Terms of PEFT's series for an OFT's rotation, 0 for the exact one; None if not stated."""
        if self.fields.get("use_cayley_neumann") is False:
            return 0
        terms = self.fields.get("num_cayley_neumann_terms")
        if terms is None or type(terms) is int and 0 < terms < 100:
            return terms
        raise self.error(f"num_cayley_neumann_terms is no small number ({terms!r:.80})")


def peft_name(layer: str) -> str:
    """Return the name by which a configuration calls a layer that a file calls `layer`."""
    return re.sub(r"^(?:base_model\.model|transformer|text_encoder(?:_2)?)\.", "", layer)


def adapter_file(path: Path) -> Path:
    """Return the file of a PEFT folder; other paths stay."""
    inside = Path(path) / FILE
    return inside if inside.is_file() else Path(path)


def config_file(path: Path) -> Path | None:
    """Return the configuration that belongs to a LoRA file, which is as the user named it."""
    config = path.with_name(CONFIG)
    if path.name != FILE or not (config.exists() or config.is_symlink()):
        return None
    return config


def read_config(path: Path, metadata: Mapping[str, str]) -> PeftConfig:
    """Return the configuration of the LoRA file `path`, which is as the user named it.

    The file may be a link: its configuration is beside the link, as in the Hugging Face cache.
    UserError if the configuration is damaged or asks for what is not supported.
    """
    text: str | bytes
    if METADATA in metadata:
        text, source = metadata[METADATA], f"{path}: {METADATA}"
    elif path.name != FILE:
        return PeftConfig()
    elif sidecar := config_file(path):
        text = read_plain_file(sidecar, MAX_JSON, f"the configuration of {path}")
        source = str(sidecar)
    else:
        warnings.warn(
            f"{path}: has no {CONFIG} next to it, so its scale is taken to be alpha = r",
            stacklevel=2,
        )
        return PeftConfig()
    try:
        fields = parse_json(text)
        if not isinstance(fields, dict):
            raise ValueError("not a table")
        for problem in _damage(fields):
            raise ValueError(problem)
    except ValueError as error:
        raise UserError(f"{source}: is damaged ({error!s:.120}). Download it again.") from error
    for problem in _unsupported(fields):
        raise UserError(f"{source}: {problem}.")
    known = READ | IGNORED | set(REFUSED)
    if unknown := [name for name, value in _plain_fields(fields) if value and name not in known]:
        warnings.warn(
            f"{source}: has fields of another version of PEFT, which are ignored: "
            f"{', '.join(unknown)!s:.200}",
            stacklevel=2,
        )
    return PeftConfig(source, fields)


def _plain_fields(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields without the name of a part before them."""
    for name, value in fields.items():
        yield re.sub(r"^(?:transformer|text_encoder(?:_2)?)\.", "", name), value


def _damage(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in _plain_fields(fields):
        if name in ("alpha_pattern", "rank_pattern"):
            if not isinstance(value or {}, dict):
                yield f"{name} is not a table"
            for pattern in value or {}:
                if not _compiles(pattern):
                    yield f"{name} has {pattern!r:.60}, which is no regular expression"
        elif name in ("target_modules", "exclude_modules") and value is not None:
            names = value if isinstance(value, list) else [value]
            if not all(isinstance(target, str) for target in names):
                yield f"{name} is no list of names"
            elif isinstance(value, str) and not _compiles(value):
                yield f"{name} is {value!r:.60}, which is no regular expression"


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _unsupported(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in _plain_fields(fields):
        if name == "peft_type" and value not in (None, *TYPES):
            yield f"peft_type is {value!r:.60}, expected {' or '.join(TYPES)}"
        elif name == "bias" and value not in (None, "none"):
            yield f"bias is {value!r:.60}: biases that were trained with it are not supported"
        elif name == "init_lora_weights" and not _leaves_weights(value):
            yield (
                f"init_lora_weights is {value!r:.60}, which changes the base weights before the "
                "training. Convert the adapter to a plain LoRA: save it with PEFT's "
                "save_pretrained(path_initial_model_for_weight_conversion=...)"
            )
        elif name in REFUSED and value:
            yield f"{name} is set ({value!s:.60}), which is not supported"
        elif name in ("alpha_pattern", "rank_pattern"):
            for pattern in value or {}:
                if not _is_quick(pattern):
                    yield f"{name} has {pattern!r:.60}, a regular expression that is not supported"
        elif name == "exclude_modules" and isinstance(value, str) and not _is_quick(value):
            yield f"{name} is {value!r:.60}, a regular expression that is not supported"


def _names_layer(modules: str | list[str], layer: str) -> bool:
    """Return whether a regular expression, or a list of names or ends of names, has this layer."""
    if isinstance(modules, str):
        return bool(re.fullmatch(modules, layer))
    return any(layer == name or layer.endswith(f".{name}") for name in modules)


def _leaves_weights(init: Any) -> bool:
    """Return whether PEFT leaves the base weights as they are when it starts a LoRA like this."""
    return init in (None, True, False) or str(init).lower() in PLAIN_STARTS


def _is_quick(pattern: str) -> bool:
    """Return whether matching takes no long time: few repetitions and groups, none nested."""
    repeats, groups = len(re.findall(r"[*+{?]", pattern)), pattern.count("(")
    nested = re.search(r"\)[*+{?]|\(\?|\\\d", pattern)
    return len(pattern) <= MAX_NAME and repeats <= MAX_REPEATS and groups <= 2 and not nested

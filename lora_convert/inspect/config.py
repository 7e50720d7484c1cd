"""Scales that are kept beside the tensors: peft's `adapter_config.json` and diffusers' `lora_adapter_metadata`.

Both hold the fields of peft's LoraConfig. Patterns in them are regular expressions to peft; a stranger's expressions
are never run here: what is not a plain module name, anchored or not, is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_convert.containers.source import open_path
from lora_convert.errors import FileError
from lora_convert.families import Module
from lora_convert.report import Finding, shown

__all__ = ["COMPONENTS", "AdapterConfig", "find_config", "from_metadata", "parse_config"]

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_PLAIN = re.compile(r"[\w.\-]+")
_MOST_BYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of a LoraConfig, LoHaConfig or LoKrConfig that decides the scale: alpha/r, or alpha/√r with rs-LoRA."""

    alpha: float
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    dora: bool = False
    rank: int = 8
    rank_pattern: Mapping[str, float] = field(default_factory=dict)

    def alpha_of(self, module: Module) -> float:
        """The alpha of a module: the first pattern that names it, else the general one (peft's rule)."""
        return _named(self.alpha_pattern, module, self.alpha)

    def rank_of(self, module: Module) -> int:
        """The rank that peft divides by where the tensors show none: two whole factors of a LoKr."""
        return int(_named(self.rank_pattern, module, self.rank))

    def scale_of(self, alpha: float, rank: int) -> float:
        """The factor of B·A."""
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _named(patterns: Mapping[str, float], module: Module, general: float) -> float:
    names = {module.path, module.path.removeprefix("text_model.")}
    return next((value for pattern, value in patterns.items() if any(_names(pattern, name) for name in names)), general)


def _names(pattern: str, name: str) -> bool:
    """Whether a plain pattern names a module: peft matches `(.*\\.)?(pattern)$`."""
    anchored = pattern.startswith("^")
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return name == plain or (not anchored and name.endswith(f".{plain}"))


def _refuse(subject: str, message: str) -> FileError:
    return FileError([Finding("unreadable-config", "error", subject, message)])


def _number(subject: str, value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refuse(subject, f"{name} is {shown(json.dumps(value))}, not a number.")
    return float(value)


def _patterns(subject: str, fields: Mapping[str, Any], key: str) -> Mapping[str, float]:
    patterns = fields.get(key) or {}
    if not isinstance(patterns, dict):
        raise _refuse(subject, f"{key} is not an object.")
    for pattern in patterns:
        if not _PLAIN.fullmatch(pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")):
            raise _refuse(subject, f"{key} has {shown(pattern)!r}, which is more than a module name.")
    return {pattern: _number(subject, value, f"{key}[{pattern}]") for pattern, value in patterns.items()}


def _from_fields(subject: str, fields: Mapping[str, Any]) -> AdapterConfig:
    alpha = fields.get("lora_alpha", fields.get("alpha", 8))  # 8 is peft's default
    is_lokr = fields.get("peft_type") == "LOKR"  # of the others every tensor shows its rank
    return AdapterConfig(
        _number(subject, alpha, "lora_alpha"),
        _patterns(subject, fields, "alpha_pattern"),
        fields.get("use_rslora") is True,
        fields.get("use_dora") is True,
        int(_number(subject, fields.get("r", 8), "r")) if is_lokr else 8,
        _patterns(subject, fields, "rank_pattern") if is_lokr else {},
    )


def _parse_object(subject: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refuse(subject, f"It is not valid JSON: {shown(str(error))}.") from None
    if not isinstance(content, dict):
        raise _refuse(subject, "It is not a JSON object.")
    return content


def from_metadata(metadata: Mapping[str, str]) -> Mapping[str, AdapterConfig]:
    """Configurations by component from a header's `lora_adapter_metadata`; empty if it has none.

    Raises FileError (`unreadable-config`) if it is there but cannot be used.
    """
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    content = _parse_object("lora_adapter_metadata", text)
    if "lora_alpha" in content or "r" in content:  # diffusers' `model.save_lora_adapter` names no component
        return dict.fromkeys(COMPONENTS, _from_fields("lora_adapter_metadata", content))
    parts: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, _, name = key.partition(".")
        if component in COMPONENTS:
            parts.setdefault(component, {})[name] = value
    return {component: _from_fields("lora_adapter_metadata", fields) for component, fields in parts.items()}


def parse_config(path: str | Path) -> AdapterConfig:
    """Read a peft `adapter_config.json`. Raises FileError (`unreadable-config`) if it cannot be used."""
    path = Path(path)
    try:
        with open_path(path) as file:
            data = file.read(_MOST_BYTES + 1)
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refuse(str(path), f"It cannot be read: {shown(str(error))}.") from None
    except FileError as error:
        raise _refuse(str(path), error.findings[0].message) from None
    if len(data) > _MOST_BYTES:
        raise _refuse(str(path), f"It is larger than {_MOST_BYTES:,} bytes.")
    return _from_fields(str(path), _parse_object(str(path), text))


def find_config(path: Path) -> Path | None:
    """The configuration that lies beside a peft file: `<stem>.adapter_config.json`, else `adapter_config.json`."""
    for candidate in (path.with_name(f"{path.stem}.adapter_config.json"), path.with_name("adapter_config.json")):
        if candidate.is_file():
            return candidate
    return None

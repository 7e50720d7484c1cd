"""What a file was found to be: the result of inspecting it, and its JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from lora_convert.families import Module
from lora_convert.report import SCHEMA, Finding, json_number, severest

__all__ = ["AdaptedModule", "Detection", "Embedding", "Rival", "Vectors", "example_of"]


_SCALARS = ("alpha", "scalar", "on_input")
"""Fields that hold one number each."""


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """What the file changes at one place of the base model.

    `modules` are the targets: one, or the row blocks of a fused original, in row order. `tensors` maps the algorithm's
    field names to tensor names. `scale` is the factor of up·down that applies; None where alphas were not read.
    """

    modules: tuple[Module, ...]
    algorithm: str
    tensors: Mapping[str, str]
    spelling: str
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = 1.0

    @property
    def values(self) -> Mapping[str, str]:
        """Its `tensors` without the scalars: those that hold weights, and can be rounded."""
        return {part: name for part, name in self.tensors.items() if part not in _SCALARS}


def example_of(tensors: Mapping[str, str]) -> str:
    """The name of one of a module's tensors, by which to speak of it: a matrix if there is one."""
    return tensors[min(tensors, key=_SCALARS.__contains__)]


@dataclass(frozen=True, slots=True)
class Vectors:
    """A tensor that holds `count` vectors of one text encoder, each `width` wide, stored as (count, width) or (width,).

    `norms` are their L2 norms, in float64; None if they were not read.
    """

    tensor: str
    count: int
    width: int
    dtype: str
    norms: tuple[float, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        norms = None
        if self.norms:
            values = {"least": min(self.norms), "median": median(self.norms), "largest": max(self.norms)}
            norms = {name: json_number(value) for name, value in values.items()}
        return {
            "tensor": self.tensor,
            "vectors": self.count,
            "width": self.width,
            "dtype": self.dtype,
            "norms": norms,
        }


@dataclass(frozen=True, slots=True)
class Embedding:
    """A textual-inversion embedding: a token, and the vectors that stand for it in each text encoder.

    `vectors` are by the encoder's key (`clip_l`, `clip_h`, `clip_g`, `t5xxl`); row k of all encoders belongs together.
    `outputs` are OneTrainer's vectors that are put in behind the encoder, which no other program does. `stated` says
    that the file itself gives the token, else it is the file's name.
    """

    token: str
    vectors: Mapping[str, Vectors]
    outputs: Mapping[str, Vectors] = field(default_factory=dict)
    stated: bool = True

    def as_dict(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "stated": self.stated,
            "vectors": self.count,
            "encoders": {key: part.as_dict() for key, part in self.vectors.items()},
            "outputs": {key: part.as_dict() for key, part in self.outputs.items()},
        }

    @property
    def count(self) -> int:
        """Number of vectors."""
        return max((part.count for part in self.vectors.values()), default=0)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that belong to it."""
        return tuple(part.tensor for part in (*self.vectors.values(), *self.outputs.values()))


@dataclass(frozen=True, slots=True)
class Rival:
    """Another family that was considered, and why it was not chosen (or cannot be told apart)."""

    family: str
    modules: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {"family": self.family, "modules": self.modules, "reason": self.reason}


@dataclass(frozen=True)
class Detection:
    """What a file is, why, and what else it could be. `payload` holds the adapted modules of a LoRA-like file,
    `embeddings` those of an embedding file, or the ones that a LoRA carries with it.

    `kind` is `lora`, `embedding`, `ip-adapter`, `checkpoint`, `controlnet`, `vae`, … or `unknown`; `family` and
    `trainer` are None where the file does not tell.
    """

    file: str
    kind: str
    family: str | None = None
    trainer: str | None = None
    payload: tuple[AdaptedModule, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    evidence: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    unexplained: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    tensors: int = 0
    bytes: int = 0
    dtypes: Mapping[str, int] | None = None
    metadata: Mapping[str, str] | None = None
    trigger_words: tuple[str, ...] = ()
    training: Mapping[str, str] | None = None
    hashes: Mapping[str, str] | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no finding of severity error."""
        return severest(self.findings) != "error"

    @cached_property
    def algorithms(self) -> Mapping[str, int]:
        """Number of modules by algorithm."""
        return dict(Counter(module.algorithm for module in self.payload).most_common())

    @cached_property
    def spelling(self) -> str | None:
        """The spelling of most modules; `evidence` names the others."""
        counts = Counter(module.spelling for module in self.payload).most_common(1)
        return counts[0][0] if counts else None

    @cached_property
    def components(self) -> Mapping[str, int]:
        """Number of adapted modules by component, in pipeline order."""
        counts = Counter(target.component for module in self.payload for target in module.modules)
        return {name: counts[name] for name in ("unet", "text_encoder", "text_encoder_2") if name in counts}

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Number of modules by rank."""
        counts = Counter(module.rank for module in self.payload if module.rank is not None)
        return {str(rank): counts[rank] for rank in sorted(counts)}

    @cached_property
    def alphas(self) -> Mapping[str, int]:
        """Number of modules by alpha (as text: JSON has no NaN); `none` where the file gives none."""
        counts = Counter("none" if module.alpha is None else f"{module.alpha:g}" for module in self.payload)
        return dict(sorted(counts.items(), key=lambda item: _as_number(item[0])))

    def module_list(self) -> list[dict[str, Any]]:
        """One entry per adapted module: what `inspect --modules` lists."""
        return [
            {
                "modules": [target.name for target in module.modules],
                "algorithm": module.algorithm,
                "spelling": module.spelling,
                "rank": module.rank,
                "alpha": None if module.alpha is None else json_number(module.alpha),
                "scale": None if module.scale is None else json_number(module.scale),
                "tensors": list(module.tensors.values()),
            }
            for module in self.payload
        ]

    def as_dict(self) -> dict[str, Any]:
        """The content of `inspect --json`."""
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "file": self.file,
            "kind": self.kind,
            "family": self.family,
            "trainer": self.trainer,
            "spelling": self.spelling,
            "algorithms": dict(self.algorithms),
            "modules": len(self.payload),
            "components": dict(self.components),
            "ranks": dict(self.ranks),
            "alphas": dict(self.alphas),
            "embeddings": [embedding.as_dict() for embedding in self.embeddings],
            "dtypes": dict(self.dtypes or {}),
            "tensors": self.tensors,
            "bytes": self.bytes,
            "trigger_words": list(self.trigger_words),
            "training": dict(self.training or {}),
            "evidence": list(self.evidence),
            "rivals": [rival.as_dict() for rival in self.rivals],
            "unexplained": list(self.unexplained),
            "metadata": dict(self.metadata or {}),
            "findings": [finding.as_dict() for finding in self.findings],
        }
        if self.hashes is not None:
            content["hashes"] = dict(self.hashes)
        return content


def _as_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return -math.inf
    return math.inf if math.isnan(value) else value

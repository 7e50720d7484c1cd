"""What a picture should look like: the source's ΔW, by its trainer's definition, added to the base model's weights.

Nothing here reads what our converters wrote, or asks a loader: it is the other half of the comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lora_convert.containers import Source
from lora_convert.converters.adapters import read_adapter
from lora_convert.errors import UsageError
from lora_convert.families import FAMILIES
from lora_convert.inspect.detection import AdaptedModule, Detection
from lora_convert.runtime.architectures import weight_modules

__all__ = ["UNIT_ROUNDOFF", "live_modules", "merged", "roundoff_of"]

UNIT_ROUNDOFF: Mapping[str, float] = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24, "F64": 2.0**-24}
"""Largest relative error of one rounding, by dtype as safetensors names it."""


def roundoff_of(dtype: torch.dtype) -> float:
    """Unit roundoff of a pipeline's dtype."""
    return torch.finfo(dtype).eps / 2


@contextmanager
def merged(
    pipeline: Any, source: Source, found: Detection, scale: float = 1.0, *, disturbance: float = 0.0, seed: int = 0
) -> Iterator[Any]:
    """The pipeline with `scale` · ΔW of every module of `source` added to its weights, for the length of a block.

    `found` is what `detect` says of the source. ΔW is formed as a dense matrix in float64 and added in float32 before
    it is rounded to the pipeline's dtype once. Afterwards the weights are those from before, bit for bit. With a
    `disturbance` every ΔW gets noise of that relative Frobenius norm, and every weight noise of its own dtype's unit
    roundoff: how far such noise moves a picture is what no comparison can see below. Raises UsageError for a pipeline
    of another family, or one that has adapters.
    """
    live = live_modules(pipeline, found)
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for module in found.payload:
                for name, delta in _deltas(source, module).items():
                    weight: torch.Tensor = live[name].get_parameter("weight")
                    saved.append((weight, weight.detach().clone()))
                    weight.copy_(_changed(weight, delta * scale, disturbance, generator))
        yield pipeline
    finally:
        with torch.no_grad():
            for weight, before in reversed(saved):
                weight.copy_(before)


def live_modules(pipeline: Any, found: Detection) -> Mapping[str, torch.nn.Module]:
    """The pipeline's modules by pipeline name (`unet.conv_in`)."""
    if found.family is None:
        raise UsageError(f"{found.file} has no known family, so that there is nothing to add to a base model")
    live: dict[str, torch.nn.Module] = {}
    for component in FAMILIES[found.family].components:
        model = getattr(pipeline, component.name, None)
        if model is None:
            raise UsageError(f"the base model has no {component.name}, which {found.family} has")
        if getattr(model, "peft_config", None):
            raise UsageError("the pipeline has adapters; remove them before a reference is made")
        live |= {f"{component.name}.{path}": module for path, module in weight_modules(model).items()}
    return live


def _deltas(source: Source, module: AdaptedModule) -> Mapping[str, torch.Tensor]:
    """ΔW by target, each of its weight's shape, float64: a fused module's rows belong to several."""
    whole = torch.from_numpy(read_adapter(source, module).deltas()["weight"])
    deltas, row = {}, 0
    for target in module.modules:
        deltas[target.name] = whole[row : row + target.shape[0]]
        row += target.shape[0]
    return deltas


def _changed(weight: torch.Tensor, delta: torch.Tensor, disturbance: float, generator: torch.Generator) -> torch.Tensor:
    """W + ΔW in float32."""
    result = weight.float() + delta.to(weight.device, torch.float32).reshape(weight.shape)
    if disturbance:
        roundoff = roundoff_of(weight.dtype)
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        norm = (disturbance * delta.norm().item()) ** 2 + (roundoff * result.norm().item()) ** 2
        result += noise * (norm / max(weight.numel(), 1)) ** 0.5
    return result

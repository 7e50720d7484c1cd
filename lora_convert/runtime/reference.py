"""What a picture should look like: the source's ΔW, by its trainer's definition, added to the base model's weights.

Nothing here reads what our converters wrote, or asks a loader: it is the other half of the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_convert.containers import Source
from lora_convert.converters.adapters import read_adapter
from lora_convert.errors import UsageError
from lora_convert.families import FAMILIES
from lora_convert.inspect.detection import AdaptedModule, Detection
from lora_convert.runtime.architectures import weight_modules

__all__ = ["UNIT_ROUNDOFF", "base_of", "live_modules", "merged", "roundoff_of"]

Array = NDArray[Any]

UNIT_ROUNDOFF: Mapping[str, float] = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24, "F64": 2.0**-24}
"""Largest relative error of one rounding, by dtype as safetensors names it."""


def roundoff_of(dtype: torch.dtype) -> float:
    """Unit roundoff of a pipeline's dtype."""
    return torch.finfo(dtype).eps / 2


@contextmanager
def merged(
    pipeline: Any,
    source: Source,
    found: Detection,
    scale: float = 1.0,
    *,
    disturbance: float = 0.0,
    roundoff: float = 0.0,
    seed: int = 0,
) -> Iterator[Any]:
    """The pipeline with `scale` times what `source` changes added to its weights and biases, for the length of a block.

    `found` is what `detect` says of the source. Every change is what the trainer defines for these very weights, at
    strength 1, formed as a dense array in float64 and added in float32 before it is rounded to the pipeline's dtype
    once. Afterwards the weights are those from before, bit for bit. With a `disturbance` every change gets noise of
    that relative Frobenius norm, and what it changes noise of its own dtype's unit roundoff, or of `roundoff` if that
    is larger: how far such noise moves a picture is what no comparison can see below. Raises UsageError for a pipeline
    of another family, one that has adapters, or one without a bias that the source changes.
    """
    live = live_modules(pipeline, found)
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for module in found.payload:
                for parameter, delta in _changes(source, module, live):
                    saved.append((parameter, parameter.detach().clone()))
                    changed = parameter.float() + delta.to(parameter.device, torch.float32) * scale
                    if disturbance:
                        rounding = max(roundoff, roundoff_of(parameter.dtype)) * float(changed.norm())
                        error = math.hypot(disturbance * float(delta.norm()), rounding)
                        changed += _noise(changed, error, generator)
                    parameter.copy_(changed)
        yield pipeline
    finally:
        with torch.no_grad():
            for parameter, before in reversed(saved):
                parameter.copy_(before)


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


def base_of(layers: Sequence[torch.nn.Module], shapes: Sequence[tuple[int, ...]]) -> Mapping[str, Array]:
    """What an adapter may have to know of the layers that it changes: `weight` and, where all have one, `bias`.

    float32, the weight in the shape that the family's table gives (a projection may be a 1×1 convolution there and a
    linear layer here), the rows of several layers one below the other.
    """
    weights = [_wide(layer.weight).reshape(shape) for layer, shape in zip(layers, shapes, strict=True)]
    base = {"weight": np.concatenate(weights)}
    biases = [bias for layer in layers if isinstance(bias := getattr(layer, "bias", None), torch.Tensor)]
    return base | ({"bias": np.concatenate([_wide(bias) for bias in biases])} if len(biases) == len(layers) else {})


def _wide(parameter: Any) -> Array:
    values: Array = parameter.detach().float().cpu().numpy()
    return values


def _changes(
    source: Source, module: AdaptedModule, live: Mapping[str, torch.nn.Module]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each live parameter that one adapted module changes, and its change, of its shape, float64.

    The rows of a fused module belong to several layers.
    """
    layers = [live[target.name] for target in module.modules]
    base = base_of(layers, [target.shape for target in module.modules])
    for part, whole in read_adapter(source, module).deltas(base).items():
        row = 0
        for target, layer in zip(module.modules, layers, strict=True):
            parameter = getattr(layer, part, None)
            if not isinstance(parameter, torch.Tensor):
                raise UsageError(f"the source changes a {part} of {target.name}, and the base model has none there")
            rows = torch.from_numpy(whole[row : row + target.shape[0]])
            row += target.shape[0]
            yield parameter, rows.reshape(parameter.shape)


def _noise(like: torch.Tensor, norm: float, generator: torch.Generator) -> torch.Tensor:
    """Noise of about this Frobenius norm, of a tensor's shape and on its device."""
    noise = torch.randn(like.shape, generator=generator).to(like.device)
    return noise * (norm / math.sqrt(max(like.numel(), 1)))

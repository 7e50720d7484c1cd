"""Load a canonical file as a user would, without a base model's weights, and read back what it changes."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

from lora_convert.converters.adapters import Adapter, Array, Dora, Lora
from lora_convert.converters.fidelity import relative_error
from lora_convert.errors import LoraConvertError
from lora_convert.families import FAMILIES
from lora_convert.report import Finding
from lora_convert.runtime.architectures import PIPELINES, build_component, canonical_prefix

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = [
    "LOADED_TOLERANCE",
    "LiveAdapters",
    "LoadedAdapter",
    "LoadingError",
    "adapted_layers",
    "adapters_of",
    "arrival_errors",
    "bare_components",
    "collected_warnings",
    "has_values",
    "held",
    "load_adapter",
    "load_weights",
    "lora_layers",
    "not_adapted",
    "not_loaded",
    "off_by",
    "what_arrived_wrong",
]

LOADED_TOLERANCE = 2e-6
"""Relative error of what was loaded: the loader multiplies in float32, and the scale is a quotient."""

_ADAPTER = "adapter"

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Of components whose tensors all have one half precision; any other mixture fits into float32."""


_NOT_OF_THE_FILE = (
    "No LoRA keys associated to",
    "Already found a `peft_config` attribute",
    "The new embeddings will be initialized",
)
"""How messages begin that are no news: a component that the file does not concern, a second adapter, rows of a table
before they are filled.
"""


class LoadingError(LoraConvertError):
    """The pipeline's own loader raised, or left a module without values; the message is its own where it has one."""


@dataclass(frozen=True)
class LoadedAdapter:
    """What the loader made of a file.

    `adapters` has what every module got that the loader adapted, by canonical name (`unet.conv_in`): factors, in a DoRA
    if it got a magnitude, float32, read anew at each look-up. `deltas` are the ΔW of those that are no DoRA, float32,
    of the base weight's shape. `warnings` are the loader's, in the order in which it gave them.
    """

    family: str
    adapters: Mapping[str, Lora | Dora]
    deltas: Mapping[str, torch.Tensor]
    warnings: tuple[str, ...]


class LiveAdapters(Mapping[str, Lora | Dora]):
    """What live layers hold for one adapter, by canonical name, float32, read anew at each look-up."""

    def __init__(self, layers: Mapping[str, LoraLayer], adapter: str) -> None:
        self._layers, self._adapter = layers, adapter

    def __getitem__(self, name: str) -> Lora | Dora:
        layer = self._layers[name]
        parts = {part: values.float().cpu() for part, values in held(layer, self._adapter).items()}
        arrays = {part: values.flatten(1).numpy() for part, values in parts.items() if part in ("down", "up")}
        scale = layer.scaling[self._adapter]
        bias = scale * parts["up_bias"].double().numpy() if "up_bias" in parts else None
        lora = Lora(**arrays, scale=scale, kernel=tuple(parts["down"].shape[2:]), bias=bias)
        return Dora(lora, parts["magnitude"].flatten().numpy()) if "magnitude" in parts else lora

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class _Deltas(Mapping[str, torch.Tensor]):
    def __init__(self, adapters: Mapping[str, Lora | Dora]) -> None:
        self._adapters = adapters

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._adapters[name].deltas()["weight"]).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)


def held(layer: LoraLayer, adapter: str) -> dict[str, torch.Tensor]:
    """What a live layer holds for one adapter, by field.

    `down` (r, in[, kh, kw]), `up` (out, r[, 1, 1]), and where it has them `up_bias` (out,) and `magnitude` (out,) or
    (1, out, 1, 1).
    """
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    parts = {"down": down.get_parameter("weight"), "up": up.get_parameter("weight")}
    if getattr(up, "bias", None) is not None:
        parts["up_bias"] = up.get_parameter("bias")
    if adapter in layer.lora_magnitude_vector:
        parts["magnitude"] = layer.lora_magnitude_vector[adapter].get_parameter("weight")
    return {part: values.detach() for part, values in parts.items()}


def adapters_of(layer: BaseTunerLayer) -> set[str]:
    """The names of the adapters that a live layer has values for, of whatever kind."""
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part)}


def adapted_layers(components: Mapping[str, torch.nn.Module], adapter: str) -> dict[str, BaseTunerLayer]:
    """The live layers that have an adapter of that name, of whatever kind, by canonical name (`unet.conv_in`)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {}
    for component, model in components.items():
        prefix = f"{component}.{canonical_prefix(model)}"
        for path, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer) and adapter in adapters_of(layer):
                layers[prefix + path] = layer
    return layers


def lora_layers(components: Mapping[str, torch.nn.Module], adapter: str) -> dict[str, LoraLayer]:
    """Those of them that hold a LoRA or a DoRA."""
    from peft.tuners.lora import LoraLayer

    found = adapted_layers(components, adapter)
    return {name: layer for name, layer in found.items() if isinstance(layer, LoraLayer) and adapter in layer.lora_A}


def has_values(layer: LoraLayer, adapter: str) -> bool:
    """Whether the loader gave the layer all values; what it has none for it leaves on the meta device."""
    return not any(part.is_meta for part in held(layer, adapter).values())


def arrival_errors(expected: Adapter, live: Lora | Dora) -> dict[str, float]:
    """Relative errors of what arrived: of the factors' `ΔW`, and where either has them the `magnitude` and the `bias`.

    Infinite where only one of the two has such a part, or where only the expected one is zero.
    """
    errors = {}
    if isinstance(expected, Dora) or isinstance(live, Dora):
        magnitudes = [part.magnitude if isinstance(part, Dora) else None for part in (expected, live)]
        errors["magnitude"] = _relative(*magnitudes)
    first, second = (part.inner.to_lora() if isinstance(part, Dora) else part.to_lora() for part in (expected, live))
    if first.bias is not None or second.bias is not None:
        errors["bias"] = _relative(first.bias, second.bias)
    return {"ΔW": relative_error(first, second), **errors}


def _relative(expected: Array | None, live: Array | None) -> float:
    if expected is None or live is None or expected.shape != live.shape:
        return math.inf
    difference = float(np.linalg.norm(live.astype(np.float64) - expected))
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return difference / norm if norm else math.inf if difference else 0.0


def what_arrived_wrong(module: str, errors: Mapping[str, float], live: Lora | Dora) -> Iterator[Finding]:
    """Findings of one module for its `arrival_errors`."""
    for what, error in errors.items():
        if not error <= LOADED_TOLERANCE:
            yield off_by(module, error, what)
    if isinstance(live, Dora) and (bias := live.inner.to_lora().bias) is not None and bias.any():
        yield not_loaded(module, "It has a magnitude and a bias, and peft's DoRA rescales the bias with the weight.")


def not_loaded(module: str, message: str) -> Finding:
    """The finding that a module is not in the model as it is in the file."""
    return Finding("module-not-loaded", "error", module, message)


def not_adapted(module: str) -> Finding:
    """The finding that the loader passed a module over."""
    return not_loaded(module, "It is in the file, but the loader did not adapt it.")


def off_by(module: str, error: float, what: str = "ΔW") -> Finding:
    """The finding that a part of a module arrived with a relative error above `LOADED_TOLERANCE`."""
    if math.isinf(error):
        return not_loaded(module, f"It arrived changed: the file has no {what}, or the loader gave it none.")
    return not_loaded(module, f"It arrived changed: its {what} is off by {error:.2e} of its norm.")


def load_weights(pipeline: Any, path: Path, adapter: str) -> None:
    """Load a canonical file by the pipeline's public loader, as the adapter of that name.

    Raises LoadingError, with the loader's own words, for whatever the loader raises.
    """
    try:
        pipeline.load_lora_weights(str(path), adapter_name=adapter, use_safetensors=True, local_files_only=True)
    except Exception as error:
        raise LoadingError(f"{type(error).__name__}: {error}") from error


def load_adapter(path: Path, family: str) -> LoadedAdapter:
    """Load a canonical Diffusers LoRA file into the family's architecture through its pipeline's public loader.

    No base weights are needed and none are allocated, so that this costs about the file's own size in memory; the
    magnitudes of a DoRA are read back, but what they do depends on those weights. Raises KeyError for an unknown
    family, LoadingError where the loader raises or gives an adapted module no values, OSError or safetensors'
    SafetensorError for a file that cannot be read.
    """
    dtypes = _component_dtypes(path)
    with collected_warnings() as messages:
        components = bare_components(family, dtypes)
        pipeline = _pipeline(family, components)
        messages.clear()  # what importing the libraries says is not about this file
        load_weights(pipeline, path, _ADAPTER)
    layers = lora_layers(components, _ADAPTER)
    for name, layer in layers.items():
        if not has_values(layer, _ADAPTER):
            raise LoadingError(f"{name}: the loader adapted it but gave it no values")
    adapters = LiveAdapters(layers, _ADAPTER)
    return LoadedAdapter(family, adapters, _Deltas(adapters), tuple(messages))


def bare_components(family: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.nn.Module]:
    """The family's components without weights of their own: adapters can be loaded onto those that have a dtype here.

    The others stay on the meta device. Raises KeyError for an unknown family.
    """
    components = {part.name: build_component(family, part.name) for part in FAMILIES[family].components}
    for name, model in components.items():
        if name in dtypes:
            _allocate_nothing(model, dtypes[name])
    return components


def _component_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The components that a file has tensors for, each with a dtype that holds all of its tensors exactly."""
    found: dict[str, set[str]] = {}
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        for name in names:
            found.setdefault(name.partition(".")[0], set()).add(file.get_slice(name).get_dtype())
    return {component: _DTYPES.get("+".join(dtypes), torch.float32) for component, dtypes in found.items()}


def _allocate_nothing(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Move a model from the meta device to the CPU in such a way that all values of a tensor share one zero.

    The loader casts an adapter to its model's dtype, and on the meta device it would lose the values.
    """
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            zero = torch.zeros((), dtype=dtype if tensor.is_floating_point() else tensor.dtype).expand(tensor.shape)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=False) if is_parameter else zero)


def _pipeline(family: str, components: Mapping[str, torch.nn.Module]) -> Any:
    """The family's real pipeline with these components and nothing else (no scheduler, tokenizer, VAE)."""
    import diffusers

    pipeline_class = getattr(diffusers, PIPELINES[family])
    parameters = inspect.signature(pipeline_class).parameters
    arguments: dict[str, Any] = {
        name: None for name in parameters if parameters[name].default is inspect.Parameter.empty
    }
    if "requires_safety_checker" in parameters:
        arguments["requires_safety_checker"] = False
    return pipeline_class(**arguments | dict(components))


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not message.startswith(_NOT_OF_THE_FILE):
            self.messages.append(message)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect what the libraries log and warn of, instead of printing it; no other thread should load meanwhile.

    Their progress bars are off meanwhile, too.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    messages: list[str] = []
    loggers = [
        logging.getLogger(name) for name in ("diffusers", "transformers", "peft", "accelerate", "huggingface_hub")
    ]
    saved = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [_Collector(messages)], False
    try:
        with _no_bars(diffusers_logging, transformers_logging), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            for category in (RuntimeWarning, UserWarning):
                warnings.simplefilter("always", category)
            yield messages
        said = (str(warning.message) for warning in caught)
        messages += [message for message in said if not message.startswith(_NOT_OF_THE_FILE)]
    finally:
        for logger, (handlers, propagate) in zip(loggers, saved, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


@contextmanager
def _no_bars(*libraries: Any) -> Iterator[None]:
    """The libraries' progress bars switched off, those that are on."""
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()

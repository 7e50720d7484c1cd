"""Load a canonical file as a user would, without a base model's weights, and read back what it changes."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from lora_convert.converters.adapters import Lora
from lora_convert.errors import LoraConvertError, Unrepresentable
from lora_convert.families import FAMILIES
from lora_convert.report import Finding
from lora_convert.runtime.architectures import PIPELINES, build_component, canonical_prefix

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

__all__ = [
    "LOADED_TOLERANCE",
    "LiveAdapters",
    "LoadedAdapter",
    "LoadingError",
    "adapted_layers",
    "collected_warnings",
    "factors",
    "has_values",
    "load_adapter",
    "load_weights",
    "not_adapted",
    "not_loaded",
    "off_by",
]

LOADED_TOLERANCE = 2e-6
"""Relative error of a loaded ΔW: the loader multiplies in float32, and the scale is a quotient."""

_ADAPTER = "adapter"

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Of components whose tensors all have one half precision; any other mixture fits into float32."""


class LoadingError(LoraConvertError):
    """The pipeline's own loader raised, or left a module without values; the message is its own where it has one."""


@dataclass(frozen=True)
class LoadedAdapter:
    """What the loader made of a file.

    `adapters` has the factors of every module that the loader adapted, by canonical name (`unet.conv_in`), float32,
    read anew at each look-up; `deltas` the same as ΔW, float32, of the base weight's shape. `warnings` are the
    loader's, in the order in which it gave them.
    """

    family: str
    adapters: Mapping[str, Lora]
    deltas: Mapping[str, torch.Tensor]
    warnings: tuple[str, ...]


class LiveAdapters(Mapping[str, Lora]):
    """The factors that live layers hold for one adapter, by canonical name, float32, read anew at each look-up."""

    def __init__(self, layers: Mapping[str, LoraLayer], adapter: str) -> None:
        self._layers, self._adapter = layers, adapter

    def __getitem__(self, name: str) -> Lora:
        layer = self._layers[name]
        down, up = (part.float().cpu() for part in factors(layer, self._adapter))
        scale = layer.scaling[self._adapter]
        return Lora(down.flatten(1).numpy(), up.flatten(1).numpy(), None, scale, tuple(down.shape[2:]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class _Deltas(Mapping[str, torch.Tensor]):
    def __init__(self, adapters: Mapping[str, Lora]) -> None:
        self._adapters = adapters

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._adapters[name].deltas()["weight"]).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)


def factors(layer: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in[, kh, kw]) and B (out, r[, 1, 1]) of one adapter of a live layer."""
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    return down.get_parameter("weight").detach(), up.get_parameter("weight").detach()


def adapted_layers(components: Mapping[str, torch.nn.Module], adapter: str) -> dict[str, LoraLayer]:
    """The live layers that have an adapter of that name, by canonical name (`unet.conv_in`)."""
    from peft.tuners.lora import LoraLayer

    layers = {}
    for component, model in components.items():
        prefix = f"{component}.{canonical_prefix(model)}"
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
                layers[prefix + path] = layer
    return layers


def has_values(layer: LoraLayer, adapter: str) -> bool:
    """Whether the loader gave the layer factors; it leaves a layer that it has none for on the meta device."""
    return not any(part.is_meta for part in factors(layer, adapter))


def not_loaded(module: str, message: str) -> Finding:
    """The finding that a module is not in the model as it is in the file."""
    return Finding("module-not-loaded", "error", module, message)


def not_adapted(module: str) -> Finding:
    """The finding that the loader passed a module over."""
    return not_loaded(module, "It is in the file, but the loader did not adapt it.")


def off_by(module: str, error: float) -> Finding:
    """The finding that a module's ΔW arrived with a relative error above `LOADED_TOLERANCE`."""
    return not_loaded(module, f"It arrived changed: its ΔW is off by {error:.2e} of its norm.")


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

    No base weights are needed and none are allocated, so that this costs about the file's own size in memory.
    Raises KeyError for an unknown family, Unrepresentable for a file whose change is more than a ΔW that its own
    tensors determine (DoRA, biases), LoadingError where the loader raises or gives an adapted module no values,
    OSError or safetensors' SafetensorError for a file that cannot be read.
    """
    dtypes = _component_dtypes(path)
    with collected_warnings() as messages:
        components = {part.name: build_component(family, part.name) for part in FAMILIES[family].components}
        for name, model in components.items():
            if name in dtypes:
                _allocate_nothing(model, dtypes[name])
        pipeline = _pipeline(family, components)
        messages.clear()  # what importing the libraries says is not about this file
        load_weights(pipeline, path, _ADAPTER)
    layers = adapted_layers(components, _ADAPTER)
    for name, layer in layers.items():
        if not has_values(layer, _ADAPTER):
            raise LoadingError(f"{name}: the loader adapted it but gave it no values")
    adapters = LiveAdapters(layers, _ADAPTER)
    return LoadedAdapter(family, adapters, _Deltas(adapters), tuple(messages))


def _component_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The components that a file has tensors for, each with a dtype that holds all of its tensors exactly."""
    found: dict[str, set[str]] = {}
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        for name in names:
            if "lora_magnitude_vector" in name:
                raise Unrepresentable(f"{name}: what DoRA changes depends on the base model's weights")
            if name.endswith(".bias"):
                raise Unrepresentable(f"{name}: a bias is no change of a weight")
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
        # Said of every component that the file does not concern.
        if not message.startswith("No LoRA keys associated to"):
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
        messages += [str(warning.message) for warning in caught]
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

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
from lora_convert.runtime.architectures import PIPELINES, build_component, canonical_prefix

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

__all__ = ["LoadedAdapter", "LoadingError", "load_adapter"]

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


class _Adapters(Mapping[str, Lora]):
    def __init__(self, layers: Mapping[str, LoraLayer]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> Lora:
        down, up, scaling = _factors(self._layers[name])
        return Lora(
            down.float().flatten(1).numpy(), up.float().flatten(1).numpy(), None, scaling, tuple(down.shape[2:])
        )

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


def _factors(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (r, in[, kh, kw]), B (out, r[, 1, 1]) and the scale of a live layer's one active adapter."""
    (adapter,) = layer.active_adapters
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    return down.get_parameter("weight").detach(), up.get_parameter("weight").detach(), layer.scaling[adapter]


def load_adapter(path: Path, family: str) -> LoadedAdapter:
    """Load a canonical Diffusers LoRA file into the family's architecture through its pipeline's public loader.

    No base weights are needed and none are allocated, so that this costs about the file's own size in memory.
    Raises KeyError for an unknown family, Unrepresentable for a file whose change is more than a ΔW that its own
    tensors determine (DoRA, biases), LoadingError where the loader raises or gives an adapted module no values,
    OSError or safetensors' SafetensorError for a file that cannot be read.
    """
    dtypes = _component_dtypes(path)
    with _collected_warnings() as messages:
        components = {part.name: build_component(family, part.name) for part in FAMILIES[family].components}
        for name, model in components.items():
            if name in dtypes:
                _allocate_nothing(model, dtypes[name])
        pipeline = _pipeline(family, components)
        messages.clear()  # what importing the libraries says is not about this file
        try:
            pipeline.load_lora_weights(str(path), use_safetensors=True, local_files_only=True)
        except Exception as error:
            raise LoadingError(f"{type(error).__name__}: {error}") from error
    layers = dict(_adapted(components))
    return LoadedAdapter(family, _Adapters(layers), _Deltas(_Adapters(layers)), tuple(messages))


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


def _adapted(components: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, LoraLayer]]:
    from peft.tuners.lora import LoraLayer

    for component, model in components.items():
        prefix = f"{component}.{canonical_prefix(model)}"
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                down, up, _ = _factors(layer)
                if down.is_meta or up.is_meta:
                    raise LoadingError(f"{prefix}{path}: the loader adapted it but gave it no values")
                yield prefix + path, layer


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
def _collected_warnings() -> Iterator[list[str]]:
    """Collect what the libraries log and warn of, instead of printing it; no other thread should load meanwhile."""
    from transformers.utils import logging as transformers_logging

    progress_bars: Any = transformers_logging
    shown = progress_bars.is_progress_bar_enabled()
    messages: list[str] = []
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    saved = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [_Collector(messages)], False
    progress_bars.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            for category in (RuntimeWarning, UserWarning):
                warnings.simplefilter("always", category)
            yield messages
        messages += [str(warning.message) for warning in caught]
    finally:
        for logger, (handlers, propagate) in zip(loggers, saved, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        if shown:
            progress_bars.enable_progress_bar()

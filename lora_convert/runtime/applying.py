"""Adapters on a live pipeline: loaded by its own loader, counted module by module, scaled, and taken off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from lora_convert.containers import MAX_HEADER, Header, Source, opened
from lora_convert.converters.adapters import Lora, read_adapter
from lora_convert.converters.convert import convert, local_path, plan
from lora_convert.converters.fidelity import relative_error
from lora_convert.converters.plan import Plan
from lora_convert.errors import FileError, UsageError
from lora_convert.families import FAMILIES
from lora_convert.hashes import sha256_of
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import AdaptedModule, Detection
from lora_convert.report import MOST_FINDINGS, Finding, counted, shown
from lora_convert.runtime.loading import (
    LOADED_TOLERANCE,
    LiveAdapters,
    LoadingError,
    adapted_layers,
    collected_warnings,
    factors,
    has_values,
    load_weights,
    not_adapted,
    not_loaded,
    off_by,
)
from lora_convert.runtime.pipelines import family_of, live_components
from lora_convert.runtime.scaling import Scale, plain_scale, scales_by_module

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["Applied", "Scale", "applied", "apply"]


class Applied:
    """An adapter on a pipeline. As a context manager it is removed at the end of the block.

    `name` is what the pipeline calls it, `file` what the user called its file (without folders), `sha256` that of the
    file as given, `family` its base model's, `modules` the number of modules that it adapts, `warnings` the loader's,
    `findings` what else there was to say of the file.
    """

    def __init__(
        self, pipeline: Any, name: str, file: str, sha256: str, planned: Plan, live: _Live, scale: Scale
    ) -> None:
        family = planned.detection.family
        assert family is not None
        self.name, self.file, self.sha256, self.family = name, file, sha256, family
        self.warnings = live.warnings
        self.findings = (*planned.detection.findings, *live.findings)
        self._pipeline = pipeline
        self._scales: Mapping[str, float] = live.scales
        self._removed = False
        self.set_scale(scale)

    def __repr__(self) -> str:
        return f"<{self.name}: {self.file}, {self.modules} modules, scale {self.scale}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    @property
    def modules(self) -> int:
        return len(self._scales)

    @property
    def scale(self) -> Any:
        """As it was set, in numbers, dictionaries and lists."""
        return plain_scale(self._scale)

    def set_scale(self, scale: Scale) -> None:
        """Apply the adapter this strongly: every module's live factor becomes its alpha/rank times its scale.

        A number, 0 included, or numbers by component and block; `Scale` says how. Diffusers' own `set_adapters` leaves
        resnets of the mid block at 1 and fails on `conv_in`, and it would undo this. Raises UsageError, naming the key,
        for a scale that is wrong, or if the adapter has been removed.
        """
        scales = scales_by_module(scale, self.family)
        layers = adapted_layers(live_components(self._pipeline), self.name)
        if not self.is_live() or not layers:
            raise UsageError(f"{shown(self.file)} has been removed from the pipeline; apply it again")
        for module, layer in layers.items():
            layer.scaling[self.name] = self._scales[module] * scales[module]
        self._scale = plain_scale(scale)

    def is_live(self) -> bool:
        """Whether the adapter is on its pipeline: not removed, here or by the pipeline's own methods."""
        models = live_components(self._pipeline).values()
        return not self._removed and any(self.name in getattr(model, "peft_config", {}) for model in models)

    def remove(self) -> None:
        """Take the adapter off. Other adapters stay as they are, and without any the pipeline is what it was before,
        bit for bit and module for module. Harmless if it is off already.
        """
        if not self._removed:
            self._removed = True
            _detach(live_components(self._pipeline), self.name)
            _registered(self._pipeline).remove(self)


def _registered(pipeline: Any) -> list[Applied]:
    """The adapters that `apply` put on the pipeline; kept in it, so that a deep copy of it has its own."""
    if "_lora_convert_applied" not in vars(pipeline):
        pipeline._lora_convert_applied = []
    adapters: list[Applied] = pipeline._lora_convert_applied
    return adapters


def applied(pipeline: Any) -> tuple[Applied, ...]:
    """The adapters that `apply` put on a pipeline and that are still there, in the order in which they came."""
    return tuple(adapter for adapter in _registered(pipeline) if adapter.is_live())


def apply(pipeline: Any, file: str | Path, scale: Scale = 1.0, *, family: str | None = None, **reading: Any) -> Applied:
    """Load a LoRA file onto a pipeline, beside the adapters that it has; all of them are active together.

    `file` is a path or `hf://` address of any file that `convert` takes. One that is in the canonical layout is loaded
    as it is, another is converted first, in a temporary folder and with alpha in the header, where it is exact. It goes
    through the pipeline's public loader; then every module of the file is looked up in the live model, and its factors
    and its scale compared with the file's (rounded to the pipeline's dtype). `reading` are options of `convert` that
    say how to read the file: `config`, `skip`, `max_header`.

    Raises UsageError for a base model of another family than the file's, a pipeline with fused adapters, or a scale
    that is wrong; FileError for a bad file, and with the findings `module-not-loaded` if a module did not arrive,
    whatever the loader says, or `overflow` if values do not fit the pipeline's dtype. Then the pipeline is left as it
    was.
    """
    path = Path(local_path(str(file)))
    planned = _planned(path, str(file), family, family_of(pipeline), reading)
    detection = planned.detection
    assert detection.family is not None
    scales_by_module(scale, detection.family)
    components = live_components(pipeline)
    _refuse_fused(components)
    _refuse_absent(components, detection)
    name = _free_name(components)
    with _canonical(path, planned, reading) as (canonical, sha256):
        live = _load(pipeline, components, canonical, name, detection.family)
    called = str(file) if str(file).startswith("hf://") else PurePath(file).name
    adapter = Applied(pipeline, name, called, sha256, planned, live, scale)
    _registered(pipeline).append(adapter)
    return adapter


def _planned(path: Path, file: str, family: str | None, base: str | None, reading: Mapping[str, Any]) -> Plan:
    """The plan of a file for a base model of a family. Where the file fits several families, the base decides."""
    planned = plan(path, family=family, alpha="header", **reading)
    found = planned.detection
    if found.family is None and base is not None and base in {rival.family for rival in found.rivals}:
        planned = plan(path, family=base, alpha="header", **reading)
        found = planned.detection
    if found.kind == "lora" and found.family is not None and found.family != base:
        raise UsageError(_other_family(shown(PurePath(file).name), found.family, base))
    if not planned.ok:
        raise FileError([finding for finding in planned.findings if finding.severity == "error"])
    return planned


def _other_family(file: str, family: str, base: str | None) -> str:
    said = f"{file} is for {FAMILIES[family].title} ({family})"
    if base is None:
        return f"{said}, and the pipeline is of no family that is known; open a base model of the family {family}"
    return f"{said}, and the base model is {FAMILIES[base].title} ({base}); open a base model of the family {family}"


@contextmanager
def _canonical(path: Path, planned: Plan, reading: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """A file in the canonical layout: this one or a converted one; and the SHA-256 of this one."""
    with opened(path, reading.get("max_header", MAX_HEADER)) as source:
        sha256, as_it_is = sha256_of(source.chunks()), _is_canonical(planned, source.header)
    if as_it_is:
        yield path, sha256
        return
    # the libraries may still map the file when the folder goes, which Windows does not like
    with TemporaryDirectory(prefix="lora-convert-", ignore_cleanup_errors=True) as folder:
        asked = {"family": planned.detection.family, "alpha": "header", "strict": True}
        result = convert(path, Path(folder), **{**reading, **asked})
        yield Path(result.outputs[0].path), sha256


def _is_canonical(planned: Plan, header: Header) -> bool:
    """Whether a conversion would keep every tensor under its name and byte for byte."""
    written = {tensor.name: (tensor.dtype, tensor.shape) for tensor in planned.tensors}
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()}
    return written == stored and all(step.copies for step in planned.steps)


def _refuse_fused(components: Mapping[str, torch.nn.Module]) -> None:
    if any(layer.merged for model in components.values() for _, layer in _tuner_layers(model)):
        said = "the pipeline has fused adapters, so that its weights are not the base model's"
        raise UsageError(f"{said}; call its unfuse_lora() first, or open the base model anew")


def _refuse_absent(components: Mapping[str, torch.nn.Module], found: Detection) -> None:
    modules = [target for module in found.payload for target in module.modules if target.component not in components]
    message = "It is in the file, but the pipeline has no {}."
    findings = [not_loaded(module.name, message.format(module.component)) for module in modules[:MOST_FINDINGS]]
    if findings:
        raise FileError(findings)


def _free_name(components: Mapping[str, torch.nn.Module]) -> str:
    taken = {name for model in components.values() for name in getattr(model, "peft_config", {})}
    return next(name for number in range(len(taken) + 1) if (name := f"adapter_{number}") not in taken)


def _tuner_layers(model: torch.nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """The live layers that peft put in place of the model's own, with their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]


@dataclass(frozen=True)
class _Live:
    """What the loader made of a file: every module's own scale (alpha/rank), and what there is to say."""

    scales: Mapping[str, float]
    warnings: tuple[str, ...]
    findings: tuple[Finding, ...]


def _load(pipeline: Any, components: Mapping[str, torch.nn.Module], path: Path, name: str, family: str) -> _Live:
    """Load a canonical file and check what arrived; on any failure the pipeline is left as it was."""
    before = _Standing.of(components)
    try:
        with collected_warnings() as messages, torch.random.fork_rng(devices=[]):  # peft first fills in noise
            _load_weights(pipeline, path, name)
        layers = adapted_layers(components, name)
        with opened(path) as source:
            findings = _compared(source, detect(source, family=family), layers, name)
    except BaseException:
        _detach(components, name)
        before.restore()
        raise
    for layer in layers.values():
        layer.train(layer.base_layer.training)
    before.restore(name)
    for layer in layers.values():
        layer.lora_A[name].requires_grad_(False)
        layer.lora_B[name].requires_grad_(False)
    scales = {module: layer.scaling[name] for module, layer in layers.items()}
    return _Live(scales, tuple(dict.fromkeys(messages)), tuple(findings))


def _load_weights(pipeline: Any, path: Path, name: str) -> None:
    try:
        load_weights(pipeline, path, name)
    except LoadingError as error:
        message = f"The loader failed: {shown(' '.join(str(error).split()), 300).rstrip('.')}."
        raise FileError([not_loaded("", message)]) from error


@dataclass(frozen=True)
class _Standing:
    """What loading and removing change besides layers: which adapters are active, and what is trained."""

    active: tuple[tuple[BaseTunerLayer, list[str]], ...]
    gradients: tuple[tuple[torch.nn.Parameter, bool], ...]
    training: tuple[tuple[torch.nn.Module, bool], ...]

    @classmethod
    def of(cls, components: Mapping[str, torch.nn.Module]) -> _Standing:
        models = components.values()
        return cls(
            tuple((layer, list(layer.active_adapters)) for model in models for _, layer in _tuner_layers(model)),
            tuple((weight, weight.requires_grad) for model in models for weight in model.parameters()),
            tuple((module, module.training) for model in models for module in model.modules()),
        )

    def restore(self, *added: str, without: str = "") -> None:
        """Put it back, with adapters that are active in addition, or without one that no longer is."""
        for layer, active in self.active:
            layer.set_adapter([*(name for name in active if name != without), *added])
        for weight, required in self.gradients:
            weight.requires_grad_(required)
        for module, training in self.training:
            module.training = training


def _detach(components: Mapping[str, torch.nn.Module], name: str) -> None:
    """Remove an adapter, wherever it got to, and the layers that were there for nothing else.

    The pipeline's own `delete_adapters` leaves empty layers behind, and activates another adapter in place of the one
    that goes.
    """
    before = _Standing.of(components)
    for model in components.values():
        for path, layer in _tuner_layers(model):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer.delete_adapter(name)
            if not getattr(layer, "r", True):  # no ranks, no adapters
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)
        _forget(model, name)
    before.restore(without=name)


def _forget(model: torch.nn.Module, name: str) -> None:
    """Drop the adapter's configuration, and with the last one the marks that say that there are any."""
    configs = vars(model).get("peft_config", {})
    configs.pop(name, None)
    if not configs:
        vars(model).pop("peft_config", None)
        vars(model).pop("_hf_peft_config_loaded", None)  # False is the class's


def _compared(source: Source, found: Detection, layers: Mapping[str, LoraLayer], name: str) -> list[Finding]:
    """Every module of the file against what arrived. Raises FileError if anything is missing or wrong."""
    expected = {module.modules[0].name: module for module in found.payload}
    findings = [not_adapted(module) for module in expected.keys() - layers]
    findings += [
        not_loaded(module, "The loader adapted it, but it is not in the file.") for module in layers.keys() - expected
    ]
    live = LiveAdapters(layers, name)
    for module, layer in layers.items():
        if module not in expected:
            continue
        if not has_values(layer, name):
            findings.append(not_loaded(module, "The loader adapted it, but gave it no values."))
        else:
            findings += _compare(module, source, expected[module], live[module], factors(layer, name)[0].dtype)
    errors = sorted((finding for finding in findings if finding.severity == "error"), key=lambda f: f.subject)
    if errors:
        raise FileError(errors[:MOST_FINDINGS])
    return _summary(findings)


def _compare(name: str, source: Source, module: AdaptedModule, live: Lora, dtype: torch.dtype) -> Iterator[Finding]:
    """What is wrong with one module that arrived."""
    stored = read_adapter(source, module).to_lora()
    expected = Lora(_rounded(stored.down, dtype), _rounded(stored.up, dtype), None, stored.scale, stored.kernel)
    precision = str(dtype).removeprefix("torch.")
    if not (np.isfinite(expected.down).all() and np.isfinite(expected.up).all()):
        fix = "Open the pipeline with dtype bfloat16 or float32."
        yield Finding("overflow", "error", name, f"Values of it do not fit the pipeline's {precision}.", fix)
    elif not (error := relative_error(expected, live)) <= LOADED_TOLERANCE:
        yield off_by(name, error)
    elif any(part.any() and not kept.any() for part, kept in _pairs(stored, expected)):
        yield Finding("underflow", "warning", name, f"All values of a matrix became zero in {precision}.")


def _pairs(stored: Lora, rounded: Lora) -> tuple[tuple[Any, Any], ...]:
    return (stored.down, rounded.down), (stored.up, rounded.up)


def _rounded(values: Any, dtype: torch.dtype) -> Any:
    """A matrix as the loader rounds it to the pipeline's dtype, in float32."""
    wide = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
    return torch.from_numpy(wide).to(dtype).float().numpy()


def _summary(findings: list[Finding]) -> list[Finding]:
    """The warnings as one, however many modules they are about."""
    if len(findings) < 2:
        return findings
    message = f"All values of a matrix became zero in the pipeline's dtype, in {counted(len(findings), 'module')}."
    fix = "Open the pipeline with dtype bfloat16 or float32."
    return [Finding("underflow", "warning", findings[0].subject, message, fix)]

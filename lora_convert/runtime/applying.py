"""Adapters and embeddings on a live pipeline: loaded, counted module by module, scaled, and taken off again."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from lora_convert.containers import MAX_HEADER, Header, Source, opened
from lora_convert.converters.adapters import Adapter, Dora, Lora, read_adapter
from lora_convert.converters.convert import convert, local_path, output_files, plan
from lora_convert.converters.embeddings import embedding_files
from lora_convert.converters.layout import CANONICAL_NAME
from lora_convert.converters.native import CONFIG_NAME
from lora_convert.converters.plan import Plan, dora_path
from lora_convert.errors import FileError, UsageError
from lora_convert.families import FAMILIES
from lora_convert.hashes import sha256_of
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import AdaptedModule, Detection
from lora_convert.report import MOST_FINDINGS, Finding, counted, shown
from lora_convert.runtime.architectures import canonical_prefix
from lora_convert.runtime.embedding import Word, is_placed, place, read_words, take_off, unused
from lora_convert.runtime.loading import (
    LiveAdapters,
    LoadingError,
    adapted_layers,
    adapters_of,
    arrival_errors,
    collected_warnings,
    has_values,
    held,
    load_weights,
    lora_layers,
    not_adapted,
    not_loaded,
    what_arrived_wrong,
)
from lora_convert.runtime.pipelines import family_of, live_components
from lora_convert.runtime.scaling import Scale, plain_scale, scales_by_module

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["Applied", "Scale", "applied", "apply"]


class Applied:
    """An adapter on a pipeline, or embeddings, or both. As a context manager it is removed at the end of the block.

    `names` are what the pipeline calls it, several where several files or folders make it up, and `name` the first of
    them; of embeddings alone they are their `tokens`, the words that a prompt has them by. `file` is what the user
    called its file or folder (without folders above), `sha256` that of the file as given or, of several, of their list
    (`SHA-256  name`, as sha256sum prints it); `family` its base model's, `modules` the number of modules that it
    adapts, `warnings` the loader's, `findings` what else there was to say of the file.
    """

    def __init__(
        self, pipeline: Any, given: _Given, live: Sequence[_Live], scale: Scale, findings: Sequence[Finding] = ()
    ) -> None:
        self.tokens = tuple(word.token for word in given.words)
        self.names = tuple(part.name for part in live) or self.tokens
        self.file, self.sha256, self.family = given.called, given.sha256, given.family
        self.warnings = tuple(dict.fromkeys(message for part in live for message in part.warnings))
        self.findings = (*given.findings, *(finding for part in live for finding in part.findings), *findings)
        self._pipeline, self._words = pipeline, given.words
        self._scales = {part.name: part.scales for part in live}
        self._removed = False
        self.set_scale(scale)

    def __repr__(self) -> str:
        what = [f"{self.modules} modules, scale {self.scale}"] if self._scales else []
        what += [f"tokens {', '.join(self.tokens)}"] if self.tokens else []
        return f"<{self.name}: {self.file}, {', '.join(what)}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def modules(self) -> int:
        return len({module for scales in self._scales.values() for module in scales})

    @property
    def scale(self) -> Any:
        """As it was set, in numbers, dictionaries and lists."""
        return plain_scale(self._scale)

    def set_scale(self, scale: Scale) -> None:
        """Apply the adapter this strongly: every module's live factor becomes its alpha/rank times its scale.

        A number, 0 included, or numbers by component and block; `Scale` says how. Diffusers' own `set_adapters` leaves
        resnets of the mid block at 1 and fails on `conv_in`, and it would undo this.

        Of a DoRA peft scales ΔW before it takes the norm, m · (W + s·ΔW) / ‖W + s·ΔW‖, while its trainers scale the
        whole change: at 1 the two agree, at 0 the magnitude is still there. (IA)³, OFT and embeddings have no strength;
        those that come with an adapter stay as they are. Raises UsageError, naming the key, for a scale that is wrong,
        for one other than 1 of what has no strength, or if the adapter has been removed.
        """
        if not self._scales:
            self._set_no_scale(scale)
            return
        scales = scales_by_module(scale, self.family)
        components = live_components(self._pipeline)
        found = {name: adapted_layers(components, name) for name in self._scales}
        if not self.is_live() or not any(found.values()):
            raise UsageError(f"{shown(self.file)} has been removed from the pipeline; apply it again")
        for name, layers in found.items():
            for module in layers:
                if self._scales[name][module] is None and scales[module] != 1.0:
                    said = f"{module} of {shown(self.file)} is multiplied or rotated ((IA)³, OFT)"
                    raise UsageError(f"{said}, which has no strength: it applies with the scale 1 or not at all")
        for name, layers in found.items():
            for module, layer in layers.items():
                own = self._scales[name][module]
                if own is not None:
                    layer.scaling[name] = own * scales[module]
        self._scale = plain_scale(scale)

    def _set_no_scale(self, scale: Scale) -> None:
        """The only scale of embeddings."""
        if isinstance(scale, Mapping) or scale != 1:
            said = f"{shown(self.file)} is an embedding, which has no strength: it applies with the scale 1"
            raise UsageError(f"{said}; write its token several times, or with fewer words around it")
        self._scale = 1.0

    def is_live(self) -> bool:
        """Whether the adapter is on its pipeline: not removed, here or by the pipeline's own methods."""
        configs = [getattr(model, "peft_config", {}) for model in live_components(self._pipeline).values()]
        adapted = any(name in config for config in configs for name in self._scales)
        return not self._removed and (adapted or any(is_placed(self._pipeline, word) for word in self._words))

    def unused(self, texts: Sequence[str]) -> bool:
        """Whether it has tokens and none of them stands in any of the texts, which are prompts."""
        return bool(self._words) and unused(self._pipeline, self._words, texts)

    def remove(self) -> None:
        """Take the adapter off. Other adapters stay as they are, and without any the pipeline is what it was before,
        bit for bit and module for module. Harmless if it is off already.
        """
        if not self._removed:
            self._removed = True
            for name in reversed(self._scales):
                _detach(live_components(self._pipeline), name)
            take_off(self._pipeline, self._words)
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


def apply(
    pipeline: Any,
    file: str | Path,
    scale: Scale = 1.0,
    *,
    token: str | Sequence[str] | None = None,
    family: str | None = None,
    **reading: Any,
) -> Applied:
    """Load an adapter or embeddings onto a pipeline, beside those that it has; all of them are active together.

    `file` is a path or `hf://` address of any file that `convert` takes without more being said, or a folder that it
    wrote: a canonical one (two files where only some modules are DoRA) or one of `--to peft`. A file in the canonical
    layout is loaded as it is, another is converted first, in a temporary folder, with alpha in the header and, unless
    its values are kept, in float32. It goes through the pipeline's public loader, or peft's; then every module of the
    file is looked up in the live model, and its factors, magnitude, bias and scale compared with the file's (rounded to
    the pipeline's dtype). `reading` are options of `convert` that say how to read a file: `config`, `skip`,
    `max_header`.

    Of an embedding all vectors are read where its token stands in a prompt or negative prompt as a whole word, in any
    capitals, be it in the vocabulary or not; `token` gives others, one for each embedding of the file. Tokens that
    `load_textual_inversion` loaded before go on working; it is refused until the embeddings are removed. A LoRA file
    that carries embeddings gives both.

    Where a DoRA shares a module with other adapters, those add to it whatever the order in which they came; of two
    DoRAs on one module the later one rescales the other, which `merge` does not.

    Raises UsageError for a base model of another family than the file's, a pipeline with fused adapters, a folder that
    is no adapter, a scale that is wrong, or a token that is in use; FileError for a bad file or one that has no exact
    form here, and with the findings `module-not-loaded` if a module did not arrive, whatever the loader says, or
    `overflow` if values do not fit the pipeline's dtype. Then the pipeline is left as it was.
    """
    path = Path(local_path(str(file)))
    components = live_components(pipeline)
    _refuse_fused(components)
    with _given(path, str(file), family, pipeline, reading, token) as given:
        scales_by_module(scale, given.family)
        live: list[_Live] = []
        try:
            for part in given.parts:
                live.append(_load(pipeline, components, part, _free_name(components), given.family))
            findings = place(pipeline, given.family, given.words)
            adapter = Applied(pipeline, given, live, scale, findings)
        except BaseException:
            take_off(pipeline, given.words)
            for loaded in reversed(live):
                _detach(components, loaded.name)
            raise
    _registered(pipeline).append(adapter)
    return adapter


@dataclass(frozen=True)
class _Given:
    """What the user gave, a file or a folder. `parts` are what to load for it: canonical files, or peft's folder;
    `words` the embeddings that are in it.
    """

    called: str
    sha256: str
    family: str
    findings: tuple[Finding, ...]
    parts: tuple[Path, ...]
    words: tuple[Word, ...] = ()


@contextlib.contextmanager
def _given(
    path: Path,
    file: str,
    family: str | None,
    pipeline: Any,
    reading: Mapping[str, Any],
    token: str | Sequence[str] | None,
) -> Iterator[_Given]:
    """Look at what was given, and convert it where that is needed."""
    base, called = family_of(pipeline), file if file.startswith("hf://") else PurePath(file).name
    files = output_files(path) if path.is_dir() else (path,)
    embedded = embedding_files(path) if path.is_dir() else ()
    if not files and not embedded:
        raise UsageError(_no_adapter(path))
    sha256 = _sha256((*files, *embedded), path, reading)
    if files and path.is_dir() and (files[0].parent / CONFIG_NAME).is_file():
        if base is None:
            raise UsageError(f"the pipeline is of no family that is known, so that {shown(called)} cannot be placed")
        if asked := sorted(name for name in reading.keys() - {"max_header"} if reading[name]):
            raise UsageError(f"{asked[0]} does not go with {shown(called)}, which peft's own loader reads")
        found = read_words(embedded, called, base, token)
        yield _Given(called, sha256, base, found.findings, (path,), found.words)
        return
    said = {name: reading[name] for name in ("config", "max_header", "skip") if name in reading}
    found = read_words((*files, *embedded), called, base, token, family=family, **said)
    if len(found.files) == len(files) + len(embedded) and (other := sorted(reading.keys() - said.keys())):
        raise UsageError(f"there is no option {other[0]!r} of reading embeddings")
    plans = {part: _planned(part, str(part), family, base, reading) for part in files if part not in found.files}
    with contextlib.ExitStack() as temporary:
        for planned in plans.values():
            _refuse_absent(live_components(pipeline), planned.detection)
            _refuse_other_kinds(live_components(pipeline), planned.detection)
        parts = [
            canonical
            for part, planned in plans.items()
            for canonical in temporary.enter_context(_canonical(part, planned, reading))
        ]
        assert base is not None
        findings = dict.fromkeys(finding for planned in plans.values() for finding in planned.detection.findings)
        findings |= dict.fromkeys(found.findings)
        yield _Given(called, sha256, base, (*findings, *_other_half(files)), tuple(parts), found.words)


def _other_half(files: Sequence[Path]) -> Iterator[Finding]:
    """The finding that a file was given of which a folder has the other half."""
    beside = Path(dora_path(str(files[0]))) if files else Path()
    if len(files) == 1 and files[0].name == CANONICAL_NAME and beside.is_file():
        message = f"{shown(beside.name)} lies beside it, with the modules that have magnitudes, and was not applied."
        yield Finding("half-applied", "warning", "", message, "Apply the folder, which takes both.")


def _no_adapter(path: Path) -> str:
    """Why a folder cannot be applied."""
    name = shown(path.resolve().name)
    if (path / "model_index.json").is_file() or (path / "config.json").is_file():
        return f"{name} is a whole model, not an adapter; open it as the base model"
    return f"{name} is a folder without an adapter in it; name the file"


def _sha256(files: Sequence[Path], path: Path, reading: Mapping[str, Any]) -> str:
    """That of the file, or of the list of the files that make up a folder."""
    hashes = []
    for file in files:
        with opened(file, reading.get("max_header", MAX_HEADER)) as source:
            hashes.append(sha256_of(source.chunks()))
    listing = [f"{sha256}  {file.relative_to(path).as_posix()}\n" for sha256, file in zip(hashes, files, strict=True)]
    return hashes[0] if len(files) == 1 else hashlib.sha256("".join(listing).encode()).hexdigest()


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


@contextlib.contextmanager
def _canonical(path: Path, planned: Plan, reading: Mapping[str, Any]) -> Iterator[tuple[Path, ...]]:
    """Files in the canonical layout: this one, or those that it converts to."""
    with opened(path, reading.get("max_header", MAX_HEADER)) as source:
        as_it_is = _is_canonical(planned, source.header)
    if as_it_is:
        yield (path,)
        return
    # the libraries may still map the file when the folder goes, which Windows does not like
    with TemporaryDirectory(prefix="lora-convert-", ignore_cleanup_errors=True) as folder:
        asked: dict[str, Any] = {"family": planned.detection.family, "alpha": "header", "strict": True}
        if not all(step.copies for step in planned.steps):
            asked["dtype"] = "fp32"  # products are rounded to the pipeline's dtype, not to the file's before
        result = convert(path, Path(folder), **{**reading, **asked})
        yield output_files(folder) if result.outputs else ()


def _is_canonical(planned: Plan, header: Header) -> bool:
    """Whether the file is one of safetensors of which a conversion would keep every tensor, under its name and byte
    for byte.
    """
    written = {tensor.name: (tensor.dtype, tensor.shape) for tensor in planned.tensors}
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()}
    return bool(header.data_start) and written == stored and all(step.copies for step in planned.steps)


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


def _refuse_other_kinds(components: Mapping[str, torch.nn.Module], found: Detection) -> None:
    """Peft would put a LoRA around the layer of another kind, where nothing finds either of them again."""
    from peft.tuners.lora import LoraLayer

    layers = {
        f"{component}.{canonical_prefix(model)}{path}": layer
        for component, model in components.items()
        for path, layer in _tuner_layers(model)
    }
    for name in (target.name for module in found.payload for target in module.modules):
        if name in layers and not isinstance(layers[name], LoraLayer):
            said = f"{name} has an adapter of another kind ({type(layers[name]).__module__.split('.')[2]})"
            raise UsageError(f"{said}, beside which peft has no place for a LoRA; remove the former first")


def _free_name(components: Mapping[str, torch.nn.Module]) -> str:
    taken = {name for model in components.values() for name in getattr(model, "peft_config", {})}
    return next(name for number in range(len(taken) + 1) if (name := f"adapter_{number}") not in taken)


def _tuner_layers(model: torch.nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """The live layers that peft put in place of the model's own, with their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]


@dataclass(frozen=True)
class _Live:
    """What the loader made of a file: every module's own scale (alpha/rank), and what there is to say.

    The scale is None where the adapter's kind has no strength.
    """

    name: str
    scales: Mapping[str, float | None]
    warnings: tuple[str, ...]
    findings: tuple[Finding, ...]


def _load(pipeline: Any, components: Mapping[str, torch.nn.Module], path: Path, name: str, family: str) -> _Live:
    """Load a canonical file or a folder of peft's, and check what arrived; on any failure the pipeline is left as it
    was.
    """
    before = _Standing.of(components)
    try:
        with collected_warnings() as messages, torch.random.fork_rng(devices=[]):  # peft first fills in noise
            layers, findings = _placed(pipeline, components, path, name, family)
        for layer in layers.values():
            layer.train(layer.get_base_layer().training)
        before.restore(name)
        for layer in layers.values():
            for part in layer.adapter_layer_names:
                if name in (held_here := getattr(layer, part)):
                    held_here[name].requires_grad_(False)
    except BaseException:
        _detach(components, name)
        before.restore()
        raise
    scales = {module: getattr(layer, "scaling", {}).get(name) for module, layer in layers.items()}
    return _Live(name, scales, tuple(dict.fromkeys(messages)), tuple(findings))


def _placed(
    pipeline: Any, components: Mapping[str, torch.nn.Module], path: Path, name: str, family: str
) -> tuple[Mapping[str, BaseTunerLayer], list[Finding]]:
    """The live layers that got an adapter, counted and compared with what was to arrive, and what there is to say."""
    if path.is_dir():
        return _placed_native(components, path, name), []
    _load_weights(pipeline, path, name)
    layers = lora_layers(components, name)
    with opened(path) as source:
        return layers, _compared(source, detect(source, family=family), layers, name)


def _placed_native(components: Mapping[str, torch.nn.Module], path: Path, name: str) -> Mapping[str, BaseTunerLayer]:
    from lora_convert.runtime.native import load_native

    try:
        return load_native(components, path, name)
    except LoadingError as error:
        raise FileError([not_loaded("", f"{shown(' '.join(str(error).split()), 300).rstrip('.')}.")]) from error


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
        """Put it back, with adapters that are active in addition, or without one that no longer is.

        A DoRA comes first in its layers, since peft's rescales what the adapters before it have added.
        """
        for layer, active in self.active:
            rescaling = [name for name in added if name in getattr(layer, "lora_magnitude_vector", ())]
            others = [name for name in added if name not in rescaling]
            layer.set_adapter([*rescaling, *(name for name in active if name != without), *others])
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
            if not adapters_of(layer):
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
            findings += _compare(module, source, expected[module], live[module], held(layer, name)["down"].dtype)
    errors = sorted((finding for finding in findings if finding.severity == "error"), key=lambda f: f.subject)
    if errors:
        raise FileError(errors[:MOST_FINDINGS])
    return _summary(findings)


def _compare(
    name: str, source: Source, module: AdaptedModule, live: Lora | Dora, dtype: torch.dtype
) -> Iterator[Finding]:
    """What is wrong with one module that arrived."""
    stored = read_adapter(source, module)
    expected = _rounded(stored, dtype)
    pairs = list(zip(_arrays(stored), _arrays(expected), strict=True))
    precision = str(dtype).removeprefix("torch.")
    if not all(np.isfinite(kept).all() for _, kept in pairs):
        fix = "Open the pipeline with dtype bfloat16 or float32."
        yield Finding("overflow", "error", name, f"Values of it do not fit the pipeline's {precision}.", fix)
    elif wrong := list(what_arrived_wrong(name, arrival_errors(expected, live), live)):
        yield from wrong
    elif any(part.any() and not kept.any() for part, kept in pairs):
        yield Finding("underflow", "warning", name, f"All values of a matrix became zero in {precision}.")


def _arrays(adapter: Adapter) -> tuple[Any, ...]:
    """All that a LoRA or DoRA stores."""
    if isinstance(adapter, Dora):
        return (*_arrays(adapter.inner), adapter.magnitude)
    plain = adapter.to_lora()
    return plain.down, plain.up, *(() if plain.bias is None else (plain.bias,))


def _rounded(adapter: Adapter, dtype: torch.dtype) -> Dora | Lora:
    """An adapter as the loader rounds it to the pipeline's dtype, in float32."""
    if isinstance(adapter, Dora):
        return replace(adapter, inner=_rounded(adapter.inner, dtype), magnitude=_in_dtype(adapter.magnitude, dtype))
    plain = adapter.to_lora()
    scale = plain.scale or 1.0  # the bias holds it already
    bias = None if plain.bias is None else scale * _in_dtype(plain.bias / scale, dtype).astype(np.float64)
    return replace(plain, down=_in_dtype(plain.down, dtype), up=_in_dtype(plain.up, dtype), bias=bias)


def _in_dtype(values: Any, dtype: torch.dtype) -> Any:
    wide = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
    return torch.from_numpy(wide).to(dtype).float().numpy()


def _summary(findings: list[Finding]) -> list[Finding]:
    """The warnings as one, however many modules they are about."""
    if len(findings) < 2:
        return findings
    message = f"All values of a matrix became zero in the pipeline's dtype, in {counted(len(findings), 'module')}."
    fix = "Open the pipeline with dtype bfloat16 or float32."
    return [Finding("underflow", "warning", findings[0].subject, message, fix)]

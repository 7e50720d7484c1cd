"""Detection -> Plan: which tensors are written, from which, and with what done to them. No tensor is read for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from lora_convert.containers.dtypes import BITS, KEPT_AS, nbytes, numpy_dtype
from lora_convert.containers.header import Header
from lora_convert.converters.adapters import Form, form_of, weight_shape
from lora_convert.converters.layout import LAYOUTS, Layout, Written
from lora_convert.converters.native import (
    WEIGHTS_NAME,
    NativeForm,
    adapter_config,
    native_form,
    native_groups,
    tensor_name,
)
from lora_convert.converters.refusals import LOSES_TOO_MUCH, not_native, refusals
from lora_convert.converters.remarks import change_findings, comfyui_findings, kohya_findings, two_files_findings
from lora_convert.errors import Unrepresentable, UsageError
from lora_convert.families import FAMILIES, Module
from lora_convert.inspect.detection import AdaptedModule, Detection, Embedding
from lora_convert.report import SCHEMA, Finding, printable, severest, shown

__all__ = [
    "TARGETS",
    "AlphaMode",
    "EmbeddingStep",
    "Options",
    "OutputFile",
    "OutputTensor",
    "Plan",
    "Step",
    "magnitude_of",
    "make_plan",
    "written_dtype",
]

AlphaMode = Literal["fold", "header"]

TARGETS = (*LAYOUTS, "peft")
"""What `--to` takes: the layouts, and peft's own form of every algorithm."""

DTYPES: Mapping[str, str] = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True, slots=True)
class Options:
    """What a user can ask of a conversion.

    `rank` and `max_error` (relative Frobenius norm) truncate what has no exact form of that size; `base` is a model
    whose weights decide what some algorithms change. `token` names the embeddings of the file, in their order.
    """

    to: str = "diffusers"
    family: str | None = None
    alpha: AlphaMode | None = None
    dtype: str | None = None
    config: str | Path | None = None
    skip: tuple[str, ...] = ()
    rank: int | None = None
    max_error: float | None = None
    base: str | Path | None = None
    token: tuple[str, ...] = ()

    def checked(self) -> Options:
        """Itself. Raises UsageError for a value that does not exist, or that does not go with another."""
        for name, value, known in (
            ("--to", self.to, TARGETS),
            ("--alpha", self.alpha, ("fold", "header", None)),
            ("--dtype", self.dtype, (*DTYPES, None)),
        ):
            if value not in known:
                raise UsageError(f"{name} {value!r} is not one of {', '.join(filter(None, known))}")
        if self.alpha == "fold" and self.to in LAYOUTS and not LAYOUTS[self.to].folds:
            raise UsageError(f"--alpha fold does not go with --to {self.to}, which keeps alphas as tensors")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank} is not a rank; it is 1 or more")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise UsageError(f"--max-error {self.max_error:g} is not a relative error between 0 and 1")
        for name in ("alpha", "rank", "max_error", "base"):
            if self.to == "peft" and getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} does not go with --to peft, which keeps what there is")
        _check_tokens(self.token)
        return self

    @property
    def joins(self) -> bool:
        """Whether the vectors of an embedding for all text encoders go into one file."""
        return self.to not in ("diffusers", "peft")

    @property
    def truncates(self) -> bool:
        """Whether a rank may be cut."""
        return self.rank is not None or self.max_error is not None

    @property
    def allowed_error(self) -> float:
        """The largest relative error of a module's ΔW that a truncation may cause."""
        return LOSES_TOO_MUCH if self.max_error is None else self.max_error


def _check_tokens(tokens: Sequence[str]) -> None:
    for token in tokens:
        if not token.strip() or printable(token) != token:
            raise UsageError(f"--token {shown(repr(token))} is no word to write in a prompt")
    if len({token.lower() for token in tokens}) < len(tokens):
        raise UsageError("--token gives one name twice; capitals make no difference")


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of an output file. `role` is its field in the step: `down`, `up`, `magnitude`, `bias` or `alpha`, or
    in peft's form its suffix; `file` counts the plan's outputs.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    file: int = 0

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A weight file to be written: its path (inside the output folder, or whole), and its tensors in file order.

    `adapter_metadata` is for its header, `config` the content of an `adapter_config.json` beside it.
    """

    path: str
    tensors: tuple[OutputTensor, ...]
    adapter_metadata: str | None = None
    config: str | None = None

    @property
    def bytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of the tensors of one adapted module.

    `fold` is the factor that goes into the matrices (None: whatever the computed ones still have), `alpha` is what the
    layout states beside them, `rank` that of the matrices; `truncated` says that they are only the best of that rank,
    `retyped` that they change their dtype. `native` is peft's form of every target, where that is asked for. `outputs`
    has, for every target module in order, its tensors; none if the module changes nothing (rank 0).
    """

    source: AdaptedModule
    fold: float | None
    alpha: float
    outputs: tuple[tuple[OutputTensor, ...], ...]
    rank: int = 0
    truncated: bool = False
    needs_base: bool = False
    retyped: bool = False
    native: tuple[NativeForm, ...] = ()

    @property
    def name(self) -> str:
        """The name of its first target."""
        return self.source.modules[0].name

    @property
    def copies(self) -> bool:
        """Whether the matrices are written byte for byte."""
        if self.native:
            return False
        whole = "mid" not in self.source.tensors and len(self.source.modules) == 1
        return whole and self.fold == 1.0 and not self.retyped and not self.truncated


@dataclass(frozen=True, slots=True)
class EmbeddingStep:
    """What becomes of the vectors of one embedding: the token that is written, and by text encoder the tensor (count,
    width) that they go to.
    """

    source: Embedding
    token: str
    outputs: Mapping[str, OutputTensor]


@dataclass(frozen=True)
class Plan:
    """A conversion before it runs: shown by `--dry-run`, checked, then executed.

    `outputs` are the files, those of embeddings last; `steps` and `embeddings` say where each of their tensors comes
    from. `status` is `planned`, `refused` (understood, but not doable as asked) or `failed` (the file is wrong); then
    there are findings of severity error.
    Ranks that only the values decide (`--max-error` alone) are stated as bounds until `resolved`.
    """

    file: str
    status: Literal["planned", "refused", "failed"]
    detection: Detection
    options: Options = Options()
    outputs: tuple[OutputFile, ...] = ()
    steps: tuple[Step, ...] = ()
    findings: tuple[Finding, ...] = ()
    resolved: bool = True
    embeddings: tuple[EmbeddingStep, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "planned"

    @property
    def layout(self) -> str:
        """The layout that is written, a key of `TARGETS`."""
        return self.options.to

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where the files go."""
        return tuple(Path(output.path) for output in self.outputs)

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The tensors of all files."""
        return tuple(tensor for output in self.outputs for tensor in output.tensors)

    @property
    def bytes(self) -> int:
        """Size of the outputs' tensors."""
        return sum(output.bytes for output in self.outputs)

    @property
    def module_files(self) -> int:
        """How many of the outputs hold modules; the others hold embeddings."""
        ours = [tensor.file for step in self.embeddings for tensor in step.outputs.values()]
        return min(ours, default=len(self.outputs))

    def embedding_list(self) -> list[dict[str, Any]]:
        """One entry per embedding: its token, and which tensors become which."""
        return [_embedding_dict(step) for step in self.embeddings]

    def as_dict(self) -> dict[str, Any]:
        """The content of `convert --dry-run --json`."""
        files = [{"path": file.path, "tensors": len(file.tensors), "bytes": file.bytes} for file in self.outputs]
        return {
            "schema": SCHEMA,
            "file": self.file,
            "status": self.status,
            "family": self.detection.family,
            "trainer": self.detection.trainer,
            "to": self.layout,
            "modules": len(self.steps),
            "outputs": files if self.ok else [],
            "bounds": not self.resolved,
            "steps": [_step_dict(step) for step in self.steps],
            "embeddings": self.embedding_list(),
            "findings": [finding.as_dict() for finding in self.findings],
        }


def _embedding_dict(step: EmbeddingStep) -> dict[str, Any]:
    sources = {key: part.tensor for key, part in step.source.vectors.items()}
    to = {key: tensor.name for key, tensor in step.outputs.items()}
    return {"token": step.token, "vectors": step.source.count, "from": sources, "to": to}


def _step_dict(step: Step) -> dict[str, Any]:
    return {
        "modules": [module.name for module in step.source.modules],
        "algorithm": step.source.algorithm,
        "from": list(step.source.tensors.values()),
        "to": [tensor.name for group in step.outputs for tensor in group],
        "fold": step.fold,
        "alpha": step.alpha,
        "rank": step.rank,
        "truncated": step.truncated,
        "copied": step.copies,
    }


def _canonical_shapes(module: Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of down and up as Diffusers and Kohya store them: 4-D for convolutions, matrices otherwise."""
    if len(module.shape) == 4:
        return (rank, *module.shape[1:]), (module.shape[0], rank, 1, 1)
    return (rank, module.shape[1]), (module.shape[0], rank)


def magnitude_of(module: AdaptedModule) -> str | None:
    """The tensor that holds a module's magnitudes, if there is one."""
    return module.tensors.get("magnitude", module.tensors.get("dora_scale"))


def written_dtype(dtype: str, wanted: str | None) -> str:
    """The dtype in which values stored in `dtype` are written, `wanted` being what `--dtype` asks for."""
    return DTYPES[wanted] if wanted else KEPT_AS.get(dtype, dtype)


def _output_dtype(header: Header, tensor: str, wanted: str | None) -> str:
    return written_dtype(header.tensors[tensor].dtype, wanted)


def _matrices_dtype(module: AdaptedModule, header: Header, wanted: str | None) -> str:
    """The dtype of computed matrices: that of the stored ones, F32 where they differ."""
    dtypes = {_output_dtype(header, name, wanted) for name in module.values.values()}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _alpha_dtype(alpha: float, dtype: str) -> str:
    """The matrices' dtype where it holds the alpha exactly, as Kohya saves it; else F32, or what alone can hold it."""
    import numpy as np

    with np.errstate(over="ignore"):
        if float(numpy_dtype(dtype).type(alpha)) == alpha:
            return dtype
        return "F32" if np.isfinite(np.float32(alpha)) else "F64"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A module on its way to a step: its form, the rank that is written, and the file that it goes to."""

    source: AdaptedModule
    form: Form
    rank: int
    truncated: bool
    magnitude: bool
    bias: bool = False
    file: int = 0

    @property
    def plain(self) -> bool:
        """Whether the stored factors themselves are written, but for scale and dtype."""
        return self.source.algorithm in _STORED and self.rank == self.form.rank and not self.truncated


_STORED = ("lora", "lora+dora")
"""Algorithms whose factors are those of the output."""


def _full_rank(module: AdaptedModule) -> int:
    """The rank that no matrix of the module's shape exceeds."""
    rows, *columns = weight_shape(module)
    return min(rows, math.prod(columns))


def _draft(module: AdaptedModule, form: Form, options: Options, rank: int | None) -> _Draft:
    """`rank` is what the values decided, where they did."""
    bound = _full_rank(module) if form.rank is None else form.rank
    if not bound and not form.changes_nothing:
        bound = 1  # a bias or a magnitude alone still needs factors to stand beside: a rank of zeros
    asked = min(bound, rank or options.rank or bound)
    truncated = options.truncates and form.weight and (form.rank is None or (asked < form.rank or _open(options)))
    if rank is not None and form.rank is not None and rank >= form.rank:
        truncated = False
    return _Draft(module, form, asked, truncated and bound > 0, form.magnitude)


def _open(options: Options) -> bool:
    """Whether only the values tell which ranks are written."""
    return options.max_error is not None and options.rank is None


def _partial(drafts: Sequence[_Draft]) -> set[str]:
    """Components in which some modules have magnitudes and some have not."""
    found: dict[str, set[bool]] = {}
    for draft in drafts:
        if draft.rank:
            found.setdefault(draft.source.modules[0].component, set()).add(draft.magnitude)
    return {component for component, kinds in found.items() if len(kinds) == 2}


def _arranged(drafts: Sequence[_Draft], layout: Layout, has_base: bool) -> list[_Draft]:
    """The modules with their files, and with the tensors that their neighbours in a file need them to have.

    diffusers leaves the magnitude of a module without one on the meta device when others of its component have one,
    and the same with biases. With the base model such a module gets ‖W+ΔW‖, which changes nothing; without it DoRA
    goes into a file of its own, and also where there are biases, which peft does not load beside magnitudes. A bias of
    zero is right for every module.
    """
    partial = _partial(drafts) if layout.separates else set()
    if partial and has_base and not any(d.form.bias and d.source.modules[0].component in partial for d in drafts):
        drafts = [replace(d, magnitude=d.magnitude or d.source.modules[0].component in partial) for d in drafts]
    elif partial:
        drafts = [replace(draft, file=int(draft.magnitude)) for draft in drafts]
    if not layout.separates:
        return [replace(draft, bias=draft.form.bias) for draft in drafts]
    biased = {(draft.file, draft.source.modules[0].component) for draft in drafts if draft.form.bias}
    return [replace(draft, bias=(draft.file, draft.source.modules[0].component) in biased) for draft in drafts]


def _outputs(
    draft: _Draft,
    alpha: float,
    layout: Layout,
    names: Mapping[Module, Mapping[str, str]],
    header: Header,
    dtype: str | None,
) -> Iterator[tuple[OutputTensor, ...]]:
    """The tensors of each target module of one adapted module."""
    computed = _matrices_dtype(draft.source, header, dtype)
    dtypes = {"down": computed, "up": computed, "bias": computed, "magnitude": computed}
    if draft.plain:
        dtypes |= {part: _output_dtype(header, draft.source.tensors[part], dtype) for part in ("down", "up")}
    if (magnitude := magnitude_of(draft.source)) is not None:
        dtypes["magnitude"] = _output_dtype(header, magnitude, dtype)
    for target in draft.source.modules:
        down, up = _canonical_shapes(target, draft.rank)
        shapes = {"down": down, "up": up}
        if draft.magnitude:
            shapes["magnitude"] = layout.magnitude_shape(target)
        if draft.bias:
            shapes["bias"] = target.shape[:1]
        tensors = [
            OutputTensor(names[target][role], dtypes[role], shape, role, draft.file) for role, shape in shapes.items()
        ]
        if "alpha" in names[target]:
            stated = _alpha_dtype(alpha, dtypes["down"])
            tensors.append(OutputTensor(names[target]["alpha"], stated, (), "alpha", draft.file))
        yield tuple(tensors)


def _step(
    draft: _Draft,
    layout: Layout,
    names: Mapping[Module, Mapping[str, str]],
    header: Header,
    mode: AlphaMode,
    dtype: str | None,
) -> Step:
    module, rank = draft.source, draft.rank
    if not rank:
        return Step(module, 1.0, 0.0, ())
    scale = 1.0 if module.scale is None else module.scale
    fold: float | None = None
    alpha = float(rank)
    if draft.plain:
        fold, alpha = (scale, float(rank)) if mode == "fold" else (1.0, scale * rank)
        if mode == "header" and module.alpha is not None and module.scale == module.alpha / rank:
            alpha = module.alpha  # not scale * rank, which may differ in the last bit
    outputs = tuple(_outputs(draft, alpha, layout, names, header, dtype))
    retyped = draft.plain and any(
        tensor.dtype != header.tensors[module.tensors[tensor.role]].dtype
        for tensor in outputs[0]
        if tensor.role in ("down", "up")
    )
    needs_base = draft.form.needs_base or (draft.magnitude and not draft.form.magnitude)
    return Step(module, fold, alpha, outputs, rank, draft.truncated, needs_base, retyped)


def _is_canonical(drafts: Sequence[_Draft], names: Mapping[Module, Mapping[str, str]], header: Header) -> bool:
    """Whether every tensor already has its canonical name and shape."""
    for draft in drafts:
        target, tensors = draft.source.modules[0], draft.source.tensors
        if len(draft.source.modules) > 1 or tensors.keys() - {"magnitude", "up_bias"} != {"down", "up"}:
            return False
        wanted = _canonical_shapes(target, draft.rank)
        for part, shape in zip(("down", "up"), wanted, strict=True):
            if tensors[part] != names[target][part] or header.tensors[tensors[part]].shape != shape:
                return False
    return True


def _file_order(tensors: Sequence[OutputTensor]) -> tuple[OutputTensor, ...]:
    """The order of the reference writer: wide dtypes first (so all are aligned), then by name."""
    return tuple(sorted(tensors, key=lambda tensor: (-BITS[tensor.dtype], tensor.dtype, tensor.name)))


def _refusal(detection: Detection, options: Options) -> Plan | None:
    """The plan that says why nothing can be planned, or None."""
    if detection.kind != "lora" or detection.family not in FAMILIES:
        findings = [
            replace(finding, severity="error") if finding.name in ("unsupported-kind", "unknown-format") else finding
            for finding in detection.findings
        ]
        return Plan(detection.file, "refused", detection, options, findings=tuple(findings))
    if not detection.ok:
        return Plan(detection.file, "failed", detection, options, findings=detection.findings)
    return None


def make_plan(
    header: Header,
    detection: Detection,
    options: Options,
    ranks: Mapping[str, int] | None = None,
    reads_input: Callable[[AdaptedModule], bool | None] = lambda module: None,
) -> Plan:
    """Plan the conversion of a detected file. What cannot be done becomes findings of the plan.

    `ranks` are those that the values decided, by the name of a step; `reads_input` reads (IA)³'s flag, which peft's
    form depends on.
    """
    refusal = _refusal(detection, options)
    if refusal:
        return refusal
    if options.to == "peft":
        return _native_plan(header, detection, options, reads_input)
    forms = [form_of(module, header) for module in detection.payload]
    refused = refusals(list(zip(detection.payload, forms, strict=True)), options)
    if refused:
        return Plan(detection.file, "refused", detection, options, findings=(*detection.findings, *refused))
    decided = ranks or {}
    drafts = [
        _draft(module, form, options, decided.get(module.modules[0].name))
        for module, form in zip(detection.payload, forms, strict=True)
    ]
    layout = LAYOUTS[options.to]
    planned = _laid_out(header, detection, options, layout, _arranged(drafts, layout, options.base is not None))
    unresolved = ranks is None and _open(options) and any(step.truncated for step in planned.steps)
    return replace(planned, resolved=not unresolved)


def _laid_out(header: Header, detection: Detection, options: Options, layout: Layout, drafts: Sequence[_Draft]) -> Plan:
    """The steps and files of modules that can be written."""
    assert detection.family is not None
    family = FAMILIES[detection.family]
    files = sorted({draft.file for draft in drafts if draft.rank}) or [0]
    names: dict[Module, Mapping[str, str]] = {}
    for file in files:
        names |= layout.names(family, [t for draft in drafts if draft.file == file for t in draft.source.modules])
    canonical = options.to == "diffusers" and len(files) == 1 and _is_canonical(drafts, names, header)
    mode: AlphaMode = "header" if not layout.folds else options.alpha or ("header" if canonical else "fold")
    steps = tuple(_step(draft, layout, names, header, mode, options.dtype) for draft in drafts)
    findings = [*detection.findings, *change_findings(steps, header, options)]
    findings += comfyui_findings(steps) if options.to == "diffusers" else kohya_findings(steps, family)
    outputs = tuple(_file(header, layout, steps, drafts, file) for file in files)
    outputs = tuple(output for output in outputs if output.tensors)
    if not outputs:
        findings.append(Finding("no-effect", "error", "", "No module is left to write: every rank is 0."))
    findings += two_files_findings(outputs)
    status: Literal["failed", "planned"] = "failed" if severest(findings) == "error" else "planned"
    return Plan(detection.file, status, detection, options, outputs, steps, tuple(findings))


def _file(header: Header, layout: Layout, steps: Sequence[Step], drafts: Sequence[_Draft], file: int) -> OutputFile:
    members = [(step, draft) for step, draft in zip(steps, drafts, strict=True) if draft.file == file]
    written = [
        Written(target, step.rank, step.alpha, draft.magnitude, draft.bias)
        for step, draft in members
        for target in (step.source.modules if step.outputs else ())
    ]
    path = layout.file_name("" if header.path.startswith("<") else PurePath(header.path).stem)
    if file:
        path = dora_path(path)
    tensors = _file_order([tensor for step, _ in members for group in step.outputs for tensor in group])
    return OutputFile(path, tensors, layout.adapter_metadata(written))


def dora_path(path: str) -> str:
    """The name of the second file, which holds DoRA alone."""
    return str(PurePath(path).with_name(f"{PurePath(path).stem}_dora.safetensors"))


def _native_plan(
    header: Header, detection: Detection, options: Options, reads_input: Callable[[AdaptedModule], bool | None]
) -> Plan:
    """The plan of `--to peft`: a folder per component and configuration."""
    forms: dict[str, NativeForm] = {}
    reasons: dict[str, str] = {}
    targets = {target.name: (module, target) for module in detection.payload for target in module.modules}
    for name, (module, target) in targets.items():
        wanted = DTYPES[options.dtype] if options.dtype else None
        try:
            forms[name] = native_form(module, header, wanted, target=target, on_input=reads_input(module))
        except Unrepresentable as error:
            reasons[name] = str(error)
    if reasons:
        findings = (*detection.findings, *not_native(reasons))
        return Plan(detection.file, "refused", detection, options, findings=findings)
    groups = native_groups(forms)
    file_of = {name: number for number, names in enumerate(groups.values()) for name in names}
    steps = tuple(_native_step(module, forms, file_of) for module in detection.payload)
    outputs = []
    for number, (folder, names) in enumerate(groups.items()):
        tensors = [t for step in steps for group in step.outputs for t in group if t.file == number]
        config = adapter_config([(targets[name][1], forms[name]) for name in names])
        outputs.append(OutputFile(f"{folder}/{WEIGHTS_NAME}", _file_order(tensors), config=config))
    return Plan(detection.file, "planned", detection, options, tuple(outputs), steps, detection.findings)


def _native_step(module: AdaptedModule, forms: Mapping[str, NativeForm], file_of: Mapping[str, int]) -> Step:
    outputs = tuple(
        tuple(
            OutputTensor(tensor_name(target, t.suffix), t.dtype, t.shape, t.suffix, file_of[target.name])
            for t in forms[target.name].tensors
        )
        for target in module.modules
    )
    native = tuple(forms[target.name] for target in module.modules)
    return Step(module, None, native[0].alpha, outputs, native[0].rank, native=native)

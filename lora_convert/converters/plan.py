"""Detection -> Plan: which tensors are written, from which, and with what done to them. No tensor is read for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from lora_convert.containers.dtypes import BITS, nbytes, numpy_dtype
from lora_convert.containers.header import Header
from lora_convert.converters.layout import LAYOUTS, Written
from lora_convert.errors import UsageError
from lora_convert.families import FAMILIES, Family, Module
from lora_convert.inspect.detection import AdaptedModule, Detection
from lora_convert.report import SCHEMA, Finding, listed, severest

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["AlphaMode", "Options", "OutputTensor", "Plan", "Step", "make_plan"]

AlphaMode = Literal["fold", "header"]

DTYPES: Mapping[str, str] = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_OUTPUT_DTYPE: Mapping[str, str] = {"F8_E4M3": "F16", "F8_E5M2": "F16", "F64": "F32"}
"""Source dtypes that Diffusers does not keep, and what they become (F8 fits F16 exactly)."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a user can ask of a conversion."""

    to: str = "diffusers"
    family: str | None = None
    alpha: AlphaMode | None = None
    dtype: str | None = None
    config: str | Path | None = None
    skip: tuple[str, ...] = ()

    def checked(self) -> Options:
        """Itself. Raises UsageError for a value that does not exist."""
        for name, value, known in (
            ("--to", self.to, LAYOUTS),
            ("--alpha", self.alpha, ("fold", "header", None)),
            ("--dtype", self.dtype, (*DTYPES, None)),
        ):
            if value not in known:
                raise UsageError(f"{name} {value!r} is not one of {', '.join(filter(None, known))}")
        if self.alpha == "fold" and not LAYOUTS[self.to].folds:
            raise UsageError(f"--alpha fold does not go with --to {self.to}, which keeps alphas as tensors")
        return self


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of an output file. `role` is its field in the step: `down`, `up` or `alpha`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of the tensors of one adapted module.

    `fold` is the factor that goes into the matrices, `retyped` says that they change their dtype; `alpha` is what the
    layout states beside them (header or tensor). `outputs` has, for every target module in order, its tensors; none if
    the module changes nothing (rank 0).
    """

    source: AdaptedModule
    fold: float
    alpha: float
    outputs: tuple[tuple[OutputTensor, ...], ...]
    retyped: bool = False

    @property
    def copies(self) -> bool:
        """Whether the matrices are written byte for byte."""
        whole = "mid" not in self.source.tensors and len(self.source.modules) == 1
        return whole and self.fold == 1.0 and not self.retyped


@dataclass(frozen=True)
class Plan:
    """A conversion before it runs: shown by `--dry-run`, checked, then executed.

    `tensors` are the output file's, in file order; `steps` say where each comes from. `status` is `planned`, `refused`
    (understood, but not doable as asked) or `failed` (the file is wrong); then there are findings of severity error.
    """

    file: str
    status: Literal["planned", "refused", "failed"]
    detection: Detection
    layout: str = "diffusers"
    alpha: AlphaMode = "fold"
    file_name: str = ""
    steps: tuple[Step, ...] = ()
    tensors: tuple[OutputTensor, ...] = ()
    adapter_metadata: str | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "planned"

    @property
    def bytes(self) -> int:
        """Size of the output's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """The content of `convert --dry-run --json`."""
        return {
            "schema": SCHEMA,
            "file": self.file,
            "status": self.status,
            "family": self.detection.family,
            "trainer": self.detection.trainer,
            "to": self.layout,
            "modules": len(self.steps),
            "outputs": [{"path": self.file_name, "tensors": len(self.tensors), "bytes": self.bytes}] if self.ok else [],
            "steps": [_step_dict(step) for step in self.steps],
            "findings": [finding.as_dict() for finding in self.findings],
        }


def _step_dict(step: Step) -> dict[str, Any]:
    return {
        "modules": [module.name for module in step.source.modules],
        "algorithm": step.source.algorithm,
        "from": list(step.source.tensors.values()),
        "to": [tensor.name for group in step.outputs for tensor in group],
        "fold": step.fold,
        "alpha": step.alpha,
        "copied": step.copies,
    }


_TITLES: Mapping[str, str] = {
    "loha": "LoHa", "lokr": "LoKr", "dora": "DoRA", "ia3": "(IA)³", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT",
    "full": "full weight differences (diff)", "norm": "norm differences (w_norm, b_norm)", "tlora": "T-LoRA",
}  # fmt: skip


def _unsupported(payload: Sequence[AdaptedModule]) -> list[Finding]:
    """Findings for algorithms and modules that this version recognises but does not convert."""
    findings = []
    counts = Counter(module.algorithm for module in payload if module.algorithm != "lora")
    for algorithm, number in counts.items():
        title = " with ".join(_TITLES.get(part, "LoRA") for part in algorithm.split("+"))
        message = (
            f"{number} of {len(payload)} modules are {title}, which this version recognises but cannot convert yet."
        )
        findings.append(Finding("unsupported-kind", "error", algorithm, message, "inspect describes the file."))
    for module in payload:
        if "up_bias" in module.tensors:
            tensor = module.tensors["up_bias"]
            findings.append(Finding("unsupported-kind", "error", tensor, "A LoRA on a bias cannot be converted yet."))
        elif module.modules[0].mark == "embedding":
            message = f"{module.modules[0].name} is an embedding table; no Diffusers loader takes a LoRA there."
            fix = "--skip PATTERN leaves its tensors out."
            tensor = next(iter(module.tensors.values()))
            findings.append(Finding("unsupported-kind", "error", tensor, message, fix))
    return findings


def _canonical_shapes(module: Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of down and up as Diffusers and Kohya store them: 4-D for convolutions, matrices otherwise."""
    if len(module.shape) == 4:
        return (rank, *module.shape[1:]), (module.shape[0], rank, 1, 1)
    return (rank, module.shape[1]), (module.shape[0], rank)


def _output_dtype(header: Header, tensor: str, wanted: str | None) -> str:
    dtype = header.tensors[tensor].dtype
    return DTYPES[wanted] if wanted else _OUTPUT_DTYPE.get(dtype, dtype)


def _outputs(
    module: AdaptedModule,
    rank: int,
    alpha: float,
    names: Mapping[Module, Mapping[str, str]],
    header: Header,
    dtype: str | None,
) -> Iterator[tuple[OutputTensor, ...]]:
    """The tensors of each target module of one adapted module."""
    down_dtype = _output_dtype(header, module.tensors["down"], dtype)
    up_dtype = _output_dtype(header, module.tensors["up"], dtype)
    for target in module.modules:
        down, up = _canonical_shapes(target, rank)
        tensors = [
            OutputTensor(names[target]["down"], down_dtype, down, "down"),
            OutputTensor(names[target]["up"], up_dtype, up, "up"),
        ]
        if "alpha" in names[target]:
            tensors.append(OutputTensor(names[target]["alpha"], _alpha_dtype(alpha, down_dtype), (), "alpha"))
        yield tuple(tensors)


def _alpha_dtype(alpha: float, dtype: str) -> str:
    """The matrices' dtype where it holds the alpha exactly, as Kohya saves it; else F32."""
    import numpy as np

    with np.errstate(over="ignore"):
        return dtype if float(numpy_dtype(dtype).type(alpha)) == alpha else "F32"


def _step(
    module: AdaptedModule, names: Mapping[Module, Mapping[str, str]], header: Header, mode: AlphaMode, dtype: str | None
) -> Step:
    rank = _rank(module, header)
    scale = 1.0 if module.scale is None else module.scale
    if not rank:
        return Step(module, 1.0, 0.0, ())
    fold, alpha = (scale, float(rank)) if mode == "fold" else (1.0, scale * rank)
    if mode == "header" and module.alpha is not None and module.scale == module.alpha / rank:
        alpha = module.alpha  # not scale * rank, which may differ in the last bit
    outputs = tuple(_outputs(module, rank, alpha, names, header, dtype))
    retyped = any(
        tensor.dtype != header.tensors[module.tensors[tensor.role]].dtype
        for tensor in outputs[0]
        if tensor.role != "alpha"
    )
    return Step(module, fold, alpha, outputs, retyped)


def _rank(module: AdaptedModule, header: Header) -> int:
    """Rank of the written factors: the core's outer rank where there is one."""
    return header.tensors[module.tensors["up"]].shape[1]


def _is_canonical(payload: Sequence[AdaptedModule], names: Mapping[Module, Mapping[str, str]], header: Header) -> bool:
    """Whether every tensor already has its canonical name and shape."""
    for module in payload:
        target = module.modules[0]
        if len(module.modules) > 1 or module.tensors.keys() != {"down", "up"}:
            return False
        wanted = _canonical_shapes(target, _rank(module, header))
        for part, shape in zip(("down", "up"), wanted, strict=True):
            if module.tensors[part] != names[target][part] or header.tensors[module.tensors[part]].shape != shape:
                return False
    return True


def _file_order(tensors: Sequence[OutputTensor]) -> tuple[OutputTensor, ...]:
    """The order of the reference writer: wide dtypes first (so all are aligned), then by name."""
    return tuple(sorted(tensors, key=lambda tensor: (-BITS[tensor.dtype], tensor.dtype, tensor.name)))


def _change_findings(steps: Sequence[Step], header: Header, options: Options) -> list[Finding]:
    """Findings on what the conversion changes besides names."""
    findings = []
    changed: Counter[tuple[str, str]] = Counter()
    for step in steps:
        for group in step.outputs:
            for tensor in group:
                if tensor.role != "alpha":
                    changed[header.tensors[step.source.tensors[tensor.role]].dtype, tensor.dtype] += 1
    for (before, after), number in sorted(changed.items()):
        if before != after:
            why = "as asked" if options.dtype else f"because Diffusers has no use for {before}"
            findings.append(
                Finding("dtype-changed", "note", "", f"{number} matrices go from {before} to {after}, {why}.")
            )
    tucker = sum("mid" in step.source.tensors for step in steps)
    if tucker:
        message = f"The Tucker cores of {tucker} convolutions are multiplied into their down matrices."
        findings.append(Finding("folded", "note", "", message))
    empty = [step.source for step in steps if not step.outputs]
    for module in empty[:20]:
        message = f"{module.modules[0].name} has rank 0: it changes nothing and is left out."
        findings.append(Finding("no-effect", "warning", module.tensors["up"], message))
    return findings


def _comfyui_finding(steps: Sequence[Step]) -> list[Finding]:
    if any(module.component == "unet" and ".attn" in module.path for step in steps for module in step.source.modules):
        message = "ComfyUI skips the UNet's attention in the Diffusers layout without a word."
        fix = "For ComfyUI and A1111 write the file with --to kohya."
        return [Finding("not-for-comfyui", "note", "", message, fix)]
    return []


def _a1111_finding(steps: Sequence[Step], family: Family) -> list[Finding]:
    unknown = [
        module.name
        for step in steps
        for module in step.source.modules
        if module.path == "text_projection" or (family.name == "sdxl-refiner" and module.component != "unet")
    ]
    if not unknown:
        return []
    message = f"A1111 and Forge have no name for {listed(unknown, 3)} and skip what they do not know; ComfyUI reads it."
    return [Finding("not-for-a1111", "note", unknown[0], message)]


def _refusal(detection: Detection) -> Plan | None:
    """The plan that says why nothing can be planned, or None."""
    if detection.kind != "lora" or detection.family is None:
        findings = [
            replace(finding, severity="error") if finding.name in ("unsupported-kind", "unknown-format") else finding
            for finding in detection.findings
        ]
        return Plan(detection.file, "refused", detection, findings=tuple(findings))
    if not detection.ok:
        return Plan(detection.file, "failed", detection, findings=detection.findings)
    unsupported = _unsupported(detection.payload)
    if unsupported:
        return Plan(detection.file, "refused", detection, findings=(*detection.findings, *unsupported))
    return None


def make_plan(header: Header, detection: Detection, options: Options) -> Plan:
    """Plan the conversion of a detected file. What cannot be done becomes findings of the plan."""
    refusal = _refusal(detection)
    if refusal:
        return refusal
    assert detection.family is not None
    family, layout = FAMILIES[detection.family], LAYOUTS[options.to]
    payload = detection.payload
    names = layout.names(family, [target for module in payload for target in module.modules])
    canonical = options.to == "diffusers" and _is_canonical(payload, names, header)
    mode: AlphaMode = "header" if not layout.folds else options.alpha or ("header" if canonical else "fold")
    steps = tuple(_step(module, names, header, mode, options.dtype) for module in payload)
    findings = [*detection.findings, *_change_findings(steps, header, options)]
    if options.to == "diffusers":
        findings += _comfyui_finding(steps)
    else:
        findings += _a1111_finding(steps, family)
    tensors = _file_order([tensor for step in steps for group in step.outputs for tensor in group])
    if not tensors:
        findings.append(Finding("no-effect", "error", "", "No module is left to write: every rank is 0."))
    written = [
        Written(target, group[0].shape[0], step.alpha)
        for step in steps
        for target, group in zip(step.source.modules, step.outputs, strict=False)
    ]
    return Plan(
        detection.file,
        "failed" if severest(findings) == "error" else "planned",
        detection,
        options.to,
        mode,
        layout.file_name("" if header.path.startswith("<") else PurePath(header.path).stem),
        steps,
        tensors,
        layout.adapter_metadata(written),
        tuple(findings),
    )

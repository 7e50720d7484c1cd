"""plan, convert and validate: calls of the library, on a path, bytes or an open file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from lora_convert._version import __version__
from lora_convert.containers import MAX_HEADER, Source, Target, name_of, opened
from lora_convert.containers.header import MAX_HEADER_LIMIT
from lora_convert.containers.source import FileReader, chunks_of, open_path, read_header
from lora_convert.converters.execute import execute
from lora_convert.converters.fidelity import Rung, check_deltas, check_numbers, check_structure
from lora_convert.converters.metadata import PROVENANCE, output_metadata
from lora_convert.converters.plan import Options, Plan, make_plan
from lora_convert.converters.writer import atomic_file
from lora_convert.errors import FileError, UsageError, raise_errors
from lora_convert.hashes import sha256_of
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import Detection
from lora_convert.report import SCHEMA, Finding, json_number, listed, severest, shown

_T = TypeVar("_T", bound=Target)

__all__ = ["ConvertResult", "OutputRecord", "Progress", "ValidateResult", "convert", "plan", "validate"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """One written file: its path, size in bytes and SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        return {"path": self.path, "bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class ValidateResult:
    """What the rungs of the proof said of a file. `status` is `pass` or `fail`."""

    file: str
    against: str | None
    status: Literal["pass", "fail"]
    family: str | None = None
    rungs: Mapping[str, Rung] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "pass"

    @property
    def worst_delta_error(self) -> float | None:
        """Largest relative error of a module's ΔW; None if the delta rung did not run."""
        worst = self.rungs["delta"].figures.get("worst") if "delta" in self.rungs else None
        return None if worst is None else float(worst)

    def as_dict(self) -> dict[str, Any]:
        """The content of `validate --json`."""
        return {
            "schema": SCHEMA,
            "file": self.file,
            "against": self.against,
            "status": self.status,
            "family": self.family,
            "rungs": {name: rung.as_dict() for name, rung in self.rungs.items()},
            "findings": [finding.as_dict() for finding in self.findings],
        }


@dataclass(frozen=True)
class ConvertResult:
    """What became of one file: `converted`, `refused` (not doable as asked) or `failed` (the file is wrong)."""

    file: str
    status: Literal["converted", "refused", "failed"]
    plan: Plan | None = None
    outputs: tuple[OutputRecord, ...] = ()
    proof: ValidateResult | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "converted"

    @property
    def detection(self) -> Detection | None:
        return self.plan.detection if self.plan else None

    @property
    def worst_delta_error(self) -> float | None:
        """Largest relative error of a module's ΔW; None if validation did not run."""
        return self.proof.worst_delta_error if self.proof else None

    def as_dict(self) -> dict[str, Any]:
        """The content of `convert --json`."""
        worst = self.worst_delta_error
        return {
            "schema": SCHEMA,
            "file": self.file,
            "status": self.status,
            "outputs": [output.as_dict() for output in self.outputs],
            "family": self.detection.family if self.detection else None,
            "trainer": self.detection.trainer if self.detection else None,
            "to": self.plan.layout if self.plan else None,
            "modules": len(self.plan.steps) if self.plan else 0,
            "worst_delta_error": None if worst is None else json_number(worst),
            "findings": [finding.as_dict() for finding in self.findings],
        }


def local_path(target: _T, progress: Progress | None = None) -> _T | Path:
    """The target, or for an address on a hub the cached download of it: matrices are not read over the network."""
    if not (isinstance(target, str) and target.startswith("hf://")):
        return target
    from lora_convert.containers.hub import download

    return download(target, quiet=progress is None)


def _options(options: Mapping[str, Any]) -> Options:
    unknown = options.keys() - {field.name for field in fields(Options)}
    if unknown:
        raise UsageError(f"there is no option {sorted(unknown)[0]!r}")
    skip = options.get("skip", ())
    return Options(**{**options, "skip": (skip,) if isinstance(skip, str) else tuple(skip)}).checked()


def _planned(source: Source, options: Options) -> Plan:
    return make_plan(source.header, detect(source, family=options.family, config=options.config), options)


def plan(
    target: Target,
    out: str | Path | None = None,
    *,
    force: bool = False,
    beside: Sequence[Target] = (),
    max_header: int = MAX_HEADER,
    strict: bool = False,
    **options: Any,
) -> Plan:
    """What `convert` would do, without reading a matrix. Arguments as for `convert`; without `out` only the name of
    the output is planned.
    """
    asked = _options(options)
    try:
        with opened(target, max_header, asked.skip) as source:
            planned = _planned(source, asked)
            if planned.ok and out is not None:
                path = output_path(planned, Path(out))
                refuse_overwrite([target, *beside], path, force)
                planned = replace(planned, file_name=str(path))
    except FileError as error:
        broken = Detection(name_of(target), "unknown", findings=error.findings)
        planned = Plan(name_of(target), "failed", broken, findings=error.findings)
    raise_errors(strict, planned.findings)
    return planned


def output_path(planned: Plan, out: Path) -> Path:
    """Where the output goes: `out` itself if it names a safetensors file, else the layout's name inside it."""
    path = out if out.suffix == ".safetensors" else out / planned.file_name
    return Path(os.path.realpath(path)) if ".." in path.parts else path  # `new/..` is another place once `new` is made


def refuse_overwrite(inputs: Sequence[Target], path: Path, force: bool) -> None:
    """Raise UsageError if writing to `path` would replace an input, a folder, or without `force` any file."""
    for target in inputs:
        if isinstance(target, str | os.PathLike) or hasattr(target, "name"):
            source = Path(name_of(target))
            if path.exists() and source.exists() and path.samefile(source):
                raise UsageError(f"the output {shown(str(path))} is an input; name another with -o")
    if path.is_dir():
        raise UsageError(f"the output {shown(str(path))} is a folder")
    if os.path.lexists(path) and not force:
        raise UsageError(f"the output {shown(str(path))} exists; --force replaces it")


def convert(
    target: Target,
    out: str | Path,
    *,
    force: bool = False,
    validated: bool = True,
    beside: Sequence[Target] = (),
    max_header: int = MAX_HEADER,
    progress: Progress | None = None,
    strict: bool = False,
    **options: Any,
) -> ConvertResult:
    """Convert a LoRA file and prove the result before it is put in place.

    `out` is a file name ending in `.safetensors`, or a folder. Options: `to` (`diffusers`, `kohya`, `comfy`), `family`,
    `alpha` (`fold`, `header`), `dtype` (`fp16`, `bf16`, `fp32`), `config`, `skip` (patterns of tensor names).
    `validated=False` leaves the proof out; `beside` are other inputs, which the output must not replace. A bad file
    gives findings and writes nothing, or with `strict` raises FileError; a wrong call (the output exists, an unknown
    option) raises UsageError.
    """
    asked = _options(options)
    try:
        with opened(local_path(target, progress), max_header, asked.skip) as source:
            planned = _planned(source, asked)
            if planned.ok:
                path = output_path(planned, Path(out))
                refuse_overwrite([target, *beside], path, force)
                result = _write(source, planned, path, validated, progress)
            else:
                status: Literal["refused", "failed"] = "refused" if planned.status == "refused" else "failed"
                result = ConvertResult(planned.file, status, planned, findings=planned.findings)
    except FileError as error:
        result = ConvertResult(name_of(target), "failed", findings=error.findings)
    raise_errors(strict, result.findings)
    return replace(result, file=name_of(target))


class _AbandonedError(Exception):
    """Leaves the block of an atomic file without publishing it."""


def _counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """A function that reports how much more of something is done."""
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        if progress:
            progress(what, done, total)

    return advance


def _fill(file: BinaryIO, source: Source, planned: Plan, beside: Executor, progress: Progress | None) -> list[Finding]:
    """Write the output's content, while the source is hashed beside it; returns what was noticed."""
    if _is_own_output(planned, source):
        for chunk in source.chunks():
            file.write(chunk)
        return []
    source_sha256 = beside.submit(sha256_of, source.chunks())
    total = sum(tensor.nbytes for tensor in source.header.tensors.values())
    advance = _counter(progress, "converting", total)
    noticed = execute(planned, source, file, output_metadata(planned, __version__), source_sha256.result, advance)
    return [*noticed.closing_findings(), *_idle_findings(noticed.idle, planned)]


def _write(source: Source, planned: Plan, path: Path, validated: bool, progress: Progress | None) -> ConvertResult:
    """Execute the plan into the target's place, unless the values or the proof are bad."""
    findings = list(planned.findings)
    proof = None
    try:
        # the pool comes last, so that it has ended before a file that it reads is closed
        with atomic_file(path) as file, contextlib.ExitStack() as opened_files, ThreadPoolExecutor(2) as beside:
            findings += _fill(file, source, planned, beside, progress)
            file.flush()
            if severest(findings) == "error":
                raise _AbandonedError
            on_disk = beside.submit(os.fsync, file.fileno())
            reader = opened_files.enter_context(contextlib.closing(FileReader(open_path(Path(file.name)), owned=True)))
            sha256 = beside.submit(sha256_of, chunks_of(reader))
            if validated:
                output = Source(read_header(reader, str(path), MAX_HEADER_LIMIT), reader)
                proof = _prove(output, str(path), source, planned.detection, progress)
                findings += [finding for finding in proof.findings if finding.severity == "error"]
                if not proof.ok:
                    raise _AbandonedError
            record = OutputRecord(str(path), reader.size, sha256.result())
            on_disk.result()
    except _AbandonedError:
        return ConvertResult(planned.file, "failed", planned, proof=proof, findings=tuple(findings))
    return ConvertResult(planned.file, "converted", planned, (record,), proof, tuple(findings))


def _is_own_output(planned: Plan, source: Source) -> bool:
    """Whether the file is one of ours already and nothing asked for changes it: then its bytes are the output."""
    metadata = source.header.metadata
    if f"{PROVENANCE}version" not in metadata or metadata.get("lora_adapter_metadata") != planned.adapter_metadata:
        return False
    tensors = source.header.tensors
    whole = source.header.data_start + planned.bytes == source.reader.size  # nothing was left out by --skip
    return whole and all(
        tensor.name in tensors
        and tensors[tensor.name].dtype == tensor.dtype
        and tensors[tensor.name].shape == tensor.shape
        for tensor in planned.tensors
    ) and all(step.copies for step in planned.steps)  # fmt: skip


def _idle_findings(idle: Sequence[str], planned: Plan) -> list[Finding]:
    if not idle:
        return []
    if len(idle) == len(planned.steps):
        return [Finding("no-effect", "warning", "", "Every module's change is zero: the file changes nothing.")]
    return [Finding("no-effect", "note", "", f"{len(idle)} modules change nothing (all zeros): {listed(idle)}.")]


def _prove(
    output: Source, name: str, source: Source, truth: Detection, progress: Progress | None, family: str | None = None
) -> ValidateResult:
    """The rungs of the proof, on an open output against an open source."""
    found = detect(output, family=family or truth.family)
    advance = _counter(progress, "proving", len(found.payload))
    structure = check_structure(found)
    if structure.status == "fail":
        rungs = {"structure": structure}
    else:
        rungs = {
            "structure": structure,
            "numbers": check_numbers(output, found, source, truth),
            "delta": check_deltas(output, found, source, truth, advance),
        }
    return _verdict(name, truth.file, found, rungs)


def _verdict(name: str, against: str | None, found: Detection, rungs: Mapping[str, Rung]) -> ValidateResult:
    failed = any(rung.status == "fail" for rung in rungs.values())
    findings = tuple(finding for rung in rungs.values() for finding in rung.findings)
    return ValidateResult(name, against, "fail" if failed else "pass", found.family, rungs, findings)


def validate(
    out: Target,
    against: Target | None = None,
    *,
    family: str | None = None,
    config: str | Path | None = None,
    max_header: int = MAX_HEADER,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
    strict: bool = False,
) -> ValidateResult:
    """Check a LoRA file: structure and numbers, and with `against` the ΔW of every module against that source.

    `family` decides ties for both files; `config` is the source's peft configuration, `skip` leaves tensors of the
    source out. A bad file gives a result with status `fail`, or with `strict` raises FileError.
    """
    try:
        with opened(local_path(out, progress), max_header) as output:
            if against is None:
                result = _verdict_alone(output, family, config)
            else:
                result = _against(output, name_of(out), against, progress, family, config, max_header, skip)
    except FileError as error:
        broken = Rung("fail", "the file cannot be read", findings=error.findings)
        result = ValidateResult(name_of(out), None, "fail", None, {"structure": broken}, error.findings)
    raise_errors(strict, result.findings)
    return result


def _against(
    output: Source,
    name: str,
    against: Target,
    progress: Progress | None,
    family: str | None,
    config: str | Path | None,
    max_header: int,
    skip: Sequence[str],
) -> ValidateResult:
    """The proof against a source; what is wrong with that itself is said to be its."""
    try:
        with opened(local_path(against, progress), max_header, skip) as source:
            truth = detect(source, family=family, config=config)
            if truth.family is not None and truth.ok:
                return _prove(output, name, source, truth, progress, family)
            said = truth.findings
    except FileError as error:
        said = error.findings
    findings = tuple(replace(finding, message=f"(in the source) {finding.message}") for finding in said)
    rungs = {"structure": Rung("fail", "the source itself is not sound")}
    return ValidateResult(name, name_of(against), "fail", None, rungs, findings)


def _verdict_alone(output: Source, family: str | None, config: str | Path | None) -> ValidateResult:
    found = detect(output, family=family, config=config)
    rungs = {"structure": check_structure(found)}
    if rungs["structure"].status == "pass":
        rungs["numbers"] = check_numbers(output, found)
    rungs["delta"] = Rung("skipped", "there is no source to compare with (--against)")
    return _verdict(output.header.path, None, found, rungs)

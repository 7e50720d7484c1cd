"""plan, convert and validate: calls of the library, on a path, bytes or an open file."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal, TypeVar

from lora_convert._version import __version__
from lora_convert.containers import MAX_HEADER, Source, Target, name_of, opened
from lora_convert.containers.header import MAX_HEADER_LIMIT
from lora_convert.containers.source import FileReader, chunks_of, open_path, read_header
from lora_convert.converters.base import BaseWeights, open_base
from lora_convert.converters.embedding_proof import check_record, check_values, check_vectors
from lora_convert.converters.embedding_record import RECORD_NAME, record_of, record_path
from lora_convert.converters.embeddings import (
    called_by_files,
    embedding_files,
    embedding_paths,
    embedding_plan,
    with_embeddings,
    write_embeddings,
)
from lora_convert.converters.execute import Truncation, execute, ranks_for
from lora_convert.converters.fidelity import Opened, Rung, check_deltas, check_numbers, check_structure
from lora_convert.converters.layout import CANONICAL_NAME
from lora_convert.converters.metadata import PROVENANCE, output_metadata
from lora_convert.converters.native import CONFIG_NAME, WEIGHTS_NAME, reads_input
from lora_convert.converters.plan import Options, Plan, dora_path, make_plan
from lora_convert.converters.writer import atomic_file
from lora_convert.errors import FileError, UsageError, raise_errors
from lora_convert.hashes import sha256_of
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import Detection
from lora_convert.report import SCHEMA, Finding, json_number, listed, severest, shown

_T = TypeVar("_T", bound=Target)

__all__ = [
    "ConvertResult",
    "OutputRecord",
    "Progress",
    "ValidateResult",
    "convert",
    "opened_whole",
    "output_files",
    "plan",
    "validate",
]

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
        """Largest relative error of a module's ΔW, or of an embedding's vector; None if nothing was compared."""
        found = [self.rungs[name].figures.get("worst") for name in ("delta", "vectors") if name in self.rungs]
        return max((float(worst) for worst in found if worst is not None), default=None)

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
    truncations: tuple[Truncation, ...] = ()

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
            "embeddings": self.plan.embedding_list() if self.plan and self.ok else [],
            "worst_delta_error": None if worst is None else json_number(worst),
            "truncated": [truncation.as_dict() for truncation in self.truncations],
            "findings": [finding.as_dict() for finding in self.findings],
        }


def local_path(target: _T, progress: Progress | None = None) -> _T | Path:
    """The target, or for an address on a hub the cached download of it: matrices are not read over the network."""
    if not (isinstance(target, str) and target.startswith("hf://")):
        return target
    from lora_convert.containers.hub import download

    return download(target, quiet=progress is None)


@contextlib.contextmanager
def opened_whole(
    target: Target, max_header: int, skip: Sequence[str], progress: Progress | None = None
) -> Iterator[Source]:
    """`opened`, of an address on a hub the download, under the address: the cache's folders are named by commits."""
    local = local_path(target, progress)
    with opened(local, max_header, skip) as source:
        if isinstance(target, str) and target.startswith("hf://"):
            name = PurePath(source.header.path).name
            address = target if target.endswith(f"/{name}") else f"{target.rstrip('/')}/{name}"
            source.header = replace(source.header, path=address)
        yield source


def _options(options: Mapping[str, Any]) -> Options:
    unknown = options.keys() - {field.name for field in fields(Options)}
    if unknown:
        raise UsageError(f"there is no option {sorted(unknown)[0]!r}")
    several = {name: options.get(name, ()) for name in ("skip", "token")}
    listed_ones = {name: (value,) if isinstance(value, str) else tuple(value) for name, value in several.items()}
    return Options(**{**options, **listed_ones}).checked()


def _planned(source: Source, options: Options) -> Plan:
    found = detect(source, family=options.family, config=options.config)
    if found.kind == "embedding":
        return embedding_plan(found, options)
    if options.token and not found.embeddings:
        raise UsageError(f"--token names embeddings, and there are none in {shown(found.file)}")
    planned = make_plan(source.header, found, options, reads_input=functools.partial(reads_input, source))
    return with_embeddings(planned)


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
                planned = _placed(planned, Path(out))
                _check_places(planned, [target, *beside], force)
            elif planned.ok:
                planned = called_by_files(planned, asked=False)
    except FileError as error:
        broken = Detection(name_of(target), "unknown", findings=error.findings)
        planned = Plan(name_of(target), "failed", broken, findings=error.findings)
    raise_errors(strict, planned.findings)
    return planned


def _placed(planned: Plan, out: Path) -> Plan:
    """The plan with whole paths: `out` itself if it names a safetensors file, else the layout's names inside it."""
    out = Path(os.path.realpath(out)) if ".." in out.parts else out  # `new/..` is another place once `new` is made
    named = out.suffix == ".safetensors"
    if named and planned.layout == "peft":
        raise UsageError(f"--to peft writes a folder for every component; {shown(str(out))} is the name of a file")
    paths = [out / output.path for output in planned.outputs]
    if named:
        modules = [out, Path(dora_path(str(out)))][: planned.module_files]
        paths = [*modules, *embedding_paths(planned, out)]
    outputs = tuple(replace(file, path=str(path)) for file, path in zip(planned.outputs, paths, strict=True))
    return called_by_files(replace(planned, outputs=outputs), asked=named)


def output_files(out: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The weight files of what `convert` wrote: the file itself, or those in its folder; none if that has none."""
    path = Path(out)
    if not path.is_dir():
        return (path,)
    canonical = path / CANONICAL_NAME
    found = tuple(file for file in (canonical, Path(dora_path(str(canonical)))) if file.is_file())
    folders = sorted({config.parent for config in (*path.glob(CONFIG_NAME), *path.glob(f"*/{CONFIG_NAME}"))})
    return found or tuple(folder / WEIGHTS_NAME for folder in folders)


def _check_places(planned: Plan, inputs: Sequence[Target], force: bool) -> None:
    """Raise UsageError for outputs that would replace what they must not, or be read together with a stranger."""
    record = record_path(planned)
    for path in (*planned.paths, *([record] if record else [])):
        refuse_overwrite(inputs, path, force)
    first = planned.paths[0]
    beside: Sequence[Path] = ()
    if planned.layout == "peft" and first.parent.parent.is_dir():
        beside = output_files(first.parent.parent)
    elif first.name == CANONICAL_NAME:
        beside = [path for path in (Path(dora_path(str(first))),) if path.is_file()]
    if record is not None and record.name == RECORD_NAME:
        ours = {path.stem for path in planned.paths}  # in place of one in .bin ours is read
        beside = [*beside, *(path for path in embedding_files(record.parent) if path.stem not in ours)]
    if others := [str(path) for path in beside if path not in planned.paths]:
        raise UsageError(
            f"{shown(others[0])} is of another conversion, and readers of the folder would take it for a part of this "
            "one; remove it, or name another folder"
        )


def refuse_overwrite(inputs: Sequence[Target], path: Path, force: bool) -> None:
    """Raise UsageError if writing to `path` would replace an input, a folder, or without `force` any file."""
    for target in inputs:
        if isinstance(target, str | os.PathLike) or hasattr(target, "name"):
            source = Path(name_of(target))
            sources = embedding_files(source) if source.is_dir() else (source,)
            if path.exists() and any(file.exists() and path.samefile(file) for file in sources):
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
    """Convert a file of adapters or embeddings and prove the result before it is put in place.

    `out` is a file name ending in `.safetensors`, or a folder. Options: `to` (`diffusers`, `kohya`, `comfy`, `a1111`,
    `peft`), `token` (what embeddings are called, one name for each), `family`, `alpha` (`fold`, `header`), `dtype`
    (`fp16`, `bf16`, `fp32`), `config`, `skip` (patterns of tensor names), `rank` and `max_error` (what may be cut),
    `base` (the base model, where what is changed depends on it).
    `validated=False` leaves the proof out; `beside` are other inputs, which the output must not replace. A bad file
    gives findings and writes nothing, or with `strict` raises FileError; a wrong call (the output exists, an unknown
    option) raises UsageError.
    """
    asked = _options(options)
    try:
        with opened_whole(target, max_header, asked.skip, progress) as source:
            planned = _planned(source, asked)
            if planned.ok:
                _check_places(_placed(planned, Path(out)), [target, *beside], force)
                with _base_of(asked.base, planned.detection.family) as weights:
                    planned = _placed(_resolved(planned, source, weights, progress), Path(out))
                    result = _write(source, planned, weights, validated, progress)
            else:
                status: Literal["refused", "failed"] = "refused" if planned.status == "refused" else "failed"
                result = ConvertResult(planned.file, status, planned, findings=planned.findings)
    except FileError as error:
        result = ConvertResult(name_of(target), "failed", findings=error.findings)
    raise_errors(strict, result.findings)
    return replace(result, file=name_of(target))


@contextlib.contextmanager
def _base_of(base: str | Path | None, family: str | None = None) -> Iterator[BaseWeights | None]:
    """The base model's weights, if one is given. Raises UsageError for one of another family."""
    if base is None:
        yield None
        return
    with open_base(base, family) as weights:
        yield weights


def _resolved(planned: Plan, source: Source, weights: BaseWeights | None, progress: Progress | None) -> Plan:
    """The plan with the ranks that `--max-error` needs, which only the values tell."""
    if planned.resolved:
        return planned
    ranks = ranks_for(planned, source, weights, _counter(progress, "measuring", len(planned.steps)))
    return with_embeddings(make_plan(source.header, planned.detection, planned.options, ranks))


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


def _fill(
    files: Sequence[BinaryIO],
    source: Source,
    planned: Plan,
    weights: BaseWeights | None,
    source_sha256: Callable[[], str] | None,
    progress: Progress | None,
) -> tuple[list[Finding], Sequence[Truncation]]:
    """Write the outputs' content, copies without `source_sha256`; returns what was noticed and what was cut."""
    if source_sha256 is None:
        for chunk in source.chunks():
            files[0].write(chunk)
        return [], ()
    findings: list[Finding] = []
    truncations: Sequence[Truncation] = ()
    if planned.steps:
        total = sum(tensor.nbytes for tensor in source.header.tensors.values())
        advance = _counter(progress, "converting", total)
        modules = replace(planned, outputs=planned.outputs[: planned.module_files])
        metadata = [output_metadata(planned, output, __version__) for output in modules.outputs]
        noticed = execute(modules, source, files[: planned.module_files], metadata, source_sha256, advance, weights)
        findings = [*noticed.closing_findings(), *noticed.truncation_findings(planned.options.allowed_error)]
        findings += _idle_findings(noticed.idle, planned)
        truncations = noticed.truncations
    if planned.embeddings and severest(findings) != "error":
        findings += write_embeddings(planned, source, files, source_sha256)
    return findings, truncations


def _write(
    source: Source, planned: Plan, weights: BaseWeights | None, validated: bool, progress: Progress | None
) -> ConvertResult:
    """Execute the plan into the targets' places, unless the values or the proof are bad."""
    findings = list(planned.findings)
    proof: ValidateResult | None = None
    truncated: Sequence[Truncation] = ()
    try:
        # the pool comes last, so that it has ended before a file that it reads is closed; of several files the first
        # one is put in place last
        with contextlib.ExitStack() as written, contextlib.ExitStack() as read, ThreadPoolExecutor(2) as beside:
            files = [written.enter_context(atomic_file(path)) for path in planned.paths]
            configs = _write_configs(planned, written)
            copied = _is_own_output(planned, source)
            hashed = planned.embeddings or not copied  # the record of embeddings names the source of a copy too
            source_sha256 = beside.submit(sha256_of, source.chunks() if hashed else ())
            asked = None if copied else source_sha256.result
            said, truncated = _fill(files, source, planned, weights, asked, progress)
            findings += said
            if severest(findings) == "error":
                raise _AbandonedError
            paths = [*planned.paths, *_write_record(planned, source_sha256.result, files, written)]
            for file in files:
                file.flush()
            on_disk = [beside.submit(os.fsync, file.fileno()) for file in files]
            readers = [_reader(file, read) for file in files]
            hashes = [beside.submit(sha256_of, chunks_of(reader)) for reader in readers]
            if validated:
                proof = _prove_written(planned, readers, configs, source, weights, progress)
                findings += [finding for finding in proof.findings if finding.severity == "error"]
                if not proof.ok:
                    raise _AbandonedError
            records = tuple(
                OutputRecord(str(path), reader.size, sha256.result())
                for path, reader, sha256 in zip(paths, readers, hashes, strict=True)
            )
            for waiting in on_disk:
                waiting.result()
    except _AbandonedError:
        refused = {finding.name for finding in findings if finding.severity == "error"} == {"rank-truncated"}
        status: Literal["refused", "failed"] = "refused" if refused else "failed"
        return ConvertResult(planned.file, status, planned, (), proof, tuple(findings), tuple(truncated))
    return ConvertResult(planned.file, "converted", planned, records, proof, tuple(findings), tuple(truncated))


def _write_record(
    planned: Plan, source_sha256: Callable[[], str], files: list[BinaryIO], written: contextlib.ExitStack
) -> list[Path]:
    """The record of the embeddings, written to its temporary place; `files` gets it too. Its path, if there is one."""
    path = record_path(planned)
    if path is None:
        return []
    file = written.enter_context(atomic_file(path))
    content = json.dumps(record_of(planned, source_sha256()), indent=2, ensure_ascii=False)
    file.write(f"{content}\n".encode(errors="backslashreplace"))  # a file's name need not be UTF-8
    files.append(file)
    return [path]


def _prove_written(
    planned: Plan,
    readers: Sequence[FileReader],
    configs: Sequence[Path | None],
    source: Source,
    weights: BaseWeights | None,
    progress: Progress | None,
) -> ValidateResult:
    """The proof of files that were just written, before they are put in place."""
    family = planned.detection.family
    found = []
    for reader, path, config in zip(readers, planned.paths, configs, strict=False):  # the record comes last
        output = Source(read_header(reader, str(path), MAX_HEADER_LIMIT), reader)
        found.append((output, detect(output, family=family, config=config)))
    return _prove(found, (source, planned.detection), weights, progress, whole=True)


def _write_configs(planned: Plan, written: contextlib.ExitStack) -> list[Path | None]:
    """The configurations that stand beside weight files, each written to its temporary place."""
    places: list[Path | None] = []
    for output, path in zip(planned.outputs, planned.paths, strict=True):
        if output.config is None:
            places.append(None)
            continue
        file = written.enter_context(atomic_file(path.with_name(CONFIG_NAME)))
        file.write(output.config.encode("utf-8"))
        file.flush()
        places.append(Path(file.name))
    return places


def _reader(file: BinaryIO, opened_files: contextlib.ExitStack) -> FileReader:
    return opened_files.enter_context(contextlib.closing(FileReader(open_path(Path(file.name)), owned=True)))


def _is_own_output(planned: Plan, source: Source) -> bool:
    """Whether the file is one of ours already and nothing asked for changes it: then its bytes are the output."""
    metadata = source.header.metadata
    if f"{PROVENANCE}version" not in metadata or len(planned.outputs) > 1:
        return False
    said = tuple(metadata.get(f"{PROVENANCE}{name}") for name in ("token", "family"))
    if any((step.token, planned.detection.family) != said for step in planned.embeddings):
        return False
    output = planned.outputs[0]
    if metadata.get("lora_adapter_metadata") != output.adapter_metadata:
        return False
    tensors = source.header.tensors
    whole = source.header.data_start + planned.bytes == source.reader.size  # nothing was left out by --skip
    return whole and all(
        tensor.name in tensors
        and tensors[tensor.name].dtype == tensor.dtype
        and tensors[tensor.name].shape == tensor.shape
        for tensor in output.tensors
    ) and all(step.copies for step in planned.steps)  # fmt: skip


def _idle_findings(idle: Sequence[str], planned: Plan) -> list[Finding]:
    if not idle:
        return []
    if len(idle) == len(planned.steps):
        return [Finding("no-effect", "warning", "", "Every module's change is zero: the file changes nothing.")]
    return [Finding("no-effect", "note", "", f"{len(idle)} modules change nothing (all zeros): {listed(idle)}.")]


def _prove(
    outputs: Sequence[Opened],
    against: Opened,
    weights: BaseWeights | None,
    progress: Progress | None,
    *,
    whole: bool,
    record: Sequence[Finding] = (),
) -> ValidateResult:
    """The rungs of the proof, on open outputs against an open source; `whole` if there are no other outputs of it,
    `record` is what is wrong with the record beside them.
    """
    truth = against[1]
    adapters = [(source, found) for source, found in outputs if found.kind != "embedding"]
    embeddings = [(source, found) for source, found in outputs if found.embeddings]
    advance = _counter(progress, "proving", sum(len(found.payload) for _, found in adapters))
    structure = check_structure([found for _, found in outputs])
    rungs = {"structure": structure}
    if structure.status != "fail":
        if adapters or truth.payload:
            rungs["numbers"] = check_numbers(adapters, [against])
            rungs["delta"] = check_deltas(adapters, [against], weights, advance)
        elif embeddings:
            rungs["numbers"] = check_values(embeddings)
        if embeddings or (truth.embeddings and (whole or not truth.payload)):
            rungs["vectors"] = check_vectors(embeddings, against, record)
        elif truth.embeddings:
            reason = "the source carries embeddings, whose files were not given; give the folder"
            rungs["vectors"] = Rung("skipped", reason)
    return _verdict(outputs[0][0].header.path, truth.file, outputs[0][1].family, rungs)


def _verdict(name: str, against: str | None, family: str | None, rungs: Mapping[str, Rung]) -> ValidateResult:
    failed = any(rung.status == "fail" for rung in rungs.values())
    findings = tuple(finding for rung in rungs.values() for finding in rung.findings)
    return ValidateResult(name, against, "fail" if failed else "pass", family, rungs, findings)


def validate(
    out: Target,
    against: Target | None = None,
    *,
    family: str | None = None,
    config: str | Path | None = None,
    base: str | Path | None = None,
    max_header: int = MAX_HEADER,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
    strict: bool = False,
) -> ValidateResult:
    """Check a LoRA file: structure and numbers, and with `against` what every module changes against that source.

    `out` may be a folder that `convert` wrote, all of whose weight files count. `family` decides ties for both sides;
    `config` is the source's peft configuration, `skip` leaves tensors of the source out, `base` is the model whose
    weights decide what some algorithms change. A bad file gives a result with status `fail`, or with `strict` raises
    FileError.
    """
    try:
        with contextlib.ExitStack() as stack:
            weights = stack.enter_context(_base_of(base))
            files = _open_outputs(out, stack, max_header, progress)
            if against is None:
                result = _verdict_alone([(file, detect(file, family=family, config=config)) for file in files])
            else:
                truth = _open_truth(against, stack, progress, family, config, max_header, skip)
                family = family or truth[1].family
                outputs = [(file, detect(file, family=family)) for file in files]
                folder = Path(out) if isinstance(out, str | os.PathLike) and Path(out).is_dir() else None
                record = check_record(folder, outputs) if folder else ()
                result = _prove(outputs, truth, weights, progress, whole=folder is not None, record=record)
            result = replace(result, file=name_of(out))
    except FileError as error:
        broken = Rung("fail", "the file cannot be read", findings=error.findings)
        result = ValidateResult(name_of(out), None, "fail", None, {"structure": broken}, error.findings)
    except _UnsoundError as error:
        rungs = {"structure": Rung("fail", "the source itself is not sound")}
        result = ValidateResult(name_of(out), name_of(error.source), "fail", None, rungs, error.findings)
    raise_errors(strict, result.findings)
    return result


class _UnsoundError(Exception):
    """What is wrong with a source, said to be the source's."""

    def __init__(self, source: Target, findings: Sequence[Finding]) -> None:
        self.source = source
        self.findings = tuple(replace(said, message=f"(in the source) {said.message}") for said in findings)


def _open_outputs(out: Target, stack: contextlib.ExitStack, max_header: int, progress: Progress | None) -> list[Source]:
    local = local_path(out, progress)
    paths: Sequence[Path] = ()
    if isinstance(local, str | os.PathLike):
        paths = output_files(local)
        if Path(local).is_dir():
            paths = (*paths, *embedding_files(local))
    return [stack.enter_context(opened(path, max_header)) for path in paths or (local,)]


def _open_truth(
    against: Target,
    stack: contextlib.ExitStack,
    progress: Progress | None,
    family: str | None,
    config: str | Path | None,
    max_header: int,
    skip: Sequence[str],
) -> Opened:
    """The source, open, with what it is. Raises _UnsoundError."""
    try:
        source = stack.enter_context(opened_whole(against, max_header, skip, progress))
        truth = detect(source, family=family, config=config)
    except FileError as error:
        raise _UnsoundError(against, error.findings) from None
    if (truth.family is None and not truth.embeddings) or not truth.ok:
        raise _UnsoundError(against, truth.findings)
    return source, truth


def _verdict_alone(outputs: Sequence[Opened]) -> ValidateResult:
    rungs = {"structure": check_structure([found for _, found in outputs])}
    embeddings = [output for output in outputs if output[1].kind == "embedding"]
    adapters = [output for output in outputs if output[1].kind != "embedding"]
    if rungs["structure"].status == "pass":
        numbers = [check_numbers(adapters)] if adapters else []
        numbers += [check_values(embeddings)] if embeddings else []
        rungs["numbers"] = max(numbers, key=lambda rung: rung.status == "fail")
    reason = "there is no source to compare with (--against)"
    rungs |= {"delta": Rung("skipped", reason)} if adapters else {}
    rungs |= {"vectors": Rung("skipped", reason)} if embeddings else {}
    return _verdict(outputs[0][0].header.path, None, outputs[0][1].family, rungs)

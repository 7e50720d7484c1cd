"""The files of a merged model: which there are, and writing them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora_convert.containers import open_source
from lora_convert.containers.dtypes import BITS, WEIGHTS
from lora_convert.containers.header import MAX_HEADER_LIMIT
from lora_convert.containers.source import FileReader, chunks_of, open_path
from lora_convert.converters.baking import Changes, Written, content
from lora_convert.converters.base import PARAMETERS, BaseWeights, WeightFile, opened_file, refuse_twice
from lora_convert.converters.checkpoint import PREFIXES, VAE_PREFIX, WRITTEN, original_names, vae_name
from lora_convert.converters.metadata import PROVENANCE, STALE
from lora_convert.converters.models import (
    by_variant,
    files_in,
    model_files,
    read_index,
    read_object,
    weights_of,
    without_variant,
)
from lora_convert.converters.plan import OutputTensor
from lora_convert.converters.writer import flush_folder, header_bytes
from lora_convert.errors import UsageError
from lora_convert.families import FAMILIES
from lora_convert.report import listed, shown

__all__ = ["FileRecord", "MergePlan", "OutputFile", "plan_checkpoint", "plan_folder", "write_merged"]

Advance = Callable[[int], None]


@dataclass(frozen=True)
class OutputFile:
    """A weight file whose tensors are written one by one; `name` is relative to the output, with `/`."""

    name: str
    written: tuple[Written, ...]
    metadata: Mapping[str, str]

    @property
    def tensors(self) -> list[OutputTensor]:
        return [written.tensor for written in self.written]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class MergePlan:
    """All files of a merged model: those that are written anew, and those that are copied, (from, name)."""

    files: tuple[OutputFile, ...]
    copies: tuple[tuple[Path, str], ...] = ()
    dtype: str | None = None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files) + sum(path.stat().st_size for path, _ in self.copies)


def _written(file: WeightFile, tensor: str, changes: Changes, dtype: str | None) -> Written:
    """A tensor under its own name; `dtype` is for those that adapters can change."""
    info = file.source.header.tensors[tensor]
    retyped = dtype if dtype and info.dtype in WEIGHTS and (file, tensor) in changes.inhabitants else info.dtype
    return Written(OutputTensor(tensor, retyped, info.shape, "weight"), ((file, tensor),))


def _same_layout(
    file: WeightFile, name: str, changes: Changes, dtype: str | None, provenance: Mapping[str, str]
) -> OutputFile:
    header = file.source.header
    order = sorted(header.tensors, key=lambda tensor: header.tensors[tensor].where.start)
    written = tuple(_written(file, tensor, changes, dtype) for tensor in order)
    return OutputFile(name, written, merged_metadata(header.metadata, provenance))


def merged_metadata(own: Mapping[str, str], provenance: Mapping[str, str]) -> dict[str, str]:
    """The base model's metadata without hashes of its content, and where the changes came from.

    What was merged into the base before is told first.
    """
    kept = {key: value for key, value in own.items() if key not in STALE}
    before = {key: f"{kept[key]}," for key in _LISTS if key in kept and key in provenance}
    return kept | {key: before.get(key, "") + value for key, value in provenance.items()}


_LISTS = (f"{PROVENANCE}source_sha256", f"{PROVENANCE}scale")


def plan_folder(base: BaseWeights, changes: Changes, dtype: str | None, provenance: Mapping[str, str]) -> MergePlan:
    """A Diffusers folder like the base's: weights in one form and without a variant in their names, all else as it is.

    Raises UsageError for a component whose weights are in no safetensors file.
    """
    index = read_index(base.path, base.name)
    found = (*base.path.glob("*"), *base.path.glob("*/**/*"))  # of components that are links too, unlike `rglob`
    every = sorted(path.relative_to(base.path).as_posix() for path in found if path.is_file())
    names = model_files(every, index, base.name)
    files = []
    for file in base.files:
        output = _same_layout(file, without_variant(file.name), changes, dtype, provenance)
        if not all(written.is_copy(changes) for written in output.written):
            files.append((file.name, output))
    baked = {name for name, _ in files}
    copies = tuple((base.path / name, without_variant(name)) for name in names if name not in baked)
    return MergePlan(tuple(output for _, output in files), copies, dtype)


def plan_checkpoint(
    stack: contextlib.ExitStack,
    base: BaseWeights,
    changes: Changes,
    name: str,
    dtype: str | None,
    provenance: Mapping[str, str],
) -> MergePlan:
    """One checkpoint: the base's layout if it is one, else that of LDM or SGM. The stack closes what is opened for it.

    Raises UsageError for a folder whose family or tensors have no such layout here.
    """
    if base.files[0].component is None:
        return MergePlan((_same_layout(base.files[0], name, changes, dtype, provenance),), dtype=dtype)
    if base.family not in WRITTEN:
        said = f"a checkpoint of {FAMILIES[base.family].title} cannot be written from a folder"
        raise UsageError(f"{said}; leave out --single-file")
    written = [*_model_tensors(base, changes, dtype), *_vae_tensors(stack, base)]
    written.sort(key=lambda one: (-BITS[one.tensor.dtype], one.tensor.dtype, one.tensor.name))
    return MergePlan((OutputFile(name, tuple(written), merged_metadata({"format": "pt"}, provenance)),), dtype=dtype)


_DERIVED = ("position_ids",)
"""Ends of names of buffers that every reader makes itself."""


def _model_tensors(base: BaseWeights, changes: Changes, dtype: str | None) -> Iterator[Written]:
    """The UNet and the text encoders under their original names; blocks of rows become one tensor."""
    pieces: dict[tuple[str, bool], list[tuple[int, tuple[WeightFile, str]]]] = {}
    for module in FAMILIES[base.family].modules.values():
        prefix = PREFIXES[base.family][module.component]
        for parameter in PARAMETERS:
            place = base.places.get((module.name, parameter))
            if place is not None:
                name, transposed = next(original_names(module, parameter))
                row = module.rows[0] if module.rows else 0
                pieces.setdefault((prefix + name, transposed), []).append((row, (place.file, place.tensor)))
    used = {piece for stored in pieces.values() for _, piece in stored}
    every = [(file, tensor) for file in base.files for tensor in file.source.header.tensors]
    unknown = [tensor for file, tensor in every if (file, tensor) not in used and not tensor.endswith(_DERIVED)]
    if unknown:
        said = f"{listed(unknown, 3)} of {shown(base.name)} have no name in a checkpoint"
        raise UsageError(f"{said}; leave out --single-file")
    for (name, transposed), stored in pieces.items():
        yield _joined(name, tuple(piece for _, piece in sorted(stored, key=lambda item: item[0])), transposed, dtype)


def _joined(name: str, pieces: tuple[tuple[WeightFile, str], ...], transposed: bool, dtype: str | None) -> Written:
    infos = [file.source.header.tensors[tensor] for file, tensor in pieces]
    shape = (sum(info.shape[0] for info in infos), *infos[0].shape[1:])
    stored = max((info.dtype for info in infos), key=lambda dtype: (BITS[dtype], dtype))
    tensor = OutputTensor(name, dtype or stored, shape[::-1] if transposed else shape, "weight")
    return Written(tensor, pieces, transposed)


def _vae_tensors(stack: contextlib.ExitStack, base: BaseWeights) -> Iterator[Written]:
    names = weights_of([name for name in files_in(base.path) if name.startswith("vae/")])
    if not names:
        raise UsageError(
            f"{shown(base.name)} has no VAE in safetensors, which a checkpoint has; leave out --single-file"
        )
    files = [opened_file(stack, base.path / name, name, "vae") for name in names]
    refuse_twice(base.name, files)
    tensors = [(file, tensor) for file in files for tensor in file.source.header.tensors]
    blocks = {tensor.split(".")[2] for _, tensor in tensors if tensor.startswith("decoder.up_blocks.")}
    for file, tensor in tensors:
        info = file.source.header.tensors[tensor]
        name, kernel = vae_name(tensor, len(blocks))
        shape = (*info.shape, 1, 1) if kernel and len(info.shape) == 2 else info.shape
        yield Written(OutputTensor(VAE_PREFIX + name, info.dtype, shape, "weight"), ((file, tensor),))


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that was put together: its name, and the SHA-256 of what was written to it."""

    name: str
    sha256: str


def write_merged(plan: MergePlan, changes: Changes, folder: Path, advance: Advance) -> list[FileRecord]:
    """Write all files of a plan below a folder, flushed to disk. Raises FileError for values that cannot be written."""
    records = []
    for path, name in plan.copies:
        with _new_file(folder / name) as file, contextlib.closing(FileReader(open_path(path), owned=True)) as reader:
            records.append(FileRecord(name, _write(file, chunks_of(reader), advance)))
    for output in plan.files:
        with _new_file(folder / output.name) as file:
            records.append(FileRecord(output.name, _write(file, _file_content(output, changes), advance)))
    records += _write_texts(_indices(folder), folder)
    if plan.dtype:
        components = {output.name.partition("/")[0] for output in plan.files if "/" in output.name}
        again = _write_texts(_retyped_configs(folder, components, plan.dtype, changes.base.name), folder)
        renewed = {record.name for record in again}
        records = [record for record in records if record.name not in renewed] + again
    return sorted(records, key=lambda record: record.name)


def _file_content(output: OutputFile, changes: Changes) -> Iterator[bytes | memoryview]:
    yield header_bytes(output.tensors, output.metadata)
    for written in output.written:
        yield from content(written, changes)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    flush_folder(path.parent)


def _write(file: BinaryIO, chunks: Iterator[bytes | memoryview], advance: Advance) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        file.write(chunk)
        digest.update(chunk)
        advance(len(chunk))
    return digest.hexdigest()


def _write_texts(texts: Iterator[tuple[str, str]], folder: Path) -> list[FileRecord]:
    records = []
    for name, text in texts:
        with _new_file(folder / name) as file:
            records.append(FileRecord(name, _write(file, iter([text.encode()]), lambda _: None)))
    return records


def _indices(folder: Path) -> Iterator[tuple[str, str]]:
    """For weights in several files the index that loaders ask for, name and content."""
    names = files_in(folder)
    for component in sorted({name.partition("/")[0] for name in names}):
        parts = by_variant([name for name in names if name.startswith(f"{component}/")]).get(None, [])
        if not parts or parts[0]["of"] is None:
            continue
        places: dict[str, str] = {}
        total = 0
        for part in parts:
            with open_source(folder / part.string, MAX_HEADER_LIMIT) as source:
                places |= dict.fromkeys(source.header.tensors, part.string.rpartition("/")[2])
                total += sum(tensor.nbytes for tensor in source.header.tensors.values())
        stem = parts[0].string.rpartition("-of-")[0].rpartition("-")[0]
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        yield f"{stem}.safetensors.index.json", json.dumps(content, indent=2) + "\n"


_NAMES_OF_DTYPES: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def _retyped_configs(folder: Path, components: set[str], dtype: str, model: str) -> Iterator[tuple[str, str]]:
    """Configurations that state the dtype of their weights (transformers'), stating the new one."""
    for component in sorted(components):
        name = f"{component}/config.json"
        config = read_object(folder, name, model) if (folder / name).is_file() else {}
        stated = {key: _NAMES_OF_DTYPES[dtype] for key in ("dtype", "torch_dtype") if key in config}
        if stated:
            yield name, json.dumps(config | stated, indent=2, ensure_ascii=False) + "\n"

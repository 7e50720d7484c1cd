"""A base model's own weights, one module at a time: some kinds of adapters are defined on them, `merge` changes them.

Headers are read first and tensors by seek and read, so that a model of any size costs the memory of its largest module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from lora_convert.containers import Source, open_source
from lora_convert.containers.dtypes import WEIGHTS, nbytes, to_array
from lora_convert.containers.header import MAX_HEADER_LIMIT
from lora_convert.converters.checkpoint import PREFIXES, component_names, original_names
from lora_convert.converters.models import (
    INDEX,
    KINDS_OF_BASES,
    KNOWN_FAMILIES,
    BasePlace,
    adaptable_weights,
    files_in,
    located,
    model_files,
    read_index,
)
from lora_convert.errors import FileError, UsageError
from lora_convert.families import FAMILIES, Family, Module
from lora_convert.families.fitting import matching_family
from lora_convert.report import listed, shown

__all__ = ["BaseWeights", "ParameterPlace", "WeightFile", "open_base", "opened_file", "refuse_twice"]

Array = NDArray[Any]

PARAMETERS = ("weight", "bias")

_SCALED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".absmax", ".quant_map")
"""Ends of names that only models in scaled or quantised forms have: their tensors are not the weights."""


@dataclass(frozen=True, eq=False)
class WeightFile:
    """One open weight file. `name` is its path inside the model, `component` None for a checkpoint of several."""

    name: str
    component: str | None
    source: Source


@dataclass(frozen=True, slots=True)
class ParameterPlace:
    """Where a module's parameter lies: in a tensor of a file, in a block of its rows, or as its transpose."""

    file: WeightFile
    tensor: str
    rows: tuple[int, int] | None = None
    transposed: bool = False


Places = Mapping[tuple[str, str], ParameterPlace]
"""Where parameters lie, by the module's pipeline name and `weight` or `bias`."""


class BaseWeights:
    """The weights of an open base model. `family` is found by names and shapes; `places` says where all lie."""

    def __init__(self, name: str, family: str, files: Sequence[WeightFile], places: Places, path: Path) -> None:
        self.name, self.family, self.path = name, family, path
        self.files, self.places = tuple(files), places

    def lacking(self, modules: Sequence[Module]) -> list[str]:
        """Pipeline names of the modules that this model has no weight for."""
        return [module.name for module in modules if (module.name, "weight") not in self.places]

    def of(self, modules: Sequence[Module]) -> dict[str, Array]:
        """`weight`, and `bias` if there is one, float32; of several modules the rows one under the other.

        Shapes are the modules' own: (out, in), (out, in, kh, kw), (n,) of a norm and of biases. Raises UsageError for
        a module that the model lacks or has in another size, FileError if reading fails.
        """
        lacking = self.lacking(modules)
        if lacking:
            raise UsageError(f"the base model {shown(self.name)} has no {listed(lacking)}")
        found = {}
        for parameter in PARAMETERS:
            if all((module.name, parameter) in self.places for module in modules):
                parts = [self.parameter(module, parameter) for module in modules]
                found[parameter] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found

    def parameter(self, module: Module, parameter: str) -> Array:
        """One of them, `weight` or `bias`; raises KeyError if the module has none."""
        values = read_stored(self.places[module.name, parameter]).astype(np.float32)
        shape = module.shape if parameter == "weight" else module.shape[:1]
        if values.size != int(np.prod(shape)):
            sizes = "×".join(map(str, values.shape)), "×".join(map(str, shape))
            raise UsageError(
                f"{module.name} of the base model {shown(self.name)} is {sizes[0]}, and the file's is {sizes[1]}"
            )
        return values.reshape(shape)


def read_stored(stored: ParameterPlace) -> Array:
    """A parameter in its dtype and its file's shape, upright and without the rows of others. Raises FileError."""
    source = stored.file.source
    info = source.header.tensors[stored.tensor]
    if stored.rows is None:
        values = source.read(stored.tensor)
    else:
        first, stop = stored.rows
        row = nbytes(info.dtype, info.shape[1:])
        data = source.reader.read_at(info.where.start + first * row, (stop - first) * row)
        values = to_array(data, info.dtype, (stop - first, *info.shape[1:]))
    return values.T if stored.transposed else values


@contextlib.contextmanager
def open_base(base: str | Path, family: str | None = None, *, whole: bool = False) -> Iterator[BaseWeights]:
    """Open a base model's weights, closed at the end of the block.

    `base` is an embedded model's name, a Diffusers folder, a single-file checkpoint (or a UNet alone) as safetensors,
    a repository on the hub (`owner/repo`, `owner/repo@revision`), or the `hf://` address of a checkpoint. `family` is
    the one that is asked for. `whole` also brings from the hub what is no weight of the UNet or a text encoder.

    Raises UsageError for a base that does not exist, is a pickle, quantised or of another family, FileError for one
    that is damaged or cannot be fetched.
    """
    place = located(base)
    with contextlib.ExitStack() as stack:
        if place.location == "file":
            path = _downloaded_file(place)
            files = [opened_file(stack, path, place.name, None)]
        else:
            path = _downloaded_folder(place, whole) if place.location == "hub" else place.path
            files = [
                opened_file(stack, path / name, name, name.partition("/")[0])
                for name in chosen_weights(path, place.name)
            ]
        refuse_twice(place.name, files)
        found, places = _recognised(place.name, files)
        _check_family(place.name, found, family)
        _check_numbers(place.name, places)
        yield BaseWeights(place.name, found, files, places, path)


def chosen_weights(model: Path, name: str) -> list[str]:
    """The weight files of a Diffusers folder's UNet and text encoders, as `component/file`."""
    index = read_index(model, name)
    return adaptable_weights(files_in(model), index, name)


def opened_file(stack: contextlib.ExitStack, path: Path, name: str, component: str | None) -> WeightFile:
    """A weight file that the stack closes. Raises FileError, with the file's name as the subject."""
    try:
        return WeightFile(name, component, stack.enter_context(open_source(path, MAX_HEADER_LIMIT, pickles=False)))
    except FileError as error:
        raise FileError([replace(finding, subject=name) for finding in error.findings]) from None


def refuse_twice(name: str, files: Sequence[WeightFile]) -> None:
    """Raise UsageError for a component that is there whole and in parts: one of them would be read, unasked."""
    seen: dict[tuple[str | None, str], str] = {}
    for file in files:
        for tensor in file.source.header.tensors:
            other = seen.setdefault((file.component, tensor), file.name)
            if other is not file.name:
                said = f"{shown(tensor)} of {shown(name)} is in {shown(other)} and in {shown(file.name)}"
                raise UsageError(f"{said}; remove one of the two forms of the model")


def _downloaded_file(place: BasePlace) -> Path:
    if not place.name.startswith("hf://"):
        return place.path
    from lora_convert.containers.hub import download

    return download(place.name, quiet=True)


def _downloaded_folder(place: BasePlace, whole: bool) -> Path:
    """A repository's folder in the hub's cache, with the weights that are read, or with all that makes the model."""
    from lora_convert.containers.hub import download_folder

    address = f"hf://{place.name}" + (f"@{quote(place.revision, safe='/')}" if place.revision else "")
    index = read_index(download_folder(address, lambda _: [INDEX]), place.name)
    choose = model_files if whole else adaptable_weights
    return download_folder(address, lambda names: [INDEX, *choose(names, index, place.name)])


def _recognised(name: str, files: Sequence[WeightFile]) -> tuple[str, Places]:
    """The family of a base model, and where its parameters lie."""
    for family in FAMILIES.values():
        places = _places(family, files)
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for (module, parameter), stored in places.items():
            if parameter == "weight":
                component, _, path = module.partition(".")
                shapes.setdefault(component, {})[path] = _shape(family.modules[module], stored)
        if matching_family(shapes, [family]) is not None:
            return family.name, places
    if files[0].component is None:
        said = f"{shown(name)} holds no UNet under a checkpoint's or Diffusers' names and in known sizes"
        raise UsageError(f"{said}; {KNOWN_FAMILIES}; {KINDS_OF_BASES}")
    raise UsageError(f"the UNet or a text encoder of {shown(name)} is of other sizes; {KNOWN_FAMILIES}")


def _places(family: Family, files: Sequence[WeightFile]) -> dict[tuple[str, str], ParameterPlace]:
    places = {}
    for component in family.components:
        prefix = PREFIXES[family.name][component.name]
        mine = [file for file in files if file.component in (None, component.name)]
        for module in component.modules.values():
            for parameter in PARAMETERS:
                stored = next(_found(module, parameter, mine, prefix), None)
                if stored is not None:
                    places[module.name, parameter] = stored
    return places


def _found(module: Module, parameter: str, files: Sequence[WeightFile], prefix: str) -> Iterator[ParameterPlace]:
    """Where a parameter lies under one of the names that it may have."""
    for file in files:
        tensors = file.source.header.tensors
        if file.component is None:
            for name, transposed in original_names(module, parameter):
                for full in (prefix + name, *([name] if module.component == "unet" else [])):
                    if full in tensors:
                        yield ParameterPlace(file, full, module.rows, transposed)
        if file.component is not None or module.component == "unet":  # a UNet alone has no component to say so
            for name, _ in component_names(module, parameter):
                if name in tensors:
                    yield ParameterPlace(file, name)


def _shape(module: Module, stored: ParameterPlace) -> tuple[int, ...]:
    """The stored weight's shape, as the module's own if only the 1×1 of a kernel is there or not."""
    shape = stored.file.source.header.tensors[stored.tensor].shape
    if stored.rows is not None:
        shape = (stored.rows[1] - stored.rows[0], *shape[1:]) if stored.rows[1] <= shape[0] else ()
    if stored.transposed:
        shape = shape[::-1]
    return module.shape if _matrix(shape) == _matrix(module.shape) else shape


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _check_family(name: str, found: str, wanted: str | None) -> None:
    if wanted is not None and found != wanted:
        said = f"the base model {shown(name)} is {FAMILIES[found].title}, and the file is for {FAMILIES[wanted].title}"
        raise UsageError(f"{said}; give a base of {wanted}")


def _check_numbers(name: str, places: Places) -> None:
    """Raise UsageError for a model whose tensors are not its weights."""
    for file in dict.fromkeys(stored.file for stored in places.values()):
        scaled = next((tensor for tensor in file.source.header.tensors if tensor.endswith(_SCALED)), None)
        if scaled is not None:
            raise UsageError(
                f"{shown(name)} is in a scaled or quantised form ({shown(scaled)}); give it in fp16 or bf16"
            )
    for stored in places.values():
        dtype = stored.file.source.header.tensors[stored.tensor].dtype
        if dtype not in WEIGHTS:
            raise UsageError(f"{shown(stored.tensor)} of {shown(name)} is {dtype}; give the base model in fp16 or bf16")

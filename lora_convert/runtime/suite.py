"""Suites of golden pictures: a TOML file that says what is drawn, read strictly.

    [suite]                                    # holds for every case that does not say otherwise
    base = "tiny-sd15"
    steps = 8

    [[case]]
    name = "neon"
    adapter = "lora/neon.safetensors"          # beside the suite's file; a list for several; left out: the base alone
    prompts = ["a red circle on a blue background"]
    seeds = [0, 1]

docs/golden.md has all keys. Whatever is wrong is one sentence that names the file, the table and the key.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lora_convert.converters.convert import output_files
from lora_convert.converters.embeddings import embedding_files
from lora_convert.converters.writer import RESERVED
from lora_convert.errors import UsageError
from lora_convert.report import printable, shown
from lora_convert.runtime.policy import FIGURES
from lora_convert.runtime.rendering import Settings

__all__ = ["Case", "GoldenPicture", "Suite", "SuiteAdapter", "read_suite"]

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
_DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class SuiteAdapter:
    """An adapter of a case: as the suite writes it, where it lies (a path, or an address on a hub), and its scale."""

    written: str
    file: str
    scale: Any


@dataclass(frozen=True)
class GoldenPicture:
    """One picture: `<case>/<nn>`, counted from 00 through the prompts and, for each, the seeds."""

    id: str
    settings: Settings


@dataclass(frozen=True)
class Case:
    """Pictures of one base with the same adapters. `tolerance` has the figures that replace the policy's."""

    name: str
    base: str
    adapters: tuple[SuiteAdapter, ...]
    pictures: tuple[GoldenPicture, ...]
    tolerance: Mapping[str, float]
    effect: bool
    """Whether the adapters must change the picture."""


@dataclass(frozen=True)
class Suite:
    """What a suite's file says, defaults filled in."""

    path: Path
    goldens: Path
    device: str
    dtype: str
    cases: tuple[Case, ...]

    def only(self, names: Sequence[str]) -> tuple[Case, ...]:
        """The cases of these names, all if there are none. Raises UsageError for a name that no case has."""
        known = {case.name for case in self.cases}
        for name in names:
            if name not in known:
                raise UsageError(f"{shown(str(self.path))} has no case {_quoted(name)}{_meant(name, known)}")
        return tuple(case for case in self.cases if not names or case.name in names)


@dataclass(frozen=True)
class _Place:
    """A table of a suite, for what is said of it."""

    path: Path
    table: str

    def wrong(self, said: str) -> UsageError:
        return UsageError(f"{shown(str(self.path))}: {self.table}: {said}")

    def unlike(self, key: str, wanted: str, value: object) -> UsageError:
        return self.wrong(f"{key} must be {wanted}; it is {shown(repr(value))}")


def read_suite(path: str | Path) -> Suite:
    """Read and check a suite; adapters must exist, base models are looked at when they are opened.

    Raises UsageError, in a sentence, for whatever is wrong.
    """
    path = Path(path)
    content = _toml(path)
    top = _Place(path, "the file")
    _refuse_unknown(top, content, ("suite", "case"))
    defaults = content.get("suite", {})
    if not isinstance(defaults, dict):
        raise top.wrong("write the defaults under [suite], once")
    entries = content.get("case", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise top.wrong("write each case under [[case]], with two brackets")
    if not entries:
        raise top.wrong("it has no case; each begins with [[case]] and a name")
    common = _read(_Place(path, "[suite]"), defaults, {**_OF_SUITE, **_OF_BOTH})
    cases = tuple(_case(path, number, entry, common) for number, entry in enumerate(entries, 1))
    _refuse_twice(top, [case.name for case in cases])
    goldens = path.parent / common.get("goldens", "golden")
    return Suite(path, goldens, common.get("device", "auto"), common.get("dtype", "fp32"), cases)


def _toml(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"the suite {shown(str(path))} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the suite {shown(str(path))} is no text in UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        said = printable(str(error)) or "too many levels"
        raise UsageError(f"the suite {shown(str(path))} is no TOML: {said}") from None


def _case(path: Path, number: int, entry: Mapping[str, Any], common: Mapping[str, Any]) -> Case:
    unnamed = _Place(path, f"case {number}")
    if "name" not in entry:
        raise unnamed.wrong("it has no name")
    name = _file_name(unnamed, "name", entry["name"])
    place = _Place(path, f"case {_quoted(name)}")
    said = {**_DEFAULTS, **common, **_read(place, entry, {**_OF_CASE, **_OF_BOTH})}
    for key in ("base", "prompts"):
        if key not in said:
            raise place.wrong(f"it has no {key}, and [suite] has none either")
    adapters = tuple(_adapter(place, adapter, said["scale"]) for adapter in said["adapter"])
    return Case(
        name, _base(path, said["base"]), adapters, _pictures(place, name, said), said["tolerance"], said["effect"]
    )


def _pictures(place: _Place, name: str, said: Mapping[str, Any]) -> tuple[GoldenPicture, ...]:
    width, height = said["size"]
    pictures = []
    for number, (prompt, seed) in enumerate(product(said["prompts"], said["seeds"])):
        settings = Settings(
            prompt=prompt,
            negative_prompt=said["negative_prompt"],
            steps=said["steps"],
            guidance=said["guidance"],
            width=width,
            height=height,
            scheduler=said["scheduler"],
            seed=seed,
        )
        try:
            pictures.append(GoldenPicture(f"{name}/{number:02}", settings.checked()))
        except UsageError as error:
            raise place.wrong(str(error)) from None
    return tuple(pictures)


def _base(path: Path, base: str) -> str:
    """The base as `open_pipeline` takes it: a folder or file beside the suite goes before a name on the hub."""
    from lora_convert.runtime.bases import NAMES

    beside = path.parent / base
    return str(beside) if base not in NAMES and beside.exists() else base


def _adapter(place: _Place, adapter: tuple[str, Any], scale: Any) -> SuiteAdapter:
    written, own_scale = adapter
    file = written
    if not written.startswith("hf://"):
        file = str(place.path.parent / written)
        embedded = embedding_files(file) if Path(file).is_dir() else ()
        if not embedded and not any(path.is_file() for path in output_files(file)):
            raise place.wrong(f"the adapter {shown(written)} is not a file beside the suite")
    return SuiteAdapter(written, file, scale if own_scale is None else own_scale)


def _read(place: _Place, content: Mapping[str, Any], keys: Mapping[str, _Reader]) -> dict[str, Any]:
    _refuse_unknown(place, content, tuple(keys))
    return {key: keys[key](place, key, value) for key, value in content.items()}


def _refuse_unknown(place: _Place, content: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in content:
        if key in keys:
            continue
        if key in _OF_SUITE:
            raise place.wrong(f"{key} holds for all cases; write it under [suite]")
        if key in _OF_CASE:
            raise place.wrong(f"{key} belongs to one case; write it under [[case]]")
        raise place.wrong(f"there is no key {_quoted(key)}{_meant(key, keys)}")


def _meant(name: str, known: Sequence[str] | set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1)
    return f"; did you mean {_quoted(near[0])}?" if near else f"; there are {', '.join(sorted(known))}"


def _quoted(name: str) -> str:
    return f'"{shown(name)}"'


def _refuse_twice(place: _Place, names: Sequence[str]) -> None:
    """Names that are one to a file system are refused too."""
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            raise place.wrong(f"the cases {_quoted(seen[name.lower()])} and {_quoted(name)} need different names")
        seen[name.lower()] = name


# Readers: each takes one value as TOML gives it and returns it checked. What can be drawn at all, Settings says.

_Reader = Callable[[_Place, str, Any], Any]


def _text(place: _Place, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise place.unlike(key, "text in quotes", value)
    return value


def _some_text(place: _Place, key: str, value: Any) -> str:
    if not _text(place, key, value):
        raise place.wrong(f"{key} is empty")
    return str(value)


def _file_name(place: _Place, key: str, value: Any) -> str:
    name = _text(place, key, value)
    if not _NAME.fullmatch(name) or RESERVED.fullmatch(name):
        said = "a file name of at most 64 letters, digits, dots, hyphens and underscores"
        raise place.unlike(key, said, value)
    return name


def _whole(place: _Place, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise place.unlike(key, "a whole number", value)
    return value


def _number(place: _Place, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise place.unlike(key, "a number", value)
    return value


def _yes_or_no(place: _Place, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise place.unlike(key, "true or false", value)
    return value


def _one_of(choices: Sequence[str]) -> _Reader:
    def read(place: _Place, key: str, value: Any) -> str:
        if value not in choices:
            raise place.unlike(key, f"one of {', '.join(choices)}", value)
        return str(value)

    return read


def _list_of(one: _Reader, what: str) -> _Reader:
    """A list of at least one, each given once."""

    def read(place: _Place, key: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not value:
            raise place.unlike(key, f"a list of {what}", value)
        read_values = [one(place, key, entry) for entry in value]
        twice = next((entry for entry in read_values if read_values.count(entry) > 1), None)
        if twice is not None:
            raise place.wrong(f"{key} has {shown(repr(twice))} twice")
        return tuple(read_values)

    return read


def _size(place: _Place, key: str, value: Any) -> tuple[int, int]:
    both = value if isinstance(value, list) else [value, value]
    if len(both) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in both):
        raise place.unlike(key, "pixels, or [width, height]", value)
    return both[0], both[1]


def _scale(place: _Place, key: str, value: Any) -> Any:
    """A number, or numbers by component and block; which of those there are, the pipeline says."""
    if isinstance(value, dict):
        return {part: _scale(place, f"{key}.{part}", entry) for part, entry in value.items()}
    if isinstance(value, list):
        return [_number(place, key, entry) for entry in value]
    return _number(place, key, value)


def _adapters(place: _Place, key: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """Paths and their own scales (None: the case's). An empty list is none."""
    entries = value if isinstance(value, list) else [value]
    read_entries = []
    for entry in entries:
        if isinstance(entry, dict):
            said = _read(_Place(place.path, f"{place.table}: {key}"), entry, {"file": _some_text, "scale": _scale})
            if "file" not in said:
                raise place.wrong(f"{key} has no file")
            read_entries.append((said["file"], said.get("scale")))
        elif isinstance(entry, str) and entry:
            read_entries.append((entry, None))
        else:
            raise place.unlike(key, 'a path, { file = "…", scale = … }, or a list of them', value)
    return tuple(read_entries)


def _tolerance(place: _Place, key: str, value: Any) -> Mapping[str, float]:
    if not isinstance(value, dict):
        raise place.unlike(key, f"a table of {', '.join(FIGURES)}", value)
    inner = _Place(place.path, f"{place.table}: {key}")
    return _read(inner, value, dict.fromkeys(FIGURES, _number))


_OF_SUITE: Mapping[str, _Reader] = {
    "goldens": _some_text,
    "device": _some_text,
    "dtype": _one_of(_DTYPES),
}
_OF_CASE: Mapping[str, _Reader] = {"name": _file_name}
_OF_BOTH: Mapping[str, _Reader] = {
    "base": _some_text,
    "adapter": _adapters,
    "scale": _scale,
    "prompts": _list_of(_text, "prompts"),
    "negative_prompt": _text,
    "seeds": _list_of(_whole, "whole numbers"),
    "steps": _whole,
    "guidance": _number,
    "size": _size,
    "scheduler": _some_text,
    "tolerance": _tolerance,
    "effect": _yes_or_no,
}
_drawn = asdict(Settings(""))
_DEFAULTS: Mapping[str, Any] = {
    "adapter": (),
    "scale": 1.0,
    "seeds": (0,),
    "size": (None, None),
    "tolerance": {},
    "effect": True,
    **{key: _drawn[key] for key in ("negative_prompt", "steps", "guidance", "scheduler")},
}

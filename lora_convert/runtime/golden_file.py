"""Golden pictures on disk: a PNG with the pixels alone, and a JSON sidecar with all that determined them.

Each file is whole or not there. The sidecar has the SHA-256 of the pixels, so that a picture and a sidecar that do not
belong together (an interrupted recording, a picture touched by hand) are told.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_convert.converters.writer import atomic_file
from lora_convert.errors import FileError
from lora_convert.report import Finding, counted, listed, shown
from lora_convert.runtime.comparing import Difference, picture_of
from lora_convert.runtime.policy import POLICY, Conditions, Tolerance

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Golden",
    "changes_since",
    "read_golden",
    "read_picture",
    "unused_files",
    "versions_since",
    "write_golden",
    "write_picture",
]

SCHEMA = 1


@dataclass(frozen=True)
class Golden:
    """A golden picture and how it came to be."""

    image: Image.Image = field(repr=False)
    record: Mapping[str, Any]
    """What `rendering.render` says of it."""
    repeated: Difference
    """How far it was from the same picture drawn again."""
    disturbed: Difference
    """How far it was from the picture that it becomes when every weight moves by its last bit."""
    base_alone: Difference | None
    """How far it was from the picture of the base without adapters; None if it is that."""
    tolerances: Mapping[str, Tolerance]
    """By what it is judged, by the levels of the policy."""

    @property
    def conditions(self) -> Conditions:
        return Conditions.of(self.record)

    def sidecar(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {
            "schema": SCHEMA,
            "pixels": _digest(self.image),
            "noise": {"repeated": asdict(self.repeated), "disturbed": asdict(self.disturbed)},
            "base_alone": None if self.base_alone is None else asdict(self.base_alone),
            "tolerances": {name: tolerance.as_dict() for name, tolerance in self.tolerances.items()},
            "record": dict(self.record),
        }


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode() + image.tobytes()).hexdigest()


def _paths(folder: Path, id: str) -> tuple[Path, Path]:
    return folder / f"{id}.png", folder / f"{id}.json"


def read_golden(folder: Path, id: str) -> Golden | None:
    """The golden picture of this id, None if there is none. Raises FileError with `golden-damaged`."""
    picture, sidecar = _paths(folder, id)
    missing = [path.name for path in (picture, sidecar) if not path.exists()]
    if len(missing) == 2:
        return None
    try:
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        return _read(picture, sidecar)
    except OSError as error:
        said = error.strerror or str(error)
    except (AttributeError, KeyError, TypeError, RecursionError):
        said = f"{sidecar.name} is no sidecar of this version"
    except ValueError as error:
        said = str(error)
    fix = "Draw it anew with `golden record --update`, or restore both files."
    raise FileError([Finding("golden-damaged", "error", id, f"It cannot be used: {said}.", fix)])


def _read(picture: Path, sidecar: Path) -> Golden:
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{sidecar.name} is no JSON") from None
    if content["schema"] != SCHEMA:
        raise ValueError(f"{sidecar.name} has schema {content['schema']!r}, and this version reads {SCHEMA}")
    noise, alone = content["noise"], content["base_alone"]
    golden = Golden(
        read_picture(picture),
        content["record"],
        _difference(noise["repeated"]),
        _difference(noise["disturbed"]),
        None if alone is None else _difference(alone),
        {name: Tolerance(**_numbers(content["tolerances"][name])) for name in POLICY},
    )
    _ = golden.conditions, *changes_since(golden.record, golden.record)  # raises if the record lacks what they need
    if _digest(golden.image) != content["pixels"]:
        raise ValueError(f"{picture.name} is not the picture that {sidecar.name} tells of")
    return golden


def read_picture(path: Path) -> Image.Image:
    """A PNG picture. Raises OSError if there is none to read, ValueError if it is none or damaged."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return picture_of(image)
    except Exception as error:  # a damaged file: whatever Pillow makes of it
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path.name} is no PNG picture, or is damaged") from None


def _difference(content: Mapping[str, Any]) -> Difference:
    return Difference(**_numbers(content))


def _numbers(content: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in content.items()}


def write_golden(folder: Path, id: str, golden: Golden) -> bool:
    """Write both files; one that says the same already stays byte for byte. Returns whether anything was written.

    Raises UsageError if the folder cannot be written to.
    """
    picture, sidecar = _paths(folder, id)
    content = json.dumps(golden.sidecar(), indent=2, ensure_ascii=True, allow_nan=False).encode() + b"\n"
    written = write_picture(picture, golden.image)
    if sidecar.exists() and sidecar.read_bytes() == content:
        return written
    with atomic_file(sidecar) as file:
        file.write(content)
    return True


def write_picture(path: Path, image: Image.Image) -> bool:
    """Write a PNG of the pixels alone, unless there is one that shows the same. Returns whether it was written.

    Raises UsageError if the folder cannot be written to.
    """
    try:
        if _digest(read_picture(path)) == _digest(image):
            return False
    except (OSError, ValueError):
        pass
    with atomic_file(path) as file:
        image.save(file, "PNG", optimize=True)
    return True


def unused_files(folder: Path, ids: set[str]) -> list[str]:
    """Pictures and sidecars of goldens in the folder that belong to none of the ids, as paths below it."""
    wanted = {path for id in ids for path in _paths(folder, id)}
    found = (path for kind in ("png", "json") for path in folder.glob(f"*/*.{kind}") if path.stem.isdecimal())
    return sorted(path.relative_to(folder).as_posix() for path in found if path not in wanted)


_SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height", "pipeline")


def changes_since(then: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    """What determined a picture with one record and is otherwise in another, a phrase each."""
    for key in _SETTINGS:
        if then.get(key) != record.get(key):
            yield f"{key.replace('_', ' ')} {shown(repr(then.get(key)))}, now {shown(repr(record.get(key)))}"
    yield from _base_changes(then["base"], record["base"])
    yield from _scheduler_changes(then["scheduler"], record["scheduler"])
    yield from _adapter_changes(then["adapters"], record["adapters"])


def _base_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """By the weights, whatever they are called here."""
    digests = [base.get("sha256") or base.get("sampled_sha256") for base in (then, now)]
    if digests[0] != digests[1] or then.get("family") != now.get("family"):
        yield f"base model {shown(str(then.get('name')))}, now {shown(str(now.get('name')))} with other weights"


def _scheduler_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """By class, and what both configurations have: versions add entries."""
    if then["class"] != now["class"]:
        yield f"scheduler {then['class']}, now {now['class']}"
        return
    both = then["config"].keys() & now["config"].keys()
    changed = sorted(key for key in both if then["config"][key] != now["config"][key])
    if changed:
        yield f"the scheduler's {listed(changed)}"


def _adapter_changes(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len(then) != len(now):
        yield f"{counted(len(then), 'adapter')}, now {len(now)}"
        return
    for before, after in zip(then, now, strict=True):
        name = shown(after["file"])
        if before["sha256"] != after["sha256"]:
            yield f"{name} is another file (sha256 {str(before['sha256'])[:10]}…, now {after['sha256'][:10]}…)"
        if before.get("tokens") != after.get("tokens"):
            yield f"tokens of {name} {before.get('tokens')}, now {after.get('tokens')}"
        if before["scale"] != after["scale"]:
            yield f"scale of {name} {before['scale']}, now {after['scale']}"


def versions_since(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Libraries that are others than the golden's, for whoever looks for the cause."""
    before = then["versions"]
    others = [f"{name} {before.get(name)} → {new}" for name, new in now["versions"].items() if before.get(name) != new]
    return f" (since then: {', '.join(others)})" if others else ""

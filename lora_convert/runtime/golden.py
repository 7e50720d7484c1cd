"""Golden pictures: record what a suite draws, and check later that it still does.

`record` also measures what the pictures are worth: how far each is from the base model alone (a golden whose adapter
does nothing would pass without the adapter too), and how far it moves when nothing but last bits change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_convert.errors import FileError
from lora_convert.report import SCHEMA, Finding, counted, listed, severest, shown
from lora_convert.runtime.comparing import Difference, compare
from lora_convert.runtime.golden_file import (
    Golden,
    changes_since,
    read_golden,
    unused_files,
    versions_since,
    write_golden,
)
from lora_convert.runtime.policy import POLICY, Conditions, Tolerance, level_between
from lora_convert.runtime.rendering import Rendering
from lora_convert.runtime.studio import Progress, Studio, disturbed
from lora_convert.runtime.suite import Case, GoldenPicture, Suite, read_suite

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PictureResult", "SuiteResult", "check", "record"]

Status = Literal["pass", "fail", "recorded", "updated", "unchanged", "kept", "refused"]

_RECORD_AGAIN = "If that is meant, look at it and record it again with --update."


@dataclass(frozen=True)
class PictureResult:
    """What came of one picture. `difference` is its distance from the golden picture, where there is one.

    `level` is the policy's, and `differs` what it follows from. The pictures are kept where there is something to say.
    """

    id: str
    status: Status
    level: str | None = None
    differs: tuple[str, ...] = ()
    difference: Difference | None = None
    tolerance: Tolerance | None = None
    findings: tuple[Finding, ...] = ()
    golden: Image.Image | None = field(default=None, repr=False, compare=False)
    drawn: Image.Image | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        return self.status not in ("fail", "refused")

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "status": self.status,
            "level": self.level,
            "differs": list(self.differs),
            "difference": None if self.difference is None else asdict(self.difference),
            "tolerance": None if self.tolerance is None else self.tolerance.as_dict(),
            "findings": [finding.as_dict() for finding in self.findings],
        }


@dataclass(frozen=True)
class SuiteResult:
    """What came of a suite's pictures, in its order. `conditions` is what they were drawn with, None if none were."""

    suite: str
    pictures: tuple[PictureResult, ...]
    conditions: Conditions | None = None
    suite_findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        return all(picture.ok for picture in self.pictures) and severest(self.findings) != "error"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of all pictures, and of the suite."""
        return (*(finding for picture in self.pictures for finding in picture.findings), *self.suite_findings)

    def as_dict(self) -> dict[str, Any]:
        """The content of `golden … --json`."""
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "status": "pass" if self.ok else "fail",
            "conditions": None if self.conditions is None else asdict(self.conditions),
            "pictures": [picture.as_dict() for picture in self.pictures],
            "findings": [finding.as_dict() for finding in self.findings],
        }


def record(
    path: str | Path,
    *,
    update: bool = False,
    cases: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> SuiteResult:
    """Draw the golden pictures that a suite has none of yet; with `update` all of them, replacing what changed.

    `cases` names those to do (default: all); `device` and `dtype` go before the suite's. A picture on which the
    adapters have no effect is refused, with the finding `no-effect`, unless its case has `effect = false`. Raises
    UsageError for what is wrong with the suite, or where nothing can be drawn as it says.
    """
    suite = read_suite(path)
    studio = Studio(suite, device, dtype, progress)
    chosen = suite.only(cases)
    kept = [] if update else [id for case in chosen for id in _ids(case) if _exists(suite, id)]
    results = {id: _kept(suite, id) for id in kept}
    for case, pictures in studio.cases(chosen, skipped=results.keys()):
        results |= {result.id: result for result in _record_case(studio, case, pictures)}
    return _result(studio, chosen, results, ())


def check(
    path: str | Path,
    *,
    cases: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> SuiteResult:
    """Draw a suite's pictures and compare each with its golden picture, as the policy says.

    Arguments and errors are those of `record`.
    """
    suite = read_suite(path)
    studio = Studio(suite, device, dtype, progress)
    chosen = suite.only(cases)
    ids = [id for case in chosen for id in _ids(case)]
    unusable = {id: stored for id in ids if isinstance(stored := _stored(suite, id), Finding)}
    results = {id: PictureResult(id, "fail", findings=(finding,)) for id, finding in unusable.items()}
    for case, pictures in studio.cases(chosen, skipped=unusable):
        results |= {result.id: result for result in _check_case(studio, case, pictures)}
    return _result(studio, chosen, results, _other_conditions(results.values()))


def _ids(case: Case) -> Iterator[str]:
    return (picture.id for picture in case.pictures)


def _exists(suite: Suite, id: str) -> bool:
    return any((suite.goldens / f"{id}{suffix}").exists() for suffix in (".png", ".json"))


def _kept(suite: Suite, id: str) -> PictureResult:
    stored = _stored(suite, id)
    return PictureResult(id, "kept") if isinstance(stored, Golden) else PictureResult(id, "fail", findings=(stored,))


def _stored(suite: Suite, id: str) -> Golden | Finding:
    """The golden picture, or why there is none."""
    try:
        stored = read_golden(suite.goldens, id)
    except FileError as error:
        return error.findings[0]
    fix = f"Draw it with: lora-convert golden record {shown(str(suite.path))}"
    return stored or Finding("golden-missing", "error", id, "There is no golden picture of it.", fix)


def _result(
    studio: Studio, chosen: Sequence[Case], results: Mapping[str, PictureResult], findings: Iterable[Finding]
) -> SuiteResult:
    ordered = tuple(results[id] for case in chosen for id in _ids(case))
    unused = _unused(studio.suite) if len(chosen) == len(studio.suite.cases) else ()
    return SuiteResult(str(studio.suite.path), ordered, studio.conditions, (*findings, *unused))


def _unused(suite: Suite) -> Iterator[Finding]:
    ids = {id for case in suite.cases for id in _ids(case)}
    unused = unused_files(suite.goldens, ids)
    if unused:
        said = f"{counted(len(unused), 'file')} in {suite.goldens.name} that no case draws: {listed(unused)}."
        yield Finding("golden-unused", "warning", "", said, "Delete them, or put the case back.")


def _each(
    studio: Studio,
    case: Case,
    pictures: Sequence[GoldenPicture],
    one: Callable[[GoldenPicture], PictureResult],
) -> Iterator[PictureResult]:
    """What comes of every picture with the case's adapters; what cannot be drawn fails, with the reason."""
    with ExitStack() as applied:
        try:
            applied.enter_context(studio.applied(case))
        except FileError as error:
            yield from (PictureResult(picture.id, "fail", findings=error.findings) for picture in pictures)
            return
        for picture in pictures:
            try:
                yield one(picture)
            except FileError as error:
                yield PictureResult(picture.id, "fail", findings=error.findings)
            studio.step()


def _record_case(studio: Studio, case: Case, pictures: Sequence[GoldenPicture]) -> Iterator[PictureResult]:
    alone: dict[str, Image.Image | None] = {}
    for picture in pictures:
        try:
            alone[picture.id] = studio.alone(case, picture) if case.adapters else None
        except FileError as error:
            yield PictureResult(picture.id, "fail", findings=error.findings)
    drawable = [picture for picture in pictures if picture.id in alone]
    yield from _each(studio, case, drawable, lambda picture: _record_picture(studio, case, picture, alone[picture.id]))


def _record_picture(studio: Studio, case: Case, picture: GoldenPicture, alone: Image.Image | None) -> PictureResult:
    drawing = studio.draw(case, picture)
    image = drawing.images[0]
    repeated = compare(image, studio.draw(case, picture).images[0])
    with disturbed(studio.pipeline(case)):
        moved = compare(image, studio.draw(case, picture).images[0])
    golden = Golden(
        image,
        drawing.record,
        repeated,
        moved,
        None if alone is None else compare(image, alone),
        {level.name: level.above_noise(repeated, moved) for level in POLICY.values()},
    )
    findings = (*drawing.findings, *_worth(picture.id, golden, case))
    if severest(findings) == "error":
        return PictureResult(picture.id, "refused", findings=findings)
    return _write(studio.suite, picture.id, golden, findings)


def _write(suite: Suite, id: str, golden: Golden, findings: tuple[Finding, ...]) -> PictureResult:
    try:
        before = read_golden(suite.goldens, id)
    except FileError:
        before = None
    existed = _exists(suite, id)
    written = write_golden(suite.goldens, id, golden)
    status: Status = "unchanged" if not written else "updated" if existed else "recorded"
    same_size = before is not None and before.image.size == golden.image.size
    difference = compare(before.image, golden.image) if before and same_size else None
    return PictureResult(id, status, difference=difference, findings=findings)


def _worth(id: str, golden: Golden, case: Case) -> Iterator[Finding]:
    """What speaks against a golden picture: it would pass without its adapters, or it hangs on last bits."""
    if golden.base_alone is not None and case.effect:
        strict, loose = (_tolerance(golden, level, case) for level in ("strict", "loose"))
        fix = "Use prompts with its trigger words or a larger scale; `effect = false` in the case accepts it."
        if strict.admits(golden.base_alone):
            said = f"The picture would pass without the case's adapters as well ({golden.base_alone})."
            yield Finding("no-effect", "error", id, said, fix)
        elif loose.admits(golden.base_alone):
            said = f"The adapters change it so little ({golden.base_alone}) that only machines like this one can tell."
            yield Finding("no-effect", "warning", id, said, fix)
    if not POLICY["loose"].tolerance.admits(golden.disturbed):
        said = f"It hangs on the last bits of the weights ({golden.disturbed}), so that other machines draw another."
        yield Finding("unsteady-picture", "warning", id, said, "Take another seed, more steps, or a wider dtype.")


def _tolerance(golden: Golden, level: str, case: Case) -> Tolerance:
    return golden.tolerances[level].given(case.tolerance)


def _check_case(studio: Studio, case: Case, pictures: Sequence[GoldenPicture]) -> Iterator[PictureResult]:
    def judged(picture: GoldenPicture) -> PictureResult:
        golden = read_golden(studio.suite.goldens, picture.id)  # again: a whole suite's need not be held
        assert golden is not None
        return _judged(case, golden, picture.id, studio.draw(case, picture))

    return _each(studio, case, pictures, judged)


def _judged(case: Case, golden: Golden, id: str, drawing: Rendering) -> PictureResult:
    now = Conditions.of(drawing.record)
    found = PictureResult(id, "fail", findings=drawing.findings, golden=golden.image, drawn=drawing.images[0])
    changed = list(changes_since(golden.record, drawing.record))
    if changed:
        said = f"The golden picture was drawn with other settings: {'; '.join(changed)}."
        return _with(found, Finding("golden-outdated", "error", id, said, _RECORD_AGAIN))
    level, differs = level_between(golden.conditions, now)
    if level is None and not case.tolerance:
        said = f"The golden picture was drawn in {golden.conditions.dtype} and this one in {now.dtype}."
        fix = f"Check with --dtype {golden.conditions.dtype}, record it again, or give the case a tolerance."
        return _with(found, Finding("golden-outdated", "error", id, said, fix))
    name = level.name if level else "wide"
    tolerance = _tolerance(golden, name, case)
    difference = compare(golden.image, drawing.images[0])
    found = replace(found, level=name, differs=differs, tolerance=tolerance, difference=difference)
    return _compared(found, golden, case, drawing.record)


def _compared(found: PictureResult, golden: Golden, case: Case, record: Mapping[str, Any]) -> PictureResult:
    assert found.tolerance is not None
    assert found.difference is not None
    excesses = list(found.tolerance.excesses(found.difference))
    if excesses:
        since = versions_since(golden.record, record)
        said = f"It differs from the golden picture: {', '.join(excesses)}{since}."
        return _with(found, Finding("picture-mismatch", "error", found.id, said, _RECORD_AGAIN))
    tolerance, found = found.tolerance, replace(found, status="pass")
    if case.effect and golden.base_alone and tolerance.admits(golden.base_alone):
        said = "It passes, but so would the base model alone: the tolerance is wider than what the adapters change."
        fix = "Record it on a machine like this one, or narrow the case's tolerance."
        return _with(found, Finding("no-effect", "warning", found.id, said, fix))
    return found if found.findings else replace(found, golden=None, drawn=None)


def _with(found: PictureResult, finding: Finding) -> PictureResult:
    return replace(found, findings=(*found.findings, finding))


def _other_conditions(results: Iterable[PictureResult]) -> Iterator[Finding]:
    """One finding for all pictures whose goldens were drawn elsewhere in the same way."""
    alike = Counter((result.level, result.differs) for result in results if result.level not in (None, "strict"))
    for (level, differs), number in alike.items():
        only_chip = all(reason.startswith("chip") for reason in differs)
        said = f"{counted(number, 'golden picture')} of other conditions ({'; '.join(differs)}): level {level}."
        fix = "" if only_chip else "Record again where the suite is checked."
        yield Finding("other-conditions", "note" if only_chip else "warning", "", said, fix)

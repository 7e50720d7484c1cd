"""The proof as one page: a self-contained HTML file with the verdict, the pictures, every module and the provenance.

The page needs no network and allows none: its policy admits pictures in data URIs and, by their hashes, the one style
and the one script that are in it. Whatever came from a file is text: control and bidirectional characters are shown
escaped, then all of it is escaped as HTML. The same content gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_convert._version import __version__
from lora_convert.converters.fidelity import Rung
from lora_convert.converters.writer import atomic_file
from lora_convert.families import FAMILIES
from lora_convert.report import Finding, printable, shown

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "EmbeddingRow",
    "FileRecord",
    "ModuleRow",
    "PromptPictures",
    "ReportPage",
    "page_html",
    "verdict",
    "write_page",
]

Status = Literal["pass", "partial", "fail"]

FIRST_ROWS = 20
"""Rows of the module table that are shown before someone asks for all."""

_LOSSLESS = 256  # pixels of the longer side up to which pictures are kept exactly
_LARGEST = 768  # larger pictures are reduced to this, so that a page of full-size ones still opens
_SEVERITIES = ("error", "warning", "note")
_UNITS = ("bytes", "kB", "MB", "GB", "TB")

_RUNGS: Mapping[str, str] = {
    "structure": "Every tensor belongs to a module of the base model, or to an embedding, and has its shape.",
    "numbers": "Finite, not all zero, nothing lost to the dtype.",
    "delta": "ΔW of every module against the source’s.",
    "vectors": "Every vector against the source’s: bit for bit where the dtype is the same.",
    "load": "Through diffusers’ own loader, or peft’s, every module and vector counted.",
    "picture": "Same seeds: the result as it loads, against the base that does what the source says.",
}
"""What each rung of the proof looks at."""

_FAILURES: Mapping[str, str] = {
    "structure": "the tensors do not fit the base model",
    "numbers": "the file holds values that cannot be right",
    "delta": "the {} does not change the weights as the source does",
    "vectors": "the {} does not have the source’s vectors",
    "load": "not everything in the file arrives in the model",
    "picture": "the {} does not draw what the source draws",
}

_LABELS: Mapping[str, str] = {
    "excess": "of the floor",
    "worst": "worst error",
    "exact_modules": "exact",
    "exact_vectors": "exact",
    "tile_difference": "tile difference",
    "tile_ssim": "tile SSIM",
    "flip": "FLIP",
}
"""Figures by name, where the name itself does not read well."""

_COMPONENTS: Mapping[str, str] = {
    "unet": "UNet",
    "transformer": "Transformer",
    "text_encoder": "Text encoder",
    "text_encoder_2": "Text encoder 2",
}

_BLOCK_ORDER = ("down", "mid", "up")


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One adapted module. `norm` is ‖ΔW‖, `base_norm` ‖W‖ of the weight it changes, `error` ‖ΔW − ΔW of the source‖
    relative to the latter's norm (None where it was not compared). `parts` are what changes: `weight`, `magnitude`,
    `bias`.
    """

    name: str
    algorithm: str
    rank: int | None = None
    alpha: float | None = None
    norm: float | None = None
    error: float | None = None
    base_norm: float | None = None
    parts: tuple[str, ...] = ("weight",)

    @property
    def share(self) -> float | None:
        """‖ΔW‖ / ‖W‖."""
        return self.norm / self.base_norm if self.norm is not None and self.base_norm else None


@dataclass(frozen=True, slots=True)
class EmbeddingRow:
    """The vectors of one token for one text encoder: `width` numbers each, of the L2 norms `norms`; `usual` is about
    that of a word's vector. `error` is the largest relative error against the source's (None where there is none).
    """

    token: str
    encoder: str
    width: int
    dtype: str
    norms: tuple[float, ...]
    usual: float
    error: float | None = None


@dataclass(frozen=True)
class PromptPictures:
    """What one prompt and seed draw: the base alone, the reference (the source merged into it, or an embedding's
    vectors read by their definition), and the converted file loaded.

    `figures` compare converted with reference, `floor` says how far each may be off (with its margin), and `effect`
    compares converted with base; all by the names of `comparing.Difference` or others.
    """

    prompt: str
    seed: int
    base: Image
    reference: Image
    converted: Image
    difference: Image
    figures: Mapping[str, float | str] = field(default_factory=dict)
    passed: bool = True
    floor: Mapping[str, float | str] = field(default_factory=dict)
    effect: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that took part: what it was (`source`, `converted`, `base`), its name, size in bytes, SHA-256 in hex."""

    role: str
    name: str
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ReportPage:
    """All that the page says. `title` names what was proved, `verdict` and `summary` say it (a line each); `proved` is
    what kind of thing it is.

    `provenance` are labels and values beyond the files: versions, device, dtype, settings. `family` names the base
    model's family, for blocks in which nothing is adapted; `amplification` is how much `difference` pictures magnify.
    """

    title: str
    status: Status
    verdict: str
    summary: str
    rungs: Mapping[str, Rung]
    pictures: Sequence[PromptPictures] = ()
    modules: Sequence[ModuleRow] = ()
    findings: Sequence[Finding] = ()
    files: Sequence[FileRecord] = ()
    provenance: Sequence[tuple[str, str]] = ()
    command: str | None = None
    family: str | None = None
    amplification: float | None = None
    proved: str = "converted file"
    embeddings: Sequence[EmbeddingRow] = ()


def verdict(rungs: Mapping[str, Rung], proved: str = "converted file") -> tuple[Status, str]:
    """Status and headline by the rungs alone: what failed first, or how far the proof goes; `proved` is what for."""
    failed = next((name for name, rung in rungs.items() if rung.status == "fail"), None)
    if failed is not None:
        return "fail", f"Failed: {_FAILURES[failed].format(proved) if failed in _FAILURES else failed}"
    passed = {name for name, rung in rungs.items() if rung.status == "pass"}
    if not passed & {"delta", "vectors"}:
        return "partial", "Not proved: the file is sound, but it was compared with no source"
    cut = "delta" in rungs and bool(rungs["delta"].figures.get("truncated_modules"))
    if "picture" in passed:
        return "pass", f"Proved: the {proved} does the same as the source{', but for what was cut' if cut else ''}"
    whose = "the closest of its rank to the source’s" if cut else "the source’s"
    return "partial", f"Proved without pictures: every {'weight change' if 'delta' in passed else 'vector'} is {whose}"


def write_page(path: str | Path, page: ReportPage) -> None:
    """Write the page to `path`, whole or not at all. Raises UsageError if the folder cannot be written to."""
    content = page_html(page).encode("utf-8")
    with atomic_file(Path(path)) as file:
        file.write(content)


def page_html(page: ReportPage) -> str:
    """The page as HTML, with everything that it shows inside it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "allowed": _allowed,
        "breaking": _breaking,
        "data_uri": _data_uri,
        "figure": figure,
        "label": _label,
        "exact_value": _exact_value,
        "shown": shown,
        "size": _size,
    }
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        page=page,
        version=__version__,
        rung_notes=_RUNGS,
        chosen=next((index for index, pictures in enumerate(page.pictures) if not pictures.passed), 0),
        figures_of={name: _plain_figures(rung.figures) for name, rung in page.rungs.items()},
        figure_names=[_figure_names(pictures) for pictures in page.pictures],
        components=_components(page),
        modules=_worst_first(page.modules),
        compared=any(row.error is not None for row in page.modules),
        measured=any(row.norm is not None for row in page.modules),
        varied=any(row.parts != ("weight",) for row in page.modules),
        relative=any(row.share is not None for row in page.modules),
        first_rows=FIRST_ROWS,
        findings=_grouped(page.findings),
    )


def _harmless(value: Any) -> Any:
    """What a template prints: text without control and bidirectional characters. Escaping as HTML comes after it."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _allowed(content: str) -> str:
    """The source expression that lets a policy admit this one style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _breaking(name: str) -> str:
    """A module's name, shortened, that may be broken after its dots."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(f"{part}.") for part in shown(name).split("."))[:-1]


def _data_uri(picture: Image) -> str:
    """The picture itself as an address: PNG, or where that would be large a JPEG of good quality, reduced."""
    stream = io.BytesIO()
    shown_picture = picture.convert("RGB")
    if max(picture.size) <= _LOSSLESS:
        shown_picture.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        shown_picture.thumbnail((_LARGEST, _LARGEST))
        shown_picture.save(stream, "JPEG", quality=90, subsampling=0, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def figure(value: object) -> str:
    """A figure as the field writes it: `2.4e-04`, `0.123`, `1,234`; `1 − 2.4e-05` where rounding would say 1."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return shown(str(value), 60)
    if value in (0.0, 1.0) or not math.isfinite(value):
        return f"{abs(value) if value == 0.0 else value:g}"
    if 0.999 < value < 1.0:
        return f"1 − {1.0 - value:.1e}"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}"
    return f"{value:.1e}"


def _exact_value(value: float | None) -> str:
    """A number for the sorting script, in full; empty if there is none. What is not a number counts as largest."""
    if value is None:
        return ""
    return "Infinity" if math.isnan(value) else repr(float(value)).replace("inf", "Infinity")


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _size(number: int) -> str:
    amount = float(number)
    for unit in _UNITS:
        if amount < 1000 or unit == _UNITS[-1]:
            return f"{number} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")


def _plain_figures(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of a rung that are single values; its lists are in the table of modules."""
    return {name: value for name, value in figures.items() if isinstance(value, bool | int | float | str)}


def _figure_names(pictures: PromptPictures) -> Sequence[str]:
    """Every figure that is known of a prompt, once."""
    return list(dict.fromkeys([*pictures.figures, *pictures.floor, *pictures.effect]))


def _grouped(findings: Sequence[Finding]) -> Sequence[Sequence[Finding]]:
    """Findings of one name and one fix together, errors first."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: _SEVERITIES.index(finding.severity)):
        groups.setdefault((finding.severity, finding.name, finding.fix), []).append(finding)
    return list(groups.values())


def _worst_first(modules: Sequence[ModuleRow]) -> Sequence[ModuleRow]:
    def key(row: ModuleRow) -> float:
        if row.error is None:
            return math.inf
        return -math.inf if math.isnan(row.error) else -row.error

    return sorted(modules, key=key)


@dataclass(frozen=True)
class _Block:
    """A part of a component: how many of its modules are adapted, and the norm of the change, or its share of ‖W‖."""

    label: str
    modules: int
    value: float | None
    length: float  # of its bar, 0 to 100


def _components(page: ReportPage) -> Mapping[str, Sequence[_Block]]:
    """Blocks by component's title, in the order in which a picture passes through them."""
    rows: dict[str, dict[str, list[ModuleRow]]] = {}
    for component, label in _known_blocks(page):
        rows.setdefault(component, {}).setdefault(label, [])
    for row in page.modules:
        component, label = _block_of(row.name)
        rows.setdefault(component, {}).setdefault(label, []).append(row)
    adapted = {component: blocks for component, blocks in rows.items() if any(blocks.values())}
    relative = bool(page.modules) and all(row.share is not None for row in page.modules)
    values = {
        (component, label): _strength(members, relative)
        for component, blocks in adapted.items()
        for label, members in blocks.items()
    }
    largest = max((value for value in values.values() if value is not None), default=0.0) or 1.0
    return {
        _COMPONENTS.get(component, component): [
            _Block(label, len(blocks[label]), value, 100 * (value or 0.0) / largest)
            for label in sorted(blocks, key=_block_order)
            for value in [values[component, label]]
            if blocks[label] or label != "other"
        ]
        for component, blocks in adapted.items()
    }


def _known_blocks(page: ReportPage) -> Iterator[tuple[str, str]]:
    family = FAMILIES.get(page.family or "")
    return (_block_of(name) for name in (family.modules if family else ()))


def _block_of(name: str) -> tuple[str, str]:
    """Component and block of a module: `unet.down_blocks.1.resnets.0.conv1` is in `unet`, `down 1`."""
    component, _, path = name.partition(".")
    parts = path.split(".")
    if parts[0] == "mid_block":
        return component, "mid"
    number = next((index for index, part in enumerate(parts) if index and part.isascii() and part.isdecimal()), None)
    if number is None:
        return component, "other"
    kind = parts[number - 1].removesuffix("_blocks").removesuffix("s").replace("_", " ")
    return component, f"{kind} {parts[number]}"


def _block_order(label: str) -> tuple[int, str, int, str]:
    kind, _, number = label.rpartition(" ")
    kind = kind or label
    rank = _BLOCK_ORDER.index(kind) if kind in _BLOCK_ORDER else len(_BLOCK_ORDER) + (label == "other")
    return rank, kind, int(number) if number.isdecimal() and len(number) < 10 else 0, number


def _strength(rows: Sequence[ModuleRow], relative: bool) -> float | None:
    """Root of the summed squares of ‖ΔW‖, divided by that of ‖W‖ if asked; None where it is unknown or not finite."""
    norms = [row.norm for row in rows]
    if not norms or any(norm is None or not math.isfinite(norm) for norm in norms):
        return None
    whole = math.hypot(*(norm for norm in norms if norm is not None))
    weights = math.hypot(*(row.base_norm or 0.0 for row in rows))
    value = whole / weights if relative and weights else whole
    return value if math.isfinite(value) else None

"""The report as one page: what is in it, that it loads nothing, and that what comes from files stays text."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from lora_convert.converters.fidelity import Rung
from lora_convert.errors import UsageError
from lora_convert.families import FAMILIES
from lora_convert.report import Finding, printable

pytest.importorskip("jinja2")
pytest.importorskip("PIL")

from PIL import Image

from lora_convert.runtime.page import (
    FIRST_ROWS,
    FileRecord,
    ModuleRow,
    PromptPictures,
    ReportPage,
    figure,
    page_html,
    verdict,
    write_page,
)

SCRIPT = "</script><img src=x onerror=alert(1)>"
REVERSED = "safe\u202egnp.exe"
LONG = "x" * 5000
HOSTILE = (
    SCRIPT,
    REVERSED,
    LONG,
    "a\x00b\x1b[31m\u2028c\ud800",
    '" autofocus onfocus="alert(1)',
    "{{ 7 * 7 }}{% raw %}",
)


def drawn(seed: int, size: int = 128) -> Any:
    """A picture of a gradient and a square; another for each seed."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, size)
    pixels[seed * 4 : seed * 4 + size // 4, size // 4 : size // 2] = (40, 160, 20 * seed % 256)
    return Image.fromarray(pixels)


def prompt(number: int, **changes: Any) -> PromptPictures:
    figures = {"latents": 4.1e-06, "tile_difference": 0.0004, "tile_ssim": 0.99998, "flip": 0.0}
    content = PromptPictures(
        f"a red ring, number {number}", 1000 + number, drawn(number), drawn(number + 1), drawn(number + 2), drawn(0),
        figures, floor={"latents": 3.2e-04}, effect={"latents": 0.62},
    )  # fmt: skip
    return replace(content, **changes)


def module_rows(family: str = "tiny-sd15") -> list[ModuleRow]:
    """Every linear module of a family but its mid block's, errors and norms in no order; the second's is 0."""
    names = [module.name for module in FAMILIES[family].modules.values() if len(module.shape) == 2]
    return [
        ModuleRow(name, "lora", 4 + k % 3, 2.0, 1.0 + k * 7 % 11, (k * 13 % 97) * 1e-6, 50.0)
        for k, name in enumerate(name for name in names if "mid_block" not in name)
    ]


def report(**changes: Any) -> ReportPage:
    """A page with something in every part."""
    rungs = {
        "structure": Rung("pass", figures={"modules": 200, "tensors": 400}),
        "numbers": Rung("pass"),
        "delta": Rung("pass", figures={"worst": 2.4e-04, "worst_modules": [{"module": "m", "error": 1.0}]}),
        "load": Rung("skipped", "not asked for"),
        "picture": Rung("pass", figures={"prompts": 8}),
    }
    status, said = verdict(rungs)
    page = ReportPage(
        "style.safetensors",
        status,
        said,
        "264 modules of Stable Diffusion 1.x, worst error 2.4e-04.",
        rungs,
        [prompt(number) for number in range(8)],
        module_rows(),
        [
            Finding("dtype-changed", "note", "", "the output has another dtype.", "--dtype fp32 keeps it."),
            Finding("delta-mismatch", "error", "unet.conv_in", "its ΔW differs."),
        ],
        [FileRecord("source", "style.safetensors", 1_234_567, "ab" * 32)],
        [("device", "cpu"), ("dtype", "float32")],
        "lora-convert validate out.safetensors --against style.safetensors --report page.html",
        "tiny-sd15",
        10.0,
    )
    return replace(page, **changes)


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, and the text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.raw: dict[str, str] = {}
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._within = tag if tag in ("style", "script") else ""

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within:
            self.raw[self._within] = self.raw.get(self._within, "") + data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(page_html(report()))


def test_the_sections_come_in_order_and_the_verdict_first(page):
    assert page_html(report()).startswith("<!DOCTYPE html>")
    parts = ["Proved: the converted file does the same as the source", "Rungs of the proof", "Pictures"]
    parts += ["Where the adapter acts", "Modules", "Findings", "Provenance", "lora-convert validate out.safetensors"]
    places = [page.text.index(part, page.text.index("264 modules") if n else 0) for n, part in enumerate(parts)]
    assert places == sorted(places)
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings.count("h1") == 1 and headings[0] == "h1"
    levels = [int(heading[1]) for heading in headings]
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))


def test_the_figures_are_in_the_fields_usual_form(page):
    for text in ("2.4e-04", "1.2 MB", "ab" * 32, "Not asked for.", "1 − 2.0e-05", "3.2e-04", "seed 1000"):
        assert text in page.text
    assert "worst_modules" not in page.text and "{'" not in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0, "0"), (-0.0, "0"), (1.0, "1"), (0.99998, "1 − 2.0e-05"), (2.4e-4, "2.4e-04"), (0.5, "0.500"),
        (12.345, "12.3"), (1234.5, "1234"), (1e6, "1.0e+06"), (1234567, "1,234,567"), (True, "yes"),
        (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"), ("cpu", "cpu"),
    ],
)  # fmt: skip
def test_figures(value, text):
    assert figure(value) == text


def test_all_rows_are_in_the_page_the_worst_first_and_a_few_shown(page):
    hidden = [attributes for attributes in page.all("tr") if "hidden" in attributes]
    assert len(hidden) == len(module_rows()) - FIRST_ROWS
    errors = re.findall(r'data-value="([^"]*)">[^<]*</td></tr>', page_html(report()))
    values = [float(value) for value in errors]
    assert values == sorted(values, reverse=True) and len(values) == len(module_rows())
    sorted_by = [attributes["data-column"] for attributes in page.all("th") if "aria-sort" in attributes]
    assert sorted_by == ["error"]
    assert "exact" in page.text  # an error of zero is more than small


def test_what_else_than_the_weight_changes_has_a_column_where_there_is_any(page):
    columns = [attributes.get("data-column") for attributes in page.all("th")]
    assert "parts" not in columns
    rows = [replace(module_rows()[0], parts=("weight", "magnitude")), *module_rows()[1:]]
    varied = Page(page_html(report(modules=rows)))
    assert "parts" in [attributes.get("data-column") for attributes in varied.all("th")]
    assert varied.text.count("weight, magnitude") == 1
    without = ModuleRow("unet.conv_norm_out", "norm", None, None, None, None, None, ("weight", "bias"))
    assert "weight, bias" in Page(page_html(report(modules=[without]))).text


def test_blocks_in_the_order_of_the_model_with_those_that_are_not_adapted(page):
    section = page.text[page.text.index("Where the adapter acts") : page.text.index("Largest error first")]
    labels = re.findall(r"^(down \d|mid|up \d|other|layer \d)$", section, re.MULTILINE)
    downs, ups = [f"down {n}" for n in range(4)], [f"up {n}" for n in range(4)]
    assert labels == [*downs, "mid", *ups, "other", "layer 0", "layer 1", "other"]
    assert section.count("not adapted") == 1
    bars = [float(rect["width"]) for rect in page.all("rect")]
    assert max(bars) == 100 and min(bars) == 0


def test_bars_are_the_root_of_the_summed_squares():
    rows = [ModuleRow(f"unet.down_blocks.0.attentions.{n}.proj_in", "lora", norm=norm) for n, norm in enumerate((3, 4))]
    text = Page(page_html(report(modules=rows, family=None))).text
    assert "‖ΔW‖ of the adapted modules" in text and re.search(r"down 0\s+5", text)
    rows = [replace(row, base_norm=10.0) for row in rows]
    text = Page(page_html(report(modules=rows, family=None))).text
    assert "‖ΔW‖ relative to ‖W‖" in text and re.search(r"down 0\s+35\.4 %", text)


def test_a_norm_that_is_no_number_spoils_only_its_block():
    rows = [ModuleRow("unet.mid_block.resnets.0.conv1", "lora", norm=math.nan, error=math.nan), *module_rows()]
    page = Page(page_html(report(modules=rows)))
    assert re.search(r"mid\s+–", page.text) and "nan" in page.text


def test_the_pictures_are_in_the_page_as_they_are(page):
    pictures = [attributes for attributes in page.all("img") if "src" in attributes]
    assert len(pictures) == 8 * 4
    assert all(picture["alt"] and (picture["width"], picture["height"]) == ("128", "128") for picture in pictures)
    kind, content = pictures[0]["src"].split(",")
    assert kind == "data:image/png;base64"
    back = Image.open(io.BytesIO(base64.b64decode(content)))
    assert np.array_equal(np.asarray(back), np.asarray(drawn(0)))
    assert "8 of 8 prompts agree" in page.text and "difference × 10" in page.text


def test_large_pictures_are_reduced():
    big = {name: drawn(1, 1024) for name in ("base", "reference", "converted", "difference")}
    text = page_html(report(pictures=[prompt(0, **big)]))
    assert "data:image/jpeg;base64" in text and "data:image/png" not in text and len(text) < 1_000_000
    assert {attributes["width"] for attributes in Page(text).all("img")} == {"1024"}


def test_a_realistic_page_is_small_enough_to_attach():
    rng = np.random.default_rng(0)
    noisy = [Image.fromarray(rng.integers(100, 110, (128, 128, 3), np.uint8)) for _ in range(4)]
    names = ("base", "reference", "converted", "difference")
    pictures = [prompt(n, **dict(zip(names, noisy, strict=True))) for n in range(8)]
    assert len(page_html(report(pictures=pictures, modules=module_rows("sdxl"))).encode()) < 2_000_000


def test_a_failing_prompt_is_named():
    page = Page(page_html(report(pictures=[prompt(0), prompt(1, passed=False)])))
    assert "1 of 2 prompts agrees" in page.text
    assert ["hidden" in article for article in page.all("article")] == [True, False]  # the wrong one is shown first
    assert [button["aria-label"] for button in page.all("button") if "aria-label" in button][1].startswith(
        "Prompt 2, fail"
    )


def test_findings_of_one_kind_share_their_fix():
    findings = [Finding("delta-mismatch", "error", f"unet.m{n}", f"off by {n}.", "A wider dtype.") for n in range(3)]
    text = Page(page_html(report(findings=[Finding("folded", "note", "", "done."), *findings]))).text
    assert text.count("A wider dtype.") == 1 and text.index("unet.m2") < text.index("A wider") < text.index("folded")
    assert all(f"unet.m{n}\nOff by {n}." in text for n in range(3))


def test_without_pictures_modules_or_findings_it_says_so():
    rungs = {"delta": Rung("pass"), "picture": Rung("skipped", "the picture needs a real base")}
    page = Page(page_html(report(rungs=rungs, pictures=[], modules=[], findings=[], files=[], command=None)))
    for text in ("None were drawn: the picture needs a real base.", "No module was read.", "Nothing to report."):
        assert text in page.text
    assert not page.all("table")


def test_nothing_is_loaded_and_only_this_style_and_script_are_admitted(page):
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert len(page.all("style")) == len(page.all("script")) == 1
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in page.raw["style"] and "@import" not in page.raw["style"]
    assert not re.search(r"https?:|fetch\(|innerHTML|eval", page.raw["script"])


@pytest.mark.parametrize("text", HOSTILE)
def test_what_comes_from_files_is_text(text, page):
    rows = [ModuleRow(text, text, 4, 1.0, 1.0, 1e-4), ModuleRow(f"unet.{text}.1.conv", "lora", 4, 1.0, 1.0, 1e-4)]
    hostile = report(
        title=text,
        verdict=f"Failed: {text}",
        summary=text,
        rungs={"delta": Rung("fail", text, {"of": text}), text: Rung("pass")},
        pictures=[prompt(0, prompt=text, figures={text: text})],
        modules=rows,
        findings=[Finding("suspicious-name", "warning", text, text, text)],
        files=[FileRecord("source", text, 1, text)],
        provenance=[(text, text)],
        command=text,
    )
    content = page_html(hostile)
    assert content.encode("utf-8")  # not even a lone surrogate comes through
    seen = Page(content)
    assert {tag for tag, _ in seen.elements} <= {tag for tag, _ in page.elements}
    assert seen.raw == page.raw
    assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
    assert not set(content) & {"\u202e", "\x00", "\x1b", "\u2028"}
    assert printable(text)[:40] in seen.text


def test_long_names_are_shortened():
    content = page_html(report(modules=[ModuleRow(LONG, LONG, 4, 1.0, 1.0, 1e-4)], pictures=[], title=LONG))
    assert "x" * 300 not in content


def test_the_same_content_gives_the_same_bytes(tmp_path):
    first, second = tmp_path / "new" / "first.html", tmp_path / "second.html"
    write_page(first, report())
    write_page(second, report())
    assert first.read_bytes() == second.read_bytes() == page_html(report()).encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["first.html"]


def test_a_place_that_cannot_be_written_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        write_page(tmp_path / "file" / "page.html", report())


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({"structure": "pass", "delta": "pass", "picture": "pass"}, ("pass", "Proved: ")),
        ({"structure": "pass", "delta": "pass", "picture": "skipped"}, ("partial", "Proved without pictures: ")),
        ({"structure": "pass", "delta": "pass"}, ("partial", "Proved without pictures: ")),
        ({"structure": "pass", "delta": "skipped"}, ("partial", "Not proved: ")),
        ({"structure": "fail"}, ("fail", "Failed: the tensors")),
        ({"structure": "pass", "delta": "fail", "picture": "fail"}, ("fail", "Failed: the converted file does not ch")),
        ({"structure": "pass", "delta": "pass", "picture": "fail"}, ("fail", "Failed: the converted file does not dr")),
    ],
)
def test_the_verdict_says_how_far_the_proof_goes(statuses, expected):
    status, said = verdict({name: Rung(state) for name, state in statuses.items()})
    assert (status, said[: len(expected[1])]) == expected


@pytest.mark.parametrize("picture", ["pass", "skipped"])
def test_the_verdict_says_that_something_was_cut(picture):
    delta = Rung("pass", figures={"truncated_modules": 1})
    _, said = verdict({"delta": delta, "picture": Rung(picture)})
    assert ("but for what was cut" if picture == "pass" else "the closest of its rank") in said


def _luminance(colour: str) -> float:
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def _colours(style: str) -> list[dict[str, str]]:
    """The page's colours by name, light and dark."""
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    found = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in blocks]
    return [found[0], found[0] | found[1]]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_text_has_the_contrast_that_wcag_aa_asks_for(theme, page):
    colours = _colours(page.raw["style"])[theme]
    for text in ("ink", "soft", "pass", "partial", "fail", "note"):
        for ground in ("paper", "sheet"):
            bright, dark = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
    for mark, ground in (("bar", "rule"), ("focus", "paper"), ("focus", "sheet")):
        bright, dark = sorted((_luminance(colours[mark]), _luminance(colours[ground])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 3, (mark, ground)

"""The report in a real browser: complete, usable by mouse and keys, on a phone, without a network, without a script.

A Chromium is driven over its debugging pipe. The tests are skipped where there is none; CHROME names one elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("PIL")

from test_runtime_page import HOSTILE, module_rows, prompt, report

from lora_convert.converters.fidelity import Rung
from lora_convert.report import Finding
from lora_convert.runtime.page import FIRST_ROWS, FileRecord, ModuleRow, write_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PATIENCE = 240  # seconds: a busy machine is slow to start a browser
WIDTHS = {"phone": (360, 800), "desktop": (1280, 900)}

Message = dict[str, Any]


def _browser() -> str | None:
    names = (os.environ["CHROME"],) if os.environ.get("CHROME") else NAMES
    return next((path for path in map(shutil.which, names) if path), None)


BROWSER = _browser()
pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="the debugging pipe is driven as on POSIX"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium was found; the environment variable CHROME can name one"),
]


class Browser:
    """A headless Chromium, spoken to in the DevTools protocol: JSON between zero bytes on descriptors 3 and 4."""

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()

        def wire() -> None:  # in the child: both ends away from 3 and 4 before they are put there
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_commands, write_answers)]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        options = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-quic", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options += ["--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium has none for root
        self._process = subprocess.Popen(
            [BROWSER, *options], close_fds=False, preexec_fn=wire, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read_commands)
        os.close(write_answers)
        self._rest = b""
        self._number = 0
        self.events: list[Message] = []

    def close(self) -> None:
        for end in (self._commands, self._answers):
            os.close(end)
        self._process.terminate()
        self._process.wait(30)

    def _receive(self, deadline: float) -> Message:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError("the browser does not answer")
            chunk = os.read(self._answers, 1 << 20)
            if not chunk:
                raise RuntimeError(f"the browser has ended (status {self._process.wait(30)})")
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Message:
        """One command and its answer; events that come in between are kept."""
        self._number += 1
        command: Message = {"id": self._number, "method": method, "params": parameters}
        if session:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while (message := self._receive(deadline)).get("id") != self._number:
            self.events.append(message)
        assert "error" not in message, (method, message["error"])
        return dict(message["result"])

    def wait(self, method: str, session: str) -> None:
        """Until an event of that name has come."""
        deadline = time.monotonic() + PATIENCE
        while not any(event["method"] == method and event.get("sessionId") == session for event in self.events):
            self.events.append(self._receive(deadline))


class Tab:
    """A page that has been loaded, at a size in CSS pixels."""

    def __init__(
        self, browser: Browser, address: str, size: tuple[int, int], *, dark: bool = False, script: bool = True
    ) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._target = target
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        width, height = size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        if not script:
            self.call("Emulation.setScriptExecutionDisabled", value=True)
        browser.events.clear()
        self.call("Page.navigate", url=address)
        browser.wait("Page.loadEventFired", self._session)

    def call(self, method: str, **parameters: Any) -> Message:
        return self._browser.call(method, self._session, **parameters)

    def __call__(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        text = {"Enter": "\r", "Space": " "}.get(key)
        codes = {"Enter": 13, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9}
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]} | ({"text": text} if text else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **shared)
        self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1, clickCount=1)

    def click(self, selector: str) -> None:
        """A press and release in the middle of an element."""
        self(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        x, y, width, height = self.box(selector)
        for kind in ("Pressed", "Released"):
            self.mouse(kind, x + width / 2, y + height / 2)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        found = self(
            f"(b => [b.x, b.y, b.width, b.height])(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        return found[0], found[1], found[2], found[3]

    def texts(self, selector: str) -> list[str]:
        """The texts of the elements that are seen."""
        seen = "[...document.querySelectorAll(%r)].filter(e => e.checkVisibility()).map(e => e.textContent)"
        return list(self(seen % selector))

    def complaints(self) -> list[str]:
        """Whatever the console has been told, by the page or about it."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events() if event["method"] in kinds]

    def requests(self) -> set[str]:
        sent = [event["params"] for event in self._events() if event["method"] == "Network.requestWillBeSent"]
        return {request["request"]["url"].partition(",")[0] for request in sent}

    def _events(self) -> list[Message]:
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with 8 prompts, the rows of 200 modules, and one without an error."""
    path = tmp_path_factory.mktemp("page") / "proof.html"
    rows = [*module_rows(), ModuleRow("unet.conv_in", "lora", 4, 4.0, 0.5)]
    write_page(path, report(modules=rows))
    return path.as_uri()


@pytest.fixture
def tab(browser: Browser, address: str) -> Iterator[Tab]:
    opened = Tab(browser, address, WIDTHS["desktop"])
    yield opened
    opened.close()


def errors_of(tab: Tab) -> list[str]:
    return tab.texts("#modules tbody td:last-child")


def fits(tab: Tab) -> bool:
    return bool(tab("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", WIDTHS)
def test_it_is_complete_and_fits_on_every_screen(browser, address, size, dark):
    tab = Tab(browser, address, WIDTHS[size], dark=dark)
    sections = ["Pictures", "Where the adapter acts", "Modules", "Findings", "Provenance"]
    assert tab.texts("section > h2") == sections
    assert tab.texts("h1") == ["Proved: the converted file does the same as the source"]
    assert len(tab.texts("#rungs > li")) == 5
    assert len(tab.texts("#modules tbody tr")) == FIRST_ROWS
    assert (
        tab("Promise.all([...document.images].map(image => image.decode())).then(() => document.images.length)") >= 32
    )
    assert fits(tab)
    assert tab.requests() == {address, "data:image/png;base64"} and tab.complaints() == []
    ground = tab("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) is dark
    tab.close()


def test_columns_are_sorted_by_their_heads(tab):
    click = "#modules th[data-column={}] button"
    tab.click(click.format("norm"))
    norms = [float(text) for text in tab.texts("#modules tbody td:nth-child(5)")]
    assert norms == sorted(norms, reverse=True) and norms[0] == 11
    assert tab("[...document.querySelectorAll('th[aria-sort]')].map(h => h.dataset.column + h.ariaSort)") == [
        "normdescending"
    ]
    tab.click(click.format("error"))
    tab.click(click.format("error"))
    assert errors_of(tab)[:2] == ["exact", "exact"] and "–" not in errors_of(tab)
    tab(f"document.querySelector({click.format('name')!r}).focus()")
    tab.press("Enter")
    names = tab.texts("#modules tbody td:first-child")
    assert names == sorted(names) and tab("document.querySelector('#modules th').ariaSort") == "ascending"
    assert tab.complaints() == []


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_what_has_no_value_comes_last_in_any_order(browser, address, order):
    tab = Tab(browser, f"{address}#sort=error&order={order}&rows=all", WIDTHS["desktop"])
    errors = errors_of(tab)
    assert errors[-1] == "–" and errors.count("–") == 1 and len(errors) == len(module_rows()) + 1
    values = [float(text.replace("exact", "0")) for text in errors[:-1]]
    assert values == sorted(values, reverse=order == "descending")
    tab.close()


def test_rows_are_found_by_words_and_all_shown_when_asked(tab):
    total = len(module_rows()) + 1
    assert tab.texts("#shown") == [f"{FIRST_ROWS} of {total} shown"]
    tab.click(".more")
    assert len(errors_of(tab)) == total and fits(tab)
    assert tab.box(".rows")[3] <= 0.8 * WIDTHS["desktop"][1] + 1
    tab.click("#filter")
    tab.call("Input.insertText", text="attn2 TO_K")
    names = tab.texts("#modules tbody td:first-child")
    assert names and all("attn2" in name and "to_k" in name for name in names)
    assert tab.texts("#shown") == [f"{len(names)} of {total} found"]


def test_prompts_are_chosen_by_their_thumbnails(tab):
    assert tab("document.querySelectorAll('.choices img').length") == 8
    assert tab.texts(".prompt blockquote") == ["a red ring, number 0"]
    tab.click(".choices button:nth-child(3)")
    assert tab.texts(".prompt blockquote") == ["a red ring, number 2"]
    tab.press("Tab")
    tab.press("Enter")
    assert tab.texts(".prompt blockquote") == ["a red ring, number 3"]
    assert tab("[...document.querySelectorAll('.choices button')].map(b => b.ariaPressed).indexOf('true')") == 3


def test_the_slider_is_moved_by_keys_and_by_dragging(tab):
    split = "getComputedStyle(document.querySelector('.over')).clipPath"
    assert "50%" in tab(split)
    tab("document.querySelector('input[type=range]').focus()")
    tab.press("ArrowRight")
    assert "51%" in tab(split)
    tab.press("Home")
    assert "0px 0px 0px 0" in tab(split).replace("0%", "0")
    assert tab("document.querySelector('input[type=range]').getAttribute('aria-valuetext')") == "0 % reference"
    tab("document.querySelector('.view').scrollIntoView({block: 'center'})")
    x, y, width, height = tab.box(".view")
    tab.mouse("Pressed", x + width / 2, y + height / 2)
    tab.mouse("Moved", x + width / 4, y + height / 2)
    assert "25%" in tab(split)
    tab.mouse("Released", x + width / 4, y + height / 2)
    tab.mouse("Moved", x + width * 3 / 4, y + height / 2)
    assert "25%" in tab(split) and tab.complaints() == []


def test_the_left_side_can_be_the_base_alone(tab):
    same = "document.querySelector('.view img').src === document.querySelector('.{} img').src"
    assert tab(same.format("reference")) and not tab(same.format("base"))
    tab.click("input[value=base]")
    assert tab(same.format("base")) and tab.texts(".compare .left") == ["base alone"]


def test_nothing_moves_when_the_script_has_run(browser, address):
    """Pictures have their sizes, rows and prompts are hidden from the start: no content jumps."""
    tab = Tab(browser, address, WIDTHS["phone"])
    shifts = "new Promise(done => new PerformanceObserver(list => done(list.getEntries().map(e => e.value)))"
    shifts += ".observe({type: 'layout-shift', buffered: true}) || setTimeout(() => done([]), 200))"
    assert sum(tab(shifts)) < 0.01
    tab.close()


def test_without_a_script_everything_is_there(browser, address):
    tab = Tab(browser, address, WIDTHS["desktop"], script=False)
    assert len(tab.texts("#modules tbody tr")) == len(module_rows()) + 1
    assert len(tab.texts(".prompt")) == 8
    assert tab.texts(".choices") == tab.texts(".compare") == tab.texts(".tools") == tab.texts(".more") == []
    tab.close()


@pytest.mark.parametrize("size", WIDTHS)
def test_hostile_names_do_nothing_and_break_nothing(browser, tmp_path, size):
    rows = [ModuleRow(f"unet.{text}.{n}", text, 4, 1.0, 1.0, 1e-4) for n, text in enumerate(HOSTILE)]
    findings = [Finding("suspicious-name", "warning", text, text, text) for text in HOSTILE]
    all_of_them = "".join(HOSTILE)
    page = report(
        title=all_of_them,
        verdict=f"Failed: {all_of_them[:2000]}",
        summary=all_of_them,
        rungs={text: Rung("fail", text, {text: text}) for text in HOSTILE},
        pictures=[prompt(0, prompt=text, figures={text: text}) for text in HOSTILE],
        modules=rows,
        findings=findings,
        files=[FileRecord(text[:200], text, 1, text) for text in HOSTILE],
        provenance=[(text, text) for text in HOSTILE],
        command=all_of_them,
        family=None,
    )
    write_page(tmp_path / "hostile.html", page)
    tab = Tab(browser, (tmp_path / "hostile.html").as_uri(), WIDTHS[size])
    assert fits(tab) and tab.complaints() == []
    assert tab("document.querySelectorAll('img[onerror], [onfocus]').length") == 0
    assert tab("document.querySelectorAll('script').length") == 1
    assert len(tab.requests()) == 2
    tab.close()

"""The package as a library: light imports in one direction, frozen picklable results, threads, the docs' own code."""

from __future__ import annotations

import ast
import dataclasses
import inspect as standard_inspect
import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from conftest import LORA, ROOT

import lora_convert
from lora_convert.cli.text import kinds_table
from lora_convert.converters.adapters import KINDS
from lora_convert.report import FINDINGS, Finding

PACKAGE = ROOT / "lora_convert"
ORDER = ["errors", "report", "hashes", "_version", "containers", "families", "inspect", "converters", "runtime", "cli"]
FILE = LORA / "a_sdxl_lora.safetensors"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_is_light():
    loaded = run_python(
        "import sys, lora_convert; print([m for m in ('numpy', 'torch', 'click', 'rich') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_inspecting_a_lora_needs_the_standard_library_alone():
    code = (
        "import sys, lora_convert.inspect.detect as d, lora_convert.containers as c\n"
        f"found = d.detect(c.open_source({str(FILE)!r}))\n"
        "print(found.family, [m for m in ('numpy', 'torch', 'ml_dtypes', 'huggingface_hub') if m in sys.modules])"
    )
    assert run_python(code) == "sdxl []"


def test_converting_imports_no_torch(tmp_path):
    code = (
        "import sys, lora_convert\n"
        f"ok = lora_convert.convert({str(FILE)!r}, {str(tmp_path)!r}).ok\n"
        "print(ok, [m for m in ('torch', 'diffusers', 'transformers', 'peft', 'rich') if m in sys.modules])"
    )
    assert run_python(code) == "True []"


def test_the_standard_inspect_module_is_untouched():
    assert run_python(
        "import lora_convert, inspect; print(inspect.signature(lora_convert.identify).parameters['target'])"
    )
    assert standard_inspect.signature(lora_convert.convert).parameters["out"]


def _layer(module: str) -> int | None:
    parts = module.split(".")
    return ORDER.index(parts[1]) if parts[0] == "lora_convert" and len(parts) > 1 and parts[1] in ORDER else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = _layer(".".join(["lora_convert", *path.relative_to(PACKAGE).with_suffix("").parts]))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            other = _layer(node.module or "")
            # errors names Finding in annotations only
            if own is not None and other is not None and not (own == 0 and node.module == "lora_convert.report"):
                assert other <= own, node.module
            if path.relative_to(PACKAGE).parts[0] not in ("runtime",):
                assert (node.module or "").split(".")[0] not in ("torch", "diffusers", "transformers", "peft")


def results(tmp_path):
    yield lora_convert.identify(FILE)
    yield lora_convert.plan(FILE)
    result = lora_convert.convert(FILE, tmp_path)
    yield result
    yield lora_convert.validate(result.outputs[0].path, against=FILE)


def test_results_are_frozen_picklable_and_json(tmp_path):
    for result in results(tmp_path):
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.findings = ()
        again = pickle.loads(pickle.dumps(result))
        assert again.as_dict() == result.as_dict()
        json.dumps(result.as_dict(), allow_nan=False)


def test_bad_files_are_results_and_strict_raises(tmp_path):
    for bad in (b"", b"<html>", tmp_path / "missing", tmp_path, b"\0" * 100):
        assert not lora_convert.identify(bad).ok
        assert lora_convert.plan(bad).status == "failed"
        assert lora_convert.convert(bad, tmp_path / "o").status == "failed"
        assert lora_convert.validate(bad).status == "fail"
        assert lora_convert.validate(FILE, against=bad).status == "fail"
        for call in (lora_convert.identify, lora_convert.plan, lora_convert.validate):
            with pytest.raises(lora_convert.FileError) as caught:
                call(bad, strict=True)
            assert pickle.loads(pickle.dumps(caught.value)).findings == caught.value.findings
        with pytest.raises(lora_convert.FileError):
            lora_convert.convert(bad, tmp_path / "o", strict=True)
    assert not (tmp_path / "o").exists()


def test_threads_and_processes_agree(tmp_path):
    def one(number):
        return lora_convert.convert(FILE, tmp_path / str(number)).outputs[0].sha256

    with ThreadPoolExecutor(4) as pool:
        hashes = set(pool.map(one, range(8)))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(lora_convert.convert, [FILE] * 2, [tmp_path / "p1", tmp_path / "p2"]))
    assert hashes == {result.outputs[0].sha256 for result in results} and len(hashes) == 1


def test_the_library_prints_nothing(tmp_path, capfd):
    for _ in results(tmp_path):
        pass
    lora_convert.identify(b"junk")
    assert capfd.readouterr() == ("", "")


def test_every_finding_is_documented():
    documented = re.findall(r"^### (.+)$", (ROOT / "docs" / "findings.md").read_text(), re.M)
    assert sorted(documented) == sorted(FINDINGS)
    with pytest.raises(ValueError, match="not a known finding"):
        Finding("E001", "error", "", "")


def test_every_finding_is_used():
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "report.py")
    assert [name for name in FINDINGS if f'"{name}"' not in code] == []


def test_the_hub_page_runs(tmp_path):
    page = (ROOT / "docs" / "hub.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    body = code.split("def publish(")[1]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20
    script = tmp_path / "step.py"
    script.write_text(
        code + "\n\nif __name__ == '__main__':\n"
        f"    files = [Path({str(FILE)!r}), Path({str(LORA / 'k_sd15_oft.safetensors')!r}), Path({str(script)!r})]\n"
        f"    print([r['accepted'] for r in publish_all(files, Path({str(tmp_path / 'store')!r}))])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[True, False, False]", "")


def test_readmes_table_of_kinds_is_the_registrys():
    table = (ROOT / "README.md").read_text().split("<!-- kinds -->\n")[1].split("<!-- /kinds -->")[0]
    assert table == "\n".join(kinds_table(KINDS)) + "\n"


def test_wheels_carry_the_tables_and_the_sample():
    for path in ("families/unet_sdxl.txt", "samples/neon_kohya.safetensors", "py.typed"):
        assert (PACKAGE / path).is_file()
    assert not [path for path in Path(PACKAGE).rglob("*") if "helpers" in path.name or "utils" in path.name]

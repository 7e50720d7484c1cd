"""The fixture `lora_golden` in another project's tests, run by pytest itself."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import flip_evaluator  # noqa: F401  (extensions that a run within this process must not import first)
import numpy  # noqa: F401
import pytest
import skimage.metrics  # noqa: F401
from conftest import ROOT
from PIL import Image

pytest_plugins = "pytester"

TEST = """
import numpy as np

def picture(level=90):
    values = np.random.default_rng(0).integers(0, 60, (64, 64, 3))
    return (values + level).astype(np.uint8)

def test_picture(lora_golden):
    lora_golden.check(picture(), "red")
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Another project, with the plugin and no other, whether or not this one is installed with its entry point."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p lora_convert.runtime.pytest_plugin")
    return pytester


def recorded(project: pytest.Pytester, test: str = TEST) -> Path:
    """A project whose golden picture is drawn."""
    project.makepyfile(test)
    project.runpytest("--lora-golden-update").assert_outcomes(passed=1)
    return project.path / "golden" / "red.png"


def test_update_writes_the_golden_and_says_so_and_then_it_passes(project: pytest.Pytester) -> None:
    project.makepyfile(TEST)
    result = project.runpytest("--lora-golden-update")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*golden pictures*", "wrote golden/red.png"])
    path = project.path / "golden" / "red.png"
    with Image.open(path) as picture:
        assert (picture.mode, picture.size, picture.info) == ("RGB", (64, 64), {})
    project.runpytest().assert_outcomes(passed=1)
    before = path.stat().st_mtime_ns
    result = project.runpytest("--lora-golden-update")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*wrote*")
    assert path.stat().st_mtime_ns == before


def test_a_missing_golden_says_how_to_draw_it(project: pytest.Pytester) -> None:
    project.makepyfile(test_style=TEST)
    result = project.runpytest()
    result.assert_outcomes(failed=1)
    said = "there is no golden picture golden/red.png; draw it with: pytest test_style.py --lora-golden-update"
    result.stdout.fnmatch_lines([said, "*as it is now: *red.new.png"])
    result.stdout.no_fnmatch_line("*Error*")
    assert not (project.path / "golden").exists()


def test_a_mismatch_has_figures_and_leaves_pictures_to_look_at(project: pytest.Pytester) -> None:
    recorded(project)
    project.makepyfile(TEST.replace("level=90", "level=140"))
    result = project.runpytest("--lora-golden-output", "out")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "the picture 'red' differs from golden/red.png: tile difference 0.19* (at most 0.00*), *FLIP *",
            "*as it is now: *red.new.png",
            "*difference × 5: *red.difference.png",
            "If the change is meant, run again with --lora-golden-update.",
        ]
    )
    left = sorted(path.relative_to(project.path).as_posix() for path in (project.path / "out").rglob("*.png"))
    folder = left[0].rpartition("/")[0]
    assert left == [f"{folder}/red.difference.png", f"{folder}/red.new.png"]
    assert "test_picture" in folder
    with Image.open(project.path / left[1]) as picture:
        assert picture.size == (64, 64)


def test_without_a_folder_the_pictures_go_to_the_tests_own(project: pytest.Pytester) -> None:
    recorded(project)
    project.makepyfile(TEST.replace("level=90", "level=140"))
    result = project.runpytest("--basetemp", str(project.path / "temporary"))
    result.assert_outcomes(failed=1)
    assert len(list((project.path / "temporary").rglob("red.*.png"))) == 2
    assert [path.name for path in (project.path / "golden").iterdir()] == ["red.png"]


@pytest.mark.parametrize(
    ("tolerance", "level", "passes"),
    [
        ("None", 91, True),  # one level of 255: another machine
        ("'strict'", 91, False),
        ("'loose'", 91, False),
        ("None", 100, False),
        ("{'tile_difference': 0.1, 'tile_ssim': 0.5, 'flip': 0.9}", 100, True),
        ("Tolerance(0.1, 0.5, 0.9)", 100, True),
        ("{'tile_difference': 0.1}", 100, False),
    ],
)
def test_tolerances(project: pytest.Pytester, tolerance: str, level: int, passes: bool) -> None:
    recorded(project)
    changed = TEST.replace("level=90", f"level={level}").replace('"red"', f'"red", tolerance={tolerance}')
    project.makepyfile(f"from lora_convert.runtime.policy import Tolerance\n{changed}")
    project.runpytest().assert_outcomes(passed=passes, failed=not passes)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"red"', '"../red"', "'../red' is no name of a golden picture"),
        ('"red"', '""', "'' is no name of a golden picture"),
        ('"red"', '"red", tolerance="loosest"', "'loosest' is no level of the policy; there are strict, loose, wide"),
        ('"red"', '"red", tolerance={"ssim": 1}', "a tolerance has tile_difference, tile_ssim, flip, and no ssim"),
        ("(64, 64, 3)", "(64, 72, 3)", "72×64 pixels, and its golden picture 64×64"),
        (".astype(np.uint8)", ".astype(float)", "dtype float64 is no picture"),
    ],
)
def test_what_is_wrong_is_a_sentence(project: pytest.Pytester, old: str, new: str, said: str) -> None:
    recorded(project)
    project.makepyfile(TEST.replace(old, new))
    result = project.runpytest()
    result.assert_outcomes(failed=1)
    assert said in result.stdout.str()


def test_a_damaged_golden_is_told(project: pytest.Pytester) -> None:
    recorded(project).write_bytes(b"nothing")
    result = project.runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["golden/red.png cannot be read (red.png is no PNG picture*--lora-golden-update"])
    project.runpytest("--lora-golden-update").assert_outcomes(passed=1)
    project.runpytest().assert_outcomes(passed=1)


def test_the_folder_is_a_setting_and_an_option_and_names_may_have_folders(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\nlora_golden_dir = pictures/known\n")
    project.makepyfile(TEST.replace('"red"', '"shapes/red.v1"'))
    project.runpytest("--lora-golden-update").assert_outcomes(passed=1)
    assert (project.path / "pictures/known/shapes/red.v1.png").exists()
    project.runpytest().assert_outcomes(passed=1)
    project.runpytest("--lora-golden-dir", "other").assert_outcomes(failed=1)


def test_goldens_lie_beside_the_tests_file(project: pytest.Pytester) -> None:
    project.mkpydir("inner").joinpath("test_inner.py").write_text(TEST)
    project.runpytest("--lora-golden-update").assert_outcomes(passed=1)
    assert (project.path / "inner/golden/red.png").exists()


def test_two_tests_that_write_one_golden_must_draw_the_same(project: pytest.Pytester) -> None:
    other = '\ndef test_other(lora_golden):\n    lora_golden.check(picture(140), "red")\n'
    project.makepyfile(TEST + other)
    result = project.runpytest("--lora-golden-update")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["two tests write the golden picture 'red', and their pictures differ: *"])


def test_pil_images_of_any_mode_and_the_difference_is_returned(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        from PIL import Image

        def test_picture(lora_golden):
            image = Image.new("RGBA", (64, 64), (200, 30, 90, 120))
            difference = lora_golden.check(image, "red")
            assert difference.tile_difference == 0
        """
    )
    project.runpytest("--lora-golden-update").assert_outcomes(passed=1)
    project.runpytest().assert_outcomes(passed=1)


def test_it_works_with_xdist(project: pytest.Pytester) -> None:
    project.makepyfile(TEST)
    both = ("-p", "xdist.plugin", "-n", "1")
    result = project.runpytest_subprocess(*both, "--lora-golden-update")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["wrote golden/red.png"])
    project.runpytest_subprocess(*both).assert_outcomes(passed=1)


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    heavy = ("torch", "diffusers", "numpy", "PIL", "skimage", "click", "rich")
    code = f"import sys, lora_convert.runtime.pytest_plugin; sys.exit(str([m for m in {heavy} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.strip() == "[]"


def test_the_package_declares_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"lora_golden": "lora_convert.runtime.pytest_plugin"}

"""What the fuzzers ask of every file, asked of their seeds, of mutated ones, and of what they have found."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT

pytest.importorskip("torch")

import lora_convert
from fuzz.forms import FORMS, as_file, container
from fuzz.invariants import CHECKS, Escape, make_ready, nothing_else_happens
from fuzz.seeds import seeds
from lora_convert.containers import Source


@pytest.fixture(scope="module")
def checked():
    """Check a file as the fuzzer of a target does."""
    for target in CHECKS:
        make_ready(target, [as_file(target, seed) for seed in seeds(target)])

    def check_file(target: str, file: bytes) -> None:
        with warnings.catch_warnings(), nothing_else_happens():
            warnings.simplefilter("error")
            CHECKS[target](file)

    return check_file


def mutated(seed: bytes, other: bytes, chance: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(1, len(data) + 1), chance.randint(1, 8)
        match chance.randrange(5):
            case 0:
                data[at : at + size] = chance.randbytes(chance.randint(0, size))
            case 1:
                data[at:at] = data[1 : 1 + size]
            case 2:
                del data[at : at + size]
            case 3:
                data[at : at + size] = other[at : at + 2 * size]
            case _:
                data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("target", FORMS)
def test_seeds_and_mutated_seeds(target, checked):
    chance, given = random.Random(target), seeds(target)
    assert {seed[0] for seed in given} == set(range(len(FORMS[target]))), "every form has a seed"
    for seed in given:
        checked(target, as_file(target, seed))
    for _ in range(2_000):
        checked(target, as_file(target, mutated(chance.choice(given), chance.choice(given), chance)))


@pytest.mark.parametrize("target", FORMS)
def test_forms_reach_the_readers(target):
    """Of each form at least one seed makes a file that is read to its end, so that a fuzzer gets behind the checks."""
    read = {seed[0] for seed in seeds(target) if lora_convert.identify(as_file(target, seed)).tensors}
    assert read == set(range(len(FORMS[target])))


@pytest.mark.parametrize("target", FORMS)
def test_what_is_read_converts_or_is_refused(target, tmp_path):
    """Beyond the readers: no value, name or shape makes a conversion raise, or write anywhere else."""
    chance, given, seen = random.Random(target), seeds(target), set()
    files = [*given, *(mutated(chance.choice(given), chance.choice(given), chance) for _ in range(1_500))]
    for number, file in enumerate(as_file(target, seed) for seed in files):
        if not lora_convert.identify(file, family="tiny-sd15").tensors:
            continue
        out = tmp_path / "out" / str(number)
        result = lora_convert.convert(file, out, family="tiny-sd15", to=chance.choice(["diffusers", "kohya"]))
        assert result.ok or result.findings
        assert out.exists() == result.ok
        seen.add((result.status, result.detection.kind if result.detection else "unknown"))
    assert ("converted", "embedding") in seen
    assert target != "headers" or ("converted", "lora") in seen
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FOUND = {
    "an array without its state": ("pickles", b"\x80\x02}X\1\0\0\0acnumpy.core.multiarray\n_reconstruct\n"
        b"(cnumpy\nndarray\nK\0\x85C\1btRs."),
    "a NaN that signals": ("headers", container(
        b"\0\0" + b'{"emb_params":{"dtype":"F32","shape":[1,64],"data_offsets":[0,256]}}'
    ) + b"\1\0\x80\x7f" * 64),
}  # fmt: skip
"""Files that fuzzers have found, each cut down to what matters."""


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found(case, checked):
    target, file = FOUND[case]
    checked(target, file)
    assert lora_convert.identify(file).tensors


@pytest.mark.parametrize(
    ("what", "act"),
    [
        ("import", lambda: __import__("this")),
        ("open", lambda: open(__file__).close()),
        ("open", lambda: io.FileIO(__file__).close()),
        ("compile", lambda: exec("1")),
        ("subprocess.Popen", lambda: subprocess.run([sys.executable, "-V"])),
        ("pickle.find_class", lambda: pickle.loads(b"cbuiltins\nlen\n.")),
    ],
)
def test_what_readers_must_not_do_is_noticed(what, act):
    with pytest.raises(Escape, match=what), nothing_else_happens():
        act()
    act()  # outside of the block nothing is watched


def crashing(source: Source, name: str) -> bytes:
    raise ValueError(name)


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize(
    ("broken", "error"), [(crashing, ValueError), (lambda source, name: b"", (AssertionError, ValueError))]
)
def test_a_reader_that_breaks_its_promise_is_noticed(broken, error, target, monkeypatch):
    monkeypatch.setattr(Source, "read_bytes", broken)
    seed = next(seed for seed in seeds(target) if lora_convert.identify(as_file(target, seed), alphas=False).tensors)
    with pytest.raises(error):
        CHECKS[target](as_file(target, seed))


def test_the_fuzzer_runs(tmp_path):
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "fuzz.run", "headers", str(tmp_path), "-runs=200"]
    subprocess.run([sys.executable, "-m", "fuzz.seeds", str(tmp_path)], cwd=ROOT, check=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DONE" in done.stderr

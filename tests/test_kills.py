"""Conversions that are killed, or find the disk full: the target is the old file or the new one, whole."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import LORA, ROOT, lora

import lora_convert
from lora_convert.cli import run

SOURCE = LORA / "k_sd15_dylora.safetensors"
MOMENTS = 50
SEVERAL = [f"lora_unet_down_blocks_{block}_attentions_{number}_" for block in (1, 2) for number in (0, 1)]

SERVER = """
import hashlib, json, os, pathlib, random, signal, sys, time
import lora_convert

source, out, options, moments = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])

def converted(**options):
    assert lora_convert.convert(source, out, force=True, **options).ok

def state(files):
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return sums, sum(path.suffix == ".part" for path in out.parent.rglob("*"))

def attempt(delay=None):
    child = os.fork()
    if not child:
        try:
            converted(**options)
        finally:
            os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

converted(**options)
files = sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else [out]
new = state(files)[0]
converted(**options, dtype="fp32")
before = [file.read_bytes() for file in files]
old = state(files)[0]
began = time.perf_counter()
attempt()
took = time.perf_counter() - began
chance, seen = random.Random(0), []
for moment in range(moments):
    for file, content in zip(files, before):
        file.write_bytes(content)
    ended = attempt((moment + chance.random()) / moments * 1.2 * took)
    seen.append([ended, *state(files)])
attempt()
print(json.dumps([old, new, seen, state(files)]))
"""


@pytest.fixture(scope="module")
def some_megabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose factors are folded, so that reading, computing, writing and proving it each take their time."""
    from safetensors.numpy import save_file

    sizes = {"1": 640, "2": 1280}
    tensors: dict[str, Any] = {}
    for place, start in enumerate(SEVERAL):
        width = sizes[start.split("_")[4]]
        for part, inside in (("attn1_to_q", width), ("attn2_to_k", 768), ("attn2_to_v", 768)):
            name = f"{start}transformer_blocks_0_{part}"
            tensors |= lora(name, width, inside, 64, 3.0, seed=place)
    path = tmp_path_factory.mktemp("source") / "in.safetensors"
    save_file(tensors, path)
    assert path.stat().st_size > 2_000_000
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX signals")
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_conversion_killed_at_any_moment_leaves_whole_files(to, some_megabytes, tmp_path):
    """`peft` writes a file of weights and a configuration; each of them is old or new."""
    target = tmp_path / ("o" if to == "peft" else "o.safetensors")
    options = {"to": to, "family": "sd15"}
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(some_megabytes), str(target), json.dumps(options), str(MOMENTS)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    old, new, seen, last = json.loads(done.stdout)
    assert len(seen) == MOMENTS and old != new
    for ended, sums, left in seen:
        assert ended in (0, signal.SIGKILL)
        for given, before, after in zip(sums, old, new, strict=True):
            assert given in (before, after)
        assert left <= len(new), "a run removes what an earlier one left"
    assert Counter(ended for ended, *_ in seen)[signal.SIGKILL] > 5
    assert last == [new, 0]


class FullDisk(io.FileIO):
    """A file on a disk that takes so many bytes and no more."""

    room = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > FullDisk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= size
        return super().write(data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> type[FullDisk]:
    """New files are on a disk with the room that the test gives it."""
    usual = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return io.BufferedRandom(FullDisk(file, mode)) if "x" in mode else usual(file, mode, *arguments, **options)

    monkeypatch.setattr(io, "open", opened)
    return FullDisk


def content_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence with which the command line says that it could not run."""
    assert run([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("lora-convert: ") and said.err.count("\n") == 1
    return said.err.removeprefix("lora-convert: ").strip()


WHOLE = 65_000  # bytes of the output, nearly


@pytest.mark.parametrize("room", [0, 1, 4_096, 5_000, 40_000, WHOLE])
@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_a_full_disk_leaves_the_old_file_and_says_where(to, room, disk, capsys, tmp_path):
    target = tmp_path / "out"
    disk.room = 1 << 30
    assert lora_convert.convert(SOURCE, target, to=to).ok
    before = content_of(tmp_path)
    disk.room = room
    said = refused(capsys, "convert", SOURCE, "-o", target, "--to", to, "--force", "--dtype", "fp32")
    assert said.startswith("No space left on device: ") and str(target) in said
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_when_it_is_flushed(code, monkeypatch, capsys, tmp_path):
    def failing(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "o.safetensors").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        said = refused(capsys, "convert", SOURCE, "-o", tmp_path / "o.safetensors", "--force")
    assert said == f"{os.strerror(code)}: {tmp_path / 'o.safetensors'}"
    assert (tmp_path / "o.safetensors").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


FULL = """
mount -t tmpfs -o size=256k tmpfs disk && cp old disk/o.safetensors && sha256sum < disk/o.safetensors
"$@"; echo "status $?"
sha256sum < disk/o.safetensors; ls -A disk
"""


def may_mount() -> bool:
    command = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(sys.platform != "linux" or not may_mount(), reason="file systems cannot be mounted here")
def test_a_disk_that_is_really_full(some_megabytes, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "old").write_bytes(os.urandom(70_000))
    command = [sys.executable, "-m", "lora_convert", "convert", str(some_megabytes), "-o", "disk/o.safetensors"]
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", FULL, "sh", *command, "--family", "sd15", "--force"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    before, status, after, *left = done.stdout.splitlines()
    assert (status, left) == ("status 2", ["o.safetensors"])
    assert before == after
    assert done.stderr == "lora-convert: No space left on device: disk/o.safetensors\n"

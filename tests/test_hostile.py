"""Files that strangers made or that were damaged: a result or a finding, in little time, and nothing else happens."""

from __future__ import annotations

import functools
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CORPUS, LORA, ROOT, read_all
from safetensors import deserialize, safe_open
from safetensors.numpy import save

import lora_convert
from lora_convert.containers.pickles import LIMITS

# damaged LoRA files


@functools.cache
def seeds() -> tuple[bytes, bytes]:
    """A small real file: with little metadata, so that the first KB has names, shapes and places, and as it is."""
    path = LORA / "k_sd15_dylora.safetensors"
    with safe_open(path, "np") as file:
        kept = {name: file.metadata()[name] for name in ("ss_network_module", "ss_network_args", "ss_v2", "ss_steps")}
    return save(read_all(path), kept), path.read_bytes()


def cut(data: bytes) -> Iterator[bytes]:
    """At every 4 KB, at the byte before it and the byte behind it."""
    for boundary in range(4096, len(data), 4096):
        for size in (boundary - 1, boundary, boundary + 1):
            yield data[:size]


def flipped(data: bytes) -> Iterator[bytes]:
    """Every bit of the first KB, one at a time."""
    for position in range(8 * 1024):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        yield bytes(damaged)


def random_bytes(data: bytes, chance: random.Random) -> bytes:
    """Noise: alone, behind a length that may be true, behind a sound header, or among the numbers."""
    kind = chance.randrange(4)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    if kind == 0:
        return chance.randbytes(chance.randrange(3000))
    if kind == 1:
        size = chance.randrange(200)
        return struct.pack("<Q", size) + chance.randbytes(size + chance.randrange(20))
    if kind == 2:
        return data[:start] + chance.randbytes(len(data) - start)
    damaged = bytearray(data)
    for _ in range(chance.randrange(1, 50)):
        damaged[chance.randrange(start, len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def spliced(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Pieces of two files, or one with pieces repeated, left out, moved or emptied."""
    where = len(data) if chance.random() < 0.3 else 3000
    first, second = sorted(chance.randrange(where) for _ in range(2))
    piece = data[first:second]
    match chance.randrange(6):
        case 0:
            return data[:first] + other[first:]
        case 1:
            return data[:first] + other[first:second] + data[second:]
        case 2:
            return data[:second] + piece + data[second:]
        case 3:
            return data[:first] + data[second:]
        case 4:
            return data[:first] + bytes(len(piece)) + data[second:]
        case _:
            return data[:first] + piece[::-1] + data[second:]


def damaged_files() -> Iterator[tuple[str, bytes]]:
    """10,000 of them."""
    bare, whole = seeds()
    for seed in (bare, whole):
        yield from (("cut", data) for data in cut(seed))
    yield from (("flipped", data) for data in flipped(bare))
    chance = random.Random(5)
    for number in range(10_000 - 8192 - 2 * len(list(cut(bare)))):
        seed, other = (bare, whole)[:: chance.choice((1, -1))]
        if number % 2:
            yield "random", random_bytes(seed, chance)
        else:
            yield "spliced", spliced(seed, other, chance)


def assert_holds_the_same(written: Path, data: bytes, to: str) -> None:
    """Kohya's layout keeps the names as well; with alpha in the header, Diffusers' has the same matrices."""
    source = {name: tensor for name, tensor in deserialize(data) if tensor["data"]}
    ours = dict(deserialize(written.read_bytes()))
    if to == "kohya":
        assert ours == source
    else:
        assert Counter(bytes(tensor["data"]) for tensor in ours.values()) == Counter(
            bytes(tensor["data"]) for name, tensor in source.items() if not name.endswith(".alpha")
        )


def identified_and_converted(number: int, kind: str, data: bytes, out: Path) -> tuple[str, ...]:
    """What became of a damaged file. Everything written holds what the reference reader reads from the same bytes."""
    to = "diffusers" if random.Random(number).random() < 0.5 else "kohya"
    found = lora_convert.identify(data)
    assert found.ok or all(finding.message for finding in found.findings)
    if not found.ok:
        return kind, "refused"
    options = {"alpha": "header"} if to == "diffusers" else {}
    result = lora_convert.convert(data, out, to=to, force=True, **options)
    assert out.exists() == result.ok
    if result.ok:
        assert_holds_the_same(out, data, to)
        out.unlink()
    return kind, result.status


def test_damaged_loras_are_refused_or_hold_what_the_reference_reads(tmp_path):
    """10,000 files, of which some hundreds are sound. No case may take long; how long is a matter of the machine."""
    seen: Counter[tuple[str, ...]] = Counter()
    longest = 0.0
    for number, (kind, data) in enumerate(damaged_files()):
        began = time.process_time()
        seen[identified_and_converted(number, kind, data, tmp_path / "o.safetensors")] += 1
        longest = max(longest, time.process_time() - began)
    assert seen.total() == 10_000
    assert longest < 2
    assert seen["cut", "refused"] == sum(number for (kind, _), number in seen.items() if kind == "cut")
    assert all(seen[kind, "converted"] > 50 for kind in ("flipped", "random", "spliced")), seen
    assert list(tmp_path.iterdir()) == []


# files that were made to do harm

corpus = [
    pytest.mark.corpus,
    pytest.mark.skipif(not CORPUS.is_dir(), reason="the shared corpus is not beside this checkout"),
]
BAD = CORPUS / "bad"
GOOD = LORA / "k_sd15_lorafa.safetensors"
NASTY = [
    "pickle/01_reduce_os_system.bin", "pickle/19_deep_nesting.bin", "pickle/22_memo_bomb.bin",
    "pickle/24_stride_bomb.pt", "pickle/27_zip_bomb_storage.pt", "image/i06_deep_json.png", "image/i07_ztxt_bomb.png",
    "safetensors/s02_header_len_100mb.safetensors",
]  # fmt: skip
"""What a reader without bounds would take long for, or much memory."""

MOST_SECONDS, MOST_KILOBYTES = 2, 200_000

SERVER = """
import contextlib, io, json, pathlib, re, shutil, sys, time
from lora_convert.cli import run

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

def called(*arguments):
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run([*arguments, "--json"])
    return status, out.getvalue(), err.getvalue(), time.process_time() - began

good, *files = sys.argv[1:]
called("inspect", good), called("convert", good, "-o", "good")
before = peak()
for path in files:
    said = [called("inspect", path), called("convert", path, "-o", "out")]
    print(json.dumps([path, *said, peak() - before, pathlib.Path("out").exists()]))
    shutil.rmtree("out", ignore_errors=True)
"""


def in_a_child(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Python in an empty folder, which is also where temporary files go: nothing else may appear there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_small_file_of_large_tensors_stays_bounded(tmp_path):
    """Views that repeat one number make as much of a few bytes as the reader allows."""
    torch = pytest.importorskip("torch")
    name, one = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", torch.ones(1)
    one = one.to(torch.float8_e4m3fn)
    rank = LIMITS.spare // (320 + 768)
    path = tmp_path / "in.pt"
    torch.save(
        {f"{name}.lora_down.weight": one.expand(rank, 768), f"{name}.lora_up.weight": one.expand(320, rank)}, path
    )
    assert path.stat().st_size < 2_000
    with in_a_child(tmp_path, "-c", SERVER, GOOD, path) as child:
        out, err = child.communicate()
    _, inspected, converted, kilobytes, written = json.loads(out)
    assert (inspected[0], converted[0], written) == (0, 0, True), err
    assert max(inspected[3], converted[3]) < MOST_SECONDS
    assert kilobytes < MOST_KILOBYTES


UNREADABLE = {
    "empty-file", "malformed-header", "malformed-pickle", "malformed-picture", "no-embedding", "not-weights",
    "unsafe-pickle",
}  # fmt: skip
"""What is said of a file that is not read. Whether one that is read is good for anything is another question."""


class TestCorpus:
    pytestmark = corpus

    def test_every_file_behaves_as_its_record_says(self, tmp_path):
        """Both verbs on all of them, in one process that none of them may make slower, larger or say too much."""
        samples = json.loads((BAD / "bad.json").read_text())["samples"]
        with in_a_child(tmp_path, "-c", SERVER, GOOD, *(BAD / sample["file"] for sample in samples)) as child:
            out, err = child.communicate()
        assert (child.returncode, err) == (0, "")
        lines = [json.loads(line) for line in out.splitlines()]
        assert len(lines) == len(samples) >= 75
        for sample, (path, inspected, converted, kilobytes, written) in zip(samples, lines, strict=True):
            assert kilobytes < MOST_KILOBYTES, path
            assert written == (converted[0] == 0), path
            for status, said, error, seconds in (inspected, converted):
                wrong = {found["name"] for found in json.loads(said)["findings"] if found["severity"] == "error"}
                assert (status, error) == (1 if wrong else 0, ""), path
                assert seconds < MOST_SECONDS, path
                assert bool(wrong & UNREADABLE) == (sample["expect"] == "reject"), path
        assert {path.name for path in tmp_path.iterdir()} == {"good"}, "something was written, or even run"

    @pytest.mark.parametrize("name", [None, *NASTY])
    def test_a_process_of_its_own_stays_small(self, name, tmp_path):
        peaks = []
        for path in (GOOD, BAD / name if name else GOOD):
            with in_a_child(tmp_path, "-m", "lora_convert", "inspect", path) as child:
                out, err = child.stdout.read(), child.stderr.read()
                _, status, usage = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(status)
            assert (child.returncode, err) == (1 if path != GOOD else 0, "") and out
            assert usage.ru_utime + usage.ru_stime < MOST_SECONDS
            peaks.append(usage.ru_maxrss)
        assert peaks[1] - peaks[0] < MOST_KILOBYTES
        assert list(tmp_path.iterdir()) == []

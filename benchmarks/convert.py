"""What converting costs, beside what it replaces: `python benchmarks/convert.py`, with --runs N, --json FILE.

Whole processes on one 170 MB SDXL LoRA (see sample.py), one after the other, in turns, so that a slow moment of the
machine hits all alike. Shown are medians of wall time, of CPU time (user and system, all threads) and of peak resident
memory.

- One uncounted turn first: files are in the page cache, bytecode is compiled, libraries have been read once.
- Every output is new, and is removed after its run; before each run `sync` writes out what others left behind.
- `cp` and diffusers leave their output in the page cache; `convert` waits until it is on the disk (fsync).
- diffusers does less: it computes no hash, and what it writes has lost the alphas.
- The figures are for reading; the exit status does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Protocol

# This process stays small on purpose: the peak memory of a child begins with that of the process it is forked from.

HERE = Path(__file__).resolve().parent
_MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024

_HASH = "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())"
_HASH_ALONE = (
    "import hashlib, sys, time; data = open(sys.argv[1], 'rb').read(); start = time.perf_counter(); "
    "hashlib.sha256(data).digest(); print(time.perf_counter() - start)"
)


class Command(Protocol):
    """What is measured: a command line that reads a file and writes, if it writes, into a folder."""

    @property
    def command(self) -> Callable[[str, str], Sequence[str]]: ...


@dataclass(frozen=True)
class Case:
    """One row of the table: a command that reads `file` and writes, if it writes, into `folder`."""

    key: str
    title: str
    command: Callable[[str, str], Sequence[str]]


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def lora_convert(*arguments: str) -> list[str]:
    return python("-m", "lora_convert", *arguments, "--json")


def _copy_and_sync(file: str, folder: str) -> list[str]:
    return ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", file, f"{folder}/copy"]


def _diffusers(file: str, folder: str) -> list[str]:
    return python(str(HERE / "with_diffusers.py"), file, folder)


def _convert(*options: str) -> Callable[[str, str], Sequence[str]]:
    return lambda file, folder: lora_convert("convert", file, "-o", folder, *options)


CASES = (
    Case("cp", "a: `cp`", lambda file, folder: ["cp", file, f"{folder}/copy"]),
    Case("cp+sync", "`cp`, then `sync` of the copy", _copy_and_sync),
    Case("diffusers", "b: diffusers, load and save", _diffusers),
    Case("sha256", "c: one SHA-256 (Python's hashlib)", lambda file, folder: python("-c", _HASH, file)),
    Case("no-validate", "d: `convert --no-validate`", _convert("--no-validate")),
    Case("header", "e: `convert --alpha header --no-validate`", _convert("--alpha", "header", "--no-validate")),
    Case("convert", "f: `convert`", _convert()),
    Case("inspect", "g: `inspect`", lambda file, folder: lora_convert("inspect", file)),
)


@dataclass(frozen=True)
class Run:
    """One process: wall and CPU time in seconds, peak resident memory in MB (10^6 bytes)."""

    wall: float
    cpu: float
    memory: float


def _environment() -> dict[str, str]:
    """The user's, with this package in reach and compiled bytecode kept, as it is for a user."""
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": path}


def run(command: Sequence[str]) -> Run:
    """Run a command to its end and measure it. Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    child = subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.stderr.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, stderr=said.decode(errors="replace"))
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * _MEMORY_UNIT / 1e6)


def measure(case: Command, file: Path, base: Path) -> Run:
    """One run of a case in a folder of its own."""
    folder = base / "out"
    folder.mkdir()
    try:
        os.sync()
        return run(case.command(str(file), str(folder)))
    finally:
        shutil.rmtree(folder)


def _pure_hashing(file: Path) -> float:
    """Seconds for SHA-256 of the bytes in memory, without starting Python and reading."""
    command = python("-c", _HASH_ALONE, str(file))
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def medians(runs: Sequence[Run]) -> Run:
    return Run(*(median(getattr(one, field) for one in runs) for field in ("wall", "cpu", "memory")))


@dataclass(frozen=True)
class Limit:
    """What was asked for, the figure, the most it may be, and the unit of both."""

    text: str
    figure: float
    most: float
    unit: str = "s"

    @property
    def kept(self) -> bool:
        return self.figure <= self.most


def limits(by_key: Mapping[str, Run]) -> list[Limit]:
    wall = {key: result.wall for key, result in by_key.items()}
    copy_and_hashes = 2 * (wall["cp"] + 3 * wall["sha256"]) + 0.3
    ours = max(by_key[key].memory for key in ("no-validate", "header", "convert"))
    return [
        Limit("d: at most a fifth of diffusers", wall["no-validate"], wall["diffusers"] / 5),
        Limit("d: at most 2·(a + 3c) + 0.3 s", wall["no-validate"], copy_and_hashes),
        Limit("e: at most an eighth of diffusers", wall["header"], wall["diffusers"] / 8),
        Limit("f: at most diffusers", wall["convert"], wall["diffusers"]),
        Limit("d, e, f: peak memory", ours, 120.0, "MB"),
        Limit("g: at most 0.25 s", wall["inspect"], 0.25),
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _file_system(folder: Path) -> str:
    try:
        said = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def machine(folder: Path) -> dict[str, Any]:
    packages = ("numpy", "safetensors", "torch", "diffusers", "lora-convert")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "file system": _file_system(folder),
        "load before": round(os.getloadavg()[0], 2),
        "threads (OMP_NUM_THREADS)": os.environ.get("OMP_NUM_THREADS", "unset"),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"


def _table(by_key: Mapping[str, Run]) -> Sequence[str]:
    base = by_key["diffusers"]
    lines = ["| | wall, s | of diffusers | CPU, s | peak memory, MB |", "|---|---:|---:|---:|---:|"]
    for case in CASES:
        one = by_key[case.key]
        share = f"{one.wall / base.wall:.3f}"
        lines.append(f"| {case.title} | {one.wall:.3f} | {share} | {one.cpu:.3f} | {one.memory:.0f} |")
    return lines


def limit_table(checked: Sequence[Limit]) -> Sequence[str]:
    lines = ["| limit | figure | at most | of it | |", "|---|---:|---:|---:|---|"]
    for limit in checked:
        figure, most = (
            f"{value:.3f} s" if limit.unit == "s" else f"{value:.0f} MB" for value in (limit.figure, limit.most)
        )
        verdict = "pass" if limit.kept else "FAIL"
        lines.append(f"| {limit.text} | {figure} | {most} | {limit.figure / limit.most:.2f} | {verdict} |")
    return lines


def benchmark(runs: int, base: Path) -> dict[str, Any]:
    """Make the file, take the turns and print the tables; returns the same as data."""
    file = base / "sample.safetensors"
    run(python(str(HERE / "sample.py"), str(file)))
    facts = machine(base)
    taken: dict[str, list[Run]] = {case.key: [] for case in CASES}
    hashing = []
    for turn in range(runs + 1):
        for case in CASES:
            print(f"\rturn {turn} of {runs}: {case.key:20}", end="", file=sys.stderr, flush=True)
            one = measure(case, file, base)
            if turn:
                taken[case.key].append(one)
        hashing.append(_pure_hashing(file))
    print(file=sys.stderr)
    by_key = {key: medians(results) for key, results in taken.items()}
    checked = limits(by_key)
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MEMORY_UNIT / 1e6
    print(f"Peak memory below {floor:.0f} MB is this process's own, from which all are forked.")
    print(f"A file of {file.stat().st_size:,} bytes; medians of {runs} runs; SHA-256 alone {median(hashing):.3f} s.\n")
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), end="\n\n")
    print("\n".join(_table(by_key)), end="\n\n")
    print("\n".join(limit_table(checked)))
    return {
        "machine": facts,
        "bytes": file.stat().st_size,
        "sha256_alone": median(hashing),
        "cases": {key: {**asdict(by_key[key]), "runs": [asdict(one) for one in taken[key]]} for key in taken},
        "limits": [{**asdict(limit), "kept": limit.kept} for limit in checked],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each process (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE too")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora-convert-", dir=asked.folder) as base:
        content = benchmark(asked.runs, Path(base))
    if asked.json:
        asked.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

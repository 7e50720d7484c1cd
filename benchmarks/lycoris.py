"""What the algebra costs, beside dense SVD: `python benchmarks/lycoris.py`, with --runs N, --json FILE.

Whole processes on two synthetic SDXL adapters of 722 linear layers (see lycoris_sample.py), in turns, after an
uncounted one; medians of wall time, CPU time and peak resident memory.

- The dense way is timed on one module of each shape and scaled up (see with_dense_svd.py): without reading a file,
  writing one, or starting Python. It runs once, under the same number of threads.
- Writing is a process that has the bytes of LoHa's exact output in memory and writes them to a new file and the disk
  (fsync), timed without its start; "written again" is `convert` of that output, which is a LoRA already: the same
  reading, writing and hashing without the algebra.
- Random factors lose most of their change at rank 32, hence --max-error 0.99.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from convert import HERE, Limit, Run, limit_table, lora_convert, machine, measure, medians, python, run

_WRITE = (
    "import os, sys, time; data = open(sys.argv[1], 'rb').read(); start = time.perf_counter(); "
    "file = open(sys.argv[2], 'xb'); file.write(data); file.flush(); os.fsync(file.fileno()); "
    "print(time.perf_counter() - start); os.remove(sys.argv[2])"
)
_RANK = ("--rank", "32", "--max-error", "0.99")
KINDS = ("loha", "lokr")


@dataclass(frozen=True)
class Case:
    """One row: a conversion of the file of a kind."""

    key: str
    title: str
    kind: str
    options: Sequence[str]

    def command(self, file: str, folder: str) -> Sequence[str]:
        return lora_convert("convert", file, "-o", folder, *self.options)


CASES = (
    Case("loha", "a: LoHa, rank 32", "loha", (*_RANK, "--no-validate")),
    Case("loha proved", "b: the same, proved", "loha", _RANK),
    Case("lokr", "c: LoKr, rank 32", "lokr", (*_RANK, "--no-validate")),
    Case("lokr proved", "d: the same, proved", "lokr", _RANK),
    Case("exact", "e: LoHa, exact (rank 64)", "loha", ("--no-validate",)),
    Case("again", "f: e's output, written again", "again", ("--no-validate",)),
)


def _printed(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def dense(file: Path) -> Mapping[str, Any]:
    """The dense way on a file: see with_dense_svd.py."""
    found: Mapping[str, Any] = json.loads(_printed(*python(str(HERE / "with_dense_svd.py"), str(file))))
    return found


def written(file: Path) -> float:
    """Seconds to write the bytes of a file to the disk."""
    os.sync()
    return float(_printed(*python("-c", _WRITE, str(file), str(file.with_suffix(".again")))))


def samples(base: Path) -> dict[str, Path]:
    """The two adapters, and LoHa's exact output under `again`."""
    files = {kind: base / f"{kind}.safetensors" for kind in KINDS}
    for kind, file in files.items():
        run(python(str(HERE / "lycoris_sample.py"), kind, str(file)))
    exact = base / "exact"
    run(lora_convert("convert", str(files["loha"]), "-o", str(exact), "--no-validate"))
    (output,) = exact.glob("*.safetensors")
    return {**files, "again": output}


def limits(by_key: Mapping[str, Run], dense_seconds: Mapping[str, float], writing: float) -> list[Limit]:
    slowest = max(by_key[key].wall for key in ("loha proved", "lokr proved"))
    memory = max(one.memory for one in by_key.values())
    return [
        Limit("b: at most a thirtieth of dense SVD", by_key["loha proved"].wall, dense_seconds["loha"] / 30),
        Limit("d: at most a thirtieth of dense SVD", by_key["lokr proved"].wall, dense_seconds["lokr"] / 30),
        Limit("b, d: under 30 s", slowest, 30.0),
        Limit("a to f: peak memory", memory, 600.0, "MB"),
        Limit("e: at most 3 × writing the bytes", by_key["exact"].wall, 3 * writing),
    ]


def _table(by_key: Mapping[str, Run], dense_seconds: Mapping[str, float]) -> Sequence[str]:
    lines = ["| | wall, s | dense SVD is slower | CPU, s | peak memory, MB |", "|---|---:|---:|---:|---:|"]
    for case in CASES:
        one = by_key[case.key]
        ratio = f"{dense_seconds[case.kind] / one.wall:.0f} ×" if case.options[0] == "--rank" else "–"
        lines.append(f"| {case.title} | {one.wall:.2f} | {ratio} | {one.cpu:.2f} | {one.memory:.0f} |")
    return lines


def benchmark(runs: int, base: Path) -> dict[str, Any]:
    """Make the files, take the turns and print the tables; returns the same as data."""
    files, facts = samples(base), machine(base)
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), end="\n\n", flush=True)
    densely = {kind: dense(files[kind]) for kind in KINDS}
    dense_seconds = {kind: float(found["seconds"]) for kind, found in densely.items()}
    taken: dict[str, list[Run]] = {case.key: [] for case in CASES}
    writing = []
    for turn in range(runs + 1):
        for case in CASES:
            one = measure(case, files[case.kind], base)
            if turn:
                taken[case.key].append(one)
        writing.append(written(files["again"]))
    by_key = {key: medians(results) for key, results in taken.items()}
    checked = limits(by_key, dense_seconds, median(writing[1:]))
    sizes = ", ".join(f"{name} {file.stat().st_size / 1e6:.1f} MB" for name, file in files.items())
    print(f"Files: {sizes}. Medians of {runs} runs. Writing the last one to the disk: {median(writing[1:]):.2f} s.")
    threads = densely["loha"]["threads"]
    print(f"Dense SVD, {threads} thread(s): {', '.join(f'{kind} {dense_seconds[kind]:.0f} s' for kind in KINDS)}.\n")
    print("\n".join(_table(by_key, dense_seconds)), end="\n\n")
    print("\n".join(limit_table(checked)))
    return {
        "machine": facts,
        "dense": densely,
        "writing": writing[1:],
        "cases": {key: {**asdict(by_key[key]), "runs": [asdict(one) for one in taken[key]]} for key in taken},
        "limits": [{**asdict(limit), "kept": limit.kept} for limit in checked],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each process (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE too")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora-convert-", dir=asked.folder) as base:
        content = benchmark(asked.runs, Path(base))
    if asked.json:
        asked.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

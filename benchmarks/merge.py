"""What baking an adapter into a base model costs, beside doing it in memory: `python benchmarks/merge.py`.

Whole processes: the 170 MB LoRA of sample.py into the 5.1 GB checkpoint of merge_sample.py, --runs N times. Outputs are
new, and removed after each run; 11 GB of disk are needed for the time being. `merge` hashes its output and waits until
it is on the disk; torch does neither. Memory counts what is mapped, as torch maps the base.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from convert import HERE, Case, Limit, limit_table, lora_convert, machine, measure, medians, python, run


def _cases(adapter: Path) -> tuple[Case, ...]:
    def merge(*options: str) -> Case:
        def command(base: str, folder: str) -> list[str]:
            output = f"{folder}/merged.safetensors"
            return lora_convert("merge", str(adapter), "--base", base, "--single-file", "-o", output, *options)

        title = "`merge --no-validate`" if options else "`merge`, proof included"
        return Case(title, title, command)

    def torch(base: str, folder: str) -> list[str]:
        return python(str(HERE / "with_torch_merge.py"), base, str(adapter), f"{folder}/merged.safetensors")

    return merge("--no-validate"), merge(), Case("torch", "torch, all in memory", torch)


def benchmark(runs: int, folder: Path) -> None:
    base, adapter = folder / "base.safetensors", folder / "adapter.safetensors"
    run(python(str(HERE / "merge_sample.py"), str(base)))
    run(python(str(HERE / "sample.py"), str(adapter)))
    print("\n".join(f"- {name}: {value}" for name, value in machine(folder).items()), end="\n\n", flush=True)
    print("| | wall, s | CPU, s | peak memory, MB |\n|---|---:|---:|---:|", flush=True)
    most = 0.0
    for case in _cases(adapter):
        one = medians([measure(case, base, folder) for _ in range(runs)])
        most = most if case.key == "torch" else max(most, one.memory)
        print(f"| {case.title} | {one.wall:.1f} | {one.cpu:.1f} | {one.memory:.0f} |", flush=True)
    print("\n" + "\n".join(limit_table([Limit("merge: peak memory", most, 3000.0, "MB")])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="runs of each process (default 1)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora-convert-", dir=asked.folder) as folder:
        benchmark(asked.runs, Path(folder))


if __name__ == "__main__":
    main()

"""The dense way: ΔW of a module, `torch.linalg.svd` of it, two factors of rank 32. `python with_dense_svd.py FILE`.

Every shape is measured on its first module (the median of three where one takes less than two seconds) and counted as
often as the file has it. Prints JSON: the seconds of the whole file, and of one module by shape. OMP_NUM_THREADS says
how many threads there are, as it does to numpy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open

RANK, ENOUGH, SHORT = 32, 3, 2.0


def change(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """ΔW but for its scale, dense, float32."""
    wide = {name: values.float() for name, values in tensors.items()}
    if "lokr_w1" in wide:
        return torch.kron(wide["lokr_w1"], wide["lokr_w2"])
    return (wide["hada_w1_a"] @ wide["hada_w1_b"]) * (wide["hada_w2_a"] @ wide["hada_w2_b"])


def _shape(tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    if "lokr_w1" in tensors:
        first, second = tensors["lokr_w1"].shape, tensors["lokr_w2"].shape
        return first[0] * second[0], first[1] * second[1]
    return tensors["hada_w1_a"].shape[0], tensors["hada_w1_b"].shape[1]


def truncated(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    left, values, right = torch.linalg.svd(change(tensors), full_matrices=False)
    root = values[:RANK].sqrt()
    return (left[:, :RANK] * root).half(), (root[:, None] * right[:RANK]).half()


def seconds(tensors: dict[str, torch.Tensor]) -> float:
    taken: list[float] = []
    while len(taken) < ENOUGH and (not taken or taken[0] < SHORT):
        start = time.perf_counter()
        truncated(tensors)
        taken.append(time.perf_counter() - start)
    return median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    with safe_open(parser.parse_args().file, "pt") as file:
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name in file.keys():  # noqa: SIM118
            module, _, field = name.partition(".")
            modules.setdefault(module, {})[field] = file.get_tensor(name)
    torch.linalg.svd(torch.ones(8, 8))  # the library is loaded outside the clock
    shapes = {module: _shape(tensors) for module, tensors in modules.items()}
    first = {shape: module for module, shape in reversed(shapes.items())}
    one = {shape: seconds(modules[module]) for shape, module in first.items()}
    counts = Counter(shapes.values())
    total = sum(counts[shape] * taken for shape, taken in one.items())
    by_shape = {f"{shape[0]}x{shape[1]}": {"modules": counts[shape], "seconds": one[shape]} for shape in sorted(one)}
    print(json.dumps({"seconds": total, "threads": torch.get_num_threads(), "shapes": by_shape}))


if __name__ == "__main__":
    main()

"""Make the files that the LyCORIS benchmark converts: `python benchmarks/lycoris_sample.py loha|lokr FILE`.

SDXL adapters as LyCORIS saves them, fp16, over the 722 linear layers of the UNet's transformers: a LoHa of rank 8, and
a LoKr with factor 16 and two whole factors. The same bytes on every run, but for the order of the metadata.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sample import adapted_modules

RANK, ALPHA, FACTOR, SEED = 8, 4.0, 16, 20240301
Tensors = dict[str, NDArray[np.float16]]
Drawing = Callable[[np.random.Generator, int, int, float], Tensors]


def _drawn(random: np.random.Generator, shapes: Mapping[str, tuple[int, int]], spread: float) -> Tensors:
    return {name: random.normal(0.0, spread, shape).astype(np.float16) for name, shape in shapes.items()}


def loha(random: np.random.Generator, rows: int, columns: int, spread: float) -> Tensors:
    left, right = (rows, RANK), (RANK, columns)
    names = {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}
    return _drawn(random, names, spread)


def lokr(random: np.random.Generator, rows: int, columns: int, spread: float) -> Tensors:
    names = {"lokr_w1": (FACTOR, FACTOR), "lokr_w2": (rows // FACTOR, columns // FACTOR)}
    return _drawn(random, names, spread)


KINDS: Mapping[str, Drawing] = {"loha": loha, "lokr": lokr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("file", type=Path)
    asked = parser.parse_args()
    random = np.random.default_rng(SEED)
    tensors: Tensors = {}
    for module in adapted_modules():
        stem = "lora_unet_" + module.original.replace(".", "_")
        rows, columns = module.shape
        drawn = KINDS[asked.kind](random, rows, columns, 10.0 ** random.uniform(-1.2, -0.8))
        tensors |= {f"{stem}.{name}": values for name, values in drawn.items()}
        tensors[f"{stem}.alpha"] = np.array(ALPHA, np.float16)
    arguments = {"algo": asked.kind, **({"factor": FACTOR, "full_matrix": True} if asked.kind == "lokr" else {})}
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}
    save_file(tensors, asked.file, {**metadata, "ss_base_model_version": "sdxl_base_v1-0"})


if __name__ == "__main__":
    main()

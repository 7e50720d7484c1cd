"""Make the base model that the benchmark of merge bakes into: `python benchmarks/merge_sample.py FILE`.

An SDXL checkpoint of the UNet's weights and biases under their SGM names, fp16, 5.1 GB. The same bytes on every run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from lora_convert.families import FAMILIES

_PREFIX = "model.diffusion_model."


def _entries() -> Iterator[tuple[str, tuple[int, ...]]]:
    unet = FAMILIES["sdxl"].component("unet")
    assert unet is not None
    for module in unet.modules.values():
        yield f"{_PREFIX}{module.original}.weight", module.shape
        if not module.path.endswith(("to_q", "to_k", "to_v")):
            yield f"{_PREFIX}{module.original}.bias", module.shape[:1]


def write(file: Path) -> None:
    header: dict[str, object] = {}
    position = 0
    for name, shape in _entries():
        size = 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    random = np.random.default_rng(0)
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        pattern = (random.standard_normal(1 << 20) / 32).astype(np.float16).tobytes()
        for _ in range(position // len(pattern)):
            output.write(pattern)
        output.write(pattern[: position % len(pattern)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    write(parser.parse_args().file)


if __name__ == "__main__":
    main()

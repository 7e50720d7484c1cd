"""What several test modules share: the fixtures, the corpus where it is, and composing small files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # a request of the library's own, once per process

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
CORPUS = ROOT.parent / "shared" / "corpus"
LORA = FIXTURES / "lora"

TRAINERS = {
    "kohya sd-scripts": "kohya",
    "LyCORIS": "lycoris",
    "OneTrainer": "onetrainer",
    "ai-toolkit": "ai-toolkit",
    "diffusers": "diffusers",
    "peft": "peft",
    "cloneofsimo": "cloneofsimo",
    "TheLastBen": "thelastben",
    "ComfyUI": "comfyui",
}


def manifest(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder of LoRA files, safetensors only."""
    records = json.loads((folder / "manifest.json").read_text())["files"]
    return [record for record in records if record["file"].endswith(".safetensors")]


def trainer_name(record: Mapping[str, Any]) -> str:
    return next(name for start, name in TRAINERS.items() if record["trainer"].startswith(start))


class Truth:
    """ΔW by the trainer's own code, for the modules of one fixture (see fixtures/README.md)."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "np") as file:
            self.info = json.loads(file.metadata()["info"])
            self.blocks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        return [name.removesuffix(".weight") for name in self.info]

    def error(self, name: str, delta: np.ndarray, *, as_consumers: bool = False) -> float:
        """Relative error of a whole ΔW on the known entries; `as_consumers` takes their common reading."""
        info = self.info[f"{name}.weight"]
        assert list(delta.shape) == info["shape"]
        rows, columns = info["grid"]
        flat = np.asarray(delta, np.float64).reshape(delta.shape[0], -1)
        block = flat[np.ix_(_grid(flat.shape[0], rows), _grid(flat.shape[1], columns))]
        ratios = info["ratios"].values() if as_consumers else ()
        known = self.blocks[f"{name}.weight"] * next(iter(ratios), 1.0)
        assert block.shape == known.shape
        return float(np.linalg.norm(block - known) / np.linalg.norm(known))


def _grid(size: int, wanted: int) -> np.ndarray:
    every = np.arange(size) if size <= wanted else np.arange(wanted) * (size - 1) // (wanted - 1)
    return every[::3]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors as a safetensors file and return its path."""

    def write_file(
        tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None, name: str = "in"
    ) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path, dict(metadata or {}))
        return path

    return write_file


def lora(
    name: str,
    out: int,
    width: int,
    rank: int = 4,
    alpha: float | None = None,
    *,
    seed: int = 0,
    dtype: type = np.float16,
) -> dict[str, np.ndarray]:
    """A LoRA pair under Kohya's suffixes with random values; an alpha tensor if one is given."""
    random = np.random.default_rng(seed)
    tensors = {
        f"{name}.lora_down.weight": random.standard_normal((rank, width)).astype(dtype) / 8,
        f"{name}.lora_up.weight": random.standard_normal((out, rank)).astype(dtype) / 8,
    }
    return tensors | ({f"{name}.alpha": np.array(alpha, dtype)} if alpha is not None else {})


def read_all(path: Path | str) -> dict[str, np.ndarray]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def names_of(findings: Any) -> set[str]:
    return {finding.name for finding in findings}

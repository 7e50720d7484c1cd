"""What merge is compared with: load all, add a LoRA's products in float32, save all.

`python benchmarks/with_torch_merge.py BASE ADAPTER OUTPUT`, for an SDXL checkpoint and a Kohya LoRA.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file


def naively(base: Path, adapter: Path, output: Path) -> None:
    """Everything at once, as a script of a dozen lines does it."""
    weights, tensors = load_file(base), load_file(adapter)
    originals = {
        name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_"): name for name in weights
    }
    for name in [name for name in tensors if name.endswith(".lora_up.weight")]:
        stem = name.removesuffix(".lora_up.weight")
        up, down = tensors[name].float(), tensors[f"{stem}.lora_down.weight"].float()
        scale = float(tensors[f"{stem}.alpha"]) / down.shape[0]
        weight = originals[stem.removeprefix("lora_unet_")]
        weights[weight] = (weights[weight].float() + scale * (up @ down)).to(weights[weight].dtype)
    save_file(weights, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "output"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    naively(asked.base, asked.adapter, asked.output)


if __name__ == "__main__":
    main()

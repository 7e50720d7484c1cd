"""Make the file that the benchmark converts: `python benchmarks/sample.py FILE`.

An SDXL LoRA as sd-scripts saves it (`networks.lora`, UNet only, rank 32, alpha 16, fp16): all 722 linear layers of the
UNet's transformers under their SGM names, 170 MB. The same bytes on every run.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from lora_convert.families import FAMILIES, Module

RANK, ALPHA, SEED = 32, 16.0, 20240229

TRAINING = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_epoch": "10",
    "ss_learning_rate": "0.0001",
    "ss_lr_scheduler": "cosine",
    "ss_mixed_precision": "fp16",
    "ss_network_alpha": f"{ALPHA:g}",
    "ss_network_dim": f"{RANK}",
    "ss_network_module": "networks.lora",
    "ss_num_train_images": "400",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit",
    "ss_output_name": "benchmark",
    "ss_seed": "42",
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "ss_steps": "4000",
    "ss_tag_frequency": '{"10_sks": {"sks": 40, "a drawing of a house": 12, "watercolour": 9}}',
    "ss_v2": "False",
}
MODEL_SPEC = {
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.date": "2024-02-29T12:00:00",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.prediction_type": "epsilon",
    "modelspec.resolution": "1024x1024",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.title": "benchmark",
}


def adapted_modules() -> list[Module]:
    """What sd-scripts trains in SDXL's UNet: every linear layer inside its transformers, proj_in and proj_out too."""
    unet = FAMILIES["sdxl"].component("unet")
    assert unet is not None
    return [module for module in unet.modules.values() if ".attentions." in module.path and len(module.shape) == 2]


def _tensors() -> dict[str, NDArray[np.float16]]:
    """Down as sd-scripts initialises it (kaiming uniform), up spread differently in each module, as after training."""
    random = np.random.default_rng(SEED)
    tensors = {}
    for module in adapted_modules():
        rows, columns = module.shape
        stem = "lora_unet_" + module.original.replace(".", "_")
        bound, spread = 1.0 / math.sqrt(columns), 10.0 ** random.uniform(-3.0, -2.0)
        tensors[f"{stem}.lora_down.weight"] = random.uniform(-bound, bound, (RANK, columns)).astype(np.float16)
        tensors[f"{stem}.lora_up.weight"] = random.normal(0.0, spread, (rows, RANK)).astype(np.float16)
        tensors[f"{stem}.alpha"] = np.array(ALPHA, np.float16)
    return tensors


def _hashes(data: bytes) -> dict[str, str]:
    """sd-scripts' hashes, of the file as it is with its training metadata alone."""
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    tensors = _tensors()
    metadata = {**TRAINING, **MODEL_SPEC, **_hashes(save(tensors, TRAINING))}
    file.write_bytes(save(tensors, metadata))


if __name__ == "__main__":
    main()

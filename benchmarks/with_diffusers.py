"""The conversion as diffusers' public calls do it: `python benchmarks/with_diffusers.py FILE FOLDER`.

What it writes is faster than right: the alphas come back as a second value, and `save_lora_weights` takes none.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

from diffusers import StableDiffusionXLPipeline


def main() -> None:
    file, folder = sys.argv[1:]
    config = SimpleNamespace(layers_per_block=2)  # of SDXL's UNet configuration, the one field that is read
    state, _alphas = StableDiffusionXLPipeline.lora_state_dict(file, unet_config=config)
    layers = {name.removeprefix("unet."): tensor for name, tensor in state.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)


if __name__ == "__main__":
    main()

"""One module per family of algorithms: its formula, its exact form as a LoRA, and what its shapes say beforehand."""

"""`python -m lora_convert`."""

import sys

from lora_convert.cli import run

if __name__ == "__main__":
    sys.exit(run())

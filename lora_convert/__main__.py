"""`python -m lora_convert`."""

from lora_convert.cli import main

if __name__ == "__main__":
    main()

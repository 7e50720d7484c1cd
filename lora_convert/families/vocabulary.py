"""Which words the tokenizers of the base models have as tokens already: `load_textual_inversion` refuses those.

It asks `token in tokenizer.get_vocab()`. The keys of CLIP's vocabulary are pieces of words; those that end a word have
`</w>` behind them, and no token of an embedding does. All base models have CLIP's vocabulary but the embedded ones.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from lora_convert.families import embedded

__all__ = ["is_known"]


def is_known(token: str, family: str | None) -> bool:
    """Whether the tokenizers of a base model have this as a token; of one that is not known, whether CLIP's has."""
    return token in _pieces(family if family in embedded.NAMES else None)


@cache
def _pieces(name: str | None) -> frozenset[str]:
    if name is not None:
        path = embedded.folder(name) / "tokenizer" / "vocab.json"
        return frozenset(json.loads(path.read_text(encoding="utf-8")))
    text = Path(__file__).with_name("clip_vocabulary.txt").read_text(encoding="utf-8")
    return frozenset(text.split("\n")[1:-1])

"""A CLIP tokenizer that knows the tiny world's words as one token each, and any other text as bytes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

from training.pictures import COLOURS, POSITIONS, SHAPES, SIZES, STYLES

WORDS = sorted(
    {word for words in (COLOURS, SHAPES, SIZES, POSITIONS, STYLES) for phrase in words for word in phrase.split()}
    | {"a", "an", "and", "background", "drawing", "of", "on", "picture", "style", "the", "with"}
)
START, END = "<|startoftext|>", "<|endoftext|>"
_LAST = "</w>"  # marks the end of a word in CLIP's vocabulary


def _byte_characters() -> list[str]:
    """A printable character for every byte, in the order of CLIP's vocabulary (the one of GPT-2's tokenizer)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + k) for k in range(len(others))]


def merges() -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until every word is one token."""
    words = [[*word[:-1], word[-1] + _LAST] for word in WORDS]
    found = []
    while any(len(word) > 1 for word in words):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        found.append(best)
        words = [_merged(word, best) for word in words]
    return found


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def vocabulary() -> list[str]:
    """Tokens by number."""
    characters = _byte_characters()
    joined = ["".join(pair) for pair in merges()]
    return [*characters, *(character + _LAST for character in characters), *joined, START, END]


def save(folder: Path) -> None:
    """Write vocab.json and merges.txt, and what transformers makes of them."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    numbers = {token: number for number, token in enumerate(vocabulary())}
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(folder, model_max_length=77).save_pretrained(folder)

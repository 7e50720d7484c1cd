"""The record beside converted embeddings: which file goes to which text encoder, and the lines that load them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from lora_convert.converters.embeddings import STEM, encoder_of, slug_of
from lora_convert.converters.plan import Plan
from lora_convert.families.encoders import POOLED, WITHOUT_LOADER
from lora_convert.report import SCHEMA

__all__ = ["RECORD_NAME", "read_record", "record_of", "record_path", "snippet_of"]

RECORD_NAME = f"{STEM}.json"
"""What the record is called in a folder; `-o NAME.safetensors` makes it `NAME.json`."""

_LARGEST = 1 << 20
"""Bytes of a record that are read."""


def record_path(planned: Plan) -> Path | None:
    """Where the record of the embeddings goes: beside their files; None if there is none."""
    if not planned.embeddings or planned.options.joins:
        return None
    first = planned.embeddings[0]
    path = Path(planned.outputs[next(iter(first.outputs.values())).file].path)
    if path.name.startswith(STEM):
        return path.with_name(RECORD_NAME)
    own = f"-{slug_of(first.token)}" if len(planned.embeddings) > 1 else ""
    return path.with_name(f"{path.stem.removesuffix(own)}.json")


def read_record(path: Path) -> Any:
    """The content of a record, unchecked. Raises OSError, and ValueError for what is none."""
    with path.open("rb") as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError("it is too large")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def record_of(planned: Plan, sha256: str) -> dict[str, Any]:
    """What the record says: which file goes to which text encoder, and how to load them."""
    entries = []
    for step in planned.embeddings:
        files = []
        for key, tensor in step.outputs.items():
            encoder = encoder_of(planned.detection, step.source, key)
            assert encoder is not None
            files.append(
                {
                    "file": PurePath(planned.outputs[tensor.file].path).name,
                    "encoder": key,
                    "component": encoder.component,
                    "tokenizer": encoder.tokenizer,
                    "vectors": step.source.count,
                    "width": encoder.width,
                }
            )
        entries.append({"token": step.token, "vectors": step.source.count, "files": files})
    return {
        "schema": SCHEMA,
        "source": PurePath(planned.file).name,
        "sha256": sha256,
        "family": planned.detection.family,
        "embeddings": entries,
        "snippet": snippet_of(entries, planned.detection.family),
    }


def snippet_of(entries: Sequence[Mapping[str, Any]], family: str | None) -> str | None:
    """The lines of Python that load what a record's `embeddings` list onto `pipe`; None where Diffusers cannot."""
    if family in WITHOUT_LOADER:
        return None
    lines = ['folder = "."  # where this record is']
    ends: dict[str, None] = {}
    for entry in entries:
        for file in entry["files"]:
            lines.append(_loading(file, entry["token"]))
            if _is_pooled(file, family):
                ends[_finding_the_end(file)] = None
    prompt = json.dumps(f"a picture of {', '.join(entry['token'] for entry in entries)}", ensure_ascii=False)
    return "\n".join([*lines, *ends, f"image = pipe({prompt}).images[0]"])


def _loading(file: Mapping[str, Any], token: str) -> str:
    """A line of Python that loads one file onto `pipe`."""
    where = json.dumps(file["file"], ensure_ascii=False)[1:-1].replace("{", "{{").replace("}", "}}")
    line = f'pipe.load_textual_inversion(f"{{folder}}/{where}", token={json.dumps(token, ensure_ascii=False)}'
    if file["component"] != "text_encoder":
        line += f", text_encoder=pipe.{file['component']}, tokenizer=pipe.{file['tokenizer']}"
    return f"{line})"


def _is_pooled(file: Mapping[str, Any], family: str | None) -> bool:
    """Whether the pipeline uses the pooled output of a file's text encoder: CLIP-G's always."""
    return bool(file["encoder"] == "clip_g" or POOLED.get(family or "") == file["component"])


def _finding_the_end(file: Mapping[str, Any]) -> str:
    """A line of Python that makes the encoder take its pooled output at the end of the text.

    Those of SDXL and Flux have a configuration of before transformers 4.31 (`eos_token_id` 2), with which they take it
    at the largest id instead: that of a token that was added.
    """
    part, tokenizer = f"pipe.{file['component']}", f"pipe.{file['tokenizer']}"
    return f'getattr({part}, "text_model", {part}).eos_token_id = {tokenizer}.eos_token_id'

"""The record beside converted embeddings: which file goes to which text encoder, and the lines that load them."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from lora_convert.converters.embeddings import STEM, encoder_of, slug_of
from lora_convert.converters.plan import Plan
from lora_convert.families.encoders import POOLED, WITHOUT_LOADER, TextEncoder
from lora_convert.inspect.detection import Detection
from lora_convert.report import SCHEMA

__all__ = ["RECORD_NAME", "record_of", "record_path"]

RECORD_NAME = f"{STEM}.json"
"""What the record is called in a folder; `-o NAME.safetensors` makes it `NAME.json`."""


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


def record_of(planned: Plan, sha256: str) -> dict[str, Any]:
    """What the record says: which file goes to which text encoder, and how to load them."""
    entries, lines = [], ['folder = "."  # where this record is']
    pooled: list[TextEncoder] = []
    for step in planned.embeddings:
        files = []
        for key, tensor in step.outputs.items():
            encoder = encoder_of(planned.detection, step.source, key)
            assert encoder is not None
            name = PurePath(planned.outputs[tensor.file].path).name
            files.append(
                {
                    "file": name,
                    "encoder": key,
                    "component": encoder.component,
                    "tokenizer": encoder.tokenizer,
                    "vectors": step.source.count,
                    "width": encoder.width,
                }
            )
            lines.append(_loading(name, step.token, encoder))
            pooled += [encoder] if _is_pooled(planned.detection, encoder) else []
        entries.append({"token": step.token, "vectors": step.source.count, "files": files})
    lines += [_finding_the_end(encoder) for encoder in dict.fromkeys(pooled)]
    lines.append(f"image = pipe({_prompt(planned)}).images[0]")
    loads = planned.detection.family not in WITHOUT_LOADER
    return {
        "schema": SCHEMA,
        "source": PurePath(planned.file).name,
        "sha256": sha256,
        "family": planned.detection.family,
        "embeddings": entries,
        "snippet": "\n".join(lines) if loads else None,
    }


def _loading(name: str, token: str, encoder: TextEncoder) -> str:
    """A line of Python that loads one file onto `pipe`."""
    where = json.dumps(name, ensure_ascii=False)[1:-1].replace("{", "{{").replace("}", "}}")
    line = f'pipe.load_textual_inversion(f"{{folder}}/{where}", token={json.dumps(token, ensure_ascii=False)}'
    if encoder.suffix:
        line += f", text_encoder=pipe.{encoder.component}, tokenizer=pipe.{encoder.tokenizer}"
    return f"{line})"


def _is_pooled(detection: Detection, encoder: TextEncoder) -> bool:
    families = [detection.family] if detection.family else [rival.family for rival in detection.rivals]
    return any(POOLED.get(family or "") == encoder.component for family in families) and encoder.key != "t5xxl"


def _finding_the_end(encoder: TextEncoder) -> str:
    """A line of Python that makes the encoder take its pooled output at the end of the text.

    Those of SDXL and Flux have a configuration of before transformers 4.31 (`eos_token_id` 2), with which they take it
    at the largest id instead: that of a token that was added.
    """
    part, tokenizer = f"pipe.{encoder.component}", f"pipe.{encoder.tokenizer}"
    return f'getattr({part}, "text_model", {part}).eos_token_id = {tokenizer}.eos_token_id'


def _prompt(planned: Plan) -> str:
    return json.dumps(f"a picture of {', '.join(step.token for step in planned.embeddings)}", ensure_ascii=False)

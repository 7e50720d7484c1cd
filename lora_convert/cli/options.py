"""Options that several verbs share."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lora_convert.containers.header import MAX_HEADER, MAX_HEADER_LIMIT
from lora_convert.errors import UsageError
from lora_convert.families.encoders import EMBEDDING_FAMILIES

__all__ = ["FAIL_ON", "FAMILY", "JSON", "OUTPUT", "device_options", "rank_options", "reading_options", "runtime"]

FAMILY = click.option(
    "--family",
    type=click.Choice(list(EMBEDDING_FAMILIES)),
    help="The base model's family, where the file fits several.",
)
_CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The peft adapter_config.json of the file (default: the one beside it).",
)
_SKIP = click.option(
    "--skip",
    multiple=True,
    metavar="PATTERN",
    help="Leave out tensors whose names match (*, ? and [] work); repeatable.",
)
_MAX_HEADER = click.option(
    "--max-header",
    type=click.IntRange(1, MAX_HEADER_LIMIT),
    default=MAX_HEADER,
    metavar="BYTES",
    help=f"Largest header to read, at most {MAX_HEADER_LIMIT:,} (default {MAX_HEADER:,}).",
)
OUTPUT = click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A folder, or a name ending in .safetensors. Several inputs go to PATH/<name>/.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per file and line.")
FAIL_ON = click.option(
    "--fail-on",
    type=click.Choice(["warning", "error"]),
    default="error",
    help="The mildest finding for which the exit status is 1 (default error).",
)


def reading_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options of every verb that reads files; those that are the library's come as one dictionary, `reading`."""

    @functools.wraps(command)
    def grouped(
        *, family: str | None, config: Path | None, skip: tuple[str, ...], max_header: int, **others: Any
    ) -> int:
        return command(reading={"family": family, "config": config, "skip": skip, "max_header": max_header}, **others)

    decorated: Callable[..., int] = grouped
    for option in (FAIL_ON, JSON, _MAX_HEADER, _SKIP, _CONFIG, FAMILY):
        decorated = option(decorated)
    return decorated


def rank_options(command: Callable[..., int]) -> Callable[..., int]:
    """What may be cut of a weight change: `--rank` and `--max-error`."""
    for option in (
        click.option(
            "--max-error",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            metavar="E",
            help="Cut every module to the smallest rank whose relative error (Frobenius norm) is at most E; with "
            "--rank accept errors up to E.",
        ),
        click.option(
            "--rank",
            type=click.IntRange(1),
            metavar="N",
            help="Cut what has a higher rank to the closest change of rank N; refused where more than 30 % of a "
            "module's change would be lost.",
        ),
    ):
        command = option(command)
    return command


def device_options(command: Callable[..., int]) -> Callable[..., int]:
    """Where and in which precision a verb draws: `--device` and `--dtype`."""
    devices, dtypes = ["auto", "cpu", "cuda", "mps"], ["auto", "fp32", "fp16", "bf16"]
    for option in (
        click.option(
            "--dtype",
            type=click.Choice(dtypes),
            default="auto",
            help="The base model's precision (default auto: fp32 on the CPU, else fp16).",
        ),
        click.option(
            "--device",
            type=click.Choice(devices),
            default="auto",
            help="Where to draw (default auto: cuda, then mps, then cpu).",
        ),
    ):
        command = option(command)
    return command


def runtime(module: str, asked: str) -> Any:
    """Import a module of the runtime for what was asked for; UsageError where what it needs is not installed."""
    try:
        return importlib.import_module(f"lora_convert.runtime.{module}")
    except ModuleNotFoundError as error:
        said = f"{asked} needs {error.name}, which is not installed"
        raise UsageError(f'{said}; install it with: pip install "lora-convert[runtime]"') from None

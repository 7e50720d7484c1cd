"""The command line: one thin function per verb over the library.

Exit status: 0 done, 1 a finding of severity error (with `--fail-on warning` also a warning), 2 wrong usage or it could
not run, 130 interrupted. With `--json` standard output has JSON alone, one object per line and file.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import lora_convert
from lora_convert._version import __version__
from lora_convert.cli.golden import golden
from lora_convert.cli.merge import merge
from lora_convert.cli.options import JSON, OUTPUT, rank_options, reading_options
from lora_convert.cli.outcome import Outcome, each, failed, say
from lora_convert.cli.render import render
from lora_convert.cli.validate import validate
from lora_convert.errors import LoraConvertError, UsageError
from lora_convert.families import FAMILIES
from lora_convert.report import SCHEMA, shown

__all__ = ["cli", "run"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lora-convert")
def cli() -> None:
    """Any LoRA or embedding in, one for Diffusers out that provably does the same thing.

    \b
    Examples:
      lora-convert inspect style.safetensors
      lora-convert convert style.safetensors -o out/
      lora-convert convert pytorch_lora_weights.safetensors --to kohya -o style.safetensors
      lora-convert validate out/pytorch_lora_weights.safetensors --against style.safetensors
      lora-convert render style.safetensors --base tiny-sd15 --prompt "a red circle" -o picture.png
    """


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@reading_options
@click.option(
    "--hash", "hashes", is_flag=True, help="Add SHA-256, AutoV1, AutoV2, AutoV3, CRC32 (and BLAKE3 if installed)."
)
@click.option("--modules", is_flag=True, help="List every adapted module with its algorithm, rank and alpha.")
@click.option("--alphas", is_flag=True, help="Read the alphas of a remote file too (up to a request per module).")
def inspect(
    files: tuple[str, ...],
    reading: dict[str, Any],
    as_json: bool,
    fail_on: str,
    hashes: bool,
    modules: bool,
    alphas: bool,
) -> int:
    """Say what weight files are, and why. Only headers and scalars are read.

    FILE is a path, or hf://owner/repo/file on a hub (not downloaded).

    \b
    Examples:
      lora-convert inspect style.safetensors
      lora-convert inspect --json *.safetensors | jq .family
      lora-convert inspect hf://owner/repo/style.safetensors --alphas
    """
    from lora_convert.cli.text import detection_lines
    from lora_convert.inspect.identify import identify

    def one(file: str, _: None) -> Outcome:
        found = identify(file, hashes=hashes, alphas=alphas or None, **reading)
        content = found.as_dict() | ({"module_list": found.module_list()} if modules else {})
        return found.ok, found.findings, content, detection_lines(found, modules)

    return each(files, [None] * len(files), as_json, fail_on, one)


def _outputs(files: tuple[str, ...], out: Path | None) -> Sequence[Path | None]:
    """Where each input's output goes: `out` for one file, `out/<stem>/` for several."""
    if len(files) == 1 or out is None:
        return [out] * len(files)
    if out.suffix == ".safetensors":
        raise UsageError(f"{len(files)} files cannot all become {shown(str(out))}; name a folder with -o")
    stems = [Path(file).stem for file in files]
    nameless = next((file for file, stem in zip(files, stems, strict=True) if stem in ("", ".", "..")), None)
    if nameless is not None:
        raise UsageError(f"{shown(nameless)} gives no name for a folder; convert it alone")
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise UsageError(f"two of the files are called {shown(twice)}; convert them into separate folders")
    return [out / stem for stem in stems]


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@OUTPUT
@click.option(
    "--to",
    type=click.Choice(["diffusers", "kohya", "comfy", "a1111", "peft"]),
    default="diffusers",
    help="The layout to write (default diffusers; comfy and a1111 are kohya's, which ComfyUI and A1111 read; peft "
    "keeps LoHa, LoKr, DoRA, (IA)³ and OFT_2 as they are, in a folder per component).",
)
@click.option(
    "--token",
    multiple=True,
    metavar="WORD",
    help="What an embedding is called (default: what the file says, else its name); repeat it for several.",
)
@rank_options
@click.option(
    "--base",
    metavar="MODEL",
    help="The base model, for kinds whose weight change depends on its weights: tiny-sd15, tiny-sdxl, a folder, a "
    "checkpoint or a hub id.",
)
@click.option(
    "--alpha",
    type=click.Choice(["fold", "header"]),
    help="Fold alpha into the matrices (default), or keep them byte for byte and put alpha in the header.",
)
@click.option(
    "--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), help="The dtype to write (default: the source's)."
)
@reading_options
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--no-validate", is_flag=True, help="Do not prove the result before it is put in place.")
def convert(
    files: tuple[str, ...],
    out: Path | None,
    to: str,
    token: tuple[str, ...],
    rank: int | None,
    max_error: float | None,
    base: str | None,
    alpha: str | None,
    dtype: str | None,
    reading: dict[str, Any],
    as_json: bool,
    fail_on: str,
    dry_run: bool,
    force: bool,
    no_validate: bool,
) -> int:
    """Convert LoRA, LoHa, LoKr, DoRA and other adapter files and embeddings, and prove the results.

    Embeddings (textual inversions, .pt, .safetensors or pictures) become learned_embeds.safetensors, one for each text
    encoder, and a record that says how to load them. What is a low-rank change becomes a LoRA exactly. What is not
    needs --rank or --max-error, which write the closest one and say how close, or stays what it is with --to peft, or
    is baked into a model by `lora-convert merge`.

    \b
    Examples:
      lora-convert convert style.safetensors -o out/
      lora-convert convert *.safetensors -o out/ --json > report.jsonl
      lora-convert convert out/pytorch_lora_weights.safetensors --to kohya -o style.safetensors
      lora-convert convert lokr.safetensors --max-error 0.05 -o out/
      lora-convert convert ia3.safetensors --base tiny-sd15 --rank 32 -o out/
      lora-convert convert EasyNegative.pt -o embeddings/easynegative/
      lora-convert convert embeddings/easynegative/ --to a1111 -o easynegative.safetensors
      lora-convert convert style.safetensors --dry-run
    """
    layout = {
        "to": to,
        "token": token,
        "alpha": alpha,
        "dtype": dtype,
        "rank": rank,
        "max_error": max_error,
        "base": base,
    }
    return _convert(files, out, layout, reading, as_json, fail_on, dry_run, force, not no_validate)


def _convert(
    files: tuple[str, ...],
    out: Path | None,
    layout: dict[str, Any],
    reading: dict[str, Any],
    as_json: bool,
    fail_on: str,
    dry_run: bool,
    force: bool,
    validated: bool,
) -> int:
    """What `convert` and `resize` do with every file."""
    if out is None and not dry_run:
        raise UsageError("name the output with -o: a folder, or a file ending in .safetensors")
    from lora_convert.cli.progress import progress_bar
    from lora_convert.cli.text import conversion_lines, plan_lines
    from lora_convert.converters.plan import Options

    Options(**layout).checked()

    def one(file: str, target: Path | None) -> Outcome:
        others = [other for other in files if other != file]
        call: dict[str, Any] = {"force": force, "beside": others, **reading, **layout}
        if target is None or dry_run:
            planned = lora_convert.plan(file, target, **call)
            return planned.ok, planned.findings, planned.as_dict(), plan_lines(planned)
        with progress_bar(not as_json) as progress:
            result = lora_convert.convert(file, target, validated=validated, progress=progress, **call)
        return result.ok, result.findings, result.as_dict(), conversion_lines(result)

    return each(files, _outputs(files, out), as_json, fail_on, one)


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@OUTPUT
@rank_options
@click.option(
    "--to", type=click.Choice(["diffusers", "kohya", "comfy", "a1111"]), default="diffusers", help="The layout."
)
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), help="The dtype to write.")
@reading_options
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
def resize(
    files: tuple[str, ...],
    out: Path | None,
    rank: int | None,
    max_error: float | None,
    to: str,
    dtype: str | None,
    reading: dict[str, Any],
    as_json: bool,
    fail_on: str,
    dry_run: bool,
    force: bool,
) -> int:
    """Write LoRA files anew with a smaller rank, and say how much of each module is kept.

    \b
    Examples:
      lora-convert resize style.safetensors --rank 16 -o small/
      lora-convert resize style.safetensors --max-error 0.05 -o small/
    """
    if rank is None and max_error is None:
        raise UsageError("name the size with --rank N, or what may be lost with --max-error E")
    layout = {"to": to, "dtype": dtype, "rank": rank, "max_error": max_error}
    return _convert(files, out, layout, reading, as_json, fail_on, dry_run, force, True)


for verb in (validate, merge, render, golden):
    cli.add_command(verb)


@cli.command()
@click.option("--markdown", is_flag=True, help="As the table of README.md.")
@JSON
def kinds(markdown: bool, as_json: bool) -> int:
    """List the kinds of adapters that are known, and what becomes of each.

    \b
    Example:
      lora-convert kinds
    """
    from lora_convert.cli.text import kind_lines, kinds_table
    from lora_convert.converters.adapters import KINDS

    if markdown:
        say(False, {}, kinds_table(KINDS))
        return 0
    for kind in KINDS:
        content = {"title": kind.title, "lora": kind.lora, "peft": kind.peft or None, "tested": kind.tested}
        say(as_json, {"schema": SCHEMA, **content}, kind_lines(kind))
    return 0


@cli.command()
@JSON
def families(as_json: bool) -> int:
    """List the base models that are known.

    \b
    Example:
      lora-convert families --json
    """
    for family in FAMILIES.values():
        counts = {component.name: len(component.modules) for component in family.components}
        parts = ", ".join(f"{name} {number}" for name, number in counts.items())
        say(
            as_json,
            {"schema": SCHEMA, "family": family.name, "title": family.title, "components": counts},
            [f"{click.style(family.name, bold=True):20} {family.title}: {parts}"],
        )
    return 0


@cli.command()
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    default=Path("lora-convert-demo"),
    show_default=True,
    metavar="DIR",
    help="Where to put the demo's files.",
)
def demo(out: Path) -> int:
    """Convert a real file, and show what was proved.

    The file comes with the package; what is found, done and proved is told step by step.

    \b
    Example:
      lora-convert demo -o somewhere/
    """
    from lora_convert.cli.demo import run_demo

    return run_demo(out)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; errors are one sentence on standard error."""
    try:
        return int(cli.main(arguments, prog_name="lora-convert", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return failed("interrupted; no output was left half-written", 130)
    except LoraConvertError as error:
        return failed(str(error), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 2
    except OSError as error:
        where = f": {shown(error.filename)}" if isinstance(error.filename, str) else ""
        return failed(f"{error.strerror or error}{where}", 2)
    except Exception as error:
        if os.environ.get("LORA_CONVERT_DEBUG"):
            raise
        said = f"internal error ({type(error).__name__}: {shown(str(error))})"
        return failed(f"{said}. Please report it; LORA_CONVERT_DEBUG=1 shows where.", 2)


def main() -> None:
    """The console script."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        cli.context_settings["color"] = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no `→` shall see an escape, not a crash
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run())

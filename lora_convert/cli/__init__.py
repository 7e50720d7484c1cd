"""The command line: one thin function per verb over the library.

Exit status: 0 done, 1 a finding of severity error (with `--fail-on warning` also a warning), 2 wrong usage or it could
not run, 130 interrupted. With `--json` standard output has JSON alone, one object per line and file.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lora_convert
from lora_convert._version import __version__
from lora_convert.containers.header import MAX_HEADER, MAX_HEADER_LIMIT
from lora_convert.errors import LoraConvertError, UsageError
from lora_convert.families import FAMILIES
from lora_convert.report import SCHEMA, Finding, printable, severest, shown, to_json

if TYPE_CHECKING:
    from lora_convert.converters.convert import ValidateResult

__all__ = ["cli", "run"]

_FAMILY = click.option(
    "--family", type=click.Choice(list(FAMILIES)), help="The base model's family, where the file fits several."
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
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per file and line.")
_FAIL_ON = click.option(
    "--fail-on",
    type=click.Choice(["warning", "error"]),
    default="error",
    help="The mildest finding for which the exit status is 1 (default error).",
)


def _reading(command: Callable[..., int]) -> Callable[..., int]:
    """The options of every verb that reads files; those that are the library's come as one dictionary, `reading`."""

    @functools.wraps(command)
    def grouped(
        *, family: str | None, config: Path | None, skip: tuple[str, ...], max_header: int, **others: Any
    ) -> int:
        return command(reading={"family": family, "config": config, "skip": skip, "max_header": max_header}, **others)

    decorated: Callable[..., int] = grouped
    for option in (_FAIL_ON, _JSON, _MAX_HEADER, _SKIP, _CONFIG, _FAMILY):
        decorated = option(decorated)
    return decorated


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lora-convert")
def cli() -> None:
    """Any LoRA file in, a Diffusers adapter out that provably does the same thing.

    \b
    Examples:
      lora-convert inspect style.safetensors
      lora-convert convert style.safetensors -o out/
      lora-convert convert pytorch_lora_weights.safetensors --to kohya -o style.safetensors
      lora-convert validate out/pytorch_lora_weights.safetensors --against style.safetensors
    """


def _say(as_json: bool, content: dict[str, Any], lines: Iterable[str]) -> None:
    if as_json:
        click.echo(to_json(content))
    else:
        for line in lines:
            click.echo(line)


_Outcome = tuple[bool, Sequence[Finding], dict[str, Any], Iterable[str]]
"""Whether it went well, what there is to say, and the same as JSON and as text."""


def _each(
    files: Sequence[str],
    targets: Sequence[Any],
    as_json: bool,
    fail_on: str,
    one: Callable[[str, Any], _Outcome],
) -> int:
    """Do something with every file and say what came of it; a wrong use with one file does not stop the others."""
    status = 0
    for file, target in zip(files, targets, strict=True):
        try:
            ok, findings, content, lines = one(file, target)
        except UsageError as error:
            if as_json:
                click.echo(to_json({"schema": SCHEMA, "file": file, "status": "refused", "error": str(error)}))
            status = max(status, _failed(str(error), 2))
            continue
        _say(as_json, content, lines)
        status = max(status, _exit_status(findings, fail_on) if ok else 1)
    return status


def _exit_status(findings: Sequence[Finding], fail_on: str) -> int:
    worst = severest(findings)
    return 1 if worst == "error" or (worst == "warning" and fail_on == "warning") else 0


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@_reading
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

    def one(file: str, _: None) -> _Outcome:
        found = identify(file, hashes=hashes, alphas=alphas or None, **reading)
        content = found.as_dict() | ({"module_list": found.module_list()} if modules else {})
        return found.ok, found.findings, content, detection_lines(found, modules)

    return _each(files, [None] * len(files), as_json, fail_on, one)


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
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A folder, or a name ending in .safetensors. Several inputs go to PATH/<name>/.",
)
@click.option(
    "--to",
    type=click.Choice(["diffusers", "kohya", "comfy"]),
    default="diffusers",
    help="The layout to write (default diffusers; comfy is kohya's, which ComfyUI reads).",
)
@click.option(
    "--alpha",
    type=click.Choice(["fold", "header"]),
    help="Fold alpha into the matrices (default), or keep them byte for byte and put alpha in the header.",
)
@click.option(
    "--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), help="The dtype to write (default: the source's)."
)
@_reading
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--no-validate", is_flag=True, help="Do not prove the result before it is put in place.")
def convert(
    files: tuple[str, ...],
    out: Path | None,
    to: str,
    alpha: str | None,
    dtype: str | None,
    reading: dict[str, Any],
    as_json: bool,
    fail_on: str,
    dry_run: bool,
    force: bool,
    no_validate: bool,
) -> int:
    """Convert LoRA files, and prove the results.

    \b
    Examples:
      lora-convert convert style.safetensors -o out/
      lora-convert convert *.safetensors -o out/ --json > report.jsonl
      lora-convert convert out/pytorch_lora_weights.safetensors --to kohya -o style.safetensors
      lora-convert convert style.safetensors --dry-run
    """
    if out is None and not dry_run:
        raise UsageError("name the output with -o: a folder, or a file ending in .safetensors")
    from lora_convert.cli.progress import progress_bar
    from lora_convert.cli.text import conversion_lines, plan_lines
    from lora_convert.converters.plan import Options

    layout: dict[str, Any] = {"to": to, "alpha": alpha, "dtype": dtype}
    Options(**layout).checked()

    def one(file: str, target: Path | None) -> _Outcome:
        others = [other for other in files if other != file]
        call: dict[str, Any] = {"force": force, "beside": others, **reading, **layout}
        if target is None or dry_run:
            planned = lora_convert.plan(file, target, **call)
            return planned.ok, planned.findings, planned.as_dict(), plan_lines(planned)
        with progress_bar(not as_json) as progress:
            result = lora_convert.convert(file, target, validated=not no_validate, progress=progress, **call)
        return result.ok, result.findings, result.as_dict(), conversion_lines(result)

    return _each(files, _outputs(files, out), as_json, fail_on, one)


@cli.command()
@click.argument("file")
@click.option(
    "--against", metavar="SOURCE", help="The file it was converted from: compares every module's weight change."
)
@click.option(
    "--load",
    is_flag=True,
    help="Also load it with diffusers into the real architecture, without weights (needs lora-convert[runtime]).",
)
@_reading
def validate(
    file: str,
    against: str | None,
    load: bool,
    reading: dict[str, Any],
    as_json: bool,
    fail_on: str,
) -> int:
    """Check a LoRA file, alone or against its source.

    Looks at its structure, its numbers, and the weight change of every module.

    \b
    Examples:
      lora-convert validate out/pytorch_lora_weights.safetensors
      lora-convert validate out/pytorch_lora_weights.safetensors --against style.safetensors --load
    """
    from lora_convert.cli.progress import progress_bar
    from lora_convert.cli.text import validation_lines

    check: Callable[..., ValidateResult] = _loading_check() if load else lora_convert.validate
    if reading["skip"] and against is None:
        raise UsageError("--skip leaves out tensors of the source; name that with --against")
    with progress_bar(not as_json) as progress:
        result = check(file, against, progress=progress, **reading)
    _say(as_json, result.as_dict(), validation_lines(result))
    return _exit_status(result.findings, fail_on) if result.ok else 1


def _loading_check() -> Callable[..., ValidateResult]:
    try:
        from lora_convert.runtime.climb import climb
    except ModuleNotFoundError as error:
        said = f"--load needs {error.name}, which is not installed"
        raise UsageError(f'{said}; install it with: pip install "lora-convert[runtime]"') from None
    return climb


@cli.command()
@_JSON
def families(as_json: bool) -> int:
    """List the base models that are known.

    \b
    Example:
      lora-convert families --json
    """
    for family in FAMILIES.values():
        counts = {component.name: len(component.modules) for component in family.components}
        parts = ", ".join(f"{name} {number}" for name, number in counts.items())
        _say(
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
        return _failed("interrupted; no output was left half-written", 130)
    except LoraConvertError as error:
        return _failed(str(error), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 2
    except OSError as error:
        where = f": {shown(error.filename)}" if isinstance(error.filename, str) else ""
        return _failed(f"{error.strerror or error}{where}", 2)
    except Exception as error:
        if os.environ.get("LORA_CONVERT_DEBUG"):
            raise
        said = f"internal error ({type(error).__name__}: {shown(str(error))})"
        return _failed(f"{said}. Please report it; LORA_CONVERT_DEBUG=1 shows where.", 2)


def _failed(sentence: str, status: int) -> int:
    click.echo(f"lora-convert: {printable(sentence)}", err=True)
    return status


def main() -> None:
    """The console script."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        cli.context_settings["color"] = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no `→` shall see an escape, not a crash
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run())

"""Fuzz one reader: `python -m fuzz.run TARGET FOLDER [libFuzzer's options]`.

FOLDER/TARGET has the seeds, and gets every input that reaches something new. The first input that breaks an invariant
ends the run with exit status 77 (a timeout 70, memory 71); it is written to FOLDER as TARGET-crash-…, which
`python -m fuzz.run TARGET FOLDER FILE` tries again.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from fuzz.forms import FORMS, as_file

_OPTIONS = ("-timeout=10", "-rss_limit_mb=1024", "-max_len=8192", "-print_final_stats=1")
"""One input may take so many seconds (a busy machine is slow) and MB (Python itself has a hundred)."""


def main() -> int:
    """Run until the options say so, or something is found."""
    try:
        import atheris
    except ImportError:
        sys.stderr.write("The fuzzer needs atheris, which there is for Linux on x86_64: pip install -e '.[fuzz]'\n")
        return 2
    if len(sys.argv) < 3 or sys.argv[1] not in FORMS:
        sys.stderr.write(f"{__doc__}\nTargets: {', '.join(FORMS)}\n")
        return 2
    target, folder, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["lora_convert"], enable_loader_override=False):
        from fuzz.invariants import CHECKS, make_ready, nothing_else_happens
    check = CHECKS[target]
    make_ready(target, (as_file(target, path.read_bytes()) for path in sorted(Path(folder, target).iterdir())))

    def one_input(data: bytes) -> None:
        file = as_file(target, data)
        with warnings.catch_warnings(), nothing_else_happens():
            warnings.simplefilter("error")
            check(file)

    where = [] if any(not option.startswith("-") for option in options) else [str(Path(folder, target))]
    artifacts = f"-artifact_prefix={Path(folder, target)}-"
    atheris.Setup([sys.argv[0], *_OPTIONS, artifacts, *options, *where], one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())

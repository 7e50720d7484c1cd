"""Writing safetensors: a header like the reference writer's, streamed data, and a file that is whole or not there.

The output is written to a temporary file in the target's folder, flushed to disk and renamed, so that a crash, a full
disk or a kill leaves the old file or the new one. A temporary file that a killed run left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from lora_convert.converters.plan import OutputTensor
from lora_convert.errors import UsageError
from lora_convert.report import shown

__all__ = ["RESERVED", "atomic_file", "atomic_folder", "flush_folder", "header_bytes", "offsets", "scratch_folder"]

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that no file can have on Windows."""

_ALIGNMENT = 8
_MOST_BYTES = 200


def offsets(tensors: Sequence[OutputTensor]) -> dict[str, int]:
    """Where each tensor begins, counted from the end of the header; they lie one after the other."""
    position = 0
    starts = {}
    for tensor in tensors:
        starts[tensor.name] = position
        position += tensor.nbytes
    return starts


def header_bytes(tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of the header, padded with spaces to a multiple of 8 bytes as the reference writer does."""
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    starts = offsets(tensors)
    for tensor in tensors:
        start = starts[tensor.name]
        content[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _lock(file: BinaryIO) -> bool | None:
    """Take the file's lock without waiting; False if a living process holds it, None if the file system has no locks.

    True on Windows, where a file that a process has open cannot be removed anyway.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_litter(target: Path) -> None:
    """Remove temporary files of this target whose writer is dead (its lock is gone)."""
    for path in target.parent.glob(f".{_glob_escape(_beginning(target))}.*.part"):
        with contextlib.suppress(OSError), path.open("rb+") as file:
            if _lock(file):
                path.unlink()


def _create(target: Path, cleanup: contextlib.ExitStack) -> tuple[Path, BinaryIO]:
    """A temporary file beside the target, with its lock. Raises UsageError, in a sentence, if none can be made.

    That it vanishes is arranged before it exists, so that an interrupt at any moment leaves nothing.
    """
    try:
        while True:
            temporary = target.parent / f".{_beginning(target)}.{os.getpid()}-{secrets.token_hex(4)}.part"
            cleanup.callback(temporary.unlink, missing_ok=True)
            file = cleanup.enter_context(temporary.open("xb+"))
            if _lock(file) is not False and temporary.exists():
                return temporary, file
            file.close()  # before it was locked another process took it for litter
    except OSError as error:
        where = shown(str(target.parent))
        raise UsageError(f"nothing can be written to {where}: {error.strerror}") from None


def _beginning(target: Path) -> str:
    """As much of the target's name as leaves room for the rest of a temporary name (names have at most 255 bytes)."""
    return os.fsencode(target.name)[:_MOST_BYTES].decode(errors="ignore")


def _glob_escape(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path, cleanup: contextlib.ExitStack) -> None:
    """Make the output's folder; what was made is removed in the clean-up if it is still empty then.

    Raises UsageError, in a sentence, if that is not possible.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        cleanup.callback(_remove_empty, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {shown(str(folder))} cannot be made: {error.strerror}") from None


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Give an OSError of the block that names no file (a full disk, when bytes are written) the target's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(target)
        raise


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the target's place when the block ends well, and vanishes if it does not.

    Raises UsageError if the folder cannot be written to; OSError (a full disk) passes through after cleaning up, with
    the target as its `filename`.
    """
    with _named(target), contextlib.ExitStack() as cleanup:
        make_folder(target.parent, cleanup)
        _remove_litter(target)
        temporary, file = _create(target, cleanup)
        yield file
        file.flush()
        os.fsync(file.fileno())
        if os.name == "nt":  # open files cannot be renamed there; elsewhere the lock is kept until it is done
            file.close()
        temporary.replace(target)
    flush_folder(target.parent)


_LOCK, _ASIDE = ".lock", "old"
"""In a scratch folder: the file that its living writer has locked, and the folder that it replaces."""


def _remove_dead_folders(target: Path) -> None:
    """Remove scratch folders of this target whose writer is dead (the lock in them is gone).

    One that died between its two renames has left the old folder aside: it is put back.
    """
    for path in target.parent.glob(f".{_glob_escape(_beginning(target))}.*.part"):
        with contextlib.suppress(OSError), (path / _LOCK).open("rb+") as file:
            if _lock(file):
                if (path / _ASIDE).exists() and not target.exists():
                    (path / _ASIDE).rename(target)
                _remove_scratch(path)


def _remove_scratch(scratch: Path) -> None:
    """Remove a scratch folder, the lock last: what is left if this is interrupted is known by it."""
    with contextlib.suppress(OSError):
        for path in scratch.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink()
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A new folder beside the target, to build in; it vanishes with all that is still in it when the block ends.

    What a killed process left of its own is removed by the next one. Raises UsageError if it cannot be made; an OSError
    of the block that names no file gets the target as its `filename`.
    """
    with _named(target), contextlib.ExitStack() as cleanup:
        make_folder(target.parent, cleanup)
        _remove_dead_folders(target)
        yield _create_folder(target, cleanup)


def _create_folder(target: Path, cleanup: contextlib.ExitStack) -> Path:
    """What `_create` does, with a folder that has its lock in it."""
    try:
        while True:
            scratch = target.parent / f".{_beginning(target)}.{os.getpid()}-{secrets.token_hex(4)}.part"
            cleanup.callback(_remove_scratch, scratch)
            scratch.mkdir()
            lock = cleanup.enter_context((scratch / _LOCK).open("xb"))
            if _lock(lock) is not False and (scratch / _LOCK).exists():
                return scratch  # else another process took it for litter before it was locked
    except OSError as error:
        where = shown(str(target.parent))
        raise UsageError(f"nothing can be written to {where}: {error.strerror}") from None


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes the target's place as a whole when the block ends well, and vanishes if it does not.

    What is written into it must be flushed to disk by its writer. A folder that is there already is first moved into
    the scratch folder and removed last, so that at no moment neither of them is there whole.
    """
    with scratch_folder(target) as scratch:
        content = scratch / "content"
        content.mkdir()
        yield content
        flush_folder(content)
        aside = scratch / _ASIDE
        try:
            if target.exists():
                target.rename(aside)
            content.rename(target)
        except BaseException:
            if aside.exists() and not target.exists():
                aside.rename(target)
            raise
        flush_folder(target.parent)

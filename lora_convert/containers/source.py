"""A weight file of any origin (path, bytes, open binary file), opened as a `Source`: a header, and bytes on request.

Nothing is mapped into memory and nothing is read that was not asked for, so that a file of any size costs the same.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Self

from lora_convert.containers import dtypes
from lora_convert.containers.header import MAX_HEADER, MAX_HEADER_LIMIT, Header, parse_header
from lora_convert.errors import FileError, UsageError
from lora_convert.report import Finding, listed, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FileReader", "Reader", "Source", "Target", "name_of", "open_path", "open_source", "opened"]

Target = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""What the library's calls take as a file: a path, a `hf://` address, the bytes themselves, or an open binary file."""


class Reader(Protocol):
    """Random access to bytes. `read_at` returns exactly `size` bytes or raises FileError."""

    size: int

    def read_at(self, offset: int, size: int) -> bytes: ...

    def close(self) -> None: ...


class BytesReader:
    """A file that is already in memory."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self.size = len(self._data)

    def read_at(self, offset: int, size: int) -> bytes:
        return bytes(self._data[offset : offset + size])

    def close(self) -> None:
        self._data.release()  # a bytearray cannot change its size as long as it is viewed


class FileReader:
    """An open binary file that can seek. Safe from several threads; the caller's position is put back on close."""

    def __init__(self, file: BinaryIO, *, owned: bool) -> None:
        self._file, self._owned = file, owned
        self._lock = threading.Lock()
        # only of a file that was opened here is it known that its descriptor gives the same bytes (gzip's does not)
        self._descriptor = file.fileno() if owned and hasattr(os, "pread") else None
        try:
            self._position = file.tell()
            nothing: object = file.read(0)
            if not isinstance(nothing, bytes):
                raise ValueError("it is open as text")
            self.size = file.seek(0, os.SEEK_END)
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"the open file is not one to seek and read bytes in: {error}") from None

    def _read(self, offset: int, size: int) -> bytes:
        if self._descriptor is not None:
            return os.pread(self._descriptor, size, offset)  # threads need not wait for each other
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def read_at(self, offset: int, size: int) -> bytes:
        try:
            data = self._read(offset, size)
            while len(data) < size and (more := self._read(offset + len(data), size - len(data))):
                data += more  # at most 2 GiB come at once
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FileError([Finding("unreadable", "error", "", f"Reading failed: {reason}.")]) from None
        if len(data) != size:
            message = f"{size} bytes were expected at offset {offset}, {len(data)} came: the file changed while read."
            raise FileError([Finding("unreadable", "error", "", message)])
        return data

    def close(self) -> None:
        if self._owned:
            self._file.close()
        else:
            with contextlib.suppress(OSError, ValueError):  # the caller has closed it
                self._file.seek(self._position)


class Source:
    """A header, and the bytes or arrays of its tensors. Use as a context manager."""

    def __init__(self, header: Header, reader: Reader, *, remote: bool = False) -> None:
        self.header, self.reader, self.remote = header, reader, remote

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.reader.close()

    def read_bytes(self, name: str) -> bytes:
        """The bytes of a tensor. Raises KeyError if there is none of that name, FileError if reading fails."""
        where = self.header.tensors[name].where
        return self.reader.read_at(where.start, where.end - where.start)

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as a read-only array of its own shape and dtype."""
        tensor = self.header.tensors[name]
        return dtypes.to_array(self.read_bytes(name), tensor.dtype, tensor.shape)

    def read_scalar(self, name: str) -> float:
        """The value of a tensor of one element; decoded without numpy."""
        return dtypes.to_scalar(self.read_bytes(name), self.header.tensors[name].dtype)

    def chunks(self, size: int = 1 << 20) -> Iterator[bytes]:
        """The whole file, piece by piece."""
        return chunks_of(self.reader, size)


def chunks_of(reader: Reader, size: int = 1 << 20) -> Iterator[bytes]:
    """All of a reader's bytes, piece by piece."""
    for offset in range(0, reader.size, size):
        yield reader.read_at(offset, min(size, reader.size - offset))


_PICKLE = "a Python pickle, which can run code when loaded"

_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"<", "a web page or XML", "The download failed: fetch the file again, signed in if the site asks for it."),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Fetch the file with `git lfs pull`."),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint, .pt/.bin/.ckpt, perhaps)", "Save it as safetensors first."),
    *((bytes((0x80, protocol)), _PICKLE, "Save it as safetensors first.") for protocol in range(2, 6)),
    (b"\x89PNG", "a PNG picture", ""),
    (b"RIFF", "a RIFF file (a WEBP picture, perhaps)", ""),
    (b"\xff\xd8\xff", "a JPEG picture", ""),
    (b"GGUF", "a GGUF model", ""),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"7z\xbc\xaf", "a 7-Zip archive", "Unpack it first."),
    (b"Rar!", "a RAR archive", "Unpack it first."),
    (b"%PDF", "a PDF document", ""),
    (b'{"', "plain JSON", ""),
)
"""First bytes that betray another kind of file."""


_TEXT_PICKLES = (b"(", b"]", b"}", b"c")
"""How pickles of protocols 0 and 1 begin that build something."""


def _may_be_safetensors(first: bytes) -> bool:
    """Whether a file begins with a possible header length, whatever letters its bytes may be."""
    return len(first) >= 8 and int.from_bytes(first[:8], "little") <= MAX_HEADER_LIMIT


def _refuse_other_content(first: bytes, reader: Reader) -> None:
    """Raise FileError if the file begins like something that is neither safetensors nor PyTorch's."""
    if _may_be_safetensors(first):
        return
    if reader.size > 512 and reader.read_at(257, 5) == b"ustar":
        fix = "It is never unpacked here: take the weight file out of it."
        raise FileError([Finding("not-weights", "error", "", "This is not a weight file but a tar archive.", fix)])
    text = first.lstrip(b"\xef\xbb\xbf \t\r\n")
    for signature, what, fix in _SIGNATURES:
        if text.startswith(signature):
            raise FileError([Finding("not-weights", "error", "", f"This is not a weight file but {what}.", fix)])


def _check_limit(max_header: int) -> None:
    if not 0 < max_header <= MAX_HEADER_LIMIT:
        raise UsageError(f"--max-header must be between 1 and {MAX_HEADER_LIMIT:,} bytes")


def _first_of(reader: Reader) -> bytes:
    """The first bytes, by which a container is known. Raises FileError if there are none."""
    if reader.size == 0:
        raise FileError([Finding("empty-file", "error", "", "The file is empty (0 bytes).")])
    return reader.read_at(0, min(reader.size, 64))


def read_header(reader: Reader, path: str, max_header: int = MAX_HEADER) -> Header:
    """Read and check the header of a safetensors file; no tensor byte is touched.

    `max_header` bounds the JSON in bytes, at most 100,000,000. Raises FileError for what is not safetensors.
    """
    _check_limit(max_header)
    return _read_safetensors(reader, path, max_header, _first_of(reader))


def _read_safetensors(reader: Reader, path: str, max_header: int, first: bytes) -> Header:
    _refuse_other_content(first, reader)
    fix = "The file is damaged or was cut short: fetch it again."
    if len(first) < 8:
        message = f"it has {len(first)} bytes; safetensors begins with 8 bytes of header length."
        raise FileError([Finding("malformed-header", "error", "", message, fix)])
    length = int.from_bytes(first[:8], "little")
    if 8 + length > reader.size:
        message = f"its first 8 bytes promise a header of {length:,} bytes, but the file has {reader.size:,}."
        raise FileError([Finding("malformed-header", "error", "", message, fix)])
    if length > max_header:
        message = f"its header has {length:,} bytes; at most {max_header:,} are read."
        fix = f"--max-header allows up to {MAX_HEADER_LIMIT:,}." if length <= MAX_HEADER_LIMIT else ""
        raise FileError([Finding("malformed-header", "error", "", message, fix)])
    return parse_header(reader.read_at(8, length), reader.size, path)


def open_path(path: Path) -> BinaryIO:
    """Open a regular file. Raises FileError, in a sentence, for everything else (a FIFO is never waited for)."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.open("rb", buffering=0)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError([Finding("unreadable", "error", "", f"The file cannot be opened: {reason}.")]) from None
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe (FIFO)"), (stat.S_ISSOCK, "a socket"))
    what = next((text for test, text in kinds if test(mode)), "a device")
    fix = "Name the weight file inside it." if what == "a folder" else "Save its content to a file first."
    raise FileError([Finding("unreadable", "error", "", f"It is {what}, not a file.", fix)])


def _reader(target: Target) -> tuple[Reader, str, bool]:
    """A reader of the target, the name to call it by, and whether it is remote."""
    if isinstance(target, bytes | bytearray | memoryview):
        return BytesReader(target), "<bytes>", False
    if isinstance(target, str) and target.startswith("hf://"):
        from lora_convert.containers.hub import open_hub_file

        return open_hub_file(target)
    if isinstance(target, str | os.PathLike):
        path = Path(target)
        return FileReader(open_path(path), owned=True), str(path), False
    return FileReader(target, owned=False), shown(str(getattr(target, "name", "<file>"))), False


def read_container(reader: Reader, path: str, max_header: int = MAX_HEADER) -> tuple[Header, Reader]:
    """The header of a file of any container, and the reader that its spans are of.

    Files of `torch.save` and pictures that carry an embedding are known by their first bytes, whatever their name; a
    pickle, or a picture's JSON, may have `max_header` bytes. Raises FileError as `read_header` does, for pickles that
    ask for more than tensors (`unsafe-pickle`) and for pictures that carry nothing (`no-embedding`).
    """
    _check_limit(max_header)
    first = _first_of(reader)
    if not _may_be_safetensors(first):
        from lora_convert.containers.torch_file import is_torch, read_torch

        if is_torch(first):
            return read_torch(reader, path, max_header)
        if first.startswith(_TEXT_PICKLES) and reader.read_at(reader.size - 1, 1) == b".":
            message = "This looks like a pickle of protocol 0 or 1, which PyTorch never writes; nothing of it was run."
            raise FileError([Finding("unsafe-pickle", "error", "", message)])
        from lora_convert.containers.pictures import is_picture, read_picture

        if is_picture(first):
            return read_picture(reader, path, max_header)
    return _read_safetensors(reader, path, max_header, first), reader


def _read_plain(reader: Reader, path: str, max_header: int) -> tuple[Header, Reader]:
    return read_header(reader, path, max_header), reader


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # what is wrong with it is said when it is opened
        return False


def _open_folder(folder: Path, max_header: int) -> Source:
    """The embeddings in a folder, as one file. Raises FileError if there are none, or modules of a LoRA beside them."""
    from lora_convert.containers.folder import embedding_files, joined

    paths = embedding_files(folder)
    if not paths or any(folder.glob("pytorch_lora_weights*")):
        open_path(folder)
    with contextlib.ExitStack() as stack:
        parts = []
        for path in paths:
            reader = FileReader(open_path(path), owned=True)
            stack.callback(reader.close)
            parts.append(read_container(reader, str(path), max_header))
        stack.pop_all()
        return Source(*joined(parts, str(folder)))


def open_source(target: Target, max_header: int = MAX_HEADER, *, pickles: bool = True) -> Source:
    """Open a weight file and check its header.

    `target` is a path, a `hf://owner/repo/file` address, bytes, or an open binary file (left open, its position kept);
    a folder of embeddings (`learned_embeds*.safetensors`) counts as one file. Without `pickles` nothing but safetensors
    is taken. Raises FileError with findings for a bad file, UsageError for a bad call.
    """
    if pickles and isinstance(target, str | os.PathLike) and _is_folder(Path(target)):
        return _open_folder(Path(target), max_header)
    reader, name, remote = _reader(target)
    with contextlib.ExitStack() as stack:
        stack.callback(reader.close)
        header, placed = (read_container if pickles else _read_plain)(reader, name, max_header)
        source = Source(header, placed, remote=remote)
        stack.pop_all()
        return source


def name_of(target: Target) -> str:
    """What to call a target in results and messages."""
    if isinstance(target, bytes | bytearray | memoryview):
        return "<bytes>"
    if isinstance(target, str | os.PathLike):
        return str(target)
    return str(getattr(target, "name", "<file>"))


def _without(source: Source, patterns: Sequence[str]) -> Source:
    """The source without the tensors that the patterns name, and with a finding that says so."""
    if not patterns:
        return source
    if isinstance(patterns, str):
        patterns = (patterns,)
    header = source.header
    dropped = [name for name in header.tensors if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    unused = [pattern for pattern in patterns if not fnmatch.filter(header.tensors, pattern)]
    if unused:
        raise UsageError(f"--skip {shown(unused[0])!r} matches no tensor")
    lost = sum(header.tensors[name].nbytes for name in dropped)
    message = (
        f"{len(dropped)} of {len(header.tensors)} tensors ({lost:,} bytes) were left out as asked: {listed(dropped)}."
    )
    said = [Finding("skipped", "warning", "", message)]
    if len(dropped) == len(header.tensors):
        said.append(Finding("empty-file", "error", "", "--skip leaves no tensor."))
    left_out = set(dropped)
    kept = {name: tensor for name, tensor in header.tensors.items() if name not in left_out}
    return Source(
        replace(header, tensors=kept, findings=(*header.findings, *said)), source.reader, remote=source.remote
    )


@contextlib.contextmanager
def opened(target: Target, max_header: int = MAX_HEADER, skip: Sequence[str] = ()) -> Iterator[Source]:
    """`open_source` without the tensors whose names match a pattern of `skip`; closed at the end of the block."""
    with open_source(target, max_header) as source:
        yield _without(source, skip)

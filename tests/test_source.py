"""Opening what can be named as a file: paths of every kind, bytes, open files; reading it, also from threads."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import LORA, read_all
from safetensors.numpy import save

import lora_convert
from lora_convert.containers import open_source
from lora_convert.errors import FileError, UsageError

REAL = LORA / "k_sd15_lorafa.safetensors"
SMALL = save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float16)})


def fifo(folder: pathlib.Path) -> pathlib.Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def listening(folder: pathlib.Path) -> pathlib.Path:
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as server:  # addresses are short
        server.bind("s")
    return folder / "s"


def loop(folder: pathlib.Path) -> pathlib.Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (fifo, "It is a pipe (FIFO), not a file."),  # and is not waited for
        (listening, "It is a socket, not a file."),
        (lambda folder: folder, "It is a folder, not a file."),
        (lambda folder: "/dev/null", "It is a device, not a file."),
        (lambda folder: "/dev/zero", "It is a device, not a file."),
        (lambda folder: folder / "missing.safetensors", "No such file or directory"),
        (lambda folder: folder / "a\0b.safetensors", "embedded null"),
        (lambda folder: folder / "a\ud800b.safetensors", "surrogates not allowed"),
        (lambda folder: folder / ("n" * 300), "File name too long"),
        (loop, "Too many levels of symbolic links"),
        (lambda folder: REAL / "inside", "Not a directory"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_what_is_no_file_is_refused_in_a_sentence(make, message, tmp_path):
    target = make(tmp_path)
    (finding,) = lora_convert.identify(target).findings
    assert (finding.name, finding.severity) == ("unreadable", "error")
    assert message in finding.message
    assert lora_convert.convert(target, tmp_path / "out").status == "failed"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX permissions")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret.safetensors"
    path.write_bytes(SMALL)
    path.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        (finding,) = lora_convert.identify(path).findings
    finally:
        os.seteuid(user)
    assert (finding.name, finding.message) == ("unreadable", "The file cannot be opened: Permission denied.")


def link(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    (folder / "link").symlink_to(path)
    return folder / "link"


@pytest.mark.parametrize(
    "target",
    [
        lambda path, folder: path,
        lambda path, folder: str(path),
        link,
        lambda path, folder: path.read_bytes(),
        lambda path, folder: bytearray(path.read_bytes()),
        lambda path, folder: memoryview(path.read_bytes()),
        lambda path, folder: io.BytesIO(path.read_bytes()),
    ],
    ids=["path", "str", "symlink", "bytes", "bytearray", "memoryview", "BytesIO"],
)
def test_every_kind_of_target_reads_the_same(target, tmp_path):
    expected = read_all(REAL)
    with open_source(target(REAL, tmp_path)) as source:
        assert source.header.tensors.keys() == expected.keys()
        for name, values in expected.items():
            read = source.read(name)
            assert (read.dtype, read.shape) == (values.dtype, values.shape)
            np.testing.assert_array_equal(read, values)
            if values.size == 1:
                assert source.read_scalar(name) == float(values)
        assert b"".join(source.chunks(1000)) == REAL.read_bytes()


def test_a_view_of_wider_items_is_taken_by_its_bytes():
    padded = np.frombuffer(SMALL.ljust(len(SMALL) + -len(SMALL) % 4), np.float32)
    assert lora_convert.identify(memoryview(padded)).file == "<bytes>"
    with open_source(memoryview(np.frombuffer(SMALL, np.uint16))) as source:
        assert source.read("a").tolist() == [0, 1, 2, 3, 4, 5]


def test_a_bytearray_can_change_afterwards():
    data = bytearray(SMALL)
    with open_source(data) as source:
        array = source.read("a")
    data.clear()
    assert array.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("buffering", [-1, 0])
@pytest.mark.parametrize("content", [SMALL, SMALL[:-1], b"<html>", b""], ids=["good", "short", "html", "empty"])
def test_an_open_file_stays_open_at_its_position(content, buffering, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with path.open("rb", buffering=buffering) as file:
        file.seek(3)
        found = lora_convert.identify(file, hashes=True)
        assert found.file == str(path)
        assert (found.tensors == 2) == (content == SMALL)
        assert file.tell() == 3
        assert file.read() == content[3:]


class Grudging(io.RawIOBase):
    """A raw file that gives at most 7 bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:
        return self._file.readinto(memoryview(buffer)[:7])


def test_short_reads_are_continued():
    with open_source(Grudging(SMALL)) as source:
        assert source.read("a").tolist() == [0, 1, 2, 3, 4, 5]


def unseekable() -> io.BufferedIOBase:
    reading, writing = os.pipe()
    os.close(writing)
    return os.fdopen(reading, "rb")


def closed() -> io.BytesIO:
    file = io.BytesIO(SMALL)
    file.close()
    return file


@pytest.mark.parametrize(
    "make",
    [unseekable, closed, lambda: io.StringIO("{}"), lambda: REAL.open(encoding="latin-1"), lambda: None, lambda: 3],
    ids=["pipe", "closed", "StringIO", "text", "None", "number"],
)
def test_a_wrong_target_is_a_wrong_call(make):
    target = make()
    with pytest.raises(UsageError, match="the open file is not one to seek and read bytes in: "):
        open_source(target)
    if hasattr(target, "close"):
        target.close()


def test_a_file_cut_while_read_is_a_finding(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(SMALL)
    with open_source(path) as source:
        os.truncate(path, len(SMALL) - 5)
        with pytest.raises(FileError, match="the file changed while read") as caught:
            [source.read(name) for name in source.header.tensors]
    assert pickle.loads(pickle.dumps(caught.value)).findings == caught.value.findings


def test_an_open_file_closed_while_read_is_a_finding():
    file = io.BytesIO(SMALL)
    with open_source(file) as source:
        file.close()
        with pytest.raises(FileError, match="unreadable: Reading failed: "):
            source.read("a")


@pytest.mark.parametrize("opened", [lambda: REAL, lambda: REAL.open("rb"), REAL.read_bytes])
def test_threads_can_share_a_source(opened):
    expected = read_all(REAL)
    target = opened()
    with open_source(target) as source, ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda name: (name, source.read(name)), [*expected] * 50))
    if hasattr(target, "read"):
        target.close()
    assert len(read) == 50 * len(expected)
    for name, values in read:
        assert values.tobytes() == expected[name].tobytes()

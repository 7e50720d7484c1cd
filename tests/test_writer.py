"""Writing: the reference writer's bytes, and a file that is whole or not there whatever happens."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import LORA, lora, names_of, read_all
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import lora_convert
from lora_convert.containers.dtypes import numpy_dtype
from lora_convert.converters.plan import OutputTensor
from lora_convert.converters.writer import atomic_file, atomic_folder, header_bytes, offsets
from lora_convert.errors import UsageError

DTYPES = ["BOOL", "U8", "F8_E4M3", "F8_E5M2", "I16", "F16", "BF16", "I32", "F32", "F64", "I64", "U64"]
TEXT = st.text('abc.é\x00\x1f\x7f\u2028\U0001f600"\\/', max_size=8)


def split_header(data: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end], data[end:]


def laid_out(data: bytes) -> list[OutputTensor]:
    """The tensors of a file in the order of its header."""
    content = json.loads(split_header(data)[0][8:])
    content.pop("__metadata__", None)
    return [OutputTensor(name, entry["dtype"], tuple(entry["shape"]), "down") for name, entry in content.items()]


def assert_same_file(ours: bytes, theirs: bytes) -> None:
    """Byte for byte, but for the order of the metadata, which the reference writer leaves to chance."""
    (our_header, our_data), (their_header, their_data) = split_header(ours), split_header(theirs)
    assert our_data == their_data
    assert our_header[:8] == their_header[:8]
    assert json.loads(our_header[8:]) == json.loads(their_header[8:])
    assert our_header.partition(b"}")[2] == their_header.partition(b"}")[2]


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)),
        min_size=1,  # without tensors the reference writer's JSON is broken
        max_size=8,
    ),
    st.dictionaries(TEXT, TEXT, max_size=4),
    st.integers(0, 2**32),
)
def test_header_and_data_are_the_reference_writers(layout, metadata, seed):
    values = np.random.default_rng(seed)
    arrays = {
        name: np.frombuffer(values.bytes(int(np.prod(shape)) * numpy_dtype(dtype).itemsize), np.uint8)
        .view(numpy_dtype(dtype))
        .reshape(shape)
        for name, (dtype, shape) in layout.items()
    }
    theirs = save(arrays, metadata)
    tensors = laid_out(theirs)
    ours = header_bytes(tensors, metadata) + b"".join(arrays[tensor.name].tobytes() for tensor in tensors)
    assert_same_file(ours, theirs)
    if len(metadata) < 2:
        assert ours == theirs
    for tensor in tensors:
        start = len(header_bytes(tensors, metadata)) + offsets(tensors)[tensor.name]
        assert ours[start : start + tensor.nbytes] == arrays[tensor.name].tobytes()


UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_tensors_stand_in_the_reference_writers_order(alpha, to, write, tmp_path):
    tensors = {
        **lora(f"{UNET}attn2_to_k", 320, 768, 4, alpha, dtype=np.float32),
        **lora(f"{UNET}attn2_to_v", 320, 768, 4, alpha, dtype=ml_dtypes.bfloat16),
        **lora(f"{UNET}attn1_to_q", 320, 320, 4, alpha),
        **lora("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768, 2, alpha),
    }
    result = lora_convert.convert(write(tensors, {"ss_b": "é\n", "ss_a": "1"}), tmp_path / "out", to=to)
    assert result.ok, result.findings
    written = Path(result.outputs[0].path).read_bytes()
    metadata = json.loads(split_header(written)[0][8:])["__metadata__"]
    assert list(metadata) == sorted(metadata)
    order = [tensor.name for tensor in laid_out(written)]
    theirs = save(read_all(result.outputs[0].path), metadata)
    assert order == [tensor.name for tensor in laid_out(theirs)]
    assert split_header(written)[1] == split_header(theirs)[1]
    assert len(written) == len(theirs)


def litter(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == ".part"]


def test_a_file_is_there_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder" / "x.safetensors"
    with atomic_file(target) as file:
        file.write(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert [*target.parent.iterdir()] == [target]


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "No space left on device"), SystemExit(3)],
    ids=repr,
)
def test_an_exception_leaves_the_old_file(error, tmp_path):
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, atomic_file(target) as file:
        file.write(b"half")
        raise error
    assert caught.value is error
    assert target.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [target]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let files grow beyond `size` bytes, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [1 << 10, 1 << 20])
def test_a_write_that_the_system_refuses_leaves_the_old_file(size, tmp_path):
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="File too large"), largest_file(1 << 9), atomic_file(target) as file:
        file.write(bytes(size))
    assert target.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [target]


def test_a_conversion_that_finds_no_room_leaves_the_old_file(tmp_path):
    source = LORA / "k_sd15_lorafa.safetensors"
    result = lora_convert.convert(source, tmp_path)
    (target,) = tmp_path.iterdir()
    before = target.read_bytes()
    with pytest.raises(OSError, match="File too large"), largest_file(1 << 14):
        lora_convert.convert(source, tmp_path, force=True, dtype="fp32")
    assert [*tmp_path.iterdir()] == [target]
    assert target.read_bytes() == before
    assert result.outputs[0].bytes == len(before)


def test_a_target_that_is_a_folder_stays_one(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(OSError), atomic_file(tmp_path / "x.safetensors") as file:
        file.write(b"new")
    assert [*tmp_path.iterdir()] == [tmp_path / "x.safetensors"]
    with pytest.raises(UsageError, match="is a folder"):
        lora_convert.convert(LORA / "k_sd15_lorafa.safetensors", tmp_path / "x.safetensors", force=True)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"the folder .* cannot be made: "), atomic_file(tmp_path / "file" / "x"):
        pass


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX permissions")
def test_a_folder_that_may_not_be_written_is_a_sentence():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "x.safetensors"
        Path(folder).chmod(0o555)
        os.seteuid(user or 65534)  # root may write everywhere
        try:
            with (
                pytest.raises(UsageError, match=r"nothing can be written to .*: Permission denied"),
                atomic_file(target),
            ):
                pass
        finally:
            os.seteuid(user)
        Path(folder).chmod(0o755)


WRITER = """
import sys
from pathlib import Path
from lora_convert.converters.writer import atomic_file

print(flush=True)
for byte in range(1, 256):
    with atomic_file(Path(sys.argv[1])) as file:
        for _ in range(64):
            file.write(bytes([byte]) * (1 << 14))
        if len(sys.argv) > 2:
            print("half", flush=True)
            sys.stdin.read()
"""


def start_writer(target: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(target), *arguments]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    writer.stdout.readline()
    return writer


def kill(writer: subprocess.Popen) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_a_kill_leaves_one_whole_file(tmp_path):
    target = tmp_path / "x.safetensors"
    chance = random.Random(0)
    for _ in range(10):
        target.write_bytes(bytes(1 << 20))
        writer = start_writer(target)
        threading.Event().wait(chance.uniform(0, 0.1))
        kill(writer)
        content = target.read_bytes()
        assert len(content) == 1 << 20
        assert len(set(content)) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_what_a_killed_writer_leaves_is_removed_by_the_next_one(tmp_path):
    target = tmp_path / "x[1]*.safetensors"  # not a pattern
    (tmp_path / ".x1y.safetensors.1-00.part").touch()  # nor another file's
    others = set(litter(tmp_path))
    writer = start_writer(target, "halt")
    assert writer.stdout.readline() == b"half\n"
    (left,) = set(litter(tmp_path)) - others
    with atomic_file(target):
        assert left.exists(), "its writer lives"
    kill(writer)
    assert left.exists()
    with atomic_file(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
    assert set(litter(tmp_path)) == others


def test_the_last_of_two_writers_wins_and_both_succeed(tmp_path):
    target = tmp_path / "x.safetensors"
    with atomic_file(target) as slow:
        slow.write(b"slow")
        with atomic_file(target) as quick:
            quick.write(b"quick")
        assert target.read_bytes() == b"quick"
    assert target.read_bytes() == b"slow"
    assert not litter(tmp_path)


def test_many_writers_of_one_target_do_not_disturb_each_other(tmp_path):
    target = tmp_path / "x.safetensors"

    def write(byte: int) -> None:
        for _ in range(20):
            with atomic_file(target) as file:
                file.write(bytes([byte]) * 1000)
            done.append(set(target.read_bytes()))

    done: list[set[int]] = []
    threads = [threading.Thread(target=write, args=(byte,)) for byte in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(content) for content in done] == [1] * 160
    assert [*tmp_path.iterdir()] == [target]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that is there already."""
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "unet" / "x").write_bytes(b"old")
    return tmp_path / "model"


def replace_folder(target: Path) -> None:
    with atomic_folder(target) as folder:
        (folder / "x").write_bytes(b"new")


def test_a_folder_is_replaced_as_a_whole(model):
    replace_folder(model)
    assert content_of(model.parent) == {"model/x": b"new"}


@pytest.mark.parametrize("moment", ["model", "content"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
def test_a_folder_that_cannot_be_moved_leaves_the_old_one(error, moment, model, monkeypatch):
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == moment:
            raise error
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(Path, "rename", interrupted)
        replace_folder(model)
    assert content_of(model.parent) == {"model/unet/x": b"old"}


def test_a_removal_that_was_interrupted_is_finished_by_the_next_writer(model, monkeypatch):
    rmtree = shutil.rmtree

    def interrupted(path: Path, **options: object) -> None:
        rmtree(path, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        replace_folder(model)
    assert content_of(model) == {"x": b"new"}
    assert litter(model.parent)
    replace_folder(model)
    assert content_of(model.parent) == {"model/x": b"new"}


def test_a_writer_that_died_between_its_renames_loses_nothing(model):
    scratch = model.parent / ".model.1-00.part"
    (scratch / "content").mkdir(parents=True)
    (scratch / ".lock").touch()
    model.rename(scratch / "old")
    with pytest.raises(ZeroDivisionError), atomic_folder(model):
        raise ZeroDivisionError
    assert content_of(model.parent) == {"model/unet/x": b"old"}


def test_bad_values_publish_nothing(write, tmp_path):
    tensors = lora(f"{UNET}attn2_to_k", 320, 768)
    tensors[f"{UNET}attn2_to_k.lora_up.weight"][3, 1] = np.nan
    result = lora_convert.convert(write(tensors), tmp_path / "out")
    assert result.status == "failed"
    assert "not-finite" in names_of(result.findings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stem", ["x" * 243, "é" * 121])
def test_names_of_any_legal_length(tmp_path, stem):
    target = tmp_path / f"{stem}.safetensors"
    with atomic_file(target) as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]

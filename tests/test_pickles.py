"""PyTorch's own files: read as torch reads them, refused where they ask for more than tensors, and never run."""

from __future__ import annotations

import ast
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CORPUS, LORA, ROOT
from safetensors import safe_open

import lora_convert
from lora_convert.containers import Source, open_source, torch_file
from lora_convert.containers.pickles import Limits
from lora_convert.errors import FileError

torch = pytest.importorskip("torch")

LEGACY = {"_use_new_zipfile_serialization": False}
VALUES = torch.arange(24, dtype=torch.float32).reshape(4, 6)
SHARED = torch.arange(40, dtype=torch.float16)


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def raw(tensor: Any) -> bytes:
    """A tensor's bytes in order, also of dtypes that numpy does not have."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_read(data: bytes, expected: dict[str, Any]) -> Source:
    """The tensors of a file are the expected ones: names, shapes, every byte."""
    source = open_source(data)
    assert source.header.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert source.header.tensors[name].shape == tuple(tensor.shape), name
        assert source.read(name).shape == tuple(tensor.shape), name
        assert source.read_bytes(name) == raw(tensor), name
    return source


def refused(data: bytes) -> Any:
    """The one finding that a file is refused with."""
    with pytest.raises(FileError) as caught:
        open_source(data)
    (finding,) = caught.value.findings
    return finding


def parameters(**tensors: Any) -> Any:
    return torch.nn.ParameterDict(tensors)


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a dictionary": ({"a": VALUES, "b": SHARED}, {"a": VALUES, "b": SHARED}),
    "ordered": (OrderedDict(a=VALUES), {"a": VALUES}),
    "a tensor": (VALUES, {"tensor": VALUES}),
    "a state_dict": ((m := torch.nn.Linear(3, 2)).state_dict(), {"weight": m.weight, "bias": m.bias}),
    "parameters": ({"a": torch.nn.Parameter(VALUES)}, {"a": VALUES}),
    "ParameterDict": ({"string_to_param": parameters(x=VALUES)}, {"string_to_param.x": VALUES}),
    "a wrapper": ({"state_dict": {"a.weight": VALUES}, "epoch": 3}, {"a.weight": VALUES}),
    "nested": ({"unet": {"a": VALUES}, "step": 7}, {"unet.a": VALUES}),
    "a list": ([{"x": VALUES}, {"y": SHARED}], {"0.x": VALUES, "1.y": SHARED}),
    "transposed": ({"a": VALUES.T}, {"a": VALUES.T}),
    "a slice": ({"a": VALUES[1:3], "b": VALUES[:, ::2]}, {"a": VALUES[1:3], "b": VALUES[:, ::2]}),
    "repeated": ({"a": torch.tensor([2.0]).expand(5, 3)}, {"a": torch.full((5, 3), 2.0)}),
    "overlapping": ({"a": SHARED.as_strided((6, 8), (4, 1))}, {"a": SHARED.as_strided((6, 8), (4, 1))}),
    "one storage": ({"a": SHARED[:7], "b": SHARED[7:], "c": SHARED}, {"a": SHARED[:7], "b": SHARED[7:], "c": SHARED}),
    "scalar and empty": ({"a": VALUES[2, 3], "b": VALUES[:0]}, {"a": VALUES[2, 3], "b": VALUES[:0]}),
    "set and size": ({"a": VALUES, "s": {1, 2}, "z": VALUES.shape, "d": torch.float16}, {"a": VALUES}),
    "a device": ({"a": VALUES, "d": torch.device("cpu"), "n": None}, {"a": VALUES}),
    "many": ({f"t{n}": VALUES + n for n in range(300)}, {f"t{n}": VALUES + n for n in range(300)}),
    "up and down": (
        [torch.ones(320, 2), torch.ones(2, 9)],
        {"unet:0:up": torch.ones(320, 2), "unet:0:down": torch.ones(2, 9)},
    ),
    "squares": (
        [torch.ones(8, 2), torch.ones(2, 8)],
        {"text_encoder:0:up": torch.ones(8, 2), "text_encoder:0:down": torch.ones(2, 8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_what_torch_saves_is_read(form, options, protocol):
    value, expected = FORMS[form]
    source = assert_read(saved(value, pickle_protocol=protocol, **options), expected)
    assert source.header.findings == ()


DTYPES = [
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
    "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_every_dtype(dtype, options):
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    source = assert_read(saved({"a": tensor, "t": tensor.T}, **options), {"a": tensor, "t": tensor.T})
    if dtype not in ("bool", "complex64"):
        assert source.read("a").astype(np.float64).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_plain_values_are_kept_beside_the_tensors():
    value = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": VALUES},
        "name": "sks",
        "step": np.int64(1500),
        "loss": np.float32(0.5),
        "sd_checkpoint": None,
        "x": 1.5,
    }
    for options in ({}, LEGACY):
        extras = open_source(saved(value, **options)).header.extras
        expected = {"string_to_token.*": "265", "name": "sks", "step": "1500", "loss": "0.5", "x": "1.5"}
        assert extras == expected


def test_what_stands_beside_the_weights_is_said():
    source = open_source(saved({"state_dict": {"a": VALUES}, "optimizer_states": [{"m": VALUES}], "epoch": 2}))
    (finding,) = source.header.findings
    assert (finding.name, finding.severity) == ("beside-weights", "note")
    assert "optimizer_states.0.m" in finding.message
    assert source.header.tensors.keys() == {"a"} and source.header.extras == {"epoch": "2"}


ARRAYS = {
    "c": np.arange(6, dtype=np.float32).reshape(2, 3),
    "f": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "half": np.ones((2, 2), np.float16),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 4)),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("save", [saved, None], ids=["torch.save", "pickle"])
def test_numpy_arrays(save, protocol):
    data = save(ARRAYS, pickle_protocol=protocol) if save else pickle.dumps(ARRAYS, protocol)
    source = open_source(data)
    assert source.header.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        read = source.read(name)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def test_a_file_is_known_by_its_content(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(saved({"a": VALUES}))
    with open_source(tmp_path / "x.safetensors") as source:
        assert source.read("a").tolist() == VALUES.tolist()
        assert source.header.data_start == 0


@pytest.mark.parametrize("data", [saved({"a": VALUES}), saved({"a": VALUES}, **LEGACY)], ids=["zip", "legacy"])
def test_base_models_are_safetensors_only(data):
    """Other libraries load them, which would not read a pickle as we do."""
    with pytest.raises(FileError, match="not-weights"):
        open_source(data, pickles=False)


@pytest.mark.parametrize("name", ["k_sd15_dylora", "k_sd15_lora_bf16_r4a4", "simo_sd15_safetensors"])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_pickled_lora_converts_to_the_same_tensors(name, options, tmp_path):
    with safe_open(LORA / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    transposed = {key: value.T.contiguous().T if value.dim() == 2 else value for key, value in tensors.items()}
    (tmp_path / "x.ckpt").write_bytes(saved(transposed, **options))
    from_pickle = lora_convert.convert(tmp_path / "x.ckpt", tmp_path / "a.safetensors", family="sd15")
    other = lora_convert.convert(LORA / f"{name}.safetensors", tmp_path / "b.safetensors", family="sd15")
    assert from_pickle.ok and other.ok, from_pickle.findings
    ours, theirs = (read_bits(tmp_path / f"{one}.safetensors") for one in "ab")
    assert ours == theirs


def read_bits(path: Path) -> dict[str, bytes]:
    with open_source(path) as source:
        return {name: source.read_bytes(name) for name in source.header.tensors}


# what is refused: pickles composed by hand


def archive(program: bytes, records: dict[str, bytes] | None = None) -> bytes:
    """A zip archive as torch writes it, with a pickle of protocol 2 of ours."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("archive/data.pkl", b"\x80\x02" + program)
        out.writestr("archive/byteorder", "little")
        for name, content in ({"data/0": bytes(64)} | (records or {})).items():
            out.writestr(f"archive/{name}", content)
    return file.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(size: int = 16, kind: str = "torch.FloatStorage", key: str = "0") -> bytes:
    return b"(" + text("storage") + named(kind) + text(key) + text("cpu") + number(size) + b"tQ"


def tensor(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], of: bytes = storage()) -> bytes:
    arguments = of + number(offset) + numbers(*shape) + numbers(*strides) + b"\x89" + named("collections.OrderedDict")
    return named("torch._utils._rebuild_tensor_v2") + b"(" + arguments + b")RtR"


SMALL = tensor(0, (2,), (1,))


def table(program: bytes) -> bytes:
    return b"}" + text("a") + program + b"s."


def test_composed_archives_are_read():
    """The building blocks of the tests below are right, so that what they break is what is refused."""
    source = open_source(archive(table(tensor(2, (3, 2), (2, 1)))))
    assert source.read("a").tolist() == [[0, 0]] * 3


GLOBALS = [
    "os.system", "posix.system", "nt.system", "builtins.eval", "builtins.exec", "builtins.getattr", "__builtin__.open",
    "builtins.__import__", "subprocess.Popen", "torch.load", "torch.hub.load", "torch.storage._load_from_bytes",
    "torch.jit.load", "numpy.load", "functools.partial", "operator.attrgetter", "pickle.loads", "copyreg.__newobj__",
    "torch.nn.modules.linear.Linear", "torch._utils._rebuild_device_tensor_from_numpy", "a.b.c", "torch.float33",
]  # fmt: skip


@pytest.mark.parametrize("name", GLOBALS)
def test_names_outside_the_list_are_refused_by_name(name):
    finding = refused(archive(table(named(name))))
    assert finding.name == "unsafe-pickle"
    assert f"names {name}, " in finding.message and "(at byte 9 of data.pkl)" in finding.message
    stacked = text(name.rpartition(".")[0]) + text(name.rpartition(".")[2]) + b"\x93"
    assert f"names {name}, " in refused(archive(table(stacked))).message
    assert f"names {name}, " in refused(pickle.PROTO + b"\x02" + table(named(name))).message


ORDERED, RECONSTRUCT = named("collections.OrderedDict"), named("numpy._core.multiarray._reconstruct")
DTYPE_O = named("numpy.dtype") + text("O8") + b"\x85R"

UNSAFE: dict[str, tuple[bytes, str]] = {
    "EXT1": (table(b"\x82\x01"), "EXT1"),
    "INST": (b"(ios\nsystem\n.", "INST"),
    "OBJ": (b"(" + ORDERED + b"o.", "OBJ"),
    "PERSID": (b"Pstorage\n.", "PERSID"),
    "INT": (b"I1\n.", "INT"),
    "NEXT_BUFFER": (table(b"\x97"), "NEXT_BUFFER"),
    "a storage calls": (table(named("torch.FloatStorage") + b")R"), "calls torch.FloatStorage"),
    "a text calls": (table(text("os") + b")R"), "is not a name"),
    "an object of a function": (table(named("torch._utils._rebuild_tensor") + b")\x81"), "makes an object"),
    "persistent id of a name": (table(b"(" + text("storage") + ORDERED + text("0") + text("cpu") + b"K\1tQ"), "class"),
    "persistent id of a module": (table(b"(" + text("module") + b"tQ"), "not a storage"),
    "state of a text": (table(text("x") + b"}b"), "sets the state"),
    "python objects": (table(DTYPE_O), "not a plain number"),
    "another array": (table(RECONSTRUCT + ORDERED + b"\x85R"), "unknown class"),
    "encode": (table(named("_codecs.encode") + text("x") + text("rot13") + b"\x86R"), "Latin-1"),
    "beyond the storage": (table(tensor(0, (17,), (1,))), "beyond its storage"),
    "offset beyond": (table(tensor(16, (1,), (1,))), "beyond its storage"),
    "strides beyond": (table(tensor(0, (2, 2), (15, 1))), "beyond its storage"),
    "repeated without end": (table(tensor(0, (1 << 40,), (0,))), "tensors have"),
    "repeated in all": (table(tensor(0, (1 << 24, 2), (0, 0))), "tensors have"),
    "deep": (b"]" * 200 + b"a" * 199 + b".", "levels deep"),
    "memo bomb": (
        b"]q\0" + b"".join(b"0](" + (b"h" + bytes([n])) * 10 + b"eq" + bytes([n + 1]) for n in range(12)) + b".",
        "unfolds into more than",
    ),
    "memo index": (b"]r\xff\xff\xff\x7f.", "memo index"),
    "a long integer": (table(b"\x8b\x00\x10\x00\x00" + bytes(4096)), "an integer of 4,096 bytes"),
    "opcodes": (b"N0" * 150_001 + b"N.", "opcodes"),
    "encoded again and again": (
        b"(" + named("_codecs.encode") + b"q\0" + text("x" * (1 << 20)) + text("latin1") + b"\x86q\1R"
        + b"h\0h\1R" * 99 + b"l.", "unfolds into far more",
    ),
    "a long name": (table(SMALL).replace(text("a"), text("a" * 2000), 1), "more than 500 characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_pickles_are_refused(case):
    program, message = UNSAFE[case]
    finding = refused(archive(program))
    assert (finding.name, finding.severity) == ("unsafe-pickle", "error")
    assert message in finding.message


BROKEN: dict[str, bytes] = {
    "no end": b"}",
    "empty stack": b".",
    "leftovers": b"NN.",
    "a mark left": b"(N.",
    "no mark": b"t.",
    "pop below a mark": b"N(a.",
    "odd items": b"}(Nu.",
    "append to a text": table(text("x") + b"Na"),
    "no memo": b"h\5.",
    "unknown opcode": b"\xff.",
    "huge string": b"X\xf0\xff\xff\xff...",
    "huge bytes": b"\x8e" + b"\xff" * 8 + b".",
    "huge frame": b"\x95" + b"\xff" * 8 + b".",
    "bad text": b"X\1\0\0\0\xff.",
    "protocol 9": b"\x80\x09N.",
    "negative shape": table(tensor(0, (-1,), (1,))),
    "negative stride": table(tensor(4, (2,), (-1,))),
    "negative offset": table(tensor(-1, (2,), (1,))),
    "shape and strides differ": table(tensor(0, (2, 2), (1,))),
    "too many dimensions": table(tensor(0, (1,) * 99, (1,) * 99)),
    "missing storage": table(tensor(0, (2,), (1,), storage(key="7"))),
    "storage of another size": table(tensor(0, (2,), (1,), storage(17))),
    "storage of another dtype": table(tensor(0, (2,), (1,), storage(16, "torch.HalfStorage"))),
    "storage with a path": table(tensor(0, (2,), (1,), storage(key="../0"))),
    "untyped": table(tensor(0, (2,), (1,), storage(64, "torch.storage.UntypedStorage"))),
    "two tensors of a name": b"}" + text("a.b") + SMALL + b"s" + text("a") + b"}" + text("b") + SMALL + b"ss.",
    "a tensor under no name": b"})" + SMALL + b"s.",
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_pickles_are_refused(case):
    finding = refused(archive(BROKEN[case]))
    assert (finding.name, finding.severity) == ("malformed-pickle", "error")


@pytest.mark.parametrize("data", [pickle.dumps({"a": 1}, 2) + pickle.dumps([], 2), saved({}, **LEGACY) + b"x"])
def test_what_follows_a_pickle_is_refused(data):
    assert "follow" in refused(data).message
    program = table(SMALL)
    assert "1 bytes follow" in refused(archive(program + b".")).message


def test_classes_of_trainers_stay_names():
    callback = named("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    program = b"}(" + text("a") + SMALL + text("c") + callback + b")\x81}b" + callback + b"Nu."
    source = open_source(archive(program))
    (finding,) = source.header.findings
    assert finding.severity == "note" and "ModelCheckpoint" in finding.message
    assert source.header.tensors.keys() == {"a"} and "pytorch_lightning" not in sys.modules


# archives that readers could see differently

GOOD = saved({"a": VALUES, "b": SHARED[::2]})


def rezipped(change: Callable[[zipfile.ZipFile, str, bytes], None], more: dict[str, bytes] | None = None) -> bytes:
    """The good archive, written again with each file as `change` writes it, and more files."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as given, zipfile.ZipFile(file, "w") as out:
        for name in given.namelist():
            change(out, name, given.read(name))
        for name, content in (more or {}).items():
            out.writestr(name, content)
    return file.getvalue()


def same(out: zipfile.ZipFile, name: str, content: bytes) -> None:
    out.writestr(name, content)


def deflated(out: zipfile.ZipFile, name: str, content: bytes) -> None:
    out.writestr(name, content, zipfile.ZIP_DEFLATED)


def big_endian(out: zipfile.ZipFile, name: str, content: bytes) -> None:
    out.writestr(name, b"big" if name.endswith("byteorder") else content)


def without_pickle(out: zipfile.ZipFile, name: str, content: bytes) -> None:
    if not name.endswith("data.pkl"):
        out.writestr(name, content)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_64_bits(out: zipfile.ZipFile, name: str, content: bytes) -> None:
    with out.open(name, "w", force_zip64=True) as file:
        file.write(content)


def in_64_bits(data: bytes) -> bytes:
    """The archive with every number of its directory in the fields for large ones."""
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    directory, position = b"", start
    while position < end:
        fields = list(struct.unpack_from("<4s6H3L5H2L", data, position))
        name = data[position + 46 : position + 46 + fields[10]]
        position += 46 + fields[10] + fields[11] + fields[12]
        extra = struct.pack("<2H3Q", 1, 24, fields[9], fields[8], fields[16])
        fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
        fields[11], fields[12] = len(extra), 0
        directory += struct.pack("<4s6H3L5H2L", *fields) + name + extra
    number = struct.unpack_from("<H", data, end + 10)[0]
    at = start + len(directory)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, number, number, len(directory), start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:start] + directory + record + locator + last


@pytest.mark.parametrize("make", [lambda: rezipped(same), lambda: rezipped(with_64_bits), lambda: in_64_bits(PLAIN)])
def test_archives_written_by_others_are_read(make):
    torch.load(io.BytesIO(make()), weights_only=True)  # also to torch it is one
    assert_read(make(), {"a": VALUES, "b": SHARED[::2]})


PLAIN = rezipped(same)
CENTRAL = PLAIN.index(b"PK\1\2")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: rezipped(same, {"archive/data.pkl": b"\x80\x02N."}), "unsafe-pickle", "two files of this name"),
        (lambda: rezipped(same, {"../../evil": b"x"}), "unsafe-pickle", "no such file"),
        (lambda: rezipped(same, {"archive/code/x.py": b"x"}), "unsafe-pickle", "no such file"),
        (lambda: rezipped(same, {"other/data.pkl": b"\x80\x02N."}), "unsafe-pickle", "no such file"),
        (lambda: rezipped(same, {"archive/constants.pkl": b"x"}), "unsafe-pickle", "TorchScript"),
        (lambda: rezipped(deflated), "unsafe-pickle", "compressed"),
        (lambda: rezipped(big_endian), "malformed-pickle", "big-endian"),
        (lambda: rezipped(without_pickle), "malformed-pickle", "no data.pkl"),
        (lambda: patched(PLAIN, 30, b"x"), "unsafe-pickle", "two things"),  # the first file's name
        (lambda: patched(PLAIN, 22, b"\1"), "unsafe-pickle", "two things"),  # its size
        (lambda: patched(PLAIN, 8, b"\x08"), "unsafe-pickle", "two things"),  # its method
        (lambda: patched(PLAIN, 6, b"\1"), "unsafe-pickle", "two things"),  # its flags: encrypted
        (lambda: patched(PLAIN, CENTRAL + 8, b"\1"), "unsafe-pickle", "encrypted"),
        (lambda: patched(PLAIN, CENTRAL + 42, b"\1"), "malformed-pickle", "not where"),
        (lambda: patched(PLAIN, len(PLAIN) - 22 + 8, b"\1"), "unsafe-pickle", "several files"),
        (lambda: PLAIN[:-22] + b"x" + PLAIN[-22:], "unsafe-pickle", "between"),
        (lambda: PLAIN + b"x", "malformed-pickle", "appended"),
        (lambda: patched(PLAIN, PLAIN.index(b"\x80\x02") + 3, b"\xff"), "malformed-pickle", "checksum"),
    ],
)  # fmt: skip
def test_dubious_archives_are_refused(make, name, message):
    finding = refused(make())
    assert (finding.name, message in finding.message) == (name, True), finding


def test_two_ends_that_disagree():
    at = GOOD.index(b"PK\6\6")
    assert "disagree" in refused(patched(GOOD, at + 32, b"\3")).message


@pytest.mark.parametrize("data", [GOOD, saved({"a": VALUES}, **LEGACY), pickle.dumps(ARRAYS, 4)])
def test_cut_short_anywhere(data):
    for size in range(16, len(data), 37):
        assert refused(data[:size]).name in ("malformed-pickle", "unsafe-pickle"), size


SEEDS = {
    "zip": GOOD,
    "legacy": saved({"a": VALUES, "p": parameters(x=VALUES), "n": np.float32(1)}, **LEGACY),
    "arrays": pickle.dumps(ARRAYS, 4),
    "composed": archive(table(tensor(2, (3, 2), (2, 1)))),
}


def mutations(data: bytes, rng: random.Random) -> bytes:
    mutated = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(mutated))
        kind = rng.randrange(4)
        if kind == 0:
            mutated[at] = rng.randrange(256)
        elif kind == 1:
            mutated[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del mutated[at : at + rng.randint(1, 9)]
        else:
            mutated[at:at] = rng.randbytes(rng.randint(1, 9))
    return bytes(mutated)


@pytest.mark.parametrize("seed", [*SEEDS, "noise", "program"])
def test_any_bytes_give_tensors_or_a_finding(seed):
    rng = random.Random(seed)
    program = table(tensor(2, (3, 2), (2, 1)))
    for _ in range(400):
        if seed == "noise":
            data = rng.choice([b"PK\3\4", b"\x80\x02", b"\x80\x04", b"("]) + rng.randbytes(rng.randrange(300))
        elif seed == "program":
            data = archive(mutations(program, rng))  # with the right checksum, so that the machine is reached
        else:
            data = mutations(SEEDS[seed], rng)
        try:
            source = open_source(data)
            for name in source.header.tensors:
                source.read_bytes(name)
        except FileError as error:
            assert error.findings


def test_big_archives_are_read_by_position(tmp_path):
    """Nothing but what is asked for is read; an archive beyond 4 GiB has its numbers in 64 bits."""
    path = tmp_path / "x.pt"
    path.write_bytes(saved({"a": torch.zeros(1 << 20), "b": VALUES}))

    class Counting(io.FileIO):
        count = 0

        def readinto(self, buffer: Any) -> int:
            done = super().readinto(buffer)
            self.count += done or 0
            return done

        def read(self, size: int = -1) -> bytes:
            data = super().read(size)
            self.count += len(data)
            return data

    with Counting(path) as file, open_source(file) as source:
        assert source.read("b").tolist() == VALUES.tolist()
        assert file.count < 10_000


def test_views_with_wide_gaps_are_read_piece_by_piece(monkeypatch):
    monkeypatch.setattr(torch_file, "LIMITS", Limits(spare=2000))
    wide = torch.arange(6000, dtype=torch.int16).reshape(3, 20, 100)
    views = {"a": wide[:, ::9, ::50], "b": wide.permute(2, 0, 1)[::33], "c": wide[:, 3, 5], "d": wide.reshape(-1)[::77]}
    assert_read(saved(views), views)


def test_describing_needs_no_numpy(tmp_path):
    (tmp_path / "x.pt").write_bytes(saved({"a": VALUES.T, "n": np.float32(1), "s": np.ones(3)}))
    code = "import sys, lora_convert; print(lora_convert.identify('x.pt').tensors, {'numpy', 'torch'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.stdout.split() == [b"2", b"set()"], done.stderr


def test_nothing_in_the_package_unpickles():
    for path in (ROOT / "lora_convert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "_pickle", "dill", "joblib", "shelve", "marshal"} & set(modules), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path


# the corpus


corpus = [
    pytest.mark.corpus,
    pytest.mark.skipif(not CORPUS.is_dir(), reason="the shared corpus is not beside this checkout"),
]
EMBEDDINGS = sorted(
    path
    for pattern in ("*.pt", "*.bin", "*.optim")
    for path in CORPUS.glob(f"embeddings/*/**/{pattern}")
    if path.parent.name != "odd_safetensors_named_pt"
)


class TestCorpus:
    pytestmark = corpus

    @pytest.mark.parametrize("path", EMBEDDINGS, ids=lambda path: path.parent.name)
    def test_embeddings_have_torchs_values(self, path):
        value = torch.load(path, weights_only=False)
        expected = dict(flattened("", value))
        assert_read(path.read_bytes(), expected)

    @pytest.mark.parametrize("part", ["pt", "text_encoder.pt"])
    def test_a_list_of_matrices_has_the_trainers_deltas(self, part, tmp_path):
        from test_convert import Deltas

        sys.path.insert(0, str(CORPUS / "lora"))
        import refdelta

        source = CORPUS / "lora" / f"simo_sd15_pt.{part}"
        result = lora_convert.convert(source, tmp_path / "o.safetensors")
        assert result.ok, result.findings
        component = "text_encoder" if "text" in part else "unet"
        truth = refdelta.reference(str(CORPUS / "lora" / "simo_sd15_pt.delta.safetensors"))
        truth = {name.removesuffix(".weight"): entry for name, entry in truth.items() if "@" not in name}
        mine = {name: entry for name, entry in truth.items() if name.split(".")[0] == component}
        ours = Deltas(result.outputs[0].path, "sd15")
        assert len(mine) >= 4 and len(result.plan.steps) == (48 if component == "text_encoder" else 144)
        for name, entry in mine.items():
            assert refdelta.compare(entry, torch.from_numpy(np.ascontiguousarray(ours[name]))) <= 1e-5, name
        found = lora_convert.identify(source)
        assert (found.family, found.trainer, found.findings) == ("sd15", "cloneofsimo", ())


def flattened(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield name or "tensor", value
    elif isinstance(value, dict | torch.nn.ParameterDict):
        for key, child in value.items():
            yield from flattened(f"{name}.{key}".lstrip(".") if name else str(key), child)
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from flattened(f"{name}.{index}" if name else str(index), child)

"""The files that the fuzzers begin with: `python -m fuzz.seeds FOLDER` writes a folder of them for each target."""

from __future__ import annotations

import argparse
import base64
import io
import json
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from fuzz.forms import (
    FORMS,
    Form,
    archive,
    compressed_text_chunk,
    container,
    hidden,
    hidden_bytes,
    legacy,
    raw,
    text_chunk,
    with_checksums,
)

__all__ = ["seeds"]

_BAD = Path(__file__).parent.parent / "fixtures" / "bad"
_MOST = 6_000  # bytes: short inputs are tried more often

_ODD = [
    "-0",
    "1e2",
    "1e400",
    "18446744073709551616",
    "null",
    "[[]]",
    '{"a":{}}',
    '"\\ud83d\\ude00"',
    '"\\ud800"',
    "NaN",
]
_WIDTH = 64
"""Of tiny-sd15's text encoder, so that small files are of a known family."""


def _headers() -> Iterator[tuple[Form, bytes]]:
    half, module = np.ones((1, _WIDTH), np.float16), "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    small = {f"{module}.lora_down.weight": half, f"{module}.lora_up.weight": half.T.copy()}
    small[f"{module}.alpha"] = np.full((), 0.5, np.float16)
    whole = [save(small, {"ss_network_module": "networks.lora", "ss_v2": "False"}), save({"<é>": half})]
    whole.append(save({"clip_l": np.ones((1, 32), "f4"), "clip_g": np.ones((1, 64), "f4")}, {"name": "é"}))
    whole.append(save({dtype: np.zeros((0, 2), dtype) for dtype in ("f8", "i8", "u1", "?", "i4", "u2")}))
    for data in whole:
        yield raw, data
        end = 8 + struct.unpack("<Q", data[:8])[0]
        yield container, struct.pack("<H", len(data) - end) + data[8:end]
    for value in _ODD:
        entry = {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], "x": 0}}
        yield container, struct.pack("<H", 2) + json.dumps(entry).replace("0}", f"{value}}}").encode()


def _values() -> Iterator[Any]:
    """What is found in PyTorch's files."""
    values = torch.arange(_WIDTH, dtype=torch.float32)
    tensor, vector = values.reshape(4, 16), values.reshape(1, _WIDTH)
    yield {"a": tensor, "t": tensor.T, "s": tensor[:, ::3], "n": tensor[0, :0], "e": tensor[:1, :1].expand(3, 4)}
    yield {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vector},
        "name": "x",
        "step": 9,
        "sd_checkpoint": None,
    }
    yield {"string_to_param": torch.nn.ParameterDict({"<é>": torch.nn.Parameter(vector)}), "step": np.int64(3)}
    yield OrderedDict(state_dict={"a.weight": tensor}, optimizer_states=[{"m": tensor}], epoch=1.5)
    yield [tensor.T.contiguous(), tensor]
    yield {"emb_params": vector.half()}
    yield {"s": {1, 2}, "z": tensor.shape, "d": torch.float16, "c": torch.device("cpu"), "b": b"\0\xff", "l": 1 << 70}
    yield {"np": np.arange(6, dtype=np.float32).reshape(2, 3).T, "half": np.float16(1), "a": tensor.bfloat16()}
    yield {"a": tensor.to(torch.float8_e4m3fn), "b": tensor.to(torch.uint16)}


def _pickles() -> Iterator[tuple[Form, bytes]]:
    for number, value in enumerate(_values()):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(value, file, pickle_protocol=2 + number % 4, _use_new_zipfile_serialization=zipped)
            yield raw, file.getvalue()
        yield from ((form, _program(value, 2 + number % 4)) for form in (archive, legacy))
    for protocol in range(2, 6):
        arrays = {
            "a": np.ones((2, 3)),
            "f": np.asfortranarray(np.ones((2, 3), "i2")),
            "s": np.float64(2),
            "t": (1, [2.5]),
        }
        yield raw, pickle.dumps(arrays, protocol)


class _Pickler(pickle.Pickler):
    """Writes storages as torch.save does, all of them as the one that the composed files have."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.UntypedStorage | torch.storage.TypedStorage):
            return ("storage", torch.FloatStorage, "0", "cpu", _WIDTH)
        return None


def _program(value: Any, protocol: int) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol).dump(value)
    return file.getvalue()


def _pictures() -> Iterator[tuple[Form, bytes]]:
    embedding = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": {"TORCHTENSOR": [[*range(_WIDTH)], [-0.001, 0.25] * (_WIDTH // 2)]}},
        "name": "é",
        "step": 60,
        "sd_checkpoint": None,
    }
    text = json.dumps(embedding).encode()
    for value in _ODD:
        yield text_chunk, text.replace(b"60", value.encode())
        yield hidden, text.replace(b"0.25", value.encode(), 1)
    made = (text_chunk, text), (compressed_text_chunk, base64.b64encode(text)), (hidden, text)
    yield from made
    yield hidden_bytes, zlib.compress(text) + bytes(9)
    for form, content in made:
        yield raw, form(content)
        yield with_checksums, form(content)
    yield from ((raw, data) for data in _others(hidden(text)))


def _others(png: bytes) -> Iterator[bytes]:
    """The same picture in other formats."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        for options in ({"lossless": True, "exact": True}, {"quality": 50}, {"lossless": True, "exif": b"Exif\0\0x"}):
            file = io.BytesIO()
            image.save(file, "WEBP", **options)
            yield file.getvalue()
        for mode in ("L", "P", "RGBA", "1"):
            file = io.BytesIO()
            image.convert(mode).save(file, "PNG")
            yield file.getvalue()


def seeds(target: str) -> list[bytes]:
    """What the fuzzer of a target begins with; the first byte of each chooses its form."""
    made = {"headers": _headers, "pickles": _pickles, "pictures": _pictures}[target]()
    ours = [bytes((FORMS[target].index(form),)) + data for form, data in made]
    bad = [b"\0" + path.read_bytes() for path in sorted(_BAD.glob("*.safetensors"))]
    return [data for data in (*ours, *bad) if len(data) <= _MOST]


def main() -> None:
    """Write the seeds of all targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for target in FORMS:
        (folder / target).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(seeds(target)):
            (folder / target / f"seed-{number:03}").write_bytes(data)


if __name__ == "__main__":
    main()

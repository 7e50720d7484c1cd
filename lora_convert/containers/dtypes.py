"""The dtypes that safetensors defines, and how their bytes become numbers.

Scalars (alphas) are decoded with the standard library, so that inspecting needs no numpy; arrays need numpy, and
ml_dtypes for bfloat16 and the 8-bit floats.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
        "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
        "C64": 64, "F64": 64, "I64": 64, "U64": 64,
    }
)  # fmt: skip
"""Bits of one element, for every dtype that the reference reader knows (safetensors 0.8)."""

_NUMPY: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4",
        "I64": "<i8", "U64": "<u8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
    }
)  # fmt: skip

_ML_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    }
)  # fmt: skip

_STRUCT: Mapping[str, str] = MappingProxyType(
    {
        "U8": "B", "I8": "b", "I16": "<h", "U16": "<H", "F16": "<e", "I32": "<i", "U32": "<I", "F32": "<f",
        "F64": "<d", "I64": "<q", "U64": "<Q",
    }
)  # fmt: skip

KEPT_AS: Mapping[str, str] = MappingProxyType({"F8_E4M3": "F16", "F8_E5M2": "F16", "F64": "F32"})
"""Dtypes of weights that no pipeline computes in, and what they become in an output (F8 fits F16 exactly)."""

WEIGHTS: frozenset[str] = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"})
"""Dtypes that adapters are stored in and that this package converts."""


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; only for dtypes and shapes that a header check has accepted."""
    elements = 1
    for size in shape:
        elements *= size
    return elements * BITS[dtype] // 8


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of a safetensors dtype. Raises KeyError for packed ones (F4, F6)."""
    import numpy as np

    if dtype in _NUMPY:
        return np.dtype(_NUMPY[dtype])
    import ml_dtypes

    scalar: type[Any] = getattr(ml_dtypes, _ML_DTYPES[dtype])
    return np.dtype(scalar)


def to_array(data: bytes | bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Bytes as an array without a copy (read-only if the bytes are)."""
    import numpy as np

    return np.frombuffer(data, dtype=numpy_dtype(dtype)).reshape(shape)


def to_scalar(data: bytes, dtype: str) -> float:
    """The value of a one-element tensor. Raises KeyError for dtypes that hold no plain number."""
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if dtype in _STRUCT:
        return float(struct.unpack(_STRUCT[dtype], data)[0])
    if dtype == "C64":
        raise KeyError(dtype)
    return float(to_array(data, dtype, ())[()])

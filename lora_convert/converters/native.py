"""peft's native forms: an adapter as peft's own layer of its kind holds it, in peft's own layout, with nothing lost.

A folder per component has `adapter_config.json` and `adapter_model.safetensors`. One configuration serves all modules
in it, so that modules which need different ones go to further folders: `unet`, `unet-2`, … Values are copied where
peft stores what the trainer stored; scales go into the configuration as alphas. Facts about peft are from its
`tuners/<kind>/layer.py` and `config.py`, versions 0.15 to 0.21 (OFT: since 0.18).
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from lora_convert.containers import Source
from lora_convert.containers.dtypes import KEPT_AS, numpy_dtype
from lora_convert.containers.header import Header
from lora_convert.converters.adapters import Array, Dora, Form, form_of, read_adapter, read_matrices
from lora_convert.errors import Unrepresentable
from lora_convert.families import Module
from lora_convert.inspect.detection import AdaptedModule

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "NativeForm",
    "NativeTensor",
    "adapter_config",
    "has_bias",
    "native_form",
    "native_groups",
    "native_path",
    "native_tensors",
    "reads_input",
    "tensor_name",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_FLATTENED = frozenset({"text_encoder"})
"""Components whose class is `CLIPTextModel`, which has no `text_model.` in its paths since transformers 5.6."""

_WITHOUT_BIAS = frozenset({"to_q", "to_k", "to_v", "text_projection"})
"""Last parts of the paths of matrices that have no bias, in every family."""


@dataclass(frozen=True, slots=True)
class NativeTensor:
    """One tensor of a module: what its name ends with in peft's files, its safetensors dtype, its shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class NativeForm:
    """How peft holds one module.

    `rank` and `alpha` are the configuration's for this module (0 and 0.0 where its kind has none), so that alpha/rank
    is the adapter's own scale. `settings` are flags of the configuration, each with the values under which peft builds
    the layer with exactly these tensors; a flag that makes no difference to this module is not among them. `on_input`
    says that its (IA)³ scales inputs (`feedforward_modules`).
    """

    peft_type: str
    tensors: tuple[NativeTensor, ...]
    rank: int = 0
    alpha: float = 0.0
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    on_input: bool = False


@dataclass(frozen=True)
class _Place:
    """One target of an adapted module, with what is known of it before values are read."""

    module: AdaptedModule
    target: Module
    header: Header
    dtype: str | None
    on_input: bool | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """The block of rows that the target takes in the whole weight that the module's tensors change."""
        start = sum(other.shape[0] for other in self.module.modules[: self.module.modules.index(self.target)])
        return start, start + self.target.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.target.shape[2:]

    @property
    def windowed(self) -> bool:
        """Whether it is a convolution that sees more than one pixel."""
        return math.prod(self.kernel) > 1

    def shape(self, part: str) -> tuple[int, ...]:
        return self.header.tensors[self.module.tensors[part]].shape

    def kept(self, *parts: str) -> str:
        """The output's dtype of what is made of these fields: their own, or one that holds all of them."""
        if self.dtype:
            return self.dtype
        stored = {self.header.tensors[self.module.tensors[part]].dtype for part in parts}
        found = {KEPT_AS.get(dtype, dtype) for dtype in stored}
        return found.pop() if len(found) == 1 else "F32"

    def alpha(self, rank: int) -> float:
        """The alpha that makes alpha/rank the module's scale; as stored where it does."""
        scale = 1.0 if self.module.scale is None else self.module.scale
        stored = self.module.alpha
        return stored if stored is not None and stored / rank == scale else scale * rank


def _positive(rank: int) -> int:
    if rank < 1:
        raise Unrepresentable("its rank is 0, and peft has no such layer")
    return rank


# LoRA and DoRA


def _is_plain(module: AdaptedModule) -> bool:
    """Whether its matrices are those of peft's LoRA as they are stored."""
    return module.algorithm in ("lora", "lora+dora") and "mid" not in module.tensors


def _matrices(module: AdaptedModule) -> list[str]:
    return [part for part in module.tensors if part not in ("alpha", "scalar", "dora_scale", "magnitude")]


def _product(place: _Place) -> Form:
    """What is known of an adapter that is one product of two factors. Raises Unrepresentable for any other."""
    module = place.module
    found = form_of(module, place.header)
    if "dora" in module.algorithm and not found.magnitude:
        raise Unrepresentable("its magnitudes are per input, and peft's DoRA has them per output")
    if found.needs_base:
        raise Unrepresentable(_REASONS.get(module.algorithm, "what it changes depends on the base model's weights"))
    if found.rank is None or not found.weight:
        raise Unrepresentable("what it changes is no product of two factors")
    if found.magnitude and found.bias:
        raise Unrepresentable("peft has no DoRA that changes a bias")
    return found


def _lora(place: _Place) -> NativeForm:
    """LoRA, DoRA per output over what is a LoRA, and whatever else is one product of two factors."""
    found = _product(place)
    assert found.rank is not None
    rank, module = _positive(found.rank), place.module
    out, columns, *kernel = place.target.shape
    ones, plain, matrices = (1,) * len(kernel), _is_plain(module), _matrices(module)
    tensors = [
        NativeTensor("lora_A.weight", place.kept(*(["down"] if plain else matrices)), (rank, columns, *kernel)),
        NativeTensor("lora_B.weight", place.kept(*(["up"] if plain else matrices)), (out, rank, *ones)),
    ]
    if found.bias:
        tensors.append(NativeTensor("lora_B.bias", place.kept(*(["up_bias"] if plain else matrices)), (out,)))
    if found.magnitude:
        stored = place.kept("dora_scale" if "dora_scale" in module.tensors else "magnitude")
        tensors.append(NativeTensor("lora_magnitude_vector", stored, (1, out, *ones) if ones else (out,)))
    settings = {"use_dora": (found.magnitude,), "lora_bias": (found.bias,)}
    alpha = place.alpha(rank)
    if alpha == 0.0 and found.bias and not plain:
        alpha = float(rank)  # the bias is another adapter's, which no alpha of this one may extinguish
    return NativeForm("LORA", tuple(tensors), rank, alpha, settings)


def _lora_values(source: Source, place: _Place, form: NativeForm) -> dict[str, Array]:
    adapter, (start, stop) = read_adapter(source, place.module), place.rows
    values: dict[str, Array] = {}
    if isinstance(adapter, Dora):
        values["lora_magnitude_vector"] = adapter.magnitude[start:stop]
        adapter = adapter.inner
    lora = adapter.to_lora().rows(start, stop)  # in this order: a part's own rank may be less than the form's
    scale = form.alpha / form.rank
    factor = lora.scale / scale if scale else 1.0
    same = math.isclose(factor, 1.0, rel_tol=1e-12)  # a quotient: values are not touched for its last bit
    values |= {"lora_A.weight": lora.down, "lora_B.weight": lora.up if same else lora.up.astype(np.float64) * factor}
    if "up_bias" in place.module.tensors and _is_plain(place.module):
        values["lora_B.bias"] = source.read(place.module.tensors["up_bias"])[start:stop]
    elif lora.bias is not None:
        values["lora_B.bias"] = lora.bias.astype(np.float64) / scale
    return values


# LoHa


def _loha(place: _Place) -> NativeForm:
    """LoHa: four factors, and on k×k convolutions perhaps two Tucker cores (`use_effective_conv2d`)."""
    out, columns, *_ = place.target.shape
    tucker = "t1" in place.module.tensors
    rank, other = place.shape("w1_b")[0], place.shape("w2_b")[0]
    if rank != other:
        raise Unrepresentable(f"its two products have the ranks {rank} and {other}, and peft's LoHa has one for both")
    _positive(rank)
    cores = [place.shape(part) for part in ("t1", "t2") if part in place.module.tensors]
    if cores and (not place.windowed or cores != [(rank, rank, *place.kernel)] * 2):
        raise Unrepresentable(
            "peft's LoHa has Tucker cores only on convolutions of more than one pixel, of rank × rank each"
        )
    left = (rank, out) if tucker else (out, rank)
    right = (rank, columns) if tucker else (rank, columns * math.prod(place.kernel))
    shapes: dict[str, tuple[int, ...]] = {"w1_a": left, "w1_b": right, "w2_a": left, "w2_b": right}
    shapes |= dict.fromkeys(("t1", "t2") if tucker else (), (rank, rank, *place.kernel))
    tensors = tuple(NativeTensor(f"hada_{part}", place.kept(part), shape) for part, shape in shapes.items())
    settings = {"use_effective_conv2d": (tucker,)} if place.windowed else {}
    return NativeForm("LOHA", tensors, rank, place.alpha(rank), settings)


def _loha_values(source: Source, place: _Place, form: NativeForm) -> dict[str, Array]:
    values = read_matrices(source, place.module)
    start, stop = place.rows
    for part in ("w1_a", "w2_a"):
        values[part] = values[part][:, start:stop] if "t1" in values else values[part][start:stop]
    return {f"hada_{part}": array for part, array in values.items()}


# LoKr


@lru_cache(maxsize=256)
def _divisors(number: int) -> tuple[int, ...]:
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return tuple(sorted({*low, *(number // divisor for divisor in low)}))


def _factorised(number: int, factor: int) -> tuple[int, int]:
    """The two factors into which peft splits a size for a `decompose_factor` (peft `tuners/lokr/layer.py`).

    A factor that divides it is the first of them; any other gives the greatest divisor up to it and up to the first
    one that is not less than its own cofactor, the lesser of the pair first.
    """
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    divisors = _divisors(number)
    last = next(place for place, divisor in enumerate(divisors) if divisor * divisor >= number)
    fitting = len(divisors) if factor < 0 else bisect_right(divisors, factor)
    divisor = divisors[min(last, fitting - 1)]
    return min(divisor, number // divisor), max(divisor, number // divisor)


@lru_cache(maxsize=4096)
def _decompose_factors(out: int, columns: int, first: tuple[int, int]) -> tuple[int, ...]:
    """Every `decompose_factor` under which peft gives the first Kronecker factor this shape, -1 first."""
    return tuple(
        factor
        for factor in (-1, *range(1, max(out, columns) + 1))
        if (_factorised(out, factor)[0], _factorised(columns, factor)[0]) == first
    )


def _lokr_sides(place: _Place) -> tuple[tuple[int, int], tuple[int, int], set[int]]:
    """Rows and columns of both Kronecker factors for this target, kernels apart, and the ranks of their products."""
    tensors = place.module.tensors
    if "w1" in tensors:
        (rows_1, columns_1), ranks = place.shape("w1")[:2], set()
    else:
        rows_1, columns_1, ranks = place.shape("w1_a")[0], place.shape("w1_b")[1], {place.shape("w1_b")[0]}
    if "w2" in tensors:
        rows_2, columns_2 = place.shape("w2")[:2]
    else:
        factor, core = place.shape("w2_a"), "t2" in tensors
        rows_2, ranks = factor[1] if core else factor[0], ranks | {place.shape("w2_b")[0]}
        columns_2 = place.target.shape[1] // columns_1
    start, stop = place.rows
    if start % rows_2 or stop % rows_2:
        raise Unrepresentable(f"its Kronecker blocks of {rows_2} rows do not end where the fused weight's parts do")
    if len(place.module.modules) > 1:
        rows_1 = (stop - start) // rows_2
    return (rows_1, columns_1), (rows_2, columns_2), ranks


def _lokr(place: _Place) -> NativeForm:
    """LoKr, each factor whole or a product, the second one perhaps with a Tucker core (`use_effective_conv2d`).

    peft decides by the rank r which factors are whole: the second from r ≥ half of its longer side on, the first
    likewise or without `decompose_both`. Two whole factors have no rank of their own, so that any large one will do.
    """
    tensors = place.module.tensors
    if "t1" in tensors:
        raise Unrepresentable("peft's LoKr has no Tucker core in its first factor")
    out, columns, *_ = place.target.shape
    first, second, ranks = _lokr_sides(place)
    if len(ranks) > 1:
        raise Unrepresentable(
            f"its factors have the ranks {' and '.join(map(str, sorted(ranks)))}, and peft's LoKr has one"
        )
    rank = _positive(ranks.pop()) if ranks else -(-max(*first, *second) // 2)
    factors = _decompose_factors(out, columns, first)
    if not factors or first[0] * second[0] != out or first[1] * second[1] != columns:
        blocks = f"{first[0]}×{first[1]} blocks of {second[0]}×{second[1]}"
        raise Unrepresentable(f"peft splits {out}×{columns} into {blocks} under no decompose_factor")
    whole_1, whole_2 = rank >= max(first) / 2, rank >= max(second) / 2
    if ("w2" in tensors) != whole_2 or ("w1" not in tensors and whole_1):
        raise Unrepresentable(f"at rank {rank} peft stores other factors of it as products than the file does")
    shapes = _lokr_shapes(place, first, second, rank)
    settings: dict[str, tuple[Any, ...]] = {"decompose_factor": factors}
    if not whole_1:
        settings["decompose_both"] = ("w1" not in tensors,)
    if place.windowed and not whole_2:
        settings["use_effective_conv2d"] = ("t2" in tensors,)
    native = tuple(NativeTensor(f"lokr_{part}", place.kept(part), shape) for part, shape in shapes.items())
    return NativeForm("LOKR", native, rank, place.alpha(rank), settings)


def _lokr_shapes(
    place: _Place, first: tuple[int, int], second: tuple[int, int], rank: int
) -> dict[str, tuple[int, ...]]:
    tensors, shapes = place.module.tensors, dict[str, tuple[int, ...]]()
    shapes |= {"w1": first} if "w1" in tensors else {"w1_a": (first[0], rank), "w1_b": (rank, first[1])}
    if "w2" in tensors:
        return shapes | {"w2": (*second, *place.kernel)}
    if "t2" in tensors:
        if not place.windowed or place.shape("t2") != (rank, rank, *place.kernel):
            raise Unrepresentable(
                "peft's LoKr has Tucker cores only on convolutions of more than one pixel, of rank × rank"
            )
        return shapes | {"w2_a": (rank, second[0]), "w2_b": (rank, second[1]), "t2": place.shape("t2")}
    return shapes | {"w2_a": (second[0], rank), "w2_b": (rank, second[1] * math.prod(place.kernel))}


def _lokr_values(source: Source, place: _Place, form: NativeForm) -> dict[str, Array]:
    values = read_matrices(source, place.module)
    if len(place.module.modules) > 1:
        _, (rows_2, _), _ = _lokr_sides(place)
        start, stop = (row // rows_2 for row in place.rows)
        part = "w1" if "w1" in values else "w1_a"
        values[part] = values[part][start:stop]
    return {f"lokr_{part}": array for part, array in values.items()}


# (IA)³


def has_bias(target: Module) -> bool:
    """Whether a linear layer or convolution of a base model has a bias."""
    return target.path.rpartition(".")[2] not in _WITHOUT_BIAS


def reads_input(source: Source, module: AdaptedModule) -> bool | None:
    """The value of (IA)³'s flag `on_input`; None for a module that has none."""
    name = module.tensors.get("on_input")
    return None if name is None else source.read_scalar(name) != 0.0


def _scales_input(place: _Place) -> bool:
    """Whether its factors are the inputs'. peft's own tensors tell by their shapes, but for square convolutions."""
    columns, height = place.target.shape[1], sum(target.shape[0] for target in place.module.modules)
    if "factors" in place.module.tensors:
        shape = place.shape("factors")
        if len(shape) == 4 and columns == height:
            raise Unrepresentable("peft's (IA)³ does not say whether it scales this convolution's inputs or outputs")
        return shape[0] == 1 and shape[1] == columns
    if place.on_input is None and columns == height:
        raise ValueError(f"{place.target.name} is square: its shapes do not tell what its factors are for")
    return math.prod(place.shape("weight")) == columns if place.on_input is None else place.on_input


def _ia3(place: _Place) -> NativeForm:
    """(IA)³: one factor per input or output; peft stores the factor, LyCORIS its difference from 1.

    From LyCORIS always in float32, because 1 + a small number has few digits left in half precision.
    """
    target, on_input = place.target, _scales_input(place)
    dtype = place.kept("factors") if "factors" in place.module.tensors else "F32"
    if "weight" in place.module.tensors and not on_input and has_bias(target):
        raise Unrepresentable("peft's (IA)³ on outputs scales the bias too, and LyCORIS leaves it as it is")
    count, ones = target.shape[1 if on_input else 0], (1,) * len(place.kernel)
    shape = (1, count, *ones) if ones or on_input else (count, 1)
    return NativeForm("IA3", (NativeTensor("ia3_l", dtype, shape),), on_input=on_input)


def _ia3_values(source: Source, place: _Place, form: NativeForm) -> dict[str, Array]:
    tensors = place.module.tensors
    factors = source.read(tensors["factors" if "factors" in tensors else "weight"]).reshape(-1)
    if not form.on_input:
        start, stop = place.rows
        factors = factors[start:stop]
    return {"ia3_l": factors if "factors" in tensors else 1.0 + factors.astype(np.float64)}


# OFT


def _block_sizes(columns: int, block: int) -> tuple[int, ...]:
    """Every `oft_block_size` that peft makes this block of, the block itself first.

    What does not divide the columns becomes the nearest divisor, of two the lesser (peft `adjust_oft_parameters`).
    """
    divisors = _divisors(columns)

    def adjusted(size: int) -> int:
        above = divisors[bisect_left(divisors, size)]
        below = divisors[bisect_right(divisors, size) - 1]
        return below if size - below <= above - size else above

    place = divisors.index(block)
    around = range(divisors[max(place - 1, 0)] + 1, divisors[min(place + 1, len(divisors) - 1)])
    return block, *(size for size in around if size != block and adjusted(size) == block)


def _oft(place: _Place) -> NativeForm:
    """OneTrainer's OFT_2, which rotates inputs as peft does: upper triangles of skew matrices Q, one per block.

    Both take the first terms of the Cayley transform's Neumann series for R (`use_cayley_neumann`, 5 terms).
    """
    if "rotation" not in place.module.tensors:
        raise Unrepresentable(_REASONS["oft"])
    if place.windowed:
        raise Unrepresentable(
            "peft's OFT of a k×k convolution sums overlapping patches, which is no change of the weight"
        )
    rows, entries = place.shape("rotation")
    block = (1 + math.isqrt(1 + 8 * entries)) // 2
    columns = place.target.shape[1]
    if entries < 1 or block * (block - 1) != 2 * entries or columns % block or rows not in (1, columns // block):
        raise Unrepresentable(f"its {rows}×{entries} triangles do not make blocks of {columns} inputs")
    settings: dict[str, tuple[Any, ...]] = {"oft_block_size": _block_sizes(columns, block)}
    if columns > block:
        settings["block_share"] = (rows == 1,)
    tensor = NativeTensor("oft_R.weight", place.kept("rotation"), (rows, entries))
    return NativeForm("OFT", (tensor,), settings=settings)


def _oft_values(source: Source, place: _Place, form: NativeForm) -> dict[str, Array]:
    """Of a convolution OneTrainer multiplies the weight by R, not by Rᵀ, which is R of the triangles' negative."""
    triangles = source.read(place.module.tensors["rotation"])
    turned = len(place.target.shape) == 4 and place.module.spelling != "peft"
    return {"oft_R.weight": -triangles if turned else triangles}


# The registry


@dataclass(frozen=True, slots=True)
class _Kind:
    """A row: how peft's layer of a kind is described and filled, what its configuration says besides, and under which
    name it has an alpha.
    """

    form: Callable[[_Place], NativeForm]
    values: Callable[[Source, _Place, NativeForm], dict[str, Array]]
    defaults: Mapping[str, Any]
    alpha: str = ""


_OFT_DEFAULTS: Mapping[str, Any] = {
    "r": 0,
    "bias": "none",
    "coft": False,
    "block_share": False,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "peft_version": "0.18.0",
}
"""The series was another one before 0.18, and peft warns of files that do not say that they are newer."""

_LOKR_DEFAULTS: Mapping[str, Any] = {
    "use_effective_conv2d": False,
    "decompose_both": False,
    "decompose_factor": -1,
}

_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "LORA": _Kind(_lora, _lora_values, {"bias": "none", "use_dora": False, "lora_bias": False}, "lora_alpha"),
        "LOHA": _Kind(_loha, _loha_values, {"use_effective_conv2d": False}, "alpha"),
        "LOKR": _Kind(_lokr, _lokr_values, _LOKR_DEFAULTS, "alpha"),
        "IA3": _Kind(_ia3, _ia3_values, {}),
        "OFT": _Kind(_oft, _oft_values, _OFT_DEFAULTS),
    }
)

_PEFT_TYPES: Mapping[str, str] = {"loha": "LOHA", "lokr": "LOKR", "ia3": "IA3", "oft": "OFT"}
"""Algorithms that have a layer of their own in peft; any other must be a LoRA by its algebra."""

_REASONS: Mapping[str, str] = {
    "oft": "it rotates outputs, and peft's OFT rotates inputs",
    "boft": "it rotates outputs, and peft's BOFT rotates inputs",
    "glora": "it multiplies the base model's weight by matrices, which peft's GLoRA does entry by entry",
    "full": "it is a whole difference of the weight, and peft has no such adapter",
    "norm": "it changes a norm, and peft's adapters change matrices",
}


def _kind(module: AdaptedModule) -> str:
    if len(module.modules[0].shape) < 2:
        raise Unrepresentable(_REASONS["norm"])
    if module.modules[0].mark == "embedding":
        raise Unrepresentable("it changes an embedding table, which is no matrix of a layer")
    if module.algorithm in ("boft", "full", "norm"):
        raise Unrepresentable(_REASONS[module.algorithm])
    return _PEFT_TYPES.get(module.algorithm, "LORA")


def native_form(
    module: AdaptedModule,
    header: Header,
    dtype: str | None = None,
    *,
    target: Module | None = None,
    on_input: bool | None = None,
) -> NativeForm:
    """How peft holds one target of an adapted module (the only one if none is named), from names and shapes.

    `dtype` is a safetensors dtype for the output ("F16"); the source's own by default. `on_input` is what
    `reads_input` says; without it a square weight's (IA)³ is ambiguous, which raises ValueError. Raises
    Unrepresentable, saying why, where peft's layer of that kind cannot hold it.
    """
    place = _Place(module, target or module.modules[0], header, dtype, on_input)
    return _KINDS[_kind(module)].form(place)


def native_tensors(
    source: Source, module: AdaptedModule, form: NativeForm, target: Module | None = None
) -> Mapping[str, Array]:
    """The values by suffix, in the form's dtypes and shapes; what does not fit a dtype becomes infinite."""
    place = _Place(module, target or module.modules[0], source.header, None)
    values = _KINDS[form.peft_type].values(source, place, form)
    with np.errstate(over="ignore"):
        return {
            tensor.suffix: values[tensor.suffix].reshape(tensor.shape).astype(numpy_dtype(tensor.dtype), copy=False)
            for tensor in form.tensors
        }


# Folders and their configurations


def native_path(target: Module) -> str:
    """The path of a module in the live model, by which peft's files call it.

    As in transformers 5.6 and later, where `CLIPTextModel` has lost its `text_model.` (and the class with a projection
    has kept it); plain peft on an older one needs `key_mapping`, `load_native` does not.
    """
    return target.path.removeprefix("text_model.") if target.component in _FLATTENED else target.path


def tensor_name(target: Module, suffix: str) -> str:
    """A tensor's name in `adapter_model.safetensors`."""
    return f"base_model.model.{native_path(target)}.{suffix}"


def _agreed(first: Mapping[str, tuple[Any, ...]], second: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """The values of every flag that do for both, in the first one's order."""
    common = {**first, **second}
    for flag in first.keys() & second.keys():
        allowed = frozenset(second[flag])
        common[flag] = tuple(value for value in first[flag] if value in allowed)
    return common


@dataclass
class _Group:
    peft_type: str
    settings: Mapping[str, tuple[Any, ...]]
    names: list[str]


def native_groups(forms: Mapping[str, NativeForm]) -> dict[str, tuple[str, ...]]:
    """Folder -> the modules that share its configuration, given forms by canonical name (`unet.conv_in`).

    The largest group of a component is in the folder of its name, the next one in `<component>-2`, and so on.
    """
    groups: dict[str, list[_Group]] = {}
    for name in sorted(forms):
        form = forms[name]
        members = groups.setdefault(name.partition(".")[0], [])
        for group in members:
            agreed = _agreed(group.settings, form.settings)
            if group.peft_type == form.peft_type and all(agreed.values()):
                group.names.append(name)
                group.settings = agreed
                break
        else:
            members.append(_Group(form.peft_type, form.settings, [name]))
    return {
        component if number == 1 else f"{component}-{number}": tuple(group.names)
        for component, members in groups.items()
        for number, group in enumerate(sorted(members, key=lambda group: (-len(group.names), group.names[0])), 1)
    }


def _pattern(target: Module) -> str:
    """A module's name in the configuration, which peft matches with paths' ends, or from `^` on with whole paths.

    Text encoders without `text_model.` and unanchored, so that it fits every version of transformers.
    """
    return f"^{target.path}" if target.component == "unet" else target.path.removeprefix("text_model.")


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def adapter_config(members: Sequence[tuple[Module, NativeForm]]) -> str:
    """The text of `adapter_config.json` for the modules of one of `native_groups`' folders.

    Only fields that every peft since 0.15 knows (OFT: since 0.18). Raises ValueError for modules that need different
    configurations.
    """
    peft_type = members[0][1].peft_type
    settings: dict[str, tuple[Any, ...]] = {}
    for _, form in members:
        settings = _agreed(settings, form.settings)
    if not all(settings.values()) or any(form.peft_type != peft_type for _, form in members):
        raise ValueError("the modules need different configurations")
    kind = _KINDS[peft_type]
    content: dict[str, Any] = {"peft_type": peft_type, "task_type": None, "base_model_name_or_path": None}
    content |= {"inference_mode": True, "target_modules": [_pattern(target).removeprefix("^") for target, _ in members]}
    content |= kind.defaults
    content |= {flag: values[0] for flag, values in settings.items()}
    if kind.alpha:
        content |= _ranks(members, kind.alpha)
    if peft_type == "IA3":
        feeding = [target for target, form in members if form.on_input]
        content["feedforward_modules"] = [_pattern(target).removeprefix("^") for target in feeding]
    return json.dumps(content, indent=2, sort_keys=True)


def _ranks(members: Sequence[tuple[Module, NativeForm]], alpha: str) -> dict[str, Any]:
    """The most frequent rank and alpha, of equals the smallest, and the modules that have others."""
    ranks, alphas = Counter(form.rank for _, form in members), Counter(form.alpha for _, form in members)
    rank = min(ranks, key=lambda value: (-ranks[value], value))
    common = min(alphas, key=lambda value: (-alphas[value], value))
    return {
        "r": rank,
        alpha: _number(common),
        "rank_pattern": {_pattern(target): form.rank for target, form in members if form.rank != rank},
        "alpha_pattern": {_pattern(target): _number(form.alpha) for target, form in members if form.alpha != common},
    }

"""The registry of algorithms: what each is called, how it is read from a file, and what it can become.

An adapter gives the weight change that its trainer defines; `form_of` says from names and shapes alone what can be
done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lora_convert.containers import Source
from lora_convert.containers.header import Header
from lora_convert.converters.algorithms.adapter import Adapter, Array, Base, Form, Shape, Shapes, Stored
from lora_convert.converters.algorithms.difference import Difference, Sum, difference_form, read_difference, sum_form
from lora_convert.converters.algorithms.dora import Dora, dora_form, read_dora, taken_apart
from lora_convert.converters.algorithms.glora import Glora, glora_form, read_glora
from lora_convert.converters.algorithms.ia3 import Ia3, ia3_form, read_ia3
from lora_convert.converters.algorithms.loha import Loha, loha_form, read_loha
from lora_convert.converters.algorithms.lokr import Lokr, lokr_form, read_lokr
from lora_convert.converters.algorithms.lora import Lora, lora_form, read_lora
from lora_convert.converters.algorithms.oft import Boft, InputOft, Oft, oft_form, read_boft, read_oft
from lora_convert.converters.algorithms.tlora import Tlora, read_tlora, tlora_form
from lora_convert.errors import BaseNeeded, Unrepresentable
from lora_convert.inspect.detection import AdaptedModule

__all__ = [
    "ALGORITHMS",
    "DORA",
    "KINDS",
    "Adapter",
    "Algorithm",
    "Array",
    "Base",
    "BaseNeeded",
    "Boft",
    "Difference",
    "Dora",
    "Form",
    "Glora",
    "Ia3",
    "InputOft",
    "Kind",
    "Loha",
    "Lokr",
    "Lora",
    "Oft",
    "Stored",
    "Sum",
    "Tlora",
    "Unrepresentable",
    "adapter_of",
    "form_of",
    "read_adapter",
    "read_matrices",
    "taken_apart",
    "weight_shape",
]


@dataclass(frozen=True, slots=True)
class Kind:
    """A row of README's table of kinds: how a kind arrives in a LoRA file (`lora`), what it is as one of peft's own
    (`peft`, empty where it is none), and what its ΔW is compared with (`tested`).
    """

    title: str
    lora: str
    peft: str
    tested: str


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A row of the registry. `read` makes the adapter from stored tensors, `form` says what it can become from their
    shapes and the weight's.
    """

    name: str
    kind: Kind
    read: Callable[[Stored], Adapter]
    form: Callable[[Shapes, Shape], Form]

    @property
    def title(self) -> str:
        """Its name as people write it."""
        return self.kind.title


_LYCORIS = "LyCORIS 4.1.3"
_PEFT = "peft 0.21"
_ROWS = (
    Algorithm(
        "lora",
        Kind("LoRA, LoCon, LoRA-FA, DyLoRA", "exact", "LoRA", f"{_LYCORIS}, {_PEFT}, files of nine trainers"),
        read_lora,
        lora_form,
    ),
    Algorithm(
        "loha",
        Kind("LoHa", "exact, of rank r²", "LoHa", f"{_LYCORIS}, files of {_PEFT} and OneTrainer"),
        read_loha,
        loha_form,
    ),
    Algorithm(
        "lokr",
        Kind(
            "LoKr",
            "exact; truncated if both factors are whole",
            "LoKr, if its factors are of the sizes that peft makes",
            f"{_LYCORIS}, {_PEFT}, a file of ai-toolkit",
        ),
        read_lokr,
        lokr_form,
    ),
    Algorithm(
        "glora",
        Kind("GLoRA", "exact with the base model", "", f"{_LYCORIS}, a file of LyCORIS 1.9"),
        read_glora,
        glora_form,
    ),
    Algorithm("tlora", Kind("T-LoRA", "exact with the base model", "", _LYCORIS), read_tlora, tlora_form),
    Algorithm(
        "ia3",
        Kind(
            "(IA)³",
            "truncated with the base model",
            "(IA)³, on inputs or where there is no bias",
            f"{_LYCORIS}, {_PEFT}, a file of LyCORIS 1.9",
        ),
        read_ia3,
        ia3_form,
    ),
    Algorithm(
        "oft",
        Kind(
            "OFT",
            "truncated with the base model",
            "OFT, what OneTrainer calls OFT_2",
            f"{_LYCORIS}, {_PEFT}, files of Kohya, OneTrainer and LyCORIS 1.9",
        ),
        read_oft,
        oft_form,
    ),
    Algorithm("boft", Kind("BOFT", "truncated with the base model", "", _LYCORIS), read_boft, oft_form),
    Algorithm(
        "full",
        Kind("differences (diff, diff_b)", "truncated; of a bias exact", "", f"{_LYCORIS}, a file of ComfyUI"),
        read_difference,
        difference_form,
    ),
    Algorithm("norm", Kind("norms (w_norm, b_norm)", "merged only", "", _LYCORIS), read_difference, difference_form),
)

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType({row.name: row for row in _ROWS})
"""By the name that detection gives. `dora` is no row: it is a form that any of them can take (`lora+dora`)."""

DORA = (
    Kind(
        "DoRA per output",
        "exact, as DoRA",
        "LoRA with use_dora",
        f"{_LYCORIS}, files of {_PEFT}, diffusers 0.42 and OneTrainer",
    ),
    Kind("DoRA per input", "truncated with the base model", "", _LYCORIS),
)
"""Any algorithm can be normalised so: by a magnitude for every output of the weight, or for every input."""

KINDS = (*(row.kind for row in _ROWS), *DORA)
"""All rows of README's table."""


def read_matrices(source: Source, module: AdaptedModule) -> dict[str, Array]:
    """The module's stored matrices by field, as arrays; without its scalars."""
    return {part: source.read(tensor) for part, tensor in module.tensors.items() if part not in ("alpha", "scalar")}


def weight_shape(module: AdaptedModule) -> Shape:
    """Shape of the whole weight that a module's tensors change: the rows of its targets together."""
    return (sum(target.shape[0] for target in module.modules), *module.modules[0].shape[1:])


def _parts(module: AdaptedModule) -> tuple[list[Algorithm], bool]:
    """The algorithms that are added in one module, and whether they are normalised together (DoRA)."""
    names = module.algorithm.split("+")
    return [ALGORITHMS[name] for name in names if name != "dora"], "dora" in names


def read_adapter(source: Source, module: AdaptedModule) -> Adapter:
    """The adapter of one module with its values read. Raises KeyError for an algorithm that is not in `ALGORITHMS`."""
    return adapter_of(read_matrices(source, module), module)


def adapter_of(tensors: Mapping[str, Array], module: AdaptedModule) -> Adapter:
    """The adapter of one module, from what `read_matrices` read of it."""
    parts, normalised = _parts(module)
    scale = 1.0 if module.scale is None else module.scale
    stored = Stored(tensors, weight_shape(module), scale, module.alpha, module.spelling)
    inner = parts[0].read(stored) if len(parts) == 1 else Sum(tuple(part.read(stored) for part in parts))
    return read_dora(stored, inner) if normalised else inner


def form_of(module: AdaptedModule, header: Header) -> Form:
    """What an adapter can become, from its names and shapes. Raises KeyError as `read_adapter` does."""
    parts, normalised = _parts(module)
    shapes = {field: header.tensors[tensor].shape for field, tensor in module.tensors.items()}
    weight = weight_shape(module)
    forms = tuple(part.form(shapes, weight) for part in parts)
    form = forms[0] if len(forms) == 1 else sum_form(forms)
    return dora_form(shapes, form) if normalised else form

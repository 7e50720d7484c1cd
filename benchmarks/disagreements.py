"""What consumers make of fixtures/tiny/kinds, beside their trainer's forward: the figures of docs/fidelity.md.

`python -m benchmarks.disagreements` from the repository's root. Each figure is ‖ΔW' − ΔW‖/‖ΔW‖ over the modules of one
file: the median and the largest. A row either runs the installed consumer, or, where it says "formula", the trainer's
own module with the one step changed that a consumer does differently.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from training import kinds

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "tiny" / "kinds"
Changes = Mapping[str, torch.Tensor]
_EPSILON = 1e-12


class File:
    """One kind's file, its trainer's modules on a fresh base model, and the changes that they make."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = FOLDER / f"{name}.safetensors"
        self.pipeline = kinds.loaded()
        self.tensors = load_file(self.path)
        self.layers = kinds.layers(self.pipeline)
        self.modules: dict[str, Any] = kinds.read(name, self.path, self.pipeline)
        self.truth = self.changes()

    def changes(self) -> dict[str, torch.Tensor]:
        return {name: kinds.changes(module, self.layers[name])["weight"] for name, module in self.modules.items()}

    def weight(self, name: str) -> torch.Tensor:
        return self.layers[name].weight.detach()

    def inner(self) -> dict[str, torch.Tensor]:
        """ΔW before DoRA's normalisation."""
        for module in self.modules.values():
            module.wd = False
        return self.changes()


def compare(truth: Changes, other: Changes) -> str:
    """Median and largest relative difference over the modules, as text."""
    errors = [
        float((other.get(name, torch.zeros(())) - change).norm() / (change.norm() + _EPSILON))
        for name, change in truth.items()
    ]
    return f"{median(errors):.3g} | {max(errors):.3g}"


def merged_by_lycoris(file: File) -> Changes:
    """LyCORIS' own `get_merged_weight`."""
    with torch.no_grad():
        return {
            name: module.get_merged_weight(1.0, file.weight(name).shape, "cpu")[0] - file.weight(name)
            for name, module in file.modules.items()
        }


def read_back_by_lycoris(file: File) -> Changes:
    """LyCORIS' `make_module` from the file, and its forward."""
    from lycoris.modules import get_module, make_module

    read = {}
    for name in file.modules:
        kind, parameters = get_module(file.tensors, name)
        read[name] = kinds.changes(make_module(kind, parameters, name, file.layers[name]), file.layers[name])["weight"]
    return read


def loaded_by_diffusers(file: File) -> Changes:
    """diffusers' `load_lora_weights` and `fuse_lora`."""
    before = {name: file.weight(name).clone() for name in file.modules}
    file.pipeline.load_lora_weights(str(file.path))
    file.pipeline.fuse_lora(lora_scale=1.0)
    file.pipeline.unload_lora_weights()
    after = kinds.layers(file.pipeline)
    return {name: after[name].weight.detach() - weight for name, weight in before.items()}


def _normalised(file: File, change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Changes:
    inner = file.inner()
    scales = {name: file.tensors[f"{name}.dora_scale"].float() for name in inner}
    return {name: change(file.weight(name), inner[name], scales[name]) for name in inner}


def _length(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))


def by_the_bases_length(file: File) -> Changes:
    """DoRA divided by ‖W‖ instead of ‖W + ΔW‖."""
    return _normalised(file, lambda weight, inner, scale: (weight + inner) * scale / _length(weight) - weight)


def _in_peft(layer: torch.nn.Module, inner: torch.Tensor, scale: torch.Tensor, strength: float) -> torch.nn.Module:
    """The layer inside peft's DoRA. Its first factor is an identity, so that the other one can be any ΔW."""
    from peft import LoraConfig, inject_adapter_in_model

    holder, rank = torch.nn.Module(), inner[0].numel()
    holder.layer = layer
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, use_dora=True, target_modules=["layer"]), holder)
    inside: Any = holder.get_submodule("layer")
    down, up, magnitude = (getattr(inside, name)["default"] for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    down.weight.data = torch.eye(rank).reshape(down.weight.shape)
    up.weight.data = inner.reshape(up.weight.shape)
    magnitude.weight.data = scale.reshape(magnitude.weight.shape)
    inside.set_scale("default", strength)
    return inside.eval()


def dora_by_peft(strength: float) -> Callable[[File], Changes]:
    def at(file: File) -> Changes:
        changed = {}
        for name, inner in file.inner().items():
            inside = _in_peft(file.layers[name], inner, file.tensors[f"{name}.dora_scale"].float(), strength)
            changed[name] = kinds.changes(inside, file.layers[name])["weight"]
        return changed

    return at


def dora_by_lycoris(strength: float) -> Callable[[File], Changes]:
    def at(file: File) -> Changes:
        for module in file.modules.values():
            module.multiplier = strength
        return file.changes()

    return at


def share_of_dora(strength: float) -> Callable[[File], Changes]:
    return lambda file: {name: strength * change for name, change in file.truth.items()}


def times(factor: float) -> Callable[[File], Changes]:
    return lambda file: {name: factor * change for name, change in file.truth.items()}


def alpha_of_two_factors(file: File) -> Changes:
    """The stored alpha multiplies, though both factors are whole."""
    return {name: float(file.tensors[f"{name}.alpha"]) * change for name, change in file.truth.items()}


def unscaled_constraint(file: File) -> Changes:
    """Alpha as the limit itself, not times the rows."""
    for name, module in file.modules.items():
        module.constraint = float(file.tensors[f"{name}.alpha"])
    return file.changes()


def without_rescale(file: File) -> Changes:
    for module in file.modules.values():
        module.rescaled = False
    return file.changes()


def additive_part(file: File) -> Changes:
    """GLoRA without a1·a2."""
    for module in file.modules.values():
        module.a1.weight.data.zero_()
    return file.changes()


def without_its_beginning(file: File) -> Changes:
    """T-LoRA's p·λ·q, nothing subtracted."""
    for module in file.modules.values():
        module.base_lambda.zero_()
    return file.changes()


def transposed_core(field: str) -> Callable[[File], Changes]:
    """The Tucker core with its two ranks exchanged; only modules that have one."""

    def at(file: File) -> Changes:
        file.truth = {name: change for name, change in file.truth.items() if f"{name}.{field}" in file.tensors}
        for name in file.truth:
            for parameter, values in file.modules[name].named_parameters():
                if parameter in ("hada_t1", "hada_t2", "lokr_t2", "lora_mid.weight"):
                    values.data = values.data.transpose(0, 1).contiguous()
        return file.changes()

    return at


def exact_cayley(file: File) -> Changes:
    """peft's `use_cayley_neumann=False` on what was trained with the default."""
    for module in file.modules.values():
        module.oft_R["default"].use_cayley_neumann = False
    return file.changes()


def other_way(file: File) -> Changes:
    """The same with the triangles' sign turned: the exact rotation the series approximates."""
    for module in file.modules.values():
        module.oft_R["default"].use_cayley_neumann = False
        module.oft_R["default"].weight.data.neg_()
    return file.changes()


ROWS: tuple[tuple[str, str, Callable[[File], Changes]], ...] = (
    ("loha", "LyCORIS, `get_merged_weight`", merged_by_lycoris),
    ("lokr", "LyCORIS, `get_merged_weight`", merged_by_lycoris),
    ("lokr_dora_out", "LyCORIS, `get_merged_weight`", merged_by_lycoris),
    ("dora_out", "LyCORIS, `get_merged_weight`", merged_by_lycoris),
    ("dora_out", "formula: no magnitude", File.inner),
    ("dora_in", "formula: no magnitude", File.inner),
    ("loha_dora_out", "formula: no magnitude", File.inner),
    ("dora_out", "formula: divided by ‖W‖", by_the_bases_length),
    ("lokr_full", "formula: times the stored alpha", alpha_of_two_factors),
    ("locon_rslora", "formula: √rank once more", times(2.0)),
    ("locon_tucker", "formula: core transposed", transposed_core("lora_mid.weight")),
    ("loha_tucker", "formula: core transposed", transposed_core("hada_t1")),
    ("lokr_tucker", "formula: core transposed", transposed_core("lokr_t2")),
    ("diag_oft_constraint", "formula: alpha not times the rows", unscaled_constraint),
    ("diag_oft_constraint", "formula: no rescale", without_rescale),
    ("glora", "formula: additive part alone", additive_part),
    ("tlora", "formula: nothing subtracted", without_its_beginning),
    ("oft_r", "peft, exact Cayley", exact_cayley),
    ("oft_r", "peft, exact Cayley of −Q", other_way),
)


def rows() -> Iterator[str]:
    yield "| file | consumer | median | largest |\n|---|---|---:|---:|"
    for name, title, consumer in ROWS:
        file = File(name)
        other = consumer(file)
        yield f"| `{name}` | {title} | {compare(file.truth, other)} |"


def readers() -> Iterator[str]:
    """Every kind through diffusers' loader, and back through LyCORIS' own."""
    yield "| file | diffusers: median | largest | LyCORIS reading back: median | largest |\n|---|---:|---:|---:|---:|"
    for name, kind in kinds.KINDS.items():
        cells = []
        for reader in (loaded_by_diffusers, read_back_by_lycoris):
            if reader is read_back_by_lycoris and kind.algorithm == "peft":
                cells.append("– | –")
                continue
            file = File(name)
            try:
                cells.append(compare(file.truth, reader(file)))
            except Exception as error:  # whatever a loader raises is its result
                cells.append(f"{type(error).__name__} | –")
        yield f"| `{name}` | {' | '.join(cells)} |"


def strengths() -> Iterator[str]:
    """DoRA at other strengths than 1, beside s·ΔW."""
    yield "| file | strength | peft: median | largest | LyCORIS: median | largest |\n|---|---:|---:|---:|---:|---:|"
    for name in ("dora_out", "loha_dora_out"):
        for strength in (1.0, 0.5):
            cells = []
            for consumer in (dora_by_peft, dora_by_lycoris):
                file = File(name)
                cells.append(compare(share_of_dora(strength)(file), consumer(strength)(file)))
            yield f"| `{name}` | {strength} | {' | '.join(cells)} |"


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    packages = ("lycoris-lora", "peft", "diffusers", "torch")
    print(", ".join(f"{package} {version(package)}" for package in packages))
    for table in (rows, readers, strengths):
        print()
        for line in table():
            print(line, flush=True)


if __name__ == "__main__":
    main()

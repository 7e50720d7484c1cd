"""What a plan has to say: what changes besides names, and what readers other than diffusers make of the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from lora_convert.containers.header import Header
from lora_convert.families import Family
from lora_convert.report import Finding, counted, listed

if TYPE_CHECKING:
    from lora_convert.converters.plan import Options, OutputFile, Step

__all__ = ["change_findings", "comfyui_findings", "kohya_findings", "two_files_findings"]


def change_findings(steps: Sequence[Step], header: Header, options: Options) -> list[Finding]:
    """Findings on what the conversion changes besides names."""
    findings = []
    changed: Counter[tuple[str, str]] = Counter()
    for step in steps:
        for tensor in (tensor for group in step.outputs for tensor in group):
            if step.retyped and tensor.role in step.source.tensors and tensor.role != "alpha":
                changed[header.tensors[step.source.tensors[tensor.role]].dtype, tensor.dtype] += 1
    for (before, after), number in sorted(changed.items()):
        if before != after:
            why = "as asked" if options.dtype else f"because Diffusers has no use for {before}"
            findings.append(
                Finding("dtype-changed", "note", "", f"{number} matrices go from {before} to {after}, {why}.")
            )
    tucker = sum("mid" in step.source.tensors for step in steps)
    if tucker:
        message = f"The Tucker cores of {tucker} convolutions are multiplied into their down matrices."
        findings.append(Finding("folded", "note", "", message))
    factored = Counter(
        step.source.algorithm for step in steps if step.fold is None and not step.truncated and not step.native
    )
    if factored:
        kinds = ", ".join(f"{number} {name}" for name, number in factored.most_common())
        message = f"The factors of {counted(sum(factored.values()), 'module')} ({kinds}) become those of a LoRA."
        findings.append(Finding("folded", "note", "", message))
    empty = [step.source for step in steps if not step.outputs]
    for module in empty[:20]:
        message = f"{module.modules[0].name} has rank 0: it changes nothing and is left out."
        findings.append(Finding("no-effect", "warning", module.tensors.get("up", module.modules[0].name), message))
    return findings


def comfyui_findings(steps: Sequence[Step]) -> list[Finding]:
    """What ComfyUI does not read of the Diffusers layout."""
    if any(module.component == "unet" and ".attn" in module.path for step in steps for module in step.source.modules):
        message = "ComfyUI skips the UNet's attention in the Diffusers layout without a word."
        fix = "For ComfyUI and A1111 write the file with --to kohya."
        return [Finding("not-for-comfyui", "note", "", message, fix)]
    return []


def kohya_findings(steps: Sequence[Step], family: Family) -> list[Finding]:
    """What the readers of Kohya's layout do not know, or read otherwise."""
    findings = []
    unknown = [
        module.name
        for step in steps
        for module in step.source.modules
        if module.path == "text_projection" or (family.name == "sdxl-refiner" and module.component != "unet")
    ]
    if unknown:
        message = (
            f"A1111 and Forge have no name for {listed(unknown, 3)} and skip what they do not know; ComfyUI reads it."
        )
        findings.append(Finding("not-for-a1111", "note", unknown[0], message))
    decomposed = [step.name for step in steps if any(t.role == "magnitude" for group in step.outputs for t in group)]
    if decomposed:
        message = (
            f"DoRA with a magnitude per output ({counted(len(decomposed), 'module')}): ComfyUI divides it by ‖W‖ "
            "instead of ‖W+ΔW‖, and A1111 takes it along the inputs: neither shows what was trained."
        )
        findings.append(
            Finding("not-for-comfyui", "warning", decomposed[0], message, "diffusers does, from the default layout.")
        )
    return findings


def two_files_findings(outputs: Sequence[OutputFile]) -> list[Finding]:
    """How to load a file of plain LoRA and one of DoRA together."""
    if len(outputs) < 2:
        return []
    plain, dora = (PurePath(output.path).name for output in outputs)
    message = (
        "Only some modules are DoRA, which diffusers cannot load from one file: there are two, to be loaded as two "
        f'adapters. pipe.load_lora_weights(folder, weight_name="{plain}", adapter_name="plain"); '
        f'pipe.load_lora_weights(folder, weight_name="{dora}", adapter_name="dora"); '
        'pipe.set_adapters(["plain", "dora"]).'
    )
    biased = any(tensor.role == "bias" for tensor in outputs[0].tensors)
    fix = "" if biased else "With convert --base MODEL one file holds both: its plain modules then carry ‖W+ΔW‖."
    return [Finding("two-files", "note", dora, message, fix)]

"""Drawing pictures with a pipeline, with a record of everything that determined them.

The noise comes from the CPU's generator, so that devices agree on it. Each picture has its own and is drawn alone, so
that it does not depend on how many are drawn beside it.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_convert._version import __version__
from lora_convert.converters.writer import atomic_file
from lora_convert.errors import FileError, UsageError
from lora_convert.report import SCHEMA, Finding, listed, shown, to_json
from lora_convert.runtime.determinism import deterministic
from lora_convert.runtime.sheets import sheet

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "SCHEDULERS",
    "Rendering",
    "Settings",
    "deterministic",
    "draw",
    "read_record",
    "render",
    "save_png",
    "scheduler_name",
    "sheet",
]

Progress = Callable[[int, int], None]
"""Called with the steps that are done and the steps that there are, over all pictures of a call."""

SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "ddim": ("DDIMScheduler", {}),
        "ddpm": ("DDPMScheduler", {}),
        "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # as Stable Diffusion has it
        "euler": ("EulerDiscreteScheduler", {}),
        "euler-a": ("EulerAncestralDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
        "dpm2": ("KDPM2DiscreteScheduler", {}),
        "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
        "dpm++2m": ("DPMSolverMultistepScheduler", {}),
        "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        "dpm++2m-sde-karras": (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        ),
        "deis": ("DEISMultistepScheduler", {}),
        "unipc": ("UniPCMultistepScheduler", {}),
        "lcm": ("LCMScheduler", {}),
        "tcd": ("TCDScheduler", {}),
    }
)
"""Name → diffusers' class and what it gets besides the base model's own scheduler configuration."""

_OTHER_SCHEDULER_NAMES = {"eulerancestral": "euler-a", "dpm2ancestral": "dpm2-a", "plms": "pndm"}
_SIZE_STEP = 8
_MOST_SEED = 2**63 - 1
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_RECORD = "lora_convert"
_PARAMETERS = "parameters"


_BATCH_PIXELS = 512 * 512  # drawn at a time: no more memory than one picture of a real base


@dataclass(frozen=True)
class Settings:
    """What to draw, and how. `width` and `height` in pixels, None for the base model's own; `guidance` of 1 or less is
    none, and then the negative prompt has no effect; `scheduler` is one of `SCHEDULERS`, None the pipeline's own.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 20
    guidance: float = 4.0
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    seed: int = 0

    def checked(self) -> Settings:
        """These settings. Raises UsageError for what no pipeline could draw with."""
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            _check_text(name, text)
        for name, value, least in (("steps", self.steps, 1), ("seed", self.seed, 0)):
            if not _is_whole(value) or not least <= value <= _MOST_SEED:
                raise UsageError(f"{name} must be a whole number, {least} or more; it is {shown(repr(value))}")
        if isinstance(self.guidance, bool | str) or not math.isfinite(self.guidance):
            raise UsageError(f"guidance must be a number; it is {shown(repr(self.guidance))}")
        for name, size in (("width", self.width), ("height", self.height)):
            if size is not None and (not _is_whole(size) or size < _SIZE_STEP or size % _SIZE_STEP):
                raise UsageError(f"{name} must be a multiple of {_SIZE_STEP} pixels; it is {shown(repr(size))}")
        if self.scheduler is not None:
            scheduler_name(self.scheduler)
        return self


@dataclass(frozen=True)
class Rendering:
    """Pictures, what they were decoded from, and what determined them. Picture k has the record's seed plus k."""

    images: tuple[Image.Image, ...]
    latents: NDArray[np.float32]
    """After the last step, (n, channels, height, width) of the latents, before the VAE's scaling is undone."""
    record: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()

    def record_of(self, number: int) -> Mapping[str, Any]:
        """The record of one picture, counted from 0: it has the seed of its own, and so can be drawn again alone."""
        return {**self.record, "seed": self.record["seed"] + range(len(self.images))[number]}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise UsageError(f"the {name} must be text; it is {shown(repr(text))}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the {name} is no valid text: {shown(text)}") from None


def scheduler_name(name: str) -> str:
    """The name of `SCHEDULERS` that is meant, also by the spellings of ComfyUI and A1111 (`dpmpp_2m`, `DPM++ 2M`).

    Raises UsageError if there is none.
    """
    squeezed = _squeezed(name)
    known = {_squeezed(known): known for known in SCHEDULERS} | _OTHER_SCHEDULER_NAMES
    if squeezed not in known:
        raise UsageError(f"there is no scheduler {shown(name)}; there are {', '.join(SCHEDULERS)}")
    return known[squeezed]


def _squeezed(name: str) -> str:
    return "".join(part for part in name.lower().replace("pp", "++") if part not in " -_")


def render(
    pipeline: Any,
    settings: Settings,
    *,
    count: int = 1,
    progress: Progress | None = None,
    reproducible: bool = True,
) -> Rendering:
    """Draw `count` pictures with a text-to-image pipeline; picture k has the seed `settings.seed + k`.

    Two runs give the same bytes on one machine, unless `reproducible` is off (faster on some devices). The pipeline is
    left as it was. Raises UsageError for settings that it cannot draw with, FileError with `not-finite` where the
    picture has no values.
    """
    if not _is_whole(count) or count < 1:
        raise UsageError(f"the number of pictures must be 1 or more; it is {shown(repr(count))}")
    each = [replace(settings, seed=settings.checked().seed + number).checked() for number in range(count)]
    with deterministic() if reproducible else nullcontext(), _borrowed(pipeline) as own:
        findings = (*_truncations(pipeline, settings), *_unused(pipeline, settings))
        drawn = []
        for number, one in enumerate(each):
            pipeline.scheduler = _scheduler(own, one)
            drawn.append(_draw(pipeline, [one], _part_of(progress, number, count)))
        record = _record(pipeline, settings, drawn[0][0][0], reproducible)
    images = tuple(image for some, _ in drawn for image in some)
    return Rendering(images, np.concatenate([part for _, part in drawn]), record, findings)


def draw(
    pipeline: Any, settings: Sequence[Settings], *, progress: Callable[[int], None] | None = None
) -> tuple[tuple[Image.Image, ...], NDArray[np.float32]]:
    """A picture for each of several settings that differ in prompt and seed, and the last latents, (n, c, h, w).

    Small pictures are drawn many at a time, which is quicker and changes their last bits: compare them with each other,
    not with those of `render`. There is no record, and it is the caller's to be `deterministic`. `progress` is called
    with the number of pictures that were finished. Raises as `render` does.
    """
    drawn = []
    each = [one.checked() for one in settings]
    with _borrowed(pipeline) as own:
        width, height = _size(pipeline, each[0])
        batch = max(1, _BATCH_PIXELS // (width * height))
        for first in range(0, len(each), batch):
            some = each[first : first + batch]
            pipeline.scheduler = _scheduler(own, some[0])
            drawn.append(_draw(pipeline, some))
            if progress:
                progress(len(some))
    images = tuple(image for some_images, _ in drawn for image in some_images)
    return images, np.concatenate([part for _, part in drawn])


def _part_of(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress of one picture as progress of all of them."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)


def _refuse_undrawable(pipeline: Any) -> None:
    """Raise UsageError for a pipeline that does not draw from a prompt alone."""
    name = type(pipeline).__name__
    if "image" in inspect.signature(type(pipeline).__call__).parameters:
        said = f"{name} draws over a picture and cannot draw from a prompt alone"
        raise UsageError(f"{said}; give a text-to-image base (for an SDXL refiner: the SDXL base model)")
    absent = [part for part in _PARTS if getattr(pipeline, part, None) is None]
    if absent:
        raise UsageError(f"the pipeline has no {listed(absent)}; open the whole base model")
    takes, gives = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes != gives:
        said = f"the UNet takes {takes} channels and the VAE gives {gives}: an inpainting or editing model"
        raise UsageError(f"{said}, which cannot draw from a prompt alone; give a text-to-image base")


def _truncations(pipeline: Any, settings: Settings) -> Iterator[Finding]:
    """What of the prompts the text encoder does not read."""
    readers = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
    tokenizers = [tokenizer for tokenizer in readers if tokenizer is not None]
    longest = int(pipeline.tokenizer.model_max_length)
    for name, text in (("prompt", settings.prompt), ("negative prompt", settings.negative_prompt)):
        texts = [(tokenizer, _expanded(pipeline, text, tokenizer)) for tokenizer in tokenizers]
        # one that begins and one that ends it
        tokens = max(len(tokenizer.tokenize(expanded)) + 2 for tokenizer, expanded in texts)
        if tokens > longest:
            said = f"It has {tokens} tokens and the text encoder reads {longest}: the end of it has no effect."
            yield Finding("prompt-truncated", "warning", name, said, "Shorten it.")


def _expanded(pipeline: Any, text: str, tokenizer: Any) -> str:
    """The prompt as the pipeline gives it to a tokenizer: `load_textual_inversion` has tokens for several vectors."""
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    return text if convert is None else str(convert(text, tokenizer))


def _unused(pipeline: Any, settings: Settings) -> Iterator[Finding]:
    """The embeddings that were applied for nothing."""
    from lora_convert.runtime.applying import applied

    guided = settings.guidance > 1
    texts = [settings.prompt, *([settings.negative_prompt] if guided else [])]
    where = "neither the prompt nor the negative prompt has" if guided else "the prompt, which alone is read, has not"
    for adapter in applied(pipeline):
        if adapter.unused(texts):
            said = f"It has no effect: {where} its token."
            fix = f"Write {listed(adapter.tokens)} where it is to act."
            yield Finding("token-unused", "warning", adapter.file, said, fix)


@contextmanager
def _borrowed(pipeline: Any) -> Iterator[Any]:
    """The pipeline's own scheduler, while the pipeline, quiet, may be given others; afterwards all is as it was."""
    from lora_convert.runtime.loading import collected_warnings

    _refuse_undrawable(pipeline)
    own, bars = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", None)
    try:
        pipeline.set_progress_bar_config(disable=True)
        with collected_warnings():  # what matters of them is said in findings
            yield own
    finally:
        pipeline.scheduler = own
        if bars is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = bars


def _scheduler(own: Any, settings: Settings) -> Any:
    """A new scheduler of the kind asked for, configured as the pipeline's own; new, for it keeps what it sees.

    Raises UsageError for more steps than it has.
    """
    import diffusers

    if settings.scheduler is None:
        name, scheduler = type(own).__name__, type(own).from_config(own.config)
    else:
        name = scheduler_name(settings.scheduler)
        class_name, options = SCHEDULERS[name]
        scheduler = getattr(diffusers, class_name).from_config(own.config, **options)
    most = scheduler.config.get("num_train_timesteps", settings.steps)
    if settings.steps > most:
        raise UsageError(f"{name} has at most {most} steps; {settings.steps} were asked for")
    try:
        scheduler.set_timesteps(settings.steps)
    except ValueError as error:
        raise UsageError(f"{name} cannot draw in {settings.steps} steps: {shown(str(error), 300)}") from None
    return scheduler


class _LastStep:
    """What diffusers calls after every step: it stops a picture that is not finite, and keeps the last latents."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.latents: NDArray[np.float32] | None = None

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents, steps = tensors["latents"], pipeline.num_timesteps
        if not latents.isfinite().all():
            raise _not_finite(f"The latents were not finite after step {step + 1} of {steps}.", pipeline.unet.dtype)
        if step == steps - 1:
            self.latents = latents.detach().float().cpu().numpy().copy()
        if self.progress:
            self.progress(step + 1, steps)
        return {}


def _not_finite(said: str, dtype: Any) -> FileError:
    name = _dtype_name(dtype)
    if name == "fp16":
        fix = "fp16 overflows above 65504: open the base model in fp32 or bf16."
    else:
        fix = "Lower the guidance or the adapter's scale, or look for NaN in the base model."
    return FileError([Finding("not-finite", "error", "", said, fix)])


def _draw(
    pipeline: Any, settings: Sequence[Settings], progress: Progress | None = None
) -> tuple[tuple[Image.Image, ...], NDArray[np.float32]]:
    """Pictures in one batch and their latents, (n, c, h, w); settings differ in prompts and seeds only."""
    last = _LastStep(progress)
    shared = settings[0]
    width, height = _size(pipeline, shared)
    drawn = _called(
        pipeline,
        prompt=[one.prompt for one in settings],
        negative_prompt=[one.negative_prompt for one in settings],
        num_inference_steps=shared.steps,
        guidance_scale=float(shared.guidance),
        width=width,
        height=height,
        output_type="pt",  # in a PIL image NaN would have become black
        callback_on_step_end=last,
        callback_on_step_end_tensor_inputs=["latents"],
        seeds=[one.seed for one in settings],
    )
    if not drawn.images.isfinite().all():
        raise _not_finite("The latents are finite, but the VAE decoded them to NaN.", pipeline.vae.dtype)
    if any(getattr(drawn, "nsfw_content_detected", None) or ()):
        raise UsageError("the pipeline's safety checker blacked the picture out; open it with safety_checker=None")
    pixels = pipeline.image_processor.pt_to_numpy(drawn.images)
    assert last.latents is not None
    return tuple(pipeline.image_processor.numpy_to_pil(pixels)), last.latents


def _size(pipeline: Any, settings: Settings) -> tuple[int, int]:
    """Width and height. Where one is left open it is the base model's; diffusers would replace both."""
    sample = pipeline.unet.config.sample_size
    rows, columns = (sample, sample) if isinstance(sample, int) else sample
    scale = pipeline.vae_scale_factor
    return settings.width or columns * scale, settings.height or rows * scale


def _called(pipeline: Any, *, seeds: Sequence[int], **arguments: Any) -> Any:
    import torch

    try:
        return pipeline(generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds], **arguments)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(pipeline) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what torch says of the CPU's memory
            raise
        raise _out_of_memory(pipeline) from error


def _out_of_memory(pipeline: Any) -> UsageError:
    where = pipeline._execution_device.type
    return UsageError(f"there is not enough memory on {where} for this picture; draw it smaller, or in fp16 or bf16")


def _dtype_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _record(pipeline: Any, settings: Settings, image: Image.Image, reproducible: bool) -> dict[str, Any]:
    """Everything that determined a picture. No times, no paths, no names of machines: pictures are passed on."""
    import torch

    from lora_convert.runtime.applying import applied
    from lora_convert.runtime.pipelines import base_record

    name = None if settings.scheduler is None else scheduler_name(settings.scheduler)
    config = {key: _plain(value) for key, value in sorted(pipeline.scheduler.config.items()) if key[0] != "_"}
    libraries = ("diffusers", "transformers", "peft")
    return {
        "schema": SCHEMA,
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt,
        "steps": settings.steps,
        "guidance": float(settings.guidance),
        "width": image.width,
        "height": image.height,
        "scheduler": {"name": name, "class": type(pipeline.scheduler).__name__, "config": config},
        "seed": settings.seed,
        "base": _plain(base_record(pipeline)),
        "adapters": [
            {
                "file": adapter.file,
                "sha256": adapter.sha256,
                "modules": adapter.modules,
                "scale": _plain(adapter.scale),
                **({"tokens": list(adapter.tokens)} if adapter.tokens else {}),
            }
            for adapter in applied(pipeline)
        ],
        "pipeline": type(pipeline).__name__,
        "device": {"kind": pipeline._execution_device.type, "name": _device_name(pipeline._execution_device)},
        "dtype": _dtype_name(pipeline.unet.dtype),
        "vae_dtype": _dtype_name(pipeline.vae.dtype),
        "threads": torch.get_num_threads(),
        "deterministic": reproducible,
        "versions": {
            "lora_convert": __version__,
            "torch": str(torch.__version__),
            **{library: importlib.metadata.version(library) for library in libraries},
        },
    }


def _device_name(device: Any) -> str:
    """What decides which kernels run: the card, or the processor's architecture and vector instructions."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return platform.machine()


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; what it has no form for as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def save_png(path: str | Path, image: Image.Image, record: Mapping[str, Any]) -> None:
    """Write a PNG that carries the record as text, whole or not at all; its folder is made, a file there replaced.

    The chunk `lora_convert` is the record as JSON; `parameters` is the same in A1111's form, which viewers show.
    Raises UsageError if the folder cannot be written to.
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text(_PARAMETERS, _a1111_parameters(record).replace("\0", "\ufffd"))  # NUL ends a PNG's texts
    chunks.add_text(_RECORD, to_json(record))
    with atomic_file(Path(path)) as file:
        image.save(file, format="PNG", pnginfo=chunks)


def _a1111_parameters(record: Mapping[str, Any]) -> str:
    scheduler = record.get("scheduler") or {}
    adapters = ", ".join(f"{adapter['file']} {json.dumps(adapter['scale'])}" for adapter in record.get("adapters", ()))
    facts = {
        "Steps": record.get("steps"),
        "Sampler": scheduler.get("name") or scheduler.get("class"),
        "CFG scale": record.get("guidance"),
        "Seed": record.get("seed"),
        "Size": f"{record.get('width')}x{record.get('height')}",
        "Model": (record.get("base") or {}).get("name"),
        "Adapters": adapters or None,
        "Version": f"lora-convert {(record.get('versions') or {}).get('lora_convert', __version__)}",
    }
    negative = record.get("negative_prompt")
    lines = [
        str(record.get("prompt", "")),
        *([f"Negative prompt: {negative}"] if negative else []),
        ", ".join(f"{name}: {_a1111_value(value)}" for name, value in facts.items() if value is not None),
    ]
    return "\n".join(lines)


def _a1111_value(value: object) -> str:
    """A1111 reads a value that has its own separators as JSON."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",\n:") else text


def read_record(path: str | Path) -> Mapping[str, Any]:
    """The record that `save_png` wrote into a picture.

    Raises FileError with `unreadable` for a file that is no such picture.
    """
    from PIL import Image

    fix = "Only PNG pictures that lora-convert drew have one, and only as they were written."
    try:
        with Image.open(path, formats=["PNG"]) as image:  # its texts come before its pixels, which are not read
            record = json.loads(image.info[_RECORD])
        if not isinstance(record, dict) or "schema" not in record:
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):
        said = "the picture carries no record of what determined it."
    except Exception as error:  # a stranger's file: whatever Pillow makes of it
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no PNG picture"
        said = f"its record cannot be read: {reason}."
    else:
        return record
    raise FileError([Finding("unreadable", "error", str(path), said, fix)])

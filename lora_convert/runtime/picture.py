"""The last rung of the proof: base alone, the source merged by its definition, and the converted file as it loads.

The floor under every comparison is what the pictures do when every ΔW is disturbed as little as its dtype can resolve.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_convert.containers import Source
from lora_convert.converters.convert import Progress
from lora_convert.converters.fidelity import TOLERANCE, Rung
from lora_convert.errors import FileError, UsageError
from lora_convert.families import FAMILIES
from lora_convert.families.encoders import title_of
from lora_convert.inspect.detection import Detection
from lora_convert.report import Finding, listed, shown
from lora_convert.runtime.applying import apply
from lora_convert.runtime.comparing import Difference, compare
from lora_convert.runtime.determinism import deterministic
from lora_convert.runtime.embedding import Word
from lora_convert.runtime.pipelines import base_record, family_of, open_pipeline
from lora_convert.runtime.reference import UNIT_ROUNDOFF, live_modules, merged, roundoff_of
from lora_convert.runtime.rendering import Settings, draw

__all__ = [
    "PROMPTS",
    "Comparison",
    "Drawing",
    "Drawn",
    "Gallery",
    "PictureProof",
    "disturbance_of",
    "prompts_for",
    "prove",
    "verdict",
]

Array = NDArray[Any]

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "tiny": (
        "a red circle on a blue background",
        "a yellow star on a black background",
        "a green square on a white background",
        "a purple triangle on a yellow background",
        "a white ring on a green background",
        "an orange cross on a purple background",
        "a big blue circle on an orange background",
        "a black square on a red background",
    ),
    "": (
        "a portrait photo of a woman",
        "a portrait photo of an old man with a beard",
        "a cat sitting on a chair",
        "a house by a lake, mountains",
        "a bowl of fruit on a table",
        "a city street at night",
        "a red sports car",
        "an astronaut riding a horse",
    ),
}
"""What is drawn unless other prompts are given: shapes for the embedded bases, else the field's usual subjects."""

WITH_TOKEN: Mapping[str, tuple[str, ...]] = {
    "tiny": (
        "a {}",
        "{} on a blue background",
        "a red circle on a blue background, {}",
        "{}, a yellow star on a black background",
    ),
    "": ("a photo of {}", "{} on a table", "a portrait photo of a woman, {}", "{}, a house by a lake, mountains"),
}
"""What is drawn with an embedding's token; as many of `PROMPTS` follow, which have it in the negative prompt."""

FEWEST_PROMPTS = 8
_DISTURBANCES = 3  # draws of the noise that makes the floor; more of them find a higher one
_MARGIN = 4.0  # of the floor: another draw of the same noise may move a picture this much more
_LEAST = 1e-5  # relative distance of latents that is never too much
_LEVEL = 1 / 255  # one level of an 8-bit picture


@dataclass(frozen=True)
class Drawing:
    """How the rung draws: at least eight prompts, the k-th with seed `seed + k`.

    Without `prompts` those of `PROMPTS`; of fewer than eight, each is drawn with several seeds. `width` and `height`
    are pixels; None is the base's own size.
    """

    device: str = "auto"
    dtype: str = "auto"
    prompts: Sequence[str] = ()
    steps: int = 10  # enough for an adapter to show; every prompt is drawn six times
    guidance: float = 4.0
    seed: int = 0
    scale: float = 1.0
    width: int | None = None
    height: int | None = None


def prompts_for(family: str, tokens: Sequence[str] = ()) -> tuple[str, ...]:
    """The eight prompts for bases of a family; with tokens of embeddings half of them have these in turn."""
    size = "tiny" if family.startswith("tiny-") else ""
    if not tokens:
        return PROMPTS[size]
    named = [prompt.format(token) for prompt, token in zip(WITH_TOKEN[size], itertools.cycle(tokens), strict=False)]
    return (*named, *PROMPTS[size][len(named) :])


@dataclass(frozen=True)
class Drawn:
    """Pictures of every prompt, and the latents that they were decoded from, (n, c, h, w), float32."""

    images: tuple[Image.Image, ...]
    latents: Array


@dataclass(frozen=True)
class Comparison:
    """One prompt: how far the converted file's picture is from the reference's, and what the floor allows.

    `latents` and `effect` are relative to the reference's own distance from the base alone and from nothing:
    ‖converted − reference‖ / ‖reference‖ and ‖reference − base‖ / ‖reference‖. `rounding` is the share of the floor
    that is not due to an error which the conversion states (a truncated rank).
    """

    prompt: str
    seed: int
    latents: float
    pixels: Difference
    floor_latents: float
    floor_pixels: Difference
    effect: float
    rounding: float = 1.0

    @property
    def allowed(self) -> Mapping[str, float]:
        """What each figure may be at most; tile SSIM at least."""
        floor = self.floor_pixels
        return {
            "latents": max(_MARGIN * self.floor_latents, _LEAST),
            "tile_difference": max(_MARGIN * floor.tile_difference, _LEVEL),
            "tile_ssim": 1 - max(_MARGIN * (1 - floor.tile_ssim), 1e-2),
            "flip": max(_MARGIN * floor.flip, 2e-2),
        }

    @property
    def excess(self) -> float:
        """The largest measured difference as a multiple of what is allowed; at most 1 passes."""
        pixels, allowed = self.pixels, self.allowed
        return max(
            self.latents / allowed["latents"],
            pixels.tile_difference / allowed["tile_difference"],
            (1 - pixels.tile_ssim) / (1 - allowed["tile_ssim"]),
            pixels.flip / allowed["flip"],
        )

    @property
    def shows(self) -> bool:
        """Whether the adapter moves this picture by more than rounding does."""
        return self.effect > max(_MARGIN * self.floor_latents * self.rounding, _LEAST)

    @property
    def tells(self) -> bool:
        """Whether the base alone would be told from the reference: else what agrees proves nothing."""
        return self.effect > self.allowed["latents"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "latents": self.latents,
            **asdict(self.pixels),
            "allowed": dict(self.allowed),
            "excess": self.excess,
            "effect": self.effect,
        }


class PictureProof:
    """What is drawn once for a source, so that any number of files can be judged against it.

    The pipeline has no adapters, and every call leaves it as it was.
    """

    def __init__(
        self,
        pipeline: Any,
        source: Source,
        found: Detection,
        settings: Settings,
        prompts: Sequence[str],
        *,
        scale: float = 1.0,
        progress: Progress | None = None,
    ) -> None:
        self.pipeline, self.source, self.found = pipeline, source, found
        self.settings, self.prompts, self.scale = settings, tuple(prompts), scale
        self._progress, self._done = progress, 0
        self._disturbed: dict[tuple[float, float], tuple[Drawn, ...]] = {}

    @property
    def total(self) -> int:
        """How many pictures a proof of one file draws."""
        return (3 + _DISTURBANCES + self._runs) * len(self.prompts)

    @property
    def _runs(self) -> int:
        """Two runs on one CPU give the same bytes; on other devices the second is drawn, and measured."""
        return int(self.pipeline.device.type != "cpu")

    @cached_property
    def base(self) -> Drawn:
        return self.draw()

    @cached_property
    def reference(self) -> Drawn:
        with self.with_source():
            return self.draw()

    def with_source(
        self, *, disturbance: float = 0.0, roundoff: float = 0.0, seed: int = 0
    ) -> AbstractContextManager[Any]:
        """The base model doing what the source says by its definition, with that much noise in it (see `merged`)."""
        noise: dict[str, Any] = {"disturbance": disturbance, "roundoff": roundoff, "seed": seed}
        return merged(self.pipeline, self.source, self.found, self.scale, **noise)

    def settings_of(self, k: int) -> Settings:
        """How picture k is drawn."""
        return replace(self.settings, prompt=self.prompts[k], seed=self.settings.seed + k)

    def disturbed(self, disturbance: float, roundoff: float = 0.0) -> tuple[Drawn, ...]:
        """What no comparison can see below: the reference with that noise in every change and roundoff of that size in
        the weights, and as another run gives it.
        """
        if (disturbance, roundoff) not in self._disturbed:
            levels = [(disturbance, roundoff)] * _DISTURBANCES + [(0.0, 0.0)] * self._runs
            drawn = tuple(self._noisy(*level, seed) for seed, level in enumerate(levels))
            self._disturbed[disturbance, roundoff] = drawn
        return self._disturbed[disturbance, roundoff]

    def _noisy(self, disturbance: float, roundoff: float, seed: int) -> Drawn:
        with self.with_source(disturbance=disturbance, roundoff=roundoff, seed=seed):
            return self.draw()

    def converted(self, output: str | Path) -> Drawn:
        """Draw with a file or folder as the pipeline's own loader or peft's applies it."""
        with apply(self.pipeline, output, self.scale):
            return self.draw()

    def baked(self, pipeline: Any) -> Drawn:
        """Draw with a model into which the source was merged before."""
        return self.draw(pipeline)

    def compare(
        self, drawn: Drawn, disturbance: float, *, roundoff: float = 0.0, rounding: float = 1.0
    ) -> tuple[Comparison, ...]:
        """Every prompt's figures, with the floor that a relative error of every change and a roundoff of the weights
        make; of that error `rounding` is the share that no conversion avoids.
        """
        disturbed = self.disturbed(disturbance, roundoff)
        return tuple(self._compared(drawn, disturbed, k, rounding) for k in range(len(self.prompts)))

    def _compared(self, drawn: Drawn, disturbed: Sequence[Drawn], k: int, rounding: float) -> Comparison:
        floor = [_difference(self.reference, other, k) for other in disturbed]
        latents, pixels = _difference(self.reference, drawn, k)
        return Comparison(
            _label(self.settings_of(k)),
            self.settings.seed + k,
            latents,
            pixels,
            max(latents for latents, _ in floor),
            functools.reduce(Difference.worst, (pixels for _, pixels in floor)),
            _difference(self.reference, self.base, k)[0],
            rounding,
        )

    def draw(self, pipeline: Any = None) -> Drawn:
        """Every picture, with the pipeline as it is, or another."""
        settings = [self.settings_of(k) for k in range(len(self.prompts))]
        with deterministic():
            return Drawn(*draw(pipeline or self.pipeline, settings, progress=self._step))

    def _step(self, pictures: int) -> None:
        self._done += pictures
        if self._progress:
            self._progress("drawing", min(self._done, self.total), self.total)


def _label(settings: Settings) -> str:
    return settings.prompt + (f" (negative: {settings.negative_prompt})" if settings.negative_prompt else "")


def disturbance_of(files: Iterable[tuple[Source, Detection]], delta_error: float | None = None) -> float:
    """The relative error of ΔW, or of vectors, that no one can object to: what rounding to the files' dtypes makes, or
    what the delta rung measured and let pass.
    """
    dtypes = {
        source.header.tensors[name].dtype
        for source, found in files
        for name in itertools.chain(
            *(module.values.values() for module in found.payload), *(part.tensors for part in found.embeddings)
        )
    }
    roundoffs = [max(UNIT_ROUNDOFF[dtype], TOLERANCE[dtype]) for dtype in dtypes if dtype in UNIT_ROUNDOFF]
    return max([*roundoffs, delta_error or 0.0, UNIT_ROUNDOFF["F32"]])


def verdict(found: Sequence[Comparison], *, median: bool = False) -> Rung:
    """The rung `picture`: pass if the pictures agree within the floor and the adapter shows in them.

    `median` judges by the middle prompt instead of the worst one: with bfloat16 anywhere, rounding alone may tip a
    prompt that is balanced on an edge.
    """
    excess = (statistics.median if median else max)(comparison.excess for comparison in found)
    findings = []
    if not excess <= 1:
        findings.append(_mismatch(found, excess))
    if statistics.median(comparison.shows for comparison in found) < 1:
        findings.append(_no_effect(len(found)))
    coarse = statistics.median(comparison.tells for comparison in found) < 1
    figures = {
        "prompts": len(found),
        "excess": excess,
        "latents": max(comparison.latents for comparison in found),
        "tile_difference": max(comparison.pixels.tile_difference for comparison in found),
        "tile_ssim": min(comparison.pixels.tile_ssim for comparison in found),
        "flip": max(comparison.pixels.flip for comparison in found),
        "effect": statistics.median(comparison.effect for comparison in found),
        "pictures": [comparison.as_dict() for comparison in found],
    }
    if coarse and not findings:
        return Rung("skipped", "errors as large as those stated hide what the adapter does in a picture", figures)
    return Rung("fail" if findings else "pass", figures=figures, findings=tuple(findings))


def _difference(first: Drawn, second: Drawn, k: int) -> tuple[float, Difference]:
    """Relative distance of the latents, and the pixels' metrics."""
    norm = float(np.linalg.norm(first.latents[k]))
    distance = float(np.linalg.norm(second.latents[k] - first.latents[k]))
    return distance / norm, compare(first.images[k], second.images[k])


def _mismatch(found: Sequence[Comparison], excess: float) -> Finding:
    worst = max(found, key=lambda comparison: comparison.excess)
    wrong = [comparison.prompt for comparison in found if comparison.excess > 1]
    message = (
        f"With the converted file the pictures differ from the reference's by {excess:.1f} times what rounding "
        f"explains, most with {worst.prompt!r} (tile difference {worst.pixels.tile_difference:.3f}, "
        f"SSIM {worst.pixels.tile_ssim:.3f}); prompts above the floor: {listed(wrong)}."
    )
    return Finding("picture-mismatch", "error", "", message, "Look at the delta rung: it names the modules.")


def _no_effect(prompts: int) -> Finding:
    message = f"The adapter changes the pictures of most of the {prompts} prompts by no more than rounding does."
    fix = "Give prompts with its trigger words (--prompt), or a larger --scale."
    return Finding("no-effect", "error", "", message, fix)


@dataclass(frozen=True)
class Gallery:
    """What a proof has drawn, for its report."""

    base: Mapping[str, Any]
    settings: Settings
    device: str
    dtype: str
    pictures: tuple[Drawn, Drawn, Drawn]
    comparisons: tuple[Comparison, ...]
    base_norms: Mapping[str, float]
    reference: str = "source merged"
    """How the second pictures came to be."""


def prove(
    path: Path,
    outputs: Sequence[tuple[Source, Detection]],
    source: Source,
    truth: Detection,
    base: str,
    drawing: Drawing,
    *,
    delta_error: float | None = None,
    roundoff: float = 0.0,
    progress: Progress | None = None,
) -> tuple[Rung, Gallery | None]:
    """The rung `picture` for an output and its source, on a base model; and what was drawn for it.

    `path` is a file or folder of adapters, of which `outputs` are the open weight files, or without any a merged model;
    `roundoff` is then that of its dtype. `delta_error` is what the delta rung measured. A base with the same blocks of
    other widths cannot take the output: then the rung is skipped and a note says so. Raises UsageError for a base that
    cannot be opened or is of another family, and for a scale at which the output's kind has no one meaning.
    """
    assert truth.family is not None
    _check_scale(outputs, drawing.scale)
    pipeline = open_pipeline(base, drawing.device, drawing.dtype)
    family = family_of(pipeline)
    if family != truth.family:
        return _unfit(base, family, truth.family), None
    words = _words(outputs, source, truth)
    prompts = tuple(drawing.prompts) or prompts_for(family, [word.token for word in words])
    if len(prompts) < FEWEST_PROMPTS:  # more seeds of the same prompts, until there are enough pictures
        prompts = tuple(itertools.islice(itertools.cycle(prompts), FEWEST_PROMPTS))
    settings = Settings(
        prompts[0], "", drawing.steps, drawing.guidance, drawing.width, drawing.height, seed=drawing.seed
    ).checked()
    proof = _proof(pipeline, source, truth, settings, prompts, words, scale=drawing.scale, progress=progress)
    unavoidable = disturbance_of([*outputs, (source, truth)]) if outputs else UNIT_ROUNDOFF["F32"]
    disturbance = max(unavoidable, delta_error or 0.0) if outputs else unavoidable
    try:
        drawn = proof.converted(path) if outputs else proof.baked(open_pipeline(path, drawing.device, drawing.dtype))
    except FileError as error:
        return Rung("fail", "the output could not be loaded", findings=error.findings), None
    comparisons = proof.compare(drawn, disturbance, roundoff=roundoff, rounding=unavoidable / disturbance)
    coarse = max(roundoff_of(pipeline.dtype), disturbance, roundoff) > 2 * UNIT_ROUNDOFF["F16"]
    gallery = Gallery(
        base_record(pipeline),
        settings,
        pipeline.device.type,
        str(pipeline.dtype).removeprefix("torch."),
        (proof.base, proof.reference, drawn),
        comparisons,
        _weight_norms(pipeline, truth),
        "vectors put in" if words else "source merged",
    )
    return verdict(comparisons, median=coarse), gallery


def _words(outputs: Sequence[tuple[Source, Detection]], source: Source, truth: Detection) -> Sequence[Word]:
    """The source's embeddings, if it is a file of embeddings, by the output's tokens."""
    from lora_convert.runtime.embedding_proof import words_of

    if truth.kind != "embedding":
        return ()
    alone = any(source is output for output, _ in outputs)  # there is no other source than the output itself
    return words_of(outputs, outputs if alone else [(source, truth)])


def _proof(
    pipeline: Any,
    source: Source,
    truth: Detection,
    settings: Settings,
    prompts: Sequence[str],
    words: Sequence[Word],
    **options: Any,
) -> PictureProof:
    from lora_convert.runtime.embedding_proof import EmbeddingProof

    if not words:
        return PictureProof(pipeline, source, truth, settings, prompts, **options)
    assert truth.family is not None
    return EmbeddingProof(pipeline, source, truth, settings, prompts, words=words, family=truth.family, **options)


def _check_scale(outputs: Sequence[tuple[Source, Detection]], scale: float) -> None:
    """Refuse what peft scales otherwise than the trainers do; what has no strength is refused when it is applied."""
    if scale != 1.0 and any(found.kind == "embedding" for _, found in outputs):
        raise UsageError(f"an embedding has no strength, so that there is nothing to draw at the scale {scale:g}")
    dora = any("dora" in module.algorithm.split("+") for _, found in outputs for module in found.payload)
    if dora and scale != 1.0:
        raise UsageError(f"at the scale {scale:g} readers do not agree on what a DoRA is; compare it at 1")


def _unfit(base: str, family: str | None, wanted: str) -> Rung:
    """A base of other widths is worth a note; one of another kind is a mistake."""
    title = title_of(wanted)
    if family is None or wanted not in FAMILIES or not _same_blocks(family, wanted):
        said = FAMILIES[family].title if family else "of no family that this version knows"
        raise UsageError(
            f"the base model {shown(base)} is {said}, and the file is for {title}; give a base of {wanted}"
        )
    reason = f"{shown(base)} has the blocks of {title} in other widths: the picture needs a real base"
    note = Finding("base-widths", "note", "", f"{reason}.", f"Give a {wanted} model with --base.")
    return Rung("skipped", reason, findings=(note,))


def _same_blocks(first: str, second: str) -> bool:
    """Whether two families' UNets differ in widths alone; a shortcut is there only where the width changes."""
    paths = []
    for family in (first, second):
        unet = FAMILIES[family].component("unet")
        paths.append({path for path in unet.modules if not path.endswith("conv_shortcut")} if unet else None)
    return paths[0] == paths[1]


def _weight_norms(pipeline: Any, found: Detection) -> Mapping[str, float]:
    """‖W‖ of every adapted module of the base model."""
    live = live_modules(pipeline, found)
    names = [target.name for module in found.payload for target in module.modules]
    return {name: float(live[name].get_parameter("weight").detach().float().norm()) for name in names}

"""Drawing a suite's pictures: its pipelines one after the other, its cases' adapters, and what disturbs a picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lora_convert.errors import UsageError
from lora_convert.report import shown
from lora_convert.runtime.policy import Conditions
from lora_convert.runtime.rendering import Rendering, Settings, render
from lora_convert.runtime.suite import Case, GoldenPicture, Suite

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Progress", "Studio", "disturbed"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many pictures are done, and how many there are."""


class Studio:
    """A suite's pipelines, opened one after the other, each once for all cases of its base.

    What is wrong with a base or an adapter is raised as FileError; a wrong use as UsageError that names the case.
    """

    def __init__(self, suite: Suite, device: str | None, dtype: str | None, progress: Progress | None) -> None:
        self.suite = suite
        self.device, self.dtype = device or suite.device, dtype or suite.dtype
        self.progress = progress
        self.conditions: Conditions | None = None
        """What the last picture was drawn with."""
        self._opened: tuple[str, Any] = ("", None)
        self._alone: dict[Settings, Image.Image] = {}
        self._done = self._total = 0

    def cases(
        self, chosen: Sequence[Case], skipped: Collection[str]
    ) -> Iterator[tuple[Case, tuple[GoldenPicture, ...]]]:
        """Cases with those of their pictures that are not skipped, all of one base together."""
        wanted = [(case, tuple(picture for picture in case.pictures if picture.id not in skipped)) for case in chosen]
        self._total = sum(len(pictures) for _, pictures in wanted)
        for base in dict.fromkeys(case.base for case in chosen):
            yield from ((case, pictures) for case, pictures in wanted if pictures and case.base == base)

    def pipeline(self, case: Case) -> Any:
        """The case's base model."""
        from lora_convert.runtime.pipelines import open_pipeline

        if self._opened[0] != case.base:
            self._opened = ("", None)  # the one before goes first
            self._alone.clear()
            with self._naming(case):
                self._opened = (case.base, open_pipeline(case.base, self.device, self.dtype))
        return self._opened[1]

    @contextmanager
    def applied(self, case: Case) -> Iterator[None]:
        """The case's base model with its adapters."""
        from lora_convert.runtime.applying import apply

        pipeline = self.pipeline(case)
        with ExitStack() as adapters:
            with self._naming(case):
                for adapter in case.adapters:
                    adapters.callback(apply(pipeline, adapter.file, adapter.scale).remove)
            yield

    def draw(self, case: Case, picture: GoldenPicture) -> Rendering:
        """A picture, with the adapters that are applied at the time."""
        pipeline = self.pipeline(case)
        with self._naming(case):
            rendering = render(pipeline, picture.settings)
        self.conditions = Conditions.of(rendering.record)
        return rendering

    def alone(self, case: Case, picture: GoldenPicture) -> Image.Image:
        """The picture of the base without adapters, none being applied; cases may share it."""
        self.pipeline(case)
        if picture.settings not in self._alone:
            self._alone[picture.settings] = self.draw(case, picture).images[0]
        return self._alone[picture.settings]

    @contextmanager
    def _naming(self, case: Case) -> Iterator[None]:
        """Say in which case of which suite something is used wrongly."""
        try:
            yield
        except UsageError as error:
            raise UsageError(f'{shown(str(self.suite.path))}: case "{case.name}": {error}') from error

    def step(self, count: int = 1) -> None:
        self._done += count
        if self.progress:
            self.progress("drawing", self._done, self._total)


@contextmanager
def disturbed(pipeline: Any) -> Iterator[None]:
    """Every weight moved to a neighbour among its dtype's numbers, up or down by chance; afterwards it is back.

    That is about what another order of summing does, which is how processors, cards and versions differ.
    """
    import torch

    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    generator = torch.Generator().manual_seed(0)
    models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
    weights = {id(weight): weight for model in models for weight in model.parameters() if weight.is_floating_point()}
    with torch.no_grad(), ExitStack() as restored:
        for weight in weights.values():
            restored.callback(weight.copy_, weight.detach().to("cpu", copy=True))
            bits = weight.detach().view(integers[weight.element_size()])
            steps = torch.randint(0, 2, weight.shape, generator=generator, dtype=bits.dtype) * 2 - 1
            bits.add_(steps.to(bits.device) * (weight != 0))
        yield

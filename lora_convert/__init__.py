"""lora-convert: any LoRA file in, a Diffusers adapter that provably does the same thing out.

    >>> import lora_convert
    >>> lora_convert.identify("style.safetensors").family
    >>> lora_convert.convert("style.safetensors", "out/").ok

Importing the package imports neither torch nor numpy; each call imports what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_convert._version import __version__
from lora_convert.errors import FileError, LoraConvertError, UsageError
from lora_convert.report import Finding

if TYPE_CHECKING:
    from lora_convert.converters.convert import (
        ConvertResult,
        OutputRecord,
        ValidateResult,
        convert,
        plan,
        validate,
    )
    from lora_convert.converters.merge import MergeResult, merge
    from lora_convert.converters.plan import Plan
    from lora_convert.inspect.detection import Detection
    from lora_convert.inspect.identify import identify
    from lora_convert.runtime.applying import Applied, apply
    from lora_convert.runtime.climb import climb
    from lora_convert.runtime.picture import Drawing
    from lora_convert.runtime.pipelines import open_pipeline
    from lora_convert.runtime.rendering import Rendering, Settings, render

__all__ = [
    "Applied",
    "ConvertResult",
    "Detection",
    "Drawing",
    "FileError",
    "Finding",
    "LoraConvertError",
    "MergeResult",
    "OutputRecord",
    "Plan",
    "Rendering",
    "Settings",
    "UsageError",
    "ValidateResult",
    "__version__",
    "apply",
    "climb",
    "convert",
    "identify",
    "merge",
    "open_pipeline",
    "plan",
    "render",
    "validate",
]

_WHERE = {
    "Detection": "lora_convert.inspect.detection",
    "MergeResult": "lora_convert.converters.merge",
    "merge": "lora_convert.converters.merge",
    "Plan": "lora_convert.converters.plan",
    "identify": "lora_convert.inspect.identify",
    # what follows needs the `runtime` extra
    "Applied": "lora_convert.runtime.applying",
    "apply": "lora_convert.runtime.applying",
    "climb": "lora_convert.runtime.climb",
    "Drawing": "lora_convert.runtime.picture",
    "open_pipeline": "lora_convert.runtime.pipelines",
    "Rendering": "lora_convert.runtime.rendering",
    "Settings": "lora_convert.runtime.rendering",
    "render": "lora_convert.runtime.rendering",
}
_CALLS = "lora_convert.converters.convert"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE.get(name, _CALLS)), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""The same bytes from the same picture drawn twice on one machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

__all__ = ["deterministic"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_FIXED = ":16:8"


@contextmanager
def deterministic() -> Iterator[None]:
    """Only deterministic kernels and no TF32 for the length of a block; torch's settings are restored after it.

    They are the whole process's, so no other thread should draw meanwhile. The bytes still depend on the processor, its
    number of threads and torch's version.
    """
    import torch

    with ExitStack() as restored:
        # cuBLAS reads the variable when it is first used. Where that was before this block, torch would raise; with one
        # stream the workspace makes no difference, so then it may warn. On MPS it would raise for operations that have
        # no implementation that is marked as deterministic.
        cuda: Any = torch.cuda
        warns_only = (cuda.is_initialized() and _CUBLAS not in os.environ) or torch.backends.mps.is_available()
        _environment(restored, _CUBLAS, os.environ.get(_CUBLAS) or _CUBLAS_FIXED)
        before = torch.are_deterministic_algorithms_enabled()
        warned = torch.is_deterministic_algorithms_warn_only_enabled()
        restored.callback(torch.use_deterministic_algorithms, before, warn_only=warned)
        torch.use_deterministic_algorithms(True, warn_only=warns_only)
        _attribute(restored, torch.backends.cudnn, "deterministic", True)
        _attribute(restored, torch.backends.cudnn, "benchmark", False)
        _full_precision(restored)
        yield


def _environment(restored: ExitStack, name: str, value: str) -> None:
    before = os.environ.get(name)
    if before is None:
        restored.callback(os.environ.pop, name, None)
    else:
        restored.callback(os.environ.__setitem__, name, before)
    os.environ[name] = value


def _attribute(restored: ExitStack, owner: Any, name: str, value: object) -> None:
    restored.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _full_precision(restored: ExitStack) -> None:
    """Switch TF32 off by the switches that the process uses: torch raises where its older and newer ones are mixed."""
    import torch

    backends: Any = torch.backends

    def older_matmul() -> None:
        before = torch.get_float32_matmul_precision()
        if before != "highest":
            restored.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("highest")

    if getattr(backends, "fp32_precision", "none") not in ("none", "ieee"):
        _attribute(restored, backends, "fp32_precision", "ieee")
    _first_allowed(older_matmul, lambda: _attribute(restored, backends.cuda.matmul, "fp32_precision", "ieee"))
    _first_allowed(
        lambda: _attribute(restored, backends.cudnn, "allow_tf32", False),
        lambda: _attribute(restored, backends.cudnn.conv, "fp32_precision", "ieee"),
    )


def _first_allowed(older: Callable[[], None], newer: Callable[[], None]) -> None:
    try:
        older()
    except RuntimeError:
        newer()

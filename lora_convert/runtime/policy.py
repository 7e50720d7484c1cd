"""How far a picture may be from its golden picture, by what differs between the two machines that drew them.

Floating-point sums depend on their order, which depends on the processor, the device and the version of torch. One
tolerance for all of them would be blind on one machine or fail for nothing on another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from lora_convert.runtime.comparing import Difference

__all__ = ["FIGURES", "POLICY", "Conditions", "Level", "Tolerance", "level_between"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The worst figures of a `Difference` that still pass."""

    tile_difference: float
    tile_ssim: float
    flip: float

    def admits(self, difference: Difference) -> bool:
        return not any(self.excesses(difference))

    def excesses(self, difference: Difference) -> Iterator[str]:
        """A phrase for each figure that does not pass."""
        if not difference.tile_difference <= self.tile_difference:
            yield f"tile difference {difference.tile_difference:.4f} (at most {self.tile_difference:.4f})"
        if not difference.tile_ssim >= self.tile_ssim:
            yield f"tile SSIM {difference.tile_ssim:.4f} (at least {self.tile_ssim:.4f})"
        if not difference.flip <= self.flip:
            yield f"FLIP {difference.flip:.4f} (at most {self.flip:.4f})"

    def above(self, noise: Difference, times: float) -> Tolerance:
        """The same, or so many times the noise where that is more."""
        return Tolerance(
            max(self.tile_difference, times * noise.tile_difference),
            min(self.tile_ssim, 1 - times * (1 - noise.tile_ssim)),
            max(self.flip, times * noise.flip),
        )

    def given(self, figures: Mapping[str, float]) -> Tolerance:
        """The same with some of its figures replaced."""
        return replace(self, **figures)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


FIGURES = tuple(field.name for field in fields(Tolerance))
"""What a difference is judged by."""


@dataclass(frozen=True, slots=True)
class Level:
    """One row of the policy."""

    name: Literal["strict", "loose", "wide"]
    tolerance: Tolerance
    noise: float
    """The golden picture's own noise counts so many times, where that is more than the tolerance."""

    def above_noise(self, repeated: Difference, disturbed: Difference) -> Tolerance:
        """The tolerance for a picture that differs so much when drawn again, and when last bits change.

        The latter is what other conditions do, so under the same ones it does not count.
        """
        noise = repeated if self.name == "strict" else repeated.worst(disturbed)
        return self.tolerance.above(noise, self.noise)


POLICY: Mapping[str, Level] = {
    level.name: level
    for level in (
        # Same device, processor or card, dtype and torch x.y: equal bytes; other numbers of threads cost a level.
        Level("strict", Tolerance(0.001, 0.999, 0.01), 2),
        # Same kind of device and dtype, but another processor, card or torch x.y: a few values are a level off.
        Level("loose", Tolerance(0.002, 0.995, 0.02), 3),
        # Another kind of device: about what a level up or down in every value makes.
        Level("wide", Tolerance(0.004, 0.975, 0.04), 5),
    )
}
"""Tolerances by level, tightest first; docs/golden.md says where the figures come from."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a picture's last bits depend on besides its settings."""

    device: str
    """Kind of device: `cpu`, `cuda`, `mps`."""
    chip: str
    """The processor's architecture and instruction set, or the card's name."""
    dtype: str
    """What the pipeline computed in: `fp32`, `fp16`, `bf16`."""
    torch: str
    """Version, in full."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Conditions:
        """The conditions that the record of a rendering tells. Raises KeyError or TypeError if it does not."""
        device = record["device"]
        values = (device["kind"], device["name"], record["dtype"], record["versions"]["torch"])
        if not all(isinstance(value, str) for value in values):
            raise TypeError("conditions are text")
        return cls(*values)

    def __str__(self) -> str:
        return f"{self.device} ({self.chip}), {self.dtype}, torch {self.torch}"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def level_between(then: Conditions, now: Conditions) -> tuple[Level | None, tuple[str, ...]]:
    """The level at which pictures drawn under these conditions are compared, and what differs between them.

    The level is None for another dtype: rounding to one is as large as a small mistake, so it is not comparable.
    """
    differs = {
        "device": then.device != now.device,
        "chip": then.chip != now.chip,
        "dtype": then.dtype != now.dtype,
        "torch": _minor(then.torch) != _minor(now.torch),
    }
    reasons = tuple(f"{name} {getattr(then, name)}, now {getattr(now, name)}" for name in differs if differs[name])
    if differs["dtype"]:
        return None, reasons
    return POLICY["wide" if differs["device"] else "loose" if any(differs.values()) else "strict"], reasons

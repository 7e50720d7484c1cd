"""Which base model an embedding is for, and which text encoder each of its tensors: by names and widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_convert.containers import Header
from lora_convert.families.encoders import EMBEDDING_FAMILIES, title_of
from lora_convert.inspect.detection import Rival
from lora_convert.inspect.embedding_forms import NamedVectors, widths
from lora_convert.inspect.trainers import family_hints
from lora_convert.report import Finding, listed

__all__ = ["Choice", "choose", "family_of"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The base model that the vectors are for, if it can be known, and the encoder of every tensor."""

    family: str | None
    encoders: Mapping[str, str]
    evidence: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    findings: tuple[Finding, ...] = ()


def _fit(found: Sequence[NamedVectors], family: str) -> dict[str, str] | None:
    """The encoder of every tensor, if the family has encoders of these names and widths."""
    encoders = EMBEDDING_FAMILIES[family]
    placed: dict[str, str] = {}
    for one in found:
        keys = [e.key for e in encoders if e.width == one.vectors.width and one.encoder in (None, e.key)]
        if not keys:
            return None
        placed[one.vectors.tensor] = keys[0]
    return placed


def _candidates(
    found: Sequence[NamedVectors], header: Header, family: str | None
) -> tuple[Sequence[str], tuple[str, ...]]:
    """The base models to try, and why not all of them."""
    if family is not None:
        return (family,), (f"the family {family} was given or is the LoRA's",)
    hints = family_hints(header.metadata)
    hinted = [name for name in EMBEDDING_FAMILIES if name in hints and _fit(found, name) is not None]
    if hinted:
        return hinted[:1], (hints[hinted[0]],)
    limits = [one.form for one in found if one.form.families is not None]
    if limits:
        known = set(limits[0].families or ()).intersection(*(form.families or () for form in limits))
        names = [name for name in EMBEDDING_FAMILIES if name in known]
        if any(_fit(found, name) is not None for name in names):
            titles = "one text encoder" if "sd15" in names else "Stable Diffusion XL"
            return names, (f"{limits[0].title} is written for base models with {titles}",)
    return tuple(EMBEDDING_FAMILIES), ()


def choose(found: Sequence[NamedVectors], header: Header, family: str | None) -> Choice:
    """The base model whose text encoders the vectors fit, `family` if that is given; None where several do."""
    names, evidence = _candidates(found, header, family)
    fits = {name: placed for name in names if (placed := _fit(found, name)) is not None}
    if not fits:
        elsewhere = (placed for name in EMBEDDING_FAMILIES if (placed := _fit(found, name)) is not None)
        return Choice(family, next(elsewhere, {}), findings=(_misfit(found, family),))
    whole = [name for name, placed in fits.items() if _is_whole(placed, name)]
    if len(fits) == 1 or (len(whole) == 1 and len(set(fits[whole[0]].values())) > 1):
        chosen = whole[0] if whole else next(iter(fits))
        rivals = tuple(Rival(name, 0, _half(name, fits[name])) for name in fits if name != chosen)
        return Choice(chosen, fits[chosen], evidence, rivals)
    rivals = tuple(Rival(name, 0, _half(name, fits[name])) for name in fits)
    return Choice(None, fits[(whole or list(fits))[0]], evidence, rivals, (_open(found[0].vectors.width, fits),))


def _is_whole(placed: Mapping[str, str], family: str) -> bool:
    return set(placed.values()) == {encoder.key for encoder in EMBEDDING_FAMILIES[family]}


def _half(family: str, placed: Mapping[str, str]) -> str:
    """What it would be to that family."""
    lacking = [encoder.key for encoder in EMBEDDING_FAMILIES[family] if encoder.key not in placed.values()]
    title = title_of(family)
    return f"without vectors for {', '.join(lacking)} of {title}" if lacking else f"an embedding for {title}"


def _open(width: int, fits: Mapping[str, Mapping[str, str]]) -> Finding:
    """The note that several base models have an encoder of this width."""
    places = {
        (encoder.key, encoder.component)
        for name, placed in fits.items()
        for encoder in EMBEDDING_FAMILIES[name]
        if encoder.key in placed.values()
    }
    message = f"Vectors of {width} numbers are for {listed([title_of(name) for name in fits])}; the file does not say."
    if len(places) == 1:
        fix = "The converted file is the same for all of them; --family names the one that is meant."
        return Finding("ambiguous-family", "note", "", message, fix)
    fix = f"Name it: --family {' or '.join(fits)}."
    return Finding("ambiguous-family", "warning", "", message, fix)


def _misfit(found: Sequence[NamedVectors], family: str | None) -> Finding:
    known = set(widths())
    odd = next((one for one in found if one.vectors.width not in known), None)
    if odd is not None:
        message = f"Its vectors have {odd.vectors.width} numbers; text encoders that are known take {_listed_widths()}."
        return Finding("unknown-width", "warning", odd.vectors.tensor, message)
    sizes = " and ".join(sorted({f"{one.encoder or 'vectors'} of {one.vectors.width}" for one in found}))
    if family is not None:
        takes = ", ".join(f"{encoder.key} of {encoder.width}" for encoder in EMBEDDING_FAMILIES[family])
        message = f"It has {sizes}, and {title_of(family)} takes {takes}."
        return Finding("shape-misfit", "error", found[0].vectors.tensor, message, "Is it for another base model?")
    message = f"No base model that is known has text encoders for {sizes} together."
    return Finding("shape-misfit", "error", found[0].vectors.tensor, message)


def _listed_widths() -> str:
    rows: dict[int, list[str]] = {}
    for encoders in EMBEDDING_FAMILIES.values():
        for encoder in encoders:
            if encoder.key not in rows.setdefault(encoder.width, []):
                rows[encoder.width].append(encoder.key)
    return ", ".join(f"{width} ({' or '.join(keys)})" for width, keys in sorted(rows.items()))


def family_of(found: Sequence[NamedVectors], header: Header) -> str | None:
    """The base model that vectors are for, if they alone tell."""
    return choose(found, header, None).family

"""The proof of a converted embedding: every vector of the source is in the output, under the right text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_convert.containers import Source
from lora_convert.converters.embeddings import Array, read_vectors
from lora_convert.converters.fidelity import TOLERANCE, Rung
from lora_convert.inspect.detection import Detection, Embedding
from lora_convert.report import Finding, counted, json_number, listed, shown

__all__ = ["check_values", "check_vectors"]

Opened = tuple[Source, Detection]


def check_values(outputs: Sequence[Opened]) -> Rung:
    """The rung `numbers` of embeddings: no NaN, no infinity; all zeros are said."""
    findings = []
    for source, found in outputs:
        for embedding in found.embeddings:
            for key, values in read_vectors(source, embedding).items():
                subject = embedding.vectors[key].tensor
                if not np.isfinite(values.astype(np.float64)).all():
                    findings.append(Finding("not-finite", "error", subject, "Its vectors hold NaN or infinity."))
    failed = bool(findings)
    return Rung("fail" if failed else "pass", findings=tuple(findings))


def _pairs(ours: Sequence[Embedding], theirs: Sequence[Embedding]) -> dict[int, int]:
    """The embedding of the source that each of the output is: by name, in whatever case, else by order."""
    names = [embedding.token.lower() for embedding in theirs]
    pairs = {k: names.index(e.token.lower()) for k, e in enumerate(ours) if e.token.lower() in names}
    left = [number for number in range(len(theirs)) if number not in pairs.values()]
    return pairs | dict(zip((k for k in range(len(ours)) if k not in pairs), left, strict=False))


def check_vectors(outputs: Sequence[Opened], against: Opened) -> Rung:
    """The rung `vectors`: the relative error of every vector, in L2 norm; bit for bit where the dtype is the same.

    An output's embeddings may lie in several files, one for each text encoder.
    """
    source, truth = against
    ours = _together(outputs)
    theirs = [read_vectors(source, embedding) for embedding in truth.embeddings]
    names = [embedding.token for embedding in truth.embeddings]
    pairs = _pairs([embedding for embedding, _ in ours], truth.embeddings)
    findings, worst, exact, count = [], 0.0, 0, 0
    missing = [names[number] for number in range(len(names)) if number not in pairs.values()]
    surplus = [ours[k][0].token for k in range(len(ours)) if k not in pairs]
    if missing:
        findings.append(_mismatch("", f"of the source's embeddings these are not in the output: {listed(missing)}."))
    if surplus:
        findings.append(_mismatch("", f"of the output's embeddings these are not in the source: {listed(surplus)}."))
    for k, number in pairs.items():
        wanted, written = theirs[number], ours[k][1]
        if wanted.keys() != written.keys():
            said = f"the source has vectors for {', '.join(wanted)}, the output for {', '.join(written) or 'none'}."
            findings.append(_mismatch(names[number], said))
            continue
        for key in wanted:
            errors = _errors(wanted[key], written[key])
            if errors is None:
                said = f"for {key} there are {counted(len(wanted[key]), 'vector')}, the output has {len(written[key])}."
                findings.append(_mismatch(names[number], said))
                continue
            worst, count = max(worst, *errors, 0.0), count + len(errors)
            exact += sum(error == 0 for error in errors)
            allowed = _allowed(truth.embeddings[number].vectors[key].dtype, ours[k][0].vectors[key].dtype)
            wrong = [row for row, error in enumerate(errors) if not error <= allowed]
            if wrong:
                said = f"vector {wrong[0] + 1} for {key} differs by {errors[wrong[0]]:.2e}; {allowed:.1e} is allowed."
                findings.append(_mismatch(names[number], said))
    figures: Mapping[str, Any] = {"vectors": count, "exact_vectors": exact, "worst": json_number(worst)}
    return Rung("fail" if findings else "pass", figures=figures, findings=tuple(findings))


def _together(outputs: Sequence[Opened]) -> list[tuple[Embedding, dict[str, Array]]]:
    """The embeddings of several files by token, with the vectors for all text encoders."""
    found: dict[str, tuple[Embedding, dict[str, Array]]] = {}
    for source, detection in outputs:
        for embedding in detection.embeddings:
            values = read_vectors(source, embedding)
            if embedding.token in found:
                first, vectors = found[embedding.token]
                merged = Embedding(first.token, {**first.vectors, **embedding.vectors}, stated=first.stated)
                found[embedding.token] = merged, {**vectors, **values}
            else:
                found[embedding.token] = embedding, values
    return list(found.values())


def _allowed(source: str, output: str) -> float:
    """What rounding to the output's dtype may cost; nothing where it is the source's."""
    return 0.0 if source == output else TOLERANCE.get(output, 0.0)


def _errors(wanted: Array, written: Array) -> list[float] | None:
    """The relative error of every vector; None if there are not as many, or not as wide ones."""
    if wanted.shape != written.shape:
        return None
    first, second = wanted.astype(np.float64), written.astype(np.float64)
    norms, distances = np.linalg.norm(first, axis=1), np.linalg.norm(first - second, axis=1)
    return [float(d) if d == 0 else float(d / n) if n else float("inf") for d, n in zip(distances, norms, strict=True)]


def _mismatch(token: str, said: str) -> Finding:
    return Finding("vectors-mismatch", "error", shown(token), said[:1].upper() + said[1:])

"""The proof of a converted embedding: every vector of the source is in the output, under the right text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_convert.containers import Source
from lora_convert.converters.embedding_record import RECORD_NAME, read_record, snippet_of
from lora_convert.converters.embeddings import Array, misplaced, read_vectors
from lora_convert.converters.fidelity import TOLERANCE, Rung
from lora_convert.converters.metadata import PROVENANCE
from lora_convert.hashes import sha256_of
from lora_convert.inspect.detection import Detection, Embedding
from lora_convert.report import Finding, counted, json_number, listed, shown

__all__ = ["check_record", "check_values", "check_vectors"]

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


@dataclass(frozen=True, slots=True)
class _Written:
    """An embedding of the output with its vectors for all text encoders, and the token that it had in the source."""

    embedding: Embedding
    vectors: dict[str, Array]
    source_token: str


def _pairs(ours: Sequence[_Written], theirs: Sequence[Embedding]) -> dict[int, int]:
    """The embedding of the source that each of the output is: by name, in whatever case, else by order."""
    names = [embedding.token.lower() for embedding in theirs]
    pairs: dict[int, int] = {}
    for k, one in enumerate(ours):
        number = names.index(one.source_token.lower()) if one.source_token.lower() in names else None
        if number is not None and number not in pairs.values():
            pairs[k] = number
    left = [number for number in range(len(theirs)) if number not in pairs.values()]
    return pairs | dict(zip((k for k in range(len(ours)) if k not in pairs), left, strict=False))


@dataclass
class _Comparison:
    """What came of comparing vectors: how many, how many exactly, the largest relative error, and what is wrong."""

    findings: list[Finding]
    vectors: int = 0
    exact: int = 0
    worst: float = 0.0

    def compare(self, truth: Embedding, wanted: Mapping[str, Array], written: _Written) -> None:
        """Compare the vectors of one embedding, `wanted` being the source's by text encoder."""
        if wanted.keys() != written.vectors.keys():
            ours = ", ".join(written.vectors) or "none"
            said = f"the source has vectors for {', '.join(wanted)}, the output for {ours}."
            self.findings.append(_mismatch(truth.token, said))
            return
        for key, values in wanted.items():
            errors = _errors(values, written.vectors[key])
            if errors is None:
                there = counted(len(values), "vector")
                said = f"for {key} there are {there}, the output has {len(written.vectors[key])}."
                self.findings.append(_mismatch(truth.token, said))
                continue
            self.worst, self.vectors = max(self.worst, *errors, 0.0), self.vectors + len(errors)
            self.exact += sum(error == 0 for error in errors)
            allowed = _allowed(truth.vectors[key].dtype, written.embedding.vectors[key].dtype)
            wrong = [row for row, error in enumerate(errors) if not error <= allowed]
            if wrong:
                said = f"vector {wrong[0] + 1} for {key} differs by {errors[wrong[0]]:.2e}; {allowed:.1e} is allowed."
                self.findings.append(_mismatch(truth.token, said))


def check_vectors(outputs: Sequence[Opened], against: Opened, record: Sequence[Finding] = ()) -> Rung:
    """The rung `vectors`: the relative error of every vector, in L2 norm; bit for bit where the dtype is the same.

    An output's embeddings may lie in several files, one for each text encoder. `record` is what `check_record` found.
    """
    source, truth = against
    found = _Comparison([*record, *(said for _, output in outputs for said in _misnamed(output))])
    ours = _together(outputs, found.findings)
    pairs = _pairs(ours, truth.embeddings)
    missing = [one.token for number, one in enumerate(truth.embeddings) if number not in pairs.values()]
    surplus = [one.embedding.token for k, one in enumerate(ours) if k not in pairs]
    for there, absent, tokens in (("source", "output", missing), ("output", "source", surplus)):
        if tokens:
            said = f"of the {there}'s embeddings these are not in the {absent}: {listed(tokens)}."
            found.findings.append(_mismatch("", said))
    for k, number in pairs.items():
        embedding = truth.embeddings[number]
        found.compare(embedding, read_vectors(source, embedding), ours[k])
    figures = {"vectors": found.vectors, "exact_vectors": found.exact, "worst": json_number(found.worst)}
    return Rung("fail" if found.findings else "pass", figures=figures, findings=tuple(found.findings))


def check_record(folder: Path, outputs: Sequence[Opened]) -> list[Finding]:
    """What the record in a folder says otherwise than the files; nothing if there is no record.

    Who loads by it gives the token along, so that Diffusers asks no file for its own, and may run its lines.
    """
    try:
        record = read_record(folder / RECORD_NAME)
        said = {
            str(file["file"]): (str(entry["token"]), str(file["encoder"]))
            for entry in record["embeddings"]
            for file in entry["files"]
        }
        sha256 = str(record["sha256"])
        strange = record["snippet"] != snippet_of(record["embeddings"], record["family"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return [_mismatch("", f"the record {RECORD_NAME} cannot be read.")]
    files = {Path(found.file).name: (source, found) for source, found in outputs if found.kind == "embedding"}
    held = {name: _in_short(found) for name, (_, found) in files.items()}
    wrong = sorted(name for name in said.keys() | held.keys() if said.get(name) != held.get(name))
    wrong += [name for name, file in files.items() if name not in wrong and not _comes_from(*file, sha256)]
    findings = [_mismatch("", f"the record {RECORD_NAME} says otherwise of {listed(wrong)}.")] if wrong else []
    if strange:
        findings.append(_mismatch("", f"the lines of Python in {RECORD_NAME} are not those that load these files."))
    return findings


def _in_short(found: Detection) -> tuple[str, str]:
    """What a file says itself of what the record says of it: token and text encoder."""
    encoder = (found.metadata or {}).get(f"{PROVENANCE}encoder", ",".join(found.embeddings[0].vectors))
    return found.embeddings[0].token, encoder


def _comes_from(source: Source, found: Detection, sha256: str) -> bool:
    """Whether a file was made of the source of this SHA-256, or is a copy of it because it was one of ours."""
    return (found.metadata or {}).get(f"{PROVENANCE}source_sha256") == sha256 or sha256_of(source.chunks()) == sha256


def _misnamed(found: Detection) -> Iterator[Finding]:
    """What a file's name or header says otherwise than its content."""
    said = (found.metadata or {}).get(f"{PROVENANCE}token")
    for embedding in found.embeddings:
        if found.kind == "embedding" and said not in (None, embedding.token):
            yield _mismatch(embedding.token, f"the file's header says that its token is {shown(said or '')}.")
        for key in misplaced(found, embedding):
            yield _mismatch(embedding.token, f"{shown(found.file)} is by its name not the file for {key}.")


def _together(outputs: Sequence[Opened], findings: list[Finding]) -> list[_Written]:
    """The embeddings of several files by token; `findings` gets those that are there twice."""
    found: dict[str, _Written] = {}
    for source, detection in outputs:
        for embedding in detection.embeddings:
            values, token = read_vectors(source, embedding), embedding.token
            if token not in found:
                source_token = (detection.metadata or {}).get(f"{PROVENANCE}source_token", token)
                found[token] = _Written(embedding, values, source_token)
                continue
            first = found[token]
            if twice := first.vectors.keys() & values.keys():
                findings.append(_mismatch(token, f"two files have vectors for {', '.join(sorted(twice))}."))
            merged = Embedding(token, {**first.embedding.vectors, **embedding.vectors}, stated=first.embedding.stated)
            found[token] = _Written(merged, {**first.vectors, **values}, first.source_token)
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
    if wanted.dtype == written.dtype:  # 0 and -0 are not the same bits
        same = [one.tobytes() == other.tobytes() for one, other in zip(wanted, written, strict=True)]
        distances = np.where(same, 0.0, np.maximum(distances, np.finfo(np.float64).tiny))
    return [float(d) if d == 0 else float(d / n) if n else float("inf") for d, n in zip(distances, norms, strict=True)]


def _mismatch(token: str, said: str) -> Finding:
    return Finding("vectors-mismatch", "error", shown(token), said[:1].upper() + said[1:])

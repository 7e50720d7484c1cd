"""Weight files on the Hugging Face hub, by address: `hf://owner/repo[@revision]/path/file.safetensors`.

A file is opened in place and read by HTTP ranges, so that looking at gigabytes costs kilobytes; one that lies in the
hub's cache is read there. Tokens, endpoint, proxies, cache and offline mode are those of `huggingface_hub` (HF_TOKEN,
HF_ENDPOINT, HTTPS_PROXY, HF_HOME, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import huggingface_hub
from huggingface_hub import constants, utils
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    http_backoff,
    validate_repo_id,
)

from lora_convert._version import __version__
from lora_convert.containers.source import FileReader, Reader, open_path
from lora_convert.errors import FileError, UsageError
from lora_convert.report import Finding, listed, printable, shown

__all__ = ["RangeReader", "download", "download_beside", "download_folder", "open_hub_file"]

_BLOCK = 1 << 16
"""Bytes read at least: scalars that lie near each other come with one request."""

_FIRST_BLOCKS = 4
"""Read at once when a file is opened: the whole header of most LoRA files (110 kB for SD 1.5, 400 kB for SDXL)."""

_MOST_BLOCKS = 64
"""Kept in memory between reads, 4 MiB."""

_RETRIES = 2

_CALLER: dict[str, Any] = {"library_name": "lora-convert", "library_version": __version__}

_ADDRESS = re.compile(
    r"hf://(?:models/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/pr/\d+|refs/convert/[\w.-]+|[^/@]+))?"
    r"(?:/(?P<path>.*))?"
)
"""What `huggingface_hub.parse_hf_uri` (from 1.13) accepts for models."""

_OTHER_KINDS = ("dataset", "space", "kernel", "bucket")


@dataclass(frozen=True, slots=True)
class _Place:
    """A file of a model repository; a folder or the whole repository until `_file_at` has found the file."""

    repo: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        revision = ""
        if self.revision is not None:
            revision = "@" + quote(self.revision, safe="/" if self.revision.startswith("refs/") else "")
        return f"hf://{self.repo}{revision}" + (f"/{self.path}" if self.path else "")


def _parse(address: str) -> _Place:
    """The place that an address names. Raises UsageError if it is malformed, or names something else than a model."""
    said = shown(address)
    kind = address.removeprefix("hf://").partition("/")[0].removesuffix("s")
    if kind in _OTHER_KINDS:
        raise UsageError(f"{said} is in a {kind}; only model repositories are read: hf://owner/repo/file.safetensors")
    match = _ADDRESS.fullmatch(address)
    if match is None or printable(address) != address:
        raise UsageError(f"{said} is not an address on the hub: hf://owner/repo[@revision]/path/file.safetensors")
    place = _Place(match["repo"], match["revision"] and unquote(match["revision"]), (match["path"] or "").rstrip("/"))
    parts = {part for text in (place.path, place.revision) if text for part in re.split(r"[/\\]", text)}
    if parts & {"", ".", ".."}:
        raise UsageError(f"{said} has an empty, `.` or `..` part, which no path on the hub has")
    try:
        validate_repo_id(place.repo)
    except HFValidationError:
        raise UsageError(f"{said}: {shown(place.repo)!r} cannot be the name of a repository on the hub") from None
    return place


_REFUSALS: Mapping[str, tuple[str, str]] = {
    "GatedRepo": (
        "The repository {repo} is gated.",
        "Accept its conditions at {page}, and set HF_TOKEN to your token (or run `hf auth login`).",
    ),
    "RepoNotFound": (
        "The hub has no repository {repo}, or it is private.",
        "Check the name; for a private repository set HF_TOKEN to a token that may read it.",
    ),
    "RevisionNotFound": (
        "The repository {repo} has no revision {revision}.",
        "Name a branch, a tag or a commit after the @.",
    ),
    "EntryNotFound": (
        "The repository {repo} has no file {path}{at}.",
        "Upper and lower case matter; without the path, its only weight file is taken, or all are listed.",
    ),
    "401": (
        "The hub refuses access to {repo} (HTTP 401): there is no such repository, it is private, or the token is bad.",
        "Check the name, and set HF_TOKEN to a valid token that may read it.",
    ),
    "403": (
        "The hub refuses access to {repo} (HTTP 403).",
        "If {page} asks for a licence to be accepted, accept it, and set HF_TOKEN to a token that may read it.",
    ),
    "404": ("The hub has nothing at this address (HTTP 404).", "Check the address, and HF_ENDPOINT if it is set."),
    "429": (
        "The hub takes no more requests for now (HTTP 429).",
        "Wait some minutes, or set HF_TOKEN: signed in, more are allowed.",
    ),
    "5xx": ("The hub has a problem of its own (HTTP {status}).", "Try again later."),
}
"""What the hub's `X-Error-Code`, or else the HTTP status, means, and what to do."""


def _unreadable(message: str, fix: str = "") -> FileError:
    return FileError([Finding("unreadable", "error", "", message, fix)])


def _refused(place: _Place, status: int, code: str | None) -> FileError:
    """What an HTTP status of 400 or more means for a place."""
    key = code if code in _REFUSALS else "5xx" if status >= 500 else str(status)
    message, fix = _REFUSALS.get(key or "", ("The hub refuses the request (HTTP {status}).", ""))
    facts = {
        "repo": place.repo,
        "revision": place.revision or constants.DEFAULT_REVISION,
        "path": shown(place.path),
        "at": f" at {place.revision}" if place.revision else "",
        "page": f"{constants.ENDPOINT}/{place.repo}",
        "status": status,
    }
    return _unreadable(message.format(**facts), fix.format(**facts))


def _offline(what: str) -> FileError:
    fix = "Download it once without HF_HUB_OFFLINE, or give the path of a local file."
    return _unreadable(f"{what} in the cache, and the hub is not asked (HF_HUB_OFFLINE).", fix)


def _failed(place: _Place, error: BaseException) -> FileError:
    """An exception out of huggingface_hub, or of the HTTP library below it, as a sentence."""
    if isinstance(error, FileError):
        return error
    response = getattr(error, "response", None)
    if response is not None:
        return _refused(place, response.status_code, response.headers.get("X-Error-Code"))
    if isinstance(error, OfflineModeIsEnabled):
        return _offline(f"{place} is not")
    if isinstance(error, EntryNotFoundError) and error.__cause__ is not None:
        return _failed(place, error.__cause__)  # "not in the cache": the cause says why it could not be fetched
    reason = shown(next(iter(str(error).splitlines()), type(error).__name__).rstrip("."), 200)
    if isinstance(error, OSError) and error.errno is not None:
        return _unreadable(f"The file could not be fetched: {reason}.")
    fix = "Check the connection, and HF_ENDPOINT and HTTPS_PROXY if they are set."
    return _unreadable(f"The hub could not be asked: {reason}.", fix)


@contextlib.contextmanager
def _sentences(place: _Place) -> Iterator[None]:
    """Turn whatever a call of huggingface_hub raises into FileError.

    It raises its own errors, those of requests, httpx or httpx2 (by version), of the JSON parser, of the file system.
    """
    try:
        yield
    except Exception as error:
        raise _failed(place, error) from None


def _cached(place: _Place) -> Path | None:
    found = huggingface_hub.try_to_load_from_cache(place.repo, place.path, revision=place.revision)
    return Path(found) if isinstance(found, str) else None


def _names_in(place: _Place) -> list[str]:
    """The names of all files of a place's repository. Raises FileError if the hub cannot be asked."""
    with _sentences(place):
        api = huggingface_hub.HfApi(**_CALLER)
        info = api.model_info(place.repo, revision=place.revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        return sorted(file.rfilename for file in info.siblings or ())


def _file_at(place: _Place) -> _Place:
    """The place itself if it is a file, else the only safetensors file in it. Raises FileError if there is not one."""
    if place.path.endswith(".safetensors") or (place.path and _cached(place)):
        return place
    if constants.HF_HUB_OFFLINE:
        fix = f"Name the file: {replace(place, path='')}/path/file.safetensors."
        raise _unreadable(f"{place} names no file, and offline the hub cannot be asked what there is.", fix)
    names = _names_in(place)
    if place.path in names:
        return place
    inside = [name for name in names if not place.path or name.startswith(f"{place.path}/")]
    if place.path and not inside:
        raise _refused(place, 404, "EntryNotFound")
    found = [name for name in inside if name.endswith(".safetensors")]
    if not found:
        raise _unreadable(f"{place} has no .safetensors file.", "Name the file if it has another ending.")
    if len(found) > 1:
        message = f"{place} has {len(found)} weight files: {listed(found, 20)}."
        fix = f"Name one of them, for example {replace(place, path=found[0])}."
        raise FileError([Finding("several-files", "error", "", message, fix)])
    return replace(place, path=found[0])


def open_hub_file(address: str) -> tuple[Reader, str, bool]:
    """A reader of a file on the hub, the full address of the file, and whether it is read over the network.

    The cache is looked at first, without asking the hub whether the file has changed since. An address without a file
    means the only safetensors file of the repository or folder. Raises UsageError for a malformed address, FileError
    (`unreadable`, `several-files`) for everything else.
    """
    place = _file_at(_parse(address))
    cached = _cached(place)
    if cached is not None:
        return FileReader(open_path(cached), owned=True), str(place), False
    if constants.HF_HUB_OFFLINE:
        raise _offline(f"{place} is not")
    return RangeReader(place), str(place), True


@dataclass(frozen=True, slots=True)
class _Part:
    """What a range request brought: the bytes, the size of the whole file, and the commit it is of, if told."""

    data: bytes
    total: int
    commit: str | None


def _stream(url: str, headers: Mapping[str, str]) -> AbstractContextManager[Any]:
    """A GET whose body is not read yet. Redirects to another host carry no token: the HTTP library sees to that."""
    options: dict[str, Any] = {
        "headers": headers,
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
        "max_retries": _RETRIES,
        "retry_on_exceptions": (),  # versions 1.0 to 1.17 at least retry on a client that they have closed
    }
    stream: Any = getattr(utils, "http_stream_backoff", None)
    answer: AbstractContextManager[Any]
    if stream is not None:
        answer = stream("GET", url, follow_redirects=True, **options)
    else:
        response: Any = http_backoff("GET", url, stream=True, **options)  # before 1.0, on requests
        answer = response
    return answer


def _span(response: Any) -> tuple[int, int, int] | None:
    """First byte, end and total size of what a response holds, by its headers; None if it does not say."""
    if response.status_code == 200 and response.headers.get("Content-Length", "").isdecimal():
        size = int(response.headers["Content-Length"])
        return 0, size, size
    told = response.headers.get("Content-Range", "")
    if response.status_code == 416 and told == "bytes */0":
        return 0, 0, 0
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", told)
    if response.status_code != 206 or match is None:
        return None
    return int(match[1]), int(match[2]) + 1, int(match[3])


def _body(response: Any, size: int) -> bytes:
    """The body of a response, which must have `size` bytes; never much more is read."""
    data = bytearray()
    chunks = response.iter_raw if hasattr(response, "iter_raw") else response.iter_content
    for chunk in chunks(_BLOCK) if size else ():
        data += chunk
        if len(data) > size:
            break
    if len(data) != size:
        raise _unreadable(f"The server promised {size:,} bytes and sent {len(data):,}.", "Try again.")
    return bytes(data)


def _part(place: _Place, url: str, headers: Mapping[str, str], start: int, stop: int) -> _Part:
    """Bytes `start` to `stop` (exclusive), fewer only where the file ends. Raises FileError."""
    asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with _sentences(place), _stream(url, asked) as response:
        span = _span(response)
        if span is None and response.status_code >= 400:
            raise _refused(place, response.status_code, response.headers.get("X-Error-Code"))
        if span is None or span[:2] != (start, min(stop, span[2])):
            message = f"The server does not send the part of the file asked for (HTTP {response.status_code})."
            raise _unreadable(message, "Download the file, and give its path.")
        headers_seen = [answer.headers for answer in (*response.history, response)]
        commit = next((seen["X-Repo-Commit"] for seen in headers_seen if "X-Repo-Commit" in seen), None)
        return _Part(_body(response, span[1] - start), span[2], commit)


class RangeReader:
    """A file on the hub, read by HTTP range requests in blocks, of which the latest are kept.

    All reads are of the commit that the first one met, whatever is pushed meanwhile. Safe from several threads.
    """

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._lock = threading.Lock()
        with _sentences(place):
            self._headers = build_hf_headers(**_CALLER)
            self._url = huggingface_hub.hf_hub_url(place.repo, place.path, revision=place.revision)
        part = _part(place, self._url, self._headers, 0, _FIRST_BLOCKS * _BLOCK)
        self.size = part.total
        self._blocks: dict[int, bytes] = {}
        self._keep(0, part.data)
        if part.commit is not None:
            self._url = huggingface_hub.hf_hub_url(place.repo, place.path, revision=part.commit)

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises FileError if the hub does not give them."""
        if size == 0:
            return b""
        if offset + size > self.size:
            raise _unreadable(f"{size:,} bytes at offset {offset:,} were expected; the file has {self.size:,} in all.")
        numbers = range(offset // _BLOCK, (offset + size - 1) // _BLOCK + 1)
        if len(numbers) > _MOST_BLOCKS:
            return self._fetch(offset, offset + size)
        with self._lock:
            absent = [number for number in numbers if number not in self._blocks]
            if absent:
                start, stop = absent[0] * _BLOCK, min((absent[-1] + 1) * _BLOCK, self.size)
                self._keep(absent[0], self._fetch(start, stop))
            data = b"".join(self._blocks[number] for number in numbers)
            while len(self._blocks) > _MOST_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
        start = offset - numbers[0] * _BLOCK
        return data[start : start + size]

    def _fetch(self, start: int, stop: int) -> bytes:
        part = _part(self._place, self._url, self._headers, start, stop)
        if part.total != self.size:
            raise _unreadable(f"The file had {self.size:,} bytes, and now {part.total:,}: it changed while read.")
        return part.data

    def _keep(self, number: int, data: bytes) -> None:
        for start in range(0, len(data), _BLOCK):
            self._blocks[number + start // _BLOCK] = data[start : start + _BLOCK]

    def close(self) -> None:
        """Forget what was read; the connection is the hub library's, which shares it."""
        self._blocks.clear()


@contextlib.contextmanager
def _bars(shown_at_all: bool) -> Iterator[None]:
    """The hub library's progress bars, which draw on a terminal only, switched off if they are not wanted."""
    if shown_at_all or are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _download(place: _Place) -> Path:
    path: str = huggingface_hub.hf_hub_download(place.repo, place.path, revision=place.revision, **_CALLER)
    return Path(path)


def download(address: str, *, quiet: bool = False) -> Path:
    """Bring a file on the hub into its cache, unless it is there and unchanged, and return where it lies.

    An interrupted download is resumed by the next one. The progress bar is the hub library's, on standard error and
    only if that is a terminal; `quiet` leaves it out. With peft's `adapter_model.safetensors` comes the
    `adapter_config.json` beside it, which holds the scale. Raises UsageError and FileError as `open_hub_file` does.
    """
    place = _file_at(_parse(address))
    with _bars(not quiet), _sentences(place):
        path = _download(place)
    if path.name == "adapter_model.safetensors":
        download_beside(str(place), "adapter_config.json")
    return path


def download_beside(address: str, name: str) -> Path | None:
    """Bring the (small) file of that name from the folder of the addressed file; None if there is none to be had.

    Offline, that is a file that is not cached. Raises FileError if the hub cannot be asked.
    """
    place = _parse(address)
    beside = replace(place, path=f"{place.path.rpartition('/')[0]}/{name}".lstrip("/"))
    if constants.HF_HUB_OFFLINE:
        return _cached(beside)
    with _bars(False), _sentences(beside):
        try:
            return _download(beside)
        except EntryNotFoundError as error:
            if getattr(error, "response", None) is None:
                raise  # not even asked
            return None


def download_folder(address: str, choose: Callable[[Sequence[str]], Sequence[str]], *, quiet: bool = False) -> Path:
    """Bring the files that `choose` picks of a repository's into the cache, and return the folder that they lie in.

    Offline those are of the files that the cache has. Raises UsageError and FileError as `open_hub_file` does, and
    whatever `choose` raises.
    """
    place = _parse(address)
    if constants.HF_HUB_OFFLINE:
        cached = _cached(replace(place, path="model_index.json"))
        if cached is None:
            raise _offline(f"{place} is not")
        choose([path.relative_to(cached.parent).as_posix() for path in sorted(cached.parent.rglob("*"))])
        return cached.parent
    folder = Path()
    for name in choose(_names_in(place)):
        with _bars(not quiet), _sentences(place):
            path = _download(replace(place, path=name))
        folder = path.parents[name.count("/")]
    return folder

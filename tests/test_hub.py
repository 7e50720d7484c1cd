"""`hf://` addresses, against a hub of our own on 127.0.0.1 that redirects to a second server, as the real one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
from conftest import LORA
from huggingface_hub import constants, file_download, utils
from safetensors.numpy import save

import lora_convert
from lora_convert import identify
from lora_convert.containers import hub as hub_module
from lora_convert.containers import open_source
from lora_convert.containers.hub import RangeReader, download, download_beside, open_hub_file
from lora_convert.errors import FileError, UsageError
from lora_convert.report import Finding

BLOCK = 1 << 16
COMMITS = ("a" * 40, "b" * 40)
TOKEN = "hf_secret"
SITES = [f"lora_unet_{block}_attentions_{number}" for block in ("down_blocks_0", "up_blocks_3") for number in (0, 1)]
MODULES = [f"{site}_transformer_blocks_0_{end}" for site in SITES for end in ("attn1_to_q", "attn1_to_k", "attn2_to_k")]


def weights(alpha_dtype: type = np.float32, dtype: type = np.float32, rank: int = 128, note: str = "") -> bytes:
    """Twelve modules of SD 1.5 under Kohya's names, 4 MB; alphas lie after the matrices if their dtype is smaller."""
    tensors: dict[str, np.ndarray] = {}
    for number, module in enumerate(MODULES):
        tensors[f"{module}.lora_down.weight"] = np.full((rank, 768 if "attn2" in module else 320), 0.5, dtype)
        tensors[f"{module}.lora_up.weight"] = np.full((320, rank), 0.5, dtype)
        tensors[f"{module}.alpha"] = np.array(number + 1, alpha_dtype)
    return save(tensors, {"note": note} if note else None)


@dataclass
class Seen:
    """One request that a server got, and the bytes of body it has sent or is sending."""

    server: str
    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0
    done: threading.Event = field(default_factory=threading.Event)


@dataclass
class Hub:
    """What the servers hold, how they misbehave, and what they were asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = COMMITS[0]
    older: dict[str, bytes] = field(default_factory=dict)
    mode: str = "ranges"
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    listing: bytes | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    cdn: str = ""

    @property
    def bodies(self) -> list[Seen]:
        return [request for request in self.seen if request.server == "cdn"]

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.seen)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, server_name: str, *args: Any) -> None:
        self.hub, self.server_name_ = hub, server_name
        super().__init__(*args)

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.refusals and not path.startswith("/blob/"):
            status, headers = self.hub.refusals.pop(0)
            self.answer(status, b'{"error": "no"}', headers)
        elif path.startswith("/api/models/"):
            self.list_files()
        elif path.startswith("/blob/"):
            self.serve(self.version(parse_qs(urlsplit(self.path).query)["commit"][0])[path.removeprefix("/blob/")])
        else:
            self.resolve(urlsplit(self.path).path)

    def version(self, commit: str) -> dict[str, bytes]:
        return self.hub.files if commit == self.hub.commit else self.hub.older

    def resolve(self, path: str) -> None:
        repo, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = map(unquote, rest.partition("/"))
        if repo in self.hub.renamed:
            return self.answer(307, b"", {"Location": self.path.replace(repo, self.hub.renamed[repo])})
        if repo != "owner/repo":
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.commit if revision in ("main", "v 1/x") else revision
        if commit not in COMMITS:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if name not in self.version(commit):
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {
            "X-Repo-Commit": commit,
            "ETag": '"1"',
            "X-Linked-ETag": f'"{hash(name) % 1000}{commit}"',
            "X-Linked-Size": str(len(self.version(commit)[name])),
            "Location": f"{self.hub.cdn}/blob/{name}?commit={commit}",
        }
        return self.answer(302, b"", headers)

    def list_files(self) -> None:
        if self.hub.listing is not None:
            return self.answer(200, self.hub.listing, {"Content-Type": "text/html"})
        siblings = [{"rfilename": name} for name in self.hub.files]
        content = {"id": "owner/repo", "sha": self.hub.commit, "siblings": siblings, "tags": [], "downloads": 0}
        return self.answer(200, json.dumps(content).encode(), {})

    def serve(self, data: bytes) -> None:
        asked = self.headers.get("Range")
        if asked is None or self.hub.mode == "whole":
            return self.answer(200, data, {})
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(data))
        if start >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        told = {
            "shifted": f"bytes {start + 1}-{stop}/{len(data)}",
            "unsized": f"bytes {start}-{stop - 1}/*",
            "growing": f"bytes {start}-{stop - 1}/{len(data) + (start > 0)}",
            "nonsense": "bytes ½",
        }.get(self.hub.mode, f"bytes {start}-{stop - 1}/{len(data)}")
        return self.answer(206, data[start:stop], {"Content-Range": told})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        body = b"" if self.command == "HEAD" else body
        token, asked = self.headers.get("Authorization"), self.headers.get("Range")
        seen = Seen(self.server_name_, self.command, unquote(self.path), asked, token)
        self.hub.seen.append(seen)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        unsized = "unsized body" in self.hub.mode and status < 300
        if unsized:
            self.send_header("Connection", "close")
        elif self.command != "HEAD" or status != 200:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = "cut" in self.hub.mode and len(body) > 10
        self.close_connection = self.close_connection or cut or unsized  # others may be used again, and must not close
        with suppress(ConnectionError):
            for start in range(0, len(body), BLOCK):
                piece = body[start : start + BLOCK // (1 + cut)]
                seen.sent += len(piece)
                self.wfile.write(piece)
        seen.done.set()


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Say nothing: clients that hang up early are what is tested here."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the repository owner/repo, an empty cache, and no waiting between retries."""
    held = Hub()
    servers = {name: Server(("127.0.0.1", 0), partial(Handler, held, name)) for name in ("hub", "cdn")}
    for server in servers.values():
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    held.cdn = f"http://localhost:{servers['cdn'].server_port}"
    use_hub(f"http://127.0.0.1:{servers['hub'].server_port}", tmp_path, monkeypatch)
    yield held
    for server in servers.values():
        server.shutdown()
        server.server_close()
    forget_connections()


def use_hub(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE do, for a library that reads them when imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(sys.modules[utils.http_backoff.__module__].time, "sleep", lambda seconds: None)
    forget_connections()


def forget_connections() -> None:
    (getattr(utils, "close_session", None) or utils.reset_sessions)()


def finding(call: Callable[[], object]) -> Finding:
    """The only finding of the FileError that a call raises."""
    with pytest.raises(FileError) as raised:
        call()
    (said,) = raised.value.findings
    assert said.severity == "error"
    assert "\n" not in str(said)
    return said


def test_only_the_header_is_fetched(hub: Hub, tmp_path: Path) -> None:
    data = weights()
    hub.files["style.safetensors"] = data
    local = tmp_path / "style.safetensors"
    local.write_bytes(data)
    found, expected = identify("hf://owner/repo/style.safetensors"), identify(local)
    assert (found.family, found.trainer, len(found.payload)) == ("sd15", expected.trainer, len(MODULES))
    assert found.file == "hf://owner/repo/style.safetensors"
    assert not [said for said in found.findings if said.severity == "error"]
    assert [request.range for request in hub.bodies] == [f"bytes=0-{4 * BLOCK - 1}"]
    assert hub.sent < 300_000 < 3_000_000 < len(data)


def test_the_settings_of_the_hub_library_hold(hub: Hub, tmp_path: Path) -> None:
    hub.files["style.safetensors"] = weights(rank=1)
    ours = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    ours["HF_HUB_DISABLE_TELEMETRY"] = "1"  # which would be one more request
    command = [sys.executable, "-m", "lora_convert", "inspect", "--json", "hf://owner/repo"]
    done = subprocess.run(command, env={**os.environ, **ours}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["file"] == "hf://owner/repo/style.safetensors"
    assert [request.token for request in hub.seen if request.server == "hub"] == [f"Bearer {TOKEN}"] * 2


def test_the_rest_of_a_long_header_comes_with_one_more_request(hub: Hub) -> None:
    hub.files["style.safetensors"] = weights(note="x" * 700_000)
    with open_source("hf://owner/repo/style.safetensors") as source:
        assert source.remote
        assert len(source.header.metadata["note"]) == 700_000
    assert len(hub.bodies) == 2
    assert hub.sent < 800_000


def test_the_token_stays_on_the_hub(hub: Hub) -> None:
    hub.files["style.safetensors"] = weights()
    hub.renamed["owner/old-name"] = "owner/repo"
    identify("hf://owner/old-name/style.safetensors", strict=True)
    assert [(request.server, request.token) for request in hub.seen] == [
        ("hub", f"Bearer {TOKEN}"),
        ("hub", f"Bearer {TOKEN}"),
        ("cdn", None),
    ]


@pytest.mark.parametrize(
    ("alpha_dtype", "requests"),
    [(np.float64, 1), (np.float16, 2), (np.float32, len(MODULES))],
    ids=["before the matrices", "after the matrices", "among the matrices"],
)
def test_alphas_that_lie_together_come_together(hub: Hub, alpha_dtype: type, requests: int) -> None:
    hub.files["style.safetensors"] = weights(alpha_dtype)
    found = identify("hf://owner/repo/style.safetensors", alphas=True)
    assert sorted(module.alpha for module in found.payload) == [number + 1 for number in range(len(MODULES))]
    assert len(hub.bodies) <= requests
    assert hub.sent <= (requests + 3) * BLOCK


def test_every_read_gives_the_bytes_of_the_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).bytes(40 * BLOCK + 17)
    hub.files["x.safetensors"] = data
    monkeypatch.setattr(hub_module, "_MOST_BLOCKS", 8)
    reader, _, remote = open_hub_file("hf://owner/repo/x.safetensors")
    assert isinstance(reader, RangeReader)
    assert (remote, reader.size) == (True, len(data))
    random = np.random.default_rng(1)
    for size in (0, 1, 2, 100, BLOCK, BLOCK + 1, 7 * BLOCK, 9 * BLOCK, 40 * BLOCK):
        for offset in (0, len(data) - size, *random.integers(0, len(data) - size, 5)):
            assert reader.read_at(int(offset), size) == data[offset : offset + size]
            assert len(reader._blocks) <= 8
    for offset in (len(data), len(data) - 1, 99 * BLOCK):
        assert "in all" in finding(partial(reader.read_at, offset, 2)).message
    reader.close()


def test_reads_from_several_threads(hub: Hub) -> None:
    data = np.random.default_rng(0).bytes(30 * BLOCK)
    hub.files["x.safetensors"] = data
    reader, _, _ = open_hub_file("hf://owner/repo/x.safetensors")
    wrong: list[int] = []

    def read(seed: int) -> None:
        for offset in np.random.default_rng(seed).integers(0, len(data) - 1000, 20):
            if reader.read_at(int(offset), 1000) != data[offset : offset + 1000]:
                wrong.append(int(offset))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_commit_is_read_whatever_is_pushed_meanwhile(hub: Hub) -> None:
    hub.files["x.safetensors"] = b"1" * 20 * BLOCK
    reader, _, _ = open_hub_file("hf://owner/repo/x.safetensors")
    hub.older, hub.files, hub.commit = hub.files, {"x.safetensors": b"2" * 20 * BLOCK}, COMMITS[1]
    assert reader.read_at(10 * BLOCK, 5) == b"11111"


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("hf://owner/repo", "hf://owner/repo/loras/one.safetensors"),
        ("hf://owner/repo/", "hf://owner/repo/loras/one.safetensors"),
        ("hf://owner/repo/loras", "hf://owner/repo/loras/one.safetensors"),
        ("hf://models/owner/repo/loras/", "hf://owner/repo/loras/one.safetensors"),
        ("hf://owner/repo@main", "hf://owner/repo@main/loras/one.safetensors"),
        ("hf://owner/repo@v%201%2Fx/loras", "hf://owner/repo@v%201%2Fx/loras/one.safetensors"),
        (f"hf://owner/repo@{COMMITS[0]}/no suffix", f"hf://owner/repo@{COMMITS[0]}/no suffix"),
    ],
)
def test_addresses(hub: Hub, address: str, file: str) -> None:
    hub.files |= {"README.md": b"#", "loras/one.safetensors": weights(rank=1), "no suffix": weights(rank=1)}
    found = identify(address, strict=True)
    assert (found.file, found.family) == (file, "sd15")


def test_several_candidates_are_listed(hub: Hub) -> None:
    hub.files |= {f"{name}.safetensors": b"" for name in ("b", "a", "old/c")} | {"a.bin": b""}
    said = finding(lambda: open_source("hf://owner/repo"))
    assert said.name == "several-files"
    assert "a.safetensors, b.safetensors, old/c.safetensors" in said.message
    assert "hf://owner/repo/a.safetensors" in said.fix
    found = identify("hf://owner/repo@main")
    assert (found.kind, [error.name for error in found.findings]) == ("unknown", ["several-files"])
    assert "hf://owner/repo@main/a.safetensors" in found.findings[0].fix


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf://owner/repo", "hf://owner/repo has no .safetensors file"),
        ("hf://owner/repo/folder", "no file folder"),
        ("hf://owner/repo/x.safetensors", "no file x.safetensors"),
        ("hf://owner/repo@main/x.safetensors", "no file x.safetensors at main"),
        ("hf://owner/repo@nowhere/x.safetensors", "no revision nowhere"),
        ("hf://owner/other/x.safetensors", "no repository owner/other, or it is private"),
    ],
)
def test_what_is_not_there(hub: Hub, address: str, words: str) -> None:
    hub.files["README.md"] = b"#"
    said = finding(lambda: open_source(address))
    assert said.name == "unreadable"
    assert words in said.message
    assert said.fix


@pytest.mark.parametrize(
    "address",
    [
        "hf://",
        "hf://owner",
        "hf://owner/",
        "hf:///repo",
        "hf://owner//x.safetensors",
        "hf://owner/repo//x.safetensors",
        "hf://owner/repo@/x.safetensors",
        "hf://owner/repo/../../x.safetensors",
        "hf://owner/repo/./x.safetensors",
        "hf://owner/repo/..\\x.safetensors",
        "hf://owner/repo@..%2F..%2Fetc/x.safetensors",
        "hf://owner/repo@%2Fetc/x.safetensors",
        "hf://own er/repo/x.safetensors",
        "hf://owner/re--po/x.safetensors",
        "hf://owner/repo/\x1b[1m.safetensors",
        "hf://owner/repo/\ud800.safetensors",
        "hf://datasets/owner/repo/x.safetensors",
        "hf://spaces/owner/repo/x.safetensors",
        "hf://bucket/owner/repo/x.safetensors",
    ],
)
def test_malformed_addresses_ask_nobody(hub: Hub, address: str) -> None:
    for call in (open_source, download):
        with pytest.raises(UsageError) as raised:
            call(address)
        assert "hf://" in str(raised.value)
        assert str(raised.value).isprintable()
    assert not hub.seen


@pytest.mark.parametrize(
    ("status", "code", "words", "fix"),
    [
        (401, None, "refuses access to owner/repo (HTTP 401)", "HF_TOKEN"),
        (401, "GatedRepo", "is gated", "Accept its conditions at {endpoint}/owner/repo, and set HF_TOKEN"),
        (403, "GatedRepo", "is gated", "HF_TOKEN"),
        (403, None, "refuses access to owner/repo (HTTP 403)", "licence"),
        (404, None, "nothing at this address", "HF_ENDPOINT"),
        (404, "RepoNotFound", "no repository owner/repo", "HF_TOKEN"),
        (429, None, "no more requests", "Wait"),
        (500, None, "a problem of its own (HTTP 500)", "later"),
        (503, None, "a problem of its own (HTTP 503)", "later"),
        (418, None, "(HTTP 418)", ""),
    ],
)
@pytest.mark.parametrize("path", ["/style.safetensors", ""])
@pytest.mark.parametrize("call", [open_source, download])
def test_refusals(
    hub: Hub, call: Callable[[str], object], path: str, status: int, code: str | None, words: str, fix: str
) -> None:
    hub.refusals = [(status, {"X-Error-Code": code} if code else {})] * 20
    said = finding(lambda: call(f"hf://owner/repo{path}"))
    assert said.name == "unreadable"
    assert words in said.message
    assert fix.format(endpoint=constants.ENDPOINT) in said.fix
    assert TOKEN not in str(said)


def test_a_passing_problem_is_tried_again(hub: Hub) -> None:
    hub.files["style.safetensors"] = weights()
    hub.refusals = [(503, {})]
    assert identify("hf://owner/repo/style.safetensors", strict=True).family == "sd15"


def test_a_server_that_ignores_ranges_is_not_listened_to(hub: Hub) -> None:
    hub.files |= {"large.safetensors": bytes(64_000_000), "small.safetensors": weights(rank=1)}
    hub.mode = "whole"
    said = finding(lambda: open_source("hf://owner/repo/large.safetensors"))
    assert "part of the file" in said.message
    assert "Download" in said.fix
    (request,) = hub.bodies
    assert request.done.wait(10), "the server should have noticed that nobody listens any more"
    assert request.sent < 32_000_000
    assert identify("hf://owner/repo/small.safetensors", alphas=True, strict=True).family == "sd15"


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("cut", "The hub could not be asked: "),
        ("shifted", "not send the part"),
        ("unsized", "not send the part"),
        ("nonsense", "not send the part"),
    ],
)
def test_wrong_answers(hub: Hub, mode: str, words: str) -> None:
    hub.files["style.safetensors"] = weights()
    hub.mode = mode
    said = finding(lambda: open_source("hf://owner/repo/style.safetensors"))
    assert said.name == "unreadable"
    assert words in said.message
    assert said.fix


def test_a_body_without_length_may_be_whole_but_not_cut(hub: Hub) -> None:
    hub.files["style.safetensors"] = weights()
    hub.mode = "unsized body"
    assert identify("hf://owner/repo/style.safetensors", strict=True).family == "sd15"
    hub.mode = "unsized body cut"
    assert (
        "promised 262,144 bytes and sent 131,072"
        in finding(lambda: open_source("hf://owner/repo/style.safetensors")).message
    )


def test_a_file_that_changes_while_read(hub: Hub) -> None:
    hub.files["x.safetensors"] = bytes(20 * BLOCK)
    hub.mode = "growing"
    reader, _, _ = open_hub_file("hf://owner/repo/x.safetensors")
    assert "changed" in finding(lambda: reader.read_at(10 * BLOCK, 5)).message
    hub.mode = "cut"
    assert finding(lambda: reader.read_at(10 * BLOCK, 5)).name == "unreadable"
    hub.mode = "ranges"
    assert reader.read_at(10 * BLOCK, 5) == bytes(5)


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"", "empty-file"), (b"<!doctype html>" * 99, "not-weights"), (weights(rank=1)[:-1], "malformed-header")],
)
def test_bad_files_are_what_they_are_locally(hub: Hub, content: bytes, name: str) -> None:
    hub.files["x.safetensors"] = content
    assert [said.name for said in identify("hf://owner/repo/x.safetensors").findings] == [name]


def test_a_portal_instead_of_the_hub(hub: Hub) -> None:
    hub.listing = b"<html>Sign in to the hotel's network</html>"
    assert "HF_ENDPOINT" in finding(lambda: open_source("hf://owner/repo")).fix


def test_no_hub_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub("http://127.0.0.1:9", tmp_path, monkeypatch)
    for call in (open_source, download):
        for address in ("hf://owner/repo", "hf://owner/repo/x.safetensors"):
            said = finding(lambda call=call, address=address: call(address))  # type: ignore[misc]
            assert "could not be asked" in said.message
            assert "HTTPS_PROXY" in said.fix
            if call is open_source:
                assert "refused" in said.message
    forget_connections()


def test_a_token_is_never_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["x.safetensors"] = weights(rank=1)
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}€")
    for call in (open_source, download):
        assert TOKEN not in str(finding(lambda call=call: call("hf://owner/repo/x.safetensors")))  # type: ignore[misc]


def test_a_cached_file_is_read_in_the_cache_also_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["style.safetensors"] = weights()
    address = "hf://owner/repo/style.safetensors"
    path = download(address)
    assert path.read_bytes() == hub.files["style.safetensors"]
    assert path.is_relative_to(constants.HF_HUB_CACHE)
    hub.seen.clear()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        forget_connections()
        with open_source(address) as source:
            assert not source.remote
        found = identify(address, strict=True)
        assert (found.file, found.family, min(module.alpha for module in found.payload)) == (address, "sd15", 1)
    assert download(address) == path
    assert not hub.seen


@pytest.mark.parametrize("call", [open_source, download])
def test_offline_and_not_cached(hub: Hub, monkeypatch: pytest.MonkeyPatch, call: Callable[[str], object]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_connections()
    said = finding(lambda: call("hf://owner/repo/style.safetensors"))
    assert "hf://owner/repo/style.safetensors is not in the cache" in said.message
    assert "HF_HUB_OFFLINE" in said.message + said.fix
    assert "names no file" in finding(lambda: call("hf://owner/repo")).message
    assert not hub.seen


def test_a_downloaded_file_is_refreshed(hub: Hub) -> None:
    hub.files["style.safetensors"] = weights(rank=1)
    download("hf://owner/repo")
    hub.older, hub.files, hub.commit = hub.files, {"style.safetensors": weights(rank=2)}, COMMITS[1]
    assert download("hf://owner/repo").read_bytes() == hub.files["style.safetensors"]


def test_the_configuration_of_peft_comes_along(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files |= {"peft/adapter_model.safetensors": weights(rank=1), "peft/adapter_config.json": b"{}"}
    path = download("hf://owner/repo/peft")
    assert (path.parent / "adapter_config.json").read_bytes() == b"{}"
    address = "hf://owner/repo/peft/adapter_model.safetensors"
    assert download_beside(address, "other.json") is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download_beside(address, "adapter_config.json") == path.parent / "adapter_config.json"
    assert download_beside(address, "never-asked.json") is None


def test_a_file_beside_one_at_the_top(hub: Hub) -> None:
    hub.files["adapter_config.json"] = b"{}"
    found = download_beside("hf://owner/repo/adapter_model.safetensors", "adapter_config.json")
    assert found is not None
    assert found.read_bytes() == b"{}"
    hub.refusals = [(500, {})] * 20
    address = "hf://owner/repo@v%201%2Fx/adapter_model.safetensors"
    assert "HTTP 500" in finding(lambda: download_beside(address, "adapter_config.json")).message


@pytest.mark.parametrize("quiet", [False, True])
def test_downloads_say_nothing_but_on_a_terminal(
    hub: Hub, quiet: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["style.safetensors"] = weights(rank=1)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    download("hf://owner/repo", quiet=quiet)
    assert capfd.readouterr() == ("", "")
    assert not utils.are_progress_bars_disabled()


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    said = finding(lambda: download("hf://owner/repo/x.safetensors"))
    assert "could not be fetched: [Errno 28] No space left on device" in said.message


def test_the_hub_library_is_imported_for_addresses_alone() -> None:
    code = (
        "import sys, lora_convert.containers, lora_convert.converters.convert; print('huggingface_hub' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_convert_and_validate_take_addresses(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"a/style.safetensors": (LORA / "k_sd15_dylora.safetensors").read_bytes()}
    result = lora_convert.convert("hf://owner/repo/a/style.safetensors", tmp_path / "out", to="kohya")
    assert result.ok, result.findings
    assert result.file == "hf://owner/repo/a/style.safetensors"
    assert Path(result.outputs[0].path).name == "style.safetensors"
    assert lora_convert.validate(result.outputs[0].path, against="hf://owner/repo/a").ok
    missing = lora_convert.convert("hf://owner/repo/b.safetensors", tmp_path / "other")
    assert (missing.status, [found.name for found in missing.findings]) == ("failed", ["unreadable"])
    assert not (tmp_path / "other").exists()


def test_a_peft_file_on_the_hub_finds_its_configuration(hub: Hub) -> None:
    hub.files = {
        "adapter_model.safetensors": (LORA / "p_sd15_lora.safetensors").read_bytes(),
        "adapter_config.json": (LORA / "p_sd15_lora.adapter_config.json").read_bytes(),
    }
    remote = lora_convert.identify("hf://owner/repo", alphas=True)
    assert {module.scale for module in remote.payload} == {0.5}
    unread = lora_convert.identify("hf://owner/repo")
    assert unread.family == "sd15" and not unread.findings

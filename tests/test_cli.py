"""The command line: verbs, exit statuses, JSON, and text out of files that is never markup or control codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import LORA, lora
from safetensors.numpy import save_file

from lora_convert.cli import cli, run
from lora_convert.cli.demo import run_demo

FILE = str(LORA / "k_sd15_excerpt_f32.safetensors")
OFT = str(LORA / "k_sd15_oft.safetensors")
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def call(capsys):
    """Run the command line in process: (exit status, standard output, standard error)."""

    def in_process(*arguments) -> tuple[int, str, str]:
        status = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return in_process


@pytest.mark.parametrize("verb", ["inspect", "convert", "validate", "families", "demo"])
def test_help_of_every_verb(call, verb):
    status, out, _ = call(verb, "--help")
    assert status == 0 and "Usage: lora-convert" in out
    if verb in ("inspect", "convert", "validate"):
        assert "Examples:" in out


def test_inspect_text(call):
    status, out, _ = call("inspect", FILE)
    assert status == 0
    for part in ("Stable Diffusion 1.x (sd15)", "by kohya", "rank", "sks", "because", "ss_base_model_version"):
        assert part in out


def test_inspect_json_is_one_line_per_file(call):
    status, out, err = call("inspect", "--json", FILE, OFT, "/nonexistent.safetensors")
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and not err
    assert [record["family"] for record in records] == ["sd15", "sd15", None]
    assert records[2]["findings"][0]["name"] == "unreadable"


def test_unknown_but_readable_is_exit_0(call, write):
    assert call("inspect", write({"some.thing": np.ones(3, "f4")}))[0] == 0
    assert call("inspect", "--fail-on", "warning", write({"some.thing": np.ones(3, "f4")}))[0] == 1


def test_convert_and_validate(call, tmp_path):
    status, out, err = call("convert", FILE, "-o", tmp_path)
    assert (status, err) == (0, "")
    assert "proved: all 12 weight changes" in out and "pytorch_lora_weights.safetensors" in out
    output = tmp_path / "pytorch_lora_weights.safetensors"
    status, out, _ = call("validate", output, "--against", FILE)
    assert status == 0 and "pass" in out
    status, out, _ = call("validate", output, "--against", FILE, "--json")
    record = json.loads(out)
    assert record["status"] == "pass" and set(record["rungs"]) == {"structure", "numbers", "delta"}
    assert call("validate", output, "--against", LORA / "k_sd15_dylora.safetensors")[0] == 1


def test_convert_json(call, tmp_path):
    status, out, err = call("convert", FILE, "-o", tmp_path, "--json")
    record = json.loads(out)
    assert (status, err, record["status"], record["family"], record["modules"]) == (0, "", "converted", "sd15", 12)
    (output,) = record["outputs"]
    assert output["bytes"] == os.path.getsize(output["path"]) and len(output["sha256"]) == 64
    assert 0 < record["worst_delta_error"] < 1e-6


def test_a_refused_file_does_not_stop_the_others(call, tmp_path):
    status, out, _ = call("convert", OFT, FILE, "-o", tmp_path, "--json")
    assert status == 1
    assert [json.loads(line)["status"] for line in out.splitlines()] == ["refused", "converted"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k_sd15_excerpt_f32"]


def test_refusal_in_text(call, tmp_path):
    status, out, _ = call("convert", OFT, "-o", tmp_path / "o")
    assert status == 1 and "refused, nothing was written" in out and "OFT" in out


def test_dry_run_writes_nothing(call, tmp_path):
    status, out, _ = call("convert", FILE, "--dry-run", "-o", tmp_path / "o")
    assert status == 0 and f"would write {tmp_path / 'o' / 'pytorch_lora_weights.safetensors'}: 24 tensors" in out
    assert not (tmp_path / "o").exists()
    assert json.loads(call("convert", FILE, "--dry-run", "--json")[1])["status"] == "planned"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", FILE], "-o"),
        (["convert", FILE, FILE, "-o", "x"], "two of the files"),
        (["convert", FILE, OFT, "-o", "x.safetensors"], "cannot all become"),
        (["convert", FILE, "-o", FILE], "is an input"),
        (["convert", FILE, "--to", "peftt", "-o", "x"], "Invalid value"),
        (["convert", FILE, "--to", "kohya", "--alpha", "fold", "-o", "x"], "--alpha fold"),
        (["convert", FILE, "--skip", "nothing", "-o", "x"], "matches no tensor"),
        (["inspect", FILE, "--family", "sd99"], "Invalid value"),
        (["inspect", FILE, "--config", "/nonexistent"], "does not exist"),
        (["inspect"], "Missing argument"),
        (["nonsense"], "No such command"),
        (["inspect", FILE, "--max-header", "200000000"], "Invalid value"),
    ],
)
def test_wrong_usage_is_exit_2_and_a_sentence(call, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*arguments)
    assert status == 2 and said in err and "Traceback" not in err and not out
    assert not list(tmp_path.iterdir())


def test_max_header(call, write):
    path = write(lora(K, 320, 768))
    assert call("inspect", path, "--max-header", "100", "--family", "sd15")[0] == 1
    assert call("inspect", path, "--family", "sd15")[0] == 0


def test_text_from_files_is_data(call, tmp_path):
    nasty = "[sks] [/x] \x1b[31mred\u202egnp.exe\n<script>"
    path = tmp_path / "n.safetensors"
    metadata = {"modelspec.trigger_phrase": nasty, "modelspec.title": nasty, "ss_base_model_version": "sd_v1"}
    save_file(lora(K, 320, 768) | {f"{K}{nasty}.x": np.ones(2, "f4")}, path, metadata)
    status, out, _ = call("inspect", path)
    assert status == 1
    assert "[sks] [/x] \\x1b[31mred\\u202egnp.exe\\x0a<script>" in out
    assert "\x1b[31m" not in out and "\u202e" not in out
    status, out, _ = call("inspect", "--json", path)
    assert out.isascii() and json.loads(out)["trigger_words"] == [nasty.strip()]


def test_hash_option(call):
    assert {"sha256", "autov1", "autov2", "autov3", "crc32"} <= json.loads(
        call("inspect", "--hash", "--json", FILE)[1]
    )["hashes"].keys()


def test_families(call):
    out = call("families")[1]
    for name in ("sd15", "sd21", "sdxl", "sdxl-refiner"):
        assert name in out


def test_demo_runs_and_leaves_its_files(tmp_path, capsys):
    assert run_demo(tmp_path) == 0
    out = capsys.readouterr().out
    assert out.count("proved: all 168 weight changes") == 2 and "load_lora_weights" in out
    assert "proved 168" in out
    assert (tmp_path / "diffusers" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "kohya" / "lora.safetensors").is_file()


def test_an_internal_error_is_a_sentence(call, monkeypatch):
    monkeypatch.setattr("lora_convert.inspect.identify.identify", lambda *_, **__: 1 / 0)
    status, _, err = call("inspect", FILE)
    assert status == 2 and "internal error (ZeroDivisionError" in err and "Traceback" not in err
    monkeypatch.setenv("LORA_CONVERT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(["inspect", FILE])


def test_a_full_disk_is_a_sentence(call, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_convert.converters.convert.execute", full)
    status, _, err = call("convert", FILE, "-o", tmp_path)
    assert (status, list(tmp_path.iterdir())) == (2, []) and "No space left on device" in err


def test_click_runner_agrees():
    assert CliRunner().invoke(cli, ["--version"]).exit_code == 0


def test_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "lora_convert", "inspect", FILE, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr and json.loads(done.stdout)["family"] == "sd15"


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m lora_convert inspect --json {FILE} {FILE} {FILE} | head -c 10 >/dev/null"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert not done.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_leaves_nothing_half_written(tmp_path, write):
    tensors = {}
    for number in range(200):  # large enough to be caught in the act
        block = f"lora_unet_input_blocks_7_1_transformer_blocks_{number % 10}"
        tensors |= lora(
            f"{block}_attn{1 + number // 10 % 2}_to_{'qkv'[number // 20 % 3]}",
            1280,
            2048 if number // 10 % 2 and number // 20 % 3 else 1280,
            64,
            32,
        )
    source = write(tensors)
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_convert", "convert", str(source), "-o", str(tmp_path / "o"), "--family", "sdxl"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline and not list((tmp_path / "o").glob(".*.part")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    left = [path.name for path in (tmp_path / "o").glob("*")] if (tmp_path / "o").exists() else []
    assert (process.returncode, left) in ((130, []), (0, ["pytorch_lora_weights.safetensors"]))
    assert "Traceback" not in err


def test_an_input_is_never_an_output(call, tmp_path):
    source = tmp_path / "a.safetensors"
    source.write_bytes((LORA / "k_sd15_dylora.safetensors").read_bytes())
    before = source.read_bytes()
    for out in (f"{tmp_path}/new/../a.safetensors", f"{tmp_path}/./a.safetensors"):
        assert call("convert", source, "-o", out, "--force")[0] == 2
    assert source.read_bytes() == before and not (tmp_path / "new").exists()
    assert call("convert", source, "-o", tmp_path / "ov" / "a")[0] == 0
    second = tmp_path / "ov" / "a" / "pytorch_lora_weights.safetensors"
    kept = second.read_bytes()
    assert call("convert", source, second, "-o", tmp_path / "ov", "--force")[0] == 2
    assert second.read_bytes() == kept


def test_names_never_leave_the_output_folder(call, tmp_path):
    for name in ("...safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes((LORA / "k_sd15_dylora.safetensors").read_bytes())
    status, _, err = call(
        "convert", tmp_path / "...safetensors", tmp_path / "b.safetensors", "-o", tmp_path / "in" / "er"
    )
    assert status == 2 and "gives no name" in err and not (tmp_path / "in").exists()


def test_wrong_use_with_one_file_does_not_stop_the_others(call, tmp_path):
    assert call("convert", FILE, OFT, "-o", tmp_path)[0] == 1
    other = str(LORA / "k_sd15_dylora.safetensors")
    status, out, err = call("convert", FILE, other, "-o", tmp_path, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and "exists" in err
    assert [record["status"] for record in records] == ["refused", "converted"] and "exists" in records[0]["error"]


@pytest.mark.parametrize("arguments", [["-o", "x"], ["--dry-run"]])
def test_skipping_everything_is_an_error(call, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("convert", FILE, "--skip", "*", *arguments)
    assert status == 1 and "--skip leaves no tensor" in out and not list(tmp_path.iterdir())


def test_nothing_written_leaves_no_folder(call, tmp_path, write):
    tensors = lora(K, 320, 768)
    tensors[f"{K}.lora_up.weight"][0, 0] = np.nan
    assert call("convert", write(tensors), "-o", tmp_path / "a" / "b")[0] == 1
    assert not (tmp_path / "a").exists()


def test_a_large_header_stays_convertible(call, tmp_path, write):
    path = write(lora(K, 320, 768, alpha=1), {"note": "x" * 13_000_000})
    assert call("convert", path, "-o", tmp_path / "o")[0] == 1
    assert call("convert", path, "-o", tmp_path / "o", "--max-header", "100000000")[0] == 0


def test_validate_says_which_file_is_wrong(call):
    record = json.loads(call("validate", FILE, "--against", "/nonexistent.safetensors", "--json")[1])
    assert record["against"] == "/nonexistent.safetensors"
    assert record["findings"][0]["message"].startswith("(in the source)")
    assert call("validate", FILE, "--against", OFT)[0] == 1
    assert call("validate", FILE, "--skip", "*")[0] == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_config_that_is_a_pipe_is_not_waited_for(call, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    status = call("inspect", LORA / "p_sd15_lora.safetensors", "--config", tmp_path / "pipe")[0]
    assert status in (1, 2)


def test_one_module_is_said_in_the_singular(call, tmp_path, write):
    glora = {f"{K}.b1.weight": (320, 4), f"{K}.b2.weight": (4, 768)}
    source = write({name: np.ones(shape, np.float32) for name, shape in glora.items()})
    _, out, _ = call("convert", source, "-o", tmp_path / "o")
    assert "glora for" in out and " 1 module," in out and "proved: the weight change is exactly" in out
    _, out, _ = call("convert", source, "-o", tmp_path / "p", "--rank", "1", "--max-error", "0.001", "--dtype", "fp16")
    assert "proved: the weight change is " in out


def test_what_is_allowed_is_said_in_digits_that_matter(call, tmp_path, write):
    source = write(lora(K, 320, 768, rank=4))
    status, out, _ = call("resize", source, "--rank", "2", "--max-error", "0.001", "-o", tmp_path / "o")
    assert status == 1 and "more than 0.1 % of" in out

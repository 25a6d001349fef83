"""Bad input: exit code 2, one clear line on stderr, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import LIMIT, Run, refused, save_model

METHOD_COMMANDS = ("generate", "compare", "inspect", "plan")


@pytest.mark.parametrize("command", METHOD_COMMANDS)
def test_unknown_method(run: Run, command: str, model_folder: str) -> None:
    words = ["hello"] if command == "generate" else []
    refused(run(command, *words, "--model", model_folder, "--method", "delat"), "'delat'", "delta", "full")


def test_unknown_method_names_the_baselines_in_compare(run: Run) -> None:
    refused(run("compare", "--method", "sock"), "stock", "stock-static")


def test_baseline_takes_no_options(run: Run) -> None:
    refused(run("compare", "--method", "stock:budget=16"), "takes no options")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("delta:budget=1000", "992 and 1008"),
        ("delta:budget=128,recent=128,sinks=16", "at least 144"),
        ("delta:budgets=16", "'budgets'"),
        ("delta:budget=many", "whole number"),
        ("delta:budget", "option=value"),
        ("delta:page_size=20", "page_size=20"),
        ("delta:plan=FFS", "3 layers, but the model has 6"),
        ("delta:plan=FRSRRR", "layer 1 is REUSE"),
        ("delta:plan=nowhere.json", "nowhere.json"),
        ("full:plan=FFFFFF", "takes no plan"),
    ],
)
@pytest.mark.parametrize("command", METHOD_COMMANDS)
def test_bad_method_options(run: Run, command: str, model_folder: str, method: str, said: str) -> None:
    words = ["hello"] if command == "generate" else []
    refused(run(command, *words, "--model", model_folder, "--method", method), said)


def test_plan_file_that_names_layers_that_are_not_there(run: Run, model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"depth": 6, "full": [0], "select": [9]}), encoding="utf-8")
    refused(run("plan", "--model", model_folder, "--method", f"delta:plan={file}"), "[9]", "6 layers")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(run: Run, prompt: str) -> None:
    refused(run("generate", prompt), "the prompt is empty")


def test_empty_file_and_empty_stdin(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    file = tmp_path / "empty.txt"
    file.write_text("\n", encoding="utf-8")
    refused(run("generate", "--file", str(file)), "empty.txt is empty")
    refused(run("generate", "--jsonl", str(file)), "is empty")
    refused(run("compare", "--text", str(file)), "is empty")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    refused(run("generate", "-"), "stdin is empty")


def test_no_prompt(run: Run) -> None:
    refused(run("generate"), "no prompt", "--jsonl")


def test_jsonl_with_another_prompt(run: Run, tmp_path: Path) -> None:
    refused(run("generate", "hello", "--jsonl", str(tmp_path / "x.jsonl")), "leave the argument")


def test_prompt_over_the_limit(run: Run, model_folder: str) -> None:
    result = run("generate", "x" * LIMIT, "--model", model_folder, "--no-chat")
    refused(result, f"{LIMIT + 1:,} tokens", f"limit is {LIMIT:,}", "by 1")


def test_context_over_the_limit(run: Run, model_folder: str) -> None:
    for command in ("compare", "inspect", "plan"):
        refused(run(command, "--model", model_folder, "--context", "5000"), f"limit is {LIMIT:,}")


@pytest.mark.parametrize("option", ["--file", "--jsonl"])
def test_missing_file(run: Run, option: str, tmp_path: Path) -> None:
    refused(run("generate", option, str(tmp_path / "nowhere.txt")), "nowhere.txt does not exist")


def test_text_that_is_missing_or_binary(run: Run, tmp_path: Path) -> None:
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ab\xff\xfe")
    for command in ("compare", "inspect"):
        refused(run(command, "--text", str(tmp_path / "nowhere.txt")), "nowhere.txt does not exist")
        refused(run(command, "--text", str(binary)), "not UTF-8")


def test_text_that_is_too_short(run: Run, model_folder: str, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("short " * 10, encoding="utf-8")
    result = run("compare", "--model", model_folder, "--text", str(text), "--context", "500", "--positions", "50")
    refused(result, "has 60 tokens, but 501 are needed")


def test_missing_model(run: Run, tmp_path: Path) -> None:
    refused(run("generate", "hello", "--model", str(tmp_path / "nowhere")), "does not exist", "smollm2")
    refused(run("generate", "hello", "--model", str(tmp_path)), "no config.json")
    refused(run("generate", "hello", "--model", "nowhere.gguf"), "does not exist")


def test_hub_that_cannot_be_reached(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files,\nand ...")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    refused(run("generate", "hello", "--model", "owner/name"), "cannot load owner/name", "cannot be reached")


def test_no_command_shows_help(run: Run) -> None:
    result = run()
    assert result.code == 2 and "generate" in result.out and "Traceback" not in result.err


def test_file_that_is_no_gguf(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("GGML", encoding="utf-8")
    refused(run("generate", "hello", "--model", str(file)), "not a GGUF file")


def test_gguf_that_is_cut_off(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAKV_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    result = run("generate", "hello", "--model", str(file))
    assert result.code == 2, result
    assert "cannot read" in result.err.splitlines()[-1]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_unsupported_model(run: Run, tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=257)
    folder = save_model(tmp_path / "gpt2", config)
    for command in METHOD_COMMANDS:
        words = ["hello"] if command == "generate" else []
        refused(run(command, *words, "--model", str(folder)), "'gpt2' is not supported")


def test_config_that_transformers_does_not_know(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "novel"}', encoding="utf-8")
    refused(run("generate", "hello", "--model", str(tmp_path)), "novel")


def test_wrong_options(run: Run, model_folder: str) -> None:
    refused(run("generate", "hello", "--bogus"), "--bogus", "deltakv generate --help")
    refused(run("nonsense"), "nonsense")
    refused(run("generate", "hello", "--top-p", "3"), "--top-p")
    refused(run("generate", "hello", "--model", model_folder, "--dtype", "int3"), "int3", "bfloat16")
    refused(run("generate", "hello", "--model", model_folder, "--device", "quantum"), "quantum")
    refused(run("plan", "--model", model_folder, "--context", "4000;8000"), "list of whole numbers")
    refused(run("compare", "--model", model_folder, "--context", "100", "--positions", "100"), "--positions 100")
    refused(run("inspect", "--model", model_folder, "--context", "100", "--steps", "100"), "--steps 100")
    refused(run("inspect", "--out", "picture.jpg"), ".png")


def test_output_that_cannot_be_written_is_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere" / "out.json")
    refused(run("generate", "hello", "--json", nowhere), "its folder does not exist")
    refused(run("compare", "--json", nowhere), "its folder does not exist")
    refused(run("plan", "--json", str(tmp_path)), "it is a folder")


def test_method_that_picks_nothing_cannot_be_inspected(run: Run, model_folder: str, tmp_path: Path) -> None:
    out = str(tmp_path / "picks.png")
    result = run("inspect", "--model", model_folder, "--method", "full", "--context", "300", "--out", out)
    refused(result, "no SELECT layer")


def test_as_a_process(model_folder: str) -> None:
    command = [sys.executable, "-m", "deltakv", "generate", "hello", "--method", "delta:budget=100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("deltakv: budget=100 is not a multiple") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("module", "extra"), [("typer", "cli"), ("matplotlib", "plot")])
def test_missing_extra(run: Run, monkeypatch: pytest.MonkeyPatch, module: str, extra: str) -> None:
    if extra == "cli":
        monkeypatch.delitem(sys.modules, "deltakv.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    refused(run("inspect"), f"{module} is not installed", f"pip install 'deltakv[{extra}]'")


@pytest.mark.parametrize("line", ['{"prompt": "\\ud800 x"}', "[" * 100_000])
def test_jsonl_lines_that_break_readers(run: Run, model_folder: str, tmp_path: Path, line: str) -> None:
    """Named by number, and the others are done; a byte order mark is no error."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "hello"}}\n{line}\n{{"prompt": "bye"}}\n', encoding="utf-8-sig")
    result = run("generate", "--model", model_folder, "--jsonl", str(file), "--max-new-tokens", "3")
    assert result.code == 2 and "line 2" in result.err and "Traceback" not in result.err
    assert [json.loads(answer)["id"] for answer in result.out.splitlines()] == [1, 3]


def test_truncated_weights(run: Run, model_folder: str, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(model_folder, tmp_path / "broken"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    refused(run("generate", "hello", "--model", str(folder)), "cannot load", "broken")


def test_truncated_gguf(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAKV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF\n")
    result = run("plan", "--model", str(tmp_path / "x.gguf"))
    assert result.code == 2 and "cannot read" in result.err and "Traceback" not in result.err


def test_device_without_numbers(run: Run, model_folder: str) -> None:
    refused(run("generate", "hello", "--model", model_folder, "--device", "meta"), "'meta' cannot be used")


def test_pictures_and_files_that_cannot_be_written(run: Run, model_folder: str, tmp_path: Path) -> None:
    compare = ("compare", "--model", model_folder)
    refused(run(*compare, "--plot", str(tmp_path / "x.foo")), ".png, .svg, .pdf")
    refused(run(*compare, "--json", str(tmp_path / "a.png")), "both the JSON and the picture")
    refused(run(*compare, "--json", "/proc/foo.json"), "cannot write /proc/foo.json")
    assert not list(tmp_path.iterdir()), "a check leaves nothing behind"

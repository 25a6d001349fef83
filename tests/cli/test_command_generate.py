"""`deltakv generate`."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import LIMIT, Run, byte_tokenizer
from transformers import AutoModelForCausalLM

SPARSE = "delta:budget=64,recent=16,sinks=16,min_context=0,plan=FSRRSR"


def test_text_on_stdout_and_costs_on_stderr(run: Run, model_folder: str, tmp_path: Path) -> None:
    json_file = tmp_path / "out.json"
    result = run(
        "generate",
        "hello " * 60,
        "--model",
        model_folder,
        "--method",
        SPARSE,
        "-n",
        "12",
        "--json",
        str(json_file),
    )
    assert result.code == 0, result.err
    data = json.loads(json_file.read_text(encoding="utf-8"))
    (answer,), (costs,) = data["results"], data["runs"]
    assert result.out == answer["text"] + "\n"
    assert answer["new_tokens"] == 12 and not answer["finished"]
    assert costs["context"] == answer["prompt_tokens"] + 12
    assert 0 < costs["attended_tokens"] < costs["full_tokens"]
    assert costs["kv_bytes"] > 0 and costs["ttft_s"] > 0 and costs["decode_tokens_per_s"] > 0
    for words in ("tokens/s", "first after", "context", "fewer", "KV"):
        assert words in result.err
    assert data["versions"]["torch"] and data["machine"]["cores"] and data["method"] == SPARSE


def test_prompt_from_file_stdin_and_both(
    run: Run, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("hello there", encoding="utf-8")
    options = ("--model", model_folder, "-n", "8")
    plain = run("generate", "hello there", *options)
    assert plain.code == 0 and plain.out
    assert run("generate", "--file", str(file), *options).out == plain.out
    monkeypatch.setattr("sys.stdin", io.StringIO("hello there"))
    assert run("generate", "-", *options).out == plain.out
    both = run("generate", "what?", "--file", str(file), *options)
    assert both.out == run("generate", "hello there\n\nwhat?", *options).out != plain.out


def test_chat_template_and_system_prompt(run: Run, model_folder: str, tmp_path: Path) -> None:
    def prompt_tokens(*options: str) -> int:
        json_file = tmp_path / "out.json"
        run("generate", "hello", "--model", model_folder, "-n", "1", "--json", str(json_file), *options)
        return json.loads(json_file.read_text(encoding="utf-8"))["results"][0]["prompt_tokens"]

    assert prompt_tokens("--no-chat") == len("hello")
    assert prompt_tokens() == len("<user>hello\n<assistant>")
    assert prompt_tokens("--system", "be brief") == len("<system>be brief\n<user>hello\n<assistant>")


def test_sampling_follows_the_seed(run: Run, model_folder: str) -> None:
    def sample(seed: int) -> str:
        return run("generate", "hi", "--model", model_folder, "-n", "24", "--temperature", "2", "--seed", str(seed)).out

    assert sample(1) == sample(1) != sample(2)


def test_new_tokens_end_at_the_limit(run: Run, model_folder: str, tmp_path: Path) -> None:
    json_file = tmp_path / "out.json"
    run(
        "generate",
        "x" * (LIMIT - 5),
        "--model",
        model_folder,
        "--no-chat",
        "-n",
        "50",
        "--json",
        str(json_file),
    )
    assert json.loads(json_file.read_text(encoding="utf-8"))["results"][0]["new_tokens"] == 5


def test_answer_ends_at_the_end_token(run: Run, model_folder: str, tmp_path: Path) -> None:
    def answers(folder: Path, *prompt: str) -> list[dict[str, Any]]:
        json_file = tmp_path / "out.json"
        result = run("generate", *prompt, "--model", str(folder), "-n", "12", "--json", str(json_file))
        assert result.code == 0, result.err
        return json.loads(json_file.read_text(encoding="utf-8"))["results"]

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (whole,) = answers(folder, "hello")
    ids = torch.tensor([byte_tokenizer()("<user>hello\n<assistant>")["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    end = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[end]}), encoding="utf-8")
    (cut,) = answers(folder, "hello")
    assert cut["new_tokens"] == end + 1 and cut["finished"] and not whole["finished"]
    # In a batch the rows that end first are padded up to the longest: none of it shows.
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hello"}\n{"prompt": "and another one"}', encoding="utf-8")
    assert answers(folder, "--jsonl", str(file))[0]["text"] == cut["text"]


def test_jsonl_answers_as_each_prompt_alone(run: Run, model_folder: str, tmp_path: Path) -> None:
    prompts = ["a", "bb " * 50, "ccc"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "id": p[0]}) for p in prompts) + "\n\n", encoding="utf-8")
    options = ("--model", model_folder, "--method", SPARSE, "-n", "6")
    result = run("generate", "--jsonl", str(file), "--batch", "2", *options)
    assert result.code == 0, result.err
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [answer["id"] for answer in answers] == ["a", "b", "c"]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert run("generate", prompt, *options).out == answer["text"] + "\n"


def test_broken_jsonl_lines_are_named_and_the_others_done(run: Run, model_folder: str, tmp_path: Path) -> None:
    lines = [
        '{"prompt": "one"}',
        '{"prompt": "two"',
        '["three"]',
        '{"prompt": ""}',
        json.dumps({"prompt": "x" * 2000}),
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([*lines, '{"prompt": "six", "id": 6}']), encoding="utf-8")
    result = run("generate", "--jsonl", str(file), "--model", model_folder, "-n", "4")
    assert result.code == 2
    assert [json.loads(line)["id"] for line in result.out.splitlines()] == [1, 6]
    for number, said in ((2, "not JSON"), (3, '"prompt"'), (4, "empty"), (5, f"limit is {LIMIT:,}")):
        (line,) = [line for line in result.err.splitlines() if f"line {number}:" in line]
        assert said in line
    assert "Traceback" not in result.err


@pytest.mark.model
def test_smollm2_answers_and_ends(run: Run) -> None:
    result = run("generate", "What is the capital of France?", "--max-new-tokens", "60", "--threads", "2")
    assert result.code == 0 and "Paris" in result.out
    assert "<|im_end|>" not in result.out
    assert int(result.err.splitlines()[-1].split()[0]) < 60, "the answer does not end at <|im_end|>"


def test_a_default_by_depth_comes_with_a_hint(run: Run, model_folder: str) -> None:
    """On stderr, where DELTA runs without a plan of its own; not for who has chosen."""
    told = "no plan was measured for this kind of model: deltakv calibrate --model"
    options = ("generate", "hello", "--model", model_folder, "-n", "2")
    assert told in run(*options).err
    assert told in run(*options, "--method", "delta:budget=64,recent=16").err
    for chosen in (SPARSE, "full", "quest"):
        result = run(*options, "--method", chosen)
        assert result.code == 0 and told not in result.err

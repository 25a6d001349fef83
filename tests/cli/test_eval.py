"""`deltakv eval` on a tiny model: what is asked, answered, counted, kept and refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import LIMIT, Run, refused
from eval_data import COVERS, H2O, SPARSE, write_questions

from deltakv.evals.answering import lay_out
from deltakv.evals.questions import Question, load_questions, make_batches, shared_tokens


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def answers_of(folder: Path, method: str) -> dict[int, dict[str, Any]]:
    lines = (folder / "answers" / f"{method}.jsonl").read_text(encoding="utf-8").splitlines()
    return {answer["id"]: answer for line in lines[1:] for answer in json.loads(line)["answers"]}


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return write_questions(tmp_path / "questions.jsonl", 7)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shots", [0, 6])
def test_answers_are_generates_own(
    run: Run, model_folder: str, tmp_path: Path, questions: str, batch: int, shots: int
) -> None:
    """Under full attention, or a pick of everything, an answer is what stock `generate` says to the prompt alone: with
    a prefix that is shared and copied (six examples) and without."""
    out = tmp_path / "out"
    examples = write_questions(tmp_path / "examples.jsonl", 9, lambda n: f"What are {n} and {n % 7}?")
    result = run(
        "eval", "--task", "gsm8k", "--data", questions, "--examples", examples, "--shots", str(shots), "--no-chat",
        "--model", model_folder, "--batch", str(batch), "-n", "12", "--out", str(out),
        "--method", "full", "--method", COVERS, "--method", SPARSE, "--method", H2O,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert ("shared and prefilled once" in result.err) == (shots > 0)
    model, tokenizer = (
        kind.from_pretrained(model_folder) for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    asked = load_questions(out / "questions.jsonl")
    assert len(asked) == 7 and asked[0].prompt.count("Question:") == shots + 1
    for question in asked:
        ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        for method in ("full", "delta-budget-1024-recent-16-min_context-0-plan-FSRRSR".replace("_", "-")):
            answer = answers_of(out, method)[question.id]
            assert answer["text"] == text and answer["prompt_tokens"] == ids.shape[1]
            assert answer["new_tokens"] == 12 and not answer["finished"]
    full, covers, sparse, h2o = results_of(out)["results"]
    for entry in (full, covers, sparse, h2o):
        assert entry["questions"] == 7 and entry["truncated"] == 7 and entry["new_tokens"] == 12
        assert entry["seconds"] > 0 and entry["made"]["machine"]["cores"] and entry["kv_bytes"] > 0
    # Eleven decode steps a question: what was generated last is never fed.
    lengths = [answer["prompt_tokens"] + step for answer in answers_of(out, "full").values() for step in range(1, 12)]
    assert full["attended_tokens"] == pytest.approx(6 * sum(lengths) / len(lengths))
    assert covers["attended_tokens"] == pytest.approx(full["attended_tokens"]) and covers["versus"]["p"] == 1
    if shots:
        assert sparse["attended_tokens"] < 0.8 * sparse["full_tokens"] == pytest.approx(0.8 * full["full_tokens"])
        assert h2o["attended_tokens"] < 0.8 * full["attended_tokens"]
    assert full["versus"] is None and sparse["versus"]["method"] == "full"


def test_scores_and_the_paired_test(run: Run, model_folder: str, tmp_path: Path) -> None:
    """The tiny model knows nothing, so its stored answers are exchanged for better ones; grading begins again."""
    out, questions = tmp_path / "out", write_questions(tmp_path / "q.jsonl", 8)
    command = ("eval", "--task", "gsm8k", "--data", questions, "--model", model_folder, "-n", "4", "--out", str(out))
    assert run(*command, "--method", "full", "--method", "streaming").code == 0
    for method, right in (("full", {0, 1, 2, 3, 4, 5}), ("streaming", {0, 1, 6})):
        path = out / "answers" / f"{method}.jsonl"
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        batches = [json.loads(line) for line in lines]
        for batch in batches:
            for answer in batch["answers"]:
                n = answer["id"]
                answer["text"] = f"So\n#### {n + n % 7 if n in right else 999}"
        path.write_text("\n".join([head, *map(json.dumps, batches)]) + "\n", encoding="utf-8")
    result = run(*command, "--method", "streaming", "--method", "full")
    assert result.code == 0, result.err
    streaming, full = results_of(out)["results"]
    assert full["accuracy"] == 0.75 and full["scores"] == [1, 1, 1, 1, 1, 1, 0, 0]
    assert full["interval"] == pytest.approx([0.4093, 0.9285], abs=1e-4)
    versus = streaming["versus"]
    assert versus["difference"] == pytest.approx(-3 / 8) and (versus["better"], versus["worse"]) == (1, 4)
    assert versus["p"] == pytest.approx(2 * (1 + 5) / 2**5)
    assert "75.0% (40.9% to 92.8%)" in result.out or "75.0%" in result.out


def test_stop_strings_and_ends(run: Run, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer ends before the first stop string, counts the tokens up to it, and is none that was cut off."""
    from dataclasses import replace

    from deltakv.evals import tasks

    questions = write_questions(tmp_path / "q.jsonl", 5)
    command = ("eval", "--task", "gsm8k", "--data", questions, "--model", model_folder, "-n", "24", "--batch", "5")
    assert run(*command, "--no-chat", "--method", "full", "--out", str(tmp_path / "a")).code == 0
    free = answers_of(tmp_path / "a", "full")
    stop = free[2]["text"][7:9]  # within one answer
    monkeypatch.setitem(tasks.TASKS, "gsm8k", replace(tasks.TASKS["gsm8k"], until=("Question:", stop)))
    assert run(*command, "--no-chat", "--method", "full", "--out", str(tmp_path / "b")).code == 0
    stopped = answers_of(tmp_path / "b", "full")
    assert stopped[2]["finished"] and stopped[2]["new_tokens"] < 24
    for question, answer in free.items():
        place = answer["text"].find(stop)
        assert stopped[question]["text"] == (answer["text"] if place < 0 else answer["text"][:place])
        assert stopped[question]["finished"] == (place >= 0)
    assert results_of(tmp_path / "b")["results"][0]["truncated"] == sum(stop not in a["text"] for a in free.values())


def test_perplexity_is_the_models(run: Run, model_folder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        "eval", "--task", "perplexity", "--model", model_folder, "--context", "300", "--positions", "100",
        "--limit", "3", "--method", "full", "--method", SPARSE, "--method", H2O, "--out", str(out),
    )  # fmt: skip
    assert result.code == 0, result.err
    model, tokenizer = (
        kind.from_pretrained(model_folder) for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    from deltakv.evals.texts import builtin_text

    ids = torch.tensor([tokenizer(builtin_text()[:1200])["input_ids"][:900]]).view(3, 300)
    with torch.no_grad():
        said = model(ids).logits.double().log_softmax(-1)[:, 199:299].gather(2, ids[:, 200:, None])
    full, sparse, h2o = results_of(out)["results"]
    assert full["perplexity"] == pytest.approx(said.mean().neg().exp().item(), rel=1e-5)
    assert full["interval"][0] < full["perplexity"] < full["interval"][1]
    assert full["attended_tokens"] == pytest.approx(6 * sum(range(200, 300)) / 100)
    for entry in (sparse, h2o):
        assert entry["attended_tokens"] < full["attended_tokens"]
        assert entry["versus"]["ratio"] == pytest.approx(entry["perplexity"] / full["perplexity"]) != 1


@pytest.mark.parametrize("task", ["needle", "tracking"])
def test_hidden_things_fit(run: Run, model_folder: str, tmp_path: Path, task: str) -> None:
    out = tmp_path / "out"
    result = run(
        "eval", "--task", task, "--model", model_folder, "--context", "900", "--limit", "3", "-n", "8",
        "--out", str(out), "--method", "full", "--no-chat",
    )  # fmt: skip
    assert result.code == 0, result.err
    lengths = [answer["prompt_tokens"] for answer in answers_of(out, "full").values()]
    assert all(400 < length <= 900 for length in lengths)


def test_answered_on_another_machine(
    run: Run, model_folder: str, tmp_path: Path, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts here, answers where neither data nor harness are, and results here again."""
    out, asked = tmp_path / "out", ("--task", "gsm8k", "--data", questions, "-n", "6", "--model", model_folder)
    methods = ("--method", "full", "--method", SPARSE)
    assert run("eval", *asked, *methods, "--out", str(out), "--stop-after", "questions").code == 0
    assert not list((out / "answers").iterdir()) and not (out / "results.json").exists()
    with monkeypatch.context() as away:
        for name in ("lm_eval", "lm_eval.api.model", "datasets", "math_verify", "deltakv.evals.harness"):
            away.setitem(sys.modules, name, None)
        hidden = Path(questions).rename(tmp_path / "hidden")
        result = run("eval", *methods, "--model", model_folder, "--out", str(out), "--stop-after", "answers")
        assert result.code == 0, result.err
        refused(run("eval", "--model", model_folder, "--out", str(out)), "is not installed", "deltakv[eval]")
        hidden.rename(questions)
    before = [path.read_bytes() for path in sorted((out / "answers").iterdir())]
    assert run("eval", "--model", model_folder, "--out", str(out)).code == 0  # all methods that have answered
    assert [path.read_bytes() for path in sorted((out / "answers").iterdir())] == before
    assert {entry["method"] for entry in results_of(out)["results"]} == {"full", SPARSE}


def test_sampled_answers_do_not_depend_on_where_a_run_was_interrupted(
    run: Run, model_folder: str, tmp_path: Path, questions: str
) -> None:
    command = (
        "eval", "--task", "gsm8k", "--data", questions, "--model", model_folder, "-n", "6", "--temperature", "1",
        "--batch", "2", "--method", SPARSE,
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*command, "--out", str(whole)).code == 0 and run(*command, "--out", str(cut)).code == 0
    (journal,) = (cut / "answers").iterdir()
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:3])[:-9])
    assert run(*command, "--out", str(cut)).code == 0
    assert answers_of(cut, journal.stem) == answers_of(whole, journal.stem)
    other = tmp_path / "other"
    assert run(*command, "--seed", "1", "--out", str(other)).code == 0
    assert answers_of(other, journal.stem) != answers_of(whole, journal.stem)


def test_examples_from_the_data_are_not_asked(run: Run, model_folder: str, tmp_path: Path, questions: str) -> None:
    out = tmp_path / "out"
    options = ("--task", "gsm8k", "--data", questions, "--model", model_folder, "-n", "2", "--method", "full")
    assert run("eval", *options, "--shot-tokens", "180", "--out", str(out)).code == 0
    asked = load_questions(out / "questions.jsonl")
    (_, *examples), shown = asked[0].prompt.split("Question: "), asked[0].prompt.count("####")
    assert shown == results_of(out)["examples"] == len(examples) - 1 and 2 <= shown < 7
    assert len(asked) == 7 - shown and len(asked[0].prompt.rpartition("Question: ")[0]) <= 180


def test_a_run_in_the_folder_is_not_mixed_with_another(
    run: Run, model_folder: str, tmp_path: Path, questions: str
) -> None:
    out = ("--out", str(tmp_path / "out"))
    command = ("eval", "--task", "gsm8k", "--data", questions, "--model", model_folder, "-n", "2", "--method", "full")
    assert run(*command, *out).code == 0
    refused(run(*command, *out, "--batch", "2"), "with batch 1, and this one has 2", "give another --out")
    refused(run(*command, *out, "--limit", "3"), "with limit None, and this one has 3")
    refused(run(*command, *out, "--dtype", "bfloat16", "--method", "delta"), "dtype 'float32'", "'bfloat16'")
    from filelock import FileLock

    with FileLock(tmp_path / "out" / ".lock"):
        refused(run(*command, *out), "another deltakv eval is at work")
    write_questions(Path(questions), 7, lambda n: f"{n} or {n}?")
    refused(run(*command, *out), "other data or examples")


def test_a_folder_that_was_damaged_is_refused(run: Run, model_folder: str, tmp_path: Path, questions: str) -> None:
    """By name, and before a model is loaded or an answer graded against another question's."""
    out = tmp_path / "out"
    again = ("eval", "--model", model_folder, "--out", str(out))
    whole = (*again, "--task", "gsm8k", "--data", questions, "-n", "2", "--method", "full")
    assert run(*whole).code == 0
    answers, asked = out / "answers" / "full.jsonl", out / "questions.jsonl"
    stray = out / "answers" / "stray.jsonl"

    def damaged(path: Path, old: str, new: str, *said: str) -> None:
        before = path.read_bytes() if path.exists() else None
        path.write_text(before.decode().replace(old, new, 1) if before is not None else new, encoding="utf-8")
        for command in (again, whole):
            refused(run(*command), *said)
        path.unlink() if before is None else path.write_bytes(before)

    first = answers.read_text(encoding="utf-8").splitlines()[0]
    for new in ("garbage", "{}", "[1]"):
        damaged(answers, first, new, "full.jsonl")
    damaged(stray, "", "foo\n", "stray.jsonl", "line 1: damaged")
    damaged(answers, '"id": 0,', '"id": 77,', "full.jsonl answers question 77", "not asked")
    lines = asked.read_text(encoding="utf-8").splitlines(keepends=True)
    damaged(asked, lines[0], "", "questions.jsonl is not what this run has written")
    damaged(asked, "".join(lines[:2]), lines[1] + lines[0], "questions.jsonl is not what this run has written")
    damaged(asked, "".join(lines), "", "questions.jsonl", "there are none")
    stray.mkdir()
    refused(run(*again), "stray.jsonl", "take the file away")
    stray.rmdir()
    assert run(*again).code == 0 and run(*whole).code == 0


def test_each_batch_is_sampled_by_itself(run: Run, model_folder: str, tmp_path: Path) -> None:
    out, same = tmp_path / "out", tmp_path / "same.jsonl"
    same.write_text(4 * (json.dumps({"question": "Again?", "answer": "#### 1"}) + "\n"), encoding="utf-8")
    command = ("eval", "--task", "gsm8k", "--data", str(same), "--model", model_folder, "-n", "8", "--temperature", "1")
    assert run(*command, "--batch", "2", "--method", "full", "--out", str(out)).code == 0
    texts = [answer["text"] for _, answer in sorted(answers_of(out, "full").items())]
    assert len(texts) == 4 and texts[:2] != texts[2:]


def test_refusals(run: Run, model_folder: str, tmp_path: Path, questions: str) -> None:
    out = ("--model", model_folder, "--out", str(tmp_path / "out"))
    gsm8k = ("eval", "--task", "gsm8k", "--data", questions, *out)
    refused(run("eval", *out), "no --task", "deltakv eval --help")
    refused(run("eval", "--task", "gsm9k", *out), "unknown task 'gsm9k'", "gsm8k")
    refused(run(*gsm8k, "--method", "delat"), "'delat'")
    refused(run(*gsm8k, "--method", "delta:plan=FFS"), "3 layers, but the model has 6")
    refused(run(*gsm8k, "--stop-after", "lunch"), "'lunch'", "questions, answers, results")
    refused(run(*gsm8k, "--shots", "2", "--shot-tokens", "9"), "not both")
    refused(run(*gsm8k, "--shots", "70"), "there are 7 examples")
    refused(run(*gsm8k, "--shots", "7"), "all 7 rows")
    refused(run(*gsm8k, "--shot-tokens", "7000"), "all 7 examples are")
    refused(run(*gsm8k, "--shot-tokens", "3"), "less than the first example")
    refused(run(*gsm8k, "--device", "quantum"), "quantum")
    refused(run(*gsm8k, "--text", questions), "--text is for needle")
    refused(run("eval", "--task", "needle", "--shots", "2", *out), "no worked examples")
    refused(run("eval", "--task", "needle", "--data", questions, *out), "has no --data")
    refused(run("eval", "--task", "needle", "--context", "5000", *out), "limit is 1,024")
    refused(run("eval", "--task", "perplexity", "--context", "200", "--positions", "199", *out), "--positions 199")
    refused(run("eval", "--task", "perplexity", "--context", "9999999", *out), "the text has")
    refused(run("eval", "--task", "gsm8k", "--data", str(tmp_path / "no.jsonl"), *out), "no.jsonl cannot be read")
    long = write_questions(tmp_path / "long.jsonl", 2, lambda n: "x" * LIMIT)
    refused(run("eval", "--task", "gsm8k", "--data", long, *out), "the longest prompt has", f"limit is {LIMIT:,}")
    (tmp_path / "file").write_text("", encoding="utf-8")
    refused(run(*gsm8k[:-1], str(tmp_path / "file")), "cannot write to the folder")


def test_help(run: Run) -> None:
    result = run("eval", "--help")
    assert result.code == 0 and "deltakv eval" in result.out and "Example:" in result.out


def test_batches_and_prefixes() -> None:
    prompts = [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2], [1, 2, 9, 9]]
    batches = make_batches([Question(n, "") for n in range(4)], prompts, 3)
    assert [[q.id for q in batch.questions] for batch in batches] == [[1, 3, 0], [2]]
    assert batches[0].prompts == [prompts[1], prompts[3], prompts[0]]
    head = list(range(500))
    assert shared_tokens([[*head, 1, 2], [*head, 3, 4, 5]]) == 500
    assert shared_tokens([head, [*head, 3, 4, 5]]) == 498, "two tokens are left to each"
    assert shared_tokens([head]) == 0 and shared_tokens([[1, 2, 3], [1, 2, 4]]) == 0


def test_windows_and_gaps_do_not_go_together(model_folder: str) -> None:
    from transformers import AutoTokenizer, Gemma3TextConfig

    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    questions = [Question(n, "x" * 300 + "y" * n, (), 5) for n in range(1, 3)]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert [lay_out(questions, tokenizer, config, batch, False).shared for batch in (1, 2)] == [299, 0]
    assert math.isfinite(lay_out(questions, tokenizer, config, 1, False).new_tokens)

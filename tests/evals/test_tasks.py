"""Rows of real data to questions, worked examples and grades."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from deltakv.errors import InputError
from deltakv.evals import data, ruler
from deltakv.evals.grading import grade
from deltakv.evals.harness import Prompting, make_questions, score
from deltakv.evals.tasks import TASKS, Doc, find_task
from deltakv.evals.texts import builtin_text

GSM8K = {"question": "How many?", "answer": "Half of 140,000 is <<140000/2=70000>>70,000.\n#### 70,000"}
GPQA = {
    "Question": "Which?", "Correct Answer": "right", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b",
    "Incorrect Answer 3": "c",
}  # fmt: skip


def words(text: str) -> int:
    return len(text.split())


def test_prompts_as_the_harness_makes_them() -> None:
    task = find_task("gsm8k")
    docs = task.docs([GSM8K, {"question": "And now?", "answer": "#### 3"}], "a file")
    assert docs[0].gold == "70000"
    shown = Doc("One and one?", "2", "1+1=2\n#### 2")
    first, second = make_questions(task, docs, Prompting([shown], None, 77))
    assert first.prompt == "Question: One and one?\nAnswer: 1+1=2\n#### 2\n\nQuestion: How many?\nAnswer:"
    assert second.prompt.endswith("Question: And now?\nAnswer:") and (first.id, second.id) == (0, 1)
    assert first.until == ("Question:",) and first.max_new_tokens == 77
    (alone, _) = make_questions(task, docs, Prompting())
    assert alone.prompt.startswith("Question: How many?\nReason step by step") and alone.prompt.endswith("\nAnswer:")


def test_prompts_through_a_chat_template() -> None:
    task = find_task("gsm8k")
    said: list[list[dict[str, str]]] = []

    def template(messages: list[dict[str, str]]) -> str:
        said.append(messages)
        return "filled"

    (question,) = make_questions(task, task.docs([GSM8K], ""), Prompting([Doc("One?", "1", "It is 1.")], template))
    assert question.prompt == "filled" and question.until == ()
    assert [(m["role"], m["content"]) for m in said[-1]] == [
        ("user", "One?"), ("assistant", "It is 1."), ("user", "How many?"),
    ]  # fmt: skip


def test_scores_come_back_in_order() -> None:
    task = find_task("gsm8k")
    docs = task.docs([{"question": str(n), "answer": f"#### {n}"} for n in range(12)], "")
    answers = [f"so\n#### {n if n % 3 else 99}" for n in range(12)]
    assert score(task, docs, Prompting(docs[:2]), answers) == [float(n % 3 > 0) for n in range(12)]
    texts = find_task("perplexity")
    assert score(texts, [Doc("a", "", "b")] * 2, Prompting(), [-1.5, -2.5]) == [1.5, 2.5]


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("70000", "so it is\n#### 70,000", True),
        ("70000", "so it is $70,000.", True),
        ("18", "16 - 3 = 13, 13 + 5 = 18\n#### 18\nand 19 more", True),
        ("18", "#### 19", False),
        ("18", "", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"thus $\boxed{(3,\pi/2)}$", True),
        (r"\frac{14}{3}", r"The answer is \boxed{14/3}.", True),
        (r"\frac{14}{3}", r"The answer is \boxed{14/5}.", False),
        (r"\text{Evelyn}", r"$\boxed{\text{Evelyn}}$", True),
        ("204", "The final answer is 204.", True),
    ],
)
def test_mathematics(gold: str, answer: str, right: bool) -> None:
    assert grade("math", gold, answer) == right


@pytest.mark.parametrize("answer", ["The answer is (B).", "B", "(A) is wrong. **The answer is (B)**", r"$\boxed{(B)}$"])
def test_letters(answer: str) -> None:
    assert grade("letter", "B", answer) == 1 and grade("letter", "A", answer) == 0


def test_words_count_by_their_share() -> None:
    assert grade("words", "ABCDE FGHIJ", "it is FGHIJ, and ABCDE") == 1
    assert grade("words", "ABCDE FGHIJ", "ABCDE ABCDE") == 0.5


def test_choices_are_shuffled_and_stay_so() -> None:
    task = find_task("gpqa")
    docs, again = (task.docs([GPQA] * 200, "") for _ in range(2))
    assert docs == again
    letters = Counter(doc.gold for doc in docs)
    assert set(letters) == set("ABCD") and max(letters.values()) < 80
    assert all(f"({doc.gold}) right" in doc.question for doc in docs)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("math500", {"problem": "p", "solution": "s", "answer": "4"}),
        ("aime24", {"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 4}),
        ("aime25", {"problem": "p", "answer": "4", "id": "0"}),
    ],
)
def test_competitions_by_their_own_fields(task: str, row: dict[str, str]) -> None:
    (doc,) = find_task(task).docs([row], "")
    assert (doc.question, doc.gold) == ("p", "4") and doc.worked


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown task 'gsm9k'; allowed are gsm8k, "):
        find_task("gsm9k")
    with pytest.raises(InputError, match="question 2: no field 'question' for the task gsm8k; it has answer"):
        find_task("gsm8k").docs([GSM8K, {"answer": "#### 1"}], "x.jsonl")
    file = tmp_path / "x.jsonl"
    for text, said in (('{"a": 1}\n{"a":\n', "line 2: not JSON"), ("[1]\n", "line 1: not an object"), ("\n", "empty")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=said):
            data.read_rows(file)
    with pytest.raises(InputError, match="cannot be read"):
        data.load_rows(str(tmp_path / "nowhere.jsonl"), None)


def test_a_set_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def fetch(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        if name == "down/down":
            raise ConnectionError("no\nroute")
        return [{"question": "q"}]

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    assert data.load_rows("openai/gsm8k", TASKS["gsm8k"].examples) == [{"question": "q"}]
    assert data.load_rows("other/set", TASKS["gsm8k"].hub) == [{"question": "q"}]
    assert asked == [("openai/gsm8k", "main", "train"), ("other/set", None, "test")]
    with pytest.raises(InputError, match=r"'down/down' from the Hub \(no route\); give a JSONL"):
        data.load_rows("down/down", None)


@pytest.mark.parametrize("task", ["needle", "tracking"])
def test_hidden_things(task: str) -> None:
    sentences = re.split(r"(?<=[.!?])\s+", builtin_text())
    text = " ".join(piece for piece in sentences if words(piece) <= 40)  # how long the others are is Python's release's
    docs = ruler.make_docs(task, 6, 600, text, words, seed=3)
    assert docs == ruler.make_docs(task, 6, 600, text, words, seed=3)
    assert docs != ruler.make_docs(task, 6, 600, text, words, seed=4)
    for doc in docs:
        assert 480 < words(doc.question) <= 600
        assert json.loads(json.dumps(doc.row())) == doc.row()
        if task == "needle":
            key = doc.lead.split(" for ")[1].split()[0]
            assert doc.question.count(f"for {key} is: {doc.gold}.") == 1
        else:
            names = doc.gold.split()
            number = doc.lead.split("value ")[1].split(",")[0]
            chain = [f"VAR {names[0]} = {number}."] + [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
            places = [doc.question.index(link) for link in chain]
            assert len(set(names)) == 5 and places == sorted(places)
    if task == "needle":  # depths are spread over the text
        depths = [doc.question.index("One of the special") / len(doc.question) for doc in docs]
        assert depths == sorted(depths) and depths[0] < 0.2 and depths[-1] > 0.8


def test_too_short_to_hide_in() -> None:
    with pytest.raises(InputError, match="--context 100 is too short"):
        ruler.make_docs("needle", 1, 100, builtin_text(), words, 0)
    with pytest.raises(InputError, match="no sentence"):
        ruler.make_docs("needle", 1, 500, "one. two.", words, 0)

"""`deltakv report`: one page from the files of the other commands, and what it refuses."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run, refused
from eval_data import SPARSE, write_questions

METHODS = ("full", SPARSE, SPARSE.replace("budget=64", "budget=128"), "quest:budget=64", "quest:budget=128")


@pytest.fixture(scope="module")
def files(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Real ones, of a tiny model."""
    from deltakv.cli import main

    folder = tmp_path_factory.mktemp("results")
    methods = [word for method in METHODS for word in ("--method", method)]
    model = ("--model", model_folder)
    out = {name: str(folder / f"{name}.json") for name in ("compare", "picks", "sweep")}
    questions = write_questions(folder / "q.jsonl", 6)
    for words in (
        ("compare", *model, *methods, "--context", "300", "--positions", "40", "--steps", "2", "--no-memory", "--json",
         out["compare"]),
        ("inspect", *model, "--method", SPARSE, "--context", "300", "--steps", "30", "--json", out["picks"], "--out",
         str(folder / "picks.png")),
        ("bench", "sweep", "--model", "tiny", "--batch-size", "1", "--input-len", "64,128", "--num-iters", "1",
         "--num-iters-warmup", "0", "--method", "full", "--method", "quest:budget=64", "--json", out["sweep"]),
        ("eval", "--task", "gsm8k", "--data", questions, "--shots", "2", *model, "-n", "3", *methods, "--out",
         str(folder / "gsm8k")),
        ("eval", "--task", "perplexity", *model, "--context", "200", "--positions", "30", "--limit", "2", *methods,
         "--out", str(folder / "perplexity")),
    ):  # fmt: skip
        with torch.enable_grad(), pytest.raises(SystemExit) as exit_:  # commands turn gradients off, and leave it so
            main(list(words))
        assert not exit_.value.code
    return [*out.values(), *(str(folder / name / "results.json") for name in ("gsm8k", "perplexity"))]


def test_one_page_of_everything(run: Run, files: list[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("report", *files, "--out", str(page), "--title", "Ours & theirs")
    assert result.code == 0, result.err
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text and 'name="viewport"' in text and "<h1>Ours &amp; theirs</h1>" in text
    outside = r"""(?:src|href)\s*=\s*(?!["']?data:)|@import|url\(|https?://"""
    assert not re.search(outside, text), "the page needs something from outside"
    sections = re.findall(r"<h2>(.*?)</h2>", text)
    assert sections == ["Answers", "Fidelity", "Speed", "Picks", "Where the numbers are from"]
    # Accuracy; KL over attended tokens and over budgets; step times of compare and of bench. Picks of two layers.
    assert text.count('role="img"') == 5 and text.count("data:image/png;base64,iVBOR") == 2
    compared = {entry["method"]: entry for entry in json.loads(Path(files[0]).read_text(encoding="utf-8"))["results"]}
    for method, entry in compared.items():
        row = re.search(rf'<td data-head="method">{re.escape(method)}</td><td data-head="attended">([\d,]+)</td>'
                        r'<td data-head="mean KL">([\d.]+)</td>', text)  # fmt: skip
        assert row and row.group(1) == f"{entry['attended_tokens']:,.0f}" and row.group(2) == f"{entry['kl_mean']:.4f}"
    assert " questions, each behind 2 worked examples</h3>" in text
    gsm8k = json.loads(Path(files[3]).read_text(encoding="utf-8"))
    for entry in gsm8k["results"]:
        assert f'data-head="accuracy">{entry["accuracy"]:.1%} (' in text
    assert all(Path(file).name in text for file in files)


def test_sections_without_results_are_left_out(run: Run, files: list[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert run("report", files[1], "--out", str(page)).code == 0
    assert re.findall(r"<h2>(.*?)</h2>", page.read_text(encoding="utf-8")) == ["Picks", "Where the numbers are from"]


def test_what_a_calibration_measured(run: Run, model_folder: str, tmp_path: Path) -> None:
    file, page = tmp_path / "plan.json", tmp_path / "report.html"
    words = (
        "--context",
        "300",
        "--budget",
        "64",
        "--reading",
        "2",
        "--windows",
        "1",
        "--positions",
        "16",
        "--quick",
        "4",
    )
    small = (*words, "--confirm-positions", "32")
    assert run("calibrate", "--model", model_folder, "--out", str(file), *small).code == 0
    data = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**data, "model": "m<1>"}), encoding="utf-8")
    assert run("report", str(file), "--out", str(page)).code == 0
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Fidelity", "Where the numbers are from"]
    assert "m&lt;1&gt;" in text and "<1>" not in text and text.count('role="img"') >= 1
    for entry in data["confirmed"]:
        assert html.escape(entry["method"]) in text and f"{entry['attended_tokens']:,.0f}" in text


def test_answers_are_from_where_they_were_given(run: Run, files: list[str], tmp_path: Path) -> None:
    """And not from where they were graded; those of a method may be from elsewhere than the others'."""
    data = json.loads(Path(files[3]).read_text(encoding="utf-8"))
    assert {row["made"]["date"][:10] for row in data["results"]} == {data["date"][:10]}
    for row in data["results"]:
        row["made"] |= {"machine": {"gpus": ["a GPU that nobody has"]}, "device": "cuda:0", "commit": "a" * 40}
    data["results"][-1]["made"]["commit"] = "b" * 40
    data["commit"] = "c" * 40
    file, page = tmp_path / "results.json", tmp_path / "page.html"
    file.write_text(json.dumps(data), encoding="utf-8")
    result = run("report", str(file), "--out", str(page))
    assert result.code == 0, result.err
    sources = page.read_text(encoding="utf-8").split("Where the numbers are from")[1]
    assert sources.count("a GPU that nobody has") == 2
    assert sources.count("a" * 9) == sources.count("b" * 9) == 1 and "c" * 9 not in sources
    for row in data["results"]:  # a machine may have a GPU that did not work
        row["made"] |= {
            "machine": {"gpus": ["an idle GPU"], "cores": 7, "cpu": "a CPU that nobody has"},
            "device": "cpu",
        }
    file.write_text(json.dumps(data), encoding="utf-8")
    assert run("report", str(file), "--out", str(page)).code == 0
    assert "7 cores of a CPU that nobody has" in page.read_text(encoding="utf-8")
    assert "an idle GPU" not in page.read_text(encoding="utf-8")
    for broken in (None, {"machine": [1]}, {"versions": "x"}):
        data["results"][-1]["made"] = broken
        file.write_text(json.dumps(data), encoding="utf-8")
        refused(run("report", str(file), "--out", str(page)), "is not whole")


def test_a_budget_that_is_no_number_is_left_out(run: Run, files: list[str], tmp_path: Path) -> None:
    data = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    for entry in data["results"]:
        entry["method"] = entry["method"].replace("budget=128", "budget=128foo")
    (tmp_path / "x.json").write_text(json.dumps(data), encoding="utf-8")
    result = run("report", str(tmp_path / "x.json"), "--out", str(tmp_path / "page.html"))
    assert result.code == 0 and "128foo" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_refusals(run: Run, files: list[str], tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "page.html"))

    def written(data: Any) -> str:
        path = tmp_path / "x.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return str(path)

    refused(run("report", *out), "FILES", "deltakv report --help")
    refused(run("report", str(tmp_path / "no.json"), *out), "no.json cannot be read")
    refused(run("report", written("{"), *out), "x.json is not JSON")
    refused(run("report", written([1]), *out), "does not hold an object")
    refused(run("report", files[0], written({"results": []}), *out), "x.json holds no results of compare")
    refused(run("report", written({"kind": "eval", "results": [{"method": "full"}]}), *out), "x.json", "not whole")
    refused(run("report", written({"picks": {"1": []}}), *out), "x.json", "not whole")
    gsm8k, compared = (json.loads(Path(files[index]).read_text(encoding="utf-8")) for index in (3, 0))
    refused(run("report", written({**gsm8k, "results": []}), *out), "x.json", "no results")
    for name, value in (("accuracy", None), ("attended_tokens", "many"), ("interval", [0.1]), ("versus", {"p": 1})):
        spoilt = {**gsm8k, "results": [{**gsm8k["results"][1], name: value}]}
        refused(run("report", written(spoilt), *out), "x.json", "not whole")
    for name in ("method", "questions", "new_tokens", "full_tokens"):
        spoilt = {key: value for key, value in gsm8k["results"][1].items() if key != name}
        refused(run("report", written({**gsm8k, "results": [spoilt]}), *out), "x.json", "not whole", name)
    for name in ("kl_mean", "perplexity", "top1"):
        spoilt = {**compared, "results": [{**compared["results"][1], name: "0.1"}]}
        refused(run("report", written(spoilt), *out), "x.json", f"{name} is '0.1'")
    refused(run("report", files[0], "--out", str(tmp_path / "page.png")), "must end in .html")
    refused(run("report", files[0], "--out", str(tmp_path / "no" / "page.html")), "its folder does not exist")
    assert not (tmp_path / "page.html").exists()


def test_help(run: Run) -> None:
    result = run("report", "--help")
    assert result.code == 0 and "deltakv report" in result.out and "Example:" in result.out


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1190, 1280])
def test_in_a_browser_nothing_scrolls_sideways(run: Run, files: list[str], tmp_path: Path, width: int) -> None:
    page, frame = tmp_path / "report.html", tmp_path / "frame.html"
    assert run("report", *files, "--out", str(page)).code == 0
    frame.write_text(
        f'<iframe id=f src="{page}" style="border:0;width:{width}px;height:900px"></iframe><pre id=o></pre><script>'
        "f.onload=()=>{const d=f.contentDocument;d.querySelectorAll('details').forEach(x=>x.open=true);"
        "o.textContent=`width ${d.documentElement.scrollWidth} charts ${d.querySelectorAll('svg').length}`}</script>",
        encoding="utf-8",
    )
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--hide-scrollbars", "--window-size=1400,1000", "--virtual-time-budget=4000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", str(frame)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = re.search(r"width (\d+) charts (\d+)", done.stdout)
    assert said, done.stderr
    assert int(said.group(1)) == width and int(said.group(2)) >= 5

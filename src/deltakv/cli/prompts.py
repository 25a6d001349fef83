"""Prompts from an argument, a file, stdin or a JSONL, and what a chat template makes of them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakv.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """One prompt; `line` is its line in the JSONL (from 1), or None."""

    text: str
    id: str | int | None = None
    line: int | None = None


def read_one(argument: str | None, file: Path | None) -> Prompt:
    """The prompt of an argument, `-` (stdin) or a file; of both, the file's text and then the argument.

    Raises `InputError` if it is missing or empty.
    """
    parts: list[str] = []
    if file is not None:
        parts.append(_not_empty(read_text(file), f"the file {file}"))
    if argument == "-":
        parts.append(_not_empty(sys.stdin.read(), "stdin"))
    elif argument is not None:
        parts.append(_not_empty(argument, "the prompt"))
    if not parts:
        raise InputError("no prompt: give one as an argument, - for stdin, --file FILE, or --jsonl FILE")
    return Prompt("\n\n".join(parts))


def _not_empty(text: str, where: str) -> str:
    if not text.strip():
        raise InputError(f"{where} is empty; give a prompt with some text")
    return text


def read_jsonl(path: Path) -> tuple[list[Prompt], list[str]]:
    """The prompts of a JSONL file, and one message for each line that is broken; blank lines do not count.

    Each line is an object with `prompt` (a string) and, if wanted, `id`. Raises `InputError` if none is
    there.
    """
    prompts: list[Prompt] = []
    broken: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_parse_line(line, number))
        except InputError as error:
            broken.append(f"{path}, line {number}: {error}")
    if not prompts and not broken:
        raise InputError(f'the file {path} is empty; give one object with "prompt" a line')
    return prompts, broken


def _parse_line(line: str, number: int) -> Prompt:
    try:
        data: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise InputError("not JSON that can be read (nested too deeply)") from None
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise InputError('needs an object with "prompt", a string')
    if not data["prompt"].strip():
        raise InputError('"prompt" is empty')
    if any("\ud800" <= character <= "\udfff" for character in data["prompt"]):
        raise InputError('"prompt" holds half of a surrogate pair, which is no character')
    name = data.get("id", number)
    if not isinstance(name, str | int):
        raise InputError('"id" must be a string or a number')
    return Prompt(data["prompt"], id=name, line=number)


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises `InputError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"the file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the file {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"the file {path} cannot be read: {error.strerror}") from None


def encode(tokenizer: Any, text: str, chat: bool, system: str | None) -> list[int]:
    """The prompt's token ids, through the chat template if `chat` and the model has one."""
    if chat and tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if system:
        text = f"{system}\n\n{text}"
    return tokenizer(text)["input_ids"]

"""Long texts with something to find in them, in the style of RULER (Hsieh et al., arXiv 2404.06654).

`needle` is its NIAH (one key, one number, prose around it); `tracking` its variable tracking (one chain of four hops).
Two things differ: the prose is the caller's (by default Python's language reference), and texts are filled up to the
asked length sentence by sentence, by the model's own tokenizer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise

from deltakv.errors import InputError
from deltakv.evals.tasks import Doc

HOPS = 4
_LEAST = 256  # tokens: the question itself has some hundred
_FRAME = 48  # tokens for what a chat template, or the word "Answer:", puts around it


def make_docs(task: str, count: int, tokens: int, text: str, tokenize: Callable[[str], int], seed: int) -> list[Doc]:
    """`count` questions of about `tokens` tokens, and never more.

    tokenize: how many tokens a text has. Needles and chains lie at depths that are spread evenly over the questions.
    Raises `InputError` if `tokens` are too few, or the text has no prose.
    """
    if tokens < _LEAST:
        raise InputError(f"--context {tokens} is too short to hide something in; give at least {_LEAST}")
    sentences = [" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+", text)]
    sentences = [piece for piece in sentences if len(piece.split()) >= 4]
    if not sentences:
        raise InputError("the text has no sentence of four words or more to hide something in")
    lengths = [tokenize(" " + sentence) for sentence in sentences]
    docs = []
    for number in range(count):
        rng = random.Random(f"{seed} {task} {number}")
        start = rng.randrange(len(sentences))
        hidden = (_needle if task == "needle" else _chain)(rng)
        said = [hidden.before, hidden.after, hidden.lead, *hidden.sentences]
        room = tokens - sum(map(tokenize, said)) - 2 * len(said) - _FRAME
        prose = list(_take(sentences, lengths, start, room))
        depth = (number + 0.5) / count
        many = len(hidden.sentences) > 1
        places = sorted(rng.uniform(0, 1) for _ in hidden.sentences) if many else [depth]
        before = [round(place * len(prose)) for place in places]
        for index, sentence in reversed(list(zip(before, hidden.sentences, strict=True))):
            prose.insert(index, sentence)
        question = f"{hidden.before}\n{' '.join(prose)}\n{hidden.after}"
        docs.append(Doc(question, hidden.gold, ", ".join(hidden.gold.split()), hidden.lead))
    return docs


def _take(sentences: list[str], lengths: list[int], start: int, room: int) -> Iterator[str]:
    """Sentences from `start` on, round and round, as long as they fit."""
    for index in cycle([*range(start, len(sentences)), *range(start)]):
        room -= lengths[index]
        if room < 0:
            return
        yield sentences[index]


@dataclass(frozen=True)
class _Hidden:
    """sentences: what is hidden, in this order. before, after: around the text. lead: how the answer begins."""

    sentences: list[str]
    before: str
    after: str
    lead: str
    gold: str


def _needle(rng: random.Random) -> _Hidden:
    key = "-".join(rng.sample(_WORDS, 2))
    number = str(rng.randrange(1_000_000, 10_000_000))
    return _Hidden(
        [f"One of the special magic numbers for {key} is: {number}."],
        "A special magic number is hidden within the following text. Make sure to memorize it.",
        f"What is the special magic number for {key} mentioned in the text above?",
        f" The special magic number for {key} mentioned in the text above is",
        number,
    )


def _chain(rng: random.Random) -> _Hidden:
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        names += [name] if name not in names else []
    number = rng.randrange(10_000, 100_000)
    chain = [f"VAR {after} = VAR {before}." for before, after in pairwise(names)]
    return _Hidden(
        [f"VAR {names[0]} = {number}.", *chain],
        "Memorize and track the chain of variable assignment hidden in the following text.",
        f"Find all {HOPS + 1} variables that are assigned the value {number} in the text above.",
        f" {HOPS + 1} variables are assigned the value {number}, they are:",
        " ".join(names),
    )


#: Keys are two of these.
_WORDS = tuple(
    """amber anchor autumn basket beacon birch bramble candle canyon cedar cinder clover cobalt copper coral cotton
    crystal dahlia ember falcon feather fern flint garnet ginger granite harbor hazel heron indigo ivory jasmine
    juniper lantern lemon lilac linen maple marble meadow mellow mica mint moss nectar nutmeg oak ochre olive onyx
    opal orchid osprey otter pebble pepper pine plum poppy quartz quill raven reed ribbon river rowan ruby saffron
    sage sandal satin shale silver slate sorrel sparrow spruce tansy teal thistle thyme timber topaz tulip umber
    velvet violet walnut willow wren yarrow zephyr""".split()  # noqa: SIM905  a list would take a line a word
)

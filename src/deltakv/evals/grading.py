"""Whether an answer is right: mathematics and letters by math-verify, RULER's by the words that must be in it."""

from __future__ import annotations

import logging
import re

from deltakv.evals.tasks import LETTER, MATH, WORDS, stated_answer


def grade(kind: str, gold: str, answer: str) -> float:
    """From 0 to 1; mathematics and letters give nothing in between, words the share that was found.

    kind: what the task is graded by. An answer that math-verify cannot read, or not in time, is wrong.
    """
    if kind == WORDS:
        words = gold.split()
        return sum(word in answer for word in words) / len(words)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it tells of each answer that has no expression
    if kind == LETTER:
        letters = [StringExtractionConfig(strings=("A", "B", "C", "D"), lowercase=False)]
        # math-verify looks for a letter that stands alone, and (B), $B$ and \boxed{B} do not, to it.
        bare = re.sub(r"\\boxed\{(?:\\text\{)?\(?([A-D])\)?\}+|\(([A-D])\)", r"\1\2", answer).replace("$", " ")
        return float(verify(parse(gold, letters), parse(bare, letters)))
    assert kind == MATH
    kinds = [LatexExtractionConfig(), ExprExtractionConfig()]
    return float(verify(parse(f"${gold}$", kinds), parse(stated_answer(answer), kinds)))

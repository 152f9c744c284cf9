"""The answer in a generated text, and whether it is right: the LLM-Adapters protocol, which the paper follows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .recipe import Metric

LETTERS = ("A", "B", "C", "D", "E")
TOLERANCE = 1e-3
OPTION_WORDS = r"true|false|(?:solution|answer|ending|option)[0-9]+"
_NUMBER = re.compile(r"((?<![\w)\]])[-\u2212])?[$£€]?([0-9]+(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+)")


def extract(text: str, metric: Metric, options: Sequence[str] = ()) -> str | None:
    """The answer that a generated text gives, by the LLM-Adapters protocol that the paper follows; None if it has none.

    number: the last number. Commas between digits go ("1,200" is 1200), a currency sign and a final period are no part
        of it, and a minus counts unless it follows a digit, a letter or a bracket ("10-8" ends in 8). "3/4" ends in 4.
    letter: a letter is one of `options` (default A to E), upper case, and no part of a longer word. The first one
        right after "answer is" or "answer:" counts; without one, the first after "option" or "choice" or before a
        closing bracket ("(C)", "C)"); without one, the first that stands alone. There, an "A" with a word behind it is
        the English article and is passed over, unless no other letter stands alone.
    option: the first of the words `options`, in any case; without `options`: true, false, solutionN, answerN, endingN,
        optionN.
    """
    if metric == "number":
        numbers = list(_NUMBER.finditer(re.sub(r"(?<=[0-9]),(?=[0-9])", "", text)))
        return f"{'-' if numbers[-1][1] else ''}{numbers[-1][2]}" if numbers else None
    if metric == "option":
        words = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True)) or OPTION_WORDS
        found = re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE)
        return found[0].casefold() if found else None
    letter = f"({'|'.join(re.escape(option) for option in options or LETTERS)})(?![\\w'\u2019]|-\\w)"
    for pattern in (
        rf"(?i:\banswer\s*(?:\bis\b|[:=]))[\s:=(\[*\"'`$]*{letter}",
        rf"(?i:\b(?:option|choice)(?:\s+is)?\b)[\s:=(\[*\"'`$]*{letter}|(?<![\w'\u2019-]){letter}[)\]]",
        rf"(?<![\w'\u2019-])(?!A[ \t]+\w){letter}",
        rf"(?<![\w'\u2019-]){letter}",
    ):
        if found := re.search(pattern, text):
            return next(group for group in found.groups() if group)
    return None


def is_right(extracted: str | None, gold: str, metric: Metric) -> bool:
    """Whether an extracted answer is the gold one: within 0.001 for numbers, equal but for case otherwise."""
    if extracted is None:
        return False
    if metric == "number":
        try:
            return abs(float(extracted) - float(gold)) <= TOLERANCE
        except ValueError:  # a gold answer that is no number
            return False
    return extracted.casefold() == gold.casefold()

"""Share of texts whose last number is that of their reference, as answers to problems in arithmetic are judged."""

import re

import datasets
import evaluate

_NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?\$?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)")


class ExactNumber(evaluate.Metric):
    """Share of texts whose last number is that of their reference, 0 to 1; a text without a number matches none.

    Numbers are compared by value: `1,234`, `$1234` and `1234.00` are one number.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of texts whose last number is that of their reference.",
            citation="",
            inputs_description="Texts.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = zip(map(last_number, predictions), map(last_number, references), strict=True)
        return {"exact_number": sum(a is not None and a == b for a, b in pairs) / len(references)}


def last_number(text: str) -> float | None:
    """The number that a text ends with, whatever comes after it; None if it has none."""
    number = None
    for match in _NUMBER.finditer(text):
        number = float(match[1].replace(",", ""))
        number = -number if match[0][0] in "-\u2212" else number
    return number

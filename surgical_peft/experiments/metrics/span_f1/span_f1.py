"""F1 of spans that are tagged by IOB2; the same number as `overall_f1` of `seqeval`, which the Hub has.

As there, a span counts only with its exact ends and type, all types together, and an `I-X` that follows no `X` begins
a span. Unlike there, only IOB2 tags are read: `O`, `B-X` and `I-X`.
"""

import datasets
import evaluate


class SpanF1(evaluate.Metric):
    """F1 of typed spans, 0 to 1; 0 where no span is predicted rightly, or there is none."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="F1 of the spans of IOB2 tags.",
            citation="",
            inputs_description="A list of tags for each example.",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        predicted, wanted = _spans(predictions), _spans(references)
        size = len(predicted) + len(wanted)
        return {"span_f1": 2 * len(predicted & wanted) / size if size else 0.0}


def _spans(examples: list[list[str]]) -> set[tuple[int, int, int, str]]:
    """Example, first place, place after the last, and type of each span."""
    spans = set()
    for number, tags in enumerate(examples):
        start, kind = 0, ""
        for place, tag in enumerate([*tags, "O"]):
            prefix, _, new = tag.partition("-")
            if prefix not in ("O", "B", "I"):
                raise ValueError(f"tag {tag!r} is not IOB2: O, B-X or I-X.")
            if kind and (prefix != "I" or new != kind):
                spans.add((number, start, place, kind))
                kind = ""
            if prefix != "O" and not kind:
                start, kind = place, new
    return spans

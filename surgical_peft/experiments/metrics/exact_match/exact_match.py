"""Share of texts that equal their reference letter by letter; the same number as `exact_match` of the Hub."""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """Share of texts that equal their reference, 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of texts that equal their reference.",
            citation="",
            inputs_description="Texts.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        hits = sum(a == b for a, b in zip(predictions, references, strict=True))
        return {"exact_match": hits / len(references)}

"""F1 of each class, averaged over the classes; the same number as `f1` of the Hub with `average="macro"`."""

import datasets
import evaluate


class MacroF1(evaluate.Metric):
    """F1 averaged over the classes that occur in predictions or references, 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="F1 of each class, averaged over the classes.",
            citation="",
            inputs_description="Labels as whole numbers.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        classes = set(predictions) | set(references)
        scores = []
        for each in classes:
            hits = sum(a == b == each for a, b in pairs)
            scores.append(2 * hits / (sum(a == each for a in predictions) + sum(b == each for b in references)))
        return {"macro_f1": sum(scores) / len(scores)}

"""Correlation of predicted and right classes; the same number as `matthews_correlation` of the Hub."""

import datasets
import evaluate


class MatthewsCorrelation(evaluate.Metric):
    """Matthews correlation for any number of classes, -1 to 1; 0 where all predictions or all references are alike.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient".
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Matthews correlation of predicted and right classes.",
            citation="",
            inputs_description="Labels as whole numbers.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        size = len(references)
        hits = sum(a == b for a, b in zip(predictions, references, strict=True))
        classes = set(predictions) | set(references)
        counts = [(predictions.count(each), references.count(each)) for each in classes]
        together = hits * size - sum(a * b for a, b in counts)
        spread = (size**2 - sum(a * a for a, _ in counts)) * (size**2 - sum(b * b for _, b in counts))
        return {"matthews_correlation": together / spread**0.5 if spread else 0.0}

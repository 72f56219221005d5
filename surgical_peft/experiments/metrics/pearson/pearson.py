"""Pearson correlation of predicted numbers; the same number as `pearsonr` of the Hub."""

import datasets
import evaluate


class Pearson(evaluate.Metric):
    """Pearson correlation, -1 to 1; 0 where all predictions or all references are alike."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Pearson correlation of predictions and references.",
            citation="",
            inputs_description="Numbers.",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        means = sum(predictions) / len(predictions), sum(references) / len(references)
        pairs = [(a - means[0], b - means[1]) for a, b in zip(predictions, references, strict=True)]
        spread = (sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs)) ** 0.5
        return {"pearson": sum(a * b for a, b in pairs) / spread if spread else 0.0}

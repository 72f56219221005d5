"""Coefficient of determination of predicted numbers; the same number as `r2_score` of scikit-learn."""

import datasets
import evaluate


class R2(evaluate.Metric):
    """Share of the variance of the references that is predicted: 1 at best, 0 for their mean, below it for worse."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Share of the variance of the references that is predicted.",
            citation="",
            inputs_description="Numbers.",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        mean = sum(references) / len(references)
        spread = sum((b - mean) ** 2 for b in references)
        error = sum((a - b) ** 2 for a, b in zip(predictions, references, strict=True))
        return {"r2": 1 - error / spread if spread else float(error == 0)}

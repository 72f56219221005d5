"""Minus the mean squared error of predicted numbers, so that larger is better."""

import datasets
import evaluate


class NegMeanSquaredError(evaluate.Metric):
    """Minus the mean squared error, 0 at best."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Minus the mean squared error.",
            citation="",
            inputs_description="Numbers.",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        error = sum((a - b) ** 2 for a, b in zip(predictions, references, strict=True))
        return {"neg_mean_squared_error": -error / len(references)}

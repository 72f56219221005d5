"""Share of predictions that equal their reference; the same number as `accuracy` of the Hub."""

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="Labels as whole numbers.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        hits = sum(a == b for a, b in zip(predictions, references, strict=True))
        return {"accuracy": hits / len(references)}

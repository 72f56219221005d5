"""F1 of all labels of all examples together; the same number as `f1_score` of scikit-learn with `average="micro"`."""

import datasets
import evaluate


class MicroF1(evaluate.Metric):
    """F1 over all labels of all examples, 0 to 1; 0 where no label is predicted rightly, or there is none."""

    def _info(self) -> evaluate.MetricInfo:
        labels = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="F1 of all labels of all examples together.",
            citation="",
            inputs_description="For each example a 1 or 0 for each label.",
            features=datasets.Features({"predictions": labels, "references": labels}),
        )

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        pairs = [pair for rows in zip(predictions, references, strict=True) for pair in zip(*rows, strict=True)]
        size = sum(a + b for a, b in pairs)
        return {"micro_f1": 2 * sum(a and b for a, b in pairs) / size if size else 0.0}

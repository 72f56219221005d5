"""F1 of the words of an answer with those of the nearest right one; `f1` of the Hub's `squad`, by 100."""

import datasets
import evaluate

from surgical_peft.experiments.metrics.squad_text import mean_of_best, overlap


class SquadF1(evaluate.Metric):
    """Mean F1 of the words of answers, 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean F1 of the words of answers, 0 to 1.",
            citation="",
            inputs_description="A text, and a list of right ones, for each example.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return {"squad_f1": mean_of_best(overlap, predictions, references)}

"""Share of answers with the words of a right one; `exact_match` of the Hub's `squad`, by 100."""

import datasets
import evaluate

from surgical_peft.experiments.metrics.squad_text import is_same, mean_of_best


class SquadExactMatch(evaluate.Metric):
    """Share of answers with the words of a right one, 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of answers with the words of a right one, 0 to 1.",
            citation="",
            inputs_description="A text, and a list of right ones, for each example.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return {"squad_exact_match": mean_of_best(is_same, predictions, references)}

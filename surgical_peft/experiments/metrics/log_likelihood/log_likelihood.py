"""Mean log-likelihood of a token: minus the loss of a language model over all tokens, so that larger is better."""

import datasets
import evaluate


class LogLikelihood(evaluate.Metric):
    """Mean of the log-likelihoods, 0 at best; the exponential of minus it is the perplexity."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean log-likelihood of a token.",
            citation="",
            inputs_description="The log-likelihood of each right token; there are no references.",
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"log_likelihood": sum(predictions) / len(predictions)}

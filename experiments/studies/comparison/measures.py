"""What is measured of a trained model: its test score, times in CPU seconds, the error of its inverse, samples."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.runs.likelihoods import RECONSTRUCTED
from experiments.runs.tasks.subset import subset
from experiments.runs.tasks.task import Task
from experiments.studies.comparison.training import Model
from resflow_jax import Estimate
from resflow_jax.data.images import ImageSplits

NUMBER = 1000  # samples and examples that are timed
PROBE = 20  # samples that are drawn first
LONGEST = 100.0  # seconds that a timed draw of samples may take
REPEATS = 3
SHOWN = 8000  # vectors in a picture, if drawing them takes less than LONGEST seconds


def timed(function: Callable[[int], Any], repeats: int = REPEATS) -> tuple[float, Any]:
    """The median of CPU seconds of calls with different seeds, and the last value."""
    seconds = []
    for seed in range(1, repeats + 1):
        began = time.process_time()
        value = function(seed)
        seconds.append(time.process_time() - began)
    return float(np.median(seconds)), value


def sampling(model: Model, number: int = NUMBER, longest: float = LONGEST) -> tuple[dict[str, float], np.ndarray]:
    """Seconds for `number` samples, and some samples.

    Fewer are drawn, and the time is multiplied, where all of them would take longer than `longest` seconds.

    Returns:
      {"sample_seconds": for `number` samples, "sampled": how many were timed}, and the samples of the last draw.
    """
    probed, samples = timed(model.sampler(min(number, PROBE)), 1)
    if probed * number / PROBE <= longest:
        seconds, samples = timed(model.sampler(number))
        return {"sample_seconds": seconds, "sampled": number}, samples
    return {"sample_seconds": probed * number / len(samples), "sampled": len(samples)}, samples


def measure(
    model: Model, task: Task, examples: int | None, number: int = NUMBER
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The figures of a model, and samples with data for pictures. The test split is read here alone.

    Args:
      model: a trained model.
      task: the data and the metric.
      examples: maximum number of test examples; by default that of the config.
      number: number of samples and of examples that are timed.

    Returns:
      Figures as JSON: "test", "test_stderr", "noise_stderr" in the unit of the task; "parameters"; seconds of
      sampling as of `sampling`; "log_prob_1" and "log_prob_1000", seconds for one and for `number` examples;
      "reconstruction" and "unconverged". And arrays "samples" and "data".
    """
    settings = task.config.evaluation
    test = subset(task.splits.test, examples or settings.examples)
    estimate: Estimate = task.mean(model.scores(test, task.config.seed + 2, settings.draws), settings.estimator)
    x = np.asarray(task.inputs(np.resize(test, (number, *test.shape[1:]))))
    draws, samples = sampling(model, number)
    shown = PROBE
    if not isinstance(task.splits, ImageSplits):
        shown = SHOWN if number == NUMBER and draws["sample_seconds"] * SHOWN / NUMBER < LONGEST else number
        samples = model.sampler(shown)(0) if shown > len(samples) else samples
    error, unconverged = model.reconstruction(x[: min(number, RECONSTRUCTED)])
    figures = {
        "test": estimate.mean,
        "test_stderr": estimate.stderr,
        "noise_stderr": estimate.noise_stderr,
        "parameters": model.parameters,
        **draws,
        "log_prob_1": timed(model.evaluator(x[:1]))[0],
        "log_prob_1000": timed(model.evaluator(x))[0],
        "reconstruction": error,
        "unconverged": unconverged,
    }
    data = np.asarray(task.inputs(test[:shown]))
    return figures, {"samples": samples[:shown].astype(np.float32), "data": data}

"""The jobs of the comparison on one data set: all of them, the missing ones, and the settings that a search chose."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.studies.comparison.contenders import Candidate, fingerprint, with_rates, with_widths
from experiments.studies.comparison.datasets import config_of, searched_on
from experiments.studies.comparison.jobs import Job, found, is_good


@dataclass(frozen=True)
class Plan:
    """The comparison of some models on one data set.

    Attributes:
      data: name of the data set.
      models: names of the models.
      workdir: where results are.
      seeds: number of runs of each model.
      seconds: budget of a run.
      search_seconds: budget of a candidate.
      examples: maximum number of test examples; None for that of the config.
      small: whether to try one candidate alone, with models as small as those of `--tiny`.
    """

    data: str
    models: tuple[str, ...]
    workdir: Path
    seeds: int
    seconds: float
    search_seconds: float
    examples: int | None = None
    small: bool = False

    def searches(self, model: str) -> list[Job]:
        """The candidates of a model that can be tried: those with other widths come once the best rate is known."""
        config = config_of(self.data)
        rates = self._searches(model, with_rates(model, config)[: 1 if self.small else None])
        best = None if self.small else self._best(rates)
        return rates if best is None else rates + self._searches(model, with_widths(best, config))

    def chosen(self, model: str) -> Candidate | None:
        """The candidate of least validation loss; None if some are missing, or all have failed."""
        return self._best(self.searches(model))

    def runs(self, model: str) -> list[Job]:
        """The runs of a model with the chosen settings; none before its search has ended well."""
        candidate = self.chosen(model)
        if candidate is None:
            return []
        return [self._job(model, seed, self.seconds, candidate, is_search=False) for seed in range(self.seeds)]

    def missing(self) -> list[Job]:
        """The jobs without a result that can be started: candidates first."""
        searches = [job for model in self.models for job in self.searches(model)]
        waiting = [job for job in searches if found(job, self.workdir) is None]
        runs = [job for model in self.models for job in self.runs(model)]
        return waiting + [job for job in runs if found(job, self.workdir) is None]

    def results(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """{model: {"search": results, "runs": results}} of what there is."""
        there = {}
        for model in self.models:
            kinds = {"search": self.searches(model), "runs": self.runs(model)}
            of = {
                kind: [result for job in jobs if (result := found(job, self.workdir)) is not None]
                for kind, jobs in kinds.items()
            }
            if of["search"]:
                there[model] = of
        return there

    def _searches(self, model: str, tried: Sequence[Candidate]) -> list[Job]:
        return [self._job(model, 0, self.search_seconds, candidate, is_search=True) for candidate in tried]

    def _best(self, searches: Sequence[Job]) -> Candidate | None:
        """The candidate of least validation loss; None if some are missing, or all have failed."""
        results = [found(job, self.workdir) for job in searches]
        if None in results:
            return None
        losses = {
            job.candidate: result["validation_loss"]
            for job, result in zip(searches, results, strict=True)
            if is_good(result)
        }
        return min(losses, key=losses.__getitem__, default=None)

    def _job(self, model: str, seed: int, seconds: float, candidate: Candidate, *, is_search: bool) -> Job:
        tried = candidate.width, candidate.learning_rate
        examples = None if is_search else self.examples
        data = searched_on(self.data) if is_search else self.data
        return Job(data, model, seed, seconds, *tried, is_search, examples, self.small, fingerprint_of(data, model))


@lru_cache
def fingerprint_of(data: str, model: str) -> str:
    """The fingerprint of a model on a data set, with the config of today."""
    return fingerprint(model, config_of(data))

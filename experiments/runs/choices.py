"""Config fields that hold one of several classes, each with its own settings; a flag chooses the class.

`--estimator exact --estimator.chunk-size 16` sets a field of the type `Estimator` to `Exact(chunk_size=16)`;
`--estimator roulette --estimator.length poisson` does the same for a nested field. If the flag names the class that the
config has already, the config's settings are kept.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

from experiments.runs.models import MODELS, with_model
from resflow_jax import Defensive, Estimator, Exact, Geometric, Poisson, Roulette, Truncated
from resflow_jax.functional.length_laws import Law


@dataclasses.dataclass(frozen=True)
class OfTheRun:
    """Stands for the estimator that the run itself is evaluated with."""


ESTIMATORS: Mapping[str, type] = {"exact": Exact, "roulette": Roulette, "truncated": Truncated}
LAWS: Mapping[str, type] = {"defensive": Defensive, "geometric": Geometric, "poisson": Poisson}
_KINDS = (
    (Estimator, ESTIMATORS, "estimator of the log-det"),
    (Estimator | OfTheRun, {"run": OfTheRun, **ESTIMATORS}, "estimator of the log-det; `run`: that of the run"),
    (Law, LAWS, "law of the random length of the roulette's series"),
)


class Choice(NamedTuple):
    """A flag that chooses the class of a value.

    Attributes:
      flag: name of the flag without dashes, as "evaluation.estimator".
      kinds: the classes by the words that name them.
      chosen: the word of the value's class.
      text: description for the help.
      group: description of the group of its settings; None for that of the class.
    """

    flag: str
    kinds: Mapping[str, type]
    chosen: str
    text: str
    group: str | None = None


def choose(config: Any, arguments: Sequence[str], prefix: str = "") -> tuple[Any, list[Choice]]:
    """The config with the classes that the arguments name, and all flags of this sort that it then has.

    An unknown word changes nothing here: the parser rejects it by the returned choices. The returned config is not
    validated, since later arguments may set fields that the new class needs; the parser builds and validates another.
    """
    choices, hints, made = [], get_type_hints(type(config)), copy.copy(config)
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        for hint, kinds, text in _KINDS:
            if hints[field.name] == hint and type(value) in kinds.values():
                cls = kinds.get(value_of(flag, arguments), type(value))
                value = value if type(value) is cls else cls()
                word = next(word for word, kind in kinds.items() if kind is cls)
                choices.append(Choice(flag, kinds, word, text))
        makers = MODELS.get(hints[field.name])
        if makers is not None:
            word = value_of(flag, arguments)
            word = word if word in makers else "residual"
            choices.append(Choice(flag, makers, word, "kind of flow; each has its own settings", "the flow."))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value, deeper = choose(value, arguments, f"{flag}.")
            choices += deeper
        if value is not getattr(config, field.name):
            object.__setattr__(made, field.name, value)
    return made, choices


def choose_model(config: Any, arguments: Sequence[str]) -> Any:
    """The config of a run with the model that the arguments name, if it is another than a residual flow."""
    makers = MODELS.get(get_type_hints(type(config)).get("model"))
    return config if makers is None else with_model(config, makers, value_of("model", arguments))


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of a flag (named without dashes) in the arguments; the last one if the flag is repeated."""
    found = None
    for n, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == f"--{flag}":
            found = value if equals else next(iter(arguments[n + 1 :]), None)
    return found

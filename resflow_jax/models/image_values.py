"""What the flows of configs take as images: values in [0, 1], which samples are clipped to."""

from typing import Any

from resflow_jax.functional.values import UNIT_INTERVAL, Domain
from resflow_jax.models.flow import Flow


class OfUnitImages(Flow):
    """Base of a flow of a config whose images have values in [0, 1]; its vectors may have any.

    The config, `self.config`, has `logit_alpha`, or `data` that has it.
    """

    @property
    def _is_image(self) -> bool:
        return len(self.event_shape) == 3

    @property
    def support(self) -> tuple[Any, Any] | None:
        return (0.0, 1.0) if self._is_image else None

    def _domain(self, are_data: bool) -> Domain:
        # With a logit, f has its own domain; without one, samples may lie outside.
        if self._is_image and are_data and getattr(self.config, "data", self.config).logit_alpha is None:
            return UNIT_INTERVAL
        return super()._domain(are_data)

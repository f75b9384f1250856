"""Checks of the shapes of events: an event of another shape could broadcast, to wrong values and log-dets."""

from typing import Any

import jax

Array = jax.Array
Shape = tuple[int, ...]


def check_events(bijector: Any, x: Array) -> None:
    """Raises ValueError for a batch of events that the layer does not take."""
    try:
        bijector.output_shape(x.shape[1:])
    except ValueError as error:
        raise ValueError(f"x: {error}") from error


def check_outputs(bijector: Any, y: Array) -> None:
    """Raises ValueError for a batch that the layer cannot have returned."""
    try:
        check_output_shape(bijector, y.shape[1:])
    except ValueError as error:
        raise ValueError(f"y: {error}") from error


def check_output_shape(bijector: Any, shape: Shape) -> None:
    """Raises ValueError for a shape that no y of the layer has. A layer that knows its event shape is not checked."""
    if bijector.event_shape is None:
        found = tuple(bijector.output_shape(bijector.input_shape(shape)))
        if found != tuple(shape):
            raise ValueError(
                f"expected events of shape {found}, got {tuple(shape)} (a layer that changes the shape of its events "
                "defines input_shape too)"
            )


def ends_in(shape: Shape, last: Shape) -> Shape:
    """`shape`, that of events of a layer with one number for each element of `last`; raises unless it ends so."""
    shape = tuple(shape)
    if shape[len(shape) - len(last) :] != last:
        raise ValueError(f"expected events whose shape ends in {last}, got {shape}")
    return shape

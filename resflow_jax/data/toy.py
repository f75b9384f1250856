"""Eight two-dimensional densities with gaps, holes and sharp edges, for first tests of a density model.

    x = scale * (random point of a curve, a mode or a cell) + noise,   roughly in [-4, 4]^2

Their shapes and scales are usual in the literature on flows (for example Grathwohl et al. 2019, arXiv 1810.01367,
figure 4; Chen et al. 2019, arXiv 1906.02735, figure 6).

The points are drawn by NumPy on the host. They are independent, except for "moons" and "circles": there scikit-learn
spaces the points evenly along the curve before it adds the noise.
"""

from collections.abc import Callable

import numpy as np

from resflow_jax.functional.checks import check_choice, check_count

Generator = np.random.Generator


def sample_toy(name: str, number: int, rng: Generator) -> np.ndarray:
    """Draws points of a toy density. The result depends only on the arguments and the state of `rng`.

    Args:
      name: one of `TOY_DENSITIES`.
      number: number of points, at least 1.
      rng: NumPy's generator, which is advanced.

    Returns:
      float32 [number, 2].

    Raises:
      ValueError: for an unknown name or a number below 1.

    Example:
      >>> from resflow_jax.data.toy import sample_toy
      >>> points = sample_toy("checkerboard", 100, np.random.default_rng(0))
      >>> points.shape, bool(abs(points).max() <= 4)
      ((100, 2), True)
    """
    check_choice("name", name, TOY_DENSITIES)
    check_count("number", number, 1)
    return _SAMPLERS[name](number, rng).astype(np.float32)


def _eight_gaussians(number: int, rng: Generator) -> np.ndarray:
    """Eight round modes, evenly spaced on a circle of radius 4 / sqrt 2, with standard deviation 0.5 / sqrt 2."""
    angle = rng.integers(8, size=number) * (np.pi / 4)
    return (4 * _on_circle(angle) + rng.normal(scale=0.5, size=(number, 2))) / np.sqrt(2)


def _two_spirals(number: int, rng: Generator) -> np.ndarray:
    """Two spiral arms r = angle / 3 over one and a half turns, each the reflection of the other through the origin.

    The square root spreads the points almost evenly along the arm, whose length grows like angle^2.
    """
    angle = 3 * np.pi * np.sqrt(rng.random(number))
    arm = rng.choice([-1.0, 1.0], size=number)
    return (arm * angle / 3)[:, None] * _on_circle(angle) + rng.normal(scale=0.1, size=(number, 2))


def _checkerboard(number: int, rng: Generator) -> np.ndarray:
    """Uniform on the dark squares of a 4x4 board that covers [-4, 4]^2."""
    column = rng.integers(4, size=number)
    row = 2 * rng.integers(2, size=number) + column % 2
    return 2 * (np.stack([column, row], axis=1) + rng.random((number, 2))) - 4


def _rings(number: int, rng: Generator) -> np.ndarray:
    """Four concentric circles, equally likely."""
    radius = 0.75 * rng.integers(1, 5, size=number)
    angle = rng.uniform(0, 2 * np.pi, number)
    return radius[:, None] * _on_circle(angle) + rng.normal(scale=0.08, size=(number, 2))


def _pinwheel(number: int, rng: Generator) -> np.ndarray:
    """Five Gaussian blades, elongated radially. Each point is rotated by an angle proportional to exp(radius)."""
    radius = rng.normal(1.0, 0.3, number)
    side = rng.normal(0.0, 0.1, number)
    turn = rng.integers(5, size=number) * (2 * np.pi / 5) + 0.25 * np.exp(radius)
    along = _on_circle(turn)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    return 2 * (radius[:, None] * along + side[:, None] * across)


def _moons(number: int, rng: Generator) -> np.ndarray:
    from sklearn.datasets import make_moons

    points, _ = make_moons(number, noise=0.1, random_state=_random_state(rng))
    return 2 * (points - [0.5, 0.25])  # the middle of the two half circles


def _swiss_roll(number: int, rng: Generator) -> np.ndarray:
    from sklearn.datasets import make_swiss_roll

    points, _ = make_swiss_roll(number, noise=1.0, random_state=_random_state(rng))
    return points[:, [0, 2]] / 5


def _circles(number: int, rng: Generator) -> np.ndarray:
    from sklearn.datasets import make_circles

    points, _ = make_circles(number, noise=0.08, factor=0.5, random_state=_random_state(rng))
    return 3 * points


def _on_circle(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _random_state(rng: Generator) -> int:
    """A seed for scikit-learn, which does not take NumPy's Generator."""
    return int(rng.integers(2**32))


_SAMPLERS: dict[str, Callable[[int, Generator], np.ndarray]] = {
    "8gaussians": _eight_gaussians,
    "2spirals": _two_spirals,
    "checkerboard": _checkerboard,
    "rings": _rings,
    "moons": _moons,
    "pinwheel": _pinwheel,
    "swissroll": _swiss_roll,
    "circles": _circles,
}

TOY_DENSITIES: tuple[str, ...] = tuple(_SAMPLERS)

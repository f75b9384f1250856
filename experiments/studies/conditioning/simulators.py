"""Simulators x ~ p(x | theta) with a known posterior p(theta | x), to test inference on; in NumPy and float64.

Every simulator samples its prior and p(x | theta), and has exact samples and the exact density of the posterior. All
randomness comes from the generator that a method is given.
"""

import math
from dataclasses import dataclass

import numpy as np

from resflow_jax.functional.checks import check_count, check_positive

Rng = np.random.Generator


@dataclass(frozen=True)
class TwoMoons:
    """Two crescents in the plane (Greenberg et al. 2019, arXiv 1905.07488, appendix A.3; Lueckmann et al. 2021).

        theta ~ U(-1, 1)^2,   u = (theta_1 + theta_2) / sqrt 2,   v = (theta_2 - theta_1) / sqrt 2
        x = p + (-|u|, v),    p = (r cos a + 1/4, r sin a),   a ~ U(-pi/2, pi/2),   r ~ N(0.1, 0.01^2)

    The posterior follows from x: p(theta | x) is proportional to the density of p at (x_1 + |u|, x_2 - v) within the
    square, and zero elsewhere. Since theta -> (u, v) is a rotation and |u| takes each value twice, a sample of the
    posterior is (|u|, v) = (p_1 - x_1, x_2 - p_2) of a p from the simulator, with a random sign of u. It is rejected if
    |u| < 0 or theta is outside the square, which is the diamond |u| + |v| <= sqrt 2. The fraction of samples that is
    kept normalises the density.

    r < 0, which is ten standard deviations below the mean, is neglected.

    Attributes:
      normalizer_draws: number of draws of p that estimate the fraction that is kept.
    """

    normalizer_draws: int = 10000
    dim = x_dim = 2
    radius, deviation, shift = 0.1, 0.01, 0.25

    def __post_init__(self):
        check_count("normalizer_draws", self.normalizer_draws, 1)

    def prior(self, rng: Rng, number: int) -> np.ndarray:
        """theta [number, 2]."""
        return rng.uniform(-1, 1, (number, 2))

    def simulate(self, rng: Rng, theta: np.ndarray) -> np.ndarray:
        """x [N, 2] for theta [N, 2]."""
        u, v = _rotated(theta)
        return self._noise(rng, len(theta)) + np.stack([-np.abs(u), v], axis=1)

    def posterior(self, rng: Rng, number: int, x: np.ndarray) -> np.ndarray:
        """theta [number, 2] for one x [2].

        Raises:
          ValueError: for an x that the simulator hardly ever gives: no sample of ten thousand is kept.
        """
        kept, missing = [], number
        while missing > 0:
            u, v = self._inverted(self._noise(rng, max(10000, 2 * missing)), x)
            is_kept = _is_possible(u, v)
            if not is_kept.any():
                raise ValueError(f"x: expected a value that some theta in the square explains, got {x}")
            u, v = u[is_kept][:missing], v[is_kept][:missing]
            u = u * rng.choice([-1, 1], len(u))
            kept.append(np.stack([u - v, u + v], axis=1) / math.sqrt(2))
            missing -= len(u)
        return np.concatenate(kept)

    def posterior_log_prob(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        """log p(theta | x) [N] in nats for theta [N, 2], x [N, 2] or [1, 2]; its normaliser by a fixed sample of p."""
        u, v = _rotated(theta)
        q1, q2 = x[:, 0] + np.abs(u) - self.shift, x[:, 1] - v
        radius = np.hypot(q1, q2)
        log_normal = -0.5 * ((radius - self.radius) / self.deviation) ** 2 - math.log(
            self.deviation * math.sqrt(2 * math.pi)
        )
        with np.errstate(divide="ignore"):
            is_inside = (q1 > 0) & (np.abs(theta) <= 1).all(axis=1)
            log_joint = np.where(is_inside, log_normal - np.log(math.pi * radius), -np.inf)
            return log_joint - np.log(2 * self._kept(x))

    def _noise(self, rng: Rng, number: int) -> np.ndarray:
        """p [number, 2]."""
        angle = rng.uniform(-math.pi / 2, math.pi / 2, number)
        radius = rng.normal(self.radius, self.deviation, number)
        return np.stack([radius * np.cos(angle) + self.shift, radius * np.sin(angle)], axis=1)

    def _inverted(self, p: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """|u| and v that give x with p; broadcasts."""
        return p[..., 0] - x[..., 0], x[..., 1] - p[..., 1]

    def _kept(self, x: np.ndarray) -> np.ndarray:
        """The fraction of p that explains each x [N, 2], [N]."""
        p = self._noise(np.random.default_rng(0), self.normalizer_draws)
        return np.array([_is_possible(*self._inverted(p, one)).mean() for one in x])


def _rotated(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u and v, [N] each."""
    return (theta[:, 0] + theta[:, 1]) / math.sqrt(2), (theta[:, 1] - theta[:, 0]) / math.sqrt(2)


def _is_possible(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether u >= 0, so that it can be |u|, and theta is within the square."""
    return (u >= 0) & (u + np.abs(v) <= math.sqrt(2))


@dataclass(frozen=True)
class GaussianLinear:
    """theta ~ N(0, s I), x | theta ~ N(theta, n I), so that theta | x ~ N(x s / (s + n), s n / (s + n) I).

    Lueckmann et al. (2021, arXiv 2101.04653), task T.1, with D = 10 and s = n = 0.1.

    Attributes:
      dim: D.
      prior_variance: s.
      noise_variance: n.
    """

    dim: int = 10
    prior_variance: float = 0.1
    noise_variance: float = 0.1

    def __post_init__(self):
        check_count("dim", self.dim, 2)
        check_positive("prior_variance", self.prior_variance)
        check_positive("noise_variance", self.noise_variance)

    @property
    def x_dim(self) -> int:
        """Number of elements of x."""
        return self.dim

    @property
    def posterior_variance(self) -> float:
        """The posterior variance of every element of theta, the same for every x."""
        return self.prior_variance * self.noise_variance / (self.prior_variance + self.noise_variance)

    def posterior_mean(self, x: np.ndarray) -> np.ndarray:
        """The posterior mean [..., D] for x [..., D]."""
        return x * (self.prior_variance / (self.prior_variance + self.noise_variance))

    def prior(self, rng: Rng, number: int) -> np.ndarray:
        """theta [number, D]."""
        return rng.normal(0, math.sqrt(self.prior_variance), (number, self.dim))

    def simulate(self, rng: Rng, theta: np.ndarray) -> np.ndarray:
        """x [N, D] for theta [N, D]."""
        return rng.normal(theta, math.sqrt(self.noise_variance))

    def posterior(self, rng: Rng, number: int, x: np.ndarray) -> np.ndarray:
        """theta [number, D] for one x [D]."""
        return rng.normal(self.posterior_mean(x), math.sqrt(self.posterior_variance), (number, self.dim))

    def posterior_log_prob(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        """log p(theta | x) [N] in nats for theta [N, D], x [N, D] or [1, D]."""
        squares = np.sum((theta - self.posterior_mean(x)) ** 2, axis=1) / self.posterior_variance
        return -0.5 * (squares + self.dim * math.log(2 * math.pi * self.posterior_variance))


Simulator = TwoMoons | GaussianLinear

"""Induced norms of small matrices by search over the whole sphere, with NumPy's vector norms alone."""

import itertools

import numpy as np


def brute_force_norm(matrix, p, q):
    """max ||W x||_q / ||x||_p of a matrix [m, n] with n <= 4: sampling, then zooming in on the ten best points."""
    n = matrix.shape[1]
    rng = np.random.default_rng(0)
    corners = np.array([x for x in itertools.product([-1.0, 0.0, 1.0], repeat=n) if any(x)])
    points = np.concatenate([corners, rng.normal(size=(20000, n))])

    def ratio(x):
        return np.linalg.norm(x @ matrix.T, q, axis=-1) / np.linalg.norm(x, p, axis=-1)

    points /= np.linalg.norm(points, p, axis=1, keepdims=True)
    best = points[np.argsort(-ratio(points))[:10]]
    for radius in 0.3 * 0.6 ** np.arange(40):
        steps = radius * rng.normal(size=(10, 100, n))
        steps[:, ::2] *= np.abs(best)[:, None]  # near p = 1 the small elements of x are tiny
        near = best[:, None] + steps
        candidates = np.concatenate([best[:, None], near], axis=1)
        best = candidates[np.arange(10), np.argmax(ratio(candidates), axis=1)]
    return np.max(ratio(best))


def enumerated_norm(matrix, q, *, domain):
    """||W||_{1 -> q} or ||W||_{inf -> q}: a convex function is largest at a vertex of the ball."""
    n = matrix.shape[1]
    vertices = np.eye(n) if domain == 1 else np.array(list(itertools.product([-1.0, 1.0], repeat=n)))
    return np.max(np.linalg.norm(vertices @ matrix.T, q, axis=1))

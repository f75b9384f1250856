"""Classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv 1610.06545): can a classifier tell two samples apart?

The score is the cross-validated accuracy of a small neural network: 0.5 if the samples have one distribution, 1 if they
are disjoint. Lueckmann et al. (2021, arXiv 2101.04653) compare posteriors in this way. Here the network has two hidden
layers of 64 units for every D, and is trained on fewer points for fewer epochs. It detects fewer differences, so scores
are lower than theirs. Both samples are standardised by the first.
"""

import warnings

import numpy as np

from resflow_jax.functional.checks import check_count


def c2st(reference: np.ndarray, samples: np.ndarray, *, seed: int = 0, folds: int = 5, epochs: int = 50) -> float:
    """The accuracy of a classifier between samples [N, D] of two distributions, in [0, 1].

    Args:
      reference: exact samples [N, D].
      samples: the same number of samples [N, D] to compare.
      seed: random seed of the folds and of the classifier.
      folds: number of folds of the cross-validation; each takes one fit.
      epochs: maximum number of passes over the training points of a fold.

    Raises:
      ValueError: if the samples differ in shape, are too few, or are not finite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    check_count("folds", folds, 2)
    check_count("epochs", epochs, 1)
    if reference.ndim != 2 or reference.shape != samples.shape or len(reference) < folds:
        raise ValueError(
            f"samples: expected two arrays [N, D] of one shape, at least {folds} rows, got {reference.shape} and "
            f"{samples.shape}"
        )
    if not (np.isfinite(reference).all() and np.isfinite(samples).all()):
        raise ValueError("samples: expected finite values, got some that are not")
    points = np.concatenate([reference, samples]).astype(np.float64)
    points = (points - reference.mean(axis=0)) / reference.std(axis=0)
    labels = np.repeat([0, 1], len(reference))
    classifier = MLPClassifier((64, 64), max_iter=epochs, random_state=seed)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    # Matrices are so small that threads would mostly wait for each other.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(np.mean(cross_val_score(classifier, points, labels, cv=split)))

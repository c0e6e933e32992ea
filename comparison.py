"""Are two ways to train different? Differences between test scores, image by image, with intervals.

The scores come from cross-validation: each image is tested once, by the run of its fold.
"""

import statistics
from typing import NamedTuple

import numpy as np

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # {degrees of freedom: 97.5 % quantile of Student's t}


class Difference(NamedTuple):
    """What `compare` finds."""

    mean: float  # over all images
    interval: tuple  # (low, high), 95 %
    p_value: float  # two-sided, of a mean of zero
    fold_means: list  # of float
    fold_interval: tuple | None  # (low, high), 95 % by Student's t of the folds' means, which have equal weight
    images: int


def bootstrap_means(parts, draws, seed):
    """(draws,) means over the values of resampled `parts`, a list of 1-D arrays.

    The hierarchical bootstrap: draws the arrays with replacement, then within each of them its values. It keeps what
    the images of a fold have in common, their training run, which a bootstrap of the images alone takes for
    independent (Davison and Hinkley 1997, section 3.8).
    """
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(parts), size=(draws, len(parts)))
    sums, counts = np.zeros(draws), np.zeros(draws)
    for number, values in enumerate(parts):
        times = (chosen == number).sum(axis=1)
        for repeat in range(times.max()):
            rows_of_repeat = np.flatnonzero(times > repeat)
            pieces = 1 + len(rows_of_repeat) * len(values) // 2**22  # to take little memory
            for rows in np.array_split(rows_of_repeat, pieces):
                picks = generator.integers(len(values), size=(len(rows), len(values)))
                sums[rows] += values[picks].sum(axis=1)
                counts[rows] += len(values)
    return sums / counts


def t_interval(values):
    """(low, high), the 95 % interval of the mean of 2 to 5 floats by Student's t; None of a single one.

    Resampling so few folds gives intervals that are too short if runs differ more than their images explain; this one
    is not, but wide.
    """
    if len(values) == 1:
        return None
    half = T_975[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def compare(differences, draws=10_000, seed=0):
    """The Difference of {fold: (N,) array of differences, one for each image}.

    The interval is the percentile interval of `bootstrap_means`, the p-value the share of its draws that lie as far
    from their centre as the mean lies from zero.
    """
    parts = [np.sort(values) for _, values in sorted(differences.items())]  # the order of the images changes nothing
    values = np.concatenate(parts)
    mean, means = values.mean(), bootstrap_means(parts, draws, seed)
    far = np.abs(means - means.mean()) >= abs(mean)
    fold_means = [float(part.mean()) for part in parts]
    return Difference(
        mean=float(mean),
        interval=tuple(np.quantile(means, (0.025, 0.975)).tolist()),
        p_value=float((1 + far.sum()) / (1 + draws)),
        fold_means=fold_means,
        fold_interval=t_interval(fold_means),
        images=len(values),
    )


def holm(p_values):
    """{name: p-value} -> the same corrected for their number (Holm 1979), in [0, 1]."""
    corrected, largest = {}, 0.0
    for number, (name, p) in enumerate(sorted(p_values.items(), key=lambda each: each[1])):
        largest = max(largest, min(1.0, (len(p_values) - number) * p))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def relative_gain(metrics, single):
    """The mean over tasks of (M - B) / B, for {task: metric} of a multi-task network and of single-task ones.

    Of metrics of which more is better (Maninis, Radosavovic and Kokkinos, CVPR 2019, equation 4).
    """
    return sum((metrics[task] - value) / value for task, value in single.items()) / len(single)

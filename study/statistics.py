"""Do two arms differ? Differences between their test scores, image by image, each image tested once, in its fold."""

from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower


class Difference(NamedTuple):
    """What `compare` finds; intervals are (low, high), 95 %."""

    fold_means: list  # of float
    mean: float  # of the folds' means
    t_interval: tuple
    bootstrap_interval: tuple
    p_value: float  # two-sided, of a mean of zero, by Student's t of the folds; NaN of a single fold


def compare(parts, draws=2000, seed=0):
    """The Difference of [(N,) array of differences, one for each image, of each fold]."""
    fold_means = [float(part.mean()) for part in parts]
    means = bootstrap_means(parts, draws, seed)
    p_value = float(stats.ttest_1samp(fold_means, 0).pvalue) if len(parts) > 1 else np.nan
    bootstrap_interval = tuple(np.quantile(means, (0.025, 0.975)).tolist())
    return Difference(fold_means, float(np.mean(fold_means)), t_interval(fold_means), bootstrap_interval, p_value)


def t_interval(values):
    """(low, high), the 95 % interval of the mean of some floats by Student's t; NaN of a single one."""
    if len(values) == 1:
        return np.nan, np.nan
    mean, half = np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(mean - half), float(mean + half)


def bootstrap_means(parts, draws, seed):
    """(draws,) means of the folds' means, after folds and then each fold's images are drawn with replacement.

    The hierarchical bootstrap keeps what the images of a fold have in common, their training run, which a bootstrap of
    the images takes for independent (Davison and Hinkley 1997, section 3.8). With few folds its intervals are too
    short if runs differ more than their images explain; those of Student's t are not, but wide.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(parts), size=draws * len(parts))
    means = np.empty(len(chosen))
    for number, values in enumerate(parts):
        rows = np.flatnonzero(chosen == number)
        for piece in np.array_split(rows, 1 + len(rows) * len(values) // 2**22):  # to take little memory
            picks = generator.integers(len(values), size=(len(piece), len(values)))
            means[piece] = values[picks].mean(axis=1)
    return means.reshape(draws, len(parts)).mean(axis=1)


def holm(p_values):
    """p-values -> the same corrected for their number (Holm 1979); NaN, of a run to come, counts as 1."""
    return multipletests(np.nan_to_num(p_values, nan=1), method='holm')[1].tolist()


def detectable_difference(spread, folds, comparisons):
    """The smallest true difference that a t test of the folds finds four times in five, at 5 % over all `comparisons`.

    `spread`: the standard deviation of a fold's difference.
    """
    return float(TTestPower().solve_power(nobs=folds, alpha=0.05 / comparisons, power=0.8) * spread)

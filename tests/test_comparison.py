"""Statistics on made-up scores whose answer is known."""

import numpy as np
import pytest

from comparison import bootstrap_means, compare, holm, relative_gain, t_interval


def test_interval_of_no_difference_covers_zero_in_about_95_of_100_draws():
    generator = np.random.default_rng(0)
    found = [compare({fold: generator.normal(0, 0.1, 40) for fold in range(5)}, 1000, seed) for seed in range(200)]
    covered = np.mean([low <= 0 <= high for low, high in (each.interval for each in found)])
    assert 0.93 <= covered <= 1
    assert np.mean([each.p_value < 0.05 for each in found]) <= 0.07


def test_runs_that_differ_make_the_interval_wider_than_the_images_do():
    """The folds' means are spread by 0.02; 1,000 images each say nothing of that."""
    generator = np.random.default_rng(0)
    shift = np.array([-0.03, -0.01, 0, 0.01, 0.03])
    low, high = compare({fold: generator.normal(shift[fold], 0.01, 1000) for fold in range(5)}).interval
    expected = shift.std() / 5**0.5 * 1.96
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize('folds', [3, 5])
def test_t_interval_of_folds_that_differ_covers_zero_in_about_95_of_100_draws(folds):
    generator = np.random.default_rng(0)
    found = [t_interval(generator.normal(0, 0.02, folds).tolist()) for _ in range(1000)]
    assert np.mean([low <= 0 <= high for low, high in found]) == pytest.approx(0.95, abs=0.02)
    assert t_interval([0.1]) is None


def test_clear_difference_has_an_interval_without_zero_and_a_small_p_value():
    generator = np.random.default_rng(0)
    found = compare({fold: generator.normal(0.02, 0.05, 200) for fold in range(5)})
    assert found.interval[0] > 0.01 and found.interval[1] < 0.03 and found.p_value == 1 / 10001
    assert found.mean == pytest.approx(np.mean(found.fold_means)) and found.images == 1000


def test_p_value_is_two_sided():
    values = np.random.default_rng(0).normal(0, 1, 400)
    parts = {fold: values[100 * fold : 100 * fold + 100] - values.mean() + 0.09 for fold in range(4)}
    above, below = compare(parts), compare({fold: -part for fold, part in parts.items()})
    assert 0.02 < above.p_value < 0.3 and above.p_value == pytest.approx(below.p_value, rel=0.1)


def test_same_seed_same_interval_whatever_the_order_of_the_images():
    values = np.random.default_rng(0).normal(size=60)
    assert compare({0: values, 1: values[:9]}) == compare({1: values[:9][::-1], 0: values[::-1]})
    assert compare({0: values}, seed=1).interval != compare({0: values}, seed=2).interval


def test_bootstrap_draws_arrays_and_then_their_values():
    means = bootstrap_means([np.zeros(3), np.full(5, 8.0)], 4000, 0)
    assert set(means) == {0, 8, 5}  # one of them twice, or both: 5 values of 8 and 3 of 0
    assert np.mean(means == 5) == pytest.approx(0.5, abs=0.03)


def test_holm_corrects_for_the_number_of_comparisons():
    corrected = holm({'a': 0.01, 'b': 0.04, 'c': 0.03, 'd': 0.005})
    assert corrected == pytest.approx({'a': 0.03, 'b': 0.06, 'c': 0.06, 'd': 0.02})
    assert holm({'a': 0.9, 'b': 0.8}) == {'a': 1, 'b': 1}


def test_relative_gain_is_the_mean_over_the_tasks():
    single = {'dice': 0.8, 'accuracy': 0.5, 'box_iou': 0.4}
    assert relative_gain({'dice': 0.84, 'accuracy': 0.4, 'box_iou': 0.4}, single) == pytest.approx((0.05 - 0.2) / 3)

"""Losses, weightings and metrics, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from dataloader_mtl import Sample
from models import Outputs
from utils import (
    METRICS,
    TASKS,
    BoxLoss,
    ClassLoss,
    DiceLoss,
    MaskLoss,
    MeanLosses,
    UncertaintyLoss,
    WeightedLoss,
    accuracy,
    bootstrap_interval,
    dice_score,
    iou_metric,
    mask_iou,
    task_losses,
)

NAN = math.nan


def masks(*rows):
    """Each row of pixel values as a mask (1, 1, n)."""
    return torch.tensor(rows, dtype=torch.uint8)[:, None, None]


PREDICTED = torch.tensor([[9.0, 9, -9, -9], [9, -9, -9, -9], [-9, -9, -9, -9], [9, 9, 9, 9]])[:, None, None]
TARGET = masks([1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [255, 255, 1, 0])
UNKNOWN = torch.full((3, 1, 4, 4), 255, dtype=torch.uint8)


def test_dice_of_each_image():
    found = dice_score(PREDICTED, TARGET, reduction='none')
    assert found.tolist() == pytest.approx([2 / 3, 1, 1, 2 / 3])
    assert dice_score(PREDICTED, TARGET).item() == pytest.approx(10 / 12)


def test_mask_iou_of_each_image():
    found = mask_iou(PREDICTED, TARGET, reduction='none')
    assert found.tolist() == pytest.approx([1 / 2, 1, 1, 1 / 2])


def test_box_iou_of_each_box():
    predicted = torch.tensor([[0, 0, 0.5, 0.5], [0.3, 0.1, 0.7, 0.5], [0.2, 0.2, 0.2, 0.2], [0, 0, 0.1, 0.1]])
    target = torch.tensor([[0.25, 0, 0.75, 0.5], [0.3, 0.1, 0.7, 0.5], [0.3, 0.1, 0.7, 0.5], [NAN] * 4])
    found = iou_metric(predicted, target, reduction='none')
    assert found.tolist() == pytest.approx([1 / 3, 1, 0])
    assert iou_metric(predicted, target).item() == pytest.approx(4 / 9)


def test_iou_of_a_box_without_area_is_zero():
    point = torch.tensor([[0.5, 0.3, 0.5, 0.3]])
    assert iou_metric(point, torch.tensor([[0.3, 0.1, 0.7, 0.5]])) == 0
    assert iou_metric(point, point) == 0


def test_accuracy_counts_labelled_samples():
    logits = torch.eye(4)
    assert accuracy(logits, torch.tensor([0, 1, 3, -1])).item() == pytest.approx(2 / 3)


def test_dice_loss_by_hand():
    # p = sigmoid(0) = 1/2 everywhere: overlap 1/2, sums 2 and 1.
    loss = DiceLoss()(torch.zeros(1, 1, 1, 4), masks([1, 0, 0, 0]))
    assert loss.item() == pytest.approx(1 - (2 * 0.5 + 1) / (2 + 1 + 1))


def test_mask_loss_adds_the_cross_entropy_of_known_pixels():
    logits, target = torch.zeros(1, 1, 1, 4), masks([1, 0, 255, 255])
    assert (MaskLoss()(logits, target) - DiceLoss()(logits, target)).item() == pytest.approx(math.log(2))


def test_class_loss_by_hand():
    assert ClassLoss(0)(torch.zeros(3, 5), torch.tensor([0, 1, -1])).item() == pytest.approx(math.log(5))
    confident = torch.tensor([[20.0, 0.0]])
    assert ClassLoss(0.1)(confident, torch.tensor([0])).item() == pytest.approx(0.05 * 20, rel=1e-4)


def test_box_loss_by_hand():
    # Disjoint: IoU 0, union 1/2, hull 1: GIoU -1/2; mean difference (.5 + 0 + .5 + 0) / 4.
    loss = BoxLoss()(torch.tensor([[0, 0, 0.25, 1.0]]), torch.tensor([[0.75, 0, 1, 1.0]]))
    assert loss.item() == pytest.approx((0.75 + 0.75) / 4 + 1.5, abs=1e-5)
    assert BoxLoss()(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])) < 1e-5


@pytest.mark.parametrize(
    'loss, prediction, target',
    [
        (DiceLoss(), torch.randn(3, 1, 4, 4), UNKNOWN),
        (MaskLoss(), torch.randn(3, 1, 4, 4), UNKNOWN),
        (ClassLoss(), torch.randn(3, 5), torch.full((3,), -1)),
        (BoxLoss(), torch.rand(3, 4), torch.full((3, 4), NAN)),
    ],
)
def test_loss_of_a_batch_without_labels_and_its_gradient_are_zero(loss, prediction, target):
    prediction.requires_grad_()
    value = loss(prediction, target)
    value.backward()
    assert value == 0 and (prediction.grad == 0).all()


@pytest.mark.parametrize(
    'metric, prediction, target',
    [
        (dice_score, torch.randn(3, 1, 4, 4), UNKNOWN),
        (mask_iou, torch.randn(3, 1, 4, 4), UNKNOWN),
        (accuracy, torch.randn(3, 5), torch.full((3,), -1)),
        (iou_metric, torch.rand(3, 4), torch.full((3, 4), NAN)),
    ],
)
def test_metric_of_a_batch_without_labels_is_zero(metric, prediction, target):
    assert metric(prediction, target) == 0
    assert metric(prediction, target, reduction='none').shape == (0,)


@pytest.mark.parametrize(
    'loss, prediction, target, unknown',
    [
        (DiceLoss(), torch.randn(4, 1, 4, 4), torch.randint(0, 2, (4, 1, 4, 4), dtype=torch.uint8), 255),
        (MaskLoss(), torch.randn(4, 1, 4, 4), torch.randint(0, 2, (4, 1, 4, 4), dtype=torch.uint8), 255),
        (ClassLoss(), torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), -1),
        (BoxLoss(), torch.tensor([[0.1, 0.1, 0.4, 0.5]] * 4), torch.tensor([[0.2, 0.2, 0.6, 0.6]] * 4), NAN),
    ],
)
def test_samples_without_the_label_change_neither_loss_nor_gradient(loss, prediction, target, unknown):
    alone = loss(prediction[:2], target[:2])
    target = target.clone()
    target[2:] = unknown
    prediction.requires_grad_()
    together = loss(prediction, target)
    together.backward()
    assert together.item() == pytest.approx(alone.item())
    assert not prediction.grad.isnan().any() and (prediction.grad[2:] == 0).all()


def test_fixed_and_equal_weights():
    losses = {'mask': torch.tensor(1.0), 'class': torch.tensor(2.0), 'box': torch.tensor(4.0)}
    assert WeightedLoss.equal(losses)(losses).item() == pytest.approx(7 / 3)
    assert WeightedLoss({'mask': 0.8, 'class': 0.1, 'box': 0.1})(losses).item() == pytest.approx(1.4)


def test_uncertainty_weights_follow_the_formula_and_reach_its_optimum():
    losses = {'mask': torch.tensor(0.5), 'class': torch.tensor(2.0), 'box': torch.tensor(0.25)}
    weighting = UncertaintyLoss(losses)
    assert weighting(losses).item() == pytest.approx(0.5 + 2 + 0.125)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    # The derivative vanishes at s = log(2 L), and at s = log(L) with the 1/2 of a regression.
    expected = {'mask': 0, 'class': math.log(4), 'box': math.log(0.25)}
    assert {k: v.item() for k, v in weighting.log_variance.items()} == pytest.approx(expected, abs=0.01)


def test_log_variance_has_no_gradient_without_labels():
    weighting = UncertaintyLoss(('mask', 'box'))
    weighting({'mask': torch.tensor(1.0)}).backward()
    assert weighting.log_variance['box'].grad is None


# ---- the interval of a mean


@pytest.mark.parametrize('count', [1, 5])
def test_interval_of_equal_values_is_that_value(count):
    assert bootstrap_interval([0.25] * count) == [0.25, 0.25]


def test_interval_of_a_normal_sample_is_close_to_the_normal_one():
    values = np.random.default_rng(1).normal(0.6, 0.1, 400)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 400**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_interval_of_a_skewed_sample_is_that_of_its_resampled_means():
    """Of n values, k of them 1: binomial; the 2.5th and 97.5th percent of 40 draws at 0.1 are 1 and 8."""
    assert bootstrap_interval([1.0] * 4 + [0.0] * 36) == [1 / 40, 8 / 40]


def test_interval_is_seeded_and_does_not_depend_on_the_order():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values[::-1]) == bootstrap_interval(values)


# ---- the losses of a batch and their means

BATCH = Sample(
    image=torch.zeros(3, 3, 4, 4),
    bbox=torch.tensor([[0.1, 0.1, 0.5, 0.5], [NAN] * 4, [NAN] * 4]),
    label=torch.tensor([1, 0, -1]),
    mask=UNKNOWN,
)
BOX = torch.tensor([[0.1, 0.1, 0.5, 0.4]] * 3)


def test_task_losses_are_those_of_the_networks_tasks_and_zero_without_labels():
    losses = task_losses(Outputs(torch.zeros(3, 2), torch.zeros(3, 1, 4, 4), BOX), BATCH)
    assert {task: count for task, (_, count) in losses.items()} == {'mask': 0, 'class': 2, 'box': 1}
    assert losses['mask'][0] == 0 and losses['class'][0].item() == pytest.approx(math.log(2))
    assert losses['box'][0].item() == BoxLoss()(BOX, BATCH.bbox).item()
    assert task_losses(Outputs(None, None, BOX), BATCH).keys() == {'box'}


def test_mean_losses_are_over_samples_and_go_on_from_totals():
    losses = MeanLosses()
    losses.add({'mask': (torch.tensor(1.0), 3), 'box': (torch.tensor(4.0), 1), 'class': (torch.tensor(0.0), 0)})
    again = MeanLosses(*losses.totals())
    again.add({'mask': (torch.tensor(2.0), 1)})
    assert again.result() == {'loss_mask': 5 / 4, 'loss_box': 4}


def test_tables_have_the_fields_of_outputs_and_samples():
    for task in TASKS.values():
        assert task.field in Outputs._fields and task.field in Sample._fields
    assert {metric.task for metric in METRICS.values()} == TASKS.keys()

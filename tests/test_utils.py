"""Losses, weightings and metrics, against values worked out by hand."""

import math

import pytest
import torch

from utils import (BoxLoss, ClassLoss, DiceLoss, MaskLoss, UncertaintyLoss, WeightedLoss, accuracy,
                   dice_score, iou_metric, mask_iou)

NAN = math.nan


def masks(*rows):
    """Each row of pixel values as a mask (1, 1, n)."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, None]


PREDICTED = masks([9, 9, -9, -9], [9, -9, -9, -9], [-9, -9, -9, -9], [9, 9, 9, 9])
TARGET = masks([1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [NAN, NAN, 1, 0])


def test_dice_of_each_image():
    found = dice_score(PREDICTED, TARGET, reduction='none')
    assert found.tolist() == pytest.approx([2 / 3, 1, 1, 2 / 3])
    assert dice_score(PREDICTED, TARGET).item() == pytest.approx(10 / 12)


def test_mask_iou_of_each_image():
    found = mask_iou(PREDICTED, TARGET, reduction='none')
    assert found.tolist() == pytest.approx([1 / 2, 1, 1, 1 / 2])


def test_box_iou_is_true_iou():
    predicted = torch.tensor([[0, 0, .5, .5], [.3, .1, .7, .5], [.2, .2, .2, .2], [0, 0, .1, .1]])
    target = torch.tensor([[.25, 0, .75, .5], [.3, .1, .7, .5], [.3, .1, .7, .5], [NAN] * 4])
    found = iou_metric(predicted, target, reduction='none')
    assert found.tolist() == pytest.approx([1 / 3, 1, 0])
    assert iou_metric(predicted, target).item() == pytest.approx(4 / 9)


def test_a_box_without_area_scores_nothing():
    point = torch.tensor([[.5, .3, .5, .3]])
    assert iou_metric(point, torch.tensor([[.3, .1, .7, .5]])) == 0
    assert iou_metric(point, point) == 0


def test_accuracy_counts_labelled_samples():
    logits = torch.eye(4)
    assert accuracy(logits, torch.tensor([0, 1, 3, -1])).item() == pytest.approx(2 / 3)


def test_dice_loss_by_hand():
    # p = sigmoid(0) = 1/2 everywhere: overlap 1/2, sums 2 and 1.
    loss = DiceLoss()(torch.zeros(1, 1, 1, 4), masks([1, 0, 0, 0]))
    assert loss.item() == pytest.approx(1 - (2 * 0.5 + 1) / (2 + 1 + 1))


def test_mask_loss_adds_the_cross_entropy_of_known_pixels():
    logits, target = torch.zeros(1, 1, 1, 4), masks([1, 0, NAN, NAN])
    assert (MaskLoss()(logits, target) - DiceLoss()(logits, target)).item() == pytest.approx(math.log(2))


def test_class_loss_by_hand():
    assert ClassLoss(0)(torch.zeros(3, 5), torch.tensor([0, 1, -1])).item() == pytest.approx(math.log(5))
    confident = torch.tensor([[20., 0.]])
    assert ClassLoss(0.1)(confident, torch.tensor([0])).item() == pytest.approx(0.05 * 20, rel=1e-4)


def test_box_loss_by_hand():
    # Disjoint: IoU 0, union 1/2, hull 1: GIoU -1/2; mean difference (.5 + 0 + .5 + 0) / 4.
    loss = BoxLoss()(torch.tensor([[0, 0, .25, 1.]]), torch.tensor([[.75, 0, 1, 1.]]))
    assert loss.item() == pytest.approx((.75 + .75) / 4 + 1.5, abs=1e-5)
    assert BoxLoss()(torch.tensor([[.1, .2, .3, .4]]), torch.tensor([[.1, .2, .3, .4]])) < 1e-5


@pytest.mark.parametrize('loss, prediction, target', [
    (DiceLoss(), torch.randn(3, 1, 4, 4), torch.full((3, 1, 4, 4), NAN)),
    (MaskLoss(), torch.randn(3, 1, 4, 4), torch.full((3, 1, 4, 4), NAN)),
    (ClassLoss(), torch.randn(3, 5), torch.full((3,), -1)),
    (BoxLoss(), torch.rand(3, 4), torch.full((3, 4), NAN)),
])
def test_a_batch_without_a_label_gives_zero_and_a_zero_gradient(loss, prediction, target):
    prediction.requires_grad_()
    value = loss(prediction, target)
    value.backward()
    assert value == 0 and (prediction.grad == 0).all()


@pytest.mark.parametrize('metric, prediction, target', [
    (dice_score, torch.randn(3, 1, 4, 4), torch.full((3, 1, 4, 4), NAN)),
    (mask_iou, torch.randn(3, 1, 4, 4), torch.full((3, 1, 4, 4), NAN)),
    (accuracy, torch.randn(3, 5), torch.full((3,), -1)),
    (iou_metric, torch.rand(3, 4), torch.full((3, 4), NAN)),
])
def test_a_metric_of_a_batch_without_a_label_is_zero(metric, prediction, target):
    assert metric(prediction, target) == 0
    assert metric(prediction, target, reduction='none').shape == (0,)


@pytest.mark.parametrize('loss, prediction, target, unknown', [
    (DiceLoss(), torch.randn(4, 1, 4, 4), torch.randint(0, 2, (4, 1, 4, 4)).float(), NAN),
    (MaskLoss(), torch.randn(4, 1, 4, 4), torch.randint(0, 2, (4, 1, 4, 4)).float(), NAN),
    (ClassLoss(), torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), -1),
    (BoxLoss(), torch.tensor([[.1, .1, .4, .5]] * 4), torch.tensor([[.2, .2, .6, .6]] * 4), NAN),
])
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
    losses = {'mask': torch.tensor(1.), 'class': torch.tensor(2.), 'box': torch.tensor(4.)}
    assert WeightedLoss.equal(losses)(losses).item() == pytest.approx(7 / 3)
    assert WeightedLoss({'mask': .8, 'class': .1, 'box': .1})(losses).item() == pytest.approx(1.4)


def test_uncertainty_weights_follow_their_formula_and_move_to_its_optimum():
    losses = {'mask': torch.tensor(.5), 'class': torch.tensor(2.), 'box': torch.tensor(.25)}
    weighting = UncertaintyLoss(losses)
    assert weighting(losses).item() == pytest.approx(.5 + 2 + .125)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=.05)
    for _ in range(500):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    # The derivative vanishes at s = log(2 L), and at s = log(L) with the 1/2 of a regression.
    expected = {'mask': 0, 'class': math.log(4), 'box': math.log(.25)}
    assert {k: v.item() for k, v in weighting.log_variance.items()} == pytest.approx(expected, abs=.01)


def test_an_absent_task_leaves_its_uncertainty_alone():
    weighting = UncertaintyLoss(('mask', 'box'))
    weighting({'mask': torch.tensor(1.)}).backward()
    assert weighting.log_variance['box'].grad is None

"""Losses, weightings and metrics, against values worked out by hand."""

import copy
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
    calibration_error,
    class_details,
    dice_score,
    iou_metric,
    likeliest_species,
    macro_f1,
    mask_iou,
    overlap,
    pooled_dice,
    pooled_iou,
    task_losses,
)

NAN = math.nan


def masks(*rows):
    """Each row of pixel values as a mask (1, 1, n)."""
    return torch.tensor(rows, dtype=torch.uint8)[:, None, None]


PREDICTED = torch.tensor([[9.0, 9, -9, -9], [9, -9, -9, -9], [-9, -9, -9, -9], [9, 9, 9, 9]])[:, None, None]
TARGET = masks([1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [255, 255, 1, 0])
LABELLED = {  # task: predictions and targets of four samples, and the target of an unknown one
    'mask': (torch.randn(4, 1, 4, 4), torch.randint(0, 2, (4, 1, 4, 4), dtype=torch.uint8), 255),
    'class': (torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), -1),
    'box': (torch.tensor([[0.1, 0.1, 0.4, 0.5]] * 4), torch.tensor([[0.2, 0.2, 0.6, 0.6]] * 4), NAN),
}


def test_dice_and_mask_iou_of_each_image():
    assert dice_score(PREDICTED, TARGET, reduction='none').tolist() == pytest.approx([2 / 3, 1, 1, 2 / 3])
    assert dice_score(PREDICTED, TARGET).item() == pytest.approx(10 / 12)
    assert mask_iou(PREDICTED, TARGET, reduction='none').tolist() == pytest.approx([1 / 2, 1, 1, 1 / 2])


def test_box_iou_of_each_box_is_zero_without_area():
    whole, point = [0.3, 0.1, 0.7, 0.5], [0.2, 0.2, 0.2, 0.2]
    predicted = torch.tensor([[0, 0, 0.5, 0.5], whole, point, point, whole])
    target = torch.tensor([[0.25, 0, 0.75, 0.5], whole, whole, point, [NAN] * 4])
    assert iou_metric(predicted, target, reduction='none').tolist() == pytest.approx([1 / 3, 1, 0, 0])
    assert iou_metric(predicted, target).item() == pytest.approx(1 / 3)


def test_accuracy_counts_labelled_samples():
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 3, -1])).item() == pytest.approx(2 / 3)


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


@pytest.mark.parametrize('task', LABELLED)
def test_unlabelled_samples_count_for_nothing_in_losses_gradients_and_metrics(task):
    prediction, target, unknown = copy.deepcopy(LABELLED[task])
    loss, metrics = TASKS[task].loss, [metric.function for metric in METRICS.values() if metric.task == task]
    alone = [function(prediction[:2], target[:2]).item() for function in (loss, *metrics)]
    prediction.requires_grad_()
    for known, expected in (2, alone), (0, [0] * len(alone)):
        target[known:] = unknown
        values = [function(prediction, target) for function in (loss, *metrics)]
        (gradient,) = torch.autograd.grad(values[0], prediction)
        assert [value.item() for value in values] == pytest.approx(expected)
        assert gradient.isfinite().all() and (gradient[known:] == 0).all()
        assert all(metric(prediction, target, reduction='none').shape == (known,) for metric in metrics)


def test_fixed_and_equal_weights():
    losses = {'mask': torch.tensor(1.0), 'class': torch.tensor(2.0), 'box': torch.tensor(4.0)}
    assert WeightedLoss.equal(losses)(losses).item() == pytest.approx(7 / 3)
    assert WeightedLoss({'mask': 0.8, 'class': 0.1, 'box': 0.1})(losses).item() == pytest.approx(1.4)


def test_uncertainty_weights_follow_the_formula_and_leave_out_a_task_without_labels():
    losses = {'mask': torch.tensor(0.5), 'class': torch.tensor(2.0), 'box': torch.tensor(0.25)}
    weighting = UncertaintyLoss(losses)
    assert weighting(losses).item() == pytest.approx(0.5 + 2 + 0.125)
    # The derivative vanishes at s = log(2 L), and at s = log(L) with the 1/2 of a regression.
    for task, best in {'mask': 0, 'class': math.log(4), 'box': math.log(0.25)}.items():
        weighting.log_variance[task].data.fill_(best)
    weighting(losses).backward()
    assert [s.grad.item() for s in weighting.log_variance.values()] == pytest.approx([0, 0, 0], abs=1e-6)
    weighting.zero_grad()
    weighting({'mask': losses['mask']}).backward()
    assert weighting.log_variance['box'].grad is None


# ---- metrics of a whole data set


def test_pooled_metrics_add_up_the_pixels_of_all_images():
    both, predicted, true = (values.numpy() for values in overlap(PREDICTED, TARGET))
    assert both.tolist() == [1, 1, 0, 1] and predicted.tolist() == [2, 1, 0, 2] and true.tolist() == [1, 1, 0, 1]
    assert pooled_dice(both, predicted, true) == 6 / 8 and pooled_iou(both, predicted, true) == 3 / 5
    nothing = [np.zeros(2)] * 3
    assert pooled_dice(*nothing) == pooled_iou(*nothing) == 1


def test_macro_f1_is_the_mean_over_the_classes_that_occur():
    label, predicted = np.array([[0, 0, 1, 3]] * 2), np.array([[0, 1, 1, 2], [0, 0, 1, 3]])
    # Of the first row: class 0 is 2 / 3, class 1 is 2 / 3, class 3 is 0; class 2 does not occur.
    assert macro_f1(label, predicted).tolist() == pytest.approx([4 / 9, 1])
    assert macro_f1(label[0], predicted[0]) == pytest.approx(4 / 9)


def test_calibration_error_is_the_gap_of_each_bin_by_its_size():
    label, predicted = np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1])
    confidence = np.array([0.9, 0.9, 0.91, 1.0])  # three in one bin, two of them right; one in the last
    assert calibration_error(label, predicted, confidence) == pytest.approx((2.71 - 2) / 4)


def test_class_details_of_the_samples_with_a_label():
    logits, species = torch.tensor([[3.0, 1, 2], [0, 0, 9], [0, 1, 5]]), ['cat', 'dog', None]
    found = class_details(logits, torch.tensor([2, -1, 2]), species)
    assert torch.equal(found['logits'], logits[[0, 2]].double())
    assert found['label'].tolist() == [2, 2] and found['predicted'].tolist() == [0, 2]
    assert found['confidence'].tolist() == pytest.approx(logits[[0, 2]].softmax(dim=1).amax(dim=1).tolist())
    assert found['top5'].isnan().all() and found['species'].isnan().all()  # all three are among five
    right = class_details(logits, torch.tensor([0, 1, 2]), species)['species']
    assert right[:2].tolist() == [1, 0] and right[2].isnan()


def test_top5_is_of_five_classes_also_if_six_are_equally_likely():
    top5 = class_details(torch.arange(6.0).expand(3, 6), torch.tensor([5, 1, 0]), [None] * 6)['top5']
    assert top5.tolist() == [1, 1, 0]
    tied = class_details(torch.zeros(6, 6), torch.arange(6), [None] * 6)['top5']
    assert tied.sum() == 5


def test_the_species_of_a_sure_class_is_taken_and_otherwise_the_mean_over_classes():
    species = ['cat', 'dog', 'dog', 'dog', None]
    shares = torch.tensor(
        [[0.4, 0.6, 0, 0, 0], [0.3, 0.2, 0.2, 0.2, 0.1], [0.1, 0.3, 0.3, 0.1, 0.2], [0.1, 0, 0, 0.1, 0.8]]
    )
    number, probability = likeliest_species(shares, species)
    assert number.tolist() == [1, 0, 1, 0]
    means = torch.tensor([0.3 / (0.3 + 0.2), (0.7 / 3) / (0.1 + 0.7 / 3), 0.1 / (0.1 + 0.1 / 3)])
    assert probability.tolist() == pytest.approx([0.6, *means.tolist()])


# ---- the losses of a batch and their means

BATCH = Sample(
    image=torch.zeros(3, 3, 4, 4),
    bbox=torch.tensor([[0.1, 0.1, 0.5, 0.5], [NAN] * 4, [NAN] * 4]),
    label=torch.tensor([1, 0, -1]),
    mask=torch.full((3, 1, 4, 4), 255, dtype=torch.uint8),
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

"""Losses, task weightings and metrics.

Shapes and types are those of `MTLDataset` and `models.Outputs`: mask logits and masks (N, 1, H, W),
class logits (N, n_classes) and labels (N,), boxes (N, 4) in [0, 1]. What is not known is NaN in a mask
or a box and -1 as a label. Every loss and metric is a mean over the samples that have the label, and
zero where a batch has none. The metrics' `reduction='none'` gives the value of each sample that has
the label, from which a dataset's figure is exact however the batches fall.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import ops


def mask_known(mask):
    """(N, 1, H, W) -> (N,) bool: whether any pixel of the mask is known."""
    return ~mask.isnan().flatten(1).all(dim=1)


def label_known(label):
    """(N,) -> (N,) bool."""
    return label >= 0


def box_known(bbox):
    """(N, 4) -> (N,) bool."""
    return ~bbox.isnan().any(dim=1)


def reduce(values, reduction):
    """(K,) values of the samples that have the label -> their mean, or zero if there are none."""
    if reduction == 'none':
        return values
    return values.mean() if len(values) else values.sum()  # a sum keeps the graph, unlike a constant


# ---- losses


class DiceLoss(nn.Module):
    """1 - 2 sum(p t) / (sum(p) + sum(t)) of each image, p the sigmoid of the logits, averaged.

    The soft Dice loss (Milletari, Navab and Ahmadi, V-Net, 3DV 2016, with plain sums below, as in the
    Dice coefficient) over the known pixels; 1 is added above and below, so that an image whose mask is
    empty has a gradient.
    """

    def forward(self, mask_logits, mask):
        rows = mask_known(mask)
        probability, target = mask_logits[rows].float().sigmoid().flatten(1), mask[rows].flatten(1)
        known = ~target.isnan()
        probability, target = probability * known, target.nan_to_num(0)
        overlap = (probability * target).sum(dim=1)
        total = probability.sum(dim=1) + target.sum(dim=1)
        return reduce(1 - (2 * overlap + 1) / (total + 1), 'mean')


class MaskLoss(nn.Module):
    """DiceLoss plus the binary cross-entropy over the known pixels of each image."""

    def __init__(self):
        super().__init__()
        self.dice = DiceLoss()

    def forward(self, mask_logits, mask):
        rows = mask_known(mask)
        logits, target = mask_logits[rows].float().flatten(1), mask[rows].flatten(1)
        known = ~target.isnan()
        entropy = F.binary_cross_entropy_with_logits(logits, target.nan_to_num(0), reduction='none')
        entropy = (entropy * known).sum(dim=1) / known.sum(dim=1)
        return self.dice(mask_logits, mask) + reduce(entropy, 'mean')


class ClassLoss(nn.Module):
    """Cross-entropy with label smoothing (Szegedy et al., CVPR 2016)."""

    def __init__(self, smoothing=0.1):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, label_logits, label):
        rows = label_known(label)
        return reduce(F.cross_entropy(
            label_logits[rows].float(), label[rows], reduction='none', label_smoothing=self.smoothing
        ), 'mean')


class BoxLoss(nn.Module):
    """Mean absolute difference of the coordinates plus 1 - GIoU (Rezatofighi et al., CVPR 2019).

    The L1 term alone, as in the study, is about 0.1 from the first step and hardly rewards a tighter
    box; the GIoU term is what the box is judged by, and has a gradient for boxes apart as well.
    """

    def forward(self, bbox, target):
        rows = box_known(target)
        bbox, target = bbox[rows].float(), target[rows]
        distance = (bbox - target).abs().mean(dim=1)
        return reduce(distance + ops.generalized_box_iou_loss(bbox, target), 'mean')


# ---- weightings: dict of task -> scalar loss in, one scalar out


class WeightedLoss(nn.Module):
    """The sum of the tasks' losses with fixed weights, {task: weight}."""

    def __init__(self, weights):
        super().__init__()
        self.weights = dict(weights)

    @classmethod
    def equal(cls, tasks):
        """1 / T for each of T tasks, as in the study."""
        return cls({task: 1 / len(tasks) for task in tasks})

    def forward(self, losses):
        return sum(self.weights[task] * loss for task, loss in losses.items())


class UncertaintyLoss(nn.Module):
    """Learned weights from each task's uncertainty (Kendall, Gal and Cipolla, CVPR 2018).

    With s = log sigma^2, a parameter for each task that starts at zero:
        classification (mask and class)  exp(-s) L + s / 2        (their eq. 10)
        regression (box)                 exp(-s) L / 2 + s / 2    (their eq. 5 and 7)
    The 1/2 of the regression term comes from the Gaussian's exponent, (y - f)^2 / (2 sigma^2); the
    softmax of a classification is scaled by 1 / sigma^2 without it. The box loss here is no squared
    error; the form is kept, as the study and most users of the method keep it.

    A task without a label in a batch is left out with its s, which would otherwise sink unopposed.
    The parameters must be given to the optimiser, as `engine.train` does.
    """

    def __init__(self, tasks):
        super().__init__()
        self.log_variance = nn.ParameterDict({task: nn.Parameter(torch.zeros(())) for task in tasks})

    def forward(self, losses):
        total = 0
        for task, loss in losses.items():
            s = self.log_variance[task]
            total = total + torch.exp(-s) * loss * (0.5 if task == 'box' else 1) + s / 2
        return total


# ---- metrics


def overlap(mask_logits, mask):
    """Per image with a mask, over its known pixels: (predicted and true, predicted, true) counts.

    A pixel is predicted as pet where its logit is above zero, a probability above one half.
    """
    rows = mask_known(mask)
    target = mask[rows].flatten(1)
    predicted = (mask_logits[rows].flatten(1) > 0) & ~target.isnan()
    true = target == 1
    counts = (predicted & true, predicted, true)
    return tuple(count.sum(dim=1).double() for count in counts)


def dice_score(mask_logits, mask, reduction='mean'):
    """Dice coefficient 2 |P and T| / (|P| + |T|) of each image, in [0, 1]; 1 where both are empty."""
    both, predicted, true = overlap(mask_logits, mask)
    total = predicted + true
    return reduce(torch.where(total > 0, 2 * both / total.clamp(min=1), 1), reduction)


def mask_iou(mask_logits, mask, reduction='mean'):
    """Intersection over union of each image's pet pixels, in [0, 1]; 1 where both are empty."""
    both, predicted, true = overlap(mask_logits, mask)
    union = predicted + true - both
    return reduce(torch.where(union > 0, both / union.clamp(min=1), 1), reduction)


def iou_metric(bbox, target, reduction='mean'):
    """Intersection over union of each predicted box with its target, in [0, 1]."""
    rows = box_known(target)
    iou = ops.box_iou(bbox[rows].double(), target[rows].double()).diagonal()
    return reduce(iou.nan_to_num(0), reduction)  # 0 / 0: two boxes without area


def accuracy(label_logits, label, reduction='mean'):
    """Share of samples whose highest logit is that of their label, in [0, 1]."""
    rows = label_known(label)
    return reduce((label_logits[rows].argmax(dim=1) == label[rows]).double(), reduction)

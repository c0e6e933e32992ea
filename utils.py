"""Losses, task weightings and metrics, and the tables `TASKS`, `METRICS` and `POOLED` that name them.

Shapes and types are those of a `Sample` of `MTLDataset` and of `models.Outputs`: mask logits and masks
(N, 1, H, W), class logits (N, n_classes) and labels (N,), boxes (N, 4) in [0, 1]. Unknown is 255 in a mask,
NaN in a box and -1 as a label. Every loss is a mean over the samples whose label is known, and zero without any; a
metric is that mean or, with reduction='none', the value of each of these samples.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import ops

from support.distributed import all_gather
from support.hdf5 import MASK_UNKNOWN
from support.splits import SPECIES


def mask_known(mask):
    """(N, 1, H, W) uint8 -> (N,) bool: whether any pixel of the mask is known."""
    return (mask != MASK_UNKNOWN).flatten(1).any(dim=1)


def label_known(label):
    """(N,) -> (N,) bool."""
    return label >= 0


def box_known(bbox):
    """(N, 4) -> (N,) bool."""
    return ~bbox.isnan().any(dim=1)


def reduce(values, reduction):
    """(K,) values of the samples whose label is known -> their mean, or zero for K = 0; 'none': `values`."""
    if reduction == 'none':
        return values
    return values.mean() if len(values) else values.sum()  # the sum of nothing is attached to the graph


# ---- losses


class DiceLoss(nn.Module):
    """Mean over the images of 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), p the sigmoid of the logits.

    The soft Dice loss (Milletari, Navab and Ahmadi, V-Net, 3DV 2016) with plain sums in the denominator, as
    in the Dice coefficient, over the known pixels. The 1 gives an image with an empty mask a gradient.
    """

    def forward(self, mask_logits, mask):
        rows = mask_known(mask)
        logits, mask = mask_logits[rows].float().flatten(1), mask[rows].flatten(1)
        probability, target = logits.sigmoid() * (mask != MASK_UNKNOWN), mask == 1
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
        known = target != MASK_UNKNOWN
        entropy = F.binary_cross_entropy_with_logits(logits, (target == 1).float(), reduction='none')
        entropy = (entropy * known).sum(dim=1) / known.sum(dim=1)
        return self.dice(mask_logits, mask) + reduce(entropy, 'mean')


class ClassLoss(nn.Module):
    """Cross-entropy with label smoothing (Szegedy et al., CVPR 2016)."""

    def __init__(self, smoothing=0.1):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, label_logits, label):
        rows = label_known(label)
        return reduce(
            F.cross_entropy(label_logits[rows].float(), label[rows], reduction='none', label_smoothing=self.smoothing),
            'mean',
        )


class BoxLoss(nn.Module):
    """Mean absolute difference of the coordinates plus 1 - GIoU (Rezatofighi et al., CVPR 2019).

    L1 only, as in the original, is about 0.1 from the first step and hardly rewards a tighter box. GIoU is close to the
    metric and has a gradient for boxes that do not overlap, too.
    """

    def forward(self, bbox, target):
        rows = box_known(target)
        bbox, target = bbox[rows].float(), target[rows]
        distance = (bbox - target).abs().mean(dim=1)
        return reduce(distance + ops.generalized_box_iou_loss(bbox, target), 'mean')


# ---- weightings: {task: scalar loss} -> scalar


class WeightedLoss(nn.Module):
    """The sum of the tasks' losses with fixed weights, {task: weight}."""

    def __init__(self, weights):
        super().__init__()
        self.weights = dict(weights)

    @classmethod
    def equal(cls, tasks):
        """1 / T for each of T tasks, as in the original."""
        return cls({task: 1 / len(tasks) for task in tasks})

    def forward(self, losses):
        return sum(self.weights[task] * loss for task, loss in losses.items())


class UncertaintyLoss(nn.Module):
    """Learned weights from each task's uncertainty (Kendall, Gal and Cipolla, CVPR 2018).

    With a parameter s = log sigma^2 for each task, which starts at zero:
        classification (mask and class)  exp(-s) L + s / 2        (their eq. 10)
        regression (box)                 exp(-s) L / 2 + s / 2    (their eq. 5 and 7)
    The box loss is not a squared error, as their regression is; most users of the method keep the form. A task
    without labels in a batch is left out together with its s, which would otherwise sink.
    The parameters must be given to the optimiser, as `engine.Run` does.
    """

    def __init__(self, tasks):
        super().__init__()
        self.log_variance = nn.ParameterDict({task: nn.Parameter(torch.zeros(())) for task in tasks})

    def forward(self, losses):
        total = 0
        for task, loss in losses.items():
            s = self.log_variance[task]
            total = total + torch.exp(-s) * loss * (0.5 if TASKS[task].regression else 1) + s / 2
        return total


# ---- metrics: reduction='none' gives the value of each sample whose label is known


def overlap(mask_logits, mask):
    """Counts (K,) of (predicted and true, predicted, true) known pixels, for each image with a mask.

    A pixel is predicted as pet where its logit is above zero: a probability above one half.
    """
    rows = mask_known(mask)
    target = mask[rows].flatten(1)
    predicted = (mask_logits[rows].flatten(1) > 0) & (target != MASK_UNKNOWN)
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


# ---- metrics of a whole data set, from the details of each sample


PIXELS = ('pixels_both', 'pixels_predicted', 'pixels_true')


def class_details(label_logits, label, class_species):
    """What was predicted for each sample whose label is known, each (K,) float64, and the logits (K, n_classes).

    {'logits', 'label', 'predicted': classes, 'top5': whether the label is among the 5 likeliest, NaN for 5 classes or
    fewer, 'confidence': the highest probability, 'species': whether that of `likeliest_species` is the label's, NaN for
    a label of unknown species}.
    """
    rows = label_known(label)
    label, probabilities = label[rows], label_logits[rows].double().softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    likeliest = probabilities.topk(min(5, probabilities.shape[1])).indices
    top5 = (likeliest == label[:, None]).any(dim=1).double()
    numbers = [SPECIES.index(name) if name else -1 for name in class_species]
    species = torch.tensor(numbers, device=label.device)[label]
    found, _ = likeliest_species(probabilities, class_species)
    return {
        'logits': label_logits[rows].double(),
        'label': label.double(),
        'predicted': predicted.double(),
        'top5': top5 if probabilities.shape[1] > 5 else torch.full_like(top5, math.nan),
        'confidence': confidence,
        'species': torch.where(species < 0, math.nan, (species == found).double()),
    }


def likeliest_species(probabilities, class_species):
    """(N, C) probabilities of the classes -> numbers in SPECIES (N,) int64 and their probabilities (N,) in [0, 1].

    Where the likeliest class has more than one half, its species is taken. Elsewhere a species' probability is its
    mean over its classes, normalised: a sum would favour the species with more of them where the network is unsure.
    Classes of unknown species do not count; some must be known.
    """
    members = [[name == species for name in class_species] for species in SPECIES]
    members = torch.tensor(members, dtype=probabilities.dtype, device=probabilities.device).T
    sums, (highest, likeliest) = probabilities @ members, probabilities.max(dim=1)
    means = sums / members.sum(dim=0).clamp(min=1)
    sure = ((highest > 0.5) & members.any(dim=1)[likeliest])[:, None]
    scores = torch.where(sure, sums * members[likeliest], means / means.sum(dim=1, keepdim=True))
    found, number = scores.max(dim=1)
    return number, found.clamp(max=1)  # rounding may have made it more


def mean_value(values):
    """(..., K) -> (...)."""
    return values.mean(axis=-1)


def pooled_dice(both, predicted, true):
    """The Dice coefficient of all known pixels together; counts (..., K) -> (...)."""
    return share(2 * both.sum(axis=-1), (predicted + true).sum(axis=-1))


def pooled_iou(both, predicted, true):
    """Intersection over union of all known pixels together; counts (..., K) -> (...)."""
    return share(both.sum(axis=-1), (predicted + true - both).sum(axis=-1))


def share(part, whole):
    """part / whole, and 1 where both are 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 1)


def macro_f1(label, predicted):
    """The mean over the classes that occur in `label` of 2 TP / (2 TP + FP + FN); (..., K) -> (...)."""
    total = occurring = 0
    for number in range(int(label.max()) + 1):
        true, found = label == number, predicted == number
        count, hits = true.sum(axis=-1), (true & found).sum(axis=-1)
        total = total + 2 * hits / np.maximum(count + found.sum(axis=-1), 1)
        occurring = occurring + (count > 0)
    return total / occurring


def calibration_error(label, predicted, confidence, bins=15):
    """The expected calibration error (Guo et al., ICML 2017): |accuracy - confidence| of equally wide bins; (..., K).

    Its mean over the samples, of bins from 0 to 1.
    """
    gap, number = (label == predicted) - confidence, np.minimum(confidence * bins, bins - 1).astype(int)
    return sum(abs(np.where(number == each, gap, 0).sum(axis=-1)) for each in range(bins)) / label.shape[-1]


# ---- tables


class Task(NamedTuple):
    field: str  # of models.Outputs, the prediction, and of dataloader_mtl.Sample, the target
    loss: Callable  # (prediction, target) -> scalar
    known: Callable  # target -> (N,) bool, for which samples the label is known
    regression: bool = False  # for UncertaintyLoss


class Metric(NamedTuple):
    printed: str  # the original's name where it has one
    task: str
    function: Callable  # (prediction, target, reduction) -> scalar, or a value for each sample


class Pooled(NamedTuple):
    printed: str
    function: Callable  # (*details) -> a value of the whole data set
    details: tuple  # the names of what it takes, of PIXELS or `class_details`


TASKS = {
    'mask': Task('mask', MaskLoss(), mask_known),
    'class': Task('label', ClassLoss(), label_known),
    'box': Task('bbox', BoxLoss(), box_known, regression=True),
}

METRICS = {
    'dice': Metric('Dice Score - Segmentation', 'mask', dice_score),
    'mask_iou': Metric('IoU - Segmentation', 'mask', mask_iou),
    'accuracy': Metric('Accuracy - Classification', 'class', accuracy),
    'box_iou': Metric('IoU - Bounding Box Regression', 'box', iou_metric),
}

POOLED = {
    'pooled_dice': Pooled('Dice Score - Segmentation, pooled', pooled_dice, PIXELS),
    'pooled_iou': Pooled('IoU - Segmentation, pooled', pooled_iou, PIXELS),
    'top5_accuracy': Pooled('Top-5 Accuracy - Classification', mean_value, ('top5',)),
    'species_accuracy': Pooled('Accuracy - Species', mean_value, ('species',)),
    'macro_f1': Pooled('Macro F1 - Classification', macro_f1, ('label', 'predicted')),
    'calibration_error': Pooled(
        'Expected Calibration Error - Classification', calibration_error, ('label', 'predicted', 'confidence')
    ),
}

PRINTED = {name: metric.printed for name, metric in (METRICS | POOLED).items()}


# ---- the losses of a batch and their means


def task_losses(outputs, batch):
    """{task: (loss, number of known labels)} for the network's tasks; the loss of no labels is zero."""
    losses = {}
    for name, task in TASKS.items():
        prediction, target = getattr(outputs, task.field), getattr(batch, task.field)
        if prediction is not None:
            losses[name] = task.loss(prediction, target), int(task.known(target).sum())
    return losses


class MeanLosses:
    """The mean of each task's loss over the samples whose label is known, whatever the batch sizes."""

    def __init__(self, sums=(), counts=()):
        self.sums, self.counts = Counter(sums), Counter(counts)

    def add(self, losses):
        for task, (loss, count) in losses.items():
            self.sums[task] += loss.item() * count
            self.counts[task] += count

    def totals(self):
        """({task: sum}, {task: count}) over all ranks."""
        parts = all_gather((self.sums, self.counts))
        sums, counts = ({task: sum(part[i][task] for part in parts) for task in TASKS} for i in (0, 1))
        return {task: float(total) for task, total in sums.items()}, counts

    def result(self):
        """{'loss_<task>': mean} over all ranks."""
        sums, counts = self.totals()
        return {f'loss_{task}': sums[task] / counts[task] for task in TASKS if counts[task]}

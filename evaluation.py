"""How good a network is: its metrics on a split, averaged over flips, and those of a constant prediction.

evaluate(load_model(), MTLDataset('test'), torch.device('cpu'))  # {'dice': 0.9, ...}
"""

import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataloader_mtl import Sample, load_batches, split_batches
from models import FlipAveraged, Outputs
from support.distributed import all_gather
from utils import METRICS, PIXELS, POOLED, TASKS, MeanLosses, class_details, mean_value, overlap, task_losses

FEWEST_LABELS = 50  # to fit a temperature to


def to_device(batch, device):
    batch = Sample(*(tensor.to(device, non_blocking=True) for tensor in batch))
    return batch._replace(image=batch.image.contiguous(memory_format=torch.channels_last))


@torch.inference_mode()
def score(model, dataset, device, batch_size=32, workers=0, bfloat16=False, before_batch=lambda: None):
    """Every metric of `model` for each sample of an MTLDataset or a Subset of one, and what POOLED is made of.

    Returns a pair over all ranks: {metric of METRICS or detail: (N, ...) float64 array, NaN for samples without the
    label}, and {'loss_<task>': mean}. For a task that the network does not have, the metrics are NaN and there are no
    details (`utils.PIXELS`, `utils.class_details`). Evaluation mode; the model's mode is restored.
    """
    was_training = model.training
    model.eval()
    values, losses, seen = {name: np.full(len(dataset), np.nan) for name in METRICS}, MeanLosses(), 0
    batches = [batch for batch in split_batches(range(len(dataset)), batch_size) if batch]  # this rank's share
    split = getattr(dataset, 'dataset', dataset).split
    for positions, batch in zip(batches, load_batches(dataset, batches, workers, device)):
        before_batch()
        known = {name: task.known(getattr(batch, task.field)).cpu().numpy() for name, task in TASKS.items()}
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            outputs = model(batch.image)
        for task, (field, *_) in TASKS.items():
            prediction, target = getattr(outputs, field), getattr(batch, field)
            if prediction is None:
                continue
            found = {
                name: metric.function(prediction, target, reduction='none')
                for name, metric in METRICS.items()
                if metric.task == task
            }
            if task == 'mask':
                found |= zip(PIXELS, overlap(prediction, target))
            if task == 'class':
                found |= class_details(prediction, target, split.class_species)
            for name, column in found.items():
                rows = np.array(positions)[known[task]]
                values.setdefault(name, np.full((len(dataset), *column.shape[1:]), np.nan))[rows] = column.cpu()
        losses.add(task_losses(outputs, batch))
        seen += len(positions)
    model.train(was_training)
    parts = all_gather((values, seen))
    assert sum(seen for _, seen in parts) == len(dataset), 'the loader must give each sample once'
    names = dict.fromkeys(name for values, _ in parts for name in values)  # a rank may have had no sample
    columns = {name: [values[name] for values, _ in parts if name in values] for name in names}
    values = {name: np.fmax.reduce(column) for name, column in columns.items()}  # fmax takes numbers over NaN
    return values, losses.result()


def evaluate(model, dataset, device, **options):
    """The means of `score`, which takes the same arguments: {metric or 'loss_<task>': float}.

    Without tasks that the network does not have or of which no label is known.
    """
    values, losses = score(model, dataset, device, **options)
    known = {name: values[name][~np.isnan(values[name])] for name in METRICS}
    # fsum is exact, so the order of the samples and the number of ranks change nothing.
    return {name: math.fsum(each) / len(each) for name, each in known.items() if len(each)} | losses


class ConstantNet(nn.Module):
    """The same prediction for every image, from the training labels: a floor to compare metrics with.

    Args:
        labels: (N,) int64, -1 unknown; predicted is each class's share of them.
        bboxes: (N, 4) float32 in [0, 1], NaN unknown; their mean is predicted.
        n_classes: number of class logits.

    The mask is pet everywhere.
    """

    def __init__(self, labels, bboxes, n_classes):
        super().__init__()
        counts = labels[labels >= 0].bincount(minlength=n_classes)
        self.register_buffer('label', counts.clamp(min=1e-3).log())
        self.register_buffer('bbox', bboxes.nanmean(dim=0).nan_to_num(0.5))

    def forward(self, x):
        mask = x.new_ones(len(x), 1, *x.shape[-2:])
        return Outputs(self.label.expand(len(x), -1), mask, self.bbox.expand(len(x), 4))


def run_test(model, splits, device, **options):
    """The metrics of a model from `load_model` on the test split: (means, pooled, its `score`).

    means: {metric of METRICS: {'images', 'mean', 'interval', 'flip_mean', 'flip_interval', 'constant'}};
    pooled: the same of POOLED. 'flip' is of FlipAveraged, 'constant' of ConstantNet, an 'interval' the 95 % interval
    over images. A metric for which no image has the labels is left out.
    """
    train = splits['train']
    split = train.dataset.split
    labels, boxes = (torch.as_tensor(values[train.indices]) for values in (split.labels, split.bboxes))
    boxes = boxes / torch.tensor(split.image_size[::-1] * 2)
    networks = model, FlipAveraged(model), ConstantNet(labels, boxes, len(model.class_names)).to(device)
    scores = [score(each, splits['test'], device, **options)[0] for each in networks]
    means = {name: summary(scores, (name,), mean_value) for name in METRICS}
    pooled = {name: summary(scores, metric.details, metric.function) for name, metric in POOLED.items()}
    means, pooled = ({name: found for name, found in each.items() if found} for each in (means, pooled))
    return means, pooled, scores[0]


def fit_temperature(logits, label):
    """The temperature that, dividing `logits` (K, n_classes), gives `label` (K,) the highest likelihood; 0.1 to 10.

    Guo et al., On calibration of modern neural networks, ICML 2017. By search in steps of 1 %, as where all predictions
    are right the likelihood has no maximum.
    """
    logits, label = torch.as_tensor(logits), torch.as_tensor(label).long()
    candidates = np.geomspace(0.1, 10, 463).tolist()
    return min(candidates, key=lambda temperature: F.cross_entropy(logits / temperature, label).item())


def calibrate(model, dataset, device, **options):
    """Divide the class logits of `model` by their `fit_temperature` on an MTLDataset or a Subset; returns it.

    None, and nothing is changed, for fewer than FEWEST_LABELS samples with a label. `options` of `score`.
    """
    if 'class' not in model.tasks:
        return None
    values, _ = score(model, dataset, device, **options)
    known = ~np.isnan(values['label']) if 'label' in values else np.zeros(0, bool)
    if known.sum() < FEWEST_LABELS:
        return None
    temperature = fit_temperature(values['logits'][known], values['label'][known])
    model.class_head.divide_logits(temperature)
    return temperature


def bootstrap_interval(columns, function=mean_value, draws=2000, seed=0):
    """[low, high]: the percentile bootstrap's 95 % interval (Efron and Tibshirani 1993) of `function(*columns)`.

    `columns` are arrays (N,) of the same samples; `function` takes them as (..., N) and returns (...).
    """
    generator, count, found = np.random.default_rng(seed), len(columns[0]), []
    for _ in range(20):  # in parts, to take little memory
        rows = generator.integers(count, size=(draws // 20, count))
        found.append(function(*(column[rows] for column in columns)))
    return np.quantile(found, (0.025, 0.975)).tolist()


def summary(scores, names, function):
    """The entry of one metric in `run_test`, `function` of the columns `names`; None if no image has them.

    `scores` are of its three networks.
    """
    if not all(name in scores[0] for name in names):
        return None
    known = ~np.isnan([scores[0][name] for name in names]).any(axis=0)
    plain, flip, constant = ([each[name][known] for name in names] for each in scores)
    if not known.any():
        return None
    return {
        'images': int(known.sum()),
        'mean': float(function(*plain)),
        'interval': bootstrap_interval(plain, function),
        'flip_mean': float(function(*flip)),
        'flip_interval': bootstrap_interval(flip, function),
        'constant': float(function(*constant)),
    }


def most_confused(scores, class_names, count=8):
    """The pairs of classes most often confused, [{'class', 'predicted', 'images'}], of `score`'s first value."""
    if 'label' not in scores:
        return []
    known = ~np.isnan(scores['label'])
    pairs = zip(*(scores[name][known].astype(int).tolist() for name in ('label', 'predicted')))
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1])
    return [
        {'class': class_names[label], 'predicted': class_names[predicted], 'images': images}
        for (label, predicted), images in wrong.most_common(count)
    ]

"""How good a network is: its metrics on a split, averaged over flips, and those of a constant prediction.

from evaluation import evaluate
evaluate(load_model(), MTLDataset('test'), torch.device('cpu'))  # {'dice': 0.9, ...}
"""

import math

import numpy as np
import torch
from torch import nn

from dataloader_mtl import Sample, evaluation_loader, iter_loader
from models import FlipAveraged, Outputs
from support.distributed import all_gather
from utils import METRICS, TASKS, MeanLosses, bootstrap_interval, task_losses


def to_device(batch, device):
    batch = Sample(*(tensor.to(device, non_blocking=True) for tensor in batch))
    return batch._replace(image=batch.image.contiguous(memory_format=torch.channels_last))


@torch.inference_mode()
def score(model, dataset, device, batch_size=32, workers=0, bfloat16=False, before_batch=lambda: None):
    """Every metric of `model` for each sample of an MTLDataset or a Subset of one.

    Returns a pair over all ranks: {metric of METRICS: (N,) float64 array, NaN for samples without the label and tasks
    that the network does not have}, and {'loss_<task>': mean}. Evaluation mode; the model's mode is restored.
    """
    was_training = model.training
    model.eval()
    values, losses, seen = {name: np.full(len(dataset), np.nan) for name in METRICS}, MeanLosses(), 0
    loader = evaluation_loader(dataset, batch_size, workers)
    for positions, batch in zip(loader.sampler, iter_loader(loader)):
        before_batch()
        known = {name: task.known(getattr(batch, task.field)).numpy() for name, task in TASKS.items()}
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            outputs = model(batch.image)
        for name, metric in METRICS.items():
            field = TASKS[metric.task].field
            prediction = getattr(outputs, field)
            if prediction is not None:
                rows = np.array(positions)[known[metric.task]]
                values[name][rows] = metric.function(prediction, getattr(batch, field), reduction='none').cpu()
        losses.add(task_losses(outputs, batch))
        seen += len(positions)
    model.train(was_training)
    assert sum(all_gather(seen)) == len(dataset), 'the loader must give each sample once'
    values = {name: np.fmax.reduce(all_gather(own)) for name, own in values.items()}  # fmax takes numbers over NaN
    return values, losses.result()


def evaluate(model, dataset, device, **options):
    """The means of `score`, which takes the same arguments: {metric or 'loss_<task>': float}.

    Without tasks that the network does not have or of which no label is known.
    """
    values, losses = score(model, dataset, device, **options)
    known = {name: each[~np.isnan(each)] for name, each in values.items()}
    # fsum is exact, so the order of the samples and the number of ranks change nothing.
    return {name: math.fsum(each) / len(each) for name, each in known.items() if len(each)} | losses


class ConstantNet(nn.Module):
    """The same prediction for every image, from the training labels: a floor to compare metrics with.

    Args:
        labels: (N,) int64, -1 unknown; the commonest class is predicted.
        bboxes: (N, 4) float32 in [0, 1], NaN unknown; their mean is predicted.
        n_classes: number of class logits.

    The mask is pet everywhere.
    """

    def __init__(self, labels, bboxes, n_classes):
        super().__init__()
        self.register_buffer('label', labels[labels >= 0].bincount(minlength=n_classes).float())
        self.register_buffer('bbox', bboxes.nanmean(dim=0).nan_to_num(0.5))

    def forward(self, x):
        mask = x.new_ones(len(x), 1, *x.shape[-2:])
        return Outputs(self.label.expand(len(x), -1), mask, self.bbox.expand(len(x), 4))


def run_test(model, splits, device, **options):
    """({metric: {'images', 'mean', 'interval', 'flip_mean', 'flip_interval', 'constant'}}, `score`) on the test split.

    'flip' is of FlipAveraged, 'constant' the mean of ConstantNet, an 'interval' the 95 % interval over images; the
    second are the metrics of `model` for each sample.
    """
    train = splits['train']
    split = train.dataset.split
    labels, boxes = (torch.as_tensor(values[train.indices]) for values in (split.labels, split.bboxes))
    boxes = boxes / torch.tensor(split.image_size[::-1] * 2)
    networks = model, FlipAveraged(model), ConstantNet(labels, boxes, len(model.class_names)).to(device)
    scores = [score(each, splits['test'], device, **options)[0] for each in networks]
    summary = {}
    for name in METRICS:
        plain, flip, constant = (each[name][~np.isnan(scores[0][name])] for each in scores)
        if len(plain):
            summary[name] = {
                'images': len(plain),
                'mean': math.fsum(plain) / len(plain),
                'interval': bootstrap_interval(plain),
                'flip_mean': math.fsum(flip) / len(plain),
                'flip_interval': bootstrap_interval(flip),
                'constant': math.fsum(constant) / len(plain),
            }
    return summary, scores[0]

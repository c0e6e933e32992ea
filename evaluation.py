"""How good a network is: its metrics on a split, averaged over flips, and those of a constant prediction.

from evaluation import evaluate
evaluate(load_model('mtl_model.pt'), MTLDataset('test'), torch.device('cpu'))  # {'dice': 0.9, ...}
"""

import math

import torch
from torch import nn

from dataloader_mtl import Sample, evaluation_loader, iter_loader
from models import FlipAveraged, Outputs
from support.distributed import all_gather
from utils import METRICS, TASKS, MeanLosses, bootstrap_interval, mask_known, task_losses


def forward(model, batch):
    """The Outputs for a batch, and the batch, both with masks only for the images that have one."""
    has_mask = mask_known(batch.mask)
    return model(batch.image, decode=has_mask), batch._replace(mask=batch.mask[has_mask])


def to_device(batch, device):
    batch = Sample(*(tensor.to(device, non_blocking=True) for tensor in batch))
    return batch._replace(image=batch.image.contiguous(memory_format=torch.channels_last))


@torch.inference_mode()
def score(model, dataset, device, batch_size=32, workers=0, bfloat16=False, before_batch=lambda: None):
    """Every metric of `model` for each sample of an MTLDataset or a Subset of one that has the label.

    Returns a pair over all ranks: {metric of METRICS: list of float, rank by rank, empty for a task that the network
    does not have}, and {'loss_<task>': mean}. Evaluation mode; the model's mode is restored.
    """
    was_training = model.training
    model.eval()
    values, losses, seen = {name: [] for name in METRICS}, MeanLosses(), 0
    for batch in iter_loader(evaluation_loader(dataset, batch_size, workers)):
        before_batch()
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            outputs, batch = forward(model, to_device(batch, device))
        for name, metric in METRICS.items():
            field = TASKS[metric.task].field
            prediction = getattr(outputs, field)
            if prediction is not None:
                values[name] += metric.function(prediction, getattr(batch, field), reduction='none').tolist()
        losses.add(task_losses(outputs, batch))
        seen += len(batch.image)
    model.train(was_training)
    assert sum(all_gather(seen)) == len(dataset), 'the loader must give each sample once'
    values = {name: [value for rank in all_gather(own) for value in rank] for name, own in values.items()}
    return values, losses.result()


def evaluate(model, dataset, device, **options):
    """The means of `score`, which takes the same arguments: {metric or 'loss_<task>': float}.

    Without tasks that the network does not have or that no sample has a label for.
    """
    values, losses = score(model, dataset, device, **options)
    # fsum is exact, so the order of the samples and the number of ranks change nothing.
    return {name: math.fsum(each) / len(each) for name, each in values.items() if each} | losses


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

    def forward(self, x, decode=None):
        count = len(x) if decode is None else int(decode.sum())
        return Outputs(self.label.expand(len(x), -1), x.new_ones(count, 1, *x.shape[-2:]), self.bbox.expand(len(x), 4))


def run_test(model, splits, device, **options):
    """{metric: {'images', 'mean', 'interval', 'flip_mean', 'flip_interval', 'constant'}} on the test split.

    'flip' is of FlipAveraged, 'constant' the mean of ConstantNet, an 'interval' the 95 % interval over images.
    """
    train = splits['train']
    labels, boxes = (torch.as_tensor(each[train.indices]) for each in (train.dataset.labels, train.dataset.bboxes))
    boxes = boxes / torch.tensor(train.dataset.image_size[::-1] * 2)
    networks = model, FlipAveraged(model), ConstantNet(labels, boxes, len(model.class_names)).to(device)
    plain, flip, constant = (score(each, splits['test'], device, **options)[0] for each in networks)
    return {
        name: {
            'images': len(values),
            'mean': math.fsum(values) / len(values),
            'interval': bootstrap_interval(values),
            'flip_mean': math.fsum(flip[name]) / len(values),
            'flip_interval': bootstrap_interval(flip[name]),
            'constant': math.fsum(constant[name]) / len(values),
        }
        for name, values in plain.items()
        if values
    }

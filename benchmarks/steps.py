"""One step of training, as the lines of train_step.py and loader.py take it, its time and its FLOPs."""

import time
from collections.abc import Callable
from typing import NamedTuple

import common  # noqa: F401  the scripts on the path
import torch
from reference import ReferenceNet, StudyRun
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import engine
from dataloader_mtl import RandomCropFlip
from models import MTLNet
from support.device import has_fast_bfloat16, seed_everything
from utils import WeightedLoss

CPU = torch.device('cpu')
FAST = has_fast_bfloat16(CPU)


class Line(NamedTuple):
    """A line of the table: what one step trains, and how."""

    network: Callable  # n_classes, encoder, encoder_weights -> network, or n_classes -> network
    encoder: tuple = ()  # of ours: name and weights
    study: bool = False  # the study's loss and optimiser, not ours
    keep_memory: bool = True
    channels_last: bool = True
    bfloat16: bool = FAST


REFERENCE = Line(ReferenceNet, study=True, keep_memory=False, channels_last=False, bfloat16=False)
OURS = Line(MTLNet)


def make_run(line, dataset):
    """An engine.Run as `line` says."""
    seed_everything(0)
    if line.encoder:
        model = engine.make_model(line.network, dataset, *line.encoder)
    else:
        model = line.network(n_classes=len(dataset.class_names))
    if line.study:
        run = StudyRun(model, dataset, CPU)
    else:
        weighting = WeightedLoss.equal(model.tasks)
        run = engine.Run(model, weighting, dataset, 10**6, 3e-3, 1e-3, not line.encoder, CPU)
    run.objective.bfloat16 = line.bfloat16
    run.model.to(memory_format=memory_format(line)).train()
    return run


def memory_format(line):
    return torch.channels_last if line.channels_last else torch.contiguous_format


def make_batch(line, part, size, batch_size, share):
    """A batch of images with a mask at `size`, of which a `share` keeps it."""
    seed_everything(0)
    part.dataset.transform = RandomCropFlip(*size)
    batch = part[[number % len(part) for number in range(batch_size)]]
    batch.mask[round(share * batch_size) :] = torch.nan
    return batch._replace(image=batch.image.contiguous(memory_format=memory_format(line)))


def take_step(run, batch):
    """What engine.train_one_epoch does with a batch."""
    total, _ = run.objective(batch)
    run.update(total)


def seconds_per_step(run, batch, seconds):
    """Of steps that take `seconds` or longer together."""
    start, steps, spent = time.perf_counter(), 0, 0
    while spent < seconds:
        take_step(run, batch)
        steps, spent = steps + 1, time.perf_counter() - start
    return spent / steps


def backward_flops(gradient, x, weight, bias, stride, padding, dilation, transposed, *rest, **_):
    """Of a convolution's backward pass; torch's own count is many times too high for depthwise ones."""
    *_, groups, needed = rest
    return sum(needed[:2]) * conv_flop_count(x, weight, gradient, transposed)


def convolution_flops(run, batch):
    """FLOPs of a step's convolutions; a multiplication and an addition are two."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: backward_flops})
    with counter:
        take_step(run, batch)
    counts = counter.get_flop_counts()['Global']
    return sum(count for operation, count in counts.items() if 'convolution' in str(operation))


def matmul_flops(dtype):
    """FLOPs a second of a matrix product."""
    side = 2048
    one, two = torch.randn(2, side, side).to(dtype)
    start = time.perf_counter()
    one @ two
    return 2 * side**3 / (time.perf_counter() - start)

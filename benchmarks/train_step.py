"""How fast is the training? Images a second of train_mtl.py's recipe against the reference network's.

    python benchmarks/train_step.py --data datasets/data_new

Ours is the training loop itself, loading and augmentation included, at each image size of the default
recipe; the average is over the recipe's epochs. The reference is the study's training in float32 and
NCHW, its batches read by the same loader without augmentation. Both see the same kind of images with the
same number of threads and workers; the reference decodes the mask of each image, as the study did, ours of
those that have one.

Also printed: the reference's speed with our setting of the C library's allocator, which is one of the
things that make ours fast and helps any network; the share of our time that loading costs, found with
batches that are already in memory; and the share in which the loop waits for the loader. The ratio:
ours to the reference.
"""

import math
import time
from collections import Counter

import common
import torch
from reference import BATCH_SIZE, ReferenceNet, train_reference
from torch.utils.data import DataLoader

import engine
from dataloader_mtl import (
    JITTER,
    EpochBatches,
    epoch_positions,
    load_splits,
    split_batches,
    training_size,
    training_transform,
)
from models import MTLNet
from support.cli import run_script, whole_number
from support.device import keep_freed_memory
from utils import WeightedLoss


def reference_speed(dataset, steps, workers):
    torch.manual_seed(0)
    batches = torch.randperm(len(dataset))[: BATCH_SIZE * (steps + 1)].split(BATCH_SIZE)
    loader = DataLoader(dataset, batch_size=None, sampler=[batch.tolist() for batch in batches], num_workers=workers)
    training = train_reference(ReferenceNet(len(dataset.class_names)), loader)
    next(training)  # the first step allocates and plans
    start = time.perf_counter()
    images = sum(training)
    return images / (time.perf_counter() - start)


class Waiting:
    """A loader that measures how long its user waits for it."""

    def __init__(self, loader):
        self.loader, self.dataset, self.seconds = loader, loader.dataset, 0

    def __iter__(self):
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


class InMemory:
    """A loader of one batch that is in memory, again and again."""

    def __init__(self, batch, steps):
        self.batch = batch
        self.dataset = EpochBatches(None, [range(len(batch.image))] * steps, 0, 1)

    def __iter__(self):
        return (self.batch for _ in self.dataset.batches)


def train(run, loader):
    """An epoch of the batches of `loader`."""
    run.start_epoch()
    engine.train_one_epoch(run, loader, '')


def our_speed(run, part, size, steps, options):
    """(images/s, images/s without loading, share of the time spent waiting for the loader)."""
    part.dataset.transform = training_transform(*size)
    steps *= (part.dataset.image_size[0] // size[0]) ** 2

    def loader(steps):
        positions = epoch_positions(part)
        epochs = math.ceil(steps * options.batch_size / len(positions))
        indices = torch.cat([positions[torch.randperm(len(positions))] for _ in range(epochs)])
        batches = split_batches(indices[: steps * options.batch_size], options.batch_size)
        return EpochBatches(part, batches, 0, 1).loader(0, options.workers, run.device)

    train(run, InMemory(next(iter(loader(2))), 3))
    waiting = Waiting(loader(steps))
    start = time.perf_counter()
    train(run, waiting)
    seconds = time.perf_counter() - start
    # The same mixture of labels, which a single batch would not have.
    batches = list(loader(min(steps, 20)))
    start, images = time.perf_counter(), 0
    for batch in batches:
        train(run, InMemory(batch, 1))
        images += len(batch.image)
    without = images / (time.perf_counter() - start)
    return steps * options.batch_size / seconds, without, waiting.seconds / seconds


def main(argv=None):
    parser = common.parser(__doc__)
    common.data_option(parser, 600)
    parser.add_argument(
        '--steps',
        type=whole_number(2),
        default=30,
        help='ours, at the full size, and more at smaller ones (default: %(default)s)',
    )
    parser.add_argument('--threads', type=whole_number(1), default=torch.get_num_threads(), help='default: %(default)s')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with common.prepared(args.data, 600) as data:
        options = engine.training_parser('', out='').parse_args([])
        part = load_splits(data, MTLNet.tasks)['train']
        dataset = part.dataset
        reference = reference_speed(dataset, 4, options.workers)
        keep_freed_memory()
        helped = reference_speed(dataset, 4, options.workers)
        print(f'reference, float32, NCHW: {reference:.2f} images/s; {helped:.2f} with freed memory kept')

        dataset.jitter = JITTER
        weighting = WeightedLoss.equal(MTLNet.tasks)
        run = engine.Run(MTLNet, weighting, dataset, 10_000, options.lr, torch.device('cpu'))
        epochs_of = Counter(
            training_size(epoch, options.epochs, dataset.image_size) for epoch in range(1, options.epochs + 1)
        )
        sizes, seconds, without = {}, 0, 0
        for size, epochs in epochs_of.items():
            speed, in_memory, waiting = our_speed(run, part, size, args.steps, options)
            sizes['x'.join(map(str, size))] = {
                'images_per_second': speed,
                'in_memory': in_memory,
                'waiting': waiting,
                'epochs': epochs,
            }
            seconds += epochs / speed
            without += epochs / in_memory
            print(
                f'ours at {size[1]} x {size[0]}, {epochs} epochs: {speed:.1f} images/s, {in_memory:.1f} '
                f'without loading; waiting for the loader {waiting:.1%}'
            )
    ours, loading = options.epochs / seconds, 1 - without / seconds
    print(f'ours over the recipe: {ours:.1f} images/s; loading costs {loading:.1%}')
    metrics = {'reference': reference, 'reference_with_memory_kept': helped, 'ours': ours, 'sizes': sizes}
    common.finish(ours / reference, metrics | {'loading': loading}, args.json)


if __name__ == '__main__':
    run_script(main)

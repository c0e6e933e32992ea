"""What makes the training fast? A waterfall in images a second, from the original's network to train_mtl.py's recipe.

    python benchmarks/train_step.py --data datasets/data_new

Every line is one step of training on a batch in memory (loader.py measures loading): forward, backward and optimiser.
All take the same --batch-size images with a mask, at the stored size; only the last line of the waterfall has the image
sizes of the recipe, averaged over its epochs. Beside it: other networks, among them smp's Unet, which has only the
mask, in the same precision and layout (pip install -r benchmarks/requirements.txt).

The lines take turns in every round, each for --seconds or one step; printed are the median over the rounds and the
lowest and highest. The setting of the C library's allocator cannot be undone in a process, so the lines before it
run in a process of their own. Expect four minutes on two cores.

The ratio: our network, at the stored size, to the original as it is.
"""

import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import common
import torch
from reference import OriginalRun, ReferenceNet, SmpUNet, SmpUNet34, import_smp

import train_mtl
from dataloader_mtl import MTLDataset, RandomCropFlip, training_size
from engine import PRETRAINED, Config, Run
from evaluation import to_device
from models import MTLNet, UNet
from support.cli import positive_number, run_script, whole_number
from support.device import has_fast_bfloat16, keep_freed_memory, seed_everything
from utils import WeightedLoss

FAST = has_fast_bfloat16(torch.device('cpu'))
IMAGENET = {**PRETRAINED, 'encoder': 'tf_efficientnet_lite0', 'encoder_weights': 'imagenet'}


class Line(NamedTuple):
    """A line of the table: what one step trains, and how."""

    network: type
    run: type = Run
    config: dict = {}  # what differs from Config
    keep_memory: bool = True
    memory_format: torch.memory_format = torch.channels_last


ORIGINAL = Line(ReferenceNet, OriginalRun, {'bfloat16': False})
WATERFALL = {
    'original: NCHW, float32': ORIGINAL._replace(keep_memory=False, memory_format=torch.contiguous_format),
    '+ channels_last': ORIGINAL._replace(keep_memory=False),
    '+ freed memory kept': ORIGINAL,
    '+ bfloat16' if FAST else '(no bfloat16 on this CPU)': Line(ReferenceNet, OriginalRun),
    '+ our network and loss': Line(MTLNet),
}
RECIPE = '+ image sizes of the recipe'
OTHERS = {
    'ours, ImageNet encoder': Line(MTLNet, config=IMAGENET),
    'ours, only the mask': Line(UNet),
    'ours, only the mask, ImageNet encoder': Line(UNet, config=IMAGENET),
    'smp resnet18, only the mask': Line(SmpUNet),
    'smp resnet34, only the mask': Line(SmpUNet34),
}
LINES = {**WATERFALL, RECIPE: Line(MTLNet), **OTHERS}


# ---- a step


def make_run(line, config):
    """The run of a line, as `config` says where the line does not."""
    seed_everything(config.seed)
    loss = WeightedLoss(train_mtl.WEIGHTS) if line.network is MTLNet else WeightedLoss.equal(line.network.tasks)
    run = line.run(line.network, loss, replace(config, **line.config))
    run.model.to(memory_format=line.memory_format)
    return run


def make_step(line, size, config):
    """A function that takes one step of training, on a batch of images with a mask at `size` (height, width).

    It returns the loss.
    """
    run = make_run(line, config)
    run.model.train()
    dataset = run.splits['train'].dataset
    dataset.transform = RandomCropFlip(*size)
    rows = dataset.with_labels(['mask'])
    batch = to_device(dataset[[rows[number % len(rows)] for number in range(config.batch_size)]], run.device)
    batch = batch._replace(image=batch.image.contiguous(memory_format=line.memory_format))

    def take_step():
        total, _ = run.objective(batch)
        run.update(total)
        return total.item()  # waits for a GPU

    return take_step


def seconds_per_step(take_step, seconds):
    """Of steps that take `seconds` or longer together."""
    start, steps, spent = time.perf_counter(), 0, 0
    while spent < seconds:
        take_step()
        steps, spent = steps + 1, time.perf_counter() - start
    return spent / steps


# ---- in a process of its own

STEPS = {}  # of this process: {(line, size): function}


def start_process(keep_memory, threads):
    torch.set_num_threads(threads)
    if keep_memory:
        keep_freed_memory()


def prepare(case, config):
    name, size = case
    STEPS[case] = make_step(LINES[name], size, config)
    STEPS[case]()  # the first step plans


def measure(case, seconds):
    return seconds_per_step(STEPS[case], seconds)


# ---- the table


def make_rows(sizes, seconds, batch_size):
    """The rows of the table, and {line: images a second in each round}.

    `sizes`: {line: {size: weight}}; `seconds`: {(line, size): seconds of a step in each round}.
    """
    rows, speeds, before = [], {}, None
    first = next(iter(sizes))
    for name, weights in sizes.items():
        rounds = zip(*([weight * value for value in seconds[name, size]] for size, weight in weights.items()))
        speeds[name] = [batch_size * sum(weights.values()) / sum(each) for each in rounds]
        ratios = [common.median_ratio(speeds[name], speeds[other]) if other else None for other in (before, first)]
        if name in OTHERS:
            ratios[0] = None
        rows.append([name, common.with_range(speeds[name], 1), *(f'{each:.2f}' if each else '' for each in ratios)])
        before = name
    return rows, speeds


def main(argv=None):
    parser = common.make_parser(__doc__, rounds=5, pets=300)
    common.add_threads(parser)
    add = parser.add_argument
    add('--seconds', type=positive_number, default=1.0, help='of a line in a round (default: %(default)s)')
    add('--batch-size', type=whole_number(1), default=16, help='images of a step (default: %(default)s)')
    args = parser.parse_args(argv)
    import_smp()
    torch.set_num_threads(args.threads)
    common.print_heading(parser, argv)
    with common.prepared(args.data, 300) as data:
        stored, epochs = MTLDataset(root=data).split.image_size, Config.epochs
        sizes = {name: {stored: 1} for name in LINES}
        sizes[RECIPE] = Counter(training_size(epoch, epochs, stored, Config.sizes) for epoch in range(1, epochs + 1))
        cases = [(name, size) for name in LINES for size in sizes[name]]
        start = partial(ProcessPoolExecutor, 1, get_context('spawn'), start_process)
        with start((False, args.threads)) as plain, start((True, args.threads)) as keeping:
            pools = {case: keeping if LINES[case[0]].keep_memory else plain for case in cases}
            for case in cases:
                pools[case].submit(prepare, case, Config(data, device='cpu', batch_size=args.batch_size)).result()
            measures = {
                case: lambda case=case: pools[case].submit(measure, case, args.seconds).result() for case in cases
            }
            seconds = common.in_turns(measures, args.rounds)
    rows, speeds = make_rows(sizes, seconds, args.batch_size)
    common.print_table(['', 'images/s (range)', 'to the one before', 'to the original'], rows)
    first, *_, ours = WATERFALL
    print(f'ratio {common.median_ratio(speeds[ours], speeds[first]):.3g}')


if __name__ == '__main__':
    run_script(main)

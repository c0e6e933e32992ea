"""How long until the masks are good? Minutes of training to a validation Dice of 0.80, 0.85 and 0.90.

    python benchmarks/time_to_dice.py --data datasets/data_new --minutes 30
    python benchmarks/time_to_dice.py --data datasets/data_new --minutes 30 --only masks smp

Trains the reference network as the study did and with our training (MaskLoss, augmentation, the recipe's image
sizes, optimiser and its schedule, moving average), smp's Unet with our training, and ours, masks alone and with all
tasks, from scratch and with an ImageNet encoder. All see the same images: those with a mask, and with all tasks
the others as well; and have the same layout, precision where the CPU has bfloat16, threads and loader's processes.

A run is one full cycle of the learning rate that ends at about --minutes: a fiftieth of that time at each of its
image sizes, on weights that are thrown away, say how many steps fit. Dice is measured --points times, every
--minutes / --points of training and at the end, on all validation images with a mask, of the weights' moving
average (for the study's training, of the weights). The clock stops meanwhile; it starts after the steps that
measure the speed. The test split is not used.

A finished run is added to curves.csv in --out, the table and time_to_dice.png are made from what is there, and
the same command again makes the runs that are missing; one --out for one machine, data and commit.

The ratio: minutes of the reference network with our training, the best of --rates, to those of ours, both masks
alone, to the highest of the three marks that both reach; none if there is no such mark.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common
import torch
from curves import COLUMNS, MARKS, add_run, draw, make_rows, median_times, read_runs
from reference import BATCH_SIZE, LEARNING_RATE, ReferenceNet, SmpUNet, StudyRun, import_smp

import engine
from dataloader_mtl import (
    JITTER,
    EpochBatches,
    RandomCropFlip,
    epoch_positions,
    load_splits,
    split_batches,
    training_size,
)
from evaluation import ConstantNet
from models import MTLNet, UNet
from support.cli import positive_number, run_script, whole_number
from support.device import keep_freed_memory, seed_everything
from utils import WeightedLoss

CPU = torch.device('cpu')
OPTIONS = engine.training_parser('', out='').parse_args([])
IMAGENET = ('tf_efficientnet_lite0', 'imagenet')


class Contender(NamedTuple):
    label: str
    network: Callable  # n_classes -> network
    tasks: tuple = ('mask',)  # an image that has the label of one of them is trained on
    study: bool = False  # the study's training, not ours
    ours: bool = False
    encoder: tuple = ()  # of ours: name and weights

    @property
    def batch_size(self):
        return BATCH_SIZE if self.study else OPTIONS.batch_size

    @property
    def recipe(self):
        return engine.PRETRAINED if self.encoder else engine.SCRATCH


CONTENDERS = {
    'study': Contender("reference network, the study's training", ReferenceNet, study=True),
    'reference': Contender('reference network, our training', partial(ReferenceNet, tasks=('mask',))),
    'smp': Contender("smp Unet('resnet18'), our training", SmpUNet),
    'masks': Contender('ours, masks alone', UNet, ours=True),
    'tasks': Contender('ours, all tasks', MTLNet, MTLNet.tasks, ours=True),
    'masks-imagenet': Contender('ours, masks alone, ImageNet encoder', UNet, ours=True, encoder=IMAGENET),
    'tasks-imagenet': Contender('ours, all tasks, ImageNet encoder', MTLNet, MTLNet.tasks, ours=True, encoder=IMAGENET),
}


# ---- one run


def make_run(contender, rate, dataset, steps):
    if contender.ours:
        model = engine.make_model(contender.network, dataset, *contender.encoder)
    else:
        model = contender.network(n_classes=len(dataset.class_names))
    if contender.study:
        return StudyRun(model, dataset, CPU)
    recipe, weighting = contender.recipe, WeightedLoss.equal(model.tasks)
    return engine.Run(model, weighting, dataset, steps, rate, rate * recipe.encoder_lr, recipe.muon, CPU)


def size_steps(contender, steps, image_size):
    """{image size: how many of the steps}, in order."""
    if contender.study:
        return {image_size: steps}
    return Counter(training_size(step, steps, image_size, contender.recipe.sizes) for step in range(1, steps + 1))


def train_steps(run, contender, part, size, steps, args, seed, before_step=lambda batches: None):
    """Train on `steps` batches at one image size; `before_step` is called with them, an EpochBatches."""
    if not contender.study:
        part.dataset.transform = RandomCropFlip(*size, contender.recipe.crop)
        part.dataset.jitter, part.dataset.cutmix = JITTER, contender.recipe.cutmix
    positions, count = epoch_positions(part, contender.recipe.mask_repeats), steps * contender.batch_size
    epochs = [positions[torch.randperm(len(positions))] for _ in range(math.ceil(count / len(positions)))]
    batches = EpochBatches(part, split_batches(torch.cat(epochs)[:count], contender.batch_size), seed, size[0])
    loader = batches.loader(0, args.workers, CPU)
    run.start_epoch()
    engine.train_one_epoch(run, loader, f'{size[1]} x {size[0]}', lambda: before_step(batches))


def steps_that_fit(contender, rate, part, args):
    """The steps of a run of --minutes, from the speed at each of its sizes for a fiftieth of that time each."""
    run, total = make_run(contender, rate, part.dataset, 10**6), 0
    for size, share in size_steps(contender, 1000, part.dataset.image_size).items():
        train_steps(run, contender, part, size, 1, args, 0)  # the first step plans
        steps, spent = 1, 0
        while spent < args.minutes * 60 / 50:
            steps, start = 2 * steps, time.perf_counter()
            train_steps(run, contender, part, size, steps, args, 0)
            spent = time.perf_counter() - start
        total += share / 1000 * spent / steps
    return max(1, round(args.minutes * 60 / total))


def train_curve(contender, rate, seed, data, args):
    """[(minutes of training, images trained on, validation Dice)]."""
    part, validation = load_splits(data, contender.tasks)['train'], load_splits(data, ['mask'])['val']
    seed_everything(seed)
    steps = steps_that_fit(contender, rate, part, args)
    print(
        f'{contender.label}, learning rate {rate:g}, seed {seed}: {steps} steps of {contender.batch_size}', flush=True
    )
    seed_everything(seed)
    run = make_run(contender, rate, part.dataset, steps)
    points, images, started, paused = [], 0, time.perf_counter(), 0

    def minutes():
        return (time.perf_counter() - started - paused) / 60

    def validate(seen):
        nonlocal paused
        now, start = minutes(), time.perf_counter()
        options = {'workers': args.workers, 'bfloat16': run.bfloat16}
        points.append((now, seen, engine.evaluate(run.average.module, validation, CPU, **options)['dice']))
        paused += time.perf_counter() - start

    def before_step(batches):
        if minutes() >= (len(points) + 1) * args.minutes / args.points:
            validate(images + batches.count(run.steps))

    for size, count in size_steps(contender, steps, part.dataset.image_size).items():
        train_steps(run, contender, part, size, count, args, seed, before_step)
        images += count * contender.batch_size
    validate(images)
    return points


def constant_dice(data):
    """Dice of a mask of all ones on the validation images."""
    dataset = (validation := load_splits(data, ['mask'])['val']).dataset
    model = ConstantNet(torch.from_numpy(dataset.labels), torch.from_numpy(dataset.bboxes), len(dataset.class_names))
    return engine.evaluate(model, validation, CPU)['dice']


# ---- all runs


def planned(args):
    """(contender, rate, seed) of each run; the first seed of all comes first."""
    for number in range(max(args.seeds, args.seeds_of_others)):
        for name in args.only:
            contender = CONTENDERS[name]
            if number < (args.seeds if contender.ours else args.seeds_of_others):
                rates = [LEARNING_RATE] if contender.study else args.rates if name == 'reference' else [OPTIONS.lr]
                yield from ((name, rate, args.seed + number) for rate in rates)


def main(argv=None):
    parser = common.parser(__doc__)
    common.data_option(parser, 600)
    threads, out = torch.get_num_threads(), Path('runs/time_to_dice')
    add = parser.add_argument
    add('--minutes', type=positive_number, default=30, metavar='N', help='of every run (default: %(default)s)')
    add('--points', type=whole_number(1), default=40, help='validations of a run (default: %(default)s)')
    add('--seeds', type=whole_number(1), default=3, help='runs of each of ours (default: %(default)s)')
    add('--seeds-of-others', type=whole_number(1), default=1, help='default: %(default)s')
    add('--seed', type=whole_number(0), default=0, help='the first (default: %(default)s)')
    rates = 'learning rates of the reference network with our training (default: 0.001 0.003 0.01)'
    add('--rates', type=positive_number, nargs='+', default=[1e-3, 3e-3, 1e-2], metavar='LR', help=rates)
    add('--only', choices=CONTENDERS, nargs='+', default=list(CONTENDERS), help='train these now')
    add('--threads', type=whole_number(1), default=threads, help='default: %(default)s')
    add('--workers', type=whole_number(0), default=OPTIONS.workers, help='as in train_mtl.py (default: %(default)s)')
    add('--out', type=Path, default=out, metavar='DIR', help='default: %(default)s')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    common.print_heading(parser, argv)
    path = args.out / 'curves.csv'
    missing = [key for key in planned(args) if key not in read_runs(path, args.minutes)]
    if any(name == 'smp' for name, *_ in missing):
        import_smp()
    with common.prepared(args.data, 600) as data:
        constant = constant_dice(data)
        for name, rate, seed in missing:
            points = train_curve(CONTENDERS[name], rate, seed, data, args)
            add_run(path, (name, rate, seed), args.minutes, points)
    runs = read_runs(path, args.minutes)
    labels = {name: contender.label for name, contender in CONTENDERS.items()}
    draw(runs, labels, constant, args.out / 'time_to_dice.png')
    marks = [f'{mark:.2f}' for mark in MARKS]
    common.print_table(['', 'rate', 'seed', *marks, 'best', 'at the end', 'minutes', 'images'], make_rows(runs, labels))
    print(f'minutes of training to a validation Dice of {", ".join(marks)}; not reached: in {args.minutes:g} minutes')
    print(f'a mask of all ones: {constant:.4f}')
    theirs, ours = (median_times(runs, name) for name in ('reference', 'masks'))
    ratios = [a / b for a, b in zip(theirs, ours) if max(a, b) < math.inf]
    curves = [dict(zip(COLUMNS, key)) | {'points': points} for key, points in runs.items()]
    common.finish(ratios[-1] if ratios else None, {'curves': curves, 'constant': constant}, args.json)


if __name__ == '__main__':
    run_script(main)

"""How long until the masks are good? Validation Dice against minutes of training, the reference and ours.

    python benchmarks/time_to_dice.py --data datasets/data_new

Trains the reference network as the study did on the images that have a mask, for --minutes, and then
train_mtl.py's recipe once for each number of --epochs, with the same number of threads. The clock runs
while training; evaluation is not counted for either. Writes to --out a CSV of each curve, time_to_dice.png
with all of them, and each of our runs in a folder of its own. A curve that is already there is not made
again and a training of ours is resumed, so a comparison on the same --data continues where it stopped, and
--only makes one part at a time. The test split is not used, but for the usual test at the end of our runs.

The reference's last layer has one channel, and where its bias starts below zero it predicts no pet at
all for half an hour; --seed 5 is a good start for it.

The ratio: minutes that the reference trained, to those in which ours reaches its best validation Dice.
"""

import csv
import io
import math
import time
from pathlib import Path

import common
import torch
from reference import BATCH_SIZE, ReferenceNet, train_reference
from torch.utils.data import DataLoader

import engine
from dataloader_mtl import load_splits
from models import MTLNet
from support.cli import run_script, whole_number
from support.device import keep_freed_memory, seed_everything
from support.files import write_file
from utils import WeightedLoss


def write_curve(points, path):
    """`points`: (minutes of training, images trained on, validation Dice)."""
    text = io.StringIO(newline='')
    csv.writer(text).writerows([('minutes', 'images', 'val_dice'), *points])
    write_file(path, lambda file: file.write(text.getvalue().encode()))


def read_curve(path):
    with open(path, newline='') as file:
        return [tuple(map(float, row)) for row in list(csv.reader(file))[1:]]


def reference_curve(args, data):
    seed_everything(args.seed)
    parts = load_splits(data, ['mask'])
    part = parts['train']
    model, device = ReferenceNet(len(part.dataset.class_names)), torch.device('cpu')

    def batches():
        while True:
            order = [batch.tolist() for batch in torch.randperm(len(part)).split(BATCH_SIZE)]
            yield from DataLoader(part, batch_size=None, sampler=order, num_workers=args.workers)

    points, seconds, images = [], 0, 0
    start = time.perf_counter()
    for count in train_reference(model, batches()):
        images += count
        spent = seconds + time.perf_counter() - start
        if spent >= (len(points) + 1) * args.minutes * 60 / args.points:
            dice = engine.evaluate(model, parts['val'], device)['dice']
            points.append((spent / 60, images, dice))
            print(f'reference: {spent / 60:.1f} min, {images} images, validation Dice {dice:.4f}', flush=True)
            seconds, start = spent, time.perf_counter()
            if spent >= args.minutes * 60:
                return points


def our_curve(args, data, epochs):
    out = args.out / f'epochs_{epochs}'
    options = {
        '--data': data,
        '--epochs': epochs,
        '--seed': args.seed,
        '--device': 'cpu',
        '--workers': args.workers,
        '--out': out,
        '--resume': 'auto',
    }
    arguments = [str(each) for option in options.items() for each in option]
    engine.train(MTLNet, WeightedLoss.equal(MTLNet.tasks), engine.training_parser('', out='').parse_args(arguments))
    points, seconds, images = [], 0, 0
    with open(out / 'log.csv', newline='') as file:
        for row in csv.DictReader(file):
            seconds += float(row['train_seconds'])
            images += round(float(row['train_seconds']) * float(row['images_per_second']))
            points.append((seconds / 60, images, float(row['val_dice'])))
    return points


def draw(curves, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    for name, points in curves.items():
        minutes, _, dice = zip(*points)
        axes.plot(minutes, dice, '.-', label=name.replace('_', ' ').replace('epochs', 'ours, epochs:'))
    axes.set(xlabel='minutes of training', ylabel='validation Dice', xscale='log', ylim=(0, 1))
    ticks = [
        t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f'{t:g}' for t in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    write_file(path, lambda file: figure.savefig(file, format='png', dpi=120))


def first_time(points, dice):
    """Minutes until the curve reaches `dice`, or infinity."""
    return next((minutes for minutes, _, value in points if value >= dice), math.inf)


def main(argv=None):
    parser = common.parser(__doc__)
    common.data_option(parser, 600)
    parser.add_argument('--minutes', type=float, default=60, help='for the reference (default: %(default)s)')
    parser.add_argument(
        '--points', type=whole_number(1), default=20, help="of the reference's curve (default: %(default)s)"
    )
    parser.add_argument(
        '--epochs',
        type=whole_number(1),
        nargs='+',
        default=[30],
        metavar='N',
        help='ours, a run for each (default: 30)',
    )
    parser.add_argument('--threads', type=whole_number(1), default=torch.get_num_threads(), help='default: %(default)s')
    parser.add_argument('--workers', type=whole_number(0), default=1, help='as in train_mtl.py')
    parser.add_argument('--seed', type=whole_number(0), default=0, help='default: %(default)s')
    parser.add_argument('--only', choices=('reference', 'ours'), help='make one part, for another day')
    parser.add_argument(
        '--out', type=Path, default=Path('runs/time_to_dice'), metavar='DIR', help='default: %(default)s'
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {} if args.only == 'ours' else {'reference': lambda data: reference_curve(args, data)}
    if args.only != 'reference':
        parts |= {f'epochs_{n}': lambda data, n=n: our_curve(args, data, n) for n in args.epochs}
    with common.prepared(args.data, 600) as data:
        for name, make in parts.items():
            if not (args.out / f'{name}.csv').exists():
                write_curve(make(data), args.out / f'{name}.csv')

    curves = {path.stem: read_curve(path) for path in sorted(args.out.glob('*.csv'), reverse=True)}
    draw(curves, args.out / 'time_to_dice.png')
    reference = curves.get('reference', [(math.nan, 0, math.nan)])
    best = max(dice for _, _, dice in reference)
    ours = {name: points for name, points in curves.items() if name != 'reference'}
    minutes, images, _ = reference[-1]
    print(f'reference: best validation Dice {best:.4f} in {minutes:.1f} min and {images:.0f} images')
    times = [math.inf]
    for name, points in ours.items():
        times.append(first_time(points, best))
        marks = ', '.join(f'{dice} in {first_time(points, dice):.1f} min' for dice in (0.7, 0.8, 0.9, 0.91, 0.93))
        print(
            f'{name}: that in {times[-1]:.1f} min; {marks}; at the end {points[-1][2]:.4f} '
            f'after {points[-1][0]:.1f} min'
        )
    common.finish(minutes / min(times), {'curves': curves}, args.json)


if __name__ == '__main__':
    run_script(main)

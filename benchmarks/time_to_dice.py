"""How long until the masks are good? Minutes of training to a validation Dice of 0.80, 0.85 and 0.90.

    python benchmarks/time_to_dice.py --data datasets/data_new --minutes 30
    python benchmarks/time_to_dice.py --data datasets/data_new --minutes 30 --only masks smp-resnet18

Trains the original's network with the original's training and with ours (loss, augmentation, image sizes,
optimiser, schedule), smp's Unet with our training, and ours, only masks and all tasks, from scratch and with an
ImageNet encoder. All have the same images, layout and threads, and bfloat16 where the CPU has it.

A run is one full cycle of the learning rate, of as many steps as fit into --minutes, as timed in short runs. Dice is
that of evaluation.py on the validation split, --points times, at equal numbers of steps, and the clock stops meanwhile.
The test split is not used.

A finished run is added to curves.csv in --out, the table and time_to_dice.png are made from what is there, and the
same command again makes the runs that are missing; one --out for one machine, data, --minutes and commit.

The ratio: minutes of the original's network with our training, at the best of --rates, to those of ours, both only
masks, to a Dice of 0.85; none if one of them does not reach it.
"""

import csv
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import common
import torch
from reference import LEARNING_RATE, OriginalRun, ReferenceMaskNet, ReferenceNet, SmpUNet, import_smp
from train_step import IMAGENET, Line, make_run

from dataloader_mtl import load_splits
from engine import Config, train_one_epoch
from evaluation import ConstantNet, evaluate
from models import MTLNet, UNet
from support.cli import positive_number, run_script, whole_number
from support.device import keep_freed_memory
from support.files import write_file
from support.report import new_figure, write_csv

MARKS, RATIO_MARK = (0.80, 0.85, 0.90), 0.85
COLUMNS = ('contender', 'rate', 'seed', 'minutes', 'images', 'dice')
CONTENDERS = {
    'original': Line(ReferenceNet, OriginalRun, {'sizes': ((1, 1),)}),
    'original-our-training': Line(ReferenceMaskNet),
    'smp-resnet18': Line(SmpUNet),
    'masks': Line(UNet),
    'tasks': Line(MTLNet),
    'masks-imagenet': Line(UNet, config=IMAGENET),
    'tasks-imagenet': Line(MTLNet, config=IMAGENET),
}


# ---- one run


def train_epoch(run):
    """Train for an epoch; returns its seconds."""
    start = time.perf_counter()
    run.history.append(train_one_epoch(run))
    seconds = time.perf_counter() - start
    run.start_epoch()
    return seconds


def steps_that_fit(contender, config, seconds):
    """Steps of an epoch with which a run of `config.epochs` takes about `seconds`, as timed in shorter runs."""
    steps, spent = 0, 0
    while spent < seconds / 20:
        steps = max(1, 2 * steps)
        run = make_run(contender, replace(config, steps=steps))
        spent = sum(train_epoch(run) for _ in range(config.epochs))
    return max(1, round(steps * seconds / spent))


def train_curve(contender, config, seconds):
    """[(minutes of training, images trained on, validation Dice)]."""
    config = replace(config, steps=steps_that_fit(contender, config, seconds))
    run, spent, points = make_run(contender, config), 0, []
    for epoch in range(1, config.epochs + 1):
        spent += train_epoch(run)
        metrics = evaluate(run.model, run.splits['val'], run.device, bfloat16=run.bfloat16)
        points.append((spent / 60, epoch * config.steps * config.batch_size, metrics['dice']))
    return points


def constant_dice(data):
    """Dice of a mask of all ones on the validation images."""
    splits = load_splits(data, ['mask'])
    split = splits['train'].dataset.split
    model = ConstantNet(torch.from_numpy(split.labels), torch.from_numpy(split.bboxes), len(split.class_names))
    return evaluate(model, splits['val'], torch.device('cpu'))['dice']


# ---- all runs


def planned(args):
    """[(contender, rate, seed) of each run]; the first seed of all comes first."""
    rates = {name: [line.config.get('lr', Config.lr)] for name, line in CONTENDERS.items()}
    rates |= {'original': [LEARNING_RATE], 'original-our-training': args.rates}
    return [(name, rate, seed) for seed in range(args.seeds) for name in args.only for rate in rates[name]]


def read_curves(path):
    """{(contender, rate, seed): [(minutes, images, Dice)]} of curves.csv, which need not exist."""
    curves = {}
    if path.exists():
        with open(path, newline='') as file:
            for row in csv.DictReader(file):
                key = row['contender'], float(row['rate']), int(row['seed'])
                curves.setdefault(key, []).append((float(row['minutes']), int(row['images']), float(row['dice'])))
    return curves


def write_curves(curves, path):
    write_csv(COLUMNS, [dict(zip(COLUMNS, (*key, *point))) for key in curves for point in curves[key]], path)


def group_seeds(curves):
    """{(contender, rate): the curve of each seed}, in the order of CONTENDERS."""
    groups = {}
    for name in CONTENDERS:
        for key in sorted(key for key in curves if key[0] == name):
            groups.setdefault(key[:2], []).append(curves[key])
    return groups


def minutes_to(mark, runs):
    """Minutes until each curve reaches `mark`, or infinity."""
    return [next((minutes for minutes, _, dice in points if dice >= mark), math.inf) for points in runs]


def make_rows(groups):
    """The rows of the table: medians and ranges over the seeds."""
    rows = []
    for (name, rate), runs in groups.items():
        times = [minutes_to(mark, runs) for mark in MARKS]
        reached = [statistics.median_high(each) < math.inf for each in times]
        cells = [common.with_range(each, 1) if ok else 'not reached' for each, ok in zip(times, reached)]
        best = common.with_range([max(dice for *_, dice in points) for points in runs], 3)
        images = statistics.median(points[-1][1] for points in runs)
        rows.append([name, f'{rate:g}', str(len(runs)), *cells, best, f'{images:.0f}'])
    return rows


def best_minutes(mark, groups, name):
    """Of a contender at its best learning rate, the median over the seeds; infinity if it does not reach `mark`."""
    medians = [statistics.median_high(minutes_to(mark, runs)) for (each, _), runs in groups.items() if each == name]
    return min(medians, default=math.inf)


def draw(groups, constant, path):
    """Dice against minutes."""
    figure, names = new_figure(figsize=(8, 6), layout='constrained'), list(CONTENDERS)
    axes = figure.subplots()
    for (name, rate), runs in groups.items():
        for number, points in enumerate(runs):
            minutes, _, dice = zip(*points)
            label = None if number else f'{name}, {rate:g}'
            axes.plot(minutes, dice, '.-', color=f'C{names.index(name)}', label=label, markersize=3)
    axes.axhline(constant, color='grey', linestyle='--', label='pet everywhere')
    axes.set(xlabel='minutes of training', ylabel='validation Dice', xscale='log', ylim=(0, 1))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.grid(alpha=0.3)
    figure.legend(fontsize='small', loc='outside lower center', ncols=3)
    write_file(path, lambda file: figure.savefig(file, format='png', dpi=120))


def main(argv=None):
    parser = common.make_parser(__doc__, pets=600)
    common.add_threads(parser)
    add = parser.add_argument
    add('--minutes', type=positive_number, default=30, metavar='N', help='of every run (default: %(default)s)')
    add('--points', type=whole_number(3), default=40, help='validations of a run (default: %(default)s)')
    add('--seeds', type=whole_number(1), default=3, help='runs of each (default: %(default)s)')
    rates = "learning rates of the original's network with our training (default: 0.001 0.003 0.01)"
    add('--rates', type=positive_number, nargs='+', default=[1e-3, 3e-3, 1e-2], metavar='LR', help=rates)
    add('--only', choices=CONTENDERS, nargs='+', default=list(CONTENDERS), help='train these now')
    add('--out', type=Path, default=Path('runs/time_to_dice'), metavar='DIR', help='default: %(default)s')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    common.print_heading(parser, argv)
    path = args.out / 'curves.csv'
    curves = read_curves(path)
    missing = [key for key in planned(args) if key not in curves]
    if any(name == 'smp-resnet18' for name, *_ in missing):
        import_smp()
    with common.prepared(args.data, 600) as data:
        constant = constant_dice(data)
        for name, rate, seed in missing:
            config = Config(data, epochs=args.points, lr=rate, seed=seed, device='cpu')
            curves[name, rate, seed] = train_curve(CONTENDERS[name], config, args.minutes * 60)
            write_curves(curves, path)
            print(f'{name}, learning rate {rate:g}, seed {seed}: written to {path}', flush=True)
    groups = group_seeds(curves)
    draw(groups, constant, args.out / 'time_to_dice.png')
    marks = [f'{mark:.2f}' for mark in MARKS]
    common.print_table(['', 'rate', 'seeds', *marks, 'best', 'images'], make_rows(groups))
    print(f'minutes of training to a validation Dice of {", ".join(marks)}; a mask of all ones has {constant:.4f}')
    theirs, ours = (best_minutes(RATIO_MARK, groups, name) for name in ('original-our-training', 'masks'))
    print(f'ratio {theirs / ours:.3g}' if max(theirs, ours) < math.inf else 'ratio none')


if __name__ == '__main__':
    run_script(main)

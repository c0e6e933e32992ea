"""What is each part of the recipe worth? Training without one thing at a time, for equal minutes of one core.

    python benchmarks/tricks.py --data datasets/data_new --base scratch --minutes 15
    python benchmarks/tricks.py --data datasets/data_new --base imagenet --minutes 8

Trains MTLNet with the whole recipe, then without each of its parts, and with each candidate for it, from --seeds seeds.
A run is one full cycle of the learning rate, of as many steps as fit into --minutes, so a part that makes steps faster
is paid in steps. How many fit is measured once for each variant, on a CPU and one thread: BASE-steps.csv in --out.
--device cuda takes as many steps of the same batches on a GPU, where they take less time. A run is in a process of its
own, and validated at its end, also on small pets in poor light (see robustness.py). The test split is not used.

A finished run is added to BASE.csv in --out, and the same command again makes the runs that are missing; one --out for
one machine, device, data, --minutes and commit. The table has the mean differences to the whole recipe, seed by seed,
with 95 % intervals by Student's t; all variants are taken to vary alike between seeds. There is no ratio.
"""

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import common
import pandas as pd
import torch
from robustness import COPIES
from scipy import stats
from statsmodels.formula.api import ols
from train_step import IMAGENET, Line, make_run

import engine
import models
import train_mtl
import utils
from dataloader_mtl import MTLDataset
from engine import Config, train_one_epoch
from evaluation import evaluate
from models import MTLNet
from support.cli import positive_number, run_script, whole_number
from support.device import keep_freed_memory, seed_everything
from support.report import write_csv

BASES = {'scratch': {}, 'imagenet': IMAGENET}
METRICS = ('dice', 'accuracy', 'box_iou', 'hard_dice', 'hard_accuracy')
COLUMNS = ('variant', 'seed', 'steps', *METRICS)
EPOCHS = 20  # of which the image sizes are shares
WHOLE = 'the whole recipe'


class Variant(NamedTuple):
    """The recipe with something else: `config` is what differs from Config, `change` changes the code."""

    config: dict = {}
    change: Callable = lambda: None
    bases: tuple = tuple(BASES)


def equal_weights():
    train_mtl.WEIGHTS = utils.WeightedLoss.equal(MTLNet.tasks).weights


def no_smoothing():
    utils.TASKS['class'].loss.smoothing = 0


def no_giou():
    utils.ops.generalized_box_iou_loss = lambda bbox, target: bbox.new_zeros(len(bbox))


def nothing_frozen():
    models.TimmEncoder.freeze_shallow = lambda self: None


def cosine_schedule():
    def make(optimizer, total_steps):
        rates, steps = [group['lr'] for group in optimizer.param_groups], max(6, total_steps + 1)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.2)

    engine.make_schedule = make


VARIANTS = {
    WHOLE: Variant(),
    'AdamW for all': Variant({'muon': False}, bases=('scratch',)),
    'one image size': Variant({'sizes': ((1, 3 / 4),)}),
    'no small pets': Variant({'zoom_out': 0}),
    'no poor light': Variant({'poor_light': 0}),
    'neither': Variant({'zoom_out': 0, 'poor_light': 0}),
    'equal weights of the tasks': Variant(change=equal_weights),
    'no label smoothing': Variant(change=no_smoothing),
    'L1 without GIoU': Variant(change=no_giou),
    'no frozen layers': Variant(change=nothing_frozen, bases=('imagenet',)),
    'one learning rate': Variant({'encoder_lr_share': 1}, bases=('imagenet',)),
    'cosine schedule': Variant(change=cosine_schedule),
    'no full size at the end': Variant({'sizes': (*Config.sizes[:-2], (1, 3 / 4))}, bases=('scratch',)),
    'crops from 25 %': Variant({'crop': (0.25, 1.0)}),
    'EfficientNet-Lite1': Variant({'encoder': 'tf_efficientnet_lite1'}, bases=('imagenet',)),
    'EfficientNet-Lite2': Variant({'encoder': 'tf_efficientnet_lite2'}, bases=('imagenet',)),
}


def train_epoch(run):
    """Train for an epoch; returns its seconds."""
    start = time.perf_counter()
    run.history.append(train_one_epoch(run))
    seconds = time.perf_counter() - start
    run.start_epoch()
    return seconds


def steps_that_fit(line, config, seconds):
    """Steps of an epoch with which a run of `config.epochs` takes about `seconds`, as timed in shorter runs."""
    steps, spent = 0, 0
    while spent < seconds / 20:
        steps = max(1, 2 * steps)
        run = make_run(line, replace(config, steps=steps))
        spent = sum(train_epoch(run) for _ in range(config.epochs))
    return max(1, round(steps * seconds / spent))


def start_variant(name, base):
    """The Line of a variant, in a process of its own."""
    variant = VARIANTS[name]
    torch.set_num_threads(1)
    keep_freed_memory()
    variant.change()
    return Line(MTLNet, config=BASES[base] | variant.config)


def measure_steps(name, base, config, seconds, results):
    """Put the row of BASE-steps.csv into `results`."""
    steps = steps_that_fit(start_variant(name, base), config, seconds)
    results.put({'variant': name, 'steps': steps})


def train_variant(name, base, config, results):
    """Put the row of BASE.csv into `results`."""
    run = make_run(start_variant(name, base), config)
    for _ in range(config.epochs):
        train_epoch(run)
    metrics = {}
    for prefix, options in {'': {}, 'hard_': COPIES['small, in poor light']}.items():
        seed_everything(0)
        found = evaluate(run.model, MTLDataset('val', root=config.data, **options), run.device, bfloat16=run.bfloat16)
        metrics |= {f'{prefix}{name}': value for name, value in found.items()}
    row = {'variant': name, 'seed': config.seed, 'steps': config.steps}
    results.put(row | {metric: metrics[metric] for metric in METRICS})


def run_all(tasks, jobs):
    """Yield the row of each of `tasks`, (function, *arguments), as it comes; `jobs` processes at a time."""
    context, pool = multiprocessing.get_context('spawn'), ThreadPoolExecutor(jobs)
    try:
        for done in as_completed([pool.submit(run_process, context, *task) for task in tasks]):
            if row := done.result():
                print(row, flush=True)
                yield row
    finally:  # also after Ctrl-C
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def run_process(context, function, *arguments):
    """What the function puts into its results, in a process of its own; None if it fails: it says why."""
    results = context.SimpleQueue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    process.join()
    return None if process.exitcode else results.get()


def read_rows(path):
    return pd.read_csv(path).to_dict('records') if path.exists() else []


def table_rows(rows):
    """The rows of the table: differences to WHOLE over the seeds that both have."""
    runs, table = pd.DataFrame(rows), []
    values = runs.set_index(['variant', 'seed'])
    whole, steps = values.loc[WHOLE, list(METRICS)], runs.groupby('variant')['steps'].mean()
    # Two or three seeds say little about the spread of one variant; all variants together say more.
    fits = {metric: ols(f'{metric} ~ C(variant) + C(seed)', runs).fit() for metric in METRICS}
    for name in (name for name in VARIANTS if name in steps):
        each = values.loc[name, list(METRICS)]
        cells = [f'{each[metric].mean():.3f}' for metric in METRICS]
        if name != WHOLE:
            each = (each - whole).dropna()
            halves = [interval(fits[metric]) * (2 / len(each)) ** 0.5 for metric in METRICS]
            cells = [f'{difference:+.3f} ± {half:.3f}' for difference, half in zip(each.mean(), halves)]
        table.append([name, str(len(each)), f'{steps[name] / steps[WHOLE]:.2f}', *cells])
    return table


def interval(fit):
    """Half of the 95 % interval of a value, from what a fit of variants and seeds leaves of the variance; or NaN."""
    return stats.t.ppf(0.975, fit.df_resid) * fit.mse_resid**0.5 if fit.df_resid > 0 else math.nan


def main(argv=None):
    parser = common.make_parser(__doc__, pets=600)
    add = parser.add_argument
    add('--base', choices=BASES, default='scratch', help='default: %(default)s')
    add('--minutes', type=positive_number, default=15, metavar='N', help='of every run (default: %(default)s)')
    add('--seeds', type=whole_number(1), default=3, help='runs of each (default: %(default)s)')
    add('--only', choices=VARIANTS, nargs='+', default=list(VARIANTS), metavar='VARIANT', help='train these now')
    add('--out', type=Path, default=Path('runs/tricks'), metavar='DIR', help='default: %(default)s')
    add('--device', choices=('cpu', 'cuda'), default='cpu', help='where to train (default: %(default)s)')
    add('--jobs', type=whole_number(1), default=1, help='runs side by side (default: %(default)s)')
    args = parser.parse_args(argv)
    common.print_heading(parser, argv)
    names = [name for name in args.only if args.base in VARIANTS[name].bases]
    path, steps_path = args.out / f'{args.base}.csv', args.out / f'{args.base}-steps.csv'
    rows, measured = read_rows(path), read_rows(steps_path)
    with common.prepared(args.data, 600) as data:
        config = Config(data, epochs=EPOCHS, device='cpu')
        known = {row['variant'] for row in measured}
        missing = [name for name in names if name not in known]
        tasks = [(measure_steps, name, args.base, config, 60 * args.minutes) for name in missing]
        for row in run_all(tasks, 1):
            measured.append(row)
            write_csv(measured, steps_path, ('variant', 'steps'))
        steps = {row['variant']: row['steps'] for row in measured}
        wanted = [(name, seed) for seed in range(args.seeds) for name in names if name in steps]
        done = {(row['variant'], row['seed']) for row in rows}
        missing = [key for key in wanted if key not in done]
        tasks = [
            (train_variant, name, args.base, replace(config, steps=steps[name], seed=seed, device=args.device))
            for name, seed in missing
        ]
        for row in run_all(tasks, args.jobs):
            rows.append(row)
            write_csv(rows, path, COLUMNS)
    if any(row['variant'] == WHOLE for row in rows):  # what the others are compared with
        common.print_table(['', 'seeds', 'steps', *METRICS], table_rows(rows))


if __name__ == '__main__':
    run_script(main)

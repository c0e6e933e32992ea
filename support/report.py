"""What a run reports: the epoch's line, test metrics, log.csv, curves.png, test_scores.csv and metrics.json."""

import csv
import io
import json
import math
import os
import platform
import subprocess
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision

from support.files import write_file


def entries(row, prefix):
    """The entries of a row of log.csv whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def epoch_line(row, epochs):
    """A row of log.csv as a line: training losses, validation metrics, speed."""
    losses = ' '.join(f'{task} {loss:.3f}' for task, loss in entries(row, 'train_loss_').items())
    metrics = ' '.join(f'{name} {value:.4f}' for name, value in entries(row, 'val_').items() if 'loss_' not in name)
    return (
        f'epoch {row["epoch"]}/{epochs}: training loss {losses}; validation {metrics}; '
        f'{row["images_per_second"]:.1f} images/s, {row["total_seconds"]:.0f} s'
    )


def print_test(title, test, printed):
    """`test`: {metric: what `evaluation.run_test` says of it}; `printed`: {metric: the name to print}."""
    if not test:
        print(f'{title}: no sample has a label')
        return
    print(f"{title}, [95 % interval over the images]; flips: outputs averaged with the mirror image's")
    for name, values in test.items():
        mean, flips = (
            f'{values[f"{kind}mean"]:.4f} [{values[f"{kind}interval"][0]:.3f}, {values[f"{kind}interval"][1]:.3f}]'
            for kind in ('', 'flip_')
        )
        constant = f'a constant prediction {values["constant"]:.4f}'
        print(f'  {printed[name]}: {mean}; flips {flips}; {constant}; {values["images"]} images')


def read_commit():
    """The commit of this code, ending in -dirty where files differ from it; None outside a git repository."""
    command = 'git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def write_metrics(metrics, path):
    """Write a dict, with the versions and the machine, as JSON; returns what was written."""
    metrics = metrics | {
        'versions': {
            'python': platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, torchvision, h5py, np)},
        },
        'machine': {
            'cpu': f'{platform.machine()} {torch.backends.cpu.get_cpu_capability()}',
            'threads': torch.get_num_threads(),
        },
    }
    text = json.dumps(metrics, indent=2)
    write_file(path, lambda file: file.write(f'{text}\n'.encode()))
    return json.loads(text)


def write_csv(rows, path, columns=None):
    """A CSV of dicts; a value that a row does not have stays empty. Without `columns`, those of all rows."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    write_file(path, lambda file: file.write(content))


def write_scores(scores, names, classes, path):
    """A CSV with a row for each test image: its name and class, and its value of each metric, empty where unknown.

    `scores`: {metric: (N,) array}.
    """
    columns = ['image', 'class', *scores]
    texts = [['' if math.isnan(value) else f'{value:.6g}' for value in values] for values in scores.values()]
    write_csv([dict(zip(columns, row)) for row in zip(names, classes, *texts)], path, columns)


def lowest(values, names, count=8):
    """{name: value} of the lowest values of an array (N,), NaN unknown, the lowest first."""
    order = [row for row in np.argsort(values)[:count] if not math.isnan(values[row])]
    return {str(names[row]): float(values[row]) for row in order}


def new_figure(**options):
    """A matplotlib Figure, which needs no display; `options` are those of Figure."""
    os.environ['MPLBACKEND'] = 'agg'  # a notebook sets one that a script cannot import
    from matplotlib.figure import Figure

    return Figure(**options)


def draw_curves(history, printed, path):
    """A PNG of the losses and of the validation metrics against the epochs; `printed` as in `print_test`."""
    epochs = [row['epoch'] for row in history]
    figure = new_figure(figsize=(10, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    for axes, title in (left, 'Loss'), (right, 'Validation'):
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    names = list(dict.fromkeys(name for row in history for name in row))
    tasks = list(dict.fromkeys(name.partition('_loss_')[2] for name in names if '_loss_' in name))
    for name in names:
        values = [row.get(name, math.nan) for row in history]
        split, _, kind = name.partition('_')
        if kind.startswith('loss_'):
            task = kind.removeprefix('loss_')
            style = '-' if split == 'train' else '--'
            left.plot(epochs, values, style, color=f'C{tasks.index(task)}', label=f'{task}, {split}')
        elif split == 'val' and kind in printed:
            right.plot(epochs, values, label=printed[kind])
    right.set_ylim(0, 1)
    for axes in left, right:
        if axes.lines:
            axes.legend()
    write_file(path, lambda file: figure.savefig(file, format='png', dpi=120))

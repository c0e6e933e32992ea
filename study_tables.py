"""The results of study.py: what finished runs leave, and the table and plots that are made of it.

In the folder of the results, runs.csv has a row for each run and scores.csv.gz one for each test image of each run.
"""

import csv
import gzip
import json
import statistics
from typing import NamedTuple

import numpy as np

from comparison import compare, holm, relative_gain
from support.files import write_file
from support.report import write_csv


class RunKey(NamedTuple):
    """A training run: an arm of study.py, on a fold, at a learning rate."""

    arm: str
    fold: int
    rate: float


KEY = RunKey._fields
METRICS = ('dice', 'mask_iou', 'accuracy', 'box_iou')
RUN_COLUMNS = (
    *KEY,
    'masks',
    'best_epoch',
    'minutes',
    *(f'val_{name}' for name in METRICS),
    *(f'test_{name}' for name in METRICS),
)
RUN_COLUMNS += ('constant_dice',)
SCORE_COLUMNS = (*KEY, 'image', 'class', *METRICS)


# ---- reading and writing


def write_result(metrics, folder):
    """Write result.json, what `add_result` takes from a run's metrics.json."""
    test = metrics['test']
    result = {'masks': metrics['data']['train']['mask'], 'best_epoch': metrics['best_epoch']}
    result['minutes'] = round(metrics['training_seconds'] / 60, 2)
    result |= {f'val_{name}': metrics['validation'].get(name) for name in METRICS}
    result |= {f'test_{name}': test[name]['mean'] if name in test else None for name in METRICS}
    result['constant_dice'] = test['dice']['constant'] if 'dice' in test else None
    write_file(folder / 'result.json', lambda file: file.write(json.dumps(result).encode()))


def read_table(path):
    """The rows of a CSV, gzipped or not, as dicts of str; none if there is no file."""
    if not path.exists():
        return []
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def key_of(row):
    return RunKey(row['arm'], int(row['fold']), float(row['rate']))


def read_runs(out):
    """{RunKey: {column of runs.csv: float, None where empty}}."""
    return {
        key_of(row): {name: float(value) if value else None for name, value in row.items() if name not in KEY}
        for row in read_table(out / 'runs.csv')
    }


def add_result(out, key, folder):
    """Add the result.json and test_scores.csv of a finished run: scores first, as runs.csv says what is there."""
    about = key._asdict()
    scores = [row for row in read_table(out / 'scores.csv.gz') if key_of(row) != key]
    added = [about | row for row in read_table(folder / 'test_scores.csv')]
    write_csv(SCORE_COLUMNS, scores + added, out / 'scores.csv.gz')
    row = about | json.loads((folder / 'result.json').read_text())
    write_csv(RUN_COLUMNS, [*read_table(out / 'runs.csv'), row], out / 'runs.csv')


# ---- the tables


def chosen_runs(runs, arms):
    """{arm: {fold: its run's key}}, at the chosen learning rate: of fold 0, the best in validation of those there."""
    chosen = {}
    for arm in arms:
        keys = [key for key in runs if key[0] == arm]
        if arm == arms[arm].rate_of:  # fold 0 has a run for each rate
            first = [key for key in keys if key[1] == 0]
            rate = max(first, key=lambda key: runs[key]['val_dice'] or 0)[2] if first else None
            keys = [key for key in keys if key[2] == rate]
        if keys:
            chosen[arm] = {fold: key for _, fold, _ in keys for key in keys if key[1] == fold}
    return chosen


def read_dice(out):
    """{run's key: {image: Dice}} of the images with a mask."""
    found = {}
    for row in read_table(out / 'scores.csv.gz'):
        if row['dice']:
            found.setdefault(key_of(row), {})[row['image']] = float(row['dice'])
    return found


def differences(dice, ours, theirs):
    """{fold: array of the differences of Dice, image by image}; `ours` and `theirs`: {fold: run's key}."""
    found = {}
    for fold in sorted(ours.keys() & theirs.keys()):
        one, other = dice.get(ours[fold], {}), dice.get(theirs[fold], {})
        if one and one.keys() == other.keys():
            found[fold] = np.array([one[image] - other[image] for image in sorted(one)])
    return found


def mean_over_folds(runs, keys, name):
    """(mean, standard deviation over the folds) of a test metric, None for a task that the arm does not have."""
    values = [runs[key][f'test_{name}'] for key in keys.values()]
    if None in values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def gain(runs, chosen, arm):
    """The mean over folds of `relative_gain` over the single-task networks; None without the tasks or the folds."""
    single = {'dice': 'unet', 'accuracy': 'class', 'box_iou': 'box'}
    if any(name not in chosen for name in single.values()):
        return None
    folds = set(chosen[arm]).intersection(*(chosen[name] for name in single.values()))
    gains = []
    for fold in sorted(folds):
        metrics = {name: runs[chosen[arm][fold]][f'test_{name}'] for name in single}
        if None in metrics.values():
            return None
        gains.append(
            relative_gain(metrics, {name: runs[chosen[of][fold]][f'test_{name}'] for name, of in single.items()})
        )
    return statistics.fmean(gains) if gains else None


def with_spread(value):
    return '' if value is None else f'{value[0]:.3f} ± {value[1]:.3f}'


def make_table(out, arms):
    """The rows of table.md, and {arm: Difference} to its reference."""
    runs, dice = read_runs(out), read_dice(out)
    chosen = chosen_runs(runs, arms)
    found = {}
    for arm in chosen:
        reference = arms[arm].reference
        if reference != arm and reference in chosen:
            parts = differences(dice, chosen[arm], chosen[reference])
            if parts:
                found[arm] = compare(parts)
    corrected = holm({arm: each.p_value for arm, each in found.items()})
    rows = []
    for arm, keys in chosen.items():
        cells = [arms[arm].text, str(len(keys)), *(with_spread(mean_over_folds(runs, keys, name)) for name in METRICS)]
        if arm in found:
            low, high = found[arm].interval
            cells += [f'{found[arm].mean:+.4f} ({low:+.4f} to {high:+.4f})', f'{corrected[arm]:.3f}']
            cells.append(arms[arms[arm].reference].text)
        else:
            cells += [''] * 3
        relative = gain(runs, chosen, arm)
        cells.append('' if relative is None else f'{relative:+.1%}')
        cells.append(f'{statistics.fmean(runs[key]["minutes"] for key in keys.values()):.1f}')
        rows.append(cells)
    constant = [runs[key]['constant_dice'] for key in chosen.get('unet', {}).values()]
    if constant:
        mean = statistics.fmean(constant), statistics.stdev(constant) if len(constant) > 1 else 0.0
        rows.append(['pet everywhere', str(len(constant)), with_spread(mean), *[''] * 8])
    return rows, found


TITLES = (
    'arm',
    'folds',
    'Dice',
    'mask IoU',
    'accuracy',
    'box IoU',
    'Dice to reference (95 %)',
    'p (Holm)',
    'reference',
    'gain over single tasks',
    'minutes',
)


def draw(out, arms):
    """Write table.md, effects.png and masks.png to the folder of the results; `arms`: those of study.py."""
    rows, found = make_table(out, arms)
    lines = ['| ' + ' | '.join(TITLES) + ' |', '| ' + ' | '.join(['---'] * len(TITLES)) + ' |']
    lines += ['| ' + ' | '.join(cells) + ' |' for cells in rows]
    write_file(out / 'table.md', lambda file: file.write(('\n'.join(lines) + '\n').encode()))
    print('\n'.join(lines))
    draw_effects(found, arms, out / 'effects.png')
    draw_masks(out, arms, out / 'masks.png')


def draw_effects(found, arms, path):
    """The differences of Dice with their intervals, a line for each arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.3 * len(found)), layout='constrained')
    axes = figure.subplots()
    for row, each in enumerate(reversed(found.values())):
        axes.plot(each.interval, [row, row], color='C0')
        axes.plot(each.mean, row, 'o', color='C0')
        axes.plot(each.fold_means, [row] * len(each.fold_means), '|', color='grey')
    names = [f'{arms[arm].text} - {arms[arms[arm].reference].text}' for arm in reversed(found)]
    axes.set_yticks(range(len(found)), names)
    axes.axvline(0, color='grey', linestyle='--')
    axes.set(xlabel='difference of test Dice, mean and 95 % interval; grey: folds')
    write_file(path, lambda file: figure.savefig(file, format='png', dpi=120))


def draw_masks(out, arms, path):
    """Test Dice against the number of masks in training, of the mask alone and of all tasks."""
    from matplotlib.figure import Figure

    runs = read_runs(out)
    chosen = chosen_runs(runs, arms)
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    for colour, name in enumerate(('unet', 'mtl')):
        points = {}
        for arm, keys in chosen.items():
            if arm == name or arm in (f'{name}-60', f'{name}-240'):
                count = round(statistics.fmean(runs[key]['masks'] for key in keys.values()))
                points[count] = [runs[key]['test_dice'] for key in keys.values()]
        counts = sorted(points)
        axes.plot(counts, [statistics.fmean(points[count]) for count in counts], '.-', color=f'C{colour}', label=name)
        for count in counts:
            axes.plot([count] * len(points[count]), points[count], '_', color=f'C{colour}')
    axes.set(xlabel='masks in training', ylabel='test Dice, mean over folds; dashes: folds', xscale='log')
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    write_file(path, lambda file: figure.savefig(file, format='png', dpi=120))

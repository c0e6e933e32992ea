"""The results of study.py: what finished runs leave, and the table and plots that are made of it.

In the folder of the results, runs.csv has a row for each run and scores.csv.gz one for each test image of each run.
"""

import csv
import gzip
import json
import statistics
from typing import NamedTuple

import numpy as np

from comparison import compare, holm, relative_gain, t_interval
from support.cli import InputError
from support.files import require_file, write_file
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
    'torch',
    'cpu',
    *(f'val_{name}' for name in METRICS),
    *(f'test_{name}' for name in METRICS),
    'constant_dice',
    'learned_weighting',
)
SINGLE = {'mask': ('unet', 'dice'), 'class': ('class', 'accuracy'), 'box': ('box', 'box_iou')}  # task: arm, metric
TEXTS = ('torch', 'cpu', 'learned_weighting')
SCORE_COLUMNS = (*KEY, 'image', 'class', *METRICS)


# ---- reading and writing


def write_result(metrics, folder):
    """Write result.json, what `add_result` takes from a run's metrics.json; `metrics` None: of a run that diverged."""
    result = {'minutes': 0.0}
    if metrics:
        test, learned = metrics['test'], metrics['learned_weighting']
        result = {
            'masks': metrics['data']['train']['mask'],
            'best_epoch': metrics['best_epoch'],
            'minutes': round(metrics['training_seconds'] / 60, 2),
            'torch': metrics['versions']['torch'],
            'cpu': metrics['machine']['cpu'],
            **{f'val_{name}': metrics['validation'].get(name) for name in METRICS},
            **{f'test_{name}': test[name]['mean'] if name in test else None for name in METRICS},
            'constant_dice': test['dice']['constant'] if 'dice' in test else None,
            'learned_weighting': ' '.join(f'{name}={value:.3f}' for name, value in learned.items()),
        }
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
    """{RunKey: {column of runs.csv: float, None where empty}}, without the texts."""
    numbers = [name for name in RUN_COLUMNS if name not in KEY + TEXTS]
    return {
        key_of(row): {name: float(row[name]) if row[name] else None for name in numbers}
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


def chosen_rate(runs, arm, arms):
    """The learning rate of an arm: of the runs there are, the best in validation on fold 0; None if there is none.

    By the first of METRICS that the network has, which chooses its epochs, too. A run that diverged counts as 0.
    """

    def value(key):
        return next((value for name in METRICS if (value := runs[key][f'val_{name}']) is not None), 0)

    searched = [key for key in runs if key.arm == arms[arm].rate_of and key.fold == 0]
    return max(searched, key=value).rate if searched else None


def chosen_runs(runs, arms):
    """{arm: {fold: its run's key}}, at the arm's `chosen_rate`."""
    chosen = {}
    for arm in arms:
        rate = chosen_rate(runs, arm, arms)
        keys = {key.fold: key for key in sorted(runs) if key.arm == arm and key.rate == rate}
        if keys:
            chosen[arm] = keys
    return chosen


def read_dice(out):
    """{run's key: {image: Dice}} of the images with a mask."""
    found = {}
    for row in read_table(out / 'scores.csv.gz'):
        if row['dice']:
            found.setdefault(key_of(row), {})[row['image']] = float(row['dice'])
    return found


def differences(dice, ours, theirs):
    """{fold: array of the differences of Dice, image by image}; `ours` and `theirs`: {fold: run's key}.

    Without the folds of which one has no Dice. Raises InputError for runs that were tested on different images.
    """
    found = {}
    for fold in sorted(ours.keys() & theirs.keys()):
        if ours[fold] not in dice or theirs[fold] not in dice:
            continue
        one, other = dice[ours[fold]], dice[theirs[fold]]
        if one.keys() != other.keys():
            raise InputError(
                f'scores.csv.gz: {ours[fold]} and {theirs[fold]} were tested on different images; '
                'train both on the same --data, with another --out'
            )
        found[fold] = np.array([one[image] - other[image] for image in sorted(one)])
    return found


def compare_arms(out, arms):
    """{(arm, reference): Difference} of the arms that have a fold in common."""
    runs, dice = read_runs(out), read_dice(out)
    if lost := [key for key, run in runs.items() if run['test_dice'] is not None and key not in dice]:
        raise InputError(f'{out}/scores.csv.gz: lacks {lost[0]}; restore it, or remove such runs from runs.csv')
    chosen, found = chosen_runs(runs, arms), {}
    for arm in chosen:
        for reference in arms[arm].references:
            if parts := differences(dice, chosen[arm], chosen.get(reference, {})):
                found[arm, reference] = compare(parts)
    return found


def gains(runs, chosen, arm, arms):
    """{tasks: [`relative_gain` over the single-task networks, of each fold]}, for each task of `arm` and for all.

    Empty for a network of one task, without the single-task networks, and for an arm with another encoder, fewer masks
    or fewer images than those.
    """
    tasks, same = arms[arm].network.tasks, not arms[arm].masks and arms[arm].encoder == arms['unet'].encoder
    if len(tasks) < 2 or not same or not arms[arm].others or any(SINGLE[task][0] not in chosen for task in tasks):
        return {}
    folds = sorted(set(chosen[arm]).intersection(*(chosen[SINGLE[task][0]] for task in tasks)))

    def tested(task, name, fold):
        return runs[chosen[name][fold]][f'test_{SINGLE[task][1]}']

    ours = [{task: tested(task, arm, fold) for task in tasks} for fold in folds]
    single = [{task: tested(task, SINGLE[task][0], fold) for task in tasks} for fold in folds]
    if not folds or any(None in metrics.values() for metrics in ours + single):  # None: a run that diverged
        return {}
    return {
        part: [relative_gain(one, {task: other[task] for task in part}) for one, other in zip(ours, single)]
        for part in (*((task,) for task in tasks), tasks)
    }


def mean_and_spread(values):
    """The mean of some floats and their standard deviation, as text; '' if one is None."""
    if None in values:
        return ''
    spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.3f}{spread}'


def arm_rows(runs, arms):
    """A row of the table for each arm that has a run, and one for the constant prediction."""
    chosen, rows = chosen_runs(runs, arms), []
    for arm, keys in chosen.items():
        found = [runs[key] for key in keys.values()]
        rows.append(
            [
                f'`{arm}`: {arms[arm].text}',
                str(len(keys)),
                *(mean_and_spread([run[f'test_{name}'] for run in found]) for name in METRICS),
                f'{next(iter(keys.values())).rate:g}',
                f'{statistics.fmean(run["minutes"] for run in found):.1f}',
            ]
        )
    constant = [runs[key]['constant_dice'] for key in chosen.get('unet', {}).values()]
    if constant:
        rows.append(['pet everywhere', str(len(constant)), mean_and_spread(constant), *[''] * 5])
    return rows


def difference_rows(found):
    """A row of the table for each of `compare_arms`."""
    corrected = holm({pair: each.p_value for pair, each in found.items()})
    rows = []
    for pair, each in found.items():
        low, high = (f'{bound:+.4f}' for bound in each.interval)
        of_folds = ' to '.join(f'{bound:+.4f}' for bound in each.fold_interval) if each.fold_interval else ''
        better = f'{sum(mean > 0 for mean in each.fold_means)} of {len(each.fold_means)}'
        names = ' - '.join(f'`{arm}`' for arm in pair)
        p = f'{corrected[pair]:.3f}' if corrected[pair] >= 0.001 else '< 0.001'
        rows.append([names, f'{each.mean:+.4f}', f'{low} to {high}', of_folds, better, p])
    return rows


def gain_rows(runs, arms):
    """A row of the table for each arm that has `gains`: the number of folds, the gain in each task and their mean."""
    chosen, rows = chosen_runs(runs, arms), []
    for arm in chosen:
        if found := gains(runs, chosen, arm, arms):
            cells = [percent_with_interval(found.get(part, [])) for part in ((task,) for task in SINGLE)]
            *_, together = found.values()
            rows.append([f'`{arm}`', str(len(together)), *cells, percent_with_interval(together)])
    return rows


def percent_with_interval(values):
    """The mean of some ratios and its interval by Student's t, in per cent, as text; '' of none."""
    if not values:
        return ''
    bounds = t_interval(values)
    interval = f' ({bounds[0]:+.1%} to {bounds[1]:+.1%})' if bounds else ''
    return f'{statistics.fmean(values):+.1%}{interval}'


def markdown(titles, rows):
    return ''.join('| ' + ' | '.join(cells) + ' |\n' for cells in (titles, ['---'] * len(titles), *rows))


ARM_TITLES = ('arm', 'folds', 'Dice', 'mask IoU', 'accuracy', 'box IoU', 'learning rate', 'minutes')
DIFFERENCE_TITLES = (
    'difference of test Dice',
    'mean',
    '95 %, folds and images',
    '95 %, t of the folds',
    'folds above 0',
    'p (Holm)',
)
GAIN_TITLES = ('gain over single tasks', 'folds', 'Dice', 'accuracy', 'box IoU', 'mean of its tasks')


def draw(out, arms):
    """Write table.md, effects.png and masks.png to the folder of the results; `arms`: those of study.py."""
    require_file(out / 'runs.csv', 'study.py --data writes it')
    runs, found = read_runs(out), compare_arms(out, arms)
    tables = [(ARM_TITLES, arm_rows(runs, arms)), (DIFFERENCE_TITLES, difference_rows(found))]
    if rows := gain_rows(runs, arms):
        tables.append((GAIN_TITLES, rows))
    text = '\n'.join(markdown(*table) for table in tables)
    write_file(out / 'table.md', lambda file: file.write(text.encode()))
    print(text, end='')
    draw_effects(found, out / 'effects.png')
    draw_masks(runs, arms, out / 'masks.png')


def draw_effects(found, path):
    """The differences of Dice with their intervals, a line for each of `compare_arms`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.3 * len(found)), layout='constrained')
    axes = figure.subplots()
    for row, each in enumerate(reversed(found.values())):
        axes.plot(each.fold_interval or [], [row] * len(each.fold_interval or []), color='grey', linewidth=1)
        axes.plot(each.interval, [row, row], color='C0', linewidth=2)
        axes.plot(each.mean, row, 'o', color='C0')
        axes.plot(each.fold_means, [row] * len(each.fold_means), '|', color='black')
    axes.set_yticks(range(len(found)), [' - '.join(pair) for pair in reversed(found)])
    axes.axvline(0, color='grey', linestyle='--')
    axes.set_ylim(-0.7, max(1, len(found)) - 0.3)
    axes.set_xlabel('difference of test Dice\n95 % of folds and images (blue), t of the folds (grey); dashes: folds')
    write_file(path, lambda file: figure.savefig(file, format='png', dpi=120))


def draw_masks(runs, arms, path):
    """Test Dice against the number of masks in training, of the mask alone and of all tasks, on the same folds."""
    from matplotlib.figure import Figure

    chosen = chosen_runs(runs, arms)
    lines = {name: [arm for arm in (f'{name}-60', f'{name}-240', name) if arm in chosen] for name in ('unet', 'mtl')}
    tested = [
        {fold for fold, key in chosen[arm].items() if runs[key]['test_dice'] is not None}
        for line in lines.values()
        for arm in line
    ]
    folds = sorted(set.intersection(*tested)) if tested else []
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes, ticks = figure.subplots(), set()
    for colour, (name, line) in enumerate(lines.items()):
        points = [[runs[chosen[arm][fold]] for fold in folds] for arm in line if folds]
        counts = [statistics.fmean(run['masks'] for run in found) for found in points]
        values = [[run['test_dice'] for run in found] for found in points]
        axes.plot(counts, [statistics.fmean(each) for each in values], '.-', color=f'C{colour}', label=arms[name].text)
        ticks.update(counts)
        for count, each in zip(counts, values):
            axes.plot([count] * len(each), each, '_', color=f'C{colour}')
    axes.set(xlabel='masks in training', ylabel='test Dice, mean over folds; dashes: folds', xscale='log')
    axes.minorticks_off()
    axes.set_xticks(sorted(ticks), [f'{count:.0f}' for count in sorted(ticks)])
    axes.grid(alpha=0.3)
    axes.legend()
    write_file(path, lambda file: figure.savefig(file, format='png', dpi=120))

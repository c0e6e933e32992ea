"""The curves of time_to_dice.py: the CSV that holds them, the table and the plot.

A run is a (contender, rate, seed), a curve a list of points (minutes of training, images trained on, validation
Dice).
"""

import csv
import io
import math
import statistics

import common  # noqa: F401  the scripts on the path

from support.files import write_file

MARKS = (0.80, 0.85, 0.90)
COLUMNS = ('contender', 'rate', 'seed', 'minutes_of_run', 'minutes', 'images', 'dice')


def read_runs(path, minutes):
    """{(contender, rate, seed): points} of the runs of `minutes`."""
    runs = {}
    if path.exists():
        with open(path, newline='') as file:
            for row in csv.DictReader(file):
                if float(row['minutes_of_run']) == minutes:
                    key = row['contender'], float(row['rate']), int(row['seed'])
                    point = float(row['minutes']), int(row['images']), float(row['dice'])
                    runs.setdefault(key, []).append(point)
    return runs


def add_run(path, key, minutes, points):
    """Append a run to the CSV, all of it or nothing."""
    text = io.StringIO(newline='')
    rows = csv.writer(text)
    if not path.exists():
        rows.writerow(COLUMNS)
    rows.writerows((*key, minutes, *point) for point in points)
    before = path.read_bytes() if path.exists() else b''
    write_file(path, lambda file: file.write(before + text.getvalue().encode()))


def runs_of(runs, name):
    """The runs of one contender, by rate and seed."""
    return {key: runs[key] for key in sorted(runs) if key[0] == name}


def first_time(points, mark):
    """Minutes until the curve reaches `mark`, or infinity."""
    return next((minutes for minutes, _, dice in points if dice >= mark), math.inf)


def best_dice(points):
    return max(dice for *_, dice in points)


def best_rates(runs):
    """{contender: the rate with the highest median of the best Dice}."""
    scores = {}
    for (name, rate, _), points in runs.items():
        scores.setdefault(name, {}).setdefault(rate, []).append(best_dice(points))
    return {name: max(rates, key=lambda rate: statistics.median(rates[rate])) for name, rates in scores.items()}


def median_times(runs, name):
    """Minutes to each of MARKS, at the best rate, the median over the seeds."""
    best = best_rates(runs).get(name)
    chosen = [points for (_, rate, _), points in runs_of(runs, name).items() if rate == best]
    return [
        statistics.median_high(first_time(points, mark) for points in chosen) if chosen else math.inf for mark in MARKS
    ]


def cells(times):
    return ['not reached' if time == math.inf else f'{time:.1f}' for time in times]


def make_rows(runs, labels):
    """The rows of the table: each run, and the median over a contender's seeds; `labels`: {contender: text}."""
    rows, best = [], best_rates(runs)
    for name in labels:
        mine = runs_of(runs, name)
        for (_, rate, seed), points in mine.items():
            times = cells(first_time(points, mark) for mark in MARKS)
            minutes, images, dice = points[-1]
            ends = f'{best_dice(points):.4f}', f'{dice:.4f}', f'{minutes:.1f}', str(images)
            rows.append([labels[name], f'{rate:g}', str(seed), *times, *ends])
        chosen = [points for (_, rate, _), points in mine.items() if rate == best[name]]
        if len(chosen) > 1:
            dice = (f'{statistics.median(map(function, chosen)):.4f}' for function in (best_dice, lambda p: p[-1][2]))
            rows.append(['  median', f'{best[name]:g}', '', *cells(median_times(runs, name)), *dice, '', ''])
    return rows


def draw(runs, labels, constant, path):
    """Dice against minutes; `labels` as in `make_rows`; pale: rates that are not the best."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(8, 6), layout='constrained')
    axes, best = figure.subplots(), best_rates(runs)
    for number, (name, label) in enumerate(labels.items()):
        for (_, rate, _), points in (mine := runs_of(runs, name)).items():
            minutes, _, dice = zip(*points)
            alpha = 1 if rate == best[name] else 0.25
            axes.plot(minutes, dice, '.-', color=f'C{number}', alpha=alpha, markersize=3)
        if mine:  # the legend's line
            axes.plot([], [], '.-', color=f'C{number}', label=label, markersize=3)
    axes.axhline(constant, color='grey', linestyle='--', label='pet everywhere')
    axes.set(xlabel='minutes of training', ylabel='validation Dice', xscale='log', ylim=(0, 1))
    axes.xaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=ScalarFormatter(), minor_locator=NullLocator()
    )
    axes.grid(alpha=0.3)
    figure.legend(fontsize='small', loc='outside lower center', ncols=2)
    write_file(path, lambda file: figure.savefig(file, format='png', dpi=120))

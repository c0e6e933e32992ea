"""table.md, from the results, and what the plots show."""

import numpy as np
import pandas as pd

from study.arms import ARMS, CONFIRMATORY, METRIC, SINGLE, TITLES
from study.plots import draw_effects, draw_gains, draw_masks
from study.results import chosen_runs, read_runs, read_scores
from study.statistics import compare, detectable_difference, holm, t_interval
from support.cli import InputError
from support.files import write_file


def draw(out):
    """Write table.md, effects.png, masks.png and gains.png to the folder of the results, and print the tables."""
    chosen = chosen_runs(read_runs(out))
    if chosen.empty:
        print(f'{out}: no learning rate is chosen yet, nothing to draw')
        return
    differences, gains = compare_arms(read_scores(out, chosen)), find_gains(chosen)
    tables = arm_rows(chosen), difference_rows(differences), gain_rows(gains), seed_rows(chosen)
    text = '\n'.join(markdown(rows) for rows in tables if rows)
    write_file(out / 'table.md', lambda file: file.write(text.encode()))
    print(text, end='')
    draw_masks(by_arm(chosen, 'masks'), by_arm(chosen, 'test_dice'), out / 'masks.png')
    if effects := of_losses(differences):
        draw_effects(effects, out / 'effects.png')
    if gains:
        draw_gains(gains, out / 'gains.png')


def by_arm(chosen, column):
    """A column of the runs as a table of folds x arms, NaN where there is no run."""
    return chosen[column].unstack('arm').reindex(columns=list(ARMS))


def compare_arms(scores):
    """{(arm, reference, metric): Difference} of the arms that have a fold in common, the confirmatory ones first."""
    exploratory = [
        (name, reference, METRIC[task])
        for name, arm in ARMS.items()
        for reference in arm.references
        for task in arm.network.tasks
        if task in ARMS[reference].network.tasks
    ]
    parts = {key: image_differences(scores, *key) for key in dict.fromkeys((*CONFIRMATORY, *exploratory))}
    return {key: compare(found) for key, found in parts.items() if found}


def image_differences(scores, arm, reference, metric):
    """[(N,) array of the differences, image by image, of each fold that both arms have].

    Raises InputError for runs that were tested on different images.
    """
    if not {arm, reference} <= set(scores.index.unique('arm')):
        return []
    ours, theirs = (scores.loc[name, metric].dropna() for name in (arm, reference))
    folds = ours.index.unique('fold').intersection(theirs.index.unique('fold'))
    ours, theirs = (values[values.index.isin(folds, 'fold')] for values in (ours, theirs))
    if not ours.index.equals(theirs.index):
        raise InputError(
            f'scores.csv.gz: {arm} and {reference} were tested on different images; '
            'train both on the same --data, with another --out'
        )
    return [values.to_numpy() for _, values in (ours - theirs).groupby('fold')]


def of_losses(differences):
    """Those of `compare_arms` of an arm that differs only in its losses."""
    return {key: found for key, found in differences.items() if ARMS[key[0]].differs_only_in_losses}


def find_gains(chosen):
    """{arm: (M - B) / B of its metrics M and those B of the single-task networks, a table of folds x metrics}.

    Of arms of several tasks that differ from those in nothing else. The mean over the metrics is the multi-task
    performance of Maninis, Radosavovic and Kokkinos (CVPR 2019, eq. 4).
    """
    tested, found = {metric: by_arm(chosen, f'test_{metric}') for metric in SINGLE}, {}
    for name, arm in ARMS.items():
        metrics = [METRIC[task] for task in arm.network.tasks]
        ours = pd.DataFrame({metric: tested[metric][name] for metric in metrics})
        single = pd.DataFrame({metric: tested[metric][SINGLE[metric]] for metric in metrics})
        gain = ((ours - single) / single).dropna()
        if len(gain) and len(metrics) > 1 and arm.differs_only_in_losses:
            found[name] = gain
    return found


# ---- the rows of a table, [{title: cell}]


def arm_rows(chosen):
    """A row for each arm, and one for the constant prediction."""
    minutes, rows = by_arm(chosen, 'minutes'), []
    cost = minutes.div(minutes['unet'], axis=0).mean()
    for arm, runs in chosen.groupby('arm', sort=False):
        metrics = {title: mean_and_spread(runs[f'test_{name}']) for name, title in TITLES.items()}
        times = {'minutes': f'{runs["minutes"].mean():.1f}', 'time / `unet`': f'{cost[arm]:.2f}'}
        text, rate = f'`{arm}`: {ARMS[arm].text}', f'{runs["rate"].iloc[0]:g}'
        rows.append({'arm': text, 'folds': len(runs), **metrics, 'learning rate': rate, **times})
    if 'mtl' in chosen.index:
        metrics = {title: mean_and_spread(chosen.loc['mtl', f'constant_{name}']) for name, title in TITLES.items()}
        rows.append(
            dict.fromkeys(rows[0], '') | {'arm': 'constant prediction', 'folds': len(chosen.loc['mtl'])} | metrics
        )
    return rows


def difference_rows(differences):
    """A row for each of `compare_arms`; only the confirmatory ones have a p-value."""
    p_values = [differences[key].p_value if key in differences else np.nan for key in CONFIRMATORY]
    corrected, rows = dict(zip(CONFIRMATORY, holm(p_values))), []
    for key, found in differences.items():
        arm, reference, metric = key
        rows.append(
            {
                'difference': f'`{arm}` - `{reference}`',
                'of': TITLES[metric],
                'kind': 'confirmatory' if key in CONFIRMATORY else 'exploratory',
                'mean': f'{found.mean:+.4f}',
                '95 %, t of the folds': interval(found.t_interval, '+.4f'),
                '95 %, bootstrap': interval(found.bootstrap_interval, '+.4f'),
                'folds above 0': f'{sum(mean > 0 for mean in found.fold_means)} of {len(found.fold_means)}',
                'p (Holm)': f'{corrected[key]:.4f}' if key in CONFIRMATORY else '',
            }
        )
    return rows


def gain_rows(gains):
    """A row for each of `find_gains`: the gain in each task and their mean, with the interval of the folds."""
    rows = []
    for arm, gain in gains.items():
        cells = {TITLES[name]: percent(gain[name]) if name in gain else '' for name in SINGLE}
        row = {'gain over single tasks': f'`{arm}`', 'folds': len(gain), **cells}
        rows.append(row | {'mean of its tasks': percent(gain.mean(axis=1))})
    return rows


def seed_rows(chosen):
    """Dice of two seeds on the same folds: their spread, and the difference that all folds could have found by it."""
    dice, rows = by_arm(chosen, 'test_dice'), []
    one, two = dice[['unet', 'mtl']], dice[['unet-seed', 'mtl-seed']].set_axis(['unet', 'mtl'], axis=1)
    one, two = (table.assign(difference=table['mtl'] - table['unet']) for table in (one, two))
    for name in one:
        apart, folds = (one[name] - two[name]).dropna(), one[name].count()
        if len(apart):
            spread = (apart.pow(2).mean() / 2) ** 0.5
            row = {'Dice of two seeds': name, 'folds': len(apart), 'spread of seeds': f'{spread:.4f}'}
            found = f'{detectable_difference(spread, folds, len(CONFIRMATORY)):.4f}' if name == 'difference' else ''
            rows.append(row | {'spread of folds': f'{one[name].std():.4f}', 'found in 4 of 5 studies': found})
    return rows


def mean_and_spread(values):
    """'mean ± standard deviation' of a column; '' if a value is missing."""
    if values.isna().any():
        return ''
    return f'{values.mean():.3f}' + (f' ± {values.std():.3f}' if len(values) > 1 else '')


def percent(values):
    """'mean (low to high)' of some ratios, in per cent, the interval by Student's t."""
    return f'{values.mean():+.1%} ({interval(t_interval(values.tolist()), "+.1%") or "one fold"})'


def interval(bounds, spec):
    """'low to high'; '' for NaN."""
    return '' if np.isnan(bounds[0]) else ' to '.join(format(bound, spec) for bound in bounds)


def markdown(rows):
    lines = [list(rows[0]), ['---'] * len(rows[0]), *(row.values() for row in rows)]
    return ''.join('| ' + ' | '.join(map(str, cells)) + ' |\n' for cells in lines)

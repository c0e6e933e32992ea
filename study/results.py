"""What finished runs leave, runs.csv and scores.csv.gz, and the learning rates that they choose."""

import numpy as np
import pandas as pd

from study.arms import ARMS, FIRST_RATES, METRIC, RATES, RunKey
from support.cli import InputError
from support.files import require_file, write_file
from support.report import write_csv
from utils import METRICS

KEY = list(RunKey._fields)
RUN_COLUMNS = [
    *KEY,
    *('masks', 'best_epoch', 'minutes', 'commit', 'device', 'cpu', 'precision', 'threads', 'torch'),
    *(f'{kind}_{name}' for kind in ('val', 'test', 'constant') for name in METRICS),
    'learned_weighting',
]
SCORE_COLUMNS = [*KEY, 'image', 'class', *METRICS]


def write_result(key, metrics, folder):
    """Write result.csv, the row of runs.csv, from a run's metrics.json; `metrics` None: of a run that diverged."""
    row = key._asdict()
    if metrics:
        test, config = metrics['test'], metrics['config']
        row |= {
            'masks': metrics['data']['train']['mask'],
            'best_epoch': metrics['best_epoch'],
            'minutes': round(metrics['training_seconds'] / 60, 2),
            'commit': config['commit'],
            'device': config['device'],
            'cpu': metrics['machine']['cpu'],
            'precision': config['precision'],
            'threads': config['threads'],
            'torch': metrics['versions']['torch'],
            **{f'val_{name}': metrics['validation'].get(name) for name in METRICS},
            **{f'test_{name}': values['mean'] for name, values in test.items()},
            **{f'constant_{name}': values['constant'] for name, values in test.items()},
            'learned_weighting': ' '.join(f'{name}={x:.3f}' for name, x in metrics['learned_weighting'].items()),
        }
    write_csv([row], folder / 'result.csv', RUN_COLUMNS)


def add_result(out, key, folder):
    """Add the result.csv and test_scores.csv of a finished run: scores first, as runs.csv says what is there."""
    if (folder / 'test_scores.csv').exists():  # not of a run that diverged
        scores = read_text(folder / 'test_scores.csv')
        scores = scores.assign(arm=key.arm, fold=str(key.fold), rate=str(key.rate))
        add_rows(out / 'scores.csv.gz', scores, SCORE_COLUMNS, [*KEY, 'image'])
    add_rows(out / 'runs.csv', read_text(folder / 'result.csv'), RUN_COLUMNS, KEY)


def read_text(path):
    """A CSV as it is written, no text taken for a number."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def add_rows(path, rows, columns, unique):
    """Add rows to a CSV, in the place of those that are equal in the columns `unique`."""
    if path.exists():
        rows = pd.concat([read_text(path), rows]).drop_duplicates(unique, keep='last')
    compression = {'method': 'gzip', 'mtime': 0} if path.suffix == '.gz' else None  # the same rows, the same bytes
    write_file(path, lambda file: rows[columns].to_csv(file, index=False, mode='wb', compression=compression))


def read_numbers(path, columns):
    """A CSV of the results, empty values as NaN."""
    found = pd.read_csv(path, dtype={'image': str, 'rate': str}).astype({'rate': float})  # exactly that of RATES
    if list(found.columns) != columns:
        raise InputError(f'{path}: has the columns of another version of the study; remove it, or give another --out')
    return found


def read_runs(out):
    """runs.csv, indexed by the fields of RunKey; empty if there is none."""
    path = out / 'runs.csv'
    runs = read_numbers(path, RUN_COLUMNS) if path.exists() else pd.DataFrame(columns=RUN_COLUMNS)
    return runs.set_index(KEY)


def search_rates(runs, arm):
    """(learning rates to try on fold 0, the best of them): by the arm's main metric in validation.

    The best is None while one has not been tried. Where it is at the edge of those tried, the next one is tried, too. A
    run that diverged is the worst.
    """
    column = runs[f'val_{METRIC[ARMS[arm].network.tasks[0]]}']
    low, high = FIRST_RATES
    while True:
        rates = RATES[low:high]
        values = [column.get((arm, 0, rate)) for rate in rates]
        if None in values:
            return rates, None
        best = low + int(np.argmax(np.nan_to_num(values)))
        if best == low > 0:
            low -= 1
        elif best == high - 1 < len(RATES) - 1:
            high += 1
        else:
            return rates, RATES[best]


def chosen_runs(runs):
    """The runs at the chosen learning rates, indexed by arm and fold, in the order of ARMS."""
    rates = {arm: search_rates(runs, ARMS[arm].rate_of)[1] for arm in ARMS}
    keys = [key for arm in ARMS for key in sorted(runs.index) if key[0] == arm and key[2] == rates[arm]]
    return runs.loc[keys].reset_index('rate')


def read_scores(out, chosen):
    """The scores of the chosen runs for each test image: METRICS, indexed by arm, fold and image, sorted."""
    path = out / 'scores.csv.gz'
    require_file(path, 'python -m study --data writes it')
    scores = chosen.reset_index()[KEY].merge(read_numbers(path, SCORE_COLUMNS), on=KEY)
    scores = scores.set_index(['arm', 'fold', 'image'])[list(METRICS)].sort_index()
    tested = chosen.index[chosen['best_epoch'].notna()]
    if lost := set(tested) - set(scores.index.droplevel('image')):
        raise InputError(f'{path}: lacks the scores of {min(lost)}; restore it, or remove such runs from runs.csv')
    return scores

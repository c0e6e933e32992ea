"""The study: what each arm trains, which runs are missing, statistics on made-up scores, tables and plots."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import start_child, wait_for
from scipy import stats

import engine
import study
from models import load_model
from study import arms, results, runner, tables
from study.__main__ import main
from study.arms import ARMS, PARTS, RATES, RunKey
from study.statistics import bootstrap_means, compare, detectable_difference, holm
from support.cli import InputError, Stopped
from support.report import write_csv
from utils import METRICS

FIRST_RATES = RATES[slice(*arms.FIRST_RATES)]
BEST = FIRST_RATES[1]


# ---- arms


@pytest.fixture
def trained(monkeypatch):
    """Function that returns the arguments of engine.train for an arm, on fold 2 at a rate of 0.01."""

    def train(arm):
        calls = []
        monkeypatch.setattr(engine, 'train', lambda *call: calls.append(call) or {'training_seconds': 1})
        arms.train_run(RunKey(arm, 2, 0.01), 'data', Path('out'), 'cpu')
        return calls

    return train


def test_arms_with_all_images_differ_only_in_their_losses(trained):
    ((_, _, expected),) = trained('unet')
    assert (expected.data, expected.out, expected.lr, expected.seed) == ('data/fold2', 'out', 0.01, 2)
    assert (expected.images_of, expected.resume) == (('mask', 'class', 'box'), 'auto')
    for name in (*arms.MAIN, *arms.WEIGHTINGS):
        ((network, loss, config),) = trained(name)
        assert config == expected and network is ARMS[name].network
        if name in arms.MAIN:
            assert loss.weights == dict.fromkeys(network.tasks, 1 / len(network.tasks))
    assert trained('25-50-25')[0][1].weights == {'mask': 0.25, 'class': 0.5, 'box': 0.25}


def test_other_arms_differ_as_they_say(trained):
    ((_, _, expected),) = trained('unet')
    imagenet = {'encoder': arms.IMAGENET['encoder'], 'encoder_weights': 'imagenet'}
    changes = {
        'unet-50': {'masks': 50, 'images_of': ('mask',)},
        'unet-twice': {'epochs': 2 * arms.EPOCHS},
        'mtl-long': {'epochs': 4 * arms.EPOCHS},
        'mtl-imagenet': imagenet | {'encoder_lr_share': 0.2, 'muon': False},
        'mtl-seed': {'seed': 7},
    }
    found = {arm: trained(arm)[0][2] for arm in changes}
    assert found == {arm: replace(expected, **change) for arm, change in changes.items()}


def test_sequential_trains_class_and_box_on_all_images_and_then_the_masks_in_as_many_steps(trained):
    ((_, _, expected),), (first, second) = trained('unet'), trained('sequential-200')
    assert [first[0].tasks, second[0].tasks] == [('class', 'box'), ('mask',)]
    assert first[2].epochs + second[2].epochs == expected.epochs
    assert first[2] == replace(expected, out='out/first', epochs=expected.epochs // 2, masks=200)
    changes = {'epochs': second[2].epochs, 'masks': 200, 'images_of': ('mask',), 'start': 'out/first/best.pt'}
    assert second[2] == replace(expected, **changes)


@pytest.mark.parametrize('arm', ['class', 'sequential-200', 'uncertainty'])
def test_arm_trains_and_its_result_is_added_once(shared_data, tmp_path, arm):
    key, folder = RunKey(arm, 0, 1e-3), tmp_path / 'run'
    (tmp_path / 'fold0').symlink_to(shared_data)
    metrics = arms.train_run(key, tmp_path, folder, 'cpu', epochs=2, steps=1, batch_size=4)
    results.write_result(key, metrics, folder)
    results.add_result(tmp_path, key, folder)
    (tmp_path / 'runs.csv').unlink()  # killed between the two files
    results.add_result(tmp_path, key, folder)
    scores = results.read_numbers(tmp_path / 'scores.csv.gz', results.SCORE_COLUMNS)
    assert len(scores) == metrics['data']['test']['images'] and scores['image'].is_unique
    runs = results.read_runs(tmp_path)
    assert list(runs.index) == [key]
    run = runs.loc[key]
    assert np.isnan(run['test_dice']) == (arm == 'class') and run['masks'] == metrics['data']['train']['mask']
    assert ('log_variance.mask=' in str(run['learned_weighting'])) == (arm == 'uncertainty')
    assert str(tmp_path) not in (tmp_path / 'runs.csv').read_text()
    assert arm != 'sequential-200' or load_model(folder / 'first' / 'best.pt').tasks == ('class', 'box')


# ---- which runs are missing


def made_runs(values):
    """Runs as `read_runs` returns them, from {RunKey: {column: value}}."""
    rows = [key._asdict() | row for key, row in values.items()]
    return pd.DataFrame(rows, columns=results.RUN_COLUMNS).set_index(results.KEY)


def with_validation(keys):
    """Runs of which BEST is the best rate."""
    return made_runs({key: {f'val_{name}': 0.5 + (key.rate == BEST) / 10 for name in METRICS} for key in keys})


def test_rates_are_chosen_first_on_fold_0_and_nothing_is_trained_twice():
    missing = runner.missing_runs(made_runs({}), list(ARMS), range(5))
    assert missing[:3] == [RunKey('unet', 0, rate) for rate in FIRST_RATES]
    assert all(key.rate is None for key in missing if key.fold)
    searched = [key for key in missing if key.rate]
    rest = runner.missing_runs(with_validation(searched), list(ARMS), range(5))
    assert not set(rest) & set(searched) and {key.rate for key in rest} == {BEST}
    assert len(missing) == len(searched) + len(rest)
    assert runner.missing_runs(with_validation(searched + rest), list(ARMS), range(5)) == []
    for part, count in PARTS:
        for name in part:
            assert {key.fold for key in searched + rest if key.arm == name and key.rate == BEST} == set(range(count))


@pytest.mark.parametrize(
    'arm, values, tried, best',
    [
        ('unet', {3: 0.8, 2: 0.7}, [2, 3, 4], None),  # one has not been tried
        ('unet', {2: 0.7, 3: 0.8, 4: 0.7}, [2, 3, 4], 3),
        ('class', {2: 0.7, 3: 0.7, 4: 0.8}, [2, 3, 4, 5], None),
        ('unet', {2: 0.7, 3: 0.7, 4: 0.8, 5: np.nan}, [2, 3, 4, 5], 4),  # NaN: diverged
        ('box', {2: np.nan, 3: np.nan, 4: np.nan, 1: 0.1, 0: 0.2}, [0, 1, 2, 3, 4], 0),
    ],
)
def test_rate_is_the_best_in_the_metric_of_the_arm_and_the_grid_grows_at_its_edge(arm, values, tried, best):
    metric = {'unet': 'dice', 'class': 'accuracy', 'box': 'box_iou'}[arm]
    runs = made_runs({RunKey(arm, 0, RATES[rate]): {f'val_{metric}': value} for rate, value in values.items()})
    rates, found = results.search_rates(runs, arm)
    assert [RATES.index(rate) for rate in rates] == tried and found == (None if best is None else RATES[best])


# ---- the runner


class FinishedProcess:
    """Stands in for the process of a run that ends at once; that of without-bbox fails."""

    def __init__(self, key, folder):
        self.exitcode, self.terminated = int(key.arm == 'without-bbox'), False
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'last.pt').write_bytes(b'')
        row = {'minutes': 1, 'best_epoch': 1, 'masks': 70, 'val_dice': 0.7 + (key.rate == BEST) / 10, 'test_dice': 0.8}
        write_csv([key._asdict() | row], folder / 'result.csv', results.RUN_COLUMNS)
        (folder / 'test_scores.csv').write_text('image,class,dice,mask_iou,accuracy,box_iou\npug_1,pug,0.8,,,\n')

    def is_alive(self):
        return self.terminated

    def terminate(self):
        self.terminated = True

    def join(self):
        pass


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """{RunKey: FinishedProcess} of the runs that are started, and options of the study."""
    started = {}

    def start(key, data, folder, device, steps, threads):
        assert key not in started and (device, steps) == ('cpu', arms.STEPS)
        started[key] = FinishedProcess(key, folder)
        return started[key]

    monkeypatch.setattr(runner, 'start_run', start)
    monkeypatch.setattr(runner.time, 'sleep', lambda seconds: None)
    for name in 'draw_masks', 'draw_effects', 'draw_gains':
        monkeypatch.setattr(tables, name, lambda *_: None)  # test_tables_and_plots has them
    for fold in range(2):
        (tmp_path / f'fold{fold}').mkdir()
    options = '--data', str(tmp_path), '--out', str(tmp_path / 'out'), '--runs', str(tmp_path / 'runs')
    return started, [*options, '--jobs', '2', '--folds', '0', '1', '--only']


def test_all_runs_are_trained_and_a_failed_one_is_told(finished, tmp_path, capsys):
    started, options = finished
    with pytest.raises(InputError, match='2 runs failed; the same command retries them'):
        main([*options, 'unet', 'mtl', 'without-bbox'])
    assert len(started) == 3 + 3 + 2 + 2
    assert set(started) >= {RunKey(arm, 1, BEST) for arm in ('unet', 'mtl', 'without-bbox')}
    done = set(results.read_runs(tmp_path / 'out').index)
    assert done == {key for key in started if key.arm != 'without-bbox'}
    assert {path.parent.name[:12] for path in tmp_path.rglob('last.pt')} == {'without-bbox'}
    assert '9 runs left, about' in capsys.readouterr().out
    started.clear()
    main([*options, 'unet'])
    assert not started and '| `unet`: mask only | 2 |' in (tmp_path / 'out' / 'table.md').read_text()


def test_a_signal_and_the_end_of_the_minutes_stop_the_runs_that_are_being_trained(finished, monkeypatch, tmp_path):
    started, options = finished
    monkeypatch.setattr(FinishedProcess, 'is_alive', lambda self: True)
    main(['--minutes', '1e-9', *options, 'unet'])
    assert [process.terminated for process in started.values()] == [True, True]
    assert (tmp_path / 'out' / 'command.txt').read_text().startswith('python -m study --minutes 1e-9 --data ')
    started.clear()
    monkeypatch.setattr(runner.time, 'sleep', lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        main([*options, 'unet'])
    assert [process.terminated for process in started.values()] == [True, True]


def test_run_is_stopped_by_the_runner_and_not_by_the_terminal(tmp_path, monkeypatch):
    """Both reach it after Ctrl-C, and a second request would end it before it has written its checkpoint."""

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        print('goes on')
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner, 'train_run', interrupted)
    key = RunKey('unet', 0, BEST)
    child = start_child(lambda _: runner.run_process(key, 'data', tmp_path, 'cpu', 1, 1), [], tmp_path / 'output')
    assert wait_for(child) == 128 + signal.SIGTERM
    assert (tmp_path / 'log.txt').read_text() == 'goes on\nstopped\n' and not (tmp_path / 'result.csv').exists()


def test_run_that_diverged_is_a_result_and_one_that_failed_is_not(tmp_path, monkeypatch):
    def train(key, data, folder, device, steps):
        raise engine.Diverged('the loss is nan') if key.arm == 'unet' else InputError('no such file')

    monkeypatch.setattr(runner, 'train_run', train)
    diverged, failed = RunKey('unet', 0, BEST), RunKey('mtl', 0, BEST)
    runner.run_process(diverged, 'data', tmp_path / 'diverged', 'cpu', 1, 1)
    assert 'the loss is nan' in (tmp_path / 'diverged' / 'log.txt').read_text()
    results.add_result(tmp_path, diverged, tmp_path / 'diverged')
    assert np.isnan(results.read_runs(tmp_path).loc[diverged, 'val_dice'])
    with pytest.raises(SystemExit):
        runner.run_process(failed, 'data', tmp_path / 'failed', 'cpu', 1, 1)
    assert 'no such file' in (tmp_path / 'failed' / 'log.txt').read_text()
    assert not (tmp_path / 'failed' / 'result.csv').exists()


def test_missing_package_is_told(monkeypatch):
    monkeypatch.delattr(study, 'runner')
    monkeypatch.setitem(sys.modules, 'study.runner', None)
    with pytest.raises(InputError, match='pip install -r study/requirements.txt'):
        main(['--table'])


# ---- statistics


def test_difference_is_that_of_the_folds_and_of_one_fold_without_a_t_interval():
    found = compare([np.full(9, 1.0), np.full(2, 2.0), np.full(5, 3.0)])
    assert (found.fold_means, found.mean) == ([1, 2, 3], 2)
    half = 4.303 / 3**0.5  # 4.303 is that of the table of Student's t
    assert found.t_interval == pytest.approx((2 - half, 2 + half), abs=1e-3)
    assert found.p_value == pytest.approx(0.0742, abs=1e-4)
    assert found.bootstrap_interval == (1, 3)  # one draw in 27 has a fold three times
    one = compare([np.array([0.1, 0.2])])
    assert np.isnan([one.p_value, *one.t_interval]).all() and not np.isnan(one.bootstrap_interval).any()


def test_bootstrap_draws_folds_and_then_their_images():
    means = bootstrap_means([np.zeros(3), np.full(5, 8.0)], 4000, 0)
    assert set(means) == {0, 8, 4}  # one of the folds twice, or both, which have equal weight
    assert np.mean(means == 4) == pytest.approx(0.5, abs=0.03)
    means = bootstrap_means([np.array([0.0, 1.0])], 4000, 0)
    assert np.mean(means == 0.5) == pytest.approx(0.5, abs=0.03)


def test_holm_corrects_for_all_comparisons_also_those_to_come():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, np.nan, np.nan, np.nan]) == pytest.approx([0.04, 1, 1, 1])


def test_detectable_difference_is_found_in_four_of_five_draws():
    shift = detectable_difference(0.01, 5, comparisons=1)
    draws = np.random.default_rng(0).normal(shift, 0.01, (1000, 5))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)
    assert detectable_difference(0.01, 5, comparisons=4) > shift


# ---- tables and plots


SHIFTS = {'unet': 0, 'mtl': 0.05, 'class': 0, 'box': 0, 'unet-seed': 0, 'mtl-seed': 0.06}


def write_results(out, reverse=False):
    """Made-up results of three folds, in which the Dice of an arm is higher by that of SHIFTS; mtl-50 diverged."""
    generator, scores, runs = np.random.default_rng(0), [], [RunKey('mtl-50', 0, BEST)._asdict()]
    keys = [RunKey(arm, fold, BEST) for arm in SHIFTS for fold in range(3)]
    searched = [RunKey(arm, 0, rate) for arm in ('unet', 'mtl', 'class', 'box') for rate in FIRST_RATES]
    for key in dict.fromkeys(keys + searched):
        metrics = [name for name in METRICS if METRICS[name].task in ARMS[key.arm].network.tasks]
        values = pd.DataFrame({name: generator.normal(0.7, 0.02, 40).round(5) for name in metrics})
        if 'dice' in values:
            values['dice'] += SHIFTS[key.arm]
        values = values.assign(**key._asdict(), image=[f'{key.fold}_{number}' for number in range(40)])
        scores += values.to_dict('records')
        row = {'masks': 70, 'best_epoch': 1, 'minutes': 6 if 'mtl' in key.arm else 3, 'constant_dice': 0.55}
        row |= {f'val_{name}': 0.7 + (key.rate == BEST) / 10 for name in metrics}
        runs.append(key._asdict() | row | {f'test_{name}': values[name].mean() for name in metrics})
    step = -1 if reverse else 1
    write_csv(runs[::step], out / 'runs.csv', results.RUN_COLUMNS)
    pd.DataFrame(scores[::step], columns=results.SCORE_COLUMNS).to_csv(out / 'scores.csv.gz', index=False)


def read_markdown(text):
    """[[{title: cell}] of each table]."""
    tables = [[[cell.strip() for cell in line.split('|')[1:-1]] for line in part.splitlines()] for part in text]
    return [[dict(zip(rows[0], row, strict=True)) for row in rows[2:]] for rows in tables]


def test_tables_and_plots_of_made_up_scores(tmp_path):
    write_results(tmp_path)
    main(['--table', '--out', str(tmp_path)])
    names = 'table.md', 'effects.png', 'gains.png', 'masks.png'
    drawn = [(tmp_path / name).read_bytes() for name in names]
    arm_rows, differences, (gain,), seeds = read_markdown(drawn[0].decode().split('\n\n'))
    rows = {row['arm']: row for row in arm_rows}
    mtl = rows['`mtl`: all tasks, equal weights']
    assert (mtl['folds'], mtl['learning rate'], mtl['minutes'], mtl['time / `unet`']) == ('3', '0.003', '6.0', '2.00')
    assert rows['constant prediction']['Dice'] == '0.550 ± 0.000'
    assert rows['`class`: class only']['Dice'] == rows['`mtl-50`: all tasks, 50 masks']['Dice'] == ''
    assert [row['kind'] for row in differences[:4]] == ['confirmatory'] * 3 + ['exploratory']
    first = differences[0]
    assert (first['difference'], first['of'], first['folds above 0']) == ('`mtl` - `unet`', 'Dice', '3 of 3')
    low, high = map(float, first['95 %, bootstrap'].split(' to '))
    assert 0.03 < low < float(first['mean']) < high < 0.07
    assert 0.0001 < float(first['p (Holm)']) < 0.05 and differences[3]['p (Holm)'] == ''
    assert gain['gain over single tasks'] == '`mtl`' and 6 < float(gain['Dice'].partition('%')[0]) < 8
    assert [row['found in 4 of 5 studies'] != '' for row in seeds] == [False, False, True]
    write_results(tmp_path, reverse=True)  # the order in which the runs ended
    main(['--table', '--out', str(tmp_path)])
    assert [(tmp_path / name).read_bytes() for name in names] == drawn


def test_gain_is_of_arms_that_differ_from_the_single_tasks_in_nothing_else(tmp_path):
    write_results(tmp_path)
    chosen = results.chosen_runs(results.read_runs(tmp_path))
    copies = [chosen.loc[['mtl']].rename({'mtl': name}) for name in ('mtl-800', 'mtl-imagenet', 'without-bbox')]
    found = tables.find_gains(pd.concat([chosen, *copies]))
    metrics = ['dice', 'accuracy', 'box_iou']
    assert {name: list(gain) for name, gain in found.items()} == {'mtl': metrics, 'without-bbox': metrics[:2]}


def test_effects_shows_what_only_the_losses_change():
    keys = ('mtl', 'unet', 'dice'), ('80-10-10', 'mtl', 'dice')
    others = ('mtl-50', 'unet-50', 'dice'), ('mtl-seed', 'mtl', 'dice'), ('sequential-200', 'unet-200', 'dice')
    assert list(tables.of_losses(dict.fromkeys(keys + others))) == list(keys)


def test_arms_are_compared_on_the_images_that_both_were_tested_on():
    tested = [('mtl', 0, 'a'), ('mtl', 0, 'b'), ('mtl', 1, 'c'), ('unet', 0, 'a'), ('unet', 0, 'b')]
    index = pd.MultiIndex.from_tuples(tested, names=['arm', 'fold', 'image'])
    scores = pd.DataFrame({'dice': [0.5, 0.75, 1, 0.5, 0.5]}, index)
    (part,) = tables.image_differences(scores, 'mtl', 'unet', 'dice')
    assert part.tolist() == [0, 0.25] and not tables.image_differences(scores, 'mtl', 'box', 'dice')
    scores.loc[('unet', 0, 'b'), 'dice'] = np.nan
    with pytest.raises(InputError, match='different images'):
        tables.image_differences(scores, 'mtl', 'unet', 'dice')


def test_data_and_results_that_cannot_be_used_are_told(tmp_path, capsys):
    main(['--table', '--out', str(tmp_path)])
    assert 'no learning rate is chosen yet' in capsys.readouterr().out
    with pytest.raises(InputError, match='fold0: no such folder'):
        main(['--data', str(tmp_path), '--out', str(tmp_path)])
    write_results(tmp_path)
    scores = results.read_text(tmp_path / 'scores.csv.gz')
    scores[scores['arm'] != 'mtl'].to_csv(tmp_path / 'scores.csv.gz', index=False)
    with pytest.raises(InputError, match='lacks the scores of .*mtl'):
        main(['--table', '--out', str(tmp_path)])
    (tmp_path / 'runs.csv').write_text('arm,fold,rate\nunet,0,0.001\n')
    with pytest.raises(InputError, match='another version of the study'):
        main(['--table', '--out', str(tmp_path)])


def test_page_shows_the_committed_table():
    root = Path(study.__file__).parent.parent
    table, *_ = (root / 'results/study/table.md').read_text().split('\n\n')
    assert table in (root / 'docs/study.md').read_text()

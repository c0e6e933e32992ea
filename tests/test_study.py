"""The study: what each arm trains on, which runs are missing, and the tables."""

import csv
import gzip
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import data_prepare
import data_rechunk
import engine
import study
import study_tables
from dataloader_mtl import RandomCropFlip
from models import MTLNet, UNet, load_model
from study import ARMS, PARTS, RATES, RunKey
from support.cli import InputError, Stopped
from support.report import write_csv


@pytest.fixture(scope='module')
def folds(tmp_path_factory):
    """Two folds of 24 drawn pets each, of 64 x 64."""
    root = tmp_path_factory.mktemp('folds')
    data_prepare.main(['--limit', '48', '--size', '64', '--folds', '2', '--out', str(root)])
    data_rechunk.rechunk(root)
    return root


def part_of(root, masks, tasks=MTLNet.tasks):
    part = study.load_fold(masks, root / 'fold0', tasks, None)['train']
    part.dataset.transform = RandomCropFlip(64, 64)
    return part


def test_masked_images_come_in_the_same_augmentation_with_and_without_others(folds):
    alone, together = part_of(folds, 10, UNet.tasks), part_of(folds, 10)
    assert len(alone) == len(together) > 10
    seen = []
    for epoch in 1, 2:
        one = study.draw_batches(3, False, alone, 1, study.MASKED, 0, epoch)
        both = study.draw_batches(3, True, together, 1, study.MASKED + study.OTHERS, 0, epoch)
        assert len(one) == len(both) == 3
        for number in range(3):
            first, second = one[number], both[number]
            assert len(first.image) == study.MASKED and len(second.image) == study.MASKED + study.OTHERS
            assert torch.equal(first.image, second.image[: study.MASKED])
            assert not first.mask.isnan().any() and second.mask[study.MASKED :].isnan().all()
            assert one.indices(number) == both.indices(number)[: study.MASKED]
        seen.append(both.indices(0))
    assert seen[0] != seen[1]


def test_images_are_shuffled_and_all_come_before_one_comes_again():
    drawn = np.array(study.repeat_shuffled(np.arange(5), 4, 5, 0, 1))
    assert [sorted(row) for row in drawn.tolist()] == [[0, 1, 2, 3, 4]] * 4
    assert drawn.tolist() != study.repeat_shuffled(np.arange(5), 4, 5, 0, 2)


def test_few_masks_are_the_same_for_all_networks_and_nested(folds):
    few, more = part_of(folds, 5, UNet.tasks), part_of(folds, 10)
    known = [set(np.flatnonzero(part.dataset.labelled['mask'])) for part in (few, more)]
    assert [len(each) for each in known] == [5, 10] and known[0] < known[1]
    assert len(few) == len(more)


@pytest.mark.parametrize('arm', ['unet', 'mtl', 'class', 'sequential', 'uncertainty'])
def test_arm_trains_and_its_result_is_added_once(folds, tmp_path, arm):
    key, out = RunKey(arm, 0, 1e-3), tmp_path / 'out'
    metrics = study.train_run(key, folds, tmp_path / 'run', epochs=2, steps=1)
    assert metrics['config']['arm'] == arm and metrics['config']['steps'] == 1
    study_tables.write_result(metrics, tmp_path / 'run')
    out.mkdir()
    for repeat in range(2):
        study_tables.add_result(out, key, tmp_path / 'run')
        if repeat == 0:
            (out / 'runs.csv').unlink()  # killed between the two files
    with gzip.open(out / 'scores.csv.gz', 'rt') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics['data']['test']['images'] and rows[0]['image']
    run = study_tables.read_runs(out)[key]
    assert (run['test_dice'] is None) == (arm == 'class') and run['masks'] == metrics['data']['train']['mask']
    (row,) = study_tables.read_table(out / 'runs.csv')
    assert ('log_variance.mask=' in row['learned_weighting']) == (arm == 'uncertainty')
    if arm == 'sequential':
        first = load_model(tmp_path / 'run' / 'first' / 'best.pt')
        assert type(first).__name__ == 'ClassBoxNet'


def test_sequential_starts_with_the_encoder_of_its_first_half(folds, tmp_path):
    study.train_run(RunKey('sequential', 0, 1e-3), folds, tmp_path, epochs=2, steps=1)
    first, model = load_model(tmp_path / 'first' / 'best.pt'), UNet()
    study.load_encoder(tmp_path / 'first' / 'best.pt', model)
    for one, two in zip(first.encoder.parameters(), model.encoder.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize('arm', ['unet-long', 'mtl-60', '80-10-10', 'mtl-imagenet'])
def test_run_is_trained_as_its_arm_says(arm, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(study.engine, 'train', lambda *arguments: calls.append(arguments))
    study.train_run(RunKey(arm, 2, 0.01), 'data', tmp_path)
    ((network, loss, args, plan),) = calls
    assert network is ARMS[arm].network and network.tasks == tuple(loss.weights)
    weights = {'80-10-10': [0.8, 0.1, 0.1]}.get(arm, [1 / len(network.tasks)] * len(network.tasks))
    assert list(loss.weights.values()) == pytest.approx(weights)
    assert (args.data, args.out, args.lr, args.seed) == ('data/fold2', str(tmp_path), 0.01, 2)
    assert (args.epochs, args.device, args.workers) == (study.EPOCHS, 'cpu', 0)
    long, imagenet = arm == 'unet-long', arm == 'mtl-imagenet'
    assert plan.draw.args == (study.STEPS * (2 if long else 1), not long)
    assert args.batch_size == (8 if long else 24)
    assert plan.load.args == (60 if arm == 'mtl-60' else None,)
    assert plan.recipe == (study.PRETRAINED if imagenet else study.SCRATCH)
    assert (args.encoder, args.encoder_weights) == (study.IMAGENET if imagenet else ('unet', 'none'))


def test_rates_are_chosen_first_on_fold_0_and_nothing_is_trained_twice():
    missing = study.missing_runs({}, list(ARMS), range(5))
    assert missing[:3] == [RunKey('unet', 0, rate) for rate in RATES]
    assert all(key.rate is None for key in missing if key.fold)
    searched = {key: {'val_dice': 0.5 + (key.rate == RATES[1]) / 10} for key in missing if key.rate}
    rest = study.missing_runs(searched, list(ARMS), range(5))
    assert not set(rest) & set(searched) and {key.rate for key in rest} == {RATES[1]}
    assert len(missing) == len(searched) + len(rest)
    runs = searched | dict.fromkeys(rest)
    assert study.missing_runs(runs, list(ARMS), range(5)) == []
    for names, count in PARTS:
        for name in names:
            assert {key.fold for key in runs if key.arm == name and key.rate == RATES[1]} == set(range(count))
    assert {name for names, _ in PARTS for name in names} == set(ARMS)


class FinishedProcess:
    """Stands in for the process of a run that ends at once; that of mtl-masked fails."""

    def __init__(self, key, folder):
        self.exitcode, self.terminated = int(key.arm == 'mtl-masked'), False
        folder.mkdir(parents=True)
        (folder / 'last.pt').write_bytes(b'')
        metrics = {'dice': {'mean': 0.8, 'constant': 0.5}}
        validation = {'dice': 0.7 + (key.rate == RATES[0]) / 10}
        found = {'test': metrics, 'validation': validation, 'best_epoch': 1, 'training_seconds': 60}
        found |= {'versions': {'torch': '2'}, 'machine': {'cpu': 'x86_64'}, 'data': {'train': {'mask': 70}}}
        found |= {'learned_weighting': {}}
        study_tables.write_result(found, folder)
        (folder / 'test_scores.csv').write_text('image,class,dice,mask_iou,accuracy,box_iou\npug_1,pug,0.8,,,\n')

    def is_alive(self):
        return self.terminated

    def terminate(self):
        self.terminated = True

    def join(self):
        pass


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """{RunKey: FinishedProcess} of the runs that are started; options for study.main."""
    started = {}

    def start(key, data, folder, threads):
        assert key not in started
        started[key] = FinishedProcess(key, folder)
        return started[key]

    monkeypatch.setattr(study, 'start_run', start)
    monkeypatch.setattr(study.time, 'sleep', lambda seconds: None)
    for fold in range(2):
        (tmp_path / f'fold{fold}').mkdir()
    options = '--data', str(tmp_path), '--out', str(tmp_path / 'out'), '--runs', str(tmp_path / 'runs')
    return started, [*options, '--jobs', '2', '--folds', '0', '1', '--only']


def test_all_runs_are_trained_and_a_failed_one_is_told(finished, tmp_path, capsys):
    started, options = finished
    with pytest.raises(InputError, match='2 runs failed; the same command goes on with them'):
        study.main([*options, 'unet', 'mtl', 'mtl-masked'])
    assert len(started) == 3 + 3 + 2 + 2
    assert set(started) >= {RunKey(arm, 1, RATES[0]) for arm in ('unet', 'mtl', 'mtl-masked')}
    done = study_tables.read_runs(tmp_path / 'out')
    assert set(done) == {key for key in started if key.arm != 'mtl-masked'}
    assert {path.parent.name[:10] for path in tmp_path.rglob('last.pt')} == {'mtl-masked'}
    assert '9 runs left, about' in capsys.readouterr().out
    started.clear()
    study.main([*options, 'unet'])
    assert not started and '| `unet`: mask alone | 2 |' in (tmp_path / 'out' / 'table.md').read_text()


def test_signal_stops_the_runs_that_are_being_trained(finished, monkeypatch):
    started, options = finished
    monkeypatch.setattr(study.time, 'sleep', lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(FinishedProcess, 'is_alive', lambda self: True)
    with pytest.raises(Stopped):
        study.main([*options, 'unet'])
    assert len(started) == 2 and all(process.terminated for process in started.values())


def test_missing_fold_is_told_before_any_run(finished, tmp_path):
    started, options = finished
    (tmp_path / 'fold1').rmdir()
    with pytest.raises(InputError, match='fold1: no such folder'):
        study.main([*options, 'unet'])
    assert not started


@pytest.mark.parametrize('error', [engine.Diverged('the loss is nan'), InputError('no such file')])
def test_process_of_a_run_writes_its_result_and_what_stopped_it(error, tmp_path, monkeypatch):
    """A run that diverged is a result; its learning rate is not chosen."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr(study, 'train_run', fail)
    key, folder = RunKey('unet', 0, RATES[2]), tmp_path / 'run'
    if diverged := isinstance(error, engine.Diverged):
        study.run_process(key, 'data', folder, torch.get_num_threads())
        study_tables.add_result(tmp_path, key, folder)
        runs = study_tables.read_runs(tmp_path)
        assert study_tables.chosen_rate(runs | {RunKey('unet', 0, RATES[0]): {'val_dice': 0.1}}, 'mtl-60', ARMS) is None
        assert (
            study_tables.chosen_rate(runs | {RunKey('unet', 0, RATES[0]): {'val_dice': 0.1}}, 'unet', ARMS) == RATES[0]
        )
    else:
        with pytest.raises(SystemExit):
            study.run_process(key, 'data', folder, torch.get_num_threads())
    assert str(error) in (folder / 'log.txt').read_text()
    assert (folder / 'result.json').exists() == diverged


def write_results(out, shift):
    """Made-up results of three folds: mtl has a Dice higher by `shift` than unet."""
    generator, runs, scores = np.random.default_rng(0), [], []
    for fold in range(3):
        for arm in 'unet', 'mtl', 'class', 'box':
            dice = np.clip(generator.normal(0.8, 0.05, 40) + shift * (arm == 'mtl'), 0, 1)
            about = {'arm': arm, 'fold': fold, 'rate': 0.003}
            scores += [
                about | {'image': f'{fold}_{i}', 'dice': value} for i, value in enumerate(dice) if arm != 'class'
            ]
            values = {'dice': None if arm == 'class' else dice.mean(), 'mask_iou': 0.7, 'accuracy': 0.5, 'box_iou': 0.6}
            run = about | {'masks': 70, 'minutes': 3, 'val_dice': 0.8, 'constant_dice': 0.55}
            runs.append(run | {f'test_{name}': value for name, value in values.items()})
    write_csv(study_tables.RUN_COLUMNS, runs, out / 'runs.csv')
    write_csv(study_tables.SCORE_COLUMNS, scores, out / 'scores.csv.gz')


def read_markdown(text):
    """[[{title: cell}] of each table]."""
    tables = [[[cell.strip() for cell in line.split('|')[1:-1]] for line in part.splitlines()] for part in text]
    return [[dict(zip(rows[0], row, strict=True)) for row in rows[2:]] for rows in tables]


def test_tables_of_made_up_scores(tmp_path, capsys):
    write_results(tmp_path, 0.05)
    study.main(['--table', '--out', str(tmp_path)])
    first = (tmp_path / 'table.md').read_bytes()
    arms, (difference,), (gain,) = read_markdown(first.decode().split('\n\n'))
    rows = {row['arm']: row for row in arms}
    assert difference['difference of test Dice'] == '`mtl` - `unet`' and difference['folds above 0'] == '3 of 3'
    low, high = map(float, difference['95 %, folds and images'].split(' to '))
    assert 0.02 < low < 0.05 < high < 0.08 and difference['p (Holm)'] == '< 0.001'
    assert float(difference['95 %, t of the folds'].split(' to ')[0]) < low
    mtl = rows['`mtl`: all tasks, equal weights']
    assert mtl['folds'] == '3' and mtl['learning rate'] == '0.003'
    assert gain['gain over single tasks'] == '`mtl`' and gain['Dice'].startswith('+6.')
    assert gain['accuracy'] == '+0.0% (+0.0% to +0.0%)' and gain['mean of its tasks'].startswith('+2.')
    assert rows['pet everywhere']['Dice'] == '0.550 ± 0.000'
    assert {path.name for path in tmp_path.iterdir()} >= {'table.md', 'effects.png', 'masks.png'}
    study.main(['--table', '--out', str(tmp_path)])
    assert (tmp_path / 'table.md').read_bytes() == first


def test_readme_shows_the_committed_table():
    root = Path(study.__file__).parent
    table, *_ = (root / 'results/study/table.md').read_text().split('\n\n')
    assert table in (root / 'README.md').read_text()


def test_gain_is_of_networks_with_the_same_images_as_the_single_tasks(tmp_path):
    write_results(tmp_path, 0.05)
    runs = study_tables.read_runs(tmp_path)
    chosen = study_tables.chosen_runs(runs, ARMS)
    found = study_tables.gains(runs, chosen, 'mtl', ARMS)
    assert found['mask', 'class', 'box'] == pytest.approx([gain / 3 for gain in found['mask',]])
    assert np.mean(found['mask', 'class', 'box']) == pytest.approx(0.05 / 0.8 / 3, rel=0.2)
    assert found['class',] == found['box',] == [0] * 3
    for name in 'mtl-60', 'mtl-masked', 'mtl-imagenet', 'unet-others':
        assert study_tables.gains(runs, chosen | {name: chosen['mtl']}, name, ARMS) == {}
    assert list(study_tables.gains(runs, chosen | {'without-bbox': chosen['mtl']}, 'without-bbox', ARMS)) == [
        ('mask',),
        ('class',),
        ('mask', 'class'),
    ]
    runs[chosen['mtl'][1]]['test_dice'] = None
    assert study_tables.gains(runs, chosen, 'mtl', ARMS) == {}


def test_runs_tested_on_different_images_are_refused():
    keys = [{0: RunKey(arm, 0, 1e-3)} for arm in ('mtl', 'unet')]
    dice = {keys[0][0]: {'a': 0.5, 'b': 0.75}, keys[1][0]: {'a': 0.5, 'b': 0.5}}
    assert study_tables.differences(dice, *keys)[0].tolist() == [0, 0.25]
    dice[keys[1][0]] = {'a': 0.5}
    with pytest.raises(InputError, match='different images'):
        study_tables.differences(dice, *keys)


def test_rate_is_chosen_by_the_metric_of_the_network():
    runs = {}
    for number, rate in enumerate(RATES):
        for arm, metric in ('unet', 'dice'), ('class', 'accuracy'), ('box', 'box_iou'):
            values = {f'val_{name}': None for name in study_tables.METRICS}
            runs[RunKey(arm, 0, rate)] = values | {f'val_{metric}': number / 10}
    rates = [study_tables.chosen_rate(runs, arm, ARMS) for arm in ('unet-long', 'class', 'box', 'mtl')]
    assert rates == [0.01] * 3 + [None]


def test_tables_leave_out_a_run_that_diverged(tmp_path):
    write_results(tmp_path, 0.05)
    key, folder = RunKey('mtl-60', 0, 0.003), tmp_path / 'run'
    folder.mkdir()
    study_tables.write_result(None, folder)
    study_tables.add_result(tmp_path, key, folder)
    study.main(['--table', '--out', str(tmp_path)])
    assert '`mtl-60`' in (tmp_path / 'table.md').read_text() and (tmp_path / 'masks.png').exists()


def test_results_that_are_missing_are_told(tmp_path):
    with pytest.raises(InputError, match='runs.csv: no such file'):
        study.main(['--table', '--out', str(tmp_path)])
    write_results(tmp_path, 0)
    (tmp_path / 'scores.csv.gz').unlink()
    with pytest.raises(InputError, match='scores.csv.gz: lacks'):
        study.main(['--table', '--out', str(tmp_path)])

"""The study: what each arm trains on, which runs are missing, and the tables."""

import csv
import gzip

import numpy as np
import pytest
import torch

import data_prepare
import data_rechunk
import study
import study_tables
from dataloader_mtl import RandomCropFlip
from models import MTLNet, UNet, load_model
from study import ARMS, PARTS, RATES, RunKey
from support.cli import InputError
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


def test_images_are_shuffled_and_all_come_before_one_comes_again():
    drawn = np.array(study.repeat_shuffled(np.arange(5), 4, 5, 0, 1))
    assert [sorted(row) for row in drawn.tolist()] == [[0, 1, 2, 3, 4]] * 4
    assert drawn.tolist() != study.repeat_shuffled(np.arange(5), 4, 5, 0, 2)


def test_few_masks_are_the_same_for_all_networks_and_nested(folds):
    few, more = part_of(folds, 5, UNet.tasks), part_of(folds, 10)
    known = [set(np.flatnonzero(part.dataset.labelled['mask'])) for part in (few, more)]
    assert [len(each) for each in known] == [5, 10] and known[0] < known[1]
    assert len(few) == len(more)


@pytest.mark.parametrize('arm', ['unet', 'mtl', 'class', 'sequential'])
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
    if arm == 'sequential':
        first = load_model(tmp_path / 'run' / 'first' / 'best.pt')
        assert type(first).__name__ == 'ClassBoxNet'


def test_sequential_starts_with_the_encoder_of_its_first_half(folds, tmp_path):
    study.train_run(RunKey('sequential', 0, 1e-3), folds, tmp_path, epochs=2, steps=1)
    first, model = load_model(tmp_path / 'first' / 'best.pt'), UNet()
    study.load_encoder(tmp_path / 'first' / 'best.pt', model)
    for one, two in zip(first.encoder.parameters(), model.encoder.parameters(), strict=True):
        assert torch.equal(one, two)


def test_rates_are_chosen_first_on_fold_0_and_nothing_is_trained_twice():
    missing = study.missing_runs({}, list(ARMS), range(5))
    assert missing[:3] == [RunKey('unet', 0, rate) for rate in RATES]
    searched = {key: {'val_dice': 0.5 + (key.rate == RATES[1]) / 10} for key in missing}
    rest = study.missing_runs(searched, list(ARMS), range(5))
    assert not set(rest) & set(searched) and {key.rate for key in rest} == {RATES[1]}
    runs = searched | dict.fromkeys(rest)
    assert study.missing_runs(runs, list(ARMS), range(5)) == []
    for names, count in PARTS:
        for name in names:
            assert {key.fold for key in runs if key.arm == name and key.rate == RATES[1]} == set(range(count))
    assert {name for names, _ in PARTS for name in names} == set(ARMS)


def test_all_runs_are_trained_two_at_a_time_and_a_failed_one_is_told(tmp_path, monkeypatch, capsys):
    """Processes stand in for the runs: they end at once, one of them badly."""
    started, alive = [], []

    class Process:
        def __init__(self, key, folder):
            self.exitcode = int(key.arm == 'mtl-masked')
            folder.mkdir(parents=True)
            metrics = {'dice': {'mean': 0.8, 'constant': 0.5}}
            validation = {'dice': 0.7 + (key.rate == RATES[0]) / 10}
            found = {'test': metrics, 'validation': validation, 'best_epoch': 1, 'training_seconds': 60}
            found |= {'versions': {'torch': '2'}, 'machine': {'cpu': 'x86_64'}}
            study_tables.write_result(found | {'data': {'train': {'mask': 70}}}, folder)
            (folder / 'test_scores.csv').write_text('image,class,dice,mask_iou,accuracy,box_iou\npug_1,pug,0.8,,,\n')

        def is_alive(self):
            alive.append(len(started))
            return False

    def start(key, data, folder, threads):
        started.append(key)
        return Process(key, folder)

    monkeypatch.setattr(study, 'start_run', start)
    monkeypatch.setattr(study.time, 'sleep', lambda seconds: None)
    options = '--out', str(tmp_path / 'out'), '--runs', str(tmp_path / 'runs'), '--jobs', '2', '--folds', '0', '1'
    with pytest.raises(InputError, match='2 runs failed; the same command goes on with them'):
        study.main([*options, '--only', 'unet', 'mtl', 'mtl-masked'])
    assert alive[0] == 2 and len(started) == len(set(started)) == 3 + 3 + 2 + 2
    assert set(started) >= {RunKey(arm, 1, RATES[0]) for arm in ('unet', 'mtl', 'mtl-masked')}
    done = study_tables.read_runs(tmp_path / 'out')
    assert set(done) == {key for key in started if key.arm != 'mtl-masked'}
    assert 'runs left, about' in capsys.readouterr().out
    started.clear()
    study.main([*options, '--only', 'unet'])
    assert started == [] and '| `unet`: mask alone | 2 |' in (tmp_path / 'out' / 'table.md').read_text()


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
            values = {'dice': dice.mean(), 'mask_iou': 0.7, 'accuracy': 0.5, 'box_iou': 0.6}
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
    arms, (difference,) = read_markdown(first.decode().split('\n\n'))
    rows = {row['arm']: row for row in arms}
    assert difference['difference of test Dice'] == '`mtl` - `unet`' and difference['folds above 0'] == '3 of 3'
    low, high = map(float, difference['95 %, folds and images'].split(' to '))
    assert 0.02 < low < 0.05 < high < 0.08 and float(difference['p (Holm)']) < 0.01
    assert float(difference['95 %, t of the folds'].split(' to ')[0]) < low
    mtl = rows['`mtl`: all tasks, equal weights']
    assert mtl['gain over single tasks'].startswith('+') and mtl['folds'] == '3' and mtl['learning rate'] == '0.003'
    assert rows['pet everywhere']['Dice'] == '0.550 ± 0.000'
    assert {path.name for path in tmp_path.iterdir()} >= {'table.md', 'effects.png', 'masks.png'}
    study.main(['--table', '--out', str(tmp_path)])
    assert (tmp_path / 'table.md').read_bytes() == first


def test_gain_is_of_networks_with_the_same_images_as_the_single_tasks(tmp_path):
    write_results(tmp_path, 0.05)
    runs = study_tables.read_runs(tmp_path)
    chosen = study_tables.chosen_runs(runs, ARMS)
    assert study_tables.gain(runs, chosen, 'mtl', ARMS) == pytest.approx(0.05 / 0.8 / 3, rel=0.2)
    for name in 'mtl-60', 'mtl-masked', 'mtl-imagenet':
        assert study_tables.gain(runs, chosen | {name: chosen['mtl']}, name, ARMS) is None


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
    assert [study.chosen_rate(arm, runs) for arm in ('unet-long', 'class', 'box', 'mtl')] == [0.01] * 3 + [None]


def test_tables_of_no_results_are_empty(tmp_path):
    study.main(['--table', '--out', str(tmp_path)])
    assert read_markdown((tmp_path / 'table.md').read_text().split('\n\n')) == [[], []]

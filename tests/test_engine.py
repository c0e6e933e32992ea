"""Training."""

import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    change_h5,
    damage_sample,
    read_checkpoints,
    read_folder,
    same_bits,
    train,
    training_options,
    with_row,
)
from PIL import Image

import data_rechunk
import dataloader_mtl
import engine
import evaluation
import train_mtl
from dataloader_mtl import LOADING, EpochBatches, MTLDataset, Sample
from models import MTLNet, UNet, load_model
from support import report
from support.checkpoint import TRAINING_FORMAT, load_checkpoint
from support.cli import InputError
from support.device import seed_everything
from support.report import draw_curves, read_commit
from utils import METRICS, POOLED, WeightedLoss

CPU = torch.device('cpu')
OFTEN = ('--checkpoint-minutes', '1e-9')  # a checkpoint after each step


def test_run_writes_what_the_readme_promises(shared_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, 'draw_curves', draw_curves)
    metrics = train(shared_data, tmp_path)
    files = 'best.pt curves.png last.pt log.csv metrics.json test_scores.csv'
    assert sorted(read_folder(tmp_path)) == files.split()
    with open(tmp_path / 'log.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['1', '2'] and float(rows[1]['val_dice']) > 0
    assert json.loads((tmp_path / 'metrics.json').read_text()) == metrics
    assert metrics['test'].keys() == METRICS.keys()
    for values in metrics['test'].values():
        assert values.keys() == {'images', 'mean', 'interval', 'flip_mean', 'flip_interval', 'constant'}
        assert values['interval'][0] <= values['mean'] <= values['interval'][1] and values['images'] == 12
    assert metrics['data']['test'] == {'images': 12, 'class': 12, 'mask': 12, 'box': 12}
    assert metrics['config']['seed'] == 0 and 'torch' in metrics['versions']
    assert metrics['config']['sizes'] == [[0.3, 0.375], [0.65, 0.5], [1, 0.75]] and metrics['config']['muon'] is True
    assert metrics['config']['commit'] == read_commit() and str(tmp_path) not in (tmp_path / 'metrics.json').read_text()
    assert Image.open(tmp_path / 'curves.png').size[0] > 600
    with open(tmp_path / 'test_scores.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    split = MTLDataset('test', root=shared_data).split
    assert [row['class'] for row in rows] == [split.class_names[label] for label in split.labels]
    for name, values in metrics['test'].items():
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(values['mean'], rel=1e-5)
    printed = capsys.readouterr().out
    assert printed.count('epoch 1/2: training loss mask ') == printed.count('epoch 2/2: training loss mask ') == 1
    for metric in (METRICS | POOLED).values():
        assert f'  {metric.printed}: ' in printed
    assert metrics['test_pooled'].keys() == POOLED.keys() and metrics['temperature'] is None
    lowest = sorted(float(row['dice']) for row in rows)[:8]
    assert list(metrics['worst_masks'].values()) == pytest.approx(lowest, rel=1e-5)


def test_epoch_with_the_best_validation_dice_is_tested_once(shared_data, tmp_path, monkeypatch):
    scores, scored, weights, original = iter([0.3, 0.9, 0.5, 0.7, 0.9]), [], [], evaluation.score

    def score(model, part, *args, **kw):
        split, kind = part.dataset.folder.name, type(model).__name__
        scored.append((split, kind))
        values, losses = original(model, part, *args, **kw)
        if kind == 'MTLNet':
            weights.append(next(model.parameters()).detach().half())
        return values | ({'dice': np.array([next(scores)])} if split == 'val' else {}), losses

    monkeypatch.setattr(evaluation, 'score', score)
    metrics = train(shared_data, tmp_path, '--epochs', 4, '--limit-batches', 1)
    assert scored == [('val', 'MTLNet')] * 5 + [('test', name) for name in ('MTLNet', 'FlipAveraged', 'ConstantNet')]
    assert metrics['best_epoch'] == 2 and metrics['validation']['dice'] == 0.9
    assert torch.equal(weights[5], weights[1]) and not torch.equal(weights[5], weights[3])


def test_seed_decides_the_weights_and_the_number_of_workers_changes_no_bit(shared_data, finished_run, tmp_path):
    train(shared_data, tmp_path, '--workers', 2)
    assert same_bits(read_checkpoints(finished_run), read_checkpoints(tmp_path))
    train(shared_data, tmp_path, '--seed', 1)
    weights = [load_checkpoint(out / 'last.pt', TRAINING_FORMAT)['model'] for out in (finished_run, tmp_path)]
    assert not same_bits(*weights)


@pytest.mark.parametrize('network', [MTLNet, UNet])
def test_batch_that_lost_its_labels_in_a_crop_has_a_zero_gradient(network):
    unknown = torch.full((1, 1, 64, 64), 255, dtype=torch.uint8)
    batch = Sample(torch.randn(1, 3, 64, 64), torch.full((1, 4), torch.nan), torch.tensor([-1]), unknown)
    model = network()
    total, losses = engine.Objective(model, WeightedLoss.equal(network.tasks), bfloat16=False)(batch)
    total.backward()
    assert total == 0 and {count for _, count in losses.values()} == {0}
    assert all(p.grad.abs().max() == 0 for p in model.parameters())


# ---- losses and weights that are not finite


def test_loss_that_is_not_finite_stops_the_run_and_names_the_samples(shared_data, finished_run, tmp_path, error_line):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    before = read_folder(tmp_path)
    options = training_options(shared_data, tmp_path, '--lr', '1e30', '--batch-size', 4, *OFTEN)
    line = error_line(train_mtl.main, *options, '--model', tmp_path / 'model.pt')
    found = re.search(
        r'epoch 1/2, step (\d+) of 9: the loss is \S+ \(mask .*class .*\) for the samples '
        r'(\d+) (\d+) (\d+) (\d+) of .*/train; .* try a lower --lr',
        line,
    )
    assert found, line
    shuffle = torch.Generator().manual_seed(seed_everything(0, 1))
    batch = torch.randperm(36, generator=shuffle)[4 * (int(found[1]) - 1) :][:4]
    assert sorted(batch.tolist()) == [int(number) for number in found.groups()[1:]]
    kept = read_folder(tmp_path)
    assert all(kept[name] == before[name] for name in ('best.pt', 'curves.png', 'log.csv'))
    last = load_checkpoint(tmp_path / 'last.pt', TRAINING_FORMAT)
    assert all(tensor.isfinite().all() for part in ('model', 'average') for tensor in last[part].values())


@pytest.mark.parametrize('more', [('--batch-size', 36), OFTEN], ids=['after an epoch', 'within an epoch'])
def test_weights_that_are_not_finite_are_not_saved(shared_data, finished_run, tmp_path, monkeypatch, more):
    """The loss of a step is finite, and the weights after it are not."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    before, step = read_folder(tmp_path), torch.optim.AdamW.step

    def overflow(self, *args, **kw):
        step(self, *args, **kw)
        self.param_groups[0]['params'][0].data[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, 'step', overflow)
    monkeypatch.setattr(engine, 'evaluate', lambda *args, **kw: {'dice': 0.5})
    with pytest.raises(InputError, match='epoch [12], step [01]: the weights are no longer finite'):
        train(shared_data, tmp_path, *more)
    assert before == read_folder(tmp_path)


# ---- data


@pytest.mark.parametrize(
    'files, spoil, message',
    [
        ('val/masks.h5', Path.unlink, 'val/masks.h5: no such file'),
        ('train/images.h5', lambda path: path.write_bytes(b'x' * 5000), 'not a valid HDF5 file'),
        (
            'test/[!n]*.h5',
            lambda path: change_h5(path, np.copy, preparation='another'),
            'do not belong together, their preparation differs',
        ),
        (
            '*/[im]*.h5',
            lambda path: change_h5(path, lambda pixels: np.pad(pixels, ((0, 0), (0, 0), (0, 8), (0, 0)))),
            'images of 72 x 64 pixels',
        ),
    ],
    ids=['missing', 'damaged', 'of two preparations', 'of a size that the networks cannot take'],
)
def test_bad_data_is_one_line(data, tmp_path, error_line, files, spoil, message):
    for path in data.glob(files):
        spoil(path)
    assert message in error_line(train_mtl.main, '--data', data, '--out', tmp_path / 'run')


def test_damage_found_by_a_worker_is_one_line(data, tmp_path, error_line):
    path = data / 'train' / 'images.h5'
    data_rechunk.rechunk_file(path, checksums=True)
    damage_sample(path, 7)
    line = error_line(train_mtl.main, '--data', data, '--out', tmp_path / 'run', '--workers', 1)
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    assert not workers  # Python would wait for them at the end of the script
    assert line.startswith('error: /') and 'sample 7 is damaged' in line


def kill_worker(monkeypatch):
    seed = EpochBatches.seed

    def seed_and_kill(self, number, use):
        if number == 1 and use == LOADING:
            os.kill(os.getpid(), signal.SIGKILL)
        return seed(self, number, use)

    monkeypatch.setattr(EpochBatches, 'seed', seed_and_kill)


def fail_in_worker(monkeypatch):
    monkeypatch.setattr(EpochBatches, '__getitem__', lambda *_: {}['no such key'])


def send_too_much(monkeypatch):
    """As where a batch does not fit into /dev/shm: it is made, and cannot be sent."""
    monkeypatch.setattr(EpochBatches, '__getitem__', lambda *_: lambda: 'cannot be pickled')


@pytest.mark.parametrize('spoil', [kill_worker, fail_in_worker, send_too_much])
def test_end_or_error_of_a_loading_process_is_one_line(shared_data, tmp_path, monkeypatch, error_line, spoil):
    spoil(monkeypatch)
    line = error_line(train_mtl.main, *training_options(shared_data, tmp_path / 'run', '--workers', 1))
    assert line.startswith('error: a process that loads data failed (') and '--workers 0' in line
    assert not multiprocessing.active_children()  # or Python would wait for them


@pytest.mark.parametrize(
    'split, stem, value, network',
    [
        ('train', 'bboxes', np.nan, MTLNet),
        ('train', 'breeds', -1, MTLNet),
        ('train', 'masks', 255, MTLNet),
        ('val', 'masks', 255, UNet),
        ('test', 'bboxes', np.nan, MTLNet),
    ],
)
def test_split_without_labels_of_a_task_trains(data, tmp_path, capsys, split, stem, value, network):
    change_h5(data / split / f'{stem}.h5', with_row(..., value))
    metrics = train(data, tmp_path / 'run', '--epochs', 1, '--limit-batches', 1, network=network)
    name = {'masks': 'dice', 'bboxes': 'box_iou', 'breeds': 'accuracy'}[stem]
    task = {'masks': 'mask', 'bboxes': 'box', 'breeds': 'class'}[stem]
    left_out = f'tasks without a training label, left out: {task}\n' in capsys.readouterr().out
    assert left_out == (split == 'train') == (task not in load_model(tmp_path / 'run' / 'best.pt').tasks)
    assert (name in metrics['validation']) == (split == 'test')
    assert (name in metrics['test']) == (split == 'val')


def test_class_without_training_samples_stays_a_class(data, tmp_path):
    change_h5(data / 'train' / 'breeds.h5', lambda labels: np.where(labels == 7, 2, labels))
    metrics = train(data, tmp_path / 'run', '--epochs', 1, '--limit-batches', 1)
    assert 'accuracy' in metrics['test']
    assert len(load_model(tmp_path / 'run' / 'best.pt').class_names) == 8


# ---- options


@pytest.mark.parametrize(
    'options',
    ['--epochs 0', '--epochs abc', '--batch-size -4', '--lr nan', '--lr -1', '--workers -1', '--seed -1']
    + ['--seed 99999999999', '--limit-batches 0', '--checkpoint-minutes 0', '--model .', '--model README.md/model.pt'],
)
def test_option_out_of_range_is_refused(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    option, value = options.split()
    with pytest.raises(SystemExit) as stopped:
        train_mtl.main([option, value, '--out', str(tmp_path / 'run')])
    assert stopped.value.code == 2 and f"{option}: '{value}' is " in capsys.readouterr().err


@pytest.mark.parametrize('processes, batch_size', [(4, 3), (17, 17)])  # 36 samples in 3 batches of 12
def test_batch_of_fewer_samples_than_processes_is_refused(shared_data, tmp_path, monkeypatch, processes, batch_size):
    monkeypatch.setattr(dataloader_mtl, 'get_world_size', lambda: processes)
    with pytest.raises(InputError, match=f'cannot be shared by {processes} processes'):
        train(shared_data, tmp_path, '--batch-size', batch_size)

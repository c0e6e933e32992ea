"""Training."""

import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, change_h5, damage_sample, read_folder, train, training_options, with_row

import data_rechunk
import dataloader_mtl
import engine
import evaluation
import train_mtl
from dataloader_mtl import LOADING, EpochBatches, MTLDataset, Sample
from models import MTLNet, UNet, load_model
from support.checkpoint import TRAINING_FORMAT, load_checkpoint
from support.cli import InputError
from support.device import seed_everything
from support.report import read_commit
from utils import METRICS, POOLED, WeightedLoss

OFTEN = ('--checkpoint-minutes', '1e-9')  # a checkpoint after each step


def test_run_writes_what_the_readme_promises(shared_data, finished_run):
    files = 'best.pt curves.png last.pt log.csv metrics.json test_scores.csv'
    assert sorted(read_folder(finished_run)) == files.split()
    rows = read_csv(finished_run / 'log.csv')
    assert [row['epoch'] for row in rows] == ['1', '2'] and float(rows[1]['val_dice']) > 0
    text = (finished_run / 'metrics.json').read_text()
    metrics = json.loads(text)
    assert str(finished_run) not in text and metrics['temperature'] is None
    assert metrics['config']['seed'] == 0 and metrics['config']['commit'] == read_commit()
    assert {'lr', 'crop', 'preparation', 'precision'} <= metrics['config'].keys()  # --resume compares all of these
    assert metrics['data']['test'] == {'images': 12, 'class': 12, 'mask': 12, 'box': 12}
    assert metrics['test'].keys() == METRICS.keys() and metrics['test_pooled'].keys() == POOLED.keys()
    for values in metrics['test'].values():
        assert values.keys() == {'images', 'mean', 'interval', 'flip_mean', 'flip_interval', 'constant'}
        assert values['interval'][0] <= values['mean'] <= values['interval'][1] and values['images'] == 12
    rows, split = read_csv(finished_run / 'test_scores.csv'), MTLDataset('test', root=shared_data).split
    assert [row['class'] for row in rows] == [split.class_names[label] for label in split.labels]
    for name, values in metrics['test'].items():
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(values['mean'], rel=1e-5)
    lowest = sorted(float(row['dice']) for row in rows)[:8]
    assert list(metrics['worst_masks'].values()) == pytest.approx(lowest, rel=1e-5)


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_the_best_epoch_has_the_highest_mean_of_the_first_metric_of_each_task():
    best = {'val_dice': 0.9, 'val_mask_iou': 0.8, 'val_accuracy': 0.7, 'val_box_iou': 0.6, 'val_loss_mask': 0.1}
    assert engine.selection_metrics(best) == ['dice', 'accuracy', 'box_iou']
    assert engine.is_better(best | {'val_dice': 0.89, 'val_box_iou': 0.62}, best)
    assert not engine.is_better(best | {'val_dice': 0.91, 'val_box_iou': 0.58, 'val_mask_iou': 0.9}, best)
    assert not engine.is_better(best, best) and engine.is_better(best, None)
    assert engine.is_better({'epoch': 2}, {'epoch': 1})  # without any label, the last


def test_best_epoch_is_tested_once(shared_data, tmp_path, monkeypatch):
    scores, scored, weights, original = iter([0.3, 0.9, 0.9, 0.9]), [], [], evaluation.score

    def score(model, part, *args, **kw):
        split, kind = part.dataset.folder.name, type(model).__name__
        scored.append((split, kind))
        values, losses = original(model, part, *args, **kw)
        if kind == 'MTLNet':
            weights.append(next(model.parameters()).detach().half())
        if split == 'val':  # the others equal, whatever the machine rounds
            values |= {'dice': np.array([next(scores)]), 'accuracy': np.zeros(1), 'box_iou': np.zeros(1)}
        return values, losses

    monkeypatch.setattr(evaluation, 'score', score)
    metrics = train(shared_data, tmp_path, '--epochs', 3, '--limit-batches', 1)
    assert scored == [('val', 'MTLNet')] * 4 + [('test', name) for name in ('MTLNet', 'FlipAveraged', 'ConstantNet')]
    assert metrics['best_epoch'] == 2 and metrics['validation']['dice'] == 0.9
    assert torch.equal(weights[4], weights[1]) and not torch.equal(weights[4], weights[2])


def test_batch_that_lost_its_labels_in_a_crop_has_a_zero_gradient():
    unknown = torch.full((1, 1, 64, 64), 255, dtype=torch.uint8)
    batch = Sample(torch.randn(1, 3, 64, 64), torch.full((1, 4), torch.nan), torch.tensor([-1]), unknown)
    model = MTLNet()
    total, losses = engine.Objective(model, WeightedLoss.equal(MTLNet.tasks), bfloat16=False)(batch)
    total.backward()
    assert total == 0 and {count for _, count in losses.values()} == {0}
    assert all(p.grad.abs().max() == 0 for p in model.parameters())


# ---- losses and weights that are not finite


def test_loss_that_is_not_finite_stops_the_run_and_names_the_samples(shared_data, finished_run, tmp_path, error_line):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    before = read_folder(tmp_path)
    options = training_options(shared_data, tmp_path, '--lr', '1e30', '--batch-size', 4, *OFTEN)
    line = error_line(train_mtl.main, *options)
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
    assert all(tensor.isfinite().all() for tensor in last['model'].values())


def test_weights_that_are_not_finite_are_not_saved(shared_data, finished_run, tmp_path, monkeypatch):
    """The loss of a step is finite, and the weights after it are not."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    before, step = read_folder(tmp_path), torch.optim.AdamW.step

    def overflow(self, *args, **kw):
        step(self, *args, **kw)
        self.param_groups[0]['params'][0].data[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, 'step', overflow)
    with pytest.raises(InputError, match='epoch 1, step 1: the weights are no longer finite'):
        train(shared_data, tmp_path, *OFTEN)
    assert before == read_folder(tmp_path)


# ---- data


def test_bad_data_is_one_line(data, tmp_path, error_line):
    """Each of them is found before the one above it."""

    def line():
        return error_line(train_mtl.main, '--data', data, '--out', tmp_path / 'run')

    for path in data.glob('*/[im]*.h5'):
        change_h5(path, lambda pixels: np.pad(pixels, ((0, 0), (0, 0), (0, 8), (0, 0))))
    assert 'images of 72 x 64 pixels; the networks take multiples of 16' in line()
    for path in data.glob('test/[!n]*.h5'):
        change_h5(path, np.copy, preparation='another')
    assert 'the splits do not belong together, their preparation differs' in line()
    (data / 'val' / 'masks.h5').unlink()
    assert 'val/masks.h5: no such file' in line()
    (data / 'train' / 'images.h5').write_bytes(b'x' * 5000)
    assert 'train/images.h5: not a valid HDF5 file' in line()


def damage_file(data, _):
    path = data / 'train' / 'images.h5'
    data_rechunk.rechunk_file(path, checksums=True)
    damage_sample(path, 7)


def kill_worker(_, monkeypatch):
    seed = EpochBatches.seed

    def seed_and_kill(self, number, use):
        if number == 1 and use == LOADING:
            os.kill(os.getpid(), signal.SIGKILL)
        return seed(self, number, use)

    monkeypatch.setattr(EpochBatches, 'seed', seed_and_kill)


def send_too_much(_, monkeypatch):
    """As where a batch does not fit into /dev/shm: it is made, and cannot be sent."""
    monkeypatch.setattr(EpochBatches, '__getitem__', lambda *_: lambda: 'cannot be pickled')


@pytest.mark.parametrize('spoil', [damage_file, kill_worker, send_too_much])
def test_error_or_end_of_a_loading_process_is_one_line(data, tmp_path, monkeypatch, error_line, spoil):
    spoil(data, monkeypatch)
    line = error_line(train_mtl.main, *training_options(data, tmp_path / 'run', '--workers', 1))
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    assert not workers  # Python would wait for them at the end of the script
    expected = r'a process that loads data failed \(.*--workers 0'
    if spoil is damage_file:
        expected = '/.*train/images.h5: sample 7 is damaged'
    assert re.match(f'error: {expected}', line), line


@pytest.mark.parametrize(
    'split, stem, unknown, task, metric, network',
    [
        ('train', 'bboxes', np.nan, 'box', 'box_iou', MTLNet),
        ('train', 'masks', 255, 'mask', 'dice', MTLNet),
        ('val', 'masks', 255, 'mask', 'dice', UNet),
        ('test', 'bboxes', np.nan, 'box', 'box_iou', MTLNet),
    ],
)
def test_split_without_labels_of_a_task_trains(data, tmp_path, capsys, split, stem, unknown, task, metric, network):
    change_h5(data / split / f'{stem}.h5', with_row(..., unknown))
    metrics = train(data, tmp_path / 'run', '--epochs', 1, '--limit-batches', 1, network=network)
    left_out = f'tasks without a training label, left out: {task}\n' in capsys.readouterr().out
    assert left_out == (split == 'train') == (task not in load_model(tmp_path / 'run' / 'best.pt').tasks)
    assert (metric in metrics['validation']) == (split == 'test')
    assert (metric in metrics['test']) == (split == 'val')


# ---- options


@pytest.mark.parametrize(
    'options',
    ['--epochs abc', '--batch-size 0', '--lr nan', '--workers -1', '--seed 99999999999', '--limit-batches 0']
    + ['--checkpoint-minutes 0', '--model .', '--model README.md/model.pt'],
)
def test_option_out_of_range_is_refused(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    option, value = options.split()
    with pytest.raises(SystemExit) as stopped:
        train_mtl.main([option, value, '--out', str(tmp_path / 'run')])
    assert stopped.value.code == 2 and f"{option}: '{value}' is " in capsys.readouterr().err


def test_batch_of_fewer_samples_than_processes_is_refused(shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader_mtl, 'get_world_size', lambda: 17)
    with pytest.raises(InputError, match='batches of 12 images cannot be shared by 17 processes'):
        train(shared_data, tmp_path, '--batch-size', 17)  # 36 samples in 3 batches of 12

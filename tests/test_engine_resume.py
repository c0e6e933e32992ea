"""Runs that are stopped, killed, resumed or not alone in their folder."""

import itertools
import math
import multiprocessing
import os
import re
import shutil
import signal

import pytest
import torch
from conftest import change_h5, read_checkpoints, read_folder, run_in_child, same_bits, train, training_options

import data_rechunk
import engine
import evaluation
import train_mtl
from models import MTLNet
from support import report
from support.checkpoint import TRAINING_FORMAT, load_checkpoint
from support.cli import InputError, Stopped, signals_blocked
from support.files import lock_folder
from utils import UncertaintyLoss

OFTEN = ('--checkpoint-minutes', '1e-9')  # a checkpoint after each step


def stop_at_step(monkeypatch, number, step):
    """Let the process send itself the signal `number` in the middle of its training step `step`."""
    original, count = torch.optim.AdamW.step, itertools.count(1)

    def optimizer_step(*args, **kw):
        original(*args, **kw)
        if next(count) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.optim.AdamW, 'step', optimizer_step)


def test_stopped_run_is_not_overwritten_and_resume_is_bit_exact(shared_data, tmp_path, monkeypatch):
    """Stopped in the middle of the first epoch, with a worker, and of the second.

    Dropout, augmentation and learned weights are part of it.
    """
    parts = tmp_path / 'parts'

    def run(out, *options):
        train(shared_data, out, *options, weighting=UncertaintyLoss(MTLNet.tasks))

    run(tmp_path / 'whole', '--resume', 'auto')
    with pytest.raises(InputError, match='last.pt: no such file'):
        run(parts, '--resume')
    for epoch, steps, options in (1, 2, ('--workers', 1)), (2, 3, ('--resume',)):
        message = f'stopped in epoch {epoch}, after 2 .*last.pt is written; continue with the same command and --resume'
        with monkeypatch.context() as patch:
            stop_at_step(patch, signal.SIGTERM, steps)
            with pytest.raises(Stopped, match=message) as stopped:
                run(parts, *options)
        assert stopped.value.status == 143
    before = read_folder(parts)
    with pytest.raises(InputError, match='holds an unfinished run; --resume continues it'):
        run(parts)
    assert before == read_folder(parts)
    run(parts, '--resume', 'auto')
    assert same_bits(read_checkpoints(tmp_path / 'whole'), read_checkpoints(parts))


def test_signal_during_evaluation_loses_no_step(shared_data, finished_run, tmp_path, monkeypatch):
    """It ends the evaluation after the batch."""
    evaluated, to_device, split = [], evaluation.to_device, evaluation.split_batches

    def signal_in_evaluation(batch, device):
        evaluated.append(len(batch.image))
        os.kill(os.getpid(), signal.SIGINT)
        return to_device(batch, device)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, 'to_device', signal_in_evaluation)
        patch.setattr(evaluation, 'split_batches', lambda order, size: split(order, 4))
        with pytest.raises(Stopped, match='in epoch 1, after 3 steps') as stopped:
            train(shared_data, tmp_path)
    assert stopped.value.status == 130 and evaluated == [4]
    train(shared_data, tmp_path, '--resume')
    assert same_bits(read_checkpoints(finished_run), read_checkpoints(tmp_path))


def test_signal_after_the_test_says_that_the_run_is_finished(shared_data, finished_run, tmp_path, monkeypatch):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'metrics.json').unlink()
    write = report.write_metrics
    monkeypatch.setattr(report, 'write_metrics', lambda *args: signal.raise_signal(signal.SIGTERM) or write(*args))
    with pytest.raises(Stopped, match='stopped after the run in .* had finished') as stopped:
        train(shared_data, tmp_path, '--resume')
    assert stopped.value.status == 143 and (tmp_path / 'metrics.json').exists()


def test_resume_with_other_settings_is_refused_and_with_other_threads_or_another_commit_it_says_so(capsys):
    old = {'lr': 0.1, 'precision': 'fp8', 'threads': 1, 'commit': 'a'}
    engine.compare_settings('last.pt', old, old)
    assert capsys.readouterr().out == ''
    engine.compare_settings('last.pt', old, old | {'threads': 7, 'commit': 'b'})
    assert capsys.readouterr().out == (
        'last.pt: commit was a and is b; the weights may differ from those of an uninterrupted run\n'
        'last.pt: threads was 1 and is 7; the weights may differ from those of an uninterrupted run\n'
    )
    with pytest.raises(InputError, match='last.pt: another configuration, lr was 0.1 and is 0.2; use the same options'):
        engine.compare_settings('last.pt', old, old | {'lr': 0.2})
    with pytest.raises(InputError, match='precision was fp8 and is float32; go on where the device is as fast in bfl'):
        engine.compare_settings('last.pt', old, old | {'precision': 'float32'})


def test_signal_to_the_process_group_waits_for_the_step(shared_data, tmp_path):
    """As from the terminal, timeout or torchrun, twice at once: the workers get it as well."""
    out, step, count = tmp_path / 'run', torch.optim.AdamW.step, itertools.count(1)

    def signal_group(*args, **kw):
        step(*args, **kw)
        done = next(count)
        if done == 2:  # both workers have given a batch, and have to give more after the signal
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGTERM)
        elif done == 12:
            with signals_blocked():
                os.killpg(0, signal.SIGINT)
                os.killpg(0, signal.SIGTERM)

    def before():
        os.setsid()
        torch.optim.AdamW.step = signal_group

    options = training_options(shared_data, out, '--batch-size', 1, '--workers', 2)
    status, printed = run_in_child(train_mtl.main, options, tmp_path / 'log', before), (tmp_path / 'log').read_text()
    assert status == 130 and 'Traceback' not in printed, printed
    assert printed.splitlines()[-1].endswith('last.pt is written; continue with the same command and --resume')
    assert load_checkpoint(out / 'last.pt', TRAINING_FORMAT)['steps'] == 12


def test_checkpoints_within_an_epoch_when_it_is_time(shared_data, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        engine, 'save_last', lambda _, state: written.append(3 * len(state['history']) + state['steps'])
    )
    train(shared_data, tmp_path, '--epochs', 1, *OFTEN)
    assert written == [1, 2, 3]
    written.clear()
    train(shared_data, tmp_path, '--epochs', 1)
    assert written == [3]


def test_run_stopped_before_its_first_step_leaves_a_finished_one(shared_data, finished_run, tmp_path, monkeypatch):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    before, choose = read_folder(tmp_path), engine.choose_device
    monkeypatch.setattr(engine, 'choose_device', lambda name: (signal.raise_signal(signal.SIGTERM), choose(name))[1])
    with pytest.raises(Stopped):
        train(shared_data, tmp_path)
    assert before == read_folder(tmp_path)


def test_resume_on_other_files_made_elsewhere_is_refused(original_files, tmp_path):
    root = original_files()
    data_rechunk.rechunk(root)
    train(root, tmp_path / 'run', '--epochs', 1)
    train(root, tmp_path / 'run', '--epochs', 1, '--resume')
    change_h5(root / 'train' / 'bboxes.h5', lambda boxes: boxes[::-1])
    with pytest.raises(InputError, match='another configuration, preparation was checksum'):
        train(root, tmp_path / 'run', '--epochs', 1, '--resume')


def change_last(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def fill_with_nan(last):
    weights = (tensor for tensor in last['model'].values() if tensor.is_floating_point())
    next(weights).fill_(math.nan)


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), 'not a valid checkpoint'),
        (lambda path: change_last(path, lambda last: last.pop('steps')), "does not fit this training .'steps'"),
        (lambda path: change_last(path, lambda last: last['model'].popitem()), 'does not fit this training'),
        (lambda path: change_last(path, lambda last: last['optimizer']['param_groups'].pop()), 'does not fit'),
        (lambda path: change_last(path, fill_with_nan), 'some of its weights are not finite'),
    ],
    ids=['truncated', 'entry', 'model', 'optimizer', 'NaN'],
)
def test_damaged_last_checkpoint_is_one_line_and_left_as_it_was(
    shared_data, finished_run, tmp_path, error_line, damage, message
):
    (tmp_path / 'last.pt').write_bytes((finished_run / 'last.pt').read_bytes())
    damage(tmp_path / 'last.pt')
    before = read_folder(tmp_path)
    line = error_line(train_mtl.main, *training_options(shared_data, tmp_path, '--resume', 'auto'))
    assert re.search(f'last.pt: .*{message}', line) and len(line) < 500, line
    assert before == read_folder(tmp_path)


def test_data_and_run_may_be_moved_and_missing_files_are_made_again_from_the_last_checkpoint(
    data, finished_run, tmp_path, monkeypatch
):
    (tmp_path / 'moved').mkdir()
    shutil.copy(finished_run / 'last.pt', tmp_path / 'moved')
    monkeypatch.chdir(tmp_path)
    train(f'./{data.name}/', 'moved', '--resume', '--workers', 1)
    assert same_bits(read_checkpoints(finished_run), read_checkpoints(tmp_path / 'moved'))
    for name in 'log.csv', 'curves.png':
        assert (finished_run / name).read_bytes() == (tmp_path / 'moved' / name).read_bytes()


def test_kill_after_last_checkpoint_mixes_no_files_of_two_runs(shared_data, finished_run, tmp_path):
    """When best.pt, log.csv and curves.png are still those of an earlier, finished run, of other weights."""
    train(shared_data, tmp_path, '--seed', 1)
    earlier = (tmp_path / 'best.pt').read_bytes()
    assert earlier != (finished_run / 'best.pt').read_bytes()  # the seed decides the weights

    def before():
        engine.write_epoch = lambda run: os.kill(os.getpid(), signal.SIGKILL)

    options, log = training_options(shared_data, tmp_path), tmp_path.parent / 'log'
    assert run_in_child(train_mtl.main, options, log, before) == -signal.SIGKILL
    assert (tmp_path / 'best.pt').read_bytes() == earlier and not (tmp_path / 'metrics.json').exists()
    train(shared_data, tmp_path, '--resume')
    assert same_bits(read_checkpoints(finished_run), read_checkpoints(tmp_path))


def test_second_run_in_a_folder_is_refused(shared_data, tmp_path):
    out, log = tmp_path / 'run', tmp_path / 'log'
    with lock_folder(out):
        assert run_in_child(train_mtl.main, training_options(shared_data, out), log) == 1
    assert 'another process is writing to this folder' in log.read_text() and not read_folder(out)

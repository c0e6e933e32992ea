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


@pytest.fixture
def stop_run(shared_data, monkeypatch):
    """Function that trains like `finished_run` and stops in the second epoch, after 2 of its 3 steps."""

    def stop(out, *more):
        with monkeypatch.context() as patch:
            stop_at_step(patch, signal.SIGTERM, 5)
            with pytest.raises(Stopped, match='stopped in epoch 2, after 2 steps of it; .*last.pt is written'):
                train(shared_data, out, *more)

    return stop


def test_resume_is_bit_exact(shared_data, tmp_path, monkeypatch):
    """In the middle of the first epoch, with a worker, and after its last step.

    Dropout, augmentation and learned weights are part of it.
    """

    def run(name, *options):
        train(shared_data, tmp_path / name, *options, weighting=UncertaintyLoss(MTLNet.tasks))

    run('whole')
    for here, steps, more in (2, 2, ('--workers', 1)), (1, 3, ('--resume',)):
        with monkeypatch.context() as patch:
            stop_at_step(patch, signal.SIGTERM, here)
            with pytest.raises(Stopped, match='continue with the same command and --resume') as stopped:
                run('parts', *more)
        assert stopped.value.status == 143
        last = load_checkpoint(tmp_path / 'parts' / 'last.pt', TRAINING_FORMAT)
        assert len(last['history']) * 3 + last['steps'] == steps
    run('parts', '--resume')
    assert same_bits(read_checkpoints(tmp_path / 'whole'), read_checkpoints(tmp_path / 'parts'))


def test_signal_during_evaluation_loses_no_step(shared_data, finished_run, tmp_path, monkeypatch):
    """It ends the evaluation after the batch."""
    evaluated, to_device, loader = [], evaluation.to_device, evaluation.evaluation_loader

    def signal_in_evaluation(batch, device):
        evaluated.append(len(batch.image))
        os.kill(os.getpid(), signal.SIGINT)
        return to_device(batch, device)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, 'to_device', signal_in_evaluation)
        patch.setattr(evaluation, 'evaluation_loader', lambda part, size, workers: loader(part, 4, workers))
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


def test_resume_says_if_the_number_of_threads_or_the_commit_has_changed(
    shared_data, finished_run, tmp_path, monkeypatch, capsys
):
    shutil.copytree(finished_run, tmp_path / 'run')
    train(shared_data, tmp_path / 'run', '--resume')
    assert 'the weights may differ' not in capsys.readouterr().out
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 7)
    monkeypatch.setattr(report, 'read_commit', lambda: 'another')
    train(shared_data, tmp_path / 'run', '--resume')
    printed = capsys.readouterr().out
    assert 'last.pt: threads was 1 and is 7; the weights may differ' in printed
    assert re.search('last.pt: commit was .* and is another; the weights may differ', printed)


@pytest.mark.parametrize(
    'change, message',
    [
        (('lr', 0.1), 'lr was 0.1 and is 0.003; use the same options, or another --out'),
        (('crop', (0.3, 1.0)), r'crop was \(0.3, 1.0\) and is \(0.25, 1.0\); use the same options'),
        (('preparation', 'x'), 'preparation was x and is [0-9a-f]+; use the same options'),
        (('precision', 'fp8'), 'precision was fp8 .*; go on where the device is as fast in bfloat16 as before, or'),
    ],
)
def test_resume_with_other_options_recipe_data_or_precision_says_what_to_do(
    shared_data, finished_run, tmp_path, change, message
):
    shutil.copytree(finished_run, tmp_path / 'run')
    change_last(tmp_path / 'run' / 'last.pt', lambda last: last['config'].update([change]))
    with pytest.raises(InputError, match=f'last.pt: another configuration, {message}'):
        train(shared_data, tmp_path / 'run', '--resume')


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

    options = training_options(shared_data, out, '--batch-size', 1, '--workers', 2, '--model', tmp_path / 'model.pt')
    status, printed = run_in_child(train_mtl.main, options, tmp_path / 'log', before), (tmp_path / 'log').read_text()
    assert status == 130 and 'Traceback' not in printed, printed
    assert printed.splitlines()[-1].endswith('last.pt is written; continue with the same command and --resume')
    assert load_checkpoint(out / 'last.pt', TRAINING_FORMAT)['steps'] == 12


def test_checkpoints_within_an_epoch_when_it_is_time(shared_data, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        engine, 'save_last', lambda _, state: written.append(3 * len(state['history']) + state['steps'])
    )
    train(shared_data, tmp_path, *OFTEN)
    assert written == [1, 2, 3, 4, 5, 6]
    written.clear()
    train(shared_data, tmp_path)
    assert written == [3, 6]


def test_unfinished_run_is_not_overwritten_without_resume(shared_data, tmp_path, stop_run):
    with pytest.raises(InputError, match='last.pt: no such file'):
        train(shared_data, tmp_path, '--resume')
    stop_run(tmp_path)
    before = read_folder(tmp_path)
    with pytest.raises(InputError, match='holds an unfinished run; --resume continues it'):
        train(shared_data, tmp_path)
    assert before == read_folder(tmp_path)


def test_run_stopped_before_its_first_step_leaves_a_finished_one(shared_data, finished_run, tmp_path, monkeypatch):
    for name, content in read_folder(finished_run).items():
        (tmp_path / name).write_bytes(content)
    before, choose = read_folder(tmp_path), engine.choose_device
    monkeypatch.setattr(engine, 'choose_device', lambda name: (signal.raise_signal(signal.SIGTERM), choose(name))[1])
    with pytest.raises(Stopped):
        train(shared_data, tmp_path)
    assert before == read_folder(tmp_path)


@pytest.mark.parametrize('missing', [(), ('last.pt', 'best.pt', 'log.csv', 'curves.png')], ids=['goes on', 'starts'])
def test_resume_auto(shared_data, finished_run, tmp_path, stop_run, capsys, missing):
    stop_run(tmp_path)
    for name in missing:
        (tmp_path / name).unlink()
    train(shared_data, tmp_path, '--resume', 'auto')
    assert same_bits(read_checkpoints(finished_run), read_checkpoints(tmp_path))
    assert ('resuming from' in capsys.readouterr().out) == (not missing)


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


def fill_with_nan(part):
    return lambda last: [tensor.fill_(math.nan) for tensor in last[part].values() if tensor.is_floating_point()]


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), 'not a valid checkpoint'),
        (lambda path: change_last(path, lambda last: last.update(format='training 1')), "of the format 'training 1'"),
        (lambda path: change_last(path, lambda last: last.pop('steps')), "does not fit this training .'steps'"),
        (lambda path: change_last(path, lambda last: last['model'].popitem()), 'does not fit this training'),
        (lambda path: change_last(path, lambda last: last['optimizer']['param_groups'].pop()), 'does not fit'),
        (lambda path: change_last(path, fill_with_nan('model')), 'some of its weights are not finite'),
        (lambda path: change_last(path, fill_with_nan('average')), 'some of its weights are not finite'),
    ],
    ids=['truncated', 'format', 'entry', 'model', 'optimizer', 'model NaN', 'average NaN'],
)
def test_damaged_last_checkpoint_is_one_line_and_left_as_it_was(
    shared_data, finished_run, tmp_path, error_line, damage, message
):
    (tmp_path / 'last.pt').write_bytes((finished_run / 'last.pt').read_bytes())
    damage(tmp_path / 'last.pt')
    before = read_folder(tmp_path)
    options = training_options(shared_data, tmp_path, '--resume', 'auto', '--model', tmp_path / 'model.pt')
    line = error_line(train_mtl.main, *options)
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
    """When best.pt, log.csv and curves.png are still those of an earlier, finished run."""
    train(shared_data, tmp_path, '--seed', 1)
    earlier = (tmp_path / 'best.pt').read_bytes()

    def before():
        engine.write_epoch = lambda run: os.kill(os.getpid(), signal.SIGKILL)

    options = training_options(shared_data, tmp_path, '--model', tmp_path / 'model.pt')
    assert run_in_child(train_mtl.main, options, tmp_path.parent / 'log', before) == -signal.SIGKILL
    assert (tmp_path / 'best.pt').read_bytes() == earlier and not (tmp_path / 'metrics.json').exists()
    train(shared_data, tmp_path, '--resume')
    assert same_bits(read_checkpoints(finished_run), read_checkpoints(tmp_path))


def test_second_run_in_a_folder_is_refused(shared_data, tmp_path):
    out, log = tmp_path / 'run', tmp_path / 'log'
    options = training_options(shared_data, out, '--model', tmp_path / 'model.pt')
    with lock_folder(out):
        assert run_in_child(train_mtl.main, options, log) == 1
    assert 'another process is writing to this folder' in log.read_text() and not read_folder(out)

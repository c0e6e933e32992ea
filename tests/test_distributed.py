"""Data-parallel training. All but one of the tests fork the ranks that torchrun would start."""

import csv
import itertools
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_checkpoints, same_bits, start_child, training_options, wait_for
from torch.nn.parallel import DistributedDataParallel

import engine
import oeq_weighting
import train_mtl
from dataloader_mtl import Sample, load_splits
from models import MTLNet, load_model
from support.checkpoint import TRAINING_FORMAT, load_checkpoint
from support.cli import InputError
from support.device import has_fast_bfloat16
from support.distributed import (
    all_gather,
    get_rank,
    get_world_size,
    is_main_process,
    on_main_process,
    print_once,
    process_group,
)
from support.report import entries
from utils import PRINTED, UncertaintyLoss

CPU = torch.device('cpu')


def run_ranks(main, arguments, log, before=lambda: None, size=2):
    """The exit statuses of a script's ranks; each prints to a file of its own, `log` and its number."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        group = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(free.getsockname()[1])}

    def start(rank):
        def set_rank():
            os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
            before()

        return start_child(main, arguments, f'{log}{rank}', set_rank)

    return [wait_for(child) for child in [start(rank) for rank in range(size)]]


def printed(log, size=2):
    return [open(f'{log}{rank}').read() for rank in range(size)]


# ---- messages between ranks


def test_ranks_share_values_and_the_errors_of_rank_0(tmp_path):
    calls = []

    def fail():
        raise FileExistsError(17, 'File exists', 'README.md')

    def refuse():
        raise InputError('refused by rank 0')

    def main(_):
        with process_group('cpu'), process_group('cpu'):  # joined once
            rank = get_rank()
            assert all_gather({'rank': rank}) == [{'rank': 0}, {'rank': 1}]
            assert on_main_process(lambda: calls.append(rank) or f'of rank {rank}') == 'of rank 0'
            assert calls == ([0] if rank == 0 else [])
            print_once('once')
            with pytest.raises(FileExistsError if rank == 0 else InputError, match='File exists.*README.md'):
                on_main_process(fail)
            on_main_process(refuse)

    assert run_ranks(main, [], tmp_path / 'log') == [1, 1], printed(tmp_path / 'log')
    first, second = printed(tmp_path / 'log')
    assert first == 'once\nerror: refused by rank 0\n' and second == 'error: refused by rank 0\n'


@pytest.mark.parametrize(
    'environment',
    [
        {'WORLD_SIZE': '4', 'RANK': '1', 'LOCAL_RANK': '1'},
        {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '0'},
    ],
    ids=['of a batch system', 'of another launcher'],
)
def test_one_process_is_alone_whatever_the_environment_says(monkeypatch, environment):
    """SLURM and MPI set some of these names without a group to join; launchers need not set the local ones."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    with process_group('cpu'):
        assert (get_rank(), get_world_size(), is_main_process()) == (0, 1, True)
        assert all_gather('a') == ['a'] and on_main_process(lambda: 5) == 5
    torch.set_num_threads(threads)


# ---- training


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Also where a share has none of a task's labels."""

    def gradient(path):
        with process_group('cpu'):
            torch.manual_seed(0)
            model = MTLNet(n_classes=4).eval()  # no dropout and no statistics of the batch
            objective = engine.Objective(model, UncertaintyLoss(MTLNet.tasks), bfloat16=False)
            batch = Sample(
                image=torch.randn(4, 3, 64, 64),
                bbox=torch.rand(4, 4).sort()[0],
                label=torch.tensor([0, 1, -1, 3]),
                mask=torch.ones(4, 1, 64, 64, dtype=torch.uint8),
            )
            batch.bbox[1:], batch.mask[::2] = torch.nan, 255  # rank 0 has no mask and the only box
            rank, size = get_rank(), get_world_size()
            module = DistributedDataParallel(objective, find_unused_parameters=True) if size > 1 else objective
            module(Sample(*(part[rank::size] for part in batch)))[0].backward()
            if rank == 0:
                torch.save({name: p.grad for name, p in objective.named_parameters()}, path)

    together, alone = tmp_path / 'together.pt', tmp_path / 'alone.pt'
    assert run_ranks(lambda _: gradient(together), [], tmp_path / 'log') == [0, 0], printed(tmp_path / 'log')
    gradient(alone)
    together, alone = torch.load(together), torch.load(alone)
    assert together.keys() == alone.keys() and any(grad.any() for grad in alone.values())
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=1e-3)


def test_two_processes_train_one_model_and_report_its_metrics(shared_data, tmp_path):
    out, log = tmp_path / 'uncertainty', tmp_path / 'log'
    options = training_options(shared_data, tmp_path, '--only', 'uncertainty')
    assert run_ranks(oeq_weighting.main, options, log) == [0, 0], printed(log)
    first, second = printed(log)
    assert all(first.count(f'  {name}: ') == 1 for name in PRINTED.values()), first
    assert [first.count(f'epoch {epoch}/2: training loss mask ') for epoch in (1, 2)] == [1, 1]
    assert not any(word in second for word in ('network', 'epoch', 'Dice', 'weighting'))
    metrics = json.loads((out / 'metrics.json').read_text())
    assert metrics['config']['processes'] == 2
    splits = load_splits(shared_data, MTLNet.tasks)
    expected, _, scores = engine.run_test(load_model(out / 'best.pt'), splits, CPU)
    with open(out / 'test_scores.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    for metric, values in metrics['test'].items():
        assert [float(row[metric]) for row in rows] == pytest.approx(scores[metric], rel=1e-4), metric
        for key, value in values.items():
            assert value == pytest.approx(expected[metric][key], rel=1e-5), (metric, key)
    # A model file holds rounded weights; last.pt has those that were validated.
    last, model = load_checkpoint(out / 'last.pt', TRAINING_FORMAT), MTLNet(n_classes=8)
    model.load_state_dict(last['model'])
    expected = engine.evaluate(model, splits['val'], CPU, bfloat16=has_fast_bfloat16(CPU))
    assert entries(last['history'][-1], 'val_') == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_signal_to_one_of_two_processes_stops_both_after_the_step_and_both_go_on(shared_data, tmp_path):
    def run(name, *more, stop_at=None):
        step, count = torch.optim.AdamW.step, itertools.count(1)

        def stop_rank_1(*args, **kw):
            step(*args, **kw)
            if next(count) == stop_at and get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def before():
            torch.optim.AdamW.step = stop_rank_1

        options, log = training_options(shared_data, tmp_path / name, '--epochs', 1, *more), tmp_path / 'log'
        return run_ranks(train_mtl.main, options, log, before), printed(log)

    assert run('whole')[0] == [0, 0]
    statuses, lines = run('parts', stop_at=2)
    assert statuses == [143, 143] and all('in epoch 1, after 2 steps of it' in text for text in lines), lines
    assert load_checkpoint(tmp_path / 'parts' / 'last.pt', TRAINING_FORMAT)['steps'] == 2
    assert run('parts', '--resume')[0] == [0, 0]
    assert same_bits(read_checkpoints(tmp_path / 'whole'), read_checkpoints(tmp_path / 'parts'))


def test_loss_of_one_rank_that_is_not_finite_stops_both(shared_data, tmp_path):
    def before():
        forward = engine.Objective.forward

        def spoiled(self, batch):
            total, losses = forward(self, batch)
            return total * (torch.nan if get_rank() == 1 else 1), losses

        engine.Objective.forward = spoiled

    log = tmp_path / 'log'
    assert run_ranks(train_mtl.main, training_options(shared_data, tmp_path / 'run'), log, before) == [1, 1]
    assert all('error: epoch 1/2, step 1 of 3: the loss is' in text for text in printed(log))
    assert not (tmp_path / 'run' / 'last.pt').exists()


@pytest.mark.slow
def test_torchrun(shared_data, tmp_path):
    script = [str(ROOT / 'train_mtl.py'), *training_options(shared_data, tmp_path / 'run'), '--epochs', '1']
    script += ['--limit-batches', '1', '--batch-size', '2', '--model', str(tmp_path / 'model.pt')]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('epoch 1/1') == 1
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text())['config']['processes'] == 2

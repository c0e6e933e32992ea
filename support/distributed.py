"""Data-parallel training: `torchrun --nproc-per-node N train_mtl.py`. Without a launcher, one process.

How a batch is shared by the ranks: `dataloader_mtl.split_batches`. How their losses are averaged: `engine.Objective`.
"""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist

from support.cli import InputError, reason

RENDEZVOUS = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')  # all set by a launcher


@contextmanager
def process_group(device_name):
    """Join the processes that torchrun or another launcher started, if this one has not joined yet."""
    if dist.is_initialized() or not all(name in os.environ for name in RENDEZVOUS):
        yield
        return
    cuda = device_name != 'cpu' and torch.cuda.is_available()
    if cuda:
        rank = int(os.environ['RANK'])
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', rank % torch.cuda.device_count())))
    else:  # torchrun asks for a single thread, however many cores there are
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', os.environ['WORLD_SIZE']))))
    dist.init_process_group('nccl' if cuda else 'gloo')
    try:
        yield
    finally:
        dist.destroy_process_group()


def get_rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    """Whether this is rank 0, which prints and writes."""
    return get_rank() == 0


def print_once(line):
    """Print a line on rank 0."""
    if is_main_process():
        print(line, flush=True)


def all_gather(value):
    """[value of rank 0, value of rank 1, ...] in every process."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def on_main_process(function, *args):
    """`function(*args)` on rank 0; every process gets its value, or its InputError or OSError."""
    value = error = None
    if is_main_process():
        try:
            value = function(*args)
        except (InputError, OSError) as raised:
            error = raised
    value, message = all_gather((value, error and (str(error) or reason(error))))[0]
    if message:
        raise error or InputError(message)
    return value

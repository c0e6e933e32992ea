"""Does sixteen times the data take sixteen times as long, in the same memory?

    python benchmarks/growth.py

Prepares, rechunks, opens, trains an epoch on and evaluates 300, 1,200 and 4,800 drawn pets, each step in
a process of its own, and prints the time of the work without the start of the process, the time for each
pet and the peak memory of the process. The ratio: the largest growth from the smallest to the largest set
over the steps, of the time for each pet (1: linear in time), and of the time itself for opening, which
reads no image or mask (1: constant).
"""

import tempfile
from pathlib import Path

import common

from support.cli import run_script, whole_number

STEP = """
import time, common
{setup}
start = time.perf_counter()
{work}
print(time.perf_counter() - start, common.peak_megabytes())
"""
NETWORK = """
import torch, engine
from dataloader_mtl import JITTER, EpochBatches, RandomCropFlip, load_splits, split_batches
from models import MTLNet
from support.device import keep_freed_memory
from utils import WeightedLoss
keep_freed_memory()
part, device = load_splits(sys.argv[1], MTLNet.tasks)['train'], torch.device('cpu')
model, weighting = MTLNet(n_classes=len(part.dataset.class_names)), WeightedLoss.equal(MTLNet.tasks)
run = engine.Run(model, weighting, part.dataset, len(part), 0.003, 0.003, True, device)
"""
TRAIN = """
part.dataset.transform, part.dataset.jitter = RandomCropFlip(*part.dataset.image_size), JITTER
batches = EpochBatches(part, split_batches(torch.randperm(len(part)), 16), 0, 1)
engine.train_one_epoch(run, batches.loader(0, 0, device), '')
"""
PREPARE = """data_prepare.main(['--source', 'synthetic', '--limit', sys.argv[2], '--size', sys.argv[3],
    '--split', '90-5-5', '--out', sys.argv[1]])"""
OPEN = """
from dataloader_mtl import load_splits
open_all = lambda: load_splits(sys.argv[1], ('mask',))
open_all()  # what the first call sets up is no part of the work
"""
STEPS = {
    'prepare': ('import data_prepare', PREPARE),
    'rechunk': ('import data_rechunk', "data_rechunk.main(['--data', sys.argv[1]])"),
    'open': (OPEN, 'open_all()'),
    'train': (NETWORK, TRAIN),
    'evaluate': (NETWORK, 'engine.evaluate(run.average.module, part, device)'),
}


def measure(name, *arguments):
    """(seconds, MB) of one step."""
    setup, work = STEPS[name]
    seconds, memory = common.in_python(STEP.format(setup=setup, work=work), *arguments).split()
    return float(seconds), float(memory)


def main(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument(
        '--counts',
        type=whole_number(40),
        nargs='+',
        default=[300, 1200, 4800],
        metavar='N',
        help='default: 300 1200 4800',
    )
    parser.add_argument('--size', type=whole_number(64), default=128, help='pixels (default: %(default)s)')
    args = parser.parse_args(argv)
    rows = {}
    print(f'{"step":10}{"pets":>8}{"seconds":>10}{"ms a pet":>10}{"peak MB":>10}')
    for count in args.counts:
        with tempfile.TemporaryDirectory() as scratch:
            for name in STEPS:
                seconds, memory = measure(name, Path(scratch), count, args.size)
                rows.setdefault(name, []).append({'pets': count, 'seconds': seconds, 'peak_mb': memory})
                print(f'{name:10}{count:8}{seconds:10.2f}{seconds / count * 1e3:10.2f}{memory:10.0f}', flush=True)
    growth = {name: each[-1]['seconds'] / each[0]['seconds'] for name, each in rows.items()}
    for name in growth.keys() - {'open'}:  # which takes the same time for any number
        growth[name] *= args.counts[0] / args.counts[-1]
    common.finish(max(growth.values()), {'rows': rows, 'growth': growth}, args.json)


if __name__ == '__main__':
    run_script(main)

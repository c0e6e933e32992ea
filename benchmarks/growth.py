"""Does ten times the data take ten times as long, in the same memory?

    python benchmarks/growth.py

Prepares, rechunks, trains an epoch on and evaluates 300, 1,200 and 4,800 drawn pets, each step a process
of its own, and prints time, time for each pet and peak memory. The ratio: the largest growth of the time
for each pet from the smallest to the largest set over the four steps (1: linear in time).
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from data_rechunk import run_script, whole_number

# Run in a process of its own, which ends with its peak memory; a child would inherit its parent's.
STEP = '''
import re, sys
sys.path.insert(0, sys.argv.pop(1))
{code}
print('peak', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
'''
TRAIN = '''import torch, engine
from models import MTLNet
from utils import WeightedLoss
args = engine.training_parser('', out=sys.argv[2]).parse_args(['--data', sys.argv[1], '--workers', '0'])
engine.keep_freed_memory()
dataset, part = engine.load_split(args, 'train', MTLNet.tasks)
run = engine.Run(MTLNet, WeightedLoss.equal(MTLNet.tasks), dataset, 1000, args)
'''
STEPS = {
    'prepare': "import data_prepare\ndata_prepare.main(['--source', 'synthetic', '--limit', sys.argv[3], "
               "'--size', sys.argv[4], '--split', '90-5-5', '--out', sys.argv[1]])",
    'rechunk': "import data_rechunk\ndata_rechunk.main(['--data', sys.argv[1]])",
    'train': TRAIN + '''from torch.utils.data import DataLoader
from dataloader_mtl import collate, training_transform
dataset.transform, dataset.jitter = training_transform(*dataset.image_size), engine.JITTER
batches = engine.batches_of(torch.randperm(len(part)), args.batch_size)
engine.train_one_epoch(run, DataLoader(part, batch_sampler=batches, collate_fn=collate), '')''',
    'evaluate': TRAIN + 'engine.evaluate(run.average.module, part, run.device)',
}


def measure(name, *arguments):
    """(seconds, MB) of one step."""
    command = [sys.executable, '-c', STEP.format(code=STEPS[name]), str(common.ROOT), *map(str, arguments)]
    start = time.perf_counter()
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return time.perf_counter() - start, int(printed.split()[-1]) / 1024


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--counts', type=whole_number(40), nargs='+', default=[300, 1200, 4800],
                        metavar='N', help='default: 300 1200 4800')
    parser.add_argument('--size', type=whole_number(64), default=128, help='pixels (default: %(default)s)')
    args = parser.parse_args()
    rows = {}
    print(f'{"step":10}{"pets":>8}{"seconds":>10}{"ms a pet":>10}{"peak MB":>10}')
    for count in args.counts:
        with tempfile.TemporaryDirectory() as scratch:
            for name in STEPS:
                seconds, memory = measure(name, Path(scratch) / 'data', Path(scratch) / 'run', count, args.size)
                rows.setdefault(name, []).append({'pets': count, 'seconds': seconds, 'peak_mb': memory})
                print(f'{name:10}{count:8}{seconds:10.1f}{seconds / count * 1e3:10.1f}{memory:10.0f}', flush=True)
    growth = {name: each[-1]['seconds'] / each[-1]['pets'] / (each[0]['seconds'] / each[0]['pets'])
              for name, each in rows.items()}
    common.finish(max(growth.values()), {'rows': rows, 'growth': growth}, args.json)


if __name__ == '__main__':
    run_script(main)

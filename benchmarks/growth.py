"""Does sixteen times the data take sixteen times as long, in the same memory?

    python benchmarks/growth.py

Prepares, rechunks, trains an epoch on and evaluates 300, 1,200 and 4,800 drawn pets, each step in a
process of its own, and prints the time of the work without the start of the process, the time for each
pet and the peak memory of the process. The ratio: the largest growth of the time for each pet from the
smallest to the largest set over the four steps (1: linear in time).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import common
from data_rechunk import run_script, whole_number

# The peak is read from the system: what getrusage gives, a child inherits from its parent.
STEP = '''
import re, sys, time
sys.path.insert(0, sys.argv.pop(1))
{setup}
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
print(seconds, re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
'''
NETWORK = '''
import torch, engine
from dataloader_mtl import training_transform
from models import MTLNet
from utils import WeightedLoss
args = engine.training_parser('', out=sys.argv[2]).parse_args(['--data', sys.argv[1], '--workers', '0'])
engine.keep_freed_memory()
dataset, part = engine.load_split(args, 'train', MTLNet.tasks)
run = engine.Run(MTLNet, WeightedLoss.equal(MTLNet.tasks), dataset, len(part), args)
'''
STEPS = {
    'prepare': ('import data_prepare', "data_prepare.main(['--source', 'synthetic', '--limit', sys.argv[3], "
                "'--size', sys.argv[4], '--split', '90-5-5', '--out', sys.argv[1]])"),
    'rechunk': ('import data_rechunk', "data_rechunk.main(['--data', sys.argv[1]])"),
    'train': (NETWORK, '''
dataset.transform, dataset.jitter = training_transform(*dataset.image_size), engine.JITTER
batches = engine.batches_of(torch.randperm(len(part)), args.batch_size)
engine.train_one_epoch(run, engine.EpochBatches(part, batches, 0, 1).loader(0, 0, run.device), '')'''),
    'evaluate': (NETWORK, 'engine.evaluate(run.average.module, part, run.device)'),
}


def measure(name, *arguments):
    """(seconds, MB) of one step."""
    setup, work = STEPS[name]
    command = [sys.executable, '-c', STEP.format(setup=setup, work=work), str(common.ROOT), *map(str, arguments)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, kilobytes = printed.split()[-2:]
    return float(seconds), int(kilobytes) / 1024


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

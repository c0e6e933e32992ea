"""Is anything lost when a script is killed at a random moment?

    python benchmarks/kills.py                  # 200 kills, about half an hour
    python benchmarks/kills.py --count 20 --seed 1 --only train

Starts data_prepare.py, data_rechunk.py and train_mtl.py on drawn pets and kills each (SIGKILL, which no
process can catch) after a random time, a few times over, then lets it finish. After each kill:

- prepare writes over an earlier preparation: each file has the bytes of the earlier or of the new one;
- rechunk: each file has the bytes of the source or is rechunked with the same values;
- train, with two loading processes and a checkpoint after each step: last.pt and best.pt are sound, no step
  that they had is missing, and the next start goes on at once with --resume auto.

At the end: no unfinished file is left, and files and weights are those of a run that was not killed, bit
for bit. The ratio: kills after which all was well to all kills.
"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

import common
import data_rechunk
import engine
from data_rechunk import InputError, whole_number


class Lost(Exception):
    """What was lost."""


def start(script, *options, stdout=subprocess.PIPE):
    command = [sys.executable, str(common.ROOT / script), *map(str, options)]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.STDOUT, text=True)


def seconds_to_finish(script, *options):
    """Run the script to its end; returns the seconds to its first line of output and to its end."""
    begin = time.monotonic()
    with start(script, *options) as process:
        process.stdout.readline()
        first = time.monotonic() - begin
        output = process.stdout.read()
    if process.returncode:
        raise Lost(f'{script} ended with {process.returncode}: {output.strip().splitlines()[-1:]}')
    return first, time.monotonic() - begin


def kill_after(seconds, script, *options):
    """Start the script and kill it; returns whether it was still running. It may have ended, but well."""
    with tempfile.TemporaryFile('w+') as log:  # a pipe would be open until the loading processes are gone, too
        with start(script, *options, stdout=log) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        log.seek(0)
        output = log.read()
    if process.returncode not in (0, -signal.SIGKILL):
        raise Lost(f'{script} ended with {process.returncode}: {output.strip().splitlines()[-1:]}')
    return process.returncode != 0


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*.h5')}


class Prepare:
    def __init__(self, scratch):
        self.work = scratch / 'work'
        for seed in 1, 2:
            times = seconds_to_finish(*self.command(seed, scratch / str(seed)))
        self.earlier, self.new = (files(scratch / str(seed)) for seed in (1, 2))
        self.original, self.span = scratch / '1', (0, times[1])

    def command(self, seed, out):
        return 'data_prepare.py', '--limit', 300, '--size', 64, '--seed', seed, '--out', out

    def begin(self):
        shutil.copytree(self.original, self.work)
        return self.command(2, self.work)

    def check(self):
        found = files(self.work)
        if found.keys() != self.new.keys():
            raise Lost(f'{sorted(self.new.keys() - found.keys())} are gone')
        for name, content in found.items():
            if content not in (self.earlier[name], self.new[name]):
                raise Lost(f'{name} is neither the earlier file nor the new one')

    def check_end(self):
        if files(self.work) != self.new:
            raise Lost('the files are not those of a run that was not killed')


class Rechunk:
    def __init__(self, scratch):
        self.work, self.original = scratch / 'work', scratch / 'source'
        common.script('data_prepare.py', '--limit', 300, '--size', 64, '--out', self.original)
        self.values = {}
        for path in self.original.rglob('*.h5'):  # as others write them: float32, in chunks across images
            if path.stem == 'names':
                path.unlink()
                continue
            with h5py.File(path, 'r+') as file:
                values = self.values[path.relative_to(self.original)] = file[path.stem][()]
                attributes = dict(file[path.stem].attrs)
                del file[path.stem]
                layout = {'chunks': (16, 16, 16, 1), 'compression': 'gzip'} if values.ndim == 4 else {}
                dataset = file.create_dataset(path.stem, data=values.astype('float32'), **layout)
                dataset.attrs.update(attributes)
        self.before = files(self.original)
        shutil.copytree(self.original, self.work)
        self.span = (0, seconds_to_finish('data_rechunk.py', '--data', self.work)[1])
        shutil.rmtree(self.work)

    def begin(self):
        shutil.copytree(self.original, self.work)
        return 'data_rechunk.py', '--data', self.work

    def check(self, finished=False):
        for name, values in self.values.items():
            path = self.work / name
            if not finished and path.read_bytes() == self.before[str(name)]:
                continue
            with h5py.File(path) as file:
                if not data_rechunk.is_rechunked(file, path.stem):
                    raise Lost(f'{name} is neither the source nor rechunked')
                if not np.array_equal(file[path.stem][()], values, equal_nan=True):
                    raise Lost(f'{name} has other values')

    def check_end(self):
        self.check(finished=True)


class Train:
    def __init__(self, scratch):
        self.work, self.data = scratch / 'work', scratch / 'data'
        common.script('data_prepare.py', '--limit', 60, '--size', 64, '--out', self.data)
        common.script('data_rechunk.py', '--data', self.data)
        first, whole = seconds_to_finish(*self.command(scratch / 'whole'))
        self.weights = self.final(scratch / 'whole')
        self.span = 0.7 * first, whole  # it takes seconds to import torch, in which nothing can be lost

    def command(self, out):
        return ('train_mtl.py', '--data', self.data, '--epochs', 4, '--workers', 2, '--checkpoint-minutes', '1e-9',
                '--resume', 'auto', '--device', 'cpu', '--out', out, '--model', out / 'model.pt')

    def begin(self):
        self.work.mkdir()
        self.progress = 0, 0
        return self.command(self.work)

    def check(self):
        progress = 0, 0
        if (self.work / 'last.pt').exists():
            state = engine.load_checkpoint(self.work / 'last.pt', engine.TRAINING_FORMAT)
            progress = len(state['history']), state['steps']
        if progress < self.progress:
            raise Lost(f'{progress} epochs and steps are fewer than the {self.progress} of before')
        self.progress = progress
        if (self.work / 'best.pt').exists():
            engine.load_checkpoint(self.work / 'best.pt', engine.MODEL_FORMAT)

    def check_end(self):
        final = self.final(self.work)
        if final.keys() != self.weights.keys() or not all(map(torch.equal, final.values(), self.weights.values())):
            raise Lost('the weights are not those of a run that was not killed')

    def final(self, out):
        """Weights, optimiser and moving average at the end, and the best weights."""
        state = torch.load(out / 'last.pt', weights_only=True)
        tensors = {f'{part} {key}': value for part in ('model', 'average') for key, value in state[part].items()}
        moments = {f'{number} {key}': value for number, each in state['optimizer']['state'].items()
                   for key, value in each.items()}
        return tensors | moments | torch.load(out / 'model.pt', weights_only=True)['weights']


KINDS = {'prepare': Prepare, 'rechunk': Rechunk, 'train': Train}
SHARES = {'prepare': 3, 'rechunk': 4, 'train': 3}  # of the kills; a training takes the longest


def kill_and_finish(kind, kills, rng):
    """Kill a script up to `kills` times and let it finish; returns how often it was killed."""
    killed, command = 0, kind.begin()
    try:
        for _ in range(kills):
            running = kill_after(rng.uniform(*kind.span), *command)
            kind.check()
            if not running:  # it has finished, and there is nothing more to lose
                break
            killed += 1
        seconds_to_finish(*command)
        kind.check_end()
        left = [path for path in kind.work.rglob('*.part')]
        if left:
            raise Lost(f'{left[0]} was left behind')
    finally:
        shutil.rmtree(kind.work)
    return killed


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--count', type=whole_number(1), default=200, help='kills in all (default: %(default)s)')
    parser.add_argument('--seed', type=whole_number(0), default=0, help='default: %(default)s')
    parser.add_argument('--only', choices=KINDS, help='one of the scripts (default: all in turn)')
    args = parser.parse_args()
    names = [args.only] if args.only else list(KINDS)
    print(f'seed {args.seed}')
    counts, lost = dict.fromkeys(names, 0), []
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(names):
            rng = random.Random(f'{args.seed} {name}')
            share = SHARES[name] / sum(SHARES[each] for each in names[number:])
            wanted = round(share * (args.count - sum(counts.values())))
            (Path(scratch) / name).mkdir()
            kind = KINDS[name](Path(scratch) / name)
            while counts[name] < wanted:
                try:
                    counts[name] += kill_and_finish(kind, min(rng.randint(1, 5), wanted - counts[name]), rng)
                except (Lost, InputError, OSError) as error:
                    counts[name] += 1
                    lost.append(f'{name}: {error}')
                    print(lost[-1], flush=True)
            print(f'{name}: {counts[name]} kills between {kind.span[0]:.1f} and {kind.span[1]:.1f} s', flush=True)
    print(f'{sum(counts.values())} kills, seed {args.seed}: {len(lost)} losses')
    common.finish(1 - len(lost) / sum(counts.values()), {'kills': counts, 'seed': args.seed, 'lost': lost}, args.json)


if __name__ == '__main__':
    data_rechunk.run_script(main)

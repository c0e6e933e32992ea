"""Nothing is lost when a script is killed (SIGKILL) at a random moment, a few times over, and then finishes.

pytest -m slow tests/test_kills.py --kills 200 --seed 0
"""

import itertools
import multiprocessing
import random
import shutil
import signal
import sys
import time
from multiprocessing.connection import wait

import h5py
import numpy as np
import pytest
import torch

import data_prepare
import data_rechunk
import train_mtl
from models import load_model
from support.checkpoint import TRAINING_FORMAT, load_checkpoint
from support.cli import run_script
from support.hdf5 import is_rechunked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == 'win32', reason='needs fork'),
    pytest.mark.usefixtures('own_processes'),
]

FORK = multiprocessing.get_context('fork') if sys.platform != 'win32' else None
KILLS_IN_A_ROW = 5  # at most, before a script is let finish


class Script:
    """A script that is killed: `main`, `arguments` and the folder `work` that it writes to."""

    def __init__(self, scratch):
        self.work, self.log = scratch / 'work', scratch / 'log.txt'

    def start(self):
        """Fill `work` with what is there before the script runs."""
        self.work.mkdir()

    def run(self, seconds=None, operation=None):
        """Run the script in a forked process, which has torch already; kill it after `seconds` or `operation` files.

        `operation`: how many files it opens, renames or removes before. Returns whether it ended by itself, which
        must be well.
        """
        reader, writer = FORK.Pipe(duplex=False)
        process = FORK.Process(target=self.run_quietly, args=(writer, operation))
        process.start()
        wait([process.sentinel, reader], seconds)
        process.kill()  # what it does until then is as good as random
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.log.read_text()[-2000:]
        return process.exitcode == 0

    def run_quietly(self, writer, operation):
        sys.stdout = sys.stderr = open(self.log, 'w')
        numbers = itertools.count(1)

        def hook(event, _):
            if event in ('open', 'os.rename', 'os.remove') and next(numbers) == operation:
                writer.send(None)

        sys.addaudithook(hook)
        run_script(lambda: self.main([str(argument) for argument in self.arguments]))
        self.log.with_name('operations.txt').write_text(str(next(numbers)))


def h5_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*.h5')}


class Prepare(Script):
    """Writes over an earlier preparation: each file has the bytes of the earlier or of the new one."""

    main = staticmethod(data_prepare.main)

    def __init__(self, scratch):
        super().__init__(scratch)
        self.arguments = '--limit', 40, '--size', 64, '--seed', 2, '--out', self.work
        self.earlier = scratch / 'earlier'
        data_prepare.main(['--limit', '32', '--size', '64', '--seed', '1', '--out', str(self.earlier)])
        self.old = h5_files(self.earlier)
        assert self.run()
        self.new = h5_files(self.work)

    def start(self):
        shutil.copytree(self.earlier, self.work)

    def check(self):
        found = h5_files(self.work)
        assert found.keys() == self.new.keys()
        for name, content in found.items():
            assert content in (self.old[name], self.new[name]), f'{name} is neither the old file nor the new one'

    def check_end(self):
        assert h5_files(self.work) == self.new


class Rechunk(Script):
    """Each file has the bytes of the source or is rechunked with the same values."""

    main = staticmethod(data_rechunk.main)

    def __init__(self, scratch):
        super().__init__(scratch)
        self.arguments = '--data', self.work
        self.original, self.values = scratch / 'original', {}
        data_prepare.main(['--limit', '200', '--size', '64', '--out', str(self.original)])
        for path in self.original.rglob('*.h5'):
            with h5py.File(path) as file:
                values = file[path.stem][()]
                attributes = dict(file[path.stem].attrs)
            if path.stem == 'names':
                path.unlink()
                continue
            self.values[path.relative_to(self.original)] = values
            with h5py.File(path, 'w') as file:  # as others write it: float32, in chunks across images
                layout = {'chunks': (16, 16, 16, 1), 'compression': 'gzip'} if values.ndim == 4 else {}
                dataset = file.create_dataset(path.stem, data=values.astype('float32'), **layout)
                dataset.attrs.update(attributes)
        self.before = h5_files(self.original)
        self.start()
        assert self.run()
        self.check_end()

    def start(self):
        shutil.copytree(self.original, self.work)

    def check(self, finished=False):
        for name, values in self.values.items():
            path = self.work / name
            if finished or path.read_bytes() != self.before[str(name)]:
                with h5py.File(path) as file:
                    assert is_rechunked(file, path.stem), f'{name} is neither the source nor rechunked'
                    assert np.array_equal(file[path.stem][()], values, equal_nan=True), f'{name} has other values'

    def check_end(self):
        self.check(finished=True)


class Train(Script):
    """With two workers and a checkpoint after each step: last.pt and best.pt are sound, no step is lost."""

    main = staticmethod(train_mtl.main)

    def __init__(self, scratch):
        super().__init__(scratch)
        data = scratch / 'data'
        data_prepare.main(['--limit', '60', '--size', '64', '--out', str(data)])
        data_rechunk.main(['--data', str(data)])
        self.arguments = ('--data', data, '--epochs', 4, '--workers', 2, '--checkpoint-minutes', '1e-9')
        self.arguments += ('--resume', 'auto', '--device', 'cpu', '--out', self.work, '--model', self.work / 'model.pt')
        assert self.run()
        self.weights = self.final()

    def start(self):
        super().start()
        self.progress = 0, 0

    def check(self):
        progress = 0, 0
        if (self.work / 'last.pt').exists():
            content = load_checkpoint(self.work / 'last.pt', TRAINING_FORMAT)
            progress = len(content['history']), content['steps']
        assert progress >= self.progress, f'{progress} epochs and steps, where {self.progress} were written'
        self.progress = progress
        if (self.work / 'best.pt').exists():
            load_model(self.work / 'best.pt')

    def check_end(self):
        final = self.final()
        assert final.keys() == self.weights.keys() and all(map(torch.equal, final.values(), self.weights.values()))

    def final(self):
        """Weights, optimiser and moving average at the end, and the weights of the model file."""
        content = load_checkpoint(self.work / 'last.pt', TRAINING_FORMAT)
        tensors = {f'{part} {key}': value for part in ('model', 'average') for key, value in content[part].items()}
        for number, moments in content['optimizer']['state'].items():
            tensors |= {f'{number} {key}': value for key, value in moments.items()}
        return tensors | load_model(self.work / 'model.pt').state_dict()


@pytest.mark.parametrize(
    'kind, share', [(Prepare, 0.3), (Rechunk, 0.4), (Train, 0.3)], ids=['prepare', 'rechunk', 'train']
)
def test_rerun_after_random_kills_ends_with_complete_files(kind, share, tmp_path, pytestconfig):
    seed = pytestconfig.getoption('--seed')
    wanted = max(1, round(share * pytestconfig.getoption('--kills')))
    rng = random.Random(f'{seed} {kind.__name__}')
    script = kind(tmp_path)
    shutil.rmtree(script.work)
    script.start()
    begin = time.perf_counter()
    assert script.run()
    whole = time.perf_counter() - begin
    operations = int((tmp_path / 'operations.txt').read_text())
    killed = 0
    while killed < wanted:
        shutil.rmtree(script.work)
        script.start()
        for _ in range(min(rng.randint(1, KILLS_IN_A_ROW), wanted - killed)):
            # By turns: most of the time nothing is opened, and much happens at the end within a few milliseconds.
            moment = {'operation': rng.randint(1, operations)} if killed % 2 else {'seconds': rng.uniform(0, whole)}
            print(f'kill {killed + 1}: {moment}')
            if script.run(**moment):  # it was faster this time
                break
            killed += 1
            script.check()
        assert script.run()
        script.check_end()
        assert not list(script.work.rglob('*.part'))
    print(f'{kind.__name__}: {killed} kills within {whole:.1f} s and {operations} files, seed {seed}, nothing lost')

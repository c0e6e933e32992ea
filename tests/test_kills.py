"""Nothing is lost when a script is killed (SIGKILL) at a random moment, a few times over, and then finishes.

pytest -m slow tests/test_kills.py --kills 200 --seed 0
"""

import itertools
import os
import random
import shutil
import signal
import sys
import threading
import time

import pytest
from conftest import same_bits, start_child, wait_for

import data_prepare
import data_rechunk
import train_mtl
from models import load_model
from support.checkpoint import TRAINING_FORMAT, load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('own_processes')]

KILLS_IN_A_ROW = 5  # at most, before a script is let finish


class Script:
    """A script that is killed: `before` has what is in the folder `work` at first, which the script writes to."""

    def __init__(self, scratch, main, *arguments):
        self.main, self.arguments = main, arguments
        self.before, self.work = scratch / 'before', scratch / 'work'
        self.log, self.operations = scratch / 'log.txt', scratch / 'operations.txt'
        self.before.mkdir(exist_ok=True)

    def start(self):
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.before, self.work)

    def run(self, seconds=300, operation=None):
        """Run the script in a forked process, which has torch already; it is killed after `seconds` or before it
        opens, renames or removes its file number `operation`.

        Returns whether it ended by itself, which must be well.
        """
        numbers = itertools.count(1)

        def before():
            process = os.getpid()  # which has children that open files, too

            def hook(event, _):
                if event in ('open', 'os.rename', 'os.remove') and next(numbers) == operation:
                    os.kill(process, signal.SIGKILL)

            sys.addaudithook(hook)

        def main(arguments):
            self.main(arguments)
            self.operations.write_text(str(next(numbers)))

        child = start_child(main, self.arguments, self.log, before)
        timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
        timer.start()
        status = wait_for(child)
        timer.cancel()
        assert status in (0, -signal.SIGKILL), self.log.read_text()[-2000:]
        return status == 0


class Files(Script):
    """At every moment, each HDF5 file has the bytes from before or those that it has in the end."""

    def result(self, folder=None):
        folder = folder or self.work
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*.h5')}

    def check(self, end):
        found, before = self.result(), self.result(self.before)
        assert found.keys() == end.keys()
        for name, content in found.items():
            assert content in (before[name], end[name]), f'{name} is neither the old file nor the new one'


class Train(Script):
    """last.pt and best.pt are sound, and no step is lost."""

    def start(self):
        super().start()
        self.progress = 0, 0

    def result(self):
        """Weights and optimiser at the end, and the weights of the model file."""
        content = load_checkpoint(self.work / 'last.pt', TRAINING_FORMAT)
        parts = {name: content[name] for name in ('model', 'optimizer')}
        return parts | {'file': dict(load_model(self.work / 'model.pt').state_dict())}

    def check(self, end):
        progress = 0, 0
        if (self.work / 'last.pt').exists():
            content = load_checkpoint(self.work / 'last.pt', TRAINING_FORMAT)
            progress = len(content['history']), content['steps']
        assert progress >= self.progress, f'{progress} epochs and steps, where {self.progress} were written'
        self.progress = progress
        if (self.work / 'best.pt').exists():
            load_model(self.work / 'best.pt')


def prepare(scratch, shared_data, original_files):
    """Over an earlier preparation."""
    data_prepare.main(['--limit', '32', '--size', '64', '--seed', '1', '--out', str(scratch / 'before')])
    return Files(scratch, data_prepare.main, '--limit', 40, '--size', 64, '--seed', 2, '--out', scratch / 'work')


def rechunk(scratch, shared_data, original_files):
    original_files(scratch / 'before', count=60, chunks=(16, 16, 16, 1), compression='gzip')
    return Files(scratch, data_rechunk.main, '--data', scratch / 'work')


def train(scratch, shared_data, original_files):
    """With two workers and a checkpoint after each step."""
    work = scratch / 'work'
    options = '--epochs', 4, '--workers', 2, '--checkpoint-minutes', '1e-9', '--resume', 'auto', '--device', 'cpu'
    return Train(scratch, train_mtl.main, '--data', shared_data, '--out', work, '--model', work / 'model.pt', *options)


@pytest.mark.parametrize('make', [prepare, rechunk, train])
def test_rerun_after_random_kills_ends_with_complete_files(make, shared_data, original_files, tmp_path, pytestconfig):
    rng = random.Random(f'{pytestconfig.getoption("--seed")} {make.__name__}')
    wanted = max(1, round(pytestconfig.getoption('--kills') / 3))
    script = make(tmp_path, shared_data, original_files)
    script.start()
    begin = time.perf_counter()
    assert script.run()
    whole, operations = time.perf_counter() - begin, int(script.operations.read_text())
    end, killed = script.result(), 0
    while killed < wanted:
        script.start()
        for _ in range(min(rng.randint(1, KILLS_IN_A_ROW), wanted - killed)):
            # By turns: most of the time nothing is opened, and much happens at the end within a few milliseconds.
            moment = {'operation': rng.randint(1, operations)} if killed % 2 else {'seconds': rng.uniform(0, whole)}
            print(f'kill {killed + 1}: {moment}')
            if script.run(**moment):  # it was faster this time
                break
            killed += 1
            script.check(end)
        assert script.run()
        assert same_bits(script.result(), end) and not list(script.work.rglob('*.part'))
    print(f'{make.__name__}: {killed} kills within {whole:.1f} s and {operations} files, nothing lost')

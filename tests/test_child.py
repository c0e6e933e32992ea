"""A function in a process of its own: its result, its errors, its crash and its end."""

import faulthandler
import os
import signal
import sys

import h5py
import numpy as np
import pytest
from conftest import run_in_child

import data_rechunk
from support.child import in_own_process
from support.cli import InputError

# Elsewhere the function runs in the process of the tests.
pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='files have processes of their own only on Linux')


def fail(path, error):
    raise error


def crash(path, number):
    faulthandler.disable()  # pytest's would print where
    os.kill(os.getpid(), number)


def allocate(path, size):
    return len(np.empty(size, np.uint8))


def test_results_and_errors_come_back():
    assert in_own_process(60, lambda path, *more: (path, os.getppid(), more), 'a.h5', 1) == ('a.h5', os.getpid(), (1,))
    with pytest.raises(InputError, match='a.h5: is empty'):
        in_own_process(60, fail, 'a.h5', InputError('a.h5: is empty'))
    with pytest.raises(OSError) as error:
        in_own_process(60, fail, 'a.h5', OSError(28, 'No space left', 'b.h5'))
    assert (error.value.errno, error.value.filename) == (28, 'b.h5')


@pytest.mark.parametrize(
    'function, argument, message',
    [
        (crash, signal.SIGSEGV, 'reading it ended with -11'),
        (crash, signal.SIGXCPU, 'reading it took too long'),
        (allocate, 3 << 30, 'reading it ended with 1'),
    ],
    ids=['crash', 'hang', 'memory'],
)
def test_crash_timeout_and_memory_limit_give_one_line_errors(function, argument, message):
    with pytest.raises(InputError, match=f'a.h5: {message}, so it is damaged; it is left as it was; make it again'):
        in_own_process(60, function, 'a.h5', argument)


def test_the_memory_limit_is_on_top_of_the_parents_memory():
    mapped = np.empty(5 << 30, np.uint8)  # which costs nothing as long as nobody writes to it
    assert in_own_process(60, allocate, 'a.h5', 1 << 30) == 1 << 30 and len(mapped)


def test_the_process_ends_with_its_parent():
    read_end, write_end = os.pipe()

    def child(path):
        os.write(write_end, str(os.getpid()).encode().ljust(10))
        signal.pause()

    parent = os.fork()
    if not parent:
        in_own_process(60, child, 'a.h5')
    assert int(os.read(read_end, 10)) != parent
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.close(write_end)
    assert os.read(read_end, 1) == b''  # when all that could write are gone


def test_a_signal_ends_rechunking_with_nothing_left_behind(tmp_path, monkeypatch, own_processes):
    path = tmp_path / 'images.h5'
    with h5py.File(path, 'w') as file:
        file['images'] = np.full((2, 8, 8, 3), 9, np.uint8)
    before = path.read_bytes()

    def stop(*_):  # in the process of the file, as in a loop of HDF5
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setattr(data_rechunk, 'same_bytes', stop)
    log = tmp_path.parent / 'log.txt'
    assert run_in_child(lambda _: data_rechunk.rechunk_file(path), [], log) == 128 + signal.SIGTERM
    assert path.read_bytes() == before and set(os.listdir(tmp_path)) == {'images.h5', '.lock'}

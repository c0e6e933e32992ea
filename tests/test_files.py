"""Files: whole or not at all, one writer to a folder."""

import errno
import os
import signal

import pytest
from conftest import run_in_child

from support.cli import InputError
from support.files import lock_folder, replacing, write_file


def test_the_old_file_stays_if_the_new_one_cannot_be_finished(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / 'a'
    path.write_text('old')
    message = 'a: cannot be written and is left as it was .No space left on device'
    with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
        patch.setattr(os, 'fsync', fail)
        write_file(path, lambda file: file.write(b'half'))
    with pytest.raises(KeyError, match='of the block'), replacing(path) as part:
        part.write_text('half')
        raise KeyError('of the block')
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['a']
    with replacing(path) as part:
        part.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['a']


def test_a_links_target_is_replaced_and_a_folder_or_a_pipe_is_refused(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'disk' / 'file')
    write_file(tmp_path / 'link', lambda file: file.write(b'x'))
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'disk' / 'file').read_bytes() == b'x'
    os.mkfifo(tmp_path / 'pipe')
    for name in 'disk', 'pipe':
        with pytest.raises(InputError, match=f'{name}: is not a file; expected the name of a file to write'):
            write_file(tmp_path / name, lambda file: None)
    assert (tmp_path / 'pipe').is_fifo()


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match='file: cannot be written to .File exists.; choose another folder'):
        lock_folder(tmp_path / 'file').__enter__()
    with pytest.raises(InputError, match='file/a: cannot be written and is left as it was'):
        write_file(tmp_path / 'file' / 'a', lambda file: None)


def test_a_folder_has_one_writer_and_the_next_removes_unfinished_files(tmp_path):
    stale, other, log = tmp_path / 'images.h5.4711.part', tmp_path / 'novel.part', tmp_path / 'log.txt'
    stale.touch(), other.touch()

    def lock(_):
        lock_folder(tmp_path).__enter__()

    with lock_folder(tmp_path):
        assert not stale.exists() and other.exists()
        stale.touch()
        assert run_in_child(lock, [], log) == 1
        assert 'another process is writing to this folder' in log.read_text() and stale.exists()
    assert run_in_child(lock, [], log) == 0


def test_a_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path):
    """As a worker, which may live for seconds after a training that was killed."""
    ready, parent = os.pipe(), os.fork()
    if not parent:
        with lock_folder(tmp_path):
            if not os.fork():
                os.write(ready[1], str(os.getpid()).encode().ljust(10))
                signal.pause()
            signal.pause()
    worker = int(os.read(ready[0], 10))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        assert run_in_child(lambda _: lock_folder(tmp_path).__enter__(), [], tmp_path / 'log.txt') == 0
    finally:
        os.kill(worker, signal.SIGKILL)

"""What the tests share: tiny networks, small prepared data, training in this process and in forked ones."""

import functools
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import data_prepare
import data_rechunk
import engine
import models
import train_mtl
from dataloader_mtl import MTLDataset
from support import cli, report
from support.checkpoint import save_checkpoint
from support.child import in_own_process
from support.cli import STOP_SIGNALS, run_script
from support.files import write_file
from support.hdf5 import SPLITS
from utils import WeightedLoss

ROOT = Path(__file__).resolve().parent.parent
os.environ['PYTHONPATH'] = str(ROOT)  # for the tests that start another interpreter
torch.set_num_threads(1)  # faster for tiny networks
cli.ECHO = 0.05
tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and a killed one may hold it
CHANNELS = models.CHANNELS


def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=30, help='of the slow test_kills.py')
    parser.addoption('--files', type=int, default=200, help='damaged files of the slow test_fuzz.py')
    parser.addoption('--seed', type=int, default=0, help='of both')


@pytest.fixture(scope='session', autouse=True)
def tiny_networks(tmp_path_factory):
    """Networks of a few thousand parameters, so that a last.pt has kilobytes; none replaces the shipped model."""
    models.CHANNELS = (4, 4, 8, 8, 8)
    train_mtl.MODEL = str(tmp_path_factory.mktemp('models') / 'mtl_model.pt')
    yield
    models.CHANNELS = CHANNELS


@pytest.fixture(scope='session', autouse=True)
def cheap_parts():
    """What takes longer than a tiny training and has tests of its own: curves, git, a process for each file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, 'draw_curves', write_history)
        patch.setattr(report, 'read_commit', functools.cache(report.read_commit))
        patch.setattr(data_rechunk, 'in_own_process', lambda seconds, function, *args: function(*args))
        yield


def write_history(history, printed, path):
    """In place of the curves; the bytes are those of the history."""
    write_file(path, lambda file: file.write(repr(history).encode()))


@pytest.fixture
def own_processes(monkeypatch):
    """As data_rechunk.py runs."""
    monkeypatch.setattr(data_rechunk, 'in_own_process', in_own_process)


@pytest.fixture
def full_networks(monkeypatch):
    """The networks as they are."""
    monkeypatch.setattr(models, 'CHANNELS', CHANNELS)


@pytest.fixture(scope='session')
def shared_data(tmp_path_factory):
    """60 synthetic pets at 64 x 64, prepared and rechunked; not to be changed."""
    root = tmp_path_factory.mktemp('data')
    data_prepare.main(['--limit', '60', '--size', '64', '--split', '60-20-20', '--out', str(root)])
    data_rechunk.main(['--data', str(root)])
    return root


@pytest.fixture
def data(shared_data, tmp_path):
    """A copy of the shared data to change."""
    return Path(shutil.copytree(shared_data, tmp_path / 'data'))


def read_h5(path, key=None):
    """The values of an HDF5 file's dataset, or of another one in it."""
    with h5py.File(path) as file:
        return file[key or path.stem][()]


def change_h5(path, change, **attributes):
    """Store `change(values)` in place of an HDF5 file's values, rechunked; the rest stays, but for `attributes`."""
    with h5py.File(path) as file:
        values, kept = file[path.stem][()], dict(file[path.stem].attrs)
    with h5py.File(path, 'w') as file:
        file[path.stem] = change(values)
        file[path.stem].attrs.update(kept | attributes)
    data_rechunk.rechunk_file(path)


def with_row(row, value):
    """For `change_h5`: a function that sets a row, or several."""

    def change(values):
        values[row] = value
        return values

    return change


def damage_sample(path, number):
    """Change bytes of a sample in a rechunked file."""
    with h5py.File(path) as file:
        offset = file[path.stem].id.get_chunk_info(number).byte_offset
    with open(path, 'r+b') as file:
        file.seek(offset + 77)
        file.write(b'damaged')


def training_options(data, out, *more):
    options = {'--data': data, '--out': out, '--epochs': 2, '--batch-size': 16, '--workers': 0}
    return [str(part) for pair in options.items() for part in pair] + [str(each) for each in more]


def train(data, out, *more, network=models.MTLNet, weighting=None):
    """Train, with the shared data in three steps an epoch; returns the content of metrics.json."""
    default = WeightedLoss(train_mtl.WEIGHTS) if network is models.MTLNet else WeightedLoss.equal(network.tasks)
    args = engine.training_parser('', out='').parse_args(training_options(data, out, *more))
    return engine.train(network, weighting or default, engine.Config.from_args(args))


def read_folder(folder):
    """{name: bytes} of the files of a run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.lock'}


def read_checkpoints(out):
    return [torch.load(out / name, weights_only=True) for name in ('last.pt', 'best.pt')]


def same_bits(one, two):
    """Whether two nested values are equal in every bit, but for measured times."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(
            same_bits(one[key], two[key]) for key in one if 'second' not in str(key)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same_bits, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.fixture(scope='session')
def finished_run(shared_data, tmp_path_factory):
    """The folder of an uninterrupted run of two epochs; not to be changed."""
    out = tmp_path_factory.mktemp('finished')
    train(shared_data, out)
    return out


@pytest.fixture
def original_files(tmp_path):
    """Function that writes files like the original's: four of them, no breeds, any layout."""

    def write(root=tmp_path / 'original', count=12, size=(64, 64), dtype='float32', **layout):
        rng = np.random.default_rng(0)
        height, width = size
        for split in SPLITS:
            folder = root / split
            folder.mkdir(parents=True)
            corner = rng.uniform(0, 0.5, (count, 2))
            arrays = {
                'images': rng.integers(0, 256, (count, height, width, 3)),
                'masks': rng.integers(0, 2, (count, height, width, 1)),
                'bboxes': np.hstack([corner, corner + 0.4]) * (width, height, width, height),
                'binary': rng.integers(0, 2, (count, 1)),
            }
            for stem, values in arrays.items():
                extra = layout if values.ndim == 4 else {}
                with h5py.File(folder / f'{stem}.h5', 'w') as file:
                    file.create_dataset(stem, data=values.astype(dtype), **extra)
        return root

    return write


@pytest.fixture
def oxford(tmp_path):
    """Function that writes images in the official layout, with the arguments of `write_oxford`; returns the root."""
    return lambda *args, **kw: write_oxford(tmp_path / 'oxford', *args, **kw)


def write_oxford(root, count=40, size=(80, 60), masks=(), boxes=(), breeds=2, **options):
    """`masks` and `boxes`: the numbers of the images that have one; `options` of the images' `save`."""
    rng, folder = np.random.default_rng(0), root / 'oxford-iiit-pet'
    for part in ('images', 'annotations/trimaps', 'annotations/xmls'):
        (folder / part).mkdir(parents=True)
    lines = ['#Image CLASS-ID SPECIES BREED ID']
    for i in range(count):
        breed = i % breeds
        name = f'breed{breed}_{i}'
        lines.append(f'{name} {breed + 1} {breed % 2 + 1} 1')
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'images' / f'{name}.jpg', **options)
        if i in masks:
            trimap = np.full(size[::-1], 2, np.uint8)
            trimap[:, : size[0] // 2] = 1
            trimap[:, size[0] // 2 - 4 : size[0] // 2 + 4] = 3
            Image.fromarray(trimap).save(folder / 'annotations' / 'trimaps' / f'{name}.png')
        if i in boxes:
            write_xml(folder / 'annotations' / 'xmls' / f'{name}.xml', size, (8, 6, 40, 30))
    (folder / 'annotations' / 'list.txt').write_text('\n'.join(lines) + '\n')
    return root


def write_xml(path, size, box):
    corners = ''.join(f'<{key}>{value}</{key}>' for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
    path.write_text(
        f'<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>'
        f'<object><bndbox>{corners}</bndbox></object></annotation>'
    )


def run_in_child(main, arguments, log, before=lambda: None):
    """The exit status of a script in a forked child, minus the signal if one ended it; `log` gets its output."""
    return wait_for(start_child(main, arguments, log, before))


def wait_for(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_child(main, arguments, log, before=lambda: None):
    """The process number of a script in a forked child."""
    child = os.fork()
    if not child:
        status = 99
        signal.alarm(300)  # a deadlock ends the test
        try:
            for stream in 1, 2:
                os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
            torch.set_num_threads(1)  # renews the threads that the fork lost; later, autograd's race to do it
            before()
            sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)
            run_script(lambda: main([str(argument) for argument in arguments]))
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    return child


def assert_full_disk_leaves_files(main, arguments, folder, limit):
    """With files limited to `limit` bytes: one line, and the HDF5 files in `folder` are as they were."""
    before = {path: path.read_bytes() for path in folder.rglob('*.h5')}
    read, write = os.pipe()  # a log in a file would be limited, too

    def limit_files():
        os.dup2(write, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    status = run_in_child(main, arguments, os.devnull, limit_files)
    os.close(write)
    with open(read) as pipe:
        lines = [line for line in pipe.read().splitlines() if line.strip()]
    assert status == 1, (limit, status, lines)
    assert lines[-1].startswith('error: ') and 'cannot be written and is left as it was (File too large)' in lines[-1]
    assert len(lines) == 1, lines
    assert before == {path: path.read_bytes() for path in folder.rglob('*.h5')} and not list(folder.rglob('*.part'))


@pytest.fixture(scope='session')
def model_path(shared_data, tmp_path_factory):
    """The model file of an MTLNet that has learned nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('model') / 'mtl_model.pt'
    split = MTLDataset('test', root=shared_data).split
    model = models.MTLNet(n_classes=len(split.class_names))
    content = models.model_content(model, split.class_names, split.class_species, split.image_size)
    save_checkpoint(path, content)
    return path


@pytest.fixture
def error_line(capsys):
    """Function that runs `main(arguments)` as a script and returns its one line of error."""

    def run(main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: main([str(argument) for argument in arguments]))
        printed = capsys.readouterr().err
        line = printed.splitlines()[-1]
        assert stopped.value.code == 1 and line.startswith('error: ') and 'Traceback' not in printed
        return line

    return run


@pytest.fixture(autouse=True)
def restore_signals():
    """A script's signal handlers end with its test, and pytest can be interrupted."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

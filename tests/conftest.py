"""What the tests share: the scripts on the path, and small prepared data that they may copy."""

import os
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['PYTHONPATH'] = str(ROOT)  # for the tests that start another interpreter

import h5py
import numpy as np
import pytest
import torch

import data_prepare
import data_rechunk

torch.set_num_threads(2)


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


@pytest.fixture
def coursework(tmp_path):
    """Function that writes files of the coursework's kind: four of them, no breeds, any layout."""
    def write(root=tmp_path / 'coursework', count=12, size=(64, 64), dtype='float32', **layout):
        rng = np.random.default_rng(0)
        height, width = size
        for split in data_rechunk.SPLITS:
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
    """Function that writes photographs in the official layout; returns the root."""
    from PIL import Image

    def write(count=40, size=(80, 60), masks=(), boxes=(), breeds=2):
        """`masks` and `boxes`: the numbers of the photographs that have one."""
        root, rng = tmp_path / 'oxford', np.random.default_rng(0)
        folder = root / 'oxford-iiit-pet'
        for part in ('images', 'annotations/trimaps', 'annotations/xmls'):
            (folder / part).mkdir(parents=True)
        lines = ['#Image CLASS-ID SPECIES BREED ID']
        for i in range(count):
            breed = i % breeds
            name = f'breed{breed}_{i}'
            lines.append(f'{name} {breed + 1} {breed % 2 + 1} 1')
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / 'images' / f'{name}.jpg')
            if i in masks:
                trimap = np.full(size[::-1], 2, np.uint8)
                trimap[:, :size[0] // 2] = 1
                trimap[:, size[0] // 2 - 4:size[0] // 2 + 4] = 3
                Image.fromarray(trimap).save(folder / 'annotations' / 'trimaps' / f'{name}.png')
            if i in boxes:
                write_xml(folder / 'annotations' / 'xmls' / f'{name}.xml', size, (8, 6, 40, 30))
        (folder / 'annotations' / 'list.txt').write_text('\n'.join(lines) + '\n')
        return root
    return write


def write_xml(path, size, box):
    corners = ''.join(f'<{key}>{value}</{key}>'
                      for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
    path.write_text(f'<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>'
                    f'<object><bndbox>{corners}</bndbox></object></annotation>')


@pytest.fixture
def fails(capsys):
    """Function that runs `main(arguments)` as a script and returns its one line of error."""
    def run(main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            data_rechunk.run_script(lambda: main([str(argument) for argument in arguments]))
        printed = capsys.readouterr().err
        line = printed.splitlines()[-1]
        assert stopped.value.code == 1 and line.startswith('error: ') and 'Traceback' not in printed
        return line
    return run


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """What a script does with signals ends with its test; and a test can be interrupted from the outside."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in data_rechunk.STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

"""How fast is rechunking? data_rechunk.py against h5repack, h5diff and sync.

    python benchmarks/rechunk.py                    # drawn images; h5repack is in Debian's hdf5-tools

Rechunks images that are stored contiguously, and in chunks of many samples and a piece of the picture with gzip, to
one image a chunk. Ours compares every value with the source and waits until the disk has the file; h5repack with the
same target layout, then h5diff of the two files and sync of the new one promise the same. They take turns in every
round; printed are the median over the rounds and the lowest and highest. The default --count is close below the
256 MiB that h5repack holds in memory; of larger files it makes many small pieces and is fifteen times slower. Expect
three minutes.

The ratio: seconds of h5repack, h5diff and sync to ours, the smaller of the two sources.
"""

import os
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import common
import h5py
import numpy as np

from data_rechunk import rechunk_file
from support.cli import InputError, run_script, whole_number
from support.synthetic_pets import draw_pet

LAYOUTS = {
    'contiguous': {},
    'gzip in bad chunks': {'chunks': (64, 64, 64, 3), 'compression': 'gzip', 'compression_opts': 4},
}
OURS, REPACK = 'data_rechunk.py', 'h5repack, h5diff, sync'


def write_source(path, block, count, layout):
    """`count` images made from `block` (n, H, W, 3)."""
    with h5py.File(path, 'w') as file:
        target = file.create_dataset('images', (count, *block.shape[1:]), np.uint8, **layout)
        for start in range(0, count, len(block)):
            # Shifted, so that no two images are the same.
            target[start : start + len(block)] = np.roll(block, start // len(block), axis=2)[: count - start]


def repack(path):
    target = path.with_name('target.h5')
    with h5py.File(path) as file:
        chunk = 'x'.join(map(str, (1, *file['images'].shape[1:])))
    subprocess.run(['h5repack', '-l', f'images:CHUNK={chunk}', '-f', 'images:NONE', path, target], check=True)
    subprocess.run(['h5diff', path, target], check=True)
    subprocess.run(['sync', target, target.parent], check=True)


def seconds(function, source, folder):
    """Of `function`, given a fresh copy of `source` in `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = shutil.copyfile(source, folder / 'images.h5')
    os.sync()  # what is still to be written is not waited for in what is measured
    start = time.perf_counter()
    function(path)
    return time.perf_counter() - start


def main(argv=None):
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument('--count', type=whole_number(64), default=1280, help='images (default: %(default)s)')
    args = parser.parse_args(argv)
    common.print_heading(parser, argv)
    if not shutil.which('h5repack') or not shutil.which('h5diff'):
        raise InputError("h5repack and h5diff: not found; they come with Debian's hdf5-tools")
    block = np.stack([draw_pet(index, size=256).image for index in range(64)])
    megabytes = args.count * block[0].nbytes / 1e6
    ratios, rows = [], []
    with tempfile.TemporaryDirectory() as scratch:
        source, folder = Path(scratch) / 'source.h5', Path(scratch) / 'train'
        for layout, options in LAYOUTS.items():
            write_source(source, block, args.count, options)
            functions = {OURS: rechunk_file, REPACK: repack}
            measures = {name: partial(seconds, function, source, folder) for name, function in functions.items()}
            values = common.in_turns(measures, args.rounds)
            ratios.append(common.median_ratio(values[REPACK], values[OURS]))
            for name, times in values.items():
                speeds = common.with_range([megabytes / each for each in times], 0)
                ratio = common.median_ratio(times, values[OURS])
                rows.append([f'{layout}: {name}', speeds, f'{ratio:.2f}'])
    common.print_table(['', 'MB/s (range)', 'time to ours'], rows)
    print(f'ratio {min(ratios):.3g}')


if __name__ == '__main__':
    run_script(main)

"""How fast is the loader? Samples a second of MTLDataset against the original's way.

    python benchmarks/loader.py --data datasets/data_new

Both give random-order, normalised float batches of 32 through a DataLoader in a single process, without
augmentation. The original's way opens four files for each sample and stores float32; its files are made
here from the same images. Also measured: reading image and mask as they are stored against copying them
from a numpy memmap on the same file system, with and without checksums on the chunks, and what checksums
cost the loader. The ratio: ours to the original's way.
"""

import tempfile
import time
from pathlib import Path

import common
import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from data_rechunk import rechunk_file
from dataloader_mtl import MEAN, STD, MTLDataset, evaluation_loader
from support.cli import run_script, whole_number
from support.device import keep_freed_memory
from support.hdf5 import SHAPES, SampleReader

STEMS = ('images', 'masks', 'bboxes', 'binary')


class OriginalWay(Dataset):
    """As the study did: float32 storage, four files opened for each sample."""

    def __init__(self, folder, count):
        self.folder, self.count = folder, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        values = []
        for stem in STEMS:
            with h5py.File(self.folder / f'{stem}.h5', 'r') as file:
                values.append(torch.from_numpy(file[f'chunked_{stem}'][index]))
        image, mask, bbox, label = values
        image = v2.functional.normalize(image.permute(2, 0, 1) / 255, MEAN, STD)
        return image, bbox / 255, label, mask.permute(2, 0, 1)


def write_original(dataset, count, folder):
    for stem in STEMS:
        with h5py.File(dataset.folder / f'{stem}.h5') as source, h5py.File(folder / f'{stem}.h5', 'w') as file:
            values = source[f'chunked_{stem}']
            shape = values.shape[1:]
            target = file.create_dataset(f'chunked_{stem}', (count, *shape), np.float32, chunks=(1, *shape))
            for index in range(count):
                target[index] = values[index]


def copy_with_checksums(source, count, folder):
    """The first `count` samples of a split, rechunked with or without checksums on the chunks."""
    for checksums in False, True:
        split = folder / f'checksums_{checksums}' / 'train'
        split.mkdir(parents=True)
        for path in source.glob('*.h5'):
            if path.stem in SHAPES:
                with h5py.File(path) as old, h5py.File(split / path.name, 'w') as new:
                    new[path.stem] = old[path.stem][:count]
                    for key, value in old[path.stem].attrs.items():
                        new[path.stem].attrs[key] = value
                rechunk_file(split / path.name, checksums=checksums)


def samples_per_second(loader):
    """The best of three passes: the files are in the system's cache, and others disturb."""
    best = 0
    for _ in range(3):
        start = time.perf_counter()
        count = sum(len(batch[0]) for batch in loader)
        best = max(best, count / (time.perf_counter() - start))
    return best


def reads_per_second(read, order):
    """The best of three passes, too."""
    best = 0
    for _ in range(3):
        start = time.perf_counter()
        for index in order:
            read(index)
        best = max(best, len(order) / (time.perf_counter() - start))
    return best


def main(argv=None):
    parser = common.parser(__doc__)
    common.data_option(parser, 600)
    parser.add_argument('--count', type=whole_number(32), default=400, help='samples to read (default: %(default)s)')
    args = parser.parse_args(argv)
    keep_freed_memory()
    with common.prepared(args.data, 600) as data, tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        dataset = MTLDataset('train', root=data)
        count = min(args.count, len(dataset))
        order = np.random.default_rng(0).permutation(count).tolist()
        write_original(dataset, count, scratch)
        copy_with_checksums(dataset.folder, count, scratch)

        speeds, reads = {}, {}
        for checksums in False, True:
            part = MTLDataset('train', root=scratch / f'checksums_{checksums}')
            readers = [SampleReader(part.folder / f'{stem}.h5') for stem in ('images', 'masks')]
            arrays = [np.empty(reader.shape, reader.dtype) for reader in readers]

            def read(index, readers=readers, arrays=arrays):
                for reader, array in zip(readers, arrays):
                    reader.read(index, array)

            name = 'checksums' if checksums else 'plain'
            speeds[name] = samples_per_second(evaluation_loader(Subset(part, order), 32, workers=0))
            reads[name] = reads_per_second(read, order)

        maps = []
        for number, reader in enumerate(readers):
            path = scratch / f'{number}.raw'
            reader.dataset[()].tofile(path)
            maps.append(np.memmap(path, reader.dtype, 'r', shape=reader.dataset.shape))

        def copy(index):
            for memory, array in zip(maps, arrays):
                np.copyto(array, memory[index])

        reads['memmap'] = reads_per_second(copy, order)
        speeds['original'] = samples_per_second(DataLoader(Subset(OriginalWay(scratch, count), order), 32))

    print(
        f'original way: {speeds["original"]:.0f} samples/s; MTLDataset: {speeds["plain"]:.0f}, with checksums '
        f'{speeds["checksums"]:.0f} ({1 - speeds["checksums"] / speeds["plain"]:.0%} less)'
    )
    print(
        f'image and mask as stored: {reads["plain"]:.0f} reads/s, with checksums {reads["checksums"]:.0f}; '
        f'memmap copy {reads["memmap"]:.0f} (ours is {reads["plain"] / reads["memmap"]:.2f} of it)'
    )
    metrics = {'samples_per_second': speeds, 'reads_per_second': reads}
    common.finish(speeds['plain'] / speeds['original'], metrics, args.json)


if __name__ == '__main__':
    run_script(main)

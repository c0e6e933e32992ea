"""What does loading an image cost on one core? MTLDataset against v2, its kernels alone and the study's way.

    python benchmarks/loader.py --data datasets/data_new

The samples are drawn as train_mtl.py draws them, in random order. 'augmented' is the training's path at
128 x 128, RandomCropFlip and colour jitter in batches of 32: against the same with v2's transforms, and
against its kernels alone, which are the limit: reading the chunks, one resize an image, and the colours of a
batch. 'plain' is the evaluation's path at the stored size in batches of 32: float32, the same from files
with checksums, the chunks read as uint8 without normalisation, a copy of them from a numpy memmap, and the
study's way, which opens four files for each sample and stores float32; its files are made here from the same
images. The lines take turns in every round; printed are the median over the rounds and the lowest and highest.

The last line but one: what one core takes for loading, as a share of what it takes for a step of train_mtl.py at
128 x 128. Expect two minutes. The ratio: the study's way to ours, both plain float32.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import common
import h5py
import numpy as np
import torch
import torch.nn.functional as F
from reference import StudyDataset, write_study_files
from steps import CPU, OURS, make_batch, make_run, seconds_per_step
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

import engine
from data_rechunk import rechunk_file
from dataloader_mtl import (
    JITTER,
    EpochBatches,
    MTLDataset,
    RandomCropFlip,
    colour_jitter,
    epoch_positions,
    evaluation_loader,
    normalise,
    split_batches,
)
from support.cli import run_script, whole_number
from support.device import keep_freed_memory
from support.hdf5 import SHAPES, SampleReader

SIZE, BATCH_SIZE = (128, 128), 16
V2 = v2.Compose(
    [v2.RandomHorizontalFlip(), v2.RandomResizedCrop(SIZE, scale=(0.4, 1.0), ratio=(0.8, 1.25), antialias=True)]
)


# ---- files of the same samples


def write_split(folder, chosen, root, checksums):
    """The MTLDataset of the `chosen` samples of a split, rechunked under `root`."""
    split = root / 'train'
    split.mkdir(parents=True)
    for stem in SHAPES:
        if (folder / f'{stem}.h5').exists():
            with h5py.File(folder / f'{stem}.h5') as old, h5py.File(split / f'{stem}.h5', 'w') as new:
                new[stem] = old[stem][chosen]
                new[stem].attrs.update(old[stem].attrs)
            rechunk_file(split / f'{stem}.h5', checksums=checksums)
    return MTLDataset('train', root=root)


# ---- what is measured: each function reads the samples of `order` once


def read_all(loader):
    for _ in loader:
        pass


def augmented_loader(dataset, order, transform):
    dataset = MTLDataset('train', transform, dataset.folder.parent, jitter=JITTER)
    part = Subset(dataset, range(len(dataset)))
    return EpochBatches(part, split_batches(order, BATCH_SIZE), 0, 1).loader(0, 0, CPU)


class Kernels:
    """What MTLDataset cannot do without; the loops in Python are over images that are ready."""

    def __init__(self, dataset, order):
        self.order, self.has_mask = order, dataset.labelled['mask']
        self.readers = [SampleReader(dataset.folder / f'{stem}.h5') for stem in ('images', 'masks')]
        self.images, self.masks = (np.empty((len(order), *reader.shape), reader.dtype) for reader in self.readers)
        self.read()
        crops, _ = RandomCropFlip(*SIZE).draw(len(order), *dataset.image_size)
        self.windows, self.mask_windows = [], []
        for row, (top, left, height, width) in enumerate(crops.tolist()):
            window = (slice(row, row + 1), slice(top, top + height), slice(left, left + width))
            self.windows.append(torch.from_numpy(self.images[window]).permute(0, 3, 1, 2))
            if self.has_mask[order[row]]:
                self.mask_windows.append(torch.from_numpy(self.masks[window]).permute(0, 3, 1, 2))
        self.batches = torch.cat(self.resize()).split(BATCH_SIZE)

    def read(self):
        images, masks = self.readers
        for row, index in enumerate(self.order):
            images.read(index, self.images[row])
            if self.has_mask[index]:
                masks.read(index, self.masks[row])

    def resize(self):
        for mask in self.mask_windows:
            F.interpolate(mask, SIZE, mode='nearest-exact')
        return [F.interpolate(image, SIZE, mode='bilinear', antialias=True) for image in self.windows]

    def colour(self):
        for batch in self.batches:
            normalise(colour_jitter(v2.functional.to_dtype(batch, torch.float32, scale=True), JITTER))


def memmap_copies(kernels, folder):
    """A function that does what `kernels.read` does by copying from memory-mapped files."""
    maps = []
    for number, reader in enumerate(kernels.readers):
        path = folder / f'{number}.raw'
        reader.dataset[()].tofile(path)
        maps.append(np.memmap(path, reader.dtype, 'r', shape=reader.dataset.shape))

    def copy():
        for row, index in enumerate(kernels.order):
            np.copyto(kernels.images[row], maps[0][index])
            if kernels.has_mask[index]:
                np.copyto(kernels.masks[row], maps[1][index])

    return copy


def milliseconds(function, count):
    """For one of `count` images, in a second pass: what the first finds in caches and memory is another's."""
    function()
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) / count * 1e3


def main(argv=None):
    parser = common.parser(__doc__)
    common.data_option(parser, 600)
    parser.add_argument('--count', type=whole_number(32), default=640, help='samples on disk (default: %(default)s)')
    parser.add_argument('--rounds', type=whole_number(1), default=5, help='default: %(default)s')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    common.print_heading(parser, argv)
    with common.prepared(args.data, 600) as data, tempfile.TemporaryDirectory() as scratch:
        scratch, folder = Path(scratch), Path(data) / 'train'
        torch.manual_seed(0)
        # Not the first ones: a split is in the order of the labels.
        chosen = torch.randperm(len(MTLDataset('train', root=data)))[: args.count].sort().values.tolist()
        write_study_files(folder, chosen, scratch)
        plain, checked = (write_split(folder, chosen, scratch / f'checksums_{each}', each) for each in (False, True))
        positions = epoch_positions(Subset(plain, range(len(plain))), engine.SCRATCH.mask_repeats)
        order = positions[torch.randperm(len(positions))].tolist()
        kernels = Kernels(plain, order)
        share = float(plain.labelled['mask'][order].mean())
        with_mask = Subset(plain, plain.with_labels(['mask']))
        step = make_run(OURS, plain), make_batch(OURS, with_mask, SIZE, BATCH_SIZE, share)
        plain.transform, study = None, StudyDataset(scratch, len(chosen))
        functions = {
            'augmented': partial(read_all, augmented_loader(plain, order, RandomCropFlip(*SIZE))),
            "augmented, v2's transforms": partial(read_all, augmented_loader(plain, order, V2)),
            'its kernels: crop and resize': kernels.resize,
            'its kernels: colours': kernels.colour,
            'its kernels: read, uint8': kernels.read,
            'plain, float32': partial(read_all, evaluation_loader(Subset(plain, order), 32, workers=0)),
            'plain, float32, checksums': partial(read_all, evaluation_loader(Subset(checked, order), 32, workers=0)),
            'plain, memmap copy': memmap_copies(kernels, scratch),
            'plain, float32, the study': partial(read_all, DataLoader(Subset(study, order), 32)),
        }
        measures = {name: partial(milliseconds, function, len(order)) for name, function in functions.items()}
        measures['step'] = lambda: seconds_per_step(*step, seconds=2) / BATCH_SIZE * 1e3
        values = common.in_turns(measures, args.rounds)
    step_times = values.pop('step')
    kernel_times = [each for name, each in values.items() if name.startswith('its kernels')]
    values['its kernels, all three'] = [sum(each) for each in zip(*kernel_times)]
    values['plain, uint8'] = values['its kernels: read, uint8']
    rows = []
    for name, each in sorted(values.items()):
        base = values['plain, float32' if name.startswith('plain') else 'augmented']
        ratio = statistics.median(value / other for value, other in zip(each, base))
        rows.append([name, common.with_range(each, 3), f'{ratio:.2f}'])
    common.print_table(['', 'ms an image (range)', 'to ours'], rows)
    loading, training = (statistics.median(each) for each in (values['augmented'], step_times))
    print(
        f'one core: {loading:.2f} ms an image to load, {training:.1f} to train at {SIZE[1]} x {SIZE[0]}, '
        f'{share:.0%} with a mask: {loading / training:.1%}'
    )
    ratio = statistics.median(
        value / other for value, other in zip(values['plain, float32, the study'], values['plain, float32'])
    )
    common.finish(ratio, {'ms_per_image': values, 'step_ms_per_image': step_times}, args.json)


if __name__ == '__main__':
    run_script(main)

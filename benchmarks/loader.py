"""What does loading cost on one core? MTLDataset against torchvision's v2 transforms, and against a training step.

    python benchmarks/loader.py --data datasets/data_new

Reads the first --count images of an epoch of train_mtl.py, augmented to 128 x 128 in batches of 32: with
RandomCropFlip, and with v2's transforms on one image after the other. Both read the files a second time when they are
measured, from the system's cache. They and a step of training at 128 x 128 take turns in every round; printed are the
median over the rounds and the lowest and highest. Expect two minutes.

The ratio: v2's transforms to ours.
"""

import statistics
import time
from functools import partial

import common
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from train_step import LINES, RECIPE, make_step, seconds_per_step

from dataloader_mtl import MTLDataset, RandomCropFlip, draw_epoch, load_batches
from engine import Config
from support.cli import run_script, whole_number
from support.device import keep_freed_memory

SIZE = (128, 128)
OURS, V2, STEP = 'loading', "loading, v2's transforms", 'training step'
TRANSFORMS = v2.Compose(
    [v2.RandomResizedCrop(SIZE, scale=Config.crop, ratio=(0.8, 1.25), antialias=True), v2.RandomHorizontalFlip()]
)


def one_by_one(images, boxes, masks):
    """RandomCropFlip as torchvision has them, on one image after the other."""
    samples = []
    for image, box, mask in zip(images, boxes, masks):
        box = tv_tensors.BoundingBoxes(box[None], format='XYXY', canvas_size=image.shape[-2:])
        samples.append(TRANSFORMS(tv_tensors.Image(image), box, tv_tensors.Mask(mask)))
    images, boxes, masks = zip(*samples)
    return torch.stack(images), torch.cat(boxes), torch.stack(masks)


def make_batches(data, transform, count):
    """The EpochBatches of `count` training images in batches of 32."""
    dataset = MTLDataset('train', transform, data)
    part = torch.utils.data.Subset(dataset, range(len(dataset)))
    steps = -(-count // Config.batch_size)
    return draw_epoch(part, Config.batch_size, seed=0, epoch=1, steps=steps)


def milliseconds(batches):
    """For one image, in a second pass: what the first finds in caches and memory is another's."""
    for _ in range(2):
        start = time.perf_counter()
        images = sum(len(batch.image) for batch in load_batches(batches, range(len(batches)), 0, torch.device('cpu')))
    return (time.perf_counter() - start) / images * 1e3


def main(argv=None):
    parser = common.make_parser(__doc__, rounds=5, pets=600)
    parser.add_argument('--count', type=whole_number(32), default=640, help='images (default: %(default)s)')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    common.print_heading(parser, argv)
    with common.prepared(args.data, 600) as data:
        take_step = make_step(LINES[RECIPE], SIZE, Config(data, device='cpu'))
        measures = {
            OURS: partial(milliseconds, make_batches(data, RandomCropFlip(*SIZE), args.count)),
            V2: partial(milliseconds, make_batches(data, one_by_one, args.count)),
            STEP: lambda: seconds_per_step(take_step, seconds=2) / Config.batch_size * 1e3,
        }
        values = common.in_turns(measures, args.rounds)
    common.print_table(['', 'ms an image (range)'], [[name, common.with_range(values[name], 3)] for name in measures])
    loading, step = (statistics.median(values[name]) for name in (OURS, STEP))
    print(f'loading takes {loading / step:.1%} of the time of a training step at {SIZE[1]} x {SIZE[0]}')
    print(f'ratio {common.median_ratio(values[V2], values[OURS]):.3g}')


if __name__ == '__main__':
    run_script(main)

"""What makes the training fast? A waterfall in images a second, from the reference network to train_mtl.py's recipe.

    python benchmarks/train_step.py --data datasets/data_new

Every line is one step of training on a batch in memory (loader.py measures loading): forward, backward,
optimiser and, for ours, the moving average. All take the same --batch-size images with a mask, at the stored
size; the last two lines of the waterfall alone have the recipe's share of masks, and then its image sizes,
averaged over its epochs. Beside it: other encoders, and smp's Unet with the mask alone, in the same precision
and layout (pip install -r benchmarks/requirements.txt).

The lines take turns in every round, each for --seconds or one step; printed are the median over the rounds and
the lowest and highest. The setting of the C library's allocator cannot be undone in a process, so the
lines before it run in a process of their own. 'of peak' are the FLOPs of the convolutions in a second of the
whole step, as a share of what the best matrix product of 2,048 x 2,048 reaches in the same precision. Expect
four minutes on two cores.

The ratio: our network, at the same size and with a mask for every image, to the reference as it is.
"""

import statistics
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import common
import torch
from reference import ReferenceNet, SmpUNet, import_smp
from steps import FAST, OURS, REFERENCE, Line, convolution_flops, make_batch, make_run, matmul_flops, seconds_per_step

import engine
from dataloader_mtl import epoch_positions, load_splits, training_size
from models import MTLNet, UNet
from support.cli import positive_number, run_script, whole_number
from support.device import keep_freed_memory

IMAGENET = ('tf_efficientnet_lite0', 'imagenet')
WATERFALL = {
    'reference: NCHW, float32': REFERENCE,
    '+ channels_last': REFERENCE._replace(channels_last=True),
    '+ freed memory kept': REFERENCE._replace(channels_last=True, keep_memory=True),
    '+ bfloat16' if FAST else '(no bfloat16 on this CPU)': Line(ReferenceNet, study=True),
    '+ our network and loss': OURS,
}
OTHERS = {
    'ours, ImageNet encoder': Line(MTLNet, IMAGENET),
    'ours, mask alone': Line(UNet),
    'ours, mask alone, ImageNet encoder': Line(UNet, IMAGENET),
    'smp resnet18, mask alone': Line(partial(SmpUNet, encoder='resnet18')),
    'smp resnet34, mask alone': Line(partial(SmpUNet, encoder='resnet34')),
}
LINES = WATERFALL | OTHERS


# ---- in a process of its own

RUNS = {}  # of this process: {Case: (run, batch)}


class Case(NamedTuple):
    """What takes its turn: a line of the table, at one size (height, width) and with a share of masks."""

    name: str
    size: tuple
    share: float


def start_process(keep_memory, threads):
    torch.set_num_threads(threads)
    if keep_memory:
        keep_freed_memory()


def prepare(case, data, batch_size):
    """Take the first step of a case; returns its FLOPs."""
    part, line = load_splits(data, ['mask'])['train'], LINES[case.name]
    RUNS[case] = make_run(line, part.dataset), make_batch(line, part, case.size, batch_size, case.share)
    return convolution_flops(*RUNS[case])


def measure(case, seconds):
    return seconds_per_step(*RUNS[case], seconds)


# ---- the table


def recipe_cases(data):
    """The parts of the last two lines of the waterfall: {line: {Case: epochs}}."""
    part, epochs = load_splits(data, MTLNet.tasks)['train'], engine.training_parser('', out='').parse_args([]).epochs
    recipe, dataset, name = engine.SCRATCH, part.dataset, list(WATERFALL)[-1]
    indices = torch.as_tensor(part.indices)[epoch_positions(part, recipe.mask_repeats)]
    share = float(dataset.labelled['mask'][indices].mean())
    sizes = Counter(training_size(epoch, epochs, dataset.image_size, recipe.sizes) for epoch in range(1, epochs + 1))
    return {
        f'+ {share:.0%} of the images decoded': {Case(name, dataset.image_size, share): 1},
        '+ image sizes of the recipe': {Case(name, size, share): count for size, count in sizes.items()},
    }


def weighted_mean(parts, values):
    """Of {Case: list of float} with the weights {Case: weight}: list of float."""
    total = sum(parts.values())
    return [sum(each) / total for each in zip(*([w * value for value in values[case]] for case, w in parts.items()))]


def make_rows(lines, seconds, flops, peaks, batch_size):
    """The rows of the table, and {line: {'images_per_second', ...}}; the first of `lines` is the reference."""
    rows, results, first, before = [], {}, None, None
    for name, parts in lines.items():
        spent = weighted_mean(parts, seconds)
        speeds = [batch_size / each for each in spent]
        first = first or speeds
        to_first = statistics.median(speed / other for speed, other in zip(speeds, first))
        step = ''
        if before and name not in OTHERS:
            step = f'{statistics.median(speed / other for speed, other in zip(speeds, before)):.2f}'
        before = speeds
        (count,) = weighted_mean(parts, {case: [value] for case, value in flops.items()})
        peak = peaks[LINES[next(iter(parts)).name].bfloat16]
        of_peak = count / statistics.median(spent) / peak
        results[name] = {'images_per_second': speeds, 'to_reference': to_first, 'of_peak': of_peak}
        gigaflops = f'{count / batch_size / 1e9:.1f}'
        rows.append([name, common.with_range(speeds, 1), step, f'{to_first:.2f}', gigaflops, f'{of_peak:.0%}'])
    return rows, results


def main(argv=None):
    parser = common.parser(__doc__)
    common.data_option(parser, 300)
    threads = torch.get_num_threads()
    add = parser.add_argument
    add('--rounds', type=whole_number(1), default=5, help='default: %(default)s')
    add('--seconds', type=positive_number, default=1.0, help='of a line in a round (default: %(default)s)')
    add('--batch-size', type=whole_number(1), default=16, help='images of a step (default: %(default)s)')
    add('--threads', type=whole_number(1), default=threads, help='default: %(default)s')
    args = parser.parse_args(argv)
    import_smp()
    torch.set_num_threads(args.threads)
    common.print_heading(parser, argv)
    with common.prepared(args.data, 300) as data:
        recipe = recipe_cases(data)
        (full,) = recipe[next(iter(recipe))]
        lines = {name: {full._replace(name=name, share=1.0): 1} for name in WATERFALL} | recipe
        lines |= {name: {full._replace(name=name, share=1.0): 1} for name in OTHERS}
        cases = list(dict.fromkeys(case for parts in lines.values() for case in parts))
        start = partial(ProcessPoolExecutor, 1, get_context('spawn'), start_process)
        with start((False, args.threads)) as plain, start((True, args.threads)) as keeping:
            pools = {case: keeping if LINES[case.name].keep_memory else plain for case in cases}
            flops = {case: pools[case].submit(prepare, case, data, args.batch_size).result() for case in cases}
            measures = {
                case: lambda case=case: pools[case].submit(measure, case, args.seconds).result() for case in cases
            }
            for fast, dtype in (False, torch.float32), (True, torch.bfloat16):
                measures[fast] = lambda dtype=dtype: keeping.submit(matmul_flops, dtype).result()
            values = common.in_turns(measures, args.rounds)
    peaks = {fast: max(values[fast]) for fast in (False, True)}
    rows, results = make_rows(lines, values, flops, peaks, args.batch_size)
    titles = ['', 'images/s (range)', 'to the one before', 'to the reference', 'GFLOP an image', 'of peak']
    common.print_table(titles, rows)
    print(f'peak: {peaks[False] / 1e9:.0f} GFLOP/s in float32, {peaks[True] / 1e9:.0f} in bfloat16')
    ratio = results[list(WATERFALL)[-1]]['to_reference']
    common.finish(ratio, {'lines': results, 'peak_flops': list(peaks.values())}, args.json)


if __name__ == '__main__':
    run_script(main)

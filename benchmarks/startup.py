"""How long does a photograph take: from the command line, with `predict`, and with ONNX Runtime?

    python benchmarks/startup.py                        # a drawn pet
    python benchmarks/startup.py --photograph cat.jpg --threads 1

Times `python mtl_vis.py PHOTOGRAPH` from start to the written picture, against a Python that imports torch and
torchvision and ends, in turns. Then images a second, at the model's size, of `predict` one by one and in batches
of 16, with and without flip, and of the ONNX file that export_onnx.py writes; in turns, the median of --rounds
and their range. The ratio: the command to the imports.
"""

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import common
import numpy as np
import onnxruntime
import torch
from PIL import Image

from export_onnx import export
from models import MODEL
from prediction import load_model, predict
from support.cli import run_script
from support.synthetic_pets import draw_pet

IMPORTS, COMMAND = 'imports', 'mtl_vis.py'


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def start_up(photograph, args, scratch):
    """{name: seconds of each round} of the command and of the imports."""
    script = [str(common.ROOT / COMMAND), str(photograph.resolve()), '--model', args.model]
    commands = {IMPORTS: ['-c', 'import torch, torchvision'], COMMAND: [*script, '--out', str(scratch / 'mask.png')]}
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    measures = {name: partial(seconds, partial(run, [sys.executable, *rest])) for name, rest in commands.items()}
    common.in_turns(measures, 1)  # fills the system's cache
    return common.in_turns(measures, args.rounds)


def speeds(args, scratch):
    """{name: images a second of each round}."""
    model, path = load_model(args.model), scratch / 'model.onnx'
    export(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    height, width = model.image_size
    images = [np.asarray(Image.fromarray(draw_pet(index).image).resize((width, height))) for index in range(16)]

    def run_session(batch_size):
        for start in range(0, len(images), batch_size):
            session.run(None, {'images': np.stack(images[start : start + batch_size])})

    functions = {}
    for size in 1, 16:
        look_once = partial(predict, model, images, batch_size=size, zoom=False)
        functions[f'predict, batches of {size}'] = look_once
        functions[f'predict, batches of {size}, flip'] = partial(look_once, flip=True)
        functions[f'ONNX Runtime, batches of {size}'] = partial(run_session, size)
    measures = {name: lambda each=each: len(images) / seconds(each) for name, each in functions.items()}
    common.in_turns(measures, 1)
    return common.in_turns(measures, args.rounds)


def main(argv=None):
    parser = common.make_parser(__doc__, rounds=5)
    common.add_threads(parser)
    parser.add_argument('--photograph', type=Path, metavar='FILE', help='default: a drawn pet')
    parser.add_argument('--model', default=MODEL, metavar='FILE', help='default: the shipped one')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    common.print_heading(parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        photograph = args.photograph or scratch / 'pet.png'
        if args.photograph is None:
            Image.fromarray(draw_pet(0, size=512).image).save(photograph)
        times, found = start_up(photograph, args, scratch), speeds(args, scratch)
    common.print_table(['', 'seconds'], [[name, common.with_range(each, 2)] for name, each in times.items()])
    common.print_table(['', 'images/s'], [[name, common.with_range(each, 1)] for name, each in found.items()])
    print(f'ratio {common.median_ratio(times[COMMAND], times[IMPORTS]):.3g}')


if __name__ == '__main__':
    run_script(main)

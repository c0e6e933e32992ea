"""How long does a photograph take: from the command line, with `predict`, and with ONNX Runtime?

    python benchmarks/startup.py                        # a drawn pet
    python benchmarks/startup.py --photograph cat.jpg --threads 1

Times `python mtl_vis.py PHOTOGRAPH` from start to the written picture, against a Python that imports torch and
torchvision and ends, in turns. Then images a second, at the model's size, of `predict` one by one and in batches
of 16, with and without flip, and of the ONNX file that export_onnx.py writes; in turns, the median of --rounds
and their range. The ratio: the command to the imports, the medians of both.
"""

import statistics
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
from prediction import load_model, predict
from support.cli import run_script, whole_number
from synthetic_pets import draw_pet

IMPORTS = 'import torch, torchvision'


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def start_up(photograph, args, scratch):
    """{name: seconds of each round} of the command and of the imports."""
    script = [str(common.ROOT / 'mtl_vis.py'), str(photograph.resolve()), '--model', str(args.model)]
    commands = {'imports': ['-c', IMPORTS], 'mtl_vis.py': [*script, '--out', str(scratch / 'mask.png')]}
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, cwd=common.ROOT)
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
    size = (model.image_size[1], model.image_size[0])
    pets = [Image.fromarray(draw_pet(index, size=256).image).resize(size) for index in range(16)]
    images = list(map(np.asarray, pets))
    functions = {}
    for size in 1, 16:
        batches = [images[start : start + size] for start in range(0, len(images), size)]
        for flip in False, True:
            name = f'predict, batches of {size}{", flip" if flip else ""}'
            functions[name] = partial(predict, model, images, flip, size)
        functions[f'ONNX Runtime, batches of {size}'] = partial(run_session, session, list(map(np.stack, batches)))
    measures = {name: lambda each=each: len(images) / seconds(each) for name, each in functions.items()}
    common.in_turns(measures, 1)
    return common.in_turns(measures, args.rounds)


def run_session(session, batches):
    for batch in batches:
        session.run(None, {'images': batch})


def main(argv=None):
    parser = common.parser(__doc__)
    threads = torch.get_num_threads()
    add = parser.add_argument
    add('--photograph', type=Path, metavar='FILE', help='default: a drawn pet')
    add('--model', default=common.ROOT / 'mtl_model.pt', metavar='FILE', help='default: %(default)s')
    add('--rounds', type=whole_number(1), default=5, help='default: %(default)s')
    add('--threads', type=whole_number(1), default=threads, help='of the network (default: %(default)s)')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    common.print_heading(parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        photograph = args.photograph or scratch / 'pet.jpg'
        if args.photograph is None:
            Image.fromarray(draw_pet(0, size=512).image).save(photograph)
        times = start_up(photograph, args, scratch)
        found = speeds(args, scratch)
    common.print_table(
        ['from the command line', 'seconds'], [[name, common.with_range(each, 2)] for name, each in times.items()]
    )
    common.print_table(
        ["images of the model's size", 'images/s'], [[name, common.with_range(each, 1)] for name, each in found.items()]
    )
    medians = {name: statistics.median(each) for name, each in times.items()}
    results = {'seconds': times, 'images_per_second': found}
    common.finish(medians['mtl_vis.py'] / medians['imports'], results, args.json)


if __name__ == '__main__':
    run_script(main)

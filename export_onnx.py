"""Write a trained model as one ONNX file, for prediction without torch.

    python export_onnx.py --model mtl_model.pt --out mtl_model.onnx

The input 'images' is uint8 (N, H, W, 3), RGB, at the size (H, W) that the model was trained for, any N. The outputs
are float32, for the tasks that the model has:

    breed_probabilities (N, C)       in [0, 1], for the C class names
    mask_probability    (N, H, W)    in [0, 1], above 0.5 where the pet is
    bbox                (N, 4)       xmin, ymin, xmax, ymax of the head in [0, 1] of width and height

The file's metadata has 'class_names', 'class_species' ('cat', 'dog' or null) and 'image_size' (H, W), each as JSON.
Before it is done, the file is run with ONNX Runtime and compared with `predict`.
"""

import argparse
import json
import logging
import warnings

import numpy as np
import torch
from torch import nn

from dataloader_mtl import normalise
from prediction import load_model, predict
from support.cli import InputError, file_to_write, run_script
from support.files import replacing

LARGEST_DIFFERENCE = 1e-4  # between probabilities, and coordinates in [0, 1], of the file and of `predict`
OPSET = 18


class Exported(nn.Module):
    """The model with normalisation and probabilities: images, uint8 (N, H, W, 3), -> a tuple of its outputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        tasks = {'class': 'breed_probabilities', 'mask': 'mask_probability', 'box': 'bbox'}
        self.names = [name for task, name in tasks.items() if task in model.tasks]

    def forward(self, images):
        label, mask, bbox = self.model(normalise(images.permute(0, 3, 1, 2)))
        label = None if label is None else label.softmax(dim=1)
        mask = None if mask is None else mask.sigmoid()[:, 0]
        return tuple(output for output in (label, mask, bbox) if output is not None)


def export(model, path):
    """Write the ONNX file of a model from `load_model`; returns its largest difference from `predict`.

    Raises InputError, and leaves `path` as it was, for a difference of LARGEST_DIFFERENCE or more.
    """
    exported, size = Exported(model).eval(), model.image_size
    # Not 1, which the exporter would take for a fixed number.
    example = torch.zeros(2, *size, 3, dtype=torch.uint8)
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.onnx.export(
            exported,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim('N')},),
            input_names=['images'],
            output_names=exported.names,
            opset_version=OPSET,
            verbose=False,
        )
    about = {'class_names': model.class_names, 'class_species': model.class_species, 'image_size': size}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    with replacing(path) as part:
        program.save(part)
        difference = compare(model, part)
        if not difference < LARGEST_DIFFERENCE:
            raise InputError(f'{path}: not written, as its outputs differ from those of `predict` by {difference:.1e}')
    return difference


def compare(model, path, count=3):
    """The largest difference of the ONNX file's outputs from those of `predict`, on random images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    height, width = model.image_size
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {'images': images})))
    differences = [0.0]
    for row, prediction in enumerate(predict(model, list(images))):
        if prediction.breeds is not None:
            found = dict(zip(model.class_names, outputs['breed_probabilities'][row]))
            differences += [abs(found[breed] - probability) for breed, probability in prediction.breeds]
        if prediction.mask is not None:
            differences.append(np.abs(outputs['mask_probability'][row] - prediction.mask_probability).max())
        if prediction.bbox is not None:
            box = np.array(prediction.bbox) / [width, height, width, height]
            differences.append(np.abs(outputs['bbox'][row] - box).max())
    return float(max(differences))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model', default='mtl_model.pt', metavar='FILE', help='of train_mtl.py (default: %(default)s)')
    add('--out', type=file_to_write, default='mtl_model.onnx', metavar='FILE', help='default: %(default)s')
    args = parser.parse_args(argv)
    model = load_model(args.model)
    difference = export(model, args.out)
    height, width = model.image_size
    print(f'{args.out}: images (N, {height}, {width}, 3) uint8 -> {", ".join(Exported(model).names)}')
    print(f'largest difference from predict: {difference:.1e}')


if __name__ == '__main__':
    run_script(main)

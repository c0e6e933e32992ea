"""The ONNX file, torch.export and torch.jit.trace."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

import export_onnx
from export_onnx import Exported
from models import AblatedNet, BoxNet, MTLNet, UNet, load_model, model_content
from prediction import predict
from support.checkpoint import save_checkpoint

OUTPUTS = {
    MTLNet: ['breed_probabilities', 'mask_probability', 'bbox'],
    UNet: ['mask_probability'],
    AblatedNet: ['breed_probabilities', 'mask_probability'],
    BoxNet: ['bbox'],
}
NAMES, SPECIES = ['Bengal', 'pug', 'シャム'], ['cat', 'dog', None]


def write_model(path, network, encoder='unet'):
    torch.manual_seed(0)
    save_checkpoint(path, model_content(network(n_classes=3, encoder=encoder), NAMES, SPECIES, (64, 80)))
    return path


def draw_images(count):
    return np.random.default_rng(count).integers(0, 256, (count, 64, 80, 3), dtype=np.uint8)


def assert_as_predict(outputs, model, images):
    """`outputs`: a tuple of arrays or tensors, as an Exported has them."""
    outputs = dict(zip(OUTPUTS[type(model)], map(np.asarray, outputs), strict=True))
    for row, expected in enumerate(predict(model, list(images))):
        if expected.breeds:
            breeds = dict(zip(NAMES, outputs['breed_probabilities'][row]))
            assert breeds == pytest.approx(dict(expected.breeds), abs=1e-4)
        if expected.bbox:
            assert outputs['bbox'][row] * [80, 64, 80, 64] == pytest.approx(expected.bbox, abs=1e-2)
        if expected.mask is not None:
            assert outputs['mask_probability'][row] == pytest.approx(expected.mask_probability, abs=1e-4)


@pytest.mark.parametrize(
    'network, encoder',
    [
        (MTLNet, 'unet'),
        pytest.param(UNet, 'unet', marks=pytest.mark.slow),
        pytest.param(AblatedNet, 'unet', marks=pytest.mark.slow),
        pytest.param(MTLNet, 'tf_efficientnet_lite0', marks=pytest.mark.slow),
    ],
)
def test_onnx_file_predicts_what_predict_does_for_any_number_of_images(network, encoder, tmp_path, capsys):
    path, out = write_model(tmp_path / 'model.pt', network, encoder), tmp_path / 'model.onnx'
    export_onnx.main(['--model', str(path), '--out', str(out)])
    assert 'largest difference from the model: ' in capsys.readouterr().out
    assert sorted(each.name for each in tmp_path.iterdir()) == ['model.onnx', 'model.pt']
    session = onnxruntime.InferenceSession(out)
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert about == {'class_names': NAMES, 'class_species': SPECIES, 'image_size': [64, 80]}
    assert [output.name for output in session.get_outputs()] == OUTPUTS[network]
    for count in 1, 5:
        images = draw_images(count)
        assert_as_predict(session.run(None, {'images': images}), load_model(path), images)


@pytest.mark.filterwarnings('ignore:.*torch.jit', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('network', [MTLNet, BoxNet])
def test_torch_export_and_trace_predict_what_predict_does(network, tmp_path):
    model, images = load_model(write_model(tmp_path / 'model.pt', network)), draw_images(2)
    exported, example = Exported(model).eval(), torch.from_numpy(images)
    assert exported.names == OUTPUTS[network]
    file = io.BytesIO()
    torch.export.save(torch.export.export(exported, (example,)), file)
    file.seek(0)
    with torch.no_grad():
        assert_as_predict(torch.export.load(file).module()(example), model, images)
        assert_as_predict(torch.jit.trace(exported, example)(example), model, images)


@pytest.mark.parametrize('wrong', [0.5, np.nan])
def test_file_that_differs_from_the_model_is_not_written(wrong, tmp_path, monkeypatch, error_line):
    path, out = write_model(tmp_path / 'model.pt', UNet), tmp_path / 'model.onnx'
    out.write_bytes(b'old')
    program = SimpleNamespace(model=SimpleNamespace(metadata_props={}), save=lambda part: part.write_bytes(b'new'))
    monkeypatch.setattr(torch.onnx, 'export', lambda *_, **__: program)
    session = SimpleNamespace(run=lambda *_: [np.full((3, 64, 80), wrong)])
    monkeypatch.setattr(onnxruntime, 'InferenceSession', lambda *_, **__: session)
    line = error_line(export_onnx.main, '--model', path, '--out', out)
    assert "model.onnx: not written, as its outputs differ from the model's by" in line
    assert out.read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('package', ['onnx', 'onnxscript', 'onnxruntime'])
def test_missing_package_is_one_line_before_anything_is_done(package, tmp_path, monkeypatch, error_line):
    monkeypatch.setitem(sys.modules, package, None)
    line = error_line(export_onnx.main, '--model', tmp_path / 'no model', '--out', tmp_path / 'model.onnx')
    assert package in line and line.endswith('the export needs: pip install onnx onnxscript onnxruntime')


def test_shipped_model_is_exported_from_any_folder(tmp_path, full_networks, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export_onnx, 'export', lambda model, path: 0.0)
    export_onnx.main([])
    assert capsys.readouterr().out.startswith('mtl_model.onnx: images (N, 256, 256, 3) uint8 -> breed_probabilities, ')

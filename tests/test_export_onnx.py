"""The ONNX file, torch.export and torch.jit.trace."""

import io
import json
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

import export_onnx
from models import AblatedNet, AblatedNet2, MTLNet, UNet, load_model, model_content
from prediction import predict
from support.checkpoint import save_checkpoint

OUTPUTS = {
    MTLNet: ['breed_probabilities', 'mask_probability', 'bbox'],
    UNet: ['mask_probability'],
    AblatedNet: ['breed_probabilities', 'mask_probability'],
    AblatedNet2: ['mask_probability', 'bbox'],
}
NETWORKS = [MTLNet] + [pytest.param(network, marks=pytest.mark.slow) for network in (UNet, AblatedNet, AblatedNet2)]


def run(*arguments):
    export_onnx.main([str(argument) for argument in arguments])


def write_model(path, network, encoder='unet', size=(64, 80)):
    torch.manual_seed(0)
    model = network(n_classes=3, encoder=encoder)
    save_checkpoint(path, model_content(model, ['Bengal', 'pug', 'シャム'], ['cat', 'dog', None], size))
    return path


@pytest.mark.parametrize('network', NETWORKS)
def test_onnx_file_predicts_what_predict_does_for_any_number_of_images(network, tmp_path, capsys):
    path, out = write_model(tmp_path / 'model.pt', network), tmp_path / 'model.onnx'
    run('--model', path, '--out', out)
    assert 'largest difference from predict: ' in capsys.readouterr().out
    assert sorted(each.name for each in tmp_path.iterdir()) == ['model.onnx', 'model.pt']
    session = onnxruntime.InferenceSession(out)
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    species = ['cat', 'dog', None]
    assert about == {'class_names': ['Bengal', 'pug', 'シャム'], 'class_species': species, 'image_size': [64, 80]}
    assert [output.name for output in session.get_outputs()] == OUTPUTS[network]
    model = load_model(path)
    for count in 1, 5:
        images = np.random.default_rng(count).integers(0, 256, (count, 64, 80, 3), dtype=np.uint8)
        outputs = dict(zip(OUTPUTS[network], session.run(None, {'images': images})))
        for row, expected in enumerate(predict(model, list(images))):
            if expected.breeds:
                assert outputs['breed_probabilities'][row].max() == pytest.approx(expected.probability, abs=1e-4)
            if expected.bbox:
                bbox = outputs['bbox'][row] * [80, 64, 80, 64]
                assert bbox == pytest.approx(expected.bbox, abs=1e-2)
            assert outputs['mask_probability'][row] == pytest.approx(expected.mask_probability, abs=1e-4)


@pytest.mark.slow
def test_encoder_of_timm_is_exported(tmp_path, capsys):
    path = write_model(tmp_path / 'model.pt', MTLNet, 'tf_efficientnet_lite0')
    run('--model', path, '--out', tmp_path / 'model.onnx')
    assert 'largest difference from predict: ' in capsys.readouterr().out


def test_file_that_differs_from_predict_is_not_written(tmp_path, monkeypatch, error_line):
    path, out = write_model(tmp_path / 'model.pt', UNet), tmp_path / 'model.onnx'
    out.write_bytes(b'old')
    program = SimpleNamespace(model=SimpleNamespace(metadata_props={}), save=lambda part: part.write_bytes(b'new'))
    monkeypatch.setattr(torch.onnx, 'export', lambda *_, **__: program)
    monkeypatch.setattr(export_onnx, 'compare', lambda *_: float('nan'))
    line = error_line(export_onnx.main, '--model', path, '--out', out)
    assert 'model.onnx: not written, as its outputs differ from those of `predict`' in line
    assert out.read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 2


def test_missing_model_is_named(tmp_path, error_line):
    line = error_line(export_onnx.main, '--model', tmp_path / 'none.pt', '--out', tmp_path / 'model.onnx')
    assert 'none.pt: no such file' in line


@pytest.mark.filterwarnings('ignore:.*torch.jit', 'ignore:.*Python boolean')
@pytest.mark.parametrize('network', NETWORKS)
def test_torch_export_and_trace_keep_what_a_network_returns(network):
    torch.manual_seed(0)
    model, images = network(n_classes=3).eval(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)
        there = [output for output in expected if output is not None]
        for one, two in zip(torch.jit.trace(model, images)(images), there, strict=True):
            torch.testing.assert_close(one, two)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (images,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()(images)
    for one, two in zip(loaded, expected, strict=True):
        assert one is two is None or torch.allclose(one, two, atol=1e-5)

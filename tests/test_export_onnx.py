"""The ONNX file, torch.export and torch.jit.trace."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import data_rechunk
import export_onnx
from export_onnx import Exported
from models import AblatedNet, BoxNet, MTLNet, UNet, load_model, model_content
from prediction import predict
from support.checkpoint import save_checkpoint
from utils import METRICS

OUTPUTS = {
    MTLNet: ['breed_probabilities', 'mask_probability', 'bbox'],
    UNet: ['mask_probability'],
    AblatedNet: ['breed_probabilities', 'mask_probability'],
    BoxNet: ['bbox'],
}
FLOATS = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
NAMES, SPECIES = ['Bengal', 'シャム'], ['cat', None]

pytestmark = pytest.mark.xdist_group('onnx')  # in one process, for `export_once`


def write_model(path, network, encoder='unet', names=NAMES):
    torch.manual_seed(0)
    save_checkpoint(path, model_content(network(n_classes=2, encoder=encoder), names, SPECIES, (64, 80)))
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


@pytest.fixture(scope='module')
def programs():
    return {}


@pytest.fixture
def export_once(programs, monkeypatch):
    """The exporter takes seconds: once for each network, whose weights `write_model` makes the same each time."""
    export = torch.onnx.export

    def export_or_take(exported, *args, **options):
        key = type(exported.model), exported.model.encoder_name
        if key not in programs:
            programs[key] = export(exported, *args, **options)
        return programs[key]

    monkeypatch.setattr(torch.onnx, 'export', export_or_take)


@pytest.fixture
def no_export(monkeypatch):
    """The exporter writes 'new'."""
    program = SimpleNamespace(model=SimpleNamespace(metadata_props={}), save=lambda part: part.write_bytes(b'new'))
    monkeypatch.setattr(torch.onnx, 'export', lambda *_, **__: program)
    monkeypatch.setattr(export_onnx, 'halve_weights', lambda path: None)


@pytest.mark.parametrize(
    'network, encoder',
    [
        (MTLNet, 'unet'),
        pytest.param(UNet, 'unet', marks=pytest.mark.slow),
        pytest.param(AblatedNet, 'unet', marks=pytest.mark.slow),
        pytest.param(MTLNet, 'tf_efficientnet_lite0', marks=pytest.mark.slow),
    ],
)
def test_onnx_file_predicts_what_predict_does_for_any_number_of_images(network, encoder, tmp_path, export_once, capsys):
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
def test_file_that_differs_from_the_model_is_not_written(wrong, tmp_path, no_export, monkeypatch, error_line):
    path, out = write_model(tmp_path / 'model.pt', UNet), tmp_path / 'model.onnx'
    out.write_bytes(b'old')
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
    monkeypatch.setattr(export_onnx, 'export', lambda *_: 0.0)
    export_onnx.main([])
    assert '\nmtl_model.onnx: images (N, 256, 256, 3) uint8 -> breed_probabilities, ' in capsys.readouterr().out


# ---- the page


@pytest.fixture
def runtime(tmp_path):
    """A folder with files of the names of ONNX Runtime Web's."""
    (tmp_path / 'dist').mkdir()
    for name in (*export_onnx.RUNTIME, 'ort.all.mjs'):
        (tmp_path / 'dist' / name).write_text(name)
    return tmp_path / 'dist'


def read_about(page):
    """What the page knows of its model."""
    text = page.read_text(encoding='utf-8')
    assert export_onnx.MODEL_PLACE not in text
    return json.loads(text.partition('<script type="application/json" id="model">')[2].partition('</script>')[0])


def test_page_holds_what_its_model_is_and_files_beside_it_stay(tmp_path, runtime, export_once, capsys):
    path, site = write_model(tmp_path / 'model.pt', MTLNet, names=['</script>', 'シャム']), tmp_path / 'site'
    site.mkdir()
    (site / 'index.html').write_text('old')
    (site / 'CNAME').write_text('mine')
    export_onnx.main(['--model', str(path), '--web', str(site), '--runtime', str(runtime)])
    assert 'largest difference from the model: ' in capsys.readouterr().out
    files = {each.relative_to(site).as_posix() for each in site.rglob('*') if each.is_file()}
    assert files == {'CNAME', 'index.html', 'mtl_model.onnx', *(f'runtime/{name}' for name in export_onnx.RUNTIME)}
    assert all((site / 'runtime' / name).read_text() == name for name in export_onnx.RUNTIME)
    about = {'class_names': ['</script>', 'シャム'], 'class_species': SPECIES, 'image_size': [64, 80]}
    assert read_about(site / 'index.html') == about | {'runtime': './runtime/'}
    images = draw_images(2)
    weights = onnx.load(site / 'mtl_model.onnx').graph.initializer
    kinds = {len(weight.dims) > 1: weight.data_type for weight in weights if weight.data_type in FLOATS}
    assert kinds == {True: onnx.TensorProto.FLOAT16, False: onnx.TensorProto.FLOAT}
    session = onnxruntime.InferenceSession(site / 'mtl_model.onnx')
    halves = dict(zip(OUTPUTS[MTLNet], session.run(None, {'images': images})))
    for row, expected in enumerate(predict(load_model(path), list(images))):
        assert halves['mask_probability'][row] == pytest.approx(expected.mask_probability, abs=1e-2)
        assert halves['bbox'][row] * [80, 64, 80, 64] == pytest.approx(expected.bbox, abs=1)


def test_page_alone_loads_the_runtime_from_a_pinned_address(tmp_path, monkeypatch):
    path, site = write_model(tmp_path / 'model.pt', BoxNet), tmp_path / 'new' / 'site'
    monkeypatch.setattr(export_onnx, 'export', lambda model, path, half: path.parent.mkdir(parents=True) or 0.0)
    export_onnx.main(['--model', str(path), '--web', str(site)])
    assert [each.name for each in site.iterdir()] == ['index.html']  # the model is written by what is replaced here
    address = read_about(site / 'index.html')['runtime']
    assert '@1.30.0/' in address and address.startswith('https://') and address.endswith('/')
    assert address.split('/')[2] in (site / 'index.html').read_text().partition('Security-Policy')[2][:200]


@pytest.mark.parametrize('missing', export_onnx.RUNTIME)
def test_missing_file_of_the_runtime_is_one_line_and_nothing_is_written(missing, tmp_path, runtime, error_line):
    path, site = write_model(tmp_path / 'model.pt', BoxNet), tmp_path / 'site'
    (runtime / missing).unlink()
    line = error_line(export_onnx.main, '--model', path, '--web', site, '--runtime', runtime)
    assert f"dist/{missing}: no such file; --runtime takes the folder 'dist' of the npm package" in line
    assert not site.exists()


def test_page_stays_as_it_was_if_its_model_differs(tmp_path, no_export, monkeypatch, error_line):
    path, site = write_model(tmp_path / 'model.pt', BoxNet), tmp_path / 'site'
    site.mkdir()
    (site / 'index.html').write_text('old')
    monkeypatch.setattr(export_onnx, 'compare', lambda *_: 0.011)
    line = error_line(export_onnx.main, '--model', path, '--web', site)
    assert line.endswith("mtl_model.onnx: not written, as its outputs differ from the model's by 1.1e-02")
    assert [each.name for each in site.iterdir()] == ['index.html'] and (site / 'index.html').read_text() == 'old'


@pytest.mark.parametrize(
    'options, message',
    [
        ('--runtime dist', '--runtime is for --web'),
        ('--web site --test data', '--test is for --out'),
        ('--reported metrics.json', '--reported is for --test'),
    ],
)
def test_options_without_those_they_are_for_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        export_onnx.main(options.split())
    assert f'error: {message}' in capsys.readouterr().err


@pytest.mark.parametrize('content', ['no json', '[]', '{"validation": {}}', '{"test": {"dice": 0.5}}'])
def test_reported_metrics_that_are_none_are_one_line_before_the_export(content, tmp_path, error_line):
    path, metrics = write_model(tmp_path / 'model.pt', BoxNet), tmp_path / 'metrics.json'
    metrics.write_text(content)
    options = '--out', tmp_path / 'a.onnx', '--test', tmp_path, '--reported', metrics
    assert 'metrics.json: is not the metrics.json of a run' in error_line(export_onnx.main, '--model', path, *options)
    assert not (tmp_path / 'a.onnx').exists()


def test_a_test_split_of_another_size_is_one_line(original_files, tmp_path, export_once, error_line):
    data = original_files()
    data_rechunk.rechunk(data)
    path = write_model(tmp_path / 'model.pt', MTLNet, names=['cat', 'dog'])
    line = error_line(export_onnx.main, '--model', path, '--out', tmp_path / 'a.onnx', '--test', data)
    assert line.endswith("the image_size of its test split differ from the model's")


def test_the_file_has_the_metrics_of_the_model_on_a_test_split(original_files, tmp_path, export_once, capsys):
    data = original_files(size=(64, 80))
    data_rechunk.rechunk(data)
    path = write_model(tmp_path / 'model.pt', MTLNet, names=['cat', 'dog'])
    (tmp_path / 'metrics.json').write_text(json.dumps({'test': {'dice': {'mean': 0.25}}}))
    options = '--test', data, '--reported', tmp_path / 'metrics.json', '--out', tmp_path / 'a.onnx'
    export_onnx.main(['--model', *map(str, (path, *options))])
    rows = capsys.readouterr().out.splitlines()[-4:]
    dice, *others = ([float(value) for value in row[45:].split()] for row in rows)
    assert [row[:45].strip() for row in rows] == [metric.printed for metric in METRICS.values()]
    assert dice[2] == 0.25 and all(len(values) == 2 for values in others)
    for values in dice, *others:
        assert values[0] == pytest.approx(values[1], abs=2e-3)

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
from models import ClassBoxNet, MTLNet, UNet, load_model, model_content
from prediction import predict
from support.checkpoint import save_checkpoint
from utils import METRICS

OUTPUTS = {
    MTLNet: ['breed_probabilities', 'mask_probability', 'bbox'],
    UNet: ['mask_probability'],
    ClassBoxNet: ['breed_probabilities', 'bbox'],
}
ABOUT = {'class_names': ['</script>', 'シャム'], 'class_species': ['cat', None], 'image_size': [64, 80]}
PROGRAMS = {}

pytestmark = pytest.mark.xdist_group('onnx')  # in one process, for `export_once`


def write_model(path, network=MTLNet, encoder='unet', **more):
    torch.manual_seed(0)
    save_checkpoint(path, model_content(network(n_classes=2, encoder=encoder), **ABOUT | more))
    return path


@pytest.fixture
def path(tmp_path):
    """A model file of an MTLNet."""
    return write_model(tmp_path / 'model.pt')


def draw_images(count):
    return np.random.default_rng(count).integers(0, 256, (count, 64, 80, 3), dtype=np.uint8)


def assert_as_predict(outputs, model, images, share=1e-4, pixels=1e-2):
    """`outputs`: a tuple of arrays or tensors, as an Exported has them; to within a `share` and `pixels`."""
    outputs = dict(zip(OUTPUTS[type(model)], map(np.asarray, outputs), strict=True))
    for row, expected in enumerate(predict(model, list(images), zoom=False)):
        if expected.breeds:
            breeds = dict(zip(ABOUT['class_names'], outputs['breed_probabilities'][row]))
            assert breeds == pytest.approx(dict(expected.breeds), abs=share)
        if expected.bbox:
            assert outputs['bbox'][row] * [80, 64, 80, 64] == pytest.approx(expected.bbox, abs=pixels)
        if expected.mask is not None:
            assert outputs['mask_probability'][row] == pytest.approx(expected.mask_probability, abs=share)


@pytest.fixture
def export_once(monkeypatch):
    """The exporter takes seconds: once for each encoder of an MTLNet, whose weights `write_model` makes the same."""
    export = torch.onnx.export

    def export_or_take(exported, *args, **options):
        key = exported.model.encoder_name
        if key not in PROGRAMS:
            PROGRAMS[key] = export(exported, *args, **options)
        return PROGRAMS[key]

    monkeypatch.setattr(torch.onnx, 'export', export_or_take)


@pytest.fixture
def no_export(monkeypatch):
    """The exporter writes 'new'."""
    program = SimpleNamespace(model=SimpleNamespace(metadata_props={}), save=lambda part: part.write_bytes(b'new'))
    monkeypatch.setattr(torch.onnx, 'export', lambda *_, **__: program)
    monkeypatch.setattr(export_onnx, 'halve_weights', lambda path: None)


@pytest.mark.parametrize('encoder', ['unet', pytest.param('tf_efficientnet_lite0', marks=pytest.mark.slow)])
def test_onnx_file_predicts_what_predict_does_for_any_number_of_images(encoder, tmp_path, export_once, capsys):
    path, out = write_model(tmp_path / 'model.pt', encoder=encoder), tmp_path / 'model.onnx'
    export_onnx.main(['--model', str(path), '--out', str(out)])
    assert 'largest difference from the model: ' in capsys.readouterr().out
    assert sorted(each.name for each in tmp_path.iterdir()) == ['model.onnx', 'model.pt']
    session = onnxruntime.InferenceSession(out)
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert about == ABOUT and [output.name for output in session.get_outputs()] == OUTPUTS[MTLNet]
    for count in 1, 5:
        images = draw_images(count)
        assert_as_predict(session.run(None, {'images': images}), load_model(path), images)


@pytest.mark.filterwarnings('ignore:.*torch.jit', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('network', [UNet, ClassBoxNet])
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


def test_outputs_that_are_not_finite_differ(path, monkeypatch):
    session = SimpleNamespace(run=lambda *_: [np.float32(np.nan)] * 3)
    monkeypatch.setattr(onnxruntime, 'InferenceSession', lambda *_, **__: session)
    assert np.isnan(export_onnx.compare(Exported(load_model(path)), 'model.onnx'))


@pytest.mark.parametrize(
    'options, difference', [('--out site/a.onnx', '1.1e-04'), ('--out site/a.onnx', 'nan'), ('--web site', '1.1e-02')]
)
def test_files_and_page_stay_as_they_were_if_the_outputs_differ(
    options, difference, path, tmp_path, no_export, monkeypatch, error_line
):
    monkeypatch.chdir(tmp_path)
    site = {tmp_path / 'site' / name: 'old' for name in ('index.html', 'a.onnx')}
    (tmp_path / 'site').mkdir()
    for file in site:
        file.write_text('old')
    monkeypatch.setattr(export_onnx, 'compare', lambda *_: float(difference))
    line = error_line(export_onnx.main, '--model', path, *options.split())
    assert line.endswith(f".onnx: not written, as its outputs differ from the model's by {difference}")
    assert {file: file.read_text() for file in (tmp_path / 'site').iterdir()} == site


def test_missing_package_is_one_line_before_anything_is_done(tmp_path, monkeypatch, error_line):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    line = error_line(export_onnx.main, '--model', tmp_path / 'no model', '--out', tmp_path / 'model.onnx')
    assert 'onnxscript' in line and line.endswith('the export needs: pip install onnx onnxscript onnxruntime')


def test_shipped_model_is_exported_from_any_folder(tmp_path, full_networks, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export_onnx, 'export', lambda *_: 0.0)
    export_onnx.main([])
    assert '\nmtl_model.onnx: images (N, 288, 288, 3) uint8 -> breed_probabilities, ' in capsys.readouterr().out


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


def test_page_holds_what_its_model_is_and_files_beside_it_stay(path, tmp_path, runtime, export_once, capsys):
    site = tmp_path / 'site'
    site.mkdir()
    for name in 'index.html', 'CNAME':
        (site / name).write_text('old')
    export_onnx.main(['--model', str(path), '--web', str(site), '--runtime', str(runtime)])
    assert 'largest difference from the model: ' in capsys.readouterr().out
    files = {each.relative_to(site).as_posix() for each in site.rglob('*') if each.is_file()}
    assert files == {'CNAME', 'index.html', 'mtl_model.onnx', *(f'runtime/{name}' for name in export_onnx.RUNTIME)}
    assert all((site / 'runtime' / name).read_text() == name for name in export_onnx.RUNTIME)
    assert read_about(site / 'index.html') == ABOUT | {'runtime': './runtime/'}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    weights = onnx.load(site / 'mtl_model.onnx').graph.initializer
    kinds = {(len(weight.dims) > 1, weight.data_type) for weight in weights if weight.data_type in (half, single)}
    assert kinds == {(True, half), (False, single)}
    images = draw_images(2)
    found = onnxruntime.InferenceSession(site / 'mtl_model.onnx').run(None, {'images': images})
    assert_as_predict(found, load_model(path), images, share=1e-2, pixels=1)


def test_page_alone_loads_the_runtime_from_a_pinned_address(path, tmp_path, monkeypatch):
    page = tmp_path / 'new' / 'site' / 'index.html'
    monkeypatch.setattr(export_onnx, 'export', lambda model, path, half: path.parent.mkdir(parents=True) or 0.0)
    export_onnx.main(['--model', str(path), '--web', str(page.parent)])
    assert list(page.parent.iterdir()) == [page]  # the model is written by what is replaced here
    address = read_about(page)['runtime']
    assert '@1.30.0/' in address and address.startswith('https://') and address.endswith('/')
    assert address.split('/')[2] in page.read_text().partition('Security-Policy')[2][:200]


def test_missing_file_of_the_runtime_is_one_line_and_nothing_is_written(path, tmp_path, runtime, error_line):
    missing = export_onnx.RUNTIME[-1]
    (runtime / missing).unlink()
    line = error_line(export_onnx.main, '--model', path, '--web', tmp_path / 'site', '--runtime', runtime)
    assert f"dist/{missing}: no such file; --runtime takes the folder 'dist' of the npm package" in line
    assert not (tmp_path / 'site').exists()


# ---- options, and the metrics of the file


def test_options_without_those_they_are_for_are_refused(capsys):
    for options, message in {
        '--runtime dist': '--runtime is for --web',
        '--web site --test data': '--test is for --out',
        '--reported metrics.json': '--reported is for --test',
    }.items():
        with pytest.raises(SystemExit):
            export_onnx.main(options.split())
        assert f'error: {message}' in capsys.readouterr().err


@pytest.mark.parametrize('content', ['no json', '[]', '{"test": {"dice": 0.5}}'])
def test_reported_metrics_that_are_none_are_one_line_before_the_export(content, path, tmp_path, error_line):
    out, metrics = tmp_path / 'a.onnx', tmp_path / 'metrics.json'
    metrics.write_text(content)
    options = '--model', path, '--out', out, '--test', tmp_path, '--reported', metrics
    assert 'metrics.json: is not the metrics.json of a run' in error_line(export_onnx.main, *options)
    assert not out.exists()


def test_the_file_has_the_metrics_of_the_model_on_a_test_split(
    original_files, tmp_path, export_once, capsys, error_line
):
    data, other = original_files(size=(64, 80)), original_files(tmp_path / 'of another size')
    data_rechunk.rechunk(data)
    data_rechunk.rechunk(other)
    path = write_model(tmp_path / 'model.pt', class_names=['cat', 'dog'])
    options = '--model', path, '--out', tmp_path / 'a.onnx', '--test'
    line = error_line(export_onnx.main, *options, other)
    assert line.endswith("the image_size of its test split differ from the model's")
    (tmp_path / 'metrics.json').write_text(json.dumps({'test': {'dice': {'mean': 0.25}}}))
    export_onnx.main([*map(str, options), str(data), '--reported', str(tmp_path / 'metrics.json')])
    rows = capsys.readouterr().out.splitlines()[-4:]
    dice, *others = ([float(value) for value in row[45:].split()] for row in rows)
    assert [row[:45].strip() for row in rows] == [metric.printed for metric in METRICS.values()]
    assert dice[2] == 0.25 and all(len(values) == 2 for values in others)
    for values in dice, *others:
        assert values[0] == pytest.approx(values[1], abs=2e-3)

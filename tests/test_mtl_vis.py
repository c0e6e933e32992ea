"""Pictures and predictions from a trained model."""

import numpy as np
import pytest
import torch
from PIL import Image

import mtl_vis
from dataloader_mtl import MTLDataset
from models import MTLNet, UNet, load_model, model_content
from mtl_vis import main, predict
from support.checkpoint import save_checkpoint
from support.cli import InputError


@pytest.fixture(scope='module')
def model_path(shared_data, tmp_path_factory):
    """The file of a network that has learned nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('model') / 'mtl_model.pt'
    dataset = MTLDataset('test', root=shared_data)
    names, species = dataset.class_names, dataset.class_species
    save_checkpoint(path, model_content(MTLNet(n_classes=8), names, species, (64, 64)))
    return path


def run(*arguments):
    main([str(argument) for argument in arguments])


def photograph(path, size=(90, 70), mode='RGB'):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'P', 'CMYK', '1'])
@pytest.mark.parametrize('size', [(90, 70), (33, 200), (64, 64)])
def test_a_prediction_fits_the_photograph(model_path, mode, size):
    model = load_model(model_path)
    prediction = predict(model, Image.new('RGB', size, 'orange').convert(mode))
    assert prediction.breed in model.class_names and 0 < prediction.probability <= 1
    assert prediction.mask.shape == size[::-1] and prediction.mask.dtype == bool
    xmin, ymin, xmax, ymax = prediction.bbox
    assert 0 <= xmin <= xmax <= size[0] and 0 <= ymin <= ymax <= size[1]


def test_a_prediction_is_the_same_each_time(model_path):
    model, image = load_model(model_path), Image.effect_noise((80, 60), 90)
    assert not model.training
    first, second = predict(model, image), predict(model, image)
    assert first[:3] == second[:3] and (first.mask == second.mask).all()


def test_predicting_agrees_with_evaluation(model_path, shared_data):
    """The same pixels through `predict` and through MTLDataset give the same answer."""
    dataset, model = MTLDataset('test', root=shared_data), load_model(model_path)
    image = dataset[4][0]
    pixels = mtl_vis.denormalise(image)
    prediction = predict(model, Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    with torch.inference_mode():
        outputs = model(image[None])
    assert prediction.breed == dataset.class_names[outputs.label.argmax()]
    assert ((outputs.mask[0, 0] > 0).numpy() == prediction.mask).mean() > 0.999
    assert prediction.bbox == pytest.approx((outputs.bbox[0] * 64).tolist(), abs=1e-2)


def test_test_pets_are_drawn_with_target_and_predicted_mask(model_path, shared_data, tmp_path, monkeypatch):
    rows, original = [], mtl_vis.save_picture
    monkeypatch.setattr(mtl_vis, 'save_picture', lambda r, path: (rows.extend(r), original(r, path)))
    run('--model', model_path, '--data', shared_data, '--out', tmp_path / 'mask.png', '--count', '3')
    assert Image.open(tmp_path / 'mask.png').size == (3 * (256 + 44), 3 * (256 + 44))
    for row in rows:
        assert [title for title, _ in row][1:] == ['Target Mask', 'Predicted Mask']
        for _, panel in row[1:]:  # masks, not logits
            assert set(panel.unique().tolist()) <= {0, 255}


def test_photographs_give_a_line_a_mask_and_a_picture(model_path, tmp_path, capsys):
    first = photograph(tmp_path / 'one.png', (300, 200))
    second = photograph(tmp_path / 'two.jpg', (120, 330), 'L')
    run('--model', model_path, '--out', tmp_path / 'out.png', '--save-masks', tmp_path / 'masks', first, second)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f'{first}: ') and 'head ' in lines[0] and '% of the picture' in lines[0]
    mask = Image.open(tmp_path / 'masks' / 'two_mask.png')
    assert mask.size == (120, 330) and set(np.unique(mask)) <= {0, 255}
    # Two panels beside each other, at the photographs' own sizes, one row for each photograph.
    assert Image.open(tmp_path / 'out.png').size == (2 * (300 + 44), 200 + 330 + 2 * 44)


def test_a_rotated_photograph_is_drawn_as_viewers_show_it(model_path, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (300, 200)).save(tmp_path / 'phone.jpg', exif=exif)
    run('--model', model_path, '--out', tmp_path / 'out.png', '--save-masks', tmp_path, tmp_path / 'phone.jpg')
    assert Image.open(tmp_path / 'phone_mask.png').size == (200, 300)


def test_large_photographs_are_drawn_smaller_but_measured_in_their_own_pixels(model_path, tmp_path, capsys):
    path = tmp_path / 'large.png'
    Image.new('RGB', (3200, 1000), 'brown').save(path)
    run('--model', model_path, '--out', tmp_path / 'out.png', path)
    assert Image.open(tmp_path / 'out.png').size[0] == 2 * (1600 + 44)
    prediction = predict(load_model(model_path), Image.open(path))
    assert f'head {prediction.bbox[0]:.0f} {prediction.bbox[1]:.0f}' in capsys.readouterr().out
    assert prediction.mask.shape == (1000, 3200)


def test_a_model_without_class_and_box_draws_its_mask(shared_data, tmp_path, capsys):
    save_checkpoint(tmp_path / 'best.pt', model_content(UNet(), ['cat', 'dog'], ['cat', 'dog'], (64, 64)))
    model, out = str(tmp_path / 'best.pt'), str(tmp_path / 'out.png')
    run('--model', model, '--out', out, '--data', shared_data)
    run('--model', model, '--out', out, photograph(tmp_path / 'one.png'))
    assert capsys.readouterr().out.splitlines()[-2].startswith(f'{tmp_path / "one.png"}: mask ')


@pytest.mark.parametrize('content', [None, b'', b'no picture'])
def test_a_photograph_that_cannot_be_read_is_named(model_path, tmp_path, error_line, content):
    path = tmp_path / 'cat.jpg'
    if content is not None:
        path.write_bytes(content)
    assert str(path) in error_line(main, '--model', model_path, '--out', tmp_path / 'out.png', path)
    assert not (tmp_path / 'out.png').exists()


def test_unreadable_photograph_does_not_stop_the_others(model_path, tmp_path, error_line):
    broken, sound = tmp_path / 'broken.jpg', photograph(tmp_path / 'sound.png')
    broken.write_bytes(b'no picture')
    line = error_line(main, '--model', model_path, '--out', tmp_path / 'out.png', broken, sound)
    assert '1 of 2 photographs cannot be read' in line and str(broken) in line
    assert Image.open(tmp_path / 'out.png').size == (2 * (256 + 44), 199 + 44)


def test_no_input_is_overwritten_and_no_mask_twice(model_path, tmp_path, error_line):
    (tmp_path / 'b').mkdir()
    one, two = photograph(tmp_path / 'cat.png'), photograph(tmp_path / 'b' / 'cat.png')
    mask = photograph(tmp_path / 'dog_mask.png')
    dog = photograph(tmp_path / 'dog.png')
    for arguments in (
        ['--out', one, one],
        ['--out', model_path, one],
        ['--save-masks', tmp_path / 'masks', one, two],
        ['--save-masks', tmp_path, dog, mask],
    ):
        before = {path: path.read_bytes() for path in (one, two, mask, dog, model_path)}
        line = error_line(main, '--model', model_path, '--out', tmp_path / 'out.png', *arguments)
        assert 'would be written over an input or twice' in line
        assert before == {path: path.read_bytes() for path in before}


def test_a_missing_model_is_named(tmp_path, error_line):
    assert 'mtl_model.pt: no such file' in error_line(main, '--model', tmp_path / 'mtl_model.pt')


@pytest.mark.filterwarnings('error:Glyph')
@pytest.mark.parametrize('name', ['$x^{ costs 5$', 'シャム猫'])
def test_title_with_dollar_or_missing_glyph_gives_no_warning(tmp_path, name):
    mtl_vis.save_picture([[(name, torch.zeros(3, 64, 64, dtype=torch.uint8))]], tmp_path / 'mask.png')
    assert Image.open(tmp_path / 'mask.png').size == (108, 108)


def test_symlink_loop_is_reported_as_unreadable(model_path, tmp_path, error_line):
    (tmp_path / 'a.jpg').symlink_to('a.jpg')
    line = error_line(main, tmp_path / 'a.jpg', '--model', model_path, '--out', tmp_path / 'mask.png')
    assert '1 of 1 photographs cannot be read' in line and 'a.jpg' in line


def test_non_finite_prediction_raises_input_error(model_path):
    model = load_model(model_path)
    for weights in model.state_dict().values():
        if weights.is_floating_point():
            weights.fill_(1e30)
    with pytest.raises(InputError, match='the model gives no finite numbers'):
        predict(model, Image.new('RGB', (80, 60)))

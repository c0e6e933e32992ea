"""Pictures and predictions from a trained model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mtl_vis
from models import NETWORKS, SharedEncoderNet, UNet, load_model, model_content
from mtl_vis import main, predict
from support.checkpoint import save_checkpoint
from support.cli import run_script


def run(*arguments):
    main([str(argument) for argument in arguments])


def photograph(path, size=(90, 70), mode='RGB'):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


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


@pytest.fixture
def failing(capsys):
    """Function that runs the script, which must end with exit status 1: (standard output, lines of errors)."""

    def run_and_fail(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: run(*arguments))
        printed = capsys.readouterr()
        assert stopped.value.code == 1 and 'Traceback' not in printed.err
        return printed.out, printed.err.splitlines()

    return run_and_fail


@pytest.mark.parametrize('content', [None, b'', b'no picture'])
def test_a_photograph_that_cannot_be_read_is_named(model_path, tmp_path, failing, content):
    path = tmp_path / 'cat.jpg'
    if content is not None:
        path.write_bytes(content)
    out, errors = failing('--model', model_path, '--out', tmp_path / 'out.png', path)
    assert errors[0].startswith(f'error: {path}: ') and errors[1:] == ['error: 1 of 1 photographs cannot be read']
    assert out == '' and not (tmp_path / 'out.png').exists()


def test_unreadable_photograph_does_not_stop_the_others(model_path, tmp_path, failing):
    broken, sound = tmp_path / 'broken.jpg', photograph(tmp_path / 'sound.png')
    broken.write_bytes(b'no picture')
    options = '--model', model_path, '--out', tmp_path / 'out.png', '--json', tmp_path / 'pets.jsonl'
    out, errors = failing(*options, broken, sound)
    assert len(errors) == 2 and errors[0].startswith(f'error: {broken}: ')
    assert errors[1] == 'error: 1 of 2 photographs cannot be read'
    assert out.startswith(f'{sound}: ') and len((tmp_path / 'pets.jsonl').read_text().splitlines()) == 1
    assert Image.open(tmp_path / 'out.png').size == (2 * (256 + 44), 199 + 44)


def write_kinds(folder):
    """A photograph of each kind that people have; {name: (width, height) as viewers show it}."""
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new('RGB', (300, 200), 'teal').save(folder / 'phone.jpg', exif=exif)
    Image.new('RGBA', (60, 40), (255, 0, 0, 128)).save(folder / 'alpha.png')
    Image.fromarray(np.full((50, 70), 40_000, np.uint16)).save(folder / 'deep.png')
    Image.new('L', (30, 80), 99).save(folder / 'grey.jpg')
    Image.new('CMYK', (80, 30)).save(folder / 'print.jpg')
    Image.new('RGB', (64, 64)).save(folder / 'web.webp')
    Image.new('RGB', (6000, 4000), 'olive').save(folder / 'large.jpg')
    Image.new('RGB', (10, 2000)).save(folder / 'strip.png')
    sizes = {'phone': (200, 300), 'alpha': (60, 40), 'deep': (70, 50), 'grey': (30, 80), 'print': (80, 30)}
    return sizes | {'web': (64, 64), 'large': (6000, 4000), 'strip': (10, 2000)}


def test_photographs_of_all_kinds_give_masks_cutouts_and_json(model_path, tmp_path):
    (tmp_path / 'in').mkdir()
    sizes = write_kinds(tmp_path / 'in')
    outputs = '--save-masks', tmp_path / 'masks', '--cutouts', tmp_path / 'cutouts', '--json', tmp_path / 'pets.jsonl'
    run('--model', model_path, '--out', tmp_path / 'out.png', *outputs, tmp_path / 'in')
    records = [json.loads(line) for line in (tmp_path / 'pets.jsonl').read_text().splitlines()]
    assert len(records) == len(sizes)
    for record in records:
        name = Path(record['file']).stem
        assert (record['width'], record['height']) == sizes[name]
        assert record['breeds'][0] == {'breed': record['breed'], 'probability': record['probability']}
        assert len(record['breeds']) == 5 and record['species'] in ('cat', 'dog') and len(record['bbox']) == 4
        mask, pet = (Image.open(tmp_path / f'{kind}s' / f'{name}_{kind}.png') for kind in ('mask', 'cutout'))
        assert mask.size == pet.size == sizes[name] and (mask.mode, pet.mode) == ('L', 'RGBA')
        assert np.mean(np.asarray(mask) == 255) == pytest.approx(record['mask_coverage'])


def test_json_on_standard_output_is_alone_there(model_path, tmp_path, capsys):
    paths = [photograph(tmp_path / f'{number}.png') for number in range(2)]
    run('--model', model_path, '--out', tmp_path / 'out.png', '--json', '-', *paths)
    printed = capsys.readouterr()
    assert [json.loads(line)['file'] for line in printed.out.splitlines()] == list(map(str, paths))
    assert printed.err == f'{tmp_path / "out.png"}: 2 photographs\n'


def test_json_has_null_for_tasks_that_the_model_does_not_have(tmp_path, capsys):
    save_checkpoint(tmp_path / 'best.pt', model_content(UNet(), ['cat', 'dog'], ['cat', 'dog'], (64, 64)))
    options = '--model', tmp_path / 'best.pt', '--out', tmp_path / 'out.png', '--json', '-'
    run(*options, photograph(tmp_path / 'one.png'))
    record = json.loads(capsys.readouterr().out)
    nulls = {'breed', 'probability', 'breeds', 'species', 'species_probability', 'bbox'}
    assert {key for key, value in record.items() if value is None} == nulls


def test_folder_of_300_shows_the_first_12_and_keeps_folders_apart(model_path, tmp_path, capsys):
    folder = tmp_path / 'in'
    for part in 'a', 'b':
        (folder / part).mkdir(parents=True)
        for number in range(150):
            photograph(folder / part / f'{number:03}.JPG', (8, 6))
    (folder / 'notes.txt').write_text('no photograph')
    run('--model', model_path, '--out', tmp_path / 'out.png', '--cutouts', tmp_path / 'cutouts', folder)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 301 and lines[-1] == f'{tmp_path / "out.png"}: the first 12 of 300 photographs'
    assert len(list((tmp_path / 'cutouts' / 'b').glob('*_cutout.png'))) == 150
    assert Image.open(tmp_path / 'out.png').size[1] == 12 * (192 + 44)


def test_patterns_name_files_by_the_folders_below_them(model_path, tmp_path, capsys):
    for name in 'b/pug.png', 'a/pug.png', 'a/pug.txt', 'pug.png':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photograph(tmp_path / name, size=(20, 16)) if name.endswith('png') else (tmp_path / name).write_text('no')
    out = '--model', model_path, '--out', tmp_path / 'out.png', '--save-masks', tmp_path / 'masks'
    run(*out, tmp_path / '[ab]' / '*')
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(': ')[0] for line in lines[:-1]] == [str(tmp_path / each / 'pug.png') for each in 'ab']
    masks = sorted(str(path.relative_to(tmp_path / 'masks')) for path in (tmp_path / 'masks').rglob('*.png'))
    assert masks == ['a/pug_mask.png', 'b/pug_mask.png']
    photograph(tmp_path / '[1].png')  # a name that is there is no pattern
    run(*out, tmp_path / '[1].png')


def test_same_names_keep_their_suffix_and_the_picture_of_the_last_run_is_left_out(model_path, tmp_path, capsys):
    for name in 'cat.png', 'cat.jpg', 'dog.png':
        photograph(tmp_path / name, size=(20, 16))
    (tmp_path / '._cat.jpg').write_bytes(b'of macOS')
    options = '--model', model_path, '--out', tmp_path / 'mask.png', '--cutouts', tmp_path.parent / 'cutouts'
    for _ in range(2):
        run(*options, tmp_path)
        assert len(capsys.readouterr().out.splitlines()) == 4
    names = sorted(path.name for path in (tmp_path.parent / 'cutouts').iterdir())
    assert names == ['cat.jpg_cutout.png', 'cat.png_cutout.png', 'dog_cutout.png']


def test_patterns_and_folders_without_photographs_are_named(model_path, tmp_path, error_line):
    out = '--model', model_path, '--out', tmp_path / 'out.png'
    assert 'x*.png: finds no image; looked for files that end in .jpg' in error_line(main, *out, tmp_path / 'x*.png')
    (tmp_path / 'empty').mkdir()
    assert 'empty: finds no image; looked for files' in error_line(main, *out, tmp_path / 'empty')


def test_masks_are_not_asked_of_a_network_without_them(model_path, tmp_path, error_line):
    class Boxes(SharedEncoderNet):
        tasks = ('box',)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, 'Boxes', Boxes)
        save_checkpoint(tmp_path / 'best.pt', model_content(Boxes(), ['cat'], ['cat'], (64, 64)))
        one = photograph(tmp_path / 'one.png')
        line = error_line(main, '--model', tmp_path / 'best.pt', '--cutouts', tmp_path / 'cutouts', one)
    assert 'best.pt: a network without masks' in line


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


def test_folders_to_write_are_no_files(tmp_path, capsys):
    one = photograph(tmp_path / 'one.png')
    for option in '--save-masks', '--cutouts':
        with pytest.raises(SystemExit) as stopped:
            run(option, one, one)
        assert stopped.value.code == 2 and "one.png' is not a folder" in capsys.readouterr().err


def test_a_missing_model_is_named(tmp_path, error_line):
    assert 'mtl_model.pt: no such file' in error_line(main, '--model', tmp_path / 'mtl_model.pt')


@pytest.mark.filterwarnings('error:Glyph')
@pytest.mark.parametrize('name', ['$x^{ costs 5$', 'シャム猫'])
def test_title_with_dollar_or_missing_glyph_gives_no_warning(tmp_path, name):
    mtl_vis.save_picture([[(name, torch.zeros(3, 64, 64, dtype=torch.uint8))]], tmp_path / 'mask.png')
    assert Image.open(tmp_path / 'mask.png').size == (108, 108)


def test_symlink_loop_is_reported_as_unreadable(model_path, tmp_path, failing):
    (tmp_path / 'a.jpg').symlink_to('a.jpg')
    _, errors = failing(tmp_path / 'a.jpg', '--model', model_path, '--out', tmp_path / 'mask.png')
    assert 'a.jpg: ' in errors[0] and errors[1] == 'error: 1 of 1 photographs cannot be read'

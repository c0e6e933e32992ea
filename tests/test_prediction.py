"""What a model finds in one image and in many."""

import numpy as np
import pytest
import torch
from PIL import Image

import prediction
from dataloader_mtl import MTLDataset, denormalise
from models import FlipAveraged, UNet, model_content
from prediction import cutout, load_model, predict
from support.checkpoint import save_checkpoint
from support.cli import InputError
from support.files import UnreadableFile


@pytest.fixture
def model(model_path):
    return load_model(model_path)


def pixels(height=70, width=90, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(one, two):
    assert one._replace(mask=None, mask_probability=None) == two._replace(mask=None, mask_probability=None)
    assert np.array_equal(one.mask_probability, two.mask_probability)


def assert_close(one, two):
    """Equal but for the rounding that the size of a batch changes."""
    assert one.breed == two.breed and one.bbox == pytest.approx(two.bbox, abs=1e-3)
    assert one.mask_probability == pytest.approx(two.mask_probability, abs=1e-5)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'LA', 'P', 'CMYK', '1', 'I;16'])
@pytest.mark.parametrize('size', [(90, 70), (10, 2000), (64, 64), (1, 1)])
def test_prediction_fits_the_image(model, mode, size):
    found = predict(model, Image.new('L' if mode == 'I;16' else 'RGB', size, 'white').convert(mode))
    assert found.breed in model.class_names and 0 < found.probability <= 1
    assert found.mask.shape == found.mask_probability.shape == size[::-1]
    assert found.mask.dtype == bool and found.mask_probability.dtype == np.float32
    assert np.array_equal(found.mask, found.mask_probability > 0.5)
    xmin, ymin, xmax, ymax = found.bbox
    assert 0 <= xmin <= xmax <= size[0] and 0 <= ymin <= ymax <= size[1]


def test_all_kinds_of_images_give_the_same_prediction(model, tmp_path):
    array = pixels()
    Image.fromarray(array).save(tmp_path / 'one.png')
    expected = predict(model, array)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for image in (
        tmp_path / 'one.png',
        str(tmp_path / 'one.png'),
        Image.fromarray(array),
        tensor,
        array[:, ::-1][:, ::-1],
    ):
        assert_same(predict(model, image), expected)
    grey = array[..., 0]
    assert_same(predict(model, grey), predict(model, np.repeat(grey[..., None], 3, axis=2)))


def test_exif_rotation_is_applied_to_paths_and_pil_images(model, tmp_path):
    array, exif = pixels(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(array).save(tmp_path / 'phone.png', exif=exif)
    expected = predict(model, np.rot90(array, -1))
    assert expected.mask.shape == (90, 70)
    assert_same(predict(model, tmp_path / 'phone.png'), expected)
    with Image.open(tmp_path / 'phone.png') as image:
        assert_same(predict(model, image), expected)
        assert cutout(image, expected).size == (70, 90)


def test_many_images_of_any_size_are_predicted_in_batches_in_order(model, monkeypatch):
    images = [pixels(60 + 10 * number, 80, seed=number) for number in range(5)]
    expected = [predict(model, image) for image in images]
    batches, forward = [], type(model).forward

    def spy(self, x, decode=None):
        batches.append(len(x))
        return forward(self, x, decode)

    monkeypatch.setattr(type(model), 'forward', spy)
    for many in images, tuple(images):
        found = predict(model, many, batch_size=2)
        assert type(found) is list and batches == [2, 2, 1]
        batches.clear()
        for one, two in zip(found, expected, strict=True):
            assert_close(one, two)
    assert predict(model, []) == []


def test_iterator_is_read_one_batch_at_a_time(model):
    read = []

    def images():
        for number in range(5):
            read.append(number)
            yield pixels(seed=number)

    found = predict(model, images(), batch_size=2)
    assert read == []
    next(found)
    assert read == [0, 1]
    next(found)
    next(found)
    assert read == [0, 1, 2, 3] and len(list(found)) == 2


@pytest.mark.parametrize(
    'image, message',
    [
        (None, 'found NoneType'),
        (7, 'found int'),
        (b'cat.jpg', 'found bytes'),
        ({'cat.jpg': 1}, 'found dict'),
        (np.zeros((4, 4, 3)), r'found ndarray \(4, 4, 3\) of float64'),
        (np.zeros((4, 4, 4), np.uint8), r'found ndarray \(4, 4, 4\) of uint8'),
        (np.zeros((0, 4, 3), np.uint8), r'found ndarray \(0, 4, 3\) of uint8'),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r'found Tensor \(4, 4, 3\) of torch.uint8'),
        (torch.zeros(3, 4, 4), r'found Tensor \(3, 4, 4\) of torch.float32'),
        (Image.new('RGB', (0, 4)), 'found Image of 0 x 4 pixels'),
        ([pixels(), None], 'found NoneType'),
    ],
)
def test_anything_else_is_a_value_error_that_says_what_was_expected(model, image, message):
    with pytest.raises(ValueError, match=message):
        predict(model, image)
    with pytest.raises(ValueError, match='expected a path, a PIL image, a uint8 array'):
        predict(model, image)


def test_file_that_is_no_image_is_named(model, tmp_path):
    (tmp_path / 'cat.jpg').write_text('no image')
    for path in tmp_path / 'cat.jpg', tmp_path / 'missing.jpg':
        with pytest.raises(UnreadableFile, match=str(path)):
            predict(model, path)


def test_prediction_agrees_with_evaluation(model, shared_data):
    image = MTLDataset('test', root=shared_data)[4][0]
    for flip, network in (False, model), (True, FlipAveraged(model)):
        found = predict(model, denormalise(image), flip=flip)
        with torch.inference_mode():
            outputs = network(image[None])
        probabilities = outputs.label[0].softmax(dim=0)
        assert found.breed == model.class_names[probabilities.argmax()]
        assert found.probability == pytest.approx(probabilities.max().item(), abs=1e-4)
        assert found.mask_probability == pytest.approx(outputs.mask[0, 0].sigmoid().numpy(), abs=1e-3)
        assert found.bbox == pytest.approx((outputs.bbox[0] * 64).tolist(), abs=1e-2)


def test_flip_makes_the_prediction_of_an_image_and_its_mirror_image_agree(model):
    array = pixels(64, 64)
    found, mirrored = (predict(model, image, flip=True) for image in (array, array[:, ::-1]))
    assert found.breeds == [(breed, pytest.approx(share, abs=1e-5)) for breed, share in mirrored.breeds]
    assert found.mask_probability == pytest.approx(mirrored.mask_probability[:, ::-1], abs=1e-4)
    assert predict(model, array).bbox != pytest.approx(found.bbox, abs=1e-6)


def test_likeliest_breeds_and_species(model):
    label = torch.arange(8.0)
    model.class_species = ['cat', 'dog', 'cat', None, 'dog', 'cat', 'cat', 'dog']
    found = prediction.make_prediction(model, label, None, None, (5, 4))
    shares = label.double().softmax(dim=0).tolist()
    expected = [(model.class_names[index], shares[index]) for index in (7, 6, 5, 4, 3)]
    assert found.breeds == expected and (found.breed, found.probability) == expected[0]
    assert found.species == 'dog' and found.species_probability == pytest.approx(shares[7] + shares[4] + shares[1])
    model.class_species = [None] * 8
    assert prediction.make_prediction(model, label, None, None, (5, 4)).species is None


def test_tasks_that_the_model_does_not_have_are_none(tmp_path):
    save_checkpoint(tmp_path / 'best.pt', model_content(UNet(), ['cat', 'dog'], ['cat', 'dog'], (64, 64)))
    found = predict(load_model(tmp_path / 'best.pt'), pixels())
    assert found.mask.shape == (70, 90)
    assert found[:6] == (None,) * 6


def test_cutout_keeps_the_pixels_and_is_as_opaque_as_the_mask_is_sure(model):
    array = pixels(2, 4)
    share = np.array([[0, 0.25, 0.5, 0.625], [0.75, 1, 0.2, 0.9]], np.float32)
    found = np.asarray(cutout(array, predict(model, array)._replace(mask_probability=share)))
    assert np.array_equal(found[..., :3], array)
    assert found[..., 3].tolist() == [[0, 0, 128, 191], [255, 255, 0, 255]]
    for probability in share.T, None:
        with pytest.raises(ValueError, match=r'does not belong to an image of \(2, 4\)'):
            cutout(array, predict(model, array)._replace(mask_probability=probability))


def test_numbers_that_are_not_finite_raise_input_error(model):
    for weights in model.state_dict().values():
        if weights.is_floating_point():
            weights.fill_(1e30)
    with pytest.raises(InputError, match='the model gives no finite numbers'):
        predict(model, pixels())


def test_device_moves_the_model(model):
    assert predict(model, pixels(), device='cpu').breed in model.class_names
    with pytest.raises(RuntimeError):  # the meta device holds no numbers
        predict(model, pixels(), device='meta')

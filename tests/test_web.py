"""The page in a real browser: headless Chromium through chromedriver, with the shipped model."""

import base64
import io
import json
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from conftest import CHANNELS
from PIL import Image, ImageDraw

import export_onnx
import models
from prediction import cutout, load_model, predict
from support.cli import one_line
from support.images import ORIENTATION
from support.synthetic_pets import draw_pet

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('browser')]  # one session for all tests
PACKAGE = 'onnxruntime-web@1.30.0'
PATIENCE = 300  # seconds


class Browser:
    """A session of chromedriver at `address`, in the WebDriver protocol."""

    def __init__(self, address, downloads):
        options = {
            'args': ['--headless', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1280,900'],
            'binary': shutil.which('chromium'),
            'prefs': {
                'download.default_directory': str(downloads),
                'profile.default_content_setting_values.automatic_downloads': 1,  # several without a question
            },
        }
        capabilities = {
            'goog:chromeOptions': options,
            'goog:loggingPrefs': {'browser': 'ALL'},
            'timeouts': {'script': 1000 * PATIENCE},
        }
        self.address, self.downloads = f'{address}/session', downloads
        self.address += '/' + self.call('POST', '', capabilities={'alwaysMatch': capabilities})['sessionId']

    def call(self, method, path, **content):
        data = json.dumps(content).encode() if method == 'POST' else None
        with urlopen(Request(self.address + path, data, method=method), timeout=PATIENCE) as response:
            return json.load(response)['value']

    def open(self, address):
        self.call('POST', '/url', url=address)

    def run(self, script, *arguments):
        return self.call('POST', '/execute/sync', script=script, args=arguments)

    def console(self):
        """The errors and warnings since the last call."""
        entries = self.call('POST', '/se/log', type='browser')
        return [entry['message'] for entry in entries if entry['level'] in ('SEVERE', 'WARNING')]

    def wait(self, script):
        """The first value of the script that is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.console(), self.run('return document.body.innerText'))
            time.sleep(0.05)
        return value

    def status(self):
        """What the page says once it has loaded the model or given up."""
        words = "document.querySelector('#status').textContent"
        return self.wait(f"return !{words}.startsWith('Load') && {words}")

    def choose(self, *paths):
        """Choose files as a user does."""
        field = next(iter(self.call('POST', '/element', using='css selector', value='#choose').values()))
        self.call('POST', f'/element/{field}/value', text='\n'.join(map(str, paths)))

    def give(self, kind, *paths):
        """Drop or paste files."""
        files = [[path.name, base64.b64encode(path.read_bytes()).decode()] for path in paths]
        self.run(
            """const [kind, files] = arguments, data = new DataTransfer();
            for (const [name, text] of files) {
              data.items.add(new File([Uint8Array.from(atob(text), each => each.charCodeAt())], name));
            }
            document.dispatchEvent(kind === 'drop' ? new DragEvent('drop', {dataTransfer: data})
              : new ClipboardEvent('paste', {clipboardData: data}));""",
            kind,
            files,
        )

    def answers(self, count):
        """The cards of that many files, the newest first: what they hold and say."""
        self.wait(
            "return !document.querySelector('article[aria-busy]') && "
            f"document.querySelectorAll('article').length == {count}"
        )
        return self.run(
            """return [...document.querySelectorAll('article')].map(card => ({
              ...card.dataset, name: card.querySelector('h2').textContent, text: card.innerText,
              message: card.querySelector('.message').textContent,
              described: card.querySelector('canvas').getAttribute('aria-label'),
            }))"""
        )


@pytest.fixture(scope='module')
def runtime(tmp_path_factory):
    """The folder of ONNX Runtime Web's files, which npm fetches once for a virtual environment."""
    for name in 'chromium', 'chromedriver', 'npm':
        if not shutil.which(name):
            pytest.skip(f'{name} is not installed')
    cache = Path(sys.prefix) if sys.prefix != sys.base_prefix else tmp_path_factory.mktemp('npm')
    folder = cache / PACKAGE.partition('@')[0]
    dist = folder / 'node_modules' / 'onnxruntime-web' / 'dist'
    about = dist.with_name('package.json')
    if not about.exists() or json.loads(about.read_text())['version'] != PACKAGE.partition('@')[2]:
        options = ['--ignore-scripts', '--no-audit', '--no-fund', '--fetch-retries=0', '--prefix', str(folder)]
        done = subprocess.run(['npm', 'install', *options, PACKAGE], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'{PACKAGE} cannot be installed: {one_line(done.stderr)[:200]}')
    return dist


@pytest.fixture(scope='module')
def site(runtime, tmp_path_factory):
    """A folder that is served and its address; the page of the shipped model is in `page`."""
    root = tmp_path_factory.mktemp('site')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, 'CHANNELS', CHANNELS)
        export_onnx.main(['--web', str(root / 'page'), '--runtime', str(runtime)])

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(('localhost', 0), partial(Handler, directory=root)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield root, f'http://localhost:{server.server_port}'
        server.shutdown()


@pytest.fixture(scope='module')
def browser(site, tmp_path_factory):
    with subprocess.Popen(['chromedriver', '--port=0'], stdout=subprocess.PIPE, text=True) as driver:
        try:
            started = next(line for line in driver.stdout if 'successfully on port' in line)
            port = started.rpartition(' ')[2].strip(' .\n')
            browser = Browser(f'http://localhost:{port}', tmp_path_factory.mktemp('downloads'))
            yield browser
            browser.call('DELETE', '')
        finally:
            driver.terminate()


def chelsea():
    return Image.fromarray(pytest.importorskip('skimage.data').chelsea())


def save_photographs(folder):
    """Photographs of different kinds."""
    paths = [folder / name for name in ('chelsea.jpg', 'turned.jpg', 'clear.png', 'tall.png', 'small.jpg')]
    chelsea().save(paths[0], quality=95)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    drawn = Image.fromarray(draw_pet(3, size=700).image).crop((0, 100, 700, 620))
    drawn.transpose(Image.Transpose.ROTATE_90).save(paths[1], exif=exif, quality=95)
    clear = chelsea().resize((1500, 1000))
    alpha = Image.new('L', clear.size, 255)
    ImageDraw.Draw(alpha).rectangle((0, 0, 400, 1000), fill=0)
    clear.putalpha(alpha)
    clear.save(paths[2], compress_level=1)
    chelsea().crop((100, 0, 330, 300)).resize((60, 200)).save(paths[3])  # smaller than the model's size
    small = Image.new('RGB', (1200, 900), (120, 140, 110))
    small.paste(chelsea(), (600, 500))
    small.save(paths[4], quality=95)
    return paths


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def test_page_finds_what_predict_finds(site, browser, full_networks, tmp_path):
    paths, shipped = save_photographs(tmp_path), load_model()
    browser.open(f'{site[1]}/page/')
    assert browser.status() == 'Ready.'
    browser.choose(*paths[:2])
    browser.give('drop', paths[2])
    browser.give('paste', *paths[3:])
    answers = browser.answers(len(paths))[::-1]
    assert [answer['name'] for answer in answers] == [path.name for path in paths]
    for answer, path in zip(answers, paths):
        expected = predict(shipped, path)
        width, height = expected.mask.shape[::-1]
        assert (answer['breed'], answer['species']) == (expected.breed, expected.species), path
        assert float(answer['probability']) == pytest.approx(expected.probability, abs=0.01)
        box = np.array(answer['box'].split(), float)
        assert (np.abs(box - expected.bbox) <= np.array([width, height] * 2) / 256).all(), path
        assert all(breed.replace('_', ' ') in answer['text'] for breed, _ in expected.breeds[:3])
        assert f'{round(100 * float(answer["probability"]))}\u00a0%' in answer['text']
        assert answer['message'].endswith(' s on this device; nothing has left it.')
        assert path.name in answer['described'] and 'of the picture' in answer['described']
        found, mine = save_cutout(browser, path), cutout(path, expected)
        assert (found.size, found.mode) == (mine.size, 'RGBA')
        alpha, expected_alpha = (np.asarray(each.getchannel('A')) for each in (found, mine))
        assert dice(alpha > 127, expected_alpha > 127) > 0.99, path
        assert np.abs(alpha.astype(float) - expected_alpha).mean() < 1, path
        assert (alpha[expected_alpha == 0] < 30).all()
    assert browser.console() == []


def save_cutout(browser, path):
    """The image that the button downloads."""
    browser.run(
        "[...document.querySelectorAll('article')].find(card => card.querySelector('h2').textContent == arguments[0])"
        ".querySelector('button').click()",
        path.name,
    )
    saved, end = browser.downloads / f'{path.stem}_cutout.png', time.monotonic() + PATIENCE
    while not saved.exists():  # Chromium renames it when it is whole
        assert time.monotonic() < end, list(browser.downloads.iterdir())
        time.sleep(0.05)
    return Image.open(io.BytesIO(saved.read_bytes()))


def test_bad_files_get_a_line_and_stop_no_other(site, browser, tmp_path):
    good, truncated, text = (tmp_path / name for name in ('good.jpg', 'truncated.jpg', 'text.jpg'))
    chelsea().save(good)
    truncated.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    text.write_text('no image')
    browser.open(f'{site[1]}/page/')
    browser.status()
    browser.choose(truncated, text, good)
    first, *others = browser.answers(3)
    assert first['name'] == 'good.jpg' and first['breed']
    for answer in others:
        assert answer['message'] == f'{answer["name"]} is damaged, or no image that this browser can read.'
        assert 'breed' not in answer
    browser.give('drop')
    assert browser.status() == 'That holds no photograph.'
    assert browser.console() == []


def test_a_page_that_cannot_work_says_why(site, browser):
    root, server = site
    for name in 'no_model', 'no_runtime', 'broken':
        shutil.copytree(root / 'page', root / name, copy_function=lambda source, to: Path(to).symlink_to(source))
    (root / 'no_model' / 'mtl_model.onnx').unlink()
    (root / 'no_runtime' / 'runtime' / 'ort.wasm.min.mjs').unlink()
    (root / 'broken' / 'mtl_model.onnx').unlink()
    (root / 'broken' / 'mtl_model.onnx').write_bytes(b'no model')
    (root / 'template').mkdir()
    shutil.copy(export_onnx.PAGE, root / 'template')
    for address, words in {
        f'{server}/no_model/': 'The model file mtl_model.onnx cannot be loaded; it belongs beside this page (404).',
        f'{server}/no_runtime/': f'ONNX Runtime cannot be loaded from {server}/no_runtime/runtime/. Check the',
        f'{server}/broken/': 'The model cannot be started in this browser (',
        f'{server}/template/': 'This page has no model yet. "python export_onnx.py --web DIR" puts one in.',
        (root / 'page' / 'index.html').as_uri(): 'This page was opened as a file, and browsers let no such page',
    }.items():
        browser.open(address)
        assert browser.status().startswith(words), address
        assert browser.run("return document.querySelector('#choose').disabled")
    browser.console()

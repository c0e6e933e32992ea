"""Draw seeded cats and dogs with an exact mask, head box, species and breed: `draw_pet`.

A pose function builds a pet back to front from parts: polygons in pose units (about one head radius), x to the right,
y down, the pet facing left. One stencil paints each part into the picture and into the mask, so that the two cannot
disagree, and clips the marks on it: stripes, eyes, collar.

The breed shows in coat, pattern, ears, muzzle, legs and tail. The backgrounds take half of their colours from the
coats, so that colour does not separate the pet from the background.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLE = 2  # the picture is drawn this many times larger and averaged down
CIRCLE = np.arange(0, 2, 1 / 18) * np.pi  # angles of an ellipse's points
DARK, WHITE, PINK = (28, 22, 22), (250, 250, 250), (214, 140, 140)


class Breed(NamedTuple):
    """What decides how the pets of one breed look. Colours are RGB, 0-255; lengths are in pose units."""

    name: str
    species: int  # 0 cat, 1 dog
    pattern: str  # solid, stripes, points, patches, spots, saddle or brows
    colours: tuple  # coat, marking (the pattern), accent (muzzle, brows, second kind of patch) and eye
    ears: str  # pointed, tall, floppy or long
    muzzle: float  # how far a dog's muzzle reaches
    length: float  # of the body, from shoulder to rump
    legs: float
    girth: float
    tail: float  # its half width
    fluff: float  # depth of the tufted outline, as a fraction of the radius


BREEDS = (
    Breed('ginger_tabby', 0, 'stripes', ((222, 142, 66), (160, 82, 28), (246, 222, 190), (150, 180, 70)),
          'pointed', 0.0, 2.6, 1.45, 0.80, 0.18, 0.0),
    Breed('black_shorthair', 0, 'solid', ((44, 42, 48), (44, 42, 48), (62, 60, 66), (236, 200, 50)),
          'pointed', 0.0, 2.4, 1.4, 0.82, 0.17, 0.0),
    Breed('siamese_point', 0, 'points', ((230, 214, 188), (84, 62, 54), (84, 62, 54), (80, 160, 230)),
          'tall', 0.0, 2.8, 1.75, 0.64, 0.13, 0.0),
    Breed('calico_longhair', 0, 'patches', ((240, 234, 226), (212, 124, 48), (56, 48, 46), (170, 170, 60)),
          'pointed', 0.0, 2.4, 1.25, 0.92, 0.42, 0.13),
    Breed('spotted_hound', 1, 'spots', ((238, 236, 232), (40, 38, 40), (238, 236, 232), (84, 56, 34)),
          'floppy', 0.95, 2.7, 2.1, 0.76, 0.13, 0.0),
    Breed('saddle_shepherd', 1, 'saddle', ((188, 134, 78), (46, 40, 38), (66, 54, 48), (96, 62, 30)),
          'tall', 1.1, 2.9, 1.8, 0.86, 0.34, 0.07),
    Breed('golden_longcoat', 1, 'solid', ((220, 174, 104), (220, 174, 104), (238, 206, 152), (70, 44, 26)),
          'floppy', 0.85, 2.7, 1.65, 0.94, 0.42, 0.13),
    Breed('chocolate_longback', 1, 'brows', ((94, 54, 38), (94, 54, 38), (204, 140, 82), (60, 38, 24)),
          'long', 1.0, 4.0, 0.8, 0.74, 0.16, 0.0),
)  # fmt: skip
COATS = [colour for breed in BREEDS for colour in breed.colours[:3]]
MARKED_ROLES = {'points': ('leg', 'paw', 'tail', 'ear'), 'saddle': ('tail', 'ear'), 'spots': ('ear',)}


class Pet(NamedTuple):
    """One drawn pet; H = W = the size asked for."""

    image: np.ndarray  # uint8 (H, W, 3), RGB, 0-255
    mask: np.ndarray  # uint8 (H, W, 1), 1 pet, 0 background
    bbox: np.ndarray  # float32 (4,), xmin, ymin, xmax, ymax of the head with its ears: edges in pixels within [0, size]


class Shape(NamedTuple):
    """A filled polygon, or a line if its width is not 0."""

    points: np.ndarray  # (N, 2)
    colour: tuple
    width: float = 0.0

    def moved(self, linear, offset):
        """The shape with its points as `points @ linear + offset`."""
        return Shape(np.dot(self.points, linear) + offset, self.colour, self.width * np.hypot(*linear[0]))


def shade(colour, factor):
    return tuple(np.minimum(np.multiply(colour, factor), 255).astype(int).tolist())


def jitter(rng, colour, spread):
    """Vary brightness by up to `spread` (a fraction) and each channel by a third of that."""
    return shade(colour, rng.uniform(1 - spread, 1 + spread) * rng.uniform(1 - spread / 3, 1 + spread / 3, 3))


def rotation(angle):
    """Matrix that turns row vectors, `points @ matrix`, by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def tufted(x, y, rx, ry, angle, fluff):
    """Outline at radii rx, ry round x, y; every second point stands out by 20 to 100 % of `fluff`."""
    number = np.arange(len(angle))
    reach = 1 + fluff * (number % 2) * (0.2 + 0.8 * (0.618 * number**2 % 1))
    return np.array([x + reach * rx * np.cos(angle), y + reach * ry * np.sin(angle)]).T


def ellipse(x, y, rx, ry, fluff=0.0):
    return tufted(x, y, rx, ry, CIRCLE, fluff)


def tube(nodes, fluff=0.0):
    """Rounded tube along the Bezier curve of the `nodes`, each x, y, half width."""
    t = np.linspace(0, 1, 18)[:, None, None]
    curve = np.array([nodes])
    while curve.shape[1] > 1:  # de Casteljau
        curve = curve[:, :-1] * (1 - t) + curve[:, 1:] * t
    x, y, width = curve[:, 0].T
    heading = np.arctan2(np.gradient(y), np.gradient(x))
    # Down one side, round the end, back up the other side and round the start.
    side, cap = np.pi / 2, np.linspace(np.pi / 2, -np.pi / 2, 8)[1:-1]
    angle = np.concatenate([heading + side, heading[-1] + cap, heading[::-1] - side, heading[0] - np.pi + cap])
    where = np.r_[:18, [17] * 6, 17:-1:-1, [0] * 6]
    return tufted(x[where], y[where], width[where], width[where], angle, fluff)


def spot(colour, x, y, rx, ry, fluff=0.0):
    return Shape(ellipse(x, y, rx, ry, fluff), colour)


class Sketch:
    """One pet in pose units: `parts`, each an outline and the marks clipped to it; the head's from `head_start` on."""

    def __init__(self, breed, rng):
        self.breed, self.rng, self.parts = breed, rng, []
        self.coat, self.marking, self.accent, self.iris = (jitter(rng, colour, 0.12) for colour in breed.colours)
        self.linear, self.offset = np.eye(2), 0  # where parts go; `head` changes it

    def add(self, role, points, marks=(), colour=None, far=False):
        """Add a part in `colour`, or in the coat's colour and pattern for its role; `far` parts are in shadow."""
        colour = colour or self.role_colour(role)
        pattern = self.pattern(role, points) if colour == self.coat else ()
        # A rim keeps the limbs apart; a black coat needs a lighter one.
        rim = Shape(np.concatenate([points, points[:1]]), shade(colour, 0.72 if sum(colour) > 210 else 1.5), 0.08)
        part = [shape.moved(self.linear, self.offset) for shape in (Shape(points, colour), *pattern, *marks, rim)]
        self.parts.append([shape._replace(colour=shade(shape.colour, 0.78)) for shape in part] if far else part)

    def tube(self, role, *nodes, **options):
        """Add a tube; the widths of body, tail and legs are in units of the breed's."""
        breed = self.breed
        scale = {'body': breed.girth, 'tail': breed.tail, 'leg': 0.2 + 0.12 * breed.girth}.get(role, 1)
        fluff = breed.fluff * {'tail': 2, 'muzzle': 0}.get(role, 1)
        self.add(role, tube([(x, y, scale * width) for x, y, width in nodes], fluff), **options)

    def role_colour(self, role):
        pattern = self.breed.pattern
        if role == 'muzzle' or (pattern, role) == ('brows', 'paw'):
            return self.accent
        if pattern == 'patches' and (role in ('tail', 'ear') or role in ('leg', 'paw') and self.rng.random() < 0.2):
            return (self.marking, self.accent)[self.rng.integers(2)]
        return self.marking if role in MARKED_ROLES.get(pattern, ()) else self.coat

    def pattern(self, role, points):
        """The pattern's marks for a part in the coat's colour."""
        rng, pattern, low, span = self.rng, self.breed.pattern, points.min(0), np.ptp(points, 0)
        upright = span[1] > span[0]
        if pattern == 'stripes' and role not in ('head', 'ear'):  # across the longer side, from the back
            for x in np.arange(0.15, span.max(), 0.42):
                lean, width, depth = rng.uniform((-0.2, 0.07, 0.5 * span.min()), (0.2, 0.12, 0.85 * span.min()))
                band = [(x - width, 0), (x + width, 0), (x + lean, depth)]
                yield Shape(low + ([(span[0] - y, x) for x, y in band] if upright else band), self.marking)
        if pattern == 'spots':
            for x, y, rx, ry in rng.uniform(0, 1, (int(np.clip(4 * span.prod(), 3, 40)), 4)):
                yield spot(self.marking, *(low + span * (x, y)), 0.05 + 0.1 * rx, 0.05 + 0.1 * ry)
        if pattern == 'patches' and role in ('body', 'head'):
            for colour in (self.marking, self.accent) * 2:
                x, y, rx, ry = rng.uniform((0.1, 0.1, 0.2, 0.2), (0.9, 0.9, 0.36, 0.36))
                yield spot(colour, *(low + span * (x, y)), *(span * (rx, ry)), 0.15)
        if pattern == 'saddle' and role == 'body':  # the back is on the right of an upright body, otherwise on top
            yield spot(self.marking, *(low + span * ((1, 0.5) if upright else (0.5, 0))), *(span * (0.42, 0.55)), 0.2)
        if pattern == 'brows' and role == 'leg':
            yield spot(self.accent, *(low + span * (0.5, 1)), *(span * (0.9, 0.4)))

    def leg(self, x, y, foot, ground, far=False):
        """Leg from (x, y) to a paw at (foot, ground) that points forward (left)."""
        self.tube('leg', (x, y, 1.35), (x, (y + ground) / 2, 1), (foot, ground - 0.15, 0.8), far=far)
        self.add('paw', ellipse(foot - 0.12, ground - 0.1, 0.25 + 0.15 * self.breed.girth, 0.2), far=far)

    def neck(self, x, y, head_x, head_y, width):
        """Neck from (x, y) to the head; every third pet wears a collar round it."""
        dx, dy = head_x - x, head_y - y
        ends = [(x + 0.3 * dx + side * dy, y + 0.3 * dy - side * dx) for side in (-1, 1)]
        collar = [Shape(ends, tuple(self.rng.integers(20, 240, 3).tolist()), 0.2)] if self.rng.random() < 0.35 else []
        self.tube('neck', (x, y, width * 1.15), (head_x, head_y, width), marks=collar)

    def head(self, x, y, radius, turn):
        """Head at (x, y), the last part; `turn` from -1, looking left, through 0, into the camera, to 1."""
        self.head_start = len(self.parts)
        self.linear, self.offset = radius * rotation(self.rng.uniform(-0.22, 0.22)), (x, y)  # drawn as a unit circle
        if self.breed.ears in ('pointed', 'tall'):
            tip, base = (1.42, 0.3) if self.breed.ears == 'tall' else (1.22, 0.36)
            for s in (-1, 1):
                ear = np.array([(s * (0.56 + base), -0.25), (s * 0.86, -tip), (s * (0.56 - base), -0.6)])
                ear[:, 0] += 0.09 * turn
                self.add('ear', ear, [Shape(0.45 * ear.mean(0) + 0.55 * ear, shade(PINK, 0.85))])
        (self.dog_head if self.breed.species else self.cat_head)(turn)

    def cat_head(self, turn):
        pattern, x, open_eye, marks = self.breed.pattern, 0.32 * turn, self.rng.uniform(0.13, 0.2), []
        if pattern == 'points':
            marks = [spot(self.marking, x, 0.28, 0.62, 0.6)]
        if pattern == 'stripes':  # on forehead and cheeks
            bands = [[(x + s - 0.07, -0.95), (x + s + 0.07, -0.95), (x + s * 0.7, -0.36)] for s in (-0.3, 0, 0.3)]
            bands += [[(s, y), (s, y + 0.16), (x + s * 0.6, y)] for s in (-1.05, 1.05) for y in (-0.02, 0.26)]
            marks = [Shape(band, self.marking) for band in bands]
        pads = self.coat if pattern == 'patches' else self.accent
        whisker = (225, 225, 220) if sum(self.coat) < 300 else (120, 110, 104)
        for s in (-1, 1):
            marks += self.eye(x + s * 0.42, -0.06, (0.2, open_eye), (0.065, open_eye * 0.95), DARK)
            marks.append(spot(pads, x + s * 0.17, 0.42, 0.22, 0.17))
            marks += [Shape([(x + s * 0.3, 0.42), (x + s * 1.1, y)], whisker, 0.02) for y in (0.28, 0.44, 0.6)]
        mouth = [(x - 0.2, 0.52), (x - 0.08, 0.55), (x, 0.36), (x + 0.08, 0.55), (x + 0.2, 0.52)]
        skull = ellipse(0, 0, 0.98, 0.84, self.breed.fluff)
        skull[:, 0] *= 1 + 0.1 * np.sin(np.pi * np.clip(skull[:, 1], 0, 1))  # cheeks
        marks += [Shape([(x - 0.12, 0.22), (x + 0.12, 0.22), (x, 0.36)], PINK), Shape(mouth, DARK, 0.04)]
        self.add('head', skull, marks)

    def dog_head(self, turn):
        breed, x, reach, marks = self.breed, 0.28 * turn, 0.72 * turn * self.breed.muzzle, []
        for side in (x - 0.34, x + 0.34):
            marks += self.eye(side, -0.12, (0.13, 0.13), (0.08, 0.08), shade(self.coat, 0.6))
            if breed.pattern == 'brows':
                marks.append(spot(self.accent, side, -0.36, 0.12, 0.09))
        self.add('head', ellipse(0, 0, 0.8, 0.86, breed.fluff * 0.6), marks)
        if breed.ears != 'tall':
            drop, wide = (1.05, 0.33) if breed.ears == 'long' else (0.55, 0.27)
            for s in (-1, 1):
                nodes = (s * 0.5, -0.72, 0.14), (s * 1.15, -0.75, wide * 0.7), (s * 0.98, drop, wide * 1.1)
                self.tube('ear', *nodes, colour=shade(self.role_colour('ear'), 0.84))
        tip, x = reach + 0.4 * turn * breed.muzzle, reach + 0.2 * turn
        mouth = [(x - 0.3, 0.66), (x - 0.12, 0.76), (x, 0.66), (x + 0.12, 0.76), (x + 0.3, 0.66)]
        tongue = [spot((220, 96, 110), x, 0.86, 0.13, 0.18)] if self.rng.random() < 0.4 else []
        marks = [Shape(mouth, DARK, 0.05), *tongue, spot(DARK, tip, 0.34, 0.2, 0.15), spot(WHITE, tip, 0.3, 0.05, 0.02)]
        self.tube('muzzle', (0.14 * turn, 0.3, 0.4), (reach, 0.45, 0.44), (tip, 0.5, 0.36), marks=marks)

    def eye(self, x, y, iris, pupil, rim):
        """Eye at (x, y); `iris` and `pupil` are radii (x, y)."""
        ring, glint = spot(rim, x, y, iris[0] + 0.04, iris[1] + 0.04), spot(WHITE, x + 0.05, y - 0.06, 0.04, 0.04)
        return [ring, spot(self.iris, x, y, *iris), spot(DARK, x, y, *pupil), glint]


def standing(pet, breed, rng):
    rump, ground, step = breed.length, breed.legs + 0.35, rng.uniform(-0.35, 0.35, 4)
    end, up = rng.uniform((0.8, -1.6), (2, 0.5))
    pet.tube('tail', (rump + 0.3, -0.3, 0.7), (rump + 1, -0.3, 1.1), (rump + 1.3, up, 1.2), (rump + end, up - 0.4, 0.5))
    pet.leg(0.35, 0.2, 0.35 + step[0], ground - 0.12, far=True)
    pet.leg(rump - 0.25, 0.2, rump - 0.25 + step[1], ground - 0.12, far=True)
    head_y = rng.uniform(-1.5, -1) if breed.species else rng.uniform(-1.15, -0.75)
    pet.neck(0.1, -0.1, -0.8, head_y, 0.55)
    pet.tube('body', (0.15, 0, 1), (rump / 2, 0.15, 0.95), (rump, -0.05, 0.9))
    pet.leg(0, 0.2, step[2], ground)
    pet.leg(rump, 0.15, rump + step[3], ground)
    pet.head(-0.8, head_y, 0.92, rng.uniform(-1, -0.2))


def sitting(pet, breed, rng):
    ground, (end, up) = 1.7 + 0.75 * breed.legs, rng.uniform((2.3, 0.2), (3.2, 1.6))
    pet.tube('tail', (1.1, ground - 0.4, 0.7), (2, ground, 1.1), (end, ground - 0.2, 1.2), (end, ground - up, 0.5))
    pet.tube('body', (0, 0.3, 0.8), (0.2, ground / 2, 1.1), (0.6, ground - breed.girth, 1.3))
    pet.add('haunch', ellipse(1.05, ground - 0.75, 0.85, 0.75, breed.fluff))
    pet.leg(0.85, ground - 0.4, 0.7, ground)
    pet.leg(0.25, 1, 0.2, ground - 0.05, far=True)
    pet.leg(-0.35, 1, -0.45, ground)
    pet.neck(0, 0.75, -0.05, -0.6, breed.girth * 0.85)
    pet.head(-0.1, -0.55, 1, rng.uniform(-0.9, 0.7))


def lying(pet, breed, rng):
    rump, (bend, up) = breed.length * 1.05, rng.uniform((1.2, -0.6), (2, 0.6))
    pet.tube('tail', (rump + 0.4, 0.4, 0.7), (rump + 1, 0.8, 1.1), (rump + bend, 0.7, 1.2), (rump + 1.4, up, 0.5))
    pet.leg(0.3, 0.5, -0.7 - 0.2 * breed.legs, 0.85, far=True)
    pet.tube('body', (0, 0.1, 0.95), (rump / 2, 0, 1.05), (rump, 0.2, 0.85))
    pet.add('haunch', ellipse(rump - 0.15, 0.4, 0.8, 0.62, breed.fluff))
    pet.leg(rump - 0.2, 0.75, rump - 0.8, 1.05)
    pet.leg(0.2, 0.65, -0.5 - 0.25 * breed.legs, 1.05)
    pet.neck(0.05, 0, -0.4, -0.8, breed.girth * 0.7)
    pet.head(-0.5, rng.uniform(-1, -0.6), 0.95, rng.uniform(-0.9, 0.5))


def portrait(pet, breed, rng):
    lean = rng.uniform(-0.3, 0.5)
    pet.tube('body', (lean, 1.3, 1), (lean * 1.5, 2.2, 1.6), (lean * 2, 4.5, 2))
    pet.neck(lean, 1.5, 0, 0, 0.72)
    pet.head(0, 0, 1.15, rng.uniform(-0.8, 0.8))


def draw_scene(rng, side, horizon, shadow):
    """Cluttered room or meadow; `horizon` is y in pixels, `shadow` the box of the pet's shadow."""
    outdoor = rng.random() < 0.5
    wall, floor = ((150, 190, 225), (92, 132, 60)) if outdoor else rng.integers([[110], [70]], [[235], [200]], (2, 3))
    wall, floor, thin = jitter(rng, wall, 0.2), jitter(rng, floor, 0.25), side // 128
    gradient = np.linspace(shade(wall, 0.8), shade(wall, 1.15), side, dtype=np.uint8)
    image = Image.fromarray(np.repeat(gradient[:, None], side, axis=1))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, horizon, side, side), floor)
    colours = [jitter(rng, each, 0.2) for each in rng.permutation([*COATS, *rng.integers(20, 240, (24, 3))])[:16]]
    if not outdoor and rng.random() < 0.6:  # floorboards
        for x in np.arange(rng.uniform(0, 0.2), 1.4, rng.uniform(0.1, 0.22)) * side:
            draw.line((x, horizon, x * 1.8 - side * 0.4, side), shade(floor, 0.8), thin)
    for _ in range(rng.integers(2, 6)):  # furniture, bushes
        x, width, height, foot = rng.uniform((-0.2, 0.1, 0.1, 0), (1, 0.45, 0.5, 0.12)) * side
        fill, shape = colours.pop(), draw.ellipse if outdoor and rng.random() < 0.6 else draw.rectangle
        shape((x, horizon + foot - height, x + width, horizon + foot), fill, shade(fill, 0.7), thin)
    for _ in range(rng.integers(2, 6)):  # balls, cushions, stones
        x, y, rx = rng.uniform((0, 0.3, 0.03), (1, 1, 0.11)) * side
        ry, fill = rx * rng.uniform(0.6, 1.1), colours.pop()
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill)
        draw.ellipse((x - rx * 0.6, y - ry * 0.7, x, y - ry * 0.2), shade(fill, 1.2))
    for _ in range(rng.integers(0, 4)):  # sticks, ropes, cables
        nodes = rng.uniform((-0.1, 0.2, 0.006), (1.1, 1, 0.03), (3, 3)) * side
        draw.polygon(tube(nodes).ravel().tolist(), colours.pop())
    if outdoor:  # grass
        greens = [jitter(rng, floor, 0.35) for _ in range(8)]
        for x, y, lean, tall in rng.uniform((0, horizon / side, -0.03, 0.02), (1, 1, 0.03, 0.1), (110, 4)) * side:
            draw.line((x, y, x + lean, y - tall), greens[int(x + y) % 8], thin)
    draw.ellipse(shadow, shade(floor, 0.6))
    cells = int(rng.choice((12, 32, 96)))
    grain = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
    return Image.blend(image, grain.resize((side, side), Image.Resampling.BILINEAR), rng.uniform(0.04, 0.2))


def compose(index, seed, size):
    """The random generator, the parts of body and head in pixels, and the scene behind them."""
    rng, side, breed = np.random.default_rng([seed, index]), size * SUPERSAMPLE, BREEDS[index % len(BREEDS)]
    pet, pose = Sketch(breed, rng), (standing, sitting, lying, portrait)[rng.integers(4)]
    pose(pet, breed, rng)
    linear = rotation(rng.uniform(-0.12, 0.12)) * (rng.choice((-1, 1)), 1)
    outlines = [part[0].points @ linear for part in pet.parts]
    whole, head = np.concatenate(outlines), np.concatenate(outlines[pet.head_start :])
    # A portrait is framed by its head and runs out of the picture; other poses fit as a whole.
    framed, *share = (head, 0.4, 0.68) if pose is portrait else (whole, 0.68, 1.04)
    span = np.ptp(framed, 0)
    scale = side * rng.uniform(*share) / span.max()
    offset = rng.uniform(0, 1, 2) * (side - scale * span) - scale * framed.min(0)
    offset = np.clip(offset, -scale * head.min(0), side - scale * head.max(0))  # the whole head is in the picture
    parts = [[shape.moved(scale * linear, offset) for shape in part] for part in pet.parts]
    (left, top), (right, bottom) = scale * whole.min(0) + offset, scale * whole.max(0) + offset
    horizon = np.clip(bottom - rng.uniform(0.1, 0.6) * (bottom - top), 0.2 * side, 0.85 * side)
    scene = draw_scene(rng, side, horizon, (left, bottom - 0.05 * side, right, bottom + 0.035 * side))
    return rng, parts[: pet.head_start], parts[pet.head_start :], scene


def paint(part, image, *masks):
    """Paint a part into the image and the masks through one stencil."""
    stencil, tile = Image.new('L', image.size), Image.new('RGB', image.size)
    ImageDraw.Draw(stencil).polygon(part[0].points.ravel().tolist(), 255)
    box, draw = stencil.getbbox(), ImageDraw.Draw(tile)
    if box is None:  # outside the picture
        return
    for points, colour, width in part:
        if width:
            draw.line(points.ravel().tolist(), colour, max(1, round(width)))
        else:
            draw.polygon(points.ravel().tolist(), colour)
    stencil = stencil.crop(box)
    image.paste(tile.crop(box), box, stencil)
    for mask in masks:
        mask.paste(255, box, stencil)


def develop(rng, image):
    """Average down, add blur, light and sensor noise: uint8 (H, W, 3)."""
    image = image.reduce(SUPERSAMPLE)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.002, 0.004) * image.width))
    light = (rng.uniform(0.85, 1.15, (3, 3)) * rng.uniform(0.7, 1.15)).astype(np.float32)
    light = np.asarray(Image.fromarray(light).resize(image.size, Image.Resampling.BILINEAR))[..., None]
    # The noise comes last, since only its amount depends on the size of the picture.
    noise = rng.uniform(1, 8) * rng.standard_normal((*image.size, 3), np.float32)
    return np.clip(np.asarray(image) * light + noise, 0, 255).astype(np.uint8)


def draw_pet(index, seed=0, size=256):
    """The `Pet` number `index` of the set that `seed` names: the same bytes for the same seed, index and size.

    index, seed: integers of at least 0. size: side of the square picture, 64 to 512 pixels.
    The breed is `index % len(BREEDS)`, so that any number of pets is balanced; all the rest is random.
    """
    rng, body, head, image = compose(index, seed, size)
    mask, head_mask = (Image.new('L', image.size) for _ in range(2))
    for part in body:
        paint(part, image, mask)
    for part in head:
        paint(part, image, mask, head_mask)
    mask, head_mask = (each.reduce(SUPERSAMPLE).point(lambda value: value > 127) for each in (mask, head_mask))
    return Pet(develop(rng, image), np.array(mask)[..., None], np.array(head_mask.getbbox(), np.float32))


def draw_background(index, seed=0, size=256):
    """The picture of `draw_pet` with the same arguments, without the pet: (size, size, 3) uint8."""
    rng, _, _, image = compose(index, seed, size)
    return develop(rng, image)

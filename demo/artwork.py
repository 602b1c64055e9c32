"""Open emoji artwork and procedural scenes, composed into captioned training images.

Its job: which glyphs are used under which licence, and how an image is composed. It does not know captions' wording
(`demo.captions`) or any network. Needs Pillow and numpy; rasterising the glyphs needs `resvg-py` and the icon packages
named in `PACKAGES` (npm, `@iconify-json/<vendor>`).
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .captions import CLASSES, SCENES


@dataclass(frozen=True)
class Package:
    """One icon package: where the artwork comes from and under which licence."""

    version: str
    licence: str
    author: str
    url: str


PACKAGES: dict[str, Package] = {
    "twemoji": Package(
        "1.2.5", "CC-BY-4.0", "Twitter, Inc. and other contributors", "https://github.com/jdecked/twemoji"
    ),
    "noto": Package("1.2.9", "Apache-2.0", "Google Inc", "https://github.com/googlefonts/noto-emoji"),
    "noto-v1": Package("1.2.5", "Apache-2.0", "Google Inc", "https://github.com/googlefonts/noto-emoji"),
    "fluent-emoji": Package("1.2.7", "MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    "fluent-emoji-flat": Package(
        "1.2.6", "MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"
    ),
    "fxemoji": Package("1.2.2", "Apache-2.0", "Mozilla", "https://github.com/mozilla/fxemoji"),
}

HELD_OUT_VENDOR = "noto"
"""Neither the generator nor the classifier is trained on this vendor: it is the classifier's test."""

# Few and look-alike glyphs, chosen by eye at 64 px, so that a small model draws each of them sharply.
GENERATOR_GLYPHS: dict[str, tuple[str, ...]] = {
    "airplane": ("noto-v1/airplane", "twemoji/airplane"),
    "automobile": (
        "twemoji/automobile",
        "noto-v1/automobile",
        "fxemoji/automobile",
        "fxemoji/recreationalvehicle",
        "twemoji/taxi",
    ),
    "bird": ("twemoji/bird", "noto-v1/bird", "twemoji/black-bird", "twemoji/baby-chick"),
    "cat": ("twemoji/cat-face", "noto-v1/cat-face", "fluent-emoji-flat/cat-face"),
    "deer": ("twemoji/deer", "noto-v1/deer"),
    "dog": ("twemoji/dog-face", "fluent-emoji-flat/dog-face", "fluent-emoji/dog-face"),
    "frog": ("twemoji/frog", "noto-v1/frog", "fluent-emoji-flat/frog"),
    "horse": ("twemoji/horse-face", "fluent-emoji-flat/horse-face", "noto-v1/horse-face"),
    "ship": ("noto-v1/ship", "twemoji/sailboat", "fluent-emoji-flat/sailboat"),
    "truck": (
        "twemoji/delivery-truck",
        "fluent-emoji-flat/delivery-truck",
        "fxemoji/deliverytruck",
        "twemoji/articulated-lorry",
        "fxemoji/articulatedlorry",
    ),
}

# Every readable glyph of a class, by icon name; a vendor that lacks a name is skipped.
CLASSIFIER_NAMES: dict[str, tuple[str, ...]] = {
    "airplane": ("airplane", "small-airplane", "airplane-departure"),
    "automobile": (
        "automobile",
        "sport-utility-vehicle",
        "taxi",
        "police-car",
        "policecar",
        "recreationalvehicle",
        "oncoming-automobile",
        "oncomingautomobile",
        "oncoming-taxi",
    ),
    "bird": (
        "bird",
        "eagle",
        "dove",
        "doveofpeace",
        "duck",
        "parrot",
        "black-bird",
        "blackbird",
        "baby-chick",
        "babychick",
        "front-facing-baby-chick",
        "goose",
    ),
    "cat": ("cat-face", "cat", "grinning-cat", "grinning-cat-with-smiling-eyes", "kissing-cat", "black-cat"),
    "deer": ("deer", "moose"),
    "dog": ("dog-face", "dog", "dogside", "poodle", "guide-dog", "service-dog"),
    "frog": ("frog",),
    "horse": ("horse", "horse-face", "horseface", "carousel-horse"),
    "ship": ("ship", "passenger-ship", "ferry", "motor-boat", "sailboat", "speedboat"),
    "truck": ("delivery-truck", "deliverytruck", "articulated-lorry", "articulatedlorry", "pickup-truck"),
}

GLYPH_PIXELS = 160
"""Size at which a glyph is rasterised; every use scales it down."""


class Icons:
    """The icon packages under one `node_modules/@iconify-json` folder, read lazily."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sets: dict[str, dict] = {}

    def svg(self, glyph: str) -> str | None:
        """Returns the SVG text of `vendor/name`, or None if the vendor has no such icon."""
        vendor, name = glyph.split("/")
        if vendor not in self._sets:
            self._sets[vendor] = json.loads((self.root / vendor / "icons.json").read_text())
        icons = self._sets[vendor]
        if name not in icons["icons"]:
            alias = icons.get("aliases", {}).get(name)
            if alias is None:
                return None
            name = alias["parent"]
        icon = icons["icons"][name]
        width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )

    def render(self, glyph: str) -> Image.Image | None:
        """Returns the glyph as RGBA, cropped to its ink, or None if the vendor has no such icon."""
        import resvg_py  # training only

        svg = self.svg(glyph)
        if svg is None:
            return None
        png = resvg_py.svg_to_bytes(svg_string=svg, width=GLYPH_PIXELS, height=GLYPH_PIXELS)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        return picture.crop(picture.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox())


def generator_glyphs(icons: Icons) -> dict[str, list[Image.Image]]:
    """Returns the generator's rasterised glyphs per class."""
    return {c: [g for name in GENERATOR_GLYPHS[c] if (g := icons.render(name)) is not None] for c in CLASSES}


def classifier_glyphs(icons: Icons, held_out: bool) -> dict[str, list[Image.Image]]:
    """Returns all glyphs per class: of the held-out vendor alone, or of every other vendor."""
    vendors = [v for v in PACKAGES if (v == HELD_OUT_VENDOR) == held_out]
    names = {c: [f"{v}/{n}" for v in vendors for n in CLASSIFIER_NAMES[c]] for c in CLASSES}
    return {c: [g for name in names[c] if (g := icons.render(name)) is not None] for c in CLASSES}


# ---------------------------------------------------------------- scenes

Colour = tuple[int, int, int]


def _shade(rng: np.random.Generator, colour: Colour, spread: int = 8) -> Colour:
    shift = rng.integers(-spread, spread + 1)
    return tuple(int(np.clip(c + shift, 0, 255)) for c in colour)  # type: ignore[return-value]


def _gradient(size: int, top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0, 1, size)[:, None, None]
    column = (1 - ramp) * np.array(top) + ramp * np.array(bottom)
    return Image.fromarray(np.broadcast_to(column, (size, size, 3)).round().astype(np.uint8).copy())


def _ellipse(draw: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def _cloud(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Colour = (255, 255, 255)) -> None:
    for dx, dy, k in ((-1.1, 0.25, 0.7), (0, -0.1, 1.0), (1.1, 0.25, 0.75)):
        _ellipse(draw, x + dx * r, y + dy * r, r * k, r * k * 0.8, fill)


def _pine(draw: ImageDraw.ImageDraw, x: float, base: float, h: float, fill: Colour) -> None:
    draw.rectangle((x - h * 0.06, base - h * 0.2, x + h * 0.06, base), fill=(110, 72, 40))
    for low, high, width in ((0.15, 0.65, 0.32), (0.45, 1.0, 0.24)):
        draw.polygon([(x - h * width, base - h * low), (x + h * width, base - h * low), (x, base - h * high)], fill)


def _street(rng: np.random.Generator, s: int) -> Image.Image:
    im = _gradient(s, (170, 208, 238), (214, 230, 240))
    d = ImageDraw.Draw(im)
    edges = np.array([0, 0.27, 0.5, 0.76, 1.0]) * s
    colours = [(206, 120, 92), (226, 196, 140), (150, 160, 178), (196, 140, 110)]
    for i in range(4):
        top = rng.uniform(0.12, 0.34) * s
        d.rectangle((edges[i], top, edges[i + 1], 0.66 * s), fill=_shade(rng, colours[i]))
        for wx in (0.28, 0.68):
            for wy in (0.1, 0.24):
                x, y = edges[i] + wx * (edges[i + 1] - edges[i]), top + wy * s
                d.rectangle((x - 0.03 * s, y - 0.035 * s, x + 0.03 * s, y + 0.035 * s), fill=(250, 238, 180))
    d.rectangle((0, 0.66 * s, s, s), fill=_shade(rng, (98, 100, 108)))
    d.rectangle((0, 0.66 * s, s, 0.7 * s), fill=(190, 188, 184))
    for x in np.arange(-0.05, 1, 0.3):
        d.rectangle((x * s, 0.83 * s, (x + 0.18) * s, 0.865 * s), fill=(246, 240, 214))
    return im


def _forest(rng: np.random.Generator, s: int) -> Image.Image:
    im = _gradient(s, (188, 222, 236), (206, 232, 214))
    d = ImageDraw.Draw(im)
    d.rectangle((0, 0.68 * s, s, s), fill=_shade(rng, (94, 152, 72)))
    for x, base, h in ((0.3, 0.7, 0.6), (0.7, 0.7, 0.62), (0.08, 0.8, 0.74), (0.5, 0.78, 0.7), (0.92, 0.8, 0.76)):
        _pine(d, (x + rng.uniform(-0.03, 0.03)) * s, base * s, h * s, _shade(rng, (36, 112, 58), 14))
    return im


def _sea(rng: np.random.Generator, s: int) -> Image.Image:
    im = _gradient(s, (150, 206, 244), (216, 238, 250))
    d = ImageDraw.Draw(im)
    level = rng.uniform(0.4, 0.48)
    for i, colour in enumerate(((52, 140, 214), (38, 118, 196), (28, 98, 176))):
        y = (level + 0.2 * i) * s
        d.rectangle((0, y, s, s), fill=colour)
        phase = rng.uniform(0, 0.25)
        for x in np.arange(-0.25, 1.2, 0.25):
            _ellipse(d, (x + phase) * s, y, 0.125 * s, 0.035 * s, colour)
    return im


def _sky(rng: np.random.Generator, s: int) -> Image.Image:
    im = _gradient(s, (74, 152, 232), (170, 214, 248))
    d = ImageDraw.Draw(im)
    for x, y, r in ((0.24, 0.22, 0.12), (0.74, 0.42, 0.13), (0.3, 0.76, 0.12)):
        _cloud(d, (x + rng.uniform(-0.06, 0.06)) * s, (y + rng.uniform(-0.05, 0.05)) * s, r * s)
    return im


def _field(rng: np.random.Generator, s: int) -> Image.Image:
    im = _gradient(s, (140, 200, 244), (214, 238, 250))
    d = ImageDraw.Draw(im)
    _ellipse(d, 0.22 * s, 0.8 * s, 0.6 * s, 0.34 * s, _shade(rng, (156, 208, 96)))
    _ellipse(d, 0.85 * s, 0.86 * s, 0.62 * s, 0.36 * s, _shade(rng, (132, 194, 78)))
    d.rectangle((0, 0.78 * s, s, s), fill=_shade(rng, (116, 182, 66)))
    for x in (0.1, 0.32, 0.54, 0.76, 0.94):
        cx, cy = (x + rng.uniform(-0.04, 0.04)) * s, rng.uniform(0.84, 0.94) * s
        _ellipse(d, cx, cy, 0.028 * s, 0.028 * s, (250, 216, 60))
    return im


def _desert(rng: np.random.Generator, s: int) -> Image.Image:
    im = _gradient(s, (252, 206, 130), (254, 236, 190))
    d = ImageDraw.Draw(im)
    _ellipse(d, rng.uniform(0.68, 0.8) * s, 0.2 * s, 0.11 * s, 0.11 * s, (255, 246, 200))
    _ellipse(d, 0.2 * s, 0.86 * s, 0.62 * s, 0.3 * s, _shade(rng, (232, 172, 92)))
    _ellipse(d, 0.86 * s, 0.94 * s, 0.66 * s, 0.32 * s, _shade(rng, (216, 150, 74)))
    x, w = rng.uniform(0.1, 0.16) * s, 0.035 * s
    for box in ((0, 0.42, 0, 0.78), (-0.09, 0.52, -0.09, 0.62), (0.09, 0.48, 0.09, 0.6)):
        d.rounded_rectangle((x + box[0] * s - w, box[1] * s, x + box[2] * s + w, box[3] * s), w, fill=(66, 140, 78))
    d.rectangle((x - 0.09 * s, 0.59 * s, x + 0.09 * s, 0.63 * s), fill=(66, 140, 78))
    return im


def _beach(rng: np.random.Generator, s: int) -> Image.Image:
    im = _gradient(s, (130, 204, 246), (204, 236, 252))
    d = ImageDraw.Draw(im)
    d.rectangle((0, 0.42 * s, s, 0.66 * s), fill=(44, 162, 214))
    _ellipse(d, 0.4 * s, 0.98 * s, 0.9 * s, 0.37 * s, (250, 250, 244))
    _ellipse(d, 0.4 * s, 1.01 * s, 0.92 * s, 0.36 * s, _shade(rng, (244, 218, 156)))
    x = rng.uniform(0.8, 0.88) * s
    d.polygon([(x - 0.02 * s, 0.8 * s), (x + 0.03 * s, 0.8 * s), (x + 0.02 * s, 0.3 * s)], fill=(140, 94, 54))
    for angle in (-160, -115, -65, -20, 20, 160):
        dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        tip = (x + dx * 0.22 * s, 0.3 * s + dy * 0.16 * s + 0.06 * s)
        d.line([(x, 0.3 * s), (x + dx * 0.12 * s, 0.28 * s + dy * 0.12 * s), tip], fill=(56, 150, 74), width=s // 20)
    return im


def _night(rng: np.random.Generator, s: int) -> Image.Image:
    im = _gradient(s, (14, 20, 58), (50, 58, 118))
    d = ImageDraw.Draw(im)
    x, y = rng.uniform(0.72, 0.84) * s, rng.uniform(0.17, 0.23) * s
    _ellipse(d, x, y, 0.12 * s, 0.12 * s, (252, 240, 190))
    _ellipse(d, x - 0.06 * s, y - 0.03 * s, 0.1 * s, 0.1 * s, (20, 27, 68))
    for sx, sy in ((0.1, 0.14), (0.3, 0.3), (0.46, 0.1), (0.62, 0.38), (0.12, 0.5), (0.92, 0.52)):
        _ellipse(d, (sx + rng.uniform(-0.04, 0.04)) * s, sy * s, 0.018 * s, 0.018 * s, (255, 250, 220))
    _ellipse(d, 0.3 * s, 1.0 * s, 0.7 * s, 0.24 * s, (24, 36, 62))
    _ellipse(d, 0.9 * s, 1.02 * s, 0.5 * s, 0.22 * s, (18, 28, 50))
    return im


def _snow(rng: np.random.Generator, s: int) -> Image.Image:
    im = _gradient(s, (158, 184, 214), (206, 220, 236))
    d = ImageDraw.Draw(im)
    _ellipse(d, 0.25 * s, 0.94 * s, 0.7 * s, 0.32 * s, (232, 240, 250))
    _ellipse(d, 0.85 * s, 0.98 * s, 0.6 * s, 0.3 * s, (248, 251, 255))
    for x, h in ((0.12, 0.5), (0.88, 0.46)):
        cx = (x + rng.uniform(-0.03, 0.03)) * s
        _pine(d, cx, 0.76 * s, h * s, (70, 124, 120))
        d.polygon([(cx - 0.1 * h * s, (0.76 - 0.78 * h) * s), (cx + 0.1 * h * s, (0.76 - 0.78 * h) * s),
                   (cx, (0.76 - h) * s)], fill=(250, 252, 255))  # fmt: skip
    for x, y in ((0.3, 0.12), (0.52, 0.24), (0.7, 0.1), (0.4, 0.42), (0.64, 0.46), (0.24, 0.3)):
        _ellipse(d, (x + rng.uniform(-0.05, 0.05)) * s, y * s, 0.024 * s, 0.024 * s, (255, 255, 255))
    return im


def _ground(rng: np.random.Generator, s: int) -> Image.Image:
    im = _gradient(s, (168, 122, 82), (126, 84, 52))
    d = ImageDraw.Draw(im)
    for x, y in (
        (0.16, 0.2),
        (0.56, 0.12),
        (0.84, 0.34),
        (0.36, 0.46),
        (0.1, 0.7),
        (0.64, 0.64),
        (0.86, 0.86),
        (0.4, 0.88),
    ):
        cx, cy = x + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.04, 0.04)
        _ellipse(d, cx * s, cy * s, 0.06 * s, 0.04 * s, (94, 62, 40))
        _ellipse(d, cx * s, (cy - 0.012) * s, 0.055 * s, 0.032 * s, (188, 152, 116))
    return im


_PAINTERS = {
    "street": _street,
    "forest": _forest,
    "sea": _sea,
    "sky": _sky,
    "field": _field,
    "desert": _desert,
    "beach": _beach,
    "night": _night,
    "snow": _snow,
    "ground": _ground,
}

PASTELS: tuple[Colour, ...] = (
    (206, 226, 244),
    (224, 236, 220),
    (244, 228, 216),
    (232, 224, 244),
    (240, 240, 226),
    (214, 236, 236),
)


def draw_scene(rng: np.random.Generator, scene: str | None, size: int) -> Image.Image:
    """Returns a scene (a pastel gradient for None), drawn at twice the size and averaged down."""
    if scene is None:
        colour = PASTELS[rng.integers(len(PASTELS))]
        return _gradient(size, _shade(rng, colour, 6), _shade(rng, tuple(c - 22 for c in colour), 6))  # type: ignore[arg-type]
    return _PAINTERS[scene](rng, 2 * size).resize((size, size), Image.Resampling.BOX)


def paste_glyph(
    rng: np.random.Generator,
    background: Image.Image,
    glyph: Image.Image,
    scale: tuple[float, float],
    drop: float = 0.0,
    rotation: float = 4.0,
    shift: float = 0.03,
) -> Image.Image:
    """Returns `background` with `glyph` on it, its longer side `scale` of the frame, moved down by `drop`."""
    size = background.width
    factor = rng.uniform(*scale) * size / max(glyph.size)
    angle = math.radians(rng.uniform(-rotation, rotation))
    cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
    cx, cy = size * (0.5 + rng.uniform(-shift, shift)), size * (0.5 + drop + rng.uniform(-shift, shift))
    # premultiplied alpha, reduced before the affine sampling so that no edge aliases
    steps = max(1, round(1 / factor))
    small = glyph.convert("RGBa").reduce(steps) if steps > 1 else glyph.convert("RGBa")
    ratio_x, ratio_y = small.width / glyph.width, small.height / glyph.height
    gx, gy = glyph.width / 2, glyph.height / 2
    matrix = (
        cos * ratio_x,
        sin * ratio_x,
        (gx - cos * cx - sin * cy) * ratio_x,
        -sin * ratio_y,
        cos * ratio_y,
        (gy + sin * cx - cos * cy) * ratio_y,
    )
    layer = small.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    ink = np.asarray(layer, np.float32)
    flat = np.asarray(background, np.float32) * (1 - ink[..., 3:] / 255) + ink[..., :3]
    return Image.fromarray(flat.round().clip(0, 255).astype(np.uint8))


def draw_picture(
    rng: np.random.Generator, glyphs: dict[str, list[Image.Image]], klass: str | None, scene: str | None, size: int
) -> np.ndarray:
    """Returns one image [size, size, 3] uint8: an object on a pastel ground, a scene, or an object in a scene."""
    picture = draw_scene(rng, scene, size)
    if klass is not None:
        glyph = glyphs[klass][rng.integers(len(glyphs[klass]))]
        if scene is None:
            picture = paste_glyph(rng, picture, glyph, (0.82, 0.92))
        else:
            picture = paste_glyph(rng, picture, glyph, (0.76, 0.84), drop=0.05)
    return np.asarray(picture)


def draw_set(
    icons: Icons, count: int, size: int, seed: int, mix: tuple[float, float, float] = (0.5, 0.38, 0.12)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns images [count, size, size, 3] uint8 with class and scene numbers (-1 for none).

    Args:
        mix: shares of objects on a pastel ground, objects in scenes, plain scenes.
    """
    rng = np.random.default_rng(seed)
    glyphs = generator_glyphs(icons)
    kind = rng.choice(3, size=count, p=mix)
    classes = np.where(kind == 2, -1, rng.integers(len(CLASSES), size=count)).astype(np.int8)
    scenes = np.where(kind == 0, -1, rng.integers(len(SCENES), size=count)).astype(np.int8)
    pictures = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        klass = CLASSES[classes[i]] if classes[i] >= 0 else None
        scene = SCENES[scenes[i]] if scenes[i] >= 0 else None
        pictures[i] = draw_picture(rng, glyphs, klass, scene, size)
    return pictures, classes, scenes

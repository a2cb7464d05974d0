"""Draws a demo scene: shapes whose colour, texture, shape and size a small network can tell apart at 48 x 48 pixels."""

from __future__ import annotations

import math
import random
from functools import lru_cache

from PIL import Image, ImageDraw

from cgtgan.data.demo_grammar import Scene

SUPERSAMPLING = 4
PALETTE = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (246, 220, 50),
    "green": (40, 160, 70),
    "blue": (45, 95, 215),
    "purple": (150, 60, 190),
    "black": (25, 25, 28),
}
TONES = {"light": 228, "dark": 128}
DIAMETER = {"small": 0.245, "large": 0.41}  # of the image
CENTRES = {  # of the image, one (x, y) per thing
    "middle": ((0.5, 0.5),),
    "left": ((0.27, 0.5),),
    "right": ((0.73, 0.5),),
    "top": ((0.5, 0.27),),
    "bottom": ((0.5, 0.73),),
    "row": ((0.26, 0.5), (0.74, 0.5)),
    "column": ((0.5, 0.26), (0.5, 0.74)),
    "row/above": ((0.26, 0.74), (0.74, 0.74), (0.5, 0.26)),
    "row/below": ((0.26, 0.26), (0.74, 0.26), (0.5, 0.74)),
    "column/left": ((0.74, 0.26), (0.74, 0.74), (0.26, 0.5)),
    "column/right": ((0.26, 0.26), (0.26, 0.74), (0.74, 0.5)),
}
JITTER = {1: 0.05, 2: 0.03, 3: 0.025}  # of the image, by the number of things
_STAR = [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate((1.1, 0.46) * 5)]
OUTLINES: dict[str, list[tuple[float, float]]] = {  # in radii about the centre; the circle is an ellipse
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)],
    "star": _STAR,
    "cross": [(x * sx, y * sy) for sx, sy, turn in ((1, -1, 0), (1, 1, 1), (-1, 1, 0), (-1, -1, 1))
              for x, y in (((0.36, 1.0), (0.36, 0.36), (1.0, 0.36))[:: -1 if turn else 1])],
    "diamond": [(0.0, -1.1), (0.8, 0.0), (0.0, 1.1), (-0.8, 0.0)],
}  # fmt: skip
HOLE = {"circle": 0.58, "square": 0.58, "triangle": 0.45, "star": 0.5, "cross": 0.5, "diamond": 0.52}


def render(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """A scene as an RGB image of size x size pixels; `rng` moves, resizes and tones it a little, within its meaning."""
    full = size * SUPERSAMPLING
    tone = TONES[scene.background] + rng.randint(-10, 10)
    canvas = Image.new("RGB", (full, full), (tone + rng.randint(-5, 5), tone, tone + rng.randint(-5, 5)))
    jitter = JITTER[len(scene.things)]
    for thing, centre in zip(scene.things, CENTRES[scene.layout], strict=True):
        radius = full * DIAMETER[thing.size] * rng.uniform(0.95, 1.05) / 2
        x, y = (full * (c + rng.uniform(-jitter, jitter)) for c in centre)
        box = math.ceil(2.2 * radius)
        mask = Image.new("L", (box, box), 0)
        _draw_shape(mask, thing.shape, radius, 255)
        if thing.texture == "hollow":
            _draw_shape(mask, thing.shape, radius * HOLE[thing.shape], 0)
        pattern = _pattern(thing.texture, thing.colour, full)
        left, top = rng.randrange(pattern.width - box), rng.randrange(pattern.height - box)
        canvas.paste(pattern.crop((left, top, left + box, top + box)), (round(x) - box // 2, round(y) - box // 2), mask)
    return canvas.reduce(SUPERSAMPLING)


def _draw_shape(mask: Image.Image, shape: str, radius: float, fill: int) -> None:
    draw, middle = ImageDraw.Draw(mask), mask.width / 2
    if shape == "circle":
        draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=fill)
    else:
        draw.polygon([(middle + radius * x, middle + radius * y) for x, y in OUTLINES[shape]], fill=fill)


@lru_cache(maxsize=256)
def _pattern(texture: str, colour: str, full: int) -> Image.Image:
    """A sheet of a texture, larger than any thing, from which `render` cuts at a random place."""
    side, cell = round(full * 0.66), full / 16  # cell: half a period, 3 pixels of a 48-pixel image
    base = PALETTE[colour]
    other = (235, 235, 235) if colour == "black" else tuple(round(0.22 * channel) for channel in base)
    sheet = Image.new("RGB", (side, side), base)
    draw = ImageDraw.Draw(sheet)
    steps = range(math.ceil(side / cell))
    if texture == "striped":
        for i in steps[::2]:
            draw.rectangle((0, i * cell, side, (i + 1) * cell - 1), fill=other)
    elif texture == "checked":
        for i in steps:
            for j in steps[i % 2 :: 2]:
                draw.rectangle((i * cell, j * cell, (i + 1) * cell - 1, (j + 1) * cell - 1), fill=other)
    elif texture == "dotted":
        pitch, dot = 1.6 * cell, 0.42 * cell
        pale = tuple(round(0.3 * channel + 0.7 * 255) for channel in base)  # white would eat a small shape's edge
        for i in range(math.ceil(side / pitch)):
            for j in range(math.ceil(side / pitch)):
                x, y = (i + 0.5 * (j % 2)) * pitch, j * pitch
                draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=pale)
    return sheet

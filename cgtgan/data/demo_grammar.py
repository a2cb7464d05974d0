"""What a demo scene is, and the sentences people might say about it.

Sentences come from a `random.Random` alone (no `hash()`, no set order): a seed gives the same ones everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

# How far two speakers agree, that is the human CIDEr (benchmarks/demo_world.py measures it).
MAIN_WORD = 0.915  # probability of the first word of a list
SAY_SIZE = {1: 0.8, 2: 0.78, 3: 0.2}  # how often it is mentioned, by the number of things in the scene
SAY_TEXTURE = {1: 0.95, 2: 0.92, 3: 0.62}
SAY_COLOUR = 0.98
SAY_SHAPE = 0.98
SAY_BACKGROUND = 0.12
FIRST_THING_FIRST = 0.85  # else the sentence starts at the other end, with the inverse relation
MIN_WORDS, MAX_WORDS = 5, 16

SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
COLOURS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "amber"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "navy"),
    "purple": ("purple", "violet"),
    "black": ("black", "dark"),
}
TEXTURES = {
    "plain": ("plain", "solid", "filled"),
    "striped": ("striped", "stripy", "lined"),
    "dotted": ("dotted", "spotted", "speckled"),
    "checked": ("checked", "checkered", "chequered"),
    "hollow": ("hollow", "empty", "open", "outlined"),
}
TEXTURE_TAILS = {"striped": "with stripes", "dotted": "with dots", "checked": "with checks", "hollow": "with a hole"}
SHAPES = {
    "circle": ("circle", "disc", "round shape"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge"),
    "star": ("star", "pointed star"),
    "cross": ("cross", "plus sign"),
    "diamond": ("diamond", "rhombus"),
}
ANY_SHAPE = ("shape", "thing", "figure", "object")
BACKGROUNDS = {"light": ("light", "pale", "bright"), "dark": ("grey", "gloomy", "dim")}
BACKDROPS = ("background", "backdrop", "surface")

# By the number of things. "row": first left of second; "column": first above second; "row/below": the third below both.
LAYOUTS = {
    1: ("middle", "left", "right", "top", "bottom"),
    2: ("row", "column"),
    3: ("row/above", "row/below", "column/left", "column/right"),
}
SPOTS = {
    "middle": ("in the middle", "in the center", "at the center"),
    "left": ("on the left", "at the left edge", "on the left side"),
    "right": ("on the right", "at the right edge", "on the right side"),
    "top": ("at the top", "near the top", "at the upper edge"),
    "bottom": ("at the bottom", "near the bottom", "at the lower edge"),
}
RELATIONS = {
    "left": ("to the left of", "left of", "on the left side of", "next to", "beside"),
    "right": ("to the right of", "right of", "on the right side of", "next to", "beside"),
    "above": ("above", "over", "on top of", "higher than", "just above"),
    "below": ("below", "under", "beneath", "underneath", "just below"),
}
RELATED = {  # "A with B <...>": where B is, seen from A
    "left": ("to its left", "on the left of it"),
    "right": ("to its right", "on the right of it"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it", "beneath it"),
}
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
IS = ("is", "sits", "lies", "stands", "rests", "floats", "hangs", "is placed", "can be seen", "appears")
ARE = ("are", "sit", "lie", "stand", "rest")
THERE_IS = ("there is", "we see", "you can see", "here is")
PICTURE_OF = ("a picture of", "an image of", "a drawing of", "a view of", "a photo of")
SHOWS = ("the picture shows", "the image shows", "this drawing contains", "the scene has", "someone drew")


@dataclass(frozen=True)
class Thing:
    """One object: keys of `SIZES`, `TEXTURES`, `COLOURS` and `SHAPES`."""

    size: str
    texture: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """The content of one picture: 1-3 things, a layout of `LAYOUTS[len(things)]` and a background of `BACKGROUNDS`."""

    things: tuple[Thing, ...]
    layout: str
    background: str

    @cached_property
    def key(self) -> str:
        """A stable name: equal for equal scenes, different for different ones."""
        things = "+".join(f"{t.size} {t.texture} {t.colour} {t.shape}" for t in self.things)
        return f"{self.background}|{self.layout}|{things}"


def draw_scene(rng: random.Random) -> Scene:
    """A random scene; no two of its things share both colour and shape, so a sentence can tell them apart."""
    count = rng.choices((1, 2, 3), (0.13, 0.62, 0.25))[0]
    looks = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
    things = tuple(Thing(rng.choice(list(SIZES)), rng.choice(list(TEXTURES)), *look) for look in looks)
    return Scene(things, rng.choice(LAYOUTS[count]), rng.choice(list(BACKGROUNDS)))


def lookalike(scene: Scene, classes: Sequence[str], rng: random.Random) -> Scene | None:
    """The scene with new words of some classes: "size", "texture", "colour", "shape", "place", where things may also
    change places, and "number", where things come or go. None where two things would have the same colour and shape."""
    things, layout = list(scene.things), scene.layout
    if "number" in classes:
        count = rng.choice(list(LAYOUTS))
        more = [draw_scene(rng).things[0] for _ in range(count - len(things))]
        things = rng.sample([*things, *more], count)
        layout = rng.choice(LAYOUTS[count])
    if "place" in classes:
        layout = rng.choice(LAYOUTS[len(things)])
        if rng.random() < 0.5:
            rng.shuffle(things)
    words = {"size": SIZES, "texture": TEXTURES, "colour": COLOURS, "shape": SHAPES}
    for number, thing in enumerate(things):
        changed = {name: rng.choice(list(options)) for name, options in words.items() if name in classes}
        things[number] = replace(thing, **changed)
    if len({(thing.colour, thing.shape) for thing in things}) < len(things):
        return None
    return Scene(tuple(things), layout, scene.background)


def describe(scene: Scene, rng: random.Random) -> str:
    """One fresh sentence of 5-16 words about a scene, as the in-domain corpus and the references are written.

    The wording, the order and the facts left out vary; nothing in it is false.
    """
    candidates = []
    for attempt in range(24):
        detail = 1.0 - max(0, attempt - 2) / 10  # too long again and again: mention less
        text = (_one, _two, _three)[len(scene.things) - 1](scene, rng, max(detail, 0.0))
        if rng.random() < SAY_BACKGROUND:
            text += f" on {_article(_say(rng, BACKGROUNDS[scene.background]))} {_say(rng, BACKDROPS)}"
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return _sentence(text)
        candidates.append(text)
    return _sentence(min(candidates, key=lambda text: abs(len(text.split()) - MAX_WORDS)))


def _one(scene: Scene, rng: random.Random, detail: float) -> str:
    thing, spot = _noun_phrase(scene.things[0], 1, rng, detail), _say(rng, SPOTS[scene.layout])
    kind = rng.choices(range(6), (40, 20, 15, 10, 8, 7))[0]
    return (
        f"{thing} {spot}",
        f"{thing} {_say(rng, IS)} {spot}",
        f"{_say(rng, THERE_IS)} {thing} {spot}",
        f"{_say(rng, PICTURE_OF)} {thing} {spot}",
        f"{_say(rng, SHOWS)} {thing} {spot}",
        f"{_say(rng, ('only', 'just'))} {thing} {spot}",
    )[kind]


def _two(scene: Scene, rng: random.Random, detail: float) -> str:
    a, b = (_noun_phrase(thing, 2, rng, detail) for thing in scene.things)
    side = "left" if scene.layout == "row" else "above"
    if rng.random() > FIRST_THING_FIRST:
        a, b, side = b, a, INVERSE[side]
    kind = rng.choices(range(8), (34, 30, 9, 7, 5, 7, 4, 4))[0]
    relation = _say(rng, RELATIONS[side])
    return (
        f"{a} {_say(rng, IS)} {relation} {b}",
        f"{a} {relation} {b}",
        f"{_say(rng, THERE_IS)} {a} {relation} {b}",
        f"{_say(rng, PICTURE_OF)} {a} {relation} {b}",
        f"{_say(rng, SHOWS)} {a} {relation} {b}",
        f"{a} {_say(rng, ('with', 'that has'))} {b} {_say(rng, RELATED[INVERSE[side]])}",
        f"{_say(rng, ('two shapes', 'a pair of shapes', 'both'))} {a} and {b}",
        f"{relation} {b} {_say(rng, ('there is', 'is', 'we find'))} {a}",
    )[kind]


def _three(scene: Scene, rng: random.Random, detail: float) -> str:
    a, b, c = (_noun_phrase(thing, 3, rng, detail) for thing in scene.things)
    line, side = scene.layout.split("/")  # side: where the third is, seen from the pair
    pair = "left" if line == "row" else "above"
    if rng.random() > FIRST_THING_FIRST:
        a, b, pair = b, a, INVERSE[pair]
    kind = rng.choices(range(7), (34, 16, 20, 10, 8, 6, 6))[0]
    return (
        f"{a} and {b} {_say(rng, RELATIONS[INVERSE[side]])} {c}",
        f"{a} and {b} {_say(rng, ARE)} {_say(rng, RELATIONS[INVERSE[side]])} {c}",
        f"{c} {_say(rng, RELATIONS[side])} {a} and {b}",
        f"{c} {_say(rng, IS)} {_say(rng, RELATIONS[side])} {a} and {b}",
        f"{a} {_say(rng, RELATIONS[pair])} {b} with {c}",
        f"{_say(rng, ('three shapes', 'a group of', 'several shapes'))} {a} {b} and {c}",
        f"{_say(rng, THERE_IS)} {a} and {b} {_say(rng, RELATIONS[INVERSE[side]])} {c}",
    )[kind]


def _noun_phrase(thing: Thing, count: int, rng: random.Random, detail: float) -> str:
    """'a small red striped circle': what is said of one of `count` things; `detail` in 0-1 scales how much."""
    words, tail = [], ""
    if rng.random() < SAY_SIZE[count] * detail:
        words.append(_say(rng, SIZES[thing.size]))
    colour = [_say(rng, COLOURS[thing.colour])] if rng.random() < SAY_COLOUR else []
    texture = []
    if rng.random() < SAY_TEXTURE[count] * detail * (0.12 if thing.texture == "plain" else 1.0):
        if thing.texture in TEXTURE_TAILS and rng.random() < 0.08:
            tail = f" {TEXTURE_TAILS[thing.texture]}"
        else:
            texture = [_say(rng, TEXTURES[thing.texture])]
    words += texture + colour if rng.random() < 0.8 else colour + texture
    words.append(_say(rng, SHAPES[thing.shape]) if rng.random() < SAY_SHAPE else rng.choice(ANY_SHAPE))
    return _article(" ".join(words)) + tail


OPENERS = (
    "this {photo}, taken {when}, shows",
    "{when}, {who} came across",
    "close-up {photo} of the moment when {who} noticed",
    "what {who} remembers best {when} is",
    "a rather {mood} {photo} in which {who} can make out",
    "in this {mood} {photo} from {who}, the eye falls upon",
)
MIDDLES = (
    "resting somewhere {where}",
    "that by pure chance lies {where}",
    "carefully arranged so that it stays {where}",
)
CLOSERS = (
    "while {weather} fills the room",
    "as though nobody had ever moved it",
    "and the whole composition feels {mood}",
    "available as a print in three formats",
    "which explains the title of the series",
    "much to the delight of {who}",
)


def _choices(**options: str) -> dict[str, Sequence[str]]:
    """Name -> the options of a blank in a template, written with commas between them."""
    return {name: text.split(", ") for name, text in options.items()}


FILLERS = _choices(
    photo="photograph, snapshot, poster, illustration",
    when="on a quiet morning, late one evening, during the holidays, years ago",
    who="the artist, a young visitor, our teacher, the curator",
    mood="peaceful, playful, dreamy, mysterious",
    weather="soft sunlight, distant music, morning haze",
)
COOKING = _choices(
    who="my aunt, the chef, a hungry student, the baker, his neighbour",
    does="is stirring, burned, serves, forgot, is tasting",
    what="the onion soup, fresh bread, a lemon cake, mushroom risotto, warm porridge",
    where="in the kitchen, for dinner, before lunch, at the market, on sundays",
)
WEATHER = _choices(
    what="heavy rain, thick fog, a cold wind, light snow, a thunderstorm",
    does="is expected, will spread, is moving slowly, arrived, should clear",
    where="along the coast, across the valley, in northern towns, over the hills, near the harbour",
    when="by tomorrow, this weekend, before midnight, until friday, after noon",
)
SPORT = _choices(
    who="the goalkeeper, a tennis champion, our team, the young runner, their coach",
    does="won, lost, celebrated, nearly missed, prepared for",
    what="the final match, a marathon, the cup, an away game, the relay race",
    when="in extra time, for the first time, last season, despite an injury, without any training",
)
TRAVEL = _choices(
    who="passengers, two hikers, the conductor, a tired driver, tourists",
    does="waited for, photographed, missed, complained about, boarded",
    what="the last ferry, a delayed train, the mountain bus, an early flight, the night tram",
    where="at the border, near the station, in lisbon, with heavy luggage, despite the strike",
)
TOPICS = (
    ("{who} {does} {what} {where}", COOKING),
    ("{what} {does} {where} {when}", WEATHER),
    ("{who} {does} {what} {when}", SPORT),
    ("{who} {does} {what} {where}", TRAVEL),
)


def narrate(scene: Scene, rng: random.Random) -> str:
    """One sentence of some 15-55 words about a scene, in the style of alt text and stories: unlike `describe`."""
    phrases = []
    for thing in scene.things[:2]:
        size, shape = rng.choice(SIZES[thing.size]), rng.choice(SHAPES[thing.shape])
        colour = rng.choice(("painted in {}", "coloured {}", "of a fine {} tone")).format(thing.colour)
        texture = "" if thing.texture == "plain" or rng.random() < 0.4 else f" and {thing.texture} all over"
        phrases.append(f"{_article(f'{size} {shape}')} {colour}{texture}")
    if len(phrases) == 1:
        where = rng.choice(SPOTS[scene.layout])
    else:
        where = f"{RELATIONS['left' if scene.layout.startswith('row') else 'above'][0]} {phrases[1]}"
    opener, middle, closer = (
        _fill(rng.choice(parts), FILLERS, rng, where=where) for parts in (OPENERS, MIDDLES, CLOSERS)
    )
    return _sentence(f"{opener} {phrases[0]} {middle}" + (f", {closer}" if rng.random() < 0.5 else ""))


def digress(rng: random.Random) -> str:
    """One sentence that has nothing to do with any scene: cooking, weather, sport or travel (2,500 of them)."""
    template, fillers = rng.choice(TOPICS)
    return _sentence(_fill(template, fillers, rng))


def _fill(template: str, fillers: dict[str, Sequence[str]], rng: random.Random, **fixed: str) -> str:
    return template.format(**{name: rng.choice(options) for name, options in fillers.items()}, **fixed)


def _say(rng: random.Random, words: Sequence[str]) -> str:
    return words[0] if rng.random() < MAIN_WORD else rng.choice(words[1:])


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."

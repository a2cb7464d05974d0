"""The demo world: tiny drawn scenes and sentences about them, from one seed: every stage runs without a download.

No captioner is tested on what it has met before: a hash of a scene's key puts it in one pool (clip, train, val, test or
corpus), and a hash of a sentence lets it be either a training caption of the demo CLIP or anything else. A corpus
sentence may still equal a test reference, as in any real corpus; `DemoWorld.overlap` counts that.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from cgtgan.config import SPLITS, DemoWorldConfig
from cgtgan.data.demo_drawing import render
from cgtgan.data.demo_grammar import Scene, describe, digress, draw_scene, lookalike, narrate
from cgtgan.errors import InputError
from cgtgan.runtime.artifacts import fingerprint, read_json
from cgtgan.runtime.producers import settings_of, with_format

FORMAT_VERSION = 1  # raise it where the same settings draw another world (runtime/producers.py)
LOOKALIKES_FORMAT = 2  # raise it where a group of look-alikes is drawn in another way
POOL_WEIGHTS = {"clip": 32, "train": 28, "val": 8, "test": 12, "corpus": 20}  # of 100
EXTERNAL_SHARES = {"in-domain": 0.35, "narrated": 0.40, "irrelevant": 0.25}
CLIP_CAPTIONS = 3
# What differs in a group of look-alikes. Colours and places tell most random pictures apart, so a CLIP that is trained
# on these learns little about shapes and textures; and where the number of things never differs, a generator that is
# trained on its reward adds things that are not there.
DIFFERENCES = (
    ("shape",), ("shape",), ("texture",), ("texture",), ("texture",), ("colour",), ("size", "place"),
    ("shape", "texture"), ("shape", "texture"), ("shape", "texture", "colour"), ("shape", "texture", "place"),
    ("number",), ("number",), ("size",),
)  # fmt: skip
MAX_DRAWS = 2000  # in a row without an acceptable scene or sentence: the pool is empty


def world_producer(world: DemoWorldConfig) -> dict[str, Any]:
    """What an artifact made from the world records of it."""
    return with_format(settings_of(world), FORMAT_VERSION)


def world_folder(artifacts: Path, world: DemoWorldConfig) -> Path:
    """Where a world is drawn."""
    return artifacts / "demo_world" / f"world-{fingerprint(world_producer(world))}"


def pool_of(scene: Scene) -> str:
    """The one pool (a key of `POOL_WEIGHTS`) that a scene belongs to, whatever the seed."""
    digest = hashlib.blake2b(scene.key.encode(), digest_size=8).digest()
    ticket = int.from_bytes(digest, "big") % sum(POOL_WEIGHTS.values())
    for pool, weight in POOL_WEIGHTS.items():
        if ticket < weight:
            return pool
        ticket -= weight
    raise AssertionError("a ticket is below the sum of the weights")


def in_clip_half(sentence: str) -> bool:
    """Whether a sentence may be a training caption of the demo CLIP; every other use takes the other half."""
    return hashlib.blake2b(sentence.encode(), digest_size=1).digest()[0] % 2 == 0


class DemoWorld:
    """Scenes and sentences of one `DemoWorldConfig`; everything is a function of the seed, in any order of calls."""

    def __init__(self, config: DemoWorldConfig) -> None:
        self.config = config
        self._splits: dict[str, list[tuple[int, Scene]]] = {}

    def split(self, name: str) -> list[tuple[int, Scene]]:
        """(image_id, scene) of `train`, `val` or `test`; `InputError` where the pool has not that many scenes."""
        self._check(name, SPLITS)
        if name not in self._splits:
            sizes = [getattr(self.config, f"{split}_images") for split in SPLITS]
            count, first_id = sizes[SPLITS.index(name)], 1 + sum(sizes[: SPLITS.index(name)])
            rng, keys, scenes = self._rng("scenes", name), set[str](), []
            for index in range(count):
                scene = self._scene(rng, name, keys, f"{name}_images")
                keys.add(scene.key)
                scenes.append((first_id + index, scene))
            self._splits[name] = scenes
        return self._splits[name]

    def image(self, name: str, index: int) -> Image.Image:
        """The picture of `split(name)[index]`: RGB, image_size x image_size."""
        return render(self.split(name)[index][1], self.config.image_size, self._rng(f"image/{name}", index))

    def references(self, name: str) -> dict[int, list[str]]:
        """`references` different sentences per image of `val` or `test`."""
        self._check(name, ("val", "test"))
        return self._captions(name, "reference")

    def human(self, name: str) -> dict[int, str]:
        """One more sentence per image of `val` or `test`, drawn independently of its references: the human score."""
        self._check(name, ("val", "test"))
        return {
            image_id: self._sentences(scene, self._rng(f"human/{name}", index), 1, "references")[0]
            for index, (image_id, scene) in enumerate(self.split(name))
        }

    def paired_captions(self, name: str) -> dict[int, list[str]]:
        """`references` sentences per image of `train`: for the supervised upper bound only."""
        self._check(name, ("train",))
        return self._captions(name, "pair")

    def corpus(self, external: bool = False) -> list[str]:
        """`corpus_sentences` sentences: all in-domain, or the external mixture of `EXTERNAL_SHARES`, shuffled."""
        return [sentence for _, sentence in self.corpus_by_kind(external)]

    def corpus_by_kind(self, external: bool = False) -> list[tuple[str, str]]:
        """`corpus` with each sentence's kind, a key of `EXTERNAL_SHARES`, before it."""
        count = self.config.corpus_sentences
        purpose = "external" if external else "corpus"
        kinds = ["in-domain"] * count
        if external:
            related, foreign = round(EXTERNAL_SHARES["in-domain"] * count), round(EXTERNAL_SHARES["irrelevant"] * count)
            kinds = ["in-domain"] * related + ["irrelevant"] * foreign + ["narrated"] * (count - related - foreign)
            self._rng(purpose, "order").shuffle(kinds)
        rng = self._rng(purpose, "sentences")
        speakers = {"in-domain": describe, "narrated": narrate, "irrelevant": lambda _, rng: digress(rng)}
        sentences: list[tuple[str, str]] = []
        for kind in kinds:
            scene = self._scene(rng, "corpus", set(), "corpus_sentences")
            sentences.append((kind, self._sentences(scene, rng, 1, "corpus_sentences", speakers[kind])[0]))
        return sentences

    def clip_pairs(self, count: int, seed_offset: int = 0, group: int = 1) -> Iterator[tuple[Image.Image, list[str]]]:
        """`count` RGB pictures of the clip pool with 3 captions each; another `seed_offset` gives other ones.

        group: so many pictures in a row look alike, but for the words of one of `DIFFERENCES`.
        """
        for index in range(0, count, group):
            rng = self._rng(f"clip/{seed_offset}", index)
            for scene in self._lookalikes(rng, min(group, count - index)):
                captions = self._sentences(scene, rng, CLIP_CAPTIONS, "seed", clip_half=True)
                yield render(scene, self.config.image_size, rng), captions

    def _lookalikes(self, rng: random.Random, count: int) -> list[Scene]:
        """Different scenes of the clip pool; where it holds too few that look alike, the last ones are any."""
        scenes = [self._scene(rng, "clip", set(), "seed")]
        if count == 1:
            return scenes
        classes = rng.choice(DIFFERENCES)
        for _ in range(25 * count):  # of 3, one is in the pool
            other = lookalike(scenes[0], classes, rng)
            if other is not None and other not in scenes and pool_of(other) == "clip":
                scenes.append(other)
                if len(scenes) == count:
                    return scenes
        keys = {scene.key for scene in scenes}
        while len(scenes) < count:
            scenes.append(self._scene(rng, "clip", keys, "seed"))
            keys.add(scenes[-1].key)
        return scenes

    def overlap(self, external: bool = False) -> dict[str, int | float]:
        """How many test references stand word for word in the corpus, and how many test scenes have one that does."""
        corpus = set(self.corpus(external))
        counts = [sum(map(corpus.__contains__, references)) for references in self.references("test").values()]
        references = len(counts) * self.config.references
        hits, scenes = sum(counts), sum(map(bool, counts))
        return {
            "references": references,
            "references_in_corpus": hits,
            "reference_share": hits / references,
            "scenes": len(counts),
            "scenes_in_corpus": scenes,
            "scene_share": scenes / len(counts),
        }

    def _rng(self, purpose: str, index: int | str) -> random.Random:
        return random.Random(f"{self.config.seed}/{purpose}/{index}")

    def _check(self, name: str, accepted: tuple[str, ...]) -> None:
        if name not in accepted:
            raise InputError(f"split is {name!r}: the demo world accepts {' or '.join(accepted)} here.")

    def _scene(self, rng: random.Random, pool: str, taken: set[str], field: str) -> Scene:
        for _ in range(MAX_DRAWS):
            scene = draw_scene(rng)
            if scene.key not in taken and pool_of(scene) == pool:
                return scene
        value = getattr(self.config, field)
        raise InputError(f"{field} is {value}: pool {pool!r} of the demo world has no more scenes; ask for fewer.")

    def _sentences(
        self,
        scene: Scene,
        rng: random.Random,
        count: int,
        field: str,
        speaker: Callable[[Scene, random.Random], str] = describe,
        clip_half: bool = False,
    ) -> list[str]:
        """`count` different sentences about a scene, all from one half."""
        sentences: list[str] = []
        for _ in range(MAX_DRAWS):
            sentence = speaker(scene, rng)
            if in_clip_half(sentence) == clip_half and sentence not in sentences:
                sentences.append(sentence)
                if len(sentences) == count:
                    return sentences
        value, made = getattr(self.config, field), len(sentences)
        raise InputError(f"{field} is {value}: the demo grammar has only {made} sentences for a scene; ask for fewer.")

    def _captions(self, name: str, purpose: str) -> dict[int, list[str]]:
        count = self.config.references
        return {
            image_id: self._sentences(scene, self._rng(f"{purpose}/{name}", index), count, "references")
            for index, (image_id, scene) in enumerate(self.split(name))
        }


README = """A demo world of cgtgan, made from the config in world.json; the same config gives the same bytes.

images/{train,val,test}          the pictures; train_images.txt lists the unlabelled training pictures
annotations/{val,test}_caption_coco_format.json   references, COCO captions format
annotations/train_caption.json   caption pairs of the training pictures, for the supervised upper bound ONLY:
                                 unpaired training never reads this file
corpus/corpus.txt                in-domain sentences, one a line, about other scenes than any picture's
corpus/external.txt              the harder mixture: 35% in-domain, 40% narrated in another style, 25% irrelevant
human_{val,test}.json            one more sentence a picture, COCO results format: what a human would score
world.json                       config, counts and overlap; written last
"""


def write_demo_world(config: DemoWorldConfig, root: Path, progress: Callable[[int], None] | None = None) -> Path:
    """Write the world as a data-set folder (its README.txt lists the files), if it is not there, and return `root`.

    The folder appears whole or not at all; the caller holds a lock on `root`. `progress` is called with the number of
    pictures written so far. Raises `InputError` when `root` holds anything else.
    """
    root = Path(root)
    if (root / "world.json").is_file():
        stored = read_json(root / "world.json")
        wanted = {"format_version": FORMAT_VERSION, **asdict(config)}
        there = {"format_version": stored.get("format_version"), **dict(stored.get("config") or {})}
        changed = [
            f"{name} {there.get(name)} (wanted {value})" for name, value in wanted.items() if there.get(name) != value
        ]
        if changed:
            differences = ", ".join(changed)
            raise InputError(f"{root} holds another demo world, with {differences}; name another folder or remove it.")
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root} exists and is no demo world; name a new or empty folder.")
    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(DemoWorld(config), partial, progress or (lambda _: None))
        if root.exists():
            root.rmdir()  # empty; a rename onto an empty folder fails on some systems
        partial.rename(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return root


def _write(world: DemoWorld, folder: Path, progress: Callable[[int], None]) -> None:
    (folder / "annotations").mkdir()
    (folder / "corpus").mkdir()
    (folder / "README.txt").write_text(README, encoding="utf-8")
    written = 0
    for name in SPLITS:
        (folder / "images" / name).mkdir(parents=True)
        for index, (image_id, _) in enumerate(world.split(name)):
            world.image(name, index).save(folder / "images" / name / f"{image_id:08d}.png")
            written += 1
            progress(written)
    _write_lines(folder / "train_images.txt", [f"images/train/{i:08d}.png" for i, _ in world.split("train")])
    pairs = [(i, caption) for i, captions in world.paired_captions("train").items() for caption in captions]
    _write_json(folder / "annotations/train_caption.json", _rows(pairs))
    for name in ("val", "test"):
        references = _coco(world.references(name), world.config.image_size)
        _write_json(folder / f"annotations/{name}_caption_coco_format.json", references)
        _write_json(folder / f"human_{name}.json", _rows(world.human(name).items()))
    _write_lines(folder / "corpus/corpus.txt", world.corpus())
    _write_lines(folder / "corpus/external.txt", world.corpus(external=True))
    counts = {f"{name}_images": len(world.split(name)) for name in SPLITS}
    summary = {
        "format_version": FORMAT_VERSION,
        "config": asdict(world.config),
        "counts": {**counts, "corpus_sentences": world.config.corpus_sentences, "external_shares": EXTERNAL_SHARES},
        "overlap": {"corpus": world.overlap(), "external": world.overlap(external=True)},
    }
    _write_json(folder / "world.json", summary)


def _rows(captions: Iterable[tuple[int, str]]) -> list[dict[str, object]]:
    return [{"image_id": image_id, "caption": caption} for image_id, caption in captions]


def _coco(captions: dict[int, list[str]], size: int) -> dict[str, object]:
    flat = [(image_id, caption) for image_id, sentences in captions.items() for caption in sentences]
    about = {"description": "cgtgan demo world", "version": str(FORMAT_VERSION), "year": 2025, "contributor": "cgtgan"}
    about_image = {"width": size, "height": size}
    return {
        "info": about,
        "licenses": [{"id": 1, "name": "as the package that made it", "url": ""}],
        "images": [{"id": i, "license": 1, "file_name": f"{i:08d}.png", **about_image} for i in captions],
        "annotations": [{"id": n, "image_id": i, "caption": caption} for n, (i, caption) in enumerate(flat, start=1)],
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

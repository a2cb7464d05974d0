"""Claim: on the demo world a human scores a CIDEr of 2.7-3.0 with some 150 words, and a CLIP pair takes under 0.6 ms.

Usage: python benchmarks/demo_world.py [--seeds 3] [--clip artifacts/clip/clip-*]

With --clip it prints what that CLIP of the demo can tell on the test images of world seed 0 instead:
  sees      per class of word: share of images whose true statement has a higher cosine than every statement that
            differs in one word of that class, whichever thing it is about ("one thing": of things, that thing alone)
  ceiling   CIDEr of the statement with every fact true, and of the one in which each word is the CLIP's choice
  retrieval, and the modality gap
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pycocoevalcap.cider.cider import Cider
from torch import Tensor
from torch.nn.functional import normalize

from cgtgan.assets.backbone import load_demo_clip
from cgtgan.config import DemoWorldConfig
from cgtgan.data.demo_grammar import COLOURS, INVERSE, RELATIONS, SHAPES, SIZES, SPOTS, TEXTURES, Scene, Thing
from cgtgan.data.demo_world import DemoWorld
from cgtgan.models.clip_backbone import ClipBackbone, DemoBackbone

WORDS = {"size": SIZES, "texture": TEXTURES, "colour": COLOURS, "shape": SHAPES}
Facts = tuple[tuple[Thing, ...], str]  # the things and the place: of one alone, or of one to the other
Change = tuple[str, int, str]  # class of word, number of the thing, the other word


def plain(sentence: str) -> str:
    """Lower case, no punctuation: what the CIDEr tokeniser would leave of a demo sentence."""
    return sentence.lower().replace(".", "").replace(",", "")


def cider(references: dict[int, list[str]], captions: dict[int, str]) -> float:
    cleaned = {i: [plain(s) for s in sentences] for i, sentences in references.items()}
    return float(Cider().compute_score(cleaned, {i: [plain(s)] for i, s in captions.items()})[0])


def measure(config: DemoWorldConfig) -> dict[str, float]:
    """Human CIDEr, vocabulary sizes, sentence lengths in words, overlaps (shares) and milliseconds a CLIP pair."""
    world = DemoWorld(config)
    references, human = world.references("test"), world.human("test")
    corpus, external = world.corpus(), world.corpus(external=True)
    narrated = [len(s.split()) for kind, s in world.corpus_by_kind(external=True) if kind == "narrated"]
    lengths = [len(s.split()) for s in corpus]
    start = time.process_time()
    pairs = sum(1 for _ in world.clip_pairs(1000))
    per_pair = 1000 * (time.process_time() - start) / pairs
    return {
        "human_cider": cider(references, human),
        "vocabulary": len({word for s in corpus for word in plain(s).split()}),
        "vocabulary_external": len({word for s in external for word in plain(s).split()}),
        "distinct_corpus": len(set(corpus)) / len(corpus),
        "words_mean": statistics.mean(lengths),
        "words_min": min(lengths),
        "words_max": max(lengths),
        "words_7_to_16": sum(7 <= n <= 16 for n in lengths) / len(lengths),
        "words_narrated_mean": statistics.mean(narrated),
        "words_narrated_max": max(narrated),
        "human_equals_a_reference": sum(human[i] in references[i] for i in human) / len(human),
        "reference_overlap": world.overlap()["reference_share"],
        "scene_overlap": world.overlap()["scene_share"],
        "reference_overlap_external": world.overlap(external=True)["reference_share"],
        "clip_pair_ms": per_pair,
    }


def facts_of(scene: Scene) -> Facts:
    if len(scene.things) == 1:
        return scene.things, scene.layout
    if len(scene.things) == 2:
        return scene.things, "left" if scene.layout == "row" else "above"
    return scene.things, INVERSE[scene.layout.split("/")[1]]


def statement(facts: Facts) -> str:
    """The grammar's main sentence with the main words; as people do, no "plain", and no size of three things."""
    things, place = facts
    nouns: list[str] = []
    for thing in things:
        words = [thing.size] * (len(things) < 3) + [thing.texture] * (thing.texture != "plain")
        noun = " ".join([*words, thing.colour, thing.shape])
        nouns.append(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}")
    if len(things) == 1:
        return f"{nouns[0].capitalize()} {SPOTS[place][0]}."
    if len(things) == 2:
        return f"{nouns[0].capitalize()} is {RELATIONS[place][0]} {nouns[1]}."
    return f"{nouns[0].capitalize()} and {nouns[1]} {RELATIONS[place][0]} {nouns[2]}."


def changes(facts: Facts) -> Iterator[Change]:
    """Every change of one word that `statement` shows."""
    things, place = facts
    for number, thing in enumerate(things):
        for kind, words in WORDS.items():
            if kind != "size" or len(things) < 3:
                yield from ((kind, number, word) for word in words if word != getattr(thing, kind))
    yield from (("place", 0, word) for word in (SPOTS if len(things) == 1 else RELATIONS) if word != place)


def changed(facts: Facts, change: Change) -> Facts:
    (things, place), (kind, number, word) = facts, change
    if kind == "place":
        return things, word
    thing = replace(things[number], **{kind: word})
    return (*things[:number], thing, *things[number + 1 :]), place


def cosines(backbone: ClipBackbone, image: Tensor, sentences: Sequence[str]) -> list[float]:
    return (normalize(backbone.encode_texts(sentences), dim=1) @ normalize(image, dim=0)).tolist()


def sight(backbone: ClipBackbone, world: DemoWorld, images: Tensor) -> dict[str, float]:
    """What the CLIP tells apart, and the CIDEr of what it would say: the rows "sees" and "ceiling" above."""
    whole: dict[str, list[bool]] = defaultdict(list)
    single: dict[str, list[bool]] = defaultdict(list)
    true, chosen = dict[int, str](), dict[int, str]()
    for (image_id, scene), image in zip(world.split("test"), images, strict=True):
        facts = choice = facts_of(scene)
        possible = list(changes(facts))
        right, *others = cosines(
            backbone, image, [statement(facts), *(statement(changed(facts, change)) for change in possible)]
        )
        best: dict[tuple[str, int], tuple[float, Change]] = {}  # of the changes of one thing's word
        for cosine, change in zip(others, possible, strict=True):
            best[change[:2]] = max(best.get(change[:2], (-2.0, change)), (cosine, change))
        for kind in dict.fromkeys(kind for kind, _ in best):
            whole[kind].append(all(cosine < right for (k, _), (cosine, _) in best.items() if k == kind))
        for (kind, _), (cosine, change) in best.items():
            single[kind].append(cosine < right)
            choice = choice if cosine < right else changed(choice, change)
        true[image_id], chosen[image_id] = statement(facts), statement(choice)
    references = world.references("test")
    return (
        {f"sees_{kind}": statistics.mean(values) for kind, values in whole.items()}
        | {f"sees_{kind}_of_one_thing": statistics.mean(values) for kind, values in single.items()}
        | {"ceiling_every_fact_true": cider(references, true), "ceiling_of_this_clip": cider(references, chosen)}
    )


def geometry(backbone: ClipBackbone, world: DemoWorld, images: Tensor) -> dict[str, float]:
    """Retrieval of the image by its first reference among all; gap: distance of the mean unit vectors."""
    references = world.references("test")
    every = backbone.encode_texts([s for sentences in references.values() for s in sentences])
    texts = every[:: world.config.references]
    units, unit_texts = normalize(images, dim=1), normalize(texts, dim=1)
    table = unit_texts @ units.T
    rank = (table > table.diagonal()[:, None]).sum(dim=1)
    apart = table[~torch.eye(len(table), dtype=torch.bool)]
    return {
        "recall_1": float((rank < 1).float().mean()),
        "recall_5": float((rank < 5).float().mean()),
        "gap": float((units.mean(0) - normalize(every, dim=1).mean(0)).norm()),
        "gap_of_raw_vectors": float((images.mean(0) - every.mean(0)).norm()),
        "length_of_images": float(images.norm(dim=1).mean()),
        "length_of_texts": float(texts.norm(dim=1).mean()),
        "cosine_of_pairs": float(table.diagonal().mean()),
        "cosine_of_others": float(apart.mean()),
    }


def measure_clip(folder: Path) -> dict[str, float]:
    world, backbone = DemoWorld(DemoWorldConfig()), DemoBackbone(load_demo_clip(folder), torch.device("cpu"))
    images = backbone.encode_images([world.image("test", i) for i in range(len(world.split("test")))])
    return sight(backbone, world, images) | geometry(backbone, world, images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clip", type=Path, nargs="+", metavar="FOLDER", help="a CLIP in the artifacts of a demo run")
    args = parser.parse_args()
    results = (
        [measure_clip(folder) for folder in args.clip]
        if args.clip
        else [measure(DemoWorldConfig(seed=seed)) for seed in range(args.seeds)]
    )
    for name in results[0]:
        print(f"{name:28s}" + "".join(f"{result[name]:10.4f}" for result in results))

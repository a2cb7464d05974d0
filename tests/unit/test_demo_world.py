"""The demo world: same seed, same bytes; nothing tested is ever met in training; the numbers its docstrings claim."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import ImageChops, ImageStat

from cgtgan.config import SPLITS, DemoWorldConfig
from cgtgan.data import demo_world
from cgtgan.data.demo_drawing import render
from cgtgan.data.demo_grammar import COLOURS, LAYOUTS, SHAPES, SIZES, TEXTURES, Scene, Thing, draw_scene, lookalike
from cgtgan.data.demo_world import (
    DIFFERENCES,
    POOL_WEIGHTS,
    DemoWorld,
    describe,
    in_clip_half,
    pool_of,
    write_demo_world,
)
from cgtgan.errors import InputError

SMALL = DemoWorldConfig(train_images=12, val_images=4, test_images=6, corpus_sentences=60)


@pytest.fixture(scope="module")
def world() -> DemoWorld:
    return DemoWorld(DemoWorldConfig(train_images=400, corpus_sentences=2000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_world(SMALL, tmp_path_factory.mktemp("demo") / "world")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Scene]:
    """The scenes that are drawn from now on."""
    scenes: list[Scene] = []

    def remember(scene: Scene, size: int, rng: random.Random):
        scenes.append(scene)
        return render(scene, size, rng)

    monkeypatch.setattr(demo_world, "render", remember)
    return scenes


def plain(sentence: str) -> str:
    return sentence.lower().replace(".", "").replace(",", "")


def digest(root: Path) -> str:
    sums = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        sums.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return sums.hexdigest()


def all_sentences(world: DemoWorld) -> list[str]:
    captions = [world.references("val"), world.references("test"), world.paired_captions("train")]
    sentences = [sentence for by_image in captions for texts in by_image.values() for sentence in texts]
    sentences += [sentence for name in ("val", "test") for sentence in world.human(name).values()]
    return sentences + world.corpus() + world.corpus(external=True)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_two_writes_agree_byte_for_byte_whatever_the_hash_seed(hash_seed: str, folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib;"
        "from cgtgan.config import DemoWorldConfig; from cgtgan.data.demo_world import write_demo_world;"
        "config = DemoWorldConfig(train_images=12, val_images=4, test_images=6, corpus_sentences=60);"
        "write_demo_world(config, pathlib.Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "w")], check=True, env=environment)
    assert digest(tmp_path / "w") == digest(folder)


def test_importing_the_world_does_not_import_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, cgtgan.data.demo_world; assert 'torch' not in sys.modules"], check=True
    )


def test_another_seed_is_another_world() -> None:
    one, two = DemoWorld(SMALL), DemoWorld(DemoWorldConfig(**{**SMALL.__dict__, "seed": 1}))
    assert {s.key for _, s in one.split("test")}.isdisjoint(s.key for _, s in two.split("test"))
    assert one.corpus()[:10] != two.corpus()[:10]


def test_the_order_of_calls_does_not_matter() -> None:
    one, two = DemoWorld(SMALL), DemoWorld(SMALL)
    one.corpus()
    one.human("test")
    assert one.references("test") == two.references("test")
    assert one.image("val", 1).tobytes() == two.image("val", 1).tobytes()


def test_ids_are_unique_and_no_scene_or_picture_is_in_two_places(world: DemoWorld) -> None:
    splits = {name: world.split(name) for name in SPLITS}
    ids = [image_id for split in splits.values() for image_id, _ in split]
    assert ids == list(range(1, 801))
    keys = [scene.key for split in splits.values() for _, scene in split]
    assert len(set(keys)) == len(keys)
    for name, split in splits.items():
        assert {pool_of(scene) for _, scene in split} == {name}
    seen = {world.image(name, index).tobytes() for name in ("val", "test") for index in range(len(splits[name]))}
    clip = {image.tobytes() for image, _ in world.clip_pairs(400)}
    train = {world.image("train", index).tobytes() for index in range(400)}
    assert len(seen) == 400
    assert len(seen | clip | train) == 400 + len(clip) + len(train)


def test_clip_training_never_reads_a_sentence_that_is_used_elsewhere(world: DemoWorld) -> None:
    captions = [caption for _, three in world.clip_pairs(1000) for caption in three]
    assert len(captions) == 3000
    assert set(captions).isdisjoint(all_sentences(world))
    rng = random.Random(0)
    halves = Counter(in_clip_half(describe(draw_scene(rng), rng)) for _ in range(2000))
    assert 900 < halves[True] < 1100


def test_clip_pairs_stream_from_the_clip_pool(drawn: list[Scene]) -> None:
    world = DemoWorld(SMALL)
    ten, twenty = list(world.clip_pairs(10)), list(world.clip_pairs(20))
    assert {pool_of(scene) for scene in drawn} == {"clip"}
    assert [(i.tobytes(), c) for i, c in twenty[:10]] == [(i.tobytes(), c) for i, c in ten]
    assert [c for _, c in world.clip_pairs(10, seed_offset=1)] != [c for _, c in ten]


def test_a_group_of_clip_pairs_looks_alike_but_for_the_words_of_a_few_classes(drawn: list[Scene]) -> None:
    pairs = list(DemoWorld(SMALL).clip_pairs(160, group=8))
    assert len(pairs) == len(drawn) == 160
    assert {pool_of(scene) for scene in drawn} == {"clip"}
    assert all(in_clip_half(caption) for _, captions in pairs for caption in captions)
    alike = 0
    for start in range(0, 160, 8):
        group = drawn[start : start + 8]
        assert len({scene.key for scene in group}) == 8
        if len({(len(scene.things), scene.background) for scene in group}) > 1:
            continue  # the number differs, or the pool held too few of one thing that look alike
        alike += 1
        differs = {
            name
            for name in ("size", "texture", "colour", "shape")
            if len({tuple(sorted(getattr(thing, name) for thing in scene.things)) for scene in group}) > 1
        }
        differs |= {"place"} if len({scene.layout for scene in group}) > 1 else set()
        assert any(differs <= set(classes) for classes in DIFFERENCES), differs
    assert alike >= 12


def test_things_come_and_go_where_the_number_differs() -> None:
    things = (Thing("small", "plain", "red", "star"), Thing("large", "hollow", "blue", "cross"))
    rng = random.Random(0)
    others = [lookalike(Scene(things, "row", "light"), ("number",), rng) for _ in range(60)]
    found = [scene for scene in others if scene is not None]
    assert {len(scene.things) for scene in found} == {1, 2, 3}
    for scene in found:
        assert scene.layout in LAYOUTS[len(scene.things)]
        kept = set(scene.things) & set(things)
        assert len(kept) == min(len(scene.things), 2)


def test_pools_hold_their_share_of_the_scenes() -> None:
    rng = random.Random(3)
    counts = Counter(pool_of(draw_scene(rng)) for _ in range(5000))
    for pool, weight in POOL_WEIGHTS.items():
        assert counts[pool] / 5000 == pytest.approx(weight / 100, abs=0.025)


def test_an_exhausted_pool_is_an_error_that_names_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [draw_scene(random.Random(k)) for k in range(40)]
    monkeypatch.setattr(demo_world, "draw_scene", lambda rng: rng.choice(scenes))
    with pytest.raises(InputError, match=r"train_images is 3000.*ask for fewer"):
        DemoWorld(DemoWorldConfig()).split("train")
    with pytest.raises(InputError, match="references is 5000"):
        DemoWorld(DemoWorldConfig(test_images=1, references=5000)).references("test")


def test_only_the_right_split_gives_captions(world: DemoWorld) -> None:
    for call in (lambda: world.references("train"), lambda: world.paired_captions("test"), lambda: world.split("dev")):
        with pytest.raises(InputError, match="split is"):
            call()


def test_sentences_are_one_line_with_one_stop_and_fit_the_captioner(world: DemoWorld) -> None:
    for sentence in all_sentences(world):
        assert sentence.isascii()
        assert sentence.endswith(".")
        assert sentence.count(".") == 1
        assert sentence == " ".join(sentence.split())
        assert sentence[0].isupper()
        assert sentence[1:] == sentence[1:].lower()
    lengths = [len(sentence.split()) for sentence in world.corpus()]
    assert min(lengths) >= 5
    assert max(lengths) <= 16
    assert sum(length >= 7 for length in lengths) > 0.95 * len(lengths)


def test_vocabulary_is_small_and_the_default_corpus_covers_the_references() -> None:
    world = DemoWorld(DemoWorldConfig())
    words = {word for sentence in world.corpus() for word in plain(sentence).split()}
    assert 100 <= len(words) <= 220
    said = {word for sentences in world.references("test").values() for s in sentences for word in plain(s).split()}
    assert len(said - words) <= 1


def test_nothing_said_is_false() -> None:
    """A sentence never names a colour, shape or texture that its scene has not."""
    rng = random.Random(5)
    meanings = {
        word: key for table in (COLOURS, SHAPES, TEXTURES, SIZES) for key, words in table.items() for word in words
    }
    named = 0
    for _ in range(1500):
        scene = draw_scene(rng)
        facts = {fact for thing in scene.things for fact in (thing.size, thing.texture, thing.colour, thing.shape)}
        for word in plain(describe(scene, rng)).split():
            if word in meanings:
                named += 1
                assert meanings[word] in facts
    assert named > 1500


@pytest.mark.parametrize("layout", ["row", "column"])
def test_relations_are_those_drawn(layout: str) -> None:
    red, blue = Thing("large", "plain", "red", "square"), Thing("large", "plain", "blue", "circle")
    scene = Scene((red, blue), layout, "light")
    image = render(scene, 48, random.Random(0))
    cut = (0, 0, 24, 48) if layout == "row" else (0, 0, 48, 24)
    r, _, b = ImageStat.Stat(image.crop(cut)).mean
    assert r > b + 30  # the first thing lies left or on top
    true, false = {"row": ("left of", "right of"), "column": ("above", "below")}[layout]
    rng, orders = random.Random(0), Counter()
    for _ in range(300):
        sentence = describe(scene, rng)
        said = [relation for relation in (true, false) if relation in sentence.lower()]
        if "red" in sentence and "blue" in sentence and said:
            red_first = sentence.index("red") < sentence.index("blue")
            # 'A with B below it' and 'below B is A' put the other thing in the relation than 'A is below B'
            turned = (
                " with " in sentence
                or " that has " in sentence
                or sentence.lower().startswith((*said, f"to the {said[0]}"))
            )
            assert (red_first != turned) == (said == [true]), sentence
            orders[red_first] += 1
    assert min(orders[True], orders[False]) > 10


def test_every_attribute_changes_the_picture() -> None:
    def picture(**change: str):
        thing = {"size": "large", "texture": "plain", "colour": "green", "shape": "square", **change}
        return render(Scene((Thing(**thing),), "middle", "light"), 48, random.Random(1))

    changes = [
        {"size": "small"},
        *({"texture": t} for t in TEXTURES if t != "plain"),
        *({"shape": s} for s in SHAPES if s != "square"),
    ]
    pictures = [picture(), *(picture(**change) for change in changes)]
    for i, one in enumerate(pictures):
        for two in pictures[i + 1 :]:
            assert sum(ImageStat.Stat(ImageChops.difference(one, two)).mean) > 4


@pytest.mark.parametrize("size", [32, 48, 96])
def test_every_layout_is_drawn_inside_the_picture(size: int) -> None:
    for count, layouts in LAYOUTS.items():
        for layout in layouts:
            things = tuple(Thing("large", "plain", "red", shape) for shape in list(SHAPES)[:count])
            image = render(Scene(things, layout, "light"), size, random.Random(2))
            assert image.size == (size, size)
            assert image.mode == "RGB"
            red = [(x, y) for x in range(size) for y in range(size) if image.getpixel((x, y)) == (214, 40, 40)]
            assert len(red) > count * 0.05 * size * size
            assert {0, size - 1}.isdisjoint({c for point in red for c in point})


def test_external_corpus_has_its_three_parts_in_their_shares(world: DemoWorld) -> None:
    parts = world.corpus_by_kind(external=True)
    counts = Counter(kind for kind, _ in parts)
    for kind, share in {"in-domain": 0.35, "narrated": 0.40, "irrelevant": 0.25}.items():
        assert counts[kind] / len(parts) == pytest.approx(share, abs=0.01)
    of_world = {word for words in (*SHAPES.values(), *COLOURS.values()) for word in words}
    mentions = {
        kind: sum(bool(of_world & set(plain(s).split())) for k, s in parts if k == kind) / counts[kind]
        for kind in counts
    }
    assert mentions["in-domain"] > 0.99
    assert mentions["narrated"] == 1
    assert mentions["irrelevant"] == 0
    lengths = {kind: sum(len(s.split()) for k, s in parts if k == kind) / counts[kind] for kind in counts}
    assert lengths["narrated"] > lengths["in-domain"] + 6
    assert len({s for k, s in parts if k == "irrelevant"}) > 300
    assert parts[:700] != sorted(parts[:700])  # shuffled, not in blocks


def test_human_cider_is_where_a_captioner_can_be_told_from_a_human(world: DemoWorld) -> None:
    from pycocoevalcap.cider.cider import Cider

    references, human = world.references("test"), world.human("test")
    assert len(human) == 300
    score, _ = Cider().compute_score(
        {i: [plain(s) for s in sentences] for i, sentences in references.items()},
        {i: [plain(s)] for i, s in human.items()},
    )
    assert 2.5 <= score <= 3.2


def test_references_of_a_picture_differ_and_the_human_is_independent_of_them(world: DemoWorld) -> None:
    references, human = world.references("test"), world.human("test")
    assert all(len(set(sentences)) == 5 for sentences in references.values())
    assert sum(human[i] in references[i] for i in human) < 0.25 * len(human)
    more = DemoWorld(DemoWorldConfig(train_images=400, corpus_sentences=10, references=3))
    assert more.human("test") == human


@pytest.mark.parametrize("external", [False, True])
def test_overlap_equals_a_naive_count(world: DemoWorld, monkeypatch: pytest.MonkeyPatch, external: bool) -> None:
    planted = [sentences[0] for sentences in world.references("test").values()][:7]
    plain_corpus = world.corpus(external)
    monkeypatch.setattr(world, "corpus", lambda external=False: plain_corpus + planted)
    references = list(world.references("test").values())
    corpus = plain_corpus + planted
    hits = [[r for r in sentences if r in corpus] for sentences in references]
    found = world.overlap(external)
    assert found["references_in_corpus"] == sum(map(len, hits)) >= 7
    assert found["scenes_in_corpus"] == sum(1 for h in hits if h)
    assert found["reference_share"] == found["references_in_corpus"] / 1500
    assert found["scene_share"] == found["scenes_in_corpus"] / 300


@pytest.mark.filterwarnings("ignore")
def test_written_annotations_are_coco_captions(folder: Path) -> None:
    from pycocotools.coco import COCO

    for name, count in (("val", 4), ("test", 6)):
        coco = COCO(str(folder / f"annotations/{name}_caption_coco_format.json"))
        assert len(coco.getImgIds()) == count
        for image in coco.loadImgs(coco.getImgIds()):
            assert (folder / "images" / name / image["file_name"]).is_file()
            assert len(coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))) == 5
        human = coco.loadRes(str(folder / f"human_{name}.json"))
        assert sorted(human.getImgIds()) == sorted(coco.getImgIds())


def test_written_folder_is_complete_and_says_what_it_holds(folder: Path) -> None:
    summary = json.loads((folder / "world.json").read_text())
    assert summary["config"] == SMALL.__dict__
    assert set(summary["overlap"]) == {"corpus", "external"}
    listed = (folder / "train_images.txt").read_text().splitlines()
    assert len(listed) == 12
    assert all((folder / name).is_file() for name in listed)
    pairs = json.loads((folder / "annotations/train_caption.json").read_text())
    assert Counter(pair["image_id"] for pair in pairs) == {int(Path(name).stem): 5 for name in listed}
    assert (folder / "corpus/corpus.txt").read_text().splitlines() == DemoWorld(SMALL).corpus()
    assert (folder / "corpus/external.txt").read_text().splitlines() == DemoWorld(SMALL).corpus(external=True)
    assert "unpaired training never reads" in " ".join((folder / "README.txt").read_text().split())


def test_writing_again_does_nothing_and_another_config_never_overwrites(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_demo_world(SMALL, folder, progress=lambda _: pytest.fail("drew again")) == folder
    with pytest.raises(InputError, match=r"seed 0 \(wanted 9\)"):
        write_demo_world(DemoWorldConfig(**{**SMALL.__dict__, "seed": 9}), folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_stopped_write_leaves_no_folder_and_the_next_one_is_whole(folder: Path, tmp_path: Path) -> None:
    def stop(written: int) -> None:
        if written == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo_world(SMALL, tmp_path / "w", progress=stop)
    assert list(tmp_path.iterdir()) == []
    # kill -9 cannot tidy up: what it leaves is removed by the next write
    (tmp_path / ".w.partial/images").mkdir(parents=True)
    (tmp_path / ".w.partial/images/half.png").write_bytes(b"half")
    seen: list[int] = []
    write_demo_world(SMALL, tmp_path / "w", progress=seen.append)
    assert seen == list(range(1, 23))
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert digest(tmp_path / "w") == digest(folder)


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no demo world"):
        write_demo_world(SMALL, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"

"""score_captions: odd captions, several methods, missing or hanging Java, refused input."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgtgan.errors import InputError
from cgtgan.evaluation import java as jvm
from cgtgan.evaluation import metrics as m
from cgtgan.evaluation.coco_files import load_references
from cgtgan.evaluation.counts import meteor
from cgtgan.evaluation.tokenizer import tokenize

NAMES = {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
CAPTIONS = {1: "A man rides a horse.", 2: "two dogs play in the snow", 3: "a red bus on a street"}
REFERENCES = {
    1: ["a man riding a horse on a beach", "the man is on a horse"],
    2: ["two dogs are playing in snow", "dogs running through the snow"],
    3: ["a red double decker bus drives down a street"],
}
ODD = {
    "newline": "a man\nrides\r\n\u2028a\x85 horse\x0b\x0c",
    "tab": "a man\trides a horse",
    "separator": "a man ||| rides |||| a horse |||",
    "emoji": "a man \N{HORSE} rides \N{GRINNING FACE} a \ud83d horse",
    "empty": "",
    "long": "a man rides a horse " * 500,
    "punctuation": "...!!! -- '' ,",
    "ptb": "*NL* &#10; <br> -LRB- \x00",
}


def test_odd_captions_are_scored_and_move_no_other_score(small_meteor: None) -> None:
    # CIDEr's document frequencies come from the references alone, so every other image keeps its score to the bit.
    references = {**REFERENCES, **dict.fromkeys(ODD, REFERENCES[1])}
    plain = m.score_captions({**CAPTIONS, **dict.fromkeys(ODD, "a cat")}, references)
    odd = m.score_captions({**CAPTIONS, **ODD}, references)
    assert odd.failed == plain.failed == {}
    assert set(odd.corpus) == NAMES
    for i in CAPTIONS:
        assert odd.per_image[i] == plain.per_image[i]
    for name in ODD:
        assert set(odd.per_image[name]) == NAMES
        assert all(0 <= value <= 10 for value in odd.per_image[name].values())
    one = odd.per_image[1]
    for name in ("newline", "tab", "emoji"):  # the same tokens as the plain sentence, so the same scores
        assert odd.per_image[name] == pytest.approx(one)
    assert odd.per_image["separator"]["METEOR"] > 0
    assert odd.per_image["empty"]["METEOR"] == odd.per_image["punctuation"]["METEOR"] == 0


def test_several_methods_score_as_each_alone(small_meteor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"one": CAPTIONS, "two": {1: "", 2: "dogs in the snow", 3: "a bus ||| on a street"}}
    alone = {name: m.score_captions(captions, REFERENCES) for name, captions in methods.items()}
    starts: list[object] = []

    class Counted(jvm.MeteorRun):
        def __enter__(self) -> jvm.MeteorRun:
            starts.append(self)
            return super().__enter__()

    monkeypatch.setattr(jvm, "MeteorRun", Counted)
    together = m.score_many(methods, REFERENCES)
    assert len(starts) == 1
    assert together == alone
    assert set(together["two"].corpus) == NAMES
    assert m.score_many({}, REFERENCES) == {}


def test_meteor_is_pycocoevalcaps_own(small_meteor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.meteor import meteor as wrapper

    monkeypatch.setattr(wrapper, "__file__", str(jvm.package_folder("meteor") / "meteor.py"))  # where its table lies

    nouns, verbs = (
        ("a man", "two dogs", "the red bus", "children", "a cat"),
        ("rides a horse", "stands", "runs in snow", "sits"),
    )
    hypotheses = [f"{noun} {verb}" for noun in nouns for verb in verbs]
    references = [
        [f"{text} slowly", "someone is there"][: 1 + i % 2] for i, text in enumerate(hypotheses[3:] + hypotheses[:3])
    ]
    references[0] = [hypotheses[0]]  # a whole match, whose chunk METEOR leaves out of its sum
    java = jvm.find_java()
    assert java is not None
    theirs = wrapper.Meteor()
    watchdog = threading.Timer(120, theirs.meteor_p.kill)  # their wrapper waits for ever; of a killed program it raises
    watchdog.start()
    try:
        with jvm.MeteorRun(java, len(hypotheses)) as run:
            run.score([(hypotheses, references)], timeout_s=120)
            expected = theirs.compute_score(
                dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
            )
            ((corpus, each, counts),) = run.result()
    finally:
        watchdog.cancel()
        theirs.meteor_p.kill()
    assert (corpus, each) == expected
    rows = np.asarray(counts, dtype=float)
    assert meteor(rows.sum(0)) == pytest.approx(corpus, abs=1e-12)  # Java's own sum
    assert meteor(rows).tolist() == pytest.approx(each, abs=1e-12)
    assert len(set(each)) > 5


def test_coco_eval_cap_gives_the_same_on_a_thousand_real_captions(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metric by metric and image by image, with 4 to 7 references per image."""
    import pycocoevalcap.eval as theirs
    from pycocoevalcap.meteor import meteor
    from pycocoevalcap.tokenizer import ptbtokenizer
    from pycocotools.coco import COCO

    class NoSpice:  # the real one downloads 384 MB as it is built; the other scorers do not see it
        def method(self) -> str:
            return "SPICE"

        def compute_score(self, gts: dict[int, list[str]], _res: object) -> tuple[float, list[float]]:
            return 0.0, [0.0] * len(gts)

    monkeypatch.setattr(theirs, "Spice", NoSpice)
    shutil.copytree(jvm.package_folder("tokenizer"), tmp_path / "tokenizer")  # it writes beside its own file
    monkeypatch.setattr(ptbtokenizer, "__file__", str(tmp_path / "tokenizer" / "ptbtokenizer.py"))
    every = load_references(shared / "data" / "coco" / "captions_val2014_notest.json.gz")
    many = sorted(every, key=lambda i: (-len(every[i]), str(i)))[:1000]
    captions = {i: every[i][0] for i in many}
    references = {i: every[i] if len(every[i]) == 7 else every[i][1:] for i in many}
    assert {len(texts) for texts in references.values()} == {4, 5, 7}

    coco: Any = COCO()  # its type stubs want every field of COCO's files
    coco.dataset = {"info": {}, "images": [{"id": i} for i in many]}
    rows = [(i, text) for i, texts in references.items() for text in texts]
    coco.dataset["annotations"] = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(rows)]
    coco.createIndex()
    run = theirs.COCOEvalCap(coco, coco.loadRes([{"image_id": i, "caption": text} for i, text in captions.items()]))
    made: list[meteor.Meteor] = []
    monkeypatch.setattr(theirs, "Meteor", lambda: made.append(meteor.Meteor()) or made[-1])
    watchdog = threading.Timer(120, lambda: [one.meteor_p.kill() for one in made])  # their wrapper waits for ever
    watchdog.start()
    try:
        run.evaluate()
    finally:
        watchdog.cancel()
        for one in made:
            one.meteor_p.kill()
    ours = m.score_captions(captions, references)
    assert ours.failed == {}
    key = {"Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L"}
    assert ours.corpus == pytest.approx({key.get(k, k): v for k, v in run.eval.items() if k != "SPICE"}, abs=1e-12)
    assert len(ours.per_image) == len(run.imgToEval) == 1000
    for i, scores in ours.per_image.items():
        expected = {key.get(k, k): v for k, v in run.imgToEval[i].items() if k not in ("SPICE", "image_id")}
        assert scores == pytest.approx(expected, abs=1e-12)
    assert sum(row["CIDEr"] for row in ours.per_image.values()) / 1000 == pytest.approx(ours.corpus["CIDEr"], abs=1e-12)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=40))
def test_no_caption_shifts_the_lines(captions: list[str]) -> None:
    java = jvm.find_java()
    assert java is not None
    marked = [line for i, text in enumerate(captions) for line in (text, f"marker{i} stands here")]
    lines = jvm.ptb_tokenize(java, marked, timeout_s=60)
    assert len(lines) == len(marked)
    assert lines[1::2] == [f"marker{i} stands here" for i in range(len(captions))]


def test_the_same_references_start_java_once(monkeypatch: pytest.MonkeyPatch) -> None:
    java, tokenised = jvm.find_java(), list[list[str]]()
    real = jvm.ptb_tokenize

    def counted(program: str, texts: list[str], **settings: Any) -> list[str]:
        tokenised.append(list(texts))
        return real(program, texts, **settings)

    monkeypatch.setattr(jvm, "ptb_tokenize", counted)
    references, first, second = (
        [["A red box, once.", "Two boxes!"], ["It's a star."]],
        ["A box.", "A star."],
        ["A line.", "A cross."],
    )
    split = [["a red box once", "two boxes"], ["it 's a star"]]
    for captions, tokens in ((first, ["a box", "a star"]), (second, ["a line", "a cross"])):
        assert tokenize(java, captions, references, jvm.DEFAULT_SETTINGS) == (tokens, split, None)
    assert sorted(tokenised) == sorted([first, second, ["A red box, once.", "Two boxes!", "It's a star."]])


def test_a_tokeniser_that_adds_lines_is_put_right(fake_java: Callable[[str], None]) -> None:
    fake_java("exec sed 's/BREAK/one\\\ntwo/'")
    java = jvm.find_java()
    assert java is not None
    assert jvm.ptb_tokenize(java, ["a b", "x BREAK y", "c", "d"], timeout_s=60) == ["a b", "x one two y", "c", "d"]


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script named java first on PATH; `$REAL` is the true one."""
    real = jvm.find_java()

    def put(script: str) -> None:
        (tmp_path / "bin").mkdir()
        java = tmp_path / "bin" / "java"
        java.write_text(f"#!/bin/sh\nREAL={real}\n{script}\n")
        java.chmod(0o755)
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.setenv("PATH", f"{java.parent}{os.pathsep}{os.environ['PATH']}")

    return put


def test_meteor_timeout_leaves_the_other_metrics_whole(fake_java: Callable[[str], None]) -> None:
    fake_java('case "$*" in *meteor*) sleep 600;; *) exec "$REAL" "$@";; esac')
    start = time.monotonic()
    scores = m.score_captions(CAPTIONS, REFERENCES, java=m.JavaSettings(meteor_timeout_s=0.5))
    assert time.monotonic() - start < 30
    assert set(scores.failed) == {"METEOR"}
    assert "0.5 s" in scores.failed["METEOR"]
    assert set(scores.corpus) == NAMES - {"METEOR"}
    assert scores.tokenizer == "ptb"


def test_a_java_that_always_hangs_or_dies_still_gives_scores(fake_java: Callable[[str], None]) -> None:
    fake_java('case "$*" in *PTB*) sleep 600;; *) echo "no memory" >&2; exit 3;; esac')
    scores = m.score_captions(CAPTIONS, REFERENCES, java=m.JavaSettings(ptb_timeout_s=0.3))
    assert set(scores.corpus) == NAMES - {"METEOR"}
    assert scores.tokenizer == "approximate"
    with jvm.MeteorRun("java", 1) as run:
        run.score([(["a"], [["a"]])], timeout_s=30)
        with pytest.raises(jvm.JavaError, match="no memory"):
            run.result()


def test_the_process_is_reaped_on_ctrl_c(
    fake_java: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_java(f'case "$*" in *meteor*) echo $$ > {tmp_path}/pid; sleep 600;; *) exec "$REAL" "$@";; esac')

    def interrupt(*_: object) -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(m, "_python_metric", interrupt)
    with pytest.raises(KeyboardInterrupt):
        m.score_captions(CAPTIONS, REFERENCES)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_without_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    scores = m.score_captions(CAPTIONS, REFERENCES)
    assert set(scores.failed) == {"METEOR"}
    for part in ("java", "install", "approximated"):
        assert part in scores.failed["METEOR"]
    assert set(scores.corpus) == NAMES - {"METEOR"}
    assert scores.tokenizer == "approximate"


def test_java_home_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("java")
    assert real is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").symlink_to(real)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert jvm.find_java() == str(tmp_path / "bin" / "java")


def test_the_locale_is_fixed(monkeypatch: pytest.MonkeyPatch, fake_java: Callable[[str], None]) -> None:
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    fake_java('[ "$LC_ALL" = C ] && exec "$REAL" "$@"; exit 9')
    assert m.score_captions(CAPTIONS, REFERENCES, ("rouge_l",)).tokenizer == "ptb"


def test_two_evaluations_at_once_share_a_folder_and_write_nothing_in_the_installation(
    small_meteor: None, tmp_path: Path
) -> None:
    def installed() -> dict[Path, int]:
        return {
            p: p.stat().st_mtime_ns
            for name in ("tokenizer", "meteor", "spice")
            for p in jvm.package_folder(name).rglob("*")
        }

    # Python compiles what it imports for the first time
    m.score_captions(CAPTIONS, REFERENCES, ("bleu", "rouge_l", "cider"))
    before = installed()
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: m.score_captions(CAPTIONS, REFERENCES, java=m.JavaSettings(tmp_path)), range(2)))
    assert both[0] == both[1]
    assert both[0].failed == {}
    assert installed() == before
    assert not list(tmp_path.iterdir())


def test_extra_metrics_stand_beside_the_others_and_need_no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    def length(method: str, ids: list[int]) -> m.Columns:
        column = [float(len(CAPTIONS[i])) for i in ids]
        return {"Length": sum(column), "Methods": float(method == "one")}, {"Length": column}

    def broken(_method: str, _ids: list[int]) -> m.Columns:
        raise InputError("this backbone reads no text")

    extra = {"length": length, "broken": broken}
    references = {**REFERENCES, 4: []}
    captions = {**CAPTIONS, 4: "a"}
    scores = m.score_many({"one": captions}, references, ("length", "rouge_l", "broken"), extra_metrics=extra)["one"]
    assert list(scores.corpus) == ["Length", "Methods", "ROUGE-L"]
    assert scores.corpus["Length"] == sum(map(len, CAPTIONS.values()))
    assert list(scores.per_image) == [1, 2, 3]
    assert set(scores.per_image[1]) == {"Length", "ROUGE-L"}
    assert scores.failed == {"broken": "this backbone reads no text"}
    assert scores.excluded == (4,)
    monkeypatch.setattr(jvm, "ptb_tokenize", pytest.fail)
    assert m.score_many({"one": captions}, references, ("length",), extra_metrics=extra)["one"].corpus["Methods"] == 1
    with pytest.raises(InputError, match="spice, length, broken"):
        m.score_many({"one": captions}, references, ("lengths",), extra_metrics=extra)


def test_one_failing_metric_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.cider.cider import Cider

    monkeypatch.setattr(Cider, "compute_score", lambda *_: 1 / 0)
    scores = m.score_captions(CAPTIONS, REFERENCES, ("cider", "rouge_l"))
    assert "division by zero" in scores.failed["CIDEr"]
    assert set(scores.corpus) == {"ROUGE-L"}


def test_spice_without_jars_says_what_to_put_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jvm, "package_folder", _with_spice_in(tmp_path))
    scores = m.score_captions(CAPTIONS, REFERENCES, ("rouge_l", "spice"))
    assert set(scores.corpus) == {"ROUGE-L"}
    assert str(tmp_path / "lib") in scores.failed["SPICE"]
    assert "stanford-corenlp-3.6.0-models.jar" in scores.failed["SPICE"]


def test_spice_reads_what_its_program_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_java: Callable[[str], None]
) -> None:
    rows = [{"image_id": i, "scores": {"All": {"f": f}}} for i, f in ((1, 0.5), (0, 0.1), (2, 0.3))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    copy = f'while [ "$1" != -out ]; do shift; done; cp {tmp_path}/rows.json "$2"'
    fake_java(f'case "$*" in *spice*) {copy};; *) exec "$REAL" "$@";; esac')
    (tmp_path / "lib").mkdir()
    for jar in jvm.SPICE_JARS:
        (tmp_path / "lib" / jar).touch()
    monkeypatch.setattr(jvm, "package_folder", _with_spice_in(tmp_path))
    scores = m.score_captions(CAPTIONS, REFERENCES, ("spice",), java=m.JavaSettings(tmp_path))
    assert scores.corpus["SPICE"] == pytest.approx(0.3)
    assert [row["SPICE"] for row in scores.per_image.values()] == [0.1, 0.5, 0.3]


def test_spice_is_started_for_java_17_with_its_files_in_the_scratch_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_java: Callable[[str], None]
) -> None:
    fake_java(f'printf "%s\\n" "$LC_ALL" "$@" > {tmp_path}/started; sleep 600')
    monkeypatch.setattr(jvm, "package_folder", _with_spice_in(tmp_path))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    java = jvm.find_java()
    assert java is not None
    with pytest.raises(jvm.JavaError, match=r"SPICE gave no result within 0\.5 s and was stopped"):
        jvm.spice(java, ["a man"], [["a man"]], timeout_s=0.5, scratch=scratch)
    started = (tmp_path / "started").read_text().splitlines()
    assert started[0] == "C"
    for package in ("lang", "math", "util", "util.concurrent", "net", "text"):
        assert f"--add-opens=java.base/java.{package}=ALL-UNNAMED" in started
    for place in (started[started.index("-cache") + 1], started[started.index("-out") + 1]):
        assert Path(place).is_relative_to(scratch)
    assert f"-Djava.io.tmpdir={started[started.index('-cache') + 1]}" in started
    assert not list(scratch.iterdir())


def _with_spice_in(folder: Path) -> Callable[[str], Path]:
    original = jvm.package_folder
    return lambda name: folder if name == "spice" else original(name)


def test_images_without_references_are_excluded_and_reported() -> None:
    references = {**REFERENCES, 4: [], 5: [" "]}
    scores = m.score_captions({**CAPTIONS, 4: "a", 5: "b"}, references, ("cider",))
    assert scores.excluded == (4, 5)
    assert scores.per_image == m.score_captions(CAPTIONS, REFERENCES, ("cider",)).per_image


@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ({**CAPTIONS, 9: "a cat"}, REFERENCES, r"1 image \(9\)"),
        ({1: "a"}, REFERENCES, r"2 images \(2, 3\) have references but no caption"),
        ({str(i): text for i, text in CAPTIONS.items()}, REFERENCES, "str in the captions and int in the references"),
        (CAPTIONS, {str(i): texts for i, texts in REFERENCES.items()}, "int in the captions and str in the references"),
        ({1: ["a"]}, {1: ["a"]}, "not a string"),
        ({1: "a"}, {1: "a"}, "not a list of strings"),
        ({1: "a"}, {1: []}, "no image is left"),
        ({}, {}, "no image is left"),
    ],
)
def test_ids_and_values_that_do_not_fit_are_refused(captions: dict, references: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        m.score_captions(captions, references, ("rouge_l",))


@pytest.mark.parametrize("metrics", [("blue",), "bleu", ()])
def test_unknown_metrics_are_refused(metrics: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="rouge_l"):
        m.score_captions(CAPTIONS, REFERENCES, metrics)

"""What a run lacks is listed at once, fetched from a server on this machine, and then it is no longer missing."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from cgtgan.assets.preflight import Needs, missing_inputs
from cgtgan.assets.readiness import fetch_missing, listed
from cgtgan.config import Config
from cgtgan.data.datasets import load_split
from cgtgan.evaluation.java import package_folder
from cgtgan.models.tokenizers import ROBERTA_SPECIALS, train_tokenizer
from cgtgan.runtime import sources
from cgtgan.runtime.tracking import Tracker
from tests.file_server import FileServer, archive_of, jpeg, karpathy, publish, publish_coco

ROOT = Path(__file__).resolve().parents[2]
# models that need nothing: what is missing then is data
SMALL = (
    *("clip_backbone=random", "generator.language_model=scratch", "generator.tokenizer=corpus"),
    *("discriminator.encoder=scratch", "discriminator.tokenizer=corpus"),
)


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sentences(cfg: Config) -> list[str]:
    return [one.sentence for one in missing_inputs(cfg)]


# ----------------------------------------------------------------------------------------------------------- the whole


def run(home: Path, *words: str, code: int, input: str | None = None) -> str:
    """The program in a process, without the hub's cache and the cache of CLIP."""
    environment = os.environ | {"HF_HOME": str(home / "hub"), "HOME": str(home)}
    command = [sys.executable, str(ROOT / "run.py"), *words]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, input=input, timeout=100)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_everything_is_listed_at_once_before_torch_with_the_command(home: Path) -> None:
    (home / "torch.py").write_text("raise SystemExit('torch was imported')")
    os.environ["PYTHONPATH"], before = str(home), os.environ.get("PYTHONPATH")
    try:
        outputs = [run(home, "experiment=coco_gcc", word, code=1) for word in ("seed=0", "stage=check")]
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    for output, word in zip(outputs, ("seed=0", ""), strict=True):
        first, *lines, last = output.splitlines()
        assert first == "error: 6 inputs are missing:"
        assert [line.split()[0] for line in lines] == [
            *("clip_backbone.model=ViT-L/14:", "generator.language_model=gpt2", "discriminator.encoder=roberta-base"),
            *("data/coco/annotations", "no", "data/gcc/Train_GCC-training.tsv"),
        ]
        assert "no picture is in data/coco/train2014 and data/coco/val2014: get them from http" in lines[4]
        assert "HF_HUB_OFFLINE=1" in lines[1]
        assert "`hf download gpt2`" in lines[1]
        assert last.endswith(f"stage=download experiment=coco_gcc{' ' * bool(word)}{word}` fetches all")


def test_a_multirun_lists_once_and_looks_once(home: Path) -> None:
    output = run(home, "-m", "experiment=coco_coco", "seed=0,1", code=1)
    assert output.count("inputs are missing:") == 1
    assert "what is missing for this run is listed above" in output
    assert "2 failed" in output


def test_nothing_is_submitted_while_something_is_missing(home: Path) -> None:
    pytest.importorskip("submitit")
    words = ("-m", "hydra/launcher=submitit_local", "experiment=coco_coco", "seed=0,1")
    output = run(home, *words, code=1)
    assert output.startswith("error: 5 inputs are missing:\n")
    assert output.endswith("stage=download -m experiment=coco_coco seed=0,1` fetches all\n")
    assert not list(home.rglob("job.json"))


def test_the_first_process_speaks_for_all(home: Path) -> None:
    environment = os.environ | {
        "HF_HOME": str(home / "hub"),
        "HOME": str(home),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    command = [sys.executable, str(ROOT / "run.py"), "experiment=coco_coco"]
    for rank, expected in (("0", 1), ("1", 0)):
        ranks = {"RANK": rank, "LOCAL_RANK": rank}
        done = subprocess.run(command, cwd=home, env=environment | ranks, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1
        assert (done.stdout + done.stderr).count("inputs are missing") == expected


def test_one_thing_is_one_line(home: Path) -> None:
    (home / "photos").mkdir()
    output = run(
        home, "dataset=folder", "dataset.root=photos", "corpus=text_file", "corpus.path=none.txt", *SMALL, code=1
    )
    assert output == "error: none.txt does not exist: set corpus.path to where it is\n"


def test_the_demo_needs_nothing(typed: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert sentences(typed("experiment=demo")) == []
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    (java,) = missing_inputs(typed("experiment=demo"))  # the other scores are computed without it
    assert "no `java` program was found" in java.sentence
    assert not java.stops
    assert listed([java]) == ""


def own_pictures(home: Path, mirror: str) -> list[str]:
    """Settings of a run that lacks the list of Conceptual Captions alone."""
    (home / "photos").mkdir()
    for n in range(4):
        (home / f"photos/{n}.jpg").write_bytes(jpeg())
    return ["dataset=folder", "dataset.root=photos", "corpus=gcc", f"mirror={mirror}", "stage=initialize", *SMALL]


def test_what_is_missing_is_fetched_in_the_run_and_the_rest_is_said(home: Path, server: FileServer) -> None:
    publish(server, sources.GCC, b"a dog runs\thttp://x/1.jpg\n")
    settings = [*own_pictures(home, server.url), "stage=train", "dataset.references=none.json"]
    asked = run(home, *settings, "download=false", code=1)
    assert "2 inputs are missing" in asked
    assert server.requests == []
    output = run(home, *settings, "download=true", code=1)
    assert "fetching http://127.0.0.1" in output
    assert output.endswith(
        "error: photos/none.json does not exist: set dataset.references (or dataset.root) to where it is\n"
    )
    assert (home / "data/gcc/Train_GCC-training.tsv").is_file()


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_person_at_a_terminal_is_asked_once(home: Path, server: FileServer, answer: str) -> None:
    """The file that comes is no list of captions, as its reader says: the run went on after it was fetched."""
    publish(server, sources.GCC, b"no captions\n")
    command = [sys.executable, str(ROOT / "run.py"), "-m", *own_pictures(home, server.url), "seed=0,1"]
    terminal, end = pty.openpty()
    os.write(terminal, f"{answer}\n".encode())
    wide = os.environ | {"COLUMNS": "300"}
    process = subprocess.Popen(command, cwd=home, env=wide, stdin=end, stdout=end, stderr=subprocess.STDOUT)
    os.close(end)
    shown = b""
    with suppress(OSError):  # at its end the terminal is gone
        while piece := os.read(terminal, 4096):
            shown += piece
    assert process.wait(100) == 1
    output = shown.decode()
    assert output.count("fetch 1 of these 1 now? [y/N]") == 1
    assert output.count("fetching http://127.0.0.1") == (answer == "y")
    assert ("has no row caption<TAB>url" in output) == (answer == "y")
    assert len(server.requests) == (answer == "y")


# ------------------------------------------------------------------------------------------------------- what is needed


@pytest.mark.parametrize(
    ("overrides", "needs"),
    [
        (["stage=preprocess"], Needs(("train", "val", "test"), corpus=True, clip=True)),
        (["stage=initialize"], Needs((), corpus=True, clip=True, language_model=True)),
        (["stage=initialize", "gap=mean"], Needs(("train",), corpus=True, clip=True, language_model=True)),
        (["stage=train"], Needs(("train", "val"), True, True, True, True)),
        (["stage=train", "ablation=no_discriminator"], Needs(("train", "val"), True, True, True, False)),
        (["stage=check"], Needs(("train", "val", "test"), True, True, True, True, True)),
        (["stage=evaluate"], Needs(("test",), clip=True, scores=True)),
        (["stage=evaluate", "evaluate.baselines=[nearest]"], Needs(("test",), True, True, scores=True)),
        (
            ["stage=evaluate", "evaluate.baselines=[mean_shift]"],
            Needs(("test", "train"), True, True, True, scores=True),
        ),
        (["stage=check", "checkpoint=x"], Needs(("test",), clip=True, scores=True)),
        (["stage=evaluate", "captions=x.json"], Needs()),
        (["stage=evaluate", "captions=x.json", "evaluate.metrics=[clipscore]"], Needs(clip=True)),
        (["stage=caption", "images=x"], Needs()),
        (["stage=report"], Needs()),
    ],
)
def test_each_stage_needs_what_it_reads(typed: Callable[..., Config], overrides: list[str], needs: Needs) -> None:
    assert Needs.of(typed(*overrides)) == needs


def test_scoring_needs_a_language_model_unless_the_initial_generator_was_made(
    typed: Callable[..., Config], home: Path
) -> None:
    cfg = typed("experiment=demo", "stage=evaluate", "generator.language_model=./gpt", "generator.tokenizer=pretrained")
    assert "generator.language_model=./gpt: no such folder" in sentences(cfg)[0]
    generator = home / "artifacts/generator_initial/generator_initial-0/generator.json"
    generator.parent.mkdir(parents=True)
    generator.touch()
    assert sentences(cfg) == []
    assert len(sentences(replace(cfg, stage="initialize"))) == 1


def test_a_checkpoint_that_is_not_there_is_among_what_is_missing(typed: Callable[..., Config]) -> None:
    missing = sentences(typed("experiment=coco_to_flickr30k"))
    assert (
        sum(one.startswith("checkpoint=runs/coco_coco/coco_vit_l14_t100_clip_agg_k5/seed=0: no") for one in missing)
        == 1
    )
    assert len(missing) == 4
    assert not [one for one in missing if "corpus" in one]


def test_a_name_that_openai_does_not_have_lists_the_nine(typed: Callable[..., Config]) -> None:
    first = missing_inputs(typed("clip_backbone.model=ViT-L14"))[0]
    assert first.fetch is None
    assert ", ".join(sources.CLIP_ARCHIVES) in first.sentence


def test_a_model_in_a_folder_must_be_whole(typed: Callable[..., Config], home: Path) -> None:
    folder = home / "model"
    folder.mkdir()
    cfg = typed("experiment=demo", f"generator.language_model={folder}", "generator.tokenizer=pretrained")
    for part, name in (
        ("config.json", "config.json"),
        ("the weights", "model.safetensors"),
        ("the tokenizer", "vocab.txt"),
    ):
        assert sentences(cfg) == [
            f"generator.language_model={folder}: {part} is not in that folder: download it again, "
            "or name another folder"
        ]
        (folder / name).write_text("{}")
    assert sentences(cfg) == []
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert "model-00002-of-00002.safetensors is not in that folder" in sentences(cfg)[0]
    (folder / "vocab.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert sentences(cfg)[0].startswith(f"generator.language_model={folder}: vocab.txt there is a git-lfs pointer")


def test_only_the_tokenizer_of_a_model_from_scratch_is_needed(typed: Callable[..., Config], home: Path) -> None:
    words = home / "words"
    cfg = typed("experiment=demo", "discriminator.tokenizer=./words")
    assert sentences(cfg) == ["discriminator.tokenizer=./words: no such folder: correct the path, or give a hub name"]
    words.mkdir()
    train_tokenizer(["a dog"], 300, ROBERTA_SPECIALS).backend.model.save(str(words))
    assert sentences(cfg) == []


def test_a_web_page_in_the_place_of_the_corpus_is_said(typed: Callable[..., Config], home: Path) -> None:
    (home / "photos").mkdir()
    (home / "text.txt").write_text("<!DOCTYPE html><html>log in</html>")
    cfg = typed("dataset=folder", "dataset.root=photos", "corpus=text_file", "corpus.path=text.txt", *SMALL)
    assert sentences(cfg) == [
        "text.txt (corpus.path) holds a web page, not the data: the download was answered with a page"
    ]


def test_a_table_as_a_corpus_is_refused_before_anything_is_fetched(typed: Callable[..., Config], home: Path) -> None:
    (home / "photos").mkdir()
    (home / "text.csv").write_text("id,caption\n1,a dog runs\n2,a cat sits\n")
    given = ("dataset=folder", "dataset.root=photos", "corpus=text_file", "corpus.path=text.csv", *SMALL)
    (sentence,) = sentences(typed(*given))
    assert sentence.startswith("text.csv (corpus.path) is a table with the columns 'id', 'caption', not one sentence")
    assert sentences(typed(*given, "corpus.column=caption")) == []


def test_a_folder_of_ones_own_must_be_there(typed: Callable[..., Config], home: Path) -> None:
    (home / "text.txt").write_text("A dog runs.\n")
    given = ("corpus=text_file", "corpus.path=text.txt", "dataset.references=captions.json", *SMALL)
    assert sentences(typed("dataset=folder", "dataset.root=photos", *given)) == [
        "photos does not exist: set dataset.images (or dataset.root) to where it is",
        "photos/captions.json does not exist: set dataset.references (or dataset.root) to where it is",
    ]


def test_archives_of_pictures_must_be_there(typed: Callable[..., Config], home: Path) -> None:
    (home / "photos").mkdir()
    (home / "text.txt").write_text("A dog runs.\n")
    (home / "photos/0.tar").touch()
    given = ("dataset=folder", "dataset.root=photos", "corpus=text_file", "corpus.path=text.txt", *SMALL)
    assert sentences(typed(*given, "dataset.images='{0..1}.tar'")) == [
        "photos/1.tar does not exist: set dataset.images (or dataset.root) to where it is"
    ]
    (home / "photos/1.tar").touch()
    assert sentences(typed(*given, "dataset.images='{0..1}.tar'")) == []


def test_nocaps_says_where_its_files_are(typed: Callable[..., Config], home: Path) -> None:
    (home / "run").mkdir()
    cfg = typed("dataset=nocaps", "stage=evaluate", "checkpoint=run", "dataset.root=n", *SMALL)
    assert any("nocaps_val_4500_captions.json" in line and "nocaps.org/download" in line for line in sentences(cfg))


def test_a_disk_too_small_for_the_embeddings_is_said(typed: Callable[..., Config], home: Path) -> None:
    """The corpus: as large as a file may be here, without taking room on the disk."""
    (home / "photos").mkdir()
    with (home / "text.txt").open("wb") as file:
        file.write(b"A dog runs.\n")
        file.truncate(15 * 10**12)
    cfg = typed("dataset=folder", "dataset.root=photos", "corpus=text_file", "corpus.path=text.txt", *SMALL)
    (sentence,) = sentences(cfg)
    assert sentence.startswith("artifacts_dir=artifacts: the embeddings take 30,720.0 GB or more and its disk has ")
    assert sentences(typed(*cfg_words(cfg), "corpus.max_sentences=100")) == []


def cfg_words(cfg: Config) -> list[str]:
    return [
        "dataset=folder",
        f"dataset.root={cfg.dataset.root}",
        "corpus=text_file",
        f"corpus.path={cfg.corpus.path}",
        *SMALL,
    ]


# ------------------------------------------------------------------------------------------------------------- fetching


def test_coco_is_fetched_unpacked_and_complete(typed: Callable[..., Config], server: FileServer, home: Path) -> None:
    publish_coco(server, "train", "restval", "val", "test")
    cfg = typed("dataset=coco", "corpus=coco", f"mirror={server.url}", *SMALL)
    assert len(sentences(cfg)) == 2
    assert fetch_missing(cfg, Tracker()) == []
    assert sentences(cfg) == []
    root = home / "data/coco"
    assert {p.name for p in root.iterdir() if not p.name.endswith(".lock")} == {"annotations", "train2014", "val2014"}
    ids = {name: [i.image_id for i in load_split(cfg.dataset, name, root).images] for name in ("train", "val", "test")}
    assert ids == {"train": [1, 2], "val": [3], "test": [4]}
    requests = len(server.requests)
    assert fetch_missing(cfg, Tracker()) == []
    assert len(server.requests) == requests


def test_a_folder_of_pictures_that_is_not_whole_is_noticed(
    typed: Callable[..., Config], server: FileServer, home: Path
) -> None:
    publish_coco(server, "train", "restval", "val", "test")
    cfg = typed("dataset=coco", "corpus=coco", f"mirror={server.url}", *SMALL)
    fetch_missing(cfg, Tracker())
    (home / "data/coco/val2014/COCO_val2014_000000000003.jpg").unlink()
    (sentence,) = sentences(cfg)
    assert sentence.startswith("1 of 1 val images are not in data/coco/val2014, first 3: get them from")
    assert sentences(replace(cfg, stage="train")) == [sentence]
    assert sentences(replace(cfg, stage="evaluate")) == []
    fetch_missing(cfg, Tracker())
    assert sentences(cfg) == []


def test_karpathys_file_stands_in_for_a_missing_one_of_the_papers_files(
    typed: Callable[..., Config], server: FileServer, home: Path
) -> None:
    publish_coco(server, "train", "restval", "val", "test")
    (home / "data/coco/annotations").mkdir(parents=True)
    rows = [{"image_id": 1, "caption": "A picture."}]
    (home / "data/coco/annotations/train_caption.json").write_text(json.dumps(rows))
    cfg = typed("dataset=coco", "corpus=coco", f"mirror={server.url}", *SMALL)
    assert [one.split()[0] for one in sentences(cfg)] == [
        "data/coco/annotations/val_caption_coco_format.json",
        "data/coco/annotations/test_caption_coco_format.json",
        "no",
    ]
    assert fetch_missing(cfg, Tracker()) == []
    assert sum("caption_datasets.zip" in path for path, _ in server.requests) == 1
    assert [i.image_id for i in load_split(cfg.dataset, "train", home / "data/coco").images] == [1]


def test_split_lists_bring_cocos_own_annotations(typed: Callable[..., Config], server: FileServer, home: Path) -> None:
    lists = home / "data/coco/lists"
    lists.mkdir(parents=True)
    for n, name in enumerate(("train", "val", "test"), 1):
        (lists / f"coco_{name}.txt").write_text(f"COCO_val2014_{n:012d}.jpg\n")
    members = {}
    for year in ("train2014", "val2014"):
        rows = [{"image_id": n, "caption": f"Number {n}."} for n in (1, 2, 3)]
        content = {
            "images": [{"id": n, "file_name": f"COCO_{year}_{n:012d}.jpg"} for n in (1, 2, 3)],
            "annotations": rows,
        }
        members[f"annotations/captions_{year}.json"] = json.dumps(content).encode()
    publish(server, sources.COCO_ANNOTATIONS, archive_of({**members, "annotations/instances_val2014.json": b"{}"}))
    publish(
        server,
        sources.COCO_IMAGES["val2014"],
        archive_of({f"val2014/COCO_val2014_{n:012d}.jpg": jpeg() for n in (1, 2, 3)}),
    )
    publish(server, sources.COCO_IMAGES["train2014"], archive_of({"train2014/COCO_train2014_000000000009.jpg": jpeg()}))
    cfg = typed("dataset=coco", "corpus=coco", "dataset.karpathy=lists", f"mirror={server.url}", *SMALL)
    assert fetch_missing(cfg, Tracker()) == []
    annotations = {p.name for p in (home / "data/coco/annotations").glob("*.json")}
    assert annotations == {"captions_train2014.json", "captions_val2014.json"}


def test_what_needs_a_login_says_the_page_and_the_place(
    typed: Callable[..., Config], server: FileServer, home: Path
) -> None:
    publish(server, sources.KARPATHY, archive_of({"dataset_flickr30k.json": karpathy("train", "val", "test")}))
    cfg = typed("dataset=flickr30k", "corpus=shutterstock", f"mirror={server.url}", *SMALL)
    images, corpus = fetch_missing(cfg, Tracker())
    assert "train images are not in data/flickr30k/flickr30k_images" in images.sentence
    assert "shannon.cs.illinois.edu/DenotationGraph (on request) or kaggle.com/datasets" in images.sentence
    assert corpus.sentence.startswith("data/shutterstock/sentences.pkl does not exist: get it from https://github.com/")
    assert images.fetch is corpus.fetch is None
    assert listed([images, corpus]).count("\n") == 2  # no command can fetch them


def test_the_list_of_conceptual_captions_goes_where_the_corpus_is_read(
    typed: Callable[..., Config], server: FileServer, home: Path
) -> None:
    (home / "photos").mkdir()
    publish(server, sources.GCC, b"a dog runs\thttp://x/1.jpg\n")
    cfg = typed(
        "dataset=folder",
        "dataset.root=photos",
        "corpus=gcc",
        "corpus.path=lists/gcc.tsv",
        f"mirror={server.url}",
        *SMALL,
    )
    assert fetch_missing(cfg, Tracker()) == []
    assert (home / "lists/gcc.tsv").read_bytes().startswith(b"a dog runs\t")


def test_a_clip_archive_is_fetched_by_its_sum(
    typed: Callable[..., Config], server: FileServer, home: Path, capsys
) -> None:
    """The true archive cannot be had here: what the server has instead is refused, and nothing is left of it."""
    (home / "photos").mkdir()
    (home / "text.txt").write_text("A dog runs.\n")
    archive = sources.CLIP_ARCHIVES["ViT-L/14@336px"]
    publish(server, archive, b"another archive")
    given = ("dataset=folder", "dataset.root=photos", "corpus=text_file", "corpus.path=text.txt", *SMALL[1:])
    cfg = typed(*given, "clip_backbone.model=ViT-L/14@336px", "clip_backbone.cache=clip", f"mirror={server.url}")
    (missing,) = fetch_missing(cfg, Tracker())
    assert missing.sentence.startswith(
        "clip_backbone.model=ViT-L/14@336px: clip/ViT-L-14-336px.pt is missing; get OpenAI's"
    )
    said = " ".join(capsys.readouterr().out.split())
    assert f"has the SHA-256 {hashlib.sha256(b'another archive').hexdigest()} and {archive.sha256} is published" in said
    assert [p.name for p in (home / "clip").iterdir()] == [".ViT-L-14-336px.pt.lock"]


def test_spices_jars_are_taken_out_of_stanfords_archive(server: FileServer, home: Path) -> None:
    """Into a copy of the package's folder, which another process finds first: the installed one stays as it is."""
    library = home / "path/pycocoevalcap/spice/lib"
    library.mkdir(parents=True)
    folder = "stanford-corenlp-full-2015-12-09"
    jars = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar", "stanford-corenlp-3.6.0-sources.jar")
    publish(server, sources.SPICE, archive_of({f"{folder}/{name}": name.encode() for name in jars}))
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from cgtgan.assets.fetching import fetch_spice\n"
        "from cgtgan.runtime.download import Fetcher\n"
        "from cgtgan.runtime.tracking import Tracker\n"
        "fetch_spice(Fetcher(Tracker(), sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, str(home / "path"), server.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name: p.read_text() for p in library.glob("*.jar")} == {name: name for name in jars[:2]}
    assert package_folder("spice") != library.parent

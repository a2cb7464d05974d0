"""Files that appear whole or not at all, headers that must fit, and artifacts that two jobs make once."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cgtgan.errors import InputError, MissingFileError
from cgtgan.runtime.artifacts import (
    Header,
    atomic_path,
    canonical_json,
    file_fingerprint,
    fingerprint,
    load_embeddings,
    load_sentences,
    read_json,
    save_embeddings,
    save_sentences,
    sweep_leftovers,
    write_json,
    write_text,
)
from cgtgan.runtime.fingerprints import kept_fingerprint
from cgtgan.runtime.store import ArtifactStore

ROOT = Path(__file__).resolve().parents[2]
PRODUCER = {"backbone": {"kind": "random"}, "t": 100.0}


def python(code: str, *arguments: object, hash_seed: str = "0") -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_hangs_on_content_alone() -> None:
    a, b = {"x": 1, "y": {"p": [1, 2], "q": None}}, {"y": {"q": None, "p": (1, 2)}, "x": 1}
    assert fingerprint(a) == fingerprint(b)
    assert len(fingerprint(a)) == 12
    different: list[Any] = [
        {"x": 1},
        {"x": 1.5},
        {"x": "1"},
        {"x": True},
        {"x": None},
        {"y": 1},
        {"x": [1]},
        [1],
        "ß",
        "ss",
    ]
    assert len({fingerprint(v) for v in different}) == len(different)
    assert fingerprint("lone \ud800 surrogate")


def test_fingerprint_is_the_same_in_every_process() -> None:
    code = "from cgtgan.runtime.artifacts import *; print(fingerprint({k: k for k in {'b', 'a', 'ü'}}))"
    found = {python(code, hash_seed=seed).communicate()[0].strip() for seed in ("1", "2")}
    assert found == {fingerprint({"a": "a", "b": "b", "ü": "ü"})}


@pytest.mark.parametrize("value", [object(), {"a": Path("a")}, [{1}], (i for i in "ab"), b"a", 1j])
def test_a_value_without_a_canonical_text_has_no_fingerprint(value: Any) -> None:
    with pytest.raises(TypeError, match="is not JSON serializable"):
        fingerprint(value)


def test_sentences_have_one_fingerprint_in_every_process(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_sentences(path, ["A dog.", "犬"], producer=PRODUCER, counts={})
    with pytest.raises(TypeError, match="Sentences"):  # its text would be its address in memory
        fingerprint(load_sentences(path)[0])
    code = (
        "from pathlib import Path; from cgtgan.runtime.artifacts import *; "
        f"print(fingerprint(list(load_sentences(Path({str(path)!r}))[0])))"
    )
    assert python(code).communicate()[0].strip() == fingerprint(["A dog.", "犬"])


def test_file_fingerprint_reads_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 3_000_000)
    before = file_fingerprint(path)
    path.write_bytes(b"x" * 2_999_999 + b"y")
    assert file_fingerprint(path) != before


# -------------------------------------------------------------------------------------------------------- atomic writes


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail() -> None:
        with atomic_path(path) as beside:
            beside.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert read_json(path) == {"old": 1}
    assert hidden(tmp_path) == []


def test_the_new_file_takes_the_name_in_one_rename(tmp_path: Path) -> None:
    """Who has the old file open or mapped keeps it whole: nothing is written into it."""
    path = tmp_path / "a"
    write_text(path, "old")
    with path.open() as reader:
        with atomic_path(path) as beside:
            beside.write_text("new")
            number = beside.stat().st_ino
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert path.stat().st_ino == number


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    for names in (["a", "b"], ["c"]):
        with atomic_path(tmp_path / "deep" / "folder") as beside:
            (beside / "sub").mkdir(parents=True)
            for name in names:
                (beside / "sub" / name).write_text(name)
    assert [p.name for p in (tmp_path / "deep/folder/sub").iterdir()] == ["c"]
    assert hidden(tmp_path / "deep") == []


KILLED = """
import sys, time
from pathlib import Path
from cgtgan.runtime.artifacts import atomic_path
with atomic_path(Path(sys.argv[1])) as beside:
    if sys.argv[2] == "folder":
        beside.mkdir()
        beside = beside / "part"
    beside.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_writer_leaves_the_old_file_and_no_half_one(tmp_path: Path, kind: str) -> None:
    old, fresh = tmp_path / "old", tmp_path / "fresh"
    if kind == "file":
        write_text(old, "whole")
    else:
        old.mkdir()
        (old / "part").write_text("whole")
    for path in (old, fresh):
        writer = python(KILLED, path, kind)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    assert (old if kind == "file" else old / "part").read_text() == "whole"
    assert not fresh.exists()
    assert len(hidden(tmp_path)) == 2
    sweep_leftovers(tmp_path)
    assert hidden(tmp_path) == []
    assert old.exists()


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_what_safetensors_saves_has_the_rights_of_the_umask(tmp_path: Path, umask: int) -> None:
    """safetensors alone gives the owner alone rights (0600): others could not use a shared folder of artifacts."""
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "folder") as beside:
            beside.mkdir()
            save_file({"a": torch.zeros(1)}, beside / "a.safetensors")
        with atomic_path(tmp_path / "b.safetensors") as beside:
            save_file({"a": torch.zeros(1)}, beside)
    finally:
        os.umask(before)
    for file in (tmp_path / "folder" / "a.safetensors", tmp_path / "b.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


FULL = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from cgtgan.runtime.artifacts import atomic_path
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    with atomic_path(Path(sys.argv[1])) as beside:
        save_file({"a": torch.zeros(100_000)}, beside)
except OSError as error:
    print(error.errno, error.filename)
"""


def test_a_disk_that_takes_no_more_is_an_oserror_naming_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    """Of safetensors too, whose own error is no OSError; a limit on a file's size stands for a full disk."""
    path = tmp_path / "a.safetensors"
    assert python(FULL, path).communicate()[0] == f"{errno.EFBIG} {path}\n"
    assert list(tmp_path.iterdir()) == []


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nothing\.json is missing"):
        read_json(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("content", "kind", "problem"),
    [
        (b'{"a": [1,', dict, r"is not whole \(Expecting value: line 1 column 10 \(char 9\)\)"),
        (b"", dict, r"is not whole \(Expecting value"),
        (b"[1]", dict, "holds no JSON object"),
        (b"null", dict, "holds no JSON object"),
        (b'{"a": 1}', list, "holds no JSON list"),
        (b"[" * 100_000, dict, "is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", dict, "has a number of thousands of digits"),
        (b'{"a": "\xff"}', dict, r"is not UTF-8 text \(byte 7\)"),
    ],
)
def test_a_damaged_json_file_is_one_sentence(tmp_path: Path, content: bytes, kind: type, problem: str) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    fix = "delete it and run the stage that writes it again"
    with pytest.raises(InputError, match=rf"^{path} {problem}.*: {fix}$"):
        read_json(path, kind)


def test_json_is_an_object_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "b.json").write_text("[1]")
    assert (read_json(tmp_path / "a.json"), read_json(tmp_path / "b.json", list)) == ({"a": 1}, [1])


# -------------------------------------------------------------------------------------------------------------- headers


def embeddings(path: Path, rows: int = 5, ids: list[Any] | None = None) -> Header:
    vectors = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3) / 7
    return save_embeddings(path, vectors, list(range(rows)) if ids is None else ids, kind="images", producer=PRODUCER)


def test_embeddings_round_trip(tmp_path: Path) -> None:
    ids = [7, "000000000007", -3, "ü/a b.jpg", 2**40]
    header = embeddings(tmp_path / "a.safetensors", ids=ids)
    found = load_embeddings(tmp_path / "a.safetensors", kind="images", dim=3, rows=5)
    assert found.ids == ids
    assert [type(i) for i in found.ids] == [type(i) for i in ids]
    assert found.header == header
    assert found.vectors.dtype == torch.float16
    assert torch.equal(found.vectors, (torch.arange(15.0).view(5, 3) / 7).half())
    assert (header.fingerprint, header.rows, header.dim, header.dtype) == (fingerprint(PRODUCER), 5, 3, "float16")


def test_embeddings_are_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    embeddings(path)
    found = load_embeddings(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert len(found.ids) == 5


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"kind": "texts"}, "kind=images and kind=texts is expected"),
        ({"dim": 4}, "dim=3 and dim=4 is expected"),
        ({"rows": 6}, "rows=5 and rows=6 is expected"),
        ({"fingerprint": "abc"}, f"fingerprint={fingerprint(PRODUCER)} and fingerprint=abc is expected"),
    ],
)
def test_a_header_that_does_not_fit_names_both_values(tmp_path: Path, wanted: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "a.safetensors"
    embeddings(path)
    with pytest.raises(InputError, match=rf"{path.name} has {sentence}"):
        load_embeddings(path, **wanted)


def rewritten(path: Path, **changes: Any) -> None:
    """The same tensors under a changed header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        meta, vectors = f.metadata(), f.get_tensor("embeddings").clone()
    save_file({"embeddings": vectors}, path, meta | {"header": canonical_json(json.loads(meta["header"]) | changes)})


def test_another_format_version_and_wrong_row_counts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    embeddings(path)
    rewritten(path, format_version=99)
    with pytest.raises(InputError, match="format_version=99 and format_version=1"):
        load_embeddings(path)
    rewritten(path, format_version=1, rows=4)
    with pytest.raises(InputError, match="rows=4 and rows=5"):
        load_embeddings(path)
    rewritten(path, rows=5, surprise=1)
    with pytest.raises(InputError, match="header this version cannot read"):
        load_embeddings(path)


@pytest.mark.parametrize("keep", [0, 3, 40, 400, -1])
def test_a_truncated_file_is_an_input_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    embeddings(path, rows=200)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.safetensors cannot be read"):
        load_embeddings(path)


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    save_file({"embeddings": torch.ones(2, 2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="has no header"):
        load_embeddings(tmp_path / "foreign.safetensors")
    with pytest.raises(MissingFileError, match=r"none\.safetensors is missing: run stage=preprocess"):
        load_embeddings(tmp_path / "none.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])  # 1e5 is infinite in float16
def test_a_row_that_is_not_finite_is_refused_and_named(tmp_path: Path, bad: float) -> None:
    vectors = torch.ones(4, 3)
    vectors[2, 1] = vectors[3, 0] = bad
    with pytest.raises(InputError, match=r"'c' \(and 1 more\) is not finite"):
        save_embeddings(tmp_path / "a.safetensors", vectors, ["a", "b", "c", "d"], kind="images", producer=PRODUCER)
    assert list(tmp_path.iterdir()) == []


def test_rows_and_ids_must_be_as_many(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 rows and 2 ids"):
        embeddings(tmp_path / "a.safetensors", ids=[1, 2])


def test_sentences_round_trip(tmp_path: Path) -> None:
    sentences = ["A dog\u2028runs.", "Ünï — 犬.", ""]
    path = tmp_path / "s.safetensors"
    save_sentences(path, sentences, producer=PRODUCER, counts={"read": 4, "empty": 1})
    found, counts = load_sentences(path)
    assert found == sentences
    assert list(found) == sentences
    assert (found[-2], found[1:], len(found), counts) == (sentences[1], sentences[1:], 3, {"read": 4, "empty": 1})
    with pytest.raises(IndexError, match="sentence 3 of 3"):
        found[3]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"s\.safetensors cannot be read"):
        load_sentences(path)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="left out: memory is read from Linux's /proc")
def test_sentences_are_read_from_the_disk_and_not_kept(tmp_path: Path) -> None:
    """Opening a corpus of 30 MB and reading a few of its sentences takes no memory of its own."""
    save_sentences(
        tmp_path / "s.safetensors", ["A sentence of thirty letters."] * 1_000_000, producer=PRODUCER, counts={}
    )
    before = anonymous_bytes()
    found, _ = load_sentences(tmp_path / "s.safetensors")
    assert found[999_999] == "A sentence of thirty letters."
    assert anonymous_bytes() - before < 5_000_000


# ------------------------------------------------------------------------------------------------------------ made once

MAKER = """
import sys, time
from pathlib import Path
from cgtgan.runtime.artifacts import atomic_path
from cgtgan.runtime.store import ArtifactStore
path, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def write(path):
    with log.open("a") as f:
        f.write("write\\n")
    print("in", flush=True)
    time.sleep(seconds)
    with atomic_path(path) as beside:
        beside.write_text("whole")
store = ArtifactStore(path.parent, lambda text: print(text, flush=True))
print("made", store.make(path, write), path.read_text(), flush=True)
"""


def test_two_jobs_make_one_artifact(tmp_path: Path) -> None:
    path, log = tmp_path / "store" / "a.bin", tmp_path / "log"
    first = python(MAKER, path, log, 1.5)
    assert first.stdout is not None
    assert first.stdout.readline() == "in\n"
    others = [python(MAKER, path, log, 0) for _ in range(2)]
    outputs = [p.communicate()[0] for p in (first, *others)]
    assert [p.returncode for p in (first, *others)] == [0, 0, 0]
    assert log.read_text() == "write\n"
    assert outputs[0] == "made True whole\n"
    for output in outputs[1:]:
        assert output.splitlines()[-1] == "made False whole"


def test_who_waits_says_so(tmp_path: Path) -> None:
    path, log = tmp_path / "a.bin", tmp_path / "log"
    store = ArtifactStore(tmp_path)
    with store.lock(path):
        waiting = python(MAKER, path, log, 0)
        assert waiting.stdout is not None
        assert "waiting for another job" in waiting.stdout.readline()
        assert not log.exists()
    assert waiting.communicate()[0].splitlines()[-1] == "made True whole"


def test_the_lock_of_a_killed_job_is_free_and_its_leftovers_go(tmp_path: Path) -> None:
    path, log = tmp_path / "a.bin", tmp_path / "log"
    killed = python(MAKER, path, log, 60)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "in\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (tmp_path / ".a.bin.4242.tmp").write_text("half")
    printed: list[str] = []
    assert ArtifactStore(tmp_path, printed.append).make(path, lambda p: write_text(p, "mine"))
    assert printed == []
    assert path.read_text() == "mine"
    assert not (tmp_path / ".a.bin.4242.tmp").exists()


def test_what_a_job_left_that_was_killed_after_the_last_rename_goes(tmp_path: Path) -> None:
    path = tmp_path / "a-1.bin"
    store = ArtifactStore(tmp_path)
    store.make(path, lambda p: write_text(p, "x"))
    kept = [tmp_path / name for name in ("a-1.bin", "a-11.bin.training", ".a-11.bin.host-1.tmp")]
    for file in kept[1:]:
        file.write_text("another artifact's")

    def leave() -> None:
        for name in ("a-1.bin.training", ".a-1.bin.host-1.tmp", ".a-1.bin.training.host-1.tmp"):
            (tmp_path / name).write_text("half")
        (tmp_path / "a-1.shards-8").mkdir(exist_ok=True)
        (tmp_path / "a-1.shards-8" / "000000.safetensors").write_text("piece")

    leave()
    with store.lock(path):  # a job is still at it
        writer = python("import sys; from pathlib import Path; from cgtgan.runtime.store import ArtifactStore\n"
                        "ArtifactStore(Path('.')).tidy(Path(sys.argv[1]))", path)  # fmt: skip
        assert writer.communicate()[1] == ""
    assert (tmp_path / "a-1.bin.training").exists()
    assert not store.make(path, lambda p: write_text(p, "y"))
    assert sorted(p for p in tmp_path.iterdir() if p.suffix != ".lock") == sorted(kept)
    assert path.read_text() == "x"


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    store, calls = ArtifactStore(tmp_path), []

    def write(path: Path) -> None:
        calls.append(path)
        write_text(path, "x")

    path = store.path("images", PRODUCER, ".bin")
    assert path.name == f"images-{fingerprint(PRODUCER)}.bin"
    assert [store.make(path, write), store.make(path, write)] == [True, False]
    assert calls == [path]
    assert store.path("images", PRODUCER | {"t": 175.0}, ".bin") != path


# -------------------------------------------------------------------------------------------------------- flipped bits


def flip(path: Path) -> None:
    """One bit of the last byte, as a disk may do."""
    content, modified = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(modified, modified + 10**9))  # the clock of a file system is coarse


def test_a_flipped_bit_of_embeddings_or_sentences_is_noticed_and_the_file_is_made_again(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.safetensors", tmp_path / "s.safetensors"
    for _ in range(2):
        save_embeddings(path, torch.ones(3, 2), [1, 2, 3], kind="image_embeddings", producer=PRODUCER)
        save_sentences(texts, ["One.", "Two."], producer=PRODUCER, counts={})
        for file, load in ((path, load_embeddings), (texts, load_sentences)):
            load(file)
            os.utime(file)  # another time alone is no other content
            load(file)
            flip(file)
            with pytest.raises(InputError, match=rf"{file.name} is not as it was written: delete the file"):
                load(file)
            file.unlink()
    save_embeddings(path, torch.zeros(4, 2), [1, 2, 3, 4], kind="image_embeddings", producer=PRODUCER)
    assert len(load_embeddings(path).ids) == 4


def test_embeddings_of_an_older_version_are_taken_as_they_are_and_watched_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_embeddings(path, torch.ones(3, 2), [1, 2, 3], kind="image_embeddings", producer=PRODUCER)
    for record in tmp_path.glob(".*.sha256"):
        record.unlink()
    load_embeddings(path)
    flip(path)
    with pytest.raises(InputError, match="is not as it was written"):
        load_embeddings(path)


def test_a_fingerprint_is_computed_once_for_a_size_a_time_and_an_inode(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    first = kept_fingerprint(path)
    assert first == file_fingerprint(path)
    (record,) = tmp_path.glob(".weights.sha256")
    record.write_text(record.read_text().replace(first, "0" * 12))
    assert kept_fingerprint(path) == "0" * 12  # read from the record
    other = tmp_path / "other"
    other.write_bytes(b"b" * 1000)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)  # same size, same time, another inode
    assert kept_fingerprint(path) == file_fingerprint(path) != first
    record.write_text("[]")
    assert kept_fingerprint(path) == file_fingerprint(path)

"""The authors' pickles: every layout and protocol is read, wrong content is named, nothing in them is ever run."""

import builtins
import collections
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cgtgan.config import GeneratorConfig
from cgtgan.data.plain_pickle import load_plain_pickle
from cgtgan.data.released import (
    ReleasedCorpus,
    ReleasedImages,
    ReleasedPairs,
    ReleasedSentences,
    read_model,
    read_released,
)
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.generator_bundle import make_generator, make_tokenizer
from cgtgan.models.released_generator import load_released_generator


def vectors(rows: int, dim: int = 6) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows)).half()


def entries(rows: list[int], captions: list[Any]) -> list[dict[str, Any]]:
    return [{"image_id": str(100 + r), "clip_embedding": r, "caption": c} for r, c in zip(rows, captions, strict=True)]


def read(tmp_path: Path, content: Any, protocol: int = pickle.DEFAULT_PROTOCOL, name: str = "x.pkl") -> Any:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return read_released(path, "dataset.released")


@pytest.mark.parametrize("protocol", range(6))
def test_every_layout_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    v = vectors(3)
    images = read(tmp_path, {"clip_embedding": v, "captions": entries([2, 0, 1], [["A."], [], ["B.", "C."]])}, protocol)
    assert isinstance(images, ReleasedImages)
    assert images.ids == ["102", "100", "101"]
    assert torch.equal(images.vectors, v[[2, 0, 1]])
    assert images.references == {"102": ["A."], "101": ["B.", "C."]}

    corpus = read(tmp_path, {"clip_embedding": v, "captions": entries([1, 0, 2], ["A.", "B.", "C."])}, protocol)
    assert isinstance(corpus, ReleasedCorpus)
    assert corpus.sentences == ["A.", "B.", "C."]
    assert torch.equal(corpus.vectors, v[[1, 0, 2]])

    # the tensors of a pair may be rows of one storage, which is then pickled whole
    pairs = read(tmp_path, [{"image": v[i], "caption": v.T.contiguous().T[i]} for i in range(3)], protocol)
    assert isinstance(pairs, ReleasedPairs)
    assert torch.equal(pairs.images, v)
    assert torch.equal(pairs.aggregated, v)

    sentences = read(tmp_path, ["A.", "B."], protocol)
    assert isinstance(sentences, ReleasedSentences)
    assert sentences.sentences == ["A.", "B."]


def test_float32_embeddings_are_kept_as_float16(tmp_path: Path) -> None:
    found = read(tmp_path, {"clip_embedding": vectors(2).float(), "captions": entries([0, 1], ["A.", "B."])})
    assert found.vectors.dtype == torch.float16


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {"clip_embedding": vectors(2), "captions": entries([0, 2], ["A.", "B."])},
            "row 2 has no embedding: there are 2",
        ),
        ({"clip_embedding": vectors(2), "captions": entries([0, -1], ["A.", "B."])}, "row -1 has no embedding"),
        ({"clip_embedding": vectors(2), "captions": []}, "'captions' is no list with entries"),
        ({"clip_embedding": vectors(2), "captions": [{"clip_embedding": 0}]}, "an entry has no 'caption'"),
        (
            {"clip_embedding": vectors(2), "captions": entries([0, 1], ["A.", ["B."]])},
            "captions of image 100 are no list of strings",
        ),
        ({"clip_embedding": vectors(2), "captions": entries([0, 0], [["A."], ["B."]])}, "an image id occurs twice"),
        ({"clip_embedding": vectors(2)[0], "captions": entries([0], ["A."])}, r"no \(N, D\) tensor"),
        ({"clip_embedding": vectors(2).int(), "captions": entries([0], ["A."])}, r"no \(N, D\) tensor"),
        (
            {"clip_embedding": vectors(2) / 0, "captions": entries([0], ["A."])},
            "row 0 of 'clip_embedding' is not finite",
        ),
        ([{"image": vectors(1)[0], "caption": vectors(1)[0]}, {"image": vectors(1)[0]}], "an entry has no 'caption'"),
        (
            [{"image": vectors(1)[0], "caption": vectors(1)[0]}, {"image": vectors(1, 4)[0], "caption": vectors(1)[0]}],
            "not all of one",
        ),
        ([["<S>", "a", "</S>"]], "none of the authors' layouts"),
        ([], "none of the authors' layouts"),
        ({"a": 1}, "none of the authors' layouts"),
        (b"no pickle at all", "is no whole pickle"),
        (b"", "is empty"),
        (pickle.dumps({"clip_embedding": vectors(2), "captions": entries([0], ["A."])})[:-40], "is no whole pickle"),
        (b"<!DOCTYPE html><html>", "holds a web page"),
    ],
)
def test_other_content_is_answered_by_a_sentence(tmp_path: Path, content: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        read(tmp_path, content)
    assert "x.pkl" in str(raised.value)
    assert "dataset.released" in str(raised.value)


def test_the_cache_of_tokens_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="their cache of tokens"):
        read(tmp_path, [torch.ones(3, dtype=torch.long)], name="coco_tokens.pkl")
    with pytest.raises(MissingFileError, match=r"nothing\.pkl"):
        read_released(tmp_path / "nothing.pkl", "dataset.released")


# -------------------------------------------------------------------------------------------------------------- attacks


class Calls:
    """Unpickled by an ordinary reader, it calls `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(target: Path) -> dict[str, bytes]:
    touch, code = f"touch {target}", f"open({str(target)!r}, 'w')"
    inner = pickle.dumps(Calls(os.system, touch), protocol=2)
    legacy = (
        b"".join(pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {})) + inner
    )  # torch's old file format
    storage = Calls(torch.storage._load_from_bytes, legacy)
    return {
        "posix.system": pickle.dumps({"clip_embedding": Calls(os.system, touch), "captions": []}),
        "in a list": pickle.dumps(["A.", Calls(builtins.exec, code)]),
        "protocol 0": pickle.dumps([Calls(os.system, touch)], protocol=0),
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
        "nested in a tensor": pickle.dumps({"clip_embedding": storage, "captions": []}),
        "raw pickle as a storage": pickle.dumps([Calls(torch.storage._load_from_bytes, inner)]),
        "torch.load": pickle.dumps([Calls(torch.load, str(target))]),
        "dotted name": b"\x80\x04\x8c\x0btorch._utils\x8c\x0fwarnings.sys.os\x93.",
        "inst": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + touch.encode() + b"'\no.",
        "extension": b"\x82\x01.",
        "persistent id": b"Px\n.",
        "build": b"ccollections\nOrderedDict\n)R}S'__class__'\ncos\nsystem\nsb.",
    }


@pytest.mark.parametrize("name", payloads(Path("x")))
def test_a_pickle_that_carries_code_is_refused(tmp_path: Path, name: str) -> None:
    target = tmp_path / "owned"
    path = tmp_path / "bad.pkl"
    path.write_bytes(payloads(target)[name])
    for reader in (lambda: read_released(path, "dataset.released"), lambda: load_plain_pickle(path, "corpus.path")):
        with pytest.raises(InputError, match=r"bad\.pkl"):
            reader()
        assert not target.exists()


def test_the_payloads_are_real(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    pickle.loads(payloads(target)["posix.system"])
    assert target.exists()


def test_a_refusal_says_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "bad.pkl").write_bytes(payloads(tmp_path / "owned")["posix.system"])
    with pytest.raises(InputError, match=r"is refused: it asks for posix\.system; only plain lists"):
        read_released(tmp_path / "bad.pkl", "dataset.released")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        *((0, (3, 6), (6, 1)), (7, (6,), (1,)), (-1, (2,), (1,)), (0, (2, 6), (60, 1)), (0, (2,), (-1,))),
        (0, (4_000_000_000,), (0,)),  # 8 GB of one element
        (0, (0, 1 << 70), (1, 1)),
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    class Crooked:
        def __reduce__(self) -> Any:
            storage = torch.storage.TypedStorage(
                wrap_storage=vectors(2).untyped_storage(), dtype=torch.half, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, collections.OrderedDict())

    with pytest.raises(InputError, match="lies outside of its storage"):
        read(tmp_path, {"clip_embedding": Crooked(), "captions": []})


def test_views_that_share_a_storage_are_no_larger_than_it(tmp_path: Path) -> None:
    class View:
        def __init__(self, storage: Any):
            self.storage = storage

        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (self.storage, 0, (6,), (1,), False, collections.OrderedDict())

    storage = torch.storage.TypedStorage(wrap_storage=vectors(1).untyped_storage(), dtype=torch.half, _internal=True)
    with pytest.raises(InputError, match="lies outside of its storage"):
        read(tmp_path, [{"image": View(storage), "caption": View(storage)} for _ in range(3)])
    row = vectors(1)[0]
    with pytest.raises(InputError, match="one of the 'image' tensors stands for several rows"):
        read(tmp_path, [{"image": row, "caption": row}] * 1000)


NESTED = b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."  # a dict whose key is a tuple in a tuple in a tuple ...
HIDING = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\x80\x02]r\xff\xff\xff\x1f.", "holds none of the authors' layouts"),  # C's reader: 8 GB for the memo
        (b"]p4000000000\n.", "holds none of the authors' layouts"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.", "no whole pickle"),
        (b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"x.", "no whole pickle"),
        (NESTED, "keys that are neither names nor numbers"),
        (NESTED.replace(b"})", b"}()").replace(b"s.", b"u."), "keys that are neither names nor numbers"),
        (b"\x80\x02()" + NESTED[4:-2] + b"d.", "keys that are neither names nor numbers"),
        (HIDING, "asks for objects"),
        (b"\x80\x04\x8f(" + NESTED[3:-4] + b"\x90.", "asks for objects"),  # a set
        (b"(" * 500_000 + b"l" * 500_000 + b".", "holds none of the authors' layouts"),
    ],
)
def test_a_small_hostile_pickle_costs_little(tmp_path: Path, content: bytes, sentence: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=sentence):
        read(tmp_path, content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_every_flipped_byte_is_a_sentence_or_an_answer(tmp_path: Path) -> None:
    content = pickle.dumps({"clip_embedding": vectors(2, 3), "captions": entries([0, 1], ["A.", "B."])}, protocol=2)
    answers = 0
    for place in range(len(content)):
        flipped = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        try:
            answers += isinstance(read(tmp_path, flipped), ReleasedCorpus)
        except InputError:
            continue
    assert answers > 0  # such as a flipped number


# ------------------------------------------------------------------------------------------------------------- model.pt


def test_a_model_is_its_weights_less_the_two_buffers(tmp_path: Path) -> None:
    state = {"gpt.transformer.h.0.attn.bias": torch.ones(1), "gpt.transformer.h.0.attn.masked_bias": torch.ones(1)}
    kept = {"gpt.transformer.h.0.attn.c_attn.bias": torch.ones(2), "clip_project.model.0.weight": torch.ones(1, 1)}
    path = tmp_path / "model.pt"
    for prefix in ("", "module."):
        torch.save({prefix + k: v for k, v in (state | kept).items()}, path)
        assert read_model(path, "checkpoint").keys() == kept.keys()


@pytest.mark.parametrize("content", [b"", b"no weights", struct.pack("<Q", 2**40) + b"{}"])
def test_what_is_no_model_is_answered_by_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint=.*model\.pt"):
        read_model(path, "checkpoint")


def test_a_model_that_carries_code_is_refused(tmp_path: Path) -> None:
    path, target = tmp_path / "model.pt", tmp_path / "owned"
    torch.save({"gpt.x": Calls(os.system, f"touch {target}")}, path)
    with pytest.raises(InputError, match=r"it asks for posix\.system; only weights are read"):
        read_model(path, "checkpoint")
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds a list"):
        read_model(path, "checkpoint")
    assert not target.exists()


def test_weights_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    one = torch.zeros(1)
    for state, sentence in (
        ({"a": one.expand(1_000_000_000)}, "a is larger than what the file holds"),
        ({str(i): one for i in range(9)}, "its tensors are larger than what the file holds"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is no plain tensor"),
        ({}, "holds nothing"),
    ):
        torch.save(state, path)
        with pytest.raises(InputError, match=sentence):
            read_model(path, "checkpoint")
    torch.save({"a": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "p.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(InputError, match="archive is compressed"):
        read_model(tmp_path / "p.pt", "checkpoint")


def test_a_state_dict_that_hides_its_methods_is_read_by_dicts_own(tmp_path: Path) -> None:
    hiding = collections.OrderedDict({"gpt.x": torch.ones(2)})
    hiding.itemz, hiding.keyz = 1, 1  # type: ignore[attr-defined]
    torch.save(hiding, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "model.pt").read_bytes().replace(b"itemz", b"items").replace(b"keyz", b"keys")
    (tmp_path / "model.pt").write_bytes(content)
    assert list(read_model(tmp_path / "model.pt", "checkpoint")) == ["gpt.x"]


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(InputError, match=r"is a git-lfs pointer.*git lfs pull"):
        read_model(tmp_path / "model.pt", "checkpoint")


SMALL: dict[str, Any] = {
    "language_model": "scratch",
    "tokenizer": "corpus",
    "vocab_size": 300,
    "heads": 2,
    "mapper_heads": 2,
}


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_every_size_is_read_off_the_weights(mapper: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "layers": 3,
        "width": 16,
        "prefix_length": 5,
        "clip_length": 3,
        "mapper_layers": 2,
        "max_length": 7,
    }
    config = GeneratorConfig(**SMALL, **sizes, mapper=mapper)
    ours = make_generator(config, make_tokenizer(config, []), 6, seed=0)
    state = dict(ours.model.state_dict())
    found = load_released_generator(state, GeneratorConfig(**SMALL, max_length=7), "checkpoint=model.pt")
    assert found.clip_dim == 6
    assert (found.config.layers, found.config.width, found.config.prefix_length) == (3, 16, 5)
    embedding = vectors(4).float()
    for a, b in zip(found.model.eval().greedy(embedding), ours.model.eval().greedy(embedding), strict=True):
        assert torch.equal(a, b)

    # a folder of the language model, as from_pretrained reads it, says the heads itself
    ours.model.gpt.save_pretrained(tmp_path)
    named = GeneratorConfig(**SMALL | {"language_model": str(tmp_path), "heads": 12}, max_length=7)
    assert load_released_generator(state, named, "checkpoint=model.pt").config.heads == 2

    del state["gpt.lm_head.weight"]  # not all versions of transformers store what is tied
    load_released_generator(state, GeneratorConfig(**SMALL, max_length=7), "checkpoint=model.pt")
    for wrong, sentence in (
        ({k: v for k, v in state.items() if "c_proj" not in k}, r"lacks gpt\.transformer\.h\.0\.attn\.c_proj"),
        (state | {"gpt.other": torch.ones(1)}, r"also has gpt\.other"),
        ({k: v for k, v in state.items() if "wte" not in k}, r"gpt\.transformer\.wte\.weight' is missing"),
        ({k: v for k, v in state.items() if "clip_project" not in k}, r"clip_project.* is missing"),
        (
            state | {"gpt.lm_head.weight": torch.ones_like(state["gpt.transformer.wte.weight"])},
            "differs from the word embedding",
        ),
        (
            state | {"gpt.transformer.h.1000000000.ln_1.bias": torch.ones(16)},
            r"layers gpt\.transformer\.h\. do not count",
        ),
        (
            state | {"gpt.transformer.ln_f.bias": torch.tensor(1.0)},
            r"ln_f\.bias is \(\) torch\.float32, numbers \(16,\)",
        ),
        (state | {"gpt.transformer.wpe.weight": torch.tensor(1.0)}, "a weight has another shape"),
        (state | {"gpt.transformer.wte.weight": torch.ones(300, 40_000)}, "is no generator|does not fit|lacks"),
        (state | {"gpt.transformer.ln_f.bias": torch.ones(16).int()}, "torch.int32"),
        (
            state | dict.fromkeys(("clip_project.model.2.bias", "clip_project.linear.bias"), torch.tensor(1.0)),
            "a weight has another shape",
        ),
    ):
        with pytest.raises(InputError, match=r"checkpoint=model\.pt") as raised:
            load_released_generator(wrong, GeneratorConfig(**SMALL, max_length=7), "checkpoint=model.pt")
        raised.match(sentence)
    with pytest.raises(InputError, match=r"max_length=90 after 5"):
        load_released_generator(state, GeneratorConfig(**SMALL, max_length=90), "checkpoint=model.pt")

"""Models in folders and by hub name: their content tells them apart, and what is wrong with them is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cgtgan.assets.released import generator_producer
from cgtgan.config import ClipBackboneConfig, DiscriminatorConfig, GeneratorConfig
from cgtgan.errors import InputError, MissingFileError, UserError
from cgtgan.models.backbone_identity import backbone_identity
from cgtgan.models.discriminator import make_discriminator
from cgtgan.models.generator_bundle import make_generator, make_tokenizer
from cgtgan.models.load_backbone import load_backbone
from cgtgan.models.tokenizers import END_OF_TEXT, ROBERTA_SPECIALS, train_tokenizer
from cgtgan.models.weights import model_identity
from cgtgan.runtime.fingerprints import kept_fingerprint
from cgtgan.runtime.store import ArtifactStore

ROOT = Path(__file__).resolve().parents[2]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n"
SENTENCES = ["A dog runs.", "Two cats."]


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    """A GPT-2 of some hundred weights, with tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path / "gpt"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_layer=1, n_head=1, n_embd=8, n_positions=40)).save_pretrained(folder)
    backend = train_tokenizer(SENTENCES, 300, [END_OF_TEXT]).backend
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT).save_pretrained(folder)
    return folder


def generator(folder: Path) -> Any:
    config = GeneratorConfig(language_model=str(folder), max_length=5, prefix_length=2)
    return make_generator(config, make_tokenizer(config, []), 4, 0)


# ----------------------------------------------------------------------------------------------------------- identities


def test_a_folder_is_known_by_its_content(language_model: Path, tmp_path: Path) -> None:
    first = model_identity(str(language_model))
    assert set(first["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    moved = tmp_path / "moved"
    shutil.copytree(language_model, moved)
    (moved / "README.md").write_text("Another read-me is no other model.")
    assert model_identity(str(moved)) == first
    weights = moved / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    assert model_identity(str(moved)) != first
    assert backbone_identity(ClipBackboneConfig(kind="huggingface", model=str(language_model))) != backbone_identity(
        ClipBackboneConfig(kind="huggingface", model=str(moved))
    )


def test_a_generator_is_named_by_its_language_models_content(language_model: Path, tmp_path: Path) -> None:
    store, moved = ArtifactStore(tmp_path / "artifacts"), tmp_path / "moved"
    shutil.copytree(language_model, moved)
    first = generator_producer(GeneratorConfig(language_model=str(language_model)), store)
    assert generator_producer(GeneratorConfig(language_model=str(moved)), store) == first
    (moved / "model.safetensors").write_bytes(b"another training")
    assert generator_producer(GeneratorConfig(language_model=str(moved)), store) != first
    scratch = GeneratorConfig(language_model="scratch", tokenizer="corpus")
    assert set(generator_producer(scratch, store)) == {"generator"}  # as 0.1 had it


def test_an_archive_is_known_by_all_of_its_bytes(tmp_path: Path) -> None:
    """Version 0.1 read the first and last MiB."""
    path = tmp_path / "clip.pt"
    content = bytearray(3 << 20)
    path.write_bytes(content)
    config = ClipBackboneConfig(kind="openai", model=str(path))
    first = backbone_identity(config)
    assert backbone_identity(config) == first
    content[3 << 19] = 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert backbone_identity(config) != first


def test_a_fingerprint_is_kept_elsewhere_where_the_folder_cannot_be_written(tmp_path: Path) -> None:
    """A name of 254 characters leaves no room for the record's name: for root no folder is read-only."""
    path, records = tmp_path / ("x" * 254), tmp_path / "records"
    path.write_bytes(b"weights")
    first = kept_fingerprint(path, records)
    (record,) = records.iterdir()
    record.write_text(record.read_text().replace(first, "0" * 12))
    assert kept_fingerprint(path, records) == "0" * 12  # read from the record, not from the file
    path.write_bytes(b"other weights")
    assert kept_fingerprint(path, records) not in (first, "0" * 12)


def test_another_bpe_file_of_the_same_name_is_another(tmp_path: Path) -> None:
    path = tmp_path / "words.txt.gz"
    seen = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        seen.append(backbone_identity(ClipBackboneConfig(kind="random", tokenizer=str(path))))
    assert seen[0] != seen[1]


def test_a_hub_name_is_known_by_its_commit(language_model: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its folder from the environment when it is imported."""
    cache = tmp_path / "hub"
    for commit, layers in (("a" * 40, 1), ("b" * 40, 2)):
        snapshot = cache / "models--owner--name/snapshots" / commit
        shutil.copytree(language_model, snapshot)
        settings = json.loads((snapshot / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps(settings | {"n_layer": layers}))
    (cache / "models--owner--name/refs").mkdir()
    script = (
        "import json; from cgtgan.models.weights import model_identity, load_pretrained, pinned\n"
        "from transformers import AutoConfig\n"
        "config = load_pretrained(AutoConfig.from_pretrained, 'owner/name', 'x', 'model')\n"
        "print(json.dumps([model_identity('owner/name'), config.n_layer, model_identity('no/body'), "
        "pinned('owner/name'),\n"
        "  load_pretrained(AutoConfig.from_pretrained, 'owner/name@" + "a" * 40 + "', 'x', 'model').n_layer]))"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for commit, layers in (("a" * 40, 1), ("b" * 40, 2)):
        (cache / "models--owner--name/refs/main").write_text(commit)
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        named, found, unknown, exact, first_layers = json.loads(done.stdout)
        assert named == {"model": "owner/name", "commit": commit}
        assert (found, first_layers) == (layers, 1)
        assert unknown == {"model": "no/body"}
        assert exact == f"owner/name@{commit}"


# ------------------------------------------------------------------------------------------------------------ sentences


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(language_model: Path, name: str) -> None:
    (language_model / name).write_text(POINTER)
    with pytest.raises(MissingFileError, match=rf"generator\.language_model=\S+: {name} there is a git-lfs pointer"):
        generator(language_model)
    with pytest.raises(MissingFileError, match=rf"clip_backbone\.model=\S+: {name} there is a git-lfs pointer"):
        load_backbone(ClipBackboneConfig(kind="huggingface", model=str(language_model)), torch.device("cpu"))


def test_a_pointer_in_the_place_of_an_encoder_or_a_vocabulary_is_named(language_model: Path, tmp_path: Path) -> None:
    (language_model / "model.safetensors").rename(language_model / "pytorch_model.bin")
    (language_model / "pytorch_model.bin").write_text(POINTER)
    words = tmp_path / "words"
    words.mkdir()
    train_tokenizer(SENTENCES, 300, ROBERTA_SPECIALS).backend.model.save(str(words))
    config = DiscriminatorConfig(encoder=str(language_model), tokenizer="corpus")
    with pytest.raises(MissingFileError, match=r"discriminator\.encoder=\S+: pytorch_model\.bin .*git lfs pull"):
        make_discriminator(config, SENTENCES, 5, 0)
    (words / "merges.txt").write_text(POINTER)
    config = DiscriminatorConfig(encoder="scratch", tokenizer=str(words))
    with pytest.raises(MissingFileError, match=r"discriminator\.tokenizer=\S+: merges\.txt .*git lfs pull"):
        make_discriminator(config, SENTENCES, 5, 0)


@pytest.mark.parametrize("length", [0, 7, 300, 1500])
def test_weights_that_are_cut_off_are_called_damaged(language_model: Path, length: int) -> None:
    weights = language_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(UserError, match=r"generator\.language_model=\S+: the language model there is damaged \("):
        generator(language_model)


def test_what_is_wrong_with_a_folder_is_said(language_model: Path) -> None:
    assert generator(language_model).model.gpt.config.n_embd == 8
    settings = json.loads((language_model / "config.json").read_text())
    (language_model / "config.json").write_text(json.dumps(settings | {"model_type": "vit"}))
    with pytest.raises(InputError, match=r"generator\.language_model=\S+: what is there cannot be used as"):
        generator(language_model)
    (language_model / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"generator\.language_model=\S+: config\.json there is no JSON"):
        generator(language_model)
    (language_model / "config.json").unlink()
    with pytest.raises(UserError, match=r"generator\.language_model=\S+: (no|what is)"):
        generator(language_model)
    with pytest.raises(MissingFileError, match=r"generator\.language_model=\S+none: no tokenizer is found there"):
        generator(language_model / "none")

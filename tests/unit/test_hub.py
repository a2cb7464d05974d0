"""Models of a hub: fetched from a server on this machine, used without a network then, and one attempt without both.

In processes of their own: the hub's client reads its settings from the environment when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cgtgan.models.tokenizers import END_OF_TEXT, train_tokenizer
from tests.hub_server import COMMIT, HubServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    hub = HubServer()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a tiny GPT-2, and some that a repository of models has too."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_layer=1, n_head=1, n_embd=8, n_positions=40)).save_pretrained(folder)
    backend = train_tokenizer(["A dog runs."], 300, [END_OF_TEXT]).backend
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT).save_pretrained(folder)
    others = {
        "pytorch_model.bin": b"the same weights",
        "onnx/model.onnx": b"of another program",
        "README.md": b"a page",
    }
    return {path.name: path.read_bytes() for path in folder.iterdir()} | others


def python(home: Path, hub: HubServer, script: str, *arguments: str, **environment: str) -> str:
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=os.environ | settings | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FETCH = """
import sys
from cgtgan.models.hub import cached_snapshot, fetch_model, missing_model
print(missing_model(sys.argv[1], "generator.language_model"))
fetch_model(sys.argv[1], "generator.language_model")
print(missing_model(sys.argv[1], "generator.language_model"))
print(*sorted(file.name for file in cached_snapshot(sys.argv[1]).iterdir()))
"""
LOAD = """
import sys
from cgtgan.config import GeneratorConfig
from cgtgan.models.generator_bundle import make_generator, make_tokenizer
for name in sys.argv[1:]:
    config = GeneratorConfig(language_model=name, max_length=5, prefix_length=2)
    print(make_generator(config, make_tokenizer(config, []), 4, 0).model.gpt.config.n_embd)
"""


def of_models(hub: HubServer) -> list[str]:
    """The requests, without those in which the client asks about itself."""
    return [request for request in hub.requests if "owner/" in request]


def test_a_model_is_fetched_with_one_kind_of_weights_and_loaded_without_a_network(hub, model, tmp_path) -> None:
    hub.models["owner/tiny"] = model
    missing, nothing, names = python(tmp_path, hub, FETCH, "owner/tiny").splitlines()
    assert missing.startswith("generator.language_model=owner/tiny is not in the hub's cache here: run `hf download ")
    assert nothing == "None"
    chosen = {name for name in model if name.endswith((".json", ".txt", ".safetensors"))}
    assert set(names.split()) == chosen
    hub.requests.clear()
    assert python(tmp_path, hub, LOAD, "owner/tiny", f"owner/tiny@{COMMIT}") == "8\n8\n"
    assert of_models(hub) == []


def test_a_commit_is_fetched_as_such(hub, model, tmp_path) -> None:
    hub.models["owner/tiny"] = model
    output = python(tmp_path, hub, FETCH, f"owner/tiny@{COMMIT}").splitlines()
    assert f"`hf download owner/tiny --revision {COMMIT}`" in output[0]
    assert output[1] == "None"


def test_a_model_without_safetensors_brings_the_other_weights(hub, model, tmp_path) -> None:
    hub.models["owner/old"] = {name: content for name, content in model.items() if not name.endswith(".safetensors")}
    assert "pytorch_model.bin" in python(tmp_path, hub, FETCH, "owner/old").splitlines()[2].split()


NO_LOADER = """
from cgtgan.errors import MissingFileError
from cgtgan.models.weights import hub_commit, load_pretrained
def load(*place, **settings):
    raise AssertionError("a loader of transformers is called, which asks six times in a minute")
for what in ("tokenizer", "language model"):
    try:
        hub_commit("owner/tiny")
        load_pretrained(load, "owner/tiny", "generator.language_model", what)
    except MissingFileError as error:
        print(error)
"""


@pytest.mark.parametrize(("case", "reason"), [("gone", "404"), ("away", "503"), ("offline", "offline mode is enabled")])
def test_one_attempt_and_the_way_without_a_network(hub, tmp_path, case, reason) -> None:
    hub.away = case == "away"
    environment = {"HF_HUB_OFFLINE": "1"} if case == "offline" else {}
    sentences = python(tmp_path, hub, NO_LOADER, **environment).splitlines()
    for sentence, what in zip(sentences, ("tokenizer", "language model"), strict=True):
        assert sentence.startswith(
            f"generator.language_model=owner/tiny: no whole {what} is in the hub's cache, and no"
        )
        assert reason in sentence
        assert "run `hf download owner/tiny` where there is a network" in sentence
        assert "HF_HUB_OFFLINE=1" in sentence
    assert len(of_models(hub)) == (case != "offline")


INIT = """
import sys
from cgtgan.assets.checkpoints import init_checkpoint
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config
from cgtgan.errors import UserError
cfg = Config()
for cfg.train.init_from in sys.argv[1:]:
    try:
        print(sorted(file.name for file in init_checkpoint(Workspace(cfg)).iterdir()))
    except UserError as error:
        print(error)
"""


def test_a_checkpoint_of_a_hub_is_fetched_once(hub, tmp_path) -> None:
    files = ["checkpoint.json", "generator.json", "generator.safetensors", "tokenizer.json"]
    hub.models["owner/run"] = {name: json.dumps({"file": name}).encode() for name in [*files, "training.safetensors"]}
    hub.models["owner/other"] = {"README.md": b"a page"}
    first, second, other, none = python(
        tmp_path, hub, INIT, "owner/run", "owner/run", "owner/other", "owner/none"
    ).splitlines()
    assert first == second == str(files)
    assert sum("GET" in request and "generator.safetensors" in request for request in hub.requests) == 1
    assert other.startswith("train.init_from=owner/other: that repository of the hub has neither a checkpoint nor a")
    assert none.startswith("train.init_from=owner/none cannot be fetched (404")
    assert sum("owner/none" in request for request in hub.requests) == 1


def test_a_tokenizer_alone_may_be_missing(hub, model, tmp_path) -> None:
    hub.models["owner/tiny"] = {name: content for name, content in model.items() if "token" not in name}
    output = python(tmp_path, hub, FETCH, "owner/tiny").splitlines()
    assert json.loads(model["config.json"])["n_embd"] == 8
    assert output[1].startswith("generator.language_model=owner/tiny is not in the hub's cache here")

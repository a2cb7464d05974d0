"""The authors' files through the command line: their captions token for token, and a training that starts from them."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tests.program import run_program

ROOT = Path(__file__).resolve().parents[2]
DIM, WIDTH, PREFIX = 64, 64, 10
WORDS = ["A dog runs.", "Two cats sleep on a mat.", "A red bus stops.", "A man rides a wave."]


def run(home: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return run_program([sys.executable, str(ROOT / "run.py"), *overrides], cwd=home, env=environment)


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their layouts, with random numbers: train pairs, val and test images, corpus, sentences, and a generator."""
    folder = tmp_path_factory.mktemp("authors")
    random = torch.Generator().manual_seed(0)

    def vectors(rows: int) -> Tensor:
        return torch.randn(rows, DIM, generator=random).half()

    def write(name: str, content: Any) -> None:
        (folder / name).write_bytes(pickle.dumps(content))

    for split, first in (("val", 100), ("test", 200)):
        captions = [{"image_id": first + i, "clip_embedding": i, "caption": [w, WORDS[i]]} for i, w in enumerate(WORDS)]
        write(f"coco_ViT-L_14_{split}.pkl", {"clip_embedding": vectors(4), "captions": captions})
    images, aggregated = vectors(12), vectors(12)
    write(
        "coco_images_coco_captions_ViT-L_14_100.pkl",
        [{"image": images[i], "caption": aggregated[i]} for i in range(12)],
    )
    order = np.random.RandomState(1024).permutation(20)
    sentences = [f"{w[:-1]} {n}." for n in range(5) for w in WORDS]
    captions = [{"image_id": str(i), "clip_embedding": row, "caption": sentences[i]} for row, i in enumerate(order)]
    write("coco_ViT-L_14_train_captions.pkl", {"clip_embedding": vectors(20), "captions": captions})
    write("coco_train_sentences.pkl", sentences)

    torch.manual_seed(1)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=WIDTH, n_head=1)).eval()
    state = {f"gpt.{k}": v for k, v in gpt.state_dict().items()}
    for layer in range(2):
        state[f"gpt.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 1024, 1024, dtype=torch.uint8).tril()
        state[f"gpt.transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    hidden = WIDTH * PREFIX // 2
    for name, shape in (
        ("0.weight", (hidden, DIM)),
        ("0.bias", (hidden,)),
        ("2.weight", (WIDTH * PREFIX, hidden)),
        ("2.bias", (640,)),
    ):
        state[f"clip_project.model.{name}"] = 0.2 * torch.randn(shape)
    torch.save(state, folder / "model.pt")
    return folder


def their_captions(files: Path, tokenizer: Any) -> dict[int, str]:
    """Greedy decoding written out: no cache, one image and one token at a time."""
    state = torch.load(files / "model.pt", weights_only=True)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=WIDTH, n_head=1)).eval()
    gpt.load_state_dict(
        {
            k[4:]: v
            for k, v in state.items()
            if k.startswith("gpt.") and not k.endswith((".attn.bias", ".attn.masked_bias"))
        }
    )
    mapper = {k.removeprefix("clip_project.model."): v for k, v in state.items() if k.startswith("clip_project.")}
    content = pickle.loads((files / "coco_ViT-L_14_test.pkl").read_bytes())
    captions = {}
    for entry in content["captions"]:
        x = content["clip_embedding"][entry["clip_embedding"]].float()
        x = torch.tanh(mapper["0.weight"] @ x + mapper["0.bias"])
        read = (mapper["2.weight"] @ x + mapper["2.bias"]).view(1, PREFIX, WIDTH)
        ids: list[int] = []
        while len(ids) < 20 and 13 not in ids:
            with torch.no_grad():
                ids.append(int(gpt(inputs_embeds=read).logits[0, -1].argmax()))
            read = torch.cat([read, gpt.transformer.wte.weight[ids[-1]].view(1, 1, -1)], dim=1)
        if 13 not in ids:
            ids[-1] = 13
        captions[entry["image_id"]] = tokenizer.decode([ids])[0]
    return captions


def test_their_checkpoint_gives_their_captions(files: Path, shared: Path, tmp_path: Path) -> None:
    from cgtgan.models.tokenizers import END_OF_TEXT, load_tokenizer

    folder = shared / "data/tokenizers/gpt2"
    command = [
        "stage=evaluate",
        f"checkpoint={files / 'model.pt'}",
        f"dataset.released={files / 'coco_ViT-L_14_test.pkl'}",
    ]
    command += [f"generator.tokenizer={folder}", "evaluate.metrics=[bleu,cider]", "wandb=disabled", "name=authors"]
    output = good(run(tmp_path, *command))
    assert "CgT-GAN" in output
    (found,) = (tmp_path / "runs/authors").rglob("evaluation/test/cgtgan/captions.json")
    captions = {row["image_id"]: row["caption"] for row in json.loads(found.read_text())}
    expected = their_captions(files, load_tokenizer(str(folder), "", [END_OF_TEXT]))
    assert len(set(expected.values())) > 1
    assert captions == expected
    assert not list(tmp_path.rglob("*image_embeddings-*"))  # nothing was encoded


TINY = [
    *(
        "experiment=coco_sample",
        "name=theirs",
        "dataset=coco",
        "corpus=coco",
        "clip_backbone.tokenizer=null",
        "train.steps=3",
    ),
    *(
        "corpus.max_sentences=null",
        "initialize.steps=4",
        "evaluate.metrics=[bleu,cider]",
        "evaluate.baselines=[]",
        "wandb=disabled",
    ),
    *(
        "dataset.images=null",
        "dataset.references=null",
        "dataset.root=nowhere",
        "corpus.path=null",
        "train.batch_size=3",
    ),
    *(
        "generator.tokenizer=corpus",
        "discriminator.tokenizer=corpus",
        "generator.vocab_size=300",
        "discriminator.vocab_size=300",
    ),
]


def test_training_starts_from_their_files(files: Path, tmp_path: Path) -> None:
    """Neither images nor annotations nor a corpus are there; the CLIP of the rewards is a random one."""
    command = [*TINY, f"dataset.released={files}"]
    good(run(tmp_path, *command, "stage=train"))
    assert "done already" in good(run(tmp_path, *command, "stage=train"))
    assert "CgT-GAN" in good(run(tmp_path, *command, "stage=evaluate"))
    page = good(run(tmp_path, *command))
    assert "report:" in page
    (html,) = tmp_path.rglob("report.html")
    assert "12 train, 4 val, 4 test" in html.read_text()
    assert "only its embedding is here" in html.read_text()

    wrong = run(tmp_path, *command, "stage=train", "aggregation_t.t=150")
    assert wrong.returncode == 1
    assert "aggregation_t.t=150 and dataset.released=" in wrong.stderr
    assert "was made with t=100" in wrong.stderr


def test_training_starts_from_their_generator(files: Path, shared: Path, tmp_path: Path) -> None:
    command = [
        *TINY,
        f"dataset.released={files}",
        "stage=train",
        f"train.init_from={files / 'model.pt'}",
        "generator.heads=1",
    ]
    command += [f"generator.tokenizer={shared / 'data/tokenizers/gpt2'}"]
    good(
        run(
            tmp_path,
            *command,
            "train.steps=1",
            "train.generator_optimizer.warmup_steps=1",
            "train.generator_optimizer.lr=1e-30",
        )
    )
    (trained,) = (tmp_path / "runs").rglob("checkpoints/last")
    from safetensors.torch import load_file

    state, theirs = load_file(trained / "generator.safetensors"), torch.load(files / "model.pt", weights_only=True)
    for name in ("gpt.transformer.h.1.mlp.c_fc.weight", "clip_project.model.2.weight"):
        torch.testing.assert_close(state[name], theirs[name], rtol=0, atol=1e-6)
    wrong = run(tmp_path, *command, "name=other", "train.init_from=nowhere.pt")
    assert wrong.returncode == 1
    assert "train.init_from=nowhere.pt" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_pickle_that_carries_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/owned",)

    bad = tmp_path / "coco_ViT-L_14_test.pkl"
    bad.write_bytes(pickle.dumps({"clip_embedding": Exploit(), "captions": []}))
    torch.save({"gpt.x": Exploit()}, tmp_path / "model.pt")
    content = {
        "clip_embedding": torch.ones(1, 4).half(),
        "captions": [{"image_id": 1, "clip_embedding": 0, "caption": ["A."]}],
    }
    (tmp_path / "good_test.pkl").write_bytes(pickle.dumps(content))
    (tmp_path / "run").mkdir()
    for arguments in (
        ["stage=aggregate", f"dataset.released={bad}"],
        ["stage=evaluate", f"checkpoint={tmp_path / 'model.pt'}", f"dataset.released={tmp_path / 'good_test.pkl'}"],
    ):
        done = run(tmp_path / "run", *arguments, "wandb=disabled")
        assert done.returncode == 1
        assert "refused" in done.stderr
        assert "system" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "owned").exists()

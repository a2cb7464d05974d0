"""Our per-image scores agree with people as the published table says (Flickr8k-Expert; CLIPScore, 2021, table 1)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cgtgan.errors import InputError, MissingFileError
from cgtgan.evaluation.human_judgements import correlations, read_judgements, tau_c

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {"BLEU-1": 32.3, "BLEU-4": 30.8, "ROUGE-L": 32.3, "METEOR": 41.8, "CIDEr": 43.9}
MINE = '''
import torch

def words(captions, references):
    return {n: len(text.split()) for n, text in captions.items()}

class Encoder:
    """A red picture belongs to a text with "red", a blue one to any other."""

    def encode_images(self, images):
        return torch.stack([torch.tensor(image.resize((1, 1)).getpixel((0, 0))).float() for image in images])[:, [0, 2]]

    def encode_texts(self, texts):
        return torch.tensor([[1.0, 0.1] if "red" in text else [0.1, 1.0] for text in texts])
'''
ROWS = [("red.png", "a red square", [4, 4]), ("red.png", "sky", [1, 2]), ("gone.png", "a red one too", [1, 1])]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    rows = [dict(zip(("image", "caption", "ratings"), row, strict=True)) for row in ROWS]
    references = {"red.png": ["one red square"], "gone.png": ["one red square"]}
    (folder / "judged.json").write_text(json.dumps({"references": references, "rows": rows}))
    (folder / "mine.py").write_text(MINE)
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    return folder


def test_published_correlations(shared: Path) -> None:
    judgements = read_judgements(shared / "data" / "flickr8k" / "expert_judgements.json")
    assert (len(judgements.images), sum(map(len, judgements.ratings))) == (5664, 16992)
    taus, failed = correlations(judgements)
    assert failed == {}
    assert {name: 100 * taus[name] for name in PUBLISHED} == pytest.approx(PUBLISHED, abs=0.05)


def test_tau_c_by_hand() -> None:
    # pairs of (score, rating): (1, 1) (1, 2) (2, 2) (2, 3); of 6 pairs 3 are concordant, none discordant, and 2 and 3
    # different values make the smaller number 2: tau-c = 2 * (3 - 0) * 2 / (4^2 * (2 - 1))
    assert tau_c([1, 2], [[1, 2], [2, 3]]) == pytest.approx(0.75)
    assert tau_c([2, 1], [[1, 2], [2, 3]]) == pytest.approx(-0.75)


def test_the_benchmark_takes_own_metrics_and_an_own_encoder(judged: Path) -> None:
    program = [sys.executable, str(ROOT / "benchmarks" / "human_judgements.py"), "--judgements", "judged.json"]
    options = ["--metrics", "rouge_l", "mine.py:words", "--images", ".", "--clip", "mine.py:Encoder"]
    done = subprocess.run([*program, *options], cwd=judged, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CLIPScore: 1 of 2 judged pictures, 2 pairs" in done.stdout
    printed = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()}
    # the two red pairs: 4 of 6 pairs are concordant, 2 * 4 * 2 / 16
    assert printed["CLIPScore"] == printed["RefCLIPScore"] == "100.00"
    # words 3, 1, 4 against 4 4, 1 2, 1 1: 4 concordant, 6 discordant, 2 * (4 - 6) * 3 / (6^2 * 2)
    assert printed["words"] == "-16.67"


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"references": {}, "rows": []},
        {"references": {}, "rows": [{"image": "a", "caption": "b", "ratings": [1]}]},
        {"references": {"a": [" "]}, "rows": [{"image": "a", "caption": "b", "ratings": [1]}]},
        {"references": {"a": ["b"]}, "rows": [{"image": "a", "caption": "b", "ratings": []}]},
        {"references": {"a": ["b"]}, "rows": [{"image": "a", "caption": "b", "ratings": ["4"]}]},
    ],
)
def test_other_content_is_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"other\.json \(--judgements\)"):
        read_judgements(tmp_path / "other.json")
    with pytest.raises(MissingFileError, match="set --judgements"):
        read_judgements(tmp_path / "none.json")

"""A user's own dual encoder: plain, with pixels and tokens, with weight files, and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cgtgan.assets.backbone import backbone_description
from cgtgan.assets.workspace import Workspace
from cgtgan.config import ClipBackboneConfig, Config
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.backbone_identity import backbone_identity
from cgtgan.models.custom_backbone import CustomBackbone, absolute_spec
from cgtgan.stages.serve import check_same_clip

CPU = torch.device("cpu")
PLAIN = """
from pathlib import Path
import numpy as np
import torch

class Plain:
    logit_scale = 50.0

    @classmethod
    def load(cls):
        return cls()

    def encode_images(self, images):
        return torch.tensor(np.array([np.asarray(i.convert("RGB"), dtype="float32").mean((0, 1)) for i in images]))

    def encode_texts(self, texts):
        return torch.tensor([[float(len(t)), float(t.count("e")), 1.0] for t in texts])

class Fast(Plain):
    image_size = 8

    @staticmethod
    def pixels(image):
        return torch.tensor(np.asarray(image.convert("RGB").resize((8, 8)))).permute(2, 0, 1)

    def encode_pixels(self, pixels):
        assert pixels.dtype == torch.uint8  # as `pixels` makes them
        return pixels.float().mean((2, 3))

    @staticmethod
    def tokens(texts):
        return [[ord(letter) for letter in text] for text in texts]

    def encode_tokens(self, rows):
        return torch.tensor([[float(len(row)), float(row.count(ord("e"))), 1.0] for row in rows])

class OnDevice(Plain):
    @classmethod
    def load(cls, device):
        made = cls()
        made.device = device
        return made

class NoTexts:
    @classmethod
    def load(cls):
        return cls()
    def encode_images(self, images):
        return torch.zeros(len(images), 3)

class AList(Plain):
    def encode_texts(self, texts):
        return [[0.0] for _ in texts]

class WholeNumbers(Plain):
    def encode_texts(self, texts):
        return torch.zeros(len(texts), 3, dtype=torch.long)

class NotFinite(Plain):
    def encode_texts(self, texts):
        return torch.full((len(texts), 3), float("nan"))

class OtherWidth(Plain):
    def encode_images(self, images):
        return torch.zeros(len(images), 4)

class Fails(Plain):
    def encode_texts(self, texts):
        raise OSError("no weights today")

class FailsOnImages(Plain):
    def encode_images(self, images):
        return images[0].colour

class AModule(Plain, torch.nn.Linear):
    @classmethod
    def load(cls):
        return cls(3, 3, bias=False)

    def encode_texts(self, texts):
        return self(Plain.encode_texts(self, texts))

class Listed(Plain):
    files = ["listed.bin"]

plain = Plain  # a function or class without `load` is called itself
"""


def line_of(code: str) -> int:
    return next(n for n, line in enumerate(PLAIN.splitlines(), 1) if code in line)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "encoder.py"
    file.write_text(PLAIN)
    return file


def config(source: Path, name: str) -> ClipBackboneConfig:
    return ClipBackboneConfig(name="custom", kind="custom", model=f"{source}:{name}")


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.mark.parametrize("name", ["Plain", "Fast", "OnDevice", "plain"])
def test_an_encoder_embeds_pictures_and_texts(source: Path, name: str) -> None:
    backbone, images = CustomBackbone(config(source, name), CPU), pictures()
    assert (backbone.dim, backbone.logit_scale, backbone.ahead) == (3, 50.0, name == "Fast")
    wanted = torch.tensor(np.array([np.asarray(i, dtype=np.float32).mean((0, 1)) for i in images]))
    assert torch.allclose(backbone.encode_images(images), wanted)
    assert torch.allclose(backbone.encode_images(torch.stack([backbone.pixels(i) for i in images])), wanted)
    texts = ["bee", "a", "", "bee", "übe"]
    assert backbone.encode_texts(texts).tolist() == [[3, 2, 1], [1, 0, 1], [0, 0, 1], [3, 2, 1], [3, 1, 1]]
    rows = backbone.tokens(texts)
    assert torch.equal(backbone.encode_tokens(rows), backbone.encode_texts(texts))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NoTexts", "has no encode_texts: a dual encoder has encode_images(pictures) and encode_texts(texts)"),
        ("AList", "encode_texts must return a float tensor (1, D), not a list"),
        ("WholeNumbers", "not torch.int64 of shape (1, 3)"),
        ("NotFinite", "encode_texts must return a float tensor (1, D) of finite numbers; some are NaN or infinite"),
        ("OtherWidth", "encode_images must return a float tensor (1, D) with D=3, as for texts, not torch.float32 of"),
        ("Fails", f"line {line_of('raise OSError')}: OSError: no weights today"),
        ("FailsOnImages", f"line {line_of('images[0].colour')}: AttributeError: 'Image' object has no attribute"),
        ("Absent", "has no Absent; it defines"),
    ],
)
def test_what_is_no_dual_encoder_is_refused(source: Path, name: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        CustomBackbone(config(source, name), CPU)
    assert f"clip_backbone.model={source}:{name}" in str(error.value)
    assert words in str(error.value)


def test_its_identity_is_the_content_of_its_files(source: Path) -> None:
    first = backbone_identity(config(source, "Plain"))
    assert "weights" not in first
    assert backbone_identity(config(source, "Fast")) != first
    weights = source.with_name("encoder.safetensors")
    weights.write_bytes(b"one")
    second = backbone_identity(config(source, "Plain"))
    weights.write_bytes(b"two")
    third = backbone_identity(config(source, "Plain"))
    source.write_text(source.read_text() + "\n")
    fourth = backbone_identity(config(source, "Plain"))
    assert len({str(i) for i in (first, second, third, fourth)}) == 4


def test_the_files_it_lists_are_its_weights(source: Path) -> None:
    source.with_name("encoder.npy").write_bytes(b"not listed")
    with pytest.raises(MissingFileError, match=r"`files` names .*listed\.bin, which is missing"):
        backbone_identity(config(source, "Listed"))
    source.with_name("listed.bin").write_bytes(b"one")
    assert list(backbone_identity(config(source, "Listed"))["weights"]) == ["listed.bin"]


def test_a_module_stays_where_its_load_puts_it(source: Path) -> None:
    """Not moved to a device that it does not know: its methods make their own tensors. The vectors are moved."""
    backbone = CustomBackbone(config(source, "AModule"), torch.device("meta"))
    assert [p.device.type for p in backbone.encoder.parameters()] == ["cpu"]
    assert not any(p.requires_grad for p in backbone.encoder.parameters())
    assert backbone.encode_tokens([[98]]).device.type == "meta"


def test_a_path_holds_in_any_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    assert absolute_spec("encoder.py:Plain") == f"{source}:Plain"
    assert absolute_spec("package.module:Plain") == "package.module:Plain"


def test_the_web_page_knows_the_encoder_of_a_checkpoint(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings name it relative to the working directory, the checkpoint by its full path."""
    monkeypatch.chdir(source.parent)
    settings = config(Path("encoder.py"), "Plain")
    stored = backbone_description(settings)
    ws = Workspace(Config(clip_backbone=settings, device="cpu"))
    check_same_clip(ws, stored, source.parent)
    for other in ({"model": f"{source}:Fast"}, {"kind": "demo"}):
        with pytest.raises(
            InputError, match="clip_backbone=custom of these settings is not the CLIP of the checkpoint"
        ):
            check_same_clip(ws, stored | other, source.parent)


def test_a_real_encoder_of_photographs(shared: Path) -> None:
    folder = shared / "data/flickr8k"
    settings = ClipBackboneConfig(name="custom", kind="custom", model=f"{folder}/photo_clip.py:PhotoClip")
    backbone = CustomBackbone(settings, CPU)
    assert backbone.dim == 256
    assert set(backbone_identity(settings)["weights"]) == {"photo_clip.safetensors"}
    coco = json.loads((folder / "references.json").read_text())
    references = {a["image_id"]: a["caption"] for a in coco["annotations"]}
    images = coco["images"][:40]
    pictures = [Image.open(folder / "images" / image["file_name"]) for image in images]
    vectors = torch.nn.functional.normalize(backbone.encode_images(pictures), dim=-1)
    texts = torch.nn.functional.normalize(backbone.encode_texts([references[i["id"]] for i in images]), dim=-1)
    hits = ((vectors @ texts.T).argmax(dim=1) == torch.arange(40)).float().mean()
    assert hits > 0.3  # by chance 0.025

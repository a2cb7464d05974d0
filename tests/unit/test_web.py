"""The page of stage=serve without a server: what one answer costs, and what it holds."""

from __future__ import annotations

import tarfile

import pytest
import torch
from PIL import Image
from tiny_gan import SENTENCES, tiny_parts
from torch import Tensor

from cgtgan.captioning.captioner import DRAWINGS, Captioner
from cgtgan.config import DecodeConfig, ServeConfig
from cgtgan.data.corpora import embedded_text
from cgtgan.models.clip_backbone import DemoBackbone

pytest.importorskip("fastapi", reason="left out: the extra `serve` is not installed")
web = pytest.importorskip("cgtgan.captioning.web")


class CountingBackbone(DemoBackbone):
    """The small CLIP itself; `encoded` counts the pictures that its image tower has read."""

    encoded = 0

    def _images(self, pixels: Tensor) -> Tensor:
        self.encoded += len(pixels)
        return super()._images(pixels)


@pytest.fixture
def captioner() -> Captioner:
    _, parts = tiny_parts()
    assert isinstance(parts.backbone, DemoBackbone)
    backbone = CountingBackbone(parts.backbone.model, torch.device("cpu"))
    return Captioner(parts.bundle, backbone, DecodeConfig(), seed=3)


@pytest.fixture
def picture() -> Image.Image:
    return Image.effect_noise((40, 30), 90).convert("RGB")


@pytest.mark.parametrize("decoding", ["greedy", "best_of_n"])
def test_an_upload_is_encoded_once(captioner: Captioner, picture: Image.Image, decoding: str) -> None:
    captioner.decode = DecodeConfig(name=decoding)
    vectors = captioner.backbone.encode_texts([embedded_text(sentence) for sentence in SENTENCES])
    demo = web.Demo(captioner, ServeConfig(captions=3, nearest=2), sentences=SENTENCES, vectors=vectors)
    answer = demo.answer(picture)
    assert captioner.backbone.encoded == 1
    # the same captions and sentences as those of the captioner's own methods, which encode for themselves
    others = [scored.caption for scored in captioner.captions([picture], 3)[0]]
    first = captioner.caption([picture])[0]
    assert [caption for caption, _ in answer["captions"]] == [first, *(o for o in others if o != first)][:3]
    cosines = torch.cosine_similarity(vectors, captioner.embed([picture]))
    best = sorted(zip(cosines.tolist(), SENTENCES, strict=True), reverse=True)[:2]
    assert answer["nearest"] == [(sentence, pytest.approx(cosine, abs=1e-5)) for cosine, sentence in best]
    assert captioner.backbone.encoded == 4


def test_a_repeated_corpus_sentence_is_listed_once(captioner: Captioner, picture: Image.Image) -> None:
    sentences = [*SENTENCES, *SENTENCES]
    vectors = captioner.backbone.encode_texts([embedded_text(sentence) for sentence in sentences])
    answer = web.Demo(captioner, ServeConfig(nearest=5), sentences=sentences, vectors=vectors).answer(picture)
    assert sorted(sentence for sentence, _ in answer["nearest"]) == sorted(SENTENCES)


def test_examples_leave_out_what_an_upload_would_be_refused_for(captioner: Captioner, picture: Image.Image, tmp_path):
    picture.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    demo = web.Demo(captioner, ServeConfig())
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "c.png")
    (tmp_path / "1.tar").write_bytes(b"no archive")
    in_archives = [tmp_path / "0.tar/c.png", tmp_path / "1.tar/c.png"]
    demo.add_examples([tmp_path / "a.png", tmp_path / "b.png", tmp_path / "missing.png", *in_archives])
    example, archived = demo.examples
    assert list(archived.image.getdata()) == list(example.image.getdata())
    assert example.caption == captioner.caption([picture])[0]
    assert demo.answer_example(0)["captions"][0][0] == example.caption
    with pytest.raises(web.Refused, match="There is no example 2"):
        demo.answer_example(2)


def test_a_note_says_that_another_caption_is_nearer_and_that_photographs_are_foreign(captioner: Captioner) -> None:
    demo = web.Demo(captioner, ServeConfig(captions=4))
    noted: list[bool] = []
    for seed in range(8):
        answer = demo.answer(Image.effect_noise((40, 30 + seed), 90).convert("RGB"))
        first, *others = (cosine for _, cosine in answer["captions"])
        noted.append(any(cosine > first for cosine in others))
        assert answer["note"] == (
            f"This caption is the checkpoint's usual one (greedy). {web.NEARER}" if noted[-1] else ""
        )
    assert set(noted) == {True, False}
    photograph = demo.answer(Image.effect_noise((400, 300), 90).convert("RGB"))
    assert photograph["note"].startswith(DRAWINGS)

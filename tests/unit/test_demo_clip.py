"""The demo's own CLIP with each kind of towers: rows do not depend on their batch, and it is read as it was written."""

from pathlib import Path

import pytest
import torch

from cgtgan.assets.backbone import load_demo_clip, save_demo_clip
from cgtgan.config import DemoClipConfig
from cgtgan.models.clip_backbone import DemoBackbone
from cgtgan.models.demo_clip import DemoClip
from cgtgan.models.tokenizers import END_OF_TEXT, train_tokenizer

SENTENCES = ["A red circle.", "A small blue star is left of a large striped green box.", "A hollow cross."]


@pytest.fixture(params=["plain", "sharp"])
def model(request: pytest.FixtureRequest) -> DemoClip:
    torch.manual_seed(0)
    config = DemoClipConfig(dim=16, width=8, text_layers=1, towers=request.param)
    model = DemoClip(config, train_tokenizer(SENTENCES, 300, [END_OF_TEXT]), 32)
    model.train()
    model.encode_image(torch.randn(8, 3, 32, 32))  # running means, where there are any
    return model


def test_a_row_does_not_depend_on_the_others(model: DemoClip) -> None:
    backbone = DemoBackbone(model, torch.device("cpu"))
    texts = backbone.encode_texts(SENTENCES)
    assert texts.shape == (3, 16)
    for row, sentence in zip(texts, SENTENCES, strict=True):
        torch.testing.assert_close(backbone.encode_texts([sentence])[0], row, rtol=1e-5, atol=1e-5)
    pixels = torch.randn(3, 3, 32, 32)
    images = model.encode_image(pixels)
    assert images.shape == (3, 16)
    torch.testing.assert_close(model.encode_image(pixels[1:2])[0], images[1], rtol=1e-5, atol=1e-5)


def test_a_word_does_not_see_the_ones_after_it(model: DemoClip) -> None:
    model.eval()
    ids = model.tokens(["A red circle."])[0]
    read = model.near_words(model.words(torch.tensor([ids, [*ids[:-1], ids[0]]])))
    torch.testing.assert_close(read[0, :-1], read[1, :-1], rtol=0, atol=0)
    assert not torch.equal(read[0, -1], read[1, -1])


def test_it_is_read_as_it_was_written(model: DemoClip, tmp_path: Path) -> None:
    save_demo_clip(tmp_path / "clip", model)
    again = load_demo_clip(tmp_path / "clip")
    assert again.config == model.config
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval().encode_image(pixels), model.eval().encode_image(pixels))

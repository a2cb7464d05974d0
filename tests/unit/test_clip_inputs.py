"""What the towers read: pixels and tokens, batches by length, and the dual encoders of transformers."""

import json
import math
import multiprocessing
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cgtgan.config import ClipBackboneConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.chunks import pad_rows
from cgtgan.models.clip_backbone import ClipBackbone
from cgtgan.models.clip_inputs import (
    CLIP_MEAN,
    CLIP_STD,
    CONTEXT,
    ClipPixels,
    OpenAITokens,
    by_length,
    clip_module,
    normalise,
    preprocess,
)
from cgtgan.models.load_backbone import load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TEXTS = ["A dog runs", "two cats", "a " * 90, "", "two cats"]


@pytest.fixture(scope="module")
def photographs(shared: Path) -> list[Image.Image]:
    paths = sorted((shared / "data/coco/images").glob("*.jpg"))
    return [Image.open(p) for p in (paths[0], paths[5], paths[19])]


# ------------------------------------------------------------------------------------------------------ other processes


def made_elsewhere(pickled: bytes, argument: Any) -> Any:
    return pickle.loads(pickled)(argument)


def test_inputs_are_made_in_a_spawned_process() -> None:
    """A fresh interpreter, where nothing of ours has been imported: as on macOS, and from Python 3.14 on."""
    image = Image.effect_noise((90, 70), 60)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows = pool.apply(made_elsewhere, (pickle.dumps(OpenAITokens()), TEXTS))
        pixels = pool.apply(made_elsewhere, (pickle.dumps(ClipPixels(32)), image))
    assert rows == OpenAITokens()(TEXTS)
    assert [len(row) for row in rows] == [5, 4, CONTEXT, 2, 4]
    assert pixels.dtype == torch.uint8
    assert torch.equal(normalise(pixels, CLIP_MEAN, CLIP_STD), preprocess(image, 32))


def test_raw_pixels_and_finished_ones_give_the_same_embedding(photographs: list[Image.Image]) -> None:
    backbone = load_backbone(ClipBackboneConfig(kind="random"), CPU)
    raw = torch.stack([backbone.pixels(i) for i in photographs])
    finished = torch.stack([backbone.preprocess(i) for i in photographs])
    assert raw.dtype == torch.uint8
    assert torch.equal(backbone.encode_images(raw), backbone.encode_images(finished))
    assert torch.equal(backbone.encode_images(raw), backbone.encode_images(photographs))


@cache
def random_backbone() -> ClipBackbone:
    return load_backbone(ClipBackboneConfig(kind="random"), CPU)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=40), st.integers(1, 9))
def test_batches_by_length(rows: list[list[int]], size: int) -> None:
    batches = by_length(rows, size)
    assert sorted(place for batch in batches for same in batch for place in same) == list(range(len(rows)))
    assert all(len(batch) <= size for batch in batches)
    together = [{tuple(rows[place]) for place in same} for batch in batches for same in batch]
    assert all(len(different) == 1 for different in together)
    lengths = [len(rows[same[0]]) for batch in batches for same in batch]
    assert lengths == sorted(lengths)
    assert len(lengths) == len({tuple(row) for row in rows})


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["a", "a dog", "two cats run", "a b c d e f g", ""]), max_size=12), st.integers(1, 5))
def test_order_and_company_do_not_matter(texts: list[str], size: int) -> None:
    backbone = random_backbone()
    found = backbone.encode_texts(texts, size)
    assert found.shape == (len(texts), backbone.dim)
    for text, row in zip(texts, found, strict=True):
        torch.testing.assert_close(row, backbone.encode_texts([text])[0], rtol=1e-5, atol=1e-5)


def test_a_text_cut_to_its_length_has_the_numbers_of_the_padded_one() -> None:
    backbone = load_backbone(ClipBackboneConfig(kind="random"), CPU)
    rows = backbone.tokens(TEXTS[:3])
    whole = backbone.encode_tokens([row + [0] * (CONTEXT - len(row)) for row in rows])
    for row, expected in zip(rows, whole, strict=True):
        torch.testing.assert_close(backbone.encode_tokens([row])[0], expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- transformers

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "dog", "runs", "two", "cats"]


def save_tokenizer(folder: Path, length: int, **more: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names, **more).save_pretrained(
        folder
    )


@pytest.mark.parametrize("masked", [True, False])
def test_siglip(tmp_path: Path, photographs: list[Image.Image], masked: bool) -> None:
    """Also the SigLIP 2 of one resolution: not causal, its last position counts, so every text has the full length."""
    from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessorPil, SiglipModel

    torch.manual_seed(0)
    text = SIZES | {
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": 12,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    model = SiglipModel(
        SiglipConfig(text_config=text, vision_config=SIZES | {"image_size": 32, "patch_size": 16})
    ).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, int(1e30), model_input_names=["input_ids", "attention_mask"] if masked else ["input_ids"])
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)

    backbone = load_backbone(ClipBackboneConfig(kind="huggingface", model=str(tmp_path)), CPU)
    assert (backbone.dim, backbone.image_size) == (32, 32)
    assert backbone.logit_scale == pytest.approx(model.logit_scale.exp().item())
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        pixels = processor(images=[p.convert("RGB") for p in photographs], return_tensors="pt")
        images = model.get_image_features(**pixels).pooler_output
        lower = [text.lower() for text in TEXTS]
        read = tokenizer(lower, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        texts = model.get_text_features(
            **{k: v for k, v in read.items() if k in tokenizer.model_input_names}
        ).pooler_output
    torch.testing.assert_close(backbone.encode_images(photographs), images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone.encode_texts(TEXTS), texts, rtol=1e-5, atol=1e-5)
    assert backbone.encode_texts([]).shape == (0, 32)


@pytest.mark.parametrize("kind", ["Siglip2Tokenizer", "GemmaTokenizer"])
def test_siglip_reads_lower_case_whatever_its_tokenizer_does(tmp_path: Path, kind: str) -> None:
    """The class of NaFlex checkpoints lower-cases by itself, that of the SigLIP 2 of one resolution does not."""
    import transformers
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *"adogADOG", "\u00c4", "\u00e4"]
    tokenizer = getattr(transformers, kind)({word: i for i, word in enumerate(words)}, [], model_max_length=12)
    assert tokenizer.tokenize("Dog")[0] == ("d" if kind == "Siglip2Tokenizer" else "D")
    tokenizer.save_pretrained(tmp_path)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    text = SIZES | ids | {"vocab_size": len(words), "max_position_embeddings": 12}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=SIZES | {"image_size": 32, "patch_size": 16}))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
        model.logit_bias.fill_(-12.0)
    model.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    backbone: Any = load_backbone(ClipBackboneConfig(kind="huggingface", model=str(tmp_path)), CPU)
    mixed, lower = backbone.tokens(["A Dog \u00c4", "a dog \u00e4"])
    assert mixed == lower
    assert {words[i] for i in lower} >= set("dog")
    assert not {words[i] for i in lower} & set("DOG\u00c4")
    # Zhai et al. 2023: a sigmoid of scale * cosine + bias
    assert backbone.probability(0.12) == pytest.approx(0.5, abs=1e-4)
    assert backbone.probability(0.15) == pytest.approx(1 / (1 + math.exp(-3)), rel=1e-4)
    assert backbone.probability(-1.0) == pytest.approx(math.exp(-112), rel=1e-3)


def test_siglip_2_of_flexible_resolution(tmp_path: Path, photographs: list[Image.Image]) -> None:
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model

    torch.manual_seed(0)
    text = SIZES | {
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": 12,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    vision = SIZES | {"num_patches": 16, "patch_size": 16}
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, 12)
    processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
    processor.save_pretrained(tmp_path)
    backbone = load_backbone(ClipBackboneConfig(kind="huggingface", model=str(tmp_path)), CPU)
    with torch.no_grad():
        found = [
            model.get_image_features(**processor(images=[p.convert("RGB")], return_tensors="pt")).pooler_output[0]
            for p in photographs
        ]
    torch.testing.assert_close(backbone.encode_images(photographs), torch.stack(found), rtol=1e-5, atol=1e-5)
    packed = torch.stack([backbone.pixels(p) for p in photographs])
    torch.testing.assert_close(backbone.encode_images(packed), torch.stack(found), rtol=1e-5, atol=1e-5)
    assert backbone.encode_texts(TEXTS).shape == (5, backbone.dim)


def test_clip_with_its_own_processor_and_end_token_as_padding(tmp_path: Path, photographs: list[Image.Image]) -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    text = SIZES | {
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": 20,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = CLIPConfig(text_config=text, vision_config=SIZES | {"image_size": 32, "patch_size": 16}, projection_dim=24)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, 20)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<eos>"}))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    backbone = load_backbone(ClipBackboneConfig(kind="huggingface", model=str(tmp_path)), CPU)
    with torch.no_grad():
        pixels = processor(images=[p.convert("RGB") for p in photographs], return_tensors="pt")
        images = model.get_image_features(**pixels).pooler_output
        rows = [row + [1] * (20 - len(row)) for row in backbone.tokens(TEXTS)]
        whole = model.get_text_features(input_ids=torch.tensor(rows)).pooler_output
    torch.testing.assert_close(backbone.encode_images(photographs), images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone.encode_texts(TEXTS), whole, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_no_dual_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, bos_token_id=1, eos_token_id=1)
    ).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, 20)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"clip_backbone\.model=.* is a GPT2Model: a dual encoder"):
        load_backbone(ClipBackboneConfig(kind="huggingface", model=str(tmp_path)), CPU)


def test_plain_weights_of_openais_clip_are_read(tmp_path: Path) -> None:
    """A state dict, as people save it, in the place of the TorchScript archive."""
    torch.manual_seed(0)
    tower = {"embed_dim": 24, "image_resolution": 32, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 16}
    text = {
        "vocab_size": 49408,
        "transformer_width": 64,
        "transformer_heads": 1,
        "transformer_layers": 1,
        "context_length": CONTEXT,
    }
    model = clip_module("model").CLIP(**tower, **text).eval().half().float()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    backbone = load_backbone(ClipBackboneConfig(kind="openai", model=str(tmp_path / "clip.pt")), CPU)
    with torch.no_grad():
        expected = model.encode_text(pad_rows([row + [0] * (CONTEXT - len(row)) for row in backbone.tokens(TEXTS)])[0])
    torch.testing.assert_close(backbone.encode_texts(TEXTS), expected, rtol=1e-5, atol=1e-5)
    tokens, mask = pad_rows([[1, 2], [9], []], 9)
    assert tokens.tolist() == [[1, 2], [9, 9], [9, 9]]
    assert mask.tolist() == [[True, True], [True, False], [False, False]]  # by length: a text may hold id 9
    assert tokens.dtype == torch.int64

    incomplete = {k: v for k, v in model.state_dict().items() if "text_projection" not in k}
    torch.save(incomplete, tmp_path / "clip.pt")
    with pytest.raises(InputError, match="its weights are no CLIP of OpenAI's"):
        load_backbone(ClipBackboneConfig(kind="openai", model=str(tmp_path / "clip.pt")), CPU)


def test_the_sentence_for_a_missing_archive_has_openais_address(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError,
        match=r"ViT-L-14\.pt is missing; get OpenAI's archive \(https://openaipublic\.\S+/ViT-L-14\.pt\)",
    ):
        load_backbone(ClipBackboneConfig(kind="openai", model="ViT-L/14", cache=str(tmp_path)), CPU)

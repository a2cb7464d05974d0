"""CLIP backbones: OpenAI's archives against clip's own code, transformers' folders, and the pixels bit for bit."""

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from cgtgan.assets.backbone import backbone_description, reopen_backbone
from cgtgan.config import ClipBackboneConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.backbone_identity import RELEASED, RELEASED_BPE, backbone_identity
from cgtgan.models.clip_backbone import ClipBackbone
from cgtgan.models.clip_inputs import CLIP_MEAN, CLIP_STD, CONTEXT, clip_module, preprocess
from cgtgan.models.load_backbone import load_backbone
from cgtgan.runtime.fingerprints import file_fingerprint

# tracing clip's model says what the trace cannot follow: shape checks, which do not matter here
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]
CPU = torch.device("cpu")
TEXTS = ["A dog runs over the grass", "two cats", "", "a " * 200, "Zwei Hunde — 犬, 'x' &amp; y!", "two cats"]
VIT: dict[str, Any] = {"image_resolution": 64, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 32}
RESNET: dict[str, Any] = {
    "image_resolution": 64,
    "vision_layers": (1, 2, 1, 1),
    "vision_width": 8,
    "vision_patch_size": None,
}


@pytest.fixture(scope="module")
def photographs(shared: Path) -> list[Image.Image]:
    paths = sorted((shared / "data/coco/images").glob("*.jpg"))
    return [Image.open(p).convert("RGB") for p in (paths[0], paths[5], paths[19])]  # wide, tall, nearly square


# --------------------------------------------------------------------------------------------------------------- pixels


def as_clip_does(image: Image.Image, size: int) -> Tensor:
    """torchvision's Resize, CenterCrop, ToTensor and Normalize as clip chains them, in PIL and numpy."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new = (size, int(size * long / short)) if width <= height else (int(size * long / short), size)
    image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2.0), round((new[1] - size) / 2.0)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))
    scaled = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).to(torch.float32) / 255
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return scaled.sub_(mean).div_(std)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


SIZES = [
    (640, 427),
    (427, 640),
    (64, 64),
    (65, 64),
    (64, 65),
    (63, 64),
    (10, 10),
    (1, 1),
    (500, 3),
    (3, 500),
    (333, 500),
    (227, 226),
    (129, 96),
]


@pytest.mark.parametrize("size", [64, 224])
def test_pixels_are_clips_own_at_every_size(size: int) -> None:
    for width, height in SIZES:
        found = preprocess(picture(width, height), size)
        assert found.shape == (3, size, size)
        assert found.dtype == torch.float32
        assert torch.equal(found, as_clip_does(picture(width, height), size)), (width, height)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1", "YCbCr"])
def test_pixels_are_clips_own_in_every_mode(mode: str) -> None:
    for width, height in [(130, 97), (64, 64), (33, 200)]:
        image = picture(width, height, mode)
        assert torch.equal(preprocess(image, 64), as_clip_does(image, 64))


def test_an_orientation_tag_is_left_alone_as_in_clip(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    picture(120, 80).save(tmp_path / "a.jpg", exif=exif)
    image = Image.open(tmp_path / "a.jpg")
    assert image.getexif()[0x112] == 6
    assert torch.equal(preprocess(image, 64), as_clip_does(image, 64))


def test_real_photographs(photographs: list[Image.Image]) -> None:
    for image in photographs:
        assert torch.equal(preprocess(image, 224), as_clip_does(image, 224))


# ---------------------------------------------------------------------------------------------------- OpenAI's archives


def archive(path: Path, tower: dict[str, Any], *, seed: int = 0) -> Any:
    """A tiny CLIP, also saved as OpenAI's archives are. Its weights are float16 numbers: loading rounds nothing."""
    torch.manual_seed(seed)
    text: dict[str, Any] = {
        "context_length": CONTEXT,
        "vocab_size": 49408,
        "transformer_width": 64,
        "transformer_heads": 1,
        "transformer_layers": 2,
    }
    model = clip_module("model").CLIP(embed_dim=32, **tower, **text).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_mean"):
                value.normal_(0, 0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            if value.is_floating_point():
                value.copy_(value.half().float())
    size = tower["image_resolution"]
    torch.jit.save(
        torch.jit.trace(
            model, (torch.rand(1, 3, size, size), torch.ones(1, CONTEXT, dtype=torch.long)), check_trace=False
        ),
        path,
    )
    return model


def as_clip_tokenizes(texts: list[str]) -> Tensor:
    """clip.tokenize(truncate=True): 77 tokens a text."""
    words = clip_module("simple_tokenizer").SimpleTokenizer()
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.int)
    for row, text in zip(tokens, texts, strict=True):
        ids = [words.encoder["<|startoftext|>"], *words.encode(text), words.encoder["<|endoftext|>"]]
        if len(ids) > CONTEXT:
            ids = ids[:CONTEXT]
            ids[-1] = words.encoder["<|endoftext|>"]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


@pytest.mark.parametrize("tower", [VIT, RESNET], ids=["ViT", "RN"])
def test_an_openai_archive_encodes_as_clip_does(
    tmp_path: Path, photographs: list[Image.Image], tower: dict[str, Any]
) -> None:
    model = archive(tmp_path / "tiny.pt", tower)
    backbone = load_backbone(ClipBackboneConfig(kind="openai", model=str(tmp_path / "tiny.pt")), CPU)
    assert (backbone.dim, backbone.image_size) == (32, 64)
    assert backbone.logit_scale == pytest.approx(math.exp(model.logit_scale.item()), rel=1e-6)
    with torch.no_grad():
        images = model.encode_image(torch.stack([as_clip_does(i, 64) for i in photographs]))
        texts = model.encode_text(as_clip_tokenizes(TEXTS))
    assert images.norm(dim=1).min() > 0.01
    torch.testing.assert_close(backbone.encode_images(photographs), images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone.encode_texts(TEXTS), texts, rtol=1e-5, atol=1e-5)
    check_texts(backbone)


def check_texts(backbone: ClipBackbone) -> None:
    """Order, batches and company do not matter; identical texts have identical rows."""
    whole = backbone.encode_texts(TEXTS)
    assert whole.shape == (len(TEXTS), backbone.dim)
    assert whole.dtype == torch.float32
    assert torch.equal(whole[1], whole[5])
    assert len({tuple(row) for row in whole[:5].tolist()}) == 5
    torch.testing.assert_close(backbone.encode_texts(TEXTS[::-1], batch_size=2), whole.flip(0), rtol=1e-5, atol=1e-5)
    for text, row in zip(TEXTS, whole, strict=True):
        torch.testing.assert_close(backbone.encode_texts([text])[0], row, rtol=1e-5, atol=1e-5)
    assert backbone.encode_texts([]).shape == (0, backbone.dim)


def test_a_named_archive_is_looked_for_in_the_cache(tmp_path: Path) -> None:
    archive(tmp_path / "ViT-B-32.pt", VIT)
    config = ClipBackboneConfig(kind="openai", model="ViT-B/32", cache=str(tmp_path))
    assert load_backbone(config, CPU).dim == 32
    with pytest.raises(MissingFileError, match=r"clip_backbone\.model=ViT-L/14: .*ViT-L-14\.pt is missing"):
        load_backbone(ClipBackboneConfig(kind="openai", model="ViT-L/14", cache=str(tmp_path)), CPU)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(2)}, path)
    for content in (path.read_bytes(), b"not found", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"weights\.pt is not a CLIP archive in OpenAI's TorchScript format"):
            load_backbone(ClipBackboneConfig(kind="openai", model=str(path)), CPU)


def test_a_missing_bpe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"clip_backbone\.tokenizer=.*none\.gz is missing"):
        load_backbone(ClipBackboneConfig(kind="random", tokenizer=str(tmp_path / "none.gz")), CPU)


def test_identity_tells_weights_apart_by_content(tmp_path: Path) -> None:
    for name, seed in (("a.pt", 0), ("b.pt", 1)):
        archive(tmp_path / name, VIT, seed=seed)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes())
    a, b, moved = (
        backbone_identity(ClipBackboneConfig(kind="openai", model=str(tmp_path / name)))
        for name in ("a.pt", "b.pt", "elsewhere/a.pt")
    )
    assert a == moved
    assert a["weights"] != b["weights"]


def test_openais_own_files_are_known_by_their_fingerprints() -> None:
    """As the clip package names them: the archives' addresses hold their SHA-256, and the BPE file lies in it."""
    clip_module("simple_tokenizer")
    spec = importlib.util.find_spec("clip.clip")
    assert spec
    package = Path(str(spec.origin)).parent
    hashes = dict(re.findall(r'"([^"]+)": "https://\S+/([0-9a-f]{64})/', (package / "clip.py").read_text()))
    assert [hashes[name][:12] for name in ("ViT-L/14", "ViT-B/32", "RN50x4")] == list(RELEASED)
    assert file_fingerprint(package / "bpe_simple_vocab_16e6.txt.gz") == RELEASED_BPE


# --------------------------------------------------------------------------------------------------------------- random


def test_random_is_the_same_every_time_and_leaves_torchs_generator(photographs: list[Image.Image]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = load_backbone(ClipBackboneConfig(kind="random"), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    b = load_backbone(ClipBackboneConfig(kind="random"), CPU)
    assert torch.equal(a.encode_images(photographs), b.encode_images(photographs))
    assert torch.equal(a.encode_texts(TEXTS), b.encode_texts(TEXTS))
    assert a.encode_images(photographs).shape == (3, a.dim)
    assert a.logit_scale == 100
    check_texts(a)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_near_float32(photographs: list[Image.Image], dtype: str) -> None:
    whole, half = (load_backbone(ClipBackboneConfig(kind="random", dtype=d), CPU) for d in ("float32", dtype))
    for a, b in (
        (whole.encode_images(photographs), half.encode_images(photographs)),
        (whole.encode_texts(TEXTS), half.encode_texts(TEXTS)),
    ):
        assert b.dtype == torch.float32
        assert 0 < float((a - b).norm() / a.norm()) < 0.03


def test_a_backbone_is_frozen() -> None:
    backbone: Any = load_backbone(ClipBackboneConfig(kind="random"), CPU)
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.encode_texts(["a"]).requires_grad


# --------------------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf")
    words = ["<|startoftext|>", "<|endoftext|>", "<unk>", "A", "dog", "runs", "two", "cats", "a", "Zwei"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    layers: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=layers | ids | {"vocab_size": len(words), "max_position_embeddings": CONTEXT},
        vision_config=layers | {"image_size": 64, "patch_size": 32},
        projection_dim=24,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
    model.save_pretrained(folder)
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def test_a_transformers_folder(hugging_face: Path, photographs: list[Image.Image]) -> None:
    from transformers import CLIPModel

    backbone: Any = load_backbone(ClipBackboneConfig(kind="huggingface", model=str(hugging_face)), CPU)
    assert (backbone.dim, backbone.image_size) == (24, 64)
    assert backbone.logit_scale == pytest.approx(math.exp(4.0), rel=1e-6)
    own: Any = CLIPModel.from_pretrained(hugging_face).eval()
    pixels = torch.stack([as_clip_does(i, 64) for i in photographs])
    clip_mean, clip_std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        images = own.get_image_features(pixel_values=(pixels * clip_std + clip_mean - mean) / std).pooler_output
        dog = own.get_text_features(input_ids=torch.tensor([[0, 3, 4, 5, 1]])).pooler_output
    torch.testing.assert_close(backbone.encode_images(photographs), images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone.encode_texts(["two cats", "A dog runs"])[1:], dog, rtol=1e-5, atol=1e-5)
    check_texts(backbone)
    half = load_backbone(ClipBackboneConfig(kind="huggingface", model=str(hugging_face), dtype="bfloat16"), CPU)
    assert half.encode_images(photographs).dtype == torch.float32


def test_a_checkpoint_is_not_opened_with_other_weights_than_it_was_made_with(
    hugging_face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(hugging_face, folder)
    monkeypatch.chdir(tmp_path)
    config = ClipBackboneConfig(kind="huggingface", model="clip")
    description, made_from = backbone_description(config), backbone_identity(config)
    monkeypatch.chdir("/")
    checkpoint = tmp_path / "step_000001/clip"
    assert reopen_backbone(description, checkpoint, CPU, made_from).dim == 24
    assert reopen_backbone(description, checkpoint, CPU).dim == 24  # 0.1 did not say what it was made from
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"step_000001 was made with another CLIP than clip_backbone\.model={folder}"):
        reopen_backbone(description, checkpoint, CPU, made_from)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "preprocessor_config.json", "everything"])
def test_an_incomplete_transformers_folder_is_answered_by_a_sentence(
    hugging_face: Path, tmp_path: Path, missing: str
) -> None:
    for path in hugging_face.iterdir():
        if missing not in (path.name, "everything"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    sentence = rf"clip_backbone\.model={tmp_path}: no (dual encoder|image processor) is found there"
    with pytest.raises(MissingFileError, match=sentence):
        load_backbone(ClipBackboneConfig(kind="huggingface", model=str(tmp_path)), CPU)


def test_open_clip_that_is_not_installed_is_answered_by_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as if it were not installed
    with pytest.raises(MissingFileError, match="pip install open_clip_torch"):
        load_backbone(ClipBackboneConfig(kind="open_clip", model="ViT-B-32"), CPU)

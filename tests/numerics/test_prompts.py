"""Prompts before the prefix: the tagger, the sentences that are found, and how the generator reads them, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from cgtgan import Captioner
from cgtgan.assets.backbone import save_demo_clip
from cgtgan.assets.gap import ReadImages
from cgtgan.assets.prompts import FILE, Prompts, check_prompts, load_prompts, save_prompts, write_prompts
from cgtgan.assets.reader import PromptedImages, Reader
from cgtgan.config import ClipBackboneConfig, Config, DecodeConfig, GeneratorConfig, PromptConfig, as_dict
from cgtgan.errors import InputError
from cgtgan.method.gap import Gap
from cgtgan.method.prompts import (
    entities_in,
    entity_prompt,
    entity_vocabulary,
    frequent_entities,
    kept_entities,
    nearest_sentences,
    retrieval_prompt,
    retrieval_queries,
)
from cgtgan.models.clip_backbone import DemoBackbone
from cgtgan.models.generator_bundle import make_generator
from cgtgan.models.prompted import Prompted, filled_prompts
from cgtgan.runtime.artifacts import Embeddings, Header, write_json
from cgtgan.runtime.devices import Devices
from cgtgan.training.batches import Batches
from tests.tiny_gan import tiny_parts

pytestmark = pytest.mark.usefixtures("one_thread")

TAGGED = [
    "A red dog runs over the grass.",
    "The dog sits on a red sofa.",
    "Two red dogs run over the grass.",
    "A dog is on the grass .",
    "a red ball in a dog's mouth",
    "The ball, a red ball and a black and white dog.",
    "A red sofa with a ball.",
    "On the sofa sits a dog.",
    "A black and white sofa.",
    "Three black and white dogs, a dog, the sofa.",
]
SENTENCES = ["A dog runs.", "A cat sleeps.", "A dog runs.", "A dog and a cat.", "The sea is calm.", "A ball."]
VECTORS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [2.0, 0.5]])


def test_a_noun_is_a_word_that_ends_noun_phrases() -> None:
    """Three times each: `a dog is`, `a dog.`, `a dog,`; behind the modifier `red` `a red sofa.` Not `red`."""
    nouns = entity_vocabulary(TAGGED)
    assert nouns == {"dog", "grass", "ball", "sofa"}
    assert entity_vocabulary(TAGGED[:2]) == frozenset()  # nothing three times


def test_a_verb_behind_a_noun_and_a_modifier_are_no_nouns() -> None:
    sentences = ["A dog runs in the park.", "A small dog runs.", "A small cat runs.", "The cat runs on a small park."]
    nouns = entity_vocabulary([*sentences * 3, *["The dog is by the cat."] * 3])
    assert nouns == {"dog", "cat", "park"}


def test_entities_are_listed_once_in_their_order_and_by_how_many_sentences_have_them() -> None:
    nouns = {"dog", "ball", "grass"}
    assert entities_in("The Dog, a ball and a dog!", nouns) == ["dog", "ball"]
    near = ["A ball and a dog.", "Grass, a dog, a dog.", "The ball.", "A dog."]
    assert frequent_entities(near, nouns, 2, 10) == ["dog", "ball"]
    assert frequent_entities(near, nouns, 1, 2) == ["dog", "ball"]
    assert frequent_entities(near, nouns, 1, 3) == ["dog", "ball", "grass"]
    assert frequent_entities(near, nouns, 4, 10) == []


def test_the_words_of_a_prompt() -> None:
    assert entity_prompt(["dog", "ball"]) == "There are dog, ball in the image."
    assert entity_prompt([]) == "There are something in the image."
    assert retrieval_prompt(["A dog.", "A cat."]) == "Similar images show A dog. A cat."


def test_each_noun_is_dropped_with_its_own_probability() -> None:
    nouns = ["a", "b", "c"]
    assert kept_entities(nouns, 0.0, 1) == nouns
    assert kept_entities(nouns, 1.0, 1) == []
    assert kept_entities(nouns, 0.4, 7) == kept_entities(nouns, 0.4, 7)
    kept = sum(len(kept_entities(nouns, 0.4, seed)) for seed in range(1000)) / 3000
    assert kept == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / 3000))


def test_the_nearest_different_sentences_without_the_text_itself() -> None:
    """Cosines with (1, 0): 1, 0, 1, 0.71, -1, 0.97."""
    query = torch.tensor([[5.0, 0.0]])
    assert nearest_sentences(query, VECTORS, SENTENCES, 3) == [["A dog runs.", "A ball.", "A dog and a cat."]]
    without = nearest_sentences(query, VECTORS.half(), SENTENCES, 2, ["A dog runs."])
    assert without == [["A ball.", "A dog and a cat."]]
    assert nearest_sentences(query, VECTORS, SENTENCES, 10)[0] == [SENTENCES[i] for i in (0, 5, 3, 1, 4)]


def test_a_row_has_the_same_sentences_in_any_batch() -> None:
    noise = torch.Generator().manual_seed(0)
    corpus, queries = torch.randn(500, 16, generator=noise).half(), torch.randn(40, 16, generator=noise)
    names = [str(i) for i in range(500)]
    whole = nearest_sentences(queries, corpus, names, 4)
    assert [nearest_sentences(query[None], corpus, names, 4)[0] for query in queries] == whole
    exact = (torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(corpus.double()).T).topk(4)
    assert whole == [[names[i] for i in row] for row in exact.indices.tolist()]


def test_a_query_is_the_unit_vector_with_noise_of_the_rows_own_seed() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert torch.equal(retrieval_queries(vectors, 0.0, [1, 2]), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    first, second = retrieval_queries(vectors.half(), 0.2, [1, 2]), retrieval_queries(vectors[1:], 0.2, [2])
    assert torch.equal(first[1:], second)
    drawn = torch.randn(2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(first[0], torch.tensor([0.6, 0.8]) + 0.2 * drawn, rtol=1e-3, atol=1e-3)


def test_a_prompt_is_cut_or_filled_in_front() -> None:
    assert filled_prompts([[5, 6], [1, 2, 3, 4], []], 3, 9).tolist() == [[9, 5, 6], [1, 2, 3], [9, 9, 9]]


# ------------------------------------------------------------------------------------------------------------ generator


def prompted(rows: int, seed: int = 0) -> Prompted:
    noise = torch.Generator().manual_seed(seed)
    return Prompted(torch.randn(rows, 8, generator=noise), torch.randint(0, 300, (rows, 5), generator=noise))


def test_the_prompts_words_stand_before_the_prefix() -> None:
    model = tiny_parts()[1].bundle.model
    read = prompted(2)
    prefix = model.prefix(read)
    assert prefix.shape == (2, 5 + 3, 16)
    assert torch.equal(prefix[:, 5:], model.prefix(read.embedding))
    assert torch.equal(prefix[:, :5], model.gpt.get_input_embeddings()(read.prompt))


@pytest.mark.parametrize("shared", [True, False])
def test_drawing_scoring_and_the_gradient_read_the_same_prompt(shared: bool) -> None:
    """The log-probs of drawn captions, by the cached loop, by the teacher-forced pass, and by plain logits."""
    model = tiny_parts()[1].bundle.model.eval()
    model._shares_prefix = shared
    read = prompted(3)
    samples, greedy = model.sample_and_greedy(read, [[1, 2], [3, 4], [5, 6]])
    both = torch.cat([samples.drawn, greedy.drawn[:, None]], dim=1)
    drawn_with = torch.cat([samples.log_probs, greedy.log_probs[:, None]], dim=1)
    torch.testing.assert_close(model.log_probs(read, both), drawn_with, rtol=1e-4, atol=1e-5)
    logits = model.token_logits(model.prefix(read), greedy.drawn)
    plain = logits.log_softmax(-1).gather(-1, greedy.drawn[..., None])[..., 0] * model.up_to_stop(greedy.drawn)
    torch.testing.assert_close(model.token_log_probs(read, both)[0][:, 2], plain, rtol=1e-4, atol=1e-5)
    rows = samples.drawn.flatten(0, 1)
    scored = model.accumulate_gradient(read, rows, lambda log_probs, *_: log_probs.sum(), 2**10)
    table = cast(nn.Embedding, model.gpt.get_input_embeddings()).weight
    assert table.grad is not None
    gradient = table.grad.clone()
    model.zero_grad()
    model.token_log_probs(read, samples.drawn)[0].sum().backward()
    torch.testing.assert_close(gradient, table.grad, rtol=1e-3, atol=1e-5)
    assert scored.shape == rows.shape
    assert not torch.allclose(model.log_probs(read.embedding, both), drawn_with, atol=1e-3)


def test_a_prompted_row_is_captioned_alike_in_any_batch() -> None:
    model = tiny_parts()[1].bundle.model.eval()
    read = prompted(4)
    for draw in (lambda x: model.greedy(x), lambda x: model.beam(x, 2)):
        whole = draw(read).token_ids
        assert torch.equal(whole, torch.cat([draw(read[i : i + 1]).token_ids for i in range(4)]))
    copies = read.repeat_interleave(2)
    assert copies.prompt.tolist() == [row for row in read.prompt.tolist() for _ in range(2)]


# ----------------------------------------------------------------------------------------------------------- checkpoint


def made(folder: Path, **settings: object) -> Prompts:
    config = PromptConfig(**settings)  # type: ignore[arg-type]
    write_prompts(folder / "artifact.safetensors", config, VECTORS.half(), [*SENTENCES])
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "checkpoint" / FILE).write_bytes((folder / "artifact.safetensors").read_bytes())
    prompts = load_prompts(folder / "checkpoint")
    assert prompts is not None
    return prompts


def test_prompts_of_images_and_of_texts(tmp_path: Path) -> None:
    near = made(tmp_path, kind="retrieval", nearest=2)
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert near.of_images(images) == [
        "Similar images show A dog runs. A ball.",
        "Similar images show A cat sleeps. A dog and a cat.",
    ]
    assert near.of_texts(SENTENCES[:1], VECTORS[:1], 0.0, 0, 1) == ["Similar images show A ball. A dog and a cat."]
    entities = Prompts(PromptConfig(kind="entity", nearest=3, at_least=2, drop=0.0), near.vectors, SENTENCES,
                       frozenset({"dog", "cat", "ball"}), near.file)  # fmt: skip
    assert entities.of_images(images[:1]) == ["There are dog in the image."]
    assert entities.of_texts(["A cat and a dog."], images[:1], 0.0, 0, 1) == ["There are cat, dog in the image."]


def test_a_reader_closes_the_gap_and_finds_prompts_by_the_picture_itself(tmp_path: Path) -> None:
    bundle = tiny_parts()[1].bundle
    reader = Reader(
        bundle, Gap("mean", image_shift=torch.tensor([-9.0, 0.0])), made(tmp_path, kind="retrieval", tokens=20)
    )
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    read, split = reader.images(images), PromptedImages(images, ReadImages(images, reader.gap), reader)
    assert isinstance(read, Prompted)
    assert torch.equal(read.embedding, torch.tensor([[-8.0, 0.0], [-9.0, 1.0]]))
    words = bundle.tokenizer.encode([reader.prompts.of_images(images)[0]])[0]  # type: ignore[union-attr]
    assert read.prompt[0].tolist() == filled_prompts([words], 20, bundle.model.end_token_id)[0].tolist()
    again = split[torch.tensor([1, 0])]
    assert isinstance(again, Prompted)
    assert torch.equal(again.prompt, read.prompt[[1, 0]])
    assert torch.equal(again.embedding, read.embedding[[1, 0]])
    assert Reader(bundle).images(images.half()).dtype == torch.float32  # type: ignore[union-attr]


def test_prompts_are_kept_beside_the_weights_without_taking_room(tmp_path: Path) -> None:
    prompts = made(tmp_path, kind="entity", nearest=9)
    (tmp_path / "next").mkdir()
    save_prompts(tmp_path / "next", prompts)
    assert prompts.file.samefile(tmp_path / "next" / FILE)
    again = load_prompts(tmp_path / "next")
    assert again is not None
    assert again.settings == prompts.settings
    assert [*again.sentences] == SENTENCES
    assert torch.equal(again.vectors, VECTORS.half())
    (tmp_path / "none").mkdir()
    save_prompts(tmp_path / "none", None)
    assert load_prompts(tmp_path / "none") is None


def test_another_kind_of_prompt_or_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    prompts = made(tmp_path, kind="retrieval", tokens=20)
    folder = tmp_path / "checkpoint"
    check_prompts(folder, PromptConfig(kind="retrieval", nearest=2, tokens=20))
    check_prompts(tmp_path, PromptConfig())
    with pytest.raises(InputError, match="was trained with prompt=retrieval of 20 tokens and this run has prompt=none"):
        check_prompts(folder, PromptConfig())
    with pytest.raises(InputError, match="was trained with prompt=none of 0 tokens"):
        check_prompts(tmp_path, PromptConfig(kind="entity"))
    prompts.file.write_bytes(prompts.file.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"prompts\.safetensors is not whole"):
        load_prompts(folder)


# ------------------------------------------------------------------------------------------------------- those who read


def test_a_captioner_reads_the_prompts_of_its_checkpoint_and_needs_nothing_else(tmp_path: Path) -> None:
    parts = tiny_parts()[1]
    parts.bundle.save(tmp_path)
    assert isinstance(parts.backbone, DemoBackbone)
    save_demo_clip(tmp_path / "clip", parts.backbone.model)
    described = {"clip_backbone": as_dict(ClipBackboneConfig()), "decode": as_dict(DecodeConfig())}
    write_json(tmp_path / "checkpoint.json", described)
    picture = Image.new("RGB", (32, 32), "red")
    plain = Captioner.load(tmp_path, device="cpu").captions([picture], 3)
    vectors = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).half()
    write_prompts(tmp_path / FILE, PromptConfig(kind="retrieval", nearest=2, tokens=20), vectors, SENTENCES[:4])
    captioner = Captioner.load(tmp_path, device="cpu")
    read = Reader(captioner.bundle, prompts=load_prompts(tmp_path)).images(captioner.embed([picture]))
    drawn = captioner.bundle.model.greedy(read)
    assert captioner.caption([picture]) == captioner.bundle.texts(drawn.token_ids)
    prompted = {scored.caption: scored for scored in captioner.captions([picture], 3)[0]}
    assert prompted[captioner.caption([picture])[0]].log_prob == pytest.approx(float(drawn.log_probs[0]), abs=1e-5)
    assert {scored.log_prob for scored in prompted.values()} != {scored.log_prob for scored in plain[0]}


def test_a_steps_prompts_depend_on_the_step_alone(tmp_path: Path) -> None:
    """So a run that goes on after a stop reads what it would have read."""
    prompts, bundle = made(tmp_path, kind="entity", nearest=3, at_least=1, tokens=20), tiny_parts()[1].bundle
    vectors = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)).half()
    images = Embeddings(vectors, range(12), Header("image_embeddings", "", {}, 12, 2, "float16"))
    read = PromptedImages(vectors, ReadImages(vectors, Gap()), Reader(bundle, prompts=prompts))
    cfg = Config()
    cfg.train.batch_size = 5

    def batches() -> Batches:
        return Batches(cfg, Devices(), images, images, SENTENCES, read)

    whole = [batches().batch(step).read for step in (1, 2, 3)]
    again, first = batches(), batches().batch(1)
    for step in (3, 1, 2):
        one, other = again.batch(step).read, whole[step - 1]
        assert isinstance(one, Prompted)
        assert isinstance(other, Prompted)
        assert torch.equal(one.prompt, other.prompt)
        assert torch.equal(one.embedding, other.embedding)
    parts = [part.read for part in first.split(2)]
    prompts_of_parts = [part.prompt for part in parts if isinstance(part, Prompted)]
    assert [len(part) for part in prompts_of_parts] == [2, 3]
    assert isinstance(first.read, Prompted)
    assert torch.equal(torch.cat(prompts_of_parts), first.read.prompt)


def test_a_prompt_for_which_a_language_model_has_no_room_is_one_sentence(tmp_path: Path) -> None:
    tokenizer = tiny_parts()[1].bundle.tokenizer
    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    config = GeneratorConfig(language_model=str(tmp_path), prefix_length=4, max_length=20)
    assert make_generator(config, tokenizer, 8, 0, prompt_tokens=40).model.clip_project.prefix_length == 4
    with pytest.raises(InputError, match=r"prompt\.tokens=41 is too long: .* 64 positions, .* caption take 24"):
        make_generator(config, tokenizer, 8, 0, prompt_tokens=41)

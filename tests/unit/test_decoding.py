"""Embeddings -> captions: best-of-n against a plain loop, draws independent of the batch, how a decoding is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cgtgan.captioning.decoding import Decoder, chosen_decode, describe
from cgtgan.config import DecodeConfig
from cgtgan.data.corpora import embedded_text
from cgtgan.method.batches import sampling_seeds
from tests.tiny_gan import tiny_parts

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
BEST = DecodeConfig(name="best_of_n", best_of=5)


@pytest.fixture(scope="module")
def made():
    return tiny_parts()[1]


@pytest.fixture(scope="module")
def vectors(made):
    return torch.randn(7, made.backbone.dim, generator=torch.Generator().manual_seed(3))


BEAM = DecodeConfig(name="beam", beam_size=5, batch_size=64)


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ((), BEAM),
        (("decode=greedy",), DecodeConfig()),
        (("decode.name=greedy",), replace(BEAM, name="greedy")),
        (("decode.batch_size=256",), replace(BEAM, batch_size=256)),  # also the default
        (("decode.precision=float32", "++decode.beam_size=3"), replace(BEAM, precision="float32", beam_size=3)),
        (("decode=sample", "decode.batch_size=7"), DecodeConfig(name="sample", batch_size=7)),
        (("seed=3",), BEAM),
    ],
)
def test_what_a_person_types_wins_over_the_checkpoints_decoding(run_py, words: tuple[str, ...], chosen) -> None:
    """Through the door, where the words are, to the decoding of a checkpoint that was saved with beam search."""
    given = []
    assert run_py("experiment=demo", "stage=caption", "checkpoint=x", "images=y", *words, stage=given.append) == 0
    assert chosen_decode(BEAM, given[0].decode, given[0].typed_decode) == chosen


def test_best_of_n_is_the_candidate_with_the_highest_cosine(made, vectors) -> None:
    captions = Decoder(made.bundle, BEST, CPU, 4, made.backbone).captions(vectors)
    ranked = Decoder(made.bundle, BEST, CPU, 4, made.backbone).ranked(vectors, 5)
    ranks_of_greedy = set()
    for i, vector in enumerate(vectors):
        seeds = sampling_seeds(4, 0, [i], 5)
        drawn = [made.bundle.model.greedy(vector[None]), made.bundle.model.sample(vector[None], 5, seeds=seeds)]
        texts = [text for d in drawn for text in made.bundle.texts(d.token_ids)]
        log_probs = dict(zip(texts, [x for d in drawn for x in d.log_probs.flatten().tolist()], strict=True))
        cosines = F.cosine_similarity(made.backbone.encode_texts([embedded_text(t) for t in texts]), vector[None])
        by_hand = sorted(dict(zip(texts, cosines.tolist(), strict=True)).items(), key=lambda pair: -pair[1])
        assert captions[i] == by_hand[0][0]
        assert [one.caption for one in ranked[i]] == [text for text, _ in by_hand]
        assert [one.clip_similarity for one in ranked[i]] == pytest.approx([cosine for _, cosine in by_hand], abs=1e-5)
        assert [one.log_prob for one in ranked[i]] == pytest.approx([log_probs[text] for text, _ in by_hand], abs=1e-5)
        ranks_of_greedy.add(captions[i] == texts[0])
    assert False in ranks_of_greedy  # else nothing was chosen


@pytest.mark.parametrize("name", ["sample", "best_of_n"])
def test_draws_depend_on_seed_and_key_alone(made, vectors, name) -> None:
    decode = replace(BEST, name=name)
    keys = [f"picture {i}" for i in range(len(vectors))]

    def captions(order: list[int], seed: int = 0, batch_size: int = 256) -> list[str]:
        few = replace(decode, batch_size=batch_size)
        decoder = Decoder(made.bundle, few, CPU, seed, made.backbone)
        drawn = decoder.captions(vectors[order], [keys[i] for i in order])
        return [drawn[order.index(i)] for i in range(len(order))]

    whole = captions(list(range(7)))
    assert captions([3, 1, 6, 0, 2, 5, 4], batch_size=4) == whole
    assert captions(list(range(7)), batch_size=1) == whole
    assert captions(list(range(7)), seed=1) != whole


def test_best_of_n_ranks_by_the_pictures_own_embeddings(made, vectors) -> None:
    """A baseline reads another vector than the picture's (DeCap's projection): each picture here is a candidate's text
    embedding.
    """
    candidates = Decoder(made.bundle, BEST, CPU, 0, made.backbone).ranked(vectors, 5)
    wanted = [ranked[-1].caption for ranked in candidates]
    images = made.backbone.encode_texts([embedded_text(text) for text in wanted])
    decoder = Decoder(made.bundle, BEST, CPU, 0, made.backbone)
    assert decoder.captions(vectors, images=images) == wanted
    assert decoder.captions(vectors) != wanted


def test_scores_at_another_temperature_are_the_models_own(made, vectors) -> None:
    warm = replace(BEST, temperature=1.5)
    ranked = Decoder(made.bundle, warm, CPU, 0, made.backbone).ranked(vectors[:1], 5)[0]
    drawn = made.bundle.model.sample(vectors[:1], 5, seeds=sampling_seeds(0, 0, [0], 5), temperature=1.5)
    own = made.bundle.model.log_probs(vectors[:1], drawn.drawn)[0].tolist()
    by_text = dict(zip(made.bundle.texts(drawn.token_ids), own, strict=True))
    assert len(by_text.keys() & {one.caption for one in ranked}) > 1
    assert all(
        one.log_prob == pytest.approx(by_text[one.caption], abs=1e-5) for one in ranked if one.caption in by_text
    )


@pytest.mark.parametrize("name", ["greedy", "beam", "sample", "best_of_n"])
def test_precision_is_that_of_the_matrix_products(made, vectors, name) -> None:
    """And validation's is its caller's: it is always greedy."""
    seen = set()
    hook = made.bundle.model.gpt.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    decode = replace(BEST, name=name)
    try:
        for precision, greedy in (("auto", False), ("bf16", True), ("float32", False), ("bf16", False)):
            seen.clear()
            settings = replace(decode, precision=precision)
            decoder = Decoder(made.bundle, settings, CPU, 0, made.backbone)
            captions = decoder.greedy(vectors) if greedy else decoder.captions(vectors)
            assert len(captions) == 7
            assert seen == {precision == "bf16" and not greedy}
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["greedy", "beam", "sample", "best_of_n"])
def test_a_static_cache_writes_the_same_captions(made, vectors, name) -> None:
    decode, seen = replace(BEST, name=name, batch_size=12), set()

    def captions(cache: str) -> list[str]:
        decoder = Decoder(made.bundle, replace(decode, cache=cache), CPU, 0, made.backbone)
        return [*decoder.captions(vectors), *decoder.greedy(vectors)]

    expected = captions("growing")
    hook = made.bundle.model.gpt.register_forward_hook(
        lambda _module, _args, words, _out: seen.add(type(words["past_key_values"]).__name__), with_kwargs=True
    )
    try:
        assert captions("static") == expected
        assert seen == {"DynamicCache", "Cache"}  # the prefix, then the tokens
        seen.clear()
        assert captions("growing") == expected  # of the same generator
        assert "Cache" not in seen
    finally:
        hook.remove()


def test_no_rows_and_a_count_of_the_done(made, vectors) -> None:
    done: list[int] = []
    few = replace(BEST, batch_size=12)
    assert len(Decoder(made.bundle, few, CPU, 0, made.backbone, done.append).captions(vectors)) == 7
    assert done == [2, 2, 2, 1]  # 12 captions at once are 2 pictures' greedy one and 5 samples
    assert Decoder(made.bundle, few, CPU, 0, made.backbone).captions(vectors[:0]) == []


def test_a_decoding_in_words() -> None:
    words = {name: describe(DecodeConfig(name=name)) for name in ("greedy", "beam", "sample", "best_of_n")}
    assert words == {
        "greedy": "greedy",
        "beam": "beam 3 (length penalty 1)",
        "sample": "one sample at temperature 1",
        "best_of_n": "greedy and 8 samples at temperature 1, the nearest by CLIP",
    }


def test_a_character_that_is_cut_by_the_length_is_dropped(made) -> None:
    cut, whole = made.bundle.tokenizer.encode(["a red é", "a red circle"])
    ids = torch.tensor([[*cut[:-1], made.bundle.tokenizer.id_of("<|endoftext|>")], cut])
    assert made.bundle.texts(ids)[0].endswith("\ufffd")  # é is two bytes, and the second one is missing
    decoder = Decoder(made.bundle, DecodeConfig(), CPU)
    assert decoder.texts(ids) == ["a red", "a red é"]
    assert decoder.texts(torch.tensor([whole])) == ["a red circle"]

"""Mappers, decoding and teacher-forced passes: golden numbers, transformers' decoding, the model's own distribution."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from cgtgan.models.generator import CaptionGenerator, Captions
from cgtgan.models.mapper import MLPMapper, TransformerMapper
from cgtgan.models.sampling import Clocks, DeviceClocks, race

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
STOP, END, LENGTH, DIM, VOCAB = 13, 60, 8, 16, 61

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "hidden_size": 32,
}
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2, "intermediate_size": 64}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=48),
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=6),
}


def make(seed: int, family: str = "gpt2", *, spread: float = 0.3) -> CaptionGenerator:
    """A tiny model with weights large enough that its captions differ."""
    torch.manual_seed(seed)
    language_model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    for p in language_model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=spread)
    return CaptionGenerator(
        language_model, MLPMapper(DIM, 32, 3), stop_token_id=STOP, end_token_id=END, max_length=LENGTH
    ).eval()


def released(weights: Any) -> CaptionGenerator:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=48, bos_token_id=END, eos_token_id=END
    )
    mapper = MLPMapper(DIM, 32, 3)
    model = CaptionGenerator(GPT2LMHeadModel(config), mapper, stop_token_id=STOP, end_token_id=END, max_length=LENGTH)
    model.load_state_dict(
        {key[2:]: torch.tensor(weights[key]) for key in weights.files if key.startswith("w.")}, strict=True
    )
    return model.eval()


def inputs(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.detach().flatten().double(), torch.as_tensor(expected).flatten().double(), rtol=tolerance, atol=tolerance
    )


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------------------------- golden


@pytest.fixture(scope="module")
def decoding(shared: Path) -> Any:
    return np.load(shared / "golden/decode.npz")


def test_golden_mappers(shared: Path) -> None:
    golden = np.load(shared / "golden/mappers.npz")
    mlp, transformer = MLPMapper(32, 64, 4), TransformerMapper(32, 64, 4, 3, layers=2, heads=8)
    for prefix, mapper in (("mlp", mlp), ("tf", transformer)):
        mapper.load_state_dict(
            {k[len(prefix) + 1 :]: torch.tensor(golden[k]) for k in golden.files if k.startswith(f"{prefix}.")},
            strict=True,
        )
        found = mapper(torch.tensor(golden[f"{prefix}_x"]))
        assert found.shape == (5, 4, 64)
        close(found, golden[f"{prefix}_y"])
        close(mapper.double()(torch.tensor(golden[f"{prefix}_x"]).double()), golden[f"{prefix}_y_f64"], 1e-10)


def test_golden_greedy(decoding: Any) -> None:
    model, x = released(decoding), torch.tensor(decoding["x"])
    found = model.greedy(x)
    assert found.token_ids.tolist() == decoding["greedy_ids"][:, 0].astype(int).tolist()
    close(found.log_probs, decoding["greedy_logp"])
    close(model.log_probs(x, found.drawn[:, None]), decoding["greedy_logp"])


@pytest.mark.parametrize(
    ("case", "choices", "temperature"),
    [("plain", "choices", 1.0), ("temp07", "choices", 0.7), ("allstop", "choices_allstop", 1.0)],
)
def test_golden_log_probs_of_choices(decoding: Any, case: str, choices: str, temperature: float) -> None:
    model, x = released(decoding), torch.tensor(decoding["x"])
    drawn = torch.tensor(decoding[choices]).view(6, 2, LENGTH)
    found = model.log_probs(x, drawn, temperature=temperature)
    assert found.shape == (6, 2)
    assert found.dtype == torch.float32
    close(found, decoding[f"sample_{case}_logp"])


def test_golden_captions_of_choices(decoding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that let those tokens win give the printed ids, with forced stop and end-of-text, and the log-probs."""
    model, x = released(decoding), torch.tensor(decoding["x"])
    choices = torch.tensor(decoding["choices"]).view(12, LENGTH)
    places = [0] * 12

    def rigged(_clocks: Clocks, captions: Sequence[int], vocab: int) -> Tensor:
        out = torch.ones(len(captions), vocab)
        for row, caption in zip(out, captions, strict=True):
            row[choices[caption, places[caption]]] = 1e-30
            places[caption] += 1
        return out

    monkeypatch.setattr(Clocks, "next", rigged)
    found = model.sample(x, 2)
    assert found.token_ids.flatten(0, 1).tolist() == decoding["sample_plain_ids"][:, 0].astype(int).tolist()
    close(found.log_probs, decoding["sample_plain_logp"])


def test_golden_gradient(decoding: Any) -> None:
    model, x = released(decoding), torch.tensor(decoding["x"])
    log_probs = model.log_probs(x, torch.tensor(decoding["choices"]).view(6, 2, LENGTH))
    (log_probs.flatten() * torch.tensor(decoding["grad_weights"])).sum().backward()
    found = gradients(model)
    expected = {key[5:] for key in decoding.files if key.startswith("grad.")}
    assert set(found) == expected
    for name, gradient in found.items():
        close(gradient, decoding[f"grad.{name}"])


def test_golden_initialisation_loss() -> None:
    golden = np.load(GOLDEN / "init_loss.npz")
    model, tokens, prefix = released(golden), torch.tensor(golden["tokens"]), torch.tensor(golden["prefix"])
    real = torch.tensor(golden["mask"])[:, 3:].bool()
    assert bool(((tokens == 0) & real).any())  # a real `!`, which the released loss leaves out
    close(model.token_logits(model.prefix(prefix), tokens)[real], golden["logits"][real.numpy()])
    close(model.reconstruction_loss(prefix, tokens, real), golden["loss_not_ignoring_bang"])
    loss = model.reconstruction_loss(prefix, tokens, tokens != 0)
    close(loss, golden["loss"])
    loss.backward()
    found = gradients(model)
    assert set(found) == {key[5:] for key in golden.files if key.startswith("grad.")}
    for name, gradient in found.items():
        close(gradient, golden[f"grad.{name}"])


# ----------------------------------------------------------------------------------------------- one decode and another


@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_log_probs_are_the_teacher_forced_ones(family: str) -> None:
    model, x = make(0, family), inputs(6)
    sampled, greedy = model.sample_and_greedy(x, some_seeds(6, 5))
    close(model.log_probs(x, sampled.drawn), sampled.log_probs)
    close(model.log_probs(x, greedy.drawn[:, None]), greedy.log_probs)
    alone = model.greedy(x)
    assert torch.equal(alone.token_ids, greedy.token_ids)
    close(alone.log_probs, greedy.log_probs)
    assert len({tuple(ids) for ids in sampled.token_ids.flatten(0, 1).tolist()}) > 20


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_greedy_is_transformers_greedy(family: str, seed: int) -> None:
    model, x = make(seed, family), inputs(8, seed)
    found = model.greedy(x).drawn
    expected = generate(model, x, num_beams=1)
    assert torch.equal(found[:, : expected.shape[1]], expected)


def generate(model: CaptionGenerator, x: Tensor, **settings: Any) -> Tensor:
    prefix = model.prefix(x)
    mask = torch.ones(prefix.shape[:2], dtype=torch.long)
    ids = {"eos_token_id": STOP, "pad_token_id": END, "bos_token_id": 0}
    language_model: Any = model.gpt
    return language_model.generate(
        inputs_embeds=prefix, attention_mask=mask, do_sample=False, max_new_tokens=LENGTH, **ids, **settings
    )


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("beams", [3, 5])
@pytest.mark.parametrize(
    ("family", "seed", "spread"), [("gpt2", 0, 0.3), ("gpt2", 1, 0.1), ("gpt2", 2, 0.5), ("llama", 3, 0.3)]
)
def test_beam_is_transformers_beam(family: str, seed: int, spread: float, beams: int, length_penalty: float) -> None:
    model, x = make(seed, family, spread=spread), inputs(7, seed)
    found = model.beam(x, beams, length_penalty=length_penalty)
    expected = generate(model, x, num_beams=beams, length_penalty=length_penalty, early_stopping=False)
    assert torch.equal(found.drawn[:, : expected.shape[1]], expected)
    close(found.log_probs, model.log_probs(x, found.drawn[:, None]))


def test_one_beam_is_greedy_and_more_beams_find_likelier_captions() -> None:
    model, x = make(0, spread=0.15), inputs(10)
    greedy, one, five = model.greedy(x), model.beam(x, 1), model.beam(x, 5, length_penalty=0.0)
    assert torch.equal(one.token_ids, greedy.token_ids)
    close(one.log_probs, greedy.log_probs)
    total_greedy, total_five = (c.log_probs * up_to_stop(c.drawn).sum(-1) for c in (greedy, five))
    assert (total_five >= total_greedy - 1e-5).all()
    assert (total_five > total_greedy + 1e-3).any()


def up_to_stop(drawn: Tensor) -> Tensor:
    stopped = drawn == STOP
    return stopped.cumsum(-1) - stopped.long() == 0


def test_printed_ids_after_and_at_the_stop() -> None:
    model, x = make(0), inputs(30)
    found = model.sample(x, 5, generator=torch.Generator().manual_seed(0))
    forced = 0
    for printed, drawn in zip(found.token_ids.flatten(0, 1).tolist(), found.drawn.flatten(0, 1).tolist(), strict=True):
        assert printed.count(STOP) == 1
        end = printed.index(STOP)
        assert printed[end + 1 :] == [END] * (LENGTH - 1 - end)
        assert printed[:end] == drawn[:end]
        forced += drawn[end] != STOP
    assert 0 < forced < 150


def test_a_forced_stop_keeps_the_drawn_tokens_log_prob() -> None:
    model, x = make(0), inputs(30)
    found = model.sample(x, 5, generator=torch.Generator().manual_seed(0))
    forced = (found.drawn != STOP).all(-1)
    assert bool(forced.any())
    by_printed = model.log_probs(x, found.token_ids)
    assert ((by_printed - found.log_probs).abs()[forced] > 1e-4).all()
    close(by_printed[~forced], found.log_probs[~forced])


def test_tokens_behind_the_stop_do_not_count() -> None:
    model, x = make(0), inputs(2)
    drawn = torch.tensor([[[5, STOP, 7, 8, 9, 1, 2, 3]], [[STOP, 4, STOP, 8, 9, 1, 2, 3]]])
    other = torch.tensor([[[5, STOP, 1, 1, STOP, 1, 1, 1]], [[STOP, END, END, END, END, END, END, END]]])
    close(model.log_probs(x, drawn), model.log_probs(x, other))
    log_probs, mask = model.token_log_probs(x, drawn)
    assert mask.sum(-1).tolist() == [[2], [1]]
    assert log_probs[~mask].abs().max() == 0
    by_hand = model.token_logits(model.prefix(x[:1]), drawn[0]).log_softmax(-1)[0]
    close(model.log_probs(x, drawn)[0], ((by_hand[0, 5] + by_hand[1, STOP]) / 2)[None])


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_token_is_drawn_from_the_softmax(temperature: float) -> None:
    """20,000 draws against the probabilities, by chi-square; a top-k of 50 or a top-p of 0.95 would omit tokens."""
    draws = 20_000
    model, x = make(3, spread=0.12), inputs(1)
    found = model.sample(
        x, draws, generator=torch.Generator().manual_seed(5), max_length=1, temperature=temperature
    ).drawn[0, :, 0]
    logits = model.token_logits(model.prefix(x), torch.zeros(1, 1, dtype=torch.long))[0, 0] / temperature
    expected = logits.double().softmax(-1).detach() * draws
    assert float(expected.min()) > 5
    counts = torch.bincount(found, minlength=VOCAB).double()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = VOCAB - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    rarest = expected.argsort()[: VOCAB - 50]
    assert float(counts[rarest].min()) > 0
    other = logits.double().mul(1.5).softmax(-1).detach() * draws  # the test tells distributions apart
    assert float(((counts - other) ** 2 / other).sum()) > freedom + 10 * (2 * freedom) ** 0.5


def test_later_tokens_are_drawn_from_their_softmax() -> None:
    """The second token given the most frequent first one."""
    model, x = make(3, spread=0.2), inputs(1)
    found = model.sample(x, 20_000, generator=torch.Generator().manual_seed(6), max_length=2).drawn[0]
    first = int(found[:, 0][found[:, 0] != STOP].mode().values)
    seconds = found[found[:, 0] == first, 1]
    assert len(seconds) > 500
    logits = model.token_logits(model.prefix(x), torch.tensor([[first, 0]]))[0, 1].detach()
    share = torch.bincount(seconds, minlength=VOCAB) / len(seconds)
    assert float((share - logits.softmax(-1)).abs().sum()) / 2 < 0.8 * (VOCAB / len(seconds)) ** 0.5


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    frozen, x = make(0), inputs(2)
    head = torch.nn.Linear(32, VOCAB)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1e4)
        head.bias[[7, 20]] = 0.0
    frozen.gpt.set_output_embeddings(head)
    drawn = frozen.sample(x, 500, generator=torch.Generator().manual_seed(0)).drawn
    assert set(drawn.flatten().tolist()) == {7, 20}


def device_clocks(seeds: Sequence[int]) -> DeviceClocks:
    """A GPU's, on the CPU."""
    return DeviceClocks(seeds, torch.device("cpu"))


@pytest.mark.parametrize("clocks_of", [Clocks, device_clocks])
def test_clocks_are_exponential_and_each_captions_own(
    clocks_of: Callable[[Sequence[int]], Clocks | DeviceClocks],
) -> None:
    clocks = clocks_of([5, 6, 5])
    first, second = clocks.next([0, 1, 2], 50_000), clocks.next([2, 0], 50_000)
    assert torch.equal(first[0], first[2])
    assert torch.equal(second[0], second[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[1])
    assert torch.equal(clocks_of([6]).next([0], 50_000)[0], first[1])  # alone, on one thread
    drawn = torch.cat([first[0], first[1], second[0]]).double()
    assert float(drawn.min()) > 0
    at = torch.linspace(0.05, 4, 40, dtype=torch.float64)
    share = (drawn[:, None] <= at).double().mean(0)
    assert (
        float((share - (1 - (-at).exp())).abs().max()) < 2 / len(drawn) ** 0.5
    )  # Kolmogorov's distance: above this once in 1,500


def test_clocks_of_a_gpu_do_not_hang_on_the_other_captions_or_on_who_has_left() -> None:
    """100 captions are more than are drawn in one piece, 11 places more than are drawn at once."""
    left = [[*range(49 - place), 50, *range(150, 200 - place)] for place in range(11)]
    many, few = device_clocks(range(200)), device_clocks([50, 150])
    seen = set()
    for captions in left:
        found, alone = many.next(captions, 50), few.next([0, 1], 50)
        assert found.shape == (len(captions), 50)
        assert torch.equal(found[[captions.index(50), captions.index(150)]], alone)
        seen.add(float(alone[0, 0]))
    assert len(seen) == 11


def test_captions_by_the_clocks_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgtgan.models.generator.Clocks", device_clocks)
    model, x, seeds = make(0), inputs(9), some_seeds(9, 4)
    head = model.gpt.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        head.weight[STOP] *= 3  # stops are likely
    whole, rows = model.sample(x, 4, seeds=seeds), torch.tensor([7, 2, 5])
    assert len(up_to_stop(whole.drawn).sum(-1).unique()) > 4
    check_same(model.sample(x[rows], 4, seeds=[seeds[i] for i in rows]), select(whole, rows))
    check_same(model.sample_and_greedy(x, seeds)[0], whole)
    close(model.log_probs(x, whole.drawn), whole.log_probs)
    model.decode_cache = "static"
    check_same(model.sample(x, 4, seeds=seeds), whole)


def test_rounding_of_a_large_vocabulary_changes_no_draw() -> None:
    """Logits moved by a few rounding errors, 50,257 tokens: a search in the cumulative sums would draw others."""
    noise = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50_257, generator=noise)
    moved = logits + torch.randn(logits.shape, generator=noise) * 1e-6
    clocks = Clocks(range(64))
    found = [clocks.next(range(64), 50_257) for _ in range(4)]
    assert all(torch.equal(race(logits, c), race(moved, c)) for c in found)
    assert len(torch.cat([race(logits, c) for c in found]).unique()) > 200


def some_seeds(batch: int, samples: int) -> list[list[int]]:
    return [[1000 * i + k for k in range(samples)] for i in range(batch)]


def select(captions: Captions, rows: Tensor) -> Captions:
    return Captions(*(x[rows] for x in captions))


def check_same(a: Captions, b: Captions) -> None:
    assert torch.equal(a.token_ids, b.token_ids)
    assert torch.equal(a.drawn, b.drawn)
    close(a.log_probs, b.log_probs)


def test_captions_do_not_hang_on_the_batch() -> None:
    model, x = make(0), inputs(9)
    seeds, rows = some_seeds(9, 4), torch.tensor([7, 2, 5])
    whole, part = model.sample(x, 4, seeds=seeds), model.sample(x[rows], 4, seeds=[seeds[i] for i in rows])
    check_same(part, select(whole, rows))
    fewer = model.sample(x, 2, seeds=[row[1:3] for row in seeds])
    check_same(fewer, Captions(*(c[:, 1:3] for c in whole)))
    both, _ = model.sample_and_greedy(x, seeds)
    check_same(both, whole)
    check_same(model.greedy(x[rows]), select(model.greedy(x), rows))
    check_same(model.beam(x[rows], 3), select(model.beam(x, 3), rows))


def test_dropping_finished_rows_changes_nothing() -> None:
    """A batch where most rows stop at once, against each row alone, which is never dropped from a batch."""
    model, x = make(0), inputs(8)
    head = model.gpt.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        head.weight[STOP] *= 3  # stops are likely
    seeds = some_seeds(8, 2)
    whole = model.sample(x, 2, seeds=seeds)
    lengths = up_to_stop(whole.drawn).sum(-1)
    assert len(lengths.unique()) >= 4
    for row in range(8):
        for k in range(2):
            alone = model.sample(x[row : row + 1], 1, seeds=[[seeds[row][k]]])
            check_same(Captions(*(c[0] for c in alone)), Captions(*(c[row, k : k + 1] for c in whole)))


def test_an_empty_batch_and_wrong_seeds() -> None:
    model = make(0)
    assert model.greedy(inputs(0)).token_ids.shape == (0, LENGTH)
    assert model.sample(inputs(0), 5).token_ids.shape == (0, 5, LENGTH)
    for wrong in (some_seeds(2, 4), some_seeds(3, 5)):
        with pytest.raises(ValueError, match="seeds must be 2 lists, one per image, of 5 numbers"):
            model.sample(inputs(2), 5, seeds=wrong)


# ------------------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("cached", [False, True])
def test_two_pass_gradient_is_that_of_the_loop(cached: bool) -> None:
    """Drawing, then a teacher-forced pass, against a naive loop that keeps its graph, token by token, as released."""
    model, x = make(1), inputs(2)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    drawn = model.sample(x, 2, generator=torch.Generator().manual_seed(4)).drawn
    weights = torch.randn(4, generator=torch.Generator().manual_seed(5))
    (model.log_probs(x, drawn).flatten() * weights).sum().backward()
    two_pass = gradients(model)
    model.zero_grad()

    total = torch.zeros(())
    for row, tokens in enumerate(drawn.flatten(0, 1)):
        read = model.clip_project(x[row // 2][None])
        cache, terms = None, []
        for token in tokens:
            out = model.gpt(inputs_embeds=read, past_key_values=cache, use_cache=cached)
            terms.append(out.logits[0, -1].log_softmax(-1)[token])
            word = model.gpt.get_input_embeddings()(token.view(1, 1))
            cache, read = (out.past_key_values, word) if cached else (None, torch.cat([read, word], dim=1))
            if token == STOP:
                break
        total = total + weights[row] * torch.stack(terms).mean()
    total.backward()
    loop = gradients(model)
    assert set(loop) == set(two_pass)
    for name, gradient in loop.items():
        close(two_pass[name], gradient)


def test_normalize_prefix_makes_length_irrelevant() -> None:
    x = inputs(3)
    raw, unit = make(0), make(0)
    unit.normalize_prefix = True
    close(unit.prefix(5 * x), unit.prefix(x))
    close(unit.prefix(x), raw.prefix(x / x.norm(dim=1, keepdim=True)))
    assert (raw.prefix(5 * x) - raw.prefix(x)).abs().max() > 0.1


def test_float16_embeddings_are_read() -> None:
    model, x = make(0), inputs(3)
    close(model.prefix(x.half()), model.prefix(x.half().float()))


def test_on_several_threads_the_gradient_is_the_same_again() -> None:
    """Bit for bit, or a resumed run would end elsewhere: the prefix is shared by all samples of an image."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=128, n_layer=2, n_head=4, n_positions=48)
    torch.manual_seed(0)
    model = CaptionGenerator(
        GPT2LMHeadModel(config), MLPMapper(DIM, 128, 10), stop_token_id=STOP, end_token_id=END, max_length=LENGTH
    ).eval()
    x, ids = inputs(24), torch.randint(14, VOCAB, (24 * 8, LENGTH))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = set()
        for _ in range(12):
            model.zero_grad()
            model.accumulate_gradient(x, ids, lambda log_probs, mask, rows: (log_probs.sum(-1) * rows.cos()).sum(), 600)
            found.add(hash(b"".join(gradient.numpy().tobytes() for gradient in gradients(model).values())))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1

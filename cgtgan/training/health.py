"""Health of GAN training: what the captions of a step look like, and its known ways to collapse."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cgtgan.evaluation.diversity import distinct


def most_frequent(captions: Sequence[str]) -> float:
    """Share of the captions that are the most frequent one; 1 means one caption for everything."""
    return Counter(captions).most_common(1)[0][1] / len(captions) if captions else 0.0


def caption_metrics(sampled: Sequence[str], greedy: Sequence[str], real: Sequence[str] = ()) -> dict[str, float]:
    """How varied, long and repetitive samples and greedy captions are, `real` being sentences of the corpus."""
    words = [caption.split() for caption in sampled]
    metrics = {
        "caption/distinct_1": distinct(words, 1),
        "caption/distinct_2": distinct(words, 2),
        "caption/identical": 1 - len(set(sampled)) / len(sampled) if sampled else 0.0,
        "caption/greedy_most_frequent": most_frequent(greedy),
        "caption/stutter": sum(any(a == b for a, b in pairwise(row)) for row in words) / max(1, len(words)),
    }
    if sampled and (length := sum(len(sentence.split()) for sentence in real) / max(1, len(real))):
        metrics["caption/length_ratio"] = sum(map(len, words)) / len(words) / length
    return metrics


@dataclass(frozen=True)
class Collapse:
    """One way to collapse. `bounds`: metric -> (lowest, highest) of the values that show it, all at once, on every
    logged row for `steps` steps; a metric that is not logged shows nothing.
    """

    bounds: Mapping[str, tuple[float, float]]
    steps: int
    message: str

    def seen(self, metrics: Mapping[str, float]) -> bool:
        return all(low <= metrics.get(name, math.nan) <= high for name, (low, high) in self.bounds.items())


_HOLD = "lower train.generator_optimizer.lr, hold the generator with train.kl_weight"
COLLAPSES = {
    "one caption": Collapse(
        {"caption/greedy_most_frequent": (0.5, 1)}, 20,
        f"most images of a batch get the same caption: initialise longer (initialize.steps) or {_HOLD}",
    ),
    "no end": Collapse(
        {"caption/finished": (0, 0.1)}, 20,
        "captions do not end in a full stop: lower reward_weights.max_weight, initialise longer (initialize.steps) or "
        "raise generator.max_length",
    ),
    "run on": Collapse(
        {"caption/finished": (0, 0.6), "caption/length_ratio": (1.4, math.inf)}, 20,
        "captions run on: they are far longer than the corpus's sentences and many do not end in a full stop: lower "
        "reward_weights.max_weight or the generator's learning rate, or weigh the prior or the discriminator more",
    ),
    "stutter": Collapse(
        {"caption/stutter": (0.3, 1)}, 20, f"captions repeat a word at once: {_HOLD} or lower reward_weights.max_weight"
    ),
    "too short": Collapse(
        {"caption/length_ratio": (0, 0.5)}, 20,
        "captions are less than half as long as the corpus's sentences: a reward pays for each word left out. Take "
        "reward_weights.terms.fluency for prior, train.loss_norm=constant, or a lower weight",
    ),
    "far from the initial generator": Collapse(
        {"train/kl": (2.5, math.inf)}, 20, f"the generator has left the language of the corpus: {_HOLD}"
    ),
    "discriminator saturated": Collapse(
        {"train/d_accuracy": (0.999, 1)}, 25,
        "the discriminator is saturated: it tells every caption from every sentence, so its reward is no guide: lower "
        "train.discriminator_optimizer.lr, or hold the generator near the corpus with train.kl_weight",
    ),
    "discriminator dead": Collapse(
        {"train/d_loss": (0.683, 0.703), "advantage/naturalness_abs": (0, 0.02)}, 20,
        "the discriminator gives every text the same score, so its reward is no guide: raise "
        "train.discriminator_optimizer.lr, or take a larger discriminator",
    ),
}  # fmt: skip


@dataclass
class Health:
    """Since which step each collapse is seen; `since` is stored in checkpoints."""

    since: dict[str, int] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)

    def update(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The messages that are due at a logged row: each collapse once, when it has lasted for its number of steps."""
        messages = []
        for name, collapse in COLLAPSES.items():
            if not collapse.seen(metrics):
                self.since.pop(name, None)
                self.named.discard(name)
                continue
            first = self.since.setdefault(name, step)
            if step - first >= collapse.steps and name not in self.named:
                self.named.add(name)
                values = ", ".join(f"{metric} {metrics[metric]:.3g}" for metric in collapse.bounds)
                messages.append(f"{collapse.message} ({values}, since step {first})")
        return messages

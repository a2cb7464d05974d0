"""Variety of captions by hand-counted examples, and when a collapse is messages."""

import pytest

from cgtgan.training.health import COLLAPSES, Health, caption_metrics, most_frequent


def test_distinct_and_identical_by_hand() -> None:
    found = caption_metrics(["a dog runs.", "a dog sits."], [])  # words are split at blanks: a full stop belongs to one
    assert (found["caption/distinct_1"], found["caption/distinct_2"]) == (4 / 6, 3 / 4)
    assert caption_metrics(["a", "b"], [])["caption/distinct_2"] == 0
    assert caption_metrics([], [])["caption/distinct_1"] == 0
    assert most_frequent(["x", "y", "x", "x"]) == 0.75
    found = caption_metrics(["x y", "x y", "z"], ["g", "g"])
    assert found == {
        "caption/distinct_1": 3 / 5, "caption/distinct_2": 1 / 2,
        "caption/identical": pytest.approx(1 / 3), "caption/greedy_most_frequent": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "bad", "good"), [("one caption", 0.9, 0.2), ("no end", 0.0, 0.8), ("discriminator saturated", 1.0, 0.9)]
)
def test_a_collapse_is_named_once_it_has_lasted_and_again_after_it_was_gone(name: str, bad: float, good: float) -> None:
    collapse = COLLAPSES[name]
    health = Health()
    messages = [health.update({collapse.metric: bad}) for _ in range(3 * collapse.rows)]
    assert [i for i, texts in enumerate(messages) if texts] == [collapse.rows - 1]
    (text,) = messages[collapse.rows - 1]
    assert collapse.metric in text
    assert any(knob in text for knob in ("train.", "initialize.", "reward_weights."))
    assert health.update({collapse.metric: good}) == []
    assert health.rows[name] == 0
    resumed = Health(dict(health.rows))
    messages = [resumed.update({collapse.metric: bad}) for _ in range(collapse.rows)]
    assert len(messages[-1]) == 1


def test_a_metric_that_is_not_there_is_no_collapse() -> None:
    assert Health().update({}) == []


def test_rows_of_an_older_checkpoint_load_whatever_they_are_called() -> None:
    health = Health({"judge has won": 29, "no end": 9})
    (message,) = health.update({"caption/finished": 0.0, "train/d_accuracy": 1.0})
    assert "captions do not end in a full stop" in message
    assert health.rows["discriminator saturated"] == 1

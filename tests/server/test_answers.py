from __future__ import annotations

import pytest

from medfl.server.answers import Answers
from medfl.server.collector import TRAINED, Collected


def test_the_share_of_a_round_is_by_examples_where_they_are_seen() -> None:
    answers = Answers()
    first = Collected(outcomes={"a": TRAINED, "b": TRAINED}, weights={"a": 10, "b": 30})
    assert answers.share(first, ["a", "b"]) == 1.0
    # b alone is 30 of 40; with c, which never answered and counts as the mean 20, it is 30 of 60
    second = Collected(outcomes={"a": "no answer", "b": TRAINED}, weights={"b": 30})
    assert answers.share(second, ["a", "b"]) == 0.75
    assert Answers.of(answers.state()).share(second, ["a", "b", "c"]) == 0.5


def test_where_only_sums_are_known_the_share_is_that_of_the_sums() -> None:
    both = {"a": TRAINED, "b": TRAINED}
    assert Answers().share(Collected(outcomes=both, weight=30, weight_of_all=120), "abcd") == 0.25
    assert Answers().share(Collected(outcomes=both), "abcd") == pytest.approx(0.5)


def test_only_answers_in_the_model_count() -> None:
    answers = Answers()
    answers.note(3, Collected(outcomes={"a": TRAINED, "b": "no answer"}))
    answers.note(4, Collected(outcomes={"a": "no answer", "b": TRAINED}))
    assert Answers.of(answers.state()).counted == {"a": 3, "b": 4}

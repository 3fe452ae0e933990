"""Similarity and exact match against values worked out by hand."""

from __future__ import annotations

import pytest

from dsfast.evaluate import exact_match, similarity


def test_identical_text_scores_one_everywhere():
    s = similarity("Paris", "Paris")
    assert (s.sequence, s.word_overlap, s.substring, s.combined) == (1.0, 1.0, 1.0, 1.0)


def test_nothing_in_common_scores_zero():
    s = similarity("xyz", "Paul")
    assert (s.sequence, s.word_overlap, s.substring, s.combined) == (0.0, 0.0, 0.0, 0.0)


def test_sequence_ratio_is_twice_the_matches_over_both_lengths():
    # "1945" (4 characters) against "in 1945" (7): 4 match, 2 * 4 / 11
    s = similarity("in 1945", "1945")
    assert s.sequence == pytest.approx(8 / 11)
    assert s.combined == pytest.approx(0.5 * 1 + 0.3 * 8 / 11 + 0.2 * 1)


def test_word_overlap_is_the_share_of_expected_words():
    s = similarity("George III", "George Washington")
    assert s.word_overlap == 0.5
    assert s.substring == 0.0
    # "george " (7 characters) and one i match, of 10 and 17 characters
    assert s.sequence == pytest.approx(2 * 8 / (10 + 17))
    assert s.combined == pytest.approx(0.3 * 16 / 27 + 0.2 * 0.5)


def test_metrics_ignore_case_and_outer_spaces():
    assert similarity("  PARIS ", "paris").combined == 1.0


def test_substring_is_found_inside_a_word_and_word_overlap_is_not():
    s = similarity("comparison", "Paris")
    assert (s.substring, s.word_overlap) == (1.0, 0.0)


def test_long_text_is_compared_without_difflibs_popularity_heuristic():
    # Above 200 characters difflib would drop frequent characters and find nothing but at the start; 1 of 1 + 301 matches.
    assert similarity("x" + "e" * 300, "e").sequence == pytest.approx(2 / 302)


def test_empty_texts():
    assert similarity("", "Paris").combined == 0.0
    assert not exact_match("", "Paris")
    assert not exact_match("anything", "")
    assert not exact_match("anything", "...")


@pytest.mark.parametrize(
    ("generated", "answer", "aliases"),
    [
        (" Paris.", "Paris", ()),
        ("Paris", "paris", ()),
        (" the Paris of", "Paris", ()),
        (" “Hamlet” and", "Hamlet", ()),
        ("... 1945, when", "1945", ()),
        (" the Sun", "Sun", ()),
        (" Sun", "the Sun", ()),
        (" A", "a", ()),
        (" A and D", "A", ()),
        (" George Washington, who", "George Washington", ()),
        (" Washington", "George Washington", ("Washington",)),
        (" 300,000 km/s", "300000", ("300,000",)),
        (" -40 degrees", "-40", ()),
        (" Zürich", "Zu\u0308rich", ()),
        (" deoxyribonucleic\nacid", "deoxyribonucleic acid", ()),
        (" mother-in-law", "mother-in-law", ()),
    ],
)
def test_exact_match(generated, answer, aliases):
    assert exact_match(generated, answer, aliases)


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        (" comparison", "Paris"),
        (" Parisian", "Paris"),
        (" London, not Paris", "Paris"),
        (" in 1945", "1945"),
        (" 19455", "1945"),
        (" 1945.5", "1945"),
        (" 1945-1946", "1945"),
        (" 300,000", "300"),
        (" 3.14", "3"),
        (" -40", "40"),
        (" 5th", "5"),
        (" Austria-Hungary", "Austria"),
        (" Austria–Hungary", "Austria"),
        (" twenty-one", "twenty"),
        (" George", "George Washington"),
        (" Washington George", "George Washington"),
        (" anthem", "them"),
        (" the", "the Sun"),
        (" theSun", "Sun"),
    ],
)
def test_traps_are_not_matches(generated, answer):
    assert not exact_match(generated, answer)

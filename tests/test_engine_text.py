"""Text as it grows: whole characters, all of them, and nothing of a stop string."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dora_serve.engine.text import TextStream
from tests.engine_tokenizers import BOS, EOS, FIRST_BYTE, PAD, byte_tokenizer, word_tokenizer

TEXTS = (
    "plain words, and more of them",
    "naïve café — 12 €",
    "天気がいいから散歩しましょう。한국어도 됩니다",
    "🌊👩‍👩‍👧‍👦🏳️‍🌈 emoji of many code points",
    "e\u0301 combining, \ufb01 ligature, \u200b nothing, \U0001f600",
    " leading and trailing \n\n",
    "�",
)


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.close()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_torn(tokenizer: Any, text: str) -> None:
    """Each byte is a token: a character comes whole with its last byte, and not before."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    found = pieces(TextStream(tokenizer), ids)
    assert "".join(found) == text
    shown = "".join(found[:-1])
    assert text.startswith(shown)
    if "\ufffd" not in text:
        assert shown == text, "nothing is left for the end"
        ends = {len(text[: place + 1].encode()) for place in range(len(text))}
        assert [count for count, piece in enumerate(found[:-1], 1) if piece] == sorted(ends)


def test_a_character_that_never_ends_is_shown_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer.encode("a 🌊", add_special_tokens=False)[:-1]
    found = pieces(TextStream(tokenizer), ids)
    assert found[:2] == ["a", " "]
    assert found[2:-1] == ["", "", ""]
    assert "".join(found) == tokenizer.decode(ids)


def test_any_bytes_give_what_the_tokenizer_makes_of_them(tokenizer: Any) -> None:
    """A model may write what is no text at all; special tokens are never shown."""
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(FIRST_BYTE - 2, len(tokenizer)) for _ in range(rng.randrange(1, 12))]
        assert "".join(pieces(TextStream(tokenizer), ids)) == tokenizer.decode(ids, skip_special_tokens=True), ids


def test_special_tokens_are_not_shown(tokenizer: Any) -> None:
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert pieces(TextStream(tokenizer), [BOS, ids[0], EOS, ids[1]]) == ["", "a", "", "b", ""]


def test_spaces_between_words_are_kept() -> None:
    """By itself no token of SentencePiece has the space that stands before it."""
    tokenizer = word_tokenizer(("▁one", "▁two", "s", "▁three"))
    assert tokenizer.decode([4]) == "two"
    assert pieces(TextStream(tokenizer), [3, 4, 5, 6, 4]) == ["one", " two", "s", " three", " two", ""]


def test_no_clean_up_of_spaces_takes_back_what_was_shown() -> None:
    """A tokenizer may ask for one: "it 's" would become "it's", whose s could not be shown any more."""
    tokenizer = word_tokenizer(("▁it", "▁'", "s", "▁fine", "▁."))
    ids = [3, 4, 5, 6, 7]
    tokenizer.clean_up_tokenization_spaces = True
    assert tokenizer.decode(ids) == "it's fine."
    found = "".join(pieces(TextStream(tokenizer), ids))
    assert found == tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "it 's fine ."


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert pieces(TextStream(None, ("x",)), [3, 4]) == ["", "", ""]


# Stop strings


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one END two", ("END",), "one "),
        ("one END two", ("two", "END"), "one "),
        ("one END two", ("nothing",), "one END two"),
        ("one EN", ("END",), "one EN"),
        ("aaab", ("aab",), "a"),
        ("ababac!", ("abac",), "ab"),
        ("abcd", ("d", "bcd", "bcx"), "a"),
        ("END", ("END",), ""),
        ("a🌊b", ("🌊",), "a"),
        ("散歩。散歩", ("。",), "散歩"),
        ("a\n\nb", ("\n\n",), "a"),
        ("abc", ("",), "abc"),
    ],
)
def test_a_stop_string_ends_the_text_and_is_no_part_of_it(
    tokenizer: Any, text: str, stop: tuple[str, ...], wanted: str
) -> None:
    stream = TextStream(tokenizer, stop)
    found = pieces(stream, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(found) == wanted
    assert stream.stopped == (wanted != text)
    if stream.stopped:
        assert stream.close() == ""


def test_a_stop_string_may_be_a_special_token(tokenizer: Any) -> None:
    """Which is no text, so that it cannot be found in it; what another stop string held back is shown."""
    ids = [*tokenizer.encode("one EN", add_special_tokens=False), PAD, *tokenizer.encode("D", add_special_tokens=False)]
    for stop in (("<pad>",), ("<pad>", "END")):
        stream = TextStream(tokenizer, stop)
        assert "".join(pieces(stream, ids)) == "one EN"
        assert stream.stopped
    for stop in ((), ("pad",), ("<pa",)):
        stream = TextStream(tokenizer, stop)
        assert "".join(pieces(stream, ids)) == "one END"
        assert not stream.stopped


def test_what_may_begin_a_stop_string_is_held_back_no_longer_than_that(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ("END",))
    assert pieces(stream, tokenizer.encode("a ENE b", add_special_tokens=False)) == [
        "a",
        " ",
        "",
        "",
        "EN",
        "E ",
        "b",
        "",
    ]


def test_random_texts_end_before_the_first_stop_string(tokenizer: Any) -> None:
    """Two letters, so that stop strings begin everywhere: the text is what comes before the one that is there first."""
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(20))
        stop = tuple("".join(rng.choice("ab") for _ in range(rng.randrange(2, 6))) for _ in range(2))
        ends = [text.find(one) + len(one) for one in stop if one in text]
        first = [text[:end] for end in ends if end == min(ends)]
        wanted = min((text.find(one) for one in stop if first and one in first[0]), default=len(text))
        stream = TextStream(tokenizer, stop)
        assert "".join(pieces(stream, tokenizer.encode(text, add_special_tokens=False))) == text[:wanted], (text, stop)
        assert stream.stopped == bool(ends)

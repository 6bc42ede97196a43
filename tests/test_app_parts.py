"""The parts of the app that need no browser: votes, differences, prompt sets, uploads, paths."""

from __future__ import annotations

import csv
import io
import json
import stat
import zipfile
from pathlib import Path

import pytest

from app.backend import TokenScore
from app.highlight import differences, surprise
from app.prompt_sets import PromptItem, exact_matches, read_prompts, table_csv
from app.shared import Shared, name_for
from app.uploads import unpack
from app.votes import ALL_BAD, TIE, Count, Vote, shuffled, tally, to_csv, to_json
from dora_serve.errors import AdapterError, DoraServeError


def _vote(winner: str, *columns: str, prompt: str = "p") -> Vote:
    return Vote("2026-01-01T00:00:00+00:00", prompt, "", columns, tuple(c.upper() for c in columns), winner, False, 0)


# Votes


def test_votes_are_counted_where_they_were_cast() -> None:
    votes = [_vote("b", "a", "b"), _vote("b", "b", "c"), _vote(TIE, "a", "b"), _vote(ALL_BAD, "a")]
    assert tally(votes) == (
        Count("b", 2, 3),
        Count("a", 0, 3),
        Count("c", 0, 1),
        Count(TIE, 1, 4),
        Count(ALL_BAD, 1, 4),
    )
    assert tally([]) == ()


def test_votes_are_exported_whole() -> None:
    votes = [_vote("a", "a", "b", prompt='one,\n"two"'), _vote(TIE, "a")]
    rows = list(csv.reader(io.StringIO(to_csv(votes))))
    assert rows[0][:4] == ["when", "prompt", "system", "winner"]
    assert rows[0][-4:] == ["column_1", "answer_1", "column_2", "answer_2"]
    assert rows[1][1] == 'one,\n"two"'
    assert rows[1][-4:] == ["a", "A", "b", "B"]
    loaded = json.loads(to_json(votes))
    assert [vote["winner"] for vote in loaded["votes"]] == ["a", TIE]
    assert loaded["tally"][0] == {"name": "a", "wins": 1, "shown": 2}


def test_a_spreadsheet_is_given_no_formula() -> None:
    (_, row) = csv.reader(io.StringIO(to_csv([_vote("a", "a", prompt="=HYPERLINK(1)")])))
    assert row[1] == "'=HYPERLINK(1)"
    items = (PromptItem("@SUM(1)", "-1"), PromptItem("1-1"))
    rows = list(csv.reader(io.StringIO(table_csv(items, {"+x": ["\tcmd", "\n=1"]}))))
    assert rows == [["prompt", "answer", "'+x"], ["'@SUM(1)", "'-1", "'\tcmd"], ["1-1", "", "'\n=1"]]


def test_a_blind_order_is_one_of_all_and_says_nothing() -> None:
    columns = ("base", "lora", "dora")
    orders = {shuffled(columns, seed) for seed in range(100)}
    assert len(orders) == 6
    assert shuffled(columns, 3) == shuffled(columns, 3)


# Highlighting


def test_differences_mark_what_the_control_does_not_say() -> None:
    assert differences("the red sea", "the sea") == 'the <mark class="ds-diff">red </mark>sea'
    assert differences("the sea", "the sea") == "the sea"
    assert differences("<b>", "") == '<mark class="ds-diff">&lt;b&gt;</mark>'
    long = "word " * 2000
    assert differences(long, "x") == long


def test_surprise_grows_with_the_base_s_doubt() -> None:
    shown = surprise([TokenScore("sure", 0.0), TokenScore("<half>", -0.6931), TokenScore("odd", -20.0)])
    assert "--heat:0.000" in shown
    assert "--heat:1.000" in shown
    assert 'title="the base: 50.0%"' in shown
    assert "&lt;half&gt;" in shown


def test_a_character_of_several_tokens_is_as_surprising_as_all_of_them() -> None:
    shown = surprise([TokenScore("", -0.5), TokenScore("é", -0.1931), TokenScore("!", 0.0), TokenScore("", -9.0)])
    assert shown.count("<span") == 2
    assert 'title="the base: 50.0%">é<' in shown
    assert 'title="the base: 100.0%">!<' in shown


# Prompt sets


def _file(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "one, two", "answer": "1"}\n\n{"prompt": "three"}\n'),
        ("a.csv", 'prompt,answer\n"one, two",1\nthree,\n'),
    ],
)
def test_prompts_come_with_their_answers(tmp_path: Path, name: str, text: str) -> None:
    items = read_prompts(_file(tmp_path, name, text))
    assert [item.prompt for item in items] == ["one, two", "three"]
    assert items[0].answer == "1"


def test_prompts_of_a_text_are_its_lines(tmp_path: Path) -> None:
    assert read_prompts(_file(tmp_path, "a.txt", "\ufeffone\n\n two \n")) == (PromptItem("one"), PromptItem("two"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "\n", "holds no prompts"),
        ("a.txt", "x\n" * 1001, "1,001 prompts"),
        ("a.jsonl", "{", "cannot be read as prompts"),
        ("a.jsonl", '{"question": 1}', "no `prompt`"),
        ("a.csv", "x,y\n1,2\n", "no `prompt`"),
        ("a.pdf", "x", "suffix is .pdf"),
        ("a.txt", "x" * 20_000_001, "20,000,001 bytes"),
    ],
)
def test_a_file_that_holds_no_prompts_is_said_to(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(DoraServeError, match=said):
        read_prompts(_file(tmp_path, name, text))


def test_exact_matches_count_what_has_a_right_answer() -> None:
    items = (PromptItem("a", "1"), PromptItem("b", "2"), PromptItem("c"))
    assert exact_matches(items, [" 1\n", "3", "x"]) == (1, 2)
    assert list(csv.reader(io.StringIO(table_csv(items, {"base": ["x", "y", "z"]}))))[1] == ["a", "1", "x"]


# Uploads


def _zip(path: Path, entries: dict[str, bytes], link: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in entries.items():
            archive.writestr(name, contents)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
    return path


GOOD = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}


def test_a_zip_is_unpacked_from_whatever_folder_it_has_inside(tmp_path: Path) -> None:
    entries = {f"my/adapter/{name}": data for name, data in GOOD.items()}
    entries |= {"my/other.json": b"{}", "my/adapter/run.py": b""}
    folder = unpack([_zip(tmp_path / "a.zip", entries)], tmp_path / "into")
    assert sorted(path.name for path in folder.iterdir()) == sorted(GOOD)


def test_two_files_get_the_names_that_readers_look_for(tmp_path: Path) -> None:
    files = [_file(tmp_path, "my.safetensors", "x"), _file(tmp_path, "config-1.json", "{}")]
    folder = unpack(files, tmp_path / "into")
    assert sorted(path.name for path in folder.iterdir()) == sorted(GOOD)


@pytest.mark.parametrize(
    "name", ["../adapter_model.safetensors", "/etc/x.json", "a/../../x.json", "..\\x.json", "C:\\x.json"]
)
def test_a_zip_that_climbs_out_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="climbs out of its folder"):
        unpack([_zip(tmp_path / "a.zip", {**GOOD, name: b"bad"})], tmp_path / "into")
    assert not list((tmp_path / "into").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "into"]


def test_a_zip_with_an_entry_that_names_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="names no file"):
        unpack([_zip(tmp_path / "a.zip", {**GOOD, ".": b"x"})], tmp_path / "into")
    unnamed = _zip(tmp_path / "b.zip", {**GOOD, "Q.json": b"x"})
    unnamed.write_bytes(unnamed.read_bytes().replace(b"Q.json", b"\0.json"))
    with pytest.raises(AdapterError, match="cannot be unpacked"):
        unpack([unnamed], tmp_path / "into")
    assert not list((tmp_path / "into").iterdir())


def test_a_zip_with_links_or_too_much_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is a link"):
        unpack([_zip(tmp_path / "a.zip", GOOD, link="adapter_x.json")], tmp_path / "into")
    with pytest.raises(AdapterError, match="larger than 1,000 bytes"):
        unpack([_zip(tmp_path / "b.zip", {**GOOD, "a.json": b"0" * 2000})], tmp_path / "into", most_bytes=1000)
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        unpack([_zip(tmp_path / "c.zip", {"a.json": b"{}"})], tmp_path / "into")
    with pytest.raises(AdapterError, match=r"holds 2 adapter_config\.json"):
        unpack(
            [_zip(tmp_path / "d.zip", {"a/adapter_config.json": b"", "b/adapter_config.json": b""})], tmp_path / "into"
        )
    assert not list((tmp_path / "into").iterdir())


def test_a_zip_that_is_damaged_anywhere_is_refused_in_words(tmp_path: Path) -> None:
    """Each byte turned in its place: unpacked as it was, or refused, and never anything else."""
    entries = {"adapter_config.json": b"{}" * 50, "adapter_model.safetensors": b"0123456789" * 30}
    packed = tmp_path / "a.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in entries.items():
            archive.writestr(name, contents)
    whole, refused = packed.read_bytes(), 0
    for place in range(len(whole)):
        packed.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            folder = unpack([packed], tmp_path / "into")
        except AdapterError:
            refused += 1
        else:
            assert {path.name for path in folder.iterdir()} <= entries.keys()
    assert refused > len(whole) // 2


def test_what_is_no_zip_or_only_half_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be unpacked"):
        unpack([_file(tmp_path, "a.zip", "no zip")], tmp_path / "into")
    for names in (["a.safetensors"], ["a.json"], ["a.safetensors", "b.safetensors"], []):
        with pytest.raises(AdapterError, match=r"wanted a \.safetensors with its adapter_config\.json"):
            unpack([_file(tmp_path, name, "{}") for name in names], tmp_path / "into")


# Paths


def test_only_the_given_folders_are_read(tmp_path: Path) -> None:
    class Here:
        confined = True

    shared = Shared(Here(), tmp_path / "uploads", (tmp_path / "adapters",))  # type: ignore[arg-type]
    (tmp_path / "adapters" / "a").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "secret")
    assert shared.source(str(tmp_path / "adapters" / "a")) == tmp_path / "adapters" / "a"
    assert shared.source("user/name@main:sub") == "user/name@main:sub"
    for text in ("x\0y", "y" * 10_000):
        with pytest.raises(AdapterError, match="is no path"):
            shared.source(text)
    for path in (tmp_path / "secret", tmp_path / "adapters" / ".." / "secret", tmp_path / "adapters" / "link"):
        with pytest.raises(AdapterError, match="in no folder that this page may read"):
            shared.source(str(path))
    with pytest.raises(AdapterError, match="No adapter is named"):
        shared.source("  ")


@pytest.mark.parametrize(
    ("source", "name"),
    [("/a/b c/", "b-c"), ("user/name@main", "name"), ("user/name:sub/folder", "folder"), ("..", "..")],
)
def test_an_adapter_without_a_name_gets_one(source: str, name: str) -> None:
    assert name_for(source) == name

"""Text sources: markup, formats, splits."""

import bz2
import json
import random
from pathlib import Path

import pytest
import yaml
from test_sources import request, script

from prunelib.data.analogies import parse_analogies, read_analogies, write_analogies
from prunelib.data.text import (
    SPLITS,
    Article,
    assign_splits,
    check_fractions,
    collect,
    read_articles,
    read_dataset,
    read_jsonl,
    read_plain,
    read_wikipedia,
    strip_markup,
    write_articles,
)
from prunelib.errors import InputError, IntegrityError

ROOT = Path(__file__).resolve().parents[1]

MARKUP = """{{Infobox thing|name=X}}
[[File:x.jpg|thumb|A [[picture]] here]]
'''Alpha''' ({{IPA|a}}; {{lang|el|άλφα}}) is the [[first letter|first]] of [[letters]].<ref>c</ref>
It is {{convert|5|km|mi}} long&nbsp;and 3&ndash;4 wide<!-- no -->.



* one
* two [http://x.org with a link]
{| class="wikitable"
! head
|-
| cell
|}
== History ==
Old.<ref name="a" />
=== Detail ===
Kept.
== References ==
{{reflist}}
=== Below ===
Gone.
== Legacy ==
Back.
[[Category:Letters]]
[[de:Alpha]]
"""

PLAIN = """Alpha (άλφα) is the first of letters.
It is 5 km long and 3\u20134 wide.

one
two with a link

History

Old.

Detail

Kept.

Legacy

Back."""


def test_strip_markup_by_hand():
    assert strip_markup(MARKUP) == PLAIN


def test_unbalanced_markup_leaves_no_residue():
    text = strip_markup("A '' b <ref>c\n{| d\n| e\nf {{g|h}} <small>i</small>\n[[File:j.png|k")
    for residue in ("<", "{", "|", "''", "[["):
        assert residue not in text
    assert "A" in text
    assert "i" in text


def dump(pages: list[tuple[str, str, str, bool]]) -> bytes:
    body = "".join(
        f"<page><title>{title}</title><ns>{ns}</ns><id>{number}</id>"
        + ('<redirect title="x" />' if redirect else "")
        + f"<revision><id>99</id><text>{text}</text></revision></page>"
        for number, (title, ns, text, redirect) in enumerate(pages, start=1)
    )
    return (
        f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.8/">{body}</mediawiki>'.encode()
    )


def test_wikipedia_dump_takes_articles_only(tmp_path):
    pages = [
        ("Kept", "0", "Some '''bold''' text", False),
        ("Moved", "0", "#REDIRECT [[Kept]]", True),
        ("Wikipedia:About", "4", "policy", False),
        ("Kept (disambiguation)", "0", "list", False),
    ]
    for name, content in (("a.xml", dump(pages)), ("a.xml.bz2", bz2.compress(dump(pages)))):
        path = tmp_path / name
        path.write_bytes(content)
        assert list(read_wikipedia(path)) == [Article(1, "Kept", "Some bold text")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.bz2", b"not bz2"),
        ("a.bz2", bz2.compress(dump([]))[:-8]),
        ("a.xml", b"<mediawiki><page>"),
        ("a.xml", b"<html></html>"),
    ],
)
def test_bad_dump_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="Wikipedia dump") as caught:
        list(read_wikipedia(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_entity_bomb_is_refused(tmp_path):
    levels = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10))
    bomb = (
        f'<!DOCTYPE x [<!ENTITY e0 "{"x" * 100}">{levels}]><mediawiki><page>&e9;</page></mediawiki>'
    )
    (tmp_path / "a.xml").write_text(bomb)
    with pytest.raises(InputError, match="amplification"):
        list(read_wikipedia(tmp_path / "a.xml"))


def test_jsonl_and_plain(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "T", "text": "x"}\n\n{"text": "a\\u2028b"}\n')
    assert list(read_jsonl(path)) == [Article(0, "T", "x"), Article(2, "", "a\u2028b")]
    path.write_text('{"text": "x"}\n{"body": "y"}\n')
    with pytest.raises(InputError, match="line 2: expected"):
        list(read_jsonl(path))
    path.write_text('{"text": 3}\n')
    with pytest.raises(InputError, match="not a string"):
        list(read_jsonl(path))
    (tmp_path / "one.txt").write_text("first\n")
    (tmp_path / "two.txt").write_text("second")
    assert [a.text for a in read_plain(tmp_path)] == ["first", "second"]
    assert [a.title for a in read_plain(tmp_path / "two.txt")] == ["two"]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"no \*\.txt"):
        list(read_plain(tmp_path / "none"))


def test_dataset_rows_are_kept_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    directory = tmp_path / "data"
    directory.mkdir()
    rows = [{"sentence": ""}, {"sentence": " = Title = \n"}, {"sentence": ""}]
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = list(read_dataset(str(directory), split="test", text_field="sentence"))
    assert [article.text for article in read] == [row["sentence"] for row in rows]
    kept = assign_splits(collect(read, 0, "x"), {"evaluation": 1}, 0)
    assert [article.text for article, _ in kept] == [row["sentence"] for row in rows]
    with pytest.raises(InputError, match="no text field 'text'"):
        list(read_dataset(str(directory), split="test"))
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        list(read_dataset(str(directory), split="nothing"))
    assert "\n" not in str(caught.value)


# --- splits -----------------------------------------------------------------------------------

SHARES = {"calibration": 0.35, "recovery": 0.35, "evaluation": 0.3}


def articles(n: int) -> list[Article]:
    return [Article(i, f"title {i}", f"text number {i}") for i in range(n)]


def by_title(pairs) -> dict[str, str]:
    return {article.title: split for article, split in pairs}


def test_splits_have_the_shares_and_do_not_depend_on_order():
    pairs = assign_splits(articles(100), SHARES, 0)
    counts = {name: sum(split == name for _, split in pairs) for name in SPLITS}
    assert counts == {"calibration": 35, "recovery": 35, "evaluation": 30}
    assert [article.id for article, _ in pairs] == list(range(100))
    shuffled = articles(100)
    random.Random(1).shuffle(shuffled)
    assert by_title(assign_splits(shuffled, SHARES, 0)) == by_title(pairs)
    assert by_title(assign_splits(articles(100), SHARES, 1)) != by_title(pairs)


def test_a_repeated_text_never_stands_in_two_splits():
    doubled = articles(50) + [Article(i + 50, f"other {i}", f"text  number {i}") for i in range(50)]
    pairs = assign_splits(doubled, SHARES, 0)
    texts = [" ".join(article.text.split()) for article, _ in pairs]
    assert len(pairs) == len(set(texts)) == 50


def test_every_split_gets_an_article_or_the_text_is_refused():
    assert sorted(split for _, split in assign_splits(articles(3), SHARES, 0)) == sorted(SPLITS)
    with pytest.raises(InputError, match="2 different articles cannot fill 3 splits"):
        assign_splits(articles(2), SHARES, 0)


@pytest.mark.parametrize(
    "shares",
    [{}, {"evaluation": 0.9}, {"evaluation": 1.5, "recovery": -0.5}, {"test": 1.0}],
)
def test_bad_shares_are_refused(shares):
    with pytest.raises(InputError, match="here"):
        check_fractions(shares, "here")


def test_shares_are_exact():
    assert (
        sum(check_fractions({"calibration": 0.1, "recovery": 0.2, "evaluation": 0.7}, "").values())
        == 1
    )


def test_articles_file_round_trip(tmp_path):
    rows = [(Article(1, "Ä", "a\u2028b\nc"), "recovery"), (Article(2, "B", "d"), "evaluation")]
    counts = write_articles(tmp_path, rows)
    assert counts == {
        "articles": {"recovery": 1, "evaluation": 1},
        "characters": {"recovery": 5, "evaluation": 1},
    }
    assert read_articles(tmp_path, "recovery") == [rows[0][0]]
    with pytest.raises(InputError, match="no article in the split 'calibration'"):
        read_articles(tmp_path, "calibration")
    with pytest.raises(InputError, match="allowed: calibration, recovery, evaluation"):
        read_articles(tmp_path, "train")
    (tmp_path / "articles.jsonl").write_text("{broken")
    with pytest.raises(IntegrityError):
        read_articles(tmp_path, "recovery")


def test_nothing_long_enough_is_refused():
    with pytest.raises(InputError, match="none of its 3 articles has min_characters = 99"):
        collect(articles(3), 99, "x")


# --- analogies --------------------------------------------------------------------------------


def test_analogies_round_trip_and_bad_lines(tmp_path):
    rows = parse_analogies([": cap", "Athens Greece Bern Switzerland", "", ": x", "a b c d"], "f")
    assert rows[0] == {
        "category": "cap", "a": "Athens", "b": "Greece", "c": "Bern", "d": "Switzerland",
    }  # fmt: skip
    assert rows[1]["category"] == "x"
    write_analogies(tmp_path, rows)
    assert read_analogies(tmp_path) == rows
    with pytest.raises(InputError, match="f line 1"):
        parse_analogies(["a b c d"], "f")
    with pytest.raises(InputError, match="f line 2"):
        parse_analogies([": x", "a b c"], "f")
    with pytest.raises(InputError, match="no analogy"):
        parse_analogies([], "f")
    (tmp_path / "analogies.jsonl").unlink()
    with pytest.raises(IntegrityError):
        read_analogies(tmp_path)


# --- steps ------------------------------------------------------------------------------------


def test_fetch_text_step(tmp_path):
    source = tmp_path / "a.jsonl"
    rows = [{"title": f"t{i}", "text": f"text {i}"} for i in range(10)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    out.mkdir()
    params = {
        "name": "mine",
        "source": f"dir:{source}",
        "format": "jsonl",
        "split": {"calibration": 0.5, "evaluation": 0.5},
        "seed": 3,
        "licence": "CC0",
    }
    step = script("fetch_text")
    step.main(request("fetch_text", params, out), out)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["articles"] == {"calibration": 5, "evaluation": 5}
    assert meta["licence"] == "CC0"
    with pytest.raises(InputError, match="allowed: wikipedia, jsonl, plain, dataset"):
        step.main(request("fetch_text", {**params, "format": "pdf"}, out), out)
    with pytest.raises(InputError, match="does not exist"):
        step.main(request("fetch_text", {**params, "source": "dir:/nowhere"}, out), out)
    hub = {**params, "source": "hf:a/b@unpinned", "format": "dataset"}
    with pytest.raises(InputError, match="make pin"):
        step.main(request("fetch_text", hub, out), out)
    with pytest.raises(InputError, match="seed is missing"):
        step.main(request("fetch_text", {k: params[k] for k in params if k != "seed"}, out), out)


@pytest.mark.real
def test_the_real_text_has_disjoint_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    catalogue = yaml.safe_load((ROOT / "config/texts.yaml").read_text())
    params = {"name": "wikipedia-sample", **catalogue["wikipedia-sample"]}
    script("fetch_text").main(request("fetch_text", params, tmp_path), tmp_path)
    parts = {split: read_articles(tmp_path, split) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {
        "calibration": 31, "recovery": 31, "evaluation": 27,
    }  # fmt: skip
    # Disjoint as articles, and no paragraph of prose stands in two parts either.
    for key in ("id", "title", "text"):
        values = [{getattr(article, key) for article in part} for part in parts.values()]
        assert sum(map(len, values)) == len(set.union(*values)) == 89
    paragraphs = [
        {line for article in part for line in article.text.splitlines() if len(line) > 80}
        for part in parts.values()
    ]
    assert min(map(len, paragraphs)) > 500
    assert sum(map(len, paragraphs)) == len(set.union(*paragraphs))
    total = sum(len(article.text) for part in parts.values() for article in part)
    assert 2_500_000 < total < 3_000_000
    joined = "\n".join(article.text for part in parts.values() for article in part)
    for residue in ("{{", "}}", "[[", "<ref", "''", "http://", "&nbsp;", "\n\n\n"):
        assert residue not in joined


@pytest.mark.real
def test_the_real_analogies(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    catalogue = yaml.safe_load((ROOT / "config/texts.yaml").read_text())
    params = {"name": "questions-words", **catalogue["questions-words"]}
    script("fetch_analogies").main(request("fetch_analogies", params, tmp_path), tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["analogies"], meta["categories"]) == (19_544, 14)
    assert len(read_analogies(tmp_path)) == 19_544

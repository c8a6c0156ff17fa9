"""Text sources: read articles, strip their markup, split them into disjoint parts.

An article is the unit of everything that follows: calibration windows never cross one, and the
calibration, recovery and evaluation parts share none.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from prunelib.errors import InputError, IntegrityError

LOG = logging.getLogger(__name__)

SPLITS = ("calibration", "recovery", "evaluation")
FORMATS = ("wikipedia", "jsonl", "plain", "dataset", "alpaca")

# Elements whose content is apparatus, code or formulae, not prose.
_DROPPED_TAGS = frozenset(
    {
        "ref",
        "references",
        "table",
        "gallery",
        "math",
        "chem",
        "timeline",
        "imagemap",
        "graph",
        "source",
        "syntaxhighlight",
        "code",
        "pre",
        "score",
        "hiero",
        "mapframe",
        "noinclude",
        "includeonly",
        "templatestyles",
    }
)
_BREAKING_TAGS = frozenset({"br", "hr", "li", "dd", "dt", "p", "div", "blockquote", "poem"})
# Sections that hold lists of sources and links; a dump keeps them at the end of an article.
_DROPPED_SECTIONS = frozenset(
    {
        "see also",
        "references",
        "external links",
        "further reading",
        "bibliography",
        "sources",
        "notes",
        "footnotes",
        "notes and references",
        "citations",
        "works cited",
    }
)
# Links to another namespace or language: pictures, categories, `[[de:...]]`.
_NAMESPACED_LINK = re.compile(
    r"^\s*:?\s*(?:file|image|media|category|template|wikipedia|wikt|wiktionary|special|portal|help"
    r"|[a-z]{2,3}|[a-z]{2,3}-[a-z-]+|simple)\s*:(?!\s)",
    re.IGNORECASE,
)
_EMPTY_BRACKETS = re.compile(r"\((?:[,;:/\u2013-]|\bor\b|\band\b|\s)*\)|\[\s*\]")


@dataclass(frozen=True)
class Article:
    """One document of a text source."""

    id: int
    title: str
    text: str


def _template_text(template: Any) -> str:
    """Return what a template shows, for the few that stand for words inside a sentence."""
    name = str(template.name).strip().lower()
    values = [
        strip_nodes(parameter.value.nodes).strip()
        for parameter in template.params
        if not parameter.showkey
    ]
    if name in ("convert", "cvt") and len(values) >= 2:
        return f"{values[0]} {values[1]}"
    if (name == "lang" or name in ("nowrap", "transl", "transliteration", "nihongo")) and values:
        return values[0] if name == "nihongo" else values[-1]
    if name in ("nbsp", "ndash", "spaced ndash", "snd", "mdash", "emdash"):
        return " " if name == "nbsp" else " \u2013 "
    return ""


def strip_nodes(nodes: Iterable[Any]) -> str:
    """Return the plain text of parsed wiki nodes (mwparserfromhell), without the apparatus.

    One walk over the tree: removing nodes from it instead is quadratic in the article's length.
    """
    from mwparserfromhell import nodes as wiki

    parts: list[str] = []
    for node in nodes:
        if isinstance(node, wiki.Text):
            parts.append(node.value)
        elif isinstance(node, wiki.Wikilink):
            if not _NAMESPACED_LINK.match(str(node.title)):
                shown = node.text if node.text is not None else node.title
                parts.append(strip_nodes(shown.nodes))
        elif isinstance(node, wiki.Template):
            parts.append(_template_text(node))
        elif isinstance(node, wiki.Tag):
            name = str(node.tag).strip().lower()
            # A list marker of wiki markup (`*`) follows a newline of its own.
            if name in _BREAKING_TAGS and not node.wiki_markup:
                parts.append("\n")
            if name not in _DROPPED_TAGS and node.contents is not None:
                parts.append(strip_nodes(node.contents.nodes))
        elif isinstance(node, wiki.ExternalLink):
            if node.brackets and node.title is not None:
                parts.append(strip_nodes(node.title.nodes))
        elif isinstance(node, wiki.HTMLEntity):
            parts.append(node.normalize())
        elif isinstance(node, wiki.Heading):
            parts.append(f"\n\n{strip_nodes(node.title.nodes).strip()}\n\n")
    return "".join(parts)


def strip_markup(source: str) -> str:
    """Return the prose of one article's wiki markup.

    Tables, references, files, categories, templates and the closing sections of sources and links
    are dropped; headings stay as paragraphs of their own; blank lines are collapsed to one.
    """
    import mwparserfromhell
    from mwparserfromhell import nodes as wiki

    kept: list[Any] = []
    dropped_level = 0
    for node in mwparserfromhell.parse(source).nodes:
        if isinstance(node, wiki.Heading):
            if dropped_level and node.level > dropped_level:
                continue
            title = strip_nodes(node.title.nodes).strip().lower()
            dropped_level = node.level if title in _DROPPED_SECTIONS else 0
        if not dropped_level:
            kept.append(node)
    return tidy(strip_nodes(kept))


# What an author's unbalanced markup leaves behind after parsing.
_RESIDUE = re.compile(
    r"<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref>|</?[a-z]+\b[^<>]*>|\{\{[^{}]*\}\}|\'{2,}", re.IGNORECASE
)
_TABLE_LINE = re.compile(r"^\s*(?:\{\||\|[-+}]?|!)|^\s*\[\[(?:file|image):", re.IGNORECASE)


def tidy(text: str) -> str:
    """Clean the lines of stripped markup.

    Collapses blank lines to one and spaces to one, and drops lines without a letter, empty brackets
    and the remains of unbalanced markup.
    """
    lines: list[str] = []
    for line in text.replace("\xa0", " ").splitlines():
        line = re.sub(r"\s+", " ", _EMPTY_BRACKETS.sub("", _RESIDUE.sub("", line))).strip()
        line = re.sub(r"\( ?(?:[,;:] ?)*", "(", line)
        line = re.sub(r" ([,.;:)])", r"\1", line)
        if not line:
            if lines and lines[-1]:
                lines.append("")
        elif any(character.isalpha() for character in line) and not _TABLE_LINE.match(line):
            lines.append(line)
    return "\n".join(lines).strip()


def read_wikipedia(path: Path) -> Iterator[Article]:
    """Stream the articles of a Wikipedia dump (bz2 or plain XML) with their markup stripped.

    Redirects, other namespaces and disambiguation pages are left out. Memory stays at one page.

    Raises:
        InputError: the file is not a MediaWiki export.
    """
    from xml.etree import ElementTree

    opener = bz2.open if path.suffix == ".bz2" else open
    seen = 0
    try:
        with opener(path, "rb") as file:
            # No entity is expanded from outside: expat's limit on amplification holds.
            for _, element in ElementTree.iterparse(file):  # noqa: S314
                namespace, brace, tag = element.tag.rpartition("}")
                if tag != "page":
                    continue
                seen += 1
                article = _wikipedia_article(element, namespace + brace)
                element.clear()
                if article is not None:
                    yield article
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise InputError(f"{path} is not a readable Wikipedia dump: {error}") from error
    if not seen:
        raise InputError(f"{path} holds no <page>: it is not a Wikipedia dump")


def _wikipedia_article(page: Any, namespace: str) -> Article | None:
    def field(name: str) -> str:
        return page.findtext("/".join(namespace + part for part in name.split("/"))) or ""

    title = field("title")
    redirect = page.find(f"{namespace}redirect") is not None
    if field("ns") != "0" or redirect or title.endswith("(disambiguation)"):
        return None
    return Article(int(field("id")), title, strip_markup(field("revision/text")))


def read_jsonl(path: Path, text_field: str = "text") -> Iterator[Article]:
    """Read one article per line: objects with ``text_field`` and, if there is one, ``title``.

    Raises:
        InputError: a line is not such an object.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row[text_field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path} line {number + 1}: expected a JSON object with the key {text_field!r}"
                ) from error
            if not isinstance(text, str):
                raise InputError(f"{path} line {number + 1}: {text_field!r} is not a string")
            yield Article(number, str(row.get("title", "")), text)


def read_plain(path: Path) -> Iterator[Article]:
    """Read plain text: one article per ``*.txt`` file of a directory, or a single file.

    Raises:
        InputError: the directory holds no such file.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no *.txt file")
    for number, file in enumerate(files):
        yield Article(number, file.stem, file.read_text(encoding="utf-8").strip())


def load_rows(
    name: str,
    *,
    revision: str | None = None,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Any:
    """Return a dataset's rows, of the Hugging Face hub or of a local directory in its layout.

    With ``streaming`` nothing is downloaded beforehand, and rows can only be read in order.

    Raises:
        InputError: the dataset, its config or split is not there.
    """
    import datasets

    try:
        return datasets.load_dataset(
            name, config, split=split, revision=revision, streaming=streaming
        )
    except Exception as error:  # the library raises a dozen kinds, from five packages
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"dataset {name} (config {config}, split {split}) cannot be loaded: {reason}"
        ) from error


def read_dataset(
    name: str,
    *,
    revision: str | None = None,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
) -> Iterator[Article]:
    """Read a dataset of the Hugging Face hub, or a local directory in its layout: a row an article.

    Rows are kept as they are, the empty ones too: the published perplexity conventions join them.

    Raises:
        InputError: the dataset, its config, split or text field is not there.
    """
    rows = load_rows(name, revision=revision, config=config, split=split)
    if text_field not in rows.column_names:
        raise InputError(
            f"dataset {name} has no text field {text_field!r}; it has {rows.column_names}"
        )
    titles = rows["title"] if "title" in rows.column_names else None
    for number, text in enumerate(rows[text_field]):
        yield Article(number, titles[number] if titles else "", text)


def collect(articles: Iterable[Article], min_characters: int, what: str) -> list[Article]:
    """Return the articles of at least ``min_characters``, logging progress.

    Raises:
        InputError: none is left.
    """
    kept: list[Article] = []
    started = logged = time.monotonic()
    count = 0
    for count, article in enumerate(articles, start=1):
        if len(article.text) >= min_characters:
            kept.append(article)
        now = time.monotonic()
        if now - logged >= 10:
            logged = now
            LOG.info("%s: %d articles read, %.1f/s", what, count, count / (now - started))
    if not kept:
        raise InputError(
            f"text {what}: none of its {count} articles has min_characters = {min_characters}"
        )
    LOG.info(
        "%s: kept %d of %d articles, %.1f s", what, len(kept), count, time.monotonic() - started
    )
    return kept


def check_fractions(fractions: Mapping[str, float], where: str) -> dict[str, Fraction]:
    """Return the share of each split, exactly, in the order of ``SPLITS``.

    Raises:
        InputError: an unknown split, a negative share, or shares that do not add up to 1.
    """
    unknown = sorted(set(fractions) - set(SPLITS))
    if unknown:
        raise InputError(f"{where}: unknown split {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
    shares = {name: Fraction(str(fractions.get(name, 0))) for name in SPLITS}
    if min(shares.values()) < 0 or sum(shares.values()) != 1:
        raise InputError(f"{where}: the shares must be at least 0 and add up to 1: {fractions}")
    return shares


def assign_splits(
    articles: Iterable[Article], fractions: Mapping[str, float], seed: int, where: str = "split"
) -> list[tuple[Article, str]]:
    """Give every article to one split; repeated texts are dropped when there are several splits.

    Articles are ranked by a hash of seed and title (then of the text) and cut by the shares, so the
    result does not depend on the order they come in. A text never stands in two splits.

    Args:
        articles: the articles.
        fractions: share of articles per split, adding up to 1.
        seed: changes the ranking.
        where: names the setting in an error.

    Returns:
        The kept articles in the order given, each with its split.

    Raises:
        InputError: bad shares, or too few articles to give every split at least one.
    """
    shares = check_fractions(fractions, where)
    wanted = [name for name in SPLITS if shares[name]]
    articles = list(articles)
    if len(wanted) == 1:
        return [(article, wanted[0]) for article in articles]

    def rank(article: Article) -> tuple[str, str]:
        title = f"{seed}\0{article.title}".encode()
        return hashlib.sha256(title).hexdigest(), _digest(article.text)

    first: dict[str, int] = {}
    for index in sorted(range(len(articles)), key=lambda i: rank(articles[i])):
        first.setdefault(_digest(articles[index].text), index)
    order = list(first.values())
    if len(order) < len(wanted):
        raise InputError(
            f"{where}: {len(order)} different articles cannot fill {len(wanted)} splits"
        )
    split_of = dict(zip(order, _labels(len(order), shares), strict=True))
    return [(articles[index], split_of[index]) for index in sorted(split_of)]


def _digest(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def _labels(count: int, shares: Mapping[str, Fraction]) -> list[str]:
    """Cut ``count`` places by the shares, at least one place for every share above 0."""
    wanted = [name for name in SPLITS if shares[name]]
    sizes = {name: max(1, int(count * shares[name])) for name in wanted}
    while sum(sizes.values()) < count:
        name = max(wanted, key=lambda name: count * shares[name] - sizes[name])
        sizes[name] += 1
    while sum(sizes.values()) > count:
        sizes[max(wanted, key=lambda name: sizes[name])] -= 1
    return [name for name in wanted for _ in range(sizes[name])]


def write_articles(directory: Path, articles: Iterable[tuple[Article, str]]) -> dict[str, Any]:
    """Write ``articles.jsonl``; return the counts of articles and characters per split."""
    articles = list(articles)
    with (directory / "articles.jsonl").open("w", encoding="utf-8") as file:
        for article, split in articles:
            row = {**asdict(article), "split": split}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    present = [split for split in SPLITS if any(name == split for _, name in articles)]
    return {
        "articles": {s: sum(name == s for _, name in articles) for s in present},
        "characters": {s: sum(len(a.text) for a, name in articles if name == s) for s in present},
    }


def read_articles(directory: Path, split: str) -> list[Article]:
    """Return the articles of one split of a text artefact, in file order.

    Raises:
        InputError: the split is unknown or empty.
        IntegrityError: the file is missing or not JSON lines.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    path = directory / "articles.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        chosen = [
            Article(row["id"], row["title"], row["text"]) for row in rows if row["split"] == split
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error!r}") from error
    if not chosen:
        raise InputError(f"{path} has no article in the split {split!r}")
    return chosen

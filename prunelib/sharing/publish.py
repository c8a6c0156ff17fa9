"""Publishing: what of an experiment is finished goes to a remote and into one commit.

In this order, so that git never names what the remote does not have: check, add to DVC, push, look
at the remote, commit. Every part is repeated or skipped by the next call, wherever one was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from prunelib.errors import InputError, IntegrityError
from prunelib.experiment.graph import RESULTS, Node
from prunelib.plan import FILE_NAME as PLAN
from prunelib.provenance import artefact
from prunelib.sharing.repository import (
    HELD,
    IN_GIT,
    REPORT,
    changed,
    committed,
    git,
    has_record,
    in_words,
    is_here,
    is_shared,
    pointer_of,
    record_of,
    record_size_of,
    restore_held,
    set_merge_driver,
    size_of,
    staged,
    write_record,
)
from prunelib.sharing.store import Store

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stock:
    """What of an experiment is there to be published.

    Attributes:
        metrics: finished and small: whole artefacts in git.
        held: finished checkpoints and adapters whose files go to DVC.
        plans: finished checkpoints of which only the plan is shared.
        merged: merged checkpoints that the light form leaves out.
        others: finished here too, but git holds the artefact of somebody else under the same key.
        shared: checkpoints and adapters that git knows and that are not here.
        unfinished: everything else.
        paths: what the last commit holds under ``results/``, and is here as it has it.
    """

    metrics: tuple[Node, ...]
    held: tuple[Node, ...]
    plans: tuple[Node, ...]
    merged: tuple[Node, ...]
    others: tuple[Node, ...]
    shared: tuple[Node, ...]
    unfinished: tuple[Node, ...]
    paths: frozenset[str]

    @property
    def new(self) -> list[Node]:
        """What the last commit does not have yet, in the form in which it is shared."""
        metrics = [node for node in self.metrics if not self._has(node.directory)]
        plans = [node for node in self.plans if not self._has(record_of(node.directory))]
        return [*metrics, *self.new_held, *plans]

    @property
    def new_held(self) -> list[Node]:
        """The directories that the last commit has no pointer to."""
        return [node for node in self.held if str(pointer_of(node.directory)) not in self.paths]

    def _has(self, directory: Path) -> bool:
        return str(directory / artefact.RECORD) in self.paths


def take_stock(nodes: Iterable[Node], *, light: bool) -> Stock:
    """Sort the steps of an experiment by what publishing does with them.

    Args:
        nodes: the steps of its rows.
        light: share checkpoints as plans, unless the last commit has them whole already.
    """
    paths = frozenset(committed() - changed())
    found: dict[str, list[Node]] = {
        name: [] for name in Stock.__dataclass_fields__ if name != "paths"
    }
    for node in nodes:
        found[_kind(node, paths, light)].append(node)
    return Stock(**{name: tuple(those) for name, those in found.items()}, paths=paths)


def _kind(node: Node, paths: frozenset[str], light: bool) -> str:
    if not artefact.is_valid(node.directory, node.key):
        return "shared" if not is_here(node.directory) and is_shared(node) else "unfinished"
    if node.step in IN_GIT:
        return "metrics"
    record = record_of(node.directory) / artefact.RECORD
    if str(record) in paths and has_record(node):
        mine = (node.directory / artefact.RECORD).read_bytes()
        if record.read_bytes() != mine:
            return "others"
    if light and str(pointer_of(node.directory)) not in paths:
        if node.step == "prune" and _computed(node):
            return "held"
        return {"prune": "plans", "merge": "merged"}.get(node.step, "held")
    return "held"


def _computed(node: Node) -> bool:
    """Whether a pruned checkpoint holds weights that its plan does not say: computed adapters."""
    plan = node.directory / PLAN
    return plan.is_file() and "shared" in json.loads(plan.read_text(encoding="utf-8"))


def sizes(stock: Stock) -> str:
    """Return in one line what both forms of the checkpoints take, and the adapters."""
    pruned = [node for node in (*stock.held, *stock.plans) if node.step == "prune"]
    merged = [node for node in (*stock.held, *stock.merged) if node.step == "merge"]
    adapters = [node for node in stock.held if node.step == "recover"]

    def total(nodes: list[Node]) -> str:
        return in_words(sum(map(size_of, nodes)))

    plans = in_words(sum(map(record_size_of, pruned)))
    words = (
        f"{_count(pruned, 'checkpoint')}: {total(pruned)} in full, {plans} as plans (--light); "
        f"{_count(adapters, 'adapter')}: {total(adapters)} in both forms"
    )
    if merged:
        words += f"; {len(merged)} merged: {total(merged)}, left out by --light"
    return words


def describe(stock: Stock, say: Say) -> None:
    """Say what there is to be published and how large both forms are."""
    for node in stock.others:
        say(f"kept      {node.directory}: git has this key from somebody else; that one stays")
    say(
        f"found     {_count(stock.metrics, 'metric')}, {_count(stock.held, 'directory')} for DVC, "
        f"{_count(stock.plans, 'plan')}; not finished: {len(stock.unfinished)}; shared and not "
        f"here: {len(stock.shared)}"
    )
    say(f"sizes     {sizes(stock)}")


def publish(
    name: str,
    nodes: Iterable[Node],
    *,
    remote: str | None,
    push: bool,
    light: bool,
    read_back: bool,
    say: Say,
) -> bool:
    """Publish what is finished of an experiment; the sharing lock is held by the caller.

    Args:
        name: the experiment's, for the commit.
        nodes: the steps of its rows.
        remote: where to, None for the default remote.
        push: False leaves the remote alone, which the commit then runs ahead of.
        light: checkpoints as plans.
        read_back: read every object of the experiment on the remote, send damaged ones again.
        say: is told each step.

    Returns:
        Whether there was anything to commit.

    Raises:
        InputError: nothing is finished; no such remote; other changes are staged; no identity.
        IntegrityError: an artefact is not what its provenance says; nothing was added then.
        PrunelibError: DVC or git failed, or the remote did not take what it was sent.
    """
    _clear_dead_git()
    _check_git()
    restore_held()
    stock = take_stock(nodes, light=light)
    if not (stock.metrics or stock.held or stock.plans):
        raise InputError(
            f"{name}: nothing to publish here: {len(stock.unfinished)} steps are not finished"
        )
    _refuse_unrelated(stock)
    set_merge_driver()
    store = Store(remote, needed=push)
    describe(stock, say)
    _verify(stock.new)
    say(f"checked   sha256 of {_count(stock.new, 'artefact')}")
    _add(store, stock)
    for node in (*stock.held, *stock.plans):
        write_record(node)
    if push:
        _push(store, stock, read_back, say)
    else:
        say("pushed    nothing: --no-push; run again without it before others pull")
    return _commit(name, stock, say)


def _count(those: Iterable[Node], what: str) -> str:
    number = len(list(those))
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def _verify(nodes: Iterable[Node]) -> None:
    for node in nodes:
        try:
            artefact.verify(node.directory)
        except IntegrityError as error:
            raise IntegrityError(
                f"{error}; nothing was published; remove {node.directory} and run the experiment "
                "again"
            ) from error


def _add(store: Store, stock: Stock) -> None:
    """Add to DVC what it has not, and hold its listing against the record."""
    for node in stock.new_held:
        # What a kill left: DVC would refuse half a pointer.
        pointer_of(node.directory).unlink(missing_ok=True)
    for node in stock.plans:
        pointer_of(node.directory).unlink(missing_ok=True)
    # The cache may have been emptied since they were added.
    wanted = [node for node in stock.held if not _is_cached(store, node)]
    if wanted:
        store.add(node.directory for node in wanted)
    for node in wanted:
        listed = {*artefact.read(node.directory)["files"], artefact.RECORD}
        found = {one.name for one in store.objects(pointer_of(node.directory)) if one.name}
        if found != listed:
            odd = ", ".join(sorted(found ^ listed))
            raise IntegrityError(f"{node.directory}: DVC and the record differ about {odd}")


def _is_cached(store: Store, node: Node) -> bool:
    pointer = pointer_of(node.directory)
    return pointer.is_file() and store.is_whole(pointer)


def _push(store: Store, stock: Stock, read_back: bool, say: Say) -> None:
    pointers = [pointer_of(node.directory) for node in stock.held]
    if not pointers:
        say("pushed    nothing: there is no checkpoint or adapter")
        return
    store.push(pointers)
    number, again = store.mend(pointers, read_back=read_back)
    for name in again:
        say(f"mended    {name}: was missing or damaged on {store.remote}, sent again")
    how = "read back" if read_back else "all there, with their sizes"
    say(f"pushed    {len(pointers)} directories to {store.remote}: {number} objects, {how}")


# ------------------------------------------------------------------------------------------- git


def _own_files(stock: Stock) -> set[str]:
    """The files that are ours to commit, besides the report."""
    found = [
        node.directory / name
        for node in stock.metrics
        for name in (*artefact.read(node.directory)["files"], artefact.RECORD)
    ]
    for node in (*stock.held, *stock.plans):
        names = (*HELD[node.step], artefact.RECORD)
        found += [record_of(node.directory) / name for name in names]
    found += [pointer_of(node.directory) for node in stock.held]
    return {str(path) for path in found}


def _is_report(path: str) -> bool:
    return any(Path(path).is_relative_to(part) for part in REPORT)


def _check_git() -> None:
    """Refuse early what would make the commit fail at the end."""
    if Path(git("rev-parse", "--git-path", "MERGE_HEAD").strip()).exists():
        raise InputError("a git merge is under way; finish it first (git commit, or --abort)")
    git("var", "GIT_COMMITTER_IDENT")


def _refuse_unrelated(stock: Stock) -> None:
    own = _own_files(stock)
    unrelated = sorted(path for path in staged() if path not in own and not _is_report(path))
    if unrelated:
        raise InputError(
            f"{unrelated[0]} is staged for another commit ({len(unrelated)} such files); commit "
            "or unstage first (git restore --staged)"
        )


def _marker() -> Path:
    return Path(git("rev-parse", "--git-path", "prunelib-commit").strip())


def _clear_dead_git() -> None:
    """Remove the index lock that git left when it was killed together with a publish.

    Only if a publish of this clone was killed while it used git, and no git works here now.
    """
    marker = _marker()
    if not marker.exists():
        return
    index_lock = Path(git("rev-parse", "--git-path", "index.lock").strip())
    if index_lock.exists() and not _git_works_here():
        index_lock.unlink(missing_ok=True)
    marker.unlink()


def _git_works_here() -> bool:
    here = os.fspath(Path.cwd())
    for process in psutil.process_iter():
        try:
            if process.name() == "git" and process.cwd().startswith(here):
                return True
        except psutil.Error:
            continue
    return False


def _commit(name: str, stock: Stock, say: Say) -> bool:
    own = _own_files(stock)
    # A plot that is gone belongs to the change too.
    report = [str(path) for path in REPORT if path.is_file()]
    report += [str(path) for path in (RESULTS / "plots").glob("*.png")]
    report += [path for path in stock.paths | changed() if _is_report(path)]
    marker = _marker()
    marker.touch()
    git("add", "--all", paths=sorted({*own, *report}))
    mine = sorted(path for path in staged() if path in own or _is_report(path))
    if mine:
        subject = f"Publish {name}: {_contents(stock)}"
        git("commit", "-q", "-m", subject, paths=mine)
        commit = git("rev-parse", "--short", "HEAD").strip()
        say(f"committed {len(mine)} files as {commit}: {subject}")
    else:
        say("committed nothing: git has all of it")
    marker.unlink()
    return bool(mine)


def _contents(stock: Stock) -> str:
    kinds = {"checkpoint": ("prune", "merge"), "adapter": ("recover",), "metric": IN_GIT}
    return ", ".join(
        _count([node for node in stock.new if node.step in steps], kind)
        for kind, steps in kinds.items()
    )

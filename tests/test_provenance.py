"""Fingerprints, content keys, the record of an artefact, and the launch lock."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prunelib.errors import InputError, IntegrityError
from prunelib.provenance import artefact, environment, keys, liveness, lock
from prunelib.provenance import fingerprint as fingerprints
from prunelib.provenance.fingerprint import ROOT, fingerprint, unlisted_modules

TREE = {
    "prunelib/__init__.py": '"""Root."""\n__version__ = "1"\n',
    "prunelib/errors.py": "class PrunelibError(Exception):\n    pass\n",
    "prunelib/provenance/__init__.py": "",
    "prunelib/provenance/step.py": "from prunelib.errors import PrunelibError\nX = 1\n",
    "prunelib/common.py": "def shared(x):\n    return x + 1\n",
    "prunelib/typing_only.py": "T = int\n",
    "prunelib/lazy.py": "Y = 2\n",
    "prunelib/methods/__init__.py": "",
    "prunelib/methods/a.py": (
        "from typing import TYPE_CHECKING\n"
        "from ..common import shared\n"
        "if TYPE_CHECKING:\n"
        "    from prunelib import typing_only\n"
        "def score(x: int) -> int:\n"
        '    """Score."""\n'
        "    from prunelib import lazy  # late\n"
        "    return shared(x) * lazy.Y\n"
        "class Method:\n"
        "    ratio: float = 0.5\n"
    ),
    "prunelib/methods/b.py": "import prunelib.common\nB = prunelib.common.shared(1)\n",
    "workflow_scripts/prune.py": (
        "from prunelib.provenance.step import X\nimport beside\nprint(X)\n"
    ),
    "workflow_scripts/beside.py": "Z = 1\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, text in TREE.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def edit(root: Path, name: str, old: str, new: str) -> None:
    path = root / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


A = ("prunelib.methods.a",)
B = ("prunelib.methods.b",)
SCRIPT = ("workflow_scripts/prune.py",)


def test_closure_follows_relative_lazy_and_package_imports(tree: Path) -> None:
    code = fingerprint(A, tree)
    assert code.modules == {
        "prunelib.methods",
        "prunelib.methods.a",
        "prunelib.common",
        "prunelib.lazy",
    }
    assert set(code.definitions) == {
        "prunelib.methods.a:<module>",
        "prunelib.methods.a:score",
        "prunelib.methods.a:Method",
        "prunelib.common:shared",
        "prunelib.lazy:<module>",
    }


def test_relative_imports_of_a_package_start_in_the_package(tree: Path) -> None:
    (tree / "prunelib/methods/__init__.py").write_text("from . import b\nfrom .. import lazy\n")
    code = fingerprint(["prunelib.methods"], tree)
    others = {"prunelib.methods.b", "prunelib.common", "prunelib.lazy"}
    assert code.modules == {"prunelib.methods"} | others


def test_scripts_follow_the_files_beside_them_and_what_provenance_imports(tree: Path) -> None:
    expected = {"workflow_scripts/prune.py", "workflow_scripts/beside.py"}
    assert fingerprint(SCRIPT, tree).modules == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# late", "# another comment"),
        ('"""Score."""', '"""Another docstring,\n\n    longer."""'),
        ('    """Score."""\n', ""),
        ("class Method:", '\n\n\nclass Method:\n    """New docstring."""\n'),
        ("ratio: float = 0.5", "ratio : float=(0.50)\n    '''what it is'''"),
        ("return shared(x) * lazy.Y", "return (\n        shared(x)\n        * lazy.Y\n    )"),
        ("    from prunelib import typing_only\n", "    from prunelib.typing_only import T\n"),
        ("from typing", "'''Module docstring.'''\nfrom typing"),
    ],
)
def test_comments_docstrings_and_formatting_do_not_count(tree: Path, old: str, new: str) -> None:
    before = fingerprint(A, tree)
    edit(tree, "prunelib/methods/a.py", old, new)
    assert fingerprint(A, tree) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "changed"),
    [
        ("methods/a.py", "* lazy.Y", "+ lazy.Y", {"prunelib.methods.a:score"}),
        ("methods/a.py", "0.5", "0.25", {"prunelib.methods.a:Method"}),
        ("common.py", "x + 1", "x + 2", {"prunelib.common:shared"}),
        ("lazy.py", "2", "3", {"prunelib.lazy:<module>"}),
        ("methods/__init__.py", "", "Q = 1", {"prunelib.methods:<module>"}),
    ],
)
def test_an_edit_of_code_counts_and_is_named(
    tree: Path, name: str, old: str, new: str, changed: set[str]
) -> None:
    before = fingerprint(A, tree)
    edit(tree, f"prunelib/{name}", old, new)
    after = fingerprint(A, tree)
    assert after.digest != before.digest
    assert dict(after.definitions.items() ^ before.definitions.items()).keys() == changed
    edit(tree, f"prunelib/{name}", new, old)
    assert fingerprint(A, tree) == before


def test_an_edit_changes_only_the_fingerprints_that_include_it(tree: Path) -> None:
    before = [fingerprint(entry, tree).digest for entry in (A, B, SCRIPT)]
    edit(tree, "prunelib/methods/a.py", "0.5", "0.6")
    after = [fingerprint(entry, tree).digest for entry in (A, B, SCRIPT)]
    assert [x == y for x, y in zip(before, after, strict=True)] == [False, True, True]
    edit(tree, "prunelib/common.py", "+ 1", "+ 3")
    last = [fingerprint(entry, tree).digest for entry in (A, B, SCRIPT)]
    assert [x == y for x, y in zip(after, last, strict=True)] == [False, False, True]


def test_provenance_code_and_the_package_root_are_not_part_of_it(tree: Path) -> None:
    before = [fingerprint(entry, tree) for entry in (A, SCRIPT)]
    edit(tree, "prunelib/provenance/step.py", "X = 1", "X = 2")
    edit(tree, "prunelib/__init__.py", '"1"', '"2"')
    assert [fingerprint(entry, tree) for entry in (A, SCRIPT)] == before


def test_the_order_of_statements_counts(tree: Path) -> None:
    path = tree / "prunelib/lazy.py"
    path.write_text("Y = 1\nY = 2\n")
    before = fingerprint(A, tree)
    path.write_text("Y = 2\nY = 1\n")
    assert fingerprint(A, tree).digest != before.digest
    path.write_text("Y = f()\ndef f(): ...\n")
    before = fingerprint(A, tree)
    path.write_text("def f(): ...\nY = f()\n")
    assert fingerprint(A, tree).digest != before.digest


def test_an_import_that_becomes_a_module_joins_the_closure(tree: Path) -> None:
    (tree / "prunelib/lazy.py").write_text("from prunelib.common import extra\n")
    before = fingerprint(A, tree)
    package = tree / "prunelib/common"
    package.mkdir()
    (tree / "prunelib/common.py").rename(package / "__init__.py")
    (package / "extra.py").write_text("E = 1\n")
    assert fingerprint(A, tree).modules - before.modules == {"prunelib.common.extra"}


ODD_SYNTAX = r'''
def text(x, name):
    """Dropped."""
    a = f"{x['key']!r:>{name}} and {', '.join(x)}" f"{{}}{x=}"
    b = "ʰ⿼\U0001ccf0\n"
    if a:
        "dropped too"
    match x:
        case [1, *rest] if rest:
            "dropped"
        case {"k": v, **others}:
            return (yield v), others
    return lambda *p, q=1, **r: (*p, q, x[*p, 1:2], -1 ** 2, 1e400, 1e-7, b'\x00')
type_ = list[int | None]
with (open(a) as f, open(b)):
    pass
'''


def other_pythons() -> list[str]:
    """Interpreters of the other supported versions that happen to be installed."""
    found = []
    for version in ("3.11", "3.12", "3.13"):
        places = [shutil.which(f"python{version}")]
        places += [str(p) for p in Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
        for place in places:
            if place and subprocess.run([place, "-c", ""], capture_output=True).returncode == 0:
                found.append(place)
                break
    return found


GOLDEN = "de7dbc7830ee1ae96706573f0eac4ca67590d2e4e4720d3bdf2ad51c2e542504"


def test_the_digest_is_the_same_on_every_python_version(tree: Path) -> None:
    (tree / "prunelib/odd.py").write_text(ODD_SYNTAX)
    entry = ("prunelib.odd", *A)
    # The literal catches a drift even where only one version of Python is installed.
    assert fingerprint(entry, tree).digest == GOLDEN
    code = (
        "import pathlib\nfrom prunelib.provenance.fingerprint import fingerprint\n"
        f"print(fingerprint({entry!r}, pathlib.Path({str(tree)!r})).digest)"
    )
    for python in other_pythons():
        done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert (python, done.stdout.strip()) == (python, GOLDEN), done.stderr


def test_outside_packages_are_found_without_being_executed(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tree / "site/outside_pruner"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('executed')\n")
    (package / "method.py").write_text("import json\nfrom . import part\nimport prunelib.common\n")
    (package / "part.py").write_text("P = 1\n")
    monkeypatch.syspath_prepend(str(tree / "site"))
    code = fingerprint(["outside_pruner.method"], tree)
    outside = {"outside_pruner", "outside_pruner.method", "outside_pruner.part"}
    assert code.modules == outside | {"prunelib.common"}
    assert "outside_pruner" not in sys.modules


@pytest.mark.parametrize(
    "entry",
    ["prunelib.methods.none", "nowhere_at_all.x", "workflow_scripts/none.py", "../prune.py"],
)
def test_entries_that_do_not_exist_are_refused(tree: Path, entry: str) -> None:
    with pytest.raises(InputError, match=re.escape(entry.split(".x")[0])):
        fingerprint([entry], tree)


def test_a_syntax_error_names_file_and_line(tree: Path) -> None:
    (tree / "prunelib/lazy.py").write_text("Y = 1\nY = (\n")
    with pytest.raises(InputError, match=r"lazy\.py:2"):
        fingerprint(A, tree)


def test_modules_loaded_behind_the_fingerprint_are_named(tree: Path) -> None:
    module = type(sys)("prunelib.secret")
    module.__file__ = "/somewhere/secret.py"
    compiled = type(sys)("prunelib.fast")
    compiled.__file__ = "/somewhere/fast.so"
    loaded = {
        "prunelib.secret": module,
        "prunelib.fast": compiled,
        "prunelib.common": module,
        "prunelib.provenance.lock": module,
        "prunelib": module,
        "json": json,
    }
    assert unlisted_modules(fingerprint(A, tree), loaded) == ["prunelib.secret"]


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, prunelib.provenance.step, prunelib.provenance.lock\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_keys_depend_on_every_part_and_not_on_order(tree: Path) -> None:
    code = fingerprint(A, tree)
    other = fingerprint(B, tree)
    params = {"ratio": 0.2, "layers": [1, 2], "method": {"norm": None, "p": 1}}
    upstream, packages = {"model": "aa"}, {"torch": "2.13.0"}
    key = keys.step_key("prune", params, code, upstream, packages)
    assert len(key) == 16
    assert int(key, 16) >= 0
    shuffled = {"method": {"p": 1, "norm": None}, "layers": (1, 2), "ratio": 0.2}
    assert keys.step_key("prune", shuffled, code, upstream, packages) == key
    through_json = json.loads(json.dumps(params))
    assert keys.step_key("prune", through_json, code, upstream, packages) == key
    different = {
        keys.step_key("score", params, code, upstream, packages),
        keys.step_key("prune", params | {"ratio": 0.2 + 1e-16 * 2}, code, upstream, packages),
        keys.step_key("prune", params | {"layers": [2, 1]}, code, upstream, packages),
        keys.step_key("prune", params | {"ratio": "0.2"}, code, upstream, packages),
        keys.step_key("prune", params, other, upstream, packages),
        keys.step_key("prune", params, code, {"model": "ab"}, packages),
        keys.step_key("prune", params, code, {"base": "aa"}, packages),
        keys.step_key("prune", params, code, upstream, {"torch": "2.14.0"}),
        key,
    }
    assert len(different) == 9


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1.0, math.nan]}, r"\.params\.a\[1\]|a\[1\]"),
        ({"a": -math.inf}, "a"),
        ({"a": {1: 2}}, "key 1"),
        ({"a": {3}}, "set"),
        ({"a": Path("x")}, "Path"),
    ],
)
def test_keys_refuse_what_is_not_plain_json(tree: Path, value: dict, place: str) -> None:
    with pytest.raises(InputError, match=place):
        keys.step_key("prune", value, fingerprint(A, tree), {}, {})


def test_package_versions_have_no_local_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    keys._version.cache_clear()
    monkeypatch.setattr(keys.metadata, "version", lambda name: "2.13.0+cpu")
    assert keys.package_versions(["torch"]) == {"torch": "2.13.0"}
    keys._version.cache_clear()


def test_a_package_that_is_not_installed_is_refused() -> None:
    with pytest.raises(InputError, match="no-such-distribution"):
        keys.package_versions(["no-such-distribution"])


# --- records -------------------------------------------------------------------------------------

HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # sha256 of "hello"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Make an artefact by hand, not by the code under test."""
    directory = tmp_path / "results" / "0123456789abcdef"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.txt").write_text("hello")
    (directory / "sub/b.txt").write_text("hello")
    facts = {"size": 5, "sha256": HELLO}
    write_record(directory, {"a.txt": facts, "sub/b.txt": facts})
    return directory


def write_record(directory: Path, files: object, **changes: object) -> None:
    record = {"schema": 1, "key": directory.name, "files": files} | changes
    (directory / "provenance.json").write_text(json.dumps(record))


def test_a_whole_artefact_is_valid(made: Path) -> None:
    assert artefact.is_valid(made)
    assert artefact.is_valid(made, made.name)
    assert not artefact.is_valid(made, "another key")
    assert artefact.read(made)["key"] == made.name
    artefact.verify(made)
    artefact.verify(made, ["sub/b.txt"])
    (made / "unlisted.txt").write_text("beside it, by DVC or a person")
    assert artefact.is_valid(made)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "a.txt").write_text("hell"), r"a\.txt: has 4 bytes"),
        (lambda d: (d / "a.txt").unlink(), r"a\.txt: is missing"),
        (lambda d: ((d / "a.txt").unlink(), (d / "a.txt").mkdir()), r"a\.txt: is not a file"),
        (lambda d: shutil.rmtree(d / "sub"), r"b\.txt: is missing"),
        (lambda d: (d / "provenance.json").unlink(), "is not finished"),
        (lambda d: (d / "provenance.json").write_text('{"key": '), "is not JSON"),
        (lambda d: (d / "provenance.json").write_text("[" * 100_000), "is not JSON"),
        (lambda d: (d / "provenance.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
        (lambda d: (d / "provenance.json").write_text("[]"), "schema version"),
        (lambda d: shutil.rmtree(d), "is not finished"),
    ],
)
def test_damage_is_seen_without_reading_contents(made: Path, damage, message: str) -> None:
    damage(made)
    assert not artefact.is_valid(made)
    with pytest.raises(IntegrityError, match=message):
        artefact.verify(made)


def test_a_flipped_bit_is_found_and_the_file_named(made: Path) -> None:
    (made / "sub/b.txt").write_bytes(b"hellO")
    assert artefact.is_valid(made)
    artefact.verify(made, ["a.txt"])
    with pytest.raises(IntegrityError, match=r"sub/b\.txt: sha256"):
        artefact.verify(made)


def test_files_that_the_record_does_not_list_are_not_vouched_for(made: Path) -> None:
    (made / "modeling.py").write_text("print('hostile')")
    with pytest.raises(IntegrityError, match=r"modeling\.py: is not listed"):
        artefact.verify(made, ["modeling.py"])


OUTSIDE = {"size": 5, "sha256": HELLO}


@pytest.mark.parametrize(
    "files",
    [
        {"../outside.txt": OUTSIDE},
        {"sub/../../outside.txt": OUTSIDE},
        {"sub/../a.txt": OUTSIDE},
        {"./a.txt": OUTSIDE},
        {"": OUTSIDE},
        {".": OUTSIDE},
        {"a.txt\x00": OUTSIDE},
        {"a.txt": {"size": True, "sha256": HELLO}},
        {"a.txt": {"size": 5.0, "sha256": HELLO}},
        {"a.txt": {"size": 5}},
        {"a.txt": {"size": 5, "sha256": "x" * 64}},
        {"a.txt": None},
        {},
        ["a.txt"],
        None,
    ],
)
def test_hostile_records_are_not_valid(made: Path, files: object) -> None:
    (made.parent / "outside.txt").write_text("hello")
    write_record(made, files)
    assert not artefact.is_valid(made)
    with pytest.raises(IntegrityError):
        artefact.verify(made)


def test_absolute_names_are_not_valid(made: Path) -> None:
    write_record(made, {str(made / "a.txt"): OUTSIDE})
    assert not artefact.is_valid(made)


@pytest.mark.parametrize("changes", [{"schema": 2}, {"schema": None}, {"key": None}, {"key": 3}])
def test_records_of_another_form_are_not_valid(made: Path, changes: dict) -> None:
    write_record(made, {"a.txt": OUTSIDE}, **changes)
    assert not artefact.is_valid(made)


@pytest.mark.parametrize("linked", ["a.txt", "sub", "provenance.json"])
def test_links_out_of_the_directory_are_not_valid(made: Path, linked: str) -> None:
    target = made.parent / "elsewhere"
    (made / linked).rename(target)
    (made / linked).symlink_to(target)
    assert (made / linked).exists()
    assert not artefact.is_valid(made)
    with pytest.raises(IntegrityError, match="leads out"):
        artefact.verify(made)


def test_links_inside_the_directory_and_to_it_are_fine(made: Path, tmp_path: Path) -> None:
    (made / "a.txt").unlink()
    (made / "a.txt").symlink_to("sub/b.txt")
    assert artefact.is_valid(made)
    scratch_disk = tmp_path / "link"
    scratch_disk.symlink_to(made.parent)
    assert artefact.is_valid(scratch_disk / made.name)


def test_a_loop_of_links_is_not_valid(made: Path) -> None:
    (made / "a.txt").unlink()
    (made / "a.txt").symlink_to("a.txt")
    assert not artefact.is_valid(made)


def test_only_listed_environment_variables_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    facts = environment.describe(ROOT)
    assert facts["environment"]["SLURM_JOB_ID"] == "77"
    assert "hf_secret" not in json.dumps(facts)


def test_git_state_names_the_commit_and_whether_files_were_changed(tmp_path: Path) -> None:
    assert environment.git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *who, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    git("tag", "v1.0-rc")
    head = git("rev-parse", "HEAD")
    assert environment.git_state(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert environment.git_state(tmp_path) == {"commit": head, "dirty": True}


def test_peak_memory_follows_an_allocation() -> None:
    code = (
        "from prunelib.provenance.environment import peak_memory_bytes as peak\n"
        "before = peak(); x = bytearray(100 * 2**20); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert 0.8 * 100 * 2**20 <= int(done.stdout) <= 1.2 * 100 * 2**20


def test_peak_gpu_memory_is_none_where_none_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert environment.peak_gpu_memory_bytes() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: 10 + index)
    assert environment.peak_gpu_memory_bytes() == 21


# --- launch lock ---------------------------------------------------------------------------------


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def plant(path: Path, age: float = 0.0, **changes: object) -> None:
    """Write a lock file of another run whose last heartbeat was ``age`` seconds ago."""
    owner = {
        "host": liveness.host_name(),
        "pid": os.getpid(),
        "process_start": liveness.process_start(os.getpid()),
        "acquired": time.time() - age,
        "command": "make benchmark",
    } | changes
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_second_launch_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    path = tmp_path / "results" / "run.lock"
    with lock.acquire(path, command="first run"):
        code = (
            "import pathlib\nfrom prunelib.provenance.lock import acquire\n"
            f"acquire(pathlib.Path({str(path)!r}), command='second')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        last = done.stderr.strip().splitlines()[-1]
        assert "InputError" in last
        for part in (str(os.getpid()), liveness.host_name(), "first run", "sign of life"):
            assert part in last
    assert not path.exists()
    lock.acquire(path, command="third").release()
    assert list(path.parent.iterdir()) == []


def test_a_lock_of_a_live_process_is_kept_however_old_its_heartbeat(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    plant(path, age=7200)
    with pytest.raises(InputError, match="make benchmark"):
        lock.acquire(path, command="mine")


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, caplog) -> None:
    path = tmp_path / "lock"
    pid = dead_process()
    plant(path, pid=pid)
    with lock.acquire(path, command="mine") as held:
        assert json.loads(path.read_text()) == held.owner
        assert f"taken over from process {pid} on {liveness.host_name()}" in caplog.text


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    path = tmp_path / "lock"
    start = liveness.process_start(process.pid)
    deadline = time.time() + 20
    while start is not None and liveness.is_same_process(process.pid, start):
        assert time.time() < deadline
        time.sleep(0.05)
    plant(path, pid=process.pid, process_start=start or 0.0)
    lock.acquire(path, command="mine").release()
    process.wait()


def test_a_reused_process_number_does_not_keep_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    plant(path, process_start=(liveness.process_start(os.getpid()) or 0) - 3600)
    lock.acquire(path, command="mine").release()


@pytest.mark.parametrize(("age", "taken"), [(10, False), (590, False), (610, True)])
def test_a_lock_of_another_host_is_taken_over_after_ten_minutes(
    tmp_path: Path, age: float, taken: bool
) -> None:
    path = tmp_path / "lock"
    plant(path, age=age, host="node17", pid=1)
    if taken:
        lock.acquire(path, command="mine").release()
    else:
        with pytest.raises(InputError, match="process 1 on node17"):
            lock.acquire(path, command="mine")


@pytest.mark.parametrize(("age", "taken"), [(5, False), (700, True)])
def test_a_lock_file_that_cannot_be_read_holds_for_ten_minutes(
    tmp_path: Path, age: float, taken: bool
) -> None:
    path = tmp_path / "lock"
    path.write_text("{")
    os.utime(path, (time.time() - age, time.time() - age))
    if taken:
        lock.acquire(path, command="mine").release()
    else:
        with pytest.raises(InputError, match="does not name"):
            lock.acquire(path, command="mine")


def test_the_heartbeat_keeps_the_lock_fresh_and_notices_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.05)
    path = tmp_path / "lock"
    held = lock.acquire(path, command="mine")
    os.utime(path, (0, 0))
    deadline = time.time() + 20
    while path.stat().st_mtime < 1:
        assert time.time() < deadline
        time.sleep(0.02)
    plant(path, host="node17")
    while "lost to another run" not in caplog.text:
        assert time.time() < deadline
        time.sleep(0.02)
    held.release()
    assert json.loads(path.read_text())["host"] == "node17"


RACER = """
import pathlib, sys, time
from prunelib.errors import InputError
from prunelib.provenance import liveness, lock
read = lock._owner
def slow(path):
    owner = read(path)
    time.sleep(0.2)  # widens the gap between looking and taking
    return owner
lock._owner = slow
liveness.process_start(1)
print("ready", flush=True)
while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.001)
try:
    lock.acquire(pathlib.Path(sys.argv[1]), command="race")
    print("won", flush=True)
except InputError:
    print("refused", flush=True)
sys.stdin.read()
"""


def test_of_many_launches_at_once_one_takes_over_a_stale_lock(tmp_path: Path) -> None:
    path, go = tmp_path / "lock", tmp_path / "go"
    plant(path, pid=dead_process())
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RACER, str(path), str(go)]
    racers = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(6)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 6
    go.touch()
    results = [racer.stdout.readline().strip() for racer in racers]
    # The winner lives until all have tried: its death would let a late one take over.
    for racer in racers:
        racer.communicate(timeout=60)
    assert sorted(results) == ["refused"] * 5 + ["won"]


def test_host_names_fit_into_file_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node/17 a-b.cluster")
    assert liveness.host_name() == "node_17_a-b.cluster"


# --- parsed files kept between processes ----------------------------------------------------------


def test_kept_parses_give_the_same_fingerprint_and_an_edit_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "code" / "prunelib" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.touch()
    script = tmp_path / "code" / "step.py"
    script.write_text("import prunelib\n\ndef work():\n    return 41\n")
    kept = tmp_path / "parsed.json"
    fresh = fingerprint(["step.py"], script.parent)
    fingerprints.save_parsed(kept)
    monkeypatch.setattr(fingerprints, "_parsed", {})
    fingerprints.load_parsed(kept)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "_parse_anew", None)  # nothing is parsed again
        assert fingerprint(["step.py"], script.parent) == fresh
    script.write_text("import prunelib\n\ndef work():\n    return 42\n")
    assert fingerprint(["step.py"], script.parent).digest != fresh.digest


@pytest.mark.parametrize("damage", ["not json", '{"by": "another version", "files": {"x": 1}}', ""])
def test_kept_parses_that_are_damaged_or_of_another_version_are_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    kept = tmp_path / "parsed.json"
    kept.write_text(damage)
    monkeypatch.setattr(fingerprints, "_parsed", {})
    fingerprints.load_parsed(kept)
    assert fingerprints._parsed == {}
    fingerprint(["workflow_scripts/prune.py"])
    fingerprints.save_parsed(kept)
    assert json.loads(kept.read_text())["files"].keys() == fingerprints._parsed.keys()

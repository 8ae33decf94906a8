"""The assignments: what is blanked fails its tests, and only those; what each asks is said in a docstring."""

import ast
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from make_assignment import ASSIGNMENTS, ROOT, blank, change, cut, find, grade, judge, main, rewrite, varied
from variants import VARIANTS

from model import UserError

FUNCTIONS = [(name, function) for name, a in ASSIGNMENTS.items() for function in a.functions]


def test_blanking():
    """Oracle: by hand. Signature, decorators and docstring stay, the body goes, nothing else changes."""
    source = (
        'import os\n\n\nclass A:\n    @property\n    def f(self):\n        """Doc."""\n        return 1\n\n    x = 2\n'
    )
    expected = source.replace("return 1", 'raise NotImplementedError("a1: m.A.f")')
    assert blank(source, "A.f", "a1: m.A.f") == expected
    plain = "def g(\n    x,\n):\n    y = x\n    return y\n"
    assert blank(plain, "g", "no") == 'def g(\n    x,\n):\n    raise NotImplementedError("no")\n'
    with pytest.raises(StopIteration):
        blank(plain, "h", "no")


def test_every_name_exists():
    """Oracle: the sources. Every listed function and test is there, once; every function has a docstring, its
    own or its class's."""
    tests = [
        n.name for p in (ROOT / "tests").glob("test_*.py") for n in ast.parse(p.read_text()).body if hasattr(n, "name")
    ]
    assert len(set(FUNCTIONS)) == len(FUNCTIONS)
    for name, assignment in ASSIGNMENTS.items():
        assert all(test.split("[")[0] in tests for test in assignment.tests), name
        for function in assignment.functions:
            module, qualified = function.split(".", 1)
            source = (ROOT / f"{module}.py").read_text()
            explained = [ast.get_docstring(find(source, qualified))]
            if "." in qualified:
                explained.append(ast.get_docstring(find(source, qualified.split(".")[0])))
            assert any(explained), function


def test_command_line(tmp_path, capsys):
    """Oracle: by hand. The copy has the printed blanks, and nothing else changed; a folder in use is refused."""
    main(["a3", "--out", str(tmp_path / "a3")])
    out = capsys.readouterr().out
    assert "heads.py: encode_boxes" in out and "python -m pytest -m a3" in out
    blanked = (tmp_path / "a3" / "heads.py").read_text()
    assert blanked.count('NotImplementedError("a3: heads.') == 4 and "def encode_boxes(boxes, anchors" in blanked
    assert (tmp_path / "a3" / "blocks.py").read_text() == (ROOT / "blocks.py").read_text()
    for name in ("tests/official_small.npz", "tools/make_shapes.py", "pyproject.toml", "README.md", "LICENSE"):
        assert (tmp_path / "a3" / name).read_bytes() == (ROOT / name).read_bytes()
    assert {p.name for p in (tmp_path / "a3" / "docs").iterdir()} == {p.name for p in (ROOT / "docs").iterdir()}
    assert (tmp_path / "a3" / "ASSIGNMENT").read_text() == "a3\n"
    for flags, said in (
        (["a3", "--out", str(tmp_path / "a3")], "is not empty"),
        (["a3", "--out", str(tmp_path / "b"), "--keep", str(tmp_path)], "no copy of the project"),
        (["--grade", str(tmp_path)], "no copy of the project"),
        (["--grade", str(tmp_path / "a3"), str(ROOT)], "has no ASSIGNMENT"),
        (["--grade", str(tmp_path / "a3"), "--limit", "0"], "--limit is 0"),
    ):
        with pytest.raises(UserError, match=said):
            main(flags)
    assert not (tmp_path / "b").exists()


def test_what_was_solved_is_carried_on(tmp_path, capsys):
    """Oracle: by hand. A copy of a4 takes what differs in a student's a3, but not a4's functions and not blanks."""
    old, new = tmp_path / "old", tmp_path / "new"
    cut("a3", old)
    own = '    """Mine."""\n    return boxes + 1\n'
    change(old, "heads", lambda source: rewrite(source, "clip_boxes", own))
    change(old, "loss", lambda source: rewrite(source, "focal_loss", "return 0"))
    main(["a4", "--out", str(new), "--keep", str(old)])
    assert f"taken from {old}: heads.clip_boxes\n" in capsys.readouterr().out
    solution = (ROOT / "heads.py").read_text()
    expected = rewrite(solution, "clip_boxes", own)
    for function in ("Tower.forward", "RetinaNetHead.forward", "per_anchor", "detect"):
        expected = blank(expected, function, f"a4: heads.{function}")
    assert (new / "heads.py").read_text() == expected
    assert 'NotImplementedError("a4: loss.focal_loss")' in (new / "loss.py").read_text()


def test_a_broken_file_is_not_carried_on(tmp_path):
    """Oracle: by hand. Functions of a file that doesn't compile would silently be the solution's."""
    cut("a3", tmp_path / "old")
    change(tmp_path / "old", "loss", lambda source: source + "def focal_loss(:\n")
    with pytest.raises(UserError, match=r"old/loss.py is not Python: invalid syntax .*line \d+"):
        main(["a4", "--out", str(tmp_path / "new"), "--keep", str(tmp_path / "old")])
    assert not (tmp_path / "new").exists()


def test_what_is_removed_besides(tmp_path, capsys):
    """Oracle: by hand. It is in the solution once and gone from the copy, which still compiles; the command says that
    something is missing, and neither it nor the course says what."""
    assert ASSIGNMENTS["a2"].removed
    for name, assignment in ASSIGNMENTS.items():
        for module, text in assignment.removed:
            main([name, "--out", str(tmp_path / name)])
            source = (tmp_path / name / f"{module}.py").read_text()
            assert (ROOT / f"{module}.py").read_text().count(text) == 1 and text not in source
            compile(source, module, "exec")
            said = capsys.readouterr().out
            assert f"{module}.py: what docs/COURSE.md says is missing besides" in said
            assert not any(text in page for page in (said, *(p.read_text() for p in (ROOT / "docs").glob("*.md"))))


@pytest.mark.slow
def test_a_network_without_its_unresampled_parent(tmp_path):
    """Oracle: by hand. With every body but without the edge that a2's copy lacks, two tests fail: the rule, in words
    that don't say which block it is, and the authors' features."""
    cut("a2", tmp_path, [])
    for module, text in ASSIGNMENTS["a2"].removed:
        change(tmp_path, module, lambda source: source.replace(text, ""))  # noqa: B023
    result = grade(tmp_path, "a2")
    rule, features = "test_unresampled_parent_follows_the_rule", "test_features_equal_the_official_code"
    assert not result.ended and set(result.failed) == {rule, features}, result
    assert "is not what the authors' rule yields: see the comment above SPINE" in result.failed[rule]
    assert "11" not in result.failed[rule] and "away from the authors' code" in result.failed[features]


@pytest.mark.slow
def test_grading_students(tmp_path, capsys):
    """Oracle: by hand. The table says how many tests pass and which fails first; a body that never ends, and leaves a
    process behind, is ended after the limit, and the next student is graded; tests of one's own count for nothing."""
    for student in ("right", "late"):
        cut("a2", tmp_path / student, [])
    rest = "import os, time\nif not os.fork():\n    time.sleep(600)\nwhile True: 0"
    change(tmp_path / "late", "model", lambda source: rewrite(source, "check_size", rest))
    cut("a2", tmp_path / "blank", ["model.check_size"])
    (tmp_path / "blank" / "tests" / "test_model.py").write_text("def test_other_sizes_are_refused(): pass")
    main(["--limit", "25", "--grade", *(str(tmp_path / s) for s in ("late", "blank", "right"))])
    head, late, empty, right = capsys.readouterr().out.splitlines()
    count = right.split()[1]
    assert right.split() == [str(tmp_path / "right"), count, count] and int(count) > 5
    assert "ended after 25 s in test_" in late and int(late.split()[1]) < int(count)
    assert "NotImplementedError: a2: model.check_size" in empty and 0 < int(empty.split()[1]) < int(count)


SPAWNING = """
import multiprocessing
import os
import pytest


def place_of_blocks():
    import blocks

    return os.path.dirname(blocks.__file__)


@pytest.mark.a1
def test_of_a_spawned_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(place_of_blocks) == os.getcwd()
"""

GRADING = """
import sys
from pathlib import Path

sys.path.insert(0, {tools!r})
import make_assignment

if __name__ == "__main__":
    print(make_assignment.grade(Path({folder!r}), "a1", ("-k", "spawned_process")))
"""


@pytest.mark.slow
def test_spawned_processes_run_the_copy(tmp_path):
    """Oracle: the folder. A process that a test spawns runs the main module's file, here one that brings the solution
    along as the tool does, and still imports the copy's modules."""
    folder = (tmp_path / "copy").resolve()
    cut("a1", folder, [])
    (folder / "tests" / "test_spawning.py").write_text(SPAWNING)
    script = tmp_path / "grading.py"
    script.write_text(GRADING.format(tools=str(ROOT / "tools"), folder=str(folder)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert "count=1, passed=['test_of_a_spawned_process'], failed={}, ended=''" in done.stdout, done


@pytest.mark.slow
def test_every_function_is_graded(tmp_path):
    """Oracle: the tests themselves. With one listed function blanked, its assignment's tests fail, and say which."""

    def one(entry):
        name, function = entry
        folder = tmp_path / function
        cut(name, folder, [function])
        return name, function, grade(folder, name, ("-x",))

    with ThreadPoolExecutor(2) as pool:
        for name, function, result in pool.map(one, FUNCTIONS):
            assert not result.ended and f"{name}: {function}" in result.first()[1], (function, result)


@pytest.mark.slow
def test_earlier_assignments_still_pass(tmp_path):
    """Oracle: the tests themselves. An assignment's own pass with all later ones blanked: so with any of them."""
    names = list(ASSIGNMENTS)

    def one(name):
        folder = tmp_path / name
        cut(name, folder, [f for later in names[names.index(name) + 1 :] for f in ASSIGNMENTS[later].functions])
        return name, grade(folder, name)

    with ThreadPoolExecutor(2) as pool:
        for name, result in pool.map(one, names[:-1]):
            assert not result.ended and not result.failed and len(result.passed) == result.count > 0, (name, result)


def test_the_table_of_variants():
    """Oracle: counting. Each assignment has 10 wrong bodies or more, of each function one at least, and 4 right ones;
    each says what must be said of it."""
    assert list(VARIANTS) == list(ASSIGNMENTS)
    for name, kinds in VARIANTS.items():
        wrong, right = kinds["wrong"], kinds["right"]
        assert len(wrong) >= 10 and len(right) >= 4, name
        assert {v.function for v in wrong} == set(ASSIGNMENTS[name].functions), name
        assert {v.function for v in right} <= set(ASSIGNMENTS[name].functions), name
        assert all(v.says for v in wrong), name


@pytest.mark.slow
def test_the_first_variants():
    """Oracle: by hand. Of each assignment the first two wrong bodies fail, in the words that the table wants, and the
    first right one passes, of all that make_assignment.py --check-variants tries: the fastest stand first."""
    jobs = [(name, v, False) for name, kinds in VARIANTS.items() for v in kinds["wrong"][:2]]
    jobs += [(name, kinds["right"][0], True) for name, kinds in VARIANTS.items()]
    with ThreadPoolExecutor(2) as pool:
        for (name, variant, _), (fault, *_) in zip(jobs, pool.map(lambda job: judge(*job), jobs)):
            assert not fault, (name, variant.function, variant.what, fault)


def test_every_variant_changes_its_function():
    """Oracle: the solution. Each variant's text is in it, and what it makes is another source that compiles."""
    for name, kinds in VARIANTS.items():
        for variant in (*kinds["wrong"], *kinds["right"]):
            module = variant.function.split(".")[0]
            source = varied(variant)
            assert source != (ROOT / f"{module}.py").read_text() and compile(source, module, "exec"), variant

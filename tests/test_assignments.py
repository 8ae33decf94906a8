"""The assignments: what is blanked fails its tests, and only those; what each asks is said in a docstring."""

import ast
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from make_assignment import ASSIGNMENTS, ROOT, blank, cut, find, main

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
    with pytest.raises(SystemExit) as stop:
        main(["a3", "--out", str(tmp_path / "a3")])
    assert stop.value.code == 2


def run_pytest(folder, marks, said):
    """In a new process: the marked tests of the copy, up to the first failure."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    sys.path[:] = [p for p in sys.path if not Path(p).resolve().is_relative_to(ROOT)]
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(ROOT)):
            del sys.modules[name]
    raise SystemExit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", marks])))


@pytest.fixture(scope="module")
def graded():
    """A function: (exit code, output) of the tests with some marks, run in a folder; two may run at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "pycocotools.cocoeval", "PIL.Image", "pytest"])

    def grading(folder, marks):
        process = context.Process(target=run_pytest, args=(folder, marks, folder / "said.txt"))
        process.start()
        process.join(300)
        process.kill()
        process.join()
        return process.exitcode, (folder / "said.txt").read_text()

    return grading


@pytest.mark.slow
def test_every_function_is_graded(graded, tmp_path):
    """Oracle: the tests themselves. With one listed function blanked, its assignment's tests fail, and say which."""

    def one(entry):
        name, function = entry
        folder = tmp_path / function
        cut(name, folder, [function])
        return function, *graded(folder, name)

    with ThreadPoolExecutor(2) as pool:
        for function, code, said in pool.map(one, FUNCTIONS):
            assert code == 1 and f": {function}" in said and "NotImplementedError" in said, (
                function,
                code,
                said[-3000:],
            )


@pytest.mark.slow
def test_earlier_assignments_still_pass(graded, tmp_path):
    """Oracle: the tests themselves. With a whole assignment blanked, those of the assignments before it pass."""
    names = list(ASSIGNMENTS)

    def one(k):
        folder = tmp_path / names[k]
        cut(names[k], folder)
        return names[k], *graded(folder, " or ".join(names[:k]))

    with ThreadPoolExecutor(2) as pool:
        for name, code, said in pool.map(one, range(1, len(names))):
            assert code == 0 and "[100%]" in said, (name, code, said[-3000:])

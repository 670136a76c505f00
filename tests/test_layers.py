"""The rules that the source itself must keep, read from its syntax: imports go one way, nothing runs from data."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import esrl

ROOT = Path(esrl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# lowest first; parts on one level do not know each other
LEVELS = [
    {"types", "errors", "settings", "kernels"},
    {"algorithm"},
    {"models", "data"},
    {"rewards"},
    {"sampling"},
    {"evaluation"},
    {"training"},
    {"benchmark", "judge", "report"},
    {"config"},
    {"building", "fingerprint"},
    {"commands"},
    {"apply", "plan", "demo"},
    {"cli"},
]
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load"}
REPORTS_INSTEAD_OF_RAISING = {
    "rewards/worker.py": 1,  # a reward function is somebody else's code: the parent process raises what it raised
    "cli.py": 1,  # the outermost frame: what nobody foresaw becomes one line and exit code 1
}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def part_of(file: Path) -> str:
    """The top-level module or package a file belongs to; '' for esrl/__init__.py."""
    first = file.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first in ("__init__", "__main__") else first


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, those inside functions and ``if TYPE_CHECKING`` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write esrl.<part> in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def upward(part: str, tree: ast.AST) -> list[str]:
    """The imports of other parts that do not lie below ``part``."""
    found = []
    for line, name in imports(tree):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package != "esrl" or target in ("", "__version__", part):
            continue
        if target not in LEVEL or LEVEL[target] >= LEVEL[part]:
            found.append(f"line {line} imports {name}")
    # `import esrl` is for __file__ and __version__; everything else is above
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node.value) == "esrl" and not node.attr.startswith("__"):
            found.append(f"line {node.lineno} reaches esrl.{node.attr} through the package")
    return found


def unsafe(tree: ast.AST) -> list[str]:
    """Whatever could run code that came as data."""
    found = [f"line {line} imports {name}" for line, name in imports(tree) if name.split(".")[0] in FORBIDDEN_MODULES]
    found += [f"line {line} imports {name}" for line, name in imports(tree) if name in FORBIDDEN_ATTRIBUTES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in FORBIDDEN_ATTRIBUTES:
            found.append(f"line {node.lineno} uses {dotted(node)}")
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno} calls {node.func.id}")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "not a constant"
            if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and value is not False:
                found.append(f"line {node.lineno} passes {keyword.arg} other than False")
            if keyword.arg == "weights_only" and value is not True:
                found.append(f"line {node.lineno} passes weights_only other than True")
    return found


def blind(tree: ast.AST) -> list[str]:
    """Handlers of everything that do not raise again."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        everything = any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in caught)
        if everything and not isinstance(node.body[-1], ast.Raise):
            found.append(f"line {node.lineno} swallows {'everything' if node.type is None else ast.unparse(node.type)}")
    return found


def test_every_part_has_its_place():
    assert len(FILES) > 30
    parts = {part_of(file) for file in FILES} - {""}
    assert parts <= set(LEVEL), f"give {sorted(parts - set(LEVEL))} a level in LEVELS, here and in docs/architecture.md"


@pytest.mark.parametrize("file", [file for file in FILES if part_of(file)], ids=name_of)
def test_imports_go_one_way(file: Path):
    assert upward(part_of(file), tree_of(file)) == []


@pytest.mark.parametrize("file", sorted((ROOT / "algorithm").glob("*.py")), ids=name_of)
def test_the_algorithm_knows_torch_and_numpy_alone(file: Path):
    allowed = {"torch", "numpy", "esrl", *sys.stdlib_module_names}
    assert [(line, name) for line, name in imports(tree_of(file)) if name.split(".")[0] not in allowed] == []
    # neither files nor processes
    outside = {"os", "io", "pathlib", "shutil", "tempfile", "subprocess", "socket", "threading", "multiprocessing"}
    found = [name for _, name in imports(tree_of(file)) if name.split(".")[0] in outside]
    assert found + [name for _, name in imports(tree_of(file)) if name.startswith("torch.distributed")] == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_runs_from_data(file: Path):
    assert unsafe(tree_of(file)) == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_blind_except(file: Path):
    found = blind(tree_of(file))
    assert len(found) == REPORTS_INSTEAD_OF_RAISING.get(name_of(file), 0), found


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("algorithm", "from esrl.models.policy import Policy"),
        ("models", "import esrl.data.examples"),  # sideways
        ("data", "from esrl.rewards.calling import build_reward"),
        ("training", "def f():\n    from esrl import commands"),
        ("sampling", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from esrl.training.rl import RLTask"),
        ("report", "from esrl.benchmark import run"),
        ("training", "import esrl.unheard_of"),
        ("training", "from esrl import RLTask"),  # through the package's front door
        ("training", "import esrl\nesrl.rl(1)"),
    ],
)
def test_the_check_sees_an_upward_import(part: str, source: str):
    assert len(upward(part, ast.parse(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill as d",
        "torch.load(p)",
        "from torch import load",
        "loader = torch.load",
        "torch.save({}, p)",
        "np.load(p)",
        "eval('1')",
        "exec('1')",
        "compile('1', '', 'exec')",
        "__import__('os')",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=trust)",
        "subprocess.run(c, shell=True)",
        "f(weights_only=False)",
    ],
)
def test_the_check_sees_code_from_data(source: str):
    assert len(unsafe(ast.parse(source))) >= 1


def test_the_check_lets_harmless_lookalikes_pass():
    source = "model.eval()\nre.compile('x')\nsafetensors.torch.load(b)\nf(trust_remote_code=False)\njson.load(f)"
    assert unsafe(ast.parse(source)) == []
    below = "import esrl\nfrom esrl import __version__\nfrom esrl.types import Prompts\nesrl.__file__"
    assert upward("config", ast.parse(below)) == []


@pytest.mark.parametrize("kind", ["", " Exception", " BaseException as error", " (ValueError, Exception)"])
def test_the_check_sees_a_blind_except(kind: str):
    assert len(blind(ast.parse(f"try:\n    f()\nexcept{kind}:\n    pass"))) == 1
    assert blind(ast.parse(f"try:\n    f()\nexcept{kind}:\n    g()\n    raise")) == []
    assert blind(ast.parse("try:\n    f()\nexcept ValueError:\n    pass")) == []

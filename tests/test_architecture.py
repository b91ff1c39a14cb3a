"""The structure of the code: layers whose imports point one way, and limits on the length of files and functions.

    scripts (run_*.py)  ->  packages (training, engines, sandbox, demo, tirgen)  ->  core (thor/*.py)  ->  bottom

Core modules may use a package too, but only the public names of its root.
"""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("run_*.py"))
PACKAGES = {"training", "engines", "sandbox", "demo", "tirgen"}
BOTTOM = {"thor.trajectory", "thor.text", "thor.prompts"}
SOURCES = {  # module -> file
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (*(ROOT / "thor").rglob("*.py"), *(ROOT / f"{script}.py" for script in SCRIPTS))
}
TREES = {module: ast.parse(path.read_text()) for module, path in SOURCES.items()}
READING_PATH = ["thor.trajectory", "thor.text", "thor.rollout", "run_rl"]
READING_PATH += sorted(module for module in SOURCES if module.startswith("thor.training"))

# What exceeds a limit, and why.
LONG_FILES = {"run_rl": (469, "the algorithm of the paper in one file")}
LONG_FUNCTIONS = {"thor.rollout.drive": "one event loop, whose branches share all of its state"}
MANY_ARGUMENTS = {
    "run_rl.train": "the parts of a run",
    "thor.rollout.solve": "independent options, keyword-only",
    "thor.attention._attend": "transformers calls it with these",
}


def layer(module: str) -> str:
    """'script' | 'core' | 'bottom', or the name of the package that a module belongs to."""
    if module in SCRIPTS:
        return "script"
    name = module.split(".")[1] if "." in module else ""
    return name if name in PACKAGES else "bottom" if module in BOTTOM else "core"


def imports(module: str, top_level: bool = False) -> set[tuple[str, str]]:
    """(module, name) of each import from this project; the name is empty for `import module`.

    top_level: without imports inside functions.
    """
    found, nodes = set(), list(TREES[module].body)
    while nodes:
        node = nodes.pop()
        if not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add((inner, "") if inner in SOURCES else (node.module, alias.name))
    return {(target, name) for target, name in found if target.split(".")[0] in {"thor", *SCRIPTS}}


def public_names(package: str) -> set[str]:
    """`__all__` of a package's root."""
    for node in TREES[package].body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


EDGES = [(module, *edge) for module in sorted(SOURCES) for edge in sorted(imports(module))]


def test_no_module_imports_a_script():
    assert [edge for edge in EDGES if layer(edge[1]) == "script"] == []


def test_bottom_modules_import_only_bottom_modules():
    assert [edge for edge in EDGES if layer(edge[0]) == "bottom" and layer(edge[1]) != "bottom"] == []


def test_core_modules_use_only_public_names_of_packages():
    def allowed(target: str, name: str) -> bool:
        return layer(target) in ("core", "bottom") or (target.count(".") == 1 and name in public_names(target))

    assert [edge for edge in EDGES if layer(edge[0]) == "core" and not allowed(*edge[1:])] == []


def test_packages_use_only_public_names_of_each_other():
    def allowed(module: str, target: str, name: str) -> bool:
        same_or_lower = layer(target) in (layer(module), "core", "bottom")
        return same_or_lower or (target.count(".") == 1 and name in public_names(target))

    assert [edge for edge in EDGES if layer(edge[0]) in PACKAGES and not allowed(*edge)] == []


def test_imports_have_no_cycle():
    """At module level, where a cycle would fail or depend on which module is imported first."""
    graph = {module: {target for target, _ in imports(module, top_level=True)} for module in SOURCES}
    for module, targets in graph.items():  # a module of another package also imports the root of that package
        targets |= {target.rpartition(".")[0] for target in targets if layer(target) not in (layer(module), "core")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_fast_cpu_is_imported_in_one_place():
    users = {module for module, target, _ in EDGES if target == "thor.fast_cpu"}
    assert users == {"thor.training.model"}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_files_are_short(module):
    limit, _ = LONG_FILES.get(module, (450, ""))
    assert len(SOURCES[module].read_text().splitlines()) <= limit


def functions(module: str):
    """(qualified name, node) of each function and method, not of functions inside functions."""
    classes = [node for node in TREES[module].body if isinstance(node, ast.ClassDef)]
    for prefix, body in [(module, TREES[module].body), *((f"{module}.{c.name}", c.body) for c in classes)]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{prefix}.{node.name}", node


FUNCTIONS = dict(itertools.chain.from_iterable(map(functions, SOURCES)))


def test_functions_are_short():
    long = {name for name, node in FUNCTIONS.items() if node.end_lineno - node.lineno + 1 > 60}
    assert long == set(LONG_FUNCTIONS)


def test_functions_have_few_arguments():
    def count(node) -> int:
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        return len([name for name in names if name not in ("self", "cls")])

    assert {name for name, node in FUNCTIONS.items() if count(node) > 7} == set(MANY_ARGUMENTS)


def test_the_reading_path_is_short():
    lines = {module: len(SOURCES[module].read_text().splitlines()) for module in READING_PATH}
    assert sum(lines.values()) <= 2300, f"the reading path is too long, move or remove code: {lines}"
    train = FUNCTIONS["run_rl.train"]
    assert train.end_lineno - train.lineno + 1 <= 60


def test_readme_has_the_line_counts_of_the_reading_path():
    table = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(table) == len(READING_PATH) - 1  # without the package's __init__
    assert {path: int(lines) for path, lines in table} == {
        path: len((ROOT / path).read_text().splitlines()) for path, _ in table
    }

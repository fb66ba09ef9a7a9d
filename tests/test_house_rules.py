"""Rules of the house: imports point down, everything public has words to it, importing is cheap, no absolute paths."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dreslcl
from dreslcl.cli import app

PACKAGE = Path(dreslcl.__file__).parent
ORDER = (
    "common config segments slide tissue tiles formats cohort towers encoder text model bank distributed embedding labels evaluation "
    "heatmaps report trainer demo cli __main__"
).split()
LINES = 7_686
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


def tree(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports(module):
    """Names of our own modules that a module imports anywhere."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module.split(".")[0]] if node.module else (a.name for a in node.names if a.name in MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_below_explains_what_is_public_and_neither_prints_nor_configures_logging(module):
    assert module in ORDER, f"give {module} its place in ORDER"
    upward = {name for name in imports(module) if ORDER.index(name) >= ORDER.index(module)}
    assert not upward, f"{module} imports {upward}, which do not stand below it"
    body = tree(module)
    assert ast.get_docstring(body)
    for node in body.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"
    for node in ast.walk(body):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, f"{module}.{node.name} has more than 60 lines"
        elif isinstance(node, ast.Call) and module not in ("cli", "__main__"):
            assert ast.unparse(node.func) not in ("print", "logging.basicConfig", "logging.disable", "warnings.filterwarnings", "sys.exit")


def test_the_package_stays_small_enough_to_hold_in_one_head():
    files = {module: (PACKAGE / f"{module}.py").read_text(encoding="utf-8") for module in [*MODULES, "__init__"]}
    depth = {}
    for module in ORDER:
        depth[module] = 1 + max((depth[name] for name in imports(module)), default=0)
    assert sum(text.count("\n") for text in files.values()) <= LINES
    assert len(files) <= 25
    assert max(depth[m] for m in ORDER if m != "__main__") <= 11, depth


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout.split()


def test_help_is_quick_and_import_loads_no_torch():
    code = (
        "import sys, time; sys.argv = ['dreslcl', '--help']\nimport dreslcl, dreslcl.cli\n"
        "try: dreslcl.cli.main()\nexcept SystemExit: pass\n"
        "print(time.process_time(), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    seconds, torch, numpy = run(code)[-3:]
    assert (torch, numpy) == ("False", "False")
    assert float(seconds) < 0.7


@pytest.mark.parametrize("module", ["slide", "tissue", "tiles", "cohort", "formats", "evaluation"])
def test_modules_around_scans_and_results_load_no_torch(module):
    assert run(f"import sys, dreslcl.{module}; print('torch' in sys.modules)") == ["False"]


@pytest.mark.parametrize("name", dreslcl.__all__)
def test_every_public_name_resolves_and_explains_itself(name):
    thing = getattr(dreslcl, name)
    assert len(inspect.getdoc(thing) or "") > 30
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        if not member.startswith("_") and inspect.isfunction(getattr(value, "__func__", value)) and member not in ("forward",):
            assert inspect.getdoc(getattr(thing, member)), f"{name}.{member} has no docstring"


def test_every_command_and_option_has_help():
    import typer

    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name} has no help"


def test_no_absolute_path_stands_in_the_repository():
    pattern = re.compile(r"""["'\s=](/(?:tmp|home|work|root|usr|mnt|data)/[\w.]+)""")
    root = PACKAGE.parent
    files = [
        p for folder in ("dreslcl", "tests", "examples") for p in (root / folder).rglob("*") if p.suffix in (".py", ".sh", ".md", ".json")
    ]
    for path in files:
        if path.name != "test_house_rules.py":
            assert not pattern.findall(path.read_text(encoding="utf-8")), path

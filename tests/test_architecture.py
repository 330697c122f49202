"""The shape of the repository: who may import whom, what may never be imported, and how big a file may grow."""

import ast
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("keye_jax", "convert", "kernels_pallas", "runtime", "examples", "benchmarks", "tests")

# The only modules of the runtime that may touch the model: those that trace it.
TRACING = {"runtime.trace"}

# What a module may import of this repository, by the longest prefix of its own name; a name allows all beneath it.
MAY_IMPORT = {
    "kernels_pallas": {"kernels_pallas"},
    "keye_jax": {"keye_jax"},
    "keye_jax.ops": {"kernels_pallas"},
    "runtime": {"runtime"},
    **{module: {"runtime", "keye_jax"} for module in TRACING},
    "convert": {
        "convert",
        "keye_jax.config",
        "keye_jax.params",
        "keye_jax.checkpoint",
        "keye_jax.errors",
        "runtime.errors",
        "runtime.bundle",
        "runtime.manifest",
        "runtime.processor",
        "runtime.progress",
    },
    "examples": {"examples", "keye_jax", "convert", "runtime"},
}

# Modules that run what a file says, or that hand objects between processes by doing so.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec"}
UNSAFE_KEYWORDS = {"trust_remote_code", "allow_pickle"}
OTHER_PEOPLES_MODELS = {"torch", "transformers", "keye_vl_utils", "torchvision", "tensorflow"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_bytes(), filename=str(path)) for name, path in SOURCES.items()}


def is_beneath(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def imports(module: str) -> Iterator[str]:
    """Full names of what a module imports anywhere in it; `from a import b` is a.b where that is a module, else a."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: write imports with their full names"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in SOURCES else str(node.module)


IMPORTS = sorted({(module, name) for module in SOURCES for name in imports(module)})


def test_imports_point_in_the_allowed_directions():
    def allowed(module: str) -> set[str]:
        return MAY_IMPORT[max((rule for rule in MAY_IMPORT if is_beneath(module, {rule})), key=len)]

    ours = [(module, name) for module, name in IMPORTS if is_beneath(name, set(PACKAGES))]
    ruled = [(module, name) for module, name in ours if is_beneath(module, set(MAY_IMPORT))]
    assert ruled
    assert [(module, name) for module, name in ruled if not is_beneath(name, allowed(module))] == []


def test_kernels_need_nothing_but_jax_and_numpy():
    needed = {name.split(".")[0] for module, name in IMPORTS if is_beneath(module, {"kernels_pallas"})}
    # jaxlib holds the compiler's own vocabulary; it comes with jax.
    assert needed - set(sys.stdlib_module_names) == {"kernels_pallas", "jax"} | (needed & {"jaxlib", "numpy"})


def test_only_comparisons_import_other_peoples_models():
    others = [(module, name) for module, name in IMPORTS if is_beneath(name, OTHER_PEOPLES_MODELS)]
    assert [module for module, _ in others if not is_beneath(module, {"tests.parity", "benchmarks"})] == []


def test_nothing_runs_code_found_in_data():
    assert [(module, name) for module, name in IMPORTS if is_beneath(name, UNSAFE_MODULES)] == []
    unsafe = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
                unsafe.append((module, node.lineno, node.func.id))
            if isinstance(node, ast.keyword) and node.arg in UNSAFE_KEYWORDS and ast.unparse(node.value) != "False":
                unsafe.append((module, node.lineno, node.arg))
    assert unsafe == []


def test_files_stay_small_enough_to_read():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in SOURCES.items()}
    limits = {module: 600 if is_beneath(module, {"tests"}) else 400 for module in SOURCES}
    assert {module: count for module, count in lines.items() if count > limits[module]} == {}


def is_command(module: str) -> bool:
    functions = {node.name for node in TREES[module].body if isinstance(node, ast.FunctionDef)}
    return "main" in functions and (module, "argparse") in IMPORTS


COMMANDS = ["convert", *(module for module in SOURCES if is_beneath(module, {"runtime"}) and is_command(module))]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once_and_without_jax(command: str):
    used = []
    for _ in range(3):  # processor time still varies when other programs use the machine: the best of three counts
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "usage:" in done.stdout
    imported = {name.split(".")[0] for name in re.findall(r"^import time:.*\|\s*(\S+)$", done.stderr, re.MULTILINE)}
    assert "argparse" in imported  # the pattern above still reads what Python prints
    assert imported & {"jax", "jaxlib", "flax", "orbax", "tokenizers", "av"} == set()
    assert min(used) < 0.5


def test_the_model_imports_without_torch_transformers_or_a_video_decoder():
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'av'): sys.modules[name] = None\n"  # makes importing them an error
        "from keye_jax import KeyeVL"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_repository_is_complete():
    expected = {"pyproject.toml", "Makefile", "README.md", "BUILD.md", "LICENSE", ".ci/run", "examples/demo.py"}
    expected |= {f"{package}/__init__.py" for package in ("keye_jax", "convert", "kernels_pallas", "runtime")}
    assert {name for name in expected if not (ROOT / name).exists()} == set()


def test_dependencies_are_ranges_and_extras_are_the_promised_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert {"cuda", "tpu", "video", "test", "parity"} <= set(extras)
    required = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    # A comparison is with one release of the other program; everything else must install beside other packages.
    assert [line for line in required if "==" in line and not line.startswith("keye-vl-utils")] == []

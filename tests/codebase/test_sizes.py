"""Sizes: short files, short functions, and few parameters, in Python and in C++."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import cpp_functions
from places import ROOT

LINES = 300
BODY = 50  # lines of a function without its parameters and its docstring
PARAMETERS = 6  # without self, *args and **kwargs
SUFFIXES = {".c", ".cmake", ".cpp", ".h", ".py", ".pyi", ".toml"}
# Files that may be longer, and why.
LONG_FILES = {"selfattn/_core.pyi": "the types of one module"}
# Functions with more parameters that are not public, and why.
MANY_PARAMETERS = {
    "_arguments.core_options": "the options of attention, by name",
    "_reference_visibility.visibility": "public, as reference.visibility",
    "distributed._group.attention_backward": "public; its package is not imported here, since MPI would start",
    "integrations._hf_attention.attention_forward": "called by transformers",
    "integrations._hf_mask.make_mask": "called by transformers",
    "integrations._hf_models.forward": "called by transformers",
}
PUBLIC = ("", ".compat", ".integrations.jax", ".integrations.torch")  # modules with a list of public names
OPEN = ("reference", "viz")  # modules whose names without an underscore are public


def files(*folders: str) -> list[Path]:
    found = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.*"))]
    return [file for file in [*found, *ROOT.glob("*.py")] if file.suffix in SUFFIXES]


def functions(file: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the name and the definition of every function, and of every method as Class.method."""
    tree = ast.parse(file.read_text(encoding="utf8"))
    for outer in ast.walk(tree):
        prefix = f"{outer.name}." if isinstance(outer, ast.ClassDef) else ""
        for node in ast.iter_child_nodes(outer):
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name, node


def body_lines(function: ast.FunctionDef) -> int:
    statements = function.body[ast.get_docstring(function) is not None :]
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0


def parameters(function: ast.FunctionDef) -> int:
    given = function.args
    names = [x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def public_names() -> set[str]:
    names = {name for module in PUBLIC for name in importlib.import_module(f"selfattn{module}").__all__}
    return names | {f"{name}.{method}" for name in names for method in ("__init__", "__call__", "buffer_size")}


def test_files_are_short() -> None:
    counted = files("benchmarks", "cmake", "csrc", "examples", "selfattn", "tests")
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf8").splitlines()) for file in counted}
    assert {name: lines for name, lines in lengths.items() if lines > LINES and name not in LONG_FILES} == {}


def test_functions_are_short() -> None:
    python = [file for file in files("benchmarks", "examples", "selfattn", "tests") if file.suffix == ".py"]
    found = {(file.name, name): body_lines(node) for file in python for name, node in functions(file)}
    assert {name: lines for name, lines in found.items() if lines > BODY} == {}


def test_functions_have_few_parameters() -> None:
    public = public_names()
    many = set()
    for file in files("benchmarks", "examples", "selfattn"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removeprefix("selfattn.")
        for name, node in functions(file) if file.suffix == ".py" else ():
            opened = module in OPEN and not name.startswith("_")
            if parameters(node) > PARAMETERS and name not in public and not opened:
                many.add(f"{module}.{name.rpartition('.')[2]}")
    assert many == set(MANY_PARAMETERS)


def test_functions_in_cpp_are_short_and_have_few_parameters() -> None:
    sources = [file for file in files("csrc", "tests/native") if file.suffix in {".cpp", ".h"}]
    found = [(file.name, x) for file in sources for x in cpp_functions.functions(file.read_text(encoding="utf8"))]
    assert len(found) > 1000
    assert [x for x in found if x[1].lines > BODY or x[1].parameters > PARAMETERS] == []


def test_functions_in_cpp_are_found() -> None:
    text = """
namespace a {  // {
template <class T, int n>
struct B : C<T> {
  enum class D { e, f };
  explicit B(int i, std::map<int, int> m = {{1, 2}, {3, 4}}) : i_(i), m_{m} {}
  bool operator()(int i) const {
    // a comment (
    const char* text = "}";
    return [&](int j, int k) { return j < k; }(i, '{');
  }
  bool operator<(const B& other) const noexcept { return i_ < other.i_; }
  int i_ = {}, values[2] = {1, 2};
  std::map<int, int> m_{};
};
template <void call(int, int)>
auto g() -> std::pair<int, int> {
  struct Local {
    void h(int, int) {}
  };
  return {};
}
constexpr auto k = [](int i, T* const (&array)[3]) {
  return i;
};
void declared(int, int, int);
}  // namespace a
"""
    expected = [("B", 0, 2), ("operator", 3, 1), ("operator", 0, 1), ("g", 4, 0), ("[]", 1, 2)]
    assert [tuple(x) for x in cpp_functions.functions(text)] == expected

"""fused_resnet/_C.pyi agrees with the compiled module: names, arguments and types.

The truth is what pybind11 writes into docstrings, and the operators' schemas.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fused_resnet import _C

STUB = Path(_C.__file__).parent / "_C.pyi"
TREE = ast.parse(STUB.read_text())
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
OPERATORS = {node.target.id for node in TREE.body if isinstance(node, ast.AnnAssign)}
METHODS = {
    f"{name}.{method.name}": method
    for name, node in CLASSES.items()
    for method in node.body
    if isinstance(method, ast.FunctionDef)
}


def public(names: list[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def plain(annotation: str) -> str:
    """A type in the words of the stub; pybind11's depend on its version."""
    text = annotation.replace("typing.SupportsInt | typing.SupportsIndex", "int")
    text = re.sub(r"\b(collections\.abc\.)?Sequence\b", "list", text)
    return text.replace("typing.", "").replace("List[", "list[").replace(" ", "")


def agree(stub: str, module: str) -> bool:
    """Whether two types are equal; pybind11 does not say what a list or a dictionary contains."""
    stub, module = plain(stub), plain(module)
    return stub == module or (module in ("dict", "list", "tuple") and stub.startswith(f"{module}["))


def signature(docstring: str | None) -> tuple[list[tuple[str, str]], str]:
    """Names and types of the arguments, and the result's type, from pybind11's first line."""
    match = re.match(r"\w+\((.*)\) -> (.*)", (docstring or "").splitlines()[0])
    assert match, docstring
    # Commas inside brackets separate no arguments.
    arguments = re.split(r",\s*(?![^\[]*\])", match[1]) if match[1] else []
    pairs = [argument.partition(": ") for argument in arguments]
    return [(name, type_) for name, _, type_ in pairs], match[2]


def check(node: ast.FunctionDef, docstring: str | None) -> None:
    known, result = signature(docstring)
    arguments = node.args.args
    if arguments and arguments[0].arg == "self":
        arguments, known = arguments[1:], known[1:]
    assert len(arguments) == len(known)
    for argument, (name, _) in zip(arguments, known, strict=True):
        # Arguments without a name in the bindings are arg0, arg1, ...
        assert argument.arg == name or re.fullmatch(r"arg\d+", name), f"{node.name}: {name}"
    assert node.returns is not None
    declared = [argument.annotation for argument in arguments] + [node.returns]
    for annotation, module in zip(declared, [*(t for _, t in known), result], strict=True):
        assert annotation is not None
        stub = ast.unparse(annotation)
        assert agree(stub, module), f"{node.name}: {stub} in the stub, {module} in the module"


def test_the_names_agree() -> None:
    assert {*FUNCTIONS, *CLASSES, *OPERATORS} == public(dir(_C))
    assert {schema.partition("(")[0] for schema in _C.schemas()} == OPERATORS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_arguments_of_a_function_agree(name: str) -> None:
    check(FUNCTIONS[name], getattr(_C, name).__doc__)


@pytest.mark.parametrize("name", METHODS)
def test_the_arguments_of_a_method_agree(name: str) -> None:
    owner, _, method = name.partition(".")
    check(METHODS[name], getattr(getattr(_C, owner), method).__doc__)


def test_a_wrong_stub_is_found() -> None:
    wrong = ast.parse("def peak_flops(dtype: int) -> float: ...").body[0]
    assert isinstance(wrong, ast.FunctionDef)
    with pytest.raises(AssertionError, match=r"int in the stub, torch\.dtype in the module"):
        check(wrong, _C.peak_flops.__doc__)

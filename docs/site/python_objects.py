"""Public Python objects as Markdown, from their signatures and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import html
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from pydantic import BaseModel
from table_text import escape, table

from overfill import errors

_SECTION = re.compile(r"^(Args|Attributes|Examples|Raises):\n", re.MULTILINE)
_ENTRY = re.compile(r"^(\S.*?): ", re.MULTILINE)
_EMPTY = (inspect.Parameter.empty, dataclasses.MISSING)


def section(path: str) -> str:
    """Returns the section of an object.

    Args:
        path: Dotted path. After a class, ``with a b`` limits its members to these, and ``alone`` leaves all out.
    """
    path, *words = path.split(" ")
    package, _, name = path.rpartition(".")
    module = importlib.import_module(package)
    found = getattr(module, name)
    if not callable(found) or getattr(found, "__module__", "") in ("types", "typing"):
        return "".join(_constant(module, name))
    return "".join(_described(found, name, "###", words[1:] if words else None))


def error_classes() -> str:
    """Returns the sections of the classes of ``overfill.errors``."""
    found = [each for each in vars(errors).values() if getattr(each, "__module__", "") == errors.__name__]
    return "".join(line for each in found for line in _described(each, each.__name__, "###", None))


def _constant(module: ModuleType, name: str) -> Iterator[str]:
    """Yields the section of a constant, whose docstring follows its value in the source."""
    source = inspect.getsource(module)
    body = ast.parse(source).body
    for node, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.ImportFrom) and name in [each.name for each in node.names]:
            yield from _constant(importlib.import_module(str(node.module)), name)
        if not isinstance(node, ast.Assign | ast.AnnAssign) or ast.unparse(node).split()[0].strip(":") != name:
            continue
        yield f"### {name}\n\n```python\n{ast.get_source_segment(source, node)}\n```\n\n"
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            yield f"{_prose(inspect.cleandoc(str(after.value.value)))}\n\n"


def _described(found: Any, name: str, level: str, only: list[str] | None) -> Iterator[str]:
    """Yields the section of a class, function or property, then those of the class's members."""
    yield f"{level} {name}\n\n"
    head, *parts = _SECTION.split(inspect.getdoc(found) or "")
    sections = {title: textwrap.dedent(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}
    if _has_signature(found, sections):
        yield f"```python\n{_signature(found, name)}\n```\n\n"
    yield f"{_prose(head)}\n\n"
    if examples := sections.get("Examples"):
        lines = re.findall(r"^(?:>>>|\.\.\.) (.*?)(?:  # doctest.*)?$", examples, re.MULTILINE)
        yield "```python\n" + "\n".join(lines) + "\n```\n\n"
    for title, header, types in (("Args", "argument", _arguments), ("Attributes", "attribute", _attributes)):
        if title in sections:
            known = types(found)
            rows = (
                (_code(key), *known.get(key.lstrip("*"), ("", "")), text) for key, text in _entries(sections[title])
            )
            yield table((header, "type", "default", "meaning"), rows) + "\n"
    if "Raises" in sections:
        yield table(("raises", "when"), ((_code(key), text) for key, text in _entries(sections["Raises"]))) + "\n"
    if inspect.isclass(found):
        for key, member in vars(found).items():
            if key in only if only is not None else not key.startswith("_") and _is_member(member):
                yield from _described(getattr(member, "__func__", member), f"{name}.{key}", level + "#", None)


def _is_member(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)


def _has_signature(found: Any, sections: dict[str, str]) -> bool:
    """Says whether a signature shows more than the table of attributes does."""
    if isinstance(found, property):
        return True
    return not inspect.isclass(found) or ("Attributes" not in sections and "__init__" in vars(found))


def _signature(found: Any, name: str) -> str:
    if isinstance(found, property):
        return f"{name}: {inspect.signature(found.fget).return_annotation}"
    signature = inspect.signature(found)
    parameters = [
        each.replace(annotation=_annotation(each.annotation), default=_default(each.default))
        for each in signature.parameters.values()
        if each.name not in ("self", "cls")
    ]
    returns = inspect.Signature.empty if inspect.isclass(found) else _annotation(signature.return_annotation)
    return f"{name}{signature.replace(parameters=parameters, return_annotation=returns)}"


class _Plain(str):
    """Code that a signature shows without quotes."""

    __repr__ = str.__str__


def _annotation(value: Any) -> Any:
    # Annotations are text already where a module postpones their evaluation.
    return value if value in _EMPTY else _Plain(value if isinstance(value, str) else inspect.formatannotation(value))


def _default(value: Any) -> Any:
    return value if value in _EMPTY else _Plain(value.__name__ if inspect.isfunction(value) else repr(value))


def _arguments(found: Callable[..., Any]) -> dict[str, tuple[str, str]]:
    return {each.name: _cells(each.annotation, each.default) for each in inspect.signature(found).parameters.values()}


def _attributes(found: type) -> dict[str, tuple[str, str]]:
    if dataclasses.is_dataclass(found):
        return {each.name: _cells(each.type, each.default) for each in dataclasses.fields(found)}
    annotations = {k: v for base in reversed(found.__mro__) for k, v in inspect.get_annotations(base).items()}
    defaults = _model_defaults(found) if issubclass(found, BaseModel) else {}
    return {name: _cells(annotation, defaults.get(name, _EMPTY[0])) for name, annotation in annotations.items()}


def _model_defaults(found: type[BaseModel]) -> dict[str, Any]:
    """Returns the default of each field that has one, and a model as the call that makes it."""
    given = {
        name: field.get_default(call_default_factory=True)
        for name, field in found.model_fields.items()
        if not field.is_required()
    }
    return {k: _Plain(f"{type(v).__name__}()") if isinstance(v, BaseModel) else v for k, v in given.items()}


def _cells(annotation: Any, default: Any) -> tuple[str, str]:
    """Returns the cells of a type and of a default, which are empty where there is none."""
    kind, value = ("" if each in _EMPTY else _code(each) for each in (_annotation(annotation), _default(default)))
    return kind, value


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """Yields name and text of each entry of a docstring's section."""
    _, *parts = _ENTRY.split(text)
    for name, meaning in zip(parts[::2], parts[1::2], strict=True):
        yield name, _prose(meaning)


def _prose(text: str) -> str:
    """Returns a docstring's text as Markdown."""
    parts = re.split(r"``(.+?)``", text.strip(), flags=re.DOTALL)
    return "".join(_code(part) if index % 2 else escape(part) for index, part in enumerate(parts))


def _code(text: str) -> str:
    """Returns code for a cell or for prose. Between backquotes, a bar would end the cell."""
    if "|" not in text:
        return f"`{text}`" if text else ""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"

"""The tools of a request: flattened into functions for the model, and found again when it calls one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from overfill.api.openai.fields import function_tool, invalid
from overfill.api.responses import schema
from overfill.api.tools import MAX_TOOLS, TEXT_PARAMETER
from overfill.request.params import Grammar
from overfill.v1 import inference_pb2

SEPARATOR = "__"
"""Between the name of a namespace and that of its tool, in the name that the model sees."""


@dataclass(frozen=True, slots=True)
class Callee:
    """A tool as the client knows it.

    Attributes:
        namespace: empty for a tool outside of namespaces.
        custom: whether its argument is text.
    """

    name: str
    namespace: str
    custom: bool


class ToolSet:
    """The tools of a request.

    Args:
        target: the chat's tools, to which this class adds.

    Attributes:
        callees: the client's tool for each name that the model sees.
        places: the client's name of each tool in ``target``.
        shown: the tools of the request as the response repeats them.
        left_out: types of tools that the model does not see.
    """

    def __init__(self, target: RepeatedCompositeFieldContainer[inference_pb2.Tool]) -> None:
        self.callees: dict[str, Callee] = {}
        self.places: list[str] = []
        self.shown: list[dict[str, Any]] = []
        self.left_out: dict[str, None] = {}  # a set in order
        self._target = target
        self._repeatable: dict[str, Any] = {}  # tools of items by the model's name

    def add(self, tools: Sequence[Any], place: str) -> None:
        """Adds the tools of the field ``place``. Raises ApiError."""
        namespaces: set[str] = set()
        for index, tool in enumerate(tools):
            here = f"{place}[{index}]"
            if isinstance(tool, schema.NamespaceTool):
                if tool.name in namespaces:
                    raise invalid(f"{here}.name", f"is {tool.name!r}, which is another namespace's name too")
                namespaces.add(tool.name)
                for number, member in enumerate(tool.tools):
                    self._add(member, tool.name, f"{here}.tools[{number}]")
            elif not self._add(tool, "", here):
                continue
            if place == "tools":
                self.shown.append(tool.model_dump(exclude_unset=True))

    def _add(self, tool: Any, namespace: str, place: str) -> bool:
        if isinstance(tool, schema.OtherTool):
            if tool.type == "namespace":
                raise invalid(f"{place}.type", "is 'namespace'; namespaces have no namespaces in them")
            self.left_out[tool.type] = None
            return False
        name = self.flat(namespace, tool.name)
        if name in self.callees:
            if self._repeatable.get(name) == tool:  # a client repeats items with tools
                return True
            raise invalid(f"{place}.name", f"makes the model see {name[:140]!r}, which is another tool's name too")
        custom = isinstance(tool, schema.CustomTool)
        if len(self.places) == MAX_TOOLS:
            raise invalid(place, f"is one too many: at most {MAX_TOOLS} tools, those in namespaces included")
        self.callees[name] = Callee(tool.name, namespace, custom)
        if not place.startswith("tools"):
            self._repeatable[name] = tool
        self.places.append(place)
        if custom:
            self._target.append(_custom(tool, name, place))
        else:
            field = f"{place}.parameters"
            self._target.append(function_tool(name, tool.description, field, tool.parameters, strict=tool.strict))
        return True

    def flat(self, namespace: str | None, name: str) -> str:
        """Returns the name that the model sees."""
        return f"{namespace}{SEPARATOR}{name}" if namespace else name

    def chosen(self, choice: schema.ChosenTool, place: str) -> str:
        """Returns the model's name of a tool that ``tool_choice`` names. Raises ApiError."""
        if choice.type not in ("function", "custom"):
            raise invalid(
                f"{place}.type",
                f"is {choice.type[:80]!r}; this server runs no tools: name a 'function' or 'custom' one",
            )
        name = self.flat(choice.namespace, choice.name or "")
        callee = self.callees.get(name)
        if callee is None or callee.custom != (choice.type == "custom"):
            raise invalid(f"{place}.name", f"is {name[:80]!r}, which is not one of the {choice.type} tools")
        return name

    def keep(self, names: set[str]) -> None:
        """Removes the other tools from the chat."""
        kept = [(tool, place) for tool, place in zip(self._target, self.places, strict=True) if tool.name in names]
        del self._target[:]
        self._target.extend([tool for tool, _ in kept])
        self.places[:] = [place for _, place in kept]


def _custom(tool: schema.CustomTool, name: str, place: str) -> inference_pb2.Tool:
    text: dict[str, Any] = {"type": "string"}
    made = inference_pb2.Tool(name=name, description=tool.description or "")
    if tool.format is not None and tool.format.type == "grammar":
        syntax, definition = tool.format.syntax, tool.format.definition
        if syntax is None or not definition:
            raise invalid(f"{place}.format", "of type 'grammar' needs 'syntax' and 'definition'")
        form = "Lark grammar" if syntax == "lark" else "regular expression"
        text["description"] = f"Text of this {form}:\n{definition}"
        made.input.CopyFrom(Grammar(syntax, definition).to_proto())
    made.parameters = json.dumps(
        {
            "type": "object",
            "properties": {TEXT_PARAMETER: text},
            "required": [TEXT_PARAMETER],
            "additionalProperties": False,
        }
    )
    return made

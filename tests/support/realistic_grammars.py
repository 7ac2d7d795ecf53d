"""Grammars as clients send them: JSON schemas from Pydantic, OpenAPI-like tools, regular expressions and Lark."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, Field, TypeAdapter, create_model

from overfill.api.families.llama3_json import Llama3Json
from overfill.api.families.mistral import Mistral
from overfill.api.families.pythonic import Pythonic
from overfill.api.families.qwen3_coder import Qwen3Coder
from overfill.api.tools import ToolDefinition
from overfill.api.tools_grammar import tools_grammar
from overfill.request.params import Grammar


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


class Address(BaseModel):
    street: str = Field(max_length=200)
    city: str
    postcode: Annotated[str, Field(pattern=r"^[0-9]{5}(-[0-9]{4})?$")]
    country: Annotated[str, Field(min_length=2, max_length=2)]


class Person(BaseModel):
    id: uuid.UUID
    name: str
    email: Annotated[str, Field(json_schema_extra={"format": "email"})]
    born: datetime.date | None = None
    addresses: list[Address] = Field(default_factory=list, max_length=20)
    favourite: Colour = Colour.RED
    tags: list[str] = Field(default_factory=list)
    height: float | None = Field(None, ge=0, le=3)


class LineItem(BaseModel):
    sku: Annotated[str, Field(pattern=r"^[A-Z]{2,4}-\d{4,8}$")]
    quantity: int = Field(ge=1, le=10_000)
    price: decimal.Decimal = Field(ge=0, max_digits=12, decimal_places=2)
    note: str | None = None


class Invoice(BaseModel):
    number: Annotated[str, Field(pattern=r"^INV-\d{4}-\d{6}$")]
    issued: datetime.datetime
    due: datetime.date
    customer: Person
    lines: list[LineItem] = Field(min_length=1, max_length=500)
    total: float
    currency: Literal["EUR", "USD", "GBP", "JPY", "CHF"]
    paid: bool = False


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    breed: str
    owner: Person | None = None


class Bird(BaseModel):
    kind: Literal["bird"]
    wingspan: float


class Zoo(BaseModel):
    animals: list[Annotated[Cat | Dog | Bird, Field(discriminator="kind")]]
    opened: datetime.date
    hours: dict[str, tuple[datetime.time, datetime.time]]


class TreeNode(BaseModel):
    value: int | str | None
    left: TreeNode | None = None
    right: TreeNode | None = None
    children: list[TreeNode] = []


class Expression(BaseModel):
    operator: Literal["+", "-", "*", "/", "and", "or", "not"]
    operands: list[Expression | float | str | bool]


class Step(BaseModel):
    explanation: str
    output: str


class MathReasoning(BaseModel):
    steps: list[Step]
    final_answer: str


class Event(BaseModel):
    name: str
    start: datetime.datetime
    duration: datetime.timedelta
    participants: list[str]
    location: Address | str | None


class Entity(BaseModel):
    text: str
    label: Literal["PERSON", "ORG", "GPE", "DATE", "MONEY", "PRODUCT", "EVENT", "LAW", "LANGUAGE", "WORK_OF_ART"]
    start: int = Field(ge=0)
    end: int = Field(ge=0)
    confidence: float = Field(ge=0, le=1)


class Extraction(BaseModel):
    entities: list[Entity]
    relations: list[tuple[int, str, int]]
    sentiment: dict[str, float]


_MODELS: list[type[BaseModel]] = [
    *(Address, Person, LineItem, Invoice, Cat, Dog, Zoo, TreeNode, Expression, MathReasoning, Event, Extraction),
]  # fmt: skip

FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


def _numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}_{index:04d}" for index in range(count)]


def _wide(fields: int, *, optional: bool) -> dict[str, Any]:
    kinds = [{"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"},
             {"type": "array", "items": {"type": "string"}}, {"type": "string", "format": "date-time"}]  # fmt: skip
    properties = {name: kinds[index % len(kinds)] for index, name in enumerate(_numbered("field", fields))}
    return {
        "type": "object",
        "properties": properties,
        "required": [] if optional else list(properties),
        "additionalProperties": False,
    }


def _deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for level in range(depth):
        inner = {"type": "array", "items": schema} if level % 3 == 2 else schema
        schema = {"type": "object", "properties": {f"level{level}": inner, "id": {"type": "integer"}}}
    return schema


def _linked(models: int, fan_out: int) -> dict[str, Any]:
    """Definitions that reference each other, as those of a large data model do."""
    definitions = {
        f"Model{index}": {
            "type": "object",
            "properties": {
                "id": {"type": "string", "format": "uuid"},
                **{
                    f"ref{step}": {"anyOf": [{"$ref": f"#/$defs/Model{(index + step) % models}"}, {"type": "null"}]}
                    for step in range(1, fan_out + 1)
                },
            },
            "required": ["id"],
            "additionalProperties": False,
        }
        for index in range(models)
    }
    return {"$ref": "#/$defs/Model0", "$defs": definitions}


def schemas() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields names and JSON schemas."""
    for model in _MODELS:
        yield f"pydantic {model.__name__}", model.model_json_schema()
        yield f"pydantic list[{model.__name__}]", TypeAdapter(list[model]).json_schema()  # type: ignore[valid-type]
    for name, kind in {
        "union of all": Union[tuple(_MODELS)],  # noqa: UP007
        "dict of models": dict[str, Person | Invoice],
        "nested lists": list[list[list[float]]],
        "tuple": tuple[int, str, float, bool, None],
        "literals": Literal[tuple(_numbered("choice", 50))],
        "many optionals": create_model("Many", **dict.fromkeys(_numbered("option", 60), (str | None, None))),  # type: ignore[call-overload]
    }.items():
        yield f"pydantic {name}", TypeAdapter(kind).json_schema()
    for name in FORMATS:
        yield f"format {name}", {"type": "string", "format": name}
    for count in (10, 100, 1000):
        yield f"enum of {count}", {"enum": _numbered("value", count)}
        yield f"enum of {count} sentences", {"enum": [f"This is answer number {i}, it is long" for i in range(count)]}
    for count in (5, 40, 150):
        for optional in (False, True):
            yield f"{count} {'optional' if optional else 'required'} fields", _wide(count, optional=optional)
    for depth in (5, 15, 40):
        yield f"nested {depth} deep", _deep(depth)
    for models, fan_out in ((5, 2), (20, 4), (60, 3), (120, 2)):
        yield f"{models} linked models", _linked(models, fan_out)
    for name, schema in {
        "any object": {"type": "object"},
        "string map": {"type": "object", "additionalProperties": {"type": "string"}},
        "pattern map": {"type": "object", "patternProperties": {"^x-[a-z]+$": {"type": "integer"}}},
        "tweet": {"type": "string", "maxLength": 280},
        "essay": {"type": "string", "minLength": 100, "maxLength": 20_000},
        "scores": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 100}, "minItems": 5,
                   "maxItems": 50},
        "embedding": {"type": "array", "items": {"type": "number"}, "minItems": 256, "maxItems": 256},
        "cents": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 1_000_000},
        "quarters": {"type": "integer", "multipleOf": 15, "minimum": 0, "maximum": 1440},
        "thousands": {"type": "integer", "multipleOf": 1000},
        "semver": {"type": "string", "pattern": r"^\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$"},
        "phone": {"type": "string", "pattern": r"^\+?[1-9]\d{1,14}$"},
        "url": {"type": "string", "pattern": r"^https?://[\w.-]+(:\d+)?(/[^\s]*)?$"},
        "iban": {"type": "string", "pattern": r"^[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}$"},
        "colour": {"type": "string", "pattern": "^#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})$"},
        "sentence": {"type": "string", "pattern": r"^[A-Z][^.!?]{10,300}[.!?]$"},
        "all of": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {
            "a": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
            "b": {"type": "object", "properties": {"y": {"type": "string"}}, "required": ["y"]}}},
        "json patch": {"type": "array", "items": {"type": "object", "properties": {
            "op": {"enum": ["add", "remove", "replace", "move", "copy", "test"]},
            "path": {"type": "string", "pattern": "^(/[^/]*)*$"}, "value": {}}, "required": ["op", "path"]}},
        "geojson": {"anyOf": [
            {"type": "object", "properties": {"type": {"const": "Point"}, "coordinates": {"$ref": "#/$defs/p"}}},
            {"type": "object", "properties": {"type": {"const": "LineString"},
             "coordinates": {"type": "array", "items": {"$ref": "#/$defs/p"}, "minItems": 2}}},
            {"type": "object", "properties": {"type": {"const": "Polygon"}, "coordinates": {
                "type": "array", "items": {"type": "array", "items": {"$ref": "#/$defs/p"}, "minItems": 4}}}}],
            "$defs": {"p": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3}}},
    }.items():  # fmt: skip
        yield name, schema


def tools(count: int, variant: int = 0) -> list[ToolDefinition]:
    """Functions with parameters as OpenAPI converters write them."""
    parameters = [schema for _, schema in schemas() if schema.get("type") == "object" and "$defs" not in schema]
    return [
        ToolDefinition(f"tool_{index}", f"Does {index}", parameters[(index + variant) % len(parameters)])
        for index in range(count)
    ]


REGEXES = {
    "date": r"\d{4}-\d{2}-\d{2}",
    "email": r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{1,255}\.[A-Za-z]{2,10}",
    "ip": r"((25[0-5]|(2[0-4]|1\d|[1-9]|)\d)\.?\b){4}".replace(r"\b", ""),
    "choice": "|".join(_numbered("choice", 200)),
    "paragraphs": r"([A-Z][^\n]{20,400}\n\n){1,5}",
    "words": r"(\w+ ){5,20}\w+\.",
    "code block": r"```(python|sql)\n(.|\n){0,2000}\n```",
}

LARKS = {
    "arithmetic": 'start: sum\nsum: product (("+"|"-") product)*\nproduct: atom (("*"|"/") atom)*\n'
    'atom: NUMBER | "(" sum ")" | NAME\nNUMBER: /[0-9]+(\\.[0-9]+)?/\nNAME: /[a-z_]\\w*/\n',
    "sql": 'start: "SELECT " columns " FROM " NAME (" WHERE " condition)? ";"\ncolumns: "*" | NAME ("," " "? NAME)*\n'
    'condition: comparison ((" AND "|" OR ") comparison)*\ncomparison: NAME " "? ("="|"<"|">"|"!=") " "? value\n'
    "value: NUMBER | STRING\nNAME: /[a-zA-Z_]\\w{0,40}/\nNUMBER: /-?[0-9]+/\nSTRING: /'[^'\\n]*'/\n",
    "xml": 'start: element\nelement: "<" NAME attribute* ("/>" | ">" (element|TEXT)* "</" NAME ">")\n'
    'attribute: " " NAME "=\\"" VALUE "\\""\nNAME: /[a-z][a-z0-9-]*/\nVALUE: /[^"<]*/\nTEXT: /[^<>]+/\n',
    "csv": 'start: row ("\\n" row)*\nrow: CELL ("," CELL)*\nCELL: /[^,\\n]*/\n',
}


def grammars() -> Iterator[tuple[str, Grammar]]:
    """Yields names and grammars, about a hundred of them."""
    yield "json_object", Grammar("json_object")
    for name, schema in schemas():
        yield name, Grammar("json_schema", json.dumps(schema))
    for name, regex in REGEXES.items():
        yield f"regex {name}", Grammar("regex", regex)
    for name, lark in LARKS.items():
        yield f"lark {name}", Grammar("lark", lark)
    for count in (1, 8, 32, 128):
        for mode in ("auto", "required"):
            yield f"{count} tools, {mode}", Grammar("lark", tools_grammar(tools(count), mode, single=False))  # type: ignore[arg-type]
    for format in (Llama3Json(), Pythonic(), Mistral(), Qwen3Coder()):
        text = tools_grammar(tools(128), "auto", single=False, format=format)
        yield f"128 tools, {format.name}", Grammar("lark", text)

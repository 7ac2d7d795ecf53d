"""Every service, message and enum of ``proto/overfill/v1``, with the comments in the files."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto
from grpc_tools import protoc
from table_text import escape, table

from overfill.rpc.access import RPCS
from overfill.rpc.constants import WIRE_VERSION

PROTO = Path(__file__).parents[2] / "proto"
# In the order in which a request meets them.
_FILES = ("inference", "admin", "decode", "prefill", "kv", "registry", "common")

_TYPES = {number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()}
# Field numbers of descriptor.proto, of which the paths of comments consist.
_MESSAGE, _ENUM, _SERVICE, _METHOD = 4, 5, 6, 2
_FIELD, _NESTED, _NESTED_ENUM, _ONEOF, _RESERVED, _VALUE = 2, 3, 4, 8, 9, 2
_Path = tuple[int, ...]


@functools.cache
def descriptors() -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """Returns the parsed files with their comments, by name without folder and suffix."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        files = sorted(str(file.relative_to(PROTO)) for file in PROTO.rglob("*.proto"))
        arguments = ["protoc", f"-I{PROTO}", f"--descriptor_set_out={out}", "--include_source_info", *files]
        if protoc.main(arguments) != 0:
            raise ValueError("protoc cannot read the files in proto/")
        parsed = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    return {Path(file.name).stem: file for file in parsed.file}


def services() -> str:
    """Returns a table of the services with their RPCs, and the version of the wire."""
    rows = (
        (
            f"[`{service.name}`](#{_anchor(service.name)})",
            ", ".join(f"[`{each.name}`](#{_anchor(service.name + each.name)})" for each in service.method),
            _prose(file.head, file.names),
        )
        for file in _files()
        for service in file.services
    )
    return f"{table(('service', 'RPCs', 'between'), rows)}\nThis is wire {WIRE_VERSION}. Peers compare its version.\n"


def files() -> str:
    """Returns a section for each file."""
    return "\n".join(line for file in _files() for line in file.lines())


def _files() -> list[_File]:
    parsed = descriptors()
    names = {name for file in parsed.values() for name in _names(file)}
    ordered = [*(name for name in _FILES if name in parsed), *sorted(parsed.keys() - set(_FILES))]
    return [_File(name, parsed[name], names) for name in ordered]


def _names(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    """Yields the names of the file's messages and enums; nested ones as ``Outer.Inner``."""
    for message in file.message_type:
        yield message.name
        yield from (f"{message.name}.{each.name}" for each in (*message.nested_type, *message.enum_type))
    yield from (enum.name for enum in file.enum_type)


def _prose(text: str, names: Iterable[str]) -> str:
    """Returns a comment as Markdown: names of messages and enums are links."""
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    parts = re.split(r"(`[^`]*`)", text)
    for index in range(0, len(parts), 2):
        linked = rf"(?<![\w.])({known})((?:\.[a-z]\w*)?)(?!\w)"
        parts[index] = parts[index].replace(" -&gt; ", " → ")
        parts[index] = re.sub(linked, lambda m: f"[{m[1]}](#{_anchor(m[1])}){m[2]}", escape(parts[index]))
        parts[index] = re.sub(r"(?<![\w/])(\w+_\w+|[A-Z]{6,})(?![\w/])", r"`\1`", parts[index])
    return "".join(parts)


def _anchor(name: str) -> str:
    return name.replace(".", "").lower()


def _callers(rpc: str) -> str:
    """Returns which credentials an RPC requires."""
    rule = RPCS[rpc]
    roles = f"certificate of the role {' or '.join(sorted(map(str, rule.roles)))}"
    return f"{roles}; API key with the scope {rule.scope}" if rule.scope else roles


class _File:
    """One proto file, with its comments by path."""

    def __init__(self, name: str, file: descriptor_pb2.FileDescriptorProto, names: set[str]) -> None:
        self.names = names
        self.services = file.service
        self._name = name
        self._file = file
        self._comments: dict[_Path, str] = {}
        self.head = ""
        for location in file.source_code_info.location:
            comment = location.leading_comments or location.trailing_comments
            self._comments[tuple(location.path)] = comment
            if tuple(location.path) == (12,):  # the syntax, below the comment about the file
                self.head = " ".join(comment.split())

    def lines(self) -> Iterator[str]:
        yield f"## {self._name}.proto\n"
        yield f"{_prose(self.head, self.names)}\n"
        for index, service in enumerate(self._file.service):
            yield f"### {service.name}\n"
            yield self._text((_SERVICE, index))
            for number, method in enumerate(service.method):
                yield f"#### {service.name}.{method.name}\n"
                sent = self._type(method.input_type, "stream " if method.client_streaming else "")
                answered = self._type(method.output_type, "stream " if method.server_streaming else "")
                yield f"{sent} → {answered}\n"
                yield self._text((_SERVICE, index, _METHOD, number))
                yield f"*Callers:* {_callers(f'/{self._file.package}.{service.name}/{method.name}')}.\n"
        for index, message in enumerate(self._file.message_type):
            yield from self._message(message, message.name, (_MESSAGE, index))
        for index, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, enum.name, (_ENUM, index))

    def _message(self, message: DescriptorProto, name: str, path: _Path) -> Iterator[str]:
        yield f"### {name}\n"
        yield self._text(path)
        rows = [(field.number, self._field(message, index, path)) for index, field in enumerate(message.field)]
        texts = list(message.reserved_name)
        for index, reserved in enumerate(message.reserved_range):
            # The comment is that of the statement, whose path lacks the index of the range.
            comment = self._cell((*path, _RESERVED)) or self._cell((*path, _RESERVED, index))
            was = f"`{texts[index]}`" if index < len(texts) else ""
            rows.append((reserved.start, (str(reserved.start), was, "reserved", comment)))
        if rows:
            yield table(("no.", "field", "type", "meaning"), (row for _, row in sorted(rows)))
        else:
            yield "No fields.\n"
        for index, nested in enumerate(message.enum_type):
            yield from self._enum(nested, f"{name}.{nested.name}", (*path, _NESTED_ENUM, index))

    def _field(self, message: DescriptorProto, index: int, path: _Path) -> tuple[str, str, str, str]:
        field = message.field[index]
        entries = {f".{self._file.package}.{message.name}.{each.name}": each for each in message.nested_type}
        entry = entries.get(field.type_name)
        if entry is not None and entry.options.map_entry:
            kind = f"map of {self._kind(entry.field[0])} to {self._kind(entry.field[1])}"
        else:
            kind = self._kind(field)
            if field.label == FieldDescriptorProto.LABEL_REPEATED:
                kind = f"repeated {kind}"
            elif field.proto3_optional:
                kind = f"optional {kind}"
            elif field.HasField("oneof_index"):
                kind = f"{kind}, one of *{message.oneof_decl[field.oneof_index].name}*"
        return str(field.number), f"`{field.name}`", kind, self._cell((*path, _FIELD, index))

    def _enum(self, enum: EnumDescriptorProto, name: str, path: _Path) -> Iterator[str]:
        yield f"### {name}\n"
        yield self._text(path)
        yield table(
            ("no.", "value", "meaning"),
            (
                (str(value.number), f"`{value.name}`", self._cell((*path, _VALUE, index)))
                for index, value in enumerate(enum.value)
            ),
        )

    def _kind(self, field: FieldDescriptorProto) -> str:
        return self._type(field.type_name) if field.type_name else _TYPES[field.type]

    def _type(self, full_name: str, before: str = "") -> str:
        name = full_name.removeprefix(f".{self._file.package}.")
        return f"{before}[{name}](#{_anchor(name)})"

    def _cell(self, path: _Path) -> str:
        return _prose(" ".join(self._comments.get(path, "").split()), self.names)

    def _text(self, path: _Path) -> str:
        paragraphs = self._comments.get(path, "").split("\n\n")
        return "".join(f"{_prose(' '.join(each.split()), self.names)}\n\n" for each in paragraphs if each.strip())

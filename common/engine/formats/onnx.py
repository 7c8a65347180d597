"""ONNX files: a Protocol Buffer, described by `onnx.proto`. Only the few fields needed are read."""

import mmap
from pathlib import Path, PurePosixPath

from common.engine.binary import fields
from common.engine.facts import Facts
from common.engine.formats import exporters
from common.errors import ModelError

_PASS_THROUGH = {
    b"DequantizeLinear", b"QuantizeLinear", b"Reshape", b"Squeeze", b"Flatten", b"Identity",
}  # fmt: skip


def read(data: mmap.mmap, path: Path, facts: Facts) -> None:
    properties = dict[str, str]()
    graph: tuple[int, int] | None = None
    for number, start, end in fields(data, 0, len(data)):
        if number == 7:
            graph = start, end
        elif number == 14:  # metadata_props
            key, value = _pair(data, start, end)
            properties[key] = value
    if graph is None:
        raise ModelError(f"{path}: has no graph; expected an ONNX model")
    if _softmax_last(data, *graph):
        facts.say("its graph", activation="none")
    facts.beside = _external(data, path, *graph)
    exporters.properties(properties, facts, path)
    exporters.beside(facts, path)


def _pair(data: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    """A StringStringEntryProto."""
    pair = {key: data[a:b].decode() for key, a, b in fields(data, start, end)}
    return pair.get(1, ""), pair.get(2, "")


def _softmax_last(data: mmap.mmap, start: int, end: int) -> bool:
    """Whether the graph's one output comes from a Softmax or Sigmoid."""
    outputs, producers = list[bytes](), dict[bytes, tuple[bytes, bytes]]()
    for number, a, b in fields(data, start, end):
        if number == 12:  # output: ValueInfoProto, its name is field 1
            outputs += [data[c:d] for key, c, d in fields(data, a, b) if key == 1]
        elif number == 1:  # node: inputs are field 1, outputs 2, op_type 4
            parts = [(key, data[c:d]) for key, c, d in fields(data, a, b) if key in (1, 2, 4)]
            kind = b"".join(text for key, text in parts if key == 4)
            source = next((text for key, text in parts if key == 1), b"")
            producers |= {text: (kind, source) for key, text in parts if key == 2}
    last = producers.pop(outputs[0], None) if len(outputs) == 1 else None
    while last is not None and last[0] in _PASS_THROUGH:
        last = producers.pop(last[1], None)
    return last is not None and last[0] in (b"Softmax", b"Sigmoid")


def _external(data: mmap.mmap, path: Path, start: int, end: int) -> tuple[str, ...]:
    """Files beside it with weights (TensorProto.external_data, field 13, of its initializers)."""
    names = set[str]()
    for number, a, b in fields(data, start, end):
        if number != 5:
            continue
        for key, c, d in fields(data, a, b):
            if key == 13 and (entry := _pair(data, c, d))[0] == "location":
                names.add(entry[1])
    for name in names:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or not name:
            raise ModelError(f"{path}: its weights are in {name!r}; expected a file beside it")
        if not (path.parent / name).is_file():
            raise ModelError(f"{path}: its weights are in {name}, which is not beside it")
    return tuple(sorted(names))

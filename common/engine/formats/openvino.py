"""OpenVINO's intermediate representation: an XML file of the graph, from IR version 10 on, and its
weights in a .bin file beside it.

The XML is read as a stream that keeps no tree. Document types, and so entities, are refused.
"""

import mmap
import re
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import ParseError, XMLParser

import numpy as np

from common.engine.facts import Facts
from common.engine.formats import exporters
from common.engine.preprocess import Tensor
from common.errors import ModelError

_MOST_XML = 32_000_000  # bytes; graphs of a thousand layers have a few hundred thousand
_DEEPEST = 64  # levels
_CHUNK = 1 << 16
_PASS_THROUGH = {"Reshape", "Squeeze", "Convert", "FakeQuantize"}
_TYPES = {
    "f32": "f4", "fp32": "f4", "f16": "f2", "fp16": "f2", "f64": "f8", "u8": "u1", "i8": "i1",
    "i32": "i4", "i64": "i8", "boolean": "?", "bool": "?",
}  # fmt: skip


@dataclass
class _Layer:
    name: str
    kind: str
    data: dict[str, str]
    outputs: list[str] = field(default_factory=list)  # of a Result: names of its tensor
    precision: str = ""
    shape: list[int] = field(default_factory=list)


class _Graph:
    """Target of an XML parser."""

    def __init__(self) -> None:
        self.layers: dict[str, _Layer] = {}
        self.sources: dict[str, str] = {}  # layer -> the one its first port reads
        self.info: dict[str, str] = {}
        self.weights = 0  # bytes that the .bin has at the least
        self._tags: list[str] = []
        self._layer = _Layer("", "", {})
        self._text = ""

    def start(self, tag: str, said: dict[str, str]) -> None:
        self._tags.append(tag)
        depth = len(self._tags)
        if depth > _DEEPEST or (depth == 1 and tag != "net"):
            raise ValueError(f"<{tag}> at level {depth} is none of OpenVINO's")
        if tag == "layer" and depth == 3:
            self._layer = _Layer(said.get("name", ""), said.get("type", ""), {})
            self._layer.outputs = said.get("output_names", "").split(",")
            self.layers[said.get("id", "")] = self._layer
        elif tag == "data":
            if {"element_type", "offset", "size"} <= said.keys():  # a Const's
                self.weights = max(self.weights, int(said["offset"]) + int(said["size"]))
            if depth == 4 and self._layer.kind == "Parameter":
                self._layer.data = said
        elif tag == "port" and depth == 5:
            self._layer.precision = said.get("precision", "") or self._layer.precision
            if self._tags[3] == "output" and self._layer.outputs == [""]:
                self._layer.outputs = said.get("names", "").split(",")
        elif tag == "edge" and depth == 3 and said.get("to-port") == "0":
            self.sources[said.get("to-layer", "")] = said.get("from-layer", "")
        elif self._tags[1:3] == ["rt_info", "model_info"] and depth == 4:
            self.info[tag] = said.get("value", "")
        self._text = ""

    def data(self, text: str) -> None:
        if self._tags[-1] == "dim":
            self._text += text

    def end(self, tag: str) -> None:
        if tag == "dim" and len(self._tags) == 6 and self._layer.kind == "Result":
            self._layer.shape.append(_size(self._text))
        self._tags.pop()

    def tensor(self, layer: _Layer, source: _Layer) -> Tensor:
        """A Parameter's or Result's; `source` says what IR 10 has not at the Result."""
        shape = layer.shape
        if layer.kind == "Parameter":
            shape = [_size(part) for part in layer.data.get("shape", "").split(",") if part]
        kind = (layer.data.get("element_type") or layer.precision or source.precision).lower()
        name = layer.outputs[0] or source.outputs[0] or source.name
        return Tensor(name, tuple(shape), np.dtype(_TYPES.get(kind, "V")))


def _size(text: str) -> int:
    return int(text) if re.fullmatch(r"\s*[0-9]{1,9}\s*", text) else -1


def read(data: mmap.mmap, path: Path, facts: Facts) -> None:
    if len(data) > _MOST_XML:
        raise ModelError(f"{path}: has {len(data)} bytes; expected at most {_MOST_XML}")
    # Expat takes no encoding in which these bytes are others but UTF-16, whose head is another.
    if data.find(b"<!DOCTYPE") >= 0 or data.find(b"<!ENTITY") >= 0:
        raise ModelError(f"{path}: declares a document type; expected an OpenVINO model, without")
    graph = _Graph()
    parser = XMLParser(target=graph)
    try:
        for start in range(0, len(data), _CHUNK):
            parser.feed(data[start : start + _CHUNK])
        parser.close()
    except (ParseError, ValueError) as error:
        raise IndexError(str(error)) from error
    if not graph.layers:
        raise ModelError(f"{path}: has no layers; expected an OpenVINO model")
    facts.beside = _weights(path, graph.weights)
    results = {key: layer for key, layer in graph.layers.items() if layer.kind == "Result"}
    sources = {
        key: graph.layers.get(graph.sources.get(key, ""), layer) for key, layer in results.items()
    }
    facts.inputs = tuple(
        graph.tensor(layer, layer) for layer in graph.layers.values() if layer.kind == "Parameter"
    )
    facts.outputs = tuple(graph.tensor(layer, sources[key]) for key, layer in results.items())
    if len(results) == 1:
        _last(graph, next(iter(results)), facts)
    exporters.beside(facts, path)  # its labels have their spaces still
    exporters.model_info(graph.info, facts, path, "its model_info")


def _last(graph: _Graph, at: str, facts: Facts) -> None:
    """What the one output comes from."""
    at = graph.sources.pop(at, "")
    while at in graph.layers and graph.layers[at].kind in _PASS_THROUGH:
        at = graph.sources.pop(at, "")  # pop: a damaged graph may be a circle
    kind = graph.layers[at].kind if at in graph.layers else ""
    if kind in ("SoftMax", "Softmax", "Sigmoid"):
        facts.say("its graph", activation="none")
    elif kind == "DetectionOutput":
        facts.say(f"its operator {kind}", decoder="detection-output")


def _weights(path: Path, least: int) -> tuple[str, ...]:
    file = path.with_suffix(".bin")
    if not file.is_file():
        if least == 0:
            return ()
        raise ModelError(f"{path}: its weights are missing; expected {file.name} beside it")
    if file.stat().st_size < least:
        raise ModelError(
            f"{file}: is cut short: {file.stat().st_size} bytes; expected at least {least}"
        )
    return (file.name,)

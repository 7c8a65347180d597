"""TFLite files: a FlatBuffer (`TFL3` at byte 4), described by tensorflow's `schema.fbs`; its
metadata by tflite-support's `metadata_schema.fbs`, with label files in a ZIP appended to the file.
Field numbers are those of the schemas.
"""

import mmap
import struct
import zlib
from pathlib import Path

from common.engine.binary import Table
from common.engine.facts import MOST_TEXT, SSD_OPERATOR, SSD_ROLES, Facts, read_labels
from common.engine.formats import exporters
from common.errors import ModelError

_SOFTMAX, _LOGISTIC = 25, 14
_PASS_THROUGH = {22, 43, 6, 114}  # RESHAPE, SQUEEZE, DEQUANTIZE, QUANTIZE: scores stay scores
_AXIS_LABELS, _VALUE_LABELS, _CALIBRATION = 2, 3, 4  # AssociatedFileType
_NORMALISATION, _THRESHOLDING = 1, 3  # ProcessUnitOptions
_MOST_DIRECTORY = 1_000_000  # bytes of a ZIP's table of contents


def read(data: mmap.mmap, path: Path, facts: Facts) -> None:
    model = Table.root(data)
    for buffer in model.tables(4):  # a cut file most often lacks weights
        start, count = buffer.span(0)
        if start + count > len(data):
            raise IndexError(f"weights reach to byte {start + count}")
    codes = [
        (max(code.number(0, "b"), code.number(3, "i")), code.text(1)) for code in model.tables(1)
    ]
    graph = model.tables(2)[0]
    tensors, outputs = graph.tables(0), graph.numbers(2, "i")
    facts.custom_operators = tuple(sorted({name for _, name in codes if name}))
    producers: dict[int, tuple[int, str, list[int], list[int]]] = {}
    for operator in graph.tables(3):
        code, custom = codes[operator.number(0, "I")]
        made = operator.numbers(2, "i")
        for tensor in made:
            producers[tensor] = (code, custom, operator.numbers(1, "i"), made)
        if custom == SSD_OPERATOR and set(made) <= set(outputs):
            roles = zip(made, SSD_ROLES, strict=False)
            facts.roles = {tensors[tensor].text(3): role for tensor, role in roles}
            facts.say(f"its operator {custom}", decoder="ssd")
    if len(outputs) == 1:
        last = producers.pop(outputs[0], None)
        while last is not None and last[0] in _PASS_THROUGH:
            last = producers.pop(last[2][0], None)  # pop: a damaged graph may be a circle
        if last is not None and last[0] in (_SOFTMAX, _LOGISTIC):
            facts.say("its graph", activation="none")
    files = _packed(data, path)
    for name in ("metadata.json", "temp_meta.txt", "meta.txt"):  # Ultralytics, ever older
        if name in files:
            where = f"{name} packed into it"
            exporters.ultralytics(
                exporters.literal(files.pop(name), path, where), facts, path, where
            )
    named = dict[str, str]()  # label file -> locale
    for entry in model.tables(6):
        if entry.text(0) == "TFLITE_METADATA":
            start, count = model.tables(4)[entry.number(1, "I")].span(0)
            named |= _metadata(data[start : start + count], facts)
    _labels(files, named, facts, path)


def _metadata(data: bytes, facts: Facts) -> dict[str, str]:
    """What a TFLITE_METADATA buffer (FlatBuffer, `M001`) says; returns its label files, each with
    its locale.
    """
    where, files = "its TFLite metadata", dict[str, str]()
    for graph in Table.root(data).tables(3):
        inputs, outputs = graph.tables(2), graph.tables(3)
        for tensor in inputs[:1]:
            content = tensor.table(3)
            if content is not None and content.number(0, "B") == 2:  # ImageProperties
                image = content.table(1)
                space = image.number(0, "b") if image is not None else 0
                colour = "rgb" if space == 1 else "grey" if space == 2 else None
                # The Task Library, whose format this is, resizes the whole picture.
                facts.say(where, colour=colour, resize="stretch")
            for unit in tensor.tables(4):
                options = unit.table(1)
                if unit.number(0, "B") == _NORMALISATION and options is not None:
                    facts.say(where, mean=options.floats(0), scale=options.floats(1))
        kinds = set[int]()
        for tensor in outputs:
            for file in tensor.tables(6):
                kinds.add(kind := file.number(2, "b"))
                if kind in (_AXIS_LABELS, _VALUE_LABELS):
                    files[file.text(0)] = file.text(3)
            for unit in tensor.tables(4):
                options = unit.table(1)
                if unit.number(0, "B") == _THRESHOLDING and options is not None:
                    facts.say(where, score=options.real(0))
        if _CALIBRATION in kinds:
            facts.notes.append(f"{where} calibrates scores: not applied")
        if len(outputs) == 1 and _AXIS_LABELS in kinds:  # a label for each element, so: classes
            facts.say(where, decoder="classification")
    return files


def _labels(files: dict[str, str], named: dict[str, str], facts: Facts, path: Path) -> None:
    """Labels of the one label file without a locale, or of the only one."""
    found = {name: locale for name, locale in named.items() if name in files} or {
        name: "" for name in files if name.endswith(".txt")
    }
    neutral = [name for name, locale in found.items() if not locale] or list(found)
    if len(neutral) == 1 and "labels" not in facts.said:
        labels = read_labels(files[neutral[0]], f"{path}:{neutral[0]}")
        facts.say(f"{neutral[0]} packed into it", labels=labels)
    elif len(neutral) > 1:
        facts.notes.append(f"several files of labels are packed into it: {', '.join(neutral)}")


def _packed(data: mmap.mmap, path: Path) -> dict[str, str]:
    """Texts in the ZIP appended to `path`, by name. Declared sizes are not believed."""
    end = data.rfind(b"PK\5\6", max(0, len(data) - (1 << 16) - 22))
    if end < 0 or data[end + 20 : end + 22] != (len(data) - end - 22).to_bytes(2, "little"):
        return {}  # no ZIP, or bytes of weights that look like its end
    import zipfile  # here: most models have none, and it takes 0.7 MB

    if struct.unpack_from("<I", data, end + 12)[0] > _MOST_DIRECTORY:
        raise ModelError(f"{path}: more files are packed into it than can be")
    texts, left = dict[str, str](), MOST_TEXT
    try:
        with zipfile.ZipFile(path) as packed:
            for info in packed.infolist():
                if not info.filename.endswith((".txt", ".json")):
                    continue
                left -= info.file_size
                if left < 0 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ModelError(
                        f"{path}: {info.filename} packed into it is larger than {MOST_TEXT} bytes, "
                        "or compressed otherwise than by deflate"
                    )
                with packed.open(info) as file:  # never more than was asked for, unlike read()
                    texts[info.filename] = file.read(info.file_size).decode()
    except (
        zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError,
        struct.error,
    ) as error:  # fmt: skip
        raise ModelError(f"{path}: the label files packed into it are damaged: {error}") from error
    return texts

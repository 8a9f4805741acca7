"""Folds an int8 ONNX model with block-wise DequantizeLinear weights into plain fp32 constants.

    python3 fold_onnx.py model_int8.onnx model_fp32.onnx

ONNX Runtime rejects block-wise int8 weights in the two models that come this way. Every DequantizeLinear, and every Reshape
of its result, has constant inputs only: it is computed here and replaced by an fp32 initializer. An int8 value times an
fp32 scale is exact in a Python float and rounded to fp32 once, as fp32 arithmetic would. Graph inputs that only name weights
go too: what is left is what a caller has to feed.

The protobuf wire format is read and written directly (field numbers from onnx.proto3): no package is needed, and the same
input gives the same bytes everywhere.
"""

import math
import sys
from array import array

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_VALUE_INFO = 1, 5, 11, 13
VALUE_NAME = 1
NODE_INPUT, NODE_OUTPUT, NODE_TYPE, NODE_ATTRIBUTE = 1, 2, 4, 5
ATTRIBUTE_NAME, ATTRIBUTE_INT = 1, 3
TENSOR_DIMS, TENSOR_TYPE, TENSOR_FLOATS, TENSOR_NAME, TENSOR_RAW = 1, 2, 4, 8, 9
FLOAT, INT8, INT64 = 1, 3, 7
ARRAY_CODE = {FLOAT: "f", INT8: "b", INT64: "q"}


def read_varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def write_varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_fields(data):
    """The fields of one message, in file order: (number, wire type, value)."""
    at, fields = 0, []
    while at < len(data):
        key, at = read_varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = read_varint(data, at)
        else:
            if wire == BYTES:
                size, at = read_varint(data, at)
            elif wire in (FIXED32, FIXED64):
                size = 4 if wire == FIXED32 else 8
            else:
                raise ValueError(f"wire type {wire} at byte {at}: not an ONNX file")
            if at + size > len(data):
                raise ValueError(f"a field runs past the end at byte {at}: the file is cut off")
            value, at = data[at : at + size], at + size
        fields.append((number, wire, value))
    return fields


def write_fields(fields):
    parts = []
    for number, wire, value in fields:
        parts.append(write_varint(number << 3 | wire))
        if wire == VARINT:
            parts.append(write_varint(value))
            continue
        if wire == BYTES:
            parts.append(write_varint(len(value)))
        parts.append(value)
    return b"".join(parts)


def values(fields, number):
    return [value for field, _, value in fields if field == number]


def text(fields, number):
    return "".join(value.decode() for value in values(fields, number)[:1])


class Tensor:
    """A constant: its shape, its type, its numbers as a flat array."""

    def __init__(self, dims, kind, numbers):
        self.dims, self.kind, self.numbers = dims, kind, numbers

    @classmethod
    def parse(cls, message):
        fields = read_fields(message)
        name = text(fields, TENSOR_NAME)
        dims = []
        for _, wire, value in (field for field in fields if field[0] == TENSOR_DIMS):
            if wire == VARINT:
                dims.append(value)
                continue
            at = 0
            while at < len(value):
                dim, at = read_varint(value, at)
                dims.append(dim)
        kind = values(fields, TENSOR_TYPE)[0]
        if kind not in ARRAY_CODE:
            raise ValueError(f"initializer {name} has the type {kind}: only float, int8 and int64 are known")
        raw = b"".join(values(fields, TENSOR_RAW) or values(fields, TENSOR_FLOATS))
        numbers = array(ARRAY_CODE[kind], raw)
        if len(numbers) != math.prod(dims):
            raise ValueError(f"initializer {name} holds {len(numbers)} numbers, its shape says {dims}")
        return cls(dims, kind, numbers)

    def message(self, name):
        fields = [(TENSOR_DIMS, VARINT, dim) for dim in self.dims]
        fields.append((TENSOR_TYPE, VARINT, self.kind))
        fields.append((TENSOR_NAME, BYTES, name.encode()))
        fields.append((TENSOR_RAW, BYTES, self.numbers.tobytes()))
        return write_fields(fields)


def dequantize(attributes, quantized, scale, zero):
    """y = (q - zero) * scale, one scale per block of `block_size` along the last axis."""
    axis, block = attributes["axis"], attributes["block_size"]
    if axis != len(quantized.dims) - 1:
        raise ValueError(f"blocks along axis {axis} of {quantized.dims}: only the last axis is known")
    length = quantized.dims[-1]
    if scale.dims != quantized.dims[:-1] + [-(-length // block)]:
        raise ValueError(f"scales {scale.dims} do not fit {quantized.dims} in blocks of {block}")
    out, index = array("f"), 0
    for row in range(0, len(quantized.numbers), length):
        for start in range(row, row + length, block):
            s, z = scale.numbers[index], zero.numbers[index]
            out.extend([(q - z) * s for q in quantized.numbers[start : min(start + block, row + length)]])
            index += 1
    return Tensor(quantized.dims, FLOAT, out)


def reshape(tensor, shape):
    dims = [tensor.dims[at] if dim == 0 else dim for at, dim in enumerate(shape.numbers)]
    if -1 in dims:
        known = math.prod(dim for dim in dims if dim != -1)
        dims[dims.index(-1)] = len(tensor.numbers) // known
    return Tensor(dims, tensor.kind, tensor.numbers)


def fold_nodes(graph, messages):
    """The nodes that stay, as (message, inputs), and the constants that the others came to."""
    folded, nodes = {}, []
    for message in values(graph, GRAPH_NODE):
        node = read_fields(message)
        inputs = [name.decode() for name in values(node, NODE_INPUT)]
        kind = text(node, NODE_TYPE)
        constant = all(name in messages or name in folded for name in inputs)
        if not constant or kind not in ("DequantizeLinear", "Reshape"):
            nodes.append((message, inputs))
            continue
        tensors = [folded[name] if name in folded else Tensor.parse(messages[name]) for name in inputs]
        attributes = {}
        for fields in map(read_fields, values(node, NODE_ATTRIBUTE)):
            attributes[text(fields, ATTRIBUTE_NAME)] = sum(values(fields, ATTRIBUTE_INT))
        result = dequantize(attributes, *tensors) if kind == "DequantizeLinear" else reshape(*tensors)
        folded[text(node, NODE_OUTPUT)] = result
    return nodes, folded


def fold(model):
    """The model's bytes with its int8 weights as fp32 constants."""
    model_fields = read_fields(model)
    graph = read_fields(values(model_fields, MODEL_GRAPH)[0])
    messages = {text(read_fields(message), TENSOR_NAME): message for message in values(graph, GRAPH_INITIALIZER)}
    nodes, folded = fold_nodes(graph, messages)

    used = {name for _, inputs in nodes for name in inputs}
    constants = {name: message for name, message in messages.items() if name in used}
    constants.update((name, tensor.message(name)) for name, tensor in folded.items() if name in used)
    new_graph = [(GRAPH_NODE, BYTES, message) for message, _ in nodes]
    new_graph += [(GRAPH_INITIALIZER, BYTES, message) for message in constants.values()]
    for number, wire, value in graph:
        if number in (GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_VALUE_INFO):
            continue
        if number == GRAPH_INPUT and text(read_fields(value), VALUE_NAME) not in used - constants.keys():
            continue
        new_graph.append((number, wire, value))
    replaced = write_fields(new_graph)
    return write_fields([(n, wire, replaced if n == MODEL_GRAPH else value) for n, wire, value in model_fields])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1], "rb") as source:
        result = fold(source.read())
    with open(sys.argv[2], "wb") as target:
        target.write(result)

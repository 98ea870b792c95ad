"""Readable names for a .tflite file's operators, from the names that TensorFlow's converter gives to tensors."""

from __future__ import annotations

import re

from tinyfleet.firmware_tools.readers.tflite_file import Operator

_CALLS = re.compile(r"^(Stateful)?PartitionedCall(_\d+)?(:\d+)?(_int8)?$")
#: What TensorFlow and its converter put behind a layer's name, or give to what has none.
_NO_LAYER = re.compile(
    r"^(Identity|BiasAdd|ReadVariableOp|resource|read|MatMul|Conv2D|convolution|depthwise|Relu6?|Softmax|Sigmoid|Tanh|LeakyRelu"
    r"|add|Add|AddV2|mul|Mul|AvgPool|MaxPool(2d)?|Mean|Pad|PadV2|Reshape|Squeeze|ExpandDims|concat|FusedBatchNormV3|batchnorm"
    r"|transpose|kernel|bias|strided_slice|unknown|tfl\..*|std\..*|arith\..*|)(_\d+|\d+)?(:\d+)?(_int8|_bias)?$"
)
_OF_WEIGHTS = re.compile(r"_(weights|kernel|bias)$")
_ADD = re.compile(r"^add(_\d+)?$")  # Keras names layers so
_ODD = re.compile(r"[^\w.:+-]", re.ASCII)
_MINOR = re.compile(r"^(activation|re_lu|batch_normalization)(_\d+)?$")
#: The TensorFlow operations that an operator with weights is made of.
_MADE_OF = {"FULLY_CONNECTED": r"/MatMul", "CONV_2D": r"/(Conv2D|convolution)", "DEPTHWISE_CONV_2D": r"/depthwise"}
_PLAIN = {"FULLY_CONNECTED": "dense", "CONV_2D": "conv2d", "DEPTHWISE_CONV_2D": "depthwise_conv2d"}


def _layer_of(path: str) -> str | None:
    """The layer in a name like "model/dense/MatMul"; None if it tells of none."""
    parts = [part for part in path.split("/") if not _CALLS.match(part)]
    if len(parts) > 1 and _NO_LAYER.match(parts[-1]):
        parts.pop()
    while len(parts) > 1 and _NO_LAYER.match(parts[-1]) and not _ADD.match(parts[-1]):
        parts.pop()
    if not parts or (len(parts) == 1 and _NO_LAYER.match(parts[0])):
        return None
    return _ODD.sub("_", _OF_WEIGHTS.sub("", parts[-1]))[:64]


def layer_name(operator: Operator) -> str:
    """A readable name for the layer that an operator is: its weights' tell most surely."""
    word = _MADE_OF.get(operator.kind)
    tensors = (*operator.inputs[1:2], operator.output, *operator.inputs[2:3]) if word else (operator.output,)
    paths = [path for tensor in tensors if tensor is not None for path in tensor.name.split(";")]
    paths.sort(key=lambda path: not word or not re.search(word, path))
    found = [layer for path in paths if (layer := _layer_of(path))]
    major = [layer for layer in found if not _MINOR.match(layer)]
    return next(iter(major or found), _PLAIN.get(operator.kind, operator.kind.lower()))

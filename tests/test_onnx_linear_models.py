"""Operators of ai.onnx.ml, against onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import specqd
from specqd.errors import CaptureError

COEFFICIENTS = [0.5, -1.0, 2.0, 0.25, -0.5, 1.0, 0.0, -2.0, 1.5]
X = np.array([[1, 2, -3], [0, 0, 0], [0.5, -0.25, 8], [-4, -1, -2]], np.float32)
CLASSES = {"coefficients": COEFFICIENTS, "intercepts": [0.1, -0.2, 0.3], "classlabels_ints": [7, -2, 30]}


def _model(path, op, outputs, **attributes):
    node = helper.make_node(op, ["x"], [name for name, _ in outputs], domain="ai.onnx.ml", **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(
        helper.make_graph([node], "g", [x], results), opset_imports=opsets, ir_version=10
    )
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Scaler", {"offset": [1.0, 2.0, -3.0], "scale": [0.5, 2.0, -1.0]}),
        ("Normalizer", {"norm": "L1"}),
        ("Normalizer", {"norm": "L2"}),
        ("LinearRegressor", {"coefficients": COEFFICIENTS[:6], "intercepts": [0.5, -0.5], "targets": 2}),
        ("LinearRegressor", {"coefficients": COEFFICIENTS[:3]}),
        ("LinearClassifier", CLASSES),
        ("LinearClassifier", CLASSES | {"post_transform": "SOFTMAX", "multi_class": 1}),
        ("LinearClassifier", CLASSES | {"post_transform": "LOGISTIC"}),
    ],
)
def test_models_give_what_onnxruntime_gives(tmp_path, op, attributes):
    scores = [("y", TensorProto.FLOAT)]
    outputs = [("label", TensorProto.INT64), *scores] if op == "LinearClassifier" else scores
    path = _model(tmp_path / "m.onnx", op, outputs, **attributes)
    wanted = onnxruntime.InferenceSession(path).run(None, {"x": X})
    program = specqd.capture(path)
    found = program.module()(torch.from_numpy(X))
    for a, b in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
        torch.testing.assert_close(a, torch.from_numpy(b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({**CLASSES, "classlabels_ints": [1, 2]}, "9 coefficients are not those of 2 planes in 3 dimensions"),
        ({**CLASSES, "post_transform": "PROBIT"}, "post_transform PROBIT is not compiled"),
        ({"coefficients": COEFFICIENTS, "classlabels_strings": ["a", "b", "c"]}, "labels that are strings"),
    ],
)
def test_what_is_not_compiled_is_refused(tmp_path, attributes, why):
    outputs = [("label", TensorProto.INT64), ("y", TensorProto.FLOAT)]
    with pytest.raises(CaptureError, match=why):
        specqd.capture(_model(tmp_path / "m.onnx", "LinearClassifier", outputs, **attributes))

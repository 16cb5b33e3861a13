"""The clean-up of exported graphs, on graphs small enough to write down."""

import pytest
import torch
from torch import Tensor, fx, nn

from specqd.errors import CaptureError
from specqd.frontends.normalise import normalise

aten = torch.ops.aten
X = torch.arange(12.0).reshape(3, 4)


class Model(nn.Module):
    def __init__(self, body: object) -> None:
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(torch.ones(4))
        self.number = nn.Buffer(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def cleaned(body: object) -> fx.Graph:
    rows = torch.export.Dim("S")
    exported = torch.export.export(Model(body), (X,), dynamic_shapes=({0: rows},), strict=False)
    names = {s.arg.name: s.target for s in exported.graph_signature.input_specs if s.target}
    return normalise(exported.graph_module, names, {"number": 3.0})


def operators(graph: fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def no_grad_and_autocast(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x + model.weight
    with torch.autocast("cpu", enabled=False):
        return y.relu()


def memory_only(model: Model, x: Tensor) -> Tensor:
    y = x.to(torch.float32).contiguous().detach().clone()[:, :]
    return nn.functional.dropout(y, training=False).reshape(x.shape).expand(x.shape) * 1.0 + model.weight


def converted(model: Model, x: Tensor) -> Tensor:
    return x.to("cpu", torch.int64) + 1


def viewed(model: Model, x: Tensor) -> Tensor:
    return x.view(-1)


def with_numbers(model: Model, x: Tensor) -> Tensor:
    return model.number * x - model.number


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (no_grad_and_autocast, [aten.add.Tensor, aten.relu.default]),
        (memory_only, [aten.add.Tensor]),
        (converted, [aten.to.dtype, aten.add.Tensor]),
        (viewed, [aten.reshape.default]),
        (with_numbers, [aten.mul.Tensor, aten.sub.Tensor]),
    ],
)
def test_what_is_left(body: object, expected: list[object]) -> None:
    assert operators(cleaned(body)) == expected


def test_numbers_are_written_as_right_operands() -> None:
    mul, sub = (n for n in cleaned(with_numbers).nodes if n.op == "call_function")
    assert mul.args[1] == sub.args[1] == 3.0
    assert not cleaned(with_numbers).find_nodes(op="get_attr")


def test_the_values_are_those_of_the_module() -> None:
    for body in (no_grad_and_autocast, memory_only, converted, viewed, with_numbers):
        model = Model(body)
        module = fx.GraphModule(model, cleaned(body))
        torch.testing.assert_close(module(X), model(X), rtol=0, atol=0)


def test_changes_in_place_are_refused_with_their_place() -> None:
    where = r"model \(Model\): return self\.body\(self, x\)"
    with pytest.raises(CaptureError, match=f"{where}: aten.relu_.default changes a tensor in place"):
        cleaned(lambda model, x: (x + 1).relu_())


def test_control_flow_is_refused_by_name() -> None:
    def branching(model: Model, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    with pytest.raises(CaptureError, match="the control flow cond cannot be compiled"):
        cleaned(branching)

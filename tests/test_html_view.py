"""The page of `specqd rewrite --html`: what it marks, how it folds, and that it needs nothing else."""

import re
from html.parser import HTMLParser

import pytest
import torch
from small_modules import of
from torch import nn

import specqd
from specqd.cli import main
from specqd.html_view import Stages
from specqd.passes import Applied, Pipeline, Result, Step
from specqd.passes.subexpressions import CommonSubexpressions
from specqd.saving import save_exported


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        y = self.blocks[1](self.blocks[0](x))
        return y, torch.exp(x), torch.exp(x)


def program():
    return specqd.capture(Net(), (torch.zeros(1, 3, 5, 5),))


class Tags(HTMLParser):
    """Checks that elements close in order, and keeps classes, titles and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.classes, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.classes += [given["class"]] if "class" in given else []
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        self.open += [tag] if tag not in ("input", "meta") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_what_was_taken_made_and_refused_is_marked():
    stages = Stages()
    Pipeline.parse("fold-batch-norm, common-subexpressions")(program(), stages)
    page = stages.page("a <title>")
    tags = Tags(page)
    assert tags.open == [] and tags.addresses == [] and "http" not in page
    assert "<h1>a &lt;title&gt;</h1>" in page
    first, second = page.split("<section>")[1:]
    assert re.findall(r'<code class="gone">(batch_norm\w*) =', first) == ["batch_norm", "batch_norm_1"]
    assert "fold-batch-norm on target: 2 rewrites, 0 nodes refused" in first
    assert "the graph stays as it was" in second
    assert "it and exp, which is the same, are both outputs" in second


def test_a_refused_node_is_marked_where_it_stands():
    stages = Stages()
    Pipeline.parse("common-subexpressions")(
        of(lambda m, x: (x.exp() * x.exp(), x.neg(), x.neg()), torch.ones(2)), stages
    )
    page = stages.page("net")
    assert re.findall(r'<code class="refused" title="([^"]*)">(\w+) =', page) == [
        ("it and neg, which is the same, are both outputs", "neg_1")
    ]


def test_a_call_with_another_number_is_marked():
    """A step that only changes an argument in place keeps the node's name."""
    program = of(lambda m, x: x.sum(0), torch.ones(2, 2))
    changed = program.copy()
    (node,) = (n for n in changed.target.graph.nodes if n.op == "call_function")
    node.args = (node.args[0], [1])
    stages = Stages()
    stages(Applied(0, Step(CommonSubexpressions()), program, Result(changed, "target", (node.name,)), 0.0))
    page = stages.page("net")
    assert "the graph stays as it was" not in page
    assert re.findall(r'<code class="(\w+)">sum_1 = sum\(\w+, \[(\d)\]\)', page) == [
        ("gone", "0"),
        ("new", "1"),
    ]


def test_nodes_fold_by_module_and_what_changed_is_open():
    stages = Stages()
    Pipeline.parse("fold-batch-norm")(program(), stages)
    page = stages.page("net")
    assert page.count("<details open><summary>norm") == 4  # of two blocks, before and after
    assert re.search(r"<summary>blocks .*?<summary>0 .*?<summary>conv ", page, re.DOTALL)


def test_the_command_line_writes_it(tmp_path, capsys):
    save_exported(program(), tmp_path / "net.pt2")
    with pytest.raises(SystemExit) as end:
        main(["rewrite", str(tmp_path / "net.pt2"), "fold-batch-norm", "--html", str(tmp_path / "net.html")])
    assert not end.value.code
    assert "<h1>net.pt2: fold-batch-norm</h1>" in (tmp_path / "net.html").read_text()

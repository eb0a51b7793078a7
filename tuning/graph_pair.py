# SPDX-License-Identifier: Apache-2.0
"""A function and its way back as two ONNX graphs: the second starts from what the first kept.

Forward and backward are traced together and then parted: what does not wait for the gradient is the
way there. Values of it that the way back reads are outputs of the first graph and inputs of the
second, but for those that come of frozen weights alone or are another view of a value, which cost
less to make again than to keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import fx

from tuning.graphs import FROZEN, Function, Named, exported_graph, traced

if TYPE_CHECKING:
    import onnx_ir

KEPT: Final = "kept/"
_aten = torch.ops.aten
_VIEWS: Final = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.t.default,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.clone.default,
    _aten.detach.default,
    _aten.alias.default,
}


def compile_pair(
    function: Function,
    inputs: Named,
    gradients: Named,
    *,
    there: Sequence[str],
    back: Sequence[str],
) -> tuple[onnx_ir.Model, onnx_ir.Model]:
    """Two models of `function`, which takes `inputs` and `gradients` and gives `there` and `back`.

    The first takes inputs and gives `there` and kept values, named "kept/0" and so on; the second
    takes kept values, gradients and the inputs that it reads, and gives `back`. Shapes are those of
    the examples. Frozen weights, named "frozen/...", are inputs of both where they have an effect.

    Raises:
        CompileError: an operation has no plain ONNX form.
    """
    examples = {**inputs, **gradients}

    def flat(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        answer = function(dict(zip(examples, tensors, strict=True)))
        return tuple(answer[name] for name in (*there, *back))

    module = traced(flat, tuple(examples.values()))
    assert isinstance(module, fx.GraphModule)
    nodes = list(module.graph.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    named = dict(zip(places, examples, strict=True))
    (answers,) = next(node for node in nodes if node.op == "output").args
    ends = dict(zip((*there, *back), answers, strict=True))

    late = _after(nodes, {node for node, name in named.items() if name in gradients})
    fixed = _of_weights(nodes, {node for node, name in named.items() if name.startswith(FROZEN)})
    kept = _kept([ends[name] for name in back], late, fixed)
    keeps = {f"{KEPT}{number}": node for number, node in enumerate(kept)}

    first, reads = _part(module, {name: ends[name] for name in there} | keeps, named)
    second, rereads = _part(
        module,
        {name: ends[name] for name in back},
        named | {node: name for name, node in keeps.items()},
    )
    examples |= {name: torch.empty_like(node.meta["val"]) for name, node in keeps.items()}
    return (
        exported_graph(first, {name: examples[name] for name in reads}, (*there, *keeps)),
        exported_graph(second, {name: examples[name] for name in rereads}, back),
    )


def _after(nodes: Sequence[fx.Node], starts: set[fx.Node]) -> set[fx.Node]:
    """Starts, and what takes something that comes of them."""
    found = set(starts)
    for node in nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _of_weights(nodes: Sequence[fx.Node], weights: set[fx.Node]) -> set[fx.Node]:
    """Weights, constants, and what comes of nothing else."""
    found = set(weights)
    for node in nodes:
        if node.op in ("call_function", "get_attr") and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _kept(wanted: Sequence[fx.Node], late: set[fx.Node], fixed: set[fx.Node]) -> list[fx.Node]:
    """Values of the way there that the way back cannot do without, in order of their making."""
    kept, seen, open_ = set(), set(wanted), list(wanted)
    while open_:
        node = open_.pop()
        if node.op == "placeholder" or node in fixed:
            continue
        if node not in late and node.target not in _VIEWS:
            kept.add(node)
            continue
        before = set(node.all_input_nodes) - seen
        seen |= before
        open_ += before
    return sorted(kept)


def _part(
    module: fx.GraphModule, ends: Mapping[str, fx.Node], starts: Mapping[fx.Node, str]
) -> tuple[fx.GraphModule, list[str]]:
    """What lies between starts and ends, and the names of the starts that it takes, in order."""
    needed, open_ = set(ends.values()), list(ends.values())
    while open_:
        node = open_.pop()
        before = set() if node in starts else set(node.all_input_nodes) - needed
        needed |= before
        open_ += before
    graph = fx.Graph()
    made = {node: graph.placeholder(f"p{i}") for i, node in enumerate(starts) if node in needed}
    for node in module.graph.nodes:
        if node in needed and node not in made:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in ends.values()))
    return fx.GraphModule(module, graph), [starts[node] for node in made if node in starts]

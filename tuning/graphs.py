# SPDX-License-Identifier: Apache-2.0
"""From a function of named tensors to a plain ONNX graph whose weights lie in safetensors files.

A function with gradients inside is first traced to single operations (`make_fx`), which leaves no
autograd behind; the result, or a plain forward function as it is, goes through torch's exporter.
Frozen weights enter as inputs and are then turned into references to the file that holds them, so
that every graph of a bundle shares one copy.
"""

from __future__ import annotations

import json
import logging
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tuning.errors import CompileError

if TYPE_CHECKING:
    import onnx_ir

Named = Mapping[str, torch.Tensor]
Function = Callable[[dict[str, torch.Tensor]], Named]

FROZEN = "frozen/"
_IR_TYPES = {"F32": "FLOAT", "F16": "FLOAT16", "I64": "INT64", "I32": "INT32", "BOOL": "BOOL"}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor's bytes are: a safetensors file beside the graph, offset and length."""

    file: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file with the place of its bytes."""
    with path.open("rb") as file:
        (header_length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_length))
    start = 8 + header_length
    return {
        name: Stored(
            file=path.name,
            offset=start + entry["data_offsets"][0],
            length=entry["data_offsets"][1] - entry["data_offsets"][0],
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def compile_graph(
    function: Function,
    inputs: Named,
    outputs: Sequence[str],
    *,
    has_gradients: bool,
    any_batch: Sequence[str] = (),
) -> onnx_ir.Model:
    """An ONNX model of `function`, with the names of `inputs` and `outputs` on its ports.

    `inputs` are examples: their shapes and types are fixed in the graph, but for the first axis of
    those in `any_batch`. Inputs that have no effect are dropped where they are frozen weights.

    Raises:
        CompileError: an operation has no plain ONNX form.
    """
    names = list(inputs)
    examples = tuple(inputs.values())

    def flat(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        answer = function(dict(zip(names, tensors, strict=True)))
        return tuple(answer[name] for name in outputs)

    module = traced(flat, examples) if has_gradients else _Wrapped(flat)
    return exported_graph(module, inputs, outputs, any_batch=any_batch)


def traced(
    function: Callable[..., Any], examples: tuple[torch.Tensor, ...]
) -> torch.fx.GraphModule:
    """The single operations of a function of tensors, of the examples' shapes.

    Raises:
        CompileError: an operation cannot be traced.
    """
    from torch._decomp import core_aten_decompositions, get_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    table = core_aten_decompositions()
    aten = torch.ops.aten
    table = {
        **table,
        **get_decompositions(
            [aten.silu_backward, aten.empty_permuted, aten.embedding_dense_backward]
        ),
        aten.threshold_backward.default: _threshold_backward,
    }
    trace = make_fx(
        function, tracing_mode="fake", decomposition_table=table, _allow_non_fake_inputs=True
    )
    with _as_compile_errors():
        return trace(*examples).eval()


def exported_graph(
    module: nn.Module, inputs: Named, outputs: Sequence[str], *, any_batch: Sequence[str] = ()
) -> onnx_ir.Model:
    """An ONNX model of a module that takes the inputs in their order; as `compile_graph`.

    Raises:
        CompileError: an operation has no plain ONNX form.
    """
    names = list(inputs)
    dynamic = None
    if any_batch:
        batch = torch.export.Dim("batch", min=1, max=65_536)
        dynamic = (tuple({0: batch} if name in any_batch else None for name in names),)
    with _as_compile_errors():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            optimize=False,
            verbose=False,
            dynamic_shapes=dynamic,
        )
        if program is None:
            raise CompileError("the exporter gave no graph")
        _simplify(program.model)
    model = program.model
    graph = model.graph
    if len(graph.inputs) != len(names) or len(graph.outputs) != len(outputs):
        raise CompileError(
            f"expected a graph of {len(names)} inputs and {len(outputs)} outputs, the exporter "
            f"gave {len(graph.inputs)} and {len(graph.outputs)}"
        )
    _name_ports(graph, names, outputs)
    for value in [v for v in graph.inputs if v.name.startswith(FROZEN) and not v.uses()]:
        graph.inputs.remove(value)
    _forget_origin(model)
    return model


def frozen_inputs(model: onnx_ir.Model) -> list[str]:
    """Names of the frozen weights that a model reads, without their prefix."""
    return [
        value.name.removeprefix(FROZEN)
        for value in model.graph.inputs
        if value.name.startswith(FROZEN)
    ]


def refer_to_weights(model: onnx_ir.Model, places: Mapping[str, Stored]) -> None:
    """Turn the model's frozen inputs into initializers that lie in `places`."""
    import onnx_ir as ir

    graph = model.graph
    for value in [v for v in graph.inputs if v.name.startswith(FROZEN)]:
        place = places[value.name.removeprefix(FROZEN)]
        graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor(
            location=place.file,
            offset=place.offset,
            length=place.length,
            dtype=ir.DataType[_IR_TYPES[place.dtype]],
            shape=ir.Shape(place.shape),
            name=value.name,
        )
        graph.register_initializer(value)


def save_model(model: onnx_ir.Model, path: Path) -> None:
    """Write the graph; tensors that lie in other files stay there."""
    import onnx_ir as ir

    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


class _Wrapped(nn.Module):
    """The exporter takes modules."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def _threshold_backward(
    gradient: torch.Tensor, answer: torch.Tensor, threshold: float
) -> torch.Tensor:
    """ReLU's gradient as a product: onnxruntime selects by a mask much slower than it multiplies.

    An infinite gradient becomes NaN where ReLU is off; training has failed by then either way.
    """
    return gradient * (answer > threshold).to(gradient.dtype)


def _simplify(model: onnx_ir.Model) -> None:
    """Fold small constants and rewrite to fewer nodes, once: onnxruntime does the rest on loading.

    A second pass and shape inference, the exporter's own habit, take as long as the tracing of a
    cohort and were not seen to make a step faster.
    """
    from onnxscript.optimizer import optimize_ir

    optimize_ir(model, num_iterations=1, onnx_shape_inference=False)


def _name_ports(graph: onnx_ir.Graph, names: Sequence[str], outputs: Sequence[str]) -> None:
    import onnx_ir as ir

    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    for index, name in enumerate(outputs):
        value = graph.outputs[index]
        if value.is_graph_input() or value.is_initializer() or value in graph.outputs[:index]:
            # An output that is an input, or another output, needs a node of its own to be named.
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            value = copy.outputs[0]
            graph.outputs[index] = value
        value.name = name


def _forget_origin(model: onnx_ir.Model) -> None:
    """Drop stack traces and file names: a graph depends on its content alone."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = None
    model.graph.doc_string = None
    model.graph.name = "fedloom"
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _as_compile_errors() -> Iterator[None]:
    """What torch and its exporter raise, as an error that says what it is about."""
    with _quiet():
        try:
            yield
        except (torch.onnx.OnnxExporterError, RuntimeError) as fault:
            raise CompileError(
                f"the step cannot be written as a plain ONNX graph: {_summary(fault)}"
            ) from fault


def _summary(fault: BaseException) -> str:
    cause = fault.__cause__ or fault
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its own progress and its optimizer's guesses; neither is the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

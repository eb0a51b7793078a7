# SPDX-License-Identifier: Apache-2.0
"""Errors of `tuning`.

TuningError
├── BackboneError    a model folder that is missing, broken or of a kind that cannot be tuned
├── MethodError      a method's name or settings, or a method that does not fit the backbone
└── CompileError     a step that cannot be written as a plain ONNX graph
"""

from __future__ import annotations


class TuningError(ValueError):
    """Base of every error that this package raises on purpose."""


class BackboneError(TuningError):
    """A backbone cannot be loaded, or does not fit the data."""


class MethodError(TuningError):
    """A method does not exist, its settings are wrong, or it does not fit the backbone."""


class CompileError(TuningError):
    """A training step cannot be compiled to a plain ONNX graph."""

# SPDX-License-Identifier: Apache-2.0
"""What is trained, written once in torch: backbones, methods, the training step and its compiler.

`backbones/` loads a pre-trained transformer, `methods/` attach the tensors that a job trains (one
file a method), `step.py` states the training step as a pure function, and `compiler.py` turns that
step into plain ONNX graphs, which a device runs without torch. This is the only package that the
library needs torch for; importing it does not import torch until a function is called.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from protocol import (
    FileEntry,
    Manifest,
    ManifestError,
    ParamSpec,
    Preprocessing,
    TensorSpec,
    TrainingSpec,
)
from protocol.limits import MAX_MANIFEST_BYTES

ENTRY = FileEntry("ab" * 32, 12)
MANIFEST = Manifest(
    job="5c" * 32,
    backbone="vit-small-28",
    method="lora",
    task="classification",
    class_names=("null", "één"),
    trainable=ParamSpec.of({"a": np.zeros((2, 3), "f4")}),
    state=ParamSpec.of({"a.momentum": np.zeros((2, 3), "f4"), "step": np.zeros((), "i8")}),
    inputs=(("pixel_values", TensorSpec((1, 28, 28), "float32")),),
    preprocessing=Preprocessing(kind="image", size=28, channels=1, mean=(0.5,), std=(0.5,)),
    training=TrainingSpec(batch_size=8, optimizer="sgd", learning_rate=0.1, momentum=0.9),
    graphs={"train": "train.onnx", "predict": "graphs/predict.onnx"},
    files={"train.onnx": ENTRY, "graphs/predict.onnx": ENTRY, "initial.safetensors": ENTRY},
)


def edited(**changes) -> bytes:
    value = json.loads(MANIFEST.to_json()) | changes
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_from_json_gives_back_the_manifest_from_its_canonical_bytes():
    raw = MANIFEST.to_json()
    assert Manifest.from_json(raw) == MANIFEST
    assert raw == edited()
    assert b" " not in raw
    assert raw.isascii()


def test_equal_manifests_have_equal_bytes_whatever_the_order_of_their_mappings():
    reordered = dataclasses.replace(
        MANIFEST,
        files=dict(reversed(MANIFEST.files.items())),
        graphs=dict(reversed(MANIFEST.graphs.items())),
        training=dataclasses.replace(MANIFEST.training, weight_decay=0),
    )
    assert reordered.to_json() == MANIFEST.to_json()


def test_files_may_be_left_out_while_a_bundle_is_written():
    draft = dataclasses.replace(MANIFEST, files={})
    assert dataclasses.replace(draft, files=MANIFEST.files) == MANIFEST


@pytest.mark.parametrize("keys", [(), ("preprocessing",), ("training",), ("files", "train.onnx")])
def test_unknown_and_missing_keys_are_errors_at_every_level(keys):
    for change in ("add", "remove"):
        value = json.loads(MANIFEST.to_json())
        level = value
        for key in keys:
            level = level[key]
        if change == "add":
            level["extra"] = 1
        else:
            level.pop(sorted(level)[0])
        raw = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        words = "unknown key 'extra'; known keys are" if change == "add" else "is missing"
        with pytest.raises(ManifestError, match=words):
            Manifest.from_json(raw)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "format_version: expected 1, found 2"),
        ({"format_version": True}, "format_version"),
        ({"job": "no"}, "job"),
        ({"backbone": ""}, "backbone"),
        ({"method": 3}, "method: expected text"),
        ({"task": "a\nb"}, "printable"),
        ({"class_names": "ab"}, "class_names: expected a list"),
        ({"class_names": [1]}, "class_names"),
        ({"trainable": [["a", "float32", [0]]]}, "tensor 'a'"),
        ({"state": {}}, "expected a list"),
        ({"inputs": [["x", "float32", [1]], ["x", "float32", [1]]]}, "given twice"),
        ({"inputs": [["x", "complex64", [1]]]}, "expected one of"),
        ({"graphs": {"train": "other.onnx"}}, "not among the files"),
        ({"graphs": {"": "train.onnx"}}, "graphs"),
        ({"graphs": []}, "graphs: expected a mapping"),
        ({"files": {"train.onnx": 3}}, "expected an object"),
        ({"files": {"a": {"sha256": "ab", "size": 1}}}, "hex digits"),
        ({"files": {"a": {"sha256": "AB" * 32, "size": 1}}}, "lower-case"),
        ({"files": {"a": {"sha256": "ab" * 32, "size": -1}}}, "size"),
        ({"files": {"a": {"sha256": "ab" * 32, "size": 1.0}}}, "size"),
    ],
)
def test_from_json_refuses_when_a_value_is_wrong(changes, words):
    with pytest.raises(ManifestError) as caught:
        Manifest.from_json(edited(**changes))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'{"a":1,"a":1}',
        b"[" * 100_000,
        b'{"a":NaN}',
        b"1" * 10_000,
        MANIFEST.to_json() + b"\n",
        MANIFEST.to_json().replace(b":", b": ", 1),
        MANIFEST.to_json()[:-1],
        b" " * (MAX_MANIFEST_BYTES + 1),
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_from_json_refuses_when_the_bytes_are_not_one_canonical_manifest(raw):
    with pytest.raises(ManifestError):
        Manifest.from_json(raw)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "sound"}, "kind"),
        ({"kind": "image", "channels": 1, "mean": (0,), "std": (1,)}, "size"),
        ({"kind": "image", "size": 28, "channels": 3, "mean": (0.5,), "std": (1,) * 3}, "mean"),
        ({"kind": "image", "size": 28, "channels": 1, "mean": (0.5,), "std": (0,)}, "above 0"),
        (
            {"kind": "image", "size": 28, "channels": 1, "mean": (math.inf,), "std": (1,)},
            "mean",
        ),
        ({"kind": "tokens"}, "max_length"),
        ({"kind": "tokens", "max_length": 8, "size": 28}, "size"),
        ({"kind": "array", "max_length": 8}, "max_length"),
    ],
)
def test_preprocessing_refuses_when_settings_do_not_belong_together(fields, words):
    with pytest.raises(ManifestError, match=words):
        Preprocessing(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("optimizer", "adam"),
        ("learning_rate", -1.0),
        ("learning_rate", float("inf")),
        ("weight_decay", "0"),
        ("momentum", 1.0),
        ("local_epochs", 0),
    ],
)
def test_training_refuses_when_a_value_is_out_of_range(field, value):
    with pytest.raises(ManifestError, match=field):
        dataclasses.replace(MANIFEST.training, **{field: value})

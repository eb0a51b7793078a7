# SPDX-License-Identifier: Apache-2.0
"""Bundles that were changed, forged or built to reach outside their folder: none is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from edge_runtime import (
    BundleContentError,
    BundleError,
    BundleFormatError,
    BundleMissingError,
    BundlePathError,
    BundleSignatureError,
    bundle,
    open_bundle,
)
from protocol import Manifest, ParamSpec, Preprocessing, TensorSpec, TrainingSpec, hash_files
from protocol.limits import MAX_MANIFEST_BYTES
from protocol.signing import new_key, public_key_hex, sign

KEY = new_key()
PUBLIC = public_key_hex(KEY)
TENSORS = {"a": np.arange(4, dtype=np.float32)}
MANIFEST = Manifest(
    job="5c" * 32,
    backbone="none",
    method="full",
    task="classification",
    class_names=("0", "1"),
    trainable=ParamSpec.of(TENSORS),
    state=ParamSpec(()),
    inputs=(("x", TensorSpec((3,), "float32")),),
    preprocessing=Preprocessing(kind="array"),
    training=TrainingSpec(batch_size=8, optimizer="sgd", learning_rate=0.1),
    graphs={"train": "train.onnx"},
)


@pytest.fixture
def folder(tmp_path):
    """An honest bundle, to be spoilt."""
    made = tmp_path / "bundle"
    made.mkdir()
    (made / "train.onnx").write_bytes(b"graph")
    save_file(TENSORS, made / "initial.safetensors")
    seal(made, dataclasses.replace(MANIFEST, files=hash_files(made)).to_json())
    assert open_bundle(made, public_key=PUBLIC).initial()
    return made


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """Refused before loading: the reader of tensors must not even be called."""
    real = bundle.load_safetensors
    loads = []
    monkeypatch.setattr(bundle, "load_safetensors", lambda raw: loads.append(raw) or real(raw))
    yield loads
    assert len(loads) <= 1, "a refused bundle was loaded"  # one: the fixture's honest bundle


def seal(folder, raw: bytes, key=KEY) -> None:
    """Signs whatever bytes, as an attacker with a stolen key would."""
    (folder / "manifest.json").write_bytes(raw)
    (folder / "manifest.sig").write_bytes(sign(raw, key))
    (folder / "signer.pub").write_text(public_key_hex(key) + "\n")


def resealed(folder, **changes) -> None:
    value = json.loads((folder / "manifest.json").read_bytes()) | changes
    seal(folder, json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def test_a_bundle_is_refused_when_any_byte_of_any_file_is_changed(folder):
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for position in range(len(original)):
            if path.name == "signer.pub" and position == len(original) - 1:
                continue  # the line end, checked below
            changed = bytearray(original)
            changed[position] ^= 0x01
            path.write_bytes(changed)
            with pytest.raises(BundleError):
                open_bundle(folder, public_key=PUBLIC)
            with pytest.raises(BundleError):
                open_bundle(folder, public_key=None)
        path.write_bytes(original)
    assert open_bundle(folder, public_key=PUBLIC)


def test_a_bundle_is_refused_when_its_signer_file_has_other_text(folder):
    for text in (PUBLIC + "\n\n", PUBLIC + " ", " " + PUBLIC, PUBLIC.upper(), "", "ÿ", PUBLIC * 9):
        (folder / "signer.pub").write_text(text)
        with pytest.raises(BundleError):
            open_bundle(folder, public_key=PUBLIC)


@pytest.mark.parametrize("change", ["cut", "grown", "same length"])
def test_a_bundle_is_refused_when_a_file_is_not_what_was_signed(folder, change):
    content = {"cut": b"grap", "grown": b"graph\0", "same length": b"grapH"}[change]
    (folder / "train.onnx").write_bytes(content)
    with pytest.raises(BundleContentError, match=r"train\.onnx: expected"):
        open_bundle(folder, public_key=PUBLIC)


def test_a_bundle_is_refused_when_it_is_signed_by_another_key(folder):
    other = new_key()
    seal(folder, (folder / "manifest.json").read_bytes(), key=other)
    with pytest.raises(BundleSignatureError, match="another coordinator"):
        open_bundle(folder, public_key=PUBLIC)
    assert open_bundle(folder, public_key=None).public_key == public_key_hex(other)


def test_a_bundle_is_refused_when_the_signature_is_of_another_key_than_it_says(folder):
    raw = (folder / "manifest.json").read_bytes()
    (folder / "manifest.sig").write_bytes(sign(raw, new_key()))
    for public_key in (PUBLIC, None):
        with pytest.raises(BundleSignatureError, match="signature"):
            open_bundle(folder, public_key=public_key)


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_bundle_is_refused_when_the_signature_has_a_wrong_length(folder, length):
    (folder / "manifest.sig").write_bytes(bytes(length))
    with pytest.raises(BundleError, match=r"manifest\.sig|signature"):
        open_bundle(folder, public_key=PUBLIC)


@pytest.mark.parametrize(
    "name", ["manifest.json", "manifest.sig", "signer.pub", "train.onnx", "initial.safetensors"]
)
def test_a_bundle_is_refused_when_a_file_is_missing(folder, name):
    (folder / name).unlink()
    with pytest.raises(BundleMissingError, match=f"{name} is missing"):
        open_bundle(folder, public_key=PUBLIC)


@pytest.mark.parametrize("name", ["extra.bin", "deep/extra.bin", "TRAIN.onnx", ".hidden"])
def test_a_bundle_is_refused_when_a_file_is_too_many(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(BundlePathError):
        open_bundle(folder, public_key=PUBLIC)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "C:\\secret", "./train.onnx", ""],
)
@pytest.mark.parametrize("where", ["files", "graphs"])
def test_a_signed_manifest_is_refused_when_a_path_leaves_the_folder(folder, name, where):
    (folder.parent / "secret").write_bytes(b"secret")
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    entry = {"sha256": "ab" * 32, "size": 6}
    if where == "files":
        resealed(folder, files=files | {name: entry})
    else:
        resealed(folder, graphs={"train": name})
    with pytest.raises(BundleFormatError, match=r"plain relative path|characters"):
        open_bundle(folder, public_key=PUBLIC)


@pytest.mark.parametrize("name", ["manifest.json", "MANIFEST.SIG", "Train.onnx"])
def test_a_signed_manifest_is_refused_when_it_lists_a_name_twice_or_the_envelope(folder, name):
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    resealed(folder, files=files | {name: {"sha256": "ab" * 32, "size": 6}})
    with pytest.raises(BundleFormatError, match="the name is taken"):
        open_bundle(folder, public_key=PUBLIC)


@pytest.mark.parametrize(
    "name", ["manifest.json", "manifest.sig", "signer.pub", "train.onnx", "initial.safetensors"]
)
def test_a_bundle_is_refused_when_a_file_is_a_link(folder, name):
    target = folder.parent / "target"
    shutil.move(folder / name, target)
    (folder / name).symlink_to(target)
    with pytest.raises(BundlePathError, match=name):
        open_bundle(folder, public_key=PUBLIC)


def test_a_bundle_is_refused_when_a_folder_inside_it_is_a_link(folder):
    (folder.parent / "outside").mkdir()
    (folder / "inside").symlink_to(folder.parent / "outside")
    with pytest.raises(BundlePathError, match="found a link"):
        open_bundle(folder, public_key=PUBLIC)


@pytest.mark.parametrize("name", ["manifest.json", "train.onnx"])
@pytest.mark.timeout(20)
def test_a_bundle_is_refused_without_waiting_when_a_file_is_a_pipe(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BundlePathError):
        open_bundle(folder, public_key=PUBLIC)


def test_a_manifest_is_refused_before_it_is_read_when_it_is_huge(folder):
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BundlePathError, match="at most"):
        open_bundle(folder, public_key=PUBLIC)


def test_an_unsigned_manifest_is_never_parsed(folder, monkeypatch):
    def fail(raw):
        raise AssertionError("parsed before the signature was checked")

    monkeypatch.setattr(bundle.Manifest, "from_json", fail)
    raw = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(raw.replace(b'"full"', b'"head"'))
    with pytest.raises(BundleSignatureError):
        open_bundle(folder, public_key=PUBLIC)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"trainable": [["a", "float32", [2**40]]]},
        {"graphs": {"train": "missing.onnx"}},
        {"files": {}},
        {"code": "import os"},
        {"training": None},
    ],
    ids=str,
)
def test_a_signed_manifest_is_refused_when_it_cannot_be_run(folder, changes):
    resealed(folder, **changes)
    with pytest.raises(BundleFormatError):
        open_bundle(folder, public_key=PUBLIC)


@pytest.mark.parametrize("change", ["longer", "same length"])
def test_initial_tensors_are_refused_when_changed_after_the_check(
    folder, nothing_is_loaded, change
):
    opened = open_bundle(folder, public_key=PUBLIC)
    path = folder / "initial.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw + b"x" if change == "longer" else raw[:-1] + b"x")
    nothing_is_loaded.clear()
    with pytest.raises(BundleContentError, match="fetch it again"):
        opened.initial()
    assert not nothing_is_loaded

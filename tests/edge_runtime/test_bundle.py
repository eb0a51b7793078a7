# SPDX-License-Identifier: Apache-2.0
"""What an honest bundle gives; tests/attacks/ has the dishonest ones."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from edge_runtime import BundleFormatError, BundleMissingError, open_bundle
from protocol import Manifest, ParamSpec, Preprocessing, TensorSpec, TrainingSpec, hash_files
from protocol.signing import new_key, public_key_hex, sign

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array(0.5, np.float32),
}


def write(folder, key, *, tensors=TENSORS, spec=None, initial="initial.safetensors") -> None:
    (folder / "graphs").mkdir()
    (folder / "graphs" / "train.onnx").write_bytes(b"graph")
    save_file(tensors, folder / initial)
    manifest = Manifest(
        job="5c" * 32,
        backbone="none",
        method="full",
        task="classification",
        class_names=("0", "1"),
        trainable=spec or ParamSpec.of(TENSORS),
        state=ParamSpec(()),
        inputs=(("x", TensorSpec((3,), "float32")),),
        preprocessing=Preprocessing(kind="array"),
        training=TrainingSpec(batch_size=8, optimizer="sgd", learning_rate=0.1),
        graphs={"train": "graphs/train.onnx"},
        files=hash_files(folder),
    )
    raw = manifest.to_json()
    (folder / "manifest.json").write_bytes(raw)
    (folder / "manifest.sig").write_bytes(sign(raw, key))
    (folder / "signer.pub").write_text(public_key_hex(key) + "\n")


@pytest.mark.parametrize("trusted", [True, False])
def test_an_honest_bundle_opens_and_gives_its_tensors_and_graphs(tmp_path, trusted):
    key = new_key()
    write(tmp_path, key)
    bundle = open_bundle(tmp_path, public_key=public_key_hex(key) if trusted else None)
    assert bundle.public_key == public_key_hex(key)
    assert bundle.path("train") == tmp_path / "graphs" / "train.onnx"
    assert bundle.manifest.trainable.mismatch(bundle.initial()) is None
    for name, array in bundle.initial().items():
        np.testing.assert_array_equal(array, TENSORS[name])


def test_a_role_without_a_graph_is_refused_with_the_known_ones(tmp_path):
    write(tmp_path, new_key())
    with pytest.raises(BundleFormatError, match="expected one of train, asked for 'predict'"):
        open_bundle(str(tmp_path), public_key=None).path("predict")


def test_initial_tensors_are_refused_when_they_do_not_fit_the_spec(tmp_path):
    write(tmp_path, new_key(), spec=ParamSpec.of({"a": np.zeros(2, "f4")}))
    with pytest.raises(BundleFormatError, match=r"initial\.safetensors: tensor 'b'"):
        open_bundle(tmp_path, public_key=None).initial()


def test_a_bundle_without_initial_tensors_is_refused(tmp_path):
    write(tmp_path, new_key(), initial="other.safetensors")
    with pytest.raises(BundleFormatError, match=r"does not list initial\.safetensors"):
        open_bundle(tmp_path, public_key=None)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BundleMissingError, match="no such folder"):
        open_bundle(tmp_path / "none", public_key=None)
    with pytest.raises(BundleMissingError, match=r"manifest\.json is missing"):
        open_bundle(tmp_path, public_key=None)

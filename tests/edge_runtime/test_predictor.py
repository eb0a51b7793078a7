# SPDX-License-Identifier: Apache-2.0
"""Predictions beside torch and the other graphs; adapters switched, mixed, kept and refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from coordinator.sections import TrainingSection
from edge_runtime import preprocess
from edge_runtime.adapter import Adapter, mixed, read_adapter, write_adapter
from edge_runtime.errors import AdapterError, DataError, PredictionError, TrainingError
from edge_runtime.lame import corrected, softmax
from edge_runtime.predictor import Predictor
from protocol.adapter import ADAPTER_FILE, OFFSET_FILE, PEFT_PREFIX, stamp
from tuning.export import export_result

Make = Callable[..., Any]
POOL = {"elements": 5, "selected": 2}


@pytest.fixture(scope="module")
def pool(make_bundle: Make) -> Any:
    training = TrainingSection(learning_rate=0.05, batch_size=4)
    return make_bundle("fedins", settings=POOL, training=training)


def pictures(count: int, *, seed: int = 0, **shape: int) -> np.ndarray:
    side = shape.get("side", 8)
    size = (count, side, side, 3) if shape.get("channels") == 3 else (count, side, side)
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def inputs(made: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    return preprocess(made.bundle.manifest.preprocessing, {"images": images})


def torch_logits(made: Any, tensors: Any, images: np.ndarray) -> np.ndarray:
    """The tuned module, unfolded and untraced."""
    import torch

    _, tuned = made.recipe.build()
    inside = dict(tuned.module.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            inside[tuned.trainable[name]].copy_(torch.from_numpy(value))
        batch = {n: torch.from_numpy(v) for n, v in inputs(made, images).items()}
        return tuned.module(**tuned.prepare(batch)).logits.numpy()


# Predictions


@pytest.mark.parametrize("method", ["lora", "head"])
@pytest.mark.parametrize("count", [1, 64, 65, 130])
def test_prediction_equals_torch_at_any_count(make_bundle: Make, method: str, count: int) -> None:
    made, images = make_bundle(method), pictures(count)
    predictor = Predictor(made.bundle, threads=1)
    own = predictor.predict(images)
    np.testing.assert_allclose(
        own.logits, torch_logits(made, made.bundle.initial(), images), rtol=0, atol=1e-4
    )
    predictor.use(Adapter(tensors=made.start()))
    found = predictor.predict(images)
    expected = torch_logits(made, made.start(), images)
    np.testing.assert_allclose(found.logits, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.probabilities, softmax(expected), rtol=0, atol=1e-4)
    assert found.logits.dtype == found.probabilities.dtype == np.float32
    assert found.classes.tolist() == expected.argmax(axis=1).tolist()
    assert found.names == [f"c{number}" for number in found.classes]
    assert np.abs(own.logits - found.logits).max() > 0.05


def test_images_and_their_model_inputs_are_predicted_alike(make_bundle: Make) -> None:
    made = make_bundle("head")
    predictor = Predictor(made.bundle, threads=1)
    for images in (pictures(3), pictures(3, channels=3), pictures(3, side=12)):
        by_inputs = predictor.predict({**inputs(made, images), "notes": np.zeros(9)})
        assert by_inputs.logits.tobytes() == predictor.predict(images).logits.tobytes()


def test_texts_are_predicted_from_model_inputs(make_bundle: Make) -> None:
    made = make_bundle("head", kind="text", optimizer="adamw")
    predictor, data = Predictor(made.bundle, threads=1), made.data(5)
    assert len(predictor.predict(data).names) == 5
    with pytest.raises(DataError, match="does not read images"):
        predictor.predict(pictures(2))


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (pictures(2).astype(np.float32), "expected uint8 values 0 to 255, found float32"),
        (pictures(2)[0], r"expected \[n, height, width\]"),
        (np.zeros((2, 8, 8, 2), np.uint8), "expected 1 or 3 channels, found 2"),
        (pictures(0), "one sample or more, found none"),
        ({}, 'input "pixel_values" is missing'),
        ({"pixel_values": np.zeros((0, 1, 8, 8), "f4")}, "one sample or more, found none"),
        ({"pixel_values": np.zeros((2, 1, 9, 8), "f4")}, r"found float32 \[2, 1, 9, 8\]"),
        ({"pixel_values": np.zeros((2, 3, 8, 8), "f4")}, r"found float32 \[2, 3, 8, 8\]"),
        ({"pixel_values": np.zeros((2, 1, 8, 8))}, "found float64"),
        ({"pixel_values": np.full((2, 1, 8, 8), 255, "f4")}, "from -0.75 to 1.75.*found 255"),
        ({"pixel_values": np.full((2, 1, 8, 8), np.nan, "f4")}, "found nan"),
    ],
)
def test_samples_that_do_not_fit_are_refused(make_bundle: Make, samples: Any, words: str) -> None:
    predictor = Predictor(make_bundle("head").bundle, threads=1)
    with pytest.raises(DataError, match=words):
        predictor.predict(samples)


# Adapters


def test_adapters_switch_and_go_back_without_loading_anything(
    make_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, images = make_bundle("lora"), pictures(4)
    predictor = Predictor(made.bundle, threads=1)
    own = predictor.predict(images).logits
    some, other = (Adapter(tensors=made.start(size=size)) for size in (0.3, 0.1))
    predictor.use(some)
    first = predictor.predict(images).logits
    monkeypatch.setattr("edge_runtime.session.open_session", None)
    predictor.use(other)
    assert np.abs(predictor.predict(images).logits - first).max() > 1e-3
    predictor.use(some)
    assert predictor.predict(images).logits.tobytes() == first.tobytes()
    predictor.use(None)
    assert predictor.predict(images).logits.tobytes() == own.tobytes()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_mix_is_between_its_two_adapters(make_bundle: Make, weight: float) -> None:
    made = make_bundle("head")
    own, shared = (Adapter(tensors=made.start(size=size)) for size in (0.3, 0.1))
    found = mixed(own, shared, weight)
    for name, value in found.tensors.items():
        expected = weight * own.tensors[name].astype("f8") + (1 - weight) * shared.tensors[name]
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
        assert value.dtype == np.float32
    predictor, images = Predictor(made.bundle, threads=1), pictures(3)

    def logits(adapter: Adapter) -> np.ndarray:
        predictor.use(adapter)
        return predictor.predict(images).logits

    # A head is linear in its tensors.
    between = weight * logits(own) + (1 - weight) * logits(shared)
    np.testing.assert_allclose(logits(found), between, rtol=0, atol=1e-4)


def test_mixes_of_what_does_not_belong_together_are_refused(make_bundle: Make) -> None:
    made = make_bundle("head")
    one = Adapter(tensors=made.start())
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(AdapterError, match="expected a weight from 0 to 1"):
            mixed(one, one, weight)
    with pytest.raises(AdapterError, match="the same names and shapes"):
        mixed(one, Adapter(tensors={}), 0.5)
    moved = Adapter(tensors=one.tensors, offset={"w": np.ones((2, 2), "f4")})
    with pytest.raises(AdapterError, match="rest on different backbones"):
        mixed(one, moved, 0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classifier.bias": None}, 'tensor "classifier.bias" is missing'),
        ({"more": np.zeros(2, "f4")}, "'more' is not in the spec"),
        ({"classifier.bias": np.zeros(9, "f4")}, r"float32 \[9\], spec says float32 \[10\]"),
        ({"classifier.bias": np.zeros(10)}, r"float64 \[10\], spec says"),
        ({"classifier.bias": np.full(10, np.inf, "f4")}, '"classifier.bias" holds NaN or infinity'),
    ],
)
def test_tensors_that_the_bundle_does_not_train_are_refused(
    make_bundle: Make, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    made = make_bundle("head")
    given = {n: v for n, v in (made.start() | change).items() if v is not None}
    predictor = Predictor(made.bundle, threads=1)
    before = predictor.predict(pictures(2)).logits
    with pytest.raises(AdapterError, match=words):
        predictor.use(Adapter(tensors=given))
    assert predictor.predict(pictures(2)).logits.tobytes() == before.tobytes()
    with pytest.raises(AdapterError, match=words):
        write_adapter(Adapter(tensors=given), made.bundle, tmp_path)
    save_file(given, tmp_path / ADAPTER_FILE, metadata=stamp(made.bundle.manifest))
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path, made.bundle)


def test_logits_that_are_no_numbers_are_an_error(make_bundle: Make) -> None:
    made = make_bundle("head")
    huge = {name: np.full_like(value, 3e38) for name, value in made.start().items()}
    predictor = Predictor(made.bundle, threads=1)
    predictor.use(Adapter(tensors=huge))
    with pytest.raises(PredictionError, match="NaN or infinite"):
        predictor.predict(pictures(2))


def test_an_own_adapter_is_kept_and_read(make_bundle: Make, tmp_path: Path) -> None:
    made = make_bundle("lora")
    base = made.bundle.manifest.pairs[0].base
    weight = load_file(made.bundle.folder / "backbone.safetensors")[base]
    adapter = Adapter(tensors=made.start(), offset={base: 0.1 * np.ones_like(weight)})
    write_adapter(adapter, made.bundle, tmp_path / "own")
    found = read_adapter(tmp_path / "own", made.bundle)
    assert found.tensors.keys() == adapter.tensors.keys()
    for name, value in found.tensors.items():
        np.testing.assert_array_equal(value, adapter.tensors[name])
    np.testing.assert_array_equal(found.offset[base], adapter.offset[base])
    write_adapter(Adapter(tensors=made.start()), made.bundle, tmp_path / "own")
    assert not read_adapter(tmp_path / "own", made.bundle).offset


@pytest.mark.parametrize("method", ["lora", "head"])
def test_an_exported_adapter_predicts_as_the_folded_graph_of_its_run(
    make_bundle: Make, tmp_path: Path, method: str
) -> None:
    made, images = make_bundle(method), pictures(6)
    folder, adapter = tmp_path / "bundle", tmp_path / "adapter"
    shutil.copytree(made.bundle.folder, folder)
    offset = {}
    if method == "lora":
        weights = load_file(folder / "backbone.safetensors")
        rng = np.random.default_rng(3)
        offset = {
            pair.base: 0.3 * rng.standard_normal(weights[pair.base].shape).astype("f4")
            for pair in made.bundle.manifest.pairs
        }
    export_result(made.recipe, made.start(), adapter, folder, offset=offset)
    with safe_open(adapter / ADAPTER_FILE, framework="numpy") as file:
        prefixed = all(name.startswith(PEFT_PREFIX) for name in file.keys())  # noqa: SIM118
        assert file.metadata() == stamp(made.bundle.manifest)
    assert prefixed is (method == "lora")
    assert (adapter / OFFSET_FILE).is_file() is (method == "lora")

    predictor = Predictor(made.bundle, threads=1)
    predictor.use(read_adapter(adapter, made.bundle))
    found = predictor.predict(images).logits
    # Not verified again: the run signs its bundle anew, which other tests look at.
    folded = Predictor(dataclasses.replace(made.bundle, folder=folder), threads=1)
    np.testing.assert_allclose(found, folded.predict(images).logits, rtol=0, atol=1e-4)
    if offset:
        predictor.use(Adapter(tensors=made.start()))
        assert np.abs(predictor.predict(images).logits - found).max() > 1e-2


def test_an_offset_of_other_weights_is_refused(make_bundle: Make) -> None:
    made = make_bundle("lora")
    predictor = Predictor(made.bundle, threads=1)
    predictor.use(Adapter(tensors=made.start(), offset={"nothing": np.ones(2, "f4")}))
    with pytest.raises(TrainingError, match="does not have them"):
        predictor.predict(pictures(1))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fedloom_backbone", "0" * 64, "expected tensors for a backbone with SHA-256 .* 000"),
        ("fedloom_method", "lora", "expected tensors for the method head, found some for lora"),
        ("fedloom_classes", json.dumps(["a", "b"]), r"for the classes .*found some for \[.a., .b"),
        ("fedloom_backbone", None, "does not say what it belongs to"),
    ],
)
@pytest.mark.parametrize("name", [ADAPTER_FILE, OFFSET_FILE])
def test_an_adapter_of_something_else_is_refused_by_its_stamp(
    make_bundle: Make, tmp_path: Path, name: str, key: str, value: str | None, words: str
) -> None:
    made = make_bundle("head")
    good = stamp(made.bundle.manifest)
    bad = {k: v for k, v in {**good, key: value}.items() if v is not None}
    save_file(made.start(), tmp_path / ADAPTER_FILE, metadata=good)
    save_file(made.start(), tmp_path / name, metadata=bad)
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path, made.bundle)


def test_an_adapter_of_another_job_on_the_same_backbone_is_taken(
    make_bundle: Make, tmp_path: Path
) -> None:
    made = make_bundle("head")
    other = {**stamp(made.bundle.manifest), "fedloom_job": "0" * 64}
    save_file(made.start(), tmp_path / ADAPTER_FILE, metadata=other)
    assert read_adapter(tmp_path, made.bundle).tensors.keys() == made.start().keys()


def test_folders_without_a_readable_adapter_are_refused(make_bundle: Make, tmp_path: Path) -> None:
    bundle = make_bundle("head").bundle
    with pytest.raises(AdapterError, match="no such file; give the folder adapter/"):
        read_adapter(tmp_path, bundle)
    (tmp_path / ADAPTER_FILE).write_bytes(b"\x80\x04pickle")
    with pytest.raises(AdapterError, match="expected safetensors"):
        read_adapter(tmp_path, bundle)


# Query features


def test_known_features_give_the_same_logits(pool: Any) -> None:
    predictor, images = Predictor(pool.bundle, threads=1), pictures(70)
    assert predictor.has_features
    features = predictor.features(images)
    assert features.dtype == np.float32 and features.shape == (70, 16)
    for size in (0.3, 0.6):
        predictor.use(Adapter(tensors=pool.start(size=size)))
        whole = predictor.predict(images).logits
        known = predictor.predict(images, features=features).logits
        np.testing.assert_allclose(known, whole, rtol=0, atol=1e-5)
        assert predictor.features(images).tobytes() == features.tobytes()
        expected = torch_logits(pool, pool.start(size=size), images)
        np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-4)
    # They are what chooses: another image's features give another answer.
    other = predictor.predict(images, features=np.roll(features, 1, axis=0)).logits
    assert np.abs(other - whole).max() > 1e-2


def test_features_are_those_of_the_backbone_as_it_was(pool: Any) -> None:
    import torch

    from tuning.backbones import load_backbone

    model = load_backbone(pool.recipe.backbone, classes=10, seed=0).model
    model.classifier = torch.nn.Identity()
    images = pictures(5)
    with torch.no_grad():
        expected = model(pixel_values=torch.from_numpy(inputs(pool, images)["pixel_values"])).logits
    found = Predictor(pool.bundle, threads=1).features(images)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_features_that_do_not_fit_are_refused(pool: Any, make_bundle: Make) -> None:
    predictor, images = Predictor(pool.bundle, threads=1), pictures(3)
    features = predictor.features(images)
    with pytest.raises(PredictionError, match="go with an adapter"):
        predictor.predict(images, features=features)
    predictor.use(Adapter(tensors=pool.start()))
    for wrong in (features[:2], features[:, :4], features.astype("f8")):
        with pytest.raises(DataError, match=r"expected float32 \[3, 16\]"):
            predictor.predict(images, features=wrong)
    other = Predictor(make_bundle("head").bundle, threads=1)
    assert not other.has_features
    with pytest.raises(PredictionError, match="method head has no query features"):
        other.features(images)
    with pytest.raises(PredictionError, match="takes no query features"):
        other.predict(images, features=features)


def test_logits_of_an_image_depend_on_no_other_image(pool: Any) -> None:
    predictor, images = Predictor(pool.bundle, threads=1), pictures(9)
    for adapter in (None, Adapter(tensors=pool.start())):
        predictor.use(adapter)
        whole = predictor.predict(images).logits
        for size in (1, 4):
            parts = [images[at : at + size] for at in range(0, 9, size)]
            found = np.concatenate([predictor.predict(part).logits for part in parts])
            np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)


# LAME


@pytest.mark.parametrize("trained", [False, True])
def test_lame_looks_at_query_features_where_there_are_some(pool: Any, trained: bool) -> None:
    predictor, images = Predictor(pool.bundle, threads=1), pictures(12)
    predictor.use(Adapter(tensors=pool.start()) if trained else None)
    plain, found = predictor.predict(images), predictor.predict(images, lame=True)
    assert (plain.lame, found.lame) == ("", "features")
    np.testing.assert_allclose(found.logits, plain.logits, rtol=0, atol=1e-5)
    expected = corrected(plain.probabilities, predictor.features(images))
    np.testing.assert_allclose(found.probabilities, expected, rtol=0, atol=1e-4)


def test_lame_looks_at_logits_elsewhere(make_bundle: Make) -> None:
    predictor, images = Predictor(make_bundle("head").bundle, threads=1), pictures(12)
    plain, found = predictor.predict(images), predictor.predict(images, lame=True)
    assert found.lame == "logits"
    expected = corrected(plain.probabilities, plain.logits)
    np.testing.assert_array_equal(found.probabilities, expected)

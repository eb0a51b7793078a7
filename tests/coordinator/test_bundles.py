# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.bundles import recipe_of, sign_bundle, write_bundle
from coordinator.job import Job
from coordinator.sections import BackboneSection, DataSection, MethodSpec, TrainingSection
from edge_runtime import BundleContentError, BundleSignatureError, open_bundle
from protocol.signing import new_key, public_key_hex
from tuning.compiler import GRAPHS


def test_recipe_has_what_decides_the_step() -> None:
    job = Job(
        backbone=BackboneSection(random_weights=True),
        data=DataSection(max_length=33),
        method=MethodSpec(name="lora", settings={"rank": 3}),
        training=TrainingSection(
            optimizer="sgd", learning_rate=0.2, weight_decay=0.1, momentum=0.5, proximal=0.3,
            batch_size=6, local_epochs=2,
        ),
    )  # fmt: skip
    recipe = recipe_of(job, 7)
    assert (recipe.backbone, recipe.classes, recipe.seed) == ("vit-small-28", 7, 0)
    assert (recipe.method, dict(recipe.settings)) == ("lora", {"rank": 3})
    assert recipe.max_length == 33 and recipe.random_weights
    assert dataclasses.asdict(recipe.training) == {
        "batch_size": 6, "optimizer": "sgd", "learning_rate": 0.2, "weight_decay": 0.1,
        "momentum": 0.5, "local_epochs": 2, "proximal": 0.3, "scaffold": False,
        "privacy": None,
    }  # fmt: skip


def test_recipe_takes_the_folder_when_the_job_gives_one() -> None:
    job = Job(backbone=BackboneSection(name="", path="/models/mine"))
    assert recipe_of(job, 2).backbone == Path("/models/mine")


def test_bundle_describes_the_job_and_opens_with_its_key(
    make_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    made = make_bundle("head")
    key = new_key()
    names = [f"digit {number}" for number in range(10)]
    folder = write_bundle(made.job, made.recipe, made.compiled, names, key, tmp_path / "a" / "b")
    bundle = open_bundle(folder, public_key=public_key_hex(key))
    manifest = bundle.manifest
    assert manifest.job == made.job.hash()
    assert (manifest.method, manifest.backbone) == ("head", "tiny-vit")
    assert manifest.class_names == tuple(names)
    assert manifest.trainable == made.compiled.trainable
    assert manifest.training == made.recipe.training
    assert dict(manifest.graphs) == dict(GRAPHS)
    assert set(manifest.files) == set(made.compiled.files())
    assert manifest.trainable.mismatch(bundle.initial()) is None
    with pytest.raises(BundleSignatureError, match="another coordinator"):
        open_bundle(folder, public_key=public_key_hex(new_key()))


def test_changed_file_needs_a_new_signature(
    make_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    made = make_bundle("head")
    key = new_key()
    names = [str(number) for number in range(10)]
    folder = write_bundle(made.job, made.recipe, made.compiled, names, key, tmp_path / "b")
    manifest = open_bundle(folder, public_key=None).manifest
    weights = folder / "predict.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleContentError, match=r"predict\.safetensors"):
        open_bundle(folder, public_key=None)
    sign_bundle(manifest, key, folder)
    signed = open_bundle(folder, public_key=public_key_hex(key)).manifest
    changed = {name for name in signed.files if signed.files[name] != manifest.files[name]}
    assert changed == {"predict.safetensors"}
    assert dataclasses.replace(signed, files={}) == dataclasses.replace(manifest, files={})


def test_bundle_is_written_over_an_older_one(
    make_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    key = new_key()
    names = [str(number) for number in range(10)]
    for method in ("lora", "head"):
        made = make_bundle(method)
        write_bundle(made.job, made.recipe, made.compiled, names, key, tmp_path)
    assert open_bundle(tmp_path, public_key=public_key_hex(key)).manifest.method == "head"

# SPDX-License-Identifier: Apache-2.0
"""A recipe's digest is tested with the cache, in test_compiler.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuning.errors import BackboneError, MethodError


def test_recipe_builds_the_backbone_with_the_method_attached(
    make_bundle: Callable[..., Any],
) -> None:
    recipe = make_bundle("lora").recipe
    backbone, tuned = recipe.build()
    assert backbone.name == "tiny-vit"
    assert set(tuned.parameters()) == set(make_bundle("lora").compiled.trainable.names)


def test_each_build_has_tensors_of_its_own(make_bundle: Callable[..., Any]) -> None:
    recipe = make_bundle("head").recipe
    (_, first), (_, second) = recipe.build(), recipe.build()
    first.parameters()["classifier.weight"].zero_()
    assert second.parameters()["classifier.weight"].any()


def test_wrong_method_is_told_before_the_backbone_is_read(make_bundle: Callable[..., Any]) -> None:
    recipe = dataclasses.replace(
        make_bundle("head").recipe, backbone=Path("nowhere"), settings={"rank": 1}
    )
    with pytest.raises(MethodError, match='no setting "rank"'):
        recipe.build()
    with pytest.raises(BackboneError, match="not a Hugging Face folder"):
        dataclasses.replace(recipe, settings={}).build()

# SPDX-License-Identifier: Apache-2.0
"""What a job needs, and how one that does not fit together is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.sections import BackboneSection, DataSection, MethodSpec
from simulations.errors import DataError
from simulations.setup import load_job_data
from tuning.errors import BackboneError, MethodError


def test_image_job_is_set_up(make_setup: Callable[..., Any]) -> None:
    setup = make_setup("lora")
    assert setup.dataset.kind == "image"
    assert setup.recipe.classes == 10
    assert setup.compiled.backbone == "tiny-vit"
    assert len(setup.federation.clients) + len(setup.federation.skipped) == 5


def test_text_job_is_tokenised_by_the_backbones_own_tokenizer(
    tiny_job: Callable[..., Any],
) -> None:
    dataset = load_job_data(tiny_job("lora", kind="text"))
    ids, mask = dataset.train["input_ids"], dataset.train["attention_mask"]
    assert ids.shape == (60, 8)
    assert (ids[:, 0] == 2).all() and set(ids[:, 5]) == {3}  # [CLS] four words [SEP]
    assert (mask.sum(axis=1) == 6).all()


def test_images_on_a_text_backbone_are_refused(
    tiny_job: Callable[..., Any], tiny_bert: Path, make_setup: Callable[..., Any]
) -> None:
    data = DataSection(dataset="digits", clients=2, max_length=8)
    backbone = BackboneSection(name="", path=str(tiny_bert))
    with pytest.raises(DataError, match="tiny-bert reads texts, but the data set digits holds im"):
        make_setup("lora", backbone=backbone, data=data)


def test_texts_on_an_image_backbone_are_refused(
    make_setup: Callable[..., Any], tiny_texts: Path
) -> None:
    with pytest.raises(DataError, match=r"tiny-vit reads images, but the data set .* holds texts"):
        make_setup("lora", data=DataSection(dataset=str(tiny_texts), clients=2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": MethodSpec(name="loar")}, MethodError, 'no method is called "loar"; known'),
        (
            {"method": MethodSpec(name="lora", settings={"rnak": 1})},
            MethodError,
            'no setting "rnak"; known: alpha, rank, targets',
        ),
    ],
)
def test_wrong_method_is_refused(
    tiny_job: Callable[..., Any], change: dict[str, Any], error: type, message: str
) -> None:
    from simulations.progress import SilentProgress
    from simulations.setup import set_up

    with pytest.raises(error, match=message):
        set_up(replace(tiny_job("lora"), **change), SilentProgress())


def test_folder_without_a_model_is_refused(make_setup: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no config\.json"):
        make_setup("lora", backbone=BackboneSection(name="", path=str(tmp_path)))


def test_a_job_for_devices_that_have_data_nobody_else_has_is_not_simulated(
    tiny_job: Callable[..., Any],
) -> None:
    with pytest.raises(DataError, match=r'data\.classes = "cat,dog": expected nothing'):
        load_job_data(tiny_job("lora", data=DataSection(classes="cat,dog")))

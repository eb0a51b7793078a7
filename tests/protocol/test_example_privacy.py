# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest

from protocol.errors import ManifestError
from protocol.example_privacy import ExamplePrivacy
from protocol.manifest import TrainingSpec

PRIVACY = ExamplePrivacy(noise_multiplier=1.1, clip=0.5, fewest_samples=40, steps=3, rounds=7)
TRAINING = TrainingSpec(batch_size=8, optimizer="sgd", learning_rate=0.1, privacy=PRIVACY)


def test_what_is_written_is_read_again() -> None:
    assert ExamplePrivacy.from_json(PRIVACY.to_json()) == PRIVACY
    assert PRIVACY.most_steps == 21


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("noise_multiplier", 0, "expected above 0, found 0"),
        ("noise_multiplier", -1.0, "at least 0"),
        ("noise_multiplier", float("nan"), "finite"),
        ("clip", 0.0, "expected above 0"),
        ("clip", float("inf"), "finite"),
        ("clip", "1", "a number"),
        ("fewest_samples", 0, "expected 1 to"),
        ("steps", 0, "expected 1 to"),
        ("steps", True, "an integer"),
        ("rounds", 0, "expected 1 to"),
        ("rounds", 2.0, "an integer"),
    ],
)
def test_value_that_protects_nobody_is_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(ManifestError, match=f"privacy.{field}: .*{words}"):
        dataclasses.replace(PRIVACY, **{field: value})


@pytest.mark.parametrize(
    "value", [None, [], {}, {"clip": 1.0}, {**PRIVACY.to_json(), "epsilon": 1.0}]
)
def test_other_json_is_refused(value: object) -> None:
    with pytest.raises(ManifestError):
        ExamplePrivacy.from_json(value)


def test_training_refuses_what_cannot_be_private() -> None:
    with pytest.raises(ManifestError, match="at least batch_size = 41, found 40"):
        dataclasses.replace(TRAINING, batch_size=41)
    with pytest.raises(ManifestError, match="control variates"):
        dataclasses.replace(TRAINING, scaffold=True)
    with pytest.raises(ManifestError, match="an ExamplePrivacy or None"):
        dataclasses.replace(TRAINING, privacy=1.0)  # type: ignore[arg-type]

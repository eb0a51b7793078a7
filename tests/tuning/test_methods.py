# SPDX-License-Identifier: Apache-2.0
"""Names and settings of methods, and what all of them have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tuning.backbones import load_backbone
from tuning.errors import MethodError
from tuning.methods import METHOD_NAMES, Tuned, method_named
from tuning.step import logits

SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {} for name in METHOD_NAMES},
    "peft": {"type": "IA3", "feedforward_modules": []},
    "sfprompt": {"cut": "1+0"},
}


def attached(folder: Path, name: str, settings: dict[str, Any] | None = None) -> Tuned:
    backbone = load_backbone(folder, classes=4, seed=1, max_length=8)
    given = SETTINGS[name] if settings is None else settings
    return method_named(name, given).attach(backbone, seed=1)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_method_knows_its_name(name: str) -> None:
    method = method_named(name, SETTINGS[name])
    assert method.name == name
    assert method.mean_is_exact is (name in ("full", "head", "lora-sb"))


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_every_method_trains_the_classifier_and_leaves_the_rest_frozen(
    tiny_vit: Path, tiny_bert: Path, name: str, kind: str
) -> None:
    tuned = attached(tiny_vit if kind == "image" else tiny_bert, name)
    trained, frozen = tuned.parameters(), tuned.frozen()
    assert {"classifier.weight", "classifier.bias"} <= set(trained)
    assert list(trained) == sorted(trained)
    assert not set(tuned.trainable.values()) & set(frozen)
    everything = {id(tensor) for tensor in tuned.module.state_dict(keep_vars=True).values()}
    assert len(trained) + len(frozen) == len(everything)
    assert bool(frozen) is (name != "full")


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_seed_decides_every_tensor(tiny_vit: Path, name: str) -> None:
    first, again = attached(tiny_vit, name), attached(tiny_vit, name)
    for key, value in (first.parameters() | first.frozen()).items():
        assert torch.equal(value, (again.parameters() | again.frozen())[key])
    state = torch.random.get_rng_state()
    attached(tiny_vit, name)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("loar", {}, 'no method is called "loar"; known: full, head, lora, lora-sb, ssf, fedins'),
        ("head", {"rank": 4}, 'method "head" has no setting "rank"; known: none'),
        ("lora", {"rnak": 4}, 'method "lora" has no setting "rnak"; known: alpha, rank, targets'),
        ("lora", {"rank": 0}, "method.rank is 0; it must be at least 1"),
        ("lora", {"rank": "4"}, "method.rank is '4'; expected a whole number"),
        ("lora", {"rank": True}, "method.rank is True; expected a whole number"),
        ("lora", {"rank": 4.5}, r"method.rank is 4.5; expected a whole number"),
        ("lora", {"alpha": 0}, "method.alpha is 0.0; it must be above 0"),
        ("lora", {"alpha": "a"}, "method.alpha is 'a'; expected a number"),
        ("lora", {"targets": "query"}, "method.targets is 'query'; expected a list"),
        ("lora", {"targets": ["a", 3]}, "expected a list of layer names"),
        ("ssf", {"init_std": 1.0}, r"method.init_std is 1.0; it must be in \[0, 1\)"),
        ("ssf", {"init_std": -0.1}, "it must be in"),
        ("adapter", {"width": 0}, "method.width is 0; it must be at least 1"),
        ("adapter", {"scale": -1.0}, "method.scale is -1.0; it must be above 0"),
        ("one-bit-adapter", {"width": 0}, "method.width is 0"),
        ("one-bit-lora", {"rank": 0}, "method.rank is 0"),
        ("one-bit-lora", {"scale": 0}, "method.scale is 0"),
        ("prompt", {"length": 0}, "method.length is 0; it must be at least 1"),
        ("sfprompt", {"length": 0}, "method.length is 0; it must be at least 1"),
        ("sfprompt", {"cut": "deep"}, 'expected "faithful-minimal", "private" or the blocks'),
        ("sfprompt", {"cut": 2}, "method.cut is 2; expected a text"),
        ("sfprompt", {"cut": "0+1"}, "would read a token that has seen no input"),
        ("sfprompt", {"cut": "1+1", "pool": True}, "has blocks that read every token"),
        ("peft", {}, 'needs method.type, e.g. type = "LOHA"'),
        ("peft", {"type": 3}, "method.type is 3; expected the name of a peft method"),
        ("peft", {"type": "PREFIX_TUNING"}, "those that compile are LORA, LOHA"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(MethodError, match=message):
        method_named(name, settings)


def test_whole_numbers_do_where_numbers_are_asked() -> None:
    assert method_named("lora", {"alpha": 32}).alpha == 32.0  # type: ignore[attr-defined]


def test_weight_that_two_layers_share_is_listed_once(tiny_vit: Path) -> None:
    tuned = attached(tiny_vit, "head")
    shared = tuned.module.get_submodule("vit.layers.0.mlp.fc1").weight
    tuned.module.get_submodule("vit.layers.1.mlp.fc1").weight = shared
    frozen = tuned.frozen()
    assert "vit.layers.0.mlp.fc1.weight" in frozen
    assert "vit.layers.1.mlp.fc1.weight" not in frozen
    pixels = torch.zeros(1, 1, 8, 8)
    scores = logits(tuned, tuned.parameters(), frozen, {"pixel_values": pixels})
    assert torch.equal(scores, tuned.module(pixels).logits)

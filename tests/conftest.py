# SPDX-License-Identifier: Apache-2.0
"""Settings that every test shares, and tiny pre-trained models with their compiled bundles.

Compiling takes seconds, so that every recipe is compiled once a session: `make_bundle` remembers,
and the cache of compiled jobs is one folder for the whole session.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# a busy machine is no failure: pytest-timeout bounds whole tests instead of single examples
settings.register_profile("explore", deadline=None)
# The same examples each time: a change is judged by what it changes. `make explore` draws new ones.
settings.register_profile("suite", parent=settings.get_profile("explore"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

IMAGE_CLASSES, TEXT_CLASSES = 10, 3
BATCH = 4
WORDS = ("red", "green", "blue", "stone", "river", "cloud", "bread", "lamp", "chair", "door")


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tiny job, compiled and signed."""

    job: Any  # coordinator.job.Job
    recipe: Any  # tuning.recipe.Recipe
    compiled: Any  # tuning.compiler.Compiled
    bundle: Any  # edge_runtime.bundle.Bundle

    def start(self, *, size: float = 0.3) -> dict[str, np.ndarray]:
        """The initial tensors, stirred: nothing is zero, and no gradient is too small to test."""
        rng = np.random.default_rng(5)
        return {
            name: value + np.float32(size) * rng.standard_normal(value.shape).astype(np.float32)
            for name, value in sorted(self.bundle.initial().items())
        }

    def data(self, samples: int, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Model inputs and labels, as a client's own preprocessing makes them."""
        from edge_runtime import preprocess

        rng = np.random.default_rng([seed, samples])
        raw: dict[str, np.ndarray] = {
            "labels": rng.integers(0, len(self.bundle.manifest.class_names), samples)
        }
        if self.bundle.manifest.preprocessing.kind == "image":
            raw["images"] = rng.integers(0, 256, (samples, 8, 8), dtype=np.uint8)
        else:
            raw["input_ids"] = rng.integers(4, 4 + len(WORDS), (samples, 8))
            lengths = rng.integers(2, 9, (samples, 1))
            raw["attention_mask"] = (np.arange(8) < lengths).astype(np.int64)
        return preprocess(self.bundle.manifest.preprocessing, raw)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled jobs stay inside the session's temporary folder, and none is forgotten there.

    Workers share it: of `pytest -n`, each has its own temporary folder inside the session's.
    """
    from tuning import cache

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLOOM_CACHE", str(folder))
        patch.setattr(cache, "CACHE_ENTRIES", 1000)
        yield folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a vision transformer of 2 layers for grey 8×8 images."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=5,
    )
    _save(ViTForImageClassification(config), folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.3], "image_std": [0.4]}')
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a text transformer of 2 layers with a tokenizer of ten words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    config = BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        num_labels=5,
    )
    _save(BertForSequenceClassification(config), folder)
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a decoder of 2 layers that reads the words of `tiny_bert`."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=12,
        num_labels=5,
        pad_token_id=0,
    )
    _save(LlamaForSequenceClassification(config), folder)
    return folder


def _save(model: Any, folder: Path) -> None:
    """Weights large enough that every part of the network shows in the logits."""
    import torch

    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl folder: 60 texts of three classes, each with a word of its own, by five writers."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(2)
    for part, count in (("train", 60), ("test", 30)):
        lines = []
        for number in range(count):
            label = number % TEXT_CLASSES
            words = [*rng.choice(WORDS[TEXT_CLASSES:], 3), WORDS[label]]
            row = {"text": " ".join(words), "label": f"c{label}", "client": f"w{number % 5}"}
            lines.append(json.dumps(row))
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_job(tiny_vit: Path, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`tiny_job(method, kind="image", optimizer="sgd", settings={}, **sections)` gives a Job.

    All image jobs share batch size, classes and seed, so that they share compiled steps.
    """
    from coordinator.job import Job
    from coordinator.sections import BackboneSection, DataSection, MethodSpec, TrainingSection

    def make(
        method: str = "lora",
        *,
        kind: str = "image",
        optimizer: str = "sgd",
        settings: Mapping[str, Any] | None = None,
        **sections: Any,
    ) -> Any:
        if kind == "image":
            folder = tiny_vit
            data = DataSection(
                dataset="digits",
                clients=5,
                partition="dirichlet:0.5",
                max_train_samples=90,
                max_test_samples=40,
            )
        else:
            folder = request.getfixturevalue("tiny_bert")
            texts = request.getfixturevalue("tiny_texts")
            data = DataSection(dataset=str(texts), clients=5, partition="natural", max_length=8)
        training = TrainingSection(
            optimizer=optimizer,
            learning_rate=0.05 if optimizer == "sgd" else 0.01,
            momentum=0.9 if optimizer == "sgd" else 0.0,
            weight_decay=0.01,
            batch_size=BATCH,
        )
        backbone = BackboneSection(name="", path=str(folder))
        given = {"data": data, "training": training, "backbone": backbone} | sections
        return Job(method=MethodSpec(name=method, settings=settings or {}), **given)

    return make


@pytest.fixture(scope="session")
def private_options(tiny_job: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """What makes a tiny job's samples private: options of `tiny_job`, `make_bundle` and others.

    Jobs that differ in steps and rounds alone share compiled steps.
    """
    from coordinator.example_privacy_section import ExamplePrivacySection
    from coordinator.sections import RoundsSection, UpdateSection

    def make(
        *,
        kind: str = "image",
        optimizer: str = "sgd",
        noise: float = 2.0,
        clip: float = 0.5,
        steps: int = 3,
        rounds: int = 2,
    ) -> dict[str, Any]:
        plain = tiny_job(kind=kind, optimizer=optimizer)
        return {
            "kind": kind,
            "data": dataclasses.replace(plain.data, held_out=0.0),
            "training": dataclasses.replace(plain.training, local_steps=steps, proximal=0.5),
            "update": UpdateSection(metrics=""),
            "rounds": RoundsSection(count=rounds, min_samples=BATCH),
            "example_privacy": ExamplePrivacySection(noise_multiplier=noise, clip=clip, delta=1e-3),
        }

    return make


@pytest.fixture(scope="session")
def make_bundle(
    tiny_job: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    cache_of_the_session: Path,
) -> Callable[..., Made]:
    """As `tiny_job`, compiled, signed and opened; each once a session: not to be written to."""
    import torch

    from coordinator.bundles import recipe_of, write_bundle
    from edge_runtime import open_bundle
    from protocol.signing import new_key, public_key_hex
    from tuning.compiler import compile_recipe

    torch.set_num_threads(1)
    # Its records of every trace are megabytes in what pytest prints of a failed test.
    logging.getLogger("torch.__trace").disabled = True
    known: dict[str, Made] = {}
    key = new_key()

    def make(method: str, *, kind: str = "image", **options: Any) -> Made:
        job = tiny_job(method, kind=kind, **options)
        if job.hash() not in known:
            classes = IMAGE_CLASSES if kind == "image" else TEXT_CLASSES
            recipe = recipe_of(job, classes)
            compiled = compile_recipe(recipe)
            names = [f"c{number}" for number in range(classes)]
            folder = tmp_path_factory.mktemp("bundles") / "bundle"
            write_bundle(job, recipe, compiled, names, key, folder)
            bundle = open_bundle(folder, public_key=public_key_hex(key))
            made = Made(job=job, recipe=recipe, compiled=compiled, bundle=bundle)
            known[job.hash()] = made
        return known[job.hash()]

    return make


@dataclass(frozen=True, kw_only=True)
class MadeSplit(Made):
    """A tiny job whose network is cut: `bundle` is the device's, `split` has both sides."""

    split: Any  # tuning.split_compiler.SplitCompiled
    tuned: Any  # tuning.methods.Tuned, for the engine in torch


@pytest.fixture(scope="session")
def make_split(
    tiny_job: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    cache_of_the_session: Path,
) -> Callable[..., MadeSplit]:
    """`make_split(cut="1+0", kind="image", optimizer="sgd", **split)`, as `make_bundle`."""
    import torch

    from coordinator.bundles import recipe_of, split_spec, write_bundle
    from coordinator.sections import SimulationSection, SplitSection
    from edge_runtime import open_bundle
    from protocol.signing import new_key, public_key_hex
    from tuning.split_compiler import compile_split

    torch.set_num_threads(1)
    logging.getLogger("torch.__trace").disabled = True
    known: dict[str, MadeSplit] = {}
    key = new_key()

    def make(
        cut: str = "1+0", *, kind: str = "image", optimizer: str = "sgd", **split: Any
    ) -> MadeSplit:
        settings = {"cut": cut, "length": 2}
        section = SplitSection(**{"keep": 1.0, "local_epochs": 0, **split})
        job = tiny_job(
            "sfprompt",
            kind=kind,
            optimizer=optimizer,
            settings=settings,
            split=section,
            simulation=SimulationSection(backend="sequential"),
        )
        if job.hash() not in known:
            classes = IMAGE_CLASSES if kind == "image" else TEXT_CLASSES
            recipe = recipe_of(job, classes)
            compiled = compile_split(recipe, lanes=section.lanes)
            spec = split_spec(job, compiled)
            names = [f"c{number}" for number in range(classes)]
            folder = tmp_path_factory.mktemp("bundles") / "bundle"
            write_bundle(job, recipe, compiled.device, names, key, folder, split=spec)
            known[job.hash()] = MadeSplit(
                job=job,
                recipe=recipe,
                compiled=compiled.device,
                bundle=open_bundle(folder, public_key=public_key_hex(key)),
                split=compiled,
                tuned=recipe.build()[1],
            )
        return known[job.hash()]

    return make

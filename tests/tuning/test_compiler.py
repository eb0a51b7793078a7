# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled jobs and what an entry holds; its figures are in test_parity.py."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import uses_external_data
from safetensors.numpy import load_file

from coordinator.sections import TrainingSection
from edge_runtime.session import open_session
from edge_runtime.trainer import OnnxTrainer, initial_state
from edge_runtime.training_loop import TrainingLoop, batch_of
from tuning import cache, compiler
from tuning.compiler import Compiled, cohort_graph, compile_recipe
from tuning.errors import BackboneError, CompileError, MethodError
from tuning.inference import save_predict_weights
from tuning.recipe import Recipe

METHODS = (
    "full", "head", "lora", "lora-sb", "ssf", "adapter", "one-bit-adapter", "one-bit-lora",
    "prompt", "peft:LOHA", "peft:IA3",
)  # fmt: skip
CASES = [
    *((method, "image", "sgd") for method in METHODS),
    *((method, "text", "adamw") for method in ("head", "lora", "ssf", "adapter", "prompt")),
]


def in_process(recipe: Recipe, code: str, **environment: str) -> str:
    """What `code` prints in a process of its own, with `recipe` as R."""
    settings = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(recipe)
        if field.name not in ("training", "backbone", "settings")
    }
    head = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from pathlib import Path\n"
        "from protocol.manifest import TrainingSpec\n"
        "from tuning.recipe import Recipe\n"
        f"spec = TrainingSpec(**{dataclasses.asdict(recipe.training)!r})\n"
        f"R = Recipe(backbone=Path({str(recipe.backbone)!r}), settings={dict(recipe.settings)!r}, "
        f"training=spec, **{settings!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + code],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("method", "kind", "optimizer"), CASES)
def test_predict_equals_the_unfolded_network_when_tensors_are_trained(
    make_tuned: Callable[..., Any],
    logits_of: Callable[..., np.ndarray],
    tmp_path: Path,
    method: str,
    kind: str,
    optimizer: str,
) -> None:
    made = make_tuned(method, kind=kind, optimizer=optimizer)
    folder = tmp_path / "bundle"
    shutil.copytree(made.bundle.folder, folder)
    data = made.data(7)
    inputs = {f"batch/{name}": value for name, value in data.items() if name != "labels"}

    def predict(rows: int) -> np.ndarray:
        session = open_session(folder / "predict.onnx", 1)
        feeds = {name: value[:rows] for name, value in inputs.items()}
        (found,) = session.run(["logits"], feeds)
        return found

    initial = logits_of(made.recipe, made.bundle.initial(), data)
    np.testing.assert_allclose(predict(7), initial, rtol=0, atol=1e-4)

    trained, _ = OnnxTrainer(made.bundle, threads=1).fit(
        made.start(), data, learning_rate=0.02, epochs=2, seed=1
    )
    _, tuned = made.recipe.build()
    save_predict_weights(tuned, trained, folder)
    expected = logits_of(made.recipe, trained, data)
    assert np.abs(expected - initial).max() > 0.05
    for rows in (1, 3, 7):
        np.testing.assert_allclose(predict(rows), expected[:rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["ssf", "lora", "lora-sb", "one-bit-lora", "full", "peft:LOHA"])
def test_folded_graph_is_as_small_as_the_plain_backbone(
    make_tuned: Callable[..., Any], method: str
) -> None:
    def nodes(name: str) -> int:
        path = make_tuned(name).bundle.path("predict")
        return len(onnx.load(path, load_external_data=False).graph.node)

    assert nodes(method) == nodes("head")


@pytest.mark.parametrize("method", ["lora", "lora-sb", "ssf", "full"])
def test_weights_are_stored_once_and_graphs_refer_to_them(
    make_tuned: Callable[..., Any], method: str
) -> None:
    made = make_tuned(method)
    folder = made.bundle.folder
    weights = (folder / "backbone.safetensors").stat().st_size
    for role, files in {
        "train": {"backbone.safetensors"},
        "evaluate": {"backbone.safetensors"},
        "predict": {"backbone.safetensors", "predict.safetensors"},
    }.items():
        graph = onnx.load(folder / f"{role}.onnx", load_external_data=False).graph
        places = {
            entry.value
            for tensor in graph.initializer
            if uses_external_data(tensor)
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places <= files
        inside = [t for t in graph.initializer if not uses_external_data(t)]
        assert sum(tensor.ByteSize() for tensor in inside) < 4_000
    backbone = load_file(folder / "backbone.safetensors")
    trainable = load_file(folder / "initial.safetensors")
    if method == "lora":
        assert places == {"backbone.safetensors", "predict.safetensors"}
        assert weights > 10_000
        # The adapted layers' folded weights lie apart; nothing else is there twice.
        assert set(load_file(folder / "predict.safetensors")) & set(backbone) == set()
    if method == "full":
        assert not backbone, "all weights are trained: none is frozen"
    assert not set(trainable) & set(backbone)


def test_query_features_are_graphs_of_their_own(make_bundle: Callable[..., Any]) -> None:
    training = TrainingSection(learning_rate=0.05, batch_size=4)
    settings = {"elements": 5, "selected": 2}
    made = make_bundle("fedins", settings=settings, training=training)
    graphs = {
        role: onnx.load(made.bundle.path(role), load_external_data=False).graph
        for role in ("evaluate", "features", "answer")
    }
    ports = {role: {port.name for port in graph.input} for role, graph in graphs.items()}
    assert ports["features"] == {"batch/pixel_values"}
    assert ports["answer"] == ports["evaluate"] - {"labels"} | {"features"}
    # Together as much as one graph with both branches, which share the patches' projection.
    products = {
        role: sum(node.op_type in ("MatMul", "Gemm") for node in graph.node)
        for role, graph in graphs.items()
    }
    assert products["features"] + products["answer"] == products["evaluate"] + 1
    folder = made.compiled.folder
    for role in ("features", "answer"):
        places = {
            entry.value
            for tensor in graphs[role].initializer
            if uses_external_data(tensor)
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places == {"backbone.safetensors"}
        assert (folder / f"{role}.onnx").stat().st_size < 200_000


def test_most_methods_have_no_query_features(make_tuned: Callable[..., Any]) -> None:
    assert set(make_tuned("lora").compiled.graphs) == {"train", "evaluate", "predict"}


def test_initial_tensors_fit_what_the_entry_says(make_tuned: Callable[..., Any]) -> None:
    made = make_tuned("lora")
    initial = load_file(made.compiled.folder / "initial.safetensors")
    assert made.compiled.trainable.mismatch(initial) is None
    state = initial_state(made.bundle.manifest, made.start())
    assert set(state) == {f"velocity/{name}" for name in made.compiled.trainable.names}
    assert made.compiled.inputs[0][0] == "pixel_values"
    assert made.compiled.inputs[0][1].shape == (1, 8, 8)
    assert made.compiled.preprocessing.mean == (0.3,)


def test_adamw_keeps_two_moments_and_the_step_count(make_tuned: Callable[..., Any]) -> None:
    made = make_tuned("lora", optimizer="adamw")
    names = set(made.compiled.state.names)
    assert "steps" in names
    assert len(names) == 1 + 2 * len(made.compiled.trainable.names)


def test_cached_job_is_read_without_building_or_torch(
    make_tuned: Callable[..., Any], cache_of_the_session: Path
) -> None:
    made = make_tuned("lora")
    code = (
        "from tuning.compiler import compile_recipe\n"
        "compiled = compile_recipe(R)\n"
        "print(compiled.folder, [n for n in ('torch', 'transformers', 'peft') if n in sys.modules])"
    )
    # The same digest in another process, under another hash seed, and no torch for it.
    assert in_process(made.recipe, code, PYTHONHASHSEED="77") == f"{made.compiled.folder} []"


# LoRA-SB's factors are computed, not drawn.
@pytest.mark.long
@pytest.mark.parametrize("method", ["lora-sb"])
def test_two_compilations_give_the_same_bytes(
    make_tuned: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    made = make_tuned(method)
    code = (
        "warnings.simplefilter('default')\n"
        "from tuning.compiler import compile_recipe, cohort_graph\n"
        "compiled = compile_recipe(R)\n"
        "cohort_graph(compiled, R, 3)\n"
        "print(compiled.folder)\n"
    )
    other = Path(
        in_process(made.recipe, code, PYTHONHASHSEED="5", FEDLOOM_CACHE=str(tmp_path))
        .splitlines()[-1]
    )  # fmt: skip
    assert other != made.compiled.folder and other.name == made.compiled.folder.name
    cohort_graph(made.compiled, made.recipe, 3)
    for name in (*made.compiled.files(), "compiled.json", "cohort-3.onnx"):
        assert (other / name).read_bytes() == (made.compiled.folder / name).read_bytes(), name


def test_digest_changes_with_every_setting_but_those_of_a_plan(
    make_tuned: Callable[..., Any], tiny_vit: Path, tmp_path: Path
) -> None:
    recipe: Recipe = make_tuned("lora").recipe
    training = recipe.training
    same = [
        dataclasses.replace(recipe, training=dataclasses.replace(training, learning_rate=0.7)),
        dataclasses.replace(recipe, training=dataclasses.replace(training, local_epochs=9)),
    ]
    copy = tmp_path / "tiny-vit"
    shutil.copytree(tiny_vit, copy)
    same.append(dataclasses.replace(recipe, backbone=copy))
    assert {other.digest() for other in same} == {recipe.digest()}

    others = [
        dataclasses.replace(recipe, classes=11),
        dataclasses.replace(recipe, seed=1),
        dataclasses.replace(recipe, method="head"),
        dataclasses.replace(recipe, settings={"rank": 2}),
        dataclasses.replace(recipe, settings={"rank": 4}),
        dataclasses.replace(recipe, max_length=9),
        dataclasses.replace(recipe, random_weights=True),
        *(
            dataclasses.replace(recipe, training=dataclasses.replace(training, **change))
            for change in (
                {"batch_size": 5},
                {"optimizer": "adamw", "momentum": 0.0},
                {"momentum": 0.5},
                {"weight_decay": 0.5},
            )
        ),
    ]
    digests = {other.digest() for other in others}
    assert len(digests) == len(others)
    assert recipe.digest() not in digests

    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert dataclasses.replace(recipe, backbone=copy).digest() != recipe.digest()


def test_cache_keeps_the_newest_entries(
    make_tuned: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_tuned("head")
    monkeypatch.setattr(cache, "CACHE_ENTRIES", 3)
    monkeypatch.setattr(
        compiler,
        "_compile_into",
        lambda folder, recipe: shutil.copyfile(
            made.compiled.folder / "compiled.json", folder / "compiled.json"
        ),
    )
    stray = tmp_path / "notes"
    stray.mkdir()
    entries: list[Compiled] = []
    for seed in range(5):
        compiled = compile_recipe(dataclasses.replace(made.recipe, seed=seed), tmp_path)
        entries.append(compiled)
        os.utime(compiled.folder, (1000 + seed, 1000 + seed))
        if seed == 3:
            # Read again, the oldest that is left becomes the newest.
            compile_recipe(dataclasses.replace(made.recipe, seed=1), tmp_path)
    kept = {number for number, entry in enumerate(entries) if entry.folder.is_dir()}
    assert kept == {1, 3, 4}
    assert stray.is_dir(), "what is not an entry is not the cache's to remove"
    assert not list(tmp_path.glob("making-*"))


def test_nothing_is_left_in_the_cache_when_compiling_fails(
    make_tuned: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, recipe: Recipe) -> None:
        (folder / "train.onnx").write_bytes(b"half")
        raise CompileError("no such operation")

    monkeypatch.setattr(compiler, "_compile_into", broken)
    with pytest.raises(CompileError, match="no such operation"):
        compile_recipe(make_tuned("head").recipe, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_are_refused_before_anything_is_made(
    make_tuned: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_tuned("lora").recipe
    with pytest.raises(MethodError, match=r'no setting "rnak"; known: alpha, rank, targets'):
        compile_recipe(dataclasses.replace(recipe, settings={"rnak": 4}), tmp_path / "cache")
    with pytest.raises(BackboneError, match=r"not a Hugging Face folder: it has no config\.json"):
        compile_recipe(dataclasses.replace(recipe, backbone=tmp_path / "none"), tmp_path / "cache")
    left = tmp_path / "cache"
    assert not left.exists() or not any(left.iterdir())


@pytest.mark.parametrize(("method", "optimizer"), [("lora", "sgd"), ("one-bit-adapter", "adamw")])
def test_cohort_graph_equals_single_steps_when_some_clients_idle(
    make_tuned: Callable[..., Any], method: str, optimizer: str
) -> None:
    made = make_tuned(method, optimizer=optimizer)
    names = [name for name, _ in made.bundle.manifest.inputs]
    rate = 0.05 if optimizer == "sgd" else 0.002
    # Client 0 has 3 steps, client 1 has 2 with a ragged last one, place 2 has no client.
    counts = {0: [4, 4, 4], 1: [4, 2, 0], 2: [0, 0, 0]}
    start = {client: made.start(size=0.2 + 0.1 * client) for client in counts}
    data = {client: made.data(12, seed=client) for client in counts}

    def single(client: int, number: int) -> dict[str, np.ndarray]:
        rows = np.arange(4 * number, 4 * number + 4)
        weight = (np.arange(4) < counts[client][number]).astype(np.float32)
        return {**batch_of(data[client], names, rows), "weight": weight}

    def stacked(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    loop = TrainingLoop(cohort_graph(made.compiled, made.recipe, 3), threads=1)
    state = initial_state(made.bundle.manifest, made.start())
    together, losses, _ = loop.run(
        stacked([start[client] for client in counts]),
        stacked([state] * 3) if state else {},
        [stacked([single(client, number) for client in counts]) for number in range(3)],
        rate,
    )
    assert losses.shape == (3, 3)
    alone = TrainingLoop(made.bundle.path("train"), threads=1)
    for client in (0, 1):
        steps = [single(client, n) for n in range(3) if counts[client][n]]
        expected, expected_losses, _ = alone.run(start[client], state, steps, rate)
        np.testing.assert_allclose(losses[: len(steps), client], expected_losses, rtol=0, atol=1e-5)
        for name, value in expected.items():
            np.testing.assert_allclose(together[name][client], value, rtol=0, atol=1e-5)
    assert (losses[:, 2] == 0).all() and losses[2, 1] == 0
    for name, value in start[2].items():
        assert together[name][2].tobytes() == value.tobytes()
    # An idle step changes no bit: two steps alone leave client 1 where three left it.
    twice, _, _ = loop.run(
        stacked([start[client] for client in counts]),
        stacked([state] * 3) if state else {},
        [stacked([single(client, number) for client in counts]) for number in range(2)],
        rate,
    )
    for name, value in twice.items():
        assert value[1].tobytes() == together[name][1].tobytes()


def test_method_without_a_cohort_form_says_what_to_do(make_tuned: Callable[..., Any]) -> None:
    made = make_tuned("peft:OFT")
    with pytest.raises(CompileError, match=r'simulation\.backend = "sequential"'):
        cohort_graph(made.compiled, made.recipe, 2)
    assert not list(made.compiled.folder.glob("cohort-2*"))


def test_entry_says_what_it_is(make_tuned: Callable[..., Any]) -> None:
    made = make_tuned("head")
    info = json.loads((made.compiled.folder / "compiled.json").read_text())
    assert info["backbone"] == made.compiled.backbone == "tiny-vit"
    # embeddings 16 + 5·16 + 16·16 + 16, two blocks of 4·(256 + 16) + 2·32 + 512 + 32 + 512 + 16,
    # the last norm 32, the classifier 170
    blocks = 2 * (4 * 272 + 64 + 544 + 528)
    assert made.compiled.total_parameters == 16 + 80 + 272 + blocks + 32 + 170
    assert made.compiled.trainable.size == 170
    assert made.compiled.step_flops > 4 * 2 * 170

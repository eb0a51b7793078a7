# SPDX-License-Identifier: Apache-2.0
"""A device's environment: the package with its `device` extra alone, in a venv of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.job import load_job
from coordinator.sections import TrainingSection
from simulations.run import build_bundle, simulate

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "train_from_bundle.py"
PREDICT = ROOT / "examples" / "predict_from_bundle.py"
# What pip says when it is the network that is missing, not a package.
OFFLINE = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ProxyError")

OWN_DATA = """
import sys
from client_sdk.data import open_source, prepare
from client_sdk.errors import DataError
from edge_runtime import open_bundle
from edge_runtime.trainer import OnnxTrainer
bundle = open_bundle(sys.argv[1], public_key=None)
data = prepare(bundle.manifest, open_source(sys.argv[2]), held_out=0.2)
trainer = OnnxTrainer(bundle, threads=1)
trainer.fit(bundle.initial(), data.fit, learning_rate=0.01, epochs=1, seed=0)
print(len(data.fit["labels"]), len(data.held_out["labels"]))
try:
    open_source(sys.argv[3])
except DataError as error:
    print(error)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def device_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a venv with `fedloom[device]` from this checkout, and the digits."""
    folder = tmp_path_factory.mktemp("device")
    # A copy: building in the checkout leaves a folder there that later wheels would take in.
    source = folder / "source"
    skipped = shutil.ignore_patterns(".*", "runs", "bench", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skipped)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    command = [
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
        "-c", ROOT / "constraints.txt", f"{source}[device]", "scikit-learn",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode != 0 and any(word in done.stderr for word in OFFLINE):
        pytest.skip("the package registry cannot be reached, so no bare venv can be made")
    assert done.returncode == 0, done.stderr[-3000:]
    return python


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(
        load_job(ROOT / "examples" / "digits-lora.toml"), tmp_path_factory.mktemp("built") / "b"
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    # Two rounds are enough for what the example promises, and one client after the other spares
    # the compilation of a cohort.
    few = ["rounds.count=2", "simulation.backend=sequential"]
    simulate(load_job(ROOT / "examples" / "digits-lora.toml", few), out)
    return out


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory, tiny_job: Callable[..., Any]) -> Path:
    """A bundle whose network chooses of a pool for every image."""
    settings = {"elements": 5, "selected": 2}
    training = TrainingSection(learning_rate=0.05, batch_size=4)
    job = tiny_job("fedins", settings=settings, training=training)
    return build_bundle(job, tmp_path_factory.mktemp("built") / "pool")


def run(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # Started elsewhere and without PYTHONPATH, so that only what is installed can be imported.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        cwd=python.parent,
        env=environment,
        timeout=600,
    )


def test_device_environment_has_no_training_framework(device_python: Path) -> None:
    code = (
        "import importlib.util as u\n"
        "names = ('torch', 'transformers', 'peft', 'onnx', 'onnxscript', 'edge_runtime')\n"
        "print([name for name in names if u.find_spec(name)])\n"
        "import edge_runtime; print(edge_runtime.__file__)\n"
    )
    done = run(device_python, "-c", code)
    assert done.returncode == 0, done.stderr
    found, where = done.stdout.splitlines()
    assert found == "['edge_runtime']"
    assert not where.startswith(str(ROOT))


def test_example_trains_to_what_its_header_promises(device_python: Path, bundle: Path) -> None:
    promised = re.search(r"accuracy at least ([0-9.]+)", EXAMPLE.read_text(encoding="utf-8"))
    assert promised is not None
    signer = (bundle / "signer.pub").read_text(encoding="ascii").strip()
    done = run(device_python, EXAMPLE, bundle, signer)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"^accuracy.* ([0-9.]+)$", done.stdout, re.MULTILINE))
    assert after >= float(promised[1].rstrip(".,")) > before + 0.5


def test_example_trains_nothing_when_the_signer_is_another(
    device_python: Path, bundle: Path
) -> None:
    done = run(device_python, EXAMPLE, bundle, "0" * 64)
    assert done.returncode == 2
    assert done.stderr.startswith("refused: ")
    assert "trained" not in done.stdout


def test_example_trains_nothing_when_a_byte_was_changed(
    device_python: Path, bundle: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    weights = changed / "backbone.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = run(device_python, EXAMPLE, changed)
    assert done.returncode == 2
    assert "backbone.safetensors" in done.stderr


def test_prediction_example_reaches_what_its_header_promises(
    device_python: Path, finished: Path
) -> None:
    promised = re.search(r"accuracy at least ([0-9.]+[0-9])", PREDICT.read_text(encoding="utf-8"))
    assert promised is not None
    done = run(device_python, PREDICT, finished)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"^accuracy.* ([0-9.]+)$", done.stdout, re.MULTILINE))
    assert after >= float(promised[1]) > before + 0.5


def test_command_predicts_for_each_image(device_python: Path, pool: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    arguments = ["device", "predict", pool, tmp_path / "images.npz", "--lame", "--json"]
    done = run(device_python, "-m", "fedloom", *arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["lame"] == "features" and len(document["predictions"]) == 5


def test_own_data_are_trained_on_and_images_in_files_ask_for_pillow(
    device_python: Path, bundle: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.array(["3", "7"] * 5))
    (tmp_path / "folder" / "3").mkdir(parents=True)
    (tmp_path / "folder" / "3" / "a.png").write_bytes(b"")
    places = [bundle, tmp_path / "own.npz", tmp_path / "folder"]
    done = run(device_python, "-c", OWN_DATA, *places)
    assert done.returncode == 0, done.stderr
    counts, told = done.stdout.splitlines()
    assert counts == "8 2"
    assert "expected Pillow to read images; install it with: pip install pillow" in told


@pytest.mark.parametrize("example", [EXAMPLE, PREDICT], ids=lambda path: path.stem)
def test_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 80

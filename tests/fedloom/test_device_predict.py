# SPDX-License-Identifier: Apache-2.0
"""`fedloom device predict` and `fedloom bundle fold`, from a run's directory to classes."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from client_sdk.data.image_folder import read_image
from coordinator.sections import RoundsSection, SimulationSection, TrainingSection
from edge_runtime import open_bundle
from edge_runtime.adapter import Adapter, read_adapter, write_adapter
from edge_runtime.predictor import Predictor
from fedloom.cli import main
from fedloom.errors import BAD_INPUT, DONE
from fedloom.images import read_images
from simulations.run import simulate

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def run_folder(tiny_job: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of FedIns."""
    job = tiny_job(
        "fedins",
        settings={"elements": 5, "selected": 2},
        training=TrainingSection(learning_rate=0.05, batch_size=4),
        rounds=RoundsSection(count=1),
        simulation=SimulationSection(backend="sequential"),
    )
    out = tmp_path_factory.mktemp("runs") / "pool"
    simulate(job, out)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "some.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8))
    return path


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["device", "predict", *map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert code == DONE, printed.err
    document: dict[str, Any] = json.loads(printed.out)
    return document


def rows(document: dict[str, Any]) -> np.ndarray:
    return np.array([row["probabilities"] for row in document["predictions"]])


def test_predict_says_class_and_probability_of_each_image(
    run_folder: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = open_bundle(run_folder / "bundle", public_key=None)
    expected = Predictor(bundle, threads=1).predict(np.load(images)["images"])
    document = predicted(capsys, run_folder / "bundle", images)
    assert [row["image"] for row in document["predictions"]] == [str(n) for n in range(9)]
    assert [row["class"] for row in document["predictions"]] == expected.names
    np.testing.assert_allclose(rows(document), expected.probabilities, rtol=0, atol=1e-5)
    assert document["method"] == "fedins" and document["lame"] == ""
    assert document["class_names"] == list(bundle.manifest.class_names)

    assert main(["device", "predict", str(bundle.folder), str(images)]) == DONE
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "class", "probability"]
    for number, line in enumerate(lines):
        image, name, share = line.split()
        assert (image, name) == (str(number), expected.names[number])
        assert float(share) == pytest.approx(expected.probabilities[number].max(), abs=1e-4)


def test_a_run_s_adapter_predicts_as_its_bundle(
    run_folder: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = predicted(capsys, run_folder / "bundle", images)
    given = predicted(capsys, run_folder / "bundle", images, "--adapter", run_folder / "adapter")
    np.testing.assert_allclose(rows(given), rows(own), rtol=0, atol=1e-4)


def test_own_adapters_are_mixed_in(
    run_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = open_bundle(run_folder / "bundle", public_key=None)
    shared = read_adapter(run_folder / "adapter", bundle)
    rng = np.random.default_rng(2)
    mine = {
        name: value + 0.5 * rng.standard_normal(value.shape, dtype=np.float32)
        for name, value in shared.tensors.items()
    }
    write_adapter(Adapter(tensors=mine), bundle, tmp_path / "own")
    place = (bundle.folder, images, "--own", tmp_path / "own")
    both = (*place, "--adapter", run_folder / "adapter")
    alone = rows(predicted(capsys, *place))
    np.testing.assert_allclose(rows(predicted(capsys, *both, "--mix", "1")), alone, atol=1e-5)
    none = rows(predicted(capsys, *both, "--mix", "0"))
    half = rows(predicted(capsys, *both, "--mix", "0.5"))
    assert np.abs(none - alone).max() > 0.01
    predictor = Predictor(bundle, threads=1)
    tensors = {name: 0.5 * value + 0.5 * shared.tensors[name] for name, value in mine.items()}
    predictor.use(Adapter(tensors=tensors))
    expected = predictor.predict(np.load(images)["images"]).probabilities
    np.testing.assert_allclose(half, expected, rtol=0, atol=1e-4)


def test_lame_says_what_it_looked_at(
    run_folder: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predicted(capsys, run_folder / "bundle", images, "--lame")["lame"] == "features"
    assert main(["device", "predict", str(run_folder / "bundle"), str(images), "--lame"]) == DONE
    assert "by LAME, by the likeness of query features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mix", "0.5"], "give --adapter DIR and --own DIR"),
        (["--own", "a", "--adapter", "b"], "need --mix W"),
        (["--adapter", "nowhere"], "no such file; give the folder adapter/"),
        (["--signer", "0" * 64], "another coordinator"),
    ],
)
def test_options_that_cannot_be_meant_end_with_2(
    run_folder: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    place = [str(run_folder / "bundle"), str(images)]
    assert main(["device", "predict", *place, *arguments]) == BAD_INPUT
    assert words in capsys.readouterr().err


def test_predict_loads_no_training_framework(run_folder: Path, images: Path) -> None:
    """The command with torch and all that needs it made unimportable."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'onnx', 'onnxscript', 'sklearn', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "from fedloom.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["device", "predict", run_folder / "bundle", images, "--lame", "--json"]
    arguments += ["--adapter", run_folder / "adapter"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == DONE, done.stderr
    assert len(json.loads(done.stdout)["predictions"]) == 9


# Folding


def test_a_folded_element_is_the_backbone_s_graph(
    run_folder: Path,
    images: Path,
    make_bundle: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    from coordinator.bundles import recipe_of
    from coordinator.job import load_job
    from edge_runtime import preprocess
    from tuning.methods.fedins import fold_element

    out = tmp_path / "folded"
    assert main(["bundle", "fold", str(run_folder), "--element", "3", "--out", str(out)]) == DONE
    bundle = open_bundle(out, public_key=None)
    assert set(bundle.manifest.graphs) == {"predict"} and not bundle.initial()

    def nodes(path: Path) -> int:
        return len(onnx.load(path, load_external_data=False).graph.node)

    head = make_bundle("head").bundle
    assert nodes(bundle.path("predict")) == nodes(head.path("predict"))

    trained = open_bundle(run_folder / "bundle", public_key=None)
    _, tuned = recipe_of(load_job(run_folder / "job.toml"), 10).build()
    inside = dict(tuned.module.named_parameters())
    adapter = read_adapter(run_folder / "adapter", trained)
    pixels = preprocess(trained.manifest.preprocessing, {"images": np.load(images)["images"]})
    with torch.no_grad():
        for name, value in adapter.tensors.items():
            inside[tuned.trainable[name]].copy_(torch.from_numpy(value))
        batch = {name: torch.from_numpy(value) for name, value in pixels.items()}
        expected = fold_element(tuned.module, 3)(**batch).logits.softmax(dim=-1).numpy()
    found = predicted(capsys, out, images)
    np.testing.assert_allclose(rows(found), expected, rtol=0, atol=1e-4)

    refused = ["device", "predict", str(out), str(images), "--adapter", str(run_folder / "adapter")]
    assert main(refused) == BAD_INPUT
    assert "expected tensors for a backbone with SHA-256" in capsys.readouterr().err


def test_a_fold_without_an_element_keeps_the_choice(
    run_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", "fold", str(run_folder), "--out", str(tmp_path / "b")]) == DONE
    whole, folded = (
        rows(predicted(capsys, place, images)) for place in (run_folder / "bundle", tmp_path / "b")
    )
    np.testing.assert_allclose(folded, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("run", "arguments", "words"),
    [
        ("", ["--element", "5"], "element is 5; the pool has 0 to 4"),
        ("nowhere", [], "expected the directory of a finished run, found no job.toml"),
        ("", ["--out", "."], "holds the run itself"),
    ],
)
def test_what_cannot_be_folded_ends_with_2(
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: str,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(run_folder)
    given = ["bundle", "fold", str(run_folder / run), "--out", str(tmp_path / "x"), *arguments]
    assert main([*given, "--force"]) == BAD_INPUT
    assert words in capsys.readouterr().err
    assert (run_folder / "job.toml").is_file()


# Files of images


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    from PIL import Image

    many = np.random.default_rng(0).integers(0, 256, (3, 5, 4), dtype=np.uint8)
    np.save(tmp_path / "a.npy", many)
    np.savez(tmp_path / "a.npz", images=many, labels=np.arange(3))
    idx = b"\0\0\x08\x03" + struct.pack(">3I", 3, 5, 4) + many.tobytes()
    (tmp_path / "a-idx3-ubyte.gz").write_bytes(gzip.compress(idx))
    for name in ("a.npy", "a.npz", "a-idx3-ubyte.gz"):
        names, (block,) = read_images(tmp_path / name)
        assert names == ["0", "1", "2"]
        np.testing.assert_array_equal(block, many)
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").write_text("")
    Image.fromarray(many[0]).save(folder / "b.png")
    Image.fromarray(np.stack([many[1, :4]] * 3, axis=2)).save(folder / "deep" / "c.png")
    names, blocks = read_images(folder)
    assert names == ["b.png", "deep/c.png"]
    assert [block.shape for block in blocks] == [(1, 5, 4), (1, 4, 4, 3)]
    names, (block,) = read_images(folder / "b.png")
    assert names == ["b.png"]
    np.testing.assert_array_equal(block[0], read_image(folder / "b.png"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.npz", "no such file or folder"),
        ("notes.txt", "expected a folder of images or one of .npz, .npy, IDX"),
        ("other.npz", 'expected an array "images", found pictures'),
        ("flat.npy", r"found uint8 \[3, 4\]"),
        ("pickle.npy", "expected a numpy file of numbers"),
        ("broken.npz", "expected a numpy file of numbers"),
        ("bad-idx3-ubyte", "IDX magic number"),
        ("empty", "found an empty folder"),
    ],
)
def test_files_of_other_things_end_with_2(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    import re

    (tmp_path / "notes.txt").write_text("words")
    np.savez(tmp_path / "other.npz", pictures=np.zeros((2, 8, 8), np.uint8))
    np.save(tmp_path / "flat.npy", np.zeros((3, 4), np.uint8))
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "bad-idx3-ubyte").write_bytes(b"nothing of the kind")
    (tmp_path / "empty").mkdir()
    place = str(run_folder / "bundle")
    assert main(["device", "predict", place, str(tmp_path / name)]) == BAD_INPUT
    assert re.search(words, capsys.readouterr().err)

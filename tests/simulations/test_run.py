# SPDX-License-Identifier: Apache-2.0
"""Whole runs: what they leave behind, and how they go on after being cut off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.job import load_job
from coordinator.journal import Journal
from coordinator.sections import RoundsSection, SimulationSection, UpdateSection
from edge_runtime import open_bundle, preprocess
from edge_runtime.session import open_session
from protocol.signing import new_key, public_key_hex
from reports.run_record import SUMMARY_KEYS, read_run
from simulations.datasets import load_dataset
from simulations.errors import RunFolderError
from simulations.progress import SilentProgress
from simulations.run import build_bundle, simulate

ROUNDS = RoundsSection(count=4, evaluate_every=2, evaluate_clients_every=2)
COHORT = SimulationSection(cohort_size=2)


@pytest.fixture(scope="module")
def finished(
    tiny_job: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, dict[str, Any]]:
    """A finished run: its job, its folder, its summary."""
    job = tiny_job("lora", rounds=ROUNDS, simulation=COHORT)
    out = tmp_path_factory.mktemp("runs") / "a" / "b"
    return job, out, simulate(job, out)


def test_run_leaves_every_file_of_its_directory(finished: Any) -> None:
    _, out, summary = finished
    assert {path.name for path in out.iterdir()} == {
        "job.toml", "bundle", "journal.sqlite", "metrics.jsonl", "adapter", "summary.json",
        "report.html",
    }  # fmt: skip
    assert {path.name for path in (out / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "</html>" in (out / "report.html").read_text()


def test_summary_has_the_figures_of_the_run(finished: Any) -> None:
    job, out, summary = finished
    assert set(SUMMARY_KEYS) <= set(summary)
    assert summary["method"] == "lora" and summary["backbone"] == "tiny-vit"
    assert summary["dataset"] == "digits" and summary["rounds"] == 4
    assert summary["job"] == job.hash()
    assert summary["privacy"] == {}
    assert "ifferential privacy" not in (out / "report.html").read_text()
    assert summary["rejections"] == 0 and summary["rejection_reasons"] == {}
    assert 0 <= summary["accuracy"] <= 1
    assert summary["clients"] == len(summary["per_client"])
    held = sum(client["samples"] + client["held_out"] for client in summary["per_client"])
    assert held == 90
    for client in summary["per_client"]:
        assert sum(client["labels"]) == client["samples"] + client["held_out"]
        assert (client["accuracy"] is None) is (client["held_out"] == 0)
    assert summary["trainable_parameters"] == 170 + 4 * 2 * 8 * 16
    record = read_run(out)
    assert [line.round for line in record.rounds] == [1, 2, 3, 4]
    assert [line.accuracy is None for line in record.rounds] == [True, False, True, False]
    assert summary["uplink_bytes"] == sum(line.uplink_bytes for line in record.rounds)
    assert summary["accuracy"] == record.rounds[-1].accuracy


def test_job_in_the_directory_is_the_job(finished: Any) -> None:
    job, out, _ = finished
    assert load_job(out / "job.toml") == job


def test_bundle_verifies_and_predicts_with_the_trained_adapter(finished: Any) -> None:
    _, out, summary = finished
    bundle = open_bundle(out / "bundle", public_key=None)
    dataset = load_dataset("digits", seed=0, max_train=90, max_test=40)
    data = preprocess(bundle.manifest.preprocessing, dataset.test)
    session = open_session(bundle.path("predict"), 1)
    (scores,) = session.run(["logits"], {"batch/pixel_values": data["pixel_values"]})
    accuracy = float((scores.argmax(axis=1) == data["labels"]).mean())
    assert accuracy == pytest.approx(summary["accuracy"], abs=1e-6)


def test_adapter_opens_in_peft_with_the_same_logits(
    finished: Any, tiny_vit: Path, make_bundle: Callable[..., Any]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import ViTForImageClassification

    _, out, _ = finished
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True
    base = ViTForImageClassification.from_pretrained(
        tiny_vit, num_labels=10, ignore_mismatched_sizes=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    data = make_bundle("lora").data(6)
    with torch.no_grad():
        expected = model(torch.from_numpy(data["pixel_values"])).logits.numpy()
    session = open_session(out / "bundle" / "predict.onnx", 1)
    (found,) = session.run(["logits"], {"batch/pixel_values": data["pixel_values"]})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_bytes_are_those_of_the_blobs(
    tiny_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simulations.backends.cohort import CohortClients

    sent: dict[str, list[int]] = {"down": [], "up": []}
    real = CohortClients.serve

    def listening(self: Any, work: Any) -> Any:
        fits = {name for name, kind, _ in work if kind == "fit"}
        sent["down"] += [len(blob) for _, kind, blob in work if kind == "fit"]
        for name, answer in real(self, work):
            if name in fits:
                sent["up"].append(len(answer))
            yield name, answer

    monkeypatch.setattr(CohortClients, "serve", listening)
    job = tiny_job("lora", rounds=RoundsSection(count=2), simulation=COHORT,
                   update=UpdateSection(codec="one-bit"))  # fmt: skip
    summary = simulate(job, tmp_path / "out")
    assert summary["uplink_bytes"] == sum(sent["up"])
    assert summary["downlink_bytes"] == sum(sent["down"])
    assert summary["uplink_bytes"] < summary["downlink_bytes"] / 4
    assert summary["rejections"] == 0


class CutOff(SilentProgress):
    def round(self, report: Any) -> None:
        if report.round == 2:
            raise KeyboardInterrupt


def test_run_that_was_cut_off_goes_on_to_the_same_bits(
    finished: Any, tiny_job: Callable[..., Any], tmp_path: Path
) -> None:
    job, out, summary = finished
    with pytest.raises(KeyboardInterrupt):
        simulate(job, tmp_path / "cut", progress=CutOff())
    assert not (tmp_path / "cut" / "summary.json").exists()
    with Journal(tmp_path / "cut" / "journal.sqlite") as journal:
        assert len(list(journal.reports(job.hash()))) == 2
    resumed = simulate(job, tmp_path / "cut")
    expected = load_file(out / "adapter" / "adapter_model.safetensors")
    found = load_file(tmp_path / "cut" / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.tobytes() == expected[name].tobytes(), name
    for key in ("accuracy", "loss", "uplink_bytes", "rounds", "per_client"):
        assert resumed[key] == summary[key]
    open_bundle(tmp_path / "cut" / "bundle", public_key=None)


def test_folder_of_another_job_is_refused_and_left_as_it_is(
    finished: Any, tiny_job: Callable[..., Any]
) -> None:
    _, out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = tiny_job("lora", rounds=RoundsSection(count=3), simulation=COHORT)
    with pytest.raises(RunFolderError, match=r"holds a run of another job.*job\.toml"):
        simulate(other, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_clients_without_samples_are_listed(tiny_job: Callable[..., Any], tmp_path: Path) -> None:
    from coordinator.sections import DataSection

    data = DataSection(
        dataset="digits", clients=8, partition="dirichlet:0.02", max_train_samples=30,
        max_test_samples=20,
    )  # fmt: skip
    job = tiny_job("lora", data=data, rounds=RoundsSection(count=1), simulation=COHORT)
    summary = simulate(job, tmp_path / "out")
    skipped = summary["skipped_clients"]
    assert skipped and summary["clients"] == 8 - len(skipped)
    assert all(reason == "the partition gave it no examples" for _, reason in skipped)
    assert any("are skipped" in note for note in summary["notes"])
    assert skipped[0][0] in (tmp_path / "out" / "report.html").read_text()


def test_rejections_are_counted_and_the_run_goes_on(
    tiny_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simulations.backends import play

    real = play.prepare

    def spoilt(client: Any, *others: Any) -> Any:
        prepared = real(client, *others)
        if client.id == "client-0001":
            prepared.fit["pixel_values"][:] = np.nan
        return prepared

    monkeypatch.setattr(play, "prepare", spoilt)
    job = tiny_job("lora", rounds=RoundsSection(count=2), simulation=COHORT)
    summary = simulate(job, tmp_path / "out")
    assert summary["rejections"] == 2
    assert summary["rejection_reasons"] == {"E210": 2}
    assert summary["accuracy"] is not None
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["rejections"][0]["client"] for line in lines] == ["client-0001"] * 2


def test_method_that_peft_has_not_is_exported_under_its_own_names(
    tiny_job: Callable[..., Any], tmp_path: Path
) -> None:
    job = tiny_job("head", rounds=RoundsSection(count=1),
                   simulation=SimulationSection(backend="sequential"))  # fmt: skip
    simulate(job, tmp_path / "out")
    adapter = tmp_path / "out" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config == {
        "fedloom_method": "head", "settings": {}, "base_model_name_or_path": "tiny-vit", "seed": 0,
    }  # fmt: skip
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert set(tensors) == {"classifier.weight", "classifier.bias"}


def test_bundle_is_built_without_a_run(tiny_job: Callable[..., Any], tmp_path: Path) -> None:
    key = new_key()
    folder = build_bundle(tiny_job("lora"), tmp_path / "b", key)
    bundle = open_bundle(folder, public_key=public_key_hex(key))
    assert bundle.manifest.class_names == tuple("0123456789")

# SPDX-License-Identifier: Apache-2.0
"""Images are read back from updates of a tiny network where they can be, and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulations.audits.inversion import (
    CONTROL,
    Attacked,
    Effort,
    Network,
    Pictures,
    attacks_on,
    inferred_label,
    inversion_audit,
    inversion_figures,
    invert,
    load_pictures,
    matched,
    mean_update,
    noised,
    pictures_of,
    psnr_db,
    solved,
    ssim,
)
from simulations.progress import SilentProgress

CLASSES = 4
EFFORT = Effort(victims=2, restarts=1, steps=40, summed=(16,), noises=(1.0,))


@pytest.fixture(scope="module")
def pictures(tiny_vit: Path) -> Pictures:
    """Images that are a class's own with as much beside it, and class means of others."""
    rng = np.random.default_rng(0)
    middles = rng.uniform(80, 176, (CLASSES, 1, 1))

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % CLASSES
        own = rng.uniform(-60, 60, (count, 4, 4)).repeat(2, axis=1).repeat(2, axis=2)
        return (middles[labels] + own).astype(np.uint8), labels

    return pictures_of(drawn(20), drawn(200), count=16, backbone=tiny_vit, name="squares")


@pytest.fixture(scope="module")
def networks(tiny_vit: Path) -> dict[str, Network]:
    return {name: Network(name, tiny_vit, classes=CLASSES) for name in (CONTROL, "ssf", "lora")}


@pytest.fixture(scope="module")
def found(networks: dict[str, Network], pictures: Pictures) -> dict[str, dict[str, Attacked]]:
    return {
        name: attacks_on(networks[name], pictures, EFFORT, control=name == CONTROL)
        for name in (CONTROL, "ssf")
    }


def test_an_update_is_the_gradient_of_the_step(
    networks: dict[str, Network], pictures: Pictures
) -> None:
    import torch

    network = networks["ssf"]
    update = network.update(pictures.images[:3], pictures.labels[:3])
    one = network.gradients(
        torch.from_numpy(pictures.images[None, :3]), torch.from_numpy(pictures.labels[None, :3])
    )
    for name, value in update.items():
        expected = -0.1 * one[name][0].numpy()
        np.testing.assert_allclose(value.reshape(-1), expected, atol=2e-6)


def test_clients_of_one_image_are_one_client_of_all(
    networks: dict[str, Network], pictures: Pictures
) -> None:
    network = networks["ssf"]
    images, labels = pictures.images[:4], pictures.labels[:4]
    alone = [network.update(images[i : i + 1], labels[i : i + 1]) for i in range(4)]
    for name, value in network.update(images, labels).items():
        np.testing.assert_allclose(mean_update(alone)[name], value, atol=2e-6)


@pytest.mark.parametrize("name", [CONTROL, "ssf", "lora"])
def test_the_label_is_read_from_the_update(
    name: str, networks: dict[str, Network], pictures: Pictures
) -> None:
    network = networks[name]
    updates = [
        network.update(pictures.images[i : i + 1], pictures.labels[i : i + 1]) for i in range(6)
    ]
    assert [inferred_label(network, one) for one in updates] == pictures.labels[:6].tolist()


def test_the_positive_control_leaks_the_image_itself(
    networks: dict[str, Network], pictures: Pictures
) -> None:
    network = networks[CONTROL]
    update = network.update(pictures.images[:1], pictures.labels[:1])
    assert psnr_db(solved(network, update)[None], pictures.images[:1])[0] > 60
    # ... and not from a mean, nor through noise
    both = network.update(pictures.images[:2], pictures.labels[:2])
    assert psnr_db(solved(network, both)[None], pictures.images[:1])[0] < 20
    hidden = noised(update, 1.0, np.random.default_rng(0))
    assert psnr_db(solved(network, hidden)[None], pictures.images[:1])[0] < 20


def test_matching_leaks_from_one_client_and_not_from_many_or_through_noise(
    found: dict[str, dict[str, Attacked]], pictures: Pictures
) -> None:
    guess = pictures.guesses[pictures.labels[:2]]
    blind = psnr_db(guess, pictures.images[:2]).mean()
    assert found[CONTROL]["alone"].psnr_db.min() > blind + 20
    assert found[CONTROL]["matching"].psnr_db.mean() > blind + 1.5
    assert found["ssf"]["sum16"].psnr_db.mean() < blind + 1
    assert found["ssf"]["noise1"].psnr_db.mean() < blind + 1


def test_figures_hold_where_the_control_leaks_and_noise_hides(
    found: dict[str, dict[str, Attacked]], pictures: Pictures, tmp_path: Path
) -> None:
    figures = {made.name: made for made in inversion_figures(found, pictures, EFFORT)}
    assert figures["inversion_psnr_db_full"].holds is True
    assert figures["inversion_psnr_db_ssf_noise1"].holds is True
    assert figures["inversion_psnr_db_ssf"].holds is None
    assert "squares" in figures["inversion_psnr_db_guess"].note
    swapped = {
        CONTROL: {**found[CONTROL], "alone": found["ssf"]["noise1"]},
        "ssf": {**found["ssf"], "noise1": found[CONTROL]["alone"]},
    }
    figures = {made.name: made for made in inversion_figures(swapped, pictures, EFFORT)}
    assert figures["inversion_psnr_db_full"].holds is False
    assert figures["inversion_psnr_db_ssf_noise1"].holds is False


def test_of_several_restarts_the_best_fit_is_given_back(
    networks: dict[str, Network], pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from simulations.audits import inversion

    network = networks["ssf"]
    updates = [
        network.update(pictures.images[i : i + 1], pictures.labels[i : i + 1]) for i in (0, 1)
    ]
    seen: list[torch.Tensor] = []
    distances = inversion._distances

    def noted(*inputs: Any) -> torch.Tensor:
        seen.append(distances(*inputs).detach())
        return distances(*inputs)

    monkeypatch.setattr(inversion, "_distances", noted)
    labels = pictures.labels[:2, None]
    images = invert(
        network, updates, labels, pictures.guesses,
        steps=5, restarts=3, rng=np.random.default_rng(1),
    )  # fmt: skip
    final = seen[-1].reshape(3, 2)
    gradients = network.gradients(torch.from_numpy(images), torch.from_numpy(labels))
    for number in range(2):
        one = {name: value[number : number + 1] for name, value in gradients.items()}
        wanted = {
            n: torch.from_numpy(-value.reshape(1, -1)) for n, value in updates[number].items()
        }
        start = network.gradients(
            torch.from_numpy(pictures.guesses[labels]), torch.from_numpy(labels)
        )
        longest = max(float(value.norm(dim=1).max()) for value in start.values())
        used = [n for n, v in start.items() if float(v.norm(dim=1).max()) > 1e-5 * longest]
        fits = float(distances(one, wanted, used, longest)[0])
        assert fits == pytest.approx(float(final[:, number].min()), abs=1e-3)


def test_noise_is_as_long_as_its_multiple_of_the_norm(networks: dict[str, Network]) -> None:
    update = {"a": np.full(5_000, 0.1, np.float32), "b": np.zeros((50, 100), np.float32)}
    noise = noised(update, 0.5, np.random.default_rng(0))
    norm = math.sqrt(5_000 * 0.01)
    assert (noise["a"] - update["a"]).std() == pytest.approx(0.5 * norm, rel=0.05)
    assert noise["b"].std() == pytest.approx(0.5 * norm, rel=0.05)
    assert noised(update, 0.0, np.random.default_rng(0))["a"].tolist() == update["a"].tolist()


def test_images_are_given_to_those_that_they_are_nearest_to() -> None:
    images = np.random.default_rng(0).uniform(size=(5, 1, 8, 8)).astype("f4")
    order = [3, 0, 4, 1, 2]
    np.testing.assert_array_equal(matched(images[order], images), images)


def test_psnr_is_in_decibels() -> None:
    images = np.full((2, 1, 8, 8), 0.2)
    found = np.stack([images[0], np.full((1, 8, 8), 0.3)])
    assert psnr_db(found, images).tolist() == [math.inf, pytest.approx(20.0)]


def test_ssim_is_that_of_its_windows_one_by_one() -> None:
    rng = np.random.default_rng(3)
    found, images = rng.uniform(size=(2, 2, 1, 9, 8))
    values = []
    for i in range(3):
        for j in range(2):
            a, b = (part[1, 0, i : i + 7, j : j + 7].reshape(-1) for part in (found, images))
            covariance = np.cov(a, b, bias=True)
            top = (2 * a.mean() * b.mean() + 1e-4) * (2 * covariance[0, 1] + 9e-4)
            bottom = (a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (a.var() + b.var() + 9e-4)
            values.append(top / bottom)
    assert ssim(found, images)[1] == pytest.approx(np.mean(values))
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])
    assert ssim(found, images)[0] < 0.5


def test_the_whole_audit_runs_and_is_drawn(
    tiny_vit: Path, pictures: Pictures, tmp_path: Path
) -> None:
    effort = Effort(victims=3, restarts=1, steps=1, summed=(2,), noises=(0.01,))
    audited = inversion_audit(
        SilentProgress(), quick=True, backbone=tiny_vit, pictures=pictures, effort=effort
    )
    names = {made.name for made in audited.figures}
    assert {"inversion_psnr_db_full", "inversion_psnr_db_prompt_noise0p01"} <= names
    assert "inversion_psnr_db_lora_sum2" in names
    assert all("QUICK" in made.note for made in audited.figures)
    audited.draw(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_fashion_mnist_digits_are_attacked(
    tiny_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simulations.datasets import fashion_mnist

    def missing(*, split: str) -> None:
        raise FileNotFoundError(split)

    monkeypatch.setattr(fashion_mnist, "load_fashion_mnist", missing)
    pictures = load_pictures(12, tiny_vit)
    assert pictures.name == "digits" and pictures.labels.tolist() == [*range(10), 0, 1]
    assert pictures.images.shape == (12, 1, 8, 8) and pictures.guesses.shape == (10, 1, 8, 8)
    assert not np.array_equal(pictures.images[0], pictures.images[10])


@pytest.mark.parametrize("wrong", [{"victims": 0}, {"restarts": 0}, {"steps": 0}, {"summed": (0,)}])
def test_an_effort_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected 1"):
        Effort(**wrong)

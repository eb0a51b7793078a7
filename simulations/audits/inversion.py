# SPDX-License-Identifier: Apache-2.0
"""Can training images be read back from an update? Gradients are inverted to see.

After one step of plain sgd a client's update is -rate·gradient, so that whoever sees it and knows
the network holds the gradient of the client's images. The attacker looks for images x with the
same gradient:

    minimise over x   mean over tensors of (1 - cos(∇ₖL(x, y), gₖ))  +  w·TV(x)

by Adam from a public guess, the mean image of the label's class. Labels y are read from the
classifier's gradient where there is one image (its bias falls for the true class alone), and given
to the attacker where there are several. That guess is the baseline: an attack that ends no nearer
to the image has learned nothing from the update but the label.

What is attacked: one client's update of one image; the mean of n clients of one image each, which
is all that secure aggregation shows, and is to the bit one client with n images in its step; and
one client's update with noise of a multiple of its norm, which is what somebody who knows all other
updates finds in a sum with central noise, or a server that knows all other clients' in one with
distributed noise.

Fine-tuning of the whole network is the positive control, and needs no search: the gradient of the
position embeddings is δ_p, what reaches each patch p of a single image, and that of the patch
embedding is Σ_p δ_p·x_pᵀ, which least squares solve for the patches x_p.

*Source* Geiping, Bauermeister, Dröge, Moeller, "Inverting Gradients", NeurIPS 2020 (arXiv
2003.14053): cosine distance, total variation, Adam; Zhao, Mopuri, Bilen 2020 (arXiv 2001.02610),
for the label; Lu et al., "APRIL", CVPR 2022 (arXiv 2112.14087), for the solution by position
embeddings.
*Differs from source* the cosine is taken tensor by tensor and averaged: here one tensor (the
classifier's weight) holds most of a gradient's length, and a cosine of everything at once is blind
to the rest. The start is a public guess and not noise; from noise no restart came near an image.
*Cost* one forward and two backward passes a step, for all images of all restarts at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from protocol.manifest import TrainingSpec
from protocol.tensors import Tensors
from simulations.audits.audited import Audited
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import labelled, torch_threads
from simulations.progress import ProgressListener

if TYPE_CHECKING:
    import torch

METHODS: Final = ("ssf", "lora", "prompt")
CONTROL: Final = "full"
LEAST_NOISE: Final = 1.0  # of one release, in clipping norms: ε = 4.4 at δ = 1e-5
LEAKS_DB: Final = 10.0  # the positive control is at least so much nearer than the guess
HIDES_DB: Final = 1.0  # what is hidden comes at most so much nearer

RATE: Final = 0.1  # of the client's step; the attacker knows it
SMOOTHNESS: Final = 0.01  # w
ATTACK_RATE: Final = 0.1
# A tensor whose gradient is so much smaller than the largest does not depend on the images.
_NEGLIGIBLE: Final = 1e-5
_WINDOW: Final = 7  # of SSIM, pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How hard the attacker tries."""

    victims: int = 6
    restarts: int = 2  # of a single client's update; others are tried once
    steps: int = 300
    summed: tuple[int, ...] = (4, 16)  # clients in a mean
    noises: tuple[float, ...] = (0.01, LEAST_NOISE)  # noise multipliers

    def __post_init__(self) -> None:
        for name in ("victims", "restarts", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        if self.summed and min(self.summed) < 1:
            raise ValueError(f"summed: expected 1 client or more, found {self.summed}")


QUICK: Final = Effort(victims=2, restarts=1, steps=60, summed=(4,), noises=(LEAST_NOISE,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Private images and what is public about them, all of 0 to 1 as the network sees them."""

    images: np.ndarray  # float32 [n, C, S, S]
    labels: np.ndarray  # int64 [n]
    guesses: np.ndarray  # float32 [classes, C, S, S]: the mean public image of each class
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """Images read back from one kind of update."""

    images: np.ndarray  # [victims, C, S, S], as the attacker has them
    psnr_db: np.ndarray  # [victims]
    ssim: np.ndarray  # [victims]


class Network:
    """A backbone with a method's tensors, as client and attacker hold it."""

    def __init__(self, method: str, backbone: str | Path, *, classes: int, seed: int = 0) -> None:
        from tuning.backbones import load_backbone
        from tuning.methods import method_named

        self.backbone = load_backbone(backbone, classes=classes, seed=seed)
        self.tuned = method_named(method, {}).attach(self.backbone, seed=seed)
        self.start = self.tuned.parameters()
        self.frozen = self.tuned.frozen()
        self.bias = next(n for n in self.start if n == f"{self.backbone.classifier}.bias")

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Images of 0 to 1 as the network wants them, [..., C, S, S]."""
        import torch

        pre = self.backbone.preprocessing
        mean, std = (torch.tensor(part).reshape(-1, 1, 1) for part in (pre.mean, pre.std))
        return (images - mean) / std

    def update(self, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """What one client's round of one step changes, by the step that devices run."""
        import torch

        from tuning.step import initial_state, training_step

        spec = TrainingSpec(batch_size=len(labels), optimizer="sgd", learning_rate=RATE)
        trained, _, _ = training_step(self.tuned, spec)(
            self.start,
            initial_state(self.tuned, spec),
            self.frozen,
            {"pixel_values": self.normalised(torch.from_numpy(images))},
            torch.from_numpy(labels),
            torch.ones(len(labels)),
            torch.tensor(RATE),
        )
        return {n: (value - self.start[n]).detach().numpy() for n, value in trained.items()}

    def gradients(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of every update by itself: images [k, n, C, S, S], labels [k, n] -> [k, values]."""
        from torch.func import grad, vmap

        from tuning.step import answer, cross_entropies

        def loss(tensors: Any, batch: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            found = answer(self.tuned, tensors, self.frozen, {"pixel_values": batch})
            return self.tuned.sample_loss(cross_entropies(found.logits, wanted), found).mean()

        found = vmap(grad(loss), in_dims=(None, 0, 0))(self.start, self.normalised(images), labels)
        return {name: value.flatten(1) for name, value in found.items()}


def inferred_label(network: Network, update: Tensors) -> int:
    """The label of the one image that an update is of: the only class whose bias rose."""
    return int(np.argmax(update[network.bias]))


def mean_update(updates: Sequence[Tensors]) -> dict[str, np.ndarray]:
    """What a secure sum shows of several clients, over their number."""
    return {name: np.mean([one[name] for one in updates], axis=0) for name in updates[0]}


def noised(update: Tensors, multiplier: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The update, which is as long as the clipping norm, with noise of a multiple of that."""
    length = math.sqrt(sum(float(np.square(value).sum()) for value in update.values()))
    return {
        name: (value + multiplier * length * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in update.items()
    }


def invert(
    network: Network,
    updates: Sequence[Tensors],
    labels: np.ndarray,
    guesses: np.ndarray,
    *,
    steps: int,
    restarts: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Images whose gradients look like the updates: float32 [k, n, C, S, S], of 0 to 1.

    Args:
        network: with the tensors that the updates start from.
        updates: k of them, each the mean over n images.
        labels: of the images, [k, n].
        guesses: the public image of each class.
        steps: of Adam.
        restarts: the first from the guess itself, others from the guess with noise; the one whose
            gradient fits best is given back, as the attacker cannot know which image does.
        rng: draws the noise of restarts.
    """
    import torch

    k = len(updates)
    wanted = {
        name: torch.stack([torch.from_numpy(-one[name].reshape(-1)) for one in updates])
        for name in network.start
    }
    repeated = {name: value.repeat(restarts, 1) for name, value in wanted.items()}
    targets = torch.from_numpy(labels).repeat(restarts, 1)
    start = np.tile(guesses[labels], (restarts, 1, 1, 1, 1))
    start[k:] += 0.2 * rng.standard_normal(start[k:].shape)
    # Through a sigmoid images stay between 0 and 1.
    inner = torch.logit(torch.from_numpy(start).float().clamp(0.02, 0.98)).requires_grad_(True)
    with torch.no_grad():
        first = network.gradients(torch.sigmoid(inner), targets)
    lengths = {name: float(value.norm(dim=1).max()) for name, value in first.items()}
    longest = max(lengths.values())
    used = [name for name, length in lengths.items() if length > _NEGLIGIBLE * longest]

    optimizer = torch.optim.Adam([inner], lr=ATTACK_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        images = torch.sigmoid(inner)
        found = network.gradients(images, targets)
        distances = _distances(found, repeated, used, longest)
        # Updates do not touch each other: the gradient of a sum is each one's own.
        (distances.sum() + SMOOTHNESS * _variation(images).sum()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        images = torch.sigmoid(inner)
        distances = _distances(network.gradients(images, targets), repeated, used, longest)
    best = distances.reshape(restarts, k).argmin(dim=0)
    kept = images.reshape(restarts, k, *images.shape[1:])[best, torch.arange(k)]
    return np.asarray(kept.numpy())


def solved(network: Network, update: Tensors) -> np.ndarray:
    """The one image that an update of the whole network is of, float32 [C, S, S], by least squares.

    Exact where there are no more patches than values of an embedding.
    """
    from tuning.backbones.patches import PatchProjection

    family = network.backbone.family
    assert family is not None
    inside = network.backbone.model.get_submodule(family.embeddings)
    path, projection = next(
        (path, part) for path, part in inside.named_modules() if isinstance(part, PatchProjection)
    )
    reaching = -update[f"{family.embeddings}.position_embeddings"][0, 1:].astype(np.float64)
    weight = -update[f"{family.embeddings}.{path}.weight"].astype(np.float64)
    patches = np.linalg.lstsq(reaching.T, weight.reshape(len(weight), -1), rcond=None)[0]
    _, channels, patch, _ = projection.weight.shape
    side = math.isqrt(len(patches))
    grid = patches.reshape(side, side, channels, patch, patch).transpose(2, 0, 3, 1, 4)
    pre = network.backbone.preprocessing
    mean, std = (np.reshape(part, (-1, 1, 1)) for part in (pre.mean, pre.std))
    image = grid.reshape(channels, side * patch, side * patch) * std + mean
    return np.clip(image, 0, 1).astype(np.float32)


def matched(found: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The found images in the order of those that they are nearest to, each used once.

    The mean of several images' gradients does not say which is which; the pairing that is best for
    the attacker is taken.
    """
    from scipy.optimize import linear_sum_assignment

    flat = found.reshape(len(found), -1), images.reshape(len(images), -1)
    errors = np.square(flat[0][:, None] - flat[1][None]).mean(axis=2)
    rows, columns = linear_sum_assignment(errors)
    return found[rows[np.argsort(columns)]]


def psnr_db(found: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image of 0 to 1, dB [n]; infinite for the same image."""
    errors = np.square(found - images).reshape(len(images), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        ratios: np.ndarray = -10 * np.log10(errors)
    return ratios


def ssim(found: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Structural similarity of each image [n, C, S, S] of 0 to 1: 1 for the same, about 0 for none.

    *Source* Wang, Bovik, Sheikh, Simoncelli 2004, with uniform windows of 7 pixels.
    """
    size = (1, 1, _WINDOW, _WINDOW)
    first, second = (
        np.lib.stride_tricks.sliding_window_view(part.astype(np.float64), size)
        for part in (found, images)
    )
    axes = (-4, -3, -2, -1)
    mean_1, mean_2 = first.mean(axis=axes), second.mean(axis=axes)
    var_1, var_2 = first.var(axis=axes), second.var(axis=axes)
    both = (first * second).mean(axis=axes) - mean_1 * mean_2
    low, high = 0.01**2, 0.03**2
    similar = (2 * mean_1 * mean_2 + low) * (2 * both + high)
    similar /= (mean_1**2 + mean_2**2 + low) * (var_1 + var_2 + high)
    return np.asarray(similar.reshape(len(images), -1).mean(axis=1))


def attacks_on(
    network: Network, pictures: Pictures, effort: Effort, *, control: bool, seed: int = 0
) -> dict[str, Attacked]:
    """The victims' images as they are read back from each kind of update, by its name.

    `control`: of a single client's update alone, by solving for it, and as of other methods.
    """
    rng = np.random.default_rng(seed)
    victims = effort.victims
    single = [
        network.update(pictures.images[i : i + 1], pictures.labels[i : i + 1])
        for i in range(max(victims, *effort.summed))
    ]

    def scored(found: np.ndarray, images: np.ndarray) -> Attacked:
        return Attacked(images=found, psnr_db=psnr_db(found, images), ssim=ssim(found, images))

    def read(updates: Sequence[Tensors], labels: np.ndarray, restarts: int = 1) -> np.ndarray:
        return invert(
            network, updates, labels, pictures.guesses,
            steps=effort.steps, restarts=restarts, rng=rng,
        )  # fmt: skip

    known = np.array([[inferred_label(network, one)] for one in single[:victims]])
    images = read(single[:victims], known, restarts=effort.restarts)[:, 0]
    found = {"alone": scored(images, pictures.images[:victims])}
    if control:
        images = np.stack([solved(network, one) for one in single[:victims]])
        return {"alone": scored(images, pictures.images[:victims]), "matching": found["alone"]}
    for count in effort.summed:
        images = read([mean_update(single[:count])], pictures.labels[None, :count])[0]
        ordered = matched(images, pictures.images[:count])
        shown = min(count, victims)
        found[f"sum{count}"] = scored(ordered[:shown], pictures.images[:shown])
    for multiplier in effort.noises:
        updates = [noised(one, multiplier, rng) for one in single[:victims]]
        images = read(updates, pictures.labels[:victims, None])[:, 0]
        found[noise_name(multiplier)] = scored(images, pictures.images[:victims])
    return found


def noise_name(multiplier: float) -> str:
    """As it stands in the names of figures: "noise0p01"."""
    return f"noise{multiplier:g}".replace(".", "p")


def kind_words(kind: str) -> str:
    """What was attacked, for people."""
    if kind.startswith("sum"):
        return f"mean of {kind[3:]} clients of one image"
    if kind.startswith("noise"):
        return f"one client, noise of {kind[5:].replace('p', '.')} norms"
    if kind == "matching":
        return "one client, one image, as the other methods"
    return "one client, one image"


def inversion_audit(
    progress: ProgressListener,
    *,
    quick: bool = False,
    backbone: str | Path = "vit-small-28",
    pictures: Pictures | None = None,
    effort: Effort | None = None,
) -> Audited:
    """Every method and the positive control, on the shipped network and private images.

    Raises: DataError where neither Fashion-MNIST nor the digits are there.
    """
    effort = effort or (QUICK if quick else Effort())
    pictures = pictures or load_pictures(max(effort.victims, *effort.summed), backbone)
    found: dict[str, dict[str, Attacked]] = {}
    # The network is too small for more: threads would wait for each other.
    with torch_threads(1):
        for method in (CONTROL, *METHODS):
            progress.stage(f"inversion: {effort.victims} images from updates of {method}")
            network = Network(method, backbone, classes=len(pictures.guesses))
            found[method] = attacks_on(network, pictures, effort, control=method == CONTROL)
    figures = inversion_figures(found, pictures, effort)
    drawn = pictures
    return Audited(
        figures=tuple(labelled(figures) if quick else figures),
        draw=lambda path: draw(found, drawn, path),
    )


def inversion_figures(
    found: Mapping[str, Mapping[str, Attacked]], pictures: Pictures, effort: Effort
) -> list[Figure]:
    """The guess, and what each kind of update of each method gave."""
    images = pictures.images[: effort.victims]
    guess = pictures.guesses[pictures.labels[: effort.victims]]
    blind = float(psnr_db(guess, images).mean())
    figures = [
        figure(
            "inversion_psnr_db_guess",
            blind,
            unit="dB",
            note=f"the mean public image of the class, no update seen; SSIM "
            f"{ssim(guess, images).mean():.2f}; means over {effort.victims} private images of "
            f"{pictures.name}",
        )
    ]
    for method, kinds in found.items():
        for kind, got in kinds.items():
            target = ""
            if method == CONTROL and kind == "alone":
                target = f">= {blind + LEAKS_DB:.2f}"
            elif kind == noise_name(LEAST_NOISE):
                target = f"<= {blind + HIDES_DB:.2f}"
            gain = f"{got.psnr_db.mean() - blind:+.1f} dB beside the guess"
            figures.append(
                figure(
                    f"inversion_psnr_db_{method}" + ("" if kind == "alone" else f"_{kind}"),
                    float(got.psnr_db.mean()),
                    unit="dB",
                    target=target,
                    note=f"{kind_words(kind)}; {gain}; "
                    f"best image {got.psnr_db.max():.1f} dB; SSIM {got.ssim.mean():.2f}, best "
                    f"{got.ssim.max():.2f}",
                )
            )
    return figures


def load_pictures(count: int, backbone: str | Path) -> Pictures:
    """Private images, each of a class that is not there yet as far as classes last.

    Fashion-MNIST's private half with guesses from the public one, or else digits with guesses from
    the test part. Raises: DataError where neither is there.
    """
    from simulations.datasets import load_dataset
    from simulations.datasets.fashion_mnist import load_fashion_mnist

    try:
        images, labels = load_fashion_mnist(split="private")
        public = load_fashion_mnist(split="public")
        name = "Fashion-MNIST"
    except OSError:
        digits = load_dataset("digits", seed=0)
        images, labels = digits.train["images"], digits.train["labels"]
        public = digits.test["images"], digits.test["labels"]
        name = "digits"
    return pictures_of((images, labels), public, count=count, backbone=backbone, name=name)


def pictures_of(
    private: tuple[np.ndarray, np.ndarray],
    public: tuple[np.ndarray, np.ndarray],
    *,
    count: int,
    backbone: str | Path,
    name: str = "",
) -> Pictures:
    """From uint8 images and their labels, as the backbone's preprocessing makes them."""
    from edge_runtime import preprocess
    from tuning.backbones import load_backbone

    pre = load_backbone(backbone, classes=int(public[1].max()) + 1, seed=0).preprocessing
    mean, std = (np.reshape(part, (-1, 1, 1)) for part in (pre.mean, pre.std))

    def seen(images: np.ndarray) -> np.ndarray:
        pixels = preprocess(pre, {"images": images})["pixel_values"]
        return np.clip(pixels * std + mean, 0, 1).astype(np.float32)

    labels = private[1]
    # The n-th image of its class comes in the n-th turn.
    turns = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        turns[places] = np.arange(len(places))
    chosen = np.lexsort((labels, turns))[:count]
    guesses = [public[0][public[1] == label] for label in range(int(public[1].max()) + 1)]
    return Pictures(
        images=seen(private[0][chosen]),
        labels=labels[chosen].astype(np.int64),
        guesses=np.stack([seen(images).mean(axis=0) for images in guesses]),
        name=name,
    )


def draw(found: Mapping[str, Mapping[str, Attacked]], pictures: Pictures, path: Path) -> None:
    """A row of images for each kind of update, under the originals and the guesses."""
    from matplotlib.figure import Figure as Canvas

    victims = len(next(iter(found[CONTROL].values())).images)
    guesses = pictures.guesses[pictures.labels[:victims]]
    rows = [("private image", pictures.images[:victims], None), ("guess", guesses, None)]
    for method, kinds in found.items():
        rows += [
            (f"{method}, {kind_words(kind)}", got.images, got.psnr_db)
            for kind, got in kinds.items()
        ]
    canvas = Canvas(figsize=(3.2 + 0.75 * victims, 0.82 * len(rows)), layout="constrained")
    grid = canvas.subplots(len(rows), victims, squeeze=False)
    for line, (name, images, ratios) in zip(grid, rows, strict=True):
        # A mean of few clients has fewer images.
        for axes in line[len(images) :]:
            axes.set_axis_off()
        for place, (axes, image) in enumerate(zip(line, images, strict=False)):
            axes.imshow(image.mean(axis=0), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if ratios is not None:
                axes.set_title(f"{ratios[place]:.1f} dB", fontsize=6, pad=1)
        line[0].set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    canvas.savefig(path, dpi=130)


def _distances(
    found: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    used: Sequence[str],
    longest: float,
) -> torch.Tensor:
    """1 - cosine, averaged over tensors, of each update: [k]."""
    # A gradient that vanishes altogether says nothing, instead of anything.
    floor = (_NEGLIGIBLE * longest) ** 2
    total: torch.Tensor | float = 0.0
    for name in used:
        mine, theirs = found[name], wanted[name]
        lengths = (mine.square().sum(dim=1) + floor).sqrt() * theirs.norm(dim=1).clamp(min=1e-30)
        total = total + 1 - (mine * theirs).sum(dim=1) / lengths
    return total / len(used)


def _variation(images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbours in both directions, of each update's images: [k]."""
    across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3, 4))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3, 4))
    return across + down

# SPDX-License-Identifier: Apache-2.0
"""Pre-train the shipped vision backbone, `tuning/backbones/vit_small_28`.

    python -m simulations.pretraining.pretrain --minutes 85 --out DIR [--device cuda] [--seed 0]

One network, one linear head and one cross-entropy per source: characters (rendered in fonts,
and digits drawn in strokes), patterns (shapes, textures, fractals), and the public half of
Fashion-MNIST. Written to DIR is the moving average of the weights without heads, as a folder
for `AutoModelForImageClassification.from_pretrained`, every few minutes and at the end, beside
`pretraining.json`, which says what was done.

The learning rate follows the clock, so that a slow machine ends with a smaller number of
samples but a finished schedule. For that reason two runs do not give the same bytes.

Where other work shares the machine, set `OMP_WAIT_POLICY=PASSIVE`: threads that wait actively for
one that has lost its core made it thirty times slower here.

The shipped weights were made with the font packages of Debian 12 that the model card lists;
with other fonts the script works, with fewer characters' styles.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTModel

from simulations.datasets.fashion_mnist import load_fashion_mnist
from simulations.pretraining.augment import Recipe, augment
from simulations.pretraining.glyphs import (
    CANVAS,
    GLYPH_CLASSES,
    N_DIGITS,
    Bank,
    draw_stroke_digits,
    find_fonts,
    render_font_bank,
)
from simulations.pretraining.patterns import draw_pattern_bank

BATCH = 384
PEAK_LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
WARM_UP = 0.02  # of the time
DECAY_FROM = 0.55  # of the time; constant until then
AVERAGE_DECAY = 0.998  # per step
GRADIENT_NORM = 1.0
CHECKPOINT_MINUTES = 5.0
N_STROKE_DIGITS = 60_000
N_PER_PATTERN = 600
N_FRACTALS = 200
DIGIT_WEIGHT = 4.0  # how much oftener a digit is drawn than another character

CHARACTERS = Recipe(
    rotation_sd_deg=9.0,
    wide_rotation_p=0.1,
    wide_rotation_deg=40.0,
    scale_low=0.7,
    shear=0.15,
    stretch=0.2,
    elastic_px=0.9,
    stroke_p=0.5,
    low_resolution_p=0.1,
    eight_px_p=0.3,
)
PATTERNS = Recipe(wide_rotation_p=0.5, flip_p=0.5, scale_low=0.8, elastic_px=0.5)
CLOTHES = Recipe(
    rotation_sd_deg=8.0,
    wide_rotation_p=0.4,
    flip_p=0.5,
    scale_low=0.8,
    scale_high=1.15,
    elastic_px=0.3,
    erase_p=0.15,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Images of one kind. Sources with the same `head` share classes."""

    name: str
    head: str
    share: float  # of each batch
    recipe: Recipe
    bank: Bank
    class_weights: np.ndarray  # how often each class is drawn, `[n_classes]`


class Sampler:
    """Draws augmented batches of one source, classes by weight, images within them evenly."""

    def __init__(self, source: Source, device: torch.device):
        order = np.argsort(source.bank.labels, kind="stable")
        counts = np.bincount(source.bank.labels, minlength=source.bank.n_classes)
        self.source = source
        self._images = torch.from_numpy(source.bank.images[order]).to(device)
        self._counts = torch.from_numpy(counts).to(device)
        self._starts = torch.from_numpy(np.cumsum(counts) - counts).to(device)
        weights = np.where(counts > 0, source.class_weights, 0.0)
        self._weights = torch.from_numpy(weights).to(device)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """*Returns*: images float32 `[n, 1, 28, 28]` in -1..1 and labels int64 `[n]`."""
        labels = torch.multinomial(self._weights, n, replacement=True, generator=generator)
        spot = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        rows = self._starts[labels] + (spot * self._counts[labels]).long()
        return augment(self._images[rows], self.source.recipe, generator), labels


class Average:
    """Exponential moving average of a model's parameters, started at the first update."""

    def __init__(self, model: nn.Module):
        self._tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._n_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self._n_updates += 1
        # Early on the average would otherwise be mostly the random initial weights.
        weight = 1 - min(AVERAGE_DECAY, self._n_updates / (self._n_updates + 10))
        torch._foreach_lerp_(list(self._tensors.values()), list(model.parameters()), weight)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self._tensors.items()}


def network_config() -> ViTConfig:
    """The network's shape: 16 patches and the CLS token, 1.2 M parameters."""
    return ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def learning_rate(progress: float) -> float:
    """Warm-up, constant, then half a cosine to zero; `progress` is the part of time used."""
    if progress < WARM_UP:
        return PEAK_LEARNING_RATE * (progress + 1e-3) / WARM_UP
    rest = max(0.0, progress - DECAY_FROM) / (1 - DECAY_FROM)
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))


def collect_sources(
    font_folders: Sequence[Path], fashion_folder: Path | None, seed: int
) -> tuple[list[Source], dict[str, int]]:
    """Generate and load everything.

    *Returns*: the sources and counts for the report.
    *Cost*: one to two minutes, 0.7 GB with 1,700 fonts.
    """
    rng = np.random.default_rng(seed)
    characters, n_fonts = render_font_bank(find_fonts(font_folders))
    strokes = draw_stroke_digits(N_STROKE_DIGITS, rng)
    patterns = draw_pattern_bank(N_PER_PATTERN, N_FRACTALS, rng)
    images, labels = load_fashion_mnist(fashion_folder, split="public")
    margin = (CANVAS - images.shape[-1]) // 2
    images = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    clothes = Bank(images=images, labels=labels, n_classes=10)
    is_digit = np.arange(len(GLYPH_CLASSES)) < N_DIGITS
    sources = [
        Source(
            name="characters",
            head="characters",
            share=0.36,
            recipe=CHARACTERS,
            bank=characters,
            class_weights=np.where(is_digit, DIGIT_WEIGHT, 1.0),
        ),
        Source(
            name="stroke digits",
            head="characters",
            share=0.12,
            recipe=CHARACTERS,
            bank=strokes,
            class_weights=is_digit.astype(float),
        ),
        Source(
            name="patterns",
            head="patterns",
            share=0.14,
            recipe=PATTERNS,
            bank=patterns,
            class_weights=np.ones(patterns.n_classes),
        ),
        Source(
            name="fashion-mnist public half",
            head="clothes",
            share=0.38,
            recipe=CLOTHES,
            bank=clothes,
            class_weights=np.ones(10),
        ),
    ]
    counts = {f"images, {source.name}": len(source.bank.images) for source in sources}
    return sources, {"fonts": n_fonts, **counts}


def save_backbone(folder: Path, state: dict[str, Tensor], report: dict[str, object]) -> None:
    """Write the weights as a Hugging Face folder, the old ones staying until all is there."""
    backbone = ViTModel(network_config(), add_pooling_layer=False)
    backbone.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".new"
    backbone.save_pretrained(scratch)
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 28, "width": 28},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    _write_json(scratch / "preprocessor_config.json", preprocessing)
    _write_json(scratch / "pretraining.json", report)
    for path in scratch.iterdir():
        path.chmod(0o644)
        path.replace(folder / path.name)
    scratch.rmdir()


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def pretrain(
    sources: Sequence[Source],
    *,
    minutes: float,
    out: Path,
    device: torch.device,
    seed: int,
    facts: dict[str, int],
) -> None:
    """Train for `minutes` of wall-clock time and leave the backbone in `out`."""
    torch.manual_seed(seed)
    generator = torch.Generator(device=device).manual_seed(seed)
    samplers = [Sampler(source, device) for source in sources]
    backbone = ViTModel(network_config(), add_pooling_layer=False)
    # In bfloat16 on a CPU the fused attention is the slower of the two.
    backbone.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    n_classes = {source.head: source.bank.n_classes for source in sources}
    heads = nn.ModuleDict(
        {name: nn.Linear(backbone.config.hidden_size, n) for name, n in n_classes.items()}
    )
    backbone.to(device).train()
    heads.to(device)
    average = Average(backbone)
    matrices = [p for m in (backbone, heads) for p in m.parameters() if p.ndim > 1]
    vectors = [p for m in (backbone, heads) for p in m.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    sizes = [round(BATCH * source.share) for source in sources]
    hits = np.zeros(len(sources))
    n_seen = n_steps = n_logged = 0
    start = logged = saved = time.monotonic()
    progress = 0.0
    while progress < 1.0:
        rate = learning_rate(progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = [s.draw(size, generator) for s, size in zip(samplers, sizes, strict=True)]
        pixels = torch.cat([x for x, _ in batches])
        with torch.autocast(device.type, torch.bfloat16):
            features = backbone(pixel_values=pixels).last_hidden_state[:, 0]
            scores = [
                heads[source.head](part)
                for source, part in zip(sources, features.split(sizes), strict=True)
            ]
        losses = [
            cross_entropy(score.float(), labels, reduction="sum", label_smoothing=LABEL_SMOOTHING)
            for score, (_, labels) in zip(scores, batches, strict=True)
        ]
        optimizer.zero_grad()
        (sum(losses) / len(pixels)).backward()
        nn.utils.clip_grad_norm_([*matrices, *vectors], GRADIENT_NORM)
        optimizer.step()
        average.update(backbone)
        n_seen += len(pixels)
        n_steps += 1
        if n_steps % 10 == 0:  # reading a result back costs time on a GPU
            n_logged += 1
            for row, (score, (_, labels)) in enumerate(zip(scores, batches, strict=True)):
                hits[row] += (score.argmax(1) == labels).float().mean().item()
        now = time.monotonic()
        progress = (now - start) / (60 * minutes)
        report = {
            **facts,
            "seed": seed,
            "minutes": round((now - start) / 60, 1),
            "samples": n_seen,
            "steps": n_steps,
            "training_accuracy": {
                source.name: round(hit / max(n_logged, 1), 4)
                for source, hit in zip(sources, hits, strict=True)
            },
        }
        if now - logged > 30:
            print(f"{rate:.2e} {n_seen / (now - start):.0f}/s {json.dumps(report)}", flush=True)
            logged, n_logged, hits = now, 0, np.zeros(len(sources))
        if now - saved > 60 * CHECKPOINT_MINUTES or progress >= 1.0:
            save_backbone(out, average.state(), report)
            saved = time.monotonic()
    print(json.dumps(report), flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="pre-train the shipped vision backbone")
    parser.add_argument("--minutes", type=float, default=85.0, help="training time")
    parser.add_argument("--out", type=Path, required=True, help="folder for the backbone")
    parser.add_argument(
        "--fonts",
        type=Path,
        action="append",
        help="folder of font files; may be given again (default: the system's)",
    )
    parser.add_argument("--fashion-mnist", type=Path, help="folder of the IDX files")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f"--minutes is {args.minutes}; it must be more than 0")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folders = args.fonts or [Path("/usr/share/fonts")]
    sources, facts = collect_sources(folders, args.fashion_mnist, args.seed)
    print(json.dumps(facts), flush=True)
    pretrain(
        sources,
        minutes=args.minutes,
        out=args.out,
        device=torch.device(args.device),
        seed=args.seed,
        facts=facts,
    )


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Jobs that do not fit together, through the command line: exit code 2 and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.cli import main
from fedloom.errors import BAD_INPUT, DONE


@pytest.fixture
def say(tmp_path: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """`say(text, command)` runs a job file and gives exit code and message."""

    def run(text: str, command: str = "simulate") -> tuple[int, str]:
        path = tmp_path / "job.toml"
        path.write_text(text)
        arguments = ["simulate", str(path), "--out", str(tmp_path / "out")]
        if command == "bundle":
            arguments = ["bundle", "build", str(path), "--out", str(tmp_path / "out")]
        code = main(arguments)
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("command", ["simulate", "bundle"])
def test_texts_on_an_image_backbone_end_with_2(
    say,  # type: ignore[no-untyped-def]
    tiny_vit: Path,
    tiny_texts: Path,
    command: str,
) -> None:
    job = f'[backbone]\npath = "{tiny_vit}"\n[data]\ndataset = "{tiny_texts}"\nclients = 2\n'
    code, message = say(job, command)
    assert code == BAD_INPUT
    assert "tiny-vit" in message and "Traceback" not in message


@pytest.mark.parametrize("command", ["simulate", "bundle"])
def test_images_on_a_text_backbone_end_with_2(
    say,  # type: ignore[no-untyped-def]
    tiny_bert: Path,
    command: str,
) -> None:
    job = (
        f'[backbone]\npath = "{tiny_bert}"\n[data]\ndataset = "digits"\nclients = 2\n'
        "max_length = 8\n"
    )
    code, message = say(job, command)
    assert code == BAD_INPUT
    assert "reads texts, but the data set digits holds images" in message


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ('name = "lora"\nrnak = 4', 'method "lora" has no setting "rnak"; known: alpha, rank'),
        ('name = "lora"\nrank = 0', "method.rank is 0; it must be at least 1"),
        ('name = "lora"\nrank = "x"', "method.rank is 'x'; expected a whole number"),
        ('name = "loar"', 'no method is called "loar"; known: full, head, lora'),
        ('name = "peft"\ntype = "P_TUNING"', "those that compile are LORA"),
        ('name = "lora"\ntargets = ["nowhere"]', "nowhere"),
    ],
)
def test_wrong_method_ends_with_2(
    say,  # type: ignore[no-untyped-def]
    tiny_vit: Path,
    method: str,
    expected: str,
) -> None:
    job = f'[backbone]\npath = "{tiny_vit}"\n[data]\nclients = 2\n[method]\n{method}\n'
    code, message = say(job)
    assert code == BAD_INPUT
    assert expected in message and "Traceback" not in message


def test_folder_without_a_model_ends_with_2(say, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "empty").mkdir()
    code, message = say('[backbone]\npath = "empty"\n')
    assert code == BAD_INPUT
    assert "config.json" in message


def test_tiny_model_runs_through_the_command_line(
    tiny_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        f'[backbone]\npath = "{tiny_vit}"\n[data]\nclients = 3\nmax_train_samples = 60\n'
        'max_test_samples = 20\n[method]\nname = "head"\n[rounds]\ncount = 1\n'
        "[training]\nbatch_size = 4\nmomentum = 0.9\nweight_decay = 0.01\n"
        '[simulation]\nbackend = "sequential"\n'
    )
    assert main(["simulate", str(path), "--out", str(tmp_path / "out")]) == DONE
    assert main(["bundle", "verify", str(tmp_path / "out" / "bundle")]) == DONE
    assert "accuracy" in capsys.readouterr().out

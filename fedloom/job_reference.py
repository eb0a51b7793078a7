# SPDX-License-Identifier: Apache-2.0
"""The page that lists every key of a job file: `python -m fedloom.job_reference > docs/jobs.md`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from itertools import groupby

_HEAD = """# The job file

One TOML file says what a run is: backbone, data, method, training, transport, rounds. Every key has
a default, an unknown key is an error, and a run directory holds the job as it ran, complete. Any
key can be changed on the command line: `fedloom simulate JOB.toml --set training.batch_size=16`.

This page is made from the code by `python -m fedloom.job_reference`; a test holds them together.
"""

_METHODS = """
## Methods and their settings

`[method]` holds a name and that method's settings. Every method trains the classification layer,
too.

| method | settings and their defaults |
| --- | --- |
"""


def job_reference() -> str:
    """The page, in Markdown."""
    from coordinator.job import describe_job

    lines = [_HEAD]
    for section, keys in groupby(describe_job(), key=lambda doc: doc.section):
        lines += [
            f"\n## `[{section}]`\n",
            "| key | default | | allowed |",
            "| --- | --- | --- | --- |",
        ]
        for doc in keys:
            allowed = doc.allowed.removeprefix("expected ").replace("|", "\\|")
            lines.append(f"| `{doc.key}` | `{_toml(doc.default)}` | {doc.help} | {allowed} |")
    return "\n".join(lines) + "\n" + _METHODS + "\n".join(_method_rows()) + "\n"


def _method_rows() -> list[str]:
    from tuning.methods import METHOD_NAMES, method_class

    rows = []
    for name in METHOD_NAMES:
        settings = [
            f"`{entry.name} = {_toml(entry.default)}`"
            for entry in fields(method_class(name))
            if entry.default is not MISSING
        ]
        if name == "peft":
            settings.insert(0, '`type` (needed: "LOHA", "IA3", ...)')
            settings.append("whatever peft's configuration of that type takes")
        rows.append(f"| `{name}` | {', '.join(settings) or 'none'} |")
    return rows


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


if __name__ == "__main__":
    print(job_reference(), end="")

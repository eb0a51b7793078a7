# SPDX-License-Identifier: Apache-2.0
"""Job files: what they may hold, what is said when they hold something else."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.errors import JobError
from coordinator.job import Job, describe_job, dump_job, load_job, parse_job
from coordinator.sections import (
    AggregationSection,
    DataSection,
    JobSection,
    MethodSpec,
    RoundsSection,
    SimulationSection,
    TrainingSection,
    UpdateSection,
)

HERE = Path(__file__).parent

JOB = """\
[job]
name = "demo"
seed = 3

[data]
dataset = "digits"
clients = 10
partition = "dirichlet:0.3"

[method]
name = "lora"
rank = 4
targets = ["query", "value"]

[training]
learning_rate = 1
"""


def faults_of(text: str, *overrides: str, folder: Path = HERE) -> list[str]:
    with pytest.raises(JobError) as caught:
        parse_job(text, overrides, folder=folder)
    return [str(fault) for fault in caught.value.faults]


def test_job_is_read_when_sections_are_left_out() -> None:
    job = parse_job(JOB, folder=HERE)
    assert job.data.clients == 10
    assert job.method == MethodSpec(
        name="lora", settings={"rank": 4, "targets": ("query", "value")}
    )
    assert job.training.learning_rate == 1.0 and isinstance(job.training.learning_rate, float)
    assert job.rounds == RoundsSection()


def test_override_is_parsed_as_toml_when_it_is_toml_else_as_text() -> None:
    overrides = ["training.learning_rate=0.01", "data.partition=shards:2", "method.bias=true"]
    job = parse_job(JOB, [*overrides, "job.name=a = b"], folder=HERE)
    assert job.training.learning_rate == 0.01
    assert job.data.partition == "shards:2"
    assert job.method.settings["bias"] is True
    assert job.job.name == "a = b"
    assert parse_job(JOB, ["job.name=2024"], folder=HERE).job.name == "2024"
    assert parse_job(JOB, ['job.name="2024"'], folder=HERE).job.name == "2024"


def test_override_sets_one_key_only_when_its_value_holds_a_line_break() -> None:
    job = parse_job(JOB, ["job.name=1\nseed = 9"], folder=HERE)
    assert job.job.name == "1\nseed = 9"
    assert job.job.seed == 3


@pytest.mark.parametrize("override", ["seed=3", "job.seed", "job.=3", ".seed=3", ""])
def test_override_is_refused_when_it_names_no_key(override: str) -> None:
    assert "expected section.key=value" in faults_of(JOB, override)[0]


def test_every_fault_is_listed_with_its_line_when_several_are_wrong() -> None:
    text = JOB.replace("seed = 3", 'seed = "x"').replace("clients = 10", "client = 10")
    first, second = faults_of(text)
    assert first == 'line 3: job.seed = "x": expected a whole number >= 0'
    assert second.startswith('line 7: data.client = 10: unknown key (did you mean "clients"?)')
    assert "known: dataset, clients, partition" in second


def test_unknown_section_lists_the_known_ones() -> None:
    (fault,) = faults_of(JOB + "\n[trainig]\nx = 1\n")
    assert 'line 18: trainig = {...}: unknown section (did you mean "training"?)' in fault
    assert "aggregation" in fault


def test_key_outside_of_a_section_is_refused() -> None:
    assert faults_of("seed = 3")[0].startswith("line 1: seed = 3: unknown section")
    assert "expected a section [data]" in faults_of("data = 3")[0]


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("[training]\nlearning_rate = 0", "expected a number > 0 and <= 100"),
        ("[training]\nlearning_rate = nan", "expected a number > 0 and <= 100"),
        ("[training]\nlearning_rate = inf", "expected a number > 0 and <= 100"),
        ("[training]\nlearning_rate = true", "expected a number"),
        ("[training]\nbatch_size = 8.0", "expected a whole number >= 1"),
        ("[training]\noptimizer = 'adam'", 'expected one of "sgd", "adamw"'),
        ("[training]\noptimizer = 'adamw'\nmomentum = 0.9", "expected 0 with optimizer"),
        ("[data]\npartition = 'dirichlet:0'", "alpha > 0"),
        ("[data]\npartition = 'dirichlet:nan'", "alpha > 0"),
        ("[data]\npartition = 'shards:0'", ">= 1"),
        ("[data]\npartition = 'domains:mixed,shards:0'", ">= 1"),
        ("[data]\npartition = 'domains,domains'", 'expected "iid"'),
        ("[data]\npartition = 'dirichlet:1e999'", "alpha > 0"),
        ("[data]\npartition = 'random'", 'expected "iid"'),
        ("[data]\nheld_out = 1.0", "< 1"),
        ("[data]\nclients = 1979-05-27", "expected a whole number"),
        ("[backbone]\nrandom_weights = 1", "expected true or false"),
        ("[backbone]\nname = 'resnet'", 'expected one of "vit-small-28"'),
        ("[method]\nname = 3", "expected the name of a method"),
        ("[method]\nrank = inf", "expected a finite number"),
        ("[method]\ndeep = {a = 1}", "expected a finite number, a text"),
        ("[update]\ndownlink_codec = 'one-bit'", "expected one of float32, float16, bfloat16 with"),
        ("[update]\ncodec = 'top-k'", "expected top-k:DENSITY, found 'top-k' without density"),
        ("[update]\ncodec = 'zip'", "expected one of float32, float16, bfloat16, int8"),
        ("[aggregation]\nmerger = 'mode'", "expected one of weighted-mean, counted-pool"),
        ("[aggregation]\nmerger = 'krum:x'", "byzantine: expected a whole number, found 'x'"),
        ("[aggregation]\nserver_optimizer = 'sgd'", "expected one of averaging, momentum"),
        ("[simulation]\ndevice = 'cuda'", 'engine = "torch"'),
        ("[job]\nseed = 9007199254740993", "expected a whole number"),
    ],
)
def test_value_is_refused_when_out_of_range(line: str, allowed: str) -> None:
    (fault,) = faults_of(line)
    assert allowed in fault
    assert fault.startswith(f"line {line.count(chr(10)) + 1}: ")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[rounds]\nclients_per_round = 21", "rounds.clients_per_round"),
        ("[rounds]\nclients_per_round = 5\nmin_updates = 6", "rounds.min_updates"),
        ("[rounds]\nclients_per_round = 5\nquorum = 6", "rounds.quorum"),
        ("[rounds]\nmin_updates = 3\nquorum = 2", "rounds.quorum"),
        ("[aggregation]\nserver_optimizer = 'yogi'", "aggregation.server_learning_rate"),
        ("[aggregation]\nmerger = 'bulyan:5'", "aggregation.merger"),
        ("[method]\nname = 'head'\n[aggregation]\nmerger = 'fedit'", "aggregation.merger"),
        ("[method]\nname = 'ssf'\n[aggregation]\nfactors = 'up'", "aggregation.factors"),
        # A core stands between two factors, and has no pair that a merger of LoRA could take.
        ("[method]\nname = 'lora-sb'\n[aggregation]\nmerger = 'rolora'", "aggregation.merger"),
        ("[method]\nname = 'lora-sb'\n[aggregation]\nfactors = 'up'", "aggregation.factors"),
        ("[aggregation]\nmerger = 'rolora'\nfactors = 'up'", "aggregation.factors"),
        ("[aggregation]\nmerger = 'greedy-soup'", "data.validation"),
        (
            "[aggregation]\nmerger = 'flora'\nserver_optimizer = 'momentum'",
            "aggregation.server_optimizer",
        ),
        (
            "[aggregation]\nmerger = 'fedex-lora'\nserver_learning_rate = 0.5",
            "aggregation.server_optimizer",
        ),
        ("[aggregation]\nmerger = 'flora'\n[personal]\nreport = true", "personal.report"),
        ("[data]\nheld_out = 0.0\n[personal]\nreport = true", "personal.report"),
        ("[aggregation]\nmerger = 'fedit'\n[personal]\ntensors = 'x'", "personal.tensors"),
        ("[aggregation]\nmerger = 'counted-pool'", "aggregation.merger"),
        ("[aggregation]\nranks = '4,8'", "aggregation.ranks"),
        ("[aggregation]\nmerger = 'ffa-lora'\nranks = '4,8'", "aggregation.ranks"),
        ("[aggregation]\nmerger = 'flexlora'\nranks = '4,9'", "at most the method's, 8"),
        (
            "[method]\nrank = 4\n[aggregation]\nmerger = 'flexlora'\nranks = '4,8'",
            "at most the method's, 4",
        ),
        (
            "[aggregation]\nmerger = 'flexlora'\nranks = '4,8'\n[update]\ndownlink = 'changes'",
            "aggregation.ranks",
        ),
        ("[training]\nscaffold = true", "aggregation.weighting"),
        (
            "[training]\nscaffold = true\n[aggregation]\nweighting = 'uniform'\n"
            "server_learning_rate = 0.5",
            "aggregation.server_learning_rate",
        ),
        ("[training]\nscaffold = true\nmomentum = 0.9", "training.scaffold"),
        ("[training]\nscaffold = true\nproximal = 0.9", "training.scaffold"),
        ("[data]\ndataset = 'debian-descriptions'", "backbone.name"),
        ("[backbone]\nname = 'all-minilm-l6-v2'", "backbone.name"),
        ("[data]\npartition = 'natural'", "data.partition"),
        ("[data]\npartition = 'domains:mixed,natural'", "data.partition"),
        ("[backbone]\nname = ''", "backbone.path"),
    ],
)
def test_combination_is_refused_when_impossible(text: str, key: str) -> None:
    (fault,) = faults_of(text)
    assert key in fault


@pytest.mark.parametrize(
    "text",
    [
        "[aggregation]\nmerger = 'flora'\nranks = '2, 4,8'",
        "[method]\nname = 'peft'\ntype = 'LORA'\nr = 16\n"
        "[aggregation]\nmerger = 'hetlora'\nranks = '16'",
        "[data]\nvalidation = 0.2\n[aggregation]\nmerger = 'greedy-soup'",
        "[training]\nscaffold = true\n[aggregation]\nweighting = 'uniform'",
    ],
)
def test_combination_is_accepted_when_it_makes_sense(text: str, tmp_path: Path) -> None:
    job = parse_job(text, folder=tmp_path)
    assert parse_job(dump_job(job), folder=tmp_path) == job


def test_ranks_are_numbers() -> None:
    assert AggregationSection(ranks="4, 8,16").client_ranks == (4, 8, 16)
    assert AggregationSection().client_ranks == ()
    for wrong in ("0", "4,,8", "4;8", "-4", "x", "4,"):
        with pytest.raises(JobError, match="list of ranks"):
            AggregationSection(ranks=wrong)


def test_syntax_error_names_its_line() -> None:
    assert faults_of("[job]\nseed = \n")[0].startswith("line 2: job file")


def test_missing_file_is_a_job_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="expected a job file in TOML"):
        load_job(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match="expected a job file in TOML"):
        load_job(tmp_path / "latin.toml")


def test_folders_are_taken_from_the_job_files_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "jobs").mkdir()
    path = tmp_path / "jobs" / "a.toml"
    path.write_text("[backbone]\npath = '../model'\n[data]\ndataset = '../model'\n")
    job = load_job(path)
    assert job.backbone.path == str(tmp_path / "model") and job.backbone.name == ""
    assert job.data.dataset == str(tmp_path / "model")
    (fault,) = faults_of("[data]\ndataset = 'digit'", folder=tmp_path)
    assert f"there is none at {tmp_path / 'digit'}" in fault and '"digits"' in fault


def test_name_and_path_of_a_backbone_exclude_each_other(tmp_path: Path) -> None:
    text = f"[backbone]\nname = 'vit-small-28'\npath = '{tmp_path}'"
    assert "expected either a name" in faults_of(text)[0]


def test_hash_ignores_name_and_simulation_and_nothing_else() -> None:
    job = parse_job(JOB, folder=HERE)
    same = replace(
        job,
        job=JobSection(name="other", seed=3),
        simulation=SimulationSection(backend="ray", engine="torch", device="cuda"),
    )
    assert same.hash() == job.hash()
    assert parse_job(JOB.replace("= 1\n", "= 1.0\n"), folder=HERE).hash() == job.hash()
    # Of two keys one goes only with the other.
    some, more = (
        parse_job(JOB, ["rounds.clients_per_round=4", f"rounds.over_selection={x}"], folder=HERE)
        for x in (1, 1.5)
    )
    assert some.hash() != more.hash()
    for section in fields(Job):
        # Keys of [privacy] and [example_privacy] go with others: see their own tests.
        if section.name in ("simulation", "method", "privacy", "example_privacy"):
            continue
        before = getattr(job, section.name)
        for item in fields(before):
            value = getattr(before, item.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if item.name == "over_selection":
                continue
            changed = replace(before, **{item.name: value / 2 + 0.001 if "." in str(value) else 2})
            if changed == before:
                continue
            other = replace(job, **{section.name: changed})
            assert other.hash() != job.hash(), f"{section.name}.{item.name}"


def test_every_key_is_described() -> None:
    docs = {(doc.section, doc.key): doc for doc in describe_job()}
    for section, table in tomllib.loads(dump_job(Job())).items():
        for key in table:
            doc = docs.pop((section, key))
            assert doc.help and doc.allowed.startswith("expected")
    assert not docs


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
scalars = (
    st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(-1e15, 1e15)
    | texts
)  # fmt: skip
jobs = st.builds(
    Job,
    job=st.builds(JobSection, name=texts, seed=st.integers(0, 2**53 - 1)),
    data=st.builds(
        DataSection,
        clients=st.integers(50, 99_999),
        partition=st.sampled_from(
            ["iid", "dirichlet:1e-3", "shards:12", "domains:mixed,dirichlet:.5"]
        ),
        held_out=st.floats(0, 0.99),
    ),
    method=st.builds(
        MethodSpec,
        name=texts,
        settings=st.dictionaries(
            texts.filter(lambda key: key != "name"), scalars | st.lists(scalars, max_size=3)
        ),
    ),
    training=st.builds(TrainingSection, learning_rate=st.floats(1e-12, 100)),
    update=st.builds(UpdateSection, codec=st.sampled_from(["float32", "float16", "one-bit"])),
    aggregation=st.builds(AggregationSection, weighting=st.sampled_from(["samples", "uniform"])),
    rounds=st.builds(RoundsSection, clients_per_round=st.integers(1, 50)),
    simulation=st.builds(SimulationSection, cohort_size=st.integers(0, 100)),
)


@given(job=jobs)
@settings(max_examples=60, deadline=None)
def test_dumped_job_is_the_same_job_when_read_again(job: Job) -> None:
    again = parse_job(dump_job(job), folder=HERE)
    assert again == job
    assert again.hash() == job.hash()


@given(text=st.text(max_size=60) | texts.map(lambda value: f"[data]\nclients = {value}"))
@settings(max_examples=60, deadline=None)
def test_any_text_is_a_job_or_a_job_error(text: str) -> None:
    try:
        parse_job(text, folder=HERE)
    except JobError as error:
        assert error.faults


def test_more_clients_are_asked_than_drawn_only_where_some_are_drawn() -> None:
    rounds = RoundsSection(clients_per_round=10, over_selection=1.1)
    assert rounds.asked == 11, "and not 12, which rounding up 11.000000000000002 gives"
    assert rounds.enough == 10
    assert replace(rounds, quorum=7).enough == 7
    assert replace(rounds, over_selection=1.0).enough == 0
    assert RoundsSection().asked == 0
    assert replace(rounds, clients_per_round=3, over_selection=1.5).asked == 5
    (fault,) = faults_of(JOB, "rounds.over_selection=1.5")
    assert "rounds.clients_per_round above 0: all are asked already" in fault
    wide = ["rounds.clients_per_round=4", "rounds.over_selection=1.5"]
    parse_job(JOB, [*wide, "rounds.quorum=6"], folder=HERE)
    (fault,) = faults_of(JOB, *wide, "rounds.quorum=7")
    assert "up to the 6 clients of a round" in fault

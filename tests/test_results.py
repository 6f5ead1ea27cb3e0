"""`asc_ray.results`: what a storage holds as a table, whatever lies in it."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest

import asc_ray
from asc_ray.artifacts import Artifact, content_key
from asc_ray.errors import UserError
from asc_ray.evaluation.artifact import Scores
from asc_ray.evaluation.gains import gain
from asc_ray.evaluation.scores import evaluate

SCENE, DEVICE, LABELS = np.array([0, 1, 0, 1]), np.array(["a", "a", "s4", "s4"]), ("bus", "park")


def logits(*answers):
    return 3.0 * np.eye(2)[list(answers)]


def scored(*answers):
    return evaluate(logits(*answers), SCENE, DEVICE, LABELS, unseen=["s4"])


def finished(storage, stage, name, facts=None, inputs=None, **files):
    artifact = Artifact(storage, stage, name, content_key(stage=stage, name=name), {}, inputs or {})
    for file, content in files.items():
        (artifact.open_partial() / f"{file}.json").write_text(content)
    artifact.open_partial()
    artifact.finish(facts or {})
    return artifact


@pytest.fixture
def student(tmp_path):
    sizes = {"float32": 400, "float16": 200, "int8": 100}
    return finished(tmp_path, "students", "student", {"parameters": 100, "macs": 5000, "bytes": sizes})


def row(table, artifact):
    (found,) = table[table["key"] == artifact.key].to_dict("records")
    return found


def test_students_and_their_scores_are_joined_by_the_model_s_key(tmp_path, student):
    int8 = finished(tmp_path, "int8", "student", {"bytes": {"int8": 90, "float32": 30}}, {"student": student.key})
    finished(
        tmp_path, "evaluation", "students", {}, {"model": student.key}, evaluation=scored(0, 1, 0, 0).model_dump_json()
    )
    finished(tmp_path, "evaluation", "int8", {}, {"model": int8.key}, evaluation=scored(0, 0, 0, 0).model_dump_json())
    table = asc_ray.results(tmp_path)
    assert (table["problem"] == "").all()
    scores = table[table["stage"] == "evaluation"].dropna(axis=1)
    joined = table[["key", "stage", "bytes"]].merge(scores, left_on="key", right_on="model", suffixes=("", "_scores"))
    columns = ["stage", "bytes", "accuracy", "seen", "unseen"]
    assert joined[columns].to_numpy().tolist() == [["students", 100, 0.75, 1.0, 0.5], ["int8", 90, 0.5, 0.5, 0.5]]
    # Right answers lose -log p and wrong ones -log(1 - p), with p = 1 / (1 + e^-3) of these logits.
    right, wrong = np.log1p(np.exp(-3.0)), np.log1p(np.exp(3.0))
    assert joined["log_loss"].tolist() == pytest.approx([(3 * right + wrong) / 4, (right + wrong) / 2])


def test_a_row_says_what_an_artifact_is_and_when_it_was_finished(tmp_path, student):
    os.utime(student.path / "manifest.json", (1.5e9, 1.5e9))
    clips = finished(tmp_path, "clips", "a-name-with-dashes")
    table = asc_ray.results(str(tmp_path))
    assert table["key"].tolist() == [student.key, clips.key]  # the earliest first
    first = row(table, student)
    assert first["finished"] == pd.Timestamp("2017-07-14 02:40", tz="UTC")
    assert (first["stage"], first["name"], first["path"]) == ("students", "student", str(student.path))
    assert (first["parameters"], first["macs"], first["bytes"]) == (100, 5000, 100)
    assert row(table, clips)["name"] == "a-name-with-dashes"
    assert pd.isna(row(table, clips)["accuracy"])


def test_the_row_of_the_ensemble_judges_the_fusion(tmp_path):
    fused, teacher = scored(0, 1, 0, 1), scored(1, 1, 1, 1)
    found = gain(logits(1, 1, 1, 1), logits(0, 1, 0, 1), SCENE, DEVICE)
    scores = Scores(systems={"one": teacher, "average": teacher, "fusion": fused}, gain=found)
    fusion = finished(tmp_path, "fusion", "fusion", evaluation=scores.model_dump_json())
    inputs = {"one": "0" * 16, "fusion": fusion.key}
    judged = finished(tmp_path, "evaluation", "ensemble", {}, inputs, evaluation=scores.model_dump_json())
    table = asc_ray.results(tmp_path)
    assert row(table, judged)["model"] == fusion.key
    assert row(table, judged)["accuracy"] == 1.0
    assert pd.isna(row(table, fusion)["accuracy"])  # its own scores are on the validation part


def damaged_manifest(artifact):
    file = artifact.path / "manifest.json"
    file.write_text(file.read_text().replace(artifact.name, "x"))


def no_manifest(artifact):
    (artifact.path / "manifest.json").unlink()


def damaged_scores(artifact):
    (artifact.path / "evaluation.json").write_text("{}")


def anothers_name(artifact):
    shutil.move(artifact.path, artifact.path.with_name(f"{artifact.name}-{'0' * 16}"))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (damaged_manifest, "is not as it was written"),
        (no_manifest, "no manifest.json, so this is not a finished artifact"),
        (damaged_scores, "evaluation.json: checksum differs"),
        (anothers_name, "is that of evaluation/students-"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_damaged_artifact_keeps_its_row_and_says_what_is_wrong(tmp_path, damage, problem, alone):
    whole = None if alone else finished(tmp_path, "clips", "clips")
    model = {"model": "0" * 16}
    damage(finished(tmp_path, "evaluation", "students", {}, model, evaluation=scored(0, 1, 0, 1).model_dump_json()))
    table = asc_ray.results(tmp_path)
    assert len(table) == (1 if alone else 2)
    (found,) = table[table["stage"] == "evaluation"].to_dict("records")
    assert found["name"] == "students"
    assert problem in found["problem"]
    assert pd.isna(found["accuracy"])
    assert whole is None or row(table, whole)["problem"] == ""


@pytest.mark.parametrize(
    ("inputs", "content"), [({"model": "0" * 16}, '{"accuracy": 0.5}'), ({}, scored(0, 1, 0, 1).model_dump_json())]
)
def test_scores_of_another_version_are_a_problem_and_no_error(tmp_path, inputs, content):
    finished(tmp_path, "evaluation", "students", {}, inputs, evaluation=content)
    assert "not as this version of asc-ray writes it" in asc_ray.results(tmp_path)["problem"].item()


def test_what_is_unfinished_or_no_artifact_has_no_row(tmp_path, student):
    Artifact(tmp_path, "students", "student", "f" * 16, {}, {}).open_partial()
    (tmp_path / "mlruns" / "1").mkdir(parents=True)
    (tmp_path / "mlflow.db").touch()
    assert asc_ray.results(tmp_path)["key"].tolist() == [student.key]


def test_an_empty_storage_has_an_empty_table_and_a_missing_one_is_refused(tmp_path, student):
    columns = asc_ray.results(tmp_path).dtypes
    (tmp_path / "empty").mkdir()
    table = asc_ray.results(tmp_path / "empty")
    assert table.empty
    assert table.dtypes.equals(columns)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        asc_ray.results(tmp_path / "nowhere")


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="'asc_ray' has no attribute 'result'"):
        asc_ray.result  # noqa: B018

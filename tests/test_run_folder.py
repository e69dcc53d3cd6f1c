"""The folder of a run: never over something else, and every file whole, old or new."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from cyclekd.integrations.runs import folder as folder_module
from cyclekd.integrations.runs.environment import describe_environment
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder, settings_that_differ, write_text_atomically


def test_a_new_run_gets_an_empty_folder_of_its_own(tmp_path):
    run = RunFolder.create(tmp_path / "deep" / "mine", "name")
    assert run.path == tmp_path / "deep" / "mine" and run.path.is_dir()
    assert RunFolder.create(run.path, "name").path == run.path, "an empty folder is free"


def test_a_folder_that_holds_a_run_is_refused_with_both_ways_on(tmp_path):
    RunFolder.create(tmp_path / "a", "name").write_config({"lr": 1})
    with pytest.raises(RunError, match=r"holds a run: continue it with --resume, or choose another --out"):
        RunFolder.create(tmp_path / "a", "name")


def test_a_folder_that_holds_other_files_is_refused_and_names_them(tmp_path):
    for name in "abcde":
        (tmp_path / name).touch()
    with pytest.raises(RunError, match="holds a, b, c and 2 more, which are no run: choose another --out"):
        RunFolder.create(tmp_path, "name")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot make this folder: File exists"):
        RunFolder.create(tmp_path / "file", "name")


def test_without_a_path_the_first_free_name_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = [RunFolder.create(None, "deit").path for _ in range(3)]
    assert taken == [Path("runs/deit"), Path("runs/deit-2"), Path("runs/deit-3")]


def test_only_a_run_can_be_opened(tmp_path):
    with pytest.raises(RunError, match=r"holds no config\.json, so there is no run to continue"):
        RunFolder.open(tmp_path)
    with pytest.raises(RunError, match="is no folder"):
        RunFolder.open(tmp_path / "absent")
    RunFolder(tmp_path).write_config({})
    assert RunFolder.open(tmp_path).log == tmp_path / "log.jsonl"


def test_settings_come_back_as_json_keeps_them(tmp_path):
    run = RunFolder(tmp_path)
    run.write_config({"out": Path("x/y"), "betas": (0.9, 0.95), "clip": math.inf, "name": "é", "ema": None, "on": True})
    json.loads(run.config.read_text(), parse_constant=pytest.fail)  # Infinity is no JSON
    expected = {"out": "x/y", "betas": [0.9, 0.95], "clip": math.inf, "name": "é", "ema": None, "on": True}
    assert run.read_config() == expected


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="is no JSON"):
        RunFolder.open(tmp_path).read_config()


def test_settings_that_differ_are_those_a_resumed_run_would_change(tmp_path):
    run = RunFolder(tmp_path)
    run.write_config({"lr": 1e-3, "betas": (0.9, 0.95), "out": Path("a"), "workers": 4, "gone": 1})
    now = {"lr": 2e-3, "betas": (0.9, 0.95), "out": Path("a"), "workers": 8, "new": "x", "unset": None}
    differ = settings_that_differ(run.read_config(), now, free={"workers"})
    assert differ == {"lr": (1e-3, 2e-3), "gone": (1, None), "new": (None, "x")}


def test_the_summary_shows_a_checkpoint_as_one_line_and_no_hidden_files(tmp_path):
    run = RunFolder(tmp_path)
    names = ["config.json", "model/model.safetensors", ".config.json.1.tmp"]
    names += [f"checkpoints/step-{step}/{file}" for step in (10, 20) for file in ("a", "b/c")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = ["checkpoints/step-10", "checkpoints/step-20", "config.json", "model/model.safetensors"]
    assert [path.as_posix() for path in run.files()] == expected


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = tmp_path / "config.json"
    write_text_atomically(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module.os, broken, full)
    with pytest.raises(
        RunError, match=r"cannot write .*config.json: No space left on device\. What it held .* untouched"
    ):
        write_text_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


def test_the_new_text_is_on_the_disk_before_it_replaces_the_old(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    write_text_atomically(path, "old")
    replace = os.replace
    monkeypatch.setattr(folder_module.os, "fsync", lambda _: seen.append(("fsync", path.read_text())))
    monkeypatch.setattr(folder_module.os, "replace", lambda *paths: (seen.append(("replace",)), replace(*paths)))
    write_text_atomically(path, "new")
    assert seen == [("fsync", "old"), ("replace",)] and path.read_text() == "new"


def test_the_environment_tells_versions_and_the_command_as_json():
    environment = describe_environment()
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["packages"]["cyclekd"] and environment["cpus"] >= 1
    assert environment["command"].startswith("python ")
    assert json.loads(json.dumps(environment)) == environment


def test_the_environment_holds_no_environment_variables_and_no_host_name(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    monkeypatch.setattr("platform.node", lambda: "a-host-name")
    text = json.dumps(describe_environment())
    assert "secret" not in text and "HF_TOKEN" not in text and "a-host-name" not in text


def test_the_commit_is_marked_where_files_were_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_environment()["commit"] is None
    (tmp_path / "file").write_text("1")
    author = "-c user.name=a -c user.email=a@example.org"
    assert os.system(f"git init -q . && git add file && git {author} commit -qm first") == 0
    commit = describe_environment()["commit"]
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert describe_environment()["commit"] == f"{commit}-dirty"

"""Manifests are what JobSet, Kubeflow's Trainer and SkyPilot accept, and their pods train the run."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.launch.cli import main
from stoker.launch.kubernetes.manifests import resource_name
from stoker.launch.kubernetes.pod import KEY_VARIABLE, POD
from stoker.launch.slurm.batch import in_container

PODS = ["launch=kubernetes", "launch.image=me/stoker", "launch.volume=claim", "run.dir=runs/My_Run", "steps=5"]


def printed(capsys: pytest.CaptureFixture, *words: str) -> list[dict[str, Any]]:
    assert main(["submit", *PODS, *words, "--dry-run"]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def accepted(kind: str, document: dict[str, Any]) -> None:
    """Whether the model of the owner's client takes `document`, and knows every field of it."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    model = getattr(models, kind).from_dict(document)
    assert model is not None and without_empty(model.to_dict()) == without_empty(document)


def without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_empty(own) for key, own in value.items() if own is not None}
    return [without_empty(own) for own in value] if isinstance(value, list) else value


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"].get("template", document)["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_a_jobset_has_a_pod_for_each_node_a_key_and_a_restart_of_the_whole_set(capsys: pytest.CaptureFixture) -> None:
    key, jobset = printed(capsys, "launch.nodes=4", "launch.gpus=8", "batch.size=32", "launch.namespace=lab")
    accepted("JobsetV1alpha2JobSet", jobset)
    assert key["kind"] == "Secret" and len(key["stringData"]["key"]) == 64
    assert {document["metadata"]["namespace"] for document in (key, jobset)} == {"lab"}
    assert jobset["metadata"]["name"] == jobset["spec"]["network"]["subdomain"] == "my-run"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75, 143]
    assert jobset["spec"]["failurePolicy"]["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    pod = pod_of(jobset)
    assert pod["terminationGracePeriodSeconds"] == 120 and pod["restartPolicy"] == "Never"
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    environment = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
    assert environment["STOKER_COORDINATOR"]["value"] == "my-run-node-0-0.my-run"
    assert environment[KEY_VARIABLE]["valueFrom"]["secretKeyRef"]["name"] == key["metadata"]["name"]


def test_a_trainjob_has_a_runtime_of_its_own(capsys: pytest.CaptureFixture) -> None:
    key, runtime, job = printed(capsys, "launch.manifest=trainjob", "launch.nodes=2", "launch.nproc=2")
    accepted("TrainerV1alpha1TrainingRuntime", runtime)
    accepted("TrainerV1alpha1TrainJob", job)
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == "my-run"
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], key["kind"]) == (2, 2, "Secret")
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 2, "torch": {}}
    label = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["metadata"]["labels"]
    assert label == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


def test_the_schemas_find_a_wrong_field(capsys: pytest.CaptureFixture) -> None:
    _, jobset = printed(capsys, "launch.nodes=2", "launch.nproc=1")
    pod_of(jobset)["containers"][0]["comand"] = ["x"]
    with pytest.raises(AssertionError):
        accepted("JobsetV1alpha2JobSet", jobset)


def test_words_reach_the_pod_as_they_were_typed(capsys: pytest.CaptureFixture) -> None:
    (jobset,) = printed(capsys, "launch.nproc=1", "data.args.note='a $(HOME) $$ b'", "parallel.zero=0")
    command = pod_of(jobset)["containers"][0]["command"]
    assert command[:4] == ["python3", "-P", "-m", POD]
    assert "data.args.note='a $$(HOME) $$$$ b'" in command, "the kubelet halves dollars and expands $(NAME)"
    importlib.import_module(POD)


def test_a_task_of_skypilot_names_its_machines_and_starts_the_same_program(capsys: pytest.CaptureFixture) -> None:
    (task,) = printed(capsys, "launch=skypilot", "launch.nodes=2", "launch.gpus=4", "batch.size=8")
    assert task["resources"] == {"image_id": "docker:me/stoker", "accelerators": "H100:4"}
    assert task["num_nodes"] == 2 and task["volumes"] == {"/runs": "claim"} and KEY_VARIABLE in task["secrets"]
    script = task["run"].replace("exec python3", "echo").replace("cd /runs", ":")
    environment = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    show = f'{script}\necho "$JOB_COMPLETION_INDEX $STOKER_NODES $STOKER_COORDINATOR"'
    ended = subprocess.run(["sh", "-ec", show], env=environment, capture_output=True, text=True, check=True)
    assert "run.dir=runs/My_Run" in ended.stdout and ended.stdout.endswith("1 2 10.0.0.1\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch.image=null"], "needs launch.image=IMAGE"),
        (["launch.volume=null", "launch.nodes=2"], "needs launch.volume=VOLUME, a volume that all pods mount"),
        (["launch.volume=null"], "needs launch.volume=VOLUME or checkpoint.remote=URL"),
    ],
)
def test_what_pods_lack_is_refused(capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert main(["submit", *PODS, "launch.nproc=1", *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_names_of_runs_become_names_of_resources() -> None:
    assert [resource_name(name) for name in ("My_Run", "7b", "-x-", "a" * 90)] == ["my-run", "run-7b", "x", "a" * 50]


def test_a_node_of_a_slurm_job_starts_in_the_image(tmp_path: Path) -> None:
    run, config = RunDirectory(tmp_path / "run"), Config()
    assert in_container(config, run) == [sys.executable]
    config.launch.image = "me#stoker"
    pyxis = in_container(config, run)
    assert pyxis[0] == "--container-image=me#stoker" and f"{tmp_path}:{tmp_path}" in pyxis[1] and pyxis[-1] == "python3"
    config.launch.container, config.launch.gpus = "apptainer", 8
    words = in_container(config, run)
    assert words[:3] == ["apptainer", "exec", "--nv"] and words[-2:] == ["me#stoker", "python3"]
    assert words[words.index("--bind") + 1 :].count(str(tmp_path)) == 1

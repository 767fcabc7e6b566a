"""A run as a JobSet, as a TrainJob of Kubeflow's Trainer v2, or as a task of SkyPilot: YAML from a config."""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import yaml

from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch.gate import new_key
from stoker.launch.kubernetes.pod import (
    COORDINATOR_VARIABLE,
    INDEX_VARIABLE,
    KEY_VARIABLE,
    NODES_VARIABLE,
    POD,
)
from stoker.launch.slurm.batch import RANKS_DEFAULT
from stoker.launch.slurm.submit import cores_of_rank, where
from stoker.launch.train import say
from stoker.trainer.runtime.outcome import GOES_ON
from stoker.trainer.runtime.process import LAUNCH_VARIABLE, RESTARTS_VARIABLE
from stoker.trainer.settle import settle_config

REPLICATED = "node"  # the replicated job; Kubeflow's Trainer wants this name for the one that trains
_TERMINATED = 143  # status of a pod whose launcher got SIGTERM
_RESTART_LABEL = "jobset.sigs.k8s.io/restart-attempt"
_LONGEST_NAME = 63 - len("-node-0-99999")


def submit(overrides: Sequence[str], dry_run: bool) -> int:
    """Print the manifest, or hand it to kubectl. Raises ConfigError for a start that is refused."""
    config, _ = settle_config(overrides, where, tell=say)
    text = render(config, overrides)
    if dry_run:
        print(text, end="")
        return 0
    if config.launch.name == "skypilot":
        raise ConfigError("launch=skypilot: print the task with --dry-run, and start it by `sky launch`")
    if shutil.which("kubectl") is None:
        raise ConfigError("kubectl is not found: print the manifest with --dry-run, and apply it where there is one")
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode


def render(config: Config, overrides: Sequence[str]) -> str:
    """The manifest of a settled config; pods settle `overrides` again. Raises ConfigError for what it lacks."""
    name = resource_name(str(config.run.name))
    if config.launch.name == "skypilot":
        return yaml.dump(_task(config, name, overrides), sort_keys=False, width=110)
    make = {"jobset": _jobset, "trainjob": _trainjob}[config.launch.manifest]
    key = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{name}-key"},
        "stringData": {"key": new_key()},
    }
    found = [*([key] if config.launch.nodes > 1 else []), *make(config, name, overrides)]
    for document in found:
        if config.launch.namespace is not None:
            document["metadata"]["namespace"] = config.launch.namespace
    return "---\n".join(yaml.dump(document, sort_keys=False, width=110) for document in found)


def resource_name(text: str) -> str:
    """`text` as the name of a resource: lower case letters, digits and dashes, short enough for those of its pods."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    return name if name and name[0].isalpha() else f"run-{name}".strip("-")


def _jobset(config: Config, name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
        **_replicated(config, name, overrides, config.launch.nodes),
    }
    return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": name}, "spec": spec}]


def _trainjob(config: Config, name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """A runtime of its own, and the job that uses it. The Trainer sets numbers of nodes and processes."""
    group = "trainer.kubeflow.org"
    template = _replicated(config, name, overrides, None)
    template["replicatedJobs"][0]["template"]["metadata"] = {
        "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    }
    ranks = config.launch.nproc or config.launch.gpus or RANKS_DEFAULT
    policy: dict[str, Any] = {"numNodes": config.launch.nodes, "torch": {}}
    runtime = {
        "apiVersion": f"{group}/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {"name": name},
        "spec": {"mlPolicy": policy, "template": {"spec": template}},
    }
    trainer = {
        "image": config.launch.image,
        "numNodes": config.launch.nodes,
        "numProcPerNode": ranks,
        "command": _command(overrides),
        "resourcesPerNode": _resources(config),
    }
    reference = {"apiGroup": group, "kind": "TrainingRuntime", "name": name}
    job = {
        "apiVersion": f"{group}/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {"runtimeRef": reference, "trainer": trainer},
    }
    return [runtime, job]


def _replicated(config: Config, name: str, overrides: Sequence[str], nodes: int | None) -> dict[str, Any]:
    """The part of a JobSet's spec that both have: one indexed job of as many pods as nodes, restarted as a whole."""
    launch = config.launch
    preempted = {
        "action": "FailJob",
        "onExitCodes": {"containerName": REPLICATED, "operator": "In", "values": [GOES_ON, _TERMINATED]},
    }
    evicted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    job: dict[str, Any] = {
        "backoffLimit": 0,
        "completionMode": "Indexed",
        "podFailurePolicy": {"rules": [preempted, evicted]},
        "template": {"spec": _pod(config, name, overrides)},
    }
    if nodes is not None:
        job |= {"completions": nodes, "parallelism": nodes}
    again = {  # the run was told to leave, and has saved: that is no failure of its own
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "failurePolicy": {"maxRestarts": launch.max_restarts, "rules": [again]},
        "replicatedJobs": [{"name": REPLICATED, "replicas": 1, "template": {"spec": job}}],
    }


def _pod(config: Config, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    launch = config.launch
    environment: list[dict[str, Any]] = [
        {"name": NODES_VARIABLE, "value": str(launch.nodes)},
        {"name": COORDINATOR_VARIABLE, "value": f"{name}-{REPLICATED}-0-0.{name}"},
        {"name": LAUNCH_VARIABLE, "value": f"kubernetes-{secrets.token_hex(8)}"},
        {
            "name": RESTARTS_VARIABLE,
            "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{_RESTART_LABEL}']"}},
        },
    ]
    if launch.nodes > 1:
        reference = {"secretKeyRef": {"name": f"{name}-key", "key": "key"}}
        environment.append({"name": KEY_VARIABLE, "valueFrom": reference})
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]  # by default 64 MB, too few for reader processes and NCCL
    if launch.volume is not None:
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": launch.volume}})
        mounts.append({"name": "runs", "mountPath": launch.mount})
    container = {
        "name": REPLICATED,
        "image": launch.image,
        "command": _command(overrides),
        "env": environment,
        "resources": _resources(config),
        "volumeMounts": mounts,
    }
    if launch.volume is not None:
        container["workingDir"] = launch.mount
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch.grace_seconds,
        "containers": [container],
        "volumes": volumes,
    }


def _command(overrides: Sequence[str]) -> list[str]:
    """What a pod runs. The kubelet replaces $(NAME), and $$ stands for one $."""
    return ["python3", "-P", "-m", POD, *(word.replace("$", "$$") for word in overrides)]


def _resources(config: Config) -> dict[str, Any]:
    launch = config.launch
    ranks = launch.nproc or launch.gpus or RANKS_DEFAULT
    found: dict[str, Any] = {"requests": {"cpu": str(launch.cpus or ranks * cores_of_rank(config))}}
    if launch.gpus:
        found["limits"] = {"nvidia.com/gpu": str(launch.gpus)}
    return found


def _task(config: Config, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """SkyPilot's."""
    launch = config.launch
    resources: dict[str, Any] = {"image_id": f"docker:{launch.image}"}
    if launch.gpus:
        resources["accelerators"] = f"{launch.accelerator}:{launch.gpus}"
    else:
        resources["cpus"] = f"{launch.cpus or (launch.nproc or RANKS_DEFAULT) * cores_of_rank(config)}+"
    task: dict[str, Any] = {"name": name, "num_nodes": launch.nodes, "resources": resources}
    if launch.volume is not None:
        task["volumes"] = {launch.mount: launch.volume}
    task["envs"] = {LAUNCH_VARIABLE: f"skypilot-{secrets.token_hex(8)}"}
    if launch.nodes > 1:
        task["secrets"] = {KEY_VARIABLE: new_key()}
    lines = [
        f"export {INDEX_VARIABLE}=$SKYPILOT_NODE_RANK {NODES_VARIABLE}=$SKYPILOT_NUM_NODES",
        f'export {COORDINATOR_VARIABLE}="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"',
        *([f"cd {shlex.quote(launch.mount)}"] if launch.volume is not None else []),
        shlex.join(["exec", "python3", "-P", "-m", POD, *overrides]),
    ]
    return task | {"run": "\n".join(lines) + "\n"}

"""The Kubernetes files of cluster/, and a JSON schema of what surrounds their pods, of which PyPI has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "cluster"

WHOLE, TEXT, FLAG, MAPPING = (
    {"type": "integer", "minimum": 0},
    {"type": "string"},
    {"type": "boolean"},
    {"type": "object"},
)
TEXTS = {"type": "object", "additionalProperties": TEXT}


def exactly(required: dict[str, Any], **others: Any) -> dict[str, Any]:
    """An object with these fields and no other: KubeRay's API server drops unknown ones, and a typo has no effect."""
    return {
        "type": "object",
        "properties": required | others,
        "required": list(required),
        "additionalProperties": False,
    }


# The fields of ray.io/v1 as KubeRay's reference has them (1.5 to 1.7). A pod is checked by Kubernetes' own schema.
POD = exactly({"spec": MAPPING}, metadata=MAPPING)
HEAD = exactly(
    {"rayStartParams": TEXTS, "template": POD},
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    headService=MAPPING,
    enableIngress=FLAG,
    resources=TEXTS,
    labels=TEXTS,
)
WORKERS = exactly(
    {"groupName": TEXT, "replicas": WHOLE, "minReplicas": WHOLE, "maxReplicas": WHOLE}
    | {"rayStartParams": TEXTS, "template": POD},
    numOfHosts=WHOLE,
    idleTimeoutSeconds=WHOLE,
    scaleStrategy=MAPPING,
    suspend=FLAG,
    resources=TEXTS,
    labels=TEXTS,
)
AUTOSCALER = exactly(
    {"version": {"enum": ["v1", "v2"]}},
    idleTimeoutSeconds=WHOLE,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    resources=MAPPING,
    image=TEXT,
    imagePullPolicy=TEXT,
    securityContext=MAPPING,
    env={"type": "array"},
    envFrom={"type": "array"},
    volumeMounts={"type": "array"},
)
CLUSTER = exactly(
    {"rayVersion": TEXT, "headGroupSpec": HEAD, "workerGroupSpecs": {"type": "array", "items": WORKERS, "minItems": 1}},
    authOptions=exactly({"mode": {"enum": ["token", "disabled"]}}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=TEXTS,
    suspend=FLAG,
    managedBy=TEXT,
    gcsFaultToleranceOptions=MAPPING,
    upgradeStrategy=MAPPING,
)
JOB = exactly(
    {"entrypoint": TEXT, "rayClusterSpec": CLUSTER},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=WHOLE,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=WHOLE,
    activeDeadlineSeconds=WHOLE,
    runtimeEnvYAML=TEXT,
    metadata=TEXTS,
    jobId=TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT,
    submitterPodTemplate=POD,
    submitterConfig=MAPPING,
    clusterSelector=TEXTS,
    suspend=FLAG,
    managedBy=TEXT,
    deletionStrategy=MAPPING,
)
METADATA = exactly({}, name=TEXT, generateName=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
KINDS = {
    kind: exactly({"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": METADATA, "spec": spec})
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB))
}


def load(name: str) -> dict[str, Any]:
    """A YAML file of cluster/."""
    return yaml.safe_load((FOLDER / name).read_text())


def cluster_of(found: dict[str, Any]) -> dict[str, Any]:
    """The specification of the Ray cluster that a RayCluster is and a RayJob holds."""
    return found["spec"].get("rayClusterSpec", found["spec"])


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The head's group and those of the workers."""
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, specification of its Ray cluster)."""
    for name in ("raycluster.yaml", "rayjob.yaml"):
        yield name, cluster_of(load(name))

"""The Kubernetes files and the Compose file of cluster/ fit their schemas, offline; a misspelt field would not.

The pods are checked by Kubernetes' own schemas (kubernetes-validate), what KubeRay puts around them by
``support/manifests.py``, mlflow.yaml by Compose's (check-jsonschema has it).
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from manifests import KINDS, cluster_of, clusters, groups, load

FILES = ("raycluster.yaml", "rayjob.yaml")
VERSIONS = ("1.31", "1.37")  # the oldest that cluster/README.md names, and the newest that the package has
SECRET = "distilled-decoding-env"


def check_ray(found: dict[str, Any]) -> None:
    """Raises the ValidationError of jsonschema or kubernetes-validate for what one of the schemas does not know."""
    jsonschema.validate(found, KINDS[found["kind"]])
    for group in groups(cluster_of(found)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        for version in VERSIONS:
            kubernetes_validate.validate(pod, version, strict=True)


def check_compose(found: dict[str, Any]) -> None:
    """Raises jsonschema's ValidationError for what Docker Compose does not know."""
    schemas = importlib.resources.files("check_jsonschema.builtin_schemas.vendor")
    jsonschema.validate(found, json.loads(schemas.joinpath("compose-spec.json").read_text()))


@pytest.mark.parametrize("name", FILES)
def test_kubernetes_and_kuberay_accept_the_files(name: str) -> None:
    check_ray(load(name))


def test_compose_accepts_the_file_of_mlflow() -> None:
    check_compose(load("mlflow.yaml"))


def test_one_cluster_in_two_files() -> None:
    assert load("rayjob.yaml")["spec"]["rayClusterSpec"] == load("raycluster.yaml")["spec"]


def container(found: dict[str, Any]) -> dict[str, Any]:
    """The container of the first group of workers."""
    return cluster_of(found)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]


def renamed(place: Callable[[dict[str, Any]], dict[str, Any]], old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        inside = place(found)
        inside[new] = inside.pop(old)

    return change


def given(place: Callable[[dict[str, Any]], dict[str, Any]], key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: place(found).update({key: value})


MISTAKES = {
    "a container's resource": renamed(container, "resources", "resource"),
    "a variable's number": given(lambda f: container(f)["env"][0], "value", 0),
    "a port's text": given(lambda f: groups(cluster_of(f))[0]["template"]["spec"]["containers"][0]["ports"][0],
                           "containerPort", "dashboard"),
    "a pod's nodeSelectors": renamed(lambda f: cluster_of(f)["workerGroupSpecs"][0]["template"]["spec"],
                                     "nodeSelector", "nodeSelectors"),
    "a Secret's optionally": given(lambda f: container(f)["env"][1]["valueFrom"]["secretKeyRef"], "optionally", True),
    "a Secret without its key": given(lambda f: container(f)["env"][1]["valueFrom"], "secretKeyRef", {"name": SECRET}),
    "a cluster's enableAutoscaling": given(cluster_of, "enableAutoscaling", True),
    "a cluster's version as a number": given(cluster_of, "rayVersion", 2.6),
    "an autoscaler's idleTimeout": given(lambda f: cluster_of(f)["autoscalerOptions"], "idleTimeout", 5),
    "an autoscaler's seconds as text": given(
        lambda f: cluster_of(f)["autoscalerOptions"], "idleTimeoutSeconds", "300"),
    "Ray's parameters as numbers": given(lambda f: cluster_of(f)["headGroupSpec"]["rayStartParams"], "num-cpus", 0),
    "a group's replicas as text": given(lambda f: cluster_of(f)["workerGroupSpecs"][0], "maxReplicas", "8"),
    "a group without a pod": renamed(lambda f: cluster_of(f)["headGroupSpec"], "template", "tmpl"),
    "another API": given(lambda f: f, "apiVersion", "ray.io/v1alpha1"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(name: str, mistake: str) -> None:
    found = deepcopy(load(name))
    MISTAKES[mistake](found)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_ray(found)


def test_a_mistake_in_the_file_of_mlflow_is_noticed() -> None:
    found = load("mlflow.yaml")
    for key, value in (("port", ["127.0.0.1:5000:5000"]), ("restart", 1)):
        wrong = deepcopy(found)
        wrong["services"]["mlflow"][key] = value
        with pytest.raises(jsonschema.ValidationError):
            check_compose(wrong)


def test_gpus_scale_from_zero_on_spot_nodes() -> None:
    for _, spec in clusters():
        head = spec["headGroupSpec"]
        assert spec["enableInTreeAutoscaling"] is True
        assert 0 < spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 600
        assert spec["authOptions"] == {"mode": "token"}
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert head["serviceType"] == "ClusterIP"
        spot, on_demand = spec["workerGroupSpecs"]
        assert (spot["minReplicas"], spot["replicas"], spot["maxReplicas"]) == (0, 0, 8)
        assert (on_demand["minReplicas"], on_demand["replicas"], on_demand["maxReplicas"]) == (0, 0, 0)
        assert spot["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
        assert "cloud.google.com/gke-spot" not in on_demand["template"]["spec"]["nodeSelector"]
        for group in groups(spec):
            pod = group["template"]["spec"]
            (only,) = pod["containers"]
            assert pod["restartPolicy"] == "Never", "autoscaler v2 asks for it"
            assert pod["serviceAccountName"], "the bucket is opened by a service account"
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert not {"livenessProbe", "readinessProbe", "startupProbe"} & only.keys(), "the operator's"
            assert "nvidia.com/gpu" in only["resources"]["limits"] or group is head
            memory = int(only["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
            assert int(group["rayStartParams"]["object-store-memory"]) < memory / 2
        assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_pods_start_without_the_secret_and_take_what_it_has() -> None:
    """Every variable but Ray's own comes from one Secret, by reference, and is left out where that lacks it."""
    for _, spec in clusters():
        for group in groups(spec):
            first, *others = group["template"]["spec"]["containers"][0]["env"]
            assert first == {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}
            keys = {}
            for variable in others:
                assert variable.keys() == {"name", "valueFrom"}, "by reference only"
                reference = variable["valueFrom"]["secretKeyRef"]
                assert (reference["name"], reference["optional"]) == (SECRET, True), variable["name"]
                keys[variable["name"]] = reference["key"]
            assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"} < set(keys)
            assert {"AWS_ENDPOINT_URL", "HF_TOKEN", "MLFLOW_TRACKING_URI"} < set(keys)
            assert len(set(keys.values())) == len(keys), "a key for each"

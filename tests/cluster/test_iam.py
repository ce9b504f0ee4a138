"""The IAM policies of cluster/iam are policies, allow what the code and Ray's autoscaler call, and little more."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import ray
import s3server
import yaml
from aiobotocore.client import AioBaseClient
from s3fs import S3FileSystem

from pipeline import storage

FOLDER = Path(__file__).parents[2] / "cluster"
POLICIES = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "iam").glob("*.json"))}
AWS = yaml.safe_load((FOLDER / "aws.yaml").read_text())
README = (FOLDER / "README.md").read_text()
PART = 5 << 20  # bytes, the least that S3 takes for a part; s3fs makes them ten times as large
BUCKET = "arn:aws:s3:::my-bucket"

# S3's operations -> what IAM calls the right to them, and whether it is one to the bucket or to a file in it.
S3_RIGHTS = {
    "HeadBucket": ("s3:ListBucket", BUCKET),
    "ListObjectsV2": ("s3:ListBucket", BUCKET),
    "HeadObject": ("s3:GetObject", f"{BUCKET}/run/file"),
    "GetObject": ("s3:GetObject", f"{BUCKET}/run/file"),
    "PutObject": ("s3:PutObject", f"{BUCKET}/run/file"),
    "CreateMultipartUpload": ("s3:PutObject", f"{BUCKET}/run/file"),
    "UploadPart": ("s3:PutObject", f"{BUCKET}/run/file"),
    "CompleteMultipartUpload": ("s3:PutObject", f"{BUCKET}/run/file"),
    "AbortMultipartUpload": ("s3:AbortMultipartUpload", f"{BUCKET}/run/file"),
    "DeleteObject": ("s3:DeleteObject", f"{BUCKET}/run/file"),
    "DeleteObjects": ("s3:DeleteObject", f"{BUCKET}/run/file"),
}
# What Ray's provider for AWS calls -> the right to it; None where aws.yaml keeps the head from calling it.
EC2_RIGHTS = {
    "filter": "ec2:DescribeInstances",  # ec2.instances.filter
    "create_instances": "ec2:RunInstances",
    "create_tags": "ec2:CreateTags",
    "terminate_instances": "ec2:TerminateInstances",
    "terminate": "ec2:TerminateInstances",
    "stop": None,  # provider.cache_stopped_nodes
    "stop_instances": None,
    "start_instances": None,
    "describe_images": None,  # provider.cloudwatch
    "describe_instance_types": None,  # node types without resources, and in `ray up` alone
}


def several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def allowed(policy: dict[str, Any], action: str, resource: str) -> bool:
    """Whether a statement allows the action on the resource; conditions are taken for met."""
    return any(
        any(fnmatchcase(action, pattern) for pattern in several(statement["Action"]))
        and any(fnmatchcase(resource, pattern) for pattern in several(statement["Resource"]))
        for statement in policy["Statement"]
    )


def check_policy(policy: dict[str, Any]) -> None:
    """The grammar of IAM's JSON policies of version 2012-10-17, as far as these use it."""
    assert policy.keys() == {"Version", "Statement"}
    assert policy["Version"] == "2012-10-17"
    sids = [statement.get("Sid", "") for statement in policy["Statement"]]
    assert len(set(sids)) == len(sids) > 0
    for statement in policy["Statement"]:
        who = {"Principal", "Resource"} & statement.keys()
        assert len(who) == 1, "a policy of a role names resources, its trust policy who may take it"
        assert statement.keys() - who <= {"Sid", "Effect", "Action", "Condition"}
        assert re.fullmatch(r"[A-Za-z0-9]+", statement["Sid"])
        assert statement["Effect"] == "Allow"
        assert all(re.fullmatch(r"[a-z0-9]+:[A-Z]\w+", action) for action in several(statement["Action"])), "no *"
        for arn in several(statement.get("Resource", [])):
            assert re.fullmatch(r"\*|arn:aws:[a-z0-9]+:[\w*-]*:[\d*]*:\S+", arn), arn
        for operator, tests in statement.get("Condition", {}).items():
            assert operator == "StringEquals"
            assert all(re.fullmatch(r"[a-z0-9]+:[\w/-]+", key) for key in tests)


@pytest.mark.parametrize("name", POLICIES)
def test_the_files_are_policies(name: str) -> None:
    check_policy(POLICIES[name])


@pytest.mark.parametrize(
    "change",
    [{"Version": "2012-10-18"}, {"Statements": []}, {"Action": "s3:*"}, {"Action": "*"}, {"Efect": "Allow"},
     {"Effect": "allow"}, {"Resource": "my-bucket/*"}, {"Resource": None}],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_noticed(change: dict[str, Any]) -> None:
    policy = json.loads(json.dumps(POLICIES["bucket"]))
    (key,) = change
    (policy if key in ("Version", "Statements") else policy["Statement"][0]).update(change)
    with pytest.raises((AssertionError, TypeError)):
        check_policy(policy)


def test_all_resources_only_where_ec2_has_no_others() -> None:
    everything = [
        statement["Action"]
        for policy in POLICIES.values()
        for statement in policy["Statement"]
        if "*" in several(statement.get("Resource", []))
    ]
    assert everything == ["ec2:DescribeInstances"]


# ---- the bucket


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The operations that this process asks S3 for, by S3's names."""
    out: set[str] = set()
    call = AioBaseClient._make_api_call

    async def noted(self: Any, operation: str, arguments: Any) -> Any:
        out.add(operation)
        return await call(self, operation, arguments)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", noted)
    return out


def use(folder: str) -> Iterator[Any]:
    """Everything that ``storage`` does to a folder, and with it the project: it alone opens files."""
    small, large = storage.join(folder, "small.json"), storage.join(folder, "large.bin")
    yield storage.exists(small)
    yield storage.check_writable(folder, needed=1)
    yield storage.write_json(small, {"a": 1})
    yield storage.write_bytes(large, bytes(2 * PART))  # in parts
    with storage.replacing(large) as file:
        file.write(b"1")
    yield storage.write_files(folder, {"one.txt": b"1", "two.txt": b"2"})
    yield storage.listing(folder), storage.sizes(folder), storage.modified(folder), storage.below(folder)
    yield storage.exists(folder), storage.is_folder(folder), storage.read_json(small), storage.sha256(small)
    with storage.reading(large) as file:
        file.read(10)
    with storage.borrowed(small) as path:
        path.read_bytes()
    yield storage.sweep(folder), storage.remove(large), storage.remove(large)


def test_the_bucket_allows_every_call_of_the_project(
    s3_server: Any, called: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(S3FileSystem._pipe_file, "__defaults__", (PART, *S3FileSystem._pipe_file.__defaults__[1:]))
    for _ in use(f"s3://{s3server.BUCKET}/iam"):
        pass
    assert {"ListObjectsV2", "HeadObject", "GetObject", "PutObject", "UploadPart", "DeleteObject"} <= called
    unknown = called - S3_RIGHTS.keys()
    assert not unknown, "say in S3_RIGHTS what they need"
    refused = [operation for operation in S3_RIGHTS if not allowed(POLICIES["bucket"], *S3_RIGHTS[operation])]
    assert not refused


def test_the_bucket_allows_no_more() -> None:
    actions = {action for one in POLICIES["bucket"]["Statement"] for action in several(one["Action"])}
    assert actions == {action for action, _ in S3_RIGHTS.values()}
    assert not allowed(POLICIES["bucket"], "s3:GetObject", "arn:aws:s3:::my-bucket-of-others/file")
    assert not allowed(POLICIES["bucket"], "s3:DeleteBucket", BUCKET)


# ---- the head


def calls_of_rays_provider() -> set[str]:
    """Names of the methods that Ray's provider for AWS calls that are operations of EC2, or boto3's ways to them."""
    import botocore.session
    from botocore import xform_name

    source = (Path(ray.__file__).parent / "autoscaler/_private/aws/node_provider.py").read_text()
    found = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    service = botocore.session.get_session().get_service_model("ec2")
    operations = {xform_name(name) for name in service.operation_names}
    return found & (operations | {"create_instances", "filter", "terminate", "stop", "start", "reboot"})


def test_the_head_may_do_what_rays_autoscaler_does() -> None:
    assert calls_of_rays_provider() == EC2_RIGHTS.keys()
    assert AWS["provider"]["cache_stopped_nodes"] is False
    assert "cloudwatch" not in AWS["provider"]
    instance = "arn:aws:ec2:us-west-2:123456789012:instance/i-0abc"
    policy = POLICIES["autoscaler"]
    needed = {right for right in EC2_RIGHTS.values() if right}
    assert not [right for right in needed if not allowed(policy, right, instance)]
    parts = ("subnet/s", "security-group/g", "network-interface/n", "key-pair/k", "volume/v")
    for part in (*(f"us-west-2:123456789012:{part}" for part in parts), "us-west-2::image/ami-1"):
        assert allowed(policy, "ec2:RunInstances", f"arn:aws:ec2:{part}"), part
    actions = {action for statement in policy["Statement"] for action in several(statement["Action"])}
    assert actions == needed | {"iam:PassRole", "ssm:GetParameters"}


def test_the_policies_name_what_aws_yaml_names() -> None:
    policy, types = POLICIES["autoscaler"], AWS["available_node_types"]
    profiles = {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in types.values()}
    head = types["head"]["node_config"]["IamInstanceProfile"]["Name"]
    for profile in profiles:  # its role has its name
        role = f"arn:aws:iam::123456789012:role/{profile}"
        assert allowed(policy, "iam:PassRole", role) is (profile != head), "a head starts workers, and no other head"
    image = types["head"]["node_config"]["ImageId"].removeprefix("resolve:ssm:")
    assert allowed(policy, "ssm:GetParameters", f"arn:aws:ssm:us-west-2::parameter{image}")
    tags = json.dumps(policy).count(f'ray-cluster-name": "{AWS["cluster_name"]}"')
    assert tags == 2, "it launches and terminates instances of its own cluster alone"


def test_the_readme_says_how_to_use_them() -> None:
    assert set(re.findall(r"file://cluster/iam/([\w-]+)\.json", README)) == POLICIES.keys()
    assert "s/my-bucket/" in README, "the placeholder is replaced"

"""The files of infra/ray, without a cluster: Ray's own checks, a simulated AWS, and a token in all that is shipped."""

import os
import re
import subprocess
import zipfile

import pytest
import yaml
from small_heads import CHECKOUT

FOLDER = CHECKOUT / "infra/ray"
REGION = "eu-central-1"


@pytest.fixture
def config() -> dict:
    """cluster.yaml as Ray's launcher has it, checked by its schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load((FOLDER / "cluster.yaml").read_text()))
    validate_config(prepared)
    return prepared


def test_it_grows_from_nothing_and_shrinks(config):
    kinds = config["available_node_types"]
    workers = {name: kind for name, kind in kinds.items() if name != config["head_node_type"]}
    assert kinds[config["head_node_type"]]["resources"]["CPU"] == 0
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values()) and 0 < config["idle_timeout_minutes"] <= 15
    assert sum(kind["max_workers"] for kind in workers.values()) <= config["max_workers"]
    assert [name for name, kind in workers.items() if kind["resources"].get("GPU")] == ["gpu"]


def test_no_unknown_key_and_no_wrong_type_passes():
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    shipped = yaml.safe_load((FOLDER / "cluster.yaml").read_text())
    for change in ({"idle_minutes": 3}, {"max_workers": "many"}):
        with pytest.raises(ValidationError):
            validate_config(prepare_config(shipped | change))


def test_aws_gets_the_users_group_and_spot_machines(monkeypatch, tmp_path):
    """What `ray up` asks of AWS: nothing is opened beside the group that is named, no address is left out."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    with moto.mock_aws():
        ec2, iam = boto3.client("ec2", REGION), boto3.client("iam", REGION)
        network = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=network, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
        ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
        group = ec2.create_security_group(GroupName="ours", Description="ours", VpcId=network)["GroupId"]
        iam.create_instance_profile(InstanceProfileName="ray-autoscaler-v1")
        iam.create_role(RoleName="ray-autoscaler-v1", AssumeRolePolicyDocument="{}")
        iam.add_role_to_instance_profile(InstanceProfileName="ray-autoscaler-v1", RoleName="ray-autoscaler-v1")
        before = {found["GroupId"] for found in ec2.describe_security_groups()["SecurityGroups"]}

        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
        from ray.autoscaler._private.util import prepare_config

        text = (FOLDER / "cluster.yaml").read_text().replace("subnet-here", subnet).replace("group-here", group)
        booted = bootstrap_aws(prepare_config(yaml.safe_load(text)))
        provider = AWSNodeProvider(booted["provider"], booted["cluster_name"])
        for name, kind in booted["available_node_types"].items():
            provider.create_node(dict(kind["node_config"]), {"ray-user-node-type": name}, 1)
        made = [found for entry in ec2.describe_instances()["Reservations"] for found in entry["Instances"]]
        assert {found["GroupId"] for found in ec2.describe_security_groups()["SecurityGroups"]} == before
    assert len(made) == 3 and all([entry["GroupId"] for entry in found["SecurityGroups"]] == [group] for found in made)
    assert [found["InstanceType"] for found in made if found.get("InstanceLifecycle") == "spot"] == ["m7i.4xlarge"]
    assert sorted(set(re.findall(r"[a-z]+-here", (FOLDER / "cluster.yaml").read_text()))) == ["group-here", "share-here", "subnet-here"]


def test_ray_starts_on_a_node_with_the_token_and_on_loopback(config, tmp_path):
    """node.sh in a home of its own, with an install.sh that installs nothing."""
    stand_in = "#!/bin/sh\nmkdir -p $1/bin; echo $* > $1/bin/activate.args\n"
    for name, text in (("ray/node.sh", (FOLDER / "node.sh").read_text()), ("install.sh", stand_in)):
        path = tmp_path / "lodbrain/infra" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    script = str(tmp_path / "lodbrain/infra/ray/node.sh")
    refused = subprocess.run(["sh", script], env=home, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / ".ray/environment").exists()
    token = tmp_path / ".ray/auth_token"
    token.parent.mkdir(exist_ok=True)
    token.write_text("secret")
    subprocess.run(["sh", script], env=home | {"TORCH": "cuda"}, check=True)
    assert token.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / ".venv/bin/activate.args").read_text().split()[1] == "cuda"
    (tmp_path / ".venv/bin/activate").write_text("")
    stub = tmp_path / "bin/ray"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH ${RAY_AUTH_TOKEN-none} $*"\n')
    stub.chmod(0o755)
    own = {"HOME": str(tmp_path), "PATH": f"{stub.parent}:/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.1", "RAY_AUTH_TOKEN": "other"}
    for kind, wanted in (("head", "--head"), ("worker", "--address=10.0.0.1:6379")):
        line = config[f"{kind}_start_ray_commands"][-1]
        said = subprocess.run(["bash", "-c", line], env=own, capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"token {token} none start {wanted}")
        assert kind == "worker" or "--dashboard-host=127.0.0.1 " in said


def test_everything_that_starts_ray_or_submits_asks_for_a_token():
    assert "RAY_AUTH_MODE=token" in (CHECKOUT / "infra/slurm/on-ray.sh").read_text()
    section = (CHECKOUT / "docs/labs.md").read_text().split("## A Ray cluster")[1].split("\n## ")[0]
    assert section.split("```")[1].split("\n")[1] == "export RAY_AUTH_MODE=token"
    for path in [CHECKOUT / "Makefile", *(path for room in ("infra", "pipelines", "lod_model") for path in (CHECKOUT / room).rglob("*"))]:
        if path.suffix in ("", ".sh", ".py", ".yaml", ".sbatch", ".def", ".Dockerfile") and path.is_file():
            assert not re.search(r"RAY_AUTH_MODE\W+disabled|dashboard-host[= ]0\.0\.0\.0", path.read_text()), path


def test_a_job_takes_the_code_and_nothing_else(tmp_path):
    """By Ray's own packing, without a cluster: folders and files that nobody foresaw stay, as do compiled modules."""
    from ray._private.runtime_env.packaging import create_package

    job = yaml.safe_load((FOLDER / "job.yaml").read_text())
    for name in ("pipelines/a.py", "pipelines/__pycache__/a.pyc", "lod_model/models/b.pt", "data_registry/catalogue/c.yaml"):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / name).write_text("code")
    for name in ("shards/s/part-000.parquet", ".git/objects/pack", "our data/sub-01.nii.gz", "notes.txt", ".env"):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / name).write_text("data")
    target = tmp_path / "package.zip"
    create_package(str(tmp_path / "checkout"), target, include_gitignore=False, excludes=job["excludes"])
    files = sorted(name for name in zipfile.ZipFile(target).namelist() if not name.endswith("/"))
    assert files == ["data_registry/catalogue/c.yaml", "lod_model/models/b.pt", "pipelines/a.py"]
    assert job["working_dir"] == "." and job["env_vars"]["OMP_NUM_THREADS"] == "1"

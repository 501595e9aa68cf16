"""infra/ray/cluster.yaml from no worker to what the work asks for and back, with nodes of this machine in place of a cloud's."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from harmonised import WAIT_S, hashes
from real_cluster import NODE_MEMORY, Cluster
from small_heads import CHECKOUT

pytestmark = pytest.mark.ray
HEAD_TYPE = "ray.head.default"  # of Ray's fake cloud
IDLE_MINUTES = 0.1


@pytest.fixture
def growing():
    """A cluster of its own: a head without CPUs, and the autoscaler at work every second."""
    shipped = yaml.safe_load((CHECKOUT / "infra/ray/cluster.yaml").read_text())
    shipped["available_node_types"] = {HEAD_TYPE if name == "head" else name: kind for name, kind in shipped["available_node_types"].items()}
    for name, kind in shipped["available_node_types"].items():
        kind["node_config"] = {}
        if name != HEAD_TYPE:
            kind["resources"] |= {"CPU": 2, "memory": NODE_MEMORY, "object_store_memory": 80_000_000}
    cluster = Cluster()
    cloud = {"type": "external", "module": "loopback_nodes.LoopbackNodes", "gcs_address": cluster.address, "disable_node_updaters": True}
    cloud["use_node_id_as_ip"] = True  # all are processes of one machine
    config = shipped | {"provider": cloud, "head_node_type": HEAD_TYPE, "max_workers": 2, "idle_timeout_minutes": IDLE_MINUTES, "file_mounts": {}}
    file = Path(cluster.folder.name, "autoscaling.json")
    file.write_text(json.dumps(config | {"cluster_synced_files": [], "docker": {}}))
    cluster.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "PYTHONPATH": str(Path(__file__).parent)}
    try:
        cluster.start_head(f"--autoscaling-config={file}")
        yield cluster
    finally:
        cluster.stop()


def nodes(cluster: Cluster) -> list[dict]:
    """Of the living, what they offer."""
    script = "import json, ray; ray.init(log_to_driver=False); print(json.dumps([n['Resources'] for n in ray.nodes() if n['Alive']]))"
    own = cluster.environment | {"RAY_ADDRESS": cluster.address}
    done = subprocess.run([sys.executable, "-c", script], env=own, capture_output=True, text=True, timeout=WAIT_S)
    return json.loads(done.stdout.splitlines()[-1])


def test_nodes_come_with_the_work_and_go_without_it(growing, reference, project):
    assert sum(node.get("CPU", 0) for node in nodes(growing)) == 0
    own = growing.environment | {"RAY_ADDRESS": growing.address, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{growing.environment['PYTHONPATH']}"}
    command = [sys.executable, "-m", "pipelines.harmonise", "--project", str(project)]
    done = subprocess.run(command, env=own, cwd=project, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    assert hashes(project) == hashes(reference)
    grown = nodes(growing)
    assert 2 <= sum(node.get("CPU", 0) for node in grown) <= 4 and not any("GPU" in node for node in grown)
    until = time.monotonic() + WAIT_S
    while any(node.get("CPU", 0) for node in nodes(growing)):
        assert time.monotonic() < until, "idle nodes stay"

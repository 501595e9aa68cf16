"""Stands for a cloud: the nodes that Ray's autoscaler asks for are processes of this machine. Loaded by the head's monitor."""

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LoopbackNodes(FakeMultiNodeProvider):
    """Ray's own, which refuses to be told of memory; its nodes have the machine's."""

    def create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        told = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, told, labels)

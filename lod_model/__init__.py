"""What learns from the shards and uses the result: networks, training, evaluation, report, ``lodbrain``."""

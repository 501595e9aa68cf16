"""What a training begins with: the network of each stage, whether the settings fit it and this machine, and the run's entry in MLflow."""

import os
import shutil

from data_registry import protocol
from data_registry.errors import InputError
from data_registry.params import Params, Train
from lod_model import processes
from lod_model.runs import run_key, tracking_tags, training_identity
from lod_model.tracking import Tracker


def begun(network: str, params: Params) -> tuple[Tracker, str]:
    """MLflow's run of all folds, made if there is none yet; InputError for settings that do not fit the network."""
    check_fits(network, grown(network, "fine", None, params), params)
    run, tracker = params.run_name(network), Tracker(params.experiment, uri=params.resources.mlflow_uri)
    parent = tracker.run(run_key(run, training_identity(network, params)), name=run, tags=tracking_tags() | {"network": network})
    tracker.params(parent, {"network": network, **_flat(params)})
    return tracker, parent


def epochs_of(network: str, params: Params) -> int:
    """Of all stages of a fold; InputError for settings that do not fit the network."""
    check_fits(network, grown(network, "fine", None, params), params)
    return sum(getattr(params.train, level).epochs for level in ("coarse", "fine") if grown(network, level, None, params) is not None)


def grown(network: str, level: str, previous, params: Params):
    """The network of a stage, holding what the stage before it learned; None for a coarse stage that the network does not have."""
    import torch

    from lod_model import networks

    torch.manual_seed(params.train.seed)
    learned = [protocol.load(name) for name in networks.outputs(network, params.train.protocols)]
    window = {"window": params.train.crops.side} if networks.recipe_of(network).samples == "crops" else {}
    own, given = params.train.network_of(network), networks.config_for(network, learned)
    for key, value in given.items():
        if own.get(key, value) != value:
            raise InputError(f"train.network: {key} of {network} is {own[key]}; it follows from train.protocol, so {value}, or nothing, is wanted")
    config = {**window, **own, **given}  # the protocols in the order of train.protocol, which is that of the label maps
    if level == "coarse":
        return networks.build_coarse(network, config)
    net = networks.build(network, config)
    if previous is not None:
        networks.load_coarse(net, previous, freeze=params.train.coarse_level == "frozen")
    return net


def check_fits(name: str, net, params: Params) -> None:
    """That the network has what the settings ask for; InputError names the setting."""
    from lod_model import networks
    from lod_model.feeding import augments_on_device

    settings = params.train
    for key, value in settings.network.items():
        if isinstance(value, dict) and not networks.is_known(key):
            raise InputError(f"train.network.{key}: no such network; a setting, or settings below one of {', '.join(networks.names())}, is wanted")
    if settings.recipe not in ("shared", "own") and not networks.is_known(settings.recipe):
        raise InputError(f"train.recipe: {settings.recipe!r} is none; shared, own or one of {', '.join(networks.names())} is wanted")
    augments_on_device(name, networks.recipe_of(name, settings.recipe), settings)
    if settings.checkpointing == "blocks" and not hasattr(net, "checkpoint_blocks"):
        raise InputError(f"train.checkpointing is blocks: network {name} has none to keep; none is wanted")
    _check_computes(settings)
    if settings.fine_patch and (not hasattr(net, "forward_window") or net.config.levels == 1):
        raise InputError(f"train.fine_patch is {settings.fine_patch}: network {name} has no level that sees the whole head; null is wanted")
    if settings.fine_patch and settings.fine_patch % net.config.multiple:
        raise InputError(f"train.fine_patch is {settings.fine_patch}: null or a multiple of {net.config.multiple} is wanted")


def _check_computes(settings: Train) -> None:
    """That this machine, and these processes, compute as the settings ask for."""
    import torch

    if settings.compile == "network" and settings.fine_patch:
        raise InputError("train.compile is network: windows of train.fine_patch begin elsewhere in each step; none is wanted")
    compiler = os.environ.get("CXX", "g++")
    if settings.compile == "network" and not torch.cuda.is_available() and not shutil.which(compiler):
        raise InputError(f"train.compile is network: no C++ compiler {compiler} on this machine; one, or train.compile none, is wanted")
    if settings.batch_norms == "all" and processes.group().world > 1 and not torch.cuda.is_available():
        raise InputError("train.batch_norms is all: between processes without GPUs there is no such norm; own, or one process, is wanted")


def _flat(params: Params) -> dict[str, object]:
    """The settings as MLflow shows them: dotted keys; where things run is no setting."""
    flat: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", params.model_dump(mode="json", exclude={"resources", "index"}))
    return flat

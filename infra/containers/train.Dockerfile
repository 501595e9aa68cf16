# All stages, on NVIDIA GPUs. torch brings CUDA's libraries along; the base image has the release of CUDA that they are of. In the project's folder:
#   docker build -f infra/containers/train.Dockerfile --build-arg REVISION="$(git describe --always)" -t lodbrain-train .
#   docker run --rm --gpus all --shm-size 8g -u "$(id -u):$(id -g)" -v /scratch/my_project:/project lodbrain-train dvc repro
FROM docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml requirements.lock README.md LICENSE params.yaml dvc.yaml /opt/lodbrain/
COPY data_registry /opt/lodbrain/data_registry
COPY lod_model /opt/lodbrain/lod_model
COPY pipelines /opt/lodbrain/pipelines
COPY params /opt/lodbrain/params
COPY infra /opt/lodbrain/infra
RUN PIP_NO_CACHE_DIR=1 sh /opt/lodbrain/infra/install.sh /opt/lodbrain/.venv cuda
ARG REVISION=unknown
ENV PATH=/opt/lodbrain/.venv/bin:$PATH PYTHONPATH=/opt/lodbrain PYTHONDONTWRITEBYTECODE=1 \
    LODBRAIN_REVISION=$REVISION HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib DVC_NO_ANALYTICS=1 RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /project
CMD ["bash"]

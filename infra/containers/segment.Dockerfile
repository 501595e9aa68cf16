# `lodbrain segment` on CPUs, with the weights that come with the project. In the project's folder:
#   docker build -f infra/containers/segment.Dockerfile --build-arg REVISION="$(git describe --always)" -t lodbrain-segment .
#   docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/data" lodbrain-segment segment scan.nii.gz -o out
FROM docker.io/library/python:3.11.14-slim-bookworm AS build
COPY pyproject.toml README.md LICENSE /source/
COPY data_registry /source/data_registry
COPY lod_model /source/lod_model
COPY infra/containers /source/infra/containers
ARG TORCH_WHEELS=https://download.pytorch.org/whl/cpu/torch/
RUN sh /source/infra/containers/install_segment.sh /opt/lodbrain

FROM docker.io/library/python:3.11.14-slim-bookworm
COPY --from=build /opt/lodbrain /opt/lodbrain
ARG REVISION=unknown
ENV PATH=/opt/lodbrain/bin:$PATH LODBRAIN_REVISION=$REVISION HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["lodbrain"]
CMD ["--help"]

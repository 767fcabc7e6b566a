# Images with Stoker:
#   docker build -t stoker .                  on NVIDIA's PyTorch, whose torch is kept
#   docker build -t stoker:cpu --target cpu . on Python alone, for tests and small runs
# Dependencies are a layer of their own; the code is the last one, so that a change of it sends a few hundred kB.

ARG NVIDIA=nvcr.io/nvidia/pytorch:26.08-py3
ARG PYTHON=python:3.12-slim

FROM ${PYTHON} AS cpu-dependencies
WORKDIR /opt/stoker
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt docker/requirements.py ./
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch
RUN python3 requirements.py > requirements.txt && pip install --no-cache-dir -c constraints.txt -r requirements.txt

FROM cpu-dependencies AS cpu
COPY . .
RUN pip install --no-cache-dir --no-deps . && stoker --version
WORKDIR /runs

FROM ${NVIDIA} AS gpu-dependencies
WORKDIR /opt/stoker
COPY pyproject.toml docker/requirements.py ./
# The versions of the base are NVIDIA's own builds: what is there already is kept.
RUN python3 requirements.py > requirements.txt && pip install --no-cache-dir -r requirements.txt

FROM gpu-dependencies AS gpu
COPY . .
RUN pip install --no-cache-dir --no-deps . && stoker --version
WORKDIR /runs

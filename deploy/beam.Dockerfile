# A worker of `mt3 archive` on Flink, Spark or Dataflow; versions as in requirements-archives.txt.
#   docker build -f deploy/beam.Dockerfile -t REGISTRY/mt3-beam .
FROM apache/beam_python3.11_sdk:2.77.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE requirements.txt requirements-archives.txt ./
COPY mt3_keras mt3_keras
RUN pip install --no-cache-dir -r requirements-archives.txt .
# A worker has a core: threads of NumPy's BLAS would wait busily for each other.
ENV OMP_NUM_THREADS=1

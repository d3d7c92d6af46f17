# The command `mt3` with the model `small`, on LiteRT: no TensorFlow, no shell, no root.
#   docker build -f deploy/light.Dockerfile -t mt3 .
#   docker run --rm -v "$PWD:/music" mt3 transcribe /music/song.mp3 --output_dir /music/out
# Without the ffmpeg of imageio-ffmpeg, 80 MB: WAV, FLAC, OGG and MP3 are read, M4A and video are not.
FROM debian:12-slim AS build
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends python3-venv && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE requirements.txt ./
COPY mt3_keras mt3_keras
# Tests of packages, and pip, are a fifth of it.
RUN python3 -m venv /venv && \
    /venv/bin/pip install --no-cache-dir --no-compile -c requirements.txt . && \
    /venv/bin/pip uninstall --yes imageio-ffmpeg && \
    find /venv -depth -type d \( -name tests -o -name __pycache__ \) -exec rm -rf {} + && \
    rm -rf /venv/lib/python3.11/site-packages/pip*

# Debian 12's Python 3.11, which the environment above is of, and little else.
FROM gcr.io/distroless/python3-debian12:nonroot
COPY --from=build /venv /venv
# Matplotlib's cache of fonts
ENV MPLCONFIGDIR=/tmp
WORKDIR /music
ENTRYPOINT ["/venv/bin/python", "-m", "mt3_keras"]
CMD ["--help"]

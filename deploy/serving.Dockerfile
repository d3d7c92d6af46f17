# TF Serving with a model baked in: REST on 8501, gRPC on 8500, metrics for Prometheus on 8501.
#   docker build -f deploy/serving.Dockerfile -t mt3-serving:1 .
# A model's versions are the image's tags: they are rolled out, and back, as any image is.
ARG SERVING=2.21.0
FROM python:3.11-slim-bookworm AS export
ARG MODEL=small
WORKDIR /src
COPY requirements.txt requirements-serving.txt ./
RUN pip install --no-cache-dir -r requirements-serving.txt
COPY . .
RUN pip install --no-cache-dir --no-deps . && \
    python -m export.main --model "$MODEL" --out_dir /out --formats saved_model && \
    basename /out/saved_model/*/ > /out/saved_model/name

FROM tensorflow/serving:${SERVING}
COPY --from=export /out/saved_model /models
RUN useradd --system --uid 10001 serving
USER 10001
EXPOSE 8500 8501
# The image holds no curl. A model answers AVAILABLE when it is loaded and warm.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8501 && printf 'GET /v1/models/%s HTTP/1.0\\r\\n\\r\\n' \"$(cat /models/name)\" >&3 && grep -q AVAILABLE <&3"]
ENTRYPOINT ["tensorflow_model_server", "--port=8500", "--rest_api_port=8501", "--model_config_file=/models/models.config", "--monitoring_config_file=/models/monitoring.config", "--enable_batching", "--batching_parameters_file=/models/batching_parameters.txt", "--rest_api_timeout_in_ms=120000"]

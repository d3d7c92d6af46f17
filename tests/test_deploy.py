"""The files of deploy/ are sound and agree with each other and with the code, as far as that shows.

None of the images was built: no container engine was at hand.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT
from tests.test_package import pins_of

DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def run_tool(name: str, *arguments) -> str:
    """What a linter of the extra [dev] prints; skips where it is not installed."""
    tool = shutil.which(name, path=pathlib.Path(sys.executable).parent) or shutil.which(name)
    if tool is None:
        pytest.skip(f"needs {name}: the extra [dev]")
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing_in_the_dockerfiles(path):
    assert run_tool("hadolint", path) == ""


def test_the_manifest_is_of_the_schema_of_kubernetes():
    printed = run_tool("kubernetes-validate", "--strict", DEPLOY / "kubernetes.yaml")
    assert printed.count("passed") == len(KUBERNETES)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_the_images_copy_is_there(path):
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", path.read_text(), re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source


def test_images_have_the_versions_that_are_pinned():
    beam = (DEPLOY / "beam.Dockerfile").read_text()
    assert f"_sdk:{pins_of('requirements-archives.txt')['apache-beam']}\n" in beam
    serving = (DEPLOY / "serving.Dockerfile").read_text()
    assert f"SERVING={pins_of('requirements.txt')['tensorflow']}\n" in serving


def test_ports_users_and_paths_agree():
    serving = (DEPLOY / "serving.Dockerfile").read_text()
    assert re.search(r"EXPOSE (.*)", serving)[1].split() == ["8500", "8501"]
    deployment, service = KUBERNETES[:2]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert named == {"grpc": 8500, "rest": 8501}
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == named
    user = deployment["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"USER {user}\n" in serving
    (target,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert target["static_configs"][0]["targets"] == ["serving:8501"]
    assert target["metrics_path"] in (ROOT / "export/saved_model.py").read_text()
    assert "reverse_proxy @models serving:8501" in (DEPLOY / "Caddyfile").read_text()


def test_the_server_is_reached_through_the_proxy_alone():
    services = COMPOSE["services"]
    assert "ports" not in services["serving"] and services["serving"]["networks"] == ["inner"]
    assert COMPOSE["networks"]["inner"] == {"internal": True}
    for name, service in services.items():
        assert {*service["networks"]} <= {*COMPOSE["networks"]}, name
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            found = (DEPLOY / source).exists() if "/" in source else source in COMPOSE["volumes"]
            assert found, volume
    assert services["proxy"]["depends_on"]["serving"]["condition"] == "service_healthy"
    assert "HEALTHCHECK" in (DEPLOY / "serving.Dockerfile").read_text()


@pytest.mark.parametrize("state", ["AVAILABLE", "LOADING"])
def test_a_pod_is_ready_when_the_model_is_available(tmp_path, state):
    """The probe's own shell line, against a server that answers as TF Serving does."""
    import http.server
    import json
    import threading

    class Model(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/v1/models/small"
            body = json.dumps({"model_version_status": [{"version": "1", "state": state}]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (container,) = KUBERNETES[0]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "name").write_text("small\n")
    for probe in ("startupProbe", "readinessProbe"):
        *shell, line = container[probe]["exec"]["command"]
        line = line.replace("/8501", f"/{server.server_port}")
        line = line.replace("/models/name", str(tmp_path / "name"))
        done = subprocess.run([*shell, line], capture_output=True, timeout=20)
        assert (done.returncode == 0) == (state == "AVAILABLE"), done.stderr
    server.shutdown()

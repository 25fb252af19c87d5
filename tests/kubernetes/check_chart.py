"""Renders and checks the chart and the examples, and writes what programs are asked about to a directory.

    check_chart.py OUT

Every object passes kubernetes-validate with --strict, but for kinds of other projects, which are held to assertions here.
"""

import contextlib
import io
import json
import pathlib
import subprocess
import sys

import yaml
from helm_python.chart import Chart, lint

ROOT = pathlib.Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/tunefleet"
OUT = pathlib.Path(sys.argv[1])
FOREIGN = {"ServiceMonitor", "PrometheusRule", "JobSet"}
# The least that a cluster needs to be told.
LEAST = {"auth": {"existingSecret": "token"}, "tls": {"existingSecret": "tls"}, "shared": {"existingClaim": "shared"}}
ALL = {
    **LEAST,
    "server": {"enabled": True, "tokensSecret": "tokens", "config": {"quantize": "nf4"}},
    "workers": {"env": {"NCCL_DEBUG": "WARN"}, "config": {"rank_memory_gib": 100}, "nodeSelector": {"gpu": "a100"}},
    "coordinator": {"config": {"keep_ended_days": 30}, "tolerations": [{"key": "a", "operator": "Exists"}]},
    "images": {"pullSecrets": ["registry"]},
    "networkPolicy": {"clients": {"team": "ml"}},
    "monitoring": {"serviceMonitor": {"enabled": True, "labels": {"release": "p"}}, "rules": {"enabled": True}, "dashboards": {"enabled": True}},
}
CASES = {
    "least": LEAST,
    "all": ALL,
    "plain": {**LEAST, "tls": {"insecure": True}, "workers": {"gpus": 0, "sandbox": True}, "networkPolicy": {"enabled": False}},
}
# What is missing or wrong, and what is said of it.
REFUSED = [
    ({**LEAST, "auth": {}}, "auth.existingSecret"),
    ({**LEAST, "tls": {}}, "tls.insecure"),
    ({**LEAST, "shared": {}}, "shared.existingClaim"),
    ({**LEAST, "server": {"enabled": True}}, "server.tokensSecret"),
    ({**LEAST, "workers": {"replica": 2}}, "replica"),
    ({**LEAST, "workers": {"gpus": "eight"}}, "gpus"),
]


def rendered(values):
    with Chart.load(CHART) as chart:
        chart.validate_schema(values)
        manifests = chart.render(values, name="demo", namespace="ml")
    texts = [text for name, text in manifests.items() if name.endswith(".yaml")]
    return [o for text in texts for o in yaml.safe_load_all(text) if o]


def validate(objects, name):
    known = [o for o in objects if o["kind"] not in FOREIGN]
    path = OUT / f"{name}.yaml"
    path.write_text(yaml.safe_dump_all(known))
    run = subprocess.run([pathlib.Path(sys.executable).with_name("kubernetes-validate"), "--strict", path],
                         capture_output=True, text=True)
    said = run.stdout + run.stderr
    assert run.returncode == 0 and "could not find schema" not in said.lower(), said
    assert said.count(" passed for resource ") == len(known), said
    return len(known)


def of(objects, kind, part=None):
    found = [o for o in objects if o["kind"] == kind and (part is None or o["metadata"]["name"].endswith(part))]
    assert found, (kind, part)
    return found[0]


def pods(objects):
    for o in objects:
        if o["kind"] in ("StatefulSet", "Deployment", "Job"):
            pod = o["spec"]["template"]["spec"]
            claimed = [{"name": claim["metadata"]["name"]} for claim in o["spec"].get("volumeClaimTemplates", [])]
            yield o["metadata"]["name"], {**pod, "volumes": pod["volumes"] + claimed}
        if o["kind"] == "JobSet":
            for job in o["spec"]["replicatedJobs"]:
                yield job["name"], job["template"]["spec"]["template"]["spec"]


def restricted(name, pod, may_be_unconfined=False):
    """Kubernetes' "restricted" standard, and a root file system that is not written to."""
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] > 0, name
    assert pod["automountServiceAccountToken"] is False, name
    allowed = ["RuntimeDefault"] + ["Unconfined"] * may_be_unconfined
    assert security["seccompProfile"]["type"] in allowed, name
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        assert not pod.get(key), (name, key)
    for container in pod["containers"] + pod.get("initContainers", []):
        least = container["securityContext"]
        assert least["allowPrivilegeEscalation"] is False and least["capabilities"]["drop"] == ["ALL"], name
        assert least["readOnlyRootFilesystem"] is True and not least.get("privileged"), name
        assert "memory" in container["resources"]["limits"], name
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounts <= {volume["name"] for volume in pod["volumes"]}, name
    assert all("hostPath" not in volume for volume in pod["volumes"]), name


def port(container, name):
    return next(p["containerPort"] for p in container["ports"] if p["name"] == name)


def agreement(objects):
    """Ports, probes and services of one rendering, among themselves; for the programs, what is said of them."""
    facts = {"probes": {}, "grace": {}}
    for part in ("coordinator", "worker", "server"):
        kind = "Deployment" if part == "server" else "StatefulSet"
        pod = of(objects, kind, part)["spec"]["template"]["spec"]
        container = pod["containers"][0]
        names = {p["name"] for p in container["ports"]}
        probes = {container[k]["httpGet"]["path"] for k in ("startupProbe", "livenessProbe", "readinessProbe")}
        assert all(container[k]["httpGet"]["port"] in names for k in ("startupProbe", "livenessProbe", "readinessProbe"))
        service = of(objects, "Service", part)
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= names, part
        config = yaml.safe_load(of(objects, "ConfigMap", part)["data"][f"{part}.yaml"])
        scraped = "http" if part == "server" else "metrics"
        listens = config["listen"] if part != "worker" else config["metrics"]
        first = "http" if part == "server" else "grpc" if part == "coordinator" else "metrics"
        assert listens.rsplit(":", 1)[1] == str(port(container, first)), part
        if part == "coordinator":
            assert config["metrics"].rsplit(":", 1)[1] == str(port(container, "metrics"))
            assert of(objects, "ConfigMap", "worker")["data"]["worker.yaml"].count(f":{port(container, 'grpc')}\n") == 1
        monitor = of(objects, "ServiceMonitor", part)
        endpoint = monitor["spec"]["endpoints"][0]
        assert endpoint["port"] == scraped and endpoint["honorLabels"] is True and endpoint["path"] == "/metrics", part
        labels = service["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items(), part
        policy = of(objects, "NetworkPolicy", part)
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items(), part
        facts["probes"][part] = sorted(probes | {"/metrics"})
        facts["grace"][part] = pod["terminationGracePeriodSeconds"]
        (OUT / f"{part}-config.yaml").write_text(of(objects, "ConfigMap", part)["data"][f"{part}.yaml"])
    worker = of(objects, "StatefulSet", "worker")["spec"]
    container = worker["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8 and worker["podManagementPolicy"] == "Parallel"
    shm = next(v for v in worker["template"]["spec"]["volumes"] if v["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    facts["arguments"] = {part: pod["containers"][0]["args"] for part, pod in (
        ("worker", worker["template"]["spec"]), ("coordinator", of(objects, "StatefulSet", "coordinator")["spec"]["template"]["spec"]))}
    assert {o["metadata"]["name"].rsplit("-", 1)[1] for o in objects if o["kind"] == "PodDisruptionBudget"} == {"coordinator", "worker"}
    rules = of(objects, "PrometheusRule")["spec"]
    assert rules == yaml.safe_load((ROOT / "deploy/monitoring/rules.yml").read_text())
    boards = of(objects, "ConfigMap", "dashboards")["data"]
    assert len(boards) == 4
    for name, text in boards.items():
        assert json.loads(text) == json.loads((ROOT / "deploy/monitoring/dashboards" / name.removeprefix("tunefleet-")).read_text())
    return facts


def examples():
    for name in ("indexed-job", "jobset"):
        objects = [o for o in yaml.safe_load_all((ROOT / f"deploy/kubernetes/{name}.yaml").read_text()) if o]
        for pod_name, pod in pods(objects):
            restricted(f"{name} {pod_name}", pod)
        if name == "indexed-job":
            validate(objects, name)
            job = of(objects, "Job")["spec"]
            assert job["completionMode"] == "Indexed" and job["template"]["spec"]["terminationGracePeriodSeconds"] >= 660
        else:
            spec = of(objects, "JobSet")["spec"]
            jobs = {job["name"]: job["template"]["spec"] for job in spec["replicatedJobs"]}
            assert spec["successPolicy"]["targetReplicatedJobs"] == ["launch"] and set(jobs) == {"coordinator", "worker", "launch"}
            # What JobSet makes of them are Jobs.
            made = [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job}, "spec": spec} for job, spec in jobs.items()]
            validate(made, name)
            assert jobs["worker"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 660


findings = lint(CHART, LEAST)
bad = [m for m in findings["messages"] if m["severity"] > 1] + findings["errors"]
assert not bad, bad
counts = {}
for name, values in CASES.items():
    objects = rendered(values)
    counts[name] = validate(objects, name)
    for pod_name, pod in pods(objects):
        restricted(f"{name} {pod_name}", pod, may_be_unconfined=name == "plain" and "worker" in pod_name)
for values, said in REFUSED:
    try:
        rendered(values)
    except Exception as error:
        assert said in str(error), (said, str(error))
    else:
        raise AssertionError(f"{values} was not refused")
examples()
facts = agreement(rendered(ALL))
(OUT / "facts.json").write_text(json.dumps(facts))
print(json.dumps(counts))

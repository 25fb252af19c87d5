#!/usr/bin/env python3
"""Writes Grafana's dashboards beside this file: `dashboards.py`, after a change here.

Every query in them is run against a real Prometheus by `tests/tests/it/monitoring.rs`; a panel whose description says
"Needs a GPU" or "Needs DCGM" is the exception.
"""

import json
import pathlib

HERE = pathlib.Path(__file__).parent / "dashboards"
GPU = "Needs a GPU."
DCGM = "Needs DCGM's exporter beside the workers."

JOB = '{job=~"$job"}'


def variable(name, query, label):
    return {
        "name": name, "label": label, "type": "query", "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": {"query": query, "refId": name}, "refresh": 2, "includeAll": True, "multi": True,
        "allValue": ".*", "current": {"text": "All", "value": "$__all"}, "sort": 1,
    }


DATASOURCE = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
JOBS = variable("job", "label_values(tunefleet_job_info, job)", "Job")
RANK_JOBS = variable("job", "label_values(tunefleet_rank_info, job)", "Job")
SERVERS = variable("instance", "label_values(tunefleet_serve_build_info, instance)", "Server")


def panel(title, unit, *targets, kind="timeseries", about="", width=8, **more):
    """`targets` are pairs of a query and the legend of its series."""
    return {
        "title": title, "type": kind, "description": about, "width": width,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "fieldConfig": {"defaults": {"unit": unit, **more}, "overrides": []},
        "targets": [
            {"expr": query, "legendFormat": legend, "refId": chr(ord("A") + index),
             "datasource": {"type": "prometheus", "uid": "$datasource"}}
            for index, (query, legend) in enumerate(targets)
        ],
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}} if kind == "timeseries"
        else {"reduceOptions": {"calcs": ["lastNotNull"]}},
    }


def stat(title, unit, query, about="", legend="", **more):
    return panel(title, unit, (query, legend), kind="stat", about=about, width=4, **more)


def quantiles(metric, by=""):
    grouping = f"le, {by}" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return [(f"histogram_quantile({q}, sum by ({grouping}) (rate({metric}[$__rate_interval])))", f"{legend}p{int(100 * q)}")
            for q in (0.5, 0.95)]


def dashboard(uid, title, variables, panels):
    x = y = height = 0
    placed = []
    for number, p in enumerate(panels, 1):
        width, tall = p.pop("width"), 4 if p["type"] == "stat" else 8
        if x + width > 24:
            x, y, height = 0, y + height, 0
        placed.append({"id": number, "gridPos": {"x": x, "y": y, "w": width, "h": tall}, **p})
        x, height = x + width, max(height, tall)
    return {
        "uid": uid, "title": title, "tags": ["tunefleet"], "schemaVersion": 39, "version": 1, "editable": True,
        "refresh": "10s", "time": {"from": "now-6h", "to": "now"}, "timezone": "browser",
        "templating": {"list": [DATASOURCE, *variables]}, "panels": placed,
        "links": [{"title": "Tunefleet", "type": "dashboards", "tags": ["tunefleet"], "asDropdown": True}],
    }


FLEET = dashboard("tunefleet-fleet", "Tunefleet / Fleet", [], [
    stat("Running", "short", 'tunefleet_jobs{state="running"}'),
    stat("Waiting for slots", "short", "tunefleet_queue_depth"),
    stat("Failed", "short", 'tunefleet_jobs{state="failed"}'),
    stat("Workers ready", "short", 'tunefleet_workers{state="ready"}'),
    stat("Slots taken", "percentunit", "tunefleet:slots_used:ratio", min=0, max=1),
    stat("Oldest heartbeat", "s", "max(tunefleet_worker_heartbeat_age_seconds)"),
    panel("Jobs", "short", ("tunefleet_jobs > 0", "{{state}}")),
    panel("Workers", "short", ("tunefleet_workers > 0", "{{state}}")),
    panel("Goodput", "percentunit", ("tunefleet_job_goodput_ratio", "{{job}}"), min=0, max=1,
          about="Time of training that went into steps that count, as a share of all."),
    panel("Time lost, by cause", "s", ("sum by (cause) (increase(tunefleet_job_lost_seconds_total[1h]))", "{{cause}}"),
          about="In the last hour: start, restart, rework, hang, queue, and pause (evaluation and checkpoints)."),
    panel("Attempts that ended, by cause", "short", ("sum by (cause) (tunefleet_job_attempts_total)", "{{cause}}")),
    panel("Tokens per second", "short", ("tunefleet_job_tokens_per_second", "{{job}}")),
    panel("Failure detection", "s", *quantiles("tunefleet_failure_detection_seconds_bucket"),
          about="From the last sign of progress of an attempt that failed to its end."),
    panel("Restart", "s", *quantiles("tunefleet_restart_duration_seconds_bucket"),
          about="From the end of an attempt that failed to the first reported step of the next."),
    panel("Checkpoint pause", "s", *quantiles("tunefleet_checkpoint_pause_seconds_bucket")),
    panel("Calls", "reqps", ("sum by (method, code) (rate(tunefleet_rpc_server_handled_total[$__rate_interval]))",
                             "{{method}} {{code}}")),
    panel("Time of a call", "s", *quantiles("tunefleet_rpc_server_duration_seconds_bucket")),
    panel("Time until a change is on disk", "s", *quantiles("tunefleet_store_commit_duration_seconds_bucket")),
    panel("Memory of the programs", "bytes", ('process_resident_memory_bytes{job=~"tunefleet.*"}', "{{instance}}")),
    panel("Processors of the programs", "short",
          ('rate(process_cpu_seconds_total{job=~"tunefleet.*"}[$__rate_interval])', "{{instance}}")),
    panel("Unacknowledged reports", "short", ("tunefleet_daemon_unacknowledged_reports", "{{instance}}"),
          about="Kept on a worker's disk until the coordinator has them."),
])

JOB_BOARD = dashboard("tunefleet-job", "Tunefleet / Job", [JOBS], [
    stat("Step", "short", f"tunefleet_job_step{JOB}", legend="{{job}}"),
    stat("Of", "short", f"tunefleet_job_steps_target{JOB}", legend="{{job}}"),
    stat("Time left", "s", f"tunefleet_job_eta_seconds{JOB}", legend="{{job}}"),
    stat("Attempt", "short", f"tunefleet_job_attempt{JOB}", legend="{{job}}"),
    stat("Goodput", "percentunit", f"tunefleet_job_goodput_ratio{JOB}", legend="{{job}}"),
    stat("Since it last went on", "s", f"time() - tunefleet_job_last_progress_timestamp_seconds{JOB}", legend="{{job}}"),
    panel("Loss", "short", (f"tunefleet_job_loss{JOB}", "{{job}} train"), (f"tunefleet_job_eval_loss{JOB}", "{{job}} eval"), width=12),
    panel("Learning rate", "sci", (f"tunefleet_job_learning_rate{JOB}", "{{job}}"), width=12),
    panel("Gradient norm", "short", (f"tunefleet_job_grad_norm{JOB}", "{{job}}")),
    panel("Tokens per second", "short", (f"tunefleet_job_tokens_per_second{JOB}", "{{job}}")),
    panel("Duration of a step", "s", (f"tunefleet_job_step_duration_seconds{JOB}", "{{job}}")),
    panel("Model FLOP/s", "flops", (f"tunefleet_job_model_flops_per_second{JOB}", "{{job}}"),
          about="What the model needs; what is computed again is not counted."),
    panel("Model FLOPs utilisation", "percentunit", (f"tunefleet_job_model_flops_utilization_ratio{JOB}", "{{job}}"),
          about=f"Share of what all its GPUs can do in bf16. {GPU}", min=0, max=1),
    panel("Where the time went", "s", (f"tunefleet_job_productive_seconds_total{JOB}", "{{job}} productive"),
          (f"tunefleet_job_lost_seconds_total{JOB}", "{{job}} {{cause}}")),
    panel("Age of the newest checkpoint", "s", (f"tunefleet:checkpoint_age:seconds{JOB}", "{{job}} age"),
          (f"tunefleet_checkpoint_interval_seconds{JOB}", "{{job}} interval")),
    panel("Disk", "bytes", (f"tunefleet_job_output_free_bytes{JOB}", "{{job}} free"),
          (f"tunefleet_checkpoint_bytes{JOB}", "{{job}} one checkpoint")),
    panel("Attempts that ended", "short", (f"tunefleet_job_attempts_total{JOB}", "{{job}} {{cause}}")),
])

SHARE = f"tunefleet_rank_WHAT_wait_seconds{JOB} / tunefleet_rank_step_duration_seconds{JOB}"
ON_RANK = " * on (gpu_uuid) group_left (job, rank) tunefleet_rank_info" + '{job=~"$job", gpu_uuid!=""}'
RANK = dashboard("tunefleet-rank", "Tunefleet / Rank", [RANK_JOBS], [
    panel("Since a rank last went on", "s", (f"tunefleet_rank_progress_age_seconds{JOB}", "{{job}} {{rank}}"),
          about="Since its step or section last changed. The rank that stays behind is the one that the others wait for."),
    panel("Step", "short", (f"tunefleet_rank_step{JOB}", "{{job}} {{rank}}")),
    panel("Section", "short", (f"sum by (section) (tunefleet_rank_section_info{JOB})", "{{section}}"),
          about="How many ranks are in which section of the training loop."),
    panel("Duration of a step", "s", (f"tunefleet_rank_step_duration_seconds{JOB}", "{{job}} {{rank}}")),
    panel("Waiting for collectives", "percentunit", (SHARE.replace("WHAT", "collective"), "{{job}} {{rank}}"),
          about="Share of a step in which the rank's thread stood still. On a GPU collectives are ordered on the device."),
    panel("Waiting for data", "percentunit", (SHARE.replace("WHAT", "data"), "{{job}} {{rank}}"),
          about="Share of a step. A rank on a GPU computes meanwhile."),
    panel("Peak memory of tensors", "bytes", (f"tunefleet_rank_peak_memory_bytes{JOB}", "{{job}} {{rank}}")),
    panel("Rank processes", "short", ("tunefleet_daemon_ranks", "{{instance}} run"), ("tunefleet_daemon_slots", "{{instance}} slots")),
    panel("Exits", "short", ("sum by (instance, result) (increase(tunefleet_daemon_rank_exits_total[1h]))", "{{instance}} {{result}}")),
    panel("GPU utilisation", "percentunit", (f"tunefleet_gpu_utilization_ratio{ON_RANK}", "{{job}} {{rank}}"), about=GPU, min=0, max=1),
    panel("GPU memory", "percentunit",
          (f"(tunefleet_gpu_used_memory_bytes / tunefleet_gpu_memory_bytes){ON_RANK}", "{{job}} {{rank}}"), about=GPU, min=0, max=1),
    panel("GPU power", "watt", (f"tunefleet_gpu_power_watts{ON_RANK}", "{{job}} {{rank}}"), about=GPU),
    panel("Tensor cores", "percentunit",
          ('DCGM_FI_PROF_PIPE_TENSOR_ACTIVE * on (UUID) group_left (job, rank) label_replace('
           'tunefleet_rank_info{job=~"$job", gpu_uuid!=""}, "UUID", "$1", "gpu_uuid", "(.+)")', "{{job}} {{rank}}"), about=DCGM),
    panel("Last XID error", "short",
          ('DCGM_FI_DEV_XID_ERRORS * on (UUID) group_left (job, rank) label_replace('
           'tunefleet_rank_info{job=~"$job", gpu_uuid!=""}, "UUID", "$1", "gpu_uuid", "(.+)")', "{{job}} {{rank}}"), about=DCGM),
])

AT = '{instance=~"$instance"}'
SERVER = dashboard("tunefleet-server", "Tunefleet / Completion server", [SERVERS], [
    stat("Running", "short", f"sum(tunefleet_serve_running_completions{AT})"),
    stat("Waiting", "short", f"sum(tunefleet_serve_waiting_requests{AT})"),
    stat("Tokens held", "short", f"sum(tunefleet_serve_cached_tokens{AT})"),
    stat("First token, p95", "s", "max(tunefleet:first_token_seconds:p95)"),
    stat("Prompt tokens reused", "percentunit", f"sum(tunefleet_serve_reused_prompt_tokens_total{AT}) / sum(tunefleet_serve_prompt_tokens_total{AT})"),
    stat("Tokens guessed", "percentunit", f"sum(tunefleet_serve_guessed_tokens_total{AT}) / sum(tunefleet_serve_generated_tokens_total{AT})"),
    panel("Requests", "reqps", (f"sum by (route, status) (rate(tunefleet_serve_requests_total{AT}[$__rate_interval]))", "{{route}} {{status}}")),
    panel("First token", "s", *quantiles(f"tunefleet_serve_first_token_seconds_bucket{AT}"),
          about="From a request's arrival to the first token of its completion."),
    panel("Time of an answer", "s", *quantiles(f"tunefleet_serve_request_duration_seconds_bucket{AT}", "route")),
    panel("Tokens generated", "short", (f"sum by (instance) (rate(tunefleet_serve_generated_tokens_total{AT}[$__rate_interval]))", "{{instance}}")),
    panel("Prompt tokens", "short", (f"sum by (instance) (rate(tunefleet_serve_prompt_tokens_total{AT}[$__rate_interval]))", "{{instance}} all"),
          (f"sum by (instance) (rate(tunefleet_serve_reused_prompt_tokens_total{AT}[$__rate_interval]))", "{{instance}} reused")),
    panel("Completions", "short", (f"tunefleet_serve_running_completions{AT}", "{{instance}} running"),
          (f"tunefleet_serve_waiting_requests{AT}", "{{instance}} waiting")),
])

if __name__ == "__main__":
    for name, board in [("fleet", FLEET), ("job", JOB_BOARD), ("rank", RANK), ("server", SERVER)]:
        (HERE / f"{name}.json").write_text(json.dumps(board, indent=1) + "\n")

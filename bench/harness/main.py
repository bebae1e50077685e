"""Runs the legs against each other and writes bench/results.

One machine, one run: only ratios between legs mean something. All legs are up for the whole run, one is loaded at a time,
rounds are interleaved (leg after leg within a round), every round is kept, the table shows medians. CPU is that of both
proxies of a pair, from /proc/<pid>/stat, divided by the requests that the load generator saw answered. After each load the
proxies' own counters are compared with the requests sent.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import load
from legs import LEGS, Mantlet
from net import SERVER_IP, Net, cpu_seconds, rss_mb

SCENARIOS = ("h1_small", "h2_small", "bulk_1mb", "new_connections")
METRICS = ("cpu_us", "p50_ms", "p99_ms", "rps", "rss_mb")
HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.normpath(os.path.join(HERE, "..", "results"))
CONNECTIONS = {"h1_small": 16, "h2_small": 8, "bulk_1mb": 4, "new_connections": 4}
STREAMS = 4


def nginx(net, work):
    www = os.path.join(work, "www")
    os.mkdir(www)
    with open(os.path.join(www, "small"), "w") as out:
        out.write("x" * 128)
    with open(os.path.join(www, "1mb"), "wb") as out:
        out.write(os.urandom(1 << 20))
    config = os.path.join(work, "nginx.conf")
    with open(config, "w") as out:
        out.write(f"""
daemon off; worker_processes 1; pid {work}/nginx.pid; error_log {work}/nginx-error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 100000000; keepalive_timeout 3600;
  client_body_temp_path {work}/t1; proxy_temp_path {work}/t2; fastcgi_temp_path {work}/t3; uwsgi_temp_path {work}/t4;
  scgi_temp_path {work}/t5; default_type text/plain; open_file_cache max=10;
  server {{ listen 127.0.0.1:8080 backlog=4096; root {www}; }}
  server {{ listen 127.0.0.1:8082 http2 backlog=4096; root {www}; }}
}}
""")
    os.chmod(work, 0o755)
    process = net.start(net.server, ["nginx", "-c", config], os.path.join(work, "nginx.log"))
    net.wait_port(net.server, 8080, process)
    with open(config) as text:
        return text.read()


def control(net, work, bins):
    process = net.start(net.server, [
        os.path.join(bins, "bench-control"), "--dir", work, "--listen", f"{SERVER_IP}:{Mantlet.control_port}",
        "--server-ip", SERVER_IP, "--port-base", str(Mantlet.base),
    ], os.path.join(work, "control.log"))
    net.wait_port(net.server, Mantlet.control_port, process)


def drive(net, leg, scenario, seconds, work):
    """One load on one leg."""
    if scenario == "h2_small":
        url = f"http://127.0.0.1:{leg.out_port('h2')}/small"
        return load.h2load(net.client, url, seconds, CONNECTIONS[scenario], STREAMS, work)
    kind, path = {"h1_small": ("h1", "small"), "bulk_1mb": ("h1", "1mb"), "new_connections": ("tcp", "small")}[scenario]
    url = f"http://127.0.0.1:{leg.out_port(kind)}/{path}"
    return load.wrk(net.client, url, seconds, CONNECTIONS[scenario], close=scenario == "new_connections")


def check_counters(leg, scenario, before, after, sent):
    """The proxies' own counts against the generator's. At the end of a timed run the generator drops the requests under
    way without counting them, so up to one per connection and stream may be missing on its side."""
    slack = CONNECTIONS[scenario] * (STREAMS if scenario == "h2_small" else 1)
    if scenario == "new_connections":
        slack *= 2  # one whose request is under way, and one just opened in its place
    keys = ("connections", "tcp_allowed") if scenario == "new_connections" else ("requests", "allowed")
    report = {}
    for key in keys:
        if key in before:
            counted = after[key] - before[key]
            report[key] = counted
            if not sent <= counted <= sent + slack:
                raise RuntimeError(f"{leg.name} {scenario}: {key} counts {counted}, but {sent} requests were answered "
                                   f"(and at most {slack} cut off)")
    if "denied" in before and after["denied"] != before["denied"]:
        raise RuntimeError(f"{leg.name} {scenario}: {after['denied'] - before['denied']} denials of admitted requests")
    return report


def settled_counters(leg):
    """Counters after the last connections have been accounted for."""
    last = leg.counters()
    for _ in range(50):
        time.sleep(0.1)
        now = leg.counters()
        if now == last:
            return now
        last = now
    return last


def measure(net, leg, scenario, seconds, work):
    before = settled_counters(leg)
    pids = [leg.client.pid, leg.server.pid]
    cpu_before = [cpu_seconds(pid) for pid in pids]
    result = drive(net, leg, scenario, seconds, work)
    cpu = [cpu_seconds(pid) - earlier for pid, earlier in zip(pids, cpu_before)]
    after = settled_counters(leg)
    if result.errors:
        raise RuntimeError(f"{leg.name} {scenario}: {result.errors} failed requests")
    if result.sent < 10:
        raise RuntimeError(f"{leg.name} {scenario}: only {result.sent} requests were answered")
    counted = check_counters(leg, scenario, before, after, result.sent)
    return {
        "cpu_us": sum(cpu) / result.sent * 1e6,
        "cpu_us_client_side": cpu[0] / result.sent * 1e6,
        "cpu_us_server_side": cpu[1] / result.sent * 1e6,
        "p50_ms": result.p50_ms, "p99_ms": result.p99_ms, "rps": result.rps,
        "rss_mb": max(rss_mb(pid) for pid in pids),
        "requests": result.sent, "counted": counted,
    }


def machine():
    model = ""
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    version = lambda *args: subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                                           ).stdout.strip().splitlines()[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "cpu": model, "cores": os.cpu_count(),
        "kernel": platform.release(), "nginx": version("nginx", "-v"), "haproxy": version("haproxy", "-v"),
        "load_average_before": os.getloadavg()[0],
    }


def table(medians, legs):
    lines = []
    for scenario, by_leg in medians.items():
        lines.append("")
        lines.append(f"{scenario:<16} {'cpu us/req':>11} {'x envoy':>8} {'x haproxy':>9} {'x relay':>8} "
                     f"{'p50 ms':>8} {'p99 ms':>8} {'req/s':>9} {'rss MB':>7}")
        for leg in legs:
            row = by_leg.get(leg)
            if row is None:
                continue
            ratio = lambda other: (f"{row['cpu_us'] / by_leg[other]['cpu_us']:.2f}" if other in by_leg else "-")
            lines.append(f"  {leg:<14} {row['cpu_us']:>11.1f} {ratio('envoy'):>8} {ratio('haproxy'):>9} "
                         f"{ratio('relay'):>8} {row['p50_ms']:>8.3f} {row['p99_ms']:>8.3f} {row['rps']:>9.0f} "
                         f"{row['rss_mb']:>7.1f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--envoy", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--legs", default=",".join(LEGS))
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--results")
    options = parser.parse_args()
    legs_wanted, scenarios = options.legs.split(","), options.scenarios.split(",")
    for name in legs_wanted:
        if name not in LEGS:
            sys.exit(f"no such leg: {name}; there are {', '.join(LEGS)}")
    for name in scenarios:
        if name not in SCENARIOS:
            sys.exit(f"no such scenario: {name}; there are {', '.join(SCENARIOS)}")

    if options.results is None:
        # A trial must not replace the figures of a whole run.
        whole = set(legs_wanted) == set(LEGS) and set(scenarios) == set(SCENARIOS) and options.profile == "dist"
        options.results = RESULTS if whole else os.path.join(HERE, "..", "cache", "trial")

    about = machine()
    about["profile"] = options.profile
    work = tempfile.mkdtemp(prefix="mantlet-bench-")
    # A signal ends the run through the `finally` below: no namespace or process stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    net = Net()
    kept = True
    try:
        configurations = {"nginx.conf": nginx(net, work)}
        bins = os.path.abspath(options.bin)
        control(net, work, bins)
        legs = [LEGS[name](net, work, bins, options.envoy) for name in legs_wanted]
        for leg in legs:
            leg.start()
            configurations.update(leg.configurations())
        # As they read on any machine.
        configurations = {name: text.replace(work, "$WORK").replace(bins, "$BIN") for name, text in configurations.items()}
        print("Configurations:")
        for name, text in configurations.items():
            print(f"--- {name}\n{text}")
        print("---", flush=True)

        rounds = []
        for leg in legs:
            for scenario in scenarios:
                drive(net, leg, scenario, 1, work)
        for number in range(options.rounds):
            for scenario in scenarios:
                # The order turns from round to round, so that no leg always follows the same one.
                turned = legs[number % len(legs):] + legs[:number % len(legs)]
                for leg in turned:
                    figures = measure(net, leg, scenario, options.seconds, work)
                    rounds.append({"round": number, "scenario": scenario, "leg": leg.name, **figures})
                    print(f"round {number + 1}/{options.rounds} {scenario:<16} {leg.name:<8} "
                          f"{figures['cpu_us']:9.1f} us  {figures['rps']:9.0f} req/s", flush=True)
        kept = False
    finally:
        net.close()
        if kept:
            print(f"the run did not complete; logs and configurations stay in {work}", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)

    medians = {}
    for scenario in scenarios:
        medians[scenario] = {}
        for name in legs_wanted:
            mine = [r for r in rounds if r["scenario"] == scenario and r["leg"] == name]
            medians[scenario][name] = {m: round(statistics.median(r[m] for r in mine), 4) for m in METRICS}
    print(table(medians, legs_wanted))
    os.makedirs(options.results, exist_ok=True)
    with open(os.path.join(options.results, "latest.json"), "w") as out:
        json.dump(medians, out, indent=1)
        out.write("\n")
    with open(os.path.join(options.results, "latest-rounds.json"), "w") as out:
        json.dump({"about": about, "rounds": rounds, "configurations": configurations}, out, indent=1)
        out.write("\n")
    options.results = os.path.normpath(options.results)
    print(f"\nmedians: {options.results}/latest.json, all rounds and configurations: latest-rounds.json")


if __name__ == "__main__":
    main()

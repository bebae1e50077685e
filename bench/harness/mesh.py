"""Pairs of proxies beside each other.

One machine, one run: only ratios between legs mean something. All legs are up for the whole run, one is loaded at a time,
rounds are interleaved (leg after leg within a round), every round is kept, the table shows medians. CPU is that of both
proxies of a pair, from /proc/<pid>/stat, divided by the requests that the load generator saw answered. After each load the
proxies' own counters, and the lines of their access logs, are compared with the requests sent.
"""

import collections
import json
import os
import statistics
import struct
import threading
import time

import load
from legs import APP, LEGS, Mantlet
from net import SERVER_IP, cpu_seconds, peak_rss_mb, rss_mb

Scenario = collections.namedtuple("Scenario", "kind path connections streams")
SCENARIOS = {
    "h1_small": Scenario("h1", "/small", 16, 1),
    "h2_small": Scenario("h2", "/small", 8, 4),
    "grpc": Scenario("grpc", "/bench.Echo/Say", 8, 4),
    "bulk_1mb": Scenario("h1", "/1mb", 4, 1),
    "bulk_tcp": Scenario("tcp", "/1mb", 4, 1),
    "new_connections": Scenario("tcp", "/small", 4, 1),
    # At a rate that is half of what Envoy did at most in h1_small; comes last.
    "h1_half": Scenario("h1", "/small", 16, 1),
}
METRICS = ("cpu_us", "p50_ms", "p99_ms", "rps", "rss_mb")
# Bytes of an answer of the bulk scenarios.
BULK = 1 << 20


def applications(net, work, bins):
    www = os.path.join(work, "www")
    os.mkdir(www)
    with open(os.path.join(www, "small"), "w") as out:
        out.write("x" * 128)
    with open(os.path.join(www, "1mb"), "wb") as out:
        out.write(os.urandom(BULK))
    # A StringValue of 128 bytes as one gRPC message.
    message = b"\x0a\x80\x01" + b"x" * 128
    with open(os.path.join(work, "grpc-body"), "wb") as out:
        out.write(b"\0" + struct.pack(">I", len(message)) + message)
    text = f"""
daemon off; worker_processes 1; pid {work}/nginx.pid; error_log {work}/nginx-error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 100000000; keepalive_timeout 3600;
  client_body_temp_path {work}/t1; proxy_temp_path {work}/t2; fastcgi_temp_path {work}/t3; uwsgi_temp_path {work}/t4;
  scgi_temp_path {work}/t5; default_type text/plain; open_file_cache max=10;
  server {{ listen 127.0.0.1:{APP["h1"]} backlog=4096; root {www}; }}
  server {{ listen 127.0.0.1:{APP["h2"]} http2 backlog=4096; root {www}; }}
}}
"""
    config = os.path.join(work, "nginx.conf")
    with open(config, "w") as out:
        out.write(text)
    process = net.start(net.server, ["nginx", "-c", config], os.path.join(work, "nginx.log"))
    net.wait_port(net.server, APP["h1"], process)
    process = net.start(net.server, [os.path.join(bins, "bench-ends"), "grpc", f"127.0.0.1:{APP['grpc']}"],
                        os.path.join(work, "grpc.log"))
    net.wait_port(net.server, APP["grpc"], process)
    return {"nginx.conf": text}


def control(net, work, bins):
    process = net.start(net.server, [
        os.path.join(bins, "bench-control"), "--dir", work, "--listen", f"{SERVER_IP}:{Mantlet.control_port}",
        "--server-ip", SERVER_IP, "--port-base", str(Mantlet.base),
    ], os.path.join(work, "control.log"))
    net.wait_port(net.server, Mantlet.control_port, process)


def starts(legs, options):
    """Milliseconds from the start of one program of a leg until it is ready, leg after leg, before any load."""
    found = {leg.name: [] for leg in legs}
    for _ in range(options.starts):
        for leg in legs:
            command, env, ready = leg.to_start()
            text = leg.net.client.do(os.path.join(options.bin, "bench-ends"), "start", ready,
                                     "--log", leg.path(f"start-{leg.name}.log"), "--", *command,
                                     env={**os.environ, **env})
            found[leg.name].append(json.loads(text)["ready_ms"])
    return {name: {"median_ms": round(statistics.median(all_ms), 1), "least_ms": round(min(all_ms), 1),
                   "most_ms": round(max(all_ms), 1), "starts": len(all_ms)}
            for name, all_ms in found.items() if all_ms}


class Sampler:
    """The largest resident set of the processes while something goes on."""

    def __init__(self, pids):
        self.pids, self.most, self.end = pids, 0.0, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while True:
            self.most = max(self.most, *(rss_mb(pid) for pid in self.pids))
            if self.end.wait(0.1):
                return

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.end.set()
        self.thread.join()


def drive(leg, name, seconds, work, bins, rate):
    """One load on one leg."""
    scenario = SCENARIOS[name]
    namespace = leg.net.client
    address = f"127.0.0.1:{leg.out_port(scenario.kind)}"
    url = f"http://{address}{scenario.path}"
    if name == "h1_half":
        return load.paced(namespace, bins, address, scenario.path, seconds, scenario.connections, rate)
    if scenario.streams > 1:
        body = os.path.join(work, "grpc-body") if name == "grpc" else None
        return load.h2load(namespace, url, seconds, scenario.connections, scenario.streams, work, body)
    return load.wrk(namespace, url, seconds, scenario.connections, close=name == "new_connections")


def check(what, counted, sent, slack):
    """A proxy's own count against the generator's. At the end of a timed run the generator drops the requests under way
    without counting them, so up to one per connection and stream may be missing on its side."""
    if not sent <= counted <= sent + slack:
        raise RuntimeError(f"{what} counts {counted}, but {sent} were answered (and at most {slack} cut off)")


def check_counters(leg, name, before, after, sent):
    scenario = SCENARIOS[name]
    slack = scenario.connections * scenario.streams
    keys = ("requests", "allowed")
    if name == "new_connections":
        keys = ("connections", "tcp_allowed")
        slack *= 2  # one whose request is under way, and one just opened in its place
    elif name == "bulk_tcp":
        # wrk tries the address with a connection of its own first.
        keys, sent, slack = ("connections", "tcp_allowed"), scenario.connections, 1
    elif name == "h1_half":
        slack = 0
    report = {}
    for key in keys:
        if key in before:
            report[key] = after[key] - before[key]
            check(f"{leg.name} {name}: {key}", report[key], sent, slack)
    if "denied" in before and after["denied"] != before["denied"]:
        raise RuntimeError(f"{leg.name} {name}: {after['denied'] - before['denied']} denials of admitted requests")
    if name == "grpc":
        report["calls"] = after["calls"] - before["calls"]
        check(f"{leg.name} {name}: the application", report["calls"], sent, slack)
    for path in leg.logs():
        report[os.path.basename(path)] = lines = leg.log_lines(path, sent)
        check(f"{leg.name} {name}: {path}", lines, sent, slack)
    return report


def settled(counters):
    """Counters after the last connections have been accounted for."""
    last = counters()
    for _ in range(50):
        time.sleep(0.1)
        now = counters()
        if now == last:
            return now
        last = now
    return last


def measure(leg, name, seconds, work, bins, rate):
    calls = lambda: int(leg.net.server.do(
        "curl", "-sS", "--max-time", "5", "--http2-prior-knowledge", f"http://127.0.0.1:{APP['grpc']}/calls"))
    counters = lambda: {**leg.counters(), "calls": calls()}
    before = settled(counters)
    leg.forget_logs()
    pids = [leg.client.pid, leg.server.pid]
    cpu_before = [cpu_seconds(pid) for pid in pids]
    with Sampler(pids) as sampler:
        result = drive(leg, name, seconds, work, bins, rate)
    cpu = [cpu_seconds(pid) - earlier for pid, earlier in zip(pids, cpu_before)]
    after = settled(counters)
    if result.errors:
        raise RuntimeError(f"{leg.name} {name}: {result.errors} failed requests")
    if result.sent < 10:
        raise RuntimeError(f"{leg.name} {name}: only {result.sent} requests were answered")
    counted = check_counters(leg, name, before, after, result.sent)
    return {
        "cpu_us": sum(cpu) / result.sent * 1e6,
        "cpu_us_client_side": cpu[0] / result.sent * 1e6,
        "cpu_us_server_side": cpu[1] / result.sent * 1e6,
        "p50_ms": result.p50_ms, "p99_ms": result.p99_ms, "rps": result.rps, "rss_mb": sampler.most,
        "requests": result.sent, "counted": counted,
    }


def run(net, work, options):
    """All of it: the figures, and the rounds and configurations behind them."""
    bins = options.bin
    configurations = applications(net, work, bins)
    control(net, work, bins)
    legs = [LEGS[name](net, work, bins, options.envoy) for name in options.legs]
    started = starts([leg for leg in legs if leg.timed_start], options)
    for leg in legs:
        leg.start()
        configurations.update(leg.configurations())
    # Idle: configured, ready, and nothing asked of them yet.
    time.sleep(2)
    memory = {leg.name: {"idle_mb": max(rss_mb(leg.client.pid), rss_mb(leg.server.pid))} for leg in legs}

    rounds = []
    rate = None
    for name in options.scenarios:
        if name == "h1_half":
            fastest = [r["rps"] for r in rounds if r["scenario"] == "h1_small" and r["leg"] == "envoy"]
            if not fastest:
                print("h1_half needs h1_small with envoy before it: left out")
                continue
            rate = round(max(fastest) / 2)
        for leg in legs:
            drive(leg, name, 1, work, bins, rate)
        for number in range(options.rounds):
            # The order turns from round to round, so that no leg always follows the same one.
            turned = legs[number % len(legs):] + legs[:number % len(legs)]
            for leg in turned:
                figures = measure(leg, name, options.seconds, work, bins, rate)
                rounds.append({"round": number, "scenario": name, "leg": leg.name, **figures})
                print(f"round {number + 1}/{options.rounds} {name:<16} {leg.name:<12} {figures['cpu_us']:9.1f} us  "
                      f"{figures['rps']:9.0f} req/s  p99 {figures['p99_ms']:8.2f} ms", flush=True)
    for leg in legs:
        mine = [r["rss_mb"] for r in rounds if r["leg"] == leg.name]
        memory[leg.name]["loaded_mb"] = max(mine, default=0.0)
        memory[leg.name]["peak_mb"] = max(peak_rss_mb(leg.client.pid), peak_rss_mb(leg.server.pid))

    medians = {}
    for name in options.scenarios:
        for leg in legs:
            mine = [r for r in rounds if r["scenario"] == name and r["leg"] == leg.name]
            if mine:
                medians.setdefault(name, {})[leg.name] = {
                    m: round(statistics.median(r[m] for r in mine), 4) for m in METRICS}
    # As they read on any machine.
    configurations = {name: text.replace(work, "$WORK").replace(bins, "$BIN") for name, text in configurations.items()}
    figures = {"medians": medians, "memory": memory, "starts": started, "half_rate": rate}
    return figures, {"rounds": rounds, "configurations": configurations}


def table(figures):
    lines = []
    for name, by_leg in figures["medians"].items():
        lines.append("")
        at = f", {figures['half_rate']} req/s" if name == "h1_half" else ""
        lines.append(f"{name + at:<24} {'cpu us/req':>11} {'x envoy':>8} {'x haproxy':>9} {'x relay':>8} "
                     f"{'p50 ms':>8} {'p99 ms':>8} {'req/s':>9} {'rss MB':>7}" + (f"{'CPU-s/GB':>10}" if "bulk" in name else ""))
        for leg, row in by_leg.items():
            ratio = lambda other: (f"{row['cpu_us'] / by_leg[other]['cpu_us']:.2f}" if other in by_leg else "-")
            per_gb = f"{row['cpu_us'] * 1e3 / BULK:>10.2f}" if "bulk" in name else ""
            lines.append(f"  {leg:<22} {row['cpu_us']:>11.1f} {ratio('envoy'):>8} {ratio('haproxy'):>9} "
                         f"{ratio('relay'):>8} {row['p50_ms']:>8.3f} {row['p99_ms']:>8.3f} {row['rps']:>9.0f} "
                         f"{row['rss_mb']:>7.1f}{per_gb}")
    lines += ["", f"{'':<14} {'RSS idle':>9} {'loaded':>8} {'peak MB':>8}   {'start to ready, ms':>18} {'least':>7} {'most':>7}"]
    for leg, row in figures["memory"].items():
        text = f"  {leg:<12} {row['idle_mb']:>9.1f} {row['loaded_mb']:>8.1f} {row['peak_mb']:>8.1f}"
        ms = figures["starts"].get(leg)
        lines.append(text + (f"   {ms['median_ms']:>18.1f} {ms['least_ms']:>7.1f} {ms['most_ms']:>7.1f}" if ms else ""))
    return "\n".join(lines)

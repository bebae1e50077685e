"""Configuration at first use, in a running cluster: a sidecar's memory against the size of the mesh, and the price of a first request.

`bench/on-demand` starts the cluster and calls this. Two clients run: one as they are by default, one with MANTLET_EAGER, which holds
everything as Envoy does. Both ask the same hosts once, then once more: what on-demand adds is the difference of their first requests."""

import argparse
import json
import os
import subprocess
import tempfile
import time

import record

CLIENTS = ("sleep", "sleep-eager")
WARM = [f"warm-{n}" for n in range(5)]


def kubectl(*args, text=None):
    done = subprocess.run(("kubectl", *args), input=text, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def service(name, selected):
    spec = {"ports": [{"name": "http", "port": 80, "targetPort": 3000}]}
    if selected:
        spec["selector"] = {"app": "customers"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "labels": {"bench": "on-demand"}}, "spec": spec}


def create(services):
    # One list a thousand objects: kubectl sends them one by one anyway.
    for at in range(0, len(services), 1000):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump({"apiVersion": "v1", "kind": "List", "items": services[at:at + 1000]}, file)
            file.flush()
            kubectl("create", "-f", file.name)


def eager_client():
    objects = kubectl("get", "deployment", "sleep", "-o", "json")
    deployment = json.loads(objects)
    deployment["metadata"] = {"name": "sleep-eager"}
    deployment.pop("status")
    spec = deployment["spec"]
    for labels in (spec["selector"]["matchLabels"], spec["template"]["metadata"]["labels"]):
        labels["app"] = "sleep-eager"
    spec["template"]["metadata"]["annotations"] = {
        "proxy.istio.io/config": json.dumps({"proxyMetadata": {"MANTLET_EAGER": "true"}})}
    kubectl("apply", "-f", "-", text=json.dumps(deployment))
    kubectl("rollout", "status", "deploy/sleep-eager", "--timeout=120s")


def rss_mb(client):
    find = 'for p in /proc/[0-9]*; do case "$(readlink $p/exe)" in *mantlet-proxy) grep VmRSS $p/status;; esac; done'
    reads = []
    for _ in range(5):
        out = kubectl("exec", f"deploy/{client}", "-c", "istio-proxy", "--", "sh", "-c", find)
        reads.append(max(int(line.split()[1]) for line in out.splitlines()) / 1024)
        time.sleep(0.5)
    return sorted(reads)[2]


def clusters(client):
    out = subprocess.run(("istioctl", "proxy-config", "clusters", f"deploy/{client}"), stdout=subprocess.PIPE, text=True, check=True)
    return len(out.stdout.splitlines()) - 1


def until(what, limit, done):
    end = time.monotonic() + limit
    while not done():
        if time.monotonic() > end:
            raise SystemExit(f"gave up: {what}")
        time.sleep(1)


def ask(client, hosts):
    """Milliseconds from the request to the first byte of the answer, of the first and of the second request to each host."""
    args = []
    for host in hosts:
        for _ in range(2):
            args += ["-o", "/dev/null", f"http://{host}/"]
    out = kubectl("exec", f"deploy/{client}", "-c", "sleep", "--", "curl", "-sS", "-w",
                  "%{http_code} %{time_pretransfer} %{time_starttransfer}\\n", *args)
    rows = [line.split() for line in out.splitlines()]
    wrong = [row for row in rows if row[0] != "200"]
    if wrong or len(rows) != 2 * len(hosts):
        raise SystemExit(f"{client}: {len(rows)} answers, not 200: {wrong[:5]}")
    times = [1000 * (float(last) - float(first)) for _, first, last in rows]
    return times[0::2], times[1::2]


def quantile(values, part):
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--services", type=int, required=True)
    parser.add_argument("--cold", type=int, required=True)
    parser.add_argument("--profile", required=True)
    options = parser.parse_args()
    options.rounds, options.seconds = 1, 0
    about = record.machine(options)
    eager_client()
    create([service(name, True) for name in WARM])
    memory = []
    made = 10
    create([service(f"far-{n}", False) for n in range(made - len(WARM))])
    cold = [f"cold-{n}" for n in range(options.cold)]
    for size in sorted({10, 1000, options.services}):
        if size > made:
            create([service(f"far-{n}", False) for n in range(made - len(WARM), size - len(WARM))])
            made = size
        until("the eager client holds all services", 600, lambda: clusters("sleep-eager") >= made)
        for client in CLIENTS:
            ask(client, WARM)
        row = {"services": made, **{client: round(rss_mb(client), 1) for client in CLIENTS},
               "clusters": {client: clusters(client) for client in CLIENTS}}
        memory.append(row)
        print(f"{made:>6} services: RSS {row['sleep']} MB on demand, {row['sleep-eager']} MB eager; "
              f"clusters {row['clusters']['sleep']} and {row['clusters']['sleep-eager']}", flush=True)
    create([service(name, True) for name in cold])
    until("the eager client holds the cold hosts", 600, lambda: clusters("sleep-eager") >= made + len(cold))
    requests = {}
    for client in CLIENTS:
        # The port's listener is there from before: what is measured is the host.
        ask(client, WARM)
        # A first pass of fresh hosts in pieces, so that one command line holds them.
        first, second = [], []
        for at in range(0, len(cold), 100):
            one, two = ask(client, cold[at:at + 100])
            first += one
            second += two
        requests[client] = {name: {"p50_ms": round(quantile(times, .5), 2), "p99_ms": round(quantile(times, .99), 2)}
                            for name, times in (("first", first), ("second", second))}
        print(f"{client}: first request p50 {requests[client]['first']['p50_ms']} ms, p99 {requests[client]['first']['p99_ms']} ms; "
              f"second p50 {requests[client]['second']['p50_ms']} ms, p99 {requests[client]['second']['p99_ms']} ms")
    growth = memory[-1]["sleep"] / memory[0]["sleep"]
    added = requests["sleep"]["first"]["p99_ms"] - requests["sleep-eager"]["first"]["p99_ms"]
    budgets = [
        {"budget": f"RSS with {made} services, x with 10", "figure": round(growth, 3), "target": 1.1, "reached": growth <= 1.1},
        {"budget": "first request to a cold host, ms added at p99", "figure": round(added, 2), "target": 5.0, "reached": added <= 5},
    ]
    about["load_average_after"] = os.getloadavg()[0]
    print(table(budgets))
    out = {"about": about, "memory": memory, "requests": requests, "budgets": budgets}
    with open(os.path.join(record.RESULTS, "on-demand.json"), "w") as file:
        json.dump(out, file, indent=1)
        file.write("\n")


def table(budgets):
    lines = [""]
    for line in budgets:
        word = "reached" if line["reached"] else "not reached"
        lines.append(f"{line['budget']:<62} {line['figure']:>9} {line['target']:>8}  {word}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

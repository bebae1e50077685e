"""The load generators and what is read from their output."""

import json
import os
import re
import subprocess

UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


class Load:
    """What a generator saw; `refused` are the answers other than 2xx and 3xx, which are part of `errors`."""

    def __init__(self, sent, rps, p50_ms, p99_ms, errors, refused=0):
        self.sent, self.rps, self.p50_ms, self.p99_ms = sent, rps, p50_ms, p99_ms
        self.errors, self.refused = errors, refused


def _milliseconds(text):
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * UNITS[unit]


def _output(args):
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(args)}:\n{done.stdout}")
    return done.stdout


def wrk(namespace, url, seconds, connections, close=False, header=None):
    args = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "10s"]
    if close:
        args += ["-H", "Connection: close"]
    if header:
        args += ["-H", header]
    text = _output(namespace.command(*args, url))
    total = int(re.search(r"(\d+) requests in", text).group(1))
    if total == 0:
        raise RuntimeError(f"{url}: no request was answered\n{text}")
    p50 = _milliseconds(re.search(r"^\s+50%\s+(\S+)", text, re.M).group(1))
    p99 = _milliseconds(re.search(r"^\s+99%\s+(\S+)", text, re.M).group(1))
    rps = float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))
    errors = 0
    sockets = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    if sockets:
        counts = [int(n) for n in sockets.groups()]
        # With `Connection: close` wrk counts the announced end of each connection as a read error.
        errors += counts[0] + counts[2] + counts[3] + (0 if close else counts[1])
    others = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    refused = int(others.group(1)) if others else 0
    return Load(total, rps, p50, p99, errors + refused, refused)


def paced(namespace, bins, address, path, seconds, connections, rate):
    """Requests on schedule; latencies count from the time at which each was due."""
    figures = json.loads(_output(namespace.command(
        os.path.join(bins, "bench-ends"), "paced", address, path, "--rate", str(rate), "--seconds", str(seconds),
        "--connections", str(connections))))
    return Load(figures["sent"], figures["rate"], figures["p50_ms"], figures["p99_ms"], 0)


def h2load(namespace, url, seconds, clients, streams, work, grpc_body=None):
    log = os.path.join(work, "h2load.tsv")
    if os.path.exists(log):
        os.remove(log)
    grpc = ["-d", grpc_body, "-H", "content-type: application/grpc", "-H", "te: trailers"] if grpc_body else []
    text = _output(namespace.command(
        "h2load", "-t1", f"-c{clients}", f"-m{streams}", f"-D{seconds}", f"--log-file={log}", *grpc, url))
    done = re.search(r"requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored", text)
    total, succeeded = int(done.group(1)), int(done.group(3))
    codes = re.search(r"status codes: (\d+) 2xx", text)
    times = []
    with open(log) as lines:
        for line in lines:
            fields = line.split("\t")
            if len(fields) >= 3 and fields[1] == "200":
                times.append(int(fields[2]))
    times.sort()
    at = lambda q: times[min(len(times) - 1, int(q * len(times)))] / 1000 if times else 0.0
    # Streams that are cut by the end of the run are not errors.
    bad = max(0, total - succeeded - clients * streams) + max(0, succeeded - int(codes.group(1)))
    return Load(succeeded, succeeded / seconds, at(0.50), at(0.99), bad)

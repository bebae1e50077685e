"""About the machine, and where results go.

A whole run leaves a file of its own in bench/results, named by its time, that stays: figures, budgets and every round.
`latest.json` is its copy without rounds, `configurations.json` what the programs were told. A partial run, or one of
another profile, goes to bench/cache/trial and replaces nothing.
"""

import json
import os
import platform
import subprocess
import time

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.normpath(os.path.join(HERE, "..", "results"))
TRIAL = os.path.normpath(os.path.join(HERE, "..", "cache", "trial"))


def _first_line(*args):
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return (done.stdout.strip().splitlines() or [""])[0]


def machine(options):
    model = ""
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _first_line("git", "-C", HERE, "rev-parse", "--short", "HEAD"),
        "cpu": model, "cores": os.cpu_count(), "kernel": platform.release(), "nginx": _first_line("nginx", "-v"),
        "haproxy": _first_line("haproxy", "-v"), "load_average_before": os.getloadavg()[0],
        "profile": options.profile, "rounds": options.rounds, "seconds": options.seconds,
    }


def _write(folder, name, value, indent=1):
    path = os.path.join(folder, name)
    with open(path, "w") as out:
        json.dump(value, out, indent=indent)
        out.write("\n")
    return path


def write(out, details, options):
    folder = RESULTS if options.whole else TRIAL
    os.makedirs(folder, exist_ok=True)
    rounds = {part: parts["rounds"] for part, parts in details.items()}
    stamp = out["about"]["time"][:16].replace(":", "").replace("T", "-")
    kept = _write(folder, f"{stamp}.json", {**out, "rounds": rounds}, indent=None)
    latest = _write(folder, "latest.json", out)
    for part, parts in details.items():
        if "configurations" in parts:
            _write(folder, "configurations.json", parts["configurations"])
    print(f"\nfigures: {latest}\nwith every round: {kept}")

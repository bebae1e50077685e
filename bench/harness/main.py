"""Entry of the benchmark: options, the two parts, the budgets, the records.

`mesh` sets pairs of proxies beside each other, `engine` asks what authorization costs against the number of rules. A run
that misses a budget still ends with success: it is a measurement. A run whose counts do not add up fails.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import budgets
import engine
import mesh
import record
from legs import LEGS
from net import Net

PARTS = ("mesh", "engine")


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True, help="directory of the programs")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--envoy", required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="length of one load of the pairs")
    parser.add_argument("--starts", type=int, default=11, help="starts of each program")
    parser.add_argument("--legs", default=",".join(LEGS))
    parser.add_argument("--scenarios", default=",".join(mesh.SCENARIOS))
    options = parser.parse_args()
    for name, known in (("parts", PARTS), ("legs", LEGS), ("scenarios", mesh.SCENARIOS)):
        wanted = getattr(options, name).split(",")
        for one in wanted:
            if one not in known:
                parser.error(f"--{name}: no {one}; there are {', '.join(known)}")
        # In the order of the table, whatever the order of the words.
        setattr(options, name, [one for one in known if one in wanted])
    options.bin = os.path.abspath(options.bin)
    options.whole = (options.parts == list(PARTS) and options.legs == list(LEGS)
                     and options.scenarios == list(mesh.SCENARIOS) and options.profile == "dist")
    return options


def main():
    options = parse()
    about = record.machine(options)
    # A signal ends the run through the `finally` below: no namespace or process stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = {"about": about}
    details = {}
    for part, module in (("mesh", mesh), ("engine", engine)):
        if part not in options.parts:
            continue
        work = tempfile.mkdtemp(prefix="mantlet-bench-")
        os.chmod(work, 0o755)
        net = Net()
        complete = False
        try:
            out[part], details[part] = module.run(net, work, options)
            complete = True
        finally:
            net.close()
            if complete:
                shutil.rmtree(work, ignore_errors=True)
            else:
                print(f"the run did not complete; logs and configurations stay in {work}", file=sys.stderr)
    about["load_average_after"] = os.getloadavg()[0]
    out["budgets"] = budgets.lines(out)
    if "mesh" in out:
        print(mesh.table(out["mesh"]))
    if "engine" in out:
        print(engine.table(out["engine"]))
    print(budgets.table(out["budgets"], about))
    record.write(out, details, options)


if __name__ == "__main__":
    main()

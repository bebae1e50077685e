"""The budgets of the data plane: each a figure of this run beside its target. All but memory and time are ratios."""

SMALL = ("h1_small", "h2_small", "grpc")


def _ratio(mesh, scenario, leg, other, metric="cpu_us", other_scenario=None):
    mine = mesh["medians"].get(scenario, {}).get(leg)
    peer = mesh["medians"].get(other_scenario or scenario, {}).get(other)
    if mine is None or peer is None or not peer[metric]:
        return None
    return mine[metric] / peer[metric]


def _mesh(mesh):
    # With and without an access log; each beside the Envoy that does the same, if there is one.
    for leg, envoy, log in (("mantlet", "envoy", "log off"), ("mantlet_log", "envoy_log", "log on")):
        cpu = lambda *args, **kw: _ratio(mesh, *args, **kw)
        yield f"HTTP/1.1, CPU per request, x relay, {log}", cpu("h1_small", leg, "relay"), 1.1
        yield f"HTTP/1.1, CPU per request, x Envoy, {log}", cpu("h1_small", leg, envoy), 0.4
        yield f"HTTP/1.1, CPU per request, x HAProxy, {log}", cpu("h1_small", leg, "haproxy"), 1.0
        yield f"HTTP/2, CPU per request, x Envoy, {log}", cpu("h2_small", leg, envoy), 0.5
        yield f"gRPC, CPU per call, x Envoy, {log}", cpu("grpc", leg, envoy), 0.5
        yield (f"bulk over HTTP, CPU per GB, x Envoy tcp_proxy, {log}",
               cpu("bulk_1mb", leg, envoy, other_scenario="bulk_tcp"), 1.0)
        yield f"bulk over TCP, CPU per GB, x Envoy tcp_proxy, {log}", cpu("bulk_tcp", leg, envoy), 1.0
        yield f"new mTLS connection, CPU, x Envoy tcp_proxy, {log}", cpu("new_connections", leg, envoy), 0.6
        yield (f"p99 at half of Envoy's load, x Envoy, {log}",
               _ratio(mesh, "h1_half", leg, envoy, metric="p99_ms"), 0.5)
    for leg, log in (("mantlet", "log off"), ("mantlet_log", "log on")):
        if leg in mesh["memory"]:
            yield f"RSS idle, MB, {log}", mesh["memory"][leg]["idle_mb"], 12.0
            yield f"RSS loaded, MB, {log}", mesh["memory"][leg]["loaded_mb"], 20.0
    if "mantlet" in mesh["starts"]:
        yield "process start to ready, ms, median", mesh["starts"]["mantlet"]["median_ms"], 100.0


def _engine(rows):
    for request in ("allowed", "denied"):
        at = {row["rules"]: row for row in rows if row["form"] == "exact" and row["request"] == request}
        if 1 in at and 10_000 in at:
            for name, key in (("the decision alone", "engine_ns"), ("whole request, CPU", "mantlet_cpu_us")):
                yield f"10,000 rules, x one rule, {request}: {name}", at[10_000][key] / at[1][key], 1.1


def lines(out):
    all_lines = []
    if "mesh" in out:
        all_lines += _mesh(out["mesh"])
    if "engine" in out:
        all_lines += _engine(out["engine"])
    return [{"budget": name, "figure": round(figure, 3), "target": target, "reached": figure <= target}
            for name, figure, target in all_lines if figure is not None]


def table(all_lines, about):
    out = ["", f"{'budget':<62} {'figure':>9} {'target':>8}"]
    for line in all_lines:
        word = "reached" if line["reached"] else "not reached"
        out.append(f"{line['budget']:<62} {line['figure']:>9.3f} {line['target']:>8.2f}  {word}")
    out.append(f"load average of the machine: {about['load_average_before']:.1f} before, "
               f"{about['load_average_after']:.1f} after, on {about['cores']} cores")
    return "\n".join(out)

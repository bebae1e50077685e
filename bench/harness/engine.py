"""What authorization costs against the number of rules.

First the engine alone: `bench-control --decisions`, nanoseconds of processor time per decision. Then a real Envoy and
mantlet-proxy, both fed by bench-control over ADS with the same listeners, each of which holds one ALLOW filter and answers
by itself over plaintext. wrk asks one listener at a time, once for the path that only the rule in the middle admits and
once for a path that none does. Both proxies' own counts of admitted and denied requests must equal the answers.
"""

import json
import os
import statistics
import subprocess

import load
from legs import Envoy, Mantlet
from mesh import control, settled
from net import SERVER_IP, cpu_seconds

CONNECTIONS = 8
# One load; the figure is CPU per request, which needs no long one.
SECONDS = 1


class MantletRules(Mantlet):
    def start(self):
        self.server = self.launch(self.name, self.net.server, SERVER_IP)


class EnvoyRules(Envoy):
    def start(self):
        config = self.write("envoy-rules.json", json.dumps(self.rules_bootstrap()))
        self.server = self.net.start(self.net.server, [
            self.envoy_bin, "-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "warning",
        ], self.path("envoy-rules.log"))

    def rules_bootstrap(self):
        ads = {"ads": {}, "resource_api_version": "V3"}
        options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
        return {
            "node": {"id": f"sidecar~{SERVER_IP}~{self.name}.bench~bench.svc.cluster.local", "cluster": "bench"},
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": self.base + 1}}},
            "dynamic_resources": {
                "ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3",
                               "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]},
                "lds_config": ads, "cds_config": ads,
            },
            # As Istio's bootstrap has it.
            "layered_runtime": {"layers": [{"name": "istio", "static_layer": {
                "envoy.reloadable_features.http_reject_path_with_fragment": False,
                "re2.max_program_size.error_level": 32768}}]},
            "static_resources": {"clusters": [{
                "name": "xds", "type": "STATIC", "connect_timeout": "5s",
                "typed_extension_protocol_options": {options: {
                    "@type": f"type.googleapis.com/{options}", "explicit_http_config": {"http2_protocol_options": {}}}},
                "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                    "common_tls_context": {"validation_context": {"trusted_ca": {"filename": self.path("root.pem")}}}}},
                "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [{"endpoint": {
                    "address": {"socket_address": {"address": SERVER_IP, "port_value": Mantlet.control_port}}}}]}]},
            }]},
        }

    def counters(self):
        total = self.total()
        return {"allowed": total(r"http\.\w+\.rbac\.allowed"), "denied": total(r"http\.\w+\.rbac\.denied")}


def measure(leg, request, verdict, seconds):
    before = settled(leg.counters)
    cpu_before = cpu_seconds(leg.server.pid)
    url = f"http://{SERVER_IP}:{request['port']}{request[verdict]}"
    result = load.wrk(leg.net.server, url, seconds, CONNECTIONS, header=request["header"])
    cpu = cpu_seconds(leg.server.pid) - cpu_before
    after = settled(leg.counters)
    where = f"{leg.name} {request['form']} {request['rules']} {verdict}"
    if result.errors != result.refused or result.refused != (result.sent if verdict == "denied" else 0):
        raise RuntimeError(f"{where}: {result.sent} answers, {result.refused} refused, {result.errors} errors")
    counted = {key: after[key] - before[key] for key in ("allowed", "denied")}
    # wrk drops the requests under way at its end without counting them; the proxy has decided about them all the same.
    other = counted["denied" if verdict == "allowed" else "allowed"]
    if not result.sent <= counted[verdict] <= result.sent + CONNECTIONS or other:
        raise RuntimeError(f"{where}: {result.sent} requests answered, but counted are {counted}")
    return {"cpu_us": cpu / counted[verdict] * 1e6, "rps": result.rps, "requests": result.sent, "counted": counted}


def proxies(net, work, options):
    control(net, work, options.bin)
    legs = [kind(net, work, options.bin, options.envoy) for kind in (MantletRules, EnvoyRules)]
    for leg in legs:
        leg.start()
        with open(os.path.join(work, f"rules-{leg.name}.json")) as text:
            leg.requests = json.load(text)
        for request in leg.requests:
            net.wait_port(net.server, request["port"], leg.server, 60)
    rounds = []
    for number in range(options.rounds):
        for index in range(len(legs[0].requests)):
            for verdict in ("allowed", "denied"):
                for leg in legs:
                    request = leg.requests[index]
                    if number == 0:
                        measure(leg, request, verdict, SECONDS)
                    figures = measure(leg, request, verdict, SECONDS)
                    rounds.append({"round": number, "leg": leg.name, "form": request["form"],
                                   "rules": request["rules"], "request": verdict, **figures})
                    print(f"round {number + 1}/{options.rounds} {leg.name:<8} {request['form']:<9}"
                          f"{request['rules']:>7} {verdict:<8} {figures['cpu_us']:10.1f} us", flush=True)
    return rounds


def summary(alone, rounds):
    """One row per filter and request: medians, and how they grow from the fewest rules of the form."""
    rows = []
    for figure in alone:
        request = "allowed" if figure["allowed"] else "denied"
        row = {"form": figure["form"], "rules": figure["rules"], "residual": figure["residual"], "request": request,
               "engine_ns": figure["ns_per_decision"], "decisions_per_second": figure["decisions_per_second"]}
        for leg in ("mantlet", "envoy"):
            mine = [r["cpu_us"] for r in rounds
                    if (r["leg"], r["form"], r["rules"], r["request"]) == (leg, row["form"], row["rules"], request)]
            row[f"{leg}_cpu_us"] = round(statistics.median(mine), 2)
        fewest = next((r for r in rows if (r["form"], r["request"]) == (row["form"], request)), row)
        for key in ("engine_ns", "mantlet_cpu_us", "envoy_cpu_us"):
            row[f"{key}_growth"] = round(row[key] / fewest[key], 2)
        rows.append(row)
    return rows


def table(rows):
    lines = ["", f"{'form':<9} {'rules':>6} {'request':<8} {'ns/decision':>12} {'decisions/s':>12} {'growth':>8} "
             f"{'mantlet us':>11} {'growth':>7} {'envoy us':>10} {'growth':>8}"]
    for r in rows:
        lines.append(f"{r['form']:<9} {r['rules']:>6} {r['request']:<8} {r['engine_ns']:>12.1f} "
                     f"{r['decisions_per_second']:>12.0f} {r['engine_ns_growth']:>8.2f} {r['mantlet_cpu_us']:>11.1f} "
                     f"{r['mantlet_cpu_us_growth']:>7.2f} {r['envoy_cpu_us']:>10.1f} {r['envoy_cpu_us_growth']:>8.2f}")
    return "\n".join(lines)


def run(net, work, options):
    """The figures, and the rounds behind them."""
    alone = json.loads(subprocess.run([os.path.join(options.bin, "bench-control"), "--decisions", "1"],
                                      stdout=subprocess.PIPE, check=True, text=True).stdout)
    rounds = proxies(net, work, options)
    return summary(alone, rounds), {"rounds": rounds}

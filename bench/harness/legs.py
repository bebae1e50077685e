"""The contestants: how each pair of proxies is configured, started and asked for its counters.

Every leg gets the same certificates (ECDSA P-256, one root), one worker thread per proxy, mutual TLS without resumption
between its two ends, and on the server's side a policy that admits only the client's identity (HAProxy cannot read URI
names, so it admits any certificate of the root). A leg owns a block of ports: +80 HTTP/1.1, +82 HTTP/2, +90 TCP on the
client's loopback, 6000 higher on the server's address.
"""

import json
import os
import re
import socket

from net import CLIENT_IP, SERVER_IP

APP = {"h1": 8080, "h2": 8082, "tcp": 8080}
OFFSET = {"h1": 80, "h2": 82, "tcp": 90}
CLIENT_ID = "spiffe://cluster.local/ns/bench/sa/client"
SERVER_ID = "spiffe://cluster.local/ns/bench/sa/server"


class Leg:
    name = ""
    base = 0

    def __init__(self, net, work, bins, envoy):
        self.net, self.work, self.bins, self.envoy_bin = net, work, bins, envoy
        self.client = self.server = None

    def path(self, name):
        return os.path.join(self.work, name)

    def write(self, name, text):
        with open(self.path(name), "w") as out:
            out.write(text)
        return self.path(name)

    def out_port(self, kind):
        return self.base + OFFSET[kind]

    def in_port(self, kind):
        return self.base + 6000 + OFFSET[kind]

    def wait(self):
        for kind in APP:
            self.net.wait_port(self.net.server, self.in_port(kind), self.server)
            self.net.wait_port(self.net.client, self.out_port(kind), self.client)

    def configurations(self):
        """Name and text of every configuration in use."""
        return {}

    def counters(self):
        """Running totals: {"requests": inbound HTTP requests, "allowed": HTTP decisions, "connections": inbound TCP
        connections, "tcp_allowed": TCP decisions, "denied": denials of both}. Missing keys are not checked."""
        return {}


class Envoy(Leg):
    name, base = "envoy", 10000

    def start(self):
        self.texts = {}
        for role, namespace in (("client", self.net.client), ("server", self.net.server)):
            text = json.dumps(self.bootstrap(role), indent=1)
            self.texts[f"envoy-{role}.json"] = text
            config = self.write(f"envoy-{role}.json", text)
            process = self.net.start(namespace, [
                self.envoy_bin, "-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "warning",
            ], self.path(f"envoy-{role}.log"))
            setattr(self, role, process)
        self.wait()

    def configurations(self):
        return self.texts

    def tls(self, role):
        context = {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [{
                "certificate_chain": {"filename": self.path(f"{role}.pem")},
                "private_key": {"filename": self.path(f"{role}.key")},
            }],
        }
        match = {"exact": SERVER_ID} if role == "client" else {"prefix": "spiffe://cluster.local/"}
        context["validation_context"] = {
            "trusted_ca": {"filename": self.path("root.pem")},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": match}],
        }
        return context

    def downstream(self, alpn):
        return {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": {**self.tls("server"), "alpn_protocols": alpn},
                "require_client_certificate": True,
                "disable_stateless_session_resumption": True,
                "disable_stateful_session_resumption": True,
            },
        }

    def upstream(self, alpn):
        return {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": {**self.tls("client"), "alpn_protocols": alpn},
                "sni": "outbound_.80_._.app.bench.svc.cluster.local",
                "max_session_keys": 0,
            },
        }

    def cluster(self, role, kind):
        target = (SERVER_IP, self.in_port(kind)) if role == "client" else ("127.0.0.1", APP[kind])
        cluster = {
            "name": f"{role}_{kind}", "type": "STATIC", "connect_timeout": "10s",
            "load_assignment": {"cluster_name": f"{role}_{kind}", "endpoints": [{"lb_endpoints": [{"endpoint": {
                "address": {"socket_address": {"address": target[0], "port_value": target[1]}}}}]}]},
            "circuit_breakers": {"thresholds": [{
                "max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}]},
        }
        if kind != "tcp":
            protocol = {"http2_protocol_options": {}} if kind == "h2" else {"http_protocol_options": {}}
            cluster["typed_extension_protocol_options"] = {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": protocol}}
        if role == "client":
            cluster["transport_socket"] = self.upstream({"h1": ["http/1.1"], "h2": ["h2"], "tcp": []}[kind])
        return cluster

    def rbac(self, http):
        permission = {"header": {"name": ":method", "string_match": {"exact": "GET"}}} if http else {"any": True}
        rules = {"action": "ALLOW", "policies": {"ns[bench]-policy[allow-client]-rule[0]": {
            "permissions": [permission],
            "principals": [{"authenticated": {"principal_name": {"exact": CLIENT_ID}}}]}}}
        kind = "http" if http else "network"
        config = {"@type": f"type.googleapis.com/envoy.extensions.filters.{kind}.rbac.v3.RBAC", "rules": rules}
        if not http:
            config["stat_prefix"] = "tcp."
        return {"name": f"envoy.filters.{kind}.rbac", "typed_config": config}

    def listener(self, role, kind):
        inbound = role == "server"
        address, port = (SERVER_IP, self.in_port(kind)) if inbound else ("127.0.0.1", self.out_port(kind))
        if kind == "tcp":
            filters = [self.rbac(False)] if inbound else []
            filters.append({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": f"{role}_{kind}", "cluster": f"{role}_{kind}"}})
        else:
            http_filters = [self.rbac(True)] if inbound else []
            http_filters.append({"name": "envoy.filters.http.router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}})
            filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": f"{role}_{kind}", "codec_type": "AUTO",
                "forward_client_cert_details": "APPEND_FORWARD" if inbound else "SANITIZE",
                "set_current_client_cert_details": {"subject": True, "uri": True},
                "normalize_path": True,
                "route_config": {"virtual_hosts": [{"name": "any", "domains": ["*"], "routes": [
                    {"match": {"prefix": "/"}, "route": {"cluster": f"{role}_{kind}", "timeout": "0s"}}]}]},
                "http_filters": http_filters}}]
        chain = {"filters": filters}
        if inbound:
            chain["transport_socket"] = self.downstream(
                {"h1": ["h2", "http/1.1"], "h2": ["h2", "http/1.1"], "tcp": []}[kind])
        return {"name": f"{role}_{kind}", "filter_chains": [chain],
                "address": {"socket_address": {"address": address, "port_value": port}}}

    def bootstrap(self, role):
        return {
            "node": {"id": f"bench-{role}", "cluster": "bench"},
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": self.base + 1}}},
            "static_resources": {
                "listeners": [self.listener(role, kind) for kind in APP],
                "clusters": [self.cluster(role, kind) for kind in APP],
            },
        }

    def total(self):
        """A function from a pattern to the sum of the counters whose names match it."""
        text = self.net.server.do("curl", "-sS", "--max-time", "5",
                                  f"http://127.0.0.1:{self.base + 1}/stats?usedonly")
        stats = {}
        for line in text.splitlines():
            name, _, value = line.partition(": ")
            if value.isdigit():
                stats[name] = int(value)
        return lambda pattern: sum(v for k, v in stats.items() if re.fullmatch(pattern, k))

    def counters(self):
        total = self.total()
        return {
            "requests": total(r"http\.server_h[12]\.downstream_rq_total"),
            "allowed": total(r"http\.server_h[12]\.rbac\.allowed"),
            "connections": total(r"tcp\.server_tcp\.downstream_cx_total"),
            "tcp_allowed": total(r"tcp\.rbac\.allowed"),
            "denied": total(r"(http\.server_h[12]|tcp)\.rbac\.denied"),
        }


class Haproxy(Leg):
    name, base = "haproxy", 20000

    def start(self):
        self.texts = {}
        for role, namespace in (("client", self.net.client), ("server", self.net.server)):
            text = self.config(role)
            self.texts[f"haproxy-{role}.cfg"] = text
            config = self.write(f"haproxy-{role}.cfg", text)
            process = self.net.start(namespace, ["haproxy", "-db", "-f", config], self.path(f"haproxy-{role}.log"))
            setattr(self, role, process)
        self.wait()

    def configurations(self):
        return self.texts

    def config(self, role):
        lines = [
            "global", "  nbthread 1", "  maxconn 4000",
            f"  stats socket {self.path(f'haproxy-{role}.sock')} mode 600 level admin",
            "  ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets", "  tune.ssl.cachesize 0",
            "defaults", "  timeout connect 10s", "  timeout client 1h", "  timeout server 1h",
            "  timeout http-keep-alive 1h", "",
        ]
        for kind in APP:
            mode = "tcp" if kind == "tcp" else "http"
            lines += [f"frontend {role}_{kind}", f"  mode {mode}"]
            if role == "client":
                proto = " proto h2" if kind == "h2" else ""
                lines.append(f"  bind 127.0.0.1:{self.out_port(kind)}{proto}")
            else:
                alpn = {"h1": " alpn http/1.1", "h2": " alpn h2", "tcp": ""}[kind]
                lines.append(f"  bind {SERVER_IP}:{self.in_port(kind)} ssl crt {self.path('server.both')} "
                             f"ca-file {self.path('root.pem')} verify required{alpn}")
                if kind == "tcp":
                    lines.append("  tcp-request content reject unless { ssl_c_used } { ssl_c_verify 0 }")
                else:
                    lines.append("  http-request deny unless { method GET } { ssl_c_used } { ssl_c_verify 0 }")
                    lines.append("  http-request set-header X-Forwarded-Client-Cert Subject=%{+Q}[ssl_c_s_dn]")
            lines += [f"  default_backend {role}_{kind}", f"backend {role}_{kind}", f"  mode {mode}"]
            if mode == "http":
                lines.append("  http-reuse always")
            if role == "client":
                alpn = {"h1": " alpn http/1.1", "h2": " alpn h2", "tcp": ""}[kind]
                lines.append(f"  server s {SERVER_IP}:{self.in_port(kind)} ssl crt {self.path('client.both')} "
                             f"ca-file {self.path('root.pem')} verify required no-ssl-reuse{alpn}")
            else:
                proto = " proto h2" if kind == "h2" else ""
                lines.append(f"  server s 127.0.0.1:{APP[kind]}{proto}")
            lines.append("")
        return "\n".join(lines)

    def counters(self):
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(self.path("haproxy-server.sock"))
            stream.sendall(b"show stat\n")
            text = b""
            while chunk := stream.recv(65536):
                text += chunk
        rows = [line.split(",") for line in text.decode().lstrip("# ").splitlines() if line]
        head = rows[0]
        front = {row[0]: dict(zip(head, row)) for row in rows[1:] if row[1] == "FRONTEND"}
        number = lambda name, field: int(front[name][field] or 0)
        requests = number("server_h1", "req_tot") + number("server_h2", "req_tot")
        denied = sum(number(f"server_{kind}", "dreq") for kind in APP)
        return {"requests": requests, "connections": number("server_tcp", "stot"), "denied": denied}


class Relay(Leg):
    name, base = "relay", 30000

    def start(self):
        binary = os.path.join(self.bins, "bench-relay")
        for role, namespace in (("client", self.net.client), ("server", self.net.server)):
            args = [binary, role, "--cert", self.path(f"{role}.pem"), "--key", self.path(f"{role}.key"),
                    "--root", self.path("root.pem")]
            if role == "client":
                args += ["--expect", SERVER_ID]
                args += [f"127.0.0.1:{self.out_port(k)}={SERVER_IP}:{self.in_port(k)}" for k in APP]
            else:
                args += [f"{SERVER_IP}:{self.in_port(k)}=127.0.0.1:{APP[k]}" for k in APP]
            setattr(self, role, self.net.start(namespace, args, self.path(f"relay-{role}.log")))
        self.wait()

    def configurations(self):
        return {f"relay-{role}": getattr(self, role).args_text for role in ("client", "server")}


class Mantlet(Leg):
    name, base = "mantlet", 40000
    control_port = 15012

    def start(self):
        self.server = self.launch("server", self.net.server, SERVER_IP)
        self.client = self.launch("client", self.net.client, CLIENT_IP)
        self.wait()

    def launch(self, role, namespace, address):
        token = self.write(f"mantlet-{role}.token", role)
        env = {
            "POD_NAME": role, "POD_NAMESPACE": "bench", "SERVICE_ACCOUNT": role, "INSTANCE_IP": address,
            "PROXY_CONFIG": json.dumps({
                "discoveryAddress": f"{SERVER_IP}:{self.control_port}", "concurrency": 1,
                "terminationDrainDuration": "0s"}),
            "XDS_ROOT_CA": self.path("root.pem"), "CA_ROOT_CA": self.path("root.pem"),
            "MANTLET_MESH_ROOT": self.path("root.pem"), "MANTLET_TOKEN_FILE": token,
            "ISTIO_META_WORKLOAD_NAME": role, "ISTIO_METAJSON_LABELS": json.dumps({"app": role}),
        }
        proxy = os.path.join(self.bins, "mantlet-proxy")
        return self.net.start(namespace, [proxy, "proxy", "sidecar", "--log_output_level=default:warn"],
                              self.path(f"mantlet-{role}.log"), env)

    def configurations(self):
        out = {}
        for role in ("client", "server"):
            with open(self.path(f"mantlet-{role}.json")) as text:
                out[f"mantlet-{role}.json"] = text.read()
        return out

    def counters(self):
        text = self.net.server.do("curl", "-sS", "--max-time", "5", "http://127.0.0.1:15090/stats/prometheus")

        def total(name, *labels):
            out = 0
            for line in text.splitlines():
                if re.match(rf"{name}[{{ ]", line) and all(label in line for label in labels):
                    out += int(float(line.rsplit(" ", 1)[1]))
            return out

        return {
            "requests": total("istio_requests_total", 'reporter="destination"', 'response_code="200"'),
            "allowed": total("envoy_http_rbac_allowed"),
            "connections": total("istio_tcp_connections_opened_total", 'reporter="destination"'),
            "tcp_allowed": total("envoy_tcp_rbac_allowed"),
            "denied": total("envoy_http_rbac_denied") + total("envoy_tcp_rbac_denied"),
        }


LEGS = {leg.name: leg for leg in (Mantlet, Envoy, Haproxy, Relay)}

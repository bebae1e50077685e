"""The contestants: how each pair of proxies is configured, started and asked for its counters.

Every leg gets the same certificates (ECDSA P-256, one root), one worker thread per proxy, mutual TLS without resumption
between its two ends, and on the server's side a policy of 100 rules of which the one in the middle admits the client's
identity (HAProxy cannot read URI names: its rules are by path, and for TCP there is one). A leg owns a block of ports: +80
HTTP/1.1, +82 HTTP/2, +84 gRPC, +90 TCP on the client's loopback, 6000 higher on the server's address. Mantlet and Envoy
appear a second time with an access log in Istio's format.
"""

import json
import os
import re
import socket
import time

from net import CLIENT_IP, SERVER_IP

APP = {"h1": 8080, "h2": 8082, "grpc": 8084, "tcp": 8080}
OFFSET = {"h1": 80, "h2": 82, "grpc": 84, "tcp": 90}
# Kinds whose connections are HTTP/2 on all three hops.
HTTP2 = ("h2", "grpc")
RULES = 100
# Istio's default format.
LOG_FORMAT = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% '
    '%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% '
    '%BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" '
    '"%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% '
    '%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n')
CLIENT_ID = "spiffe://cluster.local/ns/bench/sa/client"
SERVER_ID = "spiffe://cluster.local/ns/bench/sa/server"


class Leg:
    name = ""
    base = 0
    # Whether it writes an access log.
    logged = False
    # Whether its start is timed.
    timed_start = True

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

    def to_start(self):
        """Command, additional environment and sign of readiness of the client's side alone."""
        raise NotImplementedError

    def log_path(self, role):
        return self.path(f"access-{self.name}-{role}.log")

    def logs(self):
        return [self.log_path(role) for role in ("client", "server")] if self.logged else []

    def forget_logs(self):
        """Empties the logs; their programs append."""
        for path in self.logs():
            open(path, "w").close()

    def log_lines(self, path, expected):
        """How many lines there are once there are as many as expected, or no more come: logs are written in batches."""
        lines, end = -1, time.time() + 15
        while True:
            with open(path, "rb") as log:
                now = sum(chunk.count(b"\n") for chunk in iter(lambda: log.read(1 << 20), b""))
            if (now >= expected and now == lines) or time.time() > end:
                return now
            lines = now
            time.sleep(0.3)

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
            process = self.net.start(namespace, self.command(role), self.path(f"{self.name}-{role}.log"))
            setattr(self, role, process)
        self.wait()

    def command(self, role):
        text = json.dumps(self.bootstrap(role))
        self.texts[f"{self.name}-{role}.json"] = text
        config = self.write(f"{self.name}-{role}.json", text)
        return [self.envoy_bin, "-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]

    def to_start(self):
        self.texts = {}
        return self.command("client"), {}, f"http://127.0.0.1:{self.base + 1}/ready"

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
            protocol = {"http2_protocol_options": {}} if kind in HTTP2 else {"http_protocol_options": {}}
            cluster["typed_extension_protocol_options"] = {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": protocol}}
        if role == "client":
            cluster["transport_socket"] = self.upstream({"h1": ["http/1.1"], "tcp": []}.get(kind, ["h2"]))
        return cluster

    def rbac(self, http):
        policies = {}
        for number in range(RULES):
            caller, methods, path = f"spiffe://cluster.local/ns/team-{number}/sa/app", ["GET"], f"/team-{number}/"
            if number == RULES // 2:
                caller, methods, path = CLIENT_ID, ["GET", "POST"], None
            asks = [{"or_rules": {"rules": [
                {"header": {"name": ":method", "string_match": {"exact": method}}} for method in methods]}}]
            if path:
                asks.append({"url_path": {"path": {"prefix": path}}})
            policies[f"ns[bench]-policy[allow]-rule[{number:03}]"] = {
                "permissions": [{"and_rules": {"rules": asks}} if http else {"any": True}],
                "principals": [{"authenticated": {"principal_name": {"exact": caller}}}]}
        rules = {"action": "ALLOW", "policies": policies}
        kind = "http" if http else "network"
        config = {"@type": f"type.googleapis.com/envoy.extensions.filters.{kind}.rbac.v3.RBAC", "rules": rules}
        if not http:
            config["stat_prefix"] = "tcp."
        return {"name": f"envoy.filters.{kind}.rbac", "typed_config": config}

    def access_log(self, role):
        if not self.logged:
            return []
        return [{"name": "envoy.access_loggers.file", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": self.log_path(role), "log_format": {"text_format_source": {"inline_string": LOG_FORMAT}}}}]

    def listener(self, role, kind):
        inbound = role == "server"
        address, port = (SERVER_IP, self.in_port(kind)) if inbound else ("127.0.0.1", self.out_port(kind))
        if kind == "tcp":
            filters = [self.rbac(False)] if inbound else []
            filters.append({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": f"{role}_{kind}", "cluster": f"{role}_{kind}", "access_log": self.access_log(role)}})
        else:
            http_filters = [self.rbac(True)] if inbound else []
            http_filters.append({"name": "envoy.filters.http.router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}})
            filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": f"{role}_{kind}", "codec_type": "AUTO", "access_log": self.access_log(role),
                "forward_client_cert_details": "APPEND_FORWARD" if inbound else "SANITIZE",
                "set_current_client_cert_details": {"subject": True, "uri": True},
                "normalize_path": True,
                "route_config": {"virtual_hosts": [{"name": "any", "domains": ["*"], "routes": [
                    {"match": {"prefix": "/"}, "route": {"cluster": f"{role}_{kind}", "timeout": "0s"}}]}]},
                "http_filters": http_filters}}]
        chain = {"filters": filters}
        if inbound:
            chain["transport_socket"] = self.downstream([] if kind == "tcp" else ["h2", "http/1.1"])
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
            "requests": total(r"http\.server_(h1|h2|grpc)\.downstream_rq_total"),
            "allowed": total(r"http\.server_(h1|h2|grpc)\.rbac\.allowed"),
            "connections": total(r"tcp\.server_tcp\.downstream_cx_total"),
            "tcp_allowed": total(r"tcp\.rbac\.allowed"),
            "denied": total(r"(http\.server_(h1|h2|grpc)|tcp)\.rbac\.denied"),
        }


class Haproxy(Leg):
    name, base = "haproxy", 20000

    def start(self):
        self.texts = {}
        for role, namespace in (("client", self.net.client), ("server", self.net.server)):
            process = self.net.start(namespace, self.command(role), self.path(f"haproxy-{role}.log"))
            setattr(self, role, process)
        self.wait()

    def command(self, role):
        text = self.config(role)
        self.texts[f"haproxy-{role}.cfg"] = text
        return ["haproxy", "-db", "-f", self.write(f"haproxy-{role}.cfg", text)]

    def to_start(self):
        self.texts = {}
        return self.command("client"), {}, f"tcp://127.0.0.1:{self.out_port('tcp')}"

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
                proto = " proto h2" if kind in HTTP2 else ""
                lines.append(f"  bind 127.0.0.1:{self.out_port(kind)}{proto}")
            else:
                alpn = {"h1": " alpn http/1.1", "tcp": ""}.get(kind, " alpn h2")
                lines.append(f"  bind {SERVER_IP}:{self.in_port(kind)} ssl crt {self.path('server.both')} "
                             f"ca-file {self.path('root.pem')} verify required{alpn}")
                if kind == "tcp":
                    lines.append("  tcp-request content reject unless { ssl_c_used } { ssl_c_verify 0 }")
                else:
                    lines.append("  http-request set-header X-Forwarded-Client-Cert Subject=%{+Q}[ssl_c_s_dn]")
                    for number in range(RULES):
                        asks = "{ method GET POST }" if number == RULES // 2 else f"{{ path_beg /team-{number}/ }} {{ method GET }}"
                        lines.append(f"  http-request allow if {asks} {{ ssl_c_used }} {{ ssl_c_verify 0 }}")
                    lines.append("  http-request deny")
            lines += [f"  default_backend {role}_{kind}", f"backend {role}_{kind}", f"  mode {mode}"]
            if mode == "http":
                lines.append("  http-reuse always")
            if role == "client":
                alpn = {"h1": " alpn http/1.1", "tcp": ""}.get(kind, " alpn h2")
                lines.append(f"  server s {SERVER_IP}:{self.in_port(kind)} ssl crt {self.path('client.both')} "
                             f"ca-file {self.path('root.pem')} verify required no-ssl-reuse{alpn}")
            else:
                proto = " proto h2" if kind in HTTP2 else ""
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
        requests = sum(number(f"server_{kind}", "req_tot") for kind in APP if kind != "tcp")
        denied = sum(number(f"server_{kind}", "dreq") for kind in APP)
        return {"requests": requests, "connections": number("server_tcp", "stot"), "denied": denied}


class Relay(Leg):
    name, base = "relay", 30000

    def start(self):
        for role, namespace in (("client", self.net.client), ("server", self.net.server)):
            setattr(self, role, self.net.start(namespace, self.command(role), self.path(f"relay-{role}.log")))
        self.wait()

    def command(self, role):
        args = [os.path.join(self.bins, "bench-relay"), role, "--cert", self.path(f"{role}.pem"),
                "--key", self.path(f"{role}.key"), "--root", self.path("root.pem")]
        if role == "client":
            args += ["--expect", SERVER_ID]
            args += [f"127.0.0.1:{self.out_port(k)}={SERVER_IP}:{self.in_port(k)}" for k in APP]
        else:
            args += [f"{SERVER_IP}:{self.in_port(k)}=127.0.0.1:{APP[k]}" for k in APP]
        return args

    def to_start(self):
        return self.command("client"), {}, f"tcp://127.0.0.1:{self.out_port('tcp')}"

    def configurations(self):
        return {f"relay-{role}": getattr(self, role).args_text for role in ("client", "server")}


class Mantlet(Leg):
    name, base = "mantlet", 40000
    control_port = 15012

    def start(self):
        self.server = self.launch(self.pod("server"), self.net.server, SERVER_IP)
        self.client = self.launch(self.pod("client"), self.net.client, CLIENT_IP)
        self.wait()

    def pod(self, role):
        return f"{role}-log" if self.logged else role

    def port(self, usual):
        return usual + (100 if self.logged else 0)

    def command(self, pod, address):
        env = {
            "POD_NAME": pod, "POD_NAMESPACE": "bench", "SERVICE_ACCOUNT": pod.removesuffix("-log"),
            "INSTANCE_IP": address,
            "PROXY_CONFIG": json.dumps({
                "discoveryAddress": f"{SERVER_IP}:{self.control_port}", "concurrency": 1,
                "terminationDrainDuration": "0s", "proxyAdminPort": self.port(15000), "statusPort": self.port(15020)}),
            "ENVOY_STATUS_PORT": str(self.port(15021)), "ENVOY_PROMETHEUS_PORT": str(self.port(15090)),
            "XDS_ROOT_CA": self.path("root.pem"), "CA_ROOT_CA": self.path("root.pem"),
            "MANTLET_MESH_ROOT": self.path("root.pem"), "MANTLET_TOKEN_FILE": self.write(f"mantlet-{pod}.token", pod),
            "ISTIO_META_WORKLOAD_NAME": pod, "ISTIO_METAJSON_LABELS": json.dumps({"app": pod}),
            # The access log is a file of the benchmark's.
            "MANTLET_SANDBOX_WRITE": self.work,
        }
        proxy = os.path.join(self.bins, "mantlet-proxy")
        # Its listeners have sockets of their own, as nothing is captured here: a sidecar would ask for none of them by name.
        return [proxy, "proxy", "sidecar", "--eager", "--log_output_level=default:warn"], env

    def launch(self, pod, namespace, address):
        command, env = self.command(pod, address)
        return self.net.start(namespace, command, self.path(f"mantlet-{pod}.log"), env)

    def to_start(self):
        command, env = self.command(self.pod("client"), CLIENT_IP)
        return command, env, f"http://127.0.0.1:{self.port(15021)}/healthz/ready"

    def log_path(self, role):
        return self.path(f"access-{self.pod(role)}.log")

    def configurations(self):
        out = {}
        for role in ("client", "server"):
            name = f"mantlet-{self.pod(role)}.json"
            with open(self.path(name)) as text:
                out[name] = text.read()
        return out

    def counters(self):
        text = self.net.server.do("curl", "-sS", "--max-time", "5", f"http://127.0.0.1:{self.port(15090)}/stats/prometheus")

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


class MantletLog(Mantlet):
    name, base, logged, timed_start = "mantlet_log", Mantlet.base + 1000, True, False


class EnvoyLog(Envoy):
    name, base, logged, timed_start = "envoy_log", Envoy.base + 1000, True, False


LEGS = {leg.name: leg for leg in (Mantlet, MantletLog, Envoy, EnvoyLog, Haproxy, Relay)}

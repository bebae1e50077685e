"""Two network namespaces joined by a veth pair, and the programs that run in them."""

import os
import signal
import subprocess
import time

CLIENT_IP = "10.99.0.1"
SERVER_IP = "10.99.0.2"


def run(*args, check=True, env=None):
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


class Namespace:
    def __init__(self, name):
        self.name = name
        run("ip", "netns", "add", name)
        self.do("ip", "link", "set", "lo", "up")
        # New connections by the thousand must not run out of ports within a run.
        self.do("sysctl", "-q", "-w", "net.ipv4.ip_local_port_range=1024 65000")
        self.do("sysctl", "-q", "-w", "net.ipv4.ip_local_reserved_ports=8000-9999,10000-49999")
        self.do("sysctl", "-q", "-w", "net.ipv4.tcp_tw_reuse=1")

    def command(self, *args):
        return ["ip", "netns", "exec", self.name, *args]

    def do(self, *args, check=True, env=None):
        return run(*self.command(*args), check=check, env=env)

    def delete(self):
        run("ip", "netns", "delete", self.name, check=False)


class Net:
    """The pair of namespaces; everything started through it ends with it."""

    def __init__(self):
        suffix = os.getpid()
        self.client = Namespace(f"mbc{suffix}")
        self.server = Namespace(f"mbs{suffix}")
        self.processes = []
        run("ip", "link", "add", "veth0", "netns", self.client.name, "type", "veth",
            "peer", "name", "veth0", "netns", self.server.name)
        for namespace, address in ((self.client, CLIENT_IP), (self.server, SERVER_IP)):
            namespace.do("ip", "address", "add", f"{address}/24", "dev", "veth0")
            namespace.do("ip", "link", "set", "veth0", "up")

    def start(self, namespace, args, log, env=None):
        """Starts a program; `ip netns exec` becomes the program, so the pid is the program's own."""
        with open(log, "wb") as out:
            process = subprocess.Popen(
                namespace.command(*args), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})}, start_new_session=True,
            )
        self.processes.append(process)
        process.log = log
        process.args_text = " ".join(args)
        return process

    def wait_port(self, namespace, port, process, limit=20):
        """Waits until something listens on a port, and fails early when its program has ended."""
        end = time.time() + limit
        while time.time() < end:
            listening = namespace.do("ss", "-Hltn", f"sport = :{port}")
            if listening.strip():
                return
            if process.poll() is not None:
                break
            time.sleep(0.05)
        with open(process.log, errors="replace") as text:
            tail = text.read()[-3000:]
        raise RuntimeError(f"{process.args_text}\nnothing listens on port {port}; its log ends:\n{tail}")

    def close(self):
        for process in reversed(self.processes):
            if process.poll() is None:
                try:
                    os.killpg(process.pid, signal.SIGTERM)
                except ProcessLookupError:
                    pass
        end = time.time() + 3
        for process in self.processes:
            try:
                process.wait(max(0.1, end - time.time()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.client.delete()
        self.server.delete()


def cpu_seconds(pid):
    """User and system time of a process with all its threads and reaped children, from /proc/<pid>/stat."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _status_mb(pid, field):
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return 0.0


def rss_mb(pid):
    return _status_mb(pid, "VmRSS:")


def peak_rss_mb(pid):
    return _status_mb(pid, "VmHWM:")

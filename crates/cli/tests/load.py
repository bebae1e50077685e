# Sends requests without ever retrying and prints as JSON how many were sent and answered with 200.
# Usage: load.py HOST PORT SECONDS
import http.client, json, socket, sys, threading, time

host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end = time.monotonic() + seconds
lock = threading.Lock()
result = {"sent": 0, "ok": 0, "connections": 0, "errors": []}


def exchange(connection, method, body):
    connection.request(method, "/", body=body)
    response = connection.getresponse()
    data = response.read()
    if response.status != 200 or (body is not None and data != body):
        raise RuntimeError(f"status {response.status}, {len(data)} bytes")
    return response.getheader("connection", "").lower() == "close" or response.will_close


def worker(kind, number):
    connection = None
    count = 0
    while time.monotonic() < end:
        count += 1
        body = f"{kind}-{number}-{count}".encode() if kind != "get" else None
        method = "GET" if body is None else "POST"
        with lock:
            result["sent"] += 1
        try:
            if connection is None:
                connection = http.client.HTTPConnection(host, port, timeout=10)
                connection.connect()
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with lock:
                    result["connections"] += 1
            close = exchange(connection, method, body) or kind == "fresh"
            with lock:
                result["ok"] += 1
        except Exception as error:
            close = True
            with lock:
                result["errors"].append(f"{kind} after {count}: {type(error).__name__}: {error}")
        if close and connection is not None:
            connection.close()
            connection = None
        time.sleep(0.002)


threads = [threading.Thread(target=worker, args=(kind, number)) for kind in ("get", "post", "fresh") for number in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
result["errors"] = result["errors"][:10]
print(json.dumps(result))

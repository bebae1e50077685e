# Sends requests without ever retrying, for as long as it runs, and says what became of each of them.
#
# Usage: caller.py JSON, a list of kinds of requests:
#   name, host, port, method, path   what is sent; `via` is the name to connect to when it is not `host`
#   kept                             on one connection for all requests of a worker, else on a new one for each
#   expect                           "allowed" (200), "denied" (403) or "refused" (no answer in HTTP at all)
#   every, workers                   pause in seconds after each request, number of requests at the same time
#
# Prints one JSON object a line: five times a second what was counted since (`sum`), with the start of the oldest request
# that is still under way (`floor`); and each request with another outcome than expected (`odd`), with its start and end.
import asyncio, json, os, socket, sys, time

LIMIT = 60.0  # seconds for one request; longer than any stop of a process in the tests
BODY = b"0123456789abcdef" * 64

run = f"{time.time():.6f}-{os.getpid()}"
number = 0
counted = {}
underway = {}


def say(record):
    global number
    number += 1
    record.update(run=run, number=number)
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


class Answer(Exception):
    pass


async def read_answer(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ")[1])
    fields = {}
    for line in lines[1:]:
        if ":" in line:
            name, value = line.split(":", 1)
            fields[name.strip().lower()] = value.strip()
    if "chunked" in fields.get("transfer-encoding", ""):
        body = b""
        while True:
            size = int((await reader.readline()).split(b";")[0], 16)
            chunk = await reader.readexactly(size + 2)
            if size == 0:
                break
            body += chunk[:-2]
    elif "content-length" in fields:
        body = await reader.readexactly(int(fields["content-length"]))
    else:
        body = await reader.read()
        fields["connection"] = "close"
    return status, body, fields.get("connection", "").lower() == "close"


async def exchange(kind, connection):
    reader, writer = connection
    body = BODY if kind["method"] == "POST" else b""
    head = f"{kind['method']} {kind['path']} HTTP/1.1\r\nhost: {kind['host']}\r\n"
    if body:
        head += f"content-length: {len(body)}\r\n"
    writer.write(head.encode() + b"\r\n" + body)
    await writer.drain()
    return await read_answer(reader)


def judge(kind, status, body):
    """The outcome, and for an odd one its reason."""
    expect = kind["expect"]
    if status is None:
        return ("refused", "") if expect != "allowed" else ("failed", body)
    if expect == "allowed":
        if status == 200 and (kind["method"] != "POST" or body == BODY):
            return "allowed", ""
        if status == 403:
            return "wrongly-denied", body[:100].decode("latin-1")
        return "failed", f"{status} {body[:160].decode('latin-1')}"
    if expect == "denied" and (status == 403 or status >= 500):
        # A proxy that cannot reach the server has let nobody in.
        return ("denied" if status == 403 else "refused"), ""
    return "wrongly-allowed", f"{status} {body[:100].decode('latin-1')}"


async def worker(kind, address, key):
    connection = None
    while True:
        start = time.time()
        underway[key] = start
        status, body, close = None, "", True
        try:
            async with asyncio.timeout(LIMIT):
                if connection is None:
                    connection = await asyncio.open_connection(address, kind["port"])
                    sock = connection[1].get_extra_info("socket")
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                status, body, close = await exchange(kind, connection)
        except TimeoutError:
            body = f"no answer within {LIMIT} s"
        except (OSError, asyncio.IncompleteReadError, ValueError, IndexError) as error:
            body = f"{type(error).__name__}: {error}"
        end = time.time()
        outcome, reason = judge(kind, status, body)
        count, slowest = counted.get((kind["name"], outcome), (0, 0.0))
        counted[kind["name"], outcome] = (count + 1, max(slowest, end - start))
        if reason:
            say({"odd": outcome, "kind": kind["name"], "start": start, "end": end, "reason": reason})
        if connection is not None and (close or not kind["kept"]):
            connection[1].transport.abort() if close and status is None else connection[1].close()
            connection = None
        underway.pop(key, None)
        await asyncio.sleep(kind["every"])


async def report():
    while True:
        await asyncio.sleep(0.2)
        now = time.time()
        sums = [[kind, outcome, count, slowest] for (kind, outcome), (count, slowest) in counted.items()]
        counted.clear()
        say({"sum": sums, "at": now, "floor": min(underway.values(), default=now)})


async def resolve(name):
    while True:
        try:
            return socket.gethostbyname(name)
        except OSError:
            await asyncio.sleep(0.2)


async def main():
    kinds = json.loads(sys.argv[1])
    tasks = [report()]
    for kind in kinds:
        # Once: the name service is not what is measured.
        address = await resolve(kind.get("via", kind["host"]))
        tasks += [worker(kind, address, (kind["name"], n)) for n in range(kind.get("workers", 1))]
    await asyncio.gather(*tasks)


asyncio.run(main())

# A peer that means harm: opens connections and is slow on each of them.
#
# Usage: hostile.py HOST PORT COUNT SECONDS MODE, where MODE is what is sent on every connection
#   silent     nothing
#   handshake  the first half of a TLS ClientHello, then a byte a second
#   head       the beginning of an HTTP request, then a byte of a header a second
#   body       the head of a request with a body, then a byte of it a second
# A connection that the other side closes is opened again. With MODE `flood` nothing is sent, connections are opened as fast as
# can be, stay for SECONDS after the last one, and are not opened again. Prints one JSON object at the end: how many were open at the same
# time, how many the other side refused or closed.
import asyncio, json, resource, select, socket, sys, time

host, port, count, seconds, mode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
end = time.monotonic() + seconds
open_now = most = refused = closed = 0

HELLO = bytes.fromhex("16030100f8010000f40303") + bytes(32)
FIRST = {
    "silent": b"",
    "flood": b"",
    "handshake": HELLO,
    "head": b"GET / HTTP/1.1\r\nhost: shop.test\r\nx-slow: ",
    "body": b"POST / HTTP/1.1\r\nhost: shop.test\r\ncontent-length: 100000\r\n\r\n",
}[mode]


async def connection(number):
    global open_now, most, refused, closed
    # Not all in one moment: the kernel's queue of connections would be the limit.
    await asyncio.sleep(number / 4000)
    while time.monotonic() < end:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 10)
        except (OSError, asyncio.TimeoutError):
            refused += 1
            await asyncio.sleep(1)
            continue
        open_now += 1
        most = max(most, open_now)
        try:
            writer.write(FIRST)
            while time.monotonic() < end:
                try:
                    if await asyncio.wait_for(reader.read(1000), 1) == b"":
                        closed += 1
                        break
                except asyncio.TimeoutError:
                    if FIRST:
                        writer.write(b"x")
                        await writer.drain()
        except OSError:
            closed += 1
        open_now -= 1
        writer.transport.abort()
        await asyncio.sleep(0.5)


async def main():
    await asyncio.gather(*(connection(number) for number in range(count)))


def flood():
    global most, refused, closed
    poll = select.poll()
    held = []
    for _ in range(count):
        try:
            held.append(socket.create_connection((host, port), 10))
            poll.register(held[-1], select.POLLIN)
        except OSError:
            refused += 1
    time.sleep(seconds)
    closed = len(poll.poll(0))
    most = len(held) - closed


if mode == "flood":
    flood()
else:
    asyncio.run(main())
print(json.dumps({"most": most, "refused": refused, "closed": closed}))

"""A client on a foreign QUIC stack, aioquic: the Protobuf stream, a datagram, and how a connection ends."""

import asyncio
import json
import ssl
import sys

from aioquic.asyncio import QuicConnectionProtocol, connect
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, DatagramFrameReceived, StreamDataReceived
from centrifuge.protocol import client_pb2 as wire
from google.protobuf.internal.decoder import _DecodeVarint
from google.protobuf.internal.encoder import _VarintBytes

address, authority, token, conversation = sys.argv[1:]
host, port = address.rsplit(":", 1)


def check(condition, what):
    if not condition:
        print(f"FAILED: {what}", file=sys.stderr, flush=True)
        sys.exit(1)


class Client(QuicConnectionProtocol):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rest, self.replies, self.datagrams, self.ended = b"", [], [], None
        self.moved = asyncio.Event()
        self.stream = None

    def quic_event_received(self, event):
        if isinstance(event, StreamDataReceived):
            self.rest += event.data
            self.split()
        elif isinstance(event, DatagramFrameReceived):
            reply = wire.Reply()
            reply.ParseFromString(event.data)
            self.datagrams.append(reply)
        elif isinstance(event, ConnectionTerminated):
            self.ended = event
        self.moved.set()

    def split(self):
        while self.rest:
            try:
                length, head = _DecodeVarint(self.rest, 0)
            except IndexError:
                return
            if len(self.rest) < head + length:
                return
            reply = wire.Reply()
            reply.ParseFromString(self.rest[head : head + length])
            self.rest = self.rest[head + length :]
            if length == 0:
                self.write(b"\0")
            else:
                self.replies.append(reply)

    def write(self, data):
        self._quic.send_stream_data(self.stream, data)
        self.transmit()

    def send(self, command):
        data = command.SerializeToString()
        self.write(_VarintBytes(len(data)) + data)

    async def until(self, condition):
        async with asyncio.timeout(30):
            while not (found := condition()):
                self.moved.clear()
                await self.moved.wait()
            return found

    async def reply(self, number):
        return await self.until(lambda: next((r for r in self.replies if r.id == number), None))


def rpc(number, method, data):
    return wire.Command(id=number, rpc=wire.RPCRequest(method=method, data=json.dumps(data).encode()))


async def main():
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=["patchbay/1"], max_datagram_frame_size=65536, cafile=authority,
        server_name="localhost", verify_mode=ssl.CERT_REQUIRED,
    )
    async with connect(host, int(port), configuration=configuration, create_protocol=Client) as client:
        client.stream = client._quic.get_next_available_stream_id()
        data = json.dumps({"datagrams": True}).encode()
        client.send(wire.Command(id=1, connect=wire.ConnectRequest(token=token, data=data)))
        connected = await client.reply(1)
        check(connected.connect.client and connected.connect.ping == 25, "it is connected")
        channel = f"conversation:{conversation}"
        client.send(wire.Command(id=2, subscribe=wire.SubscribeRequest(channel=channel)))
        tip = (await client.reply(2)).subscribe.offset
        check(tip == 2, "the position is the tip")
        for n in range(20):
            client.send(rpc(10 + n, "note.add", {"conversation": conversation, "client_id": f"f{n}", "text": "x" * 2000}))
        await client.until(lambda: sum(1 for r in client.replies if r.push.pub.offset > tip) == 20)
        offsets = [r.push.pub.offset for r in client.replies if r.push.pub.offset]
        check(offsets == list(range(tip + 1, tip + 21)), f"every entry once, in order: {offsets}")
        client.send(rpc(40, "typing.set", {"conversation": conversation, "on": True}))
        is_typing = lambda r: r.push.pub.data and json.loads(r.push.pub.data)["type"] == "typing"
        await client.until(lambda: any(is_typing(r) for r in client.datagrams))
        check(not any(is_typing(r) for r in client.replies if r.push.pub.data), "typing comes by datagram alone")
        client.send(wire.Command(id=50, connect=wire.ConnectRequest(token=token)))
        last = await client.until(lambda: next((r for r in client.replies if r.push.disconnect.code), None))
        check(last.push.disconnect.code == 3501, "it is told why")
        ended = await client.until(lambda: client.ended)
        check(ended.error_code == 3501, f"the connection ends with the code: {ended}")


asyncio.run(main())

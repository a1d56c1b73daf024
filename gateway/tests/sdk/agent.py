"""An agent on the public Python SDK, unmodified: the same steps as agent.mjs."""

import asyncio
import json
import sys
import urllib.request

from centrifuge import Client, ClientEventHandler, ReplyError, SubscriptionEventHandler

encoding, _sdk, url, api, key, conversation, _transport = sys.argv[1:]
binary = encoding == "protobuf"
seen, recoveries, changed = [], [], []
tokens = 0
moved = None


def out(value):
    return json.dumps(value).encode() if binary else value


def into(data):
    return json.loads(data) if binary else data


def check(condition, what):
    if not condition:
        print(f"FAILED: {what}", file=sys.stderr, flush=True)
        sys.exit(1)


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            moved.clear()
            await moved.wait()


async def ask(what):
    print(what, flush=True)
    return await asyncio.to_thread(sys.stdin.readline)


def fetch_token():
    request = urllib.request.Request(
        f"{api}/agents/anna/tokens",
        data=json.dumps({"ttl_s": 4}).encode(),
        headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.load(answer)["token"]


async def get_token():
    global tokens
    tokens += 1
    return await asyncio.to_thread(fetch_token)


class Inbox(SubscriptionEventHandler):
    async def on_publication(self, ctx):
        changed.append(into(ctx.pub.data))
        moved.set()


class Conversation(SubscriptionEventHandler):
    async def on_subscribed(self, ctx):
        recoveries.append(ctx)
        moved.set()

    async def on_publication(self, ctx):
        if ctx.pub.offset:
            seen.append((ctx.pub.offset, into(ctx.pub.data)["type"]))
        moved.set()


async def main():
    global moved
    moved = asyncio.Event()
    client = Client(
        url,
        events=ClientEventHandler(),
        get_token=get_token,
        use_protobuf=binary,
        min_reconnect_delay=0.05,
        max_reconnect_delay=0.3,
        proxy=None,
    )
    inbox = client.new_subscription("inbox:main", events=Inbox())
    await inbox.subscribe()
    await client.connect()
    await client.ready(10)
    await inbox.ready(10)
    await ask("WRITE")
    await until(lambda: changed)
    check(changed[0]["conversation"]["id"] == conversation, "the inbox shows the conversation")
    subscription = client.new_subscription(
        f"conversation:{conversation}", events=Conversation(), recoverable=True, positioned=True, join_leave=True
    )
    await subscription.subscribe()
    await subscription.ready(10)
    check(recoveries[0].recoverable and recoveries[0].stream_position.offset == 2, "the position is the tip")
    message = {"conversation": conversation, "client_id": f"{encoding}-1", "content": {"type": "text", "text": "hola"}}
    sent = into((await client.rpc("message.send", out(message))).data)
    check(sent["seq"] == 3 and sent["duplicate"] is False, "the message is the third entry")
    await until(lambda: any(seq == 3 for seq, _ in seen))
    try:
        await client.rpc("message.send", out({**message, "client_id": ""}))
        check(False, "an empty client id is refused")
    except ReplyError as error:
        check(error.code == 400 and error.message.startswith("invalid_request"), "a refused rpc has its code")
    page = await subscription.history(limit=2)
    check([p.offset for p in page.publications] == [1, 2], "history begins at the first entry")
    back = await subscription.history(limit=2, reverse=True)
    check(back.publications[0].offset >= 3, "history goes back from the tip")
    presence = await subscription.presence()
    check(any(c.user == "anna" for c in presence.clients.values()), "presence shows the agent")

    await ask("KILL")
    await until(lambda: len(recoveries) >= 2 and recoveries[-1].recovered)
    await ask("WRITE")
    await until(lambda: any(seq > 3 and kind == "message.received" for seq, kind in seen))
    offsets = [seq for seq, _ in seen]
    check(all(b == a + 1 for a, b in zip(offsets, offsets[1:])), f"every seq once and in order: {offsets}")

    before = tokens
    await asyncio.sleep(5)
    check(tokens > before and client.state.value == "connected", "the token is refreshed on the live socket")
    await subscription.unsubscribe()
    count = len(seen)
    await ask("WRITE")
    await asyncio.sleep(0.3)
    check(len(seen) == count, "nothing comes after unsubscribe")
    await client.disconnect()
    print("DONE", flush=True)


asyncio.run(main())

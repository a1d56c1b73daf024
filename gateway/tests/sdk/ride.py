"""An agent on the public Python SDK, unmodified: the same steps as ride.mjs."""

import asyncio
import json
import os
import sys
import urllib.request

from centrifuge import Client, ClientEventHandler, SubscriptionEventHandler

encoding, _sdk, url, api, key, conversations = sys.argv[1:]
seen = {conversation: [] for conversation in conversations.split(",")}
subscribed = set()
codes = []


def check(condition, what):
    if not condition:
        print(f"FAILED: {what}", file=sys.stderr, flush=True)
        os._exit(1)


def fetch_token():
    request = urllib.request.Request(
        f"{api}/agents/ben/tokens",
        data=json.dumps({"ttl_s": 600}).encode(),
        headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
        return json.load(answer)["token"]


async def get_token():
    for _ in range(100):
        try:
            return await asyncio.to_thread(fetch_token)
        except OSError:
            await asyncio.sleep(0.1)
    return await asyncio.to_thread(fetch_token)


class Follows(SubscriptionEventHandler):
    def __init__(self, conversation):
        self.conversation = conversation

    async def on_publication(self, ctx):
        if ctx.pub.offset:
            seen[self.conversation].append(ctx.pub.offset)

    async def on_subscribed(self, ctx):
        check(not ctx.was_recovering or ctx.recovered, f"{self.conversation}: a gap was told")
        subscribed.add(self.conversation)

    async def on_unsubscribed(self, ctx):
        check(False, f"{self.conversation}: unsubscribed {ctx.code} {ctx.reason}")


class Whole(ClientEventHandler):
    async def on_connecting(self, ctx):
        codes.append(ctx.code)

    async def on_disconnected(self, ctx):
        check(False, f"disconnected for good: {ctx.code} {ctx.reason}")


async def main():
    client = Client(
        url,
        events=Whole(),
        get_token=get_token,
        use_protobuf=encoding == "protobuf",
        min_reconnect_delay=0.05,
        max_reconnect_delay=0.5,
        proxy=None,
    )
    for conversation in seen:
        subscription = client.new_subscription(
            f"conversation:{conversation}",
            Follows(conversation),
            recoverable=True,
            positioned=True,
            min_resubscribe_delay=0.05,
            max_resubscribe_delay=0.5,
        )
        await subscription.subscribe()
    await client.connect()
    while len(subscribed) < len(seen):
        await asyncio.sleep(0.05)
    print("READY", flush=True)
    line = await asyncio.to_thread(sys.stdin.readline)
    for tip in line[4:].strip().split(","):
        conversation, tip = tip.split(":")
        offsets = seen[conversation]
        for _ in range(600):
            if offsets and offsets[-1] >= int(tip):
                break
            await asyncio.sleep(0.05)
        check(offsets and offsets[-1] == int(tip), f"{conversation}: {offsets[-1:]} of {tip} seen")
        gaps = [(a, b) for a, b in zip(offsets, offsets[1:]) if b != a + 1]
        check(not gaps, f"{conversation}: {gaps}")
    print(f"connected {len(codes)} times, by {sorted(set(codes))}", flush=True)
    print("DONE", flush=True)
    os._exit(0)


asyncio.run(main())

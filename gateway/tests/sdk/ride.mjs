// An agent on the public JavaScript SDK, unmodified, that follows conversations while nodes come and go: it has to see
// every entry once and in order. Says READY; is told END and how far each conversation reaches; says DONE.
import readline from 'node:readline';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [, , encoding, sdk, url, api, key, conversations] = process.argv;
const require = createRequire(`${sdk}/js/`);
const load = async (name) => (await import(pathToFileURL(require.resolve(name)).href));
const WebSocket = (await load('ws')).default;
const module = await load(encoding === 'protobuf' ? 'centrifuge/build/protobuf' : 'centrifuge');
const Centrifuge = module.Centrifuge ?? module.default.Centrifuge;
const assert = (condition, what) => { if (!condition) { console.error(`FAILED: ${what}`); process.exit(1); } };
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

const getToken = async () => {
  for (let n = 0; ; n += 1) {
    try {
      const answer = await fetch(`${api}/agents/anna/tokens`, {
        method: 'POST', headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' }, body: JSON.stringify({ ttl_s: 600 }),
      });
      if (answer.ok) return (await answer.json()).token;
    } catch (e) { if (n > 100) throw e; }
    await pause(100);
  }
};
const client = new Centrifuge(url, { websocket: WebSocket, getToken, minReconnectDelay: 50, maxReconnectDelay: 500, timeout: 5000 });
const codes = [];
client.on('connecting', (ctx) => codes.push(ctx.code));
const seen = new Map();
for (const conversation of conversations.split(',')) {
  const offsets = [];
  seen.set(conversation, offsets);
  const subscription = client.newSubscription(`conversation:${conversation}`, {
    recoverable: true, positioned: true, minResubscribeDelay: 50, maxResubscribeDelay: 500,
  });
  subscription.on('publication', (ctx) => { if (ctx.offset) offsets.push(ctx.offset); });
  subscription.on('subscribed', (ctx) => assert(!ctx.wasRecovering || ctx.recovered, `${conversation}: a gap was told`));
  subscription.on('unsubscribed', (ctx) => assert(false, `${conversation}: unsubscribed ${ctx.code} ${ctx.reason}`));
  subscription.subscribe();
}
client.on('disconnected', (ctx) => assert(false, `disconnected for good: ${ctx.code} ${ctx.reason}`));
client.connect();
for (const subscription of Object.values(client.subscriptions())) await subscription.ready(20_000);
console.log('READY');
for await (const line of readline.createInterface({ input: process.stdin })) {
  const tips = line.slice(4).split(',').map((tip) => tip.split(':'));
  for (const [conversation, tip] of tips) {
    const offsets = seen.get(conversation);
    for (let n = 0; n < 600 && (offsets.at(-1) ?? 0) < Number(tip); n += 1) await pause(50);
    assert(offsets.at(-1) === Number(tip), `${conversation}: ${offsets.at(-1)} of ${tip} seen`);
    const gap = offsets.findIndex((seq, n) => n > 0 && seq !== offsets[n - 1] + 1);
    assert(gap === -1, `${conversation}: ${offsets[gap - 1]} and then ${offsets[gap]}`);
  }
  break;
}
console.log(`connected ${codes.length} times, by ${[...new Set(codes)]}`);
console.log('DONE');
process.exit(0);

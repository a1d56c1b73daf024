// An agent on the public JavaScript SDK, unmodified: asks the test for what the world does (a line on stdout, an
// answer on stdin) and checks what the SDK shows. Exits 0 when everything held.
import readline from 'node:readline';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [, , encoding, sdk, url, api, key, conversation, transport] = process.argv;
const require = createRequire(`${sdk}/js/`);
const load = async (name) => (await import(pathToFileURL(require.resolve(name)).href));
const WebSocket = (await load('ws')).default;
const module = await load(encoding === 'protobuf' ? 'centrifuge/build/protobuf' : 'centrifuge');
const Centrifuge = module.Centrifuge ?? module.default.Centrifuge;

const binary = encoding === 'protobuf';
const out = (value) => (binary ? new TextEncoder().encode(JSON.stringify(value)) : value);
const into = (data) => (binary ? JSON.parse(Buffer.from(data).toString()) : data);
const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const ask = async (what) => { console.log(what); return (await lines.next()).value; };
const assert = (condition, what) => { if (!condition) { console.error(`FAILED: ${what}`); process.exit(1); } };
const deadline = setTimeout(() => assert(false, 'nothing more happened for 60 s'), 60_000);

let tokens = 0;
const getToken = async () => {
  tokens += 1;
  const answer = await fetch(`${api}/agents/anna/tokens`, {
    method: 'POST', headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' }, body: JSON.stringify({ ttl_s: 4 }),
  });
  return (await answer.json()).token;
};
const base = url.replace(/^ws/, 'http').replace('/connection/websocket', '');
const endpoint = transport === 'websocket' ? url : [{ transport, endpoint: `${base}/connection/${transport}` }];
const fallback = transport === 'sse' ? { eventsource: (await load('eventsource')).default } : {};
const client = new Centrifuge(endpoint, { websocket: WebSocket, ...fallback, emulationEndpoint: `${base}/emulation`, getToken, minReconnectDelay: 50, maxReconnectDelay: 300, timeout: 5000 });
const channel = `conversation:${conversation}`;
const seen = [];
const recoveries = [];
let waiting = [];
const check = () => { waiting = waiting.filter(([condition, done]) => (condition() ? (done(), false) : true)); };
const until = (condition) => new Promise((done) => { waiting.push([condition, done]); check(); });

const inbox = client.newSubscription('inbox:main');
const changed = [];
inbox.on('publication', (ctx) => { changed.push(into(ctx.data)); check(); });
inbox.subscribe();
client.connect();
await client.ready(10_000);
await inbox.ready(10_000);
await ask('WRITE');
await until(() => changed.length > 0);
assert(changed[0].conversation.id === conversation, 'the inbox shows the conversation');

const subscription = client.newSubscription(channel, { recoverable: true, positioned: true, joinLeave: true });
subscription.on('publication', (ctx) => { if (ctx.offset) seen.push([ctx.offset, into(ctx.data).type]); check(); });
subscription.on('subscribed', (ctx) => { recoveries.push(ctx); check(); });
subscription.subscribe();
await subscription.ready(10_000);
assert(recoveries[0].recoverable && recoveries[0].streamPosition.offset === 2, 'the position is the tip');
const sent = into((await client.rpc('message.send', out({ conversation, client_id: `${encoding}-1`, content: { type: 'text', text: 'hola' } }))).data);
assert(sent.seq === 3 && sent.duplicate === false, 'the message is the third entry');
await until(() => seen.some(([seq]) => seq === 3));
const refused = await client.rpc('message.send', out({ conversation, client_id: '', content: { type: 'text', text: 'x' } })).catch((e) => e);
assert(refused.code === 400 && refused.message.startsWith('invalid_request'), 'a refused rpc has its code');
const page = await subscription.history({ limit: 2 });
assert(page.publications.length === 2 && page.publications[0].offset === 1, 'history begins at the first entry');
const back = await subscription.history({ limit: 2, reverse: true });
assert(back.publications[0].offset >= 3, 'history goes back from the tip');
const presence = await subscription.presence();
assert(Object.values(presence.clients).some((c) => c.user === 'anna'), 'presence shows the agent');

await ask('KILL');
await until(() => recoveries.length >= 2 && recoveries[recoveries.length - 1].recovered);
await ask('WRITE');
await until(() => seen.some(([seq, type]) => seq > 3 && type === 'message.received'));
const offsets = seen.map(([seq]) => seq);
assert(offsets.every((seq, n) => n === 0 || seq === offsets[n - 1] + 1), `every seq once and in order: ${offsets}`);

const before = tokens;
await new Promise((done) => setTimeout(done, 5_000));
assert(tokens > before && client.state === 'connected', 'the token is refreshed on the live socket');
subscription.unsubscribe();
const count = seen.length;
await ask('WRITE');
await new Promise((done) => setTimeout(done, 300));
assert(seen.length === count, 'nothing comes after unsubscribe');
client.disconnect();
clearTimeout(deadline);
console.log('DONE');
process.exit(0);

//! The table of every bound, queue, buffer and cache (docs/src/generated/bounds.md), taken from the code: values are read
//! from the sources, and whatever the sources bound, queue or cache must stand in a row. `./x docs` writes the page.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use patchbay_gateway::config::Config;
use patchbay_gateway::metrics_table::METRICS;

/// What is bounded; by which constants (`NAME`, or `file.rs/NAME` where several have it) and configuration keys
/// (`section.key`); in which fields it is held; what happens past it; where it is seen.
struct Row(&'static str, &'static str, &'static str, &'static str, &'static str);

const SECTIONS: &[(&str, &[Row])] = &[
    (
        "Doors",
        &[
            Row(
                "new sockets a second, and how long and how many of them wait for their turn",
                "limits.connects_per_second, ADMIT_TIMEOUT, ADMIT_WAITING_MAX",
                "limits.rs/waiting",
                "`503` with `Retry-After`",
                "patchbay_limits_reached_total",
            ),
            Row(
                "sockets of a node that drains are told to go within",
                "client/mod.rs/LEAVING_MAX",
                "",
                "they go faster",
                "",
            ),
            Row(
                "an agent elsewhere that is asked for a list",
                "presence.rs/ASK_TIMEOUT",
                "",
                "its presence is null",
                "",
            ),
            Row(
                "HTTP connections of a listener, sockets not counted",
                "REQUESTS_MAX, STREAMS_MAX",
                "",
                "nobody is accepted until one ends; the kernel's queue holds them",
                "",
            ),
            Row(
                "a TLS handshake, a request's head, and an HTTP/2 connection over which nothing is asked",
                "listener.rs/HANDSHAKE_TIMEOUT, HEAD_TIMEOUT, listener.rs/BUFFER_BYTES, listener.rs/IDLE_MAX",
                "",
                "the connection is closed",
                "",
            ),
            Row(
                "what a proxy says of whom it speaks for",
                "HEADER_BYTES_MAX, FORWARDED_MAX",
                "proxies.rs/ranges",
                "the connection is closed; what stands before is not believed",
                "",
            ),
            Row(
                "a peer that takes nothing of what is there for it",
                "STALLED_MS",
                "",
                "the connection is given up",
                "",
            ),
            Row(
                "a body of the admin API",
                "admin-api/src/lib.rs/BODY_BYTES_MAX, admin-api/src/lib.rs/BODY_TIMEOUT",
                "",
                "413 `too_large`; 408",
                "",
            ),
            Row(
                "a webhook's body",
                "webhook.rs/BODY_BYTES_MAX, webhook.rs/BODY_TIMEOUT, DROPPED_BYTES_MAX",
                "",
                "413 once a little more was read; 408",
                "patchbay_webhook_answer_seconds",
            ),
            Row(
                "webhook bodies that are read or taken; those of one address",
                "BODIES_MAX, BODIES_BYTES_MAX, PEER_BODIES_MAX, SHARES_LOOK",
                "shares.rs/shares",
                "503, `Retry-After: 1`",
                "patchbay_webhook_answer_seconds",
            ),
            Row(
                "webhook bodies that are taken at once; those of one account",
                "webhook.rs/TAKEN_AT_ONCE, TAKEN_BYTES_MAX, ACCOUNT_TAKEN_AT_ONCE, TURN_TIMEOUT",
                "",
                "they wait; then 503",
                "patchbay_webhook_answer_seconds",
            ),
            Row(
                "items of one body",
                "BODY_ITEMS_MAX",
                "",
                "the body is kept whole as one dead letter",
                "patchbay_intake_dead_letters_total",
            ),
            Row(
                "items of one body, and of all bodies for one account, under way",
                "CHUNK_ITEMS, ACCOUNT_ITEMS_MAX, intake.rs/PATIENCE",
                "",
                "the rest waits; then 503",
                "patchbay_webhook_items_total",
            ),
            Row(
                "an item of a webhook",
                "ITEM_BYTES_MAX",
                "",
                "a message becomes `unsupported`, anything else a dead letter; kept as it came",
                "patchbay_intake_dead_letters_total",
            ),
            Row(
                "requests a second of an API key; commands a second of a connection, an agent, a tenant; signed bodies a second of an account; refused requests a second of an address",
                "limits.requests_per_second, limits.connection_per_second, limits.agent_per_second, limits.tenant_per_second, limits.webhooks_per_second, limits.strangers_per_second",
                "",
                "429 `rate_limited` with `retry_after_ms`",
                "patchbay_limits_reached_total",
            ),
            Row(
                "callers that are told apart, of each kind",
                "CALLERS_MAX",
                "limits.rs/callers",
                "those idle for 2 s are forgotten; a newcomer is told 429 when that is not enough",
                "patchbay_limits_reached_total",
            ),
            Row(
                "answers kept for `Idempotency-Key`, of each tenant",
                "idempotency.rs/KEPT_MAX, idempotency.rs/KEPT_FOR, idempotency.rs/KEY_MAX",
                "idempotency.rs/known, idempotency.rs/order",
                "the oldest are forgotten; a longer key: 422",
                "",
            ),
            Row(
                "a page of dead letters; letters that are read at once",
                "dead_letters.rs/PAGE_BYTES_MAX, READ_AT_ONCE",
                "",
                "the next page",
                "",
            ),
            Row(
                "a token",
                "TOKEN_BYTES_MAX, TTL_MAX_S",
                "",
                "3500, 401; a longer life: 422",
                "patchbay_edge_disconnects_total",
            ),
            Row(
                "names and ids in requests",
                "contacts.rs/NAME_MAX, keys.rs/NAME_MAX, extract.rs/NAME_MAX, CLIENT_ID_MAX, VISITOR_MAX, CHALLENGE_MAX",
                "",
                "422; a challenge: 403",
                "",
            ),
            Row("parts of a backup that wait for its reader", "PARTS_MAX", "", "the dump waits", ""),
            Row("a row of a backup", "backup.rs/KEY_MAX, VALUE_MAX", "", "restore refuses the file", ""),
        ],
    ),
    (
        "Sockets",
        &[
            Row(
                "sockets; those that are told that there are too many",
                "limits.connections, CLOSING_MAX",
                "",
                "disconnect 3013; dropped without a word",
                "patchbay_edge_connections",
            ),
            Row("sockets of one visitor", "VISITOR_SOCKETS_MAX", "", "error 430 `overloaded`, temporary", ""),
            Row(
                "sockets without `connect`",
                "limits.unconnected",
                "",
                "disconnect 3013; 3502 after 10 s",
                "patchbay_edge_disconnects_total",
            ),
            Row(
                "a command, a frame",
                "COMMAND_BYTES_MAX, FRAME_BYTES_MAX",
                "",
                "close 1009",
                "patchbay_edge_disconnects_total",
            ),
            Row(
                "commands of a frame; subscriptions and headers of a `connect`",
                "COMMANDS_PER_FRAME_MAX, CONNECT_SUBS_MAX, CONNECT_HEADERS_MAX",
                "connection.rs/backlog, request.rs/subs, request.rs/headers",
                "disconnect 3501",
                "patchbay_edge_disconnects_total",
            ),
            Row(
                "commands under way on a socket; events between two writes",
                "connection.rs/COMMANDS_MAX, UNWRITTEN_MAX",
                "lanes.rs/waiting",
                "the socket is not read; what is done is written",
                "patchbay_edge_rpc_seconds",
            ),
            Row(
                "subscriptions of a socket",
                "SUBSCRIPTIONS_MAX",
                "session.rs/subscriptions, outbound.rs/seams, hub/mod.rs/parts",
                "error 106",
                "",
            ),
            Row(
                "publications queued for a socket; frames for which room stays with it",
                "PUBLICATION_BYTES_MAX, outbound.rs/KEPT_MAX",
                "outbound.rs/frames",
                "a conversation goes on from the log when the socket drains; an inbox is unsubscribed (2500) and listed again; for an agent's own channel disconnect 3010",
                "patchbay_edge_disconnects_total",
            ),
            Row(
                "everything queued for a socket",
                "TOTAL_BYTES_MAX",
                "",
                "disconnect 3008",
                "patchbay_edge_disconnects_total",
            ),
            Row(
                "everything queued for all sockets together; what each may have all the same",
                "NODE_BYTES_MAX, FAIR_BYTES",
                "",
                "sockets with more than their share get no publications until there is room, and go on from the log",
                "patchbay_edge_queued_bytes",
            ),
            Row(
                "typing and presence that wait for a socket, the latest of each",
                "SLOTS_MAX",
                "outbound.rs/slots",
                "dropped",
                "",
            ),
            Row(
                "entries held while a subscription reads its past",
                "HELD_MAX",
                "",
                "the subscription goes on from the log",
                "",
            ),
            Row(
                "entries of a recovery (and 90 % of a page's bytes)",
                "RECOVERY_MAX_PUBLICATIONS",
                "",
                "`recovered: false`",
                "",
            ),
            Row(
                "a page of history or entries",
                "PAGE_ENTRIES_MAX, desk.rs/PAGE_BYTES_MAX",
                "",
                "the next page",
                "",
            ),
            Row(
                "rows looked at for one page of a visitor",
                "LOOKED_AT_MAX",
                "",
                "a shorter page, `recovered: false`",
                "",
            ),
            Row("an answer to `conversation.list`", "LIST_BYTES_MAX", "", "`next`", ""),
            Row(
                "clients shown by `presence`",
                "SHOWN_MAX",
                "reply.rs/presence, reply.rs/subs, reply.rs/tags",
                "the others are left out",
                "",
            ),
            Row(
                "a close, and what may still be answered before it",
                "client/connection.rs/CLOSE_TIMEOUT, websocket.rs/CLOSE_TIMEOUT, emulation.rs/CLOSE_TIMEOUT, quic.rs/CLOSE_TIMEOUT, REVOKE_TIMEOUT, REFUSE_TIMEOUT",
                "",
                "the connection is dropped",
                "",
            ),
            Row(
                "frames of commands of a client without a socket that wait to be read; the body of one, and how long it may take to come",
                "emulation.rs/COMMANDS_MAX, EMULATION_BYTES_MAX, emulation.rs/BODY_TIMEOUT",
                "",
                "503; 413; 408",
                "",
            ),
            Row(
                "replies that a client without a socket, or a QUIC client, has not taken, beside its queue",
                "emulation.rs/BUFFER_BYTES, quic.rs/BUFFER_BYTES, quic.rs/READ_BYTES",
                "",
                "the queue fills up: see above",
                "",
            ),
            Row(
                "QUIC connections without a stream, from how many on an address is asked to show itself; how long a handshake may take, and silence last",
                "quic.rs/HANDSHAKES_MAX, RETRY_FROM, quic.rs/HANDSHAKE_TIMEOUT, quic.rs/IDLE_MAX",
                "",
                "refused; gone",
                "patchbay_limits_reached_total",
            ),
            Row("sessions of an agent", "SESSIONS_MAX", "", "`overloaded`", ""),
            Row(
                "sockets of an agent that closed last, of which nothing is heard any more",
                "ENDED_MAX",
                "agent.rs/ended",
                "the oldest is forgotten",
                "",
            ),
            Row(
                "logs of a shard that goes whose tips are said",
                "TIPS_MAX",
                "shard/mod.rs/told, shard/mod.rs/resting",
                "the next owner writes again what nobody had confirmed",
                "",
            ),
            Row("a typing signal", "TYPING_FOR", "", "it ends", ""),
        ],
    ),
    (
        "Entities",
        &[
            Row(
                "commands in flight of a conversation or account",
                "ENTITY_IN_FLIGHT_MAX",
                "log_actor.rs/queue, log_actor.rs/later",
                "`overloaded` with `retry_after_ms`",
                "patchbay_actors_overloaded_total",
            ),
            Row("commands in flight of an agent or inbox", "soft.rs/IN_FLIGHT_MAX", "", "`overloaded`", ""),
            Row(
                "commands in flight of a shard, of each kind",
                "SHARD_IN_FLIGHT_MAX",
                "",
                "`overloaded`",
                "patchbay_actors_overloaded_total",
            ),
            Row(
                "entities in memory",
                "ACTIVE_MAX, limits.idle_after, limits.memory",
                "slots.rs/slots, slots.rs/by_actor, slots.rs/gates, soft.rs/map, slots.rs/active",
                "from three quarters of `limits.memory` on caches are emptied and whoever has nothing to do is forgotten until its next command; past it, when that was not enough, nobody else is let in: `overloaded`",
                "patchbay_actors_active",
            ),
            Row(
                "an answer of an entity",
                "reply.rs/PATIENCE",
                "reply.rs/over",
                "`unavailable`, and it is not begun any more on any node; repeating with the same ids is safe",
                "",
            ),
            Row(
                "failures of an entity in a row",
                "slots.rs/FAILURES_MAX",
                "",
                "it rests for a minute: `overloaded`",
                "patchbay_actors_failures_total",
            ),
            Row(
                "tries of a command that makes its entity panic; reloads of an entity's own accord; lookups of a command",
                "POISON_TRIES, CHILLS_MAX, LOOKUP_ROUNDS",
                "",
                "`internal`; it waits for its next command; it decides with what it has",
                "patchbay_actors_poison_commands_total",
            ),
            Row("rows of one append", "APPEND_ROWS_MAX", "", "the rest waits for the next append", ""),
            Row(
                "the wait for those who went out with the last append, where it took long",
                "GATHER_PATIENCE",
                "",
                "the next append goes without them",
                "",
            ),
            Row(
                "what is appended and not derived or handed on yet",
                "DERIVE_ENTRIES_MAX",
                "live.rs/recent, live.rs/recent_ids, log_actor.rs/tickets, log_actor.rs/ordered",
                "derived rows follow at once; else within 2 s, 4 s while entries keep coming. What waits longer waits for the store",
                "",
            ),
            Row("entries between two snapshots", "SNAPSHOT_ENTRIES", "", "a snapshot is written", ""),
            Row(
                "activity and timers in memory: of the hours at hand",
                "",
                "activity.rs/written, activity.rs/open, timers.rs/due, timers.rs/shards, timers.rs/held",
                "later ones are read when their hour comes",
                "",
            ),
            Row(
                "entities woken at once, shards read at once by a start, accounts read again at once",
                "WAKE_AT_ONCE, SHARDS_READ_AT_ONCE, REFRESH_AT_ONCE",
                "",
                "the others wait",
                "",
            ),
            Row(
                "content of a message; of a note; tags",
                "CONTENT_BYTES_MAX, command.rs/TEXT_MAX, TAG_MAX, TAGS_MAX, TAGS_PER_COMMAND_MAX, EMOJI_MAX",
                "conversation/state.rs/tags",
                "413 `too_large`; 422",
                "",
            ),
            Row(
                "a channel's own bounds of content",
                "webchat.rs/TEXT_MAX, render.rs/TEXT_MAX, CAPTION_MAX, BUTTONS_MAX, BUTTON_TITLE_MAX, ROWS_MAX, ROW_TITLE_MAX, ROW_DESCRIPTION_MAX",
                "",
                "422 before anything is stored",
                "",
            ),
            Row("automation that causes automation", "DEPTH_MAX", "", "422", ""),
            Row(
                "what a conversation keeps at hand: runs of unread messages, their provider's ids, statuses of its newest messages",
                "UNREAD_RUNS_MAX, UNREAD_IDS_MAX, STATUSES_KEPT",
                "state.rs/unread, state.rs/unread_ids, state.rs/statuses",
                "the oldest are counted together, or read from the log",
                "",
            ),
            Row(
                "commands of a conversation that a minute keeps, so that one that comes again is not done again",
                "DONE_MAX, done.rs/KEPT_FOR",
                "done.rs/commands",
                "`overloaded` with `retry_after_ms`",
                "",
            ),
            Row(
                "sends without an outcome, files without an end, linked threads of a conversation",
                "",
                "state.rs/pending, state.rs/fetching, state.rs/linked, entity.rs/fetching",
                "as many as the account admits; a file ends after 24 h",
                "",
            ),
            Row("receipts written for one read", "RECEIPTS_MAX", "", "the newest only", ""),
            Row(
                "an inbox's list, while the inbox is in memory: about 200 bytes a conversation",
                "",
                "inbox.rs/order, inbox.rs/briefs",
                "read from the store when it is asked for again",
                "",
            ),
        ],
    ),
    (
        "Accounts and providers",
        &[
            Row(
                "unsettled sends of an account",
                "outbound.queue_max, outbound.max_age",
                "account/state.rs/queue, account/state.rs/sends, account/state.rs/by_arrival, account/state.rs/lines, account/state.rs/due, entity.rs/full",
                "`overloaded`; past its age `failed` with `expired`",
                "",
            ),
            Row(
                "calls to a provider of an account, one per recipient; decisions of one append",
                "commands.rs/IN_FLIGHT_MAX, CHOSEN_MAX",
                "",
                "the line waits",
                "patchbay_outbound_call_seconds",
            ),
            Row(
                "signals (read, typing) under way, of all accounts",
                "SIGNALS_MAX",
                "",
                "dropped: the next one tells more",
                "",
            ),
            Row(
                "a call",
                "providers.timeout, ANSWER_BYTES_MAX, REDIRECTS_MAX",
                "",
                "`unknown`; a file is fetched again later",
                "patchbay_outbound_call_seconds",
            ),
            Row(
                "failures of a provider in a row",
                "pacing.rs/FAILURES_MAX, OPEN_MAX",
                "",
                "the circuit opens, at most for a minute at a time; then one call probes",
                "",
            ),
            Row(
                "receipts that match nothing yet, of an account",
                "commands.rs/KEPT_MAX, commands.rs/KEPT_FOR",
                "state.rs/kept, state.rs/kept_receipts",
                "dead letter",
                "",
            ),
            Row(
                "settled sends and idle lines that an account keeps at hand",
                "RECENT_IDS_MAX, IDLE_LINES_MAX",
                "state.rs/recent, state.rs/recent_by_id",
                "the oldest are forgotten",
                "",
            ),
            Row(
                "telling a conversation what came of its send",
                "TELL_PAUSE_MAX",
                "",
                "repeated until it answers",
                "",
            ),
        ],
    ),
    (
        "Files",
        &[
            Row(
                "a file",
                "media.size_max, media.image_max, media.audio_video_max",
                "",
                "413 `too_large`; a customer's: `media.failed`",
                "",
            ),
            Row(
                "a tenant's files",
                "media.quota",
                "",
                "413 `too_large`; a customer's: `media.failed`",
                "patchbay_media_stored_bytes_total",
            ),
            Row(
                "copies of a cluster's files on a node's disk; tries to write a part of one into the store",
                "shared_blobs.rs/KEPT_FOR, shared_blobs.rs/TRIES_MAX",
                "shared_blobs.rs/kept",
                "they are removed when nobody asks for them; the upload is refused with `unavailable` and may be repeated",
                "",
            ),
            Row(
                "uploads at once; those of one tenant; those of its visitors",
                "media/mod.rs/UPLOADS_MAX, TENANT_UPLOADS_MAX, VISITORS_UPLOADS_MAX",
                "",
                "`overloaded`",
                "",
            ),
            Row(
                "room taken for a file that is being stored",
                "STORING_MAX",
                "directory.rs/open",
                "what was cut off is settled by what is found of it",
                "",
            ),
            Row(
                "an upload: between two parts, and all of it",
                "media/mod.rs/PAUSE_MAX, UPLOAD_MAX",
                "",
                "422",
                "",
            ),
            Row(
                "files fetched from providers at once",
                "FETCHES_MAX, FILE_PAUSE_MAX",
                "",
                "they wait",
                "patchbay_media_fetches_total",
            ),
            Row(
                "tries of a file in a row, and for how long it is asked for",
                "FETCH_TRIES, FETCH_FOR",
                "",
                "again a minute later; `media.failed`",
                "patchbay_media_fetches_total",
            ),
            Row("an address of a file", "media.url_ttl", "", "404", ""),
            Row("a file's name", "media/mod.rs/NAME_MAX", "", "cut", ""),
            Row(
                "conversations that one file is known to be in; its ids at providers",
                "MEDIA_CONVERSATIONS_MAX",
                "directory.rs/conversations, directory.rs/uploads",
                "another is forgotten: its visitor sees the file no more; one for each account",
                "",
            ),
            Row(
                "putting a file at a provider",
                "UPLOAD_PATIENCE, UPLOAD_GOOD_FOR",
                "",
                "tried again; put again",
                "patchbay_outbound_call_seconds",
            ),
        ],
    ),
    (
        "Events",
        &[
            Row(
                "conversations with something unpublished that are told apart",
                "LANES_MAX",
                "lanes.rs/lanes, lanes.rs/ready, lanes.rs/suspects, lanes.rs/claims",
                "those of a shard are found in its activity rows again",
                "patchbay_outbox_lagging_conversations",
            ),
            Row(
                "entries kept at hand until they are sent",
                "RECENT_BYTES_MAX",
                "lanes.rs/recent",
                "they are read from their logs",
                "",
            ),
            Row("unsettled buckets of a shard that fell behind", "", "lanes.rs/debts", "one number each", ""),
            Row(
                "conversations whose outbox is parked",
                "PARKED_MAX",
                "lanes.rs/parked, outbox/mod.rs/rows",
                "nothing more is published before somebody has looked",
                "patchbay_outbox_parked_conversations",
            ),
            Row(
                "questions and reads at once, looks of shards at once, deliveries heard at once",
                "WORK_MAX, LOOKS_MAX, HEARD_MAX",
                "",
                "they wait",
                "",
            ),
            Row(
                "deliveries that are told and not heard",
                "DELIVERIES_MAX",
                "",
                "the sink waits",
                "patchbay_outbox_in_flight_events",
            ),
            Row(
                "messages in Kafka's client; a question to a broker",
                "QUEUE_MESSAGES_MAX, kafka/mod.rs/ASK_TIMEOUT, kafka/source.rs/ASK_TIMEOUT",
                "",
                "sent later; tried again",
                "",
            ),
            Row(
                "between two tries of a sink that takes nothing; a stopping node's wait for deliveries",
                "REOPEN_PAUSE_MAX, FLUSH_PATIENCE",
                "",
                "the next start publishes them",
                "patchbay_outbox_failures_total",
            ),
            Row(
                "conversations whose last seq a consumer remembers",
                "consumers/src/sequence.rs/CONVERSATIONS_MAX",
                "sequence.rs/seen, sequence.rs/order",
                "the first that was seen is forgotten, and begins anew",
                "",
            ),
            Row(
                "the embedded log: bytes that wait to be written, an event that a reader believes in, all files",
                "WAITING_BYTES_MAX, EVENT_BYTES_MAX, events.retention",
                "",
                "sent later; the file is damaged; the oldest go",
                "",
            ),
        ],
    ),
    (
        "Store and caches",
        &[
            Row("writes that wait for the writer", "QUEUE_MAX", "", "writers wait", ""),
            Row(
                "writes of one group",
                "GROUP_JOBS_MAX, GROUP_BYTES_MAX",
                "writer.rs/documents",
                "the next group",
                "patchbay_storage_commit_seconds",
            ),
            Row(
                "what a table holds in memory; journals that a start reads again",
                "MEMTABLE_BYTES_MAX, JOURNALS_BYTES_MAX",
                "",
                "they are written out",
                "",
            ),
            Row("reads at once", "READS_MAX", "", "readers wait", ""),
            Row(
                "free disk",
                "storage.min_free, HYSTERESIS_MAX",
                "",
                "writes are refused (`overloaded`), readiness is off, reads go on; until there is a little more",
                "patchbay_storage_free_bytes",
            ),
            Row(
                "writes and reads under way for each node of ScyllaDB or Cassandra",
                "storage.scylla.writes_max, storage.scylla.reads_max",
                "",
                "they wait; half as many after a sign of overload, more again with answers",
                "patchbay_storage_overloads_total",
            ),
            Row(
                "a request to ScyllaDB or Cassandra; a try of a conditional write; nodes asked beside the first",
                "REQUEST_TIMEOUT, CONDITIONAL_TIMEOUT, SPECULATIONS_MAX",
                "",
                "unknown: the same bytes again; another try",
                "patchbay_storage_errors_total",
            ),
            Row(
                "settling a conditional write of unknown outcome; between two tries",
                "SETTLE_FOR, SETTLE_PAUSE_MAX",
                "",
                "its caller is told that nobody knows (`unavailable`)",
                "patchbay_storage_unsettled_total",
            ),
            Row(
                "a connection to ScyllaDB or Cassandra that is silent, or does not come about; between two tries of a start",
                "KEEPALIVE_TIMEOUT, scylla/mod.rs/CONNECT_TIMEOUT, scylla/tls.rs/HANDSHAKE_TIMEOUT, CONNECT_PAUSE_MAX",
                "tls.rs/ports",
                "it is given up; made again",
                "",
            ),
            Row("prepared scans, one for each shape", "", "rows.rs/scans", "there are 18 shapes a table", ""),
            Row(
                "Redis: an answer, a connection, between two reconnections, commands that wait, a reply for others, words that wait",
                "COMMAND_TIMEOUT, redis.rs/CONNECT_TIMEOUT, RECONNECT_MS_MAX, REDIS_COMMANDS_MAX, REPLY_BYTES_MAX, CHANGES_MAX, revocation.rs/TOLD_MAX",
                "",
                "it is away: the node goes on by itself; a larger reply is its own node's; everything is looked at again",
                "patchbay_redis_away_total",
            ),
            Row(
                "hints of agents' presence: those here, those that are told",
                "HINTS_MAX",
                "presence.rs/here",
                "one for each agent with a socket here; what is not told is told by the next renewal",
                "",
            ),
            Row(
                "renewals of a lease whose outcome is not known; nodes of a cluster; a plan that the first of them does not propose",
                "UNSETTLED_MAX, PROPOSER_PATIENCE",
                "lease.rs/unsettled, map.rs/members, map.rs/pins, member.rs/pins, member.rs/watched, member.rs/dead",
                "the oldest is forgotten: it would be over; who is marked dead and holds nothing goes; the others propose it",
                "",
            ),
            Row(
                "what is to be done about shards, and what was done, not begun or heard yet",
                "ACTIONS_MAX, runtime.rs/TOLD_MAX, LOOK_MAX, keeper.rs/LEAVING_MAX",
                "host.rs/settled, store.rs/seen, keeper.rs/open",
                "a node that is further behind ends its incarnation and comes back as another",
                "",
            ),
            Row(
                "commands for a shard that is on its way; those of all shards",
                "WAITING_MAX, WAITING_ALL_MAX",
                "switch.rs/given_back, switch.rs/arrived, switch.rs/returned, switch.rs/waiting, switch.rs/shards",
                "`overloaded`; after 30 s `unavailable`",
                "patchbay_shards_waiting_commands",
            ),
            Row(
                "nodes that a node asks whether it is one of them, and how long each is waited for",
                "mesh/mod.rs/ASKED_MAX, tls.rs/ASK_TIMEOUT",
                "",
                "those that do not answer are not counted",
                "",
            ),
            Row(
                "a shard that is to go waits for what is under way; a node that ends for its shards to go, and for the map to say that nothing is left to do",
                "STOP_PATIENCE, DRAIN_PATIENCE, LEAVE_PATIENCE, PREPARE_PATIENCE, CALLS_PATIENCE",
                "",
                "the successor adopts it; what is left is taken over",
                "",
            ),
            Row(
                "requests of a lane to another node that wait to go out; that are not answered; envelopes and bytes that go out together; other words that wait",
                "LANE_QUEUE_MAX, UNANSWERED_MAX, ENVELOPES_MAX, MESSAGE_BYTES_MAX, WORDS_MAX",
                "link.rs/unanswered, mesh/mod.rs/peers",
                "commands wait for their shard; a caller with too much unanswered is not read any more",
                "patchbay_shards_waiting_commands",
            ),
            Row(
                "publications that wait for one lane of a node, and go out together; topics of which something did not fit",
                "OUTLET_BYTES_MAX, BATCH_BYTES_MAX",
                "outlet.rs/words, outlet.rs/marked",
                "the node is told how far the topic reaches, and its sockets read the rest from the log; what does not matter for long is dropped",
                "patchbay_mesh_marked_total",
            ),
            Row(
                "topics that other nodes' sockets wait for; their tips that are asked at once",
                "CHECKS_MAX",
                "interest.rs/topics",
                "one for each topic that is waited for, gone with the lane that asked for it; whoever asks waits",
                "",
            ),
            Row(
                "nodes that are asked who looks at a topic, and for how long; connections that one of them tells of",
                "GATHERS_MAX, GATHER_TIMEOUT, PRESENT_MAX",
                "interest.rs/waits",
                "whoever does not answer, or is not asked, is left out",
                "",
            ),
            Row(
                "topics that this node's sockets wait for; registrations of a lane that are not answered; a subscription that waits for its own",
                "mesh/mod.rs/WINDOW, READY_TIMEOUT",
                "watches.rs/topics, watches.rs/todo, watches.rs/later",
                "they wait their turn; a subscription answers `unavailable`",
                "patchbay_mesh_watched_topics",
            ),
            Row(
                "how busy other nodes said that they are",
                "COUNTERS_KEPT",
                "node.rs/counters",
                "one a node, forgotten when it is not said again",
                "",
            ),
            Row(
                "agents' sockets of this node, and those that closed and could not be told of",
                "UNTOLD_MAX",
                "sessions.rs/open, sessions.rs/unknown, sessions.rs/untold",
                "past it a session ends with this node's incarnation",
                "",
            ),
            Row(
                "a node that is reached, or says who it is; one that says nothing; between two tries to reach it",
                "link.rs/CONNECT_TIMEOUT, HELLO_TIMEOUT, serve.rs/HANDSHAKES_MAX, SILENCE_MAX, RECONNECT_PAUSE_MAX",
                "",
                "the lane is made again; what was not answered goes on under its own id",
                "",
            ),
            Row("the writer's epochs, one a shard", "cluster.shards", "writer.rs/epochs", "", ""),
            Row(
                "documents at hand: configuration, accounts, keys in use",
                "CACHE_MAX",
                "directory.rs/cache, directory.rs/accounts, directory.rs/keys_used, directory.rs/changes",
                "all are read again; emptied when memory is short",
                "",
            ),
            Row(
                "threads of customers' addresses at hand",
                "ALIASES_MAX",
                "intake.rs/aliases",
                "all are asked again; emptied when memory is short",
                "",
            ),
            Row(
                "accounts of conversations at hand; signals of typing",
                "PLACES_MAX",
                "desk.rs/places, desk.rs/typing",
                "all are asked again; emptied when memory is short",
                "",
            ),
            Row(
                "events looked at for one page of an account's",
                "EVENT_RECORDS_MAX",
                "",
                "a shorter page",
                "",
            ),
        ],
    ),
];

/// Constants that look like bounds and are none: instants, codes, sizes of reads.
const NO_BOUNDS: [&str; 3] = ["EPOCH_MAX", "MILLIS_MAX", "SKEW_MAX"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every source of what runs in production, by its path in the repository.
fn sources() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut open: Vec<PathBuf> =
        ["protocol", "connectors", "storage", "actors", "consumers", "gateway", "admin-api"]
            .iter()
            .map(|c| root().join(c).join("src"))
            .collect();
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                let text = std::fs::read_to_string(&path).unwrap();
                let text = text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned();
                found.insert(name, text);
            }
        }
    }
    // Tests of their own, the model of the store, and what runs on a person's machine.
    found.retain(|name, _| {
        !["account/tests.rs", "hub/schedules.rs", "storage/src/model.rs", "src/cli/"]
            .iter()
            .any(|t| name.contains(t))
    });
    found
}

/// Constants of a source, with their values as they are written.
fn constants(text: &str) -> Vec<(&str, String)> {
    let lines = text.lines().map(str::trim_start);
    lines
        .filter_map(|line| {
            let rest = line
                .split_once("const ")
                .filter(|(before, _)| before.is_empty() || before.starts_with("pub"))?
                .1;
            let (name, rest) = rest.split_once(':')?;
            let value = rest.split_once('=')?.1.trim().trim_end_matches(';');
            name.chars().all(|c| c.is_ascii_uppercase() || c == '_').then(|| (name, value.to_owned()))
        })
        .collect()
}

fn is_bound(name: &str) -> bool {
    const ENDS: [&str; 8] = ["_MAX", "_AT_ONCE", "TIMEOUT", "PATIENCE", "_FOR", "_KEPT", "_TRIES", "_ROUNDS"];
    ENDS.iter().any(|e| name.ends_with(e)) && !NO_BOUNDS.contains(&name)
}

/// `5_000` as 5,000; sizes and times as people write them.
fn shown(name: &str, value: &str) -> String {
    if let Some(seconds) = value
        .strip_prefix("Duration::from_secs(")
        .or_else(|| value.strip_prefix("std::time::Duration::from_secs("))
    {
        let seconds = product(seconds.trim_end_matches(')')).unwrap();
        return match seconds {
            s if s >= 172_800 && s % 86_400 == 0 => format!("{} d", s / 86_400),
            s if s >= 3600 && s % 3600 == 0 => format!("{} h", s / 3600),
            s => format!("{s} s"),
        };
    }
    if let Some(ms) = value.strip_prefix("Duration::from_millis(") {
        return format!("{} ms", ms.trim_end_matches(')'));
    }
    match product(value) {
        Some(n) if name.ends_with("_MS") => format!("{} s", n / 1000),
        Some(n) if name.ends_with("_S") => format!("{} d", n / 86_400),
        Some(n) if n >= 1 << 20 && n % (1 << 20) == 0 => format!("{} MiB", n >> 20),
        Some(n) if name.contains("BYTES") && n % 1024 == 0 => format!("{} KiB", n >> 10),
        Some(n) => thousands(n),
        None => format!("`{value}`"),
    }
}

fn product(text: &str) -> Option<u64> {
    if let Some((n, by)) = text.split_once("<<") {
        return Some(product(n.trim())? << product(by.trim())?);
    }
    text.split('*').map(|f| f.trim().replace('_', "").parse::<u64>().ok()).product()
}

fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(", ").filter(|t| !t.is_empty())
}

/// The sources in which a name of a row is: those whose path ends as it says, and that have it.
fn found<'a>(sources: &'a BTreeMap<String, String>, spec: &str) -> Vec<(&'a str, String, String)> {
    let (file, name) = spec.rsplit_once('/').unwrap_or(("", spec));
    let mut all = Vec::new();
    for (path, text) in sources.iter().filter(|(path, _)| path.ends_with(file)) {
        for (constant, value) in constants(text) {
            if constant == name {
                all.push((path.as_str(), name.to_owned(), value));
            }
        }
    }
    all
}

/// Fields that hold many of something.
fn fields(text: &str) -> Vec<&str> {
    const KINDS: [&str; 5] = ["HashMap<", "VecDeque<", "BTreeMap<", "BTreeSet<", "HashSet<"];
    let mut found = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        let declares = line.contains("struct ") && line.ends_with('{');
        inside = if line == "}" { false } else { inside || declares };
        let Some((name, kind)) =
            line.trim_start().trim_start_matches("pub(super) ").trim_start_matches("pub ").split_once(": ")
        else {
            continue;
        };
        if inside
            && line.starts_with("    ")
            && !line.trim_start().starts_with("//")
            && KINDS.iter().any(|k| kind.contains(k))
        {
            found.push(name);
        }
    }
    found
}

#[test]
fn the_page_is_what_the_code_says() {
    let sources = sources();
    let documentation = Config::documentation();
    let keys: BTreeMap<&str, &str> = documentation
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
        .filter_map(|(key, rest)| Some((key, rest.split_once(" | ")?.0)))
        .collect();
    let mut page = String::from(
        "# Bounds\n\nGenerated from the sources by `gateway/tests/bounds.rs`, which fails when a bound, queue or cache of the code is missing here.\n",
    );
    for (title, rows) in SECTIONS {
        page += &format!("\n## {title}\n\n| what | bound | past it | metric |\n|---|---|---|---|\n");
        for Row(what, by, _, past, metric) in *rows {
            let bounds = list(by).map(|spec| {
                if let Some(default) = keys.get(spec) {
                    return format!("`{spec}`: {default}");
                }
                let found = found(&sources, spec);
                let [(_, name, value)] = found.as_slice() else { panic!("{spec} is in {found:?}") };
                format!("{} <small>{name}</small>", shown(name, value))
            });
            assert!(metric.is_empty() || METRICS.iter().any(|m| m.0 == *metric), "{metric} is no metric");
            let metric = if metric.is_empty() { String::new() } else { format!("`{metric}`") };
            page += &format!("| {what} | {} | {past} | {metric} |\n", bounds.collect::<Vec<_>>().join("; "));
        }
    }
    let file = root().join("docs/src/generated/bounds.md");
    if std::env::var_os("PATCHBAY_WRITE_DOCS").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    assert!(std::fs::read_to_string(file).unwrap_or_default() == page, "bounds.md is stale: run ./x docs");
}

#[test]
fn nothing_that_the_code_bounds_queues_or_keeps_is_missing() {
    let sources = sources();
    let rows = || SECTIONS.iter().flat_map(|(_, rows)| rows.iter());
    let listed: BTreeSet<(String, String)> = rows()
        .flat_map(|row| list(row.1))
        .flat_map(|spec| found(&sources, spec))
        .map(|(path, name, _)| (path.to_owned(), name))
        .collect();
    let mut missing = Vec::new();
    for (path, text) in &sources {
        for (name, _) in constants(text).into_iter().filter(|(name, _)| is_bound(name)) {
            if !listed.contains(&(path.clone(), name.to_owned())) {
                missing.push(format!("{path}: {name}"));
            }
        }
        for name in fields(text) {
            let is_listed = rows().flat_map(|row| list(row.2)).any(|spec| {
                let (file, field) = spec.rsplit_once('/').unwrap();
                path.ends_with(file) && field == name
            });
            if !is_listed {
                missing.push(format!("{path}: the field {name}"));
            }
        }
        // What lets so many in, or queues so many, says how many by a name that is in the table.
        for line in text.lines().filter(|l| l.contains("Semaphore::new(") || l.contains("mpsc::channel(")) {
            let size = line.split_once("Semaphore::new(").or_else(|| line.split_once("channel(")).unwrap().1;
            let size: String = size
                .chars()
                .take_while(|c| c.is_ascii_uppercase() || *c == '_' || c.is_ascii_digit())
                .collect();
            // A bound of a configuration is given out by its number.
            if size != "1" && size != "0" && !listed.iter().any(|(_, name)| *name == size) {
                missing.push(format!("{path}: {}", line.trim()));
            }
        }
        assert!(!text.contains("unbounded_channel("), "{path} has a queue without a bound");
    }
    assert!(missing.is_empty(), "not in the table:\n{}", missing.join("\n"));
}

#[test]
fn a_row_names_what_is_there() {
    let sources = sources();
    for row in SECTIONS.iter().flat_map(|(_, rows)| rows.iter()) {
        for spec in list(row.2) {
            let (file, field) = spec.rsplit_once('/').unwrap();
            let there = sources.iter().any(|(path, text)| {
                Path::new(path).ends_with(file) || path.ends_with(file) && fields(text).contains(&field)
            });
            assert!(there, "{spec} is nowhere");
        }
    }
}

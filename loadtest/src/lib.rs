//! Load tools and the provider simulator, so that the whole loop runs on one machine with no account anywhere.
//!
//! **Lives here:** [`simulator`], a server that behaves like WhatsApp's Cloud API (limits, errors, delays, lost
//! answers, duplicate, reordered and missing receipts, signed and batched webhooks) and keeps its own record of what
//! it received, for tests to compare; [`load`], agents and customers against a node, open loop, that count what was
//! lost, doubled, out of order or late (the binary `patchbay-load`).
//!
//! **Does not live here:** anything that the product uses to speak to a provider. The simulator was written from the
//! wire facts alone and shares no type with `connectors/`.

pub mod load;
pub mod simulator;

//! The doors, and the binary `patchbay`: the composition root, the only place that knows everything.
//!
//! **Lives here:** the edges (`edge/client`, `edge/websocket`, `edge/emulation`, `edge/webhook`), the [`hub`] that fans out to local sockets, [`auth`],
//! [`limits`], files ([`media`]), the guarded HTTP client ([`outgoing`]), [`config`], the [`server`] that composes a node, and the
//! command line ([`cli`]).
//!
//! **Does not live here:** what a command does (`actors/`), how anything is stored (`storage/`), what a provider's
//! bytes mean (`connectors/`).
//!
//! Invariant: an edge never touches an actor: it sends commands and reads what the hub delivers.
//! Invariant: a publication is encoded once per wire format, however many sockets it goes to.
//! Invariant: every queue of a socket is bounded in bytes; what happens past the bound is written where the bound is.

pub mod auth;
pub mod backup;
pub mod cli;
pub mod config;
pub mod edge;
pub mod engines;
pub mod health;
pub mod hub;
pub mod limits;
pub mod listener;
pub mod media;
pub mod memory;
pub mod metrics_table;
pub mod outgoing;
pub mod presence;
pub mod proxies;
mod revocation;
pub mod server;
pub mod tls;

//! The doors: clients, by WebSocket, by QUIC or by neither, and webhooks. An edge never touches an actor: it sends commands and reads
//! what the hub delivers.

pub mod client;
pub mod emulation;
pub mod quic;
pub mod unread;
pub mod webhook;
pub mod websocket;

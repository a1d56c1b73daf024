//! The doors: sockets and webhooks. An edge never touches an actor: it sends commands and reads what the hub delivers.

pub mod unread;
pub mod webhook;
pub mod websocket;

//! The end-to-end suite on the real engines: Cassandra, Kafka and Redis instead of the embedded ones. The harness goes
//! by the name of this file.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "end_to_end.rs"]
mod end_to_end;

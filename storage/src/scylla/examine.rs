//! What `patchbay doctor` asks of the store.

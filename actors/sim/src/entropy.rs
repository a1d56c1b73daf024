//! Whatever the process takes for chance, from the seed: keys of hash maps, ids of commands, pauses between tries.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::random::Random;

static STATE: AtomicU64 = AtomicU64::new(0);

/// Everything that is drawn from here on follows from `seed`.
pub(crate) fn seed(seed: u64) {
    STATE.store(seed, Ordering::Relaxed);
    // Nobody else here names it.
    std::hint::black_box(getrandom as unsafe extern "C" fn(*mut u8, usize, u32) -> isize);
}

/// Stands in for the system's own, which the standard library and every generator of random numbers call.
///
/// # Safety
/// As the system's: `into` has room for `len` bytes.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(into: *mut u8, len: usize, _: u32) -> isize {
    let mut random = Random::new(STATE.fetch_add(1, Ordering::Relaxed));
    // SAFETY: the caller's promise.
    let into = unsafe { std::slice::from_raw_parts_mut(into, len) };
    for bytes in into.chunks_mut(8) {
        bytes.copy_from_slice(&random.next().to_le_bytes()[..bytes.len()]);
    }
    len.cast_signed()
}

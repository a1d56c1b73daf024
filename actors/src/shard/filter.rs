//! A filter over every id that an entity has seen, so that a new id needs no read: layers of Bloom filters, each
//! twice the one before. About 1 in 1,000 new ids is looked up in vain.

use bytes::{Buf, BufMut, BytesMut};
use patchbay_storage::tables::IdKey;

const FIRST_CAPACITY: usize = 32;
const BITS_PER_ID: usize = 16;
const PROBES: u32 = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Layer {
    bits: Box<[u64]>,
    held: u32,
}

impl Layer {
    fn new(capacity: usize) -> Self {
        Self { bits: vec![0; capacity * BITS_PER_ID / 64].into(), held: 0 }
    }

    fn capacity(&self) -> usize {
        self.bits.len() * 64 / BITS_PER_ID
    }

    fn positions(&self, id: IdKey) -> impl Iterator<Item = (usize, u64)> + use<> {
        // The id is a hash already: two halves give all probes.
        let (a, b) = id.0.split_at(8);
        let half = |h: &[u8]| h.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        // Sizes are powers of two.
        let (first, step, mask) = (half(a), half(b) | 1, self.bits.len() as u64 * 64 - 1);
        (0..PROBES).map(move |n| {
            let bit = first.wrapping_add(step.wrapping_mul(u64::from(n))) & mask;
            (usize::try_from(bit / 64).unwrap_or(0), 1 << (bit % 64))
        })
    }

    fn insert(&mut self, id: IdKey) {
        for (word, bit) in self.positions(id) {
            self.bits[word] |= bit;
        }
        self.held += 1;
    }

    fn may_hold(&self, id: IdKey) -> bool {
        self.positions(id).all(|(word, bit)| self.bits[word] & bit != 0)
    }
}

/// The filter.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Filter {
    layers: Vec<Layer>,
}

impl Filter {
    /// Remembers `id`.
    pub fn insert(&mut self, id: IdKey) {
        match self.layers.last_mut() {
            Some(layer) if (layer.held as usize) < layer.capacity() => layer.insert(id),
            last => {
                let mut layer = Layer::new(last.map_or(FIRST_CAPACITY, |l| l.capacity() * 2));
                layer.insert(id);
                self.layers.push(layer);
            }
        }
    }

    /// False: it was never inserted.
    pub fn may_hold(&self, id: IdKey) -> bool {
        self.layers.iter().any(|l| l.may_hold(id))
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| l.bits.len() * 8).sum()
    }

    /// Writes it.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u8(u8::try_from(self.layers.len()).unwrap_or(u8::MAX));
        for layer in &self.layers {
            out.put_u32(layer.held);
            out.put_u32(u32::try_from(layer.bits.len()).unwrap_or(u32::MAX));
            layer.bits.iter().for_each(|w| out.put_u64(*w));
        }
    }

    /// Reads it.
    pub fn decode(from: &mut impl Buf) -> Option<Self> {
        let mut layers = Vec::new();
        for _ in 0..from.try_get_u8().ok()? {
            let held = from.try_get_u32().ok()?;
            let words = from.try_get_u32().ok()? as usize;
            if !words.is_power_of_two() || from.remaining() < words.checked_mul(8)? {
                return None;
            }
            layers.push(Layer { bits: (0..words).map(|_| from.get_u64()).collect(), held });
        }
        Some(Self { layers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_all_it_was_given_and_little_else() {
        let mut filter = Filter::default();
        let id = |n: u32| IdKey::of(["t", &n.to_string()]);
        assert!(!filter.may_hold(id(0)));
        (0..10_000).for_each(|n| filter.insert(id(n)));
        assert!((0..10_000).all(|n| filter.may_hold(id(n))));
        let false_hits = (10_000..20_000).filter(|n| filter.may_hold(id(*n))).count();
        assert!(false_hits < 100, "{false_hits}");
        let mut out = BytesMut::new();
        filter.encode(&mut out);
        assert_eq!(Filter::decode(&mut out.freeze()), Some(filter));
    }
}

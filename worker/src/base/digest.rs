//! What tells one base from another, however its files are cut and whatever dtype they have: a SHA-256
//! over names and fp32 values, unit by unit, so that ranks can share the work.

use sha2::{Digest, Sha256};

/// Bytes hashed at a time.
const CHUNK_VALUES: usize = 1 << 16;

/// Digest of one unit's parameters, in the order of the model.
#[derive(Default)]
pub struct UnitDigest {
    hash: Sha256,
    bytes: Vec<u8>,
}

impl UnitDigest {
    /// Begins a parameter, by its full name.
    pub fn begin(&mut self, hf_name: &str) {
        self.hash.update((hf_name.len() as u64).to_le_bytes());
        self.hash.update(hf_name.as_bytes());
    }

    /// Adds the next values of the parameter.
    pub fn update(&mut self, values: &[f32]) {
        for piece in values.chunks(CHUNK_VALUES) {
            self.bytes.clear();
            self.bytes.extend(piece.iter().flat_map(|value| value.to_le_bytes()));
            self.hash.update(&self.bytes);
        }
    }

    /// The unit's digest.
    pub fn finish(self) -> [u8; 32] {
        self.hash.finalize().into()
    }
}

/// The base's digest in hex, of those of its units in order.
pub fn of_units(units: &[[u8; 32]]) -> String {
    let mut hash = Sha256::new();
    units.iter().for_each(|unit| hash.update(unit));
    tunefleet_proto::hex(&hash.finalize())
}

//! What tells one base model from another, the same in whatever dtype or files it is stored: a SHA-256
//! over those of its units (the embeddings, then each block), so that ranks can share the work.

use sha2::{Digest, Sha256};

/// Under which an adapter's weights file names the base that it was trained on.
pub const BASE_DIGEST_KEY: &str = "tunefleet.base_sha256";

/// Under which it names how the base was held in training, see `Quantization::name`.
pub const BASE_QUANTIZATION_KEY: &str = "tunefleet.base_quantization";
/// Under which it names the dtype that the base was dequantised to, `fp32` or `bf16`.
pub const BASE_DTYPE_KEY: &str = "tunefleet.base_dtype";

/// Values hashed at a time.
const CHUNK_VALUES: usize = 1 << 16;

/// Digest of one unit: of each parameter, in model order, the length of its Hugging Face name (8 bytes,
/// little-endian), the name, and its values as little-endian fp32.
#[derive(Debug, Clone, Default)]
pub struct UnitDigest {
    hash: Sha256,
    bytes: Vec<u8>,
}

impl UnitDigest {
    /// Begins the next parameter.
    pub fn parameter(&mut self, hf_name: &str) {
        self.hash.update((hf_name.len() as u64).to_le_bytes());
        self.hash.update(hf_name.as_bytes());
    }

    /// The next values of the current parameter; how they are cut does not matter.
    pub fn values(&mut self, values: &[f32]) {
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

/// The base's digest in lower-case hex, of those of its units in order.
pub fn of_units(units: &[[u8; 32]]) -> String {
    let mut hash = Sha256::new();
    units.iter().for_each(|unit| hash.update(unit));
    tunefleet_proto::hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_of_names_and_values_however_they_are_cut() {
        let digest = |pieces: &[&[f32]]| {
            let mut unit = UnitDigest::default();
            unit.parameter("a.weight");
            pieces.iter().for_each(|piece| unit.values(piece));
            of_units(&[unit.finish()])
        };
        let mut bytes = 8u64.to_le_bytes().to_vec();
        bytes.extend(b"a.weight");
        bytes.extend([1.0f32, -2.5, 3.0].iter().flat_map(|v| v.to_le_bytes()));
        let expected = tunefleet_proto::hex(&Sha256::digest(Sha256::digest(&bytes)));
        assert_eq!(digest(&[&[1.0, -2.5, 3.0]]), expected);
        assert_eq!(digest(&[&[1.0], &[], &[-2.5, 3.0]]), expected);
        assert_ne!(digest(&[&[1.0, -2.5]]), expected);
    }
}

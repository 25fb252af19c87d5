//! What a base model is: one digest of its values, the same in whatever dtype or files they are stored.

use sha2::{Digest, Sha256};

/// Under which an adapter's weights file names the base that it was trained on.
pub const BASE_DIGEST_KEY: &str = "tunefleet.base_sha256";

/// SHA-256 over every parameter in model order (outside the blocks, then block by block): the bytes of its
/// Hugging Face name, then its values as little-endian fp32.
#[derive(Debug, Clone, Default)]
pub struct BaseDigest {
    hash: Sha256,
    bytes: Vec<u8>,
}

impl BaseDigest {
    /// Begins the next parameter.
    pub fn parameter(&mut self, hf_name: &str) {
        self.hash.update(hf_name.as_bytes());
    }

    /// The next values of the current parameter; how they are cut does not matter.
    pub fn values(&mut self, values: &[f32]) {
        for piece in values.chunks(1 << 18) {
            self.bytes.clear();
            self.bytes.extend(piece.iter().flat_map(|value| value.to_le_bytes()));
            self.hash.update(&self.bytes);
        }
    }

    /// The digest in lower-case hex.
    pub fn finish(self) -> String {
        tunefleet_proto::hex(&self.hash.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_of_names_and_values_however_they_are_cut() {
        let digest = |pieces: &[&[f32]]| {
            let mut digest = BaseDigest::default();
            digest.parameter("a.weight");
            pieces.iter().for_each(|piece| digest.values(piece));
            digest.finish()
        };
        let mut bytes = b"a.weight".to_vec();
        bytes.extend([1.0f32, -2.5, 3.0].iter().flat_map(|v| v.to_le_bytes()));
        let expected = tunefleet_proto::digest_hex(&bytes);
        assert_eq!(digest(&[&[1.0, -2.5, 3.0]]), expected);
        assert_eq!(digest(&[&[1.0], &[], &[-2.5, 3.0]]), expected);
        assert_ne!(digest(&[&[1.0, -2.5]]), expected);
    }
}

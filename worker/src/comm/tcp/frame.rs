//! What precedes every payload: 32 bytes that say which operation both sides believe to be in.

use std::fmt;

use tch::Kind;

/// Encoded size of a [`Header`].
pub const HEADER_BYTES: usize = 32;
/// Longest reason in a farewell.
pub const MAX_REASON_BYTES: usize = 512;

/// What a frame is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// A rank's slice of an all-gather.
    AllGather,
    /// A rank's contribution to another's reduced slice.
    ReduceScatter,
    /// A rank's whole tensor.
    AllReduce,
    /// Nothing but the header.
    Barrier,
    /// The last frame of a link; the payload is the reason, empty when all went well.
    Farewell,
}

/// The head of a frame. Little-endian: `seq u64, op u8, kind u8, zero u16, unit u32, culprit u32,
/// zero u32, bytes u64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Operations started before this one.
    pub seq: u64,
    /// What it is part of.
    pub op: Op,
    /// Dtype of the payload; `None` where there are no elements.
    pub kind: Option<Kind>,
    /// Unit of the shard plan.
    pub unit: Option<u32>,
    /// In a farewell: the rank whose loss is the reason for leaving.
    pub culprit: Option<u32>,
    /// Payload bytes that follow.
    pub bytes: u64,
}

/// A header that no rank of this build sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a frame header: {field} is {value}")]
pub struct BadHeader {
    field: &'static str,
    value: u64,
}

/// Stands for `None` in a `u32` field.
const NONE: u32 = u32::MAX;

const KINDS: [(u8, Kind); 5] =
    [(1, Kind::Float), (2, Kind::BFloat16), (3, Kind::Double), (4, Kind::Int64), (5, Kind::Uint8)];
const OPS: [(u8, Op); 5] =
    [(1, Op::AllGather), (2, Op::ReduceScatter), (3, Op::AllReduce), (4, Op::Barrier), (5, Op::Farewell)];

/// Whether tensors of `kind` can be sent.
pub fn has_code(kind: Kind) -> bool {
    KINDS.iter().any(|&(_, k)| k == kind)
}

impl Header {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let op = OPS.iter().find(|&&(_, op)| op == self.op).map_or(0, |&(code, _)| code);
        let kind =
            self.kind.and_then(|kind| KINDS.iter().find(|&&(_, k)| k == kind)).map_or(0, |&(code, _)| code);
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(&self.seq.to_le_bytes());
        out[8] = op;
        out[9] = kind;
        out[12..16].copy_from_slice(&self.unit.unwrap_or(NONE).to_le_bytes());
        out[16..20].copy_from_slice(&self.culprit.unwrap_or(NONE).to_le_bytes());
        out[24..].copy_from_slice(&self.bytes.to_le_bytes());
        out
    }

    /// The header in `raw`.
    ///
    /// # Errors
    /// Names the field that no build sends.
    pub fn decode(raw: &[u8; HEADER_BYTES]) -> Result<Self, BadHeader> {
        let bad = |field, value| Err(BadHeader { field, value });
        let Some(&(_, op)) = OPS.iter().find(|&&(code, _)| code == raw[8]) else {
            return bad("operation", raw[8].into());
        };
        let kind = match raw[9] {
            0 => None,
            code => match KINDS.iter().find(|&&(c, _)| c == code) {
                Some(&(_, kind)) => Some(kind),
                None => return bad("dtype", code.into()),
            },
        };
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let padding = u64::from(u32_at(20)) | u64::from(raw[10]) | u64::from(raw[11]);
        if padding != 0 {
            return bad("padding", padding);
        }
        let optional = |value: u32| (value != NONE).then_some(value);
        let (unit, culprit) = (optional(u32_at(12)), optional(u32_at(16)));
        let header = Header { seq: u64_at(0), op, kind, unit, culprit, bytes: u64_at(24) };
        if op == Op::Farewell && header.bytes > MAX_REASON_BYTES as u64 {
            return bad("length of a farewell", header.bytes);
        }
        Ok(header)
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let op = match self.op {
            Op::AllGather => "all-gather",
            Op::ReduceScatter => "reduce-scatter",
            Op::AllReduce => "all-reduce",
            Op::Barrier => "barrier",
            Op::Farewell => "farewell",
        };
        write!(f, "operation {} ({op}", self.seq)?;
        if let Some(unit) = self.unit {
            write!(f, " of unit {unit}")?;
        }
        if let Some(kind) = self.kind {
            write!(f, ", {kind:?}")?;
        }
        write!(f, ", {} bytes)", self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_decode_to_a_header_that_encodes_to_them_or_to_an_error(raw: [u8; HEADER_BYTES]) {
            if let Ok(header) = Header::decode(&raw) {
                prop_assert_eq!(header.encode(), raw);
            }
        }

        #[test]
        fn a_header_survives_the_wire(
            seq: u64, op in 0..4usize, kind in 0..5usize, unit in proptest::option::of(0..NONE), bytes: u64,
        ) {
            let kind = KINDS.get(kind).map(|&(_, kind)| kind);
            let header = Header { seq, op: OPS[op].1, kind, unit, culprit: None, bytes };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn a_farewell_longer_than_the_limit_is_refused() {
        let bytes = MAX_REASON_BYTES as u64 + 1;
        let header = Header { seq: 0, op: Op::Farewell, kind: None, unit: None, culprit: Some(1), bytes };
        let message = Header::decode(&header.encode()).unwrap_err().to_string();
        assert_eq!(message, "not a frame header: length of a farewell is 513");
    }
}

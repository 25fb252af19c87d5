//! Weights in files: little-endian fp32, bf16 or fp16, read by slices into fp32.

use std::io;
use std::ops::Range;

use half::{bf16, f16};

/// Bytes read and converted at a time.
const CHUNK_BYTES: u64 = 8 << 20;

/// Dtypes that weights are loaded from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FloatDtype {
    F32,
    Bf16,
    F16,
}

impl FloatDtype {
    /// Bytes of one element.
    pub(super) fn bytes(self) -> u64 {
        match self {
            FloatDtype::F32 => 4,
            FloatDtype::Bf16 | FloatDtype::F16 => 2,
        }
    }
}

/// Elements `range` of the array that begins at byte `begin`, as fp32, in pieces: `take(first, values)`.
/// `read_exact_at` fills a buffer from a byte offset of the file, and is asked for no other byte.
///
/// # Errors
/// Those of `read_exact_at`.
pub(super) fn read(
    read_exact_at: impl Fn(&mut [u8], u64) -> io::Result<()>,
    begin: u64,
    dtype: FloatDtype,
    range: Range<u64>,
    mut take: impl FnMut(u64, &[f32]),
) -> io::Result<()> {
    let width = dtype.bytes();
    let chunk_elements = (CHUNK_BYTES / width).min(range.end.saturating_sub(range.start));
    let mut bytes = vec![0; (chunk_elements * width) as usize];
    let mut values = Vec::with_capacity(chunk_elements as usize);
    let mut first = range.start;
    while first < range.end {
        let count = chunk_elements.min(range.end - first);
        let bytes = &mut bytes[..(count * width) as usize];
        read_exact_at(bytes, begin + first * width)?;
        values.clear();
        match dtype {
            FloatDtype::F32 => {
                values.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
            }
            FloatDtype::Bf16 => {
                values.extend(bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()));
            }
            FloatDtype::F16 => {
                values.extend(bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()));
            }
        }
        take(first, &values);
        first += count;
    }
    Ok(())
}

//! Bytes to text: UTF-8, and where a job asks for it, what else people have written source files in.

use chardetng::{EncodingDetector, Iso2022JpDetection, Utf8Detection};
use encoding_rs::{Encoding, UTF_8};
use tunefleet_proto::job::EncodingMode;

use super::filter::DropReason;

/// A NUL in this many first bytes makes a file binary, as in git.
const SNIFF_BYTES: usize = 8 * 1024;

/// The text of a file, without a byte order mark.
///
/// # Errors
/// [`DropReason::Binary`] and [`DropReason::InvalidUtf8`].
pub fn text(blob: &[u8], mode: EncodingMode) -> Result<String, DropReason> {
    // UTF-16 says so, and is full of NULs.
    if let Some((encoding, mark_bytes)) = Encoding::for_bom(blob)
        && encoding != UTF_8
        && mode == EncodingMode::Convert
    {
        let rest = blob.get(mark_bytes..).unwrap_or_default();
        let (text, has_errors) = encoding.decode_without_bom_handling(rest);
        return if has_errors { Err(DropReason::Binary) } else { printable(text.into_owned()) };
    }
    if blob.iter().take(SNIFF_BYTES).any(|&byte| byte == 0) {
        return Err(DropReason::Binary);
    }
    match std::str::from_utf8(blob) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').unwrap_or(text).to_owned()),
        Err(_) if mode == EncodingMode::Drop => Err(DropReason::InvalidUtf8),
        Err(_) => {
            let mut detector = EncodingDetector::new(Iso2022JpDetection::Deny);
            detector.feed(blob, true);
            let encoding = detector.guess(None, Utf8Detection::Deny);
            let (text, has_errors) = encoding.decode_without_bom_handling(blob);
            if has_errors { Err(DropReason::InvalidUtf8) } else { printable(text.into_owned()) }
        }
    }
}

/// Bytes that are no text become control characters in most encodings.
fn printable(text: String) -> Result<String, DropReason> {
    let is_stray = |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\u{c}');
    if text.contains(is_stray) { Err(DropReason::Binary) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use encoding_rs::{GBK, SHIFT_JIS, WINDOWS_1252};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_people_write_in_is_converted_where_that_is_asked_for() {
        let latin = "# D\u{e9}j\u{e0} vu \u{fc}ber \u{e9}t\u{e9}, \u{e0} la carte\nname = 'caf\u{e9}'\n";
        let japanese = "# \u{3053}\u{308c}\u{306f}\u{30c6}\u{30b9}\u{30c8}\u{3067}\u{3059}\nx = 1\n";
        let chinese = "# \u{8fd9}\u{662f}\u{4e00}\u{4e2a}\u{6d4b}\u{8bd5}\u{6587}\u{4ef6}\nx = 1\n";
        for (encoding, original) in [(WINDOWS_1252, latin), (SHIFT_JIS, japanese), (GBK, chinese)] {
            let (bytes, _, _) = encoding.encode(original);
            assert_eq!(text(&bytes, EncodingMode::Convert).as_deref(), Ok(original), "{}", encoding.name());
            assert_eq!(text(&bytes, EncodingMode::Drop), Err(DropReason::InvalidUtf8));
        }
        let wide: Vec<u8> = "\u{feff}x = 'caf\u{e9}'\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(text(&wide, EncodingMode::Convert).as_deref(), Ok("x = 'caf\u{e9}'\n"));
        assert_eq!(text(&wide, EncodingMode::Drop), Err(DropReason::Binary));
        for mode in [EncodingMode::Drop, EncodingMode::Convert] {
            assert_eq!(text(b"\xef\xbb\xbfbom\n", mode).as_deref(), Ok("bom\n"));
            assert_eq!(text(b"a\0b", mode), Err(DropReason::Binary));
            assert!(text(&[0x80, 0x01, 0x02, 0xff, 0xfe, 0x03], mode).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(blob in proptest::collection::vec(any::<u8>(), 0..300)) {
            for mode in [EncodingMode::Drop, EncodingMode::Convert] {
                if let Ok(text) = text(&blob, mode) {
                    prop_assert!(!text.contains('\0') || mode == EncodingMode::Drop);
                }
            }
        }
    }
}

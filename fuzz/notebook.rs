//! Any bytes as a notebook: whatever comes out is text, and of bounded size.
#![no_main]

#[allow(dead_code)]
#[path = "../coordinator/src/repos/notebook.rs"]
mod notebook;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let code = notebook::code(text);
    let structured = notebook::structured(text);
    assert!(code.is_some() || structured.is_none(), "what is read whole can be read in part");
    // Of a cell there is no more than was written, and a mark or two for each.
    for made in [code, structured].into_iter().flatten() {
        assert!(made.len() <= 64 * text.len().max(1), "{} bytes of {}", made.len(), text.len());
    }
});

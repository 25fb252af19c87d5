//! Dataset segments -> documents -> tokens -> sequences.
//!
//! Sequences are a pure function of (dataset, tokenizer, settings, index): a resume seeks.

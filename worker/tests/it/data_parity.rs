//! Packing against plain Python references, token for token.

use crate::data_support::{Workshop, python, spec};
use tunefleet_proto::job::{FimLevel, Packing};
use tunefleet_worker::data::{Sequences, Split};

fn path(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

fn served(sequences: &Sequences, count: usize) -> Vec<Vec<u32>> {
    (0..count as u64).map(|index| sequences.sequence(index).unwrap().tokens).collect()
}

/// Compares with the reference of the default mode over several epochs.
fn continuous_agrees(split: Split, level: FimLevel, fim_rate: f64) {
    let workshop = Workshop::standard();
    let mut spec = spec(Packing::Continuous, level);
    spec.fim_rate = fim_rate;
    let (dataset, tokenizer) = (workshop.dataset(), workshop.tokenizer().join("tokenizer.json"));
    let level = if level == FimLevel::Document { "document" } else { "window" };
    let reference = python(
        "continuous_reference.py",
        &[
            "--dataset",
            path(&dataset),
            "--tokenizer",
            path(&tokenizer),
            "--split",
            split.name(),
            "--fim-level",
            level,
            "--sequence-tokens",
            "48",
            "--fim-rate",
            &fim_rate.to_string(),
            "--fim-spm-rate",
            "0.5",
            "--seed",
            "7",
            "--epochs",
            "4",
        ],
    );
    let Some(reference) = reference else { return };
    let reference: Vec<Vec<u32>> = serde_json::from_str(&reference).unwrap();
    let sequences = Sequences::open(&spec, &dataset, &tokenizer, split, &workshop.cache()).unwrap();
    assert!(reference.len() > 10);
    assert_eq!(served(&sequences, reference.len()), reference);
    if split == Split::Validation {
        assert_eq!(sequences.len_per_epoch(), reference.len() as u64);
        assert!(sequences.sequence(reference.len() as u64).is_err());
    }
}

#[test]
fn training_windows_equal_the_reference_at_document_level() {
    continuous_agrees(Split::Train, FimLevel::Document, 0.5);
}

#[test]
fn training_windows_equal_the_reference_at_window_level() {
    continuous_agrees(Split::Train, FimLevel::Window, 0.7);
}

#[test]
fn training_windows_equal_the_reference_without_infilling() {
    continuous_agrees(Split::Train, FimLevel::Document, 0.0);
}

#[test]
fn validation_windows_equal_the_reference_at_both_levels() {
    continuous_agrees(Split::Validation, FimLevel::Document, 0.5);
    continuous_agrees(Split::Validation, FimLevel::Window, 0.5);
}

/// Compares with the reference of the seed-compatible mode over several buffers and passes.
fn seed_agrees(split: Split, fim_rate: f64, fim_spm_rate: f64, buffer_sequences: u64) {
    let workshop = Workshop::standard();
    let mut spec = spec(Packing::SeedCompatible, FimLevel::Document);
    (spec.fim_rate, spec.fim_spm_rate) = (fim_rate, fim_spm_rate);
    let (dataset, tokenizer) = (workshop.dataset(), workshop.tokenizer().join("tokenizer.json"));
    let reference = python(
        "seed_reference.py",
        &[
            "--dataset",
            path(&dataset),
            "--tokenizer",
            path(&tokenizer),
            "--split",
            split.name(),
            "--sequence-tokens",
            "48",
            "--buffer-sequences",
            &buffer_sequences.to_string(),
            "--fim-rate",
            &fim_rate.to_string(),
            "--fim-spm-rate",
            &fim_spm_rate.to_string(),
            "--seed",
            "7",
            "--count",
            "300",
        ],
    );
    let Some(reference) = reference else { return };
    let reference: Vec<Vec<u32>> = serde_json::from_str(&reference).unwrap();
    let sequences =
        Sequences::open_with_buffer(&spec, &dataset, &tokenizer, split, &workshop.cache(), buffer_sequences)
            .unwrap();
    assert!(reference.len() > 10);
    assert_eq!(served(&sequences, reference.len()), reference);
    let last = reference.len() - 1;
    assert_eq!(sequences.sequence(3).unwrap().tokens, reference[3]);
    assert_eq!(sequences.sequence(last as u64).unwrap().tokens, reference[last]);
    if split == Split::Validation {
        assert!(sequences.sequence(reference.len() as u64).is_err());
    } else {
        assert_eq!(reference.len(), 300);
    }
}

#[test]
fn the_originals_training_windows_are_reproduced() {
    seed_agrees(Split::Train, 0.5, 0.5, 16);
    // Probabilities on both sides of one half take different paths in NumPy.
    seed_agrees(Split::Train, 0.9, 0.2, 5);
}

#[test]
fn the_originals_windows_without_infilling_and_at_certainty_are_reproduced() {
    seed_agrees(Split::Train, 0.0, 0.0, 16);
    seed_agrees(Split::Train, 1.0, 1.0, 16);
}

#[test]
fn the_originals_buffers_that_hold_several_passes_are_reproduced() {
    seed_agrees(Split::Train, 0.5, 0.5, 250);
}

#[test]
fn the_originals_validation_windows_are_reproduced() {
    seed_agrees(Split::Validation, 0.5, 0.5, 5);
}
